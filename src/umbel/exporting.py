"""Personal models as PEFT folders: what PeftModel.from_pretrained loads without umbel.

A client's mixture of C adapters of rank r is one stock LoRA of rank R = C·r, whose B has the mixture's weights in
it (adapters/mixture.py). A layer multiplies by α / R (α / √R with use_rslora), so that α becomes

    α' = α R / r      (α √(R / r))

and the folder's model is the client's own. Heads, and whatever else a client has of its own, are modules_to_save.
Of a method nothing is needed but that `personalize` names PEFT's tensors: any method with adapter.peft will do.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umbel import __version__
from umbel.adapters.lora_layers import NAME, factor_names, inner_of, lora_layers
from umbel.errors import ModelError, RecipeError, RunFolderError
from umbel.folder import save_tensors, write, write_json
from umbel.methods import METHODS
from umbel.methods.gate import Gated
from umbel.model.dropout import KEY
from umbel.model.pretrained import Pixels, Pooling
from umbel.recipe import name_of
from umbel.runs import Result
from umbel.tasks.bases import place_of
from umbel.tree import Params

FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "text": "SEQ_CLS"}  # of model/pretrained.py's kinds; images have none
_LOADED = """\
    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, folder)
"""
_WIDENED = """\
    import torch
    base_model.{head} = torch.nn.Linear(4 * base_model.{head}.in_features, base_model.{head}.out_features)
"""
_POOLED = """\

Its head was trained on the mean of the tokens' last states, which the base does not pass to it by itself. With
`read` what the tokenizer makes of texts, or of pairs of texts:

    inner, real = model.get_base_model(), read["attention_mask"].unsqueeze(2)
    states = inner.base_model(**read).last_hidden_state
    logits = inner.{head}((states * real).sum(1) / real.sum(1))
"""
_OF_PAIRS = """\

Its head was trained on what the means u and v of two texts' last states say together, which the base does not pass
to it by itself. Each text is read alone; where there is but one, v is 0. With `first` and `second` what the
tokenizer makes of either:

    def mean(read):
        states, real = model.get_base_model().base_model(**read), read["attention_mask"].unsqueeze(2)
        return (states.last_hidden_state * real).sum(1) / real.sum(1)

    u, v = mean(first), mean(second)
    logits = model.get_base_model().{head}(torch.cat([u, v, (u - v).abs(), u * v], 1))
"""
IN_MEMORY = "umbel.runs.opened(RUN).task.model"
"""What makes a base that has no name."""

_NAMELESS = f"""
Its base is in no folder and on no hub: the run's task makes it. With umbel it is `{IN_MEMORY}`.

"""
_TASKS_OWN = """\
Its outputs are the labels of several tasks, {each} in a row for each, and were trained to tell those of one task
apart: compare an input's outputs for its own task with each other, and with no others.
"""
_OF_IMAGES = """\

It was trained on images of {given[0]} × {given[1]} pixels{enlarged}.
With `images` (N, {channels}, {given[0]}, {given[1]}) in [0, 1]:

    mean, deviation = torch.tensor({mean}), torch.tensor({deviation})
    x = (images - mean[:, None, None]) / deviation[:, None, None]
{enlarge}\
    logits = model(pixel_values=x).logits
"""
_ENLARGE = """\
    x = torch.nn.functional.interpolate(x, size={seen}, mode="bilinear")
"""
_CLASSIFIERS = ("classifier", "score")  # that PEFT looks for in a SEQ_CLS model


@dataclass(frozen=True)
class Exported:
    """One PEFT folder.

    Attributes:
        folder: where it is.
        rank: the largest rank of a layer.
        full_rank: what it is without truncation.
        errors: ‖ΔW − ΔW'‖ / ‖ΔW‖ of each layer, by its path in the base; empty where nothing was truncated.
        base: the base's name; None for one that is in no folder and on no hub.
    """

    folder: Path
    rank: int
    full_rank: int
    errors: dict[str, float]
    base: str | None


@dataclass(frozen=True)
class _Base:
    """The base that PEFT adapts, inside of a run's module."""

    prefix: str  # of its tensors' names in the module
    inner: nn.Module
    layers: dict[str, Any]  # PEFT's, by path in the base
    paths: tuple[str, ...]  # of all modules that the base has without PEFT
    name: str | None  # never a place on this machine
    task_type: str | None
    pooling: Pooling  # what the head of a text sees
    head: str  # the name of one that sees means; empty for others
    pixels: Pixels | None  # what became of images before


