"""How two launchers prove to each other that they know the secret of their job.

    client: join       its protocol and a nonce
    server: challenge  a nonce
    client: proof      HMAC of the secret over "client" and both nonces
    server: welcome    HMAC of the secret over "server" and both nonces
    client: hello      who it is, with config and workdir

Neither side sends the secret, nor anything about the job before the other's proof. Both nonces make
a recorded handshake worthless; the names of the sides do so for a reflected one.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from launcher.rendezvous.protocol import PROTOCOL

Side = Literal["client", "server"]
_NONCE = re.compile("[0-9a-f]{64}")


def new_nonce() -> str:
    """32 random bytes, in hex."""
    return secrets.token_hex(32)


@dataclass(frozen=True)
class Handshake:
    """The nonces of one connection, and what each side proves with them.

    Attributes:
        secret: of the job.
        client: the client's nonce.
        server: the server's nonce.

    Raises:
        ValueError: a nonce is malformed.
    """

    secret: bytes
    client: str
    server: str

    def __post_init__(self) -> None:
        for nonce in (self.client, self.server):
            if not (isinstance(nonce, str) and _NONCE.fullmatch(nonce)):
                raise ValueError("not a nonce")

    def proof(self, side: Side) -> str:
        """What a side sends, in hex."""
        text = f"podlift rendezvous {PROTOCOL} {side} {self.client} {self.server}"
        return hmac.digest(self.secret, text.encode(), "sha256").hex()

    def proves(self, side: Side, proof: Any) -> bool:
        """Whether a side has sent the right proof."""
        given = str(proof).encode(errors="replace")
        return hmac.compare_digest(given, self.proof(side).encode())
