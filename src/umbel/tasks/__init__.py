"""Whose data, which model: one file per task."""

from umbel.tasks.ag_news import AGNews
from umbel.tasks.cifar import CIFAR10, CIFAR100
from umbel.tasks.cifar_vit import CIFARViT
from umbel.tasks.code_vs_prose import CodeVsProse
from umbel.tasks.digits import Digits
from umbel.tasks.dolly import Dolly
from umbel.tasks.femnist import FEMNISTDigits
from umbel.tasks.flan_feddpa import FlanFedDPA
from umbel.tasks.glue import GLUE
from umbel.tasks.mnist import MNIST
from umbel.tasks.multilingual import Multilingual
from umbel.tasks.own import Own
from umbel.tasks.shakespeare import Shakespeare
from umbel.tasks.shakespeare_roles import ShakespeareRoles
from umbel.tasks.synthetic import SyntheticLinear, SyntheticMLP
from umbel.tasks.task import Task, TaskRecipe, task_of

TASKS: dict[str, type[TaskRecipe]] = {
    "ag_news": AGNews,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "cifar_vit": CIFARViT,
    "code_vs_prose": CodeVsProse,
    "digits": Digits,
    "dolly": Dolly,
    "femnist_digits": FEMNISTDigits,
    "flan_feddpa": FlanFedDPA,
    "glue": GLUE,
    "mnist": MNIST,
    "multilingual": Multilingual,
    "own": Own,
    "shakespeare": Shakespeare,
    "shakespeare_roles": ShakespeareRoles,
    "synthetic_linear": SyntheticLinear,
    "synthetic_mlp": SyntheticMLP,
}

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "GLUE",
    "MNIST",
    "TASKS",
    "AGNews",
    "CIFARViT",
    "CodeVsProse",
    "Digits",
    "Dolly",
    "FEMNISTDigits",
    "FlanFedDPA",
    "Multilingual",
    "Own",
    "Shakespeare",
    "ShakespeareRoles",
    "SyntheticLinear",
    "SyntheticMLP",
    "Task",
    "TaskRecipe",
    "task_of",
]
