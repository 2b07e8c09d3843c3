"""Threshold clustering: a client follows the mean update of clients whose updates are like its own.

Werner et al. 2023, Provably Personalized and Robust Federated Learning, Algorithms 2 and 3,
https://arxiv.org/abs/2306.08393

    client    x_k ← x_k − η v_{c(k)}                        its own model, one and the same at the start
              m_k ← (1 − α) m_k + α (x_k − local SGD on f_k from x_k)
    sent      m_k, n_k;  kept: x_k
    server    for a few iterations, for each of C centres:
                  τ_c ← the `quantile` of the clients' distances ‖m_k − v_c‖
                  v_c ← Σ_k n_k (m_k if ‖m_k − v_c‖ ≤ τ_c else v_c) / Σ_k n_k
              c(k) ← argmin_c ‖m_k − v_c‖

Centres go on from one round to the next. They start at updates far from each other: the one farthest from the
mean, then always the one farthest from all that are taken. The server looks at every single upload and knows
everybody's cluster; who was never trained has none, and serves a round's training of x_0. With
`updates_since = "start"` the updates are x_0 − x, counted from the first model, and x_k ← x_0 − η v: then models
are clustered. Departures: docs/methods.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import tree
from umbel.clients import ClientData
from umbel.methods.protocol import Population, Refusals
from umbel.methods.settling import choose, stacked
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats, trained_params
from umbel.ranges import check_ranges
from umbel.train import Groups, LocalTraining, local_train
from umbel.tree import Params, state


@state
class Shared:
    centres: Params  # leading axis C, v
    cluster: Tensor  # (clients,) int64 c(k); −1 for clients that were never trained


@state
class Message:
    push: Params  # (K, …) v of the client's cluster; 0 for a client without one
    route: Tensor  # (K, C) one-hot, which cluster that is; zeros for a client without one


@state
class Private:
    model: Params  # (K, …) x at the start of its last round, or x_0
    stats: Params  # running statistics of BatchNorm layers
    decayed: Params  # (1 − α) m, what the next m starts from; empty at α = 1


@state
class Upload:
    momentum: Params  # (K, …) m
    weight: Tensor  # (K,) n
    client: Tensor  # (K,) int64, who this is
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class ThresholdClustering:
    num_clusters: int = 4  # C
    quantile: float = 0.25  # the share of clients that are near enough to a centre; 1: all of them
    iterations: int = 2
    alpha: float = 0.5  # α; 1: no momentum
    step: float = 1.0  # η
    updates_since: Literal["round", "start"] = "round"  # "start": models are clustered, not updates
    local: LocalTraining = field(default_factory=LocalTraining)
    refuses: ClassVar[Refusals] = {
        "sum": "clusters are found from single updates, and clipped by how far each lies",
        "mean": "it clusters single uploads, and what lies far from a centre counts nothing there already",
    }

    def __post_init__(self) -> None:
        check_ranges(self, num_clusters="[1, inf)", iterations="[1, inf)", step="(0, inf)")
        check_ranges(self, quantile="[0, 1]", alpha="(0, 1]")

    def adapt(self, module: nn.Module) -> nn.Module:
        return module

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        model = trained_params(module)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        zeros = {name: torch.zeros_like(leaf) for name, leaf in model.items()}
        centres = {name: leaf.repeat(self.num_clusters, *[1] * leaf.dim()) for name, leaf in zeros.items()}
        private = Private(model, stats, zeros if self.alpha < 1 else {})
        return Shared(centres, torch.full((population.num_clients,), -1)), tree.broadcast(private, 1)

    def send(self, shared: Shared, clients: Tensor) -> Message:
        cluster = shared.cluster[clients]
        some = next(iter(shared.centres.values()))
        route = F.one_hot(cluster.clamp(min=0), self.num_clusters) * (cluster >= 0).unsqueeze(1)
        push = {n: torch.tensordot(route.to(leaf.dtype), leaf, 1) for n, leaf in shared.centres.items()}
        return Message(push, route.to(some.dtype))

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        model = self._moved(message, private)
        trained, mean_loss = self._trained(loss, model, private, data)
        origin = private.model if self.updates_since == "start" else model
        momentum = {name: self.alpha * (leaf - trained["model"][name]) for name, leaf in origin.items()}
        momentum = {n: leaf + private.decayed[n] if private.decayed else leaf for n, leaf in momentum.items()}
        decayed = {n: (1 - self.alpha) * leaf for n, leaf in momentum.items()} if self.alpha < 1 else {}
        client = torch.from_numpy(data.clients).to(mean_loss.device)
        return Upload(momentum, data.weight, client, mean_loss), Private(origin, trained["stats"], decayed)

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {}  # no sum over clients will do

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        every = list(uploads)
        order = torch.cat([upload.client for upload in every]).argsort()
        joined = tree.map_tensors(lambda *leaves: torch.cat(leaves)[order], *every)
        points, share = flat(joined.momentum), joined.weight / joined.weight.sum()
        begun = bool((shared.cluster >= 0).any())
        centres = flat(shared.centres) if begun else far_apart(points, share, self.num_clusters)
        for _ in range(self.iterations):
            centres = torch.stack([within_reach(centre, points, share, self.quantile) for centre in centres])
        nearest = torch.stack([(points - centre).norm(dim=1) for centre in centres], 1).argmin(1)
        widths = [leaf[0].numel() for leaf in shared.centres.values()]
        pieces = zip(shared.centres.items(), centres.split(widths, 1), strict=True)
        return Shared(
            {name: piece.reshape(leaf.shape) for (name, leaf), piece in pieces},
            shared.cluster.index_copy(0, joined.client, nearest),
        )

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        return replace(upload, momentum=change(upload.momentum, message.push, upload.weight))

    def settle(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Private:
        """With what a round of its own makes of x_0, where a client was never trained: it has no cluster."""
        never = ~message.route.any(1)
        if not bool(never.any()):
            return private

        def work(_: Message, private: Private, data: ClientData) -> Private:
            trained = self._trained(loss, private.model, private, data)[0]
            return replace(private, model=trained["model"], stats=trained["stats"])

        made = stacked(work, loss, message, private, data, self.local.batch_size, private)
        found: Private = choose(never & tree.finite_rows(made), made, private)
        return found

    def _trained(self, loss: Loss, model: Params, private: Private, data: ClientData) -> tuple[Groups, Tensor]:
        """The model and its running statistics after a round of local SGD, and the mean loss (K,)."""
        return local_train(
            lambda groups, batch, _step: loss(groups["model"] | groups["stats"], batch),
            {"model": model, "stats": private.stats},
            data,
            self.local,
            {"model": self.local.lr},
        )

    def personalize(self, message: Message, private: Private) -> Params:
        return self._moved(message, private) | private.stats

    def mixture(self, message: Message, private: Private) -> Tensor:
        return message.route

    def _moved(self, message: Message, private: Private) -> Params:
        """The tensors x − η v of the client's model."""
        return {name: leaf - self.step * message.push[name] for name, leaf in private.model.items()}


def flat(tensors: Params) -> Tensor:
    """(rows, numbers in a row) all tensors side by side."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tensors.values()], 1)


def within_reach(centre: Tensor, points: Tensor, share: Tensor, quantile: float) -> Tensor:
    """The mean of the points, the centre itself in place of those that are too far away."""
    distance = (points - centre).norm(dim=1)
    near = distance <= distance.quantile(quantile, interpolation="nearest")
    moved: Tensor = centre + (share * near).to(points.dtype) @ (points - centre)
    return moved


def far_apart(points: Tensor, share: Tensor, num_centres: int) -> Tensor:
    """Points that are far from each other, the first one far from the mean."""
    distance = (points - share.to(points.dtype) @ points).norm(dim=1)
    chosen = [points[distance.argmax()]]
    distance = (points - chosen[0]).norm(dim=1)
    for _ in range(1, num_centres):
        chosen.append(points[distance.argmax()])
        distance = torch.minimum(distance, (points - chosen[-1]).norm(dim=1))
    return torch.stack(chosen)
