"""``lrsa serve`` as OpenAI's client sees it: what it answers, refuses and counts, and what it survives."""

import concurrent.futures
import itertools
import json
import os

import openai
import pytest
from cli_helpers import refusal
from serving_helpers import MESSAGE, RULE, Server, chat, text_alone

from lrsa_lit.attention import enable
from lrsa_lit.models.tiny import tiny_model

_SERVERS = []


@pytest.fixture(scope="module")
def model():
    return enable(tiny_model().eval(), RULE).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("server")
    while _SERVERS:
        _SERVERS.pop().end()


@pytest.fixture
def server(folder):
    """One for all tests; another once one has ended it."""
    if not _SERVERS or _SERVERS[-1].process.poll() is not None:
        flags = ["--rows", "8", "--memory", "0.002", "--max-waiting", "40", "--tokens-per-step", "64"]
        _SERVERS[:] = [Server(folder / f"{len(list(folder.iterdir()))}.log", *flags)]
    return _SERVERS[-1]


def ask(client, content="How long is river 3?", most=8, **given):
    return client.chat.completions.create(
        model="tiny", messages=chat(content)[0], max_tokens=most, **{"temperature": 0, **given}
    )


def written(stream):
    """The text of a stream of one choice, why it ended, and its usage."""
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(ends) == 1
    return "".join(texts), ends[0], chunks[-1].usage


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_is_that_of_the_model_alone(stream, server, model):
    expected = text_alone(model, "How long is river 3?", 8)
    if stream:
        given = {"stream": True, "stream_options": {"include_usage": True}}
        text, finish, usage = written(ask(server.client(), **given))
    else:
        answer = ask(server.client())
        assert (answer.object, answer.model) == ("chat.completion", "tiny")
        text, finish, usage = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    assert (text, finish) == (expected, "length")
    prompt = len(chat("How long is river 3?")[1])
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 8, prompt + 8)


