"""What defines each rival whose clients serve models of their own, on examples with a solution by hand.

With x = 1 a line's answer is its weight w and its loss (w − t)²; the gradient is 2 (w − t).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simulate import simulate
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.cohort import Cohort, Engine
from umbel.errors import ModelError, RecipeError
from umbel.methods import (
    APFL,
    Ditto,
    FedAvg,
    FedAvgFinetune,
    FedBN,
    FedPer,
    FedProx,
    FedRep,
    FLoRAL,
    KNNPer,
    Local,
    LocalAdapter,
    PFedMe,
    Population,
)
from umbel.methods.knnper import remembered
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import Loss
from umbel.rounds import start
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import task_of
from umbel.train import LocalTraining

HALFWAY = LocalTraining(lr=0.25, batch_size=8)  # a step of rate ¼ goes half the way to t
TWICE = LocalTraining(lr=0.25, batch_size=8, epochs=2)
STEPS = LocalTraining(lr=0.1, batch_size=2, epochs=2)
SIZES = [3, 8, 1, 5]
ALIKE = [4, 8, 4, 6]  # no lone example in a last batch of 2: for BatchNorm


def line(weight=4.0):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, weight)
    return module


def aims(*pairs):
    return [(torch.ones(n, 1).double(), torch.full((n, 1), t).double()) for n, t in pairs]


def regression(counts=SIZES):
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(n, w, generator=draw, dtype=torch.float64) for w in (3, 2)) for n in counts]


def labelled(counts=SIZES):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=draw).double(), torch.randint(0, 2, (n,), generator=draw)) for n in counts
    ]


def net(middle=None):
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(3, 4), middle or nn.Identity(), nn.Tanh(), nn.Linear(4, 2)).double()


def cohort_of(method, module, clients, loss="mse"):
    return Cohort(method, Loss(method.adapt(module), loss), Examples.of(clients), 0, 64)


def served(method, module, clients, run, loss="mse", which=None):
    """The tensors that the clients serve after a run (shared, store)."""
    shared, store = run
    which = np.arange(len(clients)) if which is None else np.array(which)
    with torch.no_grad():
        return cohort_of(method, module, clients, loss).served(shared, store.rows(which), which)[0]


def weights(params):
    return params["weight"].flatten().tolist()


def equal(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


# FedProx.


def test_fed_prox_without_a_spring_is_fed_avg_bit_for_bit():
    run, plain = (simulate(m, net(), regression(), 3)[0] for m in (FedProx(STEPS, mu=0.0), FedAvg(STEPS)))
    assert equal(run.params, plain.params)


def test_fed_prox_is_held_back_by_its_spring():
    # From 4 to 4 − ¼·8 = 2; there the gradient is 4 + 1·(2 − 4) = 2: 1.5.
    shared, _ = simulate(FedProx(TWICE, mu=1.0), line(), aims((1, 0.0)))
    assert shared.params["weight"].item() == 1.5


# Fine-tuning.


def test_fine_tuning_is_local_training_from_the_global_model():
    # FedAvg's first round ends at 5; from there halfway to 0 twice, and halfway to 8 twice.
    method, clients = FedAvgFinetune(HALFWAY, finetune=TWICE), aims((1, 0.0), (3, 8.0))
    run = simulate(method, line(), clients)
    assert run[0].params["weight"].item() == 5.0
    assert weights(served(method, line(), clients, run)) == [1.25, 7.25]


def test_fine_tuning_leaves_training_alone():
    method, clients = FedAvgFinetune(STEPS), regression()
    shared, store = simulate(method, net(), clients)
    expected, _ = simulate(FedAvg(STEPS), net(), clients, 2)
    served(method, net(), clients, (shared, store))
    cohort = cohort_of(method, net(), clients)
    data = ClientData(cohort.train, np.arange(4), 0, 2)
    message = method.send(shared, torch.arange(4))
    upload, _ = method.client_update(cohort.loss, message, store.rows(np.arange(4)), data)
    assert equal(method.server_update(shared, iter([upload])).params, expected.params)


def test_running_statistics_are_tuned_with_the_model():
    # FedAvg's mean ends at 5.7 (test_methods.py); one more step of 0.9 r + 0.1 m with m = 10 and 50.
    method = FedAvgFinetune(LocalTraining(batch_size=4), finetune=LocalTraining(batch_size=4))
    run = simulate(method, nn.BatchNorm1d(1).double(), CENTRED, 2)
    tensors = served(method, nn.BatchNorm1d(1).double(), CENTRED, run)
    assert_close(tensors["running_mean"].flatten().tolist(), [6.13, 10.13])


# Clients that train in `settle`.


@pytest.mark.parametrize(
    "method",
    [
        FedAvgFinetune(STEPS, finetune=STEPS),
        Ditto(STEPS),
        APFL(STEPS),
        PFedMe(STEPS, strength=1.0),
        FedPer(STEPS),
        FedRep(STEPS),
        FedBN(STEPS),
        LocalAdapter(STEPS),
    ],
)
def test_who_has_never_trained_serves_the_same_alone_and_stacked(method):
    # Clients 1 and 3 have trained, the others not.
    clients, module = regression(ALIKE), net(nn.BatchNorm1d(4))
    run = simulate(method, module, clients, order=np.array([1, 3]))
    before = tree.tensors(tree.map_tensors(torch.clone, run[1].rows(np.arange(4))))
    together = served(method, module, clients, run)
    for k in range(4):
        assert_close(
            {n: leaf[k] for n, leaf in together.items()}, one_row(served(method, module, clients, run, which=[k]))
        )
    if before:
        assert equal(tree.tensors(run[1].rows(np.arange(4))), before)


def one_row(params):
    return {name: leaf[0] for name, leaf in params.items()}


@pytest.mark.parametrize("method", [Ditto(HALFWAY), APFL(HALFWAY, alpha=1.0, adaptive=False)])
def test_who_has_never_trained_starts_from_the_global_model(method):
    # Client 1 moves w from 4 to 6; client 0, which was not there, serves what is halfway from 6 to 0.
    clients = aims((1, 0.0), (3, 8.0))
    run = simulate(method, line(), clients, order=np.array([1]))
    assert run[0].params["weight"].item() == 6.0
    assert weights(served(method, line(), clients, run)) == [3.0, 6.0]
    assert run[1].seen.tolist() == [1]


@pytest.mark.parametrize("method", [Ditto(HALFWAY), APFL(HALFWAY), PFedMe(HALFWAY, strength=1.0)])
def test_a_client_that_nobody_knows_serves_the_global_model(method):
    shared, store = simulate(method, line(), aims((1, 0.0), (3, 8.0)), order=np.array([1]))
    params = method.personalize(method.send(shared, torch.arange(1)), store.fresh(1))
    assert weights(params) == [shared.params["weight"].item()] != [4.0]


@pytest.mark.parametrize(
    "method", [FedAvgFinetune(finetune=LocalTraining(1 / 16)), Ditto(LocalTraining(1 / 16), strength=0)]
)
def test_who_trains_to_serve_trains_on_augmented_inputs(method):
    # With x = 2 a step of rate 1/16 goes half the way from 4 to 0, with x = 1 an eighth of it.
    clients = aims((1, 0.0))
    cohort = replace(cohort_of(method, line(), clients), augment=lambda x, _key, _clients: 2 * x)
    shared, fresh = method.init(line(), Population(1, 0))
    with torch.no_grad():
        assert weights(cohort.served(shared, fresh, np.arange(1))[0]) == [2.0]


# A batch's mean m moves the running mean r to 0.9 r + 0.1 m: alone 0 → 1 → 1.9 and 0 → 5 → 9.5.
CENTRED = [(torch.tensor([[m - 1], [m + 1]] * 2).double(), torch.zeros(4, 1).double()) for m in (10.0, 50.0)]


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        Ditto(),
        APFL(),
        PFedMe(inner_steps=1),
        FedPer(),
        FedRep(head_epochs=1),
        FedBN(),
        LocalAdapter(adapter=AdapterPlan(layers=("norm",))),
    ],
)
def test_a_personal_model_has_running_statistics_of_its_own(method, chunk):
    norm = nn.BatchNorm1d(1).double()
    method = replace(method, local=LocalTraining(lr=0.01, batch_size=4))
    run = simulate(method, norm, CENTRED, 2, chunk=chunk)
    assert_close(served(method, norm, CENTRED, run)["running_mean"].flatten().tolist(), [1.9, 9.5])


# Ditto.


def test_ditto_without_a_spring_is_local_training_beside_fed_avg():
    shared, store = simulate(Ditto(STEPS, strength=0.0), net(), regression(), 3)
    assert equal(shared.params, simulate(FedAvg(STEPS), net(), regression(), 3)[0].params)
    alone = simulate(Local(STEPS), net(), regression(), 3)[1]
    assert_close(store.rows(np.arange(4)).params, alone.rows(np.arange(4)).params)


def test_dittos_own_model_is_held_to_the_global_one_it_received():
    # w: 4 → 2 → 1. v is FedProx's: 4 → 2 → 1.5. In round 2, around w = 1: v = 1.5 has the gradient 3 + 0.5 and
    # goes to 0.625, then 1.25 − 0.375 and goes to 0.40625.
    method, clients = Ditto(TWICE, strength=1.0), aims((1, 0.0))
    run = simulate(method, line(), clients)
    assert run[0].params["weight"].item() == 1.0
    assert weights(served(method, line(), clients, run)) == [1.5]
    run = simulate(method, line(), clients, 2)
    assert weights(served(method, line(), clients, run)) == [0.40625]


def test_dittos_own_model_is_the_global_one_if_the_spring_is_stiff():
    # At rate 1/λ a step goes to w − 2 (v − t) / λ from wherever v was.
    method = Ditto(LocalTraining(lr=1e-4, batch_size=8), strength=1e4)
    shared, fresh = method.init(line(), Population(1, 0))
    far = replace(fresh, params={"weight": torch.full((1, 1, 1), 100.0).double()}, seen=torch.ones(1))
    data = ClientData(Examples.of(aims((1, 0.0))), np.arange(1), 0, 1)
    message = method.send(shared, torch.arange(1))
    _, kept = method.client_update(Loss(line(), "mse"), message, far, data)
    assert_close(kept.params["weight"].item(), 4 - 200 / 1e4)


# APFL.


def test_apfl_with_alpha_0_is_fed_avg():
    method = APFL(STEPS, alpha=0.0, adaptive=False)
    run = simulate(method, net(), regression(), 3)
    plain, _ = simulate(FedAvg(STEPS), net(), regression(), 3)
    assert_close(run[0].params, plain.params)
    params = served(method, net(), regression(), run)
    assert_close(params, {name: leaf.expand(4, *leaf.shape) for name, leaf in plain.params.items()})


def test_apfl_with_alpha_1_is_local_training_beside_fed_avg():
    method = APFL(STEPS, alpha=1.0, adaptive=False)
    run = simulate(method, net(), regression(), 3)
    assert_close(run[0].params, simulate(FedAvg(STEPS), net(), regression(), 3)[0].params)
    alone = simulate(Local(STEPS), net(), regression(), 3)[1]
    assert_close(served(method, net(), regression(), run), alone.rows(np.arange(4)).params)


def test_apfls_alpha_moves_with_the_gradient():
    # v̄ = 4, gradient 8: v = 4 − ½·8/16 = 3.75, w = 3.5, and v − w was 0: α stays.
    # v̄ = 3.625, gradient 7.25: v = 3.75 − ½·7.25/16, w = 3.5 − 7/16, α = ½ − ¼·7.25/16.
    method, clients = APFL(LocalTraining(lr=1 / 16, batch_size=8)), aims((1, 0.0))
    run = simulate(method, line(), clients, 2)
    kept = run[1].rows(np.arange(1))
    v, w, alpha = 3.75 - 0.5 * 7.25 / 16, 3.5 - 7 / 16, 0.5 - 0.25 * 7.25 / 16
    assert (kept.params["weight"].item(), run[0].params["weight"].item(), kept.alpha.item()) == (v, w, alpha)
    assert_close(weights(served(method, line(), clients, run)), [alpha * v + (1 - alpha) * w])


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("own", "expected"), [(3.0, 0.0), (-3.0, 1.0)])
def test_apfls_alpha_stays_between_0_and_1(own, expected, share, monkeypatch):
    monkeypatch.setattr(LocalTraining, "rate", lambda *_: share)  # of the rate; half a step is too long as well
    # t = 0. w = 1, v = 3: v̄ = 2 and ½ − ¼·2·4 is below 0. w = 5, v = −3: v̄ = 1 and ½ + ¼·8·2 above 1.
    method = APFL(HALFWAY)
    shared, fresh = method.init(line(5.0 if expected else 1.0), Population(1, 0))
    own = {"weight": torch.full((1, 1, 1), own).double()}
    data = ClientData(Examples.of(aims((1, 0.0))), np.arange(1), 0, 1)
    message = method.send(shared, torch.arange(1))
    private = replace(fresh, params=own, seen=torch.ones(1))
    _, kept = method.client_update(Loss(line(), "mse"), message, private, data)
    assert kept.alpha.item() == expected


# pFedMe.


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 2.25), (0.5, 3.125)])
def test_pfedme_descends_the_moreau_envelope(beta, expected):
    # λ = 2, η = η' = ¼, K = 1. θ: 4 − ¼·8 = 2, w: 4 − ½·2 = 3; θ: 2 − ¼ (4 − 2) = 1.5, w: 3 − ½·1.5 = 2.25.
    # β = ½: 4 + ½ (2.25 − 4).
    method = PFedMe(TWICE, ServerOptimizer(lr=beta), strength=2.0, inner_lr=0.25, inner_steps=1)
    run = simulate(method, line(), aims((1, 0.0)))
    assert run[0].params["weight"].item() == expected
    assert weights(served(method, line(), aims((1, 0.0)), run)) == [1.5]


def test_pfedmes_own_model_is_where_the_envelope_is_attained():
    # min (θ − t)² + λ/2 (θ − w)² at (2 t + λ w) / (2 + λ): for w = 4, λ = 6 and t = 0 or 8, 3 or 5.
    method, clients = PFedMe(HALFWAY, strength=6.0, inner_lr=0.1, inner_steps=100), aims((1, 0.0), (3, 8.0))
    run = simulate(method, line(), clients)
    assert_close(weights(served(method, line(), clients, run)), [3.0, 5.0])
    # w_k = 4 ∓ ¼·6·1
    assert_close(run[0].params["weight"].item(), (2.5 + 3 * 5.5) / 4)


def test_pfedme_trains_beside_a_layer_that_nothing_goes_through():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = line(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    run = simulate(PFedMe(HALFWAY, strength=2.0, inner_lr=0.1), Idle(), aims((1, 0.0)))
    assert run[0].params["used.weight"].item() < 4


# FedPer, FedRep, FedBN.

HEAD, BODY = {"3.weight", "3.bias"}, {"0.weight", "0.bias"}


def first_upload(method, module, clients):
    shared, fresh = method.init(module, Population(len(clients), 0))
    cohort = cohort_of(method, module, clients)
    everyone = torch.zeros(len(clients), dtype=torch.long)
    message = method.send(shared, torch.arange(len(clients)))
    data = ClientData(cohort.train, np.arange(len(clients)), 0, 1)
    return method.client_update(cohort.loss, message, tree.rows(fresh, everyone), data)


@pytest.mark.parametrize("personal", [(), ("3.*",), ("3.weight", "3.b*")])
def test_fed_pers_head_stays_and_its_body_is_averaged(personal):
    method, clients = FedPer(STEPS, personal=personal), regression()
    upload, kept = first_upload(method, net(), clients)
    assert set(upload.params) == BODY
    assert set(kept.params) == HEAD
    # One round from equal heads is FedAvg's in the body and each one's own in the head.
    shared, store = simulate(method, net(), clients)
    fed_avg, _ = simulate(FedAvg(STEPS), net(), clients)
    _, alone = simulate(Local(STEPS), net(), clients)
    assert_close(shared.params, {name: fed_avg.params[name] for name in BODY})
    own = alone.rows(np.arange(4)).params
    assert_close(store.rows(np.arange(4)).params, {name: own[name] for name in HEAD})


def test_fed_per_names_what_a_pattern_misses():
    with pytest.raises(ModelError, match=r"personal: head\.\* matches no parameter .* 0\.weight"):
        FedPer(STEPS, personal=("head.*",)).init(net(), Population(2, 0))


def test_fed_rep_trains_the_head_while_the_body_stands_and_then_the_body():
    # The answer is h a with a = 1, h = 2, t = 0 at rate ⅛: h → 2 − 4/8 → 1.5 − 3/8 = 1.125 with a at 1,
    # then a → 1 − 2·1.125²/8 with h at 1.125.
    module = nn.Sequential(line(1.0), line(2.0))
    method = FedRep(LocalTraining(lr=0.125, batch_size=8), head_epochs=2)
    shared, store = simulate(method, module, aims((1, 0.0)))
    assert store.rows(np.arange(1)).params["1.weight"].item() == 1.125
    assert shared.params["0.weight"].item() == 1 - 2 * 1.125**2 / 8


def test_fed_rep_counts_the_heads_epochs_in_steps_too():
    # The same with one step in place of an epoch, which is what one example is.
    module = nn.Sequential(line(1.0), line(2.0))
    method = FedRep(LocalTraining(lr=0.125, batch_size=8, steps=1), head_epochs=2)
    shared, store = simulate(method, module, aims((1, 0.0)))
    assert store.rows(np.arange(1)).params["1.weight"].item() == 1.125
    assert shared.params["0.weight"].item() == 1 - 2 * 1.125**2 / 8


def test_fed_reps_body_statistics_move_with_the_body_only():
    # Two steps of head training see the same batches but leave the body's statistics at FedAvg's one step.
    norm, head = nn.BatchNorm1d(1).double(), line(1.0)
    method = FedRep(LocalTraining(lr=0.1, batch_size=4), head_epochs=2)
    shared, _ = simulate(method, nn.Sequential(norm, head), CENTRED[:1])
    assert_close(shared.stats["0.running_mean"].item(), 1.0)


@pytest.mark.parametrize(
    ("norms", "layer", "stay"), [("batch", "batch", True), ("batch", "layer", False), ("all", "layer", True)]
)
def test_fed_bns_norm_layers_are_never_sent(norms, layer, stay):
    module = net(nn.BatchNorm1d(4) if layer == "batch" else nn.LayerNorm(4))
    method = FedBN(STEPS, norms=norms)
    upload, kept = first_upload(method, module, regression(ALIKE))
    sent = [name for name in tree.tensors(upload) if "/1." in name]
    assert (not sent) == stay
    assert set(upload.params) >= HEAD | BODY
    assert set(kept.params) == ({"1.weight", "1.bias"} if stay else set())
    assert bool(kept.stats) == (layer == "batch")


def test_fed_bn_without_norm_layers_is_fed_avg_bit_for_bit_and_says_so(caplog):
    one, other = (simulate(method, net(), regression(), 3)[0] for method in (FedBN(STEPS), FedAvg(STEPS)))
    assert equal(one.params, other.params)
    assert "fedbn: Sequential is a model without BatchNorm; norms = 'all' counts others, so that" in caplog.text


# The local adapter.


@pytest.mark.parametrize("precondition", [False, True])
def test_a_lone_clients_local_adapter_is_floral_with_one_adapter(precondition):
    plan = AdapterPlan(2)
    settings = {"adapter": plan, "local": STEPS, "init_std": 0.3, "precondition": precondition}
    clients, module = regression([5]), net()
    shared, store = simulate(LocalAdapter(**settings), module, clients, 3)
    floral, _ = simulate(FLoRAL(1, **settings), module, clients, 3)
    assert_close(shared.params, floral.base)
    own = store.rows(np.arange(1)).adapter
    assert_close({name: leaf[0] for name, leaf in own.items()}, floral.adapters)


def test_only_the_base_of_a_local_adapter_is_sent_and_averaged():
    # b + a from 0 at rate ⅛: both go a quarter of the way to 8 and 0; b is averaged, a stays.
    module = nn.Linear(1, 1).double()
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    clients = [(torch.zeros_like(x), y) for x, y in aims((1, 8.0), (3, 0.0))]
    method = LocalAdapter(LocalTraining(lr=0.125), adapter=AdapterPlan(layers=("bias",)))
    upload, _ = first_upload(method, module, clients)
    assert set(upload.params) == {"weight", "bias"}
    run = simulate(method, module, clients)
    assert run[0].params["bias"].item() == 0.5
    assert run[1].rows(np.arange(2)).adapter["bias"].flatten().tolist() == [2.0, 0.0]
    assert served(method, module, clients, run)["bias"].flatten().tolist() == [2.5, 0.5]


# kNN-Per.


def answers(method, module, clients, x, rounds=2):
    """What the clients answer on x (B, 3) after a run."""
    run = simulate(method, module, clients, rounds, "cross_entropy")
    params = served(method, module, clients, run, "cross_entropy")
    loss = Loss(method.adapt(module), "cross_entropy")
    return loss.outputs(params, x.expand(len(clients), *x.shape)), params


QUESTIONS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).double()


def test_knn_per_without_neighbours_is_fed_avg():
    found, _ = answers(KNNPer(STEPS, share=0.0), net(), labelled(), QUESTIONS)
    expected, _ = answers(FedAvg(STEPS), net(), labelled(), QUESTIONS)
    assert_close(found, expected.log_softmax(-1))


@pytest.mark.parametrize("neighbours", [1, 3])
def test_knn_per_alone_answers_with_the_labels_of_the_nearest(neighbours):
    # Unequal clients: no padding may ever be near; client 2 has one example and no third neighbour.
    method, clients, module = KNNPer(STEPS, share=1.0, neighbours=neighbours), labelled(), net()
    found, params = answers(method, module, clients, QUESTIONS)
    body = {name: params[f"model.{name}"][0] for name in ("0.weight", "0.bias")}

    def features(x):
        return torch.tanh(x @ body["0.weight"].T + body["0.bias"])

    for k, (x, y) in enumerate(clients):
        for b, question in enumerate(QUESTIONS):
            distance = (features(x) - features(question)).norm(dim=1)
            near = distance.argsort()[:neighbours]
            weight = (-distance[near]).exp() / (-distance[near]).exp().sum()
            probs = torch.stack([weight[y[near] == label].sum() for label in range(2)])
            assert_close(found[k, b].exp(), probs)


def test_knn_per_leaves_out_what_is_ignored():
    method, (x, y) = KNNPer(STEPS, share=1.0, neighbours=9), labelled()[0]
    module = net()
    loss = Loss(method.adapt(module), "cross_entropy")
    params = {f"model.{name}": leaf.detach().unsqueeze(0) for name, leaf in module.named_parameters()}
    found = []
    for targets in (y[1:], torch.cat([torch.tensor([-100]), y[1:]])):
        inputs = x[-len(targets) :]
        data = ClientData(Examples.of([(inputs, targets)]), np.arange(1), 0, 1)
        kept = remembered(loss, params, data)
        served = params | {"features": kept.features, "labels": kept.labels}
        found.append(loss.outputs(served, QUESTIONS.unsqueeze(0)))
    assert_close(found[0], found[1])
    nobody = Examples.of([(x, torch.full_like(y, -100))])
    nothing = remembered(loss, params, ClientData(nobody, np.arange(1), 0, 1))
    served = params | {"features": nothing.features, "labels": nothing.labels}
    assert_close(loss.outputs(served, QUESTIONS.unsqueeze(0))[0], module(QUESTIONS).detach().log_softmax(-1))


def test_knn_per_mixes_probabilities():
    near, _ = answers(KNNPer(STEPS, share=1.0), net(), labelled(), QUESTIONS)
    model, _ = answers(KNNPer(STEPS, share=0.0), net(), labelled(), QUESTIONS)
    mixed, _ = answers(KNNPer(STEPS, share=0.25), net(), labelled(), QUESTIONS)
    assert_close(mixed.exp(), 0.25 * near.exp() + 0.75 * model.exp())


def test_knn_per_remembers_under_batch_norm_too():
    clients, module = labelled(ALIKE), net(nn.BatchNorm1d(4))
    method = KNNPer(STEPS, neighbours=2)
    run = simulate(method, module, clients, 2, "cross_entropy")
    loss = Loss(method.adapt(module), "cross_entropy")
    together = loss.outputs(served(method, module, clients, run, "cross_entropy"), QUESTIONS.expand(4, 7, 3))
    for k in range(4):
        alone = served(method, module, clients, run, "cross_entropy", which=[k])
        assert_close(together[k], loss.outputs(alone, QUESTIONS.unsqueeze(0))[0])


def test_knn_per_says_what_it_cannot_remember_before_it_trains():
    with pytest.raises(RecipeError, match="class labels"):
        start(
            task_of(net(), regression(), test=regression(), loss="mse"),
            KNNPer(STEPS),
            Schedule(rounds=2),
            Engine("looped"),
        )
    with pytest.raises(ModelError, match=r"no nn\.Linear"):
        KNNPer().adapt(nn.Conv2d(1, 1, 1))
    with pytest.raises(ModelError, match="no such layer"):
        KNNPer(features="head").adapt(net())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (FedProx, {"mu": -1.0}),
        (Ditto, {"strength": -1.0}),
        (APFL, {"alpha": 1.5}),
        (PFedMe, {"inner_steps": 0}),
        (FedProx, {"mu": 20.0, "local": LocalTraining(lr=0.1)}),
        (Ditto, {"strength": 20.0, "local": LocalTraining(lr=0.1)}),
        (Ditto, {"strength": 30.0, "local": LocalTraining(lr=0.1, momentum=0.5)}),
        (PFedMe, {"strength": 400.0, "inner_lr": 0.001}),
        (PFedMe, {"strength": 40.0}),
        (FedRep, {"head_epochs": 0}),
        (LocalAdapter, {"init_std": -1.0}),
        (KNNPer, {"share": 2.0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(method, settings):
    with pytest.raises(RecipeError):
        method(**settings)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_spring_is_refused_from_where_it_no_longer_settles(momentum):
    limit = 2 * (1 + momentum)
    ends = []
    for strength in (0.99 * limit, limit):
        w = torch.tensor(1.0, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum)
        for _ in range(3000):
            optimizer.zero_grad()
            (strength / 2 * w.square()).backward()
            optimizer.step()
        ends.append(abs(w.item()))
    assert ends[0] < 1e-6 < ends[1]
    Ditto(LocalTraining(lr=1.0, momentum=momentum), strength=0.99 * limit)
    with pytest.raises(RecipeError, match=r"strength = .* with local\.lr = 1:.* below"):
        Ditto(LocalTraining(lr=1.0, momentum=momentum), strength=limit)
    Ditto(LocalTraining(lr=1.0, optimizer="adamw"), strength=100.0)
