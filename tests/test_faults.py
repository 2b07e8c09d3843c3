"""Drop-outs, stragglers and damaged uploads: what they change and what they do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from simulate import FREE, StoppedError, stop_after
from test_battery import CASES, equal, every, labelled, net, task
from umbel import faults, tree
from umbel.cohort import Engine, Tally
from umbel.errors import RecipeError
from umbel.faults import DAMAGED, FINE, LATE, MISSING, fates, without_outliers
from umbel.hazards import EVERY_DAMAGE, Faults
from umbel.methods import METHODS, FedAvg
from umbel.methods.fedavg import Upload
from umbel.recipe import read
from umbel.report import write_report
from umbel.rounds import rounds, start
from umbel.runs import resume, run
from umbel.schedule import Schedule
from umbel.seeds import generator
from umbel.tables import losses
from umbel.train import LocalTraining

BAD = Faults(drop_out=0.3, straggle=0.2, corrupt=0.3)
ONE_EACH = {name: next(iter(cases.items())) for name, cases in CASES.items()}
every_method = every({name: dict([case]) for name, case in ONE_EACH.items()})


def progress(method, schedule, chunk=3, clients=None):
    given = task(clients or labelled(), net()[0])
    cohort, at = start(given, method, schedule, Engine(mode="stacked", chunk=chunk))
    return list(rounds(cohort, at, given, schedule, FREE))


@every_method
def test_a_run_under_faults_goes_on_and_stays_finite(method):
    schedule = Schedule(rounds=6, faults=BAD)
    last = progress(method, schedule)
    assert sum(losses(at.figures for at in last).values()) > 5
    assert all(bool(leaf.isfinite().all()) for leaf in tree.tensors(last[-1].shared).values())
    assert np.isfinite(last[-1].scores.loss).all()


@every_method
def test_faults_do_not_depend_on_chunks(method):
    schedule = Schedule(rounds=4, faults=replace(BAD, outlier=0.0, kinds=("nan", "truncated")), evaluate_every=4)
    one, other = (progress(method, schedule, chunk) for chunk in (1, 5))
    assert [at.figures.get("lost") for at in one] == [at.figures.get("lost") for at in other]
    assert one[-1].store.seen.tolist() == other[-1].store.seen.tolist()


@every_method
def test_rates_of_nothing_change_nothing_bit_for_bit(method):
    plain, idle = (
        progress(method, Schedule(rounds=2, faults=given, evaluate_every=2))
        for given in (Faults(), Faults(kinds=("nan",), outlier=3.0, quorum=0.5))
    )
    assert equal(tree.tensors(plain[-1].shared), tree.tensors(idle[-1].shared))
    everyone = np.arange(5)
    assert equal(*(tree.tensors(own[-1].store.rows(everyone)) for own in (plain, idle)))
    assert "lost" not in idle[-1].figures


def test_every_method_is_tested():
    assert set(ONE_EACH) == set(METHODS)


@every_method
def test_an_upload_that_is_lost_is_a_client_that_was_not_there(method):
    # What the server makes of a round depends on what arrives alone; what a late client keeps is what it trained.
    given, schedule, everyone = task(labelled(), net()[0]), Schedule(rounds=1, seed=1), np.arange(5)
    late = Schedule(rounds=1, seed=1, faults=Faults(straggle=0.5))
    fate = fates(late.faults, 1, 1, everyone)
    assert sorted(set(fate)) == [FINE, LATE]
    cohort, at = start(given, method, late, Engine(mode="stacked", chunk=3))
    found = next(rounds(cohort, at, given, late, FREE))
    cohort, at = start(given, method, schedule, Engine(mode="stacked", chunk=3))
    heard = cohort.uploads(at.shared, at.store, np.flatnonzero(fate == FINE), 1, Tally())
    heard = method.server_update(at.shared, heard)
    cohort, at = start(given, method, schedule, Engine(mode="stacked", chunk=3))
    list(cohort.uploads(at.shared, at.store, everyone, 1, Tally()))
    assert_close(tree.tensors(found.shared), tree.tensors(heard))
    assert_close(tree.tensors(found.store.rows(everyone)), tree.tensors(at.store.rows(everyone)))


def test_who_never_started_keeps_what_it_had():
    method = CASES["ditto"][""]
    schedule = Schedule(rounds=1, faults=Faults(drop_out=0.5))
    found = progress(method, schedule)[0]
    fate = fates(schedule.faults, 0, 1, np.arange(5))
    assert found.store.seen.tolist() == np.flatnonzero(fate == FINE).tolist()
    assert found.figures["lost"] == {"missing": int((fate == MISSING).sum())}


def test_shares_of_fates_are_those_asked_for():
    clients = np.arange(4000)
    fate = fates(Faults(0.3, 0.1, 0.05), 7, 3, clients)
    shares = [float((fate == kind).mean()) for kind in (MISSING, LATE, DAMAGED)]
    assert shares == pytest.approx([0.3, 0.07, 0.63 * 0.05], abs=0.02)
    assert (fates(Faults(0.3, 0.1, 0.05), 7, 3, clients[::-1])[::-1] == fate).all()
    assert (fates(Faults(0.3, 0.1, 0.05), 7, 4, clients) != fate).any()


def test_of_nobody_nothing_goes_wrong():
    assert len(fates(Faults(drop_out=0.5), 0, 1, np.array([], dtype=np.int64))) == 0


def test_a_round_without_a_quorum_leaves_the_server_as_it_was():
    schedule = Schedule(rounds=8, faults=Faults(drop_out=0.5, quorum=0.6))
    method, before = FedAvg(LocalTraining(batch_size=4)), None
    seen = set()
    for at in progress(method, schedule):
        arrived = 5 - at.figures.get("lost", {}).get("missing", 0)
        assert at.figures.get("no_quorum", 0) == int(arrived < 3)
        if before is not None:
            assert equal(tree.tensors(before), tree.tensors(at.shared)) == (arrived < 3)
        seen.add(arrived < 3)
        before = at.shared
    assert seen == {True, False}


@pytest.mark.parametrize(
    "method", [FedAvg(LocalTraining(batch_size=4)), CASES["floral"]["em"], CASES["trust"]["weights"]]
)
def test_rounds_that_nobody_is_heard_in_pass(method):
    for at in progress(method, Schedule(rounds=2, faults=Faults(drop_out=1.0))):
        assert at.figures["no_quorum"] == 1
        assert at.figures["lost"] == {"missing": 5}
        assert "train_loss" not in at.figures
        assert at.figures["bytes_up"] == at.figures["bytes_down"] == 0


@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "bit_flip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_damage_is_where_it_was_done(kind, dtype):
    upload = Upload({"w": torch.ones(3, 40, 50, dtype=dtype)}, {}, torch.ones(3), torch.ones(3))
    faults.damage(upload, 1, kind, generator(0, "test"))
    changed = upload.params["w"] != 1
    assert not changed[[0, 2]].any()
    assert 1 <= int(changed[1].sum()) <= 2
    whole = tree.finite_rows(upload).tolist()
    assert whole[0]
    assert whole[2]
    assert whole[1] == (kind in ("huge", "bit_flip")) or kind == "bit_flip"


def test_what_is_far_longer_than_usual_is_left_out():
    rows = torch.ones(6, 4)
    rows[2] *= 50
    chunks = [
        Upload({"w": rows[:3]}, {"s": torch.zeros(3, 1)}, torch.ones(3), torch.arange(3.0)),
        Upload({"w": rows[3:]}, {"s": torch.zeros(3, 1)}, torch.ones(3), torch.arange(3.0, 6.0)),
    ]
    kept, count = without_outliers(chunks, 10.0)
    assert count == 1
    assert torch.cat([upload.loss for upload in kept]).tolist() == [0, 1, 3, 4, 5]
    assert without_outliers(chunks, 0.0) == (chunks, 0)


def test_each_kind_of_damage_is_counted_by_what_is_noticed():
    noticed = {"nan": "not finite", "inf": "not finite", "huge": "outlier", "truncated": "malformed"}
    for kind, reason in noticed.items():
        schedule = Schedule(rounds=3, faults=Faults(corrupt=0.4, kinds=(kind,)))
        counts = losses(at.figures for at in progress(FedAvg(LocalTraining(batch_size=4)), schedule))
        assert set(counts) == {reason}


def test_a_damaged_upload_leaves_the_client_with_what_it_trained():
    schedule = Schedule(rounds=1, faults=Faults(corrupt=1.0, kinds=("nan",)))
    at = progress(CASES["ditto"][""], schedule)[0]
    assert at.store.seen.tolist() == [0, 1, 2, 3, 4]
    assert at.figures["lost"] == {"not finite": 5}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"drop_out": 1.5}, r"faults: drop_out = 1.5, but it must be in \[0, 1\]"),
        ({"straggle": -0.1}, "faults: straggle = -0.1"),
        ({"quorum": 2}, "faults: quorum = 2"),
        ({"outlier": 0.5}, "faults.outlier"),
        ({"corrupt": 0.1, "kinds": []}, "faults.kinds is empty"),
        ({"kinds": ["nan", "rust"]}, r"faults.kinds: .*\['nan', 'rust'\]"),
        ({"dropout": 0.1}, r"faults.dropout: there is no such setting; did you mean 'drop_out'"),
    ],
)
def test_bad_settings_are_named(table, said):
    with pytest.raises(RecipeError, match=said):
        read({"task": {"name": "digits"}, "faults": table}, "fedavg")


def test_faults_can_be_those_of_one_method():
    table = {
        "task": {"name": "digits"},
        "faults": {"drop_out": 0.1},
        "method": {"fedavg": {"faults": {"corrupt": 0.2}}},
    }
    recipe = read(table, "fedavg")
    assert recipe.schedule.faults == Faults(drop_out=0.1, corrupt=0.2, kinds=EVERY_DAMAGE)
    assert read(recipe.table(), "fedavg") == recipe


def test_what_was_lost_is_told_by_reason(tmp_path):
    given = task(labelled(), net()[0])
    schedule = Schedule(rounds=6, faults=Faults(0.4, 0.3, 0.5, kinds=("nan",), quorum=0.5))
    done = run(given, FedAvg(LocalTraining(batch_size=4)), schedule=schedule, folder=tmp_path / "run")
    counts = losses(done.history)
    assert set(counts) == {"missing", "late", "not finite"}
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    for reason, count in counts.items():
        assert f"{count} {reason}" in page
    idle = sum("no_quorum" in line for line in done.history)
    assert f"{idle} rounds had too few updates" in page


def test_a_run_under_faults_is_resumed_to_the_same_bits(tmp_path):
    given, method = task(labelled(), net()[0]), FedAvg(LocalTraining(batch_size=4))
    schedule, engine = Schedule(rounds=6, checkpoint_every=2, faults=BAD), Engine(mode="stacked", chunk=5)
    whole = run(given, method, schedule=schedule, engine=engine, folder=tmp_path / "whole")

    with pytest.raises(StoppedError):
        run(given, method, schedule=schedule, engine=engine, folder=tmp_path / "stopped", on_round=stop_after(5))
    again = resume(tmp_path / "stopped", given, method)
    assert equal(tree.tensors(whole.progress.shared), tree.tensors(again.progress.shared))
    assert losses(whole.history) == losses(again.history)
