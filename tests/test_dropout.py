"""Dropout repeats client by client, however clients are stacked."""

import numpy as np
import pytest
import torch
from torch import nn

import umbel
from umbel.errors import ModelError
from umbel.model.dropout import SeededDropout
from umbel.tasks import task_of


def task(model):
    draw = torch.Generator().manual_seed(0)
    sizes = (8, 11, 5, 8)
    return task_of(model, [(torch.randn(n, 6, generator=draw), torch.arange(n) % 3) for n in sizes])


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


def final(engine, method):
    shared = umbel.run(task(model()), method, rounds=2, engine=engine).progress.shared
    return umbel.tree.tensors(shared)


@pytest.mark.parametrize("method", [umbel.FedAvg(), umbel.Ensemble(2)])
def test_masks_do_not_depend_on_stacking(method):
    stacked = final(umbel.Engine("stacked"), method)
    looped = final(umbel.Engine("looped"), method)
    pairs = final(umbel.Engine("stacked", chunk=2), method)
    for name, leaf in stacked.items():
        torch.testing.assert_close(leaf, looped[name])
        torch.testing.assert_close(leaf, pairs[name])


def test_masks_keep_the_mean_and_differ_between_clients_and_steps():
    layer = SeededDropout(0.25, place=3).train()
    masks = []
    for key in range(200):
        layer.dropout_key = torch.tensor(key)
        masks.append(layer(torch.ones(100)) > 0)
    kept = torch.stack(masks).float()
    # 20,000 draws with p = 3/4: the standard deviation of the mean is 0.003.
    assert abs(float(kept.mean()) - 0.75) < 0.015
    # Any two of 200 keys agree on about 5/8 of the 100 elements (0.75² + 0.25²), sd 0.048.
    agree = np.array([float((kept[i] == kept[i + 1]).float().mean()) for i in range(199)])
    assert abs(agree.mean() - 0.625) < 0.02
    assert agree.max() < 0.85


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(5, 5)
    torch.testing.assert_close(SeededDropout(0.5, 0).eval()(x), x, rtol=0, atol=0)


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_a_module_that_draws_by_itself_is_refused():
    with pytest.raises(ModelError, match=r"random numbers of its own"):
        umbel.run(task(FunctionalDropout(6, 3)), umbel.FedAvg(), rounds=1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x.view(-1, 3, 2))[0][:, -1])


def test_what_cannot_be_stacked_is_looped_by_auto_and_refused_when_asked_for():
    result = umbel.run(task(Recurrent()), umbel.FedAvg(), rounds=1)
    assert result.cohort.chunk == 1
    with pytest.raises(ModelError, match="mode=looped"):
        umbel.run(task(Recurrent()), umbel.FedAvg(), rounds=1, engine=umbel.Engine("stacked"))
