"""Product quantization: its parts against their definitions, its layers against the weights, its switches at work."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app.evaluation.quality import BlockSubset, Quality, evaluate_quality, paired
from compress.calibration.optimal_brain_surgeon import output_error
from compress.calibration.statistics import Hessian
from compress.calibration.store import FolderStore
from compress.quantization.formats.codebook import ProductEmbedding, ProductFormat, ProductLinear, decode
from compress.quantization.methods.product import FLOOR, Indices, ProductQuantization, quantize
from compress.quantization.plan import quantize_model
from compress.quantization.quantizer import METHODS, title_of
from compress.quantization.tuning import BlockTuning, _tokens
from compress.quantization.vector_kmeans import arrange, assign, cluster, update
from models.attention.protocol import ForwardInputs
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

FORMATS = [
    ProductFormat(vector, codewords, books, group, permuted)
    for vector, codewords, books, group, permuted in [
        (4, 256, 1, "tensor", False),
        (8, 16, 1, "tensor", True),
        (2, 5, 2, "tensor", True),
        (1, 4, 1, 32, False),
        (3, 200, 2, "tensor", False),
        (8, 8, 2, 48, True),
        (16, 9, 1, 32, False),
    ]
]
SHAPES = [(64, 128), (130, 100), (70, 33)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, width, seed=0):
    return random(tokens, width, seed=seed) @ (random(width, width, seed=9) * torch.linspace(0.05, 1, width))


def linear(rows, width, form, bias=True, dtype=torch.float32):
    module = nn.Linear(width, rows, bias=bias, dtype=dtype)
    module.weight.data = random(rows, width, seed=rows).to(dtype)
    words = quantize(module.weight.data.float(), form, random(width).square())
    return ProductLinear.of(module, words), words.dequantize(), module.bias


def written_out(words, rows):
    """The weights of an index, a codebook and an order, one by one."""
    form, dense = words.format, torch.zeros(rows, words.width)
    order = range(10**6) if words.order is None else words.order.tolist()
    for n in range(rows):
        for b in range(form.vectors(words.width)):
            group = b // form.per_group(words.width)
            value = sum(words.codebooks[r, group, int(words.index[n, r, b])].float() for r in range(form.codebooks))
            for j in range(form.vector):
                if order[b * form.vector + j] < words.width:
                    dense[n, order[b * form.vector + j]] = value[j]
    return dense


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantize_is_what_the_codewords_say_one_by_one(form):
    words = quantize(random(60, 33), form)
    assert torch.equal(words.dequantize(), written_out(words, 60))


@pytest.mark.parametrize("energy", [None, random(33).square()], ids=["alike", "by energy"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("vector", [4, 8])
def test_padding_weighs_in_no_codeword(vector, permuted, energy):
    """Each sub-vector has the codeword that is nearest on its real columns, whatever it holds on the others."""
    weight = random(60, 33) + 0.5
    words = quantize(weight, ProductFormat(vector, 16, 1, "tensor", permuted), energy)
    order = torch.arange(words.index.shape[2] * vector) if words.order is None else words.order.long()
    share = torch.zeros(len(order))
    share[:33] = 1 if energy is None else energy + FLOOR * energy.mean()
    vectors = F.pad(weight, (0, len(order) - 33))[:, order].view(60, -1, 1, vector)  # (N, B, 1, v)
    lost = (share[order].view(-1, 1, vector) * (vectors - words.codebooks[0, 0].float()).square()).sum(-1)  # (N, B, C)
    chosen = lost.gather(-1, words.index[:, 0, :, None].long())[..., 0]
    torch.testing.assert_close(chosen, lost.min(-1).values)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_are_those_of_the_weights(form):
    for rows, width in SHAPES:
        packed, dense, bias = linear(rows, width, form)
        assert torch.equal(packed.dequantize(), dense)
        for batch in ((1,), (1, 1), (2, 3), (0,)):
            x = random(*batch, width, seed=3)
            with torch.no_grad():
                torch.testing.assert_close(packed(x), F.linear(x, dense, bias), rtol=1e-4, atol=1e-4)
                low = packed(x.bfloat16())
            assert low.dtype == torch.bfloat16
            expected = F.linear(x.bfloat16().float(), dense, bias)
            assert (low.float() - expected).norm() <= 0.01 * expected.norm()


def test_which_way_it_multiplies_is_said(monkeypatch):
    packed, _, _ = linear(64, 128, FORMATS[0])
    assert "table" in packed.choice("cpu", 1, torch.bfloat16).name
    assert packed.choice("cpu", 2, torch.bfloat16).name == "dequantize, then matmul"
    assert "not been measured on cuda" in packed.choice("cuda", 1, torch.bfloat16).reason
    used = []
    table = packed.from_table
    monkeypatch.setattr(packed, "from_table", lambda *args: used.append(1) or table(*args))
    with torch.no_grad():
        packed(torch.randn(1, 1, 128))
        assert used == [1]
        packed(torch.randn(2, 128))
    assert used == [1]


def test_codebooks_may_begin_anywhere_in_memory():
    """As they do in a file that is mapped: a load of 16 bytes from such a place ended the process."""
    code = """
