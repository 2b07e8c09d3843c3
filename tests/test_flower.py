"""Runs over Flower's messages are those of one machine, bit for bit, and what does not fit is refused."""

import re
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.app import Array, Message
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import save_file

from simulate import FREE
from test_battery import CASES, GROUP, every, labelled, net
from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Engine
from umbel.errors import DeployError, RecipeError, RoundError, RunFolderError, WireError
from umbel.flower.answers import Uploads
from umbel.flower.apps import answered
from umbel.flower.exchange import Patience
from umbel.flower.lead import lead, refuse_simulated
from umbel.flower.node import Link, serve
from umbel.flower.post import content_of, opened
from umbel.flower.roster import Roster
from umbel.flower.trial import deal
from umbel.flower.wire import equal, packed, unpacked
from umbel.flower.work import NodeSettings, Site, check_allowed, settings_of, with_data
from umbel.methods import METHODS
from umbel.recipe import Recipe, find, load, read
from umbel.report import write_report
from umbel.rounds import rounds, start
from umbel.runs import resume
from umbel.schedule import Schedule
from umbel.secure.settings import Secure
from umbel.tasks import TASKS, Task
from umbel.weighting import Weighting

TIMES = {"seconds", "train_seconds", "client_seconds", "exchange_seconds", "wire_up", "wire_down"}

COSTS = {"flops", "steps", "server_bytes"}  # a server and a simulator measure them by the same function

QUICK = Patience(nodes=0.2, deadline=60.0, answer=60.0, gone=0.2)


@dataclass(frozen=True)
class Small:
    """Five clients with a few examples each."""

    norm: bool = False
    seed: int = 0  # of nothing; another one is another task

    def load(self, seed):
        clients = labelled([6, 8, 7, 10, 8] if self.norm else [5, 8, 1, 9, 8])
        module = net(self.norm)
        module[0].weight.data += SHIFT[0]
        return Task("small", module, "cross_entropy", Examples.of(clients), Examples.of(clients), GROUP)


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    monkeypatch.setitem(TASKS, "small", Small)
    for module in ("attendance", "exchange"):
        monkeypatch.setattr(f"umbel.flower.{module}.POLL", 0.001)  # nodes of this process have answered already
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


def here(recipe, cost=None):
    """The rounds on this machine, one client after the other."""
    task = recipe.task.load(recipe.schedule.seed)
    cohort, at = start(task, recipe.method, recipe.schedule, replace(recipe.engine, mode="looped"))
    history = []
    for progress in rounds(cohort, at, task, recipe.schedule, cost):
        at = progress
        history.append(at.figures)
    return at, history


def same(one, other):
    one, other = tree.tensors(one), tree.tensors(other)
    assert list(one) == list(other)
    for name, leaf in one.items():
        assert torch.equal(leaf, other[name]), name
    return True


def without_times(history, besides=frozenset()):
    return [{name: value for name, value in line.items() if name not in TIMES | besides} for line in history]


def check_parity(recipe, tmp_path, *clients, cost=None):
    grid = FakeGrid(sites(tmp_path, *clients))
    away = lead(grid, recipe, patience=QUICK)
    at, history = here(recipe, cost)
    assert same(away.progress.shared, at.shared)
    besides = COSTS if cost else frozenset()
    np.testing.assert_equal(without_times(away.history, besides), without_times(history, besides))
    for site in grid.sites.values():
        (work,) = site.works.values()
        for client in site.settings.numbers.tolist():
            assert same(work.kept.latest(client), at.store.rows(np.array([client])))
    return grid


# Momentum, of clients and servers, is nothing that Flower's messages know of: two methods stand for all.
@every(
    {n: {k: m for k, m in o.items() if "momentum" not in k or n in ("fedavg", "floral")} for n, o in CASES.items()}
)
def test_every_method_runs_as_on_one_machine(method, tmp_path):
    norm = type(method).__name__ == "FedBN"
    recipe = Recipe("tested", Small(norm), method, Schedule(rounds=2))
    check_parity(recipe, tmp_path, "0", "1-2", "3,4", cost=FREE)


