"""Options that are seldom asked for together: what they come to, or why they are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from umbel.adapters import AdapterPlan
from umbel.clock import steps
from umbel.cohort import Engine
from umbel.costs import cost_of
from umbel.errors import RecipeError, RoundError
from umbel.hazards import Asynchronous, Attack, Robust
from umbel.meeting import ledger
from umbel.methods import IFCA, FedAvg, FLoRAL
from umbel.methods.ifca import Upload
from umbel.methods.routing import Router
from umbel.privacy.settings import Privacy
from umbel.rounds import rounds, start
from umbel.runs import run
from umbel.schedule import Schedule
from umbel.tasks.task import task_of
from umbel.train import LocalTraining
from umbel.weighting import Weighting

LOCAL = LocalTraining(lr=0.1, batch_size=4)
SLOW = LocalTraining(lr=0.02, batch_size=4, epochs=2)


def normed():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def given(net, sizes, scale=1.0, bad=None):
    draw = torch.Generator().manual_seed(1)
    clients = [
        (scale * torch.randn(size, 4, generator=draw), torch.randint(3, (size,), generator=draw)) for size in sizes
    ]
    if bad is not None:
        clients[bad] = (clients[bad][0] * 1e30, clients[bad][1])
    return task_of(net, clients, test=clients)


def progress(task, method, schedule, engine=None):
    cohort, at = start(task, method, schedule, engine or Engine("stacked"))
    return list(rounds(cohort, at, task, schedule))


@pytest.mark.parametrize("buffer", [1, 5])
@pytest.mark.parametrize("late", [True, False])
def test_variances_of_batch_norm_stay_variances(late, buffer):
    net = normed()
    plan = (
        Schedule(rounds=8, clients_per_round=10, asynchronous=Asynchronous(buffer))
        if late
        else Schedule(
            rounds=6,
            weighting=Weighting(rule="one"),
            privacy=Privacy(level="client", noise_multiplier=1.0),
        )
    )
    task = given(net, [40] * (20 if late else 50), 0.1)
    for after in progress(task, FedAvg(local=SLOW), plan):
        assert (after.shared.stats["1.running_var"] >= 0).all()
        assert np.isfinite(after.figures["loss"])


def test_a_late_client_whose_work_is_not_finite_stops_nobody_else():
    task = given(plain(), [8] * 6, bad=2)
    dropped = set()
    for seed in range(3):
        plan = Schedule(rounds=8, seed=seed, clients_per_round=5, asynchronous=Asynchronous(3))
        for after in progress(task, FedAvg(local=LOCAL), plan):
            dropped |= set(after.figures.get("dropped", ()))
    assert dropped == {2}
    alone = Schedule(rounds=8, clients_per_round=5, asynchronous=Asynchronous(1))
    with pytest.raises(RoundError, match="every client"):
        progress(task, FedAvg(local=LOCAL), alone)


def test_krum_is_the_same_whoever_is_stacked_under_batch_norm():
    task = given(normed(), (8, 4, 6, 2, 8, 10, 4))
    for seed in range(12):
        plan = Schedule(
            rounds=1, clients_per_round=3, seed=seed, weighting=Weighting("uniform"), robust=Robust("krum")
        )
        one, other = (
            progress(task, FedAvg(local=LOCAL), plan, Engine(mode, chunk=chunk))[-1].shared.params
            for mode, chunk in (("stacked", 3), ("looped", 0))
        )
        torch.testing.assert_close(one["0.weight"], other["0.weight"], atol=1e-5, rtol=1e-4)


def test_noise_of_an_attack_is_as_long_as_the_step_where_few_adapters_are_sent():
    task = given(plain(), [8] * 6)
    lengths = {}
    for kind in ("scale", "gaussian"):  # once the step is honest
        plan = Schedule(rounds=1, attack=Attack(kind, share=0.5, strength=1.0))
        method = FLoRAL(3, AdapterPlan(1), Router(kind="gradient"), LOCAL, send_top=1, init_std=3.0)
        cohort, at = start(task, method, plan, Engine("stacked"))
        before = at.shared.adapters
        after = next(rounds(cohort, at, task, plan)).shared.adapters
        lengths[kind] = sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5
    assert lengths["gaussian"] < 5 * lengths["scale"]


@pytest.mark.parametrize(
    ("method", "plan", "says"),
    [
        (
            FLoRAL(4, AdapterPlan(2), Router(explore=0.2), LOCAL, prune_below=0.2),
            {"robust": Robust("median"), "asynchronous": Asynchronous(3)},
            "prune_below",
        ),
        (
            FLoRAL(2, AdapterPlan(2), Router(kind="gradient"), LOCAL, ranks=(1.0, 0.5)),
            {"privacy": Privacy(level="example", noise_multiplier=1.0)},
            "ranks",
        ),
        (FedAvg(LOCAL), {"pool": True, "held_out": 0.25}, "held_out does not go with pool"),
    ],
)
def test_what_does_not_go_together_is_refused(method, plan, says):
    with pytest.raises(RecipeError, match=says):
        run(given(plain(), [8] * 8), method, schedule=Schedule(rounds=20, clients_per_round=6, **plan))


def test_what_a_protected_round_costs_depends_on_no_draw():
    task = given(plain(), [40] * 4)
    found = []
    for seed in range(3):
        plan = Schedule(rounds=2, seed=seed, privacy=Privacy(level="example", noise_multiplier=1.0))
        cohort, at = start(task, FedAvg(local=LOCAL), plan, Engine("stacked"))
        found.append(cost_of(cohort, at.shared, at.store, np.arange(1)).flops)
    assert found[0] == found[1] == found[2]
    assert min(found[0].values()) >= 0


def test_masks_of_dropout_differ_within_a_protected_lot():
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append((x != 0).tolist())
            return x

    net = nn.Sequential(nn.Dropout(0.5), Watched(), nn.Linear(32, 2))
    x = torch.ones(8, 32)
    task = task_of(net, [(x, torch.arange(8) % 2)] * 2, test=[(x, torch.arange(8) % 2)] * 2)
    plan = Schedule(rounds=1, privacy=Privacy(level="example", noise_multiplier=1.0))
    cohort, at = start(task, FedAvg(local=LocalTraining(lr=0.1, batch_size=8)), plan, Engine("looped"))
    seen.clear()
    cohort.update(at.shared, at.store, np.arange(1), 1)
    masks = {tuple(row) for batch in seen for row in batch}
    assert len(masks) > 4


def test_ifca_takes_no_model_that_overflows_and_sums_half_precision_in_float32():
    task = given(plain(), [8] * 4)
    method = IFCA(3, LOCAL)
    cohort, at = start(task, method, Schedule(rounds=1), Engine("stacked"))
    at.shared.models["0.weight"][1] = torch.inf
    _, private = cohort.update(at.shared, at.store, np.arange(4), 1)
    assert not private.choice[:, 1].any()
    many = Upload(
        {"running_var": torch.ones(1000, 1, dtype=torch.bfloat16)},
        torch.full((1000,), 16.0),
        torch.tensor([[16.0, 0.0]]).expand(1000, 2),
        torch.zeros(1000),
    )
    found = method.contribution(many)
    assert float(found["models"]["running_var"][0]) == float(found["route_examples"][0])


def test_embeddings_with_options_of_their_own_are_not_stacked_as_plain_ones():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.words(x).mean(1))

    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randint(2, (8, 6), generator=draw), torch.arange(8) % 2) for _ in range(3)]
    torch.manual_seed(0)
    task = task_of(Words(), clients, test=clients)
    method = FedAvg(local=LocalTraining(lr=1.0, batch_size=4))
    one, other = (
        run(task, method, rounds=1, engine=Engine(mode)).progress.shared.params for mode in ("stacked", "looped")
    )
    torch.testing.assert_close(one["words.weight"], other["words.weight"])


def test_examples_of_late_clients_are_counted_as_often_as_they_are_looked_at():
    task = given(plain(), [40] * 12)
    plan = Schedule(
        rounds=30,
        clients_per_round=4,
        asynchronous=Asynchronous(4, spread=2.0),
        privacy=Privacy(level="example", noise_multiplier=2.0, delta=1e-4),
    )
    method = FedAvg(local=LocalTraining(lr=0.1, batch_size=4, steps=1))
    cohort, _ = start(task, method, plan, Engine("stacked"))
    clock = steps(plan.asynchronous, plan.seed, np.arange(12), 4)
    true = ledger(task, method, plan, [next(clock).clients for _ in range(30)])
    assert cohort.ledger.figures(30) == true.figures(30)
    even = ledger(task, method, plan, [np.arange(4) + 4 * (round % 3) for round in range(30)])
    assert even.figures(30)["epsilon"] < true.figures(30)["epsilon"]
