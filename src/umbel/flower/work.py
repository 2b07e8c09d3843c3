"""What a node does when it is asked: its clients' data, the model and what they keep, and answers to questions.

    hello      which clients it has, how many examples, and its fingerprint
    train      the server's messages to clients → their uploads; what they keep stays on this node's disk
    evaluate   the server's messages to clients → the scores of their own models on their own test data

Where clients or examples are protected, all but the first are answered in another way (protected.py).

No code and no path comes from the network: a recipe's task may name code only if the node's owner named it too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort, Engine
from umbel.errors import DataError, RecipeError, UmbelError, WireError
from umbel.evaluate import Scores, scores
from umbel.flower.facts import Figure, Hashes, Name, Number, Numbers, Text, fact, reason_of
from umbel.flower.fingerprint import Fingerprint, differences, fingerprint
from umbel.flower.kept import Kept
from umbel.flower.protected import STEPS, Protection, check_protection, counts_are_told, is_protected
from umbel.flower.vault import Vault
from umbel.flower.wire import Facts, Parts, by_client, filled, packed, unpacked
from umbel.folder import read_json, write
from umbel.onboarding import read_client, routed
from umbel.recipe import Recipe, Table, labels, load, read
from umbel.rounds import participants, sampled, start
from umbel.tasks import Task
from umbel.tasks.own import function_of
from umbel.tasks.pool import arranged
from umbel.tasks.task import split
from umbel.tree import Params
from umbel.untrusted import plain

RUN = re.compile(r"[0-9a-f]{16}")
SERVER = "the server"


@dataclass(frozen=True)
class NodeSettings:
    """What a node's owner decides.

    Attributes:
        name: what the node is called in messages.
        clients: which of the task's clients live here, "0-3" or "0,2,5-7".
        state: the folder in which their private states are kept.
        data: where their data are: "" in the recipe's task (trials); a folder with client-000003.safetensors or
            .npz; or "module:function", a function of a client's number that returns (x, y) or
            (x, y, x_test, y_test).
        recipe: a file; what is run are methods that it describes, as they stand there. "" for any.
        code: "module:function" that a recipe's task may call for its model; "" for none.
        share_mixture: whether a client's mixture is sent along with its scores.
        device: on which the clients train.
        threads: PyTorch's on the CPU; 0 leaves them as they are.
        most_megabytes: of a message from the server; what is longer is refused before it is put together.
    """

    name: str = "node"
    clients: str = "0"
    state: str = "state"
    data: str = ""
    recipe: str = ""
    code: str = ""
    share_mixture: bool = True
    device: str = "cpu"
    threads: int = 0
    most_megabytes: int = 1024

    @property
    def numbers(self) -> np.ndarray:
        """The clients, ascending."""
        found: set[int] = set()
        for part in str(self.clients).split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not ends or int(ends[2] or ends[1]) < int(ends[1]):
                raise RecipeError(f"clients = {self.clients!r}: numbers are wanted, such as 0-3 or 0,2,5-7")
            found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
        return np.array(sorted(found))


def settings_of(table: Mapping[str, Any]) -> NodeSettings:
    """The node's settings from a table; a name may be written with "-" for "_".

    Raises:
        RecipeError: it has an unknown name, or a value of the wrong type.
    """
    known = {field.name: type(field.default) for field in fields(NodeSettings)}
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"node: there is no setting {name!r} (there are: {', '.join(known)})")
        if name == "clients" and type(value) is int:
            values[name] = str(value)
        elif type(value) is not known[name]:
            raise RecipeError(f"node: {name} = {value!r}, where {known[name].__name__} is wanted")
    return NodeSettings(**values)


@dataclass(frozen=True)
class Work:
    """One run, as a node sees it."""

    settings: NodeSettings
    recipe: Recipe
    cohort: Cohort
    task: Task
    shared: Any  # the method's first: the pattern of what comes, and what never changes
    kept: Kept
    protection: Protection | None = None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the run starts from here."""
        return fingerprint(self.recipe.task, self.task, self.shared)

    def patterns(self, client: int) -> list[Any]:
        """Messages (K = 1) like those that the client may receive; the first is that of the first round."""
        method, one = self.cohort.method, torch.tensor([client], device=self.cohort.train.x.device)
        later = getattr(method, "later", None)
        return [method.send(shared, one) for shared in (self.shared, *(later(self.shared) if later else ()))]


