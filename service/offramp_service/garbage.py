"""Python's garbage collector, which would hold everybody up for 100 ms, every now and then, to walk
through what is here to stay: libraries, models, the application; 200,000 objects.
"""

import gc

from offramp_model.memory import give_back_freed_memory


def leave_alone_what_stays() -> None:
    """Collect, and walk through what is left never again."""
    gc.collect()
    gc.freeze()


def collect_what_stayed() -> None:
    """After something that was to stay has gone after all, an old checkpoint: rooms are cycles, and
    weights do not count for the collector. It would come late or, to what is left alone, never.
    """
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    give_back_freed_memory()
