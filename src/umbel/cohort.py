"""The engine on one machine: which clients are stacked into one program, and how many at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.attacks import hostile_upload
from umbel.clients import Augment, ClientData, Examples, Guard
from umbel.errors import ModelError, RecipeError, RoundError
from umbel.faults import delivered
from umbel.hazards import Attack, Faults
from umbel.methods.protocol import Method
from umbel.model.loss import Loss, mixes_examples
from umbel.privacy.accounting import Ledger
from umbel.ranges import check_ranges
from umbel.tree import Params
from umbel.weighting import Weighting

T = TypeVar("T")
R = TypeVar("R")

PROBED_CLIENTS = 8  # how many clients `auto` times, stacked and looped
PROBED_STEPS = 3
PROBED_SECONDS = 2.0  # after which a trial is not repeated
CPU_MEMORY_GB = 2.0


@dataclass(frozen=True)
class Engine:
    """How the work is laid out; no setting here changes a result beyond float rounding.

    mode:
        "stacked"  K clients are one program with a leading client axis.
        "looped"   one client after the other, to the bits of a client that is alone on a machine of its own.
        "auto"     times both before the first round and keeps the faster; the choice is kept on resume. Where it
                   loops, what clients measure before they train is measured for all of them at once.
    chunk: clients stacked at once; 0 takes as many as fit into `memory_gb`.
    memory_gb: for the clients of a chunk, all workers' together; 0: 2 on a CPU, whatever it has, so that a run's
        chunks, on which its last bits depend, are the same on every machine; on a GPU three quarters of what is
        free.
    device: "cpu", "cuda", "cuda:1", …
    threads: PyTorch's threads on the CPU; 0 leaves them as they are.
    workers: how many chunks are at work at the same time on the CPU, each on so many `threads` (0: one). Where one
        client's batches are too small to keep several cores busy, clients side by side do. The same chunks give
        the same bits.
    recompute: blocks of a model of transformers keep only their inputs for backward, which computes the rest again
        (gradient checkpointing): less memory, so more clients at once, for about a third more time.
    """

    mode: Literal["auto", "stacked", "looped"] = "auto"
    chunk: int = 0
    memory_gb: float = 0.0
    device: str = "cpu"
    threads: int = 0
    workers: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, chunk="[0, inf)", threads="[0, inf)", workers="[1, inf)", memory_gb="[0, inf)")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise RecipeError(
                f"engine.device = {self.device!r}: there is no such device; use 'cpu' or 'cuda'"
            ) from None
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise RecipeError(f"engine.device = {self.device!r}, but PyTorch sees no CUDA device here; use 'cpu'")
        if self.workers > 1 and self.device != "cpu":
            raise RecipeError("engine.workers share a CPU's cores; with another engine.device leave it at 1")


class PrivateStore:
    """What each client keeps: a row for every client that was ever trained, and one fresh row for the rest.

    Memory grows with the clients seen, not with the population (which costs 4 bytes each).
    """

    def __init__(self, fresh: Any, num_clients: int) -> None:
        self._slot = np.zeros(num_clients, dtype=np.int32)  # 0: never seen, the fresh row
        self._rows = fresh  # leading axis: slots; capacity beyond `_used` is unspecified
        self._used = 1

    @property
    def num_clients(self) -> int:
        """That there are, seen or not."""
        return len(self._slot)

    @property
    def seen(self) -> np.ndarray:
        """The clients that have a row of their own, in the order they were first seen."""
        clients = np.flatnonzero(self._slot)
        return clients[np.argsort(self._slot[clients])]

    def rows(self, clients: np.ndarray) -> Any:
        """The Private of these clients, leading axis K."""
        return self._pick(self._slot[clients])

    def fresh(self, num_clients: int) -> Any:
        """The Private of so many clients that nobody has seen yet."""
        return self._pick(np.zeros(num_clients, dtype=np.int64))

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
    weighting: Weighting = field(default_factory=Weighting)
    augment: Augment | None = None
    num_rounds: int = 0  # of the whole run; 0: not known
    faults: Faults = field(default_factory=Faults)
    attack: Attack = field(default_factory=Attack)
    hostile: tuple[int, ...] = ()  # who attacks
    ledger: Ledger | None = None  # what the run spends, where clients or examples are protected
    num_members: int = 0  # clients that may take part
    secret: bool = False  # whether noise that protects is the operating system's, as where runs are no simulations
    together: bool = False  # whether clients that train one by one are measured at once, which changes roundings
    losses: tuple[Loss, ...] = ()  # one for each worker, with a module of its own; (): one chunk at a time

    def each(self, work: Callable[["Cohort", T], R], items: Iterable[T]) -> Iterator[R]:
        """What `work` makes of a cohort and each item, in order; where there are workers, of several at once.

        A module is changed while it runs, so each worker's cohort has its own. No more than a turn is done ahead.
        """
        if not self.losses:
            yield from (work(self, item) for item in items)
            return
        idle: SimpleQueue[Cohort] = SimpleQueue()
        for loss in self.losses:
            idle.put(replace(self, loss=loss, losses=()))

        def one(item: T) -> R:
            own = idle.get()
            try:
                return work(own, item)
            finally:
                idle.put(own)

        waiting: deque[Future[R]] = deque()
        pool = ThreadPoolExecutor(len(self.losses))
        try:
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) > len(self.losses):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def chunks(self, clients: np.ndarray) -> list[np.ndarray]:
        """The clients in runs of at most `chunk`.

        Where a batch's examples see each other (BatchNorm) only clients with equally many examples (and slots)
        are stacked, for then no batch needs padding and nobody waits for another.
        """
        parts = [clients]
        if self.chunk > 1 and mixes_examples(self.loss.module):
            lengths = self.train.lengths(clients)
            parts = [clients[lengths == length] for length in np.unique(lengths)]
        return [part[i : i + self.chunk] for part in parts for i in range(0, len(part), self.chunk)]

    def update(
        self,
        shared: Any,
        store: PrivateStore,
        clients: np.ndarray,
        round: int,
        weights: np.ndarray | None = None,
        measured: Any = None,
    ) -> tuple[Any, Any]:
        """The uploads and new private states of K clients, stacked.

        `weights` (K,) say how much each counts, `measured` is these clients' part of what `measured` gives.
        """
        return self.trained(
            self.method.send(shared, self.index(clients)), store.rows(clients), clients, round, weights, measured
        )

    def trained(
        self,
        message: Any,
        private: Any,
        clients: np.ndarray,
        round: int,
        weights: np.ndarray | None = None,
        measured: Any = None,
    ) -> tuple[Any, Any]:
        """`update`, for clients that have received a message."""
        data = ClientData(
            self.train,
            clients,
            self.seed,
            round,
            weights,
            self.augment,
            None,
            self.num_rounds,
            self._guard(),
            measured,
        )
        if self.weighting.rule == "rea" and weights is not None:
            served = self.method.personalize(message, self.method.settle(self.loss, message, private, data))
            risks = self.loss.over(served, data).cpu().numpy()
            data = replace(data, weights=self.weighting.of_risks(weights, risks))
        return self.method.client_update(self.loss, message, private, data)

    def measured(self, shared: Any, clients: np.ndarray, round: int) -> Any:
        """(K, …) what the method measures before training, where `together` says that here is the place; or None.

        Without gradients one message's models are tried on everyone's examples at once, which takes half the time.
        """
        if not self.together or self.chunk > 1 or len(clients) == 1 or not hasattr(self.method, "measure"):
            return None
        data = ClientData(self.train, clients, self.seed, round)
        return self.method.measure(self.loss, self.method.send(shared, self.index(clients)), data)

    def served(self, shared: Any, private: Any, clients: np.ndarray) -> tuple[Params, Tensor]:
        """The K clients' personal models, and (K, C) how they mix them, settled on their training data."""
        return self.serving(self.method.send(shared, self.index(clients)), private, clients)

    def serving(self, message: Any, private: Any, clients: np.ndarray) -> tuple[Params, Tensor]:
        """`served`, for clients that have received a message."""
        data = ClientData(self.train, clients, self.seed, 0, None, self.augment)
        private = self.method.settle(self.loss, message, private, data)
        return self.method.personalize(message, private), self.method.mixture(message, private)

    def updates(
        self,
        shared: Any,
        store: PrivateStore,
        clients: np.ndarray,
        round: int,
        weights: dict[int, float] | None = None,
    ) -> Iterator[tuple[np.ndarray, tuple[Any, Any]]]:
        """Each chunk of the clients with its `update`, after what can be measured for them all at once."""
        measured = self.measured(shared, clients, round)

        def work(cohort: Cohort, part: tuple[int, np.ndarray]) -> tuple[np.ndarray, tuple[Any, Any]]:
            place, chunk = part
            counts = None if weights is None else np.array([weights[client] for client in chunk.tolist()])
            known = None if measured is None else tree.rows(measured, self.index(np.array([place])))
            return chunk, cohort.update(shared, store, chunk, round, counts, known)

        return self.each(work, enumerate(self.chunks(clients)))

    def uploads(
        self,
        shared: Any,
        store: PrivateStore,
        clients: np.ndarray,
        round: int,
        seen: "Tally",
        weights: dict[int, float] | None = None,
        some: bool = True,
    ) -> Iterator[Any]:
        """The clients' uploads, chunk by chunk; private states are stored as they come.

        What they count is theirs among these clients, unless `weights` says it of more.

        A client whose work is not finite is left out: its upload is dropped, its private state stays as it
        was, and `seen` names it. An upload that is lost on the way (faults.py) is counted there by the reason.

        Raises:
            RoundError: nobody's work was finite, and `some` has to be.
        """
        if not len(clients):
            return
        worked = False
        weights = weights or self.weights_of(clients)
        for chunk, update in self.updates(shared, store, clients, round, weights):
            upload, private = update
            upload = self._attacked(shared, upload, chunk, round)
            good = tree.finite_rows(upload)
            if tree.tensors(private):
                good &= tree.finite_rows(private)
            sound = chunk
            if not bool(good.all()):
                kept = good.cpu().numpy()
                seen.dropped.extend(int(client) for client in chunk[~kept])
                index = good.nonzero().squeeze(1)
                upload, private, sound = tree.rows(upload, index), tree.rows(private, index), chunk[kept]
            if not len(sound):
                continue
            worked = True
            store.put(sound, private)
            seen.sent(upload, len(sound))
            if self.faults.any:
                upload, sound, lost = delivered(self.faults, self.seed, round, sound, upload)
                seen.lose(lost)
            if len(sound):
                seen.add(upload, sound)
                yield upload
        if some and not worked:
            raise self.nobody(round)

    def nobody(self, round: int) -> RoundError:
        """What there is to say of a round in which nobody's work was finite."""
        noise = self.ledger is not None and self.ledger.privacy.level == "client"
        cure = (
            "take fewer rounds, more clients or a larger privacy.epsilon, for noise is as large" if noise else ""
        )
        return RoundError(
            f"round {round}: the loss of every client became NaN or infinite; "
            f"{cure or 'lower local.lr or check the data'}"
        )

    def weights_of(self, clients: np.ndarray) -> dict[int, float]:
        """What each of a round's clients counts."""
        return dict(zip(clients.tolist(), self.weighting.of(self.train, clients), strict=True))

    def _attacked(self, shared: Any, upload: Any, clients: np.ndarray, round: int) -> Any:
        """The upload (K, …) with what the hostile ones among these clients send in their rows."""
        places = np.flatnonzero(np.isin(clients, self.hostile)) if self.hostile else ()
        if not len(places):
            return upload
        index, who = self.index(np.asarray(places)), clients[places]
        own, message = tree.rows(upload, index), self.method.send(shared, self.index(who))
        own = hostile_upload(self.attack, self.method, own, message, who, self.seed, round)
        return tree.map_tensors(lambda leaf, row: leaf.index_copy(0, index, row.to(leaf)), upload, own)

    def _guard(self) -> Guard | None:
        """What keeps single examples from being told by the clients' steps."""
        if self.ledger is None or self.ledger.privacy.level != "example":
            return None
        return Guard(self.ledger.privacy.clip, self.ledger.privacy.noise_multiplier, self.secret)

    def index(self, clients: np.ndarray) -> Tensor:
        """The clients as an index tensor, on the data's device."""
        return torch.from_numpy(clients.astype(np.int64)).to(self.train.x.device)


