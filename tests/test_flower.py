"""Runs over an exchange of Flower messages are those of one machine, bit for bit, and what does not fit is refused."""

from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.supercore.task_identity import TaskIdentity
from test_battery import CASES, GROUP, every, labelled, net
from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Engine
from umbel.flower.apps import answered
from umbel.flower.lead import Patience, lead
from umbel.flower.work import NodeSettings, Site
from umbel.recipe import Recipe
from umbel.rounds import rounds, start
from umbel.schedule import Schedule
from umbel.tasks import TASKS, Task

TIMES = {"seconds", "train_seconds", "client_seconds", "exchange_seconds", "wire_up", "wire_down"}


@dataclass(frozen=True)
class Small:
    """Five clients with a few examples each."""

    norm: bool = False
    seed: int = 0  # of nothing; another one is another task

    def load(self, seed):
        clients = labelled([6, 8, 5, 13, 8] if self.norm else [5, 8, 1, 13, 8])
        return Task("small", net(self.norm), "cross_entropy", Examples.of(clients), Examples.of(clients), GROUP)


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    monkeypatch.setitem(TASKS, "small", Small)
    for name in ("_run_id", "_task_id", "_node_id"):  # of which Flower's processes have one each
        monkeypatch.setattr(TaskIdentity, name, 1)


class FakeGrid:
    """Nodes in this process, which answer in an order of their own."""

    def __init__(self, sites):
        self.sites = dict(enumerate(sites, 1))
        self.answers = {}
        self.asked = []

    def get_node_ids(self):
        return list(self.sites)

    def push_messages(self, messages):
        names = []
        for message in reversed(list(messages)):
            message.metadata.__dict__["_message_id"] = uuid4().hex
            names.append(message.metadata.message_id)
            self.asked.append(message)
            self.answers[names[-1]] = answered(self.sites[message.metadata.dst_node_id], message)
        return names[::-1]

    def pull_messages(self, names):
        return [self.answers.pop(name) for name in [name for name in names if name in self.answers][-1:]]


def sites(tmp_path, *clients):
    return [Site(NodeSettings(f"site {own}", own, str(tmp_path / own))) for own in clients]


def here(recipe):
    """The rounds on this machine, one client after the other."""
    task = recipe.task.load(recipe.schedule.seed)
    cohort, at = start(task, recipe.method, recipe.schedule, replace(recipe.engine, mode="looped"))
    history = []
    for progress in rounds(cohort, at, task, recipe.schedule):
        at = progress
        history.append(at.figures)
    return at, history


def same(one, other):
    one, other = tree.tensors(one), tree.tensors(other)
    assert list(one) == list(other)
    for name, leaf in one.items():
        assert torch.equal(leaf, other[name]), name
    return True


def without_times(history):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in history]


def check_parity(recipe, tmp_path, *clients):
    grid = FakeGrid(sites(tmp_path, *clients))
    away = lead(grid, recipe, patience=Patience(0.5, 0.5, 0.5))
    at, history = here(recipe)
    assert same(away.progress.shared, at.shared)
    np.testing.assert_equal(without_times(away.history), without_times(history))
    for site in grid.sites.values():
        (work,) = site.works.values()
        for client in site.settings.numbers.tolist():
            assert same(work.kept.latest(client), at.store.rows(np.array([client])))
    return grid


@every(CASES)
def test_every_method_runs_as_on_one_machine(method, tmp_path):
    norm = type(method).__name__ == "FedBN"
    recipe = Recipe("tested", Small(norm), method, Schedule(rounds=3))
    check_parity(recipe, tmp_path, "0", "1-2", "3,4")


@every(CASES)
def test_with_a_few_clients_in_each_round(method, tmp_path):
    recipe = Recipe("tested", Small(), method, Schedule(rounds=3, clients_per_round=2, seed=1))
    check_parity(recipe, tmp_path, "0,4", "1-3")
