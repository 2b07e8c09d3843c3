"""Every function that reads what somebody else wrote, fed with spoilt inputs: under a limit of memory and of time.

python benchmarks/fuzz.py --minutes 10 --out benchmarks/results/fuzz.json
python benchmarks/fuzz.py --malformed 100000 --out benchmarks/results/malformed.json

Inputs are valid ones spoilt by what knows their format; where `atheris` is installed it picks those that reach
new lines of umbel (--blind leaves it out). An input must be taken, or refused by the error of its boundary. A
finding is any other exception, a time above --seconds, memory above the limit, or the end of the process: the
input is kept, and the process that reads inputs is started again.
"""

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

import measure

MEBIBYTE = 1 << 20
LONGEST = 4 * MEBIBYTE  # of an input
ROOM = 2048 * MEBIBYTE  # of addresses that may be taken beyond those at the start: a hard limit
ALLOWED = 32 * MEBIBYTE  # resident memory that reading an input may take, whatever its length …
TIMES = 24  # … and so many times its length: an empty list of JSON is 3 bytes, and 64 in Python
FINDINGS = 20  # that are kept of each target
MESSAGES = ("uploads", "scores", "question: train", "question: hello", "answer to hello")


@dataclass
class Tally:
    """What has come of the inputs so far."""

    inputs: Counter[str] = field(default_factory=Counter)  # by target
    taken: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # by error
    how: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0})
    largest: dict[str, Any] = field(default_factory=lambda: {"bytes": 0})
    findings: list[dict[str, Any]] = field(default_factory=list)

    def found(self, target: str, what: str, content: bytes) -> None:
        """Keeps a finding."""
        if sum(one["target"] == target for one in self.findings) < FINDINGS:
            self.findings.append({"target": target, "what": what[:400], "input": content[:4096].hex()})


class Resident:
    """How much more memory was resident at once since `begin`."""

    def __init__(self) -> None:
        self.status = os.open("/proc/self/status", os.O_RDONLY)
        self.refs = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self.before = 0

    def _peak(self) -> int:
        text = os.pread(self.status, 4096, 0)
        at = text.index(b"VmHWM:") + 6
        return int(text[at : text.index(b"kB", at)]) * 1024

    def begin(self) -> None:
        """Forgets the peak so far."""
        os.write(self.refs, b"5")
        self.before = self._peak()

    def taken(self) -> int:
        """Bytes since then."""
        return self._peak() - self.before


class Reader:
    """Gives inputs to targets, and counts."""

    def __init__(self, folder: Path, seconds: float) -> None:
        import fuzz_targets

        self.targets = fuzz_targets.targets(folder / "targets")
        self.malformed = fuzz_targets.malformed
        self.seconds, self.tally, self.resident = seconds, Tally(), Resident()
        self.folder, self.saved = folder, 0.0
        file = (folder / "now").open("w+b")
        file.truncate(LONGEST + 64)
        self.now = mmap.mmap(file.fileno(), LONGEST + 64)  # outlives this process: who died of what

    def give(self, place: int, content: bytes, how: str = "") -> None:
        """One input; `how` it was spoilt where it must not be taken."""
        target, tally = self.targets[place], self.tally
        self.now[: len(content) + 16] = place.to_bytes(8, "little") + len(content).to_bytes(8, "little") + content
        tally.inputs[target.name] += 1
        if how:
            tally.how[how] += 1
        self.resident.begin()
        begin = time.process_time()
        try:
            target.take(content)
        except target.refuses as error:
            tally.refused[type(error).__name__] += 1
        except MemoryError as error:
            tally.found(target.name, f"memory: {error!r}", content)
        except Exception as error:
            tally.found(target.name, f"{type(error).__name__}: {error} ({how})", content)
        else:
            tally.taken[target.name] += 1
            if how:
                tally.found(target.name, f"a malformed message was taken ({how})", content)
        seconds, memory = time.process_time() - begin, self.resident.taken()
        if seconds > tally.slowest["seconds"]:
            tally.slowest = {"seconds": round(seconds, 4), "target": target.name, "bytes_of_input": len(content)}
        if memory > tally.largest["bytes"]:
            tally.largest = {"bytes": memory, "target": target.name, "bytes_of_input": len(content)}
        if seconds > self.seconds:
            tally.found(target.name, f"slow: {seconds:.1f} s", content)
        if memory > ALLOWED + TIMES * len(content):
            tally.found(target.name, f"memory: {memory} bytes for an input of {len(content)}", content)
        if time.monotonic() - self.saved > 1:
            self.save()

    def save(self) -> None:
        """Writes what was counted, for the process above."""
        aside = self.folder / "tally.tmp"
        aside.write_text(json.dumps(vars(self.tally)))
        aside.replace(self.folder / "tally.json")
        self.saved = time.monotonic()


def read_blindly(reader: Reader, end: float, seed: int) -> None:
    """Valid inputs, spoilt at random, until the end; what was spoilt once may be spoilt again."""
    draw = Random(seed)
    while time.monotonic() < end:
        place = draw.randrange(len(reader.targets))
        target = reader.targets[place]
        content = draw.choice(target.valid)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            content = spoilt(target, content, draw)
        reader.give(place, content)


def spoilt(target: Any, content: bytes, draw: Random) -> bytes:
    """The input spoilt by what knows its format, or byte by byte where it has none any more."""
    import fuzz_targets

    try:
        return bytes(target.spoil(content, draw))[:LONGEST]
    except Exception:
        return fuzz_targets.spoilt_bytes(content, draw)[:LONGEST]


