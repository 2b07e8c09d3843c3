"""What a run has spent: ε at the chosen δ, by dp-accounting's Rényi accountant.

    all clients take part         Gaussian, of multiplier z
    each drawn by itself          the same, subsampled by Poisson      neighbours: with or without one client
    so many drawn                 subsampled without replacement       neighbours: one client for another; what one
                                                                       can change is then twice the clip, so z / 2

For examples the draws are Poisson's within one client, and every round that a client takes part in is counted;
that others did not know whether it took part is not made use of. What is told is the largest ε of any client.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from umbel.errors import RecipeError
from umbel.privacy.settings import Privacy


@dataclass(frozen=True)
class Mechanism:
    """A Gaussian mechanism on a random part of a population."""

    drawn: float  # how many take part on average
    of: int  # how many
    fixed: bool = False  # whether it is always the same number

    def event(self, multiplier: float) -> Any:
        """One use of it, as dp-accounting describes it."""
        import dp_accounting as dp

        if self.drawn >= self.of:
            return dp.GaussianDpEvent(multiplier)
        if self.fixed:
            return dp.SampledWithoutReplacementDpEvent(
                self.of, round(self.drawn), dp.GaussianDpEvent(multiplier / 2)
            )
        return dp.PoissonSampledDpEvent(self.drawn / self.of, dp.GaussianDpEvent(multiplier))

    def accountant(self) -> Any:
        """An accountant that has seen nothing yet."""
        import dp_accounting as dp
        from dp_accounting.rdp import RdpAccountant

        relations = dp.NeighboringRelation
        replaced = self.fixed and self.drawn < self.of
        return RdpAccountant(
            neighboring_relation=relations.REPLACE_ONE if replaced else relations.ADD_OR_REMOVE_ONE
        )


@dataclass(frozen=True)
class Use:
    """How often each mechanism of a run has been used after each round, for one client (of many alike)."""

    mechanism: Mechanism
    times: Sequence[int]  # after rounds 1, 2, …


@dataclass(frozen=True)
class Ledger:
    """The settings with the noise they come to, and ε after every round of the run."""

    privacy: Privacy
    epsilons: tuple[float, ...]  # after rounds 1, 2, …
    last_round: int  # before `privacy.epsilon` would be exceeded

    def figures(self, round: int) -> dict[str, float]:
        """What a round's figures say of it."""
        return {"epsilon": self.epsilons[round - 1], "delta": self.privacy.delta}


def ledger_of(privacy: Privacy, uses: Sequence[Use]) -> Ledger:
    """The ledger of a run whose clients use these mechanisms so often; ε is that of the worst.

    Raises:
        RecipeError: the budget does not last for one round, or δ is too large to mean anything.
    """
    for use in uses:
        if privacy.delta * use.mechanism.of >= 1:
            raise RecipeError(
                f"privacy.delta = {privacy.delta:g} with {use.mechanism.of} to protect: telling everything about "
                f"one of them would do; choose a delta far below {1 / use.mechanism.of:.2g}"
            )
    with _quiet():
        if not privacy.noise_multiplier:
            of_each = [
                _multiplier(use.mechanism, use.times[-1], privacy.epsilon, privacy.delta)
                for use in uses
                if use.times[-1]
            ]
            privacy = replace(privacy, noise_multiplier=max(of_each))
        epsilons = _epsilons(privacy, uses)
    budget = privacy.epsilon * (1 + 1e-6) if privacy.epsilon else float("inf")
    last = sum(epsilon <= budget for epsilon in epsilons)
    if not last:
        raise RecipeError(
            f"privacy.epsilon = {privacy.epsilon:g} is spent before the first round ends ({epsilons[0]:.3g}); "
            "raise it or noise_multiplier, or leave noise_multiplier out to have it computed"
        )
    return Ledger(privacy, epsilons, last)


def _epsilons(privacy: Privacy, uses: Sequence[Use]) -> tuple[float, ...]:
    from dp_accounting.rdp import compute_epsilon

    worst = [0.0] * len(uses[0].times)
    for use in uses:
        orders, once = _divergences(use.mechanism, privacy.noise_multiplier)
        for place, times in enumerate(use.times):
            if times:
                spent = float(compute_epsilon(orders, times * once, privacy.delta)[0])
                worst[place] = max(worst[place], spent)
    return tuple(worst)


@cache
def _divergences(mechanism: Mechanism, multiplier: float) -> tuple[Any, Any]:
    """Orders, and the Rényi divergences of one use at them, which add up; to find them takes longest of all."""
    accountant = mechanism.accountant()
    accountant.compose(mechanism.event(multiplier))
    return accountant.orders, accountant.rdp


@cache
def _multiplier(mechanism: Mechanism, times: int, epsilon: float, delta: float) -> float:
    """The z with which so many uses spend ε at δ."""
    import dp_accounting as dp

    found = dp.calibrate_dp_mechanism(
        mechanism.accountant,
        lambda multiplier: dp.SelfComposedDpEvent(mechanism.event(multiplier), times),
        epsilon,
        delta,
        bracket_interval=dp.LowerEndpointAndGuess(1e-3, 1.0),
        tol=1e-4,
    )
    return float(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the accountant's lines about orders that it leaves out: ε is a minimum over those that are left."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
