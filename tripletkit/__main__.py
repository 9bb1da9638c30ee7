"""`python -m tripletkit` is the `tripletkit` command."""

from tripletkit.cli import main

main()
