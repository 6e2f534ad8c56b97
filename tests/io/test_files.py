import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lightning_sgm.io.files import atomic_write, write_json


def test_the_file_appears_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "x.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with atomic_write(str(path)) as file:
        torch.save({"x": torch.arange(3)}, file)
    assert torch.load(path, weights_only=True)["x"].tolist() == [0, 1, 2]
    assert os.listdir(path.parent) == ["x.bin"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "atomic") as file:
        file.write(b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\nfrom lightning_sgm.io.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(ValueError, match=r"cannot write .*file/x.*choose a folder"),
        atomic_write(tmp_path / "file" / "x"),
    ):
        pass
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(ValueError, match="Permission denied"), atomic_write(closed / "x"):
            pass


def test_json(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"nll": 1.5, "bad": [float("nan"), float("inf")], "name": "Müller", "n": 3, "none": None})
    assert json.loads(path.read_text()) == {"nll": 1.5, "bad": [None, None], "name": "Müller", "n": 3, "none": None}
    assert "Müller" in path.read_text()
    with pytest.raises(TypeError, match="Tensor"):
        write_json(path, {"nll": torch.tensor(1.0)})
    assert json.loads(path.read_text())["n"] == 3
