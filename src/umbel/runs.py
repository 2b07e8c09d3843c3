"""A whole run: from a task and a method to every client's personal model, in a folder if one is wanted."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from umbel import tree
from umbel.cohort import Cohort, Engine, PrivateStore
from umbel.costs import Cost, cost_of
from umbel.errors import DataError, RunFolderError
from umbel.folder import (
    SNAPSHOT_CLIENTS,
    SNAPSHOTS,
    TRUST_CLIENTS,
    Checkpoint,
    RunFolder,
    check_free,
    held,
    read_lines,
)
from umbel.meeting import LOSS, one_upload
from umbel.methods import METHODS, Method
from umbel.model.copies import copied
from umbel.privacy import clipping
from umbel.ranges import check_groups
from umbel.recipe import Recipe, build, labels, load, name_of, read
from umbel.rounds import Progress, honest, participants, rounds, start
from umbel.schedule import Schedule
from umbel.tasks import Task
from umbel.tasks.pool import arranged
from umbel.tree import HALF, Params

Watcher = Callable[[Progress], None]


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    task: Task
    schedule: Schedule
    cohort: Cohort
    progress: Progress
    history: list[dict[str, Any]]  # the rounds' figures
    warnings: list[str]

    @property
    def figures(self) -> dict[str, Any]:
        """The last round's figures."""
        return self.progress.figures

    def personal_model(self, client: int) -> nn.Module:
        """The module that this client serves, on the CPU, in evaluation mode.

        Where each task has labels of its own (`labels_each` of a task), its answers for tasks but the input's
        mean nothing: `umbel.model.loss.among_own` takes them out.

        Raises:
            DataError: there is no such client.
        """
        if not 0 <= client < self.task.num_clients:
            raise DataError(f"client {client}: the run has the clients 0 to {self.task.num_clients - 1}")
        one = np.array([client])
        params, _ = self.cohort.served(self.progress.shared, self.progress.store.rows(one), one)
        return module_with(self.cohort.loss.module, params)


def run(
    task: Task,
    method: Method,
    rounds: int = 100,
    seed: int = 0,
    schedule: Schedule | None = None,
    engine: Engine | None = None,
    folder: str | Path | None = None,
    on_round: Watcher | None = None,
) -> Result:
    """Trains every client's model and returns them with their scores.

    Args:
        task: a model and the clients' data; see `task_of`.
        method: FLoRAL(…), FedAvg(…), …
        rounds: how many, each with all clients.
        seed: of everything that is drawn.
        schedule: in place of `rounds` and `seed`, with clients per round, how often to evaluate, and more.
        engine: device, and how clients are stacked.
        folder: where to keep recipe, metrics and checkpoints; a new one.
        on_round: called after every round.
    """
    plan = schedule or Schedule(rounds=rounds, seed=seed)
    return _begin(task, method, plan, engine or Engine(), _identity(task, method, plan), None, folder, on_round)


def run_recipe(recipe: Recipe, folder: str | Path | None = None, on_round: Watcher | None = None) -> Result:
    """The run that the recipe describes."""
    task = recipe.task.load(recipe.schedule.seed)
    return _begin(
        task, recipe.method, recipe.schedule, recipe.engine, recipe.identity(), recipe.table(), folder, on_round
    )


def resume(
    folder: str | Path, task: Task | None = None, method: Method | None = None, on_round: Watcher | None = None
) -> Result:
    """Goes on with a run from its newest whole checkpoint, to the result of one that was never stopped.

    Args:
        folder: of the run.
        task: needed for a run of your own task, as it was given to `run`; likewise `method`.
        method: see `task`.
        on_round: called after every round.

    Raises:
        RunFolderError: no run folder, no whole checkpoint, or one of another recipe.
    """
    return _finish(*_opened(Path(folder), task, method), on_round)


