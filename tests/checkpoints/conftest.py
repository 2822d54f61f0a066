"""Each test of checkpoints runs as a user far from the checkout would."""

import contextlib
import os
import signal

import pytest
from cli_helpers import elsewhere

from lrsa_lit.checkpoints.checkpoint_io import claim

__all__ = ["elsewhere"]


@pytest.fixture
def claiming():
    """A block in which another process has claimed a folder; it is killed at the block's end."""

    @contextlib.contextmanager
    def claiming(folder):
        told, tell = os.pipe()
        if not (child := os.fork()):
            os.write(tell, b"yes" if claim(folder) else b"no")
            signal.pause()
            os._exit(0)
        try:
            assert os.read(told, 3) == b"yes"
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    return claiming
