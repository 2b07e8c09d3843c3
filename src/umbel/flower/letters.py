"""What nodes are sent: the method's message to each of their clients, without what they have already."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from umbel import tree
from umbel.cohort import Cohort
from umbel.flower.wire import Facts, Parts, apart, equal, packed
from umbel.tree import Params


def letters(
    cohort: Cohort,
    first: Any,
    shared: Any,
    homes: Mapping[int, int],
    clients: np.ndarray,
    newcomers: Collection[int],
    settling: bool = False,
) -> Iterator[tuple[int, np.ndarray, Facts, Parts]]:
    """For each node its clients, and what it is sent: rows of the message, apart from what all rows share.

    Args:
        cohort: whose method.
        first: Shared before the first round, which nodes have: what is as it was there is named and not sent.
        shared: the server's state.
        homes: client → node.
        clients: whom to write to, each on some node.
        newcomers: clients that no node had when the run began.
        settling: whether what only a model in use needs goes along (`beside` of the method). Weights by risks want
            a model in use before training, too.
    """
    method, device = cohort.method, cohort.train.x.device
    packed_common: tuple[Params, bytes] = ({}, b"")
    for node in sorted({homes[client] for client in clients.tolist()}):
        own = np.array([client for client in clients.tolist() if homes[client] == node])
        # Twice the first, for of a single row nobody knows whether it is everyone's.
        asked = torch.from_numpy(np.append(own, own[:1])).to(device)
        message, before = method.send(shared, asked), tree.tensors(method.send(first, asked))
        common, rows = apart(message)
        unchanged = [n for n, leaf in tree.tensors(message).items() if n in before and equal(leaf, before[n])]
        common = {name: leaf for name, leaf in common.items() if name not in unchanged}
        if not _same(common, packed_common[0]):
            packed_common = common, packed(common)
        mine = {
            f"{client}/{name}": leaf[place : place + 1]
            for name, leaf in rows.items()
            if name not in unchanged
            for place, client in enumerate(own.tolist())
        }
        parts = {"common": packed_common[1], "own": packed(mine)}
        in_use = settling or cohort.weighting.rule == "rea"
        if in_use and hasattr(method, "beside") and (more := method.beside(message)) is not None:
            parts["beside"] = packed(tree.tensors(more))
        facts = {"clients": own.tolist(), "unchanged": unchanged}
        if new := [client for client in own.tolist() if client in newcomers]:
            facts["newcomers"] = new
        yield node, own, facts, parts


def _same(one: Params, other: Params) -> bool:
    return list(one) == list(other) and all(equal(leaf, other[name]) for name, leaf in one.items())
