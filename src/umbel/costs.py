"""What a method costs: bytes, optimizer steps and FLOPs of a client in a round, and what the server holds."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort, PrivateStore
from umbel.flops import CountedFlops
from umbel.methods.protocol import Method
from umbel.train import counted_training

COUNTED_BATCH = 64  # examples in a batch whose work is counted, at most


@dataclass(frozen=True)
class Work:
    """What a local round takes, by its batches and examples.

    flops: of products and convolutions: so much for the "round" itself, for each "batch", for each "example" of
        these, and for each example that is "held": those that a client keeps from training, or all, if none.
    steps: of the optimizer: of the "round" itself and of a "batch".
    Where the number of batches is fixed those are of one step, else of all epochs.
    """

    flops: dict[str, float]
    steps: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """What a method costs one client in one round, and the server all the time."""

    down: dict[str, int]  # bytes by tensor group
    up: dict[str, int]
    flops: dict[str, float]  # see `Work`; {}: not known
    steps: dict[str, int]
    batch_size: int
    server_bytes: int  # what the server holds between rounds
    local_steps: int = 0  # of a client for each of its slots; 0: whole epochs
    again: Work | None = None  # of a client that has been there before, where that is something else
    most_held: int = 0  # a router measures losses on so many examples at most; 0: on all
    parameters: int = 0  # how many numbers a client trains: models, adapters, router; 0: not known

    @property
    def bytes_down(self) -> int:
        """What one client receives."""
        return sum(self.down.values())

    def of(
        self,
        counts: np.ndarray,
        trained: np.ndarray | None = None,
        slots: np.ndarray | None = None,
        before: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """A round's figures.

        Args:
            counts: (K,) examples of the round's clients.
            trained: (K,) on how many of them they train; by default on all.
            slots: (K,) of how many slots they are; by default of one.
            before: (K,) bool who has been there before; by default nobody.
        """
        if not self.flops:
            return {"server_bytes": self.server_bytes}
        trained = counts if trained is None else trained
        seen, done = trained, -(-trained // self.batch_size)  # in an epoch
        if self.local_steps:
            fixed = self.local_steps * (np.ones_like(counts) if slots is None else slots)
            seen = fixed // done * trained + np.minimum(fixed % done * self.batch_size, trained)
            done = fixed
        first, held = Work(self.flops, self.steps), _held(counts, trained)
        held = np.minimum(held, self.most_held) if self.most_held else held
        flops, steps = 0.0, 0
        back = np.zeros(len(counts), bool) if before is None or self.again is None else before
        for work, who in ((first, ~back), (self.again or first, back)):
            clients, batches = int(who.sum()), int(done[who].sum())
            parts = (("batch", batches), ("example", int(seen[who].sum())), ("held", int(held[who].sum())))
            flops += clients * work.flops["round"]
            flops += sum(number * work.flops.get(part, 0.0) for part, number in parts)
            steps += clients * work.steps["round"] + batches * work.steps["batch"]
        return {"flops": flops, "steps": steps, "server_bytes": self.server_bytes}


@dataclass
class Costs:
    """What the rounds of a run cost one client (1,), counted anew where messages change their size."""

    cohort: Cohort
    client: np.ndarray
    first: Cost | None = None  # of the first round, where that is known
    known: dict[tuple[tuple[str, int], ...], Cost] = field(default_factory=dict)  # by the size of messages

    def now(self, shared: Any, store: PrivateStore) -> Cost:
        """That of a round that begins so: what travels may shrink while a run lasts, and the work with it."""
        down = tree.group_bytes(self.cohort.method.send(shared, self.cohort.index(self.client)))
        size = tuple(down.items())
        if size not in self.known:
            first = self.first
            if first is None or (down != first.down and first.flops):
                self.known[size] = cost_of(self.cohort, shared, store, self.client)
            else:
                self.known[size] = replace(first, down=down)
        return self.known[size]


def trains(method: Method, counts: np.ndarray) -> np.ndarray:
    """(K,) on how many of so many examples each a method's clients train: all, unless it says otherwise."""
    found: np.ndarray = method.trains(counts) if hasattr(method, "trains") else counts
    return found


