"""How a client finds its mixture: C logits of its own, learned from its losses, by gradient, or given.

Shared by every method that mixes C things (adapters, whole models); what is mixed is theirs.

The default, "em", is expectation-maximization with three additions that make it find the groups. Client k
measures ℓ_kc, its mean training loss with each of the C alone, on what the server sent, and takes

    π_kc ∝ exp(−(ℓ_kc − e_kc) / T + b_c) ,   T = τ D ,   D = Σ_k n_k (mean_c ℓ_kc − min_c ℓ_kc) / Σ_k n_k

so the temperature T is a fraction τ of how far the C are apart, whatever the unit of the loss. A run has three
phases; the first, exploring, lasts for a share of its rounds (`explore`) and the second as long:

    explore   b = −β ,  β_c ← β_c + log(C p_c), where p_c is the share of all examples routed to c: none is
              idle, none overfull, so that no group falls into the lap of another one's adapter.
              Where targets are labels, ℓ is the mean of 1 − exp(−loss), the probability of a wrong label, for
              of ten samples' cross-entropies the largest one or two decide.
              e_kc = λ Σ_y (n_ky / n_k) E_yc, where E is how much harder label y is for c than for the others,
              over all clients: a client with ten samples has labels by chance, and without this the C learn
              to tell sevens-and-ones from the rest. λ = min(1, 1 / R), R the clients' mean χ² of labels per
              degree of freedom: 1 if their labels differ by chance alone, so that where labels are what
              tells groups apart, they count. Towards the end of the phase b and e fade to 0.
    settle    b = log p: of two that serve a group equally well the one with more examples wins, so that
              spare ones die out instead of splitting a group (component annihilation, as in Figueiredo &
              Jain 2002) and C may be larger than the number of groups
    cool      T falls geometrically, to a COOLING-th at the end of the run: what is left of softness is an
              error floor

The server needs Σ n_k π_kc, Σ n_k (mean − min), Σ n_k, and by label Σ of losses, of counts and of χ²: sums over
clients, never one client's router or labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from umbel.clients import Batch, ClientData
from umbel.errors import ModelError, RecipeError
from umbel.methods.protocol import Population
from umbel.mixing import UNUSED_SHARE
from umbel.model.loss import FORWARD_EXAMPLES, Loss
from umbel.ranges import check_ranges
from umbel.tree import Params, broadcast, state, wide

S = TypeVar("S")

ONE_HOT_LOGIT = 1000.0  # softmax over logits this far apart is one-hot, to the last bit
SMALLEST_SHARE = 1e-6  # p_c below this count as this much, so that log p stays finite
COOLING = 20.0  # what T is divided by at the end of a run


@dataclass(frozen=True)
class Router:
    """Private logits θ → probs π = softmax(θ) on the simplex.

    kind:
        "em"        θ_c = −(ℓ_c − e_c) / T + b_c, as above.
        "gradient"  θ by SGD on the loss of the mixture, together with everything else, as in
                    Almansoori et al. 2025 §3, with U[0, noise) added to θ in training.
        "oracle"    θ one-hot on the client's true group: what routing is measured against.
    """

    kind: Literal["em", "gradient", "oracle"] = "em"
    temperature: float = 0.15  # τ, "em"
    examples: int = 64  # "em": on how many of its examples, at most, a client measures ℓ in a round; 0: all
    explore: float = (
        1 / 3
    )  # "em" (and floral's explore_rank): the share of the run; 0: no balance, centring, cooling
    lr: float = 0.1  # of θ, "gradient"
    noise: float = 1.0  # "gradient"
    noise_rounds: int = 100  # "gradient": over so many rounds the noise falls to 0; 0: never, as published

    def __post_init__(self) -> None:
        check_ranges(self, temperature="(0, inf)", lr="(0, inf)", explore="[0, 1]")
        check_ranges(self, noise="[0, inf)", noise_rounds="[0, inf)", examples="[0, inf)")

    def start(
        self, told: "Told", private: Tensor, losses: Callable[[], "LabelLosses"], data: ClientData
    ) -> tuple[Tensor, "Measured"]:
        """(K, C) logits that the clients train with, and what they add to the server's sums."""
        if self.kind != "em":
            return (told.oracle if self.kind == "oracle" else private), Measured.nothing(private)
        found = losses()
        shares = found.counts / found.counts.sum(1, keepdim=True)  # (K, Y)
        apart = found.mean - (shares.unsqueeze(2) * told.excess).sum(1)  # (K, C) ℓ − e
        spread = data.weight.to(apart.dtype) * (apart.mean(1) - apart.min(1).values)
        known = told.temperature.unsqueeze(1) > 0  # nothing is known of T in the first round
        logits = torch.where(known, told.bias - apart / told.temperature.unsqueeze(1), 0.0)
        measured = Measured(spread, found.sums, found.counts, chi_square(found.counts, told.frequency))
        return logits.to(private.dtype), measured

    def looked_at(self, data: ClientData) -> ClientData:
        """The examples on which losses are measured."""
        return data.some(self.examples, "routes")

    def settle(
        self, told: "Told", private: Tensor, losses: Callable[[], "LabelLosses"], data: ClientData
    ) -> Tensor:
        """(K, C) logits that the clients serve with; a client whose losses are not finite keeps its own."""
        logits, _ = self.start(told, private, losses, data)
        return torch.where(logits.isfinite().all(1, keepdim=True), logits, private)

    def noise_at(self, data: ClientData, num_routes: int, num_steps: int) -> Tensor | None:
        """(K, steps, C) noise for the training logits, None when there is none."""
        level = self.noise
        if self.noise_rounds:
            level *= max(0.0, 1 - (data.round - 1) / self.noise_rounds)
        if self.kind != "gradient" or level == 0:
            return None
        return level * data.draw("router", lambda own: torch.rand(num_steps, num_routes, generator=own))


