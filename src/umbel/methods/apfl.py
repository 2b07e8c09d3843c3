"""APFL: every client serves its own mixture of a model of its own and the global one.

Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning", Algorithm 1, https://arxiv.org/abs/2003.13461

    client k    v̄ = α_k v_k + (1 − α_k) w_k ,  and at every step, all from the same values,
                w_k ← w_k − η ∇f_k(w_k)                                 from w, sent
                v_k ← v_k − η α_k ∇f_k(v̄)                               kept
                α_k ← clip(α_k − η ⟨v_k − w_k, ∇f_k(v̄)⟩, 0, 1)          kept; only if `adaptive`
    server      as FedAvg
    served      α_k v_k + (1 − α_k) w

v_k starts at the w of the client's first round; a client that has not trained yet serves what that round
would give it (settling.py). v̄ has its own running statistics of BatchNorm layers. Momentum and weight decay,
if used, leave α alone. Departures: docs/methods.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import Batch, ClientData
from umbel.methods.fedavg import FedAvg, Message, Shared, Upload
from umbel.methods.protocol import Population
from umbel.methods.settling import choose, settled
from umbel.model.loss import Loss
from umbel.ranges import check_ranges
from umbel.train import Groups, local_train
from umbel.tree import Params, state


@state
class Private:
    params: Params  # v
    stats: Params  # running statistics of v̄
    alpha: Tensor  # (K,) α
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class APFL(FedAvg):
    alpha: float = 0.5  # α at the start
    adaptive: bool = True  # α moves

    def __post_init__(self) -> None:
        check_ranges(self, alpha="[0, 1]")

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        shared, _ = super().init(module, population)
        alpha = torch.tensor(self.alpha, dtype=next(iter(shared.params.values())).dtype)
        return shared, tree.broadcast(Private(shared.params, shared.stats, alpha, torch.zeros(())), 1)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        own, rate = self._start(message, private), self.local.lr

        def objective(groups: Groups, batch: Batch, _step: int) -> Tensor:
            w = groups["params"]
            mixed = mixture_of(groups["own"], {n: leaf.detach() for n, leaf in w.items()}, groups["mix"]["alpha"])
            everyones = loss(w | groups["stats"], batch)
            # Both are differentiated; the loss that is reported is that of v̄.
            return loss(mixed | groups["own_stats"], batch) + everyones - everyones.detach()

        def clipped(groups: Groups) -> None:
            if self.adaptive:
                groups["mix"]["alpha"].clamp_(0, 1)

        start = {"params": message.params, "stats": message.stats, "own": own.params, "own_stats": own.stats}
        trained, mean_loss = local_train(
            objective,
            start | {"mix": {"alpha": own.alpha}},
            data,
            self.local,
            {"params": rate, "own": rate} | ({"mix": rate} if self.adaptive else {}),
            plain=frozenset({"mix"}),
            project=clipped,
        )
        kept = Private(
            trained["own"], trained["own_stats"], trained["mix"]["alpha"], torch.ones_like(private.seen)
        )
        return Upload(trained["params"], trained["stats"], data.weight, mean_loss), kept

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, self._start(message, private), data)

    def personalize(self, message: Message, private: Private) -> Params:
        own = self._start(message, private)
        return mixture_of(own.params, message.params, own.alpha) | own.stats

    def _start(self, message: Message, private: Private) -> Private:
        received = Private(message.params, message.stats, private.alpha, private.seen)
        started: Private = choose(private.seen > 0, private, received)
        return started


def mixture_of(own: Params, other: Params, alpha: Tensor) -> Params:
    """α own + (1 − α) other, α (K,) for each client."""
    mixed: Params = {}
    for name, leaf in own.items():
        share = mixing.as_leading(alpha, leaf)
        mixed[name] = share * leaf + (1 - share) * other[name]
    return mixed
