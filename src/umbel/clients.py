"""Whose data: every client's examples in flat tensors, and a cohort's batches in an order fixed by the seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.errors import DataError
from umbel.seeds import generator, seed_of, uniform

Augment = Callable[[Tensor, Tensor, np.ndarray], Tensor]
"""(x (K, B, …), key (K,), clients (K,)) → x, changed at random; what is drawn depends on a client's key alone."""


@dataclass(frozen=True)
class Examples:
    """The examples of all clients; those of client k are the rows start[k] … start[k] + count[k] − 1."""

    x: Tensor  # (N, …)
    y: Tensor  # (N, …)
    start: np.ndarray  # (clients,) int64
    count: np.ndarray  # (clients,) int64
    slots: np.ndarray | None = None  # (clients,) of how many slots a client's examples are; None: of one

    @staticmethod
    def of(clients: Sequence[tuple[Tensor, Tensor]]) -> "Examples":
        """The examples of a list of (x, y), one pair a client.

        Raises:
            DataError: a client without samples, with NaN in x, with x and y of different lengths, or not tensors
                of the same shape as the others'.
        """
        if not clients:
            raise DataError("there are no clients")
        for k, (x, y) in enumerate(clients):
            for name, own, first in zip(("inputs", "targets"), (x, y), clients[0], strict=True):
                if not isinstance(own, Tensor):
                    raise DataError(f"client {k}: {name} are {type(own).__name__}; give tensors (torch.as_tensor)")
                if own.shape[1:] != first.shape[1:]:
                    shapes = f"the shape {tuple(own.shape[1:])}, client 0's {tuple(first.shape[1:])}"
                    raise DataError(f"client {k}: {name} have {shapes}; one model takes one")
            if len(x) != len(y):
                raise DataError(f"client {k}: {len(x)} inputs but {len(y)} targets")
        count = np.array([len(y) for _, y in clients], dtype=np.int64)
        x, y = torch.cat([x for x, _ in clients]), torch.cat([y for _, y in clients])
        examples = Examples(x, y, np.concatenate([[0], count.cumsum()[:-1]]), count)
        examples.check()
        return examples

    def check(self) -> None:
        """Raises DataError, naming the client, if one has no samples or holds NaN or infinity."""
        if (self.count == 0).any():
            raise DataError(
                f"client {int((self.count == 0).argmax())} has no samples; leave it out or give it some"
            )
        for name, values in (("inputs", self.x), ("targets", self.y)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                bad = int(
                    (~values.isfinite())
                    .flatten(1 if values.dim() > 1 else 0)
                    .reshape(len(values), -1)
                    .any(1)
                    .int()
                    .argmax()
                )
                owners = np.flatnonzero((self.start <= bad) & (bad < self.start + self.count))
                who = f"client {int(owners[0])}" if len(owners) else f"row {bad}"
                raise DataError(f"{who} has NaN or infinite {name}; clean its data first")

    @property
    def num_clients(self) -> int:
        return len(self.count)

    def lengths(self, clients: np.ndarray) -> np.ndarray:
        """(K,) numbers that are equal for clients whose rounds have batches of the same sizes."""
        counts: np.ndarray = self.count[clients]
        return counts if self.slots is None else counts * (self.slots.max() + 1) + self.slots[clients]

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device), self.start, self.count, self.slots)

    def of_client(self, client: int) -> tuple[Tensor, Tensor]:
        """The (x, y) of one client."""
        rows = slice(int(self.start[client]), int(self.start[client] + self.count[client]))
        return self.x[rows], self.y[rows]


@dataclass(frozen=True)
class Batch:
    """One batch of each of K clients, padded to a common size B."""

    x: Tensor  # (K, B, …)
    y: Tensor  # (K, B, …)
    weight: Tensor | None  # (K, B) 1 for an example, 0 for padding; None when nothing is padded
    active: Tensor | None  # (K,) bool, False for a client that has no batch here; None when all have one
    key: Tensor  # (K,) int64, each client's own random key for this step
    rows: Tensor = field(default_factory=lambda: torch.empty(0))  # (K, B) int64, which rows of the examples

    def mean(self, values: Tensor) -> Tensor:
        """(K,) mean over each client's examples of `values` (K, B), the padding left out."""
        if self.weight is None:
            return values.mean(1)
        return (values * self.weight).sum(1) / self.weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Guard:
    """What keeps single examples from being told by a client's steps (DP-SGD, train.py)."""

    clip: float  # the longest that one example's gradient may be
    multiplier: float  # z, of the noise by the clip
    secret: bool = False  # whether noise and lots are the operating system's: then nobody can draw them again


