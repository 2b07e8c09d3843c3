"""cifar_vit: fine-tuning a vision transformer on CIFAR-10 and CIFAR-100 (as FL-TAC, Ping et al. 2024).

"tasks": ten holders with slots of the two data sets, under one head of 110 labels, of which CIFAR-100's are the
last 100. A slot counts as a client; `owner` and `group` say whose and which. "classes": CIFAR-10 on clients of
hidden groups; group c, of the clients k with k mod C = c, has the labels l with l mod C = c.
Of CIFAR-10's training images the first 20,000 are left to pretraining. Pixels are scaled as the base says, or
else by CIFAR-10's means and deviations; a base for larger images sees them enlarged.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.model.pretrained import Pixels, Pretrained
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.tasks.bases import Precision, load_pretrained, place_of
from umbel.tasks.cifar import DEVIATION, MEAN
from umbel.tasks.corpora import Images, cifar10, cifar100
from umbel.tasks.partition import deal
from umbel.tasks.slots import Holders, Labelled, Slots
from umbel.tasks.task import Task

SIZE = 32, 32


@dataclass(frozen=True)
class CIFARViT:
    """Fine-tuning a vision transformer on CIFAR-10 and CIFAR-100."""

    base: str = "google/vit-base-patch16-224-in21k"  # a folder, one in UMBEL_DATA, or a hub id
    variant: Literal["tasks", "classes"] = "tasks"
    num_holders: int = 10  # of "tasks"
    alpha: float = 0.5  # of "tasks": of the Dirichlet distribution; higher is more even
    least_examples: int = 8  # of a slot of "tasks", for training
    num_clients: int = 20  # of "classes"
    num_groups: int = 5  # of "classes"
    train_examples: int = 0  # of each data set; 0 is all
    test_examples: int = 200  # of a data set or group; 0 is all
    precision: Precision = "float32"  # of the base

    def __post_init__(self) -> None:
        self._holders.check()
        if not 1 <= self.num_groups <= 10:
            raise RecipeError("task: num_groups must be 1 to 10, for there are ten labels")
        if self.num_clients < self.num_groups or self.num_clients % self.num_groups:
            raise RecipeError("task: num_clients must be a multiple of num_groups")
        check_ranges(self, train_examples="[0, inf)")

    def load(self, seed: int) -> Task:
        num_labels = 110 if self.variant == "tasks" else 10
        model = load_pretrained(self.base, "image", num_labels, seed, self.precision)
        constants = _constants(self.base)
        model = for_cifar(model, *constants)
        ten = cifar10()
        trained = self._some(divided(ten.train)[1], seed, "cifar10")
        if self.variant == "classes":
            slots = self._by_label(trained, ten.test, seed)
        else:
            hundred = cifar100()
            train = _joined(trained, self._some(hundred.train, seed, "cifar100"))
            slots = self._holders.of(train, _joined(ten.test, hundred.test), seed)
        dtype = next(model.parameters()).dtype
        shown = [replace(own, x=_scaled(own.x, *constants).to(dtype)) for own in (slots.train, slots.test)]
        owner = slots.owner if self.variant == "tasks" else None
        name = f"cifar_vit/{self.variant}"
        return Task(name, model, "cross_entropy", shown[0], shown[1], slots.group, owner=owner)

    def _by_label(self, train: Images, test: Images, seed: int) -> Slots:
        """Each group's training images dealt out among its clients; its test images are those of them all."""
        group = torch.arange(self.num_clients) % self.num_groups
        trained: list[Labelled] = []
        for k in range(self.num_clients):
            rows = torch.nonzero(train.y % self.num_groups == group[k]).squeeze(1)
            dealt = deal(len(rows), self.num_clients // self.num_groups, seed, "train", int(group[k]))
            rows = rows[torch.from_numpy(dealt[k // self.num_groups])]
            trained.append((train.x[rows], train.y[rows]))
        grouped = [test.y % self.num_groups == of for of in range(self.num_groups)]
        tested = self._holders.tested([(test.x[rows], test.y[rows]) for rows in grouped], group, seed)
        return Slots(Examples.of(trained), tested, torch.arange(self.num_clients), group)

    def _some(self, images: Images, seed: int, name: str) -> Images:
        order = torch.randperm(len(images.y), generator=generator(seed, "some", name))
        rows = order[: self.train_examples or None].sort().values
        return Images(images.x[rows], images.y[rows])

    @property
    def _holders(self) -> Holders:
        return Holders(self.num_holders, self.alpha, self.least_examples, self.test_examples)


def divided(images: Images) -> tuple[Images, Images]:
    """CIFAR-10's training images: the first two fifths, which are for pretraining, and the rest."""
    cut = len(images.y) * 2 // 5
    return Images(images.x[:cut], images.y[:cut]), Images(images.x[cut:], images.y[cut:])


class Enlarging(Pretrained):
    """A model of larger images than those it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.interpolate(x, size=_image_size(self), mode="bilinear"))


def for_cifar(model: Pretrained, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Pretrained:
    """The model for images of 32 × 32 pixels, which the task scales by these constants of each channel."""
    size = _image_size(model)
    height, width = (size, size) if isinstance(size, int) else size.values() if isinstance(size, dict) else size
    if (height, width) != SIZE:
        model = Enlarging(model.model, model.kind, model.base)
    model.pixels = Pixels(mean, deviation, SIZE, (height, width))
    return model


def _image_size(model: Pretrained) -> Any:
    """Of the images that the base was made for; 32 where it takes any."""
    config: Any = model.model.config
    # Models of images and texts keep it with what else is about images.
    return getattr(getattr(config, "vision_config", config), "image_size", 32)


def _joined(ten: Images, hundred: Images) -> list[Labelled]:
    """Two tasks under one head: CIFAR-100's labels come after CIFAR-10's."""
    return [(ten.x, ten.y), (hundred.x, hundred.y + 10)]


def _constants(base: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The means and deviations that the base's preprocessor_config.json tells, else those of CIFAR-10."""
    from transformers.utils.hub import cached_file

    folder = Path(place_of(base))
    path: Any = folder / "preprocessor_config.json"
    if not folder.is_dir():
        path = cached_file(base, path.name, _raise_exceptions_for_missing_entries=False)
    told = json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}
    return tuple(told.get("image_mean", MEAN)), tuple(told.get("image_std", DEVIATION))


def _scaled(pixels: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    of = [torch.tensor(values)[:, None, None] for values in (mean, deviation)]
    return pixels.float().div_(255).sub_(of[0]).div_(of[1])
