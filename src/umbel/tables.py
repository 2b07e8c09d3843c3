"""What runs came to: their folders read back, put into groups that differ in the seed only, as mean ± std."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from umbel.errors import RunFolderError
from umbel.folder import read_json, read_lines

COMPARISON = "compare.toml"  # in the folder of a comparison: what `umbel compare` was asked for
PLACES = ("seed", "engine", "checkpoint_every")  # settings that may differ within a group


@dataclass(frozen=True)
class Run:
    """One run folder's content. `recipe` is {} for a run that was started from Python."""

    path: Path
    label: str
    seed: int
    rounds: int  # that it was to last; len(history) is how far it came
    recipe: dict[str, Any]
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    snapshots: list[dict[str, Any]]

    @property
    def oracle(self) -> bool:
        """Whether it knew the clients' true groups, so that it is a bound and no contestant."""
        method = self.recipe.get("method", {}).get(self.label, {})
        router = method.get("router") if isinstance(method, dict) else None
        return isinstance(router, dict) and router.get("kind") == "oracle"

    @property
    def num_clients(self) -> int | None:
        """How many clients there are, None where the folder does not say."""
        known = self.facts.get("num_clients", self.recipe.get("task", {}).get("num_clients"))
        if isinstance(known, int):
            return known
        return len(self.snapshots[-1]["loss"]) if self.snapshots else None

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
    unit: str  # "%", "share", "bytes", "seconds", or "" for a loss


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
    recipe = _toml(path / "recipe.toml") if (path / "recipe.toml").is_file() else {}
    schedule = facts.get("schedule") if isinstance(facts.get("schedule"), dict) else {}
    settings = {**(schedule or {}), **recipe}
    history = _rounds(path / "metrics.jsonl")
    return Run(
        path=path,
        label=next(iter(recipe.get("method", {})), path.resolve().name),
        seed=int(settings.get("seed", 0)),
        rounds=int(settings.get("rounds", len(history))),
        recipe=recipe,
        facts=facts,
        history=history,
        snapshots=[line for line in _rounds(path / "clients.jsonl") if "loss" in line],
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
        figures = {key: last[key] for key in ("accuracy", "loss", "worst_decile", "nmi") if _number(last.get(key))}
    num_bytes = total(run.history, "bytes_up") + total(run.history, "bytes_down")
    clients = _per_round(run)
    figures["bytes_per_client_round"] = num_bytes / rounds / clients if clients else num_bytes / rounds
    figures["seconds_per_round"] = total(run.history, "train_seconds") / rounds
    return figures


def columns(groups: Sequence[Group]) -> list[Column]:
    """The summary's columns: those that at least one group has figures for."""
    found = {key for group in groups for run in group.runs for key in totals(run)}
    percent = "accuracy" in found
    candidates = [
        Column("accuracy", "accuracy", 1, "%") if percent else Column("loss", "loss", -1, ""),
        Column("worst_decile", "worst decile", 1 if percent else -1, "%" if percent else ""),
        Column("nmi", "NMI", 1, "share"),
        Column("bytes_per_client_round", "bytes / client, round", -1, "bytes"),
        Column("seconds_per_round", "training / round", -1, "seconds"),
    ]
    return [column for column in candidates if column.key in found]


def spread(group: Group, key: str) -> Spread | None:
    """The figure over the group's runs, None if none has it."""
    values = [figures[key] for figures in map(totals, group.runs) if key in figures]
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, values)


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
    """How many clients' updates were left out because they were not finite, over all rounds."""
    return sum(len(line.get("dropped", ())) for line in history)


def total(history: Iterable[Mapping[str, Any]], key: str) -> float:
    """The sum of a figure over the rounds."""
    values: Iterator[float] = (line[key] for line in history if _number(line.get(key)))
    return sum(values)


def written(found: Spread | None, unit: str) -> str:
    """The spread as text: "92.6 ± 0.4", "33.4 kB", "12.0 ± 0.3 ms"."""
    if found is None:
        return "–"
    mean, suffix = _scaled(found.mean, unit)
    if found.std is None or (unit == "bytes" and not found.std):  # a deviation of 0 B would say nothing
        return mean + suffix
    if not suffix:
        return f"{mean} ± {_like(found.std, mean)}"
    factor = found.mean / float(mean) if float(mean) else 1.0  # 0.0129 s is "12.9" ms
    return f"{mean} ± {_like(found.std / factor, mean)}{suffix}"


def num_bytes(value: float) -> str:
    """As 8 B, 33.4 kB, 1.2 MB."""
    return "".join(_scaled(value, "bytes"))


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
    if unit == "%":
        return f"{value:.1f}", ""
    if unit == "share":
        return f"{value:.2f}", ""
    if unit == "seconds":
        return (f"{value:.1f}", " s") if value >= 0.9995 else (f"{1000 * value:.1f}", " ms")
    if unit != "bytes":
        return (f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"), ""
    suffixes = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(suffixes) > 1:
        value /= 1000
        del suffixes[0]
    return (f"{value:.0f}" if suffixes[0] == "B" or value >= 100 else f"{value:.1f}"), f" {suffixes[0]}"


def _like(value: float, other: str) -> str:
    """The number with as many decimals as the other."""
    if "e" in other or not other.replace(".", "").replace("-", "").isdigit():
        return f"{value:.2e}"
    return f"{value:.{len(other.partition('.')[2])}f}"


def finite(value: Any) -> Any:
    """The value for JSON, which knows no NaN and no infinity: None in their place."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(own) for key, own in value.items()}
    return [finite(own) for own in value] if isinstance(value, list | tuple) else value


def _below(folder: Path) -> list[Path]:
    found = [path.parent for path in sorted(folder.glob("[!.]*/run.json"))]
    if not (folder / COMPARISON).is_file():
        return found
    asked = _toml(folder / COMPARISON)
    order = [run_name(label, seed) for label in asked.get("labels", []) for seed in asked.get("seeds", [])]
    place = {name: position for position, name in enumerate(order)}
    return sorted(found, key=lambda path: place.get(path.name, len(place)))


def run_name(label: str, seed: int) -> str:
    """What the run's folder is called in a comparison."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label) + f"-seed{seed}"


def _rounds(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [line for line in read_lines(path) if isinstance(line, dict) and isinstance(line.get("round"), int)]


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _per_round(run: Run) -> int | None:
    """How many clients take part in a round."""
    schedule = run.facts.get("schedule")
    chosen = schedule.get("clients_per_round") if isinstance(schedule, dict) else None
    return min(chosen, run.num_clients or chosen) if chosen else run.num_clients


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
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: str(value)}
    return flat


def _told_apart(own: list[Run], groups: list[list[Run]]) -> str:
    label = own[0].label
    alike = [_settings(runs[0]) for runs in groups if runs[0].label == label]
    if len(alike) < 2:
        return label
    mine = _settings(own[0])
    differing = [key for key, value in mine.items() if any(other.get(key) != value for other in alike)]
    return f"{label} ({', '.join(f'{key}={mine[key]}' for key in differing)})"
