"""The server's steps in a secure sum: it passes boxes on, adds up what it cannot read, and takes the masks off.

With `neighbours` = 0 everyone shares with everyone, as in Bonawitz et al. 2017; else clients stand in a random
ring and each shares with the nearest on both sides, as in Bell et al. 2020 (https://eprint.iacr.org/2020/704).
"""

from collections.abc import Collection, Mapping, Sequence
from math import floor

import numpy as np

from umbel.errors import RoundError
from umbel.secure import secrets
from umbel.secure.client import own_mask, pair_mask
from umbel.secure.messages import Advertised, Delivery, Masked, Question, Roster, Sealed, Share, Shown
from umbel.secure.settings import Secure

FEWEST = 3  # clients in a sum: of two, each knows the other's part


def rosters(secure: Secure, session: bytes, advertised: Sequence[Advertised]) -> dict[int, Roster]:
    """Who shares with whom, of those who have advertised.

    Raises:
        RoundError: they are fewer than three.
    """
    by_client = {
        one.client: one
        for one in advertised
        # Whoever has others agree on a key that is none would have all of its neighbours drop out.
        if secrets.usable(one.sealing_key) and secrets.usable(one.masking_key)
    }
    clients = sorted(by_client)
    if len(clients) < FEWEST:
        raise RoundError(
            f"secure aggregation: {len(clients)} clients have sent keys; a sum over fewer than three hides "
            "nobody, so take more clients_per_round"
        )
    # The ring is public; it only has to be one that clients cannot choose.
    ring = sorted(clients, key=lambda client: secrets.commitment(session, secrets.label(session, client)))
    reach = min(-(-secure.neighbours // 2) or len(ring), len(ring))
    found = {}
    for place, client in enumerate(ring):
        holders = {ring[(place + step) % len(ring)] for step in range(-reach, reach + 1)}
        keys = {other: by_client[other] for other in sorted(holders)}
        found[client] = Roster(session, keys, floor(secure.threshold * len(keys)) + 1)
    return found


def deliveries(rosters: Mapping[int, Roster], sealed: Sequence[Sealed]) -> dict[int, Delivery]:
    """Every box to whom it is for, among those who have sealed a box for each of their neighbours."""
    boxes = {
        one.client: one.boxes
        for one in sealed
        if one.client in rosters and one.boxes.keys() == rosters[one.client].keys.keys() - {one.client}
    }
    return {
        client: Delivery(
            {other: boxes[other][client] for other in rosters[client].keys if other in boxes and other != client}
        )
        for client in boxes
    }


def questions(delivered: Mapping[int, Delivery], arrived: Collection[int]) -> dict[int, Question]:
    """What each of those whose masked contribution has arrived is asked for.

    The answer to a question is final: a contribution that comes later must not be looked at.

    Raises:
        RoundError: so few have arrived that their sum hides nobody.
    """
    there = set(arrived) & delivered.keys()
    if len(there) < FEWEST:
        raise RoundError(
            f"secure aggregation: {len(there)} contributions have arrived; a sum over fewer than three hides "
            "nobody and is not opened, so take more clients_per_round"
        )
    return {
        client: Question(
            tuple(sorted({client, *delivered[client].boxes} & there)),
            tuple(sorted(delivered[client].boxes.keys() - there)),
        )
        for client in sorted(there)
    }


def unmasked(
    rosters: Mapping[int, Roster],
    delivered: Mapping[int, Delivery],
    sealed: Sequence[Sealed],
    masked: Sequence[Masked],
    shown: Sequence[Shown],
    bits: int,
) -> bytes:
    """The sum modulo 2^bits of the contributions that have arrived, as little-endian bytes.

    Args:
        rosters: as they were sent.
        delivered: as they were sent.
        sealed: who has sealed boxes.
        masked: what has arrived before the questions were asked.
        shown: the answers.
        bits: of each number.

    Raises:
        RoundError: too few shares of a secret were shown, or some of them are wrong.
    """
    kind = f"<u{bits // 8}"
    arrived = {one.client for one in masked}
    if strangers := arrived - delivered.keys():
        raise RoundError(f"client {min(strangers)} has sent a contribution and shares no secrets with anyone")
    commitments = {one.client: one.commitment for one in sealed}
    num_bytes = len(masked[0].values) if masked else 0
    if not num_bytes or num_bytes * 8 % bits or len(arrived) < len(masked):
        raise RoundError("the masked contributions are none, or one came twice; the round is lost")
    total = np.zeros(num_bytes * 8 // bits, dtype=kind)
    for one in masked:
        if len(one.values) != num_bytes:
            raise RoundError(f"client {one.client}: its masked contribution has another length than the others'")
        total += np.frombuffer(one.values, dtype=kind)
    for client in sorted(delivered):
        roster = rosters[client]
        if client in arrived:
            seed = _opened(client, roster, [one.own_masks[client] for one in shown if client in one.own_masks])
            _check(secrets.commitment(seed, secrets.label(roster.session, client)) == commitments[client], client)
            total -= own_mask(seed, roster.session, client, num_bytes, bits)
            continue
        beside = sorted(delivered[client].boxes.keys() & arrived)
        if not beside:
            continue
        seed = _opened(client, roster, [one.keys[client] for one in shown if client in one.keys])
        _check(secrets.public_key(seed) == roster.keys[client].masking_key, client)
        for other in beside:  # whose masks with this one have nothing to cancel with
            agreed = pair_mask(
                seed, roster.keys[other].masking_key, roster.session, client, other, num_bytes, bits
            )
            total = total - agreed if other < client else total + agreed
    return total.tobytes()


def _opened(client: int, roster: Roster, shares: Sequence[Share]) -> bytes:
    if len(shares) < roster.needed:
        raise RoundError(
            f"client {client}: {len(shares)} of its {len(roster.keys)} holders have shown their shares and "
            f"{roster.needed} are needed; lower secure.threshold, raise secure.neighbours, or have more clients"
        )
    try:
        return secrets.seed_from(shares[: roster.needed])
    except (ValueError, IndexError) as error:  # two of one number, or of no length
        raise RoundError(
            f"client {client}: shares of its secrets do not fit ({error}); the round is lost"
        ) from None


def _check(right: bool, client: int) -> None:
    if not right:
        raise RoundError(f"client {client}: a share that was shown of its secrets is wrong; the round is lost")
