"""A mixture of adapters is the base with W + scale · Σ_c π_c ΔW_c in place of W, for every kind of layer."""

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from math import floor, prod

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from umbel import tree
from umbel.adapters import AdapterPlan, mix, with_paths
from umbel.adapters.mixture import stack_rank
from umbel.adapters.precondition import EPSILON, precondition
from umbel.errors import ModelError, RecipeError
from umbel.model.loss import Loss, running_stats
from umbel.model.stacked import stackable

ALL = ("linear", "conv", "embedding", "norm", "bias")
SCALE = 0.5


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clients(module, bank, num_clients, num_adapters=3):
    """K clients that share nothing: base tensors, adapters and probs are all different, none is zero."""
    base = {
        name: leaf.detach() + 0.1 * drawn(num_clients, *leaf.shape, seed=i)
        for i, (name, leaf) in enumerate(module.named_parameters())
    }
    shapes = bank.init(num_adapters, torch.Generator().manual_seed(0), 0.0)
    adapters = {
        name: 0.3 * drawn(num_clients, *leaf.shape, seed=100 + i) for i, (name, leaf) in enumerate(shapes.items())
    }
    return base, adapters, drawn(num_clients, num_adapters, seed=200).softmax(1)


def product_of(a, b):
    """ΔW of one adapter, one kernel position at a time; a factor of length 1 on an axis serves all of it."""
    kernel = [max(n, m) for n, m in zip(a.shape[2:], b.shape[2:], strict=True)]
    delta = torch.zeros(b.shape[0], a.shape[1], *kernel, dtype=a.dtype)
    for at in product(*map(range, kernel)):
        on_a = tuple(min(i, n - 1) for i, n in zip(at, a.shape[2:], strict=True))
        on_b = tuple(min(i, n - 1) for i, n in zip(at, b.shape[2:], strict=True))
        delta[(slice(None), slice(None), *at)] = b[(slice(None), slice(None), *on_b)] @ a[(..., *on_a)]
    return delta


def explicit(bank, base, adapters, probs, client):
    """One client's tensors, by a loop over adapters."""
    own = {name: leaf[client].clone() for name, leaf in base.items()}
    for c, share in enumerate(probs[client]):
        for part in bank.low_rank:
            a, b = (adapters[name][client, c] for name in (part.a_name, part.b_name))
            own[part.name] += bank.scale * share * product_of(a, b)
        for update in bank.additive:
            own[update.name] += share * adapters[update.name][client, c]
    return own


def plain(module, tensors, x, training=False):
    """What an ordinary copy of the module answers with these tensors."""
    alone = deepcopy(module).train(training)
    with torch.no_grad():
        for name, leaf in alone.named_parameters():
            leaf.copy_(tensors[name])
        return alone(x), running_stats(alone)


def check(module, x, plan, num_clients, training=False):
    module = module.double()
    bank = plan.bank(module)
    base, adapters, probs = clients(module, bank, num_clients)
    stats = {n: leaf.expand(num_clients, *leaf.shape).clone() for n, leaf in running_stats(module).items()}
    x = x if x.dtype == torch.long else x.double()
    loss = Loss(with_paths(module, bank), "mse")
    outputs = loss.outputs(mix(bank, base, adapters, probs) | stats, x[:num_clients], training)
    assert outputs.shape[0] == num_clients
    for k in range(num_clients):
        expected, moved = plain(module, explicit(bank, base, adapters, probs, k), x[k], training)
        assert_close(outputs[k].detach(), expected)
        for name, leaf in moved.items():
            assert_close(stats[name][k], leaf)
    return bank


