"""OpenAI's API on LitServe: ``/v1/chat/completions`` and ``/v1/models``; also ``/metrics``."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from litserve.specs.openai import OpenAISpec
from litserve.utils import ResponseBufferItem

from lrsa_lit.data.messages import render_messages
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.serving import gauges
from lrsa_lit.serving.api_error import ApiError
from lrsa_lit.serving.chat_request import ChatRequest, read_request
from lrsa_lit.serving.engine import Limits
from lrsa_lit.serving.engine_loop import EVENTS, Shared
from lrsa_lit.serving.job import Event, Finish, Job
from lrsa_lit.serving.memory import PastBytes
from lrsa_lit.serving.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Front:
    """The facts about a model that need no weights. With them, the front end refuses what the model cannot answer.

    Attributes:
        name: the name of the model for clients.
        tokenizer: the model's tokenizer.
        positions: the most tokens of a prompt and its answer together.
        max_new_tokens: the most tokens per answer if the request does not set it.
        past_bytes: computes the cache size of a request.
        graphed: whether rows are decoded with a CUDA graph.
        max_waiting: the most requests that may wait.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    positions: int
    max_new_tokens: int
    past_bytes: PastBytes
    graphed: bool
    max_waiting: int


@dataclasses.dataclass
class _Choice:
    """A choice of a request that is being answered."""

    text: TextStream
    finish: Finish | None = None


