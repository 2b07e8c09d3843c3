"""Seconds side by side: rounds, stacking, and what adapters cost.

python benchmarks/speed.py --out benchmarks/results/speed.json
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

import measure
import reference
from umbel.adapters import AdapterPlan
from umbel.cohort import Engine, Tally
from umbel.methods import FedAvg, FLoRAL, Method
from umbel.methods.routing import Router
from umbel.recipe import find, load, read
from umbel.rounds import rounds, start
from umbel.schedule import Schedule
from umbel.seeds import generator
from umbel.tasks import Task, task_of
from umbel.train import LocalTraining


def synthetic_rounds(num_rounds: int = 300) -> dict[str, Any]:
    """FLoRAL on synthetic_linear, every client evaluated every round, beside the plain loop."""
    recipe = read(load(find("synthetic_linear")), "floral")
    schedule = replace(recipe.schedule, rounds=num_rounds, evaluate_every=1)
    task = recipe.task.load(0)
    train = [task.train.of_client(k) for k in range(task.num_clients)]
    test = [task.test.of_client(k) for k in range(task.num_clients)]

    def ours() -> None:
        cohort, at = start(task, recipe.method, schedule, Engine("stacked"))
        for _ in rounds(cohort, at, task, schedule):
            pass

    def loop() -> None:
        server, routers = reference.Adapted(task.model, 2, 1), [torch.zeros(2) for _ in train]
        for _ in range(num_rounds // 20):
            reference.train_round(server, routers, train, lr=0.1, batch_size=4)
            reference.evaluate(server, routers, test)

    best = measure.seconds_beside({"umbel": ours, "loop": loop}, repeats=3)
    ours_per_s, loop_per_s = num_rounds / best["umbel"], num_rounds // 20 / best["loop"]
    return {
        "umbel_rounds_per_s": ours_per_s,
        "plain_loop_rounds_per_s": loop_per_s,
        "ratio": ours_per_s / loop_per_s,
    }


def round_work(task: Task, method: Method, engine: Engine, num_clients: int) -> Callable[[], None]:
    """One round of local training of so many clients."""
    cohort, at = start(task, method, Schedule(rounds=1), engine)
    clients = np.arange(num_clients)

    def work() -> None:
        for _ in cohort.uploads(at.shared, at.store, clients, 1, Tally()):
            pass

    return work


def stacking() -> dict[str, Any]:
    """A round of FLoRAL stacked, looped, and as `auto` chooses."""
    digits = read(load(find("digits")), "floral")
    cases = {
        "digits_mlp": (digits.task.load(0), digits.method, 40),
        "two_conv_cnn": (
            images(cnn(), num_clients=8),
            FLoRAL(4, AdapterPlan(0.01), local=LocalTraining(0.01, 32)),
            8,
        ),
    }
    figures = {}
    for name, (task, method, num_clients) in cases.items():
        engines = {"stacked": Engine("stacked"), "looped": Engine("looped"), "auto": Engine("auto")}
        work = {mode: round_work(task, method, engine, num_clients) for mode, engine in engines.items()}
        best = measure.seconds_beside(work, repeats=7)
        figures[name] = best | {
            "stacked_speedup": best["looped"] / best["stacked"],
            "auto_over_faster": best["auto"] / min(best["stacked"], best["looped"]),
        }
    return figures


def adapter_step() -> dict[str, Any]:
    """A local step of FLoRAL with C = 10 adapters at ρ = 1 % over one of FedAvg, batch 32."""
    local = LocalTraining(0.01, 32)
    floral = FLoRAL(10, AdapterPlan(0.01), Router("gradient"), local)
    figures = {}
    for name, model, num_clients in (("mlp_784_200_10", mlp(), 30), ("two_conv_cnn", cnn(), 8)):
        task = images(model, num_clients)
        for mode in ("stacked", "looped"):
            engine = Engine("stacked") if mode == "stacked" else Engine("looped")
            work = {
                "fedavg": round_work(task, FedAvg(local), engine, num_clients),
                "floral": round_work(task, floral, engine, num_clients),
                "floral_preconditioned": round_work(task, replace(floral, precondition=True), engine, num_clients),
            }
            best = measure.seconds_beside(work, repeats=7)
            figures[f"{name}/{mode}"] = {f"{rival}_over_fedavg": best[rival] / best["fedavg"] for rival in work}
    return figures


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def cnn() -> nn.Module:
    features = [nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(1600, 64), nn.ReLU(), nn.Linear(64, 10))


def images(model: nn.Module, num_clients: int, num_examples: int = 128) -> Task:
    """Noise in the size of MNIST: speed does not depend on what is in the images."""
    draw = generator(0, "noise")
    clients = [
        (torch.randn(num_examples, 1, 28, 28, generator=draw), torch.randint(10, (num_examples,), generator=draw))
        for _ in range(num_clients)
    ]
    return task_of(model, clients)


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(
        {"synthetic_linear": synthetic_rounds(), "stacking": stacking(), "adapter_step": adapter_step()}, chosen
    )
