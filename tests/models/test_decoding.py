"""The decoding loop gives what `model.generate` gives, and chooses as transformers' filters do."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from farspan.errors import ConfigError, ShapeError
from farspan.mixers.cache import StateCache
from farspan.models import decoding
from farspan.models.decoding import Choice, capture_reason, decode, on_host
from tests.models.conftest import tiny

STEPPING = [
    "collinear",
    "collinear_strict",
    "collinear_near",
    "softmax",
    "softmax_post_norm",
    "window",
    "hybrid",
    "hybrid_parallel",
    "dilated",
    "dilated_nested",
    "dilated_xpos",
    "dynamic_mask",
    "dynamic_mask_query",
]


def prompt(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(3))


def test_greedy_equals_generate(mix: str) -> None:
    model, ids = tiny(mix), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ours = torch.stack(list(decode(model, ids, attention_mask=mask, max_new_tokens=12)), dim=1)
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert ours.tolist() == theirs[:, 9:].tolist()


def test_few_tokens_behind_padding_equal_generate(mix: str) -> None:
    """Fewer than the room that masks have already."""
    model, ids, mask = tiny(mix), prompt(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    ours = torch.stack(list(decode(model, ids, attention_mask=mask, max_new_tokens=3)), dim=1)
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert ours.tolist() == theirs[:, 9:].tolist()


def test_a_single_row_equals_generate(mix: str) -> None:
    model, ids = tiny(mix), prompt(rows=1)
    ours = torch.stack(list(decode(model, ids, max_new_tokens=6)), dim=1)
    assert ours.tolist() == model.generate(ids, max_new_tokens=6, do_sample=False)[:, 9:].tolist()


@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_probabilities_are_those_of_the_filters_of_transformers(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    scores = logits / 0.7
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    got = Choice(0.7, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(got, scores.softmax(-1))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = Choice(1.0)(logits.expand(40_000, -1))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=0.01, rtol=0)
    assert (Choice(1.0, top_k=2)(logits.expand(2000, -1)) > 0).all()


def test_sampling_is_seeded() -> None:
    model, ids = tiny("metala"), prompt()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(torch.stack(list(decode(model, ids, choice=Choice(1.0), max_new_tokens=12))).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_tokens_reach_the_host_in_order() -> None:
    model, ids = tiny("metala"), prompt()
    tokens = [token.tolist() for token in decode(model, ids, max_new_tokens=6)]
    assert list(on_host(decode(model, ids, max_new_tokens=6))) == tokens


def test_one_token_needs_no_step() -> None:
    assert len(list(decode(tiny("softmax"), prompt(), max_new_tokens=1))) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not accepted"),
        ({"temperature": float("nan")}, "temperature=nan is not accepted"),
        ({"top_k": -1}, "top_k=-1 is not accepted"),
        ({"top_p": 0.0}, "top_p=0.0 is not accepted; accepted are numbers above 0, up to 1"),
    ],
)
def test_choices_are_checked(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Choice(**fields)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens=0 is not accepted"):
        next(decode(tiny("metala"), prompt(), max_new_tokens=0))


def test_learned_positions_come_to_an_end() -> None:
    model = tiny("metala", position_embedding="learned", max_position_embeddings=12)
    steps, tokens = decode(model, prompt(length=9), max_new_tokens=9), []
    with pytest.raises(ShapeError, match="Position 12 is beyond the 12 learned positions"):
        for token in steps:
            tokens.append(token)
    assert len(tokens) == 4


def test_why_a_step_is_not_captured() -> None:
    assert "CUDA graphs need" in capture_reason(tiny("metala"))
    assert "memory of collinear does not" in capture_reason(tiny("collinear_window"))


def test_a_memory_that_a_loop_used_up_is_refused(mix: str) -> None:
    model = tiny(mix)
    cache = model.new_cache()
    list(decode(model, prompt(), past_key_values=cache, max_new_tokens=3))
    for again in (
        lambda: model(prompt(), past_key_values=cache),
        lambda: next(decode(model, prompt(), past_key_values=cache)),
    ):
        with pytest.raises(ConfigError, match="past_key_values was used up by `decode`; give model"):
            again()


def test_what_cannot_be_captured_is_not_when_it_is_asked_for() -> None:
    for mix, reason in (("softmax", "CUDA graphs need"), ("collinear_window", "memory of collinear does not stay")):
        with pytest.raises(ConfigError, match=f"capture=True: .*{reason}.*; leave capture out"):
            next(decode(tiny(mix), prompt(), capture=True))


def test_a_text_needs_a_last_token() -> None:
    mask = torch.ones(2, 9)
    mask[1, -2:] = 0
    with pytest.raises(ShapeError, match="attention_mask ends with padding; the last token of every row must be real"):
        next(decode(tiny("softmax"), prompt(), attention_mask=mask))
    with pytest.raises(ShapeError, match=r"input_ids has shape \[2, 0\]; a text to continue has at least one token"):
        next(decode(tiny("softmax"), prompt(length=0)))


@pytest.mark.parametrize(
    "mix",
    ["collinear", "collinear_near", "softmax", "window", "hybrid", "dilated", "dynamic_mask_query"],
)
def test_room_is_made_again_and_again(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(mix)
    want = list(decode(model, prompt(), max_new_tokens=12))
    monkeypatch.setattr(decoding, "ROOM", 3)
    assert torch.equal(torch.stack(list(decode(model, prompt(), max_new_tokens=12))), torch.stack(want))


@pytest.mark.parametrize("mix", ["collinear", "collinear_near", "softmax", "window", "dilated", "dilated_nested"])
def test_padding_between_texts_is_moved_ahead(mix: str) -> None:
    model, ids = tiny(mix), prompt(length=6)
    mask, caches = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), [model.new_cache(), model.new_cache()]
    for cache in caches:
        model(ids, attention_mask=mask, past_key_values=cache)
    ours = torch.stack(list(decode(model, ids[:, :2], past_key_values=caches[0], max_new_tokens=8)), dim=1)
    with torch.no_grad():
        token, theirs = ids[:, :2], []
        for _ in range(8):
            token = model(token, past_key_values=caches[1]).logits[:, -1:].argmax(-1)
            theirs.append(token)
    assert torch.equal(ours, torch.cat(theirs, dim=1))


def test_pinned_states_stay_where_they_are() -> None:
    cache = StateCache()
    cache.update(recurrent=torch.zeros(2, 3))
    cache.pin(1)
    place = cache.tensors["recurrent"]
    cache.update(recurrent=torch.ones(2, 3))
    assert cache.tensors["recurrent"] is place
    assert place.eq(1).all()
    cache.select(torch.tensor([0]))
    cache.update(recurrent=torch.zeros(1, 3))
    assert place.eq(1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("mix", ["metala", "cosine", "cosine_gpt", "ssd", "hybrid_state", *STEPPING])
@pytest.mark.parametrize("choice", [Choice(), Choice(0.9, 20, 0.9)])
def test_the_captured_loop_equals_the_eager_one(mix: str, choice: Choice) -> None:
    fields = {"mixers": ["metala", "ssd", "cosine"]} if mix == "hybrid_state" else {}
    model = tiny("metala" if mix == "hybrid_state" else mix, **fields).cuda()
    ids = prompt().cuda()
    assert capture_reason(model) is None
    runs = []
    for capture in (False, True):
        torch.manual_seed(5)
        steps = decode(model, ids, choice=choice, max_new_tokens=20, capture=capture)
        runs.append(torch.stack(list(steps), dim=1).tolist())
    assert runs[0] == runs[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("mix", ["metala", "cosine", "ssd", *STEPPING])
def test_the_captured_loop_runs_beside_the_current_device(mix: str) -> None:
    model, ids = tiny(mix).to("cuda:1"), prompt().to("cuda:1")
    runs = []
    for current in (1, 0):
        with torch.cuda.device(current):
            torch.manual_seed(5)
            runs.append(list(on_host(decode(model, ids, choice=Choice(0.9, 20, 0.9), max_new_tokens=20))))
    assert runs[0] == runs[1]


@pytest.mark.gpu
def test_captured_steps_end_with_the_learned_positions() -> None:
    model = tiny("metala", position_embedding="learned", max_position_embeddings=16).cuda()
    runs: list[list[list[int]]] = []
    for capture in (False, True):
        runs.append([])
        with pytest.raises(ShapeError, match="Position 16 is beyond the 16 learned positions"):
            for token in decode(model, prompt().cuda(), max_new_tokens=12, capture=capture):
                runs[-1].append(token.tolist())
    assert runs[0] == runs[1]
    assert len(runs[0]) == 8
