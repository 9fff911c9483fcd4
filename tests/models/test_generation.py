"""Decoding with a cache is decoding without one, token for token, in every way transformers can ask for it."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from tests.models.conftest import tiny

NEW = 12


def _prompt(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(3))


def _greedy(model: torch.nn.Module, ids: Tensor, **options: object) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), **options)


def test_cache_equals_no_cache(mix: str) -> None:
    model, ids = tiny(mix), _prompt()
    assert _greedy(model, ids).tolist() == _greedy(model, ids, use_cache=False).tolist()


def test_step_logits_equal_full_logits(mix: str) -> None:
    model, ids = tiny(mix), _prompt(length=20)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model.new_cache()
        for t in range(ids.shape[1]):
            step = model(ids[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(step[:, 0], full[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [(1, 19), (5, 7, 8), (3, 1, 16)])
def test_chunked_prefill_equals_one_pass(mix: str, chunks: tuple[int, ...]) -> None:
    model, ids = tiny(mix), _prompt(length=20)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model.new_cache()
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-4, rtol=1e-4)


def test_generate_with_prefill_chunks(mix: str) -> None:
    model, ids = tiny(mix), _prompt(length=11)
    assert _greedy(model, ids, prefill_chunk_size=4).tolist() == _greedy(model, ids).tolist()


def test_left_padding_changes_nothing(mix: str) -> None:
    model, ids = tiny(mix), _prompt()
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids), dim=1)
    padded[1, :5] = 7  # the content of padding must not matter either
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    plain = _greedy(model, ids)[:, ids.shape[1] :]
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert _greedy(model, padded, attention_mask=mask, **options)[:, padded.shape[1] :].tolist() == plain.tolist()


def test_ragged_batch_equals_rows_alone(mix: str) -> None:
    model, ids = tiny(mix), _prompt(rows=3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :8] = 0
    together = _greedy(model, ids, attention_mask=mask)
    for row, kept in enumerate((9, 6, 1)):
        alone = _greedy(model, ids[row : row + 1, -kept:])
        assert together[row, -NEW:].tolist() == alone[0, -NEW:].tolist()


@pytest.mark.parametrize("beams", [3])
def test_beam_search_with_and_without_cache(mix: str, beams: int) -> None:
    model, ids = tiny(mix), _prompt()
    options = {"num_beams": beams, "num_return_sequences": 2, "length_penalty": 0.5}
    assert _greedy(model, ids, **options).tolist() == _greedy(model, ids, use_cache=False, **options).tolist()


def test_continue_from_returned_cache(mix: str) -> None:
    model, ids = tiny(mix), _prompt()
    whole = _greedy(model, ids, max_new_tokens=NEW)
    first = _greedy(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    rest = _greedy(model, first.sequences, max_new_tokens=NEW - 5, past_key_values=first.past_key_values)
    assert rest.tolist() == whole.tolist()


def test_continue_after_left_padded_prompt(mix: str) -> None:
    model, ids = tiny(mix), _prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = _greedy(model, ids, attention_mask=mask)
    first = _greedy(model, ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True)
    longer = torch.nn.functional.pad(mask, (0, 5), value=1)
    rest = _greedy(
        model, first.sequences, attention_mask=longer, max_new_tokens=NEW - 5, past_key_values=first.past_key_values
    )
    assert rest.tolist() == whole.tolist()


def test_right_padded_prefill_then_decode(mix: str) -> None:
    """A right-padded batch leaves the cache as if the padding had not been there."""
    model, ids = tiny(mix), _prompt(length=8)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = model.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        steps = [model(token, past_key_values=cache).logits for _ in range(4)]
        alone = model.new_cache()
        model(ids[:1, :3], past_key_values=alone)
        for step in steps:
            expected = model(token[:1], past_key_values=alone).logits
            torch.testing.assert_close(step[:1], expected, atol=1e-4, rtol=1e-4)


def test_sampling_is_seeded(mix: str) -> None:
    model, ids = tiny(mix), _prompt()
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(model.generate(ids, do_sample=True, top_p=0.9, max_new_tokens=NEW, use_cache=use_cache).tolist())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "self"}])
@pytest.mark.parametrize("stateful", ["cosine", "metala", "hybrid", "window"])
def test_assisted_decoding_is_refused_where_a_state_cannot_roll_back(stateful: str, options: dict) -> None:
    model, ids = tiny(stateful), _prompt(rows=1)
    if "assistant_model" in options:
        options = {"assistant_model": tiny(stateful)}
    with pytest.raises(ValueError, match="stateful"):
        _greedy(model, ids, **options)


def test_prompt_lookup_is_exact_for_full_attention() -> None:
    model, ids = tiny("softmax"), _prompt(rows=1)
    assert _greedy(model, ids, prompt_lookup_num_tokens=3).tolist() == _greedy(model, ids).tolist()


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_scaled_rope_beyond_the_trained_length(rope: dict) -> None:
    """One length for the whole generation: cached equals uncached, also where dynamic NTK changes its base."""
    model, ids = tiny("softmax", max_position_embeddings=12, rope_parameters=rope), _prompt()
    cached = _greedy(model, ids, max_new_tokens=20)
    assert cached.tolist() == _greedy(model, ids, max_new_tokens=20, use_cache=False).tolist()
    explicit = _greedy(model, ids, max_new_tokens=20, context_length=ids.shape[1] + 20)
    assert explicit.tolist() == cached.tolist()


def test_dynamic_rope_has_no_memory_of_longer_calls() -> None:
    model = tiny("softmax", max_position_embeddings=12, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    with torch.no_grad():
        before = model(_prompt(length=8)).logits
        model(_prompt(length=40))
        assert torch.equal(model(_prompt(length=8)).logits, before)


def test_cache_kinds_report_what_they_hold() -> None:
    ids = _prompt(length=30)
    for name, bounded in (("cosine", True), ("metala", True), ("window", True), ("softmax", False)):
        model = tiny(name)
        cache = model.new_cache()
        sizes = []
        with torch.no_grad():
            for t in range(ids.shape[1]):
                model(ids[:, t : t + 1], past_key_values=cache)
                sizes.append(cache.nbytes())
        assert (sizes[-1] == sizes[10]) == bounded, name
        assert cache.get_seq_length() == 30


def test_state_bytes_equal_the_allocation() -> None:
    ids = _prompt(rows=1, length=9)
    for name in ("cosine", "metala", "window", "softmax"):
        model = tiny(name)
        cache = model.new_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for block, layer in zip(model.model.blocks, cache.layers, strict=True):
            assert layer.nbytes() == block.mixer.state_bytes(9, torch.float32), name


def test_foreign_caches_are_refused() -> None:
    from transformers import DynamicCache

    model, ids = tiny("metala"), _prompt()
    with pytest.raises(ConfigError, match="new_cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="cache_implementation"):
        _greedy(model, ids, cache_implementation="static")
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    with pytest.raises(ShapeError, match="rows"):
        model(ids[:1], past_key_values=cache)
