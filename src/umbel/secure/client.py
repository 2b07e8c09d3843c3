"""A client's four steps in a secure sum; each takes the state that the step before has left.

Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning, Figure 4, without the
step for servers that lie (https://doi.org/10.1145/3133956.3133982). Client u, its neighbours N(u):

    advertise    public keys of two fresh pairs                            → Roster
    share        a seed b_u; Shamir shares of b_u and of the masking key's seed, sealed for N(u)   → Delivery
    mask         y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) − Σ_{v < u} PRG(s_uv)                  → Question
    show         shares of b_v for those who arrived, of the key's seed for those who did not
"""

from dataclasses import replace

import numpy as np

from umbel.errors import RoundError
from umbel.secure import secrets
from umbel.secure.messages import Advertised, ClientState, Delivery, Masked, Question, Roster, Sealed, Share, Shown
from umbel.secure.secrets import SEED_BYTES, Random, unpredictable


def advertise(client: int, random: Random = unpredictable) -> tuple[ClientState, Advertised]:
    """Two fresh pairs of keys, and what may be known of them."""
    sealing, masking = random(SEED_BYTES), random(SEED_BYTES)
    return (
        ClientState(client, sealing, masking),
        Advertised(client, secrets.public_key(sealing), secrets.public_key(masking)),
    )


def share(state: ClientState, roster: Roster, random: Random = unpredictable) -> tuple[ClientState, Sealed]:
    """The client's secrets, in shares that are sealed for its neighbours.

    Raises:
        RoundError: the roster is not one that this client can trust its secrets to.
    """
    own = roster.keys.get(state.client)
    holders = sorted(roster.keys)
    keys = {key for one in roster.keys.values() for key in (one.sealing_key, one.masking_key)}
    if own is None or own.masking_key != secrets.public_key(state.masking_seed) or len(keys) < 2 * len(holders):
        raise RoundError(f"client {state.client}: the roster of secure aggregation does not hold its own keys")
    if state.roster is not None or len(holders) < 3 or not len(holders) < 2 * roster.needed <= 2 * len(holders):
        raise RoundError(
            f"client {state.client}: its secrets would be held by {len(holders)} clients of which {roster.needed} "
            "can open them; secure aggregation wants at least 3, more than half to open, and once in a round"
        )
    seed = random(SEED_BYTES)
    of_mask, of_key = (
        dict(zip(holders, secrets.shares_of(secret, roster.needed, len(holders)), strict=True))
        for secret in (seed, state.masking_seed)
    )
    boxes = {
        other: secrets.sealed(
            secrets.agreed(state.sealing_seed, roster.keys[other].sealing_key, b"umbel seal " + roster.session),
            b"".join(_bytes_of(share) for share in (of_mask[other], of_key[other])),
            _about(roster.session, state.client, other),
            random,
        )
        for other in holders
        if other != state.client
    }
    kept = {state.client: (of_mask[state.client], of_key[state.client])}
    commitment = secrets.commitment(seed, secrets.label(roster.session, state.client))
    return replace(state, roster=roster, own_seed=seed, held=kept), Sealed(state.client, boxes, commitment)


def mask(state: ClientState, delivery: Delivery, values: bytes, bits: int) -> tuple[ClientState, Masked]:
    """The values (`fixed_point.encoded`) under the masks that are shared with all who have sealed something.

    Raises:
        RoundError: too few neighbours are left, or a box was changed on its way.
    """
    roster = _roster(state)
    if len(delivery.boxes) + 1 < roster.needed or not delivery.boxes.keys() <= roster.keys.keys() - {state.client}:
        raise RoundError(
            f"client {state.client}: {len(delivery.boxes) + 1} of its {len(roster.keys)} holders have shared "
            f"secrets, and {roster.needed} are needed; its contribution stays with it"
        )
    held = dict(state.held)
    for other, box in delivery.boxes.items():
        key = secrets.agreed(state.sealing_seed, roster.keys[other].sealing_key, b"umbel seal " + roster.session)
        try:
            text = secrets.unsealed(key, box, _about(roster.session, other, state.client))
        except ValueError as error:
            raise RoundError(f"client {state.client}: what client {other} sent: {error}") from None
        held[other] = _share_of(text[: len(text) // 2]), _share_of(text[len(text) // 2 :])
    masked = np.frombuffer(values, dtype=f"<u{bits // 8}").copy()
    masked += own_mask(state.own_seed, roster.session, state.client, len(values), bits)
    for other in delivery.boxes:
        agreed = pair_mask(
            state.masking_seed,
            roster.keys[other].masking_key,
            roster.session,
            state.client,
            other,
            len(values),
            bits,
        )
        masked = masked + agreed if state.client < other else masked - agreed
    return replace(state, held=held), Masked(state.client, masked.tobytes())


def show(state: ClientState, question: Question) -> tuple[ClientState, Shown]:
    """One share for each neighbour: of its own mask if it arrived, else of its masking key.

    Raises:
        RoundError: it was asked already, for both of somebody, for a stranger's, or too few have arrived.
    """
    roster = _roster(state)
    arrived, missing = set(question.arrived), set(question.missing)
    if state.answered or arrived & missing or not arrived | missing <= state.held.keys():
        raise RoundError(
            f"client {state.client} was asked for shares that would uncover a single contribution; it shows none"
        )
    if state.client not in arrived or len(arrived) < roster.needed:
        raise RoundError(
            f"client {state.client}: of its {len(roster.keys)} holders {len(arrived)} have sent a contribution, "
            f"and {roster.needed} are needed to take the masks off; lower secure.threshold or have more clients"
        )
    own_masks = {other: state.held[other][0] for other in sorted(arrived)}
    keys = {other: state.held[other][1] for other in sorted(missing)}
    return replace(state, answered=True), Shown(state.client, own_masks, keys)


def own_mask(seed: bytes, session: bytes, client: int, num_bytes: int, bits: int) -> np.ndarray:
    """PRG(b_u), unsigned."""
    stream = secrets.key_stream(seed, b"umbel own mask " + secrets.label(session, client), num_bytes)
    return np.frombuffer(stream, dtype=f"<u{bits // 8}")


def pair_mask(
    seed: bytes, other_key: bytes, session: bytes, client: int, other: int, num_bytes: int, bits: int
) -> np.ndarray:
    """PRG(s_uv), unsigned: the same for both, whichever of the two seeds and keys it is made of."""
    label = b"umbel pair mask " + secrets.label(session, min(client, other), max(client, other))
    return np.frombuffer(
        secrets.key_stream(secrets.agreed(seed, other_key, label), label, num_bytes), dtype=f"<u{bits // 8}"
    )


def _roster(state: ClientState) -> Roster:
    if state.roster is None:
        raise RoundError(f"client {state.client} was asked for a masked contribution before it has shared secrets")
    return state.roster


def _about(session: bytes, sender: int, receiver: int) -> bytes:
    return b"umbel shares " + secrets.label(session, sender, receiver)


def _bytes_of(share: Share) -> bytes:
    return share[0].to_bytes(4, "little") + share[1]


def _share_of(text: bytes) -> Share:
    return int.from_bytes(text[:4], "little"), text[4:]
