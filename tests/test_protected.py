"""Masks and noise over Flower's messages: the sums are right, and the server is sent nothing else."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from uuid import uuid4

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.app import Context, RecordDict

from simulate import FREE
from test_battery import CASES, every
from test_flower import (
    COSTS,
    QUICK,
    TIMES,
    FakeGrid,
    Forgetful,
    Recording,
    Small,
    here,
    same,
    sites,
    small_task,  # noqa: F401  which every test uses
)
from test_flower_faults import Killed, Mortal
from umbel import tree
from umbel.cohort import Engine, Tally
from umbel.errors import DeployError, RecipeError, RunFolderError, WireError
from umbel.flower import apps
from umbel.flower.lead import lead
from umbel.flower.post import opened
from umbel.flower.vault import Page
from umbel.flower.wire import packed, unpacked
from umbel.flower.work import NodeSettings, Site, received, trained
from umbel.privacy.settings import Privacy
from umbel.recipe import Recipe
from umbel.report import write_report
from umbel.rounds import start
from umbel.schedule import Schedule
from umbel.secure import server
from umbel.secure.messages import Advertised, Delivery, Masked, Sealed
from umbel.secure.messages import packed as told
from umbel.secure.messages import unpacked as heard
from umbel.secure.settings import Secure
from umbel.weighting import Weighting

MASKS, ONE = Secure("masks"), Weighting("one")
NOISE = Privacy("client", noise_multiplier=1.0, delta=1e-3)
UNTOLD = {"flops", "steps"}  # of clients whose numbers of examples nobody knows
SINGLE = {"worst_decile", "perplexity", "by_group", "entropy_nats", "usage", "dead", "nmi", "ari"}
SINGLE |= {"cluster_accuracy", "mismatch"}  # what needs each client's own figures
STEPS = ("query.advertise", "query.share", "train", "query.show")


def recipe_of(method="floral", rounds=2, **schedule):
    own = method if not isinstance(method, str) else next(iter(CASES[method].values()))
    return Recipe("tested", Small(), own, Schedule(rounds=rounds, **schedule))


def floral(**schedule):
    return recipe_of(CASES["floral"]["gradient"], **schedule)


def led(recipe, tmp_path, *clients):
    grid = Recording(sites(tmp_path, *(clients or ("0", "1-2", "3,4"))))
    return lead(grid, recipe, patience=QUICK), grid


def parts_of(grid, kind):
    """(client, part) of all answers to a kind of question."""
    answers = [opened(a.content, "")[1] for q, a in grid.pairs if q.metadata.message_type == kind]
    return [(int(name.partition("/")[2]), part) for parts in answers for name, part in parts.items()]


SUMMED = {
    name: dict(list(own.items())[:1])
    for name, own in CASES.items()
    if hasattr(next(iter(own.values())), "summed_update")
}


@every(SUMMED)
def test_masked_rounds_are_those_of_the_simulator_bit_for_bit(method, tmp_path):
    recipe = recipe_of(method, rounds=1, secure=MASKS)
    away, _ = led(recipe, tmp_path)
    at, history = here(recipe, FREE)
    assert same(away.progress.shared, at.shared)
    for one, other in zip(away.history, history, strict=True):
        assert one.keys() == (other.keys() | TIMES | {"tested"}) - UNTOLD - SINGLE
        for name in one.keys() - TIMES - COSTS - {"tested"}:
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
        assert one["tested"] == 5
        assert one["bytes_up"] == other["bytes_up"]


def test_weights_are_the_rules(tmp_path):
    for rule in ("uniform", "one", "rea"):
        recipe = floral(secure=MASKS, weighting=Weighting(rule))
        away, _ = led(recipe, tmp_path / rule)
        assert same(away.progress.shared, here(recipe)[0].shared)


@pytest.mark.parametrize("secure", [MASKS, Secure("masks", bits=32, range=64.0), Secure("masks", neighbours=2)])
def test_masked_rounds_are_plain_ones_to_the_quantisation_step(secure, tmp_path):
    plain, _ = led(floral(), tmp_path / "plain")
    masked, _ = led(floral(secure=secure), tmp_path / "masked")
    step = 64.0 / (2**31 / 5) if secure.bits == 32 else 1e-7
    for one, other in zip(
        tree.tensors(plain.progress.shared).values(), tree.tensors(masked.progress.shared).values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=10 * step, rtol=1e-5)
    assert masked.figures["secure_cut"] == 0


def test_what_the_server_is_sent_under_masks_is_the_four_steps_and_nothing_else(tmp_path):
    _, grid = led(floral(rounds=4, secure=MASKS), tmp_path)
    kinds = [message.metadata.message_type for message, _ in grid.pairs]
    assert set(kinds) == {*STEPS, "evaluate", "query.hello"}
    values = {"train": [], "evaluate": []}
    for message, answer in grid.pairs:
        kind = message.metadata.message_type
        facts, parts = opened(answer.content, "")
        if kind == "query.hello":
            assert facts.keys() == {"name", "clients", "fingerprint"}
            assert parts == {}
            continue
        assert facts.keys() <= {"failed", "dropped", "seconds"}
        assert facts["failed"] == {}
        assert all(re.fullmatch(rf"{kind.removeprefix('query.')}/[0-4]", name) for name in parts)
        if kind in values:
            values[kind] += [heard(Masked, part).values for part in parts.values()]
    lengths = {kind: set(map(len, own)) for kind, own in values.items()}
    assert all(len(own) == 1 for own in lengths.values())
    assert len(values["train"]) == len(values["evaluate"]) == 4 * 5
    everything = np.frombuffer(b"".join(values["train"] + values["evaluate"]), dtype="<u8")
    for shift in range(0, 64, 8):  # each byte by itself: small numbers would show in the high ones
        counts = np.bincount(((everything >> shift) & 255).astype(np.int64), minlength=256)
        assert chisquare(counts).pvalue > 1e-6


def test_no_router_is_in_the_servers_transcript(tmp_path):
    _, grid = led(floral(rounds=2, secure=MASKS), tmp_path)
    received = b"".join(
        part for _, answer in grid.pairs for _, part in sorted(opened(answer.content, "")[1].items())
    )
    for site in grid.sites.values():
        (work,) = site.works.values()
        for client in site.settings.numbers.tolist():
            logits = work.kept.latest(client).logits
            assert logits.abs().max() > 0  # it is something to be hidden
            for form in (logits, logits.softmax(-1), logits.double(), logits.softmax(-1).double()):
                assert form.numpy().tobytes() not in received
    # The server's sums are sums: with two clients' routers exchanged they would be the same (test_secure.py).


@dataclass
class Deaf(Site):
    """A node whose clients fail at one step."""

    at: str = ""

    def answer(self, kind, facts, parts):
        if kind == self.at:
            return {"failed": {str(client): "it has other things to do" for client in facts["clients"]}}, {}
        return super().answer(kind, facts, parts)


@pytest.mark.parametrize(("at", "lost"), [("advertise", 1), ("share", 1), ("train", 1), ("show", 0)])
def test_a_node_that_drops_out_costs_its_own_part_and_no_more(at, lost, tmp_path, caplog):
    stays = sites(tmp_path, "0", "1-2", "3")
    grid = FakeGrid([*stays, Deaf(NodeSettings("ward", "4", str(tmp_path / "ward")), at=at)])
    found = lead(grid, floral(rounds=1, secure=MASKS), patience=QUICK)
    assert found.figures.get("dropped", []) == [4] * lost
    others = replace(floral(rounds=1, secure=MASKS))
    if lost:
        # The same, if it had never been asked: one round without client 4.
        without = FakeGrid([*sites(tmp_path / "b", "0", "1-2", "3"), Deaf(NodeSettings("w", "4"), at="advertise")])
        without.sites[4].settings = NodeSettings("ward", "4", str(tmp_path / "c"))
        expected = lead(without, others, patience=QUICK).progress.shared
    else:
        expected = here(others)[0].shared
    for name, leaf in tree.tensors(expected).items():
        torch.testing.assert_close(tree.tensors(found.progress.shared)[name], leaf, atol=1e-7, rtol=1e-5)


def test_a_round_with_too_few_is_lost_and_the_run_goes_on(tmp_path, caplog):
    grid = FakeGrid([*sites(tmp_path, "0-1"), Deaf(NodeSettings("ward", "2-4", str(tmp_path / "w")), at="train")])
    found = lead(grid, floral(rounds=2, secure=MASKS), patience=QUICK)
    assert [line["no_quorum"] for line in found.history] == [1, 1]
    assert found.history[0]["dropped"] == [0, 1, 2, 3, 4]
    assert "train_loss" not in found.figures
    task = Small().load(0)
    _, before = start(task, floral().method, floral().schedule, floral().engine)
    assert same(found.progress.shared, before.shared)
    assert any("round 1 is lost" in line.message for line in caplog.records)


class MortalGrid(FakeGrid):
    """A node that dies is offline from then on, and never answers."""

    def __init__(self, sites, at):
        super().__init__(sites)
        self.at, self.dead = at, set()

    def get_node_ids(self):
        return [node for node in self.sites if node not in self.dead]

    def push_messages(self, messages):
        names = []
        for message in list(messages):
            node = message.metadata.dst_node_id
            if (node, message.metadata.message_type) == self.at:
                self.dead.add(node)
            names += ["" if node in self.dead else super().push_messages([message])[0]]
        return names


@pytest.mark.parametrize(
    ("at", "dropped"), [("train", [3, 4]), pytest.param("query.show", [], marks=pytest.mark.slow)]
)
def test_a_third_of_the_clients_may_die_after_they_have_shared(at, dropped, tmp_path):
    grid = MortalGrid(sites(tmp_path, "0", "1-2", "3-4"), (3, at))
    found = lead(grid, floral(rounds=2, secure=MASKS), patience=QUICK)
    assert found.history[0].get("dropped", []) == dropped
    assert found.history[1]["dropped"] == [3, 4]
    lost = [[3, 4] if dropped else [], [3, 4]]
    expected = rounds_without(floral(rounds=2), lost)
    for name, leaf in tree.tensors(expected).items():
        torch.testing.assert_close(tree.tensors(found.progress.shared)[name], leaf, atol=1e-6, rtol=1e-5)


def rounds_without(recipe, lost):
    """The server's state after plain rounds that some clients are missing from."""
    cohort, at = start(Small().load(0), recipe.method, recipe.schedule, Engine("looped"))
    shared = at.shared
    for round, missing in enumerate(lost, 1):
        clients = np.setdiff1d(np.arange(5), missing)
        shared = recipe.method.server_update(shared, cohort.uploads(shared, at.store, clients, round, Tally()))
    return shared


