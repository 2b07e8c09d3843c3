"""Copies share what nobody changes, and nothing that somebody does."""

import torch
from torch import nn
from torch.testing import assert_close

from umbel.methods import FLoRAL
from umbel.model.copies import copied
from umbel.runs import run
from umbel.seeds import seeded
from umbel.tasks import task_of


def frozen_net():
    with seeded(0, "net"):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return net.requires_grad_(False)


def test_a_copy_shares_frozen_tensors_but_those_that_are_written_to():
    net = frozen_net()
    copy = copied(net, but={"0.weight"})
    assert copy[0].bias is net[0].bias
    assert copy[0].weight is not net[0].weight
    net.requires_grad_(True)
    assert copied(net)[0].bias is not net[0].bias


def test_a_tied_tensor_is_copied_under_both_of_its_names():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    net[1].weight = net[0].weight
    copy = copied(net, but={"1.weight"})
    assert copy[0].weight is copy[1].weight is not net[0].weight


def test_a_personal_model_changes_neither_the_task_nor_another_clients():
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(6, 1, 4, 4, generator=draw), torch.arange(6) % 3) for _ in range(3)]
    task = task_of(frozen_net(), clients, test=clients)
    before = {name: leaf.clone() for name, leaf in task.model.state_dict().items()}
    result = run(task, FLoRAL(2), rounds=2)
    first = result.personal_model(0)
    answers = first(clients[0][0])
    result.personal_model(1)
    assert_close(first(clients[0][0]), answers, rtol=0, atol=0)
    assert_close(dict(task.model.state_dict()), before, rtol=0, atol=0)
    assert (answers - task.model(clients[0][0])).abs().max() > 1e-3
