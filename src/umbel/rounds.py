"""One round after another."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from umbel import tree
from umbel.attacks import attackers, poisoned, trapped
from umbel.clock import Step, added, stepped, steps
from umbel.cohort import Cohort, Cost, Engine, PrivateStore, Tally, chunk_size
from umbel.errors import DataError, RecipeError
from umbel.evaluate import Scores, evaluate, routing
from umbel.faults import MISSING, fates, without_outliers
from umbel.methods.protocol import Method, Population
from umbel.methods.routing import bounded_claims
from umbel.model.copies import copied
from umbel.model.dropout import seed_dropout
from umbel.model.loss import Loss, check_repeatable
from umbel.model.recompute import recomputing
from umbel.model.stacked import stackable
from umbel.robust import rule_of
from umbel.schedule import Schedule
from umbel.seeds import choose
from umbel.tasks.task import Task


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round."""

    round: int
    shared: Any
    store: PrivateStore
    figures: dict[str, Any]  # the round's metrics, ready for JSON
    scores: Scores | None  # per client, in rounds that are evaluated


def start(task: Task, method: Method, schedule: Schedule, engine: Engine) -> tuple[Cohort, Progress]:
    """The engine's view of a task, and the state before round 1."""
    _check_batches(task, method)
    _check_mean(task, method, schedule)
    if engine.threads:
        torch.set_num_threads(engine.threads)
    device = torch.device(engine.device)
    # A copy: the forward pass changes a module, its mode and BatchNorm's counters. What is drawn at the
    # start is drawn on the CPU, whatever the device.
    model = seed_dropout(copied(task.model) if device.type == "cpu" else deepcopy(task.model)).cpu()
    check_repeatable(model, task.train.x[:2].cpu())
    group = None if task.group is None or task.serves is not None else task.group.cpu()
    shared, fresh = method.init(
        model,
        Population(
            task.num_clients, schedule.seed, group, schedule.rounds, task.num_labels, task.public, task.owner
        ),
    )
    shared, fresh = (tree.map_tensors(lambda leaf: leaf.to(device), state) for state in (shared, fresh))
    module = stackable(seed_dropout(method.adapt(model))).to(device)
    if engine.recompute:
        recomputing(module)
    loss = Loss(module, task.loss, method.local.precision)
    hostile = attackers(schedule.attack, schedule.seed, participants(task.num_clients, schedule))
    train = poisoned(schedule.attack, task.train.to(device), hostile, task.num_labels)
    cohort = Cohort(
        method,
        loss,
        train,
        schedule.seed,
        1,
        schedule.weighting,
        task.augment,
        schedule.rounds,
        schedule.faults,
        schedule.attack,
        tuple(hostile.tolist()),
    )
    store = PrivateStore(fresh, task.num_clients)
    first = sampled(participants(task.num_clients, schedule), schedule, 1)
    chunk = chunk_size(engine, cohort, shared, store, first)
    return replace(cohort, chunk=chunk), Progress(0, shared, store, {}, None)


def _check_batches(task: Task, method: Method) -> None:
    """Raises DataError if BatchNorm would have to train on a batch of one example."""
    size = method.local.batch_size
    alone = np.flatnonzero(task.train.count % size == 1) if size > 1 else np.arange(1)
    batch_norm = nn.modules.batchnorm._BatchNorm
    if len(alone) and any(isinstance(layer, batch_norm) for layer in task.model.modules()):
        raise DataError(
            f"client {alone[0]}: its last batch has one example, on which BatchNorm cannot train; "
            f"choose another local.batch_size than {size}"
        )


def _check_mean(task: Task, method: Method, schedule: Schedule) -> None:
    """Raises RecipeError if something is to stand in for the mean of uploads that cannot."""
    why, name, buffer = method.refuses(), type(method).__name__, schedule.asynchronous.buffer
    if why and schedule.robust.rule != "none":
        raise RecipeError(f"robust.rule = {schedule.robust.rule!r} does not go with {name}: {why}")
    if why and buffer:
        raise RecipeError(f"asynchronous.buffer does not go with {name}: {why}")
    members = len(participants(task.num_clients, schedule))
    if buffer > members:
        raise RecipeError(f"asynchronous.buffer = {buffer} is never full, for {members} clients take part")


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
    chosen: np.ndarray = members[choose(len(members), size, schedule.seed, "cohort", round)]
    return chosen


