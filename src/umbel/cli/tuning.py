"""Searches: every method of a recipe with every point of its grid, tested on training examples.

A comparison whose methods are "floral local.lr=0.1", "floral local.lr=0.3", …: it is gone on with like any other.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from umbel.cli import comparing
from umbel.cli.comparing import Asked
from umbel.cli.said import STDOUT, print_json, told
from umbel.errors import RecipeError

if TYPE_CHECKING:
    from rich.table import Table as Grid

    from umbel.recipe import Table
    from umbel.tables import Column, Group, Spread

FRACTION = 0.25  # of each client's training examples, to test on
MOST_POINTS = 1000
MOST_COLUMNS = 8  # of a table; more points are its rows


@dataclass(frozen=True)
class Found:
    """How well one method did at every point."""

    label: str
    grid: "dict[str, list[Any]]"  # the values of each setting
    points: "list[Table]"  # settings by dotted name
    scores: "list[Spread | None]"  # None where not every seed's run came to its end with a finite score
    chosen: int | None  # the best mean's place; the first of them where several are best

    @property
    def edges(self) -> list[str]:
        """The settings whose chosen value is the smallest or largest of three or more numbers tried."""
        if self.chosen is None:
            return []
        best = self.points[self.chosen]
        numbers = {
            key: tried for key, tried in self.grid.items() if len(tried) > 2 and all(map(_is_number, tried))
        }
        return [key for key, tried in numbers.items() if best[key] in (min(tried), max(tried))]


def asked_for(
    recipes: Sequence[str], overrides: Sequence[str], methods: str | None, seeds: list[int]
) -> list[Asked]:
    """What is to be run for each recipe, a label for every method and point.

    Raises:
        RecipeError: something is wrong with a recipe, or it has nothing to search.
    """
    return [_spread_out(own) for own in comparing.asked_for(recipes, overrides, methods, seeds)]


def default_folder(asked: Sequence[Asked]) -> Path:
    """Where a search goes if nothing else is said."""
    folder = comparing.default_folder(asked)
    return folder.with_name(f"tune-{folder.name.removeprefix('compare-')}")


def is_search(asked: Asked) -> bool:
    """Whether a comparison was begun as a search."""
    return bool(asked.table.get("search")) and all(_method_of(asked, label) != label for label in asked.labels)


def go(folder: Path, cells: dict[Path, Asked], workers: int, json: str | None, quiet: bool) -> None:
    """Runs, or goes on with, all that was asked for; then the tables, and what to write into the recipe."""
    with told(folder):
        failed = comparing.ran(cells, workers, quiet)
        documents = []
        for path, own in cells.items():
            groups = comparing.groups_of(path, own)
            documents.append(_told_of(own, groups, json != STDOUT) | {"failed": failed[path]})
        if json is not None:
            from umbel.folder import machine

            about = {"command": shlex.join(["umbel", *sys.argv[1:]]), **machine(), "folder": str(folder)}
            print_json(about | (documents[0] if len(documents) == 1 else {"cells": documents}), json)
        if any(failed.values()):
            raise typer.Exit(2)


def _spread_out(asked: Asked) -> Asked:
    """The same recipe with a method for every point of the grid."""
    from umbel.recipe import put, read

    share = asked.table.get("validation", FRACTION)
    if not share:
        raise RecipeError(
            "validation = 0 would search on test examples; leave it out, or give a share of training ones"
        )
    variants: dict[str, dict[str, Any]] = {}
    for label, point in [(name, settings) for name in asked.labels for settings in _points(asked, name)]:
        own = variants[_variant(label, point)] = {"like": label}
        for key, value in point.items():
            put(own, key, value)
    table = asked.table | {"validation": share, "method": asked.table.get("method", {}) | variants}
    for label, own in variants.items():
        try:
            read(table, label)
        except RecipeError as error:
            where = f"search, for {own['like']}: "
            raise RecipeError(str(error).replace(f"method.{label}.", where)) from None
    return replace(asked, labels=list(variants), table=table)


def _points(asked: Asked, label: str) -> "list[Table]":
    """The points of a method's grid, each its settings by dotted name, in the order of the values.

    Raises:
        RecipeError: there are none, or too many.
    """
    from umbel.recipe import searched

    grid = searched(asked.table, label)
    if not grid:
        raise RecipeError(
            f"{asked.recipe} has no values to try for {label}, in a table [search] or [search.method.{label}]; "
            f"give them as --search.local.lr=[0.03,0.1,0.3], or name other methods with --methods"
        )
    if all(len(values) == 1 for values in grid.values()):
        raise RecipeError(f"search: one point is no search; give {next(iter(grid))} two values or more")
    count = 1
    for key, values in grid.items():
        count *= len(values)
        if count > MOST_POINTS:
            raise RecipeError(f"search: up to {key} there are {count:,} points, and {MOST_POINTS:,} are the most")
    return [dict(zip(grid, point, strict=True)) for point in product(*grid.values())]


def _variant(label: str, point: "Table") -> str:
    return " ".join([label, *(f"{key}={value}" for key, value in point.items())])


def _method_of(asked: Asked, label: str) -> str:
    """Which of the recipe's methods a variant is of; the label itself where it is none."""
    own = asked.table.get("method", {}).get(label, {})
    return own["like"] if " " in label and "like" in own else label


