"""Flower's two apps: what a SuperLink and a SuperNode run.

# server_app.py                                   # client_app.py
from pathlib import Path                          from umbel.flower.apps import client_app
from umbel.flower.apps import server_app
                                                  app = client_app()
app = server_app(Path(__file__).parent)
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from logging import INFO, StreamHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.errors import RecipeError
from umbel.flower.exchange import LOG, Patience
from umbel.flower.facts import reason_of
from umbel.flower.lead import lead
from umbel.flower.leash import follow
from umbel.flower.post import content_of, kind_of, opened
from umbel.flower.protected import STEPS
from umbel.flower.work import NodeSettings, Site, settings_of
from umbel.recipe import load, read
from umbel.rounds import Progress

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

RECIPE = "recipe.toml"


def server_app(folder: Path) -> "ServerApp":
    """A ServerApp that leads a run of the recipe.toml in the folder.

    Its run config says which of the recipe's methods (`method`), where the run folder goes (`out`), how long to
    wait (`Patience`), the share of the clients that are needed to begin (`begin`) and in a round (`quorum`);
    every setting of the recipe may be named as well. A run that was stopped is gone on with from its folder.
    """
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        follow()
        config = dict(context.run_config)
        run(grid, folder / RECIPE, config)

    return app


def run(grid: "Grid", path: Path, config: dict[str, Any]) -> None:
    """Leads the run that a run config describes.

    Raises:
        UmbelError: it cannot be begun or gone on with; the message is logged too.
    """
    hear()
    out, method = str(config.pop("out", "")), str(config.pop("method", ""))
    names = {
        field.name: "deadline" if field.name == "deadline" else f"wait-{field.name}" for field in fields(Patience)
    }
    waits = {name: float(config.pop(key)) for name, key in names.items() if key in config}
    share = float(config.pop("begin", 1.0))
    if "quorum" in config:
        config["faults.quorum"] = config.pop("quorum")
    table = load(path, [f"{key}={_toml(value)}" for key, value in config.items()])
    recipe = read(table, method or next(iter(table.get("method", {"": None}))))
    try:
        result = lead(grid, recipe, Path(out) if out else None, Patience(**waits), said, share)
    except Exception as error:
        LOG.error("%s", error)
        raise
    LOG.info("done: %s", json.dumps(result.figures))


def said(at: Progress) -> None:
    """Logs a round's figures that matter."""
    told = {"accuracy": ".2f", "worst_decile": ".2f", "loss": ".4f", "train_loss": ".4f", "seconds": ".2f"}
    told |= {"epsilon": ".3g"}
    shown = [f"{name} {format(at.figures[name], form)}" for name, form in told.items() if name in at.figures]
    LOG.info("round %d: %s", at.round, "  ".join(shown))


def hear() -> None:
    """Lets what umbel logs be seen on stderr, once."""
    if not LOG.handlers:
        LOG.addHandler(StreamHandler())
        LOG.setLevel(INFO)


def client_app() -> "ClientApp":
    """A ClientApp for Flower's own SuperNodes; --node-config says what NodeSettings has."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query("hello")
    def hello(message: "Message", context: "Context") -> "Message":
        return answered(site_of(context.node_config), message)

    for step in STEPS:  # of a secure sum
        app.query(step)(hello)

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        return answered(site_of(context.node_config), message)

    @app.evaluate()
    def evaluate(message: "Message", context: "Context") -> "Message":
        return answered(site_of(context.node_config), message)

    return app


def answered(site: Site, message: "Message") -> "Message":
    """The answer to a message; an error that nobody foresaw goes back as one too, and the node stays."""
    from flwr.app import Message

    try:
        facts, parts = opened(message.content, "the server")
        answer = site.answer(kind_of(message.metadata.message_type), facts, parts)
        return Message(content_of(*answer), reply_to=message)
    except Exception as error:
        return refusal(site, message, reason_of(error))


def refusal(site: Site, message: "Message", why: str) -> "Message":
    """The answer to a message that has none."""
    from flwr.app import Error, Message

    return Message(Error(code=0, reason=f"node {site.settings.name!r}: {why}"), reply_to=message)


def site_of(config: Mapping[str, Any]) -> Site:
    """The node's side, kept as long as the process lives."""
    return _site(settings_of(config))


@cache
def _site(settings: NodeSettings) -> Site:
    return Site(settings)


def _toml(value: Any) -> str:
    """A scalar as `load` reads it; what is no number or bool is TOML already, or a plain string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise RecipeError(f"run config: {value!r} is no scalar")
