"""The engine on one machine: which clients are stacked into one program, and how many at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.clients import ClientData, Examples
from umbel.errors import ModelError, RecipeError, RoundError
from umbel.methods.protocol import Method
from umbel.model.loss import Loss, mixes_examples

PROBED_CLIENTS = 8  # how many clients `auto` times, stacked and looped


@dataclass(frozen=True)
class Engine:
    """How the work is laid out; no setting here changes a result beyond float rounding.

    mode:
        "stacked"  K clients are one program with a leading client axis.
        "looped"   one client after the other.
        "auto"     times both before the first round and keeps the faster; the choice is kept on resume.
    chunk: clients stacked at once; 0 takes as many as fit into `memory_gb`.
    device: "cpu", "cuda", "cuda:1", …
    threads: PyTorch's threads on the CPU; 0 leaves them as they are.
    """

    mode: Literal["auto", "stacked", "looped"] = "auto"
    chunk: int = 0
    memory_gb: float = 2.0
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 0 or self.threads < 0 or self.memory_gb <= 0:
            raise RecipeError(
                f"engine: chunk and threads must not be negative and memory_gb must be positive, got {self}"
            )
        try:
            torch.device(self.device)
        except RuntimeError:
            raise RecipeError(
                f"engine.device = {self.device!r}: there is no such device; use 'cpu' or 'cuda'"
            ) from None
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise RecipeError(f"engine.device = {self.device!r}, but PyTorch sees no CUDA device here; use 'cpu'")


class PrivateStore:
    """What each client keeps: a row for every client that was ever trained, and one fresh row for the rest.

    Memory grows with the clients seen, not with the population (which costs 4 bytes each).
    """

    def __init__(self, fresh: Any, num_clients: int) -> None:
        self._slot = np.zeros(num_clients, dtype=np.int32)  # 0: never seen, the fresh row
        self._rows = fresh  # leading axis: slots; capacity beyond `_used` is unspecified
        self._used = 1

    @property
    def seen(self) -> np.ndarray:
        """The clients that have a row of their own, in the order they were first seen."""
        clients = np.flatnonzero(self._slot)
        return clients[np.argsort(self._slot[clients])]

    def rows(self, clients: np.ndarray) -> Any:
        """The Private of these clients, leading axis K."""
        return self._pick(self._slot[clients])

    def put(self, clients: np.ndarray, private: Any) -> None:
        """Keeps the K rows of `private` for these clients."""
        new = clients[self._slot[clients] == 0]
        self._slot[new] = np.arange(self._used, self._used + len(new))
        self._used += len(new)
        index = torch.from_numpy(self._slot[clients].astype(np.int64))

        def write(old: Tensor, values: Tensor) -> Tensor:
            if old.shape[0] < self._used:
                grown = old.new_empty(max(self._used, 2 * old.shape[0]), *old.shape[1:])
                grown[: old.shape[0]] = old
                old = grown
            return old.index_copy_(0, index.to(old.device), values)

        self._rows = tree.map_tensors(write, self._rows, private)

    def state(self) -> tuple[np.ndarray, Any]:
        """The seen clients and their rows, for a checkpoint."""
        return self.seen, self._pick(np.arange(1, self._used))

    def _pick(self, slots: np.ndarray) -> Any:
        index = torch.from_numpy(slots.astype(np.int64))
        return tree.map_tensors(lambda leaf: leaf.index_select(0, index.to(leaf.device)), self._rows)


@dataclass(frozen=True)
class Cohort:
    """A task's clients on this machine: the loss, the data, and how many clients are stacked."""

    method: Method
    loss: Loss
    train: Examples
    seed: int
    chunk: int

    def chunks(self, clients: np.ndarray) -> list[np.ndarray]:
        """The clients in runs of at most `chunk`.

        Where a batch's examples see each other (BatchNorm) only clients with equally many examples are
        stacked, for then no batch needs padding.
        """
        parts = [clients]
        if self.chunk > 1 and mixes_examples(self.loss.module):
            counts = self.train.count[clients]
            parts = [clients[counts == n] for n in np.unique(counts)]
        return [part[i : i + self.chunk] for part in parts for i in range(0, len(part), self.chunk)]

    def update(self, shared: Any, store: PrivateStore, clients: np.ndarray, round: int) -> tuple[Any, Any]:
        """The uploads and new private states of K clients, stacked."""
        message = self.method.send(shared, self._index(clients))
        data = ClientData(self.train, clients, self.seed, round)
        return self.method.client_update(self.loss, message, store.rows(clients), data)

    def uploads(
        self, shared: Any, store: PrivateStore, clients: np.ndarray, round: int, seen: "Tally"
    ) -> Iterator[Any]:
        """The clients' uploads, chunk by chunk; private states are stored as they come.

        A client whose work is not finite is left out: its upload is dropped, its private state stays as it
        was, and `seen` names it.

        Raises:
            RoundError: nobody's work was finite.
        """
        for chunk in self.chunks(clients):
            upload, private = self.update(shared, store, chunk, round)
            good = tree.finite_rows(upload)
            if tree.tensors(private):
                good &= tree.finite_rows(private)
            sound = chunk
            if not bool(good.all()):
                kept = good.cpu().numpy()
                seen.dropped.extend(int(client) for client in chunk[~kept])
                index = good.nonzero().squeeze(1)
                upload, private, sound = tree.rows(upload, index), tree.rows(private, index), chunk[kept]
            if len(sound):
                store.put(sound, private)
                seen.add(upload, len(sound))
                yield upload
        if seen.num_uploads == 0:
            raise RoundError(
                f"round {round}: the loss of every client became NaN or infinite; lower local.lr or check the data"
            )

    def download_bytes(self, shared: Any) -> int:
        """What the server sends to one client in one round."""
        return tree.row_bytes(self.method.send(shared, torch.zeros(1, dtype=torch.long)))

    def _index(self, clients: np.ndarray) -> Tensor:
        return torch.from_numpy(clients.astype(np.int64)).to(self.train.x.device)


