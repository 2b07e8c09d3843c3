"""Trusting: from scores to rows of weights, and what rows of weights make of many adapters.

W = softmax of each row of s / T, over those to whom a client may listen
φ_i ← Σ_j W_ij φ_j
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umbel.adapters import Bank
from umbel.adapters.products import truncated_svd
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods import lora
from umbel.methods.protocol import Population
from umbel.seeds import generator
from umbel.train import Groups
from umbel.tree import Params, wide

Mix = Literal["factors", "A", "B", "product"]
Topology = Literal["full", "ring", "star"] | tuple[tuple[int, int], ...]


def trust_of(
    scores: Tensor,
    allowed: Tensor,
    own: Tensor,
    temperature: Tensor | float = 1.0,
    threshold: float = float("-inf"),
    top_k: int = 0,
    self_weight: float = 0.0,
) -> Tensor:
    """(K, N) rows of W, each of which sums to 1: softmax of scores / T over those that are allowed.

    Whoever may listen to nobody, or has no finite score, listens to itself.

    Args:
        scores: (K, N).
        allowed: (K, N) bool; all others get exactly 0, for they are left out before the softmax.
        own: (K,) int64 the column that is the client itself.
        temperature: T, or (K, 1) one for each.
        threshold: lower scores are left out, but for the two highest.
        top_k: so many are kept; 0: all.
        self_weight: a client trusts itself so much at least, if it may listen to itself and has a score of its
            own, be it one that `threshold` or `top_k` leaves out.
    """
    scores, oneself = scores.double(), F.one_hot(own, scores.shape[1]).bool()
    usable = heard = allowed & scores.isfinite()
    scores = scores.masked_fill(~usable, float("-inf"))
    if threshold > float("-inf"):
        usable = usable & ((scores >= threshold) | _highest(scores, 2, oneself))
    if top_k:
        usable = usable & _highest(scores, top_k, oneself)
    nobody = ~usable.any(1, keepdim=True)
    usable, scores = usable | (nobody & oneself), scores.masked_fill(nobody, 0.0)
    below = (scores - scores.amax(1, keepdim=True)).masked_fill(~usable, 0.0)
    weights = (below / temperature).masked_fill(~usable, float("-inf")).softmax(1)
    mine = weights.masked_fill(~oneself, 0.0).sum(1, keepdim=True)
    lifted = torch.where(oneself, self_weight, weights * (1 - self_weight) / (1 - mine).clamp(min=1e-30))
    too_low = (mine < self_weight) & (heard & oneself).any(1, keepdim=True)
    return torch.where(too_low, lifted, weights)


def _highest(scores: Tensor, count: int, oneself: Tensor) -> Tensor:
    """(K, N) bool: the `count` highest of each row; among equals the client itself is first, then by number."""
    order = oneself.int().argsort(dim=1, descending=True, stable=True)
    places = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :count])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def nearest_for_own(scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
    """(K, N) with the best other score in place of a client's own: to be like oneself is no merit."""
    others = allowed & ~F.one_hot(own, scores.shape[1]).bool()
    best = scores.masked_fill(~others, float("-inf")).amax(1)
    return scores.scatter(1, own.unsqueeze(1), best.nan_to_num(neginf=0.0).unsqueeze(1))