import torch
from compress.quantization.formats.codebook import _pick
for length in (1, 2, 4, 8):
    print("codewords of", length, flush=True)
    book = torch.randn(256, length).bfloat16()
    moved = torch.frombuffer(bytearray(book.nbytes + 64), dtype=torch.uint8)
    start = 2 - moved.data_ptr() % 16 + 16
    held = torch.frombuffer(moved.numpy().data, dtype=torch.bfloat16, offset=start, count=book.numel()).view_as(book)
    held.copy_(book)
    index = torch.randint(256, (40, 7), dtype=torch.int32)
    assert held.data_ptr() % 16 == 2
    assert torch.equal(_pick(held, index), torch.nn.functional.embedding(index, book))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_reach_the_input():
    packed, dense, _ = linear(32, 64, FORMATS[1], bias=False)
    x = random(1, 64).requires_grad_()
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0, keepdim=True))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_embedding_decodes_the_rows_asked_for_alone(form, monkeypatch):
    module = nn.Embedding(130, 33)
    words = quantize(module.weight.data, form)
    packed, dense = ProductEmbedding.of(module, words), words.dequantize()
    decoded = []
    monkeypatch.setattr(
        "compress.quantization.formats.codebook.decode",
        lambda index, *args: decoded.append(len(index)) or decode(index, *args),
    )
    tokens = torch.tensor([[3, 129, 3], [0, 7, 64]])
    assert torch.equal(packed(tokens), dense[tokens])
    assert decoded == [6]
    assert packed(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 33)
    hidden = random(5, 33)
    torch.testing.assert_close(packed.project(hidden), hidden @ dense.T, rtol=1e-4, atol=1e-4)
    packed.to(torch.bfloat16)
    assert torch.equal(packed(tokens), dense[tokens].bfloat16())
    assert torch.equal(packed.dequantize(), dense)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_state_dict_is_the_layer(form):
    packed, dense, _ = linear(48, 100, form)
    with torch.device("meta"):
        again = ProductLinear.empty(nn.Linear(100, 48), packed.spec())
    state = packed.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    again.load_state_dict(state, assign=True)
    assert torch.equal(again.dequantize(), dense)


@pytest.mark.parametrize("numbers", [(4, 256, 1), (8, 256, 1), (8, 256, 2), (4, 16, 1), (2, 8, 2)])
@pytest.mark.parametrize("permuted", [True, False])
def test_memory_is_the_true_bits(numbers, permuted):
    vector, codewords, books = numbers
    packed = ProductLinear(512, 1024, ProductFormat(vector, codewords, books, "tensor", permuted))
    indices = 512 * 1024 * books * np.log2(codewords) / vector
    theory = (indices + 16 * books * codewords * vector + (16 * 1024 if permuted else 0)) / 8
    assert packed.memory_bytes() == packed.stored_bytes() == sum(t.nbytes for t in packed.state_dict().values())
    assert theory <= packed.memory_bytes() <= 1.05 * theory


def objective(vectors, weights, book, index):
    return float((weights * (vectors - book[index]).square()).double().sum())


