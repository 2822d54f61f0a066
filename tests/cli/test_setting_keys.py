"""The command line names an argument by the key under which it stands, wherever its part complains."""

import pytest
import torch
from cli_helpers import refusal

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.fit_settings import FitSettings
from lrsa_lit.cli.settings_parser import first_user_error
from lrsa_lit.data import HotpotQA
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.ops.sparse_attention import RandomTokens
from lrsa_lit.tasks import LongContextQA, SampledTopK


class Plugin(HotpotQA):
    """A data set of one's own."""

    def __init__(self, colour: str = "red", **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.colour = colour

    def complain(self, field: str) -> None:
        raise UserError(field, 3)


def task(**options):
    return LongContextQA(Backbone("tiny"), **options)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: LRSAConfig(lag_size=1), "model.lrsa.lag_size"),
        (lambda: RandomTokens(seed="a"), "model.lrsa.compressor.init_args.seed"),
        (lambda: LoRA(rank=0), "model.backbone.lora.rank"),
        (lambda: task(max_new_tokens=0), "model.max_new_tokens"),
        (lambda: task(evaluate={"k": {"lag": 1}}), "model.evaluate.k.lag"),
        (lambda: task(train_top_k=SampledTopK((999,))), "model.train_top_k.init_args.choices"),
        (
            lambda: task(optimizer=lambda weights: torch.optim.AdamW(weights, lr=-1)).check_optimizer(),
            "model.optimizer",
        ),
        (lambda: Plugin().complain("colour"), "data.init_args.colour"),
        (lambda: Plugin().complain("limit.train"), "data.init_args.limit.train"),
        (lambda: Plugin().complain("tokenizer"), "model.tokenizer"),
        (lambda: Plugin().complain("x.jsonl, line 3"), "x.jsonl, line 3"),
        (lambda: Plugin().complain("ckpt_path"), "ckpt_path"),
    ],
)
def test_an_argument_is_named_by_its_key(call, key):
    try:
        call()
    except UserError as error:
        wrapped = ValueError("as a parser does")
        wrapped.__cause__ = error
    assert first_user_error(wrapped).field == key
    assert first_user_error(wrapped).field == key, "twice is once"


@pytest.mark.parametrize(
    ("key", "given", "named"),
    [
        ("model.lrsa.system", "{class_path: SnapKV, init_args: {kept: abc}}", "kept: abc is not allowed"),
        ("model.lrsa.compressor", "{class_path: LagRelativeTail, init_args: {tail: abc}}", "tail: abc is not allowed"),
        ("model.lrsa.compressor", "{class_path: LagRelativeTail, init_args: {shade: 1}}", "shade: no such setting"),
        ("model.objective", "{class_path: Distillation, init_args: {positions: abc}}", "positions: abc is not"),
    ],
)
def test_an_argument_of_a_class_of_the_wrong_type_is_named_by_its_key(capfd, key, given, named):
    assert refusal(capfd, "test", "--config", "configs/debug/tiny.yaml", f"--{key}", given).startswith(
        f"{key}.init_args.{named}"
    )


def test_nothing_in_a_list_of_budgets_is_the_rules_k():
    """The shell's list is one, and no path."""
    settings = FitSettings()
    given = settings.given(["--config", "configs/debug/tiny.yaml", "--model.lrsa.head_top_k", "[3,[null,2]]"])
    assert settings.made("model.lrsa", LRSAConfig, given["model"]["lrsa"]).head_top_k == (3, (8, 2))
