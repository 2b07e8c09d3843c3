"""Tensors that stay with the client beside its adapter: who trains, sends, mixes and serves them."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from simulate import StoppedError, simulate, stop_after
from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.cohort import Engine
from umbel.errors import ModelError, RecipeError
from umbel.methods import FLTAC, FedDPA, FedIT, FedSALoRA, FFALoRA, FlexLoRA, FLoRAL, Population, Trust
from umbel.methods.routing import Router
from umbel.model.loss import Loss
from umbel.model.pretrained import of_transformers
from umbel.onboarding import onboard
from umbel.runs import resume, run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.train import LocalTraining

STEPS = LocalTraining(lr=0.1, batch_size=4, epochs=2)
PLAN = AdapterPlan(2, ("linear", "bias"))
HEAD = ("2.*",)
METHODS = {
    "floral": FLoRAL(2, PLAN, local=STEPS, personal=HEAD),
    "floral, frozen": FLoRAL(2, PLAN, Router("gradient"), STEPS, freeze_base=True, personal=HEAD),
    "fedit": FedIT(PLAN, STEPS, personal=HEAD),
    "fedit, frozen": FedIT(PLAN, STEPS, freeze_base=True, personal=HEAD),
    "fedsa_lora": FedSALoRA(PLAN, STEPS, personal=HEAD),
    "ffa_lora": FFALoRA(PLAN, STEPS, personal=HEAD),
    "flexlora": FlexLoRA((1, 2), PLAN, STEPS, personal=HEAD),
    "feddpa": FedDPA(PLAN, gate="constant", local=STEPS, freeze_base=False, personal=HEAD),
    "feddpa, F": FedDPA(PLAN, "F", gate="constant", local=STEPS, personal=HEAD),
    "fl_tac": FLTAC(2, adapter=PLAN, local=STEPS, personal=HEAD),
    "fl_tac, frozen": FLTAC(1, adapter=PLAN, local=STEPS, freeze_base=True, personal=HEAD),
    "validation": Trust(PLAN, STEPS, begin=1, trust_fraction=0.25, personal=HEAD),
    "weights": Trust(PLAN, STEPS, "weights", begin=1, personal=HEAD),
    "uniform": Trust(PLAN, replace(STEPS, optimizer="adamw", lr=0.01), "uniform", begin=1, personal=HEAD),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def net():
    with seeded(0, "net"):
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def data(num_clients=4, count=8):
    """Clients whose labels are of one rule, turned round for every other one: a body in common, heads apart."""
    draw = torch.Generator().manual_seed(1)
    rule = torch.randn(3, generator=draw)
    x = torch.randn(num_clients, count, 3, generator=draw)
    y = ((x @ rule > 0).long() + torch.arange(num_clients).unsqueeze(1)) % 2
    return list(zip(x, y, strict=True))


def served(method, shared, store, clients):
    """Each client's model, by its name of tensors."""
    module = method.adapt(deepcopy(net()))
    who = np.arange(len(clients))
    message = method.send(shared, torch.from_numpy(who))
    these, loss = ClientData(Examples.of(clients), who, 0, 1), Loss(module, "cross_entropy")
    private = method.settle(loss, message, store.rows(who), these)
    return method.personalize(message, private)


@every
def test_personal_tensors_are_trained_by_their_client_and_sent_by_nobody(method):
    clients, first = data(), dict(net().named_parameters())
    shared, store = simulate(method, net(), clients, rounds=2, loss="cross_entropy")
    names = {"2.weight", "2.bias"}
    message = method.send(shared, torch.arange(2))
    for state in (shared, message):
        held = {name.rpartition("/")[2] for name in tree.tensors(state)}
        assert not any(name.startswith("2.") for name in held)
    models = served(method, shared, store, clients)
    for name in names:
        for client in range(4):
            assert not torch.equal(models[name][client], first[name])
            assert not torch.equal(models[name][client], models[name][client - 1])


