from __future__ import annotations

import matplotlib as mpl
import pytest


@pytest.fixture(autouse=True)
def headless():
    """Draw without a screen; a test that leaves a figure open or a global setting changed fails."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    before = mpl.rcParams.copy()
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left, f"{len(left)} figures left open"
    assert mpl.rcParams == before


@pytest.fixture(scope="session")
def three(make_annotated):
    return make_annotated(3)


@pytest.fixture(scope="session")
def forty(make_annotated):
    return make_annotated(40, 4000)


@pytest.fixture(scope="session", params=["h5ad", "zarr"])
def from_disk(request, make_annotated, through_disk, tmp_path_factory):
    return through_disk(make_annotated(12), tmp_path_factory.mktemp("result"), request.param)