@state
class Told:
    """What a client is told about routes."""

    oracle: Tensor  # (K, C) logits, or (K, 0) where routes are learned
    bias: Tensor  # (K, C) b
    temperature: Tensor  # (K,) T; 0 before the first round is over
    excess: Tensor  # (K, Y, C) λ E
    frequency: Tensor  # (K, Y) of the labels, among all examples
    exploring: Tensor  # (K,) 1 while routes are explored, else 0


@state
class Measured:
    """What a client adds to the sums behind T, E and λ; all of it 0 unless routes are found by losses."""

    spread: Tensor  # (K,) n (mean_c ℓ − min_c ℓ)
    label_losses: Tensor  # (K, Y, C) sums over the client's examples of that label
    label_counts: Tensor  # (K, Y)
    chi_square: Tensor  # (K,) of its label counts, given everyone's frequencies

    @staticmethod
    def nothing(logits: Tensor) -> "Measured":
        """For logits (K, …, C)."""
        num_clients, num_routes = logits.shape[0], logits.shape[-1]
        zero = logits.new_zeros(num_clients)
        return Measured(zero, logits.new_zeros(num_clients, 0, num_routes), logits.new_zeros(num_clients, 0), zero)


@state
class Routes:
    """What the server knows of all routes together."""

    oracle: Tensor  # (clients, C) logits, or (clients, 0)
    members: Tensor  # () clients that train
    round: Tensor  # () rounds done
    rounds: Tensor  # () of the whole run
    balance: Tensor  # (C,) β
    share: Tensor  # (C,) p
    spread: Tensor  # () D
    label_losses: Tensor  # (Y, C) running sums
    label_counts: Tensor  # (Y,)
    unevenness: Tensor  # () R

    @staticmethod
    def init(kind: str, num_routes: int, population: Population) -> "Routes":
        """Nothing known but, for an oracle, the groups.

        Raises:
            RecipeError: an oracle without known groups, or with fewer routes than groups.
        """
        oracle, group = torch.empty(population.num_clients, 0), population.group
        if kind == "oracle":
            if group is None:
                raise RecipeError("router.kind = 'oracle' needs a task with known groups; this one has none")
            if int(group.max()) >= num_routes:
                raise RecipeError(
                    f"the oracle needs at least {int(group.max()) + 1} to route to for the task's groups, "
                    f"got {num_routes}"
                )
            oracle = ONE_HOT_LOGIT * torch.nn.functional.one_hot(group, num_routes).float()
        even, zero = torch.full((num_routes,), 1 / num_routes), torch.zeros(())
        num_labels = population.num_labels if kind == "em" else 0
        labels = torch.zeros(num_labels, num_routes), torch.zeros(num_labels)
        members = torch.tensor(float(population.num_members or population.num_clients))
        rounds = torch.tensor(float(population.num_rounds))
        return Routes(oracle, members, zero, rounds, torch.zeros(num_routes), even, zero, *labels, torch.ones(()))

    def tell(self, router: Router, clients: Tensor) -> Told:
        """What these clients are told before they train."""
        explore = router.explore * self.rounds
        past = self.round / explore if router.explore else torch.full_like(self.round, 2.0)
        fade = torch.clamp(2 * (1 - past), min=0, max=1)
        prior = self.share.clamp(min=SMALLEST_SHARE).log()
        bias = torch.where(past < 1, -self.balance * fade, prior)
        cooling = (
            torch.clamp((past - 2) * router.explore / (1 - 2 * router.explore), 0, 1)
            if 0 < router.explore < 0.5
            else 0.0 * past
        )
        temperature = router.temperature * self.spread * COOLING**-cooling
        excess = fade / self.unevenness.clamp(min=1) * self._excess()
        frequency = self.label_counts / self.label_counts.sum().clamp(min=1)
        told = (bias, temperature, excess, frequency, (past < 1).to(past.dtype))
        return Told(self.oracle[clients], *(broadcast(leaf, len(clients)) for leaf in told))

    def exploring(self, router: Router) -> bool:
        """Whether the exploring phase is on."""
        return router.kind != "em" or bool(self.round < router.explore * self.rounds)

    def settled(self, router: Router) -> bool:
        """Whether routes have had as many rounds to settle as to explore."""
        return bool(self.round >= 2 * router.explore * self.rounds)

    def restarted(self, dead: Tensor) -> "Routes":
        """As if each of the `dead` (C,) had an even share, with no bias of its own."""
        even = torch.full_like(self.share, 1 / len(self.share))
        return replace(
            self, share=torch.where(dead, even, self.share), balance=torch.where(dead, 0.0, self.balance)
        )

    def _excess(self) -> Tensor:
        """(Y, C) E: by how much label y is harder for c than y is on the whole and than c is on the whole."""
        means = self.label_losses / self.label_counts.clamp(min=1e-6).unsqueeze(1)
        among = means - means.mean(1, keepdim=True)
        weight = (self.label_counts / self.label_counts.sum().clamp(min=1e-6)).unsqueeze(1)
        return among - (weight * among).sum(0)

    def after(self, router: Router, sums: dict[str, Any]) -> "Routes":
        """What is known after a round with these sums over its clients (`route_sums`).

        A round with a part of the clients tells as much less: means move by that part of the way.
        """
        part = sums["clients"] / self.members
        share = self.share + part * (sums["route_examples"] / sums["examples"] - self.share)
        if "spread" not in sums:  # routes are not found by losses
            return replace(self, round=self.round + 1, share=share.to(self.share.dtype))
        first = self.round == 0
        spread = sums["spread"] / sums["examples"]
        spread = torch.where(first, spread, self.spread + part * (spread - self.spread))
        losses, counts = (
            (1 - part) * old + sums[name]
            for name, old in (("label_losses", self.label_losses), ("label_counts", self.label_counts))
        )
        freedom = max(1, len(self.label_counts) - 1)
        uneven = sums["chi_square"] / sums["clients"] / freedom
        uneven = torch.where(first, 1.0, self.unevenness + part * (uneven - self.unevenness))
        balance = self.balance
        if self.exploring(router):
            balance = balance + part * (len(share) * share).clamp(min=1e-3).log()
            balance = balance - balance.mean()
        known = (leaf.to(self.round.dtype) for leaf in (balance, share, spread, losses, counts, uneven))
        return Routes(self.oracle, self.members, self.round + 1, self.rounds, *known)


