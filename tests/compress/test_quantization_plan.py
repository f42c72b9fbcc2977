"""Whole models: every layer accounted for, stored as it ran, and GPTQ resumable at every block."""

import pytest
import torch

from compress.calibration.store import FolderStore
from compress.pruning.patterns import Unstructured
from compress.pruning.sparsify import sparsify
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


def build(head="tied", depth=3, position="rope", seed=0):
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig.from_dict(
            {
                "width": 64,
                "depth": depth,
                "vocab_size": 96,
                "context": 64,
                "head": head,
                "position": position,
                "attention": {"kind": "full", "heads": 4, "kv_heads": 2, "bias": True},
                "feedforward": {"kind": "swiglu", "width": 112},
            }
        )
    )
    return model.eval()


def batches(count=3, rows=4, length=32):
    generator = torch.Generator().manual_seed(7)
    return [{"tokens": torch.randint(0, 96, (rows, length), generator=generator)} for _ in range(count)]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(batch["tokens"]).logits for batch in data])


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, head, dtype):
    model, data = build(head), batches()
    ends = Rtn(IntFormat(8, "channel"))
    records = quantize_model(model, Gptq(IntFormat(4, 32)), data, embedding=ends, head=ends)
    assert not any(record.skipped for record in records)
    model.to(dtype)
    before = logits(model, data)
    assert before.dtype == dtype
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    again = load(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(logits(again, data), before)
    dense = sum(parameter.nbytes for parameter in build(head).parameters())
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 0.3 * dense


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_matrix_has_a_record_with_what_was_asked_and_what_came_out(head):
    model = build(head, position="learned")
    records = quantize_model(
        model,
        Gptq(IntFormat(3, 32)),
        batches(),
        overrides={"blocks.*.attention.v": Rtn(IntFormat(8, "channel")), "blocks.1.*": None},
    )
    by_name = {record.name: record for record in records}
    matrices = [
        name.removesuffix(".weight") for name, p in build(head, position="learned").named_parameters() if p.dim() == 2
    ]
    assert sorted(by_name) == sorted(matrices)
    first = by_name["blocks.0.attention.q"]
    assert first.requested["bits"] == 3
    assert first.achieved["bits"] == 3.5  # 16 bits of scale for 32 weights
    assert by_name["blocks.0.attention.v"].requested["method"] == "rtn"
    assert by_name["blocks.1.attention.v"].skipped
    assert "'blocks.1.*'" in by_name["blocks.1.attention.v"].note
    assert by_name["embedding"].skipped
    assert "no bits are asked for the embedding" in by_name["embedding"].note
    assert "looked up" in by_name["positions.0.table"].note
    assert set(model.config.compression) == {record.name for record in records if not record.skipped}


def test_what_is_no_linear_map_is_listed_with_the_true_reason():
    model = build(position="transformer_xl")
    notes = {record.name: record.note for record in quantize_model(model, Rtn(IntFormat(4, 32)))}
    for name in ("positions.0.u", "positions.0.v", "positions.0"):
        assert notes[name] == "read by products of its own module, which is no linear layer: left in full precision"
    config = build().config.to_dict()
    config["layers"][1]["depth"] = {"kind": "mixture_of_depths"}
    quantized, pruned = (Transformer(ModelConfig.from_dict(config)) for _ in range(2))
    for records in (quantize_model(quantized, Rtn(IntFormat(4, 32))), sparsify(pruned, "magnitude", Unstructured(0.5))):
        router = next(record for record in records if record.name == "blocks.1.depth")
        assert router.skipped
        assert router.shape == (64,)
        assert "the router that chooses the tokens of its layer" in router.note


def test_a_second_pass_says_what_is_packed_already():
    model = build()
    quantize_model(model, Rtn(IntFormat(4, 32)))
    records = quantize_model(model, Rtn(IntFormat(4, 32)), embedding=Rtn(IntFormat(8, "channel")))
    notes = {record.name: record.note for record in records}
    assert notes["blocks.0.attention.q"] == "already stored as packed_int"
    assert notes["embedding"] == ""
    assert len(model.config.compression) == 3 * 7 + 1


def test_gptq_has_less_output_error_than_rounding_and_so_has_the_model():
    data = batches(8)
    reference = logits(build(), data)
    errors = {}
    for method in (
        Rtn(IntFormat(3, "channel")),
        Gptq(IntFormat(3, "channel")),
        Gptq(IntFormat(3, "channel"), act_order=False),
    ):
        model = build()
        quantize_model(model, method, data)
        errors.setdefault(type(method).__name__, []).append(float((logits(model, data) - reference).square().mean()))
    assert max(errors["Gptq"]) < 0.8 * errors["Rtn"][0]


def test_a_tied_embedding_is_calibrated_as_the_head_that_it_is():
    data = batches()
    model = build()
    records = quantize_model(model, None, data, embedding=Gptq(IntFormat(4, 32)))
    record = next(record for record in records if record.name == "embedding")
    assert record.achieved["error_of"] == "outputs"
    untied = build("untied")
    records = quantize_model(untied, None, data, embedding=Gptq(IntFormat(4, 32)), head=Gptq(IntFormat(4, 32)))
    notes = {record.name: record.note for record in records}
    assert "reads token ids" in notes["embedding"]
    assert notes["head"] == ""


def test_pruned_weights_stay_zero_through_a_whole_model():
    model = build()
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            masks[name] = torch.rand_like(module.weight) < 0.5
            module.weight.data[masks[name]] = 0
    quantize_model(model, Gptq(IntFormat(4, 32, False)), batches())
    for name, mask in masks.items():
        assert (model.get_submodule(name).dequantize()[mask] == 0).all()


@pytest.mark.parametrize("killed_after", range(1, 9))
def test_killed_anywhere_and_run_again_it_gives_the_same_bytes(tmp_path, killed_after):
    """Three blocks and the ends: each writes a chain (but the last ones) and a part; the run dies at any of these."""
    ends = Gptq(IntFormat(8, "channel"))
    whole = build()
    expected = quantize_model(whole, Gptq(IntFormat(3, 32)), batches(), embedding=ends)

    class Killed(Exception):
        pass

    class Dying(FolderStore):
        steps = 0

        def save(self, *args):
            self._step()
            super().save(*args)

        def remove(self, *args):
            super().remove(*args)
            self._step()

        def _step(self):
            self.steps += 1
            if self.steps > killed_after:
                raise Killed

    with pytest.raises(Killed):
        quantize_model(build(), Gptq(IntFormat(3, 32)), batches(), embedding=ends, store=Dying(tmp_path))
    resumed = build()
    seen = []
    records = quantize_model(
        resumed, Gptq(IntFormat(3, 32)), batches(), embedding=ends, store=FolderStore(tmp_path), progress=seen.append
    )
    assert len(seen) == 22 - 7 * ((killed_after + 1) // 3)  # finished blocks are not done again
    state, reference = resumed.state_dict(), whole.state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[name], reference[name]) for name in reference)
    assert resumed.config == whole.config
    assert [(r.name, r.achieved, r.error, r.note) for r in records] == [
        (r.name, r.achieved, r.error, r.note) for r in expected
    ]


