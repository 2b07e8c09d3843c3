"""Adapters as the dense matrices B·A that they add to their weights, and the nearest adapters of such matrices.

Factors are averaged one by one in FedAvg, but the mean of products is not the product of means. Where the
products themselves are to be averaged, they travel or are summed as matrices and become factors again by a
truncated singular value decomposition, the nearest matrix of that rank (Eckart & Young 1936):

    P = U S Vᵀ ,   B = U_r √S_r ,   A = √S_r V_rᵀ

For a convolution the formula of `bank.py`, Σ_j B[o, j, s_B] A[j, i, s_A], is a matrix product too, with a row
for each (o, s_B) and a column for each (i, s_A).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from umbel.adapters.bank import Bank, LowRank
from umbel.adapters.mixture import stack_rank
from umbel.tree import Params


def products(bank: Bank, adapters: Params) -> Params:
    """The matrix B·A of every low-rank part, by the part's name, without the bank's scale.

    Any leading axes of the factors are the product's too: (*leading, out · kernel_b, in · kernel_a).
    """
    found: Params = {}
    for part in bank.low_rank:
        a, b = adapters[part.a_name], adapters[part.b_name]
        leading = a.dim() - len(part.shape)
        found[part.name] = b.movedim(leading + 1, -1).flatten(leading, -2) @ a.flatten(leading + 1)
    return found


def summed_products(bank: Bank, weights: Tensor, adapters: Params) -> Params:
    """Σ_k w_kc B_kc A_kc for adapters (K, C, …) and weights (K,) or (K, C): (C, out · kernel_b, in · kernel_a).

    K adapters of rank r are one of rank K·r, so that no client's product is ever formed.
    """
    found: Params = {}
    for part in bank.low_rank:
        a, b = (adapters[name].transpose(0, 1) for name in (part.a_name, part.b_name))
        each = weights.unsqueeze(1).expand(a.shape[1], a.shape[0]) if weights.dim() == 1 else weights
        wide_a, wide_b = stack_rank(a, b, each.T)
        found |= products(replace(bank, low_rank=(part,)), {part.a_name: wide_a, part.b_name: wide_b})
    return found


def factors(bank: Bank, dense: Params, before: Params | None = None) -> Params:
    """The factors whose products are nearest to the matrices `dense` (named and shaped as by `products`).

    Both factors carry √S, the ranks are in order of their singular values, and in each column of U the
    largest entry is positive. A rank that the matrix does not have (a singular value of no more than rounding)
    is zero in both factors, to the last bit; there no gradient reaches it any more.

    With `before`, earlier factors, it is as at LoRA's start: B carries all of S, A is of unit rows, and a rank
    that the matrix does not have keeps its A of before with B at zero, from where it can grow.
    """
    found: Params = {}
    for part in bank.low_rank:
        b, a = _nearest(dense[part.name], part.rank)
        leading = a.shape[:-2]
        if before is not None:
            root = a.norm(dim=-1, keepdim=True)
            b, a = b * root.mT, torch.where(root > 0, a / root, before[part.a_name].reshape(a.shape))
        found[part.a_name] = a.reshape(*leading, *part.a_shape)
        found[part.b_name] = b.reshape(*leading, *_rank_last(part)).movedim(-1, len(leading) + 1)
    return {name: leaf.contiguous() for name, leaf in found.items()}


def _rank_last(part: LowRank) -> tuple[int, ...]:
    """The shape of B with the rank as its last axis."""
    out, rank, *kernel = part.b_shape
    return (out, *kernel, rank)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, rows, rank), S (…, rank), Vᵀ (…, rank, columns); ranks that no matrix of its size has are 0."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if (more := rank - s.shape[-1]) > 0:
        u, s, v = F.pad(u, (0, more)), F.pad(s, (0, more)), F.pad(v, (0, 0, 0, more))
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(…, rows, rank) and (…, rank, columns)."""
    u, s, v = truncated_svd(matrix, rank)
    noise = s[..., :1] * max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps
    root = torch.where(s > noise, s, 0.0).sqrt()
    largest = u.abs().argmax(-2, keepdim=True)
    root_u = root * u.gather(-2, largest).squeeze(-2).sign()
    return u * root_u.unsqueeze(-2), v * root_u.unsqueeze(-1)
