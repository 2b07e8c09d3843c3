"""FLoRAL: a shared base, C federated adapters, a private router for each client.

Almansoori, Horváth, Takáč 2025, Algorithm 1, https://arxiv.org/abs/2410.03497

    model of client k     u + Σ_c π_kc a_c ,   π_k = softmax θ_k
    client                SGD on f_k in u, all a_c (and θ_k) at once, from the server's u and a_c
    sent                  u_k, a_kc, n_k, n_k π_kc and, for the em router, how far apart its losses are
    kept                  θ_k, the running statistics of BatchNorm layers
    server                u   ← Σ_k n_k u_k / Σ_k n_k
                          a_c ← a_c + g_c (Σ_k n_k π_kc a_kc / Σ_k n_k π_kc − a_c)
                          g_c = min(1, p_c / τ) ,  p_c = Σ_k n_k π_kc / Σ_k n_k

Factors are averaged, not products. The guard g_c is ours: without it an adapter that nobody uses is
overwritten by clients it was not made for. All of the server's work is sums over clients.
Departures and options: docs/methods.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, mix, with_paths
from umbel.adapters.precondition import precondition
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods.protocol import Population
from umbel.methods.routing import Router, Routes, Told, losses_of, moved_share, route_sums
from umbel.model.loss import Loss, running_stats
from umbel.seeds import generator
from umbel.train import Groups, LocalSGD, sgd
from umbel.tree import Params, state


@state
class Shared:
    base: Params
    adapters: Params  # leading axis C
    stats: Params  # running statistics, used only if they are federated
    velocity: Params  # of base and adapters, only with server momentum
    routes: Routes
    bank: Bank


@state
class Message:
    base: Params
    adapters: Params  # (K, C, …)
    stats: Params
    told: Told
    bank: Bank


@state
class Private:
    logits: Tensor  # (K, C) θ
    stats: Params  # running statistics, if they are private


@state
class Upload:
    base: Params
    adapters: Params  # (K, C, …)
    stats: Params
    num_examples: Tensor  # (K,) n
    route_examples: Tensor  # (K, C) n π
    spread: Tensor  # (K,) how far apart the adapters' losses are, times n; see routing.py
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class FLoRAL:
    num_adapters: int = 4  # C
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    router: Router = field(default_factory=Router)
    local: LocalSGD = field(default_factory=LocalSGD)
    adapter_lr: float = 1.0  # times local.lr
    init_std: float = 0.1  # of B at the start; 0 is LoRA's own, at which no router can tell adapters apart
    precondition: bool = False
    server_momentum: float = 0.0  # 0: Algorithm 1
    guard: float = 0.01  # τ, the share of examples below which an adapter moves less; 0: no guard
    batch_stats: Literal["private", "federated"] = "private"

    def __post_init__(self) -> None:
        if self.num_adapters < 1:
            raise RecipeError(
                f"floral: num_adapters = {self.num_adapters}, but there must be at least one adapter"
            )
        if not 0 <= self.server_momentum < 1:
            raise RecipeError(f"floral: server_momentum must be in [0, 1), got {self.server_momentum}")
        if self.adapter_lr <= 0 or self.init_std < 0 or not 0 <= self.guard <= 1:
            raise RecipeError("floral: adapter_lr must be positive, init_std not negative and guard in [0, 1]")

    def bank(self, module: nn.Module) -> Bank:
        return self.adapter.bank(module, self.local.batch_size)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
        dtype = next(iter(base.values())).dtype
        drawn = bank.init(self.num_adapters, generator(population.seed, "adapters"), self.init_std)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        routes = Routes.init(self.router.kind, self.num_adapters, population.num_clients, population.group)
        adapters = {name: leaf.to(dtype) for name, leaf in drawn.items()}
        moving = {"base": base, "adapters": adapters} if self.server_momentum else {}
        velocity = tree.map_tensors(
            torch.zeros_like, {f"{g}/{n}": leaf for g, p in moving.items() for n, leaf in p.items()}
        )
        shared = Shared(base, adapters, stats, velocity, routes, bank)
        kept = stats if self.batch_stats == "private" else {}
        return shared, tree.broadcast(Private(torch.zeros(self.num_adapters), kept), 1)

    def send(self, shared: Shared, clients: Tensor) -> Message:
        base, adapters, stats = (
            tree.broadcast(tensors, len(clients)) for tensors in (shared.base, shared.adapters, shared.stats)
        )
        return Message(base, adapters, stats, shared.routes.tell(self.router, clients), shared.bank)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        bank, router = message.bank, self.router
        stats = message.stats | private.stats
        logits, spread = router.start(
            message.told, private.logits, lambda: losses_of(loss, each_alone(message), data, stats), data
        )
        noise = router.noise_at(data, self.num_adapters, data.num_steps(self.local.batch_size, self.local.epochs))

        def objective(groups: Groups, batch: Any, step: int) -> Tensor:
            theta = groups["router"]["logits"]
            probs = (theta if noise is None else theta + noise[:, step]).softmax(1)
            return loss(mix(bank, groups["base"], groups["adapters"], probs) | groups["stats"], batch)

        lr = {"base": self.local.lr, "adapters": self.local.lr * self.adapter_lr}
        trained, mean_loss = sgd(
            objective,
            {
                "base": message.base,
                "adapters": message.adapters,
                "stats": stats,
                "router": {"logits": logits},
            },
            data,
            self.local,
            lr | ({"router": router.lr} if router.kind == "gradient" else {}),
            self._precondition(bank) if self.precondition else None,
            plain=frozenset({"router"}),
        )
        logits = trained["router"]["logits"]
        num_examples = data.num_examples
        upload = Upload(
            trained["base"],
            trained["adapters"],
            {} if self.batch_stats == "private" else trained["stats"],
            num_examples,
            num_examples.unsqueeze(1) * logits.softmax(1),
            spread,
            mean_loss,
        )
        return upload, Private(logits, trained["stats"] if self.batch_stats == "private" else {})

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {
            "base": mixing.weighted_sum(upload.num_examples, upload.base | upload.stats),
            "adapters": mixing.weighted_sum(upload.route_examples, upload.adapters),
            **route_sums(upload.num_examples, upload.route_examples, upload.spread),
        }

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        sums = mixing.total(self.contribution(upload) for upload in uploads)
        mean = mixing.mean(sums["base"], sums["examples"])
        adapters = mixing.mean(sums["adapters"], sums["route_examples"])
        step = moved_share(sums, self.guard)
        shared = replace(shared, routes=shared.routes.after(self.router, sums))
        if self.server_momentum:
            return self._with_momentum(shared, mean, adapters, step)
        return replace(
            shared,
            base={name: mean[name] for name in shared.base},
            adapters=mixing.step_to(shared.adapters, adapters, step),
            stats={name: mean.get(name, leaf) for name, leaf in shared.stats.items()},
        )

    def _with_momentum(self, shared: Shared, mean: Params, adapters: Params, step: Tensor) -> Shared:
        def part(group: str) -> Params:
            return {n.removeprefix(group): v for n, v in shared.velocity.items() if n.startswith(group)}

        decay = self.server_momentum
        base, base_velocity = mixing.momentum(shared.base, mean, part("base/"), decay, 1.0)
        moved, velocity = mixing.momentum(shared.adapters, adapters, part("adapters/"), decay, step)
        return replace(
            shared,
            base=base,
            adapters=moved,
            stats={name: mean.get(name, leaf) for name, leaf in shared.stats.items()},
            velocity={f"base/{n}": v for n, v in base_velocity.items()}
            | {f"adapters/{n}": v for n, v in velocity.items()},
        )

    def personalize(self, message: Message, private: Private) -> Params:
        probs = self.mixture(message, private)
        return mix(message.bank, message.base, message.adapters, probs) | message.stats | private.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        """(K, C) π: the client's own, or the oracle's."""
        return (message.told.oracle if self.router.kind == "oracle" else private.logits).softmax(1)

    def _precondition(self, bank: Bank) -> Any:
        def conditioned(groups: Groups, grads: Groups) -> Groups:
            return grads | {"adapters": precondition(bank, groups["adapters"], grads["adapters"])}

        return conditioned


def each_alone(message: Message) -> Params:
    """The C models that use one adapter and nothing else, leading axis C."""
    adapters = {name: leaf[0].unsqueeze(1) for name, leaf in message.adapters.items()}  # (C, 1, …)
    num_adapters = next(iter(adapters.values())).shape[0]
    base = {name: leaf[0].expand(num_adapters, *leaf.shape[1:]) for name, leaf in message.base.items()}
    return mix(message.bank, base, adapters, next(iter(base.values())).new_ones(num_adapters, 1))
