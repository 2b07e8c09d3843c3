"""Exporting: which models of a run go to which PEFT folders, and how far truncation took them off."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import typer

from umbel.cli.said import STDOUT, print_json, print_table, say
from umbel.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from umbel.exporting import Exported

LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


@dataclass(frozen=True)
class Asked:
    """What the command was given."""

    run: Path
    clients: Sequence[int] | None
    everyone: bool
    adapter: int | None
    out: Path | None
    rank: int
    replace: bool
    quiet: bool


def write(asked: Asked, json: str | None) -> None:
    """Writes the folders and says where they are."""
    if sum((asked.clients is not None, asked.everyone, asked.adapter is not None)) != 1:
        raise RecipeError("whose model? give one of --client 3, --all and --adapter 0")
    from umbel.exporting import export_each
    from umbel.folder import read_json
    from umbel.runs import opened

    result = opened(asked.run)
    for warning in result.warnings:
        say(f"warning: {warning}")
    identity = str(read_json(asked.run / "run.json").get("identity", ""))
    clients = list(range(result.task.num_clients)) if asked.everyone else list(asked.clients or ())
    folders = _folders(asked, clients, result.task.num_clients)
    coming = export_each(result, folders, clients, asked.adapter, asked.rank, asked.replace, identity)
    done: list[Exported] = []
    try:
        with _watched(len(folders), asked.quiet) as tell:
            for one in coming:
                done.append(one)
                tell(len(done))
    except KeyboardInterrupt:
        if not done:
            raise
        where = done[0].folder.parent
        say(f"stopped; {len(done)} of {len(folders)} folders are whole, in {where}; --replace writes all anew")
        raise typer.Exit(130) from None
    _show(asked, done, json)


def _folders(asked: Asked, clients: Sequence[int], num_clients: int) -> list[Path]:
    """Where each model goes."""
    width = max(4, len(str(num_clients - 1)))
    names = [f"client-{k:0{width}d}" for k in clients] if asked.adapter is None else [f"adapter-{asked.adapter}"]
    if asked.out is not None and len(names) == 1 and not asked.everyone:
        return [asked.out]
    return [(asked.out or asked.run / "export") / name for name in names]


def _show(asked: Asked, done: "Sequence[Exported]", json: str | None) -> None:
    """The folders, and by layer what truncation cost."""
    if json is not None:
        exported = [
            {"folder": str(o.folder), "rank": o.rank, "full_rank": o.full_rank, "errors": o.errors} for o in done
        ]
        print_json({"run": str(asked.run), "exported": exported}, json)
    if json == STDOUT:
        return
    layers = {layer: [one.errors[layer] for one in done] for layer in done[0].errors}
    if layers:
        _print_errors(layers, done[0].rank, done[0].full_rank)
    else:
        print(f"rank {done[0].rank}, exact")
    where = done[0].folder if len(done) == 1 else f"{done[0].folder.parent} ({len(done)} folders)"
    print(f"folder: {where}")
    print(f'next:   PeftModel.from_pretrained(base_model, "{done[0].folder}")')
    if done[0].base is None:
        from umbel.exporting import IN_MEMORY

        made = IN_MEMORY.replace("RUN", f'"{asked.run}"')
        print(f"        base_model is in no folder and on no hub; {made} makes it")


def _print_errors(layers: dict[str, list[float]], rank: int, full_rank: int) -> None:
    from rich.table import Table

    table = Table("layer", "mean", "max")
    for layer, errors in layers.items():
        table.add_row(layer, f"{sum(errors) / len(errors):.2%}", f"{max(errors):.2%}")
    every = [error for errors in layers.values() for error in errors]
    table.add_row("all layers", f"{sum(every) / len(every):.2%}", f"{max(every):.2%}", style="bold")
    print_table(f"rank {rank} of {full_rank}: how far each layer's update is off, ‖ΔW − ΔW'‖ / ‖ΔW‖", table)


@contextmanager
def _watched(total: int, quiet: bool) -> "Iterator[Callable[[int], None]]":
    """A function that is told how many folders are done: a bar on a terminal, elsewhere a line now and then."""
    shown = perf_counter()

    def line(done: int) -> None:
        nonlocal shown
        if not quiet and (now := perf_counter()) - shown > LINE_EVERY:
            shown = now
            say(f"export: {done} of {total}")

    if quiet or total < 2 or not sys.stderr.isatty():
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("export", total=total)
        yield lambda done: bar.update(task, completed=done, refresh=True)
