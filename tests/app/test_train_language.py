"""The language-modelling task: its loss, its precision, its architecture, and loading it without data."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from training_help import ARCHITECTURE, fit, language_model, make_trainer, state_hash, text_data

from app.optim import AdamW, Constant
from app.strategies import WholeCheckpoints
from app.tasks.architecture import resolve_architecture
from app.tasks.compile import CompileBlocks
from app.tasks.precision import call_in
from app.tasks.training import Training
from models.checkpoint import load
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

COMPLETE = {**ARCHITECTURE, "dropout": 0.0, "vocab_size": 64, "context": 32}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def transformer(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**COMPLETE, **changes}))


def test_bf16_computing_brings_fp32_gradients_near_the_fp32_ones():
    model, tokens = transformer(), torch.randint(0, 64, (4, 33))
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        call_in(dtype, model, tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        gradients[dtype] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradients[torch.bfloat16].dtype == torch.float32
    assert not torch.equal(gradients[torch.bfloat16], gradients[torch.float32])
    similarity = torch.cosine_similarity(gradients[torch.bfloat16], gradients[torch.float32], dim=0)
    assert similarity > 0.999


def test_bf16_computing_equals_a_bf16_copy():
    model, tokens = transformer(), torch.randint(0, 64, (2, 16))
    copy = transformer().bfloat16()
    assert torch.equal(call_in(torch.bfloat16, model, tokens).logits, copy(tokens).logits)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_small_updates_are_not_lost_in_bf16():
    """fp32 master weights: an update below bf16's resolution adds up."""
    model = transformer()
    before = model.norm.weight.detach().clone()
    optimizer = AdamW(lr=1e-4).build(model)
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        call_in(torch.bfloat16, model, tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        optimizer.step()
    moved = (model.norm.weight - before).abs()
    assert 0 < moved.max() < torch.finfo(torch.bfloat16).eps


class Ragged(torch.utils.data.Dataset):
    """Rows of 8 tokens of which a varying number are targets."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 64, (9,), generator=generator)
        targets = tokens[1:].clone()
        targets[: index % 7] = -100
        return {"tokens": tokens[:-1], "targets": targets, "ids": torch.tensor([index, index])}


def accumulated(tmp_path, batch_size: int, accumulation: int, **options) -> Training:
    model = language_model(
        architecture=COMPLETE, optimizer=AdamW(lr=1e-2, weight_decay=0.0), schedule=Constant(), **options
    )
    trainer = make_trainer(
        tmp_path / f"{batch_size}", max_steps=2, accumulate_grad_batches=accumulation, limit_val_batches=0, logger=False
    )
    torch.manual_seed(5)
    model._settle()
    model.configure_model()
    trainer.fit(model, DataLoader(Ragged(), batch_size=batch_size))
    return model


def test_accumulation_counts_every_target_the_same(tmp_path):
    """Micro-batches with unlike numbers of targets give the gradient of the whole batch, not a mean of means."""
    whole, parts = accumulated(tmp_path, 12, 1), accumulated(tmp_path, 3, 4)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_short_last_window_is_divided_by_its_own_targets(tmp_path):
    """24 rows in batches of 5, accumulated by 4: the second step has one batch of 4 rows alone."""
    model = language_model(architecture=COMPLETE, optimizer=AdamW(lr=0.0), schedule=Constant())
    trainer = make_trainer(tmp_path / "run", max_steps=2, accumulate_grad_batches=4, limit_val_batches=0, logger=False)
    trainer.fit(model, DataLoader(Ragged(), batch_size=5))
    reference = model.model
    reference.zero_grad()
    rows = [Ragged()[i] for i in range(20, 24)]
    tokens, targets = (torch.stack([row[key] for row in rows]) for key in ("tokens", "targets"))
    reference(tokens, targets=targets).loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    assert float(model.figures.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    assert int(model.figures.count) == int((targets != -100).sum())


class Norms(Callback):
    """Remembers the norm of each step's gradient as the optimizer used it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if gradients:
            self.values.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_clipping_works_where_lightnings_own_raises(tmp_path, cache):
    """bf16-mixed, fused AdamW and gradient_clip_val together."""
    norms = Norms()
    trainer = make_trainer(tmp_path / "run", norms, max_steps=4, precision="bf16-mixed", gradient_clip_val=0.25)
    fit(trainer, language_model(), text_data(cache))
    assert trainer.optimizers[0].param_groups[0]["fused"]
    assert len(norms.values) == 3
    assert norms.values == pytest.approx([0.25] * 3, rel=1e-3)


def test_z_loss_pulls_the_partition_towards_zero(tmp_path, cache):
    sizes = []
    for name, weight in (("without", 0.0), ("with", 1.0)):
        model = language_model(z_loss=weight, optimizer=AdamW(lr=1e-2))
        fit(make_trainer(tmp_path / name, max_steps=25, limit_val_batches=0), model, text_data(cache))
        batch = next(iter(text_data(cache).val_dataloader()))
        with torch.no_grad():
            logits = model.model.eval()(batch["tokens"], documents=batch["documents"]).logits  # (B, T, V)
        sizes.append(float(logits.logsumexp(-1).square().mean()))
    assert sizes[1] < 0.5 * sizes[0]


def test_a_checkpoint_loads_without_data_and_the_folder_holds_the_same_model(tmp_path, cache):
    model = language_model()
    trainer = make_trainer(tmp_path / "run")
    fit(trainer, model, text_data(cache))
    path = tmp_path / "run.run" / "checkpoints" / "step-00000010.ckpt"
    loaded = Training.load_from_checkpoint(path, weights_only=True)
    assert state_hash(loaded) == state_hash(model)
    batch = next(iter(text_data(cache).val_dataloader()))
    expected = model.eval().model(batch["tokens"]).logits
    assert torch.equal(loaded.eval().model(batch["tokens"]).logits, expected)
    assert torch.equal(load(tmp_path / "run")(batch["tokens"]).logits, expected)
    history = json.loads((tmp_path / "run" / "history.json").read_text())["stages"]
    assert [(entry["stage"], entry["steps"]) for entry in history] == [("pretrain", 10)]


def test_the_logged_validation_is_the_mean_over_the_whole_split(tmp_path, cache):
    model, data = language_model(), text_data(cache)
    trainer = make_trainer(tmp_path / "run", max_steps=4, limit_val_batches=1.0)
    fit(trainer, model, data)
    nll = tokens = 0.0
    with torch.no_grad():
        for batch in text_data(cache).val_dataloader():
            logits = model.model.eval()(batch["tokens"], documents=batch["documents"]).logits.double()
            nll += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
            )
            tokens += int((batch["targets"] != -100).sum())
    metrics = trainer.callback_metrics
    assert tokens == data.blocks("validation").tokens
    assert float(metrics["validation/loss"]) == pytest.approx(nll / tokens, rel=1e-5)
    assert float(metrics["validation/perplexity"]) == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    bits = nll / math.log(2) / data.blocks("validation").bytes
    assert float(metrics["validation/bits_per_byte"]) == pytest.approx(bits, rel=1e-5)


