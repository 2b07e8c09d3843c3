"""multilingual: language modelling on clients that write in different languages (as Wagner et al. 2024).

"captions" are every second one of Multi30k's (de, en, fr, cs); "paragraphs" are XQuAD's, of Wikipedia, in twelve
languages; "verses" are Genesis' (de, en, fr), "declaration" is that of human rights, in fifteen languages, Italian
among them, but of some thousand tokens each; of these two every second fiftieth.
Client k mainly has the language k mod L, its group. "specific" clients have one language; "mixed" ones have three
windows of it for each of the next language's. Translations of what anyone is tested on, or of what is
public, are nobody's training text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from umbel.errors import RecipeError
from umbel.ranges import check_ranges
from umbel.tasks.bases import Precision, load_pretrained
from umbel.tasks.language import Heterogeneity, Windows, parts_of, shares_of
from umbel.tasks.task import Task
from umbel.tasks.texts import (
    CAPTION_LANGUAGES,
    DECLARATION_CODES,
    PARAGRAPH_LANGUAGES,
    VERSE_VERSIONS,
    Document,
    captions,
    declaration,
    paragraphs,
    verses,
)
from umbel.tasks.tokens import Tokenizer

Text = Literal["captions", "paragraphs", "verses", "declaration"]
LANGUAGES: dict[Text, tuple[str, ...]] = {
    "captions": CAPTION_LANGUAGES,
    "paragraphs": PARAGRAPH_LANGUAGES,
    "verses": tuple(VERSE_VERSIONS),
    "declaration": tuple(DECLARATION_CODES),
}
READ: dict[Text, Callable[[str], tuple[Document, ...]]] = {
    "captions": captions,
    "paragraphs": paragraphs,
    "verses": verses,
    "declaration": declaration,
}


@dataclass(frozen=True)
class Multilingual:
    """Language modelling on clients that write in different languages."""

    base: str = "models/stories260K"  # a folder, one in UMBEL_DATA, or a hub id
    text: Text = "captions"
    languages: tuple[str, ...] = ("de", "fr", "cs")
    clients_per_language: int = 3
    heterogeneity: Heterogeneity = "specific"
    length: int = 64  # tokens of a window
    tokens_per_client: int = 64_000  # for training, at most; 0 is all there are
    test_fraction: float = 0.2  # of the documents
    public_windows: int = 64  # windows of all languages that everyone may see; 0 is none
    precision: Precision = "float32"  # of the base
    bits: Literal[0, 4, 8] = 0  # 4 or 8 quantise the base (bitsandbytes)

    def __post_init__(self) -> None:
        self._windows.check()
        known = LANGUAGES[self.text]
        unknown = [language for language in self.languages if language not in known]
        if unknown:
            raise RecipeError(
                f"task: there are no {self.text} in {unknown[0]!r}; languages are {', '.join(known)}"
            )
        least = 2 if self.heterogeneity == "mixed" else 1
        if len(set(self.languages)) < max(least, len(self.languages)):
            raise RecipeError("task: languages must be named once each, one at least, and two for mixed clients")
        check_ranges(self, clients_per_language="[1, inf)")

    def load(self, seed: int) -> Task:
        shares = shares_of(len(self.languages), self.clients_per_language, self.heterogeneity, paired=False)
        categories = [own_documents(self.text, language) for language in self.languages]
        train, test, public = self._windows.of(categories, shares, Tokenizer(self.base), seed)
        model = load_pretrained(self.base, "causal_lm", precision=self.precision, bits=self.bits)
        group, parts = torch.from_numpy(shares.argmax(1)), parts_of(shares)
        name = f"multilingual/{self.heterogeneity}"
        return Task(name, model, "cross_entropy", train, test, group, public=public, shares=parts)

    @property
    def _windows(self) -> Windows:
        return Windows(self.length, self.tokens_per_client, self.test_fraction, self.public_windows)


def own_documents(text: Text, language: str) -> tuple[Document, ...]:
    """The documents of a language that this task uses: those with an odd number, but all paragraphs."""
    return tuple(one for one in READ[text](language) if one.number % 2 or text == "paragraphs")
