"""FL-TAC: an adapter for every task of a client, and on the server the mean of each cluster of adapters.

Ping et al. 2024, FL-TAC: Enhanced Fine-Tuning in Federated Learning via Low-Rank, Task-Specific Adapter
Clustering, Algorithms 1-3, https://arxiv.org/abs/2404.15384

    unit      a slot (i, j): task j of client i. Which task it is nobody says; whose it is the server knows
    slot      v_ij ← local training on its own examples from its own v_ij ; at the start v_ij = v⁰, one for all
    sent      v_ij, n_ij
    server    V_1 … V_C ← K-means of all v_ij                          (features: clustering.py)
              v_c ← Σ_{V_c} n_ij v_ij / Σ_{V_c} n_ij
              v_ij ← v_c for (i, j) in V_c

v is the adapter with what else the task trains (heads), without the tensors that `personal` names: these stay with
the slot, as FedPer's head does, and are ours. Beyond the paper: a slot is known by the steps that it
took itself (`compare`), for what it sends begins where its cluster is, so that a wrong cluster would stay wrong,

    w_ij ← w_ij + (v_ij sent − v_ij received) / t      in its round t; at the start w_ij = v⁰ ;

later steps count less, for what a slot wants where its task's centre is already is to learn its examples by heart.
Two slots of one client are different tasks and never share a cluster (`cannot_link`); the last round's centres are
one of K-means' starts (`warm_start`); slots that sit a round out count in K-means for some rounds (`staleness`),
and then as the centre that they stay with; a slot that has never trained serves the cluster whose centre lies in
the direction from v⁰ that is nearest to that of its own first round.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import mixing, tree
from umbel.adapters import AdapterPlan, Bank, with_paths
from umbel.clients import ClientData
from umbel.clustering import (
    MOST,
    Cloud,
    Features,
    best_number,
    distances,
    inner_products,
    k_means,
    plane,
    points,
    renamed,
)
from umbel.errors import RecipeError
from umbel.methods import lora
from umbel.methods.protocol import Population, Refusals
from umbel.methods.settling import choose, lonely, settled, stacked
from umbel.methods.trusting import usable
from umbel.mixing import Change, as_leading
from umbel.model.loss import Loss, has_batch_norm, running_stats
from umbel.ranges import check_ranges
from umbel.train import LocalTraining
from umbel.tree import Params, state

S = TypeVar("S")


@state
class Adapter:
    """What a slot has of its own; v."""

    base: Params  # (…) heads, or whatever else the task trains
    adapter: Params  # (…, 1, …)
    stats: Params  # running statistics of BatchNorm layers


NOBODY = Adapter({}, {}, {})


@state
class Shared:
    start: Adapter  # leading axis 1, v⁰
    centres: Adapter  # leading axis C, v_c; v⁰ where nobody has been yet
    cluster: Tensor  # (slots,) int64; −1 for slots that never trained
    owner: Tensor  # (slots,) int64
    places: Tensor  # (slots, 2) where this round's partition saw them, or the centres they stayed with
    known: Adapter  # leading axis slots, what each is compared by: w, or v as it was last sent; NOBODY if by v now
    examples: Tensor  # (slots,) how many it has, as it last said
    weight: Tensor  # (slots,) and what it counts in a mean
    heard: Tensor  # (slots,) int64 the round of its last upload; 0: never
    times: Tensor  # (slots,) int64 how often it was heard, t
    round: Tensor  # () int64 rounds done
    bank: Bank
    seed: int

    @property
    def used(self) -> Tensor:
        """(C,) bool, the clusters that have slots."""
        num_clusters = len(next(iter(self.centres.adapter.values())))
        return F.one_hot(self.cluster + 1, num_clusters + 1)[:, 1:].any(0)

    @property
    def assigned(self) -> Tensor | None:
        """(slots, C) one-hot, the cluster of each; None while a slot has none."""
        known = bool((self.cluster >= 0).all())
        return F.one_hot(self.cluster, len(self.used)) if known else None

    def served(self, slots: Tensor) -> Adapter:
        """(slots, …) what these are sent: their cluster's centre, or v⁰."""
        return tree.rows(joined(self.start, self.centres), self.cluster[slots] + 1)

    @property
    def figures(self) -> dict[str, float]:
        """How many clusters have slots."""
        return {"clusters": float(self.used.sum())}


@state
class Centres:
    """What a slot without a cluster is compared with."""

    start: Adapter  # leading axis 1, v⁰
    centres: Adapter  # leading axis C
    used: Tensor  # (C,) bool


@dataclass(frozen=True)
class AtServer:
    """No tensor state, for it stays where it is until a slot asks for it."""

    told: Centres


