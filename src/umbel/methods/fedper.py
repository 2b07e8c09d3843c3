"""FedPer: a common body and a head of each client's own, trained together (Arivazhagan et al. 2019).

"Federated Learning with Personalization Layers", Algorithms 1 and 2, https://arxiv.org/abs/1912.00818

    model of client k    (W_B, W_P,k)
    client               SGD on f_k in both at once, from the server's W_B and its own W_P,k
    server               W_B as FedAvg's w; W_P,k is never sent

The head is the last layer that has parameters, or whatever `personal` names. If that is the whole model,
this is local training.
"""

from dataclasses import dataclass

from torch import nn

from umbel.methods.partial import Partial
from umbel.model.loss import named_by


@dataclass(frozen=True)
class FedPer(Partial):
    personal: tuple[str, ...] = ()  # patterns of parameter names (`*` matches anything); none: the last layer

    def staying(self, module: nn.Module, names: list[str]) -> set[str]:
        """The tensors whose names match a pattern."""
        if not self.personal:
            return last_layer(module, names)
        return named_by(self.personal, names, module)


def last_layer(module: nn.Module, names: list[str]) -> set[str]:
    """Those of the names that belong to the last layer which has any."""
    layers = [name.rpartition(".")[0] for name in names if name in dict(module.named_parameters())]
    return {name for name in names if name.rpartition(".")[0] == layers[-1]}