@pytest.mark.parametrize(("length", "codewords"), [(4, 64), (8, 32)])
def test_plain_k_means_is_as_good_as_scikit_learns(length, codewords):
    sklearn = pytest.importorskip("sklearn.cluster")
    vectors = (random(96, 160) * torch.linspace(0.2, 1, 160)).view(96, -1, length)
    weights = torch.ones(vectors.shape[1:])
    ours = np.mean([objective(vectors, weights, *cluster(vectors, weights, codewords, seed)) for seed in range(3)])
    flat = vectors.flatten(0, 1).numpy()
    theirs = np.mean([sklearn.KMeans(codewords, n_init=1, random_state=seed).fit(flat).inertia_ for seed in range(3)])
    assert ours <= 1.01 * theirs


def test_weighted_k_means_is_as_good_as_scikit_learns_where_it_has_such_weights():
    sklearn = pytest.importorskip("sklearn.cluster")
    vectors, weights = random(128, 30, 4), torch.linspace(0.1, 1, 30).square()[:, None].expand(30, 4)
    ours = np.mean([objective(vectors, weights, *cluster(vectors, weights, 32, seed)) for seed in range(3)])
    flat, share = vectors.flatten(0, 1).numpy(), weights[:, 0].repeat(128).numpy()
    fits = [sklearn.KMeans(32, n_init=1, random_state=seed).fit(flat, sample_weight=share) for seed in range(3)]
    assert ours <= 1.01 * np.mean([fit.inertia_ for fit in fits])


def test_assignment_and_update_are_the_best_ones():
    vectors, weights, book = random(20, 6, 3), random(6, 3, seed=1).square(), random(7, 3, seed=2)
    index, distance = assign(vectors, weights, book)
    every = (weights[:, None] * (vectors[:, :, None] - book).square()).sum(-1)  # (N, B, C)
    torch.testing.assert_close(distance, every.min(-1).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every.gather(-1, index[..., None])[..., 0], every.min(-1).values)
    leaf = update(vectors, weights, book, index).requires_grad_()
    slope = torch.autograd.grad((weights * (vectors - leaf[index]).square()).sum(), leaf)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-4)


def test_no_codeword_is_left_empty_and_the_same_seed_gives_the_same():
    vectors = torch.cat([random(50, 4, 2, seed=1) * 1e-3, random(4, 4, 2) * 10])  # most of them in one heap
    weights = torch.ones(4, 2)
    book, index = cluster(vectors, weights, 40, seed=5)
    assert len(index.unique()) == 40
    again = cluster(vectors, weights, 40, seed=5)
    assert torch.equal(book, again[0])
    assert torch.equal(index, again[1])


def test_many_sub_vectors_are_sampled_for_the_rounds_and_all_assigned():
    vectors, weights = random(3000, 8, 2), torch.ones(8, 2)
    book, index = cluster(vectors, weights, 8)
    assert index.shape == (3000, 8)
    assert torch.equal(index, assign(vectors, weights, book)[0])


def test_the_order_is_one_and_lowers_the_objective():
    shared = random(200, 8, seed=4).repeat(1, 8)[:, torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    matrix, weights = shared + 0.3 * random(200, 64), torch.linspace(0.1, 2, 64)
    order = arrange(matrix, weights, 4)
    assert order.sort().values.equal(torch.arange(64))

    def lost(order):
        vectors, own = matrix[:, order].view(200, -1, 4), weights[order].view(-1, 4)
        return objective(vectors, own, *cluster(vectors, own, 64))

    assert lost(order) < 0.8 * lost(torch.arange(64))


def errors(energy, **numbers):
    """Relative error of the outputs on fresh inputs, of a matrix with correlated ones, for three starts."""
    weight, hessian, fresh = random(128, 96, seed=1), Hessian(96, "cpu"), Hessian(96, "cpu")
    hessian.update(correlated(2000, 96))
    fresh.update(correlated(2000, 96, seed=1))
    energy = hessian.matrix().diagonal() if energy else None
    form = ProductFormat(**{"vector": 4, "codewords": 64, **numbers})
    return [
        output_error(weight, quantize(weight, form, energy, seed).dequantize(), fresh.matrix()) for seed in range(3)
    ]


def test_each_switch_lowers_the_error_beyond_the_noise_of_the_start():
    plain, weighted = errors(False), errors(True)
    assert max(weighted) < min(plain)
    assert max(errors(True, permuted=True)) < min(weighted)
    assert max(errors(True, codebooks=2)) < min(weighted)
    assert max(errors(True, group_size=24)) < min(weighted)


def build(head="tied"):
    torch.manual_seed(0)
    config = {
        "width": 64,
        "depth": 2,
        "vocab_size": 256,
        "context": 64,
        "head": head,
        "position": "rope",
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2, "bias": True},
        "feedforward": {"kind": "swiglu", "width": 100},
    }
    return Transformer(ModelConfig.from_dict(config)).eval()


