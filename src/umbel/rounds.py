"""One round after another."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from umbel import tree
from umbel.attacks import attackers, poisoned, trapped
from umbel.clock import steps
from umbel.cohort import Cohort, Engine, PrivateStore, Tally, chunk_size
from umbel.costs import Cost, Costs, trains
from umbel.errors import DataError, RecipeError
from umbel.evaluate import Scores, SummedScores, evaluate, figures_of, routing
from umbel.faults import MISSING, fates
from umbel.meeting import (
    Cut,
    Met,
    Total,
    check,
    late_uploads,
    ledger,
    meet,
    one_upload,
    server_step,
    total_here,
)
from umbel.methods.protocol import Method, Population
from umbel.methods.settling import lonely
from umbel.model.copies import copied
from umbel.model.dropout import seed_dropout
from umbel.model.loss import Loss, check_repeatable, has_batch_norm
from umbel.model.recompute import recomputing
from umbel.model.stacked import stackable
from umbel.schedule import Schedule
from umbel.seeds import choose, seed_of
from umbel.tasks.task import Task
from umbel.train import LocalTraining
from umbel.tree import Params


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round."""

    round: int
    shared: Any
    store: PrivateStore
    figures: dict[str, Any]  # the round's metrics, ready for JSON
    scores: Scores | None  # per client, in rounds that are evaluated
    clips: Params = field(default_factory=dict)  # of the next round, where clients are protected
    last: bool = False  # whether the run is over


