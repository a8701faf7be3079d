"""How rarely Python's garbage collector interrupts main and its workers.

Nearly everything dies by reference count: links, sessions and outboxes break their circles when
they close, ticks have none. So what is there at start is frozen, and the collector looks at the
young after 50,000 new containers instead of 700, at the old a thousand times less often.
Until then it is off: imports leave hardly any garbage, and looking for it took a sixth of their time.
Figures: docs/performance.md.
"""

import gc

__all__ = ["quiet_collector"]


def quiet_collector() -> None:
    """Collect once, freeze what is left, and look rarely from now on; a collector that is off is switched on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
