"""Routes by losses: what a client takes, what the server knows of all, and that both find the groups."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simulate import simulate
from umbel import mixing, tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.cohort import Engine
from umbel.methods import Ensemble, FLoRAL, Population
from umbel.methods.routing import (
    EVALUATION_BATCH,
    SMALLEST_SHARE,
    Router,
    Routes,
    Told,
    losses_of,
    moved_share,
    route_sums,
)
from umbel.model.loss import Loss
from umbel.runs import run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.train import LocalSGD

EM, GRADIENT, ORACLE = Router(kind="em"), Router(kind="gradient"), Router(kind="oracle")
BIASES = AdapterPlan(layers=("bias",))


def sized(*counts):
    """Clients with so many examples each; what these are does not matter."""
    examples = Examples.of([(torch.zeros(n, 1), torch.zeros(n, 1)) for n in counts])
    return ClientData(examples, np.arange(len(counts)), 0, 1)


def told(bias, temperature, num_clients):
    bias, temperature = (tree.broadcast(torch.tensor(v), num_clients) for v in (bias, temperature))
    return Told(torch.empty(num_clients, 0), bias, temperature)


def summed(num_clients, examples, route_examples, spread):
    """The sums of a round, as `route_sums` gives them."""
    sums = {"clients": num_clients, "examples": examples, "route_examples": route_examples, "spread": spread}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in sums.items()}


def known(share, balance=None, rounds=0, num_clients=1):
    """What a server knows after so many rounds."""
    balance = [0.0] * len(share) if balance is None else balance
    state = (torch.tensor(leaf) for leaf in (float(rounds), balance, share, 1.0))
    return Routes(torch.empty(num_clients, 0), *state)


# The client's side.


def test_logits_are_minus_the_losses_over_the_temperature_plus_the_bias():
    # T = 2, b = (1, 0): −4/2 + 1 = −1 and −2/2 = −1; −1/2 + 1 = ½ and −1/2. n (mean − min): 3 (3 − 2), 5 · 0.
    losses = torch.tensor([[4.0, 2.0], [1.0, 1.0]])
    logits, spread = EM.start(told([1.0, 0.0], 2.0, 2), torch.zeros(2, 2), lambda: losses, sized(3, 5))
    assert logits.tolist() == [[-1.0, -1.0], [0.5, -0.5]]
    assert spread.tolist() == [3.0, 0.0]


def test_routes_are_uniform_while_no_temperature_is_known():
    losses = torch.tensor([[4.0, 2.0, 9.0], [0.0, 7.0, 2.0]])
    logits, spread = EM.start(told([1.0, 0.0, -1.0], 0.0, 2), torch.zeros(2, 3), lambda: losses, sized(2, 4))
    assert torch.equal(logits, torch.zeros(2, 3))
    assert spread.tolist() == [6.0, 12.0]  # 2 (5 − 2), 4 (3 − 0): measured all the same


def test_a_router_that_is_not_em_measures_nothing():
    def losses():
        raise AssertionError("it did")

    private = torch.tensor([[0.5, -0.5]])
    logits, spread = GRADIENT.start(told([9.0, 0.0], 1.0, 1), private, losses, sized(2))
    assert torch.equal(logits, private)
    assert spread.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_oracle_is_one_hot_to_the_last_bit(dtype):
    group = torch.tensor([2, 0, 1, 1])
    routes = Routes.init("oracle", 4, 4, group)
    message = routes.tell(ORACLE, torch.tensor([3, 0]))
    logits, _ = ORACLE.start(message, torch.zeros(2, 4), lambda: torch.zeros(2, 4), sized(1, 1))
    assert torch.equal(logits.to(dtype).softmax(1), torch.eye(4, dtype=dtype)[[1, 2]])


@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_the_unit_of_the_loss_does_not_matter(scale):
    # Three rounds in both units, by the client's function and the server's.
    draw = torch.Generator().manual_seed(0)
    data, probs = sized(3, 5, 2), {}
    losses = torch.rand(3, 3, 4, generator=draw)
    for unit in (1.0, scale):
        routes = Routes.init("em", 4, 3, None)
        for round in range(3):
            now = routes.tell(EM, torch.arange(3))
            logits, spread = EM.start(now, torch.zeros(3, 4), lambda seen=unit * losses[round]: seen, data)
            probs[unit] = logits.softmax(1)
            n = data.num_examples
            routes = routes.after(EM, route_sums(n, n.unsqueeze(1) * probs[unit], spread))
    assert_close(probs[scale], probs[1.0])
    assert probs[1.0].max() > 0.5


@pytest.mark.parametrize("counts", [(EVALUATION_BATCH + 44, 3), (2 * EVALUATION_BATCH,), (4, EVALUATION_BATCH, 9)])
def test_losses_are_means_over_all_examples_however_many_batches_they_fill(counts):
    draw = torch.Generator().manual_seed(0)
    clients = [tuple(torch.randn(n, 1, generator=draw).double() for _ in "xy") for n in counts]
    weights = torch.tensor([-1.0, 0.5, 2.0]).double()
    data = ClientData(Examples.of(clients), np.arange(len(counts)), 0, 1)
    line = nn.Linear(1, 1, bias=False).double()
    measured = losses_of(Loss(line, "mse"), {"weight": weights.view(3, 1, 1)}, data)
    expected = [[((w * x - y) ** 2).mean().item() for w in weights] for x, y in clients]
    # Weights of padding and counts are float32, but whole numbers: exact.
    assert_close(measured, torch.tensor(expected, dtype=torch.float64))


# The server's side: what it tells.


@pytest.mark.parametrize(("done", "expected"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.5), (4, None), (9, None)])
def test_the_bias_is_held_for_half_of_the_balance_then_fades_and_then_is_the_prior(done, expected):
    # 4 rounds of balance: −β in the first half, 2 (1 − ¾) = ½ of it after three rounds, then log p.
    router = replace(EM, balance_rounds=4)
    routes = known([0.75, 0.25], [0.8, -0.8], done)
    bias = [log(0.75), log(0.25)] if expected is None else [-0.8 * expected, 0.8 * expected]
    now = routes.tell(router, torch.tensor([0, 0, 0]))
    assert_close(now.bias, torch.tensor([bias] * 3))


def test_the_temperature_is_a_fraction_of_the_spread():
    routes = replace(known([0.5, 0.5]), spread=torch.tensor(4.0))
    assert_close(routes.tell(replace(EM, temperature=0.25), torch.tensor([0, 0])).temperature, torch.ones(2))


def test_without_balance_the_prior_holds_from_the_second_round_on():
    router = replace(EM, balance_rounds=0)
    routes = Routes.init("em", 2, 1, None)
    assert routes.tell(router, torch.tensor([0])).bias.abs().max() == 0
    routes = routes.after(router, summed(1, 4.0, [3.0, 1.0], 1.0))
    assert_close(routes.tell(router, torch.tensor([0])).bias, torch.tensor([[log(0.75), log(0.25)]]))
    assert torch.equal(routes.balance, torch.zeros(2))


def test_the_prior_of_an_unused_route_is_finite():
    bias = known([1.0, 0.0], rounds=99).tell(EM, torch.tensor([0])).bias
    assert_close(bias, torch.tensor([[0.0, log(SMALLEST_SHARE)]]))


# The server's side: what it learns.


def test_two_rounds_of_routes_by_hand():
    # All 4 clients: p = (6, 2)/8, D = 16/8, β = (log 3/2, log 1/2) less its mean: ± log(3)/2.
    routes = Routes.init("em", 2, 4, None).after(EM, summed(4, 8.0, [6.0, 2.0], 16.0))
    assert_close(routes.share, torch.tensor([0.75, 0.25]))
    assert_close(routes.spread, torch.tensor(2.0))
    assert_close(routes.balance, torch.tensor([log(3) / 2, -log(3) / 2]))
    # 2 of 4 clients go half the way: p from ¾ to (1, 3)/4 is ½, D from 2 to 4 is 3; at p = ½ β stays.
    routes = routes.after(EM, summed(2, 4.0, [1.0, 3.0], 16.0))
    assert_close(routes.share, torch.tensor([0.5, 0.5]))
    assert_close(routes.spread, torch.tensor(3.0))
    assert_close(routes.balance, torch.tensor([log(3) / 2, -log(3) / 2]))
    assert routes.round == 2


def test_the_first_spread_is_taken_whole_however_few_took_part():
    # 1 of 4: D = 6/3 and not a quarter of it, for there is nothing to keep; p goes a quarter of the way from ½.
    routes = Routes.init("em", 2, 4, None).after(EM, summed(1, 3.0, [3.0, 0.0], 6.0))
    assert_close(routes.spread, torch.tensor(2.0))
    assert_close(routes.share, torch.tensor([0.625, 0.375]))


def test_what_is_told_and_learned_over_many_rounds_is_a_slow_twins():
    rng, num_clients, num_routes, router = np.random.default_rng(0), 8, 3, Router(balance_rounds=5)
    routes = Routes.init("em", num_routes, num_clients, None)
    share, spread, beta = [1 / 3] * 3, 0.0, [0.0] * 3
    for done in range(8):
        left = 1 - done / 5
        bias = [
            -b * min(1, 2 * left) if left > 0 else np.log(max(p, 1e-6)) for b, p in zip(beta, share, strict=True)
        ]
        now = routes.tell(router, torch.tensor([0]))
        assert_close(now.bias[0], torch.tensor(bias, dtype=torch.float32))
        assert_close(now.temperature[0], torch.tensor(0.15 * spread, dtype=torch.float32))
        assert routes.round == done

        here = rng.permutation(num_clients)[: [8, 3, 5][done % 3]]
        n, routed, apart = rng.integers(1, 9, len(here)), [], rng.random(len(here)) + 0.1
        for k in range(len(here)):
            own = rng.random(num_routes) ** 4
            own[2] *= done != 0  # nobody's in the first round: β there is cut off at log(1e-3) before its step
            routed.append(n[k] * own / own.sum())
        part, total = len(here) / num_clients, sum(n)
        for c in range(num_routes):
            share[c] += part * (sum(r[c] for r in routed) / total - share[c])
        seen = sum(k * d for k, d in zip(n, apart, strict=True)) / total
        spread = seen if done == 0 else spread + part * (seen - spread)
        if done < 5:
            beta = [b + part * np.log(max(3 * p, 1e-3)) for b, p in zip(beta, share, strict=True)]
            beta = [b - sum(beta) / 3 for b in beta]
        tensors = (torch.tensor(np.array(v), dtype=torch.float32) for v in (n, routed, n * apart))
        routes = routes.after(router, route_sums(*tensors))
    assert_close(routes.share, torch.tensor(share, dtype=torch.float32))
    assert_close(routes.balance, torch.tensor(beta, dtype=torch.float32))


def test_a_balance_makes_an_overfull_route_less_likely_and_an_idle_one_more():
    routes = Routes.init("em", 3, 6, None).after(EM, summed(6, 6.0, [5.0, 1.0, 0.0], 1.0))
    bias = routes.tell(EM, torch.tensor([0])).bias[0]
    assert bias[0] < bias[1] < bias[2]
    assert_close(bias.sum(), torch.tensor(0.0))


def test_the_sums_add_up_over_chunks():
    draw = torch.Generator().manual_seed(0)
    n, spread = torch.randint(1, 9, (5,), generator=draw).float(), torch.rand(5, generator=draw)
    routed = n.unsqueeze(1) * torch.randn(5, 3, generator=draw).softmax(1)
    parts = [route_sums(n[own], routed[own], spread[own]) for own in ([4, 0], [2], [1, 3])]
    assert_close(mixing.total(parts), route_sums(n, routed, spread))
    assert parts[0]["clients"] == 2


@pytest.mark.parametrize(
    ("guard", "steps"),
    [(0.25, [1.0, 0.5, 0.25, 0.0]), (0.0, [1.0, 1.0, 1.0, 0.0]), (1.0, [0.8125, 0.125, 0.0625, 0.0])],
)
def test_what_few_examples_used_moves_as_much_less(guard, steps):
    # p = (26, 4, 2, 0)/32 = (13, 2, 1, 0)/16, and min(1, p / τ) of it.
    assert moved_share(summed(4, 32.0, [26.0, 4.0, 2.0, 0.0], 0.0), guard).tolist() == steps


# In the methods.

MIXED = [
    FLoRAL(3, AdapterPlan(2), EM, LocalSGD(batch_size=4), init_std=1.0),
    Ensemble(3, EM, LocalSGD(batch_size=4)),
]
NAMES = ["floral", "ensemble"]
mixed = pytest.mark.parametrize("method", MIXED, ids=NAMES)


def small_net():
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def regression(*counts):
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(n, d, generator=draw, dtype=torch.float64) for d in (3, 2)) for n in counts]


def third_round(method):
    """The server's state and the uploads of five clients whose routes differ."""
    clients, net = regression(6, 2, 9, 1, 4), small_net()
    shared, store = simulate(method, net, clients, rounds=2)
    everyone = np.arange(5)
    data = ClientData(Examples.of(clients), everyone, 0, 3)
    message = method.send(shared, torch.from_numpy(everyone))
    upload, _ = method.client_update(Loss(method.adapt(net), "mse"), message, store.rows(everyone), data)
    assert upload.route_examples.softmax(1).std(0).min() > 1e-3
    return shared, upload


