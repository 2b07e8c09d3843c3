"""What a method costs: bytes, optimizer steps and FLOPs of a client in a round, and what the server holds."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort, PrivateStore
from umbel.flops import CountedFlops
from umbel.methods.protocol import Method
from umbel.train import counted_steps

COUNTED_BATCH = 64  # examples in a batch whose work is counted, at most


@dataclass(frozen=True)
class Work:
    """What a local round takes, by its batches and examples.

    flops: of products and convolutions: so much for the "round" itself, for each "batch", for each "example" of
        these, and for each example that is "held", trained on or not.
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
        first = Work(self.flops, self.steps)
        flops, steps = 0.0, 0
        back = np.zeros(len(counts), bool) if before is None or self.again is None else before
        for work, who in ((first, ~back), (self.again or first, back)):
            clients, batches = int(who.sum()), int(done[who].sum())
            parts = (("batch", batches), ("example", int(seen[who].sum())), ("held", int(counts[who].sum())))
            flops += clients * work.flops["round"]
            flops += sum(number * work.flops.get(part, 0.0) for part, number in parts)
            steps += clients * work.steps["round"] + batches * work.steps["batch"]
        return {"flops": flops, "steps": steps, "server_bytes": self.server_bytes}


def trains(method: Method, counts: np.ndarray) -> np.ndarray:
    """(K,) on how many of so many examples each a method's clients train: all, unless it says otherwise."""
    found: np.ndarray = method.trains(counts) if hasattr(method, "trains") else counts
    return found


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
    return Cost(down, up, first.flops, first.steps, local.batch_size, server, local.steps, again)


@dataclass(frozen=True)
class _Counted:
    flops: int
    steps: int
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
        size, half = self.size, self.size // 2
        # Some work is done on so many examples and no more: what is counted starts where the client is.
        past = min(int(self.cohort.train.count[self.client[0]]), COUNTED_BATCH) // size
        example, held, examples, batches = 0.0, 0.0, 0, past + 1
        if self.cohort.method.local.steps:
            past, batches = max(past, 2), 1
            examples, more = self._holding(past * size), self._holding(2 * past * size)
            one, two = self.counted(private, examples, 1), self.counted(private, examples, 2)
            held = (self.counted(private, more, 1).flops - one.flops) / (more - examples)
            low, high = (
                self.counted(private, examples, steps, half).flops if half >= 2 else 0 for steps in (1, 2)
            )
            part = high - low
        else:
            one, two = (self.counted(private, self._holding(n * size)) for n in (batches, batches + 1))
            part = self.counted(private, self._holding(past * size + half)).flops if half >= 2 else 0
            part -= one.flops - (two.flops - one.flops)
        batch, steps = two.flops - one.flops, two.steps - one.steps
        if (
            half >= 2
        ):  # BatchNorm wants two examples; in so small a batch examples are not told apart from the batch
            example = (batch - part) / (size - half)
        flops = {"round": one.flops - batches * batch - examples * held, "batch": batch - size * example}
        flops |= {"example": example, "held": held}
        return Work(flops, {"round": one.steps - batches * steps, "batch": steps})

    def counted(self, private: Any, examples: int, steps: int = 0, batch_size: int = 0) -> _Counted:
        """A round with so many examples, in so many steps of so many of them; 0: in epochs, and `size`."""
        method: Any = self.cohort.method
        local = replace(method.local, batch_size=batch_size or self.size, steps=steps)
        method = replace(method, local=replace(local, epochs=1) if steps else local)
        x, y = self.cohort.train.of_client(int(self.client[0]))
        rows = torch.arange(examples, device=x.device) % len(y)
        clients = self.cohort.train.num_clients
        data = Examples(x[rows], y[rows], np.zeros(clients, np.int64), np.full(clients, examples))
        loss = replace(self.cohort.loss, whole=True)  # how much is padding differs from batch to batch
        # Of protected examples lots are drawn by chance: here all are counted.
        cohort = replace(self.cohort, method=method, loss=loss, train=data, chunk=1, ledger=None)
        weight = np.array([float(examples)])
        with counted_steps() as done, CountedFlops() as flops:
            upload, kept = cohort.trained(self.message, private, self.client, 1, weight)
        return _Counted(flops.total, done[0], upload, kept)

    def _holding(self, trained: int) -> int:
        """The least number of examples of which so many are trained on."""
        method = self.cohort.method
        return next(n for n in itertools.count(trained) if int(trains(method, np.array([n]))[0]) >= trained)
