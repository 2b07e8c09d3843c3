"""One run on several cores: clients side by side (engine.workers) against more threads for one client at a time.

python benchmarks/workers.py --out benchmarks/results/workers.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import measure
from speed import round_work
from umbel.adapters import AdapterPlan
from umbel.cohort import Engine
from umbel.folder import machine
from umbel.methods import FedIT, FLoRAL, Method
from umbel.model.nets import cifar10_cnn, mlp
from umbel.model.pretrained import of_transformers
from umbel.seeds import generator, seeded
from umbel.tasks import Task, task_of
from umbel.train import LocalTraining

CLIENTS = 8


def images(shape: tuple[int, ...], module: torch.nn.Module, examples: int = 160) -> Task:
    """Noise of 10 labels."""
    draw = generator(0, "noise")
    return task_of(
        module,
        [
            (torch.randn(examples, *shape, generator=draw), torch.randint(10, (examples,), generator=draw))
            for _ in range(CLIENTS)
        ],
    )


def texts(examples: int = 16, length: int = 48) -> Task:
    """Noise of two labels, for an encoder of MiniLM's size."""
    sizes = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(0, "base"):
        base = of_transformers(BertForSequenceClassification(sizes), "text")
    draw = generator(0, "noise")
    clients = [
        (torch.randint(1, 1000, (examples, length), generator=draw), torch.randint(2, (examples,), generator=draw))
        for _ in range(CLIENTS)
    ]
    return task_of(base, clients)


def cases() -> dict[str, tuple[Task, Method]]:
    """What trains, with what."""
    lora = AdapterPlan(peft={"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]})
    return {
        "FLoRAL, the paper's CNN for CIFAR-10, batch 32": (
            images((3, 32, 32), cifar10_cnn()),
            FLoRAL(4, AdapterPlan(0.01), local=LocalTraining(0.01, 32)),
        ),
        "FLoRAL, MLP 784-200-10, batch 32": (
            images((784,), mlp(784, 200, 10), 1600),
            FLoRAL(4, AdapterPlan(0.01), local=LocalTraining(0.01, 32)),
        ),
        "FedIT, rank 4 in an encoder of MiniLM's size, batch 8": (
            texts(),
            FedIT(lora, local=LocalTraining(0.01, 8)),
        ),
    }


def main() -> None:
    """Prints, for each case, how many times the speed of one core two threads and two workers have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--cores", type=int, default=2, help="threads, and workers (default 2)")
    chosen = parser.parse_args()
    figures = {}
    for name, (task, method) in cases().items():
        work = {}
        for way, threads, workers in (("one", 1, 1), ("threads", chosen.cores, 1), ("workers", 1, chosen.cores)):
            work[way] = on(threads, round_work(task, method, Engine("looped", workers=workers), CLIENTS))
        best = measure.seconds_beside(work)
        figures[name] = {way: best["one"] / best[way] for way in ("threads", "workers")}
    record = {
        "command": f"python benchmarks/workers.py --cores {chosen.cores}",
        "cores": chosen.cores,
        **machine(),
        "figures": figures,
    }
    if chosen.out:
        measure.write(record, chosen.out)
    print(*(f"{name}: {own}" for name, own in figures.items()), sep="\n")


def on(threads: int, work: Callable[[], Any]) -> Callable[[], Any]:
    """The work, with so many threads for each product."""

    def run() -> None:
        torch.set_num_threads(threads)
        work()

    return run


if __name__ == "__main__":
    main()
