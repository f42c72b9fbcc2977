"""A tiny model with its tokenizer, trained for a few steps on the synthetic corpus, for the tests of the stages."""

import pytest
import torch

from app.data.corpus import synthetic
from app.data.packing import token_blocks
from app.data.tokenizer import train_tokenizer
from models import checkpoint
from models.config import ModelConfig
from models.transformer import Transformer
from recipes import cli

ARCHITECTURE = {
    "width": 32,
    "depth": 4,
    "context": 64,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 64},
}
# what keeps a stage short in a test
QUICK = ["--data", "synthetic", "--sequence_length", "64", "--device", "cpu", "--speed_rounds", "0"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Token files go to a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([document.text for document in synthetic().documents("train")], 320)


@pytest.fixture(scope="session")
def teacher(tokenizer, tmp_path_factory):
    """A model folder whose perplexity lies well below that of token frequencies."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict(ARCHITECTURE | {"vocab_size": tokenizer.vocab_size}))
    blocks = token_blocks("synthetic", tokenizer, "train", 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = blocks.batch([(16 * step + i) % (len(blocks) - 1) for i in range(16)])
        loss = model(batch["tokens"], targets=batch["targets"], documents=batch["documents"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    with checkpoint.writing(path) as target:
        checkpoint.save_model(model, target)
        tokenizer.save(target)
    return path


@pytest.fixture
def espalier(capsys):
    """Run a command and return its exit status and what it printed."""

    def run(*argv):
        status = cli.main([str(argument) for argument in argv])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def refused(espalier):
    """Check that a command ends with status 2 and one sentence on stderr that holds all of the words."""

    def check(*argv, words=()):
        status, output = espalier(*argv)
        assert status == 2, output.err
        last = output.err.strip().splitlines()[-1]
        assert last.startswith("espalier: error: ")
        assert "Traceback" not in output.err
        for word in words:
            assert word in last

    return check
