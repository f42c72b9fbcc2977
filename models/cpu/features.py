"""CPU features for bf16 as Linux lists them, and a guard for oneDNN: AMX without its CPUID leaf.

Some hypervisors pass the AMX flags of the processor through and cut CPUID off below leaf 0x1D, which describes the
tile palettes. oneDNN (behind every bf16 matrix product of PyTorch on CPU) then configures its tiles from zeros, and the
first product kills the process with an illegal instruction. Capping oneDNN one step below AMX keeps the native bf16 and
fp16 vector instructions.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

TILE_PALETTE_LEAF = 0x1D


def _fields(cpuinfo: str) -> dict[str, str]:
    """CPU flags of the first processor in the text of /proc/cpuinfo."""
    lines = (line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def isa_cap(cpuinfo: str) -> str | None:
    """The `ONEDNN_MAX_CPU_ISA` that this processor needs, or None where oneDNN may use everything.

    cpuinfo: the text of Linux' /proc/cpuinfo (empty on other systems).
    """
    fields = _fields(cpuinfo)
    flags = fields.get("flags", "").split()
    if "amx_tile" not in flags or int(fields.get("cpuid level", TILE_PALETTE_LEAF)) >= TILE_PALETTE_LEAF:
        return None
    return "AVX512_CORE_FP16" if "avx512_fp16" in flags else "AVX512_CORE_BF16"


def has_bf16(cpuinfo: str) -> bool:
    """Whether the processor multiplies in bf16, by the text of Linux' /proc/cpuinfo."""
    fields = _fields(cpuinfo)
    flags = {flag for key in ("flags", "Features") for flag in fields.get(key, "").split()}  # x86, Arm
    return not flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> str:
    """CPU flags of this machine; empty on other systems than Linux."""
    return path.read_text() if path.is_file() else ""


def guard_onednn(environment: MutableMapping[str, str] = os.environ, path: Path = Path("/proc/cpuinfo")) -> None:
    """Set the cap unless the person has set one. Takes effect as long as no matrix product has run in this process."""
    if "ONEDNN_MAX_CPU_ISA" in environment or "DNNL_MAX_CPU_ISA" in environment:
        return
    if cap := isa_cap(read_cpuinfo(path)):
        environment["ONEDNN_MAX_CPU_ISA"] = cap
