"""Onboarding: the clients that a run held out, or one that is given in a file."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbel.cli.said import STDOUT, print_json, told
from umbel.cli.show import print_onboarding, print_ways
from umbel.errors import DataError, RunFolderError


def held_out(folders: Sequence[Path], samples: Sequence[int] | None, json: str | None) -> None:
    """Onboards the held-out clients of every run in the folders."""
    from umbel.folder import machine
    from umbel.onboarding import SAMPLES, onboard
    from umbel.tables import find_runs, grouped

    paths = [run.path for run in find_runs(folders)]
    documents: list[dict[str, Any]] = []
    for path in paths:
        done = f" (done: {', '.join(map(str, paths[: len(documents)]))})" if documents else ""
        with told(stopped=f"stopped{done or ' before anything was written'}"):
            try:
                documents.append({"folder": str(path)} | onboard(path, samples or SAMPLES).document())
            except DataError as error:
                raise DataError(f"{path}: {error}{done}") from None
    if json is not None:
        print_json({"command": shlex.join(["umbel", *sys.argv[1:]]), **machine(), "runs": documents}, json)
    if json == STDOUT:
        return
    print_onboarding(grouped(find_runs(paths)))
    print(f"next:   umbel report {' '.join(map(str, folders))}")


def one(
    folders: Sequence[Path], data: Path, samples: Sequence[int] | None, out: Path | None, json: str | None
) -> None:
    """Gives the client in the file its mixture, scores if it has test data, and its model if that is wanted."""
    from umbel.folder import check_file, save_tensors
    from umbel.onboarding import SAMPLES, onboard_client, read_client

    if len(folders) != 1:
        raise RunFolderError("--data needs one run folder")
    if out is not None:
        check_file(out)
        if out.exists():
            raise RunFolderError(f"{out} exists and is left as it is; name another file, or remove it")
    train, test = read_client(data)
    if samples is not None and test is None:
        raise DataError(f"--samples asks for scores, and {data} has no x_test and y_test to score on")
    found = onboard_client(folders[0], train, test, samples=SAMPLES if samples is None else samples)
    if out is not None:
        save_tensors(out, found.tensors)
    document = {"folder": str(folders[0]), "samples": found.samples, "mixture": found.mixture}
    if json is not None:
        ways = {way: {point.samples: point.mean for point in points} for way, points in found.ways.items()}
        print_json(document | {"figures": found.figures, "ways": ways, "model": out and str(out)}, json)
    if json == STDOUT:
        return
    weights = "  ".join(f"{weight:.3f}" for weight in found.mixture)
    print(f"mixture from {found.samples} samples: {weights or 'this method mixes nothing'}")
    if found.ways:
        print_ways(found.ways)
    if out is not None:
        print(f"model: {out}")
