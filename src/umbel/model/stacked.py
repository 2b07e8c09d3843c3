"""Layers whose tensors may have a leading client axis: K clients are one ordinary forward pass.

The rows of K clients' batches lie one client after the other, (K·B, …), as in one large batch. Layers with a
tensor for all run as always, so that a frozen base costs one matrix product for everyone; a layer with a
tensor for each client is one batched product. No `vmap`: attention kernels, masks that look at their data and
quantised layers work as they do in one model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel.model.dropout import KEY, ROWS, SeededDropout

_APART = (
    nn.Identity,
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.Flatten,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Dropout,
    SeededDropout,
)  # layers that look at one row at a time


GATE = "lora_gate"  # the buffer with what each of C adapters counts in a low-rank path: (C,), or (K, C)


class RowsMeetError(RuntimeError):
    """A layer with a client's own tensor sees something else than the rows of the batch."""


_num_rows: ContextVar[int] = ContextVar("num_rows", default=0)


@contextmanager
def rows_of(num_rows: int) -> Iterator[None]:
    """Inside, what has one row is for all of so many (a text's positions, say); any other number is an error."""
    token = _num_rows.set(num_rows)
    try:
        yield
    finally:
        _num_rows.reset(token)


Factors = list[tuple[Tensor, Tensor]]
"""Of the gradient of a weight (K, out, in): pairs g (K, R, out), x (K, R, in), which stand for Σ gᵀ x."""

_factors: ContextVar[dict[int, Factors] | None] = ContextVar("factors", default=None)


@contextmanager
def factored_gradients(leaves: list[Tensor]) -> Iterator[dict[int, Factors]]:
    """Inside, gradients of these leaves that are smaller as factors stay so: theirs, by the leaf's place.

    What else a leaf is used for autograd sees as always. To write a gradient of the weights' size, to read it and
    to add it costs more traffic of memory than all the rest of a step.
    """
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    kept: dict[int, Factors] = {}
    token = _factors.set({key: kept.setdefault(place, []) for key, place in places.items()})
    try:
        yield kept
    finally:
        _factors.reset(token)


def current_rows() -> int:
    """The number that `rows_of` has set, 0 outside of it."""
    return _num_rows.get()


def _each_row(x: Tensor) -> Tensor:
    """(K·B, …) for x (K·B, …) or (1, …)."""
    wanted = _num_rows.get()
    if not wanted or len(x) == wanted:
        return x
    if len(x) == 1:
        return x.expand(wanted, *x.shape[1:])
    raise RowsMeetError(f"a layer sees {len(x)} rows of a batch of {wanted}")


