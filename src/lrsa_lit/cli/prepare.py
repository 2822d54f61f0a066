"""``lrsa prepare …``, with the arguments of ``lrsa fit``: tokenise its data, for later runs or for another machine."""

from __future__ import annotations

from collections.abc import Sequence

from lrsa_lit.cli.arguments import Parser
from lrsa_lit.cli.fit_tool import FitTool, run_tool
from lrsa_lit.paths import cache_dir
from lrsa_lit.terminal import PlainConsole


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments or files is a UserError."""
    run_tool(_Prepare, Parser("lrsa prepare", add_help=False), arguments)


class _Prepare(FitTool):
    """Tokenises every split of the data set, through its filter."""

    command = "prepare"

    def work(self) -> None:
        """Fill the cache, and say where it is."""
        data, say = self.datamodule, PlainConsole().say
        for split in data.splits():
            data.prepare_split(split)
            say(f"{split}: {len(data.open_split(split))} examples")
        say(f"They are in {cache_dir()}, the folder of LRSA_CACHE_DIR")
        say("Runs with the same settings of model and data use them, on another machine from a copy of this folder")