def test_a_finished_store_restores_everything_without_work(tmp_path):
    first, second = build(), build()
    quantize_model(first, Rtn(IntFormat(4, 32)), store=FolderStore(tmp_path))
    seen = []
    quantize_model(second, Rtn(IntFormat(4, 32)), store=FolderStore(tmp_path), progress=seen.append)
    assert seen == []
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_pattern_that_matches_nothing_is_refused_before_any_work():
    model = build()
    with pytest.raises(UserError, match=r"no layer is called 'blocks.0.attention.query'.*did you mean"):
        quantize_model(model, Rtn(), overrides={"blocks.0.attention.query": None})
    assert not model.config.compression


def test_broken_weights_are_refused_by_name():
    model = build()
    model.blocks[1].feedforward.up.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"weight of blocks\.1\.feedforward\.up"):
        quantize_model(model, Rtn())


def test_widths_that_groups_do_not_divide_are_noted_and_counted():
    model = build()
    records = quantize_model(model, Rtn(IntFormat(4, 48)))
    by_name = {record.name: record for record in records}
    assert "last group of a row has 16" in by_name["blocks.0.attention.q"].note
    assert by_name["blocks.0.attention.q"].achieved["bits"] == 4.5  # two scales for 64 weights
    assert by_name["blocks.0.feedforward.down"].achieved["bits"] == pytest.approx(4 + 3 * 16 / 112)
