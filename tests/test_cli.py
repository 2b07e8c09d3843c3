"""The command line: what it teaches, what it refuses, and what it prints where."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from umbel import recipe
from umbel.cli import app
from umbel.cli.options import of_method
from umbel.cli.settings import settings_of
from umbel.cli.watch import Watch
from umbel.cohort import Engine
from umbel.flower.work import NodeSettings
from umbel.folder import read_lines
from umbel.methods import METHODS
from umbel.rounds import Progress
from umbel.schedule import Schedule
from umbel.tasks import TASKS
from umbel.train import LocalTraining

COMMANDS = ["tasks", "methods", "run", "compare", "tune", "resume", "onboard", "export", "report"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default folders are below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """Runs of a comparison are in this process unless `--workers` is given: starting one takes seconds."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def drawn():
    """Reports of this test have their pictures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Every comparison ends with a report, whose pictures take most of its time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("umbel.plots._svg", lambda _draw, _width, _height, salt: f"<svg>{salt}</svg>")


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
    for own in (text, umbel("deploy", "--help").stdout):
        assert "..." not in own.partition("Commands:")[2], "a command's summary is cut off"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    assert f"Example: umbel {command}" in umbel(command, "--help").stdout
    assert umbel(command, "-h").stdout == umbel(command, "--help").stdout
    assert "\\" not in umbel(command, "-h").stdout


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
        (["onboard", "nothing"], "there is no folder nothing"),
        (["onboard", "nothing", "--data", "none.npz"], "none.npz cannot be read"),
        (["onboard", "nothing", "--out", "model.safetensors"], "given with --data"),
        (["onboard", "nothing", "--samples", "1,few"], "--samples=1,few"),
        (["compare", "digits", "synthetic_linear", "--methods", "florla"], "no method 'florla'"),
        (["compare", "digits", "none.toml"], "no recipe file none.toml"),
        (
            ["compare", "digits", "--method", "floral"],
            "there is no option --method here; --methods takes one or several",
        ),
        (["run", "digits", "--method", "floral", "--adapter.rank=4"], r"did you mean --method.adapter.rank\?"),
        (["compare", "digits", "--adapter.rank=4"], r"did you mean --method.LABEL.adapter.rank\?"),
        (["run", "digits", "--method", "floral", "--tsk.variant=both"], r"did you mean --task.variant\?"),
        (
            ["run", "digits", "--method", "floral", "--json", "out.txt"],
            "--json out.txt: a file's name that ends in .json",
        ),
        (
            ["run", "mnist"],
            "mnist is a task, and a recipe is wanted: recipes with it are onboarding, table1/mnist_ls,",
        ),
        (
            ["run", "digits", "--method", "floral", "--privacy.epsilon=50"],
            "privacy: epsilon = 50.0, but level = 'none' protects nobody",
        ),
        (["run", "digits", "--method", "floral", "--out", "/proc/x/y"], "nothing can be written in /proc"),
        (["methods", "florla"], r"did you mean 'floral'\?"),
        (
            ["deploy", "init", "trial", "digits", "--method", "floral", "--faults.drop_out=0.3"],
            "faults. is for the simulator",
        ),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_written(args, says):
    assert re.search(says, error(*args))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [["settings"], *(["methods", own] for own in METHODS), *(["tasks", own] for own in TASKS)],
    ids=" ".join,
)
def test_every_setting_is_listed_with_its_default(command):
    found = umbel(*command).stdout
    assert re.search(r"setting +default +what it is", found)
    for cls in {"settings": [Schedule, Engine, LocalTraining]}.get(command[0]) or [(METHODS | TASKS)[command[1]]]:
        settings = list(settings_of(cls))
        assert {setting.name.partition(".")[0] for setting in settings} == {own.name for own in fields(cls)}
        assert all(re.search(rf"^{re.escape(setting.name)} +", found, re.MULTILINE) for setting in settings)


def test_what_a_setting_is_comes_from_where_it_is_written():
    found = {setting.name: setting for setting in settings_of(METHODS["floral"])}
    assert found["guard"] == (
        "guard",
        "0.01",
        "τ, the share of examples below which an adapter moves less; 0: no guard",
    )
    assert found["router.kind"].said == '"em", "gradient", "oracle"'
    assert found["adapter.rank"].said.startswith(
        "a rank (≥ 1) for every layer, or with ρ in (0, 1) a relative budget"
    )
    assert {s.name: s.default for s in settings_of(METHODS["pfedme"])}["local.lr"] == "0.005"


def test_an_existing_folder_is_refused_and_untouched():
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for command in (["run", "digits", "--method", "floral"], ["compare", "digits"]):
        assert "mine exists and is left as it is" in error(*command, "--out", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]


def test_a_comparison_gives_means_over_seeds_and_a_report(drawn):
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
    args = ["compare", "synthetic_linear", "--methods", "local,floral", "--seeds", "0", "--rounds=2", "-q"]
    for workers in ("1", "2"):
        umbel(*args, "--out", f"by{workers}", "--workers", workers)
    for run in ("local-seed0", "floral-seed0"):
        one, two = (Path(f"by{n}") / run / "checkpoints/000002.safetensors" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_a_stopped_comparison_goes_on():
    args = ["compare", "digits", "--methods", "floral,fedavg", "--seeds", "0", "--rounds=2", "--out", "two"]
    args += ["--clients_per_round=4"]
    umbel(*args, "--workers=1", "-q")
    shutil.rmtree("two/fedavg-seed0")
    before = Path("two/floral-seed0/metrics.jsonl").read_bytes()
    result = umbel("resume", "two", "-q")
    assert len(read_lines(Path("two/fedavg-seed0/metrics.jsonl"))) == 2
    assert Path("two/floral-seed0/metrics.jsonl").read_bytes() == before
    table = result.stdout
    assert table.index("floral") < table.index("fedavg"), "not in the order that was asked for"


def test_a_comparison_of_other_settings_is_not_put_beside_what_is_there():
    args = ["compare", "digits", "--seeds", "0", "--clients_per_round=4", "--out", "two", "--workers=1"]
    umbel(*args, "--methods", "local", "--rounds=2", "-q")
    before = Path("two/compare.toml").read_text()
    told = error(*args, "--methods", "fedavg", "--rounds=1", "-q")
    assert "two/local-seed0 was made with other settings" in told
    assert "rounds" in told
    assert Path("two/compare.toml").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("labels =", "label =", "two/compare.toml has no labels"),
        ("seeds =", "extra = 1\nseeds =", "two/compare.toml: extra: there is no such setting"),
        ("[0]", "0", "two/compare.toml: seeds: expected `array`"),
        ("[table]", "[table]\nmethod = 1", "two/compare.toml: method: a table is wanted"),
        ('recipe = "digits"', "cells = 3", "two/compare.toml: cells: names of folders are wanted, got 3"),
    ],
)
def test_what_is_wrong_in_a_comparisons_file_is_named(old, new, says):
    text = 'recipe = "digits"\nlabels = ["local"]\nseeds = [0]\n[table]\n'
    Path("two").mkdir()
    Path("two/compare.toml").write_text(text.replace(old, new))
    for command in (["resume", "two"], ["compare", "digits", "--methods", "local", "--seeds=0", "--out", "two"]):
        assert says in error(*command)


def test_two_recipes_have_a_folder_each(monkeypatch):
    for folder in ("a", "here/a"):
        Path(folder).mkdir(parents=True)
        Path(folder, "x.toml").write_text(TINY.format(variant="both"))
    monkeypatch.chdir("here")
    told = error("compare", "a/x.toml", "../a/x.toml", "--methods=fedavg", "--out", "one", "-q")
    assert "two of the recipes would have the folder one/a-x" in told


def test_where_a_document_cannot_go_is_said_before_any_work():
    for place, says in (("nodir/x.json", "there is no folder nodir"), ("", "a file's name is wanted")):
        told = umbel("run", "digits", "--method=local", "--rounds=1", f"--json={place}", code=2)
        assert says in told.stderr
    assert not Path("runs").exists()


def test_what_has_to_be_a_table_is_named():
    for line, says in (('method = "floral"', "method: a table is wanted"), ('engine = "cpu"', "engine: a table")):
        Path("x.toml").write_text(f'{line}\n[task]\nname = "digits"\n')
        for command in (["run", "x.toml", "--method", "floral"], ["compare", "x.toml", "--methods", "floral"]):
            assert says in error(*command)


def test_a_share_that_is_nobody_is_refused():
    for share in ("--held_out=0.01", "--attack.kind=sign_flip"):
        told = error("run", "digits", "--method=fedavg", "--rounds=1", share, "--attack.share=0.01", "-q")
        assert "is nobody" in told


def test_a_run_without_its_lines_is_an_error_that_says_so():
    umbel("run", "digits", "--method=local", "--rounds=1", "--out", "one", "-q")
    Path("one/metrics.jsonl").unlink()
    assert "has lost its lines" in error("resume", "one", "-q")


def test_the_same_comparison_again_repeats_nothing_and_adds_what_is_new():
    args = ["compare", "digits", "--rounds=2", "--clients_per_round=4", "--out", "two", "--workers=1"]
    umbel(*args, "--methods", "local", "--seeds", "0", "-q")
    times = {path: path.stat().st_mtime_ns for path in Path("two/local-seed0").rglob("*")}
    again = umbel(*args, "--methods", "local", "--seeds", "0")
    assert again.stderr == "", "something was trained"
    assert "local" in again.stdout
    more = umbel(*args, "--methods", "fedavg,local", "--seeds", "0,1")
    assert [line.partition(":")[0] for line in more.stderr.splitlines()] == [
        "1/4 fedavg seed 0",
        "3/4 fedavg seed 1",
        "4/4 local seed 1",
    ]
    assert {path: path.stat().st_mtime_ns for path in Path("two/local-seed0").rglob("*")} == times
    asked = recipe.load(Path("two/compare.toml"))
    assert (asked["labels"], asked["seeds"]) == (["local", "fedavg"], [0, 1])
    assert umbel("resume", "two", "-q").stderr == ""


def test_a_run_from_before_a_setting_was_there_is_taken_as_made_with_its_default():
    args = ["compare", "digits", "--methods", "local", "--seeds=0", "--rounds=2", "--out", "two", "-q"]
    umbel(*args)
    stored, facts = Path("two/local-seed0/recipe.toml"), Path("two/local-seed0/run.json")
    lines = stored.read_text().splitlines(keepends=True)
    assert "steps = 0\n" in lines
    stored.write_text("".join(line for line in lines if line != "steps = 0\n"))
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"identity": "of another version"}))
    assert umbel(*args).stderr == "", "something was trained"
    stored.write_text("".join("steps = 1\n" if line == "steps = 0\n" else line for line in lines))
    assert "local.steps: 1, now 0" in error(*args)


def test_an_unfinished_run_is_gone_on_with_to_the_same_end():
    args = ["compare", "digits", "--methods", "local", "--seeds=0", "--rounds=4", "--checkpoint_every=2", "-q"]
    umbel(*args, "--out", "whole")
    shutil.copytree("whole", "cut")
    for file in Path("cut/local-seed0/checkpoints").glob("000004*"):
        file.unlink()
    umbel(*args, "--out", "cut")
    last = "local-seed0/checkpoints/000004.safetensors"
    assert Path("cut", last).read_bytes() == Path("whole", last).read_bytes()


def test_a_folder_with_other_settings_is_refused_and_the_setting_named():
    args = ["compare", "digits", "--methods", "local", "--seeds=0", "--out", "two", "-q"]
    umbel(*args, "--rounds=2")
    assert "(rounds: 2, now 3)" in error(*args, "--rounds=3")
    assert umbel(*args, "--rounds=2", "--engine.mode=looped").stderr == "", "where it runs decides nothing"


TINY = """
rounds = 2
clients_per_round = 4
[task]
name = "digits"
variant = "{variant}"
[local]
batch_size = 16
[method.local]
[method.fedavg]
[method.only-{variant}]
like = "fedavg"
[paper]
fedavg = [91.25, 0.5]
local = 80
"""


def two_recipes():
    for variant in ("rotate", "both"):
        Path(f"{variant}.toml").write_text(TINY.format(variant=variant))
    return ["compare", "rotate.toml", "both.toml", "--seeds", "0,1", "--out", "grid", "--workers=1"]


def test_several_recipes_are_a_table_with_a_column_each_and_the_published_figures():
    args = two_recipes()
    table = umbel(*args, "--json", "all.json", "-q").stdout
    head = next(line for line in table.splitlines() if "method" in line)
    assert "rotate, %" in head
    assert "both, %" in head
    fedavg = next(line for line in table.splitlines() if line.startswith(" fedavg"))
    assert fedavg.count("(91.2 ± 0.5)") == 2
    scores, _, costs = table.partition("What a client trains (parameters)")
    assert "fedavg" in scores
    sent, computed = (line for line in costs.splitlines() if line.startswith(" fedavg"))
    assert sent.count("4,810 · 19.2 kB · 19.2 kB · ") == 2
    assert computed.count("FLOP · ") == 2
    assert "(80.0)" in table
    document = json.loads(Path("all.json").read_text())
    assert [cell["recipe"] for cell in document["cells"]] == ["rotate", "both"]
    assert [row["label"] for row in document["cells"][0]["methods"]] == ["local", "fedavg", "only-rotate"]
    row = document["cells"][1]["methods"][1]
    assert row["paper"] == [91.25, 0.5]
    assert len(row["accuracy"]["values"]) == 2
    assert row["parameters"]["mean"] == 4810
    assert row["travels"]["down"] == {"params": row["bytes_down_per_client_round"]["mean"]}
    assert Path("grid/both/report.html").is_file()
    again = umbel(*args)
    assert again.stderr == ""
    assert again.stdout == table
    assert umbel("resume", "grid", "-q").stdout == table
    assert "paper" not in Path("grid/both/fedavg-seed0/recipe.toml").read_text()


def test_several_recipes_run_those_of_the_methods_that_they_have():
    args = two_recipes()
    umbel(*args[:3], "--methods", "only-rotate,local", "--seeds=0", "--out", "some", "--workers=1", "-q")
    assert sorted(path.parent.name for path in Path("some").glob("*/*/run.json")) == [
        "local-seed0",
        "local-seed0",
        "only-rotate-seed0",
    ]
    assert "is a comparison of several recipes" in error("compare", "rotate.toml", "--out", "some")
    shutil.rmtree("some/both/local-seed0")
    assert "both" in umbel("resume", "some", "-q").stdout
    assert Path("some/both/local-seed0/run.json").is_file()


def test_columns_that_do_not_fit_make_a_further_table(monkeypatch):
    from umbel.cli import show

    args = two_recipes()
    monkeypatch.setattr(show, "room", lambda: 58)
    heads = [line for line in umbel(*args, "-q").stdout.splitlines() if "method" in line]
    assert len(heads) == 6  # of scores, of what travels and of what is computed
    assert [head.split()[1].rstrip(",") for head in heads] == ["rotate", "both"] * 3


def test_the_command_that_was_meant_is_named_once():
    assert umbel("comapre", code=2).stderr.count("Did you mean 'compare'?") == 1
    assert umbel("deploy", "upp", code=2).stderr.count("Did you mean 'up'?") == 1


def test_what_is_wrong_in_the_paper_table_is_told():
    for entry, says in (('fedavg = "92"', r"paper\.fedavg: \[mean"), ("fedavgg = 92", "did you mean 'fedavg'")):
        Path("x.toml").write_text(TINY.format(variant="both").replace("fedavg = [91.25, 0.5]", entry))
        assert re.search(says, error("compare", "x.toml"))


def test_costs_are_below_the_scores_and_by_tensor_group_in_the_run_folder():
    text = umbel("compare", "digits", "--methods=fedavg", "--seeds=0", "--rounds=2", "--out", "one", "-q").stdout
    costs = text.partition("What one client costs")[2]
    assert re.search(r"fedavg +4,810 +19\.2 kB +19\.2 kB +8 +627 kFLOP +19\.2 kB", costs)
    facts = json.loads(Path("one/fedavg-seed0/run.json").read_text())
    assert facts["cost"]["up"] == {"params": 19240, "weight": 4, "loss": 4}
    assert facts["cost"]["down"] == {"params": 19240}
    assert not any("up" in line for line in read_lines(Path("one/fedavg-seed0/metrics.jsonl")))


def test_unseen_clients_are_onboarded_and_a_client_of_ones_own_is(drawn):
    import numpy as np

    given = ["compare", "digits", "--methods=ensemble", "--rounds=2", "--held_out=0.2", "--out", "both", "-q"]
    umbel(*given, "--seeds=0,1", "--workers=1")
    result = umbel("onboard", "both", "--samples", "0,2")
    assert "8 unseen clients" in result.stdout
    assert "mean ± deviation over runs" in result.stdout
    document = json.loads(umbel("onboard", "both/ensemble-seed0", "--samples=0,2", "--json").stdout)
    stored = json.loads(Path("both/ensemble-seed0/onboard.json").read_text())
    assert document["runs"] == [{"folder": "both/ensemble-seed0"} | stored]
    text = Path(umbel("report", "both").stdout.strip()).read_text()
    assert "Clients that never trained" in text
    np.savez("mine.npz", x=np.zeros((4, 8, 8), np.float32), y=np.arange(4))
    said = umbel("onboard", "both/ensemble-seed0", "--data", "mine.npz", "--out", "mine.safetensors").stdout
    assert said.startswith("mixture from 4 samples: ")
    kept = Path("mine.safetensors").read_bytes()
    again = umbel("onboard", "both/ensemble-seed0", "--data", "mine.npz", "--out", "mine.safetensors", code=2)
    assert "mine.safetensors exists and is left as it is" in again.stderr
    assert Path("mine.safetensors").read_bytes() == kept
    unscored = umbel("onboard", "both/ensemble-seed0", "--data", "mine.npz", "--samples=0,2", code=2)
    assert "mine.npz has no x_test and y_test" in unscored.stderr
    more = {"x_test": np.ones((6, 8, 8), np.float32), "y_test": np.arange(6)}
    np.savez("scored.npz", x=np.zeros((4, 8, 8), np.float32), y=np.arange(4), **more)
    args = ["onboard", "both/ensemble-seed0", "--data", "scored.npz", "--samples=0,2"]
    table = umbel(*args).stdout
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["0", "2", "4"]
    assert set(json.loads(umbel(*args, "--json").stdout)["ways"]["routes"]) == {"0", "2", "4"}


def test_one_method_that_diverges_does_not_cost_the_others():
    args = ["compare", "digits", "--methods", "fedavg,local", "--seeds=0", "--rounds=2", "--workers=1"]
    result = umbel(*args, "--method.fedavg.local.lr=1e30", "--json", code=2)
    document = json.loads(result.stdout)
    assert [row["label"] for row in document["methods"] if row["runs"][0]["rounds"] == 2] == ["local"]
    assert [(one["label"], one["seed"]) for one in document["failed"]] == [("fedavg", 0)]
    assert "error: fedavg, seed 0: round 1" in result.stderr


SEARCH = (
    *("digits", "--methods", "fedavg,floral", "--rounds=6", "--search.local.lr=[1e-9,0.1,0.2]", "-q"),
    *("--engine.mode=stacked", "--evaluate_every=6"),
)


def test_a_search_tries_every_method_with_every_point_on_training_examples():
    found = json.loads(umbel("tune", *SEARCH, "--seeds", "100,101", "--json").stdout)
    assert [own["search"] for own in found["methods"]] == 2 * [{"local.lr": [1e-9, 0.1, 0.2]}]
    assert found["validation"] == 0.25
    assert [own["label"] for own in found["methods"]] == ["fedavg", "floral"]
    for own in found["methods"]:
        means = [score["mean"] for score in own["scores"]]
        assert all(len(score["values"]) == 2 for score in own["scores"])
        assert own["chosen"] == own["scores"][max(range(3), key=means.__getitem__)]["settings"]
        assert own["at_the_edge"] == (["local.lr"] if own["chosen"] != {"local.lr": 0.1} else [])
    # Nobody is tested on what tests are for: a score is that of a run whose test data are training examples.
    umbel(
        *("run", "digits", "--method", "fedavg", "--rounds=6", "--local.lr=0.1", "--validation=0.25"),
        *("--seed", 100, "--engine.mode=stacked"),
    )
    alone = read_lines(Path("runs/digits-fedavg-seed100/metrics.jsonl"))[-1]["accuracy"]
    assert found["methods"][0]["scores"][1]["values"][0] == alone
    again = umbel("tune", *SEARCH, "--seeds", "100,101")
    assert "on 25 % of each client's training examples, by local.lr" in again.stdout
    best = found["methods"][1]["chosen"]["local.lr"]
    assert f"[method.floral]\nlocal.lr = {best}" in again.stdout
    assert umbel("resume", "runs/tune-digits", "-q").stdout == again.stdout
    told = again.stdout.partition("into the recipe:")[2]
    assert tomllib.loads(told)["method"]["fedavg"] == {"local": {"lr": found["methods"][0]["chosen"]["local.lr"]}}


def test_a_search_of_lists_and_names_is_told_as_a_recipe_has_it():
    args = ("digits", "--methods", "floral", "--rounds=1", "-q", '--search.router.kind=["em","gradient"]')
    layers = '--search.adapter.targets=[["*1.weight"],["?.weight"],["*"],["?.*"],["1.*"]]'
    few = ("--engine.mode=stacked", "--task.num_clients=4", "--search.local.lr=[0.1]")
    shown = umbel("tune", *args, *few, layers, "--json", "found.json").stdout
    found = json.loads(Path("found.json").read_text())["methods"][0]
    assert len(found["scores"]) == 10
    assert len(list(Path("runs/tune-digits").glob("*/run.json"))) == 10  # no two of them in one folder
    written = tomllib.loads(shown.partition("into the recipe:")[2])["method"]["floral"]
    assert written == {
        "router": {"kind": found["chosen"]["router.kind"]},
        "adapter": {"targets": found["chosen"]["adapter.targets"]},
        "local": {"lr": 0.1},  # one value, as a recipe's own grid may be narrowed
    }
    assert "router.kind / local.lr / adapter.targets" in shown  # ten points are rows, not columns


def test_what_diverged_is_not_chosen_for_its_last_finite_score():
    args = (
        "synthetic_linear",
        "--methods",
        "fedavg",
        "--rounds=30",
        "--evaluate_every=5",
        "-q",
        "--seeds",
        "100,101",
    )
    result = umbel("tune", *args, "--search.local.lr=[0.001,30.0]", "--json", "found.json", code=2)
    assert "not every seed's run came to its end" in result.stdout
    (found,) = json.loads(Path("found.json").read_text())["methods"]
    assert found["scores"][1]["mean"] is None
    assert found["chosen"] == {"local.lr": 0.001}


def test_a_search_in_which_nothing_has_a_score_is_told_and_others_are_shown():
    Path("bad.toml").write_text("""
