"""Examples → clients: which of a data set's rows belong to whom."""

import numpy as np
import torch

from umbel.seeds import generator


def deal(num_examples: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """An even IID split: shuffled rows dealt out one by one, so that sizes differ by at most one."""
    order = torch.randperm(num_examples, generator=generator(seed, "deal")).numpy()
    return [order[client::num_clients] for client in range(num_clients)]
