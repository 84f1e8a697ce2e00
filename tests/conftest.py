"""The scripts are single files in the repository root: put it on the import path. A small world for all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers' threads would wait for each other
ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(ROOT))


def pytest_xdist_auto_num_workers(config):
    """For -n auto: one worker more than cores, since tests wait for programs that start, are killed and go on."""
    return os.cpu_count() + 1


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small shapes world."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    command = [sys.executable, ROOT / "build_datasets.py", "shapes", "--out", root, "--size", "0.02", "--workers", "2"]
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    return root
