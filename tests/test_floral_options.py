"""FLoRAL's options, each by the property that defines it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simulate import StoppedError, simulate, stop_after
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.adapters.averaging import adapter_sums, averaged, by_rank, factor_error, kept_ranks, truncated
from umbel.adapters.products import products
from umbel.clients import ClientData, Examples
from umbel.cohort import Engine
from umbel.errors import ModelError, RecipeError
from umbel.hazards import Asynchronous
from umbel.methods import Ensemble, FedAvg, FLoRAL, Population
from umbel.methods.floral import each_alone
from umbel.methods.routing import Router, losses_of, moved_share
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import Loss
from umbel.rounds import rounds as rounds_of
from umbel.rounds import start
from umbel.runs import opened, resume, run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.train import LocalTraining

EM, GRADIENT, ORACLE = Router(kind="em"), Router(kind="gradient", noise=0.0, lr=0.5), Router(kind="oracle")
STEPS = LocalTraining(lr=0.05, batch_size=4, epochs=2)
SIZES = [3, 8, 1, 5]
EVERYONE = np.arange(4)
PLAN = AdapterPlan(2, ("linear", "conv", "embedding", "norm", "bias"))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(norm=False):
    """Two linear layers and a convolution, on three numbers."""
    with seeded(0, "test"):
        middle = [nn.LayerNorm(6)] if norm else []
        layers = [nn.Linear(3, 6), *middle, nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(6, 2)).double()


def regression(counts=SIZES):
    return [(drawn(n, 3, seed=2 * k), drawn(n, 2, seed=2 * k + 1)) for k, n in enumerate(counts)]


def worked(method, num_rounds=0, shared=None, logits=None, module=None):
    """What four clients get after so many rounds, what they send and keep; and the server's state before."""
    module = net() if module is None else module
    shared, store = simulate(method, module, regression(), num_rounds, shared=shared)
    message, private = method.send(shared, torch.arange(4)), store.rows(EVERYONE)
    private = private if logits is None else replace(private, logits=logits)
    data = ClientData(Examples.of(regression()), EVERYONE, 0, num_rounds + 1)
    upload, kept = method.client_update(Loss(method.adapt(module), "mse"), message, private, data)
    return shared, message, upload, kept


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


LOGITS = torch.tensor([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.5, 0.2], [0.1, 0.0, 3.0, 0.2], [2.0, 1.0, 0.0, 1.5]])


# The published code's server step and floor under routes.


def test_adapters_go_a_part_of_the_way_that_the_base_goes_whole():
    whole = FLoRAL(2, PLAN, GRADIENT, STEPS, init_std=1.0)
    before, _, upload, _ = worked(whole)
    once, part = (replace(whole, adapter_step=step).server_update(before, [upload]) for step in (1.0, 0.1))
    assert equal(part.base, once.base)
    for name, leaf in before.adapters.items():
        assert_close(part.adapters[name], leaf + 0.1 * (once.adapters[name] - leaf))
        assert not torch.equal(once.adapters[name], leaf)


def test_every_adapter_counts_the_least_share_in_training_and_serving_but_not_in_the_mean():
    floor = FLoRAL(4, PLAN, GRADIENT, STEPS, init_std=1.0, least_prob=0.1)
    _, message, upload, kept = worked(floor, logits=LOGITS)
    _, _, free, moved = worked(replace(floor, least_prob=0.0), logits=LOGITS)
    assert all(not torch.equal(leaf, free.base[name]) for name, leaf in upload.base.items())
    probs = kept.logits.softmax(1)
    assert (probs < 0.1).any()
    assert_close(upload.route_examples, upload.weight.unsqueeze(1) * probs)
    served = floor.personalize(message, kept)
    for part in message.bank.low_rank:
        b, a = (message.adapters[name].flatten(3) for name in (part.b_name, part.a_name))
        if part.name == "0.weight":
            each = message.bank.scale * torch.einsum("kcor,kcri->kcoi", b, a)
            mixture = torch.einsum("kc,kcoi->koi", probs.double().clamp(min=0.1), each)
            assert_close(served[part.name], message.base[part.name] + mixture)
    _, _, _, still = worked(replace(floor, least_prob=0.9), logits=LOGITS)
    assert_close(still.logits, LOGITS)  # below the floor no gradient moves a route
    assert not torch.equal(moved.logits, LOGITS)


def test_extra_biases_begin_as_wide_as_a_layer_of_the_rank_would_and_nothing_else_changes():
    plain, random = (FLoRAL(3, PLAN, bias_start=wide).init(net(True), Population(2, 0))[0] for wide in (0.0, 1.0))
    bank = random.bank
    biases = {f"{part.name.removesuffix('weight')}bias": part for part in bank.low_rank}
    assert len(biases) == 3
    for name, leaf in random.adapters.items():
        if name not in biases:
            assert torch.equal(leaf, plain.adapters[name])
            continue
        bound = (biases[name].rank * int(np.prod(biases[name].b_shape[2:]))) ** -0.5
        assert 0.3 * bound < leaf.abs().max() <= bound
        assert not plain.adapters[name].any()
        assert not torch.equal(leaf[0], leaf[1])


def test_the_first_ranks_alone_may_begin_with_noise_that_is_as_large_together():
    plan = AdapterPlan(4, ("linear",))
    with seeded(0, "wide"):
        wide = nn.Sequential(nn.Linear(300, 400))
    every, one = (FLoRAL(2, plan, init_ranks=n).init(wide, Population(2, 0))[0].adapters for n in (0, 1))
    a, b = "0.weight_lora_A", "0.weight_lora_B"
    assert torch.equal(every[a], one[a])
    assert_close(one[b][:, :, 0], 2 * every[b][:, :, 0])
    assert not one[b][:, :, 1:].any()
    assert_close((one[b] @ one[a]).std(), (every[b] @ every[a]).std(), rtol=0.1, atol=0)
    for same in (4, 9):
        assert torch.equal(FLoRAL(2, plan, init_ranks=same).init(wide, Population(2, 0))[0].adapters[b], every[b])


def test_a_negative_number_of_ranks_is_told():
    with pytest.raises(RecipeError, match="init_ranks = -1"):
        FLoRAL(2, init_ranks=-1)


@pytest.mark.parametrize(
    "wrong", [{"adapter_step": 0.0}, {"adapter_step": 1.5}, {"least_prob": 1.0}, {"bias_start": -1.0}]
)
def test_steps_and_floors_out_of_range_are_told(wrong):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))} = .*, but it must be"):
        FLoRAL(2, **wrong)


# How factors are averaged.

KINDS = {
    "linear": lambda: nn.Linear(5, 7, bias=False),
    "embedding": lambda: nn.Embedding(6, 4),
    "1d": lambda: nn.Conv1d(3, 4, 5),
    "2d": lambda: nn.Conv2d(3, 4, (2, 5)),
    "3d": lambda: nn.Conv3d(2, 3, (2, 3, 4)),
}


