"""What no task trains or tests on: texts and images to pretrain a base with.

Texts are 20 Newsgroups, of Multi30k's captions, Genesis and the Universal Declaration of Human Rights what has an
even number (the task `multilingual` has the odd ones), the questions of XQuAD but the English ones, which are
QNLI's (not its paragraphs and answers, which are that task's), titles of Stack Overflow, GSM8K, Code Alpaca, MBPP
and HumanEval, CLINC150.
Images are the first 20,000 of CIFAR-10's for training, which `cifar_vit` leaves out; `cifar10` does not.
What is also a text of the task's is left out. What else both have are a few words: "yes", "positive".
"""

from collections.abc import Iterator

from umbel.tasks.cifar_vit import divided
from umbel.tasks.corpora import Images, cifar10
from umbel.tasks.multilingual import LANGUAGES, READ, Text, own_documents
from umbel.tasks.texts import CAPTION_LANGUAGES, PARAGRAPH_LANGUAGES, rows

_LINES = 25  # of Genesis, to a document


def texts() -> dict[str, tuple[str, ...]]:
    """The documents for pretraining by their source; what is in several languages has a source for each.

    Raises:
        DataError: a file is not in the data folder, or, of captions, nor on the hub.
    """
    found = {
        "newsgroups": _joined("newsgroups20", "subject", "body"),
        "titles": _joined("stackoverflow_titles", "title"),
        "problems": _joined("gsm8k", "question", "answer"),
        "code": _joined("code_alpaca", "instruction", "input", "output")
        + _joined("python_problems", "prompt", "code"),
        "requests": _joined("clinc150", "text"),
        "declarations": tuple("\n".join(_left("declaration", language)) for language in LANGUAGES["declaration"]),
    }
    found |= {f"genesis_{language}": tuple(_genesis(language)) for language in LANGUAGES["verses"]}
    found |= {f"captions_{language}": tuple(_left("captions", language)) for language in CAPTION_LANGUAGES}
    others = [language for language in PARAGRAPH_LANGUAGES if language != "en"]
    found |= {f"questions_{language}": _questions(language) for language in others}
    return found


def images() -> Images:
    """The images for pretraining with their labels.

    Raises:
        DataError: CIFAR-10 is neither in the folder nor to be had from the hub.
    """
    return divided(cifar10().train)[0]


def _joined(name: str, *columns: str) -> tuple[str, ...]:
    """Each row's columns one below the other."""
    found = rows(name, columns)
    each = zip(*(found[column] for column in columns), strict=True)
    return tuple(dict.fromkeys("\n".join(part for part in row if part) for row in each))


def _left(text: Text, language: str) -> list[str]:
    """What the task `multilingual` leaves of its texts."""
    used = {document.text for document in own_documents(text, language)}
    return [one.text for one in READ[text](language) if one.text not in used]


def _genesis(language: str) -> Iterator[str]:
    lines = _left("verses", language)
    for start in range(0, len(lines), _LINES):
        yield "\n".join(lines[start : start + _LINES])


def _questions(language: str) -> tuple[str, ...]:
    """XQuAD's, those about one paragraph in a document."""
    found = rows("xquad_qa", ("ctx", "question"), only={"lang": language})
    about: dict[int, list[str]] = {}
    for paragraph, question in zip(found["ctx"], found["question"], strict=True):
        about.setdefault(paragraph, []).append(question)
    return tuple("\n".join(own) for own in about.values())
