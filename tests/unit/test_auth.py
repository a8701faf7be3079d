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

from quotepush.auth import MAX_TOKEN_BYTES, Identity, UnknownKey, Verifier
from quotepush.entitlement import UNLIMITED, Codes, Entitlement
from quotepush.errors import PeerError
from quotepush.token_keys import parse_key_set, parse_keys, secret_key
from quotepush.wire.messages import CLOSE_CODES
from tests.support.tokens import KEY, KeyPair, b64, sign, token

NOW_MS = 1_800_000_000_000
NOW_S = NOW_MS // 1000
HEADER = b'{"alg":"HS256"}'
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEEVs/o5+uQbTjL3chynL4wXgUg2R9
q9UU8I5mEovUf86QZ7kOBIjJwqnzD1omageEHWwHdBO6B+dFabmdT9POxg==
-----END PUBLIC KEY-----
"""


VERIFIER = Verifier([secret_key(KEY)])


def verify(text: str, now_ms: int = NOW_MS, leeway_s: float = 5.0, by: Verifier | None = None) -> Identity:
    return (by or Verifier([secret_key(KEY)], leeway_s)).verify(text, now_ms)


def refusal(text: str, now_ms: int = NOW_MS, leeway_s: float = 5.0, by: Verifier | None = None) -> str:
    """Why it is refused."""
    with pytest.raises(PeerError) as found:
        verify(text, now_ms, leeway_s, by)
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
    assert not VERIFIER.has_expired(verify(token()), 1 << 62)


def test_other_claims_are_handed_on_and_cannot_be_changed() -> None:
    claims = {"level": 2, "deep": {"x": [1, None]}, "iss": "backend"}
    found = verify(token(sub="ann", exp=NOW_S + 1, nbf=NOW_S, iat=NOW_S, jti="7", codes=["A"], **claims)).claims
    assert found == claims
    with pytest.raises(TypeError):
        found["level"] = 3  # type: ignore[index]


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
    verifier, identity = Verifier([secret_key(KEY)], leeway_s), Identity("ann", NOW_MS)
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
@given(
    st.dictionaries(
        st.sampled_from(["sub", "exp", "nbf", "aud", "iss", "codes", "max_rate", "groups", "delay_s", "may_send"]),
        json_values,
    )
)
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


# What a token entitles to


def test_a_token_says_what_its_bearer_may_have() -> None:
    assert verify(token(sub="ann")).entitlement is UNLIMITED
    found = verify(token(sub="ann", codes=["*.sh", "aapl"], max_rate=2, max_codes=10)).entitlement
    assert found == Entitlement(codes=Codes(["*.SH", "AAPL"]), max_rate=2.0, max_codes=10)


@pytest.mark.parametrize("claims", [{"codes": "*"}, {"max_rate": "2"}, {"codes": ["*"], "max_conns": 0}])
def test_a_claim_of_a_wrong_type_refuses_the_whole_token_and_is_named(claims: dict[str, Any]) -> None:
    assert refusal(token(sub="ann", **claims)).startswith([*claims][-1])


@pytest.mark.parametrize("delays", [(), (900,), (900, 60)])
def test_a_delay_is_one_of_the_servers(delays: tuple[int, ...]) -> None:
    verifier = Verifier([secret_key(KEY)], delays=delays)
    assert verify(token(delay_s=0), by=verifier).entitlement.delay_s == 0
    assert "delay_s" in refusal(token(delay_s=61), by=verifier)
    if delays:
        assert verify(token(delay_s=900), by=verifier).entitlement.delay_s == 900


def test_of_a_claim_that_comes_twice_the_last_one_counts() -> None:
    """RFC 7519 §4 allows that, and our parsers of header and claims agree in it."""
    text = sign(HEADER, b'{"sub":"bob","codes":["*"],"codes":["A"],"sub":"ann"}')
    assert (verify(text).user, verify(text).entitlement.codes) == ("ann", Codes(["A"]))
    assert refusal(sign(b'{"alg":"HS256","alg":"none"}', b"{}"))


# For whom, and of whom


@pytest.mark.parametrize("aud", ["quotes", ["quotes"], ["other", "quotes"], ["a", "b", "quotes", 7]])
def test_a_token_for_us_is_taken(aud: Any) -> None:
    assert verify(token(sub="ann", aud=aud), by=Verifier([secret_key(KEY)], audience=["quotes", "q"])).user == "ann"


@pytest.mark.parametrize(
    "aud", ["other", "Quotes", "quotes ", [], ["other"], [["quotes"]], {"quotes": 1}, None, 7, True]
)
def test_a_token_for_others_is_refused(aud: Any) -> None:
    assert "aud" in refusal(token(aud=aud), by=Verifier([secret_key(KEY)], audience=["quotes"]))


def test_where_we_have_a_name_each_token_says_for_whom_it_is() -> None:
    assert "aud" in refusal(token(sub="ann"), by=Verifier([secret_key(KEY)], audience=["quotes"]))


@pytest.mark.parametrize("iss", ["other", "https://a.example/", None, 7, ["https://a.example"], {}, ""])
def test_a_token_of_somebody_else_is_refused(iss: Any) -> None:
    verifier = Verifier([secret_key(KEY)], issuers=["https://a.example", "b"])
    assert verify(token(iss="b"), by=verifier)
    assert "iss" in refusal(token(iss=iss), by=verifier)
    assert "iss" in refusal(token(), by=verifier)


# Public keys

RSA, EC, ED = KeyPair("RS256"), KeyPair("ES256"), KeyPair("EdDSA")
PAIRS = (RSA, EC, ED)
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.algorithm)


@pairs
def test_a_token_of_a_private_key_is_taken_with_its_public_half(pair: KeyPair) -> None:
    for keys in (parse_keys(pair.public_pem), parse_key_set(pair.jwks(kid="a"))):
        assert verify(pair.token(sub="ann", exp=NOW_S + 60), by=Verifier(keys)).user == "ann"
        assert (
            refusal(KeyPair(pair.algorithm).token(sub="ann"), by=Verifier(keys))
            == "the signature of the token is wrong"
        )


@pairs
@pytest.mark.parametrize("name", ["HS256", "hs256", "none", ""])
def test_a_public_key_is_no_secret_to_sign_with(pair: KeyPair, name: str) -> None:
    """Algorithm confusion: what everybody knows, used as the secret of HS256."""
    verifier = Verifier(parse_keys(pair.public_pem))
    der = base64.b64decode("".join(pair.public_pem.splitlines()[1:-1]))
    for secret in (pair.public_pem, pair.public_pem.strip(), der.decode("latin-1"), pair.jwks()):
        text = token(secret, sub="ann", header={"alg": name})
        assert refusal(text, by=verifier) == f"only tokens that are signed with {pair.algorithm} are taken"
    mixed = Verifier([*parse_keys(pair.public_pem), secret_key(KEY)])
    assert refusal(token(pair.public_pem, sub="ann"), by=mixed) == "the signature of the token is wrong"


@pairs
def test_the_algorithm_is_the_keys_and_not_the_tokens(pair: KeyPair) -> None:
    verifier = Verifier([key for p in PAIRS for key in parse_keys(p.public_pem)])
    for other in PAIRS:
        head = b64(json.dumps({"alg": other.algorithm}).encode())
        text = f"{head}.{pair.token(sub='ann').partition('.')[2]}"
        assert refusal(text, by=verifier) == "the signature of the token is wrong"
    for name in ("RS384", "PS256", "ES384", "ES256K", "Ed448"):
        text = f"{b64(json.dumps({'alg': name}).encode())}.{pair.token(sub='ann').partition('.')[2]}"
        assert refusal(text, by=verifier).startswith("only tokens that are signed with RS256 or ES256 or EdDSA")


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\0" * 63, b"\xff" * 64, b"\0" * 256, b"\0" * 4000])
def test_a_signature_of_nothing_is_wrong(signature: bytes) -> None:
    for pair in PAIRS:
        head, payload, _ = pair.token(sub="root").split(".")
        assert refusal(f"{head}.{payload}.{b64(signature)}", by=Verifier(parse_keys(pair.public_pem)))


# Several keys, and their names


def test_of_several_keys_any_will_do() -> None:
    other = "another secret of thirty-two bytes"
    verifier = Verifier([secret_key(KEY), secret_key(other), *parse_keys(EC.public_pem)])
    for text in (token(sub="ann"), token(other, sub="ann"), EC.token(sub="ann")):
        assert verify(text, by=verifier).user == "ann"
    assert refusal(token("x" * 32), by=verifier)


def test_a_kid_chooses_among_the_keys_and_never_a_key_of_its_own() -> None:
    first, second, twin = KeyPair("ES256"), KeyPair("ES256"), KeyPair("ES256")
    verifier = Verifier(
        [*parse_key_set(first.jwks(kid="a")), *parse_key_set(second.jwks(kid="b")), *parse_key_set(twin.jwks(kid="b"))]
    )
    assert verify(first.token(sub="ann", kid="a"), by=verifier).user == "ann"
    assert verify(first.token(sub="ann"), by=verifier).user == "ann"
    assert verify(second.token(sub="ann", kid="b"), by=verifier).user == "ann"
    assert verify(twin.token(sub="ann", kid="b"), by=verifier).user == "ann"  # two keys of one name
    assert refusal(first.token(sub="ann", kid="b"), by=verifier) == "the signature of the token is wrong"
    assert refusal(first.token(sub="ann", kid="A"), by=verifier) == "the token is signed with a key that is not known"


KIDS = ["c", "../../dev/null", "/etc/passwd", "a' OR 1=1 --", "http://127.0.0.1/keys", "a\0", " a", "x" * 4000]


@pytest.mark.parametrize("kid", KIDS, ids=lambda kid: kid[:12])
def test_an_unknown_kid_is_said_apart_for_there_may_be_newer_keys(kid: str) -> None:
    verifier = Verifier(parse_key_set(EC.jwks(kid="a")))
    with pytest.raises(UnknownKey) as found:
        verifier.verify(EC.token(sub="ann", kid=kid), NOW_MS)
    assert found.value.error == "auth_failed"
    assert len(kid) < 8 or kid not in found.value.message
    with pytest.raises(PeerError) as known:
        verifier.verify(KeyPair("ES256").token(sub="ann", kid="a"), NOW_MS)
    assert type(known.value) is PeerError


def test_a_verifier_without_keys_takes_nothing() -> None:
    for text in (token(sub="ann"), EC.token(sub="ann"), EC.token(sub="ann", kid="a")):
        assert refusal(text, by=Verifier([])) == "no key of tokens is known yet"


def test_keys_can_be_changed() -> None:
    verifier = Verifier(parse_keys(EC.public_pem))
    verifier.renew(parse_keys(ED.public_pem))
    assert verify(ED.token(sub="ann"), by=verifier).user == "ann"
    assert refusal(EC.token(sub="ann"), by=verifier) == "only tokens that are signed with EdDSA are taken"


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "x5t"])
def test_a_key_of_an_attacker_in_the_header_is_not_looked_at(name: str) -> None:
    evil = KeyPair("ES256")
    jwk = json.loads(evil.jwks(kid="a"))["keys"][0]
    value = {"jwk": jwk, "x5c": [b64(b"x" * 99)]}.get(name, "http://127.0.0.1:1/keys")
    verifier = Verifier(parse_key_set(EC.jwks(kid="a")))
    text = evil.token(sub="root", header={name: value})
    assert refusal(text, by=verifier) == "the signature of the token is wrong"


def test_a_verifier_and_an_identity_do_not_show_the_key() -> None:
    assert KEY not in repr(VERIFIER) + repr(verify(token(sub="ann")))


def test_the_one_liner_of_the_documents_makes_a_token(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("python -c") and "jwt.encode" in line]
    (tmp_path / "token.key").write_text(KEY + "\n")
    command = ["sh", "-c", line.replace("python", sys.executable, 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    claims = json.loads(base64.urlsafe_b64decode(done.stdout.split(".")[1] + "=="))
    assert verify(done.stdout.strip(), claims["exp"] * 1000 - 1000).user == "ann"
