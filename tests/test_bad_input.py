"""Bad input: a clear error that names the key, the layer or the client, before any work and any file."""

import pytest
import torch
from torch import nn

import umbel
from umbel.errors import DataError, ModelError, RecipeError, RoundError, UmbelError
from umbel.folder import RunFolder
from umbel.methods import FedAvgFinetune, FlexLoRA
from umbel.recipe import find, load, read
from umbel.runs import run_recipe
from umbel.tasks import task_of


def recipe(*overrides, label="floral"):
    return read(load(find("digits"), overrides), label)


def clients(num=3, size=8, **changes):
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(size, 4, generator=draw), torch.arange(size) % 3) for _ in range(num)]
    for client, pair in changes.items():
        data[int(client[1:])] = pair
    return data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=3", "round: there is no such setting; did you mean 'rounds'"),
        ("method.floral.num_adaptors=3", "method.floral.num_adaptors: .* did you mean 'num_adapters'"),
        ("method.floral.router.kinds=em", "method.floral.router.kinds: .* did you mean 'kind'"),
        ("task.variant=rotated", r"task.variant = 'rotated', but it is one of .*'rotate'"),
        ("task.name=digit", "task.name: there is no 'digit'; did you mean 'digits'"),
        ("rounds=many", "rounds: expected `int`.*'many'"),
        ("rounds=0", "^rounds = 0, but it must be at least 1$"),
        ("method.floral.num_adapters=0", "method.floral: .*num_adapters = 0"),
        ("method.floral.adapter.rank=0", "method.floral.adapter: .*rank = 0"),
        ("method.floral.adapter.rank=1.5", "whole rank"),
        ("method.floral.adapter=4", "method.floral.adapter: a table is wanted"),
        ("method.floral.local.lr=-1", "method.floral.local: lr = -1.0, but it must be above 0"),
        ("method.floral.like=florall", "method.floral.like: .*did you mean 'floral'"),
        ("engine.device=cuda:7", "sees no CUDA device" if not torch.cuda.is_available() else ""),
        ("engine.chunk=-1", "chunk"),
        ("engine.device=gpu", "no such device"),
        ("task=digits", "task: a table is wanted"),
        ("method.floral.like=floral-oracle", "goes round in a circle"),
        ("method.floral.server.momentum=1.5", r"server: momentum = 1.5, but it must be in \[0, 1\)"),
        ("method.floral.local.lr=nan", r"method.floral.local: lr = nan, but it must be above 0"),
        ("method.floral.guard=1.5", r"method.floral: guard = 1.5, but it must be in \[0, 1\]"),
        ("method.floral.ranks=[0.5,0]", r"method.floral: ranks\[1\] = 0.0, but it must be in \(0, 1\]"),
        ("secure.ranges={router=-1.0}", "secure: ranges.router = -1.0, but it must be above 0"),
        ("clients_per_round=-1", "^clients_per_round = -1, but it must be at least 0$"),
        ("method.floral.personal=[x]", r"it is '\[x\]'; a shell takes quotes away"),
        (
            "method.floral.local.precision=float16",
            r"local.precision = 'float16', but it is one of 'float32', 'bfloat16'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_path(override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


def test_an_unknown_recipe_or_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        find("digit")
    with pytest.raises(RecipeError, match="did you mean 'floral'"):
        recipe(label="florals")
    with pytest.raises(RecipeError, match="no recipe file"):
        find("nowhere.toml")


def test_an_override_that_is_none_is_told():
    with pytest.raises(RecipeError, match=r"--key.of.setting=value"):
        recipe("rounds")


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "broken.toml").write_text("rounds = = 3")
    with pytest.raises(RecipeError, match=r"broken\.toml"):
        load(tmp_path / "broken.toml")


def test_a_rank_larger_than_the_layer_names_the_layer_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match=r"rank = 11 is larger than 3\.weight \(10, 64\)"):
        run_recipe(recipe("method.floral.adapter.rank=11"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_module_with_nothing_to_adapt_is_refused():
    task = task_of(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), clients())
    with pytest.raises(ModelError, match="no parameter of Sequential"):
        umbel.run(task, umbel.FLoRAL(), rounds=1)


def test_a_client_without_samples_is_named():
    with pytest.raises(DataError, match="client 1 has no samples"):
        task_of(nn.Linear(4, 3), clients(c1=(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))))


