"""Masked language modelling: what is hidden, when, and that every mechanism of an encoder learns from it."""

import numpy as np
import pytest
import torch

from app.data.corpus import synthetic
from app.data.module import TextData
from app.data.packing import IGNORED, PADDING, token_blocks
from app.data.tokenizer import load_tokenizer, train_tokenizer
from app.evaluation.baselines import count_tokens, unigram
from app.evaluation.metrics import Accuracy, Loss
from app.evaluation.quality import evaluate_quality
from app.tasks import TASKS, CausalLM, MaskedLM
from app.tasks.masked_lm import Masking
from models.errors import UserError
from models.transformer import Transformer
from tests.models.test_properties import CONTEXT, VOCAB, every_encoder, read


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in synthetic().documents("train")], 320, mask=True)


@pytest.fixture(scope="module")
def blocks(tokenizer, tmp_path_factory):
    return token_blocks("synthetic", tokenizer, "train", 64, cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_trained_tokenizer_keeps_its_mask_token(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.mask_token, loaded.mask, loaded.sha256) == ("<mask>", 1, tokenizer.sha256)
    assert 1 not in tokenizer.encode("a <mask> in a text is text")
    plain = train_tokenizer(["some text"], 257)
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        MaskedLM().examples(None, plain, training=True)


@pytest.mark.parametrize(("training", "share"), [(True, 0.3), (False, 0.15)])
def test_shares_of_what_is_hidden_and_of_what_stands_in_its_place(blocks, tokenizer, training, share):
    examples = MaskedLM().examples(blocks, tokenizer, training=training, seed=3)
    hidden, plain = examples.batch(range(len(blocks))), blocks.batch(range(len(blocks)))
    chosen = hidden["targets"] != IGNORED
    real = (plain["targets"] != IGNORED) & (plain["tokens"] != tokenizer.eot)
    assert not chosen[~real].any()
    assert torch.equal(hidden["targets"][chosen], plain["tokens"][chosen])
    assert torch.equal(hidden["tokens"][~chosen], plain["tokens"][~chosen])
    assert chosen.sum() / real.sum() == pytest.approx(share, abs=0.01)
    masked, kept = hidden["tokens"] == tokenizer.mask, hidden["tokens"] == plain["tokens"]
    assert masked[chosen].float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept[chosen].float().mean() == pytest.approx(0.1, abs=0.02)


def test_masks_are_those_of_seed_block_and_epoch(blocks, tokenizer):
    def targets(index, training=True, seed=3, within=blocks):
        return MaskedLM().examples(within, tokenizer, training=training, seed=seed).batch([index])["targets"]

    count = len(blocks)
    assert torch.equal(targets(5), targets(5))
    assert not torch.equal(targets(5), targets(5 + count))  # the next epoch
    assert not torch.equal(targets(5), targets(5, seed=4))
    assert torch.equal(targets(5, training=False, seed=3), targets(5, training=False, seed=4))
    chosen = type(blocks)(blocks.folder, 64, chosen=[9, 5])
    assert torch.equal(targets(5), targets(1, within=chosen))  # the number in the split counts, not the place
    rows = MaskedLM().examples(blocks, tokenizer, training=True, seed=3)
    batch = rows.batch([PADDING, 5])
    assert (batch["targets"][0] == IGNORED).all()
    assert torch.equal(batch["targets"][1:], targets(5))


def test_words_are_hidden_whole(tokenizer):
    ids = np.array(tokenizer.prompt("the unprecedented (word)s_of 12 rows\n\tend"))
    masking = Masking(tokenizer, 0.5, True, 0)
    names = [tokenizer.tokenizer.id_to_token(int(token)) for token in ids]
    words = "".join(names).replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
    for seed in range(20):
        draws = np.random.default_rng(seed).random(len(ids))
        chosen = masking.chosen(ids[None], draws[None])[0]
        place = 0
        letters = []
        for name, hidden in zip(names, chosen, strict=True):
            letters += [hidden] * len(name)
            place += len(name)
        assert not chosen[0]  # the token between documents
        inside = [i for i in range(1, len(words)) if words[i].isalnum() and words[i - 1].isalnum()]
        assert all(letters[i] == letters[i - 1] for i in inside if not words[: i + 1].endswith("<|endoftext|>"))


def test_the_data_module_masks_every_epoch_anew_and_as_it_would_after_a_resume(tmp_path):
    def batches(position):
        data = MaskedLM().data(
            source="synthetic", sequence_length=64, batch_size=8, vocab_size=320, seed=2, cache_dir=str(tmp_path)
        )
        assert isinstance(data, TextData)
        assert data.tokenizer.mask_token == "<mask>"
        data._consumed = position
        return [batch for batch, _ in zip(data.train_dataloader(), range(4), strict=False)], data

    (first, data), (later, _) = batches(0), batches(16)
    assert all(torch.equal(one["tokens"], other["tokens"]) for one, other in zip(first[2:], later, strict=False))
    count = len(data.blocks("train"))
    next_epoch = batches(count)[0][0]
    assert next_epoch["tokens"].shape == first[0]["tokens"].shape
    assert data.bytes_per_token is None


def test_evaluation_counts_hidden_tokens_alone(blocks, tokenizer):
    torch.manual_seed(0)
    values = {"width": 16, "depth": 1, "vocab_size": tokenizer.vocab_size, "context": 64, "direction": "bidirectional"}
    layers = {"attention": {"kind": "full", "heads": 2}, "feedforward": {"kind": "swiglu", "width": 16}}
    model = Transformer(read(values | layers)).eval()
    examples = MaskedLM().examples(blocks, tokenizer, training=False)
    quality = evaluate_quality(model, examples, metrics=MaskedLM().metrics)
    whole = examples.batch(range(len(blocks)))
    with torch.no_grad():
        logits = model(whole["tokens"], documents=whole["documents"]).logits
    counted = whole["targets"] != IGNORED
    right = (logits.argmax(-1) == whole["targets"])[counted]
    assert quality.figures()["accuracy"] == pytest.approx(float(right.float().mean()), rel=1e-6)
    assert quality.tokens == int(counted.sum())
    assert quality.loss.value == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[counted], whole["targets"][counted])), rel=1e-5
    )
    counts = count_tokens(examples, tokenizer.vocab_size)
    base = unigram(examples, counts, (Loss(), Accuracy()))
    assert base.figures()["accuracy"] == pytest.approx(counts.max() / counts.sum())
    measured = MaskedLM().measured(model, whole)
    assert float(measured.sums["nll"] / measured.count) == pytest.approx(quality.loss.value, rel=1e-5)
    assert float(measured.sums["correct"]) == right.sum()


