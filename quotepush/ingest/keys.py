"""What publishers write in Redis, by name; who writes it is :mod:`quotepush.batches`, who reads it :mod:`.log`."""

import re
from dataclasses import dataclass

__all__ = ["FeedKeys"]


@dataclass(frozen=True, slots=True)
class FeedKeys:
    """The names in Redis of what publishers write.

    A batch is one atomic step, so in a Redis Cluster all of it needs one slot: there the prefix of keys becomes a hash
    tag (``{qp:}log``), unless it has one already. A channel needs no slot and is called the same everywhere.
    """

    prefix: str = "qp:"
    is_cluster: bool = False

    @property
    def begin(self) -> str:
        """What all keys begin with."""
        has_tag = re.search(r"\{[^}]+\}", self.prefix) is not None
        return self.prefix if has_tag or not self.is_cluster else f"{{{self.prefix}}}"

    @property
    def epoch(self) -> str:
        return f"{self.begin}epoch"

    @property
    def seq(self) -> str:
        return f"{self.begin}seq"

    @property
    def log(self) -> str:
        return f"{self.begin}log"

    @property
    def row(self) -> str:
        """What stands before the code in the name of its row."""
        return f"{self.begin}row:"

    @property
    def channel(self) -> str:
        return f"{self.prefix}feed"

    @property
    def rows(self) -> str:
        """The codes of rows that servers keep."""
        return f"{self.begin}rows"

    def publisher(self, name: str) -> str:
        return f"{self.begin}publisher:{name}"