class _Answering:
    """A request that is being answered, with its events and the choices so far."""

    def __init__(self, job: Job, asked: ChatRequest, front: Front) -> None:
        self.job, self.asked, self.name = job, asked, front.name
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.choices = [_Choice(TextStream(front.tokenizer, asked.stops)) for _ in range(job.choices)]
        self.began, self.created, self.cached = time.monotonic(), int(time.time()), 0
        self.first: float | None = None
        self.running = job.choices

    @property
    def ended(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    def take(self, event: Event) -> str:
        """Process an event; returns the text that it adds to its choice."""
        self.running -= event.finish is not None
        if event.finish == "refused":
            raise ApiError(event.error, "messages", code="request_too_large")
        if event.finish == "error":
            raise ApiError(event.error or "the answer failed", status=500, code="internal_error")
        choice, self.cached = self.choices[event.choice], event.cached
        if self.first is None:
            self.first = time.monotonic()
            gauges.FIRST_TOKEN.observe(self.first - self.began)
        if choice.finish is not None:
            return ""
        text = "" if event.token is None else choice.text.push(event.token)
        if choice.text.stopped:
            choice.finish = "stop"
        elif event.finish is not None:
            text += choice.text.end()
            choice.finish = "stop" if choice.text.stopped else event.finish
        return text

    @property
    def usage(self) -> dict[str, Any]:
        prompt, answer = len(self.job.ids), sum(choice.text.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def note(self) -> None:
        """Update the metrics for a complete answer."""
        usage = self.usage
        gauges.REQUESTS.labels("200").inc()
        gauges.PROMPT_TOKENS.inc(usage["prompt_tokens"])
        gauges.CACHED_TOKENS.inc(self.cached)
        gauges.COMPLETION_TOKENS.inc(usage["completion_tokens"])
        most = max(choice.text.tokens for choice in self.choices)
        if self.first is not None and most > 1:
            gauges.TOKEN.observe((time.monotonic() - self.first) / (most - 1))

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """A chunk of a stream, as a server-sent event."""
        head = {"id": f"chatcmpl-{self.job.uid}", "object": "chat.completion.chunk", "created": self.created}
        return _sent(head | {"model": self.name, "system_fingerprint": None, "choices": choices} | more)


class _Streamed(StreamingResponse):
    """A stream of events. ``close`` is called at its end, even if the client leaves before it begins."""

    def __init__(self, content: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class _Dispatcher:
    """Replaces the queue of a single request: passes each event to its request."""

    def __init__(self, answering: dict[str, _Answering]) -> None:
        self._answering = answering

    def append(self, response: list[Any]) -> None:
        for event in response[0]:
            if (one := self._answering.get(event.uid)) is not None:
                one.events.put_nowait(event)


class ChatSpec(OpenAISpec):  # type: ignore[misc]
    """LitServe's OpenAI specification, served by the engine.

    Args:
        front: the facts about the model that need no weights.
        limits: the limits of each worker's engine.
        shared: the state that all processes share.
    """

    def __init__(self, front: Front, limits: Limits, shared: Shared) -> None:
        super().__init__()
        self._known: Front | None = front
        self._limits, self._shared, self._created = limits, shared, int(time.time())
        self._answering: dict[str, _Answering] = {}
        self._seconds = 1.0
        self._watching: asyncio.Task[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the front end's facts: workers need no tokenizer."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_known": None}

    @property
    def busy(self) -> bool:
        """Whether requests are being answered."""
        return bool(self._answering)

    def fail(self, reason: str) -> None:
        """End all requests with an error."""
        for uid, one in self._answering.items():
            one.events.put_nowait(Event(uid, 0, None, "error", one.cached, reason))

    def pre_setup(self, lit_api: Any) -> None:
        """Register the routes."""
        self.add_endpoint(self.api_path, self.chat_completion, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.model, ["GET"])
        self.add_endpoint("/metrics", self.metrics, ["GET"])

    async def models(self) -> JSONResponse:
        """List the only model."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, name: str) -> JSONResponse:
        """Describe the model ``name``."""
        self._check_name(name)
        return JSONResponse(self._model)

    async def metrics(self) -> Response:
        """The Prometheus metrics of all processes."""
        return Response(gauges.shown(), media_type=gauges.FORMAT)

    async def chat_completion(self, request: Request) -> Response:  # type: ignore[override]
        """Answer a chat, as a whole or as a stream."""
        try:
            return await self._chat_completion(request)
        except ApiError as error:
            gauges.REQUESTS.labels(str(error.status)).inc()
            raise

    async def _chat_completion(self, request: Request) -> Response:
        began, body = time.monotonic(), await request.body()
        # In a thread, because tokenizing a long text would block other requests.
        one = await asyncio.to_thread(self._read, body)
        one.began = began
        await self._submit(one)
        gone, streamed = asyncio.create_task(_left(request)), False
        try:
            # Wait for the first event, so that early errors set the HTTP status, also of streams.
            event = await _event(one, gone)
            if event is None:
                return Response(status_code=499)
            text = one.take(event)
            if not one.asked.stream:
                return await self._whole(one, event, text, gone)
            streamed = True
            return _Streamed(self._stream(one, event, text), functools.partial(self._close, one))
        finally:
            gone.cancel()
            if not streamed:
                self._close(one)

    async def _whole(self, one: _Answering, event: Event, text: str, gone: asyncio.Task[None]) -> Response:
        texts = [""] * len(one.choices)
        texts[event.choice] += text
        while not one.ended:
            later = await _event(one, gone)
            if later is None:
                return Response(status_code=499)
            texts[later.choice] += one.take(later)
        one.note()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish,
            }
            for index, (choice, content) in enumerate(zip(one.choices, texts, strict=True))
        ]
        head = {"id": f"chatcmpl-{one.job.uid}", "object": "chat.completion", "created": one.created}
        return JSONResponse(
            head | {"model": one.name, "system_fingerprint": None, "choices": choices, "usage": one.usage}
        )

    async def _stream(self, one: _Answering, event: Event, text: str) -> AsyncIterator[str]:
        try:
            for index in range(len(one.choices)):
                yield one.chunk([_delta(index, {"role": "assistant", "content": ""})])
            shown: set[int] = set()
            while True:
                choice = one.choices[event.choice]
                if text:
                    yield one.chunk([_delta(event.choice, {"content": text})])
                if choice.finish is not None and event.choice not in shown:
                    shown.add(event.choice)
                    yield one.chunk([_delta(event.choice, {}, choice.finish)])
                if one.ended:
                    break
                event = await one.events.get()
                text = one.take(event)
            options = one.asked.stream_options
            if options is not None and options.include_usage:
                yield one.chunk([], usage=one.usage)
            one.note()
            yield "data: [DONE]\n\n"
        except ApiError as error:
            gauges.REQUESTS.labels(str(error.status)).inc()
            yield _sent(error.body)

    def _read(self, body: bytes) -> _Answering:
        """Check a request and tokenize its prompt."""
        asked, front = read_request(body), self._front
        self._check_name(asked.model)
        try:
            rendered = render_messages(asked.conversation, front.tokenizer)
            ids = encode_text(front.tokenizer, rendered.text, rendered.user).ids
        except UserError as error:
            raise ApiError(f"messages: {error}", "messages") from None
        most = asked.max_completion_tokens or asked.max_tokens
        room = front.positions - len(ids)
        if room < (most or 1):
            answer = f" and {most:,} for the answer" if most else ""
            message = (
                f"messages: the prompt has {len(ids):,} tokens{answer}; the model has {front.positions:,} positions"
            )
            raise ApiError(message, "messages", code="context_length_exceeded")
        job = Job(
            uuid.uuid4().hex,
            ids,
            min(room, front.max_new_tokens) if most is None else most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            choices=asked.n or 1,
        )
        self._check_size(job)
        return _Answering(job, asked, front)

    def _check_size(self, job: Job) -> None:
        """Refuse a job that is too large for any worker."""
        limits, front = self._limits, self._front
        if job.choices > limits.rows:
            raise ApiError(f"n: {job.choices} is not allowed; this server has {limits.rows} rows", "n")
        places = 1 << (job.choices - 1).bit_length() if front.graphed else None
        needed = front.past_bytes.together([job.tokens] * job.choices, places)
        if needed > limits.memory:
            message = f"messages: the request needs {needed:,} bytes of cache; this server has {limits.memory:,}"
            raise ApiError(message, "messages", code="request_too_large")

    async def _submit(self, one: _Answering) -> None:
        if not self._shared.enter(self._front.max_waiting):
            seconds = min(60, max(1, math.ceil(self._seconds)))
            message = f"{self._front.max_waiting} requests are already waiting; try again in {seconds} s"
            raise ApiError(message, status=429, code="queue_full", retry_after=seconds)
        if EVENTS not in self.response_buffer:
            queue: Any = _Dispatcher(self._answering)
            self.response_buffer[EVENTS] = ResponseBufferItem(asyncio.Event(), queue)
            self._watching = asyncio.create_task(self._watch())
        uid = one.job.uid
        self._answering[uid] = one
        self._shared.began()
        item = self.response_queue_id, uid, time.monotonic(), one.job
        await asyncio.to_thread(self.request_queue.put, item)

    async def _watch(self) -> None:
        """If a worker has died, fail all requests. LitServe then stops the server."""
        while True:
            await asyncio.sleep(1)
            if self._shared.bereaved:
                self.fail("a worker of the server has died")

    def _close(self, one: _Answering) -> None:
        """Remove a request. If it is still running, cancel its job, which frees its rows."""
        if self._answering.pop(one.job.uid, None) is None:
            return
        self._shared.ended()
        self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - one.began)
        if one.running:
            self._shared.cancel(one.job.uid)

    def _check_name(self, name: str) -> None:
        if name != self._front.name:
            message = f"model: {name!r} is not served here; {self._front.name!r} is"
            raise ApiError(message, "model", status=404, code="model_not_found")

    @property
    def _front(self) -> Front:
        assert self._known is not None
        return self._known

    @property
    def _model(self) -> dict[str, Any]:
        return {"id": self._front.name, "object": "model", "created": self._created, "owned_by": "lrsa-lit"}


async def _left(request: Request) -> None:
    """Wait until the client disconnects. Its request has already been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _event(one: _Answering, gone: asyncio.Task[None]) -> Event | None:
    """The next event, or None if the client disconnects first."""
    waiting = asyncio.create_task(one.events.get())
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()


def _delta(index: int, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _sent(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
