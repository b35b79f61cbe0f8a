"""How the process's allocator treats memory that was freed. Knows nothing about what it is for."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of handing it back; returns whether it could be told.

    A batch that shrinks from exit to exit asks for another size of hidden states each time. glibc
    takes large ones from the kernel and gives them back, a page fault for each 4 KiB: 577 a batch
    of 32 texts at speed-up 2, and 7 % of its time (`docs/results/engine.md`). Call it before the
    first batch; up to `KEPT_BYTES` stay with the process, in threads in pieces of less than 64 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return False
    return all(bool(mallopt(one, KEPT_BYTES)) for one in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def give_back_freed_memory() -> bool:
    """Hand back to the kernel what is free after all, once; returns whether there was any.

    For after something large has gone for good, a model: what it held lies in arenas of threads
    that are no more, where nobody would use it again. It takes some milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