def opened(folder: str | Path, task: Task | None = None, method: Method | None = None) -> Result:
    """The run as its newest whole checkpoint has it; nothing is trained and nothing in the folder changes.

    Args:
        folder: of the run.
        task: needed for a run of your own task, as it was given to `run`; likewise `method`.
        method: see `task`.

    Raises:
        RunFolderError: no run folder, no whole checkpoint, or one of another recipe.
    """
    _, result, _ = _opened(Path(folder), task, method)
    if result.progress.round == 0:
        raise RunFolderError(f"{folder} has no checkpoint yet; go on with it by `umbel resume {folder}`")
    return result


def module_with(module: nn.Module, params: Params) -> nn.Module:
    """A copy of the module on the CPU, in evaluation mode, with the first row of these tensors as its own."""
    copy = copied(module, but=params).cpu().eval()
    for name, leaf in params.items():
        path, _, own_name = name.rpartition(".")
        owner, value = copy.get_submodule(path), leaf[0].detach().clone().cpu()
        if own_name in owner._parameters:
            own = owner.get_parameter(
                own_name
            )  # in place, so that a tied name follows; of half precision as it was
            own.data = value.to(own.dtype) if own.dtype in HALF else value
        else:
            setattr(owner, own_name, value)
    return copy


def _begin(
    task: Task,
    method: Method,
    schedule: Schedule,
    engine: Engine,
    identity: dict[str, Any],
    recipe: dict[str, Any] | None,
    path: str | Path | None,
    on_round: Watcher | None,
) -> Result:
    if path is not None:
        check_free(Path(path))  # before any work is done
    task = arranged(task, schedule)
    cohort, at = start(task, method, schedule, engine)
    _check_groups(cohort, at, schedule)
    cost = cost_of(cohort, at.shared, at.store, participants(task.num_clients, schedule)[:1])
    folder = None
    if path is not None:
        state = tree.tensors(at.shared).values()
        num_bytes = sum(leaf.numel() * leaf.element_size() for leaf in state)
        num_bytes += task.num_clients * tree.row_bytes(at.store.rows(np.zeros(1, dtype=np.int64)))
        facts = {"task": task.name, "num_clients": task.num_clients, "chunk": cohort.chunk}
        facts |= {"cost": asdict(cost), "schedule": asdict(schedule), "engine": asdict(engine)}
        if cohort.ledger is not None:
            facts |= {"last_round": cohort.ledger.last_round, "privacy": asdict(cohort.ledger.privacy)}
        folder = RunFolder.create(Path(path), identity, recipe, facts, num_bytes)
    return _finish(folder, Result(task, schedule, cohort, at, [], []), cost, on_round)


def _check_groups(cohort: Cohort, at: Progress, schedule: Schedule) -> None:
    """Raises RecipeError if a clip or a range is of a group that the method's sums have not."""
    if not schedule.privacy.clips and not schedule.secure.ranges:
        return
    client = participants(at.store.num_clients, schedule)[:1]
    like = cohort.method.contribution(one_upload(cohort, at.shared, at.store, client))
    summed = [*like]
    if schedule.privacy.level == "none":
        summed.append(LOSS)
    elif schedule.privacy.level == "client" and cohort.ledger is not None:
        groups = clipping.groups_of(like, cohort.ledger.privacy)
        summed = [*clipping.first_clips(groups, cohort.ledger.privacy)]
        summed += [clipping.WITHIN] if groups.within_noise else []
    check_groups("secure.ranges", schedule.secure.ranges, summed)


