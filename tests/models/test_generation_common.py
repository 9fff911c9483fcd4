"""What transformers tests of generation on its own models: strategies, outputs, inputs, continuation, stopping."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from farspan import FarspanForCausalLM
from farspan.errors import ConfigError
from tests.models.conftest import tiny

NEW = 4
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2, "top_k": 10, "top_p": 0.7},
    "beam": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam_sample": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "temperature": 0.7},
}
RECORD = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


def _ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(3))


def _generate(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(*inputs, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


@pytest.fixture(
    params=["collinear", "cosine", "dilated", "dynamic_mask", "hybrid", "metala", "softmax", "ssd", "window"]
)
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_strategy_returns_what_was_asked_for(mixer: str, strategy: str, use_cache: bool) -> None:
    model, options = tiny(mixer), STRATEGIES[strategy]
    ids, mask = _ids(), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    out = _generate(model, ids, attention_mask=mask, use_cache=use_cache, **RECORD, **options)
    rows = 2 * options.get("num_return_sequences", 1)
    assert out.sequences.shape == (rows, 7 + NEW)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert all(step.shape == (rows, 61) for step in (*out.scores, *out.logits))
    for number, step in enumerate(out.hidden_states):
        length = 1 if use_cache and number else 7 + number
        assert [state.shape for state in step] == [(rows, length, 32)] * 4
    assert (out.past_key_values is None) == (not use_cache)
    assert not use_cache or out.past_key_values.get_seq_length() == 7 + NEW - 1


def test_the_prompt_can_be_left_out(mixer: str) -> None:
    model = tiny(mixer)
    model.generation_config.bos_token_id = 1
    out = _generate(model)
    assert out.shape == (1, 1 + NEW)
    assert torch.equal(out, _generate(model, torch.tensor([[1]])))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_of_embeddings(mixer: str, beams: int) -> None:
    model, ids = tiny(mixer), _ids()
    embeds = model.get_input_embeddings()(ids)
    expected = _generate(model, ids, num_beams=beams)
    assert torch.equal(_generate(model, ids, inputs_embeds=embeds, num_beams=beams), expected)
    assert torch.equal(_generate(model, inputs_embeds=embeds, num_beams=beams), expected[:, 7:])
    other = _generate(model, ids, inputs_embeds=torch.randn_like(embeds), **RECORD)
    assert not torch.allclose(other.scores[0], _generate(model, ids, **RECORD).scores[0], atol=1e-2)


def test_continuing_behind_embeddings(mixer: str) -> None:
    model = tiny(mixer)
    embed = model.get_input_embeddings()
    prompt = embed(_ids())
    whole = _generate(model, inputs_embeds=prompt)
    first = _generate(model, inputs_embeds=prompt, max_new_tokens=NEW - 1, return_dict_in_generate=True)
    longer = torch.cat((prompt, embed(first.sequences)), dim=1)
    last = _generate(model, inputs_embeds=longer, past_key_values=first.past_key_values, max_new_tokens=1)
    assert torch.equal(torch.cat((first.sequences, last), dim=1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_continuing_equals_not_stopping(mixer: str, side: str) -> None:
    """Tokens, scores and caches; also behind a right-padded prompt, after which positions must count on."""
    model, ids = tiny(mixer), _ids()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    whole = _generate(model, ids, attention_mask=mask, **RECORD)
    first = _generate(model, ids, attention_mask=mask, max_new_tokens=NEW - 1, **RECORD)
    mask = nn.functional.pad(mask, (0, NEW - 1), value=1)
    cache = first.past_key_values
    last = _generate(model, first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=1, **RECORD)
    assert torch.equal(last.sequences, whole.sequences)
    for ours, theirs in zip((*first.scores, *last.scores), whole.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(last.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert ours.tensors.keys() == theirs.tensors.keys()
        if getattr(ours, "keys", None) is not None:
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_positions_can_be_given(mixer: str) -> None:
    model, ids = tiny(mixer), _ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = _generate(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(given, _generate(model, ids, attention_mask=mask))


def test_rows_do_not_depend_on_the_batch(mixer: str) -> None:
    model, ids = tiny(mixer), _ids(3)
    together = _generate(model, ids)
    for row in range(3):
        assert torch.equal(_generate(model, ids[row : row + 1]), together[row : row + 1])


def test_logits_of_the_last_place_suffice(mixer: str) -> None:
    """`generate` asks for them alone; asking for all changes nothing."""
    model, ids = tiny(mixer), _ids()
    for use_cache in (True, False):
        kept = _generate(model, ids, use_cache=use_cache, **RECORD)
        everything = _generate(model, ids, use_cache=use_cache, logits_to_keep=0, **RECORD)
        assert torch.equal(kept.sequences, everything.sequences)


@pytest.mark.parametrize("mix", ["collinear", "hybrid", "softmax", "window"])
def test_attentions_of_every_step(mix: str) -> None:
    model = tiny(mix)
    out = _generate(model, _ids(), output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, _generate(model, _ids()))
    for number, step in enumerate(out.attentions):
        seen = min(7 + number, 4 if mix == "window" and number else 99)
        assert len(step) == sum(block.mixer.attention_weights for block in model.model.blocks)
        assert all(weights.shape == (2, 4, 1 if number else 7, seen) for weights in step)
        assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in step)


# What takes tokens back


@pytest.mark.parametrize("mix", ["collinear", "softmax"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_changes_nothing_but_speed(mix: str, do_sample: bool) -> None:
    model, ids = tiny(mix), _ids(1)
    for assistant in (tiny(mix), tiny(mix, num_hidden_layers=1)):
        out = _generate(model, ids, assistant_model=assistant, do_sample=do_sample, max_new_tokens=12, **RECORD)
        assert out.sequences.shape == (1, 19) and out.past_key_values.get_seq_length() == 18
        if not do_sample:
            assert torch.equal(out.sequences, _generate(model, ids, max_new_tokens=12))
    lookup = _generate(model, ids.repeat(1, 2), prompt_lookup_num_tokens=2, max_new_tokens=12)
    assert torch.equal(lookup, _generate(model, ids.repeat(1, 2), max_new_tokens=12))


def test_an_assistant_that_cannot_take_back_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot take back"):
        _generate(tiny("softmax"), _ids(1), assistant_model=tiny("metala"))


def test_a_class_is_stateful_and_a_model_says_whether_it_is() -> None:
    assert FarspanForCausalLM._is_stateful
    assert [tiny(mix)._is_stateful for mix in ("softmax", "collinear", "metala", "window")] == [
        False,
        False,
        True,
        True,
    ]


# Caches


@pytest.mark.parametrize("name", ["static", "quantized", "offloaded"])
def test_caches_of_other_kinds_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cache_implementation"):
        _generate(tiny("softmax"), _ids(), cache_implementation=name)
    assert _generate(tiny("softmax"), _ids(), cache_implementation="dynamic").shape == (2, 7 + NEW)


def test_caches_of_other_classes_are_refused() -> None:
    model = tiny("softmax")
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        for options in ({}, {"max_new_tokens": NEW}):
            with pytest.raises(ConfigError, match=type(cache).__name__ + r".*new_cache"):
                (model.generate if options else model)(_ids(), past_key_values=cache, **options)


def test_a_cache_shows_keys_and_values_as_transformers_does() -> None:
    model, ids = tiny("softmax"), _ids()
    assert model.new_cache().layers[0].keys is None
    cache = model(ids).past_key_values
    assert len(cache) == 3
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 7, 8)
    with torch.no_grad():
        before = cache.layers[0].keys.clone()
        model(ids[:, :1], past_key_values=cache)
    assert cache.layers[0].keys.shape == (2, 2, 8, 8) and torch.equal(cache.layers[0].keys[:, :, :7], before)


def test_chunks_of_the_prompt_leave_the_same_cache(mixer: str) -> None:
    model, ids = tiny(mixer), _ids(length=11)
    whole, chunks = _generate(model, ids, **RECORD), _generate(model, ids, prefill_chunk_size=4, **RECORD)
    assert torch.equal(chunks.sequences, whole.sequences)
    for ours, theirs in zip(chunks.scores, whole.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Stopping and streaming


class _After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping(mixer: str) -> None:
    model, ids = tiny(mixer), _ids()
    plain = _generate(model, ids, max_new_tokens=9)
    assert torch.equal(_generate(model, ids, max_length=16, max_new_tokens=None), plain)
    early = _generate(model, ids, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([_After(10)]))
    assert torch.equal(early, plain[:, :10])
    stop = int(plain[0, 9])
    ended = _generate(model, ids, max_new_tokens=9, eos_token_id=stop)
    for row, full in zip(ended, plain, strict=True):
        end = next((i for i in range(7, 16) if full[i] == stop), 15)
        assert torch.equal(row[: end + 1], full[: end + 1]) and not row[end + 1 :].any()
    least = _generate(model, ids, max_new_tokens=9, eos_token_id=stop, min_new_tokens=9)
    assert least.shape == (2, 16) and not (least[:, 7:15] == stop).any()


class _Collected(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_streamers(mixer: str, capsys: pytest.CaptureFixture[str]) -> None:
    from farspan.data.tokenizers import load_tokenizer

    streamer = _Collected()
    out = _generate(tiny(mixer), _ids(1), streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), out[0]) and streamer.ended
    tokenizer = load_tokenizer("byte")
    model = tiny(mixer, vocab_size=len(tokenizer))
    prompt = tokenizer("ab", return_tensors="pt").input_ids
    out = _generate(model, prompt, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0, prompt.shape[1] :]).rstrip("\n")


def test_a_stopping_string(mixer: str) -> None:
    from farspan.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("byte")
    model = tiny(mixer, vocab_size=len(tokenizer))
    prompt = tokenizer("ab", return_tensors="pt").input_ids
    favour = {"sequence_bias": {(ord("z"),): 1e4}}
    out = _generate(model, prompt, stop_strings="zz", tokenizer=tokenizer, max_new_tokens=9, **favour)
    assert tokenizer.decode(out[0]) == "abzz"
