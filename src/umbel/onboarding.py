"""Onboarding: clients that never trained get a model from a few samples of their own, adapters untouched.

    routes      π from n samples: `settle` of the method, or, where routers learn by gradient, SGD on the C
                logits alone. A method without routes makes its own model of the samples, as it would of a
                client's first round
    fine-tune   the model of a client that nobody knows, all of its tensors trained on n samples but for the
                weights of a mixture; where that is not finite, that model
    global      that model as it is: n = 0

The samples of a client are the same for every way, and those for a small n are among those for a larger one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.clients import ClientData, Examples
from umbel.cohort import Cohort
from umbel.errors import DataError, RecipeError
from umbel.evaluate import Scores, Serve, scores
from umbel.folder import ONBOARDING, write_json
from umbel.methods import Method
from umbel.methods.ensemble import Mixture
from umbel.methods.settling import choose, stacked
from umbel.model.loss import mixes_examples, running_stats
from umbel.rounds import Progress, held_out, participants
from umbel.runs import Result, module_with, opened
from umbel.seeds import generator
from umbel.tasks import Task
from umbel.train import LocalTraining, local_train
from umbel.tree import Params
from umbel.untrusted import arrays_of, tensors_of

SAMPLES = (0, 1, 2, 5, 10, 20, 50)
TUNING_EPOCHS = 5  # of fine-tuning
ROUTE_STEPS = 100  # of gradient descent on the logits, each with all samples

Served = tuple[Params, Tensor]
"""K clients' models, and (K, C) how they mix."""


@dataclass(frozen=True)
class Point:
    """How well clients do that have so many samples."""

    samples: int
    scores: np.ndarray  # (K,) accuracy in %, or loss

    @property
    def mean(self) -> float:
        """Over clients."""
        return float(self.scores.mean())

    @property
    def std(self) -> float:
        """The sample standard deviation over clients; 0 of one."""
        return float(self.scores.std(ddof=1)) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Onboarding:
    """What unseen clients get from their samples, beside the clients that trained."""

    round: int
    metric: str  # "accuracy" in %, or "loss"
    clients: list[int]
    trained: Point  # the clients that trained, with all of their samples
    ways: dict[str, list[Point]]  # "routes", "fine-tune", "global"
    settles: bool  # whether the method has anything to learn for a new client without fine-tuning

    def document(self) -> dict[str, Any]:
        """For onboard.json."""

        def plain(point: Point) -> dict[str, Any]:
            figures = {"samples": point.samples, "mean": point.mean, "std": point.std}
            return figures | {"scores": [round(float(score), 5) for score in point.scores]}

        ways = {way: [plain(point) for point in points] for way, points in self.ways.items()}
        trained = {"clients": len(self.trained.scores), "mean": self.trained.mean, "std": self.trained.std}
        about = {"round": self.round, "metric": self.metric, "settles": self.settles, "clients": self.clients}
        return about | {"trained": trained, "ways": ways}


@dataclass(frozen=True)
class Personal:
    """What one unseen client gets."""

    samples: int
    mixture: list[float]  # C; empty where nothing is mixed
    tensors: Params  # of its model, by name
    figures: dict[str, float]  # way → accuracy in %, or loss, on its test data; {} without any
    ways: dict[str, list[Point]]  # the same by number of samples, as in `Onboarding`


