"""What files and stores have in them reaches the terminal as it is, and harmless."""

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError, printable
from lrsa_lit.terminal import PlainConsole, log_to

EVIL = "a\x1b[2J\x1b]0;owned\x07\x9b1m\nlrsa: all is well\u202e\u2028\udc80"
ESCAPED = r"a\x1b[2J\x1b]0;owned\x07\x9b1m\nlrsa: all is well\u202e\u2028\udc80"


@given(st.text())
def test_one_line_that_any_stream_takes(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown
    shown.encode()


def test_ordinary_text_stays():
    for text in ("Größe 2 µm, 5 %", "日本語", "می‌خواهم", "👩‍🚀", "a\\b"):
        assert printable(text) == text
    assert printable(EVIL) == ESCAPED
    assert printable("a\tb\x1b\n", keep="\t\n") == "a\tb\\x1b\n"


@pytest.mark.parametrize("path", ["runs/[/x]/a", "[bold]x[/bold]", "a:warning:b", "[link=http://x]y"])
def test_brackets_are_no_markup(path):
    console = PlainConsole(file=io.StringIO(), width=200, force_terminal=False)
    console.say(path)
    console.print(path)
    table = Table(title=path)
    table.add_column(path)
    table.add_row(path)
    console.print(table)
    assert console.file.getvalue().count(path) == 5


def test_a_table_in_a_file_is_as_wide_as_its_text(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = PlainConsole(file=io.StringIO())
    console.print(Table("x" * 150))
    assert "x" * 150 in console.file.getvalue()


def test_tables_and_lines_show_no_controls():
    console = PlainConsole(file=io.StringIO(), width=200, force_terminal=False)
    console.say(EVIL)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    shown = console.file.getvalue()
    assert not {"\x1b", "\x9b", "\u202e", "\udc80"} & set(shown)
    assert shown.startswith(ESCAPED + "\n")


def test_a_message_is_one_line_without_passwords(monkeypatch):
    # As at a start.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    console = PlainConsole(file=io.StringIO(), width=300)
    log_to(console)
    logging.getLogger("lrsa_lit.x").info("[red]%s at http://joe:hunter2@host", EVIL)
    logging.getLogger("another").warning("two\nlines")
    logging.getLogger("huggingface_hub.utils").warning("printed by its own handler")
    first, *others = console.file.getvalue().splitlines()
    assert f"[red]{ESCAPED} at http://host" in first
    assert [line.split()[-1] for line in others] == ["two", "lines"]


@pytest.mark.parametrize("width", [20, 80])
def test_only_a_terminal_wraps_messages(width, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    long = " ".join(map(str, range(100)))
    console = PlainConsole(file=io.StringIO(), width=width, force_terminal=False)
    log_to(console)
    for name in ("lrsa_lit.x", "another"):
        logging.getLogger(name).warning(long)
    assert console.file.getvalue() == f"WARNING  {long}\n" * 2
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    terminal = PlainConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    log_to(terminal)
    logging.getLogger("lrsa_lit.x").warning(long)
    shown = terminal.file.getvalue().splitlines()
    assert len(shown) > 1
    assert max(map(len, shown)) <= width


def test_an_error_is_one_line(monkeypatch, capsys):
    def fail(arguments):
        raise UserError(f"{EVIL} http://joe:hunter2@host")

    monkeypatch.setattr("lrsa_lit.cli.ui.run", fail)
    with pytest.raises(SystemExit, match="2"):
        main(["ui"])
    assert capsys.readouterr().err == f"lrsa: error: {ESCAPED} http://host\n"
