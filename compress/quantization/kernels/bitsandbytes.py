"""The package `bitsandbytes`, imported when a layer first asks for one of its kernels."""

import logging
from functools import cache

INSTALL = "needs bitsandbytes: pip install 'espalier-lm[bitsandbytes]'"


@cache
def missing() -> str:
    """Why the package's kernels cannot be used; empty when they can."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says at length which optional kernels it looked for
    try:
        import bitsandbytes  # noqa: F401  (optional, slow to import: only here)
    except (ImportError, OSError):  # a library of its own that does not load is as good as none
        return INSTALL
    finally:
        logger.setLevel(level)
    return ""


def has_avx512_bf16() -> bool:
    """Whether the package's fused 4-bit product runs on this processor."""
    if missing():
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())
