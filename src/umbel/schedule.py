"""How long a run lasts, with how many clients, and how often it is looked at."""

from dataclasses import MISSING, dataclass, field, fields

from umbel.errors import RecipeError
from umbel.hazards import Asynchronous, Attack, Faults, Robust
from umbel.privacy.settings import Privacy
from umbel.ranges import check_ranges
from umbel.secure.settings import Secure
from umbel.weighting import Weighting


@dataclass(frozen=True)
class Schedule:
    """How long, with whom, and how often to look."""

    rounds: int = 100
    clients_per_round: int = 0  # 0: all of them
    evaluate_every: int = 1  # rounds; the last one is always evaluated
    checkpoint_every: int = 25  # rounds; the last one always has a checkpoint
    pool: bool = False  # the slots of one owner train as one client
    held_out: float = 0.0  # the share of clients that never train, to be onboarded later
    validation: float = 0.0  # the share of a client's training examples tested on instead of its test data
    weighting: Weighting = field(default_factory=Weighting)  # how much each client counts
    faults: Faults = field(default_factory=Faults)  # what happens by accident
    attack: Attack = field(default_factory=Attack)  # what hostile clients do
    robust: Robust = field(default_factory=Robust)  # what stands in for the mean of uploads
    asynchronous: Asynchronous = field(default_factory=Asynchronous)  # no deadline
    secure: Secure = field(default_factory=Secure)  # whether single contributions are masked
    privacy: Privacy = field(default_factory=Privacy)  # how much a run may tell of one client or example
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, rounds="[1, inf)", evaluate_every="[1, inf)", checkpoint_every="[1, inf)")
        check_ranges(self, clients_per_round="[0, inf)", held_out="[0, 1)", validation="[0, 1)")
        if self.asynchronous.buffer and self.faults.any:
            raise RecipeError("asynchronous.buffer: without a deadline nobody is late; take the [faults] out")
        if 0 < self.clients_per_round < self.asynchronous.buffer:
            raise RecipeError(
                f"asynchronous.buffer = {self.asynchronous.buffer} is never full with clients_per_round = "
                f"{self.clients_per_round} at work; make it no larger"
            )


ARRANGED = tuple(own.name for own in fields(Schedule) if own.default_factory is not MISSING)
"""Settings that are tables: for all methods, or within one of them."""
