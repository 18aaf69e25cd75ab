"""Each script is killed at ten random moments and run again: it ends with the records of a run that nobody disturbed.

    pytest tests/test_interrupted.py -m slow

Half of the moments are drawn in time, half among the files that a run writes, of which half of the bytes are then on disk. A
process that has loaded everything forks the runs, since loading it takes longer than these runs do.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "data" / "toy" / "models"
SMALL = ["--data", str(ROOT / "data" / "toy"), "--sentences", "40", "--alpha", "2"]
ONE = ["--family", "toy", "--tgt", str(ZOO / "llama-s")]
RUNS = {  # the smallest settings that still visit every step
    "exp_emotion": [*ONE, "--src", str(ZOO / "llama-s"), "--limit", "2", "--random", "1", "--maps", "2", "--shots", "0",
                    "--pairs", "20"],
    "exp_truthfulqa": [*ONE, "--tgt-chat", str(ZOO / "llama-s-chat"), "--limit", "3", "--random", "1", "--maps", "2",
                       "--table", "all", "--generate", "1", "--layer", "0.75"],
    "exp_toxigen": [*ONE, "--tgt-chat", str(ZOO / "llama-s-chat"), "--limit", "1", "--validation", "1", "--pairs", "3",
                    "--random", "1", "--maps", "2", "--layer", "0.5", "--max-new-tokens", "2"],
    "exp_pretraining": ["--tgt", str(ZOO / "amber" / "step_0400"), str(ZOO / "amber" / "step_3000"), "--limit", "2",
                        "--random", "1", "--shots", "0", "--pairs", "10"],
    "exp_pythia": ["--models", str(ZOO / "pythia-1"), str(ZOO / "pythia-2"), "--limit", "2", "--random", "1", "--shots", "0",
                   "--pairs", "20"]}
RESULTS = ["records.csv", "records.jsonl", "examples.jsonl", "tables.md"]


# ================================================================ the process that forks


def serve():
    """For each line on stdin, a run in a fork, killed after so many seconds or in the middle of its n-th file; -> a line."""
    import matplotlib.pyplot                                        # noqa: F401  all that a run would have to load
    import sklearn.decomposition, sklearn.manifold                  # noqa: F401, E401
    import torch
    import transformers.models.bert, transformers.models.gpt_neox, transformers.models.llama, transformers.models.qwen2  # noqa
    from nnsight.modeling.transformers import TransformersModel     # noqa: F401
    sys.path.insert(0, str(ROOT))
    import common
    scripts = {name: __import__(name) for name in RUNS}
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        began, child = time.monotonic(), os.fork()
        if child == 0:
            try:
                run(common, scripts[job["script"]], job["folder"], job["file"], job["argv"])
            finally:
                os._exit(3)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if job["seconds"] is not None and time.monotonic() - began > job["seconds"]:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        print(json.dumps([os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began]), flush=True)


def run(common, script, folder: str, file: int | None, argv: list) -> None:
    """main() in this process, with a cache of its own; what it says goes to a file. Does not come back."""
    common.CACHE, written, write_whole = Path(folder) / "cache", [], common.write_whole

    def write_and_die(path, write):
        def half(to):
            buffer = io.BytesIO()
            write(buffer)
            to.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
            to.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write_whole(path, half if len(written) == file else write)
    common.write_whole = write_and_die
    with open(Path(folder) / "said", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            script.main([*argv, "--out", str(Path(folder) / "out")])
        except BaseException as error:
            print(type(error).__name__, error)
            said.flush()
            os._exit(1)
        print(f"\nfiles: {len(written)}")
    os._exit(0)


# ================================================================ the tests


@pytest.fixture(scope="module")
def fork():
    """fork(folder, script, seconds, file) -> exit code, seconds."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment)

    def ask(folder, script, seconds=None, file=None):
        folder.mkdir(exist_ok=True)
        job = {"script": script, "argv": [*RUNS[script], *SMALL], "folder": str(folder), "seconds": seconds, "file": file}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield ask
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(fork, tmp_path_factory):
    """undisturbed(script) -> its files, the seconds that it took, how many files it wrote."""
    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script)
        code, seconds = fork(folder, script)
        said = (folder / "said").read_text()
        assert code == 0, said
        return files(folder), seconds, int(said.split()[-1])
    return run


def files(folder: Path) -> dict[str, bytes]:
    """What a run and its cache hold, but for what was being written and for what says where it was run."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for part in ("out", "cache") for path in folder.glob(f"{part}/**/*") if path.is_file()
            and path.suffix not in (".tmp", ".pdf") and path.name not in ("args.json", "environment.json")}


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_ten_kills_change_nothing(script, fork, undisturbed, tmp_path):
    folder, rng, left, kills, ends, torn = tmp_path / "killed", random.Random(), {}, 0, 0, 0
    wanted, seconds, writes = undisturbed(script)
    assert all(any(name.endswith(f"/{result}") for name in wanted) for result in RESULTS) and writes > 10
    while kills < 10:
        ahead = len(wanted.keys() - left.keys())            # a moment of what is still to be done
        moment = ({"seconds": rng.uniform(0, seconds) * ahead / len(wanted)} if kills % 2 else
                  {"file": rng.randint(1, ahead + 2)})
        code, _ = fork(folder, script, **moment)
        left = files(folder)
        assert code in (0, -9), (folder / "said").read_text()
        assert left.items() <= wanted.items(), sorted(name for name in left if left[name] != wanted.get(name))
        kills += code == -9
        torn += len(list(folder.glob("**/*.tmp")))
        if code == 0:                           # it was through before its moment came; the next one begins again
            assert left == wanted
            ends, left = ends + 1, {}
            shutil.rmtree(folder)
    assert fork(folder, script)[0] == 0
    assert files(folder) == wanted
    assert torn                                 # some were killed while they wrote
    print(f"\n{script}: {seconds:.1f} s, {writes} files; ten kills, {ends} runs were through before their moment")


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_two_runs_of_the_same_arguments_are_identical(script, fork, undisturbed, tmp_path):
    assert fork(tmp_path, script)[0] == 0
    assert files(tmp_path) == undisturbed(script)[0]


if __name__ == "__main__":
    serve()
