"""Language modelling on documents of several categories: who has which, in windows of some tokens.

Documents are divided first, into the public's, those for testing and those for training, and then dealt to
clients; only then are a client's joined and cut into windows without overlap. So no window is of two parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.tasks.texts import Document, plain
from umbel.tasks.tokens import Tokenizer

Heterogeneity = Literal["specific", "mixed"]
Categories = Sequence[Sequence[Document]]
_CHUNK = 32  # documents that are tokenised at a time


@dataclass(frozen=True)
class Texts:
    """What each client and the public get of the documents."""

    train: list[list[list[Document]]]  # [client][category]: documents
    test: list[list[list[Document]]]
    public: list[list[Document]]  # [category]: documents


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and how many of them there are."""

    length: int
    tokens_per_client: int
    test_fraction: float
    public_windows: int

    def check(self) -> None:
        """Raises RecipeError if the settings make no task."""
        if self.length < 2:
            raise RecipeError("task: length, a window's tokens, must be at least 2")
        if self.tokens_per_client and self.tokens_per_client < 4 * self.length:
            raise RecipeError(
                "task: tokens_per_client must be at least 4 windows of length, or 0 for all there are"
            )
        check_ranges(self, test_fraction="(0, 1)")
        if self.public_windows < 0:
            raise RecipeError("task: public_windows must be at least 1, or 0 for none")

    def of(
        self, categories: Categories, shares: np.ndarray, tokenizer: Tokenizer, seed: int
    ) -> tuple[Examples, Examples, Tensor | None]:
        """The clients' training and test windows, and (P, length) ids that are public.

        Args:
            categories: each one's documents.
            shares: (clients, categories) how many parts of its windows a client has of each category.
            tokenizer: of the base.
            seed: which documents are whose.

        Raises:
            RecipeError: there are too few documents.
        """
        reader = Reader(tokenizer)
        texts = self.divided(categories, shares, reader, seed)
        train = self._examples("train", texts.train, shares, self.tokens_per_client, reader)
        test = self._examples("test", texts.test, shares, self._tested, reader)
        return train, test, self._public(texts.public, reader) if self.public_windows else None

    def divided(
        self, categories: Categories, shares: np.ndarray, reader: "Reader", seed: int, seen_whole: bool = False
    ) -> Texts:
        """The documents by who gets them; those that nobody needs are left out.

        Args:
            categories: each one's documents.
            shares: (clients, categories), see `of`.
            reader: of the base's tokenizer.
            seed: which documents are whose.
            seen_whole: whether the public gets documents and not windows, and therefore so many of them.
        """
        place = _order(categories, seed)
        ordered = [sorted(own, key=lambda document: place[_key(document)]) for own in categories]
        public: list[list[Document]] = [[] for _ in categories]
        if self.public_windows:
            each = -(-self.public_windows // len(categories))
            least = each * self.length + 1
            public = [list(own[:each]) if seen_whole else reader.first(own, least) for own in ordered]
        taken = {_key(document) for own in public for document in own}
        held = _held(place, taken, self.test_fraction)
        used = taken | held
        # Roles say the same lines, and pictures have the same captions: texts are kept apart too.
        shown = {plain(one.text) for own in public for one in own}
        test = [[one for one in own if _key(one) in held and plain(one.text) not in shown] for own in ordered]
        shown |= {plain(one.text) for own in test for one in own}
        train = [[one for one in own if _key(one) not in used and plain(one.text) not in shown] for own in ordered]
        return Texts(
            _dealt(train, shares, self.tokens_per_client, reader),
            _dealt(test, shares, self._tested, reader),
            public,
        )

    @property
    def _tested(self) -> int:
        """A client's tokens for testing, at least those of four windows; 0 is all there are."""
        tested = round(self.tokens_per_client * self.test_fraction / (1 - self.test_fraction))
        return max(4 * self.length, tested) if self.tokens_per_client else 0

    def _public(self, texts: list[list[Document]], reader: "Reader") -> Tensor:
        """(P, length) ids, as many of each category."""
        most = [
            self.public_windows // len(texts) + (at < self.public_windows % len(texts)) for at in range(len(texts))
        ]
        public = torch.cat([self._cut(own, reader)[0][:few] for own, few in zip(texts, most, strict=True)])
        if len(public) < self.public_windows:
            raise RecipeError(f"task: there is text for {len(public)} public_windows only; lower it or length")
        return public

    def _examples(
        self, split: str, texts: list[list[list[Document]]], shares: np.ndarray, tokens: int, reader: "Reader"
    ) -> Examples:
        clients = []
        for client, (own, share) in enumerate(zip(texts, shares.tolist(), strict=True)):
            cut = [self._cut(documents, reader) for documents in own]
            parts = min(len(x) // part for (x, _), part in zip(cut, share, strict=True) if part)
            if tokens:
                parts = min(parts, max(1, tokens // self.length // sum(share)))
            if not parts:
                raise RecipeError(
                    f"task: client {client} has too little text for {split} windows of its categories; lower "
                    f"length, public_windows or the number of clients, or change test_fraction"
                )
            pairs = [(x[: part * parts], y[: part * parts]) for (x, y), part in zip(cut, share, strict=True)]
            clients.append((torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])))
        return Examples.of(clients)

    def _cut(self, documents: Sequence[Document], reader: "Reader") -> tuple[Tensor, Tensor]:
        """(N, length) ids of the documents joined, and for each the one that follows."""
        ids = torch.tensor([one for document in documents for one in reader.ids(document)], dtype=torch.long)
        end = max(len(ids) - 1, 0) // self.length * self.length
        return ids[:end].view(-1, self.length), ids[1 : end + 1].view(-1, self.length)


class Reader:
    """The ids of documents with the end's after each, tokenised at most once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[Document, list[int]] = {}

    def first(self, documents: Sequence[Document], least: int) -> list[Document]:
        """As many of them as have so many ids; all where they have fewer."""
        total, taken = 0, []
        for document, ids in self.each(documents):
            total += len(ids)
            taken.append(document)
            if total >= least:
                break
        return taken

    def each(self, documents: Sequence[Document]) -> Iterator[tuple[Document, list[int]]]:
        """The documents with their ids; those that nobody asks for are not tokenised."""
        for start in range(0, len(documents), _CHUNK):
            chunk = documents[start : start + _CHUNK]
            self._read([document for document in chunk if document not in self._known])
            yield from ((document, self._known[document]) for document in chunk)

    def ids(self, document: Document) -> list[int]:
        """A document's."""
        if document not in self._known:
            self._read([document])
        return self._known[document]

    def _read(self, documents: Sequence[Document]) -> None:
        for document, ids in zip(documents, self._tokenizer.plain([one.text for one in documents]), strict=True):
            self._known[document] = ids + self._tokenizer.end


def shares_of(num_categories: int, per_category: int, heterogeneity: Heterogeneity, paired: bool) -> np.ndarray:
    """(clients, categories) parts of a client's windows: all of category k mod C, or 3 of it and 1 of another.

    Args:
        num_categories: C.
        per_category: clients with the same main category.
        heterogeneity: "specific" is one category a client, "mixed" two.
        paired: a mixed client's other category is its neighbour in the pairs 1-2, 3-4, …; else it is the next.
    """
    main = np.arange(num_categories * per_category) % num_categories
    shares = np.zeros((len(main), num_categories), dtype=np.int64)
    shares[np.arange(len(main)), main] = 1 if heterogeneity == "specific" else 3
    if heterogeneity == "mixed":
        other = main ^ 1 if paired else (main + 1) % num_categories
        shares[np.arange(len(main)), other] = 1
    return shares


def parts_of(shares: np.ndarray) -> Tensor:
    """(clients, categories) float32 D, the part of a client's windows that is of each category."""
    return torch.from_numpy(shares / shares.sum(1, keepdims=True)).float()


def _key(document: Document) -> tuple[str, int]:
    return document.source, document.number


def _order(categories: Categories, seed: int) -> dict[tuple[str, int], int]:
    """Each document's place among those of its source, drawn by the seed; translations have the same."""
    numbers: dict[str, set[int]] = {}
    for document in (one for own in categories for one in own):
        numbers.setdefault(document.source, set()).add(document.number)
    place: dict[tuple[str, int], int] = {}
    for source, own in numbers.items():
        order = torch.randperm(len(own), generator=generator(seed, "documents", source)).tolist()
        place |= {(source, number): at for number, at in zip(sorted(own), order, strict=True)}
    return place


def _held(place: dict[tuple[str, int], int], taken: set[tuple[str, int]], fraction: float) -> set[tuple[str, int]]:
    """The documents for testing: the first `fraction` of each source's that the public has not."""
    rest: dict[str, list[tuple[str, int]]] = {}
    for key in sorted(place.keys() - taken, key=lambda key: (key[0], place[key])):
        rest.setdefault(key[0], []).append(key)
    return {key for own in rest.values() for key in own[: max(1, round(fraction * len(own)))]}


def _dealt(
    categories: list[list[Document]], shares: np.ndarray, tokens: int, reader: Reader
) -> list[list[list[Document]]]:
    """[client][category]: documents, each to the client that has least of the category for its share."""
    dealt: list[list[list[Document]]] = [[[] for _ in categories] for _ in shares]
    whole = shares.sum(1)
    for category, documents in enumerate(categories):
        clients = np.flatnonzero(shares[:, category])
        share = (shares[:, category] / whole)[clients]
        had = np.zeros(len(clients))
        for document, ids in reader.each(documents):
            to = int(np.argmin(had / share))
            if tokens and had[to] > tokens * share[to]:
                break  # they all have enough
            had[to] += len(ids)
            dealt[clients[to]][category].append(document)
    return dealt
