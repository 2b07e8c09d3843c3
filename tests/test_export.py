"""Exported models: stock PEFT, with umbel out of reach, answers what the client's own model answers."""

import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import umbel
from umbel import AdapterPlan, Engine, FedAvg, FLoRAL, LocalTraining, Router, exporting, run, task_of
from umbel.adapters import mix, with_paths
from umbel.adapters.bank import Bank, LowRank
from umbel.adapters.lora_folders import seed_of
from umbel.cli import app
from umbel.errors import DataError, ModelError, RecipeError, RunFolderError
from umbel.exporting import FILES, IN_MEMORY, _public_name, export, truncated
from umbel.methods import METHODS, KNNPer
from umbel.model.copies import copied
from umbel.model.loss import Loss
from umbel.model.pretrained import Pixels, of_transformers
from umbel.model.stacked import stackable
from umbel.seeds import seeded
from umbel.serving import models_of, personal_logits
from umbel.tasks import TASKS
from umbel.tasks.cifar_vit import Enlarging

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of attention under vmap
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated"
    ),  # what PEFT calls in transformers
]

WORDS, CLIENTS = 30, 3
ATTENTION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "gpt2": (
        "causal_lm",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": (
        "causal_lm",
        "LlamaForCausalLM",
        "LlamaConfig",
        ATTENTION | {"vocab_size": WORDS, "num_key_value_heads": 1, "max_position_embeddings": 16},
    ),
    "bert": (
        "text",
        "BertForSequenceClassification",
        "BertConfig",
        ATTENTION | {"vocab_size": WORDS, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0},
    ),
    "roberta": (
        "text",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        ATTENTION | {"vocab_size": WORDS, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 1},
    ),
    "vit": (
        "image",
        "ViTForImageClassification",
        "ViTConfig",
        ATTENTION | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "resnet": (
        "image",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
    ),
}
LORA = {"r": 2, "lora_alpha": 3}
CASES = {
    "gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2, words, rslora": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "use_rslora": True}),
    "llama, patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 4, "layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "embed_tokens": 0.7},
            "use_rslora": True,
        },
    ),
    "llama, some layers": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "bert": ("bert", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "bert, words": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "roberta": ("roberta", {"target_modules": ["query", "value"]}),
    "vit": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "resnet": ("resnet", {"target_modules": ["convolution"]}),
}


def model_of(name):
    kind, model, config, settings = MODELS[name]
    with seeded(0, "test", name):
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        for leaf in made.parameters():
            if leaf.dim() > 1:
                leaf.data.mul_(6)
    return made, kind


def inputs(kind, *leading, seed=1):
    draw = torch.Generator().manual_seed(seed)
    if kind == "image":
        return torch.randn(*leading, 3, 8, 8, generator=draw)
    return torch.randint(2, WORDS, (*leading, 6), generator=draw)


def task(name, base=""):
    model, kind = model_of(name)
    clients = []
    for k in range(CLIENTS):
        x = inputs(kind, 8 + 8 * k, seed=k)
        clients.append((x, x.roll(-1, -1) if kind == "causal_lm" else torch.arange(len(x)) % 3))
    return task_of(of_transformers(model, kind, base), clients)


def floral(peft, **settings):
    return FLoRAL(
        num_adapters=2,
        adapter=AdapterPlan(peft=LORA | peft),
        router=settings.pop("router", Router("gradient", lr=5.0)),
        local=LocalTraining(lr=0.05, batch_size=2),
        **settings,
    )


def trained(name, peft, base="", **settings):
    return run(task(name, base), floral(peft, **settings), rounds=2, engine=Engine("looped"))


def loaded(name, folder):
    """Stock PEFT's model of that folder, on a base as it was."""
    model, _ = model_of(name)
    return PeftModel.from_pretrained(model, folder).eval()


def answers(model, kind, x):
    with torch.no_grad():
        if kind == "image":
            return model(pixel_values=x).logits
        extra = {} if kind == "causal_lm" else {"attention_mask": torch.ones_like(x)}
        return model(input_ids=x, **extra).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("name", "peft"), CASES.values(), ids=CASES)
def test_the_folders_model_is_the_clients_own(name, peft, tmp_path):
    result = trained(name, peft)
    kind = MODELS[name][0]
    folders = [tmp_path / f"{k}" for k in range(CLIENTS)]
    done = list(export(result, folders, range(CLIENTS)))
    assert [one.folder for one in done] == folders
    assert not any(one.errors for one in done)
    ranks = [LORA["r"], *peft.get("rank_pattern", {}).values()]
    assert {one.rank for one in done} == {2 * max(ranks)}
    x = inputs(kind, 5, seed=9)
    base = answers(model_of(name)[0].eval(), kind, x)
    for k in range(CLIENTS):
        with torch.no_grad():
            own = result.personal_model(k)(x)
        found = answers(loaded(name, folders[k]), kind, x)
        assert_close(found, own, rtol=1e-5, atol=1e-5)
        assert (found - base).abs().max() > 1e-3
        if k == 1 and "wte" not in peft["target_modules"]:  # merged into a tied head it is another model
            merged = loaded(name, folders[k]).merge_and_unload()
            assert_close(answers(merged, kind, x), own, rtol=1e-3, atol=1e-4)


