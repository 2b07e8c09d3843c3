"""What defines each rival that mixes models or shares a low-rank adapter, by hand and as special cases."""

from dataclasses import replace
from math import exp

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simulate import simulate
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.adapters.products import products
from umbel.clients import ClientData, Examples
from umbel.cohort import Cohort, Tally
from umbel.errors import RecipeError
from umbel.methods import (
    IFCA,
    Ensemble,
    FedAvg,
    FedEM,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    Population,
    ThresholdClustering,
)
from umbel.methods.threshold_clustering import far_apart, within_reach
from umbel.model.loss import Loss
from umbel.runs import run
from umbel.tasks import task_of
from umbel.train import LocalTraining

# With x = 1 a line's answer is its weight w, its loss (w − t)²; a step of rate ¼ goes half the way to t.
HALFWAY = LocalTraining(lr=0.25, batch_size=8)
STEPS = LocalTraining(lr=0.1, batch_size=2, epochs=2)
HEAVY = LocalTraining(lr=0.1, batch_size=2, epochs=2, momentum=0.9, weight_decay=0.1)


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


def network(norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 2)).double()


def prepared(method, module, clients, shared=None, loss="mse"):
    """The arguments of `client_update` and the server's state."""
    first, fresh = method.init(module, Population(len(clients), 0))
    shared = first if shared is None else shared
    everyone = torch.arange(len(clients))
    private = tree.rows(fresh, torch.zeros_like(everyone))
    data = ClientData(Examples.of(clients), everyone.numpy(), 0, 1)
    return Loss(method.adapt(module), loss), method.send(shared, everyone), private, data, shared


def lines_at(method, *weights):
    """The server's first state, with these lines as its models."""
    shared, _ = method.init(line(0.0), Population(1, 0))
    return replace(shared, models={"weight": torch.tensor(weights).double().reshape(-1, 1, 1)})


def served(method, module, shared, store, clients):
    """The personal models and mixtures of all clients, and each model's loss on its client's examples."""
    cohort = Cohort(method, Loss(method.adapt(module), "mse"), Examples.of(clients), 0, len(clients))
    everyone = np.arange(len(clients))
    params, mixture = cohort.served(shared, store.rows(everyone), everyone)
    losses = cohort.loss.over(params, ClientData(cohort.train, everyone, 0, 0))
    return params, mixture, losses


# Two kinds of clients, y = 2x and y = −2x.

SLOPES = [2.0, -2.0, 2.0, -2.0, -2.0, 2.0]


def opposite(seed=0):
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(8, 1, generator=draw).double() for _ in SLOPES]
    return [(x, slope * x) for x, slope in zip(inputs, SLOPES, strict=True)]


@pytest.mark.parametrize(
    "method",
    [
        FedEM(2, LocalTraining(lr=0.1, batch_size=4), mixes="outputs"),
        IFCA(2, LocalTraining(lr=0.1, batch_size=4)),
        ThresholdClustering(
            2, 0.4, 5, alpha=1.0, local=LocalTraining(lr=0.1, batch_size=4), updates_since="start"
        ),
    ],
    ids=["fedem", "ifca", "threshold_clustering"],
)
def test_two_obvious_groups_are_found(method):
    clients = opposite()
    module = line(0.1)
    shared, store = simulate(method, module, clients, rounds=40)
    _, mixture, losses = served(method, module, shared, store, clients)
    route = mixture.argmax(1)
    assert_close(mixture.double(), torch.eye(2).double()[route], rtol=0, atol=1e-3)
    assert route.tolist() in ([0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 1])
    assert losses.max() < 0.01


# FedEM.


@pytest.mark.parametrize("chunk", [1, 4])
def test_fedem_with_one_component_is_fed_avg(chunk):
    clients = regression([4, 8, 4, 6])
    method = FedEM(1, STEPS, mixes="outputs")
    shared, store = simulate(method, network(norm=True), clients, rounds=3, chunk=chunk)
    fed_avg, _ = simulate(FedAvg(STEPS), network(norm=True), clients, rounds=3)
    assert_close(
        {n: leaf[0] for n, leaf in (shared.models | shared.stats).items()}, fed_avg.params | fed_avg.stats
    )
    assert store.rows(np.arange(4)).probs.tolist() == [[1.0]] * 4


