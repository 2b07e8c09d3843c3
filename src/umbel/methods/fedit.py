"""FedIT: FedAvg of one low-rank adapter, and of heads, on a frozen base (Zhang et al. 2023, Algorithm 1).

Towards Building the Federated GPT: Federated Instruction Tuning, https://arxiv.org/abs/2305.05644

    model     u + B A
    client    local training on f_k in A, B (and what else the task trains) from the server's
    server    A ← Σ_k n_k A_k / Σ_k n_k , and B and the rest likewise
    kept      tensors that `personal` names, as FedPer's; ours

Its factors are averaged one by one, and the mean of products is not the product of means. The base is what the
task has frozen; `freeze_base = true` freezes all of it. With a task of several slots an owner, `pool = true`
trains one adapter an owner, on batches mixed from all of its slots (tasks/pool.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, with_paths
from umbel.clients import ClientData
from umbel.methods import lora
from umbel.methods.lora import Message, Shared, Upload
from umbel.methods.protocol import Population, Refusals, nothing_mixed
from umbel.methods.server import ServerOptimizer
from umbel.methods.settling import settled
from umbel.mixing import Change
from umbel.model.loss import Loss
from umbel.train import LocalTraining
from umbel.tree import Params, state


@state
class Private:
    head: Params  # `personal` tensors of the base
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class FedIT:
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    freeze_base: bool = False
    personal: tuple[str, ...] = ()  # patterns of trained tensors that stay with the client: "*classifier.*"
    refuses: ClassVar[Refusals] = {"steps": ""}

    def bank(self, module: nn.Module) -> Bank:
        """The plan of the adapter."""
        return self.adapter.bank(module, self.local.batch_size, self.freeze_base, self.personal)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Any]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        return lora.shared_of(module, bank, base, adapter, self.server), self.fresh(module)

    def fresh(self, module: nn.Module) -> Private:
        """What a client has that nobody has seen yet."""
        _, head = lora.parted(module, self.freeze_base, self.personal)
        return tree.broadcast(Private(head, torch.zeros(())), 1)

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return lora.send(shared, len(clients))

    def client_update(self, loss: Loss, message: Message, private: Any, data: ClientData) -> tuple[Upload, Any]:
        trained, upload = lora.train(loss, message, {}, data, self.local, head=private.head)
        return upload, Private(trained["head"], torch.ones_like(private.seen))

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return lora.contribution(upload)

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        return lora.averaged(shared, self.server, sums)

    def absolute(self, shared: Shared, moved: dict[str, Any]) -> dict[str, Any]:
        return lora.absolute(shared, moved)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return lora.changed(upload, message, change)

    def settle(self, loss: Loss, message: Message, private: Any, data: ClientData) -> Any:
        return settled(self, loss, message, private, data) if private.head else private

    def personalize(self, message: Message, private: Any) -> Params:
        head: Params = private.head
        return lora.adapted(message.bank, message.base, message.adapter) | message.stats | head

    def mixture(self, message: Message, private: Any) -> Tensor:
        return nothing_mixed(len(next(iter(message.adapter.values()))))
