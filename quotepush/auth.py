"""Tokens: who a client is, said by a JSON Web Token that somebody with our key has signed (RFC 7519, RFC 8725).

Law: a token either yields an :class:`Identity` or is refused as a whole, with ``auth_failed``. What is said about a
refused one never repeats any part of it or of the key.

Pure: keys are given and the clock is an argument. The algorithm is the key's and never the token's choice (RFC 8725
§3.1), and of a token's header nothing but ``alg`` and ``kid`` is looked at, which only choose among the keys that are
known. Claims are checked here and not by PyJWT, which reads the clock of the machine.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import orjson

from quotepush.entitlement import CLAIMS, UNLIMITED, BadClaim, Entitlement, entitlement_of
from quotepush.errors import PeerError
from quotepush.token_keys import ALGORITHMS, Key

__all__ = ["MAX_TOKEN_BYTES", "Identity", "UnknownKey", "Verifier"]

_CLOSE_CODE = 4401  # that of auth_failed in wire/messages.py

# Whatever is larger is refused unread: everybody may send us tokens.
MAX_TOKEN_BYTES = 8192

# Times above are no seconds (the end of the year 9999; milliseconds of today are seven times that).
_MAX_TIME_S = 253_402_300_799

# Claims about the token and not about its bearer. They have been checked, or nothing asks for them.
_OF_THE_TOKEN = frozenset(("sub", "exp", "nbf", "iat", "jti", "aud", *CLAIMS))

_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})


class UnknownKey(PeerError):
    """A token that names a key which is not known: it may be a new one."""

    def __init__(self, why: str) -> None:
        super().__init__("auth_failed", why, close_code=_CLOSE_CODE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token names, and what he may have.

    Attributes:
        user: the token's ``sub``; None: it names nobody.
        expires_ms: its ``exp`` in epoch milliseconds; None: never.
        claims: what else it says of its bearer; nothing that is about the token itself or about what he may have.
        entitlement: what he may have.
    """

    user: str | None
    expires_ms: int | None
    claims: Mapping[str, Any] = field(default_factory=lambda: _NO_CLAIMS)
    entitlement: Entitlement = UNLIMITED


class Verifier:
    """Checks tokens.

    Args:
        keys: with which they may be signed; :meth:`renew` replaces them.
        leeway_s: by how much the clocks of whoever signs tokens and ours may differ.
        audience: names that we have: each token is for one of them. Empty: we have none, and a token for somebody
            (``aud``) is refused.
        issuers: whose tokens are taken; empty: anybody's who has a key.
        delays: what ``delay_s`` may be, besides 0.
    """

    def __init__(
        self,
        keys: Iterable[Key],
        leeway_s: float = 5.0,
        *,
        audience: Collection[str] = (),
        issuers: Collection[str] = (),
        delays: Collection[int] = (),
    ) -> None:
        from jwt import PyJWS  # here: a server without tokens does without it

        self._leeway_ms = round(leeway_s * 1000)
        self._audience = frozenset(audience)
        self._issuers = frozenset(issuers)
        self._delays = frozenset(delays)
        self._signatures = PyJWS(algorithms=ALGORITHMS)
        self.renew(keys)

    def renew(self, keys: Iterable[Key]) -> None:
        """Take tokens of these keys from now on, and of no others."""
        self._keys = tuple(keys)
        known = {key.algorithm for key in self._keys}
        self._algorithms = [name for name in ALGORITHMS if name in known]

    def verify(self, token: str, now_ms: int) -> Identity:
        """Return who ``token`` names.

        Raises:
            PeerError: ``auth_failed``, with the close code; its message says why and repeats nothing of the token.
            UnknownKey: one of these: newer keys may help.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise _refusal(f"a token has at most {MAX_TOKEN_BYTES} bytes")
        claims = self._signed_claims(token)
        user, expires_ms, other = _user(claims), _time_ms(claims, "exp"), _other(claims)
        try:
            identity = Identity(user, expires_ms, other, entitlement_of(claims, self._delays))
        except BadClaim as e:
            raise _refusal(str(e)) from None
        if self.has_expired(identity, now_ms):
            raise _refusal("the token has expired")
        valid_from_ms = _time_ms(claims, "nbf")
        if valid_from_ms is not None and valid_from_ms > now_ms + self._leeway_ms:
            raise _refusal("the token is not valid yet (nbf)")
        self._check_audience(claims)
        if self._issuers and not _is_one_of(claims.get("iss"), self._issuers):
            raise _refusal("the token is of nobody whose tokens are taken here (iss)")
        return identity

    def has_expired(self, identity: Identity, now_ms: int) -> bool:
        """Return whether the token of ``identity`` would no longer be taken."""
        return identity.expires_ms is not None and identity.expires_ms <= now_ms - self._leeway_ms

    def _check_audience(self, claims: Mapping[str, Any]) -> None:
        """RFC 7519 §4.1.3: who does not find himself in ``aud`` must refuse the token."""
        if "aud" not in claims:
            if self._audience:
                raise _refusal("the token does not say for whom it is (aud)")
            return
        named = claims["aud"]
        if not any(_is_one_of(name, self._audience) for name in (named if type(named) is list else [named])):
            raise _refusal("the token is for somebody else (aud)")

    def _signed_claims(self, token: str) -> dict[str, Any]:
        if not token.isascii():  # base64url is; and what is no UTF-8 at all could not be encoded
            raise _refusal("this is not a JSON Web Token")
        try:
            claims = orjson.loads(self._signed_payload(token))
        except orjson.JSONDecodeError:
            claims = None
        if type(claims) is not dict:
            raise _refusal("the claims of the token are not a JSON object")
        return claims

    def _signed_payload(self, token: str) -> bytes:
        from jwt import InvalidSignatureError, InvalidTokenError

        try:
            header = self._signatures.get_unverified_header(token)
            algorithm, kid = header.get("alg"), header.get("kid", "")
            if type(algorithm) is not str or algorithm not in ALGORITHMS:
                raise _refusal(self._what_is_taken())
            fitting = [key for key in self._keys if key.algorithm == algorithm]
            named = [key for key in fitting if key.kid == kid] if kid else []
            # A key without a name can be anybody's; one with another name is not meant.
            tried = named or [key for key in fitting if not (kid and key.kid)]
            for key in tried:
                try:
                    payload: bytes = self._signatures.decode(token, key.material, algorithms=[key.algorithm])
                except InvalidSignatureError:
                    continue
                return payload
        except InvalidTokenError:
            raise _refusal("this is not a JSON Web Token") from None
        why = "the signature of the token is wrong" if tried else "the token is signed with a key that is not known"
        if not fitting:
            why = self._what_is_taken()
        raise UnknownKey(why) if kid and not named else _refusal(why)

    def _what_is_taken(self) -> str:
        if not self._algorithms:
            return "no key of tokens is known yet"
        return f"only tokens that are signed with {' or '.join(self._algorithms)} are taken"


def _refusal(why: str) -> PeerError:
    return PeerError("auth_failed", why, close_code=_CLOSE_CODE)


def _is_one_of(name: Any, names: Collection[str]) -> bool:
    return type(name) is str and name in names


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
