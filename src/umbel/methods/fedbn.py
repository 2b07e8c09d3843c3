"""FedBN: FedAvg of everything but the norm layers, which stay with their clients (Li et al. 2021).

"FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", Algorithm 1,
https://arxiv.org/abs/2102.07623

    model of client k    (u, b_k) ,  b_k the scales, shifts and running statistics of its norm layers
    client               SGD on f_k in both at once, from the server's u and its own b_k
    server               u as FedAvg's w; b_k is never sent

On a model without such layers this is FedAvg, and the log says so.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from torch import nn

from umbel.methods.partial import Partial

LOG = logging.getLogger(__name__)
BATCH = (nn.modules.batchnorm._BatchNorm,)
ALL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class FedBN(Partial):
    norms: Literal["batch", "all"] = "batch"  # which layers stay: BatchNorm, or every kind of norm

    def staying(self, module: nn.Module, names: list[str]) -> set[str]:
        """The tensors of the norm layers."""
        kinds = BATCH if self.norms == "batch" else ALL
        paths = {path for path, layer in module.named_modules() if isinstance(layer, kinds)}
        if not paths:
            told = (
                "a model without BatchNorm; norms = 'all' counts others"
                if self.norms == "batch"
                else "one without norms"
            )
            LOG.warning("fedbn: %s is %s, so that this is fedavg", type(module).__name__, told)
        return {name for name in names if name.rpartition(".")[0] in paths}
