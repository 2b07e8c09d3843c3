"""Every method under every attack and rule on digits: accuracy of the honest clients, and where backdoors lead.

python benchmarks/attacks.py --methods floral --out benchmarks/results/attacks_floral.json
python benchmarks/attacks.py --methods ifca --out benchmarks/results/attacks_ifca.json
python benchmarks/attacks.py --methods fedavg local trust fl_tac --out benchmarks/results/attacks_others.json
"""

import argparse
from pathlib import Path
from typing import Any

import measure
from on_digits import METHODS, run_on_digits
from umbel.errors import RecipeError, RoundError
from umbel.recipe import Table

ROUNDS, SHARE, SEED = 40, 0.2, 0
LOCAL = {"lr": 0.2, "batch_size": 8}
ATTACKS = {"none": 1.0, "sign_flip": 5.0, "scale": 20.0, "gaussian": 20.0, "label_flip": 1.0, "backdoor": 5.0}
ATTACKS |= {"claim_all": 5.0}  # the strength of each
RULES: dict[str, Table] = {
    "none": {},
    "geometric_median": {"rule": "geometric_median"},
    "multi_krum": {"rule": "multi_krum", "hostile": 0.4},
}


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


def main(methods: list[str]) -> dict[str, Any]:
    settings = {"rounds": ROUNDS, "share": SHARE, "seed": SEED, "local": LOCAL, "attacks": ATTACKS}
    cells = []
    for method in methods:
        for attack in ATTACKS:
            for rule, robust in RULES.items():
                found = figures_of(method, attack, robust, SEED, ROUNDS, LOCAL)
                if "does not go with" in found.get("failed", ""):
                    break  # it has no mean to be made robust: the first column is all there is
                cells.append({"method": method, "attack": attack, "rule": rule, **found})
                print(cells[-1], flush=True)
                if "asks no client" in found.get("failed", ""):
                    break
    return settings | {"rules": RULES, "methods": {name: METHODS[name] for name in methods}, "cells": cells}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    chosen.threads = 1  # of each run
    measure.report(main(chosen.methods), chosen)
