"""How a round's uploads become the server's next state.

as they come          `server_step`, by itself, or with a robust rule in place of the mean
without a deadline    the same, of `late_uploads`
as one sum            `meet`: under masks, with noise, or both
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.clock import Step, added, stepped
from umbel.cohort import Cohort, PrivateStore, Tally
from umbel.errors import RecipeError
from umbel.faults import without_outliers
from umbel.methods import Method
from umbel.methods.protocol import Way, why_not
from umbel.methods.routing import bounded_claims
from umbel.model.loss import mixes_examples
from umbel.privacy import clipping
from umbel.privacy.accounting import Ledger, Mechanism, Use, ledger_of
from umbel.robust import rule_of
from umbel.schedule import Schedule
from umbel.secure.exchange import SecureSum, secure_sum
from umbel.tasks.task import Task
from umbel.tree import Params

LOSS = "train_loss"  # what a masked sum calls the clients' mean training losses, where nothing else is protected


@dataclass(frozen=True)
class Met:
    """The server's state after a round."""

    shared: Any
    clips: Params  # of the next round
    figures: dict[str, float] = field(default_factory=dict)
    bytes_up: int | None = None  # where they are not those of the uploads
    bytes_down: int = 0  # beside the message


@dataclass(frozen=True)
class Cut:
    """What every client's part of the sums is cut to before it leaves the client."""

    groups: clipping.Groups
    clips: Params

    def of(self, own: dict[str, Any]) -> dict[str, Any]:
        """One client's part, cut."""
        return clipping.clipped(own, self.groups, self.clips)


@dataclass(frozen=True)
class Total:
    """The sum over a round's clients, however it was come by."""

    sums: dict[str, Any] | None  # None where nobody's part has come
    steps: dict[str, float] = field(default_factory=dict)  # to which masked numbers were rounded, by tensor
    figures: dict[str, float] = field(default_factory=dict)
    bytes_up: int | None = None  # where they are not those of the uploads
    bytes_down: int = 0  # beside the message


def check(task: Task, method: Method, schedule: Schedule) -> None:
    """Raises RecipeError where uploads of the method cannot meet in the way that is asked for."""
    level = schedule.privacy.level
    if task.labels_each and (why := why_not(method, "own_labels")):
        raise RecipeError(
            f"{task.name} has labels of each task's own, which {type(method).__name__} cannot: {why}"
        )
    if task.loss != "cross_entropy" and (why := why_not(method, "numbers")):
        raise RecipeError(
            f"the loss of {task.name} is {task.loss!r}, with which {type(method).__name__} fails: {why}"
        )
    for setting, way in ways_asked_for(schedule):
        if why := why_not(method, way):
            raise RecipeError(f"{setting} does not go with {type(method).__name__}: {why}")
    _check_mean(task, schedule)
    if schedule.asynchronous.buffer and schedule.robust.rule != "none" and getattr(method, "prune_below", 0):
        raise RecipeError(
            "asynchronous.buffer does not go with robust.rule and prune_below: uploads that began before adapters "
            "were pruned have more of them than the others; leave one of the three out"
        )
    if schedule.asynchronous.buffer and getattr(method, "explore_rank", 0):
        raise RecipeError(
            "asynchronous.buffer does not go with explore_rank: uploads that began before adapters were cut have "
            "more ranks than the others; leave one of the two out"
        )
    if level == "client":
        if schedule.weighting.rule != "one":
            raise RecipeError(
                f"privacy.level = 'client' bounds what one client adds, and weighting.rule = "
                f"{schedule.weighting.rule!r} lets it add more the more it has; write weighting.rule = 'one'"
            )
        if task.owner is not None and len(np.unique(task.owner.cpu().numpy())) < task.num_clients:
            raise RecipeError(
                "privacy.level = 'client' would protect single slots, and here some owners have several of them; "
                "set pool = true, so that an owner is one client"
            )
    if level == "example":
        if schedule.weighting.rule not in ("examples", "uniform", "one"):
            raise RecipeError(
                f"privacy.level = 'example' does not go with weighting.rule = {schedule.weighting.rule!r}, which "
                "tells of labels or losses without noise; take 'examples', 'uniform' or 'one'"
            )
        if mixes_examples(task.model):
            raise RecipeError(
                "privacy.level = 'example' does not go with BatchNorm, in which examples meet: no example has a "
                "gradient of its own; put another norm layer in the model, such as GroupNorm"
            )


