"""An empty argument, as of a shell's variable that is not set, is refused by its name: no current folder is meant."""

import pytest
from cli_helpers import DEBUG, refusal


def cases():
    yield "CKPT", ["export", "", "--out", "x"]
    yield "CKPT", ["export", " ", "--out", "x"]
    yield "--out", ["export", "x.ckpt", "--out", ""]
    yield "--store", ["export", "x.ckpt", "--out", "x", "--card", "--store="]
    yield "--plugins", ["export", "x.ckpt", "--out", "x", "--plugins", ""]
    yield "FILE", ["ask", "", "Why?"]
    yield "--model", ["ask", "--model", "", "x.txt", "Why?"]
    yield "--cache", ["ask", "--cache", "", "x.txt", "Why?"]
    yield "--device", ["ask", "--device", "", "x.txt", "Why?"]
    yield "MODEL", ["serve", ""]
    yield "--name", ["serve", "tiny", "--name", ""]
    yield "MODEL", ["eval", "", "--tasks", "x"]
    yield "--tasks", ["eval", "tiny", "--tasks", "x", ""]
    yield "--model", ["compare", "--model", "", "--data", "x"]
    yield "--to", ["compare", "--model", "x", "--data", "x", "--to", ""]
    yield "--checkpoint", ["compare", "--model", "x", "--data", "x", "--checkpoint", ""]
    yield "study", ["study", "run", "", "--part", "x"]
    yield "--store", ["ui", "--store", ""]
    yield "--experiment", ["ui", "--experiment", ""]
    yield "NAME", ["cache", "clear", ""]
    yield "--plugins", ["schema", "--plugins", ""]
    yield "--to", ["token-gates", "--to", ""]
    yield "--to", ["input-moments", "--to", ""]
    yield "--judge", ["preference-pairs", "--judge", ""]
    yield "--writer", ["summarise", "--writer", ""]
    for command in ("fit", "validate", "test", "predict", "distil-cache"):
        yield "--config", [command, "--config", ""]
        yield "--plugins", [command, *DEBUG, "--plugins="]
        yield "--model.backbone.source", [command, *DEBUG, "--model.backbone.source", ""]
        yield "--trainer.default_root_dir", [command, *DEBUG, "--trainer.default_root_dir", " "]
    yield "--model.backbone.source", ["sweep", *DEBUG, "--grid", "model.lrsa.top_k=2,3", "--model.backbone.source", ""]
    yield "--ckpt_path", ["test", *DEBUG, "--ckpt_path", ""]
    yield "--data.init_args.train", ["fit", *DEBUG, "--data.init_args.train="]
    yield "--model.start_from", ["fit", *DEBUG, "--model.start_from", ""]


@pytest.mark.parametrize(
    ("name", "arguments"), cases(), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_an_empty_argument_is_named(name, arguments, capfd, tmp_path):
    line = refusal(capfd, *arguments)
    assert line.startswith((f"{name}: it is empty", f"{name}: it names no")), line
    assert not list(tmp_path.iterdir())
