"""What runs came to: their folders read back, put into groups that differ in the seed only, as mean ± std."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from umbel.errors import RunFolderError
from umbel.folder import ONBOARDING, read_json, read_lines
from umbel.untrusted import plain, toml_of

COMPARISON = "compare.toml"  # in the folder of a comparison: what `umbel compare` was asked for
LONGEST_NAME = 120  # of a run's folder, without the seed
PLAIN = "-_. ="  # what may be in a label, beside letters and digits, and is no reason to mark its folder
LISTS = ("usage", "by_group", "dropped")  # of numbers, among a round's figures
CLIENTS = {"loss": 1, "accuracy": 1, "mixture": 2, "places": 2, "cluster": 1, "group": 1}
"""What a line of clients.jsonl may hold, in how many axes, of which the first is that of the clients."""
PLACES = ("seed", "engine", "checkpoint_every")  # settings that may differ within a group


@dataclass(frozen=True)
class Run:
    """One run folder's content. `recipe` is {} for a run that was started from Python."""

    path: Path
    label: str
    seed: int
    rounds: int  # that it was to last, or that its privacy budget allows; len(history) is how far it came
    recipe: dict[str, Any]
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    snapshots: list[dict[str, Any]]  # lines of clients.jsonl with scores
    places: list[dict[str, Any]] = field(default_factory=list)  # those that say where the server saw the adapters
    onboarding: dict[str, Any] = field(default_factory=dict)  # what onboard.json says, {} if there is none

    @property
    def finished(self) -> bool:
        """Whether the last round is done and its checkpoint is there."""
        last = self.path / "checkpoints" / f"{self.rounds:06d}.json"
        return len(self.history) >= self.rounds and last.is_file()

    @property
    def travels(self) -> dict[str, dict[str, int]]:
        """What one client sends ("up") and receives ("down") in a round: bytes by tensor group."""
        cost = self.facts.get("cost")
        if not isinstance(cost, dict):
            return {}
        return {way: cost[way] for way in ("up", "down") if isinstance(cost.get(way), dict)}

    @property
    def parameters(self) -> int:
        """How many numbers a client trains in a round: models, adapters and router; 0 if that is not known."""
        cost = self.facts.get("cost")
        found = cost.get("parameters") if isinstance(cost, dict) else None
        return found if isinstance(found, int) else 0

    @property
    def oracle(self) -> bool:
        """Whether it knew the clients' true groups, so that it is a reference and no contestant."""
        method = self.recipe.get("method", {}).get(self.label, {})
        if not isinstance(method, dict):
            return False
        router = method.get("router")
        return method.get("scheme") == "oracle" or (isinstance(router, dict) and router.get("kind") == "oracle")

    @property
    def num_clients(self) -> int | None:
        """How many clients there are, None where the folder does not say."""
        known = self.facts.get("num_clients", self.recipe.get("task", {}).get("num_clients"))
        if isinstance(known, int):
            return known
        return len(self.snapshots[-1]["loss"]) if self.snapshots else None

    @property
    def schedule(self) -> dict[str, Any]:
        """What run.json says of the schedule."""
        known = self.facts.get("schedule")
        return known if isinstance(known, dict) else {}

    @property
    def num_members(self) -> int | None:
        """How many clients train, held-out ones left out; None where the folder does not say."""
        if not self.num_clients:
            return None
        held_out: int = round(self.schedule.get("held_out", 0) * self.num_clients)
        return self.num_clients - held_out

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The lines of the rounds that were evaluated."""
        return [line for line in self.history if "loss" in line]


@dataclass(frozen=True)
class Group:
    """The runs of one method that differ in their seeds only."""

    label: str
    runs: list[Run]

    @property
    def oracle(self) -> bool:
        return all(run.oracle for run in self.runs)


@dataclass(frozen=True)
class Column:
    """A figure of the summary: its key in `totals`, its heading, which way is better, how it is written."""

    key: str
    title: str
    better: int  # 1: more, −1: less, 0: neither
    unit: str  # "%", "share", "bytes", "FLOP", "count", "seconds", or "" for a loss


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over a group's runs (None with one run), and the values."""

    mean: float
    std: float | None
    values: list[float]


