"""Whose data, which model: what every task comes down to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from umbel.clients import Augment, Examples
from umbel.errors import DataError
from umbel.model.loss import IGNORED, LOSSES, LossName
from umbel.model.pretrained import Pretrained
from umbel.seeds import generator


@dataclass(frozen=True)
class Task:
    """A model and every client's examples.

    Attributes:
        group: (clients,) each client's hidden group, where a benchmark knows it. Nothing but oracles and
            the report look at it.
        augment: changes the inputs of training batches at random, never those of test data.
        public: (P, …) inputs that everyone has.
        owner: (clients,) whose slot each client is; None: everyone its own.
        shares: (clients, categories) float32, what part of a client's data is of which category; rows
            sum to 1. Only oracles look at it.
        serves: (tests,) whose model answers each test set, whose group `group` then is; None: there is a test set
            for each client.
        labels_each: of a client whose examples are of several tasks, how many labels each has; only those of an
            example's own task are told apart. 0: all labels are.
    """

    name: str
    model: nn.Module
    loss: LossName
    train: Examples
    test: Examples
    group: Tensor | None = None
    augment: Augment | None = None
    public: Tensor | None = None
    owner: Tensor | None = None
    serves: Tensor | None = None
    shares: Tensor | None = None
    labels_each: int = 0

    def __post_init__(self) -> None:
        tested = self.test.num_clients if self.serves is None else int(self.serves.max()) + 1
        if self.train.num_clients != tested:
            raise DataError(f"{self.train.num_clients} clients have training data, {tested} test data")
        self._check_types()
        self._check_ids()
        if self.loss == "cross_entropy":
            self._check_labels()

    def _check_types(self) -> None:
        wanted = next((leaf.dtype for leaf in self.model.parameters() if leaf.is_floating_point()), torch.float32)
        for split, examples in (("train", self.train), ("test", self.test)):
            for name, values in (("inputs", examples.x), ("targets", examples.y)):
                if values.is_floating_point() and values.dtype != wanted:
                    raise DataError(f"{split}: {name} are {values.dtype}, the model {wanted}; convert them first")
            if (
                self.loss == "cross_entropy"
                and not examples.y.is_floating_point()
                and examples.y.dtype != torch.long
            ):
                raise DataError(
                    f"{split}: labels are {examples.y.dtype}; cross_entropy needs torch.long, y.long()"
                )

    def _check_ids(self) -> None:
        if not isinstance(self.model, Pretrained) or self.model.kind == "image":
            return
        parts = (self.train.x, self.test.x) if self.public is None else (self.train.x, self.test.x, self.public)
        for x in parts:
            self.model.check_ids(x)

    def _check_labels(self) -> None:
        num_labels = self._answers()
        for split, examples in (("train", self.train), ("test", self.test)):
            if examples.y.is_floating_point():
                raise DataError(f"{split}: cross_entropy needs whole-number labels, got {examples.y.dtype}")
            wrong = (examples.y < 0) | (examples.y >= num_labels)
            if examples.y.dim() > 1:  # a text has places that do not count
                wrong &= examples.y != IGNORED
            if bool(wrong.any()):
                row = int(wrong.flatten(1).any(1).int().argmax()) if wrong.dim() > 1 else int(wrong.int().argmax())
                owner = int(np.flatnonzero((examples.start <= row) & (row < examples.start + examples.count))[0])
                raise DataError(
                    f"{split}, client {owner}: label {int(examples.y[row].max())} is out of range, "
                    f"for the model has {num_labels} outputs (0 to {num_labels - 1})"
                )

    @property
    def num_labels(self) -> int:
        """How many labels the model tells apart; 1 where an example's target is no single label."""
        if self.loss != "cross_entropy" or self.train.y.dim() != 1:
            return 1
        return self._answers()

    def _answers(self) -> int:
        """How many numbers the model answers with, on the last axis; each of its layers keeps its mode."""
        modes = {layer: layer.training for layer in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            x = self.train.x[:1]
            x = self.model.shortened(x) if isinstance(self.model, Pretrained) else x
            count = int(self.model(x).shape[-1])
        for layer, mode in modes.items():
            layer.training = mode
        return count

    @property
    def num_clients(self) -> int:
        return self.train.num_clients

    def tests_of(self, clients: np.ndarray) -> np.ndarray:
        """The test sets that these clients' models answer, ascending."""
        return clients if self.serves is None else np.flatnonzero(np.isin(self.serves.cpu().numpy(), clients))

    def for_tuning(self, seed: int, fraction: float = 0.25) -> "Task":
        """The same task with part of each client's training data as its test data.

        Hyper-parameters are chosen on this one, so that the true test data stays unseen.
        """
        train, validation = split(self.train, fraction, seed)
        return replace(self, train=train, test=validation)


class TaskRecipe(Protocol):
    """A task's settings: a frozen dataclass that loads the task for a seed."""

    def load(self, seed: int) -> Task:
        """The task; the seed decides the split, the partition and the model's first weights."""


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Each client's examples in two parts, the second with `fraction` of them (at least 1), drawn by the seed.

    Raises:
        DataError: a client with one sample, which cannot be split.
    """
    if (examples.count < 2).any():
        raise DataError(f"client {int((examples.count < 2).argmax())} has one sample, too few to hold any back")
    kept, held = [], []
    for client in range(examples.num_clients):
        x, y = examples.of_client(client)
        order = torch.randperm(len(y), generator=generator(seed, "split", client)).to(y.device)
        cut = min(max(1, round(fraction * len(y))), len(y) - 1)
        held.append((x[order[:cut]], y[order[:cut]]))
        kept.append((x[order[cut:]], y[order[cut:]]))
    return Examples.of(kept), Examples.of(held)


def task_of(
    model: nn.Module,
    clients: Sequence[tuple[Tensor, Tensor]],
    loss: LossName = "cross_entropy",
    test: Sequence[tuple[Tensor, Tensor]] | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    name: str = "custom",
) -> Task:
    """A task of your own: a module and a list of (x, y), one pair a client.

    Args:
        test: each client's test examples; without it `test_fraction` of its examples are held back.

    Raises:
        DataError: no such loss, or a client whose data is wrong.
    """
    if loss not in LOSSES:
        raise DataError(f"loss = {loss!r}: there are {', '.join(map(repr, LOSSES))}")
    train = Examples.of(clients)
    held = Examples.of(test) if test is not None else None
    if held is None:
        train, held = split(train, test_fraction, seed)
    return Task(name, model, loss, train, held)