class Tally:
    """What is counted while a round's uploads pass by."""

    def __init__(self) -> None:
        self.num_uploads = 0
        self.upload_bytes = 0
        self.loss_sum = 0.0
        self.num_losses = 0  # uploads whose loss was told
        self.dropped: list[int] = []
        self.lost: dict[str, int] = {}  # uploads that came to nothing, by the reason
        self.clients: list[int] = []  # whose uploads passed by
        self.figures: dict[str, float] = {}  # what else there is to say of the round

    def sent(self, upload: Any, num_clients: int) -> None:
        """Counts what was sent, whether it arrives or not."""
        self.upload_bytes += num_clients * tree.row_bytes(upload)

    def add(self, upload: Any, clients: np.ndarray) -> None:
        """Counts what has arrived."""
        self.arrived(clients)
        self.losses(float(upload.loss.sum()), len(clients))

    def arrived(self, clients: np.ndarray) -> None:
        """Counts clients whose work has come, in whatever form."""
        self.clients.extend(clients.tolist())
        self.num_uploads += len(clients)

    def losses(self, total: float, num_losses: int) -> None:
        """Counts mean training losses of so many clients, of which the sum is known."""
        self.loss_sum += total
        self.num_losses += num_losses

    def lose(self, lost: dict[str, int]) -> None:
        """Counts what was lost."""
        for reason, count in lost.items():
            if count:
                self.lost[reason] = self.lost.get(reason, 0) + count

    @property
    def mean_loss(self) -> float:
        """The mean over the round's clients, those that tell it, of their mean training loss."""
        return self.loss_sum / max(1, self.num_losses)


