"""A deployment's folder, and a whole deployment on one machine.

DIR/app/                       the Flower app: the recipe, and two lines of Python
DIR/certificates/              ca.crt for everyone; server.pem and server.key for the SuperLink
DIR/keys/                      a key pair for each node
DIR/nodes/node-1.toml …        each node's settings
DIR/flwr/config.toml           how `flwr` finds the SuperLink; FLWR_HOME
DIR/compose.yaml, README.md    the same in containers, and the commands
DIR/logs/  DIR/run/  DIR/state/    what a trial leaves: logs, the run folder, what nodes keep
DIR/superlink.db                   what the SuperLink knows: keys, messages on their way
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from umbel.errors import DeployError
from umbel.flower.credentials import write_certificates, write_keys
from umbel.flower.leash import kill, process
from umbel.flower.resume import is_deployed, is_unfinished, last_round
from umbel.recipe import Recipe
from umbel.runs import read_history

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}
"""Flower calls nobody, and installs nothing at run time."""
CONNECTION = "deployment"
# What Flower says of a key that it takes, and of one that it knows.
REGISTERED, ALREADY = "registered successfully", "already in use"

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "umbel-run"
version = "1.0.0"
description = "A run of umbel"
license = "Apache-2.0"
dependencies = ["umbel[flower]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "umbel"

[tool.flwr.app.components]
serverapp = "umbel_run.server:app"
clientapp = "umbel_run.client:app"

[tool.flwr.app.config]
method = {label}
rounds = {rounds}
seed = {seed}
out = ""              # the run folder, on the server; one of a run that was stopped is gone on with; "" for none
begin = 1.0           # the share of the clients that have to be there before the first round
quorum = {quorum}          # the share of a round's clients without which the server stays as it was
deadline = 3600.0     # seconds, for a round's uploads
wait-nodes = 300.0    # for clients to be there
wait-answer = 3600.0  # for any other answer
wait-gone = 30.0      # for a node that is offline to come back
"""
SERVER = '''\
"""The server's side of the run."""

from pathlib import Path

from umbel.flower.apps import server_app

app = server_app(Path(__file__).parent)
'''
CLIENT = '''\
"""The node's side of the run, for Flower's own SuperNodes."""

from umbel.flower.apps import client_app

app = client_app()
'''
README = """\
# A deployment of umbel

One machine, to see that it works:

    umbel deploy up {folder}

The parts, each on its own machine (docs/deploy.md says what goes where):

    {environment}
    export FLWR_HOME={folder}/flwr

    # the server
    flower-superlink --ssl-ca-certfile {folder}/certificates/ca.crt \\
        --ssl-certfile {folder}/certificates/server.pem \\
        --ssl-keyfile {folder}/certificates/server.key --enable-supernode-auth --host {host} --port {port} \\
        --database {folder}/superlink.db --disable-runtime-dependency-installation
    flwr supernode register {folder}/keys/node-1.pub {connection}          # for each node, once

    # each node
    umbel deploy node {folder}/nodes/node-1.toml

    # the run
    flwr run {folder}/app {connection} --stream --run-config 'out="{folder}/run"'
"""
COMPOSE = """\
# docker compose up -d superlink
# docker compose run --rm run flwr supernode register /keys/node-1.pub containers        # for each node, once
# docker compose up -d
# docker compose run --rm run
#
# UMBEL_IMAGE is any image with Python, umbel[flower] and PyTorch for its device. What is mounted is all that a
# container sees: a node its own key, its settings and its own state; add its data.
services:
  superlink:
    image: ${{UMBEL_IMAGE:-umbel}}
    restart: unless-stopped
    command: >-
      flower-superlink --ssl-ca-certfile /certificates/ca.crt --ssl-certfile /certificates/server.pem
      --ssl-keyfile /certificates/server.key --enable-supernode-auth --host 0.0.0.0 --port {port}
      --database /state/superlink.db --disable-runtime-dependency-installation
    environment: &quiet
{environment}
    volumes: ["./certificates:/certificates:ro", "superlink:/state"]
    ports: ["{port}:{port}"]
  run:
    image: ${{UMBEL_IMAGE:-umbel}}
    profiles: [run]
    command: ["flwr", "run", "/app", "containers", "--stream", "--run-config", "out='/state/run'"]
    environment:
      <<: *quiet
      FLWR_HOME: /flwr
    volumes: ["./app:/app", "./flwr:/flwr", "./certificates/ca.crt:/certificates/ca.crt:ro"{public}]
{services}
volumes:
  superlink:
{volumes}
"""
SERVICE = """\
  {name}:
    image: ${{UMBEL_IMAGE:-umbel}}
    command: umbel deploy node /node/{name}.toml --superlink superlink:{port}
    environment: *quiet
    restart: unless-stopped
    read_only: true
    tmpfs: [/tmp]
    volumes:
      - ./nodes/{name}.toml:/node/{name}.toml:ro
      - ./certificates/ca.crt:/certificates/ca.crt:ro
      - ./keys/{name}:/keys/{name}:ro
      - {name}:/state/{name}
    depends_on: [superlink]
"""


