"""The workspace that faults are tried on: three packages, of which two were never trained."""

import pytest

from .harness import copy_house, import_what_takes_seconds, register_others


@pytest.fixture(scope="session")
def three_packages(shared, staged_once):
    "The folder of a workspace with three versions, approved and tested. Do not change it: copy it with `copy_house`."
    import_what_takes_seconds()
    return shared("three-packages", lambda to: register_others(copy_house(to, staged_once.root)))
