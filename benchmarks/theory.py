"""FLoRAL's theory, checked: which of the claims of Almansoori et al. 2025, §4 and App. B and C, hold in numbers.

python benchmarks/theory.py --out benchmarks/results/theory.json

Claims (a) to (d) on quadratics, where everything is known: client k is in cluster c(k) = k mod C and has

    f^k(w) = ½ ‖w − w*_c(k)‖²        so μ = L = 1 and f_c(w) − f_c* = ½ ‖w − w*_c‖²

The algorithm is the one that the paper analyses: every client takes H steps on each of the C models, then
w_c ← Σ_k p̂(k|c) w^k_c, p̂(k|c) ∝ π^k_c; η_t = 1 / (μ (t + s)); the result is the mean of w̄_t with weights
(t + s)². Claims (e) and (f) are about the weights alone. (g) and (h) run umbel's own FLoRAL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import measure
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.cohort import Engine
from umbel.methods import FLoRAL
from umbel.methods.protocol import Population
from umbel.methods.routing import Router
from umbel.model.loss import Loss
from umbel.recipe import find, load, read
from umbel.rounds import Progress
from umbel.runs import run
from umbel.seeds import generator
from umbel.train import LocalTraining

SEED = 0
DIM, CLUSTERS, LOCAL_STEPS = 10, 2, 5  # d, C, H
OFFSET = 3 * LOCAL_STEPS  # s ≥ max(3 H, 4 κ / U_c), and 4 κ / U_c = 8 for two equal clusters
ROUTERS = {  # (h): the recipe's label, and what is changed of it
    "em": ("floral", ()),
    "gradient, noise annealed": ("floral-paper", ("method.floral-paper.router.noise_rounds=100",)),
    "gradient, as published": ("floral-paper", ()),
}

Routes = Callable[[int, Tensor], Tensor]
"""(t, models (R, C, d)) → (R, K, C) π, what the clients route by from step t on."""


@dataclass(frozen=True)
class Size:
    """How much is measured; the defaults take a minute, `TINY` a few seconds."""

    draws: int = 10  # problems, or batches of repetitions, over which the standard errors are
    repeats: int = 10  # repetitions with noise in each
    clients_per_cluster: tuple[int, ...] = (2, 4, 8, 16, 32)
    noisy_steps: tuple[int, ...] = (200, 600, 1800)
    steps: tuple[int, ...] = (800, 3200, 12800, 51200)
    aggregates: int = 100  # (g), repetitions in each draw
    seeds: int = 3  # (h)
    rounds: int = 400  # (h)


TINY = Size(
    draws=4,
    clients_per_cluster=(2, 4, 8),
    noisy_steps=(200, 400),
    steps=(200, 800, 3200),
    aggregates=50,
    seeds=1,
    rounds=30,
)


# The algorithm on quadratics.


@dataclass(frozen=True)
class Trace:
    """What a run of the analysed algorithm leaves behind."""

    error: dict[int, Tensor]  # T → (R, C) f_c(ŵ_T) − f_c*
    gradient: Tensor  # (R,) G², the largest squared norm of a gradient


def problems(draws: int, *path: str | int) -> Tensor:
    """(draws, C, d) optima w*_c ~ N(0, I)."""
    return torch.randn(draws, CLUSTERS, DIM, dtype=torch.float64, generator=generator(SEED, *path))


def federated_sgd(
    optima: Tensor,
    start: Tensor,
    routes: Routes,
    steps: Sequence[int],
    clients_per_cluster: int = 1,
    sigma: float = 0.0,
    offset: int = OFFSET,
    draw: torch.Generator | None = None,
) -> Trace:
    """The error of the averaged model after each number of `steps`, in R independent repetitions.

    Args:
        optima: (R, C, d) w*_c.
        start: (R, C, d) the first models.
        routes: who routes where.
        steps: T, ascending.
        clients_per_cluster: K_c.
        sigma: σ; a gradient has noise N(0, σ²/d) in each place, so its variance is σ².
        offset: s.
        draw: of the noise.
    """
    repeats, num_clusters, dim = optima.shape
    own = torch.arange(clients_per_cluster * num_clusters) % num_clusters
    target = optima[:, None, own]  # (R, 1, K, d), the same for every model
    models = start[:, :, None].expand(-1, -1, len(own), -1).clone()  # (R, C, K, d)
    share = torch.zeros(repeats, num_clusters, len(own), dtype=optima.dtype)
    weighted, weights = torch.zeros_like(start), 0.0
    error: dict[int, Tensor] = {}
    largest = torch.zeros(repeats, dtype=optima.dtype)
    for t in range(steps[-1]):
        if t % LOCAL_STEPS == 0:
            joint = start if t == 0 else torch.einsum("rck,rckd->rcd", share, models)
            share = routes(t, joint).transpose(1, 2)
            share = share / share.sum(2, keepdim=True)
            models = joint[:, :, None].expand_as(models).clone()
        else:
            joint = torch.einsum("rck,rckd->rcd", share, models)
        weighted.add_(joint, alpha=(t + offset) ** 2)
        weights += (t + offset) ** 2
        gradient = models - target
        if sigma:
            noise = torch.randn(models.shape, generator=draw, dtype=models.dtype)
            gradient.add_(noise, alpha=sigma * dim**-0.5)
        largest = torch.maximum(largest, gradient.square().sum(3).amax((1, 2)))
        models.sub_(gradient, alpha=1 / (t + offset))
        if t + 1 in steps:
            error[t + 1] = 0.5 * (weighted / weights - optima).square().sum(2)
    return Trace(error, largest)


def off_by(mismatch: Callable[[int], Tensor], clients_per_cluster: int = 1) -> Routes:
    """Every client routes a share away from its own cluster so that ‖δ_t‖₁ is mismatch(t), one each repetition."""
    own = torch.arange(clients_per_cluster * CLUSTERS) % CLUSTERS
    right = torch.nn.functional.one_hot(own, CLUSTERS).double()

    def routes(t: int, models: Tensor) -> Tensor:
        away = mismatch(t)[:, None, None] / 2
        return (right * (1 - away) + (1 - right) * away / (CLUSTERS - 1)).expand(len(models), -1, -1)

    return routes


def right(clients_per_cluster: int = 1) -> Routes:
    """Oracle routes."""
    return off_by(lambda _: torch.zeros(1), clients_per_cluster)


def router_4(optima: Tensor, offset: int) -> Routes:
    """The paper's analysed router, eq. 4: π^k_c = softmax(−η_t f^k(w_c)), one client in each cluster."""

    def routes(t: int, models: Tensor) -> Tensor:
        losses = 0.5 * (models[:, None] - optima[:, :, None]).square().sum(3)  # (R, K, C)
        return torch.softmax(-losses / (t + offset), 2)

    return routes