def mean_size(scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
    """(K, 1) the mean of −s over the others that are allowed and finite: what temperatures are measured in."""
    others = allowed & scores.isfinite() & ~F.one_hot(own, scores.shape[1]).bool()
    total = -scores.double().masked_fill(~others, 0.0).sum(1, keepdim=True)
    return total / others.sum(1, keepdim=True).clamp(min=1)


def linked_of(scheme: str, topology: Topology, population: Population) -> Tensor:
    """(clients, clients) bool: who may listen to whom; everyone to itself, and edges go both ways.

    Raises:
        RecipeError: an oracle without groups, or edges of clients that do not exist.
    """
    size = population.num_clients
    own = torch.eye(size, dtype=torch.bool)
    if scheme == "none":
        return own
    linked = torch.ones_like(own)
    if topology != "full":
        linked = own.clone()
        for pair in _edges(topology, size):
            if len(pair) != 2 or not all(0 <= client < size for client in pair):
                raise RecipeError(
                    f"topology: {list(pair)} is no edge between two of this task's {size} clients, 0 to {size - 1}"
                )
            linked[pair[0], pair[1]] = linked[pair[1], pair[0]] = True
    if scheme == "oracle":
        if population.group is None and population.shares is None:
            raise RecipeError("scheme = 'oracle' needs a task with known groups; this one has none")
        linked &= likeness_of(population) > 0
    return linked


def likeness_of(population: Population) -> Tensor:
    """(clients, clients) what an oracle's trust is in proportion to: D Dᵀ, or who is in whose group.

    It is (0, 0) where neither mixtures nor groups are known.
    """
    if population.shares is not None:
        return population.shares @ population.shares.T
    if population.group is None:
        return torch.empty(0, 0)
    return (population.group.unsqueeze(0) == population.group.unsqueeze(1)).float()


def _edges(topology: Topology, size: int) -> Iterable[tuple[int, int]]:
    if topology == "ring":
        return [(client, (client + 1) % size) for client in range(size)]
    if topology == "star":
        return [(0, client) for client in range(1, size)]
    assert not isinstance(topology, str)
    return topology


def usable(round_of: Tensor, now: int, staleness: int) -> Tensor:
    """(clients,) bool: whose last word, of a round from 1 on, is at most so many rounds old."""
    return (round_of > 0) & (now - round_of <= staleness)


def due_of(heard: Tensor, now: int, begin: int, every: int, staleness: int) -> Tensor:
    """(clients, clients) bool: who mixes whom, where clients mix for themselves; a row of nobody: nothing is due.

    A mix is due to those last `heard` (clients,) in a round with mixing, of that round, and to those never heard,
    of the last such round: of all that were heard in it, at most `staleness` rounds before, or since.
    """
    last = begin + (now - begin) // every * every
    since = torch.where(heard > 0, heard, last).unsqueeze(1)
    due = (since >= begin) & ((since - begin) % every == 0)
    return due & (heard > 0) & (heard >= since - staleness)


def figures_of(trust: Tensor, group: Tensor, heard: Tensor) -> dict[str, Tensor]:
    """The mean trust in oneself and, if groups (clients,) are known, in others of one's group and beyond.

    They are of the clients ever `heard` (clients,), among each other; 0 where there are no such pairs.
    """
    there, own = heard > 0, torch.eye(len(trust), dtype=torch.bool, device=trust.device)
    pairs = {"self_trust": own}
    if len(group):
        same = group.unsqueeze(0) == group.unsqueeze(1)
        pairs |= {"trust_inside": same & ~own, "trust_outside": ~same}
    known = {name: chosen & there & there.unsqueeze(1) for name, chosen in pairs.items()}
    return {n: trust.masked_fill(~pair, 0.0).sum() / pair.sum().clamp(min=1) for n, pair in known.items()}


def split(data: ClientData, fraction: float, batch_size: int) -> tuple[ClientData, ClientData]:
    """The same clients with what they train on, and with the `fraction` that they do not (at least 1 example).

    It is drawn once, for all rounds; with a fraction of 0 both are all there is. One or two examples serve for
    both; in the last of the batches that are trained on no example is left alone, on which BatchNorm could not
    train.
    """
    if not fraction:
        return data, data
    trained, held = [], []
    for place, client in enumerate(data.clients.tolist()):
        count, first = int(data.examples.count[client]), int(data.examples.start[client])
        own = data.part[place] if data.part is not None else np.arange(first, first + count)
        order = torch.randperm(len(own), generator=generator(data.seed, "trust", client)).numpy()
        cut = num_held(len(own), fraction, batch_size)
        trained.append(own[np.sort(order[cut:])])
        held.append(own[np.sort(order[:cut])] if cut else own)
    return replace(data, part=tuple(trained)), replace(data, part=tuple(held))


def num_held(count: int, fraction: float, batch_size: int) -> int:
    """Of so many examples, how many `split` takes from training; where it is 0 all serve for both."""
    if not fraction or count <= 2:
        return 0
    cut = min(max(1, round(fraction * count)), count - 2)
    return cut + (count - cut > 1 and (count - cut) % batch_size == 1)


def combined(bank: Bank, held: Groups, weights: Tensor, own: Tensor, how: Mix) -> Groups:
    """(K, …) Σ_j W_ij φ_j for `held` φ (N, …), by rows of weights (K, N).

    Args:
        bank: the adapters' plan.
        held: φ by part; adapters are (N, 1, …).
        weights: W.
        own: (K,) int64 which of the N each of the K is.
        how: "factors" one by one; "A" or "B" only that factor of the adapter (biases go with B), the other
            stays one's own; "product" the nearest to the mean of B A. All but the adapter is mixed anyway.
    """

    def mean(leaf: Tensor) -> Tensor:
        kind = wide(leaf.dtype)
        mixed: Tensor = torch.tensordot(weights.to(kind), leaf.to(kind), 1).to(leaf.dtype)
        return mixed

    mixed = {part: {name: mean(leaf) for name, leaf in tensors.items()} for part, tensors in held.items()}
    reading = {lora.reading(part) for part in bank.low_rank}
    if how in ("A", "B"):
        for name, leaf in held["adapter"].items():
            if (name in reading) != (how == "A"):
                mixed["adapter"][name] = leaf[own]
    if how == "product":
        mixed["adapter"] |= _nearest(bank, held["adapter"], weights)
    return mixed


def _nearest(bank: Bank, adapters: Params, weights: Tensor) -> Params:
    """The factors (K, 1, …) nearest to Σ_j W_ij B_j A_j (see adapters/products.py), for adapters (N, 1, …).

    N adapters of rank r are one of rank N·r. With Q R of its two factors, what is decomposed for each client is no
    larger than N·r × N·r.
    """
    found: Params = {}
    for part in bank.low_rank:
        # Nothing of half precision can be decomposed.
        kind = wide(adapters[part.a_name].dtype)
        a, b = adapters[part.a_name][:, 0].to(kind), adapters[part.b_name][:, 0].to(kind).movedim(2, 1)
        q_a, r_a = torch.linalg.qr(a.flatten(2).flatten(0, 1).T)  # (in, R), (R, N·r)
        q_b, r_b = torch.linalg.qr(b.flatten(2).flatten(0, 1).T)
        each = weights.to(a.dtype).repeat_interleave(part.rank, 1).unsqueeze(1)  # (K, 1, N·r)
        u, s, v = truncated_svd((r_b * each) @ r_a.T, part.rank)
        noise = s[:, :1] * max(q_a.shape[0], q_b.shape[0]) * torch.finfo(s.dtype).eps
        root = torch.where(s > noise, s, 0.0).sqrt().unsqueeze(1)
        of_b = q_b @ u
        sign = of_b.gather(1, of_b.abs().argmax(1, keepdim=True)).sign()
        of_a = (q_a @ v.mT * root * sign).mT
        size = len(weights)
        found[part.a_name] = of_a.reshape(size, 1, *a.shape[1:])
        found[part.b_name] = (of_b * root * sign).mT.reshape(size, *b.shape[1:]).movedim(1, 2).unsqueeze(1)
    return {name: leaf.contiguous().to(adapters[name].dtype) for name, leaf in found.items()}
