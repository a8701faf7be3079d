"""Who was refused at the public listener, counted by the word that he was told.

Law: a flood of refusals is a line a minute and word in the log; the rest of it is in the figures.
"""

import logging

__all__ = ["Refusals"]

log = logging.getLogger("quotepush.worker")

_QUIET_S = 60.0


class Refusals:
    """What one worker has refused.

    Attributes:
        connections: by the word; these wanted to be a WebSocket or a stream.
        questions: the same of what is asked over HTTP.
    """

    def __init__(self) -> None:
        self.connections: dict[str, int] = {}
        self.questions: dict[str, int] = {}
        self._said: dict[str, tuple[float, int]] = {}  # word: when we spoke of it, and how many there were by then

    def note(self, error: str, who: str, now_s: float, *, is_connection: bool, advice: str = "") -> None:
        """Count one; ``who`` is its address.

        Args:
            advice: what an operator may want to know about it.
        """
        counts = self.connections if is_connection else self.questions
        counts[error] = counts.get(error, 0) + 1
        total = self.connections.get(error, 0) + self.questions.get(error, 0)
        said_s, before = self._said.get(error, (now_s - _QUIET_S, 0))
        if now_s - said_s >= _QUIET_S:
            self._said[error] = (now_s, total)
            log.warning("%s: %d refused, the newest from %s%s", error, total - before, who, advice)
