"""Packed models as compressed-tensors files (`pack-quantized`), which `transformers` and vLLM load.

Each packed layer NAME becomes

    NAME.weight_packed   (N, ceil(K b / 32)) int32: codes of b bits, offset by 2^(b-1), little-endian along K
    NAME.weight_scale    (N, G) in the dtype of the model
    NAME.weight_shape    (2,) int64: N, K

which is our own storage read as int32. The scheme stands in `config.json` under `quantization_config`. N outputs,
K inputs, G groups a row, b bits.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.quantization.affine import IntFormat, Quantized
from compress.quantization.formats.bit_packing import pack
from compress.quantization.formats.linear import PackedIntEmbedding, PackedIntLinear
from models.config import ModelConfig
from models.errors import UserError
from models.families import Family, Transform, dense, family_of, file_tensors, write_folder
from models.io import writing
from models.transformer import Transformer

# not 3: its packing changed in 2026 (compressed-tensors pull request 715), and versions misread each other
BITS = (2, 4, 8)


def export_compressed_tensors(
    model: Transformer, out: str | Path, source: str | Path | None = None, overwrite: bool = False
) -> list[str]:
    """Write a quantized model of a Hugging Face family as a compressed-tensors folder.

    Args:
        model: with linear layers of packed integers: symmetric, 2, 4 or 8 bits, all alike. The dtype of its dense
            weights is that of the export.
        out: the folder to write; it appears whole or not at all.
        source: the folder whose tokenizer files go along.
        overwrite: whether `out` may be replaced.

    Returns:
        What a person should know about the export, a sentence each: what had to be stored dense.

    Raises:
        UserError: what the format cannot hold, with the reason.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedIntLinear)}
    family, values = family_of(model.config)
    dtype = next(model.parameters()).dtype  # packed weights are buffers
    format = _check(packed, dtype)
    check_rows(family, model.config, packed)
    names = family.names(model.config)
    dense_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ignore = list(dict.fromkeys(names[f"{name}.weight"].removesuffix(".weight") for name in dense_layers))
    if model.head is None:
        ignore.append(
            family.head.removesuffix(".weight")
        )  # transformers has a linear layer there, tied to the embedding
    values["quantization_config"] = scheme(format, ignore)
    with writing(out, overwrite) as directory:
        write_folder(directory, values, file_tensors(model, family, pack_quantized), dtype, source)
    notes = []
    if isinstance(model.embedding, PackedIntEmbedding):
        notes.append("the embedding is stored dense: compressed-tensors packs linear layers only")
    if format.dtype != dtype:
        notes.append(f"the scales are stored as {dtype}, the dtype of the model, not as {format.scale_dtype}")
    return notes


def uniform(packed: dict[str, PackedIntLinear], target: str) -> IntFormat:
    """The one format of all packed layers, in whole groups.

    Raises:
        UserError: no packed layer, several formats, or a group that is shorter; `target` is the file format's name.
    """
    if not packed:
        raise UserError("the model has no linear layer of packed integers; export it with --format transformers")
    formats = {module.format for module in packed.values()}
    if len(formats) > 1:
        listed = "; ".join(sorted(map(str, formats)))
        raise UserError(f"{target} export needs the same format in all packed layers, got {listed}")
    format = formats.pop()
    for name, module in packed.items():
        width = module.in_features
        if not isinstance(format.group_size, str) and width % format.group_size:
            raise UserError(
                f"{name} has {width} inputs, no multiple of the group size {format.group_size}: its last "
                f"group is shorter, which {target} does not have"
            )
    return format


def check_rows(family: Family, config: ModelConfig, packed: Iterable[str]) -> None:
    """Refuse packed layers whose rows the files of the family do not hold as rows."""
    names = family.names(config)
    for name in packed:
        if not family.transform(names[f"{name}.weight"], config).row_by_row:
            raise UserError(
                f"{family.model_type} files hold {name} transposed, for which packed files have no form; export it "
                "with --format transformers"
            )


def joined(modules: Sequence[PackedIntLinear], transform: Transform) -> Quantized:
    """Packed matrices as the one of the file; with several, a scale of a whole matrix becomes one for each row."""
    parts = [module.quantized() for module in modules]
    if len(parts) == 1:
        return parts[0]
    format, width = parts[0].format, parts[0].codes.shape[1]
    groups = -(-width // format.group(width))
    scales = transform.join([part.scales.expand(len(part.codes), groups) for part in parts])
    zeros = None
    if parts[0].zeros is not None:
        zeros = transform.join([part.zeros.expand(len(part.codes), groups) for part in parts])
    return Quantized(transform.join([part.codes for part in parts]), scales, zeros, format)


def _check(packed: dict[str, PackedIntLinear], dtype: torch.dtype) -> IntFormat:
    format = uniform(packed, "compressed-tensors")
    if not format.symmetric:
        raise UserError(
            "asymmetric weights cannot be exported to compressed-tensors: transformers cannot load their zero points; "
            "--format gptq has them"
        )
    if format.bits not in BITS:
        raise UserError(
            f"{format.bits}-bit weights cannot be exported: compressed-tensors has packed them in two ways; "
            "--format gptq has one"
        )
    if dtype not in (torch.float32, format.dtype):
        raise UserError(f"scales in {format.scale_dtype} do not fit a model in {dtype}: export with --dtype float32")
    return format


def scheme(format: IntFormat, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of linear layers in `format`, except those in `ignore`."""
    size = format.group_size
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": size if isinstance(size, str) else "group",
        "group_size": None if isinstance(size, str) else size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def pack_quantized(
    name: str, modules: Sequence[nn.Module], transform: Transform, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The three tensors of packed layers whose weight is `name` in the file; the dense one of a packed embedding."""
    if not isinstance(modules[0], PackedIntLinear):
        yield from dense(name, modules, transform, dtype)
        return
    codes, scales, _, format = joined(modules, transform)
    if format.group_size == "tensor" and len(modules) > 1:
        raise UserError(
            f"{name} holds {len(modules)} matrices with a scale each, and the group size tensor means one; export it "
            "with --format gptq"
        )
    yield f"{name}_packed", words(codes, format.bits)
    yield f"{name}_scale", scales.to(dtype).view(-1 if format.group_size == "tensor" else scales.shape)
    yield f"{name}_shape", torch.tensor(codes.shape)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 packed as (N, ceil(K b / 32)) int32."""
    packed = pack(codes, bits)  # (N, bytes)
    return F.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
