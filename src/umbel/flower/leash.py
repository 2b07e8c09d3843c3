"""A process that ends with whoever started it, however that one died.

    starter ──pipe──▶ leash ──▶ command, a process group of its own

The starter alone holds the pipe's other end, which closes when the starter lets go or is no more, of kill -9 too.
Then the command and all of its group are asked to end (SIGINT), and made to if they do not; on Linux, so are those
that they have started in groups of their own. The leash is a process that runs this file: it needs nothing but the
standard library, so as to be there in milliseconds.

    python leash.py SECONDS COMMAND …
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from threading import Thread

KILL = b"k"  # in the pipe: kill -9, at once
LOOK = 0.1  # seconds between two looks whether the command has ended
GONE = 5.0  # seconds until who is killed is gone
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl


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


def follow() -> None:
    """Has this process interrupted (SIGINT) once whoever has started it is no more.

    A signal that is sent to the process wakes its main thread, whatever that waits for. Flower's own watch raises
    it in a thread, so that a ServerApp that waits for an answer outlives its SuperLink. To be called in the main
    thread.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of whom a shell has started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=watch, daemon=True).start()


def held(command: Sequence[str], patience: float) -> int:
    """The exit code of a command that runs until it ends, or until the pipe that is the standard input says so."""
    # Who was started in the background ignores SIGINT, and so would the command; a handler is not handed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    _adopt()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    told = b""
    while child.poll() is None:
        if select([0], [], [], LOOK)[0]:
            told = os.read(0, 1)
            break
    if told != KILL:
        _tell(child, signal.SIGINT, patience)
    _tell(child, signal.SIGKILL, GONE)
    code = child.poll()
    return 1 if code is None else code if code >= 0 else 128 - code


def _tell(child: subprocess.Popen[bytes], number: int, seconds: float) -> None:
    """Sends a signal to the command's group, and waits until all that it has started are gone."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        child.poll()
        orphans = [pid for pid in _children() if pid != child.pid]
        for pid in orphans:
            if os.waitpid(pid, os.WNOHANG) == (0, 0) and number == signal.SIGKILL:
                os.kill(pid, number)
        if not orphans and not _is_there(child.pid):
            return
        time.sleep(0.02)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _adopt() -> None:
    """Has who loses its parent become this process's child, where Linux is asked for it.

    A part may start others in groups of their own, as a SuperLink does, and they may outlive it.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(held(sys.argv[2:], float(sys.argv[1])))
