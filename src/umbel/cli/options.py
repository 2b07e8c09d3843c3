"""The commands' options, and a recipe's settings as options: `--a.b=c`."""

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from umbel.cli.said import STDOUT, fail
from umbel.errors import RecipeError
from umbel.schedule import ARRANGED, Schedule

# Of a recipe; whatever else there is is a field of Schedule.
TABLES = ("task", "engine", "method", "local", *ARRANGED)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's name (umbel tasks lists them) or a .toml file.")
]
RecipeNames = Annotated[
    list[str], typer.Argument(metavar="RECIPE…", help="Recipes' names (umbel tasks lists them) or .toml files.")
]
Methods = Annotated[
    str | None, typer.Option(metavar="A,B", help="Labels of the recipes' methods; by default all.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="By default runs/… after the recipe. Finished runs in it are kept, stopped ones gone on with.",
        metavar="FOLDER",
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE.json]",
        help="Print one JSON document on stdout and nothing else there; or write it to the file.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        show_default=False,
        help="Runs at the same time, each on one thread; by default one a core. For one run's clients there is "
        "--engine.workers.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


class Command(TyperCommand):
    """A command whose --json may name a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest: list[str] = super().parse_args(ctx, with_json_place(args))
        return rest


class Overridable(Command):
    """A command that also takes a recipe's settings as options, --a.b=c or --a.b c; they end up in `ctx.args`."""

    tables = TABLES

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        kept, overrides = split_overrides(args, known | set(ctx.help_option_names), self.tables)
        rest = super().parse_args(ctx, kept)
        ctx.args = overrides
        return rest


class Searching(Overridable):
    """One that takes what a search tries as well."""

    tables = (*TABLES, "search")


def with_json_place(args: Sequence[str]) -> list[str]:
    """The arguments with "--json" as "--json=-", and "--json FILE.json" as "--json=FILE.json"."""
    placed: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--json":
            after = Path(rest[0]) if rest and not rest[0].startswith("-") else Path()
            if after.suffix not in ("", ".json", ".toml") and not after.exists():
                fail(f"--json {after}: a file's name that ends in .json is wanted, or none, to print it")
            arg = f"--json={rest.pop(0) if after.suffix == '.json' else STDOUT}"
        if arg.startswith("--json=") and (file := arg.removeprefix("--json=")) != STDOUT:
            if not file or Path(file).is_dir():
                fail(f"--json={file}: a file's name is wanted, or --json alone to print it")
            if not Path(file).parent.is_dir():
                fail(f"--json={file}: there is no folder {Path(file).parent}; make it first")
        placed.append(arg)
    return placed


def split_overrides(
    args: Sequence[str], known: set[str], tables: Sequence[str] = TABLES
) -> tuple[list[str], list[str]]:
    """The arguments that the command itself knows, and the recipe's settings as "a.b=c".

    An option that is neither ends the program, naming the nearest one.
    """
    kept: list[str] = []
    overrides: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if arg == "--":
            return [*kept, arg, *rest], overrides
        if not arg.startswith("--") or name in known:
            kept.append(arg)
            continue
        _check_name(name, known, tables)
        if not equals:
            if not rest or rest[0].startswith("--"):
                fail(f"{name} needs a value: {name}=…")
            value = rest.pop(0)
        overrides.append(f"{name.removeprefix('--')}={value}")
    return kept, overrides


def of_method(overrides: Sequence[str], table: dict[str, Any], label: str) -> list[str]:
    """The overrides with "method.x.y=…" as "method.LABEL.x.y=…", unless x is the label or what it is `like`."""
    own = lineage(table, label)

    def rewritten(override: str) -> str:
        key, _, value = override.partition("=")
        first, *rest = key.split(".")
        if first != "method" or not rest or rest[0] in own:
            return override
        return f"{'.'.join(['method', label, *rest])}={value}"

    return [rewritten(override) for override in overrides]


def chosen_label(method: str | None, table: dict[str, Any]) -> str:
    """The label that --method names, or the only one there is."""
    from umbel.recipe import labels

    known = labels(table)
    if method is None and len(known) != 1:
        raise RecipeError(
            f"which method? --method is one of {', '.join(known)}" if known else "--method is missing"
        )
    return known[0] if method is None else method


def numbers_of(option: str, text: str) -> list[int]:
    """The numbers of "0,1,2", each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise RecipeError(f"--{option}={text}: whole numbers are wanted, such as --{option}=0,1,2") from None


def check_reach(overrides: Sequence[str], tables: Sequence[dict[str, Any]], chosen: Sequence[str]) -> None:
    """Refuses settings of a method that is not compared, which would change nothing."""
    reached = {name for table in tables for label in chosen for name in lineage(table, label)}
    for override in overrides:
        key, _, _ = override.partition("=")
        first, *rest = key.split(".")
        if first == "method" and rest and rest[0] not in reached:
            raise RecipeError(
                f"--{key}: {rest[0]!r} is none of the methods compared ({', '.join(chosen)}); "
                f"name one of them, as in --method.{chosen[-1]}.SETTING=…"
            )
        if key == "seed":
            raise RecipeError("--seed: a comparison has several; use --seeds")


def lineage(table: dict[str, Any], label: str) -> list[str]:
    """The label, and those whose settings it takes over."""
    found = [label]
    while True:
        own = table.get("method", {}).get(found[-1], {})
        like = own.get("like") if isinstance(own, dict) else None
        if not isinstance(like, str) or like in found:
            return found
        found.append(like)


def _check_name(name: str, known: set[str], tables: Sequence[str]) -> None:
    """Ends the program if "--name" is no option and cannot be a setting of a recipe."""
    first, *rest = name.removeprefix("--").split(".")
    plain = {field.name for field in fields(Schedule)} - set(tables)
    if (first in tables and rest) or (first in plain and not rest):
        return
    if f"--{first}s" in known and not rest:
        fail(f"there is no option {name} here; --{first}s takes one or several: --{first}s=A,B")
    if first in tables:
        fail(f"{name} is a table of settings; give one of them: {name}.SETTING=…")
    if rest:
        near = get_close_matches(first, tables, n=1)
        own = near[0] if near else f"method.LABEL.{first}" if "--methods" in known else f"method.{first}"
        fail(f"there is no option {name}; did you mean --{'.'.join([own, *rest])}?")
    options = sorted(known | {f"--{key}" for key in plain} | {f"--{key}.…" for key in tables})
    near = get_close_matches(name, options, n=1)
    meant = (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(o for o in options if o.startswith('--'))}"
    )
    fail(f"there is no option {name}; {meant}")
