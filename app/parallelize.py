"""Parallelism of a model, applied in one fixed order: checkpointing, compile, FSDP2.

    activation checkpointing -> torch.compile -> FSDP2

Checkpointing calls blocks again in the backward, so it stands outside of what is compiled; sharding comes last, as it
replaces parameters by shards and hooks itself around the blocks as they are then.
"""

from typing import Any

import torch

from app.activation_checkpointing import ActivationCheckpointing
from app.strategies import FSDP2
from app.tasks.compile import Compile
from models.backbone import Backbone


def parallelize(
    model: Backbone,
    *,
    checkpointing: ActivationCheckpointing | None,
    compile: Compile | None,
    strategy: Any,
    dtype: torch.dtype,
) -> None:
    """Apply each step that was asked for to `model`, in place; its parameters keep their names.

    Args:
        model: as it was built.
        checkpointing: which activations are computed again.
        compile: what torch.compile is applied to.
        strategy: Lightning's; only `FSDP2` changes the model.
        dtype: in which sharded parameters are gathered.
    """
    if checkpointing is not None:
        checkpointing.apply(model, compiled=compile is not None)
    if compile is not None:
        compile.apply(model)
    if isinstance(strategy, FSDP2):
        strategy.shard(model, dtype)
