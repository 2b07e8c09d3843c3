"""FedAvg: one model for all (McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629).

    client    w_k ← local SGD on f_k from w
    server    w ← w + η (Σ_k n_k w_k / Σ_k n_k − w)

The running statistics of BatchNorm layers are averaged like everything else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods.protocol import Population, nothing_mixed
from umbel.model.loss import Loss, running_stats
from umbel.train import LocalSGD, sgd
from umbel.tree import Params, state


@state
class Shared:
    params: Params
    stats: Params  # running statistics of BatchNorm layers


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
    num_examples: Tensor  # (K,)
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class FedAvg:
    local: LocalSGD = field(default_factory=LocalSGD)
    server_lr: float = 1.0  # η

    def __post_init__(self) -> None:
        if self.server_lr <= 0:
            raise RecipeError(f"fedavg: server_lr must be positive, got {self.server_lr}")

    def adapt(self, module: nn.Module) -> nn.Module:
        return module

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        return Shared(params, stats), Private()

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return tree.broadcast(Message(shared.params, shared.stats), len(clients))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, mean_loss = sgd(
            lambda groups, batch, _step: loss(groups["params"] | groups["stats"], batch),
            {"params": message.params, "stats": message.stats},
            data,
            self.local,
            lr={"params": self.local.lr},
        )
        return Upload(trained["params"], trained["stats"], data.num_examples, mean_loss), private

    def contribution(self, upload: Upload) -> dict[str, Any]:
        values = upload.params | upload.stats
        return {
            "values": mixing.weighted_sum(upload.num_examples, values),
            "weight": upload.num_examples.sum(),
        }

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        sums = mixing.total(self.contribution(upload) for upload in uploads)
        mean = mixing.mean(sums["values"], sums["weight"])
        params = mixing.step_to(shared.params, {n: mean[n] for n in shared.params}, self.server_lr)
        return Shared(params, {n: mean[n] for n in shared.stats})

    def personalize(self, message: Message, private: Private) -> Params:
        return message.params | message.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(next(iter(message.params.values()))))