def batches(count=2, rows=4, length=32):
    generator = torch.Generator().manual_seed(7)
    return [{"tokens": torch.randint(0, 256, (rows, length), generator=generator)} for _ in range(count)]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(batch["tokens"]).logits for batch in data])


SMALL = ProductQuantization(Indices(2), codewords=16, residual=True, tuning=BlockTuning(steps=3))


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, head, dtype):
    model, data = build(head), batches()
    records = quantize_model(model, SMALL, data, embedding=SMALL, head=SMALL)
    assert not any(record.skipped for record in records)
    notes = {record.name: record.note for record in records}
    assert ("reads token ids" in notes["embedding"]) == (head == "untied")
    assert "the block's output error went from" in notes["blocks.1.attention.q"]
    model.to(dtype)
    before = logits(model, data)
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    again = load(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(logits(again, data), before)
    assert all(isinstance(again.get_submodule(name), ProductLinear) for name in notes if name.startswith("blocks"))


@pytest.mark.parametrize("killed_after", range(1, 6))
def test_killed_anywhere_and_run_again_it_gives_the_same_bytes(tmp_path, killed_after):
    whole = build()
    expected = quantize_model(whole, SMALL, batches(), embedding=SMALL)

    class Killed(Exception):
        pass

    class Dying(FolderStore):
        steps = 0

        def save(self, *args):
            self.steps += 1
            if self.steps > killed_after:
                raise Killed
            super().save(*args)

    if killed_after < 5:
        with pytest.raises(Killed):
            quantize_model(build(), SMALL, batches(), embedding=SMALL, store=Dying(tmp_path))
    resumed = build()
    records = quantize_model(resumed, SMALL, batches(), embedding=SMALL, store=FolderStore(tmp_path))
    state, reference = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)
    assert [(r.name, r.achieved, r.error, r.note) for r in records] == [
        (r.name, r.achieved, r.error, r.note) for r in expected
    ]


def test_tuning_changes_codewords_alone_and_lowers_the_error_of_every_block():
    still, tuned = build(), build()
    bare = ProductQuantization(Indices(1), codewords=16)
    quantize_model(still, bare, batches())
    records = quantize_model(
        tuned, ProductQuantization(Indices(1), codewords=16, tuning=BlockTuning(steps=20)), batches()
    )
    before, after = still.state_dict(), tuned.state_dict()
    first = [name for name in before if name.startswith("blocks.0") and "codebooks" not in name]
    assert all(torch.equal(before[name], after[name]) for name in first)
    for record in records:
        if record.name.startswith("blocks"):
            numbers = record.note.rpartition("went from ")[2].split(" to ")
            assert float(numbers[1]) < 0.95 * float(numbers[0])


def test_what_does_not_fit_is_counted_and_said():
    model = build()
    records = {r.name: r for r in quantize_model(model, ProductQuantization(Indices(1), codewords=256), batches())}
    down, narrow = records["blocks.0.feedforward.down"], records["blocks.0.attention.v"]
    assert "sub-vectors of 8 do not divide 100 inputs: the last of a row has 4" in down.note
    assert down.achieved["bits"] == pytest.approx(8 * model.blocks[0].feedforward.down.stored_bytes() / (64 * 100))
    assert "too small for 256 codewords" in narrow.note
    assert narrow.achieved["codewords"] == 128
    assert narrow.achieved["bits"] < 16
    layer = nn.Linear(8, 2, bias=False)
    new, record = ProductQuantization(weighted=False).compress("layer", layer, None)
    assert new is None or record.achieved["bits"] < 16
    tiny = nn.Linear(4, 1, bias=False)
    new, record = ProductQuantization(weighted=False).compress("tiny", tiny, None)
    assert new is None
    assert record.skipped
    assert "left dense" in record.note


