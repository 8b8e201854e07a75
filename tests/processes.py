"Starting scripts in several processes as a person does, and what they must print when they end."

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

LIMIT = 240  # seconds, for a machine under load: a deadlock would last for distributed.TIMEOUT


def torchrun(folder, line, processes=2, flags="--standalone", **env):
    "Start torchrun in a folder on a script's command line; the script is in this folder, or one of the project."
    script, *words = shlex.split(line)
    script = folder / script if (folder / script).exists() else ROOT / script
    command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, script, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def finish(process):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    return out


def check_stopped(process, *texts, start="error: "):
    "Its processes ended with one line, before the report of torchrun, which ends with code 1."
    out, err = process.communicate(timeout=LIMIT)
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "stopped: ", "warning: "))]
    assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith(start), out + err
    assert err.count("Traceback") == 1, err  # torchrun's own
    assert all(text in lines[0] for text in texts), lines[0]
    return lines[0]


def pids_of(process):
    "The processes that a torchrun has started: rank -> pid. (Linux)"
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and b".py" in (folder / "cmdline").read_bytes():
                env = dict(x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x)
                found[int(env["LOCAL_RANK"])] = int(folder.name)
        except (OSError, KeyError):  # it has ended, or is a fork that has not started yet
            continue
    return found


def two_machines(folders, line, **env):
    "A torchrun in each folder, as on two machines: they meet at an address of this one."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = f"--nnodes 2 --rdzv-backend c10d --rdzv-id test --rdzv-endpoint 127.0.0.1:{port}"
    return [torchrun(f, line, 1, f"{meet} --local-addr 127.0.0.{k}", **env) for k, f in enumerate(folders, 1)]