def _told_of(asked: Asked, groups: "Sequence[Group]", printed: bool) -> dict[str, Any]:
    """One recipe's search as a document; its table is printed if asked for."""
    from umbel.tables import Column, columns

    column = next(iter(columns(groups)), Column("loss", "loss", -1, ""))  # no run may have a score
    methods = dict.fromkeys(_method_of(asked, label) for label in asked.labels)
    found = [_found(asked, label, groups, column) for label in methods]
    if printed:
        _print(asked, found, column)
    return {
        "recipe": asked.recipe,
        "seeds": asked.seeds,
        "validation": asked.table["validation"],
        "figure": column.key,
        "methods": [
            {
                "label": own.label,
                "search": own.grid,
                "scores": [
                    {"settings": point, **(vars(score) if score is not None else {"mean": None})}
                    for point, score in zip(own.points, own.scores, strict=True)
                ],
                "chosen": None if own.chosen is None else own.points[own.chosen],
                "at_the_edge": own.edges,
            }
            for own in found
        ],
    }


def _found(asked: Asked, label: str, groups: "Sequence[Group]", column: "Column") -> Found:
    from umbel.recipe import searched

    by_label, points = {group.label: group for group in groups}, _points(asked, label)
    scores = [_score(by_label.get(_variant(label, point)), column, asked.seeds) for point in points]
    means = {place: column.better * score.mean for place, score in enumerate(scores) if score is not None}
    best = max(means, key=lambda place: means[place]) if means else None
    return Found(label, searched(asked.table, label), points, scores, best)


def _score(group: "Group | None", column: "Column", seeds: Sequence[int]) -> "Spread | None":
    """Over all seeds; of a run that diverged the last score before that says nothing."""
    from umbel.tables import spread

    if group is None:
        return None
    found = spread(replace(group, runs=[run for run in group.runs if run.finished]), column.key)
    return found if found is not None and len(found.values) == len(seeds) else None


def _print(asked: Asked, found: Sequence[Found], column: "Column") -> None:
    """A table for all methods that are searched alike, and the best settings of all."""
    from umbel.cli.said import print_table

    seeds = ", ".join(map(str, asked.seeds))
    share = f"{100 * asked.table['validation']:g} % of each client's training examples"
    unit = ", %" if column.unit == "%" else ""
    alike: list[list[Found]] = []
    for own in found:
        fitting = next((others for others in alike if others[0].grid == own.grid), None)
        alike.append([own]) if fitting is None else fitting.append(own)
    for place, some in enumerate(alike):
        title = f"{asked.recipe}, seeds {seeds}: {column.title}{unit}, on {share}, by {' / '.join(some[0].grid)}"
        last = place == len(alike) - 1
        print_table(title, _table(some, column), "\n".join(_advice(found)) if last else "")


def _table(found: Sequence[Found], column: "Column") -> "Grid":
    """How well methods did at the points of one grid: a row for each method, or for each of many points."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from umbel.tables import written

    names = [" / ".join(str(value) for value in point.values()) for point in found[0].points]
    cells = {
        own.label: [
            Text(written(score, column.unit), style="bold green" if place == own.chosen else "")
            for place, score in enumerate(own.scores)
        ]
        for own in found
    }
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    across = len(names) <= MOST_COLUMNS
    table.add_column("method" if across else " / ".join(found[0].grid), no_wrap=True)
    for heading in names if across else cells:
        table.add_column(heading, justify="right")
    if across:
        for label, texts in cells.items():
            table.add_row(label, *texts)
    else:
        for place, name in enumerate(names):
            table.add_row(name, *(texts[place] for texts in cells.values()))
    return table


def _advice(found: Sequence[Found]) -> list[str]:
    """The best settings as lines of a recipe."""
    lines = []
    if any(score is None for own in found for score in own.scores):
        lines.append("–: not every seed's run came to its end with a finite score.")
    lines += ["", "The best, to be written into the recipe:"]
    for own in found:
        lines += ["", f"[method.{own.label}]" + ("   # nothing: no run has a score" if own.chosen is None else "")]
        for key, value in (own.points[own.chosen] if own.chosen is not None else {}).items():
            edge = "   # at the edge of what was tried" if key in own.edges else ""
            lines.append(f"{key} = {_toml(value)}{edge}")
    return lines


def _toml(value: Any) -> str:
    """The value as a recipe has it, in one line."""
    import tomli_w

    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