@pytest.mark.parametrize("probs", [(0.5, 0.5), (0.8, 0.2)])
def test_fedem_shares_out_every_example_by_hand(probs):
    # Components 0 and 1, a client with one example at each: ℓ = (0, 1) and (1, 0). A batch's mean of q ℓ:
    # w_0 goes ½ · ½ q_1(0) towards the example at 1, w_1 ½ · ½ q_0(1) towards that at 0.
    method = FedEM(2, HALFWAY, mixes="outputs")
    x, y = torch.ones(2, 1).double(), torch.tensor([[0.0], [1.0]]).double()
    loss, message, private, data, _ = prepared(method, line(0.0), [(x, y)] * 2, lines_at(method, 0.0, 1.0))
    private = replace(private, probs=torch.tensor([probs, (0.5, 0.5)]))
    upload, kept = method.client_update(loss, message, private, data)
    first = [p * exp(-at) for p, at in zip(probs, (0, 1), strict=True)]
    second = [p * exp(-at) for p, at in zip(probs, (1, 0), strict=True)]
    q = [[value / sum(own) for value in own] for own in (first, second)]
    near = {"rtol": 1e-6, "atol": 1e-6}
    assert_close(kept.probs[0].tolist(), [(q[0][c] + q[1][c]) / 2 for c in range(2)], **near)
    moved = upload.models["weight"][0].flatten().tolist()
    assert_close(moved, [0.25 * q[1][0], 1 - 0.25 * q[0][1]], **near)
    assert_close(kept.probs[1].tolist(), [0.5, 0.5], **near)


def test_fedem_finds_an_examples_share_wherever_its_batch_is():
    # Whatever the order: batches of one, the components at 0 and 9 hardly touch each other's examples.
    method = FedEM(2, LocalTraining(lr=0.25, batch_size=1, epochs=2), mixes="outputs")
    x, y = torch.ones(3, 1).double(), torch.tensor([[1.0], [8.0], [1.0]]).double()
    loss, message, private, data, _ = prepared(method, line(0.0), [(x, y), (x, 9 - y)], lines_at(method, 0.0, 9.0))
    upload, kept = method.client_update(loss, message, private, data)
    # Four steps halfway to 1 from 0 and two halfway to 8 from 9, and the other way round.
    expected = torch.tensor([[1 - 1 / 16, 8 + 1 / 4], [1 - 1 / 4, 8 + 1 / 16]]).double()
    assert_close(upload.models["weight"].flatten(1), expected)
    assert_close(kept.probs, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))


def test_fedems_server_weighs_by_examples_alone():
    method = FedEM(2, mixes="outputs")
    loss, message, private, data, shared = prepared(
        method, line(0.0), aims((1, 0.0), (3, 8.0)), lines_at(method, 0.0, 9.0)
    )
    upload, _ = method.client_update(loss, message, private, data)
    weights = torch.tensor([[4.0, 8.0], [0.0, 4.0]]).double().reshape(2, 2, 1, 1)
    after = method.server_update(shared, iter([replace(upload, models={"weight": weights})]))
    assert after.models["weight"].flatten().tolist() == [1.0, 5.0]  # (1·4 + 3·0)/4 and (1·8 + 3·4)/4


def test_fedem_mixes_probabilities():
    method = FedEM(3)
    shared, fresh = method.init(network(), Population(2, 0))
    private = replace(fresh, probs=torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]))
    message = method.send(shared, torch.arange(2))
    x = regression([4])[0][0].expand(2, 4, 3)
    outputs = Loss(method.adapt(network()), "cross_entropy").outputs(method.personalize(message, private), x)
    plain = Loss(network(), "cross_entropy")
    alone = [plain.outputs({n: leaf[:, c] for n, leaf in message.models.items()}, x).softmax(-1) for c in range(3)]
    for k in range(2):
        expected = sum(private.probs[k, c].double() * alone[c][k] for c in range(3))
        assert_close(outputs[k].exp(), expected)


