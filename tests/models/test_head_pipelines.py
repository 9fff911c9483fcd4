"""Saved heads with the Auto classes, pipelines and Trainer of transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto

from farspan import FarspanForMaskedLM, FarspanForSequenceClassification, FarspanForTokenClassification
from farspan.models.modeling import FarspanPreTrainedModel
from tests.models.test_heads import BERT, tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "ran"]
NAMES = {0: "animal", 1: "place", 2: "other"}
AUTO = {
    "AutoModelForPreTraining": FarspanForMaskedLM,
    "AutoModelForMaskedLM": FarspanForMaskedLM,
    "AutoModelForSequenceClassification": FarspanForSequenceClassification,
    "AutoModelForTokenClassification": FarspanForTokenClassification,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, with BERT's special tokens around one text or two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def saved(head: type[FarspanPreTrainedModel], directory: Path, **fields: object) -> FarspanPreTrainedModel:
    shape = {"vocab_size": len(WORDS), "causal": False, "mixers": ["cosine", "softmax", "cosine"], "type_vocab_size": 2}
    model = tiny(head, **{**shape, "num_labels": 3, "id2label": NAMES, "pad_token_id": 0, **fields})
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


@pytest.mark.parametrize("auto", sorted(AUTO))
def test_auto_classes_load_what_was_saved(auto: str, tmp_path: Path) -> None:
    head = AUTO[auto]
    model = saved(head, tmp_path, **(BERT if head is FarspanForMaskedLM else {}))
    loaded = getattr(modeling_auto, auto).from_pretrained(tmp_path)
    assert type(loaded) is head
    tokens = torch.randint(5, 12, (2, 6))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.id2label == NAMES and loaded.config.architectures == [head.__name__]
    half = getattr(modeling_auto, auto).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(tokens).logits.isfinite().all()


def test_fill_mask(tmp_path: Path) -> None:
    model = saved(FarspanForMaskedLM, tmp_path, **BERT)
    found = pipeline("fill-mask", model=str(tmp_path))("the [MASK] sat", top_k=3)
    logits = model(torch.tensor([[2, 5, 4, 7, 3]])).logits[0, 2]
    want = logits.softmax(-1).topk(3)
    assert [entry["token"] for entry in found] == want.indices.tolist()
    assert [entry["score"] for entry in found] == pytest.approx(want.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_classification(batch_size: int, tmp_path: Path) -> None:
    model = saved(FarspanForSequenceClassification, tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    out = classify(["the cat sat", "dog ran on the mat"], batch_size=batch_size)
    for text, ids in zip(out, ([2, 5, 6, 7, 3], [2, 10, 11, 8, 5, 9, 3]), strict=True):
        want = model(torch.tensor([ids])).logits[0].softmax(-1)
        ours = {entry["label"]: entry["score"] for entry in text}
        assert [ours[NAMES[i]] for i in range(3)] == pytest.approx(want.tolist(), rel=1e-4)


def test_token_classification(tmp_path: Path) -> None:
    model = saved(FarspanForTokenClassification, tmp_path)
    found = pipeline("token-classification", model=str(tmp_path), ignore_labels=[])("the cat sat")
    want = model(torch.tensor([[2, 5, 6, 7, 3]])).logits[0, 1:-1].argmax(-1)
    assert [(entry["word"], entry["entity"]) for entry in found] == [
        (word, NAMES[int(i)]) for word, i in zip(("the", "cat", "sat"), want, strict=True)
    ]


@pytest.mark.parametrize("head", [FarspanForMaskedLM, FarspanForSequenceClassification, FarspanForTokenClassification])
def test_trainer_learns_and_evaluates(head: type[FarspanPreTrainedModel], tmp_path: Path) -> None:
    """A text's class is that of its first word; masked words and the classes of words are told by the words."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    texts = [[2, 5 + i % 7, 5 + (3 * i) % 7, 3] for i in range(32)]
    rows = []
    for text in texts:
        if head is FarspanForSequenceClassification:
            row = {"labels": text[1] % 3}
        else:
            classes = text if head is FarspanForMaskedLM else [token % 3 for token in text]
            row = {"labels": [-100, *classes[1:-1], -100]}
            if head is FarspanForMaskedLM:
                row["next_sentence_label"] = text[1] % 2
        rows.append({"input_ids": text, "attention_mask": [1] * 4, **row})
    fields = {"vocab_size": 12, "causal": False, "mixers": ["cosine"], "num_labels": 3, "initializer_range": 0.1}
    model = tiny(head, **fields, **(BERT if head is FarspanForMaskedLM else {}))
    seen = []

    def accuracy(prediction: object) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if head is FarspanForMaskedLM:
            seen.append(logits[1].shape)
            logits, labels = logits[0], labels[0]
        kept = labels != -100
        return {"accuracy": float(np.mean((logits.argmax(-1) == labels)[kept]))}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        label_names=["labels", "next_sentence_label"] if head is FarspanForMaskedLM else None,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    assert seen == ([(32, 2)] if head is FarspanForMaskedLM else [])
