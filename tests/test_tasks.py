"""Tasks: who owns which examples, and that they are what the task says."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close
from torch.utils.data import random_split

from umbel.clients import Examples
from umbel.errors import DataError
from umbel.methods import FedAvg
from umbel.runs import run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import (
    CIFAR10,
    CIFAR100,
    GLUE,
    MNIST,
    TASKS,
    AGNews,
    CIFARViT,
    CodeVsProse,
    Digits,
    Dolly,
    FEMNISTDigits,
    FlanFedDPA,
    Multilingual,
    Own,
    Shakespeare,
    ShakespeareRoles,
    SyntheticLinear,
    SyntheticMLP,
    task_of,
)
from umbel.tasks.own import function_of
from umbel.tasks.partition import deal
from umbel.tasks.task import split
from umbel.train import LocalTraining

WINDOWS = {"length": 16, "tokens_per_client": 640, "public_windows": 10}
SMALL = {  # those of files on data sets of noise
    "ag_news": AGNews(**WINDOWS),
    "cifar10": CIFAR10(num_clients=4),
    "cifar100": CIFAR100(num_clients=20),
    "cifar_vit": CIFARViT(base="models/vit", num_holders=3),
    "code_vs_prose": CodeVsProse(**WINDOWS, clients_per_kind=2),
    "digits": Digits(num_clients=8),
    "dolly": Dolly(num_holders=3, length=64),
    "femnist_digits": FEMNISTDigits(),
    "flan_feddpa": FlanFedDPA(length=64),
    "glue": GLUE(num_holders=3, length=32),
    "mnist": MNIST(num_clients=8),
    "multilingual": Multilingual(**WINDOWS),
    "own": Own("test_tasks:own_task"),
    "shakespeare": Shakespeare(least_letters=500, hidden=8),
    "shakespeare_roles": ShakespeareRoles(length=8, public_windows=0, num_clients=1),
    "synthetic_linear": SyntheticLinear(num_test=20),
    "synthetic_mlp": SyntheticMLP(num_test=20),
}
FROZEN = {"ag_news", "code_vs_prose", "dolly", "flan_feddpa", "multilingual", "shakespeare_roles"}  # whole models
SLOTS = {"cifar_vit", "dolly", "glue"}  # of one task, which are tested on the same
every_task = pytest.mark.parametrize("recipe", SMALL.values(), ids=SMALL)
GROUPED = {name: recipe for name, recipe in SMALL.items() if hasattr(recipe, "num_groups") and name not in SLOTS}
every_grouped_task = pytest.mark.parametrize("recipe", GROUPED.values(), ids=GROUPED)
every_synthetic = pytest.mark.parametrize("cls", [SyntheticLinear, SyntheticMLP])


def own_task(seed):
    return Digits(num_clients=4).load(seed)


def pairs(x, y):
    """Every example as bytes, sorted: equal if and only if the examples are, in any order."""
    return sorted(np.asarray(a).tobytes() + np.asarray(b).tobytes() for a, b in zip(x, y, strict=True))


def of_client(task, client):
    """All that the client has, training and test data."""
    parts = [examples.of_client(client) for examples in (task.train, task.test)]
    return [torch.cat(both) for both in zip(*parts, strict=True)]


def weights(task):
    return torch.cat([leaf.detach().flatten() for leaf in task.model.parameters()])


def test_every_registered_task_is_tested():
    assert {name: type(recipe) for name, recipe in SMALL.items()} == TASKS


# All tasks.


@pytest.mark.parametrize("name", SMALL)
def test_a_task_is_the_same_for_the_same_seed_and_another_for_another(name, tiny_data):
    recipe = SMALL[name]
    one, again, other = (recipe.load(seed) for seed in (0, 0, 1))
    for part in ("train", "test"):
        mine, same = getattr(one, part), getattr(again, part)
        assert torch.equal(mine.x, same.x)
        assert torch.equal(mine.y, same.y)
    assert torch.equal(weights(one), weights(again))
    for part in ("train", "test"):
        mine, others = (getattr(task, part).of_client(0)[0] for task in (one, other))
        published = name == "flan_feddpa" or (part == "test" and name in ("cifar_vit", "glue"))
        published |= name == "shakespeare_roles"  # of whom there is one here, with little to divide
        assert (pairs(mine, mine) == pairs(others, others)) == published
    assert torch.equal(weights(one), weights(other)) == (name in FROZEN)


@every_task
def test_loading_leaves_the_global_generators_alone(recipe, tiny_data):
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    recipe.load(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002


@every_grouped_task
def test_group_of_client_k_is_k_modulo_the_number_of_groups(recipe, tiny_data):
    task = recipe.load(0)
    assert task.group.tolist() == [k % recipe.num_groups for k in range(recipe.num_clients)]
    assert task.num_clients == recipe.num_clients


@every_task
def test_no_test_example_is_trained_on_and_none_is_in_a_task_for_tuning(recipe, tiny_data):
    task = recipe.load(0)
    tuning = task.for_tuning(seed=3)
    unseen = set(pairs(task.test.x, task.test.y))
    assert unseen.isdisjoint(pairs(task.train.x, task.train.y))
    for client in range(task.num_clients):
        assert pairs(*of_client(tuning, client)) == pairs(*task.train.of_client(client))
    # A quarter of each client's, rounded, at least one.
    assert tuning.test.count.tolist() == [max(1, round(n / 4)) for n in task.train.count]
    assert tuning.model is task.model


# digits.


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", ["rotate", "label_shift", "both"])
def test_digits_are_dealt_to_clients_whose_group_turns_or_renames_them(variant, seed):
    task, known = Digits(variant).load(seed), load_digits()
    taken = np.concatenate(deal(1797, 40, seed))
    assert sorted(taken.tolist()) == list(range(1797))
    for client, own in enumerate(deal(1797, 40, seed)):
        images, labels, group = known.images[own] / 16, known.target[own], client % 4
        if variant in ("rotate", "both"):
            for _ in range(group):  # a quarter turn to the left: the last column becomes the first row
                images = np.array([image.T[::-1] for image in images])
        if variant in ("label_shift", "both"):
            labels = [(label + group) % 10 for label in labels]
        x, y = of_client(task, client)
        assert pairs(x, y) == pairs(images.astype(np.float32), np.array(labels, dtype=np.int64))


def test_every_image_of_digits_has_one_owner():
    # Turned and renamed back, the clients' examples together are the data set: nothing lost, nothing twice.
    task, known = Digits("both").load(0), load_digits()
    found = []
    for client in range(40):
        x, y = of_client(task, client)
        found += pairs(np.rot90(x, -(client % 4), axes=(1, 2)), (y - client % 4) % 10)
    assert sorted(found) == pairs((known.images / 16).astype(np.float32), known.target)


def test_sizes_of_digits_differ_by_at_most_one():
    task = Digits().load(0)
    # 1797 = 40 · 44 + 37; 30 % of 45 is 13½, which rounds to the even 14, and of 44 it is 13.
    assert (task.train.count + task.test.count).tolist() == [45] * 37 + [44] * 3
    assert task.test.count.tolist() == [14] * 37 + [13] * 3


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_split_by_the_seed(seed):
    known, whole = load_digits(), []
    for own in deal(1797, 40, seed):
        whole.append((torch.tensor(known.images[own] / 16).float(), torch.tensor(known.target[own])))
    parts, task = split(Examples.of(whole), 0.3, seed), Digits("label_shift", num_groups=1).load(seed)
    for part, found in zip(parts, (task.train, task.test), strict=True):
        assert torch.equal(found.x, part.x)
        assert torch.equal(found.y, part.y)


def test_digits_begin_with_the_model_that_is_described():
    task = Digits(hidden=5).load(0)
    assert [tuple(leaf.shape) for leaf in task.model.parameters()] == [(5, 64), (5,), (10, 5), (10,)]
    assert task.loss == "cross_entropy"
    assert 0 <= task.train.x.min() < task.train.x.max() == 1


# The synthetic tasks.


def normal(*shape, draw):
    return torch.randn(*shape, generator=draw).numpy().astype(np.float64)


def truth(num_groups, num_outputs, seed):
    """Slow twin: W_c, b and W_out in the published order of draws."""
    draw, scale = torch.Generator().manual_seed(27 + seed), 1 / np.sqrt(10)
    w = scale * normal(1, 10, 10, draw=draw)[0]
    u, v = scale * normal(num_groups, 10, 1, draw=draw), normal(num_groups, 1, 10, draw=draw)
    b, w_out = scale * normal(10, draw=draw), scale * normal(10, num_outputs, draw=draw)
    return [w + 2 * np.outer(u[c], v[c]) for c in range(num_groups)], b, w_out


def answer(cls, of_group, x):
    """Slow twin: what one example of the group is to be answered with."""
    w, b, w_out = of_group
    h = [sum(x[i] * w[i][j] for i in range(10)) + b[j] for j in range(10)]
    if cls is SyntheticLinear:
        return h[:3]
    return [sum(max(0, h[j]) * w_out[j][0] for j in range(10))]


@every_synthetic
@pytest.mark.parametrize("test", ["held_out", "population"])
@pytest.mark.parametrize("seed", [0, 2])
def test_synthetic_targets_are_those_of_a_slow_twin(cls, test, seed):
    recipe = cls(test=test, num_test=7)
    task = recipe.load(seed)
    w, b, w_out = truth(recipe.num_groups, 3 if cls is SyntheticLinear else 1, seed)
    for client in range(0, recipe.num_clients, 3):
        x, y = of_client(task, client)
        expected = [answer(cls, (w[client % recipe.num_groups], b, w_out), row.double().tolist()) for row in x]
        assert_close(y, torch.tensor(expected, dtype=torch.float32))


@every_synthetic
def test_synthetic_inputs_are_the_published_draws(cls):
    recipe = cls(test="held_out")
    drawn = torch.randn(
        recipe.num_clients, recipe.samples_per_client, 10, generator=torch.Generator().manual_seed(5 + 11)
    )
    task = recipe.load(5)
    for client in range(recipe.num_clients):
        x, _ = of_client(task, client)
        assert pairs(x, x) == pairs(drawn[client], drawn[client])


@every_synthetic
def test_synthetic_splits_are_those_of_random_split(cls):
    # The published code splits client after client by 0.8 and 0.2: 7 and 1 of 8, 96 and 24 of 120.
    recipe = cls(test="held_out")
    task = recipe.load(0)
    drawn = torch.randn(
        recipe.num_clients, recipe.samples_per_client, 10, generator=torch.Generator().manual_seed(11)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task.model.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
        torch.randn(1, 10)  # its summary of the model
        cls().load(0).model.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
        halves = [random_split(range(recipe.samples_per_client), [0.8, 0.2]) for _ in range(recipe.num_clients)]
    sizes = (7, 1) if cls is SyntheticLinear else (96, 24)
    for client, parts in enumerate(halves):
        assert tuple(len(part) for part in parts) == sizes
        for part, examples in zip(parts, (task.train, task.test), strict=True):
            assert torch.equal(examples.of_client(client)[0], drawn[client][list(part)])


@every_synthetic
def test_the_population_is_fresh_and_standard_normal(cls):
    held, population = (cls(test=test).load(0) for test in ("held_out", "population"))
    assert torch.equal(held.train.x, population.train.x)
    assert set(population.test.count.tolist()) == {1000}
    x = population.test.x.double()
    # 10⁵ numbers and more: five standard errors of the mean and of the variance.
    assert abs(x.mean()) < 5 * x.numel() ** -0.5
    assert abs(x.var() - 1) < 5 * (2 / x.numel()) ** 0.5
    whole = set(pairs(population.test.x, population.test.x))
    assert len(whole) == len(population.test.x)
    assert whole.isdisjoint(pairs(held.test.x, held.test.x))


def test_groups_of_synthetic_linear_differ_by_a_matrix_of_rank_two():
    # 2 (U_0 V_0 − U_1 V_1): solve each group's map from its clients' population, answers to 10 + 1 unknowns.
    task = SyntheticLinear(num_clients=2).load(0)
    maps = []
    for client in range(2):
        x, y = task.test.of_client(client)
        ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        maps.append(torch.linalg.lstsq(ones, y.double()).solution)
    difference = maps[0] - maps[1]
    assert torch.linalg.matrix_rank(difference, tol=1e-3) == 2
    assert difference[10].abs().max() < 1e-5  # the bias is shared; targets are float32
    assert difference[:10].abs().max() > 0.5


def test_fed_avg_comes_to_the_published_figure():
    # 10.5044 for seed 0: run_methods_synthetic in the repository of Almansoori et al. 2025.
    method = FedAvg(LocalTraining(lr=0.1, batch_size=4, shuffle=False))
    task, plan = SyntheticLinear(test="held_out").load(0), Schedule(rounds=2000, evaluate_every=2000)
    assert run(task, method, schedule=plan).figures["loss"] == pytest.approx(10.5044, abs=5e-4)


# Dealing and splitting.


@pytest.mark.parametrize(("num_examples", "num_clients"), [(10, 3), (12, 4), (7, 7), (3, 5), (1, 1), (1797, 40)])
def test_dealing_is_a_partition_into_even_parts(num_examples, num_clients):
    parts = deal(num_examples, num_clients, seed=1)
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_examples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_dealing_shuffles_by_the_seed():
    one, again, other = (np.concatenate(deal(100, 4, seed)).tolist() for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one != np.concatenate([np.arange(k, 100, 4) for k in range(4)]).tolist()


def counting(counts, begin=0):
    """Clients whose examples are numbers, none of them twice."""
    first = begin + np.cumsum([0, *counts])
    return Examples.of(
        [(torch.arange(a, a + n), 10 * torch.arange(a, a + n)) for a, n in zip(first, counts, strict=False)]
    )


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_splitting_is_a_partition_of_each_clients_examples(fraction):
    counts = [2, 3, 8, 41]
    examples = counting(counts)
    kept, held = split(examples, fraction, seed=0)
    for client, count in enumerate(counts):
        both = [part.of_client(client) for part in (kept, held)]
        assert torch.equal(torch.cat([x for x, _ in both]).sort().values, examples.of_client(client)[0])
        assert all(torch.equal(y, 10 * x) for x, y in both)
        assert len(both[1][0]) == min(max(1, round(fraction * count)), count - 1)


def test_a_clients_split_is_drawn_by_the_seed_and_does_not_depend_on_the_others():
    _, held = split(counting([30, 30, 30]), 0.5, seed=0)
    _, again = split(counting([30, 30]), 0.5, seed=0)
    _, other = split(counting([30, 30, 30]), 0.5, seed=1)
    for client in range(2):
        assert torch.equal(held.of_client(client)[0], again.of_client(client)[0])
    assert not torch.equal(held.x, other.x)
    assert not torch.equal(held.of_client(0)[0].sort().values, held.of_client(1)[0].sort().values - 30)


def test_one_example_cannot_be_split():
    with pytest.raises(DataError, match="client 1 has one sample"):
        split(counting([2, 1]), 0.5, seed=0)


def test_a_task_of_your_own_holds_back_what_it_is_told_or_tests_on_what_it_is_given():
    with seeded(0, "test"):
        model = nn.Linear(2, 3)
    clients = [
        (torch.randn(n, 2, generator=torch.Generator().manual_seed(n)), torch.zeros(n, dtype=int)) for n in (8, 12)
    ]
    task = task_of(model, clients, test_fraction=0.5)
    assert task.train.count.tolist() == task.test.count.tolist() == [4, 6]
    for client, own in enumerate(clients):
        assert pairs(*of_client(task, client)) == pairs(*own)
    given = task_of(model, clients, test=clients[::-1])
    assert torch.equal(given.train.x, torch.cat([clients[0][0], clients[1][0]]))
    assert torch.equal(given.test.x, torch.cat([clients[1][0], clients[0][0]]))


@pytest.mark.parametrize("place", [".wards:task", "umbel:__version__", "nowhere:task"])
def test_what_is_no_function_of_ones_own_is_refused(place):
    with pytest.raises(DataError, match=r"no function|no such function"):
        function_of(place)