def read_run(path: Path) -> Run:
    """The run folder's content.

    Raises:
        RunFolderError: it is no run folder, or a file in it cannot be read.
    """
    if not (path / "run.json").is_file():
        raise RunFolderError(f"{path} is no run folder: it has no run.json")
    facts = read_json(path / "run.json")
    recipe = read_toml(path / "recipe.toml") if (path / "recipe.toml").is_file() else {}
    known = facts.get("schedule")
    settings = {**(known if isinstance(known, dict) else {}), **recipe}
    history = _rounds(path / "metrics.jsonl")
    clients = _rounds(path / "clients.jsonl")
    for line in history:
        _check_figures(path / "metrics.jsonl", line)
    for line in clients:
        _check_clients(path / "clients.jsonl", line)
    methods, seed = recipe.get("method", {}), settings.get("seed", 0)
    rounds = facts.get("last_round", settings.get("rounds", len(history)))
    if not isinstance(methods, dict) or type(seed) is not int or type(rounds) is not int:
        raise RunFolderError(
            f"{path}: run.json or recipe.toml has no method, seed or rounds that could be of a run"
        )
    return Run(
        path=path,
        label=next(iter(methods), path.resolve().name),
        seed=seed,
        rounds=rounds,
        recipe=recipe,
        facts=facts,
        history=history,
        snapshots=[line for line in clients if "loss" in line],
        places=[line for line in clients if "places" in line and "cluster" in line],
        onboarding=read_json(path / ONBOARDING) if (path / ONBOARDING).is_file() else {},
    )


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders: each is a run, or holds runs (a comparison, in the order it was asked for).

    Raises:
        RunFolderError: a folder is neither.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError(f"there is no folder {folder}")
        found = [folder] if (folder / "run.json").is_file() else _below(folder)
        if not found:
            raise RunFolderError(f"{folder} is no run folder and holds none: there is no run.json")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return [read_run(path) for path in paths.values()]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by what they have in common, in the order of their first runs.

    Two groups whose methods have the same label are told apart by the settings in which they differ:
    "floral (num_adapters=8)".
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.label}\n{sorted(_settings(run).items())}", []).append(run)
    members = list(groups.values())
    return [Group(_told_apart(own, members), sorted(own, key=lambda run: run.seed)) for own in members]


def totals(run: Run) -> dict[str, float]:
    """The run's figures for the summary, those that it has."""
    if not run.history:
        return {}
    rounds = len(run.history)
    figures: dict[str, float] = {}
    if run.scored:
        last = run.scored[-1]
        shown = ("accuracy", "loss", "perplexity", "worst_decile", "nmi")
        figures = {key: last[key] for key in shown if _number(last.get(key))}
    clients = _per_round(run) or 1
    for key in ("bytes_up", "bytes_down", "steps", "flops"):
        if any(key in line for line in run.history):
            figures[f"{key}_per_client_round"] = total(run.history, key) / rounds / clients
    sent = [figures[key] for key in ("bytes_up_per_client_round", "bytes_down_per_client_round") if key in figures]
    figures["bytes_per_client_round"] = sum(sent)
    if run.parameters:
        figures["parameters"] = run.parameters
    if _number(run.history[-1].get("epsilon")):
        figures["epsilon"] = run.history[-1]["epsilon"]
    if _number(run.history[-1].get("server_bytes")):
        figures["server_bytes"] = run.history[-1]["server_bytes"]
    figures["train_seconds"] = total(run.history, "train_seconds")
    figures["seconds"] = total(run.history, "seconds")
    figures["seconds_per_round"] = figures["train_seconds"] / rounds
    return figures


def columns(groups: Sequence[Group]) -> list[Column]:
    """The summary's columns: those that at least one group has figures for."""
    found = {key for group in groups for run in group.runs for key in totals(run)}
    percent = "accuracy" in found
    candidates = [
        Column("accuracy", "accuracy", 1, "%") if percent else Column("loss", "loss", -1, ""),
        Column("worst_decile", "worst decile", 1 if percent else -1, "%" if percent else ""),
        Column("perplexity", "perplexity", -1, ""),
        Column("nmi", "NMI", 1, "share"),
        Column("epsilon", "ε spent", 0, ""),
    ]
    return [column for column in candidates if column.key in found]


def cost_columns(groups: Sequence[Group]) -> list[Column]:
    """The columns of what it costs, of one client in one round but for the last two; see `columns`."""
    found = {key for group in groups for run in group.runs for key in totals(run)}
    candidates = [
        Column("parameters", "parameters", -1, "count"),
        Column("bytes_up_per_client_round", "sent", -1, "bytes"),
        Column("bytes_down_per_client_round", "received", -1, "bytes"),
        Column("steps_per_client_round", "steps", -1, "count"),
        Column("flops_per_client_round", "arithmetic", -1, "FLOP"),
        Column("server_bytes", "server holds", -1, "bytes"),
        Column("train_seconds", "training, all", -1, "seconds"),
    ]
    return [column for column in candidates if column.key in found]


def spread(group: Group, key: str) -> Spread | None:
    """The figure over the group's runs, None if none has it."""
    values = [figures[key] for figures in map(totals, group.runs) if key in figures]
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, values)


