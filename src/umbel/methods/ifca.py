"""IFCA: C models; a client trains the one that fits its data best (Ghosh et al. 2020, Algorithm 1).

An Efficient Framework for Clustered Federated Learning, https://arxiv.org/abs/2006.04088

    client    ĵ_k ← argmin_c f_k(w_c)                     on its training data, w_c as received
              w_k ← local SGD on f_k from w_ĵ
    server    w_c ← w_c + g_c (Σ_{k: ĵ_k = c} n_k w_k / Σ_{k: ĵ_k = c} n_k − w_c)
              model averaging       g_c = 1
              gradient averaging    g_c = p_c, the share of all examples whose clients chose c

The paper's gradient averaging divides the chosen gradients' sum by the number of all clients, which is the mean
over the cluster times p_c; here the gradient is what local SGD moved by. A model that nobody chose stays.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.methods.ensemble import drawn_apart
from umbel.methods.protocol import Population, Refusals
from umbel.methods.routing import LabelLosses, losses_of
from umbel.methods.server import Moments, ServerOptimizer
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats
from umbel.ranges import check_ranges
from umbel.train import LocalTraining, local_train
from umbel.tree import Params, state


@state
class Shared:
    models: Params  # leading axis C
    stats: Params  # leading axis C; running statistics of BatchNorm layers
    moments: Moments


@state
class Message:
    models: Params  # (K, C, …) with the running statistics


@state
class Private:
    choice: Tensor  # (K, C) one-hot ĵ; zeros before the client has chosen


@state
class Upload:
    model: Params  # (K, …) the chosen one, with its running statistics
    weight: Tensor  # (K,) n
    route_examples: Tensor  # (K, C) n where the client chose c, else 0
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class IFCA:
    num_models: int = 4  # C
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    averaging: Literal["model", "gradient"] = "model"
    near: float = 0.0  # models begin as the given one with so much noise, in deviations of a tensor; 0: drawn anew
    refuses: ClassVar[Refusals] = {}

    def __post_init__(self) -> None:
        check_ranges(self, num_models="[1, inf)", near="[0, inf)")

    def adapt(self, module: nn.Module) -> nn.Module:
        return module

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        models = drawn_apart(module, self.num_models, population.seed, self.near)
        stats = {name: models.pop(name) for name in running_stats(module)}
        return Shared(models, stats, self.server.init(models)), Private(torch.zeros(1, self.num_models))

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return Message(tree.broadcast(shared.models | shared.stats, len(clients)))

    def measure(self, loss: Loss, message: Message, data: ClientData) -> LabelLosses:
        """The losses that models are chosen by."""
        return losses_of(loss, {name: leaf[0] for name, leaf in message.models.items()}, data)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        private = self.settle(loss, message, private, data)
        chosen, stats = self.personalize(message, private), running_stats(loss.module)
        trained, mean_loss = local_train(
            lambda groups, batch, _step: loss(groups["model"] | groups["stats"], batch),
            {
                "model": {name: leaf for name, leaf in chosen.items() if name not in stats},
                "stats": {name: leaf for name, leaf in chosen.items() if name in stats},
            },
            data,
            self.local,
            {"model": self.local.lr},
        )
        weight = data.weight
        route_examples = weight.unsqueeze(1) * private.choice
        return Upload(trained["model"] | trained["stats"], weight, route_examples, mean_loss), private

    def contribution(self, upload: Upload) -> dict[str, Any]:
        routed = upload.route_examples
        return {
            "models": {n: _summed(routed, leaf) for n, leaf in upload.model.items()},
            "route_examples": routed.sum(0),
            "examples": upload.weight.sum(),
        }

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        mean = mixing.mean(sums["models"], sums["route_examples"])
        share = sums["route_examples"] / sums["examples"]
        step = share if self.averaging == "gradient" else (share > 0).to(share.dtype)
        models, moments = self.server.step(shared.models, mean, shared.moments, step)
        return Shared(models, mixing.step_to(shared.stats, mean, step), moments)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        # A client has trained one of the C, whatever it claims, and counts nothing in the others.
        chosen = upload.route_examples.argmax(1)
        routed = F.one_hot(chosen, self.num_models) * upload.weight.unsqueeze(1)
        models = {n: leaf.unsqueeze(1).expand_as(message.models[n]) for n, leaf in upload.model.items()}
        models = change(models, message.models, routed)
        place = torch.arange(len(chosen), device=chosen.device)
        model = {name: leaf[place, chosen] for name, leaf in models.items()}
        return replace(upload, model=model, route_examples=routed)

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        """The choice among the models as they are now."""
        losses = (data.measured or self.measure(loss, message, data)).mean
        losses = losses.nan_to_num(nan=torch.inf)  # a model that overflows is nobody's
        return Private(F.one_hot(losses.argmin(1), self.num_models).to(private.choice.dtype))

    def personalize(self, message: Message, private: Private) -> Params:
        chosen = private.choice.argmax(1)
        return {name: leaf[torch.arange(len(leaf)), chosen] for name, leaf in message.models.items()}

    def mixture(self, message: Message, private: Private) -> Tensor:
        return private.choice


def _summed(routed: Tensor, leaf: Tensor) -> Tensor:
    """(C, …) Σ_k n_kc x_k for x (K, …); half precision has too few digits for a sum over clients."""
    dtype = tree.wide(leaf.dtype)
    summed: Tensor = torch.tensordot(routed.T.to(dtype), leaf.to(dtype), 1)
    return summed