def chunk_size(engine: Engine, cohort: Cohort, shared: Any, store: PrivateStore, clients: np.ndarray) -> int:
    """How many clients to stack: what the engine's settings say, or what is faster on this machine.

    Nothing is changed: a method's functions are pure, so a trial leaves no trace. It is of a few steps only.
    """
    if engine.mode == "looped" or len(clients) == 1:
        return 1
    local: Any = cohort.method.local
    if _num_steps(cohort, clients) > PROBED_STEPS:
        local = replace(local, epochs=1, steps=PROBED_STEPS)
    brief = replace(cohort, method=replace(cohort.method, local=local))  # type: ignore[type-var]
    chunk = engine.chunk or _fitting(engine, brief, shared, store, clients)
    if engine.mode == "stacked" or chunk == 1:
        return chunk
    trial = clients[: min(PROBED_CLIENTS, chunk)]

    def seconds(size: int) -> float:
        best, spent, trying = float("inf"), 0.0, replace(brief, chunk=size, together=True)
        for _ in range(3):
            begin = perf_counter()
            for _, (upload, _) in trying.updates(shared, store, trial, 1):
                float(upload.loss.sum())  # waits for a GPU to finish
            took = perf_counter() - begin
            best, spent = min(best, took), spent + took
            if spent > PROBED_SECONDS:
                break
        return best

    looped = seconds(1)
    try:
        return chunk if seconds(len(trial)) <= looped else 1
    except ModelError:  # a layer that cannot be stacked
        return 1


