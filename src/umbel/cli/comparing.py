"""Comparisons: one recipe or several, each with several methods and seeds, in a folder that can be gone on with.

    FOLDER/compare.toml               what was asked for
    FOLDER/floral-seed0/              a run folder for every method and seed
    FOLDER/report.html

With several recipes FOLDER/compare.toml names the cells, and each cell FOLDER/mnist_r/ is such a folder.
A run that is finished is never repeated.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from umbel.cli.jobs import Job, errors_of
from umbel.cli.options import check_reach
from umbel.cli.said import STDOUT, print_json, say, told
from umbel.cli.show import comparison_document, grid_document, print_comparison, print_grid
from umbel.errors import RecipeError, RunFolderError

if TYPE_CHECKING:
    from umbel.recipe import Recipe, Table
    from umbel.tables import Group, Run


@dataclass(frozen=True)
class Asked:
    """What a comparison of one recipe is to do; what its compare.toml says."""

    recipe: str  # what it is called
    labels: list[str]
    seeds: list[int]
    table: dict[str, Any]  # the recipe's, with all overrides


def asked_for(
    recipes: Sequence[str], overrides: Sequence[str], methods: str | None, seeds: list[int]
) -> list[Asked]:
    """What is to be done for each recipe; whatever is wrong with one of them is said here.

    Of several recipes each runs those of the `methods` that it describes, and those that none describes.
    """
    from umbel.recipe import find, labels, load, read, title_of

    paths = list(dict.fromkeys(map(find, recipes)))
    plain = [load(path) for path in paths]
    known = {label for table in plain for label in labels(table)}
    chosen = list(dict.fromkeys(methods.split(","))) if methods is not None else None
    reached = chosen or [label for table in plain for label in labels(table)]
    if not reached:
        raise RecipeError(f"{paths[0]} has no [method.…] table; name methods with --methods")
    check_reach(overrides, plain, list(dict.fromkeys(reached)))
    titles = [title_of(path) for path in paths]
    asked = []
    for path, own, title in zip(paths, plain, titles, strict=True):
        mine = [label for label in chosen or labels(own) if label in labels(own) or label not in known]
        if not mine:
            continue
        table = load(path, overrides)
        table.setdefault("engine", {}).setdefault("threads", 1)  # however many runs share the machine
        for label in mine:
            read(table, label)  # what is wrong with the last method is said before the first one runs
        unique = title if titles.count(title) == 1 else path.with_suffix("").as_posix()
        asked.append(Asked(unique, mine, seeds, table))
    return asked


def default_folder(asked: Sequence[Asked]) -> Path:
    """Where a comparison goes if nothing else is said."""
    names, above = _short([own.recipe for own in asked])
    name = above or (names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more")
    return Path("runs") / f"compare-{name}"


def begin(folder: Path, asked: Sequence[Asked]) -> dict[Path, Asked]:
    """The folder of each recipe's runs, which are there then, with what was asked for written into them.

    Raises:
        RunFolderError: something else is in the folder, or runs with other settings.
    """
    import tomli_w

    from umbel.folder import check_free, write
    from umbel.tables import COMPARISON

    there = (folder / COMPARISON).is_file()
    if not there:
        check_free(folder)
    names, _ = _short([own.recipe for own in asked])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RunFolderError(f"two of the recipes would have the folder {folder / twice[0]}; rename one of them")
    cells = {folder / name: own for name, own in zip(names, asked, strict=True)} if len(asked) > 1 else {}
    before = _cells(folder) if there else []
    if there and bool(before) != bool(cells):
        raise RunFolderError(
            f"{folder} is a comparison of {'one recipe' if cells else 'several recipes'}, and this is none; name "
            "another folder with --out"
        )
    for path, own in (cells or {folder: asked[0]}).items():
        _check_settings(path, _together(path, own))  # what is there already is shown beside it
    files = {
        path / COMPARISON: asdict(_together(path, own)) for path, own in (cells or {folder: asked[0]}).items()
    }
    if cells:
        files = {folder / COMPARISON: {"cells": list(dict.fromkeys([*before, *names]))}} | files
    for file, content in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{file.parent} cannot be made: {error.strerror}") from error
        write(file, tomli_w.dumps(content).encode())
    return cells or {folder: asked[0]}


def begun(folder: Path) -> dict[Path, Asked]:
    """What `begin` once gave for the folder."""
    cells = _cells(folder)
    return {path: _asked(path) for path in ([folder / name for name in cells] if cells else [folder])}


def go(folder: Path, cells: dict[Path, Asked], workers: int, json: str | None, quiet: bool) -> None:
    """Runs, or goes on with, all that was asked for; then the tables and the reports."""
    with told(folder):
        failed = ran(cells, workers, quiet)
        _show(folder, cells, failed, json)
        if any(failed.values()):
            raise typer.Exit(2)


def ran(cells: dict[Path, Asked], workers: int, quiet: bool) -> dict[Path, list[dict[str, Any]]]:
    """Runs, or goes on with, all that was asked for; what failed in each cell. Ends if everything did."""
    from umbel.tables import read_run, run_name

    names, _ = _short([own.recipe for own in cells.values()])
    wanted = [
        (path / run_name(label, seed), own, name, label, seed)
        for seed in dict.fromkeys(seed for own in cells.values() for seed in own.seeds)
        for (path, own), name in zip(cells.items(), names, strict=True)
        for label in own.labels
        if seed in own.seeds
    ]
    jobs = []
    for place, (path, own, name, label, seed) in enumerate(wanted, 1):
        if path.exists() and read_run(path).finished:
            continue
        what = f"{name} {label}" if len(cells) > 1 else label
        title = f"{place}/{len(wanted)} {what} seed {seed}"
        jobs.append(Job(own.table, label, seed, path, title, quiet))
    failed: dict[Path, list[dict[str, Any]]] = {path: [] for path in cells}
    for job, error in zip(jobs, errors_of(jobs, workers), strict=True):
        if error is not None:  # the other runs are worth having all the same
            failed[job.folder.parent].append({"label": job.label, "seed": job.seed, "error": error})
            where = f"{names[list(cells).index(job.folder.parent)]}, " if len(cells) > 1 else ""
            say(f"error: {where}{job.label}, seed {job.seed}: {error}")
    if sum(map(len, failed.values())) == len(wanted):
        raise typer.Exit(2)
    return failed


def _show(
    folder: Path,
    cells: dict[Path, Asked],
    failed: dict[Path, list[dict[str, Any]]],
    json: str | None,
) -> None:
    from umbel.report import write_report

    names, above = _short([own.recipe for own in cells.values()])
    groups = {path: groups_of(path, own) for path, own in cells.items()}
    pages = {path: write_report([path], path / "report.html") for path, found in groups.items() if found}
    documents = [
        comparison_document(path, pages.get(path), asdict(own), groups[path], failed[path])
        for path, own in cells.items()
    ]
    if json is not None:
        print_json(documents[0] if len(cells) == 1 else grid_document(folder, documents), json)
    if json == STDOUT:
        return
    if len(cells) == 1:
        ((path, own),) = cells.items()
        print_comparison(asdict(own), groups[path])
        print(f"report: {pages[path]}")
        return
    print_grid(above, names, [asdict(own) for own in cells.values()], list(groups.values()))
    print(f"reports: {folder}/*/report.html")


def groups_of(path: Path, asked: Asked) -> "list[Group]":
    """The groups of the runs that were asked for, those that there are."""
    from umbel.tables import find_runs, grouped, run_name

    names = [run_name(label, seed) for label in asked.labels for seed in asked.seeds]
    found = [path / name for name in names if (path / name / "run.json").is_file()]
    return grouped([replace(run, recipe=_whole(run)) for run in find_runs(found) if run.scored])


def _check_settings(path: Path, asked: Asked) -> None:
    """Refuses a folder whose runs were made with other settings than those that are asked for now."""
    from umbel.folder import RunFolder
    from umbel.recipe import read
    from umbel.tables import differing, read_run, run_name

    for label in asked.labels:
        for seed in asked.seeds:
            own = path / run_name(label, seed)
            if not own.exists():
                continue
            recipe = read(asked.table | {"seed": seed}, label)
            known = read_run(own)
            if known.facts.get("identity") == RunFolder.opened(own, recipe.identity()).identity:
                continue
            # Settings that were not there yet when the run was made are at their defaults in it.
            if not _same(known.recipe, label, recipe):
                how = differing(known.recipe, recipe.table()) or "by another version of umbel"
                raise RunFolderError(
                    f"{own} was made with other settings ({how}); name another folder with --out, or remove it"
                )


def _whole(run: "Run") -> "Table":
    """The run's recipe, settings that were not there yet when it was made at their defaults."""
    from umbel.errors import RecipeError
    from umbel.recipe import read

    try:
        return read(run.recipe, run.label).table()
    except RecipeError:  # another version's, or of a method that is not registered here
        return run.recipe


