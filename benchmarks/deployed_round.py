"""What a deployed round costs beyond its training, beside an ordinary Flower app that does the same work.

python benchmarks/deployed_round.py --out benchmarks/results/deployed_round.json

digits, 6 clients on 3 nodes, training and evaluation in every round, TLS and keys, all on this machine:

    umbel            `umbel deploy node`: fedavg and floral
    umbel, stock     the same under Flower's own SuperNodes (`umbel deploy up --flower-nodes`): fedavg
    flower           benchmarks/flower_app, FedAvg as Flower's documentation writes it, under Flower's SuperNodes

The model, the examples of a node, batches and epochs are the same. A round's training time is the slowest node's; the
first round, in which models are loaded, is left out. Where other work goes on on the machine the clock shows it, and
the processor time of all processes of a deployment, training included, does not.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

import measure
from umbel.flower import trial
from umbel.flower.work import NodeSettings
from umbel.folder import read_lines
from umbel.recipe import Recipe, find, load, read

CLIENTS, NODES, LEFT_OUT = 6, 3, 1
ROUNDS, STOCK_ROUNDS = 10, 3  # with umbel's nodes; with Flower's, which take longer
PLAIN = Path(__file__).parent / "flower_app"


def recipe(method: str, rounds: int) -> Recipe:
    return read(load(find("digits"), [f"task.num_clients={CLIENTS}", f"rounds={rounds}"]), method)


def processor_seconds(folder: Path) -> float:
    """Of all processes of the deployment in the folder, those that have ended included."""
    home, ticks = f"FLWR_HOME={(folder / 'flwr').absolute()}\0".encode(), 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and home in (entry / "environ").read_bytes():
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, after_name[11:15]))  # its own, and that of children it has waited for
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def umbel_rounds(folder: Path, method: str, stock: bool) -> list[dict[str, Any]]:
    """The rounds' figures of a deployed run."""
    what = recipe(method, STOCK_ROUNDS if stock else ROUNDS)
    trial.init(folder, what, NODES, port=trial.free_port("127.0.0.1"))
    lines: list[dict[str, Any]] = []

    def seen(line: dict[str, Any]) -> None:
        lines.append(line | {"processor_seconds": processor_seconds(folder)})

    with trial.started(folder, print, stock) as running:
        trial.lead_run(running, folder / "run", seen)
    return lines


def plain_rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds' figures of the ordinary Flower app, on the same examples."""
    what = recipe("fedavg", STOCK_ROUNDS)
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
    options = [f"num-server-rounds={STOCK_ROUNDS}", f"num-nodes={NODES}", f"data='{data.absolute()}'"]
    lines: list[dict[str, Any]] = []
    with trial.started(folder, print, stock=True) as running, trial.led(running, out, options) as run:
        while run.poll() is None:
            found = read_lines(out) if out.exists() else []
            lines += [line | {"processor_seconds": processor_seconds(folder)} for line in found[len(lines) :]]
            time.sleep(0.2)
    return lines


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds but the first: seconds, seconds of training, what is beyond it, and processor time."""
    kept, used = lines[LEFT_OUT:], lines[-1]["processor_seconds"] - lines[LEFT_OUT - 1]["processor_seconds"]
    beyond = [line["seconds"] - line["client_seconds"] for line in kept]
    return {
        "rounds": len(lines),
        "seconds": median(line["seconds"] for line in kept),
        "training_seconds": median(line["client_seconds"] for line in kept),
        "beyond_training_seconds": median(beyond),
        "beyond_training_most": max(beyond),
        "processor_seconds": used / len(kept),
        "accuracy": lines[-1]["accuracy"],
    }


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {"left_out": LEFT_OUT, "clients": CLIENTS, "nodes": NODES}
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
            figures[label] = summary(make()) | {"load_average": os.getloadavg()[0]}
            print(label, figures[label], f"{time.monotonic() - begin:.0f} s", flush=True)
    return figures


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
