"""Each attention mechanism against the package that it is checked against, at the same settings.

Forward and backward of the whole module, its linear maps included: one sequence of 2,048 tokens, 512 channels, 8 heads,
fp32. A peer that is not installed is left out, and said so. Decoders are compared with decoders; where a package has
encoders only, both are.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.protocol import ForwardInputs
from models.positions import Positional
from models.specs import POSITIONS, LayerContext
from tests.benchmarks.bench_attention import resolved
from tests.benchmarks.timing import Row, rate_row, say, take_turns

NAME = "peers"
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """A mechanism and its peer.

    Attributes:
        spec: of the mechanism; `heads` is filled in.
        peer: what the row calls the other one.
        make: settings -> the other one's module and how it is called with x (B, T, D).
        bidirectional: whether both are encoders.
        position: a position encoding of the mechanism, where the peer has one built in.
        joins: whether the peer's module holds the output map; where not, ours is measured without it.
    """

    spec: dict[str, Any]
    peer: str
    make: Callable[["Peers"], tuple[nn.Module, Run]]
    bidirectional: bool = False
    position: dict[str, Any] | None = None
    joins: bool = True


@dataclass(frozen=True)
class Peers:
    """Settings."""

    tokens: int = 2048
    width: int = 512
    heads: int = 8
    window: int = 256
    rounds: int = 9
    pairs: dict[str, Pair] = field(default_factory=lambda: PAIRS)


def run(settings: Peers | None = None) -> list[Row]:
    """One row a pair: tokens per second of ours, against the peer's in the same rounds."""
    settings = settings or Peers()
    rows = []
    for name, pair in settings.pairs.items():
        try:
            theirs, call = pair.make(settings)
        except ImportError as error:
            say(f"{NAME}: {name}: {pair.peer} is not installed ({error}); left out")
            continue
        ours, mix = build(settings, pair)
        x = torch.randn(1, settings.tokens, settings.width, requires_grad=True)
        cases = {
            name: partial(step, ours, mix, x),
            pair.peer: partial(step, theirs, call, x),
        }
        seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
        note = f"forward and backward, {settings.tokens} tokens, {settings.width} channels, fp32, maps included"
        rows.append(rate_row(NAME, name, seconds, settings.tokens, "tokens/s", peer=pair.peer, note=note))
    return rows


def build(settings: Peers, pair: Pair) -> tuple[nn.Module, Run]:
    """Our module, in training as the peer is, and how it is called."""
    spec = resolved(pair.spec, settings.heads, settings.width)
    module = spec.build(LayerContext(settings.width, context=settings.tokens, bidirectional=pair.bidirectional))
    if not pair.joins:
        module.o = nn.Identity()
    encoding = None
    if pair.position is not None:
        sizes = {"width": settings.width, "heads": spec.heads, "head_width": spec.head_width}
        position = POSITIONS.parse(pair.position, "position")
        encoding = position.build(**sizes, context=settings.tokens, bidirectional=pair.bidirectional)
    places = torch.arange(settings.tokens)[None]

    def mix(x: Tensor) -> Tensor:
        positional = Positional() if encoding is None else encoding(places)
        return module(x, ForwardInputs((positional,), None, causal=not pair.bidirectional))

    return module.train(), mix


def step(module: nn.Module, call: Run, x: Tensor) -> None:
    """One forward and backward."""
    call(x).sum().backward()
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None


def _torch_full(settings: Peers) -> tuple[nn.Module, Run]:
    module = nn.MultiheadAttention(settings.width, settings.heads, bias=False, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(settings.tokens)
    return module, lambda x: module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def _x_transformers(settings: Peers, **options: Any) -> tuple[nn.Module, Run]:
    from x_transformers.x_transformers import Attention

    width = settings.width // settings.heads
    module = Attention(dim=settings.width, heads=settings.heads, dim_head=width, causal=True, **options)
    return module, lambda x: module(x)


def _local_attention(settings: Peers) -> tuple[nn.Module, Run]:
    from local_attention.transformer import LocalMHA

    width = settings.width // settings.heads
    options = {"dim": settings.width, "heads": settings.heads, "dim_head": width, "window_size": settings.window - 1}
    module = LocalMHA(**options, causal=True, exact_windowsize=True, use_rotary_pos_emb=False)
    return module, lambda x: module(x)


def _longformer(settings: Peers) -> tuple[nn.Module, Run]:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=settings.width, num_attention_heads=settings.heads, attention_window=[settings.window],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = LongformerSelfAttention(config, layer_id=0)
    mask = torch.zeros(1, settings.tokens)
    mask[:, :GLOBALS] = 1.0
    is_global = mask > 0

    def call(x: Tensor) -> Tensor:
        return module(
            x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=is_global, is_global_attn=True
        )[0]

    return module, call


def _big_bird(settings: Peers) -> tuple[nn.Module, Run]:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=settings.width, num_attention_heads=settings.heads, block_size=64, num_random_blocks=3,
        max_position_embeddings=settings.tokens, attention_probs_dropout_prob=0.0, use_bias=False,
    )  # fmt: skip
    module = BigBirdBlockSparseAttention(config, seed=0).eval()  # training draws the blocks anew, in NumPy
    ones = torch.ones(1, settings.tokens)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(ones, 64)
    return module, lambda x: module(x, band, rows, columns, blocked, blocked)[0]


