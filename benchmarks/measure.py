"""What every benchmark shares: timing things side by side, and saying where that was."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from umbel.folder import machine
from umbel.heap import keep_freed_memory


def seconds_beside(work: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """The best time of each piece of work, all of them measured in turns so that noise hits them alike."""
    best = dict.fromkeys(work, float("inf"))
    for repeat in range(repeats + 1):
        for name, do in work.items():
            begin = perf_counter()
            do()
            if repeat:  # the first turn warms up
                best[name] = min(best[name], perf_counter() - begin)
    return best


def arguments(about: str) -> argparse.Namespace:
    """--out FILE and --threads N, the latter already set; memory is kept as the program `umbel` keeps it."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default 1)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def report(figures: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Prints the figures and, if asked, writes them with the command and the machine."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "threads": chosen.threads,
        **machine(),
        "figures": figures,
    }
    print(json.dumps(record, indent=1))
    if chosen.out:
        write(record, chosen.out)


def write(record: dict[str, Any], out: Path) -> None:
    """The record as a JSON file, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".aside")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(out)