@dataclass(frozen=True)
class Onboarded:
    """How well the unseen clients of a group's runs do: over runs, or over clients where there is one run."""

    metric: str  # "accuracy" in %, or "loss"
    num_clients: int  # of a run
    samples: list[int]
    ways: dict[str, dict[int, Spread]]  # way → number of samples → figure
    trained: Spread  # the clients that trained
    settles: bool  # whether the method has anything to learn for a new client without fine-tuning


def onboarded(group: Group) -> Onboarded | None:
    """What the runs' onboard.json files say, None if there is none."""
    documents = [run.onboarding for run in group.runs if run.onboarding]
    if not documents:
        return None

    def together(points: Sequence[Mapping[str, Any]]) -> Spread:
        values = [point["mean"] for point in points if _number(point["mean"])] or [float("nan")]
        std = stdev(values) if len(values) > 1 else points[0].get("std")
        return Spread(fmean(values), std, values)

    ways: dict[str, dict[int, Spread]] = {}
    for way in documents[0]["ways"]:
        points: dict[int, list[dict[str, Any]]] = {}
        for point in (point for document in documents for point in document["ways"].get(way, [])):
            points.setdefault(point["samples"], []).append(point)
        ways[way] = {samples: together(points[samples]) for samples in sorted(points)}
    first = documents[0]
    return Onboarded(
        first["metric"],
        len(first["clients"]),
        sorted({samples for points in ways.values() for samples in points}),
        ways,
        together([document["trained"] for document in documents]),
        any(document["settles"] for document in documents),
    )


def of_paper(published: tuple[float, float | None] | None) -> Spread | None:
    """A published mean and standard deviation."""
    return None if published is None else Spread(*published, [])


def beside(found: Spread | None, paper: tuple[float, float | None] | None, unit: str) -> str:
    """Our figure and the published one: "92.0 ± 0.4 (91.5 ± 0.6)"."""
    ours = written(found, unit)
    return ours if paper is None else f"{ours} ({written(of_paper(paper), unit)})"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The settings in which two recipes' tables differ: "rounds: 2, now 50; …"."""
    old, new = _flat(one, ""), _flat(other, "")
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    keys = [key for key in keys if key.partition(".")[0] not in PLACES]
    return "; ".join(f"{key}: {old.get(key, 'not set')}, now {new.get(key, 'not set')}" for key in keys)


def best(groups: Sequence[Group], column: Column) -> set[str]:
    """The labels of the groups with the best mean; oracles are bounds and do not count."""
    means = {
        group.label: found.mean for group in groups if not group.oracle and (found := spread(group, column.key))
    }
    if not column.better or len(means) < 2:
        return set()
    top = max(column.better * mean for mean in means.values())
    return {label for label, mean in means.items() if column.better * mean == top}


def dropped(history: Iterable[Mapping[str, Any]]) -> int:
    """How many clients' updates were missing or left out, over all rounds."""
    return sum(losses(history).values())


