"""Make the screenshots of this folder from the runs of a store: ``docs/screenshots.py STORE EXPERIMENT``."""

# They need what `make setup browser` installs, and are made by:
#   lrsa sweep --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml \
#              --config configs/experiment/quickstart.yaml \
#              --trainer.max_steps 16 --trainer.val_check_interval 16 --validate_first false \
#              --grid model.lrsa.top_k=8,32
#   PYTHONPATH=tests python docs/screenshots.py sqlite:///runs/mlflow.db quickstart

import io
import sys
from pathlib import Path

from browser import HEIGHT, Page, chromium, serving
from PIL import Image
from selenium.webdriver.common.keys import Keys


def save(page: Page, name: str, height: int = HEIGHT) -> None:
    """The upper part of what the page shows now, as a PNG of few colours."""
    shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png()))
    image = shot.convert("RGB").crop((0, 0, shot.width, height))
    image.quantize(128, dither=Image.Dither.NONE).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


def main(store: str, experiment: str) -> None:
    """Save the table, a run's picture and the comparison of the latest experiment."""
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


if __name__ == "__main__":
    main(*sys.argv[1:])
