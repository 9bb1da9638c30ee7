"""`python -m tripletkit.train ...` is `tripletkit train ...`."""

import sys

from tripletkit.cli import main

main(["train", *sys.argv[1:]])
