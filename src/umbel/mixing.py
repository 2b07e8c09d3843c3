"""How uploads meet: sums over clients, and the means they give.

A mean Σ_k w_k x_k / Σ_k w_k is kept as its two sums until the last upload is in. Sums add up in any
order and chunking, and under pairwise masks: a server that needs nothing else can be kept from seeing
any single upload.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from umbel import tree
from umbel.tree import HALF, Params

Change = Callable[[Params, Params, Tensor], Params]
"""(what clients made of a group of tensors, (K, …) or (K, C, …), what they had received, what each counts in the
group's mean, (K,) or (K, C)) → what is to stand in the place of the first."""


UNUSED_SHARE = 1e-30  # of the examples; what has less is used by nobody: its mean is rounding error


def moved(values: Params, received: Params, _weights: Tensor) -> Params:
    """How far clients have moved a group of tensors; a Change."""
    return {name: leaf - received[name] for name, leaf in values.items()}


def weighted_sum(weights: Tensor, values: Params) -> Params:
    """Σ_k w_k x_k for x (K, …) with w (K,), or for each adapter c, Σ_k w_kc x_kc for x (K, C, …) with w (K, C).

    Tensors of half precision come as float32: a sum over clients has more digits than they have. Sums for each
    adapter lie in the order of their axes, as a checkpoint's do, however the clients' tensors lie (Bank.laid_out).
    """
    values = {name: x.float() if x.dtype in HALF else x for name, x in values.items()}
    if weights.dim() == 1:
        return {name: torch.tensordot(weights.to(x.dtype), x, dims=1) for name, x in values.items()}
    return {name: (as_leading(weights.to(x.dtype), x) * x).sum(0).contiguous() for name, x in values.items()}


def total(contributions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of all contributions, each let go as soon as it is added."""
    return reduce(tree.add, contributions)


def mean(sums: Params, weights: Tensor) -> Params:
    """Σ w x / Σ w; where the weights (a number, or one for each adapter) are 0 the result is 0, not NaN."""
    return {
        name: x / as_leading(weights.clamp(min=torch.finfo(weights.dtype).tiny).to(x.dtype), x)
        for name, x in sums.items()
    }


def restored(moved: Params, weights: Tensor, received: Params) -> Params:
    """Σ w x from Σ w (x − received), for weights Σ w (a number, or one for each adapter).

    Where noise has left no weight at all it is 0, for then nobody is known to have moved anything.
    """
    whole = {}
    for name, change in moved.items():
        weight = as_leading(weights.clamp(min=0).to(change.dtype), change)
        whole[name] = torch.where(weight > 0, change + weight * received[name], 0.0)
    return whole


def step_to(old: Params, mean: Params, step: Tensor | float) -> Params:
    """Old + step · (mean − old); step is a number in [0, 1], or one for each adapter (C,).

    At step 1 this is the mean, and at step 0 old, to the last bit. The result has the type of `old`.
    """
    mean = {name: mean[name].to(leaf.dtype) for name, leaf in old.items()}
    if not isinstance(step, Tensor):
        return mean if step == 1 else {name: torch.lerp(old[name], mean[name], step) for name in old}
    return {
        name: torch.lerp(leaf, mean[name], as_leading(step.to(leaf.dtype), leaf).expand_as(leaf))
        for name, leaf in old.items()
    }


def as_leading(weights: Tensor, values: Tensor) -> Tensor:
    """The weights with trailing axes, to multiply the leading axes of `values`."""
    return weights.reshape((*weights.shape, *[1] * (values.dim() - weights.dim())))