def test_no_clients_at_all_are_refused():
    with pytest.raises(UmbelError):
        task_of(nn.Linear(4, 3), [])


def test_nan_in_a_clients_data_is_named():
    x, y = clients()[2]
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match="client 2 has NaN"):
        task_of(nn.Linear(4, 3), clients(c2=(x, y)))


def test_inputs_and_targets_of_different_lengths_are_named():
    with pytest.raises(DataError, match="client 0: 8 inputs but 7 targets"):
        task_of(nn.Linear(4, 3), clients(c0=(torch.zeros(8, 4), torch.zeros(7, dtype=torch.long))))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_names_the_client_and_the_range(label):
    x, y = clients()[1]
    y[2] = label
    with pytest.raises(DataError, match=rf"client 1: label {label} is out of range.*0 to 2"):
        task_of(nn.Linear(4, 3), clients(c1=(x, y)))


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ((torch.zeros(8, 5), torch.zeros(8).long()), r"client 1: inputs have the shape \(5,\), client 0's \(4,\)"),
        (
            (torch.zeros(8, 4), torch.zeros(8, 2).long()),
            r"client 1: targets have the shape \(2,\), client 0's \(\)",
        ),
        ((torch.zeros(8, 4).numpy(), torch.zeros(8).long()), "client 1: inputs are ndarray; give tensors"),
    ],
)
def test_a_client_that_is_not_like_the_others_is_named(client, said):
    with pytest.raises(DataError, match=said):
        task_of(nn.Linear(4, 3), [(torch.zeros(8, 4), torch.zeros(8).long()), client])


def test_a_loss_or_a_client_that_is_not_there_is_named():
    with pytest.raises(DataError, match="loss = 'crossentropy': there are 'cross_entropy', 'mse'"):
        task_of(nn.Linear(4, 3), clients(), loss="crossentropy")
    result = umbel.run(task_of(nn.Linear(4, 3), clients()), umbel.FedAvg(), rounds=1)
    for client in (-1, result.task.num_clients):
        with pytest.raises(DataError, match=f"client {client}: the run has the clients 0 to"):
            result.personal_model(client)


def test_labels_that_are_no_whole_numbers_are_refused():
    with pytest.raises(DataError, match="whole-number labels"):
        task_of(nn.Linear(4, 3), clients(c0=(torch.zeros(8, 4), torch.zeros(8))))


def test_inputs_of_another_type_than_the_model_are_refused():
    with pytest.raises(DataError, match=r"inputs are torch\.float64, the model torch\.float32"):
        task_of(nn.Linear(4, 3), [(x.double(), y) for x, y in clients()])
    with pytest.raises(DataError, match=r"labels are torch\.int32"):
        task_of(nn.Linear(4, 3), [(x, y.int()) for x, y in clients()])


def test_a_client_with_one_sample_cannot_hold_any_back():
    one = (torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(DataError, match="client 2 has one sample"):
        task_of(nn.Linear(4, 3), clients(c2=one))


def test_an_oracle_without_known_groups_is_refused():
    task = task_of(nn.Linear(4, 3), clients())
    with pytest.raises(RecipeError, match="known groups"):
        umbel.run(task, umbel.FLoRAL(adapter=umbel.AdapterPlan(1), router=umbel.Router("oracle")), rounds=1)


def test_an_oracle_with_fewer_adapters_than_groups_is_refused():
    with pytest.raises(RecipeError, match="at least 4"):
        run_recipe(recipe("method.floral.num_adapters=3", "method.floral.router.kind=oracle"))


def test_a_cohort_larger_than_the_clients_that_train_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="clients_per_round = 31, but 30 clients train"):
        run_recipe(recipe("clients_per_round=31", "held_out=0.25"), tmp_path / "run")


def test_batch_norm_with_a_last_batch_of_one_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    task = task_of(model, clients(size=9), test=clients())
    with pytest.raises(DataError, match=r"client 0.*one example.*batch_size"):
        umbel.run(task, umbel.FedAvg(umbel.LocalTraining(batch_size=4)), rounds=1)


