"""The command line: `umbel tasks | methods | run | compare | resume | report`.

Results go to stdout, everything else to stderr. What the user can put right ends with `error: …` and
exit code 2, Ctrl-C with the command that goes on and 130.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from multiprocessing import parent_process
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from umbel.errors import RecipeError, RunFolderError, UmbelError
from umbel.schedule import Schedule

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

    from umbel.recipe import Recipe
    from umbel.rounds import Progress
    from umbel.runs import Result
    from umbel.tables import Group

DRAW_EVERY = 0.1  # seconds between two looks of the bar, at least
DRAW_SHARE = 0.005  # of the time goes into drawing it, at most: rich takes milliseconds, a fast round takes ten
LINE_EVERY = 10.0  # seconds between two lines where there is no terminal
TABLES = ("task", "engine", "method", "local")  # of a recipe; everything else in it is a field of Schedule

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Overridable(TyperCommand):
    """A command that also takes a recipe's settings as options, --a.b=c or --a.b c; they end up in `ctx.args`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        kept, overrides = split_overrides(args, known | set(ctx.help_option_names))
        rest: list[str] = super().parse_args(ctx, kept)
        ctx.args = overrides
        return rest


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's name (umbel tasks lists them) or a .toml file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Workers = Annotated[
    int, typer.Option(min=0, metavar="N", help="Runs at the same time, each on one thread; by default one a core.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


def main() -> None:
    """The entry point."""
    app()


@app.callback(invoke_without_command=True)
def umbel(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Personalised federated fine-tuning with mixtures of low-rank adapters.

    One method, with a progress bar and a table at the end:

      umbel run digits --method floral

    All methods with three seeds, and a report to look at:

      umbel compare digits
    """
    if version:
        from umbel import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def tasks() -> None:
    """List the tasks, and the recipes that come with umbel.

    Example: umbel tasks
    """
    with told():
        from umbel.recipe import labels, load, shipped
        from umbel.tasks import TASKS

        _listing("Tasks (task.name in a recipe)", {name: _first_line(cls) for name, cls in TASKS.items()})
        found = {name: ", ".join(labels(load(path))) for name, path in shipped().items()}
        _listing("Recipes (umbel run NAME --method LABEL, umbel compare NAME) and their methods", found)


@app.command()
def methods() -> None:
    """List the methods.

    Example: umbel methods
    """
    with told():
        from umbel.methods import METHODS

        _listing(
            "Methods (method.LABEL.name in a recipe)", {name: _first_line(cls) for name, cls in METHODS.items()}
        )


@app.command(cls=Overridable)
def run(
    ctx: typer.Context,
    recipe: RecipeName,
    method: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Which of the recipe's methods; needed if it has several.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn; by default the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; by default runs/RECIPE-LABEL-seedN.", metavar="FOLDER")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train with one method; metrics and checkpoints go to a new folder.

    Every setting of the recipe is an option as well; --method.… without a label speaks of the chosen method.

    Example: umbel run digits --method floral

    Example: umbel run digits --method floral --seed 1 --rounds=50

    Example: umbel run digits --method floral --task.variant=rotate

    Example: umbel run digits --method floral --method.router.kind=gradient
    """
    with told():
        from umbel.folder import check_free
        from umbel.recipe import find, load, read
        from umbel.tables import run_name

        path = find(recipe)
        label = _chosen(method, load(path))
        overrides = of_method(ctx.args, load(path), label) + ([] if seed is None else [f"seed={seed}"])
        what = read(load(path, overrides), label)
        folder = out or Path("runs") / f"{_recipe_name(path)}-{run_name(label, what.schedule.seed)}"
        check_free(folder)
    with told(folder):
        result = _trained(what, folder, label, quiet)
        _show_run(folder, label, what.schedule.seed, result, as_json)


@app.command(cls=Overridable)
def compare(
    ctx: typer.Context,
    recipe: RecipeName,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Labels of the recipe's methods; by default all.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="One run of each method for each.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option(help="A new folder; by default runs/compare-RECIPE.", metavar="FOLDER")
    ] = None,
    workers: Workers = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train with several methods and seeds: a table and report.html.

    Every setting of the recipe is an option as well; --method.LABEL.… speaks of that method alone.

    Example: umbel compare digits

    Example: umbel compare digits --methods fedavg,floral --seeds 0,1

    Example: umbel compare digits --rounds=50 --method.floral.num_adapters=8
    """
    with told():
        import tomli_w

        from umbel.folder import check_free, write
        from umbel.recipe import find, labels, load, read
        from umbel.tables import COMPARISON

        path = find(recipe)
        chosen = list(dict.fromkeys(methods.split(","))) if methods is not None else labels(load(path))
        if not chosen:
            raise RecipeError(f"{path} has no [method.…] table; name methods with --methods")
        _check_reach(ctx.args, load(path), chosen)
        table = load(path, ctx.args)
        table.setdefault("engine", {}).setdefault("threads", 1)  # however many runs share the machine
        asked = {"recipe": _recipe_name(path), "labels": chosen, "seeds": _seeds(seeds), "table": table}
        for label in chosen:
            read(table, label)  # what is wrong with the last method is said before the first one runs
        folder = out or Path("runs") / f"compare-{_recipe_name(path)}"
        check_free(folder)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be made: {error.strerror}") from error
        write(folder / COMPARISON, tomli_w.dumps(asked).encode())
    _compare(folder, asked, workers, as_json, quiet)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run or of a comparison.")],
    workers: Workers = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with what was stopped, to the very same result.

    Example: umbel resume runs/digits-floral-seed0

    Example: umbel resume runs/compare-digits
    """
    with told(folder):
        import tomllib

        from umbel.tables import COMPARISON, read_run

        comparison = folder / COMPARISON
        if not comparison.is_file():
            known = read_run(folder)
            result = _resumed(folder, known.label, quiet)
            _show_run(folder, known.label, known.seed, result, as_json)
            return
        try:
            asked = tomllib.loads(comparison.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{comparison} cannot be read: {error}") from None
    _compare(folder, asked, workers, as_json, quiet)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER…", help="Of runs or comparisons.")],
    out: Annotated[
        Path | None,
        typer.Option(help="By default report.html, in the folder if there is only one.", metavar="FILE"),
    ] = None,
) -> None:
    """Write one self-contained HTML file about runs.

    Example: umbel report runs/digits-floral-seed0

    Example: umbel report runs/compare-digits runs/digits-floral-seed7 --out floral.html
    """
    with told():
        from umbel.report import write_report

        print(
            write_report(
                folders, out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
            )
        )


def split_overrides(args: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The arguments that the command itself knows, and the recipe's settings as "a.b=c".

    An option that is neither ends the program, naming the nearest one.
    """
    kept: list[str] = []
    overrides: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if arg == "--":
            return [*kept, arg, *rest], overrides
        if not arg.startswith("--") or name in known:
            kept.append(arg)
            continue
        _check_name(name, known)
        if not equals:
            if not rest or rest[0].startswith("--"):
                _fail(f"{name} needs a value: {name}=…")
            value = rest.pop(0)
        overrides.append(f"{name.removeprefix('--')}={value}")
    return kept, overrides


def of_method(overrides: Sequence[str], table: dict[str, Any], label: str) -> list[str]:
    """The overrides with "method.x.y=…" as "method.LABEL.x.y=…", unless x is the label or what it is `like`."""
    own = _lineage(table, label)

    def rewritten(override: str) -> str:
        key, _, value = override.partition("=")
        first, *rest = key.split(".")
        if first != "method" or not rest or rest[0] in own:
            return override
        return f"{'.'.join(['method', label, *rest])}={value}"

    return [rewritten(override) for override in overrides]


@contextmanager
def told(folder: Path | None = None) -> Iterator[None]:
    """Ends the program with what the user can do about an error, or about having stopped a run in `folder`."""
    try:
        yield
    except UmbelError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        begun = folder is not None and ((folder / "run.json").is_file() or (folder / "compare.toml").is_file())
        _say(f"stopped; go on with: umbel resume {folder}" if begun else "stopped before anything was written")
        raise typer.Exit(130) from None


class Watch:
    """Shows a run's progress on stderr: a bar on a terminal, elsewhere a line about every ten seconds.

    Called after every round; most calls only add up.
    """

    def __init__(self, title: str, rounds: int, history: Sequence[dict[str, Any]], quiet: bool) -> None:
        from umbel.tables import dropped, total

        self._title, self._rounds, self._quiet = title, rounds, quiet
        self._bytes = total(history, "bytes_up") + total(history, "bytes_down")
        self._dropped = dropped(history)
        self._score = ""
        self._done = 0  # rounds in this session
        self._seconds = 0.0  # that they took
        self._shown = perf_counter()
        self._every = LINE_EVERY
        self._bar: Bar | None = None

    def __enter__(self) -> "Watch":
        alone = parent_process() is None  # workers of a comparison would draw their bars over each other
        if alone and not self._quiet and sys.stderr.isatty():
            self._bar, self._every = _new_bar(len(self._title)), DRAW_EVERY
            self._bar.add_task(self._title, total=self._rounds, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, at: "Progress") -> None:
        figures = at.figures
        self._done += 1
        self._seconds += figures["seconds"]
        self._bytes += figures["bytes_up"] + figures["bytes_down"]
        self._dropped += len(figures.get("dropped", ()))
        if "loss" in figures:
            self._score = score(figures)
        now = perf_counter()
        if self._quiet or (now - self._shown < self._every and at.round < self._rounds):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=at.round, text=self._text(figures), refresh=True)
            self._every = max(DRAW_EVERY, (perf_counter() - now) / DRAW_SHARE)
        else:
            _say(f"{self._title}: round {at.round}/{self._rounds}  {self._text(figures)}")

    def _text(self, figures: dict[str, Any]) -> str:
        from umbel.tables import num_bytes

        rate = self._done / max(1e-9, self._seconds)
        speed = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        parts = [f"train {figures['train_loss']:.3f}", self._score, speed, num_bytes(self._bytes)]
        return "  ".join([*filter(None, parts), *([f"{self._dropped} dropped"] if self._dropped else [])])


def score(figures: dict[str, Any]) -> str:
    """How well it goes, in a few characters: "acc 92.6 (worst 83.3)"."""
    if "accuracy" in figures:
        return f"acc {figures['accuracy']:.1f} (worst {figures['worst_decile']:.1f})"
    return f"loss {figures['loss']:.4g} (worst {figures['worst_decile']:.4g})"


def _trained(recipe: "Recipe", folder: Path, title: str, quiet: bool) -> "Result":
    from umbel.runs import run_recipe

    with Watch(title, recipe.schedule.rounds, [], quiet) as watch:
        return _warned(run_recipe(recipe, folder, watch))


def _resumed(folder: Path, title: str, quiet: bool) -> "Result":
    from umbel import runs
    from umbel.tables import read_run

    known = read_run(folder)
    with Watch(title, known.rounds, known.history, quiet) as watch:
        return _warned(runs.resume(folder, on_round=watch))


def _warned(result: "Result") -> "Result":
    for warning in result.warnings:
        _say(f"warning: {warning}")
    return result


def _compare(folder: Path, asked: dict[str, Any], workers: int, as_json: bool, quiet: bool) -> None:
    """Runs, or goes on with, every (seed, label) that was asked for; then the table and the report."""
    with told(folder):
        from umbel.report import write_report
        from umbel.tables import find_runs, grouped

        wanted = [(label, seed) for seed in asked["seeds"] for label in asked["labels"]]
        jobs = [
            (asked["table"], label, seed, folder, f"{position}/{len(wanted)} {label} seed {seed}", quiet)
            for position, (label, seed) in enumerate(wanted, 1)
        ]
        failed = []
        for (label, seed), error in zip(wanted, _errors_of(jobs, workers), strict=True):
            if error is not None:  # the other runs are worth having all the same
                failed.append({"label": label, "seed": seed, "error": error})
                _say(f"error: {label}, seed {seed}: {error}")
        if len(failed) == len(wanted):
            raise typer.Exit(2)
        groups = grouped(find_runs([folder]))
        page = write_report([folder], folder / "report.html")
        if as_json:
            _print_json(_comparison_document(folder, page, asked, groups, failed))
        else:
            _print_table(_comparison_table(asked, groups))
            print(f"report: {page}")
        if failed:
            raise typer.Exit(2)


def _errors_of(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[str | None]:
    """What went wrong in each job, in order; the jobs are shared out to so many processes."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        yield from (_job(*job) for job in jobs)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield from pool.map(_job, *zip(*jobs, strict=True))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def _job(table: dict[str, Any], label: str, seed: int, folder: Path, title: str, quiet: bool) -> str | None:
    """Does one run of a comparison, or goes on with it; the error if it has one."""
    from umbel.recipe import read
    from umbel.tables import run_name

    path = folder / run_name(label, seed)
    try:
        if path.exists():
            _resumed(path, title, quiet)
        else:
            _trained(read(table | {"seed": seed}, label), path, title, quiet)
    except UmbelError as error:
        return str(error)
    except Exception as error:  # whatever it is (no memory left, say), the other runs are worth having
        return f"{type(error).__name__}: {error}"
    return None


def _show_run(folder: Path, label: str, seed: int, result: "Result", as_json: bool) -> None:
    """The run's end: a table, or one JSON document."""
    from umbel.tables import dropped, total

    keys = ("bytes_up", "bytes_down", "train_seconds", "seconds")
    sums = {key: total(result.history, key) for key in keys} | {"dropped": dropped(result.history)}
    if as_json:
        about = {"folder": str(folder), "label": label, "seed": seed, "rounds": result.progress.round}
        _print_json(about | {"figures": result.figures, "totals": sums, "warnings": result.warnings})
        return
    _print_table(_run_table(label, seed, result.figures, sums))
    print(f"folder: {folder}")
    print(f"next:   umbel report {folder}")


def _run_table(label: str, seed: int, figures: dict[str, Any], sums: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from umbel.tables import num_bytes, seconds

    table = Table(
        title=Text(f"{label}, seed {seed}, {figures['round']} rounds"), show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, str | None]] = [
        ("accuracy, mean over clients", _with("accuracy", "{:.2f} %", figures)),
        (
            "  worst tenth of the clients",
            _with("worst_decile", "{:.2f} %", figures) if "accuracy" in figures else None,
        ),
        ("loss, mean over clients", _with("loss", "{:.4g}", figures)),
        (
            "  worst tenth of the clients",
            None if "accuracy" in figures else _with("worst_decile", "{:.4g}", figures),
        ),
        ("routes agree with true groups (NMI)", _with("nmi", "{:.3f}", figures)),
        ("routing entropy, nats", _with("entropy_nats", "{:.3f}", figures)),
        ("adapters or models that nobody uses", _with("dead", "{}", figures)),
        ("sent by clients", num_bytes(sums["bytes_up"])),
        ("sent to clients", num_bytes(sums["bytes_down"])),
        ("training", seconds(sums["train_seconds"])),
        ("evaluation", seconds(sums["seconds"] - sums["train_seconds"])),
        ("updates dropped (not finite)", str(sums["dropped"]) if sums["dropped"] else None),
    ]
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    return table


def _with(key: str, form: str, figures: dict[str, Any]) -> str | None:
    return form.format(figures[key]).replace("-0.000", "0.000") if key in figures else None


def _comparison_table(asked: dict[str, Any], groups: Sequence["Group"]) -> "Table":
    """Mean ± standard deviation over seeds, a row for every method, the best in bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from umbel.tables import best, columns, dropped, spread, written

    seeds = ", ".join(str(seed) for seed in asked["seeds"])
    title = f"{asked['recipe']}, seeds {seeds}: mean ± standard deviation over seeds"
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 0, 0, 1)  # six columns fit into eighty characters
    table.add_column("method", no_wrap=True)
    shown = columns(groups)
    tops = {column.key: best(groups, column) for column in shown}
    lost = {group.label: sum(dropped(run.history) for run in group.runs) for group in groups}
    for column in shown:
        title = column.title + (", %" if column.unit == "%" else "")
        table.add_column(title.replace(" / ", "\n/ "), justify="right", vertical="bottom")
    if any(lost.values()):
        table.add_column("dropped", justify="right")
    for group in groups:
        row = [Text(group.label, style="italic" if group.oracle else "")]
        for column in shown:
            style = "bold green" if group.label in tops[column.key] else ""
            row.append(Text(written(spread(group, column.key), column.unit), style=style))
        if any(lost.values()):
            row.append(Text(str(lost[group.label])))
        table.add_row(*row)
    if any(group.oracle for group in groups):
        table.caption = "Oracles know the clients' true groups: bounds, not contestants."
    return table


def _comparison_document(
    folder: Path, page: Path, asked: dict[str, Any], groups: Sequence["Group"], failed: list[dict[str, Any]]
) -> dict[str, Any]:
    from umbel.folder import machine
    from umbel.tables import columns, dropped, spread

    shown = columns(groups)
    rows = []
    for group in groups:
        found = {column.key: spread(group, column.key) for column in shown}
        rows.append(
            {
                "label": group.label,
                "oracle": group.oracle,
                **{key: vars(own) for key, own in found.items() if own is not None},
                "dropped": sum(dropped(run.history) for run in group.runs),
                "runs": [
                    {
                        "folder": str(run.path),
                        "seed": run.seed,
                        "rounds": len(run.history),
                        "figures": run.scored[-1] if run.scored else {},
                    }
                    for run in group.runs
                ],
            }
        )
    about = {"command": " ".join(["umbel", *sys.argv[1:]]), **machine()}
    about |= {"recipe": asked["recipe"], "folder": str(folder), "report": str(page), "seeds": asked["seeds"]}
    return about | {"methods": rows, "failed": failed}


def _chosen(method: str | None, table: dict[str, Any]) -> str:
    from umbel.recipe import labels

    known = labels(table)
    if method is None and len(known) != 1:
        raise RecipeError(
            f"which method? --method is one of {', '.join(known)}" if known else "--method is missing"
        )
    return known[0] if method is None else method


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise RecipeError(f"--seeds={text}: whole numbers are wanted, such as --seeds=0,1,2") from None


def _check_reach(overrides: Sequence[str], table: dict[str, Any], chosen: Sequence[str]) -> None:
    """Refuses settings of a method that is not compared, which would change nothing."""
    reached = {name for label in chosen for name in _lineage(table, label)}
    for override in overrides:
        key, _, _ = override.partition("=")
        first, *rest = key.split(".")
        if first == "method" and rest and rest[0] not in reached:
            raise RecipeError(
                f"--{key}: {rest[0]!r} is none of the methods compared ({', '.join(chosen)}); "
                f"name one of them, as in --method.{chosen[-1]}.SETTING=…"
            )
        if key == "seed":
            raise RecipeError("--seed: a comparison has several; use --seeds")


def _lineage(table: dict[str, Any], label: str) -> list[str]:
    """The label, and those whose settings it takes over."""
    found = [label]
    while True:
        own = table.get("method", {}).get(found[-1], {})
        like = own.get("like") if isinstance(own, dict) else None
        if not isinstance(like, str) or like in found:
            return found
        found.append(like)


def _check_name(name: str, known: set[str]) -> None:
    """Ends the program if "--name" is no option and cannot be a setting of a recipe."""
    first, *rest = name.removeprefix("--").split(".")
    plain = {field.name for field in fields(Schedule)}
    if (first in TABLES and rest) or (first in plain and not rest):
        return
    if first in TABLES:
        _fail(f"{name} is a table of settings; give one of them: {name}.SETTING=…")
    options = sorted(known | {f"--{key}" for key in plain} | {f"--{key}.…" for key in TABLES})
    near = get_close_matches(name, options, n=1)
    meant = (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(o for o in options if o.startswith('--'))}"
    )
    _fail(f"there is no option {name}; {meant}")


def _recipe_name(path: Path) -> str:
    """The recipe's name in folder names; a run folder's recipe.toml is called after the folder."""
    return path.stem if path.stem != "recipe" else path.resolve().parent.name


def _listing(title: str, lines: dict[str, str]) -> None:
    width = max(map(len, lines), default=0)
    print(f"{title}:")
    for name, line in lines.items():
        print(f"  {name:<{width}}  {line}")


def _first_line(cls: type) -> str:
    """What the class, or else its module, says of itself in a line, without the names before the colon."""
    own = cls.__doc__ or ""
    if own and not own.startswith(f"{cls.__name__}("):  # that one is made by dataclass
        return own.strip().partition("\n")[0]
    first = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
    _, colon, what = first.partition(": ")
    return what if colon else first


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


def _print_table(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    # In a file nothing needs to fit a window, and a folded figure is hard to read.
    (console if console.is_terminal else Console(width=140)).print(table)


def _print_json(document: dict[str, Any]) -> None:
    from umbel.tables import finite

    print(json.dumps(finite(document), indent=1, allow_nan=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}")
    raise typer.Exit(2)
