"""The worked examples of docs/extending.md as the files that its readers write."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
TOWNS = "".join(f"Town {n},{n * 37 % 100},{'north' if n % 3 else 'south'} {n}\n" for n in range(40))


def write_examples(folder: Path) -> dict[str, str]:
    """Write the modules and a table for them into a folder; their texts by the names of the modules."""
    found = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    for name, text in found:
        (folder / f"{name}.py").write_text(text)
    (folder / "towns.csv").write_text(f"town,wells,region\n{TOWNS}")
    return dict(found)