@dataclass(frozen=True)
class _Files:
    """The contents of a folder."""

    tensors: Params
    config: dict[str, Any]
    errors: dict[str, float]
    full_rank: int


def export(
    result: Result,
    folders: Sequence[str | Path],
    clients: Sequence[int] = (),
    adapter: int | None = None,
    rank: int = 0,
    overwrite: bool = False,
    identity: str = "",
) -> list[Exported]:
    """What was written: a PEFT folder for each client, or one for a single adapter; see `export_each`."""
    places = [Path(folder) for folder in folders]
    return list(export_each(result, places, clients, adapter, rank, overwrite, identity))


def export_each(
    result: Result,
    folders: Sequence[Path],
    clients: Sequence[int] = (),
    adapter: int | None = None,
    rank: int = 0,
    overwrite: bool = False,
    identity: str = "",
) -> Iterator[Exported]:
    """Writes a PEFT folder for each client, or one for a single adapter of the bank, and yields them as they come.

    Args:
        result: of a run.
        folders: where to, one for each client or one for the adapter; each appears whole or not at all.
        clients: whose models, settled on their training data.
        adapter: in place of clients, which of FLoRAL's adapters, as if it alone had all the weight.
        rank: the largest rank of a layer, to which the mixture is truncated by an SVD of B·A; 0: exact.
        overwrite: PEFT folders that are there already make way once the new one is whole.
        identity: of the run (run.json has it), for the README.md.

    Raises:
        RecipeError: no such client or adapter, or the run's method has no adapter made by PEFT.
        ModelError: a client has tensors that a PEFT folder has no place for.
        RunFolderError: a folder is in the way or cannot be written.
    """
    base = _base(result)
    _check_numbers(result, clients, rank)
    _check_folders(folders, len(clients) if adapter is None else 1)
    for folder in folders:
        _check_place(folder, overwrite)
    models = _clients(result, clients) if adapter is None else iter([_adapter(result, adapter)])
    names = [f"Client {client}" for client in clients] if adapter is None else [f"Adapter {adapter}"]

    def written() -> Iterator[Exported]:
        for folder, name, params in zip(folders, names, models, strict=True):
            files = _files(base, params, rank)
            _place(folder, files, _card(name, result, base, files, identity), overwrite)
            ranks = [int(files.config["r"]), *files.config["rank_pattern"].values()]
            yield Exported(folder, max(ranks), files.full_rank, files.errors, base.name)

    return written()


