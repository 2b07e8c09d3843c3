"""FLoRAL: a shared base, C federated adapters, a private router for each client.

Almansoori, Horváth, Takáč 2025, Algorithm 1, https://arxiv.org/abs/2410.03497

    model of client k     u + Σ_c π_kc a_c ,   π_k = softmax θ_k
    client                SGD on f_k in u, all a_c (and θ_k) at once, from the server's u and a_c
    sent                  u_k, a_kc, n_k, n_k π_kc and, for the em router, sums of losses (routing.py)
    kept                  θ_k, the running statistics of BatchNorm layers, tensors of u named by `personal`
    server                u   ← Σ_k n_k u_k / Σ_k n_k
                          a_c ← a_c + g_c (Σ_k n_k π_kc a_kc / Σ_k n_k π_kc − a_c)
                          g_c = min(1, p_c / τ) ,  p_c = Σ_k n_k π_kc / Σ_k n_k

The guard g_c is ours: without it an adapter that nobody uses is overwritten by clients it was not made
for. All of the server's work is sums over clients. Beyond the paper, each an option: how factors are
averaged (adapters/averaging.py), a frozen base, ranks that differ from client to client, a router for
every layer, uploads of the heaviest adapters only, spare adapters pruned, dead ones started anew, and routes
explored with more ranks than are kept.
Departures and options: docs/methods.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, mix, with_paths
from umbel.adapters.averaging import (
    Averaging,
    adapter_sums,
    averaged,
    by_products,
    by_rank,
    factor_error,
    narrowed,
    nearest,
    remainder_of,
    truncated,
    widened,
)
from umbel.adapters.places import among, kept_only, picked, placed, spread_out
from umbel.adapters.precondition import precondition
from umbel.adapters.products import products
from umbel.clients import ClientData
from umbel.errors import ModelError, RecipeError
from umbel.methods import lora
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
from umbel.methods.settling import settled
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state


@state
class Shared:
    base: Params
    adapters: Params  # leading axis C
    remainder: Params  # leading axis C; what factors miss, only with averaging = "delta"
    stats: Params  # running statistics, used only if they are federated
    moments: dict[str, Moments]  # of base and adapters
    routes: Routes
    alive: Tensor  # (C',) int64, the adapters that are not pruned
    seed: Tensor  # () int64, of the run
    figures: dict[str, Tensor]  # what the server can say of its last round
    bank: Bank
    thin: Bank  # of `adapter.rank`, where routes are explored with more


@state
class Message:
    base: Params
    adapters: Params  # (K, C', …), those alive
    remainder: Params
    stats: Params  # running statistics, if they are federated
    told: Told
    alive: Tensor  # (K, C') int64
    rank_share: Tensor  # (K,) of each adapter's rank that the client has, or (K, 0)
    bank: Bank


@state
class Private:
    logits: Tensor  # (K, C) θ, or (K, L, C) with a router for each of L layers
    stats: Params  # running statistics, if they are private
    own: Params  # `personal` tensors of the base
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@state
class Upload:
    base: Params
    adapters: Params  # (K, C'', …), those sent
    sent: Tensor  # (K, C'') int64, which they are
    stats: Params
    weight: Tensor  # (K,) n
    route_examples: Tensor  # (K, C) n π, or (K, L, C); 0 for what is not sent
    rank_share: Tensor  # (K,), or (K, 0)
    measured: Measured  # what the router's sums need
    loss: Tensor  # (K,)
    bank: Bank


@dataclass(frozen=True)
class FLoRAL:
    num_adapters: int = 4  # C
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    router: Router = field(default_factory=Router)
    local: LocalTraining = field(default_factory=LocalTraining)
    adapter_lr: float = 1.0  # times local.lr
    init_std: float = -1.0  # of s B at the start, times √rank; −1: 0.3, or 0.1 with adapter.peft
    init_ranks: int = 0  # ranks of B that begin with that deviation, as large together; the others are 0. 0: all
    bias_start: float = 0.0  # extra biases begin at random, this wide; in the published code 1
    precondition: bool = False
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    guard: float = 0.01  # τ, the share of examples below which an adapter moves less; 0: no guard
    adapter_step: float = 1.0  # how far the server takes adapters towards their mean; published code: local.lr
    least_prob: float = 0.0  # what each adapter counts in a model at least; in the published code 0.01
    batch_stats: Literal["private", "federated"] = "private"
    freeze_base: bool = False  # the base stays as it is and does not travel: only the adapters do
    averaging: Averaging = "factor"
    report_error: bool = False  # measures what averaging factors gets wrong, as "averaging_error"
    ranks: tuple[float, ...] = ()  # client k trains the share ranks[k mod len] of each adapter's rank
    layer_routers: bool = False  # θ for every adapted layer; with router.kind = "gradient"
    send_top: int = 0  # how many adapters a client uploads, the heaviest; 0: all
    prune_below: float = 0.0  # once routes have settled, adapters with a smaller share of examples are dropped
    restart_below: float = 0.25  # of an even share: adapters with less start anew while em explores; 0: never
    explore_rank: int | float = (
        0  # of adapters while routes are explored, then cut to adapter.rank; 0: that all along
    )
    personal: tuple[str, ...] = ()  # patterns of trained tensors that stay with the client: "*classifier.*"

    def __post_init__(self) -> None:
        check_ranges(self, num_adapters="[1, inf)", adapter_lr="(0, inf)", guard="[0, 1]")
        check_ranges(self, init_ranks="[0, inf)", adapter_step="(0, 1]", least_prob="[0, 1)")
        check_ranges(self, bias_start="[0, inf)", ranks="(0, 1]", send_top="[0, inf)")
        check_ranges(self, prune_below="[0, 1)", restart_below="[0, 1)", explore_rank="[0, inf)")
        if self.init_std < 0 and self.init_std != -1:
            raise RecipeError(f"init_std = {self.init_std}, but it must be at least 0, or −1 for the layer's own")
        if self.prune_below and (self.router.kind == "oracle" or not 0 < self.router.explore < 0.5):
            raise RecipeError(
                "floral: prune_below needs learned routes and router.explore above 0 and below 0.5: routes are "
                "settled, and adapters pruned, after twice that share of the run"
            )
        if self.explore_rank and (self.adapter.peft or self.ranks or not 0 < self.router.explore < 1):
            raise RecipeError(
                "floral: explore_rank goes with adapter.rank, without adapter.peft and ranks, and needs "
                "router.explore above 0 and below 1, the share of the run in which adapters have that rank"
            )
        if self.explore_rank >= 1 and self.explore_rank != int(self.explore_rank):
            raise RecipeError(
                f"floral: explore_rank = {self.explore_rank}: give a whole rank, or a budget between 0 and 1"
            )
        if self.layer_routers and self.router.kind != "gradient":
            raise RecipeError(
                "floral: layer_routers needs router.kind = 'gradient': losses tell adapters apart, not layers"
            )
        if self.averaging == "delta" and self.adapter.peft:
            raise RecipeError(
                "floral: averaging = 'delta' adds to the weights themselves, which adapter.peft leaves alone; "
                "take 'product'"
            )
        if self.averaging != "factor" and self.server.kind != "sgd":
            raise RecipeError(
                f"floral: averaging = '{self.averaging}' goes with server.kind = 'sgd' only: '{self.server.kind}' "
                "remembers how factors moved, and these turn from round to round"
            )
        if (self.averaging != "factor" or self.report_error) and (self.ranks or self.layer_routers):
            raise RecipeError(
                "floral: ranks and layer_routers go with averaging = 'factor' only, and without report_error"
            )

    def bank(self, module: nn.Module) -> Bank:
        dense = self.averaging == "delta"  # a remainder is added to the weight itself
        plan = replace(self.adapter, realization="merged") if dense else self.adapter
        plan = replace(plan, rank=self.explore_rank) if self.explore_rank else plan
        try:
            bank = plan.bank(module, self.local.batch_size, self.freeze_base, self.personal)
        except ModelError as error:
            raise ModelError(f"floral, with explore_rank: {error}" if self.explore_rank else str(error)) from None
        return replace(bank, b_ranks=self.init_ranks, bias_start=self.bias_start)

    def thin(self, module: nn.Module, bank: Bank) -> Bank:
        """The bank with the ranks of `adapter.rank`, which adapters have once routes have been explored.

        Raises:
            RecipeError: these are more.
        """
        if not self.explore_rank:
            return bank
        later = replace(self, explore_rank=0).bank(module)
        parts = [replace(part, rank=own.rank) for part, own in zip(bank.low_rank, later.low_rank, strict=True)]
        for part, own in zip(bank.low_rank, parts, strict=True):
            if own.rank > part.rank:
                raise RecipeError(
                    f"floral: explore_rank = {self.explore_rank} gives {part.name} a rank of {part.rank}, less "
                    f"than the {own.rank} of adapter.rank = {self.adapter.rank}; raise it"
                )
        return replace(bank, low_rank=tuple(parts))

    def b_std(self, bank: Bank) -> float:
        """Of s B at the start, times √rank: less with PEFT, for a large one spoils a pretrained model."""
        return self.init_std if self.init_std >= 0 else (0.1 if bank.peft else 0.3)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, own = lora.parted(module, self.freeze_base, self.personal)
        dtype = bank.dtype(module)
        drawn = bank.init(self.num_adapters, generator(population.seed, "adapters"), self.b_std(bank))
        adapters = {name: leaf.to(dtype) for name, leaf in drawn.items()}
        remainder = {}
        if self.averaging == "delta":
            shapes = {part.name: (self.num_adapters, *part.shape) for part in bank.low_rank}
            remainder = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        shared = Shared(
            base,
            adapters,
            remainder,
            stats,
            {"base": self.server.init(base), "adapters": self.server.init(adapters)},
            Routes.init(self.router.kind, self.num_adapters, population),
            torch.arange(self.num_adapters),
            torch.tensor(population.seed),
            {"averaging_error": torch.zeros(())} if self.report_error else {},
            bank,
            self.thin(module, bank),
        )
        logits = (
            torch.zeros(len(bank.layers), self.num_adapters)
            if self.layer_routers
            else torch.zeros(self.num_adapters)
        )
        return shared, tree.broadcast(
            Private(logits, stats if self.batch_stats == "private" else {}, own, torch.zeros(())), 1
        )

    def send(self, shared: Shared, clients: Tensor) -> Message:
        def to_all(tensors: Any) -> Any:
            return tree.broadcast(tensors, len(clients))

        bank = self._bank(shared)
        adapters, remainder = (
            {n: leaf[shared.alive] for n, leaf in p.items()}
            for p in (narrowed(bank, shared.adapters), shared.remainder)
        )
        adapters, rank_share = to_all(adapters), clients.new_empty(len(clients), 0)
        if self.ranks:
            rank_share = torch.tensor(self.ranks, device=clients.device)[clients % len(self.ranks)]
            adapters = truncated(bank, adapters, rank_share)
        told = shared.routes.tell(self.router, clients)
        return Message(
            to_all(shared.base),
            adapters,
            to_all(remainder),
            to_all(shared.stats) if self.batch_stats == "federated" else {},
            told,
            to_all(shared.alive),
            rank_share,
            bank,
        )

    def only(self, shared: Shared, adapter: int) -> Params:
        """The model, leading axis 1, that uses this one of the C adapters, of whole rank, and no other.

        Raises:
            RecipeError: there is no such adapter, or no longer, or each client has tensors of its own beside it.
        """
        lora.check_whole(self.personal)
        alive = shared.alive.tolist()
        if adapter not in alive:
            raise RecipeError(f"adapter {adapter}: the run has the adapters {', '.join(map(str, alive))}")
        message = replace(self, ranks=()).send(
            shared, torch.zeros(1, dtype=torch.long, device=shared.alive.device)
        )
        place = alive.index(adapter)
        return {name: leaf[place : place + 1] for name, leaf in each_alone(message).items()} | message.stats

    def later(self, shared: Shared) -> list[Shared]:
        """Shareds whose messages have other shapes than the first one's: with fewer ranks or fewer adapters."""
        explored = replace(shared, routes=replace(shared.routes, round=shared.routes.rounds))
        thin = [explored] if self.explore_rank else []
        fewer = range(1, self.num_adapters) if self.prune_below else ()
        return thin + [replace(own, alive=own.alive[:count]) for own in (shared, *thin) for count in fewer]

    def measure(self, loss: Loss, message: Message, data: ClientData) -> LabelLosses | None:
        """The losses that routes are found by; None where they are not, or clients have tensors of their own."""
        if self.router.kind != "em" or self.ranks or self.personal or running_stats(loss.module):
            return None
        return self._losses(loss, message, {}, data)

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        bank, router, local = message.bank, self.router, self.local
        stats = message.stats | private.stats
        logits, measured = self._routes(loss, message, private, data)
        noise = router.noise_at(
            data, self.num_adapters, data.num_steps(local.batch_size, local.epochs, local.steps)
        )

        def objective(groups: Groups, batch: Any, step: int) -> Tensor:
            theta = groups["router"]["logits"]
            if noise is not None:
                theta = theta + noise[:, step].view(len(theta), *[1] * (theta.dim() - 2), -1)
            probs = among(theta, message.alive).softmax(-1).clamp(min=self.least_prob)
            mixed = mix(bank, groups["base"], groups["adapters"], probs, message.remainder, gates=True)
            return loss(mixed | groups["own"] | groups["stats"], batch)

        lr = {"base": local.lr, "own": local.lr, "adapters": local.lr * self.adapter_lr}
        start = {"base": message.base, "own": private.own, "stats": stats}
        trained, mean_loss = local_train(
            objective,
            start | {"adapters": bank.laid_out(message.adapters), "router": {"logits": logits}},
            data,
            local,
            lr | ({"router": router.lr} if router.kind == "gradient" else {}),
            self._precondition(bank) if self.precondition else None,
            plain=frozenset({"router"}),
        )
        logits = trained["router"]["logits"]
        probs = among(logits, message.alive).softmax(-1)  # (K, C') or (K, L, C')
        heaviest = self._sent(probs)
        sent = message.alive.gather(1, heaviest)
        routed = data.weight.view(-1, *[1] * (probs.dim() - 1)) * probs
        upload = Upload(
            trained["base"],
            {name: picked(leaf, heaviest) for name, leaf in trained["adapters"].items()},
            sent,
            {} if self.batch_stats == "private" else trained["stats"],
            data.weight,
            spread_out(kept_only(routed, heaviest), message.alive, self.num_adapters),
            message.rank_share,
            measured,
            mean_loss,
            bank,
        )
        kept = trained["stats"] if self.batch_stats == "private" else {}
        return upload, Private(logits, kept, trained["own"], torch.ones_like(private.seen))

    def contribution(self, upload: Upload) -> dict[str, Any]:
        # What was not sent counts nothing: its place in the sums is zero, and so is its weight.
        adapters = {name: placed(leaf, upload.sent, self.num_adapters) for name, leaf in upload.adapters.items()}
        routed = upload.route_examples  # (K, C) or (K, L, C)
        weights = {n: routed if routed.dim() == 2 else routed[:, upload.bank.layer_of(n)] for n in adapters}
        exact = self.averaging != "factor" or self.report_error
        return {
            "base": mixing.weighted_sum(upload.weight, upload.base | upload.stats),
            "adapters": adapter_sums(upload.bank, adapters, weights, upload.rank_share, exact),
            **route_sums(upload.weight, routed, upload.measured),
        }

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        mean = mixing.mean(sums["base"], sums["examples"])
        base, base_moments = self.server.step(shared.base, mean, shared.moments["base"])
        routed = sums["route_examples"]  # (C,) or (L, C)
        bank = self._bank(shared)
        old, known = narrowed(bank, shared.adapters), _of_ranks(narrowed, bank, shared.moments["adapters"])
        weights = by_rank(bank, adapter_weights(bank, old, routed), sums["adapters"])
        target = averaged(bank, sums["adapters"], weights, self.averaging)
        whole = routed if routed.dim() == 1 else routed.mean(0)
        share = {
            name: self.adapter_step * moved_share(weights[name], sums["examples"], self.guard) for name in old
        }
        adapters, moments = self.server.step(old, target, known, share)
        if self.averaging == "product" and bank.low_rank:
            adapters |= by_products(bank, old, target, self.server.lr * share[bank.low_rank[0].a_name])
        moved = replace(
            shared,
            base=base,
            adapters=widened(shared.bank, adapters),
            remainder=self._remainders(shared, bank, (old, target, adapters), share) if shared.remainder else {},
            stats={name: mean.get(name, leaf).to(leaf.dtype) for name, leaf in shared.stats.items()},
            moments={"base": base_moments, "adapters": _of_ranks(widened, shared.bank, moments)},
            routes=shared.routes.after(self.router, sums | {"route_examples": whole}),
            figures={"averaging_error": factor_error(bank, sums["adapters"], weights).float()}
            if self.report_error
            else {},
        )
        return self._pruned(self._cut(moved) if bank is not self._bank(moved) else moved)

    def _bank(self, shared: Shared) -> Bank:
        """The plan of the adapters as they are now: with more ranks while routes are explored."""
        explored = shared.routes.round >= self.router.explore * shared.routes.rounds
        return shared.thin if self.explore_rank and bool(explored) else shared.bank

    def _cut(self, shared: Shared) -> Shared:
        """With the adapters that are nearest in the ranks that they keep, and no memory of how they moved."""
        adapters = nearest(shared.bank, shared.adapters, shared.thin)
        return replace(
            shared, adapters=adapters, moments=shared.moments | {"adapters": self.server.init(adapters)}
        )

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        received = {n: placed(leaf, message.alive, self.num_adapters) for n, leaf in message.adapters.items()}
        made = {
            n: placed(leaf, upload.sent, self.num_adapters, received[n]) for n, leaf in upload.adapters.items()
        }
        routed = upload.route_examples  # each layer's own routes count together
        adapters = change(made, received, routed if routed.dim() == 2 else routed.mean(1))
        return replace(
            upload,
            base=change(upload.base, message.base, upload.weight),
            adapters={name: picked(leaf, upload.sent) for name, leaf in adapters.items()},
            stats=change(upload.stats, message.stats, upload.weight),
        )

    @property
    def refuses(self) -> Refusals:
        factors = self.averaging == "factor" and not self.ranks
        return {
            "moves": ""
            if factors and not self.report_error and not self.send_top
            else "averaging other than 'factor', report_error, ranks and send_top need more of each client",
            "mean": ""
            if factors and not self.layer_routers
            else "another mean of adapters needs averaging = 'factor', one rank for all and one router a client",
            "steps": "router.kind = 'em' measures losses on examples without noise; take router.kind = 'gradient'"
            if self.router.kind == "em"
            else "with ranks noise would fill those that a client does not have"
            if self.ranks
            else "",
        }

    def absolute(self, shared: Shared, moved: dict[str, Any]) -> dict[str, Any]:
        received, adapters = shared.base | shared.stats, moved["adapters"]["values"]
        bank = self._bank(shared)
        old = narrowed(bank, shared.adapters)
        weights = adapter_weights(bank, old, moved["route_examples"])
        values = {n: mixing.restored({n: x}, weights[n], old)[n] for n, x in adapters.items()}
        base = mixing.restored(moved["base"], moved["examples"], received)
        return moved | {"base": base, "adapters": {"values": values}}

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        """The routes to the adapters as they are now; for clients never seen, all else that they keep."""
        if private.stats or private.own:
            private = settled(self, loss, message, private, data)
        if self.router.kind != "em":
            return private
        logits, _ = self._routes(loss, message, private, data)
        sound = logits.isfinite().all(1, keepdim=True)
        return replace(private, logits=torch.where(sound, logits, private.logits))

    def personalize(self, message: Message, private: Private) -> Params:
        probs = among(self._logits(message, private), message.alive).softmax(-1).clamp(min=self.least_prob)
        mixed = mix(message.bank, message.base, message.adapters, probs, message.remainder)
        return mixed | message.stats | private.stats | private.own

    def mixture(self, message: Message, private: Private) -> Tensor:
        """(K, C) π: the client's own, or the oracle's; 0 for pruned adapters, the mean of all layers' routers."""
        probs = among(self._logits(message, private), message.alive).softmax(-1)
        probs = spread_out(probs, message.alive, self.num_adapters)
        return probs if probs.dim() == 2 else probs.mean(1)

    def _logits(self, message: Message, private: Private) -> Tensor:
        return message.told.oracle if self.router.kind == "oracle" else private.logits

    def _routes(self, loss: Loss, message: Message, private: Private, data: ClientData) -> tuple[Tensor, Measured]:
        def losses() -> LabelLosses:
            own = message.stats | private.stats | private.own
            found = data.measured or self._losses(loss, message, own, data)
            # A pruned adapter counts as an average one: it is neither the best nor does it move the mean.
            average = found.sums.mean(2, keepdim=True)
            every = spread_out(found.sums - average, message.alive, self.num_adapters) + average
            return LabelLosses(every, found.counts)

        return self.router.start(message.told, private.logits, losses, data)

    def _losses(self, loss: Loss, message: Message, own: Params, data: ClientData) -> LabelLosses:
        """With each received adapter alone; clients of unequal ranks have received other adapters."""
        data, num_labels = self.router.looked_at(data), max(1, message.told.frequency.shape[1])
        if message.rank_share.dim() > 1:
            return losses_of(loss, each_alone(message), data, num_labels, own, message.told.exploring)
        num_clients, some = len(data.clients), next(iter(message.adapters.values()))
        sums = some.new_zeros(num_clients, num_labels, some.shape[1])
        counts = some.new_zeros(num_clients, num_labels)
        for share in message.rank_share.unique():
            places = (message.rank_share == share).nonzero().squeeze(1)
            alone = each_alone(message, int(places[0]))
            of = data.among(places), num_labels, tree.rows(own, places), message.told.exploring[places]
            found = losses_of(loss, alone, *of)
            sums[places], counts[places] = found.sums, found.counts
        return LabelLosses(sums, counts)

    def _sent(self, probs: Tensor) -> Tensor:
        """(K, C'') which of the received adapters are sent back, by their place."""
        weight = probs if probs.dim() == 2 else probs.mean(1)
        if not self.send_top or self.send_top >= weight.shape[1]:
            return torch.arange(weight.shape[1], device=weight.device).expand(weight.shape)
        return weight.topk(self.send_top, dim=1).indices.sort(1).values

    def _remainders(
        self, shared: Shared, bank: Bank, adapters: tuple[Params, Params, Params], share: Params
    ) -> Params:
        """The dense remainders after the round, for adapters as they were, of the mean and as they are now."""
        dense, target = [products(bank, own) for own in adapters], adapters[1]
        found = {}
        for part in bank.low_rank:
            old, mean, new = (own[part.name] for own in dense)
            move = self.server.lr * share[part.a_name]
            before, missed = shared.remainder[part.name], target[part.name]
            found[part.name] = remainder_of(part, before, (old, mean, new), missed, move)
        return found

    def _pruned(self, shared: Shared) -> Shared:
        """Without the adapters that have too few examples, and with fresh ones for those that died too early."""
        routes, alive = shared.routes, shared.alive
        if self.prune_below and routes.settled(self.router):
            enough = routes.share[alive] >= self.prune_below
            enough[routes.share[alive].argmax()] = True  # the heaviest stays whatever it has
            alive = alive[enough]
        if self._restarts(shared) and routes.exploring(self.router):
            dead = torch.zeros_like(routes.share, dtype=torch.bool)
            dead[alive] = routes.share[alive] * self.num_adapters < self.restart_below
            dead[routes.share.argmax()] = False  # all are low if noise on the sums has it so
            dead[: len(shared.bank.seeds)] = False  # what somebody chose as a start is nobody's spare one
            shared = self._restarted(shared, dead) if bool(dead.any()) else shared
        return replace(shared, alive=alive)

    def _restarts(self, shared: Shared) -> bool:
        """Whether adapters may start anew.

        Not with other routers, which would avoid the new one; with send_top nobody may have sent it back yet.
        Fewer clients than adapters cannot fill them, and without a spread a copy would stay one.
        """
        enough = bool(shared.routes.members >= self.num_adapters) and self.b_std(shared.bank) > 0
        return self.router.kind == "em" and not self.send_top and enough

    def _restarted(self, shared: Shared, dead: Tensor) -> Shared:
        """With the `dead` (C,) adapters as copies of the heaviest, turned a little, and nothing of their past.

        What the heaviest serves badly has somewhere to go.
        """
        routes = shared.routes
        heaviest = int(routes.share.argmax())
        draw = generator(int(shared.seed), "restart", int(routes.round))
        std = self.b_std(shared.bank)
        fresh = shared.bank.drawn(self.num_adapters, draw, std)

        def instead(leaf: Tensor, new: Tensor) -> Tensor:
            return torch.where(mixing.as_leading(dead, leaf), new, leaf)

        near = {n: leaf[heaviest] + std * fresh[n].to(leaf) for n, leaf in shared.adapters.items()}
        moments = shared.moments["adapters"]
        moments = tree.map_tensors(
            lambda leaf, start: instead(leaf, start) if leaf.dim() else leaf, moments, self.server.init(near)
        )
        return replace(
            shared,
            adapters={name: instead(leaf, near[name]) for name, leaf in shared.adapters.items()},
            remainder={name: instead(leaf, leaf[heaviest]) for name, leaf in shared.remainder.items()},
            moments=shared.moments | {"adapters": moments},
            routes=routes.restarted(dead),
        )

    def _precondition(self, bank: Bank) -> Any:
        def conditioned(groups: Groups, grads: Groups) -> Groups:
            return grads | {"adapters": precondition(bank, groups["adapters"], grads["adapters"])}

        return conditioned


def _of_ranks(change: Callable[[Bank, Params], Params], bank: Bank, moments: Moments) -> Moments:
    """The moments with `narrowed` or `widened` tensors."""
    return replace(moments, first=change(bank, moments.first), second=change(bank, moments.second))


def adapter_weights(bank: Bank, adapters: Params, routed: Tensor) -> Params:
    """(C,) Σ n π for each of the adapters' tensors, from one router's sums (C,) or those of L layers (L, C)."""
    return {name: routed if routed.dim() == 1 else routed[bank.layer_of(name)] for name in adapters}


def each_alone(message: Message, place: int = 0) -> Params:
    """The C' models that use one of the adapters that a client received and nothing else, leading axis C'."""
    adapters, remainder = (
        {name: leaf[place].unsqueeze(1) for name, leaf in tensors.items()}  # (C', 1, …)
        for tensors in (message.adapters, message.remainder)
    )
    some = next(iter(adapters.values()))
    base = {name: leaf[place].expand(some.shape[0], *leaf.shape[1:]) for name, leaf in message.base.items()}
    return mix(message.bank, base, adapters, some.new_ones(some.shape[0], 1), remainder)
