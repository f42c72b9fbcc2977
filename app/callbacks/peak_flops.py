"""Peak rates of matrix products, the denominator of MFU: dense bf16 with fp32 accumulation.

Vendors print the rate with 2:4 sparsity first, which is twice the dense one; MFU against it would be half of the truth.
Sources: NVIDIA's data sheets of each product (the dense column, or half of the sparse one), AMD's CDNA 3 white paper.
"""

import re
import time

import torch

from models.cpu.matmul import product

DENSE_BF16 = {  # words of the device's name -> FLOP/s; the first match counts, so longer names stand first
    "B300": 2.25e15,
    "GB300": 2.5e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "B100": 1.75e15,
    "GH200": 989.5e12,
    "H200 NVL": 835.5e12,
    "H200": 989.5e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,  # one of its two dies, which is one device
}


OTHER = re.compile(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b", re.IGNORECASE)  # behind a name: another chip, or part of one


def device_peak(name: str) -> float | None:
    """The dense bf16 peak in FLOP/s of a GPU by its name, or None if it is not in the table."""
    if OTHER.search(name):
        return None
    found = (peak for words, peak in DENSE_BF16.items() if re.search(rf"\b{re.escape(words)}\b", name, re.IGNORECASE))
    return next(found, None)


def measured_peak(size: int = 1024, seconds: float = 0.2) -> tuple[float, torch.dtype]:
    """FLOP/s of the fastest `size` x `size` product on this CPU with the threads torch uses now, and in which dtype."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            product(a, b)
            best = min(best, time.perf_counter() - begin)
        rates[dtype] = 2 * size**3 / best
    fastest = max(rates, key=rates.get)
    return rates[fastest], fastest


def peak_flops(device: torch.device) -> tuple[float | None, str]:
    """Return the peak in FLOP/s of one device, or None, and a sentence that says where it comes from."""
    if device.type == "cpu":
        peak, dtype = measured_peak()
        return (
            peak,
            f"MFU is against {peak / 1e12:.3f} TFLOP/s, the fastest matrix product ({dtype}) measured on this CPU.",
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = device_peak(name)
    if peak is None:
        return None, f"No MFU: the dense bf16 peak of {name} is not in the table (app/callbacks/peak_flops.py)."
    return peak, f"MFU is against {peak / 1e12:.0f} TFLOP/s, the dense bf16 peak of {name}."
