"""Robust means, each by the property that defines it; claims that are bounded; who refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.testing import assert_close

from simulate import FREE
from test_battery import CASES, equal, every, labelled, net, task
from umbel import tree
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.hazards import Robust
from umbel.methods import IFCA, ifca
from umbel.methods.ensemble import Upload
from umbel.methods.protocol import why_not
from umbel.methods.routing import Measured, bounded_claims
from umbel.recipe import read
from umbel.robust import by_nearness, flat, geometric_median, rule_of, trimmed_mean, unflat, weighted_median
from umbel.rounds import rounds, start
from umbel.schedule import Schedule

RULES = ["median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "norm_bound"]
every_rule = pytest.mark.parametrize("rule", RULES)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_under(rule, values, weights, received=None, hostile=0.3):
    """What the weighted mean of the changed rows comes to."""
    received = torch.zeros_like(values) if received is None else received
    weights = weights.double()
    made = rule_of(Robust(rule, hostile))({"w": values}, {"w": received}, weights)["w"]
    shape = weights.shape + (1,) * (made.dim() - weights.dim())
    return (weights.view(shape) * made).sum(0) / weights.sum(0).view(shape[1:])


@every_rule
def test_what_all_agree_on_stays(rule):
    agreed = drawn(0, 3, 2).expand(7, 3, 2)
    made = rule_of(Robust(rule))({"w": agreed}, {"w": torch.zeros(7, 3, 2)}, torch.arange(1.0, 8.0))["w"]
    assert_close(made, agreed, rtol=1e-6, atol=0)
    if rule in ("median", "trimmed_mean", "norm_bound"):
        assert torch.equal(made, agreed)


@every_rule
@given(seed=st.integers(0, 10**6), count=st.integers(8, 12))
@settings(max_examples=20, deadline=None)
def test_the_order_of_clients_says_nothing(rule, seed, count):
    # With fewer clients two that are each other's only neighbour have one score, and Krum takes the first.
    values, weights = drawn(seed, count, 4).double(), drawn(seed + 1, count).tanh() / 2 + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert_close(mean_under(rule, values, weights), mean_under(rule, values[order], weights[order]))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@given(seed=st.integers(0, 10**6), size=st.floats(-1e20, 1e20), bad=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_minority_cannot_leave_the_honest_range(rule, seed, size, bad):
    # 10 clients with any weights, up to 4 of them hostile, and those hold less than the share that is trimmed.
    values, weights = drawn(seed, 10, 3).double(), drawn(seed + 1, 10).abs() + 0.1
    weights[:bad] *= 0.44 * weights[bad:].sum() / weights[:bad].sum().clamp(min=1e-9) / (1 - 0.44)
    values[:bad] = size
    found = mean_under(rule, values, weights, hostile=0.45)
    honest = values[bad:]
    assert bool(((found >= honest.min(0).values - 1e-9) & (found <= honest.max(0).values + 1e-9)).all())


@pytest.mark.parametrize("rule", ["geometric_median", "krum", "multi_krum"])
@given(seed=st.integers(0, 10**6), size=st.floats(10, 1e12), bad=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_minority_cannot_pull_far(rule, seed, size, bad):
    values = drawn(seed, 10, 3).double()
    values[:bad] += size
    honest = values[bad:]
    radius = (honest - honest.mean(0)).norm(dim=1).max()
    found = mean_under(rule, values, torch.ones(10), hostile=0.3)
    # The geometric median is within 2 (1 − share) / (1 − 2 share) radii (Pillutla et al. 2019, Lemma 2).
    reach = 2 * (1 - bad / 10) / (1 - 2 * bad / 10) if rule == "geometric_median" else 1.0 + 1e-9
    assert float((found - honest.mean(0)).norm()) <= reach * float(radius)


@given(seed=st.integers(0, 10**6), size=st.floats(1, 1e20))
@settings(max_examples=20, deadline=None)
def test_steps_are_no_longer_than_the_median_step(seed, size):
    received, steps = drawn(seed, 1, 6).expand(9, 6).double(), drawn(seed + 1, 9, 6).double()
    steps[0] *= size
    length = steps.norm(dim=1)
    made = rule_of(Robust("norm_bound", bound=0.5))({"w": received + steps}, {"w": received}, torch.ones(9))["w"]
    moved = (made - received).norm(dim=1)
    assert bool((moved <= 0.5 * length.median() * (1 + 1e-6) + 1e-6).all())
    short = length <= 0.5 * length.median()
    assert_close((made - received)[short], steps[short])


def test_the_weighted_median_by_hand():
    values = torch.tensor([[5.0], [1.0], [3.0], [2.0]])
    assert weighted_median(values, torch.ones(4).double()).item() == 2.5
    assert weighted_median(values, torch.tensor([1.0, 1, 1, 0]).double()).item() == 3
    assert weighted_median(values, torch.tensor([10.0, 1, 1, 1]).double()).item() == 5
    assert weighted_median(values, torch.tensor([3.0, 1, 1, 1]).double()).item() == 4  # half of the weight is 5's


@given(seed=st.integers(0, 10**6), count=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_weights_are_as_good_as_copies(seed, count):
    values = drawn(seed, count, 2).double()
    copies = torch.randint(1, 4, (count,), generator=torch.Generator().manual_seed(seed))
    many = values.repeat_interleave(copies, 0)
    one, ones = copies.double(), torch.ones(len(many)).double()
    assert_close(weighted_median(values, one), torch.from_numpy(np.median(many.numpy(), 0)))
    assert_close(trimmed_mean(values, one, 0.2), trimmed_mean(many, ones, 0.2))
    assert_close(geometric_median(values, one), geometric_median(many, ones), rtol=1e-4, atol=1e-4)


def test_the_trimmed_mean_by_hand():
    values = torch.tensor([100.0, 1, 2, 3, -100]).unsqueeze(1)
    assert trimmed_mean(values, torch.ones(5).double(), 0.2).item() == 2
    assert trimmed_mean(values, torch.ones(5).double(), 0.0).item() == pytest.approx(1.2)


def test_the_geometric_median_is_where_the_distances_are_least():
    points, weights = drawn(3, 8, 2).double(), drawn(4, 8).abs().double()

    def distance(v):
        return float(weights @ (points - torch.from_numpy(v)).norm(dim=1))

    best = minimize(
        distance, points.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    )
    assert distance(geometric_median(points, weights).numpy()) == pytest.approx(best.fun, rel=1e-6)


def test_krum_by_a_loop():
    # Blanchard et al. 2017, §4: the sum of squared distances to the K − f − 2 nearest others.
    points, count, hostile = drawn(5, 9, 4).double(), 9, 2
    scores = []
    for i in range(count):
        others = sorted(float((points[i] - points[j]).square().sum()) for j in range(count) if j != i)
        scores.append(sum(others[: count - hostile - 2]))
    assert by_nearness(points, torch.ones(9).double(), hostile / count).tolist() == np.argsort(scores).tolist()


@every_rule
def test_each_adapter_is_a_group_of_its_own(rule):
    # Adapter 1 is used by clients 4 to 6 alone. An attacker who hides there is outweighed there.
    values, weights = drawn(6, 7, 2, 3), torch.zeros(7, 2)
    weights[:4, 0], weights[4:, 1] = 1.0, 1.0
    both = mean_under(rule, values, weights)
    for c, rows in enumerate((slice(0, 4), slice(4, 7))):
        assert_close(both[c], mean_under(rule, values[rows, c], torch.ones(4 - c)))


def test_an_attacker_in_one_adapter_is_outweighed_there():
    values, weights = drawn(7, 9, 2, 3), torch.full((9, 2), 0.05)
    weights[:5, 0], weights[5:, 1] = 0.95, 0.95
    values[8, 1] = 1e9  # one of four who use adapter 1, one of nine clients
    found = mean_under("median", values, weights)
    assert float(found[1].abs().max()) < 10
    assert float(((weights.unsqueeze(2) * values).sum(0) / weights.sum(0).unsqueeze(1))[1].max()) > 1e8


SUMS = {name: {label: m for label, m in own.items() if not why_not(m, "mean")} for name, own in CASES.items()}


FIRST = {name: dict([next(iter(own.items()))]) for name, own in SUMS.items() if own}


@every(FIRST)
@every_rule
def test_methods_run_under_every_rule_and_stay_finite(method, rule):
    check_finite(method, rule)


def check_finite(method, rule):
    # Two rounds are enough to go through what is sent, changed and summed.
    given_task = task(labelled(), net(norm=False))
    schedule = Schedule(rounds=2, robust=Robust(rule), evaluate_every=2)
    cohort, at = start(given_task, method, schedule, Engine(mode="stacked", chunk=3))
    *_, last = rounds(cohort, at, given_task, schedule, FREE)
    assert all(bool(leaf.isfinite().all()) for leaf in tree.tensors(last.shared).values())


@every(SUMS)
def test_every_option_of_a_method_runs_under_a_rule_and_stays_finite(method):
    check_finite(method, "median")


@every(FIRST)
def test_a_bound_that_is_never_reached_changes_nothing(method):
    given_task = task(labelled(), net())
    ends = []
    for robust in (Robust(), Robust("norm_bound", bound=1e9, heaviest=0.0)):
        schedule = Schedule(rounds=2, robust=robust)
        cohort, at = start(given_task, method, schedule, Engine(mode="stacked", chunk=3))
        *_, last = rounds(cohort, at, given_task, schedule, FREE)
        ends.append(tree.tensors(last.shared))
    assert_close(*ends)


@every({name: {label: m for label, m in own.items() if why_not(m, "mean")} for name, own in CASES.items()})
def test_methods_without_a_mean_refuse_and_say_why(method):
    schedule = Schedule(robust=Robust("median"))
    with pytest.raises(RecipeError, match=r"robust\.rule = 'median' does not go with \w+: ") as error:
        start(task(labelled(), net()), method, schedule, Engine())
    assert why_not(method, "mean") in str(error.value)


def test_robust_means_do_not_depend_on_chunks():
    method = CASES["floral"]["oracle, preconditioned"]
    given_task = task(labelled(), net())
    ends = []
    for chunk in (1, 5):
        schedule = Schedule(rounds=2, robust=Robust("median"))
        cohort, at = start(given_task, method, schedule, Engine(mode="stacked", chunk=chunk))
        *_, last = rounds(cohort, at, given_task, schedule, FREE)
        ends.append(tree.tensors(last.shared))
    assert_close(*ends)


def claiming(weight, routes, spread=0.1, losses=0.5, counts=4.0, chi_square=1.0):
    number = len(weight)
    measured = Measured(
        torch.full((number,), spread) * weight,
        torch.full((number, 3, 2), losses * counts),
        torch.full((number, 3), counts),
        torch.full((number,), chi_square),
    )
    return Upload({"w": torch.zeros(number, 2, 1)}, weight, routes, measured, torch.zeros(number))


def test_honest_claims_are_left_alone():
    upload = claiming(torch.tensor([10.0, 12, 9]), torch.tensor([[4.0, 6], [12, 0], [3, 6]]))
    assert equal(tree.tensors(bounded_claims(upload, 4.0)), tree.tensors(upload))


def test_nobody_is_routed_to_more_adapters_than_it_has_examples():
    upload = claiming(torch.full((5,), 10.0), torch.full((5, 2), 5.0))
    upload.route_examples[0] = 50.0
    upload.route_examples[1, 0] = -1e6
    bounded = bounded_claims(upload, 4.0).route_examples
    assert bounded[0].tolist() == [5, 5]
    assert bounded[1].tolist() == [0, 5]


def test_claims_are_bounded_by_the_median_clients():
    upload = claiming(torch.full((5,), 10.0), torch.full((5, 2), 5.0))
    upload.weight[0] = 1e9
    upload.measured.spread[0] = 1e30
    upload.measured.label_losses[0] = 1e30
    upload.measured.label_counts[0] = 1e9
    upload.measured.chi_square[0] = 1e30
    bounded = bounded_claims(upload, 4.0)
    assert bounded.weight.tolist() == [40, 10, 10, 10, 10]
    assert float(bounded.measured.spread[0]) <= 4 * 0.1 * 40 + 1e-4
    assert float(bounded.measured.label_counts[0].sum()) == pytest.approx(48)
    assert float(bounded.measured.label_losses[0].max()) <= 4 * 0.5 * 16 + 1e-4
    assert float(bounded.measured.chi_square[0]) == 4


def test_an_ifca_client_trains_one_model_whatever_it_claims():
    method = IFCA(2)
    routes = torch.tensor([[10.0, 10], [10, 0], [0, 10]])
    upload = ifca.Upload({"w": drawn(8, 3, 1)}, torch.full((3,), 10.0), routes, torch.zeros(3))
    message = ifca.Message({"w": torch.zeros(3, 2, 1)})
    changed = method.changed(upload, message, lambda values, _received, _weights: values)
    assert changed.route_examples.tolist() == [[10, 0], [10, 0], [0, 10]]
    assert torch.equal(changed.model["w"], upload.model["w"])


def test_tensors_side_by_side_come_apart_again():
    values = {"a": drawn(9, 4, 2, 3), "b": drawn(10, 4)}
    assert equal(unflat(flat(values)[2], values), {n: leaf[2] for n, leaf in values.items()})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"rule": "mean"}, r"robust.rule = 'mean', but it is one of .*'median'"),
        ({"hostile": 0.5}, r"robust.hostile must be in \[0, 0.5\), for no rule withstands a majority"),
        ({"bound": 0}, "robust: bound = .* above 0"),
        ({"heaviest": 0.5}, "robust.heaviest"),
        ({"rul": "median"}, "did you mean 'rule'"),
    ],
)
def test_bad_settings_are_named(table, said):
    with pytest.raises(RecipeError, match=said):
        read({"task": {"name": "digits"}, "robust": table}, "fedavg")
