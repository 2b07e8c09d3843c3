"""Keys, masks and shares of secrets, from `cryptography` and PyCryptodome; no arithmetic of our own.

    key agreement     X25519 (RFC 7748), HKDF-SHA256 (RFC 5869)
    masks             the ChaCha20 key stream (RFC 8439): its bytes are uniform numbers modulo 2^bits as they stand
    shares            Shamir 1979, over GF(2^128), PyCryptodome's
    sealed shares     ChaCha20-Poly1305, from whom and to whom in the associated data

Every secret is a seed of 16 bytes, one block of PyCryptodome's sharing; private keys are made of seeds by HKDF.
The labels of HKDF hold the round's session and who agrees with whom, so no mask is ever used twice.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

SEED_BYTES = 16
Random = Callable[[int], bytes]
"""So many unpredictable bytes; tests have their own."""


def unpredictable(count: int) -> bytes:
    """From the operating system."""
    return os.urandom(count)


def public_key(seed: bytes) -> bytes:
    """32 bytes, of the private key that is made of the seed."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key: bytes = _private_key(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return key


def agreed(seed: bytes, other_public: bytes, purpose: bytes) -> bytes:
    """32 bytes that only the two whose keys these are can compute, another for every purpose.

    Raises:
        ValueError: the other's key is no point that an honest client would send.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    return _derived(_private_key(seed).exchange(X25519PublicKey.from_public_bytes(other_public)), purpose)


def usable(public: bytes) -> bool:
    """Whether others can agree on a secret with whoever has told this public key."""
    try:
        agreed(b"any", public, b"umbel usable")
    except ValueError:
        return False
    return True


def key_stream(seed: bytes, purpose: bytes, count: int) -> bytes:
    """So many bytes that look random to whoever has not got the seed (or agreed secret)."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    # Every key is used for one stream only, so that its nonce may be a constant.
    return Cipher(ChaCha20(_derived(seed, purpose), bytes(16)), mode=None).encryptor().update(bytes(count))


def label(session: bytes, *clients: int) -> bytes:
    """What tells one use of a secret from another."""
    return session + b"".join(client.to_bytes(8, "little") for client in clients)


def commitment(seed: bytes, purpose: bytes) -> bytes:
    """32 bytes by which a seed is known again, and from which it cannot be found."""
    return _derived(seed, b"commitment " + purpose)


def sealed(key: bytes, text: bytes, about: bytes, random: Random) -> bytes:
    """The text, which only who has the key can read, and of which nobody can change a bit or what it is about."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = random(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about)


def unsealed(key: bytes, box: bytes, about: bytes) -> bytes:
    """The text of `sealed`.

    Raises:
        ValueError: it was changed on the way, or is about something else.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(box[:12], box[12:], about)
    except InvalidTag:
        raise ValueError("a sealed share was changed on its way, or sealed for somebody else") from None


def shares_of(seed: bytes, threshold: int, number: int) -> list[tuple[int, bytes]]:
    """So many numbered shares of the seed, `threshold` of which give it back and fewer nothing of it."""
    from Crypto.Protocol.SecretSharing import Shamir

    return [(int(index), bytes(share)) for index, share in Shamir.split(threshold, number, seed, ssss=False)]


def seed_from(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The seed of which these are shares, if they are as many as the threshold; else something."""
    from Crypto.Protocol.SecretSharing import Shamir

    return bytes(Shamir.combine(list(shares), ssss=False))


def _private_key(seed: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(_derived(seed, b"umbel private key"))


def _derived(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes of the secret for one purpose."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(secret)
