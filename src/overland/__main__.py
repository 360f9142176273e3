"""`python -m overland` is the command `overland`."""

from overland.cli.main import main

main()
