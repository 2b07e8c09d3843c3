"""Speed of fine-tuning a frozen language model for many clients at once, beside PEFT on its own.

    python benchmarks/lora_speed.py --out benchmarks/results/lora_speed.json

K = 32 clients with batches of one text, on stories260K (from UMBEL_DATA) and on a GPT-2 of ten million
parameters with random weights (speed does not depend on them). Beside our local training run

    apart       the same clients trained one after another by PEFT, with adapters of the same rank
    ordinary    one PEFT run on the same tokens, all clients' texts of a step in one batch
    c1, c8      FLoRAL with one and with eight adapters, routes by gradients; "ordinary_c8" is PEFT at their total rank
    c8_em       eight adapters with the default router, which also measures each adapter on all of these texts

All take AdamW steps on the same texts. Figures are ratios of the best of several interleaved repetitions.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import measure
from speed import round_work
from umbel.adapters import AdapterPlan
from umbel.cohort import Engine
from umbel.methods import FLoRAL
from umbel.methods.routing import Router
from umbel.model.pretrained import of_transformers
from umbel.seeds import seeded
from umbel.tasks.bases import load_pretrained
from umbel.tasks.task import Task, task_of
from umbel.train import LocalTraining

CLIENTS, RANK, LENGTH, STEPS = 32, 4, 64, 4
LORA: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
GRADIENT = Router("gradient")


def gpt2_10m() -> nn.Module:
    """GPT-2 with 6 layers of width 320 and 8,192 words: 10.1 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=8192, n_positions=256, n_embd=320, n_layer=6, n_head=5, bos_token_id=0, eos_token_id=0
    )
    with seeded(0, "gpt2"):
        return of_transformers(GPT2LMHeadModel(config), "causal_lm")


def texts(model: nn.Module, vocabulary: int) -> Task:
    """As many random texts for each client as it takes steps."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (CLIENTS, STEPS, LENGTH + 1), generator=draw)
    clients = [(own[:, :-1], own[:, 1:]) for own in ids]
    return task_of(model, clients, test=clients)


def ours(task: Task, num_adapters: int, router: Router = GRADIENT) -> Callable[[], None]:
    local = LocalTraining(optimizer="adamw", lr=1e-3, batch_size=1)
    method = FLoRAL(num_adapters, AdapterPlan(peft=LORA), router, local, init_std=0.0, freeze_base=True)
    return round_work(task, method, Engine("stacked", chunk=CLIENTS), CLIENTS)


def peft_training(task: Task, rank: int, together: bool) -> Callable[[], None]:
    """PEFT and torch.optim.AdamW: one client after another, or the texts of all in one batch."""
    from peft import LoraConfig, get_peft_model

    # The wrapped transformers model, as anyone would train it.
    inner: Any = deepcopy(task.model).model
    conv1d = type(inner).__name__.startswith("GPT2")
    settings = LORA | {"r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": conv1d}
    config = LoraConfig(**settings, task_type="CAUSAL_LM")
    model = get_peft_model(inner, config).train()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    first = [leaf.detach().clone() for leaf in trained]
    data = [task.train.of_client(client) for client in range(CLIENTS)]
    x, y = (torch.stack([own[part] for own in data], 1) for part in (0, 1))  # (steps, clients, length)

    def train(x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            for leaf, value in zip(trained, first, strict=True):
                leaf.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        for inputs, targets in zip(x, y, strict=True):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def work() -> None:
        if together:
            train(x, y)
        else:
            for client in range(CLIENTS):
                train(x[:, client : client + 1], y[:, client : client + 1])

    return work


def ratios(task: Task, repeats: int) -> dict[str, float]:
    best = measure.seconds_beside(
        {
            "c1": ours(task, 1),
            "c8": ours(task, 8),
            "c8_em": ours(task, 8, Router("em")),
            "apart": peft_training(task, RANK, together=False),
            "ordinary": peft_training(task, RANK, together=True),
            "ordinary_c8": peft_training(task, 8 * RANK, together=True),
        },
        repeats=repeats,
    )
    tokens = CLIENTS * STEPS * LENGTH
    return {
        "tokens_per_s": tokens / best["c1"],
        "apart_over_ours": best["apart"] / best["c1"],
        "ours_over_ordinary": best["c1"] / best["ordinary"],
        "c8_over_ordinary_of_total_rank": best["c8"] / best["ordinary_c8"],
        "c8_over_c1": best["c8"] / best["c1"],
        "c8_em_over_c1": best["c8_em"] / best["c1"],
    }


def main() -> None:
    chosen = measure.arguments(__doc__ or "")
    stories = load_pretrained("models/stories260K", "causal_lm")
    # What takes half a second is repeated more often, for whatever else the machine does hides more of it.
    figures = {"stories260k": ratios(texts(stories, 512), 15), "gpt2_10m": ratios(texts(gpt2_10m(), 8192), 5)}
    measure.report(figures, chosen)


if __name__ == "__main__":
    main()
