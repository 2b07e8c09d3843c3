"""Local adapter: a base for all and one adapter of each client's own, the "Local Adaptor" of the FLoRAL paper.

Almansoori, Horváth, Takáč 2025, §5, https://arxiv.org/abs/2410.03497

    model of client k    u + a_k
    client               SGD on f_k in u and a_k at once, from the server's u and its own a_k
    server               u as FedAvg's w; a_k is never sent

This is FLoRAL with C = 1, its adapter private. The running statistics of BatchNorm layers stay with the
client. A client that has not trained yet serves what its first round would give it (settling.py).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umbel import tree
from umbel.adapters import AdapterPlan, Bank, mix, with_paths
from umbel.adapters.precondition import precondition
from umbel.clients import Batch, ClientData
from umbel.methods.fedavg import FedAvg, Message, Shared, Upload
from umbel.methods.protocol import Population, nothing_mixed
from umbel.methods.settling import settled
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.train import Groups, local_train
from umbel.tree import Params, state


@state
class Private:
    adapter: Params  # (K, 1, …) a
    stats: Params  # running statistics of BatchNorm layers
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it
    bank: Bank  # how a is added to u; no tensor of the client's


@dataclass(frozen=True)
class LocalAdapter(FedAvg):
    adapter: AdapterPlan = field(default_factory=lambda: AdapterPlan(rank=0.01))
    adapter_lr: float = 1.0  # times local.lr
    init_std: float = 0.0  # of B at the start
    precondition: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, adapter_lr="(0, inf)", init_std="[0, inf)")

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self._bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self._bank(module)
        base = trained_params(module, needed=False)
        dtype = bank.dtype(module)
        drawn = bank.init(1, generator(population.seed, "adapters"), self.init_std)
        adapter = {name: leaf.to(dtype) for name, leaf in drawn.items()}
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        private = tree.broadcast(Private(adapter, stats, torch.zeros(()), bank), 1)
        return Shared(base, {}, self.server.init(base)), private

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        bank = private.bank

        def objective(groups: Groups, batch: Batch, _step: int) -> Tensor:
            return loss(added(bank, groups["params"], groups["adapter"]) | groups["stats"], batch)

        def conditioned(groups: Groups, grads: Groups) -> Groups:
            return grads | {"adapter": precondition(bank, groups["adapter"], grads["adapter"])}

        trained, mean_loss = local_train(
            objective,
            {"params": message.params, "adapter": private.adapter, "stats": private.stats},
            data,
            self.local,
            {"params": self.local.lr, "adapter": self.local.lr * self.adapter_lr},
            conditioned if self.precondition else None,
        )
        kept = Private(trained["adapter"], trained["stats"], torch.ones_like(private.seen), bank)
        return Upload(trained["params"], {}, data.weight, mean_loss), kept

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, private, data)

    def personalize(self, message: Message, private: Private) -> Params:
        return added(private.bank, message.params, private.adapter) | private.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(private.seen))

    def _bank(self, module: nn.Module) -> Bank:
        return self.adapter.bank(module, self.local.batch_size)


def added(bank: Bank, base: Params, adapter: Params) -> Params:
    """The tensors of u + a."""
    some = next(iter(adapter.values()))
    return mix(bank, base, adapter, some.new_ones(some.shape[0], 1))
