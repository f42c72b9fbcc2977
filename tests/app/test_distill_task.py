"""The distillation task: what it trains, what it keeps, what it logs, and that it resumes to the bit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from app.callbacks.randomness import RandomState
from app.data.corpus import synthetic
from app.data.module import TextData
from app.optim import AdamW, Cosine, Muon
from app.tasks.distill import Distillation
from compress.distillation.losses.loss import Combine
from compress.pruning.masks import count_violations, masks_of
from compress.pruning.patterns import NOfM
from compress.pruning.sparsify import sparsify
from compress.quantization import Rtn
from compress.quantization.affine import IntFormat
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer
from tests.app import distillation_run

ARCHITECTURE = {
    "width": 32,
    "context": 32,
    "attention": {"kind": "full", "heads": 2},
    "feedforward": {"kind": "swiglu", "width": 48},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a teacher, whose tokenizer is the data's."""
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "text.txt").write_text("\n".join(document.text for document in synthetic(documents=60, words=60).texts))
    tokenizer = data(folder).tokenizer
    torch.manual_seed(0)
    teacher = Transformer(ModelConfig.from_dict({**ARCHITECTURE, "depth": 4, "vocab_size": tokenizer.vocab_size}))
    save(teacher, folder / "teacher", tokenizer)
    sparsify(teacher, "magnitude", NOfM(2, 4))
    save(teacher, folder / "sparse", tokenizer)
    return folder


def save(model, folder, tokenizer):
    folder.mkdir()
    save_model(model, folder)
    tokenizer.save(folder)


def data(folder: Path, **changes) -> TextData:
    options = {"source": str(folder / "text.txt"), "sequence_length": 32, "batch_size": 4, "vocab_size": 300}
    return TextData(**(options | {"cache_dir": str(folder / "cache")} | changes))


def task(place, student=None, **options):
    student = {**ARCHITECTURE, "depth": 2} if student is None else student
    options = {"losses": ["logit", "feature"], "schedule": Cosine(warmup_steps=1), **options}
    return Distillation(str(place / "teacher"), student, **options)


