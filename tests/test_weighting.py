"""How much each client counts: the rules by hand, and that methods and recipes follow them."""

from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from umbel.adapters import AdapterPlan
from umbel.clients import Examples
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.hazards import Faults
from umbel.methods import FedAvg, FLoRAL
from umbel.methods.routing import Router
from umbel.recipe import find, labels, load, read
from umbel.runs import run
from umbel.schedule import Schedule
from umbel.secure.settings import Secure
from umbel.tasks import Task, task_of
from umbel.train import LocalTraining
from umbel.weighting import Weighting, label_discrepancy

# With x = 1 a line's answer is its weight w, its loss (w − t)²; a step of rate ¼ goes half the way to t.
HALFWAY = LocalTraining(lr=0.25, batch_size=8)
STACKED = Engine(mode="stacked", chunk=2)


def labelled(*clients):
    return Examples.of([(torch.zeros(len(own), 1), torch.tensor(own)) for own in clients])


def line(weight):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, weight)
    return module


def aims(*pairs):
    """A task whose clients have `count` examples each that all pull to one target."""
    data = Examples.of([(torch.ones(n, 1).double(), torch.full((n, 1), t).double()) for n, t in pairs])
    return Task("aims", line(4.0), "mse", data, data)


def after(task, method, weighting, rounds=1, clients_per_round=0):
    plan = Schedule(rounds=rounds, weighting=weighting, clients_per_round=clients_per_round)
    return run(task, method, schedule=plan, engine=STACKED).progress.shared


EVEN_AND_ODD = labelled([0, 0, 1, 1], [0, 0, 0, 0], [1, 1])
EVERYONE = np.arange(3)


def test_the_discrepancy_is_the_divergence_from_even_labels():
    # Even: 0. One label of two: log 2. Of three labels, (½, ½, 0): log (3/2).
    assert_close(label_discrepancy(EVEN_AND_ODD, EVERYONE).tolist(), [0.0, log(2), log(2)])
    assert_close(label_discrepancy(labelled([0, 1, 2], [0, 2]), np.array([1, 0])).tolist(), [log(1.5), 0.0])


def test_places_that_are_ignored_have_no_label():
    ignored = labelled([0, 0, 1, 1, -100], [0, 0, 0, 0], [-100, -100])
    assert_close(label_discrepancy(ignored, EVERYONE).tolist(), [0.0, log(2), 0.0])


def test_a_huge_risk_outweighs_everyone_and_is_finite():
    weights = Weighting("rea").of_risks(np.ones(3), np.array([1.0, 400.0, 1e30]))
    assert np.isfinite(weights.astype(np.float32) * 1e6).all()
    assert weights[1] == weights[2] > 1e20 * weights[0]
    # Targets 3 and 40 at rate 1 per nat: losses of 1 and 1296; the mean of the two moves is the second's.
    shared = after(aims((1, 3.0), (1, 40.0)), FedAvg(HALFWAY), Weighting("rea"))
    assert shared.params["weight"].item() == pytest.approx(22.0)


def test_feddisco_by_hand():
    # n/Σn = 0.4, 0.4, 0.2 and d/Σd = 0, ½, ½. a = ½, b = 0.1: 0.5, 0.25, 0.05, which sum to 0.8; times 10/0.8.
    found = Weighting("feddisco").of(EVEN_AND_ODD, EVERYONE)
    assert_close(found.tolist(), [6.25, 3.125, 0.625])
    # a = 1: 0.5, 0 and −0.2, which counts as 0.
    assert_close(Weighting("feddisco", a=1.0).of(EVEN_AND_ODD, EVERYONE).tolist(), [10.0, 0.0, 0.0])


def test_feddiscos_sums_are_over_the_rounds_clients():
    # The second and third alone: n/Σn = ⅔, ⅓ and d/Σd = ½, ½: ⅔ − ¼ + 0.1 and ⅓ − ¼ + 0.1, which sum to 0.7.
    found = Weighting("feddisco").of(EVEN_AND_ODD, np.array([1, 2]))
    assert_close(found.tolist(), [6 * (31 / 60) / 0.7, 6 * (11 / 60) / 0.7])


def test_feddisco_falls_back_to_examples_where_every_term_is_zero():
    train = labelled([0, 0, 0], [1, 1], [0])
    assert Weighting("feddisco", a=9.0, b=0.0).of(train, EVERYONE).tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("secure", [Secure(), Secure("masks")], ids=["plain", "masks"])
@pytest.mark.parametrize(
    "method", [FedAvg(HALFWAY), FLoRAL(2, AdapterPlan(1), local=HALFWAY)], ids=["fedavg", "floral"]
)
def test_a_round_in_which_nobody_counts_changes_nothing(method, secure):
    # Only the even client counts, and in some rounds its upload is late while others' are there.
    x = torch.eye(4)
    ones = [(x, torch.ones(4).long())] * 11
    task = task_of(nn.Linear(4, 2), [(x, torch.tensor([0, 1, 0, 1])), *ones])
    plan = Schedule(
        rounds=8, weighting=Weighting("feddisco", a=9.0, b=0.0), faults=Faults(straggle=0.2), secure=secure
    )
    ends = []

    def watch(at):
        base = getattr(at.shared, "base", None) or at.shared.params
        ends.append((base["weight"].clone(), at.figures.get("lost", {}).get("late", 0)))

    run(task, method, schedule=plan, engine=STACKED, on_round=watch)
    assert all(weight.isfinite().all() and weight.norm() > 0.1 for weight, _ in ends)
    still = [torch.equal(one, other) for (one, _), (other, late) in pairwise(ends) if 0 < late < 12]
    assert 0 < sum(still) < len(still)


