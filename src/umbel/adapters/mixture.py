"""THE IDEA: C adapters of rank r mixed by π are one adapter of rank C·r.

    W + Σ_c π_c B_c A_c  =  W + [π_1 B_1 … π_C B_C] [A_1; …; A_C]

so a mixture is never a loop over adapters. Two exact realizations: "merged" adds the product to the
weight and the plain layer runs; "factored" runs the rank C·r path beside the layer (`with_paths`), in training
with π as gates between the two factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel.adapters.bank import Bank, LowRank
from umbel.adapters.lora_layers import with_lora
from umbel.model import stacked
from umbel.model.copies import copied
from umbel.tree import Params


def mix(
    bank: Bank,
    base: Params,
    adapters: Params,
    probs: Tensor,
    remainder: Params | None = None,
    gates: bool = False,
) -> Params:
    """The tensors of K clients' models: base + Σ_c π_kc · adapter c, differentiable in all three.

    Args:
        base: the module's trained tensors, leading axis K; frozen ones are the bank's.
        adapters: the bank's tensors, leading axes K, C.
        probs: (K, C), each row on the simplex; or (K, L, C), a row for each of the bank's layers.
        remainder: dense updates (K, C, …) of merged weights, by the parts' names.
        gates: where a path has a gate, `probs` go there instead of into B: faster in training, for then nothing
            of the adapters' size is scaled, but not to be stored, for B alone is no longer the mixture's.

    Returns:
        `base`'s names with updated tensors, and for factored layers their A (K, C·r, in, …) and
        B (K, out, C·r, …), which the module of `with_paths` runs beside the layer.
    """
    params = dict(base)
    frozen = {n: leaf.expand(len(probs), *leaf.shape) for n, leaf in bank.frozen_on(probs.device).items()}
    base = frozen | base
    of_layer = probs.unbind(1) if probs.dim() == 3 else None

    def weights(name: str) -> Tensor:
        return probs if of_layer is None else of_layer[bank.layer_of(name)]

    for update in bank.additive:
        params[update.name] = base[update.name] + _mean(adapters[update.name], weights(update.name))
    for part in bank.low_rank:
        share = weights(part.name) * bank.scale
        gated = gates and part.gated and part.factored
        a, b = stack_rank(adapters[part.a_name], adapters[part.b_name], None if gated else share)
        if gated:
            params[part.gate_name] = share
        if part.factored:
            params[part.a_name], params[part.b_name] = a, b
            continue
        weight = base[part.name]
        if remainder:
            weight = weight + bank.scale * _mean(remainder[part.name], weights(part.name))
        params[part.name] = _merged(weight, a, b)
    return params


def _mean(deltas: Tensor, probs: Tensor) -> Tensor:
    """(K, …) Σ_c probs (K, C) · deltas (K, C, …)."""
    flat = deltas.reshape(*probs.shape, -1)  # a scalar too has one number
    return torch.bmm(probs.to(deltas.dtype).unsqueeze(1), flat).squeeze(1).view_as(deltas[:, 0])


def stack_rank(a: Tensor, b: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """One adapter of rank C·r: a (K, C, r, in, …) → (K, C·r, in, …), b (K, C, out, r, …) → (K, out, C·r, …).

    b's columns are scaled by probs (K, C), if any.
    """
    if probs is not None:
        b = b * probs.to(b.dtype).reshape(*probs.shape, *[1] * (b.dim() - 2))
    return a.flatten(1, 2), b.transpose(2, 3).flatten(1, 2).transpose(1, 2)


def _merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Weight + B·A for weight (K, out, in, *kernel); kernel axes broadcast against each other."""
    if weight.dim() == 3:
        return torch.baddbmm(weight.to(a.dtype), b, a)
    spatial = tuple(range(3, weight.dim()))
    b_last = b.permute(0, *spatial, 1, 2)  # (K, *kernel_b, out, C·r)
    a_last = a.permute(0, *spatial, 1, 2)  # (K, *kernel_a, C·r, in)
    last = weight.dim() - 2
    return weight + (b_last @ a_last).permute(0, last, last + 1, *range(1, last))


def with_paths(module: nn.Module, bank: Bank) -> nn.Module:
    """A copy of the module whose factored layers add B(A(x)) to their output.

    The two factors become parameters of the layer, empty until `functional_call` or `load` fills them;
    no other name changes and the given module stays as it is.
    """
    if bank.peft:
        return with_lora(module, bank.peft)
    adapted = copied(module)
    for part in bank.low_rank:
        if part.factored:
            path, _, own_name = part.name.rpartition(".")
            layer = adapted.get_submodule(path)
            for name in (f"{own_name}_lora_A", f"{own_name}_lora_B"):
                layer.register_parameter(name, nn.Parameter(torch.empty(0)))
            if part.gated:
                layer.register_buffer(stacked.GATE, torch.ones(1), persistent=False)
            layer.register_forward_hook(_path(part, own_name))
    return adapted


def _path(part: LowRank, own_name: str) -> Any:
    """A forward hook that adds the layer's low-rank path to its output."""

    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        a: Tensor = getattr(layer, f"{own_name}_lora_A")
        b: Tensor = getattr(layer, f"{own_name}_lora_B")
        if isinstance(layer, nn.Embedding):
            path = stacked.linear(stacked.embedding(inputs[0], b), a.mT)
            if layer.padding_idx is not None:  # its row is used as it is, but never trained
                path = torch.where((inputs[0] == layer.padding_idx).unsqueeze(-1), path.detach(), path)
            return (output + path).to(output.dtype)
        if isinstance(layer, nn.modules.conv._ConvNd):
            path = _conv_path(layer, part.on_a, inputs[0].to(a.dtype), a, b)
            return (output + path).to(output.dtype)
        return stacked.low_rank(output, inputs[0], a, b, layer.get_buffer(stacked.GATE))

    return hook


def _conv_path(layer: nn.modules.conv._ConvNd, on_a: tuple[bool, ...], x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two convolutions in a row that equal one with the kernel B·A.

    Each kernel axis is walked by the factor that has it, with the layer's stride and dilation there; the
    padding is put around x first, so that its mode is the layer's own. With groups, A is applied to
    every group's channels and B within each group.
    """
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(on_a)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    stride_a = [s if mine else 1 for s, mine in zip(layer.stride, on_a, strict=True)]
    stride_b = [1 if mine else s for s, mine in zip(layer.stride, on_a, strict=True)]
    groups = layer.groups
    repeated = a.repeat(groups, *[1] * (a.dim() - 1))
    dilation = list(layer.dilation)
    hidden: Tensor = convolve(x, repeated, None, stride_a, 0, dilation, groups)
    path: Tensor = convolve(hidden, b, None, stride_b, 0, dilation, groups)
    return path
