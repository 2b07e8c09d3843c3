"""How the clients' adapters become the server's: factor by factor, by their products, or exactly.

With weights w_k (n_k π_kc for adapter c), A_k and B_k the factors that client k trained:

    factor    A ← Σ w_k A_k / Σ w_k ,  B ← Σ w_k B_k / Σ w_k     as published; products have another mean
    product   B A ← the nearest matrix of rank r to P = Σ w_k B_k A_k / Σ w_k   (truncated SVD, as in FlexLoRA)
    delta     factors as in "factor", and what they miss, P − B̄ Ā, is kept as a dense remainder of the adapter
              (the exact mean, as FedEx-LoRA has it for one adapter): C dense matrices go to every client

All of it needs sums over clients only. Of a client with a lower rank the missing rows and columns are zero
and do not count: row j is the mean over those who have it. Additive updates are averaged as they are.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from umbel import mixing
from umbel.adapters.bank import Bank, LowRank
from umbel.adapters.products import factors, products, summed_products
from umbel.mixing import as_leading
from umbel.tree import Params

Averaging = Literal["factor", "product", "delta"]


def kept_ranks(part: LowRank, shares: Tensor) -> Tensor:
    """(K, r) 1 where a client has that rank of the part, else 0; it keeps a share (K,) of them, at least one."""
    count = (shares * part.rank).round().clamp(min=1)
    return (torch.arange(part.rank, device=shares.device) < count.unsqueeze(1)).to(shares.dtype)


def truncated(bank: Bank, adapters: Params, shares: Tensor) -> Params:
    """Adapters (K, C, …) with zeros beyond each client's share of the rank, where SGD leaves them."""
    cut = dict(adapters)
    for part in bank.low_rank:
        mask = kept_ranks(part, shares)
        a, b = adapters[part.a_name], adapters[part.b_name]
        cut[part.a_name] = a * mask.view(len(mask), 1, -1, *[1] * (a.dim() - 3)).to(a.dtype)
        cut[part.b_name] = b * mask.view(len(mask), 1, 1, -1, *[1] * (b.dim() - 4)).to(b.dtype)
    return cut


def narrowed(bank: Bank, adapters: Params) -> Params:
    """Adapters (C, …), or what is kept of them by their names, with the first ranks, as many as the bank has."""
    own = dict(adapters)
    for part in (part for part in bank.low_rank if part.a_name in adapters):
        own[part.a_name] = adapters[part.a_name][:, : part.rank]
        own[part.b_name] = adapters[part.b_name][:, :, : part.rank]
    return own


def widened(bank: Bank, adapters: Params) -> Params:
    """The inverse of `narrowed`, for the wider bank: ranks that are not there are 0."""
    own = dict(adapters)
    for part in (part for part in bank.low_rank if part.a_name in adapters):
        for name, axis, leaf in (
            (name, axis, adapters[name]) for name, axis in ((part.a_name, 1), (part.b_name, 2))
        ):
            own[name] = F.pad(leaf, (0, 0) * (leaf.dim() - axis - 1) + (0, part.rank - leaf.shape[axis]))
    return own


def nearest(bank: Bank, adapters: Params, thin: Bank) -> Params:
    """Adapters (C, …) whose products are the nearest in the ranks of `thin`; the bank's other ranks are 0."""
    return widened(bank, adapters | factors(thin, products(bank, adapters)))


def adapter_sums(
    bank: Bank, adapters: Params, weights: Params, shares: Tensor, with_products: bool
) -> dict[str, Params]:
    """The sums over K clients that `averaged` needs.

    Args:
        bank: the adapters' plan.
        adapters: (K, C, …) as the clients trained them.
        weights: (K, C) w, by the tensors' names; the same for all where products are wanted.
        shares: (K,) of each adapter's rank that a client has, or (K, 0) where all have all.
        with_products: whether P is needed.
    """
    sums = {
        "values": {n: mixing.weighted_sum(weights[n], {n: leaf})[n] for n, leaf in adapters.items()},
    }
    if shares.dim() == 1:
        sums["rank_weights"] = {
            part.name: weights[part.a_name].T @ kept_ranks(part, shares)
            for part in bank.low_rank  # (C, r)
        }
    if with_products:
        sums["products"] = summed_products(bank, next(iter(weights.values())), adapters)
    return sums


