"""Tokens: which are taken, which are refused, and that nothing of a refused one is repeated."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.auth import MAX_TOKEN_BYTES, Identity, Verifier, key_fault
from quotepush.errors import PeerError
from quotepush.wire.messages import CLOSE_CODES
from tests.support.tokens import KEY, b64, sign, token

NOW_MS = 1_800_000_000_000
NOW_S = NOW_MS // 1000
HEADER = b'{"alg":"HS256"}'
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEEVs/o5+uQbTjL3chynL4wXgUg2R9
q9UU8I5mEovUf86QZ7kOBIjJwqnzD1omageEHWwHdBO6B+dFabmdT9POxg==
-----END PUBLIC KEY-----
"""


def verify(text: str, now_ms: int = NOW_MS, leeway_s: float = 5.0) -> Identity:
    return Verifier(KEY, leeway_s).verify(text, now_ms)


def refusal(text: str, now_ms: int = NOW_MS, leeway_s: float = 5.0) -> str:
    """Why it is refused."""
    with pytest.raises(PeerError) as found:
        verify(text, now_ms, leeway_s)
    e = found.value
    assert (e.error, e.close_code, e.retry_after_ms) == ("auth_failed", CLOSE_CODES["auth_failed"], None)
    assert KEY not in str(e)
    for part in text.split("."):
        assert len(part) < 8 or part not in str(e)
    assert (e.__cause__ is None and e.__suppress_context__) or e.__context__ is None
    return e.message


# What is taken


def test_a_token_says_who_its_bearer_is_and_until_when() -> None:
    found = verify(token(sub="ann", exp=NOW_S + 60))
    assert found == Identity("ann", NOW_MS + 60_000, {})


def test_a_token_of_a_common_library_is_taken() -> None:
    assert verify(jwt.encode({"sub": "ann", "exp": NOW_S + 60}, KEY, "HS256")).user == "ann"


def test_a_token_that_a_shell_has_made_is_taken() -> None:
    script = (
        "b64() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }; "
        'head=$(printf \'{"alg":"HS256"}\' | b64).$(printf \'{"sub":"ann"}\' | b64); '
        'printf "%s.%s" "$head" "$(printf %s "$head" | openssl dgst -sha256 -hmac "$KEY" -binary | b64)"'
    )
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "KEY": KEY}
    )
    assert verify(done.stdout).user == "ann"


def test_a_token_without_sub_and_exp_names_nobody_and_lasts() -> None:
    assert verify(token()) == Identity(None, None, {})
    assert not Verifier(KEY).has_expired(verify(token()), 1 << 62)


def test_other_claims_are_handed_on_and_cannot_be_changed() -> None:
    claims = {"codes": ["*.SH"], "groups": ["a"], "deep": {"x": [1, None]}, "iss": "backend"}
    found = verify(token(sub="ann", exp=NOW_S + 1, nbf=NOW_S, iat=NOW_S, jti="7", **claims)).claims
    assert found == claims
    with pytest.raises(TypeError):
        found["codes"] = ["*"]  # type: ignore[index]


def test_identities_without_further_claims_share_their_absence() -> None:
    assert verify(token(sub="a")).claims is verify(token(sub="b")).claims


def test_a_user_may_have_a_name_in_any_script() -> None:
    assert verify(token(sub="用户 7")).user == "用户 7"


def test_the_largest_token_is_taken_and_one_byte_more_is_not() -> None:
    text = sign(HEADER, b'{"x":"' + b"x" * 6087 + b'"}')
    assert len(text) == MAX_TOKEN_BYTES
    assert len(verify(text).claims["x"]) == 6087
    assert "8192 bytes" in refusal(text + "x")
    assert "bytes" not in refusal("x" * MAX_TOKEN_BYTES)


# Times


@pytest.mark.parametrize("leeway_s", [0, 5, 60, 0.5])
def test_a_token_ends_at_its_expiry_and_the_leeway(leeway_s: float) -> None:
    text, end_ms = token(sub="ann", exp=NOW_S), NOW_MS + round(leeway_s * 1000)
    assert verify(text, end_ms - 1, leeway_s).expires_ms == NOW_MS
    assert refusal(text, end_ms, leeway_s) == "the token has expired"  # RFC 7519 §4.1.4: on or after
    verifier, identity = Verifier(KEY, leeway_s), Identity("ann", NOW_MS)
    assert not verifier.has_expired(identity, end_ms - 1)
    assert verifier.has_expired(identity, end_ms)


@pytest.mark.parametrize("leeway_s", [0, 5, 60])
def test_a_token_begins_at_nbf_less_the_leeway(leeway_s: int) -> None:
    text = token(nbf=NOW_S + leeway_s)
    assert verify(text, NOW_MS, leeway_s)
    assert "nbf" in refusal(text, NOW_MS - 1, leeway_s)