def _long_t5(settings: Peers) -> tuple[nn.Module, Run]:
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5TransientGlobalAttention

    config = LongT5Config(
        d_model=settings.width, num_heads=settings.heads, d_kv=settings.width // settings.heads, local_radius=127,
        global_block_size=16, dropout_rate=0.0,
    )  # fmt: skip
    module = LongT5TransientGlobalAttention(config, has_relative_attention_bias=True)
    mask = torch.ones(1, settings.tokens)
    return module, lambda x: module(x, mask=mask)[0]


def _linformer(settings: Peers) -> tuple[nn.Module, Run]:
    from linformer import LinformerSelfAttention

    module = LinformerSelfAttention(settings.width, settings.tokens, k=settings.window, heads=settings.heads)
    return module, lambda x: module(x)


def _reformer(settings: Peers) -> tuple[nn.Module, Run]:
    from reformer_pytorch import LSHSelfAttention

    module = LSHSelfAttention(dim=settings.width, heads=settings.heads, bucket_size=64, n_hashes=2, causal=True)
    return module, lambda x: module(x)


def import_retnet() -> ModuleType:
    """torchscale's modules of RetNet; two packages that they import and that nothing here uses are left out."""
    stubs = {"fairscale": (), "fairscale.nn": ("checkpoint_wrapper", "wrap"), "timm": (), "timm.models": (),
             "timm.models.layers": ("drop_path",)}  # fmt: skip
    missing = {name: ModuleType(name) for name in stubs if name not in sys.modules}
    for name, stub in missing.items():
        vars(stub).update(dict.fromkeys(stubs[name]))
    sys.modules.update(missing)
    from torchscale.architecture import retnet

    for name in missing:  # other packages ask whether there is one
        del sys.modules[name]
    return retnet


def _retention(settings: Peers) -> tuple[nn.Module, Run]:
    retnet = import_retnet()
    arguments = SimpleNamespace(
        multiway=False, layernorm_eps=1e-6, decoder_embed_dim=settings.width,
        decoder_retention_heads=settings.heads, recurrent_chunk_size=64,
    )  # fmt: skip
    module = retnet.MultiScaleRetention(arguments, settings.width, 2 * settings.width, settings.heads)
    relative = retnet.RetNetRelPos(arguments)(settings.tokens, chunkwise_recurrent=True)
    return module, lambda x: module(x, relative, chunkwise_recurrent=True)


def _llms_from_scratch(settings: Peers) -> tuple[nn.Module, Run]:
    from llms_from_scratch.ch03 import MultiHeadAttentionWrapper

    width = settings.width // settings.heads
    module = MultiHeadAttentionWrapper(settings.width, width, settings.tokens, 0.0, settings.heads)
    return module, lambda x: module(x)


GLOBALS = 16
PAIRS = {
    "full": Pair({"kind": "full"}, "torch.nn.MultiheadAttention", _torch_full),
    "single heads": Pair({"kind": "single_heads"}, "llms-from-scratch", _llms_from_scratch),
    "window 256": Pair({"kind": "window", "window": 256}, "local-attention", _local_attention),
    "longformer 256": Pair(
        {"kind": "longformer", "window": 256, "globals": GLOBALS, "bias": True},
        "transformers' Longformer", _longformer, bidirectional=True, joins=False,
    ),
    "transient": Pair(
        {"kind": "transient", "window": 254, "block": 16, "scale": 1.0},
        "transformers' LongT5", _long_t5, bidirectional=True, position={"kind": "t5"},
    ),
    "bigbird": Pair(
        {"kind": "bigbird", "block": 64, "random": 3},
        "transformers' BigBird", _big_bird, bidirectional=True, joins=False,
    ),
    "top-k 64": Pair({"kind": "top_k", "keep": 64}, "x-transformers", partial(_x_transformers, sparse_topk=64)),
    "selective": Pair({"kind": "selective"}, "x-transformers", partial(_x_transformers, selective=True)),
    "linformer 256": Pair(
        {"kind": "linformer", "rank": 256, "documents": 1}, "linformer", _linformer, bidirectional=True
    ),
    "lsh": Pair({"kind": "lsh", "buckets": 32, "chunk": 64, "rounds": 2}, "reformer-pytorch", _reformer),
    "retention": Pair({"kind": "retention", "chunk": 64}, "torchscale", _retention),
}  # fmt: skip
