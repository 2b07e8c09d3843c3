"""Batches, chosen clients, what clients keep, and what is said of their scores."""

from dataclasses import dataclass
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umbel import tree
from umbel.clients import Batch, ClientData, Examples
from umbel.cohort import Cohort, PrivateStore
from umbel.errors import DataError
from umbel.evaluate import Scores, evaluate, mismatch, routing
from umbel.methods import FedAvg, Local
from umbel.model.loss import Loss
from umbel.seeds import choose, generator, seed_of, seeded
from umbel.tree import state

COUNTS = [5, 1, 8, 3]


def numbered(counts):
    """Examples whose x is their row number and whose y is their client."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = torch.arange(sum(counts), dtype=torch.float32).unsqueeze(1)
    return Examples.of([(rows[owners == k], owners[owners == k]) for k in range(len(counts))])


def rows_seen(batches, client):
    """The rows a client trains on, batch by batch, padding left out."""
    seen = []
    for batch in batches:
        real = torch.ones(batch.y.shape) if batch.weight is None else batch.weight
        seen.append(batch.x[client, :, 0][real[client].bool()].int().tolist())
    return [rows for rows in seen if rows]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_every_example_is_seen_once_an_epoch(size, shuffle):
    examples = numbered(COUNTS)
    data = ClientData(examples, np.arange(4), seed=0, round=1)
    batches = list(data.batches(size, epochs=3, shuffle=shuffle))
    assert len(batches) == data.num_steps(size, epochs=3) == 3 * -(-8 // size)
    for client, count in enumerate(COUNTS):
        own = rows_seen(batches, client)
        steps = -(-count // size)
        assert [len(rows) for rows in own] == 3 * [min(size, count - size * i) for i in range(steps)]
        for epoch in range(3):
            rows = [row for batch in own[epoch * steps : (epoch + 1) * steps] for row in batch]
            expected = list(range(int(examples.start[client]), int(examples.start[client]) + count))
            assert (rows == expected) or (shuffle and sorted(rows) == expected)


def test_padding_has_no_weight_and_belongs_to_the_same_client():
    # Sizes 5 and 2 in batches of 3: client 1 pads its only batch, then sits the second one out.
    first, second = ClientData(numbered([5, 2]), np.arange(2), 0, 1).batches(3)
    assert first.weight.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.active is None
    assert second.weight.tolist() == [[1, 1], [0, 0]]
    assert second.active.tolist() == [True, False]
    for batch in (first, second):
        assert batch.y.tolist() == [[0] * batch.y.shape[1], [1] * batch.y.shape[1]]


def test_batches_of_equal_clients_have_no_padding():
    for batch in ClientData(numbered([4, 4]), np.arange(2), 0, 1).batches(2, epochs=2):
        assert batch.weight is None
        assert batch.active is None


def test_the_mean_of_a_batch_leaves_padding_out():
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    batch = Batch(torch.zeros(2, 3, 1), torch.zeros(2, 3), weight, torch.tensor([True, False]), torch.arange(2))
    # (2 + 4) / 2, and 0 for a client without a batch
    assert batch.mean(torch.tensor([[2.0, 4.0, 100.0], [7.0, 8.0, 9.0]])).tolist() == [3.0, 0.0]


def test_the_order_depends_on_seed_round_and_client_alone():
    examples = numbered([8, 8, 8, 30])

    def order(clients, client, seed=0, round=1):
        batches = ClientData(examples, np.array(clients), seed, round).batches(4, epochs=2)
        return rows_seen(batches, clients.index(client))

    alone = order([2], 2)
    assert order([3, 2, 0], 2) == alone
    assert order([1, 3, 2], 2) == alone
    assert order([2], 2, seed=1) != alone
    assert order([2], 2, round=2) != alone
    assert [[row - 8 for row in rows] for rows in alone] != order([1], 1)
    assert alone[:2] != alone[2:]  # epochs differ


def test_draws_depend_on_seed_round_purpose_and_client_alone():
    examples = numbered(COUNTS)

    def draw(clients, seed=0, round=1, purpose="router"):
        data = ClientData(examples, np.array(clients), seed, round)
        return data.draw(purpose, lambda own: torch.rand(3, generator=own))

    drawn = draw([0, 1, 2])
    assert drawn.shape == (3, 3)
    assert torch.equal(draw([2, 0]), drawn[[2, 0]])
    others = [
        drawn[0],
        drawn[1],
        *(draw([0], **change)[0] for change in ({"seed": 1}, {"round": 2}, {"purpose": "x"})),
    ]
    assert len({tuple(other.tolist()) for other in others}) == len(others)


def test_in_order_is_every_example_once_as_stored():
    examples = numbered(COUNTS)
    batches = list(ClientData(examples, np.array([2, 0]), 0, 0).in_order(3))
    assert rows_seen(batches, 0) == [[6, 7, 8], [9, 10, 11], [12, 13]]
    assert rows_seen(batches, 1) == [[0, 1, 2], [3, 4]]


def test_num_examples_are_those_of_the_asked_clients():
    assert ClientData(numbered(COUNTS), np.array([2, 1]), 0, 1).num_examples.tolist() == [8.0, 1.0]


def test_examples_of_a_client_are_its_own():
    pairs = [(torch.randn(n, 2), torch.arange(n)) for n in COUNTS]
    examples = Examples.of(pairs)
    assert examples.num_clients == 4
    for client, (x, y) in enumerate(pairs):
        assert torch.equal(examples.of_client(client)[0], x)
        assert torch.equal(examples.of_client(client)[1], y)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "there are no clients"),
        ([(torch.ones(2, 1), torch.ones(2)), (torch.ones(0, 1), torch.ones(0))], "client 1 has no samples"),
        (
            [(torch.ones(2, 1), torch.ones(2)), (torch.ones(3, 1), torch.ones(2))],
            "client 1: 3 inputs but 2 targets",
        ),
        ([(torch.ones(2, 1), torch.ones(2)), (torch.tensor([[1.0], [NAN]]), torch.ones(2))], "client 1 .* inputs"),
        ([(torch.ones(2, 1), torch.tensor([INF, 0.0])), (torch.ones(2, 1), torch.ones(2))], "client 0 .* targets"),
        ([(torch.tensor([1.0, -INF]), torch.ones(2)), (torch.ones(1), torch.ones(1))], "client 0 .* inputs"),
        (
            [(torch.ones(1, 2, 2, 2), torch.ones(1)), (torch.full((1, 2, 2, 2), NAN), torch.ones(1))],
            "client 1 .* in",
        ),
    ],
)
def test_data_that_nothing_can_be_trained_on_names_the_client(clients, message):
    with pytest.raises(DataError, match=message):
        Examples.of(clients)


def test_targets_of_another_shape_than_the_outputs_are_refused():
    # (B, 1) against (B,) would broadcast every example against every other.
    loss = Loss(nn.Linear(3, 1), "mse")
    with pytest.raises(DataError, match=r"answers \(1,\).*shape \(\)"):
        loss.per_example(torch.zeros(2, 4, 1), torch.zeros(2, 4))


def test_a_squared_error_is_the_mean_over_an_examples_outputs():
    loss = Loss(nn.Linear(1, 1), "mse")
    # (1² + 3²)/2 = 5, (2² + 0²)/2 = 2; and with one number an example, its square
    outputs = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]])
    assert loss.per_example(outputs, torch.zeros(1, 2, 2)).tolist() == [[5.0, 2.0]]
    assert loss.per_example(torch.tensor([[3.0, 2.0]]), torch.zeros(1, 2)).tolist() == [[9.0, 4.0]]


# Randomness.


def test_chosen_clients_are_different_ascending_and_the_seeds_alone():
    for population, size in ((10, 3), (10_000, 400), (30_000, 1000), (30_000, 2000)):
        chosen = choose(population, size, 0, "cohort", 1)
        assert len(chosen) == size
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] >= 0
        assert chosen[-1] < population
        assert np.array_equal(chosen, choose(population, size, 0, "cohort", 1))
        assert not np.array_equal(chosen, choose(population, size, 0, "cohort", 2))
        assert not np.array_equal(chosen, choose(population, size, 1, "cohort", 1))


def test_a_few_of_an_endless_population_are_chosen_at_once():
    # An array of all of them would take 8 · 10¹⁵ bytes.
    assert len(choose(10**15, 100, 0, "cohort", 1)) == 100


@pytest.mark.parametrize("size", [7, 8])
def test_as_many_as_there_are_is_everyone(size):
    assert choose(7, size, 0, "cohort", 1).tolist() == list(range(7))


def test_every_client_is_chosen_equally_often():
    # 2,000 draws of 2 from 10: each client 400 times, standard deviation √(2000 · 0.2 · 0.8) = 18.
    times = np.bincount(np.concatenate([choose(10, 2, 0, "cohort", r) for r in range(2000)]), minlength=10)
    assert (abs(times - 400) < 5 * 18).all()


def test_generators_are_told_apart_by_seed_and_path():
    paths = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a"), (0, "a", "1"), (0, "a1")]
    assert len({seed_of(*path) for path in paths}) == len(paths)
    assert torch.equal(torch.rand(3, generator=generator(5, "x")), torch.rand(3, generator=generator(5, "x")))


def test_seeded_puts_the_global_generator_back():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(0, "model"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(0, "model"):
        assert torch.equal(torch.rand(2), inside)


# What clients keep.


@state
class Kept:
    values: Tensor
    named: dict


def kept(*rows):
    values = torch.tensor(rows, dtype=torch.float32)
    return Kept(values, {"twice": 2 * values.unsqueeze(1).expand(-1, 3).clone()})


def test_a_store_keeps_a_row_of_each_client_that_was_seen():
    store = PrivateStore(kept(-1), 1000)
    assert store.rows(np.array([5, 999])).values.tolist() == [-1, -1]
    store.put(np.array([7, 3]), kept(70, 30))
    store.put(np.array([999, 7]), kept(9990, 71))
    found = store.rows(np.array([3, 7, 0, 999, 7]))
    assert found.values.tolist() == [30, 71, -1, 9990, 71]
    assert found.named["twice"].tolist() == [[2 * v] * 3 for v in (30, 71, -1, 9990, 71)]
    assert store.seen.tolist() == [7, 3, 999]
    clients, rows = store.state()
    assert clients.tolist() == [7, 3, 999]
    assert rows.values.tolist() == [71, 30, 9990]


def test_a_store_grows_without_losing_anyone():
    store = PrivateStore(kept(-1), 500)
    rng = np.random.default_rng(0)
    expected = dict.fromkeys(range(500), -1.0)
    for step in range(60):
        who = rng.choice(500, rng.integers(1, 9), replace=False)
        store.put(who, kept(*(1000 * step + who)))
        expected |= {int(k): float(1000 * step + k) for k in who}
    assert store.rows(np.arange(500)).values.tolist() == list(expected.values())
    assert sorted(store.seen.tolist()) == sorted(k for k, v in expected.items() if v >= 0)


def test_a_restored_store_is_the_one_that_was_saved():
    store = PrivateStore(kept(-1), 10)
    store.put(np.array([4, 2, 8]), kept(4, 2, 8))
    again = PrivateStore(kept(-1), 10)
    again.put(*store.state())
    assert again.seen.tolist() == store.seen.tolist()
    assert again.rows(np.arange(10)).values.tolist() == store.rows(np.arange(10)).values.tolist()


def test_what_a_store_hands_out_and_takes_in_is_a_copy():
    fresh = kept(-1)
    store = PrivateStore(fresh, 3)
    mine = kept(5)
    store.put(np.array([1]), mine)
    mine.values.fill_(99)
    store.rows(np.array([0, 1])).values.fill_(77)
    assert store.rows(np.array([0, 1])).values.tolist() == [-1, 5]
    assert fresh.values.tolist() == [-1]


# Scores.


def on_one_line(method, weights, clients, labels):
    """Clients whose model is x ↦ w·x; `weights` is given to each."""
    name = "cross_entropy" if labels else "mse"
    module = nn.Linear(1, len(weights[0]), bias=False)
    examples = Examples.of(clients)
    cohort = Cohort(method, Loss(module, name), examples, seed=0, chunk=2)
    fresh = tree.map_tensors(torch.zeros_like, method.init(module, None)[1])
    store = PrivateStore(fresh, len(clients))
    params = torch.tensor(weights).unsqueeze(2)
    stored = tree.with_tensors(fresh, {"params/weight": params})
    store.put(np.arange(len(clients)), stored)
    return cohort, store, examples


def test_a_client_is_scored_on_its_own_examples_with_its_own_model():
    # Client 0: w = 2, x = 1, 3, y = 0: errors 4 and 36, mean 20. Client 1: w = −1, x = 2, y = 1: 9.
    # Client 2: w = 0, x = 1, 1, 1, y = 1, 2, 0: (1 + 4 + 0)/3.
    ones = torch.ones(3, 1)
    clients = [
        (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)),
        (torch.tensor([[2.0]]), torch.ones(1, 1)),
        (ones, torch.tensor([[1.0], [2.0], [0.0]])),
    ]
    cohort, store, examples = on_one_line(Local(), [[2.0], [-1.0], [0.0]], clients, labels=False)
    scores = evaluate(cohort, Local().init(cohort.loss.module, None)[0], store, examples, np.array([2, 0, 1]))
    assert scores.accuracy is None
    assert_close(torch.from_numpy(scores.loss), torch.tensor([5 / 3, 20.0, 9.0], dtype=torch.float64))
    # The worst tenth of three clients is one of them: the largest loss.
    assert scores.summary() == pytest.approx({"loss": (5 / 3 + 29) / 3, "worst_decile": 20.0})


def test_accuracy_is_the_share_of_right_answers_in_percent():
    # Logits (w x, 0) with w = 1: answers 0 for x > 0, else 1. Client 0: 3 of 4 right; client 1: 0 of 1.
    # w = 0 (client 2): both labels have p = ½, so the loss is log 2.
    clients = [
        (torch.tensor([[1.0], [2.0], [-1.0], [-3.0]]), torch.tensor([0, 0, 1, 0])),
        (torch.tensor([[5.0]]), torch.tensor([1])),
        (torch.tensor([[5.0], [7.0]]), torch.tensor([0, 0])),
    ]
    cohort, store, examples = on_one_line(Local(), [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], clients, labels=True)
    scores = evaluate(cohort, Local().init(cohort.loss.module, None)[0], store, examples, np.arange(3))
    assert scores.accuracy[:2].tolist() == [75.0, 0.0]
    losses = [log(1 + np.exp(-z)) for z in (1.0, 2.0, 1.0, 3.0)]
    losses[3] += 3.0  # −log p(wrong) = z + log(1 + e^−z)
    assert_close(
        torch.from_numpy(scores.loss), torch.tensor([sum(losses) / 4, 5 + log(1 + np.exp(-5)), log(2)]).double()
    )


def test_everyone_is_scored_with_what_the_server_sends():
    # FedAvg's model is the same for all: w = 3 on x = 1: y = 1 gives 4, y = 5 gives 4, y = 3 gives 0.
    method = FedAvg()
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 3.0)
    examples = Examples.of([(torch.ones(1, 1), torch.full((1, 1), y)) for y in (1.0, 5.0, 3.0)])
    shared, fresh = method.init(module, None)
    for chunk in (1, 2, 3):
        cohort = Cohort(method, Loss(module, "mse"), examples, 0, chunk)
        scores = evaluate(cohort, shared, PrivateStore(fresh, 3), examples, np.arange(3))
        assert scores.loss.tolist() == [4.0, 4.0, 0.0]


def test_the_worst_decile_is_the_mean_of_the_worst_tenth():
    accuracy = np.random.default_rng(0).permutation(np.arange(40.0))
    figures = Scores(np.zeros(40), accuracy, np.zeros((40, 0))).summary()
    assert figures["accuracy"] == 19.5
    assert figures["worst_decile"] == (0 + 1 + 2 + 3) / 4
    loss = Scores(accuracy, None, np.zeros((40, 0))).summary()
    assert loss["worst_decile"] == (39 + 38 + 37 + 36) / 4


def test_routing_says_how_sharp_and_how_used_the_routes_are():
    mixture = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    figures = routing(mixture, np.array([0, 0, 1, 0]))
    # Entropies 0, log 2, ¼ log 4 + ¾ log 4/3, 0
    assert figures["entropy_nats"] == pytest.approx((log(2) + 0.25 * log(4) + 0.75 * log(4 / 3)) / 4)
    assert figures["usage"] == [2.75 / 4, 1.25 / 4, 0.0]
    assert figures["dead"] == 1
    assert figures["nmi"] == pytest.approx(1.0)  # the heaviest routes are 0, 0, 1, 0
    assert figures["ari"] == pytest.approx(1.0)


def test_routes_that_say_nothing_of_the_groups_have_no_agreement():
    # Each route has one client of each group.
    mixture = np.eye(2)[[0, 0, 1, 1]]
    figures = routing(mixture, np.array([0, 1, 0, 1]))
    assert figures["nmi"] == pytest.approx(0.0)
    # Pairs: none agrees, as against 2 · 2/6 by chance: (0 − 2/3) / (2 − 2/3) = −½
    assert figures["ari"] == pytest.approx(-0.5)


def test_a_route_that_someone_leans_on_is_not_dead():
    # Of 200 clients one leans on route 1, whose usage is 0.5 %; nobody on route 2, whose usage is 2 %.
    mixture = np.tile([0.98, 0.0, 0.02], (200, 1))
    mixture[0] = [0.0, 1.0, 0.0]
    figures = routing(mixture, None)
    assert figures["dead"] == 0
    assert "nmi" not in figures
    assert routing(np.tile([0.995, 0.005], (5, 1)), None)["dead"] == 1


def test_where_nothing_is_mixed_nothing_is_said():
    assert routing(np.zeros((5, 0)), np.arange(5)) == {}


# States.


@dataclass(frozen=True)
class Pinned:
    number: int


def test_tensors_of_a_state_are_named_by_their_path_and_can_be_put_back():
    before = kept(1, 2)
    named = tree.tensors(before)
    assert list(named) == ["values", "named/twice"]
    after = tree.with_tensors(before, {name: leaf + 1 for name, leaf in named.items()})
    assert after.values.tolist() == [2, 3]
    assert after.named["twice"].tolist() == [[3] * 3, [5] * 3]
    with pytest.raises(KeyError):
        tree.with_tensors(before, {"values": named["values"]})
    with pytest.raises(ValueError, match=r"named/twice.*\(2, 2\).*\(2, 3\)"):
        tree.with_tensors(before, named | {"named/twice": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="float64"):
        tree.with_tensors(before, named | {"values": named["values"].double()})


def test_what_is_no_tensor_is_carried_along():
    before = Kept(torch.ones(2), {"plan": Pinned(3), "x": torch.ones(2)})
    after = tree.map_tensors(torch.neg, before)
    assert after.named["plan"] is before.named["plan"]
    assert list(tree.tensors(before)) == ["values", "named/x"]


def test_finite_rows_are_those_without_nan_and_infinity_anywhere():
    state = Kept(
        torch.tensor([1.0, NAN, 1.0, 1.0]), {"x": torch.tensor([[1.0, 2.0], [1.0, 1.0], [INF, 0.0], [0.0, 0.0]])}
    )
    assert tree.finite_rows(state).tolist() == [True, False, False, True]


def test_a_broadcast_is_told_from_copies_and_costs_one_row():
    wide = tree.broadcast(kept(1).named, 4)["twice"]
    assert wide.shape == (4, 1, 3)
    assert tree.is_broadcast(wide)
    assert not tree.is_broadcast(wide.clone())
    assert tree.row_bytes({"a": wide, "b": torch.zeros(4, 2, dtype=torch.float64)}) == 3 * 4 + 2 * 8


def test_some_of_the_examples_are_other_ones_every_round():
    examples = numbered(COUNTS)
    everyone = np.arange(len(COUNTS))
    data = ClientData(examples, everyone, 0, 1)
    some = data.some(3, "routes")
    assert some.num_examples.tolist() == [min(n, 3) for n in COUNTS]
    assert data.some(max(COUNTS), "routes") is data
    assert data.some(0, "routes") is data
    for place, rows in enumerate(some.part):
        first = int(examples.start[place])
        assert set(rows.tolist()) <= set(range(first, first + COUNTS[place]))
        assert len(set(rows.tolist())) == min(COUNTS[place], 3)
    drawn = [ClientData(examples, everyone, 0, round).some(3, "routes").part for round in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    alone = [ClientData(examples, everyone[k : k + 1], 0, 1).some(3, "routes").part for k in everyone]
    assert all(alone[k] is None or np.array_equal(alone[k][0], some.part[k]) for k in everyone)


def test_a_text_counts_by_its_places_in_a_forward_pass():
    images = Examples.of([(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))] * 4)
    texts = Examples.of([(torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long))] * 4)
    numbers = Examples.of([(torch.zeros(3, 5), torch.zeros(3, 8))] * 4)
    fits = [ClientData(examples, np.arange(4), 0, 0).fitting(1024) for examples in (images, texts, numbers)]
    assert fits == [256, 8, 256]
    assert ClientData(texts, np.arange(4), 0, 0).fitting(1) == 1


def test_perplexity_is_the_mean_of_the_clients_and_only_of_texts():
    loss = np.log([2.0, 4.0])
    assert Scores(loss, np.zeros(2), np.empty((2, 0)), of_texts=True).summary()["perplexity"] == pytest.approx(3.0)
    assert "perplexity" not in Scores(loss, np.zeros(2), np.empty((2, 0))).summary()
    assert np.isfinite(Scores(np.full(2, 1e5), None, np.empty((2, 0)), of_texts=True).summary()["perplexity"])


def test_the_mismatch_is_how_far_weights_are_from_the_groups_own():
    group = np.array([0, 0, 1, 1])
    right = np.eye(2)[[1, 1, 0, 0]]  # the names of adapters do not matter
    assert mismatch(right, group) == 0.0
    assert mismatch(np.full((4, 2), 0.5), group) == pytest.approx(1.0)  # ¼ each for ½, ½, 0, 0
    # Three of four on one adapter: ⅓ each for ½, ½, 0, 0 and 1 for ½, ½.
    assert mismatch(np.eye(2)[[0, 0, 0, 1]], group) == pytest.approx((2 / 6 + 1 / 3 + 1 / 2 + 1 / 2) / 2)
    assert mismatch(np.ones((4, 1)), group) == pytest.approx((1.0 + 2.0) / 2)  # one adapter for two groups
    unused = np.eye(3)[[1, 1, 1, 1]]
    assert mismatch(unused, group) == pytest.approx((1.0 + 2.0) / 2)  # and two that nobody uses
    split = np.eye(3)[[0, 2, 1, 1]]  # a group on two adapters: the better of them has half of it
    assert mismatch(split, group) == pytest.approx(1 / 2)
