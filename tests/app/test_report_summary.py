"""Every case of the verdict in words, and numbers as people read them."""

import copy
import math

import pytest

from app.evaluation import formatting
from app.evaluation.assemble import clean
from app.evaluation.report.summary import judge
from app.evaluation.speed import STANDARD, change_of_speed

THROUGHPUTS = [one.name for one in STANDARD.throughputs]


def figures(size=0.25, decode=(1.5, 1.4, 1.6), perplexity=(1.02, 1.015, 1.025), zeros=0.0, memory=0.25):
    """A comparison whose ratios after/before are the given ones, each with its interval."""
    size_before = {"stored_bytes": 1_000_000, "parameters": 1000, "nonzero_parameters": 1000, "memory_bytes": 1_000_000}
    size_after = size_before | {
        "stored_bytes": round(1_000_000 * size),
        "nonzero_parameters": round(1000 * (1 - zeros)),
        "memory_bytes": round(1_000_000 * memory),
    }
    speed = {"decode_tokens_per_second": 100.0, "prefill_tokens_per_second": 1000.0}
    ratio, low, high = decode
    changes = {
        name: {"ratio": ratio, "interval": [low, high], "beyond_noise": low > 1 or high < 1}
        for name in ("decode_tokens_per_second", "prefill_tokens_per_second")
    }
    ppl, ppl_low, ppl_high = perplexity
    return {
        "before": {"name": "a", "quality": {"perplexity": 20.0}, "size": size_before, "speed": speed},
        "after": {
            "name": "b",
            "quality": {"perplexity": 20.0 * ppl},
            "size": size_after,
            "speed": {name: rate * ratio for name, rate in speed.items()},
        },
        "change": {
            "quality": {
                "perplexity_ratio": ppl,
                "interval": {"perplexity_ratio": [ppl_low, ppl_high]},
                "kl_divergence": 0.01,
                "agreement": 0.95,
            },
            "size": {
                name: {"ratio": size_after[name] / value if value else None} for name, value in size_before.items()
            },
            "speed": changes,
        },
        "baselines": {"unigram": {"perplexity": 500.0}},
    }


def texts(case, layers=()):
    return [sentence.text for sentence in judge(case, layers)]


SAME, SLOWER = (1.01, 0.97, 1.04), (0.6, 0.55, 0.65)


@pytest.mark.parametrize(
    ("case", "headline"),
    [
        (figures(), "Smaller and faster"),
        (figures(decode=SAME), "Smaller but not faster"),
        (figures(decode=SLOWER), "Smaller but slower"),
        (figures(size=1.0), "Faster but not smaller"),
        (figures(size=1.0, decode=SAME), "Neither smaller nor faster"),
        (figures(size=1.0, decode=SLOWER), "Slower and not smaller"),
        (figures(size=0.995, decode=SAME), "Neither smaller nor faster"),
    ],
)
def test_the_headline(case, headline):
    assert texts(case)[0] == headline


def test_without_timing_the_headline_claims_no_speed():
    case = figures()
    del case["change"]["speed"], case["before"]["speed"], case["after"]["speed"]
    found = texts(case)
    assert found[0] == "Smaller; speed not measured"
    assert "Speed was not measured." in found


def test_sizes_in_words():
    assert "The weights file is 4.0\u00d7 smaller: 250 kB instead of 1 MB." in [
        text.replace("1.00 MB", "1 MB") for text in texts(figures())
    ]
    assert any("is not smaller" in text for text in texts(figures(size=1.0)))
    assert any("is larger" in text for text in texts(figures(size=1.2)))


def test_zeros_stored_densely_are_not_smaller():
    found = texts(figures(size=1.0, zeros=0.5, memory=1.0))
    assert any("50.0% of the weights are zero" in text for text in found)
    assert any("a compressed tensor stored as dense zeros is not smaller" in text for text in found)
    assert not any("dense zeros" in text for text in texts(figures(zeros=0.5)))


def test_a_file_that_grows_again_in_memory_is_said_to():
    assert any(text.startswith("Only the file is smaller") for text in texts(figures(memory=1.0)))
    assert not any(text.startswith("Only the file is smaller") for text in texts(figures()))


def test_speed_in_words():
    assert any("Decoding is 1.5\u00d7 as fast" in text for text in texts(figures()))
    assert any("Decoding is no faster" in text and "within the noise" in text for text in texts(figures(decode=SAME)))
    assert any("Decoding is slower" in text for text in texts(figures(decode=SLOWER)))


