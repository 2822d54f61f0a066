"""The site builds without a warning, and the README stays short."""

import importlib.util
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / "docs" / "figures" / "quickstart.txt").read_text(encoding="utf-8")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Links are looked at here as well: a page, a heading or a file of the repository that is not there is a warning.
def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path, caplog, monkeypatch):
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    with caplog.at_level(logging.WARNING):
        build(loaded)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    for path in (ROOT / "docs").rglob("*.md"):
        page = path.relative_to(ROOT / "docs").with_suffix(".html")
        assert (tmp_path / page).is_file() or path.name == "README.md", page
    text = (tmp_path / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "model.lrsa.top_k" in text
    assert "data.init_args.max_tokens" in text
    commands = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "usage: lrsa export" in commands
    kept = (tmp_path / "notebooks" / "attention_selections.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="[^"]+" src="(attention_selections-\d+\.png)" width="\d+"', kept)
    assert len(pictures) == 6
    assert all((tmp_path / "notebooks" / picture).is_file() for picture in pictures)
    assert "sparse_attention" in (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")


def test_a_link_of_the_checkout_becomes_one_of_the_site():
    pytest.importorskip("mkdocs.config")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = (
        "See [a](docs/start/cpu.md), ![b](docs/figures/method.svg) ([c](RESULTS.md#how-sure)), [d](https://d.org/e).\n"
    )
    assert script("hooks").on_page_markdown(text, page=page) == (
        "See [a](start/cpu.md), ![b](figures/method.svg) ([c](results.md#how-sure)), [d](https://d.org/e).\n"
    )


def test_each_page_has_a_place_in_the_navigation():
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in named, path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_speed_that_the_readme_names_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = re.search(r"\((benchmarks/results/attention_\S+)\.png\)", text)[1]
    rows = json.loads((ROOT / f"{picture}.json").read_text())["rows"]
    fastest = max(row["cudnn"]["both"] / row["lrsa"]["both"] for row in rows if row["dim"] == 128)
    assert f"up to {fastest:.1f} times as fast" in text


def test_the_versions_are_the_same_everywhere():
    import lrsa_lit

    assert f"\nversion: {lrsa_lit.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {lrsa_lit.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/start/cpu.md"])
def test_what_the_quickstart_prints_is_what_was_recorded(page):
    assert f"```text\n{QUICKSTART}```\n" in (ROOT / page).read_text(encoding="utf-8")


def test_the_picture_of_the_rule_is_what_the_operator_does():
    drawing = script("draw_method")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.drawn()
    kinds = drawing.kinds()
    assert kinds.count("kept") == 4 * drawing.RULE.top_k
