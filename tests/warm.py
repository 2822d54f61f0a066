"""The command ``lrsa`` in processes that need not import the package, which takes each of them seconds.

A command line of this file connects to the test that gave it, which has the server of ``processes`` fork the command
with the files, the folder and the variables of the process that asked. That one hands on signals and ends alike.
"""

import contextlib
import json
import os
import signal
import socket
import sys

STREAMS = (0, 1, 2)
HANDED_ON = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def commands():
    """Yields what makes a command line of the arguments of ``lrsa``; its processes must end within the block."""
    import threading

    with socket.socket(socket.AF_UNIX) as listener:
        # A name of no file, which Linux chooses.
        listener.bind("")
        listener.listen()
        address = listener.getsockname()[1:].decode()
        serving = threading.Thread(target=_serve, args=(listener,))
        serving.start()
        try:
            yield lambda arguments: [sys.executable, "-S", "-E", __file__, address, *arguments]
        finally:
            # Not close alone, which leaves the address to an accept that waits.
            listener.shutdown(socket.SHUT_RDWR)
            serving.join()


def _serve(listener):
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            _run(connection)


def _run(connection):
    """One command from its beginning to its end."""
    import multiprocessing
    from multiprocessing.connection import Connection, wait

    import processes

    assert processes.COUNT, "it says what the server of processes imports"
    _, files, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
    with connection.makefile("rw") as asked:
        request = json.loads(asked.readline())
        context = multiprocessing.get_context("forkserver")
        streams = [Connection(file) for file in files]
        command = context.Process(target=_command, args=(request, streams))
        command.start()
        for stream in streams:
            stream.close()
        print(command.pid, file=asked, flush=True)
        # A process that was killed asks no longer.
        if connection in wait([command.sentinel, connection]):
            command.kill()
        command.join()
        with contextlib.suppress(OSError):
            print(command.exitcode, file=asked, flush=True)


def _command(request, streams):
    for number, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    import torch

    from lrsa_lit.cli.main import main

    torch.set_num_threads(1)
    sys.argv = ["lrsa"]
    main(request["arguments"])


def _ask(address, arguments):
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(b"\0" + address.encode())
        socket.send_fds(server, [b"\0"], STREAMS)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        command = int(answers.readline())
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: os.kill(command, number))
        code = int(answers.readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
