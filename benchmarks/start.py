"""What the scripts beside it import first: so they find the project, and NumPy's matrix products run on as many threads as
fast/ decides, which has to be known before NumPy is imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast  # noqa: F401
