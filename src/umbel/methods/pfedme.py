"""pFedMe: clients descend the Moreau envelope of their loss, and serve the point at which it is attained.

T. Dinh, Tran, Nguyen 2020, "Personalized Federated Learning with Moreau Envelopes", Algorithm 1,
https://arxiv.org/abs/2006.08848

    F_k(w) = min_θ f_k(θ) + λ/2 ‖θ − w‖² ,   ∇F_k(w) = λ (w − θ_k(w))
    client k    from w_k = θ_k = w, for every batch:
                K times   θ_k ← θ_k − η' (∇f_k(θ_k) + λ (θ_k − w_k))
                once      w_k ← w_k − η λ (w_k − θ_k)
                w_k is sent, θ_k kept and served
    server      w ← (1 − β) w + β Σ_k n_k w_k / Σ_k n_k ,  β = server.lr

Only θ is ever run on data, so the running statistics of BatchNorm layers are the client's own. A client
that has not trained yet serves what its first round would give it (settling.py).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import Batch, ClientData
from umbel.methods.fedavg import FedAvg, Message, Shared, Upload
from umbel.methods.fedprox import check_spring, squared_distance
from umbel.methods.protocol import Population
from umbel.methods.settling import choose, settled
from umbel.model.loss import Loss
from umbel.ranges import check_ranges
from umbel.train import Groups, LocalTraining, count_step, local_train
from umbel.tree import Params, state


@state
class Private:
    params: Params  # θ
    stats: Params  # running statistics of BatchNorm layers
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@dataclass(frozen=True)
class PFedMe(FedAvg):
    local: LocalTraining = field(default_factory=lambda: LocalTraining(lr=0.005))  # η, of w
    strength: float = 15.0  # λ
    inner_lr: float = 0.05  # η', of θ
    inner_steps: int = 5  # K

    def __post_init__(self) -> None:
        check_ranges(self, strength="(0, inf)", inner_lr="(0, inf)", inner_steps="[1, inf)")
        check_spring("strength", self.strength, "local.lr", self.local.lr, self.local)
        check_spring("strength", self.strength, "inner_lr", self.inner_lr, LocalTraining())

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        shared, _ = super().init(module, population)
        private = Private(shared.params, shared.stats, torch.zeros(()))
        return Shared(shared.params, {}, shared.moments), tree.broadcast(private, 1)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        def envelope(groups: Groups, batch: Batch, _step: int) -> Tensor:
            value = self._inner(loss, groups, batch)
            return value + self.strength / 2 * squared_distance(groups["params"], groups["theta"])

        start = {"params": message.params, "theta": message.params, "stats": private.stats}
        trained, mean_loss = local_train(envelope, start, data, self.local, {"params": self.local.lr})
        upload = Upload(trained["params"], {}, data.weight, mean_loss)
        return upload, Private(trained["theta"], trained["stats"], torch.ones_like(private.seen))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        return settled(self, loss, message, private, data)

    def personalize(self, message: Message, private: Private) -> Params:
        theta: Params = choose(private.seen > 0, private.params, message.params)  # θ starts at w
        return theta | private.stats

    def _inner(self, loss: Loss, groups: Groups, batch: Batch) -> Tensor:
        """Moves θ, in place, and gives f_k there, before the last of its steps."""
        theta = groups["theta"]
        for _ in range(self.inner_steps):
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in theta.items()}
            value = loss(leaves | groups["stats"], batch)
            grads = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
            count_step()
            with torch.no_grad():
                for (name, leaf), grad in zip(theta.items(), grads, strict=True):
                    step = grad + self.strength * (leaf - groups["params"][name])
                    moved = leaf - self.inner_lr * step
                    # A client without a batch keeps its θ.
                    here = True if batch.active is None else mixing.as_leading(batch.active, leaf)
                    leaf.copy_(torch.where(torch.as_tensor(here, device=leaf.device), moved, leaf))
        return value.detach()
