"""Memory that is freed stays with the process, for the next step of a training or the next batch of a calibration.

glibc gives large blocks back to the kernel when they are freed. A training step on CPU allocates the same ones again,
and every 4 KiB of them then costs a page fault: 14,000 to 48,000 in a step of the benchmark's model of 6.8M weights, 5
to 10 % of its time, and 15 % of GPTQ's on a model of that size (tests/benchmarks/RESULTS.md). The tunables of
mallopt(3) turn that off; allocators that are preloaded instead (jemalloc, tcmalloc) do so by themselves, and other
systems have no such call.
"""

import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt, from malloc.h
# bytes; older versions of glibc take no MMAP_THRESHOLD above 32 MiB, and the other two alone would make it slower
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 * 2**20}
ANY_SIZE, MATRICES_APART = 2**30, 2**25  # bytes, values of MMAP_THRESHOLD


def keep_freed_memory(largest: int = ANY_SIZE) -> bool:
    """Set glibc's tunables for this process, and return whether it could: not where a person has set them.

    Blocks above `largest` bytes still go back. With `MATRICES_APART` the heap does not grow with the depth of a model
    that is compressed layer by layer, as it does where the large matrices of a layer leave holes between what stays.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) for parameter, value in {MMAP_THRESHOLD: largest, **SETTINGS}.items())
