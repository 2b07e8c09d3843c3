"""Runs on digits (label shift) that benchmarks of faults and attacks share."""

from typing import Any

from umbel.recipe import Table, read
from umbel.runs import Result, run_recipe

METHODS: dict[str, Table] = {
    "fedavg": {},
    "ifca": {"num_models": 4},
    "floral": {"num_adapters": 4, "adapter": {"rank": 4}},
    "local": {},
    "trust": {"scheme": "weights", "adapter": {"rank": 4}},
    "fl_tac": {"num_clusters": 4, "adapter": {"rank": 4}},
}


def run_on_digits(method: str, seed: int, rounds: int, local: Table, **settings: Any) -> Result:
    """The run of one of `METHODS`, evaluated after the last round; `settings` are more keys of the recipe."""
    table = {
        "rounds": rounds,
        "seed": seed,
        "evaluate_every": rounds,
        "task": {"name": "digits"},
        "engine": {"mode": "stacked", "threads": 1},
        "local": local,
        "method": {method: METHODS[method]},
        **settings,
    }
    return run_recipe(read(table, method))