def fit(module, place, tmp_path, steps, resume=None, **trainer):
    pl.seed_everything(1, verbose=False)
    torch.use_deterministic_algorithms(True)
    options = {"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3, save_top_k=-1)
    trainer = pl.Trainer(
        **options,
        callbacks=[checkpoints, RandomState()],
        enable_model_summary=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        val_check_interval=4,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        **trainer,
    )
    trainer.fit(module, data(place), ckpt_path=resume, weights_only=True)
    torch.use_deterministic_algorithms(False)
    return trainer


def test_a_student_learns_and_every_term_is_logged(place, tmp_path):
    module = task(place, optimizer=AdamW(lr=3e-3), combine=Combine(0.5, {"feature": 0.1}))
    trainer = fit(module, place, tmp_path, 12)
    metrics = trainer.callback_metrics
    for name in ("cross_entropy", "logit", "feature", "agreement"):
        assert math.isfinite(metrics[f"train/{name}"])
    assert 0 <= metrics["validation/agreement"] <= 1
    assert metrics["validation/perplexity"] == pytest.approx(math.exp(metrics["validation/loss"]), rel=1e-4)
    assert metrics["validation/loss"] < math.log(300)
    assert metrics["validation/logit"] >= 0


def test_validation_figures_are_over_all_targets(place, tmp_path):
    """Batches of unequal numbers of targets: each target counts once, not each batch."""
    module = task(place, losses=["logit"])
    fit(module, place, tmp_path, 1)
    held = data(place, batch_size=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(module, held, verbose=False)
    nll = agreed = divergence = 0.0
    counts = []
    module.eval()
    with torch.no_grad():
        for batch in held.val_dataloader():
            kept = batch["targets"] != -100
            ours, theirs = (
                model(batch["tokens"], documents=batch["documents"]).logits[kept]
                for model in (module.model, module.teacher)
            )
            nll += float(torch.nn.functional.cross_entropy(ours, batch["targets"][kept], reduction="sum"))
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            p, q = ((logits / 2).log_softmax(-1) for logits in (theirs, ours))  # at the temperature of 2
            divergence += 4 * float((p.exp() * (p - q)).sum())
            counts.append(int(kept.sum()))
    assert len(set(counts)) > 1
    metrics, count = trainer.callback_metrics, sum(counts)
    assert metrics["validation/loss"] == pytest.approx(nll / count, rel=1e-4)
    assert metrics["validation/agreement"] == pytest.approx(agreed / count, abs=1e-6)
    assert metrics["validation/logit"] == pytest.approx(divergence / count, rel=1e-4)


def test_the_teacher_stays_out_and_the_projector_in_the_checkpoint(place, tmp_path):
    module = task(place)
    fit(module, place, tmp_path, 3)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    prefixes = {name.split(".")[0] for name in state}
    assert prefixes == {"model", "objective"}
    assert {name.removeprefix("model.") for name in state if name.startswith("model.")} == set(
        module.model.state_dict()
    )
    assert len([name for name in state if "projector" in name]) == 2
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert not module.teacher.training
    saved = tmp_path / "student"
    saved.mkdir()
    save_model(module.model, saved)
    assert not any("projector" in name for name in module.model.state_dict())


@pytest.mark.parametrize("options", [{}, {"compute_dtype": "bfloat16", "optimizer": Muon(lr=1e-3)}])
def test_a_resumed_run_equals_the_uninterrupted_one(place, tmp_path, options):
    student = {**ARCHITECTURE, "depth": 2, "dropout": 0.1}
    whole = task(place, student, **options)
    fit(whole, place, tmp_path / "whole", 6)
    fit(task(place, student, **options), place, tmp_path / "first", 6, limit_train_batches=None)
    resumed = task(place, student, **options)
    checkpoint = next((tmp_path / "first").glob("*step=3*.ckpt"))
    fit(resumed, place, tmp_path / "second", 6, resume=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("optimizer", [AdamW(lr=3e-3, weight_decay=0.5), Muon(lr=3e-3, weight_decay=0.5)])
def test_a_sparse_student_keeps_its_zeros_also_over_a_resume(place, tmp_path, optimizer):
    module = task(place, str(place / "sparse"), optimizer=optimizer)
    fit(module, place, tmp_path / "first", 3)
    masks = masks_of(module.model)
    assert len(masks) == 4 * 7
    assert all(float(mask.float().mean()) == 0.5 for mask in masks.values())
    resumed = task(place, str(place / "sparse"), optimizer=optimizer)
    fit(resumed, place, tmp_path / "second", 6, resume=str(tmp_path / "first" / "last.ckpt"))
    assert count_violations(resumed.model, masks) == 0
    moved = [
        name for name in masks if not torch.equal(module.model.state_dict()[name], resumed.model.state_dict()[name])
    ]
    assert len(moved) == len(masks)


def test_free_zeros_grow(place, tmp_path):
    module = task(place, str(place / "sparse"), zeros="free")
    fit(module, place, tmp_path, 2)
    assert masks_of(module.model) == {}


def test_layers_are_copied_from_the_teacher(place, tmp_path):
    module = task(place, initialization="layers", losses=["logit"], optimizer=AdamW(lr=0.0))
    fit(module, place, tmp_path, 1)
    assert module.initialized["blocks"] == [[0, 1], [1, 3]]
    assert torch.equal(module.model.blocks[1].attention.q.weight, module.teacher.blocks[3].attention.q.weight)


def test_accumulation_over_micro_batches_is_one_large_batch(place, tmp_path):
    weights = []
    for accumulate in (1, 2):
        module = task(place, losses=["logit"], optimizer=AdamW(lr=1e-3))
        pl.seed_everything(1, verbose=False)
        trainer = pl.Trainer(
            max_steps=2,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data(place, batch_size=8 // accumulate))
        weights.append(module.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({**ARCHITECTURE, "depth": 2, "vocab_size": 512}, "the teacher's vocabulary has"),
        ("nowhere.yaml", "no architecture file"),
        ({**ARCHITECTURE, "depth": 2, "widht": 3}, "did you mean 'width'"),
        ({**ARCHITECTURE, "depth": 2, "direction": "bidirectional"}, "the architecture is bidirectional"),
    ],
)
def test_students_that_cannot_be_are_refused(place, tmp_path, student, words):
    with pytest.raises(UserError, match=words):
        fit(task(place, student), place, tmp_path, 1)


def test_a_student_with_weights_is_not_initialized(place):
    with pytest.raises(UserError, match="has weights already"):
        task(place, str(place / "sparse"), initialization="layers")


def test_data_of_another_tokenizer_is_refused(place, tmp_path):
    module = task(place)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="must use the teacher's tokenizer"):
        trainer.fit(module, data(place, vocab_size=280))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"losses": ["logitt"]}, "did you mean 'logit'"),
        ({"combine": Combine(0.5, {"feature": 1.0}), "losses": ["logit"]}, "not used"),
        ({"initialization": "layer"}, "did you mean 'layers'"),
    ],
)
def test_wrong_options_are_refused(place, options, words):
    with pytest.raises(UserError, match=words):
        task(place, **options)


