"""Who is where: the nodes that were let in, and which clients live on them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from umbel.flower.wire import Facts
from umbel.weighting import Weighting, discrepancy_of


@dataclass
class Roster:
    """Which clients are on which nodes, and what the nodes have told of them."""

    names: dict[int, str] = field(default_factory=dict)  # of nodes that were let in
    homes: dict[int, int] = field(default_factory=dict)  # client → node
    examples: dict[int, int] = field(default_factory=dict)  # of a client
    slots: dict[int, int] = field(default_factory=dict)
    labels: dict[int, list[int]] = field(default_factory=dict)  # of a client, how many of each
    refused: dict[int, str] = field(default_factory=dict)  # node → why
    blocked: dict[int, set[int]] = field(default_factory=dict)  # a refused node → those who have its clients

    def entered(self, node: int, facts: Facts, online: Collection[int]) -> str:
        """Lets a node in whose facts were checked, or says why not. Clients of one that is offline may move."""
        name, clients, counts = facts["name"], facts["clients"], facts["examples"]
        if empty := [client for client, count in zip(clients, counts, strict=True) if count < 1]:
            return f"node {name!r}: client {empty[0]} has no examples"
        taken = [client for client in clients if self.homes.get(client, node) in {*online} - {node}]
        if taken:
            self.blocked[node] = {self.homes[client] for client in taken}
            other = self.names[self.homes[taken[0]]]
            return f"node {name!r}: client {taken[0]} is on node {other!r} already"
        # Two of one name could not be told from each other in a log.
        others = {own for other, own in self.names.items() if other != node}
        self.names[node] = f"{name} ({node})" if name in others else name
        self.homes |= dict.fromkeys(clients, node)
        self.examples |= dict(zip(clients, counts, strict=True))
        self.slots |= dict(zip(clients, facts.get("slots", ()), strict=False))
        self.labels |= dict(zip(clients, facts.get("label_counts", ()), strict=False))
        return ""

    def look_again(self, online: Collection[int]) -> None:
        """Forgets refusals that may be over: of nodes that went away, and where whoever was in the way has."""
        still = {
            node: why
            for node, why in self.refused.items()
            if node in online and self.blocked.get(node, set()) <= {*online}
        }
        self.refused, self.blocked = still, {node: own for node, own in self.blocked.items() if node in still}

    def of(self, node: int, clients: Collection[int]) -> list[int]:
        """Those of the clients that are on the node."""
        return [client for client in clients if self.homes.get(client) == node]

    def weights(self, rule: Weighting, clients: np.ndarray) -> np.ndarray:
        """(K,) how much each of a round's clients counts, by what nodes have told of it."""
        counts = np.array([self.examples[client] for client in clients.tolist()], dtype=float)
        return rule.of_counts(counts, lambda: self._discrepancies(clients))

    def _discrepancies(self, clients: np.ndarray) -> np.ndarray:
        """(K,) in nats, of each client's label counts; see weighting.label_discrepancy."""
        width = max((len(own) for own in self.labels.values()), default=0)
        labels = [self.labels.get(client, []) for client in clients.tolist()]
        return np.array([discrepancy_of(np.array([*own, *[0] * (width - len(own))])) for own in labels])


def listed(items: Any) -> str:
    """The items with commas between them."""
    return ", ".join(str(item) for item in items)