@pytest.mark.parametrize("more", [{}, {"privacy": Privacy("example", delta=1e-3, noise_multiplier=1.0)}])
def test_no_server_has_one_client_count_alone_under_masks(more, tmp_path):
    _, grid = led(floral(rounds=1, secure=MASKS, **more), tmp_path, "0-4")
    (work,) = grid.sites[1].works.values()
    question = next(m for m in grid.asked if m.metadata.message_type == "train")
    facts, parts = opened(question.content, "")
    ((client, message), *_) = received(work, facts, parts)
    assert trained(work, work.cohort, facts, client, message) is not None
    alone = facts | {"weights": {str(k): float(k == client) for k in range(5)}}
    with pytest.raises(WireError, match="would have client 0 count 1, where it counts 5"):
        trained(work, work.cohort, alone, client, message)


def test_a_run_that_was_let_in_with_masks_is_not_gone_on_with_without(tmp_path):
    _, masked = led(floral(rounds=1, secure=MASKS), tmp_path / "masked", "0-4")
    _, plain = led(floral(rounds=1), tmp_path / "plain", "0-4")
    site, (run,) = masked.sites[1], masked.sites[1].works
    for grid, why in ((plain, f"run {run} was let in with another recipe"), (masked, "")):
        hello = next(m for m in grid.asked if m.metadata.message_type == "query.hello")
        answer, _ = site.answer("hello", opened(hello.content, "")[0] | {"run": run}, {})
        assert why in answer.get("refused", "")
        assert ("refused" in answer) == bool(why)
    question = next(m for m in plain.asked if m.metadata.message_type == "train")
    facts, parts = opened(question.content, "")
    assert site.answer("train", facts | {"run": run}, parts)[1] == {}


