"""FFA-LoRA: one adapter for all whose A stays as it was drawn (Sun et al. 2024, §4).

Improving LoRA in Privacy-preserving Federated Learning, https://arxiv.org/abs/2403.12313

    model     u + B A₀ ,   A₀ random, B = 0 at the start
    client    SGD on f_k in B (and u)
    server    B ← B + η (Σ_k n_k B_k / Σ_k n_k − B) , and u likewise

With A₀ the same everywhere, the mean of the products B_k A₀ is the product of the mean of B_k with A₀: averaging
is exact. A₀ does not travel, for it follows from the seed. In the paper u is a trained model and frozen;
`freeze_base = false`, the default, trains and averages it too, for tasks that start from nothing.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from umbel.clients import ClientData
from umbel.methods import lora
from umbel.methods.fedit import FedIT, Private
from umbel.methods.lora import Message, Shared, Upload
from umbel.methods.protocol import Population, Refusals
from umbel.model.loss import Loss
from umbel.tree import Params


@dataclass(frozen=True)
class FFALoRA(FedIT):
    refuses: ClassVar[Refusals] = {"steps": ""}

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        drawn = {lora.reading(part): adapter.pop(lora.reading(part)) for part in bank.low_rank}
        bank = replace(bank, frozen=bank.frozen | drawn)
        return lora.shared_of(module, bank, base, adapter, self.server), self.fresh(module)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, upload = lora.train(loss, message, {}, data, self.local, fixed(message), private.head)
        return upload, Private(trained["head"], torch.ones_like(private.seen))

    def personalize(self, message: Message, private: Private) -> Params:
        own = lora.adapted(message.bank, message.base, message.adapter | fixed(message))
        return own | message.stats | private.head


def fixed(message: Message) -> Params:
    """(K, 1, …) A₀ of every client: all rows are one and the same."""
    some = next(iter(message.adapter.values()))
    names = [lora.reading(part) for part in message.bank.low_rank]
    drawn = {name: message.bank.frozen[name].to(some.device) for name in names}
    return {name: leaf.expand(len(some), *leaf.shape) for name, leaf in drawn.items()}
