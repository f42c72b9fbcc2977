"""Experts are compressed one by one: their own tokens, enough of them, what is left out, and what is cut."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.calibration.experts import apart
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import LayerMethod, calibrate_sequentially
from compress.calibration.statistics import Hessian
from compress.calibration.store import FolderStore
from compress.pruning.criteria.wanda import Wanda
from compress.pruning.masks import HeldMasks, count_violations, masks_of
from compress.pruning.patterns import Unstructured
from compress.pruning.solvers.swaps import Swaps
from compress.pruning.sparsify import sparsify
from compress.pruning.structured.importance import IMPORTANCES
from compress.pruning.structured.sequential import prune_structured
from compress.quantization.affine import IntFormat
from compress.quantization.export.compressed_tensors import export_compressed_tensors
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.experts import SeparateExperts, StackedExperts
from models.families import export_folder
from models.transformer import Transformer

MOE = {"kind": "experts", "count": 4, "top_k": 2, "expert": {"kind": "swiglu", "width": 24}}


def build(moe=MOE, depth=2, seed=0, **changes):
    torch.manual_seed(seed)
    values = {"width": 32, "depth": depth, "vocab_size": 64, "context": 32, "feedforward": moe,
              "attention": {"kind": "full", "heads": 4, "kv_heads": 2}, **changes}  # fmt: skip
    model = Transformer(ModelConfig.from_dict(values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "router" in name else 0.1) * torch.randn_like(parameter))
    return model.eval()


def batches(count=3, documents=None):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 64, (2, 17), generator=generator) for _ in range(count)]
    found = [{"tokens": row[:, :-1], "targets": row[:, 1:]} for row in drawn]
    return [batch | ({} if documents is None else {"documents": documents}) for batch in found]


TOKENS = batches()[0]["tokens"]


def starve(model, layer=0):
    """Two directions and their opposites, of which two are always above 0: expert 4, with logit 0, is never chosen."""
    weight = model.blocks[layer].feedforward.router.projection.weight  # (5, D)
    with torch.no_grad():
        weight.copy_(torch.stack([weight[0], -weight[0], weight[1], -weight[1], torch.zeros(32)]))
    return model


FIVE = MOE | {"count": 5}


class Look(LayerMethod):
    def __init__(self):
        self.seen = {}

    def statistic(self, name, module):
        return Hessian

    def compress(self, name, module, statistic):
        self.seen[name] = statistic
        return None, LayerRecord(name, tuple(module.weight.shape))


def inputs_of(model, name, data):
    """What reaches the module `name` in plain forwards of the model: (tokens, width)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(batch["tokens"], documents=batch.get("documents"))
    handle.remove()
    return torch.cat(seen)


PADDED = torch.tensor([[0] * 10 + [-1] * 6, [1] * 16])


