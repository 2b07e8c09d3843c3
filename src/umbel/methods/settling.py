"""Training in `settle`: clients that serve what they have trained alone.

Shared by the methods whose clients keep tensors. Their Private has a field `seen` (K,), 0 until a client's
first round and 1 from then on: a client that has not trained yet serves what its first round would leave it
with.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.methods.protocol import Method
from umbel.model.loss import Loss, has_batch_norm, mixes_examples


def settled(method: Method, loss: Loss, message: Any, private: Any, data: ClientData) -> Any:
    """The Private, trained for one round from what was received in the rows of those never `seen`.

    Where that work is not finite, or BatchNorm has one example by itself, the row stays as it is. Nothing is
    computed if everyone has been seen.
    """
    if bool((private.seen > 0).all()):
        return private

    def work(message: Any, private: Any, data: ClientData) -> Any:
        return method.client_update(loss, message, private, data)[1]

    trained = stacked(work, loss, message, private, data, method.local.batch_size, private)
    return choose((private.seen == 0) & tree.finite_rows(trained), trained, private)


def stacked(
    work: Callable[[Any, Any, ClientData], Any],
    loss: Loss,
    message: Any,
    private: Any,
    data: ClientData,
    batch_size: int = 0,
    kept: Any = None,
) -> Any:
    """`work(message, private, data)`, which trains, for K clients of any sizes.

    Where a batch's examples see each other (BatchNorm) no padding may be among them: there it is done for
    clients with equally many examples (and slots) at a time. Those whose last batch of `batch_size` (0: all)
    would be one example, on which BatchNorm cannot train, have their rows of `kept`.
    """
    with torch.enable_grad():
        if not mixes_examples(loss.module):
            return work(message, private, data)
        counts = data.num_examples.cpu().numpy()
        alone = lonely(counts, batch_size) if batch_size and has_batch_norm(loss.module) else counts < 0
        lengths = counts if data.part is not None else data.examples.lengths(data.clients)
        rows = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        if len(rows) == 1:
            return kept if alone[0] else work(message, private, data)
        done = []
        for own in rows:
            index = torch.from_numpy(own).to(data.examples.x.device)
            these = tree.rows(message, index), tree.rows(private, index), data.among(index)
            done.append(tree.rows(kept, index) if alone[own[0]] else work(*these))
        order = torch.from_numpy(np.concatenate(rows).argsort()).to(data.examples.x.device)
        return tree.rows(tree.map_tensors(lambda *leaves: torch.cat(leaves), *done), order)


def lonely(counts: np.ndarray, batch_size: int) -> np.ndarray:
    """(K,) bool, whether the last batch of a client with so many examples is one example."""
    alone: np.ndarray = counts % batch_size == 1 if batch_size > 1 else counts > 0
    return alone


def choose(chosen: Tensor, one: Any, other: Any) -> Any:
    """The rows of `one` where `chosen` (K,), those of `other` elsewhere."""
    return tree.map_tensors(lambda x, y: torch.where(mixing.as_leading(chosen, x), x, y), one, other)
