"""Activation checkpointing: the backward computes activations again in place of keeping them (arXiv 1604.06174)."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.backbone import Backbone
from models.errors import UserError

_ATEN = torch.ops.aten
_ATTENTION = "attention is quadratic in the length"
KEPT = {  # operations whose results `CheckpointOperations` keeps -> why: they cost more to compute than to hold
    _ATEN.mm.default: "a matrix product",
    _ATEN.addmm.default: "a matrix product",
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _ATTENTION,
    _ATEN._scaled_dot_product_flash_attention.default: _ATTENTION,
    _ATEN._scaled_dot_product_efficient_attention.default: _ATTENTION,
    _ATEN._scaled_dot_product_cudnn_attention.default: _ATTENTION,
}


class ActivationCheckpointing(ABC):
    """Base of activation checkpointing policies: the activations that are recomputed in the backward."""

    def apply(self, model: Backbone, compiled: bool) -> None:
        """Let the model run its blocks so. Raises UserError where it keeps no activations anyway.

        compiled: whether its blocks are going to be compiled.
        """
        if model.reversible:
            raise UserError(
                "a model with residual: reversible keeps no activations of its blocks, and needs no activation "
                "checkpointing; leave model.activation_checkpointing out"
            )
        model.recompute = self.recompute(compiled)

    @abstractmethod
    def recompute(self, compiled: bool) -> Any:
        """A callable (block, *arguments) that runs the block."""


class CheckpointBlocks(ActivationCheckpointing):
    """Keep what enters each block, and compute all else again: memory of one block, one more forward."""

    def recompute(self, compiled: bool) -> Any:
        return partial(checkpoint, use_reentrant=False)


class CheckpointOperations(ActivationCheckpointing):
    """Keep the results of matrix products and of attention (`KEPT`), and compute the element-wise rest again."""

    def recompute(self, compiled: bool) -> Any:
        if compiled:
            raise UserError(
                "CheckpointOperations sees the operations of blocks that are not compiled; set model.compile to null, "
                "or take CheckpointBlocks"
            )
        return partial(
            checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
        )


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
