"""The model, and what a node does with it."""

from pathlib import Path

import torch
from torch import Tensor, nn


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_data(folder: str, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / f"{name}.safetensors")


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, batch_size: int) -> float:
    """One epoch of SGD; the mean loss."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    order, total = torch.randperm(len(y)), 0.0
    for first in range(0, len(y), batch_size):
        rows = order[first : first + batch_size]
        optimizer.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        total += float(loss) * len(rows)
    return total / len(y)


def test(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    with torch.no_grad():
        outputs = model(x)
    return float(nn.CrossEntropyLoss()(outputs, y)), float((outputs.argmax(1) == y).float().mean())
