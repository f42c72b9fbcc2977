"""Perplexity, divergence and baselines: against explicit loops and torchmetrics, and what must not change them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import VOCABULARY, Text, shifted, tiny
from torchmetrics.text import Perplexity

from app.evaluation.assemble import change_of_quality
from app.evaluation.baselines import baselines, count_tokens, unigram, untrained
from app.evaluation.metrics import Loss
from app.evaluation.quality import BlockSubset, Quality, Segments, evaluate_qualities, evaluate_quality, paired
from models import projection
from models.errors import UserError


def loop(model, text):
    """Per token: (document, NLL) by one plain forward per block, without batches or chunks."""
    found = []
    for block in text:
        documents = block["documents"][None]
        with torch.no_grad():
            logits = model(block["tokens"][None], documents=documents).logits[0].double()  # (T, V)
        logs = logits.log_softmax(-1)
        for place, target in enumerate(block["targets"].tolist()):
            if target != -100:
                found.append((int(documents[0, place]), -float(logs[place, target])))
    return found


def test_the_figures_equal_an_explicit_loop():
    model, text = tiny(), Text(16)
    expected = np.array([nll for _, nll in loop(model, text)])
    quality = evaluate_quality(model, text)
    figures = quality.figures()
    assert quality.tokens == len(expected) == text.tokens
    assert figures["loss"] == pytest.approx(expected.mean(), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(expected.mean() / math.log(2) / 3.5, rel=1e-6)
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = figures["interval"][name]
        assert low < figures[name] < high


def test_perplexity_equals_torchmetrics():
    model, text = tiny(), Text(16)
    metric = Perplexity(ignore_index=-100)
    for block in text:
        with torch.no_grad():
            metric.update(
                model(block["tokens"][None], documents=block["documents"][None]).logits, block["targets"][None]
            )
    assert evaluate_quality(model, text).figures()["perplexity"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_clusters_are_the_documents_and_sums_are_theirs():
    model, text = tiny(), Text(16)
    expected = np.zeros(24)
    for document, nll in loop(model, text):
        expected[document] += nll
    quality = evaluate_quality(model, text)
    found = np.bincount(quality.segments.document, quality.sums["nll"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert "24 documents" in quality.figures()["interval"]["method"]


def test_few_documents_make_blocks_the_clusters():
    quality = evaluate_quality(tiny(), Text(16, documents=5))
    assert "blocks as clusters" in quality.segments.describe()


@pytest.mark.parametrize("length", [8, 16, 50, 4096])
def test_block_length_changes_the_context_and_never_which_tokens_are_predicted(length):
    text = Text(length)
    targets = np.concatenate([block["targets"][block["targets"] != -100].numpy() for block in text])
    np.testing.assert_array_equal(targets, Text(16).stream[1:])
    quality = evaluate_quality(tiny(), text)
    counts = np.bincount(quality.segments.document, quality.segments.tokens)
    np.testing.assert_array_equal(counts, np.bincount(text.owner))
    assert 1 <= quality.mean_context <= quality.context == length


def test_documents_within_one_block_are_scored_as_if_alone():
    """A block that holds every document whole gives each the loss that it has in a block of its own."""
    model = tiny(context=4096)
    whole = evaluate_quality(model, Text(4096))
    text = Text(4096)
    losses = np.bincount(whole.segments.document, whole.sums["nll"])
    for number in range(24):
        place = np.flatnonzero(text.owner == number)
        tokens, targets = torch.from_numpy(text.stream[place]), torch.from_numpy(text.stream[place + 1])
        with torch.no_grad():
            logs = model(tokens[None].long()).logits[0].double().log_softmax(-1)
        assert losses[number] == pytest.approx(-float(logs.gather(1, targets[:, None].long()).sum()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_and_chunks_do_not_change_the_sums(batch_size, monkeypatch):
    model, text = tiny(), Text(16)
    plain = evaluate_quality(model, text)
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    other = evaluate_quality(model, text, batch_size=batch_size)
    np.testing.assert_allclose(other.sums["nll"], plain.sums["nll"], rtol=1e-5)
    np.testing.assert_array_equal(other.segments.tokens, plain.segments.tokens)


def test_divergence_and_agreement_equal_an_explicit_loop():
    before, text = tiny(), Text(16)
    after = shifted(before, 0.3)
    kl, same, count = 0.0, 0, 0
    for block in text:
        with torch.no_grad():
            p, q = (
                model(block["tokens"][None], documents=block["documents"][None]).logits[0].double().log_softmax(-1)
                for model in (before, after)
            )
        real = block["targets"] != -100
        kl += float((p.exp() * (p - q)).sum(-1)[real].sum())
        same += int((p.argmax(-1) == q.argmax(-1))[real].sum())
        count += int(real.sum())
    _, divergence = evaluate_qualities([before, after], text)
    assert divergence.kl_divergence.value == pytest.approx(kl / count, rel=1e-4)
    assert divergence.agreement.value == pytest.approx(same / count)
    assert divergence.kl_divergence.low > 0
    assert divergence.agreement.high <= 1


def test_a_model_against_itself_has_not_moved():
    model, text = tiny(), Text(16)
    (before, after), divergence = evaluate_qualities([model, model], text)
    difference = paired(before, after)
    assert difference.value == difference.low == difference.high == 0.0
    assert not difference.beyond_noise
    assert divergence.kl_divergence.value == 0.0
    assert divergence.agreement.value == 1.0


def test_the_paired_interval_is_narrower_than_the_models_own():
    before, text = tiny(), Text(16)
    one, two = evaluate_qualities([before, shifted(before, 0.05)], text)[0]
    difference, own = paired(one, two), one.loss
    assert difference.high - difference.low < (own.high - own.low) / 2


def test_paired_refuses_other_tokens():
    one, two = evaluate_quality(tiny(), Text(16)), evaluate_quality(tiny(), Text(8))
    with pytest.raises(UserError, match="same tokens"):
        paired(one, two)


def test_bf16_is_summed_in_double():
    """A bf16 model's figures are means of many fp32 log-probabilities: no drift from summing in low precision."""
    model, text = tiny().to(torch.bfloat16), Text(16, documents=200)
    expected = np.mean([nll for _, nll in loop(model, text)])
    assert evaluate_quality(model, text).loss.value == pytest.approx(expected, rel=2e-3)


