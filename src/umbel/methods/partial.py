"""FedAvg in which some tensors never leave the client: what FedPer, FedRep and FedBN have in common.

    model of client k    (u, h_k)
    client               SGD on f_k in both at once, from the server's u and its own h_k
    server               u as FedAvg's w

Which tensors are h_k is each method's own: it says so of parameters and running statistics alike, by name. A
client that has not trained yet serves what its first round would give it (settling.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel import tree
from umbel.clients import Batch, ClientData
from umbel.methods.fedavg import FedAvg, Message, Shared, Upload
from umbel.methods.protocol import Population, nothing_mixed
from umbel.methods.settling import settled
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.train import Groups, local_train
from umbel.tree import Params, state


@state
class Private:
    params: Params  # h
    stats: Params  # running statistics that stay
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class Partial(FedAvg, ABC):
    """FedAvg of all tensors but those that `staying` names."""

    @abstractmethod
    def staying(self, module: nn.Module, names: list[str]) -> set[str]:
        """Which of the module's tensors stay with the client."""

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        params = trained_params(module)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        stay = self.staying(module, [*params, *stats])
        own = Private(
            {name: leaf for name, leaf in params.items() if name in stay},
            {name: leaf for name, leaf in stats.items() if name in stay},
            torch.zeros(()),
        )
        body = {name: leaf for name, leaf in params.items() if name not in stay}
        body_stats = {name: leaf for name, leaf in stats.items() if name not in stay}
        return Shared(body, body_stats, self.server.init(body)), tree.broadcast(own, 1)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        start = {"params": message.params, "own": private.params, "stats": message.stats | private.stats}
        lr = {"params": self.local.lr, "own": self.local.lr}
        trained, mean_loss = local_train(whole(loss), start, data, self.local, lr)
        return parted(trained, private, data, mean_loss)

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, private, data)

    def personalize(self, message: Message, private: Private) -> Params:
        return message.params | message.stats | private.params | private.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(private.seen))


def whole(loss: Loss) -> Any:
    """The loss of the model whose parts are the groups "params", "own" and "stats"."""

    def objective(groups: Groups, batch: Batch, _step: int) -> Tensor:
        return loss(groups["params"] | groups["own"] | groups["stats"], batch)

    return objective


def parted(trained: Groups, private: Private, data: ClientData, mean_loss: Tensor) -> tuple[Upload, Private]:
    """What is sent and what is kept of the trained groups."""
    stats = trained["stats"]
    sent = {name: leaf for name, leaf in stats.items() if name not in private.stats}
    kept = {name: stats[name] for name in private.stats}
    upload = Upload(trained["params"], sent, data.weight, mean_loss)
    return upload, Private(trained["own"], kept, torch.ones_like(private.seen))
