"""What the paper measures by and compares with: scores, Inception, its convolutional peers, its tables."""

import fast  # noqa: F401 (first: it decides how many threads NumPy's matrix products use)
