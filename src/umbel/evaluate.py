"""How well, for whom: every client's own model on its own test examples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients import ClientData, Examples
from umbel.clustering import agreement
from umbel.cohort import Cohort, PrivateStore
from umbel.model.loss import IGNORED
from umbel.tree import Params

BATCH = 16384  # rows in one forward pass, of all stacked clients together
WORST = 0.1  # the share of clients that "worst decile" speaks of


@dataclass(frozen=True)
class Scores:
    """One number a client (a test, if pooled); `accuracy` in % is None where the task is no classification."""

    loss: np.ndarray  # (K,)
    accuracy: np.ndarray | None  # (K,)
    mixture: np.ndarray  # (K, C) how each client weighs what it mixes, adapters or clients; (K, 0) if nothing
    of_texts: bool = False  # whether an example has many targets, so that loss is in nats a token

    def summary(self) -> dict[str, float]:
        """Means over clients, and the mean over the worst tenth of them; of texts the perplexity too."""
        worst = max(1, round(WORST * len(self.loss)))
        figures = {"loss": float(self.loss.mean())}
        if self.of_texts:
            figures["perplexity"] = float(np.exp(np.minimum(self.loss, 700)).mean())
        if self.accuracy is None:
            return figures | {"worst_decile": float(np.sort(self.loss)[-worst:].mean())}
        return figures | {
            "accuracy": float(self.accuracy.mean()),
            "worst_decile": float(np.sort(self.accuracy)[:worst].mean()),
        }

    def of_groups(self, group: np.ndarray) -> dict[str, list[float]]:
        """The mean score of every group (K,), over all of its clients: accuracy in %, or loss."""
        values = self.loss if self.accuracy is None else self.accuracy
        return {"by_group": [round(float(values[group == one].mean()), 5) for one in np.unique(group)]}


@dataclass(frozen=True)
class SummedScores:
    """What is known of scores of which only sums are told: no spread, no groups, no mixtures."""

    loss: float  # the mean over tests
    accuracy: float | None  # in %
    num_tests: int

    def summary(self) -> dict[str, float]:
        """What a round's figures say."""
        right = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"loss": self.loss, **right, "tested": self.num_tests}


Serve = Callable[[Cohort, np.ndarray], tuple[Params, Tensor]]
"""A cohort and K clients → the tensors of their models, leading axis K, and (K, C) how they mix them."""


def evaluate(
    cohort: Cohort,
    shared: Any,
    store: PrivateStore,
    examples: Examples,
    tests: np.ndarray,
    serves: np.ndarray | None = None,
) -> Scores:
    """The scores of the clients' personal models on these tests of `examples`, in the order of `tests`.

    The model is that of the client `serves[test]`, or where nothing is said of the client with the test's number.
    """

    def serve(cohort: Cohort, chunk: np.ndarray) -> tuple[Params, Tensor]:
        clients = chunk if serves is None else serves[chunk]
        return cohort.served(shared, store.rows(clients), clients)

    return scores(cohort, serve, examples, tests)


