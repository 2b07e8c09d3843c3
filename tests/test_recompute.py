"""Blocks that are computed again in backward: the same gradients, with less kept in between."""

import pytest
import torch
from torch.testing import assert_close

from test_lora_layers import LORA, B, K, adapted, inputs, loss_of, pretrained
from umbel import AdapterPlan, Engine, FedAvg, FLoRAL, LocalTraining, Router, run, task_of
from umbel.adapters import mix
from umbel.errors import ModelError
from umbel.model.loss import Loss
from umbel.model.nets import mlp
from umbel.model.recompute import recomputing

PEFT = {"target_modules": "all-linear", "lora_dropout": 0.25}


def gradients(loss, bank, adapters, probs, x, rows):
    """The gradients of all that is trained, and the bytes kept for them."""
    wanted = [leaf.clone().requires_grad_() for leaf in (*adapters.values(), probs)]
    own = {n: leaf[rows] for n, leaf in zip(adapters, wanted, strict=False)}
    kept = {}

    def note(leaf):
        kept[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return leaf

    with torch.autograd.graph.saved_tensors_hooks(note, lambda leaf: leaf):
        params = mix(bank, {}, own, wanted[-1][rows], gates=True)
        outputs = loss.outputs(params, x[rows], training=True, key=torch.tensor([5, 6, 7])[rows])
    return torch.autograd.grad(outputs.square().sum(), wanted), sum(kept.values())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
@pytest.mark.parametrize("rows", [slice(0, K), slice(1, 2)], ids=["stacked", "alone"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_the_same_and_less_is_kept(name, rows, precision):
    module, bank, adapters, probs = adapted(name, PEFT)
    x = inputs(module, K, B)
    one, other = (Loss(loss_of(module, bank).module, "cross_entropy", precision) for _ in range(2))
    recomputing(other.module)
    (expected, much), (found, little) = (gradients(each, bank, adapters, probs, x, rows) for each in (one, other))
    assert_close(found, expected)
    assert any(grad.abs().sum() > 0 for grad in expected)
    assert little < much / 2


@pytest.mark.parametrize("mode", ["stacked", "looped"])
def test_a_run_is_the_same(mode):
    module = pretrained("gpt2")
    clients = [(own := inputs(module, 6 + k), own.roll(-1, -1)) for k in range(K)]
    local = LocalTraining(lr=0.01, batch_size=2)
    method = FLoRAL(2, AdapterPlan(peft=LORA | PEFT), Router("gradient"), local)
    ends = [
        run(task_of(module, clients), method, rounds=2, engine=Engine(mode, recompute=recompute))
        for recompute in (False, True)
    ]
    assert_close(*(end.progress.shared.adapters for end in ends))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_clients_under_vmap_keep_what_they_need():
    module, bank, adapters, probs = adapted("gpt2", PEFT)
    loss = recomputing_loss(module, bank)
    loss.module.rows_apart = False
    found, _ = gradients(loss, bank, adapters, probs, inputs(module, K, B), slice(0, K))
    expected, _ = gradients(loss_of(module, bank), bank, adapters, probs, inputs(module, K, B), slice(0, K))
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def recomputing_loss(module, bank):
    return Loss(recomputing(loss_of(module, bank).module), "cross_entropy")


def test_a_model_without_such_blocks_is_refused():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ModelError, match=r"engine\.recompute: .* leave it out"):
        run(task_of(mlp(4, 5, 3), [(x, y)] * 2), FedAvg(), rounds=1, engine=Engine(recompute=True))