# (a) to (d).


def variance(size: Size) -> dict[str, Any]:
    """(a) The error that noise makes, right routes, started at the optimum so that nothing else is seen."""
    sigma = DIM**0.5
    counts, steps, total = size.clients_per_cluster, size.noisy_steps, size.draws * size.repeats
    optima = problems(total, "variance")
    found = torch.empty(len(counts), len(steps), size.draws, dtype=torch.float64)
    for place, count in enumerate(counts):
        draw = generator(SEED, "noise", count)
        trace = federated_sgd(optima, optima, right(count), steps, count, sigma, draw=draw)
        for column, horizon in enumerate(steps):
            found[place, column] = trace.error[horizon].mean(1).reshape(size.draws, -1).mean(1)
    scale = torch.tensor(counts)[:, None, None] * torch.tensor(steps)[None, :, None] / sigma**2
    return {
        "clients_per_cluster": list(counts),
        "steps": list(steps),
        "error_at_last": [stated(row[-1]) for row in found],
        "slope_in_clients": slope(counts, found[:, -1]),
        "slope_in_steps": slope(steps, found.mean(0)),
        "constant": stated((found * scale).mean((0, 1))),
        "constant_range": [float((found * scale).mean(2).min()), float((found * scale).mean(2).max())],
    }


def no_noise(size: Size) -> dict[str, Any]:
    """(b) Right routes and no noise."""
    optima = problems(size.draws, "quadratics")
    trace = federated_sgd(optima, torch.zeros_like(optima), right(), size.steps)
    found = by_level(trace, size.steps, 1)[0]
    return {"steps": list(size.steps), "error": [stated(row) for row in found], "slope": slope(size.steps, found)}


