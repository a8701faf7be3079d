"""The instruments of a simulated market: well-known ones first, then as many invented ones as wanted.

Invented codes lie in ranges that no exchange has handed out (606000 to 609999.SH, 004000 to 009999.SZ, 688820 to
688979.SH, 302500 to 302999.SZ, five letters beginning with X), so that an invented name never stands on a real code.
Prices of the well-known ones are of the right size, not of any day.
"""

import random
from typing import NamedTuple

__all__ = ["MAX_CODES", "PINNED", "Listed", "listed"]

PINNED = ("600519.SH", "AAPL")
"""The codes that are in every listing, however short: one of each market."""

MAX_CODES = 100_000
"""The longest listing; the letters of invented tickers would last for more, nobody needs them."""


class Listed(NamedTuple):
    """One instrument as it stands in the listing, before its first tick."""

    code: str
    name: str
    price_cents: int
    lot: int
    """Shares a trade is a multiple of: 100 for A-shares, 1 elsewhere."""
    limit_tenths: int
    """Daily price limit in tenths of the previous close: 1 main board, 2 growth boards, 0 none."""


_A_SHARES = """
600519.SH 贵州茅台 1488.00|000001.SZ 平安银行 11.46|300750.SZ 宁德时代 262.80|601318.SH 中国平安 52.35
600036.SH 招商银行 43.18|000858.SZ 五粮液 128.60|002594.SZ 比亚迪 106.42|601398.SH 工商银行 7.28
688981.SH 中芯国际 94.70|300059.SZ 东方财富 23.95|601288.SH 农业银行 6.82|601939.SH 建设银行 9.16
601988.SH 中国银行 5.47|600030.SH 中信证券 28.34|600276.SH 恒瑞医药 65.20|000333.SZ 美的集团 74.88
000651.SZ 格力电器 44.73|600900.SH 长江电力 28.05|601857.SH 中国石油 8.92|600028.SH 中国石化 5.81
601088.SH 中国神华 38.44|601899.SH 紫金矿业 20.16|002415.SZ 海康威视 30.27|688041.SH 海光信息 151.30
688256.SH 寒武纪 702.50|688111.SH 金山办公 301.66|300760.SZ 迈瑞医疗 228.90|300124.SZ 汇川技术 65.41
300015.SZ 爱尔眼科 13.02|600887.SH 伊利股份 27.96|000568.SZ 泸州老窖 124.70|600809.SH 山西汾酒 199.80
002304.SZ 洋河股份 69.55|600309.SH 万华化学 62.13|601012.SH 隆基绿能 16.34|600438.SH 通威股份 20.47
002475.SZ 立讯精密 40.22|000725.SZ 京东方A 4.09|000002.SZ 万科A 6.78|600104.SH 上汽集团 17.12
601127.SH 赛力斯 131.40|601633.SH 长城汽车 23.06|000063.SZ 中兴通讯 33.29|600050.SH 中国联通 5.43
601728.SH 中国电信 7.41|600941.SH 中国移动 109.85|601668.SH 中国建筑 5.66|600585.SH 海螺水泥 24.18
600031.SH 三一重工 19.07|601766.SH 中国中车 7.32|600019.SH 宝钢股份 7.04|601919.SH 中远海控 15.53
601111.SH 中国国航 7.63|600029.SH 南方航空 5.98|601006.SH 大秦铁路 6.52|601816.SH 京沪高铁 5.61
600690.SH 海尔智家 26.25|002714.SZ 牧原股份 43.11|300498.SZ 温氏股份 17.08|002352.SZ 顺丰控股 42.90
600436.SH 片仔癀 204.60|000538.SZ 云南白药 56.14|603259.SH 药明康德 67.80|603288.SH 海天味业 39.72
601166.SH 兴业银行 22.37|600000.SH 浦发银行 12.48|601601.SH 中国太保 35.20|601628.SH 中国人寿 39.06
300274.SZ 阳光电源 75.33|300308.SZ 中际旭创 141.20|300502.SZ 新易盛 118.75|002230.SZ 科大讯飞 47.92
002371.SZ 北方华创 418.00|688012.SH 中微公司 189.40|688599.SH 天合光能 15.26|601138.SH 工业富联 22.35
603986.SH 兆易创新 121.10|600016.SH 民生银行 4.12|601328.SH 交通银行 7.55|600048.SH 保利发展 8.63
"""

