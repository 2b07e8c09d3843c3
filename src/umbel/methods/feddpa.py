"""FedDPA: a global adapter and a local one, weighed for each instance (Yang et al. 2024).

Dual-Personalizing Adapter for Federated Foundation Models, https://arxiv.org/abs/2403.19211

    model of client k     u + w_g B_g A_g + w_l B_l A_l ,  the head, if the task trains one, with g
    T: client, round 1    local training in g alone
       afterwards         local training in l at weights (1 − a, a), g frozen; then in g alone, at (1, 0)
    F: client             local training in g alone; when it serves: l ← g, trained further at (0, 1)
    sent                  g, n_k;  kept: l
    server                g ← Σ_k n_k g_k / Σ_k n_k
    served                (1 − α, α) ,  α = λ mean_s cos(e(x), e(x_s)) ,  in [0, 1] ;  g alone while T has no l

e is the embedding of an instance by the model with the local adapter alone, x_s are S of the client's own
training examples. The more an instance is like the client's own, the more the local adapter counts; in the
published code it is the other way round (`published_gate`), and its batched evaluation does not apply the gate at
all. Tensors that `personal` names stay with the client and are trained where the head would be; ours.
Departures: docs/methods.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, mix, with_paths
from umbel.clients import ClientData
from umbel.errors import ModelError, RecipeError
from umbel.methods import lora
from umbel.methods.gate import Embedding, Gated, inside
from umbel.methods.lora import Message, Shared, Upload
from umbel.methods.protocol import Population, Refusals
from umbel.methods.server import ServerOptimizer
from umbel.methods.settling import choose, settled, stacked
from umbel.mixing import Change
from umbel.model.loss import IGNORED, Loss
from umbel.ranges import check_ranges
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state


@state
class Private:
    adapter: Params  # (K, 1, …) l
    head: Params  # `personal` tensors of the base
    seen: Tensor  # (K,) rounds that the client took part in, 2 at most


@state
class Served:
    """What a client serves with."""

    adapter: Params  # (K, 1, …) l
    head: Params  # `personal` tensors of the base
    anchor: Tensor  # (K, width) the mean of e(x_s) / ‖e(x_s)‖, or (K, 0) where α is λ itself


@dataclass(frozen=True)
class FedDPA:
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    variant: Literal["T", "F"] = "T"
    local_weight: float = 0.5  # a
    strength: float = 0.5  # λ
    gate: Literal["instance", "constant"] = "instance"  # "constant": α = λ; "instance" wants adapter.peft
    samples: int = 5  # S
    published_gate: bool = False  # weights (α, 1 − α), as the published code has them
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerOptimizer = field(default_factory=ServerOptimizer)
    freeze_base: bool = True  # nothing but adapters is trained; adapter.peft trains the head too, whatever it says
    personal: tuple[str, ...] = ()  # patterns of trained tensors that stay with the client: "*classifier.*"
    refuses: ClassVar[Refusals] = {}

    def __post_init__(self) -> None:
        check_ranges(self, local_weight="[0, 1]", strength="[0, 1]", samples="[1, inf)")
        if self.gate == "instance" and not self.adapter.peft:
            raise RecipeError("feddpa: gate = 'instance' wants adapter.peft; without it take gate = 'constant'")

    def bank(self, module: nn.Module) -> Bank:
        """The plan of both adapters."""
        return self.adapter.bank(module, self.local.batch_size, self._frozen, self.personal)

    def adapt(self, module: nn.Module) -> nn.Module:
        adapted = with_paths(module, self.bank(module))
        if self.gate == "constant":
            return adapted
        layers = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise ModelError(f"{type(module).__name__} has no nn.Linear whose input could be an embedding")
        return Gated(adapted, layers[-1], self.strength, self.published_gate)

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank = self.bank(module)
        base, adapter = lora.start(module, bank, self._frozen, population, self.personal)
        _, head = lora.parted(module, self._frozen, self.personal)
        private = tree.broadcast(Private(adapter, head, torch.zeros(())), 1)
        return lora.shared_of(module, bank, base, adapter, self.server), private

    def send(self, shared: Shared, clients: Tensor) -> Message:
        return lora.send(shared, len(clients))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        own, head = private.adapter, private.head
        if self.variant == "T" and bool((private.seen > 0).any()):
            weights = (1 - self.local_weight, self.local_weight)
            trained, _ = self._train(loss, message, own, head, data, weights, {"own": self.local.lr})
            own = choose(private.seen > 0, trained["own"], own)
        rates = dict.fromkeys(("base", "adapter", "head"), self.local.lr)
        trained, mean_loss = self._train(loss, message, private.adapter, head, data, (1.0, 0.0), rates)
        upload = Upload(trained["base"], trained["adapter"], trained["stats"], data.weight, mean_loss)
        return upload, Private(own, trained["head"], (private.seen + 1).clamp(max=2))

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return lora.contribution(upload)

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        return self.summed_update(shared, mixing.total(map(self.contribution, uploads)))

    def summed_update(self, shared: Shared, sums: dict[str, Any]) -> Shared:
        return lora.averaged(shared, self.server, sums)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return lora.changed(upload, message, change)

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Served:
        """The local adapter, made from the global one in variant F, and where the client's own examples lie."""
        private = settled(self, loss, message, private, data) if private.head else private
        own, head = private.adapter, private.head
        if (
            self.variant == "T"
        ):  # l has been trained in a second round; who has none serves g, whatever the weights
            own = choose(private.seen > 1, own, message.adapter)
        else:

            def work(message: Message, private: Private, data: ClientData) -> Params:
                rates = {"own": self.local.lr}
                return self._train(loss, message, message.adapter, private.head, data, (0.0, 1.0), rates)[0]["own"]

            tuned = stacked(work, loss, message, private, data, self.local.batch_size, message.adapter)
            own = choose(tree.finite_rows(replace(private, adapter=tuned)), tuned, message.adapter)
        if self.gate == "constant":
            return Served(own, head, private.seen.new_empty(len(private.seen), 0))
        return Served(own, head, self._anchor(loss, message, own, head, data))

    def personalize(self, message: Message, private: Private | Served) -> Params:
        """The model of what `settle` gave, or of a client that nobody has seen: g alone."""
        own = message.adapter if isinstance(private, Private) else private.adapter
        if self.gate == "constant":
            mixed = self._mixed(message, message.base, message.adapter, own, self._weights())
            return mixed | message.stats | private.head
        if isinstance(private, Private):  # without an anchor the gate is open, so what it weighs is said here
            alone = self._mixed(message, message.base, message.adapter, own, (1.0, 0.0))
            return inside(alone | message.stats | private.head)
        both = self._mixed(message, message.base, message.adapter, own, (1.0, 1.0))
        return inside(both | message.stats | private.head) | {"anchor": private.anchor}

    def mixture(self, message: Message, private: Private | Served) -> Tensor:
        """(K, 2) the weights of the global and the local adapter; with a gate those at a cosine of 1."""
        some = next(iter(message.adapter.values()))
        return some.new_tensor(self._weights()).expand(len(some), 2)

    @property
    def _frozen(self) -> bool:
        """Whether nothing is trained but the adapters; PEFT's own plan says what else is."""
        return self.freeze_base and not self.adapter.peft

    def _anchor(self, loss: Loss, message: Message, own: Params, head: Params, data: ClientData) -> Tensor:
        """(K, width) of the clients' own examples: a text's at its prompt's end, or at its last place."""
        gated = loss.module
        assert isinstance(gated, Gated)
        both = self._mixed(message, message.base, message.adapter, own, (1.0, 1.0))
        params = both | message.stats | head
        view = replace(loss, module=Embedding(gated))
        some = data.some(self.samples, "anchors")
        total: Any = 0.0
        with torch.no_grad():
            for batch in some.in_order(self.samples):
                found = view.outputs(inside(params, "gated.inner"), batch.x)  # (K, S, width) or (K, S, T, width)
                if found.dim() == 4:
                    counted = batch.y != IGNORED
                    last = counted.shape[2] - 1 - counted.flip(2).int().argmax(2)
                    first = counted.int().argmax(2)
                    place = torch.where(first > 0, first, last)
                    found = found.gather(
                        2, place[..., None, None].expand(*place.shape, 1, found.shape[3])
                    ).squeeze(2)
                unit = F.normalize(found, dim=-1)
                total = total + (unit if batch.weight is None else unit * batch.weight.unsqueeze(-1)).sum(1)
        anchor: Tensor = total / some.num_examples.unsqueeze(1)
        return anchor

    def _weights(self) -> tuple[float, float]:
        alpha = self.strength
        return (alpha, 1 - alpha) if self.published_gate else (1 - alpha, alpha)

    def _mixed(
        self, message: Message, base: Params, common: Params, own: Params, weights: tuple[float, float]
    ) -> Params:
        """The tensors of both adapters side by side at these weights."""
        both = {name: torch.cat([common[name], own[name]], 1) for name in common}
        some = next(iter(both.values()))
        return mix(message.bank, base, both, some.new_tensor(weights).expand(len(some), 2))

    def _train(
        self,
        loss: Loss,
        message: Message,
        own: Params,
        head: Params,
        data: ClientData,
        weights: tuple[float, float],
        lr: dict[str, float],
    ) -> tuple[Groups, Tensor]:
        """Local training of the groups in `lr` at these weights of the two adapters."""

        def objective(groups: Groups, batch: Any, _step: int) -> Tensor:
            mixed = self._mixed(message, groups["base"], groups["adapter"], groups["own"], weights)
            params = mixed | groups["head"] | groups["stats"]
            return loss(params if self.gate == "constant" else inside(params), batch)

        start = {"base": message.base, "adapter": message.adapter, "own": own, "head": head}
        return local_train(objective, start | {"stats": message.stats}, data, self.local, lr)
