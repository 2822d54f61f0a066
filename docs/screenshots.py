"""Make the screenshots of this folder from the runs of a store: ``docs/screenshots.py STORE EXPERIMENT``."""

# They need what `make setup browser` installs, and are made by:
#   lrsa sweep --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml \
#              --config configs/experiment/quickstart.yaml --config configs/experiment/selections.yaml \
#              --trainer.max_steps 16 --trainer.val_check_interval 16 --validate_first false \
#              --grid model.lrsa.top_k=8,32
#   PYTHONPATH=tests python docs/screenshots.py sqlite:///runs/mlflow.db quickstart

import html
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from browser import HEIGHT, Page, chromium, serving
from nbclient import NotebookClient
from PIL import Image
from selenium.webdriver.common.keys import Keys

from lrsa_lit.uris import SQLITE, sqlite_path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
STYLE = """
body {font: 14px sans-serif; margin: 1.5em}
table {border-collapse: collapse; font-size: 12px; white-space: nowrap}
td, th {padding: 2px 6px}
"""


def save(page: Page, name: str, height: int = HEIGHT) -> None:
    """The upper part of what the page shows now, as a PNG of few colours."""
    shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png()))
    image = shot.convert("RGB").crop((0, 0, shot.width, height))
    image.quantize(128, dither=Image.Dither.NONE).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


def shown(notebook: Path) -> str:
    """What a notebook shows when it is run, as a page: its texts, tables and pictures, without its code."""
    where = {"metadata": {"path": str(notebook.parent)}}
    parts = [f"<meta charset='utf-8'><style>{STYLE}</style>"]
    for cell in NotebookClient(nbformat.read(notebook, as_version=4), resources=where).execute().cells:
        if cell.cell_type == "markdown":
            parts.append(f"<p>{html.escape(cell.source.lstrip('# '))}</p>")
        for data in (output.data for output in cell.get("outputs", ()) if "data" in output):
            if "image/png" in data:
                parts.append(f"<img src='data:image/png;base64,{data['image/png'].strip()}' style='max-width: 1300px'>")
            else:
                parts.append(data.get("text/html") or f"<pre>{html.escape(data['text/plain'])}</pre>")
    return "\n".join(parts)


def main(store: str, experiment: str) -> None:
    """Save the table, a run's picture, the comparison, and what two notebooks show of the latest experiment."""
    with chromium() as page, serving(store, "--experiment", experiment) as (comparison, table, _):
        page.open(table)
        page.find("//*[@role='row']//a[contains(@href, '/runs/')]")
        page.close_assistant()
        page.find("//*[@role='columnheader'][contains(., 'kv_ratio')]")
        save(page, "runs-table", height=420)
        # A run that is no sweep's parent, which has a picture of its own.
        page.click("//*[@role='row']//a[contains(@href, '/runs/')][not(starts-with(., 'sweep-'))]")
        page.click("//*[@role='tab'][.='Artifacts']")
        page.click("//*[@artifact-name='pictures']")
        page.click("//*[@artifact-name='scores.png']")
        page.find("//img[starts-with(@src, 'blob:')]")
        save(page, "run-pictures", height=560)
        page.open(comparison)
        # In place of the metric that MLflow chose.
        page.click("//*[normalize-space()='Metrics:']/following::*[contains(@class, 'select-selector')][1]")
        page.driver.switch_to.active_element.send_keys(Keys.BACKSPACE, "val/f1", Keys.ENTER, Keys.ESCAPE)
        page.find("//*[contains(@class, 'axis-title')][.='val/f1']")
        save(page, "compare-runs")
        # Notebooks run in their own folder.
        os.environ["MLFLOW_TRACKING_URI"] = (
            SQLITE + str(sqlite_path(store, "STORE")) if store.startswith(SQLITE) else store
        )
        for name in ("attention_selections", "compare_runs"):
            with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
                file.write(shown(NOTEBOOKS / f"{name}.ipynb"))
                file.flush()
                page.open(Path(file.name).as_uri())
                save(page, f"notebook-{name.replace('_', '-')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
