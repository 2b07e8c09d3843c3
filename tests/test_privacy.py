"""Differential privacy: what is told is what was spent, and what was spent is what noise and clips allow."""

from dataclasses import replace
from functools import partial
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

import umbel
from test_battery import CASES
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples, Guard
from umbel.cohort import Engine, Tally
from umbel.errors import RecipeError
from umbel.folder import read_lines
from umbel.meeting import meet
from umbel.methods import FLTAC, IFCA, Ensemble, FedAvg, FedIT, FLoRAL, Local, ThresholdClustering, Trust
from umbel.methods.protocol import why_not
from umbel.methods.routing import Router
from umbel.privacy import clipping
from umbel.privacy.accounting import Mechanism, Use, ledger_of
from umbel.privacy.settings import Privacy
from umbel.recipe import find, load, read
from umbel.rounds import Here, sampled, start
from umbel.runs import resume, run_recipe
from umbel.schedule import Schedule
from umbel.secure.settings import Secure
from umbel.seeds import normal, seeded, uniform
from umbel.train import LocalTraining, local_train
from umbel.weighting import Weighting

ONE = Weighting("one")
SLIGHT = 1e-9  # a noise multiplier that no float32 sees


# The accountant.


def test_renyi_divergences_are_those_of_the_accountants_own_tests():
    # dp-accounting, test_compute_rdp_poisson_sampled_gaussian: q = 0.01, z = 2.5, 50 times.
    mechanism = Mechanism(1, 100)
    accountant = mechanism.accountant()
    accountant.compose(mechanism.event(2.5), 50)
    divergence = dict(zip(accountant.orders, accountant.rdp, strict=True))
    assert divergence[1.5] == pytest.approx(6.70579741e-04, rel=1e-6)
    assert divergence[2.5] == pytest.approx(1.08548710e-03, rel=1e-6)
    assert divergence[5] == pytest.approx(2.18075656e-03, rel=1e-6)


def test_epsilon_is_that_of_the_published_example():
    # TensorFlow Privacy's MNIST tutorial: 60,000 images, lots of 256, z = 1.1, 60 epochs: ε = 3.01 at δ = 1e-5 by
    # the conversion of Mironov 2017; the accountant's has become tighter since.
    mechanism, steps = Mechanism(256, 60_000), 60 * 60_000 // 256
    accountant = mechanism.accountant()
    accountant.compose(mechanism.event(1.1), steps)
    orders = np.array([order for order in accountant.orders if order > 1.5])
    divergence = np.array([d for o, d in zip(accountant.orders, accountant.rdp, strict=True) if o > 1.5])
    published = (divergence + np.log(1e5) / (orders - 1)).min()
    assert published == pytest.approx(3.01, abs=0.02)
    (told,) = ledger_of(Privacy("example", noise_multiplier=1.1), [Use(mechanism, (steps,))]).epsilons
    assert 0.8 * published < told < published


@pytest.mark.parametrize(("drawn", "of"), [(10, 100), (40, 40), (100, 1000)])
def test_epsilon_is_not_below_that_of_the_tight_accountant_and_near_it(drawn, of):
    from dp_accounting.pld import PLDAccountant

    mechanism = Mechanism(drawn, of)
    tight = PLDAccountant()
    tight.compose(mechanism.event(1.5), 30)
    exact = tight.get_epsilon(1e-5)
    (told,) = ledger_of(Privacy("client", noise_multiplier=1.5), [Use(mechanism, (30,))]).epsilons
    assert exact <= told <= 1.25 * exact


def test_a_fixed_number_of_clients_is_no_poisson_draw():
    # One client in place of another changes a sum by two clips: with everyone drawn that would be z / 2.
    from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent

    assert Mechanism(10, 100, fixed=True).event(1.0) == SampledWithoutReplacementDpEvent(
        100, 10, GaussianDpEvent(0.5)
    )
    by_itself, so_many = (
        ledger_of(Privacy("client", noise_multiplier=2.0), [Use(Mechanism(10, 100, fixed), (20,))]).epsilons[0]
        for fixed in (False, True)
    )
    assert so_many > 1.5 * by_itself


