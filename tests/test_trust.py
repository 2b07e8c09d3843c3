"""Trust: the published formulas and ours against loops in numpy, and what the published code gets wrong."""

import tomllib
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from simulate import simulate
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.adapters.products import factors, products
from umbel.cli.show import first_trust
from umbel.clients import ClientData, Examples
from umbel.clustering import inner_products
from umbel.cohort import Cohort, Engine, PrivateStore, Tally
from umbel.costs import cost_of
from umbel.errors import RecipeError, RoundError
from umbel.methods import FLoRAL, Population, Trust, similarity, trust, trusting
from umbel.methods.routing import losses_of
from umbel.methods.similarity import (
    divergences,
    kept,
    logit_distances,
    product_cosines,
    published_scores,
    row_cosines,
)
from umbel.methods.trusting import combined, linked_of, split, trust_of
from umbel.model.dropout import seed_dropout
from umbel.model.loss import Loss
from umbel.model.pretrained import of_transformers
from umbel.recipe import read
from umbel.report import write_report
from umbel.rounds import rounds, start
from umbel.runs import run_recipe
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.tasks.digits import Digits
from umbel.tasks.language import parts_of, shares_of
from umbel.train import LocalTraining, local_train

PLAN = AdapterPlan(2, ("linear", "bias"))
STEPS = LocalTraining(lr=0.1, batch_size=4, epochs=2)
COUNTS = [5, 8, 3, 13, 8]
GROUP = torch.tensor([0, 1, 0, 1, 0])
NEVER = float("-inf")


def net(dropout=0.0):
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 3)).double()


def labelled(counts=COUNTS):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 4, generator=draw).double(), torch.randint(0, 3, (n,), generator=draw)) for n in counts
    ]


PUBLIC = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double()


class Run:
    """A few rounds with public inputs, each with clients of its own."""

    def __init__(
        self, method, module=None, clients=None, chunk=64, public=PUBLIC, group=GROUP, seed=0, shares=None
    ):
        module, clients = module or net(), clients or labelled()
        group = None if group is None else group[: len(clients)]
        known = Population(len(clients), seed, group, public=public, shares=shares)
        self.method, self.everyone = method, np.arange(len(clients))
        self.shared, fresh = method.init(module, known)
        self.store = PrivateStore(fresh, len(clients))
        loss = Loss(seed_dropout(method.adapt(module)), "cross_entropy")
        self.cohort = Cohort(method, loss, Examples.of(clients), seed, chunk)
        self.round = 0

    def go(self, *orders):
        for order in orders or [self.everyone]:
            self.round += 1
            work = self.cohort.uploads(self.shared, self.store, np.array(order), self.round, Tally())
            self.shared = self.method.server_update(self.shared, work)
        return self

    def message(self, *clients):
        return self.method.send(self.shared, torch.tensor(clients or self.everyone))

    def served(self):
        return self.cohort.served(self.shared, self.store.rows(self.everyone), self.everyone)


def equal(one, other):
    one, other = tree.tensors(one), tree.tensors(other)
    return set(one) == set(other) and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


def drawn(module, plan, num_clients, seed=0, alike=False):
    """A bank, and adapters (N, …) with independent factors, or with one A for all."""
    bank = plan.bank(module)
    draw = torch.Generator().manual_seed(seed)
    adapters = bank.init(num_clients, draw, 1.0)
    if alike:
        adapters |= {p.a_name: adapters[p.a_name][:1].expand_as(adapters[p.a_name]) for p in bank.low_rank}
    biases = {u.name: torch.randn(num_clients, *u.shape, generator=draw) for u in bank.additive}
    return bank, {name: leaf.double() for name, leaf in (adapters | biases).items()}


def softmax(scores):
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def trusted(scores, temperature=1.0, **settings):
    size = len(scores)
    everyone = torch.ones(size, size, dtype=torch.bool)
    return trust_of(torch.as_tensor(scores), everyone, torch.arange(size), temperature, **settings)


# The formulas, against loops.


def numpy_row_cosines(bank, adapters):
    """The published loop: A is stored (in, r) and B (r, out), and cosine_similarity has dim=1."""
    stored = [adapters[part.a_name].mT.numpy() for part in bank.low_rank]
    stored += [adapters[part.b_name].mT.numpy() for part in bank.low_rank]
    stored += [adapters[update.name][:, None].numpy() for update in bank.additive]
    size = len(stored[0])
    found = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            rows = [
                p @ q / (np.linalg.norm(p) * np.linalg.norm(q))
                for leaf in stored
                for p, q in zip(leaf[i], leaf[j], strict=True)
            ]
            found[i, j] = np.mean(rows)
    return found


def numpy_product_cosines(bank, adapters):
    dense = [leaf.flatten(1) for leaf in products(bank, adapters).values()]
    flat = torch.cat([*dense, *(adapters[update.name].flatten(1) for update in bank.additive)], 1).numpy()
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit @ unit.T


def numpy_divergences(log_p):
    log_p = log_p.numpy()
    return np.array([[(np.exp(p) * (p - q)).sum(1).mean() for q in log_p] for p in log_p])


def numpy_logit_distances(logits, top):
    cut = np.zeros(logits.shape)
    for client, rows in enumerate(logits.numpy()):
        for place, row in enumerate(rows):
            best = np.argsort(-row)[:top]
            cut[client, place, best] = row[best]
    return np.array([[np.abs(p - q).sum(1).mean() for q in cut] for p in cut])


@pytest.mark.parametrize("plan", [PLAN, AdapterPlan(3, ("linear",))])
@pytest.mark.parametrize(
    ("score", "twin"), [(row_cosines, numpy_row_cosines), (product_cosines, numpy_product_cosines)]
)
def test_cosines_are_those_of_a_loop(score, twin, plan, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", 2)
    bank, adapters = drawn(net(), plan, 5)
    assert_close(score(bank, adapters).numpy(), twin(bank, adapters))


def test_cosines_of_convolutions_and_embeddings_are_those_of_a_loop():
    module = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Embedding(7, 5), nn.Conv1d(2, 3, 3)])
    bank, adapters = drawn(module, AdapterPlan(2, ("conv", "embedding", "bias")), 4)
    assert_close(product_cosines(bank, adapters).numpy(), numpy_product_cosines(bank, adapters))


