"""The command line: ``lrsa fit|validate|test|predict``, a LightningCLI over the shipped defaults, and lighter tools."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import lrsa_lit
from lrsa_lit import plugins
from lrsa_lit.attention.unread import check_layers
from lrsa_lit.classes import check_class_paths
from lrsa_lit.cli import completion, early_checks, short_help, task_choice
from lrsa_lit.errors import UserError, printable, redacted
from lrsa_lit.paths import check_path, shipped

COMMANDS = {
    "fit": "train, with validation before, during and after",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "answer the test split's questions into a JSONL file",
}
"""Runs of the LightningCLI: one set of options."""

TOOLS = {
    "ask": "answer your questions about a text file of any length",
    "cache": "list or clear what the project keeps in its cache",
    "compare": "hold published systems and the rule against each other, at the same shares of the cache",
    "distil-cache": "keep what a fit's teacher says of the training data, to train on it in any number of epochs",
    "env": "say versions, devices, kernels, caches and extras, for a bug report",
    "eval": "evaluate a model with lm-evaluation-harness, under any rule",
    "export": "write a checkpoint as a folder that transformers loads",
    "input-moments": "measure what keys and values are made of, for latents of low rank that err less",
    "preference-pairs": "rewrite passages, and tell by a model's answers which rewritings a summariser should prefer",
    "schema": "print the JSON schema of the settings, with which editors complete YAML",
    "serve": "answer chats of many readers at once over OpenAI's interface",
    "study": "train and evaluate the rows of a study, part by part",
    "summarise": "write the summaries that the filter Summaries shows in the place of passages",
    "sweep": "fit once for each point of a grid of settings",
    "token-gates": "fit gates of tokens, for the compressor TokenGate, to what KVzip scores",
    "ui": "open the MLflow UI on the recorded runs",
}
"""Commands with options of their own: each is a module of that name with a function ``run``."""

AS_FIT = ("distil-cache", "input-moments", "preference-pairs", "summarise", "token-gates")
"""Tools with the options of a fit."""

HELP = """\
usage: lrsa [-h] [--version] COMMAND [options]

Fine-tune and evaluate LLMs with Lag-Relative Sparse Attention on long-context question answering.

commands:
{commands}

{runs} take:
  --config FILE          YAML, may be given several times; later ones win. A shipped file is found from anywhere:
                         --config configs/model/smollm2.yaml
  --model.lrsa.lag_size L, --model.lrsa.top_k K, --model.lrsa.chunk_size C
                         the rule: tokens of a partition, kept of it, between two compressions
  --model.KEY, --data.KEY, --trainer.KEY, --seed_everything N
                         any other setting of the YAML files
  --ckpt_path FILE       weights to evaluate, or the run to resume; settings stay what you ask for. "last" takes the
                         newest good checkpoint of the same settings, if there is one
  --plugins MODULE       import a module of yours, which adds data sets, compressors, …; may be repeated
  --estimate             say what memory and time a fit will take, and do not start it
  --print_config         print the resolved settings and exit
  --help                 the settings, data sets, compressors, systems and objectives, a line each; --data.help QAFiles
                         has all of a data set's, --help-all every option

{as_fit} take the options of fit. {tools} have options of their own, which --help lists.

