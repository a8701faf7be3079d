"""What a load is: how many clients watch which codes, and which ticks come at which rate."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

__all__ = ["LOADS", "Load"]

_PLAIN = '{"code":"%s","last":%%d.%%02d,"n":%%d,"pt":%%d'

# 25 fields as vendors of A-share quotes send them, and pt: 700 bytes with both books.
_REAL = (
    '{"code":"%s","name":"贵州茅台酒股份有限公司","last":16%%d.%%02d,"prev_close":1675.50,"open":1680.00,"high":1699.99,'
    '"low":1610.00,"volume":%%d,"amount":38411327050.50,"last_size":1300,"bid":1688.24,"bid_size":121200,'
    '"ask":1688.25,"ask_size":109900,"limit_up":1843.05,"limit_down":1507.95,"phase":"regular","status":"trading",'
    '"average_price":1684.1127,"turnover_rate_pct":0.012345,"pe_ratio_ttm":24.5127,"trade_count":48213,'
    '"market_capitalisation":2118903120000.00,'
    '"bids":[[1688.24,121200],[1688.23,113400],[1688.22,100800],[1688.21,151100],[1688.20,220000]],'
    '"asks":[[1688.25,109900],[1688.26,121000],[1688.27,156000],[1688.28,100700],[1688.29,198000]],"pt":%%d}'
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """One load.

    Attributes:
        clients: connections that are there before the first tick.
        codes: instruments that tick, one after the other.
        per_client: codes that each client watches; neighbours watch neighbouring codes.
        rate: ticks a second.
        burst: so many ticks come at once; the rate stays.
        zipf: 0: every code ticks as often; above 0: exponent of a Zipf distribution over the codes.
        pad: bytes of a text field that makes rows longer.
        slow: so many of the clients never read once they have subscribed; the figures are the others'.
        storm: so many more clients connect and subscribe at once, one second after the first tick.
        asking: further clients subscribe so many codes at a time, with snapshot, again and again.
        watches_main: main is asked how it keeps up, ten times a second.
        is_real: ticks of 25 fields with two books, about 700 bytes; ``pad`` is ignored.
        seconds: how long ticks come unless somebody says otherwise.
    """

    name: str
    about: str = ""
    clients: int = 500
    codes: int = 100
    per_client: int = 10
    rate: float = 500.0
    burst: int = 1
    zipf: float = 0.0
    pad: int = 60
    slow: int = 0
    storm: int = 0
    asking: int = 0
    watches_main: bool = False
    is_real: bool = False
    seconds: float = 4.0

    @property
    def rows_per_s(self) -> float:
        """Rows a second that the readers are due while every code ticks as often."""
        return self.rate * (self.clients - self.slow) * self.per_client / self.codes

    def code(self, index: int) -> str:
        """The code with this number, as clients and publishers spell it."""
        return f"sh{600_000 + index}"

    def watched(self, client: int) -> list[int]:
        """The numbers of the codes that a client watches."""
        return [(client * self.per_client + j) % self.codes for j in range(self.per_client)]

    def audience(self, clients: range) -> list[int]:
        """How many of ``clients`` watch each code and read what they get."""
        count = Counter(code for client in clients if client >= self.slow for code in self.watched(client))
        return [count[code] for code in range(self.codes)]

    def payload(self) -> str:
        """The tick: ``%s`` is the code; then, with two percent signs, last in two parts, a number and ``pt``.

        Every number keeps its length, so the tick's length does not change.
        """
        if self.is_real:
            return _REAL
        pad = "".join(chr(ord("a") + i % 26) for i in range(self.pad))
        return _PLAIN + (f',"x":"{pad}"}}' if pad else "}")

    def with_options(self, **options: "float | int | None") -> "Load":
        """This load with the options that are not None."""
        given = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(self, **given) if given else self  # type: ignore[arg-type]


LOADS = {
    load.name: load
    for load in (
        Load(name="watch", about="a calm market: one write per row"),
        Load(name="busy", about="a busy market", rate=4_000),
        Load(name="index", about="everybody watches one index", clients=2_000, codes=1, per_client=1, rate=100),
        Load(name="market", about="a wide, fast market", clients=1_000, codes=1_000, per_client=50, rate=8_000),
        Load(
            name="hose", about="many ticks that nobody here watches", clients=20, codes=5_000, per_client=50,
            rate=50_000,
        ),
        Load(
            name="real", about="ticks of 25 fields and two books, 700 bytes", clients=500, codes=1_000, per_client=20,
            rate=10_000, is_real=True,
        ),
        Load(
            name="subscribe", about="clients subscribe 1,000 codes during `hose`", clients=20, codes=5_000,
            per_client=50, rate=50_000, pad=450, asking=1_000, watches_main=True, seconds=20,
        ),
        Load(
            name="flood", about="more ticks than any market has", clients=20, codes=5_000, per_client=50, rate=200_000,
            watches_main=True,
        ),
        Load(
            name="surge", about="the same in bursts", clients=20, codes=5_000, per_client=50, rate=200_000,
            burst=20_000, watches_main=True,
        ),
        Load(name="storm", about="5,000 clients come at once while 500 are served", rate=1_000, storm=5_000, seconds=6),
        Load(
            name="stall", about="20 of 200 clients never read", clients=200, rate=1_000, pad=3_000, slow=20, seconds=30,
        ),
    )
}  # fmt: skip
