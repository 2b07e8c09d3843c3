"""Who is there: nodes that have come are asked who they are, let in, and waited for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import numpy as np

from umbel.errors import DeployError, WireError
from umbel.flower.exchange import LOG, POLL, Exchange, Trouble
from umbel.flower.facts import Numbers, fact, facts_of_node
from umbel.flower.fingerprint import Fingerprint, differences
from umbel.flower.protected import counts_are_told
from umbel.flower.roster import Roster, listed
from umbel.flower.wire import Facts
from umbel.recipe import Recipe
from umbel.rounds import participants
from umbel.tasks import Task


@dataclass
class Attendance:
    """The nodes of a run, and which clients are on them."""

    exchange: Exchange
    recipe: Recipe
    task: Task  # whose counts nodes tell
    fingerprint: Fingerprint  # what the run starts from
    newcomers: frozenset[int] = frozenset()  # clients that no node had when the run began
    roster: Roster = field(default_factory=Roster)
    greeted: dict[str, tuple[int, float]] = field(default_factory=dict)  # who was asked who it is, and when

    def gather(self, share: float) -> None:
        """Waits until every client that takes part is on a node, but for those that no node had at the start.

        Args:
            share: of the clients, with which the run goes on when the time is up.

        Raises:
            DeployError: there are fewer; it names the missing ones and the nodes that were refused.
        """
        wanted = [client for client in self._members.tolist() if client not in self.newcomers]
        begin, told = time.monotonic(), ""
        while True:
            self.greet(self.exchange.online())
            missing = [client for client in wanted if client not in self.roster.homes]
            if not missing:
                return
            waited, there = time.monotonic() - begin, len(wanted) - len(missing)
            # Who has come may still be loading its model.
            if waited > self.exchange.patience.nodes + (self.exchange.patience.answer if self.greeted else 0.0):
                if there >= max(1, ceil(share * len(wanted))):
                    LOG.info("the run goes on without clients %s, who may come later", listed(missing))
                    return
                raise DeployError(
                    f"after {waited:.0f} s there is no node with client{'s' * (len(missing) > 1)} "
                    f"{listed(missing)}; start the nodes that have them{self._refusals()}"
                )
            if told != (told := f"{there} of {len(wanted)} clients are there"):
                LOG.info(told)
            time.sleep(POLL)

    def attend(self, round: int) -> int:
        """Lets nodes in, and waits where too few clients for a quorum are on nodes that are online.

        Returns:
            how many clients have come for the first time.

        Raises:
            DeployError: they have not come in time.
        """
        known, members = {*self.roster.homes}, {*self._members.tolist()}
        needed = max(1, ceil(self.recipe.schedule.faults.quorum * len(members)))
        begin, told = time.monotonic(), False
        while True:
            self.greet(online := self.exchange.online())
            homes = self.roster.homes
            there = sum(node in online for client, node in homes.items() if client in members)
            if there >= needed:
                return len(homes.keys() - known)
            if not told:
                LOG.info("round %d: %d clients are there, and %d are needed; waiting", round, there, needed)
                told = True
            if time.monotonic() - begin > self.exchange.patience.nodes:
                raise DeployError(
                    f"round {round}: after {self.exchange.patience.nodes:.0f} s {there} clients are there, and "
                    f"{needed} are needed; start their nodes, and the run again with the same folder"
                    f"{self._refusals()}"
                )
            time.sleep(10 * POLL)

    def greet(self, online: set[int]) -> None:
        """Asks nodes that have come who they are, and lets in those that have said it; waits for nobody."""
        patience, now, counts = self.exchange.patience, time.monotonic(), counts_are_told(self.recipe.schedule)
        self.roster.look_again(online)
        # Whoever has not said it for long has lost the question.
        self.greeted = {name: own for name, own in self.greeted.items() if now - own[1] < patience.nodes}
        waiting = {name: node for name, (node, _) in self.greeted.items()}
        new = sorted(online - {*self.roster.names, *self.roster.refused, *waiting.values()})
        table = {key: value for key, value in self.recipe.table().items() if key != "engine"}
        asked: Facts = {"recipe": table, "label": self.recipe.label, "fingerprint": self.fingerprint}
        pushed = self.exchange.push("hello", {node: (asked, {}) for node in new})
        waiting |= pushed
        self.greeted |= {name: (node, now) for name, node in pushed.items()}
        troubles: dict[int, Trouble] = {}
        for node, facts, _ in self.exchange.pull(waiting, troubles):
            try:
                who = self.exchange.name(node)
                # That a client has some examples is all that is known where numbers are not told.
                known = {} if counts else {"examples": [1] * len(fact(facts, "clients", Numbers, who))}
                told = facts_of_node(facts | known, who, self.task.num_clients)
            except WireError as error:
                troubles[node] = Trouble("refused", str(error))
                continue
            if wrong := differences(self.fingerprint, told["fingerprint"]):
                why = f"node {told['name']!r}: its base is not the server's; {'; '.join(wrong)}"
            else:
                why = self.roster.entered(node, told, online)
            if why:
                troubles[node] = Trouble("refused", why)
                continue
            self.exchange.names[node] = self.roster.names[node]
            self._count(told["clients"])
            LOG.info("%s is there, with clients %s", self.exchange.name(node), listed(told["clients"]))
        self.greeted = {name: own for name, own in self.greeted.items() if name in waiting}
        for node, trouble in troubles.items():
            self.roster.refused[node] = str(trouble)
            LOG.error("refused: %s", trouble)

    def there(self, clients: np.ndarray) -> np.ndarray:
        """Those of the clients that are on a node."""
        return np.array([client for client in clients.tolist() if client in self.roster.homes], dtype=np.int64)

    @cached_property
    def _members(self) -> np.ndarray:
        return participants(self.task.num_clients, self.recipe.schedule)

    def _refusals(self) -> str:
        return "".join(f"\n  refused: {why}" for why in self.roster.refused.values())

    def _count(self, clients: Sequence[int]) -> None:
        """Puts what nodes have told in place of the task's own counts, which is all that is looked at."""
        train = self.task.train
        for client in clients:
            train.count[client] = self.roster.examples[client]
            if train.slots is not None and client in self.roster.slots:
                train.slots[client] = self.roster.slots[client]
