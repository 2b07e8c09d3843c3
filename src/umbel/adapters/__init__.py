"""Adapter banks: which tensors they are, how C of them are mixed into one, how they are trained."""

from umbel.adapters.bank import Bank
from umbel.adapters.mixture import mix, with_paths
from umbel.adapters.plan import AdapterPlan

__all__ = ["AdapterPlan", "Bank", "mix", "with_paths"]
