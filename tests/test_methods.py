"""Methods on losses with a solution by hand, as special cases of each other, and against slow twins."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from simulate import simulate
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.errors import RecipeError
from umbel.methods import Ensemble, FedAvg, FLoRAL, Local, Population
from umbel.methods.floral import each_alone
from umbel.methods.routing import Router, losses_of
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import Loss
from umbel.seeds import generator
from umbel.train import LocalTraining, local_train

# With x = 1 a line's answer is its weight w, its loss (w − t)²; a step of rate ¼ goes half the way to t.
HALFWAY = LocalTraining(lr=0.25, batch_size=8)
GRADIENT = Router(kind="gradient", noise=0.0)
ORACLE = Router(kind="oracle")
EM = Router(kind="em")


def line(weight):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, weight)
    return module


def aims(*pairs):
    """Clients with `count` examples each that all pull to one target."""
    return [(torch.ones(n, 1).double(), torch.full((n, 1), t).double()) for n, t in pairs]


def regression(counts, inputs=3, outputs=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(n, width, generator=draw, dtype=torch.float64) for width in (inputs, outputs))
        for n in counts
    ]


def seeded_net(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return nn.Sequential(*layers).double()


def test_fed_avg_is_the_mean_weighted_by_examples_over_two_rounds():
    # n = 1 to 0 and n = 3 to 8, from 4: halfway they are at 2 and 6, (2 + 3·6)/4 = 5;
    # then at 2.5 and 6.5, (2.5 + 3·6.5)/4 = 5.5
    shared, _ = simulate(FedAvg(HALFWAY), line(4.0), aims((1, 0.0), (3, 8.0)), rounds=2)
    assert shared.params["weight"].item() == 5.5


@pytest.mark.parametrize(("server_lr", "expected"), [(0.5, 4.875), (2, 6.0)])
def test_fed_avgs_server_goes_a_part_of_the_way(server_lr, expected):
    # ½: the mean 5 gives 4.5; from there 2.25 and 6.25, mean 5.25, gives 4.5 + ½ · 0.75.
    # 2: the mean 5 gives 6; from there 3 and 7, mean 6, stays.
    shared, _ = simulate(
        FedAvg(HALFWAY, ServerOptimizer(lr=server_lr)), line(4.0), aims((1, 0.0), (3, 8.0)), rounds=2
    )
    assert shared.params["weight"].item() == expected


def test_one_batch_after_another_in_the_stored_order():
    # 4 → halfway to 0 → 2 → halfway to 8 → 5; the second epoch: 2.5 → 5.25
    x, y = torch.ones(2, 1).double(), torch.tensor([[0.0], [8.0]]).double()
    local = LocalTraining(lr=0.25, batch_size=1, epochs=2, shuffle=False)
    shared, _ = simulate(FedAvg(local), line(4.0), [(x, y)])
    assert shared.params["weight"].item() == 5.25


def test_local_clients_do_not_meet():
    # From 4 halfway to 0 twice, and halfway to 8 twice; client 1 alone ends where it does in company.
    clients = aims((1, 0.0), (3, 8.0))
    _, store = simulate(Local(HALFWAY), line(4.0), clients, rounds=2)
    assert store.rows(np.arange(2)).params["weight"].flatten().tolist() == [1.0, 7.0]
    _, store = simulate(Local(HALFWAY), line(4.0), clients, rounds=2, order=np.array([1]))
    assert store.rows(np.arange(2)).params["weight"].flatten().tolist() == [4.0, 7.0]


# FLoRAL and Ensemble by hand. Clients 0 (n = 1, target 8) and 1 (n = 3, target 0) are group 0, client 2
# (n = 4, target 16) is group 1. One-hot routes are exact.

GROUPED = [(1, 8.0), (3, 0.0), (4, 16.0)]
GROUP = torch.tensor([0, 0, 1])


def offset():
    """x ↦ b, with x = 0 that the weight learns nothing."""
    module = nn.Linear(1, 1).double()
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def at_zero(pairs):
    return [(torch.zeros_like(x), y) for x, y in aims(*pairs)]


@pytest.mark.parametrize(("guard", "adapters"), [(0.01, [0.5, 4.0]), (0.0, [0.5, 4.0]), (1.0, [0.25, 2.0])])
def test_floral_averages_the_base_over_all_and_each_adapter_over_its_own(guard, adapters):
    # The answer is b + a: with rate ⅛ both go a quarter of the way from 0, by 2, 0 and 4.
    # b = (1·2 + 3·0 + 4·4)/8 = 2.25   a_0 = (1·2 + 3·0)/4 = 0.5   a_1 = 4
    # Each has half of the examples, p = ½: at guard τ = 1 they move half as far.
    method = FLoRAL(2, AdapterPlan(layers=("bias",)), ORACLE, LocalTraining(lr=0.125), guard=guard)
    shared, _ = simulate(method, offset(), at_zero(GROUPED), group=GROUP)
    assert_close(shared.base["bias"].item(), 2.25)
    assert_close(shared.adapters["bias"].flatten().tolist(), adapters)


def test_florals_adapter_rate_is_relative_to_the_bases():
    method = FLoRAL(2, AdapterPlan(layers=("bias",)), ORACLE, LocalTraining(lr=0.125), adapter_lr=0.5)
    shared, _ = simulate(method, offset(), at_zero(GROUPED), group=GROUP)
    assert_close(shared.base["bias"].item(), 2.25)
    assert_close(shared.adapters["bias"].flatten().tolist(), [0.25, 2.0])


def test_florals_server_weighs_uploads_by_examples_times_route():
    # n = (1, 3), π = (½, ½) and (1, 0): n π = (½, ½) and (3, 0).
    # a_0 = (½·7 + 3·14)/3.5 = 13 at p = 3.5/4 ≥ τ; a_1's mean is 20 at p = 1/8, a quarter of τ = ½: 4 + ¼·16 = 8.
    method = FLoRAL(3, AdapterPlan(layers=("bias",)), GRADIENT, guard=0.5)
    shared, fresh = method.init(offset(), Population(2, 0))
    old = torch.tensor([[2.0], [4.0], [1 / 3]]).double()
    shared = replace(shared, adapters={"bias": old})
    data = ClientData(Examples.of(at_zero([(1, 0.0), (3, 0.0)])), np.arange(2), 0, 1)
    message = method.send(shared, torch.arange(2))
    upload, _ = method.client_update(
        Loss(method.adapt(offset()), "mse"), message, tree.rows(fresh, torch.tensor([0, 0])), data
    )
    upload = replace(
        upload,
        base={"weight": torch.tensor([[[1.0]], [[5.0]]]).double(), "bias": torch.tensor([[0.0], [4.0]]).double()},
        adapters={"bias": torch.tensor([[[7.0], [20.0], [99.0]], [[14.0], [-1.0], [77.0]]]).double()},
        weight=torch.tensor([1.0, 3.0]),
        route_examples=torch.tensor([[0.5, 0.5, 0.0], [3.0, 0.0, 0.0]]),
    )
    one_by_one = [tree.rows(upload, torch.tensor([k])) for k in (1, 0)]
    for uploads in ([upload], one_by_one):
        after = method.server_update(shared, iter(uploads))
        assert after.base["weight"].item() == 4.0  # (1 + 3·5)/4
        assert after.base["bias"].item() == 3.0
        assert after.adapters["bias"][:2].flatten().tolist() == [13.0, 8.0]
        assert torch.equal(after.adapters["bias"][2], old[2])  # nobody's: bit for bit


@pytest.mark.parametrize("method", [FLoRAL, Ensemble])
def test_what_nobody_uses_stays_as_it_is_bit_for_bit(method):
    # Only linear layers: there is a bias to compare otherwise.
    settings = {"router": ORACLE, "local": LocalTraining(lr=0.1, batch_size=2)}
    made = FLoRAL(3, AdapterPlan(1, ("linear",)), **settings) if method is FLoRAL else Ensemble(3, **settings)
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before, _ = made.init(net, Population(3, 0, GROUP))
    after, _ = simulate(made, net, regression([2, 4, 3]), rounds=3, group=GROUP)
    old, new = ((s.adapters if method is FLoRAL else s.models) for s in (before, after))
    assert all(torch.equal(new[name][2], old[name][2]) for name in old)
    assert not any(torch.equal(new[name][0], old[name][0]) for name in old)


@pytest.mark.parametrize(("guard", "models"), [(0.01, [3.0, 10.0]), (1.0, [3.5, 7.0])])
def test_ensemble_averages_each_model_over_its_own(guard, models):
    # From 4 halfway to 8, 0, 16: 6, 2, 10. w_0 = (1·6 + 3·2)/4 = 3, w_1 = 10; at τ = 1, p = ½, half as far.
    method = Ensemble(2, ORACLE, HALFWAY, guard=guard)
    shared, _ = method.init(line(4.0), Population(3, 0, GROUP))
    shared = replace(shared, models={"weight": torch.full((2, 1, 1), 4.0).double()})
    shared, _ = simulate(method, line(4.0), aims(*GROUPED), group=GROUP, shared=shared)
    assert_close(shared.models["weight"].flatten().tolist(), models)


def test_ensemble_mixes_outputs_not_weights():
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    method = Ensemble(3, GRADIENT)
    shared, fresh = method.init(net, Population(2, 0))
    private = replace(fresh, logits=torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]]).double())
    message = method.send(shared, torch.arange(2))
    x = regression([4, 4])[0][0].expand(2, 4, 3)
    outputs = Loss(method.adapt(net), "mse").outputs(method.personalize(message, private), x)
    for k, logits in enumerate(private.logits):
        alone = [functional_call(net, {n: w[c] for n, w in shared.models.items()}, (x[k],)) for c in range(3)]
        share = logits.exp() / logits.exp().sum()
        assert_close(outputs[k], share[0] * alone[0] + share[1] * alone[1] + share[2] * alone[2])
    assert_close(method.mixture(message, private), private.logits.softmax(1))


def test_ensembles_models_start_apart_and_the_first_is_the_users():
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    shared, _ = Ensemble(3, GRADIENT).init(net, Population(2, 0))
    for name, leaf in net.named_parameters():
        assert torch.equal(shared.models[name][0], leaf)
        assert len({tuple(w.flatten().tolist()) for w in shared.models[name]}) == 3
    again, _ = Ensemble(3, GRADIENT).init(net, Population(2, 0))
    other, _ = Ensemble(3, GRADIENT).init(net, Population(2, 1))
    assert torch.equal(again.models["0.weight"], shared.models["0.weight"])
    assert not torch.equal(other.models["0.weight"][1], shared.models["0.weight"][1])


# BatchNorm: a batch's mean m moves the running mean r to 0.9 r + 0.1 m. Clients of 4 examples around 10 and 50:
# alone they go 0 → 1 → 1.9 and 0 → 5 → 9.5; averaged, 0 → (1 + 5)/2 = 3 → (3.7 + 7.7)/2 = 5.7.

CENTRED = [(torch.tensor([[m - 1], [m + 1]] * 2).double(), torch.zeros(4, 1).double()) for m in (10.0, 50.0)]


def means(stats):
    return stats["running_mean"].flatten().tolist()


@pytest.mark.parametrize("chunk", [1, 2])
def test_running_statistics_are_averaged_or_stay_with_the_client(chunk):
    local, norm, both = LocalTraining(lr=0.1, batch_size=4), nn.BatchNorm1d(1).double(), np.arange(2)
    shared, _ = simulate(FedAvg(local), norm, CENTRED, rounds=2, chunk=chunk)
    assert_close(means(shared.stats), [5.7])
    _, store = simulate(Local(local), norm, CENTRED, rounds=2, chunk=chunk)
    assert_close(means(store.rows(both).stats), [1.9, 9.5])
    floral = FLoRAL(2, AdapterPlan(layers=("norm",)), GRADIENT, local)
    shared, store = simulate(floral, norm, CENTRED, rounds=2, chunk=chunk)
    served = floral.personalize(floral.send(shared, torch.arange(2)), store.rows(both))
    assert_close(means(served), [1.9, 9.5])
    assert means(shared.stats) == [0.0]
    assert not floral.send(shared, torch.arange(2)).stats  # nobody reads them: they do not travel
    floral = replace(floral, batch_stats="federated")
    shared, store = simulate(floral, norm, CENTRED, rounds=2, chunk=chunk)
    served = floral.personalize(floral.send(shared, torch.arange(2)), store.rows(both))
    assert_close(means(served), [5.7, 5.7])
    # Model 0 is averaged over client 0 alone, model 1 over client 1 alone.
    group = torch.tensor([0, 1])
    shared, _ = simulate(Ensemble(2, ORACLE, local), norm, CENTRED, rounds=2, chunk=chunk, group=group)
    assert_close(means(shared.stats), [1.9, 9.5])


# Special cases of each other.

SIZES = [3, 8, 1, 5]


class Adapted(nn.Module):
    """A linear layer with one adapter, written out."""

    def __init__(self, base, adapter):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(base[name].clone()) for name in ("weight", "bias"))
        self.a, self.b, self.c = (
            nn.Parameter(adapter[n][0].clone()) for n in ("weight_lora_A", "weight_lora_B", "bias")
        )

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a, self.bias + self.c)


@pytest.mark.parametrize("init_std", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["em", "gradient"])
def test_floral_with_one_adapter_is_fed_avg_on_base_and_adapter(kind, init_std):
    local = LocalTraining(lr=0.1, batch_size=2, epochs=2, momentum=0.5)
    method = FLoRAL(1, AdapterPlan(2), Router(kind=kind), local, init_std=init_std)
    net = seeded_net(nn.Linear(3, 2))[0]
    start, _ = method.init(net, Population(4, 0))
    floral, _ = simulate(method, net, regression(SIZES), rounds=3)
    fed_avg, _ = simulate(FedAvg(local), Adapted(start.base, start.adapters), regression(SIZES), rounds=3)
    assert_close(floral.base, {name: fed_avg.params[name] for name in ("weight", "bias")})
    names = {"weight_lora_A": "a", "weight_lora_B": "b", "bias": "c"}
    assert_close(
        {n: leaf[0] for n, leaf in floral.adapters.items()}, {n: fed_avg.params[m] for n, m in names.items()}
    )


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("kind", ["em", "gradient"])
def test_ensemble_of_one_is_fed_avg(kind, chunk):
    local = LocalTraining(lr=0.1, batch_size=2, epochs=2)
    net = seeded_net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    clients = regression([4, 8, 4, 6])
    ensemble, _ = simulate(Ensemble(1, Router(kind=kind), local), net, clients, rounds=3, chunk=chunk)
    fed_avg, _ = simulate(FedAvg(local), net, clients, rounds=3)
    assert_close(
        {n: leaf[0] for n, leaf in (ensemble.models | ensemble.stats).items()}, fed_avg.params | fed_avg.stats
    )


def test_an_oracle_with_one_group_uses_one_adapter():
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    group = torch.zeros(4, dtype=torch.long)
    three, one = (
        FLoRAL(c, AdapterPlan(2, ("linear",)), ORACLE, LocalTraining(lr=0.1, batch_size=2)) for c in (3, 1)
    )
    start, _ = three.init(net, Population(4, 0, group))
    first = {name: leaf[:1] for name, leaf in start.adapters.items()}
    narrow = replace(one.init(net, Population(4, 0, group))[0], adapters=first)
    wide, _ = simulate(three, net, regression(SIZES), rounds=3, group=group)
    expected, _ = simulate(one, net, regression(SIZES), rounds=3, group=group, shared=narrow)
    assert_close(wide.base, expected.base)
    assert_close({name: leaf[:1] for name, leaf in wide.adapters.items()}, expected.adapters)
    assert all(torch.equal(wide.adapters[name][1:], leaf[1:]) for name, leaf in start.adapters.items())


def test_equal_adapters_are_a_base_with_one_adapter_whatever_the_routes():
    # Σ_c π_c a = a: the answer is that of C = 1.
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    method = FLoRAL(3, AdapterPlan(2), GRADIENT, init_std=0.3)
    shared, fresh = method.init(net, Population(1, 0))
    shared = replace(
        shared, adapters={n: a[:1].repeat(3, *[1] * (a.dim() - 1)) for n, a in shared.adapters.items()}
    )
    x = regression([4])[0][0].unsqueeze(0)
    loss = Loss(method.adapt(net), "mse")
    message = method.send(shared, torch.zeros(1, dtype=torch.long))
    answers = [
        loss.outputs(method.personalize(message, replace(fresh, logits=torch.tensor([logits]).double())), x)
        for logits in ([0.0, 0.0, 0.0], [5.0, -1.0, 0.5])
    ]
    assert_close(*answers)


# Local SGD against PyTorch's.


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.2)])
def test_local_sgd_is_torchs(momentum, weight_decay):
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    local = LocalTraining(lr=0.1, batch_size=2, epochs=3, momentum=momentum, weight_decay=weight_decay)
    examples = Examples.of(regression(SIZES))
    everyone = ClientData(examples, np.arange(4), seed=0, round=1)
    groups = {
        name: {n: p.detach().expand(4, *p.shape) for n, p in net.named_parameters() if n.startswith(start)}
        for name, start in (("bottom", "0"), ("top", "2"))
    }
    loss = Loss(deepcopy(net), "mse")
    trained, means = local_train(
        lambda groups, batch, step: loss(groups["bottom"] | groups["top"], batch),
        groups,
        everyone,
        local,
        {"bottom": 0.1, "top": 0.03},
    )
    for k in range(4):
        alone = deepcopy(net)
        rates = [{"params": alone[0].parameters()}, {"params": alone[2].parameters(), "lr": 0.03}]
        optimizer = torch.optim.SGD(rates, lr=0.1, momentum=momentum, weight_decay=weight_decay)
        losses = []
        for batch in ClientData(examples, np.array([k]), seed=0, round=1).batches(2, epochs=3):
            optimizer.zero_grad()
            losses.append((alone(batch.x[0]) - batch.y[0]).square().mean())
            losses[-1].backward()
            optimizer.step()
        for name, leaf in alone.named_parameters():
            assert_close(trained["bottom" if name.startswith("0") else "top"][name][k], leaf.detach())
        assert_close(means[k].item(), sum(losses).item() / len(losses), rtol=1e-6, atol=0.0)  # kept in float32


# Slow twins: whole rounds of FLoRAL and Ensemble, one client, one adapter and one example order after another.


def merged_answer(base, parts, probs, x):
    """tanh network whose two layers have the explicitly summed weights."""
    for layer in ("0", "2"):
        weight, bias = base[f"{layer}.weight"], base[f"{layer}.bias"]
        for share, part in zip(probs, parts, strict=True):
            weight = weight + share * part[f"{layer}.weight_lora_B"] @ part[f"{layer}.weight_lora_A"]
            bias = bias + share * part[f"{layer}.bias"]
        x = x @ weight.T + bias
        x = torch.tanh(x) if layer == "0" else x
    return x


def mixed_answer(base, parts, probs, x):
    """The sum of the networks' answers."""
    total = 0
    for share, part in zip(probs, parts, strict=True):
        hidden = torch.tanh(x @ part["0.weight"].T + part["0.bias"])
        total = total + share * (hidden @ part["2.weight"].T + part["2.bias"])
    return total


