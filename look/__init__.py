"""What there is to see of a run and of its networks: samples, attention, curves, a page, figures, a table."""

import fast  # noqa: F401 (first: it decides how many threads NumPy's matrix products use)
