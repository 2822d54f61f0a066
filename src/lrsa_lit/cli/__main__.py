"""``python -m lrsa_lit.cli``: the command ``lrsa``."""

from lrsa_lit.cli.main import main

main()