class StackedLinear(nn.Linear):
    """A linear layer whose weight is (out, in) or (K, out, in), and whose bias is (out,) or (K, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class StackedEmbedding(nn.Embedding):
    """An embedding whose weight is (vocabulary, width) or (K, vocabulary, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.weight.dim() == 2 else embedding(x, self.weight)


class StackedLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis whose weight and bias are (width,) or (K, width)."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is None or (weight.dim() == 1 and (bias is None or bias.dim() == 1)):
            return super().forward(x)
        x = _each_row(x)
        normed = F.layer_norm(x, self.normalized_shape, None, None, self.eps) * _for_rows(weight, x)
        return normed if bias is None else normed + _for_rows(bias, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(K·B, …, out) for x (K·B, …, in); weight (out, in) or (K, out, in), bias (out,) or (K, out)."""
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return F.linear(x, weight, bias)
        x = _each_row(x)
        return F.linear(x, weight) + _for_rows(bias, x)
    x = _each_row(x)
    rows = x.reshape(len(weight), -1, x.shape[-1]).to(_computed_in(x, x.dtype))
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(len(weight), -1)
    kept = (_factors.get() or {}).get(id(weight))
    if kept is not None:
        smaller = rows.shape[1] * (weight.shape[1] + weight.shape[2]) < weight[0].numel()
        kept = kept if smaller and rows.dtype == weight.dtype else None
    product: Tensor = _Product.apply(rows, weight, bias, kept)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], weight.shape[1])


def low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """(K·B, …, out) out + Σ_c gate_c B_c A_c x: low-rank paths beside a layer that made `out` of x (K·B, …, in).

    They are computed in a's type, as PEFT does, or in autocast's; the result has out's type.

    Args:
        out: what the paths are added to.
        x: the layer's input.
        a: (C·r, in) or (K, C·r, in).
        b: (out, C·r) or (K, out, C·r).
        gate: (C,) or (K, C).
    """
    kind = _computed_in(x, a.dtype)
    x, a, b, gate = (leaf.to(kind) for leaf in (x, a, b, gate))
    num_clients = max(len(leaf) if leaf.dim() == dim else 0 for leaf, dim in ((a, 3), (b, 3), (gate, 2)))
    if not num_clients:
        hidden = F.linear(x, a).unflatten(-1, (len(gate), -1)) * gate.unsqueeze(1)
        return torch.add(out, F.linear(hidden.flatten(-2), b)).to(out.dtype)
    out, x = _each_row(out), _each_row(x)
    rows = [part.reshape(num_clients, -1, part.shape[-1]) for part in (out, x)]
    factors = [leaf.expand(num_clients, *leaf.shape[-2:]) for leaf in (a, b)]
    path: Tensor = _Path.apply(*rows, *factors, gate.expand(num_clients, -1))  # type: ignore[no-untyped-call]
    return path.view(out.shape)


def _computed_in(x: Tensor, kind: torch.dtype) -> torch.dtype:
    """The type in which products with x are computed: autocast's, or `kind` without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kind


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """(K·B, …, width) for ids (K·B, …); weight (vocabulary, width) or (K, vocabulary, width)."""
    if weight.dim() == 2:
        return F.embedding(ids, weight)
    ids = _each_row(ids)
    first = torch.arange(len(weight), device=ids.device) * weight.shape[1]
    shifted = ids.reshape(len(weight), -1) + first.unsqueeze(1)
    return F.embedding(shifted, weight.flatten(0, 1)).view(*ids.shape, weight.shape[2])


def _for_rows(vectors: Tensor, x: Tensor) -> Tensor:
    """(K, width) → (K·B, 1, …, width), or (width,) as it is."""
    if vectors.dim() == 1:
        return vectors
    each = vectors.repeat_interleave(len(x) // len(vectors), 0)
    return each.view(len(x), *[1] * (x.dim() - 2), -1)


class _Product(torch.autograd.Function):
    """x (K, R, in), weight (K, out, in), bias (K, out) → (K, R, out).

    The gradient of the weight is computed as gᵀ x, laid out as the weight is: PyTorch's own formula gives its
    transpose, and adding that to the weight walks memory across the grain. With `kept` it is not computed: its
    factors go there (`factored_gradients`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Factors | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept = kept
        ctx.has_bias = bias is not None
        weight = weight.to(x.dtype)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.to(x.dtype).unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = torch.bmm(grad, weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.kept is not None:
            ctx.kept.append((grad, x))
        elif ctx.needs_input_grad[1]:
            to_weight = torch.bmm(grad.mT, x).to(weight.dtype)
        return to_x, to_weight, grad.sum(1).to(weight.dtype) if ctx.has_bias else None, None


class _Path(torch.autograd.Function):
    """out (K, R, out), x (K, R, in), a (K, C·r, in), b (K, out, C·r), gate (K, C) → out + Σ_c gate_c B_c A_c x.

    Nothing of the factors' size is made but their gradients: gates are where the path is thin, between the two.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        hidden = torch.bmm(a, x.mT)  # (K, C·r, R): with the ranks last, few of them would be slow
        ctx.save_for_backward(x, a, b, gate, hidden)
        gated = _gated(hidden, gate)
        if out.dtype == x.dtype:
            return torch.baddbmm(out, gated.mT, b.mT)
        return torch.add(out, torch.bmm(gated.mT, b.mT)).to(out.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, gate, hidden = ctx.saved_tensors
        _, for_x, for_a, for_b, for_gate = ctx.needs_input_grad
        own = grad.to(x.dtype)
        to_hidden = torch.bmm(b.mT, own.mT)  # (K, C·r, R), for now without the gate
        to_gate = (to_hidden * hidden).view(*gate.shape, -1).sum(2) if for_gate else None
        to_hidden.view(*gate.shape, -1).mul_(gate.unsqueeze(2))
        return (
            grad,
            torch.bmm(to_hidden.mT, a) if for_x else None,
            torch.bmm(to_hidden, x) if for_a else None,
            torch.bmm(_gated(hidden, gate), own).mT if for_b else None,
            to_gate,
        )


def _gated(hidden: Tensor, gate: Tensor) -> Tensor:
    """Hidden (K, C·r, R), adapter c's rows times gate (K, C)."""
    return (hidden.view(*gate.shape, -1) * gate.unsqueeze(2)).view(hidden.shape)


def stackable(module: nn.Module) -> nn.Module:
    """The module, its plain linear layers and layer norms made to take a leading client axis, in place."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = StackedLinear
        elif type(layer) is nn.Embedding and not (
            layer.padding_idx is not None or layer.max_norm or layer.scale_grad_by_freq or layer.sparse
        ):
            layer.__class__ = StackedEmbedding
        elif type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1:
            layer.__class__ = StackedLayerNorm
    return module


def takes_client_axis(module: nn.Module) -> frozenset[str]:
    """The names of the tensors that may have a leading client axis; none if rows of a batch may meet.

    A module says that its rows are apart with an attribute `rows_apart`; of PyTorch's own layers in an
    nn.Sequential it is known. A layer of another kind says with `client_axis` which of its tensors may have one.
    """
    known = all(isinstance(layer, (*_APART, nn.Sequential)) for layer in module.modules())
    if not (known or getattr(module, "rows_apart", False)):
        return frozenset()
    names: list[str] = []
    for path, layer in module.named_modules():
        if isinstance(layer, (StackedLinear, StackedEmbedding, StackedLayerNorm, SeededDropout)):
            own = [name for name, _ in layer.named_parameters(recurse=False)]
            own += [KEY, ROWS] if isinstance(layer, SeededDropout) else []
        else:
            own = list(getattr(layer, "client_axis", ()))
        own += [GATE] if GATE in layer._buffers else []
        names += [f"{path}.{name}" if path else name for name in own]
    return frozenset(names)
