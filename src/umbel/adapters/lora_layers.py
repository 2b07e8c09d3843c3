"""LoRA layers of PEFT: which tensors a LoraConfig makes, and a module that has them.

C adapters of rank r are one stock LoRA of rank C·r: PEFT's layer multiplies by α / r, whatever the number of
rows of A, so the mixture's factors (mixture.py) take the places of its two weights. Any base that PEFT can
put a LoRA on will do, quantised ones too, for the base itself is not touched.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from umbel.adapters.bank import Kind, LowRank
from umbel.errors import ModelError, RecipeError, meant
from umbel.model import stacked
from umbel.model.copies import copied
from umbel.tree import HALF

NAME = "default"  # PEFT's own name for a module's only adapter

_TAKEN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
)  # the last five say nothing about the layers
# Why the others are refused, unless they have LoraConfig's own value.
_REFUSED = {
    "bias": "biases of the base are frozen",
    "modules_to_save": "heads are trained by the task",
    "use_dora": "magnitudes cannot be mixed",
    "init_lora_weights": "factors are drawn by the method's seed",
    "layer_replication": "the base stays as it is",
    "target_parameters": "factors of more than one matrix have no mixture here",
    "arrow_config": "routers are the method's",
    "monteclora_config": "draws are the method's",
    "corda_config": "the start changes the base",
    "eva_config": "the start needs data",
    "kasa_config": "the start changes the base",
    "loftq_config": "the start changes the base",
    "lora_ga_config": "the start needs data",
}


def config_of(table: Mapping[str, Any]) -> Any:
    """The LoraConfig of these settings.

    Raises:
        RecipeError: naming the setting that PEFT does not know, that umbel cannot mix, or that is out of range.
    """
    from peft import LoraConfig

    defaults = {setting.name: setting.default for setting in fields(LoraConfig)}
    known = [name for name in defaults if name not in ("peft_type", "auto_mapping")]
    for key, value in table.items():
        if key not in known:
            raise RecipeError(
                f"adapter.peft.{key}: LoraConfig has no such setting; {meant(key, known, _TAKEN[:-5])}"
            )
        default = defaults[key]
        nothing = (
            value is None or value == default or (value in ((), [], {}) and (default is MISSING or not default))
        )
        if key not in _TAKEN and not nothing:
            why = _REFUSED.get(key, "an adapter has two factors for each layer and no more")
            raise RecipeError(f"adapter.peft.{key} = {value!r} is not for mixing: {why}; leave it out")
    _check_numbers(table)
    try:
        return LoraConfig(**table)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"adapter.peft: {error}") from None


def _check_numbers(table: Mapping[str, Any]) -> None:
    ranks = {"r": table.get("r", 8)} | {
        f"rank_pattern.{k}": v for k, v in (table.get("rank_pattern") or {}).items()
    }
    alphas = {"lora_alpha": table.get("lora_alpha", 8)}
    alphas |= {f"alpha_pattern.{k}": v for k, v in (table.get("alpha_pattern") or {}).items()}
    for key, value in ranks.items():
        if type(value) is not int or value < 1:
            raise RecipeError(f"adapter.peft.{key} = {value!r}: a rank is a whole number of at least 1")
    for key, value in alphas.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise RecipeError(f"adapter.peft.{key} = {value!r}: a positive number is wanted")
    dropout = table.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise RecipeError(f"adapter.peft.lora_dropout = {dropout!r}: a number in [0, 1) is wanted")


def parts_of(module: nn.Module, table: Mapping[str, Any]) -> tuple[LowRank, ...]:
    """The low-rank updates that PEFT would put on the module's frozen layers.

    Raises:
        ModelError: the targets match nothing, or a layer that is trained itself or that PEFT adapts in a way
            that is no low-rank update of its weight.
    """
    parts = []
    for path, layer in lora_layers(with_lora(module, table)).items():
        a, b = factors_of(layer)
        names = factor_names(path, layer)
        kind: Kind = "embedding" if ".lora_embedding_A." in names[0] else "linear" if a.dim() == 2 else "conv"
        shape = (b.shape[0], *a.shape[1:])
        on_a = (True,) * (a.dim() - 2)
        scaling, gated = layer.scaling[NAME], stacked.GATE in layer._buffers
        parts.append(LowRank(f"{path}.weight", kind, shape, a.shape[0], on_a, True, names, scaling, gated))
    return tuple(parts)


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers in the module, by path."""
    return {path: layer for path, layer in module.named_modules() if hasattr(layer, "lora_A")}


