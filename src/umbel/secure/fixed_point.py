"""Contributions as whole numbers modulo 2^bits, in which masks cancel exactly.

    q(x) = round(x / s) mod 2^bits ,  s = R / Q ,  Q = ⌊(2^(bits−1) − 1) / K⌋

for |x| ≤ R, the group's range, and at most K clients: no sum of K leaves [−K Q, K Q], so none wraps around. The
sum is off by at most K s / 2 in each number. What lies beyond R is cut to it, and a last number counts how often.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from umbel import tree
from umbel.secure.settings import Secure
from umbel.tree import Params


@dataclass(frozen=True)
class Layout:
    """Where which number of a contribution stands in the vector that is masked; the same for all, and public."""

    names: tuple[str, ...]  # of the tensors, as `tree.tensors` has them
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    steps: tuple[float, ...]  # s of each tensor
    bits: int

    @property
    def num_bytes(self) -> int:
        """Of one vector."""
        return (sum(map(prod, self.shapes)) + 1) * self.bits // 8


def layout_of(contribution: dict[str, Any], secure: Secure, num_clients: int) -> Layout:
    """The layout of contributions like this one, when at most so many clients are added up."""
    leaves = tree.tensors(contribution)
    most = ((1 << (secure.bits - 1)) - 1) // num_clients
    steps = tuple(secure.ranges.get(name.partition("/")[0], secure.range) / most for name in leaves)
    shapes = tuple(tuple(leaf.shape) for leaf in leaves.values())
    dtypes = tuple(str(leaf.dtype).removeprefix("torch.") for leaf in leaves.values())
    return Layout(tuple(leaves), shapes, dtypes, steps, secure.bits)


def encoded(contribution: dict[str, Any], layout: Layout, num_clients: int) -> bytes:
    """The contribution as `layout.num_bytes` bytes, little-endian, the last number being how many were cut.

    Raises:
        ValueError: it has other tensors than the layout.
    """
    leaves = tree.tensors(contribution)
    if tuple(leaves) != layout.names or tuple(tuple(leaf.shape) for leaf in leaves.values()) != layout.shapes:
        raise ValueError(f"a contribution of {list(leaves)} where the layout has {list(layout.names)}")
    most = ((1 << (layout.bits - 1)) - 1) // num_clients
    parts, cut = [], 0
    for leaf, step in zip(leaves.values(), layout.steps, strict=True):
        whole = np.rint(leaf.detach().double().cpu().numpy().reshape(-1) / step)
        cut += int((np.abs(whole) > most).sum())
        parts.append(whole.clip(-most, most).astype(np.int64).clip(-most, most))  # float64 may round 2^57 upwards
    return np.concatenate([*parts, [cut]]).astype(f"<i{layout.bits // 8}").tobytes()


def decoded(total: bytes, layout: Layout) -> tuple[Params, int]:
    """The sums by the tensors' names, and how many numbers were cut, from the vector of the sum."""
    numbers = np.frombuffer(total, dtype=f"<i{layout.bits // 8}")
    found: Params = {}
    first = 0
    for name, shape, dtype, step in zip(layout.names, layout.shapes, layout.dtypes, layout.steps, strict=True):
        own = numbers[first : first + prod(shape)].astype(np.float64) * step
        found[name] = torch.from_numpy(own).reshape(shape).to(getattr(torch, dtype))
        first += prod(shape)
    return found, int(numbers[-1])
