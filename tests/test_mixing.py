"""Sums over clients, in as many digits as they need."""

import pytest
import torch

from umbel import mixing
from umbel.methods.server import ServerOptimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True], ids=["one weight", "one for each adapter"])
def test_the_mean_of_equal_tensors_of_half_precision_is_that_tensor(dtype, apart):
    weights = torch.full((100, 2) if apart else (100,), 1001.0)
    values = {"w": torch.full((100, 2, 3), 1.5, dtype=dtype)}
    mean = mixing.mean(mixing.weighted_sum(weights, values), weights.sum(0))
    old = {"w": torch.zeros(2, 3, dtype=dtype)}
    server = ServerOptimizer()
    new, _ = server.step(old, mean, server.init(old))
    assert new["w"].dtype == dtype
    assert torch.equal(new["w"], values["w"][0])