def _opened(path: Path, task: Task | None, method: Method | None) -> tuple[RunFolder, Result, Cost | None]:
    """The folder, and the run at its newest whole checkpoint."""
    if (path / "recipe.toml").is_file():
        table = load(path / "recipe.toml")
        recipe = read(table, next(iter(labels(table)), ""))
        folder = RunFolder.opened(path, recipe.identity())
        task, method = recipe.task.load(recipe.schedule.seed), recipe.method
        schedule, engine = recipe.schedule, recipe.engine
    elif not path.is_dir():
        raise RunFolderError(f"there is no folder {path}")
    elif task is None or method is None:
        raise RunFolderError(
            f"{path} has no recipe.toml; a run of your own task is resumed with resume(folder, task, method)"
        )
    else:
        facts = RunFolder.opened(path, {}).facts()
        schedule = build(Schedule, facts.get("schedule", {}), "schedule")
        engine = build(Engine, facts.get("engine", {}), "engine")
        folder = RunFolder.opened(path, _identity(task, method, schedule))
    task = arranged(task, schedule)
    facts = folder.facts()
    if facts.get("deployed"):
        raise RunFolderError(
            f"{path} is of a run across machines: what its clients keep is on their nodes, so that neither its "
            f"rounds nor its models can be made here; go on with it as it was begun, by umbel deploy up or "
            f"flwr run; umbel report {path} shows how it went"
        )
    checkpoint, warnings = folder.latest()
    if schedule.asynchronous.buffer and checkpoint is not None and checkpoint.round < schedule.rounds:
        # What clients are at work on is in no checkpoint: the run is made again, to the same bits.
        checkpoint = None
    chunk = facts.get("chunk")
    if type(chunk) is not int or not 0 < chunk <= 1 << 31:
        raise RunFolderError(f"{path}: run.json says chunk = {chunk!r}, where a number of clients is wanted")
    cohort, at = start(task, method, schedule, replace(engine, mode="stacked", chunk=chunk))
    cohort = replace(cohort, chunk=chunk, together=engine.mode == "auto")
    # Folders may be older than that figure.
    cost = build(Cost, facts["cost"], "cost") if "cost" in facts else None
    if checkpoint is not None:
        at = restored(at, checkpoint, path)
    history = [line for line in read_history(path) if line["round"] <= at.round]
    if len(history) != at.round:
        warnings.append(f"{path / 'metrics.jsonl'} has lost {at.round - len(history)} of {at.round} rounds")
    if history:
        at = replace(at, figures=history[-1])
    return folder, Result(task, schedule, cohort, at, history, warnings), cost


def _finish(folder: RunFolder | None, begun: Result, cost: Cost | None, on_round: Watcher | None) -> Result:
    """The run with the rounds that it still lacks."""
    task, schedule, at, history = begun.task, begun.schedule, begun.progress, begun.history
    with nullcontext() if folder is None or at.round >= schedule.rounds else held(folder.path):
        if folder is not None:
            folder.rewind(at.round)
        for progress in rounds(begun.cohort, at, task, schedule, cost):
            at = progress
            history.append(at.figures)
            if folder is not None:
                record(folder, at, task, schedule)
            if on_round is not None:
                on_round(at)
    return replace(begun, progress=at)


