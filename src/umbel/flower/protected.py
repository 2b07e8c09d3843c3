"""A node's side of runs whose clients or examples are protected: what leaves the node, and what does not.

    [secure]               training                                  evaluation
      masks                  the part of a sum, under masks            the same, of losses and hits
    [privacy]
      level = "client"       the part of a sum, cut to its clips       nothing
      level = "example"      an upload of noisy steps, no loss         nothing

and with masks and noise the part under masks. A node does what the recipe says that it has let in, whatever the
server asks for. Its owner finds the clients' scores in STATE/RUN/scores.jsonl.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import isfinite
from time import perf_counter
from typing import Any

import torch

from umbel import tree
from umbel.errors import RecipeError, RoundError, WireError
from umbel.evaluate import Scores
from umbel.flower.facts import Number, fact, reason_of
from umbel.flower.vault import Vault
from umbel.flower.wire import Facts, Parts, packed
from umbel.meeting import Cut, contributed
from umbel.methods import Method
from umbel.privacy import clipping
from umbel.schedule import Schedule
from umbel.secure import client as steps
from umbel.secure import messages
from umbel.secure.fixed_point import encoded, layout_of
from umbel.secure.messages import ClientState, Delivery, Question, Roster
from umbel.tree import Params

STEPS = ("advertise", "share", "show")
"""What clients are asked in a secure sum beside training and evaluation, which are its third step."""


def is_protected(schedule: Schedule) -> bool:
    """Whether more is asked of a run than that data and private states stay where they are."""
    return schedule.secure.aggregation == "masks" or schedule.privacy.level != "none"


def counts_are_told(schedule: Schedule) -> bool:
    """Whether nodes say how many examples their clients have: where weights or ε could not be known without."""
    summed = schedule.secure.aggregation == "masks" or schedule.privacy.level == "client"
    return not summed or schedule.privacy.level == "example" or schedule.weighting.rule == "uniform"


def check_protection(schedule: Schedule) -> None:
    """Raises RecipeError where what is protected would be told in another way."""
    if is_protected(schedule) and schedule.weighting.rule == "feddisco":
        raise RecipeError(
            "weighting.rule = 'feddisco' does not go with [secure] and [privacy] across machines: the server "
            "would have to know each client's labels; take 'examples', 'uniform' or 'one'"
        )
    privacy = schedule.privacy
    if privacy.level == "example" and privacy.epsilon and privacy.noise_multiplier:
        raise RecipeError(
            "privacy.epsilon and privacy.noise_multiplier: across machines give one of them, for how many rounds "
            "both together last depends on how many examples each client has, which no node knows of the others"
        )


@dataclass(frozen=True)
class Protection:
    """How the clients of a node take part in a run."""

    vault: Vault
    method: Method
    schedule: Schedule
    last_round: int
    population: int  # how many clients the task has

    @property
    def masked(self) -> bool:
        """Whether what is told is under masks."""
        return self.schedule.secure.aggregation == "masks"

    def step(self, kind: str, facts: Facts, parts: Parts) -> tuple[Facts, Parts]:
        """The clients' answers to one of `STEPS`, and why some have none."""

        def answer(client: int) -> bytes:
            about, round, question = str(facts["about"]), self._round(facts), parts.get(f"{kind}/{client}", b"")
            if (said := self.vault.again(client, kind, about, round, question)) is not None:
                return said
            state, told = _stepped(kind, client, self.vault.state(client), question)
            self.vault.put(client, kind, about, round, question, text := messages.packed(told), state)
            return text

        if not self.masked or facts.get("about") not in ("train", "evaluate"):
            raise WireError("the server has begun a secure sum, and the recipe has none of this kind")
        return _each(kind, facts, answer)

    def train(
        self, facts: Facts, parts: Parts, received: Iterable[tuple[int, Any]], work: Callable[[int, Any], Any]
    ) -> tuple[Facts, Parts]:
        """The parts of clients that have received a message each (K = 1).

        Args:
            facts: of the question.
            parts: of the question.
            received: the clients with their messages.
            work: gives a client's upload (K = 1), None where its work is not finite.
        """
        begin, round = perf_counter(), self._round(facts)
        letters, unsound = dict(received), list[int]()

        def answer(client: int) -> bytes:
            if self.masked:
                return self._masked(
                    client, "train", facts, parts, lambda: self._part(facts, letters[client], trained(client))
                )
            if self.schedule.privacy.level == "client":  # nothing here is random: asked again it is the same
                return packed(self._part(facts, letters[client], trained(client)))
            question = json.dumps([round, client]).encode()
            if (said := self.vault.again(client, "tell", "train", round, question)) is None:
                said = packed(tree.tensors(_without_loss(trained(client))))
                self.vault.put(client, "tell", "train", round, question, said)
            return said

        def trained(client: int) -> Any:
            upload = work(client, letters[client])
            if upload is None:
                unsound.append(client)
                raise RoundError(f"client {client}: its work is not finite, and stays with it")
            return upload

        told, answers = _each("train", facts, answer)
        return told | {"dropped": unsound, "seconds": perf_counter() - begin}, answers

    def evaluate(
        self, facts: Facts, parts: Parts, received: Iterable[tuple[int, Any]], score: Callable[[int, Any], Scores]
    ) -> tuple[Facts, Parts]:
        """The parts of the sums over tests, where there are masks; nothing where there is noise.

        Args:
            facts: of the question.
            parts: of the question.
            received: the clients with their messages.
            score: how well a client's model does on its tests.
        """
        letters = dict(received)

        def scored(client: int) -> Scores:
            found = score(client, letters[client])
            self._noted(client, self._round(facts), found)
            return found

        if self.masked and self.schedule.privacy.level == "none":
            return _each(
                "evaluate",
                facts,
                lambda client: self._masked(client, "evaluate", facts, parts, lambda: score_sums(scored(client))),
            )
        for client in letters:
            scored(client)
        return {}, {}

    def _masked(
        self, client: int, about: str, facts: Facts, parts: Parts, part: Callable[[], Params | dict[str, Any]]
    ) -> bytes:
        """The third step; the part is made when it is wanted."""
        round, secure, num_clients = (
            self._round(facts),
            self.schedule.secure,
            fact(facts, "num_clients", Number, "the server"),
        )
        question = parts.get(f"{about}/{client}", b"")
        if (said := self.vault.again(client, "mask", about, round, question)) is not None:
            return said
        state, delivery = (
            messages.unpacked(ClientState, self.vault.state(client)),
            messages.unpacked(Delivery, question),
        )
        if not 3 <= num_clients <= self.population:
            raise WireError(f"a sum over {num_clients} of {self.population} clients is none to take part in")
        own = part()
        if any(not bool(leaf.isfinite().all()) for leaf in tree.tensors(own).values()):
            raise RoundError(f"client {client}: its part of the sum is not finite, and stays with it")
        values = encoded(own, layout_of(own, secure, num_clients), num_clients)
        state, told = steps.mask(state, delivery, values, secure.bits)
        self.vault.put(
            client, "mask", about, round, question, text := messages.packed(told), messages.packed(state)
        )
        return text

    def _part(self, facts: Facts, message: Any, upload: Any) -> dict[str, Any]:
        """What the client adds to the sums, as one row (1, …), or without that axis where masks go on it."""
        privacy, cut = self.schedule.privacy, None
        if privacy.level == "client":
            groups = clipping.groups_of(self.method.contribution(upload), privacy)
            cut = Cut(groups, _clips(facts, groups.names))
        own = contributed(self.method, upload, message, cut, self.masked and privacy.level == "none")
        return tree.map_tensors(lambda leaf: leaf[0], own) if self.masked else tree.tensors(own)

    def _round(self, facts: Facts) -> int:
        round: int = fact(facts, "round", Number, "the server")
        if not 1 <= round <= self.last_round:
            raise WireError(f"round {round} is none of this run's, which ends with round {self.last_round}")
        return round

    def _noted(self, client: int, round: int, found: Scores) -> None:
        """Writes a client's scores down where its owner finds them."""
        line: dict[str, Any] = {"round": round, "client": client, "loss": found.loss.tolist()}
        line |= {} if found.accuracy is None else {"accuracy": found.accuracy.tolist()}
        path = self.vault.folder / "scores.jsonl"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(json.dumps(line) + "\n")


