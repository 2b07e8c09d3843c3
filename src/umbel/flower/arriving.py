"""What Flower hands over before umbel sees it: how large it is, and what its objects claim, before any is made.

Flower takes a message apart into objects, which the receiver pulls one by one and puts together:

    Message → RecordDict → ConfigRecord | MetricRecord | ArrayRecord → Array → ArrayChunk

An Array names its chunks by number, and may name one often: a few bytes that stand for many. So what all would
have is counted first, and whatever is not of this form, or longer than `most`, is never put together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any

from umbel.errors import LostError, WireError
from umbel.untrusted import MEBIBYTE, plain, table_in

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

MOST_OBJECTS = 1 << 14  # that a message is taken apart into
HEAD_BYTES = MEBIBYTE  # of an object's head, and of what it says of others
INSIDE = {
    "Message": {"RecordDict"},
    "RecordDict": {"ConfigRecord", "MetricRecord", "ArrayRecord"},
    "ArrayRecord": {"Array"},
    "Array": {"ArrayChunk"},
    "ConfigRecord": set(),
    "MetricRecord": set(),
    "ArrayChunk": set(),
}
"""What an object is made of."""
SLACK = 32 * MEBIBYTE  # for facts and whatever is small
STALLED = 60.0  # seconds without another object
LONGEST = 900.0  # seconds that a message may take
SOON, LATER = 0.05, 1.0  # seconds until an object that has yet to come is asked for again, at first and in the end

Pull = Callable[[str], bytes]


@dataclass(frozen=True)
class Object:
    """What a message is taken apart into."""

    kind: str  # its class
    parts: list[str]  # the names of what it is made of
    body: bytes  # b"" of a chunk, of which only the size is looked at
    size: int  # of the body


def most_bytes(rows: int, row_bytes: int, num_clients: int) -> int:
    """Bytes that a message about so many clients may have.

    Args:
        rows: clients that it is about.
        row_bytes: of the tensors of one; four times as many are let through, for the wider numbers of masked sums.
        num_clients: of the task; masks have a sealed box for each neighbour.
    """
    return SLACK + rows * (4 * row_bytes + 256 * num_clients + (64 << 10))


def messages(grid: "Grid", names: Sequence[str], most: int) -> Iterable["Message"]:
    """The answers that are there to the messages of these names; one that is refused comes as an error message.

    Who has sent it, and to what it is the answer, is what the SuperLink says and not what the message says.

    Args:
        grid: Flower's; one that reaches no SuperLink gives its messages as they are.
        names: of what was asked.
        most: bytes of an answer.
    """
    from flwr.app import Error
    from flwr.app.message import make_message
    from flwr.common.constant import ErrorCode
    from flwr.common.serde_utils import metadata_from_proto
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
    from flwr.superlink.grid.http_grid import HttpGrid

    if not isinstance(grid, HttpGrid):
        yield from grid.pull_messages(names)
        return
    link, run = grid._runtime_client, grid.run.run_id
    found = link.PullMessages(PullAppMessagesRequest(message_ids=names))
    for proto, objects in zip(found.messages_list, found.message_object_trees, strict=True):
        metadata = metadata_from_proto(proto.metadata)
        pull = make_pull_object_fn_protobuf(link.PullObject, grid.node, run)
        try:
            whole = put_together((leaf.object_id for leaf in iterate_object_tree(objects)), pull, most)
            if whole.metadata.reply_to_message_id != metadata.reply_to_message_id:
                raise WireError("it says that it answers another message than it does")
        except WireError as error:
            code = ErrorCode.REPLY_MESSAGE_UNAVAILABLE if isinstance(error, LostError) else ErrorCode.UNKNOWN
            whole = make_message(metadata, error=Error(code, reason=f"its message was refused: {error}"))
        link.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=grid.node, run_id=run, message_object_id=metadata.message_id)
        )
        yield whole


def put_together(names: Iterable[str], pull: Pull, most: int) -> "Message":
    """The message that is made of the objects of these names, its own the last.

    Args:
        names: of all objects of a message.
        pull: gives an object's bytes.
        most: bytes of all together.

    Raises:
        WireError: they are too many, too long, or no message of Flower's.
        LostError: one is missing.
    """
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        ObjectUnavailableError,
        inflate_object_from_contents,
        pull_objects,
    )

    wanted = list(dict.fromkeys(islice(names, MOST_OBJECTS + 1)))
    if not 0 < len(wanted) <= MOST_OBJECTS:
        raise WireError(f"it has {len(wanted)} objects or more, and {MOST_OBJECTS} are taken at most")
    taken, last, lock = 0, monotonic(), Lock()

    def counted(name: str) -> bytes:
        nonlocal taken, last
        try:
            content = pull(name)
        except ObjectUnavailableError:  # its sender has announced it, and may never send it
            if monotonic() - last > STALLED:
                raise WireError(f"nothing more of it has come for {STALLED:.0f} s") from None
            raise
        with lock:
            taken, last = taken + len(content), monotonic()
        if taken > most:
            raise WireError(f"it has more than {most} bytes")
        return content

    try:
        contents = pull_objects(
            wanted, counted, max_time=LONGEST, max_tries_per_object=None, initial_backoff=SOON, backoff_cap=LATER
        )
    except ObjectPullError as error:
        raise LostError(plain(error)) from None
    check_objects(wanted[-1], contents, most)
    try:
        whole: Any = inflate_object_from_contents(wanted[-1], contents)
    except Exception as error:  # whatever Flower trips over
        raise WireError(f"Flower cannot put it together ({type(error).__name__}: {plain(error)})") from None
    whole.metadata.__dict__["_message_id"] = wanted[-1]  # which its content cannot hold
    return whole  # type: ignore[no-any-return]


def check_objects(name: str, contents: Mapping[str, bytes], most: int) -> None:
    """Raises WireError unless the objects are a message of Flower's, of no more bytes than `most` put together."""
    objects = {one: _object(content) for one, content in contents.items()}
    if name not in objects or objects[name].kind != "Message":
        raise WireError("what came is no Message of Flower's")
    if (size := _size(name, objects, {})) > most:
        raise WireError(f"put together it would have {size} bytes, and {most} are taken at most")


