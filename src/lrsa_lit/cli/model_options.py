"""Options of commands that load a model, and the rule, device and dtype that it runs with."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrsa_lit import plugins
from lrsa_lit.cli.arguments import add_plugins, checked, integer
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.checkpoint_file import SUFFIX
from lrsa_lit.models.rope import LARGEST_FACTOR, RopeScaling
from lrsa_lit.paths import expanded, shipped
from lrsa_lit.terminal import PlainConsole

if TYPE_CHECKING:
    import torch

    from lrsa_lit.attention import LRSAConfig

DEFAULT_MODEL = "configs/model/smollm2.yaml"
"""The shipped file that names the model of a command without ``--model``."""

SOURCES = "a fit's .ckpt, a folder of a model or of adapters, a hub name, a GGUF file, package://…, or tiny"

RULE_FLAGS = ("lag_size", "top_k", "sink_size", "chunk_size")
FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("rope_scaling", "template_arguments", "trust_remote_code", *RULE_FLAGS)
}
"""The options of these commands for arguments of their parts, except those of the model itself."""


def add_rule(parser: argparse.ArgumentParser) -> None:
    """Add the options of the rule, and ``--dense``."""
    add = parser.add_argument
    # LRSAConfig checks the lower bounds.
    rule = "(default: what the model was trained with, else {})"
    add("--lag-size", type=integer(), metavar="L", help=f"tokens of a partition {rule.format('128')}")
    add("--top-k", type=integer(), metavar="K", help=f"tokens kept of each {rule.format('L/4')}")
    add("--sink-size", type=integer(), metavar="S", help=f"first tokens, which are always kept {rule.format('16')}")
    add("--chunk-size", type=integer(), metavar="C", help=f"tokens between compressions {rule.format('L')}")
    add("--dense", action="store_true", help="use dense attention and keep all tokens, for comparison")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how a model is loaded."""
    add = parser.add_argument
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_plugins(parser)
    scaling = checked(_scaling, f"yarn:FACTOR or linear:FACTOR, with a FACTOR from 1 to {LARGEST_FACTOR:,}")
    add("--rope-scaling", type=scaling, metavar="TYPE:FACTOR", help="more positions, such as yarn:4 or linear:2.5")
    template = "arguments of the model's chat template, such as '{\"enable_thinking\": false}'"
    add("--template-arguments", type=checked(_json_object, "a JSON object"), metavar="JSON", help=template)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")


def check_rule(options: argparse.Namespace) -> None:
    """Refuse options of the rule with ``--dense``, which ignores them."""
    if ignored := [name for name in RULE_FLAGS if options.dense and getattr(options, name) is not None]:
        raise UserError(FLAGS[ignored[0]], reason="it is not allowed with --dense, which compresses nothing")


def check_source(option: str, source: str | None) -> None:
    """Refuse, before torch is imported, a checkpoint that does not exist."""
    if source is not None and source.endswith(SUFFIX) and not expanded(option, source).exists():
        raise UserError(option, reason=f"{source} does not exist")


def default_backbone() -> dict[str, Any]:
    """The backbone's settings in the shipped YAML of the default model."""
    import yaml

    settings: dict[str, Any] = yaml.safe_load(shipped(DEFAULT_MODEL).read_text(encoding="utf-8"))["model"]["backbone"]
    return settings


def device_of(options: argparse.Namespace) -> torch.device:
    """The device that the options name, after a test allocation on it."""
    import torch

    count, name = torch.cuda.device_count(), options.device
    try:
        device = torch.device(("cuda" if count else "cpu") if name is None else name)
        torch.empty(1, device=device).item()
    # Each accelerator, and a missing one, raises different exceptions.
    except Exception:
        allowed = f"cpu, or cuda:0 to cuda:{count - 1}" if count else "cpu here"
        raise UserError("--device", name, allowed) from None
    return device


def trained_of(options: argparse.Namespace, device: torch.device) -> Trained:
    """The model that the options name, or the default one, not loaded yet. Plugins are imported first."""
    from lrsa_lit.models import Backbone
    from lrsa_lit.models.sources import trained_model

    plugins.load(options.plugins, ["compressors", "systems"])
    dtype: Any = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    trust = options.trust_remote_code
    if options.model is not None:
        trained = trained_model(options.model, dtype, trust_remote_code=trust)
    else:
        trained = Trained(Backbone(**default_backbone(), dtype=dtype, trust_remote_code=trust), None, None)
    if options.rope_scaling is not None:
        trained = trained._replace(backbone=dataclasses.replace(trained.backbone, rope_scaling=options.rope_scaling))
    if options.template_arguments is not None:
        trained = trained._replace(template_arguments=options.template_arguments)
    return trained


def rule_of(
    trained: Trained, options: argparse.Namespace, notes: PlainConsole, others: Mapping[str, Any] | None = None
) -> LRSAConfig | None:
    """The rule that the model was trained with, or else the defaults with K = L/4, changed by the options.

    Args:
        trained: the model.
        options: those of :func:`add_rule`.
        notes: the console that gets a note if the model was not trained with a rule.
        others: further settings of ``model.lrsa``, which the options override.

    Returns:
        None for ``--dense``.

    Raises:
        UserError: the model's rule or the settings are not valid.
    """
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.attention.unread import check_read

    if options.dense:
        return None
    flags = {name: value for name in RULE_FLAGS if (value := getattr(options, name)) is not None}
    changes = {**(others or {}), **flags}
    if trained.rule is None:
        notes.say(f"{trained.backbone.name} was never trained with LRSA: its answers may be worse than with --dense.")
        rule = LRSAConfig()
    else:
        try:
            rule = LRSAConfig.from_dict(trained.rule)
        except (TypeError, ValueError) as error:
            raise UserError("--model", trained.backbone.source, reason=f"has no valid rule ({error})") from None
    try:
        check_read(changes, rule.system)
        if trained.rule is None and isinstance(lag := changes.get("lag_size", rule.lag_size), int):
            changes = {"top_k": lag // 4} | changes
        return rule.replace(**changes)
    except UserError as error:
        if error.field.partition(".")[0] not in flags and others:
            error.field = f"--rule: {error.field}"
        raise


def loaded(trained: Trained, rule: LRSAConfig | None, device: torch.device) -> Any:
    """The model on a device in evaluation mode, with the rule enabled if there is one."""
    from lrsa_lit.attention import enable

    if rule is not None:
        # Check this before the weights are loaded.
        rule.layers.check(trained.backbone.config.num_hidden_layers)
    model: Any = trained.build().eval().to(device)
    return model if rule is None else enable(model, rule)


def _scaling(text: str) -> RopeScaling:
    kind, _, factor = text.partition(":")
    if kind not in ("yarn", "linear"):
        raise ValueError(kind)
    return RopeScaling("yarn" if kind == "yarn" else "linear", float(factor))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value
