"""Local training: AdamW is PyTorch's own for each client, steps and rates are those asked for."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from umbel.clients import ClientData, Examples
from umbel.errors import RecipeError
from umbel.model import stacked
from umbel.model.loss import Loss
from umbel.model.stacked import stackable
from umbel.train import MOMENTS, LocalTraining, local_train, no_moments

LOCAL = LocalTraining(optimizer="adamw", lr=0.02, batch_size=4, epochs=2, weight_decay=0.1, shuffle=False)


def clients(*counts):
    draw = torch.Generator().manual_seed(0)
    return Examples.of([(torch.randn(n, 3, generator=draw), torch.randn(n, 2, generator=draw)) for n in counts])


def trained(examples, local, members=None, moments=None, round=1, num_rounds=0):
    members = np.arange(examples.num_clients) if members is None else np.array(members)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    start = {"w": {n: leaf.detach().expand(len(members), *leaf.shape) for n, leaf in module.named_parameters()}}
    loss = Loss(stackable(module), "mse")
    groups, losses = local_train(
        lambda groups, batch, _step: loss(groups["w"], batch),
        start | ({MOMENTS: moments} if moments else {}),
        ClientData(examples, members, 0, round, num_rounds=num_rounds),
        local,
        {"w": local.lr},
    )
    return groups, losses, module


def by_pytorch(examples, client, local, module):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    betas = local.beta1, local.beta2
    optimizer = torch.optim.AdamW(module.parameters(), local.lr, betas, local.eps, local.weight_decay)
    x, y = examples.of_client(client)
    for _ in range(local.epochs):
        for first in range(0, len(x), local.batch_size):
            rows = slice(first, first + local.batch_size)
            optimizer.zero_grad()
            (module(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("counts", [(8, 8, 8), (8, 3, 13)], ids=["equal", "ragged"])
def test_adamw_is_pytorchs_own_for_each_client(counts):
    examples = clients(*counts)
    groups, _, module = trained(examples, LOCAL)
    for client in range(len(counts)):
        own = {name: leaf[client] for name, leaf in groups["w"].items()}
        assert_close(own, {n: leaf.detach() for n, leaf in by_pytorch(examples, client, LOCAL, module).items()})


def test_gradients_that_are_views_are_stepped_along_all_the_same():
    # That of a part of two joined tensors is such a view.
    examples = Examples.of([(torch.eye(3), torch.zeros(3, 1))] * 4)
    data = ClientData(examples, np.arange(4), 0, 1)
    start = {"a": {"w": torch.ones(4, 1, 3)}, "b": {"w": torch.ones(4, 1, 3)}}
    target = torch.arange(24.0).view(4, 2, 3)

    def objective(groups, _batch, _step):
        return (torch.cat([groups["a"]["w"], groups["b"]["w"]], 1) * target).flatten(1).sum(1)

    local = LocalTraining(optimizer="adamw", lr=0.1, batch_size=3)
    groups, _ = local_train(objective, start, data, local, {"a": 0.1, "b": 0.1})
    moved = 1 - 0.1 * torch.ones(4, 1, 3)  # the first step of Adam is the sign of the gradient
    moved[0, 0, 0] = 1  # whose gradient is 0
    assert_close(groups["a"]["w"], moved)
    assert_close(groups["b"]["w"], torch.full((4, 1, 3), 0.9))


def test_tensors_that_lie_in_another_order_are_stepped_alike():
    data = ClientData(clients(4, 4), np.arange(2), 0, 1)
    target = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    local = LocalTraining(optimizer="adamw", lr=0.1, batch_size=2)

    def objective(groups, _batch, _step):
        return ((groups["w"]["w"] - target) ** 2).flatten(1).sum(1)

    ends = []
    for start in (torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 5, 6, 4).permute(0, 1, 4, 2, 3)):
        groups, _ = local_train(objective, {"w": {"w": start}}, data, local, {"w": 0.1})
        ends.append(groups["w"]["w"])
    assert_close(*ends)


def test_steps_are_counted_in_numbers_that_can():
    assert no_moments({"w": {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}})["t"].dtype == torch.float32


def test_moments_go_on_where_they_were_left():
    examples = clients(8, 8)
    start = no_moments(
        {"w": {n: leaf.expand(2, *leaf.shape) for n, leaf in trained(examples, LOCAL)[2].named_parameters()}}
    )
    groups, _, _ = trained(examples, LocalTraining(**{**vars(LOCAL), "epochs": 1}), moments=start)
    assert groups[MOMENTS]["t"].tolist() == [2.0, 2.0]
    assert not any(leaf.any() for leaf in start.values()), "what went in is not changed"
    assert any(leaf.any() for leaf in groups[MOMENTS].values())


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_are_everyones_however_many_examples_there_are(shuffle):
    examples = clients(2, 5, 11)
    data = ClientData(examples, np.arange(3), 0, 1)
    batches = list(data.batches(4, steps=6, shuffle=shuffle))
    assert len(batches) == data.num_steps(4, steps=6) == 6
    assert all(batch.active is None for batch in batches)
    for client, count in enumerate((2, 5, 11)):
        own = [
            row
            for b in batches
            for row, w in zip(
                b.rows[client].tolist(),
                (torch.ones(b.rows.shape) if b.weight is None else b.weight)[client].tolist(),
                strict=True,
            )
            if w
        ]
        per_epoch = np.bincount(np.array(own) - examples.start[client], minlength=count)
        assert per_epoch.max() - per_epoch.min() <= 1, "every example comes once before one comes again"


def test_rates_rise_and_fall_over_the_run():
    local = LocalTraining(lr=1.0, warmup=0.1, decay="cosine", final=0.2)
    assert local.rate(0.0) == 0.0
    assert local.rate(0.05) == pytest.approx(0.5)
    assert local.rate(0.1) == pytest.approx(1.0)
    assert local.rate(0.55) == pytest.approx(0.6)
    assert local.rate(1.0) == pytest.approx(0.2)
    assert LocalTraining().rate(0.7) == 1.0


def test_the_rate_is_that_of_the_round():
    examples = clients(4)
    moved = []
    for round in (1, 10):
        local = LocalTraining(lr=0.1, batch_size=4, decay="cosine")
        groups, _, module = trained(examples, local, round=round, num_rounds=10)
        moved.append((groups["w"]["0.weight"][0] - module[0].weight).norm().item())
    assert moved[1] / moved[0] == pytest.approx(local.rate(0.9), rel=1e-3)


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw"}], ids=str)
@pytest.mark.parametrize("schedule", [{"warmup": 0.5}, {"decay": "cosine"}], ids=str)
def test_a_clients_rates_are_its_own_whoever_is_stacked_with_it(how, schedule):
    examples = clients(4, 40, 9)
    local = LocalTraining(lr=0.1, batch_size=4, epochs=2, **schedule, **how)
    together, _, _ = trained(examples, local, round=2, num_rounds=4)
    for client in range(3):
        alone, _, _ = trained(examples, local, [client], round=2, num_rounds=4)
        assert_close(
            {n: leaf[client] for n, leaf in together["w"].items()}, {n: x[0] for n, x in alone["w"].items()}
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "momentum": 0.9},
        {"beta1": 1.0},
        {"eps": 0.0},
        {"steps": -1},
        {"warmup": 1.0},
        {"final": 2.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(RecipeError, match="|".join(settings)):
        LocalTraining(**settings)


class _Twice(nn.Module):
    """A layer that is used twice, and one that is used once."""

    rows_apart = True

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(40, 40), nn.Linear(40, 2)

    def forward(self, x):
        return self.head(self.wide(torch.tanh(self.wide(x))))


@pytest.mark.parametrize("shrink", [0.0, 0.3], ids=["loss", "and_the_weights"])
def test_plain_sgd_along_factors_is_that_along_gradients(shrink):
    torch.manual_seed(0)
    module = _Twice().double()
    x = [(torch.randn(n, 40).double(), torch.randn(n, 2).double()) for n in (8, 3, 13)]  # of 2, 1 and 4 batches
    data = ClientData(Examples.of(x), np.arange(3), 0, 1)
    start = {"w": {n: leaf.detach().expand(3, *leaf.shape) for n, leaf in module.named_parameters()}}
    local, loss = LocalTraining(lr=0.1, batch_size=4, shuffle=False), Loss(stackable(_Twice().double()), "mse")
    kept = []

    def objective(groups, batch, _step):
        kept.append([id(leaf) in stacked._factors.get() for leaf in groups["w"].values()])
        size = sum(leaf.square().flatten(1).sum(1) for leaf in groups["w"].values())
        return loss(groups["w"], batch) + shrink * size

    groups, _ = local_train(objective, start, data, local, {"w": local.lr})
    assert all(map(all, kept))
    for client, (inputs, targets) in enumerate(x):
        alone = _Twice().double()
        alone.load_state_dict(module.state_dict())
        optimizer = torch.optim.SGD(alone.parameters(), local.lr)
        for first in range(0, len(inputs), 4):
            optimizer.zero_grad()
            wrong = (alone(inputs[first : first + 4]) - targets[first : first + 4]).square().mean()
            (wrong + shrink * sum(leaf.square().sum() for leaf in alone.parameters())).backward()
            optimizer.step()
        own = {name: leaf[client] for name, leaf in groups["w"].items()}
        assert_close(own, dict(alone.named_parameters()), rtol=1e-12, atol=1e-14)


def test_factors_are_kept_where_they_are_smaller():
    torch.manual_seed(0)
    weights = [torch.randn(2, 30, 40, requires_grad=True), torch.randn(2, 30, 40)]
    for rows, factored in ((4, True), (20, False)):
        x, own = torch.randn(2 * rows, 40), weights[0]
        with stacked.factored_gradients([own]) as factors:
            total = stacked.linear(x, own).square().sum()
            (grad,) = torch.autograd.grad(total, [own], allow_unused=True)
        (expected,) = torch.autograd.grad(stacked.linear(x, own).square().sum(), [own])
        assert (grad is None) == factored == bool(factors[0])
        assert_close(sum(g.mT @ x for g, x in factors[0]) if factored else grad, expected)
    with stacked.factored_gradients([weights[1]]) as factors:  # another's weight is left to autograd
        stacked.linear(x[:8], weights[0]).sum().backward()
    assert weights[0].grad is not None
    assert not factors[0]


def test_a_client_without_a_batch_keeps_what_factors_would_change():
    draw = torch.Generator().manual_seed(0)
    examples = Examples.of(
        [(torch.randn(n, 40, generator=draw), torch.randn(n, 2, generator=draw)) for n in (4, 12)]
    )
    torch.manual_seed(0)
    module = _Twice()
    start = {"w": {n: leaf.detach().expand(2, *leaf.shape) for n, leaf in module.named_parameters()}}
    loss, local = Loss(stackable(module), "mse"), LocalTraining(lr=0.1, batch_size=4, shuffle=False)
    seen = []

    def objective(groups, batch, _step):
        seen.append({name: leaf.detach()[0].clone() for name, leaf in groups["w"].items()})
        values = loss(groups["w"], batch)
        return values if batch.active is None else torch.where(batch.active, values, values * float("nan"))

    groups, _ = local_train(objective, start, ClientData(examples, np.arange(2), 0, 1), local, {"w": 0.1})
    assert len(seen) == 3
    for name, leaf in groups["w"].items():
        assert torch.equal(seen[1][name], seen[2][name])
        assert torch.equal(seen[2][name], leaf[0])
        assert not torch.equal(seen[0][name], seen[1][name])
