"""What publishers write in Redis, by name; who writes it is :mod:`quotepush.batches`, who reads it :mod:`.log`."""

from dataclasses import dataclass

__all__ = ["FeedKeys"]


@dataclass(frozen=True, slots=True)
class FeedKeys:
    """The names in Redis of what publishers write."""

    prefix: str = "qp:"

    @property
    def epoch(self) -> str:
        return f"{self.prefix}epoch"

    @property
    def seq(self) -> str:
        return f"{self.prefix}seq"

    @property
    def log(self) -> str:
        return f"{self.prefix}log"

    @property
    def row(self) -> str:
        """What stands before the code in the name of its row."""
        return f"{self.prefix}row:"

    @property
    def channel(self) -> str:
        return f"{self.prefix}feed"

    def publisher(self, name: str) -> str:
        return f"{self.prefix}publisher:{name}"
