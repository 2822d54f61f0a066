"""The model card of an exported folder: what it was trained from, under what, on what, its scores, how to load it."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lrsa_lit.attention import LRSAConfig, cache_share
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.generation_code import FOLDER, INSTALL
from lrsa_lit.paths import PACKAGE_SCHEME
from lrsa_lit.plugins import flags_of
from lrsa_lit.tracking.run_facts import RunFacts

_LENGTHS = (1024, 4096, 16384, 65536)
_PAPER = "[arXiv 2506.11498](https://arxiv.org/abs/2506.11498)"


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        trained: the model.
        name: what it is called: the folder, or ORG/NAME.
        facts: what the store knows of the run; None if it knows nothing.
        license: an identifier of the hub, such as apache-2.0; None where nobody has said.
        adapters: whether the folder holds adapters alone.
        plugins: modules with classes of the rule that are not in this package.
    """

    trained: Trained
    name: str
    facts: RunFacts | None = None
    license: str | None = None
    adapters: bool = False
    plugins: tuple[str, ...] = ()

    @property
    def rule(self) -> LRSAConfig | None:
        """What the model was trained under; None for dense attention."""
        return None if self.trained.rule is None else LRSAConfig.from_dict(self.trained.rule)

    def text(self) -> str:
        """The card in Markdown, with the metadata that the hub reads in front."""
        parts = [self._head(), self._training(), *self._scores(), self._loading(), self._license()]
        metadata = yaml.safe_dump(self.metadata(), sort_keys=False, allow_unicode=True)
        return f"---\n{metadata}---\n\n" + "\n".join(parts)

    def metadata(self) -> dict[str, object]:
        """What the hub reads."""
        base = _hub_name(self.trained.backbone.source)
        found: dict[str, object] = {
            "library_name": "peft" if self.adapters else "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["lrsa", "sparse-attention", "kv-cache", "long-context"],
        }
        if self.license is not None:
            found["license"] = self.license
        if base is not None:
            found["base_model"] = base
            found["base_model_relation"] = "adapter" if self.adapters else "finetune"
        return found

    def _head(self) -> str:
        kind = "LoRA adapters" if self.adapters else "A language model"
        rule = self.rule
        title = f"# {self.name.rpartition('/')[2]}\n\n{kind}, fine-tuned from `{self._base}`"
        if rule is None:
            return f"{title} with dense attention, by lrsa-lit.\n"
        if rule.system is not None:
            return f"{title} under the KV-cache system {type(rule.system).__name__}.\n"
        return (
            f"{title} with Lag-Relative Sparse Attention ({_PAPER}). "
            f"While it reads, it keeps {rule.top_k} of every {rule.lag_size} tokens in its KV cache.\n"
        )

    @property
    def _base(self) -> str:
        source = self.trained.backbone.source
        path = Path(source).expanduser()
        return path.name if path.exists() else source

    def _training(self) -> str:
        rule, backbone = self.rule, self.trained.backbone
        lines = ["## Training\n", "| | |", "|---|---|", f"| base model | `{self._base}` |"]
        lora = backbone.lora
        trained = "all weights" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha}"
        merged = "" if lora is None or self.adapters else ", merged into the weights"
        lines.append(f"| trained | {trained}{merged} |")
        if backbone.rope_scaling is not None:
            scaling = backbone.rope_scaling
            lines.append(f"| positions | scaled by {scaling.factor:g} ({scaling.rope_type}) |")
        if rule is not None:
            lines += [f"| {name} | {value} |" for name, value in _rule_rows(rule)]
            lines += [f"| {name} | {value} |" for name, value in self._shares(rule)]
        if self.facts is None:
            lines.append("| run | no store knows it |")
            return "\n".join(lines) + "\n"
        lines.append(f"| run | {self.facts.name} (`{self.facts.run_id}`) |")
        if self.facts.commit is not None:
            lines.append(f"| code | commit `{self.facts.commit[:12]}` of lrsa-lit |")
        lines += [
            f"| data | {name}, digest `{digest}`{_counted(profile)} |" for name, digest, profile in self.facts.data
        ]
        return "\n".join(lines) + "\n"

    def _shares(self, rule: LRSAConfig) -> Iterator[tuple[str, str]]:
        """The bytes of the cache as shares of a dense one, where they have a closed form."""
        backbone = self.trained.backbone
        for tokens in _LENGTHS:
            with contextlib.suppress(UserError):
                share = cache_share(rule, tokens, backbone.config.num_hidden_layers, backbone.head)
                yield f"cache at {tokens:,} tokens", f"{share:.1%} of a dense one"

    def _scores(self) -> Iterator[str]:
        scores = [] if self.facts is None else self.facts.scores
        if not scores:
            yield "## Scores\n\nNone are recorded.\n"
            return
        lines = ["## Scores\n", "| score | value | rule of the run | run |", "|---|---|---|---|"]
        lines += [f"| {each.name} | {each.value:.4f} | {each.rule} | {each.run} |" for each in scores]
        lines.append(
            "\n`val/` and `test/` score answers to the questions of the data. A further name is a task, or another"
        )
        lines.append(
            "attention of the same weights, such as `dense`. `eval/` are tasks of lm-evaluation-harness. Scores of"
        )
        lines.append("the training run are those of its last validation.\n")
        yield "\n".join(lines)

    def _loading(self) -> str:
        ask = ["lrsa", "ask", *flags_of(self.plugins), "--model", self.name, "report.txt", "What is the main result?"]
        lines = ["## How to load it\n", f"With lrsa-lit ({INSTALL}):\n", "```bash", shlex.join(ask), "```\n"]
        if self.plugins:
            names = ", ".join(f"`{name}`" for name in self.plugins)
            lines.append(f"The rule uses classes of {names}, which must be importable.\n")
        if self.adapters:
            lines += ["The adapters alone, with `peft`:\n", *_code(
                "from peft import AutoPeftModelForCausalLM", "",
                f'model = AutoPeftModelForCausalLM.from_pretrained("{self.name}")',
            )]  # fmt: skip
            if self.rule is not None:
                lines.append("They then attend densely; the rule is in `lrsa.json`.\n")
            return "\n".join(lines)
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained("{self.name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{self.name}")',
            'message = [{"role": "user", "content": "…"}]',
            'inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
        ]  # fmt: skip
        if self.rule is None:
            return "\n".join([*lines, "Without it, as any other model:\n", *_code(*load, "model.generate(**inputs)")])
        call = f'model.generate(**inputs, custom_generate="{self.name}", trust_remote_code=True, max_new_tokens=128)'
        lines += [f"In `transformers`, where `{FOLDER}/generate.py` decodes under the rule through lrsa-lit:\n"]
        lines += _code(*(f"import {name}" for name in self.plugins), *load, call)
        lines += ["Without lrsa-lit the same model attends densely, and keeps its whole cache:\n"]
        lines += _code("model.generate(**inputs, max_new_tokens=128)")
        return "\n".join(lines)

    def _license(self) -> str:
        if self.license is None:
            unknown = "This card does not know them."
            return f"## Licence\n\nThe licences of `{self._base}` and of the training data apply. {unknown}\n"
        return f"## Licence\n\n{self.license}\n"