@dataclass
class Site:
    """A node's side of all runs; the last run stays in memory."""

    settings: NodeSettings
    works: dict[str, Work] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Bytes of a message from the server."""
        return self.settings.most_megabytes * 1_000_000

    def answer(self, kind: str, facts: Facts, parts: Parts) -> tuple[Facts, Parts]:
        """The answer to a question; {"refused": why} where it cannot be given."""
        try:
            work = self._work(kind, facts)
            if kind == "hello":
                return hello(work, fact(facts, "fingerprint", Hashes, SERVER)), {}
            if work.protection is not None:
                return protected(work, work.protection, kind, facts, parts)
            if kind in STEPS:
                raise WireError("the server has begun a secure sum, and the recipe has none")
            return train(work, facts, parts) if kind == "train" else evaluate(work, facts, parts)
        except UmbelError as error:
            return {"refused": f"node {self.settings.name!r}: {reason_of(error)}"}, {}

    def _work(self, kind: str, facts: Facts) -> Work:
        run: str = fact(facts, "run", Name, SERVER)
        if not RUN.fullmatch(run):
            raise WireError(f"the server calls its run {plain(run)!r}, which is no run's name")
        folder = Path(self.settings.state).expanduser() / run
        known = folder / "recipe.json"
        if kind == "hello":
            table, label = fact(facts, "recipe", dict[str, Any], SERVER), fact(facts, "label", Name, SERVER)
            work = opened(self.settings, table, label, folder)
            # What clients keep was made under the recipe that was let in: masks, clips and noise are its settings.
            if known.is_file() and read(*_let_in(known)).identity() != work.recipe.identity():
                raise WireError(f"run {run} was let in with another recipe; begin a new run")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write(known, json.dumps({"table": table, "label": label}).encode(), secret=True)
            self.works = {run: work}
        elif run not in self.works:  # this process is younger than the run
            if not known.is_file():
                raise WireError(f"run {run} is not known here; begin a new run")
            self.works = {run: opened(self.settings, *_let_in(known), folder)}
        return self.works[run]


def _let_in(path: Path) -> tuple[Table, str]:
    """The recipe's table of a run that was let in, and its method."""
    told = read_json(path)
    return fact(told, "table", dict[str, Any], str(path)), fact(told, "label", Name, str(path))


def opened(settings: NodeSettings, table: Table, label: str, folder: Path) -> Work:
    """The run of a recipe that the server has sent.

    Raises:
        UmbelError: the recipe is not one that the node's owner lets in, or cannot be run here.
    """
    recipe = read(table, label)
    check_allowed(settings, recipe)
    task = recipe.task.load(recipe.schedule.seed)
    task = arranged(task, recipe.schedule)
    clients = settings.numbers
    if clients[-1] >= task.num_clients:
        raise RecipeError(f"clients = {settings.clients!r}, but {task.name} has {task.num_clients}, from 0 on")
    if settings.data:
        task = with_data(task, settings, recipe.schedule.seed)
    engine = Engine(mode="looped", device=settings.device, threads=settings.threads)
    cohort, at = start(task, recipe.method, recipe.schedule, engine)
    cohort, protection = replace(cohort, secret=True), None
    if is_protected(recipe.schedule):
        check_protection(recipe.schedule)
        last = recipe.schedule.rounds if cohort.ledger is None else cohort.ledger.last_round
        protection = Protection(Vault(folder), recipe.method, recipe.schedule, last, task.num_clients)
    return Work(settings, recipe, cohort, task, at.shared, Kept(folder, at.store.fresh(1)), protection)