def by_rank(bank: Bank, weights: Params, sums: dict[str, Params]) -> Params:
    """The weights, Σ w by the tensors' names, where clients' ranks differ those of each rank.

    Args:
        bank: the adapters' plan.
        weights: (C,) of all who used the adapter.
        sums: of `adapter_sums`.

    Returns:
        (C,), or of a low rank factor (C, r) for A (C, r, …) and (C, 1, r) for B (C, out, r, …).
    """
    apart = dict(weights)
    for part in bank.low_rank if "rank_weights" in sums else ():
        seen = sums["rank_weights"][part.name]
        apart[part.a_name], apart[part.b_name] = seen, seen.unsqueeze(1)
    return apart


def averaged(bank: Bank, sums: dict[str, Params], weights: Params, how: Averaging) -> Params:
    """The adapters' means (C, …), and for "delta" what the mean factors miss, by the parts' names.

    Args:
        bank: the adapters' plan.
        sums: of `adapter_sums`, with products unless `how` is "factor".
        weights: Σ w of `by_rank`; where it is 0 the mean is 0 and tells nothing.
        how: see above.
    """
    mean = {name: mixing.mean({name: x}, weights[name])[name] for name, x in sums["values"].items()}
    if how == "factor":
        return mean
    exact = mixing.mean(sums["products"], next(iter(weights.values())))
    if how == "product":
        return mean | factors(bank, exact)
    missed = products(bank, mean)
    return mean | {part.name: part.weight_of(exact[part.name] - missed[part.name]) for part in bank.low_rank}


def by_products(bank: Bank, old: Params, target: Params, move: Tensor) -> Params:
    """The factors (C, …) of products a share `move` (C,) of the way from those of `old` to those of `target`.

    Factors of an SVD are turned against the old ones, so what lies between the two is no adapter between them.
    All the way they are the target's, and where nothing moves the old ones, to the last bit.
    """
    some = ((move != 0) & (move != 1)).nonzero().squeeze(1)
    now, aim = (
        products(bank, {name: leaf[some] for name, leaf in adapters.items()}) for adapters in (old, target)
    )
    between = factors(bank, mixing.step_to(now, aim, move[some]))
    ends = {name: torch.where(as_leading(move == 0, old[name]), old[name], target[name]) for name in between}
    return {name: leaf.index_copy(0, some, between[name].to(leaf.dtype)) for name, leaf in ends.items()}


def remainder_of(
    part: LowRank, before: Tensor, matrices: tuple[Tensor, Tensor, Tensor], missed: Tensor, move: Tensor
) -> Tensor:
    """(C, …) what keeps an adapter's product with its remainder exact: a share `move` (C,) of the way to the mean.

    Args:
        part: which layer's.
        before: (C, …) the remainder as it was; where nothing moves it stays, to the last bit.
        matrices: B·A as they were, of the clients' mean factors, and of the factors as they are now.
        missed: (C, …) what the mean factors miss of the clients' mean.
        move: see above.
    """
    old, mean, new = (part.weight_of(matrix) for matrix in matrices)
    wanted = mixing.step_to({"": before + old}, {"": before + mean + missed}, move)[""]
    return torch.where(as_leading(move == 0, before), before, wanted - new)


def factor_error(bank: Bank, sums: dict[str, Params], weights: Params) -> Tensor:
    """() ‖P − B̄ Ā‖ / ‖P‖ over all parts and adapters that anyone used: what averaging factors gets wrong."""
    all_alike = next(iter(weights.values()))
    exact = mixing.mean(sums["products"], all_alike)
    missed = products(bank, mixing.mean(sums["values"], all_alike))
    used = all_alike > 0
    scale = {part.name: part.scaling**2 for part in bank.low_rank}  # each layer's own; the bank's cancels out
    wrong = torch.stack([scale[n] * (exact[n] - missed[n])[used].square().sum() for n in exact]).sum()
    whole = torch.stack([scale[n] * matrix[used].square().sum() for n, matrix in exact.items()]).sum()
    return (wrong / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()
