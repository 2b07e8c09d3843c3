"""FFA-LoRA: one adapter for all whose A stays as it was drawn (Sun et al. 2024, §4).

Improving LoRA in Privacy-preserving Federated Learning, https://arxiv.org/abs/2403.12313

    model     u + B A₀ ,   A₀ random, B = 0 at the start
    client    SGD on f_k in B (and u)
    server    B ← B + η (Σ_k n_k B_k / Σ_k n_k − B) , and u likewise

With A₀ the same everywhere, the mean of the products B_k A₀ is the product of the mean of B_k with A₀: averaging
is exact. A₀ does not travel, for it follows from the seed. In the paper u is a trained model and frozen;
`freeze_base = false`, the default, trains and averages it too, for tasks that start from nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from umbel import mixing
from umbel.adapters import AdapterPlan, Bank, with_paths
from umbel.clients import ClientData
from umbel.methods import lora
from umbel.methods.lora import Message, Shared, Upload
from umbel.methods.protocol import Population, nothing_mixed
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import Loss
from umbel.train import LocalTraining
from umbel.tree import Params, state


@state
class Private:
    """Nothing stays with the client."""


@dataclass(frozen=True)
class FFALoRA:
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    freeze_base: bool = False

    def bank(self, module: nn.Module) -> Bank:
        """The plan of the adapter."""
        return self.adapter.bank(module, self.local.batch_size, self.freeze_base)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self.freeze_base, population)
        drawn = {lora.reading(part): adapter.pop(lora.reading(part)) for part in bank.low_rank}
        bank = replace(bank, frozen=bank.frozen | drawn)
        return lora.shared_of(module, bank, base, adapter, self.server), Private()

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return lora.send(shared, len(clients))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        _, upload = lora.train(loss, message, {}, data, self.local, fixed(message))
        return upload, private

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return lora.contribution(upload)

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return lora.averaged(shared, self.server, mixing.total(map(self.contribution, uploads)))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        return private

    def personalize(self, message: Message, private: Private) -> Params:
        return lora.adapted(message.bank, message.base, message.adapter | fixed(message)) | message.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(next(iter(message.adapter.values()))))


def fixed(message: Message) -> Params:
    """(K, 1, …) A₀ of every client: all rows are one and the same."""
    some = next(iter(message.adapter.values()))
    names = [lora.reading(part) for part in message.bank.low_rank]
    drawn = {name: message.bank.frozen[name].to(some.device) for name in names}
    return {name: leaf.expand(len(some), *leaf.shape) for name, leaf in drawn.items()}