@mixed
def test_the_server_needs_sums_over_clients_and_no_single_router(method):
    shared, upload = third_round(method)
    alone = [tree.rows(upload, torch.tensor([k])) for k in (3, 0, 4, 1, 2)]
    pair = [tree.rows(upload, torch.tensor(own)) for own in ([1, 4], [0, 2, 3])]
    together = method.contribution(upload)
    for chunks in (alone, pair):
        assert_close(mixing.total(method.contribution(chunk) for chunk in chunks), together)
        one, other = (method.server_update(shared, iter(given)) for given in (chunks, [upload]))
        # Routes are float32, and so is Σ n π by which sums are divided.
        assert_close(tree.tensors(one), tree.tensors(other), rtol=1.3e-6, atol=1e-5)


@mixed
def test_two_clients_may_exchange_routers_if_their_sums_stay(method):
    # The same work by both, routes (1, 2, 3) and (3, 2, 1) or twice (2, 2, 2): the server ends at the same place.
    shared, upload = third_round(method)
    twins = tree.rows(upload, torch.tensor([0, 0]))
    ends = []
    for routes in ([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], [[2.0, 2.0, 2.0]] * 2):
        own = replace(twins, route_examples=torch.tensor(routes))
        ends.append(tree.tensors(method.server_update(shared, iter([own]))))
    assert_close(*ends)


