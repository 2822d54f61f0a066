"""A causal language model for lm-evaluation-harness, under a rule, under a system, or dense.

Dimensions: B requests, T tokens, A tokens of the longest continuation, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lrsa_lit.attention import LRSACache, cache_argument, enabled_config, graphed_decoding, read_prompts
from lrsa_lit.attention.decoding.turns import left_padded
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lrsa_lit.systems.system import System

_Request = tuple[Any, list[int], list[int]]
"""A request of the harness: the text, the tokens of the context, and those of the continuation."""


class RuledLM(HFLM):
    """The harness's ``hf`` model, with the attention and the cache that are enabled on the model.

    Under a rule, whole sequences are read in one pass, in which each token attends to the same pairs as with a cache.
    Texts are generated from an :class:`~lrsa_lit.attention.LRSACache`. A system that cuts after the prompt has no
    such pass: it reads the context of each request into a cache, cuts, and then reads the continuation.

    Args:
        model: a model with or without LRSA.
        tokenizer: the model's tokenizer.
        batch_size: requests at a time, or ``auto``, as in the harness.
        max_length: maximum number of tokens of a request; None: the model's positions.

    Raises:
        UserError: the system cannot be evaluated by the harness.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
    ) -> None:
        rule = enabled_config(model)
        self.system = None if rule is None else rule.system
        check_system(self.system, batch_size)
        log = logging.getLogger("lm_eval.models.huggingface")
        before = log.level
        try:
            # The harness would warn that the model is not given by name, which is intended here.
            log.setLevel(logging.ERROR)
            super().__init__(
                pretrained=model,  # type: ignore[arg-type]
                tokenizer=tokenizer,  # type: ignore[arg-type]
                backend="causal",
                batch_size=batch_size,
                max_length=max_length,
            )
        finally:
            log.setLevel(before)
        self._ruled = rule is not None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole sequences; padding on the right does not affect the tokens before it."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Generate from prompts (B, T), padded on the left; returns prompts and answers."""
        if not self._ruled:
            return self._generated(context, max_length, stop, **generation_kwargs)
        check_output_type(self.system, "generate_until")
        cache = LRSACache.of(self.model)
        with graphed_decoding(self.model, cache, room=max(max_length - context.shape[1], 1)):
            generation_kwargs |= cache_argument(self.model, cache)
            return self._generated(context, max_length, stop, **generation_kwargs)

    def _generated(self, *given: Any, **generation_kwargs: Any) -> Tensor:
        """Generate as the harness does."""
        tokens: Tensor = super()._model_generate(*given, **generation_kwargs)
        return tokens

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as the harness does; a UserError if no room is left for prompts."""
        try:
            texts: list[str] = super().generate_until(requests, disable_tqdm)
        except AssertionError as error:
            if "max tokens to generate" not in str(error):
                raise
            reason = f"{self.max_length} leaves no room for prompts in addition to what a task generates"
            raise UserError("max_length", reason=reason, hint="generate less by --gen-kwargs max_gen_toks=N") from error
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score texts as the harness does; a UserError if a system needs a prompt."""
        check_output_type(self.system, "loglikelihood_rolling")
        sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether its tokens are the most likely ones."""
        if not _cuts(self.system):
            whole: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return whole
        # Contexts of similar lengths share a batch.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(order), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for chunk in _batched(order, override_bs or self.batch_size):
                asked = [requests[index] for index in chunk]
                answers = self._behind_prompts([request[1:] for request in asked])
                for index, (text, _, _), answer in zip(chunk, asked, answers, strict=True):
                    found[index] = answer
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                progress.update(len(chunk))
        return [found[index] for index in range(len(requests))]

    @torch.no_grad()
    def _behind_prompts(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The same for a batch of contexts and continuations, with a cut after each context."""
        assert self.system is not None
        fitting = [self._fitting(*request) for request in requests]
        wanted = [continuation for _, continuation in fitting]
        prompts, mask = left_padded([context for context, _ in fitting])
        targets = pad_sequence(wanted, batch_first=True)
        real = pad_sequence([torch.ones_like(row) for row in wanted], batch_first=True)
        cache = LRSACache.of(self.model)
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        logits, seen = read_prompts(self.model, cache, prompts, mask, encode=encode)
        parts, count = [logits], targets.shape[1] - 1
        step = 1 if self.system.answers_by_token else max(count, 1)
        # The last token of a shorter continuation predicts nothing, and is fed in place of padding.
        seen = torch.cat([seen, real[:, 1:].to(seen)], dim=1)
        for first in range(0, count, step):
            stop = min(first + step, count)
            given = {"input_ids": targets[:, first:stop], "attention_mask": seen[:, : seen.shape[1] - count + stop]}
            parts.append(self.model(**given, use_cache=True, **cache_argument(self.model, cache)).logits)
        scores = log_softmax(torch.cat(parts, dim=1), dim=-1, dtype=self.softmax_dtype)
        likeliest = scores.argmax(dim=-1)
        return [
            (
                float(row[: len(tokens)].gather(1, tokens[:, None]).sum()),
                bool((best[: len(tokens)] == tokens).all()),
            )
            for row, best, tokens in zip(scores, likeliest, wanted, strict=True)
        ]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        """Both as tensors; a context that is too long loses its first tokens, as in the harness."""
        tokens = (context + continuation)[-(self.max_length + 1) :]
        count = len(continuation)
        if count >= len(tokens):
            reason = f"a continuation has {count} tokens, and the model reads {self.max_length} with their context"
            raise UserError("max_length", reason=reason)
        found = torch.tensor(tokens, device=self.device)
        return found[:-count], found[-count:]


def check_system(system: System | None, batch_size: int | str) -> None:
    """Raise a UserError unless a system can be evaluated on requests with a context and a continuation."""
    if system is None or not _cuts(system):
        return
    if not system.question:
        reason = f"{_name(system)} cuts after the context of a question, but the harness does not say where that ends"
        hint = "with question: true in its init_args, it cuts after the whole prompt, including the question"
        raise UserError("system", reason=reason, hint=hint)
    if not isinstance(batch_size, int):
        raise UserError("batch_size", batch_size, "an integer for a system that cuts after prompts")


def check_output_type(system: System | None, output_type: str) -> None:
    """Raise a UserError if requests of an output type cannot be answered under a system."""
    if output_type == "loglikelihood_rolling" and _cuts(system):
        reason = f"{_name(system)} answers after a prompt, but texts for perplexity have none"
        raise UserError("system", reason=reason, hint="leave out tasks of the type loglikelihood_rolling")
    if output_type == "generate_until" and system is not None and system.repeats_prompt:
        reason = f"{_name(system)} reads prompts twice, but the harness generates after one reading"
        raise UserError("system", reason=reason, hint="evaluate it on multiple choice, or with lrsa compare")


def _cuts(system: System | None) -> bool:
    """Whether the result of a system depends on where the prompt ends."""
    return system is not None and not system.trains


def _name(system: System | None) -> str:
    return type(system).__name__


def _batched(items: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    rest = iter(items)
    while chunk := tuple(itertools.islice(rest, count)):
        yield chunk