def rounds(
    cohort: Cohort, at: Progress, task: Task, schedule: Schedule, cost: Cost | None = None
) -> Iterator[Progress]:
    """The run's progress after each of the remaining rounds; `cost` is measured unless it is given."""
    method, shared, store = cohort.method, at.shared, at.store
    members = participants(task.num_clients, schedule)
    test = task.test.to(cohort.train.x.device)
    tests = task.tests_of(honest(task.num_clients, schedule))
    traps = trapped(test, cohort.train.x.max()) if schedule.attack.kind == "backdoor" else None
    group = None if task.group is None else task.group[tests].cpu().numpy()
    serves = None if task.serves is None else task.serves.cpu().numpy()
    slots = task.train.slots
    cost = cost or cohort.cost(shared, store, members[:1])  # of one client
    clock = steps(schedule.asynchronous, schedule.seed, members, schedule.clients_per_round or len(members))
    begun = {0: shared}  # what clients at work may have begun with, by the server's steps before it
    for round in range(at.round + 1, schedule.rounds + 1):
        begin = perf_counter()
        step = next(clock) if schedule.asynchronous.buffer else None
        clients = sampled(members, schedule, round) if step is None else step.clients
        tally = Tally()
        # What travels may shrink while a run lasts.
        bytes_down = tree.row_bytes(method.send(shared, torch.from_numpy(clients[:1]).to(test.x.device)))
        fate = fates(schedule.faults, schedule.seed, round, clients)
        working = clients[fate != MISSING]
        if len(working) < len(clients):
            tally.lose({"missing": len(clients) - len(working)})
        uploads = (
            cohort.uploads(shared, store, working, round, tally)
            if step is None
            else late_uploads(cohort, begun, store, step, round, schedule.asynchronous.power, tally)
        )
        moved = server_step(cohort, shared, uploads, schedule, tally)
        enough = tally.num_uploads >= max(1, schedule.faults.quorum * len(clients))
        shared = moved if enough else shared
        if step is not None:
            begun = {version: old for version, old in begun.items() if version >= step.oldest} | {round: shared}
        figures: dict[str, Any] = {
            "round": round,
            **({"train_loss": tally.mean_loss} if tally.num_uploads else {}),
            "bytes_up": tally.upload_bytes,
            "bytes_down": len(working) * bytes_down,
            **cost.of(task.train.count[working], None if slots is None else slots[working]),
            "train_seconds": perf_counter() - begin,
        }
        if tally.dropped:
            figures["dropped"] = tally.dropped
        if step is not None:
            figures |= {"clock": step.time, "staleness": float((round - 1 - step.versions).mean())}
        figures |= {"lost": tally.lost} if tally.lost else {}
        figures |= {} if enough else {"no_quorum": 1}
        figures |= {name: float(value) for name, value in getattr(shared, "figures", {}).items()}
        scores = None
        if round % schedule.evaluate_every == 0 or round == schedule.rounds:
            scores = evaluate(cohort, shared, store, test, tests, serves)
            figures |= scores.summary()
            if not getattr(method, "mixes_clients", False):  # such a method has figures of its own
                figures |= routing(scores.mixture, group)
            if group is not None:
                figures |= scores.of_groups(group)
            if traps is not None:
                some = tests[traps.count[tests] > 0]
                led = evaluate(cohort, shared, store, traps, some, serves)
                figures["attack_success"] = led.summary()["accuracy"]
        figures["seconds"] = perf_counter() - begin
        yield Progress(round, shared, store, figures, scores)


def server_step(cohort: Cohort, shared: Any, uploads: Iterator[Any], schedule: Schedule, tally: Tally) -> Any:
    """The server's state after these uploads of a round; what it was where there is none.

    Single uploads are compared, and held until all are in, only where damage is to be found or a mean made robust.
    """
    method, robust, faults = cohort.method, schedule.robust, schedule.faults
    if faults.corrupt and faults.outlier:
        held, outliers = without_outliers(list(uploads), faults.outlier)
        if outliers:
            tally.num_uploads -= outliers
            tally.lose({"outlier": outliers})
        uploads = iter(held)
    first = next(uploads, None)
    if first is None:
        return shared
    if robust.rule == "none":
        return method.server_update(shared, chain([first], uploads))
    every = tree.map_tensors(lambda *leaves: torch.cat(leaves), first, *uploads)
    everyone = torch.zeros(len(every.loss), dtype=torch.long, device=every.loss.device)
    message = method.send(shared, everyone)  # all have received the same
    every = method.changed(bounded_claims(every, robust.heaviest), message, rule_of(robust))
    return method.server_update(shared, iter([every]))


def late_uploads(
    cohort: Cohort,
    begun: dict[int, Any],
    store: PrivateStore,
    step: Step,
    round: int,
    power: float,
    tally: Tally,
) -> Iterator[Any]:
    """The uploads of an asynchronous step, as if from where the server is now; what began long ago counts less.

    `begun` are the server's states by the number of its steps, the last of them where it is.
    """
    method, now = cohort.method, begun[round - 1]
    for version in np.unique(step.versions).tolist():
        stale = round - 1 - version
        for upload in cohort.uploads(begun[version], store, step.clients[step.versions == version], round, tally):
            if stale:
                everyone = torch.zeros(len(upload.loss), dtype=torch.long, device=upload.loss.device)
                received, here = (method.send(state, everyone) for state in (begun[version], now))
                moved = method.changed(upload, received, stepped((1 + stale) ** -power))
                yield method.changed(moved, here, added)
            else:
                yield upload
