"""glue: sentence classification, ten holders with slots of five tasks of GLUE (as FL-TAC, Ping et al. 2024).

A slot is what a holder has of a task and counts as a client; `owner` and `group` say whose and which. Shares of
a task are drawn from a Dirichlet distribution, and those below one per cent (or, with more than ten holders, a
tenth of an even share) or `least_examples` go to others.
Every slot is tested on the same part of its task's development set, and no sentence of that set is trained on.
Every task has two labels of its own in one head, task t's are 2 t and 2 t + 1, for what is 1 of one task is not
1 of another. With `heads = "own"` only the two of a text's own task are told apart, in training and in tests, and
nobody has to learn which task it is of. Of QNLI the data folder has the development set only: a fifth of it, drawn
by the seed, is for testing. A base like BERT is told which sentence of a pair a token is of (token_type_ids).

`embedded = true` is for machines without a GPU: the base stays as it is, each sentence passes it once, and what
is adapted is one layer on top (vectors.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from umbel.errors import DataError, RecipeError
from umbel.model.pretrained import Pooling, of_pairs
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.slots import Holders, held
from umbel.tasks.task import Task
from umbel.tasks.texts import Hub, from_hub, plain, rows
from umbel.tasks.tokens import Tokenizer
from umbel.tasks.vectors import classifier, vectors

Name = Literal["cola", "mrpc", "qnli", "rte", "sst2"]
ON_HUB: dict[Name, tuple[str, ...]] = {  # the columns of sentences
    "cola": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
}


@dataclass(frozen=True)
class Sentences:
    """Sentences, or pairs of them, with their labels, 0 or 1."""

    first: Sequence[str]
    second: Sequence[str]  # empty strings where there is but one
    label: Sequence[int]

    def of(self, rows: Sequence[int]) -> "Sentences":
        """Some of them."""
        first, second = [self.first[row] for row in rows], [self.second[row] for row in rows]
        return Sentences(first, second, [self.label[row] for row in rows])


@dataclass(frozen=True)
class GLUE:
    """Sentence classification: ten holders with slots of five tasks of GLUE."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    tasks: tuple[Name, ...] = ("sst2", "mrpc", "rte", "cola", "qnli")
    num_holders: int = 10
    alpha: float = 0.5  # of the Dirichlet distribution; higher is more even
    least_examples: int = 8  # of a slot, for training
    train_examples: int = 0  # of a task, for all its slots together; 0 is all
    test_examples: int = 200  # of a task, for each of its slots; 0 is all
    length: int = 64  # tokens of a sentence or pair, at most
    pooling: Pooling = "own"  # a head sees the base's pooler, the mean of states, or those of both texts
    embedded: bool = False  # texts pass the base once, and a small model is trained on what comes out
    heads: Literal["one", "own"] = "one"  # a text is told apart among all tasks' labels, or among its own task's
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._holders.check()
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise RecipeError("task: tasks must be at least one, each named once")
        check_ranges(self, length="[4, inf)", train_examples="[0, inf)")
        if self.embedded and (self.bits or self.pooling == "pairs"):
            raise RecipeError(
                "task: embedded texts pass the base once, alone; leave bits at 0, and pooling at 'own'"
            )

    def load(self, seed: int) -> Task:
        parts = []
        for name in self.tasks:
            trained, tested = _split(name, seed)
            parts.append(trained.of(_drawn(trained, self.train_examples, seed, name, "train")))
            parts.append(tested.of(_drawn(tested, self.test_examples, seed, name, "test")))
        model, x = self._on_vectors(parts, seed) if self.embedded else self._on_ids(parts, seed)
        labels = [torch.tensor(part.label) + 2 * (place // 2) for place, part in enumerate(parts)]
        read = list(zip(x, labels, strict=True))
        slots = self._holders.of(read[::2], read[1::2], seed)
        each, own = 2 if self.heads == "own" else 0, slots.owner
        return Task(
            "glue", model, "cross_entropy", slots.train, slots.test, slots.group, owner=own, labels_each=each
        )

    def _on_ids(self, parts: Sequence[Sentences], seed: int) -> tuple[nn.Module, list[Tensor]]:
        """The base, and the token ids of what is read."""
        model = load_pretrained(
            self.base, "text", 2 * len(self.tasks), seed, self.precision, self.bits, self.pooling
        )
        tokenizer = Tokenizer(self.base)
        model.separate(tokenizer.separator)
        read = tokenizer.apart if self.pooling == "pairs" else tokenizer.padded
        return model, [
            read(part.first, part.second if any(part.second) else [], self.length, model.pad_id) for part in parts
        ]

    def _on_vectors(self, parts: Sequence[Sentences], seed: int) -> tuple[nn.Module, list[Tensor]]:
        """A small model, and the vectors of what is read."""
        texts = [text for part in parts for text in (*part.first, *part.second)]
        found = vectors(texts, self.base, self.length, self.precision, self.pooling)
        each = found.split([len(part.label) for part in parts for _ in range(2)])
        x = [of_pairs(*pair) for pair in zip(each[::2], each[1::2], strict=True)]
        return classifier(x[0].shape[1], 2 * len(self.tasks), seed), x

    @property
    def _holders(self) -> Holders:
        return Holders(self.num_holders, self.alpha, self.least_examples, self.test_examples)


def sentences(name: Name) -> tuple[Sentences, Sentences]:
    """A task of GLUE (Wang et al. 2018): its training and its development set.

    The folder has no training set of QNLI: the first is empty.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    try:
        found = rows("glue", ("sentence1", "sentence2", "label", "split"), only={"task": name})
    except DataError as missing:
        train, test = (_from_hub(name, split, missing) for split in ("train", "validation"))
        return train, test
    whole = Sentences(found["sentence1"], found["sentence2"], [int(label) for label in found["label"]])
    train, test = (
        whole.of([row for row, own in enumerate(found["split"]) if own == split]) for split in ("train", "dev")
    )
    return train, test


def _from_hub(name: Name, split: str, missing: DataError) -> Sentences:
    columns = ON_HUB[name]
    found = from_hub(Hub("nyu-mll/glue", name, (split,)), (*columns, "label"), missing)
    first = found[columns[0]]
    return Sentences(first, found[columns[1]] if len(columns) > 1 else [""] * len(first), found["label"])


def _split(name: Name, seed: int) -> tuple[Sentences, Sentences]:
    """What is for training and for testing; no sentence is in both, whatever its capitals, as some of GLUE's."""
    train, test = sentences(name)
    if train.label:
        known = {plain(one) for one in (*test.first, *test.second)} - {""}
        pairs = enumerate(zip(map(plain, train.first), map(plain, train.second), strict=True))
        return train.of([row for row, pair in pairs if known.isdisjoint(pair)]), test
    keys = [
        (f"first {plain(one)}", f"second {plain(two)}") for one, two in zip(test.first, test.second, strict=True)
    ]
    tested = held(keys, [name] * len(keys), 1 / 5, seed, "glue", name, "split")
    return test.of(sorted(set(range(len(keys))).difference(tested))), test.of(tested)


def _drawn(of: Sentences, most: int, seed: int, *path: str) -> list[int]:
    """`most` of their rows (0: all) in an order drawn by the seed."""
    order: list[int] = torch.randperm(len(of.label), generator=generator(seed, "glue", *path)).tolist()
    return order[: most or None]
