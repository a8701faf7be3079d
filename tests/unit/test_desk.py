"""What a session knows of its surroundings."""

from quotepush.auth import Verifier
from quotepush.push.desk import Gone, Limits
from quotepush.token_keys import secret_key
from tests.support.desk import Counter
from tests.support.tokens import KEY, token


def test_a_rate_that_is_no_whole_number_is_said_as_it_is() -> None:
    assert Limits(1, 1, 0.5, 1).as_said()["requests_per_s"] == 0.5
    assert isinstance(Limits(1, 1, 10.0, 1).as_said()["requests_per_s"], int)


def test_a_desk_identifies_whom_a_token_names_and_nobody_where_no_tokens_are_taken() -> None:
    desk = Counter().desk
    assert desk.identify(token(sub="ann")) is None
    desk.verifier = Verifier([secret_key(KEY)])
    identity = desk.identify(token(sub="ann"))
    assert identity is not None and identity.user == "ann"


def test_a_link_that_is_gone_takes_everything_and_does_nothing() -> None:
    gone = Gone()
    gone.write(b"late")
    gone.hold_requests(True)
    gone.close(1000, "late")
