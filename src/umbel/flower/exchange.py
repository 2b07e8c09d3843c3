"""Questions to nodes and their answers, whatever becomes of nodes and messages meanwhile.

A question may be asked twice: a node's answer to the same question is the same (kept.py). So whoever was gone and
comes back is asked again, and an answer that comes twice, or too late, is dropped and counted.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging import getLogger
from typing import TYPE_CHECKING

from umbel.errors import WireError
from umbel.flower.arriving import messages
from umbel.flower.post import KINDS, content_of, opened
from umbel.flower.wire import Facts, Parts
from umbel.untrusted import plain

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

LOG = getLogger("umbel")
POLL = 0.1  # seconds between two looks for answers, at first
LAG, IDLE = 0.02, 2.0  # later a pause is that part of the time waited, up to so many seconds
EASE = 4.0  # how many times longer a pause is than the look before it took
LOOK = 2.0  # seconds between two looks for nodes that are gone, or new
GONE = {3, 4, 5}  # Flower's ErrorCode where a message, or its node, is not there


@dataclass(frozen=True)
class Patience:
    """How long the server waits, in seconds."""

    nodes: float = 300.0  # for clients to be there: all before the first round, enough of them in a later one
    deadline: float = 3600.0  # for a round's uploads, and for its scores
    answer: float = 3600.0  # for any other answer, and for one that is late
    gone: float = 30.0  # for a node that is offline to come back


@dataclass(frozen=True)
class Trouble:
    """Why a node's answer, or a client's upload, does not count."""

    reason: str  # "late", "missing", "refused", "failed", "malformed", "not finite"
    told: str

    def __str__(self) -> str:
        """In words."""
        return self.told


@dataclass
class Exchange:
    """One run's questions and answers over Flower's grid."""

    grid: "Grid"
    run: str  # 16 hex digits, which nodes know the run by
    patience: Patience
    most: int = 1 << 30  # bytes of an answer; what is longer is never put together
    names: dict[int, str] = field(default_factory=dict)  # of nodes
    traffic: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})  # bytes of tensors
    overdue: dict[str, tuple[int, float]] = field(default_factory=dict)  # message → node, until when it may come
    duplicates: int = 0  # answers that came twice, since somebody looked

    def name(self, node: int) -> str:
        """What the node is called in messages."""
        return f"node {self.names.get(node, node)!r}"

    def online(self) -> set[int]:
        """The nodes that the SuperLink takes for online."""
        return set(self.grid.get_node_ids())

    def ask(
        self,
        kind: str,
        questions: dict[int, tuple[Facts, Parts]],
        troubles: dict[int, Trouble],
        seconds: float | None = None,
    ) -> Iterator[tuple[int, Facts, Parts]]:
        """The answers as they come; in `troubles` why a node has given none.

        A node that has not answered an earlier question yet is not asked: it would come to this one too late.

        Args:
            kind: "hello", "train" or "evaluate".
            questions: what each node is asked.
            troubles: is added to.
            seconds: until the deadline; as long as for any answer if it is not said.
        """
        self.pull({}, {})
        busy = {node for node, _ in self.overdue.values()}
        troubles |= {
            node: Trouble("late", f"{self.name(node)} is still at an earlier question")
            for node in questions
            if node in busy
        }
        pending = {node: own for node, own in questions.items() if node not in busy}
        waiting, away = self.push(kind, pending), dict[int, float]()
        begin = looked = time.monotonic()
        end = begin + (self.patience.answer if seconds is None else seconds)
        while pending:
            before = time.monotonic()
            answers = self.pull(waiting, troubles)
            took = time.monotonic() - before
            for node in {*(node for node, _, _ in answers), *troubles} & {*pending}:
                del pending[node]
            yield from answers
            now = time.monotonic()
            if now - looked > LOOK:
                looked, online = now, self.online()
                away = {node: away.get(node, now) for node in pending if node not in online}
                asked = {*away, *waiting.values()}
                waiting |= self.push(kind, {node: own for node, own in pending.items() if node not in asked})
            for node in [node for node, since in away.items() if now - since > self.patience.gone]:
                if pending.pop(node, None):
                    troubles[node] = Trouble("missing", f"{self.name(node)} is offline")
            if before > end and not answers:  # what came in time has been found
                for node in pending:
                    troubles[node] = Trouble("late", f"{self.name(node)} has not answered for {now - begin:.0f} s")
                still = {name: node for name, node in waiting.items() if node in pending}
                self.overdue |= {name: (node, now + self.patience.answer) for name, node in still.items()}
                return
            if pending and not answers:
                time.sleep(max(POLL, EASE * took, min(IDLE, LAG * (now - begin))))

    def push(self, kind: str, questions: dict[int, tuple[Facts, Parts]]) -> dict[str, int]:
        """Sends the questions; the messages' names, and whom they are to, but for nodes that are not there."""
        if not questions:
            return {}
        from flwr.app import Message

        sent, ttl = [], self.patience.deadline + self.patience.answer  # as long as anybody looks for the answer
        for node, (facts, parts) in questions.items():
            self.traffic["down"] += sum(map(len, parts.values()))
            content, group = content_of(facts | {"run": self.run}, parts), str(facts.get("round", ""))
            sent.append(Message(content, node, KINDS[kind], ttl=ttl, group_id=group))
        # A name is missing where the SuperLink did not take the message: its node is gone.
        return {n: node for n, node in zip(self.grid.push_messages(sent), questions, strict=True) if n}

    def pull(self, waiting: dict[str, int], troubles: dict[int, Trouble]) -> list[tuple[int, Facts, Parts]]:
        """The answers that are there now, which are taken out of `waiting`, as is what was lost on the way.

        Answers to questions whose time was up, and those that come twice, are dropped.
        """
        now = time.monotonic()
        self.overdue = {name: own for name, own in self.overdue.items() if own[1] > now}
        names, found = [*waiting, *self.overdue], []
        for answer in messages(self.grid, names, self.most) if names else ():
            name = answer.metadata.reply_to_message_id
            if name not in waiting:
                self._drop(name, answer)
                continue
            node = waiting.pop(name)
            who = self.name(node)
            if answer.has_error():
                if answer.error.code not in GONE:
                    troubles[node] = Trouble("failed", f"{who}: {plain(answer.error.reason, 1000)}")
                continue
            try:
                facts, parts = opened(answer.content, who)
            except WireError as error:
                troubles[node] = Trouble("malformed", str(error))
                continue
            self.traffic["up"] += sum(map(len, parts.values()))
            if "refused" in facts:
                troubles[node] = Trouble("refused", plain(facts["refused"], 1000))
            else:
                found.append((node, facts, parts))
        return found

    def _drop(self, name: str, answer: "Message") -> None:
        if name in self.overdue:
            node, _ = self.overdue.pop(name)
            LOG.info("%s has answered a question whose time was up; the answer is dropped", self.name(node))
        elif not answer.has_error():
            self.duplicates += 1
            LOG.error("node %s has answered twice; the second answer is dropped", answer.metadata.src_node_id)
