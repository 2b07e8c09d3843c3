"""Which tensors the adapters are: a plan of low-rank and additive updates for any module.

For a parameter W of shape (out, in, *kernel), adapter c adds

    ΔW_c[o, i, s] = scale · Σ_j B_c[o, j, s_B] A_c[j, i, s_A]

where the kernel's axes are split between A and B: one of the two has the axis at full length, the other
has length 1 there. A linear layer has no kernel axes; "balanced" gives the last axis to A and the others
to B (the channel+filter-wise ConvLoRA of Almansoori et al. 2025, App. G.1), "in" gives all to A and "out"
all to B. Biases and the weights of norm layers get an additive update of their own shape.

The formula speaks of the weight alone, so it holds for any stride, padding, dilation and padding mode.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umbel.errors import RecipeError
from umbel.model.stacked import GATE
from umbel.tree import Params, is_broadcast, wide

Kind = Literal["linear", "conv", "embedding", "norm", "bias"]


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one parameter; A is (rank, in, *kernel_a), B is (out, rank, *kernel_b)."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    rank: int
    on_a: tuple[bool, ...]  # for each kernel axis, whether A has it (else B)
    factored: bool  # whether the low-rank path runs beside the layer instead of inside its weight
    names: tuple[str, str] | None = None  # of A and B where PEFT has named them; its embeddings are transposed
    scaling: float = 1.0  # of PEFT's layer, which multiplies the product by it itself
    gated: bool = False  # whether the path beside the layer has a gate between the two (model/stacked.py)

    @property
    def a_name(self) -> str:
        return self.names[0] if self.names else f"{self.name}_lora_A"

    @property
    def b_name(self) -> str:
        return self.names[1] if self.names else f"{self.name}_lora_B"

    @property
    def gate_name(self) -> str:
        """The name of the gate's buffer, which is there if `gated` and `factored`."""
        path = self.name.rpartition(".")[0]
        return f"{path}.{GATE}" if path else GATE

    @property
    def indexed(self) -> str | None:
        """The name of the factor with a row or column for each word; None where this is no embedding."""
        if self.kind != "embedding":
            return None
        return self.a_name if self.names else self.b_name

    @property
    def a_shape(self) -> tuple[int, ...]:
        return (
            self.rank,
            self.shape[1],
            *(k if on_a else 1 for k, on_a in zip(self.shape[2:], self.on_a, strict=True)),
        )

    @property
    def b_shape(self) -> tuple[int, ...]:
        return (
            self.shape[0],
            self.rank,
            *(1 if on_a else k for k, on_a in zip(self.shape[2:], self.on_a, strict=True)),
        )

    def weight_of(self, matrix: Tensor) -> Tensor:
        """(…, out, in, *kernel) the update that a product's matrix (…, out·kernel_b, in·kernel_a) stands for."""
        leading, num_axes = matrix.shape[:-2], len(self.on_a)
        apart = matrix.reshape(*leading, self.shape[0], *self.b_shape[2:], self.shape[1], *self.a_shape[2:])
        first, n = len(leading), num_axes
        of_b = [first + 1 + axis for axis in range(n)]
        of_a = [first + 2 + n + axis for axis in range(n)]
        pairs = [axis for pair in zip(of_b, of_a, strict=True) for axis in pair]
        order = [*range(first), first, first + 1 + n, *pairs]
        return apart.permute(order).reshape(*leading, *self.shape)