def test_stock_peft_loads_it_where_umbel_cannot_be_imported(tmp_path):
    result = trained("bert", {"target_modules": ["query", "dense"]}, "bert-base-uncased")
    list(export(result, [tmp_path / "own"], [1]))
    model, kind = model_of("bert")
    model.save_pretrained(tmp_path / "base")
    x = inputs(kind, 4, seed=9)
    torch_x = tmp_path / "x.json"
    torch_x.write_text(json.dumps(x.tolist()))
    code = f"""
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "umbel":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "own")!r}).eval()
x = torch.tensor(json.load(open({str(torch_x)!r})))
with torch.no_grad():
    logits = model(input_ids=x, attention_mask=torch.ones_like(x)).logits
try:
    import umbel
except ImportError:
    print(json.dumps(logits.tolist()))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    found = torch.tensor(json.loads(ran.stdout.strip().splitlines()[-1]))
    with torch.no_grad():
        assert_close(found, result.personal_model(1)(x), rtol=1e-5, atol=1e-5)


def test_the_card_says_how_a_head_on_mean_states_is_used(tmp_path):
    made, kind = model_of("bert")
    x = inputs(kind, 8)
    mean = of_transformers(made, kind, pooling="mean")
    mean.separate(9)  # as for pairs that BERT reads together
    own_task = task_of(mean, [(x, torch.arange(8) % 3)] * 2)
    method = floral({"target_modules": ["query", "dense"]})
    result = run(own_task, method, rounds=2, engine=Engine("looped"))
    list(export(result, [tmp_path / "own", tmp_path / "other"], [1, 0]))
    card = (tmp_path / "own" / "README.md").read_text()
    code = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    input_ids = inputs(kind, 4, seed=9)
    input_ids[0, 3:] = 0
    mask = (input_ids != 0).long()
    read = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": mean._places(input_ids)[1]}
    known = {"base_model": model_of("bert")[0].eval(), "folder": tmp_path / "own", "read": read}
    exec("\n".join(code), known)
    with torch.no_grad():
        assert_close(known["logits"], result.personal_model(1)(input_ids), rtol=1e-5, atol=1e-5)
    list(export(trained("bert", {"target_modules": ["query"]}), [tmp_path / "plain"], [1]))
    assert "last_hidden_state" not in (tmp_path / "plain" / "README.md").read_text()


def test_the_card_says_how_a_head_on_pairs_is_used(tmp_path):
    made, kind = model_of("bert")
    apart = of_transformers(made, kind, pooling="pairs")
    apart.separate(9)
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randint(1, 9, (8, 3), generator=draw) for _ in range(2))
    one[:, 2] = two[:, 2] = 9
    x = torch.cat([one, two], 1)
    result = run(
        task_of(apart, [(x, torch.arange(8) % 3)] * 2),
        floral({"target_modules": ["query", "dense"]}),
        rounds=2,
        engine=Engine("looped"),
    )
    list(export(result, [tmp_path / "own"], [1]))
    card = (tmp_path / "own" / "README.md").read_text()
    code = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    told = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "token_type_ids": torch.zeros_like(part)}
        for part in (one, two)
    ]
    known = {"base_model": model_of("bert")[0].eval(), "folder": tmp_path / "own"}
    known |= dict(zip(("first", "second"), told, strict=True))
    exec("\n".join(code), known)
    with torch.no_grad():
        assert_close(known["logits"], result.personal_model(1)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", [(8, 8), (4, 4)])
def test_the_card_says_what_becomes_of_images(seen, tmp_path):
    made, kind = model_of("vit")
    own = of_transformers(made, kind) if seen == (4, 4) else Enlarging(of_transformers(made, kind).model, kind)
    small = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    own.pixels = Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (4, 4), (8, 8))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in own.pixels[:2])
    x = (small - mean) / deviation
    if seen == (4, 4):  # as a base that takes them as they are
        own.pixels = own.pixels._replace(given=(8, 8))
        small = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        x = (small - mean) / deviation
    result = run(task_of(own, [(x, torch.arange(6) % 3)] * 2), floral({"target_modules": ".*q.*"}), rounds=2)
    list(export(result, [tmp_path / "own"], [1]))
    card = (tmp_path / "own" / "README.md").read_text()
    assert ("enlarged to 8 × 8" in card) == (seen == (8, 8))
    code = "\n".join(line.strip() for line in card.splitlines() if line.startswith("    "))
    known = {"base_model": model_of("vit")[0].eval(), "folder": tmp_path / "own", "images": small, "torch": torch}
    with torch.no_grad():
        exec(code, known)
        assert_close(known["logits"], result.personal_model(1)(x), rtol=1e-5, atol=1e-5)


def test_the_card_says_which_outputs_are_to_be_compared(tmp_path):
    made, kind = model_of("bert")
    x = inputs(kind, 8)
    one = task_of(of_transformers(made, kind), [(x, torch.arange(8) % 3)] * 2)
    method = floral({"target_modules": ["query"]})
    for each in (0, 2):
        result = run(replace(one, labels_each=each), method, rounds=1, engine=Engine("looped"))
        list(export(result, [tmp_path / str(each)], [0]))
        told = (tmp_path / str(each) / "README.md").read_text()
        assert ("several tasks, 2 in a row for each" in told) == (each == 2)


def test_what_clients_of_different_sizes_remember_is_served_together():
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(n, 3, generator=draw), torch.arange(n) % 2) for n in (6, 9, 12)]
    own = task_of(torch.nn.Linear(3, 2), clients, test=clients)
    result = run(own, KNNPer(local=LocalTraining(lr=0.1)), rounds=1, engine=Engine("looped"))
    x, whose = torch.randn(4, 3, generator=draw), torch.tensor([0, 2, 1, 0])
    found = personal_logits(models_of(result, [0, 1, 2]), x, whose)
    for row, client in enumerate(whose.tolist()):
        with torch.no_grad():
            assert_close(found[row], result.personal_model(client)(x[row : row + 1])[0])


def test_scalings_are_exactly_the_layers(tmp_path):
    name, peft = CASES["llama, patterns"]
    for rslora in (False, True):
        peft = peft | {"use_rslora": rslora}
        result = trained(name, peft)
        folder = tmp_path / str(rslora)
        list(export(result, [folder], [0]))
        model = loaded(name, folder)
        module = result.cohort.loss.module.model
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                own = module.get_submodule(path)
                assert layer.scaling["default"] == pytest.approx(own.scaling["default"], rel=1e-15)
                assert layer.r["default"] == 2 * own.r["default"]


def test_a_truncated_folder_is_the_nearest_of_its_rank(tmp_path):
    result = trained("gpt2", {"target_modules": ["c_attn", "wte"]}, init_std=1.0)
    (exact,) = export(result, [tmp_path / "exact"], [0])
    (low,) = export(result, [tmp_path / "low"], [0], rank=3)
    (high,) = export(result, [tmp_path / "high"], [0], rank=4)
    assert (exact.rank, low.rank, low.full_rank, high.rank) == (4, 3, 4, 4)
    assert set(low.errors) == {"transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    assert set(high.errors.values()) == {0.0}
    tensors = [load_file(tmp_path / which / "adapter_model.safetensors") for which in ("exact", "low", "high")]
    assert all(torch.equal(leaf, tensors[2][name]) for name, leaf in tensors[0].items())
    for layer, error in low.errors.items():
        names = [n for n in tensors[0] if n.startswith(f"base_model.model.{layer}.")]
        whole, cut = (t[sorted(names)[1]].double() @ t[sorted(names)[0]].double() for t in tensors[:2])
        s = torch.linalg.svdvals(whole)
        assert torch.linalg.matrix_rank(cut, rtol=1e-5) <= 3
        assert error == pytest.approx(float((whole - cut).norm() / whole.norm()), rel=1e-4)
        assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
    x = inputs("causal_lm", 3)
    off = (answers(loaded("gpt2", tmp_path / "low"), "causal_lm", x) - result.personal_model(0)(x)).abs().max()
    assert 1e-6 < off < 5


@pytest.mark.parametrize("shape", [((6, 5), (7, 6)), ((6, 3, 2, 2), (7, 6, 1, 1)), ((3, 50), (8, 3))])
def test_truncation_is_eckart_youngs(shape):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(one, generator=draw) for one in shape)
    new_a, new_b, error = truncated(a, b, 2)
    assert new_a.shape == (2, *a.shape[1:])
    assert new_b.shape == (len(b), 2, *b.shape[2:])
    whole, cut = (y.flatten(1).double() @ x.flatten(1).double() for x, y in ((a, b), (new_a, new_b)))
    s = torch.linalg.svdvals(whole)
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-6)
    assert error == pytest.approx(float((whole - cut).norm() / whole.norm()), rel=1e-5)
    assert truncated(a, torch.zeros_like(b), 2)[2] == 0


WITH_PLANS = [name for name, cls in METHODS.items() if "adapter" in cls.__dataclass_fields__ and name != "floral"]


@pytest.mark.parametrize("name", WITH_PLANS)
def test_any_method_with_a_plan_of_pefts_is_exported(name, tmp_path):
    method = METHODS[name](adapter=AdapterPlan(peft=LORA | {"target_modules": ["query"]}))
    method = replace(method, local=LocalTraining(lr=0.05, batch_size=2))
    if name == "feddpa":
        gated = run(task("bert"), method, rounds=1, engine=Engine("stacked"))
        with pytest.raises(RecipeError, match="feddpa: a gate weighs"):
            export(gated, [tmp_path / "gated"], [0])
        method = replace(method, gate="constant")
    result = run(task("bert"), method, rounds=2, engine=Engine("stacked"))
    folders = [tmp_path / str(k) for k in range(CLIENTS)]
    list(export(result, folders, range(CLIENTS)))
    x = inputs("text", 5, seed=9)
    for k, folder in enumerate(folders):
        with torch.no_grad():
            assert_close(
                answers(loaded("bert", folder), "text", x), result.personal_model(k)(x), rtol=1e-5, atol=1e-5
            )
    if name != "fl_tac":
        with pytest.raises(RecipeError, match=rf"{name} has no bank of adapters"):
            export(result, [tmp_path / "a"], adapter=0)


def test_a_single_adapter_is_the_model_that_uses_it_alone(tmp_path):
    result = trained("bert", {"target_modules": ["query"]})
    bank: Bank = result.progress.shared.bank
    (one,) = export(result, [tmp_path / "one"], adapter=1)
    assert one.rank == LORA["r"]
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for part in bank.low_rank:
        for name in (part.a_name, part.b_name):
            stock = "base_model." + name.replace(".default", "")
            assert torch.equal(tensors[stock], result.progress.shared.adapters[name][1])
    assert torch.equal(
        tensors["base_model.model.classifier.weight"], result.progress.shared.base["model.classifier.weight"]
    )
    loaded("bert", tmp_path / "one")
    with pytest.raises(RecipeError, match="adapter 2: the run has the adapters 0, 1"):
        export(result, [tmp_path / "two"], adapter=2)


def test_a_cluster_of_fl_tac_is_exported_as_its_slots_serve_it(tmp_path):
    plan, local = AdapterPlan(peft=LORA | {"target_modules": ["query"]}), LocalTraining(lr=0.05, batch_size=2)
    result = run(task("bert"), METHODS["fl_tac"](num_clusters=2, adapter=plan, local=local), rounds=2)
    shared, x = result.progress.shared, inputs("text", 5, seed=9)
    for cluster in shared.cluster.unique().tolist():
        list(export(result, [tmp_path / f"cluster{cluster}"], adapter=cluster))
        slot = int((shared.cluster == cluster).nonzero()[0])
        with torch.no_grad():
            answered = answers(loaded("bert", tmp_path / f"cluster{cluster}"), "text", x)
            assert_close(answered, result.personal_model(slot)(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RecipeError, match="adapter 7: the run has slots in the clusters"):
        export(result, [tmp_path / "none"], adapter=7)


def test_a_frozen_head_travels_too(tmp_path):
    result = trained("bert", {"target_modules": ["query"]}, freeze_base=True)
    list(export(result, [tmp_path / "own"], [0]))
    other, _ = model_of("bert")
    nn.init.normal_(other.classifier.weight)
    x = inputs("text", 4)
    found = answers(PeftModel.from_pretrained(other, tmp_path / "own").eval(), "text", x)
    with torch.no_grad():
        assert_close(found, result.personal_model(0)(x), rtol=1e-5, atol=1e-5)


def test_a_base_of_the_data_folder_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert _public_name("models/small") == "models/small"
    (tmp_path / "models" / "small" / "config.json").write_text("{}")
    assert _public_name("models/small") == "small"


@pytest.mark.parametrize(
    ("base", "said"),
    [("org/model", "org/model"), ("/home/someone/secret/model-x", "model-x"), ("a/b/c", "c"), ("./here", "here")],
)
def test_the_folder_says_where_it_comes_from_and_nothing_of_data_or_machines(base, said, tmp_path):
    result = trained("bert", {"target_modules": ["query"]}, base)
    list(export(result, [tmp_path / "own"], [2], identity="abc123"))
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = (tmp_path / "own" / "README.md").read_text()
    for word in ("Client 2", said, "floral", "abc123", "| round | 2 |", f"| umbel | {umbel.__version__} |"):
        assert word in card
    config = (tmp_path / "own" / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == said
    for text in (card, config):
        assert not re.search(r"(^|[\s\"'])[/~]\w", text, re.MULTILINE)
        assert "someone" not in text
        assert str(tmp_path) not in text


def test_the_same_folder_twice_is_the_same_bytes(tmp_path):
    result = trained("llama", CASES["llama, patterns"][1])
    list(export(result, [tmp_path / "a", tmp_path / "b"], [0, 0]))
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path, monkeypatch):
    result = trained("bert", {"target_modules": ["query"]})
    own, other = tmp_path / "own", tmp_path / "other"
    list(export(result, [own], [0]))
    before = (own / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match=r"own exists and is left as it is; .*--replace"):
        export(result, [other, own], [0, 1])
    assert not other.exists()
    list(export(result, [own], [1], overwrite=True))
    assert (own / "adapter_model.safetensors").read_bytes() != before
    (other).mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"other is not replaced.*thesis\.txt"):
        export(result, [other], [0], overwrite=True)
    after = (own / "adapter_model.safetensors").read_bytes()

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umbel.exporting.save_tensors", full)
    with pytest.raises(RunFolderError, match="own cannot be written: No space left"):
        list(export(result, [own], [0], overwrite=True))
    assert (own / "adapter_model.safetensors").read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own"]


def test_runs_without_pefts_adapters_are_refused(tmp_path):
    own = FLoRAL(num_adapters=2, adapter=AdapterPlan(rank=1, layers=("linear",)), freeze_base=True)
    for method, name in ((own, "floral"), (FedAvg(), "fedavg")):
        result = run(task("bert"), method, rounds=1)
        with pytest.raises(RecipeError, match=rf"{name}: this run has no adapter made by PEFT.*adapter\.peft"):
            export(result, [tmp_path / "a"], [0])


def test_clients_and_ranks_that_are_not_there_are_refused(tmp_path):
    result = trained("bert", {"target_modules": ["query"]})
    with pytest.raises(RecipeError, match="client 3: the run has the clients 0 to 2"):
        export(result, [tmp_path / "a"], [3])
    with pytest.raises(RecipeError, match="rank = -1"):
        export(result, [tmp_path / "a"], [0], rank=-1)
    with pytest.raises(RunFolderError, match="1 models want as many folders, got 2"):
        export(result, [tmp_path / "a", tmp_path / "b"], [0])
    with pytest.raises(RunFolderError, match="a is named twice"):
        export(result, [tmp_path / "a", tmp_path / "a"], [0, 1])
    assert not [*tmp_path.iterdir()]


def test_a_module_of_ones_own_is_exported(tmp_path):
    def made():
        with seeded(0, "test"):
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    module = made()
    module[:3].requires_grad_(False)
    x = torch.randn(CLIENTS, 6, 6, generator=torch.Generator().manual_seed(0))
    result = run(
        task_of(module, [(own, torch.arange(6) % 3) for own in x]),
        floral({"target_modules": ["0", "2"]}),
        rounds=2,
    )
    list(export(result, [tmp_path / "own"], [1]))
    stock = PeftModel.from_pretrained(made(), tmp_path / "own").eval()
    with torch.no_grad():
        assert_close(stock(x[1]), result.personal_model(1)(x[1]))


def test_a_head_that_peft_would_mistake_for_a_layer_is_refused(tmp_path):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    module.add_module("10", nn.Linear(3, 3))
    module[1:].requires_grad_(False)
    clients = [(torch.randn(6, 6), torch.arange(6) % 3) for _ in range(2)]
    result = run(task_of(module, clients), floral({"target_modules": ["2"]}), rounds=1)
    with pytest.raises(ModelError, match=r"0 has trained tensors of its own.*could not tell 10 from it"):
        list(export(result, [tmp_path / "own"], [1]))


# In: folders as what a bank starts from.


def saved(folder, peft, name="bert", std=0.3, **more):
    """A folder that PEFT itself has written, and its model."""
    model, _ = model_of(name)
    stock = get_peft_model(model, LoraConfig(**LORA | peft, **more))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, leaf in stock.named_parameters():
            if "lora_" in n:
                leaf.copy_(torch.randn(leaf.shape, generator=draw) * std)
    stock.save_pretrained(folder, save_embedding_layers=False)
    return stock.eval()


SEEDS = {
    "same": ({}, {}),
    "a smaller rank": ({"r": 1, "lora_alpha": 5}, {}),
    "rslora into plain": ({"use_rslora": True}, {}),
    "plain into rslora": ({}, {"use_rslora": True, "r": 3}),
    "patterns": (
        {"rank_pattern": {"query": 1}, "alpha_pattern": {"layer.0.attention.self.query": 9}},
        {"r": 4, "alpha_pattern": {"word_embeddings": 2.5}},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), SEEDS.values(), ids=SEEDS)
def test_a_bank_starts_from_folders_with_their_very_products(theirs, ours, tmp_path):
    targets = {"target_modules": ["query", "word_embeddings"]}
    stock = saved(tmp_path / "first", targets | theirs)
    plan = AdapterPlan(peft=LORA | targets | ours, seeds=(str(tmp_path / "first"),))
    method = replace(floral({}), adapter=plan)
    module = task("bert").model
    bank = method.bank(module)
    drawn = Bank.drawn(bank, 2, torch.Generator().manual_seed(0), 0.3)
    adapters = bank.init(2, torch.Generator().manual_seed(0), 0.3)
    assert all(torch.equal(leaf[1], drawn[n][1]) for n, leaf in adapters.items())
    x = inputs("text", 4)
    loss = Loss(stackable(with_paths(copied(module), bank)), "cross_entropy")
    with torch.no_grad():
        params = mix(bank, {}, {n: leaf[None] for n, leaf in adapters.items()}, torch.tensor([[1.0, 0.0]]))
        assert_close(loss.outputs(params, x[None])[0], answers(stock, "text", x), rtol=1e-5, atol=1e-5)
    for part in bank.low_rank:  # what the folder lacks can still be trained
        own = bank.seeds[0][part.a_name]
        a, b = adapters[part.a_name][0], adapters[part.b_name][0]
        assert torch.equal(a[len(own) :], drawn[part.a_name][0, len(own) :])
        assert (b[:, len(own) :] == 0).all()


def test_what_was_exported_can_be_gone_on_with(tmp_path):
    targets = {"target_modules": ["query"]}
    result = trained("bert", targets)
    list(export(result, [tmp_path / "own"], [1]))
    plan = AdapterPlan(peft=LORA | targets | {"r": 4}, seeds=(str(tmp_path / "own"),))
    shared, _ = replace(floral({}), adapter=plan).init(task("bert").model, umbel.methods.Population(3, 0))
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    for part in shared.bank.low_rank:
        a, b = (tensors["base_model." + n.replace(".default", "")] for n in (part.a_name, part.b_name))
        scaling = (3 * 4 / 2) / 4  # of the exported rank 4
        found = part.scaling * shared.adapters[part.b_name][0] @ shared.adapters[part.a_name][0]
        assert_close(found, scaling * b @ a)


@pytest.mark.parametrize("name", ["fedsa_lora", "ffa_lora", "flexlora", "local_adapter"])
def test_methods_with_one_adapter_start_from_a_folder(name, tmp_path):
    stock = saved(tmp_path / "first", {"target_modules": ["query"]})
    plan = AdapterPlan(peft=LORA | {"target_modules": ["query"]}, seeds=(str(tmp_path / "first"),))
    local = LocalTraining(lr=1e-12)
    result = run(task("bert"), METHODS[name](adapter=plan, local=local), rounds=1)
    x = inputs("text", 4)
    with torch.no_grad():
        assert_close(result.personal_model(0)(x), answers(stock, "text", x), rtol=1e-5, atol=1e-5)


def test_a_real_adapter_of_two_factors_a_layer_keeps_its_products(tmp_path):
    source = Path(os.environ.get("UMBEL_DATA", "nowhere")) / "models" / "roberta_base_lora_mnli_AB.safetensors"
    if not source.is_file():
        pytest.skip(f"{source} is not there; set UMBEL_DATA")
    theirs = load_file(source)
    save_file({f"base_model.model.{n}.weight": leaf for n, leaf in theirs.items()}, tmp_path / FILES[0])
    (tmp_path / FILES[1]).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    paths = sorted({n.rpartition(".")[0] for n in theirs})
    parts = []
    for path in paths:
        names = f"model.{path}.lora_A.default.weight", f"model.{path}.lora_B.default.weight"
        parts.append(LowRank(f"model.{path}.weight", "linear", (768, 768), 12, (), True, names, scaling=0.3))
    seed = seed_of(parts, str(tmp_path))
    assert len(seed) == len(theirs) == 48
    for path, part in zip(paths, parts, strict=True):
        wanted = 16 / 8 * theirs[f"{path}.lora_B"] @ theirs[f"{path}.lora_A"]
        assert wanted.abs().max() > 0.01
        assert_close(part.scaling * seed[part.b_name] @ seed[part.a_name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"target_modules": ["query"]}, {"target_modules": ["query", "key"]}, r"has no layer bert\..*0.*\.key"),
        ({"target_modules": ["query", "key"]}, {"target_modules": ["query"]}, r"adapts bert\..*\.key, which"),
        (
            {"target_modules": ["query"], "r": 5},
            {"target_modules": ["query"]},
            r"layer bert.*query: its rank 5 is larg",
        ),
        ({"target_modules": ["query"], "use_dora": True}, {"target_modules": ["query"]}, r"two factors"),
    ],
)
def test_folders_that_do_not_fit_name_the_layer(theirs, ours, said, tmp_path):
    saved(tmp_path / "first", theirs)
    plan = AdapterPlan(peft=LORA | ours, seeds=(str(tmp_path / "first"),))
    with pytest.raises(RecipeError, match=said):
        plan.bank(task("bert").model)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"rank_pattern": {"(": 3}}, r"query: adapter_config\.json has a rank_pattern that is none"),
        ({"alpha_pattern": [3]}, r"query: adapter_config\.json has alpha_pattern = \[3\], and a table is wanted"),
    ],
)
def test_folders_with_patterns_that_are_none_are_refused(told, said, tmp_path):
    saved(tmp_path / "first", {"target_modules": ["query"]})
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with pytest.raises(RecipeError, match=said):
        AdapterPlan(peft=LORA | {"target_modules": ["query"]}, seeds=(str(tmp_path / "first"),)).bank(
            task("bert").model
        )


def test_a_folder_made_for_another_base_is_told(tmp_path, caplog):
    saved(tmp_path / "first", {"target_modules": ["query"]})
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/tiny"}))
    made, kind = model_of("bert")
    plan = AdapterPlan(peft=LORA | {"target_modules": ["query"]}, seeds=(str(tmp_path / "first"),))
    plan.bank(of_transformers(made, kind, "somewhere/tiny"))
    assert not caplog.records
    plan.bank(of_transformers(made, kind, "org/other"))
    assert "first is an adapter of org/tiny, and this base is org/other" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["query", "q_porj"]},
            r"target_modules: q_porj is the name of no layer; .*query, .*value",
        ),
        ({"target_modules": ["q_porj"]}, r"layers of Bert\w+ are called .*query, .*value"),
        ({"target_modules": ".*q_porj"}, r"layers of Bert\w+ are called .*query, .*value"),
        (
            {"target_modules": ["query"], "rank_pattern": {"quary": 3}},
            r"rank_pattern: quary matches no .*encoder.*query",
        ),
        ({"target_modules": ["query"], "alpha_pattern": {"key": 3}}, r"alpha_pattern: key matches no adapted"),
    ],
)
def test_names_of_no_layer_are_refused(settings, said):
    with pytest.raises(ModelError, match=said):
        AdapterPlan(peft=LORA | settings).bank(task("bert").model)


def test_other_bases_folders_no_folders_and_too_many_are_refused(tmp_path):
    query = {"target_modules": ["query"]}
    saved(tmp_path / "first", query)
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    wide = {n: leaf.repeat(1, 2) if "lora_A" in n else leaf for n, leaf in tensors.items()}
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide" / "adapter_model.safetensors")
    (tmp_path / "wide" / "adapter_config.json").write_bytes((tmp_path / "first/adapter_config.json").read_bytes())
    module = task("bert").model
    for folder, said in (
        ("wide", r"query: A \(2, 32\) and B \(16, 2\) do not fit"),
        ("none", "is no folder with"),
    ):
        with pytest.raises(RecipeError, match=said):
            AdapterPlan(peft=LORA | query, seeds=(str(tmp_path / folder),)).bank(module)
    three = AdapterPlan(peft=LORA | query, seeds=(str(tmp_path / "first"),) * 3)
    with pytest.raises(RecipeError, match=r"adapter\.seeds: 3 folders for 2 adapters"):
        replace(floral({}), adapter=three).init(module, umbel.methods.Population(3, 0))
    with pytest.raises(RecipeError, match=r"adapter\.seeds: .*set adapter\.peft"):
        AdapterPlan(seeds=("a",))


# Serving.


@pytest.mark.parametrize(
    ("name", "peft"), [CASES[c] for c in ("bert", "gpt2, words, rslora", "vit", "resnet")], ids=str
)
def test_rows_of_many_clients_in_one_batch_are_each_clients_own(name, peft):
    result = trained(name, peft)
    kind = MODELS[name][0]
    clients = torch.tensor([2, 0, 2, 2, 1, 0, 2])
    x = inputs(kind, len(clients), seed=11)
    with torch.no_grad():
        own = torch.cat([result.personal_model(k)(x[i : i + 1]) for i, k in enumerate(clients.tolist())])
    models = models_of(result, [0, 1, 2])
    for one in (models, result):
        assert_close(personal_logits(one, x, clients), own, rtol=1e-5, atol=1e-5)
    for some in ([4], [0, 2, 3], [1, 4]):
        assert_close(personal_logits(models, x[some], clients[some]), own[some], rtol=1e-5, atol=1e-5)


def test_serving_a_model_that_cannot_be_stacked_goes_one_by_one():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) if bool((x.sum() != 0).all()) else x

    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    clients = [(own, torch.arange(6) % 3) for own in x]
    result = run(task_of(Choosing(), clients), METHODS["local"](), rounds=1)
    rows, whose = x[:, 0], torch.tensor([2, 0, 1])
    with torch.no_grad():
        own = torch.cat([result.personal_model(k)(rows[i : i + 1]) for i, k in enumerate(whose.tolist())])
    assert_close(personal_logits(result, rows, whose), own)


@pytest.mark.parametrize("engine", [Engine("looped"), Engine("stacked", chunk=2)], ids=("looped", "two"))
def test_a_model_for_all_is_not_copied_for_each(engine):
    result = run(task("bert"), FedAvg(), rounds=1, engine=engine)
    models = models_of(result, [2, 0, 1])
    assert models.clients.tolist() == [0, 1, 2]
    assert all(leaf.stride(0) == 0 for leaf in models.params.values())


def test_rows_of_nobody_are_refused():
    result = trained("bert", {"target_modules": ["query"]})
    x = inputs("text", 2)
    models = models_of(result, [0, 1])
    for whose, said in ((torch.tensor([0, 2]), "client 2 has no model"), (torch.tensor([0]), "2 rows")):
        with pytest.raises(DataError, match=said):
            personal_logits(models, x, whose)
    with pytest.raises(DataError, match="client 7: the run has"):
        personal_logits(result, x, torch.tensor([0, 7]))
    for rows, said in ((x.repeat(1, 9), "cannot read a text of .* tokens"), (x + 99, "a text has the id")):
        with pytest.raises(DataError, match=said):
            personal_logits(models, rows, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="no rows"):
        personal_logits(models, x[:0], torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="no clients"):
        models_of(result, [])


# The command.


@dataclass(frozen=True)
class Tiny:
    """A tiny BERT."""

    name_of_model: str = "bert"

    def load(self, seed):
        return task(self.name_of_model, "org/tiny")


RECIPE = """
rounds = 2
[task]
name = "tiny"
[engine]
mode = "looped"
[method.floral]
name = "floral"
num_adapters = 2
adapter.peft = { r = 2, lora_alpha = 3, target_modules = ["query", "value"], rank_pattern = { value = 1 } }
local = { lr = 0.05, batch_size = 2 }
[method.fedavg]
name = "fedavg"
"""


@pytest.fixture
def in_runs(tmp_path, monkeypatch):
    """A working directory with runs/tiny-floral-seed0 and -fedavg- in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "tiny", Tiny)
    Path("tiny.toml").write_text(RECIPE)
    for label in ("floral", "fedavg"):
        said("run", "tiny.toml", "--method", label, "--quiet")
    return tmp_path


