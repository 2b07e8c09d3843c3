"""FedDPA: what is trained when, and how much either adapter counts for an instance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.clients import ClientData
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.methods import FedIT
from umbel.methods.feddpa import FedDPA, Served
from umbel.model.loss import IGNORED
from umbel.model.pretrained import of_transformers
from umbel.rounds import rounds, start
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import task_of
from umbel.train import LocalTraining

LOCAL = LocalTraining(optimizer="adamw", lr=1e-2, batch_size=2)
PLAN = AdapterPlan(peft={"r": 2, "lora_alpha": 8, "target_modules": "all-linear"})
METHOD = FedDPA(PLAN, strength=0.8, samples=4, local=LOCAL)
EVERYONE = np.arange(3)
GPT2 = {"vocab_size": 19, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def texts(prompt=0):
    """Three clients with four texts of eight tokens each; the first `prompt` targets do not count."""
    with seeded(0, "gpt2"):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=19, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
            )
        )
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 19, (3, 4, 9), generator=draw)
    targets = ids[:, :, 1:].clone()
    targets[:, :, :prompt] = IGNORED
    clients = list(zip(ids[:, :, :-1], targets, strict=True))
    return task_of(of_transformers(model, "causal_lm"), clients, test=clients)


def images():
    with seeded(0, "vit"):
        config = ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        )
        model = of_transformers(ViTForImageClassification(config), "image")
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.randn(4, 3, 8, 8, generator=draw), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
    return task_of(model, clients, test=clients)


def begun(method, task, num_rounds=0):
    cohort, at = start(task, method, Schedule(rounds=max(1, num_rounds)), Engine("stacked", chunk=3))
    if num_rounds:
        *_, at = rounds(cohort, at, task, Schedule(rounds=num_rounds))
    return cohort, at


def parts(method, task, num_rounds=2):
    cohort, at = begun(method, task, num_rounds)
    message, private = method.send(at.shared, torch.arange(3)), at.store.rows(EVERYONE)
    data = ClientData(cohort.train, EVERYONE, 0, 0)
    return cohort, message, private, method.settle(cohort.loss, message, private, data)


def test_the_first_round_trains_the_global_adapter_alone_and_the_next_one_both():
    task = texts()
    cohort, at = begun(METHOD, task)
    fresh = at.store.rows(EVERYONE)
    upload, private = cohort.update(at.shared, at.store, EVERYONE, 1)
    assert_close(private.adapter, fresh.adapter, rtol=0, atol=0)
    at.store.put(EVERYONE, private)
    _, private = cohort.update(at.shared, at.store, EVERYONE, 2)
    assert all((private.adapter[name] != fresh.adapter[name]).any() for name in fresh.adapter if "lora_B" in name)
    assert set(vars(upload)) == {"base", "adapter", "stats", "weight", "loss"}


@pytest.mark.parametrize("gate", ["constant", "instance"])
def test_who_has_not_trained_a_local_adapter_serves_the_global_one(gate):
    task = texts()
    method = replace(METHOD, variant="T", gate=gate)
    schedule = Schedule(rounds=1)
    cohort, at = start(task, method, schedule, Engine("stacked", chunk=3))
    *_, at = rounds(cohort, at, task, schedule)
    other, same = begun(FedIT(PLAN, LOCAL), task, 1)
    params, plain = (
        own.served(now.shared, now.store.rows(EVERYONE), EVERYONE)[0] for own, now in ((cohort, at), (other, same))
    )
    x = task.test.x[:12].view(3, 4, -1)
    assert_close(cohort.loss.outputs(params, x), other.loss.outputs(plain, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["T", "F"])
def test_the_global_adapter_is_that_of_fedit(variant):
    task = texts()
    _, at = begun(replace(METHOD, variant=variant), task, 3)
    _, other = begun(FedIT(PLAN, LOCAL), task, 3)
    assert_close(at.shared.adapter, other.shared.adapter)


def test_variant_f_fine_tunes_the_global_adapter_when_it_serves():
    method = replace(METHOD, variant="F", strength=1.0, gate="constant")
    cohort, message, private, served = parts(method, texts())
    assert_close(private.adapter, begun(method, texts())[1].store.rows(EVERYONE).adapter)
    data = ClientData(cohort.train, EVERYONE, 0, 0)
    tuned = cohort.loss.over(method.personalize(message, served), data)
    alone = cohort.loss.over(method.personalize(message, replace(served, adapter=message.adapter)), data)
    assert (tuned < alone).all()


def anchors(at, task, k):
    """Embeddings of all four examples of a client, as many as are asked for."""
    x, _ = task.train.of_client(k)
    _, embedded = at((0.0, 1.0), x.unsqueeze(0), k)
    return embedded[:, -1] if embedded.dim() == 3 else embedded


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("task", [texts, images])
def test_the_gate_is_the_cosine_to_own_examples(task, published):
    method = replace(METHOD, published_gate=published)
    task = task()
    cohort, message, _, served = parts(method, task)
    cohort.loss.module.eval()
    x = torch.stack([task.test.of_client(k)[0] for k in range(3)])
    found = cohort.loss.outputs(method.personalize(message, served), x)

    def at(weights, x, k):
        """The model with the adapters at these weights, and its last hidden state."""
        one = {n: leaf[k : k + 1] for n, leaf in message.adapter.items()}
        own = {n: leaf[k : k + 1] for n, leaf in served.adapter.items()}
        base = {n: leaf[k : k + 1] for n, leaf in message.base.items()}
        mixed = method._mixed(message, base, one, own, weights)
        constant = {f"inner.{n}": leaf for n, leaf in mixed.items()}
        seen = []
        layer = cohort.loss.module.inner.get_submodule(cohort.loss.module.layer)
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        out = cohort.loss.outputs(constant, x)[0]
        handle.remove()
        return out, seen[0]

    for k in range(3):
        _, embedded = at((0.0, 1.0), x[k : k + 1], k)
        cosines = F.cosine_similarity(embedded.unsqueeze(-2), anchors(at, task, k), dim=-1)
        alpha = (0.8 * cosines.mean(-1)).clamp(0, 1)
        assert alpha.max() - alpha.min() > 1e-3
        for row in range(len(x[k])):
            for place in range(x.shape[2]) if alpha.dim() == 2 else [None]:
                own = (alpha[row] if place is None else alpha[row, place]).item()
                weights = (own, 1 - own) if published else (1 - own, own)
                expected, _ = at(weights, x[k : k + 1], k)
                if place is None:
                    assert_close(found[k, row], expected[row], rtol=1e-4, atol=1e-5)
                elif place == 0:  # later places see hidden states of earlier ones, at their own weights
                    assert_close(found[k, row, 0], expected[row, 0], rtol=1e-4, atol=1e-5)


def test_what_comes_after_a_place_does_not_change_its_answer():
    task = texts()
    cohort, message, _, served = parts(METHOD, task)
    x = torch.stack([task.test.of_client(k)[0] for k in range(3)])
    other = x.clone()
    other[:, :, 5:] = (other[:, :, 5:] + 7) % 19
    params = METHOD.personalize(message, served)
    one, two = cohort.loss.outputs(params, x), cohort.loss.outputs(params, other)
    assert_close(one[:, :, :5], two[:, :, :5])
    assert (one[:, :, 5:] - two[:, :, 5:]).abs().max() > 1e-3


def test_anchors_are_taken_at_the_end_of_the_prompt():
    task = texts(prompt=3)
    cohort, message, _, served = parts(METHOD, task)
    changed = texts(prompt=3)
    changed.train.x[:, 4:] = (changed.train.x[:, 4:] + 7) % 19  # the answers
    data = ClientData(changed.train, EVERYONE, 0, 0)
    again = METHOD._anchor(cohort.loss, message, served.adapter, served.head, data)
    assert_close(again, served.anchor)


def test_clients_with_few_examples_have_their_own_anchor_however_they_are_stacked():
    task = texts()
    few = [tuple(part[:n] for part in task.train.of_client(k)) for k, n in enumerate((1, 2, 4))]
    task = task_of(task.model, few, test=few)
    cohort, message, private, served = parts(METHOD, task)
    for k in range(3):
        one = torch.tensor([k])
        data = ClientData(cohort.train, np.array([k]), 0, 0)
        alone = METHOD.settle(cohort.loss, tree.rows(message, one), tree.rows(private, one), data)
        assert_close(alone.anchor[0], served.anchor[k])


def test_a_decoder_with_labels_is_gated_by_its_last_place():
    with seeded(0, "gpt2"):
        config = GPT2Config(
            vocab_size=19,
            n_positions=16,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        model = GPT2ForSequenceClassification(config)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 19, (3, 4, 8), generator=draw)
    ids[:, 1:3, 5:] = 0
    clients = [(own, torch.tensor([0, 1, 1, 0])) for own in ids]
    task = task_of(of_transformers(model, "text"), clients, test=clients)
    cohort, message, _, served = parts(METHOD, task)
    params = METHOD.personalize(message, served)
    padded = torch.nn.functional.pad(ids, (0, 2))
    assert_close(cohort.loss.outputs(params, padded), cohort.loss.outputs(params, ids))


def test_at_strength_0_the_global_adapter_serves_alone():
    method = replace(METHOD, strength=0.0)
    task = texts()
    cohort, message, _, served = parts(method, task)
    params = method.personalize(message, served)
    x = torch.stack([task.test.of_client(k)[0] for k in range(3)])
    fedit, at = begun(FedIT(PLAN, LOCAL), task, 2)
    plain, _ = fedit.served(at.shared, at.store.rows(EVERYONE), EVERYONE)
    assert_close(cohort.loss.outputs(params, x), fedit.loss.outputs(plain, x))


def test_a_run_ends_with_better_clients():
    task = texts()
    cohort, at = begun(METHOD, task)
    *_, last = rounds(cohort, at, task, Schedule(rounds=5))
    _, first = begun(METHOD, task)
    before = cohort.served(first.shared, first.store.rows(EVERYONE), EVERYONE)[0]
    data = ClientData(cohort.train, EVERYONE, 0, 0)
    assert last.figures["loss"] < cohort.loss.over(before, data).mean().item()


@pytest.mark.parametrize(
    "settings", [{"local_weight": 1.5}, {"strength": -0.1}, {"samples": 0}, {"adapter": AdapterPlan()}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(RecipeError, match="|".join(settings)):
        replace(METHOD, **settings)


def test_served_is_not_what_is_kept():
    _, _, private, served = parts(METHOD, texts())
    assert isinstance(served, Served)
    assert served.anchor.shape == (3, 8)
    assert not hasattr(private, "anchor")
