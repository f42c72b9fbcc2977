"""Packed models as GPTQ files of version 2 (`gptq_v2`), which GPTQModel loads, and through it `transformers`.

Each packed layer NAME becomes, with codes and zero points of b bits as one little-endian stream of int32 words,

    NAME.qweight   (ceil(K b / 32), N) int32: codes, packed along the inputs
    NAME.qzeros    (G, ceil(N b / 32)) int32: zero points, packed along the outputs
    NAME.scales    (G, N) fp16
    NAME.g_idx     (K,) int32: the group of each input

and a weight is scale * (code - zero). Version 1 stores every zero point less one; version 2 stores it as it is, and
`checkpoint_format` says which. A grid around zero has the zero point 2^(b-1). Inputs stay in their order, also after
GPTQ with `act_order`, whose groups keep their columns here. N outputs, K inputs, G groups a row, b bits.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.affine import IntFormat
from compress.quantization.export.compressed_tensors import check_rows, joined, uniform, words
from compress.quantization.formats.linear import PackedIntEmbedding, PackedIntLinear
from models.errors import UserError
from models.families import Transform, dense, family_of, file_tensors, write_folder
from models.io import write_json, writing
from models.transformer import Transformer

WORD = 32  # codes that fill whole words at every number of bits


def export_gptq(
    model: Transformer, out: str | Path, source: str | Path | None = None, overwrite: bool = False
) -> list[str]:
    """Write a quantized model of a Hugging Face family as a GPTQ folder.

    Args:
        model: with linear layers of packed integers, all alike: 2, 3, 4 or 8 bits, symmetric or with zero points.
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
    format = uniform(packed, "GPTQ")
    check_rows(family, model.config, packed)
    for name, module in packed.items():
        _check(name, module)
    names = family.names(model.config)
    dense_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = dict.fromkeys(names[f"{name}.weight"] for name in dense_layers if f"{name}.weight" in names)
    left = [name.removesuffix(".weight") for name in weights if name != family.head]
    scheme = gptq_scheme(format, left, head="head" in packed)
    dtype = next(model.parameters()).dtype  # packed weights are buffers
    with writing(out, overwrite) as directory:
        write_json(directory / "quantize_config.json", scheme)
        values["quantization_config"] = scheme
        write_folder(directory, values, file_tensors(model, family, pack_gptq), dtype, source)
    if isinstance(model.embedding, PackedIntEmbedding):
        return ["the embedding is stored dense: GPTQ files pack linear layers only"]
    return []


def _check(name: str, module: PackedIntLinear) -> None:
    for what, width in (("inputs", module.in_features), ("outputs", module.out_features)):
        if width % WORD:
            raise UserError(f"{name} has {width} {what}; GPTQ files want a multiple of {WORD}")
    quantized = module.quantized()
    halved = quantized._replace(scales=quantized.scales.half())
    if not torch.equal(halved.dequantize(), quantized.dequantize()):
        raise UserError(
            f"{name} has scales in {module.format.scale_dtype} that GPTQ files, whose scales are fp16, cannot hold "
            "exactly; export it with --format transformers"
        )


def gptq_scheme(format: IntFormat, left: list[str], head: bool) -> dict[str, Any]:
    """The `quantization_config` of linear layers in `format`, except those in `left`; `head`: whether it is packed."""
    scheme = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": format.bits,
        "group_size": -1 if isinstance(format.group_size, str) else format.group_size,
        "sym": format.symmetric,
        "desc_act": False,
        "lm_head": head,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"espalier:{version('espalier-lm')}"]},
    }
    if left:  # "-:" and a pattern: no quantized layer
        scheme["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
    return scheme


def pack_gptq(
    name: str, modules: Sequence[nn.Module], transform: Transform, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The four tensors of packed layers whose weight is `name` in the file; the dense one of a packed embedding."""
    if not isinstance(modules[0], PackedIntLinear):
        yield from dense(name, modules, transform, dtype)
        return
    codes, scales, zeros, format = joined(modules, transform)
    rows, width = codes.shape
    groups = -(-width // format.group(width))
    if zeros is None:
        zeros = torch.full((1, 1), 2 ** (format.bits - 1), dtype=torch.uint8, device=codes.device)
    layer = name.removesuffix("weight")
    yield f"{layer}qweight", words(codes, format.bits).T.contiguous()
    yield f"{layer}qzeros", words(zeros.expand(rows, groups).T.contiguous(), format.bits)
    yield f"{layer}scales", scales.expand(rows, groups).T.half().contiguous()
    yield f"{layer}g_idx", torch.arange(width, dtype=torch.int32) // format.group(width)