class Stock(FakeGrid):
    """Nodes under Flower's own SuperNodes: a new process for each message, which the ClientApp answers."""

    def push_messages(self, messages):
        names = []
        for message in reversed(list(messages)):
            message.metadata.__dict__["_message_id"] = uuid4().hex
            names.append(message.metadata.message_id)
            config = asdict(self.sites[message.metadata.dst_node_id])
            apps._site.cache_clear()
            self.answers[names[-1]] = apps.client_app()(message, Context(1, 1, config, RecordDict(), {}))
        return names[::-1]


def test_masks_go_under_flowers_own_supernodes(tmp_path):
    nodes = [NodeSettings(own, own, str(tmp_path / own)) for own in ("0-2", "3-4")]
    recipe = floral(secure=MASKS)
    assert same(lead(Stock(nodes), recipe, patience=QUICK).progress.shared, here(recipe)[0].shared)


# What a client remembers.


def secrets_of(folder):
    return sorted(folder.rglob("secret-*.msgpack*"))


def test_secrets_are_for_the_nodes_owner_and_gone_after_the_round(tmp_path):
    modes = []

    @dataclass
    class Watched(Site):
        def answer(self, kind, facts, parts):
            found = super().answer(kind, facts, parts)
            modes.extend(path.stat().st_mode & 0o777 for path in secrets_of(tmp_path))
            return found

    grid = FakeGrid([Watched(NodeSettings("a", "0-4", str(tmp_path)))])
    lead(grid, floral(secure=MASKS), patience=QUICK)
    assert set(modes) == {0o600}
    paths = secrets_of(tmp_path)
    assert len(paths) == 5
    for path in paths:
        page = heard(Page, path.read_bytes())
        assert page == Page({"train": 2, "evaluate": 2}, None)
    lines = [json.loads(line) for line in next(tmp_path.rglob("scores.jsonl")).read_text().splitlines()]
    assert sorted((line["round"], line["client"]) for line in lines) == [(r, k) for r in (1, 2) for k in range(5)]


