"""The commands. What takes time is imported inside them, so that help is there at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from umbel.cli.deploying import deploy
from umbel.cli.jobs import resumed, trained
from umbel.cli.options import (
    Command,
    Json,
    Methods,
    Out,
    Overridable,
    Quiet,
    RecipeName,
    RecipeNames,
    Searching,
    Workers,
    chosen_label,
    numbers_of,
    of_method,
)
from umbel.cli.said import listing, say, told
from umbel.cli.settings import print_settings, show_settings
from umbel.cli.show import show_run
from umbel.cli.unread import unread
from umbel.errors import RecipeError
from umbel.heap import keep_freed_memory

# Typer before 0.21, which Flower wants, writes "[required]" as Rich would have it even in plain help.
typer.core.HAS_RICH = False

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does so itself, and the two would both
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(deploy, name="deploy")


def main() -> None:
    """The entry point."""
    keep_freed_memory()
    app()


@app.callback(invoke_without_command=True)
def umbel(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Personalised federated fine-tuning with mixtures of low-rank adapters.

    One method, with a progress bar and a table at the end:

      umbel run digits --method floral

    A recipe's methods with three seeds, and a report to look at:

      umbel compare digits
    """
    if version:
        from umbel import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[TASK]", help="Whose settings to list.")] = None,
) -> None:
    """List the tasks and the recipes, or one task's settings.

    Example: umbel tasks

    Example: umbel tasks digits
    """
    with told():
        from umbel.recipe import labels, load, shipped
        from umbel.tasks import TASKS

        if name is not None:
            show_settings(name, TASKS, f'[task] name = "{name}" in a recipe, --task.SETTING=… of a command:')
            return
        listing("Tasks (task.name in a recipe)", {name: _first_line(cls) for name, cls in TASKS.items()})
        found = {name: ", ".join(labels(load(path))) for name, path in shipped().items()}
        listing("Recipes (umbel run NAME --method LABEL, umbel compare NAME) and their methods", found)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Whose settings to list.")] = None,
) -> None:
    """List the methods, or one method's settings.

    Example: umbel methods

    Example: umbel methods floral
    """
    with told():
        from umbel.methods import METHODS

        if name is not None:
            show_settings(name, METHODS, f"[method.{name}] in a recipe, --method.{name}.SETTING=… of a command:")
            return
        listing(
            "Methods (method.LABEL.name in a recipe)", {name: _first_line(cls) for name, cls in METHODS.items()}
        )


@app.command()
def settings() -> None:
    """List the settings that every run has.

    Those of a task are told by umbel tasks TASK, those of a method by umbel methods METHOD.

    Example: umbel settings
    """
    with told():
        from umbel.cohort import Engine
        from umbel.schedule import Schedule
        from umbel.train import LocalTraining

        print_settings("Of a run: --SETTING=…", Schedule)
        print_settings(
            "Of local training, for all methods that say nothing else: --local.SETTING=…", LocalTraining
        )
        print_settings(
            "Of how the work is laid out; changes figures by rounding at most: --engine.SETTING=…", Engine
        )


@app.command(cls=Overridable)
def run(
    ctx: typer.Context,
    recipe: RecipeName,
    method: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Of the recipe (needed if it has several), or any other, untuned."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn; by default the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; by default runs/RECIPE-LABEL-seedN.", metavar="FOLDER")
    ] = None,
    as_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train with one method; what comes out goes to a new folder.

    Every setting of the recipe is an option as well; --method.… without a label speaks of the chosen method.

    Example: umbel run digits --method floral

    Example: umbel run digits --method floral --seed 1 --rounds=50

    Example: umbel run digits --method floral --task.variant=rotate

    Example: umbel run digits --method floral --method.router.kind=gradient
    """
    with told():
        from umbel.folder import check_free
        from umbel.recipe import find, load, read, title_of
        from umbel.tables import run_name

        path = find(recipe)
        plain = load(path)
        label = chosen_label(method, plain)
        overrides = of_method(ctx.args, plain, label) + ([] if seed is None else [f"seed={seed}"])
        what = read(load(path, overrides), label)
        for why in unread(overrides, plain, {label: what}):
            say(f"warning: {why}")
        folder = out or Path("runs") / f"{title_of(path).replace('/', '-')}-{run_name(label, what.schedule.seed)}"
        check_free(folder)
    with told(folder):
        result = trained(what, folder, label, quiet)
        show_run(folder, label, what.schedule.seed, result, as_json)


@app.command(cls=Overridable)
def compare(
    ctx: typer.Context,
    recipes: RecipeNames,
    methods: Methods = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="One run of each method for each.")] = "0,1,2",
    out: Out = None,
    workers: Workers = 0,
    as_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train with several methods and seeds: tables and report.html.

    Every setting of the recipe is an option as well; --method.LABEL.… speaks of that method alone. With several
    recipes there is a column for each, and beside our figures those that its [paper] table has.

    The same command again repeats nothing that is finished; with more seeds or methods it adds to the folder.

    Example: umbel compare digits

    Example: umbel compare digits --methods fedavg,floral --seeds 0,1

    Example: umbel compare digits --rounds=50 --method.floral.num_adapters=8

    Example: umbel compare table1/mnist_r table1/mnist_ls --out runs/table1 --json table1.json
    """
    with told():
        from umbel.cli import comparing
        from umbel.recipe import read

        asked = comparing.asked_for(recipes, ctx.args, methods, numbers_of("seeds", seeds))
        for own in asked:
            for why in unread(ctx.args, own.table, {label: read(own.table, label) for label in own.labels}):
                say(f"warning: {why}")
        folder = out or comparing.default_folder(asked)
        cells = comparing.begin(folder, asked)
    comparing.go(folder, cells, workers, as_json, quiet)


