"""Corpora: what is read, in which order, into which split, and what is refused."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.corpora import SPLITS, Fractions, open_corpus
from farspan.errors import ConfigError, DataError


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(spec: str | Path, split: str | None = None) -> list[str]:
    return [document.name for document in open_corpus(spec).documents(split)]


def test_python_stdlib_has_the_library_without_tests_and_installed_packages() -> None:
    corpus = open_corpus("python-stdlib")
    found = [document.name for document in corpus.documents()]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    forbidden = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in found if forbidden & set(name.split("/")[:-1])]
    assert all(name.endswith(".py") for name in found)
    assert found == sorted(found)
    assert corpus.scan.bytes > 5_000_000


def test_python_stdlib_splits_are_disjoint_stable_and_sizeable() -> None:
    corpus = open_corpus("python-stdlib")
    sizes, seen = {}, set()
    for split in SPLITS:
        documents = list(corpus.documents(split))
        found = {document.name for document in documents}
        assert not found & seen
        seen |= found
        sizes[split] = sum(len(document.text.encode()) for document in documents)
    assert seen == set(names("python-stdlib"))
    assert sizes["train"] > 0.8 * corpus.scan.bytes
    assert min(sizes.values()) > 0.02 * corpus.scan.bytes
    assert corpus.fingerprint == open_corpus("python-stdlib").fingerprint
    assert corpus.fractions.split_of("pydoc_data/topics.py") == "train"


def test_folder_is_read_in_order_without_hidden_files_and_prepared_datasets(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "b", "a/x.md": "x", ".git/config": "no", "__pycache__/m.pyc": "no", ".hidden": "no"})
    write(tmp_path, {"data/dataset.json": "{}", "data/train.idx": "no", "data/tokenizer/tokenizer.json": "no"})
    assert names(tmp_path) == ["a/x.md", "b.txt"]


def test_glob_file_and_folder_name_documents_by_relative_path(tmp_path: Path) -> None:
    write(tmp_path, {"one/a.txt": "a", "two/b.txt": "b", "two/c.md": "c"})
    assert names(f"{tmp_path}/**/*.txt") == ["one/a.txt", "two/b.txt"]
    assert names(f"{tmp_path}/t*/*") == ["two/b.txt", "two/c.md"]
    assert names(tmp_path / "two/c.md") == ["c.md"]


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    text = "a\r\nb\rc\n\ufeffd\x00\u2028 e"
    write(tmp_path, {"a.txt": text})
    assert next(open_corpus(tmp_path).documents()).text == text


def test_json_lines_are_documents_named_by_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "first", "content": "other"}), "", json.dumps({"content": "second"})]
    write(tmp_path, {"a.jsonl": "\n".join(lines)})
    found = {document.name: document.text for document in open_corpus(tmp_path).documents()}
    assert found == {"a.jsonl:1": "first", "a.jsonl:3": "second"}


def test_text_field_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": json.dumps({"text": "no", "body": "yes"})})
    assert next(open_corpus(tmp_path, text_field="body").documents()).text == "yes"


def test_split_of_a_document_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write(tmp_path, {f"{number}.txt": "text" for number in range(40)})
    before = {split: set(names(tmp_path, split)) for split in SPLITS}
    write(tmp_path, {f"{number}.txt": "text" for number in range(40, 80)})
    for split in SPLITS:
        assert before[split] <= set(names(tmp_path, split))


def test_fingerprint_depends_on_names_and_content_only(tmp_path: Path) -> None:
    first = open_corpus(write(tmp_path / "1", {"a.txt": "a", "b.txt": "b"})).fingerprint
    assert open_corpus(write(tmp_path / "2", {"b.txt": "b", "a.txt": "a"})).fingerprint == first
    assert open_corpus(write(tmp_path / "3", {"a.txt": "a", "b.txt": "c"})).fingerprint != first
    assert open_corpus(write(tmp_path / "4", {"a.txt": "a", "c.txt": "b"})).fingerprint != first
    assert open_corpus(write(tmp_path / "5", {"a.txt": "ab", "b.txt": ""})).fingerprint != first


def test_files_that_are_not_utf8_are_skipped_and_listed(tmp_path: Path) -> None:
    write(tmp_path, {"good.txt": "good", "bad.bin": b"\xff\xfe\x00", "bad.jsonl": b'{"text": "\xff"}\n'})
    corpus = open_corpus(tmp_path)
    assert corpus.scan.skipped == ("bad.bin", "bad.jsonl")
    assert [document.name for document in corpus.documents()] == ["good.txt"]


@given(st.text(max_size=30), st.floats(0, 0.5), st.floats(0, 0.49))
def test_every_name_has_exactly_one_split(name: str, valid: float, test: float) -> None:
    assert Fractions(valid, test).split_of(name) in SPLITS
    assert Fractions(0, 0).split_of(name) == "train"


BAD_CORPORA = {
    "empty folder": ({}, ".", "no files found"),
    "missing path": ({}, "nothing/here.txt", "neither a path that exists nor a built-in corpus"),
    "glob without match": ({"a.md": "a"}, "*.txt", "no files found"),
    "all files binary": ({"a.bin": b"\xff\xff"}, ".", "none of its 1 files is UTF-8"),
    "broken json": ({"a.jsonl": '{"text": "a"}\n{"text": '}, ".", r"a\.jsonl, line 2: not valid JSON"),
    "json list": ({"a.jsonl": "[1]"}, ".", "line 1: holds a list, not a JSON object"),
    "missing field": (
        {"a.jsonl": '{"body": "a", "id": 1}'},
        ".",
        "no field 'text' or 'content'; its fields are: body, id",
    ),
    "empty record": ({"a.jsonl": "{}"}, ".", "its fields are: none"),
    "nested too deeply": ({"a.jsonl": "[" * 200_000}, ".", "line 1: not valid JSON"),
    "half a character": ({"a.jsonl": '{"text": "\\ud800"}'}, ".", "unpaired surrogate"),
    "field of another type": ({"a.jsonl": '{"text": 3}'}, ".", "field 'text' holds a int, not a string"),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_bad_corpus_gets_one_clear_message(tmp_path: Path, case: str) -> None:
    files, spec, message = BAD_CORPORA[case]
    write(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        list(open_corpus(f"{tmp_path}/{spec}" if spec != "." else tmp_path).documents())
    assert "\n" not in str(caught.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'python-stdlib'"):
        open_corpus("python_stdlib")


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": "a"})

    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    corpus = open_corpus(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=re.escape(f"cannot read {tmp_path / 'a.txt'}: Permission denied")):
        corpus.fingerprint  # noqa: B018


def test_bad_fractions_and_splits_are_refused(tmp_path: Path) -> None:
    for valid, test in ((0.5, 0.5), (-0.1, 0), (0, 1)):
        with pytest.raises(ConfigError, match="split fractions"):
            Fractions(valid, test)
    with pytest.raises(DataError, match="did you mean 'train'"):
        list(open_corpus(write(tmp_path, {"a.txt": "a"})).documents("trian"))


def test_importing_the_package_stays_light() -> None:
    import subprocess

    code = (
        "import sys, farspan.data, farspan.data.corpora; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