def test_fedem_settles_a_newcomer_on_its_own_examples():
    method = FedEM(2, mixes="outputs")
    loss, message, private, data, _ = prepared(
        method, line(0.0), aims((2, 0.0), (2, 4.0)), lines_at(method, 0.0, 4.0)
    )
    settled = method.settle(loss, message, private, data)
    assert_close(settled.probs, torch.eye(2))
    assert private.probs.tolist() == [[0.5, 0.5]] * 2


def test_fedem_refuses_probabilities_of_what_are_no_logits():
    with pytest.raises(RecipeError, match="mixes = 'outputs'"):
        simulate(FedEM(2), line(0.0), aims((1, 0.0)))


# IFCA.


@pytest.mark.parametrize(("averaging", "models"), [("model", [1.0, 8.25]), ("gradient", [0.2, 8.6])])
def test_ifca_trains_the_better_model_by_hand(averaging, models):
    # Models 0 and 10. Targets 2, 8 and 6 choose 0, 1 and 1; halfway they are at 1, 9 and 8.
    # w_0 = 1, w_1 = (1·9 + 3·8)/4 = 8.25; gradients: p = 1/5 and 4/5 of those ways.
    method = IFCA(2, HALFWAY, averaging=averaging)
    clients = aims((1, 2.0), (1, 8.0), (3, 6.0))
    shared, store = simulate(method, line(0.0), clients, shared=lines_at(method, 0.0, 10.0))
    assert store.rows(np.arange(3)).choice.argmax(1).tolist() == [0, 1, 1]
    assert_close(shared.models["weight"].flatten().tolist(), models, rtol=1e-6, atol=1e-6)


def test_ifca_chooses_the_smallest_loss():
    method = IFCA(3)
    clients = regression([4, 3, 8, 1, 5])
    loss, message, private, data, shared = prepared(method, network(), clients)
    settled = method.settle(loss, message, private, data)
    for k, (x, y) in enumerate(clients):
        losses = []
        for c in range(3):
            own = {n: leaf[c : c + 1] for n, leaf in shared.models.items()}
            losses.append((loss.outputs(own, x.unsqueeze(0))[0] - y).square().mean().item())
        assert settled.choice[k].tolist() == [float(at == min(losses)) for at in losses]
        chosen = shared.models["0.weight"][int(np.argmin(losses))]
        assert torch.equal(method.personalize(message, settled)["0.weight"][k], chosen)


@pytest.mark.parametrize("method", [Ensemble, FedEM, IFCA])
def test_models_may_start_near_one_that_was_trained_before(method):
    module = network()
    far, near = (
        method(3, near=share).init(module, Population(4, 0))[0].models["0.weight"] for share in (0.0, 0.1)
    )
    given = module[0].weight.detach()
    assert torch.equal(near[0], given)
    apart = (near[1:] - given).std((1, 2)) / given.std()
    assert ((apart > 0.05) & (apart < 0.2)).all()
    assert not torch.equal(near[1], near[2])
    assert ((far[1:] - given).std((1, 2)) / given.std() > 0.8).all()


def test_an_ifca_model_that_nobody_chose_stays_bit_for_bit():
    method = IFCA(3, HALFWAY)
    shared, _ = simulate(
        method, line(0.0), aims((1, 1.0), (3, 2.0)), rounds=3, shared=lines_at(method, 0.1, -100 / 3, 1e6 / 3)
    )
    assert torch.equal(shared.models["weight"][1:], lines_at(method, 0.1, -100 / 3, 1e6 / 3).models["weight"][1:])


