"""PEFT's LoRA layers: what they add, to which layers, and that clients in one pass are what each is alone."""

import re
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from umbel import AdapterPlan, Engine, FLoRAL, LocalTraining, Router, run, task_of
from umbel.adapters import mix, with_paths
from umbel.adapters.lora_layers import factor_names, lora_layers, parts_of
from umbel.clients import ClientData, Examples
from umbel.errors import ModelError, RecipeError
from umbel.methods.routing import losses_of
from umbel.model.dropout import KEY, seed_dropout
from umbel.model.loss import Loss
from umbel.model.pretrained import Pretrained, of_transformers
from umbel.model.stacked import stackable
from umbel.seeds import seeded

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap

K, B, C, WORDS = 3, 4, 2, 40
TEXT = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
CONV = {"hidden_sizes": [6, 8], "depths": [1, 1]}

MODELS = {
    "gpt2": ("causal_lm", "GPT2LMHeadModel", "GPT2Config", TEXT | GPT2),
    "llama": (
        "causal_lm",
        "LlamaForCausalLM",
        "LlamaConfig",
        TEXT | ATTENTION | {"num_key_value_heads": 1, "max_position_embeddings": 16},
    ),
    "bert": (
        "text",
        "BertForSequenceClassification",
        "BertConfig",
        ATTENTION | {"vocab_size": WORDS, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0},
    ),
    "gpt2_labels": (
        "text",
        "GPT2ForSequenceClassification",
        "GPT2Config",
        TEXT | GPT2 | {"num_labels": 3, "pad_token_id": 0},
    ),
    "vit": (
        "image",
        "ViTForImageClassification",
        "ViTConfig",
        ATTENTION | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "siglip": (  # no part of it has the name that transformers gives a base
        "image",
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": ATTENTION | {"image_size": 8, "patch_size": 4}, "num_labels": 3},
    ),
    "resnet": (
        "image",
        "ResNetForImageClassification",
        "ResNetConfig",
        CONV | {"embedding_size": 6, "layer_type": "basic", "num_labels": 3},
    ),
    "convnext": (
        "image",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        CONV | {"num_stages": 2, "image_size": 16, "num_labels": 3, "layer_scale_init_value": 1.0},
    ),
}
MODELS |= {"bert_mean": MODELS["bert"], "bert_pairs": MODELS["bert"]}
LORA = {"r": 4, "lora_alpha": 6}
CASES = {
    "gpt2, all": ("gpt2", {"target_modules": "all-linear", "use_rslora": True}),
    "gpt2, words and attention": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "gpt2, tied head": ("gpt2", {"target_modules": ["lm_head", "c_fc"]}),
    "llama, all": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "llama, regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "llama, layers": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "llama, patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 1.5},
        },
    ),
    "bert, all": ("bert", {"target_modules": "all-linear"}),
    "bert, all but by regex": ("bert", {"target_modules": "all-linear", "exclude_modules": ".*(dense|key)"}),
    "bert, words": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "bert, mean of states": ("bert_mean", {"target_modules": ["query", "dense"]}),
    "bert, pairs": (
        "bert_pairs",
        {"target_modules": ["word_embeddings", "position_embeddings", "query", "dense"]},
    ),
    "gpt2 with labels": ("gpt2_labels", {"target_modules": "all-linear", "rank_pattern": {"attn.c_proj": 1}}),
    "vit, all": ("vit", {"target_modules": "all-linear"}),
    "siglip, attention": ("siglip", {"target_modules": ["q_proj", "v_proj"]}),
    "vit, patches": ("vit", {"target_modules": ["projection"], "use_rslora": True}),
    "resnet, convolutions": ("resnet", {"target_modules": ["convolution"]}),
    "convnext, both": ("convnext", {"target_modules": ["patch_embeddings", "pwconv1"]}),
}


def pretrained(name, dtype=torch.float32):
    """A tiny model of that architecture, its weights large enough for every layer to matter."""
    kind, model, config, settings = MODELS[name]
    with seeded(0, "test", name):
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        for leaf in made.parameters():
            if leaf.dim() > 1:
                leaf.data.mul_(6)
    pooling = name.removeprefix("bert_") if name.startswith("bert_") else "own"
    module = of_transformers(made.to(dtype), kind, pooling=pooling).to(dtype)
    if pooling == "pairs":
        module.separate(4)
        with torch.no_grad():  # what is said of the second text counts nothing at the start
            module.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(3))
    return module


