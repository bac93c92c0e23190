"""`python -m trajsurgery`."""

import sys

from trajsurgery.command import main

sys.exit(main())
