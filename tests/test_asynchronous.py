"""Rounds without a deadline: the clock, staleness, and what they come to when nobody is slow."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from simulate import FREE, StoppedError, stop_after
from test_battery import CASES, equal, every, labelled, net, task
from umbel import tree
from umbel.clients import Examples
from umbel.clock import steps
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.hazards import Asynchronous, Faults
from umbel.methods import FedAvg
from umbel.methods.protocol import why_not
from umbel.recipe import read
from umbel.rounds import rounds, start
from umbel.runs import resume, run
from umbel.schedule import Schedule
from umbel.tasks import Task
from umbel.train import LocalTraining
from umbel.weighting import Weighting

SUMS = {n: dict([case]) for n, own in CASES.items() if not why_not((case := next(iter(own.items())))[1], "mean")}
REFUSING = {name: {label: m for label, m in own.items() if why_not(m, "mean")} for name, own in CASES.items()}


def progress(method, schedule, chunk=3):
    given = task(labelled(), net()[0])
    cohort, at = start(given, method, schedule, Engine(mode="stacked", chunk=chunk))
    return list(rounds(cohort, at, given, schedule, FREE))


def first_steps(settings, members=12, at_once=6, count=20, seed=0):
    return list(islice(steps(settings, seed, np.arange(members), at_once), count))


def test_the_clock_repeats_and_goes_forward():
    one, other = (first_steps(Asynchronous(3)) for _ in range(2))
    for here, there in zip(one, other, strict=True):
        assert here.time == there.time
        assert (here.clients == there.clients).all()
    times = [step.time for step in one]
    assert times == sorted(times)
    assert times != [step.time for step in first_steps(Asynchronous(3), seed=1)]


def test_a_step_has_a_buffer_of_different_clients_that_began_before_it():
    for number, step in enumerate(first_steps(Asynchronous(4))):
        assert len(set(step.clients)) == 4
        assert sorted(step.clients) == list(step.clients)
        assert bool((step.versions <= number).all())
    stale = [number - step.versions for number, step in enumerate(first_steps(Asynchronous(4)))]
    assert np.concatenate(stale).max() > 0


def test_no_state_is_needed_that_is_older_than_said():
    oldest = 0
    for step in first_steps(Asynchronous(2)):
        assert bool((step.versions >= oldest).all())
        assert step.oldest >= oldest
        oldest = step.oldest


def test_slow_clients_come_more_rarely():
    counts = np.zeros(12)
    for step in first_steps(Asynchronous(3, spread=2.0), at_once=12, count=200):
        counts[step.clients] += 1
    assert counts.max() > 5 * counts.min()


@every(SUMS)
def test_a_buffer_for_everyone_is_a_round_bit_for_bit(method):
    plain = progress(method, Schedule(rounds=2))[-1]
    waited = progress(method, Schedule(rounds=2, asynchronous=Asynchronous(5)))[-1]
    assert equal(tree.tensors(plain.shared), tree.tensors(waited.shared))
    assert waited.figures["staleness"] == 0


@every(SUMS)
def test_asynchronous_runs_stay_finite_and_do_not_depend_on_chunks(method):
    schedule = Schedule(rounds=5, evaluate_every=5, asynchronous=Asynchronous(2))
    one, other = (progress(method, schedule, chunk) for chunk in (1, 4))
    assert all(bool(leaf.isfinite().all()) for leaf in tree.tensors(one[-1].shared).values())
    assert [at.figures["clock"] for at in one] == [at.figures["clock"] for at in other]
    assert sum(at.figures["staleness"] for at in one) > 0


def test_stale_steps_by_hand():
    # One weight, f_k = ½ (w − target_k)², rate ½: a client's step is half of what it lacks.
    targets = [1.0, 3.0, -2.0, 5.0]
    clients = [(torch.ones(1, 1).double(), torch.tensor([[target]]).double()) for target in targets]
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    given = Task("test", module, "mse", Examples.of(clients), Examples.of(clients))
    schedule = Schedule(rounds=6, asynchronous=Asynchronous(2, power=1.0))
    method = FedAvg(LocalTraining(lr=0.25, batch_size=1))  # f_k is (w − target)² here
    cohort, at = start(given, method, schedule, Engine(mode="stacked"))
    states, clock = [0.0], steps(schedule.asynchronous, 0, np.arange(4), 4)
    for number, now in enumerate(rounds(cohort, at, given, schedule)):
        step = next(clock)
        moves = [
            0.5 * (targets[client] - states[version]) / (1 + number - version)
            for client, version in zip(step.clients, step.versions, strict=True)
        ]
        states.append(states[-1] + sum(moves) / 2)
        assert float(now.shared.params["weight"]) == pytest.approx(states[-1])


@pytest.mark.parametrize("rule", ["uniform", "feddisco"])
def test_what_clients_count_is_theirs_among_all_of_a_step(rule, monkeypatch):
    counts = [4, 8, 100, 8, 4, 100, 8, 4]
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(n, 3, generator=draw), torch.arange(n) % 2) for n in counts]
    given = Task("test", nn.Linear(3, 2), "cross_entropy", Examples.of(clients), Examples.of(clients))
    weighting = Weighting(rule=rule)
    schedule = Schedule(rounds=6, asynchronous=Asynchronous(4), weighting=weighting)
    seen = []
    contribution = FedAvg.contribution
    noted = lambda method, upload: seen.extend(upload.weight.tolist()) or contribution(method, upload)  # noqa: E731
    monkeypatch.setattr(FedAvg, "contribution", noted)
    cohort, at = start(given, FedAvg(LocalTraining(batch_size=4)), schedule, Engine())
    clock, stale = steps(schedule.asynchronous, 0, np.arange(8), 8), 0
    for now, step in zip(rounds(cohort, at, given, schedule), clock, strict=False):
        wanted = weighting.of(cohort.train, step.clients)
        assert sorted(seen) == pytest.approx(sorted(wanted))
        stale += len(np.unique(step.versions)) > 1
        seen.clear()
        assert now.figures["clock"] > 0
    assert stale


@every(REFUSING)
def test_methods_without_one_mean_refuse_and_say_why(method):
    with pytest.raises(RecipeError, match=r"asynchronous\.buffer does not go with \w+: "):
        start(task(labelled(), net()[0]), method, Schedule(asynchronous=Asynchronous(2)), Engine())


def test_a_run_that_was_stopped_is_made_again_to_the_same_bits(tmp_path):
    given, method = task(labelled(), net()[0]), FedAvg(LocalTraining(batch_size=4))
    schedule = Schedule(rounds=6, checkpoint_every=2, asynchronous=Asynchronous(2))
    engine = Engine(mode="stacked", chunk=5)  # "auto" might choose another in the second run
    whole = run(given, method, schedule=schedule, engine=engine, folder=tmp_path / "whole")

    with pytest.raises(StoppedError):
        run(given, method, schedule=schedule, engine=engine, folder=tmp_path / "stopped", on_round=stop_after(4))
    again = resume(tmp_path / "stopped", given, method)
    assert equal(tree.tensors(whole.progress.shared), tree.tensors(again.progress.shared))
    assert [line["clock"] for line in again.history] == [line["clock"] for line in whole.history]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"asynchronous": {"buffer": -1}}, "asynchronous: buffer = -1, but it must be at least 0"),
        ({"asynchronous": {"buffer": 5}, "clients_per_round": 3}, "is never full with clients_per_round = 3"),
        ({"asynchronous": {"buffer": 5}, "faults": {"drop_out": 0.1}}, "nobody is late"),
        ({"asynchronous": {"buffers": 5}}, "did you mean 'buffer'"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(RecipeError, match=said):
        read({"task": {"name": "digits"}, **settings}, "fedavg")


def test_a_buffer_that_is_never_full_is_refused():
    schedule = replace(Schedule(), asynchronous=Asynchronous(6))
    with pytest.raises(RecipeError, match="is never full, for 5 clients take part"):
        start(task(labelled(), net()[0]), FedAvg(), schedule, Engine())


def test_faults_of_rate_nothing_go_with_it():
    assert Schedule(asynchronous=Asynchronous(2), faults=Faults()).asynchronous.buffer == 2
