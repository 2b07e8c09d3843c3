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

import numpy as np

from umbel import mixing, tree
from umbel.cohort import Tally
from umbel.errors import RoundError, WireError
from umbel.evaluate import Scores, SummedScores
from umbel.flower.protected import score_sums
from umbel.flower.wire import Facts, Parts, filled
from umbel.flower.wire import unpacked as unpacked_tensors
from umbel.meeting import Cut, Total, opened_total
from umbel.privacy import clipping
from umbel.schedule import Schedule
from umbel.secure import server
from umbel.secure.exchange import SESSION_BYTES, SecureSum
from umbel.secure.fixed_point import decoded, layout_of
from umbel.secure.messages import Advertised, Masked, Sealed, Shown, packed, unpacked
from umbel.secure.secrets import unpredictable
from umbel.secure.settings import Secure
from umbel.untrusted import plain

LOG = getLogger("umbel")
ROUNDING = 1e-4  # by how much a part may be longer than its clip
MOST_SECONDS = 1e9
KEY_BYTES = 32
T = TypeVar("T", Advertised, Sealed, Masked, Shown)

Ask = Callable[[str, dict[int, tuple[Facts, Parts]], dict[str, str]], Iterator[tuple[int, Facts, Parts]]]
"""(what, questions by node, which nodes have not answered and why: is added to) → answers as they come."""
Letters = Callable[[list[int]], dict[int, tuple[Facts, Parts]]]
"""Clients → for each of their nodes what training or evaluation has to be told beside the sum's own."""


@dataclass
class Asking:
    """The questions of one sum, and what came of them."""

    ask: Ask
    homes: Mapping[int, int]  # client → node
    letters: Letters
    about: str  # "train" or "evaluate"
    round: int
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # that the slowest node took for its work
    troubles: dict[str, str] = field(default_factory=dict)  # who has dropped out, and why

    def step(self, kind: str, want: type[T], questions: Mapping[int, bytes], **more: Any) -> dict[int, T]:
        """The clients' answers to a step, ascending; whoever has none that can be used is not in it."""
        asked = self.letters(sorted(questions)) if kind == self.about else {}
        for client, text in sorted(questions.items()):
            facts, parts = asked.setdefault(self.homes[client], ({"clients": []}, {}))
            if kind != self.about:
                facts["clients"].append(client)
            parts[f"{kind}/{client}"] = text
            self.bytes_down += len(text)
        about = {"about": self.about, "round": self.round, **more}
        found: dict[int, T] = {}
        everything = {node: (facts | about, parts) for node, (facts, parts) in asked.items()}
        for node, told, parts in self.ask(kind, everything, self.troubles):
            for client, text in self.heard(kind, asked[node][0]["clients"], told, parts):
                try:
                    answer = unpacked(want, text)
                except ValueError as error:
                    self.troubles[f"client {client}"] = plain(error)
                    continue
                if answer.client != client:
                    self.troubles[f"client {client}"] = f"it answers for client {answer.client}"
                    continue
                self.bytes_up += len(text)
                found[client] = answer
        return dict(sorted(found.items()))

    def heard(self, kind: str, clients: list[int], told: Facts, parts: Parts) -> Iterator[tuple[int, bytes]]:
        """What a node has sent for its clients; why it has not is noted."""
        seconds, failed = told.get("seconds"), told.get("failed")
        if isinstance(seconds, float) and 0 <= seconds < MOST_SECONDS:
            self.seconds = max(self.seconds, seconds)
        for client in clients:
            if f"{kind}/{client}" in parts:
                yield client, parts[f"{kind}/{client}"]
                continue
            why = failed.get(str(client)) if isinstance(failed, dict) else None
            self.troubles[f"client {client}"] = plain(why or "its node has sent nothing for it", 1000)

    def complain(self, what: str) -> None:
        """Logs who has dropped out of it, and why."""
        for who, why in self.troubles.items():
            LOG.error("%s: %s: %s", what, who, why)

    def only(self, answers: dict[int, T], good: Callable[[T], bool], what: str) -> dict[int, T]:
        """Those of the answers that are as they must be."""
        for client, answer in answers.items():
            if not good(answer):
                self.troubles[f"client {client}"] = what
        return {client: answer for client, answer in answers.items() if good(answer)}


