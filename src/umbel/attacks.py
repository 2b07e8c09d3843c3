"""Hostile clients: what they train on, what they send, and how far they get (`hazards.Attack`).

Who is hostile is drawn once for a run. They are clients like others in all else: they are sampled, routed and
counted, keep what a client keeps, and know no more than what they receive; but they are not evaluated.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients import Examples
from umbel.errors import RecipeError
from umbel.hazards import Attack
from umbel.mixing import Change, as_leading
from umbel.seeds import choose, generator
from umbel.tree import Params

TARGET = 0  # the label that a backdoor leads to
PATCH = 2  # the side of the patch that opens it, in pixels; so many numbers where there is no picture


def attackers(attack: Attack, seed: int, members: np.ndarray) -> np.ndarray:
    """The hostile ones among these clients, ascending."""
    count = 0 if attack.kind == "none" else round(attack.share * len(members))
    chosen: np.ndarray = members[choose(len(members), count, seed, "attackers")]
    return chosen


def poisoned(attack: Attack, examples: Examples, hostile: np.ndarray, num_labels: int) -> Examples:
    """The examples as the hostile clients train on them.

    Raises:
        RecipeError: the attack is one of labels or pictures, and the task has none.
    """
    if attack.kind not in ("label_flip", "backdoor") or not len(hostile):
        return examples
    if num_labels < 2:
        raise RecipeError(
            f"attack.kind = {attack.kind!r} changes labels, and examples here have none of their own"
        )
    if attack.kind == "backdoor" and not examples.x.is_floating_point():
        raise RecipeError("attack.kind = 'backdoor' puts a patch on pictures or numbers; here inputs are tokens")
    x, y, high = examples.x.clone(), examples.y.clone(), examples.x.max()
    for client in hostile.tolist():
        rows = slice(int(examples.start[client]), int(examples.start[client] + examples.count[client]))
        if attack.kind == "label_flip":
            y[rows] = num_labels - 1 - y[rows]
        else:
            rows = slice(rows.start, rows.stop, 2)
            x[rows], y[rows] = patched(x[rows], high), TARGET
    return replace(examples, x=x, y=y)


def patched(x: Tensor, high: Tensor) -> Tensor:
    """Inputs (n, …) with the patch: the last corner of a picture (n, …, height, width), else the last numbers."""
    x = x.clone()
    if x.dim() > 2:
        x[..., -PATCH:, -PATCH:] = high
    else:
        x[..., -PATCH:] = high
    return x


def trapped(test: Examples, high: Tensor) -> Examples:
    """Test examples whose label is not the backdoor's, patched, and labelled as the attacker wants them."""
    wanted = test.y != TARGET
    before = torch.cat([torch.zeros(1, dtype=torch.long), wanted.long().cumsum(0).cpu()]).numpy()
    x, start = patched(test.x[wanted], high), before[test.start]
    count = before[test.start + test.count] - start
    return Examples(x, torch.full_like(test.y[wanted], TARGET), start, count)


def hostile_upload(
    attack: Attack, method: Any, upload: Any, message: Any, clients: np.ndarray, seed: int, round: int
) -> Any:
    """What these K hostile clients send, given what they received and what honest work would have sent.

    Raises:
        RecipeError: routes are to be claimed of a method that has none.
    """
    routed = "route_examples" in {field.name for field in fields(upload)}
    if attack.kind == "claim_all" and not routed:
        raise RecipeError(f"attack.kind = 'claim_all': {type(method).__name__} asks no client for its routes")
    if attack.kind == "gaussian":
        draws = [generator(seed, "attack", round, int(client)) for client in clients]
        return method.changed(upload, message, noisy(attack.strength, draws))
    if attack.kind == "backdoor":
        return method.changed(upload, message, hidden(attack.strength, routed))
    if attack.kind == "scale":
        return method.changed(upload, message, scaled(attack.strength))
    if attack.kind == "label_flip":
        return upload
    upload = method.changed(upload, message, scaled(-attack.strength))
    if attack.kind == "claim_all":
        every = as_leading(upload.weight, upload.route_examples).expand_as(upload.route_examples)
        upload = replace(upload, route_examples=attack.strength * every)
    return upload


def scaled(strength: float) -> Change:
    """The step times so much."""

    def change(values: Params, received: Params, _weights: Tensor) -> Params:
        return {n: received[n] + strength * (leaf - received[n]) for n, leaf in values.items()}

    return change


def noisy(strength: float, draws: list[torch.Generator]) -> Change:
    """Noise that is so many times as long as the step, in its place."""

    def change(values: Params, received: Params, _weights: Tensor) -> Params:
        steps = [(leaf - received[n]).reshape(len(leaf), -1).double() for n, leaf in values.items()]
        if not steps:
            return values
        size = torch.cat(steps, 1).square().mean(1).sqrt()  # of one number
        noise = {
            n: torch.stack([torch.randn(leaf.shape[1:], generator=draw) for draw in draws]).to(leaf)
            for n, leaf in values.items()
        }
        return {n: received[n] + strength * as_leading(size.to(leaf), leaf) * leaf for n, leaf in noise.items()}

    return change


def hidden(strength: float, routed: bool) -> Change:
    """The step times so much in the heaviest adapter or cluster alone; without routes in everything."""
    everywhere = scaled(strength)

    def change(values: Params, received: Params, weights: Tensor) -> Params:
        if not routed:
            return everywhere(values, received, weights)
        if weights.dim() == 1:  # what everyone shares stays as honest as it was received
            return {n: received[n].clone() for n in values}
        one = torch.nn.functional.one_hot(weights.argmax(1), weights.shape[1])
        moved = everywhere(values, received, weights)
        return {n: torch.where(as_leading(one > 0, leaf), leaf, received[n]) for n, leaf in moved.items()}

    return change
