"""The keys of a run: the server's self-signed certificate, and a pair for each site's SuperNode."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LOOPBACK = ("localhost", "127.0.0.1", "::1")
VALID = timedelta(days=3 * 365)
SKEW = timedelta(days=1)  # A site's clock may be behind ours


@dataclass(frozen=True)
class KeyPair:
    """An elliptic-curve key pair (P-384), as text."""

    private_ssh: str  # In OpenSSH's form, which is what Flower reads
    public_pem: str
    public_ssh: str  # The same public key, as ``flwr supernode register`` takes it


def new_certificate(host: str) -> tuple[str, str]:
    """Return a certificate for `host` and for this machine to itself, and its private key (PEM).

    It signs itself: whoever has it in an invitation trusts it and nothing else.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flwr-hpc server")])
    hosts = dict.fromkeys([host, *LOOPBACK])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA384())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return pem, _private(key, serialization.PrivateFormat.PKCS8)


def new_key_pair() -> KeyPair:
    """Make the keys by which a SuperNode shows which site it is."""
    key = ec.generate_private_key(ec.SECP384R1())
    public, pem, ssh = key.public_key(), serialization.Encoding.PEM, serialization.Encoding.OpenSSH
    formats = serialization.PublicFormat
    return KeyPair(
        _private(key, serialization.PrivateFormat.OpenSSH),
        public.public_bytes(pem, formats.SubjectPublicKeyInfo).decode(),
        public.public_bytes(ssh, formats.OpenSSH).decode(),
    )


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> str:
    encryption = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption).decode()


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