@every({name: dict(list(own.items())[:1]) for name, own in CASES.items()})
def test_with_a_few_clients_in_each_round(method, tmp_path):
    recipe = Recipe("tested", Small(), method, Schedule(rounds=2, clients_per_round=2, seed=1))
    check_parity(recipe, tmp_path, "0,4", "1-3")


def test_weights_by_risks_are_those_of_one_machine_for_slots_that_are_new(tmp_path):
    method = next(iter(CASES["fl_tac"].values()))
    plan = Schedule(rounds=3, clients_per_round=2, seed=1, weighting=Weighting("rea"))
    check_parity(Recipe("tested", Small(), method, plan), tmp_path, "0,4", "1-3")


def test_a_run_leaves_a_folder_to_report_on_but_not_to_resume(tmp_path):
    lead(FakeGrid(sites(tmp_path, "0-4")), floral(), tmp_path / "runs" / "away", QUICK)
    write_report([tmp_path / "runs" / "away"], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000
    with pytest.raises(RunFolderError, match="is of a run across machines"):
        resume(tmp_path / "runs" / "away")


# What is kept.


def floral():
    return Recipe("tested", Small(), CASES["floral"]["gradient"], Schedule(rounds=3))


@dataclass
class Forgetful(Site):
    """A node that is started anew for every question."""

    def answer(self, kind, facts, parts):
        self.works = {}
        return super().answer(kind, facts, parts)


def test_a_node_that_is_started_anew_goes_on_from_its_disk(tmp_path):
    grid = FakeGrid([Forgetful(NodeSettings("a", "0-4", str(tmp_path)))])
    away = lead(grid, floral(), patience=QUICK)
    assert same(away.progress.shared, here(floral())[0].shared)
    (run,) = tmp_path.iterdir()
    assert (run.stat().st_mode & 0o777) == 0o700
    assert {path.stat().st_mode & 0o777 for path in run.iterdir()} == {0o600}
    assert {path.name for path in run.iterdir()} == {"recipe.json"} | {
        f"client-{k:06d}.safetensors" for k in range(5)
    }


class Recording(FakeGrid):
    """Keeps what was asked, with the answers."""

    def push_messages(self, messages):
        messages = list(messages)
        names = super().push_messages(messages)
        self.pairs = [*getattr(self, "pairs", []), *zip(messages, (self.answers[n] for n in names), strict=True)]
        return names


def test_a_round_that_is_asked_for_twice_has_one_answer(tmp_path):
    grid = Recording(sites(tmp_path, "0-4"))
    lead(grid, floral(), patience=QUICK)
    question, answer = [pair for pair in grid.pairs if pair[0].metadata.message_type == "train"][-1]
    again = answered(grid.sites[1], question)
    assert opened(again.content, "")[1] == opened(answer.content, "")[1]
    first = next(pair for pair in grid.pairs if pair[0].metadata.message_type == "train")[0]
    facts, _ = opened(answered(grid.sites[1], first).content, "")
    assert "cannot go back to round 1" in facts["refused"]


def test_what_is_private_is_in_no_message(tmp_path):
    grid = Recording([Site(NodeSettings("a", "0-4", str(tmp_path), share_mixture=False))])
    lead(grid, floral(), patience=QUICK)
    for message, answer in grid.pairs:
        names = [n for part in opened(answer.content, "")[1].values() for n in unpacked(part, "")]
        assert not [name for name in names if "logits" in name or "mixture" in name], message.metadata.message_type


def test_a_frozen_base_and_what_never_changes_do_not_travel(tmp_path):
    recipe = replace(floral(), method=CASES["floral"]["frozen base"])
    grid = Recording(sites(tmp_path, "0-4"))
    lead(grid, recipe, patience=QUICK)
    sent = [
        opened(message.content, "")[1] for message, _ in grid.pairs if message.metadata.message_type == "train"
    ]
    assert sent[0] == {}  # all is as it was at the start
    assert {name.partition("/")[0] for part in sent[-1].values() for name in unpacked(part, "")} == {
        "adapters",
        "told",
    }


# What is refused.


SHIFT = [0.0]  # of the base, on a node that has another


@dataclass
class OtherBase(Site):
    def answer(self, kind, facts, parts):
        SHIFT[0] = 1.0
        try:
            return super().answer(kind, facts, parts)
        finally:
            SHIFT[0] = 0.0


def test_a_node_with_another_base_is_refused_by_name(tmp_path, caplog):
    grid = FakeGrid([*sites(tmp_path, "0-3"), OtherBase(NodeSettings("ward", "4", str(tmp_path / "ward")))])
    with pytest.raises(
        DeployError, match=r"client 4(.|\n)*'ward': its base is not the server's.*tensor 0\.weight: the node has"
    ):
        lead(grid, floral(), patience=QUICK)


@dataclass
class Confused(Site):
    """A node that says something else than what it was asked."""

    def answer(self, kind, facts, parts):
        told, answer = super().answer(kind, facts, parts)
        match self.settings.name:
            case "hello":
                return told | {"examples": "many"}, answer
            case "score":
                return told, answer | ({"scores": packed({"loss": torch.zeros(7)})} if kind == "evaluate" else {})
            case _:
                return told | {"clients": [99], "examples": [1]}, answer


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("hello", DeployError, "says 'many' for 'examples': Expected `array`"),
        ("clients", DeployError, "its clients are 99, of 5 that there are"),
    ],
)
def test_answers_that_make_no_sense_do_not_stop_the_server_in_its_tracks(name, error, told, tmp_path):
    ward = Confused(NodeSettings(name, "4", str(tmp_path / "ward")))
    with pytest.raises(error, match=told):
        lead(FakeGrid([*sites(tmp_path, "0-3"), ward]), floral(), patience=QUICK)


