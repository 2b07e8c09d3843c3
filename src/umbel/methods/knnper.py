"""kNN-Per: FedAvg's model, and beside it the nearest of the client's own examples (Marfoq et al. 2022).

"Personalized Federated Learning through Local Memorization", equations 5 to 7, https://arxiv.org/abs/2111.09360

    training    FedAvg: h
    client k    keeps (φ(x), y) of its training examples, φ(x) the input of h's last linear layer
    served      λ h_k^kNN(x) + (1 − λ) softmax h(x) ,
                [h_k^kNN(x)]_y ∝ Σ_i 1{y = y_i} exp(−‖φ(x) − φ(x_i)‖ / σ) over the k nearest x_i

What is kept is made anew from the model as it is now whenever it is wanted. Of texts every place is an
example. Answers are log-probabilities, which serve as logits. Departures: docs/methods.md.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import mixing
from umbel.clients import ClientData
from umbel.errors import ModelError
from umbel.methods.fedavg import FedAvg, Message, Shared
from umbel.methods.protocol import Population, Refusals
from umbel.model.loss import FORWARD_EXAMPLES, Loss
from umbel.ranges import check_ranges
from umbel.tree import Params, state


@state
class Served:
    """What the clients remember, padded to the client with the most examples."""

    features: Tensor  # (K, N, width) φ
    labels: Tensor  # (K, N, labels) one-hot; a row of zeros is padding


class Remembering(nn.Module):
    """A module whose answers in evaluation are mixed with the labels of the nearest remembered examples.

    Without anything remembered, and in training, it is the module itself.
    """

    def __init__(self, module: nn.Module, layer: str, neighbours: int, share: float, scale: float) -> None:
        super().__init__()
        self.model = deepcopy(module)
        self.layer, self.neighbours, self.share, self.scale = layer, neighbours, share, scale
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0, 0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.get_buffer("features").shape[0] == 0:
            logits: Tensor = self.model(x)
            return logits
        logits, features = self.both(x)
        near = self._near(features.flatten(0, -2)).view_as(logits)
        share = torch.where(near.sum(-1, keepdim=True) > 0, self.share, 0.0)  # 0: nothing is remembered
        mixed = share * near + (1 - share) * logits.softmax(-1)
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The module's logits and the features behind them."""
        seen: list[Tensor] = []
        layer = self.model.get_submodule(self.layer)
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(x)
        finally:
            handle.remove()
        if seen[-1].shape[:-1] != logits.shape[:-1]:
            raise ModelError(f"features = {self.layer!r}: this layer has no input for each of the model's answers")
        return logits, seen[-1]

    def _near(self, queries: Tensor) -> Tensor:
        """(B, labels) the neighbours' labels, weighted by how near they are."""
        features, labels = self.get_buffer("features"), self.get_buffer("labels")
        # An overflow is far away, but not as far as padding, which weighs nothing.
        largest = torch.finfo(features.dtype).max
        distance = torch.cdist(queries, features).nan_to_num(nan=largest, posinf=largest)
        distance = torch.where(labels.sum(-1) > 0, distance, torch.inf)
        nearest = distance.topk(min(self.neighbours, features.shape[0]), largest=False)
        weight = (-nearest.values / self.scale).softmax(-1).nan_to_num(0.0)  # NaN: padding alone
        near: Tensor = (weight.unsqueeze(-1) * labels[nearest.indices]).sum(-2)
        return near


class Features(nn.Module):
    """Answers with φ; its tensors are the remembering module's own, by the same names."""

    def __init__(self, remembering: Remembering) -> None:
        super().__init__()
        self.model, self.both = remembering.model, remembering.both

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[1]


@dataclass(frozen=True)
class KNNPer(FedAvg):
    neighbours: int = 10  # k
    share: float = 0.5  # λ
    scale: float = 1.0  # σ
    features: str = ""  # the layer whose input is φ; "": the last nn.Linear
    refuses: ClassVar[Refusals] = {
        "own_labels": "its memory's labels and its model's probabilities are mixed over all labels",
        "numbers": "it remembers class labels",
    }

    def __post_init__(self) -> None:
        check_ranges(self, neighbours="[1, inf)", share="[0, 1]", scale="(0, inf)")

    def adapt(self, module: nn.Module) -> nn.Module:
        layers = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if self.features and self.features not in dict(module.named_modules()):
            raise ModelError(f"features = {self.features!r}: {type(module).__name__} has no such layer")
        if not self.features and not layers:
            raise ModelError(
                f"{type(module).__name__} has no nn.Linear whose input could be remembered; set features"
            )
        return Remembering(module, self.features or layers[-1], self.neighbours, self.share, self.scale)

    def init(self, module: nn.Module, population: Population) -> tuple[Shared, Any]:
        return super().init(self.adapt(module), population)

    def settle(self, loss: Loss, message: Message, private: Any, data: ClientData) -> Served:
        """The client's training examples as the received model sees them."""
        return remembered(loss, message.params | message.stats, data)

    def personalize(self, message: Message, private: Any) -> Params:
        tensors = super().personalize(message, private)
        if isinstance(private, Served):
            tensors = tensors | {"features": private.features, "labels": private.labels}
        return tensors


def remembered(loss: Loss, params: Params, data: ClientData) -> Served:
    """The clients' examples, as features under `params` and one-hot labels."""
    loss.module.eval()  # the whole of it: were only a part put into this mode, training would not put it back
    behind = replace(loss, module=Features(loss.module))  # type: ignore[arg-type]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad():
        for batch in data.in_order(data.fitting(FORWARD_EXAMPLES)):
            if not labels:
                num_labels = loss.outputs(params, batch.x[:, :1]).shape[-1]
            found = behind.outputs(params, batch.x)
            # A place of a text that is ignored is no example: a row of zeros, as where examples are padding.
            one_hot = F.one_hot(batch.y.clamp(min=0), num_labels).to(found.dtype) * (batch.y >= 0).unsqueeze(-1)
            if batch.weight is not None:
                one_hot = one_hot * mixing.as_leading(batch.weight, one_hot)
            features.append(found.flatten(1, -2))
            labels.append(one_hot.flatten(1, -2))
    return Served(torch.cat(features, 1), torch.cat(labels, 1))
