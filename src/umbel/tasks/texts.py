"""Public texts as documents, read from files of the data folder or from the Hugging Face hub.

A document is trained on, tested on or shown to everyone as a whole. Of parallel texts the translations have the
same number, so that what one client is tested on is in nobody's training text in any language. Nothing is
there twice in one category: of equal texts the first is kept.
"""

import lzma
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from itertools import accumulate
from pathlib import Path
from typing import Any

from umbel.errors import DataError
from umbel.tasks.corpora import data_folder, hub_split, readable, shakespeare_by_speech

CAPTION_LANGUAGES = ("cs", "de", "en", "fr")
PARAGRAPH_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
VERSE_VERSIONS = {"de": "Luther", "en": "King James", "fr": "Louis Segond 1910"}  # of Genesis
DECLARATION_CODES = {  # of languages, in the file
    **{"cs": "ces", "de": "deu", "el": "ell_monotonic", "en": "eng", "es": "spa", "fr": "fra", "it": "ita"},
    **{"nl": "nld", "pl": "pol", "pt": "por_PT", "ro": "ron", "ru": "rus", "sv": "swe", "tr": "tur", "vi": "vie"},
}
CLASSES = ("World", "Sports", "Business", "Sci/Tech")  # of AG News
_ARTICLE = 5  # paragraphs of XQuAD
_PARTS = 50  # of a text whose translations are told apart by how far into it a line is: Genesis' chapters
_NO_LIBRARY = ("encodings", "ensurepip", "idlelib", "lib2to3", "test", "turtledemo")  # beside Python's modules
_TITLE = re.compile(r"^ = (?!=)(.+[^=]) = $", re.MULTILINE)  # of an article of WikiText
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Document:
    """A text that is not divided."""

    source: str  # documents of one source are divided together
    number: int  # the same for translations, and for parts of one article
    text: str


@dataclass(frozen=True)
class Hub:
    """Where the Hugging Face hub has a data set: its name, its configuration and the splits that are wanted."""

    name: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)


def captions(language: str) -> tuple[Document, ...]:
    """Multi30k (Elliott et al. 2016): 31,014 captions of photographs in each of four languages, parallel.

    Raises:
        DataError: it is neither in the folder nor, in English and German, to be had from the hub.
    """
    hub = Hub("bentrevett/multi30k", splits=("train", "validation", "test"))
    return _documents("multi30k", enumerate(rows("multi30k", [language], hub)[language]))


def paragraphs(language: str) -> tuple[Document, ...]:
    """XQuAD (Artetxe et al. 2020): 240 paragraphs of 48 articles of Wikipedia in each of 12 languages, parallel.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    hub = Hub("google/xquad", f"xquad.{language}", ("validation",))
    columns = rows("xquad_contexts", ["context"], hub, {"lang": language})
    texts = dict.fromkeys(columns["context"])  # the hub tells a paragraph once for each question
    return _documents("xquad", ((place // _ARTICLE, text) for place, text in enumerate(texts)))


def verses(language: str) -> tuple[Document, ...]:
    """Genesis in three languages, a verse or line a document; its parts, one fiftieth each, are parallel.

    Raises:
        DataError: it is not in the folder.
    """
    name, only = "genesis_en_fr_de_sv", {"lang": language, "version": VERSE_VERSIONS[language]}
    return _in_parts("genesis", _some(name, rows(name, ["text"], only=only)["text"], language))


def declaration(language: str) -> tuple[Document, ...]:
    """The Universal Declaration of Human Rights in 15 languages, a line a document; its fiftieths are parallel.

    Raises:
        DataError: it is not in the folder.
    """
    found = _some("udhr", rows("udhr", ["text"], only={"code": DECLARATION_CODES[language]})["text"], language)
    return _in_parts("udhr", "\n".join(found).split("\n"))


def articles() -> tuple[Document, ...]:
    """WikiText-2 (Merity et al. 2016), its validation and test set: 122 articles of Wikipedia.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    files = [data_folder() / "text" / f"wikitext2_{split}.txt.xz" for split in ("valid", "test")]
    if all(file.is_file() for file in files):
        text = "\n".join(_unpacked(file) for file in files)
    else:
        hub = Hub("Salesforce/wikitext", "wikitext-2-v1", ("validation", "test"))
        text = "".join(from_hub(hub, ["text"], _missing(files[0]))["text"])
    starts = [match.start() for match in _TITLE.finditer(text)]
    cut = zip(starts, [*starts[1:], len(text)], strict=True)
    return _documents("wikitext2", enumerate(text[start:end].strip() for start, end in cut))


def _unpacked(file: Path) -> str:
    with readable(file):
        return lzma.decompress(file.read_bytes()).decode()


def modules() -> tuple[Document, ...]:
    """Modules of Python's standard library, 293 of CPython 3.11.7; without the file those of the Python that runs.

    They have 2,000 to 60,000 characters, and are no tests, codecs, demos or programs that come with it.

    Raises:
        DataError: neither is there.
    """
    name = "python_stdlib_code"
    path = data_folder() / "text" / f"{name}.parquet"
    texts = rows(name, ["code"])["code"] if path.is_file() else _own_library(path)
    return _documents("python", enumerate(texts))