def said(*args, code=0):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def test_the_command_exports_clients_adapters_and_everyone(in_runs):
    folder = "runs/tiny-floral-seed0"
    text = said("export", folder, "--client", 1)
    assert "rank 4, exact" in text
    assert "folder: runs/tiny-floral-seed0/export/client-0001" in text
    identity = json.loads(Path(folder, "run.json").read_text())["identity"]
    card = Path(folder, "export/client-0001/README.md").read_text()
    assert identity in card
    assert "org/tiny" in card
    assert str(in_runs) not in card
    assert "left as it is" in said("export", folder, "--client", 1, code=2)
    said("export", folder, "--client", 1, "--replace")
    said("export", folder, "--adapter", 0, "--out", "first")
    assert Path("first/adapter_config.json").is_file()
    text = said("export", folder, "--all", "--out", "everyone", "--rank", 1)
    assert re.search(r"rank 1 of 4", text)
    assert re.search(r"all layers.*%.*%", text)
    assert "everyone (3 folders)" in text
    assert sorted(path.name for path in Path("everyone").iterdir()) == [f"client-000{k}" for k in range(3)]
    done = json.loads(said("export", folder, "--client", "0,2", "--out", "two", "--rank", 1, "--json"))
    assert [one["folder"] for one in done["exported"]] == ["two/client-0000", "two/client-0002"]
    assert all(0 <= error < 1 for one in done["exported"] for error in one["errors"].values())
    x = inputs("text", 3)
    with torch.no_grad():
        own = umbel.runs.opened(folder).personal_model(1)(x)
    assert_close(answers(loaded("bert", f"{folder}/export/client-0001"), "text", x), own, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Drawn:
    """A frozen layer drawn by the seed, and a head."""

    def load(self, seed):
        with seeded(seed, "drawn"):
            module = nn.Sequential(OrderedDict(dense=nn.Linear(6, 8), tanh=nn.Tanh(), classifier=nn.Linear(8, 3)))
        module.dense.requires_grad_(False)
        x = torch.randn(CLIENTS, 6, 6, generator=torch.Generator().manual_seed(0))
        return task_of(module, [(own, torch.arange(6) % 3) for own in x])


def test_a_base_without_a_name_is_had_from_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "tiny", Drawn)
    Path("tiny.toml").write_text(RECIPE.replace('["query", "value"], rank_pattern = { value = 1 }', '["dense"]'))
    said("run", "tiny.toml", "--method", "floral", "--quiet")
    folder = "runs/tiny-floral-seed0"
    made = f'umbel.runs.opened("{folder}").task.model'
    assert made in said("export", folder, "--client", 1)
    assert IN_MEMORY in Path(folder, "export/client-0001/README.md").read_text()
    stock = PeftModel.from_pretrained(umbel.runs.opened(folder).task.model, f"{folder}/export/client-0001").eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert_close(stock(x), umbel.runs.opened(folder).personal_model(1)(x))


