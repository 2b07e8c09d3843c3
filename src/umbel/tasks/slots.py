"""Slots: what one holder has of one of several tasks (FL-TAC, Ping et al. 2024).

A task's training data is dealt to holders by shares drawn from a Dirichlet distribution. A slot counts as a
client of its own: a holder with three tasks has three adapters, and the server is not told of which tasks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.ranges import check_ranges
from umbel.seeds import generator, seed_of

LEAST_SHARE = 0.01  # of a task; a smaller one is set to 0
LEAST_OF_EVEN = 0.1  # of an even share, where that is less: so the largest share is never set to 0
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Slots:
    """Slots of several tasks: training data of their own, test data that is the same for all of a task.

    Attributes:
        owner: (slots,) int64, each slot's holder; ascending.
        group: (slots,) int64, each slot's task.
    """

    train: Examples
    test: Examples
    owner: Tensor
    group: Tensor


@dataclass(frozen=True)
class Holders:
    """How unevenly holders share tasks."""

    num_holders: int
    alpha: float
    least_examples: int
    test_examples: int

    def check(self) -> None:
        """Raises RecipeError if the settings make no task."""
        check_ranges(self, num_holders="[1, inf)")
        if self.alpha <= 0:
            raise RecipeError("task: alpha, the evenness of the holders' shares, must be above 0")
        if self.least_examples < 1:
            raise RecipeError("task: least_examples, which a slot has for training, must be at least 1")
        check_ranges(self, test_examples="[0, inf)")

    def of(self, train: Sequence[Labelled], test: Sequence[Labelled], seed: int) -> Slots:
        """The slots of tasks, each given by its examples for training and for testing."""
        dealt = [self.dealt(len(y), seed, task) for task, (_, y) in enumerate(train)]
        slots = [
            (holder, task)
            for holder in range(self.num_holders)
            for task in range(len(train))
            if len(dealt[task][holder])
        ]
        own = [
            tuple(part[torch.from_numpy(dealt[task][holder])] for part in train[task]) for holder, task in slots
        ]
        owner, group = torch.tensor(slots, dtype=torch.long).unbind(1)
        return Slots(Examples.of([(x, y) for x, y in own]), self.tested(test, group, seed), owner, group)

    def dealt(self, num_examples: int, seed: int, task: int) -> list[np.ndarray]:
        """Each holder's rows of a task; none where its share would be less than least_examples.

        Raises:
            RecipeError: there are fewer than least_examples in all.
        """
        if num_examples < self.least_examples:
            raise RecipeError(f"task: task {task} has {num_examples} examples; lower least_examples")
        draw = np.random.Generator(np.random.Philox(key=seed_of(seed, "shares", task)))
        share = draw.dirichlet(np.full(self.num_holders, self.alpha))
        share[share < min(LEAST_SHARE, LEAST_OF_EVEN / self.num_holders)] = 0
        count = _rounded(share, num_examples)
        while (short := (count > 0) & (count < self.least_examples)).any():
            share[np.flatnonzero(short)[share[short].argmin()]] = 0  # its data goes to the others
            count = _rounded(share, num_examples)
        assert count.sum() == num_examples
        order = torch.randperm(num_examples, generator=generator(seed, "slots", task)).numpy()
        return np.split(order, count.cumsum()[:-1])

    def tested(self, test: Sequence[Labelled], group: Tensor, seed: int) -> Examples:
        """Each slot's test data, test_examples of its task, `group`; slots of a task share the rows."""
        kept = []
        for task, (x, y) in enumerate(test):
            order = torch.randperm(len(y), generator=generator(seed, "tested", task))
            rows = order[: self.test_examples or None].sort().values
            kept.append((x[rows], y[rows]))
        tasks = Examples.of(kept)
        return Examples(tasks.x, tasks.y, tasks.start[group.numpy()], tasks.count[group.numpy()])


def held(keys: Sequence[Sequence[str]], kinds: Sequence[str], fraction: float, seed: int, *path: str) -> list[int]:
    """The rows of examples that are for testing: no key of theirs is one of the others'.

    They are `fraction` of each kind, one at least, or somewhat fewer where examples that share keys are too many.

    Args:
        keys: what each example may share with others; those linked by others stay together too.
        kinds: each example's.
        fraction: for testing.
        seed: which they are, with what the draw is for.
    """
    room = Counter({kind: max(1, round(fraction * count)) for kind, count in Counter(kinds).items()})
    parts = _linked(keys)
    rows: list[int] = []
    for at in torch.randperm(len(parts), generator=generator(seed, *path)).tolist():
        needed = Counter(kinds[row] for row in parts[at])
        if needed <= room:
            rows += parts[at]
            room -= needed
    return rows


def _linked(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows by what they share: those with a key in common, or linked by others, are in one list."""
    above = list(range(len(keys)))
    first: dict[str, int] = {}

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = above[above[row]]  # so that the next search is shorter
            row = above[row]
        return row

    for row, own in enumerate(keys):
        for key in own:
            above[top(row)] = top(first.setdefault(key, row))
    parts: dict[int, list[int]] = {}
    for row in range(len(keys)):
        parts.setdefault(top(row), []).append(row)
    return list(parts.values())


def _rounded(share: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to the shares that add up to `total`; a share of 0 gets nothing."""
    exact = share / share.sum() * total
    count: np.ndarray = np.floor(exact).astype(np.int64)
    largest = np.argsort(count - exact, kind="stable")[: total - count.sum()]
    count[largest] += 1
    return count
