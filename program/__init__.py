"""The program around the book: its command line, and all that surrounds a training.

How many threads multiply matrices is decided before NumPy is loaded. So whoever starts the program imports this first.
"""

import fast  # noqa: F401 (first: it decides how many threads NumPy's matrix products use)

VERSION = "0.1.0"  # as in pyproject.toml
