"""Small integers at their true size: 2, 3, 4 or 8 bits each, in bytes that safetensors holds.

A row of codes is one little-endian bit stream: code i occupies bits i * b .. i * b + b - 1. For 2, 4 and 8 bits the
bytes, read as little-endian int32, are the words of compressed-tensors' `pack-quantized`. At 3 bits, 8 codes fill 3
bytes. A row ends on a byte boundary, at 3 bits on a boundary of 3 bytes; the padding holds zeros and counts as stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _word(bits: int) -> tuple[int, int]:
    """Codes in one word, and bytes of one word."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of a packed row of `width` codes."""
    codes, size = _word(bits)
    return -(-width // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (N, K) uint8, each below 2^bits, as (N, packed_bytes(K, bits)) uint8."""
    if bits == 8:
        return codes.contiguous()
    count, size = _word(bits)
    rows, width = codes.shape
    codes = F.pad(codes, (0, -width % count)).reshape(rows, -1, count)  # (N, words, count)
    if size == 1:
        packed = codes[..., 0].clone()
        for i in range(1, count):
            packed |= codes[..., i] << (bits * i)
        return packed
    word = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
    for i in range(count):
        word |= codes[..., i].int() << (bits * i)
    return torch.stack([(word >> (8 * i)) & 255 for i in range(size)], dim=-1).to(torch.uint8).view(rows, -1)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes (N, width) uint8 of a packed matrix."""
    if bits == 8:
        return packed
    count, size = _word(bits)
    rows = packed.shape[0]
    word = packed.view(rows, packed.shape[1] // size, size)  # (N, words, bytes)
    if size > 1:
        word = sum(word[..., i].int() << (8 * i) for i in range(size))[..., None]  # (N, words, 1)
    codes = torch.empty(rows, word.shape[1], count, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        codes[..., i] = (word[..., 0] >> (bits * i)) & (2**bits - 1)
    return codes.flatten(1)[:, :width]
