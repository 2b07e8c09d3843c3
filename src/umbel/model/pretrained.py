"""Models of transformers as functions of one tensor: a frozen base, and a head that is trained where there is one.

    causal_lm    token ids (B, T) → logits (B, T, vocabulary) of the next token
    text         token ids (B, T) → logits (B, labels)
    image        pixels (B, channels, height, width) → logits (B, labels)

Texts are padded on the right. No model attends to padding: a causal one sees none before a text's end, and of
the others padding is masked. So places where every text of a batch is padding need not be computed (`shortened`),
and texts of about the same length are computed together (`pieces`).
The base runs without dropout; LoRA's own is `lora_dropout` of the adapter.

A base like BERT has learned which of a pair's two texts a token is of (token_type_ids). That is read off the ids:
what comes after the first separator is of the second.

What a text's head sees is the base's own matter (BERT: the pooler, a layer on the first token), or with `pooling =
"mean"` the mean of its tokens' last states: a base that was tuned to embed sentences (Reimers and Gurevych 2019,
https://arxiv.org/abs/1908.10084) was tuned on that, and never used its pooler. Nor was it tuned on two texts at
once: with `pooling = "pairs"` those of a pair are read as if each stood alone, and of their means u and v the head
sees (u, v, |u − v|, u ∘ v) (Conneau et al. 2017, https://arxiv.org/abs/1705.02364); of a text alone v is 0.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from umbel.errors import DataError, ModelError
from umbel.tree import HALF

PIECE_PRODUCTS = 5e8  # multiplications that a pass through the model has to save if it is one more, on a CPU
Kind = Literal["causal_lm", "text", "image"]
Pooling = Literal["own", "mean", "pairs"]


class Piece(NamedTuple):
    """A part of the batches of K clients."""

    clients: Tensor  # (k,) whose, in order
    rows: Tensor  # (k, b) which of each one's B rows
    x: Tensor  # (k, b, T') these, without places where all of them are padding


class Pixels(NamedTuple):
    """What a task does with images, whose pixels are in [0, 1], before the model sees them."""

    mean: tuple[float, ...]  # of each channel, which is taken away
    deviation: tuple[float, ...]  # and by which is divided
    given: tuple[int, int]  # height and width
    seen: tuple[int, int]  # what they are enlarged to


class Pretrained(nn.Module):
    """A transformers model that answers one tensor with logits.

    Attributes:
        model: the transformers model; what it trains by itself has requires_grad.
        kind: see the module.
        base: the folder or hub id it came from; empty for a model made in memory.
        pooling: what the head of a text sees, see the module.
        head: the name of the head that sees means; empty for others.
        dropped: the names of modules of the base that were taken out, for nobody looks at what they say.
        num_products: multiplications for a token, about.
        separator: the id that ends the first text of a pair, for a base with token_type_ids, and where the texts
            of a pair are read apart; −1 for others.
        pixels: what becomes of images before; None where nothing is known of it.
    """

    rows_apart = True  # model/stacked.py

    def __init__(self, model: nn.Module, kind: Kind, base: str = "", pooling: Pooling = "own") -> None:
        super().__init__()
        self.model, self.kind, self.base, self.pooling = model, kind, base, pooling
        self.head, self.dropped = ("", ()) if pooling == "own" else _on_means(model, pooling)
        looked_up = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Embedding))
        self.num_products = sum(leaf.numel() for leaf in model.parameters() if leaf.dim() > 1) - looked_up
        self.train(model.training)
        config: Any = model.config
        pad = getattr(config, "pad_token_id", None)
        if kind == "text" and pad is None:
            raise ModelError(f"{base or type(model).__name__}: its config has no pad_token_id; give it one first")
        self.pad_id = -1 if pad is None else int(pad)
        self.separator = -1
        self.pixels: Pixels | None = None

    def check_ids(self, x: Tensor) -> None:
        """Raises DataError if a token id of texts x (N, T) has no embedding here, or the longest text no place."""
        if not x.numel():
            return
        base: Any = self.model
        name = self.base or type(base).__name__
        try:
            words = int(base.get_input_embeddings().weight.shape[0])
        except (NotImplementedError, AttributeError):  # a model that looks tokens up in another way
            words = int(x.max()) + 1
        if int(x.max()) >= words or int(x.min()) < 0:
            wrong = int(x.min() if x.min() < 0 else x.max())
            raise DataError(
                f"{name} has embeddings of {words:,} tokens, and a text has the id {wrong}: they are of another "
                f"tokenizer; take the one that belongs to the base"
            )
        longest = self.shortened(x[(x != self.pad_id).sum(1).argmax()].unsqueeze(0))
        try:
            with torch.no_grad():
                self(longest)
        except (IndexError, RuntimeError) as error:
            most = getattr(base.config, "max_position_embeddings", None)
            raise DataError(
                f"{name} cannot read a text of {longest.shape[1]} tokens ({error}); it has been made for "
                f"{most or 'fewer'}: lower task.length"
            ) from error

    def separate(self, separator: int) -> None:
        """From now on what follows this id is a second text, if that makes a difference.

        Raises:
            ModelError: texts are to be read apart, and there is no such id; or what stands beside a text (padding,
                the other text) says something of its mean state, as in architectures that pay masks no heed.
        """
        config: Any = self.model.config
        if self.pooling == "pairs" and separator < 0:
            raise ModelError(
                f"pooling = 'pairs' wants a tokenizer like BERT's, with a token that ends each text; that of "
                f"{self.base or type(self.model).__name__} has none: take pooling = 'mean' or 'own'"
            )
        if self.pooling == "pairs" or getattr(config, "type_vocab_size", 0) > 1:
            self.separator = separator
        if self.pooling != "own":
            self._check_alone()

    def shortened(self, x: Tensor) -> Tensor:
        """X (…, T) without the places at its end where all texts are padding; T ≥ 1 are left.

        Only a classifier's: what else is answered has as many places as x.
        """
        if self.kind != "text":
            return x
        used = (x != self.pad_id).flatten(0, -2).any(0).nonzero()
        return x[..., : int(used[-1]) + 1 if len(used) else 1]

    def pieces(self, x: Tensor) -> list[Piece]:
        """The parts in which batches x (K, B, T) cost least.

        Clients are sorted by how long their texts are, and each one's texts by length; both are cut into parts of
        a size. Only a classifier's are, and on a CPU, and if there is enough to gain; else there is none.
        """
        if self.kind != "text" or x.device.type != "cpu":
            return []
        used = ((x != self.pad_id) * torch.arange(1, x.shape[-1] + 1)).amax(-1).clamp(min=1)  # with the last token
        if (used.numel() * used.amax() - used.sum()) * self.num_products < PIECE_PRODUCTS:
            return []
        clients, rows = used.sum(1).argsort(stable=True), used.argsort(dim=-1, stable=True)
        few, short = self._sizes(used.gather(-1, rows)[clients])
        return [
            Piece(some, own, self.shortened(x[some.unsqueeze(1), own]))
            for some in (part.sort().values for part in clients.split(few))
            for own in rows[some].split(short, 1)
        ]

    def _sizes(self, used: Tensor) -> tuple[int, int]:
        """Of how many clients and how many texts of each a part had best be, lengths (K, B) being sorted."""
        found, least = (0, 0), float("inf")
        for few in _halves(len(used)):
            groups = used.split(few)
            longest = torch.stack([group.amax(0) for group in groups])
            heights = torch.tensor([len(group) for group in groups])
            for short in _halves(used.shape[1]):
                ends = torch.arange(short, used.shape[1] + short, short).clamp(max=used.shape[1])
                tokens = int(heights @ longest[:, ends - 1] @ ends.diff(prepend=torch.zeros_like(ends[:1])))
                cost = tokens * self.num_products + len(groups) * len(ends) * PIECE_PRODUCTS
                found, least = ((few, short), cost) if cost < least else (found, least)
        return found

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "text":
            return self._of_texts(x)
        answer = self.model(pixel_values=x) if self.kind == "image" else self.model(input_ids=x, use_cache=False)
        logits: Tensor = answer.logits
        return logits

    def _of_texts(self, x: Tensor) -> Tensor:
        if self.pooling == "own":
            real, second = self._places(x)
            logits: Tensor = self.model(input_ids=x, **self._told(real, second)).logits
            return logits
        pooled: Tensor = self.model.get_submodule(self.head)(self._means(x))
        return pooled

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T) 1 at tokens that are no padding, and at those of second texts."""
        real, ends = (x != self.pad_id).long(), (x == self.separator).long()
        return real, (ends.cumsum(-1) > ends).long() * real

    def _told(self, real: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"attention_mask": real} | ({"token_type_ids": second} if self.separator >= 0 else {})

    def _means(self, x: Tensor) -> Tensor:
        """(N, W) what a head on means sees of token ids (N, T)."""
        base: Any = self.model.base_model
        real, second = self._places(x)
        if self.pooling == "mean":
            return mean_state(base(input_ids=x, **self._told(real, second)).last_hidden_state, real)
        first = real - second
        states = base(input_ids=x, **_apart(first, second, base.dtype)).last_hidden_state
        return of_pairs(mean_state(states, first), mean_state(states, second))

    def _check_alone(self) -> None:
        """Raises ModelError if a text's mean state is not the same beside padding, and beside another text."""
        name, pairs = self.base or type(self.model).__name__, self.pooling == "pairs"
        weights = next(self.model.parameters())
        try:
            config: Any = self.model.config
            known = [one for one in range(config.vocab_size) if one not in (self.pad_id, self.separator)]
            end = [self.separator] if pairs else known[1:2]
            texts = [[known[0], known[-1], *end], [known[-1], *end]][: 1 + pairs]
            beside = [one for text in texts for one in text] + [self.pad_id] * 2
            with torch.no_grad():
                whole = self._means(torch.tensor([beside], device=weights.device))[0]
                width = len(whole) // 4 if pairs else len(whole)
                each = [self._means(torch.tensor([text], device=weights.device))[0, :width] for text in texts]
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise ModelError(f"{name} has no mean state of a text ({error}); take pooling = 'own'") from error
        alone = torch.cat(each).float()
        off = float((whole[: len(alone)].float() - alone).norm() / alone.norm())
        rounded = weights.dtype in HALF or getattr(self.model, "is_quantized", False)
        if not off < (0.1 if rounded else 1e-3):
            raise ModelError(
                f"{name}: what stands beside a text (padding, or another text) changes its mean state by "
                f"{100 * off:.2g} %; pooling = {self.pooling!r} does not go with this architecture, take 'own'"
            )