@pytest.mark.parametrize("mechanism", [Mechanism(10, 200), Mechanism(40, 40), Mechanism(10, 200, fixed=True)])
def test_the_computed_noise_spends_the_target_and_no_more(mechanism):
    ledger = ledger_of(Privacy("client", epsilon=4.0), [Use(mechanism, tuple(range(1, 21)))])
    assert 3.98 < ledger.epsilons[-1] <= 4.0 * (1 + 1e-6)
    assert list(ledger.epsilons) == sorted(ledger.epsilons)
    assert ledger.last_round == 20


def test_the_ledger_knows_the_round_before_the_budget_is_exceeded():
    uses = [Use(Mechanism(10, 100), tuple(range(1, 101)))]
    ledger = ledger_of(Privacy("client", epsilon=3.0, noise_multiplier=1.0), uses)
    assert ledger.epsilons[ledger.last_round - 1] <= 3.0 < ledger.epsilons[ledger.last_round]
    with pytest.raises(RecipeError, match="spent before the first round ends"):
        ledger_of(Privacy("client", epsilon=0.01, noise_multiplier=0.5), uses)
    with pytest.raises(RecipeError, match=r"privacy.delta = 0.1 with 100 to protect"):
        ledger_of(Privacy("client", epsilon=3.0, delta=0.1), uses)


def test_of_examples_the_worst_client_is_told():
    uses = [Use(Mechanism(4, n), (10, 20)) for n in (8, 40, 400)]
    alone = [ledger_of(Privacy("example", noise_multiplier=2.0), [use]).epsilons[1] for use in uses]
    assert alone == sorted(alone, reverse=True)
    assert ledger_of(Privacy("example", noise_multiplier=2.0), uses).epsilons[1] == alone[0]


# Clips and noise.


def parts(client, size=20):
    draw = torch.Generator().manual_seed(client)
    return {
        "base": {"w": torch.randn(size, 2, generator=draw), "b": torch.randn(2, generator=draw)},
        "adapters": {"values": {"a": 3 * torch.randn(4, size, generator=draw)}},
        "route_examples": 1 + torch.rand(4, generator=draw),
        "empty": {},
        "examples": torch.ones(()),
    }


PRIVACY = Privacy("client", noise_multiplier=1.3, clips={"adapters": 2.0})


def test_each_group_is_cut_to_its_clip_and_counts_are_not_told():
    groups = clipping.groups_of(parts(0), PRIVACY)
    assert groups.values == ("base", "adapters")
    assert groups.statistics == ("route_examples",)
    clips = clipping.first_clips(groups, PRIVACY)
    own = parts(1)
    cut = clipping.clipped(own, groups, clips)
    assert cut.keys() == {"base", "adapters", "route_examples", "within"}
    length = torch.cat([own["base"]["w"].flatten(), own["base"]["b"]]).norm()
    torch.testing.assert_close(cut["base"]["w"], own["base"]["w"] / length)
    torch.testing.assert_close(cut["base"]["b"], own["base"]["b"] / length)
    assert clipping.norm(cut["adapters"]) == pytest.approx(2.0)
    assert cut["within"].tolist() == [-0.5, -0.5, -0.5]
    small = {name: tree.map_tensors(lambda leaf: leaf / 100, own[name]) for name in groups.names}
    kept = clipping.clipped(small, groups, clips)
    assert kept.pop("within").tolist() == [0.5, 0.5, 0.5]
    for name, leaf in tree.tensors(kept).items():
        assert torch.equal(leaf, tree.tensors(small)[name]), "what is short enough stays, to the last bit"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.1, 10),
    st.floats(0.01, 100),
    st.sampled_from([0.0, 0.2]),
)
def test_no_client_changes_the_sums_by_more_than_the_noise_multiplier_says(client, multiplier, scale, clip_rate):
    privacy = replace(PRIVACY, noise_multiplier=multiplier, clip_rate=clip_rate)
    own = tree.map_tensors(lambda leaf: leaf * scale, parts(client))
    groups = clipping.groups_of(own, privacy)
    clips = clipping.first_clips(groups, privacy)
    cut = clipping.clipped(own, groups, clips)
    # In units of the noise on it, the longest that what one client adds can be is 1 / z.
    length = sum((clipping.norm(cut[name]) / (groups.noise(name) * clips[name])) ** 2 for name in groups.names)
    if clip_rate:
        length += (cut["within"].square() / groups.within_noise**2).sum()
    assert sqrt(length) <= 1 / multiplier * (1 + 1e-6)
    if scale > 10:  # all groups are at their clip: the bound is met, no noise is wasted
        assert sqrt(length) == pytest.approx(1 / multiplier, rel=1e-5)


