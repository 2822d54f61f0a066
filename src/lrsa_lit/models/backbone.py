"""A base LLM and its tokenizer, from a few lines of YAML."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.models.loading import from_config, load_model, pretrained
from lrsa_lit.models.low_rank import FACTOR_FILE, LowRank
from lrsa_lit.models.rope import RopeScaling
from lrsa_lit.paths import PACKAGE_SCHEME, expanded, resolve

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lrsa_lit.systems.system import Head

TINY = "tiny"
"""The source of a tiny random Llama, for tests and dry runs."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file that peft writes beside adapters."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters (arXiv 2106.09685, through peft) instead of all weights.

    Args:
        rank: inner dimension of the adapters.
        alpha: scaling; the adapters' output is multiplied by alpha / rank.
        dropout: dropout rate at the adapters' input.
        target_modules: layers to adapt, as in peft; "all-linear" means every linear layer except the head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("rank", self.rank, "an integer >= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError("dropout", self.dropout, "in [0, 1)")


@dataclass(eq=False)
class Backbone:
    """The base LLM and the form in which it is trained. Nothing is loaded until it is needed.

    Args:
        source: a model folder, a hub name, a GGUF file (a path, or package://DISTRIBUTION/FILE for one inside an
            installed package; converted once into the cache), or "tiny" for a tiny random Llama.
        sha256: expected SHA-256 of a GGUF file; null skips the check.
        dtype: dtype of the weights. Float32 is 3x faster than bfloat16 on most CPUs.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        lora: train only LoRA adapters; null trains all weights.
        compile_layers: compile each decoder layer with torch.compile for training; evaluation stays eager.
        quantization: "nf4" stores the frozen weights under the adapters in 4 bits (QLoRA, arXiv 2305.14314; needs
            bitsandbytes, the extra qlora); null stores them in ``dtype``.
        trust_remote_code: run code that comes with a hub model.
        rope_scaling: scale rotary positions, so that the model has more of them; null keeps the model's positions.
        low_rank: compute keys and values from latents of a lower rank; null keeps the source's projections.
        random_weights: read only the shape from the source's config.json and draw random weights, the same each time
            on the same kind of device. For measurements. Without tokenizer files, tiny's byte tokenizer is used.
    """

    source: str
    sha256: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    compile_layers: bool = False
    quantization: Literal["nf4"] | None = None
    trust_remote_code: bool = False
    rope_scaling: RopeScaling | None = None
    low_rank: LowRank | None = None
    random_weights: bool = False

    def __post_init__(self) -> None:
        """Check that quantization fits the other settings and that bitsandbytes is installed."""
        if self.quantization is None:
            return
        reason = ""
        if self.lora is None:
            reason = "is not allowed without lora, because 4-bit weights cannot be trained"
        elif self.is_random:
            reason = "is not allowed with random weights"
        elif importlib.util.find_spec("bitsandbytes") is None:
            reason = "needs bitsandbytes, which is not installed; pip install 'lrsa-lit[qlora]'"
        if reason:
            raise UserError("quantization", self.quantization, reason=reason)

    @property
    def is_random(self) -> bool:
        """Whether its weights are random instead of loaded."""
        return self.source == TINY or self.random_weights

    @property
    def name(self) -> str:
        """A short readable name, for run names."""
        return self.source.removeprefix(PACKAGE_SCHEME).rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a pad token; a UserError if it has no chat template or more tokens than the model."""
        from transformers import AutoTokenizer

        from lrsa_lit.models.tiny import tiny_tokenizer

        if self.source == TINY:
            return tiny_tokenizer()
        folder = Path(self.location)
        if self.random_weights and folder.is_dir() and not any(folder.glob("tokenizer*")):
            return tiny_tokenizer()
        tokenizer: PreTrainedTokenizerBase = self._pretrained(AutoTokenizer)
        if tokenizer.chat_template is None:
            raise UserError("source", self.source, reason="has no chat template; use an instruction-tuned model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # vocab_size leaves out added tokens, such as an image placeholder, which may lie beyond the embeddings.
        rows = getattr(self.config, "vocab_size", None)
        if rows is not None and tokenizer.vocab_size > rows:
            reason = f"has a tokenizer of {tokenizer.vocab_size} tokens, but a config.json with a vocab_size of {rows}"
            raise UserError("source", self.source, reason=reason)
        return tokenizer

    @functools.cached_property
    def location(self) -> str:
        """The argument for ``from_pretrained``: a folder (for a GGUF file its converted copy), or a hub name."""
        if self.source.startswith(PACKAGE_SCHEME) or self.source.endswith(".gguf"):
            from lrsa_lit.models.gguf import converted

            return str(converted(resolve(self.source, self.sha256, "source"), self.sha256))
        path = expanded("source", self.source)
        if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
            allowed = "a whole model, such as `lrsa export` writes without --adapters"
            raise UserError("source", self.source, allowed, reason="holds only adapters")
        if path.is_dir():
            return str(path)
        if self.source.startswith((".", "/", "~")):
            allowed = f"a folder, a hub name, a GGUF file, package://…, or {TINY}"
            raise UserError("source", self.source, allowed, reason="is not a folder")
        return self.source

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The text model's config, read without the weights, with ``rope_scaling`` applied."""
        return self._whole_config.get_text_config()

    @functools.cached_property
    def _whole_config(self) -> PreTrainedConfig:
        """The config of the whole model, which may contain the text model's config as a part."""
        from transformers import AutoConfig

        from lrsa_lit.models.tiny import tiny_config

        config: PreTrainedConfig = tiny_config() if self.source == TINY else self._pretrained(AutoConfig)
        if self.rope_scaling is not None:
            self.rope_scaling.apply(config.get_text_config())
        return config

    @property
    def head(self) -> Head:
        """The sizes from which budgets compute the bytes of a key-value head."""
        import torch

        from lrsa_lit.attention import head_of
        from lrsa_lit.attention.budgets import heads_of
        from lrsa_lit.models import factor_file

        config, itemsize = self.config, getattr(torch, self.dtype).itemsize
        head = head_of(config, itemsize)
        if self.low_rank is not None:
            return dataclasses.replace(head, latent=self.low_rank.latent_bytes(config, itemsize))
        if not self.has_factors:
            return head
        sizes = heads_of(config), config.num_hidden_layers, head.pair, itemsize
        return dataclasses.replace(head, latent=factor_file.latent_bytes(Path(self.location), *sizes))

    def build(self, *, dequantize: bool = False, factors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Load a ``PreTrainedModel`` in training mode, or a ``PeftModel`` around it; a UserError if that fails.

        Args:
            dequantize: convert quantised weights back to ``dtype``; they keep their rounded values.
            factors: trained low-rank factors of keys and values, by their names in the model. The source's weights are
                then not factored again. With None, :meth:`narrow` decides.
        """
        model = self._load()
        if dequantize and self.quantization is not None:
            model = model.dequantize(dtype=model.dtype)
        self.narrow(model, factors)
        # from_pretrained returns eval mode and Lightning keeps it, which silently turns gradient checkpointing off.
        model.train()
        if self.gradient_checkpointing and not self.compile_layers:
            # transformers 5.2x renamed it; both take checkpoint()'s keywords first.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if self.gradient_checkpointing:
            # The cache does not work with recomputation; generation enables the cache itself.
            model.config.use_cache = False
        trained = model if self.lora is None else _with_adapters(model, self.lora)
        if self.compile_layers:
            _compile_layers(trained, self.gradient_checkpointing)
        return trained

    def check_low_rank(self) -> None:
        """Raise a UserError if the model cannot be factored as ``low_rank`` says, before its weights are read."""
        if self.low_rank is None:
            return
        if self.has_factors:
            hint = "leave low_rank out, or use the original model"
            raise UserError("low_rank", self.source, reason="has low-rank factors already", hint=hint)
        self.low_rank.check(self.config)

    @property
    def has_factors(self) -> bool:
        """Whether the source is a folder with low-rank factors of keys and values, as an export writes them."""
        return not self.is_random and (Path(self.location) / FACTOR_FILE).is_file()

    def narrow(self, model: PreTrainedModel, factors: Mapping[str, Tensor] | None = None) -> None:
        """Replace a model's key and value projections by low-rank factors, if it should have any.

        The factors are the given ones, those computed according to ``low_rank``, or those in the source's folder.
        """
        if not factors and self.low_rank is None and not self.has_factors:
            return
        from lrsa_lit.models import factor_file, whitening
        from lrsa_lit.models.factors import factor, install

        if factors:
            install(model, factors)
        elif self.low_rank is not None:
            self.check_low_rank()
            file = self.low_rank.moments_file()
            factor(model, self.low_rank, None if file is None else whitening.read(file))
        else:
            install(model, factor_file.read(Path(self.location)), of_these=True)

    def _load(self) -> PreTrainedModel:
        import torch

        config, dtype = copy.deepcopy(self._whole_config), getattr(torch, self.dtype)
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        if self.is_random:
            # Lightning makes the training device the default; drawing a large model on a CPU would take minutes.
            device = torch.get_default_device()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                return from_config(config, self.source, **options)
        if self.quantization is not None:
            from transformers import BitsAndBytesConfig

            # With the paper's double quantisation.
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
        model: PreTrainedModel = load_model(self.location, self.source, config=config, **options)
        _log.info("%s: %.0f M parameters, %s", self.name, model.num_parameters() / 1e6, self.dtype)
        return model

    def _pretrained(self, auto_class: Any) -> Any:
        return pretrained(auto_class, self.location, self.source, trust_remote_code=self.trust_remote_code)


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a causal language model, in order, with or without peft's wrapper."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _compile_layers(model: nn.Module, checkpointing: bool) -> None:
    """Compile layer by layer: all layers share one compilation, and code that waits for the GPU stays outside.

    Gradient checkpointing wraps the compiled layer. Transformers' own checkpointing would be inside it, where an
    attention that cannot be traced must not break the graph.
    """
    import torch._dynamo

    # There are many variants: with a rule, dense, dense without gradients for a teacher, each with one row, several
    # rows or packed ones. Beyond the default limit of 8, torch would run new variants uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in decoder_layers(model):
        # Compile the class's method, not the layer's, because a copy of the model must run its own layers.
        compiled = torch.compile(type(layer).forward)
        layer.forward = functools.partial(_run_compiled, compiled, checkpointing, layer)


def _run_compiled(
    compiled: Callable[..., Any], checkpointing: bool, layer: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    if checkpointing and layer.training and torch.is_grad_enabled():
        return checkpoint(compiled, layer, *args, use_reentrant=False, **kwargs)
    return compiled(layer, *args, **kwargs)


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled layers eagerly, for evaluation, whose lengths, rules and caches change all the time."""
    import torch

    return cast("AbstractContextManager[None]", torch.compiler.set_stance("force_eager"))


def _with_adapters(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    import peft

    # Adapters need a gradient at their input even if the embeddings are frozen.
    model.enable_input_require_grads()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        adapted: nn.Module = peft.get_peft_model(model, config)
    except (ValueError, re.error) as error:
        reason = f"is not allowed: {message_of(error)}"
        raise UserError("lora.target_modules", lora.target_modules, reason=reason) from error
    return adapted
