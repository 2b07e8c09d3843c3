"""Dropout that knows whose it is: masks are a function of (seed, round, client, step) alone.

`torch.nn.Dropout` draws from one global generator, so that a client's mask would depend on which clients
are stacked with it. Here every element's mask is a hash of the client's key, of the number of its example in the
client's batch, and of its place in what the layer sees of that example. Padding, of batches with examples and of
texts at their end, changes none of the three.
"""

from math import ceil

import torch
from torch import Tensor, nn

from umbel.errors import ModelError
from umbel.seeds import hashed

KEY = "dropout_key"  # the buffer that carries the client's key into the forward pass
ROWS = (
    "dropout_rows"  # the buffer with the numbers of the client's examples, where they are not all or not in order
)


class SeededDropout(nn.Module):
    """Zeroes each element with probability p in training, and scales the others by 1 / (1 − p).

    Called twice in one forward pass it uses the same mask twice.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.register_buffer(KEY, torch.zeros((), dtype=torch.long))
        self.register_buffer(ROWS, torch.zeros(0, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        key: Tensor = self.get_buffer(KEY)  # () or, for the rows of K clients in one batch, (K,)
        rows: Tensor = self.get_buffer(ROWS)  # (0,), or (B,) or (K, B)
        if not rows.numel():
            num_rows = len(x) if x.dim() else 1
            if num_rows % key.numel():
                raise RuntimeError(f"dropout sees {num_rows} rows of {key.numel()} clients")
            rows = torch.arange(num_rows // key.numel(), device=x.device)
        example = hashed(hashed(key).unsqueeze(-1) + self.place) + (rows << 32)  # (B,) or (K, B)
        place = torch.arange(x.numel() // example.numel(), device=x.device)
        drawn = hashed(example.unsqueeze(-1) + place) & (2**53 - 1)
        return torch.where(drawn.view(x.shape) >= ceil(self.p * 2**53), x / (1 - self.p), 0)


def seed_dropout(module: nn.Module) -> nn.Module:
    """The module with every nn.Dropout in it replaced by one whose masks are the client's own, in place.

    Raises:
        ModelError: a layer drops out in another way (whole channels, alpha dropout).
    """
    for place, (path, layer) in enumerate(list(module.named_modules())):
        if isinstance(layer, nn.Dropout):
            above, _, name = path.rpartition(".")
            if not path:
                raise ModelError("a model that is nothing but dropout has nothing to train")
            setattr(module.get_submodule(above), name, SeededDropout(layer.p, place))
        elif isinstance(layer, nn.modules.dropout._DropoutNd):
            raise ModelError(f"{path}: {type(layer).__name__} cannot be repeated client by client; use nn.Dropout")
    return module


def dropout_buffers(module: nn.Module, which: str) -> tuple[str, ...]:
    """The names of the buffers that want a client's KEY, or its ROWS."""
    return tuple(name for name, _ in module.named_buffers() if name.rpartition(".")[2] == which)
