"""A round's clients, on their nodes: they are asked, and what they answer is handed on.

Uploads are handed on in the order of the clients, whatever order they come in, so that the sums are the same.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from secrets import randbits
from typing import Any

import numpy as np

from umbel.cohort import Cohort, Tally
from umbel.errors import RoundError, WireError
from umbel.evaluate import Scores, SummedScores
from umbel.flower.answers import Uploads, scores_in
from umbel.flower.attendance import Attendance
from umbel.flower.exchange import LOG, Exchange, Trouble
from umbel.flower.facts import Figure, Numbers, fact
from umbel.flower.letters import letters
from umbel.flower.protected import counts_are_told
from umbel.flower.summed import Asking, summed, summed_scores
from umbel.flower.wire import Facts, Parts
from umbel.meeting import Cut, Total, contributed
from umbel.rounds import sampled
from umbel.schedule import Schedule
from umbel.tasks import Task

FRUITLESS = 5  # rounds in a row of which nothing could be used: another one would mend nothing


@dataclass
class Nodes:
    """The clients of a run, on their nodes (a `Fleet`)."""

    exchange: Exchange
    schedule: Schedule
    task: Task  # as the server has it: of its data only the form and the counts matter, which nodes tell
    cohort: Cohort
    first: Any  # Shared before the first round
    attendance: Attendance
    forms: Uploads
    seen: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # a test's last scores
    round: int = 0  # the last one that was begun
    unscored: tuple[Any, np.ndarray] | None = None  # a state, and whose owners are to know how well it does
    fruitless: int = 0  # rounds in a row that were lost by what came, or was refused

    def sampled(self, members: np.ndarray, schedule: Schedule, round: int) -> np.ndarray:
        """The clients of a round, by the seed; where noise hides who takes part, by the operating system."""
        hidden = schedule.privacy.level == "client"
        return sampled(members, replace(schedule, seed=randbits(62)) if hidden else schedule, round)

    def uploads(self, shared: Any, clients: np.ndarray, round: int, seen: Tally) -> Iterator[Any]:
        """The uploads of the round's clients, ascending, one by one; what does not come is counted as lost.

        Raises:
            RoundError: for the last of `FRUITLESS` rounds in a row some came, and none could be used.
            DeployError: nobody is there.
        """
        joined = self.attendance.attend(round)
        self.round, told_loss = round, self.schedule.privacy.level == "none"
        begin, before = time.perf_counter(), dict(self.exchange.traffic)
        roster, there = self.attendance.roster, self.attendance.there(clients)
        weights = self._weights(there)
        questions: dict[int, tuple[Facts, Parts]] = {}
        for node, own, facts, parts in self._letters(shared, there):
            told = {str(client): weights[client] for client in own.tolist()}
            questions[node] = (facts | {"round": round, "weights": told, **self._noise()}, parts)
        troubles: dict[int, Trouble] = {}
        lost = {client: Trouble("missing", "") for client in np.setdiff1d(clients, there).tolist()}
        ready: dict[int, Any] = {}
        waiting, used, slowest = there.tolist(), 0, 0.0
        for node, told, parts in self.exchange.ask("train", questions, troubles, self.exchange.patience.deadline):
            asked, who = roster.of(node, waiting), self.exchange.name(node)
            try:
                slowest = max(slowest, fact(told, "seconds", Figure, who))
                dropped = fact(told, "dropped", Numbers, who)
                found, wrong = self.forms.opened(who, asked, shared, round, parts, weights)
            except WireError as error:
                troubles[node] = Trouble("malformed", str(error))
                continue
            ready |= found
            unsound = [client for client in asked if client in dropped and client not in found]
            seen.dropped.extend(unsound)
            nothing = Trouble("malformed", f"{who} has sent nothing for a client of its own")
            lost |= {client: wrong.get(client, nothing) for client in asked if client not in {*found, *unsound}}
            waiting = [client for client in waiting if client not in asked or client in ready]
            while waiting and waiting[0] in ready:
                used += 1
                yield _counted(seen, ready.pop(waiting[0]), waiting.pop(0), told_loss)
        for client in sorted(ready):  # after some that never came
            used += 1
            yield _counted(seen, ready.pop(client), client, told_loss)
        for node, trouble in troubles.items():
            lost |= dict.fromkeys(roster.of(node, waiting), trouble)
        seen.lose(Counter(trouble.reason for trouble in lost.values()))
        seen.lose({"duplicate": self.exchange.duplicates})
        self.exchange.duplicates = 0
        reasons = list(dict.fromkeys(str(trouble) for trouble in lost.values() if str(trouble)))
        for why in reasons:
            LOG.error("round %d: %s", round, why)
        useless = bool(seen.dropped) or not {trouble.reason for trouble in lost.values()} <= {"late", "missing"}
        self.fruitless = 0 if used else self.fruitless + useless
        if self.fruitless == FRUITLESS:
            raise RoundError(
                f"round {round}: for {FRUITLESS} rounds no client's work could be used"
                f"{''.join(f'{chr(10)}  {r}' for r in reasons)}"
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
        joined = self.attendance.attend(round)
        self.round = round
        begin, before = time.perf_counter(), dict(self.exchange.traffic)
        if not len(clients):
            return Total(None)
        told, there = self._noise(), self.attendance.there(clients)
        if cut is not None:
            told["clips"] = {name: float(clip) for name, clip in cut.clips.items()}
        if counts_are_told(schedule):  # else a client weighs itself
            told["weights"] = {str(client): weight for client, weight in self._weights(there).items()}
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
        return self.forms.like(self.cohort.method.send(shared, self.cohort.index(client)), int(client[0]), 1)

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

        return Asking(ask, self.attendance.roster.homes, letters, about, self.round)

    def scores(self, shared: Any, tests: np.ndarray) -> tuple[np.ndarray, Scores | SummedScores] | None:
        """The scores that the clients' nodes have found, and of which tests.

        Of a node that is gone they are the last that it told; clients that no node has had so far are left out.
        Under masks it is sums of scores; with noise nothing, and nodes are asked later, for their owners.
        """
        serves = None if self.task.serves is None else self.task.serves.cpu().numpy()
        there = self.attendance.there(np.unique(tests if serves is None else serves[tests]))
        if self.schedule.privacy.level != "none":  # what clients measure is in no account
            self.unscored = shared, there
            return None
        if self.schedule.secure.aggregation == "masks":
            asking, rights = self._asking("evaluate", shared, {}), self.task.loss == "cross_entropy"
            together = summed_scores(asking, there.tolist(), self.schedule, rights)
            return None if together is None else (tests, together)
        questions = {node: (facts, parts) for node, _, facts, parts in self._letters(shared, there, settling=True)}
        troubles: dict[int, Trouble] = {}
        found: dict[int, tuple[Any, ...]] = {}
        mixture: Any = np.float32
        deadline, wide = self.exchange.patience.deadline, self.forms.width(shared)
        for node, _, parts in self.exchange.ask("evaluate", questions, troubles, deadline):
            own = self.task.tests_of(np.array(questions[node][0]["clients"]))
            try:
                labels = self.task.loss == "cross_entropy"
                rows = scores_in(parts, len(own), labels, wide, self.exchange.name(node))
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

    def score_for_owners(self) -> None:
        """Lets nodes find the scores that `scores` has not asked for, which stay with their owners.

        That tells them the state, so it has to wait for its checkpoint: were the server to die before, it would do
        the round again with other noise, and so tell twice what ε counts once.
        """
        if self.unscored is None:
            return
        (shared, clients), self.unscored = self.unscored, None
        asking = self._asking("evaluate", shared, {})
        for _ in asking.ask("evaluate", asking.letters(clients.tolist()), asking.troubles):
            pass
        asking.complain("evaluation")

    def _letters(
        self, shared: Any, clients: np.ndarray, settling: bool = False
    ) -> Iterator[tuple[int, np.ndarray, Facts, Parts]]:
        """See `letters`."""
        at = self.attendance
        return letters(self.cohort, self.first, shared, at.roster.homes, clients, at.newcomers, settling)

    def _weights(self, clients: np.ndarray) -> dict[int, float]:
        """How much each counts, by the recipe's rule."""
        weights = self.attendance.roster.weights(self.cohort.weighting, clients)
        return dict(zip(clients.tolist(), weights.tolist(), strict=True))


def _counted(seen: Tally, upload: Any, client: int, told_loss: bool) -> Any:
    """The upload, which `seen` has counted."""
    seen.sent(upload, 1)
    seen.arrived(np.array([client]))
    if told_loss:
        seen.losses(float(upload.loss.sum()), 1)
    return upload
