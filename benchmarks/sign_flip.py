"""FLoRAL on digits with a fifth of the clients flipping their steps: what is left of its accuracy.

python benchmarks/sign_flip.py --out benchmarks/results/sign_flip.json
"""

from typing import Any

import measure
from attacks import figures_of
from umbel.recipe import Table

ROUNDS, SEEDS = 150, (0, 1, 2)
LOCAL = {"lr": 0.1, "batch_size": 4}  # as in the recipe `digits`
RULES: dict[str, Table] = {
    "geometric_median": {"rule": "geometric_median"},
    "multi_krum": {"rule": "multi_krum", "hostile": 0.4},
}


def main() -> dict[str, Any]:
    rows = []
    for seed in SEEDS:
        row: dict[str, Any] = {"seed": seed, "clean": figures_of("floral", "none", {}, seed, ROUNDS, LOCAL)}
        row["plain"] = figures_of("floral", "sign_flip", {}, seed, ROUNDS, LOCAL)
        for rule, settings in RULES.items():
            row[rule] = figures_of("floral", "sign_flip", settings, seed, ROUNDS, LOCAL)
        rows.append(row)
        print(row, flush=True)
    return {"rounds": ROUNDS, "local": LOCAL, "rules": RULES, "seeds": rows}


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
