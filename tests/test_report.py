"""The report: one file that needs nothing else, the same for the same runs, and safe with any label."""

import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from umbel.cli import comparing
from umbel.errors import RunFolderError
from umbel.folder import read_lines, write
from umbel.plots import _glyph
from umbel.recipe import find, load, read
from umbel.report import page, write_report
from umbel.runs import run_recipe
from umbel.tables import (
    Run,
    Spread,
    find_runs,
    grouped,
    num_bytes,
    read_run,
    read_toml,
    seconds,
    spread,
    totals,
    written,
)


def trained(folder, label, *overrides, recipe="digits"):
    run_recipe(read(load(find(recipe), ["rounds=3", "engine.mode=stacked", *overrides]), label), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods × two seeds, as `umbel compare` leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    for label in ("fedavg", "floral"):
        for seed in (0, 1):
            trained(folder / f"{label}-seed{seed}", label, f"seed={seed}")
    return folder


class Tags(HTMLParser):
    """What is opened and closed, and which attributes there are."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.balanced = [], [], True
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag


def test_one_file_that_needs_nothing_else(runs, tmp_path):
    out = write_report([runs], tmp_path / "report.html")
    text = out.read_text()
    assert "fedavg" in text
    assert "floral" in text
    assert "digits/label_shift" in text
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", text)
    tags = Tags(text)
    assert tags.balanced
    assert tags.open == []
    own = {value for key, value in tags.attributes if key == "id"}
    for key, value in tags.attributes:
        if key in ("href", "src"):
            assert value.startswith("data:") or value.removeprefix("#") in own, (key, value[:60])
    assert len(own) == sum(key == "id" for key, _ in tags.attributes), "two elements share an id"
    assert "#010101" not in text, "a stand-in colour is left"


def test_the_same_runs_give_the_same_file(runs, tmp_path):
    first = write_report([runs], tmp_path / "a.html").read_bytes()
    assert write_report([runs], tmp_path / "b.html").read_bytes() == first


def test_seeds_are_one_group_and_their_figures_a_mean_and_a_sample_deviation(runs):
    fedavg, floral = grouped(find_runs([runs]))
    assert [group.label for group in (fedavg, floral)] == ["fedavg", "floral"]
    values = [totals(run)["accuracy"] for run in floral.runs]
    found = spread(floral, "accuracy")
    assert found.values == values
    assert found.mean == pytest.approx(sum(values) / 2)
    assert found.std == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_bytes_are_per_client_and_round(runs):
    run = read_run(runs / "fedavg-seed0")
    line = run.history[-1]
    assert totals(run)["bytes_per_client_round"] == (line["bytes_up"] + line["bytes_down"]) / 40


def test_bytes_per_client_count_those_that_take_part(tmp_path):
    some = read_run(trained(tmp_path / "some", "fedavg", "clients_per_round=10"))
    everyone = read_run(trained(tmp_path / "all", "fedavg"))
    key = "bytes_per_client_round"
    assert totals(some)[key] == totals(everyone)[key]


def test_the_same_label_with_other_settings_is_another_method(runs, tmp_path):
    other = trained(tmp_path / "other", "floral", "method.floral.num_adapters=2")
    labels = [group.label for group in grouped(find_runs([runs / "floral-seed0", other]))]
    assert labels == ["floral (num_adapters=4)", "floral (num_adapters=2)"]


def test_settings_that_were_not_there_yet_are_at_their_defaults(runs, tmp_path):
    for seed in (0, 7):
        shutil.copytree(runs / "floral-seed0", tmp_path / f"floral-seed{seed}")
    old = tmp_path / "floral-seed7" / "recipe.toml"
    recipe = read_toml(old)
    del recipe["robust"], recipe["method"]["floral"]["guard"]
    old.write_text(tomli_w.dumps(recipe | {"seed": 7}))
    (group,) = comparing.groups_of(tmp_path, comparing.Asked("digits", ["floral"], [0, 7], {}))
    assert [run.seed for run in group.runs] == [0, 7]


def test_where_a_run_was_computed_makes_no_other_method(runs, tmp_path):
    looped = trained(tmp_path / "looped", "floral", "engine.mode=looped", "seed=7")
    assert len(grouped(find_runs([runs / "floral-seed0", looped]))) == 1


def test_the_same_folder_twice_is_one_run(runs):
    assert len(find_runs([runs, runs / "fedavg-seed0", runs])) == 4


def test_what_comes_from_files_is_escaped(runs, tmp_path):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    evil = '<script>alert("$x^2$")</script>&'
    recipe = (folder / "recipe.toml").read_text()
    write(folder / "recipe.toml", recipe.replace("[method.floral", f"[method.{json.dumps(evil)}").encode())
    facts = json.loads((folder / "run.json").read_text())
    write(folder / "run.json", json.dumps(facts | {"task": evil, "machine": evil, "torch": evil}).encode())
    rounds = [line | {"lost": {evil: 1}} for line in read_lines(folder / "metrics.jsonl")]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in rounds).encode())
    text = page(grouped(find_runs([folder])))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 5
    assert f"did not count: 3 {escape(evil)}." in text
    assert Tags(text).balanced


@pytest.mark.parametrize("key", ["dead", "nmi", "lost", "dropped", "usage"])
def test_a_figure_that_is_no_number_is_refused(runs, tmp_path, key):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    *others, last = read_lines(folder / "metrics.jsonl")
    for evil in ("<script>", {"a": "<script>"}, ["<script>"]):
        lines = "".join(json.dumps(line) + "\n" for line in [*others, last | {key: evil}])
        write(folder / "metrics.jsonl", lines.encode())
        with pytest.raises(RunFolderError, match=rf"metrics.jsonl, round 3: {key} = .* is no figure of a round"):
            write_report([folder], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mixture", "<script>", "mixture holds something else"),
        ("mixture", [[0.5, 0.5], [1.0]], "mixture holds something else"),
        ("accuracy", ["<script>"], "accuracy holds something else"),
        ("group", [0.5] * 40, "group holds something else"),
        ("loss", [1.0], "it is of (1 and 40|40 and 1) clients"),
    ],
)
def test_a_clients_figure_that_is_no_number_is_refused(runs, tmp_path, key, value, says):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    line = read_lines(folder / "clients.jsonl")[-1]
    write(folder / "clients.jsonl", (json.dumps(line | {key: value}) + "\n").encode())
    with pytest.raises(RunFolderError, match=f"clients.jsonl, round 3: {says}"):
        write_report([folder], tmp_path / "report.html")


def test_a_regression_is_drawn_by_its_loss(tmp_path):
    folder = trained(tmp_path / "linear", "local", "rounds=5", recipe="synthetic_linear")
    text = page(grouped(find_runs([folder])))
    assert "Loss over rounds" in text
    assert "accuracy" not in text.lower().replace("accuracy, mean", "")
    assert "$\\math" not in text, "TeX is left in a tick's label"


def test_losses_that_are_no_numbers_leave_gaps(runs, tmp_path):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"accuracy": float("nan"), "loss": float("inf"), "dropped": [3, 4]}
    write(
        folder / "metrics.jsonl", "\n".join([lines[0], json.dumps(broken), lines[2], '{"round": 4, "lo']).encode()
    )
    text = page(grouped(find_runs([folder])))
    assert re.search(r"did not count: 2 (were )?not finite", text)


def test_an_unfinished_run_is_said_to_be_one(runs, tmp_path):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    write(folder / "metrics.jsonl", (first + "\n").encode())
    assert "(1 of 3 rounds)" in page(grouped(find_runs([folder])))


def test_an_oracle_is_a_bound_and_never_the_best(runs, tmp_path):
    oracle = trained(tmp_path / "oracle", "floral-oracle")
    text = page(grouped(find_runs([runs, oracle])))
    row = re.search(r"floral-oracle <small>reference</small>.*?</tr>", text).group()
    assert "class=best" not in row
    assert "class=best" in text


def test_trusts_oracle_is_one():
    table = {
        "method": {"own": {"name": "trust", "scheme": "oracle"}, "other": {"name": "trust", "scheme": "weights"}}
    }
    runs = [Run(Path(), label, 0, 1, table, {}, [], []) for label in ("own", "other")]
    assert [run.oracle for run in runs] == [True, False]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder and holds none"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="there is no folder"):
        write_report([tmp_path / "none"], tmp_path / "report.html")


def test_a_run_without_a_round_is_told(runs, tmp_path):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(RunFolderError, match="nothing to report yet"):
        write_report([folder], tmp_path / "report.html")


def test_accuracies_and_losses_are_not_reported_together(runs, tmp_path):
    folder = shutil.copytree(runs / "floral-seed0", tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("accuracy", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunFolderError, match=r"floral-seed0 has accuracies and .*run has losses only"):
        write_report([runs / "floral-seed0", folder], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("mean", "std", "unit", "text"),
    [
        (92.55, 0.449, "%", "92.5 ± 0.4"),
        (0.95, 0.0825, "share", "0.95 ± 0.08"),
        (0.0129, 0.0053, "seconds", "12.9 ± 5.3 ms"),
        (2.5, 0.02, "seconds", "2.5 ± 0.0 s"),
        (66_700.0, 0.0, "bytes", "66.7 kB"),
        (1.35e-5, 2.31e-5, "", "1.35e-05 ± 2.31e-05"),
        (1.953, 1.266, "", "1.953 ± 1.266"),
        (0.0, 0.0, "", "0.000 ± 0.000"),
        (float("nan"), float("nan"), "", "nan ± nan"),
    ],
)
def test_figures_have_as_many_digits_as_a_reader_wants(mean, std, unit, text):
    assert written(Spread(mean, std, []), unit) == text


def test_sizes_and_times():
    assert [num_bytes(value) for value in (8, 999, 1000, 33_376, 400e6, 2.5e15)] == [
        "8 B",
        "999 B",
        "1.0 kB",
        "33.4 kB",
        "400 MB",
        "2.5 PB",
    ]
    assert [seconds(value) for value in (0.0121, 3.42, 320, 7500)] == [
        "12.1 ms",
        "3.4 s",
        "5 min 20 s",
        "2 h 5 min",
    ]


def test_adapters_are_shown_where_the_server_saw_them(tmp_path):
    few = ["method.fl_tac.num_clusters=2", "clients_per_round=20", "evaluate_every=3"]
    run = trained(tmp_path / "run", "fl_tac", *few)
    text = write_report([run], tmp_path / "report.html").read_text()
    assert "Adapters as the server saw them" in text
    marks = read_run(run).places
    assert [mark["round"] for mark in marks] == [1, 2, 3], "evaluated or not"
    assert all(len(mark["places"]) == len(mark["group"]) == 40 for mark in marks)
    assert marks[0]["cluster"].count(-1) == 20
    assert len({tuple(place) for place in marks[-1]["places"]}) > 20
    panels = text.partition("Adapters as the server saw them")[2].partition("</section>")[0]
    assert all(f"round {round}</text>" in panels for round in (1, 2, 3))
    assert Tags(text).balanced


def test_a_letter_as_a_marker_is_that_letter_around_its_middle():
    for letter, outlines in {"A": 2, "B": 3, "C": 1}.items():  # a dollar sign would add to them
        glyph = _glyph(letter)
        assert list(glyph.codes).count(glyph.MOVETO) == outlines
        assert np.allclose(glyph.get_extents().get_points().mean(0), 0)
