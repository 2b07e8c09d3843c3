"""Robust means: what a few hostile uploads cannot move far, in place of Σ w_k x_k / Σ w_k.

    median             of each number, weighted                          Yin et al. 2018, https://arxiv.org/abs/1803.01498
    trimmed_mean       of each number, without the weight β at both ends       the same, Definition 2
    geometric_median   argmin_v Σ w_k ‖x_k − v‖ by Weiszfeld's steps     Pillutla et al. 2019, https://arxiv.org/abs/1912.13445
    krum, multi_krum   the uploads whose nearest neighbours are near     Blanchard et al. 2017, https://arxiv.org/abs/1703.02757
    norm_bound         the mean of steps of bounded length               Sun et al. 2019, https://arxiv.org/abs/1911.07963

Each works on one group of tensors: the base, or one adapter or cluster, whose weights are n_k π_kc. So an attacker
cannot hide in an adapter that few use: there it is weighed against those few. By the same token no rule helps
where attackers hold half the weight of one adapter.

A rule gives every client's row of a group the same value, its robust mean, so that the method's own weighted mean
of them is that value and no method knows of it (`Method.changed`).
"""

from functools import partial

import torch
from torch import Tensor

from umbel.hazards import Robust
from umbel.mixing import Change, as_leading
from umbel.tree import Params

SMOOTHING = 1e-6  # ν of RFA, relative to the median distance: a point that is hit has a finite weight
STEPS = 32  # of Weiszfeld's, at most
NEAR = 1e-6  # of the median distance; steps that are shorter are the last


def rule_of(robust: Robust) -> Change:
    """The change that puts the robust mean, or what gives it, in the place of each client's tensors."""
    own = partial(_of_group, robust)

    def change(values: Params, received: Params, weights: Tensor) -> Params:
        if not values:
            return values
        if weights.dim() == 1:
            return own(values, received, weights)
        num_adapters = weights.shape[1]
        each = [
            own(
                {n: leaf[:, c] for n, leaf in values.items()},
                {n: leaf[:, c] for n, leaf in received.items()},
                weights[:, c],
            )
            for c in range(num_adapters)
        ]
        return {n: torch.stack([one[n] for one in each], 1) for n in values}

    return change


def _of_group(robust: Robust, values: Params, received: Params, weights: Tensor) -> Params:
    """The K rows of one group of tensors as they are to be averaged."""
    weights = weights.double().clamp(min=0)
    if not bool(weights.sum() > 0):  # nobody uses it, so its mean is not looked at
        return values
    if robust.rule in ("median", "trimmed_mean"):
        rule = weighted_median if robust.rule == "median" else partial(trimmed_mean, share=robust.hostile)
        return {n: rule(leaf, weights).expand_as(leaf) for n, leaf in values.items()}
    if robust.rule == "norm_bound":
        steps = flat({n: leaf - received[n] for n, leaf in values.items()})
        length = steps.norm(dim=1)
        longest = robust.bound * weighted_median(length, weights)
        cut = (longest / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
        return {n: torch.lerp(received[n], leaf, as_leading(cut, leaf).to(leaf)) for n, leaf in values.items()}
    points = flat(values)
    if robust.rule == "geometric_median":
        middle = geometric_median(points, weights)
    else:
        order = by_nearness(points, weights, robust.hostile)
        share = torch.zeros_like(weights)
        most = (1 - robust.hostile) * weights.sum() if robust.rule == "multi_krum" else 0.0
        before = weights[order].cumsum(0) - weights[order]
        chosen = order[before <= most * (1 - 1e-9)][: None if robust.rule == "multi_krum" else 1]
        share[chosen] = weights[chosen]
        middle = (share / share.sum()) @ points
    return {n: leaf.expand_as(values[n]) for n, leaf in unflat(middle, values).items()}


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """(…) the number with half the weight (K,) on either side, for each of values (K, …).

    Between two numbers with exactly half each it is their mean, so that with equal weights it is the usual one.
    """
    ordered, order = values.sort(0)
    below = weights[order].cumsum(0)
    half = below[-1:] / 2
    # A sum in another order may miss one half by a rounding error.
    near = 1e-12 * below[-1:]
    lower = (below < half - near).sum(0, keepdim=True)
    upper = (below <= half + near).sum(0, keepdim=True).clamp(max=len(values) - 1)
    low, high = ordered.gather(0, lower)[0], ordered.gather(0, upper)[0]
    return torch.where(low == high, low, low + (high - low) / 2)


def trimmed_mean(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """(…) the weighted mean of each of values (K, …) without the `share` of the weight (K,) at both ends."""
    ordered, order = values.sort(0)
    own = weights[order]
    above = own.cumsum(0)
    whole = above[-1:]
    kept = (torch.minimum(above, (1 - share) * whole) - torch.maximum(above - own, share * whole)).clamp(min=0)
    # About the median: what all agree on comes out to the last bit.
    middle = weighted_median(values, weights).double()
    return (middle + (kept * (ordered.double() - middle)).sum(0) / kept.sum(0)).to(values.dtype)


def geometric_median(points: Tensor, weights: Tensor) -> Tensor:
    """(D,) argmin_v Σ w ‖x − v‖ of points (K, D), weights (K,): smoothed Weiszfeld, RFA's Algorithm 2."""
    middle = weighted_median(points, weights)
    for _ in range(STEPS):
        distance = (points - middle).norm(dim=1)
        usual = weighted_median(distance, weights)
        pull = weights / distance.clamp(min=SMOOTHING * float(usual) or SMOOTHING)
        step = (pull / pull.sum()) @ (points - middle)
        middle = middle + step
        if float(step.norm()) <= NEAR * float(usual):
            break
    return middle


def by_nearness(points: Tensor, weights: Tensor, hostile: float) -> Tensor:
    """The rows of points (K, D) in Krum's order, the nearest to its neighbours first.

    With equal weights a row's score is the sum of the squared distances to its K − f − 2 nearest, where f is
    `hostile` · K; with weights (K,) neighbours count by theirs, up to as much weight, and a row with less than
    half the mean weight is not chosen while there is another. Of equals the first one comes first.
    """
    number = weights.sum().square() / weights.square().sum()  # of rows, as far as weights are equal
    one = weights.sum() / number
    counted = ((number - hostile * number - 2) * one).clamp(min=float(one))
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance.fill_diagonal_(torch.inf)
    near, order = distance.sort(1)
    own = weights[order]
    above = own.cumsum(1)
    kept = (torch.minimum(above, counted) - (above - own)).clamp(min=0)
    score = torch.where(kept > 0, kept * near, 0.0).sum(1)
    slight = weights < one / 2
    alone = torch.finfo(score.dtype).max  # without a neighbour, yet before those that hardly count
    return torch.where(slight, torch.inf, score.clamp(max=alone)).argsort(stable=True)


def flat(tensors: Params) -> Tensor:
    """(K, D) all tensors (K, …) side by side, in double precision."""
    return torch.cat([leaf.reshape(len(leaf), -1).double() for leaf in tensors.values()], 1)


def unflat(point: Tensor, like: Params) -> Params:
    """The tensors (…) that one row of `flat(like)` is made of."""
    pieces = point.split([leaf[0].numel() for leaf in like.values()])
    return {n: piece.view(leaf.shape[1:]).to(leaf) for (n, leaf), piece in zip(like.items(), pieces, strict=True)}