def init(
    folder: Path,
    recipe: Recipe,
    num_nodes: int,
    host: str = "127.0.0.1",
    port: int = 9300,
    more_hosts: Sequence[str] = (),
) -> None:
    """Writes a deployment's folder.

    Args:
        folder: a new one.
        recipe: what to run; its clients are dealt to the nodes in runs of numbers.
        num_nodes: how many nodes.
        host: where nodes find the SuperLink.
        port: see host.
        more_hosts: other names that the certificate shall hold for.

    Raises:
        DeployError: something is there already, there are more nodes than clients, or a host is none.
    """
    if folder.exists():
        raise DeployError(f"{folder} exists and is left as it is; name another folder, or remove it")
    dealt = deal(recipe.task.load(recipe.schedule.seed).num_clients, num_nodes)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)  # keys, uploads on their way, clients' scores
    except OSError as error:
        raise DeployError(f"{folder} cannot be made: {error.strerror}") from error
    try:
        hosts = list(dict.fromkeys([host, "localhost", "127.0.0.1", "superlink", *more_hosts]))
        write_certificates(aside / "certificates", hosts)
        _write_app(aside / "app", recipe)
        _write_nodes(aside, folder, dealt, host, port)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside)
        raise


def _write_app(folder: Path, recipe: Recipe) -> None:
    """The Flower app: the recipe, and how its parts are called."""
    import tomli_w

    app = folder / "umbel_run"
    app.mkdir(parents=True)
    table = {key: value for key, value in recipe.table().items() if key != "engine"}
    (app / "recipe.toml").write_text(tomli_w.dumps(table), "utf-8")
    (app / "__init__.py").write_text('"""A run of umbel."""\n', "utf-8")
    (app / "server.py").write_text(SERVER, "utf-8")
    (app / "client.py").write_text(CLIENT, "utf-8")
    schedule = recipe.schedule
    told = PYPROJECT.format(
        label=json.dumps(recipe.label),
        rounds=schedule.rounds,
        seed=schedule.seed,
        quorum=float(schedule.faults.quorum),
    )
    (folder / "pyproject.toml").write_text(told, "utf-8")


def _write_nodes(aside: Path, folder: Path, dealt: Sequence[str], host: str, port: int) -> None:
    """Nodes with these clients, the commands, how `flwr` finds the SuperLink; `aside` will be called `folder`."""
    import tomli_w

    (aside / "nodes").mkdir()
    names = [f"node-{number}" for number in range(1, len(dealt) + 1)]
    for name, clients in zip(names, dealt, strict=True):
        write_keys(aside / "keys", name)
        node = {
            "name": name,
            "superlink": f"{host}:{port}",
            "root_certificates": "../certificates/ca.crt",
            "key": f"../keys/{name}",
            "clients": clients,
            "state": f"../state/{name}",
            "threads": 1,  # as many as its machine has cores, on one of its own
        }
        (aside / "nodes" / f"{name}.toml").write_text(tomli_w.dumps(node), "utf-8")
    (aside / "flwr").mkdir()
    certificate = (folder / "certificates" / "ca.crt").absolute()
    connection = {"address": f"{host}:{port}", "root-certificates": str(certificate)}
    inside_network = {"address": f"superlink:{port}", "root-certificates": "/certificates/ca.crt"}
    document = {"superlink": {"default": CONNECTION, CONNECTION: connection, "containers": inside_network}}
    (aside / "flwr" / "config.toml").write_text(tomli_w.dumps(document), "utf-8")
    exported = "\n    ".join(f"export {name}={value}" for name, value in QUIET.items())
    said = README.format(folder=folder, environment=exported, host=host, port=port, connection=CONNECTION)
    (aside / "README.md").write_text(said, "utf-8")
    inside = "\n".join(f'      {name}: "{value}"' for name, value in QUIET.items())
    services = "".join(SERVICE.format(name=name, port=port) for name in names)
    public = "".join(f', "./keys/{name}.pub:/keys/{name}.pub:ro"' for name in names)
    volumes = "\n".join(f"  {name}:" for name in names)
    compose = COMPOSE.format(port=port, environment=inside, services=services, volumes=volumes, public=public)
    (aside / "compose.yaml").write_text(compose, "utf-8")