def falling_mismatch(size: Size) -> dict[str, Any]:
    """(c) ‖δ_t‖₁² = (t + s)^−β D² with D = 1, no noise, and the explicit bound of Theorem B.10."""
    betas = (0.25, 0.5, 0.9)
    optima = problems(size.draws, "quadratics").repeat(len(betas), 1, 1)
    half = torch.tensor(betas, dtype=torch.float64).repeat_interleave(size.draws) / 2
    trace = federated_sgd(optima, torch.zeros_like(optima), off_by(lambda t: (t + OFFSET) ** -half), size.steps)
    found = by_level(trace, size.steps, len(betas))
    gradient = trace.gradient.unflatten(0, (len(betas), -1))
    by_beta = {}
    for beta, own, largest in zip(betas, found, gradient, strict=True):
        bounds = torch.stack([bound(largest, beta, horizon) for horizon in size.steps])
        by_beta[str(beta)] = {
            "error": [stated(row) for row in own],
            "slope": slope(size.steps, own),
            "bound": [stated(row) for row in bounds],
            "error_over_bound": [stated(row) for row in own / bounds],
        }
    return {"steps": list(size.steps), "beta": by_beta}


def by_level(trace: Trace, steps: Sequence[int], levels: int) -> Tensor:
    """(levels, T, draws) the clusters' mean error, of repetitions in the order (levels, draws)."""
    return torch.stack([trace.error[horizon].mean(1).unflatten(0, (levels, -1)) for horizon in steps], 1)


def bound(gradient: Tensor, beta: float, steps: int) -> Tensor:
    """Theorem B.10's right side for σ = 0, D = 1, μ = L = 1 and G² = `gradient`."""
    mismatch = 48 * gradient / float(steps) ** (1 + beta)
    first = 24 * gradient * (OFFSET - 1 + 2 * float(OFFSET) ** -beta) * OFFSET**2 / steps**3
    total: Tensor = mismatch + first + 48 * LOCAL_STEPS**2 * gradient / steps**2
    return total


def constant_mismatch(size: Size) -> dict[str, Any]:
    """(d) Routes that stay wrong, and the paper's router (4), which ends there."""
    optima, steps = problems(size.draws, "quadratics"), size.steps
    floor = 0.5 * (optima.mean(1, keepdim=True) - optima).square().sum(2).mean(1)  # of uniform routes

    mismatch = torch.tensor([0.1, 0.2, 0.4, 0.7, 1.0], dtype=torch.float64)  # ‖δ‖₁; uniform routes have 1
    repeated, every = optima.repeat(len(mismatch), 1, 1), mismatch.repeat_interleave(size.draws)
    trace = federated_sgd(repeated, torch.zeros_like(repeated), off_by(lambda _: every), steps)
    found = by_level(trace, steps, len(mismatch))
    uniform, last = found[-1] / floor, found[:, -1]
    expected = mismatch[:, None] ** 2 * floor  # ½ ‖(‖δ‖₁ / 2) (w*_1 − w*_2)‖²

    gradient = float((optima[:, :, None] - optima[:, None]).square().sum(3).max())  # G² between the optima
    offset = max(OFFSET, int(16 * gradient) + 1)  # Theorem B.9 wants η ≤ 1 / (16 G²)
    trace = federated_sgd(optima, optima, router_4(optima, offset), steps, offset=offset)
    router = by_level(trace, steps, 1)[0]
    term = 32 * trace.gradient * log(2 * CLUSTERS) / steps[-1]  # B.9's for the mismatch; K = C clients here
    return {
        "steps": list(steps),
        "uniform_over_floor": [stated(row) for row in uniform],
        "router_4_over_floor": [stated(row) for row in router / floor],
        "router_4_over_theorem_term": stated(router[-1] / term),
        "router_4_offset": offset,
        "mismatch": mismatch.tolist(),
        "error_over_uniform_floor": [stated(row) for row in last / floor],
        "error_over_closed_form": [stated(row) for row in last / expected],
        "slope_in_mismatch": slope(mismatch.tolist(), last),
    }


# (e) and (f): the weights alone.


