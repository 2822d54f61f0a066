"""What `mkdocs build` adds to the pages of this folder: documents from elsewhere in the repository, and the reference.

Links are written as they work in a checkout, relative to the file that has them. Here they are turned into links of the
site; a file that is no page gets a page that shows it, so nothing depends on where the repository is hosted.
"""

import contextlib
import io
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import notebook_pages
import reference

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    "README.md": "index.md",
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "data/README.md": "reference/data.md",
    "benchmarks/LOG.md": "performance/log.md",
    "src/lrsa_lit/ops/sparse_attention/README.md": "concepts/operator.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")},
}
"""Pages of the site that are kept elsewhere in the repository."""
_ORIGINS = {page: document for document, page in DOCUMENTS.items()}
_LINK = re.compile(r"\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]+)?")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
# Files would bury what pages say.
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".jsonl": "json", ".json": "json", ".toml": "toml", ".txt": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, the reference, and the files that any page links to."""
    for document, page in DOCUMENTS.items():
        if document.endswith(".ipynb"):
            text, pictures = notebook_pages.page(ROOT / document)
            for name, picture in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=picture))
        else:
            text = (ROOT / document).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, text in _reference():
        files.append(File.generated(config, page, content=text))
    linked = {target for file in list(files.documentation_pages()) for target in _linked(file)}
    for target in sorted(linked - {_source(file.src_uri) for file in files if file.inclusion.is_included()}):
        path, page = ROOT / target, _page_of(target)
        if not path.exists():
            # A notebook's picture, or a mistake, of which mkdocs complains.
            continue
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, page, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, page, content=_shown(path, target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links of the checkout into links of the site."""
    source, here = _source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        if target is None or not (ROOT / target).exists():
            # It stays as it is written, and mkdocs complains about it.
            return match[0]
        return f"]({posixpath.relpath(_page_of(target), here or '.')}{match[2] or ''}"

    parts = _FENCE.split(markdown)
    return "".join(part if number % 2 else _LINK.sub(moved, part) for number, part in enumerate(parts))


def _reference() -> Iterator[tuple[str, str]]:
    with mock.patch.dict(os.environ, COLUMNS="110"), contextlib.redirect_stderr(io.StringIO()):
        yield from reference.pages()


def _source(page: str) -> str:
    """The file of the repository that a page is made of."""
    return _ORIGINS.get(page, f"docs/{page}")


def _target(source: str, link: str) -> str | None:
    """The file of the repository that a link leads to, relative to its root; None for one outside."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return None if path.startswith("..") else path


def _linked(file: File) -> Iterator[str]:
    source = _source(file.src_uri)
    for number, part in enumerate(_FENCE.split(file.content_string)):
        for match in () if number % 2 else _LINK.finditer(part):
            if (target := _target(source, match[1])) is not None:
                yield target


def _page_of(target: str) -> str:
    """The page, or file of the site, of a file of the repository."""
    if target in DOCUMENTS:
        return DOCUMENTS[target]
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    return f"files/{target}" if target.endswith((".png", ".svg")) else f"files/{target}.md"


def _shown(path: Path, target: str) -> str:
    if path.is_dir():
        names = sorted(each.name + "/" * each.is_dir() for each in path.iterdir() if each.name[0] not in "._")
        return f"{_UNSEARCHED}# {target}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = path.read_text(encoding="utf-8").rstrip()
    return f"{_UNSEARCHED}# {target}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
