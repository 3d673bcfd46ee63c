"""Commands in processes of their own, started from a server that has imported them already.

Starting Python and importing torch, transformers and our files takes 4 to 6 seconds each time; the
server does it once, and each process is a fork of it. Tests of torchrun itself start torchrun.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from conftest import ROOT

os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the server
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["reflow", "distill", "evaluate", "sample", "lpips"])


class Process:
    """What subprocess.Popen would be."""

    def __init__(self, folder: Path, name: str, arguments: list, **more):
        more.setdefault("log", folder / f"{name}.log")
        self.process = SERVER.Process(
            target=command_in, args=(str(folder), name, [*map(str, arguments)]), kwargs=more)
        self.process.daemon = True  # ends with the tests
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def command_in(
    folder: str, name: str, arguments: list[str], log: Path, env: dict | None = None,
    file_limit: int | None = None, threads: int | None = None,
) -> None:
    """In the process: `python NAME.py arguments` in this folder, with small shards."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does where it starts
    os.environ.update(env or {})
    os.chdir(folder)
    import torch

    import command
    import pairs

    if threads:
        torch.set_num_threads(threads)
    pairs.PAIRS_PER_SHARD = 16
    sys.argv = [name, *arguments]
    command.run(__import__(name).main)


def start_two(folders: list[Path], name: str, arguments: list) -> list[Process]:
    """The command in two processes that find each other as under torchrun, a thread each.

    folders: one for both, or one for each. What they print goes to "log" in the first folder.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for folder in folders:
        folder.mkdir(exist_ok=True, parents=True)
    return [
        Process(folders[-rank], name, arguments, log=folders[0] / "log", threads=1,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