def read_guided(reader: Reader, end: float, seed: int, folder: Path) -> None:
    """The same, with atheris picking what to spoil again by the lines of umbel that it has reached."""
    import atheris

    count = len(reader.targets)

    def one(content: bytes) -> None:
        if time.monotonic() > end:
            reader.save()
            os._exit(0)
        if content:
            reader.give(content[0] % count, content[1:])

    def change(content: bytes, longest: int, seed: int) -> bytes:
        draw = Random(seed)
        place = (content[0] if content and draw.random() < 0.9 else draw.randrange(256)) % count
        target = reader.targets[place]
        own = content[1:] if content and content[0] % count == place else draw.choice(target.valid)
        own = spoilt(target, own, draw) if draw.random() < 0.8 else atheris.Mutate(own, longest - 1)
        return (bytes([place]) + own)[:longest]

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for place, target in enumerate(reader.targets):
        for number, content in enumerate(target.valid):
            (corpus / f"valid-{place}-{number}").write_bytes(bytes([place]) + content)
    flags = [f"-seed={seed + 1}", f"-max_len={LONGEST}", "-timeout=60", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def read_malformed(reader: Reader, number: int, seed: int) -> None:
    """So many messages that are surely malformed."""
    draw = Random(seed)
    places = [place for place, target in enumerate(reader.targets) if target.name in MESSAGES]
    for _ in range(number):
        place = draw.choice(places)
        how, content = reader.malformed(reader.targets[place], draw)
        reader.give(place, content, how)
    reader.save()


def work(chosen: argparse.Namespace) -> None:
    """The process that reads; it may die."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    guided = not chosen.blind and not chosen.malformed and has_atheris()
    if guided:
        import atheris

        with atheris.instrument_imports(include=["umbel"], enable_loader_override=False):
            import fuzz_targets  # noqa: F401
    reader = Reader(chosen.worker, chosen.seconds)
    for place, target in enumerate(reader.targets):
        for content in target.valid:
            reader.give(place, content)  # what every later one is compared with
    if missed := [target.name for target in reader.targets if reader.tally.taken[target.name] < len(target.valid)]:
        raise SystemExit(f"valid inputs were refused of: {', '.join(missed)} {reader.tally.findings}")
    reader.tally = Tally()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))
    end = time.monotonic() + 60 * chosen.minutes
    if chosen.malformed:
        read_malformed(reader, chosen.malformed, chosen.seed)
    elif guided:
        read_guided(reader, end, chosen.seed, chosen.worker)
    else:
        read_blindly(reader, end, chosen.seed)
    reader.save()


def has_atheris() -> bool:
    """Whether it is installed."""
    from importlib.util import find_spec

    return find_spec("atheris") is not None


def main(chosen: argparse.Namespace) -> dict[str, Any]:
    """Starts processes that read until the time is over; what they have counted, and what they died of."""
    whole, died, begin = Tally(), 0, time.monotonic()
    while (left := 60 * chosen.minutes - (time.monotonic() - begin)) > 5 or chosen.malformed:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, __file__, "--worker", name, "--seed", str(chosen.seed + died)]
            command += ["--minutes", str(left / 60), "--seconds", str(chosen.seconds)]
            command += ["--malformed", str(chosen.malformed)] + ["--blind"] * chosen.blind
            log = folder / "log"
            with log.open("wb") as file:
                code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
            if not (folder / "tally.json").is_file():
                raise SystemExit(log.read_text(errors="replace")[-4000:])
            add(whole, json.loads((folder / "tally.json").read_text()))
            if code:
                died += 1
                now = (folder / "now").read_bytes()
                place, length = int.from_bytes(now[:8], "little"), int.from_bytes(now[8:16], "little")
                tail = log.read_text(errors="replace")[-300:]
                whole.found(f"target {place}", f"the process ended with {code}: {tail}", now[16 : 16 + length])
        if chosen.malformed:
            break
    return {
        "mode": "malformed" if chosen.malformed else "fuzz",
        "guided_by_atheris": not chosen.blind and not chosen.malformed and has_atheris(),
        "seed": chosen.seed,
        "seconds": round(time.monotonic() - begin, 1),
        "processor_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
        "inputs": whole.inputs.total(),
        "taken": whole.taken.total(),
        "refused": whole.refused.total(),
        "refused_by": dict(whole.refused.most_common()),
        "spoilt": dict(whole.how.most_common()),
        "by_target": {
            target: {"inputs": number, "taken": whole.taken[target]}
            for target, number in sorted(whole.inputs.items())
        },
        "slowest": whole.slowest,
        "largest": whole.largest,
        "limits": {"seconds": chosen.seconds, "bytes": ALLOWED, "times_input": TIMES, "address_room": ROOM},
        "processes_that_died": died,
        "findings": whole.findings,
    }


def add(whole: Tally, part: dict[str, Any]) -> None:
    """Adds what one process has counted."""
    for name in ("inputs", "taken", "refused", "how"):
        getattr(whole, name).update(part[name])
    whole.slowest = max(whole.slowest, part["slowest"], key=lambda one: one["seconds"])
    whole.largest = max(whole.largest, part["largest"], key=lambda one: one["bytes"])
    for one in part["findings"]:
        if sum(own["target"] == one["target"] for own in whole.findings) < FINDINGS:
            whole.findings.append(one)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on (default 10)")
    parser.add_argument("--malformed", type=int, default=0, metavar="N", help="N messages that must be refused")
    parser.add_argument("--seconds", type=float, default=5.0, help="processor time that an input may take (5)")
    parser.add_argument("--seed", type=int, default=0, help="of what is spoilt (default 0)")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.threads = 1
    return chosen


if __name__ == "__main__":
    given = arguments()
    if given.worker:
        work(given)
    else:
        figures = main(given)
        measure.report(figures, given)
        sys.exit(bool(figures["findings"]))
