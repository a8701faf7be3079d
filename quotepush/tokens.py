"""``quotepush token``: tokens and their keys by hand, and what a server would say to a token.

Law: nothing is signed that a server would refuse for what it entitles to; no key is repeated, and no token but the one
that was asked for.
"""

import asyncio
import base64
import binascii
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from quotepush.auth import MAX_TOKEN_BYTES, Identity, Verifier
from quotepush.entitlement import BadClaim, entitlement_of
from quotepush.errors import PeerError, SettingsError
from quotepush.settings import Settings
from quotepush.token_keys import BadKey, Key, keys_of, secret_key

__all__ = ["check", "claims_of", "keygen", "make", "read_token", "seconds_of"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_RSA_BITS = 2048


def seconds_of(text: str) -> int | None:
    """Return a time such as ``90``, ``30m``, ``1h`` or ``7d`` in seconds; None for ``never``.

    Raises:
        SettingsError: it is none.
    """
    if text == "never":
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if match is None or not int(match[1]):
        raise SettingsError([f"--ttl: {text!r} must be like 90s, 30m, 1h, 7d or never"])
    return int(match[1]) * _UNITS[match[2]]


def claims_of(given: Mapping[str, Any], others: Sequence[str], ttl: str, settings: Settings) -> dict[str, Any]:
    """Return the claims that the command line names.

    Args:
        given: by name; None: not given.
        others: ``NAME=JSON`` each; what is no JSON is a text.
        ttl: how long the token lasts.

    Raises:
        SettingsError: a server with ``settings`` would not take one of them.
    """
    claims = {name: value for name, value in given.items() if value is not None}
    for name in ("codes", "groups"):
        if name in claims:
            claims[name] = [word.strip() for word in claims[name].split(",") if word.strip()]
    for other in others:
        name, equals, text = other.partition("=")
        if not equals or not name:
            raise SettingsError([f"--claim: {other!r} is not NAME=VALUE"])
        try:
            claims[name] = orjson.loads(text)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            claims[name] = text
    lasts_s = seconds_of(ttl)
    if lasts_s is not None and "exp" not in claims:
        claims["exp"] = int(time.time()) + lasts_s
    try:
        entitlement_of(claims, settings.delays)
    except BadClaim as e:
        raise SettingsError([f"token make: {e}"]) from None
    return claims


def make(claims: Mapping[str, Any], key_file: str | None, kid: str | None, settings: Settings) -> str:
    """Return a token with these claims.

    Args:
        key_file: a secret (HS256) or a private key as PEM; None: the first secret of ``settings``.

    Raises:
        SettingsError: there is no such key.
    """
    from jwt import PyJWT

    key = _signing_key(key_file, settings)
    token: str = PyJWT().encode(dict(claims), key.material, key.algorithm, headers={"kid": kid} if kid else None)
    if len(token) > MAX_TOKEN_BYTES:
        raise SettingsError([f"token make: a token has at most {MAX_TOKEN_BYTES} bytes, and this one {len(token)}"])
    return token


def _signing_key(key_file: str | None, settings: Settings) -> Key:
    if key_file is None:
        for text in (settings.token_key, *map(_read, settings.token_key_file)):
            try:
                return secret_key(text.strip())
            except BadKey:
                continue
        raise SettingsError(["token make: name the key to sign with: --key-file, or token_key of a configuration"])
    text = _read(key_file).strip()
    if "PRIVATE KEY-----" in text:
        return _private_key(text, key_file)
    try:
        return secret_key(text)
    except BadKey as e:
        raise SettingsError([f"--key-file: {key_file} {e}"]) from None


def _private_key(text: str, path: str) -> Key:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        private: Any = load_pem_private_key(text.encode(), password=None)
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (key,) = keys_of([(public.decode(), False)])
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        raise SettingsError(
            [f"--key-file: {path} must be a private key of RSA, EC P-256 or Ed25519, without a password"]
        ) from None
    return Key(key.algorithm, private)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError([f"{path} cannot be read: {e}"]) from None


def check(token: str, settings: Settings) -> tuple[bool, dict[str, Any]]:
    """Return whether a server with ``settings`` would take ``token`` now, and what there is to say of it.

    Raises:
        SettingsError: such a server takes no tokens, or its keys cannot be fetched.
    """
    if not settings.has_tokens:
        raise SettingsError(["token check: this configuration has no key; name it with --config or --token-key-file"])
    sources = [(settings.token_key, False)] if settings.token_key else []
    sources += [(_read(path), False) for path in settings.token_key_file]
    if settings.token_jwks_url:
        sources.append((_fetched(settings.token_jwks_url), True))
    verifier = Verifier(
        keys_of(sources),
        settings.token_leeway_s,
        audience=settings.token_audience,
        issuers=settings.token_issuer,
        delays=settings.delays,
    )
    try:
        identity = verifier.verify(token, time.time_ns() // 1_000_000)
    except PeerError as e:
        return False, {"taken": False, "error": e.error, "message": e.message, "claims_unverified": _unverified(token)}
    return True, {"taken": True, **_shown(identity)}


def _fetched(url: str) -> str:
    from quotepush.node.keyring import CannotFetch, fetch_key_set

    try:
        return asyncio.run(fetch_key_set(url))
    except CannotFetch as e:
        raise SettingsError([f"token_jwks_url cannot be fetched: {e}"]) from None


def _shown(identity: Identity) -> dict[str, Any]:
    entitlement = identity.entitlement
    may_send = entitlement.may_send
    return {
        "user": identity.user,
        "expires_ms": identity.expires_ms,
        "codes": list(entitlement.codes.patterns),
        "delay_s": entitlement.delay_s,
        "max_rate": entitlement.max_rate,
        "max_codes": entitlement.max_codes,
        "max_conns": entitlement.max_conns,
        "conns_win": entitlement.conns_win,
        "groups": list(entitlement.groups),
        "may_send": {"users": _names(may_send.users), "groups": _names(may_send.groups), "all": may_send.all},
        "claims": dict(identity.claims),
    }


def _names(names: bool | frozenset[str]) -> bool | list[str]:
    return names if isinstance(names, bool) else sorted(names)


def _unverified(token: str) -> Any:
    """Return the claims of a token of which nobody knows whether they are true; None: they cannot be read."""
    if len(token) > MAX_TOKEN_BYTES or token.count(".") != 2:
        return None
    payload = token.split(".")[1]
    try:
        return orjson.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (binascii.Error, ValueError):  # orjson's fault is one of these, and so is text that is not ASCII
        return None


def keygen(algorithm: str, path: str) -> list[str]:
    """Write a new key to ``path``, and to ``path.pub`` what the server wants of it; return the files, the secret first.

    HS256 has one file, a secret for both. No file is overwritten, and the secret is readable by its owner only.

    Raises:
        SettingsError: a file is there already, or cannot be written.
    """
    if algorithm == "HS256":
        return [_write(path, secrets.token_hex(32) + "\n", 0o600)]
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private: Any
    if algorithm == "RS256":
        private = rsa.generate_private_key(65537, _RSA_BITS)
    elif algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = ed25519.Ed25519PrivateKey.generate()
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return [_write(path, secret, 0o600), _write(f"{path}.pub", public, 0o644)]


def _write(path: str, text: str, mode: int) -> str:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise SettingsError([f"{path} is there already; name another file with --out"]) from None
    except OSError as e:
        raise SettingsError([f"{path} cannot be written: {e.strerror}"]) from None
    with open(descriptor, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def read_token(text: str | None) -> str:
    """Return the token that a command was given; from standard input for ``-`` and where there is none."""
    return (sys.stdin.read() if text in (None, "-") else text or "").strip()
