"""``python -m lrsa_lit.study …`` is ``lrsa study …``."""

import sys

from lrsa_lit.cli.main import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