CONVS = {
    "1d": lambda: (nn.Conv1d(3, 5, 4), (7,)),
    "1d strided": lambda: (nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2), (9,)),
    "1d circular": lambda: (nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), (6,)),
    "1d groups": lambda: (nn.Conv1d(4, 6, 3, groups=2, bias=False), (6,)),
    "2d": lambda: (nn.Conv2d(4, 6, 3), (5, 6)),
    "2d 1x1": lambda: (nn.Conv2d(4, 6, 1), (3, 3)),
    "2d non-square": lambda: (nn.Conv2d(6, 3, (3, 5), stride=(2, 1), padding=(1, 2)), (6, 5)),
    "2d dilated": lambda: (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), dilation=(3, 2), padding=(0, 1)), (6, 7)),
    "2d same": lambda: (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(1, 2)), (5, 6)),
    "2d same, even": lambda: (nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(2, 2)), (5, 6)),
    "2d groups": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (6, 5)),
    "2d depthwise": lambda: (nn.Conv2d(3, 6, 3, groups=3), (4, 5)),
    "2d circular": lambda: (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (4, 5)),
    "2d reflect": lambda: (nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 1), padding_mode="reflect"), (5, 4)),
    "2d replicate": lambda: (nn.Conv2d(4, 4, 3, padding=2, groups=2, padding_mode="replicate"), (4, 4)),
    "3d": lambda: (nn.Conv3d(2, 4, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0)), (4, 5, 2)),
    "3d replicate": lambda: (
        nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate", dilation=(1, 2, 1)),
        (3, 3, 3),
    ),
    "3d groups": lambda: (nn.Conv3d(4, 2, (1, 2, 3), groups=2), (2, 3, 4)),
}


@pytest.mark.parametrize("realization", ["merged", "factored"])
@pytest.mark.parametrize("split", ["balanced", "in", "out"])
@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_with_adapters_is_one_with_the_summed_kernel(case, split, realization):
    conv, size = CONVS[case]()
    plan = AdapterPlan(0.7, conv=split, scale=SCALE, realization=realization)
    x = drawn(3, 2, conv.in_channels, *size, seed=5)
    for num_clients in (1, 3):
        bank = check(conv, x, plan, num_clients)
    assert [part.factored for part in bank.low_rank] == [realization == "factored"]


LAYERS = {
    "linear": lambda: (nn.Linear(5, 4), drawn(3, 2, 5)),
    "linear, many positions": lambda: (nn.Linear(5, 4, bias=False), drawn(3, 2, 7, 5)),
    "embedding": lambda: (nn.Embedding(6, 4), torch.arange(24).reshape(3, 2, 4) % 6),
    "embedding with padding": lambda: (nn.Embedding(6, 4, padding_idx=2), torch.arange(24).reshape(3, 2, 4) % 6),
    "layer norm": lambda: (nn.LayerNorm((3, 4)), drawn(3, 2, 3, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), drawn(3, 2, 4, 3)),
    "transposed convolution": lambda: (nn.ConvTranspose2d(4, 3, (2, 3), stride=2), drawn(3, 2, 4, 3, 2)),
}