def test_scores_that_make_no_sense_are_left_out(tmp_path, caplog):
    ward = Confused(NodeSettings("score", "4", str(tmp_path / "ward")))
    result = lead(FakeGrid([*sites(tmp_path, "0-3"), ward]), floral(), patience=QUICK)
    assert [line["untested"] for line in result.history] == [1, 1, 1]
    assert "loss is not of the 1 tests" in caplog.text


def test_missing_and_doubled_clients_are_named(tmp_path):
    with pytest.raises(DeployError, match="no node with clients 3, 4"):
        lead(FakeGrid(sites(tmp_path, "0-2")), floral(), patience=QUICK)
    with pytest.raises(DeployError, match=r"'site (2-3|0-2)': client 2 is on node 'site (0-2|2-3)' already"):
        lead(FakeGrid(sites(tmp_path, "0-2", "2-3")), floral(), patience=QUICK)


@dataclass
class Tampering(Site):
    """A node whose uploads are changed on the way."""

    change: object = None

    def answer(self, kind, facts, parts):
        told, answer = super().answer(kind, facts, parts)
        if kind == "train":
            answer = {"uploads": packed(self.change(unpacked(answer["uploads"], "")))}
        return told, answer


def changed(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


@pytest.mark.parametrize(
    ("change", "lost", "told"),
    [
        (changed("4/base/0.bias", lambda leaf: leaf[:, :2]), "malformed", r"4/?.*base/0.bias has the shape"),
        (changed("4/base/0.bias", torch.Tensor.double), "malformed", "base/0.bias is torch.float64"),
        (changed("4/base/0.bias", lambda leaf: leaf / 0), "not finite", "base/0.bias holds NaN or infinity"),
        (lambda own: {n: leaf for n, leaf in own.items() if n != "4/weight"}, "malformed", "weight is missing"),
        (lambda own: {n: leaf for n, leaf in own.items() if n[0] != "4"}, "malformed", "has sent nothing for"),
        (lambda own: own | {"4/more": torch.zeros(1)}, "malformed", "more was not expected"),
    ],
)
def test_an_upload_that_does_not_fit_is_dropped_by_name(change, lost, told, tmp_path, caplog):
    ward = Tampering(NodeSettings("ward", "3-4", str(tmp_path / "ward")), change=change)
    result = lead(FakeGrid([*sites(tmp_path, "0-2"), ward]), floral(), patience=QUICK)
    assert [line["lost"] for line in result.history] == [{lost: 1}] * 3
    assert any("ward" in line.message and re.search(told, line.message) for line in caplog.records)


def test_a_round_of_nothing_but_bad_uploads_is_lost_and_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    bad = lambda tensors: {name: leaf.double() for name, leaf in tensors.items()}  # noqa: E731
    ward = Tampering(NodeSettings("ward", "0-4", str(tmp_path)), change=bad)
    mend = lambda at: setattr(ward, "change", lambda tensors: tensors)  # noqa: E731
    result = lead(FakeGrid([ward]), floral(), None, QUICK, mend)
    assert [line.get("no_quorum") for line in result.history] == [1, None, None]
    assert result.history[0]["lost"] == {"malformed": 5}
    monkeypatch.setattr("umbel.flower.fleet.FRUITLESS", 2)
    ward.change, told = bad, []
    with pytest.raises(RoundError, match=r"round 2: for 2 rounds no client's work could be used\n.*torch.float64"):
        lead(FakeGrid([ward]), floral(), None, QUICK, told.append)
    assert len(told) == 1


@dataclass
class Stale(Site):
    """A node whose second upload is its first."""

    first: object = None

    def answer(self, kind, facts, parts):
        told, answer = super().answer(kind, facts, parts)
        if kind == "train":
            self.first = self.first or answer
            answer = self.first
        return told, answer


def test_an_upload_of_more_ranks_does_not_fit_once_routes_are_explored(tmp_path):
    recipe = Recipe("tested", Small(), CASES["floral"]["explored with more ranks"], Schedule(rounds=2))
    ward = Stale(NodeSettings("ward", "0", str(tmp_path / "ward")))
    result = lead(FakeGrid([*sites(tmp_path, "1-4"), ward]), recipe, patience=QUICK)
    assert [line.get("lost") for line in result.history] == [None, {"malformed": 1}]


def test_a_server_that_begins_late_knows_the_form_of_its_round():
    method = CASES["floral"]["explored with more ranks"]
    task = Small().load(0)
    cohort, at = start(task, method, Schedule(rounds=2), Engine("looped"))
    wide, _ = cohort.update(at.shared, at.store, np.array([0]), 1)
    last = next(rounds(cohort, at, task, Schedule(rounds=2))).shared
    late = Uploads(cohort, at.shared, at.store.fresh(1))
    sent = packed({f"0/{name}": leaf for name, leaf in tree.tensors(wide).items()})
    found, wrong = late.opened("ward", [0], last, 2, {"uploads": sent}, {0: float(task.train.count[0])})
    assert found == {}
    assert wrong[0].reason == "malformed"


@dataclass
class TwoTongued(Site):
    """A node that uploads for a client and says that its work was not finite."""

    def answer(self, kind, facts, parts):
        told, answer = super().answer(kind, facts, parts)
        return told | ({"dropped": [4, 4, 4]} if kind == "train" else {}), answer


def test_a_client_whose_upload_counts_is_not_dropped_too(tmp_path):
    ward = TwoTongued(NodeSettings("ward", "3-4", str(tmp_path / "ward")))
    result = lead(FakeGrid([*sites(tmp_path, "0-2"), ward]), floral(), patience=QUICK)
    assert same(result.progress.shared, here(floral())[0].shared)
    assert not any("dropped" in line for line in result.history)


def test_nodes_of_one_name_are_told_from_each_other():
    roster = Roster()
    for node, client in ((7, 0), (8, 1), (7, 0)):
        facts = {"name": "ward", "clients": [client], "examples": [5]}
        assert roster.entered(node, facts, [7, 8]) == ""
    assert roster.names == {7: "ward", 8: "ward (8)"}


@pytest.mark.parametrize("name", ["0/weight", "04/weight", "x/weight"])
def test_a_node_that_uploads_for_somebody_else_is_dropped_whole(name, tmp_path, caplog):
    change = lambda own: own | {name: torch.zeros(1)}  # noqa: E731
    ward = Tampering(NodeSettings("ward", "3-4", str(tmp_path / "ward")), change=change)
    result = lead(FakeGrid([*sites(tmp_path, "0-2"), ward]), floral(), patience=QUICK)
    assert [line["lost"] for line in result.history] == [{"malformed": 2}] * 3
    told = f"ward.*{name.partition('/')[0]} is of no client that it was asked for"
    assert any("ward" in line.message and re.search(told, line.message) for line in caplog.records)


def test_a_message_that_does_not_fit_is_refused_by_the_node(tmp_path):
    grid = Recording(sites(tmp_path, "0-4"))
    lead(grid, floral(), patience=QUICK)
    question = [message for message, _ in grid.pairs if message.metadata.message_type == "train"][-1]
    facts, parts = opened(question.content, "")
    common = unpacked(parts["common"], "")
    name = next(name for name, leaf in common.items() if leaf.shape[-1] > 1)
    for value, told in ((common[name][..., :1], "has the shape"), (common[name] * torch.nan, "holds NaN")):
        wrong = parts | {"common": packed(common | {name: value})}
        answer, none = grid.sites[1].answer("train", facts | {"round": 4}, wrong)
        assert name in answer["refused"]
        assert told in answer["refused"]
        assert none == {}
    answer, _ = grid.sites[1].answer("train", facts | {"clients": [7]}, parts)
    assert "client 7, who is not here" in answer["refused"]
    answer, _ = grid.sites[1].answer("train", facts | {"run": "../../etc"}, parts)
    assert "no run's name" in answer["refused"]
    answer, _ = grid.sites[1].answer("train", facts, {"common": b"\x80\x04K\x01."})  # a pickle
    assert "no safetensors" in answer["refused"]


def test_a_node_joins_no_other_recipe_than_its_owners(tmp_path):
    import tomli_w

    table = replace(floral(), schedule=Schedule(rounds=2)).table()
    (tmp_path / "ours.toml").write_text(tomli_w.dumps(table))
    strict = Site(NodeSettings("ward", "0-4", str(tmp_path), recipe=str(tmp_path / "ours.toml")))
    with pytest.raises(DeployError, match=r"another than .*ours\.toml: it says rounds = 3, the file 2"):
        lead(FakeGrid([strict]), floral(), patience=QUICK)


def test_a_node_runs_no_method_that_its_owners_recipe_does_not_describe():
    table = load(find("digits"))
    described = read(table, "floral")
    check_allowed(NodeSettings(recipe=str(find("digits"))), described)
    assert "ditto" in METHODS
    assert "ditto" not in table["method"]
    with pytest.raises(RecipeError, match=r"the server runs ditto, and .*digits\.toml describes .*floral"):
        check_allowed(NodeSettings(recipe=str(find("digits"))), read(table, "ditto"))


# A node's own data.


def examples_of(client):
    return labelled([5, 8, 1, 9, 8])[client] * 2


def test_data_come_from_a_function_or_a_folder(tmp_path, caplog):
    for client in range(5):
        x, y = labelled([5, 8, 1, 9, 8])[client]
        save_file(
            {"x": x, "y": y, "x_test": x.clone(), "y_test": y.clone()},
            tmp_path / f"client-{client:06d}.safetensors",
        )
    at, history = here(floral())
    for source in (f"{__name__}:examples_of", str(tmp_path)):
        settings = NodeSettings("a", "0-4", str(tmp_path / "state"), data=source)
        away = lead(FakeGrid([Site(settings)]), floral(), patience=QUICK)
        assert same(away.progress.shared, at.shared)
        np.testing.assert_equal(without_times(away.history), without_times(history))
    settings = NodeSettings("a", "0-4", str(tmp_path / "state"), data=str(tmp_path / "state"))
    with pytest.raises(DeployError, match="'a': DataError; the node's log says more"):
        lead(FakeGrid([Site(settings)]), floral(), patience=QUICK)
    assert "client 0 has no data: there is no" in caplog.text


def some_tested(client):
    own = labelled([5, 8, 4, 9, 8])[client]
    return own if client else (*own, *labelled([3, 1])[0])


def test_each_client_is_tested_on_what_it_gives_or_else_on_a_quarter_of_it():
    settings = NodeSettings(clients="0-2", data=f"{__name__}:some_tested")
    task = with_data(Small().load(0), settings, 0)
    assert task.train.count.tolist() == [5, 6, 3, 0, 0]
    assert task.test.count.tolist() == [3, 2, 1, 0, 0]
    for examples, own in zip((task.train, task.test), (some_tested(0)[:2], some_tested(0)[2:]), strict=True):
        assert all(map(torch.equal, examples.of_client(0), own))


def unreadable(*_):
    return float("Jane Doe")


@pytest.mark.parametrize("secure", [Secure(), Secure("masks")], ids=["plain", "masks"])
@pytest.mark.parametrize("place", ["with_data", "trained"])
def test_what_an_error_says_of_data_stays_on_the_node(place, secure, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(f"umbel.flower.work.{place}", unreadable)
    recipe = replace(floral(), schedule=Schedule(rounds=1, secure=secure))
    grid = Recording([Site(NodeSettings("ward", "0-4", str(tmp_path), data=f"{__name__}:examples_of"))])
    with suppress(DeployError):
        lead(grid, recipe, patience=QUICK)
    told = [a.error.reason if a.has_error() else str(opened(a.content, "")[0]) for _, a in grid.pairs]
    assert any("ValueError; the node's log says more" in own for own in told)
    assert not any("Jane Doe" in own for own in told)
    assert "'Jane Doe'" in caplog.text


@pytest.mark.parametrize(
    ("table", "told"),
    [({"clients": "3-1"}, "clients"), ({"client": "1"}, "no setting 'client'"), ({"threads": "1"}, "threads")],
)
def test_a_nodes_settings_are_checked(table, told):
    with pytest.raises(RecipeError, match=told):
        _ = settings_of(table).numbers


@pytest.mark.parametrize("num_nodes", [1, 3, 7])
def test_clients_are_dealt_to_nodes(num_nodes):
    dealt = [NodeSettings(clients=own).numbers.tolist() for own in deal(7, num_nodes)]
    assert [client for own in dealt for client in own] == list(range(7))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


# A node in one process.


class Link1:
    """A SuperLink's side of one node's connection, in this process."""

    def __init__(self):
        self.questions, self.objects, self.answers, self.confirmed = [], {}, [], []

    def ask(self, message):
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects |= {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        self.questions.append((remove_content_from_message(message), get_object_tree(message)))

    def connected(self, *_):
        def receive():
            return self.questions.pop(0) if self.questions else None

        def send(message, objects, seconds):
            self.answers.append((message, objects))
            return {leaf.object_id for leaf in iterate_object_tree(objects)}, "session"

        def push(run, session, name, content):
            self.objects[name] = content

        functions = (lambda run, name: self.objects[name]), push, (lambda run, name: self.confirmed.append(name))
        return nullcontext((1, receive, send, None, None, *functions))

    def opened(self):
        _, objects = self.answers[-1]
        names = [leaf.object_id for leaf in iterate_object_tree(objects)]
        whole = inflate_object_from_contents(objects.object_id, {name: self.objects[name] for name in names})
        return opened(whole.content, "")


def served(link, settings, monkeypatch):
    """Lets a node answer all that it is asked."""
    monkeypatch.setattr("flwr.supernode.fleet_http_connection.http_request_response", link.connected)
    serve(settings, Link("here:1", None, None), lambda: not link.questions)


def test_a_node_answers_and_one_that_was_killed_answers_when_it_is_back(tmp_path, monkeypatch):
    grid = Recording(sites(tmp_path / "grid", "0-4"))
    lead(grid, floral(), patience=QUICK)
    hello, train = (
        next(m for m, _ in grid.pairs if m.metadata.message_type == t) for t in ("query.hello", "train")
    )
    expected = opened(next(a for m, a in grid.pairs if m is train).content, "")[1]
    settings, link = NodeSettings("a", "0-4", str(tmp_path / "state")), Link1()
    link.ask(hello)
    served(link, settings, monkeypatch)
    assert link.opened()[0]["clients"] == [0, 1, 2, 3, 4]
    assert len(link.confirmed) == 1

    def killed(*_):
        raise KeyboardInterrupt

    link.ask(train)
    for moment in ("_whole", "answered", "_send"):  # each time it is started again, and dies a little later
        with monkeypatch.context() as patched:
            patched.setattr(f"umbel.flower.node.{moment}", killed)
            with pytest.raises(KeyboardInterrupt):
                served(link, settings, monkeypatch)
    assert len(link.answers) == 1
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").glob("inbox*")} == {0o600}
    served(link, settings, monkeypatch)
    assert link.opened()[1] == expected
    assert not list((tmp_path / "state").glob("inbox*"))


def test_a_message_whose_parts_are_not_known_any_more_is_left_out(tmp_path, monkeypatch):
    settings, link = NodeSettings("a", "0-4", str(tmp_path / "state")), Link1()
    link.ask(Message(content_of({"run": "0" * 16}, {}), 1, "query.hello"))
    with monkeypatch.context() as patched:
        patched.setattr("umbel.flower.node._whole", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served(link, settings, monkeypatch)
    (tmp_path / "state" / "inbox.objects").unlink()
    served(link, settings, monkeypatch)
    assert link.answers == []
    assert not list((tmp_path / "state").glob("inbox*"))


class Breaking(Link1):
    """A connection that breaks at the first look for a message; Flower's keeps that to itself."""

    breaks = 1

    @contextmanager
    def connected(self, *_):
        with super().connected() as (node, receive, *more), suppress(ConnectionError):
            yield node, self.receive if self.breaks else receive, *more

    def receive(self):
        self.breaks -= 1
        raise ConnectionError


def test_a_node_makes_a_connection_that_broke_anew(tmp_path, monkeypatch):
    grid, link = Recording(sites(tmp_path / "grid", "0-4")), Breaking()
    lead(grid, floral(), patience=QUICK)
    link.ask(next(m for m, _ in grid.pairs if m.metadata.message_type == "query.hello"))
    monkeypatch.setattr("umbel.flower.node.AGAIN", 0.0)
    served(link, NodeSettings("a", "0-4", str(tmp_path / "state")), monkeypatch)
    assert link.breaks == 0
    assert len(link.answers) == 1


def test_two_processes_do_not_share_a_nodes_folder(tmp_path, monkeypatch):
    settings, link = NodeSettings("a", "0-4", str(tmp_path / "state")), Link1()

    class Second(Link1):
        def connected(self, *_):
            served(link, settings, monkeypatch)

    with pytest.raises(DeployError, match=r"node 'a': another process uses .*state; stop it first"):
        served(Second(), settings, monkeypatch)


# Encoding.


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_come_back_as_they_were(dtype):
    tensors = {
        "a/b.weight": torch.arange(6).reshape(2, 3).to(dtype),
        "none": torch.empty(2, 0, dtype=dtype),
        "number": torch.ones((), dtype=dtype),
        "rows": torch.ones(1, 3, dtype=dtype).expand(4, 3)[:, ::2],
    }
    back = unpacked(packed(tensors), "")
    assert set(back) == set(tensors)
    assert all(equal(leaf, back[name]) for name, leaf in tensors.items())
    assert packed({}) == b""


def test_zeros_of_two_signs_are_two_things():
    assert not equal(torch.zeros(1), -torch.zeros(1))


def test_large_parts_travel_as_arrays_and_nothing_is_unpickled(monkeypatch):
    monkeypatch.setattr("umbel.flower.post.SMALL", 10)
    record = content_of({"round": 1}, {"small": b"a" * 10, "large": b"b" * 11})
    assert list(record.array_records["tensors"]) == ["large"]
    assert opened(record, "") == ({"round": 1}, {"small": b"a" * 10, "large": b"b" * 11})
    record.array_records["tensors"]["large"] = Array(np.zeros(3))
    with pytest.raises(WireError, match=r"ward: large came as 'numpy.ndarray'; only safetensors is read"):
        opened(record, "ward")


@pytest.mark.parametrize(
    "asked", ["faults.drop_out=0.1", "faults.outlier=5", "attack.kind=scale", "asynchronous.buffer=3"]
)
def test_what_only_the_simulator_does_is_refused(asked):
    recipe = read(load(find("digits"), [asked]), "fedavg")
    with pytest.raises(RecipeError, match=rf"\[{asked.partition('.')[0]}\] is for the simulator"):
        refuse_simulated(recipe.schedule)
    refuse_simulated(read(load(find("digits"), ["faults.quorum=0.5"]), "fedavg").schedule)
