"""What was started ends with whoever started it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from umbel.flower.leash import kill, process

# A program with a child, which says who they are; what it does when it is asked to end is the test's.
PROGRAM = "import os, signal, subprocess, time; {on_signal}; child = subprocess.Popen(['sleep', '1000']); "
PROGRAM += "other = subprocess.Popen(['sleep', '1000'], start_new_session=True); "  # in a group of its own
PROGRAM += "print(os.getpid(), child.pid, other.pid, flush=True); time.sleep(1000)"
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
STARTER = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from umbel.flower.leash import process\n"
    "with process([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]), os.environ, 0.5):\n"
    "    time.sleep(1000)\n"
)


def soon(what, seconds=60.0):
    """What it gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)
    return found


def pids_in(log):
    """All of them or none: where output is not buffered, a line comes piece by piece."""
    text = log.read_text() if log.exists() else ""
    return [int(word) for word in text.split()] if text.endswith("\n") else []


def is_there(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # who is dead and has not been waited for is none either
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def none_of(pids):
    return not any(map(is_there, pids))


@pytest.mark.parametrize("on_signal", ["pass", DEAF], ids=["who listens", "who is deaf"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_was_started_ends_with_its_starter_however_that_died(on_signal, number, tmp_path):
    log = tmp_path / "log"
    background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # as of a shell, where SIGINT is ignored
    starter = subprocess.Popen(
        [*background, sys.executable, "-c", STARTER, PROGRAM.format(on_signal=on_signal), str(log)]
    )
    try:
        pids = soon(lambda: pids_in(log))
        assert len(pids) == 3
        assert all(map(is_there, pids))
        starter.send_signal(number)
        assert starter.wait() == -number
    finally:  # what fails here must not fail whichever test comes next
        starter.kill()
        starter.wait()
    soon(lambda: none_of(pids))


def test_a_process_ends_with_its_block_and_by_kill(tmp_path):
    command = [sys.executable, "-c", PROGRAM.format(on_signal="pass")]
    with process(command, tmp_path / "log", os.environ, 0.5) as started:
        pids = soon(lambda: pids_in(tmp_path / "log"))
        assert started.poll() is None
    assert none_of(pids)
    assert started.returncode == 128 + signal.SIGINT  # asked, and not made to
    with process(command, tmp_path / "more", os.environ) as started:
        pids = soon(lambda: pids_in(tmp_path / "more"))
        kill(started)
        assert none_of(pids)
        kill(started)  # who has ended is left in peace
    assert started.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("at_first", [signal.SIG_IGN, signal.default_int_handler], ids=["ignored", "heard"])
def test_who_follows_ends_with_its_parent_whatever_it_waits_for(at_first, tmp_path):
    waits = "import os, threading; from umbel.flower.leash import follow; follow(); "
    waits += "print(os.getpid(), flush=True); threading.Event().wait()"
    parent = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(1000)"
    )
    before = signal.signal(signal.SIGINT, at_first)  # what is ignored here is so there
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen([sys.executable, "-c", parent, waits], stdout=log, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    pids = soon(lambda: pids_in(tmp_path / "log"))
    assert all(map(is_there, pids))
    started.kill()
    started.wait()
    soon(lambda: none_of(pids))


def test_the_exit_code_is_the_commands_and_its_children_end_with_it(tmp_path):
    program = PROGRAM.format(on_signal="pass").replace("time.sleep(1000)", "os._exit(7)")
    with process([sys.executable, "-c", program], tmp_path / "log", os.environ, 0.5) as started:
        assert soon(started.poll) == 7
    assert none_of(pids_in(tmp_path / "log"))


def test_a_command_that_is_not_there_is_told(tmp_path):
    with process([str(tmp_path / "nothing")], tmp_path / "log", os.environ) as started:
        assert soon(started.poll) == 1
    assert "No such file" in (tmp_path / "log").read_text()
