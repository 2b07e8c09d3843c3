"""The run folder: what is written while a run lasts, so that it can be stopped anywhere and gone on with.

    recipe.toml                   everything that decides the result
    run.json                      versions, machine, how many clients are stacked
    metrics.jsonl                 one line a round
    clients.jsonl                 one line for about every fiftieth of the run: each client's score and mixture,
                                  where it is evaluated, and where the server saw its adapter, if the method looks
    trust.jsonl                   one line a round: the trust in one another of up to 100 clients, of methods that
                                  have it
    lock                          held by the process that is at work on the run
    onboard.json                  how well clients do that never trained, once `umbel onboard` was there
    checkpoints/000025.safetensors, 000025.json     the state after round 25, and its checksum

A file is written aside and then renamed, so that none is ever half there; a checkpoint counts once its
.json is there and its checksum holds.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from umbel.errors import RunFolderError
from umbel.untrusted import TABLE_BYTES, table_in, table_of, tensors_of

KEPT_CHECKPOINTS = 2
LINES = ("metrics.jsonl", "clients.jsonl", "trust.jsonl")
LINE = re.compile(rb'\{ *"round": *(\d{1,18}) *[,}].*(?<=\})\n')  # a whole one
ONBOARDING = "onboard.json"
TRUST_CLIENTS = 100  # up to so many clients have their trust in one another written down
SNAPSHOTS = 50  # lines of clients.jsonl in a run
SNAPSHOT_CLIENTS = 2000  # with more clients than this there are none


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round, as tensors by path."""

    round: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class RunFolder:
    """A run's files. Made by `create`, opened again by `opened`."""

    path: Path
    identity: str  # a hash of what decides the result; a checkpoint of another is refused

    @staticmethod
    def create(
        path: Path, identity: dict[str, Any], recipe: dict[str, Any] | None, facts: dict[str, Any], num_bytes: int
    ) -> "RunFolder":
        """A new folder with recipe.toml and run.json (the facts, versions and machine), all there at once.

        Args:
            path: where; nothing may be there yet.
            identity: what decides the result.
            recipe: what recipe.toml shall say, None for a run that has no recipe.
            facts: for run.json.
            num_bytes: the size of a checkpoint, for which there must be room.

        Raises:
            RunFolderError: the path is taken, cannot be made, or its disk is too full.
        """
        check_free(path)
        check_space(path, (KEPT_CHECKPOINTS + 1) * num_bytes)
        aside = RunFolder(path.with_name(f".{path.name}.{os.getpid()}.tmp"), _hash(identity))
        with _told(path):
            (aside.path / "checkpoints").mkdir(parents=True)
            if recipe is not None:
                import tomli_w

                aside._write("recipe.toml", tomli_w.dumps(recipe).encode())
            aside._write(
                "run.json", json.dumps({"identity": aside.identity} | machine() | facts, indent=1).encode()
            )
            aside.path.rename(path)
        return RunFolder(path, aside.identity)

    @staticmethod
    def opened(path: Path, identity: dict[str, Any]) -> "RunFolder":
        """An existing run folder.

        Raises:
            RunFolderError: it is none.
        """
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is no run folder that can be gone on with: it has no run.json")
        return RunFolder(path, _hash(identity))

    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        return read_json(self.path / "run.json")

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Adds a line to a .jsonl file."""
        with _told(self.path), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self) -> None:
        """Puts the .jsonl files on disk, before a checkpoint says that their rounds are over."""
        for name in LINES:
            if (self.path / name).exists():
                with (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())

    def rewind(self, round: int) -> None:
        """Takes the lines of later rounds, and a half-written one, off the .jsonl files.

        A line that is too long to be read says its round all the same, and stays.
        """
        for name in LINES:
            if (self.path / name).exists():
                with (self.path / name).open("rb") as file:
                    kept = [line for line in file if (own := LINE.match(line)) and int(own[1]) <= round]
                self._write(name, b"".join(kept))

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint, then lets go of all but the last few."""
        stem = self.path / "checkpoints" / f"{checkpoint.round:06d}"
        aside = stem.with_suffix(".tmp")
        with _told(self.path):
            save_file({name: leaf.contiguous().cpu() for name, leaf in checkpoint.tensors.items()}, aside)
            digest = _digest(aside)
            _settle(aside, stem.with_suffix(".safetensors"))
        facts = {"round": checkpoint.round, "sha256": digest, "identity": self.identity}
        self._write(f"checkpoints/{checkpoint.round:06d}.json", json.dumps(facts).encode())
        for old in self._checkpoints()[KEPT_CHECKPOINTS:]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole (None: the run has none yet), and what is wrong with newer ones.

        Raises:
            RunFolderError: a checkpoint belongs to another recipe, or there are some and none is whole.
        """
        refused: list[str] = []
        listed = self._checkpoints()
        for listing in listed:
            file = listing.with_suffix(".safetensors")
            try:
                facts = read_json(listing)
                identity, digest, round = facts["identity"], facts["sha256"], int(facts["round"])
            except (RunFolderError, KeyError, TypeError, ValueError, OverflowError):
                refused.append(f"{listing} is damaged")
                continue
            if identity != self.identity:
                raise RunFolderError(
                    f"{file} is a checkpoint of another recipe or of another version of umbel, with other "
                    f"settings; resume with the recipe.toml and the version it was started with"
                )
            if not file.is_file() or _digest(file) != digest:
                refused.append(f"{file} is damaged: it does not match its checksum")
                continue
            try:
                return Checkpoint(round, tensors_of(file)[0]), refused
            except (OSError, ValueError) as error:  # somebody has made its checksum anew
                refused.append(f"{file} cannot be read: {error}")
        if listed:
            raise RunFolderError(f"no checkpoint in {self.path} is whole: {'; '.join(refused)}")
        return None, refused

    def _checkpoints(self) -> list[Path]:
        """The checkpoints' .json files, the newest first."""
        return sorted((self.path / "checkpoints").glob("[0-9]*.json"), reverse=True)

    def _write(self, name: str, content: bytes) -> None:
        write(self.path / name, content)


