"""Trust-weighted collaboration: every client mixes its adapter with those that it trusts.

Wagner, Fan, Jaggi 2024, Personalized Collaborative Fine-Tuning for On-Device Large Language Models,
https://arxiv.org/abs/2404.09753

    client    φ_i ← local training on f_i from φ_i
    sent      φ_i ; with "predictions" also p_i, its answers on the public inputs
    W         softmax of each row of s / T ,  s_ij by "weights", "validation" or "predictions" (similarity.py)
    mixed     φ_i ← Σ_j W_ij φ_j , for all at once

φ is a low-rank adapter and all else that is trained. The server holds every φ and computes W, but for
"validation": there a client receives all φ_j, finds ℓ_ij, its loss with φ_j on examples that it keeps from
training, and mixes for itself when it next comes, or is served. Departures: docs/methods.md.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from umbel import tree
from umbel.adapters import AdapterPlan, Bank, with_paths
from umbel.clients import ClientData
from umbel.errors import RecipeError, RoundError
from umbel.methods import lora, similarity, trusting
from umbel.methods.protocol import Population, Refusals
from umbel.methods.settling import choose, settled
from umbel.methods.similarity import Public
from umbel.methods.trusting import Mix, Topology, figures_of, usable
from umbel.mixing import Change
from umbel.model.loss import Loss, running_stats
from umbel.ranges import check_ranges
from umbel.seeds import generator
from umbel.train import MOMENTS, Groups, LocalTraining, local_train, no_moments
from umbel.tree import Params, state

LOG = logging.getLogger(__name__)
ALIKE = 0.1  # nats, the least T of divergences: models that are hardly this far apart differ by chance
TRAINED = ("base", "adapter", "head")  # the first two are φ, with "stats", BatchNorm's running statistics


@state
class Shared:
    held: Groups  # (clients, …) φ
    trust: Tensor  # (clients, clients) W, the rows of the last mix
    heard: Tensor  # (clients,) int64 the round of a client's last upload; 0: never
    predictions: Params  # (clients, M, k) on the public inputs
    predicted: Tensor  # (clients,) int64 the round they are of; 0: none yet
    linked: Tensor  # (clients, clients) bool, who may listen to whom
    group: Tensor  # (clients,) int64 the hidden truth, for figures; (0,) where there is none
    likeness: Tensor  # (clients, clients) D Dᵀ, for the oracle; (0, 0) for all others
    round: Tensor  # () int64 rounds done
    figures: dict[str, Tensor]
    bank: Bank
    public: Public | None


@state
class Message:
    own: Groups  # (K, …) φ_i
    everyone: Groups  # (K, clients, …) in its place every φ_j, where clients mix for themselves
    listens: Tensor  # (K, clients) bool to whom; (K, 0) where the server has mixed
    trust: Tensor  # (K, clients) the client's row of W
    client: Tensor  # (K,) int64 who this is
    bank: Bank
    public: Public | None


@state
class Private:
    moments: Params  # (K, …) of AdamW
    head: Params  # (K, …) `personal` tensors of the base
    seen: Tensor  # (K,) 0 before the client's first round, 1 after it


@state
class Served:
    """What a client has mixed for itself."""

    mixed: Groups  # (K, …)
    head: Params  # (K, …)
    trust: Tensor  # (K, clients)


@state
class Upload:
    adapters: Groups  # (K, …) φ_i
    predictions: Params  # (K, M, k)
    trust: Tensor  # (K, clients) the row that the client has found; (K, 0) if the server does
    client: Tensor  # (K,) int64 who this is
    loss: Tensor  # (K,)


@dataclass(frozen=True)
class Trust:
    """every client mixes its adapter with those of the clients that it trusts (Wagner et al. 2024).

    Attributes:
        scheme: what trust is made of; "oracle" trusts by D Dᵀ of the clients' true categories, a client's group
            evenly where each has one; "uniform" everyone, "none" itself.
        mode: "paper" has the published formulas at T = 1, "umbel" ours.
        temperature: T of "umbel": in cosines, in units of the loss, or as a share of a row's mean divergence,
            but 0.1 nats at least; 0: the scheme's own, 0.3 of "validation" and 0.1 of the others.
        threshold: lower scores are left out, but for the two highest.
        top_k: so many are trusted; 0: all.
        topology: who may listen to whom; or the edges, pairs of clients.
        self_weight: a client trusts itself so much at least.
        staleness: an adapter of so many rounds ago is still used.
        begin: the first round after which there is mixing.
        every: so many rounds from one mixing to the next.
        mix: "factors" A and B one by one; only "A" or only "B", the other stays; "product" the mean of B A.
        trust_fraction: the share of its examples on which a client measures ℓ_ij and does not train, whatever the
            scheme, so that all schemes train on the same; 0: none.
        top: so many probabilities of a prediction are sent; 0: all.
        keep_moments: AdamW goes on from round to round, whatever is mixed.
        shared_start: all begin with the same A.
        freeze_base: nothing but the adapter is trained.
        personal: patterns of trained tensors that stay with the client and are mixed with nobody's.
    """

    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    local: LocalTraining = field(default_factory=LocalTraining)
    scheme: Literal["weights", "validation", "predictions", "none", "uniform", "oracle"] = "validation"
    mode: Literal["umbel", "paper"] = "umbel"
    temperature: float = 0.0
    threshold: float = float("-inf")
    top_k: int = 0
    topology: Topology = "full"
    self_weight: float = 0.0
    staleness: int = 0
    begin: int = 4
    every: int = 1
    mix: Mix = "factors"
    trust_fraction: float = 0.1
    top: int = 100
    keep_moments: bool = True
    shared_start: bool = True
    freeze_base: bool = False
    personal: tuple[str, ...] = ()
    mixes_clients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, temperature="[0, inf]", self_weight="[0, 1]", trust_fraction="[0, 1)")
        check_ranges(self, threshold="[-inf, inf]", top_k="[0, inf)", staleness="[0, inf)", top="[0, inf)")
        check_ranges(self, begin="[1, inf)", every="[1, inf)")
        if self.mode == "paper" and (self.temperature or self.top != Trust.top):
            raise RecipeError(
                "trust: mode = 'paper' has T = 1 and a top of its own; leave temperature and top out"
            )
        if self.scheme == "validation" and self.trust_fraction == 0:
            raise RecipeError("trust: scheme = 'validation' measures on trust_fraction, which must not be 0")

    @property
    def refuses(self) -> Refusals:
        return {
            "sum": "whom a client trusts is found by comparing single adapters",
            "mean": "every client has a mean of its own, by its own trust",
            "own_labels": "scheme = 'predictions' compares answers on inputs whose task nobody knows"
            if self.scheme == "predictions"
            else "",
        }

    def mixes(self, round: int) -> bool:
        """Whether there is mixing after this round."""
        return round >= self.begin and (round - self.begin) % self.every == 0

    def bank(self, module: nn.Module) -> Bank:
        """The plan of the adapter."""
        return self.adapter.bank(module, self.local.batch_size, self.freeze_base, self.personal)

    def adapt(self, module: nn.Module) -> nn.Module:
        return with_paths(module, self.bank(module))

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Private]:
        num_clients, bank = population.num_clients, self.bank(module)
        if self.scheme != "none" and population.num_rounds < self.begin:
            LOG.warning(
                "trust: nothing is ever mixed, for there are rounds = %s and the first mixing is after round %s; "
                "raise rounds, or lower begin",
                population.num_rounds,
                self.begin,
            )
        linked = trusting.linked_of(self.scheme, self.topology, population)
        public, predictions = None, {}
        if self.scheme == "predictions":
            public = similarity.public_of(module, population, self.mode == "paper", self.top)
            predictions = similarity.no_answers(public, next(module.parameters()).dtype, num_clients)
        base, adapter = lora.start(module, bank, self.freeze_base, population, self.personal)
        head = tree.broadcast(lora.parted(module, self.freeze_base, self.personal)[1], 1)
        stats = {name: leaf.detach().clone() for name, leaf in running_stats(module).items()}
        held = tree.broadcast({"base": base, "adapter": adapter, "stats": stats}, num_clients)
        if not self.shared_start:
            apart = bank.init(num_clients, generator(population.seed, "adapters"), 0.0)
            held["adapter"] = {name: apart[name].to(leaf).unsqueeze(1) for name, leaf in adapter.items()}
        never = torch.zeros(num_clients, dtype=torch.long)
        group = population.group if population.group is not None else torch.empty(0, dtype=torch.long)
        trust, rounds = torch.eye(num_clients), torch.zeros((), dtype=torch.long)
        likeness = trusting.likeness_of(population) if self.scheme == "oracle" else torch.empty(0, 0)
        known = trust, never, predictions, never.clone(), linked, group, likeness, rounds
        figures = figures_of(trust, group, never)
        shared = Shared(tree.map_tensors(torch.clone, held), *known, figures, bank, public)
        kept = self.keep_moments and self.local.optimizer == "adamw"
        first = {part: {name: leaf[:1] for name, leaf in held[part].items()} for part in ("base", "adapter")}
        return shared, Private(no_moments(first | {"head": head}) if kept else {}, head, torch.zeros(1))

    def send(self, shared: Shared, clients: Tensor) -> Message:
        who, size = clients.to(shared.trust.device), len(clients)
        own: Groups = tree.rows(shared.held, who)
        everyone: Groups = {part: {} for part in own}
        listens = torch.empty(size, 0, dtype=torch.bool, device=who.device)
        if self.scheme == "validation":
            due = trusting.due_of(shared.heard, int(shared.round), self.begin, self.every, self.staleness)[who]
            if bool(due.any()) or int(shared.round) == 0:
                own, everyone, listens = everyone, tree.broadcast(shared.held, size), shared.linked[who] & due
        return Message(own, everyone, listens, shared.trust[who], who, shared.bank, shared.public)

    def trains(self, counts: np.ndarray) -> np.ndarray:
        """(K,) on how many of so many examples a client trains."""
        held = [trusting.num_held(count, self.trust_fraction, self.local.batch_size) for count in counts.tolist()]
        trained: np.ndarray = counts - np.array(held, dtype=counts.dtype)
        return trained

    def later(self, shared: Shared) -> list[Shared]:
        """Shareds whose messages have other tensors than the first one's: where no mix is due."""
        return [replace(shared, round=torch.ones_like(shared.round))] if self.scheme == "validation" else []

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        train, served = self._split(data)[0], self._mixed(loss, message, private, data)
        start = {**self._served(message, served), "head": private.head, MOMENTS: private.moments}
        trained, mean_loss = local_train(
            lambda groups, batch, _step: loss(model_of(message.bank, groups, gates=True), batch),
            start if private.moments else {part: leaf for part, leaf in start.items() if part != MOMENTS},
            train,
            self.local,
            dict.fromkeys(TRAINED, self.local.lr),
        )
        kept, head = trained.pop(MOMENTS, {}), trained.pop("head")
        predictions = {}
        if message.public and (self.mixes(data.round) or data.round == 1):
            if self.mode == "umbel" and loss.name != "cross_entropy":
                raise RecipeError("trust: predictions are probabilities; with this loss, take mode = 'paper'")
            predictions = similarity.predicted(loss, model_of(message.bank, trained) | head, message.public)
        found = served.trust if isinstance(served, Served) else message.trust[:, :0]
        return Upload(trained, predictions, found, message.client, mean_loss), Private(
            kept, head, torch.ones_like(private.seen)
        )

    def contribution(self, upload: Upload) -> dict[str, Any]:
        return {}  # no sum over clients will do

    def server_update(self, shared: Shared, uploads: Iterable[Upload]) -> Shared:
        new = tree.map_tensors(torch.clone, replace(shared, round=shared.round + 1))
        for upload in uploads:
            who = upload.client
            tree.map_tensors(lambda old, row: old.index_copy_(0, who, row), new.held, upload.adapters)  # noqa: B023
            new.heard[who] = new.round
            for name, rows in upload.predictions.items():
                new.predictions[name][who] = rows
                new.predicted[who] = new.round
            if upload.trust.shape[1]:
                new.trust[who] = upload.trust
        if self.scheme != "validation" and self.mixes(int(new.round)):
            self._mix(new)
        return replace(new, figures=figures_of(new.trust, new.group, new.heard))

    def changed(self, upload: Upload, message: Message, change: Change) -> Upload:
        received, all_alike = self._served(message, None), torch.ones_like(upload.loss)
        adapters = {part: change(made, received[part], all_alike) for part, made in upload.adapters.items()}
        return replace(upload, adapters=adapters)

    def settle(self, loss: Loss, message: Message, private: Any, data: ClientData) -> Any:
        """What a client that mixes for itself makes of what it received; a head for those never seen."""
        if private.head:
            private = settled(self, loss, message, private, data)
        return self._mixed(loss, message, private, data)

    def _mixed(self, loss: Loss, message: Message, private: Private, data: ClientData) -> Any:
        """What a client that mixes for itself makes of what it received."""
        if not message.listens.shape[1]:
            return private
        head = private.head
        held = tree.map_tensors(lambda leaf: leaf[0], message.everyone)
        scores = -similarity.cross_losses(loss, model_of(message.bank, held), self._split(data)[1], head)
        if self.mode == "paper":
            scores = -(-scores.double()).exp()
        weights = self._weights(scores, message.listens, message.client).to(message.trust.dtype)
        mixed = Served(trusting.combined(message.bank, held, weights, message.client, self.mix), head, weights)
        return choose(message.listens.any(1), mixed, Served(self._served(message, None), head, message.trust))

    def personalize(self, message: Message, private: Any) -> Params:
        own: Params = private.head
        return model_of(message.bank, self._served(message, private)) | own

    def mixture(self, message: Message, private: Any) -> Tensor:
        return private.trust if isinstance(private, Served) else message.trust

    def _served(self, message: Message, private: Any) -> Groups:
        """(K, …) φ_i, mixed if the client has done that."""
        if isinstance(private, Served):
            return private.mixed
        if not message.listens.shape[1]:
            return message.own
        place = torch.arange(len(message.client), device=message.client.device)
        return tree.map_tensors(lambda leaf: leaf[place, message.client], message.everyone)

    def _mix(self, new: Shared) -> None:
        """Mixes for this round's clients, in place; who was never there follows all whom it may listen to."""
        stamp = new.predicted if self.scheme == "predictions" else new.heard
        fresh = usable(stamp, int(new.round), self.staleness)
        some = fresh.nonzero().squeeze(1)
        scores = new.trust.new_zeros(len(fresh), len(fresh), dtype=torch.float64)
        scores[some.unsqueeze(1), some] = self._scores(new, some).to(scores)
        if bool(scores.isnan().any()):
            who = int(scores.isnan().sum(1).argmax())
            raise RoundError(
                f"trust: client {who}'s adapter is so large that it cannot be compared; lower local.lr"
            )
        rows = ((new.heard == new.round) | (new.heard == 0)).nonzero().squeeze(1)
        allowed, never = new.linked[rows] & fresh, new.heard[rows] == 0
        weights = self._weights(scores[rows], allowed, rows).to(new.trust.dtype)
        weights[never] = trusting.trust_of(scores[rows][never], allowed[never], rows[never], 1.0).to(weights)
        mixed = trusting.combined(new.bank, new.held, weights, rows, self.mix)
        tree.map_tensors(lambda old, row: old.index_copy_(0, rows, row), new.held, mixed)
        new.trust[rows] = weights

    def _scores(self, new: Shared, some: Tensor) -> Tensor:
        """(n, n) s of these clients."""
        if self.scheme == "weights":
            adapters = {name: leaf[some, 0] for name, leaf in new.held["adapter"].items()}
            if self.mode == "paper":
                return similarity.row_cosines(new.bank, adapters)
            # A seed that all have begun with makes nobody alike; without one all products begin at zero.
            seeded = new.bank.seeds and self.shared_start
            begun = new.bank.init(1, generator(0, "adapters"), 0.0) if seeded else None
            return similarity.product_cosines(new.bank, adapters, begun)
        if self.scheme == "predictions" and new.public is not None:
            answers = tree.rows(new.predictions, some)
            if self.mode == "umbel":
                return -similarity.divergences(answers, new.public.num_labels)
            return similarity.published_scores(similarity.logit_distances(answers, new.public.num_labels))
        if self.scheme == "oracle":
            return new.likeness[some.unsqueeze(1), some].log()
        return torch.zeros(len(some), len(some))  # all whom it may listen to are alike

    def _weights(self, scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
        """(K, clients) rows of W."""
        temperature: Tensor | float = 1.0
        if self.mode == "umbel" and self.scheme != "oracle":
            if self.scheme in ("weights", "predictions"):
                scores = trusting.nearest_for_own(scores, allowed, own)
            temperature = self.temperature or (0.3 if self.scheme == "validation" else 0.1)
            if self.scheme == "predictions":
                temperature = (temperature * trusting.mean_size(scores, allowed, own)).clamp(min=ALIKE)
        return trusting.trust_of(scores, allowed, own, temperature, self.threshold, self.top_k, self.self_weight)

    def _split(self, data: ClientData) -> tuple[ClientData, ClientData]:
        """What the clients train on, and what they measure losses on."""
        return trusting.split(data, self.trust_fraction, self.local.batch_size)


def model_of(bank: Bank, groups: Groups, gates: bool = False) -> Params:
    """The tensors of K clients' models with their φ (K, …), and heads that are there; `gates` see `mix`."""
    return lora.adapted(bank, groups["base"], groups["adapter"], gates) | groups["stats"] | groups.get("head", {})
