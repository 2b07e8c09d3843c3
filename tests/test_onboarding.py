"""Onboarding: unseen clients get their mixture from a few samples, and a run that held nobody out says so."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import umbel
from umbel import tree
from umbel.errors import DataError, RecipeError, RunFolderError
from umbel.evaluate import evaluate
from umbel.methods import IFCA, FedBN, FedDPA, FedEM, FedIT, ThresholdClustering, lora
from umbel.model.loss import Loss
from umbel.onboarding import TUNING_EPOCHS, first_samples, onboard, onboard_client, read_client
from umbel.rounds import held_out, participants
from umbel.runs import opened
from umbel.schedule import Schedule
from umbel.train import counted_training

SAMPLES = (0, 1, 5, 20)


def two_groups(num_clients=12, model=None):
    """Clients of two kinds, whose labels mean opposite things."""
    clients = []
    for k in range(num_clients):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(k))
        clients.append((x, ((x[:, 0] > 0).long() + k) % 2))
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Linear(6, 2)
    return umbel.task_of(model, clients)


def trained(method, held=0.25, model=None, **where):
    return umbel.run(
        two_groups(model=model), method, schedule=Schedule(rounds=30, held_out=held, evaluate_every=30), **where
    )


LOCAL = umbel.LocalTraining(lr=0.3, batch_size=8)


def ensemble(kind="em"):
    return umbel.Ensemble(2, router=umbel.Router(kind=kind, lr=1.0, noise=0.0), local=LOCAL)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return trained(ensemble(), folder=tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("kind", ["em", "gradient"])
def test_a_few_samples_are_enough_to_find_the_mixture(kind):
    found = onboard(trained(ensemble(kind)), SAMPLES)
    routes, glob = (found.ways[way] for way in ("routes", "global"))
    assert [point.samples for point in routes] == list(SAMPLES)
    assert found.settles
    if kind == "em":  # the gradient router of so short a run has two models that are hardly apart
        assert routes[-1].mean > 85
        assert routes[-1].mean > glob[-1].mean + 20
        assert found.trained.mean > 85
    assert {point.mean for point in glob} == {glob[0].mean}
    assert routes[0].mean == glob[0].mean == found.ways["fine-tune"][0].mean


def test_gradient_routes_move_the_logits_alone_and_to_the_lower_loss():
    run = trained(ensemble("gradient"))
    cohort, clients = run.cohort, held_out(run.task.num_clients, run.schedule)
    before = {name: leaf.clone() for name, leaf in tree.tensors(run.progress.shared).items()}
    personal = onboard_client(run, run.task.train.of_client(int(clients[0])))
    assert sum(personal.mixture) == pytest.approx(1)
    assert personal.mixture[0] != pytest.approx(0.5, abs=1e-4)
    for name, leaf in tree.tensors(run.progress.shared).items():
        assert torch.equal(leaf, before[name])
    message = cohort.method.send(run.progress.shared, torch.from_numpy(clients[:1]))
    shared_models = {
        name: leaf[0] for name, leaf in cohort.method.personalize(message, run.progress.store.fresh(1)).items()
    }
    assert all(
        torch.equal(personal.tensors[name], leaf) for name, leaf in shared_models.items() if name != "probs"
    )


def test_all_samples_give_what_evaluation_gives(result):
    """The routes with every sample are those with which `evaluate` scores the same clients."""
    clients = held_out(result.task.num_clients, result.schedule)
    store, shared = result.progress.store, result.progress.shared
    own = evaluate(result.cohort, shared, store, result.task.test, clients)
    found = onboard(result, (1000,))
    assert found.clients == clients.tolist()
    np.testing.assert_allclose(found.ways["routes"][-1].scores, own.accuracy)
    assert found.ways["routes"][-1].samples == result.task.train.count[clients].max()
    members = participants(result.task.num_clients, result.schedule)
    assert set(members).isdisjoint(clients)
    np.testing.assert_allclose(found.trained.mean, result.figures["accuracy"])


def test_samples_are_the_clients_own_and_nested():
    task = two_groups()
    clients = np.array([3, 7])
    few, more = (first_samples(task.train, clients, count, 0) for count in (2, 5))
    for client in clients:
        own = {tuple(row.tolist()) for row in task.train.of_client(client)[0]}
        small, large = ({tuple(row.tolist()) for row in examples.of_client(client)[0]} for examples in (few, more))
        assert small < large < own
        assert (len(small), len(large)) == (2, 5)
    assert few.count.sum() == 4


def test_onboarding_changes_nothing_in_the_run(result):
    before = {name: leaf.clone() for name, leaf in tree.tensors(result.progress.shared).items()}
    seen = result.progress.store.seen.tolist()
    onboard(result, SAMPLES)
    assert all(torch.equal(leaf, before[name]) for name, leaf in tree.tensors(result.progress.shared).items())
    assert result.progress.store.seen.tolist() == seen


@pytest.mark.parametrize("method", [umbel.FedAvg(LOCAL), IFCA(2, LOCAL), ThresholdClustering(2, local=LOCAL)])
def test_every_method_can_be_onboarded_and_says_whether_it_settles(method):
    found = onboard(trained(method), (0, 5))
    assert found.settles == isinstance(method, IFCA | ThresholdClustering)
    assert all(np.isfinite(point.mean) for points in found.ways.values() for point in points)
    if not found.settles:
        assert found.ways["routes"][1].mean == found.ways["global"][1].mean


@pytest.mark.parametrize("variant", ["T", "F"])
@pytest.mark.parametrize("gate", ["constant", "instance"])
def test_a_client_that_fed_dpa_has_never_seen_starts_from_the_global_adapter_alone(variant, gate):
    plan = umbel.AdapterPlan(peft={"r": 2, "target_modules": ["0"], "lora_alpha": 8})
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).requires_grad_(
        False
    )
    method = FedDPA(plan, variant=variant, gate=gate, local=LOCAL)
    result = trained(method, model=model)
    found = onboard(result, (0, 10))
    message = method.send(result.progress.shared, torch.arange(1))
    x = result.task.test.x[:5]
    fresh = method.personalize(message, result.progress.store.fresh(1))
    common = lora.adapted(message.bank, message.base, message.adapter)
    plain = FedIT(plan, LOCAL)
    alone = Loss(plain.adapt(result.task.model), "cross_entropy").outputs(common, x[None])
    torch.testing.assert_close(result.cohort.loss.outputs(fresh, x[None]), alone)
    if variant == "T":  # l needs two rounds
        assert found.ways["routes"][1].mean == found.ways["global"][1].mean


@pytest.mark.parametrize(
    "method", [FedBN(LOCAL), umbel.FLoRAL(2, umbel.AdapterPlan(1), local=LOCAL)], ids=["fedbn", "floral"]
)
def test_one_sample_is_no_batch_for_batch_norm_and_changes_nothing(method):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    found = onboard(trained(method, model=model), (0, 1, 9, 20))  # 9 = 8 + 1
    if isinstance(method, FedBN):
        scores = [point.scores.tolist() for point in found.ways["routes"]]
        assert scores[0] == scores[1] == scores[2] != scores[3]
    assert all(np.isfinite(point.mean) for points in found.ways.values() for point in points)


@pytest.mark.parametrize("method", [FedEM(2, LOCAL), ensemble()], ids=["fedem", "ensemble"])
def test_fine_tuning_a_mixture_trains_its_models_and_not_its_weights(method, monkeypatch):
    seen = []
    finite = tree.finite_rows
    monkeypatch.setattr(tree, "finite_rows", lambda state: seen.append(state) or finite(state))
    run = trained(method)
    seen.clear()
    found = onboard(run, (20,))
    tuned = next(state for state in seen if isinstance(state, dict))
    assert finite(tuned).all()
    assert torch.allclose(tuned["probs"], torch.full((3, 2), 0.5))
    assert found.ways["fine-tune"][0].mean != found.ways["global"][0].mean


def test_one_sample_is_fine_where_batch_norm_could_not_train_on_it():
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    found = onboard(trained(umbel.FedAvg(LOCAL), model=model), (1,))
    assert np.isfinite(found.ways["fine-tune"][0].mean)


def test_the_run_folder_gets_the_figures(result, tmp_path):
    task, method = two_groups(), ensemble()
    folder = tmp_path / "run"
    trained(method, folder=folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = onboard(folder, SAMPLES, task, method)
    document = json.loads((folder / "onboard.json").read_text())
    assert document == found.document()
    after = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.pop("onboard.json")
    assert after == before
    assert found.document() == onboard(result, SAMPLES).document()


def test_opened_is_the_run_as_its_checkpoint_has_it(tmp_path):
    method = ensemble()
    run = trained(method, folder=tmp_path / "run")
    again = opened(tmp_path / "run", two_groups(), method)
    assert again.figures == run.figures
    assert again.history == run.history
    for name, leaf in tree.tensors(run.progress.shared).items():
        assert torch.equal(leaf, tree.tensors(again.progress.shared)[name])
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        opened(tmp_path / "run", two_groups(), method)


def test_a_run_that_held_nobody_out_says_how_to_get_some():
    run = trained(umbel.FedAvg(LOCAL), held=0.0)
    with pytest.raises(RecipeError, match=r"--held_out=0\.2"):
        onboard(run)
    with pytest.raises(RecipeError, match="from 0 on"):
        onboard(run, [-1])


def test_a_client_of_ones_own_gets_a_mixture_and_a_model(result):
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(99))
    for group in (0, 1):
        y = ((x[:, 0] > 0).long() + group) % 2
        found = onboard_client(result, (x[:10], y[:10]), (x[10:], y[10:]))
        assert found.figures["routes"] > 80
        assert max(found.mixture) > 0.9
        model = result.cohort.loss.module
        model.load_state_dict(found.tensors)
        assert float((model.eval()(x[10:]).argmax(1) == y[10:]).float().mean()) == pytest.approx(
            found.figures["routes"] / 100
        )


def test_a_client_of_ones_own_is_scored_by_samples(result):
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(99))
    y = (x[:, 0] > 0).long()
    found = onboard_client(result, (x[:10], y[:10]), (x[10:], y[10:]), samples=(0, 2, 50))
    assert [point.samples for point in found.ways["routes"]] == [0, 2, 10]
    assert found.figures == {way: points[-1].mean for way, points in found.ways.items()}
    assert found.ways["routes"][0].mean == found.figures["global"]
    assert found.figures["routes"] > 80
    with pytest.raises(RecipeError, match="from 0 on"):
        onboard_client(result, (x, y), samples=[-1])


@pytest.mark.parametrize("local", [LOCAL, umbel.LocalTraining(lr=0.3, batch_size=8, steps=1)])
def test_fine_tuning_is_of_epochs_whatever_a_round_has(local):
    run = trained(umbel.FedAvg(local))
    with counted_training() as done:
        onboard(run, [40])
    assert done.steps == TUNING_EPOCHS * -(-30 // 8)


def test_a_server_that_knows_every_client_refuses_a_stranger():
    pair = (torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))
    with pytest.raises(RecipeError, match="clients held out"):
        onboard_client(trained(ThresholdClustering(2, local=LOCAL), held=0.0), pair)
    assert onboard_client(trained(FedBN(LOCAL), held=0.0), pair).mixture == []


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), r"shape \(5,\), those of the run \(6,\)"),
        (torch.zeros(4, 6), torch.zeros(4), "targets are torch.float32"),
        (torch.zeros(4, 6), torch.full((4,), 7), "label 7 is out of range"),
        (torch.zeros(4, 6), torch.zeros(3, dtype=torch.long), "4 inputs but 3 targets"),
        (torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.long), "NaN"),
    ],
)
def test_data_that_does_not_fit_is_refused(result, x, y, says):
    with pytest.raises(DataError, match=says):
        onboard_client(result, (x, y))


def test_files_are_read_and_wrong_ones_told(tmp_path):
    x, y = np.ones((3, 6), np.float32), np.arange(3)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    (train, test) = read_client(tmp_path / "a.npz")
    assert test is None
    np.testing.assert_array_equal(train[0].numpy(), x)
    both = {"x": torch.ones(3, 6), "y": torch.arange(3), "x_test": torch.ones(2, 6), "y_test": torch.arange(2)}
    save_file(both, tmp_path / "b.safetensors")
    assert len(read_client(tmp_path / "b.safetensors")[1][1]) == 2
    np.savez(tmp_path / "c.npz", z=x)
    np.savez(tmp_path / "d.npz", x=np.array([{}], dtype=object), y=y)
    np.savez(tmp_path / "i.npz", x=x, y=y, x_test=x)
    (tmp_path / "e.safetensors").write_bytes(b"nothing")
    (tmp_path / "f.npz").write_bytes(b"nothing")
    for name, says in (
        ("c.npz", "has no x and no y; there are z"),
        ("d.npz", "cannot be read"),
        ("e.safetensors", "cannot be read"),
        ("f.npz", "cannot be read"),
        ("g.npz", "cannot be read"),
        ("h.csv", "is wanted"),
        ("i.npz", "takes both"),
    ):
        with pytest.raises(DataError, match=says):
            read_client(tmp_path / name)
