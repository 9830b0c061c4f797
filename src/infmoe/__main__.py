"""`python -m infmoe`, which torchrun needs."""

import sys

from infmoe.cli import main

sys.exit(main())