@pytest.mark.parametrize("documents", [None, PADDED])
def test_every_expert_has_the_statistics_of_its_own_tokens(documents):
    model, data, look = build(), batches(documents=documents), Look()
    with apart(model):
        records = {record.name: record for record in calibrate_sequentially(model, look, data, minimum_tokens=0)}
        total = 0
        for expert in range(4):
            for part in ("gate", "down"):
                name = f"blocks.1.feedforward.experts.{expert}.{part}"
                x = inputs_of(model, name, data)
                statistic = look.seen[name]
                assert statistic.tokens == len(x) == records[name].achieved["tokens"]
                assert torch.allclose(statistic.matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            total += len(x)
        assert total == 2 * 3 * (32 if documents is None else 26)
        shared = [id(look.seen[f"blocks.1.feedforward.experts.0.{part}"]) for part in ("gate", "up")]
        assert shared[0] == shared[1]
    assert isinstance(model.blocks[0].feedforward.experts, StackedExperts)
    assert not any("router" in name for name in records)


def test_an_expert_that_is_never_chosen_takes_the_likeliest_tokens_of_its_layer():
    data = batches()
    model, look = starve(build(FIVE)), Look()
    with apart(model):
        mixture = model.blocks[0].feedforward
        x = torch.cat([inputs_of(model, "blocks.0.feedforward.router", [batch]) for batch in data])
        chosen = mixture.router(x[None]).probabilities[:, 4].topk(20).indices
        records = {record.name: record for record in calibrate_sequentially(model, look, data, minimum_tokens=20)}
        statistic = look.seen["blocks.0.feedforward.experts.4.up"]
        assert statistic.tokens == 20
        assert torch.allclose(statistic.matrix(), x[chosen].T @ x[chosen] / 20, rtol=1e-4, atol=1e-5)
        assert look.seen["blocks.0.feedforward.experts.4.down"].tokens == 20
    record = records["blocks.0.feedforward.experts.4.up"]
    assert record.achieved["tokens"] == 20
    assert "the router gave it 0 calibration tokens, fewer than 20: 20 more of its layer" in record.note
    enough = records["blocks.0.feedforward.experts.0.up"]
    assert enough.achieved["tokens"] >= 20
    assert enough.note == ""


def test_padding_fills_no_expert():
    data = batches(1, documents=PADDED)
    model, look = starve(build(FIVE)), Look()
    with apart(model):
        calibrate_sequentially(model, look, data, minimum_tokens=1000)
    assert {look.seen[f"blocks.0.feedforward.experts.{expert}.down"].tokens for expert in range(5)} == {26}


def test_the_minimum_is_one_token_for_each_channel_of_the_widest_matrix():
    model, look = starve(build(FIVE)), Look()
    with apart(model):
        calibrate_sequentially(model, look, batches())
    tokens = [look.seen[f"blocks.0.feedforward.experts.{expert}.up"].tokens for expert in range(5)]
    assert tokens[4] == min(tokens) == 32


def test_without_a_minimum_an_expert_without_tokens_is_rounded_and_says_so():
    model = starve(build(FIVE))
    records = {r.name: r for r in quantize_model(model, Gptq(IntFormat(4, 8)), batches(), minimum_tokens=0)}
    record = records["blocks.0.feedforward.experts.4.gate"]
    assert record.achieved["tokens"] == 0
    assert "no calibration token reached it: rounded to nearest" in record.note
    assert "the router gave it 0 calibration tokens" in record.note


@pytest.mark.parametrize("method", [Rtn, Gptq])
@pytest.mark.parametrize("shared", [None, {"kind": "swiglu", "width": 16}])
def test_a_mixture_is_quantized_saved_and_loaded(tmp_path, method, shared):
    model, data = build(MOE | {"shared": shared}), batches()
    with torch.no_grad():
        before = model(**data[0]).loss
    records = quantize_model(model, method(IntFormat(8, 8)), data)
    done = {record.name for record in records if not record.skipped}
    assert {f"blocks.1.feedforward.experts.{e}.{m}" for e in range(4) for m in ("gate", "up", "down")} <= done
    assert ("blocks.0.feedforward.shared.up" in done) == (shared is not None)
    left = {record.name: record.note for record in records if record.skipped}
    assert left["blocks.0.feedforward.router.projection"] == (
        "the router that chooses the experts of a token: left in full precision"
    )
    assert {layer.feedforward.layout for layer in model.config.layers} == {"separate"}
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    again = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        assert abs(float(model(**data[0]).loss - before)) < 0.05


def test_experts_that_all_stay_dense_are_stacked_again():
    dense, packed = ("*.feedforward.*", "stacked", StackedExperts), ("*.1.*", "separate", SeparateExperts)
    for pattern, layout, kind in (dense, packed):
        model = build()
        quantize_model(model, Rtn(IntFormat(8, 8)), overrides={pattern: None})
        assert [layer.feedforward.layout for layer in model.config.layers] == [layout, layout]
        assert all(isinstance(block.feedforward.experts, kind) for block in model.blocks)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", Wanda(refine=Swaps(1))], ids=str)
def test_every_matrix_of_every_expert_is_thinned_and_stacked_again(criterion):
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sparsify(model, criterion, Unstructured(0.5, "row"), batches())
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert torch.all((parameter == 0).sum(-1) == parameter.shape[-1] // 2)
            kept = torch.equal(parameter, torch.where(parameter == 0, 0, before[name]))
            assert kept == (criterion != "sparsegpt")
        if "router" in name:
            assert torch.equal(parameter, before[name])


def test_a_failed_compression_leaves_the_layout_as_it_was():
    model = build()
    with pytest.raises(UserError, match="no layer is called"):
        quantize_model(model, Rtn(), overrides={"nothing": None})
    assert isinstance(model.blocks[0].feedforward.experts, StackedExperts)
    assert model.config.layers[0].feedforward.layout == "stacked"


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step):
        if step.index == 1:
            raise Stopped

    whole, resumed = starve(build(FIVE)), starve(build(FIVE))
    expected = quantize_model(whole, Gptq(IntFormat(4, 8)), batches())
    with pytest.raises(Stopped):
        quantize_model(
            starve(build(FIVE)), Gptq(IntFormat(4, 8)), batches(), store=FolderStore(tmp_path), progress=stop
        )
    records = quantize_model(resumed, Gptq(IntFormat(4, 8)), batches(), store=FolderStore(tmp_path))
    assert all(torch.equal(a, resumed.state_dict()[name]) for name, a in whole.state_dict().items())
    assert [(r.name, r.achieved, r.note) for r in records] == [(r.name, r.achieved, r.note) for r in expected]


@pytest.mark.parametrize("criterion", sorted(IMPORTANCES))
def test_neurons_of_every_expert_go_and_the_rest_computes_the_same(criterion):
    moe = MOE | {"shared": {"kind": "swiglu", "width": 8}}
    dense, pruned, data = build(moe), build(moe), batches()
    records = {r.name: r for r in prune_structured(pruned, ["neurons"], 0.5, criterion, data, compensation="none")}
    assert {layer.feedforward.expert.width for layer in pruned.config.layers} == {12}
    stacked = isinstance(pruned.blocks[0].feedforward.experts, StackedExperts)
    assert stacked
    kept = []
    with torch.no_grad():
        for old, new in zip(dense.blocks, pruned.blocks, strict=True):
            for expert in range(4):
                rows, left = old.feedforward.experts.up[expert], new.feedforward.experts.up[expert]
                stay = [(rows == row).all(1).nonzero().item() for row in left]
                kept.append(tuple(stay))
                gone = torch.ones(24, dtype=torch.bool)
                gone[stay] = False
                old.feedforward.experts.down[expert][:, gone] = 0
        torch.testing.assert_close(pruned(TOKENS).logits, dense(TOKENS).logits, rtol=0, atol=1e-5)
    assert len(set(kept)) > 1  # every expert has an importance of its own
    record = records["blocks.0.feedforward.experts.3.down"]
    assert record.achieved["neurons"] == [24, 12]
    assert ("tokens" in record.achieved) == (criterion in ("norm", "variance"))
    assert records["blocks.0.feedforward.shared.up"].note == "the shared expert of a mixture keeps its neurons"
    assert records["blocks.0.feedforward.router.projection"].skipped


@pytest.mark.parametrize("router", [{"kind": "softmax"}, {"kind": "sigmoid"}, {"kind": "noisy_top_k"}])
def test_experts_that_are_never_chosen_leave_without_a_trace(tmp_path, router):
    balance = [{"kind": "bias"}] if router["kind"] == "sigmoid" else []
    model = build(FIVE | {"router": router, "balance": balance})
    for layer in range(2):
        if router["kind"] == "sigmoid":
            model.blocks[layer].feedforward.router.bias.copy_(torch.tensor([0.1, -100.0, 0.2, 0.0, -0.3]))
        else:
            starve(model, layer)
    data = batches()
    with torch.no_grad():
        expected = [model(batch["tokens"]).logits for batch in data]
    records = {r.name: r for r in prune_structured(model, ["experts"], 0.2, "norm", data)}
    assert {layer.feedforward.count for layer in model.config.layers} == {4}
    assert {layer.feedforward.top_k for layer in model.config.layers} == {2}
    with torch.no_grad():
        for batch, logits in zip(data, expected, strict=True):
            torch.testing.assert_close(model(batch["tokens"]).logits, logits, rtol=0, atol=1e-6)
    gone = 1 if router["kind"] == "sigmoid" else 4
    record = records[f"blocks.0.feedforward.experts.{gone}.up"]
    assert record.achieved["experts"] == [5, 4]
    assert record.note.startswith(f"expert {gone} was removed")
    assert len([r for r in records.values() if r.achieved.get("shape") == [0, 0]]) == 2 * 3
    if gone == 1:
        assert "it is expert 1 of 4 now" in records["blocks.1.feedforward.experts.2.gate"].note
        assert model.blocks[0].feedforward.router.bias.tolist() == pytest.approx([0.1, 0.2, 0.0, -0.3])
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("criterion", sorted(IMPORTANCES))
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_experts_neurons_and_heads_go_together(criterion, allocation):
    model = build(FIVE | {"expert": {"kind": "mlp", "width": 24}})
    ratios = {"experts": 0.4, "neurons": 0.25, "heads": 0.5}
    prune_structured(model, list(ratios), ratios, criterion, batches(), allocation=allocation, compensation="add")
    for block, layer in zip(model.blocks, model.config.layers, strict=True):
        experts = block.feedforward.experts
        assert experts.up.shape[:2] == (layer.feedforward.count, layer.feedforward.expert.width)
        assert block.feedforward.router.projection.out_features == layer.feedforward.count >= 2
    assert model(TOKENS).logits.isfinite().all()
    counts = [layer.feedforward.count for layer in model.config.layers]
    assert counts == [3, 3] if allocation == "uniform" else sum(counts) == 6


def test_the_least_routed_expert_goes_and_the_mass_is_what_the_router_gave():
    model, data = build(depth=1), batches()
    with torch.no_grad():
        x = inputs_of(model, "blocks.0.feedforward.router", data)
        routing = model.blocks[0].feedforward.router(x[None])
        mass = torch.zeros(4).scatter_add(0, routing.chosen.flatten(), routing.weights.flatten())
    records = {r.name: r for r in prune_structured(model, ["experts"], 0.25, "variance", data)}
    gone = [name for name, record in records.items() if record.achieved.get("shape") == [0, 0]]
    assert {int(name.split(".")[4]) for name in gone} == {int(mass.argmin())}


@pytest.mark.parametrize(
    ("moe", "ratio", "message"),
    [
        (MOE, 0.75, "leaves 1 of the 4 experts of block 0, and 2 must stay: a token has 2 of them"),
        (MOE | {"router": "switch", "top_k": 1}, 0.75, "leaves 1 of the 4 experts of block 0, and 2 must stay"),
        (MOE, 0.1, "rounds to none of the 4 experts"),
        ({"kind": "swiglu", "width": 24}, 0.5, "target 'experts': no block of this model has any"),
        (MOE | {"router": {"kind": "sigmoid", "groups": 2, "top_groups": 1}}, 0.25, "chooses among groups of them"),
    ],
)
def test_experts_that_cannot_go_are_refused(moe, ratio, message):
    model = build(moe)
    with pytest.raises(UserError, match=message):
        prune_structured(model, ["experts"], ratio, "magnitude")
    assert model(TOKENS).logits.isfinite().all()


def test_an_interrupted_cut_of_experts_ends_in_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step):
        if step.index == 1:
            raise Stopped

    whole, resumed = build(), build()
    how = {"targets": ["experts", "neurons"], "ratio": 0.25, "criterion": "norm", "batches": batches()}
    prune_structured(whole, **how)
    with pytest.raises(Stopped):
        prune_structured(build(), **how, store=FolderStore(tmp_path), progress=stop)
    prune_structured(resumed, **how, store=FolderStore(tmp_path))
    assert resumed.config == whole.config
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_zeros_of_stacked_experts_are_held():
    model = build()
    sparsify(model, "magnitude", Unstructured(0.5, "row"))
    masks = masks_of(model)
    assert masks["blocks.0.feedforward.experts.gate"].shape == (4, 24, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    held = HeldMasks(model, masks)
    held.attach(optimizer)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    assert count_violations(model, masks) == 0
    assert not torch.equal(model.blocks[0].feedforward.experts.gate, torch.zeros(4, 24, 32))


@pytest.mark.parametrize("write", [export_folder, export_compressed_tensors])
def test_quantized_experts_are_exported(tmp_path, write):
    model = build(head="untied")
    quantize_model(model, Rtn(IntFormat(4, 8)))
    write(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert (loaded(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-5
