"""Tokens made by hand, so that a test can also make those that no library would."""

import base64
import hashlib
import hmac
import json
from typing import Any

__all__ = ["KEY", "b64", "sign", "token"]

KEY = "a secret of the tests, thirty-two bytes and more"


def b64(raw: bytes) -> str:
    """Base64url without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def sign(header: bytes, payload: bytes, key: str = KEY, digest: str = "sha256") -> str:
    """The three parts of a token, whatever the first two are."""
    signed = f"{b64(header)}.{b64(payload)}"
    return f"{signed}.{b64(hmac.digest(key.encode(), signed.encode(), getattr(hashlib, digest)))}"


def token(key: str = KEY, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token with these claims; ``header`` adds to the usual one."""
    return sign(json.dumps({"alg": "HS256", "typ": "JWT", **(header or {})}).encode(), json.dumps(claims).encode(), key)