def _same(table: "Table", label: str, recipe: "Recipe") -> bool:
    """Whether a run's table, read by this version, is this recipe."""
    from umbel.errors import RecipeError
    from umbel.recipe import read

    try:
        return read(table, label).identity() == recipe.identity()
    except RecipeError:
        return False


def _cells(folder: Path) -> list[str]:
    """The names of a comparison's folders, [] where it is of one recipe.

    Raises:
        RunFolderError: compare.toml has something else in their place.
    """
    from umbel.tables import COMPARISON, read_toml

    content = read_toml(folder / COMPARISON)
    cells = content.get("cells", [])
    if "cells" in content and not (cells and isinstance(cells, list) and all(isinstance(n, str) for n in cells)):
        raise RunFolderError(f"{folder / COMPARISON}: cells: names of folders are wanted, got {cells!r}")
    return list(cells)


def _asked(path: Path) -> Asked:
    """What the compare.toml in the folder says.

    Raises:
        RunFolderError: a key in it is unknown, missing or of the wrong type.
    """
    from umbel.recipe import build, check_tables
    from umbel.tables import COMPARISON, read_toml

    file = path / COMPARISON
    content = read_toml(file)
    if lacking := [own.name for own in fields(Asked) if own.name not in content]:
        raise RunFolderError(f"{file} has no {lacking[0]}; restore it, or begin anew in another folder")
    try:
        asked = build(Asked, content, "")
        check_tables(asked.table)
    except RecipeError as error:
        raise RunFolderError(f"{file}: {error}") from None
    return asked


def _together(path: Path, asked: Asked) -> Asked:
    """What is asked for now, with the methods and seeds that were before."""
    from umbel.tables import COMPARISON

    if not (path / COMPARISON).is_file():
        return asked
    before = _asked(path)
    methods = before.table.get("method", {}) | asked.table.get("method", {})
    return replace(
        asked,
        labels=list(dict.fromkeys([*before.labels, *asked.labels])),
        seeds=list(dict.fromkeys([*before.seeds, *asked.seeds])),
        table=asked.table | ({"method": methods} if methods else {}),
    )


def _short(names: Sequence[str]) -> tuple[list[str], str]:
    """The recipes' names as names of folders, and what was common to all of them, in front of a slash."""
    above = {name.rpartition("/")[0] for name in names}
    common = above.pop() if len(above) == 1 and len(names) > 1 else ""
    rest = [name.removeprefix(f"{common}/") if common else name for name in names]
    return [name.strip("/.").replace("/", "-") for name in rest], common.replace("/", "-")
