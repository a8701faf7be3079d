"""The benchmark behind ``tools/bench.py``: loads, the processes that make them, and what is measured.

``loads`` says what a load is. ``loader`` (clients), ``asker`` (clients that subscribe again and again), ``publisher``
(ticks) and ``baselines`` (other servers) are programs of their own that import nothing from here. ``children`` starts
and ends them, ``machine`` reads what the kernel counts, ``own_figures`` what the server does, ``gc_probe`` and
``pauses`` watch its garbage collector; ``measure`` makes one run of it all, ``figures`` computes, ``report`` prints.
``costs`` and ``plots`` serve docs/performance.md. ``page_frames`` and ``page_hour`` are programs of their own that
measure the ticker page in a Chromium; ``page_stage`` starts what they need.
"""
