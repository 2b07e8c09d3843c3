"""How alike the adapters of clients are, and how good each is for each client: what trust is made of.

Scores s_ij of Wagner et al. 2024 (https://arxiv.org/abs/2404.09753), N clients against N:

                   as published                                     here
    weights        mean over rows of cos(row of φ_i, row of φ_j)    cos(B_i A_i, B_j A_j)
    validation     −exp ℓ_ij                                        −ℓ_ij
    predictions    −10 d_ij / Σ_j d_ij                              −mean KL(p_i ‖ p_j)

with ℓ_ij the loss of client i's examples under φ_j, p the answers on public inputs and d their distances. All of
them are matrix products of one row a client, or one stacked evaluation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbel import tree
from umbel.adapters import Bank
from umbel.clients import ClientData
from umbel.errors import RecipeError
from umbel.methods.protocol import Population
from umbel.methods.routing import losses_of
from umbel.model.loss import FORWARD_EXAMPLES, Loss
from umbel.seeds import choose
from umbel.tree import Params

BLOCK = 125  # clients whose r × r products with all others are formed at once
NUMBERS = 2**25  # in one dense table of predictions
PAPER_SEQUENCES = 200  # public texts that the published code compares, 4 batches of 50
PAPER_TOP = 100  # logits of a prediction that the published code keeps
PAPER_SHARPNESS = 10.0


def product_cosines(bank: Bank, adapters: Params, start: Params | None = None) -> Tensor:
    """(N, N) cosines of the clients' whole updates, for adapters (N, …): the same for any factors of a product.

    ⟨B_i A_i, B_j A_j⟩ = Σ over r × r entries of (A_i A_jᵀ) ∘ (B_iᵀ B_j), so no product is formed: O(r d) a pair.
    An update of zero is like nothing, itself included. With a `start` (1, …), which all have in common, an update
    is what has been added to its product; then all is in float64, for a small difference of large numbers is left.
    """
    if start is not None:
        adapters = {name: torch.cat([start[name].to(leaf), leaf]).double() for name, leaf in adapters.items()}
    num_clients = len(next(iter(adapters.values())))
    gram = next(iter(adapters.values())).new_zeros(num_clients, num_clients)
    for part in bank.low_rank:
        a, b = _rank_first(adapters[part.a_name], 1), _rank_first(adapters[part.b_name], 2)
        for first in range(0, num_clients, BLOCK):  # what lies below the diagonal is known from above it
            of_a, of_b = (
                leaf[first : first + BLOCK].flatten(0, 1) @ leaf[first:].flatten(0, 1).T for leaf in (a, b)
            )
            blocks = (of_a * of_b).view(-1, part.rank, num_clients - first, part.rank).sum((1, 3))
            gram[first : first + BLOCK, first:] += (bank.scale * part.scaling) ** 2 * blocks
    gram = gram.triu() + gram.triu(1).T
    for update in bank.additive:
        flat = adapters[update.name].flatten(1)
        gram += flat @ flat.T
    if start is not None:
        gram = gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]
    length = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return (gram / length.unsqueeze(1) / length).clamp(-1, 1)


def row_cosines(bank: Bank, adapters: Params) -> Tensor:
    """(N, N) as published: cosines of single rows, averaged over the rows of all tensors of adapters (N, …).

    The published A is (in, r), the transpose of PEFT's, and so is B: their rows are our columns. A layer has `in`
    rows of r numbers and r rows of `out`, so that nearly all of the mean is A's. An update of a bias is one row.
    """
    total, count = torch.zeros(()), 0
    for part in bank.low_rank:
        a, b = _rank_first(adapters[part.a_name], 1), _rank_first(adapters[part.b_name], 2)
        for rows in (a.mT, b):
            flat = F.normalize(rows, dim=2, eps=1e-8).flatten(1)
            total, count = total.to(flat) + flat @ flat.T, count + rows.shape[1]
    for update in bank.additive:
        flat = F.normalize(adapters[update.name].flatten(1), eps=1e-8)
        total, count = total.to(flat) + flat @ flat.T, count + 1
    return total / count


def _rank_first(factor: Tensor, axis: int) -> Tensor:
    """(N, r, rest) of a factor whose rank lies on this axis."""
    return factor.movedim(axis, 1).flatten(2).contiguous()


def cross_losses(loss: Loss, models: Params, data: ClientData, own: Params | None = None) -> Tensor:
    """(K, N) the loss of each of the K clients' examples, the same for all, under each of the N models.

    `own` (K, …) are tensors that are each client's own in all of them.
    """
    some = next(iter(models.values()))
    places = max(1, data.examples.y[0].numel())
    rows = len(data.clients) * int(data.num_examples.max()) * places  # of one model in a forward pass
    size = max(1, FORWARD_EXAMPLES // rows)
    parts = [
        {name: leaf[first : first + size] for name, leaf in models.items()} for first in range(0, len(some), size)
    ]
    return torch.cat([losses_of(loss, part, data, private=own).mean for part in parts], 1)


@dataclass(frozen=True)
class Public:
    """Inputs that everyone has; carried along, never sent."""

    x: Tensor  # (P, …)
    places: int  # in the answer to one of them; 1 unless it is a text
    num_labels: int
    logits: bool  # whether logits of last places are compared, as published, or log p of all
    top: int  # so many numbers of each place are sent; 0: all

    @property
    def num_places(self) -> int:
        """M, at which answers are compared."""
        return len(self.x) * (1 if self.logits else self.places)


def public_of(module: nn.Module, population: Population, published: bool, top: int) -> Public:
    """What is compared of the task's public inputs; of the published code's 200 texts and 100 logits, or all.

    Raises:
        RecipeError: there are none.
    """
    if population.public is None or not len(population.public):
        raise RecipeError(
            "scheme = 'predictions' compares answers on public inputs, and this task has none; give it some "
            "(Task.public), or choose scheme = 'validation' or 'weights'"
        )
    x = population.public.detach()
    if published:
        x = x[torch.from_numpy(choose(len(x), PAPER_SEQUENCES, population.seed, "public"))]
    training = module.training
    with torch.no_grad():
        answer: Tensor = module.eval()(x[:1])[0]
    module.train(training)
    return Public(x, answer[..., 0].numel(), answer.shape[-1], published, PAPER_TOP if published else top)


def no_answers(public: Public, dtype: torch.dtype, num_clients: int) -> Params:
    """(clients, M, k) zeros in the form of `predicted`."""
    like = kept(torch.zeros(1, 1, public.num_labels, dtype=tree.wide(dtype)), public.top)
    return {n: leaf.new_zeros(num_clients, public.num_places, leaf.shape[2]) for n, leaf in like.items()}


def predicted(loss: Loss, models: Params, public: Public) -> Params:
    """(K, M, k) the K models' answers on the public inputs, in evaluation mode, as `kept` gives them."""
    num_models = len(next(iter(models.values())))
    size = max(1, FORWARD_EXAMPLES // (num_models * public.places))
    found = []
    with torch.no_grad():
        for x in public.x.to(next(iter(models.values())).device).split(size):
            answers = loss.outputs(models, x.unsqueeze(0).expand(num_models, *x.shape))
            answers = answers.to(tree.wide(answers.dtype))  # half precision tells no two apart
            if public.logits:
                answers = answers.flatten(2, -2)[:, :, -1] if answers.dim() > 3 else answers
            else:
                answers = answers.flatten(1, -2).log_softmax(-1)
            found.append(kept(answers, public.top))
    return {name: torch.cat([part[name] for part in found], 1) for name in found[0]}


def kept(values: Tensor, top: int) -> Params:
    """The `top` largest of the last axis and their places, or all `values` where there are no more."""
    if not 0 < top < values.shape[-1]:
        return {"values": values}
    largest = values.topk(top, -1)
    return {"values": largest.values, "index": largest.indices.int()}


def divergences(predictions: Params, num_labels: int) -> Tensor:
    """(N, N) mean over M places of KL(p_i ‖ p_j), from the log p (N, M, labels) or the largest of them (`kept`).

    What is left of a probability is spread evenly over the labels that were not kept.
    """
    values = predictions["values"]
    products = values.new_zeros(len(values), len(values), dtype=torch.float64)
    for first, last in _runs(values, num_labels):
        log_p = _dense(predictions, first, last, num_labels, rest=True).flatten(1)
        products += log_p.exp() @ log_p.T  # Σ p_i log p_j
    return (products.diagonal().unsqueeze(1) - products).clamp(min=0) / values.shape[1]


def logit_distances(predictions: Params, num_labels: int) -> Tensor:
    """(N, N) as published: the mean over M places of the L1 distance of logits, 0 in place of those not `kept`."""
    values = predictions["values"]
    total = values.new_zeros(len(values), len(values), dtype=torch.float64)
    for first, last in _runs(values, num_labels):
        dense = _dense(predictions, first, last, num_labels, rest=False).flatten(1)
        total += torch.cdist(dense, dense, p=1)
    return total / values.shape[1]


def published_scores(distances: Tensor) -> Tensor:
    """(N, N) −10 d_ij / Σ_j d_ij, for distances (N, N): the more clients, the more alike their scores."""
    return -PAPER_SHARPNESS * F.normalize(distances, p=1, dim=1)


def _runs(values: Tensor, num_labels: int) -> list[tuple[int, int]]:
    """The places of predictions (N, M, k) in runs whose dense tables are not too large."""
    size = max(1, NUMBERS // (len(values) * num_labels))
    return [(first, min(first + size, values.shape[1])) for first in range(0, values.shape[1], size)]


def _dense(predictions: Params, first: int, last: int, num_labels: int, rest: bool) -> Tensor:
    """(N, places, labels) with the logarithm of the `rest`'s even share, or 0, where nothing was kept."""
    values = predictions["values"][:, first:last]
    if "index" not in predictions:
        return values
    shape = (*values.shape[:2], num_labels)
    if rest:
        left = (1 - values.exp().sum(2, keepdim=True)).clamp(min=1e-6) / (num_labels - values.shape[2])
        dense = left.log().expand(shape).clone()
    else:
        dense = values.new_zeros(shape)
    return dense.scatter_(2, predictions["index"][:, first:last].long(), values)