def factor_names(path: str, layer: Any) -> tuple[str, str]:
    """The names of the layer's A and B."""
    if NAME in layer.lora_A:
        return f"{path}.lora_A.{NAME}.weight", f"{path}.lora_B.{NAME}.weight"
    return f"{path}.lora_embedding_A.{NAME}", f"{path}.lora_embedding_B.{NAME}"


def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """The layer's A (r, in, *kernel) and B (out, r, *ones); an embedding has one column of A for each word."""
    if NAME in layer.lora_A:
        return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]


def inner_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The module that PEFT adapts, and its path with a dot: transformers' model inside, or the module itself."""
    from transformers import PreTrainedModel

    for path, layer in module.named_modules():
        if isinstance(layer, PreTrainedModel):
            return f"{path}." if path else "", layer
    return "", module


def with_lora(module: nn.Module, table: Mapping[str, Any]) -> nn.Module:
    """A copy of the module with PEFT's LoRA layers in it; frozen tensors are shared, the module stays as it is.

    Raises:
        ModelError: see `parts_of`.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    adapted = copied(module)
    _, inner = inner_of(adapted)
    config = config_of(_for_layers(inner, table))
    trained = {name.rpartition(".")[0] for name, leaf in inner.named_parameters() if leaf.requires_grad}
    requires = {name: leaf.requires_grad for name, leaf in inner.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # which PEFT then does
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # paths tie nothing
            warnings.filterwarnings("ignore", "The following .*_pattern keys")  # refused below
            warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")  # refused below
            inject_adapter_in_model(config, inner, NAME)
    except (ValueError, TypeError, re.error) as error:
        raise ModelError(f"adapter.peft: {str(error).rstrip('. ')}; {_known(inner_of(module)[1])}") from None
    _check_names(inner_of(module)[1], lora_layers(inner), config)
    for path, layer in lora_layers(inner).items():
        if path in trained:
            raise ModelError(
                f"adapter.peft.target_modules: {path} is trained itself; freeze it (requires_grad_(False)) or "
                f"name it in adapter.peft.exclude_modules"
            )
        _check_layer(path, layer)
        for name, leaf in layer.named_parameters():
            if "lora_" in name and leaf.dtype in HALF:  # PEFT gives them the base's type
                leaf.data = leaf.data.float()
        if _in_rows(inner, layer):
            layer.__class__ = _embedding_in_rows()
        if type(layer) is Linear:  # those of quantised layers keep PEFT's own path
            layer.__class__ = _gated_linear()  # type: ignore[assignment]
            layer.register_buffer(stacked.GATE, torch.ones(1), persistent=False)
    for name, leaf in inner.named_parameters():  # PEFT has frozen the head too
        leaf.requires_grad_(requires.get(name, "lora_" in name))
    return adapted


def is_of_pattern(pattern: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern speaks of the layer, as PEFT reads it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _check_names(before: nn.Module, layers: Iterable[str], config: Any) -> None:
    """Raises ModelError if a name or pattern in the settings matches nothing, which PEFT lets pass."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(is_of_pattern(pattern, path) for path in layers):
                raise ModelError(
                    f"adapter.peft.{key}: {pattern} matches no adapted layer; there are {_listed(layers)}"
                )
    paths = [path for path, _ in before.named_modules()]
    names = config.target_modules or ()
    for name in () if isinstance(names, str) else sorted(names):
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise ModelError(f"adapter.peft.target_modules: {name} is the name of no layer; {_known(before)}")


def _known(before: nn.Module) -> str:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    found = {path.rpartition(".")[2] for path, layer in before.named_modules() if isinstance(layer, kinds)}
    return f"the layers of {type(before).__name__} are called {_listed(found - {''})}"


