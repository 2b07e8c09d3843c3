"""How much each client counts when uploads meet, for any method.

    examples   w_k = n_k                                                     FedAvg
    uniform    w_k = 1
    one        w_k = 1, not scaled: what a client sends does not depend on the others
    feddisco   w_k ∝ ReLU(n_k / Σ n − a d_k / Σ d + b)                       Ye et al. 2023, eq. 5
               d_k = KL(labels of client k ‖ uniform), Σ over the round's clients
    rea        w_k ∝ n_k exp(η ℓ_k)                                          Ma et al. 2024 (FedCD)
               ℓ_k = client k's loss with the model it would serve

FedDisco falls back to n_k where every term is 0. REA's text leaves its two terms undefined; we take the
client's risk and the logarithm of its size. Its η ℓ counts as at most 60, for e⁶⁰ outweighs everyone and sums of
float32 have room for it. Weights are scaled so that Σ w_k is Σ n_k for
all but REA and "one".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from umbel.errors import RecipeError
from umbel.ranges import check_ranges

if TYPE_CHECKING:  # settings are read without NumPy and PyTorch
    import numpy as np

    from umbel.clients import Examples

LARGEST_EXPONENT = 60.0  # of REA's weights


@dataclass(frozen=True)
class Weighting:
    """The rule, and its constants."""

    rule: Literal["examples", "uniform", "one", "feddisco", "rea"] = "examples"
    a: float = 0.5  # feddisco
    b: float = 0.1  # feddisco
    eta: float = 1.0  # rea, per nat

    def __post_init__(self) -> None:
        check_ranges(self, a="[0, inf)", b="[0, inf)")

    def of(self, train: Examples, clients: np.ndarray) -> np.ndarray:
        """(K,) the weights of a round's clients, before what only their losses can tell (`of_risks`).

        Raises:
            RecipeError: feddisco on a task without class labels.
        """
        return self.of_counts(train.count[clients].astype(float), lambda: label_discrepancy(train, clients))

    def of_counts(self, counts: np.ndarray, discrepancies: Callable[[], np.ndarray]) -> np.ndarray:
        """`of`, from how many examples clients have (K,) and, where it is asked for, what labels (K,) in nats."""
        import numpy as np

        if self.rule == "one":
            return np.ones_like(counts)
        if self.rule == "uniform":
            return np.full_like(counts, counts.mean())
        if self.rule != "feddisco":
            return counts
        discrepancy = discrepancies()
        total = discrepancy.sum()
        relative = discrepancy / total if total > 0 else discrepancy
        terms = np.maximum(counts / counts.sum() - self.a * relative + self.b, 0)
        return counts if terms.sum() == 0 else terms / terms.sum() * counts.sum()

    def of_risks(self, weights: np.ndarray, risks: np.ndarray) -> np.ndarray:
        """(K,) REA's weights from those of `of` and the clients' losses."""
        import numpy as np

        scaled: np.ndarray = weights * np.exp(np.minimum(self.eta * risks, LARGEST_EXPONENT))
        return scaled


def label_discrepancy(train: Examples, clients: np.ndarray) -> np.ndarray:
    """(K,) in nats: KL divergence of each client's label frequencies from uniform over 0 to the largest label.

    Raises:
        RecipeError: targets are no class labels.
    """
    import numpy as np

    if train.y.is_floating_point():
        raise RecipeError(
            "weighting.rule = 'feddisco' compares label frequencies; this task's targets are numbers"
        )
    num_labels = int(train.y.max()) + 1
    divergence = np.zeros(len(clients))
    for row, client in enumerate(clients):
        labels = train.of_client(int(client))[1].flatten().cpu().numpy()
        divergence[row] = discrepancy_of(np.bincount(labels[labels >= 0], minlength=num_labels))  # −100: ignored
    return divergence


def discrepancy_of(counts: np.ndarray) -> float:
    """In nats: KL divergence of how often each label occurs (Y,) from uniform."""
    import numpy as np

    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float((shares * np.log(shares * len(counts))).sum())