@pytest.mark.parametrize(("task", "direction"), [(CausalLM(), "bidirectional"), (MaskedLM(), "causal")])
def test_an_architecture_of_the_other_direction_is_refused(task, direction):
    layers = {"attention": {"kind": "full", "heads": 2}, "feedforward": {"kind": "swiglu", "width": 16}}
    with pytest.raises(UserError, match="the architecture is"):
        task.check(read({"direction": direction, **layers}))


def test_a_task_reads_what_it_writes():
    for task in (MaskedLM(mask=0.2, whole_word=True, metrics=(Accuracy(),)), CausalLM()):
        assert TASKS.parse(task.dump(), "task") == task


@every_encoder
def test_every_mechanism_of_an_encoder_learns_from_hidden_tokens(case):
    torch.manual_seed(0)
    task, model = MaskedLM(), Transformer(read(case)).train()
    task.check(model.config)
    tokens = torch.randint(2, VOCAB, (2, CONTEXT))
    hidden = torch.rand(2, CONTEXT) < 0.3
    batch = {
        "tokens": tokens.masked_fill(hidden, 1),
        "targets": tokens.masked_fill(~hidden, IGNORED),
        "documents": (torch.arange(CONTEXT) // 12).expand(2, -1),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = task.losses(model, batch)
    before.total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert int(before.count) == int(hidden.sum())
    optimizer.step()
    with torch.no_grad():
        after = task.losses(model, batch)
    assert after.sums["nll"] < before.sums["nll"]
