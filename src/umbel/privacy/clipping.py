"""The sum of clipped contributions with noise on it, of which no client can change much.

    v_k = (v_kg)_g      what client k adds to the sums, in groups g: how far its tensors have moved, and what it
                        measured; what it counts is 1, and the number of clients is not told
    v̂_kg = v_kg min(1, C_g / ‖v_kg‖)
    Σ_k v̂_kg + N(0, (z_g C_g)²)          McMahan et al. 2018, https://arxiv.org/abs/1710.06963
    C_g ← C_g exp(−η (b_g − γ)) ,  b_g = ½ + (Σ_k (1[‖v_kg‖ ≤ C_g] − ½) + N(0, σ_b²)) / m
                                           Andrew et al. 2021, Algorithm 1, https://arxiv.org/abs/1905.03871

with m the number of clients that take part on average, by which sums are divided whoever does. All groups together
are one Gaussian mechanism of multiplier z, for Σ_g 1 / z_g² + Σ_g 1 / (2 σ_b)² = 1 / z².
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from umbel import tree
from umbel.privacy.settings import Privacy
from umbel.ranges import check_groups
from umbel.seeds import generator, normal
from umbel.tree import Params

COUNTS = ("weight", "examples", "clients")  # sums that count clients; with the rule "one" each adds 1
WITHIN = "within"  # the group that says which of the others were no longer than their clip


@dataclass(frozen=True)
class Groups:
    """What is clipped together, and how much noise goes on it, in units of its clip."""

    values: tuple[str, ...]  # tensors of the model
    statistics: tuple[str, ...]  # everything else
    value_noise: float  # z_g
    statistics_noise: float
    within_noise: float  # σ_b; 0: clips stay

    @property
    def names(self) -> tuple[str, ...]:
        """All groups."""
        return (*self.values, *self.statistics)

    def noise(self, name: str) -> float:
        """z_g of a group."""
        return self.value_noise if name in self.values else self.statistics_noise


def groups_of(contribution: dict[str, Any], privacy: Privacy) -> Groups:
    """The groups of contributions like this one: a group for each part of the model and for each other sum."""
    kept = {name: leaf for name, leaf in contribution.items() if name not in COUNTS and _numbers(leaf)}
    values = tuple(name for name, leaf in kept.items() if not isinstance(leaf, Tensor))
    statistics = tuple(name for name in kept if name not in values)
    of_clips = privacy.clip_share if privacy.clip_rate else 0.0
    of_statistics = privacy.statistics_share if statistics else 0.0
    z = privacy.noise_multiplier
    return Groups(
        values,
        statistics,
        z * sqrt(len(values) / (1 - of_clips - of_statistics)),
        z * sqrt(len(statistics) / of_statistics) if statistics else 0.0,
        z * sqrt(len(kept) / of_clips) / 2 if of_clips else 0.0,
    )


def first_clips(groups: Groups, privacy: Privacy) -> Params:
    """C_g before the first round.

    Raises:
        RecipeError: the settings name another group.
    """
    check_groups("privacy.clips", privacy.clips, groups.names)
    return {
        name: torch.tensor(privacy.clips.get(name, privacy.clip), dtype=torch.float64) for name in groups.names
    }


def clipped(contribution: dict[str, Any], groups: Groups, clips: Params) -> dict[str, Any]:
    """One client's part of the sums: every group cut to its clip, and which of them were not longer."""
    found: dict[str, Any] = {}
    within = []
    for name in groups.names:
        length = norm(contribution[name])
        factor = (clips[name] / length.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        found[name] = tree.map_tensors(lambda leaf: (leaf.double() * factor).to(leaf.dtype), contribution[name])  # noqa: B023
        within.append((length <= clips[name]).double() - 0.5)
    return found | ({WITHIN: torch.stack(within)} if groups.within_noise else {})


def noised(
    sums: dict[str, Any],
    groups: Groups,
    clips: Params,
    seed: int | None,
    round: int,
    slack: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The sums of `clipped` with noise.

    Args:
        sums: over the round's clients.
        groups: their groups.
        clips: C_g of this round.
        seed: of the run, from which a simulation draws its noise, which repeats and is no secret; None: the noise
            is the operating system's.
        round: this one.
        slack: by how much rounding may have lengthened one client's part, by group.
    """
    found = {}
    for name in groups.names:
        draw = None if seed is None else generator(seed, "privacy", round, name)
        spread = groups.noise(name) * (float(clips[name]) + (slack or {}).get(name, 0.0))
        found[name] = tree.map_tensors(lambda leaf: _with_noise(leaf, spread, draw), sums[name])  # noqa: B023
    if groups.within_noise:
        draw = None if seed is None else generator(seed, "privacy", round, WITHIN)
        spread = groups.within_noise * (1 + 2 * (slack or {}).get(WITHIN, 0.0))
        found[WITHIN] = _with_noise(sums[WITHIN], spread, draw)
    return found


def divided(sums: dict[str, Any], groups: Groups, like: dict[str, Any], expected: float) -> dict[str, Any]:
    """The noised sums as a method takes them: with the fixed number of clients, and no statistic below 0."""
    counts = {name: torch.full_like(leaf, expected) for name, leaf in like.items() if name in COUNTS}
    statistics = {name: sums[name].clamp(min=0) for name in groups.statistics}
    empty = {name: leaf for name, leaf in like.items() if name not in COUNTS and not _numbers(leaf)}
    return {**empty, **{name: sums[name] for name in groups.values}, **statistics, **counts}


def next_clips(
    sums: dict[str, Any], groups: Groups, clips: Params, privacy: Privacy, expected: float, run: float
) -> Params:
    """C_g for the next round, when this share of the run is over; from `clip_rise` on the model's only fall."""
    if not groups.within_noise:
        return clips
    share = 0.5 + sums[WITHIN].double() / expected
    steps = torch.exp(-privacy.clip_rate * (share - privacy.quantile))
    following = {name: clips[name] * steps[place] for place, name in enumerate(groups.names)}
    # What is counted and measured has units of its own and may take longer; noise does not make it larger.
    falling = groups.values if run > privacy.clip_rise else ()
    return following | {name: torch.minimum(following[name], clips[name]) for name in falling}


def norm(part: Any) -> Tensor:
    """() the length of all tensors of a part together, in double precision."""
    squares = [leaf.double().square().sum() for leaf in tree.tensors({"": part}).values()]
    return torch.stack(squares).sum().sqrt()


def _with_noise(leaf: Tensor, spread: float, draw: torch.Generator | None) -> Tensor:
    noise = normal(leaf.shape, draw, torch.float64)
    return (leaf.double() + spread * noise.to(leaf.device)).to(leaf.dtype)


def _numbers(leaf: Any) -> int:
    return sum(tensor.numel() for tensor in tree.tensors({"": leaf}).values())
