"""Keys of tokens: which texts are keys, for which algorithm, and that none of them is repeated."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.token_keys import MOST_KEYS, BadKey, keys_of, parse_key_set, parse_keys, secret_key
from tests.support.tokens import KEY, KeyPair, b64

RSA, EC, ED = KeyPair("RS256"), KeyPair("ES256"), KeyPair("EdDSA")
PAIRS = (RSA, EC, ED)
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.algorithm)


def fault(text: str, *, is_public: bool = False) -> str:
    with pytest.raises(BadKey) as found:
        if is_public:
            parse_key_set(text, is_public=True)
        else:
            parse_keys(text)
    assert len(text) < 8 or text.strip() not in str(found.value)
    return str(found.value)


def pem_of(public: Any) -> str:
    pem: bytes = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


# Secrets


@pytest.mark.parametrize(
    "text", ["x" * 32, KEY, "é" * 16, "x" * 10_000, json.dumps({"not": "a key", "of": "any kind"})]
)
def test_a_text_of_32_bytes_is_a_secret(text: str) -> None:
    (key,) = parse_keys(f"\n {text}\n")
    assert (key.algorithm, key.material, key.kid) == ("HS256", text.encode(), "")
    assert text not in repr(key)


@pytest.mark.parametrize("text", ["x", "x" * 31, "é" * 15])
def test_a_shorter_secret_can_be_guessed(text: str) -> None:
    assert "32 bytes" in fault(text)


@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_is_no_key(text: str) -> None:
    assert "empty" in fault(text)


@pytest.mark.parametrize(
    "text",
    [RSA.public_pem, "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC7", json.dumps({"kty": "oct", "k": b64(b"x" * 32)})],
    ids=["PEM", "SSH", "JWK"],
)
def test_what_others_know_or_what_only_describes_a_key_is_no_secret(text: str) -> None:
    with pytest.raises(BadKey, match="secret") as found:
        secret_key(text)
    assert text not in str(found.value)


def test_a_secret_that_is_no_text_is_a_fault() -> None:
    with pytest.raises(BadKey, match="UTF-8"):
        secret_key("\udcff" * 40)


# PEM


@pairs
def test_a_public_key_is_for_the_one_algorithm_of_its_kind(pair: KeyPair) -> None:
    for text in (pair.public_pem, f"# of the backend\r\n{pair.public_pem}\r\n"):
        assert [key.algorithm for key in parse_keys(text)] == [pair.algorithm]


def test_a_file_may_have_several_keys() -> None:
    found = parse_keys("".join(pair.public_pem for pair in PAIRS))
    assert [key.algorithm for key in found] == ["RS256", "ES256", "EdDSA"]


@pairs
def test_a_private_key_is_not_for_a_server(pair: KeyPair) -> None:
    assert "private key" in fault(pair.private_pem)
    assert "private key" in fault(pair.public_pem + pair.private_pem)


def test_keys_of_other_kinds_are_not_taken() -> None:
    for public in (
        rsa.generate_private_key(65537, 1024).public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
        ec.generate_private_key(ec.SECP256K1()).public_key(),
        ed448.Ed448PrivateKey.generate().public_key(),
        dsa.generate_private_key(1024).public_key(),
    ):
        assert "must be a public key" in fault(pem_of(public))


def test_broken_pem_is_a_fault() -> None:
    lines = RSA.public_pem.splitlines()
    assert "cannot be read" in fault("\n".join([lines[0], *lines[2:]]))
    assert "no end" in fault("\n".join(lines[:-1]))
    assert "x509" in fault("-----BEGIN CERTIFICATE-----\nMFkw\n-----END CERTIFICATE-----\n")


def test_keys_that_openssl_has_made_are_taken(tmp_path: Path) -> None:
    for algorithm, options in (
        ("RS256", ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ("ES256", ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("EdDSA", ["ED25519"]),
    ):
        private = tmp_path / algorithm
        subprocess.run(["openssl", "genpkey", "-quiet", "-algorithm", *options, "-out", private], check=True)
        public = subprocess.run(
            ["openssl", "pkey", "-in", private, "-pubout"], check=True, capture_output=True, text=True
        )
        assert [key.algorithm for key in parse_keys(public.stdout)] == [algorithm]


# Key sets


def test_a_set_has_keys_with_names() -> None:
    text = json.dumps({"keys": [RSA.jwk(kid="r"), EC.jwk(kid="e", use="sig"), ED.jwk(alg="EdDSA", key_ops=["verify"])]})
    for found in (parse_keys(text), parse_key_set(text, is_public=True)):
        assert [(key.algorithm, key.kid) for key in found] == [("RS256", "r"), ("ES256", "e"), ("EdDSA", "")]


@pairs
def test_one_key_alone_is_a_set_of_one(pair: KeyPair) -> None:
    (key,) = parse_keys(json.dumps(pair.jwk(kid="a")))
    assert (key.algorithm, key.kid) == (pair.algorithm, "a")


def test_a_secret_in_a_set_is_one_only_where_nobody_else_reads_it() -> None:
    text = json.dumps({"keys": [{"kty": "oct", "k": b64(KEY.encode()), "kid": "s"}]})
    (key,) = parse_keys(text)
    assert (key.algorithm, key.material, key.kid) == ("HS256", KEY.encode(), "s")
    assert "no key" in fault(text, is_public=True)
    for k in (b64(b"x" * 31), "!", 7, None, "é", b64(RSA.public_pem.encode())):
        assert "no key" in fault(json.dumps({"keys": [{"kty": "oct", "k": k}]}))


UNUSABLE: list[Any] = [
    None, 7, "x", [], {}, {"kty": "x"}, {"kty": "RSA"}, {"kty": "EC", "crv": "P-256"}, {"kty": ["RSA"]},
    {"kty": "RSA", "n": "AQAB", "e": "AQAB"}, {"kty": "RSA", "n": 7, "e": []},
    {"kty": "OKP", "crv": "X25519", "x": "AA"},
    {"kty": "EC", "crv": "P-256", "x": b64(b"\1" * 32), "y": b64(b"\1" * 32)},  # no point of the curve
    EC.jwk(use="enc"), EC.jwk(alg="ES384"), EC.jwk(alg="HS256"), RSA.jwk(alg="RS512"), RSA.jwk(alg="PS256"),
    EC.jwk(alg=None), EC.jwk(key_ops=["sign"]), EC.jwk(key_ops="verify"), EC.jwk() | {"kid": 7},
    RSA.jwk(private=True), EC.jwk(private=True), ED.jwk(private=True),
]  # fmt: skip


@pytest.mark.parametrize("entry", UNUSABLE, ids=map(str, range(len(UNUSABLE))))
def test_what_is_of_no_use_in_a_set_is_passed_over(entry: Any) -> None:
    assert "no key" in fault(json.dumps({"keys": [entry]}))
    assert len(parse_keys(json.dumps({"keys": [entry, EC.jwk(kid="good"), entry]}))) == 1


@pytest.mark.parametrize(
    "text", ["[]", "7", "{", '{"keys":{}}', '{"keys":"x"}', '{"keys":[]}', "{}", "[" * 5000, "\ud800"]
)
def test_what_is_no_set_is_a_fault(text: str) -> None:
    assert fault(text, is_public=True)


def test_a_set_is_bounded() -> None:
    entries = [ED.jwk(kid=str(n)) for n in range(MOST_KEYS + 1)]
    assert len(parse_keys(json.dumps({"keys": entries[1:]}))) == MOST_KEYS
    assert "more than" in fault(json.dumps({"keys": entries}))


def test_sources_are_read_as_what_they_are() -> None:
    found = keys_of([(KEY, False), (EC.public_pem, False), (RSA.jwks(kid="r"), True)])
    assert [(key.algorithm, key.kid) for key in found] == [("HS256", ""), ("ES256", ""), ("RS256", "r")]
    with pytest.raises(BadKey):
        keys_of([(KEY, True)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=40).map(b64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(["kty", "crv", "x", "y", "n", "e", "k", "kid", "alg", "use"]),
        json_values | st.sampled_from(["RSA", "EC", "OKP", "oct", "P-256", "Ed25519", "AQAB"]),
    )
)
def test_whatever_stands_in_a_set_is_a_key_or_passed_over(entry: dict[str, Any]) -> None:
    found = parse_key_set(json.dumps({"keys": [entry, EC.jwk(kid="good")]}))
    assert 1 <= len(found) <= 2


def as_pem(raw: bytes) -> str:
    return f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(raw).decode()}\n-----END PUBLIC KEY-----"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text() | st.binary(max_size=200).map(as_pem))
def test_whatever_stands_in_a_file_is_a_key_or_a_fault(text: str) -> None:
    try:
        assert parse_keys(text)
    except BadKey as e:
        assert len(text) < 12 or text not in str(e)