def inputs(module, *leading, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    if module.kind == "image":
        config = module.model.config
        size = getattr(getattr(config, "vision_config", config), "image_size", 16)
        return torch.randn(*leading, 3, size, size, generator=draw).to(dtype)
    ids = torch.randint(1, WORDS, (*leading, 7), generator=draw)
    if module.kind == "text":
        ids[..., 0, 5:] = module.pad_id
    return ids


def adapted(name, peft, dtype=torch.float32, num_clients=K):
    """The base, its bank, C adapters for each client and their mixtures."""
    module = pretrained(name, dtype)
    bank = AdapterPlan(peft=LORA | peft).bank(module)
    draw = torch.Generator().manual_seed(2)
    first = bank.init(C, draw, 0.3)
    adapters = {
        n: (leaf + torch.randn(num_clients, *leaf.shape, generator=draw) / 8).to(dtype)
        for n, leaf in first.items()
    }
    probs = torch.randn(num_clients, C, generator=draw).softmax(-1).to(dtype)
    return module, bank, adapters, probs


def merged(module, bank, adapters, probs, client):
    """A copy of the base with W + Σ_c π_c · s · B_c A_c in place of each adapted W."""
    copy = deepcopy(module)
    for part in bank.low_rank:
        layer = copy.get_submodule(part.name.removesuffix(".weight"))
        delta = torch.zeros(part.shape, dtype=layer.weight.dtype)
        for c in range(C):
            a, b = adapters[part.a_name][client, c], adapters[part.b_name][client, c]
            product = torch.einsum("or,ri...->oi...", b.flatten(1), a)
            delta += probs[client, c] * part.scaling * product
        if isinstance(layer, (nn.Embedding, Conv1D)):
            delta = delta.T
        layer.weight = nn.Parameter(layer.weight + delta, requires_grad=False)
    return copy


def loss_of(module, bank):
    return Loss(stackable(seed_dropout(with_paths(module, bank))), "cross_entropy")


@pytest.mark.parametrize(("name", "peft"), CASES.values(), ids=CASES)
def test_a_layer_adds_the_explicit_sum_of_products(name, peft):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        module, bank, adapters, probs = adapted(name, peft, dtype)
        x = inputs(module, K, B, dtype=dtype)
        with torch.no_grad():
            found = loss_of(module, bank).outputs(mix(bank, {}, adapters, probs), x)
            for k in range(K):
                expected = merged(module, bank, adapters, probs, k).eval()(x[k])
                off = float((found[k] - expected).abs().max() / expected.abs().max())
                assert off < tolerance, f"client {k} in {dtype}: {off}"
            moved = (found[0] - module.eval()(x[0])).abs().max()
            assert moved > 1e-3, "the adapters add nothing"


@pytest.mark.parametrize(("name", "peft"), CASES.values(), ids=CASES)
def test_clients_together_are_what_each_is_alone_in_training_too(name, peft):
    words = {"lora_dropout": 0.25}
    module, bank, adapters, probs = adapted(name, peft | words)
    loss, x, keys = loss_of(module, bank), inputs(module, K, B), torch.tensor([5, 6, 7])
    stats = {
        n: leaf.expand(K, *leaf.shape).clone() for n, leaf in module.named_buffers() if n.endswith(("mean", "var"))
    }
    leaves = {n: leaf.requires_grad_() for n, leaf in adapters.items()}
    probs.requires_grad_()
    y = torch.arange(K * B).view(K, B) % 3
    if module.kind == "causal_lm":
        y = x.roll(-1, -1)

    def losses(rows):
        own = {n: leaf[rows] for n, leaf in leaves.items()}
        params = mix(bank, {}, own, probs[rows]) | {n: leaf[rows].clone() for n, leaf in stats.items()}
        outputs = loss.outputs(params, x[rows], training=True, key=keys[rows])
        return loss.per_example(outputs, y[rows]).mean(1)

    wanted = [*leaves.values(), probs]
    together = losses(slice(0, K))
    alone = torch.cat([losses(slice(k, k + 1)) for k in range(K)])
    assert_close(together, alone, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(each.sum(), wanted) for each in (together, alone)]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert bool((grads[0][-1].abs() > 1e-7).all()), "no gradient reaches the mixture"


@pytest.mark.parametrize(("name", "peft"), CASES.values(), ids=CASES)
def test_gates_are_as_good_as_scaled_factors(name, peft):
    module, bank, adapters, probs = adapted(name, peft, torch.float64)
    loss, x = loss_of(module, bank), inputs(module, K, B, dtype=torch.float64)
    wanted = [leaf.requires_grad_() for leaf in (*adapters.values(), probs)]
    for rows in (slice(0, K), slice(0, 1)):
        own = {n: leaf[rows] for n, leaf in adapters.items()}
        found = []
        for gates in (False, True):
            outputs = loss.outputs(mix(bank, {}, own, probs[rows], gates=gates), x[rows])
            found.append((outputs, *torch.autograd.grad(outputs.square().sum(), wanted)))
        assert_close(*found)


def test_a_served_layer_can_be_merged_and_switched_off_as_in_peft():
    module, bank, adapters, probs = adapted("llama", {"target_modules": ["q_proj"]}, num_clients=1)
    served, x = with_paths(module, bank), inputs(module, B)
    load = {n: leaf.squeeze(0) for n, leaf in mix(bank, {}, adapters, probs).items()}
    assert not any("lora_gate" in name for name in (*load, *served.state_dict()))
    with torch.no_grad():
        for name, leaf in load.items():
            served.get_parameter(name).set_(leaf)
        found, plain = served(x), module(x)
        for layer in lora_layers(served).values():
            layer.merge()
        assert_close(served(x), found, rtol=1e-4, atol=1e-4)
        for layer in lora_layers(served).values():
            layer.enable_adapters(False)
        assert_close(served(x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gpt2", "wte"),
        ("llama", "embed_tokens"),
        ("bert", "word_embeddings"),
        ("vit", "q_proj"),
        ("gpt2", "c_attn"),
    ],
)
def test_models_of_text_are_one_batch_even_where_words_are_adapted(name, target):
    module, bank, adapters, probs = adapted(name, {"target_modules": [target]})
    assert loss_of(module, bank).stackable.issuperset(mix(bank, {}, adapters, probs))


def test_a_words_factors_are_not_trained_where_it_is_padding():
    module, bank, adapters, probs = adapted("bert", {"target_modules": ["word_embeddings"]})
    (part,) = bank.low_rank
    x = inputs(module, K, B)
    assert (x == 0).any()
    words, out = (adapters[name].requires_grad_() for name in (part.a_name, part.b_name))
    found = []
    for rows in (slice(0, K), slice(0, 1)):
        own = {n: leaf[rows] for n, leaf in adapters.items()}
        outputs = loss_of(module, bank).outputs(mix(bank, {}, own, probs[rows]), x[rows])
        grad, grad_out = torch.autograd.grad(outputs.square().sum(), (words, out))
        assert (grad[..., 0] == 0).all()
        assert grad[0].abs().sum() > 0
        found.append((grad[0], grad_out[0]))
    for stacked, alone in zip(*found, strict=True):  # as PEFT has it: what padding passes through is trained
        assert_close(stacked, alone, rtol=1e-4, atol=1e-5)


DROPPING = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", ATTENTION | {"attention_dropout": 0.5}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        ATTENTION | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5},
    ),
}


