"""Streams that are closed, full, or take ASCII alone: one line or the output as well as it can be written."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ask_helpers import FIRST, TEXT
from cli_helpers import DEBUG

import lrsa_lit.cli.ask
from lrsa_lit.cli.main import main

ASK = ["ask", "--model", "tiny", "--max-new-tokens", "3"]
LIGHT = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "no such command": (["nonsense"], 2),
    "ask help": (["ask", "--help"], 0),
    "ask without a question": (["ask", "text.txt"], 2),
    "ask from stdin": (["ask", "-", "Who?"], 2),
    "export": (["export", "nowhere.ckpt", "--out", "x"], 2),
    "sweep": (["sweep", "--nonsense"], 2),
    "ui": (["ui", "--store", "nowhere"], 2),
    "study": (["study", "nowhere.yaml"], 2),
}


@pytest.fixture(autouse=True)
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)


def started(arguments, closed=(), **options):
    """Run a command of this interpreter with some of its streams closed."""
    redirections = " ".join({0: "<&-", 1: ">&-", 2: "2>&-"}[number] for number in closed)
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "lrsa_lit.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(("arguments", "code"), LIGHT.values(), ids=LIGHT)
def test_without_any_stream_a_command_ends_as_ever(arguments, code):
    # Nobody hears the answers that stdout is closed for, even before anything else is wrong.
    assert started(arguments, closed=(0, 1, 2)).returncode == (2 if arguments[0] == "ask" else code)


@pytest.mark.parametrize(("arguments", "code"), LIGHT.values(), ids=LIGHT)
def test_without_stdin_and_stdout_a_mistake_is_one_line(arguments, code):
    run = started(arguments, closed=(0, 1))
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == (run.returncode == 2)


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    code = (
        "import os; from lrsa_lit.cli.main import main; main(['--version'])\n"
        "file = open('new.txt', 'w'); os.write(1, b'printed'); os.write(2, b'printed'); print(file.fileno() > 2)"
    )
    subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code], check=True)
    assert Path("new.txt").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "lrsa_lit.cli", "--help"]
        run = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("lrsa: error: stdout: ")


@pytest.mark.parametrize("stdout", ["a file", "no file"])
def test_other_errors_of_the_system_are_not_hidden(stdout, monkeypatch):
    def broken(arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lrsa_lit.cli.ask, "run", broken)
    if stdout == "no file":
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(OSError, match="No space"):
        main(["ask"])


@pytest.mark.parametrize("missing", ["stdin", "stdout"])
def test_ask_says_which_stream_it_misses(missing, monkeypatch, capfd):
    monkeypatch.setattr(sys, missing, None)
    with pytest.raises(SystemExit) as stop:
        main([*ASK, "-", "Who?"])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lrsa: error: ")
    assert f"{missing}" in line


def test_ask_needs_no_stdin_for_a_file(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    main([*ASK, "text.txt", FIRST])
    assert "tokens read" in capfd.readouterr().out


def test_ask_escapes_what_stdout_cannot_encode(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main([*ASK, "text.txt", "Où?", "\N{GRINNING FACE}?"])
    assert b"> O\\xf9?\n" in written.getvalue()
    assert b"> \\U0001f600?\n" in written.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    question = "Où? \N{GRINNING FACE}"
    main([*ASK, "--json", "text.txt", question])
    assert json.loads(written.getvalue())["question"] == question
    assert ("Où".encode() in written.getvalue()) == (encoding == "utf-8")


def test_typed_bytes_that_are_no_text_are_asked_for_again(monkeypatch, capfd):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8"))
    main([*ASK, "text.txt", FIRST])
    assert "QUESTION: " in capfd.readouterr().err


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_run_prints_to_ascii(command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main([command, *DEBUG, "--trainer.logger", "false", "--trainer.max_steps", "1", "--validate_first", "false"])
    assert b"dense" in written.getvalue()
