import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402

import command  # noqa: E402

torch.set_flush_denormal(True)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command's main in this process, in an empty folder: call(main, "--flag", value, ...)
    -> (code, out, err).
    """
    outside = Path.cwd()
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        command.note.cache_clear()
        code = 0
        try:
            command.run(main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        # Progress bars and warnings of libraries are not ours; what a command says starts with
        # error: or note:.
        lines = err.replace("\r", "\n").splitlines()
        said = [line for line in lines if line.startswith(("error:", "note:"))]
        return code, out, "\n".join(said)

    yield run
    assert Path.cwd() != outside  # in whose runs/ it would be, as after monkeypatch.undo()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()