def check_allowed(settings: NodeSettings, recipe: Recipe) -> None:
    """Raises RecipeError if the node's owner has not let this recipe, or the code that it names, in."""
    code = getattr(recipe.task, "code", "")
    if code and code != settings.code:
        raise RecipeError(
            f"the server's recipe calls {code}, which this node's owner has not let in; "
            f"with code = {code!r} in the node's settings it would"
        )
    if not settings.recipe and (paths := paths_of(recipe)):
        raise RecipeError(
            f"the server's recipe reads {plain(paths[0], 100)} on this node, which its owner has not let in; "
            "with the recipe's own file as recipe in the node's settings it would"
        )
    if settings.recipe:
        table = load(Path(settings.recipe).expanduser())
        if recipe.label not in labels(table):  # `read` would take any method that there is, with its defaults
            raise RecipeError(
                f"the server runs {plain(recipe.label)}, and {settings.recipe} describes "
                f"{', '.join(labels(table)) or 'no method'}"
            )
        told, pinned = recipe.identity(), read(table, recipe.label).identity()
        if told != pinned:
            key = next(key for key in {**told, **pinned} if told.get(key) != pinned.get(key))
            raise RecipeError(
                f"the server's recipe is another than {settings.recipe}: it says {key} = {told.get(key)}, "
                f"the file {pinned.get(key)}"
            )


def paths_of(recipe: Recipe) -> list[str]:
    """The folders that a recipe names, beside bases that are found by a name."""
    seeds = getattr(getattr(recipe.method, "adapter", None), "seeds", ())
    base = getattr(recipe.task, "base", "")
    steps = Path(base).parts if isinstance(base, str) else ()
    return [*seeds, *([base] if steps and (steps[0][0] in "/~." or ".." in steps) else [])]


def hello(work: Work, server: Fingerprint) -> Facts:
    """Who is here. The number of examples decides how much an upload counts, and is told where it has to be.

    Raises:
        WireError: the server has another base, or a client has no examples.
    """
    if wrong := differences(server, work.fingerprint):
        raise WireError(f"its base is not the server's; {'; '.join(wrong)}")
    clients = work.settings.numbers
    train = work.task.train
    if empty := clients[train.count[clients] < 1].tolist():
        raise WireError(f"client {empty[0]} has no examples")
    facts: Facts = {"name": work.settings.name, "clients": clients.tolist(), "fingerprint": work.fingerprint}
    if not counts_are_told(work.recipe.schedule):
        return facts
    facts["examples"] = train.count[clients].tolist()
    if train.slots is not None:
        facts["slots"] = train.slots[clients].tolist()
    if work.cohort.weighting.rule == "feddisco":
        labels = [train.of_client(int(client))[1].flatten().cpu().numpy() for client in clients]
        facts["label_counts"] = [np.bincount(own).tolist() for own in labels]
    return facts


def train(work: Work, facts: Facts, parts: Parts) -> tuple[Facts, Parts]:
    """The uploads of the round's clients; whoever's work is not finite sends nothing and keeps what it had."""
    begin = perf_counter()
    sent: Params = {}
    dropped: list[int] = []
    for client, message in received(work, facts, parts):
        upload = trained(work, work.cohort, facts, client, message)
        if upload is None:
            dropped.append(client)
            continue
        sent |= {f"{client}/{name}": leaf for name, leaf in tree.tensors(upload).items()}
    return {"dropped": dropped, "seconds": perf_counter() - begin}, {"uploads": packed(sent)}


def trained(work: Work, cohort: Cohort, facts: Facts, client: int, message: Any) -> Any | None:
    """The client's upload (K = 1), with what it keeps on disk; None, and nothing kept, if it is not finite."""
    round = fact(facts, "round", Number, SERVER)
    weight = np.array([_weight(work, facts, client)])
    before = started(work, facts, client, message, work.kept.before(client, round))
    upload, after = cohort.trained(message, before, np.array([client]), round, weight)
    good = tree.finite_rows(upload)
    if tree.tensors(after):
        good &= tree.finite_rows(after)
    if not bool(good.all()):
        return None
    if tree.tensors(after):
        work.kept.put(client, round, before, after)
    return upload


