"""FLoRAL as it is usually written: client after client, adapter after adapter. Something to be faster than.

The same mathematics as `umbel.FLoRAL` with the gradient router, in plain PyTorch modules: each adapted
layer calls its C adapters one by one, each client trains its own copy of the model with torch.optim.SGD,
and the server averages state dicts. On request it preconditions gradients and disturbs routes as the published code
of Almansoori et al. 2025 does: adapter by adapter, step by step.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """y = W x + b + Σ_c π_c (B_c A_c x + d_c), summed in a loop."""

    def __init__(self, layer: nn.Linear, num_adapters: int, rank: int, probs: "Probs") -> None:
        super().__init__()
        self.layer, self.probs = layer, [probs]  # in a list, so that it is no submodule
        self.down = nn.ModuleList(nn.Linear(layer.in_features, rank, bias=False) for _ in range(num_adapters))
        self.up = nn.ModuleList(nn.Linear(rank, layer.out_features) for _ in range(num_adapters))
        for tensor in self.up.parameters():
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        for c, prob in enumerate(self.probs[0].now()):
            y = y + prob * self.up[c](self.down[c](x))
        return y


class Probs(nn.Module):
    """The private router."""

    def __init__(self, num_adapters: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_adapters))
        self.noise = 0.0

    def now(self) -> Tensor:
        disturbed = self.logits + self.noise * torch.rand_like(self.logits) if self.noise else self.logits
        return disturbed.softmax(0)


class Adapted(nn.Module):
    """A model whose Linear layers are adapted, with its router."""

    def __init__(self, model: nn.Module, num_adapters: int, rank: int) -> None:
        super().__init__()
        self.router = Probs(num_adapters)
        self.model = nn.Sequential(deepcopy(model))  # so that a bare layer has a place to be replaced in
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, nn.Linear):
                above, _, name = path.rpartition(".")
                setattr(
                    self.model.get_submodule(above), name, AdaptedLinear(layer, num_adapters, rank, self.router)
                )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def train_round(
    server: Adapted,
    routers: list[Tensor],
    clients: list[tuple[Tensor, Tensor]],
    lr: float,
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    precondition: bool = False,
    noise: float = 0.0,
) -> None:
    """One round over these clients, changing the server's model and the clients' routers in place.

    Args:
        server: the model, changed.
        routers: each client's logits, changed.
        clients: their examples.
        lr: of SGD.
        batch_size: examples of a step.
        loss: of outputs and targets.
        precondition: multiplies the adapters' gradients by the inverse of the other factor's Gram matrix.
        noise: routes have U[0, noise) added to their logits in training.
    """
    states, weights = [], []
    for k, (x, y) in enumerate(clients):
        model = deepcopy(server)
        model.router.logits.data = routers[k].clone()
        model.router.noise = noise
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for first in range(0, len(x), batch_size):
            optimizer.zero_grad()
            loss(model(x[first : first + batch_size]), y[first : first + batch_size]).backward()
            if precondition:
                condition(model)
            optimizer.step()
        routers[k] = model.router.logits.data
        states.append(model.state_dict())
        weights.append(len(x) * routers[k].softmax(0))
    routes = torch.stack(weights)  # (K, C) n π
    examples = torch.tensor([float(len(x)) for x, _ in clients])
    merged = {}
    for name in states[0]:
        values = torch.stack([state[name] for state in states])
        share = examples
        for part in name.split("."):
            if part.isdigit() and (".down." in name or ".up." in name):
                share = routes[:, int(part)]
        merged[name] = torch.tensordot(share / share.sum(), values, dims=1)
    server.load_state_dict(merged)


def condition(model: Adapted) -> None:
    """G_B ← G_B (A Aᵀ + ε I)⁻¹ and G_A ← (Bᵀ B + ε I)⁻¹ G_A for each adapter of each layer, in place."""
    for layer in model.modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        for down, up in zip(layer.down, layer.up, strict=True):
            assert isinstance(down, nn.Linear)
            assert isinstance(up, nn.Linear)
            a, b, to_a, to_b = down.weight.detach(), up.weight.detach(), down.weight.grad, up.weight.grad
            assert to_a is not None
            assert to_b is not None
            eye = 1e-5 * torch.eye(len(a))
            down.weight.grad = torch.linalg.solve(b.T @ b + eye, to_a)
            up.weight.grad = torch.linalg.solve(a @ a.T + eye, to_b.T).T


def evaluate(server: Adapted, routers: list[Tensor], clients: list[tuple[Tensor, Tensor]]) -> float:
    """The mean over clients of their test loss."""
    losses = []
    with torch.no_grad():
        for logits, (x, y) in zip(routers, clients, strict=True):
            server.router.logits.data = logits
            losses.append(float(F.mse_loss(server(x), y)))
    return sum(losses) / len(losses)
