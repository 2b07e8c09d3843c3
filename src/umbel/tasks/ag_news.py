"""ag_news: language modelling on, or classification of, news of four classes (as Wagner et al. 2024).

Client k mainly has news of class k mod 4, its group: World, Sports, Business, Sci/Tech. "specific" clients have
one class; "mixed" ones have three windows (or news) of it for each of its neighbour's in the pairs World and
Sports, Business and Sci/Tech. The news are divided anew, without regard to the official split.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.model.pretrained import Kind, Pooling, Pretrained
from umbel.ranges import check_ranges
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.language import Heterogeneity, Reader, Windows, parts_of, shares_of
from umbel.tasks.task import Task
from umbel.tasks.texts import CLASSES, Document, news
from umbel.tasks.tokens import Tokenizer


@dataclass(frozen=True)
class AGNews:
    """Language modelling on, or classification of, news of four classes."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    task: Literal["language", "classification"] = "language"
    clients_per_class: int = 2
    heterogeneity: Heterogeneity = "specific"
    length: int = 64  # tokens of a window, or at most of the news that is classified
    tokens_per_client: int = 64_000  # for training, at most; 0 is all there are
    test_fraction: float = 0.2  # of the news
    public_windows: int = 64  # windows, or news, of all classes that everyone may see; 0 is none
    pooling: Pooling = "own"  # a classifier's head sees the base's pooler, the mean of states, or two means
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._windows.check()
        check_ranges(self, clients_per_class="[1, inf)")
        if self.pooling != "own" and self.task != "classification":
            raise RecipeError(
                "task: pooling is of a classifier; set task = 'classification', or leave it at 'own'"
            )

    def load(self, seed: int) -> Task:
        shares = shares_of(len(CLASSES), self.clients_per_class, self.heterogeneity, paired=True)
        tokenizer = Tokenizer(self.base)
        kind: Kind = "causal_lm" if self.task == "language" else "text"
        labels = len(CLASSES) if kind == "text" else 0
        model = load_pretrained(self.base, kind, labels, seed, self.precision, self.bits, self.pooling)
        if kind == "text":
            train, test, public = self._labelled(shares, tokenizer, model, seed)
        else:
            train, test, public = self._windows.of(news(), shares, tokenizer, seed)
        group, parts = torch.from_numpy(shares.argmax(1)), parts_of(shares)
        name = f"ag_news/{self.task}/{self.heterogeneity}"
        return Task(name, model, "cross_entropy", train, test, group, public=public, shares=parts)

    def _labelled(
        self, shares: np.ndarray, tokenizer: Tokenizer, model: Pretrained, seed: int
    ) -> tuple[Examples, Examples, Tensor | None]:
        """News with their class, and news that are public."""
        texts = self._windows.divided(news(), shares, Reader(tokenizer), seed, seen_whole=True)

        def ids(documents: list[Document]) -> Tensor:
            return tokenizer.padded([one.text for one in documents], [], self.length, model.pad_id)

        parts = []
        for split, clients in (("train", texts.train), ("test", texts.test)):
            owned = []
            for client, (own, share) in enumerate(zip(clients, shares.tolist(), strict=True)):
                few = min(len(documents) // part for documents, part in zip(own, share, strict=True) if part)
                if not few:
                    raise RecipeError(
                        f"task: client {client} has too few news of its classes for {split}; lower "
                        f"clients_per_class or public_windows, or change test_fraction or tokens_per_client"
                    )
                kept = [documents[: part * few] for documents, part in zip(own, share, strict=True)]
                labels = torch.arange(len(CLASSES)).repeat_interleave(torch.tensor([len(some) for some in kept]))
                owned.append((ids([one for some in kept for one in some]), labels))
            parts.append(Examples.of(owned))
        seen = [one for own in texts.public for one in own][: self.public_windows]
        return parts[0], parts[1], ids(seen) if seen else None

    @property
    def _windows(self) -> Windows:
        return Windows(self.length, self.tokens_per_client, self.test_fraction, self.public_windows)
