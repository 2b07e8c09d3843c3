"""FedEM: C component models; every example is shared out among them (Marfoq et al. 2021, Algorithm 1).

Federated Multi-Task Learning under a Mixture of Distributions, https://arxiv.org/abs/2108.10252

    model of client k     Σ_c π_kc h_c(x), a mixture of what the components predict
    E-step                q_s(c) ∝ π_kc exp(−ℓ(h_c(x_s), y_s)) for each training example s, h_c as received
                          π_kc ← (1 / n_k) Σ_s q_s(c)
    M-step                w_kc ← local SGD on (1 / n_k) Σ_s q_s(c) ℓ(h_c(x_s), y_s) from w_c, every c
    server                w_c ← w_c + η (Σ_k n_k w_kc / Σ_k n_k − w_c)

π_k is kept and never sent. What is mixed are probabilities; the model answers their logarithm, which is as good
as logits. With `mixes = "outputs"` the outputs themselves are mixed, as squared error wants it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import Batch, ClientData
from umbel.errors import RecipeError
from umbel.methods.ensemble import Mixture, drawn_apart, named, stacked
from umbel.methods.protocol import Population, Refusals
from umbel.methods.server import Moments, ServerOptimizer
from umbel.mixing import Change
from umbel.model.loss import FORWARD_EXAMPLES, Loss, running_stats
from umbel.ranges import check_ranges
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state

SETTLING = 10  # E-steps with which a client finds its π for serving; all of them read the same losses


class ProbabilityMixture(Mixture):
    """log Σ_c probs_c · softmax(models_c(x))."""

    def forward(self, x: Tensor) -> Tensor:
        each = [model(x).log_softmax(-1) for model in self.models]
        shares = self.shares(each[0])
        return torch.stack([log + p.log() for log, p in zip(each, shares, strict=True)]).logsumexp(0)


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
    probs: Tensor  # (K, C) π


@state
class Upload:
    models: Params  # (K, C, …)
    weight: Tensor  # (K,) n
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class FedEM:
    num_models: int = 4  # C
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    mixes: Literal["probabilities", "outputs"] = "probabilities"
    near: float = 0.0  # models begin as the given one with so much noise, in deviations of a tensor; 0: drawn anew
    refuses: ClassVar[Refusals] = {
        "own_labels": "what it serves is a mixture of its components' probabilities of all labels"
    }

    def __post_init__(self) -> None:
        check_ranges(self, num_models="[1, inf)", near="[0, inf)")

    def adapt(self, module: nn.Module) -> nn.Module:
        return (ProbabilityMixture if self.mixes == "probabilities" else Mixture)(module, self.num_models)

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        models = drawn_apart(module, self.num_models, population.seed, self.near)
        stats = {name: models.pop(name) for name in running_stats(module)}
        even = torch.full((1, self.num_models), 1 / self.num_models)
        return Shared(models, stats, self.server.init(models)), Private(even)

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return Message(tree.broadcast(shared.models | shared.stats, len(clients)))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        losses = self._losses(loss, message, data)
        q = (private.probs.log().unsqueeze(1) - losses).softmax(2)  # (K, n, C)
        first = torch.as_tensor(data.examples.start[data.clients], device=q.device).unsqueeze(1)
        loss.module.train()  # the whole of it: were only a copy put into this mode, nobody would put it back
        one = replace(loss, module=loss.module.get_submodule("models.0"))

        def objective(groups: Groups, batch: Batch, _step: int) -> Tensor:
            own = groups["models"] | groups["stats"]
            models = [{n: own[f"models.{c}.{n}"] for n in message.models} for c in range(self.num_models)]
            outputs = (one.outputs(model, batch.x, True, batch.key) for model in models)
            values = torch.stack([one.per_example(answers, batch.y) for answers in outputs], 2)
            return batch.mean((q.take_along_dim((batch.rows - first).unsqueeze(2), 1) * values).sum(2))

        stats, copies = running_stats(loss.module), named(message.models)
        trained, mean_loss = local_train(
            objective,
            {
                "models": {name: leaf for name, leaf in copies.items() if name not in stats},
                "stats": {name: leaf for name, leaf in copies.items() if name in stats},
            },
            data,
            self.local,
            {"models": self.local.lr},
        )
        models = stacked(trained["models"] | trained["stats"], message.models, self.num_models)
        return Upload(models, data.weight, mean_loss), Private(fitted(private.probs, losses, data, 1))

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {"models": mixing.weighted_sum(upload.weight, upload.models), "weight": upload.weight.sum()}

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        mean = mixing.mean(sums["models"], sums["weight"])
        models, moments = self.server.step(shared.models, {n: mean[n] for n in shared.models}, shared.moments)
        return Shared(models, {n: mean[n] for n in shared.stats}, moments)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        weight = upload.weight.unsqueeze(1).expand(-1, self.num_models)  # every component counts n_k
        return replace(upload, models=change(upload.models, message.models, weight))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        """π for the components as they are now."""
        return Private(fitted(private.probs, self._losses(loss, message, data), data, SETTLING))

    def personalize(self, message: Message, private: Private) -> Params:
        return named(message.models) | {"probs": private.probs}

    def mixture(self, message: Message, private: Private) -> Tensor:
        return private.probs

    def _losses(self, loss: Loss, message: Message, data: ClientData) -> Tensor:
        """(K, n, C) ℓ(h_c(x_s), y_s) of each client's examples as stored, padded to the largest n."""
        if self.mixes == "probabilities" and loss.name != "cross_entropy":
            raise RecipeError("fedem: these outputs are no logits; set mixes = 'outputs'")
        loss.module.eval()
        one = replace(loss, module=loss.module.get_submodule("models.0"))
        found = []
        with torch.no_grad():
            for batch in data.in_order(data.fitting(FORWARD_EXAMPLES)):
                each = (
                    one.outputs({n: leaf[:, c] for n, leaf in message.models.items()}, batch.x)
                    for c in range(self.num_models)
                )
                found.append(torch.stack([one.per_example(outputs, batch.y) for outputs in each], 2))
        return torch.cat(found, 1)


def fitted(probs: Tensor, losses: Tensor, data: ClientData, steps: int) -> Tensor:
    """(K, C) π after so many E-steps on the same losses (K, n, C): the mean of q over a client's examples."""
    count = data.num_examples.unsqueeze(1)
    real = (torch.arange(losses.shape[1], device=losses.device) < count).unsqueeze(2)
    for _ in range(steps):
        q = (probs.log().unsqueeze(1) - losses).softmax(2)
        probs = ((q * real).sum(1) / count).to(probs.dtype)
    return probs
