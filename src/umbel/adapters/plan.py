"""How a module is to be adapted: by a plan of ours for any layer, or by PEFT's LoRA for a frozen base."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from umbel.adapters.bank import Additive, Bank, Kind, LowRank
from umbel.adapters.lora_folders import seed_of
from umbel.adapters.lora_layers import parts_of
from umbel.errors import ModelError, RecipeError
from umbel.model.loss import matches

ConvSplit = Literal["balanced", "in", "out"]
Realization = Literal["auto", "merged", "factored"]


@dataclass(frozen=True)
class AdapterPlan:
    """How a module is to be adapted.

    Attributes:
        rank: a rank (≥ 1) for every layer, or with ρ in (0, 1) a relative budget: per layer the largest
            rank whose parameters are at most ρ times the layer's, at least 1.
        layers: the kinds of parameters that get an update.
        targets: patterns of parameter names (`*` matches anything); a parameter that matches none is
            left alone.
        conv: how a convolution's kernel axes are split.
        scale: factor of every low-rank product (PEFT's alpha / rank).
        realization: "merged" forms W + Σ π_c ΔW_c per client and runs the plain layer, "factored" runs
            the low-rank path beside it, "auto" takes the cheaper of the two, layer by layer.
        peft: the settings of PEFT's LoraConfig (r, lora_alpha, target_modules, …). With them it is PEFT that
            adapts a frozen base, and of the settings above none is left.
        seeds: folders written by PEFT's save_pretrained, or by `umbel export`: what the first adapters start from,
            one each; the others are drawn. Heads in them are not read. With peft only.
    """

    rank: int | float = 0.1
    layers: tuple[Kind, ...] = ("linear", "conv", "bias")
    targets: tuple[str, ...] = ("*",)
    conv: ConvSplit = "balanced"
    scale: float = 1.0
    realization: Realization = "auto"
    peft: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.peft:
            for setting in fields(self):
                if setting.name not in ("peft", "seeds") and getattr(self, setting.name) != setting.default:
                    raise RecipeError(f"adapter.{setting.name}: with adapter.peft, say it there")
        elif self.seeds:
            raise RecipeError("adapter.seeds: folders of PEFT's want adapters made by PEFT; set adapter.peft")
        if self.rank <= 0 or (self.rank >= 1 and self.rank != int(self.rank)):
            raise RecipeError(
                f"adapter.rank = {self.rank}: give a whole rank of at least 1, or a budget between 0 and 1"
            )

    def bank(
        self, module: nn.Module, batch_size: int = 32, freeze: bool = False, left: Sequence[str] = ()
    ) -> Bank:
        """The updates of `module`'s parameters under this plan, but for those that patterns in `left` match.

        With `freeze` no parameter of the module itself is trained, otherwise none with requires_grad=False.
        What is adapted but not trained is carried by the plan, for nobody sends it.

        Raises:
            ModelError: nothing in the module can be adapted, or the rank is larger than a layer allows.
        """
        if self.peft:
            return self._of_peft(module)
        known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for pattern in self.targets:
            if not any(matches(name, [pattern]) for name in known):
                raise ModelError(
                    f"adapter.targets: {pattern} matches no parameter of {type(module).__name__}; "
                    f"it has {', '.join(known) or 'none'}"
                )
        low_rank: list[LowRank] = []
        additive: list[Additive] = []
        for path, layer in module.named_modules():
            for own_name, tensor in layer.named_parameters(recurse=False):
                name = f"{path}.{own_name}" if path else own_name
                kind = _kind(layer, tensor)
                if kind not in self.layers or not matches(name, self.targets) or matches(name, left):
                    continue
                if kind in ("bias", "norm"):
                    additive.append(Additive(name, kind, tuple(tensor.shape)))
                else:
                    frozen = freeze or not tensor.requires_grad
                    low_rank.append(self._low_rank(name, kind, layer, tensor, batch_size, frozen))
        first = dict(module.named_parameters())  # tied tensors appear once, under their first name
        names = Counter(id(tensor) for _, tensor in module.named_parameters(remove_duplicate=False))
        parts = tuple(
            # A path beside one of the layers that share a tensor would leave the others as they were.
            replace(part, factored=part.factored and names[id(first[part.name])] == 1)
            for part in low_rank
            if part.name in first
        )
        updates = tuple(update for update in additive if update.name in first)
        if not parts and not updates:
            apart = f", and is not personal ({', '.join(left)})" if left else ""
            raise ModelError(
                f"no parameter of {type(module).__name__} is of the kinds {', '.join(self.layers)} and matches "
                f"{', '.join(self.targets)}{apart}; set adapter.layers or adapter.targets"
            )
        merged = [part.name for part in parts if not part.factored] + [update.name for update in updates]
        untrained = [name for name in merged if freeze or not first[name].requires_grad]
        return Bank(parts, updates, self.scale, {name: first[name].detach().clone() for name in untrained})

    def _of_peft(self, module: nn.Module) -> Bank:
        """The updates that PEFT would make. Raises RecipeError where a folder of `seeds` does not fit."""
        parts = parts_of(module, self.peft)
        seeds = tuple(seed_of(parts, folder, getattr(module, "base", "")) for folder in self.seeds)
        return Bank(parts, (), gain=1.0, peft=self.peft, seeds=seeds)

    def _low_rank(
        self, name: str, kind: Kind, layer: nn.Module, tensor: Tensor, batch_size: int, frozen: bool
    ) -> LowRank:
        shape = tuple(tensor.shape)
        kernel = shape[2:]
        on_a = {
            "balanced": tuple(axis == len(kernel) - 1 for axis in range(len(kernel))),
            "in": (True,) * len(kernel),
            "out": (False,) * len(kernel),
        }[self.conv]
        one = LowRank(name, kind, shape, 1, on_a, factored=False)
        per_rank = prod(one.a_shape) + prod(one.b_shape)
        largest = min(prod(one.a_shape), prod(one.b_shape))
        budget = Fraction(str(self.rank)) * prod(shape)  # as it is written: 0.7 is a little less in binary
        budgeted = min(max(1, int(budget / per_rank)), largest)
        rank = budgeted if self.rank < 1 else int(self.rank)
        if rank > largest:
            raise ModelError(
                f"adapter.rank = {rank} is larger than {name} {shape} allows ({largest}); "
                f"lower it, give a budget below 1, or leave the layer out with adapter.targets"
            )
        cheaper = self._is_factored(kind, layer, shape, per_rank, 0 if frozen else batch_size)
        return LowRank(name, kind, shape, rank, on_a, cheaper, gated=kind == "linear")

    def _is_factored(
        self, kind: Kind, layer: nn.Module, shape: tuple[int, ...], per_rank: int, batch_size: int
    ) -> bool:
        # Only layers whose forward is the plain one can have a path beside them: nn.MultiheadAttention,
        # for one, reads its out_proj's weight without calling it.
        plain = type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        if isinstance(layer, nn.Embedding):  # these two look at the whole weight, or at its whole gradient
            plain = plain and layer.max_norm is None and not layer.scale_grad_by_freq
        if self.realization != "auto":
            return plain and self.realization == "factored"
        # Per rank the merged form costs a pass over the weight, the factored one two thin products per
        # position. A convolution has many positions and a small kernel; an embedding reads few rows. Beside a
        # frozen weight (batch_size 0) the clients share that weight's matrix product.
        return plain and (kind == "embedding" or (kind == "linear" and batch_size * per_rank < prod(shape)))


def _kind(layer: nn.Module, tensor: Tensor) -> Kind:
    """What sort of parameter this is; any matrix counts as "linear", any other vector as "bias"."""
    if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)):
        return "norm"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if tensor.dim() > 2:
        return "conv"
    return "linear" if tensor.dim() == 2 else "bias"
