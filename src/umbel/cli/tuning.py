"""Searches: every method of a recipe with every point of its grid, tested on training examples.

A comparison whose methods are "floral local.lr=0.1", "floral local.lr=0.3", …: it is gone on with like any other.
"""

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
    from umbel.recipe import Table
    from umbel.tables import Column, Group, Spread

FRACTION = 0.25  # of each client's training examples, to test on


@dataclass(frozen=True)
class Found:
    """How well one method did at every point."""

    label: str
    points: "list[Table]"  # settings by dotted name
    scores: "list[Spread | None]"  # None where no run has a finite score
    chosen: int | None  # the best mean's place; the first of them where several are best

    def edges(self, grid: "dict[str, list[Any]]") -> list[str]:
        """The settings whose chosen value is the smallest or largest of three or more numbers tried."""
        if self.chosen is None:
            return []
        best = self.points[self.chosen]
        numbers = {key: tried for key, tried in grid.items() if len(tried) > 2 and all(map(_is_number, tried))}
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

            about = {"command": " ".join(["umbel", *sys.argv[1:]]), **machine(), "folder": str(folder)}
            print_json(about | (documents[0] if len(documents) == 1 else {"cells": documents}), json)
        if any(failed.values()):
            raise typer.Exit(2)


def _spread_out(asked: Asked) -> Asked:
    """The same recipe with a method for every point of the grid."""
    from umbel.recipe import put, read, searched

    points = searched(asked.table)
    if not points:
        raise RecipeError(
            f"{asked.recipe} has no [search] table of values to try; give them as --search.local.lr=[0.03,0.1,0.3]"
        )
    variants: dict[str, dict[str, Any]] = {}
    for label, point in product(asked.labels, points):
        own = variants[_variant(label, point)] = {"like": label}
        for key, value in point.items():
            put(own, key, value)
    table = asked.table | {
        "validation": asked.table.get("validation") or FRACTION,
        "method": asked.table.get("method", {}) | variants,
    }
    for label, own in variants.items():
        try:
            read(table, label)
        except RecipeError as error:
            where = f"search, for {own['like']}: "
            raise RecipeError(str(error).replace(f"method.{label}.", where)) from None
    return replace(asked, labels=list(variants), table=table)


def _variant(label: str, point: "Table") -> str:
    return " ".join([label, *(f"{key}={value}" for key, value in point.items())])


def _told_of(asked: Asked, groups: "Sequence[Group]", printed: bool) -> dict[str, Any]:
    """One recipe's search as a document; its table is printed if asked for."""
    from umbel.recipe import searched
    from umbel.tables import columns

    points = searched(asked.table)
    methods = list(dict.fromkeys(asked.table["method"][label]["like"] for label in asked.labels))
    column = columns(groups)[0]
    found = [_found(label, points, groups, column) for label in methods]
    grid = {key: list(dict.fromkeys(point[key] for point in points)) for key in points[0]}
    if printed:
        _print(asked, found, column, grid)
    return {
        "recipe": asked.recipe,
        "seeds": asked.seeds,
        "validation": asked.table["validation"],
        "figure": column.key,
        "search": grid,
        "methods": [
            {
                "label": own.label,
                "scores": [
                    {"settings": point, **(vars(score) if score is not None else {"mean": None})}
                    for point, score in zip(own.points, own.scores, strict=True)
                ],
                "chosen": None if own.chosen is None else own.points[own.chosen],
                "at_the_edge": own.edges(grid),
            }
            for own in found
        ],
    }


def _found(label: str, points: "list[Table]", groups: "Sequence[Group]", column: "Column") -> Found:
    from umbel.tables import spread

    by_label = {group.label: group for group in groups}
    variants = [by_label.get(_variant(label, point)) for point in points]
    scores = [None if group is None else spread(group, column.key) for group in variants]
    # A point at which a seed failed or diverged is not chosen by its other seeds.
    most = max((len(score.values) for score in scores if score is not None), default=0)
    whole = [place for place, score in enumerate(scores) if score is not None and len(score.values) == most]
    means = {place: column.better * score.mean for place in whole if (score := scores[place]) is not None}
    return Found(label, points, scores, max(means, key=lambda place: means[place]) if means else None)


def _print(asked: Asked, found: Sequence[Found], column: "Column", grid: "dict[str, list[Any]]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from umbel.cli.said import print_table
    from umbel.tables import written

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    for point in found[0].points:
        table.add_column(" / ".join(str(value) for value in point.values()), justify="right")
    notes = ["", "The best, to be written into the recipe:"]
    for own in found:
        texts = [
            Text(written(score, column.unit), style="bold green" if place == own.chosen else "")
            for place, score in enumerate(own.scores)
        ]
        table.add_row(own.label, *texts)
        if own.chosen is None:
            notes.append(f"  {own.label}: none, for no run has a score")
            continue
        edges = own.edges(grid)
        beyond = f"   # {' and '.join(edges)}: at the edge of what was tried" if edges else ""
        best = ", ".join(f"{key} = {value}" for key, value in own.points[own.chosen].items())
        notes.append(f"  [method.{own.label}]  {best}{beyond}")
    seeds = ", ".join(map(str, asked.seeds))
    share = f"{100 * asked.table['validation']:g} % of each client's training examples"
    unit = ", %" if column.unit == "%" else ""
    print_table(
        f"{asked.recipe}, seeds {seeds}: {column.title}{unit}, on {share}, by {' / '.join(grid)}",
        table,
        "\n".join(notes),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
