"""Many clients' models in one batch: rows of different clients, one pass over the base that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from umbel.errors import DataError, ModelError
from umbel.model.loss import Loss
from umbel.model.pretrained import Pretrained
from umbel.runs import Result
from umbel.tree import Params, is_broadcast


@dataclass(frozen=True)
class Models:
    """Personal models that are ready to serve.

    Attributes:
        loss: of the module that all of them are.
        clients: (K,) whose they are, ascending.
        params: what each has of its own, leading axis K.
    """

    loss: Loss
    clients: Tensor
    params: Params


def models_of(result: Result, clients: Sequence[int]) -> Models:
    """The models of these clients, settled on their training data; made once, they serve any number of batches.

    Raises:
        DataError: there are none, or the run has no such client.
    """
    wanted = sorted(set(clients))
    if not wanted:
        raise DataError("there are no clients")
    wrong = [client for client in wanted if not 0 <= client < result.task.num_clients]
    if wrong:
        raise DataError(f"client {wrong[0]}: the run has the clients 0 to {result.task.num_clients - 1}")
    chunk = max(1, result.cohort.chunk)
    parts = []
    with torch.no_grad():
        for first in range(0, len(wanted), chunk):
            some = np.array(wanted[first : first + chunk], dtype=np.int64)
            private = result.progress.store.rows(some)
            parts.append(result.cohort.served(result.progress.shared, private, some)[0])
    params = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    index = torch.tensor(wanted, dtype=torch.long, device=result.cohort.train.x.device)
    return Models(result.cohort.loss, index, params)


def personal_logits(models: Models | Result, x: Tensor, clients: Tensor) -> Tensor:
    """(B, …) what each row's client answers on it, in the order of the rows; without gradients.

    Where each task has labels of its own (`labels_each` of a task), a row's answers to other tasks' labels mean
    nothing: `umbel.model.loss.among_own` takes them out.

    Rows are sorted by client, and clients with fewer rows than others are padded, so that all of them are one
    pass over the base. A module whose clients cannot be stacked goes one client after the other.

    Args:
        models: of `models_of`, or a run: then its clients' models are made for this one batch.
        x: (B, …) inputs.
        clients: (B,) whole numbers, whose row each is.

    Raises:
        DataError: a row's client has no model here, there are not as many clients as rows, or texts have ids or a
            length that the base does not know.
    """
    if len(clients) != len(x) or clients.dim() != 1:
        raise DataError(f"{len(x)} rows want as many clients, got {tuple(clients.shape)}")
    if not len(x):
        raise DataError("there are no rows")
    if isinstance(models, Result):
        models = models_of(models, clients.tolist())
    x, clients = x.to(models.clients.device), clients.to(models.clients)
    missing = clients[~torch.isin(clients, models.clients)]
    if len(missing):
        raise DataError(f"client {int(missing[0])} has no model here; name it in models_of(result, clients)")
    present, owner, counts = torch.unique(clients, return_inverse=True, return_counts=True)
    places = torch.searchsorted(models.clients, present)
    everyone = len(present) == len(models.clients)
    params = models.params if everyone else {n: _rows(leaf, places) for n, leaf in models.params.items()}
    order = owner.argsort(stable=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(x), device=x.device) - first[owner[order]]  # of each sorted row, among its client's
    grid = order[first].unsqueeze(1).repeat(1, int(counts.max()))  # (K, M) rows; a client's first one is padding
    grid[owner[order], column] = order
    try:
        with torch.no_grad():
            answers = _answers(models.loss, params, x[grid])
    except (IndexError, RuntimeError):
        if isinstance(models.loss.module, Pretrained) and models.loss.module.kind != "image":
            models.loss.module.check_ids(x)  # which says what is wrong with it, if that is it
        raise
    logits = answers.new_empty(len(x), *answers.shape[2:])
    logits[order] = answers[owner[order], column]
    return logits


def _joined(leaves: list[Tensor]) -> Tensor:
    """The leaves one after the other, memories padded to the longest; what is one tensor for all stays one."""
    if len({leaf.shape[1:] for leaf in leaves}) > 1:
        most = max(leaf.shape[1] for leaf in leaves)
        leaves = [F.pad(leaf, (0, 0) * (leaf.dim() - 2) + (0, most - leaf.shape[1])) for leaf in leaves]
    first, count = leaves[0], sum(map(len, leaves))
    if all(leaf.data_ptr() == first.data_ptr() and (len(leaf) == 1 or is_broadcast(leaf)) for leaf in leaves):
        return first[:1].expand(count, *first.shape[1:])
    return torch.cat(leaves)


def _rows(leaf: Tensor, places: Tensor) -> Tensor:
    """The rows of the leaf; what is one tensor for all stays one."""
    return leaf[:1].expand(len(places), *leaf.shape[1:]) if is_broadcast(leaf) else leaf[places]


def _answers(loss: Loss, params: Params, x: Tensor) -> Tensor:
    """(K, M, …) for x (K, M, …)."""
    try:
        return loss.outputs(params, x)
    except ModelError:  # a layer that cannot be stacked
        each = [{name: leaf[k : k + 1] for name, leaf in params.items()} for k in range(len(x))]
        return torch.cat([loss.outputs(own, x[k : k + 1]) for k, own in enumerate(each)])
