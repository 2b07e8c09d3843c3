"""What the models of a finished run of `glue` answer on the development sets, by task.

Accuracy beside the majority class's, Matthews' correlation (GLUE's own metric for CoLA; 0 where one label is all that
is answered), F1 of label 1 (GLUE's for MRPC), and how many examples of each label got which answer. Means over slots, which
differ where slots of a task are in different clusters. An answer is one of the task's own two labels, as with
`heads = "own"`.

python benchmarks/glue_answers.py --run runs/compare-fl_tac/fl_tac-seed0 --out results/fl_tac_encoder_answers.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef
from torch import Tensor

import measure
from umbel.folder import machine
from umbel.model.loss import among_own
from umbel.runs import Result, opened

BATCH = 64


def main(run: Path) -> dict[str, Any]:
    """The figures of every task that the run's slots are of."""
    result = opened(run)
    cohort, task = result.cohort, result.task
    assert task.group is not None
    known: dict[tuple[int, bytes], dict[str, Any]] = {}  # the slots of a task in one cluster have one model
    slots: dict[int, list[dict[str, Any]]] = {}
    for slot in range(task.num_clients):
        one = np.array([slot])
        params, _ = cohort.served(result.progress.shared, result.progress.store.rows(one), one)
        key = int(task.group[slot]), b"".join(leaf.flatten()[:1000].numpy().tobytes() for leaf in params.values())
        if key not in known:
            known[key] = of_slot(result, slot)
        slots.setdefault(key[0], []).append(known[key])
    return {name: merged(slots[place]) for place, name in enumerate(names(run)) if place in slots}


def names(run: Path) -> list[str]:
    """GLUE's tasks in the order of the run's groups."""
    from umbel.recipe import labels, load, read

    table = load(run / "recipe.toml")
    task: Any = read(table, next(iter(labels(table)))).task
    return list(task.tasks)


def of_slot(result: Result, slot: int) -> dict[str, Any]:
    """What the slot's model answers on its test examples: labels are 0 and 1 of its task."""
    test, module = result.task.test, result.personal_model(slot).eval()
    x, y = test.of_client(slot)
    answers = torch.cat([answered(module, *rows) for rows in zip(x.split(BATCH), y.split(BATCH), strict=True)])
    true, said = (y % 2).numpy(), (answers % 2).numpy()
    return {
        "examples": len(true),
        "accuracy": 100 * float((true == said).mean()),
        "majority": 100 * float(np.bincount(true).max() / len(true)),
        "matthews": float(matthews_corrcoef(true, said)),
        "f1": 100 * float(f1_score(true, said, zero_division=0.0)),
        "confusion": confusion_matrix(true, said, labels=[0, 1]).tolist(),  # rows: the label; columns: the answer
    }


def answered(module: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The label of its own task that each example (N, …) gets."""
    with torch.no_grad():
        return among_own(module(x), y, 2).argmax(-1)


def merged(slots: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over slots; the counts of answers where all slots have the same."""
    figures = {
        key: float(np.mean([slot[key] for slot in slots])) for key in ("accuracy", "majority", "matthews", "f1")
    }
    same = all(slot["confusion"] == slots[0]["confusion"] for slot in slots)
    return {"slots": len(slots)} | figures | ({"confusion": slots[0]["confusion"]} if same else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    record = {"command": " ".join(["python", *sys.argv]), **machine(), "figures": main(chosen.run)}
    for name, own in record["figures"].items():
        print(name, own)
    if chosen.out:
        measure.write(record, chosen.out)
