"""`python -m lrt`."""

import sys

from lrt.cli.main import main

sys.exit(main())
