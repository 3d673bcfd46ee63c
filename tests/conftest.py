import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402

import command  # noqa: E402

torch.set_flush_denormal(True)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(main, "--flag", value, ...) -> (exit code, stdout, messages).

    Runs a command's main in this process, in an empty folder. Messages are the command's own lines
    on stderr, which start with error: or note:.
    """
    start_folder = Path.cwd()
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        command.note.cache_clear()
        code = 0
        try:
            command.run(main)
        except SystemExit as system_exit:
            code = system_exit.code
        out, err = capsys.readouterr()
        # Leave out progress bars and the warnings of libraries.
        lines = err.replace("\r", "\n").splitlines()
        messages = [line for line in lines if line.startswith(("error:", "note:"))]
        return code, out, "\n".join(messages)

    yield run
    assert Path.cwd() != start_folder  # monkeypatch.undo() leads back to the start folder's runs/


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()