@pytest.mark.parametrize("name", DROPPING)
def test_nothing_of_the_base_is_dropped(name):
    # Published: attention's own dropout, a number and no layer, was on in evaluation too.
    model, config, settings = DROPPING[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**TEXT | settings))
    module, x = of_transformers(made, "causal_lm"), torch.randint(1, WORDS, (2, 7))
    whole = module(x)
    for training in (True, False):
        assert_close(module.train(training)(x), whole)


@pytest.mark.parametrize(
    ("name", "head"), [("bert", "classifier"), ("gpt2_labels", "score"), ("siglip", "classifier")]
)
def test_the_base_is_shared_and_heads_stay_trainable(name, head):
    module = pretrained(name)
    bank = AdapterPlan(peft=LORA | {"target_modules": "all-linear"}).bank(module)
    copy = with_paths(module, bank)
    before = dict(module.named_parameters())
    own = {n.replace(".base_layer", ""): leaf for n, leaf in copy.named_parameters() if "lora_" not in n}
    assert set(own) == set(before)
    for name, leaf in own.items():
        assert leaf.requires_grad == name.startswith(f"model.{head}")
        assert (leaf.data_ptr() == before[name].data_ptr()) == (not leaf.requires_grad)
    lora = {n for n, leaf in copy.named_parameters() if "lora_" in n and leaf.requires_grad}
    assert lora == {n for part in bank.low_rank for n in (part.a_name, part.b_name)}
    assert not lora_layers(module)