def score_sums(found: Scores) -> Params:
    """What a client adds to the sums over tests."""
    sums = {"loss": torch.tensor(float(found.loss.sum()), dtype=torch.float64)}
    if found.accuracy is not None:
        sums["accuracy"] = torch.tensor(float(found.accuracy.sum()), dtype=torch.float64)
    return sums | {"tests": torch.tensor(float(len(found.loss)), dtype=torch.float64)}


def _each(kind: str, facts: Facts, answer: Callable[[int], bytes]) -> tuple[Facts, Parts]:
    """Each client's own answer, whatever becomes of the others'; what went wrong is `failed`."""
    failed, told = dict[str, str](), Parts()
    for client in facts["clients"]:
        try:
            told[f"{kind}/{client}"] = answer(client)
        except (RoundError, WireError, ValueError) as error:
            failed[str(client)] = reason_of(error)
    return {"failed": failed}, told


def _stepped(kind: str, client: int, state: bytes, question: bytes) -> tuple[bytes, object]:
    """The client's packed state after a step, and what it says; the last step leaves no state."""
    if kind == "advertise":
        after, told = steps.advertise(client)
        return messages.packed(after), told
    before = messages.unpacked(ClientState, state)
    if kind == "share":
        shared, sealed = steps.share(before, messages.unpacked(Roster, question))
        return messages.packed(shared), sealed
    return b"", steps.show(before, messages.unpacked(Question, question))[1]


def _clips(facts: Facts, names: tuple[str, ...]) -> Params:
    """The round's clips, as the server has told them.

    Raises:
        WireError: they are not those of this run's sums.
    """
    told = facts.get("clips")
    if not isinstance(told, dict) or told.keys() != set(names):
        raise WireError(f"the server's clips are {told!r}, where numbers for {', '.join(names)} were expected")
    if not all(isinstance(clip, float) and isfinite(clip) and clip > 0 for clip in told.values()):
        raise WireError(f"the server's clips are {told!r}: each must be a positive number")
    return {name: torch.tensor(told[name], dtype=torch.float64) for name in names}


def _without_loss(upload: Any) -> Any:
    """The upload with nothing in the place of its training loss, which is measured without noise."""
    return replace(upload, loss=torch.zeros_like(upload.loss))
