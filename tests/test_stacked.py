"""Layers with a leading client axis: the rows of many clients in one pass are what each client alone computes."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import umbel
from umbel.cohort import PROBED_STEPS, Cohort, Engine
from umbel.methods import FedAvg
from umbel.model.dropout import KEY, seed_dropout
from umbel.model.loss import Loss
from umbel.model.nets import CharLSTM, CharTransformer, cifar10_cnn, mlp
from umbel.model.stacked import linear, low_rank, stackable, takes_client_axis
from umbel.rounds import start
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.train import LocalTraining

K, B = 3, 4


def net():
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Sequential(nn.Linear(5, 3, bias=False), nn.Tanh())
    with seeded(0, "test"):
        return nn.Sequential(*layers)


def of_clients(module, shared=()):
    """Each parameter with a leading client axis, different for each client, or one for all."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: leaf.detach().expand(K, *leaf.shape)
        if name in shared
        else leaf.detach() + torch.randn(K, *leaf.shape, generator=draw) / 4
        for name, leaf in module.named_parameters()
    }


@pytest.mark.parametrize(
    "shared", [(), ("0.weight",), ("0.bias",), ("1.weight",), ("1.bias",), ("0.weight", "0.bias", "3.0.weight")]
)
def test_rows_of_many_clients_are_what_each_alone_computes(shared):
    module = net()
    params = {n: leaf.clone().requires_grad_() for n, leaf in of_clients(module, shared).items()}
    passed = {n: leaf[:1].expand_as(leaf) if n in shared else leaf for n, leaf in params.items()}
    x = torch.randn(K, B, 6, generator=torch.Generator().manual_seed(1))
    loss = Loss(stackable(deepcopy(module)), "mse")
    assert loss.stackable == set(params)
    alone = torch.stack(
        [functional_call(module, {n: leaf[k] for n, leaf in passed.items()}, (x[k],)) for k in range(K)]
    )
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    found = loss.outputs(passed, x)
    assert_close(found, alone)
    expected = torch.autograd.grad((alone * weights).sum(), list(params.values()))
    assert_close(torch.autograd.grad((found * weights).sum(), list(params.values())), expected)


@pytest.mark.parametrize(
    "module", [CharLSTM(11, 4, 8), CharTransformer(11, 7, 8, 1, 2)], ids=["lstm", "transformer"]
)
def test_texts_of_many_clients_are_what_each_alone_computes(module):
    params = of_clients(module)
    ids = torch.randint(0, 11, (K, B, 6), generator=torch.Generator().manual_seed(1))
    loss = Loss(stackable(deepcopy(module)), "cross_entropy")
    assert loss.stackable.issuperset(params)
    alone = [functional_call(module, {n: leaf[k] for n, leaf in params.items()}, (ids[k],)) for k in range(K)]
    assert_close(loss.outputs(params, ids), torch.stack(alone))


def test_gradients_lie_as_the_weights_do():
    weight = torch.randn(K, 5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(torch.randn(K * B, 2, 6), weight, torch.zeros(5)).sum(), weight)
    assert grad.is_contiguous()


def test_the_product_passes_gradcheck():
    draw = torch.Generator().manual_seed(0)
    shapes = (K * B, 2, 4), (K, 3, 4), (K, 3)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(linear, inputs)


FACTORS = {"a": (6, 4), "b": (3, 6), "gate": (2,)}


@pytest.mark.parametrize("own", [(), ("a",), ("b",), ("gate",), ("a", "b", "gate")])
def test_low_rank_paths_are_added_and_pass_gradcheck(own):
    draw = torch.Generator().manual_seed(0)
    shapes = [(K * B, 2, 3), (K * B, 2, 4), *((K, *s) if n in own else s for n, s in FACTORS.items())]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out, x, *factors = inputs
    with torch.no_grad():
        found = low_rank(*inputs).unflatten(0, (K, B))
        for k in range(K):
            a, b, gate = (leaf[k] if n in own else leaf for n, leaf in zip(FACTORS, factors, strict=True))
            paths = sum(gate[c] * x @ (b[:, 3 * c : 3 * c + 3] @ a[3 * c : 3 * c + 3]).T for c in range(2))
            assert_close(found[k], (out + paths).unflatten(0, (K, B))[k])
    assert torch.autograd.gradcheck(low_rank, inputs)


@pytest.mark.parametrize("constant", range(5))
def test_a_low_rank_path_has_no_gradient_for_what_is_frozen(constant):
    draw = torch.Generator().manual_seed(0)
    shapes = [(K * B, 3), (K * B, 4), *((K, *s) for s in FACTORS.values())]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = torch.autograd.grad(low_rank(*inputs).square().sum(), inputs)
    inputs[constant] = inputs[constant].detach()
    wanted = [i for i in range(5) if i != constant]
    found = torch.autograd.grad(low_rank(*inputs).square().sum(), [inputs[i] for i in wanted])
    assert_close(found, tuple(expected[i] for i in wanted))


def test_dropout_in_one_pass_is_each_clients_own():
    module = seed_dropout(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)))
    keys = torch.tensor([7, 8, 9])
    x = torch.randn(K, B, 6, generator=torch.Generator().manual_seed(1))
    params = of_clients(module)
    together = Loss(stackable(module), "mse").outputs(params, x, training=True, key=keys)
    module.train()
    for k in range(K):
        own = {n: leaf[k] for n, leaf in params.items()} | {f"1.{KEY}": keys[k]}
        assert_close(together[k], functional_call(module, own, (x[k],)))


def test_a_module_whose_rows_may_meet_goes_another_way():
    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x):
            return self.linear(x - x.mean(0))

    for module in (Meeting(), cifar10_cnn(), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))):
        assert not takes_client_axis(stackable(module))
    module = Meeting()
    params, x = of_clients(module), torch.randn(K, B, 6)
    alone = torch.stack(
        [functional_call(module, {n: leaf[k] for n, leaf in params.items()}, (x[k],)) for k in range(K)]
    )
    assert_close(Loss(stackable(deepcopy(module)), "mse").outputs(params, x), alone)


def test_an_mlp_is_taken_whole():
    module = stackable(mlp(6, 5, 3))
    assert takes_client_axis(module) == {name for name, _ in module.named_parameters()}


def test_whether_to_stack_is_tried_on_a_few_steps_however_long_a_round_is(monkeypatch):
    steps, update = [], Cohort.update

    def spied(cohort, *rest):
        steps.append(cohort.method.local.steps)
        return update(cohort, *rest)

    clients = [(torch.randn(40, 3), torch.randint(0, 2, (40,))) for _ in range(4)]
    task = umbel.task_of(nn.Linear(3, 2), clients)
    local = LocalTraining(lr=0.1, batch_size=4, epochs=50)
    method, schedule = FedAvg(local), Schedule(rounds=1)
    monkeypatch.setattr(Cohort, "update", spied)
    start(task, method, schedule, Engine())
    assert steps
    assert set(steps) == {PROBED_STEPS}
    steps.clear()
    few = umbel.task_of(nn.Linear(3, 2), [tuple(part[:12] for part in clients[0]), *clients[1:]])
    start(
        few, replace(method, local=replace(local, epochs=1)), schedule, Engine()
    )  # the first client has three steps
    assert set(steps) == {PROBED_STEPS}
    steps.clear()
    start(task, replace(method, local=replace(local, epochs=1, batch_size=40)), schedule, Engine())
    assert set(steps) == {0}  # one step is few enough
