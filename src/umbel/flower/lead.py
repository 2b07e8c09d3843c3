"""The server's side: rounds as on one machine, but for clients that are on other nodes.

Uploads are handed on in the order of the clients, whatever order they come in, so that the sums are the same.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from logging import getLogger
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort, Tally
from umbel.errors import DeployError, RecipeError, RoundError, WireError
from umbel.evaluate import Scores
from umbel.flower.arriving import messages, most_bytes
from umbel.flower.facts import Figure, check_claims, fact, facts_of_node
from umbel.flower.fingerprint import Fingerprint, differences, fingerprint
from umbel.flower.post import KINDS, content_of, opened
from umbel.flower.wire import apart, by_client, check_finite, equal, filled, packed, unpacked
from umbel.flower.work import Facts, Parts
from umbel.folder import RunFolder, check_free
from umbel.recipe import Recipe
from umbel.rounds import Progress, participants, rounds, start
from umbel.runs import Result, record
from umbel.schedule import Schedule
from umbel.tasks import Task
from umbel.tasks.pool import pooled
from umbel.tree import Params
from umbel.untrusted import plain

if TYPE_CHECKING:
    from flwr.serverapp import Grid

LOG = getLogger("umbel")
POLL = 0.1  # seconds between two looks for answers
EASE = 4.0  # how many times longer a pause is than the look before it took
LOOK = 2.0  # seconds between two looks for nodes that are gone, or new


@dataclass(frozen=True)
class Patience:
    """How long the server waits, in seconds."""

    nodes: float = 300.0  # for all clients to be there before the first round
    answer: float = 3600.0  # for a node's answer
    gone: float = 30.0  # for a node that is offline to come back


@dataclass
class Roster:
    """Who is where."""

    names: dict[int, str] = field(default_factory=dict)  # of nodes that were let in
    homes: dict[int, int] = field(default_factory=dict)  # client → node
    examples: dict[int, int] = field(default_factory=dict)  # of a client
    slots: dict[int, int] = field(default_factory=dict)
    labels: dict[int, list[int]] = field(default_factory=dict)  # of a client, how many of each
    refused: dict[int, str] = field(default_factory=dict)  # node → why

    def entered(self, node: int, facts: Facts) -> str:
        """Lets a node in whose facts were checked, or says why not."""
        name, clients, counts = facts["name"], facts["clients"], facts["examples"]
        if empty := [client for client, count in zip(clients, counts, strict=True) if count < 1]:
            return f"node {name!r}: client {empty[0]} has no examples"
        taken = [client for client in clients if self.homes.get(client, node) != node]
        if taken:
            other = self.names[self.homes[taken[0]]]
            return f"node {name!r}: client {taken[0]} is on node {other!r} already"
        self.names[node] = name
        self.homes |= dict.fromkeys(clients, node)
        self.examples |= dict(zip(clients, counts, strict=True))
        self.slots |= dict(zip(clients, facts.get("slots", ()), strict=False))
        self.labels |= dict(zip(clients, facts.get("label_counts", ()), strict=False))
        return ""


@dataclass
class Nodes:
    """The clients of a run, on their nodes (a `Fleet`)."""

    grid: "Grid"
    recipe: Recipe
    task: Task  # as the server has it: of its data only the form matters
    cohort: Cohort
    first: Any  # Shared before the first round
    fresh: Any  # the Private (K = 1) of a client that has not trained
    run: str  # 16 hex digits, under which nodes keep what their clients keep
    patience: Patience = field(default_factory=Patience)
    roster: Roster = field(default_factory=Roster)
    greeted: dict[str, int] = field(default_factory=dict)  # who has not yet said who it is
    traffic: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})
    seen: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # a test's last scores

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

    def gather(self) -> Task:
        """Waits until every client that takes part is on a node; the task with the counts that nodes have told.

        Raises:
            DeployError: some are not, and it names them and the nodes that were refused.
        """
        wanted = participants(self.task.num_clients, self.recipe.schedule).tolist()
        begin, told = time.monotonic(), ""
        while True:
            self.greet()
            missing = [client for client in wanted if client not in self.roster.homes]
            if not missing:
                break
            waited = time.monotonic() - begin
            # Who has come may still be loading its model.
            if waited > self.patience.nodes + (self.patience.answer if self.greeted else 0.0):
                reasons = "".join(f"\n  refused: {why}" for why in self.roster.refused.values())
                raise DeployError(
                    f"after {waited:.0f} s there is no node with client{'s' * (len(missing) > 1)} "
                    f"{_listed(missing)}; start the nodes that have them{reasons}"
                )
            if told != (told := f"{len(wanted) - len(missing)} of {len(wanted)} clients are there"):
                LOG.info(told)
            time.sleep(POLL)
        count, slots = self.task.train.count.copy(), self.task.train.slots
        for client, examples in self.roster.examples.items():
            count[client] = examples
        if slots is not None:
            slots = slots.copy()
            for client, number in self.roster.slots.items():
                slots[client] = number
        # Of these examples only the counts are looked at from here on.
        return replace(self.task, train=replace(self.task.train, count=count, slots=slots))

    def greet(self) -> None:
        """Asks nodes that have come who they are, and lets in those that have said it; waits for nobody."""
        online = sorted(self.grid.get_node_ids())
        # Whoever was refused and went away may come back mended.
        self.roster.refused = {node: why for node, why in self.roster.refused.items() if node in online}
        known = {*self.roster.names, *self.roster.refused, *self.greeted.values()}
        new = [node for node in online if node not in known]
        table = {key: value for key, value in self.recipe.table().items() if key != "engine"}
        asked: Facts = {"recipe": table, "label": self.recipe.label, "fingerprint": self.fingerprint}
        self.greeted |= self._pushed("hello", {node: (asked, {}) for node in new})
        troubles: dict[int, str] = {}
        for node, facts, _ in self._pulled(self.greeted, troubles):
            try:
                told = facts_of_node(facts, self._name(node), self.task.num_clients)
            except WireError as error:
                troubles[node] = str(error)
                continue
            if wrong := differences(self.fingerprint, told["fingerprint"]):
                troubles[node] = f"node {told['name']!r}: its base is not the server's; {'; '.join(wrong)}"
            elif why := self.roster.entered(node, told):
                troubles[node] = why
            else:
                LOG.info("node %r is there, with clients %s", told["name"], _listed(told["clients"]))
        for node, why in troubles.items():
            self.roster.refused[node] = why
            LOG.error("refused: %s", why)

    # A round.

    def uploads(self, shared: Any, clients: np.ndarray, round: int, seen: Tally) -> Iterator[Any]:
        """The uploads of the round's clients, ascending, one by one; whose do not come are `dropped`.

        Raises:
            RoundError: none came that could be used.
        """
        self.greet()
        begin, before = time.perf_counter(), dict(self.traffic)
        there = np.array([client for client in clients.tolist() if client in self.roster.homes], dtype=np.int64)
        weights = dict(zip(there.tolist(), self._weights(there).tolist(), strict=True))
        questions: dict[int, tuple[Facts, Parts]] = {}
        for node, own, facts, parts in self._letters(shared, there):
            told = {str(client): weights[client] for client in own.tolist()}
            questions[node] = (facts | {"round": round, "weights": told}, parts)
        troubles: dict[int, str] = {}
        ready: dict[int, Any] = {}
        used: list[int] = []
        waiting, slowest = there.tolist(), 0.0
        for node, told, parts in self.ask("train", questions, troubles):
            asked = [client for client in waiting if self.roster.homes[client] == node]
            try:
                slowest = max(slowest, fact(told, "seconds", Figure, self._name(node)))
                found = self._opened_uploads(node, asked, shared, round, parts)
                for client, upload in found.items():
                    weight = None if self.cohort.weighting.rule == "rea" else weights[client]
                    check_claims(upload, client, weight, f"{self._name(node)}, client {client}")
                ready |= found
            except WireError as error:
                troubles[node] = str(error)
            waiting = [client for client in waiting if client not in asked or client in ready]
            while waiting and waiting[0] in ready:
                client = waiting.pop(0)
                used.append(client)
                _counted(seen, ready[client], client)
                yield ready.pop(client)
        for client in sorted(ready):  # after some that never came
            used.append(client)
            _counted(seen, ready[client], client)
            yield ready.pop(client)
        seen.dropped.extend(np.setdiff1d(clients, used).tolist())
        for why in troubles.values():
            LOG.error("round %d: %s", round, why)
        if not used:
            reasons = "".join(f"\n  {why}" for why in troubles.values())
            raise RoundError(f"round {round}: no client's work could be used{reasons}")
        seen.figures |= {
            "client_seconds": slowest,
            "exchange_seconds": time.perf_counter() - begin,
            "wire_down": self.traffic["down"] - before["down"],
            "wire_up": self.traffic["up"] - before["up"],
        }

    def scores(self, shared: Any, tests: np.ndarray) -> Scores:
        """The scores that the clients' nodes have found; of a node that is gone the last that it told."""
        serves = None if self.task.serves is None else self.task.serves.cpu().numpy()
        clients = np.unique(tests if serves is None else serves[tests])
        there = np.array([client for client in clients.tolist() if client in self.roster.homes], dtype=np.int64)
        questions = {node: (facts, parts) for node, _, facts, parts in self._letters(shared, there, settling=True)}
        troubles: dict[int, str] = {}
        found: dict[int, tuple[Any, ...]] = {}
        mixture: Any = np.float32
        for node, _, parts in self.ask("evaluate", questions, troubles):
            own = self.task.tests_of(np.array(questions[node][0]["clients"]))
            try:
                rows = _scores_in(parts, len(own), self.task.loss == "cross_entropy", self._name(node))
            except WireError as error:
                troubles[node] = str(error)
                continue
            mixture = rows["mixture"].dtype if "mixture" in rows else mixture
            nothing = np.zeros((len(own), 0), dtype=np.float32)
            for place, test in enumerate(own.tolist()):
                right = rows["accuracy"][place] if "accuracy" in rows else None
                found[test] = (rows["loss"][place], right, rows.get("mixture", nothing)[place])
        for why in troubles.values():
            LOG.error("evaluation: %s", why)
        self.seen |= found
        every = [self.seen[test] for test in tests.tolist() if test in self.seen]
        if len(every) < len(tests):
            raise RoundError(
                f"{len(tests) - len(every)} of {len(tests)} tests were never scored: {_listed(troubles.values())}"
            )
        width = min(len(row[2]) for row in every)  # 0 where somebody keeps its mixture to itself
        return Scores(
            np.array([row[0] for row in every]),
            np.array([row[1] for row in every]) if every[0][1] is not None else None,
            np.array([row[2][:width] for row in every], dtype=mixture).reshape(len(every), width),
            self.task.loss == "cross_entropy" and self.task.test.y.dim() > 1,
        )

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
            yield node, own, {"clients": own.tolist(), "unchanged": unchanged}, parts

    def _opened_uploads(
        self, node: int, clients: Sequence[int], shared: Any, round: int, parts: Parts
    ) -> dict[int, Any]:
        """A node's uploads by client.

        Raises:
            WireError: one is not what this run's method uploads.
        """
        who = self._name(node)
        asked = {str(client): client for client in clients}
        found = by_client(unpacked(parts.get("uploads", b""), who))
        if strangers := found.keys() - asked.keys():
            raise WireError(f"{who}: {plain(min(strangers), 60)} is of no client that it was asked for")
        return {
            asked[client]: self._upload(own, asked[client], shared, round, f"{who}, client {client}")
            for client, own in found.items()
        }

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
        x, y = next(self.task.train.of_client(k) for k in range(self.task.num_clients) if self.task.train.count[k])
        size, clients = min(len(y), 2), self.task.num_clients
        data = Examples(x[:size], y[:size], np.zeros(clients, np.int64), np.full(clients, size))
        method = replace(method, local=replace(method.local, batch_size=size, epochs=1, steps=0))
        cohort = replace(self.cohort, method=method, train=data.to(self.cohort.train.x.device), chunk=1)
        upload, _ = cohort.trained(message, self.fresh, np.array([client]), round, np.array([float(size)]))
        return upload

    # The exchange.

    def ask(
        self, kind: str, questions: dict[int, tuple[Facts, Parts]], troubles: dict[int, str]
    ) -> Iterator[tuple[int, Facts, Parts]]:
        """The answers as they come; in `troubles` why a node has given none.

        Args:
            kind: "hello", "train" or "evaluate".
            questions: what each node is asked.
            troubles: is added to.
        """
        waiting = self._pushed(kind, questions)
        end, looked, gone = time.monotonic() + self.patience.answer, time.monotonic(), dict[int, float]()
        while waiting:
            begin = time.monotonic()
            answers = self._pulled(waiting, troubles)
            took = time.monotonic() - begin
            yield from answers
            now = time.monotonic()
            if now - looked > LOOK:
                looked, online = now, set(self.grid.get_node_ids())
                gone = {node: gone.get(node, now) for node in waiting.values() if node not in online}
            for name, node in list(waiting.items()):
                lost = node in gone and now - gone[node] > self.patience.gone
                if lost or now > end:
                    why = "is offline" if lost else f"has not answered for {self.patience.answer:.0f} s"
                    troubles[node] = f"{self._name(node)} {why}"
                    del waiting[name]
            if waiting and not answers:
                time.sleep(max(POLL, EASE * took))

    def _pushed(self, kind: str, questions: dict[int, tuple[Facts, Parts]]) -> dict[str, int]:
        """Sends the questions; the messages' names, and whom they are to."""
        if not questions:
            return {}
        from flwr.app import Message

        messages = []
        for node, (facts, parts) in questions.items():
            self.traffic["down"] += sum(map(len, parts.values()))
            content, group = content_of(facts | {"run": self.run}, parts), str(facts.get("round", ""))
            messages.append(Message(content, node, KINDS[kind], ttl=self.patience.answer, group_id=group))
        # A name is missing where the SuperLink did not take the message: its node is gone.
        return {n: node for n, node in zip(self.grid.push_messages(messages), questions, strict=True) if n}

    def _pulled(self, waiting: dict[str, int], troubles: dict[int, str]) -> list[tuple[int, Facts, Parts]]:
        """The answers that are there now, which are taken out of `waiting`."""
        found = []
        for answer in messages(self.grid, list(waiting), self.most) if waiting else ():
            if (node := waiting.pop(answer.metadata.reply_to_message_id, None)) is None:
                LOG.error("an answer came to what nobody has asked")
                continue
            who = self._name(node)
            if answer.has_error():
                troubles[node] = f"{who}: {plain(answer.error.reason, 1000)}"
                continue
            try:
                facts, parts = opened(answer.content, who)
            except WireError as error:
                troubles[node] = str(error)
                continue
            self.traffic["up"] += sum(map(len, parts.values()))
            if "refused" in facts:
                troubles[node] = plain(facts["refused"], 1000)
            else:
                found.append((node, facts, parts))
        return found

    def _name(self, node: int) -> str:
        return f"node {self.roster.names.get(node, node)!r}"


