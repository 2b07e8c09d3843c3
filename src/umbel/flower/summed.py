"""A secure sum over clients on other nodes: the server's side of four exchanges, of which it learns the sum.

    advertise    → keys           share    rosters → sealed shares
    train or evaluate    the method's message and the shares → the part of the sum, under masks
    show    who has arrived → shares by which the masks come off

Every client takes each step by itself, also where a node has several. Who does not answer one is not in the next:
up to the third step that costs its part of the sum, and after it nothing while enough others answer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any, TypeVar

from umbel.errors import RoundError
from umbel.flower.wire import Facts, Parts
from umbel.secure import server
from umbel.secure.exchange import SESSION_BYTES, SecureSum
from umbel.secure.fixed_point import decoded, layout_of
from umbel.secure.messages import Advertised, Masked, Sealed, Shown, packed, unpacked
from umbel.secure.secrets import unpredictable
from umbel.secure.settings import Secure

LOG = getLogger("umbel")
T = TypeVar("T", Advertised, Sealed, Masked, Shown)

Ask = Callable[[str, dict[int, tuple[Facts, Parts]], dict[int, str]], Iterator[tuple[int, Facts, Parts]]]
"""(what, questions by node, why nodes have not answered: is added to) → answers as they come (`Nodes.ask`)."""
Letters = Callable[[list[int]], dict[int, tuple[Facts, Parts]]]
"""Clients → for each of their nodes what training or evaluation has to be told beside the sum's own."""


@dataclass
class Exchange:
    """The questions of one sum, and the bytes of its messages."""

    ask: Ask
    homes: Mapping[int, int]  # client → node
    about: str  # "train" or "evaluate"
    round: int
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # that the slowest node took for its work
    troubles: dict[str, str] = field(default_factory=dict)  # who has dropped out, and why

    def step(
        self, kind: str, want: type[T], questions: Mapping[int, bytes], letters: Letters | None = None, **more: Any
    ) -> dict[int, T]:
        """The clients' answers to a step, ascending; whoever has none that can be used is not in it."""
        asked = {} if letters is None else letters(sorted(questions))
        for client, text in sorted(questions.items()):
            facts, parts = asked.setdefault(self.homes[client], ({"clients": []}, {}))
            if letters is None:
                facts["clients"].append(client)
            parts[f"{kind}/{client}"] = text
            self.bytes_down += len(text)
        about = {"about": self.about, "round": self.round, **more}
        silent: dict[int, str] = {}
        found: dict[int, T] = {}
        everything = {node: (facts | about, parts) for node, (facts, parts) in asked.items()}
        for node, told, parts in self.ask(kind, everything, silent):
            self.seconds = max(self.seconds, float(told.get("seconds", 0.0)))
            failed = told.get("failed", {})
            for client in asked[node][0]["clients"]:
                text = parts.get(f"{kind}/{client}", b"")
                try:
                    answer = unpacked(want, text)
                except ValueError as error:
                    self.troubles[f"client {client}"] = str(failed.get(str(client), error))
                    continue
                if answer.client != client:
                    self.troubles[f"client {client}"] = f"it answers for client {answer.client}"
                    continue
                self.bytes_up += len(text)
                found[client] = answer
        self.troubles |= {f"node {node}": why for node, why in silent.items()}
        return dict(sorted(found.items()))

    def only(self, answers: dict[int, T], good: Callable[[T], bool], what: str) -> dict[int, T]:
        """Those of the answers that are as they must be."""
        for client, answer in answers.items():
            if not good(answer):
                self.troubles[f"client {client}"] = what
        return {client: answer for client, answer in answers.items() if good(answer)}


def masked_sum(
    exchange: Exchange, clients: list[int], secure: Secure, letters: Letters, like: dict[str, Any]
) -> tuple[SecureSum, list[int]]:
    """The sum over those of the clients that stay until their third step, and who they are, ascending.

    Args:
        exchange: how to ask.
        clients: all of the round that are on some node.
        secure: how.
        letters: see `Letters`.
        like: the form of what one client adds.

    Raises:
        RoundError: too few clients have stayed.
    """
    advertised = exchange.step("advertise", Advertised, dict.fromkeys(clients, b""))
    rosters = server.rosters(secure, unpredictable(SESSION_BYTES), list(advertised.values()))
    sealed = exchange.step("share", Sealed, {client: packed(roster) for client, roster in rosters.items()})
    sealed = exchange.only(
        sealed,
        lambda one: one.boxes.keys() == rosters[one.client].keys.keys() - {one.client},
        "its shares are not for those of its roster",
    )
    delivered = server.deliveries(rosters, list(sealed.values()))
    layout = layout_of(like, secure, len(advertised))
    masked = exchange.step(
        exchange.about,
        Masked,
        {client: packed(boxes) for client, boxes in delivered.items()},
        letters,
        num_clients=len(advertised),
    )
    masked = exchange.only(
        masked, lambda one: len(one.values) == layout.num_bytes, "its part has another length than this run's"
    )
    if not masked:
        raise RoundError("secure aggregation: no contribution has arrived; there is nothing to add up")
    asked = server.questions(delivered, masked)
    shown = exchange.step("show", Shown, {client: packed(question) for client, question in asked.items()})
    total = server.unmasked(
        rosters, delivered, list(sealed.values()), list(masked.values()), list(shown.values()), secure.bits
    )
    sums, cut = decoded(total, layout)
    return SecureSum(sums, layout, len(masked), cut, exchange.bytes_up, exchange.bytes_down), sorted(masked)