def ways_asked_for(schedule: Schedule) -> list[tuple[str, Way]]:
    """The settings by which uploads do not meet as they are, each with a way in which they then do."""
    rule, level = schedule.robust.rule, schedule.privacy.level
    every: list[tuple[bool, str, Way]] = [
        (rule != "none", f"robust.rule = {rule!r}", "mean"),
        (schedule.asynchronous.buffer > 0, "asynchronous.buffer", "mean"),
        (schedule.secure.aggregation == "masks", "secure.aggregation = 'masks'", "sum"),
        (level == "client", "privacy.level = 'client'", "sum"),
        (level == "client", "privacy.level = 'client'", "moves"),
        (level == "example", "privacy.level = 'example'", "steps"),
    ]
    return [(setting, way) for asked, setting, way in every if asked]


def _check_mean(task: Task, schedule: Schedule) -> None:
    """Raises RecipeError if something is to stand in for the mean of uploads where there is none."""
    buffer = schedule.asynchronous.buffer
    members = task.num_clients - round(schedule.held_out * task.num_clients)
    if buffer > members:
        raise RecipeError(f"asynchronous.buffer = {buffer} is never full, for {members} clients take part")
    asked = ways_asked_for(schedule)
    meant, summed = ([setting for setting, own in asked if own == way] for way in ("mean", "sum"))
    if meant and summed:
        raise RecipeError(
            f"{meant[0]} does not go with {summed[0]}: it needs every upload by itself, and there the server "
            "takes a sum"
        )
    if schedule.faults.corrupt and schedule.secure.aggregation == "masks":
        raise RecipeError(
            "faults.corrupt does not go with secure.aggregation = 'masks': nobody can see that a masked upload is "
            "damaged; drop_out and straggle do"
        )


def ledger(task: Task, method: Method, schedule: Schedule, cohorts: Iterable[np.ndarray]) -> Ledger | None:
    """What the run will have spent after every round, None where nothing is protected.

    Args:
        task: whose clients.
        method: whose local training, where examples are protected.
        schedule: the rounds, and the settings.
        cohorts: the clients of each round; who they are decides nothing but how often an example was looked at.
    """
    privacy, size = schedule.privacy, schedule.clients_per_round
    rounds = range(1, schedule.rounds + 1)
    if privacy.level == "none":
        return None
    members = task.num_clients - round(schedule.held_out * task.num_clients)
    if privacy.level == "client":
        mechanism = Mechanism(min(size or members, members), members, privacy.sampling == "fixed")
        return ledger_of(privacy, [Use(mechanism, tuple(rounds))])
    local, counts = method.local, task.train.count
    everyone = ClientData(task.train, np.arange(task.num_clients), schedule.seed, 1)
    steps = everyone.own_steps(local.batch_size, local.epochs, local.steps)
    taken, most = np.zeros_like(steps), {int(count): list[int]() for count in np.unique(counts) if count}
    for clients in cohorts:
        taken[clients] += steps[clients]
        for count, times in most.items():
            times.append(int(taken[counts == count].max()))
    return ledger_of(
        privacy,
        [Use(Mechanism(min(local.batch_size, count), count), tuple(times)) for count, times in most.items()],
    )


