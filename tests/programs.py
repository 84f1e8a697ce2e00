"""Run the scripts in tests, as programs or within this process, and read what they leave."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launcher(processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run(script, *flags, processes=1, check=True, folder=ROOT, **kwargs):
    """Run a script; returns the finished process, with all that it printed in stdout."""
    command = [*launcher(processes), Path(folder) / script, *map(str, flags)]
    kwargs = {"env": ENV, "timeout": 240, **kwargs}
    result = subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert not check or result.returncode == 0, result.stdout[-3000:]
    return result


def run_here(module, *flags):
    """The same in this process, which spares the imports; returns what was printed."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(module.parse_args([str(flag) for flag in flags]))
    return printed.getvalue()


def answer(module, *flags, folder="."):
    """The same from a folder, as one who calls the program sees it: exit status, stdout, and stderr with its message."""
    printed, told, before, code = io.StringIO(), io.StringIO(), os.getcwd(), 0
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
            module.main(module.parse_args([str(flag) for flag in flags]))
    except SystemExit as error:
        code = error.code or 0
    except OSError as error:
        code = f"{error.filename or 'error'}: {error.strerror or error}"
    finally:
        os.chdir(before)
    if isinstance(code, str):
        code, _ = 2, told.write(code + "\n")
    return types.SimpleNamespace(returncode=code, stdout=printed.getvalue(), stderr=told.getvalue())


def descendants(pid):
    """Processes started by a process and by those; torchrun gives its workers sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [x for child in children for x in descendants(child)]


def ranks_of(pid):
    """Processes of the ranks of a torchrun, in their order, without the loaders' workers."""
    rank_of = {}
    for child in descendants(pid):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if ranks:
            rank_of.setdefault(ranks[0], child)  # a loader's worker stands behind its parent
    return [rank_of[rank] for rank in sorted(rank_of)]


def kill_after(n_lines, out, script, *flags, processes=1, env=ENV):
    """Start a script and kill -9 it, with all its children, when its log has n_lines."""
    command = [*launcher(processes), ROOT / script, *map(str, flags), "--out", str(out)]
    process = subprocess.Popen(command, env=env, stdout=-3, stderr=-3, start_new_session=True)
    log = out / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < n_lines):
        time.sleep(0.01)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def named(names):
    """Rows of a classes.tsv that has names only."""
    return [{"name": name} for name in names]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
