"""The cache in pages against the contiguous one, to the bit; what rows share; and what they give back."""

import pytest
import torch

from models.cache import ContiguousCache, PagedCache, RollingCache
from models.config import ModelConfig
from models.errors import UserError
from models.generation import generate
from models.transformer import Transformer

CPU = torch.device("cpu")
PAGE_BYTES = 2 * 2 * 4 * 3 * 4  # keys and values of 2 heads, 4 tokens, 3 channels in fp32


def build(kind="full", **attention):
    torch.manual_seed(0)
    spec = {"kind": kind, "heads": 4, "kv_heads": 2, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "attention": spec}
    model = Transformer(ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def paged(batch=2):
    return PagedCache(batch, 2, 4, 3, CPU, torch.float32)


def drawn(batch, tokens):
    return torch.randn(batch, 2, tokens, 3), torch.randn(batch, 2, tokens, 3)


def same(one, other):
    assert one.key_positions is None
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("pieces", [[1] * 13, [4, 4, 4], [3, 1, 6, 1, 9], [17, 1]], ids=str)
def test_it_returns_what_the_contiguous_cache_does(pieces):
    mine, theirs = paged(), ContiguousCache(2, 2, 40, 3, CPU, torch.float32)
    for new in pieces:
        k, v = drawn(2, new)
        same(mine.append(k, v), theirs.append(k, v))
    assert mine.bytes() == 2 * -(-sum(pieces) // 4) * PAGE_BYTES


def test_rows_that_began_alike_share_pages_until_they_write():
    cache = paged(batch=1)
    begun = cache.append(*drawn(1, 10))  # two full pages and half of a third
    cache.fork([0, 0, 0])
    assert cache.bytes() == 3 * PAGE_BYTES
    open_page = cache.tables[0][2]
    k, v = drawn(3, 1)
    kept = cache.append(k, v)
    assert cache.bytes() == 5 * PAGE_BYTES  # one row goes on in the third page, two have copies of it
    assert torch.equal(kept.keys, torch.cat([begun.keys.expand(3, -1, -1, -1), k], dim=2))
    assert torch.equal(kept.values, torch.cat([begun.values.expand(3, -1, -1, -1), v], dim=2))
    assert [table[:2] for table in cache.tables] == [cache.tables[0][:2]] * 3
    assert len({table[2] for table in cache.tables}) == 3
    assert open_page in [table[2] for table in cache.tables]  # the last reader copies nothing
    cache.append(*drawn(3, 1))  # nothing is copied twice
    assert cache.bytes() == 5 * PAGE_BYTES


def test_full_pages_are_shared_for_good():
    cache = paged(batch=1)
    cache.append(*drawn(1, 8))
    cache.fork([0, 0])
    cache.append(*drawn(2, 4))
    assert cache.bytes() == 4 * PAGE_BYTES


def test_rows_that_end_give_back_their_pages_and_others_take_them():
    cache = paged(batch=3)
    k, v = drawn(3, 6)
    cache.append(k, v)
    assert cache.bytes() == 6 * PAGE_BYTES
    cache.fork([2, 0])
    assert cache.bytes() == 4 * PAGE_BYTES
    more, values = drawn(2, 5)  # one page more for each, of which the pool has two
    kept = cache.append(more, values)
    assert len(cache.readers) == 6
    assert torch.equal(kept.keys, torch.cat([k[[2, 0]], more], dim=2))
    cache.fork([])
    assert cache.bytes() == 0
    assert sorted(cache.free) == list(range(6))


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 1, 3, 1]], ids=str)
def test_a_model_decodes_with_the_same_bits(chunks):
    model, tokens = build(), torch.randint(40, (3, 11))
    caches = model.new_cache(3, 11), model.new_cache(3, 11, pages=4)
    assert all(type(layer) is PagedCache for layer in caches[1].layers)
    with torch.no_grad():
        for piece in tokens.split(chunks, dim=1):
            one, other = (model(piece, cache=cache).logits for cache in caches)
            assert torch.equal(one, other)


@pytest.mark.parametrize("page", [1, 4, 16, 100])
def test_prompts_of_any_length_go_on_as_they_would_without_pages(page):
    model = build()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7], [8, 7, 6], [9]]
    arguments = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert generate(model, prompts, page_size=page, **arguments) == generate(model, prompts, **arguments)


def test_equal_prompts_are_read_once_and_share_their_pages(monkeypatch):
    model, made = build(), []
    new_cache = model.new_cache

    def kept(batch, *arguments, **more):
        made.append((batch, new_cache(batch, *arguments, **more)))
        return made[-1][1]

    monkeypatch.setattr(model, "new_cache", kept)
    generate(model, [[1] * 16] * 5, max_new_tokens=2, temperature=1.0, page_size=4)
    ((batch, cache),) = made
    assert batch == 1
    assert cache.layers[0].bytes() == (4 + 5) * 2 * 2 * 4 * 4 * 4  # a prompt of 4 pages, and one page of each row


def test_a_fork_of_a_padded_batch_goes_on_as_its_parents_do():
    model = build()
    tokens = torch.randint(1, 40, (2, 7))
    documents = torch.tensor([[-1] * 3 + [0] * 4, [0] * 7])
    following = torch.randint(40, (3, 1))
    forked, plain = (model.new_cache(rows, 20, pages=pages) for rows, pages in ((2, 4), (3, None)))
    parents = [1, 0, 1]
    with torch.no_grad():
        model(tokens, documents=documents, cache=forked)
        forked.fork(parents)
        model(tokens[parents], documents=documents[parents], cache=plain)
        one, other = (model(following, cache=cache).logits for cache in (forked, plain))
    torch.testing.assert_close(one, other)


def test_layers_that_do_not_keep_everything_keep_their_own_cache():
    model = build("window", window=4)
    cache = model.new_cache(2, 20, pages=4)
    assert all(type(layer) is RollingCache for layer in cache.layers)
    prompts = [[1, 2, 3], [1, 2, 3]]
    assert generate(model, prompts, max_new_tokens=9, page_size=4) == generate(model, prompts, max_new_tokens=9)


def test_the_pool_may_be_written_outside_the_mode_in_which_it_grew():
    cache = paged()
    with torch.inference_mode():
        cache.append(*drawn(2, 3))
    with torch.no_grad():
        cache.append(*drawn(2, 3))


def test_an_empty_page_is_refused():
    with pytest.raises(UserError, match="a page holds at least 1 token, got 0"):
        generate(build(), [[1]], max_new_tokens=2, page_size=0)
