"""What holds for every test: nothing blocks an event loop, and a failed property prints how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.beds import Bed, Scale

# A shared machine may be slow at any moment; what a property takes is not what it tests.
hypothesis.settings.register_profile("pronghorn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("pronghorn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.SMALL.value,
        help="how long the test beds of tests/faults run: small (minutes), ci (half an hour) or long (hours)",
    )
    parser.addoption("--seed", type=int, default=None, help="repeat a run of a test bed that printed this seed")


@pytest.fixture
def bed(request: pytest.FixtureRequest) -> Bed:
    """The scale and the seed of a test bed; the seed is printed, so that a failure can be repeated."""
    bed = Bed(Scale(request.config.getoption("--scale")), request.config.getoption("--seed"))
    print(f"repeat with: --scale {bed.scale} --seed {bed.seed}")
    return bed


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fail a test in which our own code blocks the event loop."""
    with blockbuster_ctx("pronghorn") as found:
        yield found