@pytest.mark.parametrize("averaging", ["model", "gradient"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_ifca_with_one_model_is_fed_avg(chunk, averaging):
    clients = regression([4, 8, 4, 6])
    method = IFCA(1, STEPS, averaging=averaging)
    shared, _ = simulate(method, network(norm=True), clients, rounds=3, chunk=chunk)
    fed_avg, _ = simulate(FedAvg(STEPS), network(norm=True), clients, rounds=3)
    assert_close(
        {n: leaf[0] for n, leaf in (shared.models | shared.stats).items()}, fed_avg.params | fed_avg.stats
    )


# Threshold clustering.


def clustered(num_clusters=1, quantile=1.0, **settings):
    return ThresholdClustering(num_clusters, quantile, **{"alpha": 1.0, "local": STEPS} | settings)


@pytest.mark.parametrize("since", ["round", "start"])
@pytest.mark.parametrize("num_clusters", [1, 3])
def test_clustering_without_a_threshold_is_fed_avg(num_clusters, since):
    clients = regression([3, 8, 1, 5])
    method = clustered(num_clusters, updates_since=since)
    shared, store = simulate(method, network(), clients, rounds=3)
    fed_avg, _ = simulate(FedAvg(STEPS), network(), clients, rounds=3)
    params, _, _ = served(method, network(), shared, store, clients)
    for k in range(4):
        assert_close({n: leaf[k] for n, leaf in params.items()}, fed_avg.params)


def test_points_beyond_the_threshold_count_as_the_centre():
    # From 0 the distances are 0, 1, 2, 10, 20 with the median 2: with weights (1, 1, 2, 1, 1)/6 the centre goes to
    # (0 + 1 + 2·2)/6. From 1 they are 1, 0, 1, 9, 19: 1 + (−1 + 0 + 2·1)/6.
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0]]).double()
    share = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]).double() / 6
    for centre, moved in ((0.0, 5 / 6), (1.0, 1 + 1 / 6)):
        assert_close(within_reach(torch.tensor([centre]).double(), points, share, 0.5).item(), moved)


def test_centres_start_far_apart():
    points = torch.tensor([[0.0], [1.0], [5.0], [9.0], [10.0]]).double()
    share = torch.full((5,), 0.2).double()
    assert far_apart(points + 1, share, 3).flatten().tolist() == [1.0, 11.0, 6.0]  # the first of two as far


def test_clusters_of_clients_with_like_updates_go_their_own_ways():
    # From 4 the updates are 2 and 1 for targets 0 and 2, −7 and −5 for 18 and 14. The nearest two of four
    # to a centre: −7 → −7 + (0 + 2)/4, 2 → 2 + (0 − 1)/4.
    method = clustered(2, 1 / 3, iterations=1, local=HALFWAY)
    clients = aims((2, 0.0), (2, 2.0), (2, 18.0), (2, 14.0))
    shared, store = simulate(method, line(4.0), clients)
    assert_close(shared.centres["weight"].flatten().tolist(), [-6.5, 1.75])
    params, mixture, _ = served(method, line(4.0), shared, store, clients)
    assert mixture.argmax(1).tolist() == [1, 1, 0, 0]
    assert_close(params["weight"].flatten().tolist(), [2.25, 2.25, 10.5, 10.5])


@pytest.mark.parametrize(("since", "model", "momentum"), [("round", 3.5, 1.75 / 2), ("start", 4.0, 1.125)])
def test_a_client_goes_on_from_where_it_was(since, model, momentum):
    # From 4 halfway to 0: the update is 2, and v = ½ is half the step to 3½. From there 1.75, or 2.25 since 4.
    method = clustered(alpha=0.5, local=HALFWAY, updates_since=since)
    loss, message, private, data, _ = prepared(method, line(4.0), aims((1, 0.0)))
    private = replace(private, decayed={"weight": torch.zeros(1, 1, 1).double()})
    message = replace(message, push={"weight": torch.full((1, 1, 1), 0.5).double()})
    assert method.personalize(message, private)["weight"].item() == 3.5
    upload, kept = method.client_update(loss, message, private, data)
    assert upload.momentum["weight"].item() == momentum
    assert kept.model["weight"].item() == model


def test_momentum_goes_on_between_rounds_with_the_client():
    # From 4 to 0: the first update is 2, m = ¾ · 2. The next one is again 2: m = ¼ · 1.5 + ¾ · 2.
    method = clustered(alpha=0.75, local=HALFWAY)
    loss, message, private, data, _ = prepared(method, line(4.0), aims((1, 0.0)))
    for expected in (1.5, 1.875):
        upload, private = method.client_update(loss, message, private, data)
        assert_close(upload.momentum["weight"].item(), expected)


