"""What nodes send back, checked against what this run's method uploads: uploads and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel import tree
from umbel.clients import Examples
from umbel.cohort import Cohort
from umbel.errors import NotFiniteError, WireError
from umbel.flower.exchange import Trouble
from umbel.flower.facts import check_claims
from umbel.flower.roster import listed
from umbel.flower.wire import Parts, by_client, check_finite, filled, unpacked
from umbel.tree import Params
from umbel.untrusted import plain

RANGES = {"loss": (0.0, 1e30), "accuracy": (0.0, 100.0), "mixture": (0.0, 1.0)}
"""Between what scores are; a sum of such losses is finite."""
ROUNDING = 1e-2  # by how much scores may miss that, and a mixture's sum its own


@dataclass
class Uploads:
    """How the uploads of a run look, and those that look so."""

    cohort: Cohort
    first: Any  # Shared before the first round
    fresh: Any  # the Private (K = 1) of a client that has not trained
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the messages of the last round

    def opened(
        self,
        who: str,
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
        self._expect(shared, round)
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
                upload = self._filled(tensors, client, shared, round, sender)
                weight = None if self.cohort.weighting.rule == "rea" else weights[client]
                check_claims(upload, client, weight, sender)
                found[client] = upload
            except WireError as error:
                reason = "not finite" if isinstance(error, NotFiniteError) else "malformed"
                wrong[client] = Trouble(reason, str(error))
        return found, wrong

    def _expect(self, shared: Any, round: int) -> None:
        """Makes the pattern that of this round, where messages look otherwise: what fitted before does not now."""
        shapes = self._shapes_of(shared)
        if shapes != (self.shapes or self._shapes_of(self.first)):
            self.pattern = self.like(self._message(shared), 0, round)
        self.shapes = shapes

    def width(self, shared: Any) -> int:
        """How many shares a client's mixture has, 0 where nothing is mixed."""
        return int(self.cohort.method.mixture(self._message(shared), self.fresh).shape[1])

    def _message(self, shared: Any, client: int = 0) -> Any:
        return self.cohort.method.send(shared, torch.tensor([client], device=self.cohort.train.x.device))

    def _shapes_of(self, shared: Any) -> dict[str, torch.Size]:
        return {name: leaf.shape for name, leaf in tree.tensors(self._message(shared)).items()}

    def _filled(self, tensors: Params, client: int, shared: Any, round: int, who: str) -> Any:
        if any(leaf.shape[:1] != (1,) for leaf in tensors.values()):
            raise WireError(f"{who}: an upload is of one client, and these tensors have other lengths")
        try:
            return filled([self.pattern], tensors, who)
        except NotFiniteError:
            raise
        except WireError:  # what is uploaded may change with what is sent
            self.pattern = self.like(self._message(shared, client), client, round)
            return filled([self.pattern], tensors, who)

    @cached_property
    def pattern(self) -> Any:
        """An Upload (K = 1) like those that are to come."""
        return self.like(self._message(self.first), 0, 1)

    def like(self, message: Any, client: int, round: int) -> Any:
        """What a client would upload, had it a few examples: its form is what is wanted."""
        method: Any = self.cohort.method
        train, clients = self.cohort.train, self.cohort.train.num_clients
        x, y = next(train.of_client(k) for k in range(clients) if train.count[k])
        size = min(len(y), 2)
        data = Examples(x[:size], y[:size], np.zeros(clients, np.int64), np.full(clients, size))
        method = replace(method, local=replace(method.local, batch_size=size, epochs=1, steps=0))
        cohort = replace(self.cohort, method=method, train=data.to(self.cohort.train.x.device), chunk=1)
        upload, _ = cohort.trained(message, self.fresh, np.array([client]), round, np.array([float(size)]))
        return upload


def scores_in(parts: Parts, num_tests: int, labels: bool, width: int, who: str) -> dict[str, np.ndarray]:
    """The "loss", with labels "accuracy", and where it is told "mixture", of so many tests.

    Args:
        parts: as they came.
        num_tests: that were asked for.
        labels: whether there is an accuracy.
        width: of a mixture of this run's method.
        who: has sent them.

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
    for name, leaf in tensors.items():
        least, most = RANGES[name]
        if bool(((leaf < least - ROUNDING) | (leaf > most + ROUNDING)).any()):
            raise WireError(f"{who}: {name} is not between {least:g} and {most:g}")
    if "mixture" in tensors:
        check_mixture(tensors["mixture"], width, who)
    return {name: leaf.numpy() for name, leaf in tensors.items()}


def check_mixture(mixture: Tensor, width: int, who: str) -> None:
    """Raises WireError unless its rows are so long and sum to 1, or to 0 where a client has no route yet."""
    if mixture.shape[1] != width:
        raise WireError(f"{who}: a mixture has {mixture.shape[1]} shares, where {width} were expected")
    sums = mixture.sum(1)
    if width and bool((torch.minimum(sums.abs(), (sums - 1).abs()) > ROUNDING).any()):
        raise WireError(f"{who}: the shares of a mixture do not sum to 1")
