"""What of chaos.py's losses is absence: as many clients drawn for each round, and no faults.

Of 40 clients 24 are heard in a round of chaos.py on average. With `staleness` a client that is not heard is still used.

python benchmarks/absence.py --out benchmarks/results/absence.json
"""

from typing import Any

import chaos
import measure

HEARD = 24
CELLS: dict[str, dict[str, Any]] = {
    "fl_tac, drawn": {"method": "fl_tac", "faults": {}, "drawn": HEARD},
    "trust, drawn": {"method": "trust", "faults": {}, "drawn": HEARD},
    "trust, faults, staleness 10": {"method": "trust", "faults": chaos.FAULTS, "staleness": 10},
}


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {"rounds": chaos.ROUNDS, "heard": HEARD, "cells": {}}
    for label, cell in CELLS.items():
        figures["cells"][label] = [chaos.accuracy(seed=seed, **cell)[0] for seed in chaos.SEEDS]
        print(label, figures["cells"][label], flush=True)
    return figures


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
