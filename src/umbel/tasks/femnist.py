"""femnist_digits: the handwriting of 12 people or more, one client each.

Digits of FEMNIST (Caldas et al. 2018) of those who wrote most; the first 12 have 454 to 544 images. Pixels are
in [0, 1] with ink at 1, as in MNIST; FEMNIST itself has paper at 1, from which plain SGD takes far longer to get
away.
The partition is the natural one, so that no hidden groups are known; the seed decides which of a writer's
images are for testing.
"""

from dataclasses import dataclass
from typing import Literal

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.model.nets import ResNetGN, small_cnn
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.tasks.corpora import femnist_digits
from umbel.tasks.task import Task, split


@dataclass(frozen=True)
class FEMNISTDigits:
    """Digits of FEMNIST: the handwriting of 12 people or more, one client each."""

    model: Literal["cnn", "resnet_gn"] = "cnn"
    width: int = 16  # channels of the ResNet's first stage
    num_writers: int = 12  # those who wrote most; more than 12 come from the hub
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_ranges(self, test_fraction="(0, 1)", num_writers="[1, inf)")
        if self.width < 8 or self.width % 8:
            raise RecipeError("task: width must be a multiple of 8, the number of GroupNorm's groups")

    def load(self, seed: int) -> Task:
        written = femnist_digits(self.num_writers)
        x, y = 1 - written.images.x.float() / 255, written.images.y
        own = [written.writer == writer for writer in range(int(written.writer.max()) + 1)]
        train, test = split(Examples.of([(x[rows], y[rows]) for rows in own]), self.test_fraction, seed)
        with seeded(seed, "model"):
            model = small_cnn() if self.model == "cnn" else ResNetGN(in_channels=1, width=self.width)
        return Task("femnist_digits", model, "cross_entropy", train, test)
