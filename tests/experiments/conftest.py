from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def longbench() -> Path:
    """The folder with real LongBench material, which the repository itself does not contain."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "longbench"
    if not folder.is_dir():
        pytest.skip("needs LongBench material in ../shared/longbench")
    return folder
