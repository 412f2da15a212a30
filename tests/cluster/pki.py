"""Keys and certificates of a cluster, made anew for each: one authority, and what it signs."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


class Authority:
    """Signs into one folder. What is there already is used again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self.own = Pair(folder / "ca.crt", folder / "ca.key")
        if not self.own.certificate.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = _name("ekiben-test-cluster", ())
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = _builder(name, name, key.public_key(), True).add_extension(usage, True)
            self.own.key.write_bytes(_private(key))
            self.own.certificate.write_bytes(_public(builder.sign(key, hashes.SHA256())))
        self._key = serialization.load_pem_private_key(self.own.key.read_bytes(), None)
        self._certificate = x509.load_pem_x509_certificate(self.own.certificate.read_bytes())

    def sign(self, file: str, common: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> Pair:
        """A certificate for a client named `common` and, where `hosts` are given, for a server of these names."""
        pair = Pair(self.folder / f"{file}.crt", self.folder / f"{file}.key")
        if pair.certificate.exists():
            return pair
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        builder = _builder(_name(common, groups), self._certificate.subject, key.public_key(), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(each) for each in hosts]), False)
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        pair.key.write_bytes(_private(key))
        pair.certificate.write_bytes(_public(builder.sign(self._key, hashes.SHA256())))
        return pair

    def service_accounts(self) -> Pair:
        """The pair that service account tokens are signed and checked with: a public key, no certificate."""
        pair = Pair(self.folder / "service-accounts.pub", self.folder / "service-accounts.key")
        if not pair.certificate.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            pair.key.write_bytes(_private(key))
            encoding, kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            pair.certificate.write_bytes(key.public_key().public_bytes(encoding, kind))
        return pair

    def kubeconfig(self, file: Path, server: str, client: Pair) -> Path:
        """A kubeconfig that holds all it needs, so that it may be copied anywhere."""
        trusted = {"server": server, "certificate-authority-data": _data(self.own.certificate)}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "ekiben",
            "clusters": [{"name": "ekiben", "cluster": trusted}],
            "users": [
                {
                    "name": "ekiben",
                    "user": {
                        "client-certificate-data": _data(client.certificate),
                        "client-key-data": _data(client.key),
                    },
                }
            ],
            "contexts": [{"name": "ekiben", "context": {"cluster": "ekiben", "user": "ekiben"}}],
        }
        file.touch(mode=0o600)
        file.write_text(json.dumps(value, indent=1))
        return file


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _LIFE)
        .add_extension(x509.BasicConstraints(authority, None), True)
    )


def _name(common: str, groups: Sequence[str]) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in groups]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _data(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
