"""dolly: following instructions, ten holders with slots of the eight categories of Dolly (as FL-TAC, Ping 2024).

A slot is what a holder has of a category and counts as a client; `owner` and `group` say whose and which. Of
each category's instructions a part is held back for testing, the same for all its slots. Loss and accuracy are
over the response's tokens only: what comes before it, and padding, count nothing.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from umbel.errors import RecipeError
from umbel.seeds import generator
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.slots import Holders, Labelled
from umbel.tasks.task import Task
from umbel.tasks.texts import Hub, rows
from umbel.tasks.tokens import Tokenizer

Category = Literal[
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
]


@dataclass(frozen=True)
class Dolly:
    """Following instructions: ten holders with slots of the eight categories of Dolly."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    categories: tuple[Category, ...] = (
        "brainstorming",
        "classification",
        "closed_qa",
        "creative_writing",
        "general_qa",
        "information_extraction",
        "open_qa",
        "summarization",
    )
    num_holders: int = 10
    alpha: float = 0.5  # of the Dirichlet distribution; higher is more even
    least_examples: int = 8  # of a slot, for training
    train_examples: int = 0  # of a category, for all its slots together; 0 is all
    test_fraction: float = 0.1  # of each category
    test_examples: int = 200  # of a category at most, for each of its slots; 0 is no such limit
    length: int = 256  # tokens of an instruction with its response; what is longer is cut
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base, on a GPU

    def __post_init__(self) -> None:
        self._holders.check()
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise RecipeError("task: categories must be at least one, each named once")
        if not 0 < self.test_fraction < 1:
            raise RecipeError("task: test_fraction must be between 0 and 1")
        if self.train_examples < 0:
            raise RecipeError("task: train_examples must be at least 1, or 0 for all")
        if self.length < 4:
            raise RecipeError("task: length, the tokens of an instruction with its response, must be at least 4")

    def load(self, seed: int) -> Task:
        tokenizer, instructions = Tokenizer(self.base), by_category()
        train: list[Labelled] = []
        test: list[Labelled] = []
        for category in self.categories:
            count = len(instructions[category])
            order = torch.randperm(count, generator=generator(seed, "held", category)).tolist()
            cut = max(1, round(self.test_fraction * count))
            for part, drawn in ((test, order[:cut]), (train, order[cut:][: self.train_examples or None])):
                own = [instructions[category][row] for row in drawn]
                part.append(tokenizer.answered(own, self.length))
        slots = self._holders.of(train, test, seed)
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        return Task("dolly", model, "cross_entropy", slots.train, slots.test, slots.group, owner=slots.owner)

    @property
    def _holders(self) -> Holders:
        return Holders(self.num_holders, self.alpha, self.least_examples, self.test_examples)


def by_category() -> dict[str, list[tuple[str, str]]]:
    """Dolly (Conover et al. 2023): 14,996 prompts with responses written by people, by category.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    names = ("category", "context", "instruction", "response")
    columns = rows("dolly15k", names, Hub("databricks/databricks-dolly-15k"))
    read: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for category, context, instruction, response in zip(*(columns[name] for name in names), strict=True):
        above = f"### Context:\n{context}\n\n" if context else ""
        prompt = f"{above}### Instruction:\n{instruction}\n\n### Response:\n"
        if prompt not in seen:
            seen.add(prompt)
            read.setdefault(category, []).append((prompt, response))
    return read
