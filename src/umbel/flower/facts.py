"""What is said in words and numbers, checked: types, ranges and lengths, before it is counted with or shown.

hello     facts_of_node: who a node says it is
train     claims: what an upload says of itself, where its form is not all
"""

from collections.abc import Mapping
from logging import getLogger
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from torch import Tensor

from umbel import tree
from umbel.errors import DataError, UmbelError, WireError
from umbel.untrusted import plain

LOG = getLogger("umbel")
T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
"""Of a client, a round or a slot."""
Name = Annotated[str, msgspec.Meta(max_length=200)]
Text = Annotated[str, msgspec.Meta(max_length=4000)]
Figure = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
LABELS = 1 << 18
Labels = Annotated[list[Count], msgspec.Meta(max_length=LABELS)]
"""How many of each label a client has."""
Hashes = dict[Text, Text]
Numbers = list[Number]


def fact(facts: Mapping[str, Any], name: str, kind: Any, who: str) -> Any:
    """What is said under the name, of that type.

    Raises:
        WireError: nothing is, or it is something else; `who` said it.
    """
    if name not in facts:
        raise WireError(f"{who} does not say {name!r}; both sides need the same version of umbel")
    try:
        return msgspec.convert(facts[name], kind, strict=True)
    except (msgspec.ValidationError, OverflowError) as error:
        raise WireError(f"{who} says {plain(facts[name], 60)!r} for {name!r}: {plain(error)}") from None


def reason_of(error: Exception) -> str:
    """What a node tells the server of an error; the rest is for the node's own log.

    What is said of data, or by others than umbel, may quote them: could not convert string to float: 'Jane Doe'.
    """
    if isinstance(error, UmbelError) and not isinstance(error, DataError):
        return str(error)
    LOG.error("a message could not be answered: %s", error, exc_info=error)
    return f"{type(error).__name__}; the node's log says more"


def facts_of_node(facts: Mapping[str, Any], who: str, num_clients: int) -> dict[str, Any]:
    """A node's answer to hello, checked.

    Args:
        facts: as they came.
        who: has sent them.
        num_clients: of the task.

    Raises:
        WireError: it is no such answer; the key is named.
    """
    clients = fact(facts, "clients", Numbers, who)
    if len(set(clients)) < len(clients) or any(client >= num_clients for client in clients):
        listed = plain(", ".join(map(str, clients)))
        raise WireError(f"{who}: its clients are {listed}, of {num_clients} that there are")
    told = dict(facts) | {
        "name": plain(fact(facts, "name", Name, who)),
        "clients": clients,
        "examples": fact(facts, "examples", list[Count], who),
        "fingerprint": fact(facts, "fingerprint", Hashes, who),
    }
    for name, kind in (("slots", Numbers), ("label_counts", list[Labels])):
        if name in facts:
            told[name] = fact(facts, name, kind, who)
    for name in {"examples", "slots", "label_counts"} & told.keys():
        if len(told[name]) != len(clients):
            raise WireError(f"{who} has {len(clients)} clients and says {name!r} of {len(told[name])}")
    return told


def check_claims(upload: Any, client: int, weight: float | None, who: str) -> None:
    """Raises WireError if a client's upload (K = 1) says of itself what cannot be.

    Args:
        upload: of the expected form, and finite.
        client: whose it is.
        weight: what the server lets it count; None where that is the client's to find out (REA).
        who: has sent it.
    """
    said = {name.partition("/")[0]: leaf for name, leaf in tree.tensors(upload).items() if "/" not in name}
    own = said.get("weight")
    if own is not None and not _counts_as(own, weight):
        raise WireError(f"{who}: it counts itself as {own.tolist()}, where the server lets it count {weight}")
    if "client" in said and said["client"].tolist() != [client]:
        raise WireError(f"{who}: the upload says that it is of client {said['client'].tolist()}")
    for name in ("examples", "route_examples", "rank_share"):
        if name in said and bool((said[name] < 0).any()):
            raise WireError(f"{who}: {name} is below 0")
    routes = said.get("route_examples")
    if routes is not None and own is not None and bool((routes.sum(-1) > own.reshape(-1)[0] * 1.001 + 1e-3).any()):
        raise WireError(f"{who}: it routes more examples than it has")
    if "sent" in said and routes is not None:
        _check_places(said["sent"], routes.shape[-1], who)


def _counts_as(own: Tensor, weight: float | None) -> bool:
    if weight is None:
        return bool((own >= 0).all())
    return bool((own == torch.tensor(weight, dtype=own.dtype)).all())


def _check_places(sent: Tensor, num_adapters: int, who: str) -> None:
    places = sent.reshape(-1).tolist()
    if len(set(places)) < len(places) or any(not 0 <= place < num_adapters for place in places):
        raise WireError(f"{who}: it sends the adapters {places}, of {num_adapters} that there are")
