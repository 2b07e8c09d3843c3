"""A deployed run's folder: begun, and gone on with by a server that was stopped or killed.

A checkpoint is written after every round, so the server goes on from the last round that was over. Its nodes may
have done one round more: they kept what was before it (kept.py), so that round is done again, to the same bits.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from secrets import token_hex
from typing import Any

from umbel import tree
from umbel.costs import Cost
from umbel.errors import RunFolderError
from umbel.folder import RunFolder, check_free, held, read_json
from umbel.privacy.accounting import Ledger
from umbel.recipe import Recipe, build, load, read
from umbel.rounds import Progress
from umbel.runs import read_history, restored
from umbel.tasks import Task

LOG = getLogger("umbel")
HANDOVER = 60.0  # seconds for a server that was stopped to let go of its folder


@dataclass(frozen=True)
class Begun:
    """A run before its next round."""

    run: str  # 16 hex digits, under which nodes keep what their clients keep
    progress: Progress
    history: tuple[dict[str, Any], ...] = ()
    cost: Cost | None = None  # of one client in a round
    absent: frozenset[int] = frozenset()  # clients that no node had when the run began
    noise_multiplier: float = 0.0  # with which a run that protects was begun
    folder: RunFolder | None = None


def begun_anew(first: Progress) -> Begun:
    """A run that nobody knows yet, before its first round."""
    return Begun(token_hex(8), first)


def written(
    path: Path, recipe: Recipe, task: Task, begun: Begun, ledger: Ledger | None, stack: ExitStack
) -> RunFolder:
    """A new folder for the run, which is this process's until the stack is left."""
    num_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tree.tensors(begun.progress.shared).values())
    assert begun.cost is not None
    facts = {"task": task.name, "num_clients": task.num_clients, "chunk": 1, "cost": asdict(begun.cost)}
    facts |= {"schedule": asdict(recipe.schedule), "engine": asdict(recipe.engine)}
    facts |= {"deployed": begun.run, "absent": sorted(begun.absent)}
    if ledger is not None:
        facts |= {"last_round": ledger.last_round, "privacy": asdict(ledger.privacy)}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.create(path, recipe.identity(), recipe.table(), facts, num_bytes)
    stack.enter_context(held(path, HANDOVER))
    return folder


def stopped(path: Path, recipe: Recipe, stack: ExitStack) -> RunFolder | None:
    """The folder of a run of this recipe that was stopped before its end, or None where there is nothing.

    Until the stack is left it is this process's: no two servers lead one run.

    Raises:
        RunFolderError: there is something else, or another server leads the run.
    """
    if not path.exists():
        return None
    if not is_deployed(path):
        check_free(path)
    if not is_unfinished(path):
        raise RunFolderError(f"{path} holds a run that is over, and is left as it is; name another folder")
    folder = RunFolder.opened(path, recipe.identity())
    if folder.facts()["identity"] != folder.identity:
        here, there = recipe.identity(), read(load(path / "recipe.toml"), recipe.label).identity()
        key = next((key for key in {**there, **here} if there.get(key) != here.get(key)), "something")
        raise RunFolderError(
            f"{path} holds a run of another recipe: it says {key} = {there.get(key)}, this one {here.get(key)}; "
            f"go on with its own, or name another folder"
        )
    stack.enter_context(held(path, HANDOVER))
    return folder


def begun_before(folder: RunFolder, first: Progress) -> Begun:
    """The run at its newest whole checkpoint; later rounds' figures are taken off its folder.

    Args:
        folder: of `stopped`.
        first: the state before round 1, in which the run was begun.

    Raises:
        RunFolderError: no checkpoint is whole, it is of another version of umbel, or it is an older one with
            which a round would be done again whose noise is the server's.
    """
    facts = folder.facts()
    checkpoint, warnings = folder.latest()
    for warning in warnings:
        LOG.warning("%s", warning)
    if warnings and facts["schedule"]["privacy"]["level"] == "client":
        raise RunFolderError(
            f"{warnings[0]}; to go on from an older checkpoint would be to tell of a round twice, which ε counts "
            "once; put it back, or begin a new run"
        )
    at = first if checkpoint is None else restored(first, checkpoint, folder.path)
    folder.rewind(at.round)
    LOG.info("the run in %s goes on after round %d", folder.path, at.round)
    history = tuple(read_history(folder.path))
    return Begun(
        facts["deployed"],
        at,
        history,
        build(Cost, facts["cost"], "cost"),
        frozenset(facts["absent"]),
        float(facts.get("privacy", {}).get("noise_multiplier", 0.0)),
        folder,
    )


def is_deployed(path: Path) -> bool:
    """Whether the folder is of a run across machines that can be gone on with."""
    return (path / "run.json").is_file() and "absent" in read_json(path / "run.json")


def is_unfinished(path: Path) -> bool:
    """Whether a run folder lacks the checkpoint of its last round."""
    facts = read_json(path / "run.json")
    return last_round(path) < int(facts.get("last_round", facts["schedule"]["rounds"]))  # or where its budget ends


def last_round(path: Path) -> int:
    """The round of a run folder's newest checkpoint, 0 if there is none."""
    return max((int(listing.stem) for listing in (path / "checkpoints").glob("[0-9]*.json")), default=0)