def _listed(names: Iterable[str], most: int = 12) -> str:
    known = sorted(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "") or "none"


def _check_layer(path: str, layer: Any) -> None:
    """Raises ModelError where PEFT's path is not what the update of the layer's weight would be."""
    base = layer.get_base_layer()
    why = ""
    if isinstance(base, nn.MultiheadAttention):
        why = "for nn.MultiheadAttention is no single matrix"
    elif isinstance(base, nn.modules.conv._ConvNd):
        if base.groups > 1:
            why = f"for it is a convolution with {base.groups} groups, whose ranks belong to one group each"
        elif any(step > 1 for step in base.dilation) or base.padding_mode != "zeros":
            why = "for PEFT leaves out a convolution's dilation and padding mode"
    if why:
        raise ModelError(
            f"adapter.peft.target_modules: {path} cannot be adapted, {why}; "
            f"name it in adapter.peft.exclude_modules"
        )


def _in_rows(inner: nn.Module, layer: Any) -> bool:
    """Whether it is a plain embedding of the words, whose factors may have a leading client axis (stacked.py).

    Other embeddings, of positions and the like, see the same for all rows.
    """
    base = layer.get_base_layer()
    if type(base) not in (nn.Embedding, stacked.StackedEmbedding) or base.max_norm or base.scale_grad_by_freq:
        return False
    words: Any = getattr(inner, "get_input_embeddings", lambda: None)
    return words() is layer


@cache
def _embedding_in_rows() -> type[nn.Module]:
    """PEFT's layer for embeddings, but that its factors may have a leading client axis."""
    from peft.tuners.lora.layer import Embedding

    class EmbeddingInRows(Embedding):
        client_axis = f"lora_embedding_A.{NAME}", f"lora_embedding_B.{NAME}"

        def forward(self, x: Tensor) -> Tensor:
            a, b = factors_of(self)
            if a.dim() == b.dim() == 2:
                plain: Tensor = super().forward(x)
                return plain
            base: Any = self.get_base_layer()
            thin = stacked.embedding(x, a.mT)
            if base.padding_idx is not None:  # the row of it is used as it is, but never trained
                thin = torch.where(torch.eq(x, base.padding_idx).unsqueeze(-1), thin.detach(), thin)
            embedded: Tensor = base(x)
            return torch.add(embedded, stacked.linear(thin, b) * self.scaling[NAME]).to(embedded.dtype)

    return EmbeddingInRows


@cache
def _gated_linear() -> type[nn.Module]:
    """PEFT's layer beside a linear one, but that it runs as `stacked.low_rank`, with a gate."""
    from peft.tuners.lora.layer import Linear

    class GatedLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            apart = hasattr(self.lora_A[NAME], "weights")  # by row: gate.py
            if args or kwargs or self.merged or self.disable_adapters or apart:
                as_peft: Tensor = super().forward(x, *args, **kwargs)
                return as_peft
            base: Any = self.get_base_layer()
            a, b = factors_of(self)
            gate = self.get_buffer(stacked.GATE) * self.scaling[NAME]
            return stacked.low_rank(base(x), self.lora_dropout[NAME](x), a, b, gate)

    return GatedLinear


def _for_layers(inner: nn.Module, table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with "all-linear" meaning all that are frozen, and Conv1D's layout said to PEFT."""
    from transformers.pytorch_utils import Conv1D

    settings = dict(table)
    trained = sorted({name.rpartition(".")[0] for name, leaf in inner.named_parameters() if leaf.requires_grad})
    if settings.get("target_modules") == "all-linear" and trained:
        excluded = settings.get("exclude_modules") or []
        if isinstance(excluded, str):
            settings["exclude_modules"] = "|".join([f"(?:{excluded})", *map(re.escape, trained)])
        else:
            settings["exclude_modules"] = [*excluded, *trained]
    if any(isinstance(layer, Conv1D) for layer in inner.modules()):
        settings.setdefault("fan_in_fan_out", True)
    return settings
