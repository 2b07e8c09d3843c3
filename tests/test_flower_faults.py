"""A deployed run goes on whatever dies, is late, comes twice or comes at last, and says what it has lost."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.app import Error, Message

from test_battery import CASES
from test_flower import FakeGrid, Small, floral, here, same, sites, small_task, without_times  # noqa: F401
from umbel import tree
from umbel.errors import DeployError, RunFolderError
from umbel.flower import attendance, exchange, resume
from umbel.flower.exchange import Patience
from umbel.flower.lead import lead
from umbel.flower.post import kind_of, opened
from umbel.flower.work import NodeSettings, Site
from umbel.hazards import Faults
from umbel.recipe import Recipe
from umbel.runs import read_history
from umbel.schedule import Schedule

QUICK = Patience(nodes=0.2, deadline=60.0, answer=60.0, gone=0.2)


class Clock:
    """A clock that goes on while somebody sleeps, and never else."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    of_all = Clock()
    for module in (exchange, attendance):
        monkeypatch.setattr(module, "time", of_all)
    monkeypatch.setattr(exchange, "LOOK", 0.15)


# The server is killed.


@dataclass
class Killed(BaseException):
    """No error of anybody's: what comes after it does not happen."""


class Mortal(FakeGrid):
    """A grid whose server dies when the nodes have done a round, before it has their answers."""

    def __init__(self, sites, kind, round):
        super().__init__(sites)
        self.death = kind, round

    def push_messages(self, messages):
        messages = list(messages)
        names = super().push_messages(messages)
        facts = opened(messages[0].content, "")[0]
        if (kind_of(messages[0].metadata.message_type), facts.get("round", self.death[1])) == self.death:
            raise Killed
        return names


DEATHS = [("train", 1), ("train", 3), ("evaluate", 2)]


@pytest.mark.parametrize(
    ("name", "death"),
    [*(("floral", death) for death in DEATHS), *((name, ("train", 2)) for name in ("trust", "ditto", "fl_tac"))],
)
def test_a_server_that_is_killed_goes_on_to_the_same_bits(name, death, tmp_path):
    method = next(iter(CASES[name].values()))
    recipe = Recipe("tested", Small(), method, Schedule(rounds=3, clients_per_round=3, seed=1))
    nodes, out = sites(tmp_path, "0,4", "1-3"), tmp_path / "out"
    with pytest.raises(Killed):
        lead(Mortal(nodes, *death), recipe, out, QUICK)
    away = lead(FakeGrid(nodes), recipe, out, QUICK)
    at, history = here(recipe)
    assert same(away.progress.shared, at.shared)
    np.testing.assert_equal(without_times(away.history), without_times(history))
    np.testing.assert_equal(without_times(read_history(out)), without_times(json.loads(json.dumps(history))))
    for site in nodes:
        (work,) = site.works.values()
        for client in site.settings.numbers.tolist():
            assert same(work.kept.latest(client), at.store.rows(np.array([client])))


def test_server_and_nodes_are_killed_at_once(tmp_path):
    with pytest.raises(Killed):
        lead(Mortal(sites(tmp_path, "0-2", "3-4"), "train", 2), floral(), tmp_path / "out", QUICK)
    away = lead(FakeGrid(sites(tmp_path, "0-2", "3-4")), floral(), tmp_path / "out", QUICK)
    assert same(away.progress.shared, here(floral())[0].shared)


def test_a_folder_is_gone_on_with_by_its_own_recipe_and_one_server(tmp_path, monkeypatch):
    nodes, out = sites(tmp_path, "0-4"), tmp_path / "out"
    with pytest.raises(Killed):
        lead(Mortal(nodes, "train", 3), floral(), out, QUICK)
    other = replace(floral(), schedule=Schedule(rounds=4))
    with pytest.raises(RunFolderError, match="another recipe: it says rounds = 3, this one 4"):
        lead(FakeGrid(nodes), other, out, QUICK)
    monkeypatch.setattr(resume, "HANDOVER", 0.1)
    leading = Holding(nodes, out, floral())
    with pytest.raises(RunFolderError, match="another process is at work on the run"):
        lead(leading, floral(), out, QUICK)
    lead(FakeGrid(nodes), floral(), out, QUICK)
    with pytest.raises(RunFolderError, match="holds a run that is over"):
        lead(FakeGrid(nodes), floral(), out, QUICK)