def test_noise_on_a_known_sum_is_as_large_as_it_is_said_to_be():
    privacy = Privacy("client", noise_multiplier=2.0, clip=0.5, clip_rate=0.0)
    known = {"values": {"w": torch.full((200, 500), 3.0)}, "weight": torch.ones(())}
    groups = clipping.groups_of(known, privacy)
    clips = clipping.first_clips(groups, privacy)
    found = clipping.noised({"values": known["values"]}, groups, clips, seed=0, round=1)
    noise = found["values"]["w"] - 3.0
    assert float(noise.std()) == pytest.approx(2.0 * 0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    again = clipping.noised({"values": known["values"]}, groups, clips, seed=0, round=1)
    assert torch.equal(found["values"]["w"], again["values"]["w"])
    other = clipping.noised({"values": known["values"]}, groups, clips, seed=0, round=2)
    assert not torch.equal(found["values"]["w"], other["values"]["w"])
    wider = clipping.noised({"values": known["values"]}, groups, clips, 0, 1, slack={"values": 0.5})
    torch.testing.assert_close(wider["values"]["w"] - 3.0, 2 * noise, atol=1e-5, rtol=1e-4)


def test_sums_are_divided_by_a_fixed_number_and_statistics_are_not_negative():
    groups = clipping.groups_of(parts(0), PRIVACY)
    sums = {"base": {}, "adapters": {}, "route_examples": torch.tensor([3.0, -1.0, 0.0, 2.0])}
    found = clipping.divided(sums, groups, parts(0), 12.5)
    assert float(found["examples"]) == 12.5
    assert found["route_examples"].tolist() == [3, 0, 0, 2]
    assert found["empty"] == {}


def test_a_clip_goes_to_the_median_length():
    privacy = Privacy("client", noise_multiplier=SLIGHT, clip=100.0, clip_rate=0.5)
    lengths = torch.linspace(0.5, 3.5, 31)
    clients = [{"values": {"w": torch.tensor([float(length)])}} for length in lengths]
    groups = clipping.groups_of(clients[0], privacy)
    clips = clipping.first_clips(groups, privacy)
    for round in range(60):
        cut = [clipping.clipped(own, groups, clips)["within"] for own in clients]
        sums = {"values": {"w": torch.zeros(1)}, "within": torch.stack(cut).sum(0)}
        sums = clipping.noised(sums, groups, clips, 0, round)
        clips = clipping.next_clips(sums, groups, clips, privacy, 31, run=0.0)
    assert float(clips["values"]) == pytest.approx(2.0, abs=0.15)


def test_clips_of_the_model_follow_noise_upwards_for_a_part_of_the_run_only():
    groups = clipping.groups_of(parts(0), PRIVACY)
    clips = clipping.first_clips(groups, PRIVACY)

    def after(share, run):
        """When this share of the clients is within its clips."""
        sums = {"within": torch.full((3,), share - 0.5) * 10}
        return {n: float(c) for n, c in clipping.next_clips(sums, groups, clips, PRIVACY, 10, run).items()}

    up = {name: float(clip) * np.exp(0.2 * 0.5) for name, clip in clips.items()}
    assert after(0.0, run=0.2) == pytest.approx(up)
    assert after(0.0, run=0.21) == pytest.approx(up | {"base": 1.0, "adapters": 2.0})
    down = {name: float(clip) * np.exp(-0.2 * 0.5) for name, clip in clips.items()}
    assert after(1.0, run=0.9) == pytest.approx(down)


def test_what_the_operating_system_draws_is_normal_and_never_the_same():
    one, other = (normal((300, 500), None, torch.float64).flatten() for _ in range(2))
    assert kstest(one.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(one, other)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02
    assert uniform((4, 0), None).shape == (4, 0)
    assert normal((), None).shape == ()
    known = {"values": {"w": torch.zeros(200, 500)}}
    groups = clipping.groups_of(known, Privacy("client", noise_multiplier=2.0, clip_rate=0.0))
    clips = {"values": torch.tensor(0.5)}
    found, again = (clipping.noised(known, groups, clips, None, 1)["values"]["w"] for _ in range(2))
    assert float(found.std()) == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(found, again)


# Rounds.


def net():
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def labelled(count=12, size=8):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 4, generator=draw), torch.randint(0, 3, (size,), generator=draw)) for _ in range(count)
    ]


