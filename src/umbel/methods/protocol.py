"""What a method is: a parameterization, a local objective, and how uploads meet."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from umbel.clients import ClientData
from umbel.mixing import Change
from umbel.model.loss import Loss
from umbel.train import LocalTraining
from umbel.tree import Params

Way = Literal["sum", "moves", "mean", "steps", "own_labels", "numbers"]
"""How uploads may meet that do not come as they are, and what else not every method can do:

sum     the server has nothing but their sum: under masks, or with noise for clients
moves   that sum is of how far tensors have moved, which is what is clipped under noise for clients
mean    something else stands in for the mean of uploads: a robust rule, rounds without a deadline
steps   noise on the steps of the local training covers all that is uploaded: noise for examples

own_labels    an example's answer is among its own task's labels (`labels_each` of a task); silence is consent here
numbers       targets are no class labels, or the loss is no cross-entropy; silence is consent here too
"""
Refusals = Mapping[Way, str]  # why a way is closed to a method; "" where it is not


@dataclass(frozen=True)
class Population:
    """What the server knows of its clients before the first round."""

    num_clients: int
    seed: int
    group: Tensor | None = None  # (clients,) the hidden truth of a benchmark; only oracles look at it
    num_rounds: int = 100  # that are planned
    num_labels: int = 1  # of a classification; 1 where targets are something else
    public: Tensor | None = None  # (P, …) inputs that everyone has
    owner: Tensor | None = None  # (clients,) whose slot each client is; None: everyone its own
    shares: Tensor | None = None  # (clients, categories) D, where a benchmark knows it; only oracles look at it
    num_members: int = 0  # clients that train, the others being held out; 0: all


class Method(Protocol):
    """A federated method: a frozen dataclass of hyper-parameters with pure functions.

    Four states, frozen dataclasses of tensors, carry everything: `Shared` is what the server holds,
    `Message` what a client receives, `Private` what it keeps and never sends, `Upload` what it sends back.
    Message, Private and Upload have a leading client axis K in every tensor; one client is K = 1.

    Two things a method may say beyond this, for runs across machines, where messages are checked and copied:
    `later(shared)`, Shareds whose messages have other tensors than the first one's; and `beside(message)`, what a
    message points to on the server and `settle` needs, with `with_beside(message, beside)`.

    One for its cost: `trains(counts)`, on how many of so many examples each its clients train, if not on all.

    And one for speed: `measure(loss, message, data)`, what `client_update` would find out without gradients
    before it trains, for all clients of a round at once where they are trained one after the other. It
    is a state with a leading axis K, which `client_update` then has in `data.measured`; or None.
    """

    @property
    def local(self) -> LocalTraining:
        """How a client trains."""

    def adapt(self, module: nn.Module) -> nn.Module:
        """The module whose tensors `personalize` names: the model itself, or a copy with more parameters."""

    def init(self, module: nn.Module, population: Population) -> tuple[Any, Any]:
        """The first Shared, and the Private (K = 1) of a client that nobody has seen yet."""

    def send(self, shared: Any, clients: Tensor) -> Any:
        """The Message of each of the K clients (an index tensor)."""

    def client_update(self, loss: Loss, message: Any, private: Any, data: ClientData) -> tuple[Any, Any]:
        """What each client uploads and what it keeps, after its local training."""

    def contribution(self, upload: Any) -> dict[str, Any]:
        """The sums over an upload's K clients that `server_update` needs."""

    def server_update(self, shared: Any, uploads: Iterable[Any]) -> Any:
        """The next Shared. Uploads come chunk by chunk; none is needed after it has been read."""

    def changed(self, upload: Any, message: Any, change: Change) -> Any:
        """The upload with `change` in each group of tensors that meet in one mean."""

    @property
    def refuses(self) -> Refusals:
        """The ways in which its uploads cannot meet, with these options, and why; `why_not` reads it."""

    def settle(self, loss: Loss, message: Any, private: Any, data: ClientData) -> Any:
        """The Private with which each client serves, made from what it received and its own training data.

        It is made anew whenever it is wanted (evaluation, export, a client never seen before) and neither
        sent nor kept: however often it is looked at, training goes on as if it had not been.
        """

    def personalize(self, message: Any, private: Any) -> Params:
        """The tensors of the model that each client serves; used by evaluation, export and onboarding."""

    def mixture(self, message: Any, private: Any) -> Tensor:
        """(K, C) how each client weighs what it mixes; (K, 0) where nothing is mixed.

        A method whose C are the clients themselves says so with `mixes_clients = True`: those are no routes.
        """


class Summed(Method, Protocol):
    """A method whose server needs nothing but the sum of all contributions.

    Its `server_update` is `summed_update` of that sum. So the sum may be formed in another way: under masks,
    with noise, or by a rule that a few bad uploads cannot move.
    """

    def summed_update(self, shared: Any, sums: dict[str, Any]) -> Any:
        """The next Shared, from the sum of all contributions."""


class Moving(Summed, Protocol):
    """A method whose sums can be had from how far each client's tensors have moved: what noise is added to."""

    def absolute(self, shared: Any, moved: dict[str, Any]) -> dict[str, Any]:
        """The sum of all contributions, from that of uploads with tensors minus what was received."""


NEEDED = {"sum": "summed_update", "moves": "absolute", "mean": "changed"}
UNSAID = {
    "sum": "its server needs more than sums over clients",
    "moves": "its sums are not made of how far tensors have moved, which is what is clipped; FedAvg and what "
    "builds on it, FLoRAL, Ensemble and FedIT are",
    "mean": "it does not say which of its tensors meet in one mean",
    "steps": "it uploads, or trains with, what was measured on examples without noise; take fedavg, fedprox, "
    "fedit or floral",
}


def why_not(method: Method, way: Way) -> str:
    """Why the method's uploads cannot meet in this way; "" where they can.

    Of `steps` silence is no consent, and what a class says of them holds for none that is derived from it: what a
    client does beside that one local training, its noise does not cover.
    """
    said = method.refuses.get(way)
    if said or way in ("own_labels", "numbers"):
        return said or ""
    if way == "steps":
        consents = "refuses" in vars(type(method)) and way in method.refuses
    else:
        consents = hasattr(method, NEEDED[way])
    return "" if consents else UNSAID[way]


def nothing_mixed(num_clients: int) -> Tensor:
    """The mixture of a method that mixes nothing."""
    return torch.empty(num_clients, 0)
