"""The outputs of the simulation that stand in a document, behind the commands that print them.

Law: whatever stands behind such a command is what it prints, and the rest of the document stays as it is.
"""

import re
import shlex
from collections.abc import Callable, Sequence

__all__ = ["refreshed"]

# A command in a block of its own, and behind it a block or a table.
_COMMAND = re.compile(
    r"(^```sh\npython tools/scaling\.py (?P<arguments>[^\n]*)\n```\n\n)(?P<shown>```text\n.*?^```\n|(?:^\|[^\n]*\n)+)",
    re.M | re.S,
)


def refreshed(text: str, printed: Callable[[Sequence[str]], str]) -> str:
    """Return the document with what each of its commands prints now.

    Args:
        printed: what the program prints for these arguments.
    """

    def renew(found: re.Match[str]) -> str:
        output = printed(shlex.split(found["arguments"]))
        return found[1] + (f"```text\n{output}```\n" if found["shown"].startswith("`") else output)

    return _COMMAND.sub(renew, text)