WIDER = {**ARCHITECTURE, "width": 48, "depth": 2}  # its projectors are no square matrices


def distil(place, out, strategy, **options):
    """Run tests/app/distillation_run.py, on one process in this one; returns its state and its figures."""
    out.mkdir()
    if strategy == "auto":
        distillation_run.main(place, out, strategy, options)
    else:
        command = [sys.executable, "-m", "tests.app.distillation_run", place, out, strategy, json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return torch.load(out / "state.pt", weights_only=True), json.loads((out / "figures.json").read_text())


def assert_near(found, expected, tolerance):
    (state, figures), (wanted, numbers) = found, expected
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=tolerance)
    for name in ("validation/loss", "validation/agreement", "validation/logit"):
        assert figures[name] == pytest.approx(numbers[name], rel=1e-3, abs=tolerance)


@pytest.fixture(scope="module")
def sharded(place, tmp_path_factory):
    """A sparse student after six steps of two micro-batches on two processes, in shards."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    return out, *distil(place, out, "fsdp2", student=str(place / "sparse"))


def test_shards_learn_what_one_process_does_and_keep_their_zeros(place, sharded, tmp_path):
    _, state, figures = sharded
    assert_near((state, figures), distil(place, tmp_path / "out", "auto", student=str(place / "sparse")), 1e-5)
    weights = [weight for name, weight in state.items() if "blocks" in name and weight.dim() == 2]
    assert len(weights) == 4 * 7
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in weights)


@pytest.mark.slow
def test_a_run_resumed_from_its_shards_equals_the_uninterrupted_one(place, sharded, tmp_path):
    out, state, _ = sharded
    checkpoint = next((out / "checkpoints").glob("*step=2*"))
    assert checkpoint.is_dir()
    resumed, _ = distil(place, tmp_path / "out", "fsdp2", student=str(place / "sparse"), resume=str(checkpoint))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in state.items())


@pytest.mark.slow
def test_a_quantized_student_learns_in_shards_what_it_does_on_one_process(place, tmp_path):
    packed = load(place / "sparse")
    quantize_model(packed, Rtn(IntFormat(4, 16)))
    save(packed, tmp_path / "packed", data(place).tokenizer)
    options = {"student": str(tmp_path / "packed"), "steps": 3}
    found = [distil(place, tmp_path / name, name, **options) for name in ("auto", "fsdp2")]
    assert any("parametrizations" in name for name in found[0][0])
    assert_near(found[1], found[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_projectors_are_trained_on_two_processes_as_on_one(place, tmp_path, compute_dtype, tolerance):
    options = {"student": WIDER, "steps": 3, "compute_dtype": compute_dtype}
    alone = distil(place, tmp_path / "auto", "auto", **options)
    assert len([name for name in alone[0] if "projector" in name]) == 2
    for strategy in ("ddp", "fsdp2"):
        assert_near(distil(place, tmp_path / strategy, strategy, **options), alone, tolerance)
