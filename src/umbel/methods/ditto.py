"""Ditto: beside FedAvg's global model every client trains one of its own, held to the global one by a spring.

Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
Algorithm 1, https://arxiv.org/abs/2012.04221

    client k    w_k ← local SGD on f_k from wᵗ, sent
                v_k ← local SGD on f_k(v) + λ/2 ‖v − wᵗ‖² from v_k, kept and served
    server      as FedAvg

v_k starts at the wᵗ that the client receives in its first round; a client that has not trained yet serves
what that round would give it (settling.py). v_k has its own running statistics of BatchNorm layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel import tree
from umbel.clients import ClientData
from umbel.methods.fedavg import FedAvg, Message, Shared, Upload
from umbel.methods.fedprox import check_spring, proximal
from umbel.methods.protocol import Population
from umbel.methods.settling import choose, settled
from umbel.model.loss import Loss
from umbel.ranges import check_ranges
from umbel.train import local_train
from umbel.tree import Params, state


@state
class Private:
    params: Params  # v
    stats: Params  # v's running statistics
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class Ditto(FedAvg):
    strength: float = 1.0  # λ

    def __post_init__(self) -> None:
        check_ranges(self, strength="[0, inf)")
        check_spring("strength", self.strength, "local.lr", self.local.lr, self.local)

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        shared, _ = super().init(module, population)
        return shared, tree.broadcast(Private(shared.params, shared.stats, torch.zeros(())), 1)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        upload, _ = super().client_update(loss, message, private, data)
        own = self._start(message, private)
        objective = proximal(self.objective(loss, message), message.params, self.strength)
        start = {"params": own.params, "stats": own.stats}
        trained, _ = local_train(objective, start, data, self.local, {"params": self.local.lr})
        return upload, Private(trained["params"], trained["stats"], torch.ones_like(private.seen))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, self._start(message, private), data)

    def personalize(self, message: Message, private: Private) -> Params:
        own = self._start(message, private)
        return own.params | own.stats

    def _start(self, message: Message, private: Private) -> Private:
        received = Private(message.params, message.stats, private.seen)
        started: Private = choose(private.seen > 0, private, received)
        return started