def test_layers_count_by_what_they_add_each_with_its_own_scaling():
    patterns = {"rank_pattern": {"0": 1}, "alpha_pattern": {"2": 40}}
    peft = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "2"], "use_rslora": True} | patterns
    module = nn.ModuleDict({"0": nn.Linear(4, 5), "2": nn.Linear(5, 3)}).requires_grad_(False)
    bank, adapters = drawn(module, AdapterPlan(peft=peft), 5)
    assert len({part.scaling for part in bank.low_rank}) == 2
    dense = [(p.scaling * adapters[p.b_name] @ adapters[p.a_name]).flatten(1) for p in bank.low_rank]
    unit = nn.functional.normalize(torch.cat(dense, 1))
    assert_close(product_cosines(bank, adapters), unit @ unit.T)
    one = {name: leaf.unsqueeze(1) for name, leaf in adapters.items()}
    start = {name: torch.zeros_like(leaf[:1]) for name, leaf in one.items()}
    found = inner_products(bank, start, one, {}, "unit_product")
    assert_close(torch.from_numpy(found), unit @ unit.T)


def test_what_all_have_begun_with_makes_nobody_alike():
    bank, adapters = drawn(net(), AdapterPlan(2, ("linear",)), 5)
    axes = {part.a_name: 1 for part in bank.low_rank} | {part.b_name: 2 for part in bank.low_rank}
    start = {}
    for name, leaf in adapters.items():  # one rank is everyone's and large, one a client's own
        common, own = leaf.split(1, axes[name])
        common = 10 * common[:1]
        adapters[name] = torch.cat([common.expand_as(own), own], axes[name])
        start[name] = torch.cat([common, torch.zeros_like(own[:1])], axes[name])
    dense = [(adapters[p.b_name][:, :, 1:] @ adapters[p.a_name][:, 1:]).flatten(1) for p in bank.low_rank]
    unit = nn.functional.normalize(torch.cat(dense, 1))
    assert product_cosines(bank, adapters).min() > 0.9
    assert_close(product_cosines(bank, adapters, start), unit @ unit.T)
    one = {name: leaf.unsqueeze(1) for name, leaf in adapters.items()}
    begun = {name: leaf.unsqueeze(1) for name, leaf in start.items()}
    assert_close(torch.from_numpy(inner_products(bank, begun, one, {}, "unit_product")), unit @ unit.T)


def test_small_updates_of_a_large_seed_are_told_apart():
    bank, drawn_factors = drawn(net(), AdapterPlan(2, ("linear",)), 6)
    start = {name: leaf[:1] for name, leaf in drawn_factors.items()}
    adapters = {name: start[name] + 1e-4 * leaf for name, leaf in drawn_factors.items()}
    dense = []
    for part in bank.low_rank:
        made = adapters[part.b_name].double() @ adapters[part.a_name].double()
        dense.append((made - start[part.b_name].double() @ start[part.a_name].double()).flatten(1))
    unit = nn.functional.normalize(torch.cat(dense, 1))
    assert_close(product_cosines(bank, adapters, start), unit @ unit.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scheme", "rounds", "told"), [("uniform", 3, 1), ("uniform", 4, 0), ("none", 3, 0)])
def test_a_run_that_ends_before_the_first_mixing_is_told(scheme, rounds, told, caplog):
    Trust(PLAN, STEPS, scheme, begin=4).init(net(), Population(3, 0, num_rounds=rounds))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == told
    assert all("rounds = 3 and the first mixing is after round 4" in one for one in said)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(RecipeError, match="threshold = nan"):
        Trust(PLAN, STEPS, threshold=float("nan"))


@pytest.mark.parametrize("numbers", [1, 2**25])
def test_divergences_are_those_of_a_loop(numbers, monkeypatch):
    monkeypatch.setattr(similarity, "NUMBERS", numbers)
    log_p = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    assert_close(divergences({"values": log_p}, 5).numpy(), numpy_divergences(log_p))


def test_divergences_of_the_largest_probabilities_spread_the_rest_evenly():
    log_p = (3 * torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).double()).log_softmax(-1)
    sent = kept(log_p, 3)
    assert {name: tuple(leaf.shape) for name, leaf in sent.items()} == {"values": (4, 6, 3), "index": (4, 6, 3)}
    best = log_p >= log_p.topk(3, -1).values[..., -1:]
    rest = (log_p.exp() * ~best).sum(-1, keepdim=True) / 6
    assert_close(divergences(sent, 9).numpy(), numpy_divergences(torch.where(best, log_p, rest.log())))


@pytest.mark.parametrize("numbers", [1, 2**25])
@pytest.mark.parametrize("top", [2, 9])
def test_distances_of_logits_are_those_of_a_loop(top, numbers, monkeypatch):
    monkeypatch.setattr(similarity, "NUMBERS", numbers)
    logits = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).double() - 2
    assert_close(logit_distances(kept(logits, top), 9).numpy(), numpy_logit_distances(logits, top))


# What the published formulas must come to.


@pytest.mark.parametrize(("size", "own"), [(4, 0.475), (8, 0.280), (9, 0.254)])
def test_published_weight_trust_of_independent_starts_is_the_same_for_any_data(size, own):
    bank, adapters = drawn(nn.Linear(2000, 50), AdapterPlan(4, ("linear",)), size)
    weights = trusted(row_cosines(bank, adapters))
    assert_close(weights.diagonal(), torch.full((size,), np.e / (np.e + size - 1)).double(), atol=3e-3, rtol=0)
    assert round(float(np.e / (np.e + size - 1)), 3) == own


def test_published_weight_trust_of_one_start_is_nearly_even():
    # 2,000 of 2,004 rows are A's.
    bank, adapters = drawn(nn.Linear(2000, 50), AdapterPlan(4, ("linear",)), 5, alike=True)
    assert_close(trusted(row_cosines(bank, adapters)), torch.full((5, 5), 0.2).double(), atol=1e-3, rtol=0)
    assert trusted(product_cosines(bank, adapters), 0.1).diagonal().min() > 0.99


@pytest.mark.parametrize(("size", "own"), [(4, 0.903), (8, 0.373), (9, 0.304), (20, 0.082)])
def test_published_prediction_trust_of_even_distances_depends_on_how_many_there_are(size, own):
    # Client i's only logit is label i's: all are 20 apart.
    logits = (10 * torch.eye(size)).unsqueeze(1)
    weights = trusted(published_scores(logit_distances(kept(logits, 100), size)))
    assert weights.diagonal().numpy().round(3).tolist() == [own] * size


