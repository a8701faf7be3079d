"""Tokens made by hand, so that a test can also make those that no library would."""

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

__all__ = ["KEY", "KeyPair", "b64", "sign", "token"]

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


class KeyPair:
    """A private key and its public half, as PEM and as a JWKS."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.private: Any = {
            "RS256": lambda: generate_rsa_key(65537, 2048),
            "ES256": lambda: generate_private_key(SECP256R1()),
            "EdDSA": Ed25519PrivateKey.generate,
        }[algorithm]()
        self._public = self.private.public_key()

    @property
    def public_pem(self) -> str:
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    @property
    def private_pem(self) -> str:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def jwk(self, *, kid: str = "", private: bool = False, **more: Any) -> dict[str, Any]:
        to_jwk = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[self.algorithm].to_jwk
        jwk: dict[str, Any] = to_jwk(self.private if private else self._public, as_dict=True)
        jwk.pop("key_ops", None)
        return {**jwk, **({"kid": kid} if kid else {}), **more}

    def jwks(self, *, kid: str = "", **more: Any) -> str:
        return json.dumps({"keys": [self.jwk(kid=kid, **more)]})

    def token(self, *, kid: str = "", header: dict[str, Any] | None = None, **claims: Any) -> str:
        headers = {**({"kid": kid} if kid else {}), **(header or {})}
        return jwt.encode(claims, self.private, self.algorithm, headers=headers)
