"""Every code block of README and site runs, or is parsed where it needs what no test has."""

import contextlib
import io
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from code_blocks import PAGES, blocks_of, commands_of, files_of
from plugin_helpers import write_examples

from lrsa_lit.cli import catalogue, fit_tool, sweep
from lrsa_lit.cli.arguments import Parser
from lrsa_lit.cli.ask import command as ask
from lrsa_lit.cli.main import COMMANDS, TOOLS, main
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh")]
LANGUAGES = {"bash", "sh", "python", "yaml", "toml", "json", "text"}
VARIABLES = {name: f"{name.lower()}.ckpt" for name in ("CHECKPOINT", "ENCODER", "FIRST", "SECOND", "SUMMARISER")}
"""What pages leave to the reader, and do not set themselves."""
OTHERS = {
    "cat",
    "curl",
    "docker",
    "export",
    "git",
    "make",
    "pdftotext",
    "pip",
    "pytest",
    "python",
    "ray",
    "source",
    "torchrun",
    ".venv/bin/pre-commit",
}
"""Programs of pages that are none of this project's, or that a test runs elsewhere."""
MODEL = "configs/model/smollm2.yaml"
SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--validate_first=false", "--trainer.logger=false",
         "--model.lrsa.lag_size=32", "--model.lrsa.top_k=8"]  # fmt: skip
"""What keeps a fit of a page within seconds."""


class Understood(BaseException):
    """A command has understood its arguments."""


def ids(blocks):
    return [block.name for block in blocks]


def lrsa_commands(block, variables=VARIABLES):
    """The commands of this project in a shell block, without ``lrsa`` and what runs it on several machines."""
    for words in commands_of(block.text, variables):
        if words[0] == "torchrun":
            words = words[words.index("lrsa") :]
        assert words[0] in {"lrsa", *OTHERS}, f"{block.name}: {words[0]}"
        if words[0] == "lrsa":
            yield words[1:]


def understand(command, *arguments):
    """Have a command check its arguments, and run nothing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if command in COMMANDS:
            with pytest.raises(SystemExit) as stop:
                main([command, *arguments, "--print_config"])
            assert stop.value.code == 0, arguments
        else:
            with pytest.raises(Understood):
                main([command, *arguments])


@pytest.fixture
def only_parsed(monkeypatch):
    """Tools stop where they have read their arguments."""
    parse = Parser.parse_args

    def understood(self, arguments=None, namespace=None):
        parse(self, arguments, namespace)
        # Actions of a parser are parsers as well, whose options are not all of a command's.
        raise Understood

    def fits(cli, told):
        understand("fit", *(each for each in told[3:] if not each.startswith("--plugins=")))
        raise Understood

    def stop(*_):
        raise Understood

    monkeypatch.setattr(Parser, "parse_args", understood)
    monkeypatch.setattr(fit_tool, "run_with", fits)
    monkeypatch.setattr(sweep.Sweep, "run", stop)
    monkeypatch.setattr(ask, "read_text", stop)


def test_all_languages_are_known():
    assert {block.language for block in BLOCKS} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_installs_this_package_from_a_registry(page):
    """It is on none, so anybody could publish another package under its name."""
    assert not re.search(r"pip install (-U )?['\"]?lrsa-lit|pypi\.org/project/lrsa-lit", page.read_text())


PARSED, RUN = ([block for block in SHELL if block.parsed is parsed] for parsed in (True, False))


@pytest.mark.parametrize("block", PARSED, ids=ids(PARSED))
def test_commands_are_understood(block, only_parsed, examples):
    for command, *arguments in lrsa_commands(block):
        assert command in COMMANDS | TOOLS, command
        understand(command, *arguments)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model that a page may call "a/model"."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("block", RUN, ids=ids(RUN))
def test_commands_run(block):
    Path("docs").mkdir()
    for name in ("docs/extending.md", "report.txt"):
        Path(name).write_text("A compressor makes few pairs of many. A data set yields records. Ada signed it.")
    for name, text in files_of(block.text).items():
        Path(name).write_text(text)
    # As if the page's fit, or an earlier one, had just printed it.
    wanted = "$CHECKPOINT" in block.text
    if wanted and "lrsa fit" not in block.text:
        main(["fit", "--config", "configs/debug/tiny.yaml", *SHORT])
    for command, *arguments in lrsa_commands(block, VARIABLES | {"CHECKPOINT": "NEWEST"}):
        if command == "ui":
            continue
        given = [each.replace(MODEL, "configs/debug/tiny.yaml") for each in arguments]
        if "NEWEST" in given:
            given[given.index("NEWEST")] = str(max(Path("runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime))
        if command == "ask":
            given += [] if "--model" in given else ["--model", "tiny"]
            given += ["--max-new-tokens", "4"]
        elif command == "predict":
            given += SHORT[3:4]
        else:
            given += SHORT
        main([command, *given])


PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page, tiny):
    shutil.copytree(tiny, "a/model")
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    if page.name == "extending.md":
        # tests/conformance run these.
        assert len(write_examples(Path.cwd())) == len(blocks)
        return
    names = {}
    for block in blocks:
        code = compile(block.text, block.name, "exec", dont_inherit=True)
        if not block.parsed:
            exec(code, names)
    assert all(block.parsed for block in blocks) or names["output"].shape[0] == 1


DATA = [block for block in BLOCKS if block.language in ("json", "toml", "yaml")]


@pytest.mark.parametrize("block", DATA, ids=ids(DATA))
def test_settings_and_data_are_read(block):
    if block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    else:
        assert yaml.safe_load(block.text)
        if block.parsed:
            return
        Path("page.yaml").write_text(block.text)
        understand("fit", "--config", "configs/debug/tiny.yaml", "--config", "page.yaml")


OF_DATA = {"init_args", "class_path"}.union(*(catalogue.keys(path) for path in catalogue.named("data").values()))
_SETTING = re.compile(r"`(?:--)?((?:model|trainer|data)(?:\.\w+)+)(?!\w|\()")


def unknown_settings(text):
    """The keys in a text's inline code that are no settings; what stands below a chosen class is not looked at."""
    for key in _SETTING.findall(text):
        part, *names = key.replace("data.init_args.", "data.").split(".")
        while names and (part == "data" or catalogue.part_of(part)):
            name, *names = names
            if name not in (OF_DATA if part == "data" else catalogue.keys(catalogue.part_of(part))):
                yield key
            part = f"{part}.{name}"


# The page on classes of one's own has settings of its own.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "extending.md"], ids=lambda page: page.name)
def test_settings_in_the_text_exist(page):
    assert [*unknown_settings(page.read_text(encoding="utf-8"))] == []
