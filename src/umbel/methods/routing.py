"""How a client finds its mixture: C logits of its own, learned by gradient, by its losses, or given.

Shared by every method that mixes C things (adapters, whole models); what is mixed is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umbel.clients import ClientData
from umbel.errors import RecipeError

ONE_HOT_LOGIT = 100.0  # softmax over logits this far apart is one-hot in float32


@dataclass(frozen=True)
class Router:
    """Private logits θ → probs π = softmax(θ) on the simplex.

    kind:
        "em"        θ_c = −β · n · ℓ_c: how well each of the C alone explains the client's n examples
                    (ℓ_c nats per example), measured on what the server sent, before training on it.
        "gradient"  θ by SGD on the loss of the mixture, together with everything else, as in
                    Almansoori et al. 2025 §3, with U[0, noise) added to θ in training.
        "oracle"    θ one-hot on the client's true group: the bound of what routing can give.
    """

    kind: Literal["em", "gradient", "oracle"] = "em"
    sharpness: float = 1.0  # β of "em", the inverse temperature
    lr: float = 0.1  # of θ, "gradient" only
    noise: float = 1.0  # "gradient" only
    noise_rounds: int = 100  # the noise falls linearly to 0 over so many rounds; 0: it never falls, as published

    def __post_init__(self) -> None:
        if self.sharpness <= 0 or self.lr <= 0 or self.noise < 0 or self.noise_rounds < 0:
            raise RecipeError(f"router: sharpness and lr must be positive, noise not negative, got {self}")

    def start(self, given: Tensor, private: Tensor, losses: Callable[[], Tensor], data: ClientData) -> Tensor:
        """(K, C) logits that the clients train with."""
        if self.kind == "oracle":
            return given
        if self.kind == "gradient":
            return private
        scores = -self.sharpness * data.num_examples.unsqueeze(1) * losses()
        return scores - scores.mean(1, keepdim=True)

    def noise_at(self, data: ClientData, num_routes: int, num_steps: int) -> Tensor | None:
        """(K, steps, C) noise for the training logits, None when there is none."""
        level = self.noise
        if self.noise_rounds:
            level *= max(0.0, 1 - (data.round - 1) / self.noise_rounds)
        if self.kind != "gradient" or level == 0:
            return None
        return level * data.draw("router", lambda own: torch.rand(num_steps, num_routes, generator=own))


def oracle_logits(kind: str, group: Tensor | None, num_routes: int, num_clients: int) -> Tensor:
    """(clients, C) one-hot logits of the true groups for the oracle, (clients, 0) for routers that learn.

    Raises:
        RecipeError: an oracle without known groups, or with fewer routes than groups.
    """
    if kind != "oracle":
        return torch.empty(num_clients, 0)
    if group is None:
        raise RecipeError("router.kind = 'oracle' needs a task with known groups; this one has none")
    if int(group.max()) >= num_routes:
        raise RecipeError(
            f"the oracle needs at least {int(group.max()) + 1} routes for the task's groups, got {num_routes}"
        )
    return ONE_HOT_LOGIT * torch.nn.functional.one_hot(group, num_routes).float()
