"""``lrsa serve MODEL``: answer chats over OpenAI's interface, on LitServe."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import Parser, called, checked, integer
from lrsa_lit.cli.model_options import (
    FLAGS,
    SOURCES,
    add_loading,
    add_rule,
    check_rule,
    check_source,
    device_of,
    loaded,
    rule_of,
    trained_of,
)
from lrsa_lit.errors import UserError
from lrsa_lit.serving.address import HOSTS, Address, check_free
from lrsa_lit.serving.counts import share_counts
from lrsa_lit.terminal import PlainConsole, log_to

if TYPE_CHECKING:
    import torch

    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.models.checkpoint import Trained
    from lrsa_lit.serving.chat_spec import Front

KEY = "LRSA_API_KEY"
"""The environment variable with the API key that requests must have."""
_NEEDED = ("litserve", "prometheus_client")
_GIB = 1 << 30

EPILOG = f"""\
The server has OpenAI's /v1/chat/completions and /v1/models, /health, which shows whether it is ready, and /metrics for
Prometheus. If {KEY} is set, requests must have that key. After SIGTERM and Ctrl-C, it finishes running answers.

examples:
  lrsa serve last.ckpt
  {KEY}=… lrsa serve exported/ --host 0.0.0.0 --port 8080 --rows 128
"""


@called(dict.fromkeys(("model", "source", "tokenizer"), "MODEL") | FLAGS)
def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or the model is a UserError."""
    options = _parse(arguments)
    check_free(options.host, options.port)
    notes = PlainConsole(stderr=True, soft_wrap=True)
    log_to(notes)
    with share_counts():
        from lrsa_lit.serving.engine import Limits
        from lrsa_lit.serving.lit_server import serve

        devices = _devices(options)
        trained = trained_of(options, devices[0])
        rule = _served(rule_of(trained, options, notes), trained)

        step = options.tokens_per_step or (4096 if devices[0].type == "cuda" else 512)
        limits = Limits(options.rows, *_memory(options, devices[0]), tokens_per_step=step)
        front = _front(trained, rule, options, devices[0])
        address = Address(options.host, options.port, os.environ.get(KEY) or None, options.drain, options.front_ends)
        where = f"http://{options.host}:{options.port}/v1"
        notes.say(f"Serving {front.name} on {', '.join(map(str, devices))}: {where}")
        serve(_Load(options, rule), front, limits, address, [str(device) for device in devices])


@dataclass(frozen=True)
class _Load:
    """Loads the model in a worker."""

    options: argparse.Namespace
    rule: LRSAConfig

    def __call__(self, device: str) -> tuple[Any, frozenset[int]]:
        import torch

        from lrsa_lit.models.generation import stop_tokens

        where = torch.device(device)
        trained = trained_of(self.options, where)
        return loaded(trained, self.rule, where), frozenset(stop_tokens(trained.tokenizer))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("lrsa serve", description="Answer chats over OpenAI's interface.", epilog=EPILOG)
    add, gib = parser.add_argument, checked(_size, "GiB, from 0")
    add("model", metavar="MODEL", help=SOURCES)
    add("--name", help="the model's name for clients (default: the name of the base model)")
    add("--host", default="127.0.0.1", choices=HOSTS, help="default: this machine only")
    add("--port", type=integer(1024, 65535), default=8000, metavar="N", help="default: 8000")
    add("--devices", type=integer(1), metavar="N", help="number of GPUs, one worker on each (default: all)")
    add("--rows", type=integer(1, 4096), default=32, metavar="N", help="answers that a worker decodes together (32)")
    add(
        "--memory",
        type=gib,
        metavar="GIB",
        help="memory for caches of each worker (default: 2, on CUDA half of the free memory)",
    )
    add(
        "--snapshots",
        type=gib,
        metavar="GIB",
        help="memory for snapshots of read texts (default: --memory / 4)",
    )
    add(
        "--max-waiting",
        type=integer(1),
        default=256,
        metavar="N",
        help="requests that may wait; further ones get status 429 (256)",
    )
    add("--max-new-tokens", type=integer(1), default=1024, metavar="N", help="if a request does not set it (1024)")
    step = "tokens of a prompt read between two tokens of other answers (default: 512, on CUDA 4096)"
    add("--tokens-per-step", type=integer(1), metavar="N", help=step)
    add(
        "--drain",
        type=integer(0, 3600),
        default=30,
        metavar="S",
        help="seconds that answers have to finish on exit (30)",
    )
    add("--front-ends", type=integer(1, 64), default=1, metavar="N", help="processes that speak HTTP (1)")
    add_rule(parser)
    add_loading(parser)
    options = parser.parse_args(arguments)
    check_source("MODEL", options.model)
    check_rule(options)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            "lrsa serve", reason=f"needs {missing[0]}, which is not installed; pip install 'lrsa-lit[serve]'"
        )
    return options


def _size(text: str) -> int:
    value = float(text)
    if not 0 <= value < 1 << 20:
        raise ValueError(text)
    return int(value * _GIB)


def _devices(options: argparse.Namespace) -> list[torch.device]:
    import torch

    first = device_of(options)
    if first.type != "cuda" or first.index is not None:
        if options.devices not in (None, 1):
            raise UserError("--devices", options.devices, f"1 for {first}")
        return [first]
    count = torch.cuda.device_count()
    if (options.devices or 1) > count:
        raise UserError("--devices", options.devices, f"from 1 to {count}, the GPUs of this machine")
    return [torch.device("cuda", index) for index in range(options.devices or count)]


def _served(rule: LRSAConfig | None, trained: Trained) -> LRSAConfig:
    """The rule, if it can be served; without a rule, all layers are dense."""
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.serving.engine import check_served

    if rule is None:
        return LRSAConfig(dense_layers=tuple(range(trained.backbone.config.get_text_config().num_hidden_layers)))
    check_served(rule)
    return rule


def _memory(options: argparse.Namespace, device: torch.device) -> tuple[int, int]:
    """Bytes of caches and of snapshots."""
    import torch

    memory = options.memory
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * _GIB
    return memory, memory // 4 if options.snapshots is None else options.snapshots


def _front(trained: Trained, rule: LRSAConfig, options: argparse.Namespace, device: torch.device) -> Front:
    import torch

    from lrsa_lit.serving.chat_spec import Front
    from lrsa_lit.serving.memory import PastBytes

    config, graphed = trained.backbone.config, device.type == "cuda"
    rule.layers.check(config.get_text_config().num_hidden_layers)
    itemsize = getattr(torch, trained.backbone.dtype).itemsize
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    past_bytes, name = PastBytes(rule, config, itemsize), options.name or trained.backbone.name
    return Front(name, trained.tokenizer, positions, options.max_new_tokens, past_bytes, graphed, options.max_waiting)