STEPS = LocalTraining(lr=0.05, batch_size=4)
PLAN = AdapterPlan(2, ("linear", "bias"))
METHODS = {
    "fedavg": FedAvg(STEPS),
    "floral em": FLoRAL(3, PLAN, Router(), STEPS, init_std=1.0),
    "floral gradient": FLoRAL(3, PLAN, Router("gradient"), STEPS),
    "ensemble": Ensemble(3, Router(), STEPS),
    "fedit": FedIT(PLAN, STEPS),
}


def ran(method, schedule, task=None):
    return umbel.run(task or umbel.task_of(net(), labelled()), method, schedule=schedule, engine=Engine("stacked"))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("secure", [Secure(), Secure("masks")], ids=["plain", "masks"])
def test_with_hardly_any_noise_and_wide_clips_training_is_what_it_is_without(method, secure):
    plan = Schedule(2, weighting=ONE)
    plain = ran(method, plan)
    privacy = Privacy("client", noise_multiplier=SLIGHT, clip=1e3, clip_rate=0.0)
    private = ran(method, replace(plan, privacy=privacy, secure=secure))
    for one, other in zip(
        tree.tensors(plain.progress.shared).values(), tree.tensors(private.progress.shared).values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_masks_alone_change_nothing_beyond_rounding(method):
    plain, masked = ran(method, Schedule(2)), ran(method, Schedule(2, secure=Secure("masks", neighbours=4)))
    for one, other in zip(
        tree.tensors(plain.progress.shared).values(), tree.tensors(masked.progress.shared).values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert masked.figures["secure_cut"] == 0
    assert masked.figures["secure_error"] < 1e-9
    assert masked.figures["bytes_up"] > 2 * plain.figures["bytes_up"]  # 8 bytes a number instead of 4, and keys


def test_a_client_that_drops_out_does_not_spoil_the_masked_sum():
    clients = labelled()
    clients[3] = (clients[3][0] * 1e38, clients[3][1])  # whose loss is not finite
    with seeded(0, "test"):
        task = umbel.task_of(nn.Linear(4, 3), clients)
    plain, masked = (ran(FedAvg(STEPS), Schedule(2, secure=Secure(kind)), task) for kind in ("plain", "masks"))
    assert masked.figures["dropped"] == [3]
    for name, leaf in plain.progress.shared.params.items():
        torch.testing.assert_close(leaf, masked.progress.shared.params[name], atol=1e-5, rtol=1e-4)


def test_a_clients_weight_in_the_mean_is_fixed_whoever_else_takes_part():
    # One clipped step among five clients that are expected: a fifth of its clip, although it is alone.
    privacy = Privacy("client", noise_multiplier=SLIGHT, clip=0.01, clip_rate=0.0)
    schedule = Schedule(1, clients_per_round=5, weighting=ONE, privacy=privacy)
    task = umbel.task_of(net(), labelled())
    cohort, at = start(task, FedAvg(STEPS), schedule, Engine("stacked"))
    here, alone = Here(cohort, at.store, task), np.array([7])
    total = partial(here.total, at.shared, alone, 1, schedule, seen=Tally())
    met = meet(cohort, at.shared, total, partial(here.form, at.shared, alone), 1, schedule, {})
    step = {n: leaf - at.shared.params[n] for n, leaf in met.shared.params.items()}
    assert clipping.norm(step) == pytest.approx(0.01 / 5, rel=1e-3)


def test_clients_are_drawn_by_themselves_and_a_round_with_none_is_noise():
    privacy = Privacy("client", noise_multiplier=1.0, clip=0.1)
    schedule = Schedule(200, clients_per_round=2, weighting=ONE, privacy=privacy)
    sizes = [len(sampled(np.arange(12), schedule, round)) for round in range(1, 201)]
    assert min(sizes) == 0
    assert 1.6 < np.mean(sizes) < 2.4
    fixed = replace(schedule, privacy=replace(privacy, sampling="fixed"))
    assert {len(sampled(np.arange(12), fixed, round)) for round in range(1, 20)} == {2}
    empty = sizes.index(0) + 1
    result = ran(METHODS["floral em"], replace(schedule, rounds=empty))
    assert np.isfinite(result.figures["accuracy"])
    assert result.figures["bytes_up"] == 0


def test_a_run_stops_before_its_budget_is_exceeded_and_says_what_it_spent(tmp_path):
    settings = ["rounds=50", "weighting.rule=one", "privacy.level=client", "privacy.noise_multiplier=1"]
    recipe = read(load(find("digits"), [*settings, "clients_per_round=8", "privacy.epsilon=8"]), "fedavg")
    result = run_recipe(replace(recipe, engine=Engine("stacked")), tmp_path / "run")
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    spent = [line["epsilon"] for line in lines]
    assert len(lines) < 50
    assert spent == sorted(spent)
    assert spent[-1] <= 8 < spent[-1] + 2 * (spent[-1] - spent[-2])
    assert lines[-1]["delta"] == 1e-5
    assert result.progress.last
    assert result.cohort.num_rounds == len(lines)  # what falls or cools over a run is over when it is
    assert "accuracy" in lines[-1]
    assert resume(tmp_path / "run").figures["round"] == len(lines)  # there is nothing left to spend


def test_a_private_run_that_is_resumed_ends_bit_identical(tmp_path):
    settings = [
        "rounds=6",
        "weighting.rule=one",
        "privacy.level=client",
        "privacy.epsilon=50",
        "checkpoint_every=3",
    ]
    recipe = read(load(find("digits"), [*settings, "clients_per_round=12", "engine.mode=stacked"]), "floral")
    run_recipe(recipe, tmp_path / "whole")

    def stop(at):
        if at.round == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "stopped", stop)
    resume(tmp_path / "stopped")
    one, other = (
        (tmp_path / name / "checkpoints/000006.safetensors").read_bytes() for name in ("whole", "stopped")
    )
    assert one == other


# Examples.


def linear_data(count=6):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 3, generator=draw), torch.randn(count, 1, generator=draw)
    return Examples.of([(x, y), (x[:4] + 1, y[:4])])