@state
class LabelLosses:
    """The losses of K clients with C models, summed over each client's examples of each of Y labels."""

    sums: Tensor  # (K, Y, C)
    counts: Tensor  # (K, Y)

    @property
    def mean(self) -> Tensor:
        """(K, C) over all of a client's examples."""
        return self.sums.sum(1) / self.counts.sum(1, keepdim=True)


def losses_of(
    loss: Loss,
    candidates: Params,
    data: ClientData,
    num_labels: int = 1,
    private: Params | None = None,
    bounded: Tensor | None = None,
) -> LabelLosses:
    """Each client's losses with each of C models, in evaluation mode, without gradients.

    Args:
        loss: the module and its loss.
        candidates: the C models' tensors, leading axis C.
        data: the K clients' examples.
        num_labels: Y; 1 where targets are no class labels: then all examples have the same.
        private: tensors that are each client's own in all C models, leading axis K.
        bounded: (K,) whose losses are 1 − exp(−loss), for cross-entropy the probability of a wrong label;
            only where there are labels.
    """
    num_clients, num_candidates = len(data.clients), next(iter(candidates.values())).shape[0]
    some = next(iter(candidates.values()))
    kind = wide(some.dtype)  # half precision counts to 256 and no further
    sums = some.new_zeros(num_clients * num_labels, num_candidates, dtype=kind)
    counts = some.new_zeros(num_clients * num_labels, dtype=kind)
    first = torch.arange(num_clients, device=some.device).unsqueeze(1) * num_labels
    together = num_clients > 1 and not private
    with torch.no_grad():
        for batch in data.in_order(data.fitting(FORWARD_EXAMPLES)):
            label = batch.y if num_labels > 1 else 0
            place = (first + label).expand(batch.y.shape[:2]).flatten()
            weight = (
                torch.ones_like(place, dtype=kind) if batch.weight is None else batch.weight.to(kind).flatten()
            )
            values = None
            if together and batch.x.dim() != 5:  # of images many models at once are slower than one by one
                try:
                    values = _at_once(loss, candidates, batch)
                except ModelError:  # a layer that cannot be stacked
                    together = False
            if values is None:
                values = _one_by_one(loss, candidates, batch, private or {})
            if bounded is not None and num_labels > 1:
                own = (bounded > 0).unsqueeze(1).expand(batch.y.shape[:2]).reshape(-1, 1)
                values = torch.where(own & values.isfinite(), -torch.expm1(-values), values)
            sums.index_add_(0, place, values.to(kind) * weight.unsqueeze(1))
            counts.index_add_(0, place, weight)
    return LabelLosses(sums.view(num_clients, num_labels, -1), counts.view(num_clients, num_labels))


