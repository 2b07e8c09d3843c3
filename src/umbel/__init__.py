"""Personalised federated fine-tuning with mixtures of low-rank adapters.

    recipe ─▶ task (clients, model, loss) ─▶ method ─▶ rounds ─▶ run folder ─▶ report

The names below load when they are first used, so that `import umbel` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbel.adapters import AdapterPlan as AdapterPlan
    from umbel.cohort import Engine as Engine
    from umbel.errors import UmbelError as UmbelError
    from umbel.exporting import export as export
    from umbel.methods import Ensemble as Ensemble
    from umbel.methods import FedAvg as FedAvg
    from umbel.methods import FLoRAL as FLoRAL
    from umbel.methods import Local as Local
    from umbel.methods.routing import Router as Router
    from umbel.onboarding import onboard as onboard
    from umbel.runs import Result as Result
    from umbel.runs import resume as resume
    from umbel.runs import run as run
    from umbel.schedule import Schedule as Schedule
    from umbel.serving import models_of as models_of
    from umbel.serving import personal_logits as personal_logits
    from umbel.tasks import Task as Task
    from umbel.tasks import task_of as task_of
    from umbel.tasks.bases import load_pretrained as load_pretrained
    from umbel.train import LocalTraining as LocalTraining

_HOMES = {
    "AdapterPlan": "umbel.adapters",
    "Engine": "umbel.cohort",
    "Ensemble": "umbel.methods",
    "FLoRAL": "umbel.methods",
    "FedAvg": "umbel.methods",
    "Local": "umbel.methods",
    "LocalTraining": "umbel.train",
    "Result": "umbel.runs",
    "Router": "umbel.methods.routing",
    "Schedule": "umbel.schedule",
    "Task": "umbel.tasks",
    "UmbelError": "umbel.errors",
    "export": "umbel.exporting",
    "load_pretrained": "umbel.tasks.bases",
    "models_of": "umbel.serving",
    "onboard": "umbel.onboarding",
    "personal_logits": "umbel.serving",
    "resume": "umbel.runs",
    "run": "umbel.runs",
    "task_of": "umbel.tasks",
}

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'umbel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
