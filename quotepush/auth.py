"""Tokens: who a client is, said by a JSON Web Token that somebody with our key has signed (RFC 7519, RFC 8725).

Law: a token either yields an :class:`Identity` or is refused as a whole, with ``auth_failed``. What is said about a
refused one never repeats any part of it or of the key.

Pure: keys are given and the clock is an argument. The algorithm is the key's and never the token's choice (RFC 8725
§3.1); only HS256 is taken. Claims are checked here and not by PyJWT, which reads the clock of the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import orjson

from quotepush.errors import PeerError

__all__ = ["MAX_TOKEN_BYTES", "Identity", "Verifier", "key_fault"]

_CLOSE_CODE = 4401  # that of auth_failed in wire/messages.py

# Whatever is larger is refused unread: everybody may send us tokens.
MAX_TOKEN_BYTES = 8192

# As long as what HS256 makes of it (RFC 7518 §3.2); a shorter key can be guessed from a single token.
_MIN_KEY_BYTES = 32

# Times above are no seconds (the end of the year 9999; milliseconds of today are seven times that).
_MAX_TIME_S = 253_402_300_799

# Claims about the token and not about its bearer. They have been checked, or nothing asks for them.
_OF_THE_TOKEN = ("sub", "exp", "nbf", "iat", "jti")

_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token names.

    Attributes:
        user: the token's ``sub``; None: it names nobody.
        expires_ms: its ``exp`` in epoch milliseconds; None: never.
        claims: what else it says; not ``sub``, and nothing that is about the token itself.
    """

    user: str | None
    expires_ms: int | None
    claims: Mapping[str, Any] = field(default_factory=lambda: _NO_CLAIMS)


class Verifier:
    """Checks tokens.

    Args:
        key: the secret for HS256, one in which :func:`key_fault` finds none.
        leeway_s: by how much the clocks of whoever signs tokens and ours may differ.
    """

    def __init__(self, key: str, leeway_s: float = 5.0) -> None:
        from jwt import PyJWS  # here: a server without tokens does without it (0.8 MiB a process)

        assert not key_fault(key), "settings let no such key pass"
        self._key = key.encode()
        self._leeway_ms = round(leeway_s * 1000)
        self._signatures = PyJWS(algorithms=["HS256"])

    def verify(self, token: str, now_ms: int) -> Identity:
        """Return who ``token`` names.

        Raises:
            PeerError: ``auth_failed``, with the close code; its message says why and repeats nothing of the token.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise _refusal(f"a token has at most {MAX_TOKEN_BYTES} bytes")
        claims = self._signed_claims(token)
        expires_ms = _time_ms(claims, "exp")
        identity = Identity(_user(claims), expires_ms, _other(claims))
        if self.has_expired(identity, now_ms):
            raise _refusal("the token has expired")
        valid_from_ms = _time_ms(claims, "nbf")
        if valid_from_ms is not None and valid_from_ms > now_ms + self._leeway_ms:
            raise _refusal("the token is not valid yet (nbf)")
        if claims.get("aud") is not None:  # RFC 7519 §4.1.3: who does not find himself in it must refuse the token
            raise _refusal("the token is for somebody else (aud)")
        return identity

    def has_expired(self, identity: Identity, now_ms: int) -> bool:
        """Return whether the token of ``identity`` would no longer be taken."""
        return identity.expires_ms is not None and identity.expires_ms <= now_ms - self._leeway_ms

    def _signed_claims(self, token: str) -> dict[str, Any]:
        from jwt import InvalidAlgorithmError, InvalidSignatureError, InvalidTokenError

        if not token.isascii():  # base64url is; and what is no UTF-8 at all could not be encoded
            raise _refusal("this is not a JSON Web Token")
        try:
            payload: bytes = self._signatures.decode(token, self._key, algorithms=["HS256"])
        except InvalidAlgorithmError:
            raise _refusal("only tokens that are signed with HS256 are taken") from None
        except InvalidSignatureError:
            raise _refusal("the signature of the token is wrong") from None
        except InvalidTokenError:
            raise _refusal("this is not a JSON Web Token") from None
        try:
            claims = orjson.loads(payload)
        except orjson.JSONDecodeError:
            claims = None
        if type(claims) is not dict:
            raise _refusal("the claims of the token are not a JSON object")
        return claims


def key_fault(key: str) -> str:
    """Return why ``key`` is none for HS256, nothing when it is one; the key is not repeated."""
    from jwt import InvalidKeyError
    from jwt.algorithms import HMACAlgorithm

    try:
        secret = key.encode()
    except UnicodeEncodeError:
        return "must be UTF-8"
    if len(secret) < _MIN_KEY_BYTES:
        return f"must have at least {_MIN_KEY_BYTES} bytes, or it can be guessed; make one with: openssl rand -hex 32"
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except InvalidKeyError:
        # Whoever knows the public half of such a key could sign tokens with it.
        return "must be a secret text, not a public key, a certificate or a JWK"
    return ""


def _refusal(why: str) -> PeerError:
    return PeerError("auth_failed", why, close_code=_CLOSE_CODE)


def _user(claims: Mapping[str, Any]) -> str | None:
    if "sub" not in claims:
        return None
    user = claims["sub"]
    if type(user) is not str or not user:
        raise _refusal("sub must be a text that is not empty")
    return user


def _time_ms(claims: Mapping[str, Any], name: str) -> int | None:
    """Return a NumericDate (RFC 7519 §2: seconds, fractions allowed) in milliseconds; None: it is not there."""
    if name not in claims:
        return None
    at_s = claims[name]
    if type(at_s) not in (int, float) or not 0 <= at_s <= _MAX_TIME_S:
        raise _refusal(f"{name} must be a time in seconds since 1970")
    return int(at_s * 1000)


def _other(claims: dict[str, Any]) -> Mapping[str, Any]:
    other = {name: value for name, value in claims.items() if name not in _OF_THE_TOKEN}
    return MappingProxyType(other) if other else _NO_CLAIMS
