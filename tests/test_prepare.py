"""data/prepare.py: what it leaves in the folder, what it says, and what the real files hold.

    pytest tests/test_prepare.py

No test needs a network. Those on the real data need a copy of it in ../shared/data and are skipped without one.
"""

import csv
import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {  # a small stand-in for the real files, with one file without a public address
    "emotions/anger.json": b'["a"]',
    "truthfulqa/mc_task.json": b"[]" * 5000,
    "text/owt_sentences_lowtox.txt": b"One sentence.\n",
}
PUBLIC = [path for path in FILES if not path.startswith("text/")]


@pytest.fixture
def prepare(monkeypatch):
    """The script as a module, with the checksums of FILES."""
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PINS", {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()})
    return module


@pytest.fixture
def run(prepare, monkeypatch, capsys):
    """Call main() with these options: exit code, stdout, lines on stderr."""

    def call(*options) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, options)])
        code = prepare.main()
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


@pytest.fixture
def folder(tmp_path):
    """FILES on disk, as --from takes them."""
    for path, data in FILES.items():
        (tmp_path / "from" / path).parent.mkdir(parents=True)
        (tmp_path / "from" / path).write_bytes(data)
    return tmp_path / "from"


@pytest.fixture
def server(prepare, monkeypatch):
    """A loopback server in the place of GitHub. `send` makes (Content-Length or None, body) of a file's bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            name = self.path.rsplit("/", 1)[1]
            length, body = server.send(next(data for path, data in FILES.items() if path.endswith(f"/{name}")))
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.send = [], lambda data: (len(data), data)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(prepare, "RAW", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- downloads


def test_download_then_second_run_asks_for_nothing(run, server, tmp_path):
    code, out, err = run("--to", tmp_path)
    assert (code, err) == (0, [])
    assert files_in(tmp_path) == {path: FILES[path] for path in PUBLIC}
    assert [asked.rsplit("/", 1)[1] for asked in server.asked] == ["anger.json", "mc_task.json"]
    assert "2 files fetched, 0 already there" in out

    code, out, _ = run("--to", tmp_path)
    assert code == 0 and len(server.asked) == 2
    assert "0 files fetched, 2 already there" in out


def test_file_without_public_address_is_named_in_the_last_line(run, server, tmp_path):
    code, out, _ = run("--to", tmp_path)
    assert code == 0
    assert out.splitlines()[-1].startswith("not fetched: text/owt_sentences_lowtox.txt:")

    own = tmp_path / "text" / "owt_sentences_lowtox.txt"
    own.parent.mkdir(exist_ok=True)
    own.write_text("My own sentence.\n")
    code, out, _ = run("--to", tmp_path)
    assert code == 0 and own.read_text() == "My own sentence.\n"
    assert out.splitlines()[-1].startswith("not the pinned sample, left as it is:")


@pytest.mark.parametrize(
    "send, said",
    [
        (lambda data: (len(data), data[: len(data) // 2]), "cannot download"),  # the connection breaks off
        (lambda data: (None, data[: len(data) // 2]), "wrong sha256"),  # it ends early and nobody can tell
        (lambda data: (6, b"<html>"), "wrong sha256"),  # somebody's login page
    ],
    ids=["broken off", "cut short", "another file"],
)
def test_bad_download_leaves_nothing(run, server, tmp_path, send, said):
    server.send = send
    code, _, err = run("--to", tmp_path, "--only", "truthfulqa")
    assert code == 2 and files_in(tmp_path) == {}
    assert len(err) == 1 and said in err[0] and "--from" in err[0]


def test_run_after_a_failure_fetches_only_the_rest(run, server, tmp_path):
    server.send = lambda data: (len(data), data if len(data) < 100 else b"0" * len(data))
    assert run("--to", tmp_path)[0] == 2
    assert list(files_in(tmp_path)) == ["emotions/anger.json"]
    server.asked.clear()
    server.send = lambda data: (len(data), data)
    assert run("--to", tmp_path)[0] == 0
    assert len(server.asked) == 1 and files_in(tmp_path).keys() == set(PUBLIC)


def test_interrupted_download_leaves_nothing(run, server, tmp_path, monkeypatch):
    import pooch

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.core, "hash_matches", interrupt)  # Ctrl-C once the bytes are on disk
    code, _, err = run("--to", tmp_path)
    assert code == 130 and len(err) == 1 and files_in(tmp_path) == {}


def test_no_server_is_one_line(prepare, run, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "RAW", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code, _, err = run("--to", tmp_path)
    assert code == 2 and len(err) == 1 and "check the network" in err[0] and files_in(tmp_path) == {}


# --- --from


def test_from_copies_all_and_keeps_what_is_right(run, folder, tmp_path):
    to = tmp_path / "to"
    assert run("--from", folder, "--to", to)[0] == 0
    assert files_in(to) == FILES
    before = {file: file.stat().st_mtime_ns for file in to.rglob("*.*")}
    assert "0 files fetched, 3 already there" in run("--from", folder, "--to", to)[1]
    assert {file: file.stat().st_mtime_ns for file in to.rglob("*.*")} == before

    (to / "emotions" / "anger.json").write_text("damaged")
    assert "1 files fetched, 2 already there" in run("--from", folder, "--to", to)[1]
    assert files_in(to) == FILES


def test_from_with_wrong_checksum_leaves_nothing(run, folder, tmp_path):
    (folder / "emotions" / "anger.json").write_text("[]")
    code, _, err = run("--from", folder, "--to", tmp_path / "to")
    assert code == 2 and files_in(tmp_path / "to") == {}
    assert len(err) == 1 and "wrong sha256" in err[0] and "anger.json" in err[0]


def test_from_with_missing_folder_or_file_is_one_line(run, folder, tmp_path):
    (folder / "truthfulqa" / "mc_task.json").unlink()
    for source, name in ((tmp_path / "nowhere", "nowhere"), (folder, "mc_task.json")):
        code, _, err = run("--from", source, "--to", tmp_path / "to")
        assert code == 2 and len(err) == 1 and name in err[0]


def test_from_without_the_text_sample_is_no_failure(run, folder, tmp_path):
    (folder / "text" / "owt_sentences_lowtox.txt").unlink()  # what a download leaves
    code, out, _ = run("--from", folder, "--to", tmp_path / "to")
    assert code == 0 and out.splitlines()[-1].startswith("not fetched: text/")


def test_only_takes_no_more_than_it_names(run, folder, tmp_path):
    assert run("--from", folder, "--to", tmp_path / "to", "--only", "text")[0] == 0
    assert list(files_in(tmp_path / "to")) == ["text/owt_sentences_lowtox.txt"]


def test_target_that_cannot_be_written_is_one_line(run, folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code, _, err = run("--from", folder, "--to", tmp_path / "file" / "to")
    assert code == 2 and len(err) == 1 and "--to" in err[0]

    def refuse(*_, **__):  # chmod would not stop a test that runs as root
        raise PermissionError("pooch's own text, without a file name")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    code, _, err = run("--from", folder, "--to", tmp_path / "to")
    assert code == 2 and len(err) == 1 and "permission denied" in err[0] and "Traceback" not in err[0]


# --- the command, and the real files


def test_help_is_quick():
    start = time.perf_counter()
    out = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--from" in out and time.perf_counter() - start < 1


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder that the command makes of the real files."""
    if not REAL.is_dir():
        pytest.skip("needs a copy of the real data in ../shared/data")
    to = tmp_path_factory.mktemp("paper")
    done = subprocess.run([sys.executable, SCRIPT, "--from", REAL, "--to", to], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "41 files fetched" in done.stdout and "hateful" in done.stdout
    return to


def test_real_emotions(real):
    names = ("happiness", "sadness", "anger", "fear", "disgust", "surprise")
    lists = [json.loads((real / "emotions" / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    assert [len(scenarios) for scenarios in lists] == [203, 228, 203, 203, 205, 208]


def test_real_truthfulqa(real):
    questions = json.loads((real / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    choices = [list(question["mc1_targets"].values()) for question in questions]
    assert len(questions) == 817 and sum(map(len, choices)) == 4114
    assert all(labels[0] == 1 and sum(labels) == 1 for labels in choices)  # the right one always comes first
    assert 100 * sum(1 / len(labels) for labels in choices) / 817 == pytest.approx(22.6056, abs=5e-5)


def test_real_toxigen(real):
    lines = {file.name: file.read_text(encoding="utf-8").splitlines() for file in (real / "toxigen").iterdir()}
    assert len(lines) == 31 and {len(each) for each in lines.values()} == {1000}
    assert "neutral_trans_1k.txt" not in lines and "hate_trans_1k.txt" in lines
    for name, different in (("hate_native_american", 120), ("hate_latino", 556), ("neutral_latino", 120)):
        assert len(set(lines[f"{name}_1k.txt"])) == different
    doubled = {name for name, each in lines.items() if any("\\\\" in line for line in each)}
    assert doubled == {"hate_black_1k.txt", "hate_lgbtq_1k.txt"}


def test_real_wikisplit_facts_and_text(real):
    pairs = (real / "wikisplit" / "validation.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(pairs) == 5000 and all(pair.count("\t") == 1 and "<::::>" in pair for pair in pairs)
    with open(real / "world_facts" / "facts_true_false.csv", encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 612 and labels.count("1") == 306
    sentences = (real / "text" / "owt_sentences_lowtox.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(sentences) == 2379 and len(set(sentences)) == 2372