examples:
  lrsa fit --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml --model.lrsa.top_k 16
  lrsa ask docs/extending.md "What is a compressor?"
  lrsa ui
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command with the arguments of the command line, those of ``sys.argv`` if there are none.

    Raises:
        SystemExit: code 2 after a one-line message for a user's mistake, code 130 after Ctrl-C, code 143 after SIGTERM,
            code 141 where nobody reads the output any more (``| head``).
    """
    if args is None:
        completion.complete((*COMMANDS, *AS_FIT), [name for name in TOOLS if name not in AS_FIT])
    arguments = list(sys.argv[1:] if args is None else args)
    if sys.stdout is None and arguments[:1] == ["ask"]:
        _fail("stdout: it is closed; it must be open for the answers")
    _open_streams()
    try:
        try:
            _main(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or _writable(sys.stdout):
            raise
        # Python writes out what is left once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(141) from None
        _fail(f"stdout: it cannot be written ({error.strerror})")


def _open_streams() -> None:
    """Replace closed streams by the null device, and let those that are open escape what they cannot encode.

    Without this, the next file to be opened would become stdout, and receive what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        # A missing stdin stays missing: a command that reads it has to say so.
        if getattr(sys, name) is None and name != "stdin":
            setattr(sys, name, open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _writable(stream: TextIO) -> bool:
    """Whether a stream takes one more line, at the end of a failed command's output; one without a file does."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return True
    try:
        os.write(number, b"\n")
    except OSError:
        return False
    return True


def _main(arguments: list[str]) -> None:
    if not sys.stderr.isatty():
        # What transformers and the hub library load and write would fill a log with half a line for each step.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<16} {text}" for name, text in (COMMANDS | TOOLS).items())
        tools = [name for name in TOOLS if name not in AS_FIT]
        print(
            HELP.format(commands=commands, runs=_listed(COMMANDS), as_fit=_listed(AS_FIT), tools=_listed(tools)), end=""
        )
        return
    if arguments[0] == "--version":
        print(f"lrsa-lit {lrsa_lit.__version__}")
        return
    if arguments[0] not in COMMANDS | TOOLS:
        _fail(f"{arguments[0]!r} is no command; there are {', '.join(COMMANDS | TOOLS)}")
    try:
        command, given = arguments[0], arguments[1:]
        if command in TOOLS:
            if command in AS_FIT:
                task_choice.check_is_question_answering(task_of(given), command)
                prepared(command, given)
            importlib.import_module(f"lrsa_lit.cli.{command.replace('-', '_')}").run(given)
            return
        told = prepared(command, given)
        # Lightning and transformers take seconds to import: not before there is something to run.
        home = task_choice.TASKS[task_of(given)].module
        with _importing(home):
            module = importlib.import_module(home)
        module.run(told)
    except UserError as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(_out_of_memory(arguments[0], str(error)))
    except KeyboardInterrupt:
        print("\nlrsa: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def prepared(command: str, arguments: Sequence[str]) -> list[str]:
    """What the LightningCLI is told, once all is checked that can be before Lightning is imported.

    Args:
        command: the run, or a tool with the options of a fit.
        arguments: what follows it on the command line.

    Raises:
        UserError: something in them is wrong.
        SystemExit: code 0, where help was asked for and is printed.
    """
    told = lightning_arguments(command, arguments)
    task = task_of(arguments)
    if (text := short_help.answered(command, arguments, task)) is not None:
        print(text, end="")
        raise SystemExit(0)
    if task == task_choice.QUESTION_ANSWERING:
        early_checks.check(command, arguments, plugins=any(each.startswith("--plugins=") for each in told))
    check_layers(layers_of(arguments))
    return ["--help" if argument == short_help.ALL else argument for argument in told]


@contextlib.contextmanager
def _importing(module: str) -> Iterator[None]:
    """No garbage is looked for among what a module brings along: that would be a fifth of the time of a start."""
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_out_of_memory(error: BaseException) -> bool:
    # By its name: torch takes seconds to import.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _out_of_memory(command: str, error: str) -> str:
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
    remedy = {
        "ask": "shorten the text, or lower --top-k",
        "fit": "lower data.init_args.batch_size or max_tokens, or set model.backbone.gradient_checkpointing; "
        "--estimate tells what a fit needs",
    }.get(command, "lower data.init_args.eval_batch_size or max_tokens")
    return f"the device is out of memory{f' (it was asked for {asked[1]} more)' if asked else ''}; {remedy}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


def lightning_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """What the LightningCLI is told: the command, the shipped defaults, then the user's arguments.

    Config files that are not in the working directory are the shipped ones of that name. Plugins are imported on the
    way: a parser knows only classes that are there when it reads their names.

    Raises:
        UserError: a config file is missing or no YAML, a plugin cannot be loaded, or an argument can have no meaning.
    """
    found = [command, "--config", str(shipped(task_choice.TASKS[task_of(arguments)].defaults))]
    modules: list[str] = []
    previous, rest = "", iter(arguments)
    for argument in rest:
        flag, assigned, value = argument.partition("=")
        if flag not in ("--config", "-c", "--plugins"):
            _check_argument(previous, argument)
            found.append(argument)
        elif not assigned and (value := next(rest, "")) == "":
            raise UserError(flag, reason="it names no module" if flag == "--plugins" else "it names no file")
        elif flag == "--plugins":
            modules += _modules(value)
        else:
            path, settings = _config(value)
            modules += plugins.names_of(settings.get("plugins") or [])
            found += [flag, path]
        previous = argument
    modules = list(dict.fromkeys(modules))
    plugins.load(modules)
    # All of them together; the parser would keep the last list alone.
    return [*found, f"--plugins={json.dumps(modules)}"] if modules else found


def task_of(arguments: Sequence[str]) -> str:
    """The name of the task that a run is of; a UserError if there is none of that name."""
    layers = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        value = value if assigned else following
        if flag in ("--config", "-c") and value:
            layers.append(_config(value)[1])
        elif flag == "--task":
            layers.append({"task": value})
    return task_choice.named(layers)


def layers_of(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The settings of each config file that arguments name, in their order, and last what other flags say of a model.

    What the parser will refuse may be missing.
    """
    import yaml

    files: list[dict[str, Any]] = []
    flags: dict[str, Any] = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        value = value if assigned else following
        if flag in ("--config", "-c"):
            files.append(_config(value)[1])
        elif flag == "--model" or flag.startswith("--model."):
            with contextlib.suppress(yaml.YAMLError):
                _set(flags, flag.removeprefix("--").split("."), yaml.safe_load(value))
    return [*files, flags]


def _set(settings: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Set what is below some names; settings that are there stay, beside those of the value."""
    first, *rest = names
    below = settings.get(first)
    if rest or (isinstance(value, dict) and isinstance(below, dict)):
        # A class by its name may be followed by its arguments.
        inner = settings[first] = below if isinstance(below, dict) else {} if below is None else {"class_path": below}
        for name, item in [(rest[0], value)] if rest else value.items():
            _set(inner, [name, *rest[1:]], item)
    else:
        settings[first] = value


def _modules(value: str) -> list[str]:
    """What a ``--plugins`` names: a module, or a list of them in YAML."""
    import yaml

    try:
        return plugins.names_of(yaml.safe_load(value) if value.startswith("[") else value)
    except yaml.YAMLError:
        raise UserError("--plugins", value, "a module or a list of modules") from None


def _check_argument(previous: str, argument: str) -> None:
    """Refuse a NUL, and what the parser would not be done with or not tell: it takes any value for YAML, or a file."""
    from lrsa_lit.yaml_file import check_bounds

    flag, _, value = argument.partition("=") if argument.startswith("--") else (previous, "", argument)
    key = flag.removeprefix("--")
    if "\0" in argument:
        raise UserError(key, argument, reason="is not allowed (it holds a NUL character)")
    # Most values are short words and numbers.
    if "&" in value or "{" in value or value.count("[") > 50:
        check_bounds(key, value)
    if os.path.exists(value):
        path = Path(value)
        if path.is_fifo():
            raise UserError(key, path, "a file", reason="is a pipe")
        if path.suffix in (".yaml", ".yml"):
            check_bounds(key, path)


def _config(value: str) -> tuple[str, dict[str, Any]]:
    """The path of a config file and what it holds."""
    path = Path(value)
    check_path("--config", path)
    if not path.is_file():
        try:
            path = shipped(value if value.startswith("configs/") else f"configs/{value}")
        except FileNotFoundError:
            reason = "is no file here, nor a shipped one under configs/"
            raise UserError("--config", Path(value), reason=reason) from None
    # The parser, which merges all files, no longer knows in which of them, and where, a mistake stands.
    from lrsa_lit.yaml_file import read_settings

    try:
        settings = read_settings(path)
        check_class_paths("", settings)
    except UserError as error:
        raise UserError("--config", reason=str(error)) from None
    return str(path), settings


def _fail(message: str) -> NoReturn:
    print(f"lrsa: error: {printable(redacted(message))}", file=sys.stderr)
    raise SystemExit(2)