def test_a_model_with_nothing_to_train_is_named():
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(ModelError, match=r"every parameter of Linear has requires_grad=False"):
        umbel.run(task_of(model, clients()), umbel.FedAvg(), rounds=1)


def test_a_run_folder_in_the_way_is_refused_before_the_task_is_even_started(tmp_path):
    (tmp_path / "run").mkdir()
    task = task_of(nn.Linear(4, 3), clients())
    with pytest.raises(UmbelError, match="exists"):
        umbel.run(task, umbel.FedAvg(), rounds=1, folder=tmp_path / "run")


def test_a_loss_that_is_not_finite_for_anyone_stops_the_run_with_its_last_checkpoint(tmp_path):
    # lr 1e18 on a squared error: the first round still gives numbers, later ones overflow float32.
    data = [(torch.ones(4, 1), torch.ones(4, 1)) for _ in range(2)]
    task = task_of(nn.Linear(1, 1), data, loss="mse", test=data)
    method = umbel.FedAvg(umbel.LocalTraining(lr=1e18, batch_size=4))
    schedule = umbel.Schedule(rounds=10, checkpoint_every=1)
    with pytest.raises(RoundError, match=r"round \d: .*every client"):
        umbel.run(task, method, schedule=schedule, folder=tmp_path / "run")
    assert RunFolder.opened(tmp_path / "run", {})._checkpoints()


def test_what_a_method_starts_from_stays_where_a_recipe_says_less():
    own = recipe("method.x.name=pfedme", "method.x.local.batch_size=8", label="x").method
    table = load(find("digits"))
    table["local"] = {}
    table["method"] = {
        "pfedme": {"local": {"batch_size": 8}},
        "local_adapter": {"adapter": {"layers": ["linear"]}},
        "fedavg_finetune": {"finetune": {"lr": 0.03}},
        "with_peft": {"name": "local_adapter", "adapter": {"peft": {"r": 2, "target_modules": ["0"]}}},
    }
    assert own.local.lr == load(find("digits"))["local"]["lr"]  # which [local] says for all
    assert read(table, "pfedme").method.local == umbel.LocalTraining(lr=0.005, batch_size=8)
    assert read(table, "local_adapter").method.adapter == umbel.AdapterPlan(0.01, ("linear",))
    assert read(table, "fedavg_finetune").method.finetune == umbel.LocalTraining(lr=0.03, epochs=5)
    assert read(table, "with_peft").method.adapter.peft["r"] == 2


def test_a_pattern_that_matches_nothing_is_named():
    plan = umbel.AdapterPlan(targets=("0.*", "typo.*"))
    with pytest.raises(
        ModelError, match=r"adapter.targets: typo.\* matches no parameter of Sequential; it has 0.weight"
    ):
        plan.bank(nn.Sequential(nn.Linear(4, 3)))


def test_nobody_left_to_train_is_said():
    with pytest.raises(RecipeError, match=r"held_out = 0.9 leaves none of 3 clients to train"):
        umbel.run(
            task_of(nn.Linear(4, 3), clients()), umbel.FedAvg(), schedule=umbel.Schedule(rounds=1, held_out=0.9)
        )


def test_ranks_beside_a_plan_of_pefts_are_refused_by_name():
    with pytest.raises(RecipeError, match="flexlora: ranks are of umbel's own adapters"):
        FlexLoRA((1, 2), umbel.AdapterPlan(peft={"r": 2}))


@pytest.mark.parametrize("setting", [{"warmup": 0.1}, {"decay": "cosine"}, {"precision": "bfloat16"}])
def test_what_fine_tuning_does_not_have_is_refused(setting):
    with pytest.raises(RecipeError, match=f"finetune.{next(iter(setting))}"):
        FedAvgFinetune(finetune=umbel.LocalTraining(**setting))


def test_batches_of_one_example_are_told_of_fine_tuning_too():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    method = FedAvgFinetune(umbel.LocalTraining(batch_size=4), finetune=umbel.LocalTraining(batch_size=5))
    with pytest.raises(DataError, match=r"client 0: .*choose another finetune.batch_size than 5"):
        umbel.run(task_of(model, clients()), method, rounds=1)
