"""The benchmark behind ``tools/bench.py``: loads, the processes that make them, and what is measured.

``loads`` says what a load is. ``loader`` (clients), ``publisher`` (ticks) and ``baselines`` (other servers) are
programs of their own that import nothing from here. ``children`` starts and ends them, ``machine`` reads what the
kernel counts, ``measure`` makes one run of it all, ``report`` prints. ``costs`` and ``plots`` serve
docs/performance.md.
"""