def by_hand(data, guard, w, lr, size, steps):
    """Two clients' linear regressions by DP-SGD without noise, an example at a time."""
    found = []
    batches = list(data.lots(size, 1, steps))
    for client in range(2):
        own, count = w.clone(), int(data.examples.count[client])
        for batch in batches:
            total = torch.zeros(3)
            for x, y, real in zip(batch.x[client], batch.y[client], batch.weight[client], strict=True):
                if real:
                    gradient = 2 * (x @ own - y) * x
                    total += gradient * min(1, guard.clip / float(gradient.norm()))
            own = own - lr * total / min(size, count)
        found.append(own)
    return torch.stack(found)


def test_steps_are_along_the_clipped_gradients_of_single_examples():
    guard, local = Guard(0.7, 0.0), LocalTraining(lr=0.1, batch_size=2, steps=5)
    data = ClientData(linear_data(), np.arange(2), 0, 1, guard=guard)
    w = torch.tensor([0.3, -0.2, 0.1])

    def objective(groups, batch, _step):
        return batch.mean(((batch.x @ groups["w"]["w"].unsqueeze(2)) - batch.y).square().squeeze(2))

    trained, _ = local_train(objective, {"w": {"w": w.expand(2, 3)}}, data, local, {"w": 0.1})
    torch.testing.assert_close(trained["w"]["w"], by_hand(data, guard, w, 0.1, 2, 5))


