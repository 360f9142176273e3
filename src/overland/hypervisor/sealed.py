"""A file on its way between two hosts: nobody reads it, changes it or cuts it short unseen.

Whoever takes it invites with a fresh public key and a secret. Whoever gives it makes a key of its
own, seals that and the length for the invitation (HPKE, RFC 9180; the secret is its `info`), and
then each piece with that key (AES-128-GCM, RFC 5116, the nonce is the number of the piece). So the
pieces of one connection are of no use in another, and neither is half a file.
Why not TLS: its records of 16 KiB cost Python more than all the rest (ADR 0031).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

PIECE_BYTES = 1 << 20
TAG_BYTES = 16
_KEY_BYTES, _LENGTH_BYTES, _SECRET_BYTES, _NONCE_BYTES, _ENCAPSULATED_BYTES = 16, 8, 16, 12, 32
HEAD_BYTES = _ENCAPSULATED_BYTES + _KEY_BYTES + _LENGTH_BYTES + TAG_BYTES
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


class Invitation:
    """What a taker has made for one file; `text` is what the giver has to know, and nobody else."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self.text = f"{self._private.public_key().public_bytes_raw().hex()}{self._secret.hex()}"

    def accept(self, head: bytes) -> tuple[Pieces, int]:
        """The pieces to come and their bytes in all; ValueError when `head` is not the giver's."""
        try:
            said = _SUITE.decrypt(head, self._private, info=self._secret)
        except (InvalidTag, ValueError):
            raise ValueError("not the giver") from None
        return Pieces(said[:_KEY_BYTES]), int.from_bytes(said[_KEY_BYTES:], "big")


class Pieces:
    """Seals or opens the pieces of one file, in order."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._number = 0

    @classmethod
    def answering(cls, invitation: str, length: int) -> tuple[Self, bytes]:
        """Begin to give `length` bytes to who wrote `invitation`; the pieces, and the head."""
        words = bytes.fromhex(invitation)
        public = X25519PublicKey.from_public_bytes(words[:-_SECRET_BYTES])
        key = AESGCM.generate_key(8 * _KEY_BYTES)
        head = key + length.to_bytes(_LENGTH_BYTES, "big")
        return cls(key), _SUITE.encrypt(head, public, info=words[-_SECRET_BYTES:])

    def seal(self, piece: bytes) -> bytes:
        """The next piece as it travels, `TAG_BYTES` longer."""
        return self._cipher.encrypt(self._nonce(), piece, None)

    def open(self, sealed: bytes) -> bytes:
        """The next piece; ValueError when it is not the one that was sealed."""
        try:
            return self._cipher.decrypt(self._nonce(), sealed, None)
        except (InvalidTag, ValueError):
            raise ValueError("damaged or cut") from None

    def _nonce(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(_NONCE_BYTES, "big")


def sizes(length: int) -> Iterator[int]:
    """How many bytes each piece of a file of `length` bytes has."""
    while length:
        size = min(length, PIECE_BYTES)
        yield size
        length -= size
