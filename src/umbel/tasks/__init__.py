"""Whose data, which model: one file per task."""

from umbel.tasks.digits import Digits
from umbel.tasks.synthetic import SyntheticLinear, SyntheticMLP
from umbel.tasks.task import Task, TaskRecipe, task_of

TASKS: dict[str, type[TaskRecipe]] = {
    "digits": Digits,
    "synthetic_linear": SyntheticLinear,
    "synthetic_mlp": SyntheticMLP,
}

__all__ = ["TASKS", "Digits", "SyntheticLinear", "SyntheticMLP", "Task", "TaskRecipe", "task_of"]
