"""Arithmetic on states: frozen dataclasses and dicts whose leaves are tensors.

A leaf that is no tensor (a layer plan, a number) is carried along unchanged.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor

S = TypeVar("S")

Params = dict[str, Tensor]
"""Tensors by dotted name, as PyTorch and PEFT give them; never a module."""

HALF = (torch.bfloat16, torch.float16)
"""Types with too few digits for sums, and for what small steps train."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type itself, or float32 if that has more digits: in which sums are kept, and what is trained."""
    return torch.promote_types(dtype, torch.float32)


_STATES: set[type] = set()


@dataclass_transform(frozen_default=True)
def state(cls: type[S]) -> type[S]:
    """Makes a class a frozen dataclass whose tensors the functions here see."""
    made = dataclass(frozen=True)(cls)
    _STATES.add(made)
    return made


def map_tensors(function: Callable[..., Tensor], state: S, *others: S) -> S:
    """The state with `function` applied to each tensor (and its namesakes in `others`)."""
    if isinstance(state, Tensor):
        return function(state, *others)  # type: ignore[return-value]
    if isinstance(state, dict):
        mapped = {key: map_tensors(function, leaf, *(o[key] for o in others)) for key, leaf in state.items()}  # type: ignore[index]
        return mapped  # type: ignore[return-value]
    if type(state) in _STATES:
        names = [field.name for field in fields(state)]  # type: ignore[arg-type]
        return replace(  # type: ignore[type-var]
            state,
            **{n: map_tensors(function, getattr(state, n), *(getattr(o, n) for o in others)) for n in names},
        )
    return state


def tensors(state: Any, prefix: str = "") -> Params:
    """Every tensor of the state by its path, `field/name`, in a fixed order."""
    if isinstance(state, Tensor):
        return {prefix: state}
    leaves: Iterable[tuple[Any, Any]]
    if isinstance(state, dict):
        leaves = state.items()
    elif type(state) in _STATES:
        leaves = ((field.name, getattr(state, field.name)) for field in fields(state))
    else:
        return {}
    found: Params = {}
    for key, leaf in leaves:
        found |= tensors(leaf, f"{prefix}/{key}" if prefix else str(key))
    return found


def with_tensors(state: S, values: Mapping[str, Tensor]) -> S:
    """The state with the tensors of `values` (as `tensors` names them) in place of its own.

    Raises:
        KeyError: a tensor of the state is missing from `values`.
        ValueError: one has another type, or another shape beyond the leading axis.
    """
    names = iter(tensors(state))

    def fill(old: Tensor) -> Tensor:
        name = next(names)
        new = values[name]
        if new.shape[1:] != old.shape[1:] or new.dim() != old.dim() or new.dtype != old.dtype:
            raise ValueError(f"{name}: {new.dtype} {tuple(new.shape)} in place of {old.dtype} {tuple(old.shape)}")
        return new.to(old.device)

    return map_tensors(fill, state)


def broadcast(state: S, num_rows: int) -> S:
    """The state with a leading axis of `num_rows` equal rows that take no memory (stride 0)."""
    return map_tensors(lambda leaf: leaf.unsqueeze(0).expand(num_rows, *leaf.shape), state)


def is_broadcast(leaf: Tensor) -> bool:
    """Whether all rows of the leading axis are one and the same memory."""
    return leaf.stride(0) == 0 and leaf.shape[0] > 1


def rows(state: S, index: Tensor) -> S:
    """The rows `index` of every tensor's leading axis."""
    return map_tensors(lambda leaf: leaf.index_select(0, index), state)


def add(state: S, other: S) -> S:
    """The sum, tensor by tensor."""
    return map_tensors(torch.add, state, other)


def row_bytes(state: Any) -> int:
    """The bytes of one row of every tensor: what one client sends or receives."""
    return sum(leaf[0].numel() * leaf.element_size() for leaf in tensors(state).values() if leaf.shape[0])


def group_bytes(state: Any) -> dict[str, int]:
    """`row_bytes` of each field of the state that has any."""
    sizes = {field.name: row_bytes(getattr(state, field.name)) for field in fields(state)}
    return {name: size for name, size in sizes.items() if size}


def finite_rows(state: Any) -> Tensor:
    """(K,) bool: the rows that hold neither NaN nor infinity in any tensor."""
    leaves = [leaf for leaf in tensors(state).values() if leaf.is_floating_point()]
    # A finite sum has finite terms and takes a twentieth of the time; only another one is looked at closely.
    sums = torch.stack([leaf.unsqueeze(1).sum(tuple(range(1, leaf.dim() + 1))).double() for leaf in leaves])
    if bool(sums.isfinite().all()):
        return torch.ones(sums.shape[1], dtype=torch.bool, device=sums.device)
    return torch.stack([leaf.reshape(len(leaf), -1).isfinite().all(1) for leaf in leaves]).all(0)