@pytest.mark.parametrize("realization", ["merged", "factored", "auto"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_with_adapters_is_one_with_the_summed_tensors(case, realization):
    layer, x = LAYERS[case]()
    for num_clients in (1, 3):
        check(layer, x, AdapterPlan(2, ALL, scale=SCALE, realization=realization), num_clients)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_batch_norm_with_adapters_normalizes_each_client_by_its_own_batch(num_clients, training):
    bank = check(nn.BatchNorm1d(4), 3 + 2 * drawn(3, 5, 4), AdapterPlan(layers=("norm",)), num_clients, training)
    assert [update.name for update in bank.additive] == ["weight", "bias"]


SINGLE = {"atol": 2e-6, "rtol": 2e-6}  # float32 has seven digits, of which sums of a hundred terms lose one


@pytest.mark.parametrize("realization", ["merged", "factored"])
@pytest.mark.parametrize("case", [*CONVS, *LAYERS])
def test_in_single_precision_the_answer_is_that_of_the_summed_tensors_but_for_rounding(case, realization):
    if case in CONVS:
        layer, size = CONVS[case]()
        x = drawn(2, 2, layer.in_channels, *size, seed=5)
    else:
        layer, x = LAYERS[case]()
    x = x[:2] if x.dtype == torch.long else x[:2].float()
    bank = AdapterPlan(0.7 if case in CONVS else 2, ALL, scale=SCALE, realization=realization).bank(layer)
    base, adapters, probs = clients(layer, bank, 2)
    base, adapters = ({name: leaf.float() for name, leaf in tensors.items()} for tensors in (base, adapters))
    outputs = Loss(with_paths(layer, bank), "mse").outputs(mix(bank, base, adapters, probs.float()), x)
    assert outputs.dtype == torch.float32
    for k in range(2):
        expected, _ = plain(layer, explicit(bank, base, adapters, probs.float(), k), x[k])
        scale = max(1.0, expected.abs().max().item())
        assert_close(outputs[k].detach() / scale, expected / scale, **SINGLE)


GRADED = [
    "1d strided",
    "1d groups",
    "2d non-square",
    "2d dilated",
    "2d same",
    "2d groups",
    "2d reflect",
    "3d",
    "linear",
    "embedding",
    "layer norm",
    "transposed convolution",
]


@pytest.mark.parametrize("realization", ["merged", "factored"])
@pytest.mark.parametrize("case", GRADED)
def test_gradients_of_an_adapted_layers_answer_are_those_of_small_steps(case, realization):
    if case in CONVS:
        layer, size = CONVS[case]()
        x = drawn(1, 2, layer.in_channels, *size, seed=5)
    else:
        layer, x = LAYERS[case]()
        x = x[:1]
    layer = layer.double()
    bank = AdapterPlan(1, ALL, scale=SCALE, realization=realization).bank(layer)
    base, adapters, probs = clients(layer, bank, 1, num_adapters=2)
    loss = Loss(with_paths(layer, bank), "mse")
    names = list(base), list(adapters)

    def answer(x, probs, *leaves):
        own = dict(zip(names[0], leaves[: len(base)], strict=True))
        mixed = mix(bank, own, dict(zip(names[1], leaves[len(base) :], strict=True)), probs)
        return loss.outputs(mixed, x)

    leaves = [leaf.requires_grad_() for leaf in (probs, *base.values(), *adapters.values())]
    x = x if x.dtype == torch.long else x.requires_grad_()
    assert torch.autograd.gradcheck(answer, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_a_mixture_may_have_other_probs_in_every_layer(realization):
    module = small_net().double().eval()
    bank = AdapterPlan(2, ALL, scale=SCALE, realization=realization).bank(module)
    assert set(bank.layers) == {"0", "1", "4", "5", "6"}
    base, adapters, _ = clients(module, bank, 2)
    stats = {n: leaf.expand(2, *leaf.shape).clone() for n, leaf in running_stats(module).items()}
    probs = drawn(2, len(bank.layers), 3, seed=7).softmax(-1)
    x = drawn(2, 2, 2, 3, 3)
    outputs = Loss(with_paths(module, bank), "mse").outputs(mix(bank, base, adapters, probs) | stats, x)
    for k in range(2):
        own = {name: leaf[k].clone() for name, leaf in base.items()}
        for place, path in enumerate(bank.layers):
            of_layer = {name: leaf for name, leaf in adapters.items() if name.startswith(f"{path}.")}
            here = replace(
                bank,
                low_rank=tuple(part for part in bank.low_rank if part.a_name in of_layer),
                additive=tuple(update for update in bank.additive if update.name in of_layer),
            )
            moved = explicit(here, base, of_layer, probs[:, place], k)
            own |= {name: moved[name] for name in moved if name.startswith(f"{path}.")}
            assert all(bank.layer_of(name) == place for name in of_layer)
        assert_close(outputs[k].detach(), plain(module, own, x[k])[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_attention_is_adapted_in_every_projection(realization):
    # out_proj is never called, only its weight is read: it has to be merged whatever is asked for.
    plan = AdapterPlan(2, scale=SCALE, realization=realization)
    bank = check(Attention(), drawn(3, 2, 5, 4), plan, num_clients=1)
    assert {part.name for part in bank.low_rank} == {"attention.in_proj_weight", "attention.out_proj.weight"}
    check(Attention(), drawn(3, 2, 5, 4), plan, num_clients=3, training=True)


def test_a_recurrent_layer_is_adapted():
    bank = check(Recurrent(), drawn(1, 2, 5, 3), AdapterPlan(2, scale=SCALE), num_clients=1)
    assert len(bank.low_rank) == 2
    assert len(bank.additive) == 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("realization", ["merged", "factored", "auto"])
def test_layers_that_share_a_tensor_share_its_update(realization):
    plan = AdapterPlan(2, ALL, scale=SCALE, realization=realization)
    for num_clients in (1, 2):
        bank = check(Tied(), torch.arange(6).reshape(2, 3) % 6, plan, num_clients)
    assert [part.name for part in bank.low_rank] == ["embed.weight"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return self.inner(x) * self.temperature


def test_a_scalar_parameter_is_adapted_like_a_bias():
    bank = check(Scaled(), drawn(2, 4, 3), AdapterPlan(1), num_clients=2)
    assert {update.name for update in bank.additive} == {"temperature", "inner.bias"}


def small_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 9, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )


@pytest.mark.parametrize("realization", ["merged", "factored", "auto"])
def test_a_whole_network_is_adapted_layer_by_layer(realization):
    check(small_net(), drawn(3, 2, 2, 3, 3), AdapterPlan(2, ALL, scale=SCALE, realization=realization), 3)


def test_gradients_do_not_depend_on_the_realization():
    # The row of padding_idx enters the output but gets no gradient, in a plain layer as in any realization.
    module = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 3)).double()
    x = torch.tensor([[[0, 1, 2], [1, 4, 4]]])
    found = {}
    for realization in ("merged", "factored"):
        bank = AdapterPlan(2, ALL, realization=realization).bank(module)
        base, adapters, probs = clients(module, bank, 1)
        leaves = [leaf.requires_grad_() for leaf in (*base.values(), *adapters.values(), probs)]
        outputs = Loss(with_paths(module, bank), "mse").outputs(mix(bank, base, adapters, probs), x)
        found[realization] = torch.autograd.grad(outputs.square().sum(), leaves)
    assert_close(found["merged"], found["factored"])


@pytest.mark.parametrize("num_clients", [1, 3])
@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_gates_are_as_good_as_scaled_factors(realization, num_clients):
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    bank = AdapterPlan(2, ALL, scale=SCALE, realization=realization).bank(module)
    base, adapters, probs = clients(module, bank, num_clients)
    leaves = [leaf.requires_grad_() for leaf in (*base.values(), *adapters.values(), probs)]
    loss = Loss(stackable(with_paths(module, bank)), "mse")
    x = torch.arange(num_clients * 10).view(num_clients, 5, 2) % 5
    found = []
    for gates in (False, True):
        outputs = loss.outputs(mix(bank, base, adapters, probs, gates=gates), x)
        found.append((outputs, *torch.autograd.grad(outputs.square().sum(), leaves)))
    assert_close(*found)


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_a_base_that_all_clients_share_is_as_good_as_copies_of_it(realization):
    module = small_net().double()
    bank = AdapterPlan(2, ALL, realization=realization).bank(module)
    _, adapters, probs = clients(module, bank, 3)
    loss = Loss(with_paths(module, bank), "mse")
    shared = {name: leaf.detach().expand(3, *leaf.shape) for name, leaf in module.named_parameters()}
    copies = {name: leaf.clone() for name, leaf in shared.items()}
    x = drawn(3, 2, 2, 3, 3)
    assert_close(*(loss.outputs(mix(bank, base, adapters, probs), x) for base in (shared, copies)))


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_mix_is_differentiable_in_base_adapters_and_probs(realization):
    module = nn.Sequential(nn.Conv2d(2, 3, (2, 3)), nn.Linear(3, 2), nn.Embedding(4, 2), nn.LayerNorm(2)).double()
    bank = AdapterPlan(2, ALL, scale=SCALE, realization=realization).bank(module)
    base, adapters, probs = clients(module, bank, num_clients=2, num_adapters=2)
    # Additive updates have their parameter's name, so base and adapters are told apart.
    names = [*(f"base {n}" for n in base), *(f"adapter {n}" for n in adapters)]

    def mixed(probs, *leaves):
        tensors = dict(zip(names, leaves, strict=True))
        own = {n: tensors[f"base {n}"] for n in base}
        return tuple(mix(bank, own, {n: tensors[f"adapter {n}"] for n in adapters}, probs).values())

    leaves = [leaf.requires_grad_() for leaf in (probs, *base.values(), *adapters.values())]
    assert torch.autograd.gradcheck(mixed, leaves)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_stack_rank_is_the_sum_over_adapters(kernel):
    a = drawn(2, 3, 2, 5, *(1 for _ in kernel), seed=1)  # K, C, r, in
    b = drawn(2, 3, 4, 2, *kernel, seed=2)  # K, C, out, r
    probs = drawn(2, 3, seed=3)
    stacked_a, stacked_b = stack_rank(a, b, probs)
    assert stacked_a.shape[1] == stacked_b.shape[2] == 6
    for k in range(2):
        expected = sum(probs[k, c] * product_of(a[k, c], b[k, c]) for c in range(3))
        assert_close(product_of(stacked_a[k], stacked_b[k]), expected)


@pytest.mark.parametrize("received", ["by all", "by each"])
def test_ranks_laid_out_are_stacked_without_a_copy(received):
    module = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 4, (2, 3)), nn.Embedding(7, 3))
    bank = AdapterPlan(2).bank(module)
    adapters = bank.drawn(3, torch.Generator().manual_seed(0), 1.0)
    adapters = tree.broadcast(adapters, 6)
    if received == "by each":
        adapters = {name: leaf.clone() for name, leaf in adapters.items()}
    laid = bank.laid_out(adapters)
    for name, leaf in laid.items():
        assert torch.equal(leaf, adapters[name])
        assert tree.is_broadcast(leaf) == (received == "by all"), "rows that are one take no memory"
    for part in bank.low_rank:
        b = laid[part.b_name].clone()
        _, stacked = stack_rank(laid[part.a_name], b, None)
        assert stacked.data_ptr() == b.data_ptr()


@pytest.mark.parametrize("rank", [1, 2])
def test_preconditioning_divides_by_the_gram_matrix_of_the_other_factor(rank):
    module = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 4, (2, 3)), nn.Conv1d(2, 3, 3)).double()
    bank = AdapterPlan(rank).bank(module)
    _, adapters, _ = clients(module, bank, num_clients=2)
    _, grads, _ = clients(module, bank, num_clients=2)
    grads = {name: leaf.flip(0, 1) + 1 for name, leaf in grads.items()}
    conditioned = precondition(bank, adapters, grads)
    eye = EPSILON * torch.eye(rank, dtype=torch.float64)
    for part, k, c in product(bank.low_rank, range(2), range(3)):
        a, b, grad_a, grad_b = (
            tensors[name][k, c] for tensors in (adapters, grads) for name in (part.a_name, part.b_name)
        )
        flat_a = a.reshape(rank, -1)  # (r, in·k_a)
        flat_b = b.movedim(1, -1).reshape(-1, rank)  # (out·k_b, r)
        expected_a = torch.linalg.inv(flat_b.T @ flat_b + eye) @ grad_a.reshape(rank, -1)
        expected_b = grad_b.movedim(1, -1).reshape(-1, rank) @ torch.linalg.inv(flat_a @ flat_a.T + eye)
        assert_close(conditioned[part.a_name][k, c].reshape(rank, -1), expected_a)
        assert_close(conditioned[part.b_name][k, c].movedim(1, -1).reshape(-1, rank), expected_b)
    for update in bank.additive:
        assert conditioned[update.name] is grads[update.name]