def deal(num_clients: int, num_nodes: int) -> list[str]:
    """The clients of each node, as NodeSettings has them: runs of numbers of nearly equal length.

    Raises:
        DeployError: there are more nodes than clients.
    """
    if not 1 <= num_nodes <= num_clients:
        raise DeployError(f"{num_nodes} nodes for {num_clients} clients: a node has at least one of them")
    ends = [num_clients * node // num_nodes for node in range(num_nodes + 1)]
    return [f"{first}-{last - 1}" if last - first > 1 else str(first) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class Trial:
    """A deployment on this machine, while it is up: its SuperLink and its nodes, by name."""

    folder: Path
    environment: dict[str, str]
    stack: ExitStack  # which stops all of them
    stock: bool = False  # with Flower's own SuperNodes
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The nodes' names."""
        return sorted(path.stem for path in (self.folder / "nodes").glob("*.toml"))

    @property
    def address(self) -> tuple[str, int]:
        """Where the SuperLink listens."""
        file = self.folder / "nodes" / f"{self.nodes[0]}.toml"
        host, _, port = tomllib.loads(file.read_text("utf-8"))["superlink"].rpartition(":")
        return host, int(port)

    def start(self, name: str) -> None:
        """Starts "superlink" or a node, for the first time or after it has ended.

        Raises:
            DeployError: the SuperLink does not listen.
        """
        (host, port), log = self.address, self.folder / "logs" / f"{name}.log"
        certificates = self.folder.absolute() / "certificates"
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        tls = [word if word.startswith("--") else str(certificates / word) for word in tls]
        node = self.folder / "nodes" / f"{name}.toml"
        if name == "superlink":
            command = [
                tool("flower-superlink"),
                *tls,
                "--enable-supernode-auth",
                "--host",
                host,
                "--port",
                str(port),
            ]
            command += ["--database", str((self.folder / "superlink.db").absolute())]
            command.append("--disable-runtime-dependency-installation")
        elif self.stock:
            command = [*stock_node(node), "--port", str(free_port(host)), *tls]
        else:
            command = [tool("umbel"), "deploy", "node", str(node)]
        self.processes[name] = self.stack.enter_context(process(command, log, self.environment))
        if name == "superlink":
            wait_for(host, port, self.processes[name], log)

    def kill(self, name: str) -> None:
        """Ends a part by kill -9, with no time for last words."""
        kill(self.processes[name])


def up(
    folder: Path,
    told: Callable[[dict[str, Any]], None],
    said: Callable[[str], None],
    stock: bool = False,
    options: Sequence[str] = (),
) -> Path:
    """Runs a deployment on this machine: SuperLink, nodes, the run; what was started is stopped, come what may.

    Args:
        folder: of `init`; its server must be on this machine.
        told: is given each round's figures.
        said: is given what happens, in words.
        stock: with Flower's own SuperNodes in place of umbel's.
        options: of the run, "rounds=5".

    Returns:
        The run folder.

    Raises:
        DeployError: a part does not start, or the run ends before its last round.
    """
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: what was started is stopped in its order
    out = unfinished(folder / "run") or free_name(folder / "run")
    with started(folder, said, stock) as trial:
        said(f"the run in {out} goes on after round {last_round(out)}" if out.exists() else "the run begins")
        lead_run(trial, out, told, options)
    return out


def unfinished(path: Path) -> Path | None:
    """The newest of run, run-2, run-3 if it can be gone on with."""
    found = None
    for number in count(1):
        name = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not name.exists():
            return found
        found = name if is_deployed(name) and is_unfinished(name) else None
    raise AssertionError  # for there are more numbers than folders


def lead_run(trial: Trial, out: Path, told: Callable[[dict[str, Any]], None], options: Sequence[str] = ()) -> None:
    """Has the SuperLink do the run, or what is left of it; its folder is `out`.

    Raises:
        DeployError: it ends before its last round.
    """
    log, shown = trial.folder / "logs" / "run.log", last_round(out)
    begin = log.stat().st_size if log.exists() else 0
    with led(trial, out, options) as run:
        ended = False
        while not ended:
            ended = run.poll() is not None
            for figures in read_history(out):
                if figures["round"] > shown:
                    shown = figures["round"]
                    told(figures)
            time.sleep(0.2)
    # Its exit code says nothing of how the run went.
    if not (out / "run.json").is_file() or is_unfinished(out):
        said = log.read_bytes()[begin:].decode("utf-8", "replace")
        errors = [line for line in said.splitlines() if line.strip()]
        raise DeployError(
            f"the run has ended after round {last_round(out)}, before its last:\n" + "\n".join(errors[-15:])
        )


def led(trial: Trial, out: Path, options: Sequence[str] = ()) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """`flwr run`, which shows what the server says until the run is over."""
    config = " ".join([f"out='{out.absolute()}'", *options])
    command = [tool("flwr"), "run", str(trial.folder / "app"), CONNECTION, "--stream", "--run-config", config]
    return process(command, trial.folder / "logs" / "run.log", trial.environment)


@contextmanager
def started(folder: Path, said: Callable[[str], None], stock: bool = False) -> Iterator[Trial]:
    """A SuperLink and the folder's nodes, until the block ends."""
    # Flower's programs look for each other in PATH.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | QUIET | {"FLWR_HOME": str((folder / "flwr").absolute()), "PATH": programs}
    with ExitStack() as stack:
        trial = Trial(folder, environment, stack, stock)
        if not trial.nodes:
            raise DeployError(f"{folder} has no nodes/*.toml; write them by `umbel deploy init {folder} …`")
        host, port = trial.address
        if taken(host, port):
            raise DeployError(f"something listens on {host}:{port} already; stop it, or init with another --port")
        (folder / "logs").mkdir(exist_ok=True)
        trial.start("superlink")
        said(f"the SuperLink is up at {host}:{port}, with TLS")
        register(trial, [folder / "keys" / f"{name}.pub" for name in trial.nodes])
        for name in trial.nodes:
            trial.start(name)
        said(f"{len(trial.nodes)} nodes are started")
        yield trial


def register(trial: Trial, keys: Sequence[Path]) -> None:
    """Makes the SuperLink know the nodes' public keys, if it does not yet.

    Raises:
        DeployError: it refuses one.
    """
    # All in one process, for each of Flower's commands takes seconds to load.
    code = (
        "import sys\n"
        "from flwr.cli.app import app\n"
        "for key in sys.argv[2:]:\n"
        "    try: app(['supernode', 'register', key, sys.argv[1]], standalone_mode=False)\n"
        "    except Exception as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, CONNECTION, *map(str, keys)]
    done = subprocess.run(command, capture_output=True, text=True, env=trial.environment, check=False)
    known = sum((done.stdout + done.stderr).count(told) for told in (REGISTERED, ALREADY))
    if known < len(keys):
        raise DeployError(f"the SuperLink does not take the nodes' keys:\n{done.stdout}{done.stderr}")


def stock_node(path: Path) -> list[str]:
    """The command of Flower's own SuperNode for a node's file, but for its port and TLS."""
    from umbel.flower.node import node_of

    settings, link = node_of(path)
    config = asdict(settings)
    for name in ("state", "recipe", "data"):  # seen from wherever Flower's processes are
        if config[name] and not (name == "data" and ":" in config[name]):
            config[name] = str(Path(config[name]).absolute())
    told = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in config.items())
    certificate = path.parent.absolute().parent / "certificates" / "ca.crt"
    command = [tool("flower-supernode"), "--root-certificates", str(certificate), "--superlink", link.superlink]
    command += ["--auth-supernode-private-key", str(link.key), "--host", "127.0.0.1", "--node-config", told]
    return command


def wait_for(host: str, port: int, server: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> None:
    """Waits until the server listens.

    Raises:
        DeployError: it has ended, or does not listen in time.
    """
    end = time.monotonic() + seconds
    while not taken(host, port):
        if server.poll() is not None or time.monotonic() > end:
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-10:])
            raise DeployError(f"the SuperLink does not listen on {host}:{port}; {log} ends with\n{tail}")
        time.sleep(0.1)


def taken(host: str, port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def free_port(host: str) -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def free_name(path: Path) -> Path:
    """The path, or with the first number that makes it new: run, run-2, run-3."""
    number, name = 1, path
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}-{number}")
    return name


def tool(name: str) -> str:
    """The program of that name that was installed along with this Python.

    Raises:
        DeployError: it was not.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise DeployError(f"there is no {name}; install Flower by pip install 'umbel[flower]'")
    return found