@dataclass(frozen=True)
class ClientData:
    """What K clients train on in one round, and the randomness that is theirs in it."""

    examples: Examples
    clients: np.ndarray  # (K,) indices into `examples`
    seed: int
    round: int
    weights: np.ndarray | None = None  # (K,) how much each client counts on the server; None: its examples
    augment: Augment | None = None  # changes the inputs of training batches
    part: tuple[np.ndarray, ...] | None = None  # each client's rows of `examples`; None: all it has
    num_rounds: int = 0  # of the whole run, for rates that fall with it; 0: not known
    guard: Guard | None = None  # in training; None: steps are along plain gradients
    measured: Any = None  # (K, …) what the method's `measure` found for these clients; None: it was not asked

    @property
    def weight(self) -> Tensor:
        """(K,) float: how much each client counts when uploads meet; n_k unless another rule was chosen."""
        if self.weights is None:
            return self.num_examples
        return torch.as_tensor(self.weights, dtype=torch.float32, device=self.examples.x.device)

    @property
    def num_examples(self) -> Tensor:
        """(K,) float: n_k, on the data's device."""
        return torch.as_tensor(self._counts, dtype=torch.float32, device=self.examples.x.device)

    @property
    def _counts(self) -> np.ndarray:
        if self.part is not None:
            return np.array([len(own) for own in self.part])
        counts: np.ndarray = self.examples.count[self.clients]
        return counts

    def among(self, places: Tensor) -> "ClientData":
        """Only the clients at these places."""
        chosen = places.cpu().numpy()
        weights = None if self.weights is None else self.weights[chosen]
        part = None if self.part is None else tuple(self.part[place] for place in chosen)
        return replace(self, clients=self.clients[chosen], weights=weights, part=part)

    def some(self, most: int, purpose: str) -> "ClientData":
        """The same clients with at most so many of their examples each, drawn anew for every round."""
        if not most or int(self._counts.max()) <= most:
            return self
        part = []
        for place, client in enumerate(self.clients.tolist()):
            own = self.part[place] if self.part is not None else None
            count, first = int(self._counts[place]), int(self.examples.start[client])
            draw = generator(self.seed, purpose, self.round, client)
            rows = torch.randperm(count, generator=draw)[:most].sort().values.numpy()
            part.append(rows + first if own is None else own[rows])
        return replace(self, part=tuple(part))

    def fitting(self, num_rows: int) -> int:
        """How many examples of each client go through a forward pass of so many rows, all clients together.

        A text counts as four rows for each of its places, for each is answered by a vocabulary.
        """
        y = self.examples.y
        rows = 4 * y[0].numel() if y.dim() > 1 and not y.is_floating_point() else 1
        return max(1, num_rows // (rows * len(self.clients)))

    def num_steps(self, size: int, epochs: int = 1, steps: int = 0) -> int:
        """The steps of the client with the most of them; `steps`, if given, are everyone's for each slot."""
        return int(self._steps(steps).max()) if steps else epochs * -(-int(self._counts.max()) // size)

    def draw(self, purpose: str, function: Callable[[torch.Generator], Tensor]) -> Tensor:
        """(K, …) `function` of each client's own generator for this purpose and round."""
        drawn = [function(generator(self.seed, purpose, self.round, int(k))) for k in self.clients]
        return torch.stack(drawn).to(self.examples.x.device)

    def batches(self, size: int, epochs: int = 1, shuffle: bool = True, steps: int = 0) -> Iterator[Batch]:
        """Local epochs in batches of `size`; the last batch of an epoch may be smaller.

        With `steps` there are so many batches for everyone (and for each of its slots), however many epochs that
        takes. A client with fewer batches than another sits the last ones out (`active` False).
        """
        keys = torch.tensor([seed_of(self.seed, "step", self.round, int(k)) for k in self.clients])
        own = self._steps(steps)
        counts = zip(own, self._counts, strict=True)
        passes = [int(-(-all // -(-n // size))) if steps else epochs for all, n in counts]
        if not shuffle:
            stored = self._stored(size, max(passes))
            if steps:
                stored = stored[:, : own.max() * size]
                stored[np.arange(stored.shape[1]) >= own[:, None] * size] = -1
            return self._gather(stored, size, keys, self.augment)
        orders = [self._shuffled(place, size, times) for place, times in enumerate(passes)]
        orders = [order[: n * size] for order, n in zip(orders, own, strict=True)] if steps else orders
        index = np.full((len(orders), max(map(len, orders))), -1, dtype=np.int64)
        for row, order in zip(index, orders, strict=True):
            row[: len(order)] = order
        return self._gather(index, size, keys, self.augment)

    def lots(self, size: int, epochs: int = 1, steps: int = 0) -> Iterator[Batch]:
        """As many batches as `batches` has, into each of which every example comes by itself.

        It does so with probability size / n. So batches differ in length, and may be empty; `active` says who
        still has steps to do.
        """
        keys = torch.tensor([seed_of(self.seed, "step", self.round, int(k)) for k in self.clients])
        own = self.own_steps(size, epochs, steps)
        device = self.examples.x.device
        chosen = []
        for place, client in enumerate(self.clients.tolist()):
            count = int(self._counts[place])
            secret = self.guard is not None and self.guard.secret
            draw = None if secret else generator(self.seed, "lots", self.round, client)
            chosen.append(uniform((int(own[place]), count), draw).numpy() * count < size)
        for step in range(int(own.max())):
            picked = [
                np.flatnonzero(lots[step]) if step < len(lots) else np.empty(0, dtype=np.int64) for lots in chosen
            ]
            index = np.full((len(picked), max(1, *map(len, picked))), -1)
            for place, (row, places) in enumerate(zip(index, picked, strict=True)):
                first = int(self.examples.start[self.clients[place]])
                row[: len(places)] = places + first if self.part is None else self.part[place][places]
            real = torch.from_numpy((index >= 0).astype(np.float32)).to(device)
            # Padding points at a real row, so that it stays finite.
            padded = np.where(index >= 0, index, self.examples.start[self.clients, None])
            flat, shape = torch.from_numpy(padded.reshape(-1)).to(device), padded.shape
            x, y = (leaf.index_select(0, flat).unflatten(0, shape) for leaf in (self.examples.x, self.examples.y))
            key = (keys + step).to(device)
            x = x if self.augment is None else self.augment(x, key, self.clients)
            active = torch.from_numpy(step < own).to(device)
            yield Batch(x, y, real, active, key, flat.unflatten(0, shape))

    def own_steps(self, size: int, epochs: int = 1, steps: int = 0) -> np.ndarray:
        """(K,) how many batches each client has."""
        return self._steps(steps) if steps else epochs * -(-self._counts // size)

    def in_order(self, size: int) -> Iterator[Batch]:
        """Every example once, as stored, in batches of `size`; nothing in them is random."""
        return self._gather(self._stored(size, 1), size, torch.zeros(len(self.clients), dtype=torch.long))

    def _steps(self, steps: int) -> np.ndarray:
        """(K,) so many for each of a client's slots."""
        if self.examples.slots is None:
            return np.full(len(self.clients), steps)
        own: np.ndarray = self.examples.slots[self.clients] * steps
        return own

    def _shuffled(self, place: int, size: int, epochs: int) -> np.ndarray:
        """Rows of `examples` in training order, each epoch filled up to whole batches with −1."""
        client, count = int(self.clients[place]), int(self._counts[place])
        own = self.part[place] if self.part is not None else int(self.examples.start[client]) + np.arange(count)
        draw = generator(self.seed, "batches", self.round, client)
        order = np.full((epochs, count + -count % size), -1, dtype=np.int64)
        for epoch in range(epochs):
            order[epoch, :count] = own[torch.randperm(count, generator=draw).numpy()]
        return order.reshape(-1)

    def _stored(self, size: int, epochs: int) -> np.ndarray:
        """(K, steps · size) rows of `examples` as stored, filled up with −1 where a client has no more."""
        start, count = self.examples.start[self.clients, None], self._counts[:, None]
        own_length = count + -count % size  # of an epoch
        place = np.arange(epochs * int(own_length.max()))[None]
        within = place % own_length
        real = (within < count) & (place < epochs * own_length)
        if self.part is None:
            return np.where(real, start + within, -1)
        padded = np.full((len(self.part), int(count.max())), -1)
        for row, own in zip(padded, self.part, strict=True):
            row[: len(own)] = own
        within = np.broadcast_to(np.minimum(within, padded.shape[1] - 1), real.shape)
        return np.where(real, np.take_along_axis(padded, within, 1), -1)

    def _gather(
        self, index: np.ndarray, size: int, keys: Tensor, augment: Augment | None = None
    ) -> Iterator[Batch]:
        """The batches of rows `index` (K, steps · size), −1 for padding."""
        device = self.examples.x.device
        length = index.shape[1]
        real = index >= 0
        # Padding points at a real row of the same client, so that whatever is computed on it stays finite.
        index = np.where(real, index, self.examples.start[self.clients, None])
        for first in range(0, length, size):
            here = real[:, first : first + size]
            width = int(here.sum(1).max())
            rows = torch.from_numpy(index[:, first : first + width]).to(device)
            flat = rows.reshape(-1)
            weight = active = None
            if not here[:, :width].all():
                weight = torch.from_numpy(here[:, :width].astype(np.float32)).to(device)
                if not here[:, 0].all():
                    active = torch.from_numpy(here[:, 0].copy()).to(device)
            x = self.examples.x.index_select(0, flat).unflatten(0, rows.shape)
            y = self.examples.y.index_select(0, flat).unflatten(0, rows.shape)
            key = (keys + first // size).to(device)
            yield Batch(x if augment is None else augment(x, key, self.clients), y, weight, active, key, rows)