def preconditioned(part, grads):
    """G_B (A Aᵀ + ε I)⁻¹ and (Bᵀ B + ε I)⁻¹ G_A with the factors as they were."""
    for layer in ("0", "2"):
        a, b = f"{layer}.weight_lora_A", f"{layer}.weight_lora_B"
        eye = 1e-5 * torch.eye(len(part[a])).double()
        grads[a] = torch.linalg.inv(part[b].T @ part[b] + eye) @ grads[a]
        grads[b] = grads[b] @ torch.linalg.inv(part[a] @ part[a].T + eye)


def train_slowly(client, data, base, parts, theta, method, answer, round, steps):
    """One client's local epochs by plain autograd; all tensors are changed in place."""
    x, y = data
    local, router = method.local, method.router
    order = generator(0, "batches", round, client)
    level = router.noise * max(0.0, 1 - (round - 1) / router.noise_rounds)
    noise = level * torch.rand(steps, len(parts), generator=generator(0, "router", round, client))
    step = 0
    for _ in range(local.epochs):
        shuffled = torch.randperm(len(y), generator=order)
        for own in shuffled.split(local.batch_size):
            leaves = [*base.values(), *(leaf for part in parts for leaf in part.values()), theta]
            for leaf in leaves:
                leaf.requires_grad_(True)
            probs = torch.softmax(theta + noise[step], 0)
            loss = (answer(base, parts, probs, x[own]) - y[own]).square().mean()
            slopes = iter(torch.autograd.grad(loss, leaves))
            with torch.no_grad():
                for name in base:
                    base[name] -= local.lr * next(slopes)
                for part in parts:
                    grads = {name: next(slopes) for name in part}
                    if isinstance(method, FLoRAL) and method.precondition:
                        preconditioned(part, grads)
                    rate = local.lr * (method.adapter_lr if isinstance(method, FLoRAL) else 1)
                    for name in part:
                        part[name] -= rate * grads[name]
                theta -= router.lr * next(slopes)
            step += 1