rounds = 10
evaluate_every = 5
[task]
name = "synthetic_linear"
[method.fedavg]
[search]
local.lr = [1e30, 1e31]
""")
    Path("good.toml").write_text(Path("bad.toml").read_text().replace("1e30, 1e31", "0.01, 0.02"))
    shown = umbel("tune", "bad.toml", "good.toml", "-q", "--json", "found.json", code=2).stdout
    assert "no run has a score" in shown
    cells = json.loads(Path("found.json").read_text())["cells"]
    assert [cell["methods"][0]["chosen"] is None for cell in cells] == [True, False]


def test_a_method_has_values_of_its_own_beside_everyones_or_instead():
    own = ('--search.method.floral.router.kind=["em","gradient"]', "--search.method.local.local.lr=[0.1]")
    few = ("--methods=fedavg,floral", "--rounds=1", "--task.num_clients=4", "--engine.mode=stacked", "-q")
    shown = umbel("tune", "digits", *few, own[0], "--search.local.lr=[0.1,0.2]", "--json", "found.json").stdout
    fedavg, floral = json.loads(Path("found.json").read_text())["methods"]
    assert [score["settings"] for score in fedavg["scores"]] == [{"local.lr": 0.1}, {"local.lr": 0.2}]
    assert floral["search"] == {"local.lr": [0.1, 0.2], "router.kind": ["em", "gradient"]}
    assert len(floral["scores"]) == 4
    assert shown.count("training examples, by local.lr\n") == 1
    assert shown.count("training examples, by local.lr / router.kind\n") == 1
    assert shown.count("The best, to be written into the recipe:") == 1
    assert umbel("resume", "runs/tune-digits", "-q").stdout == shown
    few = ("--methods=local", *few[1:])
    assert "one point is no search" in error("tune", "digits", *few, own[1], "--search.local.lr=[0.1,0.2]")
    umbel("tune", "digits", "--methods=local", *few[1:], "--search.method.local.local.lr=[0.1,0.3]")


QUICK = ("--rounds=1", "--task.num_clients=4", "--engine.mode=stacked", "-q")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("--method.router.lr=5", r"lr is read with kind = 'gradient', and kind is 'em'"),
        ("--method.router.kind=gradient --method.router.examples=8", r"examples is read with kind = 'em'"),
        ("--method.server.momentum=0.1", r"momentum is read with kind = 'momentum', and kind is 'sgd'"),
        ("--local.beta1=0.2", r"beta1 is read with optimizer = 'adamw', and optimizer is 'sgd'"),
        ("--method.local.final=0.5", r"final is read with decay = 'cosine'"),
        ("--weighting.eta=9", r"eta is read with rule = 'rea', and rule is 'examples'"),
        ("--method.weighting.a=0.1", r"a is read with rule = 'feddisco'"),
    ],
)
def test_a_setting_that_nothing_reads_is_told(setting, says):
    shown = umbel("run", "digits", "--method", "floral", *setting.split(), *QUICK)
    assert re.search(rf"warning: --\S+ changes nothing: {says}", shown.stderr)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("--method.alone.mode=paper", r"mode is read with scheme = 'weights' or 'validation' or 'predictions'"),
        ("--method.alone.top_k=3", "top_k is read with scheme = .*'uniform' or 'oracle', and scheme is 'none'"),
        ("--method.alone.top=3", "top is read with scheme = 'predictions'"),
        ("--weighting.rule=uniform", "here every client's trust decides how much another counts"),
    ],
)
def test_what_trust_does_not_read_is_told(setting, says):
    shown = umbel("compare", "trust", "--methods", "alone", "--seeds=0", setting, *QUICK)
    assert re.search(rf"warning: --\S+ changes nothing: {says}", shown.stderr)
    heard = umbel(
        "compare",
        "trust",
        "--methods",
        "trust-weights",
        "--seeds=0",
        "--method.alone.top_k=3",
        *QUICK,
        "--out=heard",
    )
    assert "changes nothing" not in heard.stderr


def test_settings_that_are_read_are_told_nothing_about():
    given = ("--method.floral.router.lr=0.2", "--local.momentum=0.5", "--weighting.rule=rea", "--weighting.eta=2")
    both = ("compare", "digits", "--methods", "floral,floral-paper", "--seeds=0", *QUICK)
    assert "changes nothing" not in umbel(*both, *given).stderr  # floral-paper is like floral, by gradients
    alone = umbel("compare", "digits", "--methods", "floral", "--seeds=0", *QUICK, given[0], "--out=alone")
    assert "--method.floral.router.lr changes nothing" in alone.stderr
    search = ("tune", "digits", "--methods", "floral", '--search.router.kind=["em","gradient"]', *QUICK)
    assert "changes nothing" not in umbel(*search, given[0]).stderr  # one of the two routers reads it


def test_only_a_search_takes_what_is_to_be_searched():
    assert "--search.local.lr" in error("run", "digits", "--method", "fedavg", "--search.local.lr=[0.1,1]")
    assert "--search.local.lr" in error("compare", "digits", "--search.local.lr=[0.1,1]")


def test_reading_a_recipe_forms_no_grid():
    table = {"task": {"name": "digits"}, "method": {"local": {}}}
    table["search"] = {f"k{n}": [0, 1] for n in range(60)}
    assert recipe.read(table, "local").label == "local"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "digits has no values to try for local, in a table [search] or [search.method.local]"),
        (("--search.method.floral.guard=[0,1]", "--methods=fedavg"), "no values to try for fedavg"),
        (("--search.method.florall.guard=[0,1]",), "search.method.florall: there is no such method here"),
        (("--search.method.local.local.lr=0.1",), "search.method.local.local.lr: a list of values to try"),
        (("--search.local.lr=0.1",), "search.local.lr: a list of values to try"),
        (("--search.local.lr=[]",), "search.local.lr: a list of values to try"),
        (("--search.local.lr=[0.1]",), "search: one point is no search; give local.lr two values or more"),
        (("--search.local.lr=[0.1,0.1]",), "search.local.lr: a list of values to try, each once"),
        (('--search.like=["fedavg","local"]',), "search.like: methods are compared"),
        (("--search.local.lr=[0.1,1]", "--validation=0"), "validation = 0 would search on test examples"),
        (
            [f"--search.local.{key}={list(range(1, 12))}" for key in ("batch_size", "epochs", "steps")],
            "search: up to local.steps there are 1,331 points",
        ),
        (("--search.local.rl=[0.1,1]",), "search, for local: local.rl: there is no such setting"),
        (("--search.local.lr=[0.1,1]", "--validation=1"), "validation = 1.0, but it must be in [0, 1)"),
    ],
)
def test_a_search_of_nothing_is_refused_before_it_begins(args, says):
    assert says in error("tune", "digits", *args)
    assert not Path("runs").exists()


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


def test_report_prints_its_path(drawn):
    umbel("run", "digits", "--method", "local", "--rounds=1", "--out", "run", "-q")
    assert umbel("report", "run").stdout == "run/report.html\n"
    assert umbel("report", "run", "run", "--out", "mine.html").stdout == "mine.html\n"
    assert Path("mine.html").read_bytes() == Path("run/report.html").read_bytes()


def test_ctrl_c_says_how_to_go_on():
    args = ["run", "digits", "--method", "local", "--rounds=100000", "--out", "long"]
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs ignore it
    program = f"{heard}; from umbel.cli import main; main()"
    command = [sys.executable, "-c", program, *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        while not Path("long/metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.decode().strip().splitlines()[-1] == "stopped; go on with: umbel resume long"


def test_a_node_that_is_stopped_says_where_its_states_are(monkeypatch):
    def serve(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("umbel.flower.node.node_of", lambda *_: (NodeSettings("a", "0", "mine/states"), None))
    monkeypatch.setattr("umbel.flower.node.serve", serve)
    assert umbel("deploy", "node", "a.toml", code=130).stderr == "node stopped; its states are in mine/states\n"


def test_onboarding_that_is_stopped_says_what_is_done(monkeypatch):
    def onboard(path, _):
        if path.name == "local-seed1":
            raise KeyboardInterrupt
        return SimpleNamespace(document=dict)

    umbel("compare", "digits", "--methods=local", "--rounds=1", "--seeds=0,1", "--out", "two", "-q")
    monkeypatch.setattr("umbel.onboarding.onboard", onboard)
    assert umbel("onboard", "two", code=130).stderr == "stopped (done: two/local-seed0)\n"
    assert umbel("onboard", "two/local-seed1", code=130).stderr == "stopped before anything was written\n"


def test_the_progress_of_a_resumed_run_counts_no_round_twice(capsys):
    line = {"bytes_up": 400, "bytes_down": 600, "dropped": [3], "seconds": 1.0}
    with Watch("run", 3, [line | {"round": round} for round in (1, 2, 3)], quiet=False) as watch:
        for round in (2, 3):  # the last checkpoint was that of round 1
            watch(Progress(round, None, None, line | {"round": round}, None, last=round == 3))
    assert capsys.readouterr().err == "run: round 3/3  nobody heard  1.0/s  3.0 kB  3 dropped\n"


def test_workers_end_with_the_command_that_started_them(tmp_path):
    # Killed outright, it cannot tell them to stop.
    umbel = str(Path(sys.executable).with_name("umbel"))
    command = [umbel, "compare", "digits", "--methods", "fedavg", "--seeds", "0,1"]
    command += ["--rounds=100000", "--workers", "2", "--out", str(tmp_path / "runs"), "-q"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "fedavg-seed1" / "metrics.jsonl"
    try:
        for _ in range(600):
            if folder.exists():
                break
            time.sleep(0.1)
        assert folder.exists()
    finally:
        parent.kill()
        parent.wait()
    time.sleep(1.5)
    size = folder.stat().st_size
    time.sleep(1.0)
    assert folder.stat().st_size == size