class Holding(FakeGrid):
    """A grid in whose first round somebody starts a second server."""

    def __init__(self, sites, out, recipe):
        super().__init__(sites)
        self.second = out, recipe

    def pull_messages(self, names):
        if self.asked[-1].metadata.message_type == "train":
            lead(FakeGrid(list(self.sites.values())), self.second[1], self.second[0], QUICK)
        return super().pull_messages(names)


def test_a_damaged_checkpoint_is_told_where_nodes_cannot_go_back_so_far(tmp_path, caplog):
    nodes, out = sites(tmp_path, "0-4"), tmp_path / "out"
    with pytest.raises(Killed):
        lead(Mortal(nodes, "train", 3), floral(), out, QUICK)
    (out / "checkpoints" / "000002.safetensors").write_bytes(b"")
    away = lead(FakeGrid(nodes), floral(), out, QUICK)
    assert [line.get("lost") for line in away.history] == [None, {"refused": 5}, None]
    assert away.history[1]["no_quorum"] == 1
    assert "000002.safetensors is damaged" in caplog.text
    assert "has trained up to round 3 and cannot go back to round 2" in caplog.text


# Answers are late, lost or doubled.


class Hold(FakeGrid):
    """Keeps back a node's answers to some rounds' questions until the first question of a later round."""

    def __init__(self, sites, node, held, until):
        super().__init__(sites)
        self.node, self.held, self.until, self.back = node, held, until, []

    def push_messages(self, messages):
        messages = list(messages)
        names = super().push_messages(messages)
        for message, name in zip(messages, names, strict=True):
            round = opened(message.content, "")[0].get("round", 0)
            if message.metadata.message_type == "train" and round >= self.until:
                self.answers |= dict(self.back)
                self.back = []
            elif message.metadata.dst_node_id == self.node and round in self.held:
                self.back.append((name, self.answers.pop(name)))
        return names


def test_what_comes_after_the_deadline_is_dropped_and_its_node_is_left_in_peace(tmp_path, caplog):
    caplog.set_level("INFO", "umbel")
    recipe = replace(floral(), schedule=Schedule(rounds=5))
    grid = Hold(sites(tmp_path, "0-2", "3-4"), 2, {2}, 3)
    result = lead(grid, recipe, patience=replace(QUICK, deadline=0.3))
    assert [line.get("lost") for line in result.history] == [None, {"late": 2}, {"late": 2}, None, None]
    asked = [
        opened(message.content, "")[0]["round"]
        for message in grid.asked
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2
    ]
    assert asked == [1, 2, 4, 5]
    assert "has answered a question whose time was up" in caplog.text
    assert "has not answered for" in caplog.text


class Slow(FakeGrid):
    """A grid whose answers take longer to be put together than the deadline is away."""

    def pull_messages(self, names):
        exchange.time.now += 1.0
        return super().pull_messages(names)


def test_what_is_there_by_the_deadline_counts_however_long_the_others_took(tmp_path):
    patience = Patience(nodes=60.0, deadline=0.3, answer=60.0)
    grid = Slow(sites(tmp_path, "0-2", "3-4"))
    away = lead(grid, floral(), patience=patience)
    assert not any("lost" in line for line in away.history)
    assert {message.metadata.ttl for message in grid.asked} == {60.3}


