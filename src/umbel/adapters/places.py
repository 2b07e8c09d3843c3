"""Which of the C adapters: picking out those that are alive or sent, and putting them back in their places."""

import torch
from torch import Tensor


def among(values: Tensor, alive: Tensor) -> Tensor:
    """(K, …, C') the columns `alive` (K, C') of values (K, …, C)."""
    if alive.shape[1] == values.shape[-1]:
        return values
    return values.gather(-1, _widened(alive, values.shape[:-1]))


def spread_out(values: Tensor, alive: Tensor, num_adapters: int) -> Tensor:
    """(K, …, C) values (K, …, C') at the columns `alive`, 0 elsewhere: the inverse of `among`."""
    if alive.shape[1] == num_adapters:
        return values
    whole = values.new_zeros(*values.shape[:-1], num_adapters)
    return whole.scatter(-1, _widened(alive, values.shape[:-1]), values)


def picked(values: Tensor, places: Tensor) -> Tensor:
    """(K, C'', …) the rows `places` (K, C'') of values (K, C', …)."""
    if places.shape[1] == values.shape[1]:
        return values
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), places]


def placed(values: Tensor, sent: Tensor, num_adapters: int, others: Tensor | None = None) -> Tensor:
    """(K, C, …) with values (K, C'', …) in the rows `sent`, `others` (K, C, …) or 0 elsewhere: undoes `picked`."""
    if sent.shape[1] == num_adapters:
        return values
    whole = values.new_zeros(len(values), num_adapters, *values.shape[2:]) if others is None else others.to(values)
    return whole.index_put((torch.arange(len(values), device=values.device).unsqueeze(1), sent), values)


def kept_only(values: Tensor, places: Tensor) -> Tensor:
    """Values (K, …, C') with 0 in all columns but `places` (K, C'')."""
    if places.shape[1] == values.shape[-1]:
        return values
    mask = torch.zeros_like(values).scatter(-1, _widened(places, values.shape[:-1]), 1.0)
    return values * mask


def _widened(index: Tensor, leading: tuple[int, ...]) -> Tensor:
    """Index (K, n) → (*leading, n), the same for all that is not the first axis."""
    between = [1] * (len(leading) - 1)
    return index.view(len(index), *between, -1).expand(*leading, index.shape[1])