def test_lots_are_drawn_example_by_example():
    data = ClientData(Examples.of([(torch.arange(40.0).unsqueeze(1), torch.zeros(40))]), np.zeros(1, int), 0, 1)
    lots = list(data.lots(4, steps=500))
    sizes = torch.stack([lot.weight.sum() for lot in lots])
    assert len(lots) == 500
    assert 3.7 < float(sizes.mean()) < 4.3
    assert 1.5 < float(sizes.std()) < 2.3  # √(40 · 0.1 · 0.9) = 1.9
    drawn = torch.cat([lot.x[0, lot.weight[0] > 0, 0] for lot in lots]).long().bincount(minlength=40)
    assert float(drawn.min()) > 20
    everyone = ClientData(data.examples, np.zeros(1, int), 0, 1).lots(64, steps=3)
    assert all(int(lot.weight.sum()) == 40 for lot in everyone)


def test_noise_on_a_clients_steps_is_as_large_as_it_is_said_to_be():
    guard, local = Guard(0.5, 3.0), LocalTraining(lr=1.0, batch_size=5, steps=1)
    data = ClientData(Examples.of([(torch.zeros(20, 1), torch.zeros(20))]), np.zeros(1, int), 0, 1, guard=guard)

    def objective(groups, batch, _step):  # whose gradient is zero
        return batch.mean(batch.y) + 0.0 * groups["w"]["w"].sum((1, 2))

    trained, _ = local_train(objective, {"w": {"w": torch.zeros(1, 300, 300)}}, data, local, {"w": 1.0})
    assert float(trained["w"]["w"].std()) == pytest.approx(3.0 * 0.5 / 5, rel=0.02)


def test_secret_steps_are_not_drawn_again():
    data = ClientData(linear_data(40), np.arange(2), 0, 1, guard=Guard(0.7, 0.0, secret=True))
    lots = [torch.cat([lot.rows[0][lot.weight[0] > 0] for lot in data.lots(8)]).tolist() for _ in range(3)]
    assert lots[0] != lots[1] != lots[2]
    noisy = replace(data, guard=Guard(0.5, 3.0, secret=True))

    def objective(groups, batch, _step):  # whose gradient is zero
        return 0.0 * groups["w"]["w"].sum((1, 2)) + 0.0 * batch.x.sum((1, 2))

    local = LocalTraining(lr=1.0, batch_size=2, steps=1)
    one, other = (
        local_train(objective, {"w": {"w": torch.zeros(2, 300, 300)}}, noisy, local, {"w": 1.0})[0]["w"]["w"]
        for _ in range(2)
    )
    assert float(one.std()) == pytest.approx(3.0 * 0.5 / 2, rel=0.02)
    assert not torch.equal(one, other)


