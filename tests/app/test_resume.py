"""A run that is broken off and goes on equals the undisturbed one, bit for bit."""

import hashlib
import random

import numpy
import pytest
import torch
from training_help import Interrupted, Seen, StopAfter, fit, language_model, make_trainer, state_hash, text_data

from app.callbacks.checkpoints import checkpoints_in, newest_checkpoint
from app.callbacks.randomness import capture, portable, restore, stream_of
from app.optim import AdamW, Muon, WarmupStableDecay
from app.strategies.checkpoint_io import WholeCheckpoints, appearing_whole, read_checkpoint
from models.checkpoint import hash_weights


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def interrupted_run(folder, cache, stop, model_options, trainer_options, data_options):
    """Run until `stop`, then go on in new objects from the newest checkpoint; return the model and the batches seen."""
    first, second = Seen(), Seen()
    trainer = make_trainer(folder, first, StopAfter(stop), **trainer_options)
    with pytest.raises(Interrupted):
        fit(trainer, language_model(**model_options), text_data(cache, **data_options))
    checkpoint = newest_checkpoint(folder.with_name(f"{folder.name}.run") / "checkpoints")
    model = language_model(**model_options)
    trainer = make_trainer(folder, second, **trainer_options)
    fit(trainer, model, text_data(cache, **data_options), checkpoint, seed=99)  # the seed must not matter any more
    return model, trainer, first.tokens, second.tokens


@pytest.mark.parametrize(
    ("model_options", "trainer_options", "data_options", "stop"),
    [
        ({}, {}, {"workers": 2}, 6),
        ({"optimizer": Muon(), "schedule": WarmupStableDecay(2)}, {"accumulate_grad_batches": 2}, {}, 5),
        ({"compute_dtype": "bfloat16"}, {"every": 3, "val_check_interval": 3}, {}, 9),
    ],
    ids=["workers", "muon, accumulation", "bf16, checkpoint and validation at one step"],
)
def test_resumed_run_is_bitwise_equal(tmp_path, cache, model_options, trainer_options, data_options, stop):
    whole, seen = language_model(**model_options), Seen()
    trainer = make_trainer(tmp_path / "whole", seen, **trainer_options)
    fit(trainer, whole, text_data(cache, **data_options))

    resumed, again, before, after = interrupted_run(
        tmp_path / "broken", cache, stop, model_options, trainer_options, data_options
    )
    assert state_hash(resumed) == state_hash(whole)
    assert hash_weights(tmp_path / "broken") == hash_weights(tmp_path / "whole")
    accumulation = trainer_options.get("accumulate_grad_batches", 1)
    saved = stop // trainer_options.get("every", 4) * trainer_options.get("every", 4) * accumulation
    assert before[:saved] + after == seen.tokens
    for mine, other in zip(trainer.optimizers[0].param_groups, again.optimizers[0].param_groups, strict=True):
        assert mine["lr"] == other["lr"]
    best = [run.checkpoint_callback.best_score for run in (trainer, again)]
    assert best[0] is not None
    assert best[0] == best[1]


def test_without_the_random_state_dropout_would_differ(tmp_path, cache):
    """Shows that the tests above can fail: the same resume with the streams of the checkpoint thrown away."""
    whole = language_model()
    fit(make_trainer(tmp_path / "whole"), whole, text_data(cache))
    trainer = make_trainer(tmp_path / "broken", StopAfter(6))
    with pytest.raises(Interrupted):
        fit(trainer, language_model(), text_data(cache))
    checkpoint = newest_checkpoint(tmp_path / "broken.run" / "checkpoints")
    content = torch.load(checkpoint, weights_only=True)
    del content["callbacks"]["RandomState"]
    torch.save(content, checkpoint)
    resumed = language_model()
    fit(make_trainer(tmp_path / "broken"), resumed, text_data(cache), checkpoint, seed=99)
    assert state_hash(resumed) != state_hash(whole)


def test_every_checkpoint_holds_plain_values_only(tmp_path, cache):
    fit(make_trainer(tmp_path / "run"), language_model(optimizer=Muon()), text_data(cache))
    folder = tmp_path / "run.run" / "checkpoints"
    kinds = [newest_checkpoint(folder, "step"), newest_checkpoint(folder, "best")]
    for path in kinds:
        content = torch.load(path, weights_only=True)
        assert content["hyper_parameters"]["architecture"]["vocab_size"] == 300 or content["hyper_parameters"]
        assert content["espalier"]["recipe"] == {"name": "test"}
        assert content["lr_schedulers"] == [{"last_epoch": content["global_step"]}]
    assert len(checkpoints_in(folder)) == 1  # older ones are gone


def test_options_of_the_command_win_over_the_checkpoint(tmp_path, cache):
    trainer = make_trainer(tmp_path / "run", StopAfter(5))
    with pytest.raises(Interrupted):
        fit(trainer, language_model(optimizer=AdamW(lr=1e-2, weight_decay=0.3)), text_data(cache))
    checkpoint = newest_checkpoint(tmp_path / "run.run" / "checkpoints")
    model = language_model(optimizer=AdamW(lr=5e-2, betas=(0.8, 0.9), weight_decay=0.2))
    trainer = make_trainer(tmp_path / "run", max_steps=5)
    fit(trainer, model, text_data(cache), checkpoint)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.2, (0.8, 0.9))
    assert group["lr"] == 5e-2 * model.schedule.factor(5, 5)
    assert trainer.optimizers[0].state[group["params"][0]]["step"] == 5  # the moments did come along


class Unsaveable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    io, path = WholeCheckpoints(), tmp_path / "step-1.ckpt"
    io.save_checkpoint({"value": torch.ones(3)}, path)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({"value": torch.zeros(100_000), "more": Unsaveable()}, path)
    assert torch.equal(read_checkpoint(path)["value"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1.ckpt"]


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "step-00000002.ckpt"
    with appearing_whole(path) as temporary:
        temporary.write_bytes(b"half")
        assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path) == path


def test_random_state_covers_every_generator():
    state = portable(capture())
    draw = lambda: (random.random(), numpy.random.rand(), torch.rand(3).tolist())  # noqa: E731
    first = draw()
    restore(state)
    assert draw() == first


def test_other_ranks_get_streams_of_their_own():
    torch.manual_seed(3)
    saved = [portable(capture())]
    states = [stream_of(rank, 3, saved)["torch"] for rank in range(3)]
    assert torch.equal(states[0], saved[0]["torch"])
    assert len({hashlib.sha256(state.numpy().tobytes()).hexdigest() for state in states}) == 3
    assert torch.equal(stream_of(1, 3, saved)["torch"], states[1])
