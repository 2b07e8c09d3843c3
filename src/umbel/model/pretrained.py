"""Models of transformers as functions of one tensor: a frozen base, and a head that is trained where there is one.

    causal_lm    token ids (B, T) → logits (B, T, vocabulary) of the next token
    text         token ids (B, T) → logits (B, labels)
    image        pixels (B, channels, height, width) → logits (B, labels)

Texts are padded on the right. No model attends to padding: a causal one sees none before a text's end, and of
the others padding is masked. So places where every text of a batch is padding need not be computed (`shortened`).
The base runs without dropout; LoRA's own is `lora_dropout` of the adapter.

A base like BERT has learned which of a pair's two texts a token is of (token_type_ids). That is read off the ids:
what comes after the first separator is of the second.
"""

from typing import Any, Literal

from torch import Tensor, nn

from umbel.errors import ModelError

Kind = Literal["causal_lm", "text", "image"]


class Pretrained(nn.Module):
    """A transformers model that answers one tensor with logits.

    Attributes:
        model: the transformers model; what it trains by itself has requires_grad.
        kind: see the module.
        base: the folder or hub id it came from; empty for a model made in memory.
        separator: the id that ends the first text of a pair, for a base with token_type_ids; −1 for others.
    """

    rows_apart = True  # model/stacked.py

    def __init__(self, model: nn.Module, kind: Kind, base: str = "") -> None:
        super().__init__()
        self.model, self.kind, self.base = model, kind, base
        self.train(model.training)
        config: Any = model.config
        pad = getattr(config, "pad_token_id", None)
        if kind == "text" and pad is None:
            raise ModelError(f"{base or type(model).__name__}: its config has no pad_token_id; give it one first")
        self.pad_id = -1 if pad is None else int(pad)
        self.separator = -1

    def separate(self, separator: int) -> None:
        """From now on what follows this id is a second text, if the base has learned to tell texts apart."""
        config: Any = self.model.config
        if getattr(config, "type_vocab_size", 0) > 1:
            self.separator = separator

    def shortened(self, x: Tensor) -> Tensor:
        """X (…, T) without the places at its end where all texts are padding; T ≥ 1 are left.

        Only a classifier's: what else is answered has as many places as x.
        """
        if self.kind != "text":
            return x
        used = (x != self.pad_id).flatten(0, -2).any(0).nonzero()
        return x[..., : int(used[-1]) + 1 if len(used) else 1]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "image":
            answer = self.model(pixel_values=x)
        elif self.kind == "causal_lm":
            answer = self.model(input_ids=x, use_cache=False)
        else:
            real = (x != self.pad_id).long()
            more = {}
            if self.separator >= 0:
                ends = (x == self.separator).long()
                more["token_type_ids"] = (ends.cumsum(-1) > ends).long() * real
            answer = self.model(input_ids=x, attention_mask=real, **more)
        logits: Tensor = answer.logits
        return logits


def of_transformers(model: nn.Module, kind: Kind, base: str = "") -> Pretrained:
    """The model with its base frozen: what is trained is its classification head, or nothing.

    Raises:
        ModelError: of kind "text" without a pad_token_id in its config.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(kind != "causal_lm" and not name.startswith(prefix) and leaf.is_floating_point())
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):  # the newer one first
        if (disable := getattr(model, name, None)) is not None:
            disable()  # backward would compute with the module's own tensors, not the clients'; see recompute.py
            break
    return Pretrained(model.eval(), kind, base)
