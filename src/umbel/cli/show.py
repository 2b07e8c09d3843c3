"""What came out, as tables for people and as documents for JSON."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.cli.said import STDOUT, print_json, print_table, room
from umbel.errors import RunFolderError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from umbel.onboarding import Point
    from umbel.runs import Result
    from umbel.tables import Group

EARLY = 3  # rounds of which a document says how well clusters agree with groups
WORTH_A_LINE = 0.01  # of what a client sends: smaller groups of tensors are numbers beside the model

# What several recipes' costs are, a title and the figures that a column has, each with its unit.
COSTS = {
    "What a client trains (parameters), sends and receives in its round, and all of a run's training": {
        "parameters": "count",
        "bytes_up_per_client_round": "bytes",
        "bytes_down_per_client_round": "bytes",
        "train_seconds": "seconds",
    },
    "A client's steps and arithmetic in its round, and what the server holds": {
        "steps_per_client_round": "count",
        "flops_per_client_round": "FLOP",
        "server_bytes": "bytes",
    },
}


def show_run(folder: Path, label: str, seed: int, result: "Result", json: str | None) -> None:
    """The run's end: a table, or one JSON document."""
    from umbel.tables import dropped, losses, read_run, total

    if "round" not in result.figures:
        raise RunFolderError(f"{folder / 'metrics.jsonl'} has lost its lines; remove the folder and run it again")
    keys = ("bytes_up", "bytes_down", "steps", "flops", "train_seconds", "seconds", "no_quorum")
    sums: dict[str, Any] = {key: total(result.history, key) for key in keys}
    sums |= {"dropped": dropped(result.history), "lost": losses(result.history)}
    travels = read_run(folder).travels
    if json is not None:
        about = {"folder": str(folder), "label": label, "seed": seed, "rounds": result.progress.round}
        found = {"figures": result.figures, "totals": sums, "travels": travels, "warnings": result.warnings}
        print_json(about | found, json)
    if json == STDOUT:
        return
    title = f"{label}, seed {seed}, {result.figures['round']} rounds"
    print_table(title, run_table(result.figures, sums, travels))
    print(f"folder: {folder}")
    print(f"next:   umbel report {folder}")


def run_table(figures: dict[str, Any], sums: dict[str, Any], travels: dict[str, dict[str, int]]) -> "Table":
    """What a run came to."""
    from rich.table import Table

    from umbel.tables import num_bytes, num_flops, said_of, seconds

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, str | None]] = [
        ("accuracy, mean over clients", _with("accuracy", "{:.2f} %", figures)),
        (
            "  worst tenth of the clients",
            _with("worst_decile", "{:.2f} %", figures) if "accuracy" in figures else None,
        ),
        ("loss, mean over clients", _with("loss", "{:.4g}", figures)),
        ("perplexity, mean over clients", _with("perplexity", "{:.4g}", figures)),
        (
            "  worst tenth of the clients",
            None if "accuracy" in figures else _with("worst_decile", "{:.4g}", figures),
        ),
        ("routes agree with true groups (NMI)", _with("nmi", "{:.3f}", figures)),
        ("routing entropy, nats", _with("entropy_nats", "{:.3f}", figures)),
        ("adapters or models that nobody uses", _with("dead", "{}", figures)),
        ("trust in oneself, mean weight", _with("self_trust", "{:.3f}", figures)),
        ("  in another client of one's group", _with("trust_inside", "{:.4f}", figures)),
        ("  in a client of another group", _with("trust_outside", "{:.4f}", figures)),
        ("privacy spent", _spent(figures)),
        ("  largest error of a masked sum", _with("secure_error", "{:.1e}", figures)),
        ("sent by clients", num_bytes(sums["bytes_up"])),
        *_groups_of_tensors(travels.get("up", {})),
        ("sent to clients", num_bytes(sums["bytes_down"])),
        *_groups_of_tensors(travels.get("down", {})),
        ("optimizer steps of all clients", f"{sums['steps']:,.0f}" if sums["steps"] else None),
        ("their products and convolutions", num_flops(sums["flops"]) if sums["flops"] else None),
        ("training", seconds(sums["train_seconds"])),
        ("evaluation", seconds(sums["seconds"] - sums["train_seconds"])),
        ("updates that did not count", said_of(sums["lost"]) if sums["lost"] else None),
        ("rounds without a quorum", str(sums["no_quorum"]) if sums["no_quorum"] else None),
        ("attack succeeds on honest clients", _with("attack_success", "{:.2f} %", figures)),
    ]
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    return table


