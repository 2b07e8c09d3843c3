"""One file per paper. A method says which tensors travel, what a client minimizes and how uploads meet."""

from umbel.methods.apfl import APFL
from umbel.methods.ditto import Ditto
from umbel.methods.ensemble import Ensemble
from umbel.methods.fedavg import FedAvg
from umbel.methods.fedbn import FedBN
from umbel.methods.feddpa import FedDPA
from umbel.methods.fedem import FedEM
from umbel.methods.fedit import FedIT
from umbel.methods.fedper import FedPer
from umbel.methods.fedprox import FedProx
from umbel.methods.fedrep import FedRep
from umbel.methods.fedsa_lora import FedSALoRA
from umbel.methods.ffa_lora import FFALoRA
from umbel.methods.finetune import FedAvgFinetune
from umbel.methods.fl_tac import FLTAC
from umbel.methods.flexlora import FlexLoRA
from umbel.methods.floral import FLoRAL
from umbel.methods.ifca import IFCA
from umbel.methods.knnper import KNNPer
from umbel.methods.local import Local
from umbel.methods.local_adapter import LocalAdapter
from umbel.methods.pfedme import PFedMe
from umbel.methods.protocol import Method, Population
from umbel.methods.threshold_clustering import ThresholdClustering
from umbel.methods.trust import Trust

METHODS: dict[str, type[Method]] = {
    "local": Local,
    "fedavg": FedAvg,
    "floral": FLoRAL,
    "ensemble": Ensemble,
    "fedprox": FedProx,
    "fedavg_finetune": FedAvgFinetune,
    "ditto": Ditto,
    "apfl": APFL,
    "pfedme": PFedMe,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbn": FedBN,
    "local_adapter": LocalAdapter,
    "knnper": KNNPer,
    "fedem": FedEM,
    "ifca": IFCA,
    "threshold_clustering": ThresholdClustering,
    "trust": Trust,
    "fedsa_lora": FedSALoRA,
    "ffa_lora": FFALoRA,
    "flexlora": FlexLoRA,
    "fedit": FedIT,
    "feddpa": FedDPA,
    "fl_tac": FLTAC,
}

__all__ = [
    "APFL",
    "FLTAC",
    "IFCA",
    "METHODS",
    "Ditto",
    "Ensemble",
    "FFALoRA",
    "FLoRAL",
    "FedAvg",
    "FedAvgFinetune",
    "FedBN",
    "FedDPA",
    "FedEM",
    "FedIT",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedSALoRA",
    "FlexLoRA",
    "KNNPer",
    "Local",
    "LocalAdapter",
    "Method",
    "PFedMe",
    "Population",
    "ThresholdClustering",
    "Trust",
]
