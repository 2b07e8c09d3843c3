"""Dropout that knows whose it is: masks are a function of (seed, round, client, step) alone.

`torch.nn.Dropout` draws from one global generator, so that a client's mask would depend on which clients
are stacked with it. Here every element's mask is a hash of its place and of the client's key.
"""

import torch
from torch import Tensor, nn

from umbel.errors import ModelError
from umbel.seeds import hashed

KEY = "dropout_key"  # the buffer that carries the client's key into the forward pass


class SeededDropout(nn.Module):
    """Zeroes each element with probability p in training, and scales the others by 1 / (1 − p).

    Called twice in one forward pass it uses the same mask twice.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.register_buffer(KEY, torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        key: Tensor = self.get_buffer(KEY)  # () or, for the rows of K clients in one batch, (K,)
        element = torch.arange(x.numel() // key.numel(), device=x.device)
        uniform = (hashed(hashed(hashed(key).unsqueeze(-1) + self.place) + element) & (2**53 - 1)) / 2**53
        return torch.where(uniform.view(x.shape) >= self.p, x / (1 - self.p), 0)


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


def dropout_keys(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that want a client's key."""
    return tuple(name for name, _ in module.named_buffers() if name.rpartition(".")[2] == KEY)
