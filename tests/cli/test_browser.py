"""What a user sees of two fits in the MLflow UI, in a real browser."""

import os
import shutil

import pytest
from browser import PROGRAMS, chromium, serving
from cli_helpers import DEBUG, recorded_runs

from lrsa_lit.cli.main import main


@pytest.fixture
def page():
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        problem = f"{' and '.join(missing)} not found; `make browser` installs them where apt-get does"
        pytest.fail(problem) if os.environ.get("LRSA_REQUIRE_BROWSER") else pytest.skip(problem)
    with chromium() as page:
        yield page


@pytest.mark.slow
def test_two_fits_side_by_side(elsewhere, page):
    for lag_size in ("32", "64"):
        main(["fit", *DEBUG, "--model.lrsa.lag_size", lag_size])
    store = elsewhere / "runs/mlflow.db"
    runs = recorded_runs(store, "debug")
    assert [run.data.params["model.lrsa.lag_size"] for run in runs] == ["64", "32"]
    with serving(f"sqlite:///{store}") as (comparison, table, latest):
        page.open(comparison)
        page.find("//*[.='Comparing 2 Runs from 1 Experiment']")
        page.find("//tr[th[.='model.lrsa.top_k']]")
        page.click("//*[@aria-label='Parameters - Show diff only']")
        page.gone("//tr[th[.='model.lrsa.top_k']]")
        assert page.compared_param("model.lrsa.lag_size") == ["64", "32"]
        for name in ("val/f1", "val/loss"):
            assert page.compared_metric(name) == [f"{round(run.data.metrics[name], 3):g}" for run in runs], name

        page.open(table)
        for run in runs:
            page.find(f"//*[@role='row']//a[contains(@href, '{run.info.run_id}')][.='{run.info.run_name}']")
        page.close_assistant()
        for column in ("rule", "kv_ratio", "val/f1"):
            page.find(f"//*[@role='columnheader'][.='{column}']")

        page.click(f"//*[@role='row']//a[.='{runs[0].info.run_name}']")
        # Its scores stand in its page, and lead to their charts.
        page.find("//*[@role='tab'][.='Model metrics']")
        # Though the link does not say so, it is among the pages for training.
        assert "workflowType" not in page.driver.current_url
        page.gone("//*[.='Evaluation runs']")
        page.click("//a[.='val/loss']")
        page.find("//*[@role='tab'][@aria-selected='true'][.='Model metrics']")
        page.click("//*[@role='tab'][.='Artifacts']")
        page.click("//*[@artifact-name='pictures']")
        page.click("//*[@artifact-name='scores.png']")
        page.find("//img[starts-with(@src, 'blob:')]")
        page.click("//*[@artifact-name='config.yaml']")
        page.find("//*[contains(., 'lag_size: 64') and not(*[contains(., 'lag_size: 64')])]")

        assert runs[0].info.run_id in latest
        page.open(latest)
        page.find("//*[@role='tab'][.='Model metrics']")
        page.gone("//*[.='Evaluation runs']")
