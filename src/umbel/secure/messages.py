"""What the clients and the server of a secure sum tell each other, and what a client remembers in between.

All of it is bytes and whole numbers, so that any transport can carry it: `packed` and `unpacked` are MessagePack.

    client → server    Advertised    Sealed      Masked    Shown
    server → client         Roster      Delivery    Question
"""

from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from umbel.errors import WireError

T = TypeVar("T")
Client = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Seed = Annotated[bytes, msgspec.Meta(max_length=16)]
Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Box = Annotated[bytes, msgspec.Meta(max_length=256)]
"""Two sealed shares."""
Share = tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)], Seed]
"""Its number, and one block of PyCryptodome's sharing."""


@dataclass(frozen=True)
class Advertised:
    """1, up: a client's public keys of this round."""

    client: Client
    sealing_key: Key  # by which others seal what only this client shall read
    masking_key: Key  # by which the pairwise masks are agreed on


@dataclass(frozen=True)
class Roster:
    """1, down: whom a client shares masks and secrets with, itself included."""

    session: Seed
    keys: dict[Client, Advertised]
    needed: int  # shares that give a secret back


@dataclass(frozen=True)
class Sealed:
    """2, up: for every neighbour its shares of this client's two secrets, which only the neighbour can open."""

    client: Client
    boxes: dict[Client, Box]
    commitment: Key  # to the seed of the client's own mask


@dataclass(frozen=True)
class Delivery:
    """2, down: what the neighbours have sealed for a client."""

    boxes: dict[Client, Box]


@dataclass(frozen=True)
class Masked:
    """3, up: the contribution under all of the client's masks."""

    client: Client
    values: bytes


@dataclass(frozen=True)
class Question:
    """3, down: which of the client's neighbours have sent a masked contribution, and which have not."""

    arrived: tuple[Client, ...]
    missing: tuple[Client, ...]


@dataclass(frozen=True)
class Shown:
    """4, up: of each neighbour one of its two secrets' shares, never both."""

    client: Client
    own_masks: dict[Client, Share]  # of those who arrived: their own masks have to go
    keys: dict[Client, Share]  # of those who did not: what they share with others has to go


@dataclass(frozen=True)
class ClientState:
    """What a client remembers from one message to the next; secret, and forgotten after the round."""

    client: Client
    sealing_seed: bytes
    masking_seed: bytes
    roster: Roster | None = None
    own_seed: bytes = b""
    held: dict[Client, tuple[Share, Share]] = field(default_factory=dict)  # of whose (own mask, masking seed)
    answered: bool = False


def packed(message: object) -> bytes:
    """The message, or a client's state, as bytes."""
    return msgspec.msgpack.encode(message)


def unpacked(kind: type[T], text: bytes) -> T:
    """The message of that kind which `packed` made these bytes.

    Raises:
        WireError: they are none.
    """
    try:
        return msgspec.msgpack.decode(text, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"these bytes are no {kind.__name__}: {error}") from None