def _with(key: str, form: str, figures: dict[str, Any]) -> str | None:
    return form.format(figures[key]).replace("-0.000", "0.000") if key in figures else None


def _spent(figures: dict[str, Any]) -> str | None:
    """ε at δ, where a run keeps account of it."""
    return f"ε = {figures['epsilon']:.3g} at δ = {figures['delta']:g}" if "epsilon" in figures else None


def _groups_of_tensors(sizes: dict[str, int]) -> list[tuple[str, str | None]]:
    """What one client sends or receives in a round, where that is more than one kind of tensors to speak of."""
    from umbel.tables import num_bytes

    large = {name: size for name, size in sizes.items() if size >= WORTH_A_LINE * sum(sizes.values())}
    if len(large) < 2:
        return []
    return [(f"  {name}, by a client in a round", num_bytes(size)) for name, size in large.items()]


def print_comparison(asked: dict[str, Any], groups: Sequence["Group"]) -> None:
    """One recipe: how well each method does, mean ± standard deviation over seeds, and below what it costs."""
    from umbel.recipe import published
    from umbel.tables import best, columns, cost_columns, dropped, of_paper, spread, written

    table = _plain_table()
    paper = published(asked["table"])
    shown = columns(groups)
    tops = {column.key: best(groups, column) for column in shown}
    lost = {group.label: sum(dropped(run.history) for run in group.runs) for group in groups}
    for column in shown:
        table.add_column(column.title + (", %" if column.unit == "%" else ""), justify="right")
        if paper and column is shown[0]:
            table.add_column("published", justify="right")
    if any(lost.values()):
        table.add_column("dropped", justify="right")
    for group in groups:
        row = [_name(group)]
        for column in shown:
            row.append(_figure(written(spread(group, column.key), column.unit), group.label in tops[column.key]))
            if paper and column is shown[0]:
                row.append(_figure(written(of_paper(paper.get(group.label)), column.unit), False))
        if any(lost.values()):
            row.append(_figure(str(lost[group.label]), False))
        table.add_row(*row)
    seeds = ", ".join(str(seed) for seed in asked["seeds"])
    print_table(f"{asked['recipe']}, seeds {seeds}: mean ± standard deviation over seeds", table, _notes(groups))
    costs = _plain_table()
    for column in cost_columns(groups):
        costs.add_column(column.title, justify="right")
    for group in groups:
        cells = (written(spread(group, column.key), column.unit) for column in cost_columns(groups))
        costs.add_row(_name(group), *cells)
    print_table("\nWhat one client costs in one round; what the server holds; all of the training", costs)


def print_grid(
    above: str, names: Sequence[str], asked: Sequence[dict[str, Any]], groups: Sequence[Sequence["Group"]]
) -> None:
    """Several recipes side by side: a column for each, a row for every method, "ours (published)"; then costs."""
    from umbel.recipe import published

    rows = list(dict.fromkeys(label for own in asked for label in own["labels"]))
    papers = [published(own["table"]) for own in asked]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for own in asked for seed in own["seeds"]))
    title = f"{above + ', ' if above else ''}seeds {seeds}: mean ± standard deviation over seeds"
    title += " (published)" if any(papers) else ""
    scores = [
        _cell_column(name, rows, own["labels"], paper, found)
        for name, own, paper, found in zip(names, asked, papers, groups, strict=True)
    ]
    _print_columns(title, rows, scores)
    if note := _notes([group for found in groups for group in found]):
        print(note)
    for title, shown in COSTS.items():
        costs = [(name, _costs(rows, found, shown)) for name, found in zip(names, groups, strict=True)]
        _print_columns(f"\n{title}", rows, costs)


