"""Read and check requests of OpenAI clients to ``/v1/chat/completions``. Errors name unsupported fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrsa_lit.serving.api_error import ApiError

_ONLY: dict[str, Sequence[Any]] = {
    "audio": [],
    "frequency_penalty": [0],
    "function_call": ["none"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "presence_penalty": [0],
    "reasoning_effort": [],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "verbosity": [],
    "web_search_options": [],
}
"""Unsupported fields of the specification, and the values that are accepted because they change nothing."""
_NOTES = ("metadata", "prompt_cache_key", "safety_identifier", "user")
"""Fields about the client that do not affect the answer."""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any


class ChatRequest(BaseModel):
    """A request for a chat completion, with OpenAI's value ranges.

    Attributes:
        model: the name of the model.
        messages: the conversation.
        max_tokens: the most tokens per answer.
        max_completion_tokens: the newer name of ``max_tokens``.
        temperature: 0 takes the most likely token.
        top_p: draw from the most likely tokens whose probabilities sum up to this share.
        seed: the seed of the draws.
        n: the number of answers.
        stop: an answer ends before the first of these texts.
        stream: send tokens as they are generated.
        stream_options: ``include_usage`` sends the usage at the end of a stream.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Messages with a role and a text. The role "developer" becomes "system"."""
        role = {"developer": "system"}
        return [
            {"role": role.get(message.role, message.role), "content": _text_of(message.content, number)}
            for number, message in enumerate(self.messages)
        ]


def read_request(body: bytes) -> ChatRequest:
    """Read and check the body of a request.

    Raises:
        ApiError: the body is not valid JSON, a value is not allowed, or a field is unknown or not supported.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(f"the body is not valid JSON: {first['msg']}", code="invalid_json") from None
        raise ApiError(f"{(param := _param(first['loc'])) or 'the body'}: {first['msg']}", param) from None
    for name, value in (request.model_extra or {}).items():
        if name in _NOTES or value is None:
            continue
        if name not in _ONLY:
            raise ApiError(f"{name}: there is no such field", name, code="unknown_parameter")
        if value not in _ONLY[name]:
            raise ApiError(f"{name} is not supported by this server; leave it out", name, code="unsupported_parameter")
    for number, message in enumerate(request.messages):
        for name, value in (message.model_extra or {}).items():
            if value not in (None, []):
                param = f"messages[{number}].{name}"
                raise ApiError(f"{param} is not supported by this server", param, code="unsupported_parameter")
    if len(request.stops) > 4 or not all(request.stops):
        raise ApiError("stop: up to 4 texts are allowed, none of them empty", "stop")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError("max_tokens is not allowed with max_completion_tokens, its newer name", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is allowed only with stream: true", "stream_options")
    assert request.conversation
    return request


def _text_of(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    param = f"messages[{number}].content"
    if not isinstance(content, list) or not content:
        raise ApiError(f"{param}: it must be a text, or a list of parts of the type text", param)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text":
            where = f"{param}[{place}]"
            message = f"{where}: parts of the type {kind!r} are not supported by this server; only text is"
            raise ApiError(message, where, code="unsupported_content")
        if not isinstance(text, str):
            raise ApiError(f"{param}[{place}].text: it must be a text", f"{param}[{place}].text")
        texts.append(text)
    return "".join(texts)


def _param(place: tuple[int | str, ...]) -> str | None:
    """The path of a field in OpenAI's notation, without the types that pydantic appends."""
    known = place[:3] if place[:1] == ("messages",) else place[:2] if place[:1] == ("stream_options",) else place[:1]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in known)
    return text.removeprefix(".") or None
