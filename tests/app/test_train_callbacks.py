"""What watches a run: the guard, checkpoints, TensorBoard, samples, progress."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_help import ARCHITECTURE, fit, language_model, make_trainer, state_hash, text_data

from app.callbacks import NonFiniteLoss, RunProgress, Samples, StopEarly
from app.callbacks.checkpoints import Checkpoints, checkpoints_in, newest_checkpoint
from app.callbacks.peak_flops import DENSE_BF16, device_peak, measured_peak, peak_flops
from app.callbacks.progress import duration
from app.tasks import CausalLM
from app.tasks.training import Training
from models.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


class Breaks(Training):
    """Its loss is no number from a step on."""

    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        if self.trainer.global_step < 6:
            return loss
        sums, count = self._window.pop()
        self._window.append(({"nll": sums["nll"] * float("nan")}, count))
        return loss * float("nan")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, cache):
    template = language_model()
    model = Breaks(template.architecture, template.optimizer, template.schedule)
    with pytest.raises(NonFiniteLoss) as caught:
        fit(make_trainer(tmp_path / "run", every=3), model, text_data(cache))
    message = str(caught.value)
    last = tmp_path / "run.run" / "checkpoints" / "step-00000006.ckpt"
    assert "the loss is nan at step 7" in message
    assert f"the last good checkpoint is {last}" in message
    assert newest_checkpoint(last.parent) == last
    assert not (tmp_path / "run").exists()
    data = text_data(cache)
    data.prepare_data()
    order = data.train_dataloader()
    batch = [batch for _, batch in zip(range(7), order, strict=False)][6]
    first, end = batch["ids"][0].tolist()
    assert f"on documents {first if first == end else f'{first}-{end}'}" in message


def test_an_infinite_gradient_stops_it_too_and_no_checkpoint_is_spoilt(tmp_path, cache):
    class Overflows(Training):
        def configure_gradient_clipping(self, optimizer, **limits):
            if self.trainer.global_step == 3:
                next(self.parameters()).grad[0, 0] = float("inf")
            super().configure_gradient_clipping(optimizer, **limits)

    template = language_model()
    model = Overflows(template.architecture, template.optimizer, template.schedule)
    with pytest.raises(NonFiniteLoss, match="norm of the gradient is inf at step 4"):
        fit(make_trainer(tmp_path / "run", every=4), model, text_data(cache))
    assert newest_checkpoint(tmp_path / "run.run" / "checkpoints") is None


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_weights_that_are_not_finite_are_not_evaluated_in_silence(tmp_path, cache, verb):
    class Broken(Training):
        def configure_model(self):
            super().configure_model()
            torch.nn.init.constant_(self.model.norm.weight, float("nan"))

    template = language_model()
    model = Broken(template.architecture, template.optimizer, template.schedule)
    trainer = make_trainer(tmp_path / "run", limit_test_batches=1, limit_predict_batches=1)
    with pytest.raises(UserError, match="loss is nan: the weights hold NaN"):
        getattr(trainer, verb)(model, datamodule=text_data(cache))


def test_checkpoints_keep_the_newest_and_the_best(tmp_path, cache):
    trainer = make_trainer(tmp_path / "run", max_steps=12)
    own = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))
    own.keep = 2
    fit(trainer, language_model(), text_data(cache))
    folder = tmp_path / "run.run" / "checkpoints"
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000008.ckpt", "step-00000012.ckpt"]
    assert len(checkpoints_in(folder, "best")) == 1
    best = torch.load(own.best(), weights_only=True)
    assert best["callbacks"]["Checkpoints"]["best_score"] == own.best_score


def test_an_unknown_monitor_is_named(tmp_path, cache):
    trainer = make_trainer(tmp_path / "run")
    next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)).monitor = "val_loss"
    with pytest.raises(UserError, match=r"'val_loss', which nothing logs; there is: .*validation/loss"):
        fit(trainer, language_model(), text_data(cache))


def test_tensorboard_holds_everything_that_is_promised(tmp_path, cache):
    samples = Samples(["the ", ""], max_new_tokens=5)
    data = text_data(cache)
    fit(make_trainer(tmp_path / "run", samples), language_model(), data)
    events = EventAccumulator(str(tmp_path / "run.run"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        *("train/loss", "train/perplexity", "train/bits_per_byte", "train/learning_rate", "train/grad_norm"),
        *("speed/tokens_per_second", "speed/mfu", "memory/peak_gib"),
        *("validation/loss", "validation/perplexity", "validation/bits_per_byte"),
    }
    rates = {event.step: event.value for event in events.Scalars("train/learning_rate")}
    schedule = language_model().schedule
    assert rates[2] == pytest.approx(3e-3 * schedule.factor(1, 10), rel=1e-5)  # the second step
    assert rates[8] == pytest.approx(3e-3 * schedule.factor(7, 10), rel=1e-5)
    assert all(0 < event.value < 1.5 for event in events.Scalars("speed/mfu"))
    for split in ("train", "validation"):
        pairs = zip(events.Scalars(f"{split}/loss"), events.Scalars(f"{split}/bits_per_byte"), strict=True)
        for loss, bits in pairs:
            assert bits.value == pytest.approx(loss.value / math.log(2) / data.bytes_per_token, rel=1e-4)
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts >= {"samples", "recipe", "mfu"}
    written = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "the " in written


def test_samples_begin_with_the_token_that_documents_begin_with(monkeypatch):
    seen = []
    monkeypatch.setattr("app.tasks.causal_lm.generate", lambda model, prompts, **_: seen.extend(prompts) or [[]])
    tokenizer = SimpleNamespace(
        stops={0}, prompt=lambda text: [1, len(text)], continuation=lambda prompt, new: ""
    )  # what a Tokenizer gives
    model = SimpleNamespace(config=SimpleNamespace(position=SimpleNamespace(bounded=False), context=32))
    Samples(["the "])._written(SimpleNamespace(compiling=None, model=model, task=CausalLM()), tokenizer)
    assert seen == [[1, 4]]


def test_samples_end_where_learned_positions_do(tmp_path, cache):
    architecture = {**ARCHITECTURE, "position": "learned"}
    trainer = make_trainer(tmp_path / "run", Samples(["the ", ""], max_new_tokens=64))
    fit(trainer, language_model(architecture=architecture), text_data(cache))
    assert (tmp_path / "run" / "model.safetensors").is_file()
    late = make_trainer(tmp_path / "late", Samples(["the end " * 40]))
    with pytest.raises(UserError, match=r"samples\.prompts: 'the end .* learned positions end at 32; shorten it"):
        fit(late, language_model(architecture=architecture), text_data(cache))
    assert late.global_step == 0


def test_samples_past_the_context_are_warned_of_once_in_one_sentence(tmp_path, cache, capsys, recwarn):
    samples = Samples(["the "], max_new_tokens=40)
    fit(make_trainer(tmp_path / "run", samples), language_model(), text_data(cache))
    said = [line for line in capsys.readouterr().err.splitlines() if "exceed" in line or "warn" in line]
    assert len(said) == 1
    assert said[0].startswith("samples: ")
    assert "exceed the model's context of 32" in said[0]
    assert not [one for one in recwarn if "exceed" in str(one.message)]


def test_samples_leave_the_training_alone(tmp_path, cache):
    hashes = []
    for name, callbacks in (("with", [Samples([""], max_new_tokens=4, temperature=1.0)]), ("without", [])):
        model = language_model()
        fit(make_trainer(tmp_path / name, *callbacks), model, text_data(cache))
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1]


def test_progress_without_a_terminal_is_lines(tmp_path, cache, capsys):
    trainer = make_trainer(tmp_path / "run", RunProgress(), enable_progress_bar=True)
    fit(trainer, language_model(), text_data(cache))
    lines = capsys.readouterr().err.splitlines()
    last = [line for line in lines if line.startswith("step 10/10")]
    assert len(last) == 1
    assert "tokens/s" in last[0]
    assert "loss" in last[0]
    assert last[0].endswith("0:00 left")
    assert any("validation loss" in line for line in lines)


def test_the_run_leaves_recipe_and_tokenizer_beside_its_checkpoints(tmp_path, cache):
    fit(make_trainer(tmp_path / "run", max_steps=4), language_model(), text_data(cache))
    run = tmp_path / "run.run"
    assert json.loads((run / "recipe.json").read_text()) == {"name": "test"}
    assert (run / "tokenizer.json").exists()
    assert (run / "complete").exists()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3700, "1:01:40"), (-3, "0:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_peaks_are_dense():
    assert device_peak("NVIDIA H100 80GB HBM3") == 989.5e12
    assert device_peak("NVIDIA H200") == 989.5e12
    assert device_peak("NVIDIA H100 PCIe") == 756e12
    assert device_peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak("NVIDIA L40S") == 362e12
    assert device_peak("NVIDIA L4") == 121e12
    assert device_peak("NVIDIA RTX A6000") == 154.8e12
    assert device_peak("A card of tomorrow") is None
    for name in ("NVIDIA RTX A4000", "NVIDIA RTX A3000", "NVIDIA RTX A1000", "NVIDIA A10M"):
        assert device_peak(name) is None, name  # a name in the table is part of a word of these
    for name in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert device_peak(name) is None, name
    assert all(device_peak(name) == peak for name, peak in DENSE_BF16.items())  # no name hides a longer one


def test_the_cpus_peak_is_measured():
    peak, sentence = peak_flops(torch.device("cpu"))
    assert peak > 1e8
    assert "measured" in sentence
    assert measured_peak(64, 0.01)[0] > 0


class Validations:
    """What `Checkpoints` and `StopEarly` ask of a trainer, one validation after another."""

    state, sanity_checking, should_stop, global_step = SimpleNamespace(fn="fit"), False, False, 0

    def __init__(self, *callbacks):
        self.callbacks, self.saved, self.callback_metrics = callbacks, [], {}

    def save_checkpoint(self, path):
        self.saved.append(path.name)

    def see(self, *losses):
        for loss in losses:
            self.global_step += 1
            self.callback_metrics = {"validation/loss": torch.tensor(loss)}
            for callback in self.callbacks:
                callback.on_validation_end(self, None)


def keeping_the_best(folder):
    callback = Checkpoints(every_n_steps=100)
    callback.folder = folder
    return callback


def test_the_best_checkpoint_is_the_first_of_equal_ones(tmp_path):
    trainer = Validations(keeping_the_best(tmp_path))
    trainer.see(3.0, 2.0, 2.0, 2.5, 1.5)
    assert trainer.saved == ["best-00000001.ckpt", "best-00000002.ckpt", "best-00000005.ckpt"]


def test_the_best_survives_a_resume(tmp_path):
    own, again = keeping_the_best(tmp_path), keeping_the_best(tmp_path)
    Validations(own).see(2.0)
    again.load_state_dict(own.state_dict())
    trainer = Validations(again)
    trainer.see(2.5, 1.5)
    assert trainer.saved == ["best-00000002.ckpt"]


def test_only_more_than_min_delta_is_an_improvement():
    trainer = Validations(StopEarly(patience=2, min_delta=0.25))
    trainer.see(3.0, 2.75, 2.5)  # the second is no improvement, the third is one over the first
    assert (trainer.callbacks[0].best, trainer.callbacks[0].waited, trainer.should_stop) == (2.5, 0, False)
    trainer.see(2.4)
    assert not trainer.should_stop
    trainer.see(2.3)
    assert trainer.should_stop


@pytest.mark.parametrize(("characters", "fits"), [(30, True), (31, False)])
def test_a_sample_prompt_leaves_room_for_one_token(characters, fits):
    """In a context of 32: the begin token, the prompt, and what is to be written."""
    config = SimpleNamespace(position=SimpleNamespace(bounded=True, kind="learned"), context=32)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=SimpleNamespace(prompt=lambda text: [1, *text])))
    with nullcontext() if fits else pytest.raises(UserError, match="is 32 tokens long"):
        module = SimpleNamespace(model=SimpleNamespace(config=config), task=CausalLM())
        Samples(["x" * characters]).on_fit_start(trainer, module)
