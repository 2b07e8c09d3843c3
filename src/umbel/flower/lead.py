"""The server's side: rounds as on one machine, but for clients that are on other nodes.

Uploads are handed on in the order of the clients, whatever order they come in, so that the sums are the same.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort, Tally
from umbel.errors import DeployError, NotFiniteError, RecipeError, RoundError, WireError
from umbel.evaluate import Scores, SummedScores
from umbel.flower.arriving import most_bytes
from umbel.flower.exchange import LOG, POLL, Exchange, Patience, Trouble
from umbel.flower.facts import Figure, Numbers, check_claims, fact, facts_of_node
from umbel.flower.fingerprint import Fingerprint, differences, fingerprint
from umbel.flower.protected import check_protection, counts_are_told, is_protected
from umbel.flower.resume import begun_anew, begun_before, stopped, written
from umbel.flower.roster import Roster, listed
from umbel.flower.summed import Asking, summed, summed_scores
from umbel.flower.wire import Facts, Parts, apart, by_client, check_finite, equal, filled, packed, unpacked
from umbel.meeting import Cut, Total, contributed, ledger
from umbel.privacy.accounting import Ledger
from umbel.recipe import Recipe
from umbel.rounds import Progress, participants, rounds, sampled, start
from umbel.runs import Result, record
from umbel.schedule import Schedule
from umbel.tasks import Task
from umbel.tasks.pool import pooled
from umbel.tree import Params
from umbel.untrusted import plain

if TYPE_CHECKING:
    from flwr.serverapp import Grid


@dataclass
class Nodes:
    """The clients of a run, on their nodes (a `Fleet`)."""

    exchange: Exchange
    recipe: Recipe
    task: Task  # as the server has it: of its data only the form and the counts matter, which nodes tell
    cohort: Cohort
    first: Any  # Shared before the first round
    fresh: Any  # the Private (K = 1) of a client that has not trained
    newcomers: frozenset[int] = frozenset()  # clients that no node had when the run began
    roster: Roster = field(default_factory=Roster)
    greeted: dict[str, tuple[int, float]] = field(default_factory=dict)  # who was asked who it is, and when
    seen: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # a test's last scores
    round: int = 0  # the last one that was begun

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the run starts from."""
        return fingerprint(self.recipe.task, self.task, self.first)

    @cached_property
    def most(self) -> int:
        """Bytes of an answer, whatever was asked; what is longer is never put together."""
        shared, own = (sum(leaf.nbytes for leaf in tree.tensors(s).values()) for s in (self.first, self._pattern))
        return most_bytes(self.task.num_clients, shared + own, self.task.num_clients)

    # Who is there.

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
            LOG.info("node %r is there, with clients %s", told["name"], listed(told["clients"]))
        self.greeted = {name: own for name, own in self.greeted.items() if name in waiting}
        for node, trouble in troubles.items():
            self.roster.refused[node] = str(trouble)
            LOG.error("refused: %s", trouble)

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

    # A round.

    def sampled(self, members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
        """The clients of a round, by the seed; where noise hides who takes part, by the operating system."""
        hidden = schedule.privacy.level == "client"
        return sampled(members, replace(schedule, seed=randbits(62)) if hidden else schedule, round)

    def uploads(self, shared: Any, clients: np.ndarray, round: int, seen: Tally) -> Iterator[Any]:
        """The uploads of the round's clients, ascending, one by one; what does not come is counted as lost.

        Raises:
            RoundError: some came, and none could be used.
            DeployError: nobody is there.
        """
        joined = self.attend(round)
        self.round, told_loss = round, self.recipe.schedule.privacy.level == "none"
        begin, before = time.perf_counter(), dict(self.exchange.traffic)
        there = self._there(clients)
        weights = dict(zip(there.tolist(), self._weights(there).tolist(), strict=True))
        questions: dict[int, tuple[Facts, Parts]] = {}
        for node, own, facts, parts in self._letters(shared, there):
            told = {str(client): weights[client] for client in own.tolist()}
            questions[node] = (facts | {"round": round, "weights": told, **self._noise()}, parts)
        troubles: dict[int, Trouble] = {}
        lost = {client: Trouble("missing", "") for client in np.setdiff1d(clients, there).tolist()}
        ready: dict[int, Any] = {}
        waiting, used, slowest = there.tolist(), 0, 0.0
        for node, told, parts in self.exchange.ask("train", questions, troubles, self.exchange.patience.deadline):
            asked = self.roster.of(node, waiting)
            try:
                slowest = max(slowest, fact(told, "seconds", Figure, self.exchange.name(node)))
                unsound = [c for c in fact(told, "dropped", Numbers, self.exchange.name(node)) if c in asked]
                found, wrong = self._opened_uploads(node, asked, shared, round, parts, weights)
            except WireError as error:
                troubles[node] = Trouble("malformed", str(error))
                continue
            ready |= found
            seen.dropped.extend(unsound)
            nothing = Trouble("malformed", f"{self.exchange.name(node)} has sent nothing for a client of its own")
            lost |= {client: wrong.get(client, nothing) for client in asked if client not in {*found, *unsound}}
            waiting = [client for client in waiting if client not in asked or client in ready]
            while waiting and waiting[0] in ready:
                used += 1
                yield _counted(seen, ready.pop(waiting[0]), waiting.pop(0), told_loss)
        for client in sorted(ready):  # after some that never came
            used += 1
            yield _counted(seen, ready.pop(client), client, told_loss)
        for node, trouble in troubles.items():
            lost |= dict.fromkeys(self.roster.of(node, waiting), trouble)
        seen.lose(Counter(trouble.reason for trouble in lost.values()))
        seen.lose({"duplicate": self.exchange.duplicates})
        self.exchange.duplicates = 0
        reasons = list(dict.fromkeys(str(trouble) for trouble in lost.values() if str(trouble)))
        for why in reasons:
            LOG.error("round %d: %s", round, why)
        if not used and not {trouble.reason for trouble in lost.values()} <= {"late", "missing"}:
            raise RoundError(
                f"round {round}: no client's work could be used{''.join(f'{chr(10)}  {r}' for r in reasons)}"
            )
        seen.figures |= self._exchanged(begin, before, slowest, joined)

    def _exchanged(self, begin: float, before: dict[str, int], slowest: float, joined: int) -> dict[str, float]:
        """What a round's figures say of its messages."""
        return {
            "client_seconds": slowest,
            "exchange_seconds": time.perf_counter() - begin,
            "wire_down": self.exchange.traffic["down"] - before["down"],
            "wire_up": self.exchange.traffic["up"] - before["up"],
            **({"joined": joined} if joined else {}),
        }

    def _noise(self) -> Facts:
        """What nodes are told of the noise on examples' gradients: what the client that needs most of it needs."""
        spent = self.cohort.ledger
        if spent is None or spent.privacy.level != "example":
            return {}
        return {"noise_multiplier": spent.privacy.noise_multiplier}

    # Sums, of whose terms the server sees none under masks, and none that is not cut under noise (summed.py).

    def total(
        self, shared: Any, clients: np.ndarray, round: int, schedule: Schedule, cut: Cut | None, seen: Tally
    ) -> Total:
        """The sum over those of the clients that stay; a round in which too few do is lost, and gives none."""
        joined = self.attend(round)
        self.round = round
        begin, before = time.perf_counter(), dict(self.exchange.traffic)
        if not len(clients):
            return Total(None)
        told, there = self._noise(), self._there(clients)
        if cut is not None:
            told["clips"] = {name: float(clip) for name, clip in cut.clips.items()}
        if counts_are_told(schedule):  # else a client weighs itself
            told["weights"] = dict(zip(map(str, there.tolist()), self._weights(there).tolist(), strict=True))
        message = self.cohort.method.send(shared, self.cohort.index(clients[:1]))
        with_loss = schedule.secure.aggregation == "masks" and schedule.privacy.level == "none"
        like = contributed(self.cohort.method, self.form(shared, clients[:1]), message, cut, with_loss)
        asking = self._asking("train", shared, told)
        found = summed(asking, there.tolist(), schedule, like, cut, seen)
        seen.dropped.extend(np.setdiff1d(clients, seen.clients).tolist())
        seen.figures |= self._exchanged(begin, before, asking.seconds, joined)
        return found

    def form(self, shared: Any, client: np.ndarray) -> Any:
        """An Upload (K = 1) like those that are to come."""
        return self._tried(self.cohort.method.send(shared, self.cohort.index(client)), int(client[0]), 1)

    def _asking(self, about: str, shared: Any, told: Facts) -> Asking:
        """How the nodes are asked for a sum: what they are told beside it is the method's messages."""

        def letters(clients: list[int]) -> dict[int, tuple[Facts, Parts]]:
            own = self._letters(shared, np.array(clients, dtype=np.int64), settling=about == "evaluate")
            return {node: (facts | told | {"round": self.round}, parts) for node, _, facts, parts in own}

        def ask(
            kind: str, questions: dict[int, tuple[Facts, Parts]], silent: dict[str, str]
        ) -> Iterator[tuple[int, Facts, Parts]]:
            troubles: dict[int, Trouble] = {}
            yield from self.exchange.ask(kind, questions, troubles, self.exchange.patience.deadline)
            silent.update({self.exchange.name(node): str(trouble) for node, trouble in troubles.items()})

        return Asking(ask, self.roster.homes, letters, about, self.round)

    def scores(self, shared: Any, tests: np.ndarray) -> tuple[np.ndarray, Scores | SummedScores] | None:
        """The scores that the clients' nodes have found, and of which tests.

        Of a node that is gone they are the last that it told; clients that no node has had so far are left out.
        Where clients are protected it is sums of scores, or nothing.
        """
        serves = None if self.task.serves is None else self.task.serves.cpu().numpy()
        there = self._there(np.unique(tests if serves is None else serves[tests]))
        if is_protected(self.recipe.schedule):
            asking, rights = self._asking("evaluate", shared, {}), self.task.loss == "cross_entropy"
            together = summed_scores(asking, there.tolist(), self.recipe.schedule, rights)
            return None if together is None else (tests, together)
        questions = {node: (facts, parts) for node, _, facts, parts in self._letters(shared, there, settling=True)}
        troubles: dict[int, Trouble] = {}
        found: dict[int, tuple[Any, ...]] = {}
        mixture: Any = np.float32
        deadline = self.exchange.patience.deadline
        for node, _, parts in self.exchange.ask("evaluate", questions, troubles, deadline):
            own = self.task.tests_of(np.array(questions[node][0]["clients"]))
            try:
                labels = self.task.loss == "cross_entropy"
                rows = _scores_in(parts, len(own), labels, self.exchange.name(node))
            except WireError as error:
                troubles[node] = Trouble("malformed", str(error))
                continue
            mixture = rows["mixture"].dtype if "mixture" in rows else mixture
            nothing = np.zeros((len(own), 0), dtype=np.float32)
            for place, test in enumerate(own.tolist()):
                right = rows["accuracy"][place] if "accuracy" in rows else None
                found[test] = (rows["loss"][place], right, rows.get("mixture", nothing)[place])
        for trouble in troubles.values():
            LOG.error("evaluation: %s", trouble)
        self.seen |= found
        done = np.array([test for test in tests.tolist() if test in self.seen], dtype=np.int64)
        if not len(done):
            return None
        every = [self.seen[test] for test in done.tolist()]
        width = min(len(row[2]) for row in every)  # 0 where somebody keeps its mixture to itself
        return done, Scores(
            np.array([row[0] for row in every]),
            np.array([row[1] for row in every]) if every[0][1] is not None else None,
            np.array([row[2][:width] for row in every], dtype=mixture).reshape(len(every), width),
            self.task.loss == "cross_entropy" and self.task.test.y.dim() > 1,
        )

    def _there(self, clients: np.ndarray) -> np.ndarray:
        """Those of the clients that are on a node."""
        return np.array([client for client in clients.tolist() if client in self.roster.homes], dtype=np.int64)

    def _weights(self, clients: np.ndarray) -> np.ndarray:
        """(K,) how much each counts, by the recipe's rule."""
        counts = np.array([self.roster.examples[client] for client in clients.tolist()], dtype=float)
        labels = [self.roster.labels.get(client, []) for client in clients.tolist()]
        width = max((len(own) for own in self.roster.labels.values()), default=0)
        return self.cohort.weighting.of_counts(counts, lambda: _discrepancy(labels, width))

    def _letters(
        self, shared: Any, clients: np.ndarray, settling: bool = False
    ) -> Iterator[tuple[int, np.ndarray, Facts, Parts]]:
        """For each node its clients, and what it is sent: rows of the message, apart from what all rows share."""
        method, device = self.cohort.method, self.cohort.train.x.device
        packed_common: tuple[Params, bytes] = ({}, b"")
        for node in sorted({self.roster.homes[client] for client in clients.tolist()}):
            own = np.array([client for client in clients.tolist() if self.roster.homes[client] == node])
            # Twice the first, for of a single row nobody knows whether it is everyone's.
            asked = torch.from_numpy(np.append(own, own[:1])).to(device)
            message, before = method.send(shared, asked), tree.tensors(method.send(self.first, asked))
            common, rows = apart(message)
            unchanged = [n for n, leaf in tree.tensors(message).items() if n in before and equal(leaf, before[n])]
            common = {name: leaf for name, leaf in common.items() if name not in unchanged}
            if not _same(common, packed_common[0]):
                packed_common = common, packed(common)
            mine = {
                f"{client}/{name}": leaf[place : place + 1]
                for name, leaf in rows.items()
                if name not in unchanged
                for place, client in enumerate(own.tolist())
            }
            parts = {"common": packed_common[1], "own": packed(mine)}
            if settling and hasattr(method, "beside") and (more := method.beside(message)) is not None:
                parts["beside"] = packed(tree.tensors(more))
            facts = {"clients": own.tolist(), "unchanged": unchanged}
            if new := [client for client in own.tolist() if client in self.newcomers]:
                facts["newcomers"] = new
            yield node, own, facts, parts

    def _opened_uploads(
        self,
        node: int,
        clients: Sequence[int],
        shared: Any,
        round: int,
        parts: Parts,
        weights: dict[int, float],
    ) -> tuple[dict[int, Any], dict[int, Trouble]]:
        """A node's uploads by client, and what is wrong with those that this run's method would not upload.

        Raises:
            WireError: there is something of a client that the node was not asked for, or no tensors at all.
        """
        who = self.exchange.name(node)
        asked = {str(client): client for client in clients}
        own = by_client(unpacked(parts.get("uploads", b""), who))
        for place in [name for name in parts if name.startswith("train/")]:  # where examples are protected
            own[place.removeprefix("train/")] = unpacked(parts[place], who)
        if strangers := own.keys() - asked.keys():
            raise WireError(f"{who}: {plain(min(strangers), 60)} is of no client that it was asked for")
        found: dict[int, Any] = {}
        wrong: dict[int, Trouble] = {}
        for name, tensors in own.items():
            client, sender = asked[name], f"{who}, client {name}"
            try:
                upload = self._upload(tensors, client, shared, round, sender)
                weight = None if self.cohort.weighting.rule == "rea" else weights[client]
                check_claims(upload, client, weight, sender)
                found[client] = upload
            except WireError as error:
                reason = "not finite" if isinstance(error, NotFiniteError) else "malformed"
                wrong[client] = Trouble(reason, str(error))
        return found, wrong

    def _upload(self, tensors: Params, client: int, shared: Any, round: int, who: str) -> Any:
        if any(leaf.shape[:1] != (1,) for leaf in tensors.values()):
            raise WireError(f"{who}: an upload is of one client, and these tensors have other lengths")
        try:
            return filled([self._pattern], tensors, who)
        except WireError:  # what is uploaded may change with what is sent
            message = self.cohort.method.send(shared, torch.tensor([client], device=self.cohort.train.x.device))
            self._pattern = self._tried(message, client, round)
            return filled([self._pattern], tensors, who)

    @cached_property
    def _pattern(self) -> Any:
        """An Upload (K = 1) like those that are to come."""
        message = self.cohort.method.send(self.first, torch.tensor([0], device=self.cohort.train.x.device))
        return self._tried(message, 0, 1)

    def _tried(self, message: Any, client: int, round: int) -> Any:
        """What a client would upload, had it a few examples: its form is what is wanted."""
        method: Any = self.cohort.method
        train = self.cohort.train
        x, y = next(train.of_client(k) for k in range(self.task.num_clients) if train.count[k])
        size, clients = min(len(y), 2), self.task.num_clients
        data = Examples(x[:size], y[:size], np.zeros(clients, np.int64), np.full(clients, size))
        method = replace(method, local=replace(method.local, batch_size=size, epochs=1, steps=0))
        cohort = replace(self.cohort, method=method, train=data.to(self.cohort.train.x.device), chunk=1)
        upload, _ = cohort.trained(message, self.fresh, np.array([client]), round, np.array([float(size)]))
        return upload


def lead(
    grid: "Grid",
    recipe: Recipe,
    folder: Path | None = None,
    patience: Patience | None = None,
    on_round: Callable[[Progress], None] | None = None,
    share: float = 1.0,
) -> Result:
    """The whole run, with clients on the nodes of Flower's grid.

    Args:
        grid: Flower's.
        recipe: what to run.
        folder: where to keep recipe, metrics and checkpoints: a new one, or that of a run of this recipe that was
            stopped, which is gone on with.
        patience: how long to wait for nodes.
        on_round: called after every round.
        share: of the clients, which have to be there before a run is begun.

    Raises:
        UmbelError: nodes are missing, no client's work could be used, or the folder holds something else.
    """
    refuse_simulated(recipe.schedule)
    check_protection(recipe.schedule)
    with ExitStack() as stack:
        before = None if folder is None else stopped(folder, recipe, stack)
        task = recipe.task.load(recipe.schedule.seed)
        task = pooled(task) if recipe.schedule.pool else task
        cohort, first = start(task, recipe.method, recipe.schedule, replace(recipe.engine, mode="looped"))
        cohort = replace(cohort, secret=True)
        begun = begun_anew(first) if before is None else begun_before(before, first)
        counted, members = _countable(task), participants(task.num_clients, recipe.schedule)
        exchange = Exchange(grid, begun.run, patience or Patience())
        nodes = Nodes(exchange, recipe, counted, cohort, first.shared, first.store.fresh(1), begun.absent)
        exchange.most = nodes.most
        nodes.gather(share if before is None else recipe.schedule.faults.quorum)
        if recipe.schedule.privacy.level == "example":
            cohort = nodes.cohort = replace(
                cohort, ledger=_spent(counted, recipe, members, begun.noise_multiplier)
            )
        if before is None:
            nodes.newcomers = frozenset({*members.tolist()} - nodes.roster.homes.keys())
            cost = cohort.cost(first.shared, first.store, members[:1])
            if not counts_are_told(recipe.schedule):
                cost = replace(cost, flops={}, steps={})
            begun = replace(begun, cost=cost, absent=nodes.newcomers)
            if folder is not None:
                begun = replace(begun, folder=written(folder, recipe, task, begun, cohort.ledger, stack))
        at, history = begun.progress, list(begun.history)
        # Nodes keep what was before their last round only, so no checkpoint may be older than that.
        schedule = replace(recipe.schedule, checkpoint_every=1)
        for progress in rounds(cohort, at, counted, recipe.schedule, begun.cost, nodes):
            at = progress
            history.append(at.figures)
            if begun.folder is not None:
                record(begun.folder, at, counted, schedule)
            if on_round is not None:
                on_round(at)
    return Result(counted, recipe.schedule, cohort, at, history, [])


def _countable(task: Task) -> Task:
    """The task with counts of its own, for nodes to tell."""
    train = task.train
    slots = None if train.slots is None else train.slots.copy()
    return replace(task, train=replace(train, count=train.count.copy(), slots=slots))


def _spent(counted: Task, recipe: Recipe, members: np.ndarray, noise_multiplier: float) -> Ledger | None:
    """What a run spends of examples' privacy, by the numbers of them that nodes have told.

    A run that is gone on with keeps the noise that it was begun with (`noise_multiplier`, else 0).
    """
    schedule = recipe.schedule
    cohorts = (sampled(members, schedule, round) for round in range(1, schedule.rounds + 1))
    noise = noise_multiplier or schedule.privacy.noise_multiplier
    kept = replace(schedule, privacy=replace(schedule.privacy, noise_multiplier=noise))
    return ledger(counted, recipe.method, kept, cohorts)


def refuse_simulated(schedule: Schedule) -> None:
    """Raises RecipeError if the recipe asks for what is done in the simulator only."""
    here = {
        "faults": schedule.faults.any,
        "attack": schedule.attack.kind != "none",
        "asynchronous": schedule.asynchronous.buffer > 0,
    }
    if asked := [name for name, wanted in here.items() if wanted]:
        raise RecipeError(
            f"[{asked[0]}] is for the simulator so far (umbel run); leave it out of a deployed recipe"
        )


def _counted(seen: Tally, upload: Any, client: int, told_loss: bool) -> Any:
    """The upload, which `seen` has counted."""
    seen.sent(upload, 1)
    seen.arrived(np.array([client]))
    if told_loss:
        seen.losses(float(upload.loss.sum()), 1)
    return upload


def _discrepancy(labels: Sequence[Sequence[int]], num_labels: int) -> np.ndarray:
    """(K,) in nats, of each client's label counts; see weighting.label_discrepancy."""
    from umbel.weighting import discrepancy_of

    return np.array([discrepancy_of(np.array([*own, *[0] * (num_labels - len(own))])) for own in labels])


def _scores_in(parts: Parts, num_tests: int, labels: bool, who: str) -> dict[str, np.ndarray]:
    """The "loss", with labels "accuracy", and where it is told "mixture", of so many tests.

    Raises:
        WireError: they are something else.
    """
    tensors = unpacked(parts.get("scores", b""), who)
    dims = {"loss": 1, "accuracy": 1, "mixture": 2}
    if "loss" not in tensors or not tensors.keys() <= dims.keys():
        told = plain(listed(tensors) or "nothing")
        raise WireError(f"{who}: its scores are {told}, where {listed(dims)} are known")
    for name, leaf in tensors.items():
        if leaf.dim() != dims[name] or len(leaf) != num_tests or leaf.dtype not in (torch.float32, torch.float64):
            raise WireError(f"{who}: {name} is not of the {num_tests} tests that it was asked for")
    if ("accuracy" in tensors) != labels:
        raise WireError(f"{who}: its scores {'lack the' if labels else 'have an'} accuracy")
    check_finite(tensors, who)
    return {name: leaf.numpy() for name, leaf in tensors.items()}


def _same(one: Params, other: Params) -> bool:
    return list(one) == list(other) and all(equal(leaf, other[name]) for name, leaf in one.items())
