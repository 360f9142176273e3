"""Signs tickets with the NVA's key, and reads them with the domain's authority.

The certificate travels with the ticket: an NVE believes it because the domain's authority issued it
to `nva`, whatever connection it came by.
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

from overland.model.ticket import Seal, Ticket

_HOW = ec.ECDSA(hashes.SHA256())


class Forged(Exception):
    """A seal that the NVA of this domain did not make; the text says why."""


class Sealer:
    """The NVA's end. `certificate` and `key` are PEM files, an elliptic-curve pair."""

    def __init__(self, certificate: Path, key: Path) -> None:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        self._certificate = loaded.public_bytes(serialization.Encoding.DER)
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._key = private

    def seal(self, ticket: Ticket) -> Seal:
        encoded = msgspec.json.encode(ticket)
        return Seal(
            ticket=encoded,
            signature=self._key.sign(encoded, _HOW),
            certificate=self._certificate,
        )


def opened(seal: Seal | None, ca: Path) -> Ticket:
    """The ticket in `seal`. Forged when it is not from the NVA of the domain of `ca` (PEM)."""
    if seal is None:
        raise Forged("there is no ticket")
    try:
        certificate = x509.load_der_x509_certificate(seal.certificate)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.read_bytes()))
        public = certificate.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("another kind of key")
        public.verify(seal.signature, seal.ticket, _HOW)
    except (ValueError, TypeError, InvalidSignature):
        raise Forged("the ticket is not signed by this domain") from None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [name.value for name in names] != ["nva"]:
        raise Forged("the ticket is not signed by the NVA")
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise Forged("the NVA's certificate is not valid now")
    try:
        return msgspec.json.decode(seal.ticket, type=Ticket)
    except msgspec.DecodeError as error:
        raise Forged(f"the ticket cannot be read: {error}") from None
