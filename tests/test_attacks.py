"""Hostile clients: what each attack sends, and who is evaluated."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from simulate import FREE
from test_battery import CASES, GROUP, equal, every, labelled, net, prepared, task
from umbel import tree
from umbel.attacks import attackers, hostile_upload, patched, poisoned, trapped
from umbel.clients import Examples
from umbel.cohort import Engine
from umbel.errors import RecipeError
from umbel.hazards import Attack, Robust
from umbel.methods import FedAvg
from umbel.recipe import read
from umbel.rounds import honest, rounds, start
from umbel.schedule import Schedule
from umbel.train import LocalTraining

ONE_EACH = {name: dict([next(iter(own.items()))]) for name, own in CASES.items()}
KINDS = ["sign_flip", "scale", "gaussian", "label_flip", "backdoor"]
AVG = FedAvg(LocalTraining(batch_size=4))


def progress(method, schedule, chunk=3):
    given = task(labelled(), net()[0])
    cohort, at = start(given, method, schedule, Engine(mode="stacked", chunk=chunk))
    return list(rounds(cohort, at, given, schedule, FREE))


def sent(method, kind, strength=3.0):
    """Honest uploads, hostile ones and the messages of five clients."""
    loss, message, private, data, _ = prepared(method, net(), labelled(), num_rounds=1)
    upload, _ = method.client_update(loss, message, private, data)
    attack = Attack(kind, strength=strength)
    return upload, hostile_upload(attack, method, upload, message, np.arange(5), 0, 2), message


@every(ONE_EACH)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_run_under_every_attack(method, kind):
    last = progress(method, Schedule(rounds=2, evaluate_every=2, attack=Attack(kind, 0.4, 2.0)))[-1]
    assert np.isfinite(last.scores.loss).all()
    assert len(last.scores.loss) == 3  # the honest ones
    assert ("attack_success" in last.figures) == (kind == "backdoor")


@every(ONE_EACH)
def test_attacks_do_not_depend_on_chunks(method):
    schedule = Schedule(rounds=1, attack=Attack("gaussian", 0.4, 1.0))
    one, other = (tree.tensors(progress(method, schedule, chunk)[-1].shared) for chunk in (1, 5))
    assert_close(one, other, rtol=1e-3, atol=1e-4)


@every(ONE_EACH)
def test_nobody_hostile_is_a_run_without_attack(method):
    plain, idle = (
        progress(method, Schedule(rounds=2, attack=attack))[-1] for attack in (Attack(), Attack("sign_flip", 0.0))
    )
    assert equal(tree.tensors(plain.shared), tree.tensors(idle.shared))


def test_a_flipped_step_goes_the_other_way():
    upload, hostile, message = sent(AVG, "sign_flip")
    for name, had in message.params.items():
        assert_close(hostile.params[name] - had, -3 * (upload.params[name] - had))


def test_a_scaled_step_is_longer():
    upload, hostile, message = sent(AVG, "scale")
    for name, had in message.params.items():
        assert_close(hostile.params[name] - had, 3 * (upload.params[name] - had))


def test_noise_is_as_long_as_asked_for():
    upload, hostile, message = sent(AVG, "gaussian", 5.0)

    def length(made):
        return torch.stack(
            [(made.params[n] - had).flatten(1).norm(dim=1) for n, had in message.params.items()]
        ).norm(dim=0)

    assert_close(length(hostile), 5 * length(upload), rtol=0.4, atol=0)


@pytest.mark.parametrize("label", ["em", "oracle, preconditioned", "send top"])
def test_a_backdoor_hides_in_one_adapter(label):
    method = CASES["floral"][label]
    _, hostile, message = sent(method, "backdoor")
    for name, leaf in hostile.base.items():
        assert torch.equal(leaf, message.base[name])
    for client in range(5):
        changed = set()
        for name, leaf in hostile.adapters.items():
            for place, c in enumerate(hostile.sent[client].tolist()):
                if not torch.equal(leaf[client, place], message.adapters[name][client, c]):
                    changed.add(c)
        assert len(changed) == 1
        assert changed == {int(hostile.route_examples[client].argmax())}


def test_a_router_that_claims_all_adapters():
    method = CASES["floral"]["em"]
    upload, hostile, _ = sent(method, "claim_all")
    assert torch.equal(hostile.route_examples, 3 * upload.weight.unsqueeze(1).expand(5, 3))
    with pytest.raises(RecipeError, match="claim_all': FedAvg asks no client for its routes"):
        sent(AVG, "claim_all")


def test_claims_on_all_adapters_are_bounded_under_a_robust_rule():
    # Plainly summed, one client of five that claims a thousand times its examples has all adapters to itself.
    shares = []
    for robust in (Robust(), Robust("norm_bound")):
        schedule = Schedule(rounds=1, attack=Attack("claim_all", 0.2, 1000.0), robust=robust)
        shared = progress(CASES["floral"]["em"], schedule)[-1].shared
        shares.append(float(shared.routes.share.sum()))
    assert shares[0] > 10
    assert shares[1] == pytest.approx(1, abs=1e-4)


def test_flipped_labels_are_those_of_hostile_clients_alone():
    examples = Examples.of(labelled())
    flipped = poisoned(Attack("label_flip"), examples, np.array([1, 3]), 3)
    for client in range(5):
        x, y = examples.of_client(client)
        assert torch.equal(flipped.of_client(client)[0], x)
        assert torch.equal(flipped.of_client(client)[1], 2 - y if client in (1, 3) else y)


def test_half_of_a_backdoors_examples_are_patched_and_labelled():
    examples = Examples.of(labelled())
    made = poisoned(Attack("backdoor"), examples, np.array([3]), 3)
    x, y = made.of_client(3)
    assert bool((y[::2] == 0).all())
    assert bool((x[::2, -2:] == examples.x.max()).all())
    assert torch.equal(x[1::2], examples.of_client(3)[0][1::2])
    assert torch.equal(made.of_client(2)[0], examples.of_client(2)[0])
    assert torch.equal(examples.x, Examples.of(labelled()).x)


def test_traps_are_examples_of_another_label():
    examples = Examples.of(labelled())
    traps = trapped(examples, examples.x.max())
    for client in range(5):
        x, y = examples.of_client(client)
        found, label = traps.of_client(client)
        assert torch.equal(found, patched(x[y != 0], examples.x.max()))
        assert bool((label == 0).all())


def test_a_patch_is_in_the_last_corner_of_a_picture():
    made = patched(torch.zeros(2, 3, 5, 6), torch.tensor(7.0))
    assert bool((made[:, :, 3:, 4:] == 7).all())
    assert int((made != 0).sum()) == 2 * 3 * 4


def test_attackers_are_drawn_once_and_are_not_evaluated():
    schedule = Schedule(attack=Attack("sign_flip", 0.25), held_out=0.2, seed=3)
    good = honest(40, schedule)
    bad = attackers(schedule.attack, 3, np.setdiff1d(np.arange(40), []))
    assert len(good) == 24
    assert len(bad) == 10
    assert len(attackers(Attack("none"), 3, np.arange(40))) == 0


def test_an_attack_on_labels_needs_labels():
    examples = Examples.of(labelled())
    with pytest.raises(RecipeError, match="changes labels"):
        poisoned(Attack("label_flip"), examples, np.array([0]), 1)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "flip"}, r"attack.kind = 'flip', but it is one of .*'sign_flip'"),
        ({"kind": "scale", "share": 1.0}, r"attack: share = .*, but it must be in \[0, 1\)"),
        ({"kind": "scale", "strength": 0}, "attack: strength = .*, but it must be above 0"),
    ],
)
def test_bad_settings_are_named(table, said):
    with pytest.raises(RecipeError, match=said):
        read({"task": {"name": "digits"}, "attack": table}, "fedavg")


def test_groups_are_those_of_honest_clients():
    at = progress(CASES["floral"]["em"], Schedule(rounds=1, attack=Attack("sign_flip", 0.2)))[-1]
    kept = honest(5, Schedule(rounds=1, attack=Attack("sign_flip", 0.2)))
    assert len(at.figures["by_group"]) == len(GROUP[kept].unique())
