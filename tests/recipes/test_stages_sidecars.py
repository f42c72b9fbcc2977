"""The files beside the weights: kept byte for byte by every stage, and heeded where tokens are drawn."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as vocabularies
from transformers import LlamaConfig, LlamaForCausalLM

from app.callbacks.samples import Samples
from app.data.tokenizer import load_tokenizer
from app.tasks import CausalLM
from recipes import cli
from tests.recipes.conftest import ARCHITECTURE, QUICK

TEMPLATE = "{% for message in messages %}{{ message.content }}\r\n{% endfor %}"
BESIDE = {  # in spellings that no writer of JSON would choose again
    "generation_config.json": b'{"eos_token_id": [0, 5],\n\n "temperature":0.60}',
    "special_tokens_map.json": b'{"eos_token":{"content":"<|endoftext|>","lstrip":false}}',
    "added_tokens.json": b'{"<|im_end|>":    319}\n',
    "chat_template.jinja": TEMPLATE.encode(),
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\r\n",
    "tokenizer.model": bytes(range(256)),
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def llama(tokenizer, tmp_path):
    """A random Llama of `save_pretrained` with every kind of file beside its weights."""
    torch.manual_seed(0)
    path = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **LLAMA)).save_pretrained(path)
    tokenizer.save(path)
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((path / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(content | {"truncation": truncation}))
    (path / "additional_chat_templates").mkdir()
    for name, data in BESIDE.items():
        (path / name).write_bytes(data)
    return path


def beside(path):
    """What a folder holds beside the weights, without the files that stages write themselves."""
    names = ("tokenizer.json", "tokenizer_config.json", *BESIDE)
    return {name: (path / name).read_bytes() for name in names if (path / name).exists()}


def test_every_stage_keeps_the_files_beside_the_weights(llama, espalier, tmp_path):
    expected = beside(llama)
    assert expected.keys() == {"tokenizer.json", "tokenizer_config.json", *BESIDE}
    stages = [
        ["import", llama],
        ["prune", "--method", "magnitude", *QUICK],
        ["distill", "--max_steps", 1, "--student_layers", 1, *QUICK],
        ["quantize", "--method", "rtn", "--bits", 8, *QUICK],
        ["export"],
    ]
    before = llama
    for number, (verb, *rest) in enumerate(stages):
        given = {"import": [], "distill": ["--teacher", before]}.get(verb, [before])
        out = tmp_path / f"{number}-{verb}"
        status, output = espalier(verb, *given, *rest, "--out", out)
        assert status == 0, output.err
        assert beside(out) == expected, verb
        before = out


def test_a_pipeline_and_a_run_on_a_given_tokenizer_keep_them(llama, tmp_path, espalier):
    recipe = {
        "data": {"source": "synthetic", "sequence_length": 32, "batch_size": 2, "tokenizer": str(llama)},
        "model": {"architecture": ARCHITECTURE},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(recipe))
    stages = [
        {"stage": "pretrain", "config": str(tmp_path / "fit.yaml")},
        {
            "stage": "quantize",
            "method": "rtn",
            "bits": 8,
            "sequence_length": 32,
            "speed_rounds": 0,
            "data": "synthetic",
        },
    ]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": stages}))
    status, output = espalier("run", tmp_path / "pipeline.yaml", "--out", tmp_path / "out", "--device", "cpu")
    assert status == 0, output.err
    for place in ("01-pretrain", "01-pretrain.run", "02-quantize"):
        assert beside(tmp_path / "out" / place) == beside(llama), place
    checkpoint = next((tmp_path / "out" / "01-pretrain.run" / "checkpoints").glob("*.ckpt"))
    status, output = espalier("export", checkpoint, "--out", tmp_path / "exported")
    assert status == 0, output.err
    assert beside(tmp_path / "exported") == beside(llama)


def test_files_that_lead_out_of_the_folder_are_neither_read_nor_copied(llama, refused, tmp_path):
    (tmp_path / "secret").write_text('{"eos_token": "secret"}')
    for name in ("tokenizer_config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        kept = (llama / name).read_bytes()
        (llama / name).unlink()
        (llama / name).symlink_to(tmp_path / "secret")
        for argv in (
            ["import", llama, "--out", tmp_path / "out"],
            ["export", llama, "--out", tmp_path / "out"],
            ["prune", llama, "--method", "magnitude", "--out", tmp_path / "out", *QUICK],
            ["generate", llama, "--prompt", "ba"],
        ):
            refused(*argv, words=["outside the folder", name])
        (llama / name).unlink()
        (llama / name).write_bytes(kept)
    (llama / "chat_template.jinja").unlink()
    (llama / "chat_template.jinja").symlink_to(llama / "nothing")
    refused("import", llama, "--out", tmp_path / "out", words=["is no file"])


def test_the_special_tokens_of_a_config_alone_come_along(llama, espalier, tmp_path):
    """Old folders have no generation_config.json; transformers then takes the numbers of config.json."""
    (llama / "generation_config.json").unlink()
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8], "bos_token_id": 1}))
    assert load_tokenizer(llama).stops == {0, 7, 8}
    assert espalier("import", llama, "--out", tmp_path / "imported")[0] == 0
    assert load_tokenizer(tmp_path / "imported").stops == {0, 7, 8}
    assert espalier("export", tmp_path / "imported", "--out", tmp_path / "exported")[0] == 0
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (exported["eos_token_id"], exported["bos_token_id"]) == ([7, 8], 1)


def test_an_eos_token_that_only_the_special_token_map_names_ends_documents(llama):
    (llama / "tokenizer_config.json").unlink()
    (llama / "special_tokens_map.json").write_text('{"eos_token": "z"}')
    tokenizer = load_tokenizer(llama)
    assert tokenizer.end_of_text == "z"


@pytest.mark.parametrize("value", ['"</s>"', "[1, null]", "true", "1.5", "{}"])
def test_an_end_token_that_is_no_number_is_refused(value, llama, refused):
    (llama / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    refused("generate", llama, "--prompt", "ba", words=["generation_config.json", "eos_token_id"])


@pytest.fixture
def words(tmp_path):
    """A model that says one token after the other, with a tokenizer whose decoder strips the first space."""
    names = ["</s>", "<s>", "▁to", "▁be", "▁or", "▁not", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Tokenizer(vocabularies.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=True))
    raw.add_special_tokens(["</s>", "<s>", "<|im_end|>"])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path / "words"
    path.mkdir()
    raw.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true}')
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(names) + 1, **LLAMA)
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 263]}')
    return path


@pytest.fixture
def says(monkeypatch):
    """Make the model say these tokens, and return what it was asked with."""

    def make(tokens):
        asked = []

        def stream(model, prompts, *, stop_tokens, **options):
            asked.append((prompts, set(stop_tokens)))
            yield from ([token] for token in tokens)

        monkeypatch.setattr("recipes.commands.generate.stream", stream)
        return asked

    return make


def test_text_is_decoded_with_the_prompt_before_it(words, espalier, says):
    says([4, 5, 2, 3])
    status, output = espalier("generate", words, "--prompt", "to be")
    assert (status, output.out) == (0, "to be or not to be\n"), output.err


def test_characters_of_several_tokens_come_whole(words, espalier, says, monkeypatch):
    """Bytes of a character are held back until it is there; what never becomes one is printed at the end."""
    tokens = [7 + byte for byte in " é你".encode()] + [4] + [7 + 0xE4, 7 + 0xBD]
    says(tokens)
    written = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    assert cli.main(["generate", str(words), "--prompt", "to be"]) == 0
    assert "".join(written) == "to be é你 or��\n"
    assert "�" not in "".join(written[:-1])


def test_every_end_token_of_the_generation_config_ends_a_text(words, espalier, says):
    asked = says([])
    assert espalier("generate", words, "--prompt", "to be")[0] == 0
    assert asked[0][1] == {0, 263}


def test_samples_stop_at_every_end_token_and_keep_the_space(words, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "app.tasks.causal_lm.generate",
        lambda model, prompts, *, stop_tokens, **options: asked.append(set(stop_tokens)) or [[4, 5]],
    )

    config = SimpleNamespace(position=SimpleNamespace(bounded=False))
    module = SimpleNamespace(model=SimpleNamespace(config=config), compiling=None, task=CausalLM())
    texts = Samples(["to be"])._written(module, load_tokenizer(words))
    assert texts == ["```\nto be or not\n```"]
    assert asked == [{0, 263}]


def test_special_tokens_in_a_prompt_are_characters_unless_asked_for(words, espalier, says):
    asked = says([4])
    status, output = espalier("generate", words, "--prompt", "to<|im_end|>")
    assert status == 0
    assert "<|im_end|> in the prompt: read as characters" in output.err
    assert 263 not in asked[0][0][0]
    status, output = espalier("generate", words, "--prompt", "<s>to<|im_end|>", "--special_tokens", "true")
    assert (status, output.err) == (0, "")
    assert asked[1][0] == [[1, 2, 263]]  # and the token that begins a document is not doubled


def test_a_prompt_that_is_no_text_is_refused(words, refused):
    refused("generate", words, "--prompt", b"\xe9".decode("utf-8", "surrogateescape"), words=["UTF-8"])


@pytest.fixture
def above(llama):
    """A folder whose tokenizer knows two tokens more than the model has embeddings for: <pad>, and the word "ugu"."""
    raw = Tokenizer.from_file(str(llama / "tokenizer.json"))
    raw.no_truncation()
    raw.add_special_tokens(["<pad>"])
    raw.add_tokens(["ugu"])
    raw.save(str(llama / "tokenizer.json"))
    return llama


def test_a_token_above_the_rows_is_refused_where_a_text_holds_it(above, espalier, refused, tmp_path):
    plain, other = tmp_path / "plain.jsonl", tmp_path / "other.jsonl"
    lines = [json.dumps({"text": f"ba bo be {number} <pad> " * 40}) for number in range(60)]
    plain.write_text("\n".join(lines))
    other.write_text("\n".join(line.replace("be", "ugu") for line in lines))
    rest = ["--sequence_length", 16, "--speed_rounds", 0, "--device", "cpu"]
    status, output = espalier("evaluate", above, "--data", plain, *rest)
    assert status == 0, output.err
    assert espalier("generate", above, "--prompt", "ba <pad>", "--max_new_tokens", 2)[0] == 0
    refused("generate", above, "--prompt", "ugu", words=["token 321"])
    words, out = ["'ugu', token 321", "embeddings for 320"], tmp_path / "out"
    refused("evaluate", above, "--data", other, *rest, words=words)
    given = ["--data", other, "--evaluation_data", plain, "--out", out, *rest]
    refused("prune", above, "--method", "wanda", *given, words=words)
    refused("distill", "--teacher", above, *given, words=words)
    (above / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    refused("evaluate", above, "--data", plain, *rest, words=["'<pad>'", "embeddings for 320"])
