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
from umbel.cohort import Engine, Tally
from umbel.methods import IFCA, Ensemble, FLoRAL, Population
from umbel.methods.routing import (
    COOLING,
    SMALLEST_SHARE,
    LabelLosses,
    Measured,
    Router,
    Routes,
    Told,
    chi_square,
    losses_of,
    moved_share,
    route_sums,
)
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import FORWARD_EXAMPLES, Loss
from umbel.rounds import start
from umbel.runs import run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.train import LocalTraining

EM, GRADIENT, ORACLE = Router(kind="em"), Router(kind="gradient"), Router(kind="oracle")
BIASES = AdapterPlan(layers=("bias",))


def sized(*counts):
    """Clients with so many examples each; what these are does not matter."""
    examples = Examples.of([(torch.zeros(n, 1), torch.zeros(n, 1)) for n in counts])
    return ClientData(examples, np.arange(len(counts)), 0, 1)


def told(bias, temperature, num_clients, excess=None, frequency=(1.0,)):
    """What clients are told; without an excess all examples have one label."""
    excess = [[0.0] * len(bias)] if excess is None else excess
    leaves = (tree.broadcast(torch.tensor(v), num_clients) for v in (bias, temperature, excess, frequency))
    return Told(torch.empty(num_clients, 0), *leaves, torch.zeros(num_clients))


def of_one_label(losses, data):
    """The clients' mean losses (K, C), where all examples have one label."""
    counts = data.num_examples.unsqueeze(1)
    return LabelLosses((counts * losses).unsqueeze(1), counts)


def unknown(num_clients, num_routes=2):
    """What a server knows at the start of a run of 8 rounds, of clients with one label."""
    return Routes.init("em", num_routes, Population(num_clients, 0, num_rounds=8))


def summed(num_clients, examples, route_examples, spread, label_losses=None, label_counts=(0.0,), chi_square=0.0):
    """The sums of a round, as `route_sums` gives them."""
    sums = {"clients": num_clients, "examples": examples, "route_examples": route_examples, "spread": spread}
    sums["label_losses"] = [[0.0] * len(route_examples)] if label_losses is None else label_losses
    sums |= {"label_counts": label_counts, "chi_square": chi_square}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in sums.items()}


def known(share, balance=None, done=0, rounds=8, **others):
    """What a server knows after so many of so many rounds, with a spread of 1."""
    routes = Routes.init("em", len(share), Population(1, 0, num_rounds=rounds))
    balance = [0.0] * len(share) if balance is None else balance
    values = {"round": float(done), "balance": balance, "share": share, "spread": 1.0} | others
    return replace(routes, **{name: torch.tensor(value) for name, value in values.items()})


EVERYONE = torch.tensor([0])

# The client's side.


def test_logits_are_minus_the_losses_over_the_temperature_plus_the_bias():
    # T = 2, b = (1, 0): −4/2 + 1 = −1 and −2/2 = −1; −1/2 + 1 = ½ and −1/2. n (mean − min): 3 (3 − 2), 5 · 0.
    losses, data = torch.tensor([[4.0, 2.0], [1.0, 1.0]]), sized(3, 5)
    logits, measured = EM.start(
        told([1.0, 0.0], 2.0, 2), torch.zeros(2, 2), lambda: of_one_label(losses, data), data
    )
    assert logits.tolist() == [[-1.0, -1.0], [0.5, -0.5]]
    assert measured.spread.tolist() == [3.0, 0.0]
    assert measured.label_losses.tolist() == [[[12.0, 6.0]], [[5.0, 5.0]]]
    assert measured.label_counts.tolist() == [[3.0], [5.0]]
    assert measured.chi_square.tolist() == [0.0, 0.0]


def test_what_a_label_makes_harder_is_taken_off_by_the_clients_share_of_it():
    # Losses by label: 0 has (6, 2) in all over 2 examples, 1 has (1, 5) over 1; λ E = (1, −1) and (−2, 2).
    # ℓ = 7/3, 7/3; e = (2 · 1 − 2)/3 = 0, 0. The other has label 1 only: ℓ − e = (3 + 2, 3 − 2).
    found = LabelLosses(
        torch.tensor([[[6.0, 2.0], [1.0, 5.0]], [[0.0, 0.0], [6.0, 6.0]]]), torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    )
    message = told([0.0, 0.0], 2.0, 2, [[1.0, -1.0], [-2.0, 2.0]], [0.5, 0.5])
    logits, measured = EM.start(message, torch.zeros(2, 2), lambda: found, sized(3, 2))
    assert_close(logits, torch.tensor([[-7 / 6, -7 / 6], [-2.5, -0.5]]))
    assert_close(measured.spread, torch.tensor([0.0, 2 * (3.0 - 1.0)]))  # of what is centred
    assert torch.equal(measured.label_losses, found.sums)  # what is sent is not centred
    assert_close(measured.chi_square, torch.tensor([2 * 0.25 / 1.5, 2 * 1.0 / 1.0]))


