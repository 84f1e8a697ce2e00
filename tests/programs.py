"""Run the scripts in tests, as programs or within this process, and read what they leave."""

import contextlib
import functools
import io
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launcher(processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run(script, *flags, processes=1, check=True, folder=ROOT, **kwargs):
    """Run a script as a user does; returns the finished process, with all that it printed in stdout."""
    command = [*launcher(processes), Path(folder) / script, *map(str, flags)]
    kwargs = {"env": ENV, "timeout": 240, **kwargs}
    result = subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert not check or result.returncode == 0, result.stdout[-3000:]
    return result


@functools.cache
def forks():
    """Where forks come from: a process that has made the imports, which take longer than a small test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "scipy.stats", "PIL.Image", "tqdm"])
    with unittest.mock.patch.dict(os.environ, ENV):
        multiprocessing.forkserver.ensure_running()
    return context


def as_program(script, flags, variables, printed):
    """What a fork does to be `python SCRIPT FLAGS`, with environment variables, and a file for stdout and stderr."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    with open(printed, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # as where no fork server is
    sys.argv[:] = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def start(script, *flags, printed, processes=1, env=ENV):
    """A script in processes of its own, as torchrun starts them on one machine; returns these."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}  # fmt: skip
        variables = env | {name: str(value) for name, value in group.items()}
        flags = [str(flag) for flag in flags]
        ranks.append(forks().Process(target=as_program, args=(str(ROOT / script), flags, variables, printed)))
        ranks[-1].start()
    return ranks


def run_forked(script, *flags, processes=1, check=True):
    """As `run`, in forks of a process that has made the imports; returns exit status and what was printed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as printed:
        ranks, end = start(script, *flags, printed=printed.name, processes=processes), time.time() + 240
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks) and time.time() < end:
            multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], 1)
        is_late = time.time() >= end
        for pid in [pid for rank in ranks if rank.is_alive() for pid in (*descendants(rank.pid), rank.pid)]:
            os.kill(pid, signal.SIGKILL)  # one failed, or time is up: the others would wait for it, deaf to SIGTERM
        for rank in ranks:
            rank.join()
        failed = sorted((rank.exitcode for rank in ranks if rank.exitcode), reverse=True)  # SIGKILL's are below 0
        result = types.SimpleNamespace(returncode=failed[0] if failed else 0, stdout=printed.read())
    assert not is_late and (not check or not failed), result.stdout[-3000:]
    return result


def run_here(module, *flags):
    """The same in this process; returns what was printed."""
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
    ranks = start(script, *flags, "--out", out, printed=os.devnull, processes=processes, env=env)
    log = out / "log.jsonl"
    while all(rank.is_alive() for rank in ranks) and (not log.exists() or log.read_text().count("\n") < n_lines):
        time.sleep(0.01)
    for pid in [pid for rank in ranks for pid in (rank.pid, *descendants(rank.pid))]:
        os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()


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
