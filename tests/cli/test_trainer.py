"""Settings of the trainer that are a count or a share."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from lrsa_lit.cli.trainer import Trainer

SETTINGS = (
    *(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")),
    *("overfit_batches", "val_check_interval", "gradient_clip_val"),
)


@pytest.fixture(scope="module")
def parser():
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_class_arguments(Trainer, "trainer")
    return parser


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("given", ["1", "1.0"])
def test_an_integer_is_a_count_and_a_fraction_a_share(parser, name, given):
    """Which Lightning's own types hold or not by what other packages have imported before."""
    value = parser.parse_args([f"--trainer.{name}", given]).trainer[name]
    assert repr(value) == given


def test_all_of_lightnings_settings_are_known(parser):
    assert {"max_steps", "accelerator", "callbacks", *SETTINGS} <= set(vars(parser.get_defaults().trainer))