def _held(counts: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """(K,) how many examples are looked at beside the training: what is kept from it, or everything."""
    return np.where(counts > trained, counts - trained, counts)


def _most_held(method: Any) -> int:
    router = getattr(method, "router", None)
    return router.examples if router is not None and router.kind == "em" else 0


def cost_of(cohort: Cohort, shared: Any, store: PrivateStore, client: np.ndarray) -> Cost:
    """What one round of this client (1,) costs, from a few batches of its work, which are forgotten."""
    message, local = cohort.method.send(shared, cohort.index(client)), cohort.method.local
    trial = _Trial(cohort, message, client)
    fresh = store.fresh(1)
    once = trial.counted(fresh, trial.size, min(local.steps, 1))
    twice = trial.counted(once.kept, trial.size, min(local.steps, 1))
    first = trial.work(fresh)
    again = None if (once.flops, once.steps) == (twice.flops, twice.steps) else trial.work(once.kept)
    server = sum(leaf.numel() * leaf.element_size() for leaf in tree.tensors(shared).values())
    down, up = tree.group_bytes(message), tree.group_bytes(once.upload)
    most = _most_held(cohort.method)
    trained = max(once.parameters, twice.parameters)
    return Cost(down, up, first.flops, first.steps, local.batch_size, server, local.steps, again, most, trained)


@dataclass(frozen=True)
class _Counted:
    held: int  # see `_held`
    flops: int
    steps: int
    parameters: int
    upload: Any
    kept: Any


@dataclass(frozen=True)
class _Trial:
    """Rounds of one client (1,) that nobody sees."""

    cohort: Cohort
    message: Any
    client: np.ndarray

    @property
    def size(self) -> int:
        """The examples of a batch."""
        return min(self.cohort.method.local.batch_size, COUNTED_BATCH)

    def work(self, private: Any) -> Work:
        """What a local round takes, however many examples the client has.

        It grows with batches and with examples, so rounds that differ by a batch, by half a batch and by a batch's
        examples tell it, and take no longer for a client that has many.
        """
        # BatchNorm wants two examples; in so small a batch examples are not told apart from the batch.
        size, half = self.size, self.size // 2 if self.size >= 4 else self.size
        # Some work is done on so many examples and no more: what is counted starts where the client is.
        past = min(int(self.cohort.train.count[self.client[0]]), COUNTED_BATCH) // size
        some = max(past, 2) * size
        one, more = (self.counted(private, self._holding(number), 1) for number in (some, 2 * some))
        held = (more.flops - one.flops) / max(1, more.held - one.held)
        if self.cohort.method.local.steps:
            batches, two = 1, self.counted(private, self._holding(some), 2)
            low, high = (self.counted(private, self._holding(some), steps, half) for steps in (1, 2))
            part = float(high.flops - low.flops)
        else:
            batches = past + 1
            one, two = (self.counted(private, self._holding(n * size)) for n in (batches, batches + 1))
            less = self.counted(private, self._holding(past * size + half))
            part = two.flops - one.flops - (one.flops - less.flops) + held * (2 * one.held - two.held - less.held)
        batch, steps = two.flops - one.flops - held * (two.held - one.held), two.steps - one.steps
        example = (batch - part) / (size - half) if half < size else 0.0
        flops = {"round": one.flops - batches * batch - one.held * held, "batch": batch - size * example}
        flops |= {"example": example, "held": held}
        return Work(flops, {"round": one.steps - batches * steps, "batch": steps})

    def counted(self, private: Any, examples: int, steps: int = 0, batch_size: int = 0) -> _Counted:
        """A round with so many examples, in so many steps of so many of them; 0: in epochs, and `size`."""
        method: Any = self.cohort.method
        local = replace(method.local, batch_size=batch_size or self.size, steps=steps)
        method = replace(method, local=replace(local, epochs=1) if steps else local)
        if _most_held(method):
            method = replace(method, router=replace(method.router, examples=0))
        x, y = self.cohort.train.of_client(int(self.client[0]))
        rows = torch.arange(examples, device=x.device) % len(y)
        clients = self.cohort.train.num_clients
        data = Examples(x[rows], y[rows], np.zeros(clients, np.int64), np.full(clients, examples))
        loss = replace(self.cohort.loss, whole=True)  # how much is padding differs from batch to batch
        # Of protected examples lots are drawn by chance: here all are counted.
        cohort = replace(self.cohort, method=method, loss=loss, train=data, chunk=1, ledger=None)
        weight = np.array([float(examples)])
        with counted_training() as done, CountedFlops() as flops:
            upload, kept = cohort.trained(self.message, private, self.client, 1, weight)
        count = np.array([examples])
        held = int(_held(count, trains(self.cohort.method, count))[0])
        return _Counted(held, flops.total, done.steps, done.parameters, upload, kept)

    def _holding(self, trained: int) -> int:
        """The least number of examples of which so many are trained on."""
        method = self.cohort.method
        return next(n for n in itertools.count(trained) if int(trains(method, np.array([n]))[0]) >= trained)