def test_products_are_alike_whatever_their_factors():
    bank, adapters = drawn(net(), AdapterPlan(2, ("linear",)), 3)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)).double())[0] * 5
    other = dict(adapters)
    for part in bank.low_rank:
        a, b = adapters[part.a_name], adapters[part.b_name]
        other[part.a_name] = torch.cat([turn @ a[:1], a[1:]])
        other[part.b_name] = torch.cat([b[:1] @ turn.inverse(), b[1:]])
    assert_close(product_cosines(bank, other), product_cosines(bank, adapters))
    assert not torch.allclose(row_cosines(bank, other), row_cosines(bank, adapters), atol=1e-2)


# Rows of weights.

NUMBER = st.floats(-50, 50) | st.sampled_from([0.0, 1e30, -1e30, NEVER, float("nan")])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_row_sums_to_1_and_nobody_listens_where_it_may_not(data):
    size, rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    own = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=rows, max_size=rows)))
    scores = torch.tensor(
        data.draw(st.lists(st.lists(NUMBER, min_size=size, max_size=size), min_size=rows, max_size=rows))
    )
    allowed = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=rows, max_size=rows))
    )
    weights = trust_of(
        scores,
        allowed,
        own,
        data.draw(st.sampled_from([1e-30, 0.1, 1.0, 1e9, float("inf")])),
        data.draw(st.sampled_from([NEVER, -1.0, 100.0])),
        data.draw(st.integers(0, 7)),
        data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    assert_close(weights.sum(1), torch.ones(rows).double())
    assert bool((weights >= 0).all())
    heard = allowed & scores.isfinite()
    alone = ~heard.any(1, keepdim=True)
    assert not weights[~heard & ~alone].any()
    assert bool((weights.gather(1, own.unsqueeze(1))[alone] == 1).all())


def test_masks_come_before_the_softmax():
    # What is left out does not change how the others are weighed, however good it is.
    scores = torch.tensor([[0.0, -1.0, 5.0]])
    allowed = torch.tensor([[True, True, False]])
    weights = trust_of(scores, allowed, torch.tensor([0]))
    assert_close(weights[:, :2], scores[:, :2].double().softmax(1))
    assert weights[0, 2] == 0


def test_no_temperature_trusts_all_and_none_the_best():
    scores = torch.tensor([[0.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-9.0, -8.0, -7.0]])
    assert_close(trusted(scores, float("inf")), torch.full((3, 3), 1 / 3).double())
    assert_close(trusted(scores, 1e-30), torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 1]]).double())


def test_sparse_rows_keep_what_is_asked_for():
    scores = torch.tensor([[0.9, 0.6, 0.4, 0.1], [0.9, 0.4, 0.3, 0.1]])
    own, allowed = torch.tensor([0, 0]), torch.ones(2, 4, dtype=torch.bool)
    above = trust_of(scores, allowed, own, threshold=0.35)
    assert (above > 0).tolist() == [[True, True, True, False], [True, True, False, False]]
    # As published, two stay however low they are.
    assert (trust_of(scores, allowed, own, threshold=0.95) > 0).sum(1).tolist() == [2, 2]
    assert (trust_of(scores, allowed, own, top_k=3) > 0).sum(1).tolist() == [3, 3]


def test_among_equals_a_client_is_nearest_to_itself():
    even, own = torch.zeros(3, 4), torch.tensor([2, 0, 3])
    allowed = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(trust_of(even, allowed, own, top_k=1).argmax(1), own)
    kept = trust_of(even, allowed, own, threshold=0.5) > 0
    assert kept.tolist() == [[True, False, True, False], [True, True, False, False], [True, False, False, True]]


def test_a_floor_leaves_the_others_their_proportions():
    scores = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    free, held = trusted(scores), trusted(scores, self_weight=0.5)
    assert_close(held[0], torch.cat([torch.tensor([0.5]).double(), 0.5 * free[0, 1:] / free[0, 1:].sum()]))
    assert torch.equal(held[2], free[2])  # it has more


@pytest.mark.parametrize("how", [{"top_k": 2}, {"threshold": 3.5}])
def test_a_floor_is_kept_where_ones_own_score_is_left_out(how):
    scores, own = torch.tensor([[0.0, 5.0, 4.0]]), torch.tensor([0])
    row = trust_of(scores, torch.ones(1, 3, dtype=torch.bool), own, self_weight=0.5, **how)[0]
    assert_close(row, torch.cat([torch.tensor([0.5]), 0.5 * torch.tensor([5.0, 4.0]).softmax(0)]).double())
    deaf = trust_of(scores, torch.tensor([[False, True, True]]), own, self_weight=0.5, **how)[0]
    assert deaf[0] == 0  # who may not listen to itself does not


@pytest.mark.parametrize(
    ("topology", "edges"),
    [
        ("ring", {(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)}),
        ("star", {(0, 1), (0, 2), (0, 3), (0, 4)}),
        (((1, 3), (4, 2)), {(1, 3), (2, 4)}),
    ],
)
@pytest.mark.parametrize("scheme", ["weights", "predictions", "uniform", "validation"])
def test_clients_listen_along_edges_only(scheme, topology, edges):
    run = Run(Trust(PLAN, STEPS, scheme, begin=1, topology=topology, temperature=10.0)).go().go()
    found = {(min(i, j), max(i, j)) for i, j in (run.served()[1] > 0).nonzero().tolist() if i != j}
    assert found == edges
    assert_close(run.served()[1].sum(1), torch.ones(5))


# Which scheme calls which formula.


def uploaded(method, run):
    """Everyone's upload of the first round."""
    data = ClientData(run.cohort.train, run.everyone, 0, 1)
    return method.client_update(run.cohort.loss, run.message(), run.store.rows(run.everyone), data)[0]


def numpy_trust(method, run, upload):
    """W by the formula that the method's name stands for."""
    adapters = {name: leaf[:, 0] for name, leaf in upload.adapters["adapter"].items()}
    bank, paper = run.shared.bank, method.mode == "paper"
    if method.scheme == "weights":
        score = (numpy_row_cosines if paper else numpy_product_cosines)(bank, adapters)
    elif paper:
        apart = numpy_logit_distances(upload.predictions["values"], 100)
        score = -10 * apart / apart.sum(1, keepdims=True)
    else:
        score = -numpy_divergences(upload.predictions["values"])
    if paper:
        return softmax(score)
    np.fill_diagonal(score, -np.inf)
    size = -score[np.isfinite(score)].reshape(5, 4).mean(1, keepdims=True)
    np.fill_diagonal(score, score.max(1))
    return softmax(score / (np.maximum(0.1 * size, 0.1) if method.scheme == "predictions" else 0.1))


