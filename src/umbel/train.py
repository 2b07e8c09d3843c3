"""Local training for a whole cohort at once: one loop over batches, K clients on the leading axis."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from umbel.clients import Batch, ClientData, Guard
from umbel.errors import RecipeError
from umbel.mixing import as_leading
from umbel.model.loss import Precision
from umbel.model.stacked import Factors, factored_gradients
from umbel.ranges import check_ranges
from umbel.seeds import generator, hashed, normal
from umbel.tree import Params

Groups = dict[str, Params]
"""Tensors by group ("base", "adapters", "logits", …); each group has its own learning rate."""

Objective = Callable[[Groups, Batch, int], Tensor]
"""(groups, batch, step) → (K,) losses."""


@dataclass(frozen=True)
class LocalTraining:
    """What one client does in one round.

    Attributes:
        epochs: passes over its own examples, in batches of `batch_size`.
        steps: instead of epochs, so many batches for every client.
        optimizer: plain SGD (with `momentum`), or AdamW (Loshchilov, Hutter 2019, https://arxiv.org/abs/1711.05101,
            Algorithm 2) with `beta1`, `beta2`, `eps`. Its moments start anew in every round, unless a method
            keeps them.
        weight_decay: of SGD in the gradient, of AdamW decoupled from it.
        warmup: the share of the run in which rates rise linearly to `lr`.
        decay: how they fall from there to `final` · lr at the end of the run.
        precision: in what passes forward and backward compute products and convolutions. With "bfloat16"
            (PyTorch's autocast) all that is kept stays float32: weights, adapters, routers, losses, gradients, the
            optimizer's memory; and so does evaluation.
    """

    lr: float = 0.1
    batch_size: int = 16
    epochs: int = 1
    steps: int = 0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.0
    decay: Literal["none", "cosine"] = "none"
    final: float = 0.0
    shuffle: bool = True
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_ranges(self, lr="(0, inf)", batch_size="[1, inf)", epochs="[1, inf)", steps="[0, inf)")
        check_ranges(self, momentum="[0, 1)", weight_decay="[0, inf)", beta1="[0, 1)", beta2="[0, 1)")
        check_ranges(self, eps="(0, inf)", warmup="[0, 1)", final="[0, 1]")
        if self.momentum and self.optimizer == "adamw":
            raise RecipeError("local.momentum: AdamW has beta1 instead")

    def rate(self, run: float) -> float:
        """What `lr` is multiplied by when the share `run` of the whole run is over."""
        if run < self.warmup:
            return run / self.warmup
        if self.decay == "none":
            return 1.0
        over = (run - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + cos(pi * over)) / 2


def local_train(
    objective: Objective,
    start: Groups,
    data: ClientData,
    local: LocalTraining,
    lr: Mapping[str, float],
    precondition: Callable[[Groups, Groups], Groups] | None = None,
    plain: frozenset[str] = frozenset(),
    project: Callable[[Groups], None] | None = None,
) -> tuple[Groups, Tensor]:
    """The tensors after the clients' local training, and each client's mean training loss (K,).

    A client without a batch at some step keeps its tensors bit for bit.

    Args:
        objective: (groups, batch, step) → (K,) losses; differentiated as their sum, which gives every
            client its own gradient, for no tensor belongs to two clients.
        start: leading axis K; not changed. A group MOMENTS, made by `no_moments`, is what AdamW starts from,
            and comes back as it was left.
        data: whose batches, in which order.
        local: steps and rates.
        lr: the learning rate of each trained group; a group without one is passed on, copied, and only
            what the forward pass itself changes in it (running statistics) comes back changed.
        precondition: (tensors, gradients) of the trained groups → gradients to step along. Those that plain SGD
            takes as factors (model/stacked.py) are not among them: no adapter's are.
        plain: groups that are stepped by SGD without momentum and weight decay (routers).
        project: takes the trained groups back, in place, to where they have to be, after each step.
    """
    groups: Groups = {g: {n: leaf.clone() for n, leaf in params.items()} for g, params in start.items()}
    trained: Groups = {g: groups[g] for g in lr}
    leaves = [leaf.requires_grad_(True) for params in trained.values() for leaf in params.values()]
    names = [(group, name) for group, params in trained.items() for name in params]
    if (counter := _training.get()) is not None:
        counter.parameters += sum(leaf[0].numel() for leaf in leaves)
    optimizer = _Optimizer(local, trained, lr, plain, groups.get(MOMENTS), len(data.clients))
    rate_at = _rates(local, data)
    total = torch.zeros(len(data.clients), device=data.examples.x.device)
    steps = torch.zeros_like(total)
    batches = data.batches(local.batch_size, local.epochs, local.shuffle, local.steps)
    if data.guard is not None:
        batches, noise = data.lots(local.batch_size, local.epochs, local.steps), _Noise(data, data.guard)
    for step, batch in enumerate(batches):
        if data.guard is None:
            with factored_gradients(leaves if optimizer.plain else []) as factors:
                losses = objective(groups, batch, step)
                found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            grads = {
                place: torch.zeros_like(leaves[place]) if grad is None else grad
                for place, grad in enumerate(found)
                if grad is not None or not factors.get(place)
            }
        else:
            losses, noisy = noise.gradients(objective, groups, leaves, batch, step, local.batch_size)
            grads, factors = dict(enumerate(noisy)), {}
        count_step()
        with torch.no_grad():
            if precondition is not None:
                dense: Groups = {group: {} for group in trained}
                for place, grad in grads.items():
                    group, name = names[place]
                    dense[group][name] = grad
                conditioned = precondition(trained, dense)
                grads = {place: conditioned[names[place][0]][names[place][1]] for place in grads}
            optimizer.step(grads, factors, batch.active, rate_at(step))
            if project is not None:
                project(trained)
            present = 1.0 if batch.active is None else batch.active
            total += torch.where(batch.active, losses, 0.0) if batch.active is not None else losses
            steps += present
    for leaf in leaves:
        leaf.requires_grad_(False)
    return groups, total / steps


def _rates(local: LocalTraining, data: ClientData) -> Callable[[int], float | Tensor]:
    """What rates are multiplied by at a step of the round: a number, or (K,) where clients differ.

    A client's round is over when its own last step is, whoever is stacked with it.
    """
    own_steps = data.own_steps(local.batch_size, local.epochs, local.steps).clip(min=1)
    lengths, which = np.unique(own_steps, return_inverse=True)

    def at(step: int) -> float | Tensor:
        if not data.num_rounds:
            return local.rate(local.warmup)
        over = [(data.round - 1 + min(step / length, 1.0)) / data.num_rounds for length in lengths.tolist()]
        shares = [local.rate(min(max(run, 0.0), 1.0)) for run in over]
        if len(set(shares)) == 1:
            return shares[0]
        return torch.tensor(shares, device=data.examples.x.device)[torch.from_numpy(which)]

    return at


MOMENTS = "moments"  # the group of an optimizer's memory


def no_moments(groups: Groups) -> Params:
    """AdamW's memory before its first step, for the trained groups (leading axis K or none)."""
    named = {f"{g}/{n}": leaf for g, params in groups.items() for n, leaf in params.items()}
    zeros = {f"{part}/{name}": torch.zeros_like(leaf) for part in ("m", "v") for name, leaf in named.items()}
    some = next(iter(named.values()))
    return zeros | {"t": some.new_zeros(some.shape[:1], dtype=torch.float32)}  # counts what half cannot


@dataclass
class Training:
    """What was trained inside a block."""

    steps: int = 0  # of the optimizer
    parameters: int = 0  # that were trained: of the first client, all of its models, adapters and routers


_training: ContextVar[Training | None] = ContextVar("training", default=None)


@contextmanager
def counted_training() -> Iterator[Training]:
    """Counts what is trained inside the block, in what it gives."""
    token = _training.set(counter := Training())
    try:
        yield counter
    finally:
        _training.reset(token)


def count_step() -> None:
    """Tells `counted_training` of a step."""
    if (counter := _training.get()) is not None:
        counter.steps += 1


class _Optimizer:
    """Steps K clients' tensors in place; those that are not `active` stay as they are, memory and all."""

    def __init__(
        self,
        local: LocalTraining,
        trained: Groups,
        lr: Mapping[str, float],
        plain: frozenset[str],
        moments: Params | None,
        num_clients: int,
    ) -> None:
        self.local = local
        self.leaves = [leaf for params in trained.values() for leaf in params.values()]
        self.rates = [lr[g] for g, params in trained.items() for _ in params]
        self.eased = [g not in plain for g, params in trained.items() for _ in params]
        self.adam = [local.optimizer == "adamw" and eased for eased in self.eased]
        self.velocity = [torch.zeros_like(leaf) for leaf in self.leaves] if local.momentum else None
        self.plain = local.optimizer == "sgd" and not local.momentum and not local.weight_decay
        if any(self.adam):
            kept = {g: params for g, params in trained.items() if g not in plain}
            self.moments = no_moments(kept) if moments is None else moments
            self.names = [f"{g}/{n}" for g, params in kept.items() for n in params]
            eased = [leaf for params in kept.values() for leaf in params.values()]
            for name, leaf in zip(self.names, eased, strict=True):
                for moment in (f"m/{name}", f"v/{name}"):
                    self.moments[moment] = _laid_as(leaf, self.moments[moment])

    def step(
        self, grads: dict[int, Tensor], factors: dict[int, Factors], active: Tensor | None, share: float | Tensor
    ) -> None:
        """One step along the gradients of the leaves by place, at `share` of the rates, or each client's (K,).

        `factors` are gradients too, of which a `plain` optimizer alone takes any.
        """
        if any(self.adam):
            self._adamw([grads[i] for i, adam in enumerate(self.adam) if adam], active, share)
        chosen = [i for i, adam in enumerate(self.adam) if not adam and i in grads]
        if chosen:
            self._sgd(chosen, [grads[i] for i in chosen], active, share)
        for place, pairs in factors.items():
            leaf, rate = self.leaves[place], self.rates[place] * (share if isinstance(share, float) else 1.0)
            for grad, x in pairs:
                moving = _at(share, _where(active, grad, torch.zeros_like(grad)))
                torch.baddbmm(leaf, moving.mT, x, alpha=-rate, out=leaf)

    def _sgd(self, chosen: list[int], grads: list[Tensor], active: Tensor | None, share: float | Tensor) -> None:
        leaves, eased = [self.leaves[i] for i in chosen], [self.eased[i] for i in chosen]
        if self.local.weight_decay:
            decays = [self.local.weight_decay * ease for ease in eased]
            grads = list(torch._foreach_add(grads, torch._foreach_mul(leaves, decays)))
        if self.velocity is not None:
            velocity = [self.velocity[i] for i in chosen]
            kept = [self.local.momentum * ease for ease in eased]
            moved = torch._foreach_add(torch._foreach_mul(velocity, kept), grads)
            for old, new in zip(velocity, moved, strict=True):
                old.copy_(_where(active, new, old))
            grads = velocity
        if active is not None:
            grads = [_where(active, grad, torch.zeros_like(grad)) for grad in grads]
        rates, common = [self.rates[i] for i in chosen], share if isinstance(share, float) else 1.0
        grads = [_at(share, grad) for grad in grads]
        for rate in set(rates):
            same = [i for i, other in enumerate(rates) if other == rate]
            torch._foreach_add_([leaves[i] for i in same], [grads[i] for i in same], alpha=-rate * common)

    def _adamw(self, grads: list[Tensor], active: Tensor | None, share: float | Tensor) -> None:
        local, count = self.local, self.moments["t"]
        chosen = [i for i, adam in enumerate(self.adam) if adam]
        leaves, rates = [self.leaves[i] for i in chosen], [self.rates[i] for i in chosen]
        # A leaf, its gradient and its moments lie alike in memory, along which the fused step goes.
        grads = [_laid_as(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True)]
        first, second = ([self.moments[f"{part}/{name}"] for name in self.names] for part in ("m", "v"))
        # PyTorch's own, in one pass over memory, where all clients are at the same step and rate.
        if active is None and isinstance(share, float) and bool((count == count[0]).all()):
            for rate in set(rates):
                same = [k for k, other in enumerate(rates) if other == rate]
                chosen_leaves, chosen_grads, m, v = (
                    [_in_memory(values[k]) for k in same] for values in (leaves, grads, first, second)
                )
                adamw(
                    chosen_leaves,
                    chosen_grads,
                    m,
                    v,
                    [],
                    [count[0].clone() for _ in same],
                    fused=True,
                    amsgrad=False,
                    beta1=local.beta1,
                    beta2=local.beta2,
                    lr=rate * share,
                    weight_decay=local.weight_decay,
                    eps=local.eps,
                    maximize=False,
                )
            count += 1
            return
        count += 1.0 if active is None else active.to(count.dtype)
        for leaf, grad, one, two, rate in zip(leaves, grads, first, second, rates, strict=True):
            one.copy_(_where(active, torch.lerp(grad, one, local.beta1), one))
            two.copy_(_where(active, torch.lerp(grad.square(), two, local.beta2), two))
            steps = count.view(-1, *[1] * (leaf.dim() - 1)).clamp(min=1)
            size = (two / (1 - local.beta2**steps)).sqrt_().add_(local.eps)
            own = rate * (share if isinstance(share, float) else as_leading(share.to(leaf.dtype), leaf))
            moved = leaf * (1 - own * local.weight_decay) - own / (1 - local.beta1**steps) * one / size
            leaf.copy_(_where(active, moved, leaf))


class _Noise:
    """DP-SGD's gradients for K clients (Abadi et al. 2016, Algorithm 1, https://arxiv.org/abs/1607.00133)."""

    def __init__(self, data: ClientData, guard: Guard) -> None:
        self.guard = guard
        self.counts = data.num_examples
        self.draws = [
            None if guard.secret else generator(data.seed, "noise", data.round, int(client))
            for client in data.clients
        ]

    def gradients(
        self, objective: Objective, groups: Groups, leaves: list[Tensor], batch: Batch, step: int, size: int
    ) -> tuple[Tensor, list[Tensor]]:
        """(K,) mean losses, and the sum of the lot's clipped gradients with noise, by the lot's expected length.

        Examples take turns and clients are stacked: each turn is a batch of one example of every client, whose
        gradient is that example's own, whatever the method's objective is.
        """
        real = batch.weight if batch.weight is not None else torch.ones_like(batch.x[:, :, 0])
        total, losses = [torch.zeros_like(leaf) for leaf in leaves], torch.zeros_like(real[:, 0])
        for place in range(real.shape[1]):
            here, own = slice(place, place + 1), real[:, place]
            key = None if batch.key is None else hashed(batch.key + (place << 32))  # a dropout mask of its own
            one = replace(
                batch,
                x=batch.x[:, here],
                y=batch.y[:, here],
                rows=batch.rows[:, here],
                weight=None,
                active=None,
                key=key,
            )
            values = objective(groups, one, step)
            grads = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
            with torch.no_grad():
                length = torch.stack([grad.flatten(1).double().square().sum(1) for grad in grads]).sum(0).sqrt()
                scale = own * (self.guard.clip / length.clamp(min=self.guard.clip)).to(own.dtype)
                for leaf, grad in zip(total, grads, strict=True):
                    cut = as_leading(scale.to(grad.dtype), grad) * grad
                    leaf.add_(torch.where(as_leading(own, grad) > 0, cut, 0.0))
                losses += torch.where(own > 0, values, 0.0)
        lot = self.counts.clamp(max=size)
        spread = self.guard.clip * self.guard.multiplier
        for leaf in total:
            drawn = torch.stack([normal(leaf.shape[1:], draw) for draw in self.draws])
            leaf.add_(spread * drawn.to(leaf)).div_(as_leading(lot.to(leaf.dtype), leaf))
        return losses / real.sum(1).clamp(min=1), total


def _laid_as(leaf: Tensor, values: Tensor) -> Tensor:
    """The values, in memory as the leaf is."""
    return values if values.stride() == leaf.stride() else torch.empty_like(leaf).copy_(values)


def _in_memory(values: Tensor) -> Tensor:
    """The same numbers, one after the other as they lie in memory, which has no gaps between them."""
    return values if values.is_contiguous() else values.as_strided((values.numel(),), (1,))


def _at(share: float | Tensor, grad: Tensor) -> Tensor:
    """The gradient (K, …), at each client's own share of the rates where they differ."""
    return grad if isinstance(share, float) else as_leading(share.to(grad.dtype), grad) * grad


def _where(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the active clients, `old` for the others."""
    if active is None:
        return new
    return torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, old)