@state
class Message(lora.Message):
    route: Tensor  # (K, C) one-hot, the slot's cluster; zeros if it has none
    server: AtServer


@state
class Private:
    nearest: Tensor  # (K, C) one-hot, what a slot without a cluster has settled on; zeros else, and never kept
    head: Params  # `personal` tensors of the base
    seen: Tensor  # (K,) 0 before the slot's first round, 1 after it


@state
class Upload(lora.Upload):
    client: Tensor  # (K,) int64, which slot this is
    examples: Tensor  # (K,) how many it has


@dataclass(frozen=True)
class FLTAC:
    num_clusters: int = 0  # C; 0: as silhouettes have it, anew in every round
    features: Features = "unit_product"  # the paper's: "raw"
    compare: Literal["steps", "model"] = "steps"  # slots by w; the paper's: "model", by v
    cannot_link: bool = True
    warm_start: bool = True
    min_examples: int = 2  # a slot with fewer joins a cluster, but does not shape the partition
    staleness: int = 10  # for so many rounds an absent slot counts in K-means by itself; then as its centre
    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    local: LocalTraining = field(default_factory=LocalTraining)
    freeze_base: bool = False
    personal: tuple[str, ...] = ()  # patterns of trained tensors that stay with the slot: "*classifier.*"
    picture: Literal["pca", "umap"] = "pca"  # in which plane the report shows the adapters
    refuses: ClassVar[Refusals] = {
        "sum": "slots that share an adapter are found by clustering single uploads",
        "mean": "it clusters single uploads, so there is no mean of all that another could stand in for",
    }

    def __post_init__(self) -> None:
        check_ranges(self, num_clusters="[0, inf)", staleness="[0, inf)", min_examples="[1, inf)")
        if self.picture == "umap" and find_spec("umap") is None:
            raise RecipeError("fl_tac: picture = 'umap' needs umap-learn: pip install umbel[umap]")

    @property
    def forgetful(self) -> bool:
        """Whether nothing of an absent slot is kept."""
        return self.compare == "model" and not self.staleness

    def bank(self, module: nn.Module) -> Bank:
        """The plan of an adapter."""
        return self.adapter.bank(module, self.local.batch_size, self.freeze_base, self.personal)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        bank, slots = self.bank(module), population.num_clients
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        _, head = lora.parted(module, self.freeze_base, self.personal)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        start = tree.broadcast(Adapter(base, adapter, stats), 1)
        num_clusters = self.num_clusters or min(slots, MOST)
        centres = tree.rows(start, torch.zeros(num_clusters, dtype=torch.long))
        owner = torch.arange(slots) if population.owner is None else population.owner.cpu().long()
        unknown = torch.full((slots,), -1)
        nearest = torch.zeros(num_clusters, dtype=next(iter(adapter.values())).dtype)
        known = NOBODY if self.forgetful else tree.rows(comparable(start), torch.zeros(slots, dtype=torch.long))
        never, rounds = torch.zeros(slots, dtype=torch.long), torch.zeros((), dtype=torch.long)
        seen = torch.zeros(slots, 2), known, torch.zeros(slots), torch.zeros(slots).double(), never, never, rounds
        private = tree.broadcast(Private(nearest, head, torch.zeros(())), 1)
        return Shared(start, centres, unknown, owner, *seen, bank, population.seed), private

    def send(self, shared: Shared, clients: Tensor) -> Message:
        cluster, told = shared.cluster[clients], self.told(shared)
        own = shared.served(clients)
        route = F.one_hot(cluster + 1, len(told.used) + 1)[:, 1:].to(next(iter(own.adapter.values())))
        return Message(own.base, own.adapter, own.stats, shared.bank, route, AtServer(told))

    def told(self, shared: Shared) -> Centres:
        """What slots without a cluster are told of the server's state."""
        return Centres(shared.start, shared.centres, shared.used)

    def beside(self, message: Message) -> Centres | None:
        """What a slot without a cluster settles by, once there are clusters; it travels to such slots only."""
        told = message.server.told
        return told if bool(told.used.any()) and not bool(message.route.any(1).all()) else None

    def with_beside(self, message: Message, beside: Centres) -> Message:
        """The message as it was where `beside` was taken from it."""
        return replace(message, server=AtServer(beside))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        trained, sent = lora.train(loss, message, {}, data, self.local, head=private.head)
        client = torch.from_numpy(data.clients).to(sent.loss.device)
        upload = Upload(sent.base, sent.adapter, sent.stats, sent.weight, sent.loss, client, data.num_examples)
        return upload, Private(private.nearest, trained["head"], torch.ones_like(private.seen))

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {}  # no sum over slots will do

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        every = joined(*uploads)
        every = tree.rows(every, every.client.argsort())
        here, sent = every.client, Adapter(every.base, every.adapter, every.stats)
        shared = self._noted(shared, every, sent)
        fresh = usable(shared.heard, int(shared.round), self.staleness).index_fill(0, here, False)
        away = fresh.nonzero().squeeze(1)  # absent, and counted by themselves
        slots, num_clusters = torch.cat([here, away]), len(shared.used)
        waiting = shared.cluster.index_fill(0, slots, -1)  # the clusters of those that count as their centre
        absent = F.one_hot(waiting + 1, num_clusters + 1).sum(0)[1:]
        every_v = joined(sent, *([shared.served(away)] if len(away) else []), shared.centres)
        compared = comparable(sent) if self.forgetful else tree.rows(shared.known, slots)
        x = points(self.products(shared.bank, shared.start, joined(compared, self._compared_centres(shared))))
        count_by = x  # as slots of one cluster were sent they lie close together, and silhouettes are clear
        if not self.num_clusters and self.compare == "steps":
            count_by = points(self.products(shared.bank, shared.start, every_v))
        label = self.partition(shared, x, count_by, slots, absent)
        member = F.one_hot(label, num_clusters)
        waited = torch.zeros_like(
            absent, dtype=shared.weight.dtype
        )  # Σ n of the slots that each centre stands for
        waited.index_add_(0, waiting[waiting >= 0], shared.weight[waiting >= 0])
        mass = torch.cat([shared.weight[slots], waited]).to(every.weight)
        weight = member * mass.unsqueeze(1)
        moved = weight[: len(here)].sum(0) > 0
        weight[len(here) :] *= ~moved  # who is not here counts where nobody of the cluster is, as what it serves
        centres = choose(weight.sum(0) > 0, mean_of(weight, every_v), shared.centres)
        seen = torch.from_numpy(plane(x, self.picture)).to(shared.places)
        centre_of = len(slots) + waiting
        cluster = torch.where(waiting >= 0, label[centre_of], -1).index_copy(0, slots, label[: len(slots)])
        places = torch.where(waiting.unsqueeze(1) >= 0, seen[centre_of], shared.places)
        places = places.index_copy(0, slots, seen[: len(slots)])
        return replace(shared, centres=centres, cluster=cluster, places=places)

    def _noted(self, shared: Shared, every: Upload, sent: Adapter) -> Shared:
        """With who was heard in this round, and what they are compared by since."""
        here, now, known, own = every.client, shared.round + 1, shared.known, comparable(sent)
        times = shared.times.index_add(0, here, torch.ones_like(here))
        if self.compare == "steps":
            begun, received = tree.rows(known, here), comparable(shared.served(here))
            t = times[here]
            own = tree.map_tensors(lambda w, v, start: w + (v - start) / as_leading(t, w), begun, own, received)
        if not self.forgetful:
            known = tree.map_tensors(lambda old, row: old.index_copy(0, here, row), known, own)
        return replace(
            shared,
            known=known,
            examples=shared.examples.index_copy(0, here, every.examples.to(shared.examples)),
            weight=shared.weight.index_copy(0, here, every.weight.to(shared.weight)),
            heard=shared.heard.index_copy(0, here, now.expand(len(here))),
            times=times,
            round=now,
        )

    def _compared_centres(self, shared: Shared) -> Adapter:
        """(C, …) the clusters' centres as slots are compared: Σ n_ij w_ij / Σ n_ij, or v_c."""
        centres = comparable(shared.centres)
        if self.compare == "steps":
            member = F.one_hot(shared.cluster + 1, len(shared.used) + 1)[:, 1:]
            weight = member * shared.weight.unsqueeze(1)
            centres = choose(weight.sum(0) > 0, mean_of(weight, shared.known), centres)
        return centres

    def partition(
        self, shared: Shared, x: np.ndarray, count_by: np.ndarray, slots: Tensor, absent: Tensor
    ) -> Tensor:
        """(K + C,) the clusters of slots, and of the centres for the slots that count as these.

        Args:
            shared: with the centres as they were.
            x: (K + C, d) features of slots, and of the centres.
            count_by: (K + C, d) features that say how many clusters there are, where their number is not given.
            slots: (K,) which these are.
            absent: (C,) how many slots each centre stands for.
        """
        num_slots, num_clusters = len(slots), len(absent)
        heavy = shared.examples[slots] >= self.min_examples
        mass = torch.cat([heavy if heavy.any() else ~heavy, absent]).double().cpu().numpy()
        here = np.concatenate([np.ones(num_slots, dtype=bool), absent.cpu().numpy() > 0])
        label = np.zeros(len(mass), dtype=np.int64)
        if here.sum() <= self.num_clusters:  # everyone is alone
            label[here] = np.arange(here.sum())
        elif num_clusters > 1:
            owner = np.full(len(mass), -1)
            if self.cannot_link:
                owner[:num_slots] = shared.owner[slots].cpu().numpy()
            cloud = Cloud(x, mass, owner)
            number = min(self.num_clusters, int((mass > 0).sum()))
            number = number or best_number(replace(cloud, x=count_by), num_clusters, shared.seed)
            used = np.flatnonzero(shared.used.cpu().numpy())
            warm = self.warm_start and len(used) == number
            label = k_means(cloud, number, shared.seed, cloud.x[num_slots + used] if warm else None)
        names = torch.where(shared.used, torch.arange(num_clusters, device=absent.device), -1)
        before = torch.cat([shared.cluster[slots], names]).cpu().numpy()
        return torch.from_numpy(renamed(label, before, num_clusters)).to(absent.device)

    def products(self, bank: Bank, start: Adapter, slots: Adapter) -> np.ndarray:
        """(n, n) the inner products of the slots' features, seen from v⁰."""
        moved = {name: leaf - start.base[name] for name, leaf in slots.base.items()}
        return inner_products(bank, start.adapter, slots.adapter, moved, self.features)

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return lora.changed(upload, message, change)

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        private = settled(self, loss, message, private, data) if private.head else private
        told = message.server.told
        used, new = (found.nonzero().squeeze(1) for found in (told.used, ~message.route.any(1)))
        if has_batch_norm(loss.module):  # one example by itself is nothing that it can train on
            new = new[~torch.from_numpy(lonely(data.num_examples[new].cpu().numpy(), self.local.batch_size))]
        if not len(used) or not len(new):
            return private

        def work(message: Message, private: Private, data: ClientData) -> Upload:
            return self.client_update(loss, message, private, data)[0]

        sent = stacked(work, loss, tree.rows(message, new), tree.rows(private, new), data.among(new))
        sound = tree.finite_rows(sent).nonzero().squeeze(1)
        if not len(sound):
            return private
        sent = tree.rows(sent, sound)
        both = joined(Adapter(sent.base, sent.adapter, sent.stats), tree.rows(told.centres, used))
        # One round's step from v⁰ is short beside a centre's many; what names the task is which way it goes.
        by: Features = "unit_parts" if self.features in ("raw", "unit_parts") else "unit_product"
        products = replace(self, features=by).products(message.bank, told.start, both)
        near = torch.from_numpy(distances(products)[: len(sound), len(sound) :].argmin(1))
        route = F.one_hot(used[near.to(used.device)], len(told.used)).to(private.nearest)
        return replace(private, nearest=private.nearest.index_copy(0, new[sound], route))

    def only(self, shared: Shared, adapter: int) -> Params:
        """The model of one cluster, leading axis 1.

        Raises:
            RecipeError: no slot is in this cluster, or each slot has tensors of its own beside it.
        """
        lora.check_whole(self.personal)
        used = shared.used.nonzero().squeeze(1).tolist()
        if adapter not in used:
            raise RecipeError(f"adapter {adapter}: the run has slots in the clusters {', '.join(map(str, used))}")
        centre = tree.rows(shared.centres, torch.tensor([adapter], device=shared.cluster.device))
        return lora.adapted(shared.bank, centre.base, centre.adapter) | centre.stats

    def personalize(self, message: Message, private: Private) -> Params:
        own = Adapter(message.base, message.adapter, message.stats)
        settled = private.nearest.any(1)
        if bool(settled.any()):
            nearest = tree.rows(message.server.told.centres, private.nearest.argmax(1))
            own = choose(settled, nearest, own)
        return lora.adapted(message.bank, own.base, own.adapter) | own.stats | private.head

    def mixture(self, message: Message, private: Private) -> Tensor:
        return message.route + private.nearest


def joined(*states: S) -> S:
    """The rows of all of them, one after the other."""
    first, *others = states
    return tree.map_tensors(lambda *leaves: torch.cat(leaves), first, *others)


def comparable(adapter: Adapter) -> Adapter:
    """What may be compared: all but running statistics."""
    return replace(adapter, stats={})


def mean_of(weight: Tensor, slots: Adapter) -> Adapter:
    """(C, …) Σ_k w_kc x_k / Σ_k w_kc with weights (K, C); 0 where they are all 0."""

    def mean(leaf: Tensor) -> Tensor:
        wide = leaf.to(tree.wide(leaf.dtype))  # half precision has too few digits for n
        return mixing.mean({"": torch.tensordot(weight.T.to(wide.dtype), wide, 1)}, weight.sum(0))[""].to(
            leaf.dtype
        )

    return tree.map_tensors(mean, slots)