# Ranks and budgets.


@pytest.mark.parametrize(
    ("budget", "text"), [(0.01, "1/100"), (0.1, "1/10"), (0.35, "7/20"), (0.7, "7/10"), (0.9, "9/10")]
)
@pytest.mark.parametrize("conv", ["balanced", "in", "out"])
def test_the_rank_is_the_largest_within_the_budget_and_at_least_one(budget, text, conv):
    shapes = [nn.Linear(40, 30), nn.Embedding(50, 8), nn.Conv2d(3, 32, 5), nn.Conv2d(64, 32, (3, 1))]
    shapes += [nn.Conv1d(16, 24, 3), nn.Conv3d(8, 6, (3, 2, 2)), nn.Conv2d(16, 32, 3, groups=4)]
    shapes += [nn.Conv2d(40, 16, 3)]  # 7/10 allows exactly 24
    for layer in shapes:
        (part,) = AdapterPlan(budget, ("linear", "conv", "embedding"), conv=conv).bank(layer).low_rank
        full = layer.weight.numel()
        per_rank = (prod(part.a_shape) + prod(part.b_shape)) // part.rank
        allowed = Fraction(text) * full / per_rank
        largest = min(prod(part.a_shape), prod(part.b_shape)) // part.rank  # a higher rank would add nothing
        assert part.rank == min(max(1, floor(allowed)), largest)
        adapter = AdapterPlan(budget, ("linear", "conv", "embedding"), conv=conv).bank(layer)
        assert adapter.num_parameters() == part.rank * per_rank
        assert adapter.num_parameters() <= max(Fraction(text) * full, per_rank)