def _one_by_one(loss: Loss, candidates: Params, batch: Batch, private: Params) -> Tensor:
    """(K·B, C) losses of a batch, one model after the other; clients without tensors of their own in a row."""
    x, y = batch.x, batch.y
    if not private:
        x, y = (part.flatten(0, 1).unsqueeze(0) for part in (x, y))
    num_clients = x.shape[0]
    columns = []
    for c in range(next(iter(candidates.values())).shape[0]):
        own = {name: leaf[c].expand(num_clients, *leaf.shape[1:]) for name, leaf in candidates.items()}
        columns.append(loss.per_example(loss.outputs(own | private, x), y).flatten())
    return torch.stack(columns, 1)


def _at_once(loss: Loss, candidates: Params, batch: Batch) -> Tensor:
    """(K·B, C) losses of a batch: all models see the same examples, those of all clients in a row."""
    num_candidates = next(iter(candidates.values())).shape[0]
    x, y = (part.flatten(0, 1).expand(num_candidates, -1, *part.shape[2:]) for part in (batch.x, batch.y))
    return loss.per_example(loss.outputs(candidates, x), y).T


def chi_square(counts: Tensor, frequency: Tensor) -> Tensor:
    """(K,) Σ_y (n_y − n f_y)² / (n f_y) of label counts (K, Y) against frequencies (K, Y)."""
    expected = counts.sum(1, keepdim=True) * frequency
    return torch.where(expected > 0, (counts - expected).square() / expected.clamp(min=1e-6), 0.0).sum(1)


