"""``python -m lrsa_lit``: the command ``lrsa``."""

from lrsa_lit.cli.main import main

main()
