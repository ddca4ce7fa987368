"""lib/jobs.py: processes side by side, each on a GPU that the user left visible."""

import subprocess
import sys

import pytest

from lib import jobs


class Process:
    """A subprocess.Popen that notes what it was given, and ends at once."""
    seen = []

    def __init__(self, command, env, **_):
        Process.seen.append((command, env, self))
        self.ended = False

    def wait(self):
        return 3

    def terminate(self):
        self.ended = True


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(jobs, "stopping", False)
    Process.seen.clear()


@pytest.mark.parametrize("visible, n_gpu, n_jobs, expected", [
    (None, 2, 4, ["0", "1", "0", "1"]), ("", 2, 4, ["0", "1", "0", "1"]),
    ("2,3", 2, 4, ["2", "3", "2", "3"]), ("5, GPU-abc,7", 3, 2, ["5", "GPU-abc", "5", "GPU-abc"]),
    ("4", 1, 4, ["4"] * 4), (None, 0, 4, [None] * 4)])
def test_jobs_take_turns_on_the_gpus_that_the_user_left_visible(
        monkeypatch, tmp_path, visible, n_gpu, n_jobs, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number in range(4):
        assert jobs.run_python(["a.py"], tmp_path / "log", number, n_jobs) == 3
    assert [env.get("CUDA_VISIBLE_DEVICES") for _, env, _ in Process.seen] == expected
    assert Process.seen[0][0] == [sys.executable, "a.py"]


def test_a_process_that_starts_while_all_are_stopped_is_stopped_too(tmp_path):
    jobs.stop_all()
    jobs.run_python(["a.py"], tmp_path / "log", 0, 1)
    assert Process.seen[0][2].ended and not jobs.running
