"""`umbel deploy`: folders of deployments, trials on one machine, and nodes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.cli.options import Command, Overridable, Quiet, RecipeName, chosen_label, of_method
from umbel.cli.said import say, told

deploy = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train across machines, with Flower as the transport.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Of the deployment.")]


@deploy.command(cls=Overridable)
def init(
    ctx: typer.Context,
    folder: Folder,
    recipe: RecipeName,
    method: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Of the recipe (needed if it has several), or any other, untuned."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="How many nodes share the clients.")] = 3,
    host: Annotated[str, typer.Option(metavar="NAME", help="Where nodes find the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="P", help="See --host.")] = 9300,
) -> None:
    """Write a deployment's folder.

    A Flower app, certificates, keys, nodes' settings, a compose file.

    Every setting of the recipe is an option as well, as in umbel run.

    Example: umbel deploy init trial digits --method floral --nodes 3 --rounds=20

    Example: umbel deploy init wards digits --method floral --nodes 2 --host fl.example.org
    """
    with told():
        from umbel.flower import trial
        from umbel.flower.lead import refuse_simulated
        from umbel.recipe import find, load, read

        path = find(recipe)
        label = chosen_label(method, load(path))
        what = read(load(path, of_method(ctx.args, load(path), label)), label)
        refuse_simulated(what.schedule)
        trial.init(folder, what, nodes, host, port)
        print(f"next:   umbel deploy up {folder}      (or see {folder / 'README.md'})")


@deploy.command(cls=Command)
def up(
    folder: Folder,
    stock: Annotated[
        bool, typer.Option("--flower-nodes", help="Flower's own SuperNodes in place of umbel's: slower.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option("--run-config", metavar="A=B", help="Of the run, such as rounds=5.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a whole deployment on this machine.

    The server, all nodes and the run, with TLS and keys.

    What was started is stopped when the run is over, or by Ctrl-C; up again goes on with a run that was stopped.

    Example: umbel deploy up trial
    """
    with told():
        from umbel.flower import trial

        def shown(figures: dict[str, Any]) -> None:
            if not quiet:
                say(line_of(figures))

        try:
            out = trial.up(folder, shown, lambda text: None if quiet else say(text), stock, option or ())
        except KeyboardInterrupt:
            say(f"stopped, with all that was started; its logs are in {folder / 'logs'}")
            raise typer.Exit(130) from None
        print(f"results: {out}      (umbel report {out})")


@deploy.command(cls=Command)
def node(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The node's settings, such as nodes/node-1.toml.")],
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the server is; by default where the file says.")
    ] = "",
) -> None:
    """Run one node of a deployment.

    It trains its clients whenever the server asks, and stays until it is stopped.

    Example: umbel deploy node trial/nodes/node-1.toml
    """
    with told():
        from umbel.flower.node import node_of, serve

        settings, link = node_of(file, superlink)
    with told(stopped=f"node stopped; its states are in {settings.state}"):
        serve(settings, link)


def line_of(figures: dict[str, Any]) -> str:
    """A round in a line."""
    shown = {"accuracy": ".2f", "worst_decile": ".2f", "loss": ".4f", "train_loss": ".4f", "seconds": ".2f"}
    shown |= {"epsilon": ".3g"}
    said = "  ".join(f"{name} {format(figures[name], form)}" for name, form in shown.items() if name in figures)
    return f"round {figures['round']:>4}  {said}"
