"""A whole secure sum on one machine: every message of every client, packed as on a wire.

Between machines the same functions of client.py and server.py are called, one step on each side at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from umbel.errors import RoundError
from umbel.secure import client as clients
from umbel.secure import server
from umbel.secure.fixed_point import Layout, decoded, encoded, layout_of
from umbel.secure.messages import packed, unpacked
from umbel.secure.secrets import Random, unpredictable
from umbel.secure.settings import Secure
from umbel.tree import Params

T = TypeVar("T")
SESSION_BYTES = 16


@dataclass(frozen=True)
class SecureSum:
    """What the server has of a round."""

    sums: Params  # by the tensors' names in a contribution
    layout: Layout
    num_clients: int  # that are in the sum
    cut: int  # numbers that lay beyond their range, of all clients together
    bytes_up: int  # of all messages of all clients
    bytes_down: int
    transcript: list[bytes] = field(default_factory=list)  # every message that the server has received

    def figures(self) -> dict[str, float]:
        """What a round's figures say of it: how far off a sum may be, and how many numbers were cut."""
        error = max(self.layout.steps) * self.num_clients / 2
        return {"secure_error": error, "secure_cut": float(self.cut)}


class Wire:
    """Carries messages between the clients and the server as bytes, and counts them."""

    def __init__(self) -> None:
        self.up: list[bytes] = []
        self.down = 0

    def to_server(self, message: T) -> T:
        """The message as the server reads it."""
        text = packed(message)
        self.up.append(text)
        return unpacked(type(message), text)

    def to_client(self, message: T) -> T:
        """The message as a client reads it."""
        text = packed(message)
        self.down += len(text)
        return unpacked(type(message), text)


def secure_sum(
    begun: Collection[int],
    contributions: Mapping[int, dict[str, Any]],
    secure: Secure,
    random: Random = unpredictable,
) -> SecureSum:
    """The sum of the contributions, of which the server has seen none.

    Args:
        begun: the clients that exchange keys and shares.
        contributions: of those of them that do not drop out afterwards.
        secure: how.
        random: of all clients and the server; for tests.

    Raises:
        RoundError: too few clients, to begin with or in the end.
    """
    if not contributions:
        raise RoundError("secure aggregation: no contribution has arrived; there is nothing to add up")
    wire, session = Wire(), random(SESSION_BYTES)
    layout = layout_of(next(iter(contributions.values())), secure, len(begun))
    started = {client: clients.advertise(client, random) for client in sorted(begun)}
    rosters = server.rosters(secure, session, [wire.to_server(told) for _, told in started.values()])
    shared = {
        client: clients.share(state, wire.to_client(rosters[client]), random)
        for client, (state, _) in started.items()
    }
    sealed = [wire.to_server(told) for _, told in shared.values()]
    delivered = server.deliveries(rosters, sealed)
    masked = {}
    for client, own in contributions.items():
        state, delivery = shared[client][0], wire.to_client(delivered[client])
        masked[client] = clients.mask(state, delivery, encoded(own, layout, len(begun)), secure.bits)
    arrived = [wire.to_server(told) for _, told in masked.values()]
    asked = server.questions(delivered, [one.client for one in arrived])
    shown = [
        wire.to_server(clients.show(masked[client][0], wire.to_client(question))[1])
        for client, question in asked.items()
    ]
    total = server.unmasked(rosters, delivered, sealed, arrived, shown, secure.bits)
    sums, cut = decoded(total, layout)
    return SecureSum(sums, layout, len(arrived), cut, sum(map(len, wire.up)), wire.down, wire.up)
