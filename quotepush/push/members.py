"""Which sessions of this worker are whose, in which groups, and what is kept about each.

Laws: a session has at most one user, a user any number of sessions; groups hold sessions, which leave them when they
are gone. A session without a user, a group and session data is not known here and costs nothing.

Pure: what others have to know of a change is told through ``changed``.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import orjson

from quotepush.auth import Identity
from quotepush.errors import PeerError
from quotepush.push.session import Session

__all__ = ["MAX_GROUPS", "MAX_SESSION_BYTES", "Member", "Members", "TooManyGroups", "check_data"]

# Of one session.
MAX_GROUPS = 1000
MAX_SESSION_BYTES = 8192  # session data as JSON

_EMPTY: frozenset[Session] = frozenset()


class TooManyGroups(PeerError):
    """A session is in as many groups as it may be; only programs that put it there are told."""

    def __init__(self) -> None:
        super().__init__("group_limit", f"a connection is in at most {MAX_GROUPS} groups")


class Member:
    """What is known of one session.

    Attributes:
        user: whose it is; None: nobody's.
        tags: its user and groups as ``u:<uid>`` and ``g:<group>``; one live collection for as long as it lives.
        data: its session data, a JSON object.
    """

    __slots__ = ("data", "tags", "user")

    def __init__(self) -> None:
        self.user: str | None = None
        self.tags: dict[str, None] = {}
        self.data: dict[str, Any] = {}

    @property
    def groups(self) -> list[str]:
        """The groups that it is in, in the order in which it joined them."""
        return [tag[2:] for tag in self.tags if tag.startswith("g:")]


class Members:
    """The sessions of this worker by user and group.

    Args:
        changed: called with a session after each change of what is known of it.
    """

    def __init__(self, changed: Callable[[Session], None] = lambda session: None) -> None:
        self._changed = changed
        self._users: dict[str, set[Session]] = {}
        self._groups: dict[str, set[Session]] = {}

    def of_user(self, user: str) -> Collection[Session]:
        """Return the sessions of a user; not to be kept."""
        return self._users.get(user, _EMPTY)

    def in_group(self, group: str) -> Collection[Session]:
        """Return the sessions in a group; not to be kept."""
        return self._groups.get(group, _EMPTY)

    @property
    def users(self) -> int:
        """How many users have a session here."""
        return len(self._users)

    def identify(self, session: Session, before: Identity | None, data: Mapping[str, Any] | None = None) -> None:
        """Take over what the session's token says: user, groups, claims; and further session data that it begins with.

        Groups that only the token ``before`` named are left.

        Raises:
            PeerError: ``too_large``: claims and data together; nothing was changed.
        """
        identity = session.identity
        claims: Mapping[str, Any] = identity.claims if identity is not None else {}
        groups = identity.entitlement.groups if identity is not None else ()
        left = [group for group in (before.entitlement.groups if before is not None else ()) if group not in groups]
        if not (claims or groups or left or data) and (identity is None or identity.user is None):
            return
        held = session.member.data if session.member is not None else {}
        # What has been proved stands above what was only said.
        merged = {**held, **(data or {}), **claims}
        check_data(merged)
        member = self._member(session)
        member.data = merged
        if identity is not None and identity.user is not None:
            self._set_user(session, member, identity.user)
        for group in left:
            self._drop(session, member, group)
        for group in groups:
            self._add(session, member, group)
        self._changed(session)

    def bind(self, session: Session, user: str) -> None:
        """Let the session be the user's and nobody else's."""
        self._set_user(session, self._member(session), user)
        self._changed(session)

    def unbind(self, session: Session) -> bool:
        """Let the session be nobody's; say whether it was somebody's."""
        member = session.member
        if member is None or member.user is None:
            return False
        self._set_user(session, member, None)
        self._changed(session)
        return True

    def join(self, session: Session, group: str) -> None:
        """Put the session into a group, where it may be already.

        Raises:
            TooManyGroups: it is in so many.
        """
        member = self._member(session)
        if f"g:{group}" not in member.tags:
            if len(member.tags) > MAX_GROUPS:
                raise TooManyGroups
            self._add(session, member, group)
            self._changed(session)

    def leave(self, session: Session, group: str) -> bool:
        """Take the session out of a group; say whether it was in it."""
        member = session.member
        if member is None or f"g:{group}" not in member.tags:
            return False
        self._drop(session, member, group)
        self._changed(session)
        return True

    def set_data(self, session: Session, data: dict[str, Any]) -> None:
        """Replace the session data.

        Raises:
            PeerError: ``too_large``; nothing was changed.
        """
        check_data(data)
        self._member(session).data = data
        self._changed(session)

    def update_data(self, session: Session, data: Mapping[str, Any]) -> None:
        """Merge into the session data; a null removes its key. Otherwise as :meth:`set_data`."""
        held = session.member.data if session.member is not None else {}
        merged = {name: value for name, value in {**held, **data}.items() if value is not None}
        self.set_data(session, merged)

    def forget(self, session: Session) -> None:
        """The session is gone. Nobody is told: whoever keeps anything of a session knows of its end."""
        member = session.member
        if member is None:
            return
        for tag in member.tags:
            index, name = (self._users if tag[0] == "u" else self._groups), tag[2:]
            _discard(index, name, session)
        session.member = None

    def _member(self, session: Session) -> Member:
        if session.member is None:
            session.member = Member()
        return session.member

    def _set_user(self, session: Session, member: Member, user: str | None) -> None:
        if member.user == user:
            return
        if member.user is not None:
            member.tags.pop(f"u:{member.user}", None)
            _discard(self._users, member.user, session)
        member.user = user
        if user is not None:
            member.tags[f"u:{user}"] = None
            self._users.setdefault(user, set()).add(session)

    def _add(self, session: Session, member: Member, group: str) -> None:
        member.tags[f"g:{group}"] = None
        self._groups.setdefault(group, set()).add(session)

    def _drop(self, session: Session, member: Member, group: str) -> None:
        member.tags.pop(f"g:{group}", None)
        _discard(self._groups, group, session)


def check_data(data: Mapping[str, Any]) -> None:
    """Look at session data before it is taken.

    Raises:
        PeerError: ``too_large``.
    """
    if len(orjson.dumps(data)) > MAX_SESSION_BYTES:
        raise PeerError("too_large", f"session data has at most {MAX_SESSION_BYTES} bytes as JSON")


def _discard(index: dict[str, set[Session]], name: str, session: Session) -> None:
    sessions = index.get(name)
    if sessions is not None:
        sessions.discard(session)
        if not sessions:
            del index[name]
