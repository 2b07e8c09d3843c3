"""Training under autocast: products are in bfloat16, what is kept is float32, and close to what float32 gives."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from test_lora_layers import LORA, pretrained
from umbel import AdapterPlan, Engine, FedAvg, FLoRAL, LocalTraining, Router, run, task_of, tree
from umbel.methods import FedEM
from umbel.model.loss import Loss
from umbel.model.nets import CharLSTM
from umbel.model.stacked import low_rank, stackable
from umbel.seeds import seeded

K = 3


def texts(module):
    """Each client continues a token by the next one."""
    ids = torch.arange(6 * 8).view(6, 8) % 30 + 1
    return task_of(module, [(ids + k, ids + k + 1) for k in range(K)], test=[(ids, ids)] * K)


def images():
    with seeded(0, "cnn"):
        layers = (
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 36, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
        module = nn.Sequential(*layers)
    draw = torch.Generator().manual_seed(0)
    return task_of(module, [(torch.randn(8, 1, 8, 8, generator=draw), torch.arange(8) % 3) for _ in range(K)])


def local(precision, **settings):
    return LocalTraining(**{"lr": 0.05, "batch_size": 2, "precision": precision} | settings)


LOW_RANK = AdapterPlan(peft=LORA | {"target_modules": "all-linear", "lora_dropout": 0.1})
CASES = {
    "gpt2, floral": (
        lambda: texts(pretrained("gpt2")),
        lambda how: FLoRAL(2, LOW_RANK, Router("gradient"), local(how, lr=0.002, optimizer="adamw")),
    ),
    "gpt2 of half precision": (
        lambda: texts(pretrained("gpt2").to(torch.bfloat16)),
        lambda how: FLoRAL(2, LOW_RANK, Router("gradient"), local(how, lr=0.002, optimizer="adamw")),
    ),
    "images, fedavg": (images, lambda how: FedAvg(local(how))),
    "images, floral": (images, lambda how: FLoRAL(2, AdapterPlan(2, realization="factored"), local=local(how))),
    "images, fedem": (images, lambda how: FedEM(num_models=2, local=local(how))),
}


@pytest.mark.parametrize(("task", "method"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("mode", ["stacked", "looped"])
def test_training_is_close_to_float32s_and_keeps_float32(task, method, mode):
    whole, half = (run(task(), method(how), rounds=1, engine=Engine(mode)) for how in ("float32", "bfloat16"))
    ends = [tree.tensors(result.progress.shared) for result in (whole, half)]
    assert all(leaf.dtype != torch.bfloat16 for leaf in ends[1].values() if leaf.is_floating_point())
    floats = [n for n, leaf in ends[0].items() if leaf.is_floating_point() and leaf.numel() > 1]
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in floats), "nothing was computed in bfloat16"
    for name in floats:
        off = (ends[0][name] - ends[1][name]).norm() / ends[0][name].norm().clamp(min=1e-3)
        assert off < 0.1, f"{name}: {off}"
    assert whole.figures["loss"] == pytest.approx(half.figures["loss"], rel=0.05)


def test_losses_and_evaluation_are_float32():
    task = texts(CharLSTM(40, 4, 8))
    module, x = stackable(task.model), task.train.x[:2].unsqueeze(0)
    params = {n: leaf.detach()[None].clone().requires_grad_() for n, leaf in module.named_parameters()}
    whole, half = Loss(module, "cross_entropy"), Loss(module, "cross_entropy", "bfloat16")
    assert torch.equal(whole.outputs(params, x), half.outputs(params, x))
    exact, rough = (loss.outputs(params, x, training=True) for loss in (whole, half))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert_close(exact, rough, rtol=0.05, atol=0.02)
    grads = torch.autograd.grad(rough.square().sum(), list(params.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("own", [(), ("a", "b", "gate")])
def test_low_rank_paths_are_computed_in_autocasts_type(own):
    draw = torch.Generator().manual_seed(0)
    shapes = {"out": (12, 5), "x": (12, 8), "a": (4, 8), "b": (5, 4), "gate": (2,)}
    shapes |= {name: (K, *shapes[name]) for name in own}
    inputs = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes.values()]
    exact = low_rank(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = low_rank(inputs[0].to(torch.bfloat16), *inputs[1:])
        assert low_rank(*inputs).dtype == torch.float32, "what a layer made in float32 stays so"
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), exact, rtol=0.05, atol=0.1)
    grads = [torch.autograd.grad(each.float().square().sum(), inputs) for each in (exact, rough)]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * one.norm()
