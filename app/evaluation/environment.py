"""Measurement environment: machine, threads, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("espalier-lm", "torch", "lightning", "transformers", "tokenizers", "safetensors", "numpy")


def device_name(device: str | torch.device) -> str:
    """The device as a person would call it: the GPU's name, or `cpu` with the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({names[0] if names else platform.machine()})"


def environment(device: str | torch.device = "cpu") -> dict:
    """Machine and versions, as JSON values; holds no path, user or host name."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
