"""Accuracy against ε, FLoRAL beside FedAvg and training alone; and docs/privacy.md's tables from it.

python benchmarks/privacy.py --out benchmarks/results/privacy.json
python benchmarks/privacy.py --page
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

import measure
from umbel.errors import RoundError
from umbel.folder import machine
from umbel.recipe import read
from umbel.runs import run_recipe

Table = dict[str, Any]

ROOT = Path(__file__).parents[1]
STORED, PAGE = ROOT / "benchmarks/results/privacy.json", ROOT / "docs/privacy.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

DIGITS: Table = {
    "rounds": 20,
    "task": {"name": "digits", "variant": "label_shift"},
    "local": {"lr": 0.1, "batch_size": 4},
}
MNIST: Table = {
    "rounds": 100,
    "clients_per_round": 100,
    "task": {"name": "mnist", "variant": "label_shift", "num_clients": 1000, "reduction": 1 / 3, "hidden": 48},
    "local": {"lr": 0.5, "batch_size": 20},
}
# Routes are explored to the end: that phase's losses are bounded, and noise decides less. Seen on seed 100. Nothing
# starts anew, for noise would decide what.
FLORAL: Table = {
    "num_adapters": 4,
    "adapter": {"rank": 4},
    "guard": 0.25,
    "router": {"explore": 1.0},
    "restart_below": 0.0,
}
METHODS: Table = {
    "local": {},
    "fedavg": {},
    "floral": FLORAL,
    "floral-gradient": {"like": "floral", "router": {"kind": "gradient"}},
    "floral-oracle": {"like": "floral", "router": {"kind": "oracle"}},
}
ENDLESS = float("inf")

# what is run: the part of the page, the recipe, what is protected, the methods, ε
CLIENTS = ("fedavg", "floral", "local")
ORACLE = ("floral-oracle",)
EXAMPLES = ("local", "fedavg", "floral-gradient")
CELLS: list[tuple[str, Table, str, tuple[str, ...], tuple[float, ...]]] = [
    ("mnist, 1,000 clients", MNIST, "client", CLIENTS, (ENDLESS, 8.0, 2.0)),
    ("digits, 40 clients", DIGITS, "client", CLIENTS, (ENDLESS, 50.0, 8.0, 2.0)),
    ("digits, 40 clients, examples", DIGITS | {"rounds": 10}, "example", EXAMPLES, (ENDLESS, 8.0)),
    ("mnist, 1,000 clients", MNIST, "client", ORACLE, (ENDLESS, 8.0, 2.0)),
    ("digits, 40 clients", DIGITS, "client", ORACLE, (ENDLESS, 50.0, 8.0, 2.0)),
]


def recipe_of(base: Table, level: str, label: str, epsilon: float, seed: int) -> Table:
    """The recipe's table of one run; at ε = ∞ nothing is clipped, and there is no noise."""
    protected = {"level": level, "epsilon": epsilon} if epsilon < ENDLESS and label != "local" else {}
    return base | {
        "seed": seed,
        "evaluate_every": base["rounds"],
        "weighting": {"rule": "one"},
        "engine": {"mode": "stacked"},
        "method": METHODS,
        "privacy": protected,
    }


def measured(base: Table, level: str, label: str, epsilon: float, seed: int) -> Table:
    """One run's figures; of one in which noise ended training, what it said."""
    begin = perf_counter()
    try:
        result = run_recipe(read(recipe_of(base, level, label, epsilon, seed), label))
    except RoundError as error:
        return {"seed": seed, "diverged": str(error)}
    figures = result.figures
    kept = ("accuracy", "worst_decile", "nmi", "epsilon", "delta")
    clips = {name: value for name, value in figures.items() if name.startswith("clip_")}
    ledger = result.cohort.ledger
    multiplier = {} if ledger is None else {"noise_multiplier": ledger.privacy.noise_multiplier}
    found = {name: figures[name] for name in kept if name in figures}
    return found | clips | multiplier | {"seed": seed, "seconds": perf_counter() - begin}


