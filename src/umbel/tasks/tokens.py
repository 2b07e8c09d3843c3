"""Texts → token ids by a base's own tokenizer, padded on the right."""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from umbel.model.loss import IGNORED
from umbel.tasks.bases import NO_CODE, place_of, reading


class Tokenizer:
    """The tokenizer that belongs to a base: a folder, one in UMBEL_DATA, or a hub id.

    Raises:
        DataError: there is none.
    """

    def __init__(self, base: str) -> None:
        import transformers

        with reading(base, "tokenizer"):
            self._own: Any = transformers.AutoTokenizer.from_pretrained(place_of(base), **NO_CODE)
        begin = self._own.bos_token_id
        self.begin: list[int] = (
            [] if begin is None or begin not in self._own("a")["input_ids"][:1] else [int(begin)]
        )
        self.end: list[int] = [] if self._own.eos_token_id is None else [int(self._own.eos_token_id)]

    @property
    def digest(self) -> bytes:
        """Tells tokenizers apart by how they split texts."""
        if self._own.is_fast:
            kept = json.loads(self._own.backend_tokenizer.to_str())
            told: Any = {part: of for part, of in kept.items() if part not in ("truncation", "padding")}
        else:
            told = [type(self._own).__name__, self._own.get_vocab()]
        return sha256(json.dumps(told, sort_keys=True).encode()).digest()

    @property
    def separator(self) -> int:
        """The id that ends a pair's first text, where the second's tokens are of another type; −1 elsewhere."""
        read = self._own("a", "a", return_token_type_ids=True)
        separator, ids = self._own.sep_token_id, read["input_ids"]
        if separator not in ids:
            return -1
        first = ids.index(separator) + 1
        types = [0] * first + [1] * (len(ids) - first)
        return int(separator) if list(read.get("token_type_ids", [])) == types else -1

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, nothing added."""
        if not texts:
            return []
        ids: list[list[int]] = self._own(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def padded(self, first: Sequence[str], second: Sequence[str], length: int, pad: int) -> Tensor:
        """(N, length) ids of texts, or of pairs of them where `second` is not empty, cut at `length`.

        A pair is joined as the tokenizer joins pairs; one that has nothing to put between them gets a new line.
        """
        pairs = list(second)
        if self._own.sep_token_id is None:
            pairs = [f"\n{text}" for text in second]
        read = self._own(list(first), pairs or None, truncation=True, max_length=length, verbose=False)
        x = torch.full((len(first), length), pad)
        for row, own in zip(x, read["input_ids"], strict=True):
            row[: len(own)] = torch.tensor(own)
        return x

    def apart(self, first: Sequence[str], second: Sequence[str], length: int, pad: int) -> Tensor:
        """(N, length) ids of texts, or of pairs where `second` is not empty, each text as it is when it is alone.

        Of a pair that is too long the longer text is cut, or both at half of `length`; what ends a text stays.
        """
        x = torch.full((len(first), length), pad)
        others = [own if text else [] for own, text in zip(self._alone(second), second, strict=True)]
        for row, one, two in zip(x, self._alone(first), others or [[]] * len(first), strict=True):
            kept = _cut(one, max(length // 2, length - len(two)) if two else length)
            ids = kept + _cut(two, length - len(kept))
            row[: len(ids)] = torch.tensor(ids)
        return x

    def _alone(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids with what the tokenizer adds to it."""
        ids: list[list[int]] = self._own(list(texts), verbose=False)["input_ids"] if texts else []
        return ids

    def answered(self, pairs: Sequence[tuple[str, str]], length: int) -> tuple[Tensor, Tensor]:
        """(N, length) ids of prompts with their answers, and for each place the id that follows.

        What follows counts if it is the answer's or the end's; elsewhere, padding included, it is IGNORED. Of an
        answer the first half of `length` is kept if it is longer; of a prompt its end, so far as there is room. In
        front is what the tokenizer puts there itself, as Llama's does: who uses the adapter will have it there.
        """
        x = torch.zeros(len(pairs), length, dtype=torch.long)
        y = torch.full_like(x, IGNORED)
        prompts, answers = (self.plain(texts) for texts in zip(*pairs, strict=True))
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            room = max(length // 2, length + 1 - len(self.begin) - len(prompt))
            said = (answer + self.end)[: min(room, length)]
            kept = length + 1 - len(self.begin) - len(said)
            given = self.begin + prompt[max(0, len(prompt) - kept) :] or [0]
            ids = torch.tensor(given + said)
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, len(given) - 1 : len(ids) - 1] = ids[len(given) :]
        return x, y


def _cut(ids: list[int], most: int) -> list[int]:
    """So many of a text's ids at most, the last one among them."""
    return ids if len(ids) <= most else ids[: most - 1] + ids[-1:]
