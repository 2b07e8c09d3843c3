"""The server's step from its tensors towards the clients' mean: plain, with momentum, or adaptive.

    Δ ← mean − x                                   the pseudo-gradient
    sgd        x ← x + η Δ                                              (η = 1: FedAvg)
    momentum   v ← μ v + Δ ,  x ← x + η v                               Hsu et al. 2019, FedAvgM
    adam       m ← β₁ m + (1 − β₁) Δ ,  v ← β₂ v + (1 − β₂) Δ² ,        Reddi et al. 2021, Algorithm 2
    yogi       m as adam's ,  v ← v − (1 − β₂) Δ² sign(v − Δ²) ,
               x ← x + η m / (√v + ε) ,  v₀ = ε²

With `bias_correction` m and v are divided by 1 − β₁ᵗ and 1 − β₂ᵗ and v₀ = 0, which makes adam that of
Kingma & Ba 2015 on −Δ (what Almansoori et al. 2025 use on CIFAR-100).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umbel import mixing
from umbel.ranges import check_ranges
from umbel.tree import Params, state


@state
class Moments:
    """What an optimizer remembers of earlier rounds; empty for plain steps."""

    first: Params
    second: Params
    rounds: Tensor  # () how many steps were taken


@dataclass(frozen=True)
class ServerOptimizer:
    """How the server moves; with the defaults its tensors become the clients' mean."""

    kind: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    lr: float = 1.0  # η; of adam and yogi how far a number moves in a round, about: begin with 0.01
    momentum: float = 0.9  # μ
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-3  # ε, Reddi et al.'s τ
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, lr="(0, inf)", eps="(0, inf)", momentum="[0, 1)", beta1="[0, 1)", beta2="[0, 1)")

    def init(self, params: Params) -> Moments:
        """The moments before the first round."""
        zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        start = 0.0 if self.bias_correction else self.eps**2
        second = {name: torch.full_like(leaf, start) for name, leaf in params.items()}
        adaptive = self.kind in ("adam", "yogi")
        return Moments({} if self.kind == "sgd" else zeros, second if adaptive else {}, torch.zeros(()))

    def step(
        self, old: Params, mean: Params, moments: Moments, share: Params | Tensor | float = 1.0
    ) -> tuple[Params, Moments]:
        """The new tensors and moments.

        Args:
            old: the server's tensors.
            mean: the clients' mean of each.
            moments: of `old`.
            share: how much of the way to the mean counts, a number in [0, 1] or one for each adapter (C,), or
                along further leading axes, for all tensors or by name.
                Where it is 0 (nobody used the adapter, its mean means nothing) old stays, bit for bit.
        """
        count = moments.rounds + 1
        mean = {name: mean[name].to(leaf.dtype) for name, leaf in old.items()}
        shares = share if isinstance(share, dict) else dict.fromkeys(old, share)
        target = {
            name: mixing.step_to({name: x}, {name: mean[name]}, shares[name])[name] for name, x in old.items()
        }
        if self.kind == "sgd":
            return mixing.step_to(old, target, self.lr), Moments({}, {}, count)
        new, first, second = {}, {}, {}
        for name, leaf in old.items():
            part = mixing.as_leading(torch.as_tensor(shares[name], dtype=leaf.dtype, device=leaf.device), leaf)
            if self.kind == "momentum":
                first[name] = push = self.momentum * moments.first[name] + (target[name] - leaf)
            else:  # whose steps do not know how long Δ is: it is the step that is shortened
                delta = torch.where(part > 0, mean[name] - leaf, 0.0)
                first[name] = self.beta1 * moments.first[name] + (1 - self.beta1) * delta
                second[name] = self._second(moments.second[name], delta.square())
                push = part * self._adaptive(first[name], second[name], count)
            new[name] = torch.where(part > 0, leaf + self.lr * push, leaf)
        return new, Moments(first, second, count)

    def _second(self, old: Tensor, square: Tensor) -> Tensor:
        if self.kind == "adam":
            return self.beta2 * old + (1 - self.beta2) * square
        return old - (1 - self.beta2) * square * (old - square).sign()

    def _adaptive(self, first: Tensor, second: Tensor, count: Tensor) -> Tensor:
        if self.bias_correction:
            past = count.double()  # 1 − 0.999 has three digits fewer than 0.999
            first = first / (1 - self.beta1**past).to(first.dtype)
            second = second / (1 - self.beta2**past).to(second.dtype)
        return first / (second.sqrt() + self.eps)
