"""A gate between two adapters that looks at the instance: PEFT layers of rank 2·r whose halves are weighed by row.

    e(x)     the input of the model's last linear layer, by the second adapter alone
    α(x)     λ mean_s cos(e(x), e(x_s)) = λ ⟨e(x) / ‖e(x)‖, anchor⟩ in [0, 1], anchor = mean_s e(x_s) / ‖e(x_s)‖
    answer   the model's at weights (1 − α, α)

Where the last layer answers every place of a text, there is an e and an α for every place, of what stands before
it: no place's weights know what comes after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel.adapters.lora_layers import NAME
from umbel.errors import ModelError
from umbel.model.stacked import StackedLinear
from umbel.tree import Params

INNER = "inner"


class Weights:
    """What the gated layers are weighed by now: (rows or 1, places or 1, 2), or nothing."""

    now: Tensor | None = None


class GatedLinear(StackedLinear):
    """An A of rank 2·r whose answer's halves are multiplied by the two weights."""

    weights: Weights

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        if self.weights.now is None:
            return hidden
        weights = self.weights.now.to(hidden.dtype).repeat_interleave(hidden.shape[-1] // 2, -1)
        return hidden * (weights if hidden.dim() == 3 else weights.squeeze(1))


class Gated(nn.Module):
    """The module with its adapters' halves weighed for each row, once there is an anchor; as it is without."""

    client_axis = ("anchor",)

    def __init__(self, inner: nn.Module, layer: str, strength: float, published: bool = False) -> None:
        super().__init__()
        self.inner, self.layer, self.strength, self.published = inner, layer, strength, published
        self.rows_apart = getattr(inner, "rows_apart", False)
        self.register_buffer("anchor", torch.empty(0))
        self.weights = Weights()
        for path, found in inner.named_modules():
            if hasattr(found, "lora_A"):
                if NAME not in found.lora_A or type(found.lora_A[NAME]) is not nn.Linear:
                    raise ModelError(f"{path}: a gate weighs linear layers only; leave it out of the targets")
                found.lora_A[NAME].__class__ = GatedLinear
                found.lora_A[NAME].weights = self.weights

    def forward(self, x: Tensor) -> Tensor:
        anchor = self.get_buffer("anchor")
        if anchor.numel() == 0:
            logits: Tensor = self.inner(x)
            return logits
        alpha = self.share(self.embedding(x), anchor)
        pair = (alpha, 1 - alpha) if self.published else (1 - alpha, alpha)
        weights = torch.stack(pair, -1)
        return self._at(weights if weights.dim() == 3 else weights.unsqueeze(1), x)[0]

    def embedding(self, x: Tensor) -> Tensor:
        """(rows, width) or (rows, places, width) e(x)."""
        return self._at(x.new_tensor([[[0.0, 1.0]]], dtype=torch.float32), x)[1]

    def share(self, embedded: Tensor, anchor: Tensor) -> Tensor:
        """(rows, …) α of embeddings (rows, …, width); anchor (width,), or (K, width) for the rows of K clients."""
        own = F.normalize(embedded, dim=-1).reshape(anchor.numel() // anchor.shape[-1], -1, embedded.shape[-1])
        similar = own.to(anchor.dtype) @ anchor.reshape(len(own), -1, 1)
        return (self.strength * similar).clamp(0, 1).view(embedded.shape[:-1])

    def _at(self, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's answer at these weights, and what its last layer saw."""
        seen: list[Tensor] = []
        layer = self.inner.get_submodule(self.layer)
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.weights.now = weights
        try:
            logits: Tensor = self.inner(x)
        finally:
            handle.remove()
            self.weights.now = None
        if len(seen) == 1 and seen[0].dim() == 3 and logits.dim() == 2 and x.dim() == 2:  # a decoder with labels
            last = x.shape[1] - 1 - (x != getattr(self.inner, "pad_id", -1)).flip(1).int().argmax(1)
            seen = [seen[0][torch.arange(len(x), device=x.device), last]]
        if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
            raise ModelError(
                f"{self.layer}: this layer's input is no embedding for each of the model's answers; "
                f"take gate = 'constant'"
            )
        return logits, seen[0]


class Embedding(nn.Module):
    """The embeddings of a gated module, as its answer."""

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.gated = gated
        self.rows_apart = gated.rows_apart

    def forward(self, x: Tensor) -> Tensor:
        return self.gated.embedding(x)


def inside(params: Params, prefix: str = INNER) -> Params:
    """The tensors by their names in the module around."""
    return {f"{prefix}.{name}": leaf for name, leaf in params.items()}
