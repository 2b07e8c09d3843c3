"""Copies of modules that share what nobody changes."""

from copy import deepcopy

from torch import nn


def copied(module: nn.Module) -> nn.Module:
    """A copy with parameters, buffers and hooks of its own, but for frozen parameters on the CPU.

    Those are the module's own tensors, so that a large frozen base is in memory once.
    """
    frozen = {
        id(leaf): leaf for leaf in module.parameters() if not leaf.requires_grad and leaf.device.type == "cpu"
    }
    return deepcopy(module, frozen)
