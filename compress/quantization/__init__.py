"""Quantization methods, one a file, behind the protocol of `quantizer.py`: importing the package registers them all."""

from compress.quantization.methods.awq import Awq
from compress.quantization.methods.fp8 import Fp8
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.int8 import Int8
from compress.quantization.methods.nf4 import Nf4
from compress.quantization.methods.product import ProductQuantization
from compress.quantization.methods.rtn import Rtn
from compress.quantization.methods.squeezellm import SqueezeLlm
from compress.quantization.quantizer import METHODS, Quantizer

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
