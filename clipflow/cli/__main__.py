"""`python -m clipflow.cli` is `clipflow`."""

import sys

from clipflow.cli.main import main

sys.exit(main())
