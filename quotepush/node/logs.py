"""One format of log lines for main and its workers, on standard error."""

import logging
import sys
import time

from aiohttp.http_exceptions import HttpProcessingError

__all__ = ["set_up_logging"]


def set_up_logging(level: str, process: str) -> None:
    """Log from ``level`` upwards, each line with UTC time, level and the process it comes from."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ %(levelname)-7s {process}: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(_is_ours)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("quotepush").setLevel(level.upper())


def _is_ours(record: logging.LogRecord) -> bool:
    """Drop what is no HTTP: aiohttp answers it with 400, but logs it as an error with a traceback, as anybody likes."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
