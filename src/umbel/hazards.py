"""What may go wrong in a round, and what the server does about it: settings only.

    [faults]    clients that never start, uploads that come too late or damaged      (faults.py)
    [attack]    clients that send what was made to do harm                           (attacks.py)
    [robust]    what stands in for the weighted mean of uploads                      (robust.py)
    [asynchronous]    no deadline: the server steps when enough uploads are in       (clock.py)

They are read without NumPy and PyTorch.
"""

from dataclasses import dataclass
from typing import Literal

from umbel.errors import RecipeError
from umbel.ranges import check_ranges

Damage = Literal["nan", "inf", "huge", "bit_flip", "truncated"]
EVERY_DAMAGE: tuple[Damage, ...] = ("nan", "inf", "huge", "bit_flip", "truncated")


@dataclass(frozen=True)
class Faults:
    """What happens by accident, drawn for each client and round by the run's seed.

    Attributes:
        drop_out: the share of a round's clients that were chosen and never start: nothing of theirs changes.
        straggle: the share of the others whose upload comes after the deadline and is left out. They have
            trained and keep what a client keeps.
        corrupt: the share of the uploads in time that are damaged on the way, likewise.
        kinds: how they are damaged, drawn evenly: a thousandth of the numbers (one at least) become NaN,
            infinite, 10³⁰ times as large or have one bit flipped; or the upload is cut short.
        outlier: with `corrupt`, uploads are left out of which a group of model tensors is so many times as long as
            the round's median; they are held until all are in. 0: only NaN and infinity are looked for.
        quorum: a round of which a smaller share of the chosen clients sends something of use leaves the server
            as it was.
    """

    drop_out: float = 0.0
    straggle: float = 0.0
    corrupt: float = 0.0
    kinds: tuple[Damage, ...] = EVERY_DAMAGE
    outlier: float = 10.0
    quorum: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, drop_out="[0, 1]", straggle="[0, 1]", corrupt="[0, 1]", quorum="[0, 1]")
        if self.corrupt and not self.kinds:
            raise RecipeError(f"faults.kinds is empty, so nothing can be corrupt; name some of {EVERY_DAMAGE}")
        if self.outlier and self.outlier <= 1:
            raise RecipeError(f"faults.outlier is how many times the median, above 1 or 0, got {self.outlier}")

    @property
    def any(self) -> bool:
        """Whether anything can go wrong."""
        return max(self.drop_out, self.straggle, self.corrupt) > 0


@dataclass(frozen=True)
class Attack:
    """What hostile clients do; who they are is drawn by the run's seed. Figures are of the others only.

    kind, with x what the client would send, u what it had received, s the strength:
        "sign_flip"   u − s (x − u)                                Li et al. 2019, https://arxiv.org/abs/1811.03761
        "scale"       u + s (x − u)                                Bagdasaryan et al. 2020, model replacement
        "gaussian"    u + noise, s times as long as x − u          Blanchard et al. 2017, §5
        "label_flip"  an honest x of labels L − 1 − y              Fang et al. 2020
        "backdoor"    u + s (x − u) of data of which half has a patch in a corner and label 0; where there are
                      adapters, in the client's heaviest alone, and all else is as received
        "claim_all"   "sign_flip", and s times all its examples are said to be routed to each adapter
    """

    kind: Literal["none", "sign_flip", "scale", "gaussian", "label_flip", "backdoor", "claim_all"] = "none"
    share: float = 0.2  # of the clients that train
    strength: float = 5.0  # s

    def __post_init__(self) -> None:
        check_ranges(self, share="[0, 1)", strength="(0, inf)")


@dataclass(frozen=True)
class Robust:
    """What stands in for the mean of each group of tensors: the base, and each adapter or cluster by itself.

    rule, its sample weights those of the mean (n_k, or n_k π_kc for adapter c):
        "median"            of each number                          Yin et al. 2018, Algorithm 1
        "trimmed_mean"      of each number, without the share `hostile` at both ends      the same
        "geometric_median"  of a group as one vector                Pillutla et al. 2019, RFA
        "krum"              the upload that is nearest to others    Blanchard et al. 2017
        "multi_krum"        the mean of the share 1 − `hostile` that is nearest to others
        "norm_bound"        the mean of steps cut to `bound` times their median length    Sun et al. 2019
    hostile: the share of the weight that may be hostile.
    heaviest: a client counts at most so many times as much as the round's median client; 0: what it claims.
    """

    rule: Literal["none", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "norm_bound"] = (
        "none"
    )
    hostile: float = 0.25
    bound: float = 1.0
    heaviest: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.hostile < 0.5:
            raise RecipeError(
                f"robust.hostile must be in [0, 0.5), for no rule withstands a majority, got {self.hostile}"
            )
        check_ranges(self, bound="(0, inf)")
        if self.heaviest and self.heaviest < 1:
            raise RecipeError(f"robust.heaviest must be at least 1, or 0 for no bound, got {self.heaviest}")


@dataclass(frozen=True)
class Asynchronous:
    """Rounds without a deadline, on a simulated clock: `clients_per_round` train at the same time.

    Attributes:
        buffer: B, after so many uploads the server steps, which counts as a round; 0: rounds wait for everyone.
        power: p, an upload of s steps ago counts (1 + s)^−p.
        spread: the standard deviation of the logarithm of how long a client takes.
    """

    buffer: int = 0
    power: float = 0.5
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, buffer="[0, inf)", power="[0, inf)", spread="[0, inf)")
