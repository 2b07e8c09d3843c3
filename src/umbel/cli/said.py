"""What the command line says, and how it ends."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from umbel.errors import UmbelError

if TYPE_CHECKING:
    from rich.table import Table

STDOUT = "-"  # what --json says when no file is named


@contextmanager
def told(folder: Path | None = None, stopped: str = "stopped before anything was written") -> Iterator[None]:
    """Ends the program with what the user can do about an error, or about having stopped it.

    Args:
        folder: of the run or comparison that is at work, which once begun can be gone on with.
        stopped: what is said of having stopped anything else.
    """
    try:
        yield
    except UmbelError as error:
        fail(str(error))
    except KeyboardInterrupt:
        begun = folder is not None and ((folder / "run.json").is_file() or (folder / "compare.toml").is_file())
        say(f"stopped; go on with: umbel resume {folder}" if begun else stopped)
        raise typer.Exit(130) from None


def print_table(title: str, table: "Table", note: str = "") -> None:
    """A line, the table below it, and what must be known about it."""
    from rich.console import Console

    print(title)
    Console(width=room()).print(table)
    if note:
        print(note)


def room() -> int:
    """How many characters a line of a table has: as many as the terminal, for in a file nothing needs to fit."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else 140


def print_json(document: dict[str, Any], place: str) -> None:
    """Prints the document on stdout, or writes it to the file that --json names."""
    from umbel.folder import finite, write_json

    if place == STDOUT:
        print(json.dumps(finite(document), indent=1, allow_nan=False))
    else:
        write_json(Path(place), document)


def listing(title: str, lines: dict[str, str]) -> None:
    """Names with a line about each."""
    width = max(map(len, lines), default=0)
    print(f"{title}:")
    for name, line in lines.items():
        print(f"  {name:<{width}}  {line}")


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Ends the program with what is wrong."""
    say(f"error: {message}")
    raise typer.Exit(2)