def test_a_round_without_a_quorum_leaves_the_server_as_it_was(tmp_path):
    schedule = Schedule(rounds=4, faults=Faults(quorum=0.8))
    recipe = Recipe("tested", Small(), CASES["floral"]["gradient"], schedule)
    told = []
    grid = Hold(sites(tmp_path, "0-2", "3-4"), 2, {2}, 3)
    lead(grid, recipe, None, replace(QUICK, deadline=0.3), told.append)
    assert [line.figures.get("no_quorum") for line in told] == [None, 1, 1, None]
    assert told[1].figures["lost"] == told[2].figures["lost"] == {"late": 2}
    assert same(told[2].shared, told[0].shared)
    before, after = (tree.tensors(told[at].shared) for at in (2, 3))
    assert not all(torch.equal(leaf, after[name]) for name, leaf in before.items())


class Doubling(FakeGrid):
    """Hands out every answer to a question twice."""

    def pull_messages(self, names):
        return [answer for answer in super().pull_messages(names) for _ in range(2)]


def test_answers_that_come_twice_count_once(tmp_path):
    away = lead(Doubling(sites(tmp_path, "0-2", "3-4")), floral(), patience=QUICK)
    assert same(away.progress.shared, here(floral())[0].shared)
    # The two of a hello, then in each round those of training and, from the round before, of evaluation.
    assert [line["lost"] for line in away.history] == [{"duplicate": 4}] * 3


class Vanishing(FakeGrid):
    """A grid on which a node is away from one round's question on, for so many looks."""

    def __init__(self, sites, node, round, looks, code=5):
        super().__init__(sites)
        self.node, self.round, self.looks, self.lost, self.code = node, round, looks, {}, code

    @property
    def away(self):
        return self.round == 0 and self.looks > 0

    def get_node_ids(self):
        self.looks -= self.away
        return [node for node in self.sites if node != self.node or not self.away]

    def push_messages(self, messages):
        messages = list(messages)
        if any(opened(message.content, "")[0].get("round") == self.round for message in messages):
            self.round = 0
        names = super().push_messages(messages)
        for message, name in zip(messages, names, strict=True):
            if message.metadata.dst_node_id == self.node and self.away:
                del self.answers[name]
                self.lost[name] = Message(Error(code=self.code, reason="not there"), reply_to=message)
        return names

    def pull_messages(self, names):
        return [self.lost.pop(name) for name in names if name in self.lost] or super().pull_messages(names)


@pytest.mark.parametrize("code", [3, 4, 5])  # of Flower's: the question, its answer, or the node is not there
def test_a_node_that_comes_back_in_time_is_asked_again(code, tmp_path):
    grid = Vanishing(sites(tmp_path, "0-2", "3-4"), 2, 2, looks=3, code=code)
    away = lead(grid, floral(), patience=replace(QUICK, gone=30.0))
    assert grid.looks == 0
    assert same(away.progress.shared, here(floral())[0].shared)
    assert not any("lost" in line for line in away.history)


def test_a_node_that_stays_away_is_missing_and_its_clients_go_on_with_what_they_had(tmp_path):
    nodes = sites(tmp_path, "0-2", "3-4")
    grid = Vanishing(nodes, 2, 2, looks=10**9)
    recipe = replace(floral(), schedule=Schedule(rounds=4))

    def back(progress):
        if progress.round == 3:
            grid.looks = 0

    result = lead(grid, recipe, None, QUICK, back)
    assert [line.get("lost") for line in result.history] == [None, {"missing": 2}, {"missing": 2}, None]
    (work,) = nodes[1].works.values()
    assert work.kept._row(4).round == 4
    again = Recipe("tested", Small(), recipe.method, Schedule(rounds=1))
    assert same(work.kept.fresh, here(again)[0].store.fresh(1))


def test_when_nobody_is_left_the_run_stops_and_can_be_gone_on_with(tmp_path):
    nodes, out = sites(tmp_path, "0-4"), tmp_path / "out"
    grid = FakeGrid(nodes)

    def leave(progress):
        if progress.round == 2:
            grid.sites = {}

    with pytest.raises(DeployError, match="round 3: after 0 s 0 clients are there, and 1 are needed; start their"):
        lead(grid, floral(), out, QUICK, leave)
    away = lead(FakeGrid(nodes), floral(), out, QUICK)
    assert same(away.progress.shared, here(floral())[0].shared)


