"""What a method costs: FLOPs against a count by hand and PyTorch's own counter, bytes by tensor group, steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import umbel
import umbel.rounds
import umbel.runs
import umbel.tree
from simulate import StoppedError, stop_after
from umbel import costs
from umbel.cohort import Engine, memory_gb_of
from umbel.costs import cost_of, trains
from umbel.flops import CountedFlops
from umbel.hazards import Faults
from umbel.methods import Ditto, FedDPA, FedIT, FedRep, PFedMe, Trust
from umbel.recipe import find, load, read
from umbel.rounds import held_out, participants, rounds, start
from umbel.schedule import Schedule
from umbel.tables import read_run, totals
from umbel.train import counted_training

LOCAL = umbel.LocalTraining(lr=0.1, batch_size=4, epochs=2)
STEPS = umbel.LocalTraining(lr=0.1, batch_size=4, steps=7)
ADAPTER = umbel.AdapterPlan(rank=1)
SIZES = (3, 4, 9, 17, 30)


def task(model=None, sizes=SIZES):
    clients = [(torch.randn(n, 6), torch.arange(n) % 3) for n in sizes]
    model = model or torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    return umbel.task_of(model, clients, test=[(x[:2], y[:2]) for x, y in clients])


def begun(method, own=None, mode="stacked", **schedule):
    own = own or task()
    plan = Schedule(**{"rounds": 2, **schedule})
    return *start(own, method, plan, Engine(mode)), own, plan


def test_the_flops_of_an_mlp_are_those_counted_by_hand():
    cohort, at, *_ = begun(umbel.FedAvg(LOCAL))
    forward = 2 * (6 * 16 + 16 * 3)  # of one example: a multiplication and an addition for each weight
    backward = 2 * 6 * 16 + 2 * (2 * 16 * 3)  # weights of both layers; of the inputs only the second layer's
    cost = cost_of(cohort, at.shared, at.store, np.array([2]))
    assert cost.of(np.array(SIZES))["flops"] == LOCAL.epochs * sum(SIZES) * (forward + backward)
    assert cost.of(np.array(SIZES))["steps"] == LOCAL.epochs * sum(-(-n // 4) for n in SIZES)


METHODS = [
    umbel.FedAvg(LOCAL),
    umbel.FedAvg(replace(LOCAL, batch_size=1)),
    umbel.FedAvg(replace(LOCAL, batch_size=500)),
    umbel.FLoRAL(3, local=LOCAL),
    umbel.FLoRAL(3, local=LOCAL, router=umbel.Router(kind="gradient"), precondition=True),
    umbel.Ensemble(3, local=LOCAL),
    Ditto(LOCAL),
    FedRep(LOCAL),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_few_batches_tell_what_a_round_of_any_client_takes(method):
    cohort, at, own, _ = begun(method)
    cost = cost_of(cohort, at.shared, at.store, np.array([1]))
    for client in range(len(SIZES)):
        with counted_training() as done, FlopCounterMode(display=False) as flops:
            cohort.update(at.shared, at.store, np.array([client]), 1)
        found = cost.of(own.train.count[[client]])
        assert found["steps"] == done.steps
        assert found["flops"] == pytest.approx(flops.get_total_flops())


MODEL = 6 * 16 + 16 + 16 * 3 + 3  # the parameters of the task's model
ADAPTER_SIZE = (6 + 16) + 16 + (16 + 3) + 3  # of rank 1: A, B and an update of the bias, by layer


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (umbel.FedAvg(LOCAL), MODEL),
        (umbel.FedAvg(STEPS), MODEL),
        (umbel.FLoRAL(3, ADAPTER, local=LOCAL), MODEL + 3 * ADAPTER_SIZE),
        (umbel.FLoRAL(3, ADAPTER, umbel.Router(kind="gradient"), LOCAL), MODEL + 3 * ADAPTER_SIZE + 3),
        (umbel.Ensemble(3, local=LOCAL), 3 * MODEL),
        (Ditto(LOCAL), 2 * MODEL),
        (FedRep(LOCAL), MODEL),
        (PFedMe(LOCAL), MODEL),
        (FedIT(ADAPTER, LOCAL, freeze_base=True), ADAPTER_SIZE),
        (Trust(ADAPTER, LOCAL, scheme="uniform", freeze_base=True), ADAPTER_SIZE),
        (FedDPA(ADAPTER, gate="constant", local=LOCAL), 2 * ADAPTER_SIZE),  # both, from the second round on
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_numbers_that_a_client_trains_are_counted(method, parameters):
    cohort, at, *_ = begun(method)
    assert cost_of(cohort, at.shared, at.store, np.array([1])).parameters == parameters


@pytest.mark.parametrize("examples", [0, 16, 64])
@pytest.mark.parametrize("local", [replace(LOCAL, steps=5, batch_size=32), LOCAL], ids=["steps", "epochs"])
def test_losses_are_measured_on_no_more_examples_than_there_are(local, examples):
    method = umbel.FLoRAL(4, umbel.AdapterPlan(1), umbel.Router(examples=examples), local)
    sizes = (5, 10, 40, 64, 150)
    cohort, at, own, _ = begun(method, task(sizes=sizes))
    for known in (0, 2, 4):  # whoever is counted tells all others
        cost = cost_of(cohort, at.shared, at.store, np.array([known]))
        for client in range(len(sizes)):
            with FlopCounterMode(display=False) as flops:
                cohort.update(at.shared, at.store, np.array([client]), 1)
            assert cost.of(own.train.count[[client]])["flops"] == pytest.approx(flops.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "method",
    [
        umbel.FedAvg(STEPS),
        umbel.FLoRAL(3, local=STEPS),
        Ditto(STEPS),
        FedRep(STEPS, head_epochs=2),
        PFedMe(STEPS, inner_steps=3),
        Trust(ADAPTER, STEPS, scheme="uniform"),
        Trust(ADAPTER, LOCAL, scheme="uniform"),
        Trust(ADAPTER, STEPS, begin=1),
        Trust(ADAPTER, LOCAL, begin=1),
        FedDPA(ADAPTER, gate="constant", local=STEPS),
        FedDPA(ADAPTER, gate="constant", local=LOCAL),
        FedDPA(ADAPTER, variant="F", gate="constant", local=STEPS),
    ],
    ids=lambda method: f"{type(method).__name__}-{method.local.steps}",
)
def test_what_is_told_of_fixed_steps_and_of_clients_that_come_again_is_what_is_done(method):
    cohort, at, own, _ = begun(method, task(sizes=(17, 30, 60)), "looped")
    for came_before in (False, True):
        cost = cost_of(cohort, at.shared, at.store, np.array([1]))
        for client in range(3):
            counts, who = own.train.count[[client]], np.array([client])
            with counted_training() as done, FlopCounterMode(display=False) as flops:
                _, kept = cohort.update(at.shared, at.store, who, 1)
            at.store.put(who, kept)
            found = cost.of(counts, trains(method, counts), None, np.array([came_before]))
            assert found["steps"] == done.steps
            assert found["flops"] == pytest.approx(
                flops.get_total_flops(), rel=0.08
            )  # last batches, held-back tenths


@pytest.mark.parametrize("local", [STEPS, LOCAL], ids=("steps", "epochs"))
@pytest.mark.parametrize("probe", [0, 1, 2])
def test_losses_with_everyones_adapters_are_counted_by_what_is_kept_from_training(local, probe):
    own = task(sizes=(30, 34, 200, *[10] * 37))
    cohort, at, own, _ = begun(Trust(ADAPTER, local, begin=1), own, "looped")
    cost = cost_of(cohort, at.shared, at.store, np.array([probe]))
    for client in (0, 1, 2, 20):
        counts = own.train.count[[client]]
        with FlopCounterMode(display=False) as flops:
            cohort.update(at.shared, at.store, np.array([client]), 1)
        found = cost.of(counts, trains(cohort.method, counts))["flops"]
        assert found == pytest.approx(flops.get_total_flops(), rel=0.02)


def test_costs_are_counted_once_for_each_size_of_messages(monkeypatch):
    counted, true = [], costs.cost_of
    monkeypatch.setattr(costs, "cost_of", lambda *of: counted.append(1) or true(*of))
    cohort, at, own, plan = begun(Trust(ADAPTER, STEPS, begin=1, every=2), rounds=8)
    list(rounds(cohort, at, own, plan))
    assert len(counted) == 2


def test_inner_steps_are_steps():
    cohort, at, own, _ = begun(PFedMe(STEPS, inner_steps=3))
    cost = cost_of(cohort, at.shared, at.store, np.array([1]))
    assert cost.of(own.train.count[:1])["steps"] == 7 * (1 + 3)


def test_a_run_knows_who_comes_again():
    method = FedDPA(ADAPTER, gate="constant", local=STEPS)
    cohort, at, own, plan = begun(method, rounds=3, clients_per_round=3)
    seen: set[int] = set()
    for progress in rounds(cohort, at, own, plan):
        chosen = set(umbel.rounds.sampled(np.arange(len(SIZES)), plan, progress.round).tolist())
        assert progress.figures["steps"] == 7 * (3 + len(seen & chosen))
        seen |= chosen


def test_a_resumed_run_still_knows_who_comes_again(tmp_path):
    method = FedDPA(ADAPTER, gate="constant", local=STEPS)
    plan = Schedule(rounds=4, checkpoint_every=1, faults=Faults(straggle=0.5))  # who comes late has trained
    with pytest.raises(StoppedError):
        umbel.run(task(), method, schedule=plan, folder=tmp_path / "run", on_round=stop_after(2))
    history = umbel.runs.resume(tmp_path / "run", task(), method).history
    assert [line["steps"] for line in history] == [35, 70, 70, 70]


def test_a_frozen_base_is_no_clients_own_memory():
    layers = [torch.nn.Linear(512, 512) for _ in range(4)]  # 4 MB
    clients = [(torch.randn(4, 512), torch.arange(4) % 3) for _ in range(20)]
    own = umbel.task_of(torch.nn.Sequential(*layers), clients)
    method = FedIT(ADAPTER, local=replace(STEPS, batch_size=1), freeze_base=True)
    for memory_gb, most in ((0.004, 20), (0.0004, 4)):
        cohort, _ = start(own, method, Schedule(rounds=2), Engine("stacked", memory_gb=memory_gb))
        assert most / 2 <= cohort.chunk <= most


def test_clients_share_what_a_gpu_has_free_and_two_gb_of_any_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 10**9, 140 * 10**9))
    assert memory_gb_of("cuda:1") == pytest.approx(75)
    assert memory_gb_of("cpu") == 2.0


def test_convolutions_and_backward_are_counted_as_pytorch_counts_them():
    conv, x = torch.nn.Conv2d(2, 4, 3, groups=2), torch.randn(3, 2, 8, 8)
    found = []
    for counter in (CountedFlops(), FlopCounterMode(display=False)):
        with counter:
            conv(x).square().sum().backward()
            with torch.no_grad():
                torch.einsum("ij,kj->ik", torch.ones(2, 3), torch.ones(4, 3))
        found.append(counter.total if isinstance(counter, CountedFlops) else counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_a_client_with_much_data_is_not_gone_through_to_be_counted():
    cohort, at, *_ = begun(umbel.FedAvg(replace(LOCAL, epochs=1)), task(sizes=(100_000, 5)), "looped")
    with counted_training() as done:
        cost_of(cohort, at.shared, at.store, np.array([0]))
    assert done.steps <= 4


def test_counting_leaves_no_trace():
    results = []
    for times in (1, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        cohort, at, own, plan = begun(umbel.FedAvg(LOCAL), task(model, (8, 12, 20)))
        for _ in range(times):
            cost = cost_of(cohort, at.shared, at.store, np.array([0]))
        *_, last = rounds(cohort, at, own, plan, cost)
        results.append({key: value for key, value in last.figures.items() if "seconds" not in key})
    assert results[0] == results[1]


def test_groups_of_tensors_add_up_to_what_the_rounds_count(tmp_path):
    recipe = read(load(find("digits"), ["rounds=2", "clients_per_round=7", "held_out=0.25"]), "floral")
    result = umbel.runs.run_recipe(recipe, tmp_path / "run")
    run = read_run(tmp_path / "run")
    line, travels = run.history[-1], run.travels
    assert {"base", "adapters"} <= set(travels["up"]) & set(travels["down"])
    assert line["bytes_up"] == 7 * sum(travels["up"].values())
    assert line["bytes_down"] == 7 * sum(travels["down"].values())
    found = totals(run)
    assert found["bytes_up_per_client_round"] == sum(travels["up"].values())
    assert found["steps_per_client_round"] == 8
    assert (
        found["server_bytes"]
        == line["server_bytes"]
        == sum(leaf.numel() * leaf.element_size() for leaf in umbel.tree.tensors(result.progress.shared).values())
    )
    assert run.num_members == len(participants(40, result.schedule)) == 40 - len(held_out(40, result.schedule))


def test_snapshots_are_of_the_clients_that_train(tmp_path):
    recipe = read(load(find("digits"), ["rounds=2", "held_out=0.25"]), "floral")
    umbel.runs.run_recipe(recipe, tmp_path / "run")
    last = read_run(tmp_path / "run").snapshots[-1]
    assert len(last["group"]) == len(last["mixture"]) == len(last["accuracy"]) == 30


def test_steps_are_those_of_the_clients_that_took_part():
    cohort, at, own, plan = begun(umbel.FedAvg(LOCAL), clients_per_round=2)
    for progress in rounds(cohort, at, own, plan):
        chosen = umbel.rounds.sampled(np.arange(len(SIZES)), plan, progress.round)
        assert progress.figures["steps"] == sum(2 * -(-SIZES[k] // 4) for k in chosen)
        assert progress.figures["bytes_down"] == 2 * 4 * (6 * 16 + 16 + 16 * 3 + 3)
