"""Quantization methods, one a file, behind the protocol of `methods.py`: importing the package registers them all."""

from compress.quantization.awq import Awq
from compress.quantization.fp8 import Fp8
from compress.quantization.gptq import Gptq
from compress.quantization.int8 import Int8
from compress.quantization.methods import METHODS, Quantizer
from compress.quantization.nf4 import Nf4
from compress.quantization.product import ProductQuantization
from compress.quantization.rtn import Rtn
from compress.quantization.squeezellm import SqueezeLlm

__all__ = [
    "METHODS",
    "Awq",
    "Fp8",
    "Gptq",
    "Int8",
    "Nf4",
    "ProductQuantization",
    "Quantizer",
    "Rtn",
    "SqueezeLlm",
]