def test_protected_examples_give_the_same_result_stacked_or_looped():
    task = umbel.task_of(net(), labelled(5))
    privacy = Privacy("example", epsilon=20.0)
    for method in (FedAvg(STEPS), METHODS["floral gradient"]):
        one, other = (
            umbel.run(task, method, schedule=Schedule(2, privacy=privacy), engine=Engine(mode))
            for mode in ("stacked", "looped")
        )
        assert one.figures["epsilon"] == pytest.approx(20, rel=0.01)
        for a, b in zip(
            tree.tensors(one.progress.shared).values(), tree.tensors(other.progress.shared).values(), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# Refusals.


@pytest.mark.parametrize(
    ("method", "schedule", "words"),
    [
        (Trust(), Schedule(secure=Secure("masks")), "'masks' does not go with Trust: whom a client trusts"),
        (FLTAC(2), Schedule(secure=Secure("masks")), "FLTAC: slots that share an adapter are found by clustering"),
        (ThresholdClustering(2), Schedule(secure=Secure("masks")), "clusters are found from single updates"),
        (Local(), Schedule(secure=Secure("masks")), "its clients train alone"),
        (Trust(), Schedule(weighting=ONE, privacy=PRIVACY), "privacy.level = 'client' does not go with Trust"),
        (IFCA(2), Schedule(weighting=ONE, privacy=PRIVACY), "its sums are not made of how far tensors have moved"),
        (FedAvg(), Schedule(privacy=PRIVACY), "write weighting.rule = 'one'"),
        (FLoRAL(), Schedule(privacy=Privacy("example", epsilon=1.0)), "FLoRAL: router.kind = 'em' measures"),
        (Ensemble(), Schedule(privacy=Privacy("example", epsilon=1.0)), "measured on examples without noise"),
    ],
)  # fmt: skip
def test_what_cannot_be_private_says_why_before_any_work(method, schedule, words):
    with pytest.raises(RecipeError, match=words):
        start(umbel.task_of(net(), labelled()), method, schedule, Engine("stacked"))


def test_noise_on_the_steps_of_training_covers_the_uploads_of_these_alone():
    # One local training and nothing else; a method that is derived from one of them has to say so itself.
    open_to = {name for name, own in CASES.items() for m in own.values() if not why_not(m, "steps")}
    assert open_to == {"fedavg", "fedprox", "fedavg_finetune", "fedit", "ffa_lora", "floral"}
    assert all(bool(why_not(m, "steps")) == (m.router.kind == "em") for m in CASES["floral"].values())


def test_batch_norm_shows_examples():
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(RecipeError, match="BatchNorm, in which examples meet"):
        start(
            umbel.task_of(module, labelled()),
            FedAvg(STEPS),
            Schedule(privacy=Privacy("example", epsilon=1.0)),
            Engine(),
        )


def test_options_that_need_more_than_moves_are_refused():
    for options in ({"averaging": "product"}, {"send_top": 1}, {"ranks": (1.0, 0.5)}):
        method = FLoRAL(2, PLAN, Router(), STEPS, **options)
        with pytest.raises(RecipeError, match="not go with FLoRAL: averaging other than 'factor'"):
            ran(method, Schedule(1, weighting=ONE, privacy=PRIVACY))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["clips={adaptors=0.1}"], "^privacy.clips.adaptors: .* did you mean 'adapters'"),
        (["clips={examples=0.1}"], "^privacy.clips.examples: there is no such group"),  # how many is not told
        (["ranges={bases=8.0}"], "^secure.ranges.bases: .* did you mean 'base'"),
        (["ranges={train_loss=8.0}"], "^secure.ranges.train_loss: there is no such group"),
        (["ranges={withins=8.0}"], "^secure.ranges.withins: .* did you mean 'within'"),
        (["level=none", "epsilon=0", "ranges={train_los=8.0}"], "^secure.ranges.train_los: .* 'train_loss'"),
    ],
)
def test_a_group_that_is_not_summed_is_named_before_any_work(overrides, words, tmp_path):
    asked = ["weighting.rule=one", "privacy.level=client", "privacy.epsilon=50.0", "secure.aggregation=masks"]
    asked += [f"{'secure' if own.startswith('ranges') else 'privacy'}.{own}" for own in overrides]
    with pytest.raises(RecipeError, match=words):
        run_recipe(read(load(find("digits"), asked), "floral"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"level": "client"},
        {"epsilon": -1.0},
        {"delta": 0.0},
        {"clip": 0.0},
        {"quantile": 1.0},
        {"clip_share": 0.6, "statistics_share": 0.5},
        {"epsilon": 50.0},  # and nobody is protected
        {"noise_multiplier": 1.0},
        {"level": "example", "epsilon": 1.0, "clips": {"base": 1.0}},  # of which the steps know nothing
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError, match="|".join(["privacy: ", *wrong])):
        Privacy(**wrong)
