"""Quantization methods, one a file, behind the protocol of `methods.py`: importing the package registers them all."""

from compress.quantization.awq import Awq
from compress.quantization.gptq import Gptq
from compress.quantization.methods import METHODS, Quantizer
from compress.quantization.rtn import Rtn

__all__ = [
    "METHODS",
    "Awq",
    "Gptq",
    "Quantizer",
    "Rtn",
]
