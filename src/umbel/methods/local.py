"""Local: every client trains alone; nothing travels. The floor that collaboration has to beat."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from umbel import tree
from umbel.clients import ClientData
from umbel.methods.protocol import Population, Refusals, nothing_mixed
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.train import LocalTraining, local_train
from umbel.tree import Params, state


@state
class Shared:
    """The server holds nothing."""


@state
class Message:
    """And sends nothing."""


@state
class Private:
    params: Params
    stats: Params  # running statistics of BatchNorm layers


@state
class Upload:
    loss: Tensor  # (K,) reported for the progress bar, used for nothing


@dataclass(frozen=True)
class Local:
    local: LocalTraining = field(default_factory=LocalTraining)
    refuses: ClassVar[Refusals] = {
        "sum": "its clients train alone and send nothing that could be added up",
        "mean": "its clients send nothing that could meet",
    }

    def adapt(self, module: nn.Module) -> nn.Module:
        return module

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        params = trained_params(module)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        return Shared(), tree.broadcast(Private(params, stats), 1)

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return Message()

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, mean_loss = local_train(
            lambda groups, batch, _step: loss(groups["params"] | groups["stats"], batch),
            {"params": private.params, "stats": private.stats},
            data,
            self.local,
            lr={"params": self.local.lr},
        )
        return Upload(mean_loss), Private(trained["params"], trained["stats"])

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {}

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        for _ in uploads:  # the clients' work is done as their uploads are read
            pass
        return shared

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return upload

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        return private

    def personalize(self, message: Message, private: Private) -> Params:
        return private.params | private.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return nothing_mixed(len(next(iter(private.params.values()))))
