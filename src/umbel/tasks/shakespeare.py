"""shakespeare: next-character prediction, one client for each character of the plays.

What a character says is cut into sequences of 80 letters without overlap; the vocabulary is that of all
plays. The partition is the natural one, so that no hidden groups are known; the seed decides which of a
client's sequences are for testing. Loss and accuracy are means over letters.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.model.nets import CharLSTM, CharTransformer
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.tasks.corpora import Role, shakespeare_by_role
from umbel.tasks.task import Task, split

LENGTH = 80  # letters of a sequence


@dataclass(frozen=True)
class Shakespeare:
    """Next-character prediction on Shakespeare's plays, one client for each of their characters."""

    model: Literal["lstm", "transformer"] = "lstm"
    least_letters: int = 1000  # a character who says less is left out
    num_clients: int = 0  # those who say most; 0 is all
    test_fraction: float = 0.2
    hidden: int = 128  # of a layer of the LSTM, or the transformer's width
    num_layers: int = 2

    def __post_init__(self) -> None:
        if self.least_letters < 2 * LENGTH + 1:
            raise RecipeError(f"task: least_letters must be at least {2 * LENGTH + 1}, for two sequences")
        check_ranges(self, num_clients="[0, inf)", test_fraction="(0, 1)")
        if self.hidden < 4 or self.hidden % 4 or self.num_layers < 1:
            raise RecipeError(
                "task: hidden must be a multiple of 4, the number of heads, and num_layers at least 1"
            )

    def load(self, seed: int) -> Task:
        roles = shakespeare_by_role()
        letters = np.unique(np.concatenate([_code_points(role) for role in roles]))
        chosen = [role for role in roles if len(role.text) >= self.least_letters]
        if not chosen:
            raise RecipeError(f"task: nobody says {self.least_letters} letters; lower least_letters")
        if self.num_clients > len(chosen):
            raise RecipeError(
                f"task: num_clients = {self.num_clients}, but {len(chosen)} roles say {self.least_letters} "
                f"letters; lower one of them (num_clients = 0 takes all)"
            )
        chosen = sorted(chosen, key=lambda role: (-len(role.text), role.name))[: self.num_clients or None]
        train, test = split(Examples.of([_sequences(role, letters) for role in chosen]), self.test_fraction, seed)
        with seeded(seed, "model"):
            if self.model == "lstm":
                model: torch.nn.Module = CharLSTM(len(letters), hidden=self.hidden, num_layers=self.num_layers)
            else:
                model = CharTransformer(len(letters), LENGTH, self.hidden, self.num_layers)
        return Task(f"shakespeare/{self.model}", model, "cross_entropy", train, test)


def _code_points(role: Role) -> np.ndarray:
    return np.frombuffer(role.text.encode("utf-32-le"), dtype="<u4")


def _sequences(role: Role, letters: np.ndarray) -> tuple[Tensor, Tensor]:
    """(N, 80) letters by their number in the vocabulary, and for each the one that follows."""
    text = torch.from_numpy(np.searchsorted(letters, _code_points(role)))
    end = (len(text) - 1) // LENGTH * LENGTH
    return text[:end].view(-1, LENGTH), text[1 : end + 1].view(-1, LENGTH)
