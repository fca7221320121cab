"""What holds for every test: nothing blocks an event loop, and a failed property prints how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

# A shared machine may be slow at any moment; what a property takes is not what it tests.
hypothesis.settings.register_profile("pronghorn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("pronghorn")


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fail a test in which our own code blocks the event loop."""
    with blockbuster_ctx("pronghorn") as found:
        yield found