def _size(name: str, objects: Mapping[str, Object], known: dict[str, int]) -> int:
    """The bytes of an object put together; that no class holds itself ends the recursion."""
    if name in known:
        return known[name]
    own = objects[name]
    for part in own.parts:
        if part not in objects or objects[part].kind not in INSIDE[own.kind]:
            raise WireError(f"a {own.kind} holds what it cannot hold, or a part of it is missing")
    sizes = {part: _size(part, objects, known) for part in own.parts}
    used = own.parts
    if own.kind == "Array":
        used = [own.parts[place] for place in _places(own)]
    elif own.kind in ("RecordDict", "ArrayRecord"):
        used = _records(own)
    known[name] = own.size + sum(sizes[part] for part in used)
    return known[name]


def _records(own: Object) -> list[str]:
    told = list(_told(own).values())
    if not all(isinstance(part, str) for part in told) or set(told) != set(own.parts):
        raise WireError(f"a {own.kind} names what it does not hold")
    return told


def _places(own: Object) -> list[int]:
    told = _told(own)
    places, shape, last = told.get("arraychunk_ids"), told.get("shape"), len(own.parts)
    if isinstance(places, list) and len(places) > MOST_OBJECTS:
        raise WireError(f"an Array has {len(places)} chunks, and {MOST_OBJECTS} are put together at most")
    if not isinstance(places, list) or not all(type(place) is int and 0 <= place < last for place in places):
        raise WireError("an Array names chunks that it does not hold")
    if not isinstance(shape, list) or not all(isinstance(told.get(name), str) for name in ("dtype", "stype")):
        raise WireError("an Array does not say what it is")
    return places


def _told(own: Object) -> dict[str, Any]:
    if own.size > HEAD_BYTES:
        raise WireError(f"a {own.kind} says {own.size} bytes of what it holds; {HEAD_BYTES} are read at most")
    try:
        return table_in(own.body)
    except ValueError as error:
        raise WireError(f"a {own.kind} does not say what it holds: {error}") from None


def _object(content: bytes) -> Object:
    end = content.find(b"\0", 0, HEAD_BYTES)
    head = content[: max(end, 0)].decode("utf-8", "replace").split(" ")
    if len(head) != 3 or head[0] not in INSIDE:
        raise WireError("an object is of no class of Flower's messages")
    parts = head[1].split(",") if head[1] else []
    if len(set(parts)) < len(parts):
        raise WireError(f"a {head[0]} holds a part twice")
    body = b"" if head[0] == "ArrayChunk" else content[end + 1 :]
    return Object(head[0], parts, body, len(content) - end - 1)
