"""FedSA-LoRA: clients share A and keep their own B (Guo et al. 2024, §4).

Selective Aggregation for Low-Rank Adaptation in Federated Learning, https://arxiv.org/abs/2410.01463

    model of client k     u + B_k A
    client                SGD on f_k in A, B_k (and u) at once, from the server's A and its own B_k
    sent                  A_k (and u_k), n_k
    kept                  B_k; of an adapter for biases or norm layers all of it
    server                A ← A + η (Σ_k n_k A_k / Σ_k n_k − A) , and u likewise

In the paper u is a trained model and frozen; `freeze_base = false`, the default, trains and averages it too, for
tasks that start from nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel import tree
from umbel.clients import ClientData
from umbel.methods import lora
from umbel.methods.fedit import FedIT
from umbel.methods.lora import Message, Shared, Upload
from umbel.methods.protocol import Population, nothing_mixed
from umbel.methods.settling import settled
from umbel.model.loss import Loss
from umbel.tree import Params, state


@state
class Private:
    own: Params  # (K, 1, …) B, and what the adapter adds to biases
    head: Params  # `personal` tensors of the base
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class FedSALoRA(FedIT):
    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        common = {lora.reading(part): adapter.pop(lora.reading(part)) for part in bank.low_rank}
        _, head = lora.parted(module, self.freeze_base, self.personal)
        private = tree.broadcast(Private(adapter, head, torch.zeros(())), 1)
        return lora.shared_of(module, bank, base, common, self.server), private

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, upload = lora.train(loss, message, private.own, data, self.local, head=private.head)
        return upload, Private(trained["own"], trained["head"], torch.ones_like(private.seen))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, private, data)

    def personalize(self, message: Message, private: Private) -> Params:
        own = lora.adapted(message.bank, message.base, message.adapter | private.own)
        return own | message.stats | private.head

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(private.seen))
