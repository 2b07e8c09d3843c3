"""shakespeare_roles: language modelling in tokens, one client for each of the greatest roles of the plays.

A speech is for training, for testing or public as a whole. The partition is the natural one, so that no hidden
groups are known; the `shakespeare` task has the same roles letter by letter.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from umbel.errors import RecipeError
from umbel.ranges import check_ranges
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.language import Windows
from umbel.tasks.task import Task
from umbel.tasks.texts import speeches
from umbel.tasks.tokens import Tokenizer


@dataclass(frozen=True)
class ShakespeareRoles:
    """Language modelling in tokens, one client for each of the greatest roles of Shakespeare's plays."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    num_clients: int = 20  # the roles that say most
    length: int = 64  # tokens of a window
    tokens_per_client: int = 0  # for training, at most; 0 is all there are
    test_fraction: float = 0.2  # of the speeches
    public_windows: int = 64  # windows of all roles that everyone may see; 0 is none
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._windows.check()
        check_ranges(self, num_clients="[1, inf)")

    def load(self, seed: int) -> Task:
        roles = speeches()[: self.num_clients]
        if len(roles) < self.num_clients:
            raise RecipeError(f"task: there are {len(roles)} roles; lower num_clients")
        shares = np.eye(len(roles), dtype=np.int64)
        train, test, public = self._windows.of(roles, shares, Tokenizer(self.base), seed)
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        return Task("shakespeare_roles", model, "cross_entropy", train, test, public=public)

    @property
    def _windows(self) -> Windows:
        return Windows(self.length, self.tokens_per_client, self.test_fraction, self.public_windows)
