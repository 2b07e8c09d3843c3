"""A whole run, led from the server: its nodes are gathered, its rounds done, and its folder kept."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from umbel import tree
from umbel.costs import cost_of
from umbel.errors import DeployError, RecipeError
from umbel.flower.answers import Uploads
from umbel.flower.arriving import most_bytes
from umbel.flower.attendance import Attendance
from umbel.flower.exchange import LOG, Exchange, Patience
from umbel.flower.fingerprint import fingerprint
from umbel.flower.fleet import Nodes
from umbel.flower.protected import check_protection, counts_are_told
from umbel.flower.resume import begun_anew, begun_before, stopped, written
from umbel.hazards import Faults
from umbel.meeting import ledger
from umbel.privacy.accounting import Ledger
from umbel.recipe import Recipe
from umbel.rounds import Progress, participants, rounds, sampled, start
from umbel.runs import Result, record
from umbel.schedule import Schedule
from umbel.tasks import Task
from umbel.tasks.pool import arranged

if TYPE_CHECKING:
    from flwr.serverapp import Grid


def lead(
    grid: "Grid",
    recipe: Recipe,
    folder: Path | None = None,
    patience: Patience | None = None,
    on_round: Callable[[Progress], None] | None = None,
    share: float = 1.0,
) -> Result:
    """The whole run, with clients on the nodes of Flower's grid.

    Args:
        grid: Flower's.
        recipe: what to run.
        folder: where to keep recipe, metrics and checkpoints: a new one, or that of a run of this recipe that was
            stopped, which is gone on with.
        patience: how long to wait for nodes.
        on_round: called after every round.
        share: of the clients, which have to be there before a run is begun.

    Raises:
        UmbelError: nodes are missing, no client's work could be used, or the folder holds something else.
    """
    refuse_simulated(recipe.schedule)
    check_protection(recipe.schedule)
    # What a round spends depends on how many examples each client has, which its node tells.
    by_example = recipe.schedule.privacy.level == "example"
    if not 0 <= share <= 1 or (by_example and share < 1):
        raise RecipeError(
            f"begin = {share}: it is a share of the clients, from 0 to 1, and 1 with privacy.level = 'example', "
            "whose ε cannot be told before all of them have said how many examples they have"
        )
    with ExitStack() as stack:
        before = None if folder is None else stopped(folder, recipe, stack)
        task = recipe.task.load(recipe.schedule.seed)
        task = arranged(task, recipe.schedule)
        cohort, first = start(task, recipe.method, recipe.schedule, replace(recipe.engine, mode="looped"))
        cohort = replace(cohort, secret=True)
        begun = begun_anew(first) if before is None else begun_before(before, first)
        counted, members = _countable(task), participants(task.num_clients, recipe.schedule)
        forms = Uploads(cohort, first.shared, first.store.fresh(1))
        exchange = Exchange(grid, begun.run, patience or Patience(), _most(forms, task.num_clients))
        base = fingerprint(recipe.task, counted, first.shared)
        attendance = Attendance(exchange, recipe, counted, base, begun.absent)
        attendance.gather(share if before is None or by_example else recipe.schedule.faults.quorum)
        if by_example:
            cohort = replace(cohort, ledger=_spent(counted, recipe, attendance, begun.noise_multiplier))
        if before is None:
            attendance.newcomers = frozenset({*members.tolist()} - attendance.roster.homes.keys())
            cost = cost_of(cohort, first.shared, first.store, members[:1])
            if not counts_are_told(recipe.schedule):
                cost = replace(cost, flops={}, steps={})
            begun = replace(begun, cost=cost, absent=attendance.newcomers)
            if folder is not None:
                begun = replace(begun, folder=written(folder, recipe, task, begun, cohort.ledger, stack))
        nodes = Nodes(exchange, recipe.schedule, counted, cohort, first.shared, attendance, forms)
        at, history = begun.progress, list(begun.history)
        # Nodes keep what was before their last round only, so no checkpoint may be older than that.
        schedule = replace(recipe.schedule, checkpoint_every=1)
        for progress in rounds(cohort, at, counted, recipe.schedule, begun.cost, nodes):
            at = progress
            history.append(at.figures)
            if begun.folder is not None:
                record(begun.folder, at, counted, schedule)
            nodes.score_for_owners()
            if on_round is not None:
                on_round(at)
    return Result(counted, recipe.schedule, cohort, at, history, [])


def _countable(task: Task) -> Task:
    """The task with counts of its own, for nodes to tell."""
    train = task.train
    slots = None if train.slots is None else train.slots.copy()
    return replace(task, train=replace(train, count=train.count.copy(), slots=slots))


def _spent(counted: Task, recipe: Recipe, attendance: Attendance, noise_multiplier: float) -> Ledger | None:
    """What a run spends of examples' privacy, by the numbers of them that nodes have told.

    A run that is gone on with keeps the noise that it was begun with (`noise_multiplier`, else 0).

    Raises:
        DeployError: with these numbers nothing can be protected; it names those who have told the outermost ones.
    """
    schedule, members = recipe.schedule, participants(counted.num_clients, recipe.schedule)
    order = members[counted.train.count[members].argsort(kind="stable")]
    fewest, most = (
        f"client {client} on {attendance.exchange.name(attendance.roster.homes[client])} "
        f"has {counted.train.count[client]} examples"
        for client in order[[0, -1]].tolist()
    )
    LOG.info("%s, the fewest of all, which the noise on examples goes by", fewest)
    cohorts = (sampled(members, schedule, round) for round in range(1, schedule.rounds + 1))
    noise = noise_multiplier or schedule.privacy.noise_multiplier
    kept = replace(schedule, privacy=replace(schedule.privacy, noise_multiplier=noise))
    try:
        return ledger(counted, recipe.method, kept, cohorts)
    except (RecipeError, ValueError, OverflowError) as error:
        raise DeployError(f"{error}; nodes say: {fewest}, the fewest of all, and {most}, the most") from None


def refuse_simulated(schedule: Schedule) -> None:
    """Raises RecipeError if a recipe asks for what only the simulator does: all of [faults] but a quorum."""
    here = {
        "faults": replace(schedule.faults, quorum=0.0) != Faults(),
        "attack": schedule.attack.kind != "none",
        "asynchronous": schedule.asynchronous.buffer > 0,
    }
    if asked := [name for name, wanted in here.items() if wanted]:
        raise RecipeError(
            f"[{asked[0]}] is for the simulator so far (umbel run); leave it out of a deployed recipe"
            f"{', but for its quorum' if asked[0] == 'faults' else ''}"
        )
    if schedule.validation:
        raise RecipeError(
            "validation is for searches in the simulator (umbel tune); leave it out of a deployed recipe"
        )


def _most(forms: Uploads, num_clients: int) -> int:
    """Bytes of an answer, whatever was asked; what is longer is never put together."""
    shared, own = (sum(leaf.nbytes for leaf in tree.tensors(s).values()) for s in (forms.first, forms.pattern))
    return most_bytes(num_clients, shared + own, num_clients)
