"""Rounds without a deadline: who is done when, on a simulated clock (FedBuff, Nguyen et al. 2022, Algorithm 1).

Federated Learning with Buffered Asynchronous Aggregation, https://arxiv.org/abs/2106.06639

    clients   M train at the same time, each from the server's state t' when it began; one that is done makes
              room for another, and waits for the next step itself
    server    whenever B uploads are in:  x ← x + (1 / Σ n_k) Σ n_k (1 + s_k)^−p (x_k − x^(t'_k)) ,  s_k = t − t'_k

How long a client takes is drawn by the run's seed, so who is in which step depends on nothing that is trained. The
paper counts clients evenly (`weighting.rule = "uniform"`) and has its server's rate besides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp

import numpy as np
import torch
from torch import Tensor

from umbel.hazards import Asynchronous
from umbel.mixing import Change, moved
from umbel.seeds import generator
from umbel.tree import Params


@dataclass(frozen=True)
class Step:
    """One step of the server's."""

    time: float  # on the simulated clock, in units of a typical client's work
    clients: np.ndarray  # (B,) whose uploads are in, ascending
    versions: np.ndarray  # (B,) how many steps the server had made when each began
    oldest: int  # what a client that is still at work may have begun with

    def figures(self, round: int) -> dict[str, float]:
        """What the figures of this round, the server's step of that number, say of it."""
        return {"clock": self.time, "staleness": float((round - 1 - self.versions).mean())}


def steps(settings: Asynchronous, seed: int, members: np.ndarray, at_once: int) -> Iterator[Step]:
    """The server's steps, one after the other without end.

    Args:
        settings: how many uploads make a step, and how far clients' speeds are apart.
        seed: of the run.
        members: the clients that take part.
        at_once: M, how many of them train at the same time.
    """
    working: list[tuple[float, int, int, int]] = []  # done when, job, client, begun with
    busy: set[int] = set()
    held: list[tuple[int, int]] = []
    version = jobs = 0
    now = 0.0
    while True:
        while len(working) < at_once and len(busy) < len(members):
            client = _idle(members, busy, generator(seed, "next client", jobs))
            busy.add(client)
            heappush(working, (now + duration(settings, seed, client, jobs), jobs, client, version))
            jobs += 1
        now, _, client, begun = heappop(working)
        held.append((client, begun))
        if len(held) == settings.buffer:
            held.sort()
            clients, versions = np.array(held).T
            version += 1
            yield Step(now, clients, versions, min([version, *(own[3] for own in working)]))
            busy -= {client for client, _ in held}
            held = []


def duration(settings: Asynchronous, seed: int, client: int, job: int) -> float:
    """How long the client takes for this job; the median is 1, and half of the variance is the client's own."""
    own, this = (
        float(torch.randn((), generator=generator(seed, *path)))
        for path in (("speed", client), ("job", client, job))
    )
    return exp(settings.spread * (own + this) / 2**0.5)


def _idle(members: np.ndarray, busy: set[int], draw: torch.Generator) -> int:
    if 2 * len(busy) > len(members):
        members = np.setdiff1d(members, list(busy))
    while True:
        client = int(members[int(torch.randint(len(members), (), generator=draw))])
        if client not in busy:
            return client


STATISTICS = ("running_mean", "running_var")  # of BatchNorm: what was seen, and no step from anywhere


def stepped(share: float) -> Change:
    """What was trained as a step from what was received, and only the share of it; statistics as they are."""

    def change(values: Params, received: Params, weights: Tensor) -> Params:
        steps = moved(values, received, weights)
        return {n: leaf if n.endswith(STATISTICS) else share * steps[n] for n, leaf in values.items()}

    return change


def added(share: float) -> Change:
    """The steps from where the server is now; of statistics the share of the way: variances stay positive."""

    def change(values: Params, received: Params, _weights: Tensor) -> Params:
        return {
            n: received[n] + (share * (leaf - received[n]) if n.endswith(STATISTICS) else leaf)
            for n, leaf in values.items()
        }

    return change
