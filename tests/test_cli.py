"""The command line: what it teaches, what it refuses, and what it prints where."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel import recipe
from umbel.cli import app, of_method
from umbel.folder import read_lines

COMMANDS = ["tasks", "methods", "run", "compare", "resume", "report"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default folders are below the working directory."""
    monkeypatch.chdir(tmp_path)


def umbel(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def error(*args):
    """The one line that the command ends with."""
    result = umbel(*args, code=2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_help_says_what_there_is_without_loading_anything_heavy():
    heavy = "import sys, umbel.cli; print({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "set()"
    text = umbel("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "..." not in text.partition("Commands:")[2], "a command's summary is cut off"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    assert f"Example: umbel {command}" in umbel(command, "--help").stdout
    assert umbel(command, "-h").stdout == umbel(command, "--help").stdout


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", umbel("--version").stdout)


def test_tasks_and_methods_are_listed_with_a_line_each():
    text = umbel("tasks").stdout
    assert "digits" in text
    assert "1,797 real handwritten digits" in text
    assert "local, fedavg, ensemble, floral" in text
    assert "a shared base, C federated adapters" in umbel("methods").stdout


def test_a_run_leaves_a_folder_and_a_table():
    result = umbel("run", "digits", "--method", "floral", "--rounds=2")
    folder = Path("runs/digits-floral-seed0")
    assert len(read_lines(folder / "metrics.jsonl")) == 2
    assert "accuracy" in result.stdout
    assert f"umbel report {folder}" in result.stdout
    assert "round 2/2" in result.stderr


def test_json_is_one_document_on_stdout():
    result = umbel("run", "digits", "--method=fedavg", "--seed", "3", "--rounds", "2", "--out", "here", "--json")
    document = json.loads(result.stdout)
    assert document["figures"] == read_lines(Path("here/metrics.jsonl"))[-1]
    assert (document["folder"], document["label"], document["seed"], document["rounds"]) == (
        "here",
        "fedavg",
        3,
        2,
    )
    lines = read_lines(Path("here/metrics.jsonl"))
    assert document["totals"]["bytes_up"] == sum(line["bytes_up"] for line in lines)
    assert "round 2/2" in result.stderr


def test_quiet_shows_the_result_only():
    result = umbel("run", "digits", "--method", "local", "--rounds=1", "-q")
    assert result.stderr == ""
    assert "accuracy" in result.stdout


def test_a_run_folders_recipe_runs_again_to_the_same_result():
    umbel("run", "digits", "--method", "floral", "--rounds=2", "--task.variant", "rotate", "--out", "first", "-q")
    umbel("run", "first/recipe.toml", "-q")
    shared = "checkpoints/000002.safetensors"
    assert Path("runs/first-floral-seed0", shared).read_bytes() == Path("first", shared).read_bytes()


def test_settings_of_the_chosen_method_need_no_label():
    umbel(
        "run", "digits", "--method", "floral-oracle", "--rounds=1", "--method.local.lr=0.05", "--out", "run", "-q"
    )
    table = recipe.load(Path("run/recipe.toml"))["method"]["floral-oracle"]
    assert table["local"]["lr"] == 0.05
    assert table["router"]["kind"] == "oracle"


def test_a_method_keeps_the_settings_that_it_takes_over_from_another():
    table = recipe.load(recipe.find("digits"))
    given = ["method.floral.num_adapters=8", "method.router.lr=1", "rounds=2", "method.floral-oracle.guard=0"]
    assert of_method(given, table, "floral-oracle") == [
        "method.floral.num_adapters=8",
        "method.floral-oracle.router.lr=1",
        "rounds=2",
        "method.floral-oracle.guard=0",
    ]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "digits", "--method", "floral", "--task.varint=rotate"], "task.varint.*did you mean 'variant'"),
        (["run", "digits", "--method", "floral", "--task.variant=tilt"], r"task\.variant"),
        (["run", "digits", "--method", "floral", "--rounds=many"], "rounds: expected `int`"),
        (["run", "digits", "--method", "floral", "--rounds=0"], "rounds.*at least 1"),
        (["run", "digits", "--method", "floral", "--rounds"], "--rounds needs a value"),
        (["run", "digits", "--method", "floral", "--roundz=3"], r"no option --roundz; did you mean --rounds\?"),
        (["run", "--quite", "digits", "--method", "floral"], r"no option --quite; did you mean --quiet\?"),
        (["run", "digits", "--method", "floral", "--task=digits"], "--task is a table"),
        (["run", "digits", "--method", "florla"], "no method 'florla'; did you mean 'floral'"),
        (["run", "digits", "--method", "floral", "--method.rooter.lr=1"], "did you mean 'router'"),
        (["run", "digits", "--method", "floral", "--method.fedavg.local.lr=1"], r"method\.floral\.fedavg"),
        (["run", "digits"], "which method.*floral"),
        (["run", "digitz", "--method", "floral"], "no recipe 'digitz'; did you mean 'digits'"),
        (["run", "none.toml", "--method", "floral"], "no recipe file none.toml"),
        (["compare", "digits", "--seeds", "0,x"], "--seeds=0,x"),
        (["compare", "digits", "--seed=1"], "use --seeds"),
        (
            ["compare", "digits", "--methods", "fedavg", "--method.floral.num_adapters=2"],
            "'floral' is none of the",
        ),
        (["compare", "digits", "--methods", "fedavg,florla"], "no method 'florla'"),
        (["compare", "digits", "--method.floral.num_adaptors=2"], "did you mean 'num_adapters'"),
        (["resume", "nothing"], "nothing is no run folder"),
        (["report", "nothing"], "there is no folder nothing"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_written(args, says):
    assert re.search(says, error(*args))
    assert list(Path().iterdir()) == []


def test_an_existing_folder_is_refused_and_untouched():
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for command in (["run", "digits", "--method", "floral"], ["compare", "digits"]):
        assert "mine exists and is left as it is" in error(*command, "--out", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]


def test_a_comparison_gives_means_over_seeds_and_a_report():
    args = ["compare", "digits", "--methods", "fedavg,floral", "--seeds", "0,1", "--rounds=2"]
    # One worker: what several say goes to the process's own stderr, past this test.
    result = umbel(*args, "--method.floral.num_adapters=2", "--json", "--out", "both", "--workers=1")
    document = json.loads(result.stdout)
    assert [row["label"] for row in document["methods"]] == ["fedavg", "floral"]
    assert document["failed"] == []
    for row in document["methods"]:
        values = [run["figures"]["accuracy"] for run in row["runs"]]
        assert row["accuracy"]["values"] == values
        assert row["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["accuracy"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert recipe.load(Path("both/floral-seed1/recipe.toml"))["method"]["floral"]["num_adapters"] == 2
    text = Path(document["report"]).read_text()
    assert "fedavg" in text
    assert "floral" in text
    assert not re.search(r"https?://", text)
    assert "4/4 floral seed 1" in result.stderr


def test_the_number_of_workers_changes_nothing():
    args = ["compare", "digits", "--methods", "local,floral", "--seeds", "0", "--rounds=2", "-q"]
    for workers in ("1", "2"):
        umbel(*args, "--out", f"by{workers}", "--workers", workers)
    for run in ("local-seed0", "floral-seed0"):
        one, two = (Path(f"by{n}") / run / "checkpoints/000002.safetensors" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_a_stopped_comparison_goes_on():
    umbel("compare", "digits", "--methods", "floral,fedavg", "--seeds", "0", "--rounds=2", "--out", "two", "-q")
    shutil.rmtree("two/fedavg-seed0")
    before = Path("two/floral-seed0/metrics.jsonl").read_bytes()
    result = umbel("resume", "two", "-q")
    assert len(read_lines(Path("two/fedavg-seed0/metrics.jsonl"))) == 2
    assert Path("two/floral-seed0/metrics.jsonl").read_bytes() == before
    table = result.stdout
    assert table.index("floral") < table.index("fedavg"), "not in the order that was asked for"


def test_one_method_that_diverges_does_not_cost_the_others():
    args = ["compare", "digits", "--methods", "fedavg,local", "--seeds=0", "--rounds=2"]
    result = umbel(*args, "--method.fedavg.local.lr=1e30", "--json", code=2)
    document = json.loads(result.stdout)
    assert [row["label"] for row in document["methods"] if row["runs"][0]["rounds"] == 2] == ["local"]
    assert [(one["label"], one["seed"]) for one in document["failed"]] == [("fedavg", 0)]
    assert "error: fedavg, seed 0: round 1" in result.stderr


def test_a_finished_run_is_resumed_to_itself():
    first = json.loads(umbel("run", "digits", "--method", "local", "--rounds=2", "--out", "run", "--json").stdout)
    again = json.loads(umbel("resume", "run", "--json").stdout)
    assert again == first


def test_a_damaged_checkpoint_is_told():
    args = ["run", "digits", "--method", "local", "--rounds=2", "--checkpoint_every=1", "--out", "run", "-q"]
    umbel(*args)
    newest = Path("run/checkpoints/000002.safetensors")
    newest.write_bytes(newest.read_bytes()[:-8])
    assert "warning: " in umbel("resume", "run", "-q").stderr


def test_report_prints_its_path():
    umbel("run", "digits", "--method", "local", "--rounds=1", "--out", "run", "-q")
    assert umbel("report", "run").stdout == "run/report.html\n"
    assert umbel("report", "run", "run", "--out", "mine.html").stdout == "mine.html\n"
    assert Path("mine.html").read_bytes() == Path("run/report.html").read_bytes()


def test_ctrl_c_says_how_to_go_on():
    args = ["run", "digits", "--method", "local", "--rounds=100000", "--out", "long"]
    program = "from umbel.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, *args], stderr=subprocess.PIPE)
    while not Path("long/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.decode().strip().splitlines()[-1] == "stopped; go on with: umbel resume long"
