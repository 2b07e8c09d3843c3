"""A deployment's folder, and a real one: SuperLink, nodes, TLS and keys on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="flwr is not installed")

from test_flower import without_times
from test_leash import soon
from umbel import tree
from umbel.cli import app
from umbel.cohort import Engine
from umbel.errors import DeployError, RecipeError
from umbel.flower import trial
from umbel.flower.node import node_of
from umbel.flower.work import settings_of
from umbel.recipe import find, load, read
from umbel.runs import run_recipe


def digits(label="floral", *overrides):
    return read(load(find("digits"), ["task.num_clients=6", "rounds=2", *overrides]), label)


@pytest.fixture
def folder(tmp_path):
    trial.init(tmp_path / "trial", digits(), 3, port=trial.free_port("127.0.0.1"))
    return tmp_path / "trial"


def test_the_folder_has_what_each_part_needs_and_nothing_secret_in_the_app(folder):
    from cryptography import x509

    assert read(load(folder / "app" / "umbel_run" / "recipe.toml"), "floral").identity() == digits().identity()
    config = tomllib.loads((folder / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert config["components"] == {"serverapp": "umbel_run.server:app", "clientapp": "umbel_run.client:app"}
    assert config["config"]["rounds"] == 2
    secrets = [*folder.glob("keys/node-?"), folder / "certificates" / "server.key"]
    assert len(secrets) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secrets)
    assert not [path for path in folder.rglob("app/**/*") if path.suffix in (".key", ".pem", ".pub")]
    root, own = (
        x509.load_pem_x509_certificate((folder / "certificates" / name).read_bytes())
        for name in ("ca.crt", "server.pem")
    )
    own.verify_directly_issued_by(root)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert str(names.get_values_for_type(x509.IPAddress)[0]) == "127.0.0.1"
    settings, link = node_of(folder / "nodes" / "node-2.toml")
    assert settings.numbers.tolist() == [2, 3]
    assert link.key is not None
    assert link.key.is_file()
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert set(services) == {"superlink", "run", "node-1", "node-2", "node-3"}
    assert [own for own in services["node-2"]["volumes"] if "keys" in own] == ["./keys/node-2:/keys/node-2:ro"]
    assert all(".pub:" in own for own in services["run"]["volumes"] if "keys" in own)


def test_a_folder_that_is_there_is_left_alone(folder):
    with pytest.raises(DeployError, match="exists and is left as it is"):
        trial.init(folder, digits(), 3)
    with pytest.raises(DeployError, match="7 nodes for 6 clients"):
        trial.init(folder.with_name("more"), digits(), 7)


def test_a_nodes_file_is_checked(tmp_path):
    (tmp_path / "node.toml").write_text('name = "ward"\n')
    with pytest.raises(DeployError, match='has no superlink = "host:port"'):
        node_of(tmp_path / "node.toml")
    (tmp_path / "node.toml").write_text('superlink = "fl:1"\nkey = "keys/ward"\n')
    with pytest.raises(DeployError, match=r"key = 'keys/ward', but there is no file .*keys/ward"):
        node_of(tmp_path / "node.toml")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("root_certificates = 3", DeployError),
        ("key = [1]", DeployError),
        ('insecure = "yes"', DeployError),
        ("data = 3", RecipeError),
        ("state = ['x']", RecipeError),
    ],
)
def test_a_nodes_file_says_what_it_says_in_the_right_type(line, error, tmp_path):
    (tmp_path / "node.toml").write_text(f'superlink = "localhost:1"\n{line}\n')
    with pytest.raises(error, match=rf"{line.partition(' ')[0]} = .*, where (str|bool) is wanted"):
        node_of(tmp_path / "node.toml")


def test_a_tilde_in_a_nodes_file_is_the_home_of_whoever_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("ca.crt", "key"):
        (tmp_path / "home" / name).write_text(name)
    names = {"root_certificates": "ca.crt", "key": "key", "state": "s", "recipe": "r.toml", "data": "d"}
    lines = ['superlink = "fl:1"', *(f'{name} = "~/{value}"' for name, value in names.items())]
    (tmp_path / "node.toml").write_text("\n".join(lines))
    settings, link = node_of(tmp_path / "node.toml")
    assert (link.root_certificates, link.key) == (b"ca.crt", tmp_path / "home" / "key")
    own = [settings.state, settings.recipe, settings.data]
    assert own == [str(tmp_path / "home" / name) for name in ("s", "r.toml", "d")]
    (tmp_path / "node.toml").write_text('superlink = "localhost:1"\nstate = "~nobody-of-that-name/x"')
    with pytest.raises(DeployError, match="nobody-of-that-name"):
        node_of(tmp_path / "node.toml")


def test_a_node_says_nothing_in_the_clear_to_another_machine(tmp_path):
    def node(text):
        (tmp_path / "node.toml").write_text(text)
        return node_of(tmp_path / "node.toml")[1]

    for host in ("fl.example.org", "10.0.0.7", "localhost.example.org"):
        with pytest.raises(DeployError, match=f"names no root_certificates: whoever is on the way to {host}:9300"):
            node(f'superlink = "{host}:9300"')
        assert node(f'superlink = "{host}:9300"\ninsecure = true').root_certificates is None
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert node(f'superlink = "{host}:9300"').root_certificates is None
    (tmp_path / "ca.crt").write_text("a certificate")
    assert node('superlink = "fl.example.org:9300"\nroot_certificates = "ca.crt"').root_certificates


def test_a_host_that_is_none_leaves_nothing_behind(tmp_path):
    for host in ("fl.exämple.org", "a b", "https://fl.example.org", "", "-a", "a" * 64):
        with pytest.raises(DeployError, match="is no host; write a name such as"):
            trial.init(tmp_path / "trial", digits(), 3, host=host)
    assert list(tmp_path.iterdir()) == []
    trial.init(tmp_path / "trial", digits(), 3, host=".".join(["a" * 40] * 4))
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]
    assert (tmp_path / "trial").stat().st_mode & 0o777 == 0o700  # of what it will hold some is others' business


def test_flowers_own_supernodes_are_given_all_settings(folder):
    import tomli_w
    from flwr.common.config import parse_config_args

    path = folder / "nodes" / "node-2.toml"
    own = {"recipe": "agreed.toml", "share_mixture": False, "data": "wards:patients", "most_megabytes": 7}
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | own | {"name": "Gießen, ward 2"}))
    command = trial.stock_node(path)
    told = parse_config_args([command[command.index("--node-config") + 1]])
    assert settings_of(told) == node_of(path)[0]
    assert told["recipe"] == str(folder / "nodes" / "agreed.toml")


def test_up_can_be_terminated_in_a_shells_background_too(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it is there
    try:
        with pytest.raises(DeployError, match="has no nodes"):
            trial.up(tmp_path, print, print)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_key_that_is_not_taken_is_told(folder):
    # In place of Flower's command line, one that says what Flower's says where a key is refused.
    (folder / "flwr" / "cli").mkdir(parents=True)
    refuse = 'def app(*arguments, **more):\n    raise RuntimeError("SuperNode couldn\'t be registered.")\n'
    (folder / "flwr" / "cli" / "app.py").write_text(refuse)
    for package in ("flwr", "flwr/cli"):
        (folder / package / "__init__.py").touch()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    running = trial.Trial(folder, environment | {"PYTHONPATH": str(folder)}, ExitStack())
    with pytest.raises(DeployError, match="does not take the nodes' keys:\nSuperNode couldn't be registered"):
        trial.register(running, [folder / "keys" / "node-1.pub"])


def test_the_command_line_writes_the_folder(tmp_path):
    arguments = [
        "deploy",
        "init",
        str(tmp_path / "a"),
        "digits",
        "--method",
        "trust",
        "--rounds=3",
        "--nodes",
        "2",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"umbel deploy up {tmp_path / 'a'}" in done.stdout
    assert node_of(tmp_path / "a" / "nodes" / "node-1.toml")[0].clients == "0-19"


# The compose file, by the rules of the Compose Specification that it makes use of.

SERVICE = {
    "command": (str, list),
    "depends_on": (list,),
    "environment": (dict,),
    "image": (str,),
    "ports": (list,),
    "profiles": (list,),
    "read_only": (bool,),
    "restart": (str,),
    "tmpfs": (list,),
    "volumes": (list,),
}


def wrong_in(compose: str, folder: Path) -> list[str]:
    """What `docker compose` would not take, or would make out of thin air (a file to mount that is not there)."""
    document = yaml.safe_load(compose)
    wrong = [f"{key}: unknown" for key in document if key not in ("services", "volumes")]
    services, volumes = document["services"], document["volumes"]
    for name, service in services.items():
        wrong += [f"{name}.{key}: unknown" for key in service if key not in SERVICE]
        kinds = {key: kind for key, kind in SERVICE.items() if key in service}
        wrong += [f"{name}.{key}: type" for key, kind in kinds.items() if not isinstance(service[key], kind)]
        wrong += [f"{name}: no image"] * ("image" not in service)
        told = service.get("environment", {})
        wrong += [
            f"{name}.environment.{key}: no string" for key, value in told.items() if not isinstance(value, str)
        ]
        wrong += [f"{name} depends on {other}" for other in service.get("depends_on", ()) if other not in services]
        wrong += [
            f"{name}.ports: {port}" for port in service.get("ports", ()) if not re.fullmatch(r"\d+:\d+", port)
        ]
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if not target.startswith("/") or mode not in ([], ["ro"]):
                wrong.append(f"{name}.volumes: {volume}")
            elif not (folder / source).exists() if source.startswith("./") else source not in volumes:
                wrong.append(f"{name}.volumes: there is no {source}")
    return wrong


def test_the_compose_file_is_one_that_compose_takes(folder):
    compose = (folder / "compose.yaml").read_text()
    assert wrong_in(compose, folder) == []
    for there, instead, told in (
        ("read_only: true", "readonly: true", ["node-1.readonly: unknown"]),
        ("read_only: true", "read_only: 'yes'", ["node-1.read_only: type"]),
        ("depends_on: [superlink]", "depends_on: [server]", ["node-1 depends on server"]),
        ("- ./keys/node-1:", "- ./keys/node-9:", ["node-1.volumes: there is no ./keys/node-9"]),
        ("- node-1:/state", "- node-9:/state", ["node-1.volumes: there is no node-9"]),
        ('"superlink:/state"', '"superlink:state"', ["superlink.volumes: superlink:state"]),
        ("image: ${UMBEL_IMAGE:-umbel}", "profiles: []", ["superlink: no image"]),
    ):
        assert wrong_in(compose.replace(there, instead, 1), folder) == told


def processes_of(folder):
    """The processes of a deployment, whoever has started them."""
    home, found = f"FLWR_HOME={(folder / 'flwr').absolute()}\0".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if home in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_deployment_ends_with_whoever_started_it(folder):
    starter = "import sys, time\nfrom pathlib import Path\nfrom umbel.flower import trial\n"
    starter += "with trial.started(Path(sys.argv[1]), lambda text: print(text, flush=True)) as running:\n"
    starter += "    trial.lead_run(running, Path(sys.argv[1]) / 'run', lambda told: print(told, flush=True))\n"
    with subprocess.Popen(
        [sys.executable, "-c", starter, str(folder)], stdout=subprocess.PIPE, text=True
    ) as begun:
        lines = iter(begun.stdout)
        assert "the SuperLink is up" in next(lines)
        assert "3 nodes are started" in next(lines)
        assert "'round': 1" in next(lines)
        # SuperLink, its two helpers, three nodes and `flwr run`; five of them are on leashes.
        assert len(processes_of(folder)) >= 10
        begun.kill()
    soon(lambda: not processes_of(folder))


@pytest.mark.slow
def test_nodes_over_tls_with_keys_are_as_one_machine(folder):
    stranger = tomllib.loads((folder / "nodes" / "node-1.toml").read_text())
    stranger |= {"name": "stranger", "state": "state/stranger"}
    trial.write_keys(folder / "keys", "stranger")
    said, told = [], []
    with trial.started(folder, said.append) as running:
        written = "".join(f"{name} = {json.dumps(value)}\n" for name, value in stranger.items())
        (folder / "stranger.toml").write_text(written.replace("../", "").replace("keys/node-1", "keys/stranger"))
        command = [trial.tool("umbel"), "deploy", "node", str(folder / "stranger.toml")]
        refused = subprocess.run(command, capture_output=True, text=True, env=running.environment, check=False)
        assert refused.returncode != 0
        assert "Failed to activate" in refused.stdout + refused.stderr
        trial.lead_run(running, folder / "run", told.append)
        assert len(processes_of(folder)) >= 4
    assert not processes_of(folder)
    here = run_recipe(replace(digits(), engine=Engine(mode="looped")))
    np.testing.assert_equal(without_times(told), without_times(json.loads(json.dumps(here.history))))
    tensors = load_file(folder / "run" / "checkpoints" / "000002.safetensors")
    for name, leaf in tree.tensors(here.progress.shared).items():
        assert torch.equal(tensors[f"shared/{name}"], leaf), name


@pytest.mark.slow
@pytest.mark.parametrize(("stock", "rounds"), [(False, 2), (True, 1)], ids=["umbel's nodes", "Flower's nodes"])
def test_masks_over_tls_are_those_of_one_machine(stock, rounds, tmp_path):
    masks, folder = digits("floral", "secure.aggregation=masks", f"rounds={rounds}"), tmp_path / "trial"
    trial.init(folder, masks, 3, port=trial.free_port("127.0.0.1"))
    told = []
    with trial.started(folder, print, stock) as running:
        trial.lead_run(running, folder / "run", told.append)
    here = run_recipe(replace(masks, engine=Engine(mode="looped")))
    assert [line["tested"] for line in told] == [6] * rounds
    assert [line["accuracy"] for line in told] == pytest.approx([line["accuracy"] for line in here.history])
    tensors = load_file(folder / "run" / "checkpoints" / f"00000{rounds}.safetensors")
    for name, leaf in tree.tensors(here.progress.shared).items():
        assert torch.equal(tensors[f"shared/{name}"], leaf), name
    assert len([*folder.rglob("scores.jsonl")]) == 3
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.rglob("secret-*"))


@pytest.mark.slow
def test_a_run_whose_parts_are_killed_is_as_one_that_was_let_be(tmp_path):
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from deployed_chaos import beside

    recipe = digits("floral", "rounds=5")
    victims = [("node-2", 1, 0.0, 0.0), ("superlink", 1, 0.0, 0.0), ("server", 1, 0.0, 0.0)]
    found = beside(recipe, tmp_path / "trial", 3, iter(victims), ("wait-gone=120.0",))
    assert [kill["part"] for kill in found["kills"]] == ["node-2", "superlink", "server"]
    assert (found["rounds"], found["crashes"], found["lost"], found["difference"]) == (5, [], {}, 0.0)
    here = run_recipe(replace(recipe, engine=Engine(mode="looped")))
    tensors = load_file(tmp_path / "trial" / "run" / "checkpoints" / "000005.safetensors")
    for name, leaf in tree.tensors(here.progress.shared).items():
        assert torch.equal(tensors[f"shared/{name}"], leaf), name


def test_what_was_stopped_is_told_from_what_is_over(tmp_path):
    def run(name, rounds, *checkpoints):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        facts = {"absent": [], "schedule": {"rounds": rounds}}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
        for round in checkpoints:
            (tmp_path / name / "checkpoints" / f"{round:06d}.json").touch()

    assert trial.unfinished(tmp_path / "run") is None
    run("run", 3, 2, 3)
    assert trial.unfinished(tmp_path / "run") is None
    run("run-2", 3)
    assert trial.unfinished(tmp_path / "run") == tmp_path / "run-2"
    run("run-3", 3, 1, 2, 3)
    assert trial.unfinished(tmp_path / "run") is None
    run("run-4", 9, 3)
    assert trial.unfinished(tmp_path / "run") == tmp_path / "run-4"
    facts = {"absent": [], "schedule": {"rounds": 9}, "last_round": 3}
    (tmp_path / "run-4" / "run.json").write_text(json.dumps(facts))
    assert trial.unfinished(tmp_path / "run") is None
    (tmp_path / "run-5").mkdir()
    assert trial.unfinished(tmp_path / "run") is None
