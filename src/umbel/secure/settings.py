"""How secure aggregation is done: the recipe's table [secure]."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from umbel.errors import RecipeError
from umbel.ranges import check_ranges


@dataclass(frozen=True)
class Secure:
    """Whether contributions are masked, and in how many digits they are added up.

    Attributes:
        aggregation: "masks" hides single contributions from the server (docs/secure_aggregation.md).
        neighbours: with how many others a client shares masks and secrets; 0: with all of the round.
        threshold: more than this share of those who hold a client's secrets must stay until the end of the round.
        bits: of each masked number on the wire.
        range: numbers of a contribution beyond ± this are cut to it; how many were is told, never whose.
        ranges: the same for single groups of tensors ("base", "adapters", …), by their names in the sums.
    """

    aggregation: Literal["plain", "masks"] = "plain"
    neighbours: int = 0
    threshold: float = 0.5
    bits: Literal[32, 64] = 64
    range: float = 2.0**20
    ranges: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold < 1:
            raise RecipeError(
                "secure: threshold must be in [0.5, 1): with less, two halves of the clients could each be asked "
                f"for one of another's two secrets, got {self.threshold}"
            )
        if self.neighbours < 0 or self.neighbours == 1:
            raise RecipeError(f"secure: neighbours must be 0 (all) or at least 2, got {self.neighbours}")
        check_ranges(self, range="(0, inf)", ranges="(0, inf)")
        defaults = {own.name: {} if own.default is MISSING else own.default for own in fields(self)}
        said = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.aggregation == "plain" and said:
            raise RecipeError(
                f"secure: {said[0]} is set, but aggregation = 'plain' masks nothing; add "
                "secure.aggregation = 'masks'"
            )
