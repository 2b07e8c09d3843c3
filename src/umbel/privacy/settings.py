"""How much a run may tell, and how it is kept from telling more: the recipe's table [privacy]."""

from dataclasses import dataclass, field
from typing import Literal

from umbel.errors import RecipeError


@dataclass(frozen=True)
class Privacy:
    """What is protected, with how much noise, until which ε (docs/privacy.md).

    Attributes:
        level: "client" clips what each client adds to the sums and puts noise on the sums; "example" clips every
            example's gradient and puts noise on each client's own steps.
        epsilon: the run ends before it would spend more; 0: it may spend any.
        delta: at which ε is told.
        noise_multiplier: z, noise by what one client (example) can change; 0: the planned rounds spend `epsilon`.
        sampling: how a round's clients are drawn, where not all take part: "poisson", each by itself, or "fixed",
            so many. Both are accounted for as what they are.
        clip: C, the longest that one client's part of a group of tensors, or one example's gradient, may be.
        clips: the same for single groups, by their names in the sums ("base", "adapters", "route_examples", …).
        clip_rate: clips of groups follow a quantile of lengths, by this much a round (Andrew et al. 2021); 0: no.
        quantile: the share of clients whose part is to be no longer than the clip.
        clip_rise: the share of the run in which clips of the model's tensors may rise; from then on they only
            fall. Noise makes steps longer, and clips that followed it would make noise larger.
        clip_share: of the budget (in 1 / z²) goes to finding the quantiles.
        statistics_share: of it goes to sums that are no tensors of the model: routes, losses by label.
    """

    level: Literal["none", "client", "example"] = "none"
    epsilon: float = 0.0
    delta: float = 1e-5
    noise_multiplier: float = 0.0
    sampling: Literal["poisson", "fixed"] = "poisson"
    clip: float = 1.0
    clips: dict[str, float] = field(default_factory=dict)
    clip_rate: float = 0.2
    quantile: float = 0.5
    clip_rise: float = 0.2
    clip_share: float = 0.1
    statistics_share: float = 0.1

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.noise_multiplier < 0 or not 0 < self.delta < 1:
            raise RecipeError("privacy: epsilon and noise_multiplier must not be negative, and delta in (0, 1)")
        if self.level != "none" and not self.epsilon and not self.noise_multiplier:
            raise RecipeError(
                "privacy: give epsilon, which the planned rounds shall spend, or noise_multiplier, or both"
            )
        if self.clip <= 0 or any(clip <= 0 for clip in self.clips.values()) or self.clip_rate < 0:
            raise RecipeError("privacy: clip and clips must be positive, and clip_rate at least 0")
        if not 0 <= self.clip_rise <= 1:
            raise RecipeError("privacy: clip_rise is a share of the run, from 0 to 1")
        if not all(0 < share < 1 for share in (self.quantile, self.clip_share, self.statistics_share)):
            raise RecipeError("privacy: quantile, clip_share and statistics_share must be in (0, 1)")
        if self.clip_share + self.statistics_share >= 1:
            raise RecipeError("privacy: clip_share and statistics_share leave nothing for the model; lower them")
