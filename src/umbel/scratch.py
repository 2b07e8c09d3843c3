"""Training a model from its first weights on, which can be stopped anywhere and gone on with.

What a step learns from depends on the seed and the step's number alone, and a checkpoint has the weights and
AdamW's moments: a training that was stopped gives the same weights as one that was not (to the bit on a CPU).
Every twentieth of the way the loss on held out examples is taken; the weights of the lowest are kept.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from umbel.folder import Checkpoint, RunFolder

Batch = tuple[Tensor, Tensor]
WARMUP = 100  # steps in which the learning rate rises
LOOKS = 20  # times that the held out examples are looked at
TIMED = (10, 30)  # the steps between which a step's time is taken
SAVED = 30.0  # seconds between two checkpoints
TOLD = 2.0  # seconds between two lines


@dataclass(frozen=True)
class Plan:
    """How long to train, and how fast."""

    steps: int = 0  # 0: as many as fit into the minutes, which is found out by timing the first ones
    minutes: float = 60.0
    rate: float = 1e-3  # AdamW's, at its highest; it falls to a tenth along a cosine
    decay: float = 0.1  # of the weights of products

    def rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step; `total` may be 0, unknown, while it rises."""
        warmup = min(WARMUP, max(1, self.steps // 10)) if self.steps else WARMUP
        if step < warmup:
            return self.rate * (step + 1) / warmup
        along = (step - warmup) / max(1, total - warmup)
        return self.rate * (0.55 + 0.45 * cos(pi * min(1.0, along)))


@dataclass
class State:
    """How far a training has come."""

    step: int = 0
    total: int = 0  # steps in all; 0 while it is not known
    loss: float = inf  # of the last step that was told
    held: float = inf  # the last loss on held out examples
    best: float = inf  # the lowest of them
    since: int = 0  # the step at which this process began


@dataclass(frozen=True)
class Work:
    """What is trained on, and what is done with it.

    Attributes:
        draw: a step's number → its examples, on the model's device.
        held: batches to look at now and then.
        loss: (logits, targets) → their mean loss.
        keep: writes the model as it is.
        tell: says how far it has come.
    """

    model: nn.Module
    draw: Callable[[int], Batch]
    held: Sequence[Batch]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    keep: Callable[[], None]
    tell: Callable[[State], None]


def train(work: Work, plan: Plan, folder: RunFolder) -> State:
    """Trains from the last checkpoint on, or from the beginning, to the end.

    Raises:
        RunFolderError: the folder's checkpoints are damaged or of another training, or cannot be written.
    """
    optimizer = _adamw(work.model, plan)
    state = _restored(work.model, optimizer, folder)
    state.total = state.total or plan.steps
    saved = told = timed = time.monotonic()
    while not state.total or state.step < state.total:
        loss = _step(work, plan, optimizer, state)
        done = state.step - state.since
        if not state.total and done in TIMED:
            state.loss = float(loss)  # waits for the device
            if done == TIMED[0]:
                timed = time.monotonic()
            else:
                each = (time.monotonic() - timed) / (TIMED[1] - TIMED[0])
                state.total = max(state.step + 1, int(plan.minutes * 60 / each))
        if state.step == state.total or (state.total and state.step % max(1, state.total // LOOKS) == 0):
            _look(work, state, folder)
        if state.step == state.total or time.monotonic() - told > TOLD:
            state.loss, told = float(loss), time.monotonic()
            work.tell(state)
        if state.step == state.total or time.monotonic() - saved > SAVED:
            _save(work.model, optimizer, state, folder)
            saved = time.monotonic()
    return state


def finished(folder: RunFolder) -> State | None:
    """How a training ended; None while it goes on."""
    checkpoint, _ = folder.latest()
    state = State() if checkpoint is None else _told(checkpoint)
    return state if state.total and state.step >= state.total else None


def _step(work: Work, plan: Plan, optimizer: torch.optim.AdamW, state: State) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = plan.rate_at(state.step, state.total)
    x, y = work.draw(state.step)
    work.model.train()
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        loss = work.loss(work.model, x, y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
    optimizer.step()
    state.step += 1
    return loss.detach()


def _look(work: Work, state: State, folder: RunFolder) -> None:
    """The loss on held out examples; the model is kept where it is the lowest so far."""
    work.model.eval()
    with torch.no_grad():
        state.held = sum(float(work.loss(work.model, x, y)) for x, y in work.held) / len(work.held)
    if state.held < state.best:
        state.best = state.held
        work.keep()
    folder.append("metrics.jsonl", {"round": state.step, "held": state.held, "best": state.best})


def _adamw(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    leaves = list(model.parameters())
    groups = [
        {"params": [leaf for leaf in leaves if leaf.dim() > 1], "weight_decay": plan.decay},
        {"params": [leaf for leaf in leaves if leaf.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95))


def _save(model: nn.Module, optimizer: torch.optim.AdamW, state: State, folder: RunFolder) -> None:
    tensors = {}
    for name, leaf in model.named_parameters():
        tensors[f"weight/{name}"] = leaf.detach()
        if leaf in optimizer.state:
            tensors[f"first/{name}"] = optimizer.state[leaf]["exp_avg"]
            tensors[f"second/{name}"] = optimizer.state[leaf]["exp_avg_sq"]
    tensors["state"] = torch.tensor([state.total, state.held, state.best], dtype=torch.float64)
    folder.settle()
    folder.save(Checkpoint(state.step, tensors))


def _restored(model: nn.Module, optimizer: torch.optim.AdamW, folder: RunFolder) -> State:
    """How far the last checkpoint has come, with the model and the optimizer as they were then."""
    checkpoint, _ = folder.latest()
    folder.rewind(checkpoint.round if checkpoint else 0)
    if checkpoint is None:
        return State()
    tensors = checkpoint.tensors
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(tensors[f"weight/{name}"])
            if f"first/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].to(leaf.device) for key in ("first", "second")}
                optimizer.state[leaf] = {
                    "step": torch.tensor(float(checkpoint.round)),
                    "exp_avg": moments["first"],
                    "exp_avg_sq": moments["second"],
                }
    return _told(checkpoint)


def _told(checkpoint: Checkpoint) -> State:
    total, held, best = checkpoint.tensors["state"].tolist()
    return State(checkpoint.round, int(total), held=held, best=best, since=checkpoint.round)