@pytest.mark.parametrize("targets", [["query", "word_embeddings"], "all-linear"])
def test_training_leaves_the_base_bit_for_bit(targets):
    module = pretrained("bert")
    clients = [(inputs(module, 5 + k), torch.arange(5 + k) % 3) for k in range(3)]
    task = task_of(module, clients)
    before = {n: leaf.clone() for n, leaf in task.model.state_dict().items()}
    method = FLoRAL(
        num_adapters=2,
        adapter=AdapterPlan(peft=LORA | {"target_modules": targets, "lora_dropout": 0.1}),
        router=Router("gradient"),
        local=LocalTraining(lr=0.05, batch_size=2),
    )
    stacked, looped = (run(task, method, rounds=2, engine=Engine(mode)) for mode in ("stacked", "looped"))
    for name, leaf in task.model.state_dict().items():
        assert torch.equal(leaf, before[name]), name
    served = stacked.personal_model(0).state_dict()
    for name, leaf in served.items():
        if "base_layer" in name:
            assert torch.equal(leaf, before[name.replace(".base_layer", "")])
    assert not torch.equal(served["model.classifier.weight"], before["model.classifier.weight"])
    for k in range(3):
        x = clients[k][0]
        with torch.no_grad():
            assert_close(stacked.personal_model(k)(x), looped.personal_model(k)(x), rtol=1e-4, atol=1e-5)
    assert np.allclose(stacked.figures["train_loss"], looped.figures["train_loss"], rtol=1e-5)