def test_nodes_that_are_started_anew_for_every_message_go_on_from_their_disks(tmp_path):
    recipe = floral(secure=MASKS)
    grid = FakeGrid([Forgetful(NodeSettings(own, own, str(tmp_path / own))) for own in ("0-2", "3-4")])
    assert same(lead(grid, recipe, patience=QUICK).progress.shared, here(recipe)[0].shared)


def test_a_question_that_is_asked_twice_has_one_answer_and_another_one_has_none(tmp_path):
    _, grid = led(floral(rounds=1, secure=MASKS), tmp_path, "0-4")
    site = grid.sites[1]
    asked = {}

    def ask(kind, facts, parts=None):
        answer, own = site.answer(kind, facts | {"run": next(iter(site.works))}, parts or {})
        return answer.get("failed", answer), own

    for message, _ in grid.pairs:
        facts, parts = opened(message.content, "")
        asked.setdefault(message.metadata.message_type.removeprefix("query."), (facts, parts))
    (work,) = site.works.values()
    for path in secrets_of(tmp_path):  # as if the round were still to come
        path.write_bytes(told(Page()))
    for kind in ("share", "train", "show"):
        failed, own = ask(kind, *asked[kind])
        assert own == {}
        assert "does not follow from what it was asked" in failed["0"]
    about = {"clients": [0, 1, 2, 3, 4], "about": "train", "round": 1}
    _, keys = ask("advertise", about)
    assert ask("advertise", about)[1] == keys
    advertised = [heard(Advertised, keys[f"advertise/{k}"]) for k in range(5)]
    rosters = server.rosters(MASKS, b"s" * 16, advertised)
    letters = {f"share/{k}": told(roster) for k, roster in rosters.items()}
    _, boxes = ask("share", about, letters)
    assert ask("share", about, letters)[1] == boxes
    others = server.rosters(MASKS, b"t" * 16, advertised)
    failed, own = ask("share", about, {f"share/{k}": told(roster) for k, roster in others.items()})
    assert own == {}
    assert "has answered another 'share' of round 1; it answers once" in failed["0"]
    sealed = [heard(Sealed, boxes[f"share/{k}"]) for k in range(5)]
    delivered = server.deliveries(rosters, sealed)
    facts, parts = asked["train"]
    parts = parts | {f"train/{k}": told(own) for k, own in delivered.items()}
    _, masked = ask("train", facts, parts)
    assert ask("train", facts, parts)[1] == masked
    fewer = parts | {"train/0": told(Delivery({k: delivered[0].boxes[k] for k in (1, 2)}))}
    assert "has answered another 'mask'" in ask("train", facts, fewer)[0]["0"]
    # Before the sum is opened, too, a client does not begin the round again among others.
    failed, own = ask("advertise", about)
    assert own == {}
    assert "client 0 has given its part of round 1 (train)" in failed["0"]
    questions = {f"show/{k}": told(question) for k, question in server.questions(delivered, range(5)).items()}
    assert len(ask("show", about, questions)[1]) == 5
    assert "does not follow" in ask("show", about, questions)[0]["0"]
    assert "round 2 is none of this run's" in ask("advertise", about | {"round": 2})[0]["0"]
    assert "the recipe has none of this kind" in ask("advertise", about | {"about": "else"})[0]["refused"]
    assert "client 7, who is not here" in ask("advertise", about | {"clients": [7]})[0]["refused"]
    assert work.protection.masked