@pytest.mark.parametrize("channels", [(3, 32), (32, 64), (64, 64), (512, 128)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_square_balanced_kernel_has_the_papers_rank(channels, kernel):
    # (c_out k + c_in k) r ≤ ρ c_in c_out k², so r = ⌊ρ k c_in c_out / (c_in + c_out)⌋
    inputs, outputs = channels
    for percent in (1, 10, 50):
        (part,) = AdapterPlan(percent / 100).bank(nn.Conv2d(inputs, outputs, kernel, bias=False)).low_rank
        assert part.rank == max(1, percent * kernel * inputs * outputs // (100 * (inputs + outputs)))
        assert part.a_shape == (part.rank, inputs, 1, kernel)
        assert part.b_shape == (outputs, part.rank, kernel, 1)


def test_the_split_says_which_factor_has_a_kernel_axis():
    conv = nn.Conv3d(4, 6, (2, 3, 5))
    for split, kernel_a, kernel_b in [
        ("balanced", (1, 1, 5), (2, 3, 1)),
        ("in", (2, 3, 5), (1, 1, 1)),
        ("out", (1, 1, 1), (2, 3, 5)),
    ]:
        (part,) = AdapterPlan(2, conv=split).bank(conv).low_rank
        assert part.a_shape == (2, 4, *kernel_a)
        assert part.b_shape == (6, 2, *kernel_b)


def mnist_nn():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def cifar10_cnn():
    return nn.Sequential(nn.Conv2d(3, 32, 5), nn.Conv2d(32, 64, 3), nn.Linear(1024, 64), nn.Linear(64, 10))


def vgg8():
    widths = [3, 16, 32, 64, 128, 512]
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths)]
    return nn.Sequential(*convs, nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 100))


