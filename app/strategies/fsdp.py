"""FSDP2 (`torch.distributed.fsdp.fully_shard`) over every process of a run."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from app.strategies.checkpoint_io import (
    METADATA,
    SHARDS,
    appearing_whole,
    named,
    numbered,
    read_checkpoint,
    read_metadata,
    with_sharded,
    without_sharded,
)
from models.errors import UserError
from models.io import sha256_of


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: parameters, gradients and optimizer states lie in shards on all ranks.

    Weights that are trained stay fp32; blocks gather them in the task's compute dtype, gradients are reduced in fp32.

    Args:
        data_parallel_size: ranks that share the batch; by default all of them.
        save_distributed_checkpoint: a checkpoint is a folder to which each rank writes its shards (true), or one file
            that rank 0 writes (false).
        process_group_backend: by default nccl on GPUs and gloo on CPU.
    """

    def __init__(
        self,
        data_parallel_size: int | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size="auto" if data_parallel_size is None else data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        # Lightning's "auto" would be one data-parallel rank per node, and it is read before the world size is known
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Shard `model` in place, block by block and then the rest; embedding, norm and (tied) head are one group.

        Raises:
            UserError: a reversible model: its backward goes through the blocks from the inside, past the places where
                shards are gathered.
        """
        if model.config.residual == "reversible":
            raise UserError(
                "the fsdp strategy cannot train a model with residual: reversible, which computes its blocks anew in "
                "the backward; train it with ddp or on one device, or give residual: standard"
            )
        for block in model.blocks:
            self._shard(block, dtype)
        self._shard(model, dtype)
        register_fsdp_forward_method(model, "hidden")  # what distillation calls

    def shard_objective(self, objective: nn.Module, dtype: torch.dtype) -> None:
        """Shard the trained parameters of a distillation's objective, if it has any, as one group of their own."""
        if next(objective.parameters(), None) is not None:
            self._shard(objective, dtype)

    def _shard(self, module: nn.Module, dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fully_shard(module, mesh=self.device_mesh["data_parallel"], mp_policy=policy)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Keep gradients on their rank for the micro-batches of an accumulation that no optimizer step follows."""
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: shards by parameter name, or on rank 0 all of it by number."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # from LightningOptimizer
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return numbered(state) if whole and self.global_rank == 0 else state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load shards, or a file that any other strategy wrote, of which every rank takes its part."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return self._load_shards(path)
        checkpoint = read_checkpoint(path)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, named(state, order), options=options)
        return checkpoint

    def _load_shards(self, folder: Path) -> dict[str, Any]:
        """Load what this rank needs of every sharded tensor, whichever ranks wrote them; return all the rest."""
        checkpoint = read_metadata(folder)
        states = {"state_dict": get_model_state_dict(self.model)}
        for i, optimizer in enumerate(self.optimizers):
            states[f"optimizer_{i}"] = get_optimizer_state_dict(self.model, optimizer)
        tensors: dict[str, DTensor] = {}
        without_sharded(states, tensors)
        sharded.load(tensors, storage_reader=sharded.HuggingFaceStorageReader(str(folder)))
        with_sharded(checkpoint, tensors)
        self.model.load_state_dict(checkpoint.pop("state_dict"), strict=self.lightning_module.strict_loading)
        options = StateDictOptions(cpu_offload=True)
        for i, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, checkpoint.pop(f"optimizer_{i}"), options=options)
        return checkpoint

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save in shards; the folder takes its name when every rank has written."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(str(filepath)))
        for i, state in enumerate(checkpoint.pop("optimizer_states", [])):
            checkpoint[f"optimizer_{i}"] = state
        tensors: dict[str, DTensor] = {}
        rest = without_sharded(checkpoint, tensors)
        if self.global_rank == 0:
            with appearing_whole(path) as temporary:
                temporary.mkdir()
                self.barrier()
                rest[SHARDS] = self._save_shards(tensors, temporary)
                with (temporary / METADATA).open("wb") as file:
                    torch.save(rest, file)
                    file.flush()
                    os.fsync(file.fileno())
        else:
            self.barrier()
            self._save_shards(tensors, path.with_name(f".{path.name}.writing"))
        self.barrier()

    def _save_shards(self, tensors: dict[str, DTensor], folder: Path) -> dict[str, str]:
        """Save this rank's part of the tensors; returns the SHA-256 of every rank's file, each computed by one rank."""
        sharded.save(tensors, storage_writer=sharded.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        files = sorted(folder.glob("*.safetensors"))[self.global_rank :: self.world_size]
        hashes: list[dict[str, str]] = [{}] * self.world_size
        distributed.all_gather_object(hashes, {file.name: sha256_of(file) for file in files})
        return {name: digest for own in hashes for name, digest in own.items()}