def test_dropout_is_the_clients_own():
    module, bank, adapters, probs = adapted("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.5})
    loss, x = loss_of(module, bank), inputs(module, 1, B).expand(K, -1, -1)
    keys, _ = loss.dropouts
    assert keys
    assert all(name.endswith(f"lora_dropout.default.{KEY}") for name in keys)
    same = mix(
        bank, {}, {n: leaf[:1].expand(K, *leaf.shape[1:]) for n, leaf in adapters.items()}, probs[:1].expand(K, -1)
    )
    params = {n: leaf.clone() for n, leaf in same.items()}
    seven = loss.outputs(params, x, training=True, key=torch.tensor([7, 8, 7]))
    assert torch.equal(seven[0], seven[2])
    assert not torch.allclose(seven[0], seven[1])
    assert torch.equal(seven, loss.outputs(params, x, training=True, key=torch.tensor([7, 8, 7])))


def test_a_bank_of_peft_starts_as_the_base():
    module = pretrained("gpt2")
    bank = AdapterPlan(peft=LORA | {"target_modules": ["wte", "c_attn"]}).bank(module)
    adapters = {n: leaf[None] for n, leaf in bank.init(C, torch.Generator().manual_seed(0), 0.0).items()}
    x = inputs(module, 1, B)
    with torch.no_grad():
        found = loss_of(module, bank).outputs(mix(bank, {}, adapters, torch.full((1, C), 0.5)), x)
    assert_close(found[0], module.eval()(x[0]), rtol=0, atol=0)


def test_only_words_are_drawn_as_words_are():
    kinds = {part.kind for part in parts_of(pretrained("vit"), LORA | {"target_modules": ["projection"]})}
    assert kinds == {"conv"}  # vit.embeddings.patch_embeddings.projection
    assert [part.kind for part in parts_of(pretrained("gpt2"), LORA | {"target_modules": ["wte"]})] == [
        "embedding"
    ]


def test_scalings_ranks_and_names_are_pefts():
    peft = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    module, bank, _, _ = adapted("llama", peft | {"target_modules": ["q_proj", "v_proj"]})
    layers = lora_layers(with_paths(module, bank))
    assert [part.name.removesuffix(".weight") for part in bank.low_rank] == list(layers)
    for part, (path, layer) in zip(bank.low_rank, layers.items(), strict=True):
        rank, alpha = (2, 6) if "v_proj" in path else (4, 3)
        assert (part.rank, part.scaling) == (rank, alpha / rank**0.5)
        assert (part.a_name, part.b_name) == factor_names(path, layer)


@pytest.mark.parametrize("length", [K, 2 * K, 5])
@pytest.mark.parametrize("trained", ["", "wpe"])
def test_positions_that_all_rows_share_are_each_clients_own(length, trained):
    module = pretrained("gpt2").requires_grad_(True)
    draw = torch.Generator().manual_seed(4)
    params = {
        name: leaf.detach() + torch.randn(K, *leaf.shape, generator=draw) / 9
        for name, leaf in module.named_parameters()
        if trained in name
    }
    loss = Loss(stackable(deepcopy(module)), "cross_entropy")
    assert loss.stackable.issuperset(name for name in params if "wpe" in name)
    x = torch.randint(0, WORDS, (K, B, length), generator=draw)
    with torch.no_grad():
        found = loss.outputs(params, x)
        for k in range(K):
            one = loss.outputs({n: leaf[k : k + 1] for n, leaf in params.items()}, x[k : k + 1])
            assert_close(found[k], one[0])


def test_rows_that_meet_go_another_way():
    class Meeting(nn.Module):
        rows_apart = True  # it is mistaken

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    draw = torch.Generator().manual_seed(0)
    module = stackable(Meeting())
    params = {n: torch.randn(K, *leaf.shape, generator=draw) for n, leaf in module.named_parameters()}
    x, loss = torch.randn(K, B, 5, 4, generator=draw), Loss(module, "mse")
    alone = [loss.outputs({n: leaf[k : k + 1] for n, leaf in params.items()}, x[k : k + 1]) for k in range(K)]
    assert_close(loss.outputs(params, x), torch.cat(alone))


HALF = {
    "gpt2": ["wte", "c_attn"],
    "bert": "all-linear",
    "vit": "all-linear",
    "convnext": ["pwconv1", "patch_embeddings"],
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", FLoRAL(2, AdapterPlan(2, ("linear", "bias")), local=LocalTraining(0.01, batch_size=2))),
        (
            "bert",
            FLoRAL(
                2,
                AdapterPlan(peft=LORA | {"target_modules": "all-linear"}),
                local=LocalTraining(0.01, batch_size=2),
            ),
        ),
        ("resnet", FLoRAL(2, AdapterPlan(2, realization="factored"), local=LocalTraining(0.01, batch_size=2))),
        (
            "gpt2",
            FLoRAL(
                2,
                AdapterPlan(2, ("embedding", "linear"), realization="factored"),
                local=LocalTraining(0.01, batch_size=2),
                freeze_base=True,
            ),
        ),
    ],
    ids=["merged", "peft and head", "convolutions", "embeddings"],
)
def test_what_is_trained_beside_a_base_of_half_precision_is_float32(name, method):
    module = pretrained(name).to(torch.bfloat16)
    x = inputs(module, 6)
    y = x.roll(-1, -1) if name == "gpt2" else torch.arange(len(x)) % 3
    clients = [(x.to(torch.bfloat16) if x.is_floating_point() else x, y)] * K
    result = run(task_of(module, clients), method, rounds=1, engine=Engine("stacked", chunk=K))
    shared = result.progress.shared
    assert shared.adapters
    assert all(leaf.dtype == torch.float32 for leaf in (shared.base | shared.adapters).values())
    rounded = {n: leaf.to(torch.bfloat16).float() for n, leaf in (shared.base | shared.adapters).items()}
    assert all(
        not torch.equal(leaf, (shared.base | shared.adapters)[n]) for n, leaf in rounded.items() if leaf.any()
    )
    personal = result.personal_model(0)
    assert all(leaf.dtype == torch.bfloat16 for n, leaf in personal.named_parameters() if "lora" not in n)
    assert personal(x.to(torch.bfloat16) if x.is_floating_point() else x).dtype == torch.bfloat16


