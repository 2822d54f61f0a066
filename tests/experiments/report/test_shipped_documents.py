"""README.md, RESULTS.md and docs/study say what the committed results give."""

import functools
import re
from pathlib import Path

from experiments.shipped_studies import ROOT, opened

from lrsa_lit.experiments.report.document import Blocks, results_of

STUDIES = {"robustness": "results", "objectives": "objectives", "claim": "claim", "systems": "systems"}
PAGES = sorted((ROOT / "docs" / "study").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "RESULTS.md", *PAGES]
BLOCK = re.compile(r"<!-- study:(\S+) -->\n(.*?)<!-- /study -->", re.DOTALL)


@functools.cache
def blocks_of(study):
    shipped = opened(f"configs/experiment/{study}.yaml")
    return Blocks(shipped, results_of(shipped, ROOT / "study" / f"{STUDIES[study]}.jsonl", may_be_empty=True))


# One test, so that one process opens the studies.
def test_the_shipped_documents_say_what_the_shipped_results_give():
    for path in DOCUMENTS:
        found = BLOCK.findall(path.read_text(encoding="utf-8"))
        assert found, path.name
        for mark, written in found:
            check_block(path, mark, written.strip())


def check_block(path, mark, written):
    study, name = mark.split(":")
    blocks = blocks_of(study)
    blocks.check(name)
    if name in blocks.texts:
        # Places are those of the questions, which are not committed.
        if not name.endswith("/places"):
            assert written == blocks.texts[name](), mark
    elif written:
        shown = re.fullmatch(r"!\[(.*)\]\((.*)\)", written)
        assert shown[1] == blocks.plots[name][0]
        assert Path(shown[2]).name == f"{study}-{name.removesuffix('/plot').replace('/', '-')}.png"
        assert (path.parent / shown[2]).is_file()
    else:
        assert blocks.plots[name][1]() is None, mark


def test_every_table_of_the_recorded_studies_stands_on_a_page():
    shown = {mark for path in DOCUMENTS for mark, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
    robustness = blocks_of("robustness")
    for name in robustness.tables:
        part = name.split("/")[0]
        of_losses = robustness.texts[name]() == "" or {f"robustness:{name}/plot", "robustness:perplexity"} & shown
        assert {f"robustness:{name}", f"robustness:{part}"} & shown or of_losses, name


def test_the_results_fit_on_a_few_pages_and_each_page_begins_with_its_answer():
    assert len((ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()) <= 200
    index = (ROOT / "docs" / "study" / "README.md").read_text(encoding="utf-8")
    for path in PAGES:
        title, empty, answer, after, *_ = path.read_text(encoding="utf-8").splitlines()
        assert (title[:2], empty, answer[:2], answer[-2:], after) == ("# ", "", "**", "**", ""), path.name
        assert path.name == "README.md" or f"]({path.name})" in index
    shown = {Path(name).name for path in DOCUMENTS[1:]
             for name in re.findall(r"\(([\w/-]+\.png)\)", path.read_text(encoding="utf-8"))}  # fmt: skip
    assert {path.name for path in (ROOT / "docs" / "study").glob("*.png")} == shown


def test_numbers_of_the_results_stand_in_tables():
    prose = re.sub(r"\]\(\S*\)|`[^`]*`", "", BLOCK.sub("", (ROOT / "RESULTS.md").read_text(encoding="utf-8")))
    tables = "".join(text for path in DOCUMENTS for _, text in BLOCK.findall(path.read_text(encoding="utf-8")))
    known: dict[bool, set[str]] = {True: set(), False: set()}
    for number, percent in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(%?)", tables):
        known[bool(percent)] |= {f"{float(number):.{digits}f}" for digits in range(5)}
    found = re.findall(r"(?<![\w.])(\d+\.\d+|\d+(?= %))( %)?", prose)
    assert len(found) > 40
    assert [number for number, percent in found if number not in known[bool(percent)]] == []


def test_links_between_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for name, anchor in re.findall(r"\]\(([\w./-]*\.md)?(?:#([\w-]+))?\)", path.read_text(encoding="utf-8")):
            target = path.parent / name if name else path
            assert target.is_file(), (path.name, name)
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in slugs, (path.name, name, anchor)