@app.command(cls=Searching)
def tune(
    ctx: typer.Context,
    recipes: RecipeNames,
    methods: Methods = None,
    seeds: Annotated[str, typer.Option(metavar="100,101", help="One run of each point for each.")] = "100",
    out: Out = None,
    workers: Workers = 0,
    as_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Search settings on training examples, alike for every method.

    The values to try are in the recipe's [search] table, or given as --search.SETTING=[…]; each with each. A table
    [search.method.ditto], or --search.method.ditto.SETTING=[…], has values for that method alone.
    Test examples are not looked at: a quarter of each client's training examples stands in for them (validation).
    The table says which point is best for each method, and whether it lies at the edge of what was tried.

    Example: umbel tune table1/mnist_ls_5 --methods fedavg,floral

    Example: umbel tune digits --search.local.lr=[0.05,0.1,0.2] --seeds 100,101,102

    Example: umbel tune rivals --methods ditto --search.method.ditto.strength=[0.1,1]
    """
    with told():
        from umbel.cli import comparing, tuning

        asked = tuning.asked_for(recipes, ctx.args, methods, numbers_of("seeds", seeds))
        folder = out or tuning.default_folder(asked)
        cells = comparing.begin(folder, asked)
    tuning.go(folder, cells, workers, as_json, quiet)


@app.command(cls=Command)
def resume(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run, a comparison or a search.")],
    workers: Workers = 0,
    as_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Go on with what was stopped, to the very same result.

    Example: umbel resume runs/digits-floral-seed0

    Example: umbel resume runs/compare-digits
    """
    with told(folder):
        from umbel.cli import comparing, tuning
        from umbel.tables import COMPARISON, read_run

        if not (folder / COMPARISON).is_file():
            known = read_run(folder)
            result = resumed(folder, known.label, quiet)
            show_run(folder, known.label, known.seed, result, as_json)
            return
        cells = comparing.begun(folder)
        searching = all(map(tuning.is_search, cells.values()))
    (tuning if searching else comparing).go(folder, cells, workers, as_json, quiet)


@app.command(cls=Command)
def onboard(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER…", help="Of runs or comparisons.")],
    samples: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,5,20", help="How many samples of its own a client has; by default 0,1,2,5,10,20,50."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="One client of your own in place of the held-out ones: an .npz or .safetensors file with x and "
            "y, and x_test and y_test to be scored.",
            metavar="FILE",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --data: where that client's model goes, as .safetensors.", metavar="FILE"),
    ] = None,
    as_json: Json = None,
) -> None:
    """Give clients that never trained their mixture from a few samples.

    A run that holds clients out, --held_out=0.2 for a fifth of them, can be asked how well these do: by their
    routes alone (adapters untouched, a handful of numbers to learn), by fine-tuning the whole model, and with the
    global model as it is. onboard.json in the run folder has the figures, and umbel report draws them.

    With --data a client of your own gets its mixture, and with --out its model: the tensors of the run's module by
    name; a layer whose adapter runs beside it has the two factors as NAME_lora_A and NAME_lora_B.

    Example: umbel run digits --method floral --held_out=0.2

    Example: umbel onboard runs/digits-floral-seed0 --samples 0,1,5,20

    Example: umbel onboard runs/digits-floral-seed0 --data mine.npz --out mine.safetensors
    """
    with told():
        from umbel.cli import onboarding

        wanted = None if samples is None else numbers_of("samples", samples)
        if data is not None:
            onboarding.one(folders, data, wanted, out, as_json)
        elif out is not None:
            raise RecipeError("--out is for the model of one client, given with --data FILE")
        else:
            onboarding.held_out(folders, wanted, as_json)


@app.command(cls=Command)
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run.")],
    client: Annotated[str | None, typer.Option(metavar="0,3", help="Whose models.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every client's model.")] = False,
    adapter: Annotated[
        int | None,
        typer.Option(metavar="C", help="One adapter alone: of FLoRAL's bank, or a cluster's of FL-TAC."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="By default FOLDER/export/client-0003; of several models their parent.", metavar="FOLDER"
        ),
    ] = None,
    rank: Annotated[
        int,
        typer.Option(
            min=0, metavar="R", show_default=False, help="Truncate to this rank; by default models are exact."
        ),
    ] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what was exported before.")] = False,
    as_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write clients' models as PEFT folders, which load without umbel.

    For runs whose adapters are PEFT's (adapter.peft in the recipe). A client's mixture of adapters becomes one
    LoRA of their ranks together, with the client's head if it has one; in Python

      PeftModel.from_pretrained(base_model, "adapters/client-0003")

    With --rank it is the nearest one of a lower rank, and the table says how far each layer's update is off.

    Example: umbel export runs/languages-floral-seed0 --client 3

    Example: umbel export runs/languages-floral-seed0 --all --out adapters --rank 8
    """
    with told():
        from umbel.cli import exporting

        clients = numbers_of("client", client) if client is not None else None
        exporting.write(exporting.Asked(folder, clients, everyone, adapter, out, rank, replace, quiet), as_json)


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


def _first_line(cls: type) -> str:
    """What the class, or else its module, says of itself in a line, without the names before the colon."""
    own = cls.__doc__ or ""
    if own and not own.startswith(f"{cls.__name__}("):  # that one is made by dataclass
        return own.strip().partition("\n")[0]
    first = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
    _, colon, what = first.partition(": ")
    return what if colon else first