def lead(
    grid: "Grid",
    recipe: Recipe,
    folder: Path | None = None,
    patience: Patience | None = None,
    on_round: Callable[[Progress], None] | None = None,
) -> Result:
    """The whole run, with clients on the nodes of Flower's grid.

    Args:
        grid: Flower's.
        recipe: what to run.
        folder: where to keep recipe, metrics and checkpoints; a new one.
        patience: how long to wait for nodes.
        on_round: called after every round.

    Raises:
        UmbelError: nodes are missing, or no client's work could be used.
    """
    refuse_simulated(recipe.schedule)
    if folder is not None:
        check_free(folder)
    task = recipe.task.load(recipe.schedule.seed)
    task = pooled(task) if recipe.schedule.pool else task
    cohort, at = start(task, recipe.method, recipe.schedule, replace(recipe.engine, mode="looped"))
    nodes = Nodes(grid, recipe, task, cohort, at.shared, at.store.fresh(1), token_hex(8), patience or Patience())
    counted = nodes.gather()
    cost = cohort.cost(at.shared, at.store, participants(task.num_clients, recipe.schedule)[:1])
    kept = None
    if folder is not None:
        num_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tree.tensors(at.shared).values())
        facts = {"task": task.name, "num_clients": task.num_clients, "chunk": 1, "cost": asdict(cost)}
        facts |= {"schedule": asdict(recipe.schedule), "engine": asdict(recipe.engine), "deployed": nodes.run}
        folder.parent.mkdir(parents=True, exist_ok=True)
        kept = RunFolder.create(folder, recipe.identity(), recipe.table(), facts, num_bytes)
    history = []
    for progress in rounds(cohort, at, counted, recipe.schedule, cost, nodes):
        at = progress
        history.append(at.figures)
        if kept is not None:
            record(kept, at, counted, recipe.schedule)
        if on_round is not None:
            on_round(at)
    return Result(counted, recipe.schedule, cohort, at, history, [])