def _weight(work: Work, facts: Facts, client: int) -> float:
    """How much the client counts: what the server says; under masks, or where it cannot know, what the client has.

    Raises:
        WireError: the server would have it count otherwise: with all others at 0 a masked sum is one client's.
    """
    schedule, said = work.recipe.schedule, None
    if counts_are_told(schedule) or "weights" in facts:
        weights = fact(facts, "weights", dict[str, Figure], SERVER)
        said = float(fact(weights, str(client), Figure, SERVER))
    masked, uniform = schedule.secure.aggregation == "masks", schedule.weighting.rule == "uniform"
    if said is not None and counts_are_told(schedule) and (uniform or not masked):
        return said
    own = float(work.cohort.weighting.of(work.task.train, np.array([client]))[0])
    if said is not None and said != own:
        raise WireError(f"the server would have client {client} count {said:g}, where it counts {own:g}")
    return own


def evaluate(work: Work, facts: Facts, parts: Parts) -> tuple[Facts, Parts]:
    """The scores of the clients' own models on their own tests."""
    found = scored(work, facts, dict(received(work, facts, parts)))
    told = {"loss": torch.from_numpy(found.loss)}
    if found.accuracy is not None:
        told["accuracy"] = torch.from_numpy(found.accuracy)
    if work.settings.share_mixture:
        told["mixture"] = torch.from_numpy(found.mixture)
    return {}, {"scores": packed(told)}


def scored(work: Work, facts: Facts, messages: dict[int, Any]) -> Scores:
    """How well the models of clients that have received these messages (K = 1) do on their tests."""
    tests = work.task.tests_of(np.array(sorted(messages)))
    serves = None if work.task.serves is None else work.task.serves.cpu().numpy()

    def serve(cohort: Cohort, chunk: np.ndarray) -> tuple[Params, Tensor]:
        client = int(chunk[0] if serves is None else serves[chunk][0])
        own = started(work, facts, client, messages[client], work.kept.latest(client))
        return cohort.serving(messages[client], own, np.array([client]))

    return scores(work.cohort, serve, work.task.test.to(work.cohort.train.x.device), tests)


def protected(work: Work, protection: Protection, kind: str, facts: Facts, parts: Parts) -> tuple[Facts, Parts]:
    """The answer where clients or examples are protected."""
    clients = fact(facts, "clients", Numbers, SERVER)
    if strangers := [client for client in clients if client not in work.settings.numbers]:
        raise WireError(f"the server has written to client {strangers[0]}, who is not here")
    if kind in STEPS:
        return protection.step(kind, facts, parts)
    messages = received(work, facts, parts)
    if kind == "evaluate":
        return protection.evaluate(facts, parts, messages, lambda client, own: scored(work, facts, {client: own}))
    cohort = _noisy(work, facts)
    return protection.train(facts, parts, messages, lambda client, own: trained(work, cohort, facts, client, own))


def _noisy(work: Work, facts: Facts) -> Cohort:
    """The cohort with the noise that all nodes put on their steps, where examples are protected.

    Raises:
        WireError: it is less than what this node's own clients need, or a client is not among the round's.
    """
    cohort, schedule = work.cohort, work.recipe.schedule
    if schedule.privacy.level != "example" or cohort.ledger is None:
        return cohort
    told, least = fact(facts, "noise_multiplier", Figure, SERVER), cohort.ledger.privacy.noise_multiplier
    if told < least * (1 - 1e-6):
        raise WireError(f"the server's noise multiplier is {told:g}, and this node's clients need {least:g}")
    round = fact(facts, "round", Number, SERVER)
    drawn = sampled(participants(work.task.num_clients, schedule), schedule, round)
    if others := np.setdiff1d(facts["clients"], drawn).tolist():
        raise WireError(f"client {others[0]} was not drawn for round {round}; its ε counts that")
    privacy = replace(cohort.ledger.privacy, noise_multiplier=told)
    return replace(cohort, ledger=replace(cohort.ledger, privacy=privacy))


