"""Each script is killed at a few random moments and run again: its records are those of a calm run.

python -m pytest tests/test_interrupted.py -m slow
"""

import contextlib
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT, surroundings
from test_scripts import SCRIPTS, command

KILLS = 2
FEWER = {"exp_truthfulqa": ["--table", "1"], "exp_toxigen": ["--map", "paper"]}  # to save time


def start(name, folder):
    argv = [
        sys.executable,
        ROOT / f"{name}.py",
        *command(name, *FEWER.get(name, [])),
        "--out",
        folder / "out",
    ]
    with open(folder / "said", "a") as said:
        environment = surroundings(folder / "cache")
        return subprocess.Popen(argv, env=environment, stdout=said, stderr=said)


def finish(name, folder):
    """Run a script to its end; returns records.csv."""
    assert start(name, folder).wait() == 0, (folder / "said").read_text()
    [path] = folder.glob("out/*/*/records.csv")
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_is_continued(name, tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    began = time.monotonic()
    wanted = finish(name, calm)
    seconds = time.monotonic() - began
    for _ in range(KILLS):
        process = start(name, killed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(seconds / 4, seconds))
        process.kill()
        process.wait()
    assert finish(name, killed) == wanted