def test_a_client_moves_to_another_node_once_its_own_is_gone(tmp_path):
    nodes = sites(tmp_path, "0-2", "3-4")
    grid = FakeGrid(nodes)
    moved = Site(NodeSettings("spare", "3-4", str(tmp_path / "3-4")))  # with what was kept there

    def move(progress):
        if progress.round == 1:
            grid.sites[3] = moved
        if progress.round == 2:
            del grid.sites[2]

    recipe = replace(floral(), schedule=Schedule(rounds=4))
    away = lead(grid, recipe, None, QUICK, move)
    assert same(away.progress.shared, here(recipe)[0].shared)
    assert not any("lost" in line for line in away.history)


# Somebody comes late.


def test_clients_that_come_late_find_their_routes_before_they_train(tmp_path):
    method = CASES["floral"]["gradient"]
    recipe = Recipe("tested", Small(), method, Schedule(rounds=4))
    first, late = sites(tmp_path, "0-3", "4")
    grid, told = FakeGrid([first]), []

    def come(progress):
        told.append(progress)
        if progress.round == 2:
            grid.sites[2] = late

    result = lead(grid, recipe, None, replace(QUICK, nodes=1.0), come, share=0.5)
    assert [line.get("lost") for line in result.history] == [{"missing": 1}] * 2 + [None] * 2
    assert [line.get("untested") for line in result.history] == [1, 1, None, None]
    assert [line.get("joined") for line in result.history] == [None, None, 1, None]
    (work,) = late.works.values()
    row = work.kept._row(4)
    assert row.round == 4
    with pytest.raises(DeployError, match="no node with client 4"):
        lead(FakeGrid([first]), recipe, patience=QUICK)


def test_the_routes_of_who_comes_late_are_learned_and_are_kept_for_the_round(tmp_path):
    method = CASES["floral"]["gradient"]
    recipe = Recipe("tested", Small(), method, Schedule(rounds=3))
    first, late = sites(tmp_path, "0-3", "4")
    grid = FakeGrid([first])

    def come(progress):
        if progress.round == 2:
            grid.sites[2] = late

    lead(grid, recipe, None, QUICK, come, share=0.5)
    (work,) = late.works.values()
    row = work.kept._row(4)
    assert not torch.equal(row.before.logits, work.kept.fresh.logits)
    question = next(
        message
        for message in grid.asked
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2
    )
    facts, parts = opened(question.content, "")
    assert facts["newcomers"] == [4]
    before = late.answer("train", facts, parts)[1]
    assert late.answer("train", facts, parts)[1] == before
    assert same(work.kept._row(4).before, row.before)
    cold = Site(NodeSettings("4", "4", str(tmp_path / "cold")))
    hello = next(m for m in grid.asked if m.metadata.message_type == "query.hello")
    cold.answer("hello", *opened(hello.content, ""))
    cold.answer("train", facts | {"newcomers": []}, parts)
    (other,) = cold.works.values()
    assert same(other.kept._row(4).before, other.kept.fresh)


class Done:
    figures = {}  # noqa: RUF012


def test_the_run_config_says_how_long_and_how_many(tmp_path, monkeypatch):
    import tomli_w

    from umbel.flower import apps

    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(floral().table()))
    seen = []
    monkeypatch.setattr(apps, "lead", lambda *own: seen.append(own) or Done)
    config = {"deadline": 7, "wait-gone": 2.0, "quorum": 0.5, "begin": 0.25, "out": "", "method": "tested"}
    apps.run(None, tmp_path / "recipe.toml", config)
    _, recipe, folder, patience, _, share = seen[0]
    assert recipe.schedule.faults.quorum == 0.5
    assert folder is None
    assert (patience.deadline, patience.gone, patience.nodes, share) == (7.0, 2.0, 300.0, 0.25)