def license_of(source: str) -> str | None:
    """The licence in the card of a base model that is a folder; None where there is none."""
    path = Path(source).expanduser() / "README.md"
    if not path.is_file():
        return None
    from huggingface_hub import ModelCard

    with contextlib.suppress(ValueError, OSError, yaml.YAMLError):
        found = ModelCard.load(path).data.license
        return found if isinstance(found, str) else None
    return None


def _hub_name(source: str) -> str | None:
    """The name of a base model that is on the hub; None for files of any kind."""
    if source.startswith(PACKAGE_SCHEME) or source.endswith(".gguf") or Path(source).expanduser().exists():
        return None
    return source if source.count("/") == 1 else None


def _rule_rows(rule: LRSAConfig) -> Iterator[tuple[str, object]]:
    if rule.system is not None:
        settings = rule.system.to_dict()
        shown = {name: value for name, value in settings["init_args"].items() if len(str(value)) < 40}
        yield "system", f"{type(rule.system).__name__} `{json.dumps(shown)}`"
    else:
        sizes = f"L = {rule.lag_size}, K = {rule.top_k}, sinks {rule.sink_size}"
        yield "rule", f"{sizes}, chunks of {rule.chunk_size or rule.lag_size}"
        yield "compressor", type(rule.compressor).__name__
        if rule.head_top_k is not None:
            yield "K", "differs between layers or heads; see config.json"
    if rule.dense_layers:
        yield "dense layers", ", ".join(map(str, rule.dense_layers))


def _counted(profile: str) -> str:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        kept = json.loads(profile).get("kept")
        return f", {kept:,} examples" if isinstance(kept, int) else ""
    return ""


def _code(*lines: str) -> Sequence[str]:
    return ["```python", *lines, "```\n"]