def refuse_simulated(schedule: Schedule) -> None:
    """Raises RecipeError if the recipe asks for what is done in the simulator only."""
    here = {
        "faults": schedule.faults.any,
        "attack": schedule.attack.kind != "none",
        "asynchronous": schedule.asynchronous.buffer > 0,
        "secure": schedule.secure.aggregation != "plain",
        "privacy": schedule.privacy.level != "none",
    }
    if asked := [name for name, wanted in here.items() if wanted]:
        raise RecipeError(
            f"[{asked[0]}] is for the simulator so far (umbel run); leave it out of a deployed recipe"
        )


def _counted(seen: Tally, upload: Any, client: int) -> None:
    seen.sent(upload, 1)
    seen.add(upload, np.array([client]))


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
        told = plain(_listed(tensors) or "nothing")
        raise WireError(f"{who}: its scores are {told}, where {_listed(dims)} are known")
    for name, leaf in tensors.items():
        if leaf.dim() != dims[name] or len(leaf) != num_tests or leaf.dtype not in (torch.float32, torch.float64):
            raise WireError(f"{who}: {name} is not of the {num_tests} tests that it was asked for")
    if ("accuracy" in tensors) != labels:
        raise WireError(f"{who}: its scores {'lack the' if labels else 'have an'} accuracy")
    check_finite(tensors, who)
    return {name: leaf.numpy() for name, leaf in tensors.items()}


def _same(one: Params, other: Params) -> bool:
    return list(one) == list(other) and all(equal(leaf, other[name]) for name, leaf in one.items())


def _listed(items: Any) -> str:
    return ", ".join(str(item) for item in items)