def trained(bank, num_clients=3, num_adapters=2):
    """Adapters (K, C, …) and weights (K, C) of some clients."""
    shapes = bank.init(num_adapters, torch.Generator().manual_seed(0), 0.3)
    adapters = {n: drawn(num_clients, *leaf.shape, seed=i) for i, (n, leaf) in enumerate(shapes.items())}
    weights = drawn(num_clients, num_adapters, seed=99).square()
    return adapters, dict.fromkeys(adapters, weights)


def summed(weights):
    """(C,) by the tensors' names."""
    return {name: weight.sum(0) for name, weight in weights.items()}


def mean_of(bank, adapters, weights, how):
    sums = adapter_sums(
        bank, adapters, weights, torch.empty(len(next(iter(weights.values()))), 0), how != "factor"
    )
    return averaged(bank, sums, summed(weights), how)


def error_of(bank, adapters, weights):
    same_ranks = torch.empty(len(next(iter(weights.values()))), 0)
    sums = adapter_sums(bank, adapters, weights, same_ranks, True)
    return factor_error(bank, sums, summed(weights))


def mean_product(part, adapters, weights, remainder=None):
    """(C, rows, columns) by a loop over clients."""
    dense = products_of(part, adapters)
    return torch.stack(
        [sum(w * d for w, d in zip(weights[:, c], dense[:, c], strict=True)) for c in range(weights.shape[1])]
    ) / weights.sum(0).view(-1, 1, 1)


