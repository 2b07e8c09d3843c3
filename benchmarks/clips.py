"""How far clips may rise: accuracy over rounds on MNIST at ε = 8, on the seed that settings are looked at with.

python benchmarks/clips.py --out benchmarks/results/clips.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from privacy import MNIST, recipe_of
from umbel.folder import machine
from umbel.recipe import read
from umbel.rounds import Progress
from umbel.runs import run_recipe

SEED, EPSILON, EVERY = 100, 8.0, 10
RISES = (1.0, 0.4, 0.2, 0.1)  # shares of the run in which clips may rise; 1: all of it


def measured(rise: float) -> list[dict[str, Any]]:
    """Every tenth round's accuracy and NMI, with the clips of the model's tensors."""
    table = recipe_of(MNIST, "client", "floral", EPSILON, SEED) | {"evaluate_every": EVERY}
    table["privacy"] |= {"clip_rise": rise}
    lines: list[dict[str, Any]] = []

    def seen(at: Progress) -> None:
        if at.scores is not None:
            kept = ("round", "accuracy", "nmi", "clip_base", "clip_adapters")
            lines.append({name: at.figures[name] for name in kept})

    run_recipe(read(table, "floral"), on_round=seen)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **machine(), "seed": SEED, "rises": {}}
    for rise in RISES:
        document["rises"][f"{rise:g}"] = lines = measured(rise)
        print(rise, lines[-1], file=sys.stderr, flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
