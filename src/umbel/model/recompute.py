"""Gradient checkpointing where clients' tensors are swapped in: backward computes again with the same tensors.

A block of transformers' that can be checkpointed hands itself to a function of ours. That function notes which
tensors are in the block at the time, for they are there during the forward pass only, and puts them back when
backward wants the block once more.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from umbel.errors import ModelError
from umbel.model.stacked import current_rows, rows_of
from umbel.tree import Params


class _Block(nn.Module):
    """A block that runs `function`, whatever the block's own forward does."""

    def __init__(self, block: nn.Module, function: Any) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def recomputing(module: nn.Module) -> nn.Module:
    """The module, whose blocks keep nothing for backward but their inputs when they train, in place.

    Raises:
        ModelError: it has no block of transformers' that can do so.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[Any] = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"engine.recompute: {type(module).__name__} has no block of transformers' that can be computed again; "
            f"leave it out"
        )
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, _again
    return module


def _again(function: Any, *args: Any) -> Any:
    """What `function`, a partial of a block's forward, makes of `args`; and once more in backward."""
    block: nn.Module = function.args[0] if function.args else function.func.__self__  # before transformers 5
    # With duplicates: all dropouts of a client have the same key.
    tensors: Params = dict(block.named_buffers(remove_duplicate=False))
    tensors |= block.named_parameters(remove_duplicate=False)
    if any(torch._C._functorch.is_batchedtensor(leaf) for leaf in (*tensors.values(), args[0])):
        return function(*args)  # clients under vmap: what is in the block is gone when backward comes
    wrapped, rows = _Block(block, function), current_rows()

    def run(*args: Any) -> Any:
        with rows_of(rows):
            return functional_call(wrapped, {f"block.{name}": leaf for name, leaf in tensors.items()}, args)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