def losses(history: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The same by the reason: "missing", "late", "malformed", "not finite", "outlier"; the largest first."""
    counts: dict[str, int] = {}
    for line in history:
        found = {"not finite": len(line.get("dropped", ()))}
        for reason, count in (*found.items(), *line.get("lost", {}).items()):
            counts[reason] = counts.get(reason, 0) + int(count)
    return {
        reason: counts[reason] for reason in sorted(counts, key=lambda reason: -counts[reason]) if counts[reason]
    }


def said_of(counts: Mapping[str, int]) -> str:
    """The counts as "12 missing, 4 late"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def total(history: Iterable[Mapping[str, Any]], key: str) -> float:
    """The sum of a figure over the rounds."""
    values: Iterator[float] = (line[key] for line in history if _number(line.get(key)))
    return sum(values)


def written(found: Spread | None, unit: str) -> str:
    """The spread as text: "92.6 ± 0.4", "33.4 kB", "12.0 ± 0.3 ms"."""
    if found is None:
        return "–"
    mean, suffix = _scaled(found.mean, unit)
    if found.std is None or (unit in ("bytes", "FLOP", "count") and found.std <= 0.005 * found.mean):
        # Seeds hardly differ in what they cost, and a deviation of 0 B would say nothing.
        return mean + suffix
    if not suffix:
        return f"{mean} ± {_like(found.std, mean)}"
    factor = found.mean / float(mean) if float(mean) else 1.0  # 0.0129 s is "12.9" ms
    return f"{mean} ± {_like(found.std / factor, mean)}{suffix}"


def num_bytes(value: float) -> str:
    """As 8 B, 33.4 kB, 1.2 MB."""
    return "".join(_scaled(value, "bytes"))


def num_flops(value: float) -> str:
    """As 20.2 kFLOP, 1.2 TFLOP."""
    return "".join(_scaled(value, "FLOP"))


def seconds(value: float) -> str:
    """As 12.1 ms, 3.4 s, 5 min 20 s, 2 h 5 min."""
    if value < 59.95:
        return "".join(_scaled(value, "seconds"))
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: float, unit: str) -> tuple[str, str]:
    """The number with as many digits as a reader wants, and its unit."""
    if not isfinite(value):
        return str(value), ""
    if unit in ("%", "share"):
        return f"{value:.{1 if unit == '%' else 2}f}", ""
    if unit == "count":
        return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}", ""
    if unit == "seconds":
        return (f"{value:.1f}", " s") if value >= 0.9995 else (f"{1000 * value:.1f}", " ms")
    if unit not in ("bytes", "FLOP"):
        return (f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"), ""
    name, prefixes = unit if unit == "FLOP" else "B", ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    return (f"{value:.0f}" if not prefixes[0] or value >= 100 else f"{value:.1f}"), f" {prefixes[0]}{name}"


def _like(value: float, other: str) -> str:
    """The number with as many decimals as the other."""
    if "e" in other or not other.replace(".", "").replace("-", "").isdigit():
        return f"{value:.2e}"
    return f"{value:.{len(other.partition('.')[2])}f}"


def _below(folder: Path) -> list[Path]:
    found = [path.parent for path in sorted(folder.glob("[!.]*/run.json"))]
    if not (folder / COMPARISON).is_file():
        return found
    asked = read_toml(folder / COMPARISON)
    for cell in asked.get("cells", []):
        found += _below(folder / cell)
    order = [run_name(label, seed) for label in asked.get("labels", []) for seed in asked.get("seeds", [])]
    place = {name: position for position, name in enumerate(order)}
    return sorted(found, key=lambda path: place.get(path.name, len(place)))


def run_name(label: str, seed: int) -> str:
    """What the run's folder is called in a comparison."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in label)
    if len(name) > LONGEST_NAME or any(c not in PLAIN for c in label if not c.isalnum()):
        name = f"{name[:LONGEST_NAME]}-{sha256(label.encode()).hexdigest()[:8]}"  # labels may differ there only
    return f"{name}-seed{seed}"


def _rounds(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return read_lines(path)


def _check_figures(path: Path, line: Mapping[str, Any]) -> None:
    """Raises RunFolderError unless a round's figures are numbers, or what holds them where that belongs."""
    for key, value in line.items():
        numbers: Iterable[Any] = [value]
        if key in LISTS and isinstance(value, list):
            numbers = value
        elif key == "lost" and isinstance(value, dict):
            numbers = value.values()
        if not all(isinstance(own, float) or (isinstance(own, int) and abs(own) < 1 << 63) for own in numbers):
            where = f"{path}, round {line['round']}"
            raise RunFolderError(f"{where}: {plain(key, 60)} = {plain(value, 60)} is no figure of a round")


def _check_clients(path: Path, line: Mapping[str, Any]) -> None:
    """Raises RunFolderError unless what a line says of clients are numbers, of as many clients in each array."""
    counts = set()
    for key in CLIENTS.keys() & line.keys():
        try:
            values = np.array(line[key])
        except ValueError:  # rows of several lengths
            values = np.array("")
        if values.ndim != CLIENTS[key] or values.dtype.kind not in ("i" if key in ("cluster", "group") else "if"):
            raise RunFolderError(
                f"{path}, round {line['round']}: {key} holds something else than numbers of clients"
            )
        counts.add(len(values))
    if len(counts) > 1:
        raise RunFolderError(f"{path}, round {line['round']}: it is of {' and '.join(map(str, counts))} clients")


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML file's table; RunFolderError if there is none."""
    try:
        return toml_of(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _per_round(run: Run) -> int | None:
    """How many clients take part in a round."""
    chosen = run.schedule.get("clients_per_round")
    return min(chosen, run.num_members or chosen) if chosen else run.num_members


def _settings(run: Run) -> dict[str, str]:
    """The settings that make a group, by dotted name; the method's without its label."""
    if not run.recipe:
        return {"folder": str(run.path)}  # nothing is known of what made it: a group of its own
    recipe = {key: value for key, value in run.recipe.items() if key not in PLACES}
    method = recipe.pop("method", {}).get(run.label, {})
    return _flat(recipe, "") | _flat(method, "")


def _flat(table: Mapping[str, Any], path: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        text = str(list(value) if isinstance(value, tuple) else value)  # as TOML has it
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: text}
    return flat


def _told_apart(own: list[Run], groups: list[list[Run]]) -> str:
    label = own[0].label
    alike = [_settings(runs[0]) for runs in groups if runs[0].label == label]
    if len(alike) < 2:
        return label
    mine = _settings(own[0])
    differing = [key for key, value in mine.items() if any(other.get(key) != value for other in alike)]
    return f"{label} ({', '.join(f'{key}={mine[key]}' for key in differing)})"