def onboard(
    run: Result | str | Path,
    samples: Sequence[int] = SAMPLES,
    task: Task | None = None,
    method: Method | None = None,
) -> Onboarding:
    """How well the clients that were held out of training do with so many samples each.

    Args:
        run: a run with `Schedule.held_out` above 0, or its folder, where onboard.json is written.
        samples: how many of its training samples each client has; one with fewer uses all it has.
        task: needed for the folder of a run of your own task; likewise `method`.
        method: see `task`.

    Raises:
        RecipeError: no client was held out, or a number of samples is negative.
        RunFolderError: the folder is no run, or has no checkpoint yet.
    """
    _check_samples(samples)
    result = run if isinstance(run, Result) else opened(run, task, method)
    clients = held_out(result.task.num_clients, result.schedule)
    if result.task.serves is not None:
        raise RecipeError("pool: the clients of this run are pooled, and none of them is onboarded slot by slot")
    if not len(clients):
        raise RecipeError(
            "every client of this run has trained, so none is left to be onboarded; hold some out of a new run, "
            "umbel run RECIPE --method LABEL --held_out=0.2, or give a client of your own with --data FILE"
        )
    cohort, test = result.cohort, result.task.test.to(result.cohort.train.x.device)
    ways = _by_samples(result, clients, test, samples)
    members = participants(result.task.num_clients, result.schedule)
    at = result.progress

    def served(own: Cohort, chunk: np.ndarray) -> Served:
        return own.served(at.shared, at.store.rows(chunk), chunk)

    trained = Point(int(cohort.train.count[members].mean()), _score(scores(cohort, served, test, members)))
    metric = "accuracy" if cohort.loss.name == "cross_entropy" else "loss"
    found = Onboarding(at.round, metric, clients.tolist(), trained, ways, _settles(result, clients))
    if not isinstance(run, Result):
        write_json(Path(run) / ONBOARDING, found.document())
    return found


def onboard_client(
    run: Result | str | Path,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None = None,
    task: Task | None = None,
    method: Method | None = None,
    samples: Sequence[int] = (),
) -> Personal:
    """The mixture and the model of one client that the run has never seen.

    Args:
        run: a run, or its folder.
        train: the client's x and y.
        test: what its models are scored on.
        task: needed for the folder of a run of your own task; likewise `method`.
        method: see `task`.
        samples: with so many of its training samples it is scored too, beside all of them.

    Raises:
        DataError: the data does not fit the run's model.
        RecipeError: the server keeps something about each client, such as an oracle's groups, and knows
            nothing of this one.
    """
    _check_samples([*samples, 0])
    result = run if isinstance(run, Result) else opened(run, task, method)
    place = _place(result)
    known = result.cohort.train
    sets = [_fitting(known, *train, "train")] + ([_fitting(known, *test, "test")] if test is not None else [])
    Task("client", result.task.model, result.task.loss, Examples.of(sets[:1]), Examples.of(sets[-1:]))  # checks
    own, seen = (_only(known, place, *pair).to(known.x.device) for pair in (sets[0], sets[-1]))
    client = np.array([place])
    result = replace(result, cohort=replace(result.cohort, train=own))
    params, mixture = _serve(result.progress, _settled)(result.cohort, client)
    ways = {} if test is None else _by_samples(result, client, seen, [*samples, len(train[1])])
    figures = {way: points[-1].mean for way, points in ways.items()}
    model = module_with(result.cohort.loss.module, params)
    tensors = {name: leaf.detach().clone() for name, leaf in model.state_dict().items()}
    return Personal(len(train[1]), mixture[0].tolist(), tensors, figures, ways)


def _check_samples(samples: Sequence[int]) -> None:
    if not samples or min(samples) < 0:
        raise RecipeError(f"samples must be numbers from 0 on, got {list(samples)}")


def _by_samples(
    result: Result, clients: np.ndarray, test: Examples, samples: Sequence[int]
) -> dict[str, list[Point]]:
    """How well each way does with so many samples of these clients; more than anyone has is the same as all."""
    cohort = result.cohort
    ways: dict[str, list[Point]] = {"routes": [], "fine-tune": [], "global": []}
    score = _score(scores(cohort, _serve(result.progress, _fresh), test, clients))
    most = int(cohort.train.count[clients].max())
    for count in sorted({min(count, most) for count in samples}):
        if count == 0:
            for points in ways.values():
                points.append(Point(0, score))
            continue
        few = replace(cohort, train=first_samples(cohort.train, clients, count, cohort.seed))
        for way, serve in (("routes", _settled), ("fine-tune", _tuned)):
            own = scores(few, _serve(result.progress, serve), test, clients)
            ways[way].append(Point(count, _score(own)))
        ways["global"].append(Point(count, score))
    return ways