def _own_library(path: Path) -> list[str]:
    """The file's texts, from the standard library of the Python that runs."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = (own for own in library.glob("*") if own.name.isidentifier() and own.name not in _NO_LIBRARY)
    files = [file for folder in (library, *folders) for file in folder.glob("*.py")]
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    texts = [file.read_text(errors="replace") for file in sorted(files, key=Path.as_posix)]
    if not texts:
        raise DataError(f"{_missing(path)}; this Python has no sources of its library at {library}")
    return [text for text in texts if 2000 <= len(text) <= 60_000]


def news() -> tuple[tuple[Document, ...], ...]:
    """AG News (Zhang et al. 2015): title and beginning of news by their class, of which there are four.

    The folder has 17,591 of them, the hub all 127,600.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    try:
        columns = rows("ag_news", ["label", "title", "text"])
    except DataError as missing:
        columns = from_hub(Hub("fancyzhx/ag_news", splits=("train", "test")), ["label", "text"], missing)
    titles = columns.get("title") or [""] * len(columns["text"])
    texts = [f"{title}\n{text}" if title else text for title, text in zip(titles, columns["text"], strict=True)]
    first: dict[str, int] = {}  # news that is there under two titles has one number
    numbers = [first.setdefault(text, place) for place, text in enumerate(columns["text"])]
    numbered = list(zip(numbers, columns["label"], texts, strict=True))
    return tuple(
        _documents(name, ((number, text) for number, own, text in numbered if own == label))
        for label, name in enumerate(CLASSES)
    )


def speeches() -> tuple[tuple[Document, ...], ...]:
    """What each character of Shakespeare's plays says, a speech a document; who says most comes first.

    Raises:
        DataError: it is not in the folder.
    """
    roles = sorted(shakespeare_by_speech(), key=lambda role: (-len(role.text), role.name))
    return tuple(_documents(role.name, enumerate(role.text.split("\n"))) for role in roles)


def rows(
    name: str, columns: Sequence[str], hub: Hub | None = None, only: Mapping[str, Any] | None = None
) -> Columns:
    """Columns of a parquet file of the folder's `text`, or of the hub's data set where it is not there.

    Args:
        name: the file's, without ".parquet".
        columns: their names, in both places.
        hub: None where the hub does not have it.
        only: which of the file's rows, by their value in other columns.

    Raises:
        DataError: it is in neither place, or cannot be read.
    """
    path = data_folder() / "text" / f"{name}.parquet"
    if not path.is_file():
        if hub is None:
            raise _missing(path)
        return from_hub(hub, columns, _missing(path))
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read: pip install umbel[data]") from error
    filters = [(key, "==", value) for key, value in (only or {}).items()] or None
    with readable(path):
        found: Columns = parquet.read_table(path, columns=list(columns), filters=filters).to_pydict()
        return {column: found[column] for column in columns}


def from_hub(hub: Hub, columns: Sequence[str], missing: DataError) -> Columns:
    """Columns of a data set of the hub, one split after the other.

    Args:
        hub: which, and which splits.
        columns: their names.
        missing: why the hub is asked.

    Raises:
        DataError: `datasets` is not installed, the hub cannot be reached, or it has no such data.
    """
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for split in hub.splits:
        part = hub_split(hub.name, hub.config, split, missing)
        try:
            for name in columns:
                found[name] += list(part[name])
        except KeyError as error:
            raise DataError(f"{missing}; nor has {hub.name} on the Hugging Face hub: {error}") from error
    return found


def plain(text: str) -> str:
    """The text, whatever the spaces and capitals in it."""
    return " ".join(text.casefold().split())


def _missing(path: Path) -> DataError:
    return DataError(
        f"text/{path.name} not in the data folder {data_folder()}; set UMBEL_DATA to the folder that has it"
    )


def _some(name: str, found: Sequence[str], language: str) -> Sequence[str]:
    if not found:
        raise DataError(f"text/{name}.parquet in the data folder {data_folder()} has nothing in {language!r}")
    return found


def _in_parts(source: str, lines: Sequence[str]) -> tuple[Document, ...]:
    """The lines, numbered by the part of the whole text that each one ends in."""
    plain = [unescape(line).strip() for line in lines]
    ends = list(accumulate(map(len, plain)))
    parts = (_PARTS * (end - 1) // ends[-1] for end in ends)
    return _documents(source, zip(parts, plain, strict=True))


def _documents(source: str, numbered: Iterable[tuple[int, str]]) -> tuple[Document, ...]:
    """The documents without empty ones, and of equal texts the first."""
    first: dict[str, int] = {}
    for number, text in numbered:
        if text.strip():
            first.setdefault(text, number)
    return tuple(Document(source, number, text) for text, number in first.items())
