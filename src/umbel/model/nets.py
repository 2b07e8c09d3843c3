"""The networks of the benchmarks.

None of them writes to a tensor in place or keeps a state of its own, so that `vmap` can stack clients.
Images are (B, channels, height, width), texts (B, T) int64; answers are logits, the last axis the labels.
Pooling comes before ReLU: the maximum of ReLUs is the ReLU of the maximum, at a quarter of the work.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8  # of ResNetGN's norm layers


def mlp(num_inputs: int, hidden: int, num_labels: int) -> nn.Module:
    """Flatten, linear, ReLU, linear; 784-200-10 has 159,010 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_labels))


def cifar10_cnn() -> nn.Module:
    """Two convolutions and two linear layers on 3 × 32 × 32: 87,178 parameters (Almansoori et al. 2025)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def small_cnn() -> nn.Module:
    """Two convolutions and two linear layers on 1 × 28 × 28: 63,786 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class _NormalConv2d(nn.Conv2d):
    """Starts as N(0, 2 / (kernel · channels out)), biases at 0, whenever it is started."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=sqrt(2 / (self.weight[0, 0].numel() * self.out_channels)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def vgg8(num_labels: int = 100, dropout: float = 0.5, batch_norm: bool = False) -> nn.Module:
    """Five convolutions and three linear layers on 3 × 32 × 32: 1,264,388 parameters without BatchNorm.

    Convolution weights begin as N(0, 2 / (9 · channels out)), their biases at 0 (Almansoori et al. 2025).
    """
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64, 128, 512):
        conv = _NormalConv2d(channels, width, 3, padding=1)
        norm = [nn.BatchNorm2d(width)] if batch_norm else []
        layers += [conv, *norm, nn.MaxPool2d(2), nn.ReLU()]
        channels = width
    head = [nn.Dropout(dropout), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(dropout), nn.Linear(512, 512)]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.ReLU(), nn.Linear(512, num_labels))


class ResNetGN(nn.Module):
    """ResNet-18 with GroupNorm for BatchNorm and a 3 × 3 stem without pooling, for small images.

    Sizes 28 and 32 are halved three times. With width 64 and RGB it has 11.2 million parameters.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for position in range(2):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(_Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a path that passes by them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.by: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.by = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.GroupNorm(GROUPS, width))

    def forward(self, x: Tensor) -> Tensor:
        changed = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.by(x) + changed)


class CharLSTM(nn.Module):
    """(B, T) characters → (B, T, vocabulary) logits of the next one.

    nn.LSTM cannot be stacked by `vmap`; here a layer is two linear maps and a loop over time, the input's
    map done for all steps at once. Gates are in PyTorch's order: input, forget, cell, output.
    """

    rows_apart = True  # model/stacked.py

    def __init__(self, vocabulary: int, embedding: int = 8, hidden: int = 128, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        sizes = [embedding] + [hidden] * (num_layers - 1)
        self.from_input = nn.ModuleList(nn.Linear(size, 4 * hidden) for size in sizes)
        self.from_hidden = nn.ModuleList(nn.Linear(hidden, 4 * hidden, bias=False) for _ in sizes)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.embedding(x)
        for from_input, from_hidden in zip(self.from_input, self.from_hidden, strict=True):
            steps = from_input(seen).unbind(1)
            hidden = cell = torch.zeros_like(steps[0].chunk(4, -1)[0])
            states = []
            for step in steps:
                take, keep, new, show = (step + from_hidden(hidden)).chunk(4, -1)
                cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
                hidden = show.sigmoid() * cell.tanh()
                states.append(hidden)
            seen = torch.stack(states, 1)
        logits: Tensor = self.head(seen)
        return logits


class CharTransformer(nn.Module):
    """(B, T) characters → (B, T, vocabulary) logits of the next one, T at most `length`.

    Pre-norm blocks of causal self-attention and a GELU network, with learned positions.
    """

    rows_apart = True  # model/stacked.py

    def __init__(
        self, vocabulary: int, length: int = 80, width: int = 64, num_layers: int = 2, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Attending(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.embedding(x) + self.position(torch.arange(x.shape[1], device=x.device).expand(x.shape))
        logits: Tensor = self.head(self.norm(self.blocks(seen)))
        return logits


class _Attending(nn.Module):
    """One block of the transformer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # one would cancel out in the softmax
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (
            linear(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        # Spelt out: vmap would run PyTorch's fused attention client after client.
        scores = query @ key.transpose(2, 3) / sqrt(query.shape[3])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(later, float("-inf")).softmax(3) @ value
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        changed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return changed