def routed(cohort: Cohort, message: Any, private: Any, clients: np.ndarray) -> Any:
    """The private states of clients that come late, with routes learned from their own data; all else is fresh.

    Args:
        cohort: with the clients' data.
        message: what the server sends them now (K, …).
        private: of clients that nobody has seen (K, …).
        clients: (K,) who they are.
    """
    if getattr(cohort.method, "router", None) is None:
        return private
    data = ClientData(cohort.train, clients, cohort.seed, 0, None, cohort.augment)
    return replace(private, logits=_routes(cohort, message, private, data).logits)


def read_client(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The (x, y) and, if it is there, the (x_test, y_test) of an .npz or a .safetensors file.

    Raises:
        DataError: the file cannot be read, or has no x or y.
    """
    try:
        if path.suffix == ".safetensors":
            arrays, _ = tensors_of(path)
        elif path.suffix == ".npz":
            arrays = {name: torch.from_numpy(array) for name, array in arrays_of(path).items()}
        else:
            raise DataError(f"{path}: .npz or .safetensors is wanted, with x, y and, to be scored, x_test, y_test")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if missing := [name for name in ("x", "y") if name not in arrays]:
        raise DataError(f"{path} has no {' and no '.join(missing)}; there are {', '.join(arrays) or 'no arrays'}")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path} has one of x_test and y_test; to be scored it takes both")
    test = (arrays["x_test"], arrays["y_test"]) if {"x_test", "y_test"} <= set(arrays) else None
    return (arrays["x"], arrays["y"]), test


def first_samples(examples: Examples, clients: np.ndarray, count: int, seed: int) -> Examples:
    """At most `count` samples of each of these clients, under the same numbers; other clients have none.

    They are drawn by the seed, and are among those that a larger `count` gives.
    """
    chosen: list[Tensor] = []
    start, counts = np.zeros_like(examples.start), np.zeros_like(examples.count)
    for client in clients.tolist():
        order = torch.randperm(int(examples.count[client]), generator=generator(seed, "onboarding", client))
        rows = order[:count] + int(examples.start[client])
        start[client], counts[client] = sum(len(own) for own in chosen), len(rows)
        chosen.append(rows)
    index = torch.cat(chosen).to(examples.x.device)
    return Examples(examples.x[index], examples.y[index], start, counts)


Way = Callable[[Cohort, Any, Any, ClientData], Served]
"""(cohort, message, fresh private, samples) → models and mixtures."""


def _serve(at: Progress, way: Way) -> Serve:
    """For `scores`: the models of clients that nobody has seen yet, each made in this way."""

    def serve(cohort: Cohort, clients: np.ndarray) -> Served:
        index = torch.from_numpy(clients.astype(np.int64)).to(cohort.train.x.device)
        data = ClientData(cohort.train, clients, cohort.seed, 0, None, cohort.augment)
        with torch.enable_grad():
            return way(cohort, cohort.method.send(at.shared, index), at.store.fresh(len(clients)), data)

    return serve


def _fresh(cohort: Cohort, message: Any, private: Any, _data: ClientData) -> Served:
    return cohort.method.personalize(message, private), cohort.method.mixture(message, private)


def _settled(cohort: Cohort, message: Any, private: Any, data: ClientData) -> Served:
    return _fresh(cohort, message, _routes(cohort, message, private, data), data)


def _routes(cohort: Cohort, message: Any, private: Any, data: ClientData) -> Any:
    """The private states, settled, and where routers learn by gradient with logits that have."""
    with torch.no_grad():
        private = cohort.method.settle(cohort.loss, message, private, data)
    router = _gradient_router(cohort.method)
    if router is not None:
        plain = replace(data, augment=None)
        private = stacked(_descended(cohort, router.lr), cohort.loss, message, private, plain)
    return private


def _gradient_router(method: Any) -> Any:
    router = getattr(method, "router", None)
    return router if getattr(router, "kind", None) == "gradient" else None


def _descended(cohort: Cohort, lr: float) -> Callable[[Any, Any, ClientData], Any]:
    """Gradient descent on the logits alone, which the adapters and the noise of training do not see."""
    method, loss = cohort.method, cohort.loss

    def work(message: Any, private: Any, data: ClientData) -> Any:
        def objective(groups: dict[str, Params], batch: Any, _step: int) -> Tensor:
            own = replace(private, logits=groups["router"]["logits"])
            return loss(method.personalize(message, own), batch, training=False)

        everything = LocalTraining(lr, batch_size=data.num_steps(1), epochs=ROUTE_STEPS)
        start = {"router": {"logits": private.logits}}
        trained, _ = local_train(objective, start, data, everything, {"router": lr}, plain=frozenset({"router"}))
        return replace(private, logits=trained["router"]["logits"])

    return work


def _tuned(cohort: Cohort, message: Any, private: Any, data: ClientData) -> Served:
    loss, (params, mixture) = cohort.loss, _fresh(cohort, message, private, data)
    stats = running_stats(loss.module)
    fixed = {"probs"} if isinstance(loss.module, Mixture) else set()  # by plain steps they would leave the simplex
    # A few samples are no batch for BatchNorm, and one is none at all: it keeps the statistics of training.
    training = not mixes_examples(loss.module)
    start = {
        "model": {name: leaf for name, leaf in params.items() if name not in stats and name not in fixed},
        "mixture": {name: leaf for name, leaf in params.items() if name in fixed},
        "stats": {name: leaf for name, leaf in params.items() if name in stats},
    }
    local = replace(cohort.method.local, epochs=TUNING_EPOCHS, steps=0)
    trained, _ = local_train(
        lambda groups, batch, _step: loss(groups["model"] | groups["mixture"] | groups["stats"], batch, training),
        start,
        data,
        local,
        {"model": local.lr},
    )
    tuned = trained["model"] | trained["mixture"] | trained["stats"]
    return choose(tree.finite_rows(tuned), tuned, params), mixture


def _settles(result: Result, clients: np.ndarray) -> bool:
    """Whether a new client's samples change its model in any way but fine-tuning."""
    for chunk in result.cohort.chunks(clients):
        fresh, _ = _serve(result.progress, _fresh)(result.cohort, chunk)
        settled, _ = _serve(result.progress, _settled)(result.cohort, chunk)
        if any(not torch.equal(leaf, settled[name]) for name, leaf in fresh.items()):
            return True
    return False


def _score(found: Scores) -> np.ndarray:
    return found.loss if found.accuracy is None else found.accuracy


def _place(result: Result) -> int:
    """The number under which a new client goes: that of one held out, of whom the server knows nothing.

    Raises:
        RecipeError: nobody was held out, and what the server sends depends on who asks.
    """
    clients = held_out(result.task.num_clients, result.schedule)
    router = getattr(result.cohort.method, "router", None)
    if getattr(router, "kind", None) == "oracle":
        raise RecipeError("this run's router is an oracle, and knows nothing of the group of a client of your own")
    if len(clients):
        return int(clients[0])
    device = result.cohort.train.x.device
    message = result.cohort.method.send(
        result.progress.shared, torch.arange(result.task.num_clients, device=device)
    )
    leaves = tree.tensors(message).values()
    if any(not tree.is_broadcast(leaf) and bool((leaf != leaf[:1]).any()) for leaf in leaves):
        raise RecipeError(
            "the server of this method keeps something about every client and knows nothing of a new one; train "
            "with clients held out, --held_out=0.2"
        )
    return 0


def _fitting(known: Examples, x: Tensor, y: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """The data in the types of the run's own."""
    for name, values, like in (("inputs", x, known.x), ("targets", y, known.y)):
        if values.shape[1:] != like.shape[1:]:
            raise DataError(
                f"{split}: {name} are of shape {tuple(values.shape[1:])}, those of the run {tuple(like.shape[1:])}"
            )
        if like.is_floating_point() != values.is_floating_point():
            raise DataError(f"{split}: {name} are {values.dtype}, those of the run {like.dtype}")
    return x.to(known.x.dtype), y.to(known.y.dtype)


def _only(known: Examples, place: int, x: Tensor, y: Tensor) -> Examples:
    """Examples of the client with this number alone."""
    count = np.zeros_like(known.count)
    count[place] = len(y)
    return Examples(x, y, np.zeros_like(known.start), count)
