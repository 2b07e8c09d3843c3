"""What a client remembers of a secure sum between two messages, on the node's own disk; it is secret.

    STATE/RUN/secret-000003.msgpack     for its owner's eyes (mode 0600); written aside, put on disk and renamed

It is on disk, for Flower's own SuperNodes start a process for each message, and a node that was started again goes
on with the round instead of dropping out. A client's keys are there from its first step to its last and then gone;
a round that is never ended leaves them until the client's next one. What stays is which rounds it has given its
part of: it gives it once, for two sums with other companions would tell it by their difference.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from umbel.errors import WireError
from umbel.flower.kept import settle_folder
from umbel.folder import write
from umbel.secure.messages import packed, unpacked

BEFORE = {"share": "advertise", "mask": "share", "show": "mask"}
"""A step → the one that it comes after; others begin."""


@dataclass(frozen=True)
class Step:
    """What a client was asked last in a sum, and what it said."""

    kind: str  # "advertise", "share", "mask"; "tell": its part without a mask, which has no other step
    about: str  # "train" or "evaluate"
    round: int
    asked: bytes  # a hash of the question
    answer: bytes
    state: bytes  # a packed ClientState


@dataclass(frozen=True)
class Page:
    """What one client remembers."""

    given: dict[str, int] = field(default_factory=dict)  # the last round it has given its part of, by what about
    step: Step | None = None


@dataclass(frozen=True)
class Vault:
    """What the clients of one run remember."""

    folder: Path

    def again(self, client: int, kind: str, about: str, round: int, question: bytes) -> bytes | None:
        """What the client has answered to this very question; None where it is new and its turn has come.

        Raises:
            WireError: its turn has not come, or the client has given its part of the round.
        """
        page = self._page(client)
        step = page.step
        if step is not None and (step.kind, step.about, step.round) == (kind, about, round):
            if step.asked == _hash(question):
                return step.answer
            if kind != "advertise":
                raise WireError(f"client {client} has answered another {kind!r} of round {round}; it answers once")
        if kind not in BEFORE:
            if round <= page.given.get(about, 0):
                raise WireError(
                    f"client {client} has given its part of round {page.given[about]} ({about}) and gives none of "
                    f"round {round}: it gives each once"
                )
        elif step is None or (step.kind, step.about, step.round) != (BEFORE[kind], about, round):
            raise WireError(f"client {client}: {kind!r} of round {round} does not follow from what it was asked")
        return None

    def state(self, client: int) -> bytes:
        """What the client's last step has left for the next one."""
        step = self._page(client).step
        return b"" if step is None else step.state

    def put(
        self, client: int, kind: str, about: str, round: int, question: bytes, answer: bytes, state: bytes = b""
    ) -> None:
        """Keeps a step, on disk when this returns; after the last one no secret is left."""
        given = self._page(client).given
        if kind in ("mask", "tell"):
            given = given | {about: round}
        step = Step(kind, about, round, _hash(question), answer, state)
        write(self._path(client), packed(Page(given, None if kind == "show" else step)), secret=True)
        settle_folder(self.folder)

    def _page(self, client: int) -> Page:
        path = self._path(client)
        if not path.is_file():
            return Page()
        try:
            return unpacked(Page, path.read_bytes())
        except ValueError as error:
            raise WireError(f"{path}: {error}; the client takes no part until it is removed") from None

    def _path(self, client: int) -> Path:
        return self.folder / f"secret-{client:06d}.msgpack"


def _hash(question: bytes) -> bytes:
    return hashlib.sha256(question).digest()
