"""Sums that are taken as exactly as they are written, also where autocast would round what goes into them."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products on `device` in the dtype of their factors; on the meta device, which has no autocast, nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
