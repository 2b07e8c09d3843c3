"""Adapters beside a base of 8 or 4 bits: the explicit sum, clients together and alone, a base that stays."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from umbel import AdapterPlan, Engine, FLoRAL, LocalTraining, run, task_of
from umbel.adapters import mix, with_paths
from umbel.model.loss import Loss
from umbel.model.stacked import stackable
from umbel.seeds import seeded
from umbel.tasks.bases import load_pretrained

pytest.importorskip("bitsandbytes", reason="a quantised base needs bitsandbytes: pip install bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

K, B, C, WORDS = 3, 4, 2, 40
LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama whose layers are of sizes that 4 bits can be packed in."""
    made = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("llama")
    with seeded(0, "test"):
        model = transformers.LlamaForCausalLM(made)
        for leaf in model.parameters():
            if leaf.dim() > 1:
                leaf.data.mul_(6)
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_beside_a_packed_base(folder, bits):
    module = load_pretrained(folder, "causal_lm", bits=bits)
    kinds = {leaf.dtype for leaf in module.parameters()}
    assert torch.int8 in kinds or torch.uint8 in kinds
    bank = AdapterPlan(peft=LORA).bank(module)
    draw = torch.Generator().manual_seed(2)
    adapters = {
        n: leaf + torch.randn(K, *leaf.shape, generator=draw) / 8 for n, leaf in bank.init(C, draw, 0.3).items()
    }
    probs = torch.randn(K, C, generator=draw).softmax(-1)
    wanted = [leaf.requires_grad_() for leaf in (*adapters.values(), probs)]
    loss = Loss(stackable(with_paths(module, bank)), "cross_entropy")
    x = torch.randint(1, WORDS, (K, B, 7), generator=draw)

    def outputs(rows):
        own = {n: leaf[rows] for n, leaf in adapters.items()}
        return loss.outputs(mix(bank, {}, own, probs[rows], gates=True), x[rows], training=True)

    together = outputs(slice(0, K))
    alone = torch.cat([outputs(slice(k, k + 1)) for k in range(K)])
    assert_close(together, alone, rtol=1e-3, atol=1e-3)
    one, other = (torch.autograd.grad(found.square().sum(), wanted) for found in (together, alone))
    assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert all(bool((grad != 0).any()) for grad in one)

    # By hand: a layer's own answer, and Σ_c π_c s B_c A_c x beside it.
    part = next(part for part in bank.low_rank if "layers.0" in part.name and "q_proj" in part.name)
    path = part.name.removesuffix(".weight")
    rows = torch.randn(B, 64, generator=draw)
    with torch.no_grad():
        expected = module.get_submodule(path)(rows)
        for c in range(C):
            a, b = adapters[part.a_name][0, c], adapters[part.b_name][0, c]
            expected = expected + probs[0, c] * part.scaling * (rows @ a.T @ b.T)
        mixed = mix(bank, {}, adapters, probs)
        names = {n.rpartition(f"{path}.")[2]: leaf[0] for n, leaf in mixed.items() if path in n}
        layer = loss.module.get_submodule(path)
        found = torch.func.functional_call(layer, names, (rows,))
    assert float((found - expected).norm() / expected.norm()) < 1e-2  # activations are in 8 bits too


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_leaves_the_packed_base_as_it_was(folder, bits):
    module = load_pretrained(folder, "causal_lm", bits=bits)
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, WORDS, (8, 7), generator=draw) for _ in range(K)]
    with torch.no_grad():
        before = module.eval()(texts[0])  # the first time, when it packs what it has for this machine
    task = task_of(module, [(x, x.roll(-1, 1)) for x in texts])
    method = FLoRAL(C, AdapterPlan(peft=LORA), local=LocalTraining(lr=0.05, batch_size=4), freeze_base=True)
    ran = run(task, method, rounds=2, engine=Engine("stacked"))
    served = ran.personal_model(1)
    with torch.no_grad():
        assert bool(served(texts[1]).isfinite().all())
    assert ran.figures["train_loss"] > 0
    with torch.no_grad():
        assert torch.equal(module.eval()(texts[0]), before)
