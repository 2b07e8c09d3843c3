"""Whether server and node have one base: names and hashes, compared before the first round."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel import tree
from umbel.adapters import Bank
from umbel.tasks import Task, TaskRecipe
from umbel.untrusted import plain

Fingerprint = dict[str, str]
"""What is the same on all machines of a run, by what it is called in messages."""


def fingerprint(recipe: TaskRecipe, task: Task, shared: Any) -> Fingerprint:
    """What a run starts from: the base by name, revision, tensors and tokenizer, the adapters' targets, the start.

    Args:
        recipe: the task's settings.
        task: with the model.
        shared: the method's first Shared.
    """
    found: Fingerprint = {"task": task.name, "loss": task.loss, "labels of each task": str(task.labels_each)}
    base = getattr(recipe, "base", None)
    if isinstance(base, str):
        found |= {"base": base} | _tokenizer(base)
    config = next((layer.config for layer in task.model.modules() if hasattr(layer, "config")), None)
    if revision := getattr(config, "_commit_hash", None):
        found["revision"] = str(revision)
    if pooling := getattr(task.model, "pooling", None):
        found["pooling"] = str(pooling)
    for name, leaf in (*task.model.named_parameters(), *task.model.named_buffers()):
        found[f"tensor {name}"] = digest(leaf)
    for bank in _banks(shared):
        for part in bank.low_rank:
            found[f"adapter of {part.name}"] = (
                f"{part.kind}, rank {part.rank}, scaling {bank.scale * part.scaling:g}"
            )
        for more in bank.additive:
            found[f"adapter of {more.name}"] = more.kind
        for name, leaf in bank.frozen.items():
            found[f"frozen {name}"] = digest(leaf)
    if task.public is not None:
        found["public inputs"] = digest(task.public)
    return found | {f"start {name}": digest(leaf) for name, leaf in tree.tensors(shared).items()}


def differences(server: Mapping[str, str], node: Mapping[str, str]) -> list[str]:
    """How the node's fingerprint differs from the server's, in words, the first few; [] if it does not."""
    wrong = []
    for name in [*server, *(other for other in node if other not in server)]:
        here, there = server.get(name, "nothing"), node.get(name, "nothing")
        if here != there:
            wrong.append(f"{plain(name, 100)}: the node has {plain(there, 60)}, the server {plain(here, 60)}")
    more = len(wrong) - 3
    return wrong[:3] + ([f"and {more} more"] if more > 0 else [])


def digest(leaf: Tensor) -> str:
    """A hash of a tensor's type, shape and bits."""
    leaf = leaf.detach().cpu().contiguous()
    told = hashlib.sha256(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
    told.update(leaf.reshape(-1).view(torch.uint8).numpy().data if leaf.numel() else b"")
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)} sha256:{told.hexdigest()[:16]}"


def _banks(state: Any) -> list[Bank]:
    if isinstance(state, Bank):
        return [state]
    if isinstance(state, dict):
        return [bank for leaf in state.values() for bank in _banks(leaf)]
    if is_dataclass(state):
        return [bank for field in fields(state) for bank in _banks(getattr(state, field.name))]
    return []


def _tokenizer(base: str) -> Fingerprint:
    """A hash of the tokenizer's files, {} where the base is no folder or has none."""
    from umbel.tasks.bases import place_of

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
    files = [path for path in (Path(place_of(base)) / name for name in names) if path.is_file()]
    if not files:
        return {}
    told = hashlib.sha256()
    for path in files:
        told.update(path.name.encode() + b" " + path.read_bytes())
    return {"tokenizer": f"sha256:{told.hexdigest()[:16]}"}
