"""``lrsa`` in processes that do not import the package themselves: importing takes seconds, each time.

:func:`commands` makes command lines that run this file. Started, it connects to the test process, whose fork server
runs the command with this process's streams, folder and variables. This process forwards signals and ends with the
command's exit code or signal. Linux only: the socket has an abstract name.
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
    """Yield a function from arguments of ``lrsa`` to a command line. Commands run one at a time, within the block."""
    import threading

    with socket.socket(socket.AF_UNIX) as listener:
        # Linux chooses an abstract name.
        listener.bind("")
        listener.listen()
        address = listener.getsockname()[1:].decode()
        serving = threading.Thread(target=_serve, args=(listener,))
        serving.start()
        try:
            yield lambda arguments: [sys.executable, "-S", "-E", __file__, address, *arguments]
        finally:
            # Closing alone would not wake the thread that waits in accept.
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
    """Run the command that a connection asks for, and report its process id and exit code."""
    import multiprocessing
    from multiprocessing.connection import Connection, wait

    import processes  # noqa: F401 - it says what the fork server imports

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
        # The connection is readable only if the process that asked was killed.
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
