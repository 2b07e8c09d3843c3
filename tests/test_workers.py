"""Several chunks at work at the same time: in order, not too far ahead, and at an end when something fails."""

import threading
import time

import pytest
import torch
from torch import nn

import umbel
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.model.dropout import SeededDropout
from umbel.rounds import start
from umbel.schedule import Schedule

LOCAL = umbel.LocalTraining(lr=0.1, batch_size=8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def given(num_clients=9):
    draw = torch.Generator().manual_seed(0)
    clients = [
        (torch.randn(10 + k, 6, generator=draw), torch.randint(3, (10 + k,), generator=draw))
        for k in range(num_clients)
    ]
    return umbel.task_of(net(), clients)


def cohort(workers, method=None):
    method = method or umbel.FedAvg(LOCAL)
    return start(given(), method, Schedule(rounds=1), Engine("looped", workers=workers))[0]


def test_what_is_made_comes_in_order_however_long_each_takes():
    def work(_, item):
        time.sleep(0.001 * (7 - item))
        return item

    assert list(cohort(3).each(work, range(8))) == list(range(8))


def test_as_many_are_at_work_as_there_are_workers_and_each_has_a_module_of_its_own():
    meeting, modules = threading.Barrier(3, timeout=60), set()

    def work(own, item):
        modules.add(id(own.loss.module))
        meeting.wait()  # broken unless three are here at the same time
        return item

    shared = cohort(3)
    assert list(shared.each(work, range(6))) == list(range(6))
    assert len(modules) == 3
    assert id(shared.loss.module) not in modules


def test_no_more_than_a_turn_is_done_ahead():
    begun = []
    made = cohort(2).each(lambda _, item: begun.append(item), range(100))
    next(made)
    time.sleep(0.05)
    assert len(begun) <= 4
    made.close()


def test_an_error_ends_the_others_and_leaves_no_thread():
    before = threading.active_count()

    def work(_, item):
        if item == 2:
            raise ValueError("the third")
        return item

    with pytest.raises(ValueError, match="the third"):
        list(cohort(3).each(work, range(50)))
    assert threading.active_count() == before


def test_a_frozen_base_is_in_memory_once():
    task = given()
    task.model.requires_grad_(False)
    method = umbel.FLoRAL(2, adapter=umbel.AdapterPlan(rank=2), local=LOCAL)
    many = start(task, method, Schedule(rounds=1), Engine("looped", workers=2))[0]
    places = {
        leaf.data_ptr()
        for loss in (many.loss, *many.losses)
        for name, leaf in loss.module.named_parameters()
        if name == "0.weight"
    }
    assert len(places) == 1
    assert sum(isinstance(layer, SeededDropout) for layer in many.losses[0].module.modules()) == 1


def test_workers_on_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=r"engine\.workers share a CPU's cores"):
        Engine(device="cuda", workers=2)
    with pytest.raises(RecipeError, match="workers = 0, but it must be at least 1"):
        Engine(workers=0)