@pytest.mark.parametrize("mode", ["umbel", "paper"])
@pytest.mark.parametrize("scheme", ["weights", "predictions"])
def test_each_scheme_calls_its_own_formula(scheme, mode):
    method = Trust(AdapterPlan(2, ("linear",)), STEPS, scheme, mode, begin=1)
    run = Run(method)
    upload = uploaded(method, run)
    shared = method.server_update(run.shared, iter([upload]))
    expected = numpy_trust(method, run, upload)
    assert_close(shared.trust.numpy(), expected.astype(np.float32), atol=1e-5, rtol=1e-4)
    for part, tensors in upload.adapters.items():
        for name, leaf in tensors.items():
            mixed = np.tensordot(expected, leaf.numpy(), 1)
            assert_close(shared.held[part][name].numpy(), mixed, atol=1e-5, rtol=1e-4)


def test_published_weights_are_a_heavy_diagonal_at_first_and_the_even_mean_after_a_few_mixes():
    # As published, every client draws its A for itself: whatever the data, e / (e + N − 1), then 1 / N.
    wide = nn.Sequential(nn.Linear(4, 2048), nn.Tanh(), nn.Linear(2048, 3)).double()
    plan, slow = AdapterPlan(3, ("linear",), ("2.*",)), LocalTraining(lr=1e-3, batch_size=4)
    run = Run(Trust(plan, slow, "weights", "paper", begin=1, shared_start=False, freeze_base=True), wide).go()
    own = np.e / (np.e + 4)
    expected = torch.full((5, 5), (1 - own) / 4).fill_diagonal_(own)
    assert_close(run.shared.trust, expected, atol=5e-3, rtol=0)
    for _ in range(6):
        run.go()
    assert_close(run.shared.trust, torch.full((5, 5), 0.2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("far", "least"), [(1e-6, 0.3333), (0.01, 0.31), (1.0, 0.0)])
def test_predictions_that_are_alike_by_chance_are_trusted_alike(far, least):
    # Divergences in proportion 1 : 1.2 : 1.4, of any size: where models differ by noise nobody is chosen.
    apart = far * torch.tensor([[0.0, 1.0, 1.4], [1.0, 0.0, 1.2], [1.4, 1.2, 0.0]]).double()
    method = Trust(PLAN, STEPS, "predictions")
    weights = method._weights(-apart, torch.ones(3, 3, dtype=torch.bool), torch.arange(3))
    assert weights.min() > least
    assert (far < 1) == (weights.max() < 0.36)


@pytest.mark.parametrize("mode", ["umbel", "paper"])
def test_validation_trust_is_made_of_losses_on_what_is_kept_from_training(mode):
    method = Trust(PLAN, STEPS, "validation", mode, begin=1, trust_fraction=0.3)
    run = Run(method).go()
    found = run.served()[1]
    data = ClientData(run.cohort.train, run.everyone, 0, 0)
    loss = np.zeros((5, 5))
    for i in range(5):
        own = split(data, 0.3, 4)[1].part[i]
        x, y = run.cohort.train.x[own], run.cohort.train.y[own]
        for j in range(5):
            one = tree.map_tensors(lambda leaf, j=j: leaf[j : j + 1], run.shared.held)
            params = method.personalize(replace(run.message(0), own=one, listens=torch.zeros(1, 0)), NOTHING_KEPT)
            loss[i, j] = nn.functional.cross_entropy(run.cohort.loss.outputs(params, x[None])[0], y).item()
    expected = softmax(-np.exp(loss)) if mode == "paper" else softmax(-loss / 0.3)
    assert_close(found.numpy(), expected.astype(np.float32), atol=1e-6, rtol=1e-4)


def test_all_adapters_are_measured_on_the_same_examples(monkeypatch):
    seen = []

    def spied(loss, candidates, data, **rest):
        seen.append(data.part)
        return losses_of(loss, candidates, data, **rest)

    monkeypatch.setattr(similarity, "losses_of", spied)
    run = Run(Trust(PLAN, STEPS, "validation", begin=1)).go().go()
    run.served()
    assert len(seen) == 3  # one stacked evaluation of all by all, each time
    assert all(np.array_equal(a, b) for part in seen for a, b in zip(part, seen[0], strict=True))


def test_no_more_models_than_fit_are_evaluated_at_once(monkeypatch):
    run = Run(Trust(PLAN, STEPS, "validation", begin=1)).go()
    expected = run.served()[1]
    monkeypatch.setattr(similarity, "FORWARD_EXAMPLES", 20)
    assert_close(run.served()[1], expected)


def test_what_trust_is_measured_on_is_never_trained_on():
    data = ClientData(Examples.of(labelled([1, 2, 3, 6, 40])), np.arange(5), 0, 1)
    train, held = split(data, 0.25, 4)
    again = split(replace(data, round=7), 0.25, 4)
    for client, (own, measured) in enumerate(zip(train.part, held.part, strict=True)):
        count, first = data.examples.count[client], data.examples.start[client]
        assert sorted({*own, *measured}) == list(range(first, first + count))
        assert bool(set(own) & set(measured)) == (count < 3)  # so few serve for both
        assert len(own) % 4 != 1 or count == 1  # no lone example in a batch of 4
        assert np.array_equal(own, again[0].part[client])
        assert np.array_equal(measured, again[1].part[client])
    assert [len(own) for own in held.part] == [1, 2, 1, 2, 10]


def test_validation_trains_on_what_is_left():
    method = Trust(PLAN, STEPS, "validation", begin=1, trust_fraction=0.5)
    clients = labelled()
    run = Run(method, clients=clients).go()
    data = ClientData(Examples.of(clients), np.arange(5), 0, 1)
    held = split(data, 0.5, 4)[1].part
    examples = Examples.of(clients)
    x = examples.x.clone()
    x[np.concatenate(held)] = 3.0  # other inputs to measure on, the same to train on
    changed = [(x[s : s + n], y) for (_, y), s, n in zip(clients, examples.start, examples.count, strict=True)]
    assert equal(Run(method, clients=changed).go().shared.held, run.shared.held)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("scheme", ["weights", "predictions", "none", "uniform", "oracle", "validation"])
def test_every_scheme_trains_on_the_same_examples(scheme, fraction, monkeypatch):
    if scheme == "validation" and not fraction:
        return
    seen = []

    def spied(objective, groups, data, *rest):
        seen.append(data)
        return local_train(objective, groups, data, *rest)

    monkeypatch.setattr(trust, "local_train", spied)
    run = Run(Trust(PLAN, STEPS, scheme, begin=1, trust_fraction=fraction)).go()
    expected = split(ClientData(run.cohort.train, run.everyone, 0, 1), 0.5, 4)[0].part if fraction else None
    found = seen[0].part
    assert (found is None) == (expected is None)
    assert fraction == 0 or all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["trust", "languages"])
