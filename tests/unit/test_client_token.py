"""Where tokens come from, and when the next one is due."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from quotepush.client_token import NoToken, TokenSource, renewal_in_s
from tests.support.tokens import b64, token


async def test_a_token_comes_from_a_text_a_function_or_an_async_function() -> None:
    async def later() -> str:
        await asyncio.sleep(0)
        return "c"

    sources: list[Any] = [None, "a", lambda: "b", later]
    assert [await TokenSource(source, 1).next() for source in sources] == [None, "a", "b", "c"]
    assert [TokenSource(source, 1).can_renew for source in sources] == [False, False, True, True]


def failing() -> str:
    raise LookupError("a-secret")


async def never() -> str:
    await asyncio.Event().wait()
    return ""


@pytest.mark.parametrize(
    ("source", "words"),
    [(failing, "LookupError"), (never, "within 0.01 s"), (lambda: "a secret\n", "ValueError"), (dict, "ValueError")],
)
async def test_a_function_that_fails_costs_one_attempt_and_its_words_are_not_repeated(
    source: Callable[[], Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(NoToken, match=words) as failure:
        await TokenSource(source, 0.01).next()
    assert "secret" not in str(failure.value) + caplog.text
    assert failure.value.__suppress_context__


@pytest.mark.parametrize(("left_s", "due_s"), [(3600, 3540), (100, 80), (4, 3.2), (0.5, 1), (-50, 1), (1e9, 86_400)])
def test_the_next_token_is_due_before_this_one_ends(left_s: float, due_s: float) -> None:
    now_ms = 1_800_000_000_000.0
    assert renewal_in_s(token(exp=now_ms / 1000 + left_s), now_ms) == pytest.approx(due_s)


@pytest.mark.parametrize(
    "text",
    [token(sub="ann"), token(exp="soon"), "opaque", "a.%%.c", f"a.{b64(b'[]')}.c", f"a.{b64(b'{')}.c", "a.b.c.d"],
)
def test_what_has_no_end_is_never_due(text: str) -> None:
    assert renewal_in_s(text, 0.0) is None
