"""One file per paper. A method says which tensors travel, what a client minimizes and how uploads meet."""

from umbel.methods.ensemble import Ensemble
from umbel.methods.fedavg import FedAvg
from umbel.methods.floral import FLoRAL
from umbel.methods.local import Local
from umbel.methods.protocol import Method, Population

METHODS: dict[str, type[Method]] = {
    "local": Local,
    "fedavg": FedAvg,
    "floral": FLoRAL,
    "ensemble": Ensemble,
}

__all__ = ["METHODS", "Ensemble", "FLoRAL", "FedAvg", "Local", "Method", "Population"]
