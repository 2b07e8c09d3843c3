"""Digits with 30 % drop-out, 10 % stragglers and 5 % damaged uploads, against the same run without faults.

"drawn" has no faults either, but only as many clients a round as are heard with them on average: what absence does.

python benchmarks/chaos.py --out benchmarks/results/chaos.json
"""

from time import perf_counter
from typing import Any

import measure
from on_digits import METHODS, run_on_digits
from umbel.recipe import Table
from umbel.tables import losses

ROUNDS, SEEDS = 200, (0, 1)
FAULTS = {"drop_out": 0.3, "straggle": 0.1, "corrupt": 0.05}
HEARD = 24  # of 40
LOCAL = {"lr": 0.1, "batch_size": 8, "epochs": 5}  # enough for FL-TAC and trust to tell clients apart
SHOWN = ("fedavg", "floral", "trust", "fl_tac")


def accuracy(method: str, seed: int, faults: Table, drawn: int = 0) -> tuple[float, dict[str, int], int]:
    """In %, of the last round; what was lost, by the reason; rounds that nobody was heard in.

    `drawn` are the clients of a round, 0: all.
    """
    result = run_on_digits(method, seed, ROUNDS, LOCAL, clients_per_round=drawn, faults=faults)
    return result.figures["accuracy"], losses(result.history), sum("no_quorum" in line for line in result.history)


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {
        "rounds": ROUNDS,
        "heard": HEARD,
        "faults": FAULTS,
        "local": LOCAL,
        "settings": {name: METHODS[name] for name in SHOWN},
        "methods": {},
    }
    for method in SHOWN:
        rows = []
        for seed in SEEDS:
            begin = perf_counter()
            clean, _, _ = accuracy(method, seed, {})
            hurt, lost, idle = accuracy(method, seed, FAULTS)
            drawn, _, _ = accuracy(method, seed, {}, HEARD)
            figures_of_seed = {"clean": clean, "drawn": drawn, "faults": hurt, "lost": lost, "no_quorum": idle}
            rows.append({"seed": seed, **figures_of_seed})
            print(method, rows[-1], f"{perf_counter() - begin:.0f} s", flush=True)
        figures["methods"][method] = rows
    return figures


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
