"""What the methods with one low-rank adapter share: states, the start, the model, a client's training, the mean.

    model    u + a ,   a = (B A, biases)

They differ in which of u, A and B are trained, sent and averaged, and how.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import Bank, mix
from umbel.adapters.bank import LowRank
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods.protocol import Population
from umbel.methods.server import Moments, ServerOptimizer
from umbel.mixing import Change
from umbel.model.loss import Loss, named_by, running_stats, trained_params
from umbel.seeds import generator
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state


@state
class Shared:
    base: Params  # empty if it is frozen
    adapter: Params  # leading axis 1; the part of it that is federated
    stats: Params  # running statistics of BatchNorm layers
    moments: dict[str, Moments]  # of base and adapter
    bank: Bank


S = TypeVar("S", bound=Shared)


@state
class Message:
    base: Params
    adapter: Params  # (K, 1, …)
    stats: Params
    bank: Bank


@state
class Upload:
    base: Params
    adapter: Params  # (K, 1, …)
    stats: Params
    weight: Tensor  # (K,) n
    loss: Tensor  # (K,)


def parted(module: nn.Module, freeze_base: bool, personal: Sequence[str]) -> tuple[Params, Params]:
    """What the module trains: what is sent, and what patterns in `personal` keep with the client.

    Of a frozen base only the second is trained.

    Raises:
        ModelError: a pattern names nothing that is trained.
    """
    trained = trained_params(module, needed=False)
    stays = named_by(personal, trained, module)
    own = {name: leaf for name, leaf in trained.items() if name in stays}
    return {} if freeze_base else {name: leaf for name, leaf in trained.items() if name not in stays}, own


def check_whole(personal: Sequence[str]) -> None:
    """Raises RecipeError if clients keep tensors without which an adapter is no model."""
    if personal:
        raise RecipeError(f"an adapter is no model without a client's own {', '.join(personal)}; export clients")


def start(
    module: nn.Module, bank: Bank, freeze_base: bool, population: Population, personal: Sequence[str] = ()
) -> tuple[Params, Params]:
    """The base that is sent, and LoRA's own start of the whole adapter (leading axis 1): the model is the base."""
    base, _ = parted(module, freeze_base, personal)
    dtype = bank.dtype(module)
    drawn = bank.init(1, generator(population.seed, "adapters"), 0.0)
    return base, {name: leaf.to(dtype) for name, leaf in drawn.items()}


def shared_of(module: nn.Module, bank: Bank, base: Params, adapter: Params, server: ServerOptimizer) -> Shared:
    """The first Shared, which federates `base` and `adapter`."""
    stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
    return Shared(base, adapter, stats, {"base": server.init(base), "adapter": server.init(adapter)}, bank)


def send(shared: Shared, num_clients: int) -> Message:
    """All of it to everyone."""
    base, adapter, stats = (
        tree.broadcast(tensors, num_clients) for tensors in (shared.base, shared.adapter, shared.stats)
    )
    return Message(base, adapter, stats, shared.bank)


def adapted(bank: Bank, base: Params, adapter: Params, gates: bool = False) -> Params:
    """The tensors of K clients' models; `gates` see `mix`."""
    some = next(iter(adapter.values()))
    return mix(bank, base, adapter, some.new_ones(len(some), 1), gates=gates)


def train(
    loss: Loss,
    message: Message,
    own: Params,
    data: ClientData,
    local: LocalTraining,
    fixed: Params | None = None,
    head: Params | None = None,
) -> tuple[Groups, Upload]:
    """What training made of "base", "adapter", "stats", `own` and `head`, and the upload of the first three.

    Args:
        loss: of the module with its low-rank paths.
        message: what the clients received.
        own: their own part of the adapter, which is trained but not sent.
        data: what they train on.
        local: how.
        fixed: the part of the adapter that is not trained.
        head: their own part of the base.
    """

    def objective(groups: Groups, batch: Any, _step: int) -> Tensor:
        adapter = groups["adapter"] | groups["own"] | (fixed or {})
        mixed = adapted(message.bank, groups["base"], adapter, gates=True)
        return loss(mixed | groups["head"] | groups["stats"], batch)

    start = {"base": message.base, "adapter": message.adapter, "own": own, "head": head or {}}
    trained, mean_loss = local_train(
        objective,
        start | {"stats": message.stats},
        data,
        local,
        dict.fromkeys(start, local.lr),
    )
    return trained, Upload(trained["base"], trained["adapter"], trained["stats"], data.weight, mean_loss)


def contribution(upload: Upload) -> dict[str, Any]:
    """Σ n, and Σ n x over clients for all that they uploaded."""
    groups = {"base": upload.base, "adapter": upload.adapter, "stats": upload.stats}
    sums = {name: mixing.weighted_sum(upload.weight, tensors) for name, tensors in groups.items()}
    return sums | {"weight": upload.weight.sum()}


U = TypeVar("U", bound=Upload)


def changed(upload: U, message: Message, change: Change) -> U:
    """The upload with `change` in each of its three groups."""
    names = ("base", "adapter", "stats")
    made: Any = {name: change(getattr(upload, name), getattr(message, name), upload.weight) for name in names}
    return replace(upload, **made)


def absolute(shared: Shared, moved: dict[str, Any]) -> dict[str, Any]:
    """The sums of `contribution`, from those of uploads that say how far tensors have moved."""
    received = {"base": shared.base, "adapter": shared.adapter, "stats": shared.stats}
    return moved | {
        name: mixing.restored(moved[name], moved["weight"], tensors) for name, tensors in received.items()
    }


def averaged(shared: S, server: ServerOptimizer, sums: dict[str, Any]) -> S:
    """The server's step from what it has towards the clients' mean."""
    mean = {name: mixing.mean(sums[name], sums["weight"]) for name in ("base", "adapter", "stats")}
    base, base_moments = server.step(shared.base, mean["base"], shared.moments["base"])
    adapter, moments = server.step(shared.adapter, mean["adapter"], shared.moments["adapter"])
    both = {"base": base_moments, "adapter": moments}
    stats = {name: mean["stats"][name].to(leaf.dtype) for name, leaf in shared.stats.items()}
    return replace(shared, base=base, adapter=adapter, stats=stats, moments=both)


def reading(part: LowRank) -> str:
    """The name of the factor that reads the layer's input and is random at the start, LoRA's A.

    Of an embedding it is the one with a row for each word.
    """
    return part.indexed or part.a_name