class Fleet(Protocol):
    """The clients, wherever they are."""

    def sampled(self, members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
        """The clients of one round, ascending."""

    def uploads(self, shared: Any, clients: np.ndarray, round: int, seen: Tally) -> Iterator[Any]:
        """The uploads of a round's clients, in ascending order, chunk by chunk; `seen` counts them."""

    def total(
        self, shared: Any, clients: np.ndarray, round: int, schedule: Schedule, cut: Cut | None, seen: Tally
    ) -> Total:
        """The sum over a round's clients, each of whose parts is cut as asked for; `seen` counts them."""

    def form(self, shared: Any, client: np.ndarray) -> Any:
        """An upload (1, …) like those of these rounds, for its form alone."""

    def scores(self, shared: Any, tests: np.ndarray) -> tuple[np.ndarray, Scores | SummedScores] | None:
        """Of which of these tests something is known, and how well the clients' own models do on them."""


@dataclass(frozen=True)
class Here:
    """All clients on this machine."""

    cohort: Cohort
    store: PrivateStore
    task: Task

    def sampled(self, members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
        """See `Fleet`."""
        return sampled(members, schedule, round)

    def uploads(self, shared: Any, clients: np.ndarray, round: int, seen: Tally) -> Iterator[Any]:
        """See `Fleet`."""
        return self.cohort.uploads(shared, self.store, clients, round, seen)

    def total(
        self, shared: Any, clients: np.ndarray, round: int, schedule: Schedule, cut: Cut | None, seen: Tally
    ) -> Total:
        """See `Fleet`."""
        return total_here(self.cohort, shared, self.store, clients, round, schedule, cut, seen)

    def form(self, shared: Any, client: np.ndarray) -> Any:
        """See `Fleet`."""
        return one_upload(self.cohort, shared, self.store, client)

    def scores(self, shared: Any, tests: np.ndarray) -> tuple[np.ndarray, Scores]:
        """See `Fleet`."""
        test = self.task.test.to(self.cohort.train.x.device)
        serves = None if self.task.serves is None else self.task.serves.cpu().numpy()
        return tests, evaluate(self.cohort, shared, self.store, test, tests, serves)


def start(task: Task, method: Method, schedule: Schedule, engine: Engine) -> tuple[Cohort, Progress]:
    """The engine's view of a task, and the state before round 1."""
    _check_batches(task, method)
    check(task, method, schedule)
    if threads := engine.threads or (1 if engine.workers > 1 else 0):
        torch.set_num_threads(threads)
    members = participants(task.num_clients, schedule)
    if not len(members):
        raise RecipeError(
            f"held_out = {schedule.held_out} leaves none of {task.num_clients} clients to train; hold out fewer"
        )
    if schedule.held_out and len(members) == task.num_clients:
        raise RecipeError(f"held_out = {schedule.held_out} of {task.num_clients} clients is nobody; hold out more")
    if schedule.clients_per_round > len(members):
        raise RecipeError(
            f"clients_per_round = {schedule.clients_per_round}, but {len(members)} clients train; "
            "make it at most that, or 0 for all"
        )
    numbers = range(1, schedule.rounds + 1)
    cohorts = (sampled(members, schedule, round) for round in numbers)
    if schedule.asynchronous.buffer:
        clock = steps(schedule.asynchronous, schedule.seed, members, schedule.clients_per_round or len(members))
        cohorts = (next(clock).clients for _ in numbers)
    spent = ledger(task, method, schedule, cohorts)
    num_rounds = schedule.rounds if spent is None else spent.last_round  # phases and rates end where the run does
    device = torch.device(engine.device)
    # A copy: the forward pass changes a module, its mode and BatchNorm's counters. What is drawn at the
    # start is drawn on the CPU, whatever the device.
    model = seed_dropout(copied(task.model) if device.type == "cpu" else deepcopy(task.model)).cpu()
    check_repeatable(model, task.train.x[:2].cpu())
    group = None if task.group is None or task.serves is not None else task.group.cpu()
    shared, fresh = method.init(
        model,
        Population(
            task.num_clients,
            schedule.seed,
            group,
            num_rounds,
            task.num_labels,
            task.public,
            task.owner,
            None if task.shares is None else task.shares.cpu(),
            len(members),
        ),
    )
    shared, fresh = (tree.map_tensors(lambda leaf: leaf.to(device), state) for state in (shared, fresh))
    module = stackable(seed_dropout(method.adapt(model))).to(device)
    if engine.recompute:
        recomputing(module)
    loss = Loss(module, task.loss, method.local.precision, task.labels_each)
    hostile = attackers(schedule.attack, schedule.seed, members)
    if schedule.attack.kind != "none" and schedule.attack.share and not len(hostile):
        raise RecipeError(f"attack.share = {schedule.attack.share} of {len(members)} clients is nobody; raise it")
    if task.labels_each and schedule.attack.kind in ("label_flip", "backdoor"):
        raise RecipeError(f"attack.kind = {schedule.attack.kind!r} changes labels, and here each task has its own")
    train = poisoned(schedule.attack, task.train.to(device), hostile, task.num_labels)
    cohort = Cohort(
        method,
        loss,
        train,
        schedule.seed,
        1,
        schedule.weighting,
        task.augment,
        num_rounds,
        faults=schedule.faults,
        attack=schedule.attack,
        hostile=tuple(hostile.tolist()),
        ledger=spent,
        num_members=len(members),
    )
    store = PrivateStore(fresh, task.num_clients)
    first = sampled(members, schedule, 1)
    first = first if len(first) else members[:1]
    chunk = chunk_size(engine, cohort, shared, store, first)
    workers = engine.workers if engine.workers > 1 else 0
    losses = tuple(replace(loss, module=copied(module)) for _ in range(workers))
    cohort = replace(cohort, chunk=chunk, together=engine.mode == "auto", losses=losses)
    return cohort, Progress(0, shared, store, {}, None)


def _check_batches(task: Task, method: Method) -> None:
    """Raises DataError if BatchNorm would have to train on a batch of one example."""
    if not has_batch_norm(task.model):
        return
    for setting in ("local", "finetune"):
        local: LocalTraining | None = getattr(method, setting, None)
        if local is not None and (alone := np.flatnonzero(lonely(task.train.count, local.batch_size))).size:
            raise DataError(
                f"client {alone[0]}: its last batch has one example, on which BatchNorm cannot train; "
                f"choose another {setting}.batch_size than {local.batch_size}"
            )


def participants(num_clients: int, schedule: Schedule) -> np.ndarray:
    """The clients that take part, ascending: all but the held-out ones."""
    return np.setdiff1d(np.arange(num_clients), held_out(num_clients, schedule))


def honest(num_clients: int, schedule: Schedule) -> np.ndarray:
    """The clients that are evaluated, ascending: those that take part and attack nobody."""
    members = participants(num_clients, schedule)
    return np.setdiff1d(members, attackers(schedule.attack, schedule.seed, members))


def held_out(num_clients: int, schedule: Schedule) -> np.ndarray:
    """The clients that never train, ascending."""
    count = round(schedule.held_out * num_clients)
    return choose(num_clients, count, schedule.seed, "held out")


def sampled(members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
    """The clients of one round, ascending."""
    size = schedule.clients_per_round or len(members)
    if schedule.privacy.level == "client" and schedule.privacy.sampling == "poisson" and size < len(members):
        draw = np.random.Generator(np.random.Philox(key=seed_of(schedule.seed, "cohort", round)))
        by_chance: np.ndarray = members[draw.random(len(members)) * len(members) < size]
        return by_chance
    chosen: np.ndarray = members[choose(len(members), size, schedule.seed, "cohort", round)]
    return chosen


def rounds(
    cohort: Cohort,
    at: Progress,
    task: Task,
    schedule: Schedule,
    cost: Cost | None = None,
    fleet: Fleet | None = None,
) -> Iterator[Progress]:
    """The run's progress after each of the remaining rounds.

    Args:
        cohort: of `start`.
        at: where the run stands.
        task: whose; only its counts, groups and tests' owners are looked at here.
        schedule: how long.
        cost: of one client; measured unless it is given.
        fleet: who trains and is tested; by default all clients, here.
    """
    method, shared, store, clips = cohort.method, at.shared, at.store, at.clips
    members = participants(task.num_clients, schedule)
    fleet = fleet or Here(cohort, store, task)
    tests = task.tests_of(honest(task.num_clients, schedule))
    group = _group(task, tests)
    costs = Costs(cohort, members[:1], cost)
    clock = steps(schedule.asynchronous, schedule.seed, members, schedule.clients_per_round or len(members))
    # What clients at work may have begun with, by the server's steps before it; nobody works past a deadline.
    begun = {0: shared} if schedule.asynchronous.buffer else {}
    last = schedule.rounds if cohort.ledger is None else cohort.ledger.last_round
    for round in range(at.round + 1, last + 1):
        cost, begin = costs.now(shared, store), perf_counter()
        step = next(clock) if schedule.asynchronous.buffer else None
        clients = fleet.sampled(members, schedule, round) if step is None else step.clients
        tally = Tally()
        fate = fates(schedule.faults, schedule.seed, round, clients)
        working = clients[fate != MISSING]
        tally.lose({"missing": len(clients) - len(working)})
        work = _work(cost, method, task, working, partial(_been, fleet, store, members, schedule, round))
        if schedule.secure.aggregation == "masks" or schedule.privacy.level == "client":
            total = partial(fleet.total, shared, working, round, schedule, seen=tally)
            met = meet(cohort, shared, total, partial(fleet.form, shared, members[:1]), round, schedule, clips)
        else:
            uploads = (
                fleet.uploads(shared, working, round, tally)
                if step is None
                else late_uploads(cohort, begun, store, step, round, schedule.asynchronous.power, tally)
            )
            met = Met(server_step(cohort, shared, uploads, schedule, tally), clips)
        noised = schedule.privacy.level == "client"  # and noise needs nobody
        enough = tally.num_uploads >= max(not noised, schedule.faults.quorum * len(clients))
        shared, clips = (met.shared, met.clips) if enough else (shared, clips)
        if step is not None:
            begun = {version: old for version, old in begun.items() if version >= step.oldest} | {round: shared}
        figures: dict[str, Any] = {
            "round": round,
            **({"train_loss": tally.mean_loss} if tally.num_losses else {}),
            "bytes_up": tally.upload_bytes,
            "bytes_down": len(working) * cost.bytes_down,
            **work,
            "train_seconds": perf_counter() - begin,
        }
        figures |= tally.figures
        figures |= met.figures | {"bytes_down": figures["bytes_down"] + met.bytes_down}
        figures |= {} if met.bytes_up is None else {"bytes_up": met.bytes_up}
        figures |= {} if cohort.ledger is None else cohort.ledger.figures(round)
        figures |= {} if step is None else step.figures(round)
        figures |= {name: own for name, own in (("dropped", tally.dropped), ("lost", tally.lost)) if own}
        figures |= {} if enough else {"no_quorum": 1}
        figures |= {name: float(value) for name, value in getattr(shared, "figures", {}).items()}
        due = round % schedule.evaluate_every == 0 or round == last
        found = fleet.scores(shared, tests) if due else None
        if found is not None:
            figures |= figures_of(found[1], method, _group(task, found[0]), _alive(shared))
            figures |= {"untested": len(tests) - len(found[0])} if len(found[0]) < len(tests) else {}
            figures |= _led(cohort, shared, store, task, tests) if schedule.attack.kind == "backdoor" else {}
        else:
            figures |= _assigned(shared, task, tests, group)
        figures["seconds"] = perf_counter() - begin
        yield Progress(round, shared, store, figures, _singly(found), clips, round == last)


def _work(
    cost: Cost, method: Method, task: Task, clients: np.ndarray, been: Callable[[], np.ndarray]
) -> dict[str, Any]:
    """What a round of these clients takes, before it has begun; `been` tells who has been there."""
    counts, slots = task.train.count[clients], task.train.slots
    before = None if cost.again is None else np.isin(clients, been())
    return cost.of(counts, trains(method, counts), None if slots is None else slots[clients], before)


def _been(fleet: Fleet, store: PrivateStore, members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
    """The clients that have trained before this round; across machines those that were asked to."""
    if isinstance(fleet, Here):
        return store.seen
    return np.unique([client for earlier in range(1, round) for client in sampled(members, schedule, earlier)])


def _alive(shared: Any) -> np.ndarray | None:
    """The routes that were not pruned, where a method prunes."""
    alive: torch.Tensor | None = getattr(shared, "alive", None)
    return None if alive is None else alive.cpu().numpy()


def _singly(found: tuple[np.ndarray, Scores | SummedScores] | None) -> Scores | None:
    """The scores by client, where they are known."""
    return found[1] if found is not None and isinstance(found[1], Scores) else None


def _group(task: Task, tests: np.ndarray) -> np.ndarray | None:
    """(K,) the true groups of these tests, where they are known."""
    return None if task.group is None else task.group[tests].cpu().numpy()


def _assigned(shared: Any, task: Task, tests: np.ndarray, group: np.ndarray | None) -> dict[str, Any]:
    """How clusters agree with groups, where the server knows both without an evaluation."""
    assigned = getattr(shared, "assigned", None)
    if group is None or assigned is None:
        return {}
    clients = torch.from_numpy(tests) if task.serves is None else task.serves[tests]
    return routing(assigned[clients.to(assigned.device)].cpu().numpy(), group)


def _led(cohort: Cohort, shared: Any, store: PrivateStore, task: Task, tests: np.ndarray) -> dict[str, float]:
    """How often a backdoor's trigger has its way, in %."""
    traps = trapped(task.test.to(cohort.train.x.device), cohort.train.x.max())
    serves = None if task.serves is None else task.serves.cpu().numpy()
    led = evaluate(cohort, shared, store, traps, tests[traps.count[tests] > 0], serves)
    return {"attack_success": led.summary()["accuracy"]}
