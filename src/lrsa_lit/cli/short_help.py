"""``lrsa fit --help``: the project's settings and classes, one line each; and all settings of one of its classes.

All of it is read from the source text, so that help is fast.
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from lrsa_lit.cli import catalogue, source_text
from lrsa_lit.cli.source_text import Setting
from lrsa_lit.cli.task_choice import QUESTION_ANSWERING, TASKS
from lrsa_lit.errors import UserError
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

ALL = "--help-all"
_RUN = {
    "--config FILE, -c FILE": "YAML, may be given several times; later ones win. Shipped files are found from anywhere",
    "--seed_everything N": "the seed of all random numbers",
    "--ckpt_path FILE": 'checkpoint to evaluate or to resume; "last" is the newest good one of the same settings',
    "--task NAME": "the task to train: question_answering or, with its own settings, sentence_retrieval",
    "--plugins MODULE": "one of your modules with data sets, filters, compressors, systems or objectives",
    "--print_config": "print the resolved settings and exit",
}
_OF_FIT = {
    "--validate_first BOOL": "validate before training, so that a fit shows its gain",
    "--best_by SCORE": "validation score that decides the best checkpoint and early stopping: f1, em, recall or loss",
    "--estimate": "estimate a fit's memory and time, and do not start it",
}
_OF_EVALUATION = {
    "--budget SHARE": "use the largest K, or size of a system, whose cache is at most this share of a dense one",
    "--cache_tokens N": "the same limit in tokens",
}
_TRAINER = {
    "accelerator": "cpu, gpu or auto",
    "devices": "number of devices, or a list of their indices",
    "strategy": "how several devices share the work: ddp, or configs/trainer/fsdp.yaml",
    "precision": "bf16-mixed and others; null computes in the dtype of the weights",
    "max_steps": "optimizer steps",
    "max_time": "stop after this time: DD:HH:MM:SS",
    "val_check_interval": "training batches between two validations",
    "accumulate_grad_batches": "batches for each optimizer step",
    "gradient_clip_val": "the largest norm of the gradients",
    "default_root_dir": "the folder of runs: checkpoints, answers and the store",
    "logger": "the logger that records the run; false records nothing",
}
"""Lightning's most used settings, with shorter descriptions than its own."""
_TITLES = {
    "data": "data sets: --data NAME",
    "data.filter": "context filters, which shorten contexts before the model sees them: --data.filter NAME",
    "model.lrsa.compressor": "compressors, which make K pairs of a partition: --model.lrsa.compressor NAME",
    "model.lrsa.system": "systems, which replace the rule: --model.lrsa.system NAME",
    "model.objective": "objectives, which training minimises: --model.objective NAME",
    "trainer.callbacks": "callbacks of this project: --trainer.callbacks+ NAME",
}
_LONGEST = 40
_ABBREVIATED = r"(?<!eq)(?<!et al)"


def answered(command: str, arguments: Sequence[str], task: str = QUESTION_ANSWERING) -> str | None:
    """The help that arguments ask for; None if they ask for none, or if only the full parser can answer."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        if flag in ("-h", "--help"):
            return _of_command(command) if task == QUESTION_ANSWERING else "\n".join(_of_task(command, task)) + "\n"
        slot = flag.removeprefix("--").removesuffix(".help")
        if flag.endswith(".help") and slot in catalogue.SLOTS:
            name = value if assigned else "" if following.startswith("-") else following
            return _of_class(slot, name) if name else "\n".join(_listing(slot)) + "\n"
    return None


def _of_command(command: str) -> str:
    defaults = read_settings(shipped("cli.yaml"))
    return "\n".join(_lines(command, defaults)) + "\n"


def _lines(command: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    own = _OF_EVALUATION if command in ("validate", "test", "predict") else _OF_FIT
    own = catalogue.OF_TOOLS.get(command, own)
    yield f"usage: lrsa {command} --config FILE … [--KEY VALUE …]"
    yield ""
    yield "A run needs a model and a data set. Shipped files name some; later files and flags override them:"
    yield f"  lrsa {command} --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml"
    yield "\nshipped files: configs/FOLDER/NAME.yaml"
    yield from _folders()
    yield "\nthe run"
    yield from _table((_RUN | own).items())
    yield "\nmodel"
    yield from _keys("model.backbone", defaults)
    chosen = ("backbone", "lrsa", "objective")
    yield from _keys("model", defaults, but=chosen)
    yield "\nthe rule"
    yield from _keys("model.lrsa", defaults, but=("compressor", "system"))
    for slot in catalogue.SLOTS:
        yield ""
        yield from _listing(slot)
    yield "\ntrainer (Lightning's most used settings)"
    yield from _table(
        (f"--trainer.{name}", f"{text}{_default(None, defaults['trainer'].get(name))}")
        for name, text in _TRAINER.items()
    )
    yield "\nmore"
    yield from _table(
        {
            f"lrsa {command} --data.help QAFiles": "all settings of a data set; likewise --model.lrsa.compressor.help, "
            "--model.lrsa.system.help, --model.objective.help, --data.filter.help, --trainer.callbacks.help",
            f"lrsa {command} {ALL}": "every option, Lightning's among them",
        }.items()
    )


def _of_task(command: str, task: str) -> Iterator[str]:
    """The help of a task other than question answering."""
    about = TASKS[task]
    defaults = read_settings(shipped(about.defaults))
    yield f"usage: lrsa {command} --task {task} --config configs/model/smollm2.yaml [--KEY VALUE …]"
    yield f"\nthe defaults: {about.defaults}"
    yield "\nmodel"
    yield from _keys("model.backbone", defaults)
    for part, path in (("model", about.model), ("data", about.data)):
        yield f"\n{path}"
        given = catalogue.value_at(defaults, "data.init_args" if part == "data" else part) or {}
        described = {name: each for name, each in catalogue.keys(path).items() if name not in ("backbone", "tokenizer")}
        yield from _table((f"--{part}.{name}", _line_of(each, given.get(name))) for name, each in described.items())
    yield "\nmore"
    yield from _table({f"lrsa {command} --task {task} {ALL}": "every option, Lightning's among them"}.items())


def _listing(slot: str) -> Iterator[str]:
    kind = catalogue.SLOTS[slot]
    yield _TITLES[slot]
    shipped_ones = {name: source_text.find(path) for name, path in catalogue.named(kind).items()}
    about = {name: _first_sentence(found.line) if found else "" for name, found in shipped_ones.items()}
    yield from _table((about | ({} if kind == "callbacks" else catalogue.added(kind))).items())
    if slot == "data":
        yield "  settings of all data sets, as --data.KEY or data.init_args.KEY in YAML:"
        described = catalogue.keys(catalogue.DATA).items()
        yield from _table((f"  {name}", _line_of(each)) for name, each in described)


def _folders() -> Iterator[str]:
    folders: dict[str, list[str]] = {}
    for name in catalogue.configs():
        folder, _, file = name.partition("/")
        folders.setdefault(folder, []).append(file.removesuffix(".yaml"))
    for folder, names in folders.items():
        yield from textwrap.wrap(
            ", ".join(names), _width(), initial_indent=f"  {folder:<12}", subsequent_indent=" " * 14,
            break_on_hyphens=False,
        )  # fmt: skip


def _keys(part: str, defaults: Mapping[str, Any], but: Iterable[str] = ()) -> Iterator[str]:
    """A line for each setting of a part; shipped defaults are shown in place of the code's."""
    for_part = catalogue.keys(str(catalogue.part_of(part))).items()
    yield from _table(
        (f"--{part}.{name}", _line_of(each, catalogue.value_at(defaults, f"{part}.{name}")))
        for name, each in for_part
        if name not in but
    )


