"""One round after another."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from umbel import tree
from umbel.cohort import Cohort, Cost, Engine, PrivateStore, Tally, chunk_size
from umbel.errors import DataError
from umbel.evaluate import Scores, evaluate, routing
from umbel.methods.protocol import Method, Population
from umbel.model.copies import copied
from umbel.model.dropout import seed_dropout
from umbel.model.loss import Loss, check_repeatable
from umbel.model.stacked import stackable
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
    loss = Loss(stackable(seed_dropout(method.adapt(model))).to(device), task.loss)
    train = task.train.to(device)
    cohort = Cohort(method, loss, train, schedule.seed, 1, schedule.weighting, task.augment, schedule.rounds)
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


def participants(num_clients: int, schedule: Schedule) -> np.ndarray:
    """The clients that take part, ascending: all but the held-out ones."""
    return np.setdiff1d(np.arange(num_clients), held_out(num_clients, schedule))


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
    tests = task.tests_of(members)
    group = None if task.group is None else task.group[tests].cpu().numpy()
    serves = None if task.serves is None else task.serves.cpu().numpy()
    slots = task.train.slots
    cost = cost or cohort.cost(shared, store, members[:1])  # of one client
    for round in range(at.round + 1, schedule.rounds + 1):
        begin = perf_counter()
        clients = sampled(members, schedule, round)
        tally = Tally()
        # What travels may shrink while a run lasts.
        bytes_down = tree.row_bytes(method.send(shared, torch.from_numpy(clients[:1]).to(test.x.device)))
        shared = method.server_update(shared, cohort.uploads(shared, store, clients, round, tally))
        figures: dict[str, Any] = {
            "round": round,
            "train_loss": tally.mean_loss,
            "bytes_up": tally.upload_bytes,
            "bytes_down": len(clients) * bytes_down,
            **cost.of(task.train.count[clients], None if slots is None else slots[clients]),
            "train_seconds": perf_counter() - begin,
        }
        if tally.dropped:
            figures["dropped"] = tally.dropped
        figures |= {name: float(value) for name, value in getattr(shared, "figures", {}).items()}
        scores = None
        if round % schedule.evaluate_every == 0 or round == schedule.rounds:
            scores = evaluate(cohort, shared, store, test, tests, serves)
            figures |= scores.summary()
            if not getattr(method, "mixes_clients", False):  # such a method has figures of its own
                figures |= routing(scores.mixture, group)
            if group is not None:
                figures |= scores.of_groups(group)
        elif group is not None and (routes := getattr(shared, "routes", None)) is not None:
            figures |= routing(routes[tests].cpu().numpy(), group)  # needs no evaluation
        figures["seconds"] = perf_counter() - begin
        yield Progress(round, shared, store, figures, scores)
