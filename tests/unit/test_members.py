"""Whose a session is and in which groups: at most one user, any number of groups, and nothing left when it is gone."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quotepush.auth import Identity
from quotepush.entitlement import Entitlement
from quotepush.errors import PeerError
from quotepush.push.members import MAX_GROUPS, MAX_SESSION_BYTES, Members
from quotepush.push.session import Session
from tests.support.desk import Counter


class Room:
    def __init__(self) -> None:
        self.counter = Counter()
        self.changed: list[str] = []
        self.members = Members(lambda session: self.changed.append(session.fd))

    def open(self, number: int = 1) -> Session:
        return self.counter.open(f"n.0.{number}")[0]


def token(user: str | None, *groups: str, **claims: object) -> Identity:
    return Identity(user, None, claims, Entitlement(groups=groups))


def test_a_session_that_nothing_is_said_of_is_not_known() -> None:
    room = Room()
    session = room.open()
    room.members.identify(session, None)
    session.identity = token(None)
    room.members.identify(session, None)
    assert session.member is None
    assert room.changed == []
    assert not room.members.leave(session, "g") and not room.members.unbind(session)
    room.members.forget(session)


def test_binding_again_replaces_the_user() -> None:
    room = Room()
    session = room.open()
    room.members.bind(session, "a")
    room.members.bind(session, "b")
    assert session.member is not None and session.member.user == "b"
    assert list(session.member.tags) == ["u:b"]
    assert not room.members.of_user("a") and list(room.members.of_user("b")) == [session]
    assert room.members.unbind(session)
    assert room.members.users == 0 and not session.member.tags


def test_a_user_has_many_sessions_and_a_session_many_groups() -> None:
    room = Room()
    one, two = room.open(1), room.open(2)
    for session in (one, two):
        room.members.bind(session, "a")
        room.members.join(session, "x")
    room.members.join(one, "y")
    room.members.join(one, "y")
    assert set(room.members.of_user("a")) == set(room.members.in_group("x")) == {one, two}
    assert one.member is not None and one.member.groups == ["x", "y"]
    room.members.forget(one)
    assert set(room.members.of_user("a")) == set(room.members.in_group("x")) == {two}
    assert not room.members.in_group("y")
    assert one.member is None


def test_a_token_brings_user_groups_and_claims() -> None:
    room = Room()
    session = room.open()
    session.identity = token("a", "x", "y", role="admin")
    room.members.identify(session, None, {"role": "guest", "app": "web"})
    member = session.member
    assert member is not None
    assert (member.user, member.groups) == ("a", ["x", "y"])
    assert member.data == {"role": "admin", "app": "web"}, "what is proved stands above what is only said"
    assert room.changed == [session.fd]


def test_a_newer_token_takes_only_the_groups_of_the_older_one_away() -> None:
    room = Room()
    session = room.open()
    before = session.identity = token("a", "x", "y")
    room.members.identify(session, None)
    room.members.join(session, "joined")
    session.identity = token("a", "y", "z")
    room.members.identify(session, before)
    assert session.member is not None and sorted(session.member.groups) == ["joined", "y", "z"]


def test_session_data_is_replaced_or_merged_and_bounded() -> None:
    room = Room()
    session = room.open()
    room.members.update_data(session, {"a": 1, "b": {"c": 2}})
    room.members.update_data(session, {"a": None, "d": 3})
    assert session.member is not None and session.member.data == {"b": {"c": 2}, "d": 3}
    room.members.set_data(session, {"e": 4})
    assert session.member.data == {"e": 4}
    for change in (room.members.set_data, room.members.update_data):
        with pytest.raises(PeerError) as refused:
            change(session, {"x": "x" * MAX_SESSION_BYTES})
        assert refused.value.error == "too_large"
    assert session.member.data == {"e": 4}


def test_a_session_is_in_a_bounded_number_of_groups() -> None:
    room = Room()
    session = room.open()
    room.members.bind(session, "a")
    for number in range(MAX_GROUPS):
        room.members.join(session, f"g{number}")
    with pytest.raises(PeerError) as refused:
        room.members.join(session, "one more")
    assert refused.value.error == "group_limit"
    room.members.join(session, "g0")  # it is in it


class Model(RuleBasedStateMachine):
    """Whatever is done, the two indexes say the same as the sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room()
        self.sessions = [self.room.open(number) for number in range(4)]
        self.users: dict[str, str | None] = {}
        self.groups: dict[str, set[str]] = {s.fd: set() for s in self.sessions}

    @rule(n=st.integers(0, 3), user=st.sampled_from("abc"))
    def bind(self, n: int, user: str) -> None:
        self.room.members.bind(self.sessions[n], user)
        self.users[self.sessions[n].fd] = user

    @rule(n=st.integers(0, 3))
    def unbind(self, n: int) -> None:
        assert self.room.members.unbind(self.sessions[n]) is (self.users.pop(self.sessions[n].fd, None) is not None)

    @rule(n=st.integers(0, 3), group=st.sampled_from("xyz"))
    def join(self, n: int, group: str) -> None:
        self.room.members.join(self.sessions[n], group)
        self.groups[self.sessions[n].fd].add(group)

    @rule(n=st.integers(0, 3), group=st.sampled_from("xyz"))
    def leave(self, n: int, group: str) -> None:
        self.room.members.leave(self.sessions[n], group)
        self.groups[self.sessions[n].fd].discard(group)

    @rule(n=st.integers(0, 3))
    def forget(self, n: int) -> None:
        self.room.members.forget(self.sessions[n])
        self.users.pop(self.sessions[n].fd, None)
        self.groups[self.sessions[n].fd].clear()

    @invariant()
    def the_indexes_agree(self) -> None:
        for user in "abc":
            found = {session.fd for session in self.room.members.of_user(user)}
            assert found == {fd for fd, name in self.users.items() if name == user}
        for group in "xyz":
            found = {session.fd for session in self.room.members.in_group(group)}
            assert found == {fd for fd, names in self.groups.items() if group in names}
        for session in self.sessions:
            tags = set(session.member.tags) if session.member is not None else set()
            user = self.users.get(session.fd)
            expected = {f"g:{g}" for g in self.groups[session.fd]} | ({f"u:{user}"} if user else set())
            assert tags == expected


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
