"""FedAvg and local fine-tuning: one model for all, which every client trains a little more before it serves it.

Wang et al. 2019, "Federated Evaluation of On-device Personalization", https://arxiv.org/abs/1910.10252

    training    FedAvg
    served      w_k ← E epochs of SGD on f_k from w, the running statistics of BatchNorm layers with it

Training is FedAvg's to the last bit: the fine-tuned models are made anew whenever they are wanted and kept
nowhere. A client whose fine-tuning is not finite serves w.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from umbel import tree
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods.fedavg import FedAvg, Message
from umbel.methods.protocol import Refusals
from umbel.methods.settling import choose, stacked
from umbel.model.loss import Loss
from umbel.train import LocalTraining, local_train
from umbel.tree import Params, state


@state
class Served:
    """The fine-tuned models."""

    params: Params
    stats: Params  # running statistics of BatchNorm layers


@dataclass(frozen=True)
class FedAvgFinetune(FedAvg):
    finetune: LocalTraining = field(default_factory=lambda: LocalTraining(epochs=5))  # E and how
    refuses: ClassVar[Refusals] = {"steps": ""}

    def __post_init__(self) -> None:
        plain = LocalTraining()
        for name in ("warmup", "decay", "precision"):
            if getattr(self.finetune, name) != getattr(plain, name):
                raise RecipeError(
                    f"finetune.{name}: fine-tuning comes after the rounds, at one rate; leave it out"
                )

    def settle(self, loss: Loss, message: Message, private: Any, data: ClientData) -> Served:
        """The received model, fine-tuned."""

        def work(message: Message, _private: Any, data: ClientData) -> Served:
            start = {"params": message.params, "stats": message.stats}
            tuned, _ = local_train(
                self.objective(loss, message), start, data, self.finetune, {"params": self.finetune.lr}
            )
            return Served(tuned["params"], tuned["stats"])

        received = Served(message.params, message.stats)
        tuned = stacked(work, loss, message, private, data, self.finetune.batch_size, received)
        served: Served = choose(tree.finite_rows(tuned), tuned, received)
        return served

    def personalize(self, message: Message, private: Any) -> Params:
        served = private if isinstance(private, Served) else message
        return served.params | served.stats
