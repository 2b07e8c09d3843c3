"""Runs on digits (label shift) that benchmarks of faults and attacks share."""

from typing import Any

from umbel.recipe import Table, read
from umbel.runs import Result, run_recipe

# Groups, models and adapters: as many as the task has. All else as in `umbel compare rivals`.
METHODS: dict[str, Table] = {
    "local": {},
    "fedavg": {},
    "floral": {"num_adapters": 4, "adapter": {"rank": 4}},
    "ensemble": {"num_models": 4},
    "fedem": {"num_models": 4},
    "ifca": {"num_models": 4},
    "trust": {"scheme": "weights", "adapter": {"rank": 4}},
    "fl_tac": {"num_clusters": 4, "adapter": {"rank": 4}},
    "threshold_clustering": {"updates_since": "start", "alpha": 1.0, "iterations": 10, "quantile": 0.2},
    "fedprox": {},
    "fedavg_finetune": {"finetune": {"lr": 0.1, "batch_size": 4, "epochs": 5}},
    "ditto": {},
    "apfl": {},
    "pfedme": {"local": {"lr": 0.05}},  # its two rates are not those of plain SGD
    "fedper": {},
    "fedrep": {},
    "local_adapter": {"adapter": {"rank": 4}},
    "knnper": {},
    "fedsa_lora": {"adapter": {"rank": 4}},
    "ffa_lora": {"adapter": {"rank": 4}},
    "flexlora": {"ranks": [2, 4]},
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
