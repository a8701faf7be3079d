"""Certificates for a Redis that speaks TLS, of an authority of the test's own."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.ports import own_port

__all__ = ["Certificates"]


class Certificates:
    """PEM files: ``ca.pem``, and ``server`` and ``client``, each with ``.pem`` and ``.key``.

    Args:
        directory: where they are put.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = generate_private_key(SECP256R1())
        self._name = _name("the tests' authority")
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(self._signed(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0)))
        for name in ("server", "client"):
            key = generate_private_key(SECP256R1())
            names = x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            )
            self.file(f"{name}.pem").write_bytes(self._signed(_name(name), key, names))
            self.file(f"{name}.key").write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
            )

    def file(self, name: str) -> Path:
        """Where one of them is."""
        return self._directory / name

    def server_options(self, *among_themselves: str) -> tuple[int, tuple[str, ...]]:
        """A port for TLS, and what a Redis needs to speak it there; clients must show a certificate.

        Args:
            among_themselves: ``--tls-replication`` or ``--tls-cluster``: servers speak TLS with each other, too.
        """
        port = own_port()
        return port, (
            "--tls-port", str(port), "--tls-cert-file", str(self.file("server.pem")),
            "--tls-key-file", str(self.file("server.key")), "--tls-ca-cert-file", str(self.ca),
            *(word for option in among_themselves for word in (option, "yes")),
        )  # fmt: skip

    @property
    def client_options(self) -> str:
        """What stands behind the ``?`` of an address."""
        return f"ssl_ca_certs={self.ca}&ssl_certfile={self.file('client.pem')}&ssl_keyfile={self.file('client.key')}"

    def _signed(self, name: x509.Name, key: EllipticCurvePrivateKey, extension: Any) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        )
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