def round_slowly(clients, base, parts, thetas, method, answer, round):
    """The server's next (base, parts); `thetas` is changed in place."""
    steps = method.local.epochs * max(-(-len(y) // method.local.batch_size) for _, y in clients)
    n = [len(y) for _, y in clients]
    trained = []
    for k, data in enumerate(clients):
        own_base, own_parts = deepcopy(base), deepcopy(parts)
        train_slowly(k, data, own_base, own_parts, thetas[k], method, answer, round, steps)
        trained.append((own_base, own_parts, torch.softmax(thetas[k].detach(), 0)))
    new_base = {name: sum(n[k] * trained[k][0][name].detach() for k in range(len(n))) / sum(n) for name in base}
    new_parts = []
    for c, part in enumerate(parts):
        weights = [n[k] * trained[k][2][c].item() for k in range(len(n))]
        guard = min(1.0, sum(weights) / sum(n) / method.guard)
        means = {
            name: sum(w * t[1][c][name].detach() for w, t in zip(weights, trained, strict=True)) / sum(weights)
            for name in part
        }
        new_parts.append({name: part[name] + guard * (means[name] - part[name]) for name in part})
    return new_base, new_parts


ROUTER = Router(kind="gradient", lr=0.7, noise=1.0, noise_rounds=4)
STEPS = LocalTraining(lr=0.1, batch_size=2, epochs=2)


@pytest.mark.parametrize(
    "method",
    [
        FLoRAL(3, AdapterPlan(2), ROUTER, STEPS, adapter_lr=0.5, init_std=0.5, guard=0.4),
        FLoRAL(3, AdapterPlan(2, realization="factored"), ROUTER, STEPS, init_std=0.5),
        FLoRAL(
            3, AdapterPlan(2), replace(ROUTER, lr=0.1), replace(STEPS, lr=0.01), init_std=1.0, precondition=True
        ),
        Ensemble(3, ROUTER, STEPS, guard=0.4),
    ],
    ids=["floral", "floral factored", "floral preconditioned", "ensemble"],
)
def test_rounds_are_those_of_a_slow_twin(method):
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    clients = regression(SIZES)
    floral = isinstance(method, FLoRAL)
    start, _ = method.init(net, Population(4, 0))
    base = dict(start.base) if floral else {}
    mixed = start.adapters if floral else start.models
    parts = [{name: leaf[c] for name, leaf in mixed.items()} for c in range(3)]
    thetas = [torch.zeros(3) for _ in clients]
    for round in (1, 2):
        base, parts = round_slowly(
            clients, base, parts, thetas, method, merged_answer if floral else mixed_answer, round
        )
    shared, store = simulate(method, net, clients, rounds=2)
    # The routers' tensors are float32, hence 1e-6.
    close = {"rtol": 1e-6, "atol": 1e-6}
    mixed = shared.adapters if floral else shared.models
    for c in range(3):
        assert_close({name: leaf[c] for name, leaf in mixed.items()}, parts[c], **close)
    if floral:
        assert_close(shared.base, base, **close)
    assert_close(store.rows(np.arange(4)).logits, torch.stack(thetas).detach(), **close)
    assert store.rows(np.arange(4)).logits.abs().min() > 1e-3


# Routers.


def test_the_routers_noise_falls_linearly_to_nothing():
    examples = Examples.of(regression([2, 2]))

    def noise(router, round):
        return router.noise_at(ClientData(examples, np.arange(2), 0, round), 3, 500)

    for round, level in ((1, 2.0), (2, 1.5), (3, 1.0), (4, 0.5)):
        drawn = noise(Router(kind="gradient", noise=2.0, noise_rounds=4), round)
        assert drawn.shape == (2, 500, 3)
        assert 0 <= drawn.min() < 0.05 * level
        assert 0.95 * level < drawn.max() <= level
    assert noise(Router(kind="gradient", noise=2.0, noise_rounds=4), 5) is None
    assert noise(Router(kind="gradient", noise=2.0, noise_rounds=0), 1000).max() > 1.9
    for router in (Router(kind="em"), Router(kind="oracle"), Router(kind="gradient", noise=0.0)):
        assert noise(router, 1) is None


@pytest.mark.parametrize("num_clients", [1, 4])
@pytest.mark.parametrize("method", [FLoRAL(3, AdapterPlan(2), EM, init_std=0.5), Ensemble(3, EM)])
def test_a_client_measures_its_loss_with_each_alone(method, num_clients):
    net = seeded_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    clients = regression(SIZES)[:num_clients]
    shared, _ = method.init(net, Population(num_clients, 0))
    message = method.send(shared, torch.arange(num_clients))
    loss = Loss(method.adapt(net), "mse")
    data = ClientData(Examples.of(clients), np.arange(num_clients), 0, 1)
    if isinstance(method, FLoRAL):
        measured = losses_of(loss, each_alone(message), data).mean
        base, mixed, answer = shared.base, shared.adapters, merged_answer
    else:
        measured = method._losses(loss, message, data).mean
        base, mixed, answer = {}, shared.models, mixed_answer
    parts = [{name: leaf[c] for name, leaf in mixed.items()} for c in range(3)]
    one = torch.ones(1).double()
    expected = [[(answer(base, [part], one, x) - y).square().mean() for part in parts] for x, y in clients]
    assert_close(measured, torch.tensor(expected), check_dtype=False, rtol=1.3e-6, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("method", [FLoRAL(3, AdapterPlan(1), ORACLE), Ensemble(3, ORACLE)])
def test_an_oracle_knows_the_route_of_a_client_that_was_never_trained(method):
    shared, fresh = method.init(line(0.0), Population(3, 0, torch.tensor([0, 2, 1])))
    message = method.send(shared, torch.tensor([2, 1]))
    assert_close(method.mixture(message, tree.rows(fresh, torch.tensor([0, 0]))), torch.eye(3)[[1, 2]])


@pytest.mark.parametrize("method", [FLoRAL(2, AdapterPlan(1), ORACLE), Ensemble(2, ORACLE)])
def test_an_oracle_needs_groups_and_a_route_for_each(method):
    with pytest.raises(RecipeError, match="needs a task with known groups"):
        method.init(line(0.0), Population(3, 0))
    with pytest.raises(RecipeError, match="at least 3"):
        method.init(line(0.0), Population(3, 0, torch.tensor([0, 2, 1])))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FLoRAL(0),
        lambda: FLoRAL(adapter_lr=0.0),
        lambda: FLoRAL(init_std=-0.5),
        lambda: FLoRAL(guard=1.5),
        lambda: Ensemble(0),
        lambda: Ensemble(guard=-0.1),
        lambda: LocalTraining(lr=0.0),
        lambda: LocalTraining(batch_size=0),
        lambda: LocalTraining(epochs=0),
        lambda: LocalTraining(momentum=1.0),
        lambda: LocalTraining(weight_decay=-0.1),
        lambda: Router(noise=-1.0),
        lambda: Router(lr=0.0),
        lambda: Router(temperature=0.0),
        lambda: Router(explore=1.1),
        lambda: Router(explore=-0.1),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(RecipeError):
        make()