class Tally:
    """What is counted while a round's uploads pass by."""

    def __init__(self) -> None:
        self.num_uploads = 0
        self.upload_bytes = 0
        self.loss_sum = 0.0
        self.dropped: list[int] = []

    def add(self, upload: Any, num_clients: int) -> None:
        self.num_uploads += num_clients
        self.upload_bytes += num_clients * tree.row_bytes(upload)
        self.loss_sum += float(upload.loss.sum())

    @property
    def mean_loss(self) -> float:
        """The mean over the round's clients of their mean training loss."""
        return self.loss_sum / max(1, self.num_uploads)


def chunk_size(engine: Engine, cohort: Cohort, shared: Any, store: PrivateStore, clients: np.ndarray) -> int:
    """How many clients to stack: what the engine's settings say, or what is faster on this machine.

    Nothing is changed: a method's functions are pure, so a trial leaves no trace.
    """
    if engine.mode == "looped" or len(clients) == 1:
        return 1
    chunk = engine.chunk or _fitting(engine, cohort, shared, store, clients)
    if engine.mode == "stacked" or chunk == 1:
        return chunk
    trial = clients[: min(PROBED_CLIENTS, chunk)]

    def seconds(size: int) -> float:
        parts = [trial[i : i + size] for i in range(0, len(trial), size)]
        best = float("inf")
        for _ in range(3):
            begin = perf_counter()
            for part in parts:
                upload, _ = cohort.update(shared, store, part, 1)
                float(upload.loss.sum())  # waits for a GPU to finish
            best = min(best, perf_counter() - begin)
        return best

    looped = seconds(1)
    try:
        return chunk if seconds(len(trial)) <= looped else 1
    except ModelError:  # a layer that cannot be stacked
        return 1


def _fitting(engine: Engine, cohort: Cohort, shared: Any, store: PrivateStore, clients: np.ndarray) -> int:
    """How many clients fit into the engine's memory: tensors, gradients and what backward keeps."""
    saved = 0

    def note(leaf: Tensor) -> Tensor:
        nonlocal saved
        saved += leaf.numel() * leaf.element_size()
        return leaf

    one = clients[:1]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda leaf: leaf):
        upload, private = cohort.update(shared, store, one, 1)
    local = cohort.method.local
    steps = ClientData(cohort.train, one, cohort.seed, 1).num_steps(local.batch_size, local.epochs)
    per_client = 4 * (tree.row_bytes(upload) + tree.row_bytes(private)) + 2 * saved // steps
    return int(max(1, min(len(clients), engine.memory_gb * 1e9 // max(1, per_client))))
