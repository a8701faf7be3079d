"""What becomes of the codes that one request names.

Invariant: each spelling has one result, in the order of the request, accepted or rejected with the reason; spellings
of the same code share its fate.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quotepush.entitlement import EVERY_CODE, Codes
from quotepush.errors import PeerError
from quotepush.quote.code import BadCode, parse_code

__all__ = ["Results", "understand"]

# What is said of a code that is refused after it was understood, by its word; others are rejected with their reason.
_NOT_ENTITLED = "you may not have this code"
_REFUSALS = {
    "not_entitled": _NOT_ENTITLED,
    "code_limit": "there is no room for this code any more",
}


class Results:
    """The codes of one request as the client spelled them, and what becomes of each.

    Attributes:
        codes: those that are understood and not refused, canonical, each with the results of its spellings.
    """

    __slots__ = ("_all", "codes")

    def __init__(self) -> None:
        self._all: list[dict[str, Any]] = []
        self.codes: dict[str, list[dict[str, Any]]] = {}

    def accept(self, spelling: str, code: str) -> None:
        """Take a spelling for a code."""
        result = {"as": spelling, "code": code}
        self._all.append(result)
        self.codes.setdefault(code, []).append(result)

    def reject(self, spelling: str, fault: PeerError) -> None:
        """Take a spelling for no code, or for none that the client may have."""
        self._all.append({"as": spelling, "error": fault.error, "message": fault.message})

    def refuse(self, refused: Mapping[str, str]) -> None:
        """Reject accepted codes after all, each with its error word; main's is that it does not know them."""
        for code, word in refused.items():
            message = _REFUSALS.get(word) or f"{code} is not a code this server knows"
            for result in self.codes.pop(code, ()):
                del result["code"]
                result |= {"error": word, "message": message}

    def note(self, code: str, **facts: Any) -> None:
        """Say more of an accepted code."""
        for result in self.codes[code]:
            result |= facts

    def as_said(self) -> Mapping[str, Any]:
        """Return them as an ack says them."""
        return {
            "accepted": [r for r in self._all if "error" not in r],
            "rejected": [r for r in self._all if "error" in r],
        }


def understand(
    spellings: Iterable[str],
    known: Collection[str] = (),
    most: int | None = None,
    allowed: Codes = EVERY_CODE,
) -> Results:
    """Return what is meant by these spellings.

    Args:
        known: codes that the client has already.
        most: how many it may have with the new ones; None: does not matter.
        allowed: which it may have.
    """
    results = Results()
    room = None if most is None else most - len(known)
    for spelling in spellings:
        try:
            code = parse_code(spelling)
        except BadCode as e:
            results.reject(spelling, PeerError("bad_code", str(e)))
            continue
        if code not in allowed:
            results.reject(spelling, PeerError("not_entitled", _NOT_ENTITLED))
            continue
        if room is not None and code not in results.codes and code not in known:
            if room <= 0:
                results.reject(spelling, PeerError("code_limit", f"at most {most} codes on one connection"))
                continue
            room -= 1
        results.accept(spelling, code)
    return results