@pytest.mark.parametrize("guard", [0.01, 0.0])
@mixed
def test_an_unused_route_stays_bit_for_bit(method, guard):
    method = replace(method, guard=guard)
    shared, upload = third_round(method)
    routed = torch.tensor([[5.0, 1.0, 0.0], [1.0, 1.0, 0.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    after = method.server_update(shared, iter([replace(upload, route_examples=routed)]))
    old, new = ((s.adapters if isinstance(method, FLoRAL) else s.models) for s in (shared, after))
    for name, leaf in old.items():
        assert torch.equal(new[name][2], leaf[2])
        assert not torch.equal(new[name][0], leaf[0])


def offset():
    """x ↦ b for x = 0."""
    module = nn.Linear(1, 1).double()
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def aims(*pairs):
    """Clients with n examples each, that all say what b should be."""
    return [(torch.zeros(n, 1).double(), torch.full((n, 1), t).double()) for n, t in pairs]


def test_two_rounds_of_floral_by_losses_by_hand():
    # b = 0, a = (0, 8), rate ⅛; n = 1 aims at 0, n = 3 at 8: losses (0, 64) and (64, 0), D = 32, T = 8 for τ = ¼.
    # Round 1, routes (½, ½): b + Σ π a = 4. Both b and a's move, by −¼ · 4 · (1, ½, ½) and ¼ · 4 · (1, ½, ½):
    # b = (−1 + 3 · 1)/4 = ½ and, the routes being equal, a = (0, 8) + ¼.
    # Round 2: b + a = ¾ and 8¾. Losses (¾², 8¾²) and (7¼², ¾²), p was (½, ½) and so the bias is 0.
    method = FLoRAL(2, BIASES, replace(EM, temperature=0.25), LocalSGD(lr=0.125))
    shared, _ = method.init(offset(), Population(2, 0))
    shared = replace(shared, adapters={"bias": torch.tensor([[0.0], [8.0]]).double()})
    clients = aims((1, 0.0), (3, 8.0))
    once, store = simulate(method, offset(), clients, shared=shared)
    assert store.rows(np.arange(2)).logits.abs().max() == 0
    assert once.base["bias"].item() == 0.5
    assert once.adapters["bias"].flatten().tolist() == [0.25, 8.25]
    assert once.routes.spread == 32
    assert once.routes.share.tolist() == [0.5, 0.5]
    _, store = simulate(method, offset(), clients, rounds=2, shared=shared)
    losses = np.array([[0.75**2, 8.75**2], [7.25**2, 0.75**2]])
    assert_close(store.rows(np.arange(2)).logits, torch.tensor(-losses / 8, dtype=torch.float32))


# Server momentum.


@pytest.mark.parametrize(
    ("step", "places"), [(1.0, [4.0, 0.0]), (0.5, [6.0, 4.0]), (torch.tensor([0.5]), [6.0, 4.0])]
)
def test_two_steps_of_momentum_by_hand(step, places):
    # From 8, decay ½. Whole steps: mean 4, v = −4, at 4; mean 2, v = −2 − 2, at 0.
    # Half steps: mean 4, v = ½ (−4) = −2, at 6; mean 4, v = −1 + ½ (−2) = −2, at 4.
    at, velocity = {"w": torch.tensor([8.0])}, {"w": torch.zeros(1)}
    for mean, place in zip((4.0, 2.0 if step == 1 else 4.0), places, strict=True):
        at, velocity = mixing.momentum(at, {"w": torch.tensor([mean])}, velocity, 0.5, step)
        assert at["w"].tolist() == [place]
        assert velocity["w"].tolist() == [-4.0 if step == 1 else -2.0]


def test_momentum_of_what_nobody_used_only_decays():
    old, velocity = {"w": torch.tensor([[8.1], [8.1]])}, {"w": torch.tensor([[-4.0], [-4.0]])}
    mean = {"w": torch.tensor([[8.1], [0.0]])}  # Σ 0 / Σ 0 comes as 0 and means nothing
    at, velocity = mixing.momentum(old, mean, velocity, 0.5, torch.tensor([1.0, 0.0]))
    assert torch.equal(at["w"][1], old["w"][1])
    assert velocity["w"].tolist() == [[-2.0], [-2.0]]
    assert_close(at["w"][0], torch.tensor([6.1]))


@pytest.mark.parametrize(
    ("guard", "base", "adapters"), [(0.01, 6.0, [3.75, 8.25]), (1.0, 6.375, [2.0, 4.375])], ids=["", "guarded"]
)
def test_two_rounds_of_floral_with_server_momentum_by_hand(guard, base, adapters):
    # Client 0 aims at 8 with adapter 0, client 1 at 16 with adapter 1, from 0 with rate ⅛: b and a move by r/4,
    # where r is what is missing. Decay ½.
    # Round 1: r = 8, 16: b = (2 + 4)/2 = 3, v = 3; a = (2, 4) = v.
    # Round 2: r = 3, 9: b pulls to 3 + (¾ + 2¼)/2, v = 1½ + 1½, b = 6; a: v = (1 + ¾, 2 + 2¼), a = (3¾, 8¼).
    # Guarded, τ = 1 and p = ½, a goes half of v: (1, 2) after round 1.
    # Round 2: r = 4, 11: b pulls by (1 + 2¾)/2 = 1⅞, v = 1½ + 1⅞, b = 6⅜; a: v = (1 + 1, 2 + 2¾),
    # a = (1 + 1, 2 + 2⅜).
    method = FLoRAL(3, BIASES, ORACLE, LocalSGD(lr=0.125), server_momentum=0.5, guard=guard)
    group = torch.tensor([0, 1])
    start, _ = method.init(offset(), Population(2, 0, group))
    start.adapters["bias"][2] = 1 / 3
    shared, _ = simulate(method, offset(), aims((1, 8.0), (1, 16.0)), rounds=2, group=group, shared=start)
    assert shared.base["bias"].item() == base
    assert shared.adapters["bias"][:2].flatten().tolist() == adapters
    assert torch.equal(shared.adapters["bias"][2], start.adapters["bias"][2])
    assert shared.velocity["adapters/bias"][2].item() == 0


# To the end.


def opposite(seed, num_clients=12):
    """Two groups whose targets are x W and −x W: no model serves both."""
    draw = torch.Generator().manual_seed(seed)
    w, group = torch.randn(4, 2, generator=draw), torch.arange(num_clients) % 2

    def examples(count):
        x = torch.randn(num_clients, count, 4, generator=draw)
        return Examples.of([(x[k], x[k] @ w * (1 - 2 * group[k])) for k in range(num_clients)])

    with seeded(seed, "test"):
        net = nn.Linear(4, 2)
    return Task("opposite", net, "mse", examples(16), examples(50), group)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_adapters", [2, 4])
def test_floral_finds_two_opposite_groups_with_as_many_adapters_or_more(num_adapters, seed):
    local = LocalSGD(lr=0.1, batch_size=8)
    method = FLoRAL(num_adapters, AdapterPlan(2), Router(balance_rounds=20), local)
    task, plan = opposite(seed), Schedule(rounds=60, seed=seed, evaluate_every=60)
    stacked = Engine(mode="stacked")
    figures = run(task, method, schedule=plan, engine=stacked).figures
    assert figures["nmi"] == pytest.approx(1)
    assert figures["dead"] == num_adapters - 2
    assert figures["loss"] < 1e-3 * task.test.y.square().mean()  # one model for both groups answers 0 at best
    blind = run(replace(task, group=None), method, schedule=plan, engine=stacked).figures
    assert blind["loss"] == figures["loss"]
