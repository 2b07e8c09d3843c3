"""flan_feddpa: following instructions, eight clients with a task of FLAN each (FedDPA, Yang et al. 2024).

Each client has 300 instructions for training and 200 for testing; set 1 has coreference, entailment, linguistic
acceptability, paraphrase, question classification, structure to text, text formatting and word sense, set 2
common sense, entailment, open-domain questions, paraphrase, reading comprehension, sentiment, summarisation and
text formatting. Seven test questions of reading comprehension are about a passage that a training question has
too; those are left out. Loss and accuracy are over the answer's tokens only.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from umbel.clients import Examples
from umbel.ranges import check_ranges
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.task import Task
from umbel.tasks.texts import plain, rows
from umbel.tasks.tokens import Tokenizer

PASSAGE = 150  # characters of a line that is one; the tasks' own phrases are shorter


@dataclass(frozen=True)
class FlanFedDPA:
    """Following instructions: eight clients with a task of FLAN each."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    set: Literal[1, 2] = 1  # which eight tasks
    length: int = 256  # tokens of an instruction with its answer; what is longer is cut
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        check_ranges(self, length="[4, inf)")

    def load(self, seed: int) -> Task:
        tokenizer, parts = Tokenizer(self.base), []
        for tasks in by_task(self.set):
            parts.append(Examples.of([tokenizer.answered(tasks[name], self.length) for name in sorted(tasks)]))
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        group = torch.arange(parts[0].num_clients)
        return Task(f"flan_feddpa/{self.set}", model, "cross_entropy", parts[0], parts[1], group)


def by_task(set: int) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[tuple[str, str]]]]:
    """The prompts and answers of each task, for training and for testing; no passage is in both.

    Raises:
        DataError: they are not in the folder.
    """
    names = ("split", "category", "instruction", "output")
    columns = rows("feddpa_flan", names, only={"dataset": set})
    train: dict[str, list[tuple[str, str]]] = {}
    test: dict[str, list[tuple[str, str]]] = {}
    for split, category, instruction, output in zip(*(columns[name] for name in names), strict=True):
        of = train if split == "train" else test
        of.setdefault(category, []).append((f"{instruction}\n", output))
    seen = {name: {line for prompt, _ in pairs for line in _passages(prompt)} for name, pairs in train.items()}
    return train, {
        name: [pair for pair in pairs if not _passages(pair[0]) & seen[name]] for name, pairs in test.items()
    }


def _passages(prompt: str) -> set[str]:
    return {plain(line) for line in prompt.splitlines() if len(line) >= PASSAGE}
