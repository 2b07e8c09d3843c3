"""A few rounds of a method without a task, a schedule or a run folder; and runs that are stopped."""

from copy import deepcopy

import numpy as np

from umbel.clients import Examples
from umbel.cohort import Cohort, PrivateStore, Tally
from umbel.costs import Cost
from umbel.methods import Population
from umbel.model.loss import Loss

FREE = Cost(
    {}, {}, {}, {}, 1, 0
)  # for `rounds` where nobody looks at it: to measure it takes as long as two rounds


def simulate(
    method,
    module,
    clients,
    rounds=1,
    loss="mse",
    chunk=64,
    group=None,
    order=None,
    shared=None,
    tally=None,
    seed=0,
):
    """Everyone takes part, in the order given; returns the last Shared and the store of what clients keep."""
    first, fresh = method.init(module, Population(len(clients), seed, group))
    shared = first if shared is None else shared
    cohort = Cohort(method, Loss(method.adapt(deepcopy(module)), loss), Examples.of(clients), seed, chunk)
    store = PrivateStore(fresh, len(clients))
    order = np.arange(len(clients)) if order is None else order
    for round in range(1, rounds + 1):
        uploads = cohort.uploads(shared, store, order, round, Tally() if tally is None else tally)
        shared = method.server_update(shared, uploads)
    return shared, store


class StoppedError(Exception):
    """What a run is stopped by."""


def stop_after(round):
    """An `on_round` that stops the run after this round."""

    def stop(at):
        if at.round == round:
            raise StoppedError

    return stop
