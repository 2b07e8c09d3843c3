"""What goes wrong between a client and the server by accident, and what the server notices of it.

    missing      chosen and never started: no work, private state as it was
    late         trained, its upload came after the deadline: left out, private state kept
    damaged      trained, its upload was damaged on the way: left out as far as it is noticed, private state kept

A node cannot know what became of its upload, so it keeps what its training made: only one that never started, or
whose own work is not finite, is where it was.

The server leaves out what was cut short ("malformed"), what holds NaN or infinity ("not finite") and what is far
longer than the others' ("outlier"). All of it is drawn for (round, client) and depends on nothing else.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.hazards import Damage, Faults
from umbel.seeds import generator

S = TypeVar("S")

FINE, MISSING, LATE, DAMAGED = range(4)
DAMAGED_SHARE = 1000  # one in so many numbers of a damaged upload is damaged
HUGE = 1e30
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def fates(faults: Faults, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """(K,) what happens to each client in this round."""
    if not faults.any or not len(clients):  # with Poisson draws a round may have none
        return np.full(len(clients), FINE)
    draws = torch.stack([torch.rand(3, generator=generator(seed, "fate", round, int(k))) for k in clients]).numpy()
    rates = np.array([faults.drop_out, faults.straggle, faults.corrupt])
    hit = draws < rates
    first: np.ndarray = hit.argmax(1) + 1
    return np.where(hit.any(1), first, FINE)


def damage_of(faults: Faults, seed: int, round: int, client: int) -> tuple[Damage, torch.Generator]:
    """How this client's upload is damaged, and the generator that says where."""
    draw = generator(seed, "damage", round, client)
    return faults.kinds[int(torch.randint(len(faults.kinds), (), generator=draw))], draw


def delivered(
    faults: Faults, seed: int, round: int, clients: np.ndarray, upload: S
) -> tuple[S, np.ndarray, dict[str, int]]:
    """What the server accepts of K uploads, whose they are, and how many it did not, by reason."""
    fate = fates(faults, seed, round, clients)
    lost = {"late": int((fate == LATE).sum()), "malformed": 0, "not finite": 0}
    kept = fate != LATE
    hurt = np.flatnonzero(fate == DAMAGED)
    if len(hurt):
        upload = tree.map_tensors(torch.clone, upload)
        for place in hurt.tolist():
            kind, draw = damage_of(faults, seed, round, int(clients[place]))
            if kind == "truncated":
                kept[place] = False
                lost["malformed"] += 1
            else:
                damage(upload, place, kind, draw)
        sound = tree.finite_rows(upload).cpu().numpy()
        lost["not finite"] = int((kept & ~sound).sum())
        kept &= sound
    if kept.all():
        return upload, clients, {}
    index = torch.from_numpy(np.flatnonzero(kept))
    some = next(iter(tree.tensors(upload).values()))
    return tree.rows(upload, index.to(some.device)), clients[kept], {why: n for why, n in lost.items() if n}


def damage(upload: Any, place: int, kind: Damage, draw: torch.Generator) -> None:
    """Damages row `place` of the upload, in place."""
    leaves = [leaf for leaf in tree.tensors(upload).values() if leaf.is_floating_point() and leaf[place].numel()]
    ends = np.cumsum([leaf[place].numel() for leaf in leaves])
    count = int(ends[-1])
    where = torch.randint(count, (max(1, count // DAMAGED_SHARE),), generator=draw).unique()
    bits = torch.randint(64, (len(where),), generator=draw)
    for leaf, end in zip(leaves, ends.tolist(), strict=True):
        row = leaf[place].reshape(-1).cpu()
        own = (where < end) & (where >= end - len(row))
        spots = where[own] - (end - len(row))
        row[spots] = _damaged(row[spots], kind, bits[own])
        leaf[place] = row.view(leaf.shape[1:]).to(leaf.device)


def _damaged(numbers: Tensor, kind: Damage, bits: Tensor) -> Tensor:
    if kind == "bit_flip":
        whole = numbers.view(WHOLE[numbers.element_size()])
        flipped = whole ^ (1 << bits % (8 * numbers.element_size())).to(whole.dtype)
        return flipped.view(numbers.dtype)
    if kind == "huge":
        return numbers * HUGE
    return torch.full_like(numbers, torch.nan if kind == "nan" else torch.inf)


def without_outliers(uploads: list[S], outlier: float) -> tuple[list[S], int]:
    """The uploads without those of which a group of model tensors is far longer than usual, and their number.

    Args:
        uploads: all of a round, in chunks.
        outlier: how many times the median length is too much; 0: nothing is.
    """
    found = [list(_lengths(upload)) for upload in uploads] if outlier else []
    if not any(found):
        return uploads, 0
    lengths = [torch.stack(groups) for groups in found]
    every = torch.cat(lengths, 1)  # (groups, K)
    usual = every.median(1, keepdim=True).values
    fine = ((every <= outlier * usual) | (usual == 0)).all(0)
    if bool(fine.all()):
        return uploads, 0
    kept = []
    for upload, own in zip(uploads, fine.split([length.shape[1] for length in lengths]), strict=True):
        if bool(own.any()):
            kept.append(tree.rows(upload, own.nonzero().squeeze(1)))
    return kept, int((~fine).sum())


def _lengths(upload: Any) -> Iterator[Tensor]:
    """(K,) the length of each group of model tensors."""
    for field in fields(upload):
        group = getattr(upload, field.name)
        leaves = list(tree.tensors(group).values()) if isinstance(group, dict) else []
        if leaves:
            yield torch.stack([leaf.reshape(len(leaf), -1).double().norm(dim=1) for leaf in leaves]).norm(dim=0)
