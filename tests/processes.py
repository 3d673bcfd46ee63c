"""Run commands in subprocesses, forked from a server that has already imported the commands.

Starting Python and importing torch, transformers and our files takes 4 to 6 seconds. The server
does it once, and each process is a fork of the server. Tests of torchrun itself start torchrun.
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
    """A command in a forked process, with the interface of subprocess.Popen."""

    def __init__(self, folder: Path, name: str, arguments: list, **options):
        options.setdefault("log", folder / f"{name}.log")
        self.process = SERVER.Process(
            target=run_command, args=(str(folder), name, [*map(str, arguments)]), kwargs=options)
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


def run_command(
    folder: str, name: str, arguments: list[str], log: Path, env: dict | None = None,
    file_limit: int | None = None, threads: int | None = None,
) -> None:
    """Run `python NAME.py arguments` in the folder, with 16 pairs a shard.

    log: file for stdout and stderr. file_limit: bytes per file, in place of a full disk.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at startup
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


def start_two_processes(folders: list[Path], name: str, arguments: list) -> list[Process]:
    """Start the command in two processes that connect as under torchrun, with one thread each.

    folders: one folder for both processes, or one for each. Both print to "log" in the first.
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