def server_step(cohort: Cohort, shared: Any, uploads: Iterator[Any], schedule: Schedule, tally: Tally) -> Any:
    """The server's state after these uploads of a round; what it was where there is none, or none that counts.

    Single uploads are compared, and held until all are in, only where damage is to be found or a mean made robust.
    """
    method, robust, faults = cohort.method, schedule.robust, schedule.faults
    if faults.corrupt and faults.outlier:
        held, outliers = without_outliers(list(uploads), faults.outlier)
        if outliers:
            tally.num_uploads -= outliers
            tally.lose({"outlier": outliers})
        uploads = iter(held)
    counted = [0.0]

    def weighed(uploads: Iterator[Any]) -> Iterator[Any]:
        for upload in uploads:
            counted[0] += float(upload.weight.sum()) if hasattr(upload, "weight") else len(upload.loss)
            yield upload

    uploads = weighed(uploads)
    first = next(uploads, None)
    if first is None:
        return shared
    if robust.rule == "none":
        after = method.server_update(shared, chain([first], uploads))
        return after if counted[0] else shared
    every = tree.map_tensors(lambda *leaves: torch.cat(leaves), first, *uploads)
    if len(tally.clients) == len(every.loss):  # stacked ones come by their size, and of equals the first wins
        every = tree.rows(every, torch.tensor(tally.clients, device=every.loss.device).argsort())
    everyone = torch.zeros(len(every.loss), dtype=torch.long, device=every.loss.device)
    message = method.send(shared, everyone)  # all have received the same
    every = method.changed(bounded_claims(every, robust.heaviest), message, rule_of(robust))
    return method.server_update(shared, iter([every])) if counted[0] else shared


def late_uploads(
    cohort: Cohort,
    begun: dict[int, Any],
    store: PrivateStore,
    step: Step,
    round: int,
    power: float,
    tally: Tally,
) -> Iterator[Any]:
    """The uploads of an asynchronous step, as if from where the server is now; what began long ago counts less.

    `begun` are the server's states by the number of its steps, the last of them where it is.
    """
    method, now, weights = cohort.method, begun[round - 1], cohort.weights_of(step.clients)
    for version in np.unique(step.versions).tolist():
        stale = round - 1 - version
        late = step.clients[step.versions == version]
        for upload in cohort.uploads(begun[version], store, late, round, tally, weights, some=False):
            if stale:
                share = (1 + stale) ** -power
                everyone = torch.zeros(len(upload.loss), dtype=torch.long, device=upload.loss.device)
                received, here = (method.send(state, everyone) for state in (begun[version], now))
                moved = method.changed(upload, received, stepped(share))
                yield method.changed(moved, here, added(share))
            else:
                yield upload
    if len(tally.dropped) == len(step.clients):
        raise cohort.nobody(round)


def meet(
    cohort: Cohort,
    shared: Any,
    total: Callable[[Cut | None], Total],
    form: Callable[[], Any],
    round: int,
    schedule: Schedule,
    clips: Params,
) -> Met:
    """The round in which the server takes nothing but a sum.

    Args:
        cohort: whose method, and what the run spends.
        shared: the server's state.
        total: the sum over the round's clients, each of whose parts is cut as asked for.
        form: an upload (1, …) for its form alone; what is in it is looked at by nobody.
        round: its number.
        schedule: with the settings of [secure] and [privacy].
        clips: of this round; {} before the first one.
    """
    method: Any = cohort.method
    privacy = cohort.ledger.privacy if cohort.ledger is not None else schedule.privacy
    if privacy.level != "client":
        found = total(None)
        sums = found.sums or {}
        counts = all(float(sums[name]) > 0 for name in clipping.COUNTS if name in sums)
        after = method.summed_update(shared, sums) if sums and counts else shared
        return Met(after, clips, found.figures, found.bytes_up, found.bytes_down)
    like = method.contribution(form())
    groups = clipping.groups_of(like, privacy)
    clips = clips or clipping.first_clips(groups, privacy)
    cut = Cut(groups, clips)
    found = total(cut)
    # Where nobody's part has come, with Poisson draws because nobody was drawn, the round is noise.
    nothing = tree.map_tensors(torch.zeros_like, cut.of(like))
    sums = nothing if found.sums is None else found.sums
    slack = _slack(nothing, found.steps)
    expected = float(min(schedule.clients_per_round or cohort.num_members, cohort.num_members))
    sums = clipping.noised(sums, groups, clips, None if cohort.secret else cohort.seed, round, slack)
    whole = method.absolute(shared, clipping.divided(sums, groups, like, expected))
    run = round / max(1, cohort.num_rounds)
    following = clipping.next_clips(sums, groups, clips, privacy, expected, run)
    figures = {f"clip_{name}": float(clip) for name, clip in clips.items()} | found.figures
    after = _sound(method.summed_update(shared, whole))
    return Met(after, following, figures, found.bytes_up, found.bytes_down)