def distances(routes: np.ndarray, truth: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """(C, C') ‖p̂(·|c) − p(·|c')‖₁ between the weights that routes (K, C) and true ones (K, C') give."""

    def weights(own: np.ndarray) -> np.ndarray:
        joint = own * examples[:, None]
        shares: np.ndarray = joint / joint.sum(0).clip(1e-30)
        return shares

    apart: np.ndarray = np.abs(weights(routes)[:, :, None] - weights(truth)[:, None]).sum(0)
    return apart


def uniform_start(size: Size) -> dict[str, Any]:
    """(e) ‖δ_0‖₁ of uniform routes over 1 − U_c: exactly for balanced one-hot clusters, and for random ones."""
    exact = {}
    for clusters in (2, 4, 10):
        own = np.eye(clusters)[np.arange(10 * clusters) % clusters]
        even = np.full_like(own, 1 / clusters)
        apart = np.diag(distances(even, own, np.ones(len(own)))).max()
        exact[str(clusters)] = {"mismatch": float(apart), "claimed": 1 - 1 / clusters}
    draw = np.random.Generator(np.random.Philox(key=SEED))
    ratios = []
    for _ in range(100 * size.draws):
        clusters, clients = int(draw.integers(2, 9)), int(draw.integers(4, 33))
        truth = draw.dirichlet(np.full(clusters, 0.3), clients) + 1e-9
        examples = draw.uniform(1, 10, clients)
        apart = np.diag(distances(np.full_like(truth, 1 / clusters), truth, examples))
        own = examples / examples.sum() @ truth  # p(c)
        smallest = np.where(truth >= own, own / truth, np.inf).min(0)  # U_c
        ratios.extend((apart / (1 - smallest)).tolist())
    return {"balanced": exact, "random_clusters": len(ratios), "largest_ratio": max(ratios)}


def lemma(size: Size, largest_in_training: float) -> dict[str, Any]:
    """(f) The 4 log KC of Lemma B.6 beside the largest ‖δ‖₁² there is, and the largest seen in (h)."""
    draw = np.random.Generator(np.random.Philox(key=SEED + 1))
    disjoint = distances(np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]]), np.ones(2)).max()
    drawn = max(
        float(distances(draw.dirichlet(np.full(2, 0.1), 10), np.eye(2)[np.arange(10) % 2], np.ones(10)).max())
        for _ in range(100 * size.draws)
    )
    return {
        "largest_possible": float(disjoint) ** 2,
        "largest_drawn": drawn**2,
        "largest_in_training": largest_in_training,
        "bound_two_clients_two_clusters": 4 * log(4),
        "bound_synthetic_linear": 4 * log(20),
    }


# (g) and (h): umbel's FLoRAL.


def aggregate_variance(num_clients: int, num_groups: int, repeats: int, seed: int) -> tuple[float, float]:
    """The variance of the base's and the adapters' aggregated gradient, over that of one client's.

    One local step of FLoRAL on linear regression with fixed, right routes: what the server's tensors move is
    the aggregated gradient. Every repetition has fresh data.
    """
    batch, lr = 8, 0.1
    method = FLoRAL(
        num_adapters=num_groups,
        adapter=AdapterPlan(rank=2),
        router=Router(kind="oracle"),
        local=LocalTraining(lr, batch, shuffle=False),
        init_std=0.5,
    )
    model = nn.Linear(DIM, 3)
    draw = generator(seed, "aggregates", num_clients, num_groups)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(0.3 * torch.randn(leaf.shape, generator=draw))
    group = torch.arange(num_clients) % num_groups
    shared, fresh = method.init(model, Population(num_clients, seed, group))
    total = repeats * num_clients
    x, y = torch.randn(total * batch, DIM, generator=draw), torch.randn(total * batch, 3, generator=draw)
    examples = Examples(x, y, np.arange(total) * batch, np.full(total, batch))
    upload, _ = method.client_update(
        Loss(method.adapt(model), "mse"),
        method.send(shared, torch.arange(num_clients).repeat(repeats)),
        tree.rows(fresh, torch.zeros(total, dtype=torch.long)),
        ClientData(examples, np.arange(total), seed, 1),
    )

    def flat(params: tree.Params, kept: int) -> Tensor:
        return torch.cat([leaf.flatten(kept) for leaf in params.values()], kept).double() / lr

    bases, adapters = [], []
    for repeat in range(repeats):
        part = tree.rows(upload, torch.arange(repeat * num_clients, (repeat + 1) * num_clients))
        moved = method.server_update(shared, [part])
        bases.append(flat(moved.base, 0))
        adapters.append(flat(moved.adapters, 1))
    alone = flat(upload.base, 1).unflatten(0, (repeats, num_clients))
    own = flat(upload.adapters, 2).unflatten(0, (repeats, num_clients))[:, torch.arange(num_clients), group]
    base = torch.stack(bases).var(0).sum() / alone.var(0).sum(1).mean()
    adapter = torch.stack(adapters).var(0).sum(1).mean() / own.var(0).sum(1).mean()
    return float(base), float(adapter)