def test_routes_are_uniform_while_no_temperature_is_known():
    losses, data = torch.tensor([[4.0, 2.0, 9.0], [0.0, 7.0, 2.0]]), sized(2, 4)
    logits, measured = EM.start(
        told([1.0, 0.0, -1.0], 0.0, 2), torch.zeros(2, 3), lambda: of_one_label(losses, data), data
    )
    assert torch.equal(logits, torch.zeros(2, 3))
    assert measured.spread.tolist() == [6.0, 12.0]  # 2 (5 − 2), 4 (3 − 0): measured all the same


@pytest.mark.parametrize("private", [torch.tensor([[0.5, -0.5]]), torch.ones(1, 3, 2)], ids=["", "by layer"])
def test_a_router_that_is_not_em_measures_nothing(private):
    def losses():
        raise AssertionError("it did")

    logits, measured = GRADIENT.start(told([9.0, 0.0], 1.0, 1), private, losses, sized(2))
    assert torch.equal(logits, private)
    shapes = [(1,), (1, 0, 2), (1, 0), (1,)]
    assert [tuple(leaf.shape) for leaf in tree.tensors(measured).values()] == shapes
    assert not any(leaf.any() for leaf in tree.tensors(measured).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_oracle_is_one_hot_to_the_last_bit(dtype):
    group = torch.tensor([2, 0, 1, 1])
    routes = Routes.init("oracle", 4, Population(4, 0, group))
    message = routes.tell(ORACLE, torch.tensor([3, 0]))
    logits, _ = ORACLE.start(message, torch.zeros(2, 4), lambda: torch.zeros(2, 4), sized(1, 1))
    assert torch.equal(logits.to(dtype).softmax(1), torch.eye(4, dtype=dtype)[[1, 2]])


@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_the_unit_of_the_loss_does_not_matter(scale):
    # Three rounds in both units, by the client's function and the server's.
    draw = torch.Generator().manual_seed(0)
    data, probs = sized(6, 9, 3), {}
    sums = torch.rand(3, 3, 2, 4, generator=draw)
    counts = torch.tensor([[2.0, 4.0], [3.0, 6.0], [2.0, 1.0]])
    for unit in (1.0, scale):
        routes = Routes.init("em", 4, Population(3, 0, num_rounds=30, num_labels=2))
        for round in range(3):
            now = routes.tell(EM, torch.arange(3))
            seen = LabelLosses(unit * sums[round] * counts.unsqueeze(2), counts)
            logits, measured = EM.start(now, torch.zeros(3, 4), lambda seen=seen: seen, data)
            probs[unit] = logits.softmax(1)
            n = data.num_examples
            routes = routes.after(EM, route_sums(n, n.unsqueeze(1) * probs[unit], measured))
        assert now.excess.abs().max() > 0
    assert_close(probs[scale], probs[1.0])
    assert probs[1.0].max() > 0.5


@pytest.mark.parametrize("counts", [(FORWARD_EXAMPLES + 44, 3), (2 * FORWARD_EXAMPLES,), (4, FORWARD_EXAMPLES, 9)])
def test_losses_are_means_over_all_examples_however_many_batches_they_fill(counts):
    draw = torch.Generator().manual_seed(0)
    clients = [tuple(torch.randn(n, 1, generator=draw).double() for _ in "xy") for n in counts]
    weights = torch.tensor([-1.0, 0.5, 2.0]).double()
    data = ClientData(Examples.of(clients), np.arange(len(counts)), 0, 1)
    line = nn.Linear(1, 1, bias=False).double()
    measured = losses_of(Loss(line, "mse"), {"weight": weights.view(3, 1, 1)}, data).mean
    expected = [[((w * x - y) ** 2).mean().item() for w in weights] for x, y in clients]
    # Weights of padding and counts are float32, but whole numbers: exact.
    assert_close(measured, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
@pytest.mark.parametrize("own", [False, True], ids=["", "private tensors"])
@pytest.mark.parametrize("counts", [(5,), (4, 9, 1)])
def test_losses_are_summed_by_label(counts, own, bounded):
    draw = torch.Generator().manual_seed(0)
    clients = [
        (torch.randn(n, 2, generator=draw).double(), torch.randint(0, 3, (n,), generator=draw)) for n in counts
    ]
    data = ClientData(Examples.of(clients), np.arange(len(counts)), 0, 1)
    weights = torch.randn(2, 4, 2, generator=draw).double()  # C = 2, of four labels, one of which nobody has
    biases = torch.randn(len(counts), 4, generator=draw).double() if own else torch.zeros(len(counts), 4).double()
    module = nn.Linear(2, 4).double()
    candidates = {"weight": weights} | ({} if own else {"bias": torch.zeros(2, 4).double()})
    private = {"bias": biases} if own else None
    whose = torch.arange(len(counts)) % 2 == 0  # these clients' losses are bounded
    told = whose.float() if bounded else None
    found = losses_of(Loss(module, "cross_entropy"), candidates, data, 4, private, told)
    for k, (x, y) in enumerate(clients):
        assert found.counts[k].tolist() == [(y == label).sum() for label in range(4)]
        for label in range(4):
            mine = x[y == label]
            for c in range(2):
                logs = (mine @ weights[c].T + biases[k]).log_softmax(1)[:, label]
                expected = (1 - logs.exp()).sum() if bounded and whose[k] else -logs.sum()
                assert_close(found.sums[k, label, c], expected)
    assert_close(found.mean[0], found.sums[0].sum(0) / counts[0])


def pictures(*counts):
    """Clients with so many images of noise each, of three labels."""
    draw = torch.Generator().manual_seed(0)
    return Examples.of(
        [(torch.randn(n, 1, 4, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in counts]
    )


def convolutional():
    with seeded(0, "model"):
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def test_losses_of_images_are_the_same_for_many_clients_as_for_each(monkeypatch):
    monkeypatch.setattr("umbel.model.loss.CACHED_IMAGES", 4)
    everyone = ClientData(pictures(5, 9, 1), np.arange(3), 0, 1)
    loss, draw = Loss(convolutional(), "cross_entropy"), torch.Generator().manual_seed(1)
    models = {name: torch.randn(2, *leaf.shape, generator=draw) for name, leaf in loss.module.named_parameters()}
    found = losses_of(loss, models, everyone, 3)
    for k in range(3):
        x, y = everyone.examples.of_client(k)
        assert_close(found.mean[k], losses_of(loss, models, everyone.among(torch.tensor([k])), 3).mean[0])
        for c in range(2):
            one = torch.func.functional_call(loss.module, {name: leaf[c] for name, leaf in models.items()}, (x,))
            assert_close(found.mean[k, c], nn.functional.cross_entropy(one, y))


@pytest.mark.parametrize("method", [FLoRAL(2), Ensemble(2), IFCA(2)], ids=["floral", "ensemble", "ifca"])
def test_who_trains_one_by_one_is_measured_with_everyone(method, monkeypatch):
    examples, group = pictures(5, 9, 1), torch.tensor([0, 1, 0])
    task = Task("pictures", convolutional(), "cross_entropy", examples, examples, group)
    cohort, at = start(task, method, Schedule(rounds=4), Engine("looped"))
    assert not cohort.together  # a node's bits
    assert start(task, method, Schedule(rounds=4), Engine())[0].together
    cohort = replace(cohort, together=True)
    alone = [cohort.update(at.shared, at.store, np.array([k]), 1)[0] for k in range(3)]
    measured = []

    def spied(loss, candidates, data, *rest, **more):
        measured.append(data.clients.tolist())
        return losses_of(loss, candidates, data, *rest, **more)

    monkeypatch.setattr(f"{type(method).__module__}.losses_of", spied)
    uploads = list(cohort.uploads(at.shared, at.store, np.arange(3), 1, Tally()))
    assert measured == [[0, 1, 2]]
    for own, upload in zip(alone, uploads, strict=True):
        for name, leaf in tree.tensors(upload).items():
            assert_close(leaf, tree.tensors(own)[name])


class Recurrent(nn.Module):
    """A model whose clients cannot be stacked."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("method", [FLoRAL(2), Ensemble(2), IFCA(2)], ids=["floral", "ensemble", "ifca"])
def test_a_model_that_cannot_be_stacked_is_measured_one_after_the_other(method):
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(6, 5, 3, generator=draw), torch.arange(6) % 2) for _ in range(4)]
    examples = Examples.of(clients)
    task = Task("sequences", Recurrent(), "cross_entropy", examples, examples, torch.tensor([0, 1, 0, 1]))
    found = {
        mode: run(task, method, schedule=Schedule(rounds=2), engine=Engine(mode)).figures
        for mode in ("auto", "looped")
    }
    assert found["auto"]["loss"] == pytest.approx(found["looped"]["loss"], rel=1e-5)


def test_bounded_losses_are_of_labels_only_and_a_loss_that_is_not_finite_stays_so():
    data = ClientData(Examples.of([(torch.ones(2, 1), torch.zeros(2, 1))]), np.arange(1), 0, 1)
    line = Loss(nn.Linear(1, 1, bias=False), "mse")
    candidates = {"weight": torch.tensor([2.0, 3.0]).view(2, 1, 1)}
    assert losses_of(line, candidates, data, 1, None, torch.ones(1)).mean.tolist() == [[4.0, 9.0]]
    labels = ClientData(Examples.of([(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))]), np.arange(1), 0, 1)
    candidates = {"weight": torch.tensor([[[0.0], [torch.inf]], [[0.0], [0.0]]])}
    found = losses_of(
        Loss(nn.Linear(1, 2, bias=False), "cross_entropy"), candidates, labels, 2, None, torch.ones(1)
    )
    assert_close(found.mean, torch.tensor([[torch.nan, 0.5]]), equal_nan=True)


# The server's side: what it tells.


@pytest.mark.parametrize(("done", "expected"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.5), (4, None), (9, None)])
def test_bias_and_excess_are_held_for_half_of_the_exploring_then_fade_and_then_there_is_the_prior(done, expected):
    # 4 of 8 rounds explore: −β in the first half, 2 (1 − ¾) = ½ of it after three rounds, then log p.
    # E by hand: means (2, 0) and (1, 3) less 1 and 2 are ±1; labels are even, so both columns' mean is 0.
    router = replace(EM, explore=0.5)
    labels = {"label_losses": [[4.0, 0.0], [2.0, 6.0]], "label_counts": [2.0, 2.0]}
    routes = known([0.75, 0.25], [0.8, -0.8], done, **labels)
    bias = [log(0.75), log(0.25)] if expected is None else [-0.8 * expected, 0.8 * expected]
    now = routes.tell(router, torch.tensor([0, 0, 0]))
    assert now.exploring.tolist() == [float(expected is not None)] * 3
    assert_close(now.bias, torch.tensor([bias] * 3))
    left = 0.0 if expected is None else expected
    assert_close(now.excess, torch.tensor([[[left, -left], [-left, left]]] * 3))


def test_the_excess_of_a_label_by_hand():
    # Label 0: 3 examples with mean losses (1, 4, 1); label 1: 1 example with (6, 2, 4).
    # Less their own means 2 and 4: (−1, 2, −1) and (2, −2, 0). With shares ¾ and ¼ the columns' means are
    # (−¼, 1, −¾), and E = (−¾, 1, −¼) and (9/4, −3, ¾): rows sum to 0, and so do columns by the shares.
    routes = known([1 / 3] * 3, label_losses=[[3.0, 12.0, 3.0], [6.0, 2.0, 4.0]], label_counts=[3.0, 1.0])
    now = routes.tell(EM, EVERYONE)
    assert_close(now.excess[0], torch.tensor([[-0.75, 1.0, -0.25], [2.25, -3.0, 0.75]]))
    assert_close(now.frequency[0], torch.tensor([0.75, 0.25]))
    # If labels differ four times as much from client to client as by chance, a quarter of it is told.
    uneven = replace(routes, unevenness=torch.tensor(4.0)).tell(EM, EVERYONE)
    assert_close(uneven.excess, now.excess / 4)
    # Less than chance would have is taken for chance.
    assert_close(replace(routes, unevenness=torch.tensor(0.5)).tell(EM, EVERYONE).excess, now.excess)


def test_a_client_is_routed_by_what_it_needs_and_not_by_the_labels_it_happens_to_have():
    # Label y costs a_y + g_c + E_yc with adapter c, for everyone. Two clients differ in their labels only.
    draw = torch.Generator().manual_seed(0)
    costs = torch.rand(4, 3, generator=draw)
    counts = torch.tensor([[9.0, 1.0, 3.0, 0.0], [0.0, 6.0, 2.0, 5.0], [4.0, 4.0, 4.0, 4.0]])
    found = LabelLosses(counts.unsqueeze(2) * costs, counts)
    n = counts.sum(1)
    routes = Routes.init("em", 3, Population(3, 0, num_rounds=30, num_labels=4))
    data = sized(*n.int().tolist())
    _, measured = EM.start(routes.tell(EM, torch.arange(3)), torch.zeros(3, 3), lambda: found, data)
    after = routes.after(EM, route_sums(n, n.unsqueeze(1) * torch.full((3, 3), 1 / 3), measured))
    logits, _ = EM.start(after.tell(EM, torch.arange(3)), torch.zeros(3, 3), lambda: found, data)
    assert_close(logits.softmax(1), logits.softmax(1)[:1].expand(3, 3))
    assert logits.softmax(1)[0].max() > 0.9
    # With nothing taken off they part.
    as_it_is = replace(after, round=after.rounds).tell(EM, torch.arange(3))
    logits, _ = EM.start(as_it_is, torch.zeros(3, 3), lambda: found, data)
    assert logits.argmax(1).unique().numel() > 1


def test_chi_square_by_hand():
    # 4 examples, 2 of each expected, and 3 and 1 there: ½ + ½. A label that nobody has counts nothing.
    counts = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 8.0, 0.0]])
    frequency = torch.tensor([[0.5, 0.5, 0.0]]).expand(3, 3)
    assert chi_square(counts, frequency).tolist() == [1.0, 0.0, 8.0]
    assert chi_square(counts, torch.zeros(3, 3)).tolist() == [0.0, 0.0, 0.0]  # before the first round


def test_labels_by_chance_have_a_chi_square_of_their_degrees_of_freedom():
    # Mean of 4000 of variance about 2 · 4: known to 0.045.
    rng, frequency = np.random.default_rng(0), np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    counts = torch.tensor(rng.multinomial(12, frequency, size=4000), dtype=torch.float32)
    found = chi_square(counts, torch.tensor(frequency, dtype=torch.float32).expand(4000, 5))
    assert found.mean().item() == pytest.approx(4, abs=0.15)


@pytest.mark.parametrize(("own", "unevenness"), [(True, 4.0), (False, 0.0)])
def test_where_groups_have_labels_of_their_own_labels_count(own, unevenness):
    # 12 examples with 4 labels. Groups of two labels each, 6 and 6: (2 · 3²/3 + 2 · 3²/3)/3 = 4, and λ = ¼.
    routes = Routes.init("em", 2, Population(4, 0, num_rounds=30, num_labels=4))
    counts = torch.tensor([[6.0, 6.0, 0.0, 0.0], [0.0, 0.0, 6.0, 6.0]] * 2 if own else [[3.0] * 4] * 4)
    losses = LabelLosses(
        torch.rand(4, 4, 2, generator=torch.Generator().manual_seed(0)) * counts.unsqueeze(2), counts
    )
    n = counts.sum(1)
    for _ in range(2):  # frequencies are known from the second round on
        _, measured = EM.start(
            routes.tell(EM, torch.arange(4)), torch.zeros(4, 2), lambda: losses, sized(12, 12, 12, 12)
        )
        routes = routes.after(EM, route_sums(n, n.unsqueeze(1) * torch.full((4, 2), 0.5), measured))
        if routes.round == 1:
            assert routes.unevenness == 1
    assert_close(routes.unevenness, torch.tensor(unevenness))
    whole = replace(routes, unevenness=torch.tensor(1.0)).tell(EM, EVERYONE).excess
    assert_close(routes.tell(EM, EVERYONE).excess, whole / max(1, unevenness))


def test_the_temperature_is_a_fraction_of_the_spread():
    routes = known([0.5, 0.5], spread=4.0)
    assert_close(routes.tell(replace(EM, temperature=0.25), torch.tensor([0, 0])).temperature, torch.ones(2))


@pytest.mark.parametrize(
    ("explore", "temperatures"),
    [
        # Explore to 2, settle to 4, cool to 8: halfway it is a √20-th, at the end a 20th.
        (0.25, {0: 1, 2: 1, 4: 1, 6: COOLING**-0.5, 7: COOLING**-0.75, 8: 1 / COOLING, 9: 1 / COOLING}),
        (0.375, {5: 1, 6: 1, 7: COOLING**-0.5, 8: 1 / COOLING}),
        (0.5, {0: 1, 7: 1, 8: 1}),  # no time left to cool
        (1.0, {0: 1, 8: 1}),
        (0.0, {0: 1, 4: 1, 8: 1}),
    ],
)
def test_the_temperature_falls_geometrically_over_what_two_phases_leave(explore, temperatures):
    router = replace(EM, explore=explore, temperature=0.5)
    for done, expected in temperatures.items():
        now = known([0.5, 0.5], done=done, spread=2.0).tell(router, EVERYONE)
        assert_close(now.temperature, torch.tensor([float(expected)]))


@pytest.mark.parametrize("rounds", [3, 8, 30, 100, 500])
def test_phases_are_shares_of_the_run(rounds):
    for done in range(rounds + 1):
        routes = known([0.5, 0.5], done=done, rounds=rounds)
        assert routes.exploring(EM) == (done < rounds / 3)
        assert routes.settled(EM) == (done >= 2 * rounds / 3)


def test_without_exploring_the_prior_holds_from_the_second_round_on():
    router = replace(EM, explore=0.0)
    routes = unknown(1)
    bias = routes.tell(router, EVERYONE).bias
    assert torch.equal(bias[:, 0], bias[:, 1])
    routes = routes.after(router, summed(1, 4.0, [3.0, 1.0], 1.0, [[8.0, 0.0]], [4.0]))
    assert_close(routes.tell(router, EVERYONE).bias, torch.tensor([[log(0.75), log(0.25)]]))
    assert torch.equal(routes.balance, torch.zeros(2))
    assert torch.equal(routes.tell(router, EVERYONE).excess, torch.zeros(1, 1, 2))


def test_the_prior_of_an_unused_route_is_finite():
    bias = known([1.0, 0.0], done=99).tell(EM, EVERYONE).bias
    assert_close(bias, torch.tensor([[0.0, log(SMALLEST_SHARE)]]))


# The server's side: what it learns.


def test_two_rounds_of_routes_by_hand():
    # All 4 clients: p = (6, 2)/8, D = 16/8, β = (log 3/2, log 1/2) less its mean: ± log(3)/2.
    # Labels: sums as they are. R is 1 after the first round, whatever was counted.
    routes = Routes.init("em", 2, Population(4, 0, num_rounds=8, num_labels=2))
    routes = routes.after(EM, summed(4, 8.0, [6.0, 2.0], 16.0, [[4.0, 2.0], [6.0, 8.0]], [2.0, 6.0], 99.0))
    assert_close(routes.share, torch.tensor([0.75, 0.25]))
    assert_close(routes.spread, torch.tensor(2.0))
    assert_close(routes.balance, torch.tensor([log(3) / 2, -log(3) / 2]))
    assert_close(routes.label_losses, torch.tensor([[4.0, 2.0], [6.0, 8.0]]))
    assert_close(routes.label_counts, torch.tensor([2.0, 6.0]))
    assert routes.unevenness == 1
    # 2 of 4 clients go half the way: p from ¾ to (1, 3)/4 is ½, D from 2 to 4 is 3; at p = ½ β stays. Sums of
    # losses and labels are halved before the new ones come; R goes half the way to 10/2.
    routes = routes.after(EM, summed(2, 4.0, [1.0, 3.0], 16.0, [[1.0, 2.0], [3.0, 4.0]], [1.0, 3.0], 10.0))
    assert_close(routes.share, torch.tensor([0.5, 0.5]))
    assert_close(routes.spread, torch.tensor(3.0))
    assert_close(routes.balance, torch.tensor([log(3) / 2, -log(3) / 2]))
    assert_close(routes.label_losses, torch.tensor([[3.0, 3.0], [6.0, 8.0]]))
    assert_close(routes.label_counts, torch.tensor([2.0, 6.0]))
    assert_close(routes.unevenness, torch.tensor(3.0))
    assert routes.round == 2


def test_the_first_spread_is_taken_whole_however_few_took_part():
    # 1 of 4: D = 6/3 and not a quarter of it, for there is nothing to keep; p goes a quarter of the way from ½.
    routes = unknown(4).after(EM, summed(1, 3.0, [3.0, 0.0], 6.0))
    assert_close(routes.spread, torch.tensor(2.0))
    assert_close(routes.share, torch.tensor([0.625, 0.375]))


class SlowRoutes:
    """What is told and learned, number by number."""

    def __init__(self, num_clients, num_routes, num_labels, rounds, explore):
        self.clients, self.rounds, self.explore, self.done = num_clients, rounds, explore, 0
        self.share, self.beta, self.spread, self.uneven = (
            [1 / num_routes] * num_routes,
            [0.0] * num_routes,
            0.0,
            1.0,
        )
        self.losses, self.counts = np.zeros((num_labels, num_routes)), np.zeros(num_labels)

    def tell(self):
        explored = self.done / (self.explore * self.rounds)
        if explored < 1:
            fade = min(1, 2 * (1 - explored))
            bias = [-b * fade for b in self.beta]
        else:
            fade, bias = 0.0, [np.log(max(p, 1e-6)) for p in self.share]
        left = self.rounds - 2 * self.explore * self.rounds
        cooled = min(1, max(0, self.done - 2 * self.explore * self.rounds) / left)
        excess = np.zeros_like(self.losses)
        if self.counts.sum():
            means = self.losses / self.counts[:, None]
            shares = self.counts / self.counts.sum()
            for y, c in np.ndindex(*means.shape):
                column = sum(shares[z] * (means[z, c] - means[z].mean()) for z in range(len(shares)))
                excess[y, c] = means[y, c] - means[y].mean() - column
        frequency = self.counts / max(1, self.counts.sum())
        return bias, 0.15 * self.spread / 20**cooled, fade / max(1, self.uneven) * excess, frequency

    def learn(self, n, routed, apart, losses, counts, squares):
        part, first = len(n) / self.clients, self.done == 0
        for c in range(len(self.share)):
            self.share[c] += part * (sum(r[c] for r in routed) / sum(n) - self.share[c])
        seen = sum(k * d for k, d in zip(n, apart, strict=True)) / sum(n)
        self.spread = seen if first else self.spread + part * (seen - self.spread)
        self.losses = (1 - part) * self.losses + sum(losses)
        self.counts = (1 - part) * self.counts + sum(counts)
        uneven = sum(squares) / len(n) / (len(self.counts) - 1)
        self.uneven = 1.0 if first else self.uneven + part * (uneven - self.uneven)
        if self.done < self.explore * self.rounds:
            self.beta = [
                b + part * np.log(max(len(self.share) * p, 1e-3))
                for b, p in zip(self.beta, self.share, strict=True)
            ]
            self.beta = [b - sum(self.beta) / len(self.beta) for b in self.beta]
        self.done += 1


def test_what_is_told_and_learned_over_many_rounds_is_a_slow_twins():
    rng, num_clients, num_routes, num_labels = np.random.default_rng(0), 8, 3, 4
    router = replace(EM, explore=0.25)
    routes = Routes.init("em", num_routes, Population(num_clients, 0, num_rounds=12, num_labels=num_labels))
    slow = SlowRoutes(num_clients, num_routes, num_labels, 12, 0.25)
    for done in range(12):
        now = routes.tell(router, EVERYONE)
        for fast, value in zip((now.bias, now.temperature, now.excess, now.frequency), slow.tell(), strict=True):
            assert_close(fast[0], torch.tensor(value, dtype=torch.float32), atol=1e-6, rtol=1e-5)
        assert routes.round == done

        here = rng.permutation(num_clients)[: [8, 3, 5][done % 3]]
        n, routed, apart = rng.integers(1, 9, len(here)), [], rng.random(len(here)) + 0.1
        for k in range(len(here)):
            own = rng.random(num_routes) ** 4
            own[2] *= done != 0  # nobody's in the first round: β there is cut off at log(1e-3) before its step
            routed.append(n[k] * own / own.sum())
        counts = rng.integers(1, 5, (len(here), num_labels))
        losses = rng.random((len(here), num_labels, num_routes)) * counts[:, :, None]
        squares = 5 * rng.random(len(here))
        slow.learn(n, routed, apart, losses, counts, squares)
        tensors = (
            torch.tensor(np.array(v), dtype=torch.float32) for v in (n * apart, losses, counts, squares, n, routed)
        )
        spread, *labels, weight, route_examples = tensors
        routes = routes.after(router, route_sums(weight, route_examples, Measured(spread, *labels)))
    assert_close(routes.share, torch.tensor(slow.share, dtype=torch.float32))
    assert_close(routes.balance, torch.tensor(slow.beta, dtype=torch.float32))
    assert_close(routes.unevenness, torch.tensor(slow.uneven, dtype=torch.float32))


def test_clients_that_never_train_are_not_waited_for():
    # 3 of 6 clients train, all of them in each round: what is known is the round's, p = (5/6, 1/6) and D = 2.
    routes = Routes.init("em", 2, Population(6, 0, num_rounds=8, num_members=3))
    for spread in (1.0, 2.0):
        routes = routes.after(EM, summed(3, 6.0, [5.0, 1.0], 6.0 * spread))
    assert_close(routes.share, torch.tensor([5 / 6, 1 / 6]))
    assert_close(routes.spread, torch.tensor(2.0))


def test_a_balance_makes_an_overfull_route_less_likely_and_an_idle_one_more():
    routes = unknown(6, 3).after(EM, summed(6, 6.0, [5.0, 1.0, 0.0], 1.0))
    bias = routes.tell(EM, EVERYONE).bias[0]
    assert bias[0] < bias[1] < bias[2]
    assert_close(bias.sum(), torch.tensor(0.0))


def test_a_route_that_starts_anew_has_an_even_share_and_no_bias():
    routes = known([0.7, 0.3, 0.0], [0.5, 0.5, -1.0]).restarted(torch.tensor([False, False, True]))
    assert_close(routes.share, torch.tensor([0.7, 0.3, 1 / 3]))
    assert routes.balance.tolist() == [0.5, 0.5, 0.0]


def test_the_sums_add_up_over_chunks():
    draw = torch.Generator().manual_seed(0)
    n = torch.randint(1, 9, (5,), generator=draw).float()
    shapes = ((5,), (5, 2, 3), (5, 2), (5,))
    measured = Measured(*(torch.rand(shape, generator=draw) for shape in shapes))
    routed = n.unsqueeze(1) * torch.randn(5, 3, generator=draw).softmax(1)
    parts = [
        route_sums(n[own], routed[own], tree.rows(measured, torch.tensor(own))) for own in ([4, 0], [2], [1, 3])
    ]
    assert_close(mixing.total(parts), route_sums(n, routed, measured))
    assert parts[0]["clients"] == 2


@pytest.mark.parametrize(
    ("guard", "steps"),
    [(0.25, [1.0, 0.5, 0.25, 0.0]), (0.0, [1.0, 1.0, 1.0, 0.0]), (1.0, [0.8125, 0.125, 0.0625, 0.0])],
)
def test_what_few_examples_used_moves_as_much_less(guard, steps):
    # p = (26, 4, 2, 0)/32 = (13, 2, 1, 0)/16, and min(1, p / τ) of it.
    assert moved_share(torch.tensor([26.0, 4.0, 2.0, 0.0]), torch.tensor(32.0), guard).tolist() == steps


# In the methods.

MIXED = [
    FLoRAL(3, AdapterPlan(2), EM, LocalTraining(batch_size=4), init_std=1.0),
    Ensemble(3, EM, LocalTraining(batch_size=4)),
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
    if isinstance(method, FLoRAL):
        method = replace(method, restart_below=0.0)
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
    method = FLoRAL(2, BIASES, replace(EM, temperature=0.25), LocalTraining(lr=0.125))
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
    method = FLoRAL(
        3, BIASES, ORACLE, LocalTraining(lr=0.125), server=ServerOptimizer("momentum", momentum=0.5), guard=guard
    )
    group = torch.tensor([0, 1])
    start, _ = method.init(offset(), Population(2, 0, group))
    start.adapters["bias"][2] = 1 / 3
    shared, _ = simulate(method, offset(), aims((1, 8.0), (1, 16.0)), rounds=2, group=group, shared=start)
    assert shared.base["bias"].item() == base
    assert shared.adapters["bias"][:2].flatten().tolist() == adapters
    assert torch.equal(shared.adapters["bias"][2], start.adapters["bias"][2])
    assert shared.moments["adapters"].first["bias"][2].item() == 0


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
    local = LocalTraining(lr=0.1, batch_size=8)
    method = FLoRAL(num_adapters, AdapterPlan(2), EM, local)
    task, plan = opposite(seed), Schedule(rounds=60, seed=seed, evaluate_every=60)
    stacked = Engine(mode="stacked")
    figures = run(task, method, schedule=plan, engine=stacked).figures
    assert figures["nmi"] == pytest.approx(1)
    assert figures["dead"] == num_adapters - 2
    assert figures["loss"] < 1e-3 * task.test.y.square().mean()  # one model for both groups answers 0 at best


def test_routes_are_learned_without_the_groups():
    task, plan = opposite(0), Schedule(rounds=10, evaluate_every=10)
    method = FLoRAL(2, AdapterPlan(2), EM, LocalTraining(lr=0.1, batch_size=8))
    told, blind = (run(one, method, schedule=plan).figures for one in (task, replace(task, group=None)))
    assert blind["loss"] == told["loss"]
