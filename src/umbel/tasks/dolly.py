"""dolly: following instructions, ten holders with slots of the eight categories of Dolly (as FL-TAC, Ping 2024).

A slot is what a holder has of a category and counts as a client; `owner` and `group` say whose and which. Of
each category's instructions a part is held back for testing, the same for all its slots; no context and no
instruction of that part is trained on in any category. Loss and accuracy are over the response's tokens only.

A prompt that is too long is cut at its front, where the context is, so that its instruction stays as far as there
is room; of a response that is too long the end is cut. At length 256 the small tokenizer of stories260K cuts 4,844
of the 14,824 prompts, 4,316 of them with a context, 579 within the instruction, and 5,823 responses.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from umbel.errors import RecipeError
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.slots import Holders, Labelled, held
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
Pair = tuple[str, str]  # a prompt and its response
_ASKED = "### Instruction:\n"


@dataclass(frozen=True)
class Dolly:
    """Following instructions: ten holders with slots of the eight categories of Dolly."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    categories: tuple[Category, ...] = get_args(Category)
    num_holders: int = 10
    alpha: float = 0.5  # of the Dirichlet distribution; higher is more even
    least_examples: int = 8  # of a slot, for training
    train_examples: int = 0  # of a category, for all its slots together; 0 is all
    test_fraction: float = 0.1  # of each category
    test_examples: int = 200  # of a category at most, for each of its slots; 0 is no such limit
    length: int = 256  # tokens of an instruction with its response; what is longer is cut
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._holders.check()
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise RecipeError("task: categories must be at least one, each named once")
        check_ranges(self, test_fraction="(0, 1)", train_examples="[0, inf)", length="[4, inf)")

    def load(self, seed: int) -> Task:
        tokenizer = Tokenizer(self.base)
        trained, tested = divided(by_category(), self.test_fraction, seed)

        def read(of: dict[str, list[Pair]], most: int) -> list[Labelled]:
            for category in self.categories:
                if not of[category]:
                    raise RecipeError(
                        f"task: test_fraction {self.test_fraction} leaves a part of {category} empty"
                    )
            return [tokenizer.answered(of[category][: most or None], self.length) for category in self.categories]

        slots = self._holders.of(read(trained, self.train_examples), read(tested, 0), seed)
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        return Task("dolly", model, "cross_entropy", slots.train, slots.test, slots.group, owner=slots.owner)

    @property
    def _holders(self) -> Holders:
        return Holders(self.num_holders, self.alpha, self.least_examples, self.test_examples)


def divided(
    instructions: dict[str, list[Pair]], fraction: float, seed: int
) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """What is for training and for testing of each category, in an order drawn by the seed.

    The test parts are `fraction` of each category; they share no context or instruction with any training part.
    """
    kinds = [category for category, own in instructions.items() for _ in own]
    pairs = [pair for own in instructions.values() for pair in own]
    rows = set(held([_parts(prompt) for prompt, _ in pairs], kinds, fraction, seed, "dolly", "split"))
    train: dict[str, list[Pair]] = {category: [] for category in instructions}
    test: dict[str, list[Pair]] = {category: [] for category in instructions}
    for row in torch.randperm(len(pairs), generator=generator(seed, "dolly", "order")).tolist():
        (test if row in rows else train)[kinds[row]].append(pairs[row])
    return train, test


def by_category() -> dict[str, list[Pair]]:
    """Dolly (Conover et al. 2023): 14,824 prompts with responses written by people, by category.

    Of its 15,011 rows those are left out whose prompt an earlier one has.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    names = ("category", "context", "instruction", "response")
    columns = rows("dolly15k", names, Hub("databricks/databricks-dolly-15k"))
    read: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    for category, context, instruction, response in zip(*(columns[name] for name in names), strict=True):
        above = f"### Context:\n{context}\n\n" if context else ""
        prompt = f"{above}{_ASKED}{instruction}\n\n### Response:\n"
        if prompt not in seen:
            seen.add(prompt)
            read.setdefault(category, []).append((prompt, response))
    return read


def _parts(prompt: str) -> list[str]:
    """A prompt's context, if it has one, and its instruction, whatever the spaces in them."""
    return [" ".join(part.split()) for part in prompt.partition(_ASKED)[::2] if part]