def test_recipes_compare_schemes_on_equal_data(name):
    table = tomllib.loads((resources.files("umbel.recipes") / f"{name}.toml").read_text())
    methods = [read(table, label).method for label in table["method"]]
    assert {method.trust_fraction for method in methods if isinstance(method, Trust)} == {0.1}


def test_evaluation_is_the_same_every_time():
    for scheme in ("validation", "predictions"):
        run = Run(Trust(PLAN, STEPS, scheme, begin=1), net(dropout=0.5)).go().go()
        one, other = run.served(), run.served()
        assert equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


# The references.


def test_an_oracle_of_mixed_clients_trusts_by_what_they_have_in_common():
    parts = torch.tensor(
        [[0.75, 0.25, 0.0], [0.25, 0.75, 0.0], [0.75, 0.25, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]
    )
    run = Run(Trust(PLAN, STEPS, "oracle", begin=1), shares=parts).go()
    common = (parts @ parts.T).double()
    assert_close(run.shared.trust.double(), common / common.sum(1, keepdim=True), atol=1e-6, rtol=0)
    assert run.shared.trust[0, :4].tolist() == pytest.approx([0.3125, 0.1875, 0.3125, 0.1875])  # as published


@pytest.mark.parametrize("heterogeneity", ["specific", "mixed"])
def test_tasks_of_texts_say_what_part_of_a_client_is_of_which_category(heterogeneity):
    parts = parts_of(shares_of(3, 2, heterogeneity, paired=False))
    assert parts.sum(1).tolist() == [1.0] * 6
    assert sorted(parts[0].tolist()) == ([0.0, 0.0, 1.0] if heterogeneity == "specific" else [0.0, 0.25, 0.75])


def test_the_oracles_rows_are_even_within_the_group_and_sum_to_1():
    trust = Run(Trust(PLAN, STEPS, "oracle", begin=1)).go().shared.trust
    same = GROUP.unsqueeze(0) == GROUP.unsqueeze(1)
    assert_close(trust, same.float() / same.sum(1, keepdim=True))


@pytest.mark.parametrize("method", [Trust(PLAN, STEPS, "uniform"), Trust(PLAN, STEPS, "weights", temperature=1e9)])
def test_even_trust_is_fed_avg_where_all_have_equally_many_examples(method):
    clients = labelled([8, 8, 8])
    run = Run(replace(method, begin=1, trust_fraction=0.0), clients=clients).go().go().go()
    floral, _ = simulate(FLoRAL(1, PLAN, local=STEPS, init_std=0.0), net(), clients, 3, "cross_entropy")
    for k in range(3):
        one = tree.map_tensors(lambda leaf, k=k: leaf[k], run.shared.held)
        assert_close(one["base"], floral.base, atol=1e-6, rtol=1e-5)
        assert_close(one["adapter"], floral.adapters, atol=1e-6, rtol=1e-5)


def test_trust_in_nobody_is_local_training():
    alone = Run(Trust(PLAN, STEPS, "none", begin=1)).go().go()
    never = Run(Trust(PLAN, STEPS, "uniform", begin=9)).go().go()
    assert equal(alone.shared.held, never.shared.held)
    assert torch.equal(alone.served()[1], torch.eye(5))


# What all start with, and what goes on.


def test_all_start_alike_unless_asked_not_to():
    held = Run(Trust(PLAN, STEPS)).shared.held["adapter"]
    assert all(bool((leaf == leaf[:1]).all()) for leaf in held.values())
    run = Run(Trust(PLAN, STEPS, shared_start=False))
    apart = run.shared.held["adapter"]
    for part in run.shared.bank.low_rank:
        assert not bool((apart[part.a_name][0] == apart[part.a_name][1]).any())
        assert not apart[part.b_name].any()


@pytest.mark.parametrize("keep", [True, False])
def test_adamw_goes_on_from_round_to_round(keep):
    local = LocalTraining(lr=0.01, batch_size=8, optimizer="adamw", steps=2)
    method = Trust(PLAN, local, "none", keep_moments=keep)
    clients = labelled([8, 8])
    three = Run(method, clients=clients).go().go().go()
    once = Run(replace(method, local=replace(local, steps=6)), clients=clients).go()
    found, expected = (tree.tensors(run.shared.held) for run in (three, once))
    assert keep == all(torch.allclose(found[name], leaf) for name, leaf in expected.items())


def test_there_is_mixing_from_a_round_on_and_every_so_often():
    method = Trust(PLAN, STEPS, begin=4, every=3)
    assert [round for round in range(1, 14) if method.mixes(round)] == [4, 7, 10, 13]
    run = Run(Trust(PLAN, STEPS, "uniform", begin=2, every=2))
    alike = []
    for _ in range(5):
        leaf = next(iter(run.go().shared.held["adapter"].values()))
        alike.append(bool((leaf == leaf[:1]).all()))
    assert alike == [False, True, False, True, False]
    # With 25 steps a round the paper's 500 steps are 20 rounds, of which 17 end with a mix.
    assert sum(map(Trust().mixes, range(1, 21))) == 17


def test_an_absent_client_keeps_what_it_has_and_is_heard_for_a_while():
    runs = {s: Run(Trust(PLAN, STEPS, "uniform", begin=1, staleness=s)).go(range(5)) for s in (0, 1, 2)}
    before = runs[1].shared.held["adapter"]["0.weight_lora_B"][4].clone()
    for staleness, run in runs.items():
        run.go([0, 1, 2], [0, 1, 2])
        weights = run.shared.trust[0]
        heard = 5 if staleness == 2 else 3
        assert_close(weights, torch.tensor([1 / heard] * heard + [0.0] * (5 - heard)))
    assert torch.equal(runs[1].shared.held["adapter"]["0.weight_lora_B"][4], before)


def listened(run):
    return [row.nonzero().squeeze(1).tolist() for row in run.served()[1]]


def served_of(run, client):
    return {name: leaf[client].clone() for name, leaf in run.served()[0].items()}


def test_a_client_that_mixes_for_itself_keeps_what_it_has_unless_a_mix_is_due():
    # Round 2 is the first with mixing: client 4 was not there and has nothing to mix, 0 to 2 have.
    run = Run(Trust(PLAN, STEPS, "validation", begin=2, temperature=10.0)).go()
    before = served_of(run, 4)
    run.go([0, 1, 2])
    assert listened(run) == [[0, 1, 2]] * 3 + [[3], [4]]
    assert equal(served_of(run, 4), before)
    # Stale or not: others may be heard for a while, but who has nothing due does not mix.
    stale = Run(Trust(PLAN, STEPS, "validation", begin=2, temperature=10.0, staleness=1)).go().go([0, 1, 2])
    assert listened(stale) == [[0, 1, 2, 3, 4]] * 3 + [[3], [4]]


@pytest.mark.parametrize("chunk", [64, 1])
def test_a_client_that_mixes_for_itself_keeps_its_row_from_mix_to_mix(chunk):
    method = Trust(PLAN, STEPS, "validation", begin=1, every=3, temperature=10.0, mix="product")
    run = Run(method, chunk=chunk).go()
    first = run.served()
    run.go([0, 1])
    # 0 and 1 have mixed, have trained since and keep their rows; to the others the mix of round 1 is still due.
    assert_close(run.served()[1][:2], first[1][:2])
    assert_close(run.shared.trust[:2], first[1][:2])
    assert listened(run) == [[0, 1, 2, 3, 4]] * 5
    own = method.personalize(replace(run.message(0), own=rows_of(run, 0), listens=torch.zeros(1, 0)), NOTHING_KEPT)
    assert equal({name: leaf[0] for name, leaf in own.items()}, served_of(run, 0))


NOTHING_KEPT = trust.Private({}, {}, torch.ones(1))


def rows_of(run, client):
    return tree.map_tensors(lambda leaf: leaf[client : client + 1], run.shared.held)


@pytest.mark.parametrize("every", [1, 3])
def test_a_mix_that_is_due_is_not_lost_on_a_client_that_comes_late(every):
    # Client 4 is heard with 3 in round 1, which ends with a mix, and comes again in round 3.
    run = Run(Trust(PLAN, STEPS, "validation", begin=1, every=every, temperature=10.0)).go([3, 4]).go([0, 1])
    held = run.shared.held["adapter"]["0.weight_lora_B"][4].clone()
    assert listened(run)[4] == [0, 1, 3, 4]
    assert torch.equal(run.shared.held["adapter"]["0.weight_lora_B"][4], held)
    run.go([4])
    assert run.shared.trust[4].nonzero().squeeze(1).tolist() == [0, 1, 3, 4]
    # It has mixed: that is not done again before the next mix.
    assert every == 1 or torch.equal(run.served()[1][4], run.shared.trust[4])


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_clients_that_mix_for_themselves_hear_the_absent_for_a_while(staleness):
    run = Run(Trust(PLAN, STEPS, "validation", begin=1, staleness=staleness, temperature=10.0)).go()
    before = run.shared.held["adapter"]["0.weight_lora_B"][4].clone()
    run.go([0, 1, 2], [0, 1, 2])
    assert listened(run)[0] == ([0, 1, 2, 3, 4] if staleness == 2 else [0, 1, 2])
    assert listened(run)[4] == [0, 1, 2, 3, 4]  # those of its round, 3 as well, and since
    assert torch.equal(run.shared.held["adapter"]["0.weight_lora_B"][4], before)
    assert torch.equal(run.shared.trust[4], torch.eye(5)[4])  # it has not come to mix


@pytest.mark.parametrize("sparse", [{}, {"top_k": 1}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("scheme", ["uniform", "weights", "predictions"])
def test_a_client_that_was_never_there_gets_the_mean_of_those_it_may_listen_to(scheme, sparse):
    run = Run(Trust(PLAN, STEPS, scheme, begin=1, **sparse)).go([0, 1, 2])
    held, trust = run.shared.held["base"]["0.weight"], run.shared.trust
    assert_close(trust[3:], torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0]] * 2))
    sent = Run(Trust(PLAN, STEPS, "none")).go([0, 1, 2]).shared.held["base"]["0.weight"]
    assert_close(held[3], sent[:3].mean(0), atol=1e-6, rtol=1e-5)
    # Nobody follows it before it has spoken.
    assert not trust[:3, 3:].any()
    start = Run(Trust(PLAN, STEPS, "none")).shared.held["base"]["0.weight"]
    assert torch.equal(
        Run(Trust(PLAN, STEPS, scheme, begin=9)).go([0, 1]).shared.held["base"]["0.weight"][4], start[4]
    )
    assert torch.equal(
        Run(Trust(PLAN, STEPS, "none", begin=1)).go([0, 1]).shared.held["base"]["0.weight"][4], start[4]
    )


