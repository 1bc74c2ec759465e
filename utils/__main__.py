"""`python -m utils`: run the series."""

import sys

from utils.support.run import main

sys.exit(main())
