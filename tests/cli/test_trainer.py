"""Settings of the trainer that are a count or a share."""

import pytest
from cli_helpers import DEBUG
from lightning.pytorch.cli import LightningArgumentParser

from lrsa_lit.cli.fit_settings import FitSettings
from lrsa_lit.lightning_internals import counts_before_shares

SETTINGS = (
    *(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")),
    *("overfit_batches", "val_check_interval", "gradient_clip_val"),
)


@pytest.fixture(scope="module")
def settings():
    return FitSettings()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("given", ["1", "1.0"])
def test_an_integer_is_a_count_and_a_fraction_a_share(settings, name, given):
    assert repr(settings.given([*DEBUG, f"--trainer.{name}", given], defaults=True)["trainer"][name]) == given


def test_whatever_other_packages_have_imported_before():
    parser = LightningArgumentParser()
    parser.add_argument("--limit", type=float | int | None)
    assert repr(parser.parse_args(["--limit", "1"]).limit) == "1.0"
    counts_before_shares(parser)
    assert repr(parser.parse_args(["--limit", "1"]).limit) == "1"
