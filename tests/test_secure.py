"""Secure aggregation: the sum is right whoever drops out, and nothing else can be read."""

from dataclasses import replace
from hashlib import blake2b
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from umbel import tree
from umbel.errors import RecipeError, RoundError
from umbel.secure import client as clients
from umbel.secure import secrets, server
from umbel.secure.exchange import secure_sum
from umbel.secure.fixed_point import decoded, encoded, layout_of
from umbel.secure.messages import ClientState, Masked, Question, packed, unpacked
from umbel.secure.settings import Secure

MASKS = Secure("masks")


def repeatable(seed=0):
    """Random bytes that are the same in every run."""
    count = [0]

    def draw(size):
        count[0] += 1
        return blake2b(repr((seed, count[0])).encode(), digest_size=size).digest()

    return draw


def contribution(client, size=50):
    draw = torch.Generator().manual_seed(client)
    return {
        "base": {"weight": torch.randn(size, 3, generator=draw), "bias": torch.randn(3, generator=draw)},
        "route_examples": torch.rand(4, generator=draw),
        "weight": torch.tensor(float(client)),
    }


def plain(contributions):
    """In double precision."""
    return {
        name: sum(tree.tensors(own)[name].double() for own in contributions.values())
        for name in tree.tensors(next(iter(contributions.values())))
    }


@pytest.mark.parametrize("secure", [MASKS, replace(MASKS, bits=32, range=8.0), replace(MASKS, neighbours=4)])
@pytest.mark.parametrize("lost", [(), (1, 3, 6)], ids=["everyone stays", "a third drops out"])
def test_the_secure_sum_is_the_plain_sum_to_the_quantisation_step(secure, lost):
    begun = [*range(8), 12]
    arrived = {client: contribution(client) for client in begun if client not in lost}
    # Seeded: with four neighbours each, some rings do not survive the loss of a third.
    found = secure_sum(begun, arrived, replace(secure, ranges={"weight": 2000.0}), Random(5).randbytes)
    exact = plain(arrived)
    assert found.num_clients == len(arrived)
    assert found.cut == 0
    for (name, total), step in zip(found.sums.items(), found.layout.steps, strict=True):
        rounding = 1e-6 * exact[name].abs().max()  # of float32
        assert (total.double() - exact[name]).abs().max() <= len(arrived) * step / 2 + rounding, name
    assert found.figures()["secure_error"] == pytest.approx(len(arrived) * max(found.layout.steps) / 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.sampled_from([0, 2, 3, 6]), st.data())
