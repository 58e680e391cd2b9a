"""`python -m lrt`."""

import sys

from lrt.cli import main

sys.exit(main())
