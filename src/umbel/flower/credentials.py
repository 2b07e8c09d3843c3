"""Certificates and keys for a deployment: enough for a trial, a pattern for what an organisation issues."""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from umbel.errors import DeployError

DAYS = 365
HOST = re.compile(r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*", re.ASCII)


def write_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Writes ca.crt, server.pem and server.key for a server under these names and addresses.

    The authority's own key is thrown away: nothing else can ever be signed with it, so that a lost folder harms
    one server only.

    Raises:
        DeployError: a host is neither a name nor an address.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "umbel deployment")])
    # Who it is for is in the alternative names; this one may not be longer than 64 letters.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "umbel server")])
    now = datetime.now(UTC)

    def signed(
        name: x509.Name, key: ec.EllipticCurvePublicKey, extensions: Sequence[tuple[x509.ExtensionType, bool]]
    ) -> bytes:
        made = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key)
        made = made.serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=DAYS))
        for extension, critical in extensions:
            made = made.add_extension(extension, critical)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        made = made.add_extension(own, False).add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        return made.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def usage(signs_others: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs_others,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=signs_others,
            crl_sign=signs_others,
            encipher_only=False,
            decipher_only=False,
        )

    root = signed(
        issuer,
        authority.public_key(),
        [(x509.BasicConstraints(ca=True, path_length=0), True), (usage(True), True)],
    )
    own = signed(
        subject,
        server.public_key(),
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage(False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName([_name(host) for host in hosts]), False),
        ],
    )
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "ca.crt").write_bytes(root)
    (folder / "server.pem").write_bytes(own)
    write_secret(folder / "server.key", server.private_bytes(*pem))


def write_keys(folder: Path, name: str) -> None:
    """Writes a node's key pair as OpenSSH files: `name`, which stays on the node, and `name`.pub."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_secret(folder / name, key.private_bytes(*openssh))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public + f" {name}\n".encode())


def write_secret(path: Path, content: bytes) -> None:
    """Writes a file that only its owner can read, from its first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _name(host: str):  # type: ignore[no-untyped-def]
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host) or len(host) > 253:
            raise DeployError(
                f"{host!r} is no host; write a name such as fl.example.org (in ASCII), or an address"
            ) from None
        return x509.DNSName(host)
