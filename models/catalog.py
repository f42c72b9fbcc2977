"""Imports every mechanism of the package, so that the registries (models/specs.py) know it by name."""
# ruff: noqa: F401

from models import experts, feedforward, mixture_of_depths, norms, positions
from models.attention import (
    bigbird,
    convolution,
    fixed,
    full,
    hierarchical,
    linformer,
    longformer,
    lsh,
    recursive,
    retention,
    selective,
    single_heads,
    strided,
    top_k,
    transient_global,
    window,
)
from models.heads import classifier, language_model
from models.inputs import tokens
