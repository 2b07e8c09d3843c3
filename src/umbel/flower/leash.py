"""A process that ends with whoever started it, however that one died.

    starter ──pipe──▶ leash ──▶ command, a process group of its own

The starter alone holds the pipe's other end, which closes when the starter lets go or is no more, of kill -9 too.
Then the command and all of its group are asked to end (SIGINT), and made to if they do not. The leash is a process
that runs this file: it needs nothing but the standard library, so as to be there in milliseconds.

    python leash.py SECONDS COMMAND …
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

KILL = b"k"  # in the pipe: kill -9, at once
LOOK = 0.1  # seconds between two looks whether the command has ended
GONE = 5.0  # seconds until who is killed is gone


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str], patience: float = 10.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A command on a leash, which is pulled when the block ends; its exit code is the command's.

    Args:
        command: the program, by its path, and its arguments.
        log: a file that what it says is added to.
        environment: all of its variables.
        patience: seconds from being asked to end until it is made to.
    """
    leash = [sys.executable, "-I", "-S", __file__, str(patience), *command]
    with log.open("ab") as file:
        # A session of its own: Ctrl-C comes to this program alone, which then stops the others in their order.
        started = subprocess.Popen(
            leash, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield started
    finally:
        assert started.stdin is not None
        started.stdin.close()
        started.wait()


def kill(started: subprocess.Popen[bytes]) -> None:
    """Ends a process of `process` with all that it has started by kill -9, with no time for last words."""
    assert started.stdin is not None
    with suppress(BrokenPipeError):  # it has ended
        os.write(started.stdin.fileno(), KILL)
    started.wait()


def held(command: Sequence[str], patience: float) -> int:
    """The exit code of a command that runs until it ends, or until the pipe that is the standard input says so."""
    # Who was started in the background ignores SIGINT, and so would the command; a handler is not handed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    told = b""
    while child.poll() is None:
        if select([0], [], [], LOOK)[0]:
            told = os.read(0, 1)
            break
    asked = () if told == KILL else ((signal.SIGINT, patience),)
    for number, wait in (*asked, (signal.SIGKILL, GONE)):
        end = time.monotonic() + wait
        with suppress(ProcessLookupError):  # none is left of the group
            os.killpg(child.pid, number)
            while time.monotonic() < end:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.02)
    code = child.poll()
    return 1 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(held(sys.argv[2:], float(sys.argv[1])))