def _check_folders(folders: Sequence[Path], wanted: int) -> None:
    """Raises RunFolderError unless there are as many folders as models, each another one."""
    if len(folders) != wanted:
        raise RunFolderError(f"{wanted} models want as many folders, got {len(folders)}")
    twice = [folder for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise RunFolderError(f"{twice[0]} is named twice, and a folder has one model; name another")


def _check_place(folder: Path, overwrite: bool) -> None:
    """Raises RunFolderError if a PEFT folder may not be written there."""
    if not folder.exists():
        return
    if not overwrite:
        raise RunFolderError(f"{folder} exists and is left as it is; name another with --out, or give --replace")
    strangers = sorted({entry.name for entry in folder.iterdir()} - set(FILES)) if folder.is_dir() else ["a file"]
    if strangers:
        raise RunFolderError(
            f"{folder} is not replaced, for it is not only a PEFT folder (there is {strangers[0]}); move it away"
        )


def _check_numbers(result: Result, clients: Sequence[int], rank: int) -> None:
    for client in clients:
        if not 0 <= client < result.task.num_clients:
            raise RecipeError(f"client {client}: the run has the clients 0 to {result.task.num_clients - 1}")
    if rank < 0:
        raise RecipeError(f"rank = {rank}: at least 1 is wanted, or 0 for the whole rank")


def _method_name(result: Result) -> str:
    return name_of(result.cohort.method, METHODS)


def _base(result: Result) -> _Base:
    """The base of a run.

    Raises:
        RecipeError: PEFT does not adapt it.
    """
    module = result.cohort.loss.module
    if isinstance(module, Gated):
        raise RecipeError(
            f"{_method_name(result)}: a gate weighs its adapters instance by instance, for which a PEFT folder "
            f"has no place; set gate = 'constant', or take the model from Result.personal_model(client)"
        )
    prefix, inner = inner_of(module)
    layers = lora_layers(inner)
    if not layers:
        raise RecipeError(
            f"{_method_name(result)}: this run has no adapter made by PEFT, which is what a PEFT folder holds; "
            f"set adapter.peft in the recipe, or take the whole model from Result.personal_model(client)"
        )
    inside = {f"{path}." for path in layers}
    paths = tuple(
        path
        for path, _ in inner.named_modules()
        if path and not any(path[: end.end()] in inside for end in re.finditer(r"\.", path))
    )
    paths += getattr(module, "dropped", ())  # which the base has where PEFT loads it
    name = _public_name(str(getattr(module, "base", "")))
    task_type = _TASK_TYPES.get(str(getattr(module, "kind", "")))
    pooling: Pooling = getattr(module, "pooling", "own")
    head = str(getattr(module, "head", ""))
    pixels: Pixels | None = getattr(module, "pixels", None)
    return _Base(prefix, inner, layers, paths, name, task_type, pooling, head, pixels)


def _public_name(base: str) -> str | None:
    """A hub id as it is, of a folder's path or name the last part, None where there is no name."""
    here = Path(base).expanduser()
    if base and (
        place_of(base) != base
        or here.is_absolute()
        or base.startswith(".")
        or len(here.parts) > 2
        or here.exists()
    ):
        return here.absolute().name
    return base or None


def _clients(result: Result, clients: Sequence[int]) -> Iterator[Params]:
    """Each client's tensors, leading axis 1."""
    everyone = np.array(clients, dtype=np.int64)
    for first in range(0, len(everyone), result.cohort.chunk):
        chunk = everyone[first : first + result.cohort.chunk]
        with torch.no_grad():
            params, _ = result.cohort.served(result.progress.shared, result.progress.store.rows(chunk), chunk)
        for place in range(len(chunk)):
            yield {name: leaf[place : place + 1] for name, leaf in params.items()}


def _adapter(result: Result, adapter: int) -> Params:
    """The tensors, leading axis 1, of the model that uses this adapter of the run's and no other.

    Raises:
        RecipeError: there is none.
    """
    method: Any = result.cohort.method
    if not hasattr(method, "only"):
        raise RecipeError(f"{_method_name(result)} has no bank of adapters; export its clients' models (--client)")
    params: Params = method.only(result.progress.shared, adapter)
    return params


def _files(base: _Base, params: Params, rank: int) -> _Files:
    """The folder's contents for a personal model with these tensors (leading axis 1)."""
    own = {**base.inner.state_dict(), **_inside(base, params)}
    heads = _heads(base, set(_inside(base, params)))
    tensors: Params = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    full_rank = 0
    for path, layer in base.layers.items():
        a, b = (own[name] for name in factor_names(path, layer))
        full_rank = max(full_rank, len(a))
        if rank:
            a, b, errors[path] = truncated(a, b, rank)
        ranks[path] = len(a)
        for name, leaf in zip(factor_names(path, layer), (a, b), strict=True):
            tensors[f"base_model.model.{path}{name.removeprefix(path).replace(f'.{NAME}', '')}"] = leaf
    for head in heads:
        kept = [name for name in base.inner.get_submodule(head).state_dict() if name.rpartition(".")[2] != KEY]
        tensors |= {f"base_model.model.{head}.{name}": own[f"{head}.{name}"] for name in kept}
    return _Files(tensors, _config(base, ranks, heads), errors, full_rank)


def _inside(base: _Base, params: Params) -> Params:
    """The tensors by their names in the base, without the leading axis.

    Raises:
        ModelError: one of them is not the base's.
    """
    for name in params:
        if not name.startswith(base.prefix) or name.removeprefix(base.prefix).rpartition(".")[0] == "":
            raise ModelError(f"{name} belongs to no layer of the base model: a PEFT folder has no place for it")
    return {name.removeprefix(base.prefix): leaf[0].detach() for name, leaf in params.items()}


def _heads(base: _Base, names: set[str]) -> tuple[str, ...]:
    """The modules that have trained tensors of their own: the largest of which all parameters are trained.

    Raises:
        ModelError: a layer that PEFT adapts is among them, or would be taken for one.
    """
    factors = {name for path, layer in base.layers.items() for name in factor_names(path, layer)}
    requires = {name for name, leaf in base.inner.named_parameters() if leaf.requires_grad}
    trained = (names | requires) - factors
    found = set()
    for name in trained:
        owner = name.rpartition(".")[0]
        while above := owner.rpartition(".")[0]:
            if any(
                f"{above}.{own}" not in trained for own, _ in base.inner.get_submodule(above).named_parameters()
            ):
                break
            owner = above
        if not owner:
            raise ModelError(f"{name} belongs to no layer of the base model: a PEFT folder has no place for it")
        found.add(owner)
    heads = tuple(sorted(head for head in found if not any(head.startswith(f"{other}.") for other in found)))
    for head in heads:
        clash = next((p for p in base.paths if p not in heads and p.endswith(head)), None)
        clash = clash or next((p for p in base.layers if p.startswith(f"{head}.")), None)
        if clash is not None:
            raise ModelError(
                f"{head} has trained tensors of its own, but PEFT, which goes by how names end, could not tell "
                f"{clash} from it; rename one of them, or freeze {head}"
            )
    return heads


def _config(base: _Base, ranks: dict[str, int], heads: tuple[str, ...]) -> dict[str, Any]:
    """The adapter_config.json of layers with these ranks."""
    some = next(iter(base.layers.values()))
    rslora = bool(some.use_rslora[NAME])
    alphas = {path: _alpha(base.layers[path], rank, rslora) for path, rank in ranks.items()}
    (common_rank, _), (common_alpha, _) = (Counter(of.values()).most_common(1)[0] for of in (ranks, alphas))
    task_type = base.task_type
    named = sum(path.endswith(_CLASSIFIERS) for path in base.paths)
    if task_type == "SEQ_CLS" and (named != 1 or not any(head in _CLASSIFIERS for head in heads)):
        task_type = None  # PEFT would take other modules for the head
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "lora_dropout": float(getattr(some.lora_dropout[NAME], "p", 0.0)),
        "use_rslora": rslora,
        "rank_pattern": {_exactly(path): rank for path, rank in ranks.items() if rank != common_rank},
        "alpha_pattern": {_exactly(path): alpha for path, alpha in alphas.items() if alpha != common_alpha},
        "target_modules": _targets(base),
        "modules_to_save": list(heads) or None,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in base.layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    if task_type is None and type(base.inner).__module__.startswith("transformers."):
        home = {"base_model_class": type(base.inner).__name__, "parent_library": type(base.inner).__module__}
        document["auto_mapping"] = home
    return document


def _alpha(layer: Any, rank: int, rslora: bool) -> float:
    """The α with which a layer of this rank multiplies by what the run's layer multiplies by."""
    old_rank, old_alpha = layer.r[NAME], layer.lora_alpha[NAME]
    alpha = float(old_alpha * sqrt(rank / old_rank) if rslora else old_alpha * rank / old_rank)
    return int(alpha) if alpha.is_integer() else alpha


def _exactly(path: str) -> str:
    """PEFT's pattern of this path and no other; its dots stay readable."""
    return "^" + re.escape(path).replace(r"\.", ".")


def _targets(base: _Base) -> list[str] | str:
    """The adapted layers as PEFT's target_modules: their last names if these say it, else their paths."""
    short = sorted({path.rpartition(".")[2] for path in base.layers})
    for names in (short, sorted(base.layers)):
        ends = tuple(f".{name}" for name in names)
        if {path for path in base.paths if path in names or path.endswith(ends)} == set(base.layers):
            return names
    return "|".join(map(re.escape, sorted(base.layers)))


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest factors of this rank to B·A, and ‖B·A − B'·A'‖ / ‖B·A‖, in float64.

    Args:
        a: (R, in, *kernel).
        b: (out, R, *ones).
        rank: R', at most; a smaller R stays as it is.

    Returns:
        a (R', in, *kernel), b (out, R', *ones) and the error.
    """
    if rank >= len(a):
        return a, b, 0.0
    q_b, r_b = torch.linalg.qr(b.flatten(1).double())
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_a, new_b = (q_a @ v[:rank].T * root).T, q_b @ u[:, :rank] * root
    whole = float(s.square().sum())
    error = sqrt(float(s[rank:].square().sum()) / whole) if whole else 0.0
    kept = new_a.shape[0]
    return (
        new_a.reshape(kept, *a.shape[1:]).to(a.dtype),
        new_b.reshape(len(b), kept, *b.shape[2:]).to(b.dtype),
        error,
    )


def _card(name: str, result: Result, base: _Base, files: _Files, identity: str) -> str:
    """The README.md: where the adapter comes from, without a word about anyone's data or this machine."""
    config = files.config
    front = [f"base_model: {json.dumps(base.name)}"] if base.name else []
    rows = {
        "base": base.name or "made by the run's task",
        "method": _method_name(result),
        "run": identity or "not kept in a folder",
        "round": str(result.progress.round),
        "umbel": __version__,
    }
    heads = config["modules_to_save"] or []
    more = f", with heads of its own ({', '.join(heads)})" if heads else ""
    if files.errors and any(files.errors.values()):
        worst = max(files.errors.values())
        more += f". It is truncated: a layer's update is off by {100 * worst:.2g} % at most (Frobenius norm)"
    lines = [
        *("---", *front, "library_name: peft", "tags: [lora, umbel]", "---"),
        *(f"# {name} of a federated run", ""),
        *(f"A LoRA adapter of rank {config['r']}{more}.", ""),
        *("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""),
    ]
    if each := result.task.labels_each:
        lines.append(_TASKS_OWN.format(each=each))
    before, after = {"own": ("", ""), "mean": ("", _POOLED), "pairs": (_WIDENED, _OF_PAIRS)}[base.pooling]
    if not base.name:
        lines.append(_NAMELESS)
    of_images = "" if base.pixels is None else _of_images(base.pixels)
    return "\n".join(lines) + "\n" + (before + _LOADED + after).format(head=base.head) + of_images


def _of_images(pixels: Pixels) -> str:
    enlarged = pixels.seen != pixels.given
    return _OF_IMAGES.format(
        **pixels._asdict(),
        channels=len(pixels.mean),
        enlarged=f", enlarged to {pixels.seen[0]} × {pixels.seen[1]}" if enlarged else "",
        enlarge=_ENLARGE.format(seen=pixels.seen) if enlarged else "",
    )


def _place(folder: Path, files: _Files, card: str, overwrite: bool) -> None:
    """Writes the folder aside and renames it into place.

    Raises:
        RunFolderError: it cannot be written.
    """
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        aside.mkdir(parents=True)
        save_tensors(aside / FILES[0], files.tensors)
        with (aside / FILES[0]).open("rb") as file:
            os.fsync(file.fileno())
        write_json(aside / FILES[1], files.config)
        write(aside / FILES[2], card.encode())
        _check_place(folder, overwrite)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(folder)
