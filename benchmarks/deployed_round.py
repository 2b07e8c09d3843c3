"""What a deployed round costs beyond its training, beside an ordinary Flower app that does the same work.

python benchmarks/deployed_round.py --out benchmarks/results/deployed_round.json

digits, 6 clients on 3 nodes, training and evaluation in every round, TLS and keys, all on this machine:

    umbel            `umbel deploy node`: fedavg and floral
    umbel, stock     the same under Flower's own SuperNodes (`umbel deploy up --flower-nodes`): fedavg
    flower           benchmarks/flower_app, FedAvg as Flower's documentation writes it, under Flower's SuperNodes

The model, the examples of a node, batches and epochs are the same. A round's training time is the slowest node's; the
first rounds, in which models are loaded, are left out.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import measure
from umbel.flower import trial
from umbel.flower.work import NodeSettings
from umbel.folder import read_lines
from umbel.recipe import Recipe, find, load, read

ROUNDS, LEFT_OUT, CLIENTS, NODES = 10, 2, 6, 3
PLAIN = Path(__file__).parent / "flower_app"


def recipe(method: str) -> Recipe:
    return read(load(find("digits"), [f"task.num_clients={CLIENTS}", f"rounds={ROUNDS}"]), method)


def umbel_rounds(folder: Path, method: str, stock: bool) -> list[dict[str, Any]]:
    """The rounds' figures of a deployed run."""
    trial.init(folder, recipe(method), NODES, port=trial.free_port("127.0.0.1"))
    lines: list[dict[str, Any]] = []
    with trial.started(folder, print, stock) as running:
        trial.lead_run(running, folder / "run", lines.append)
    return lines


def plain_rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds' figures of the ordinary Flower app, on the same examples."""
    what = recipe("fedavg")
    trial.init(folder, what, NODES, port=trial.free_port("127.0.0.1"))
    shutil.rmtree(folder / "app")
    shutil.copytree(PLAIN, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    task, data = what.task.load(what.schedule.seed), folder / "data"
    data.mkdir()
    for place, clients in enumerate(trial.deal(CLIENTS, NODES)):
        numbers = NodeSettings(clients=clients).numbers.tolist()
        parts = {"": task.train, "_test": task.test}
        own = {
            f"{name}{kind}": torch.cat([examples.of_client(client)[axis] for client in numbers])
            for kind, examples in parts.items()
            for axis, name in enumerate(("x", "y"))
        }
        save_file(own, data / f"node-{place + 1}.safetensors")
    out = folder / "times.jsonl"
    options = [f"num-server-rounds={ROUNDS}", f"num-nodes={NODES}", f"data='{data.absolute()}'"]
    with trial.started(folder, print, stock=True) as running, trial.led(running, out, options) as run:
        run.wait()
    return read_lines(out)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds but the first: seconds, seconds of training, and what is beyond it."""
    kept = lines[LEFT_OUT:]
    beyond = [line["seconds"] - line["client_seconds"] for line in kept]
    return {
        "rounds": len(lines),
        "seconds": median(line["seconds"] for line in kept),
        "training_seconds": median(line["client_seconds"] for line in kept),
        "beyond_training_seconds": median(beyond),
        "beyond_training_most": float(np.max(beyond)),
        "accuracy": lines[-1]["accuracy"],
    }


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {"rounds": ROUNDS, "left_out": LEFT_OUT, "clients": CLIENTS, "nodes": NODES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "umbel, fedavg": partial(umbel_rounds, folder / "fedavg", "fedavg", False),
            "umbel, floral": partial(umbel_rounds, folder / "floral", "floral", False),
            "flower, FedAvg": partial(plain_rounds, folder / "plain"),
            "umbel, fedavg, stock": partial(umbel_rounds, folder / "stock", "fedavg", True),
        }
        for label, make in work.items():
            begin = time.monotonic()
            figures[label] = summary(make())
            print(label, figures[label], f"{time.monotonic() - begin:.0f} s", flush=True)
    figures["load_average"] = Path("/proc/loadavg").read_text().split()[0]
    return figures


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
