"""mnist: 300 clients in 4 hidden groups that see digits turned, or read their labels shifted.

The benchmark of Almansoori et al. 2025, §6.2: MNIST dealt out evenly, 200 training and 33 or 34 test
images a client; `reduction=0.05` leaves 10 of the 200. Pixels are in [0, 1].
"""

from dataclasses import dataclass

from torch import Tensor

from umbel.model.nets import mlp
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.tasks.corpora import mnist
from umbel.tasks.grouped import Grouping, Variant
from umbel.tasks.task import Task


@dataclass(frozen=True)
class MNIST:
    """MNIST on 300 clients in 4 hidden groups that see it turned, or read its labels shifted."""

    variant: Variant = "rotate"
    num_clients: int = 300
    num_groups: int = 4
    reduction: float = 1.0  # the share of its training data that a client keeps, at least 10 images
    hidden: int = 200

    def __post_init__(self) -> None:
        self._grouping.check()
        check_ranges(self, hidden="[1, inf)")

    def load(self, seed: int) -> Task:
        grouping = self._grouping
        train, test = grouping.split(mnist(), _scaled, seed)
        with seeded(seed, "model"):
            model = mlp(784, self.hidden, 10)
        return Task(f"mnist/{self.variant}", model, "cross_entropy", train, test, grouping.group)

    @property
    def _grouping(self) -> Grouping:
        return Grouping(self.variant, self.num_clients, self.num_groups, self.reduction)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255)
