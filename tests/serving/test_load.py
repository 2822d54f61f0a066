"""A thousand requests of 32 clients: none is lost, each is answered as alone, memory stays flat. Then a worker dies."""

import concurrent.futures
import random

import psutil
import pytest
from serving_helpers import RULE, Server, chat, text_alone

from lrsa_lit.attention import enable
from lrsa_lit.models.tiny import tiny_model

REQUESTS, CLIENTS = 1000, 32
TOKENS = 8
"""Of an answer: as many as a partition, so that each compresses one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("load") / "log"
    server = Server(log, "--rows", "16", "--snapshots", "0.001", "--max-waiting", "64")
    yield server
    server.end()


def bytes_of(server):
    """Of all processes of the server, what is theirs alone."""
    processes = [
        server.process.pid,
        *(each.pid for each in psutil.Process(server.process.pid).children(recursive=True)),
    ]
    return sum(psutil.Process(pid).memory_full_info().uss for pid in processes)


@pytest.mark.slow
def test_a_thousand_requests(server):
    model, client, draw = enable(tiny_model().eval(), RULE).double(), server.client(), random.Random(0)
    texts = [f"{'A sentence of the book. ' * draw.randrange(6)}Question {number}" for number in range(40)]
    expected = [text_alone(model, text, TOKENS) for text in texts]

    def one(number):
        given = {"model": "tiny", "messages": chat(texts[number % 40])[0], "temperature": 0, "max_tokens": TOKENS}
        if number % 4:
            return client.chat.completions.create(**given).choices[0].message.content
        chunks = client.chat.completions.create(stream=True, **given)
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    held = []
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(4):
            assert list(pool.map(one, range(REQUESTS // 4))) == [
                expected[number % 40] for number in range(REQUESTS // 4)
            ]
            held.append(bytes_of(server))
    assert held[-1] < 1.03 * held[1], held
    assert server.count('lrsa_requests_total{status="200"}') == REQUESTS
    assert server.count("lrsa_rows") == server.count("lrsa_reserved_bytes") == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_server_and_keeps_nobody_waiting(server):
    children = psutil.Process(server.process.pid).children(recursive=True)
    (worker,) = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    link = server.connected(n=8, max_tokens=2000, temperature=1.9)
    while server.count("lrsa_rows") == 0:
        pass
    worker.kill()
    status, _, body = b"".join(iter(lambda: link.recv(1 << 16), b"")).partition(b"\r\n")
    assert b" 500 " in status
    assert b"a worker of the server has died" in body
    assert server.process.wait() == 1
    assert server.log.read_text().splitlines()[-1].startswith("lrsa: a worker has died")
    psutil.wait_procs(children)
