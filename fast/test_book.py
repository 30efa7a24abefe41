"""The book's own tests once more, with the fast forms in use."""

import pytest

import fast
from test_transgan import *  # noqa: F403


@pytest.fixture(autouse=True, scope="module")
def installed():
    fast.install()
    yield
    fast.uninstall()
