"""Every method under every attack and rule on digits: accuracy of the honest clients, and where backdoors lead.

python benchmarks/attacks.py --out benchmarks/results/attacks.json

The file is written after each cell, and a run that was stopped goes on from it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import measure
from on_digits import METHODS, run_on_digits
from umbel.errors import RecipeError, RoundError
from umbel.folder import machine
from umbel.recipe import Table

ROUNDS, SHARE, SEEDS = 40, 0.2, (0, 1, 2)
LOCAL = {"lr": 0.2, "batch_size": 8}
ATTACKS = {"none": 1.0, "sign_flip": 5.0, "scale": 20.0, "gaussian": 20.0, "label_flip": 1.0, "backdoor": 5.0}
ATTACKS |= {"claim_all": 5.0}  # the strength of each
HOSTILE = 0.4  # the share of weight that rules reckon with: by chance a group of clients has more than its fifth
RULES: dict[str, Table] = {"none": {}, "geometric_median": {}, "median": {}, "norm_bound": {}}
RULES |= {name: {"hostile": HOSTILE} for name in ("trimmed_mean", "krum", "multi_krum")}


def figures_of(method: str, attack: str, rule: Table, seed: int, rounds: int, local: Table) -> dict[str, Any]:
    """The last round's figures; {"failed": why} where it could not be run to its end."""
    # A step times one is honest, so that the same clients are evaluated without attack as with one.
    hostile = {"kind": attack.replace("none", "scale"), "share": SHARE, "strength": ATTACKS[attack]}
    try:
        last = run_on_digits(method, seed, rounds, local, attack=hostile, robust=rule).figures
    except RoundError:
        return {"failed": "diverged"}
    except RecipeError as error:
        return {"failed": str(error)}
    return {key: last[key] for key in ("accuracy", "attack_success", "nmi") if key in last}


def document(out: Path | None) -> dict[str, Any]:
    """What is stored, or the empty document.

    Raises:
        SystemExit: the stored figures are of another commit.
    """
    settings = {
        "rounds": ROUNDS,
        "share": SHARE,
        "seeds": SEEDS,
        "local": LOCAL,
        "attacks": ATTACKS,
        "rules": RULES,
    }
    figures = settings | {"methods": METHODS, "cells": []}
    made = {"command": "python benchmarks/attacks.py --out benchmarks/results/attacks.json", "threads": 1}
    if out is None or not out.exists():
        return made | machine() | {"figures": figures}
    stored: dict[str, Any] = json.loads(out.read_text())
    if stored["umbel_commit"] != machine()["umbel_commit"]:
        raise SystemExit(f"{out} is of commit {stored['umbel_commit']}: remove it, or check that commit out")
    return stored


def measure_all(stored: dict[str, Any], out: Path | None) -> None:
    """Adds the cells that are lacking, seed by seed."""
    cells = stored["figures"]["cells"]
    known = {(cell["method"], cell["attack"], cell["rule"], cell["seed"]): cell for cell in cells}
    for seed in SEEDS:
        for method in METHODS:
            for attack in ATTACKS:
                for rule, settings in RULES.items():
                    key = (method, attack, rule, seed)
                    if key not in known:
                        robust = settings if rule == "none" else {"rule": rule} | settings
                        found = figures_of(method, attack, robust, seed, ROUNDS, LOCAL)
                        cell = {"method": method, "attack": attack, "rule": rule, "seed": seed, **found}
                        known[key] = cell
                        cells.append(cell)
                        print(cell, flush=True)
                        if out is not None:
                            measure.write(stored, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    measure_all(document(chosen.out), chosen.out)
