"""`python -m infmoe`, which torchrun needs."""

from infmoe.cli import main

main()