def _line_of(setting: Setting, given: Any = None) -> str:
    return f"{_first_sentence(setting.about)}{_default(setting.default, given)}"


def _first_sentence(text: str) -> str:
    return re.split(rf"{_ABBREVIATED}[.;] ", f"{_plain(text)} ")[0].strip()


def _default(written: str | None, given: Any = None) -> str:
    """A setting's default as a table shows it."""
    text = str(given) if isinstance(given, int | float | str) and "$" not in str(given) else _in_yaml(written)
    return "" if text in ("null", "") or len(text) > 12 else f" [{text}]"


def _in_yaml(written: str | None) -> str:
    """A default of the code as YAML would write it, if it is short."""
    plain = {"None": "null", "True": "true", "False": "false"}.get(str(written), written or "")
    return "" if "(" in plain else plain.strip("'\"")


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Names and descriptions; a description is cut to one line, but its default is kept."""
    listed = list(rows)
    column = min(max((len(name) for name, _ in listed), default=0), _LONGEST) + 2
    for name, about in listed:
        default = match[0] if (match := re.search(r" \[[^\]\s]+\]$", about)) else ""
        room = max(_width() - 2 - max(column, len(name) + 2) - len(default), 20)
        text = textwrap.shorten(about.removesuffix(default), room, placeholder=" …")
        yield f"  {f'{name}  ':<{column}}{text}{default}".rstrip()


def _plain(text: str) -> str:
    """Text without Sphinx's markup."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(text.split())).replace("``", "")


def _width() -> int:
    return max(80, min(shutil.get_terminal_size((120, 24)).columns, 120))


def _of_class(slot: str, name: str) -> str | None:
    kind = catalogue.SLOTS[slot]
    path = catalogue.class_of(kind, name)
    if path is None:
        # It is Lightning's, or a plugin's.
        if "." in name or kind == "callbacks" or name in catalogue.added(kind):
            return None
        raise UserError(f"--{slot}.help", name, ", ".join(catalogue.named(kind)))
    found = source_text.find(path)
    about = f"{path}\n\n{_plain_lines(found.about if found else '')}"
    parser = argparse.ArgumentParser(
        prog=f"--{slot} {path.rpartition('.')[2]}", usage=argparse.SUPPRESS, description=about, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=_width()),
    )  # fmt: skip
    group = parser.add_argument_group(f"settings (in YAML they are below {slot}'s init_args)")
    for key, setting in catalogue.keys(path).items():
        if (slot, key) != ("data", "tokenizer"):
            group.add_argument(f"--{slot}.{key}", metavar=_metavar(key, setting), help=_described(setting))
    return parser.format_help()


def _plain_lines(text: str) -> str:
    return "\n\n".join(textwrap.fill(_plain(part), _width()) for part in text.split("\n\n"))


def _metavar(key: str, setting: Setting) -> str:
    if literal := re.match(r"Literal\[(.*?)\]", setting.kind):
        return f"{{{literal[1].replace(' ', '').replace(chr(39), '')}}}"
    return "{true,false}" if setting.kind == "bool" else key.upper()


def _described(setting: Setting) -> str:
    default = "required" if setting.default is None else f"default: {_in_yaml(setting.default) or setting.default}"
    kind = re.sub(r"\bNone\b", "null", setting.kind)
    # Otherwise argparse would read % as a format.
    return f"{_plain(setting.about)} (type: {kind}, {default})".strip().replace("%", "%%")
