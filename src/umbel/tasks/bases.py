"""Pretrained models by the name of a folder or of the Hugging Face hub: what a task fine-tunes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from umbel.errors import DataError, ModelError, UmbelError
from umbel.model.pretrained import Kind, Pooling, Pretrained, heads_of, of_transformers
from umbel.seeds import seeded
from umbel.tasks.corpora import data_folder

Precision = Literal["float32", "bfloat16", "float16"]
NO_CODE = {"trust_remote_code": False}
"""Of what comes with a model nothing is run, and nobody is asked whether it may be."""

_NO_DROPOUT = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "layerdrop",
    "resid_pdrop",
)


def load_pretrained(
    base: str,
    kind: Kind,
    num_labels: int = 0,
    seed: int = 0,
    precision: Precision = "float32",
    bits: Literal[0, 4, 8] = 0,
    pooling: Pooling = "own",
) -> Pretrained:
    """A model from a folder, from one in UMBEL_DATA, or from the Hugging Face hub.

    Args:
        base: a folder, one in UMBEL_DATA or in `models_folder`, or a hub id.
        kind: what it answers, see the module.
        num_labels: of a classification; its head is drawn anew by the seed if the base has none of that size.
        seed: see num_labels.
        precision: of the base's weights.
        bits: 8 or 4 load the base quantised by bitsandbytes, which on some CPUs packs 4 bits in blocks of 32 or 64
            only: layers of other sizes fail there.
        pooling: what the head of a text sees (model/pretrained.py); with "pairs" `separate` tells texts apart.

    Raises:
        DataError: there is no such model, it is none of the kind, or its weights are not safetensors.
        ModelError: bits without bitsandbytes, weights that lack a part of the base, no token to pad texts with, or
            a head that cannot take a mean.
    """
    import transformers

    autos = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
    }
    # Weights as safetensors only: any other file of weights is a pickle.
    settings: dict[str, Any] = {"dtype": getattr(torch, precision), "use_safetensors": True, **NO_CODE}
    settings["ignore_mismatched_sizes"] = True  # a head's are drawn; of others `_check_whole` tells
    with reading(base, f"{kind} model"):
        config = transformers.AutoConfig.from_pretrained(place_of(base), **NO_CODE)
        for name in _NO_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        if num_labels:
            config.num_labels = num_labels
        if kind == "text" and config.pad_token_id is None:
            config.pad_token_id = _padding(config.eos_token_id, base)
        if bits:
            settings["quantization_config"] = _quantised(bits, settings["dtype"], _heads(autos[kind], config))
        with seeded(seed, "head"), _quiet():
            model, read = autos[kind].from_pretrained(
                place_of(base), config=config, output_loading_info=True, **settings
            )
    _check_whole(base, kind, model, read, pooling)
    return of_transformers(model, kind, base, pooling)


def _check_whole(base: str, kind: Kind, model: Any, read: dict[str, Any], pooling: Pooling) -> None:
    """Raises ModelError if tensors that stay frozen had to be drawn, as lacking or of other shapes in the file."""
    drawn = {*read["missing_keys"], *(own if isinstance(own, str) else own[0] for own in read["mismatched_keys"])}
    heads = () if kind == "causal_lm" else heads_of(model)
    frozen = sorted(name for name in drawn if name.split(".")[0] not in heads)
    if pooling != "own":  # nobody looks at what the pooler says
        frozen = [name for name in frozen if not name.startswith(f"{model.base_model_prefix}.pooler.")]
    if frozen:
        pooler = all(".pooler." in name for name in frozen)
        cure = "take pooling = 'mean'" if pooler else "name a base whose weights are whole"
        what = ", ".join(frozen[:3]) + (" and others" if len(frozen) > 3 else "")
        raise ModelError(
            f"task.base = {base!r}: {what} is not in its weights, or in another shape than in config.json, and "
            f"would be frozen random numbers; {cure}"
        )


def _heads(auto: Any, config: Any) -> list[str]:
    """The names of the parts of such a model that are not the base."""
    with torch.device("meta"):
        model = auto.from_config(config)
    return [*heads_of(model)]


def _padding(end: int | list[int] | None, base: str) -> int:
    """The token that texts are padded with where the base names none: its end of text, the first of several."""
    if not isinstance(end, int) and not end:
        raise ModelError(
            f"{base!r}: its config has neither pad_token_id nor eos_token_id; set one in its config.json"
        )
    return end if isinstance(end, int) else end[0]


def place_of(base: str) -> str:
    """The folder of that name, here, in UMBEL_DATA or in `models_folder`; or the name itself, for the hub."""
    for folder in (Path(base).expanduser(), data_folder() / base, models_folder() / base):
        if (folder / "config.json").is_file():
            return str(folder)
    return base


@contextmanager
def reading(base: str, what: str) -> Iterator[None]:
    """For what reads `what`, the base's model or tokenizer.

    Raises:
        DataError: it could not be read, whatever transformers raises over files that are damaged or none.
    """
    try:
        yield
    except (UmbelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _not_there(base, what, error) from None


def _not_there(base: str, what: str, error: Exception) -> DataError:
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    if (place := place_of(base)) != base or Path(base).is_dir():
        return DataError(f"task.base = {base!r}: no {what} can be read from {place} ({told}); save one there")
    return DataError(
        f"task.base = {base!r}: no such folder here, in {data_folder()} (UMBEL_DATA) or in {models_folder()}, and "
        f"no {what} of that name could be had from the hub ({told}); name another base, or put it there"
    )


def models_folder() -> Path:
    """Where `python -m umbel.pretraining` writes models: `umbel/models` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "umbel" / "models"


def _quantised(bits: Literal[0, 4, 8], compute: torch.dtype, whole: list[str]) -> Any:
    """Of all modules but the `whole` ones.

    Raises:
        ModelError: there is no bitsandbytes.
    """
    import importlib.util

    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"bits = {bits} needs bitsandbytes: pip install bitsandbytes, or leave bits at 0")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=whole,  # of 4 bits too, whatever its name says
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_type="nf4",
    )


class _quiet:
    """Keeps transformers from telling of a new head, which is meant."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