def _print_columns(title: str, rows: Sequence[str], left: list[tuple[str, list["Text"]]]) -> None:
    """A column for each recipe; those that do not fit beside the others are in a further table."""
    while left:
        table, here, width = _plain_table(), list[list["Text"]](), room() - max(map(len, rows)) - 1
        while left and (not here or width >= _width(*left[0])):
            name, texts = left.pop(0)
            width -= _width(name, texts)
            table.add_column(name, justify="right", no_wrap=True)
            here.append(texts)
        for place, label in enumerate(rows):
            if any(texts[place].plain for texts in here):
                table.add_row(label, *(texts[place] for texts in here))
        print_table(title, table)
        title = ""


def _costs(rows: Sequence[str], groups: Sequence["Group"], shown: dict[str, str]) -> list["Text"]:
    """Some costs of each row's method, with their units, empty for methods that there is nothing of."""
    from umbel.tables import spread, written

    by_label = {group.label: group for group in groups}
    texts = []
    for label in rows:
        figures = {key: spread(by_label[label], key) for key in shown} if label in by_label else {}
        parts = ["–" if figure is None else written(figure, shown[key]) for key, figure in figures.items()]
        texts.append(_figure(" · ".join(parts) if any(figures.values()) else "", False))
    return texts


def _cell_column(
    name: str,
    rows: Sequence[str],
    labels: Sequence[str],
    paper: dict[str, tuple[float, float | None]],
    groups: Sequence["Group"],
) -> tuple[str, list["Text"]]:
    """A recipe's heading and a figure for each row, empty for methods that it does not have."""
    from umbel.tables import beside, best, columns, spread

    if not groups:
        return name, [_figure("–" if label in labels else "", False) for label in rows]
    column = columns(groups)[0]
    tops, by_label = best(groups, column), {group.label: group for group in groups}
    texts = []
    for label in rows:
        ours = spread(by_label[label], column.key) if label in by_label else None
        text = beside(ours, paper.get(label), column.unit) if label in labels else ""
        texts.append(_figure(text, label in tops))
    return f"{name}, {'%' if column.unit == '%' else column.title}", texts


def print_onboarding(groups: Sequence["Group"]) -> None:
    """How well unseen clients do, a row for each number of samples and a column for each way."""
    from umbel.tables import onboarded, written

    for group in groups:
        found = onboarded(group)
        if found is None:
            continue
        unit = "%" if found.metric == "accuracy" else ""
        table = _plain_table("samples")
        for way in found.ways:
            table.add_column(way, justify="right")
        for samples in found.samples:
            cells = (written(points.get(samples), unit) for points in found.ways.values())
            table.add_row(str(samples), *cells)
        what = f"{found.metric}{', %' if unit else ''}"
        over = "runs" if len(group.runs) > 1 else "clients"
        note = f"Clients that trained, with all their samples: {written(found.trained, unit)}."
        if not found.settles:
            note += "\nThis method has nothing for a new client to learn but fine-tuning."
        title = f"{group.label}, {found.num_clients} unseen clients: {what}, mean ± deviation over {over}"
        print_table(title, table, note)


def print_ways(ways: Mapping[str, Sequence["Point"]]) -> None:
    """How well one client does, a row for each number of samples and a column for each way."""
    table = _plain_table("samples")
    for way in ways:
        table.add_column(way, justify="right")
    for points in zip(*ways.values(), strict=True):
        table.add_row(str(points[0].samples), *(f"{point.mean:.4g}" for point in points))
    print_table("on its own test data, by how many of its samples it has", table)


def _plain_table(first: str = "method") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    return table


def _name(group: "Group") -> "Text":
    from rich.text import Text

    return Text(group.label, style="italic" if group.oracle else "")


def _figure(text: str, best: bool) -> "Text":
    from rich.text import Text

    return Text(text, style="bold green" if best else "")


