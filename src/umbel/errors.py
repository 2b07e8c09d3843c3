"""What can go wrong, said so that the reader knows what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UmbelError(Exception):
    """Anything that the user can put right; the message names the key, the file or the client."""


class RecipeError(UmbelError):
    """A recipe that cannot be run as it stands."""


class DataError(UmbelError):
    """A client's data that nothing can be trained on."""


class ModelError(UmbelError):
    """A module that the chosen method cannot adapt."""


class RunFolderError(UmbelError):
    """A run folder that is in the way, damaged, or of another recipe."""


class RoundError(UmbelError):
    """A round of which no client's work could be used."""


class WireError(UmbelError, ValueError):
    """A message between server and nodes that is not what its receiver expects."""


class LostError(WireError):
    """A message of which a part does not come: who has sent it has died meanwhile."""


class NotFiniteError(WireError):
    """A message that holds NaN or infinity."""


class DeployError(UmbelError):
    """A deployment that cannot start or go on: certificates, keys, nodes, processes."""


def meant(name: str, known: Iterable[str], shown: Iterable[str] = ()) -> str:
    """Which known name one that is not known is near to, or all of them (those `shown`): the end of a sentence."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(shown or names)}"