_US_SHARES = """
AAPL Apple 228.52|MSFT Microsoft 426.10|NVDA NVIDIA 131.76|SPY SPDR S&P 500 ETF 571.30|AMZN Amazon.com 187.45
TSLA Tesla 249.02|META Meta Platforms 563.33|GOOGL Alphabet A 165.14|AVGO Broadcom 172.90
BRK.B Berkshire Hathaway B 456.80
QQQ Invesco QQQ Trust 487.20|AMD Advanced Micro Devices 156.25|JPM JPMorgan Chase 211.48|LLY Eli Lilly 905.60
V Visa 277.35|UNH UnitedHealth 588.10|XOM Exxon Mobil 120.44|MA Mastercard 495.70|COST Costco 889.15
HD Home Depot 405.22|PG Procter & Gamble 171.60|WMT Walmart 80.25|NFLX Netflix 708.90|JNJ Johnson & Johnson 161.75
BAC Bank of America 39.92|CRM Salesforce 274.80|ORCL Oracle 170.65|ABBV AbbVie 195.30|KO Coca-Cola 70.84
CVX Chevron 150.28|MRK Merck 111.40|PEP PepsiCo 168.90|ADBE Adobe 510.25|CSCO Cisco 53.10|ACN Accenture 354.60
MCD McDonald's 303.45|IBM IBM 226.12|GE GE Aerospace 188.36|DIS Walt Disney 95.54|QCOM Qualcomm 168.70
TXN Texas Instruments 204.33|INTC Intel 23.41|VZ Verizon 44.05|T AT&T 21.78|PFE Pfizer 28.66|CAT Caterpillar 391.20
GS Goldman Sachs 496.15|MS Morgan Stanley 105.34|BA Boeing 152.88|NKE Nike 83.25|SBUX Starbucks 96.12
UBER Uber 75.40|PLTR Palantir 40.02|F Ford Motor 10.58|GM General Motors 46.30|C Citigroup 62.85|WFC Wells Fargo 56.70
AIG American International Group 73.45|PYPL PayPal 78.55|BABA Alibaba ADR 106.12|PDD PDD Holdings ADR 134.81
JD JD.com ADR 40.00|NIO NIO ADR 6.68|MU Micron 104.20|ARM Arm Holdings ADR 143.10|COIN Coinbase 178.20
"""

_A_NAME_FIRST = "东华海天金新中恒江泰瑞宏光盛远科丰龙银长"
_A_NAME_SECOND = "润达源信和安泽宇创嘉森景润航锐康禾域岳辰"
_A_NAME_LAST = ("科技", "股份", "电子", "医药", "材料", "能源", "智能", "重工", "食品", "环保")
_US_NAME_FIRST = ("Amber", "Birch", "Cobalt", "Delta", "Elm", "Falcon", "Granite", "Harbor", "Indigo", "Juniper")
_US_NAME_SECOND = ("field", "stone", "bridge", "wood", "ridge", "water", "gate", "crest", "port", "view")
_US_NAME_LAST = ("Energy", "Bancorp", "Therapeutics", "Software", "Foods", "Logistics", "Materials", "Networks")
_LETTERS = "ABCDEGHIJKLMNOPRSTUVZ"


def listed(count: int, seed: int) -> list[Listed]:
    """Return ``count`` instruments, the most traded first, both markets mixed; the same ones for the same seed.

    The two of `PINNED` are the first two. A longer listing of the same seed begins with the shorter one.

    Raises:
        ValueError: ``count`` is below 2 or above `MAX_CODES`.
    """
    if not len(PINNED) <= count <= MAX_CODES:
        raise ValueError(f"a listing has {len(PINNED)} to {MAX_CODES} codes, not {count}")
    a_shares, us_shares = _read(_A_SHARES), _read(_US_SHARES)
    known = [one for pair in zip(a_shares, us_shares, strict=False) for one in pair]
    shorter = min(len(a_shares), len(us_shares))
    known += a_shares[shorter:] + us_shares[shorter:]
    if count <= len(known):
        return known[:count]
    return known + _invented(count - len(known), seed)


def _read(table: str) -> list[Listed]:
    """Read a table above: code, name, price, parted by spaces; names may hold spaces."""
    found = []
    for entry in table.replace("\n", "|").strip("|").split("|"):
        code, rest = entry.split(" ", 1)
        name, price = rest.rsplit(" ", 1)
        found.append(_entry(code, name, round(float(price) * 100)))
    return found


def _entry(code: str, name: str, price_cents: int) -> Listed:
    if not code[0].isdigit():
        return Listed(code, name, price_cents, 1, 0)
    # Growth boards (688, 689, 300 to 302) move by up to 20 % a day, the main boards by 10 %.
    growth = code.startswith(("688", "689", "300", "301", "302"))
    return Listed(code, name, price_cents, 100, 2 if growth else 1)


def _invented(count: int, seed: int) -> list[Listed]:
    rng = random.Random(f"listing {seed}")
    a_codes = [f"{n}.SH" for n in range(606000, 610000)] + [f"{n:06}.SZ" for n in range(4000, 10000)]
    a_codes += [f"{n}.SH" for n in range(688820, 688980)] + [f"{n}.SZ" for n in range(302500, 303000)]
    rng.shuffle(a_codes)
    # A permutation of 21^4 tickers without holding them: the step is coprime to their number.
    tickers, step, at = len(_LETTERS) ** 4, 100_003, rng.randrange(len(_LETTERS) ** 4)
    found = []
    for n in range(count):
        if n % 2 == 0 and a_codes:
            name = rng.choice(_A_NAME_FIRST) + rng.choice(_A_NAME_SECOND) + rng.choice(_A_NAME_LAST)
            found.append(_entry(a_codes.pop(), name, round(100 * min(max(rng.lognormvariate(2.7, 0.8), 2), 500))))
        else:
            at = (at + step) % tickers
            rest, code = at, "X"
            for _ in range(4):
                rest, letter = divmod(rest, len(_LETTERS))
                code += _LETTERS[letter]
            name = f"{rng.choice(_US_NAME_FIRST)}{rng.choice(_US_NAME_SECOND)} {rng.choice(_US_NAME_LAST)}"
            found.append(_entry(code, name, round(100 * min(max(rng.lognormvariate(3.5, 0.9), 1), 2000))))
    return found
