"""How a client finds its mixture: C logits of its own, learned from its losses, by gradient, or given.

Shared by every method that mixes C things (adapters, whole models); what is mixed is theirs.

The default, "em", is expectation-maximization with two additions that make it find the groups. Client k
measures ℓ_kc, its mean training loss with each of the C alone, on what the server sent, and takes

    π_kc ∝ exp(−ℓ_kc / T + b_c) ,   T = τ D ,   D = Σ_k n_k (mean_c ℓ_kc − min_c ℓ_kc) / Σ_k n_k

so the temperature T is a fraction τ of how far the C are apart, whatever the unit of the loss; once twice
the balance rounds are over it falls as 1 / round, for what is left of softness is an error floor. The bias b
comes from the server and depends on p_c, the share of all examples routed to c:

    balance   b = −β for the first rounds, β_c ← β_c + log(C p_c): none is idle, none overfull, so that
              no group falls into the lap of another one's adapter; then b fades to 0
    prior     b = log p from then on: of two that serve a group equally well the one with more examples
              wins, so that spare ones die out instead of splitting a group (component annihilation, as
              in Figueiredo & Jain 2002) and C may be larger than the number of groups

The server needs Σ n_k π_kc, Σ n_k (mean − min) and Σ n_k: sums over clients, never one client's router.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.model.loss import Loss
from umbel.tree import Params, broadcast, state

ONE_HOT_LOGIT = 1000.0  # softmax over logits this far apart is one-hot, to the last bit
UNUSED_SHARE = 1e-30  # p_c below this is nobody: a mean of so little is rounding error
EVALUATION_BATCH = 8192  # examples in one forward pass without gradients, of all stacked clients together
SMALLEST_SHARE = 1e-6  # p_c below this count as this much, so that log p stays finite


@dataclass(frozen=True)
class Router:
    """Private logits θ → probs π = softmax(θ) on the simplex.

    kind:
        "em"        θ_c = −ℓ_c / T + b_c, as above.
        "gradient"  θ by SGD on the loss of the mixture, together with everything else, as in
                    Almansoori et al. 2025 §3, with U[0, noise) added to θ in training.
        "oracle"    θ one-hot on the client's true group: what routing is measured against.
    """

    kind: Literal["em", "gradient", "oracle"] = "em"
    temperature: float = 0.15  # τ, "em"
    balance_rounds: int = 50  # "em": held for the first half, then fading; 0: no balance and no cooling
    lr: float = 0.1  # of θ, "gradient"
    noise: float = 1.0  # "gradient"
    noise_rounds: int = 100  # "gradient": over so many rounds the noise falls to 0; 0: never, as published

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.lr <= 0:
            raise RecipeError(f"router: temperature and lr must be positive, got {self}")
        if self.noise < 0 or self.noise_rounds < 0 or self.balance_rounds < 0:
            raise RecipeError(f"router: noise, noise_rounds and balance_rounds must not be negative, got {self}")

    def start(
        self, told: "Told", private: Tensor, losses: Callable[[], Tensor], data: ClientData
    ) -> tuple[Tensor, Tensor]:
        """(K, C) logits that the clients train with, and (K,) what they add to Σ n D."""
        nothing = torch.zeros_like(private[:, 0])
        if self.kind == "oracle":
            return told.oracle, nothing
        if self.kind == "gradient":
            return private, nothing
        apart = losses()
        spread = data.num_examples * (apart.mean(1) - apart.min(1).values)
        known = told.temperature.unsqueeze(1) > 0  # nothing is known of T in the first round
        logits = torch.where(known, told.bias - apart / told.temperature.unsqueeze(1), 0.0)
        return logits.to(private.dtype), spread.to(private.dtype)

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


@state
class Routes:
    """What the server knows of all routes together."""

    oracle: Tensor  # (clients, C) logits, or (clients, 0)
    round: Tensor  # () rounds done
    balance: Tensor  # (C,) β
    share: Tensor  # (C,) p
    spread: Tensor  # () D

    @staticmethod
    def init(kind: str, num_routes: int, num_clients: int, group: Tensor | None) -> "Routes":
        """Nothing known but, for an oracle, the groups.

        Raises:
            RecipeError: an oracle without known groups, or with fewer routes than groups.
        """
        oracle = torch.empty(num_clients, 0)
        if kind == "oracle":
            if group is None:
                raise RecipeError("router.kind = 'oracle' needs a task with known groups; this one has none")
            if int(group.max()) >= num_routes:
                raise RecipeError(
                    f"the oracle needs at least {int(group.max()) + 1} to route to for the task's groups, "
                    f"got {num_routes}"
                )
            oracle = ONE_HOT_LOGIT * torch.nn.functional.one_hot(group, num_routes).float()
        even = torch.full((num_routes,), 1 / num_routes)
        return Routes(oracle, torch.zeros(()), torch.zeros(num_routes), even, torch.zeros(()))

    def tell(self, router: Router, clients: Tensor) -> Told:
        """What these clients are told before they train."""
        past = self.round / max(1, router.balance_rounds)
        if past < 1:
            bias = -self.balance * torch.clamp(2 * (1 - past), max=1)
        else:
            bias = self.share.clamp(min=SMALLEST_SHARE).log()
        cooled = torch.clamp(past / 2, min=1) if router.balance_rounds else 1
        temperature = router.temperature * self.spread / cooled
        return Told(self.oracle[clients], *(broadcast(leaf, len(clients)) for leaf in (bias, temperature)))

    def after(self, router: Router, sums: dict[str, Any]) -> "Routes":
        """What is known after a round with these sums over its clients (`route_sums`).

        A round with a part of the clients tells as much less: means move by that part of the way.
        """
        part = sums["clients"] / self.oracle.shape[0]
        share = self.share + part * (sums["route_examples"] / sums["examples"] - self.share)
        spread = sums["spread"] / sums["examples"]
        spread = torch.where(self.round == 0, spread, self.spread + part * (spread - self.spread))
        balance = self.balance
        if self.round < router.balance_rounds:
            balance = balance + part * (len(share) * share).clamp(min=1e-3).log()
            balance = balance - balance.mean()
        return Routes(self.oracle, self.round + 1, balance, share, spread)


def losses_of(loss: Loss, candidates: Params, data: ClientData, private: Params | None = None) -> Tensor:
    """(K, C) each client's mean loss with each of C models, in evaluation mode, without gradients.

    Args:
        loss: the module and its loss.
        candidates: the C models' tensors, leading axis C.
        data: the K clients' examples.
        private: tensors that are each client's own in all C models, leading axis K.
    """
    num_clients, num_candidates = len(data.clients), next(iter(candidates.values())).shape[0]
    dtype = next(iter(candidates.values())).dtype
    sums = torch.zeros(num_clients, num_candidates, dtype=dtype, device=data.examples.x.device)
    one_by_one = num_clients == 1 or private
    with torch.no_grad():
        for batch in data.in_order(max(1, EVALUATION_BATCH // num_clients)):
            weight = 1 if batch.weight is None else batch.weight
            if one_by_one:
                for c in range(num_candidates):
                    own = {n: leaf[c].expand(num_clients, *leaf.shape[1:]) for n, leaf in candidates.items()}
                    values = loss.per_example(loss.outputs(own | (private or {}), batch.x), batch.y)
                    sums[:, c] += (values * weight).sum(1)
                continue
            # All candidates see the same examples, those of all clients in a row.
            x, y = (part.flatten(0, 1).expand(num_candidates, -1, *part.shape[2:]) for part in (batch.x, batch.y))
            values = loss.per_example(loss.outputs(candidates, x), y).unflatten(1, batch.y.shape[:2])
            sums += (values * weight).sum(2).T
    return sums / data.num_examples.unsqueeze(1)


def moved_share(sums: dict[str, Any], guard: float) -> Tensor:
    """(C,) g_c = min(1, p_c / τ), how far towards its new mean each of the C moves; 0 where nobody used it."""
    share = sums["route_examples"] / sums["examples"]
    step = (share / guard).clamp(max=1.0) if guard else torch.ones_like(share)
    return torch.where(share > UNUSED_SHARE, step, 0.0)


def route_sums(num_examples: Tensor, route_examples: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """The sums over clients that `Routes.after` needs, from (K,) n, (K, C) n π and (K,) n (mean − min)."""
    return {
        "examples": num_examples.sum(),
        "route_examples": route_examples.sum(0),
        "spread": spread.sum(),
        "clients": torch.ones_like(num_examples).sum(),
    }