def test_a_prompt_that_was_read_is_in_the_usage(server):
    content = "A text that nobody has asked about before. " * 4
    cached = [ask(server.client(), content).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    last = (len(chat(content)[1]) - 1 - 18) // 8 * 8 + 18
    assert cached == [0, last]


def test_choices_are_drawn_by_the_seed(server):
    given = {"n": 3, "temperature": 1.5, "top_p": 0.95, "seed": 7, "most": 12}
    first, again = (ask(server.client(), **given) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in ask(server.client(), stream=True, **given):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_ends_before_a_stop(stream, server, model):
    whole = text_alone(model, "How long is river 3?", 40)
    stop = whole[17:19]
    expected = whole[: whole.index(stop)]
    answer = ask(server.client(), most=40, stop=["no such text", stop], stream=stream)
    if stream:
        assert written(answer)[:2] == (expected, "stop")
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")


def test_parts_and_roles_are_read(server, model):
    parts = [{"type": "text", "text": "How long is "}, {"type": "text", "text": "river 3?"}]
    answer = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content == text_alone(model, "How long is river 3?", 8)


def test_the_model_is_listed(server):
    client = server.client()
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("large")
    assert caught.value.param == "model"


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
BAD = {
    "unknown model": ({"model": "gpt-9"}, "model"),
    "no model": ({"model": None}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages missing": ({"messages": None}, "messages"),
    "role": ({"messages": [MESSAGE, {"role": "tool", "content": "x"}]}, "messages[1].role"),
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "tool calls": ({"messages": [{**MESSAGE, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
    "no room for the answer": ({"max_tokens": 8190}, "messages"),
    "larger than everything": ({"messages": [{"role": "user", "content": "x" * 7000}]}, "messages"),
    "many at once": ({"n": 8, "messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
    "negative": ({"max_tokens": -1}, "max_tokens"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "both names": ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    "text for a number": ({"max_tokens": "8"}, "max_tokens"),
    "hot": ({"temperature": 2.1}, "temperature"),
    "cold": ({"temperature": -0.1}, "temperature"),
    "no share": ({"top_p": 0}, "top_p"),
    "seed": ({"seed": 0.5}, "seed"),
    "no choice": ({"n": 0}, "n"),
    "more choices than rows": ({"n": 9}, "n"),
    "empty stop": ({"stop": ["a", ""]}, "stop"),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "stop": ({"stop": 3}, "stop"),
    "stream": ({"stream": "yes"}, "stream"),
    "stream options of no stream": ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    "stream option": ({"stream_options": {"include": True}}, "stream_options.include"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "logprobs": ({"logprobs": True}, "logprobs"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format"),
    "no such field": ({"top_k": 5}, "top_k"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_wrong_is_named(name, stream, server):
    changes, param = BAD[name]
    body = {"model": "tiny", "messages": [MESSAGE], "stream": stream} | changes
    status, text, _ = server.get("/v1/chat/completions", body=json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (404 if name == "unknown model" else 400, param)
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert param in error["message"]
    assert "\n" not in error["message"]


def test_what_asks_for_nothing_is_taken(server):
    nothing = {"tools": [], "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    body = {"model": "tiny", "messages": [MESSAGE], "max_tokens": 1, "seed": None} | nothing
    assert server.get("/v1/chat/completions", body=json.dumps(body).encode())[0] == 200


@pytest.mark.parametrize("body", [b"{bad", b"", b"[]", b'"x"', b"\xff", b"[" * 5000], ids=range(6))
def test_a_body_that_is_no_request_is_refused(body, server):
    status, text, _ = server.get("/v1/chat/completions", body=body or b" ")
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


def test_the_key_is_asked_for(server):
    for key in ("another", "", "Ω"):
        for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/chat/completions", b"{}")):
            status, text, _ = server.get(path, key=key.encode().decode("latin-1"), body=body)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
    assert server.get("/health", key="another")[:2] == (200, "ok")
    assert server.get("/nowhere")[0] == 404


def same(server, model, number, stream):
    """Whether one of many clients gets what the model gives alone."""
    content, most = f"{'What of it? ' * (number % 7)}Question {number % 11}", 3 + number % 9
    answer = ask(server.client(), content, most, stream=stream)
    text = written(answer)[0] if stream else answer.choices[0].message.content
    return text == text_alone(model, content, most)


def test_many_clients_get_what_each_gets_alone(server, model):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda number: same(server, model, number, number % 3 == 0), range(64)))
    assert found == [True] * 64
    assert nothing_is_left(server)


def nothing_is_left(server):
    """Asked until it is so: rows are given back between two steps."""
    return any(
        server.count("lrsa_rows") == server.count("lrsa_reserved_bytes") == server.count("lrsa_waiting") == 0
        for _ in range(1000)
    )


def test_a_full_queue_says_when_to_come_again(server):
    def one(number):
        try:
            return ask(server.client(), f"Question {number}", 60).usage.completion_tokens > 0
        except openai.RateLimitError as error:
            return error.code, int(error.response.headers["Retry-After"])

    with concurrent.futures.ThreadPoolExecutor(80) as pool:
        found = list(pool.map(one, range(80)))
    assert found.count(True) >= 40
    assert [each for each in found if each is not True], "nobody was sent away"
    assert all(each[0] == "queue_full" and 1 <= each[1] <= 60 for each in found if each is not True)
    assert nothing_is_left(server)


ENDLESS = {"max_tokens": 500, "temperature": 1.9, "seed": 5}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_gives_its_rows_back(stream, server):
    done = server.count("lrsa_completion_tokens_total")
    links = [server.connected(stream=stream, n=4, **ENDLESS) for _ in range(4)]
    while server.count("lrsa_rows") == 0:
        pass
    for link in links:
        link.close()
    assert nothing_is_left(server)
    assert server.count("lrsa_completion_tokens_total") == done, "it was answered to the end"


def test_a_stream_that_is_closed_gives_its_rows_back(server):
    with ask(server.client(), most=500, stream=True, temperature=1.9, seed=5) as stream:
        list(itertools.islice(stream, 3))
    assert nothing_is_left(server)


def test_a_slow_reader_keeps_nobody_waiting(server, model):
    slow = ask(server.client(), "Read slowly", 30, stream=True)
    assert same(server, model, 3, False)
    assert written(slow)[0] == text_alone(model, "Read slowly", 30)


def test_it_counts_what_it_does(server):
    before = {name: server.count(f"lrsa_{name}_tokens_total") for name in ("prompt", "completion")}
    usage = ask(server.client(), "Count this", 5).usage
    assert server.count("lrsa_prompt_tokens_total") - before["prompt"] == usage.prompt_tokens
    assert server.count("lrsa_completion_tokens_total") - before["completion"] == usage.completion_tokens
    assert server.count("lrsa_snapshot_bytes") > 0
    assert server.count('lrsa_requests_total{status="200"}') > 0


def test_a_port_in_use_is_refused(server, capfd):
    line = refusal(capfd, "serve", "tiny", "--port", str(server.port))
    assert line.startswith(f"--port: {server.port} is not available on 127.0.0.1")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "MODEL"),
        (["tiny", "--port", "80"], "--port"),
        (["tiny", "--host", "example.org"], "--host"),
        (["tiny", "--memory", "-1"], "--memory"),
        (["tiny", "--memory", "nan"], "--memory"),
        (["tiny", "--rows", "0"], "--rows"),
        (["tiny", "--devices", "2", "--device", "cpu"], "--devices"),
        (["tiny", "--top-k", "9", "--dense"], "--top-k"),
        (["./nowhere"], "MODEL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_mistakes_in_the_command_are_one_line(flags, told, capfd, monkeypatch):
    # The command line sets it for the whole process.
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment = dict(os.environ)
    assert told in refusal(capfd, "serve", *flags)
    # Other programs that count, such as a tracking server, would look for a folder that is gone.
    assert dict(os.environ) == environment


def test_it_ends_what_it_answers_when_it_is_told_to_end(server, model):
    stream = ask(server.client(), "To the end", 100, stream=True)
    first = next(stream)
    server.process.terminate()
    text = "".join(choice.delta.content or "" for chunk in (first, *stream) for choice in chunk.choices)
    assert text == text_alone(model, "To the end", 100)
    assert server.process.wait() == 0, server.log.read_text()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert log.count("INFO     Stopping: 1 request still to be answered, for at most 30 s; no more are accepted\n") == 1
    assert server.get("/health")[0] == 0


def test_who_comes_while_it_ends_is_refused_at_once(server):
    link = server.connected(stream=True, n=8, **ENDLESS)
    assert link.recv(1)
    server.process.terminate()
    while (status := server.get("/health")[0]) == 200:
        pass
    assert status == 503
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server.client())
    assert (caught.value.status_code, caught.value.code) == (503, "server_stopping")
    link.close()
    assert server.process.wait() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_what_is_not_answered_in_time_ends_with_an_error(folder):
    server = Server(folder / "drain.log", "--rows", "1", "--memory", "0.002", "--drain", "0")
    links = [server.connected(**ENDLESS) for _ in range(4)]
    while server.count("lrsa_rows") == 0:
        pass
    assert server.end() == 0
    for link in links:
        answer = b"".join(iter(lambda link=link: link.recv(1 << 16), b"")).decode()
        assert answer.startswith("HTTP/1.1 500 ")
        assert "the server has stopped" in answer
    assert "Traceback" not in server.log.read_text()
