"""Memory that training frees stays with the process, for the next step.

glibc gives large blocks back to the kernel when they are freed. A training step on CPU allocates the same ones again, and
every 4 KiB of them then costs a page fault: 14,000 to 48,000 faults in a step of the benchmark's 6.8M-parameter model, 5
to 10 % of its time (tests/benchmarks/RESULTS.md). The documented tunables of mallopt(3) turn that off; allocators that
are preloaded instead (jemalloc, tcmalloc) do so by themselves, and other systems have no such call.
"""

import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt, from malloc.h
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 * 2**20, MMAP_THRESHOLD: 2**30}  # bytes


def keep_freed_memory() -> bool:
    """Set glibc's tunables for this process. Returns whether it could: not where a person has set them, nor elsewhere."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) for parameter, value in SETTINGS.items())