def test_evaluation_leaves_the_model_in_training_mode_and_reports_progress():
    model, text = tiny().train(), Text(16)
    seen = []
    evaluate_quality(model, text, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen[-1] == (len(text), len(text))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_nothing_to_predict_is_a_clear_error():
    with pytest.raises(UserError, match="empty"):
        evaluate_quality(tiny(), [])
    block = {"tokens": torch.zeros(4, dtype=torch.long), "targets": torch.full((4,), -100)}
    with pytest.raises(UserError, match="no token to predict"):
        evaluate_quality(tiny(), [block])


def test_two_vocabularies_are_refused():
    other = tiny()
    other.config = type(other.config).from_dict({**other.config.to_dict(), "vocab_size": 99})
    with pytest.raises(UserError, match="vocabular"):
        evaluate_qualities([tiny(), other], Text(16))


def test_the_unigram_baseline_equals_its_definition():
    train, text = Text(16, seed=1), Text(16)
    counts = np.bincount(train.stream[1:], minlength=VOCABULARY)
    np.testing.assert_array_equal(count_tokens(train, VOCABULARY), counts)
    logs = np.log((counts + 1) / (counts.sum() + VOCABULARY))
    quality = unigram(text, counts)
    assert quality.loss.value == pytest.approx(-logs[text.stream[1:]].mean())
    assert quality.tokens == text.tokens


def test_the_untrained_baseline_is_near_the_uniform_guess_and_leaves_the_random_state():
    config, text = tiny().config, Text(16)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quality = untrained(config, text)
    assert torch.equal(torch.rand(3), expected)
    assert quality.figures()["perplexity"] == pytest.approx(VOCABULARY, rel=0.1)
    assert untrained(config, text).loss.value == quality.loss.value


def test_the_untrained_baseline_names_the_architecture_that_was_measured():
    """Later stages inherit the figure, and their own architecture may be another."""
    model = tiny()
    source = baselines(model.config, Text(16))["untrained"]["source"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert source.startswith(f"a model of 2 layers, width 16 and {count / 1000:.2f} k parameters, freshly initialised")
    assert "same" not in source


def test_a_part_of_a_split_is_spread_over_it():
    text = Text(16)
    part = BlockSubset.spread(text, 4)
    assert part.indices[0] == 0
    assert part.indices[-1] == len(text) - 1
    assert part.tokens == text.tokens
    assert len(BlockSubset.first(text, 10**6)) == len(text)


@pytest.mark.parametrize(("documents", "unit"), [(19, "19 blocks"), (20, "20 documents"), (21, "21 documents")])
def test_documents_are_the_clusters_from_20_on(documents, unit):
    numbers = np.arange(documents)
    segments = Segments(numbers, numbers, np.full(documents, 5))
    assert f"{unit} as clusters" in segments.describe()
    assert "blocks as clusters" in Segments(numbers, numbers - 1, np.full(documents, 5)).describe()  # some kept apart


@pytest.mark.parametrize("part", ["block", "document", "tokens"])
def test_paired_refuses_segments_that_differ_in_any_part(part):
    numbers = np.arange(3)
    segments = Segments(numbers, numbers, np.full(3, 5))
    quality = Quality(segments, {"nll": np.ones(3)}, None, (Loss(),), 5, 3.0)
    other = replace(quality, segments=replace(segments, **{part: getattr(segments, part)[[0, 2, 1]] + [0, 0, 1]}))
    with pytest.raises(UserError, match="same tokens"):
        paired(quality, other)
    assert paired(quality, replace(quality, sums={"nll": np.full(3, 2.0)})).value == pytest.approx(1 / 5)


def test_changes_are_those_of_the_figures():
    model, text = tiny(), Text(16)
    (before, after), divergence = evaluate_qualities([model, shifted(model, 0.3)], text)
    change, was, now = change_of_quality(before, after, divergence), before.figures(), after.figures()
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert change[name] == pytest.approx(now[name] - was[name], rel=1e-6)
    assert change["perplexity_ratio"] == pytest.approx(now["perplexity"] / was["perplexity"], rel=1e-6)
    difference = paired(before, after)
    expected = [was["perplexity"] * (math.exp(nats) - 1) for nats in (difference.low, difference.high)]
    assert change["interval"]["perplexity"] == pytest.approx(expected)


def test_the_context_of_a_prediction_is_the_tokens_of_its_document_before_it_in_the_block():
    text, contexts = Text(16), []
    for block in text:
        documents = block["documents"].tolist()
        for place, target in enumerate(block["targets"].tolist()):
            if target != -100:
                contexts.append(documents[: place + 1].count(documents[place]))  # itself included
    quality = evaluate_quality(tiny(), text, batch_size=3)
    assert quality.mean_context == pytest.approx(np.mean(contexts))
    assert quality.context == 16