def aggregates(size: Size) -> dict[str, Any]:
    """(g) Eq. 32's variances against K at C = 4, and against C at K = 32."""
    clients, groups = (8, 16, 32, 64), (1, 2, 4, 8)
    drawn = range(size.draws)
    by_clients = torch.tensor([[aggregate_variance(k, 4, size.aggregates, s) for s in drawn] for k in clients])
    by_groups = torch.tensor([[aggregate_variance(32, c, size.aggregates, s) for s in drawn] for c in groups])
    scale = torch.tensor(clients)[:, None]
    return {
        "clients": list(clients),
        "groups": list(groups),
        "base_slope_in_clients": slope(clients, by_clients[..., 0]),
        "adapter_slope_in_clients": slope(clients, by_clients[..., 1]),
        "base_slope_in_groups": slope(groups, by_groups[..., 0]),
        "adapter_slope_in_groups": slope(groups, by_groups[..., 1]),
        "base_times_clients": stated((by_clients[..., 0] * scale).mean(0)),
        "adapter_times_clients_over_groups": stated((by_clients[..., 1] * scale / 4).mean(0)),
    }


def matched(routes: np.ndarray, group: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """(C,) ‖p̂(·|c) − p(·|c)‖₁ under the best naming of the groups."""
    apart = distances(routes, np.eye(int(group.max()) + 1)[group], examples)
    rows, columns = linear_sum_assignment(apart)
    found: np.ndarray = apart[rows, columns]
    return found


def logged_mismatch(router: str, seed: int, rounds: int) -> tuple[np.ndarray, float]:
    """(rounds, C) the mismatch of the weights that the server aggregated with on synthetic_linear, and the last loss."""
    label, changes = ROUTERS[router]
    table = load(
        find("synthetic_linear"), [f"rounds={rounds}", f"evaluate_every={rounds}", f"seed={seed}", *changes]
    )
    recipe = read(table, label)
    task = recipe.task.load(seed)
    assert task.group is not None
    group, everyone = task.group.numpy(), np.arange(task.num_clients)
    logged: list[np.ndarray] = []

    def watch(at: Progress) -> None:
        routes = at.store.rows(everyone).logits.double().softmax(1).numpy()
        logged.append(matched(routes, group, task.train.count.astype(float)))

    done = run(task, recipe.method, schedule=recipe.schedule, engine=Engine("stacked"), on_round=watch)
    return np.stack(logged), float(done.figures["loss"])


def learned(size: Size) -> tuple[dict[str, Any], float]:
    """(h) The mean mismatch over rounds of each learned router, and the largest square of one seen."""
    at = np.unique(np.geomspace(1, size.rounds, 60).round().astype(int))
    routers: dict[str, Any] = {}
    largest = 0.0
    for router in ROUTERS:
        runs = [logged_mismatch(router, seed, size.rounds) for seed in range(size.seeds)]
        curves = np.stack([curve for curve, _ in runs])
        largest = max(largest, float(curves.max()) ** 2)
        means = torch.from_numpy(curves.mean(2))  # (seeds, rounds)
        half = size.rounds // 2
        below = [np.flatnonzero(curve >= 0.01).max(initial=-1) + 2 for curve in means.numpy()]
        routers[router] = {
            "first": stated(means[:, 0]),
            "last": stated(means[:, -1]),
            "loss": stated(torch.tensor([loss for _, loss in runs])),
            "slope_in_last_half": slope(range(half, size.rounds + 1), means[:, half - 1 :].T),
            "below_one_percent_from_round": [int(first) if first <= size.rounds else None for first in below],
            "curve": [float(f"{value:.3g}") for value in means.mean(0)[at - 1]],
            "lowest": [float(f"{value:.3g}") for value in means.min(0).values[at - 1]],
            "highest": [float(f"{value:.3g}") for value in means.max(0).values[at - 1]],
        }
    return {"rounds": at.tolist(), "seeds": size.seeds, "routers": routers}, largest


# Statistics.


def stated(values: Tensor) -> dict[str, float]:
    """Mean and standard error over the entries."""
    spread = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "error": spread}


def slope(x: Sequence[float], y: Tensor) -> dict[str, float]:
    """The slope of log y (n, draws) over log x (n), by least squares in each draw: mean and standard error."""
    position = torch.tensor(x, dtype=torch.float64).log()
    position = position - position.mean()
    return stated((position[:, None] * y.double().log()).sum(0) / position.square().sum())


def main(size: Size | None = None) -> dict[str, Any]:
    """All figures."""
    size = size or Size()
    over_rounds, largest = learned(size)
    return {
        "seed": SEED,
        "a_variance": variance(size),
        "b_no_noise": no_noise(size),
        "c_falling_mismatch": falling_mismatch(size),
        "d_constant_mismatch": constant_mismatch(size),
        "e_uniform_start": uniform_start(size),
        "f_lemma": lemma(size, largest),
        "g_aggregates": aggregates(size),
        "h_learned": over_rounds,
    }


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
