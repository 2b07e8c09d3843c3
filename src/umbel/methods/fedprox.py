"""FedProx: FedAvg whose clients are held to the server's model by a spring (Li et al. 2020, Algorithm 2).

"Federated Optimization in Heterogeneous Networks", https://arxiv.org/abs/1812.06127

    client    w_k ← local SGD on f_k(w) + μ/2 ‖w − wᵗ‖² from wᵗ, the server's model
    server    as FedAvg

The running statistics of BatchNorm layers are no part of w in the norm. With μ = 0 this is FedAvg.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from umbel.clients import Batch
from umbel.errors import RecipeError
from umbel.methods.fedavg import FedAvg, Message
from umbel.methods.protocol import Refusals
from umbel.model.loss import Loss
from umbel.ranges import check_ranges
from umbel.train import Groups, LocalTraining, Objective
from umbel.tree import Params


@dataclass(frozen=True)
class FedProx(FedAvg):
    mu: float = 0.01  # μ
    refuses: ClassVar[Refusals] = {"steps": ""}

    def __post_init__(self) -> None:
        check_ranges(self, mu="[0, inf)")
        check_spring("mu", self.mu, "local.lr", self.local.lr, self.local)

    def objective(self, loss: Loss, message: Message) -> Objective:
        """The client's loss and the spring."""
        return proximal(super().objective(loss, message), message.params, self.mu)


def proximal(objective: Objective, centre: Params, strength: float) -> Objective:
    """The objective + strength/2 ‖w − centre‖² with w the group "params"."""
    if strength == 0:
        return objective

    def held(groups: Groups, batch: Batch, step: int) -> Tensor:
        return objective(groups, batch, step) + strength / 2 * squared_distance(groups["params"], centre)

    return held


def check_spring(name: str, strength: float, rate_name: str, rate: float, local: LocalTraining) -> None:
    """Refuse a spring strength/2 ‖w − centre‖² that pulls w further past its centre at every step.

    Gradient descent on it alone, with momentum β, converges while rate · strength < 2 (1 + β).

    Raises:
        RecipeError: the product is too large.
    """
    most = 2 * (1 + local.momentum)
    if local.optimizer == "sgd" and rate * strength >= most:
        raise RecipeError(
            f"{name} = {strength:g} with {rate_name} = {rate:g}: every step along the spring would end further "
            f"from its centre; lower one of them until their product is below {most:g}"
        )


def squared_distance(one: Params, other: Params) -> Tensor:
    """(K,) ‖one − other‖² over all tensors of a client."""
    parts: list[Any] = [(leaf - other[name]).square().reshape(len(leaf), -1).sum(1) for name, leaf in one.items()]
    total: Tensor = sum(parts)
    return total
