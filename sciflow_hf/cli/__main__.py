"""`python -m sciflow_hf.cli` is `sciflow-hf`."""

import sys

from .main import main

sys.exit(main())
