"""`python -m sideroad`, the same as the `sideroad` script."""

from sideroad.cli.main import main

main()
