"""Rows of a cache of their own lengths: what is stored, what is given back, and what is refused."""

import pytest
import torch

from models.cache import PagedCache
from models.errors import UserError
from tests.models.test_paged import build
from tests.models.test_retention import build as build_retention


def begun(model, *lengths, capacity=20, pages=None):
    cache = model.new_cache(len(lengths), capacity, pages=pages)
    cache.begin(lengths)
    with torch.no_grad():
        model(torch.ones(len(lengths), max(lengths), dtype=torch.int64), cache=cache)
    return cache


def test_pages_hold_no_padding_and_come_back_when_rows_are_shortened():
    cache = begun(build(), 9, 1, 4, pages=4)
    layer = cache.layers[0]
    assert type(layer) is PagedCache
    assert [len(table) for table in layer.tables] == [3, 1, 1]
    cache.shorten([5, 1, 0])
    assert (cache.lengths, cache.length) == ([4, 0, 4], 4)
    assert [len(table) for table in layer.tables] == [1, 0, 1]
    assert len(layer.free) == len(layer.readers) - 2


def test_a_window_that_has_forgotten_nothing_can_be_shortened():
    model = build("window", window=8)
    tokens = torch.randint(1, 40, (2, 7))
    cache, other = model.new_cache(2, 20), model.new_cache(2, 20)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.shorten([3, 3])
        model(tokens[:, :4], cache=other)
        torch.testing.assert_close(model(tokens[:, 4:], cache=cache).logits, model(tokens[:, 4:], cache=other).logits)
        model(tokens, cache=cache)
    with pytest.raises(UserError, match="2 tokens cannot be taken back: the cache of a window keeps 8 tokens"):
        cache.shorten([0, 2])
    assert cache.lengths == [14, 14]


def test_what_cannot_be_is_refused_in_a_sentence():
    model = build()
    cache = begun(model, 3, 2)
    with pytest.raises(UserError, match="rows begin before their first token, and these have 3"):
        cache.begin([1, 2])
    with pytest.raises(UserError, match="row 1 has 2 tokens, of which 3 cannot be taken back"):
        cache.shorten([0, 3])
    with pytest.raises(UserError, match="a cache for 20 tokens cannot be of one for 9"):
        cache.put(0, begun(model, 2, capacity=9))
    with pytest.raises(UserError, match="give both the same pages"):
        cache.put(0, begun(model, 2, pages=4))
    packed = model.new_cache(1, 20)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64), documents=torch.tensor([[0, 0, 1]]), cache=packed)
    with pytest.raises(UserError, match="rows cannot be shortened where documents were given"):
        packed.shorten([1])
    with pytest.raises(UserError, match="a RecurrentCache keeps what tokens have become together"):
        begun(build_retention(), 3, 2).shorten([1, 0])
    assert cache.lengths == [3, 2]
