"""Signs tickets with the NVA's key, and reads them with the domain's authority.

The certificate travels with the ticket: an NVE believes it because the domain's authority issued it
to `nva`, whatever connection it came by. In the same way an owner signs what he states of his VMs,
and the NVA believes it because the owners' authority issued his certificate to `owner:NAME`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from overland.model.eligibility import Signed, Statement
from overland.model.ticket import Seal, Ticket

_HOW = ec.ECDSA(hashes.SHA256())
_OWNER = "owner:"


class Forged(Exception):
    """A seal that is not of whom it should be; the text says why."""


class Sealer:
    """Whoever signs. `certificate` and `key` are PEM files, an elliptic-curve pair.

    OSError when one cannot be read, ValueError when it is something else.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        self._certificate = loaded.public_bytes(serialization.Encoding.DER)
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key} is no elliptic-curve key")
        self._key = private

    def seal(self, ticket: Ticket) -> Seal:
        """What the NVA gives out."""
        encoded = msgspec.json.encode(ticket)
        return Seal(
            ticket=encoded, signature=self._signature(encoded), certificate=self._certificate
        )

    def sign(self, statement: Statement) -> Signed:
        """What an owner states."""
        encoded = msgspec.json.encode(statement)
        return Signed(
            statement=encoded, signature=self._signature(encoded), certificate=self._certificate
        )

    def _signature(self, content: bytes) -> bytes:
        return self._key.sign(content, _HOW)


def opened(seal: Seal | None, ca: Path) -> Ticket:
    """The ticket in `seal`. Forged when it is not from the NVA of the domain of `ca` (PEM)."""
    if seal is None:
        raise Forged("there is no ticket")
    by = _signer(seal.ticket, seal.signature, seal.certificate, ca)
    if by is None:
        raise Forged("the ticket is not signed by this domain")
    if by != "nva":
        raise Forged("the ticket is not signed by the NVA")
    try:
        return msgspec.json.decode(seal.ticket, type=Ticket)
    except msgspec.DecodeError as error:
        raise Forged(f"the ticket cannot be read: {error}") from None


def stated(signed: Signed, ca: Path) -> tuple[str, Statement]:
    """Who has stated what. Forged when he has no certificate as an owner from `ca` (PEM)."""
    by = _signer(signed.statement, signed.signature, signed.certificate, ca)
    if by is None:
        raise Forged("it is not signed with a certificate of the owners' authority")
    if not by.startswith(_OWNER):
        raise Forged(f"the certificate of {by!r} is not an owner's")
    try:
        return by.removeprefix(_OWNER), msgspec.json.decode(signed.statement, type=Statement)
    except msgspec.DecodeError as error:
        raise Forged(f"the statement cannot be read: {error}") from None


def _signer(content: bytes, signature: bytes, certificate: bytes, ca: Path) -> str | None:
    """The one common name in the certificate of whoever signed; None: nobody that `ca` knows.

    Forged when that certificate is not valid now.
    """
    try:
        loaded = x509.load_der_x509_certificate(certificate)
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.read_bytes()))
        public = loaded.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("another kind of key")
        public.verify(signature, content, _HOW)
    except (ValueError, TypeError, InvalidSignature):
        return None
    now = datetime.now(UTC)
    if not loaded.not_valid_before_utc <= now <= loaded.not_valid_after_utc:
        raise Forged("the certificate is not valid now")
    names = loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""
