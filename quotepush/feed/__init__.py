"""Ticks into Redis: a simulated market, a recording, or lines from another program.

A world of its own beside the server: it knows the log, channels and ticks (docs/protocol.md) and imports nothing that
serves clients. ``listing`` → ``simulate`` and ``replay`` make ticks and are pure, ``sources`` gives them their time,
``publish`` sends them, ``run`` joins the two. `run_feed` is the way in; ``tools/feed.py`` is its command line.
"""

from quotepush.feed.run import FeedOptions, FeedSummary, JsonLines, Recording, Simulation, run_feed

__all__ = ["FeedOptions", "FeedSummary", "JsonLines", "Recording", "Simulation", "run_feed"]
