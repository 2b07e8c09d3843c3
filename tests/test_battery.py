"""What every registered method keeps to. A new method is one line in `CASES` and one in `EXACT`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from simulate import FREE, simulate
from umbel import mixing, tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData, Examples
from umbel.cohort import Cohort, Engine, PrivateStore, Tally
from umbel.errors import RoundError
from umbel.methods import (
    APFL,
    FLTAC,
    IFCA,
    METHODS,
    Ditto,
    Ensemble,
    FedAvg,
    FedAvgFinetune,
    FedBN,
    FedDPA,
    FedEM,
    FedIT,
    FedPer,
    FedProx,
    FedRep,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRAL,
    KNNPer,
    Local,
    LocalAdapter,
    PFedMe,
    Population,
    ThresholdClustering,
    Trust,
)
from umbel.methods.protocol import why_not
from umbel.methods.routing import Router
from umbel.methods.server import ServerOptimizer
from umbel.model.loss import Loss
from umbel.rounds import rounds, start
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import Task
from umbel.train import LocalTraining

STEPS = LocalTraining(lr=0.05, batch_size=4, epochs=2)
HEAVY = LocalTraining(lr=0.05, batch_size=4, epochs=2, momentum=0.9, weight_decay=0.01)
ADAMW = LocalTraining(lr=0.05, batch_size=4, epochs=3, optimizer="adamw", eps=0.1)
EM, GRADIENT, ORACLE = Router(kind="em"), Router(kind="gradient"), Router(kind="oracle")
PLAN = AdapterPlan(2, ("linear", "bias", "norm"))

# Routes by losses are as sharp as adapters are alike, and sharpen rounding with them: hence the large init_std.
CASES = {
    "local": {"": Local(STEPS), "momentum": Local(HEAVY)},
    "fedavg": {"": FedAvg(STEPS), "momentum": FedAvg(HEAVY, ServerOptimizer(lr=0.5))},
    "floral": {
        "em": FLoRAL(3, replace(PLAN, realization="merged"), EM, STEPS, init_std=1.0),
        "gradient": FLoRAL(3, replace(PLAN, realization="factored"), GRADIENT, STEPS),
        "gradient, momentum": FLoRAL(3, PLAN, GRADIENT, HEAVY, batch_stats="federated"),
        "oracle, preconditioned": FLoRAL(3, PLAN, ORACLE, STEPS, precondition=True, init_std=0.5),
        # The options, without pruning: there states shrink while a run lasts (test_floral_options.py).
        "product averaging": FLoRAL(3, PLAN, ORACLE, STEPS, averaging="product", init_std=1.0),
        "delta averaging": FLoRAL(3, PLAN, EM, STEPS, averaging="delta", report_error=True, init_std=1.0),
        "ranks": FLoRAL(3, PLAN, EM, STEPS, ranks=(1.0, 0.5), init_std=1.0),
        "explored with more ranks": FLoRAL(3, replace(PLAN, rank=1), EM, STEPS, explore_rank=2, init_std=1.0),
        "layer routers": FLoRAL(3, PLAN, GRADIENT, STEPS, layer_routers=True),
        "send top": FLoRAL(3, PLAN, GRADIENT, STEPS, send_top=2, init_std=1.0),
        "published": FLoRAL(
            3, PLAN, GRADIENT, STEPS, guard=0.0, adapter_step=0.1, least_prob=0.01, bias_start=1.0
        ),
        "frozen base": FLoRAL(3, PLAN, EM, STEPS, freeze_base=True, init_std=1.0),
        "personal": FLoRAL(3, PLAN, EM, STEPS, init_std=1.0, personal=("*bias",)),
        "personal, frozen": FLoRAL(3, PLAN, GRADIENT, HEAVY, freeze_base=True, personal=("*bias",)),
    },
    "ensemble": {
        "em": Ensemble(3, EM, STEPS),
        "gradient, momentum": Ensemble(3, GRADIENT, HEAVY),
        "oracle": Ensemble(3, ORACLE, STEPS),
    },
    "fedprox": {"": FedProx(STEPS, mu=0.5), "momentum": FedProx(HEAVY, mu=0.5)},
    "fedavg_finetune": {"": FedAvgFinetune(STEPS, finetune=STEPS)},
    "ditto": {"": Ditto(STEPS), "momentum": Ditto(HEAVY, ServerOptimizer(lr=0.5))},
    "apfl": {
        "": APFL(STEPS, adaptive=False),
        "adaptive": APFL(STEPS),
        "adaptive, momentum": APFL(HEAVY, alpha=0.2),
    },
    # The bias before BatchNorm has no gradient: without weight decay its θ would be the uploaded w.
    "pfedme": {
        "": PFedMe(replace(STEPS, weight_decay=0.01), strength=5.0, inner_lr=0.1),
        "momentum": PFedMe(HEAVY, strength=1.0),
    },
    "fedper": {"": FedPer(STEPS), "by name": FedPer(HEAVY, personal=("*bias",))},
    "fedrep": {"": FedRep(STEPS, head_epochs=2), "momentum": FedRep(HEAVY, head_epochs=2)},
    "fedbn": {"": FedBN(STEPS), "all": FedBN(HEAVY, norms="all")},
    "local_adapter": {
        "": LocalAdapter(STEPS, adapter=replace(PLAN, realization="merged")),
        "momentum": LocalAdapter(HEAVY, adapter=replace(PLAN, realization="factored"), init_std=0.5),
        "preconditioned": LocalAdapter(STEPS, adapter=PLAN, precondition=True, init_std=0.5),
    },
    "knnper": {"": KNNPer(STEPS, neighbours=3)},
    "fedem": {"": FedEM(3, STEPS), "momentum": FedEM(3, HEAVY, ServerOptimizer(lr=0.5))},
    "ifca": {"": IFCA(3, STEPS), "gradient, momentum": IFCA(3, HEAVY, averaging="gradient")},
    "threshold_clustering": {
        "": ThresholdClustering(2, 0.5, local=STEPS),
        "momentum": ThresholdClustering(2, 0.75, alpha=1.0, local=HEAVY),
    },
    # What answers on public inputs are compared for is in test_trust.py, for here nobody has any.
    "trust": {
        "validation": Trust(PLAN, STEPS, "validation", begin=1, staleness=1, trust_fraction=0.3),
        "validation, momentum": Trust(PLAN, HEAVY, "validation", begin=1, trust_fraction=0.3, mix="A"),
        "weights": Trust(replace(PLAN, realization="factored"), STEPS, "weights", begin=1, mix="product"),
        "weights as published": Trust(AdapterPlan(2, ("linear",)), STEPS, "weights", "paper", begin=1),
        "uniform, adamw": Trust(PLAN, ADAMW, "uniform", begin=1),
        "oracle, momentum": Trust(PLAN, HEAVY, "oracle", begin=1, mix="B"),
        "validation, personal": Trust(PLAN, ADAMW, begin=1, trust_fraction=0.3, personal=("*bias",)),
        "weights, personal": Trust(PLAN, HEAVY, "weights", begin=1, personal=("*bias",)),
    },
    "fedsa_lora": {
        "": FedSALoRA(PLAN, STEPS),
        "personal": FedSALoRA(PLAN, STEPS, personal=("*bias",)),
        "frozen, momentum": FedSALoRA(replace(PLAN, realization="factored"), HEAVY, freeze_base=True),
    },
    "ffa_lora": {
        "": FFALoRA(PLAN, STEPS),
        "personal": FFALoRA(PLAN, STEPS, personal=("*bias",)),
        "frozen, momentum": FFALoRA(replace(PLAN, realization="factored"), HEAVY, freeze_base=True),
    },
    "flexlora": {
        "": FlexLoRA((1, 3), PLAN, STEPS),
        "one rank, momentum": FlexLoRA((), PLAN, HEAVY),
        "personal": FlexLoRA((1, 3), PLAN, STEPS, personal=("*bias",)),
    },
    "fedit": {
        "": FedIT(PLAN, STEPS),
        "personal": FedIT(PLAN, HEAVY, personal=("*bias",)),
        "frozen, momentum": FedIT(replace(PLAN, realization="factored"), HEAVY, freeze_base=True),
    },
    "feddpa": {
        "T": FedDPA(PLAN, gate="constant", local=STEPS, freeze_base=False),
        "F, frozen": FedDPA(replace(PLAN, realization="factored"), "F", gate="constant", local=STEPS),
        "T, personal": FedDPA(PLAN, gate="constant", local=STEPS, freeze_base=False, personal=("*bias",)),
        "F, personal": FedDPA(PLAN, "F", gate="constant", local=HEAVY, freeze_base=False, personal=("*bias",)),
    },
    "fl_tac": {
        "": FLTAC(2, adapter=PLAN, local=STEPS),
        "paper's": FLTAC(2, "raw", cannot_link=False, warm_start=False, adapter=PLAN, local=STEPS),
        "delta, momentum": FLTAC(2, "delta", min_examples=1, adapter=PLAN, local=HEAVY),
        "frozen, silhouette": FLTAC(0, "unit", adapter=PLAN, local=STEPS, freeze_base=True),
        "personal": FLTAC(2, adapter=PLAN, local=STEPS, personal=("*bias",)),
    },
}

# Settings whose arithmetic on dyadic numbers is exact: no product of two trained tensors, and probs of 0, ½ or 1.
HALVES = LocalTraining(lr=0.5, batch_size=4)
BIASES = AdapterPlan(layers=("bias",))
EXACT = {
    "local": {"": Local(HALVES)},
    "fedavg": {"": FedAvg(HALVES)},
    "floral": {"one": FLoRAL(1, BIASES, EM, HALVES), "oracle": FLoRAL(2, BIASES, ORACLE, HALVES)},
    "ensemble": {"one": Ensemble(1, EM, HALVES)},
    "fedprox": {"": FedProx(HALVES, mu=0.5)},
    "fedavg_finetune": {"": FedAvgFinetune(HALVES)},
    "ditto": {"": Ditto(HALVES, strength=0.5)},
    "apfl": {"": APFL(HALVES, adaptive=False)},
    "pfedme": {"": PFedMe(HALVES, strength=0.5, inner_lr=0.5, inner_steps=1)},
    "fedper": {"": FedPer(HALVES, personal=("bias",))},
    "fedrep": {"": FedRep(HALVES, personal=("bias",), head_epochs=1)},
    "fedbn": {"": FedBN(HALVES)},
    "local_adapter": {"": LocalAdapter(HALVES, adapter=BIASES)},
    "knnper": {"": KNNPer(HALVES)},
    "fedem": {"one": FedEM(1, HALVES, mixes="outputs")},
    "ifca": {"one": IFCA(1, HALVES)},
    "threshold_clustering": {"one": ThresholdClustering(1, 1.0, alpha=1.0, local=HALVES)},
    "trust": {
        "uniform": Trust(BIASES, HALVES, "uniform", begin=1),
        "oracle": Trust(BIASES, HALVES, "oracle", begin=1),
    },
    "fedsa_lora": {"": FedSALoRA(BIASES, HALVES)},
    "ffa_lora": {"": FFALoRA(BIASES, HALVES)},
    "flexlora": {"": FlexLoRA((), BIASES, HALVES)},
    "fedit": {"": FedIT(BIASES, HALVES)},
    "feddpa": {"": FedDPA(BIASES, gate="constant", local=HALVES, freeze_base=False)},
    "fl_tac": {"one": FLTAC(1, adapter=BIASES, local=HALVES)},
}

COUNTS = [5, 8, 1, 9, 8]
GROUP = torch.tensor([0, 1, 2, 0, 1])


def every(cases):
    return pytest.mark.parametrize(
        "method",
        [pytest.param(m, id=f"{name} {label}") for name, own in cases.items() for label, m in own.items()],
    )


def net(norm=False):
    with seeded(0, "test"):
        middle = nn.BatchNorm1d(6) if norm else nn.LayerNorm(6)
        return nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3))


def labelled(counts=COUNTS, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 4, generator=draw).to(dtype), torch.randint(0, 3, (n,), generator=draw)) for n in counts
    ]


def prepared(method, module, clients, num_rounds=0, loss="cross_entropy"):
    """The arguments of `client_update` after so many rounds, and the server's state."""
    shared, store = simulate(method, module, clients, num_rounds, loss, group=GROUP[: len(clients)])
    everyone = np.arange(len(clients))
    data = ClientData(Examples.of(clients), everyone, 0, num_rounds + 1)
    message = method.send(shared, torch.from_numpy(everyone))
    return Loss(method.adapt(module), loss), message, store.rows(everyone), data, shared


