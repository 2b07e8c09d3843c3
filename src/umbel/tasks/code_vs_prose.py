"""code_vs_prose: language modelling on clients with Python's library or with Wikipedia (as Wagner et al. 2024).

Even clients mainly have modules of the standard library, odd ones articles of WikiText-2; that is their group.
"specific" clients have one kind, "mixed" ones three windows of it for each of the other's. A module or an
article is divided by nobody.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from umbel.ranges import check_ranges
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.language import Heterogeneity, Windows, parts_of, shares_of
from umbel.tasks.task import Task
from umbel.tasks.texts import articles, modules
from umbel.tasks.tokens import Tokenizer


@dataclass(frozen=True)
class CodeVsProse:
    """Language modelling on clients with Python's library or with Wikipedia."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    clients_per_kind: int = 4
    heterogeneity: Heterogeneity = "specific"
    length: int = 64  # tokens of a window
    tokens_per_client: int = 64_000  # for training, at most; 0 is all there are
    test_fraction: float = 0.2  # of the documents
    public_windows: int = 64  # windows of both kinds that everyone may see; 0 is none
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._windows.check()
        check_ranges(self, clients_per_kind="[1, inf)")

    def load(self, seed: int) -> Task:
        shares = shares_of(2, self.clients_per_kind, self.heterogeneity, paired=True)
        train, test, public = self._windows.of([modules(), articles()], shares, Tokenizer(self.base), seed)
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        group, parts = torch.from_numpy(shares.argmax(1)), parts_of(shares)
        name = f"code_vs_prose/{self.heterogeneity}"
        return Task(name, model, "cross_entropy", train, test, group, public=public, shares=parts)

    @property
    def _windows(self) -> Windows:
        return Windows(self.length, self.tokens_per_client, self.test_fraction, self.public_windows)
