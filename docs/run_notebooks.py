"""Run the notebooks again, and store in them what they show: ``docs/run_notebooks.py``. See `make notebooks`."""

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(path: Path) -> None:
    """Run one notebook in its folder. Its file stays as it is if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # Times would change the file at each run.
    options = {"record_timing": False, "coalesce_streams": True, "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", **options).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            _shrink(output)
    text = nbformat.writes(notebook).replace(str(ROOT), "/home/you/lrsa-lit")
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def _shrink(output: NotebookNode) -> None:
    """Store a picture with few colours, and without the text that says only that it is a figure."""
    shown = output.get("data", {})
    if "image/png" not in shown:
        return
    packed = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
    picture.convert("RGB").quantize(256).save(packed, format="png", optimize=True)
    output.data = NotebookNode({"image/png": base64.b64encode(packed.getvalue()).decode()})


if __name__ == "__main__":
    for each in sorted((ROOT / "notebooks").glob("*.ipynb")):
        run(each)