def test_times_may_have_fractions() -> None:
    assert verify(token(exp=NOW_S + 0.25)).expires_ms == NOW_MS + 250


@pytest.mark.parametrize("name", ["exp", "nbf"])
@pytest.mark.parametrize(
    "value",
    [None, True, False, "", "1900000000", [], {}, -1, 1e300, 2**63, 2**64, 10**30, NOW_MS, 253_402_300_800],
    ids=lambda value: str(value)[:20],
)
def test_a_time_that_is_none_is_refused(name: str, value: Any) -> None:
    assert refusal(token(sub="ann", **{name: value})).startswith(f"{name} must be a time in seconds")


def test_when_a_token_was_issued_does_not_matter() -> None:
    assert verify(token(sub="ann", iat=NOW_S + 3600)).user == "ann"


# Attacks


def parts(text: str) -> list[str]:
    return text.split(".")


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", None])
@pytest.mark.parametrize("signature", ["", "x", None])
def test_an_unsigned_token_is_refused(name: str | None, signature: str | None) -> None:
    head, payload, real = parts(token(sub="ann", header={"alg": name}))
    assert refusal(f"{head}.{payload}.{real if signature is None else signature}")


@pytest.mark.parametrize(
    "name",
    ["HS384", "HS512", "RS256", "ES256", "PS256", "EdDSA", "hs256", "HS256 ", ["HS256"], {"HS256": 1}, 256, True, []],
)
def test_only_the_algorithm_of_the_key_counts(name: Any) -> None:
    assert refusal(token(sub="ann", header={"alg": name})) == "only tokens that are signed with HS256 are taken"


@pytest.mark.parametrize("digest", ["sha384", "sha512"])
def test_another_hash_under_the_name_of_ours_is_a_wrong_signature(digest: str) -> None:
    assert refusal(sign(HEADER, b'{"sub":"ann"}', digest=digest)) == "the signature of the token is wrong"
    strong = jwt.encode({"sub": "ann"}, KEY * 2, digest.replace("sha", "HS"))
    assert refusal(strong) == "only tokens that are signed with HS256 are taken"


@pytest.mark.parametrize("key", [KEY + " ", KEY.upper(), KEY[:-1], PUBLIC_KEY, "\0"])
def test_another_key_is_a_wrong_signature(key: str) -> None:
    assert refusal(token(key, sub="ann")) == "the signature of the token is wrong"


def test_parts_of_two_tokens_do_not_make_a_third() -> None:
    first, second = parts(token(sub="ann")), parts(token(sub="root"))
    assert refusal(".".join((first[0], second[1], first[2])))
    other = parts(token(sub="ann", header={"kid": "1"}))
    assert refusal(".".join((other[0], first[1], first[2])))


def test_no_single_bit_can_be_changed() -> None:
    text = token(sub="ann", exp=NOW_S + 60)
    raw = bytearray(text.encode())
    for at in range(len(raw)):
        for bit in range(7):
            raw[at] ^= 1 << bit
            assert refusal(raw.decode())
            raw[at] ^= 1 << bit
    assert verify(raw.decode()).user == "ann"


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"], "exp": 1}, {"crit": []}, {"crit": "b64"}, {"crit": ["b64"]}, {"b64": False},
        {"crit": ["b64"], "b64": False}, {"kid": 7}, {"kid": ["a"]},
    ],
)  # fmt: skip
def test_an_extension_that_is_not_understood_is_refused(header: dict[str, Any]) -> None:
    assert refusal(token(sub="ann", header=header))


@pytest.mark.parametrize("header", [{"jwk": {"kty": "oct", "k": b64(b"x" * 32)}}, {"jku": "http://evil.example/keys"},
                                    {"x5u": "http://evil.example/c"}, {"kid": "../../dev/null"}])  # fmt: skip
def test_a_key_that_the_token_brings_along_is_not_looked_at(header: dict[str, Any]) -> None:
    assert verify(token(sub="ann", header=header)).user == "ann"
    assert refusal(token("x" * 32, sub="ann", header=header)) == "the signature of the token is wrong"


@pytest.mark.parametrize("sub", [None, 7, 0, True, 1.5, "", [], ["ann"], {}, {"name": "ann"}])
def test_a_user_is_a_text(sub: Any) -> None:
    assert refusal(token(sub=sub)) == "sub must be a text that is not empty"


