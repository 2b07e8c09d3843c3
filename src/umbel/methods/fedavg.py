"""FedAvg: one model for all (McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629).

    client    w_k ← local SGD on f_k from w
    server    w ← w + η (Σ_k n_k w_k / Σ_k n_k − w)

or another step of the server's towards that mean (server.py). The running statistics of BatchNorm layers
are averaged like everything else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.methods.protocol import Population, Refusals, nothing_mixed
from umbel.methods.server import Moments, ServerOptimizer
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.train import LocalTraining, Objective, local_train
from umbel.tree import Params, state


@state
class Shared:
    params: Params
    stats: Params  # running statistics of BatchNorm layers
    moments: Moments


@state
class Message:
    params: Params
    stats: Params


@state
class Private:
    """Nothing stays with the client."""


@state
class Upload:
    params: Params
    stats: Params
    weight: Tensor  # (K,) n
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class FedAvg:
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    refuses: ClassVar[Refusals] = {"steps": ""}

    def adapt(self, module: nn.Module) -> nn.Module:
        return module

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Any]:
        params = trained_params(module)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        return Shared(params, stats, self.server.init(params)), Private()

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return tree.broadcast(Message(shared.params, shared.stats), len(clients))

    def objective(self, loss: Loss, message: Message) -> Objective:
        """What a client minimizes: its loss."""
        return lambda groups, batch, _step: loss(groups["params"] | groups["stats"], batch)

    def client_update(self, loss: Loss, message: Message, private: Any, data: ClientData) -> tuple[Upload, Any]:
        start = {"params": message.params, "stats": message.stats}
        lr = {"params": self.local.lr}
        trained, mean_loss = local_train(self.objective(loss, message), start, data, self.local, lr)
        return Upload(trained["params"], trained["stats"], data.weight, mean_loss), private

    def contribution(self, upload: Upload) -> dict[str, Any]:
        values = upload.params | upload.stats
        return {"values": mixing.weighted_sum(upload.weight, values), "weight": upload.weight.sum()}

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        mean = mixing.mean(sums["values"], sums["weight"])
        params, moments = self.server.step(shared.params, mean, shared.moments)
        return Shared(params, {n: mean[n].to(leaf.dtype) for n, leaf in shared.stats.items()}, moments)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return replace(
            upload,
            params=change(upload.params, message.params, upload.weight),
            stats=change(upload.stats, message.stats, upload.weight),
        )

    def absolute(self, shared: Shared, moved: dict[str, Any]) -> dict[str, Any]:
        received = shared.params | shared.stats
        return moved | {"values": mixing.restored(moved["values"], moved["weight"], received)}

    def settle(self, loss: Loss, message: Message, private: Any, data: ClientData) -> Any:
        return private

    def personalize(self, message: Message, private: Any) -> Params:
        return message.params | message.stats

    def mixture(self, message: Message, private: Any) -> Tensor:
        return nothing_mixed(len(next(iter(message.params.values()))))