def _sound(shared: Any) -> Any:
    """The state, with variances that noise has made negative at 0."""
    every = tree.tensors(shared)
    below = {name: leaf.clamp(min=0) for name, leaf in every.items() if name.endswith("running_var")}
    return tree.with_tensors(shared, every | below) if below else shared


def total_here(
    cohort: Cohort,
    shared: Any,
    store: PrivateStore,
    clients: np.ndarray,
    round: int,
    schedule: Schedule,
    cut: Cut | None,
    tally: Tally,
) -> Total:
    """The sum over these clients, who train on this machine; under masks if the schedule says so."""
    method, masked = cohort.method, schedule.secure.aggregation == "masks"
    # Who has received what makes no difference: options with which messages differ are refused.
    message = method.send(shared, cohort.index(clients[:1] if len(clients) else np.zeros(1, dtype=np.int64)))
    uploads = cohort.uploads(shared, store, clients, round, tally)
    if not masked:
        parts = [
            tree.map_tensors(lambda leaf: leaf.sum(0), contributed(method, upload, message, cut))
            for upload in uploads
        ]
        return Total(mixing.total(parts) if parts else None)
    told = schedule.privacy.level == "none"
    rows = dict(_rows((contributed(method, upload, message, cut, told) for upload in uploads), tally))
    if not rows:
        return Total(None)
    return opened_total(
        secure_sum(clients.tolist(), rows, schedule.secure), next(iter(rows.values())), tally if told else None
    )


def contributed(
    method: Method, upload: Any, message: Any, cut: Cut | None, with_loss: bool = False
) -> dict[str, Any]:
    """(K, …) what each of an upload's clients adds to the sums: cut, or as it is, and its training loss."""
    if cut is not None:
        return single(method, method.changed(upload, message, mixing.moved), cut.of)
    return single(method, upload) | ({LOSS: upload.loss} if with_loss else {})


def opened_total(found: SecureSum, like: dict[str, Any], tally: Tally | None) -> Total:
    """The sum that masks were on, in the form of a contribution; the tally, if given, is told training losses."""
    sums = tree.with_tensors(like, found.sums)
    if tally is not None:
        tally.loss_sum, tally.num_losses = float(sums.pop(LOSS)), found.num_clients
    steps = dict(zip(found.layout.names, found.layout.steps, strict=True))
    return Total(sums, steps, found.figures(), found.bytes_up, found.bytes_down)


def single(
    method: Method, upload: Any, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda own: own
) -> dict[str, Any]:
    """(K, …) what each of an upload's clients adds to the sums, all of them at once, each changed by itself."""

    def of_one(values: Params) -> dict[str, Any]:
        return change(
            method.contribution(tree.with_tensors(upload, {n: x.unsqueeze(0) for n, x in values.items()}))
        )

    found: dict[str, Any] = torch.func.vmap(of_one)(tree.tensors(upload))
    return found


def one_upload(cohort: Cohort, shared: Any, store: PrivateStore, client: np.ndarray) -> Any:
    """An upload (1, …) for its form alone: what is in it is looked at by nobody."""
    method = cohort.method
    local: Any = replace(method.local, epochs=1, steps=1)
    data = replace(cohort, method=replace(method, local=local))  # type: ignore[type-var]
    return data.update(shared, store, client, 1, np.ones(1))[0]


def _rows(stacked: Iterable[dict[str, Any]], tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each client with its row of what `single` gave, as uploads pass by."""
    for part in stacked:
        for place, client in enumerate(tally.clients[-len(next(iter(tree.tensors(part).values()))) :]):
            yield client, tree.map_tensors(lambda leaf: leaf[place], part)  # noqa: B023


def _slack(like: dict[str, Any], steps: dict[str, float]) -> dict[str, float]:
    """By how much rounding to whole steps may have lengthened each group: half a step in every number."""
    leaves, squares = tree.tensors(like), dict.fromkeys(like, 0.0)
    for name, step in steps.items():
        squares[name.partition("/")[0]] += leaves[name].numel() * (step / 2) ** 2
    return {name: square**0.5 for name, square in squares.items()}
