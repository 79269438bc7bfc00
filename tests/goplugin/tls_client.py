"""A TLS client whose steps the tests call one by one, with certificates of any kind."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from engine_plugin.system.certificates import Identity, load_identity
from tests.patience import within

GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4  # the type of the first frame that a server of HTTP/2 sends


def host_identity(
    signer: Identity | None = None, curve: type[ec.EllipticCurve] = ec.SECP521R1, lasts: timedelta = timedelta(days=1)
) -> Identity:
    """What a go-plugin host has: a certificate on P-521. `signer` makes it another's, negative `lasts` an old one."""
    key = ec.generate_private_key(curve())
    signing_key = load_pem_private_key(signer.key_pem(), None) if signer else key
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another host" if signer else "localhost")])
    issuer = x509.load_der_x509_certificate(signer.certificate).subject if signer else subject
    now = datetime.now(UTC)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    certificate = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(signing_key, hashes.SHA512())
    )
    return Identity(certificate.public_bytes(Encoding.DER), key)


def client_context(identity: Identity | None, trusted: bytes, alpn: str = "h2") -> ssl.SSLContext:
    """The TLS settings of a host that has `identity` and takes the certificate `trusted` (DER) only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=trusted)
    if alpn:
        context.set_alpn_protocols([alpn])
    if identity is not None:
        with tempfile.TemporaryDirectory() as directory:
            load_identity(context, identity, Path(directory))
            assert list(Path(directory).iterdir()) == []
    return context


class TlsClient:
    """One connection. Every wait is bounded."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
        self._reader, self.writer = reader, writer
        self._received, self.to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._received, self.to_send, server_hostname="localhost")

    @classmethod
    async def connect(cls, address: str, context: ssl.SSLContext) -> Self:
        """Connect to `unix:/path` or `host:port`; no handshake yet."""
        if address.startswith("unix:"):
            return cls(*await within(asyncio.open_unix_connection(address.removeprefix("unix:"))), context)
        host, _, port = address.rpartition(":")
        return cls(*await within(asyncio.open_connection(host, int(port))), context)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def shake(self) -> None:
        """Do the handshake as far as the client's side of it goes."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._receive()
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        """Returns when the connection has taken it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.tls.write(rest[: 1 << 18]) :]
            await self._flush()

    async def read(self) -> bytes:
        """What comes next; nothing at the end. Raises ssl.SSLError when the end is no clean one."""
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                await self._receive()

    async def read_all(self) -> bytes:
        """All that comes, to the clean end."""
        data = bytearray()
        while part := await self.read():
            data += part
        return bytes(data)

    async def farewell(self) -> None:
        """End our half, and go on reading."""
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        await self._flush()

    async def greet(self) -> int:
        """Talk as an HTTP/2 client begins; the type of the first frame that comes back."""
        await self.shake()
        await self.send(GREETING)
        data = b""
        while len(data) < 9:
            part = await self.read()
            if not part:
                raise ConnectionError("the server has hung up")
            data += part
        return data[3]

    async def hung_up(self) -> bytes:
        """Wait for the end of the connection as such; what came before it, as it was."""
        return await within(self._reader.read())

    def cut(self) -> None:
        """Abort the connection."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close all resources."""
        self.writer.close()
        try:
            await within(self.writer.wait_closed())
        except OSError:  # the server was first
            pass

    async def _flush(self) -> None:
        self.writer.write(self.to_send.read())
        await within(self.writer.drain())

    async def _receive(self) -> None:
        data = await within(self._reader.read(1 << 18))
        if data:
            self._received.write(data)
        else:
            self._received.write_eof()
