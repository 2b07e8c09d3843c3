"""Copies of modules that share what nobody changes."""

from collections.abc import Container
from copy import deepcopy

from torch import nn


def copied(module: nn.Module, but: Container[str] = ()) -> nn.Module:
    """A copy with parameters, buffers and hooks of its own, but for frozen parameters on the CPU.

    Those are the module's own tensors, so that a large frozen base is in memory once: whoever writes to one names
    it in `but`, and gets a copy of that too. Packed parameters are copied: bitsandbytes takes the scales off
    them when their layer first runs, and another layer with the same one would be without.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    written = {id(leaf) for name, leaf in named if name in but}
    shared = {
        id(leaf): leaf
        for _, leaf in named
        if type(leaf) is nn.Parameter
        and not leaf.requires_grad
        and leaf.device.type == "cpu"
        and id(leaf) not in written
    }
    copy: nn.Module = deepcopy(module, shared)
    return copy