def run(document: Table, out: Path | None, only: str) -> None:
    """Adds the cells that the document lacks (of those with `only` in their names), one after the other.

    The file is written after each: what was measured once is not measured again.
    """
    cells = document["cells"]
    for name, base, level, labels, epsilons in CELLS:
        for epsilon in epsilons if only in name else ():
            told = "inf" if epsilon == ENDLESS else epsilon
            for label in labels:
                known = any(
                    (cell["task"], cell["label"], cell["epsilon"]) == (name, label, told) for cell in cells
                )
                if known or (label == "local" and epsilon < ENDLESS):  # training alone sends nothing
                    continue
                runs = [measured(base, level, label, epsilon, seed) for seed in document["seeds"]]
                cells.append({"task": name, "level": level, "label": label, "epsilon": told, "runs": runs})
                print(name, label, told, [run.get("accuracy") for run in runs], file=sys.stderr, flush=True)
                if out:
                    measure.write(document, out)


def tables(document: Table) -> list[str]:
    """The page's tables: a row for each ε, a column for each method."""
    lines: list[str] = []
    for task in dict.fromkeys(cell["task"] for cell in document["cells"]):
        own = [cell for cell in document["cells"] if cell["task"] == task]
        labels = list(dict.fromkeys(cell["label"] for cell in own))
        sent = [label for label in labels if label != "local"]
        lines += [f"**{task}**; {document['settings'][task]}", ""]
        lines += ["| ε | z | " + " | ".join(sent) + " |", "|---" * (len(sent) + 2) + "|"]
        for epsilon in dict.fromkeys(cell["epsilon"] for cell in own):
            row = {cell["label"]: cell for cell in own if cell["epsilon"] == epsilon}
            noise = next(iter(row[label]["runs"][0].get("noise_multiplier") for label in sent if label in row))
            cells = [_cell(row.get(label)) for label in sent]
            spent = "∞" if epsilon == "inf" else f"{epsilon:g}"
            lines.append(f"| {spent} | {f'{noise:.2f}' if noise else '–'} | {' | '.join(cells)} |")
        alone = next(cell for cell in own if cell["label"] == "local")
        lines += ["", f"Every client alone, which sends nothing: {_cell(alone)}.", ""]
    lines += [
        f"`{document['command']}` · commit {document['umbel_commit']} · {document['machine']} · "
        f"seeds {', '.join(map(str, document['seeds']))}"
    ]
    return lines


def _cell(cell: Table | None) -> str:
    if cell is None:
        return "–"
    scores = [run["accuracy"] for run in cell["runs"] if "accuracy" in run]
    if len(scores) < len(cell["runs"]):
        return "diverged"
    apart = f" ({' / '.join(f'{score:.1f}' for score in scores)})" if len(scores) > 1 else ""
    agreement = [run["nmi"] for run in cell["runs"] if "nmi" in run]
    routes = f", NMI {fmean(agreement):.2f}" if agreement and "oracle" not in cell["label"] else ""
    return f"{fmean(scores):.1f}{apart}{routes}"


def settings_of(base: Table) -> str:
    """What a reader must know of a cell's training."""
    task, local = base["task"], base["local"]
    taking = f"{base['clients_per_round']} of them a round on average" if "clients_per_round" in base else "all"
    return (
        f"{base['rounds']} rounds, {taking}, {task['variant']}, lr {local['lr']}, batches of {local['batch_size']}; "
        "accuracy in %"
    )


def write_page() -> None:
    """docs/privacy.md with the stored figures between its two marks."""
    text = PAGE.read_text(encoding="utf-8")
    above, _, rest = text.partition(BEGIN)
    _, _, below = rest.partition(END)
    lines = tables(json.loads(STORED.read_text()))
    PAGE.write_text("\n".join([above + BEGIN, "", *lines, "", END]) + below, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("--only", default="", help="cells with this in their name")
    parser.add_argument("--page", action="store_true", help="make the page of the stored figures; run nothing")
    chosen = parser.parse_args()
    if chosen.page:
        write_page()
        return
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    document = {
        "command": " ".join(["python", *sys.argv]),
        **machine(),
        "seeds": seeds,
        "settings": {name: settings_of(base) for name, base, *_ in CELLS},
        "recipes": {name: base for name, base, *_ in CELLS} | {"method": METHODS},
        "cells": [],
    }
    if chosen.out and chosen.out.exists():
        stored = json.loads(chosen.out.read_text())
        if (stored["seeds"], stored["recipes"]) == (document["seeds"], document["recipes"]):
            document = stored
    run(document, chosen.out, chosen.only)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
