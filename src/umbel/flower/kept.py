"""What a node's clients keep, on the node's own disk: it is written aside, put on disk and renamed.

    STATE/RUN/client-000003.safetensors     after its last round: the state then, and the state before that round

The state before is there so that a round that is asked for twice (an answer was lost, a server went on from its
last checkpoint) starts again where it started, and gives the same answer.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel import tree
from umbel.errors import WireError
from umbel.flower.wire import difference
from umbel.folder import write
from umbel.tree import Params
from umbel.untrusted import table_in, tensors_of


@dataclass(frozen=True)
class Row:
    """One client's Private (K = 1) before and after its last round."""

    round: int
    before: Any
    after: Any


@dataclass(frozen=True)
class Kept:
    """The private states of a node's clients in one run."""

    folder: Path
    fresh: Any  # the Private (K = 1) of a client that has not trained yet
    rows: dict[int, Row] = field(default_factory=dict)  # what was read or written already

    def latest(self, client: int) -> Any:
        """The Private after the client's last round."""
        row = self._row(client)
        return self.fresh if row is None else row.after

    def before(self, client: int, round: int) -> Any:
        """The Private with which the client starts the round.

        Raises:
            WireError: the client has gone further than the round after it, and what it had then is gone.
        """
        row = self._row(client)
        if row is None:
            return self.fresh
        if row.round > round:
            raise WireError(
                f"client {client} has trained up to round {row.round} and cannot go back to round {round}; "
                f"let the server go on from a later checkpoint, or begin a new run"
            )
        return row.before if row.round == round else row.after

    def knows(self, client: int) -> bool:
        """Whether anything of the client's was kept."""
        return self._row(client) is not None

    def put(self, client: int, round: int, before: Any, after: Any) -> None:
        """Keeps the client's state after a round, on disk when this returns."""
        self.rows[client] = Row(round, before, after)
        tensors = {f"before/{name}": leaf for name, leaf in tree.tensors(before).items()}
        tensors |= {f"after/{name}": leaf for name, leaf in tree.tensors(after).items()}
        write(self._path(client), _file(tensors, round), secret=True)
        settle_folder(self.folder)

    def _row(self, client: int) -> Row | None:
        if client not in self.rows and self._path(client).is_file():
            self.rows[client] = self._read(self._path(client))
        return self.rows.get(client)

    def _read(self, path: Path) -> Row:
        try:
            tensors, told = tensors_of(path)
            round = int(table_in(told["umbel"])["round"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise WireError(f"{path} is damaged ({error}); put it back, or take it away to start afresh") from None
        states = []
        for part in ("before/", "after/"):
            own: Params = {n.removeprefix(part): leaf for n, leaf in tensors.items() if n.startswith(part)}
            if wrong := difference(tree.tensors(self.fresh), own):
                raise WireError(f"{path}: {wrong}; it is of another version of umbel or of another run")
            states.append(tree.with_tensors(self.fresh, own))
        return Row(round, *states)

    def _path(self, client: int) -> Path:
        return self.folder / f"client-{client:06d}.safetensors"


def _file(tensors: Params, round: int) -> bytes:
    from safetensors.torch import save

    whole = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    return save(whole, metadata={"umbel": json.dumps({"round": round})})


def settle_folder(folder: Path) -> None:
    """Puts a folder's names on disk, so that a renamed file is found after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
