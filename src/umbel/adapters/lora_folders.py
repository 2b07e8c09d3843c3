"""Folders that PEFT wrote, as what adapters start from.

A folder's layer multiplies B·A by its own α / r (α / √r with use_rslora), the bank's by s. So that products are
equal, B is taken times (α / r) / s.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from umbel.adapters.bank import LowRank
from umbel.adapters.lora_layers import is_of_pattern
from umbel.errors import RecipeError
from umbel.tree import Params
from umbel.untrusted import table_of, tensors_of

LOG = logging.getLogger(__name__)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<path>.+)\.(?P<which>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


def seed_of(parts: Sequence[LowRank], folder: str, base: str = "") -> Params:
    """A folder's factors by these parts' names: A (r', in, *kernel) and B (out, r', *ones), r' at most the part's.

    Between the bank's layers they make the very products that they make in the folder's. Heads in it are not read.
    A folder that says it was made for another base than the one of that name is taken, with a warning: whether the
    one was made of the other, nobody can tell from here.

    Raises:
        RecipeError: the folder is none of PEFT's LoRA, or does not fit; the layer is named.
    """
    config, layers = _read(Path(folder).expanduser())
    own = str(config.get("base_model_name_or_path") or "")
    if own and base and Path(own).name.casefold() != Path(base).name.casefold():
        _warn_once(folder, own, base)
    prefix = _check_layers(parts, folder, layers)
    factors: Params = {}
    for part in parts:
        path = part.name.rpartition(".")[0].removeprefix(prefix)
        a, b = layers[path]
        where = f"adapter.seeds: {folder}, layer {path}"
        _check_shapes(where, (a, b), part.a_shape, part.b_shape)
        scaling = _scaling(config, path, len(a), where) / part.scaling
        factors |= {part.a_name: a.float(), part.b_name: (b.double() * scaling).float()}
    return factors


@cache
def _warn_once(folder: str, own: str, base: str) -> None:
    LOG.warning("adapter.seeds: %s is an adapter of %s, and this base is %s", folder, own, base)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The adapter_config.json of a folder, and A and B of its layers by their paths in the base."""
    try:
        config = table_of(folder / "adapter_config.json")
        tensors, _ = tensors_of(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"adapter.seeds: {folder} is no folder with adapter_config.json and adapter_model.safetensors, "
            f"as PEFT's save_pretrained writes it ({error})"
        ) from None
    if config.get("peft_type") != "LORA":
        raise RecipeError(
            f"adapter.seeds: {folder} has an adapter of the type {config.get('peft_type')}, not LORA"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, leaf in tensors.items():
        match = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        if match is not None:
            found.setdefault(match["path"], {})["A" if "_A" in match["which"] else "B"] = leaf
        elif ".lora_" in name:
            raise RecipeError(
                f"adapter.seeds: {folder}, {name}: an adapter has two factors for each layer and no more"
            )
    halves = [path for path, pair in found.items() if len(pair) < 2]
    if halves or not found:
        raise RecipeError(f"adapter.seeds: {folder} lacks A or B of {halves[0] if halves else 'every layer'}")
    return config, {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _check_layers(parts: Sequence[LowRank], folder: str, layers: dict[str, Any]) -> str:
    """What comes before the layers' paths in the names of the parts.

    Raises:
        RecipeError: the folder has not the same layers.
    """
    paths = [part.name.rpartition(".")[0] for part in parts]
    fits = [path.removesuffix(own) for own in layers for path in paths if f".{path}".endswith(f".{own}")]
    prefix = Counter(fits).most_common(1)[0][0] if fits else ""
    missing = [path.removeprefix(prefix) for path in paths if path.removeprefix(prefix) not in layers]
    strange = [own for own in layers if f"{prefix}{own}" not in paths]
    if missing or strange:
        what = f"has no layer {missing[0]}" if missing else f"adapts {strange[0]}, which adapter.peft does not"
        raise RecipeError(f"adapter.seeds: {folder} {what}; let adapter.peft.target_modules name the same layers")
    return prefix


def _check_shapes(
    where: str, factors: tuple[Tensor, Tensor], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    """Raises RecipeError unless factors of some rank fit those of the bank, which has as many ranks or more."""
    a, b = (tuple(leaf.shape) for leaf in factors)
    if a[1:] != a_shape[1:] or (b[0], *b[2:]) != (b_shape[0], *b_shape[2:]) or b[1] != a[0]:
        raise RecipeError(f"{where}: A {a} and B {b} do not fit the base's A {a_shape} and B {b_shape}")
    if a[0] > a_shape[0]:
        raise RecipeError(
            f"{where}: its rank {a[0]} is larger than adapter.peft's {a_shape[0]}; raise r or rank_pattern there"
        )


def _scaling(config: dict[str, Any], path: str, rank: int, where: str) -> float:
    """What the folder's layer multiplies B·A by."""
    start = config.get("init_lora_weights")
    if start not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise RecipeError(
            f"{where}: init_lora_weights = {start!r} has changed the base; it cannot seed a bank on this one"
        )
    for setting in ("use_dora", "lora_bias", "alora_invocation_tokens", "kasa_config", "monteclora_config"):
        if config.get(setting):
            raise RecipeError(f"{where}: {setting} makes it more than two factors; it cannot seed a bank")
    said = _own(config, "rank_pattern", path, config.get("r"), where)
    alpha = _own(config, "alpha_pattern", path, config.get("lora_alpha"), where)
    if said != rank or not isinstance(alpha, int | float):
        raise RecipeError(
            f"{where}: adapter_config.json says rank {said} and alpha {alpha}, but A has {rank} rows"
        )
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def _own(config: dict[str, Any], key: str, path: str, common: Any, where: str) -> Any:
    """What the pattern of that key says of the layer, as PEFT reads it; `common` if it says nothing.

    Raises:
        RecipeError: it is no table, or one of its keys is no pattern.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise RecipeError(f"{where}: adapter_config.json has {key} = {patterns!r}, and a table is wanted")
    try:
        return next((value for name, value in patterns.items() if is_of_pattern(name, path)), common)
    except re.error as error:
        raise RecipeError(f"{where}: adapter_config.json has a {key} that is none: {error}") from None