def started(work: Work, facts: Facts, client: int, message: Any, private: Any) -> Any:
    """The client's private state; one that has come after the run began finds its routes before it trains.

    Raises:
        WireError: examples are protected, of whose gradients those routes would tell without noise.
    """
    newcomers = fact(facts, "newcomers", Numbers, SERVER) if "newcomers" in facts else ()
    if newcomers and work.recipe.schedule.privacy.level == "example":
        raise WireError("the server speaks of newcomers, and where examples are protected there are none")
    if client not in newcomers or work.kept.knows(client):
        return private
    with torch.enable_grad():
        return routed(work.cohort, message, private, np.array([client]))


def received(work: Work, facts: Facts, parts: Parts) -> Iterator[tuple[int, Any]]:
    """The clients that the server has written to, and what it sent them (K = 1), checked.

    Raises:
        WireError: a message is not what this run's method sends, or is to a client that is not here.
    """
    clients, same = fact(facts, "clients", Numbers, SERVER), fact(facts, "unchanged", list[Text], SERVER)
    here = set(work.settings.numbers.tolist())
    if strangers := [client for client in clients if client not in here]:
        raise WireError(f"the server has written to client {strangers[0]}, who is not here")
    if len(set(clients)) < len(clients):
        raise WireError("the server has written to a client twice in one message")
    common, own, beside = (unpacked(parts.get(part, b""), SERVER) for part in ("common", "own", "beside"))
    rows = by_client(own)
    for client in clients:
        who = f"the server, to client {client}"
        patterns = work.patterns(client)
        known = tree.tensors(patterns[0])
        if strange := [name for name in same if name not in known]:
            raise WireError(f"{who}: {plain(strange[0], 60)} is said to be as it was, but was not expected")
        tensors = {name: known[name] for name in same} | common | rows.get(str(client), {})
        message = filled(patterns, tensors, who)
        if beside:
            method: Any = work.cohort.method
            message = method.with_beside(message, filled([method.told(work.shared)], beside, who))
        yield client, message


def with_data(task: Task, settings: NodeSettings, seed: int) -> Task:
    """The task with this node's own data in place of its own; other clients have none.

    Raises:
        DataError: a client's file or function gives no data that the model can train on.
    """
    if task.serves is not None:
        raise DataError(
            f"{task.name}: pooled slots have tests of several owners; leave the node's data to the task"
        )
    clients = settings.numbers
    given = [client_data(settings.data, client) for client in clients.tolist()]
    trains, tests = [own for own, _ in given], [test for _, test in given]
    if untested := [place for place, test in enumerate(tests) if test is None]:
        kept, held = split(Examples.of([trains[place] for place in untested]), 0.25, seed)
        for row, place in enumerate(untested):
            trains[place], tests[place] = kept.of_client(row), held.of_client(row)
    train, test = Examples.of(trains), Examples.of([own for own in tests if own is not None])
    return replace(task, train=_spread(train, clients, task), test=_spread(test, clients, task), group=task.group)


def client_data(source: str, client: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """A client's (x, y) and, if they are given, (x_test, y_test); see NodeSettings.data."""
    if ":" in source and not Path(source).exists():
        given = function_of(source)(client)
        if (
            not isinstance(given, tuple)
            or len(given) not in (2, 4)
            or not all(isinstance(t, Tensor) for t in given)
        ):
            raise DataError(
                f"{source} must return the tensors (x, y) or (x, y, x_test, y_test) of client {client}"
            )
        return (given[0], given[1]), (given[2], given[3]) if len(given) == 4 else None
    stem = Path(source).expanduser() / f"client-{client:06d}"
    files: Iterable[Path] = (stem.with_suffix(".safetensors"), stem.with_suffix(".npz"))
    found = next((path for path in files if path.is_file()), None)
    if found is None:
        raise DataError(f"client {client} has no data: there is no {stem}.safetensors or .npz")
    return read_client(found)


def _spread(examples: Examples, clients: np.ndarray, task: Task) -> Examples:
    """Examples of these clients under their numbers in the task; the others have none."""
    start, count = np.zeros(task.num_clients, np.int64), np.zeros(task.num_clients, np.int64)
    start[clients], count[clients] = examples.start, examples.count
    return Examples(examples.x, examples.y, start, count)