@pytest.mark.parametrize(
    ("model", "budget", "ranks", "num_parameters"),
    [
        # Published (linear layers only, which the published code counts right): C · n = 2 · 16, 4 · 72, …
        (lambda: nn.Linear(10, 3), 0.01, [1], 13 + 3),
        (lambda: nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 1)), 0.1, [1, 1], (30 + 20) + (21 + 1)),
        (mnist_nn, 0.01, [1, 1], 5616 // 4),
        (mnist_nn, 0.1, [15, 1], 60720 // 4),
        # Convolutions by the formula, ⌊ρ k c_in c_out / (c_in + c_out)⌋; the published code counts a kernel as 2:
        # 0.1·5·96/35 = 1.37, 0.1·3·2048/96 = 6.4, 0.1·65536/1088 = 6.02, 0.1·640/74 = 0.86
        (
            cifar10_cnn,
            0.1,
            [1, 6, 6, 1],
            (35 * 5 + 32) + (6 * 96 * 3 + 64) + (6 * 1088 + 64) + (74 + 10),
        ),
        # 0.3·48/19 = 0.76, 0.3·512/48 = 3.2, 0.3·2048/96 = 6.4, 0.3·8192/192 = 12.8, 0.3·65536/640 = 30.72,
        # 0.1·512/2 = 25.6 twice, 0.1·51200/612 = 8.37
        (
            vgg8,
            0.1,
            [1, 3, 6, 12, 30, 25, 25, 8],
            (3 * 19 + 16)
            + (9 * 48 + 32)
            + (18 * 96 + 64)
            + (36 * 192 + 128)
            + (90 * 640 + 512)
            + 2 * (25 * 1024 + 512)
            + (8 * 612 + 100),
        ),
    ],
)
def test_the_papers_models_have_the_ranks_and_sizes_of_the_formula(model, budget, ranks, num_parameters):
    bank = AdapterPlan(budget).bank(model())
    assert [part.rank for part in bank.low_rank] == ranks
    assert bank.num_parameters() == num_parameters
    tensors = bank.init(2, torch.Generator().manual_seed(0), 0.1)
    assert sum(leaf[0].numel() for leaf in tensors.values()) == num_parameters


