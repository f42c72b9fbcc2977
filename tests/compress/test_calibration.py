"""The sequential driver: what it shows a method, what it holds, what it refuses."""

import gc

import pytest
import torch
from torch import nn

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import LayerMethod, calibrate_sequentially
from compress.calibration.statistics import Hessian, InputNorm, Moments
from compress.calibration.store import FolderStore
from models.config import ModelConfig
from models.errors import UserError
from models.feedforward import FeedForward
from models.transformer import Transformer


def build(depth=3, head="tied", dropout=0.0, residual="standard"):
    torch.manual_seed(0)
    config = {
        "width": 32,
        "depth": depth,
        "vocab_size": 64,
        "head": head,
        "dropout": dropout,
        "residual": residual,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
    return Transformer(ModelConfig.from_dict(config))


def batches(count=3, documents=None):
    generator = torch.Generator().manual_seed(1)
    found = [{"tokens": torch.randint(0, 64, (2, 16), generator=generator)} for _ in range(count)]
    return [batch | ({} if documents is None else {"documents": documents}) for batch in found]


class Look(LayerMethod):
    """Changes nothing, keeps the statistics that it was given."""

    def __init__(self, kind=Hessian, change=None):
        self.kind, self.change, self.seen = kind, change, {}

    def statistic(self, name, module):
        return self.kind

    def compress(self, name, module, statistic):
        self.seen[name] = statistic
        if self.change is not None:
            self.change(module)
        return None, LayerRecord(name, tuple(module.weight.shape))


def inputs_of(model, name, data):
    """What reaches the module `name` in plain forwards of the whole model: (tokens, width)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(batch["tokens"], documents=batch.get("documents"))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["blocks.0.attention.k", "blocks.1.attention.o", "blocks.2.feedforward.down", "head"])
def test_statistics_are_those_of_the_inputs(name):
    model, data = build(head="untied"), batches()
    x = inputs_of(model, name, data)
    for kind in (Hessian, InputNorm, Moments):
        look = Look(kind)
        calibrate_sequentially(model, look, data)
        statistic = look.seen[name]
        assert statistic.tokens == len(x) == 96
        if kind is Hessian:
            assert torch.allclose(statistic.matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        elif kind is InputNorm:
            assert torch.allclose(statistic.norm(), x.square().mean(0).sqrt(), rtol=1e-5)
        else:
            assert torch.allclose(statistic.mean(), x.mean(0), atol=1e-5)
            assert torch.allclose(statistic.magnitude(), x.abs().mean(0), atol=1e-5)
            assert torch.allclose(statistic.variance(), x.var(0, correction=0), rtol=1e-3, atol=1e-5)


def test_both_streams_of_a_reversible_model_are_passed_on():
    model, data = build(head="untied", residual="reversible"), batches()
    look = Look()
    calibrate_sequentially(model, look, data)
    for name in ("blocks.2.feedforward.down", "head"):
        x = inputs_of(model, name, data)
        assert torch.allclose(look.seen[name].matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_sees_the_input_of_the_projection():
    model, data = build(), batches()
    look = Look()
    calibrate_sequentially(model, look, data)
    hidden = []
    with torch.no_grad():
        for batch in data:
            x, context = model.embed(batch["tokens"])
            for block in model.blocks:
                x = block(x, context).y
            hidden.append(model.norm(x).flatten(0, 1))
    x = torch.cat(hidden)
    assert torch.allclose(look.seen["embedding"].matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_maps_that_read_one_input_share_one_statistic_counted_once():
    look = Look()
    calibrate_sequentially(build(), look, batches())
    one = {id(look.seen[f"blocks.0.attention.{name}"]) for name in "qkv"}
    two = {id(look.seen[f"blocks.0.feedforward.{name}"]) for name in ("gate", "up")}
    assert len(one) == len(two) == 1
    assert len({id(statistic) for statistic in look.seen.values()}) == 3 * 4 + 1
    assert all(statistic.tokens == 96 for statistic in look.seen.values())


def test_the_next_block_is_fed_by_the_changed_one():
    """Halving every weight of block 0 changes what block 1 sees, as it does in the changed model."""
    model, data = build(), batches()

    class HalveFirst(Look):
        def compress(self, name, module, statistic):
            if name.startswith("blocks.0."):
                module.weight.data *= 0.5
            return super().compress(name, module, statistic)

    look = HalveFirst()
    calibrate_sequentially(model, look, data)
    x = inputs_of(model, "blocks.1.attention.q", data)
    assert torch.allclose(look.seen["blocks.1.attention.q"].matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    untouched = inputs_of(build().eval(), "blocks.1.attention.q", data)
    assert not torch.allclose(x, untouched, rtol=1e-2)


def test_padding_is_not_counted():
    documents = torch.tensor([[0] * 10 + [-1] * 6, [1] * 16])
    model, data = build(), batches(documents=documents)
    look = Look()
    calibrate_sequentially(model, look, data)
    x = inputs_of(model, "blocks.2.feedforward.down", data).view(3, 2, 16, -1)[:, documents >= 0].flatten(0, 1)
    statistic = look.seen["blocks.2.feedforward.down"]
    assert statistic.tokens == len(x) == 78
    assert torch.allclose(statistic.matrix(), x.T @ x / 78, rtol=1e-4, atol=1e-5)
    assert look.seen["embedding"].tokens == 78


def test_batches_of_any_size_give_the_same_statistics():
    tokens = torch.cat([batch["tokens"] for batch in batches(4)])
    looks = []
    for size in (1, 3, 8):
        looks.append(Look())
        calibrate_sequentially(build(), looks[-1], [{"tokens": part} for part in tokens.split(size)])
    for name, statistic in looks[0].seen.items():
        for other in looks[1:]:
            assert torch.allclose(statistic.matrix(), other.seen[name].matrix(), rtol=1e-3, atol=1e-5)


def test_dropout_is_off_while_looking():
    looks = [Look(), Look()]
    calibrate_sequentially(build(dropout=0.5).train(), looks[0], batches())
    calibrate_sequentially(build(dropout=0.0), looks[1], batches())
    assert torch.equal(looks[0].seen["embedding"].matrix(), looks[1].seen["embedding"].matrix())


def test_without_statistics_no_data_is_needed_and_none_is_run():
    model = build()
    for block in model.blocks:
        block.forward = None
    names = [record.name for record in calibrate_sequentially(model, Look(kind=None))]
    assert len(names) == 3 * 7 + 1
    with pytest.raises(UserError, match="give it text"):
        calibrate_sequentially(build(), Look())
    with pytest.raises(UserError, match="holds no batch"):
        calibrate_sequentially(build(), Look(), [])


def test_the_walk_stops_running_blocks_when_nothing_more_is_asked_for():
    class FirstOnly(Look):
        def statistic(self, name, module):
            return Hessian if name.startswith("blocks.0.") else None

    model = build()
    model.blocks[1].forward = model.blocks[2].forward = None
    look = FirstOnly()
    calibrate_sequentially(model, look, batches())
    assert look.seen["blocks.0.attention.q"].tokens == 96
    assert look.seen["blocks.1.attention.q"] is None


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_the_name_of_the_layer(broken):
    model = build()
    model.blocks[1].attention.v.weight.data[0, 0] = broken
    for kind in (Hessian, InputNorm, Moments):
        with pytest.raises(UserError, match=r"inputs of blocks\.1\.attention\.o hold NaN or infinity"):
            calibrate_sequentially(model, Look(kind), batches())


def live_bytes():
    """Bytes of the memory behind every tensor that is alive."""
    gc.collect()
    held = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, nn.Parameter) and candidate.device.type == "cpu":
            held[candidate.untyped_storage().data_ptr()] = candidate.untyped_storage().nbytes()
    return sum(held.values())


def test_memory_is_bounded_by_one_block_as_the_depth_doubles():
    """Tensors alive beside the model at each layer: activations once, and one block's statistics."""

    def peak(depth):
        model, data = build(depth), batches()
        start = live_bytes()
        tops = []

        class Measure(LayerMethod):
            def statistic(self, name, module):
                return Hessian

            def compress(self, name, module, statistic):
                tops.append(live_bytes() - start)
                return None, LayerRecord(name, tuple(module.weight.shape))

        calibrate_sequentially(model, Measure(), data)
        return max(tops)

    activations = 3 * 2 * 16 * 32 * 4
    hessians = 4 * (32 * 32 + 32 * 32 + 32 * 32 + 48 * 48)
    tables = 3 * 2 * 16 * 8 * 4 * 2  # rotary cosines and sines of each batch
    gc.collect()
    gc.freeze()  # what other tests have left is not looked through again and again
    try:
        assert peak(2) == peak(4)
        assert 0.5 * (activations + hessians) < peak(4) <= activations + hessians + tables
    finally:
        gc.unfreeze()


def test_progress_tells_block_layer_error_and_time():
    seen = []
    calibrate_sequentially(build(), Look(), batches(), progress=seen.append)
    assert [(step.index, step.count) for step in seen] == [(i // 7, 4) for i in range(22)]
    assert seen[7].layer == "blocks.1.attention.q"


def test_extras_come_back_with_the_part(tmp_path):
    class Keeps(Look):
        def compress_block(self, part):
            part.extras["score"] = torch.full((2,), float(part.index))
            return super().compress_block(part)

        def restore_block(self, part, state, forms):
            super().restore_block(part, state, forms)
            self.seen[part.index] = part.extras["score"]

    calibrate_sequentially(build(), Keeps(), batches(), store=FolderStore(tmp_path))
    again = Keeps()
    calibrate_sequentially(build(), again, batches(), store=FolderStore(tmp_path))
    assert [float(again.seen[i][0]) for i in range(4)] == [0, 1, 2, 3]


def test_a_damaged_entry_counts_as_none(tmp_path):
    store = FolderStore(tmp_path)
    store.save("a", {"x": torch.ones(3)}, {"n": 1})
    tensors, info = store.load("a")
    assert torch.equal(tensors["x"], torch.ones(3))
    assert info == {"n": 1}
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    assert store.load("a") is None
    assert store.load("b") is None
    store.remove("a")
    store.remove("a")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_chain_sends_the_run_back_to_the_start(tmp_path):
    class Halve(Look):
        def compress(self, name, module, statistic):
            module.weight.data *= 0.5
            return super().compress(name, module, statistic)

    whole = build()
    calibrate_sequentially(whole, Halve(), batches(), store=FolderStore(tmp_path))
    (tmp_path / "part-3.safetensors").unlink()
    (tmp_path / "chain-2.safetensors").write_bytes(b"")
    resumed = build()
    calibrate_sequentially(resumed, Halve(), batches(), store=FolderStore(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_records_survive_json():
    record = LayerRecord("a", (2, 3), {"bits": 4}, {"bits": 4.5}, 0.1, 0.2, "note", False)
    assert LayerRecord.from_dict(record.to_dict()) == record
    skipped = LayerRecord.skip("b", (2, 3), "why")
    assert skipped.skipped
    assert skipped.note == "why"


def test_linear_maps_in_a_block_are_found_wherever_they_are():
    model = build(depth=1)
    model.blocks[0].feedforward.extra = nn.Linear(4, 4)  # no token reaches it
    look = Look()
    calibrate_sequentially(model, look, batches())
    assert look.seen["blocks.0.feedforward.extra"] is None


def test_a_forward_stops_where_the_last_statistic_is_taken():
    """After the first batch, which shows the order, `down` is not multiplied while looking; only for the next block."""
    model, looked = build(depth=2), []
    model.blocks[0].feedforward.down.register_forward_hook(lambda *args: looked.append("block 0"))
    model.blocks[1].feedforward.down.register_forward_hook(lambda *args: looked.append("block 1"))
    calibrate_sequentially(model, Look(), batches(5))
    assert looked.count("block 0") == 1 + 5
    assert looked.count("block 1") == 1 + 5  # the head asks for data too


class Routed(FeedForward):
    """Tokens above a bound go to one of two maps; a third is used twice by every token."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x, context=None):
        x = self.twice(self.twice(x))
        y = torch.zeros_like(x)
        for expert, mine in zip(self.experts, (x[..., 0] > 0.03, x[..., 0] < -0.4), strict=True):
            if mine.any():
                y[mine] = expert(x[mine])
        return y


def test_a_map_that_reads_a_second_input_gets_a_statistic_of_its_own():
    """Keys and values of LongT5 are taken of the tokens, which the queries read too, and then of the summaries."""
    torch.manual_seed(0)
    values = {"width": 32, "depth": 1, "vocab_size": 64, "feedforward": {"kind": "swiglu", "width": 48}}
    attention = {"kind": "transient", "heads": 4, "window": 8, "block": 4}
    model, data = Transformer(ModelConfig.from_dict({**values, "attention": attention})), batches()
    look = Look()
    calibrate_sequentially(model, look, data)
    for name, tokens in {"q": 3 * 2 * 16, "k": 3 * 2 * (16 + 4), "v": 3 * 2 * (16 + 4)}.items():
        x = inputs_of(model, f"blocks.0.attention.{name}", data)
        statistic = look.seen[f"blocks.0.attention.{name}"]
        assert statistic.tokens == len(x) == tokens
        assert torch.allclose(statistic.matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_maps_that_some_batches_skip_and_maps_that_run_twice_see_all_their_tokens(order):
    model, data = build(depth=1), batches(6)[::order]
    torch.manual_seed(5)
    model.blocks[0].feedforward = Routed()
    names = ["twice", "experts.0", "experts.1"]
    expected = {name: inputs_of(model, f"blocks.0.feedforward.{name}", data) for name in names}
    look = Look()
    calibrate_sequentially(model, look, data)
    for name, x in expected.items():
        statistic = look.seen[f"blocks.0.feedforward.{name}"]
        assert statistic.tokens == len(x)
        assert torch.allclose(statistic.matrix(), x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_under_autocast_the_statistics_are_of_what_the_maps_compute_with():
    exact, cast = Look(), Look()
    calibrate_sequentially(build(), exact, batches())
    calibrate_sequentially(build(), cast, batches(), autocast=torch.bfloat16)
    for name, statistic in exact.seen.items():
        a, b = statistic.matrix(), cast.seen[name].matrix()
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.02 * a.norm()


def test_a_hessian_of_bf16_inputs_sums_in_fp32():
    x = torch.randn(4096, 40).bfloat16()
    statistic = Hessian(40, x.device)
    for part in x.split(1000):
        statistic.update(part)
    assert torch.allclose(statistic.matrix(), (x.double().T @ x.double() / len(x)).float(), rtol=1e-4, atol=1e-4)


def test_the_variance_of_what_never_changes_is_never_below_zero():
    """E[x^2] - E[x]^2 is, by rounding, for some of these."""
    moments = Moments(500, torch.device("cpu"))
    for _ in range(7):
        moments.update(torch.linspace(0.1, 9.7, 500).expand(11, 500))
    mean = moments.sums / moments.tokens
    assert (mean[2] - mean[0].square()).min() < 0
    assert moments.variance().min() == 0
    assert moments.variance().max() < 1e-12


def test_a_resumed_run_knows_what_earlier_layers_left_to_later_ones(tmp_path):
    """Selective attention with `carry` reads the masks of the layers below it, which are no part of the stream."""
    attention = {"kind": "selective", "heads": 2, "carry": 0.5}
    values = {"width": 32, "depth": 3, "vocab_size": 64, "feedforward": {"kind": "swiglu", "width": 48}}

    def selective():
        torch.manual_seed(0)
        model = Transformer(ModelConfig.from_dict({**values, "attention": attention}))
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        return model

    whole, resumed = Look(), Look()
    calibrate_sequentially(selective(), whole, batches())

    class Killed(Look):
        def compress(self, name, module, statistic):
            if name.startswith("blocks.2."):
                raise KeyboardInterrupt
            return super().compress(name, module, statistic)

    with pytest.raises(KeyboardInterrupt):
        calibrate_sequentially(selective(), Killed(), batches(), store=FolderStore(tmp_path))
    calibrate_sequentially(selective(), resumed, batches(), store=FolderStore(tmp_path))
    name = "blocks.2.attention.o"
    assert torch.equal(whole.seen[name].matrix(), resumed.seen[name].matrix())
