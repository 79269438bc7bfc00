from __future__ import annotations

import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from engine_plugin.system.certificates import Identity, der_to_pem, load_identity, pem_to_ders


@pytest.mark.promise("G37")
def test_identity_has_the_fields_of_go_plugin_certificates() -> None:
    """The same fields as in go-plugin's certificates, on a curve that every TLS library supports."""
    one = x509.load_der_x509_certificate(Identity.create().certificate)
    names = one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usage = one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    key = one.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert one.subject == one.issuer
    assert one.subject.rfc4514_string().endswith("CN=localhost")
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert {use._name for use in usage} == {"serverAuth", "clientAuth"}
    assert one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    now = datetime.now(UTC)
    assert timedelta(minutes=1) < now - one.not_valid_before_utc < timedelta(minutes=10)
    assert one.not_valid_after_utc - now > timedelta(days=365)
    one.verify_directly_issued_by(one)


def test_identities_differ() -> None:
    first, second = Identity.create(), Identity.create()
    assert first.certificate != second.certificate
    assert first.key_pem() != second.key_pem()


def test_repr_does_not_contain_the_key() -> None:
    identity = Identity.create()
    assert "key" not in repr(identity).lower()
    load_pem_private_key(identity.key_pem(b"password"), b"password")
    with pytest.raises(TypeError):
        load_pem_private_key(identity.key_pem(b"password"), None)


class Witness(ssl.SSLContext):
    """Records the arguments of load_cert_chain."""

    text: str
    mode: int

    def load_cert_chain(self, certfile: object, keyfile: object = None, password: object = None) -> None:
        assert isinstance(certfile, Path)
        self.text, self.mode = certfile.read_text(), stat.S_IMODE(certfile.stat().st_mode)
        assert password
        super().load_cert_chain(certfile, password=password)  # type: ignore[arg-type]


@pytest.mark.promise("G7")
def test_key_file_is_encrypted_private_and_removed(tmp_path: Path) -> None:
    """`ssl` reads a key from a file only; that file is encrypted, private and removed at once."""
    context = Witness(ssl.PROTOCOL_TLS_SERVER)
    load_identity(context, Identity.create(), tmp_path)
    assert "BEGIN CERTIFICATE" in context.text
    assert "BEGIN ENCRYPTED PRIVATE KEY" in context.text
    assert "BEGIN PRIVATE KEY" not in context.text
    assert sys.platform == "win32" or context.mode == 0o600
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory_for_the_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        load_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Identity.create(), tmp_path / "none")


@pytest.mark.promise("G7")
def test_pem_round_trip_keeps_the_certificate() -> None:
    first, second = Identity.create(), Identity.create()
    both = (first.certificate_pem + b"\n" + second.certificate_pem).decode()
    assert pem_to_ders(both) == {first.certificate, second.certificate}
    assert der_to_pem(first.certificate) == first.certificate_pem


@pytest.mark.promise("G7")
@pytest.mark.parametrize(
    "text", ["", "x", "-----BEGIN CERTIFICATE-----", "\udcff", Identity.create().key_pem().decode()]
)
def test_malformed_pem_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="PEM"):
        pem_to_ders(text)


def test_malformed_certificate_is_rejected() -> None:
    damaged = Identity.create().certificate_pem.decode().replace("MII", "AAA", 1)
    with pytest.raises(ValueError, match="pars"):
        pem_to_ders(damaged)
    with pytest.raises(ValueError, match="pars"):
        der_to_pem(b"x" * 100)