@pytest.mark.parametrize("aud", ["other", ["other"], ["a", "b"], "", [], {}, 0])
def test_a_token_for_somebody_else_is_refused(aud: Any) -> None:
    assert "aud" in refusal(token(sub="ann", aud=aud))


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"null", b"[]", b'"ann"', b"7", b"{", b'{"sub":"ann"', b'{"sub":"ann"}x', b'{"exp":NaN}',
        b'{"exp":Infinity}', b'{"sub":"\\ud800"}', b'{"sub":"\xff"}', b"\xef\xbb\xbf{}", b"[" * 5000,
        b"[" * 1100 + b"]" * 1100,
    ],
    ids=lambda payload: repr(payload[:20]),
)  # fmt: skip
def test_claims_are_one_json_object(payload: bytes) -> None:
    assert refusal(sign(HEADER, payload)) == "the claims of the token are not a JSON object"


@pytest.mark.parametrize("header", [b"", b"null", b"[]", b"{", b'"HS256"', b"[" * 5000, b'{"alg":"HS256"', b"\xff"])
def test_a_header_is_a_json_object(header: bytes) -> None:
    assert refusal(sign(header, b"{}")) == "this is not a JSON Web Token"


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "...", "a", "a.b", "a.b.c", "a.b.c.d", "Bearer x", " ", "\0", "é", "\ud800", "\n", "用户"],
)
def test_garbage_is_refused(text: str) -> None:
    assert refusal(text) == "this is not a JSON Web Token"


def test_blanks_around_a_token_are_not_forgiven() -> None:
    text = token(sub="ann")
    for wrong in (f" {text}", f"{text} ", f"{text}\n", f'"{text}"', text.replace(".", ". "), f"{text}.", f".{text}"):
        assert refusal(wrong)


def test_an_encrypted_token_is_refused() -> None:
    assert refusal(".".join(b64(os.urandom(20)) for _ in range(5)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.text() | st.from_regex(r"\A[\w=-]{0,40}\.[\w=-]{0,40}\.[\w=-]{0,60}\Z"))
def test_whatever_comes_is_refused(text: str) -> None:
    refusal(text)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40))
def test_whatever_stands_in_the_parts_is_refused_with_a_wrong_signature(header: bytes, payload: bytes) -> None:
    refusal(sign(header, payload, "another key of thirty-two bytes and more"))


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "x"]), json_values))
def test_whatever_header_somebody_signs_is_taken_or_refused(header: dict[str, Any]) -> None:
    text = token(header=header)
    if len(text) <= MAX_TOKEN_BYTES:
        is_taken_or_refused(text)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.dictionaries(st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "jti", "codes"]), json_values))
def test_whatever_claims_somebody_signs_are_taken_or_refused(claims: dict[str, Any]) -> None:
    is_taken_or_refused(token(**claims))


def is_taken_or_refused(text: str) -> None:
    try:
        found = verify(text)
    except PeerError as e:
        assert e.error == "auth_failed"
    else:
        assert found.user is None or (type(found.user) is str and found.user)
        assert found.expires_ms is None or NOW_MS - 5000 < found.expires_ms < 1 << 53


# Keys


@pytest.mark.parametrize("key", ["x" * 32, KEY, "é" * 16, "x" * 10_000, json.dumps({"not": "a key", "of": "any kind"})])
def test_a_key_of_32_bytes_will_do(key: str) -> None:
    assert key_fault(key) == ""
    assert Verifier(key).verify(token(key, sub="ann"), NOW_MS).user == "ann"


@pytest.mark.parametrize("key", ["", "x", "x" * 31, "é" * 15])
def test_a_shorter_key_is_a_fault(key: str) -> None:
    assert "32 bytes" in key_fault(key)


@pytest.mark.parametrize(
    "key",
    [PUBLIC_KEY, "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC7", json.dumps({"kty": "oct", "k": b64(b"x" * 32)})],
)
def test_what_others_know_or_what_only_describes_a_key_is_none(key: str) -> None:
    assert "secret" in key_fault(key)
    assert key not in key_fault(key)


def test_a_key_that_is_no_text_is_a_fault() -> None:
    assert key_fault("\udcff" * 40) == "must be UTF-8"


def test_a_verifier_and_an_identity_do_not_show_the_key() -> None:
    assert KEY not in repr(Verifier(KEY)) + repr(verify(token(sub="ann")))


def test_the_one_liner_of_the_documents_makes_a_token(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("python -c") and "jwt.encode" in line]
    (tmp_path / "token.key").write_text(KEY + "\n")
    command = ["sh", "-c", line.replace("python", sys.executable, 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    claims = json.loads(base64.urlsafe_b64decode(done.stdout.split(".")[1] + "=="))
    assert verify(done.stdout.strip(), claims["exp"] * 1000 - 1000).user == "ann"