def test_losses_of_many_examples_are_summed_in_numbers_that_can():
    module = nn.Linear(2, 4).to(torch.bfloat16)
    examples = Examples.of([(torch.zeros(1500, 2, dtype=torch.bfloat16), torch.zeros(1500, dtype=torch.long))])
    candidates = {"weight": torch.zeros(2, 4, 2), "bias": torch.zeros(2, 4)}
    found = losses_of(Loss(module, "cross_entropy"), candidates, ClientData(examples, np.arange(1), 0, 1)).mean
    assert_close(found, torch.full((1, 2), float(np.log(4))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HALF)
def test_adapters_beside_a_base_of_half_precision_are_float32(name):
    module = pretrained(name).to(torch.bfloat16)
    plan = AdapterPlan(peft=LORA | {"target_modules": HALF[name]})
    clients = []
    for k in range(K):
        x = inputs(module, 6 + k)
        y = x.roll(-1, -1) if name == "gpt2" else torch.arange(len(x)) % 3
        clients.append((x.to(torch.bfloat16) if x.is_floating_point() else x, y))
    method = FLoRAL(2, plan, Router("gradient"), LocalTraining(0.01, batch_size=2))
    one, other = (
        run(task_of(module, clients), method, rounds=1, engine=Engine(mode)).progress.shared.adapters
        for mode in ("stacked", "looped")
    )
    for n, leaf in one.items():
        assert leaf.dtype == torch.float32
        assert_close(leaf, other[n], rtol=0.1, atol=0.01)
    assert plan.bank(pretrained(name)).dtype(pretrained(name, torch.float64)) == torch.float64


class Packed(nn.Linear):
    """A linear layer whose weight has neither the shape nor the type of one, as quantised layers have."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.view(-1, 1), requires_grad=False)
        self.bias = None

    def forward(self, x):
        weight = (self.weight.view(self.out_features, self.in_features).float() - 128) * self.scale
        return nn.functional.linear(x, weight.to(x.dtype))


def test_weights_that_are_packed_are_adapted_as_they_are():
    module = pretrained("llama")
    for layer in module.model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    module.model.model.embed_tokens.to(torch.bfloat16)
    module.model.model.layers.to(torch.bfloat16)
    module.model.model.norm.to(torch.bfloat16)
    module.model.lm_head.to(torch.bfloat16)
    plan = AdapterPlan(peft=LORA | {"target_modules": ["q_proj", "v_proj"]})
    before = {n: leaf.clone() for n, leaf in module.state_dict().items()}
    bank = plan.bank(module)
    assert {(part.shape, part.rank) for part in bank.low_rank} == {((16, 16), 4), ((8, 16), 4)}
    assert bank.dtype(module) == torch.float32
    x = [inputs(module, 6 + k) for k in range(K)]
    task = task_of(module, [(own, own.roll(-1, -1)) for own in x])
    method = FLoRAL(2, plan, Router("gradient"), LocalTraining(0.01, batch_size=2))
    one, other = (run(task, method, rounds=2, engine=Engine(mode)) for mode in ("stacked", "looped"))
    for n, leaf in one.progress.shared.adapters.items():
        assert_close(leaf, other.progress.shared.adapters[n], rtol=0.05, atol=0.01)
    for n, leaf in module.state_dict().items():
        assert torch.equal(leaf, before[n])


def test_other_embeddings_than_words_are_adapted_as_well():
    module = pretrained("bert")
    clients = [(inputs(module, 6 + k), torch.arange(6 + k) % 3) for k in range(K)]
    plan = AdapterPlan(peft=LORA | {"target_modules": ["position_embeddings", "token_type_embeddings"]})
    result = run(task_of(module, clients), FLoRAL(2, plan, local=LocalTraining(0.01, batch_size=2)), rounds=2)
    assert np.isfinite(result.figures["loss"])


OPTIONS = [
    {"averaging": "product"},
    {"precondition": True},
    {"ranks": (0.5, 1.0)},
    {"layer_routers": True, "router": Router("gradient", lr=0.1)},
]


@pytest.mark.parametrize("settings", OPTIONS)
def test_options_of_floral_go_with_pefts_layers(settings):
    module = pretrained("bert")
    clients = [(inputs(module, 6 + k), torch.arange(6 + k) % 3) for k in range(K)]
    plan = AdapterPlan(peft=LORA | {"target_modules": ["query", "word_embeddings"]})
    method = FLoRAL(num_adapters=2, adapter=plan, local=LocalTraining(0.01, batch_size=2), **settings)
    one, other = (run(task_of(module, clients), method, rounds=2, engine=Engine(m)) for m in ("stacked", "looped"))
    assert np.isfinite(one.figures["loss"])
    assert np.allclose(one.figures["loss"], other.figures["loss"], rtol=1e-4)


def test_no_remainder_is_added_to_a_base_of_pefts():
    with pytest.raises(RecipeError, match=r"averaging = 'delta'.*adapter\.peft"):
        FLoRAL(adapter=AdapterPlan(peft=LORA | {"target_modules": ["query"]}), averaging="delta")


# What is refused.

REFUSED = {
    "bias": "all",
    "modules_to_save": ["classifier"],
    "use_dora": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "target_parameters": ["weight"],
    "lora_bias": True,
    "trainable_token_indices": [3],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "kasa_config": {"beta": 1.0},
    "loftq_config": {"loftq_bits": 4},
    "arrow_config": {"top_k": 1},
    "monteclora_config": {"a": 1},
    "velora_config": {"scale": 1.0},
    "runtime_config": {"ephemeral_gpu_offload": True},
}


def test_what_says_that_nothing_is_asked_for_is_taken_and_false_where_it_asks_is_not():
    parts_of(pretrained("llama"), LORA | {"target_modules": ["q_proj"], "loftq_config": {}, "use_dora": False})
    with pytest.raises(RecipeError, match="init_lora_weights = False"):
        parts_of(pretrained("llama"), LORA | {"target_modules": ["q_proj"], "init_lora_weights": False})


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_are_no_mixture_of_two_factors_are_refused(key):
    plan = AdapterPlan(peft=LORA | {"target_modules": ["q_proj"], key: REFUSED[key]})
    with pytest.raises(RecipeError, match=rf"adapter\.peft\.{key} = .*; leave it out"):
        plan.bank(pretrained("llama"))


def test_every_setting_of_peft_is_taken_or_refused():
    from dataclasses import fields

    from peft import LoraConfig

    from umbel.adapters.lora_layers import _TAKEN, config_of

    names = {setting.name for setting in fields(LoraConfig)}
    assert set(_TAKEN) <= names
    for name in names - set(_TAKEN) - {"peft_type", "auto_mapping"}:
        with pytest.raises(RecipeError, match=rf"adapter\.peft\.{name}"):
            config_of({name: "something else"})
    plain = {
        n: v
        for n, v in LoraConfig(r=4).to_dict().items()
        if n not in ("peft_type", "auto_mapping", "loftq_config")
    }
    assert config_of(plain).r == 4


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lora_aplha": 2}, r"adapter\.peft\.lora_aplha: .*did you mean 'lora_alpha'"),
        ({"zzz": 2}, r"adapter\.peft\.zzz: .*there are r, lora_alpha"),
        ({"r": 0}, r"adapter\.peft\.r = 0"),
        ({"r": 2.5}, r"adapter\.peft\.r = 2\.5"),
        ({"rank_pattern": {"q_proj": -1}}, r"adapter\.peft\.rank_pattern\.q_proj = -1"),
        ({"lora_alpha": "8"}, r"adapter\.peft\.lora_alpha = '8'"),
        ({"alpha_pattern": {"q_proj": 0}}, r"adapter\.peft\.alpha_pattern\.q_proj = 0"),
        ({"lora_dropout": 1.0}, r"adapter\.peft\.lora_dropout = 1\.0"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, r"adapter\.peft: .*layers_to_transform"),
    ],
)
def test_settings_out_of_range_name_themselves(setting, said):
    with pytest.raises(RecipeError, match=said):
        AdapterPlan(peft=LORA | {"target_modules": ["q_proj"]} | setting).bank(pretrained("llama"))


@pytest.mark.parametrize(
    ("name", "peft", "said"),
    [
        ("llama", {"target_modules": ["nothing"]}, r"adapter\.peft: Target modules .*nothing"),
        ("llama", {"target_modules": "(q_proj"}, r"adapter\.peft: "),
        ("llama", {"target_modules": ["input_layernorm"]}, r"adapter\.peft: Target module"),
        ("bert", {"target_modules": ["query", "classifier"]}, r"classifier is trained itself; .*exclude_modules"),
        ("convnext", {"target_modules": ["dwconv"], "r": 12}, r"dwconv.* groups"),
        ("convnext", {"target_modules": ["dwconv"]}, r"adapter\.peft: .*groups=6"),
    ],
)
def test_layers_that_cannot_be_adapted_name_themselves(name, peft, said):
    if "dwconv" in peft["target_modules"] and "r" in peft:
        peft = peft | {"target_modules": r".*stages\.0\.layers\.0\.dwconv"}
    with pytest.raises(ModelError, match=said):
        AdapterPlan(peft=LORA | peft).bank(pretrained(name))


class Plain(nn.Module):
    def __init__(self, **conv):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **conv)
        self.attention = nn.MultiheadAttention(4, 2)
        self.words = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3)
        self.requires_grad_(False)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("conv", [{"groups": 1, "dilation": 2}, {"padding_mode": "reflect"}])
def test_convolutions_that_peft_would_walk_otherwise_are_refused(conv):
    with pytest.raises(ModelError, match=r"conv cannot be adapted.* dilation and padding mode"):
        AdapterPlan(peft=LORA | {"target_modules": ["conv"]}).bank(Plain(**conv))


def test_attention_in_one_layer_is_refused():
    with pytest.raises(ModelError, match=r"attention cannot be adapted"):
        AdapterPlan(peft=LORA | {"target_modules": ["attention"]}).bank(Plain())


def test_a_module_of_ones_own_can_be_adapted():
    module = Plain()
    module.head.requires_grad_(True)
    clients = [
        (torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(k)), torch.arange(6) % 3)
        for k in range(3)
    ]
    method = FLoRAL(num_adapters=2, adapter=AdapterPlan(peft=LORA | {"target_modules": ["conv"]}))
    results = [
        run(task_of(module, clients), method, rounds=2, engine=Engine(mode)) for mode in ("stacked", "looped")
    ]
    one, other = (result.personal_model(1).state_dict() for result in results)
    for name, leaf in one.items():
        assert_close(leaf, other[name], rtol=1e-4, atol=1e-6)


def test_a_model_of_which_clients_cannot_be_stacked_is_looped_by_auto():
    class Choosing(Pretrained):
        rows_apart = False

        def forward(self, x):
            return super().forward(x) * (2 if bool((x > 0).all()) else 1)

    whole = pretrained("bert")
    module = Choosing(whole.model, "text")
    clients = [(inputs(module, 6), torch.arange(6) % 3) for _ in range(3)]
    plan = AdapterPlan(peft=LORA | {"target_modules": ["word_embeddings"]})
    method = FLoRAL(num_adapters=2, adapter=plan)
    assert run(task_of(module, clients), method, rounds=1).cohort.chunk == 1
    with pytest.raises(ModelError, match="mode=looped"):
        run(task_of(module, clients), method, rounds=1, engine=Engine("stacked"))


def test_rows_do_not_meet_in_batch_norms():
    module, bank, _, _ = adapted("resnet", {"target_modules": ["convolution"]})
    assert not loss_of(module, bank).stackable


def test_nothing_is_drawn_from_the_global_generator():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        bank = AdapterPlan(peft=LORA | {"target_modules": ["q_proj"]}).bank(pretrained("llama"))
        states.append((torch.get_rng_state(), bank.init(C, torch.Generator().manual_seed(0), 0.3)))
    torch.manual_seed(3)
    assert all(torch.equal(state, torch.get_rng_state()) for state, _ in states)
    for (_, one), (_, other) in pairwise(states):
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_names_of_parts_are_in_the_module():
    for name, peft in CASES.values():
        module, bank, _, _ = adapted(name, peft)
        known = dict(with_paths(module, bank).named_parameters())
        for part in bank.low_rank:
            assert known[part.a_name].shape == part.a_shape
            assert known[part.b_name].shape == part.b_shape
            assert re.search(r"\.lora_(embedding_)?A\.default", part.a_name)