def test_pruned_weights_and_inputs_that_never_came_are_said_and_survived():
    layer, statistic = nn.Linear(64, 128, bias=False), Hessian(64, "cpu")
    layer.weight.data[torch.rand(128, 64) < 0.5] = 0
    _, record = ProductQuantization(codewords=16).compress("layer", layer, statistic)
    assert "do not stay zero" in record.note
    assert "no calibration token reached it: all inputs weigh the same" in record.note
    statistic.update(torch.zeros(5, 64))
    new, _ = ProductQuantization(codewords=16).compress("layer", layer, statistic)
    assert new.dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"codewords": 1}, "codewords must be a whole number from 2 to 256, got 1"),
        ({"codewords": 512}, "codewords must be"),
        ({"vector": 0}, r"vector .* must be a whole number from 1 to 64, got 0"),
        ({"tuning": {"kind": "blocks", "steps": 0}}, "steps of the tuning is 0"),
        ({"tuning": {"kind": "blocks", "rate": 0}}, "rate of the tuning is 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, words):
    with pytest.raises(UserError, match=words):
        METHODS.parse({"kind": "product", **numbers}, "method")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (ProductQuantization(vector=2), "sub-vectors of 2 with 8 bits of index take more than the 2 bits"),
        (ProductQuantization(Indices(2, 30)), "group_size is 30; sub-vectors of 4 need a multiple of 4"),
        (ProductQuantization(vector=64), "sub-vectors of 64 are longer than the 63 inputs of narrow"),
        (ProductQuantization(Indices(2, "channel")), "group_size must be a whole number"),
    ],
)
def test_numbers_that_contradict_each_other_or_the_model_are_refused(method, words):
    with pytest.raises(UserError, match=words):
        method.prepare(build(), None)
        method.compress("narrow", nn.Linear(63, 1024, bias=False), None)


def test_more_codewords_than_the_largest_matrix_has_sub_vectors_are_refused():
    torch.manual_seed(0)
    config = {"width": 16, "depth": 1, "vocab_size": 20, "context": 8, "attention": {"kind": "full", "heads": 2}}
    config["feedforward"] = {"kind": "swiglu", "width": 16}
    with pytest.raises(UserError, match="codewords is 256, but the largest matrix has"):
        quantize_model(Transformer(ModelConfig.from_dict(config)), ProductQuantization(vector=16), batches())


def changed(trained, *methods) -> list[Quality]:
    """Quality of a copy of the trained model after each method, over the same blocks."""
    held_out, found = BlockSubset(trained.held_out.blocks, trained.held_out.indices[::2]), []
    for method in methods:
        model = copy.deepcopy(trained.model)
        quantize_model(model, method, trained.calibration[:2])
        found.append(evaluate_quality(model, held_out))
    return found


def test_weighted_is_better_than_plain_on_a_trained_model(trained):
    plain = ProductQuantization(Indices(1), codewords=16, weighted=False, permuted=False)
    weighted = ProductQuantization(Indices(1), codewords=16, permuted=False)
    assert paired(*changed(trained, plain, weighted)).high < 0


@pytest.mark.parametrize("seed", [1, 2])
def test_weighted_is_better_than_plain_for_other_starts(trained, seed):
    plain = ProductQuantization(Indices(1), codewords=16, weighted=False, permuted=False, seed=seed)
    weighted = ProductQuantization(Indices(1), codewords=16, permuted=False, seed=seed)
    assert paired(*changed(trained, plain, weighted)).high < 0


def test_tuned_codewords_are_better_on_a_trained_model(trained):
    still = ProductQuantization(Indices(1), codewords=16)
    tuned = ProductQuantization(Indices(1), codewords=16, tuning=BlockTuning(steps=8, rate=0.05))
    assert paired(*changed(trained, still, tuned)).high < 0


def test_the_title_speaks_of_codebooks():
    assert title_of(ProductQuantization()).startswith("PRODUCT, 2 bits, one codebook a matrix")


@torch.no_grad()
def test_padding_teaches_no_codeword():
    x, documents = torch.randn(2, 3, 4), torch.tensor([[0, 0, -1], [0, -1, -1]])
    context = ForwardInputs((), None, True, documents=documents)
    assert torch.equal(_tokens(x, context), torch.stack([x[0, 0], x[0, 1], x[1, 0]]))
    assert len(_tokens(x, ForwardInputs((), None, True))) == 6