def test_compiled_blocks_keep_their_names_and_their_numbers():
    model, tokens = transformer(), torch.randint(0, 64, (2, 32))
    names = list(model.state_dict())
    expected = model(tokens, targets=tokens).loss
    CompileBlocks(backend="aot_eager").apply(model)
    assert list(model.state_dict()) == names
    loss = call_in(torch.float32, model, tokens, targets=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_architecture_takes_what_it_lacks_from_the_data():
    config = resolve_architecture(ARCHITECTURE, vocab_size=300, context=32)
    assert (config.vocab_size, config.context) == (300, 32)
    assert resolve_architecture({**ARCHITECTURE, "vocab_size": 512}, 300, 32).vocab_size == 512
    with pytest.raises(UserError, match="tokenizer has 300 tokens"):
        resolve_architecture({**ARCHITECTURE, "vocab_size": 100}, 300, 32)
    with pytest.raises(UserError, match=r"data\.sequence_length"):
        resolve_architecture({**ARCHITECTURE, "context": 16}, 300, 32)
    with pytest.raises(UserError, match="vocab_size"):
        resolve_architecture(ARCHITECTURE)


def test_architecture_from_a_preset_and_from_files(tmp_path):
    expected = resolve_architecture(COMPLETE)
    assert resolve_architecture("quickstart").width == 256
    (tmp_path / "a.yaml").write_text(
        "model:\n  architecture:\n" + "".join(f"    {k}: {json.dumps(v)}\n" for k, v in COMPLETE.items())
    )
    (tmp_path / "a.json").write_text(json.dumps({"architecture": expected.to_dict()}))
    assert resolve_architecture(str(tmp_path / "a.yaml")) == expected
    assert resolve_architecture(str(tmp_path / "a.json")) == expected
    (tmp_path / "list.yaml").write_text("- 1\n")
    for value, message in (
        ("quickstrat", "did you mean 'quickstart'"),
        (str(tmp_path / "none.yaml"), "no architecture file"),
        (str(tmp_path / "list.yaml"), "must hold the keys"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_architecture(value)


def test_another_architecture_than_the_checkpoints_is_refused(tmp_path, cache):
    fit(make_trainer(tmp_path / "run", max_steps=4), language_model(), text_data(cache))
    path = tmp_path / "run.run" / "checkpoints" / "step-00000004.ckpt"
    stored = WholeCheckpoints().load_checkpoint(path)["hyper_parameters"]["architecture"]
    model = language_model(architecture={**ARCHITECTURE, "width": 48})
    model.expect(stored, path)
    with pytest.raises(UserError, match=r"embedding\.weight is \(\d+, 32\) there and \(\d+, 48\)"):
        fit(make_trainer(tmp_path / "other"), model, text_data(cache), path)


def test_clipping_by_value_is_refused():
    module = Training({}, AdamW(), Constant())
    with pytest.raises(UserError, match="gradient_clip_algorithm value is not supported; norm is"):
        module.configure_gradient_clipping(None, 1.0, "value")


def test_a_step_is_divided_by_the_targets_of_all_ranks():
    """Two ranks, of which this one has 10 targets and the other 20, in units of 16; DDP then takes the mean."""
    module = Training(COMPLETE)
    module.weight = torch.nn.Parameter(torch.zeros(3))
    module.weight.grad = torch.ones(3)
    module._unit, module._window = (
        16,
        [({"nll": torch.tensor(4.0)}, torch.tensor(7)), ({"nll": torch.tensor(5.0)}, torch.tensor(3))],
    )
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value + 20)
    module._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=2, strategy=strategy)
    module.configure_gradient_clipping(torch.optim.SGD([module.weight], lr=0.1))
    torch.testing.assert_close(module.weight.grad, torch.full((3,), 16 * 2 * 2 / 30))
    assert (module.figures.loss, module.figures.count) == (9, 10)  # of this rank, over the step