def _width(name: str, texts: Sequence["Text"]) -> int:
    return 1 + max(len(name), *(len(text.plain) for text in texts))


def _notes(groups: Sequence["Group"]) -> str:
    """What a reader of the table must know."""
    runs = [run for group in groups for run in group.runs]
    notes = [
        f"Not finished: {run.path}, {len(run.history)} of {run.rounds} rounds." for run in runs if not run.finished
    ]
    if shares := {run.schedule.get("validation", 0) for run in runs} - {0}:
        notes.append(
            f"Tested on training examples (validation = {', '.join(f'{own:g}' for own in sorted(shares))})."
        )
    if any(group.oracle for group in groups):
        notes.append("Oracles know the clients' true groups: references, not contestants.")
    return "\n".join(notes)


def comparison_document(
    folder: Path,
    page: Path | None,
    asked: dict[str, Any],
    groups: Sequence["Group"],
    failed: list[dict[str, Any]],
) -> dict[str, Any]:
    """The comparison with every run's figures, for JSON."""
    from umbel.folder import machine
    from umbel.recipe import published
    from umbel.tables import dropped, spread, totals

    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in totals(run)))
    paper = published(asked["table"])
    rows = []
    for group in groups:
        found = {key: spread(group, key) for key in keys}
        rows.append(
            {
                "label": group.label,
                "oracle": group.oracle,
                **{key: vars(own) for key, own in found.items() if own is not None},
                **({"paper": paper[group.label]} if group.label in paper else {}),
                "travels": group.runs[0].travels,
                "dropped": sum(dropped(run.history) for run in group.runs),
                "runs": [
                    {
                        "folder": str(run.path),
                        "seed": run.seed,
                        "umbel_commit": run.facts.get("umbel_commit"),  # a comparison may be gone on with
                        "rounds": len(run.history),
                        "figures": run.scored[-1] if run.scored else {},
                        "curve": curve(run.scored),
                        **clustering(run.history),
                        **first_trust(run.history),
                        "totals": totals(run),
                    }
                    for run in group.runs
                ],
            }
        )
    about = {"command": shlex.join(["umbel", *sys.argv[1:]]), **machine()}
    about |= {
        "recipe": asked["recipe"],
        "folder": str(folder),
        "report": page and str(page),
        "seeds": asked["seeds"],
    }
    return about | {"methods": rows, "failed": failed}


def curve(scored: Sequence[dict[str, Any]]) -> list[list[float]]:
    """[round, accuracy or loss] of some fifty evaluations, evenly spread, the last one among them."""
    kept = scored[:: -(-len(scored) // 50) or 1]
    kept = [*kept, scored[-1]] if scored and kept[-1] is not scored[-1] else list(kept)
    return [[line["round"], round(line.get("accuracy", line["loss"]), 6)] for line in kept]


def first_trust(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """[round, mean trust in oneself, inside the group, outside it] of the first mix; {} if nobody trusts anyone.

    How sharply groups are told apart is seen then: later on those who mix are alike.
    """
    names = ("self_trust", "trust_inside", "trust_outside")
    told = (line for line in history if all(name in line for name in names) and line["self_trust"] < 1)
    first = next(told, None)
    return {} if first is None else {"first_trust": [first["round"], *(first[name] for name in names)]}


def clustering(history: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """[round, cluster accuracy, adjusted Rand index, NMI] of the first rounds that tell them; {} if none does.

    Those of the first rounds say how soon groups are found; those of the last are among a run's figures.
    """
    told = [line for line in history if "cluster_accuracy" in line][:EARLY]
    names = ("cluster_accuracy", "ari", "nmi")
    return (
        {"clustering": [[line["round"], *(round(line[name], 6) for name in names)] for line in told]}
        if told
        else {}
    )


def grid_document(folder: Path, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several recipes' comparisons as one document."""
    about = {
        key: documents[0][key] for key in ("command", "started", "umbel_commit", "torch", "python", "machine")
    }
    cells = [{key: value for key, value in own.items() if key not in about} for own in documents]
    return about | {"folder": str(folder), "cells": cells}
