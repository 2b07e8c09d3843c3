"""FlexLoRA: clients train adapters of the ranks they can afford (Bai et al. 2024, §3).

Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
https://arxiv.org/abs/2402.11505

    model of client k     u + B_k A_k of rank r_k
    client                SGD on f_k in A_k, B_k (and u), from the server's product cut to rank r_k
    server                P ← P + η (Σ_k n_k B_k A_k / Σ_k n_k − P) , and u likewise
    sent to k             B = U S and A = Vᵀ of the r_k largest singular values of P = U S Vᵀ

Products are averaged, not factors: the mean is exact. Singular values come in order, so the server keeps P's
factors of the largest rank and cuts them for each client; a rank that a client does not have is zero in
both factors, where no gradient moves it. A rank that P does not have keeps its A with B at zero, as LoRA begins:
with √S in both, both were zero and no client could fill it again. Tensors that `personal` names stay with the
client, as FedPer's; ours. Departures: docs/methods.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, with_paths
from umbel.adapters.products import factors, products, summed_products
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods import lora
from umbel.methods.fedit import Private
from umbel.methods.lora import Message
from umbel.methods.protocol import Population, Refusals, nothing_mixed
from umbel.methods.server import ServerOptimizer
from umbel.methods.settling import settled
from umbel.mixing import Change
from umbel.model.loss import Loss
from umbel.train import LocalTraining
from umbel.tree import Params, state


@state
class Shared(lora.Shared):
    ranks: Tensor  # (len(ranks), layers) int64


@state
class Upload(lora.Upload):
    bank: Bank


@dataclass(frozen=True)
class FlexLoRA:
    ranks: tuple[int | float, ...] = ()  # client k has ranks[k mod their number]; empty: all have adapter.rank
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    freeze_base: bool = False
    personal: tuple[str, ...] = ()  # patterns of trained tensors that stay with the client: "*classifier.*"
    refuses: ClassVar[Refusals] = {
        "mean": "it averages products of factors, and a robust mean of factors is none of products"
    }

    def __post_init__(self) -> None:
        if self.ranks and self.adapter.peft:
            raise RecipeError(
                "flexlora: ranks are of umbel's own adapters; adapter.peft has one r for all clients"
            )

    def banks(self, module: nn.Module) -> list[Bank]:
        """The plan of each of the ranks."""
        plans = [replace(self.adapter, rank=rank) for rank in self.ranks or (self.adapter.rank,)]
        return [plan.bank(module, self.local.batch_size, self.freeze_base, self.personal) for plan in plans]

    def bank(self, module: nn.Module) -> Bank:
        """The plan with each layer's largest rank."""
        layers = zip(*(bank.low_rank for bank in self.banks(module)), strict=True)
        widest = tuple(max(parts, key=lambda part: part.rank) for parts in layers)
        return replace(self.banks(module)[0], low_rank=widest)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        common = lora.shared_of(module, bank, base, adapter, self.server)
        moments = common.moments | {"adapter": self.server.init(dense(bank, adapter))}
        ranks = torch.tensor([[part.rank for part in bank.low_rank] for bank in self.banks(module)])
        _, head = lora.parted(module, self.freeze_base, self.personal)
        private = tree.broadcast(Private(head, torch.zeros(())), 1)
        return Shared(base, adapter, common.stats, moments, bank, ranks), private

    def send(self, shared: Shared, clients: Tensor) -> Message:
        message = lora.send(shared, len(clients))
        ranks = shared.ranks[clients % len(shared.ranks)]  # (K, layers)
        cut = dict(message.adapter)
        for part, own in zip(shared.bank.low_rank, ranks.unbind(1), strict=True):
            has = torch.arange(part.rank, device=own.device) < own.unsqueeze(1)  # (K, r)
            for name, axis in ((part.a_name, 2), (part.b_name, 3)):
                shape = [has.shape[-1] if i == axis else 1 for i in range(cut[name].dim())]
                cut[name] = torch.where(has.view(len(has), *shape[1:]), cut[name], 0.0)
        return replace(message, adapter=cut)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, upload = lora.train(loss, message, {}, data, self.local, head=private.head)
        kept = Private(trained["head"], torch.ones_like(private.seen))
        return Upload(**vars(upload), bank=message.bank), kept

    def contribution(self, upload: Upload) -> dict[str, Any]:
        bank, weight = upload.bank, upload.weight
        added = {update.name: upload.adapter[update.name] for update in bank.additive}
        mixed = summed_products(bank, weight, upload.adapter) | mixing.weighted_sum(weight, added)
        return lora.contribution(replace(upload, adapter={})) | {"adapter": mixed}

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        bank = shared.bank
        moved = lora.averaged(replace(shared, adapter=dense(bank, shared.adapter)), self.server, sums)
        added = {update.name: moved.adapter[update.name] for update in bank.additive}
        return replace(moved, adapter=factors(bank, moved.adapter, shared.adapter) | added)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return lora.changed(upload, message, change)

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, private, data) if private.head else private

    def personalize(self, message: Message, private: Private) -> Params:
        return lora.adapted(message.bank, message.base, message.adapter) | message.stats | private.head

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(next(iter(message.adapter.values()))))


def dense(bank: Bank, adapter: Params) -> Params:
    """The adapter with its products in place of their factors."""
    return products(bank, adapter) | {update.name: adapter[update.name] for update in bank.additive}