def _apart(first: Tensor, second: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a base like BERT is told so that it reads the two texts of each row as if either stood alone.

    Args:
        first: (N, T) 1 at the tokens of the first text, which begins at 0, and 0 elsewhere.
        second: (N, T) the same of the second, which follows it at once.
        dtype: of the base.
    """
    places = torch.arange(first.shape[1], device=first.device)
    which = first + 2 * second  # 0 is padding, which looks at padding and which nobody else looks at
    away = (which.unsqueeze(1) != which.unsqueeze(2)).unsqueeze(1)  # (N, 1, T, T)
    mask = torch.zeros(away.shape, dtype=dtype, device=first.device).masked_fill(away, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": places - second * first.sum(1, keepdim=True)}


def of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """(N, 4 W) what two vectors (N, W) of each pair say together."""
    return torch.cat([first, second, (first - second).abs(), first * second], 1)


def mean_state(states: Tensor, real: Tensor) -> Tensor:
    """(N, W) the mean over the real tokens of a text (1, not 0, in `real` (N, T)) of their states (N, T, W)."""
    weight = (real / real.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
    return torch.einsum("nt,ntw->nw", weight, states)


def _on_means(model: nn.Module, pooling: Pooling) -> tuple[str, tuple[str, ...]]:
    """The name of the one layer that is not the base, and those of the base's pooler, which is taken out.

    What a head sees of pairs besides their first texts counts nothing at the start.

    Raises:
        ModelError: there is another number of layers, or it is not linear.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    heads = [(name, model.get_submodule(name)) for name in heads_of(model)]
    if len(heads) != 1 or not isinstance(heads[0][1], nn.Linear):
        found = ", ".join(f"{name} ({type(child).__name__})" for name, child in heads) or "none"
        raise ModelError(
            f"pooling = '{pooling}' wants one linear layer as the head; {type(model).__name__} has {found}; "
            f"leave pooling at 'own'"
        )
    if pooling == "pairs":
        setattr(model, heads[0][0], _widened(heads[0][1]))
    base: Any = model.get_submodule(prefix)
    pooler = getattr(base, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return heads[0][0], ()
    dropped = tuple(f"{prefix}.pooler.{name}".rstrip(".") for name, _ in pooler.named_modules())
    base.pooler = None
    return heads[0][0], dropped


def _widened(head: nn.Linear) -> nn.Linear:
    """The head with four times the inputs, of which all but the first quarter count nothing."""
    wide: nn.Linear = nn.utils.skip_init(nn.Linear, 4 * head.in_features, head.out_features, head.bias is not None)
    wide.weight = nn.Parameter(nn.functional.pad(head.weight.detach(), (0, 3 * head.in_features)))
    wide.bias = head.bias
    return wide


def _halves(size: int) -> list[int]:
    """The whole, half of it, and so on down to 1, rounded up."""
    return [-(-size // 2**halved) for halved in range((size - 1).bit_length() + 1)]


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the parts with tensors that are not the base.

    The base is the part that transformers names by `base_model_prefix`; in a few models (SigLIP, CLIP, HGNetV2) no
    part has that name, and the head is the last one.
    """
    parts = tuple(name for name, child in model.named_children() if [*child.parameters()])
    base = getattr(model, "base_model_prefix", "")
    return tuple(name for name in parts if name != base) if base in parts else parts[-1:]


def of_transformers(model: nn.Module, kind: Kind, base: str = "", pooling: Pooling = "own") -> Pretrained:
    """The model with its base frozen: what is trained is its classification head, or nothing.

    Raises:
        ModelError: of kind "text" without a pad_token_id in its config, or with a head that cannot take a mean.
    """
    heads = () if kind == "causal_lm" else heads_of(model)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name.split(".")[0] in heads and leaf.is_floating_point())
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in list(vars(layer).items()):  # of attention, which is no module: Llama, OPT
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):  # the newer one first
        if (disable := getattr(model, name, None)) is not None:
            disable()  # backward would compute with the module's own tensors, not the clients'; see recompute.py
            break
    return Pretrained(model.eval(), kind, base, pooling)
