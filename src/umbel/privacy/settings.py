"""How much a run may tell, and how it is kept from telling more: the recipe's table [privacy]."""

from dataclasses import dataclass, field
from typing import Literal

from umbel.errors import RecipeError
from umbel.ranges import check_ranges


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
        clips: of a client's part, the same for single groups, by their names in the sums ("base", "adapters",
            "route_examples", …).
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
        check_ranges(self, epsilon="[0, inf)", noise_multiplier="[0, inf)", delta="(0, 1)")
        check_ranges(self, clip="(0, inf)", clips="(0, inf)", clip_rate="[0, inf)", clip_rise="[0, 1]")
        check_ranges(self, quantile="(0, 1)", clip_share="(0, 1)", statistics_share="(0, 1)")
        for name in ("epsilon", "noise_multiplier"):
            if self.level == "none" and getattr(self, name):
                raise RecipeError(
                    f"privacy: {name} = {getattr(self, name)}, but level = 'none' protects nobody; add "
                    "privacy.level = 'client' or 'example'"
                )
        if self.level == "example" and self.clips:
            raise RecipeError(
                "privacy: clips are of groups of the sums, and level = 'example' cuts whole gradients; give clip "
                "in their place"
            )
        if self.level != "none" and not self.epsilon and not self.noise_multiplier:
            raise RecipeError(
                "privacy: give epsilon, which the planned rounds shall spend, or noise_multiplier, or both"
            )
        if self.clip_share + self.statistics_share >= 1:
            raise RecipeError("privacy: clip_share and statistics_share leave nothing for the model; lower them")
