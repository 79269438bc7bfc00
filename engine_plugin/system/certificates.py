"""Certificates for one connection between a host and its plugin (go-plugin's AutoMTLS), new for each process.

Each side trusts exactly one certificate, the other's, which came in the plugin's environment or in its handshake
line. No certificate authority is involved.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

__all__ = ["NAME", "Identity", "der_to_pem", "load_identity", "pem_to_ders", "tls_context"]

NAME = "localhost"  # the name that both sides use and expect
_CLOCK_MAY_STEP_BACK = timedelta(minutes=5)
_LIFETIME = timedelta(days=3650)  # the key lives no longer than this process


@dataclass(frozen=True, slots=True)
class Identity:
    """A self-signed certificate and its key. Importing this module takes 80 ms."""

    certificate: bytes
    """DER."""
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls) -> Identity:
        """Create a key on P-256, which every TLS library supports, and a certificate for server and client."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, NAME),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "engine-plugin"),
            ]
        )
        now = datetime.now(UTC)
        ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_MAY_STEP_BACK)
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_KEY_USAGE, critical=True)
            .add_extension(x509.ExtendedKeyUsage(ends), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate.public_bytes(Encoding.DER), key)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate alone."""
        return der_to_pem(self.certificate)

    def key_pem(self, password: bytes = b"") -> bytes:
        """The key in PEM, encrypted if there is a password, for a library that takes it from memory."""
        encryption: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


_KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,  # self-signed
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def load_identity(context: ssl.SSLContext, identity: Identity, directory: Path) -> None:
    """Load `identity` into `context`. Raises OSError when `directory` cannot be written.

    `ssl` reads keys from files only: the file is encrypted with a random password, readable by this user alone, and
    removed at once.
    """
    password = secrets.token_hex(32).encode()
    path = directory / f"{secrets.token_hex(8)}.key"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as pem:
            pem.write(identity.certificate_pem + identity.key_pem(password))
        context.load_cert_chain(path, password=password)
    finally:
        path.unlink(missing_ok=True)


def tls_context(
    protocol: ssl._SSLMethod, identity: Identity, trusted: frozenset[bytes] | set[bytes], directory: Path
) -> ssl.SSLContext:
    """HTTP/2 over TLS as `identity`, to peers with one of the trusted certificates (DER).

    `directory` must be private: it briefly holds the encrypted key. Raises OSError when it cannot be written.
    """
    import ssl

    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust a certificate that is not self-signed, too
    context.load_verify_locations(cadata=b"".join(trusted))
    load_identity(context, identity, directory)
    return context


def pem_to_ders(pem: str) -> frozenset[bytes]:
    """The certificates in a PEM text. Raises ValueError, with the reason, for none or an invalid one."""
    found = x509.load_pem_x509_certificates(pem.encode(errors="surrogateescape"))
    return frozenset(certificate.public_bytes(Encoding.DER) for certificate in found)


def der_to_pem(der: bytes) -> bytes:
    """A DER certificate as PEM. Raises ValueError for an invalid one."""
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
