"""How long W takes for 1,000 clients with adapters, or answers, of 100,000 numbers.

`cpu_seconds` are of all threads together: on a machine with other work, what they come to over the threads is what an
idle one would take.

python benchmarks/trust_matrix.py --threads 2 --out benchmarks/results/trust_matrix.json
"""

from functools import partial
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

import measure
from umbel.adapters import AdapterPlan
from umbel.methods import similarity
from umbel.methods.trusting import trust_of
from umbel.seeds import generator

CLIENTS, WIDTH, RANK, LABELS = 1000, 2500, 4, 10
PLACES = 10_000  # of LABELS numbers


def main() -> dict[str, Any]:
    draw = generator(0, "trust matrix")
    layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)])
    bank = AdapterPlan(RANK, ("linear",)).bank(layers)
    adapters = bank.init(CLIENTS, draw, 1.0)
    answers = torch.randn(CLIENTS, PLACES, LABELS, generator=draw).log_softmax(-1)
    schemes = {
        "weights": partial(similarity.product_cosines, bank, adapters),
        "weights, as published": partial(similarity.row_cosines, bank, adapters),
        "predictions": partial(similarity.divergences, {"values": answers}, LABELS),
    }
    allowed, own = torch.ones(CLIENTS, CLIENTS, dtype=torch.bool), torch.arange(CLIENTS)
    seconds, cpu = {}, {}
    for name, score in schemes.items():
        times = []
        for _ in range(3):
            begin, worked = perf_counter(), process_time()
            trust_of(score(), allowed, own, 0.1)
            times.append((perf_counter() - begin, process_time() - worked))
        seconds[name], cpu[name] = min(time for time, _ in times), min(time for _, time in times)
    return {
        "clients": CLIENTS,
        "rank": RANK,
        "numbers": bank.num_parameters(),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


if __name__ == "__main__":
    chosen = measure.arguments(__doc__ or "")
    measure.report(main(), chosen)