def test_a_client_that_was_never_there_finds_whom_to_trust_by_its_own_losses():
    run = Run(Trust(PLAN, STEPS, "validation", begin=1)).go([0, 1, 2])
    weights = run.served()[1]
    assert not weights[:, 3:].any()
    assert_close(weights.sum(1), torch.ones(5))
    assert len({round(float(weight), 6) for weight in weights[4, :3]}) == 3
    assert torch.equal(Run(Trust(PLAN, STEPS, "validation", begin=1)).served()[1], torch.eye(5))


def test_predictions_of_rounds_without_mixing_are_not_missed():
    # Client 4 trained in round 1, before there was mixing, and is not there when it begins.
    run = Run(Trust(PLAN, STEPS, "predictions", begin=2, staleness=3))
    run.go(range(4), range(3))
    assert run.shared.predicted.tolist() == [2, 2, 2, 1, 0]
    assert not run.shared.trust[:3, 4].any()


# What is mixed.


def test_one_factor_alone_is_mixed_if_asked_for():
    bank, adapters = drawn(net(), PLAN, 3)
    held = {"base": {}, "adapter": {name: leaf.unsqueeze(1) for name, leaf in adapters.items()}, "stats": {}}
    weights, own = torch.full((2, 3), 1 / 3), torch.tensor([2, 0])
    means = {name: leaf.mean(0).expand(2, 1, *leaf.shape[1:]) for name, leaf in adapters.items()}
    for mix in ("A", "B"):
        found = combined(bank, held, weights, own, mix)["adapter"]
        for name, leaf in found.items():
            mixed = name.endswith("lora_A") == (mix == "A")
            assert_close(leaf, means[name] if mixed else held["adapter"][name][own])


