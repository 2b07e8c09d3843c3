"""Speed on the FLoRAL paper's own models: a step on VGG8, and rounds on MNIST-LS beside a plain loop.

python benchmarks/paper_speed.py --out benchmarks/results/paper_speed.json
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import measure
import reference
from speed import round_work
from umbel.adapters import AdapterPlan
from umbel.cohort import Engine
from umbel.methods import Ensemble, FedAvg, FLoRAL, Method
from umbel.methods.routing import Router
from umbel.model.nets import vgg8
from umbel.recipe import find, load, read
from umbel.rounds import rounds, start
from umbel.seeds import generator
from umbel.tasks import task_of
from umbel.train import LocalTraining


def vgg8_step(num_clients: int = 4, num_examples: int = 256) -> dict[str, Any]:
    """A local round of FLoRAL (C = 10, ρ = 1 %) and of an Ensemble of 10 over one of FedAvg, batch 64."""
    draw = generator(0, "noise")
    clients = [
        (torch.randn(num_examples, 3, 32, 32, generator=draw), torch.randint(100, (num_examples,), generator=draw))
        for _ in range(num_clients)
    ]
    task, local = task_of(vgg8(), clients), LocalTraining(0.01, 64)
    gradient = Router("gradient")
    rivals: dict[str, Method] = {
        "fedavg": FedAvg(local),
        "floral": FLoRAL(10, AdapterPlan(0.01), gradient, local),
        "floral_preconditioned": FLoRAL(10, AdapterPlan(0.01), gradient, local, precondition=True),
        "floral_em": FLoRAL(10, AdapterPlan(0.01), Router("em"), local),
        "ensemble": Ensemble(10, gradient, local),
    }
    work = {name: round_work(task, method, Engine("auto"), num_clients) for name, method in rivals.items()}
    best = measure.seconds_beside(work, repeats=5)
    figures = {f"{name}_over_fedavg": best[name] / best["fedavg"] for name in rivals}
    return figures | {"floral_over_ensemble": best["floral"] / best["ensemble"]}


def mnist_rounds(num_rounds: int = 6) -> dict[str, Any]:
    """Rounds of MNIST-LS, 30 of 300 clients, C = 4, beside client by client, adapter by adapter.

    The published work (`floral-paper` of the recipes), with its preconditioning and its noise on routes; and
    without either. FLoRAL with our
    router stands beside the published loop: it preconditions too, and measures losses where that draws noise.
    """
    table = load(find("table1/mnist_ls"))
    recipe = read(table, "floral-paper")
    schedule = replace(recipe.schedule, rounds=num_rounds, evaluate_every=1000)
    task, local = recipe.task.load(0), recipe.method.local
    routed = [task.train.of_client(k) for k in range(30)]

    def ours(method: Method) -> Any:
        cohort, at = start(task, method, schedule, Engine("stacked"))

        def work() -> None:
            for _ in rounds(cohort, at, task, schedule):
                if _.round == num_rounds - 1:  # the last one is always evaluated, which the loop does not do
                    break

        return work

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def loop(precondition: bool, noise: float) -> Any:
        def work() -> None:
            server, routers = reference.Adapted(task.model, 4, 1), [torch.zeros(4) for _ in routed]
            lr, size = local.lr, local.batch_size
            reference.train_round(server, routers, routed, lr, size, cross_entropy, precondition, noise)

        return work

    rivals = {
        "floral": ours(read(table, "floral").method),
        "floral_published": ours(recipe.method),
        "floral_gradient": ours(replace(recipe.method, precondition=False)),  # type: ignore[type-var]
        "fedavg": ours(read(table, "fedavg").method),
        "loop_published": loop(True, 1.0),
        "loop": loop(False, 0.0),
    }
    best = measure.seconds_beside(rivals, repeats=5)
    per_round = {
        name: seconds / (1 if name.startswith("loop") else num_rounds - 1) for name, seconds in best.items()
    }
    pairs = (("floral", "loop_published"), ("floral_published", "loop_published"), ("floral_gradient", "loop"))
    return {f"{name}_rounds_per_s": 1 / seconds for name, seconds in per_round.items()} | {
        f"{name}_over_{other}": per_round[other] / per_round[name] for name, other in pairs
    }


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    torch.set_num_threads(1)
    measure.report({"vgg8_step": vgg8_step(), "mnist_ls_rounds": mnist_rounds()}, chosen)
