"""Runs in folders: killed anywhere and resumed they end as if never stopped; what is damaged is refused."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

import umbel
from umbel import tree
from umbel.cohort import Engine
from umbel.errors import RunFolderError
from umbel.folder import Checkpoint, RunFolder, check_space, read_lines
from umbel.methods import Trust
from umbel.recipe import find, load, read
from umbel.runs import record, resume, run_recipe
from umbel.schedule import Schedule
from umbel.untrusted import MOST_VALUES


def small(label="floral", **changes):
    recipe = read(load(find("digits")), label)
    schedule = Schedule(rounds=6, evaluate_every=2, checkpoint_every=2, clients_per_round=7)
    return replace(recipe, schedule=schedule, engine=Engine("stacked", chunk=3), **changes)


def outcome(folder):
    """The last checkpoint's bytes, and the metrics without the times."""
    metrics = read_lines(folder / "metrics.jsonl")
    for line in metrics:
        line.pop("seconds")
        line.pop("train_seconds")
    clients = (folder / "clients.jsonl").read_bytes()
    return (folder / "checkpoints/000006.safetensors").read_bytes(), metrics, clients


ROUNDS = (3, 5, 0, 2, 4, 1)  # that are over when a run is killed, sooner or later in the next one


def check_killed(tmp_path, label, kills):
    recipe = small(label)
    begin = time.perf_counter()
    run_recipe(recipe, tmp_path / "whole")
    duration = time.perf_counter() - begin
    draw = random.Random(label)
    fork = multiprocessing.get_context("fork")
    ends = []
    for number in range(kills):
        folder = tmp_path / f"killed{number}"
        metrics = folder / "metrics.jsonl"
        child = fork.Process(target=run_recipe, args=(recipe, folder))
        child.start()
        over = ROUNDS[number % len(ROUNDS)]
        while child.is_alive() and over and not (metrics.exists() and len(read_lines(metrics)) >= over):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, duration / len(ROUNDS)))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        ends.append(child.exitcode)
        if folder.exists():
            resume(folder)
        else:  # killed before there was anything to resume
            run_recipe(recipe, folder)
        assert outcome(folder) == outcome(tmp_path / "whole")
    assert -signal.SIGKILL in ends, "every run was over before it was killed"


