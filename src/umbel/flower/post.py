"""Questions and answers as Flower messages: facts as JSON, tensors as safetensors, and nothing that could run.

A Flower Array carries any bytes; here they are safetensors and never what `Array.numpy` reads.
"""

import json
from typing import TYPE_CHECKING, Any

from umbel.errors import WireError
from umbel.flower.protected import STEPS
from umbel.flower.wire import Facts, Parts

if TYPE_CHECKING:
    from flwr.app import RecordDict

KINDS = {"hello": "query.hello", "train": "train", "evaluate": "evaluate"} | {
    step: f"query.{step}" for step in STEPS
}
"""What is asked → the type of Flower's message."""
FORMAT = "safetensors"
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
    try:
        record = dict(content.config_records["umbel"])
        facts: Any = json.loads(str(record.pop("facts")))
    except (KeyError, ValueError) as error:
        raise WireError(f"{who}: this is no message of umbel's ({error!r})") from None
    if not isinstance(facts, dict):
        raise WireError(f"{who}: this is no message of umbel's (its facts are no table)")
    parts: Parts = {}
    for name, part in record.items():
        if not isinstance(part, bytes):
            raise WireError(f"{who}: {name} came as {type(part).__name__}, where bytes were expected")
        parts[name] = part
    for name, array in content.array_records.get("tensors", {}).items():
        if array.stype != FORMAT:
            raise WireError(f"{who}: {name} came as {array.stype!r}; only {FORMAT} is read")
        parts[name] = array.data
    return facts, parts
