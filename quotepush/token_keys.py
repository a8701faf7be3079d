"""Keys of tokens: what they are good for is said by the key, never by a token (RFC 8725 §3.1).

Law: each key has one algorithm. What everybody may know is never a secret, and a private key is none to check with:
both are refused where they are read. No fault repeats any part of a key.

Four kinds: a secret text (HS256), and public keys of RSA (RS256), EC P-256 (ES256) and Ed25519 (EdDSA), as PEM or in a
JSON Web Key Set (RFC 7517).
"""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

__all__ = ["ALGORITHMS", "MOST_KEYS", "BadKey", "Key", "keys_of", "parse_key_set", "parse_keys", "secret_key"]

ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")

# A token without a kid is tried with each key of its algorithm.
MOST_KEYS = 32
# As long as what HS256 makes of it (RFC 7518 §3.2); a shorter key can be guessed from a single token.
_MIN_SECRET_BYTES = 32
_MIN_RSA_BITS = 2048  # RFC 7518 §3.3
_MAX_RSA_BITS = 8192  # above, checking a forged token costs too much
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)


class BadKey(ValueError):
    """The text holds no key that tokens can be checked with; its argument says why, without any of it."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        algorithm: the only one it is for.
        material: the secret, or the public key; no ``repr`` shows it.
        kid: what tokens call it; empty: nothing.
    """

    algorithm: str
    material: Any = field(repr=False, compare=False)
    kid: str = ""


def secret_key(text: str, kid: str = "") -> Key:
    """Return the key that a secret text is.

    Raises:
        BadKey: it can be guessed, or it is something that others know.
    """
    try:
        secret = text.encode()
    except UnicodeEncodeError:
        raise BadKey("must be UTF-8") from None
    return _secret(secret, kid)


def parse_keys(text: str) -> list[Key]:
    """Return the keys in the text of a file: PEM, a JSON Web Key or a set of them, or else one secret.

    Raises:
        BadKey: there is none, or one that cannot be taken.
    """
    text = text.strip()
    if not text:
        raise BadKey("is empty")
    if "-----BEGIN " in text:
        return _bounded(_pem_keys(text))
    if text.startswith("{"):
        try:
            said = orjson.loads(text)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            said = None
        if type(said) is dict and ("keys" in said or "kty" in said):
            return parse_key_set(text)
    return [secret_key(text)]


def parse_key_set(text: str | bytes, *, is_public: bool = False) -> list[Key]:
    """Return the usable keys of a JSON Web Key Set; others in it are passed over (RFC 7517 §5).

    Args:
        is_public: it comes from a place that others can read, so what looks like a secret is none.

    Raises:
        BadKey: it is no such set, or has no usable key.
    """
    try:
        said = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        raise BadKey("is no JSON Web Key Set") from None
    entries = said.get("keys", [said]) if type(said) is dict else None
    if type(entries) is not list:
        raise BadKey("is no JSON Web Key Set")
    keys = [key for entry in entries if (key := _of_jwk(entry, is_public)) is not None]
    if not keys:
        kinds = "RSA, EC P-256 or Ed25519" if is_public else "RSA, EC P-256, Ed25519 or oct"
        raise BadKey(f"has no key that can check tokens ({kinds}; public ones, without their private halves)")
    return _bounded(keys)


def keys_of(sources: Iterable[tuple[str, bool]]) -> list[Key]:
    """Return the keys of some texts; True beside a text: others can read it, too, so there are no secrets in it.

    Raises:
        BadKey: one of them cannot be taken.
    """
    return [
        key
        for text, is_public in sources
        for key in (parse_key_set(text, is_public=True) if is_public else parse_keys(text))
    ]


def _bounded(keys: list[Key]) -> list[Key]:
    if len(keys) > MOST_KEYS:
        raise BadKey(f"has more than {MOST_KEYS} keys")
    return keys


def _secret(secret: bytes, kid: str) -> Key:
    from jwt import InvalidKeyError
    from jwt.algorithms import HMACAlgorithm

    if len(secret) < _MIN_SECRET_BYTES:
        raise BadKey(
            f"must have at least {_MIN_SECRET_BYTES} bytes, or it can be guessed; make one with: openssl rand -hex 32"
        )
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except InvalidKeyError:
        # Whoever knows the public half of such a key could sign tokens with it.
        raise BadKey("must be a secret text, not a public key, a certificate or a JWK") from None
    return Key("HS256", secret, kid)


def _pem_keys(text: str) -> list[Key]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = []
    for match in _PEM.finditer(text):
        if "PRIVATE" in match[1]:
            raise BadKey("is a private key, with which tokens are made; the server wants its public half")
        if "PUBLIC KEY" not in match[1]:
            raise BadKey("is no public key; make one of a certificate with: openssl x509 -pubkey -noout")
        try:
            public = load_pem_public_key(match[0].encode())
        except (ValueError, UnsupportedAlgorithm):
            raise BadKey("has a public key that cannot be read") from None
        key = _public(public, "")
        if key is None:
            raise BadKey(f"must be a public key of RSA ({_MIN_RSA_BITS} bits and more), EC P-256 or Ed25519")
        keys.append(key)
    if not keys:
        raise BadKey("has a PEM block that has no end")
    return keys


def _public(public: Any, kid: str) -> Key | None:
    """Return the key of a public key of ``cryptography``; None: it is of a kind that is not taken."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    if isinstance(public, RSAPublicKey) and _MIN_RSA_BITS <= public.key_size <= _MAX_RSA_BITS:
        return Key("RS256", public, kid)
    if isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1):
        return Key("ES256", public, kid)
    if isinstance(public, Ed25519PublicKey):
        return Key("EdDSA", public, kid)
    return None


def _of_jwk(jwk: Any, is_public: bool) -> Key | None:
    """Return the key of one entry of a set; None: it is none for us."""
    from jwt import InvalidKeyError
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    if type(jwk) is not dict:
        return None
    kid, operations = jwk.get("kid", ""), jwk.get("key_ops", ["verify"])
    if type(kid) is not str or jwk.get("use", "sig") != "sig":
        return None
    if type(operations) is not list or "verify" not in operations:
        return None
    kty = jwk.get("kty")
    try:
        if kty == "oct":
            key = None if is_public or type(jwk.get("k")) is not str else _secret(_unbase64url(jwk["k"]), kid)
        elif "d" in jwk:
            return None
        elif kty == "RSA":
            key = _public(RSAAlgorithm.from_jwk(jwk), kid)
        elif kty == "EC":
            key = _public(ECAlgorithm.from_jwk(jwk), kid)
        elif kty == "OKP":
            key = _public(OKPAlgorithm.from_jwk(jwk), kid)
        else:
            return None
    except (InvalidKeyError, ValueError, TypeError, KeyError, AttributeError):  # whatever a broken entry brings about
        return None
    return key if key is not None and jwk.get("alg", key.algorithm) == key.algorithm else None


def _unbase64url(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise BadKey("is no base64url") from None
