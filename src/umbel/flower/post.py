"""Questions and answers as Flower messages: facts as JSON, tensors as safetensors, and nothing that could run.

A Flower Array carries any bytes; here they are safetensors and never what `Array.numpy` reads.
"""

import json
from typing import TYPE_CHECKING

from umbel.errors import WireError
from umbel.flower.protected import STEPS
from umbel.flower.wire import Facts, Parts
from umbel.untrusted import plain, table_in

if TYPE_CHECKING:
    from flwr.app import RecordDict

KINDS = {"hello": "query.hello", "train": "train", "evaluate": "evaluate"} | {
    step: f"query.{step}" for step in STEPS
}
"""What is asked → the type of Flower's message."""
FORMAT = "safetensors"
MOST_PARTS = 1 << 14  # of a message
SMALL = (
    1 << 20
)  # bytes; Flower cuts arrays into pieces and sends equal ones once, but each takes requests of its own


def kind_of(message_type: str) -> str:
    """What is asked by a message of that type.

    Raises:
        WireError: nothing that umbel knows.
    """
    for kind, known in KINDS.items():
        if message_type == known:
            return kind
    raise WireError(f"a message of the type {message_type!r} is none of umbel's")


def content_of(facts: Facts, parts: Parts) -> "RecordDict":
    """What a Flower message with them carries."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    small = {name: part for name, part in parts.items() if part and len(part) <= SMALL}
    arrays = {n: Array("uint8", (len(part),), FORMAT, part) for n, part in parts.items() if len(part) > SMALL}
    content = RecordDict({"umbel": ConfigRecord({"facts": json.dumps(facts), **small})})
    if arrays:
        content["tensors"] = ArrayRecord(arrays)
    return content


def opened(content: "RecordDict", who: str) -> tuple[Facts, Parts]:
    """The facts and parts in what `content_of` made.

    Raises:
        WireError: it is something else; `who` has sent it.
    """
    if not set(content) <= {"umbel", "tensors"} or "umbel" not in content.config_records:
        raise WireError(f"{who}: this is no message of umbel's (it has other records)")
    record = dict(content.config_records["umbel"])
    told = record.pop("facts", None)
    arrays = dict(content.array_records["tensors"]) if "tensors" in content.array_records else {}
    if not isinstance(told, str) or len(record) + len(arrays) > MOST_PARTS:
        raise WireError(f"{who}: this is no message of umbel's (it has no facts, or more than {MOST_PARTS} parts)")
    try:
        facts: Facts = table_in(told, finite=False)  # a recipe may name infinity
    except ValueError as error:
        raise WireError(f"{who}: its facts cannot be read: {plain(error)}") from None
    parts: Parts = {}
    for name, part in record.items():
        if not isinstance(part, bytes):
            raise WireError(f"{who}: {plain(name)} came as {type(part).__name__}, where bytes were expected")
        parts[name] = part
    for name, array in arrays.items():
        if array.stype != FORMAT:
            raise WireError(f"{who}: {plain(name)} came as {plain(array.stype)!r}; only {FORMAT} is read")
        if name in parts:
            raise WireError(f"{who}: {plain(name)} came twice")
        parts[name] = array.data
    return facts, parts