def test_quality_beyond_and_within_noise():
    assert any("perplexity rose by 2.0%" in text and "beyond noise" in text for text in texts(figures()))
    fell = figures(perplexity=(0.9, 0.88, 0.92))
    assert any("perplexity fell by 10.0%" in text and "beyond noise" in text for text in texts(fell))
    within = figures(perplexity=(1.001, 0.998, 1.004))
    assert any("within noise" in text and "no difference was found" in text for text in texts(within))


def test_a_model_no_better_than_token_frequencies_is_called_broken():
    assert any("no longer a language model" in text for text in texts(figures(perplexity=(26.0, 25.0, 27.0))))
    untrained = figures(perplexity=(1.0, 0.99, 1.01))
    untrained["before"]["quality"]["perplexity"] = untrained["after"]["quality"]["perplexity"] = 1e6
    assert any("nor was that of the model before" in text for text in texts(untrained))
    assert not any("no longer a language model" in text for text in texts(untrained))
    broken = figures()
    broken["after"]["quality"]["perplexity"] = None
    assert any("not finite" in text for text in texts(broken))


def test_no_interval_is_said():
    case = copy.deepcopy(figures())
    case["change"]["quality"]["interval"]["perplexity_ratio"] = [None, None]
    assert any("too short for an interval" in text for text in texts(case))


def test_too_few_rounds_are_no_noise():
    """Fewer than six rounds give no interval: even ten times the speed is then neither faster nor within the noise."""
    before, after = (
        {"rounds": dict.fromkeys(THROUGHPUTS, [rate] * 5), "per_token_ms": {"p50": 1.0, "p95": 1.0}}
        | dict.fromkeys(THROUGHPUTS, rate)
        for rate in (100.0, 1000.0)
    )
    change = clean(change_of_speed(before, after))
    case = figures(decode=(10.0, 1.0, 1.0))
    case["change"]["speed"] = change
    found = texts(case)
    assert found[0] == "Smaller; too few rounds to judge the speed"
    assert any("10.0\u00d7 the speed" in text and "too few rounds for an interval" in text for text in found)
    assert not any("no faster" in text or "within the noise" in text for text in found)
    assert formatting.doubt(change[THROUGHPUTS[0]]) == "too few rounds for an interval"
    assert formatting.doubt(figures(decode=SAME)["change"]["speed"][THROUGHPUTS[0]]) == "within noise"
    assert formatting.doubt(figures()["change"]["speed"][THROUGHPUTS[0]]) == ""


def test_packed_layers_without_a_kernel_are_said():
    case = figures()
    case["after"]["speed"]["kernels"] = [
        {"kernel": "dequantize, then matmul", "modules": 3, "reason": "no packed kernel on cpu"}
    ]
    assert any(text.startswith("3 packed layers are unpacked for every product") for text in texts(case))


def test_skipped_and_noted_layers_are_counted():
    layers = [
        {"skipped": True, "note": "too narrow"},
        {"skipped": False, "note": "fell back to rounding"},
        {"skipped": False, "note": ""},
    ]
    found = texts(figures(), layers)
    assert "1 of 3 layers was skipped; each is listed with its reason." in found
    assert any(text.startswith("1 of 3 layers") and "note" in text for text in found)
    assert "All 1 layers were treated; none was skipped." in texts(figures(), layers[2:])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.5, "0.5000"),
        (20.0, "20.00"),
        (0, "0"),
        (12, "12"),
        (math.nan, "\u2013"),
        (None, "\u2013"),
        (-3.25, "\u22123.250"),
        (99999.0, "100,000"),
        (0.99999, "1.000"),
        (0.00001234, "1.234e\u221205"),
    ],
)
def test_numbers(value, text):
    assert formatting.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (21_345_678, "21.3 MB"), (999_999, "1.00 MB"), (5e13, "50.0 TB")],
)
def test_sizes(value, text):
    assert formatting.size(value) == text


def test_changes_keep_digits_where_the_change_is_small():
    assert formatting.change_percent(1.2345) == "+23.4%"
    assert formatting.change_percent(0.5) == "\u221250.0%"
    assert formatting.change_percent(1.00012) == "+0.012%"
    assert formatting.change_percent(1.0) == "+0.0%"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.98, "smaller: "),
        (0.995, "is not smaller"),
        (1.0, "is not smaller"),
        (1.009, "is not smaller"),
        (1.02, "is larger"),
    ],
)
def test_a_file_within_one_percent_is_neither_smaller_nor_larger(ratio, words):
    (sentence,) = [text for text in texts(figures(size=ratio)) if text.startswith("The weights file")]
    assert words in sentence


def test_as_good_as_token_frequencies_is_no_better():
    for ratio, broken in ((25.0, True), (24.999, False)):  # of 20, against 500
        found = texts(figures(perplexity=(ratio, 1.1, 30)))
        assert any("no longer a language model" in text for text in found) == broken