@dataclass(frozen=True)
class Additive:
    """An update of the parameter's own shape."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bank:
    """The plan of all updates of one module; `scale` multiplies every low-rank product."""

    low_rank: tuple[LowRank, ...]
    additive: tuple[Additive, ...]
    scale: float = 1.0
    frozen: Params = field(
        default_factory=dict, compare=False, repr=False
    )  # adapted, but not trained: everyone's own copy
    gain: float = 6.0  # A ~ U(−√(gain / fan_in), √(gain / fan_in))
    b_ranks: int = 0  # how many ranks of B begin at random; 0: all
    bias_start: float = 0.0  # how wide extra biases begin
    peft: dict[str, Any] = field(default_factory=dict, repr=False)  # the LoraConfig's settings, if PEFT adapts
    seeds: tuple[Params, ...] = field(default=(), compare=False, repr=False)  # what the first adapters start from

    def init(self, num_adapters: int, draw: torch.Generator, b_std: float) -> Params:
        """C adapters, tensors with a leading axis C: the seeds, and `drawn` ones after them.

        A seed may have fewer ranks. The others keep their drawn rows of A and get zeros in B, so that the product
        is the seed's and training can use all of the rank.

        Raises:
            RecipeError: there are more seeds than adapters.
        """
        if len(self.seeds) > num_adapters:
            raise RecipeError(
                f"adapter.seeds: {len(self.seeds)} folders for {num_adapters} adapters; leave some out, "
                f"or raise num_adapters where the method has it"
            )
        tensors = self.drawn(num_adapters, draw, b_std)
        for place, seed in enumerate(self.seeds):
            for part in self.low_rank:
                a, b = seed[part.a_name], seed[part.b_name]
                tensors[part.a_name][place, : len(a)] = a
                tensors[part.b_name][place, :, : len(a)] = b
                tensors[part.b_name][place, :, len(a) :] = 0
        return tensors

    def drawn(self, num_adapters: int, draw: torch.Generator, b_std: float) -> Params:
        """C random adapters, tensors with a leading axis C.

        A ~ U(−√(gain/fan_in), √(gain/fan_in)) and s B ~ N(0, b_std² / r), independent for each adapter, so that
        s B·A is as large for any rank r and any scale s (α / r); b_std = 0 is LoRA's own start, at which the
        adapted model is the base. With `b_ranks` only so many ranks of B are drawn, as large together, and the
        others are 0; 0 draws all, and embeddings always do.
        Additive updates start at zero, but for biases beside an A and B if there is a `bias_start`: these are then
        U(−1, 1) · bias_start / √(what B sums over), PyTorch's start of a layer B if it is 1. An embedding's factor
        that is indexed, not summed over, is N(0, 1), and the other one drawn as B.
        """
        tensors: Params = {}
        for part in self.low_rank:
            std = b_std * part.rank**-0.5 / (self.scale * part.scaling)
            if part.kind == "embedding":
                for name, shape in ((part.a_name, part.a_shape), (part.b_name, part.b_shape)):
                    drawn = torch.randn(num_adapters, *shape, generator=draw)
                    tensors[name] = drawn if name == part.indexed else drawn * std
                continue
            bound = (self.gain / prod(part.a_shape[1:])) ** 0.5
            uniform = torch.rand(num_adapters, *part.a_shape, generator=draw)
            tensors[part.a_name] = (2 * uniform - 1) * bound
            b = torch.randn(num_adapters, *part.b_shape, generator=draw) * std
            if 0 < self.b_ranks < part.rank:
                b[:, :, : self.b_ranks] *= (part.rank / self.b_ranks) ** 0.5
                b[:, :, self.b_ranks :] = 0
            tensors[part.b_name] = b
        for update in self.additive:
            tensors[update.name] = torch.zeros(num_adapters, *update.shape)
        for part in self.low_rank if self.bias_start else ():
            bias = f"{part.name.removesuffix('weight')}bias"
            if bias in tensors:
                uniform = torch.rand(tensors[bias].shape, generator=draw)
                tensors[bias] = (2 * uniform - 1) * self.bias_start / prod(part.b_shape[1:]) ** 0.5
        return tensors

    def laid_out(self, adapters: Params) -> Params:
        """The same tensors (K, C, …), with the ranks of B outside its outputs in memory.

        So the ranks of C adapters lie one after the other, as in A, and are stacked in training without a copy.
        """
        by_rank = dict(adapters)
        for part in self.low_rank:
            b = adapters[part.b_name]
            one = b[:1] if is_broadcast(b) else b
            by_rank[part.b_name] = one.transpose(2, 3).contiguous().transpose(2, 3).expand(b.shape)
        return by_rank

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The type of the adapters' numbers: the module's own, or float32 if that has fewer digits.

        Numbers of half precision, or packed ones, cannot be trained by small steps.
        """
        kinds = [leaf.dtype for leaf in module.parameters() if leaf.is_floating_point()]
        return wide(kinds[0] if kinds else torch.float32)

    def frozen_on(self, device: torch.device) -> Params:
        """The `frozen` tensors on this device, to which they are moved once."""
        if device not in self._moved:
            self._moved[device] = {name: leaf.to(device) for name, leaf in self.frozen.items()}
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, Params]:
        return {}

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the adapted layers."""
        names = [part.name for part in self.low_rank] + [update.name for update in self.additive]
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def layer_of(self, name: str) -> int:
        """The place in `layers` of the layer that a parameter or a factor belongs to."""
        return self._places[name]

    @cached_property
    def _places(self) -> dict[str, int]:
        """By name; a factor of PEFT's lies in a module of its own inside the layer."""
        of = {update.name: update.name for update in self.additive}
        of |= {name: part.name for part in self.low_rank for name in (part.name, part.a_name, part.b_name)}
        layers = self.layers
        return {name: layers.index(own.rpartition(".")[0]) for name, own in of.items()}

    def num_parameters(self) -> int:
        """The numbers in one adapter."""
        low_rank = sum(prod(part.a_shape) + prod(part.b_shape) for part in self.low_rank)
        return low_rank + sum(prod(update.shape) for update in self.additive)
