"""A deployed run whose nodes, server and SuperLink are killed (-9) at random, beside the same run without faults.

python benchmarks/deployed_chaos.py --methods floral --out benchmarks/results/deployed_chaos_floral.json

After every kill what was killed is started again: a node after up to DOWN seconds, so that it may miss a deadline; the
SuperLink, which takes the server with it, at once; `flwr run` whenever it has ended before the last round. When and
what is killed is drawn by the seed; what had been done by then is up to the machine. The run without faults is the
simulator's, whose bits are those of a deployed run (tests/test_deploy.py).
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import measure
from umbel.cohort import Engine
from umbel.flower import trial
from umbel.flower.resume import is_unfinished, last_round
from umbel.recipe import Recipe, find, load, read
from umbel.runs import read_history, run_recipe
from umbel.tables import losses

METHODS, ROUNDS, CLIENTS, NODES, SEED = ("floral", "fedavg"), 20, 12, 3, 0
DOWN = 20.0  # seconds, for which a node is away, at most
OPTIONS = ("deadline=60.0", "wait-gone=15.0")
LONGEST = 3600.0  # seconds of one run


@dataclass
class Chaos:
    """One deployed run, and who kills its parts."""

    running: trial.Trial
    out: Path
    options: tuple[str, ...]
    kills: list[dict[str, Any]] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # parts that ended and were not killed
    attempts: int = 0  # how often `flwr run` was started

    def go(self, victims: Iterator[tuple[str, int, float, float]]) -> None:
        """Lets the run go to its end.

        Args:
            victims: whom to kill, after how many more rounds and then how many seconds, and for how long.
        """
        end, stack, run = time.monotonic() + LONGEST, ExitStack(), None
        due = next(victims, None)
        since, moment = self.round, None
        with stack:
            while not self.over:
                if time.monotonic() > end:
                    raise TimeoutError(f"round {self.round} after {LONGEST:.0f} s: {self.crashes}")
                if run is None or (run.poll() is not None and not self.over):
                    if run is not None:
                        self.crashes.append(f"the run ended after round {self.round}")
                        if len(self.crashes) > 5:
                            raise RuntimeError(f"it does not go on: {self.crashes}")
                    run = self.led(stack)
                for name, process in list(self.running.processes.items()):
                    if process.poll() is not None:
                        self.crashes.append(f"{name} ended after round {self.round}")
                        self.running.start(name)
                if due is not None and self.round >= since + due[1]:
                    moment = moment or time.monotonic() + due[2]
                    if time.monotonic() >= moment:
                        self.kill(due[0], due[3], stack)
                        run = None if due[0] in ("superlink", "server") else run
                        due, since, moment = next(victims, None), self.round, None
                time.sleep(0.1)
            if run is not None:
                run.wait(60)

    @property
    def round(self) -> int:
        return last_round(self.out)

    @property
    def over(self) -> bool:
        return (self.out / "run.json").exists() and not is_unfinished(self.out)

    def led(self, stack: ExitStack) -> "subprocess.Popen[bytes]":
        self.attempts += 1
        return stack.enter_context(trial.led(self.running, self.out, self.options))

    def kill(self, victim: str, down: float, stack: ExitStack) -> None:
        """Ends a part by kill -9 and starts it again."""
        self.kills.append({"after_round": self.round, "part": victim, "down_seconds": round(down, 1)})
        print(f"  after round {self.round}: kill -9 {victim}", flush=True)
        if victim == "server":
            for pid in servers(self.running.environment["FLWR_HOME"]):
                os.kill(pid, signal.SIGKILL)
        else:
            self.running.kill(victim)
        if victim in ("server", "superlink"):
            stack.close()  # `flwr run` would look on at a run that nobody leads
        else:
            time.sleep(down)
        if victim != "server":
            self.running.start(victim)


def servers(home: str) -> list[int]:
    """The processes of ServerApps under this FLWR_HOME."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words, settings = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and b"flwr-serverapp" in words and f"FLWR_HOME={home}".encode() in settings:
            found.append(int(entry.name))
    return found


def drawn(seed: int, nodes: list[str], down: float) -> Iterator[tuple[str, int, float, float]]:
    """Whom to kill: every part in its turn, in an order and at moments that the seed draws."""
    draw = Random(seed)
    while True:
        parts = [*nodes, "superlink", "server"]
        draw.shuffle(parts)
        for part in parts:
            away = draw.uniform(0, down) if part in nodes else 0.0
            yield part, draw.randint(1, 2), draw.uniform(0, 4), away


def beside(
    recipe: Recipe,
    folder: Path,
    num_nodes: int,
    victims: Iterator[tuple[str, int, float, float]],
    options: tuple[str, ...],
) -> dict[str, Any]:
    """The run with faults beside the run without."""
    clean = run_recipe(replace(recipe, engine=Engine(mode="looped", threads=1)))
    trial.init(folder, recipe, num_nodes, port=trial.free_port("127.0.0.1"))
    begin = time.monotonic()
    with trial.started(folder, lambda text: print(" ", text, flush=True)) as running:
        chaos = Chaos(running, folder / "run", options)
        chaos.go(victims)
    history = read_history(chaos.out)
    return {
        "rounds": len(history),
        "crashes": chaos.crashes,
        "kills": chaos.kills,
        "runs_started": chaos.attempts,
        "lost": losses(history),
        "rounds_without_quorum": sum("no_quorum" in line for line in history),
        "accuracy": history[-1]["accuracy"],
        "accuracy_without_faults": clean.figures["accuracy"],
        "difference": history[-1]["accuracy"] - clean.figures["accuracy"],
        "seconds": time.monotonic() - begin,
    }


def main(methods: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "nodes": NODES,
        "seed": SEED,
        "options": OPTIONS,
        "methods": {},
    }
    for method in methods:
        table = load(find("digits"), [f"task.num_clients={CLIENTS}", f"rounds={ROUNDS}", f"seed={SEED}"])
        with tempfile.TemporaryDirectory() as folder:
            names = [f"node-{number + 1}" for number in range(NODES)]
            victims = drawn(SEED, names, DOWN)
            found = beside(read(table, method), Path(folder) / method, NODES, victims, OPTIONS)
        print(method, found, flush=True)
        figures["methods"][method] = found
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    chosen.threads = 1
    measure.report(main(chosen.methods), chosen)
