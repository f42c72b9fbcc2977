"""Attention mechanisms, one a file, behind the protocol of `protocol.py`."""

from models.attention.convolution import Convolution
from models.attention.full import Full
from models.attention.protocol import ATTENTIONS, Context, Place
from models.attention.retention import Retention
from models.attention.window import Window

__all__ = ["ATTENTIONS", "Context", "Convolution", "Full", "Place", "Retention", "Window"]
