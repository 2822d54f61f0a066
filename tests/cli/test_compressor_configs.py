"""The shipped settings of compressors, in `lrsa fit`."""

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.ops.sparse_attention import LagRelative, RandomTokens, StraightThrough

SHORT = [*DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.max_steps", "1", "--data.init_args.val", "null",
         "--model.lr_scheduler", "null", "--trainer.enable_progress_bar", "false"]  # fmt: skip
SHIPPED = {
    "straight_through": StraightThrough(LagRelative()),
    "straight_through_random": StraightThrough(RandomTokens(), by=LagRelative()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_compressor_trains_and_is_stored(name, tmp_path):
    main(["fit", *SHORT, "--config", f"configs/compressor/{name}.yaml"])
    stored = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["lrsa_lit"]["rule"]
    assert LRSAConfig.from_dict(stored).compressor == SHIPPED[name]


def test_a_score_without_a_gradient_is_refused_in_one_line(capfd):
    given = "{class_path: StraightThrough, init_args: {of: RandomTokens}}"
    line = refusal(capfd, "fit", *SHORT, "--model.lrsa.compressor", given)
    assert line.startswith("model.lrsa.compressor.init_args.by: 'RandomTokens' is not allowed")
