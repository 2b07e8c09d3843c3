"""Small bases to fine-tune where no pretrained model can be downloaded.

    python -m umbel.pretraining gpt2 --size 10m --minutes 60
    python -m umbel.pretraining llama --size 5m --steps 20000 --out FOLDER
    python -m umbel.pretraining vit --minutes 30

gpt2 and llama are language models of about that many parameters, with a byte-level BPE trained on the same
texts; vit reads images of 32 × 32 pixels in patches of 4 (width 192, 6 layers, 2.7 million parameters). They
learn from what no task trains or tests on, see tasks/unused.py: texts in a dozen languages, where a source
counts by the square root of its size, and 20,000 images of CIFAR-10. One in a hundred documents, and 1,000
images, are held out; the folder has the weights with the lowest loss on them.

The folder, by default umbel/models/KIND-SIZE in the user's cache, is one of transformers; KIND-SIZE is then
a task's `base`.
Called again, it goes on where it was stopped; `training` in it, which that needs, may be deleted at the end.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from umbel.errors import RunFolderError, UmbelError
from umbel.folder import RunFolder
from umbel.pretrainable import SIZES, VIT, Settings, loss_of, of_images, of_texts, put
from umbel.scratch import Plan, State, Work, finished, train
from umbel.tasks.bases import models_folder


def pretrain(settings: Settings, plan: Plan, out: Path, device: torch.device, quiet: bool = False) -> State:
    """Trains the model, or goes on with it, and leaves it in the folder.

    Raises:
        DataError: what it learns from is not in the data folder.
        RunFolderError: the folder has another model, or cannot be written.
    """
    from transformers.utils import logging

    folder = _opened(out, {"settings": asdict(settings), "plan": asdict(plan)})
    if ended := finished(folder):
        return ended
    logging.disable_progress_bar()
    subject = (of_images if settings.kind == "vit" else of_texts)(settings, out, device)

    tell = _Line(plan, quiet)
    return train(
        Work(subject.model, subject.draw, subject.held, loss_of, lambda: put(out, subject.model), tell),
        plan,
        folder,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; returns its exit code."""
    told = _parser().parse_args(arguments)
    name = told.kind if told.kind == "vit" else f"{told.kind}-{told.size}"
    out = told.out or models_folder() / name
    size = VIT if told.kind == "vit" else SIZES[told.size]
    batch = told.batch or (256 if told.kind == "vit" else 64)
    if told.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("--device cuda, but PyTorch sees no CUDA device here; leave it out, or say cpu\n")
        return 1
    device = torch.device(told.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        state = pretrain(
            Settings(told.kind, size, told.length, batch, told.seed),
            Plan(told.steps, told.minutes, told.rate),
            out,
            device,
        )
    except UmbelError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        return 130
    sys.stdout.write(f"{out}: {state.step:,} steps, loss {state.best:.3f} on held out examples\n")
    return 0


class _Line:
    """Says in a line how far a training has come."""

    def __init__(self, plan: Plan, quiet: bool) -> None:
        from rich.console import Console

        self._plan, self._quiet, self._console = plan, quiet, Console(stderr=True, highlight=False)
        self._last: tuple[int, float] | None = None

    def __call__(self, state: State) -> None:
        if self._quiet:
            return
        now = monotonic()
        said = f"step {state.step:,} of {state.total:,}" if state.total else f"step {state.step:,}"
        said += f", loss {state.loss:.3f}"
        if state.best < float("inf"):
            said += f", held out {state.held:.3f} (best {state.best:.3f})"
        if self._last and state.step > self._last[0]:
            each = (now - self._last[1]) / (state.step - self._last[0])
            said += f", {1 / each:,.1f} steps/s"
            if state.total:
                said += f", {(state.total - state.step) * each / 60:,.0f} min left"
        self._last = (state.step, now)
        end = "\r" if self._console.is_terminal and state.step != state.total else "\n"
        self._console.print(f"{said}   ", end=end, markup=False, soft_wrap=True)


def _opened(out: Path, identity: dict[str, Any]) -> RunFolder:
    """The folder's training: a new one, or that which was begun there.

    Raises:
        RunFolderError: another one was, or there is a model that no training is left of.
    """
    path = out / "training"
    if not path.exists():
        if any((out / name).exists() for name in ("config.json", "model.safetensors", "tokenizer_config.json")):
            raise RunFolderError(
                f"{out} has a model and no training to go on with; name another folder with --out, or delete it"
            )
        out.mkdir(parents=True, exist_ok=True)
        return RunFolder.create(path, identity, None, identity, 0)
    folder = RunFolder.opened(path, identity)
    if folder.facts()["identity"] != folder.identity:
        raise RunFolderError(
            f"{out} has a model that was begun with other options; name another folder with --out"
        )
    return folder


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m umbel.pretraining", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("gpt2", "llama", "vit"))
    parser.add_argument("--size", choices=tuple(SIZES), default="10m", help="parameters of a language model")
    parser.add_argument("--minutes", type=_positive, default=60.0, help="how long to train; decides the steps")
    parser.add_argument("--steps", type=_whole, default=0, help="how many steps to train, whatever the time")
    parser.add_argument("--out", type=Path, help="the model's folder")
    parser.add_argument("--length", type=_whole, default=256, help="tokens of a text, at most")
    parser.add_argument("--batch", type=_whole, default=0, help="examples of a step: 64 texts or 256 images")
    parser.add_argument("--rate", type=_positive, default=1e-3, help="the learning rate at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
