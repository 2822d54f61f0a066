"""What devices that share rows are not asked for: one line each, before anything is written."""

import pytest
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.objectives import AnswerLoss, OddsRatio, Sum
from lrsa_lit.systems import FreqKV
from lrsa_lit.tasks.shared_batch import check_shareable

FIT = ["fit", *DEBUG, *NO_LOGGER, "--config", "configs/trainer/context_parallel.yaml", "--trainer.accelerator", "cpu"]
CONTEXT = "trainer.strategy.init_args.context"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.devices", "1"], [f"{CONTEXT}: 2 is not allowed", "a divisor of 1, the number of devices"]),
        ([f"--{CONTEXT}", "0"], ["context", "an integer >= 1"]),
        (["--model.lrsa.lag_size", "1024"], [f"{CONTEXT}: 2", "devices need rows of 4096 tokens, two partitions each"]),
        (["--data.init_args.packing", "{tokens: 1000}", "--model.lrsa.lag_size", "512"],
         [f"{CONTEXT}: 2", "data.init_args.packing.tokens is 1000"]),
        (["--model.lrsa.system", "FreqKV"], [f"{CONTEXT}: FreqKV selects from the keys of all devices"]),
    ],
    ids=["no divisor", "none", "short rows", "short packed rows", "a system"],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(options, told, tmp_path, capfd):
    line = refusal(capfd, *FIT, "--trainer.devices", "2", "--trainer.default_root_dir", "runs", *options)
    for each in told:
        assert each in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rule", "objective", "rope", "told"),
    [
        (LRSAConfig(system=FreqKV()), AnswerLoss(), "default", "FreqKV selects"),
        (None, Sum([AnswerLoss(), OddsRatio()]), "default", "OddsRatio compares whole answers"),
        (LRSAConfig(), AnswerLoss(), "dynamic", r"rotary positions \(dynamic\)"),
    ],
)
def test_what_needs_whole_rows_is_refused(rule, objective, rope, told):
    model = tiny_model().config
    check_shareable(LRSAConfig(), AnswerLoss(), model)
    model.rope_parameters = {**model.rope_parameters, "rope_type": rope}
    with pytest.raises(UserError, match=told):
        check_shareable(rule, objective, model)
