"""`python -m trajsurgery`."""

import sys

from trajsurgery.cli import main

sys.exit(main())