def test_any_clients_may_drop_out_as_long_as_enough_holders_stay(number, neighbours, data):
    secure = replace(MASKS, neighbours=neighbours)
    begun = data.draw(st.lists(st.integers(0, 1000), min_size=number, max_size=number, unique=True))
    lost = set(data.draw(st.lists(st.sampled_from(begun), max_size=number // 2)))
    arrived = {client: {"w": torch.tensor([float(client), 1.0])} for client in begun if client not in lost}
    try:
        found = secure_sum(begun, arrived, secure)
    except RoundError:
        assert lost  # nobody fails where everybody stays
        return
    assert found.sums["w"].tolist() == [float(sum(arrived)), float(len(arrived))]


def test_what_cannot_be_opened_is_not_opened():
    contributions = {client: contribution(client) for client in range(9)}
    few = {client: contributions[client] for client in (0, 1, 2, 3)}
    with pytest.raises(RoundError, match="9 holders 4 have sent a contribution, and 5 are needed"):
        secure_sum(range(9), few, MASKS)
    with pytest.raises(RoundError, match="2 clients have sent keys; a sum over fewer than three"):
        secure_sum(range(2), {0: contributions[0], 1: contributions[1]}, MASKS)
    three = {client: contributions[client] for client in range(3)}
    assert secure_sum(range(4), three, MASKS).num_clients == 3
    for lost in (2, 1):  # enough of the three could open it, and yet it is a sum of two
        two = {client: own for client, own in three.items() if client != lost}
        with pytest.raises(RoundError, match="2 contributions have arrived; a sum over fewer than three"):
            secure_sum(range(3), two, MASKS)
    with pytest.raises(RoundError, match="nothing to add up"):
        secure_sum(range(9), {}, MASKS)


def test_numbers_beyond_the_range_are_cut_and_counted():
    arrived = {client: {"w": torch.tensor([1.0, 5.0]), "v": torch.tensor(5.0)} for client in range(4)}
    found = secure_sum(range(4), arrived, replace(MASKS, bits=32, range=2.0, ranges={"v": 6.0}))
    assert found.cut == found.figures()["secure_cut"] == 4
    torch.testing.assert_close(found.sums["w"], torch.tensor([4.0, 8.0]))
    torch.testing.assert_close(found.sums["v"], torch.tensor(20.0))


@given(st.floats(-8, 8), st.integers(1, 1000), st.sampled_from([32, 64]))
def test_a_number_comes_back_to_half_a_step(number, num_clients, bits):
    own = {"w": torch.tensor([number], dtype=torch.float64)}
    layout = layout_of(own, Secure("masks", bits=bits, range=8.0), num_clients)
    text = encoded(own, layout, num_clients)
    assert len(text) == layout.num_bytes
    sums, cut = decoded(text, layout)
    assert cut == 0
    assert abs(float(sums["w"][0]) - number) <= layout.steps[0] / 2 + 1e-15
    # So many clients at the end of the range do not wrap around.
    whole = np.frombuffer(text, dtype=f"<i{bits // 8}")[0]
    assert abs(int(whole)) * num_clients < 2 ** (bits - 1)


def masked_uploads(contributions, secure=MASKS, random=None):
    """What the server receives in step 3, and the states that the clients then have."""
    random = random or repeatable()
    started = {client: clients.advertise(client, random) for client in contributions}
    rosters = server.rosters(secure, b"s" * 16, [told for _, told in started.values()])
    shared = {client: clients.share(state, rosters[client], random) for client, (state, _) in started.items()}
    delivered = server.deliveries(rosters, [told for _, told in shared.values()])
    layout = layout_of(next(iter(contributions.values())), secure, len(contributions))
    return {
        client: clients.mask(
            shared[client][0], delivered[client], encoded(own, layout, len(contributions)), secure.bits
        )
        for client, own in contributions.items()
    }, layout


@pytest.mark.parametrize("bits", [32, 64])
def test_a_masked_upload_cannot_be_told_from_uniform_numbers(bits):
    secure = replace(MASKS, bits=bits)
    zeros = {client: {"w": torch.zeros(50_000)} for client in range(3)}
    uploads, _ = masked_uploads(zeros, secure)
    for _, told in uploads.values():
        numbers = np.frombuffer(told.values, dtype=f"<u{bits // 8}")
        for shift in range(0, bits, 8):  # every byte by itself, the highest ones too
            counts = np.bincount(((numbers >> shift) & 255).astype(np.int64), minlength=256)
            assert chisquare(counts).pvalue > 1e-4
        assert abs(np.corrcoef(numbers[:-1].astype(float), numbers[1:].astype(float))[0, 1]) < 0.02
    first, second, _ = (np.frombuffer(told.values, dtype=f"<u{bits // 8}") for _, told in uploads.values())
    counts = np.bincount(((first - second) >> (bits - 8)).astype(np.int64), minlength=256)
    assert chisquare(counts).pvalue > 1e-4  # nor two of them from unrelated ones


def test_the_servers_transcript_holds_no_router():
    # Clients 0 and 1 exchange their routers: the sum is the same, and so must be all that the server can tell.
    routers = torch.tensor([[31.0, 0, 0, 0], [0, 31.0, 0, 0], [0, 0, 31.0, 0], [0, 0, 0, 31.0]])
    swapped = routers[[1, 0, 2, 3]]
    found = []
    for own in (routers, swapped):
        contributions = {client: {"route_examples": row.clone()} for client, row in enumerate(own)}
        found.append((secure_sum(range(4), contributions, MASKS), contributions))
    (one, contributions), (other, _) = found
    assert torch.equal(one.sums["route_examples"], other.sums["route_examples"])
    transcript = b"".join(one.transcript)
    for own in contributions.values():
        for row in (encoded(own, one.layout, 4), own["route_examples"].numpy().tobytes()):
            assert row not in transcript
            assert row[: one.layout.bits // 8 * 2] not in transcript  # nor its first two numbers
    # What is told beside the masked vectors does not depend on routers: same kinds, same lengths.
    assert sorted(map(len, one.transcript)) == sorted(map(len, other.transcript))
    assert not set(one.transcript) & set(other.transcript)  # fresh keys and masks in every round


def test_a_clients_upload_without_its_own_mask_is_still_hidden():
    # The server may learn every own mask; the pairwise ones are left as long as two honest clients take part.
    zeros = {client: {"w": torch.zeros(20_000)} for client in range(3)}
    uploads, layout = masked_uploads(zeros)
    state, told = uploads[0]
    numbers = np.frombuffer(told.values, dtype="<u8") - clients.own_mask(
        state.own_seed, b"s" * 16, 0, layout.num_bytes, 64
    )
    assert chisquare(np.bincount((numbers >> 56).astype(np.int64), minlength=256)).pvalue > 1e-4


def test_a_client_shows_no_two_shares_of_anybody():
    uploads, _ = masked_uploads({client: contribution(client) for client in range(5)})
    state, _ = uploads[0]
    with pytest.raises(RoundError, match="uncover a single contribution"):
        clients.show(state, Question((0, 1, 2, 3), (3, 4)))
    with pytest.raises(RoundError, match="uncover a single contribution"):
        clients.show(state, Question((0, 1, 2, 3), (9,)))
    with pytest.raises(RoundError, match="2 have sent a contribution, and 3 are needed"):
        clients.show(state, Question((0, 1), (2, 3, 4)))
    after, shown = clients.show(state, Question((0, 1, 2, 3), (4,)))
    assert shown.own_masks.keys() == {0, 1, 2, 3}
    assert shown.keys.keys() == {4}
    with pytest.raises(RoundError, match="uncover a single contribution"):
        clients.show(after, Question((0, 1, 2, 4), (3,)))


def test_a_box_that_was_changed_or_is_for_somebody_else_is_refused():
    random = repeatable()
    started = {client: clients.advertise(client, random) for client in range(3)}
    rosters = server.rosters(MASKS, b"s" * 16, [told for _, told in started.values()])
    shared = {client: clients.share(state, rosters[client], random) for client, (state, _) in started.items()}
    delivered = server.deliveries(rosters, [told for _, told in shared.values()])
    boxes = dict(delivered[0].boxes)
    spoilt = boxes | {1: boxes[1][:-1] + bytes([boxes[1][-1] ^ 1])}
    for wrong in (spoilt, boxes | {1: boxes[2]}):
        with pytest.raises(RoundError, match="client 0: what client 1 sent: a sealed share was changed"):
            clients.mask(shared[0][0], replace(delivered[0], boxes=wrong), b"", 64)


def test_wrong_shares_are_told_instead_of_a_wrong_sum():
    contributions = {client: contribution(client) for client in range(5)}
    random = repeatable()
    started = {client: clients.advertise(client, random) for client in range(5)}
    rosters = server.rosters(MASKS, b"s" * 16, [told for _, told in started.values()])
    shared = {client: clients.share(state, rosters[client], random) for client, (state, _) in started.items()}
    sealed = [told for _, told in shared.values()]
    delivered = server.deliveries(rosters, sealed)
    layout = layout_of(contributions[0], MASKS, 5)
    masked = {
        client: clients.mask(shared[client][0], delivered[client], encoded(contributions[client], layout, 5), 64)
        for client in range(4)
    }
    asked = server.questions(delivered, range(4))
    shown = [clients.show(masked[client][0], question)[1] for client, question in asked.items()]
    index, share = shown[0].keys[4]
    lied = replace(shown[0], keys={4: (index, bytes(16 * [7]))})
    told = [one for _, one in masked.values()]
    with pytest.raises(RoundError, match="client 4: a share that was shown of its secrets is wrong"):
        server.unmasked(rosters, delivered, sealed, told, [lied, *shown[1:]], 64)
    assert len(server.unmasked(rosters, delivered, sealed, told, shown, 64)) == layout.num_bytes
    assert share != bytes(16 * [7])


def test_a_client_trusts_its_secrets_only_to_a_roster_with_its_own_keys():
    random = repeatable()
    started = {client: clients.advertise(client, random) for client in range(3)}
    rosters = server.rosters(MASKS, b"s" * 16, [told for _, told in started.values()])
    state, told = started[0]
    keys = rosters[0].keys
    for wrong in (
        {1: keys[1], 2: keys[2]},
        keys | {0: replace(told, masking_key=keys[1].masking_key)},
        keys | {1: replace(keys[2], client=1)},  # one pair of keys in two places
    ):
        with pytest.raises(RoundError, match="does not hold its own keys"):
            clients.share(state, replace(rosters[0], keys=wrong))
    for needed in (1, 4):
        with pytest.raises(RoundError, match="3 clients of which"):
            clients.share(state, replace(rosters[0], needed=needed))


def test_states_and_messages_survive_the_wire():
    uploads, _ = masked_uploads({client: contribution(client) for client in range(3)})
    for state, told in uploads.values():
        assert unpacked(ClientState, packed(state)) == state
        assert unpacked(Masked, packed(told)) == told
    with pytest.raises(ValueError, match="these bytes are no Masked"):
        unpacked(Masked, packed({"client": "zero"}))


def test_shares_are_shamirs():
    seed = bytes(range(16))
    shares = secrets.shares_of(seed, 3, 5)
    assert secrets.seed_from(shares[1:4]) == secrets.seed_from(shares[2:]) == seed
    assert secrets.seed_from(shares[:2]) != seed


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 0.3}, {"threshold": 1.0}, {"neighbours": 1}, {"range": 0.0}, {"ranges": {"base": -1.0}}],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError, match="|".join(wrong)):
        Secure("masks", **wrong)


def test_masks_that_are_spoken_of_and_not_asked_for_are_told():
    with pytest.raises(RecipeError, match="secure: neighbours is set, but aggregation = 'plain'"):
        Secure(neighbours=4)