def test_who_stops_the_command_is_told_what_was_written(in_runs, monkeypatch):
    place, places = exporting._place, []

    def stopping(folder, *rest):
        if places:
            raise KeyboardInterrupt
        places.append(folder)
        place(folder, *rest)

    monkeypatch.setattr(exporting, "_place", stopping)  # the second folder, and every later one
    text = said("export", "runs/tiny-floral-seed0", "--all", "--out", "some", code=130)
    assert "1 of 3 folders are whole, in some; --replace writes all anew" in text
    assert [path.name for path in Path("some").iterdir()] == ["client-0000"]
    text = said("export", "runs/tiny-floral-seed0", "--all", "--out", "none", code=130)
    assert "stopped before anything was written" in text


def test_the_command_says_what_it_cannot_do(in_runs):
    for args, expected in (
        ((), "whose model?"),
        (("--client", 1, "--all"), "whose model?"),
        (("--client", "x"), "whole numbers"),
        (("--client", 9), "client 9: the run has the clients 0 to 2"),
        (("--adapter", 5), "adapter 5: the run has the adapters 0, 1"),
    ):
        assert expected in said("export", "runs/tiny-floral-seed0", *args, code=2)
    assert "fedavg: this run has no adapter made by PEFT" in said(
        "export", "runs/tiny-fedavg-seed0", "--client", 0, code=2
    )
    assert "no recipe.toml" in said("export", "runs", "--client", 0, code=2)
