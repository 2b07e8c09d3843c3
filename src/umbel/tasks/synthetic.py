"""synthetic_linear and synthetic_mlp: the two regression tasks of Almansoori et al. 2025, §6.1.

    h = x W_c + b ,  W_c = W + 2 U_c V_c ,  x ~ N(0, I_10)        group c of client k is k mod C
    linear   y = first 3 of h                        mlp   y = relu(h) W_out

    W ~ N(0, 1/d)   U_c ~ N(0, 1/d)   V_c ~ N(0, 1)   b ~ N(0, 1/d)   W_out ~ N(0, 1/d)   d = 10, rank 1

Sizes, seeds and the order of draws are those of the published code, so that its figures can be compared
seed by seed. There each client is tested on its 1 (linear) or 24 examples left over ("held_out", with
which FedAvg comes to the published 10.5044 for seed 0); the default is 1,000 fresh draws ("population").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.seeds import generator
from umbel.tasks.task import Task

DIM = 10  # d
SPREAD = 2.0  # how far groups are apart: the factor of U_c V_c


@dataclass(frozen=True)
class SyntheticLinear:
    """Linear regression, 10 inputs and 3 outputs: 10 clients in 2 groups with 7 examples each."""

    num_clients: int = 10
    num_groups: int = 2
    samples_per_client: int = 8  # a quarter of the model's 33 parameters
    train_fraction: float = 0.8
    test: Literal["population", "held_out"] = "population"
    num_test: int = 1000  # fresh draws a client, for "population"

    def __post_init__(self) -> None:
        _check(self)

    def load(self, seed: int) -> Task:
        def model() -> nn.Module:
            return nn.Linear(DIM, 3)

        truth = Truth.drawn(self.num_groups, num_outputs=3, seed=seed)
        return _task("synthetic_linear", self, truth, lambda h: h[..., :3], model, seed)


@dataclass(frozen=True)
class SyntheticMLP:
    """Regression on a ReLU network, 10-10-1: 20 clients in 4 groups with 96 examples each."""

    num_clients: int = 20
    num_groups: int = 4
    samples_per_client: int = 120  # half of the model's 241 parameters
    train_fraction: float = 0.8
    test: Literal["population", "held_out"] = "population"
    num_test: int = 1000  # fresh draws a client, for "population"

    def __post_init__(self) -> None:
        _check(self)

    def load(self, seed: int) -> Task:
        def model() -> nn.Module:
            return nn.Sequential(nn.Linear(DIM, 20), nn.ReLU(), nn.Linear(20, 1))

        truth = Truth.drawn(self.num_groups, num_outputs=1, seed=seed)
        return _task("synthetic_mlp", self, truth, lambda h: h.relu() @ truth.w_out, model, seed)


@dataclass(frozen=True)
class Truth:
    """The parameters that the targets come from."""

    w: Tensor  # (C, d, d) W_c
    bias: Tensor  # (d,)
    w_out: Tensor  # (d, outputs)

    @staticmethod
    def drawn(num_groups: int, num_outputs: int, seed: int) -> "Truth":
        draw = torch.Generator().manual_seed(seed + 27)  # the published seed
        scale = DIM**-0.5
        w = torch.randn(1, DIM, DIM, generator=draw) * scale
        u = torch.randn(num_groups, DIM, 1, generator=draw) * scale
        v = torch.randn(num_groups, 1, DIM, generator=draw)
        bias = torch.randn(DIM, generator=draw) * scale
        w_out = torch.randn(DIM, num_outputs, generator=draw) * scale
        return Truth(w + SPREAD * u @ v, bias, w_out)


def _check(recipe: "SyntheticLinear | SyntheticMLP") -> None:
    """Raises RecipeError if the settings make no task."""
    if recipe.num_groups < 1 or recipe.num_clients < 1 or recipe.num_clients % recipe.num_groups:
        raise RecipeError("num_clients must be a multiple of num_groups, and both at least 1")
    held_out = recipe.samples_per_client * (1 - recipe.train_fraction)
    if recipe.samples_per_client < 2 or not 0 < recipe.train_fraction < 1 or held_out < 1 or recipe.num_test < 1:
        raise RecipeError("train_fraction must be between 0 and 1 and leave a client examples on both sides")


def _task(
    name: str,
    recipe: SyntheticLinear | SyntheticMLP,
    truth: Truth,
    readout: Callable[[Tensor], Tensor],
    new_model: Callable[[], nn.Module],
    seed: int,
) -> Task:
    num_clients, samples = recipe.num_clients, recipe.samples_per_client
    group = torch.arange(num_clients) % recipe.num_groups
    w = truth.w[group]

    def targets(x: Tensor) -> Tensor:
        return readout(x @ w + truth.bias)

    x = torch.randn(num_clients, samples, DIM, generator=torch.Generator().manual_seed(seed + 11))
    y = targets(x)
    num_train = -int(-recipe.train_fraction * samples // 1)  # random_split gives the remainder to the first part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model()
        # What the published code draws between its model and its splits: an input to summarize the model
        # with, and a second model to count parameters.
        torch.randn(1, DIM)
        new_model()
        orders = [torch.randperm(samples) for _ in range(num_clients)]
    train = Examples.of([(x[k][own[:num_train]], y[k][own[:num_train]]) for k, own in enumerate(orders)])
    if recipe.test == "held_out":
        test = Examples.of([(x[k][own[num_train:]], y[k][own[num_train:]]) for k, own in enumerate(orders)])
    else:
        fresh = torch.randn(num_clients, recipe.num_test, DIM, generator=generator(seed, "population"))
        test = Examples.of(list(zip(fresh, targets(fresh), strict=True)))
    return Task(name, model, "mse", train, test, group)