def outcome(shared, store, num_clients):
    return tree.tensors(shared), tree.tensors(store.rows(np.arange(num_clients)))


def equal(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cases", [CASES, EXACT])
def test_every_registered_method_is_tested(cases):
    assert {name: type(m) for name, own in cases.items() for m in own.values()} == METHODS


@every(CASES)
@pytest.mark.parametrize("counts", [[6, 6, 6], [6]])
def test_arguments_are_not_changed(method, counts):
    module, clients = net(norm=True), labelled(counts)
    loss, message, private, data, shared = prepared(method, module, clients, num_rounds=1)
    given = (shared, message, private, {"x": data.examples.x, "y": data.examples.y})
    before = [tree.map_tensors(torch.clone, state) for state in given]
    upload, _ = method.client_update(loss, message, private, data)
    sent = tree.map_tensors(torch.clone, upload)
    method.server_update(shared, iter([upload]))
    method.personalize(message, private)
    method.mixture(message, private)
    for now, then in zip((*given, upload), (*before, sent), strict=True):
        assert equal(tree.tensors(now), tree.tensors(then))


@every(CASES)
def test_a_run_repeats_bit_for_bit(method):
    runs = [outcome(*simulate(method, net(), labelled(), 2, "cross_entropy", group=GROUP), 5) for _ in range(2)]
    assert equal(runs[0][0], runs[1][0])
    assert equal(runs[0][1], runs[1][1])


@every(CASES)
def test_another_seed_gives_another_run(method):
    one, other = (
        outcome(*simulate(method, net(), labelled(), 1, "cross_entropy", group=GROUP, seed=seed), 5)
        for seed in (0, 1)
    )
    assert not (equal(one[0], other[0]) and equal(one[1], other[1]))


@every(CASES)
@pytest.mark.parametrize("norm", [False, True])
def test_chunks_and_order_change_nothing_beyond_rounding(method, norm):
    # One example is no batch to normalize: with BatchNorm the last batch of every client has 4.
    counts = [8, 4, 8, 12, 8] if norm else COUNTS
    # All at once, and in another order in chunks of which the last is one client.
    settings = ({}, {"chunk": 2, "order": np.array([3, 4, 1, 0, 2])})
    expected, found = (
        outcome(*simulate(method, net(norm), labelled(counts), 2, "cross_entropy", group=GROUP, **own), 5)
        for own in settings
    )
    assert_close(found, expected)


@every(EXACT)
def test_chunks_and_order_change_nothing_where_arithmetic_is_exact(method):
    # Means over 4 or 2 examples and 2 outputs, rate ½, 16 examples in all and 8 in each group: every number is a
    # short binary fraction.
    counts, group = [2, 4, 6, 4], torch.tensor([0, 1, 0, 1])
    draw = torch.Generator().manual_seed(0)
    clients = [tuple(torch.randint(-2, 3, (n, 2), generator=draw).double() / 2 for _ in range(2)) for n in counts]
    module = nn.Linear(2, 2).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.5, -0.25], [1.0, 0.75]]))
        module.bias.copy_(torch.tensor([0.125, -0.5]))
    expected = outcome(*simulate(method, module, clients, 3, group=group), 4)
    for chunk, order in ((1, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (4, [2, 0, 3, 1]), (2, [3, 1, 0, 2])):
        found = outcome(*simulate(method, module, clients, 3, group=group, chunk=chunk, order=np.array(order)), 4)
        assert equal(found[0], expected[0])
        assert equal(found[1], expected[1])


@every(CASES)
def test_a_server_takes_the_sum_of_single_contributions_or_says_why_not(method):
    loss, message, private, data, shared = prepared(method, net(), labelled(), num_rounds=1)
    upload, _ = method.client_update(loss, message, private, data)
    if not hasattr(method, "summed_update"):
        assert method.contribution(upload) == {}
        assert method.refuses["sum"]
        return
    sums = method.contribution(upload)
    total = mixing.total(method.contribution(tree.rows(upload, torch.tensor([k]))) for k in range(5))
    assert_close(tree.tensors(total), tree.tensors(sums))
    updated = tree.tensors(method.summed_update(shared, sums))
    assert equal(updated, tree.tensors(method.server_update(shared, iter([upload]))))
    if why_not(method, "moves"):
        return
    absolute = method.absolute(shared, method.contribution(method.changed(upload, message, mixing.moved)))
    assert_close(tree.tensors(absolute), tree.tensors(sums), atol=1e-4, rtol=1e-4)


@every(CASES)
def test_a_masked_step_changes_nothing_bit_for_bit(method):
    # Client 0 has 2 examples, one step an epoch. Beside a client of 4 it has no step to sit out, beside one of
    # 16 it has three; the programs' shapes are the same.
    method = replace(method, local=replace(method.local, epochs=1))
    (x, y), (wide_x, wide_y) = labelled([2, 16])
    found = []
    for count in (4, 16):
        clients = [(x, y), (wide_x[:count], wide_y[:count])]
        loss, message, private, data, _ = prepared(method, net(), clients)
        assert data.num_steps(4) == count // 4
        upload, kept = method.client_update(loss, message, private, data)
        first = torch.tensor([0])
        found.append(tree.tensors(tree.rows(upload, first)) | tree.tensors(tree.rows(kept, first)))
    if isinstance(method, FedEM) or (isinstance(method, (FLoRAL, Ensemble)) and method.router.kind == "em"):
        # The clients' losses come from one matrix product over all examples, whose rounding knows its shape.
        assert_close(*found)
    else:
        assert equal(*found)


@every(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_keep_their_names_shapes_and_types(method, dtype):
    def form(state):
        return {name: (leaf.shape, leaf.dtype) for name, leaf in tree.tensors(state).items()}

    module, clients = net(norm=True).to(dtype), labelled([4, 8], dtype)
    loss, message, private, data, shared = prepared(method, module, clients)
    upload, kept = method.client_update(loss, message, private, data)
    assert form(kept) == form(private)
    assert form(method.server_update(shared, iter([upload]))) == form(shared)
    for state in (message, private, upload, kept):
        assert all(leaf.shape[0] == 2 for leaf in tree.tensors(state).values())
    assert method.mixture(message, private).shape[0] == 2
    names = dict(loss.module.named_parameters()) | dict(loss.module.named_buffers())
    served = method.personalize(message, private)
    assert set(served) <= set(names)
    assert {leaf.dtype for name, leaf in served.items() if name != "probs"} == {dtype}


@every(CASES)
def test_states_survive_a_file_bit_for_bit(method, tmp_path):
    clients = labelled([4, 8, 8])
    loss, message, private, data, shared = prepared(method, net(norm=True), clients, num_rounds=1)
    upload, kept = method.client_update(loss, message, private, data)
    for i, state in enumerate((shared, message, kept, upload)):
        file = tmp_path / f"{i}.safetensors"
        save_file({name: leaf.contiguous().clone() for name, leaf in tree.tensors(state).items()}, file)
        blank = tree.map_tensors(torch.zeros_like, state)
        assert equal(tree.tensors(tree.with_tensors(blank, load_file(file))), tree.tensors(state))


def memory(state):
    return {leaf.untyped_storage().data_ptr() for leaf in tree.tensors(state).values() if leaf.numel()}


@every(CASES)
def test_nothing_private_is_uploaded(method):
    loss, message, private, data, _ = prepared(method, net(norm=True), labelled([4, 8, 8]), num_rounds=1)
    upload, kept = method.client_update(loss, message, private, data)
    sent = tree.tensors(upload).values()
    for own in (private, kept):
        assert not memory(own) & memory(upload)
        # Whether a client has trained (`seen`) is no secret: it has just sent its work.
        for leaf in (leaf for name, leaf in tree.tensors(own).items() if name != "seen"):
            for row in leaf:
                # A row of zeros, such as the step of a bias in front of BatchNorm, tells nothing.
                assert not row.any() or not any(
                    row.shape == other.shape and torch.equal(row, other) for tensor in sent for other in tensor
                )
    federated = isinstance(method, FLoRAL) and method.batch_stats == "federated"
    if isinstance(method, FLoRAL) and not federated:
        assert not [name for name in tree.tensors(upload) if "running" in name]
        assert [name for name in tree.tensors(kept) if "running" in name]


def task(clients, module):
    return Task(
        "test", module, "cross_entropy", Examples.of(clients), Examples.of(labelled([2] * len(clients))), GROUP
    )


def progress(method, task, mode, num_rounds=2, workers=1, chunk=3):
    schedule = Schedule(rounds=num_rounds)
    cohort, at = start(task, method, schedule, Engine(mode=mode, chunk=chunk, workers=workers))
    return list(rounds(cohort, at, task, schedule, FREE))


@every(CASES)
def test_the_users_model_is_left_alone(method):
    module = net(norm=True)
    module[0].eval()
    before = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    progress(method, task(labelled([8, 4, 8, 4, 8]), module), "stacked", 1)
    assert equal(dict(module.state_dict()), before)
    assert [layer.training for layer in module] == [False, True, True, True]
    assert all(leaf.requires_grad and leaf.grad is None for leaf in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())


@pytest.mark.parametrize("mode", ["stacked", "looped"])
@every({name: dict([next(iter(own.items()))]) for name, own in CASES.items()})
def test_workers_change_nothing_bit_for_bit(method, mode):
    given = task(labelled(), net())
    ends = [progress(method, given, mode, workers=workers, chunk=2)[-1] for workers in (1, 3)]
    alone, together = (outcome(at.shared, at.store, 5) for at in ends)
    assert equal(alone[0], together[0])
    assert equal(alone[1], together[1])
    assert np.array_equal(ends[0].scores.loss, ends[1].scores.loss)
    assert np.array_equal(ends[0].scores.mixture, ends[1].scores.mixture)


@pytest.mark.parametrize("mode", ["stacked", "looped"])
@every({name: dict([next(iter(own.items()))]) for name, own in CASES.items()})
def test_a_client_whose_work_is_not_finite_is_left_out(method, mode):
    # The inputs are finite, but their sums are not.
    clients = labelled()
    clients[1] = (torch.full_like(clients[1][0], 1e38), clients[1][1])
    for at in progress(method, task(clients, net()[0]), mode):
        assert at.figures["dropped"] == [1]
        assert at.store.seen.tolist() == [0, 2, 3, 4]
        assert all(bool(leaf.isfinite().all()) for leaf in tree.tensors(at.shared).values())
    assert np.isfinite(at.scores.loss).all()


@every(CASES)
def test_a_round_with_a_lost_client_is_one_without_it(method):
    module = net()[0]
    clients = labelled()
    clients[1] = (torch.full_like(clients[1][0], 1e38), clients[1][1])
    tally = Tally()
    found = outcome(*simulate(method, module, clients, 2, "cross_entropy", group=GROUP, tally=tally), 5)
    assert tally.dropped == [1, 1]
    rest = np.array([0, 2, 3, 4])
    expected = outcome(*simulate(method, module, clients, 2, "cross_entropy", group=GROUP, order=rest), 5)
    assert_close(found, expected)


@every(CASES)
def test_a_round_that_everyone_is_lost_in_is_an_error(method):
    clients = [(torch.full((2, 4), 1e38), torch.tensor([0, 1])) for _ in range(5)]
    with pytest.raises(RoundError, match=r"round 1: .* lower local\.lr"):
        progress(method, task(clients, net()[0]), "stacked")


@every(CASES)
def test_clients_of_unequal_sizes_are_not_stacked_under_batch_norm(method):
    examples = Examples.of(labelled([4, 8, 4, 8, 6, 8, 8]))
    everyone = np.arange(7)
    for norm in (True, False):
        cohort = Cohort(method, Loss(method.adapt(net(norm)), "cross_entropy"), examples, 0, chunk=3)
        chunks = cohort.chunks(everyone)
        assert sorted(np.concatenate(chunks)) == everyone.tolist()
        assert max(map(len, chunks)) == 3
        mixed = [len(set(examples.count[chunk])) > 1 for chunk in chunks]
        assert any(mixed) == (not norm)


@every(CASES)
def test_training_lowers_the_loss(method):
    # Five rounds on random labels: less than what the start has, for every client on its own examples.
    first, last = Tally(), Tally()
    shared, store = simulate(method, net(), labelled(), 1, "cross_entropy", group=GROUP, tally=first)
    cohort = Cohort(method, Loss(method.adapt(net()), "cross_entropy"), Examples.of(labelled()), 0, 5)
    for round in range(2, 6):
        last = Tally()
        shared = method.server_update(shared, cohort.uploads(shared, store, np.arange(5), round, last))
    assert last.mean_loss < first.mean_loss


def test_a_store_of_nothing_costs_nothing():
    method = FedAvg(STEPS)
    _, fresh = method.init(net(), Population(3, 0))
    store = PrivateStore(fresh, 3)
    store.put(np.array([1]), fresh)
    assert tree.tensors(store.rows(np.array([0, 1]))) == {}
