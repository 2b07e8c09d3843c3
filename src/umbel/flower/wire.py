"""States as bytes and back: safetensors, checked against what the receiver expects before anything is used.

The receiver knows what must come from its own copy of the method (`forms`): names, types and shapes. Nothing else
is taken, and nothing that comes is ever run.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from umbel import tree
from umbel.errors import NotFiniteError, WireError
from umbel.tree import Params
from umbel.untrusted import plain, tensors_in

S = TypeVar("S")

Facts = dict[str, Any]
"""What is said in words and numbers: anything that JSON knows."""
Parts = dict[str, bytes]
"""What is said in bytes, by part: tensors as `packed` made them, messages of a secure sum."""


def packed(tensors: Params) -> bytes:
    """The tensors as safetensors; b"" for none."""
    from safetensors.torch import save

    # A copy of each: rows of one state share their memory, which the format does not know.
    return (
        save({name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()})
        if tensors
        else b""
    )


def unpacked(content: bytes, who: str) -> Params:
    """The tensors in what `packed` made, which take as much memory as the content.

    Raises:
        WireError: it is something else; `who` has sent it.
    """
    try:
        return tensors_in(content) if content else {}
    except ValueError as error:
        raise WireError(f"{who}: what came is no safetensors ({plain(error)})") from None


def by_client(tensors: Params) -> dict[str, Params]:
    """The tensors "CLIENT/name" of every client, by name."""
    found: dict[str, Params] = {}
    for name, leaf in tensors.items():
        client, _, own = name.partition("/")
        found.setdefault(client, {})[own] = leaf
    return found


def filled(templates: Iterable[S], tensors: Params, who: str) -> S:
    """The first template that has just such tensors, with these in place of its own.

    Raises:
        WireError: no template fits, or a tensor holds NaN or infinity; it names the tensor and `who` sent it.
    """
    misfit = ""
    for template in templates:
        wrong = difference(tree.tensors(template), tensors)
        if wrong is None:
            check_finite(tensors, who)
            return tree.with_tensors(template, tensors)
        misfit = misfit or wrong
    raise WireError(f"{who}: {misfit}; both sides need the same recipe and the same version of umbel")


def difference(expected: Params, got: Params) -> str | None:
    """What is wrong with tensors, in words; None if names, types and shapes are as expected."""
    for name, leaf in expected.items():
        if name not in got:
            return f"{name} is missing"
        have = got[name]
        if have.dtype != leaf.dtype:
            return f"{name} is {have.dtype}, where {leaf.dtype} was expected"
        if have.shape != leaf.shape:
            return f"{name} has the shape {list(have.shape)}, where {list(leaf.shape)} was expected"
    strangers = [name for name in got if name not in expected]
    return f"{plain(strangers[0], 60)} was not expected" if strangers else None


def check_finite(tensors: Params, who: str) -> None:
    """Raises NotFiniteError, naming the tensor and `who` sent it, if one holds NaN or infinity."""
    for name, leaf in tensors.items():
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise NotFiniteError(f"{who}: {name} holds NaN or infinity")


def apart(state: Any) -> tuple[Params, Params]:
    """The tensors of K > 1 rows: those of which all rows are one, as that row (1, …), and the others (K, …)."""
    common, own = {}, {}
    for name, leaf in tree.tensors(state).items():
        if tree.is_broadcast(leaf):
            common[name] = leaf[:1]
        else:
            own[name] = leaf
    return common, own


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, to the sign of a zero; one with NaN is like none."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.cpu(), other.cpu()
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())
