"""The model card says only what holds for its model."""

import pytest

from app.history import write_card
from app.tasks import CausalLM
from models.config import ModelConfig
from models.transformer import Transformer


@pytest.mark.parametrize(("kind", "offered"), [("full", True), ("retention", False)])
def test_the_card_offers_an_export_only_where_there_is_one(tmp_path, kind, offered):
    values = {"width": 32, "depth": 1, "vocab_size": 64, "position": {"kind": "rope"}}
    if kind == "retention":
        values["position"] = {"kind": "rope", "layout": "interleaved"}
    layers = {"attention": {"kind": kind, "heads": 4}, "feedforward": {"kind": "swiglu", "width": 64}}
    write_card(tmp_path, Transformer(ModelConfig.from_dict({**values, **layers})), [], CausalLM())
    card = (tmp_path / "README.md").read_text()
    assert "espalier generate this/folder" in card
    assert ("espalier export" in card) == offered
