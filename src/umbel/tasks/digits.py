"""digits: 1,797 real handwritten digits on 40 clients that belong to 4 hidden groups.

The images (8×8) are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set.
They are dealt out evenly; client k is in group k mod 4, and a group sees the images turned by 90° times
its number ("rotate"), reads digit y as (y + its number) mod 10 ("label_shift"), or both. The
heterogeneities are those of Almansoori et al. 2025 on MNIST, in a size that trains in seconds.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from umbel.clients import Examples
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.tasks.partition import deal
from umbel.tasks.task import Task, split


@dataclass(frozen=True)
class Digits:
    """1,797 real handwritten digits on 40 clients that belong to 4 hidden groups."""

    variant: Literal["rotate", "label_shift", "both"] = "label_shift"
    num_clients: int = 40
    num_groups: int = 4
    test_fraction: float = 0.3
    hidden: int = 64
    batch_norm: bool = False  # behind the hidden layer

    def __post_init__(self) -> None:
        check_ranges(self, num_groups="[1, 4]", num_clients="[1, 400]", hidden="[1, inf)")
        check_ranges(self, test_fraction="(0, 1)")

    def load(self, seed: int) -> Task:
        from sklearn.datasets import load_digits  # takes a second: only when it is used

        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 16
        labels = torch.from_numpy(digits.target).long()
        clients = []
        for client, own in enumerate(deal(len(labels), self.num_clients, seed)):
            rows = torch.from_numpy(own)
            clients.append(self._seen_by(client % self.num_groups, images[rows], labels[rows]))
        train, test = split(Examples.of(clients), self.test_fraction, seed)
        with seeded(seed, "model"):
            norm = [nn.BatchNorm1d(self.hidden)] if self.batch_norm else []
            hidden, head = nn.Linear(64, self.hidden), nn.Linear(self.hidden, 10)
            model = nn.Sequential(nn.Flatten(), hidden, *norm, nn.ReLU(), head)
        group = torch.from_numpy(np.arange(self.num_clients) % self.num_groups)
        return Task(f"digits/{self.variant}", model, "cross_entropy", train, test, group)

    def _seen_by(self, group: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.variant != "label_shift":
            images = torch.rot90(images, group, dims=(1, 2))
        if self.variant != "rotate":
            labels = (labels + group) % 10
        return images.contiguous(), labels