@every
def test_a_client_never_seen_serves_personal_tensors_of_its_first_round(method):
    clients = data(5)
    shared, store = simulate(method, net(), clients, loss="cross_entropy", order=np.arange(4))
    models = served(method, shared, store, clients)
    start = dict(net().named_parameters())
    assert not torch.equal(models["2.weight"][4], start["2.weight"])
    kept = store.rows(np.array([4]))
    heads = kept.own if isinstance(method, FLoRAL) else kept.head
    assert torch.equal(heads["2.weight"][0], start["2.weight"])


@every
def test_personal_heads_fit_clients_whose_labels_are_turned(method):
    task = Task("turned", net(), "cross_entropy", Examples.of(data(6, 40)), Examples.of(data(6, 40)))
    plan, engine = Schedule(rounds=10, evaluate_every=10), Engine("stacked")
    with_own = run(task, method, schedule=plan, engine=engine).figures["accuracy"]
    assert with_own > 75
    if isinstance(method, FedIT | FlexLoRA) and not isinstance(method, FedSALoRA):
        # the others have other ways to tell clients apart
        without = run(task, replace(method, personal=()), schedule=plan, engine=engine).figures["accuracy"]
        assert without < with_own - 10


def test_heads_of_pretrained_models_are_named_with_a_star():
    sizes = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    bert = of_transformers(BertForSequenceClassification(sizes), "text")
    method = FLoRAL(2, AdapterPlan(peft={"r": 2, "target_modules": ["query"]}), personal=("*classifier.*",))
    _, private = method.init(bert, Population(2, 0))
    assert set(private.own) == {"model.classifier.weight", "model.classifier.bias"}


def test_what_is_frozen_stays_and_the_head_beside_it_is_trained():
    method = METHODS["floral, frozen"]
    shared, _ = method.init(net(), Population(2, 0))
    assert shared.base == {}
    _, private = method.init(net(), Population(2, 0))
    assert set(private.own) == {"2.weight", "2.bias"}


@every
def test_adapters_leave_personal_layers_alone(method):
    assert {part.name for part in method.bank(net()).low_rank} == {"0.weight"}


@every
def test_a_pattern_that_names_nothing_is_told(method):
    with pytest.raises(ModelError, match=r"personal: head\.\* matches no parameter of Sequential"):
        replace(method, personal=("head.*",)).init(net(), Population(2, 0))


@pytest.mark.parametrize("name", ["floral", "fl_tac"])
def test_an_adapter_alone_is_no_model_where_heads_are_personal(name):
    method = METHODS[name]
    with pytest.raises(RecipeError, match="export clients"):
        method.only(method.init(net(), Population(2, 0))[0], 0)


@pytest.mark.parametrize("name", ["floral", "fedit", "weights"])
def test_a_run_is_gone_on_with_to_the_same_heads(name, tmp_path):
    task = Task("turned", net(), "cross_entropy", Examples.of(data(6, 40)), Examples.of(data(6, 40)))
    schedule = Schedule(rounds=4, checkpoint_every=2, clients_per_round=3)
    with pytest.raises(StoppedError):
        run(task, METHODS[name], schedule=schedule, folder=tmp_path / name, on_round=stop_after(3))
    again = resume(tmp_path / name, task, METHODS[name])
    assert again.figures["loss"] == run(task, METHODS[name], schedule=schedule).figures["loss"]


@pytest.mark.parametrize("name", ["floral", "fedit"])
def test_a_new_client_gets_a_head_of_its_own(name):
    task = Task("turned", net(), "cross_entropy", Examples.of(data(6, 40)), Examples.of(data(6, 40)))
    done = run(task, METHODS[name], schedule=Schedule(rounds=15, held_out=0.34))
    ways = onboard(done, [40]).ways
    (settled,), (untouched,) = ways["routes"], ways["global"]
    assert settled.mean > 90
    assert untouched.mean < 60
