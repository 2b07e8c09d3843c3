"""A run's progress on stderr."""

import sys
from collections.abc import Callable, Sequence
from logging import INFO, Handler, LogRecord, getLogger
from multiprocessing import parent_process
from time import perf_counter
from typing import TYPE_CHECKING, Any

from umbel.cli.said import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from umbel.rounds import Progress

LOG = getLogger("umbel")
DRAW_EVERY = 0.1  # seconds between two looks of the bar, at least
DRAW_SHARE = 0.005  # of the time goes into drawing it, at most: rich takes milliseconds, a fast round takes ten
LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


class Watch:
    """Shows a run's progress on stderr: a bar on a terminal, elsewhere a line about every ten seconds.

    Called after every round; most calls only add up. What is logged meanwhile, as by a task that takes long to be
    loaded, is shown too.
    """

    def __init__(self, title: str, rounds: int, history: Sequence[dict[str, Any]], quiet: bool) -> None:
        self._title, self._rounds, self._quiet = title, rounds, quiet
        self._history = history  # what was written before, with rounds that are done again
        self._bytes, self._dropped = 0.0, 0
        self._score = ""
        self._done = 0  # rounds in this session
        self._seconds = 0.0  # that they took
        self._shown = perf_counter()
        self._every = LINE_EVERY
        self._bar: Bar | None = None
        self._logged = _Logged(self._log)

    def __enter__(self) -> "Watch":
        alone = parent_process() is None  # workers of a comparison would draw their bars over each other
        if alone and not self._quiet and sys.stderr.isatty():
            self._bar, self._every = _new_bar(len(self._title)), DRAW_EVERY
            self._bar.add_task(self._title, total=self._rounds, text="")
            self._bar.start()
        if not self._quiet:
            self._level = LOG.level
            LOG.addHandler(self._logged)
            LOG.setLevel(INFO)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            LOG.removeHandler(self._logged)
            LOG.setLevel(self._level)
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, at: "Progress") -> None:
        from umbel.tables import dropped, total

        figures = at.figures
        if not self._done:
            before = [line for line in self._history if line["round"] < at.round]
            self._bytes = total(before, "bytes_up") + total(before, "bytes_down")
            self._dropped = dropped(before)
        self._done += 1
        self._seconds += figures["seconds"]
        self._bytes += figures["bytes_up"] + figures["bytes_down"]
        self._dropped += dropped([figures])
        if "loss" in figures:
            self._score = score(figures)
        now = perf_counter()
        over = at.last or at.round >= self._rounds
        if self._quiet or (now - self._shown < self._every and not over):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=at.round, text=self._text(figures), refresh=True)
            self._every = max(DRAW_EVERY, (perf_counter() - now) / DRAW_SHARE)
        else:
            say(f"{self._title}: round {at.round}/{self._rounds}  {self._text(figures)}")

    def _log(self, message: str) -> None:
        line = f"{self._title}: {message}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)  # above the bar
        else:
            say(line)

    def _text(self, figures: dict[str, Any]) -> str:
        from umbel.tables import num_bytes

        rate = self._done / max(1e-9, self._seconds)
        speed = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        train = f"train {figures['train_loss']:.3f}" if "train_loss" in figures else "nobody heard"
        spent = f"ε {figures['epsilon']:.3g}" if "epsilon" in figures else ""
        parts = [train, self._score, spent, speed, num_bytes(self._bytes)]
        return "  ".join([*filter(None, parts), *([f"{self._dropped} dropped"] if self._dropped else [])])


class _Logged(Handler):
    """Hands on what is logged."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: LogRecord) -> None:
        self._tell(record.getMessage())


def score(figures: dict[str, Any]) -> str:
    """How well it goes, in a few characters: "acc 92.6 (worst 83.3)"."""
    if "accuracy" in figures:
        return f"acc {figures['accuracy']:.1f} (worst {figures['worst_decile']:.1f})"
    return f"loss {figures['loss']:.4g} (worst {figures['worst_decile']:.4g})"


def _new_bar(title_length: int) -> "Bar":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    left = console.width - title_length - 65  # what the figures leave; on a narrow terminal they are worth more
    bar: list[ProgressColumn] = [BarColumn(bar_width=min(left, 30))] if left >= 6 else []
    return Progress(
        TextColumn("{task.description}", markup=False),
        *bar,
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        *([TimeRemainingColumn(compact=True)] if bar else []),
        console=console,
        auto_refresh=False,  # no thread beside the training; a round's end draws it
    )