def test_a_client_that_was_never_trained_serves_a_round_of_its_own_and_has_no_cluster():
    method = clustered(2, 0.5, local=HALFWAY)
    clients = aims((1, 0.0), (4, 8.0), (1, 5.0))
    shared, store = simulate(method, line(4.0), clients, order=np.array([0, 1]))
    assert shared.cluster.tolist()[2] == -1
    params, mixture, _ = served(method, line(4.0), shared, store, clients)
    assert params["weight"][2].item() == 4.5  # halfway from the first model to 5
    assert store.rows(np.array([2])).model["weight"].item() == 4.0
    assert mixture[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("chunk", [1, 2])
def test_running_statistics_stay_with_the_client(chunk):
    # A batch's mean m moves the running mean r to 0.9 r + 0.1 m: 0 → 1 → 1.9 and 0 → 5 → 9.5.
    clients = [(torch.tensor([[m - 1], [m + 1]] * 2).double(), torch.zeros(4, 1).double()) for m in (10.0, 50.0)]
    method = clustered(local=LocalTraining(lr=0.1, batch_size=4))
    _, store = simulate(method, nn.BatchNorm1d(1).double(), clients, rounds=2, chunk=chunk)
    assert_close(store.rows(np.arange(2)).stats["running_mean"].flatten().tolist(), [1.9, 9.5])


# Adapters. A line with base 0, A = B = 1: the answer is B A, and both factors go by −2 · rate · (B A − t).


def test_fedsa_lora_averages_a_and_keeps_b_by_hand():
    # Targets 3 (n = 1) and −1 (n = 3): factors go to 2 and 0. A = (2 + 3·0)/4 = ½; the models are 2 · ½ and 0 · ½.
    method = FedSALoRA(AdapterPlan(1, ("linear",)), HALFWAY, freeze_base=True)
    shared, fresh = method.init(line(0.0), Population(2, 0))
    assert list(shared.adapter) == ["weight_lora_A"]
    assert list(fresh.own) == ["weight_lora_B"]
    one = torch.ones(1, 1, 1).double()
    loss, message, private, data, shared = prepared(
        method, line(0.0), aims((1, 3.0), (3, -1.0)), replace(shared, adapter={"weight_lora_A": one})
    )
    private = replace(private, own={"weight_lora_B": one.expand(2, 1, 1, 1)}, seen=torch.ones(2))
    upload, kept = method.client_update(loss, message, private, data)
    assert not [name for name in tree.tensors(upload) if "lora_B" in name]
    assert upload.base == {}
    assert kept.own["weight_lora_B"].flatten().tolist() == [2.0, 0.0]
    shared = method.server_update(shared, iter([upload]))
    assert shared.adapter["weight_lora_A"].item() == 0.5
    answers = Loss(method.adapt(line(0.0)), "mse").outputs(
        method.personalize(method.send(shared, torch.arange(2)), kept), torch.ones(2, 1, 1).double()
    )
    assert answers.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("freeze_base", [False, True])
def test_with_fedsa_lora_a_is_everyones_and_b_ones_own(freeze_base):
    method = FedSALoRA(AdapterPlan(2, realization="merged"), STEPS, freeze_base=freeze_base)
    clients = regression([3, 8, 5])
    shared, store = simulate(method, network(), clients, rounds=3)
    own = store.rows(np.arange(3)).own
    assert set(own) == {f"{layer}.{name}" for layer in (0, 2) for name in ("weight_lora_B", "bias")}
    assert not any(torch.equal(leaf[0], leaf[1]) for leaf in own.values())
    params, _, _ = served(method, network(), shared, store, clients)
    base = {n: leaf.detach() for n, leaf in network().named_parameters()} if freeze_base else shared.base
    for k in range(3):
        delta = own["0.weight_lora_B"][k, 0] @ shared.adapter["0.weight_lora_A"][0]
        assert_close(params["0.weight"][k], base["0.weight"] + delta)
        assert_close(params["0.bias"][k], base["0.bias"] + own["0.bias"][k, 0])


def test_a_fedsa_lora_client_that_never_trained_serves_what_its_first_round_leaves():
    method = FedSALoRA(AdapterPlan(1, ("linear",)), LocalTraining(lr=0.05), freeze_base=True)
    clients = aims((1, 3.0), (3, -1.0))
    shared, store = simulate(method, line(0.0), clients, rounds=60, order=np.array([0]))
    _, _, losses = served(method, line(0.0), shared, store, clients)
    assert losses[0] < 1e-6
    assert losses[1] < 1.0  # that of B = 0
    assert store.rows(np.array([1])).seen.item() == 0


@pytest.mark.parametrize("freeze_base", [False, True])
def test_with_ffa_lora_a_stays_and_the_mean_of_products_is_the_product_of_means(freeze_base):
    method = FFALoRA(AdapterPlan(2), STEPS, freeze_base=freeze_base)
    clients = regression([3, 8, 5])
    first, _ = method.init(network(), Population(3, 0))
    shared, _ = simulate(method, network(), clients, rounds=2)
    names = [f"{layer}.weight_lora_A" for layer in (0, 2)]
    drawn = {name: first.bank.frozen[name] for name in names}
    assert all(leaf.any() for leaf in drawn.values())
    loss, message, private, data, shared = prepared(method, network(), clients, shared)
    upload, _ = method.client_update(loss, message, private, data)
    for state in (shared, message, upload):
        assert not [name for name in tree.tensors(state) if "lora_A" in name]
    assert all(torch.equal(shared.bank.frozen[name], drawn[name]) for name in names)
    fixed = {name: leaf.expand(3, *leaf.shape) for name, leaf in drawn.items()}
    each = products(shared.bank, upload.adapter | fixed)
    after = method.server_update(shared, iter([upload]))
    whole = products(shared.bank, after.adapter | drawn)
    n = torch.tensor([3.0, 8.0, 5.0]).double().reshape(3, 1, 1, 1)
    assert_close(whole, {name: (n * leaf).sum(0) / 16 for name, leaf in each.items()})
    served = method.personalize(method.send(after, torch.arange(3)), private)
    mixed = method.adapt(network())
    assert set(served) <= {name for name, _ in mixed.named_parameters()}


def test_ffa_lora_starts_at_the_base():
    method = FFALoRA(AdapterPlan(2))
    loss, message, private, data, _ = prepared(method, network(), regression([4, 4]))
    own = {name: leaf.detach().expand(2, *leaf.shape) for name, leaf in network().named_parameters()}
    assert_close(loss.over(method.personalize(message, private), data), Loss(network(), "mse").over(own, data))


def test_of_an_embedding_the_random_factor_stays():
    method = FFALoRA(AdapterPlan(2, ("embedding",)))
    shared, _ = method.init(nn.Embedding(5, 3), Population(1, 0))
    assert shared.bank.frozen["weight_lora_B"].any()
    assert list(shared.adapter) == ["weight_lora_A"]


def test_flexlora_averages_products_if_ranks_suffice():
    # The second layer, 2 × 4, has no more than rank 2.
    method = FlexLoRA((2,), AdapterPlan(layers=("linear",)), STEPS, freeze_base=True)
    clients = regression([3, 8, 5])
    shared, _ = simulate(method, network(), clients, rounds=1)
    loss, message, private, data, shared = prepared(method, network(), clients, shared)
    upload, _ = method.client_update(loss, message, private, data)
    after = products(shared.bank, method.server_update(shared, iter([upload])).adapter)
    n = torch.tensor([3.0, 8.0, 5.0]).double().reshape(3, 1, 1, 1)
    mean = {name: (n * leaf).sum(0) / 16 for name, leaf in products(shared.bank, upload.adapter).items()}
    assert_close(after["2.weight"], mean["2.weight"])
    # The first layer's mean has rank 3: what is left out is its smallest singular value.
    left = torch.linalg.svdvals(mean["0.weight"][0])[2]
    assert left > 1e-5
    assert_close((after["0.weight"] - mean["0.weight"]).norm(), left)


@pytest.mark.parametrize("local", [STEPS, HEAVY])
def test_a_flexlora_client_has_no_more_than_its_rank(local):
    method = FlexLoRA((1, 2), AdapterPlan(layers=("linear",), realization="merged"), local)
    clients = regression([3, 8, 5, 4])
    shared, store = simulate(method, network(), clients, rounds=2)
    loss, message, private, data, shared = prepared(method, network(), clients, shared)
    whole = products(shared.bank, shared.adapter)["0.weight"][0].numpy()
    u, s, v = np.linalg.svd(whole)
    sent = products(shared.bank, message.adapter)["0.weight"]
    for k in range(4):
        rank = (1, 2)[k % 2]
        np.testing.assert_allclose(sent[k, 0].numpy(), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-12)
    upload, _ = method.client_update(loss, message, private, data)
    for adapter in (message.adapter, upload.adapter):
        for name, axis in (("0.weight_lora_A", 2), ("0.weight_lora_B", 3)):
            used = adapter[name].movedim(axis, 1).flatten(2).abs().sum(2) > 0
            assert used.tolist() == [[True, False], [True, True]] * 2
    params, _, _ = served(method, network(), shared, store, clients)
    for k in range(4):
        added = params["0.weight"][k] - shared.base["0.weight"]
        assert torch.linalg.matrix_rank(added, rtol=1e-9) == (1, 2)[k % 2]


def test_a_rank_that_the_mean_has_lost_grows_again():
    method = FlexLoRA((1, 2), AdapterPlan(layers=("linear",)), STEPS, freeze_base=True)
    clients = regression([5, 8])
    shared, store = simulate(method, network(), clients, rounds=1)
    cohort = Cohort(method, Loss(method.adapt(network()), "mse"), Examples.of(clients), 0, 2)
    for whose, rank in ((0, 1), (1, 2)):  # alone in a round a client of rank 1 leaves no more
        uploads = cohort.uploads(shared, store, np.array([whose]), 2 + whose, Tally())
        shared = method.server_update(shared, uploads)
        for matrix in products(shared.bank, shared.adapter).values():
            assert torch.linalg.matrix_rank(matrix[0], rtol=1e-9) == rank
        rows = shared.adapter["0.weight_lora_A"][0].norm(dim=1)
        assert_close(rows[:rank], torch.ones(rank).double())
        assert rows.min() > 0


def test_flexlora_ranks_are_ranks_or_budgets():
    module = network()
    ranks = [bank.low_rank for bank in FlexLoRA((1, 0.6)).banks(module)]
    assert [[part.rank for part in parts] for parts in ranks] == [[1, 1], [1, 1]]
    ranks = [bank.low_rank for bank in FlexLoRA((2, 0.9, 1)).banks(module)]
    assert [[part.rank for part in parts] for parts in ranks] == [[2, 2], [1, 1], [1, 1]]
    assert [part.rank for part in FlexLoRA((1, 2)).bank(module).low_rank] == [2, 2]
    assert FlexLoRA((), AdapterPlan(2)).bank(module) == AdapterPlan(2).bank(module, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedEM(0),
        lambda: IFCA(0),
        lambda: ThresholdClustering(0),
        lambda: ThresholdClustering(iterations=0),
        lambda: ThresholdClustering(quantile=1.5),
        lambda: ThresholdClustering(alpha=0.0),
        lambda: ThresholdClustering(step=0.0),
        lambda: FlexLoRA((1, 1.5)).bank(line(0.0)),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(RecipeError):
        make()


def test_models_with_a_single_number_are_clustered_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.scale * self.linear(x)

    clients = [
        (torch.randn(6, 4, generator=torch.Generator().manual_seed(k)), torch.arange(6) % 3) for k in range(4)
    ]
    shared = run(task_of(Scaled(), clients), ThresholdClustering(2, local=STEPS), rounds=2).progress.shared
    assert all(leaf.isfinite().all() for leaf in tree.tensors(shared).values() if leaf.is_floating_point())
