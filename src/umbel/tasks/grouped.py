"""A labelled corpus on clients of hidden groups, which see it turned or read its labels shifted.

Client k is in group k mod C. Group c sees the images turned by c quarter turns to the left ("rotate"), or
reads label y as (y + c) mod 10 ("label_shift").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.tasks.corpora import Corpus, Images
from umbel.tasks.partition import deal, kept

Variant = Literal["rotate", "label_shift"]


@dataclass(frozen=True)
class Grouping:
    """Who is in which group, and how much training data a client keeps."""

    variant: Variant
    num_clients: int
    num_groups: int
    reduction: float

    def check(self) -> None:
        """Raises RecipeError if the settings make no task."""
        most, why = (4, "quarter turns") if self.variant == "rotate" else (10, "labels to shift")
        if not 1 <= self.num_groups <= most:
            raise RecipeError(f"task: num_groups must be 1 to {most}, for there are {most} {why}")
        if not self.num_groups <= self.num_clients <= 1000:
            raise RecipeError("task: num_clients must be at least num_groups and at most 1000")
        if not 0 < self.reduction <= 1:
            raise RecipeError("task: reduction is the share of training data that is kept, above 0 and at most 1")

    @property
    def group(self) -> Tensor:
        """(clients,) int64: each client's group."""
        return torch.arange(self.num_clients) % self.num_groups

    @property
    def turns(self) -> Tensor:
        """(clients,) int64: the quarter turns by which each client sees its images turned."""
        return self.group if self.variant == "rotate" else torch.zeros(self.num_clients, dtype=torch.long)

    def split(self, corpus: Corpus, scaled: Callable[[Tensor], Tensor], seed: int) -> tuple[Examples, Examples]:
        """The clients' training and test examples: both dealt out evenly, the former then reduced.

        Args:
            scaled: uint8 pixels (n, channels, height, width) → what the model reads, float32.
        """
        train = deal(len(corpus.train.y), self.num_clients, seed, "train")
        test = deal(len(corpus.test.y), self.num_clients, seed, "test")
        return (
            self._seen(corpus.train, [torch.from_numpy(kept(own, self.reduction)) for own in train], scaled),
            self._seen(corpus.test, [torch.from_numpy(own) for own in test], scaled),
        )

    def _seen(self, images: Images, owned: list[Tensor], scaled: Callable[[Tensor], Tensor]) -> Examples:
        clients = []
        for client, own in enumerate(owned):
            x, y = images.x[own], images.y[own]
            group = client % self.num_groups
            if self.variant == "rotate":
                x = torch.rot90(x, group, dims=(2, 3))
            else:
                y = (y + group) % 10
            clients.append((x, y))
        examples = Examples.of(clients)
        return replace(examples, x=scaled(examples.x))