def scores(cohort: Cohort, serve: Serve, examples: Examples, clients: np.ndarray) -> Scores:
    """The scores of the models that `serve` gives these clients, on `examples`, in the order of `clients`."""
    labels = cohort.loss.name == "cross_entropy"
    chunks = [clients[first : first + cohort.chunk] for first in range(0, len(clients), cohort.chunk)]

    def work(own: Cohort, chunk: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return _sums(own, serve, ClientData(examples, chunk, cohort.seed, 0), labels)

    losses, rights, mixtures = zip(*cohort.each(work, chunks), strict=True)
    return Scores(
        torch.cat(losses).cpu().numpy(),
        torch.cat(rights).cpu().numpy() if labels else None,
        torch.cat(mixtures).cpu().numpy(),
        labels and examples.y.dim() > 1,
    )


def _sums(cohort: Cohort, serve: Serve, data: ClientData, labels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) mean losses and (K,) % right, 0 where there are no labels, of these clients, and how they mix."""
    params, mixture = serve(cohort, data.clients)
    loss = torch.zeros(len(data.clients), dtype=torch.float64, device=data.examples.x.device)
    right = torch.zeros_like(loss)
    for batch in data.in_order(data.fitting(BATCH)):
        outputs = cohort.loss.outputs(params, batch.x)
        weight = 1.0 if batch.weight is None else batch.weight
        loss += (cohort.loss.per_example(outputs, batch.y) * weight).sum(1)
        if labels:
            answers = cohort.loss.told_apart(outputs, batch.y).argmax(-1)
            hits = (answers == batch.y).reshape(*batch.y.shape[:2], -1).float()
            counted = (batch.y != IGNORED).reshape(hits.shape).sum(2).clamp(min=1)  # places of a text
            right += (hits.sum(2) / counted * weight).sum(1)
    return loss / data.num_examples, 100 * right / data.num_examples, mixture


def figures_of(
    found: Scores | SummedScores, method: Any, group: np.ndarray | None, alive: np.ndarray | None = None
) -> dict[str, Any]:
    """What a round's figures say of scores, of what clients mix, and of their true groups (K,), where known.

    `alive` are the routes that were not pruned; None: all.
    """
    figures: dict[str, Any] = found.summary()
    if isinstance(found, SummedScores):
        return figures
    if not getattr(method, "mixes_clients", False):  # such a method has figures of its own
        figures |= routing(found.mixture, group, alive)
    if group is not None:
        figures |= found.of_groups(group)
    return figures


def routing(mixture: np.ndarray, group: np.ndarray | None, alive: np.ndarray | None = None) -> dict[str, Any]:
    """What the clients' mixtures (K, C) of adapters or models look like, {} where nothing is mixed.

    Of a mixture of the clients themselves (`mixes_clients` of a method) none of this would say anything.

    Returns:
        entropy_nats: mean over clients of −Σ_c π log π, between 0 and log C.
        usage: C shares, the mean of π.
        dead: how many of the C that are `alive` no client leans on most, with a usage below 1 %.
        nmi, ari, cluster_accuracy: agreement of the heaviest route with the true groups, where these are known
            (`clustering.agreement`).
        mismatch: the mean over groups of ‖p̂(·|c) − p(·|g)‖₁ in [0, 2], how far the clients' weights in a mean are
            from even ones within the group; adapters and groups are paired as well as can be, and a group without
            one counts 2 (Almansoori et al. 2025, §4, with clients counted alike).
    """
    if mixture.shape[1] == 0:
        return {}
    logs = np.log(np.clip(mixture, 1e-30, None))
    usage = mixture.mean(0)
    top = mixture.argmax(1)
    routes = np.arange(len(usage))
    dead = (usage < 0.01) & ~np.isin(routes, top) & np.isin(routes, routes if alive is None else alive)
    figures: dict[str, Any] = {
        "entropy_nats": float(-(mixture * logs).sum(1).mean()),
        "usage": [round(float(u), 5) for u in usage],
        "dead": int(dead.sum()),
    }
    if group is not None:
        figures |= _agreement(top.tobytes(), group.astype(top.dtype).tobytes(), str(top.dtype))
        figures["mismatch"] = mismatch(mixture, group)
    return figures


def mismatch(mixture: np.ndarray, group: np.ndarray) -> float:
    """See `routing`; mixture (K, C), group (K,)."""
    from scipy.optimize import linear_sum_assignment

    truth = (group[:, None] == np.unique(group)).astype(float)  # (K, G)
    weights, true_weights = (own / own.sum(0).clip(1e-30) for own in (mixture.astype(float), truth))
    apart: np.ndarray = np.abs(weights[:, :, None] - true_weights[:, None]).sum(0)  # (C, G)
    apart[mixture.sum(0) == 0] = 2.0  # who serves nobody serves nobody of this group
    paired = apart[linear_sum_assignment(apart)]
    return float((paired.sum() + 2.0 * (truth.shape[1] - len(paired))) / truth.shape[1])


@lru_cache(maxsize=64)
def _agreement(routes: bytes, group: bytes, dtype: str) -> dict[str, float]:
    # Routes rarely change from one round to the next, and scikit-learn takes a millisecond.
    return agreement(np.frombuffer(routes, dtype), np.frombuffer(group, dtype))