def test_no_question_makes_a_node_send_an_upload_or_scores_of_a_masked_run(tmp_path):
    _, plain = led(floral(rounds=1), tmp_path / "plain", "0-4")
    _, grid = led(floral(rounds=2, secure=MASKS), tmp_path / "masked", "0-4")
    (run,) = grid.sites[1].works
    for message, _ in plain.pairs[1:]:
        facts, parts = opened(message.content, "")
        kind = message.metadata.message_type
        answer, own = grid.sites[1].answer(kind, facts | {"run": run, "round": 1, "num_clients": 5}, parts)
        assert own == {}
        assert len(answer["failed"]) == 5
    (run,) = plain.sites[1].works
    answer, own = plain.sites[1].answer(
        "advertise", {"run": run, "clients": [0], "about": "train", "round": 1}, {}
    )
    assert "the recipe has none" in answer["refused"]
    assert own == {}


# Noise.


def test_with_hardly_any_noise_and_wide_clips_rounds_are_plain_ones(tmp_path):
    wide = Privacy("client", noise_multiplier=1e-9, clip=1e3, clip_rate=0.0, delta=1e-3)
    plain, _ = led(floral(weighting=ONE), tmp_path / "plain")
    for secure in (Secure(), MASKS):
        noised, _ = led(floral(weighting=ONE, privacy=wide, secure=secure), tmp_path / secure.aggregation)
        for one, other in zip(
            tree.tensors(plain.progress.shared).values(),
            tree.tensors(noised.progress.shared).values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("secure", [Secure(), MASKS], ids=["plain", "masks"])
def test_of_protected_clients_the_server_is_sent_cut_parts_and_no_figures(secure, tmp_path):
    privacy = replace(NOISE, clip=0.01)
    found, grid = led(floral(weighting=ONE, privacy=privacy, secure=secure), tmp_path)
    for message, answer in grid.pairs:
        facts, parts = opened(answer.content, "")
        if message.metadata.message_type == "query.hello":
            assert facts.keys() == {"name", "clients", "fingerprint"}
        else:
            assert facts.keys() <= {"failed", "dropped", "seconds"}
        if message.metadata.message_type == "evaluate":
            assert parts == {}
    trained = [pair for pair in grid.pairs if pair[0].metadata.message_type == "train"]
    assert sum(len(opened(answer.content, "")[1]) for _, answer in trained) == 2 * 5
    for question, answer in trained:
        clips = opened(question.content, "")[0]["clips"]
        assert clips.keys() == {"base", "adapters", "route_examples"}
        for part in opened(answer.content, "")[1].values():
            if secure.aggregation == "masks":
                assert len(heard(Masked, part).values) % 8 == 0
                continue
            groups = {}
            for name, leaf in unpacked(part, "").items():
                groups.setdefault(name.partition("/")[0], []).append(leaf.double().flatten())
            assert groups.keys() == {*clips, "within"}
            for name, clip in clips.items():
                assert torch.cat(groups[name]).norm() <= clip * (1 + 1e-6)
            if clips["base"] == 0.01:  # in the first round, when all that is sent is longer
                assert torch.cat(groups["base"]).norm() == pytest.approx(0.01, rel=1e-5)
    assert not {"train_loss", "loss", "accuracy", "usage"} & found.figures.keys()
    assert found.figures["epsilon"] > 0
    assert "clip_base" in found.figures


def test_a_part_that_is_longer_than_its_clip_is_left_out(tmp_path, caplog):
    @dataclass
    class Greedy(Site):
        def answer(self, kind, facts, parts):
            answer, own = super().answer(kind, facts, parts)
            if kind == "train":
                own = {
                    name: packed({n: 100 * leaf for n, leaf in unpacked(part, "").items()})
                    for name, part in own.items()
                }
            return answer, own

    grid = FakeGrid([*sites(tmp_path, "0-3"), Greedy(NodeSettings("ward", "4", str(tmp_path / "ward")))])
    found = lead(grid, floral(weighting=ONE, privacy=NOISE), patience=QUICK)
    assert found.figures["dropped"] == [4]
    assert any("longer than its clip" in line.message for line in caplog.records)


def test_one_who_counts_a_thousandfold_for_the_clips_is_left_out(tmp_path, caplog):
    @dataclass
    class Loud(Site):
        def answer(self, kind, facts, parts):
            answer, own = super().answer(kind, facts, parts)
            if kind == "train":
                tensors = unpacked(own["train/4"], "")
                own["train/4"] = packed(tensors | {"within": -1000 * tensors["within"].abs()})
            return answer, own

    grid = FakeGrid([*sites(tmp_path, "0-3"), Loud(NodeSettings("ward", "4", str(tmp_path / "ward")))])
    found = lead(grid, floral(weighting=ONE, privacy=NOISE), patience=QUICK)
    assert [line["dropped"] for line in found.history] == [[4], [4]]
    assert any("neither that it was within its clip" in line.message for line in caplog.records)


def test_noise_and_who_takes_part_are_the_operating_systems(tmp_path):
    recipe = floral(weighting=ONE, privacy=NOISE)
    one, other = (led(recipe, tmp_path / name)[0].progress.shared for name in "ab")
    assert not torch.equal(first(one), first(other))
    many = replace(recipe, schedule=replace(recipe.schedule, rounds=5, clients_per_round=2))
    drawn = [led(many, tmp_path / name)[1].asked for name in "cd"]
    clients = [
        [opened(m.content, "")[0]["clients"] for m in asked if m.metadata.message_type == "train"]
        for asked in drawn
    ]
    assert clients[0] != clients[1]


def first(state):
    return next(iter(tree.tensors(state).values()))


def test_a_noisy_state_is_told_once_it_cannot_be_drawn_anew(tmp_path):
    recipe, nodes, out = floral(weighting=ONE, privacy=NOISE, rounds=3), sites(tmp_path, "0-4"), tmp_path / "out"
    dying, back = Mortal(nodes, "evaluate", 2), FakeGrid(nodes)
    with pytest.raises(Killed):
        lead(dying, recipe, out, QUICK)
    assert lead(back, recipe, out, QUICK).figures["round"] == 3
    (before, after) = (opened(message.content, "") for message in (dying.asked[-1], back.asked[1]))
    assert (before[0]["round"], after[0]["round"]) == (2, 3)
    assert before[1]["common"] == after[1]["common"]


def test_no_round_is_drawn_anew_after_a_damaged_checkpoint(tmp_path):
    recipe, nodes, out = floral(weighting=ONE, privacy=NOISE, rounds=3), sites(tmp_path, "0-4"), tmp_path / "out"
    with pytest.raises(Killed):
        lead(Mortal(nodes, "train", 3), recipe, out, QUICK)
    (out / "checkpoints" / "000002.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"000002.safetensors is damaged.* would be to tell of a round twice"):
        lead(FakeGrid(nodes), recipe, out, QUICK)


def test_a_deployed_run_stops_at_its_budget_and_nodes_do_not_go_on(tmp_path):
    privacy = replace(NOISE, epsilon=6.0)
    found, grid = led(floral(rounds=50, weighting=ONE, privacy=privacy), tmp_path / "state", "0-4")
    last = found.figures["round"]
    assert last < 50
    assert found.figures["epsilon"] <= 6.0
    site, (run,) = grid.sites[1], grid.sites[1].works
    facts = {"run": run, "clients": [0], "round": last + 1, "unchanged": []}
    answer, own = site.answer("train", facts, {})
    assert f"ends with round {last}" in str(answer)
    assert own == {}


# Examples.


def private_examples(**more):
    return floral(privacy=Privacy("example", delta=1e-3, **more))


def test_of_protected_examples_uploads_are_noisy_and_no_figure_is_sent(tmp_path):
    recipe = private_examples(noise_multiplier=1.0)
    one, grid = led(recipe, tmp_path / "a")
    other, _ = led(recipe, tmp_path / "b")
    assert not torch.equal(first(one.progress.shared), first(other.progress.shared))
    for _, part in parts_of(grid, "train"):
        tensors = unpacked(part, "")
        assert tensors["loss"].tolist() == [0.0]
        assert "base/0.weight" in tensors
    for message, answer in grid.pairs:
        if message.metadata.message_type == "evaluate":
            assert opened(answer.content, "")[1] == {}
    assert not {"train_loss", "loss", "accuracy"} & one.figures.keys()
    masked, _ = led(replace(recipe, schedule=replace(recipe.schedule, secure=MASKS)), tmp_path / "c")
    assert "train_loss" not in masked.figures
    assert masked.figures["epsilon"] == one.figures["epsilon"]


def test_noise_on_examples_is_what_the_client_with_the_fewest_needs_and_no_less(tmp_path):
    recipe = private_examples(epsilon=30.0)
    grid = Recording(
        Site(NodeSettings(own, own, str(tmp_path / own), data="test_flower:examples_of")) for own in ("0-2", "3-4")
    )
    found = lead(grid, recipe, patience=QUICK)
    sent = [opened(m.content, "")[0] for m in grid.asked if m.metadata.message_type == "train"]
    (told_noise,) = {facts["noise_multiplier"] for facts in sent}
    assert found.figures["epsilon"] == pytest.approx(30.0, rel=0.01)
    needed = [
        next(iter(site.works.values())).cohort.ledger.privacy.noise_multiplier for site in grid.sites.values()
    ]
    assert told_noise == pytest.approx(max(needed))
    assert min(needed) < max(needed)
    message = next(m for m in grid.asked if m.metadata.message_type == "train" and m.metadata.dst_node_id == 2)
    assert needed[1] < needed[0]  # client 2 has one example only
    facts, parts = opened(message.content, "")
    answer, own = grid.sites[2].answer("train", facts | {"noise_multiplier": needed[1] / 2}, parts)
    assert "this node's clients need" in answer["refused"]
    assert own == {}


@dataclass
class Boasting(Site):
    """A node whose client has as many examples as it likes."""

    count: int = 0

    def answer(self, kind, facts, parts):
        told, answer = super().answer(kind, facts, parts)
        return told | ({"examples": [self.count]} if kind == "hello" else {}), answer


@pytest.mark.parametrize(
    ("count", "privacy", "words"),
    [
        (1 << 40, {"noise_multiplier": 1.0}, "and client 4 on node 'ward' has 1099511627776 examples, the most"),
        (1, {"epsilon": 30.0}, ""),
    ],
)
def test_who_says_how_many_examples_decides_the_noise_is_named(count, privacy, words, tmp_path, caplog):
    caplog.set_level("INFO", "umbel")
    ward = Boasting(NodeSettings("ward", "4", str(tmp_path / "ward")), count=count)
    grid = FakeGrid([*sites(tmp_path, "0-1", "2-3"), ward])
    with pytest.raises(DeployError, match=words) if words else nullcontext():
        lead(grid, private_examples(**privacy), patience=QUICK)
    assert "client 2 on node 'site 2-3' has 1 examples, the fewest of all" in caplog.text


def test_noisy_steps_of_a_round_are_sent_once(tmp_path):
    _, grid = led(private_examples(noise_multiplier=1.0), tmp_path, "0-4")
    pairs = [pair for pair in grid.pairs if pair[0].metadata.message_type == "train"]
    facts, parts = opened(pairs[-1][0].content, "")
    again = grid.sites[1].answer("train", facts, parts)[1]
    assert again == opened(pairs[-1][1].content, "")[1]
    facts, parts = opened(pairs[0][0].content, "")
    failed = grid.sites[1].answer("train", facts, parts)[0]["failed"]
    assert "client 0 has given its part of round 2 (train) and gives none of round 1" in failed["0"]


def test_no_newcomer_finds_its_routes_without_noise(tmp_path):
    _, grid = led(private_examples(noise_multiplier=1.0), tmp_path / "led", "0-4")
    hello, train = (next(m for m in grid.asked if m.metadata.message_type == t) for t in ("query.hello", "train"))
    (new,) = sites(tmp_path / "new", "0-4")
    new.answer("hello", *opened(hello.content, ""))
    facts, parts = opened(train.content, "")
    answer, own = new.answer("train", facts | {"newcomers": [0]}, parts)
    assert own == {}
    assert "speaks of newcomers" in answer["failed"]["0"]


# What is refused, and reported.


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (recipe_of("fedavg", secure=MASKS, weighting=Weighting("feddisco")), "would have to know each client's"),
        (private_examples(noise_multiplier=1.0, epsilon=2.0), "across machines give one of them"),
        (recipe_of("trust", secure=MASKS), "does not go with Trust: whom a client trusts"),
    ],
)
def test_what_would_tell_too_much_is_refused_before_any_work(recipe, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        lead(FakeGrid(sites(tmp_path, "0-4")), recipe, patience=QUICK)


def test_a_run_that_counts_examples_privacy_begins_with_all_clients(tmp_path):
    recipe = private_examples(noise_multiplier=1.0)
    for share in (0.5, 1.5):
        with pytest.raises(
            RecipeError, match=r"begin = .*: it is a share of the clients, from 0 to 1, and 1 with"
        ):
            lead(FakeGrid(sites(tmp_path, "0-4")), recipe, patience=QUICK, share=share)
    nodes, out = sites(tmp_path, "0-2", "3-4"), tmp_path / "out"
    grid = FakeGrid(nodes)

    def leave(progress):
        grid.sites = {}

    with pytest.raises(DeployError, match="0 clients are there"):
        lead(grid, recipe, out, QUICK, leave)
    with pytest.raises(DeployError, match="no node with clients 3, 4"):  # nor does it go on without
        lead(FakeGrid(nodes[:1]), recipe, out, QUICK)
    assert lead(FakeGrid(nodes), recipe, out, QUICK).figures["round"] == 2


def test_clips_that_make_no_sense_are_refused_by_the_node(tmp_path):
    _, grid = led(floral(weighting=ONE, privacy=NOISE), tmp_path, "0-4")
    message = next(m for m in grid.asked if m.metadata.message_type == "train")
    facts, parts = opened(message.content, "")
    for wrong in ({}, {"base": 1.0}, facts["clips"] | {"base": float("inf")}, facts["clips"] | {"base": -1.0}):
        failed = grid.sites[1].answer("train", facts | {"clips": wrong, "round": 2}, parts)[0]["failed"]
        assert "the server's clips are" in failed["0"]


def test_a_protected_run_leaves_a_report_without_figures_that_nobody_was_told(tmp_path):
    for name, more in (("masks", {"secure": MASKS}), ("noise", {"weighting": ONE, "privacy": NOISE})):
        lead(FakeGrid(sites(tmp_path / name, "0-4")), floral(**more), tmp_path / "runs" / name, QUICK)
    write_report([tmp_path / "runs" / "masks"], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000
    with pytest.raises(RunFolderError, match="scores stay with the nodes"):
        write_report([tmp_path / "runs" / "noise"], tmp_path / "noise.html")
