"""The loss of K clients at once: one module, K sets of tensors, K batches, K numbers."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from umbel.clients import Batch, ClientData
from umbel.errors import DataError, ModelError
from umbel.model.dropout import KEY, ROWS, dropout_buffers
from umbel.model.stacked import rows_of, takes_client_axis
from umbel.tree import HALF, Params, is_broadcast, wide

LossName = Literal["cross_entropy", "mse"]
Precision = Literal["float32", "bfloat16"]
IGNORED = -100  # the target of a place in a text that counts nothing: padding, or what was given
FORWARD_EXAMPLES = 8192  # in one forward pass without gradients, of all stacked clients together
CACHED_IMAGES = 256  # of these, on a CPU, at a time


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) −log p(target), in nats; logits (B, labels) with targets (B,).

    Of texts, logits (B, T, labels) with targets (B, T), it is the mean over those of their T places whose target
    is not IGNORED; 0 for a text without any.
    """
    each = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    if targets.dim() == 1:
        return each
    counted = (targets != IGNORED).flatten(1).sum(1).clamp(min=1)
    return each.view(len(targets), -1).sum(1) / counted


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) squared error, averaged over the outputs of one example.

    Raises:
        DataError: outputs and targets differ in shape, which would broadcast every example against every other.
    """
    if outputs.shape != targets.shape:
        raise DataError(
            f"mse: for an example the model answers {tuple(outputs.shape[1:])}, but its target has the shape "
            f"{tuple(targets.shape[1:])}; reshape the targets"
        )
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def among_own(logits: Tensor, targets: Tensor, labels_each: int) -> Tensor:
    """Logits (…, L) with −∞ at labels of other tasks than the target's (…); task t's begin at t · labels_each."""
    places = torch.arange(logits.shape[-1], device=logits.device)
    elsewhere = places // labels_each != (targets // labels_each).unsqueeze(-1)
    return logits.masked_fill(elsewhere, -torch.inf)


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": squared_error,
}


@dataclass(frozen=True)
class Loss:
    """`loss(params, batch)` → (K,): each client's mean loss under its own tensors.

    `params` maps names of the module's parameters and buffers to tensors with a leading axis K; what it
    does not name is the module's own. A tensor whose leading axis is a broadcast (stride 0) is one for all,
    so that K clients share one matrix product. One client runs the module as it is; several are the rows of one
    batch where every layer with a client's own tensor can take that (stacked.py), and go through `vmap` elsewhere.

    Attributes:
        module: the model.
        name: what is made of its outputs.
        precision: "bfloat16" computes products and convolutions of training passes in it (PyTorch's autocast).
            Tensors, gradients, losses and everything in evaluation stay as they are.
        labels_each: how many labels each task has; an example's task is known, and only its labels are told apart
            (`among_own`). 0: all labels are.
    """

    module: nn.Module
    name: LossName
    precision: Precision = "float32"
    labels_each: int = 0
    whole: bool = False  # compute padding too where a model could leave it out (`pieces` of pretrained.py)

    def __call__(self, params: Params, batch: Batch, training: bool = True) -> Tensor:
        return batch.mean(self.per_example(self.outputs(params, batch.x, training, batch.key), batch.y))

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(K, B) losses for outputs (K, B, …), of which half precision has too few digits."""
        outputs = self.told_apart(outputs.float() if outputs.dtype in HALF else outputs, targets)
        flat = LOSSES[self.name](outputs.flatten(0, 1), targets.flatten(0, 1))
        return flat.view(targets.shape[:2])

    def told_apart(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs (K, B, …) with −∞ at labels that are not among those that the targets' tasks have."""
        return among_own(outputs, targets, self.labels_each) if self.labels_each else outputs

    def outputs(self, params: Params, x: Tensor, training: bool = False, key: Tensor | None = None) -> Tensor:
        """(K, B, …) what each client's model answers on x (K, B, …); `key` (K,) seeds dropout in training.

        Raises:
            ModelError: K > 1 and PyTorch cannot stack a layer of the module.
        """
        module: Any = self.module
        if self.halves:
            params = {name: _in_type(leaf, self.halves.get(name, leaf.dtype)) for name, leaf in params.items()}
        if self.whole or not hasattr(module, "pieces"):
            return self._answers(params, x, training, key)
        parts = module.pieces(x)
        if len(parts) < 2:
            return self._answers(params, module.shortened(x), training, key)
        answers, places = [], []
        numbered = self.dropouts[1] if training and key is not None else ()
        for clients, rows, part in parts:
            own = {name: _rows(leaf, clients) for name, leaf in params.items()} | dict.fromkeys(numbered, rows)
            seed = None if key is None else key[clients]
            answers.append(self._answers(own, part, training, seed).flatten(0, 1))
            places.append((clients.unsqueeze(1) * x.shape[1] + rows).flatten())
        joined = torch.cat(answers)[torch.cat(places).argsort()]
        return joined.view(*x.shape[:2], *joined.shape[1:])

    def _answers(self, params: Params, x: Tensor, training: bool, key: Tensor | None) -> Tensor:
        if self.precision == "float32" or not training:
            return self._outputs(params, x, training, key)
        with torch.autocast(x.device.type, getattr(torch, self.precision)):
            return self._outputs(params, x, training, key).float()

    def _outputs(self, params: Params, x: Tensor, training: bool, key: Tensor | None) -> Tensor:
        if any(layer.training != training for layer in self.module.modules()):
            self.module.train(training)
        if training and key is not None:
            params = params | dict.fromkeys(self.dropouts[0], key)
        if x.shape[0] == 1:
            # squeeze, not [0]: the gradient of an index would fill a whole tensor with zeros first
            one = {name: leaf.squeeze(0) for name, leaf in params.items()}
            return self._alone(one, x.squeeze(0), training).unsqueeze(0)
        shared = {name: leaf[0] for name, leaf in params.items() if is_broadcast(leaf)}
        own = {name: leaf for name, leaf in params.items() if name not in shared}
        if self.stackable.issuperset(own):
            try:
                with rows_of(x.shape[0] * x.shape[1]):
                    rows: Tensor = self._forward(shared | own, x.flatten(0, 1))
                return rows.view(*x.shape[:2], *rows.shape[1:])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass  # RowsMeetError, or a layer that makes something else of so many rows: vmap keeps them apart
        x_dim = None if is_broadcast(x) and own else 0
        try:
            forward = vmap(lambda p, x: self._forward(shared | p, x), in_dims=(0, x_dim))
            stacked: Tensor = forward(own, x[0] if x_dim is None else x)
        except RuntimeError as error:
            raise ModelError(
                f"clients cannot be stacked on this module, use --engine.mode=looped; PyTorch says: {error}"
            ) from error
        return stacked

    def over(self, params: Params, data: ClientData) -> Tensor:
        """(K,) each client's mean loss over its own examples, in evaluation mode, without gradients."""
        total = torch.zeros(len(data.clients), device=data.examples.x.device)
        with torch.no_grad():
            for batch in data.in_order(data.fitting(FORWARD_EXAMPLES)):
                weight = 1.0 if batch.weight is None else batch.weight
                total += (self.per_example(self.outputs(params, batch.x), batch.y) * weight).sum(1)
        return total / data.num_examples

    @cached_property
    def stackable(self) -> frozenset[str]:
        """The names of the tensors that the module takes with a leading client axis."""
        return frozenset() if mixes_examples(self.module) else takes_client_axis(self.module)

    @cached_property
    def dropouts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the module's dropout keys, and of what says which rows of a batch they are for."""
        return dropout_buffers(self.module, KEY), dropout_buffers(self.module, ROWS)

    @cached_property
    def halves(self) -> dict[str, torch.dtype]:
        """The types of the module's parameters of half precision, by name; what is trained is wider."""
        return {name: leaf.dtype for name, leaf in self.module.named_parameters() if leaf.dtype in HALF}

    def _alone(self, params: Params, x: Tensor, training: bool) -> Tensor:
        if x.dim() != 4:
            return self._forward(params, x)
        # Convolutions and pooling are about twice as fast with the channels last, and on a CPU with few images.
        x = x.contiguous(memory_format=torch.channels_last)
        if training or torch.is_grad_enabled() or x.device.type != "cpu":
            return self._forward(params, x)
        return torch.cat([self._forward(params, part) for part in x.split(CACHED_IMAGES)])

    def _forward(self, params: Params, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.module, params, (x,))
        return outputs


def _in_type(leaf: Tensor, kind: torch.dtype) -> Tensor:
    """The leaf (K, …) in this type; one for all stays so."""
    return leaf[:1].to(kind).expand_as(leaf) if is_broadcast(leaf) else leaf.to(kind)


def _rows(leaf: Tensor, clients: Tensor) -> Tensor:
    """The leaf (K, …) of these clients (k,), which are in order; one for all stays so."""
    if len(clients) == len(leaf):
        return leaf
    return leaf[:1].expand(len(clients), *leaf.shape[1:]) if is_broadcast(leaf) else leaf.index_select(0, clients)


def trained_params(module: nn.Module, needed: bool = True) -> Params:
    """Copies of the parameters that training changes, by name: all but those with requires_grad=False.

    They are at least float32, for numbers of half precision cannot be trained by small steps; a `Loss` computes
    with them in the module's own type.

    Raises:
        ModelError: there is none, though it is `needed`.
    """
    trained = {name: leaf.detach() for name, leaf in module.named_parameters() if leaf.requires_grad}
    found = {name: leaf.to(wide(leaf.dtype), copy=True) for name, leaf in trained.items()}
    if needed and not found:
        raise ModelError(
            f"every parameter of {type(module).__name__} has requires_grad=False: there is nothing to train; "
            f"use a method with adapters, such as floral"
        )
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns (`*` matches anything) is the name's."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def named_by(patterns: Sequence[str], names: Iterable[str], module: nn.Module) -> set[str]:
    """Those of the module's tensors that a pattern names (`matches`).

    Raises:
        ModelError: a pattern names none.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            raise ModelError(
                f"personal: {pattern} matches no parameter of {type(module).__name__} that is trained; "
                f"it has {', '.join(known) or 'none'}"
            )
    return {name for name in known if matches(name, patterns)}


def running_stats(module: nn.Module) -> Params:
    """The running means and variances of the BatchNorm layers, by name."""
    found: Params = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
            if layer.momentum is None:
                raise ModelError(f"{path}: BatchNorm with momentum=None counts batches; give it a momentum")
            prefix = f"{path}." if path else ""
            found[f"{prefix}running_mean"] = layer.running_mean
            found[f"{prefix}running_var"] = layer.running_var  # type: ignore[assignment]
    return found


def mixes_examples(module: nn.Module) -> bool:
    """Whether examples of a batch meet in training: BatchNorm's outputs, any norm layer's running statistics."""
    return has_batch_norm(module) or any(
        isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats
        for layer in module.modules()
    )


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the module has a BatchNorm layer, which cannot train on one example."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def check_repeatable(module: nn.Module, x: Tensor) -> None:
    """Raises ModelError if a training pass draws from PyTorch's global generator, as functional dropout does."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        deepcopy(module).train()(x)
        if not torch.equal(before, torch.get_rng_state()):
            raise ModelError(
                "the module draws random numbers of its own in training (functional dropout, or dropout inside "
                "nn.LSTM or nn.MultiheadAttention?), which cannot be repeated client by client; use nn.Dropout"
            )