def _num_steps(cohort: Cohort, clients: np.ndarray) -> int:
    """The steps of these clients' round, of the one that has most."""
    local = cohort.method.local
    data = ClientData(cohort.train, clients, cohort.seed, 1)
    return data.num_steps(local.batch_size, local.epochs, local.steps)


def _fitting(engine: Engine, cohort: Cohort, shared: Any, store: PrivateStore, clients: np.ndarray) -> int:
    """How many clients fit into the engine's memory: tensors of their own, gradients and what backward keeps."""
    saved = 0
    # What the module itself holds (a frozen base) is there once, however many clients are stacked.
    module = cohort.loss.module
    common = {leaf.untyped_storage().data_ptr() for leaf in (*module.parameters(), *module.buffers())}

    def note(leaf: Tensor) -> Tensor:
        nonlocal saved
        if leaf.untyped_storage().data_ptr() not in common:
            saved += leaf.numel() * leaf.element_size()
        return leaf

    one = clients[:1]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda leaf: leaf):
        upload, private = cohort.update(shared, store, one, 1)
    per_client = 4 * (tree.row_bytes(upload) + tree.row_bytes(private)) + 2 * saved // _num_steps(cohort, one)
    each_worker = (engine.memory_gb or memory_gb_of(engine.device)) * 1e9 / engine.workers
    return int(max(1, min(-(-len(clients) // engine.workers), each_worker // max(1, per_client))))


def memory_gb_of(device: str) -> float:
    """What `Engine.memory_gb` is where it is not given."""
    return 0.75e-9 * torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else CPU_MEMORY_GB
