"""Pooling: the slots of one owner train as one client, on batches mixed from all of them; tests stay by slot.

What a method with one model a client is compared by with one that has a model for every slot: the same examples,
the same tests, each answered by its owner's model, and the same work. Where a client's steps are a fixed number,
a pooled client does them for each of its slots.
"""

from dataclasses import replace

import numpy as np
import torch

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.schedule import Schedule
from umbel.tasks.task import Task


def arranged(task: Task, schedule: Schedule) -> Task:
    """The task as the schedule has it: tested on training examples where settings are searched, and pooled."""
    if schedule.pool and schedule.held_out:
        raise RecipeError(
            "held_out does not go with pool: other examples would be held out than where clients are single slots"
        )
    task = task.for_tuning(schedule.seed, schedule.validation) if schedule.validation else task
    return pooled(task) if schedule.pool else task


def pooled(task: Task) -> Task:
    """The task with a client for each owner, in the order of their numbers.

    Raises:
        RecipeError: nobody owns slots in this task.
    """
    if task.owner is None:
        raise RecipeError(f"pool: in {task.name} clients have one task each, and there are no slots to pool")
    owners, serves = np.unique(task.owner.cpu().numpy(), return_inverse=True)
    train, rows, count = task.train, [], np.zeros(len(owners), dtype=np.int64)
    for slot in np.argsort(serves, kind="stable").tolist():
        rows.append(np.arange(train.start[slot], train.start[slot] + train.count[slot]))
        count[serves[slot]] += train.count[slot]
    index = torch.from_numpy(np.concatenate(rows)).to(train.x.device)
    start = np.concatenate([[0], count.cumsum()[:-1]])
    whole = Examples(train.x[index], train.y[index], start, count, np.bincount(serves))
    return replace(task, train=whole, owner=None, serves=torch.from_numpy(serves), shares=None)
