"""LoRA preconditioning: gradients measured in the metric of the product B·A (Almansoori et al. 2025, App. E).

G_B ← G_B (A Aᵀ + ε I)⁻¹      G_A ← (Bᵀ B + ε I)⁻¹ G_A
"""

import torch
from torch import Tensor

from umbel.adapters.bank import Bank
from umbel.tree import Params

EPSILON = 1e-5  # the paper's ε


def precondition(bank: Bank, adapters: Params, grads: Params) -> Params:
    """The gradients of the bank's low-rank factors, preconditioned; the others as they are.

    Tensors have leading axes K, C. A convolution's factors are matrices too, A (r, in·k_a) and
    B (out·k_b, r), and are preconditioned by the same r×r systems; the paper divides by the Frobenius
    norm of a Gram product instead, which for rank 1 is the same thing up to ε.
    """
    conditioned = dict(grads)
    for part in bank.low_rank:
        a = adapters[part.a_name].flatten(3)  # (K, C, r, in·k_a)
        b = adapters[part.b_name].transpose(2, 3).flatten(3)  # (K, C, r, out·k_b)
        grad_a, grad_b = grads[part.a_name], grads[part.b_name]
        conditioned[part.a_name] = _solve(b, grad_a.flatten(3)).view_as(grad_a)
        turned = grad_b.transpose(2, 3)
        conditioned[part.b_name] = _solve(a, turned.flatten(3)).view(turned.shape).transpose(2, 3)
    return conditioned


def _solve(factor: Tensor, grad: Tensor) -> Tensor:
    """(F Fᵀ + ε I)⁻¹ G for F (…, r, m) and G (…, r, n)."""
    if factor.shape[-2] == 1:
        return grad / (factor.square().sum(-1, keepdim=True) + EPSILON)
    gram = factor @ factor.transpose(-1, -2)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + EPSILON * eye, grad)
    return solved