def record(folder: RunFolder, at: Progress, task: Task, schedule: Schedule) -> None:
    """Writes a round's figures, and its checkpoint if one is due."""
    last = at.last
    folder.append("metrics.jsonl", at.figures)
    due = last or at.round % max(1, schedule.rounds // SNAPSHOTS) == 0
    if due and task.num_clients <= SNAPSHOT_CLIENTS and (line := _of_clients(at, task, schedule)):
        folder.append("clients.jsonl", {"round": at.round} | line)
    trust = getattr(at.shared, "trust", None)  # who mixes whom, after every mixing, where clients mix clients
    if trust is not None and 1 < len(trust) <= TRUST_CLIENTS:
        folder.append("trust.jsonl", {"round": at.round, "trust": _short(trust.cpu().numpy(), 4)})
    if last or at.round % schedule.checkpoint_every == 0:
        seen, private = at.store.state()
        tensors = {f"shared/{name}": leaf for name, leaf in tree.tensors(at.shared).items()}
        tensors |= {f"private/{name}": leaf for name, leaf in tree.tensors(private).items()}
        folder.settle()
        tensors |= {f"clip/{name}": clip for name, clip in at.clips.items()}
        folder.save(Checkpoint(at.round, tensors | {"seen": torch.from_numpy(seen)}))


def _of_clients(at: Progress, task: Task, schedule: Schedule) -> dict[str, Any]:
    """A line of clients.jsonl, without the round; {} if there is nothing to say."""
    tests, scores, line = task.tests_of(honest(task.num_clients, schedule)), at.scores, dict[str, Any]()
    if scores is not None and len(scores.loss) == len(tests):  # across machines some may be away
        line["loss"] = _short(scores.loss, 5)
        if scores.accuracy is not None:
            line["accuracy"] = _short(scores.accuracy, 5)
        trust = getattr(at.shared, "trust", None)
        if scores.mixture.shape[1] and (trust is None or len(trust) <= TRUST_CLIENTS):
            line["mixture"] = _rounded(scores.mixture)
    # Where the server saw the clients' adapters, in a plane: it knows without an evaluation.
    places, cluster = (getattr(at.shared, name, None) for name in ("places", "cluster"))
    if places is not None and cluster is not None and task.serves is None:
        line |= {"places": _short(places[tests].cpu().numpy(), 4), "cluster": cluster[tests].tolist()}
    if line and task.group is not None:
        line["group"] = task.group[tests].tolist()
    return line


def restored(at: Progress, checkpoint: Checkpoint, path: Path) -> Progress:
    """The progress at a checkpoint of the folder; the state before round 1, `at`, gives the tensors' places.

    Raises:
        RunFolderError: the checkpoint has other tensors.
    """
    try:
        return _restored(at, checkpoint)
    except (KeyError, ValueError) as error:
        raise RunFolderError(
            f"{path}: its checkpoints have other tensors than this version of umbel keeps ({error}); "
            f"go on with it by the version that made it, or run it again"
        ) from None


def _restored(at: Progress, checkpoint: Checkpoint) -> Progress:
    def part(name: str) -> dict[str, Any]:
        return {k.removeprefix(name): v for k, v in checkpoint.tensors.items() if k.startswith(name)}

    fresh = at.store.rows(np.zeros(1, dtype=np.int64))
    store: PrivateStore = at.store
    seen = checkpoint.tensors["seen"].numpy()
    known = len(set(seen.flatten().tolist()) & {*range(store.num_clients)})
    if seen.dtype != np.int64 or seen.ndim != 1 or known < len(seen):
        raise ValueError("seen: the numbers of clients were expected, each once")
    if len(seen):
        rows = tree.with_tensors(fresh, part("private/"))
        if any(len(leaf) != len(seen) for leaf in tree.tensors(rows).values()):
            raise ValueError(f"private: the rows of {len(seen)} clients were expected")
        store.put(seen, rows)
    shared = tree.with_tensors(at.shared, part("shared/"))
    return Progress(checkpoint.round, shared, store, {}, None, part("clip/"))


def _identity(task: Task, method: Method, schedule: Schedule) -> dict[str, Any]:
    """What decides the result of a run without a recipe file."""
    counts: dict[str, Any] = {"clients": task.num_clients, "examples": int(task.train.count.sum())}
    settings = {k: v for k, v in asdict(schedule).items() if k != "checkpoint_every"}
    counts |= {"model": {name: list(leaf.shape) for name, leaf in task.model.named_parameters()}}
    counts |= {"loss": task.loss} | ({"labels_each": task.labels_each} if task.labels_each else {})
    return {"task": task.name, **counts, "method": name_of(method, METHODS), **asdict(method), **settings}  # type: ignore[call-overload]


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl."""
    return read_lines(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []


def _rounded(values: np.ndarray) -> Any:
    return np.round(values.astype(float), 4).tolist()


def _short(values: np.ndarray, digits: int) -> list[Any]:
    """So many digits of each: what is small is kept as such."""
    if values.ndim > 1:
        return [_short(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
