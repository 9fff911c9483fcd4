"""The mechanism of docs/adding_a_mechanism.md holds what that page promises, in under 80 lines."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_mechanism.md"
BLOCK = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)[0]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    from farspan.mixers import MIXERS

    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))  # forgets the registration afterwards
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(compile(BLOCK, str(PAGE), "exec"), space)
    return space["model"].eval()


def test_it_is_short() -> None:
    definition = BLOCK.split("config = FarspanConfig")[0]
    assert len([line for line in definition.splitlines() if line.strip()]) < 80


def test_it_decodes_pads_and_packs_exactly(model: Any) -> None:
    ids = torch.randint(0, 32, (2, 9))
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, **greedy).tolist() == model.generate(ids, use_cache=False, **greedy).tolist()
    mask = torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[1, mask[1].bool()]
        torch.testing.assert_close(padded, model(ids[1:, mask[1].bool()]).logits[0], atol=1e-5, rtol=1e-4)
        packed = model(ids[:1], cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)).logits
        separate = torch.cat([model(ids[:1, :4]).logits, model(ids[:1, 4:]).logits], dim=1)
        torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


def test_it_is_loaded_again(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 32, (2, 9))
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(again, model(ids).logits, atol=0, rtol=0)


def test_it_trains(model: Any) -> None:
    ids = torch.arange(16).repeat(2, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
