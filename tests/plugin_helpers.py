"""The worked examples of docs/extending.md as the files that its readers write."""

import gc
import re
import sys
from pathlib import Path

import pytest

from lrsa_lit import plugins

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
TOWNS = "".join(f"Town {n},{n * 37 % 100},{'north' if n % 3 else 'south'} {n}\n" for n in range(40))


def write_examples(folder: Path) -> dict[str, str]:
    """Write the modules and a table for them into a folder; their texts by the names of the modules."""
    found = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    for name, text in found:
        (folder / f"{name}.py").write_text(text)
    (folder / "towns.csv").write_text(f"town,wells,region\n{TOWNS}")
    return dict(found)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The examples in this folder, which can be imported, and are forgotten afterwards."""
    monkeypatch.setattr(plugins, "_added", {kind: {} for kind in plugins.KINDS})
    texts = write_examples(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in texts:
        # Those of other tests are there again afterwards.
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield texts
    forget(*texts)


def forget(*names):
    """Nobody finds the classes of these modules any more, not even by asking a base for its subclasses."""
    for name in names:
        sys.modules.pop(name, None)
    gc.collect()