def products_of(part, adapters):
    """(K, C, rows, columns) Σ_j B[o, j, s_B] A[j, i, s_A], with rows (o, s_B) and columns (i, s_A)."""
    a, b = adapters[part.a_name], adapters[part.b_name]
    return torch.einsum("...rj,...jc->...rc", b.movedim(3, -1).flatten(2, -2), a.flatten(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["balanced", "in"])
def test_product_averaging_is_the_nearest_adapter_to_the_mean_product(kind, split):
    bank = replace(PLAN, conv=split).bank(KINDS[kind]().double())
    adapters, weights = trained(bank)
    (part,) = bank.low_rank
    mean = mean_of(bank, adapters, weights, "product")
    exact = mean_product(part, adapters, weights[part.a_name])
    for c in range(2):
        u, s, v = np.linalg.svd(exact[c].numpy())
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        assert_close(products(bank, mean)[part.name][c], torch.tensor(nearest))
    for update in bank.additive:
        plain = mean_of(bank, adapters, weights, "factor")
        assert torch.equal(mean[update.name], plain[update.name])


@pytest.mark.parametrize("same", ["a_name", "b_name"])
def test_product_averaging_is_exact_if_the_mean_product_has_that_rank(same):
    bank = PLAN.bank(net())
    adapters, weights = trained(bank)
    for part in bank.low_rank:
        adapters[getattr(part, same)] = adapters[getattr(part, same)][:1].expand_as(adapters[getattr(part, same)])
    mean = mean_of(bank, adapters, weights, "product")
    for part in bank.low_rank:
        exact = mean_product(part, adapters, weights[part.a_name])
        assert_close(products(bank, mean)[part.name], exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["balanced", "in", "out"])
def test_factors_and_what_they_miss_are_the_mean_product(kind, split):
    layer = KINDS[kind]().double()
    bank = replace(PLAN, conv=split).bank(layer)
    adapters, weights = trained(bank)
    (part,) = bank.low_rank
    mean = mean_of(bank, adapters, weights, "delta")
    assert mean[part.name].shape == (2, *layer.weight.shape)
    whole = part.weight_of(products(bank, mean)[part.name]) + mean[part.name]
    assert_close(whole, part.weight_of(mean_product(part, adapters, weights[part.a_name])))


@pytest.mark.parametrize("num_adapters", [1, 3])
def test_with_product_averaging_the_servers_adapters_are_nearest_to_the_clients_mean(num_adapters):
    method = FLoRAL(num_adapters, PLAN, GRADIENT, STEPS, averaging="product", guard=0.0)
    shared, _, upload, _ = worked(method, 1)
    after = method.server_update(shared, iter([upload]))
    found = products(shared.bank, after.adapters)
    for part in shared.bank.low_rank:
        exact = mean_product(part, upload.adapters, upload.route_examples.double())
        u, s, v = torch.linalg.svd(exact)
        assert_close(found[part.name], (u[..., :2] * s[..., None, :2]) @ v[..., :2, :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_adapters", [1, 3])
def test_with_delta_averaging_a_personal_model_is_the_exact_mean_round_after_round(num_adapters):
    plan = replace(PLAN, scale=0.5, realization="factored")
    method = FLoRAL(num_adapters, plan, GRADIENT, STEPS, averaging="delta", guard=0.0)
    module = net()
    shared, fresh = method.init(module, Population(4, 0))
    private = tree.rows(fresh, torch.zeros(4, dtype=torch.long))
    probs = drawn(1, num_adapters).softmax(1)
    for round in (1, 2, 3):
        message = method.send(shared, torch.arange(4))
        data = ClientData(Examples.of(regression()), EVERYONE, 0, round)
        upload, private = method.client_update(Loss(method.adapt(module), "mse"), message, private, data)
        shared, before = method.server_update(shared, iter([upload])), shared
        one = method.send(shared, torch.arange(1))
        served = method.personalize(one, replace(tree.rows(fresh, torch.tensor([0])), logits=probs.log()))
        missed = 0.0
        for part in shared.bank.low_rank:
            w = upload.route_examples.double()
            exact = part.weight_of(mean_product(part, upload.adapters, w)) + before.remainder[part.name]
            expected = shared.base[part.name] + 0.5 * torch.einsum("c,c...->...", probs[0], exact)
            # Sums of n π are float32.
            assert_close(served[part.name][0], expected, rtol=1e-6, atol=1e-7)
            missed += shared.remainder[part.name].abs().max()
        assert missed > 1e-5


@pytest.mark.parametrize("averaging", ["factor", "product", "delta"])
@pytest.mark.parametrize("step", [{"adapter_step": 0.5}, {"server": ServerOptimizer(lr=0.5)}, {"guard": 1.0}])
def test_what_clients_send_back_as_it_was_stays_as_it_was(averaging, step):
    # Of an SVD's factors the old ones are another basis: half of the way between the two is another adapter.
    method = FLoRAL(3, PLAN, GRADIENT, STEPS, init_std=1.0, averaging=averaging, **step)
    shared, message, upload, _ = worked(method, 1)
    for _ in range(3):
        message = method.send(shared, torch.arange(4))
        other = {part.a_name: 2.0 for part in shared.bank.low_rank} | {
            part.b_name: 0.5 for part in shared.bank.low_rank
        }
        turned = {name: leaf * other.get(name, 1.0) for name, leaf in message.adapters.items()}
        back = turned if averaging == "product" else message.adapters
        if averaging == "delta":  # the same products in other factors, of every other client
            back = {
                n: torch.where((torch.arange(4) % 2 == 0).view(-1, *[1] * (x.dim() - 1)), x, turned[n])
                for n, x in back.items()
            }
        before = whole(shared)
        shared = method.server_update(shared, iter([replace(upload, adapters=back)]))
        for name, matrix in whole(shared).items():
            assert_close(matrix, before[name], rtol=1e-6, atol=1e-9)


def whole(shared):
    """What each adapter adds to its weights, without the bank's scale."""
    dense = products(shared.bank, shared.adapters)
    return {p.name: p.weight_of(dense[p.name]) + shared.remainder.get(p.name, 0) for p in shared.bank.low_rank}


@pytest.mark.parametrize("averaging", ["product", "delta"])
def test_products_take_no_memory_of_factors(averaging):
    with pytest.raises(RecipeError, match=r"server\.kind = 'sgd' only: 'adam' remembers how factors moved"):
        FLoRAL(averaging=averaging, server=ServerOptimizer("adam", lr=0.01))


def test_delta_averaging_keeps_a_dense_remainder_of_every_adapter():
    method = FLoRAL(3, PLAN, GRADIENT, STEPS, averaging="delta")
    shared, message, upload, _ = worked(method, 1)
    shapes = {part.name: (3, *part.shape) for part in shared.bank.low_rank}
    assert {name: tuple(leaf.shape) for name, leaf in shared.remainder.items()} == shapes
    sizes, plain = tree.group_bytes(message), tree.group_bytes(upload)
    assert sizes["remainder"] == 8 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert "remainder" not in plain  # it is the server's alone


def test_the_averaging_error_is_what_averaging_factors_gets_wrong():
    method = FLoRAL(2, PLAN, GRADIENT, STEPS, report_error=True)
    shared, _, upload, _ = worked(method, 1)
    after = method.server_update(shared, iter([upload]))
    w = upload.route_examples.double()
    wrong = whole = 0.0
    for part in shared.bank.low_rank:
        exact = mean_product(part, upload.adapters, w)
        means = {
            name: torch.einsum("kc,kc...->c...", w / w.sum(0), upload.adapters[name]).unsqueeze(0)
            for name in (part.a_name, part.b_name)
        }
        wrong += (exact - products_of(part, means)[0]).square().sum()
        whole += exact.square().sum()
    assert_close(after.figures["averaging_error"], (wrong / whole).sqrt().float(), rtol=1e-5, atol=0.0)
    assert after.figures["averaging_error"] > 1e-4
    # It is only looked at: what the server does stays as it was.
    blind = replace(method, report_error=False)
    quiet = blind.server_update(replace(shared, figures={}), iter([upload]))
    assert equal(quiet.adapters, after.adapters)
    assert quiet.figures == {}


def test_one_client_has_no_averaging_error():
    bank = PLAN.bank(net())
    adapters, weights = trained(bank, num_clients=1)
    assert error_of(bank, adapters, weights) < 1e-12
    unused = dict.fromkeys(weights, torch.tensor([[1.0, 0.0]]).double())
    assert error_of(bank, adapters, unused) < 1e-12


def test_the_averaging_error_is_among_a_runs_figures():
    task = Task("test", net(), "mse", Examples.of(regression()), Examples.of(regression()))
    history = run(task, FLoRAL(2, PLAN, GRADIENT, STEPS, report_error=True), rounds=2).history
    assert all(0 < line["averaging_error"] < 1 for line in history)


# Ranks that differ from client to client.

RANKS = FLoRAL(
    2,
    AdapterPlan(4, targets=("0.*", "3.*"), realization="merged"),
    GRADIENT,
    STEPS,
    ranks=(1.0, 0.5, 0.1),
    guard=0.0,
)


def wide():
    with seeded(0, "test"):
        layers = [nn.Linear(5, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 2)).double()


def wide_worked(method, num_rounds=0, shared=None):
    clients = [(drawn(n, 5, seed=2 * k), drawn(n, 2, seed=2 * k + 1)) for k, n in enumerate(SIZES)]
    module = wide()
    shared, store = simulate(method, module, clients, num_rounds, shared=shared)
    message, private = method.send(shared, torch.arange(4)), store.rows(EVERYONE)
    data = ClientData(Examples.of(clients), EVERYONE, 0, num_rounds + 1)
    upload, _ = method.client_update(Loss(method.adapt(module), "mse"), message, private, data)
    return shared, message, upload


def test_a_client_has_at_least_one_rank_and_at_most_all():
    (part,) = AdapterPlan(4).bank(nn.Linear(5, 6, bias=False)).low_rank
    kept = kept_ranks(part, torch.tensor([1.0, 0.5, 0.1, 0.75]))
    assert kept.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize("realization", ["merged", "factored"])
@pytest.mark.parametrize("precondition", [False, True])
def test_a_client_trains_its_share_of_the_rank_and_the_rest_stays_zero(realization, precondition):
    plan = replace(RANKS.adapter, realization=realization)
    method = replace(RANKS, adapter=plan, precondition=precondition, local=replace(STEPS, lr=0.01, momentum=0.5))
    shared, message, upload = wide_worked(method, 1)
    for part in shared.bank.low_rank:
        for k, count in enumerate([4, 2, 1, 4]):  # client 3 has the first share again
            for tensors in (message.adapters, upload.adapters):
                a, b = tensors[part.a_name][k], tensors[part.b_name][k]
                assert not a[:, count:].any()
                assert not b[:, :, count:].any()
                assert a[:, :count].flatten(2).any(2).all()
            assert not torch.equal(upload.adapters[part.a_name][k], message.adapters[part.a_name][k])


def test_a_row_is_the_mean_over_the_clients_who_have_it():
    shared, _, upload = wide_worked(RANKS, 1)
    after = RANKS.server_update(shared, iter([upload]))
    w = upload.route_examples.double()
    have = {0: [0, 1, 2, 3], 1: [0, 1, 3], 2: [0, 3], 3: [0, 3]}
    for part in shared.bank.low_rank:
        for j, who in have.items():
            for c in range(2):
                total = sum(w[k, c] for k in who)
                a = sum(w[k, c] * upload.adapters[part.a_name][k, c, j] for k in who) / total
                b = sum(w[k, c] * upload.adapters[part.b_name][k, c, :, j] for k in who) / total
                assert_close(after.adapters[part.a_name][c, j], a, rtol=1e-6, atol=1e-7)
                assert_close(after.adapters[part.b_name][c, :, j], b, rtol=1e-6, atol=1e-7)
    for update in shared.bank.additive:  # everyone has all of these
        mean = torch.einsum("kc,kc...->c...", w / w.sum(0), upload.adapters[update.name])
        assert_close(after.adapters[update.name], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("guard", [0.0, 0.01])
@pytest.mark.parametrize(
    ("use", "row", "guarded"),
    # Of 20 examples .2 and .01 are its holder's: shares .01 and 5e-4, steps 1 and .05 of the way from 1 to 5.
    [(0.02, 5.0, 5.0), (1e-3, 5.0, 1.2), (1e-35, 1.0, 1.0), (1e-40, 1.0, 1.0), (0.0, 1.0, 1.0)],
)
def test_a_row_whose_holders_hardly_use_the_adapter_hardly_moves(use, row, guarded, guard):
    bank = AdapterPlan(rank=2, layers=("linear",)).bank(nn.Linear(4, 4, bias=False))
    (part,) = bank.low_rank
    old = {part.a_name: torch.ones(1, 2, 4), part.b_name: torch.ones(1, 4, 2)}
    shares = torch.tensor([0.5, 1.0])  # client 1 alone has the second rank
    sent = truncated(bank, {n: torch.cat([leaf, 5 * leaf])[:, None] for n, leaf in old.items()}, shares)
    weights = dict.fromkeys(sent, torch.tensor([[10.0], [10.0 * use]]))
    sums = adapter_sums(bank, sent, weights, shares, False)
    used = by_rank(bank, summed(weights), sums)
    steps = {n: moved_share(used[n], torch.tensor(20.0), guard) for n in old}
    server = ServerOptimizer()
    after, _ = server.step(old, averaged(bank, sums, used, "factor"), server.init(old), steps)
    assert_close(after[part.a_name][0, 1], torch.full((4,), guarded if guard else row))
    assert_close(after[part.b_name][0, :, 1], torch.full((4,), guarded if guard else row))


def test_rows_that_nobody_has_stay_bit_for_bit():
    method = replace(RANKS, ranks=(0.5, 0.25), guard=0.01)
    begin, _, _ = wide_worked(method)
    after, _, _ = wide_worked(method, 2)
    for part in begin.bank.low_rank:
        for name, axis in ((part.a_name, 1), (part.b_name, 2)):
            old, new = (shared.adapters[name].split(2, axis) for shared in (begin, after))
            assert torch.equal(old[1], new[1])
            assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize("norm", [False, True], ids=["", "running statistics"])
def test_clients_of_unequal_ranks_are_routed_by_what_they_have(norm):
    # All have the same examples, but not the same adapters.
    module = nn.Sequential(wide(), nn.BatchNorm1d(2).double()) if norm else wide()
    plan = AdapterPlan(4, targets=("0.0.*", "0.3.*") if norm else ("0.*", "3.*"))
    method = replace(RANKS, router=EM, init_std=1.0, adapter=plan)
    clients = [(drawn(4, 5), drawn(4, 2, seed=1))] * 4
    shared, store = simulate(method, module, clients, 2)
    message, private = method.send(shared, torch.arange(4)), store.rows(EVERYONE)
    loss = Loss(method.adapt(module), "mse")
    data = ClientData(Examples.of(clients), EVERYONE, 0, 3)
    found = method._losses(loss, message, private.stats, data).mean
    for k in range(4):
        alone = each_alone(tree.rows(message, torch.tensor([k])))
        stats = {name: leaf[k : k + 1] for name, leaf in private.stats.items()}
        assert_close(found[k], losses_of(loss, alone, data.among(torch.tensor([k])), 1, stats).mean[0])
    assert (found[0] - found[1]).abs().min() > 1e-3
    assert (found[1] - found[2]).abs().min() > 1e-3


# A router for every layer.


def test_the_layers_logits_take_steps_that_sum_to_that_of_one_router_for_all():
    # From equal logits the gradient of one router for all layers is the sum of the layers' gradients.
    one_step = LocalTraining(lr=0.05, batch_size=8)
    method = FLoRAL(4, PLAN, GRADIENT, one_step)
    _, _, _, kept = worked(method)
    _, _, _, by_layer = worked(replace(method, layer_routers=True))
    assert by_layer.logits.shape == (4, 3, 4)
    assert_close(by_layer.logits.sum(1), kept.logits)
    assert (by_layer.logits[:, 0] - by_layer.logits[:, 1]).abs().max() > 1e-4


def test_layer_routers_of_a_single_adapted_layer_are_the_routers_of_plain_floral():
    method = FLoRAL(3, replace(PLAN, targets=("0.*",)), replace(GRADIENT, noise=1.0), STEPS)
    layered = replace(method, layer_routers=True)
    (plain, _, upload, kept), (shared, _, other, by_layer) = worked(method, 2), worked(layered, 2)
    assert equal(plain.adapters, shared.adapters)
    assert torch.equal(kept.logits, by_layer.logits[:, 0])
    assert equal(upload.adapters, other.adapters)
    assert torch.equal(upload.route_examples, other.route_examples[:, 0])


def test_equal_routers_of_all_layers_serve_what_one_router_serves():
    method = FLoRAL(4, PLAN, GRADIENT, STEPS)
    layered = replace(method, layer_routers=True)
    _, message, _, kept = worked(method, 1)
    same = method.personalize(message, replace(kept, logits=LOGITS))
    wide = replace(kept, logits=LOGITS.unsqueeze(1).expand(4, 3, 4))
    assert_close(layered.personalize(message, wide), same)
    assert_close(layered.mixture(message, wide), LOGITS.softmax(1))


def test_each_layers_adapters_are_averaged_by_that_layers_routes_and_the_mixture_is_the_mean_of_all():
    method = FLoRAL(4, PLAN, GRADIENT, STEPS, layer_routers=True, guard=0.0)
    logits = drawn(4, 3, 4).float()
    shared, message, upload, kept = worked(method, 1, logits=logits)
    probs = kept.logits.softmax(-1)
    assert_close(method.mixture(message, kept), probs.mean(1))
    after = method.server_update(shared, iter([upload]))
    assert shared.bank.layers == ("0", "3", "5")
    for name, leaf in upload.adapters.items():
        layer = {"0": 0, "3": 1, "5": 2}[name.partition(".")[0]]
        w = (torch.tensor(SIZES).unsqueeze(1) * probs[:, layer]).double()
        mean = torch.einsum("kc,kc...->c...", w / w.sum(0), leaf)
        assert_close(after.adapters[name], mean, rtol=1e-6, atol=1e-7)
    share = (torch.tensor(SIZES).unsqueeze(1) * probs.mean(1)).sum(0) / sum(SIZES)
    assert_close(after.routes.share, share)
    assert after.routes.spread.shape == after.routes.unevenness.shape == ()


# Uploads of the heaviest adapters only.


@pytest.mark.parametrize("layer_routers", [False, True])
def test_only_the_heaviest_adapters_are_sent(layer_routers):
    method = FLoRAL(4, PLAN, GRADIENT, STEPS, send_top=2, guard=0.0, layer_routers=layer_routers)
    logits = LOGITS.unsqueeze(1).expand(4, 3, 4) if layer_routers else LOGITS
    everything = replace(method, send_top=0)
    shared, message, _, kept = worked(method, 1, logits=logits)
    data = ClientData(Examples.of(regression()), EVERYONE, 0, 2)
    private = replace(kept, logits=logits)
    loss = Loss(method.adapt(net()), "mse")
    upload, kept = method.client_update(loss, message, private, data)
    whole, all_kept = everything.client_update(loss, message, private, data)
    assert torch.equal(kept.logits, all_kept.logits)
    weights = all_kept.logits.softmax(-1)
    heavy = (weights.mean(1) if layer_routers else weights).argsort(1, descending=True)[:, :2].sort(1).values
    assert torch.equal(upload.sent, heavy)
    for name, leaf in upload.adapters.items():
        for k in range(4):
            assert torch.equal(leaf[k], whole.adapters[name][k, heavy[k]])
    sizes = [tree.row_bytes(u.adapters) for u in (upload, whole)]
    assert 2 * sizes[0] == sizes[1]
    assert tree.row_bytes(upload) < tree.row_bytes(whole)
    # The server does what it would with everything, had the others no weight.
    mask = torch.zeros(4, 4).scatter(1, heavy, 1.0)
    mask = mask.unsqueeze(1) if layer_routers else mask
    zeroed = replace(whole, route_examples=whole.route_examples * mask)
    after, expected = (m.server_update(shared, iter([u])) for m, u in ((method, upload), (everything, zeroed)))
    assert equal(tree.tensors(after), tree.tensors(expected))


def test_sending_as_many_as_there_are_is_sending_all():
    for count in (4, 9):
        method = FLoRAL(4, PLAN, GRADIENT, STEPS, send_top=count)
        plain, _ = simulate(replace(method, send_top=0), net(), regression(), 2)
        shared, _ = simulate(method, net(), regression(), 2)
        assert equal(tree.tensors(shared), tree.tensors(plain))


# Spare adapters are pruned.


def opposite(num_clients=8):
    """Two groups whose targets are x W and −x W."""
    draw = torch.Generator().manual_seed(0)
    w, group = torch.randn(4, 2, generator=draw), torch.arange(num_clients) % 2

    def examples(count):
        x = torch.randn(num_clients, count, 4, generator=draw)
        return Examples.of([(x[k], x[k] @ w * (1 - 2 * group[k])) for k in range(num_clients)])

    with seeded(0, "test"):
        module = nn.Linear(4, 2)
    return Task("opposite", module, "mse", examples(12), examples(20), group)


PRUNING = FLoRAL(4, AdapterPlan(1), EM, LocalTraining(lr=0.1, batch_size=6), prune_below=0.1, restart_below=0.0)
STACKED = Engine(mode="stacked", chunk=3)


def pruned(method=PRUNING, num_rounds=15):
    """The progress of a run after each of its rounds."""
    task, schedule = opposite(), Schedule(rounds=num_rounds, evaluate_every=num_rounds)
    cohort, at = start(task, method, schedule, STACKED)
    return cohort, list(rounds_of(cohort, at, task, schedule))


@pytest.mark.parametrize("averaging", ["factor", "delta"])
def test_what_travels_shrinks_once_routes_have_settled_and_pruned_adapters_never_come_back(averaging):
    cohort, progress = pruned(replace(PRUNING, averaging=averaging))
    alive = [at.shared.alive.tolist() for at in progress]
    assert all(own == [0, 1, 2, 3] for own in alive[:9])  # two thirds of 15 rounds
    assert all(set(later) <= set(now) for now, later in pairwise(alive))
    assert len(alive[-1]) == 2
    for key in ("bytes_up", "bytes_down", "flops"):
        # Bytes and work of a round are of what the server had at its beginning.
        assert {at.figures[key] for at in progress[:9]} == {progress[0].figures[key]}
        assert progress[-1].figures[key] < progress[0].figures[key]
    last = progress[-1]
    message = cohort.method.send(last.shared, torch.arange(8))
    assert all(leaf.shape[1] == 2 for leaf in (message.adapters | message.remainder).values())
    assert last.figures["bytes_down"] == 8 * tree.row_bytes(message)
    assert last.figures["steps"] == progress[0].figures["steps"]
    assert last.figures["nmi"] == pytest.approx(1)
    assert last.figures["dead"] == 0  # those that were pruned are no dead ones
    gone = [c for c in range(4) if c not in alive[-1]]
    assert not last.scores.mixture[:, gone].any()
    np.testing.assert_allclose(last.scores.mixture.sum(1), 1, rtol=1e-6)
    assert all(bool(leaf.isfinite().all()) for leaf in tree.tensors(last.shared).values())
    first = next(i for i, own in enumerate(alive) if len(own) == 2)
    for name, leaf in last.shared.adapters.items():  # what is pruned rests
        assert torch.equal(leaf[gone], progress[first].shared.adapters[name][gone])


def test_a_pruned_adapter_is_looked_at_by_nobody():
    cohort, progress = pruned()
    shared, store = progress[-1].shared, progress[-1].store
    gone = [c for c in range(4) if c not in shared.alive]
    spoilt = {name: leaf.clone() for name, leaf in shared.adapters.items()}
    for leaf in spoilt.values():
        leaf[gone] = float("nan")
    other = replace(shared, adapters=spoilt)
    everyone = np.arange(8)
    (params, mixture), (same, as_well) = (
        cohort.served(s, store.rows(everyone), everyone) for s in (shared, other)
    )
    assert equal(params, same)
    assert torch.equal(mixture, as_well)
    (upload, kept), (twin, kept_too) = (cohort.update(s, store, everyone, 16) for s in (shared, other))
    assert equal(tree.tensors(upload), tree.tensors(twin))
    assert equal(tree.tensors(kept), tree.tensors(kept_too))
    after, too = (cohort.method.server_update(s, iter([upload])) for s in (shared, other))
    assert all(
        torch.equal(leaf[after.alive], too.adapters[name][after.alive]) for name, leaf in after.adapters.items()
    )


def test_a_pruned_adapter_counts_as_an_average_one_in_what_clients_measure():
    # It is neither the best nor does it move the mean of the losses, whose spread is the temperature's unit.
    cohort, progress = pruned()
    shared, store, everyone = progress[-1].shared, progress[-1].store, np.arange(8)
    upload, _ = cohort.update(shared, store, everyone, 16)
    message = cohort.method.send(shared, torch.arange(8))
    losses = losses_of(cohort.loss, each_alone(message), ClientData(cohort.train, everyone, 0, 16)).mean
    assert losses.shape == (8, 2)
    assert_close(upload.measured.spread, 12 * (losses.mean(1) - losses.min(1).values))
    gone = [c for c in range(4) if c not in shared.alive]
    assert_close(upload.measured.label_losses[:, 0, gone], 12 * losses.mean(1, keepdim=True).expand(8, 2))


def test_the_heaviest_stays_whatever_is_pruned():
    _, progress = pruned(replace(PRUNING, prune_below=0.99))
    last = progress[-1].shared
    assert last.alive.tolist() == [int(last.routes.share.argmax())]


@pytest.mark.parametrize("stop", [7, 10, 11, 13])
def test_a_run_stopped_before_or_after_pruning_goes_on_bit_for_bit(tmp_path, stop):
    task, schedule = opposite(), Schedule(rounds=15, evaluate_every=5, checkpoint_every=1)
    whole = run(task, PRUNING, schedule=schedule, engine=STACKED, folder=tmp_path / "whole")
    assert len(whole.progress.shared.alive) == 2

    with pytest.raises(StoppedError):
        run(task, PRUNING, schedule=schedule, engine=STACKED, folder=tmp_path / "cut", on_round=stop_after(stop))
    assert opened(tmp_path / "cut", task, PRUNING).progress.round == stop
    resume(tmp_path / "cut", task, PRUNING)
    last = [tmp_path / name / "checkpoints/000015.safetensors" for name in ("whole", "cut")]
    assert last[0].read_bytes() == last[1].read_bytes()


# Routes are explored with more ranks.

WIDE = FLoRAL(2, AdapterPlan(1), EM, LocalTraining(lr=0.1, batch_size=6), explore_rank=2)


def two_layers():
    task = opposite()
    with seeded(0, "test"):
        module = nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
        )
    return replace(task, model=module)


def explored(method=WIDE, num_rounds=12, **settings):
    task, schedule = two_layers(), Schedule(rounds=num_rounds, evaluate_every=num_rounds)
    cohort, at = start(task, replace(method, **settings), schedule, STACKED)
    return cohort, list(rounds_of(cohort, at, task, schedule))


@pytest.mark.parametrize("averaging", ["factor", "product", "delta"])
@pytest.mark.parametrize("router", [EM, ORACLE])
def test_once_explored_adapters_are_the_nearest_of_their_rank_and_stay_so(router, averaging):
    own = {"router": router, "averaging": averaging}
    (cohort, progress), (_, wide) = explored(**own), explored(adapter=AdapterPlan(2), explore_rank=0, **own)
    for now, other in zip(progress[:3], wide[:3], strict=True):  # of 12 rounds the first four explore
        assert equal(now.shared.adapters, other.shared.adapters)
        assert now.figures["bytes_up"] == other.figures["bytes_up"]
    bank = wide[3].shared.bank
    whole, cut = (products(bank, at.shared.adapters) for at in (wide[3], progress[3]))
    for name, matrix in whole.items():
        u, s, v = torch.linalg.svd(matrix)
        assert_close(cut[name], s[:, :1, None] * u[..., :1] @ v[:, :1], rtol=1e-4, atol=1e-5)
    for at in progress[3:]:
        for part in bank.low_rank:
            assert not at.shared.adapters[part.a_name][:, 1:].any()
            assert not at.shared.adapters[part.b_name][:, :, 1:].any()
            assert at.shared.adapters[part.a_name][:, 0].any()
    _, least = explored(explore_rank=0, **own)
    for key in ("bytes_up", "bytes_down", "flops"):
        assert [at.figures[key] for at in progress[4:]] == [at.figures[key] for at in least[4:]]
        assert progress[3].figures[key] == progress[0].figures[key] > progress[4].figures[key]
    message = cohort.method.send(progress[-1].shared, torch.arange(8))
    assert {n: leaf.shape for n, leaf in message.adapters.items()} in [
        {n: leaf.shape for n, leaf in cohort.method.send(later, torch.arange(8)).adapters.items()}
        for later in cohort.method.later(progress[0].shared)
    ]


def test_cut_adapters_have_no_momentum():
    _, progress = explored(server=ServerOptimizer("adam", lr=0.01))
    before, after = (progress[place].shared.moments["adapters"] for place in (2, 3))
    assert any(leaf.any() for leaf in before.first.values())
    assert not any(leaf.any() for leaf in after.first.values())
    assert int(after.rounds) == 0
    assert int(progress[4].shared.moments["adapters"].rounds) == 1


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_stopped_where_adapters_are_cut_goes_on_bit_for_bit(tmp_path, stop):
    task, schedule = two_layers(), Schedule(rounds=12, evaluate_every=6, checkpoint_every=1)
    run(task, WIDE, schedule=schedule, engine=STACKED, folder=tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(task, WIDE, schedule=schedule, engine=STACKED, folder=tmp_path / "cut", on_round=stop_after(stop))
    resume(tmp_path / "cut", task, WIDE)
    last = [tmp_path / name / "checkpoints/000012.safetensors" for name in ("whole", "cut")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_more_ranks_to_explore_with_than_a_layer_has_are_refused_by_name():
    with pytest.raises(ModelError, match=r"floral, with explore_rank: adapter\.rank = 9 is larger than"):
        replace(WIDE, explore_rank=9).init(net(), Population(4, 0))


def test_fewer_ranks_to_explore_with_than_to_keep_are_refused():
    with pytest.raises(RecipeError, match=r"less than the 2 of adapter\.rank"):
        replace(WIDE, adapter=AdapterPlan(2), explore_rank=1).init(net(), Population(4, 0))
    late = Schedule(rounds=4, asynchronous=Asynchronous(buffer=2))
    with pytest.raises(RecipeError, match=r"asynchronous\.buffer does not go with explore_rank"):
        start(opposite(), WIDE, late, STACKED)


# Dead adapters start anew.


def dying(method, num_rounds=1, dead=2):
    """The server after a round in which nobody used one of its adapters; and after the same without a restart."""
    shared, _, upload, _ = worked(method, num_rounds)
    routed = torch.tensor([[1.0, 5.0, 2.0, 1.0]]).repeat(4, 1)
    routed[:, dead] = 0.0
    upload = replace(upload, route_examples=routed)
    plain = replace(method, restart_below=0.0)
    return shared, method.server_update(shared, iter([upload])), plain.server_update(shared, iter([upload]))


def test_adapters_of_a_pretrained_model_start_close_to_it():
    # √rank · s · the standard deviation of B: 0.3 where the base is trained too, a third of it with PEFT.
    module = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 8)).requires_grad_(False)
    for plan, expected in (
        (AdapterPlan(8, scale=2.0), 0.3),
        (AdapterPlan(peft={"r": 8, "lora_alpha": 32, "target_modules": ["0"]}), 0.1),
    ):
        method = FLoRAL(8, plan)
        shared, _ = method.init(module, Population(2, 0))
        scale = 2.0 if expected == 0.3 else 4.0
        b = next(leaf for name, leaf in shared.adapters.items() if "lora_B" in name)
        assert float(b.std()) * 8**0.5 * scale == pytest.approx(expected, rel=0.05), plan
        asked = replace(method, init_std=0.6)
        assert asked.b_std(shared.bank) == 0.6


RESTARTING = FLoRAL(4, PLAN, EM, STEPS, init_std=0.1, restart_below=0.04)


@pytest.mark.parametrize("averaging", ["factor", "delta"])
def test_a_dead_adapter_becomes_one_near_the_heaviest(averaging):
    method = replace(RESTARTING, averaging=averaging)
    _, after, plain = dying(method)
    for name, leaf in after.adapters.items():
        assert torch.equal(leaf[[0, 1, 3]], plain.adapters[name][[0, 1, 3]])
        if "lora" in name:
            assert 0 < (leaf[2] - leaf[1]).abs().max() < 0.1 * (6**0.5 + 1e-6)  # of U(−√(6/fan_in), …)
    for leaf in after.remainder.values():
        assert torch.equal(leaf[2], leaf[1])
        assert leaf[1].any()
    assert after.routes.share[2] == 0.25
    assert after.routes.balance[2] == 0
    assert torch.equal(after.routes.share[[0, 1, 3]], plain.routes.share[[0, 1, 3]])


@pytest.mark.parametrize(
    ("settings", "share", "restarted"),
    [
        ({}, 0.2, True),  # of an even share
        ({}, 0.4, False),
        ({"restart_below": 0.5}, 0.4, True),
        ({"restart_below": 0.0}, 0.0, False),
        ({"router": GRADIENT}, 0.0, False),
        ({"router": Router(explore=0.0)}, 0.0, False),
        ({"send_top": 4}, 0.0, False),
    ],
)
def test_an_adapter_that_too_few_use_starts_anew(settings, share, restarted):
    method = FLoRAL(4, PLAN, **{"router": EM, "local": STEPS} | settings)
    shared, _, upload, _ = worked(method, 0)
    routed = torch.tensor([[1.0, 1.0, share, 2.0 - share]]).repeat(4, 1)
    after = method.server_update(shared, iter([replace(upload, route_examples=routed)]))
    assert (abs(float(after.routes.share[2]) - 0.25) < 1e-6) == restarted


def test_restarts_are_of_the_runs_seed():
    shared, after, _ = dying(RESTARTING)
    other = replace(shared, seed=shared.seed + 1)
    routed = torch.tensor([[1.0, 5.0, 0.0, 1.0]]).repeat(4, 1)
    upload = replace(worked(RESTARTING, 1)[2], route_examples=routed)
    again, another = (RESTARTING.server_update(own, iter([upload])) for own in (shared, other))
    name = next(name for name in after.adapters if "lora" in name)
    assert torch.equal(again.adapters[name][2], after.adapters[name][2])
    assert not torch.equal(another.adapters[name][2], after.adapters[name][2])


def test_without_spread_none_starts_anew_for_a_copy_would_stay_one():
    _, after, plain = dying(replace(RESTARTING, init_std=0.0))
    assert all(torch.equal(leaf, plain.adapters[name]) for name, leaf in after.adapters.items())
    assert after.routes.share[2] == 0


def test_the_heaviest_and_seeds_never_start_anew():
    shared, _, upload, _ = worked(RESTARTING, 1)
    routed = torch.tensor([[1e-3, 4e-3, 0.0, 1e-3]]).repeat(4, 1)  # as noise on the sums may have it
    after = RESTARTING.server_update(shared, iter([replace(upload, route_examples=routed)]))
    assert after.routes.share[1] < 0.01
    dead = torch.tensor([[0.0, 5.0, 0.0, 1.0]]).repeat(4, 1)
    seeded = replace(shared, bank=replace(shared.bank, seeds=({},)))
    after = RESTARTING.server_update(seeded, iter([replace(upload, route_examples=dead)]))
    assert (after.routes.share[0], after.routes.share[2]) == (0, 0.25)


def test_fewer_clients_than_adapters_start_none_anew():
    shared, _ = RESTARTING.init(net(), Population(3, 0))
    assert not RESTARTING._restarts(shared)
    assert RESTARTING._restarts(RESTARTING.init(net(), Population(4, 0))[0])


def test_a_restarted_adapter_has_no_momentum_of_its_former_life():
    method = replace(RESTARTING, server=ServerOptimizer("adam", lr=0.1))
    _, after, plain = dying(method, 2)
    for kind, value in (("first", 0.0), ("second", 1e-6)):
        now, then = (getattr(s.moments["adapters"], kind) for s in (after, plain))
        for name, leaf in now.items():
            assert_close(leaf[2], torch.full_like(leaf[2], value), rtol=1e-12, atol=0.0)
            assert then[name][2].any()
            assert torch.equal(leaf[[0, 1, 3]], then[name][[0, 1, 3]])


def test_adapters_are_restarted_only_while_routes_are_explored():
    method = RESTARTING
    shared, _ = method.init(net(), Population(4, 0, num_rounds=6))
    for num_rounds, restarted in ((0, True), (1, False), (3, False)):  # of 6 rounds the first two explore
        _, _, upload, _ = worked(method, num_rounds, shared=shared)
        now, _ = simulate(method, net(), regression(), num_rounds, shared=shared)
        upload = replace(upload, route_examples=torch.tensor([[1.0, 5.0, 0.0, 1.0]]).repeat(4, 1))
        after = method.server_update(now, iter([upload]))
        assert (after.routes.share[2] > 0) == restarted


# The base stays as it is.


@pytest.mark.parametrize("realization", ["merged", "factored", "auto"])
@pytest.mark.parametrize("averaging", ["factor", "product", "delta"])
def test_a_frozen_base_does_not_travel_and_stays_bit_for_bit(realization, averaging):
    plan = replace(PLAN, realization=realization, scale=0.5)
    method = FLoRAL(3, plan, EM, STEPS, freeze_base=True, averaging=averaging)
    module = net(norm=True)
    before = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    shared, message, upload, kept = worked(method, 2, module=module)
    assert shared.base == message.base == upload.base == {}
    assert {"base", "stats"}.isdisjoint(tree.group_bytes(message) | tree.group_bytes(upload))
    adapter = 8 * shared.bank.num_parameters()
    assert tree.group_bytes(upload)["adapters"] == 3 * adapter
    assert equal(dict(module.state_dict()), before)
    adapted = Loss(method.adapt(module), "mse")
    served = method.personalize(message, kept)
    probs = method.mixture(message, kept).double()
    x = drawn(4, 7, 3, seed=9)
    outputs = adapted.outputs(served, x)
    assert all(torch.equal(leaf, before[n]) for n, leaf in adapted.module.named_parameters() if n in before)
    for k in range(4):
        own = {name: leaf.clone() for name, leaf in before.items()}
        for c in range(3):
            for part in shared.bank.low_rank:
                delta = part.weight_of(products(shared.bank, shared.adapters)[part.name][c])
                own[part.name] += (
                    0.5 * probs[k, c] * (delta + (shared.remainder[part.name][c] if shared.remainder else 0))
                )
            for update in shared.bank.additive:
                own[update.name] += probs[k, c] * shared.adapters[update.name][c]
        expected = torch.func.functional_call(module, own, (x[k],))
        assert_close(outputs[k].detach(), expected.detach())


def test_a_frozen_base_with_conv_and_linear_parts_learns():
    method = FLoRAL(3, PLAN, GRADIENT, replace(STEPS, lr=0.1), freeze_base=True)
    _, _, first, _ = worked(method)
    _, _, last, _ = worked(method, 8)
    assert last.loss.mean() < first.loss.mean()


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_freezing_the_base_is_freezing_every_parameter_of_the_module(realization):
    method = FLoRAL(3, replace(PLAN, realization=realization), EM, STEPS)
    frozen = net(norm=True).requires_grad_(False)
    one, other = (
        worked(replace(method, freeze_base=True), 2, module=net(norm=True)),
        worked(method, 2, module=frozen),
    )
    for state, twin in zip(one, other, strict=True):
        assert equal(tree.tensors(state), tree.tensors(twin))


@pytest.mark.parametrize(
    "method",
    [
        FedAvg(STEPS),
        FLoRAL(2, replace(PLAN, realization="merged"), EM, STEPS),
        FLoRAL(2, replace(PLAN, targets=("5.*",)), EM, STEPS),
        Ensemble(2, EM, STEPS),
    ],
    ids=["fedavg", "floral", "floral elsewhere", "ensemble"],
)
def test_a_part_that_is_not_to_be_trained_stays_as_it_is(method):
    module = net()
    module[0].requires_grad_(False)
    weight = module[0].weight.clone()
    shared, message, upload, kept = worked(method, 2, module=module)
    assert torch.equal(module[0].weight, weight)
    sent = tree.tensors(shared) | tree.tensors(message) | tree.tensors(upload)
    if isinstance(method, FLoRAL):  # what is adapted may travel as an adapter
        sent = tree.tensors(shared.base) | tree.tensors(message.base) | tree.tensors(upload.base)
    names = {name.rpartition("/")[2] for name in sent}
    assert "5.weight" in names
    assert names.isdisjoint({"0.weight", "0.bias"})
    served = method.personalize(message, kept)
    if isinstance(method, FLoRAL) and "*" in method.adapter.targets:
        (part,) = (part for part in shared.bank.low_rank if part.name == "0.weight")
        deltas = products(shared.bank, shared.adapters)[part.name]
        mixed = weight + torch.einsum("kc,cij->kij", method.mixture(message, kept).double(), deltas)
        assert_close(served["0.weight"], mixed)
        assert (served["0.weight"] - weight).abs().max() > 0.01
    else:
        assert not [name for name in served if name.endswith("0.weight")]


def test_a_module_with_nothing_to_train_is_refused_by_methods_without_adapters():
    with pytest.raises(ModelError, match="a method with adapters, such as floral"):
        FedAvg(STEPS).init(net().requires_grad_(False), Population(2, 0))


# What makes no sense.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": (0.0,)}, "ranks"),
        ({"ranks": (0.5, 1.5)}, "ranks"),
        ({"prune_below": 1.0}, "prune_below"),
        ({"prune_below": -0.1}, "prune_below"),
        ({"restart_below": 1.0}, "restart_below"),
        ({"prune_below": 0.1, "router": Router("oracle")}, "learned routes"),
        ({"prune_below": 0.1, "router": Router(explore=0.0)}, "explore above 0"),
        ({"prune_below": 0.1, "router": Router(explore=0.5)}, "below 0.5"),
        ({"send_top": -1}, "send_top"),
        ({"explore_rank": 4, "ranks": (0.5,)}, "explore_rank"),
        ({"explore_rank": 4, "adapter": AdapterPlan(peft={"r": 2})}, "adapter.peft"),
        ({"explore_rank": 4, "router": Router(explore=0.0)}, "explore above 0"),
        ({"explore_rank": -1}, "explore_rank"),
        ({"explore_rank": 2.5}, "whole rank"),
        ({"layer_routers": True}, "gradient"),
        ({"layer_routers": True, "router": ORACLE}, "gradient"),
        ({"ranks": (0.5,), "averaging": "product"}, "averaging = 'factor'"),
        ({"ranks": (0.5,), "averaging": "delta"}, "averaging = 'factor'"),
        ({"ranks": (0.5,), "report_error": True}, "report_error"),
        ({"layer_routers": True, "router": GRADIENT, "averaging": "delta"}, "averaging = 'factor'"),
        ({"layer_routers": True, "router": GRADIENT, "report_error": True}, "report_error"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        FLoRAL(**settings)


def test_a_client_that_never_trained_serves_statistics_of_its_own():
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    draw = torch.Generator().manual_seed(0)
    clients = [(5 + torch.randn(8, 4, generator=draw), torch.arange(8) % 3) for _ in range(3)]
    method = FLoRAL(2, PLAN, EM, STEPS)
    shared, store = simulate(method, module, clients, 2, "cross_entropy", order=np.array([0, 1]))
    everyone = np.arange(3)
    loss = Loss(method.adapt(module), "cross_entropy")
    message = method.send(shared, torch.from_numpy(everyone))
    before = store.rows(everyone)
    kept = method.settle(loss, message, before, ClientData(Examples.of(clients), everyone, 0, 0))
    assert before.seen.tolist() == [1, 1, 0]
    mean = kept.stats["1.running_mean"]
    assert torch.equal(mean[:2], before.stats["1.running_mean"][:2])
    assert not before.stats["1.running_mean"][2].any()
    assert mean[2].abs().max() > 0.1


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_the_guard_shortens_adaptive_steps(kind):
    # Δ = −2 for both adapters; the second one counts for half.
    server, old = ServerOptimizer(kind, lr=0.5), {"w": torch.tensor([3.0, 3.0])}
    new, _ = server.step(old, {"w": torch.tensor([1.0, 1.0])}, server.init(old), torch.tensor([1.0, 0.5]))
    first, second = (old["w"] - new["w"]).tolist()
    assert second == pytest.approx(first / 2)
