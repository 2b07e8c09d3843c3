"""Texts as vectors of a frozen base, made once and kept in the user's cache; and what is trained on them.

A text's vector is the mean over its tokens of the hidden states in the middle of the base and at its end, each
scaled to the length √width. That of a pair is (u, v, |u − v|, u ∘ v) (Conneau et al. 2017, InferSent,
https://arxiv.org/abs/1705.02364), and of a text alone the same with v = 0. So texts pass the base once, however
long a run is: a step costs what a small network costs.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umbel.model.pretrained import Pooling, Pretrained, mean_state
from umbel.seeds import seeded
from umbel.tasks.bases import Precision, load_pretrained, models_folder
from umbel.tasks.tokens import Tokenizer

TOKENS = 4096  # that pass the base at once
HIDDEN = 128
DIGEST = 16  # bytes
SAID_EVERY = 5.0  # seconds
LOG = getLogger("umbel")


def classifier(width: int, num_labels: int, seed: int) -> nn.Module:
    """A frozen layer drawn by the seed, `dense`, for adapters to change, and a head that is trained."""
    with seeded(seed, "dense"):
        dense, head = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, num_labels)
    dense.requires_grad_(False)
    return nn.Sequential(OrderedDict(dense=dense, tanh=nn.Tanh(), classifier=head))


def vectors(
    texts: Sequence[str], base: str, length: int, precision: Precision = "float32", pooling: Pooling = "own"
) -> Tensor:
    """(N, W) float32 the vectors of texts, rounded to float16; empty texts have 0.

    Args:
        texts: cut at `length` tokens.
        base: see `load_pretrained`.
        length: see texts.
        precision: of the base's weights.
        pooling: "mean" does without a pooler, which is not looked at anyway, where a base has none.
    """
    model, tokenizer = load_pretrained(base, "text", 2, 0, precision, 0, pooling), Tokenizer(base)
    file = models_folder().parent / "vectors" / f"{_digest_of(model, tokenizer)}-{length}.safetensors"
    kept = load_file(file) if file.is_file() else {}
    known = {key.tobytes(): row for row, key in enumerate(kept["keys"].numpy())} if kept else {}
    keys = {text: sha256(text.encode()).digest()[:DIGEST] for text in texts if text}
    missing = [text for text, key in keys.items() if key not in known]
    if missing:
        ids = tokenizer.padded(missing, [], length, model.pad_id)
        model.check_ids(ids)
        fresh = torch.tensor([list(keys[text]) for text in missing], dtype=torch.uint8)
        made = {"keys": fresh, "vectors": _passed(model, ids)}
        kept = {name: torch.cat([kept[name], own]) for name, own in made.items()} if kept else made
        known |= {keys[text]: row for row, text in enumerate(missing, len(known))}
        _keep(file, kept)
    if not keys:
        return torch.zeros(len(texts), 1)
    rows = torch.tensor([known[keys[text]] if text else -1 for text in texts])
    return torch.where(rows[:, None] >= 0, kept["vectors"][rows].float(), 0.0)


def _passed(model: Pretrained, ids: Tensor) -> Tensor:
    """(N, W) float16 the vectors of token ids (N, T), those of about the same length together."""
    found: list[Tensor] = []
    order = (ids != model.pad_id).sum(1).argsort(descending=True, stable=True)
    base: Any = model.model.base_model
    done, said = 0, monotonic()
    with torch.no_grad():
        while done < len(order):
            if monotonic() - said > SAID_EVERY:
                said = monotonic()
                LOG.info("texts passed through %s: %s of %s", model.base, f"{done:,}", f"{len(order):,}")
            x = model.shortened(ids[order[done]][None])
            rows = order[done : done + max(1, TOKENS // x.shape[1])]
            x = ids[rows, : x.shape[1]]
            real = (x != model.pad_id).long()
            states = base(input_ids=x, attention_mask=real, output_hidden_states=True).hidden_states
            means = [mean_state(state.float(), real) for state in (states[len(states) // 2], states[-1])]
            found.append(torch.cat([nn.functional.normalize(mean) * mean.shape[1] ** 0.5 for mean in means], 1))
            done += len(rows)
    return torch.cat(found)[order.argsort()].half()


def _digest_of(model: Pretrained, tokenizer: Tokenizer) -> str:
    """Tells bases apart by their tokenizers and their weights, the head left out."""
    base: Any = model.model
    whole = sha256(tokenizer.digest)
    for name, leaf in base.base_model.state_dict().items():
        whole.update(name.encode())
        whole.update(leaf.contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()[: 2 * DIGEST]


def _keep(file: Path, kept: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    save_file(kept, aside)
    os.replace(aside, file)
