"""Ensemble: C whole models, their outputs mixed by a private router (the rival in Almansoori et al. 2025).

    output of client k    Σ_c π_kc f(x; w_c)
    client                SGD on f_k in all w_c (and θ_k) at once
    server                w_c ← w_c + g_c (Σ_k n_k π_kc w_kc / Σ_k n_k π_kc − w_c) ,  g_c as in FLoRAL

The C models start apart: the first is the given module, the others are its class's own initialization
drawn anew. Outputs are mixed, not weights: with logits this is neither a mixture of losses nor FLoRAL's
mixture of weights.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.clients import ClientData
from umbel.methods.protocol import Population, Refusals
from umbel.methods.routing import (
    LabelLosses,
    Measured,
    Router,
    Routes,
    Told,
    losses_of,
    moved_share,
    route_sums,
)
from umbel.methods.server import Moments, ServerOptimizer
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.model.stacked import takes_client_axis
from umbel.ranges import check_ranges
from umbel.seeds import seeded
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state


class Mixture(nn.Module):
    """Σ_c probs_c · models_c(x)."""

    client_axis = ("probs",)  # model/stacked.py

    def __init__(self, module: nn.Module, num_models: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(deepcopy(module) for _ in range(num_models))
        self.probs = nn.Parameter(torch.full((num_models,), 1 / num_models))

    @property
    def rows_apart(self) -> bool:
        """Whether K clients' rows may be those of one batch, with `probs` (K, C)."""
        return bool(takes_client_axis(self.models[0]))

    def forward(self, x: Tensor) -> Tensor:
        each = [model(x) for model in self.models]
        mixed: Tensor = sum(p * answer for p, answer in zip(self.shares(each[0]), each, strict=True))
        return mixed

    def shares(self, answers: Tensor) -> tuple[Tensor, ...]:
        """What each of the models counts in every row of its answers (rows, …)."""
        if self.probs.dim() == 1:
            return self.probs.unbind()
        rows = self.probs.repeat_interleave(len(answers) // len(self.probs), 0)
        return rows.view(*rows.shape, *[1] * (answers.dim() - 1)).unbind(1)


@state
class Shared:
    models: Params  # leading axis C
    stats: Params  # leading axis C; running statistics of BatchNorm layers
    moments: Moments
    routes: Routes


@state
class Message:
    models: Params  # (K, C, …) with the running statistics
    told: Told


@state
class Private:
    logits: Tensor  # (K, C) θ


@state
class Upload:
    models: Params  # (K, C, …)
    weight: Tensor  # (K,) n
    route_examples: Tensor  # (K, C) n π
    measured: Measured  # what the router's sums need
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class Ensemble:
    num_models: int = 4  # C
    router: Router = field(default_factory=Router)
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    guard: float = 0.01  # τ of g_c = min(1, p_c / τ); 0: no guard
    near: float = 0.0  # models begin as the given one with so much noise, in deviations of a tensor; 0: drawn anew
    refuses: ClassVar[Refusals] = {}

    def __post_init__(self) -> None:
        check_ranges(self, num_models="[1, inf)", guard="[0, 1]", near="[0, inf)")

    def adapt(self, module: nn.Module) -> nn.Module:
        return Mixture(module, self.num_models)

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        stacked = drawn_apart(module, self.num_models, population.seed, self.near)
        routes = Routes.init(self.router.kind, self.num_models, population)
        stats = {name: stacked.pop(name) for name in running_stats(module)}
        return Shared(stacked, stats, self.server.init(stacked), routes), tree.broadcast(
            Private(torch.zeros(self.num_models)), 1
        )

    def send(self, shared: Shared, clients: Tensor) -> Message:
        models = tree.broadcast(shared.models | shared.stats, len(clients))
        return Message(models, shared.routes.tell(self.router, clients))

    def measure(self, loss: Loss, message: Message, data: ClientData) -> LabelLosses | None:
        """The losses that routes are found by; None where they are not."""
        return self._losses(loss, message, data) if self.router.kind == "em" else None

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        router = self.router
        logits, measured = router.start(
            message.told, private.logits, lambda: data.measured or self._losses(loss, message, data), data
        )
        noise = router.noise_at(
            data, self.num_models, data.num_steps(self.local.batch_size, self.local.epochs, self.local.steps)
        )

        def objective(groups: Groups, batch: Any, step: int) -> Tensor:
            theta = groups["router"]["logits"]
            probs = (theta if noise is None else theta + noise[:, step]).softmax(1)
            return loss(groups["models"] | groups["stats"] | {"probs": probs}, batch)

        # Each copy's tensors are leaves of their own: gradients need no slicing, and batched BatchNorm
        # writes into whole tensors but not through a view.
        stats = running_stats(loss.module)
        copies = named(message.models)
        trained, mean_loss = local_train(
            objective,
            {
                "models": {name: leaf for name, leaf in copies.items() if name not in stats},
                "stats": {name: leaf for name, leaf in copies.items() if name in stats},
                "router": {"logits": logits},
            },
            data,
            self.local,
            {"models": self.local.lr} | ({"router": router.lr} if router.kind == "gradient" else {}),
            plain=frozenset({"router"}),
        )
        logits = trained["router"]["logits"]
        weight = data.weight
        upload = Upload(
            stacked(trained["models"] | trained["stats"], message.models, self.num_models),
            weight,
            weight.unsqueeze(1) * logits.softmax(1),
            measured,
            mean_loss,
        )
        return upload, Private(logits)

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {
            "models": mixing.weighted_sum(upload.route_examples, upload.models),
            **route_sums(upload.weight, upload.route_examples, upload.measured),
        }

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        mean = mixing.mean(sums["models"], sums["route_examples"])
        share = moved_share(sums["route_examples"], sums["examples"], self.guard)
        models, moments = self.server.step(shared.models, mean, shared.moments, share)
        stats = mixing.step_to(shared.stats, mean, share)
        return Shared(models, stats, moments, shared.routes.after(self.router, sums))

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return replace(upload, models=change(upload.models, message.models, upload.route_examples))

    def absolute(self, shared: Shared, moved: dict[str, Any]) -> dict[str, Any]:
        received = shared.models | shared.stats
        return moved | {"models": mixing.restored(moved["models"], moved["route_examples"], received)}

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        """The routes to the models as they are now."""
        logits = self.router.settle(message.told, private.logits, lambda: self._losses(loss, message, data), data)
        return Private(logits)

    def personalize(self, message: Message, private: Private) -> Params:
        return named(message.models) | {"probs": self.mixture(message, private)}

    def mixture(self, message: Message, private: Private) -> Tensor:
        """(K, C) π: the client's own, or the oracle's."""
        return (message.told.oracle if self.router.kind == "oracle" else private.logits).softmax(1)

    def _losses(self, loss: Loss, message: Message, data: ClientData) -> LabelLosses:
        loss.module.eval()  # the whole of it: were only a copy put into this mode, training would not put it back
        one = replace(loss, module=loss.module.get_submodule("models.0"))
        models = {name: leaf[0] for name, leaf in message.models.items()}
        num_labels = max(1, message.told.frequency.shape[1])
        data = self.router.looked_at(data)
        return losses_of(one, models, data, num_labels, bounded=message.told.exploring)


def drawn_apart(module: nn.Module, num_models: int, seed: int, near: float = 0.0) -> Params:
    """C models, leading axis C, with their running statistics: the module, and others drawn as its layers draw.

    With `near` the others are the module with noise, of this share of each tensor's standard deviation.
    """
    models = [module]
    for c in range(1, num_models):
        another = deepcopy(module)
        with seeded(seed, "model", c), torch.no_grad():
            for leaf in another.parameters() if near else ():
                if leaf.requires_grad and leaf.numel() > 1:
                    leaf.add_(torch.randn_like(leaf), alpha=near * float(leaf.std()))
            for layer in another.modules() if not near else ():
                if isinstance(reset := getattr(layer, "reset_parameters", None), type(another.train)):
                    reset()
        models.append(another)
    tensors = [trained_params(model) | running_stats(model) for model in models]
    return {name: torch.stack([own[name].detach() for own in tensors]) for name in tensors[0]}


def named(models: Params) -> Params:
    """The tensors of `Mixture`'s C copies for K clients, by name, from models (K, C, …)."""
    return {f"models.{c}.{name}": own for name, leaf in models.items() for c, own in enumerate(leaf.unbind(1))}


def stacked(copies: Params, like: Params, num_models: int) -> Params:
    """The inverse of `named`: tensors (K, C, …) by `like`'s names."""
    return {name: torch.stack([copies[f"models.{c}.{name}"] for c in range(num_models)], 1) for name in like}
