"""The trainers on two nodes that do not share a disk: found out when a run is continued, not averaged in silence."""

import socket
import subprocess
import sys

import pytest
from programs import ENV, ROOT, run_forked

COMMON = ["--data", "laionet", "--batch-size", "8", "--device", "cpu", "--eval-sets", "v2", "--workers", "0"]
SCRIPTS = {
    "clip.py": [],
    "sl_vocab_subsample.py": [],
    "dino_laionet.py": ["--prototypes", "8", "--local-crops", "1", "--probe-images", "60", "--no-baselines"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_nodes_continue_from_the_same_checkpoint_or_not_at_all(world, tmp_path, script):
    flags = ["--root", world, *COMMON, *SCRIPTS[script]]
    run_forked(script, *flags, "--steps", "2", "--out", tmp_path / "0")  # node 0 has a checkpoint, node 1 has none
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = ENV | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    nodes = [subprocess.Popen([sys.executable, ROOT / script, *map(str, flags), "--steps", "2", "--out", tmp_path / rank],
                              env=env | {"RANK": rank}, stdout=-3, stderr=-1, text=True) for rank in "01"]
    try:
        for node in nodes:
            _, told = node.communicate(timeout=200)
            assert node.returncode == 2 and "not the same on all nodes" in told, told[-2000:]
    finally:
        for node in nodes:
            node.kill()
