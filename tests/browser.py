"""The MLflow UI of ``lrsa ui`` in headless Chromium."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from cli_helpers import interruptible
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as condition
from selenium.webdriver.support.ui import WebDriverWait

PROGRAMS = ("chromium", "chromedriver")
WIDTH, HEIGHT = 1400, 900
_PATIENCE = 120
"""Seconds: the first page loads 10 MB of script, which two busy cores take their time to run."""


class Page:
    """What a browser shows; each look waits until there is something to see."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self._wait = WebDriverWait(driver, _PATIENCE)

    def open(self, address: str) -> None:
        # Addresses that differ behind the # alone would not load anew.
        self.driver.get("about:blank")
        self.driver.get(address)

    def find(self, xpath: str):
        return self._wait.until(condition.visibility_of_element_located((By.XPATH, xpath)), xpath)

    def gone(self, xpath: str) -> None:
        self._wait.until(condition.invisibility_of_element_located((By.XPATH, xpath)), xpath)

    def click(self, xpath: str) -> None:
        self._wait.until(condition.element_to_be_clickable((By.XPATH, xpath)), xpath).click()

    def close_assistant(self) -> None:
        """Close the chat panel that MLflow shows to a fresh browser."""
        self.click("//*[@data-component-id='mlflow.assistant.chat_panel.close']")

    def compared_param(self, name: str) -> list[str]:
        """A param of each run of a comparison."""
        row = self.find(f"//tr[th[normalize-space()='{name}']]")
        return [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]

    def compared_metric(self, name: str) -> list[str]:
        """A metric of each run of a comparison, whose table is made of boxes at the same height."""
        self._wait.until(condition.presence_of_element_located((By.XPATH, f"//a[@title='Plot chart'][.='{name}']")))
        header = self.driver.find_element(By.XPATH, f"//a[@title='Plot chart'][.='{name}']/..")
        top = re.search(r"\btop: \d+px;", header.get_attribute("style"))[0]
        cells = self.driver.find_elements(By.XPATH, f"//*[@role='grid']//*[contains(@style, '{top}')]/span")
        return [cell.get_attribute("textContent") for cell in cells]


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """Headless, with a fresh profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # A container's /dev/shm is small, and its root has no sandbox.
        for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"user-data-dir={profile}"):
            options.add_argument(f"--{option}")
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            yield Page(driver)
        finally:
            driver.quit()


@contextlib.contextmanager
def serving(store: str, *options: str) -> Iterator[tuple[str, str, str]]:
    """Run ``lrsa ui``; the addresses that it prints are those of the comparison, the table and the latest run."""
    command = [sys.executable, "-m", "lrsa_lit.cli", "ui", "--port", "0", "--no-browser", "--store", store, *options]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        printed = [process.stdout.readline().strip() for _ in range(6)]
        yield printed[1], printed[3], printed[5]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()