@pytest.mark.parametrize("module", [net(), nn.Conv2d(3, 4, 3).double(), nn.Embedding(9, 4).double()])
def test_products_are_mixed_to_the_nearest_of_their_rank(module):
    bank, adapters = drawn(module, AdapterPlan(2, ("linear", "conv", "embedding")), 4)
    held = {"base": {}, "adapter": {name: leaf.unsqueeze(1) for name, leaf in adapters.items()}, "stats": {}}
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).double()
    found = combined(bank, held, weights, torch.arange(3), "product")["adapter"]
    dense = {n: torch.tensordot(weights, leaf, 1) for n, leaf in products(bank, adapters).items()}
    expected = products(bank, factors(bank, dense))
    assert_close(products(bank, {n: leaf[:, 0] for n, leaf in found.items()}), expected)
    assert {n: leaf.shape[1:] for n, leaf in found.items()} == {n: v.shape[1:] for n, v in held["adapter"].items()}


def test_a_rank_above_a_layers_sides_is_zero_where_products_are_mixed():
    peft = {"r": 4, "target_modules": ["0"]}
    bank, adapters = drawn(nn.Sequential(nn.Linear(6, 2)).requires_grad_(False), AdapterPlan(peft=peft), 3)
    held = {"base": {}, "adapter": {name: leaf.unsqueeze(1) for name, leaf in adapters.items()}, "stats": {}}
    found = combined(bank, held, torch.eye(3).double(), torch.arange(3), "product")["adapter"]
    assert {n: leaf.shape for n, leaf in found.items()} == {n: leaf.shape for n, leaf in held["adapter"].items()}
    assert_close(products(bank, {n: leaf[:, 0] for n, leaf in found.items()}), products(bank, adapters))
    assert_close(products(bank, factors(bank, products(bank, adapters))), products(bank, adapters))


# Who learns what.


def recovered(method, chunk=8):
    task = Digits("label_shift", num_clients=8, num_groups=2).load(0)
    task = replace(task, public=task.test.x[:64])
    cohort, at = start(task, method, Schedule(rounds=4, evaluate_every=4), Engine("stacked", chunk=chunk))
    at = list(rounds(cohort, at, task, Schedule(rounds=4, evaluate_every=4)))[-1]
    mixture = torch.from_numpy(at.scores.mixture)
    figures = trusting.figures_of(mixture, task.group, torch.ones(8))
    return float(figures["trust_inside"]), float(figures["trust_outside"]), at.figures


DIGITS = LocalTraining(lr=0.1, batch_size=8, epochs=2)


@pytest.mark.parametrize(
    ("scheme", "mode", "blocks"),
    [
        ("validation", "umbel", True),
        ("validation", "paper", True),
        ("predictions", "umbel", True),
        ("weights", "umbel", True),
        ("weights", "paper", False),
    ],
)
def test_hidden_groups_are_found_by_all_but_published_weights(scheme, mode, blocks):
    inside, outside, figures = recovered(Trust(AdapterPlan(4), DIGITS, scheme, mode, begin=2))
    assert (inside >= 5 * outside) == blocks
    if not blocks:
        assert inside < 1.1 * outside
    if scheme != "validation":
        assert_close((figures["trust_inside"], figures["trust_outside"]), (inside, outside))


def test_figures_are_of_clients_that_were_heard():
    trust, group = torch.full((4, 4), 0.2), torch.tensor([0, 0, 1, 1])
    trust[0] = torch.tensor([0.5, 0.3, 0.2, 0.0])
    found = trusting.figures_of(trust, group, torch.tensor([1, 2, 1, 0]))
    expected = {"self_trust": 0.9 / 3, "trust_inside": 0.5 / 2, "trust_outside": 0.8 / 4}
    assert {name: round(float(value), 5) for name, value in found.items()} == {
        name: round(value, 5) for name, value in expected.items()
    }
    run = Run(Trust(PLAN, STEPS, "uniform", begin=1)).go([0, 1, 2])
    assert_close(run.shared.figures["self_trust"], torch.tensor(1 / 3))
    assert_close(run.shared.figures["trust_inside"], torch.tensor(1 / 3))


def test_clients_are_no_routes():
    figures = recovered(Trust(AdapterPlan(4), DIGITS, "none"))[2]
    assert not {"nmi", "ari", "cluster_accuracy", "usage", "dead", "entropy_nats"} & set(figures)
    assert (figures["self_trust"], figures["trust_inside"], figures["trust_outside"]) == (1, 0, 0)


def test_reports_show_who_trusts_whom(tmp_path):
    recipe = {
        "task": {"name": "digits", "num_clients": 8},
        "rounds": 1,
        "method": {"trust": {"scheme": "uniform"}},
    }
    run_recipe(read(recipe, "trust"), tmp_path / "run")
    html = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Who trusts whom" in html
    assert "itself 1.000; inside 0.000; outside 0.000" in html
    assert "How routes settle" not in html
    assert "NMI" not in html


# What travels.


def adapter_bytes(run):
    return tree.row_bytes(run.shared.held)


def test_the_first_mix_is_told_in_a_comparison():
    line = {"self_trust": 1.0, "trust_inside": 0.0, "trust_outside": 0.0, "round": 1}
    mixed = [
        line | {"round": 2, "self_trust": 0.5, "trust_inside": 0.2, "trust_outside": 0.01},
        line | {"self_trust": 0.4},
    ]
    assert first_trust([line, *mixed]) == {"first_trust": [2, 0.5, 0.2, 0.01]}
    assert first_trust([line, {"round": 2}]) == {}


def test_bytes_are_those_of_what_each_scheme_needs():
    row = 5 * 4 + 8  # of W, and who one is
    for scheme in ("none", "uniform", "oracle", "weights", "predictions"):
        run = Run(Trust(PLAN, STEPS, scheme, begin=1)).go()
        assert tree.row_bytes(run.message()) == adapter_bytes(run) + row
    upload = uploaded(run.method, run)
    assert tree.group_bytes(upload)["predictions"] == 7 * 3 * 8  # 7 public inputs, 3 labels, float64
    method = Trust(PLAN, STEPS, "validation", begin=2)
    run = Run(method)
    down = [tree.row_bytes(run.go().message()) for _ in range(2)]
    assert down == [adapter_bytes(run) + row, 5 * adapter_bytes(run) + row + 5]
    cost = cost_of(Run(method).cohort, run.shared, run.store, np.arange(1))
    assert cost.down["everyone"] == 5 * adapter_bytes(run)


