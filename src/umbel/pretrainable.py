"""What pretraining trains: models with first weights, the tokenizer, and the batches that they learn from."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel.folder import write
from umbel.scratch import Batch
from umbel.seeds import generator, seed_of, seeded
from umbel.tasks.augment import CropAndFlip
from umbel.tasks.cifar import BORDER, DEVIATION, MEAN, scaled
from umbel.tasks.unused import images, texts

Kind = Literal["gpt2", "llama", "vit"]
END, PAD = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1
HELD_BATCHES = 8
HELD_IMAGES = 1000
LABELS = 10  # of CIFAR-10
_TOKENIZED = 3_000_000  # letters of a source that the tokenizer is trained on


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 0


SIZES = {
    "1m": Size(128, 4, 4, 2048),
    "5m": Size(256, 5, 4, 4096),
    "10m": Size(320, 6, 5, 8192),
    "30m": Size(512, 8, 8, 8192),
}
VIT = Size(192, 6, 3)


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the plan."""

    kind: Kind
    size: Size
    length: int = 256  # tokens, of a language model's texts
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """A model, how a step's batch is drawn, and batches held out."""

    model: Any
    draw: Callable[[int], Batch]
    held: list[Batch]


def language_model(settings: Settings, vocabulary: int) -> Any:
    """A GPT-2 or Llama with first weights drawn by the seed."""
    import transformers

    size = settings.size
    shared: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config: Any
    if settings.kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            n_positions=settings.length,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **shared,
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=-(-size.width // 12)
            * 32,  # 8/3 of the width, so that a layer is as large as GPT-2's
            max_position_embeddings=settings.length,
            tie_word_embeddings=True,
            **shared,
        )
    with seeded(settings.seed, "model"):
        return transformers.AutoModelForCausalLM.from_config(config)


def tokenizer_of(sources: dict[str, Sequence[str]], vocabulary: int) -> Any:
    """A byte-level BPE trained on the beginning of each source."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw: Any = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(("\n".join(documents)[:_TOKENIZED] for documents in sources.values()), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=PAD)


@dataclass(frozen=True)
class Streams:
    """Token ids, source after source, from which windows are drawn."""

    ids: Tensor  # (N,)
    start: Tensor  # (sources,) int64
    count: Tensor  # (sources,) int64: ids of each

    @staticmethod
    def of(sources: Sequence[Sequence[int]], least: int, device: torch.device) -> "Streams":
        """The sources that have at least so many ids."""
        kept = [torch.tensor(ids, dtype=torch.int32) for ids in sources if len(ids) >= least]
        count = torch.tensor([len(ids) for ids in kept])
        return Streams(torch.cat(kept).to(device), count.cumsum(0) - count, count)

    def windows(self, number: int, length: int, draw: torch.Generator) -> Batch:
        """(number, length) ids and those that follow; a source counts by the square root of its size."""
        source = torch.multinomial(self.count.double().sqrt(), number, replacement=True, generator=draw)
        room = (self.count - length)[source]
        first = self.start[source] + (torch.rand(number, dtype=torch.float64, generator=draw) * room).long()
        window = self.ids[(first[:, None] + torch.arange(length + 1)).to(self.ids.device)].long()
        return window[:, :-1], window[:, 1:]


def put(folder: Path, saved: Any) -> None:
    """Writes a model or a tokenizer of transformers aside, and then each file into its place."""
    aside = folder / ".aside"
    shutil.rmtree(aside, ignore_errors=True)
    saved.save_pretrained(aside)
    for file in sorted(aside.iterdir()):
        file.replace(folder / file.name)
    aside.rmdir()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of a transformers model, for ids or pixels x."""
    logits = (model(x) if x.is_floating_point() else model(x, use_cache=False)).logits
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


def of_texts(settings: Settings, out: Path, device: torch.device) -> Subject:
    """A language model, and texts in the ids of its tokenizer, which is trained and written if there is none."""
    import transformers

    kept, held = divided(texts(), settings.seed)
    if not (out / "tokenizer_config.json").is_file():
        put(out, tokenizer_of(kept, settings.size.vocabulary))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(out)
    least = settings.length + 1
    seen, unseen = (
        Streams.of([_ids(tokenizer, own) for own in part.values()], least, device) for part in (kept, held)
    )
    model = language_model(settings, len(tokenizer)).to(device)

    def draw(step: int) -> Batch:
        return seen.windows(settings.batch, settings.length, generator(settings.seed, "batch", step))

    looked = [
        unseen.windows(settings.batch, settings.length, generator(settings.seed, "held", number))
        for number in range(HELD_BATCHES)
    ]
    return Subject(model, draw, looked)


def divided(sources: dict[str, tuple[str, ...]], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each source's documents to learn from, in an order drawn by the seed, and one in a hundred held out."""
    kept, held = {}, {}
    for name, documents in sources.items():
        order = torch.randperm(len(documents), generator=generator(seed, "documents", name)).tolist()
        cut = -(-len(documents) // 100)
        held[name] = [documents[row] for row in order[:cut]]
        kept[name] = [documents[row] for row in order[cut:]]
    return kept, held


def _ids(tokenizer: Any, documents: Sequence[str]) -> list[int]:
    """The documents one after the other, with the end's token after each."""
    read = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    return [one for ids in read for one in (*ids, 0)]


def of_images(settings: Settings, out: Path, device: torch.device) -> Subject:
    """A vision transformer that tells CIFAR-10's labels; its preprocessor's constants go to the folder."""
    told: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": MEAN,
        "image_std": DEVIATION,
    }
    told |= {"do_resize": True, "size": {"height": 32, "width": 32}}
    write(out / "preprocessor_config.json", json.dumps(told, indent=1).encode())
    corpus = images()
    x, y = scaled(corpus.x).to(device), corpus.y.to(device)
    order = torch.randperm(len(y), generator=generator(settings.seed, "documents"))
    cut = min(HELD_IMAGES, len(y) // 5)
    black = scaled(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist()
    augment = CropAndFlip(BORDER, tuple(black), torch.zeros(1, dtype=torch.long))

    def draw(step: int) -> Batch:
        one = generator(settings.seed, "batch", step)
        rows = order[cut:][torch.randint(len(y) - cut, (settings.batch,), generator=one)].to(device)
        key = torch.tensor([seed_of(settings.seed, "augment", step)], device=device)
        return augment(x[rows].unsqueeze(0), key, np.zeros(1, dtype=np.int64)).squeeze(0), y[rows]

    held = [(x[rows], y[rows]) for rows in order[:cut].to(device).split(settings.batch)]
    return Subject(vision_model(settings).to(device), draw, held)


def vision_model(settings: Settings) -> Any:
    """A vision transformer for 32 × 32 pixels with first weights drawn by the seed."""
    import transformers

    size = settings.size
    config = transformers.ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=32,
        patch_size=4,
    )
    config.num_labels = LABELS
    with seeded(settings.seed, "model"):
        return transformers.AutoModelForImageClassification.from_config(config)
