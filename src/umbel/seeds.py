"""The one source of randomness: a generator for every (seed, path).

The path names what is drawn, `generator(seed, "batches", round, client)`, so that a draw depends on
nothing else: not on chunking, order, device count or resumption.

What protects somebody must not be drawn again by who knows the seed. Where a run is no simulation such noise and
such draws are the operating system's (`normal`, `uniform` without a generator).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from math import pi, prod

import numpy as np
import torch
from torch import Tensor


def seed_of(seed: int, *path: str | int) -> int:
    """A number in [0, 2⁶³) that is the same for the same seed and path on every machine."""
    digest = blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator of its own for (seed, path)."""
    return torch.Generator().manual_seed(seed_of(seed, *path))


def choose(population: int, size: int, seed: int, *path: str | int) -> np.ndarray:
    """`size` different numbers below `population`, ascending; O(size) work however large it is."""
    if size >= population:
        return np.arange(population)
    draw = np.random.Generator(np.random.Philox(key=seed_of(seed, *path)))
    return np.sort(draw.choice(population, size, replace=False, shuffle=False))


@contextmanager
def seeded(seed: int, *path: str | int) -> Iterator[None]:
    """Makes PyTorch's global generator one of (seed, path) inside the block, and puts it back after.

    For code that draws from the global generator and offers nothing else: a module's own initialisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, *path))
        yield


def uniform(shape: Sequence[int], draw: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1): float32 of the generator, or float64 of the operating system where there is none."""
    if draw is not None:
        return torch.rand(tuple(shape), generator=draw)
    words = np.frombuffer(os.urandom(8 * prod(shape)), dtype=np.uint64)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).reshape(tuple(shape))


def normal(shape: Sequence[int], draw: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the generator, or of the operating system where there is none (Box, Muller 1958).

    A generator of PyTorch's that is seeded by the operating system would not do: it has 2³² seeds, all of which
    can be tried.
    """
    if draw is not None:
        return torch.randn(tuple(shape), generator=draw, dtype=dtype)
    length, angle = uniform((2, prod(shape)), None)
    drawn: Tensor = (-2 * (1 - length).log()).sqrt() * (2 * pi * angle).cos()
    return drawn.reshape(tuple(shape)).to(dtype)


def hashed(number: Tensor) -> Tensor:
    """int64 numbers that look random, each a function of the one in its place alone.

    Neighbours come out unrelated. For draws of many elements at once, on any device: the number is made of
    a client's key and an element's place. SplitMix64's finalizer (Steele, Lea, Flood 2014).
    """
    number = (number ^ _shifted(number, 30)) * -4658895280553007687
    number = (number ^ _shifted(number, 27)) * -7723592293110705685
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; PyTorch's own keeps the sign."""
    return torch.bitwise_and(number >> bits, 2 ** (64 - bits) - 1)