def test_only_the_largest_of_many_probabilities_are_sent():
    run = Run(Trust(PLAN, STEPS, "predictions", begin=1, top=2)).go()
    assert tree.group_bytes(uploaded(run.method, run))["predictions"] == 7 * 2 * (8 + 4)


@pytest.mark.parametrize("mode", ["umbel", "paper"])
@pytest.mark.parametrize("scheme", ["predictions", "weights", "validation"])
def test_chunks_and_order_change_nothing_beyond_rounding(scheme, mode):
    top = {} if mode == "paper" else {"top": 2}
    method = Trust(PLAN, STEPS, scheme, mode, begin=1, staleness=1, **top)
    expected = Run(method).go(range(5), [0, 1, 3], range(5))
    for chunk, order in ((1, [0, 1, 2, 3, 4]), (3, [4, 2, 0, 3, 1])):
        found = Run(method, chunk=chunk).go(order, [3, 0, 1], order)
        assert_close(tree.tensors(found.shared), tree.tensors(expected.shared), atol=1e-6, rtol=1e-4)


# A frozen language model with PEFT's adapters.


@pytest.mark.parametrize("mode", ["umbel", "paper"])
@pytest.mark.parametrize("scheme", ["weights", "validation", "predictions"])
def test_language_models_trust_each_other_by_their_adapters_alone(scheme, mode):
    import transformers

    config = transformers.GPT2Config(vocab_size=120, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    with seeded(0, "test"):
        model = of_transformers(transformers.GPT2LMHeadModel(config), "causal_lm")
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(60 * (k % 2), 60 * (k % 2) + 60, (12, 8), generator=draw) for k in range(4)]
    examples = Examples.of([(text[:, :-1], text[:, 1:]) for text in texts])
    public = torch.randint(0, 120, (6, 7), generator=draw)
    task = Task("test", model, "cross_entropy", examples, examples, torch.arange(4) % 2, public=public)
    plan = AdapterPlan(peft={"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"]})
    local = LocalTraining(lr=1.0, batch_size=4, steps=2)
    top = {} if mode == "paper" else {"top": 20}
    method = Trust(plan, local, scheme, mode, begin=1, trust_fraction=0.25, **top)
    cohort, at = start(task, method, Schedule(rounds=2), Engine("stacked"))
    at = list(rounds(cohort, at, task, Schedule(rounds=2)))[-1]
    assert at.shared.held["base"] == {}
    mixture = at.scores.mixture
    np.testing.assert_allclose(mixture.sum(1), 1, rtol=1e-5)
    if scheme == "predictions":  # of 6 texts every place, or the last one
        places = 6 * (1 if mode == "paper" else 7)
        assert at.shared.predictions["values"].shape == (4, places, 100 if mode == "paper" else 20)


# Errors.


def test_what_cannot_be_compared_is_said_before_any_work():
    with pytest.raises(RecipeError, match=r"compares answers on public inputs.*Task\.public.*'validation'"):
        Run(Trust(PLAN, STEPS, "predictions"), public=None)
    with pytest.raises(RecipeError, match="public inputs"):
        Run(Trust(PLAN, STEPS, "predictions"), public=PUBLIC[:0])
    with pytest.raises(RecipeError, match="known groups"):
        Run(Trust(PLAN, STEPS, "oracle"), group=None)
    for edge in ((0, 5), (-1, 2), (1, 2, 3)):
        with pytest.raises(RecipeError, match=r"no edge .* 5 clients, 0 to 4"):
            Run(Trust(PLAN, STEPS, topology=(edge,)))
    task = Task("test", net(), "mse", *[Examples.of([(PUBLIC, PUBLIC[:, :3])] * 2)] * 2, public=PUBLIC)
    with pytest.raises(RecipeError, match="mode = 'paper'"):
        start(task, Trust(PLAN, STEPS, "predictions"), Schedule(rounds=1), Engine())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"mode": "paper", "temperature": 0.1},
        {"mode": "paper", "top": 10},
        {"self_weight": 1.5},
        {"trust_fraction": -0.1},
        {"trust_fraction": 1.0},
        {"trust_fraction": 0.0, "scheme": "validation"},
        {"top_k": -1},
        {"staleness": -1},
        {"begin": 0},
        {"every": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(RecipeError, match="|".join(bad)):
        Trust(**bad)


def test_an_adapter_that_is_too_large_to_compare_is_named():
    method = Trust(AdapterPlan(2, ("linear",)), STEPS, "weights", begin=1)
    run = Run(method, net().float(), [(x.float(), y) for x, y in labelled()])
    upload = uploaded(method, run)
    large = {n: leaf.index_fill(0, torch.tensor([3]), 1e38) for n, leaf in upload.adapters["adapter"].items()}
    upload = replace(upload, adapters=upload.adapters | {"adapter": large})
    with pytest.raises(RoundError, match=r"client 3's adapter .* lower local\.lr"):
        method.server_update(run.shared, iter([upload]))


def test_neighbours_are_symmetric_and_everyone_hears_itself():
    for topology in ("full", "ring", "star"):
        for size in (1, 2, 3, 6):
            linked = linked_of("weights", topology, Population(size, 0))
            assert torch.equal(linked, linked.T)
            assert bool(linked.diagonal().all())
            assert topology == "full" or size < 4 or int(linked.sum()) == size + 2 * (size - (topology == "star"))


def test_its_settings_survive_a_recipe_file():
    import tomli_w

    table = {
        "task": {"name": "digits"},
        "method": {"trust": {"topology": [[0, 1], [1, 2]], "threshold": -0.5, "adapter": {"rank": 2}}},
    }
    for own in (table, {**table, "method": {"trust": {"topology": "ring"}}}):
        recipe = read(own, "trust")
        assert read(tomllib.loads(tomli_w.dumps(recipe.table())), "trust") == recipe
    assert read(table, "trust").method.topology == ((0, 1), (1, 2))


@pytest.mark.parametrize(("count", "fraction", "batch_size"), [(3, 0.5, 4), (5, 0.9, 4), (9, 0.5, 2), (6, 0.2, 4)])
def test_nobody_trains_on_one_example_by_itself(count, fraction, batch_size):
    data = ClientData(Examples.of(labelled([count])), np.arange(1), 0, 1)
    (own,), (held,) = (part.part for part in split(data, fraction, batch_size))
    assert len(own) >= 2
    assert len(own) % batch_size != 1
    assert held.size
    assert set(own).isdisjoint(held)