def moved_share(route_examples: Tensor, examples: Tensor, guard: float) -> Tensor:
    """g_c = min(1, p_c / τ), how far each of the C, or of their ranks, moves to its mean; 0 where unused."""
    share = route_examples / examples
    step = (share / guard).clamp(max=1.0) if guard else torch.ones_like(share)
    return torch.where(share > UNUSED_SHARE, step, 0.0)


def bounded_claims(upload: S, heaviest: float) -> S:
    """The upload with nothing in it that a client says of itself beyond what one client can be.

    What a client claims steers the others' routes as much as its tensors do theirs: examples, routes, and what was
    measured for the em router. Claims are made positive and cut to so many times the round's median; no client
    has more examples routed than it has examples. Of honest clients the largest lose weight, nothing else changes.

    Args:
        upload: all of a round; its fields `weight`, `route_examples` and `measured`, if any, mean the same in
            every method.
        heaviest: how many times the median; 0: claims are only made positive and consistent.
    """
    has = {field.name for field in fields(upload)}  # type: ignore[arg-type]
    given: Any = upload
    bounded: dict[str, Any] = {}
    if "weight" in has:
        bounded["weight"] = _capped(given.weight, heaviest)
    if "route_examples" in has:
        routed = given.route_examples.clamp(min=0)
        whole, most = routed.sum(-1, keepdim=True), bounded["weight"].view(-1, *[1] * (routed.dim() - 1))
        # What is too much by rounding alone stays as it is.
        bounded["route_examples"] = torch.where(whole > most * (1 + 1e-5), routed * (most / whole), routed)
    if "measured" in has:
        claimed = given.measured
        examples = claimed.label_counts.clamp(min=0).sum(1)
        rarely = (_capped(examples, heaviest) / examples.clamp(min=1e-6)).unsqueeze(1)
        counts = claimed.label_counts.clamp(min=0) * rarely
        each = claimed.label_losses.clamp(min=0) / claimed.label_counts.clamp(min=1e-6).unsqueeze(2)
        usual = _usual((each * counts.unsqueeze(2)).sum(1).mean(1) / counts.sum(1).clamp(min=1e-6))
        most = heaviest * usual if heaviest and bool(usual > 0) else each.max() if each.numel() else usual
        per_example = claimed.spread / given.weight.clamp(min=1e-6)
        bounded["measured"] = Measured(
            _capped(per_example, heaviest) * bounded["weight"],
            each.clamp(max=most) * counts.unsqueeze(2),
            counts,
            _capped(claimed.chi_square, heaviest),
        )
    return replace(upload, **bounded)  # type: ignore[type-var]


def _capped(claims: Tensor, heaviest: float) -> Tensor:
    """(K,) claims that are not negative, none of them more than so many times the median."""
    claims = claims.clamp(min=0)
    usual = _usual(claims)
    return claims.clamp(max=heaviest * usual) if heaviest and bool(usual > 0) else claims


def _usual(claims: Tensor) -> Tensor:
    return claims.median() if claims.numel() else claims.sum()


def route_sums(weight: Tensor, route_examples: Tensor, measured: Measured) -> dict[str, Tensor]:
    """The sums over clients that `Routes.after` needs, from (K,) n, (K, …, C) n π and what was measured."""
    sums = {
        "examples": weight.sum(),
        "route_examples": route_examples.sum(0),
        "clients": torch.ones_like(weight).sum(),
    }
    if not measured.label_counts.shape[1]:  # routes are not found by losses
        return sums
    return sums | {name: leaf.sum(0) for name, leaf in vars(measured).items()}