def masked_sum(
    asking: Asking, clients: list[int], secure: Secure, like: dict[str, Any]
) -> tuple[SecureSum, list[int]]:
    """The sum over those of the clients that stay until their third step, and who they are, ascending.

    Args:
        asking: how to ask.
        clients: all of the round that are on some node.
        secure: how.
        like: the form of what one client adds.

    Raises:
        RoundError: too few clients have stayed.
    """
    advertised = asking.step("advertise", Advertised, dict.fromkeys(clients, b""))
    advertised = asking.only(
        advertised,
        lambda one: {len(one.sealing_key), len(one.masking_key)} == {KEY_BYTES},
        "its keys have another length than keys have",
    )
    rosters = server.rosters(secure, unpredictable(SESSION_BYTES), list(advertised.values()))
    sealed = asking.step("share", Sealed, {client: packed(roster) for client, roster in rosters.items()})
    sealed = asking.only(
        sealed,
        lambda one: one.boxes.keys() == rosters[one.client].keys.keys() - {one.client},
        "its shares are not for those of its roster",
    )
    delivered = server.deliveries(rosters, list(sealed.values()))
    layout = layout_of(like, secure, len(advertised))
    masked = asking.step(
        asking.about,
        Masked,
        {client: packed(boxes) for client, boxes in delivered.items()},
        num_clients=len(advertised),
    )
    masked = asking.only(
        masked, lambda one: len(one.values) == layout.num_bytes, "its part has another length than this run's"
    )
    if not masked:
        raise RoundError("secure aggregation: no contribution has arrived; there is nothing to add up")
    asked = server.questions(delivered, masked)
    shown = asking.step("show", Shown, {client: packed(question) for client, question in asked.items()})
    total = server.unmasked(
        rosters, delivered, list(sealed.values()), list(masked.values()), list(shown.values()), secure.bits
    )
    sums, cut = decoded(total, layout)
    return SecureSum(sums, layout, len(masked), cut, asking.bytes_up, asking.bytes_down), sorted(masked)


def summed(
    asking: Asking, clients: list[int], schedule: Schedule, like: dict[str, Any], cut: Cut | None, seen: Tally
) -> Total:
    """The sum over those of the round's clients that stay; a round in which too few do is lost, and gives none.

    Args:
        asking: how to ask.
        clients: all of the round that are on some node.
        schedule: with what is asked of the sum.
        like: the form (1, …) of what one client adds.
        cut: what each part is to be cut to.
        seen: counts who is in the sum.
    """
    found, used = Total(None), list[int]()
    try:
        if schedule.secure.aggregation == "masks":
            row = tree.map_tensors(lambda leaf: leaf[0], like)
            opened, used = masked_sum(asking, clients, schedule.secure, row)
            found = opened_total(opened, row, seen if schedule.privacy.level == "none" else None)
        elif cut is not None:
            parts = cut_parts(asking, clients, like, cut)
            used = sorted(parts)
            total = mixing.total(parts[client] for client in used) if used else None
            found = Total(total, bytes_up=len(used) * tree.row_bytes(like))
    except (RoundError, ValueError) as error:  # a share or key that is none
        LOG.error("round %d is lost: %s", asking.round, error)
    asking.complain(f"round {asking.round}")
    seen.arrived(np.array(used, dtype=np.int64))
    return found


def cut_parts(asking: Asking, clients: list[int], like: dict[str, Any], cut: Cut) -> dict[int, dict[str, Any]]:
    """What each client adds to the sum, which it has cut to its clips; the server trusts no client to have."""
    found, questions = {}, asking.letters(clients)
    for node, told, parts in asking.ask("train", questions, asking.troubles):
        for client, text in asking.heard("train", questions[node][0]["clients"], told, parts):
            who = f"client {client}"
            try:
                rows = filled([like], unpacked_tensors(text, who), who)
                own = tree.map_tensors(lambda leaf: leaf[0], rows)
                for name in cut.groups.names:
                    if clipping.norm(own[name]) > float(cut.clips[name]) * (1 + ROUNDING):
                        raise WireError(f"its part of {name} is longer than its clip")
                if clipping.WITHIN in own and bool((own[clipping.WITHIN].abs() != 0.5).any()):  # clips follow it
                    raise WireError("it says of a part neither that it was within its clip nor that it was longer")
                found[client] = own
            except WireError as error:
                asking.troubles[who] = str(error)
    return found


def summed_scores(asking: Asking, clients: list[int], schedule: Schedule, rights: bool) -> SummedScores | None:
    """The means over all tests, of which sums come under masks; None where they do not.

    Args:
        asking: how to ask.
        clients: whose tests.
        schedule: with how sums are masked.
        rights: whether there is an accuracy.
    """
    found = None
    like = score_sums(Scores(np.zeros(1), np.zeros(1) if rights else None, np.zeros((1, 0))))
    try:
        opened, _ = masked_sum(asking, clients, schedule.secure, like)
        sums = {name: float(leaf) for name, leaf in opened.sums.items()}
        tests = max(sums["tests"], 1.0)
        found = SummedScores(sums["loss"] / tests, sums["accuracy"] / tests if rights else None, round(tests))
    except (RoundError, ValueError) as error:
        LOG.error("evaluation: %s", error)
    asking.complain("evaluation")
    return found