def test_a_run_is_one_processs_at_a_time(tmp_path):
    seen = []

    def intrude(at):
        if not at.last:  # what is over can be looked at
            with pytest.raises(RunFolderError, match="another process is at work on the run"):
                resume(tmp_path / "run")
        seen.append(at.round)

    run_recipe(small(), tmp_path / "run", intrude)
    assert seen == [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert resume(tmp_path / "run").progress.round == seen[-1]


@pytest.mark.parametrize("label", ["floral", "local", "ensemble"])
def test_a_run_killed_at_random_moments_and_resumed_ends_bit_identical(tmp_path, label):
    check_killed(tmp_path, label, 4 if label == "floral" else 2)


@pytest.mark.slow
def test_a_run_killed_at_many_moments_ends_bit_identical_each_time(tmp_path):
    check_killed(tmp_path, "floral", 40)


@pytest.mark.parametrize("label", ["fedavg", "floral", "ensemble"])
def test_forty_clients_in_chunks_of_1_7_and_all_come_to_the_same(label):
    recipe = small(label)
    schedule = Schedule(rounds=2, evaluate_every=2)
    found = [
        tree.tensors(
            run_recipe(replace(recipe, schedule=schedule, engine=Engine("stacked", chunk=chunk))).progress.shared
        )
        for chunk in (40, 7, 1)
    ]
    for other in found[1:]:
        for name, leaf in found[0].items():
            # Losses are divided by a small temperature in the first rounds, and their rounding with them.
            torch.testing.assert_close(leaf, other[name], rtol=1e-4, atol=1e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    recipe = small()
    run_recipe(recipe, whole)
    run_recipe(recipe, folder)
    last = folder / "checkpoints/000006.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    result = resume(folder)
    assert any(str(last) in warning for warning in result.warnings)
    assert outcome(folder) == outcome(whole)
    last.write_bytes(content[: len(content) // 2])
    assert any(str(last) in warning for warning in resume(folder).warnings)
    assert outcome(folder) == outcome(whole)


def test_with_no_whole_checkpoint_the_run_is_refused(tmp_path):
    run_recipe(small(), tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"000006\.safetensors is damaged"):
        resume(tmp_path / "run")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run_recipe(small(), tmp_path / "run")
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text(recipe.read_text().replace("num_adapters = 4", "num_adapters = 5"))
    with pytest.raises(RunFolderError, match="another recipe"):
        resume(tmp_path / "run")


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path):
    # As a version of umbel leaves it that kept something else.
    run_recipe(small(), tmp_path / "run")
    old = {"seen": torch.empty(0, dtype=torch.long), "shared/old": torch.zeros(1)}
    RunFolder.opened(tmp_path / "run", small().identity()).save(Checkpoint(6, old))
    with pytest.raises(RunFolderError, match=r"other tensors than this version of umbel keeps \('base"):
        resume(tmp_path / "run")


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="exists"):
        run_recipe(small(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    run_recipe(small(), tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(RunFolderError, match="no run folder"):
        resume(tmp_path / "run")


def test_too_little_room_on_the_disk_is_told_before_any_work(tmp_path):
    with pytest.raises(RunFolderError, match="MB left"):
        check_space(tmp_path / "run", 10**18)
    check_space(tmp_path / "run", 1000)


def _run_with_little_room(recipe, folder, answers):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a checkpoint is larger than that
    try:
        run_recipe(recipe, folder)
    except umbel.UmbelError as error:
        answers.put(str(error))


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_none_half_there(tmp_path):
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_run_with_little_room, args=(small(), tmp_path / "run", answers))
    child.start()
    child.join()
    assert "checkpoint could not be written" in answers.get() or "no room left" in answers.get()
    assert not list((tmp_path / "run/checkpoints").glob("*.safetensors"))


def test_a_run_of_ones_own_task_is_resumed_with_the_task(tmp_path):
    clients = [(torch.randn(12, 3), torch.arange(12) % 2) for _ in range(4)]
    task = umbel.task_of(torch.nn.Linear(3, 2), clients)
    method = umbel.FedAvg(umbel.LocalTraining(lr=0.1))
    umbel.run(task, method, rounds=3, folder=tmp_path / "run")
    assert umbel.resume(tmp_path / "run", task, method).figures["round"] == 3
    with pytest.raises(RunFolderError, match="task, method"):
        umbel.resume(tmp_path / "run")


def test_small_trust_is_written_with_four_digits(tmp_path):
    task = umbel.task_of(torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.arange(4) % 2)] * 2)
    result = umbel.run(task, Trust(scheme="uniform"), 1, folder=tmp_path / "run")
    trust = torch.tensor([[0.99995678, 0.00004321987], [1 / 3, 2 / 3]])
    at = replace(result.progress, shared=replace(result.progress.shared, trust=trust))
    record(RunFolder(tmp_path / "run", ""), at, task, result.schedule)
    assert read_lines(tmp_path / "run/trust.jsonl")[-1]["trust"] == [[1.0, 4.322e-05], [0.3333, 0.6667]]


@pytest.mark.parametrize(("num_clients", "shown"), [(100, True), (101, False)])
def test_whom_a_few_clients_trust_is_written_and_the_scores_of_many(num_clients, shown, tmp_path):
    clients = [(torch.randn(4, 3), torch.arange(4) % 2)] * num_clients
    umbel.run(umbel.task_of(torch.nn.Linear(3, 2), clients), Trust(scheme="uniform"), 1, folder=tmp_path / "run")
    (line,) = read_lines(tmp_path / "run/clients.jsonl")
    assert len(line["loss"]) == num_clients
    assert ("mixture" in line) == shown == (tmp_path / "run/trust.jsonl").exists()


def test_lines_that_are_too_long_to_be_read_stay_where_a_run_is_gone_on_with(tmp_path):
    long = json.dumps({"round": 2, "loss": [0] * (MOST_VALUES + 2)}) + "\n"
    lines = ['{"round": 1, "loss": [0.1]}\n', long, '{"round": 3}\n', '{"round": 12}\n', '{"round": 2, "lo']
    (tmp_path / "clients.jsonl").write_text("".join(lines))
    assert len(read_lines(tmp_path / "clients.jsonl")) == 1
    RunFolder(tmp_path, "").rewind(3)
    assert (tmp_path / "clients.jsonl").read_text() == "".join(lines[:3])


@pytest.mark.parametrize(("mode", "together"), [("auto", True), ("looped", False)])
def test_clients_of_a_resumed_run_are_measured_as_they_were(mode, together, tmp_path, monkeypatch):
    task = umbel.task_of(torch.nn.Linear(3, 2), [(torch.randn(12, 3), torch.arange(12) % 2) for _ in range(4)])
    method, folder = umbel.FLoRAL(2), tmp_path / "run"
    monkeypatch.setattr("umbel.rounds.chunk_size", lambda *_: 1)
    umbel.run(task, method, 2, engine=Engine(mode), folder=folder)
    cohort = umbel.runs.opened(folder, task, method).cohort
    assert cohort.chunk == 1
    assert cohort.together == together


def test_another_model_does_not_go_on_with_the_run(tmp_path):
    clients = [(torch.randn(12, 8), torch.arange(12) % 3) for _ in range(3)]
    umbel.run(umbel.task_of(torch.nn.Linear(8, 3), clients), umbel.FedAvg(), rounds=1, folder=tmp_path / "run")
    with pytest.raises(RunFolderError, match="another recipe"):
        umbel.resume(tmp_path / "run", umbel.task_of(torch.nn.Linear(8, 5), clients), umbel.FedAvg())


def test_lost_metrics_are_told(tmp_path):
    run_recipe(small(), tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    assert any("lost 4 of 6 rounds" in warning for warning in resume(tmp_path / "run").warnings)


def test_a_personal_model_keeps_tied_weights_tied():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(12, 3, generator=draw), torch.arange(12) % 3) for _ in range(3)]
    result = umbel.run(umbel.task_of(Tied(), clients, test=clients), umbel.FLoRAL(2), rounds=5)
    with torch.no_grad():
        answers = [(result.personal_model(k)(x), y) for k, (x, y) in enumerate(clients)]
        losses = [float(torch.nn.functional.cross_entropy(*pair)) for pair in answers]
    torch.testing.assert_close(sum(losses) / 3, result.figures["loss"], rtol=1e-5, atol=1e-6)


def test_the_run_folder_says_where_it_was_made(tmp_path):
    run_recipe(small(), tmp_path / "run")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["chunk"] == 3
    assert {"started", "umbel_commit", "torch", "python", "machine"} <= set(facts)


def test_a_recipe_read_back_from_its_folder_is_the_same(tmp_path):
    recipe = small()
    run_recipe(recipe, tmp_path / "run")
    assert read(load(tmp_path / "run/recipe.toml"), "floral") == recipe