def test_feddisco_of_even_clients_adds_the_same_to_all():
    # d = 0 for everyone: ⅔ + b and ⅓ + b with b = ½, which sum to 2.
    found = Weighting("feddisco", b=0.5).of(labelled([0, 1, 0, 1], [1, 0]), np.arange(2))
    assert_close(found.tolist(), [6 * (7 / 6) / 2, 6 * (5 / 6) / 2])


def test_feddisco_needs_labels():
    with pytest.raises(RecipeError, match="this task's targets are numbers"):
        after(aims((1, 0.0), (3, 8.0)), FedAvg(HALFWAY), Weighting("feddisco"))


def test_fed_avg_by_examples_and_by_heads():
    # Halfway from 4 to 0 and 8 with n = 1, 3: 2 and 6, (2 + 18)/4 = 5 or (2 + 6)/2 = 4.
    task = aims((1, 0.0), (3, 8.0))
    assert after(task, FedAvg(HALFWAY), Weighting()).params["weight"].item() == 5.0
    assert after(task, FedAvg(HALFWAY), Weighting("uniform")).params["weight"].item() == 4.0


def test_fed_avg_by_risks_by_hand():
    # Rate 1 per nat. Losses at 4: 1 and 4 for targets 3 and 6; halfway: 3.5 and 5; n = 1, 3.
    weights = [exp(1), 3 * exp(4)]
    first = (weights[0] * 3.5 + weights[1] * 5) / sum(weights)
    task, rea = aims((1, 3.0), (3, 6.0)), Weighting("rea")
    found = after(task, FedAvg(HALFWAY), rea).params["weight"].item()
    assert found == pytest.approx(first, rel=1e-6)  # weights are float32
    weights = [exp((first - 3) ** 2), 3 * exp((first - 6) ** 2)]
    second = (weights[0] * (first + 3) / 2 + weights[1] * (first + 6) / 2) / sum(weights)
    assert after(task, FedAvg(HALFWAY), rea, rounds=2).params["weight"].item() == pytest.approx(second, rel=1e-6)
    none = after(task, FedAvg(HALFWAY), Weighting("rea", eta=0.0)).params["weight"].item()
    assert none == after(task, FedAvg(HALFWAY), Weighting()).params["weight"].item()


# FLoRAL: clients 0 (n = 1, target 8) and 1 (n = 3, target 0) are group 0, client 2 (n = 4, target 16) is group 1.


def offset():
    """x ↦ b, with x = 0 that the weight learns nothing."""
    module = nn.Linear(1, 1).double()
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


@pytest.mark.parametrize(
    ("weighting", "base", "adapters"),
    [
        (Weighting(), 2.25, [0.5, 4.0]),
        (Weighting("uniform"), 2.0, [1.0, 4.0]),
        # Losses 64, 0, 256 with η = log 2 / 64: weights 2 · 1, 3 and 16 · 4.
        (Weighting("rea", eta=log(2) / 64), (2 * 2 + 64 * 4) / 69, [2 * 2 / 5, 4.0]),
    ],
    ids=["examples", "uniform", "rea"],
)
def test_floral_by_every_rule_by_hand(weighting, base, adapters):
    # The answer is b + a: with rate ⅛ both go a quarter of the way from 0, by 2, 0 and 4.
    pairs = [(1, 8.0), (3, 0.0), (4, 16.0)]
    data = Examples.of([(torch.zeros(n, 1).double(), torch.full((n, 1), t).double()) for n, t in pairs])
    task = Task("offsets", offset(), "mse", data, data, torch.tensor([0, 0, 1]))
    method = FLoRAL(2, AdapterPlan(layers=("bias",)), Router(kind="oracle"), LocalTraining(lr=0.125))
    shared = after(task, method, weighting)
    assert shared.base["bias"].item() == pytest.approx(base, rel=1e-6)
    assert shared.adapters["bias"].flatten().tolist() == pytest.approx(adapters, rel=1e-6)


def test_a_method_may_have_a_rule_of_its_own():
    table = load(
        find("digits"), ["weighting.rule=feddisco", "weighting.b=0.3", "method.fedavg.weighting.rule=uniform"]
    )
    own, others = read(table, "fedavg").schedule.weighting, read(table, "floral").schedule.weighting
    assert own == Weighting("uniform", b=0.3)
    assert others == Weighting("feddisco", b=0.3)
    assert read(load(find("digits")), "fedavg").schedule.weighting == Weighting()
    for label in labels(table):
        recipe = read(table, label)
        assert read(recipe.table(), label) == recipe


def test_a_method_like_another_has_its_rule():
    overrides = ["method.floral.weighting.rule=rea", "method.twin.like=floral", "method.twin.weighting.eta=2.0"]
    assert read(load(find("digits"), overrides), "twin").schedule.weighting == Weighting("rea", eta=2.0)


@pytest.mark.parametrize("override", ["weighting.rule=fair", "weighting.a=-1.0", "weighting.c=1", "weighting=1"])
def test_a_rule_that_there_is_not_is_refused(override):
    with pytest.raises(RecipeError, match="weighting"):
        read(load(find("digits"), [override]), "fedavg")
    with pytest.raises(RecipeError, match="weighting"):
        read(load(find("digits"), [f"method.fedavg.{override}"]), "fedavg")
