"""cifar10 and cifar100: small photographs on clients of hidden groups (Almansoori et al. 2025, §6.2).

Pixels are scaled by CIFAR-10's means and deviations, and training images are flipped and cropped at random
(border 4, black), before they are turned; that is published for CIFAR-10 and taken over for CIFAR-100.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.model.nets import cifar10_cnn, vgg8
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.tasks.augment import CropAndFlip
from umbel.tasks.corpora import Images, cifar10, cifar100
from umbel.tasks.grouped import Grouping, Variant
from umbel.tasks.partition import deal
from umbel.tasks.task import Task

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10's red, green and blue
BORDER = 4  # pixels


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10 on 20 clients in 4 hidden groups that see it turned, or read its labels shifted."""

    variant: Variant = "rotate"
    num_clients: int = 20
    num_groups: int = 4
    reduction: float = 1.0  # the share of its training data that a client keeps, at least 10 images
    augment: bool = True

    def __post_init__(self) -> None:
        self._grouping.check()

    def load(self, seed: int) -> Task:
        grouping = self._grouping
        train, test = grouping.split(cifar10(), scaled, seed)
        with seeded(seed, "model"):
            model = cifar10_cnn()
        augment = _augment(grouping.turns) if self.augment else None
        return Task(f"cifar10/{self.variant}", model, "cross_entropy", train, test, grouping.group, augment)

    @property
    def _grouping(self) -> Grouping:
        return Grouping(self.variant, self.num_clients, self.num_groups, self.reduction)


@dataclass(frozen=True)
class CIFAR100:
    """CIFAR-100 on 100 clients in 10 hidden groups, each with ten of the 100 labels to itself.

    Group c has the labels l with l mod 10 = c, dealt out evenly among its clients; the model tells all 100
    labels apart. A client has 80 training and 20 test images, or 500 and 100 of the whole data set.
    """

    num_clients: int = 100
    num_groups: int = 10
    samples_per_client: int = 0  # training images that a client keeps; 0 is all
    augment: bool = True
    dropout: float = 0.5
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_groups <= 100 or self.num_clients < 1 or self.num_clients % self.num_groups:
            raise RecipeError("task: cifar100 has 1 to 100 groups, and num_clients is a multiple of num_groups")
        if self.num_clients > 1000:
            raise RecipeError("task: cifar100 has at most 1000 clients")
        check_ranges(self, samples_per_client="[0, inf)", dropout="[0, 1)")

    def load(self, seed: int) -> Task:
        corpus = cifar100()
        train = self._owned(corpus.train, seed, "train", self.samples_per_client)
        test = self._owned(corpus.test, seed, "test", 0)
        with seeded(seed, "model"):
            model = vgg8(100, self.dropout, self.batch_norm)
        group = torch.arange(self.num_clients) % self.num_groups
        augment = _augment(torch.zeros_like(group)) if self.augment else None
        return Task("cifar100", model, "cross_entropy", train, test, group, augment)

    def _owned(self, images: Images, seed: int, part: str, most: int) -> Examples:
        """Each client's images, `most` of them (0: all)."""
        shards = []
        for group in range(self.num_groups):
            rows = torch.nonzero(images.y % self.num_groups == group).squeeze(1)
            dealt = deal(len(rows), self.num_clients // self.num_groups, seed, part, group)
            shards.append([rows[torch.from_numpy(own[: most or None])] for own in dealt])
        owned = [shards[client % self.num_groups][client // self.num_groups] for client in range(self.num_clients)]
        examples = Examples.of([(images.x[own], images.y[own]) for own in owned])
        return replace(examples, x=scaled(examples.x))


def scaled(pixels: Tensor) -> Tensor:
    """(N, 3, …) float32: uint8 pixels in units of CIFAR-10's deviations from its means, channel by channel."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return pixels.float().div_(255).sub_(mean).div_(deviation)  # in place, for it may be half a gigabyte


def _augment(turns: Tensor) -> CropAndFlip:
    black = scaled(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist()
    return CropAndFlip(BORDER, tuple(black), turns)
