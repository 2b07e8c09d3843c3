"""What clients cost that are not sampled: 100 of 10³, 10⁵ and 10⁶ clients a round.

python benchmarks/population.py --out benchmarks/results/population.json
"""

import resource
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

import measure
from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Engine, PrivateStore
from umbel.methods import FLoRAL
from umbel.methods.floral import Private
from umbel.rounds import rounds, start
from umbel.schedule import Schedule
from umbel.seeds import generator
from umbel.tasks import Task
from umbel.train import LocalTraining

SAMPLED, BLOCKS, EXAMPLES = 100, 1000, 32
ROUNDS = 40


def population(num_clients: int) -> Task:
    """Clients that share 1,000 blocks of data, so that only what the engine keeps grows with their number."""
    draw = generator(0, "population")
    x = torch.randn(BLOCKS * EXAMPLES, 64, generator=draw)
    y = torch.randint(10, (BLOCKS * EXAMPLES,), generator=draw)
    start = np.arange(num_clients, dtype=np.int64) % BLOCKS * EXAMPLES
    examples = Examples(x, y, start, np.full(num_clients, EXAMPLES))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task("population", model, "cross_entropy", examples, examples)


def private_state_mb(num_clients: int) -> float:
    """What the private states of all clients take once every one was seen (C = 10), in MB of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = PrivateStore(tree.broadcast(Private(torch.zeros(10), {}, {}, torch.zeros(())), 1), num_clients)
    for first in range(0, num_clients, 10_000):
        clients = np.arange(first, min(num_clients, first + 10_000))
        store.put(clients, Private(torch.ones(len(clients), 10), {}, {}, torch.ones(len(clients))))
    assert len(store.seen) == num_clients
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> dict[str, Any]:
    private_mb = private_state_mb(10**6)  # first, for it is read off the process's peak
    sizes = (10**3, 10**5, 10**6)
    method = FLoRAL(num_adapters=10, local=LocalTraining(0.1, 16))
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    running = {}
    for size in sizes:
        schedule = Schedule(rounds=ROUNDS, clients_per_round=SAMPLED, evaluate_every=10**9)
        task = population(size)
        cohort, at = start(task, method, schedule, Engine("stacked"))
        running[size] = rounds(cohort, at, task, schedule)
    for _ in range(ROUNDS - 1):  # the last round evaluates everybody, and is left out
        for size in sizes:
            begin = perf_counter()
            next(running[size])
            seconds[size].append(perf_counter() - begin)
    medians = {size: float(np.median(seconds[size][3:])) for size in sizes}
    return {
        "seconds_per_round": {str(size): medians[size] for size in sizes},
        "slowest_over_fastest": max(medians.values()) / min(medians.values()),
        "private_state_of_a_million_clients_mb": private_mb,
    }


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