def machine() -> dict[str, Any]:
    """When, with what and where something ran: kept beside every figure."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "umbel_commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
    }


@contextmanager
def held(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """The run folder is this process's until the block is left; whoever is killed has let go of it.

    Args:
        path: of the folder.
        wait_s: how long to wait for a process that holds it.

    Raises:
        RunFolderError: another process holds it still.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with _told(path):
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise RunFolderError(
                        f"another process is at work on the run in {path}; stop it first, or name another folder"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)


def write(path: Path, content: bytes, secret: bool = False) -> None:
    """Writes a file aside and renames it into place; a secret one can be read by its owner only."""
    check_file(path)
    aside = path.with_name(path.name + ".tmp")
    with _told(path):
        if secret:
            aside.unlink(missing_ok=True)  # whoever may read what is left of an earlier one
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        _settle(aside, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors by name, as safetensors, aside, and renames them into place."""
    check_file(path)
    aside = path.with_name(path.name + ".tmp")
    with _told(path):
        whole = {name: leaf.contiguous().cpu().clone() for name, leaf in tensors.items()}
        save_file(whole, aside, metadata={"format": "pt"})
        _settle(aside, path)


def check_file(path: Path) -> None:
    """Raises RunFolderError if no file can be written there, for it is a folder, or in none."""
    if not path.name or path.is_dir():
        raise RunFolderError(f"{path} is a folder, and a file's name is wanted")
    if not path.parent.is_dir():
        raise RunFolderError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes the document; NaN and infinity, which JSON does not know, become null."""
    write(path, json.dumps(finite(document), indent=1, allow_nan=False).encode() + b"\n")


def finite(value: Any) -> Any:
    """The value for JSON, which knows no NaN and no infinity: None in their place."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(own) for key, own in value.items()}
    return [finite(own) for own in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; RunFolderError if there is none."""
    try:
        return table_of(path, finite=False)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, up to one that was cut short, or has no round."""
    lines: list[dict[str, Any]] = []
    with path.open("rb") as file:
        while text := file.readline(TABLE_BYTES + 1):
            try:
                line = table_in(text, finite=False)
            except ValueError:
                break
            if type(line.get("round")) is not int:
                break
            lines.append(line)
    return lines


def check_free(path: Path) -> None:
    """Raises RunFolderError if something is at `path`."""
    if path.exists():
        begun = any((path / name).is_file() for name in ("run.json", "compare.toml"))
        how = f"go on with it by `umbel resume {path}`, or name" if begun else "name"
        raise RunFolderError(f"{path} exists and is left as it is; {how} another folder with --out")


def check_space(path: Path, num_bytes: int) -> None:
    """Raises RunFolderError if the disk that `path` will be on has less room than this."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    disk = shutil.disk_usage(above)
    if not os.access(above, os.W_OK) or not disk.total:
        raise RunFolderError(f"{path}: nothing can be written in {above}; name another folder with --out")
    free = disk.free
    if free < num_bytes + 1_000_000:
        raise RunFolderError(
            f"{path}: the run's checkpoints need {num_bytes / 1e6:,.0f} MB, but the disk has {free / 1e6:,.0f} MB "
            f"left; free some, or name a folder on another disk with --out"
        )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into an error that says which folder and what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFolderError(
                f"{path}: no room left on the disk; what was written before is whole, so free some and resume"
            ) from error
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from error
    except Exception as error:
        if "SafetensorError" in type(error).__name__:
            raise RunFolderError(f"{path}: a checkpoint could not be written ({error})") from error
        raise


def _settle(aside: Path, path: Path) -> None:
    """Puts the written file on disk, then in its place."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _commit() -> str | None:
    """The commit of the checkout that umbel runs from, None for an installed copy."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