# Starts, errors, and what is left alone.


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_a_start_without_spread_leaves_the_base_as_it_is(realization):
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    bank = AdapterPlan(2, ALL, realization=realization).bank(module)
    base = {name: leaf.detach().unsqueeze(0) for name, leaf in module.named_parameters()}
    adapters = {n: leaf.unsqueeze(0) for n, leaf in bank.init(3, torch.Generator().manual_seed(0), 0.0).items()}
    x = torch.tensor([[0, 3, 4]])
    probs = torch.tensor([[0.2, 0.3, 0.5]])
    outputs = Loss(with_paths(module, bank), "mse").outputs(mix(bank, base, adapters, probs), x)
    assert torch.equal(outputs[0], module(x[0]))


def test_the_start_has_the_stated_spread():
    module = nn.Sequential(nn.Linear(96, 80), nn.Conv2d(32, 48, (2, 4)))
    bank = AdapterPlan(64, ("linear", "conv"), scale=2.0).bank(module)
    tensors = bank.init(8, torch.Generator().manual_seed(0), 0.5)
    # A ~ U(−s, s) with s = √(6 / fan_in): standard deviation s/√3 = √(2 / fan_in); fan_in 96 and 32·4.
    for name, fan_in in (("0.weight_lora_A", 96), ("1.weight_lora_A", 128)):
        assert tensors[name].abs().max() <= (6 / fan_in) ** 0.5
        assert_close(tensors[name].std().item(), (2 / fan_in) ** 0.5, rtol=0.02, atol=0.0)
    for name in ("0.weight_lora_B", "1.weight_lora_B"):
        # ½ / √64 for twice B. Of 40,000 numbers the standard deviation is known to 1/√80,000 = 0.4 %.
        assert_close(tensors[name].std().item(), 1 / 32, rtol=0.02, atol=0.0)
    assert not torch.equal(tensors["0.weight_lora_A"][0], tensors["0.weight_lora_A"][1])


@pytest.mark.parametrize("realization", ["merged", "factored"])
def test_the_users_module_is_left_alone(realization):
    module = small_net().eval()
    before = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    bank = AdapterPlan(2, ALL, realization=realization).bank(module)
    adapted = with_paths(module, bank)
    tensors = {n: leaf.unsqueeze(0) for n, leaf in bank.init(2, torch.Generator().manual_seed(0), 0.1).items()}
    base = {name: leaf.detach().unsqueeze(0) for name, leaf in module.named_parameters()}
    mixed = mix(bank, base, tensors, torch.full((1, 2), 0.5))
    Loss(adapted, "mse").outputs(mixed, torch.ones(1, 4, 2, 3, 3), training=True)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not module.training
    assert not any(layer._forward_hooks for layer in module.modules())


def test_only_the_named_parameters_and_kinds_are_adapted():
    module = small_net()
    bank = AdapterPlan(1, ("linear", "norm"), targets=("4.*", "5.weight")).bank(module)
    assert [part.name for part in bank.low_rank] == ["4.weight"]
    assert [update.name for update in bank.additive] == ["5.weight"]


def test_auto_takes_the_cheaper_realization():
    # A pass over the weight costs out·in, a path B·(out + in) per rank: 32 · (8 + 8) > 8 · 8, 2 · (8 + 8) < 8 · 8.
    for batch_size, factored in ((32, False), (2, True)):
        (part,) = AdapterPlan(1).bank(nn.Linear(8, 8, bias=False), batch_size).low_rank
        assert part.factored == factored


@pytest.mark.parametrize("rank", [0, -1, -0.5, 1.5])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(RecipeError, match=r"adapter\.rank"):
        AdapterPlan(rank)


def test_a_rank_larger_than_a_layer_names_the_layer():
    with pytest.raises(ModelError, match=r"adapter\.rank = 5.*1\.weight \(4, 8\).*\(4\)"):
        AdapterPlan(5).bank(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


@pytest.mark.parametrize("plan", [AdapterPlan(layers=("conv",)), AdapterPlan(layers=("conv",), targets=("w*",))])
def test_nothing_to_adapt_is_an_error(plan):
    with pytest.raises(ModelError, match=r"no parameter of Linear .* adapter\.layers or adapter\.targets"):
        plan.bank(nn.Linear(3, 3))
