"""Which adapters are alike: inner products, K-means with constraints, and how far clusters agree with a truth.

    raw            x = everything that is trained, heads too
    delta          x = v − v⁰ , the adapter alone
    unit           x = (v − v⁰) / ‖v − v⁰‖
    unit_product   x = Δ / ‖Δ‖ ,  Δ = (s B A, biases) , what the adapter adds to the weights
    unit_parts     x = (Δ / ‖Δ‖ , (h − h⁰) / ‖h − h⁰‖) ,  h what is trained beside the adapter: heads

Of n adapters K-means needs their n² inner products and no more. Those of products come from r × r matrices,

    ⟨B_i A_i, B_j A_j⟩ = tr((B_jᵀ B_i)(A_i A_jᵀ)) ,

so that no product is formed, and B A is the same for any basis that the rank's axis is written in.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umbel.adapters.bank import Bank
from umbel.tree import Params

Features = Literal["raw", "delta", "unit", "unit_product", "unit_parts"]
STARTS = 10  # of K-means, of which the best counts
ITERATIONS = 100  # of Lloyd's, at most
FEWEST_FOR_UMAP = 8
MOST = 20  # clusters, where their number is not given


def inner_products(bank: Bank, start: Params, adapters: Params, moved: Params, features: Features) -> np.ndarray:
    """(n, n) float64, the inner products of n adapters' features.

    Args:
        bank: the adapters' plan.
        start: v⁰, the tensors of one adapter, leading axis 1.
        adapters: (n, 1, …) v.
        moved: (n, …) h − h⁰ of what is trained beside the adapter; counts for "raw" and "unit_parts" only.
        features: which.
    """
    if features in ("unit_product", "unit_parts"):
        found = _of_unit_length(_of_added(bank, start, adapters))
        if features == "unit_parts" and moved:
            found = found + _of_unit_length(_of(moved))
        return found
    changes = {name: leaf - start[name] for name, leaf in adapters.items()}  # distances know no origin
    if features == "raw":
        changes |= {f"head {name}": leaf for name, leaf in moved.items()}  # a bias and its update have one name
    return _of_unit_length(_of(changes)) if features == "unit" else _of(changes)


def _of(changes: Params) -> np.ndarray:
    """(n, n) ⟨x_i, x_j⟩ of all the tensors (n, …) together."""
    found: Any = 0
    for leaf in changes.values():
        flat = leaf.flatten(1).double()
        found = found + flat @ flat.mT
    products: np.ndarray = torch.as_tensor(found).cpu().numpy()
    return products


def _of_added(bank: Bank, start: Params, adapters: Params) -> np.ndarray:
    """(n, n) ⟨Δ_i, Δ_j⟩, from r × r matrices."""
    both = {
        name: torch.cat([start[name].to(leaf).view(1, *leaf.shape[1:]), leaf]) for name, leaf in adapters.items()
    }
    found = _of({update.name: adapters[update.name] - start[update.name] for update in bank.additive})
    if bank.low_rank:
        whole = torch.stack(_of_products(bank, both)).sum(0).cpu().numpy()
        found = found + whole[1:, 1:] - whole[1:, :1] - whole[:1, 1:] + whole[0, 0]
    return found


def _of_unit_length(products: np.ndarray) -> np.ndarray:
    """(n, n) the inner products of the same points at length 1; of a point at the origin, 0."""
    length = np.sqrt(products.diagonal().clip(min=np.finfo(float).tiny))
    unit: np.ndarray = products / length / length[:, None]
    return unit


def _of_products(bank: Bank, adapters: Params) -> list[Tensor]:
    """(n, n) s² Σ over r × r entries of (B_iᵀ B_j) ∘ (A_i A_jᵀ), for every low-rank part."""
    found = []
    for part in bank.low_rank:
        a, b = (adapters[name].squeeze(1).double() for name in (part.a_name, part.b_name))
        n, r = a.shape[:2]
        of_a, of_b = a.reshape(n * r, -1), b.transpose(1, 2).reshape(n * r, -1)
        blocks = ((of_a @ of_a.mT) * (of_b @ of_b.mT)).view(n, r, n, r)
        found.append((bank.scale * part.scaling) ** 2 * blocks.sum((1, 3)))
    return found


def points(products: np.ndarray) -> np.ndarray:
    """(n, d) points, d ≤ n, with these inner products (n, n) but for a shift: their principal components."""
    centred = products - products.mean(0) - products.mean(1)[:, None] + products.mean()
    value, vector = np.linalg.eigh((centred + centred.T) / 2)
    kept = value > value.max(initial=0.0) * len(value) * np.finfo(float).eps
    found: np.ndarray = (vector[:, kept] * np.sqrt(value[kept]))[:, ::-1]
    return found if found.shape[1] else np.zeros((len(products), 1))


def distances(products: np.ndarray) -> np.ndarray:
    """(n, n) the squared distances of points with these inner products (n, n)."""
    square = products.diagonal()
    found: np.ndarray = square[:, None] + square - 2 * products
    return found


@dataclass(frozen=True)
class Cloud:
    """Points that are to be clustered."""

    x: np.ndarray  # (n, d)
    mass: np.ndarray  # (n,) how much each counts; 0: it joins a cluster, but moves none
    owner: np.ndarray  # (n,) no two points of one owner share a cluster, if it has enough of them; −1: nobody's


def k_means(cloud: Cloud, num_clusters: int, seed: int, centres: np.ndarray | None = None) -> np.ndarray:
    """(n,) each point's cluster, the best of a few starts: those of k-means++, and `centres` if they are given.

    Every start goes on by Lloyd's steps in which the points of one owner are dealt to different clusters.

    Args:
        cloud: at least `num_clusters` of its points have mass.
        num_clusters: C.
        seed: of k-means++.
        centres: (C, d) to try as well, and to keep where no other start comes out better.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    heavy = cloud.mass > 0
    best, lowest = np.zeros(len(cloud.x), dtype=np.int64), float("inf")
    if centres is not None:
        best, lowest = lloyd(cloud, centres)
    for start in range(STARTS if num_clusters > 1 else 0):
        free = KMeans(num_clusters, n_init=1, random_state=(seed * STARTS + start) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # points that lie on each other
            free.fit(cloud.x[heavy], sample_weight=cloud.mass[heavy])
        labels, inertia = lloyd(cloud, free.cluster_centers_)
        if inertia < lowest * (1 - 1e-9) - 1e-300:
            best, lowest = labels, inertia
    return best


def lloyd(cloud: Cloud, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """(n,) each point's cluster when Lloyd's steps from the centres (C, d) have settled; Σ mass · distance²."""
    labels = np.full(len(cloud.x), -1)
    for _ in range(ITERATIONS):
        distance = np.square(cloud.x[:, None] - centres).sum(2)
        now = assigned(distance, cloud.owner, cloud.mass)
        if (now == labels).all():
            break
        labels = now
        member = (labels[:, None] == np.arange(len(centres))) * cloud.mass[:, None]
        total = member.sum(0)[:, None]
        centres = np.where(total > 0, member.T @ cloud.x / np.where(total > 0, total, 1), centres)
    distance = np.square(cloud.x - centres[labels]).sum(1)
    return labels, float(cloud.mass @ distance)


def assigned(distance: np.ndarray, owner: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """(n,) the cluster for each row of `distance` (n, C), as near as may be.

    The rows of one owner get different clusters, those with the least sum of distances (Hungarian method): first
    the rows with mass, then those without among the clusters that are left. The rows of nobody (−1), and of an
    owner with more than C, get their nearest.
    """
    from scipy.optimize import linear_sum_assignment

    labels: np.ndarray = distance.argmin(1)
    owners, counts = np.unique(owner[owner >= 0], return_counts=True)
    for one in owners[(counts > 1) & (counts <= distance.shape[1])]:
        left = np.arange(distance.shape[1])
        for rows in (np.flatnonzero((owner == one) & own) for own in (mass > 0, mass <= 0)):
            taken = linear_sum_assignment(distance[np.ix_(rows, left)])[1]
            labels[rows], left = left[taken], np.delete(left, taken)
    return labels


def best_number(cloud: Cloud, most: int, seed: int) -> int:
    """The number of clusters whose partition has the highest mean silhouette (Rousseeuw 1987).

    Tried are 2 (or as many as an owner has points) to `most`, but fewer than there are points; one cluster has no
    silhouette. Of equals it is the first.
    """
    from sklearn.metrics import silhouette_score

    heavy = cloud.mass > 0
    of_one = np.unique(cloud.owner[cloud.owner >= 0], return_counts=True)[1].max(initial=2)
    numbers = range(int(of_one), min(most, int(heavy.sum()) - 1) + 1)
    if not numbers:
        return min(most, int(heavy.sum()))
    scores = []
    for number in numbers:
        labels = k_means(cloud, number, seed)[heavy]
        apart = 1 < len(set(labels.tolist())) < len(labels)
        scores.append(float(silhouette_score(cloud.x[heavy], labels)) if apart else -1.0)
    return numbers[int(np.argmax(scores))]


def renamed(labels: np.ndarray, previous: np.ndarray, num_clusters: int) -> np.ndarray:
    """The partition `labels` (n,) with its clusters' numbers as like those of `previous` (n,) as can be.

    Args:
        labels: numbers below `num_clusters`.
        previous: likewise, −1 where there is none.
        num_clusters: C.
    """
    from scipy.optimize import linear_sum_assignment

    known = previous >= 0
    same = np.zeros((num_clusters, num_clusters))
    np.add.at(same, (labels[known], previous[known]), 1)
    names: np.ndarray = linear_sum_assignment(-same)[1][labels]
    return names


def agreement(labels: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """How far a partition (n,) agrees with the true one (n,).

    Returns:
        nmi, ari: normalized mutual information, adjusted Rand index.
        cluster_accuracy: the share that is in the right cluster when clusters and groups are matched one to
            one as well as can be (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(group, labels)
    hits = int(table[linear_sum_assignment(-table)].sum())
    return {
        "nmi": float(normalized_mutual_info_score(group, labels)),
        "ari": float(adjusted_rand_score(group, labels)),
        "cluster_accuracy": hits / len(labels),
    }


def plane(features: np.ndarray, method: Literal["pca", "umap"] = "pca", seed: int = 0) -> np.ndarray:
    """(n, 2) a picture of n points (n, d): their two principal components, or UMAP's (McInnes et al. 2018).

    In each principal component the entry farthest from 0 is positive. So few points that UMAP has no neighbours to
    speak of are shown by their principal components.
    """
    if method == "umap" and len(features) >= FEWEST_FOR_UMAP:
        from umap import UMAP

        nearest = min(15, len(features) - 1)  # UMAP's own number, or everyone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed costs it parallel work, and the like
            placed: np.ndarray = UMAP(n_neighbors=nearest, random_state=seed, n_jobs=1).fit_transform(features)
        return placed
    centred = features - features.mean(0)
    flat = np.zeros((len(features), 2))
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    two = (u * s)[:, :2]
    largest = np.abs(two).argmax(0)
    flat[:, : two.shape[1]] = two * np.where(two[largest, np.arange(two.shape[1])] < 0, -1, 1)
    return flat
