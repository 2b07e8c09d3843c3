"""Runs with their progress: one in this process, or many shared out to several."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.cli.said import say
from umbel.cli.watch import Watch
from umbel.errors import UmbelError

if TYPE_CHECKING:
    from umbel.recipe import Recipe
    from umbel.runs import Result


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    table: dict[str, Any]  # the recipe's, without the seed
    label: str
    seed: int
    folder: Path  # of the run
    title: str
    quiet: bool


def trained(recipe: "Recipe", folder: Path, title: str, quiet: bool) -> "Result":
    """The recipe's run, in a new folder."""
    from umbel.runs import run_recipe

    with Watch(title, recipe.schedule.rounds, [], quiet) as watch:
        return _warned(run_recipe(recipe, folder, watch))


def resumed(folder: Path, title: str, quiet: bool) -> "Result":
    """The folder's run, gone on with to its end."""
    from umbel import runs
    from umbel.tables import read_run

    known = read_run(folder)
    with Watch(title, known.rounds, known.history, quiet) as watch:
        return _warned(runs.resume(folder, on_round=watch))


def errors_of(jobs: Sequence[Job], workers: int) -> Iterator[str | None]:
    """What went wrong in each job, in order; the jobs are shared out to so many processes."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from map(_error_of, jobs)
        return
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    killed = "a worker was killed (no memory left?); give the command again, with fewer --workers"
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
        # No job waits in the pool, where a worker would take it up after Ctrl-C.
        left, futures, at_work = list(jobs), list[Future[str | None]](), set[Future[str | None]]()
        for _ in jobs:
            while not futures or not futures[0].done():
                try:
                    while left and len(at_work) < workers:
                        futures.append(pool.submit(_error_of, left.pop(0)))
                        at_work.add(futures[-1])
                except BrokenProcessPool:
                    futures.append(Future())
                    futures[-1].set_result(killed)
                    continue
                at_work = wait(at_work, return_when=FIRST_COMPLETED).not_done
            try:
                yield futures.pop(0).result()
            except BrokenProcessPool:
                yield killed


def _end_with_parent() -> None:
    """Ends this worker when the process that gave it its work is gone, killed or not."""
    from multiprocessing import connection, parent_process
    from threading import Thread

    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # what is half done is gone on with by the next command

    Thread(target=wait, daemon=True).start()


def _error_of(job: Job) -> str | None:
    """Does one run of a comparison, or goes on with it; the error if it has one."""
    from umbel.recipe import read

    try:
        if job.folder.exists():
            resumed(job.folder, job.title, job.quiet)
        else:
            trained(read(job.table | {"seed": job.seed}, job.label), job.folder, job.title, job.quiet)
    except UmbelError as error:
        return str(error)
    except Exception as error:  # whatever it is (no memory left, say), the other runs are worth having
        return f"{type(error).__name__}: {error}"
    return None


def _warned(result: "Result") -> "Result":
    for warning in result.warnings:
        say(f"warning: {warning}")
    return result
