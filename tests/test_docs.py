"""Every example in the documentation runs: docstrings by doctest, pages by executing their Python blocks."""

import dataclasses
import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import farspan

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def _modules() -> list[str]:
    found = pkgutil.walk_packages(farspan.__path__, "farspan.")
    return [module.name for module in found if not module.name.endswith(".triton")]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not failed


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in _modules()]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 5


def _blocks(language: str) -> list[pytest.param]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
        for page in PAGES
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M))
    ]


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_blocks_of_the_pages(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.mixers import MIXERS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))  # forgets what a page registers
    exec(compile(block, "<documentation>", "exec"), {"__name__": "__example__"})


def test_every_option_stands_on_its_page() -> None:
    from farspan.mixers import MIXERS
    from farspan.nn.feed_forward import FEED_FORWARDS

    pages = {"sliding_softmax": "softmax"} | dict.fromkeys(FEED_FORWARDS.names(), "experts")
    for registry in (MIXERS, FEED_FORWARDS):
        for name in registry._builtin:  # not what other tests have registered
            options, page = registry.get(name)[1], pages.get(name, name)
            text = (ROOT / "docs" / "mechanisms" / f"{page}.md").read_text()
            missing = [field.name for field in dataclasses.fields(options) if f"`{field.name}`" not in text]
            assert not missing, f"{page}.md does not name the options {missing} of {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_drawn_from_the_references(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert specification is not None and specification.loader is not None
    pictures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pictures)
    for name in ("dilated", "metala"):
        assert pictures.draw(name, tmp_path).stat().st_size > 5000
    for name in pictures.PICTURES:
        assert (ROOT / "docs" / "images" / f"keys_{name}.png").is_file()
        weights = pictures.PICTURES[name]()[0].transpose(0, 1)
        assert (weights.triu(1) == 0).all(), f"{name} looks ahead"
