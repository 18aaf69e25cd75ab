"""data/prepare.py: what it leaves in the folder, and what it says. No test needs a network.

pytest tests/test_prepare.py
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prepare as script

import pytest

FILES = {  # a small stand-in for the real files, one without a public address
    "emotions/anger.json": b'["a"]',
    "truthfulqa/mc_task.json": b"[]" * 5000,
    "text/owt_sentences_lowtox.txt": b"One sentence.\n",
}
PUBLIC = [path for path in FILES if not path.startswith("text/")]


@pytest.fixture
def prepare(monkeypatch):
    """The script as a module, with the checksums of FILES."""
    pins = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    monkeypatch.setattr(script, "PINS", pins)
    return script


@pytest.fixture
def run(prepare, capsys):
    """run(option, …) -> what main() prints."""

    def call(*argv):
        capsys.readouterr()
        texts = [str(each) for each in argv]
        prepare.main(texts)
        return capsys.readouterr().out

    return call


@pytest.fixture
def folder(tmp_path):
    """FILES on disk, as --from takes them."""
    for path, content in FILES.items():
        (tmp_path / "from" / path).parent.mkdir(parents=True)
        (tmp_path / "from" / path).write_bytes(content)
    return tmp_path / "from"


@pytest.fixture
def server(prepare, monkeypatch):
    """A loopback server in place of GitHub; send(content) gives (Content-Length or None, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path.rsplit("/", 1)[1])
            path = next(path for path in FILES if path.endswith(f"/{server.asked[-1]}"))
            length, body = server.send(FILES[path])
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.send = lambda content: (len(content), content)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(prepare, "RAW", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    found = {}
    for path in folder.rglob("*.*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_second_run_downloads_nothing(run, server, tmp_path):
    printed = run("--to", tmp_path)
    assert files_in(tmp_path) == {path: FILES[path] for path in PUBLIC}
    assert server.asked == ["anger.json", "mc_task.json"]
    assert "2 files fetched, 0 already there" in printed
    assert printed.splitlines()[-1].startswith("not fetched: text/owt_sentences_lowtox.txt:")
    assert "0 files fetched, 2 already there" in run("--to", tmp_path)
    assert len(server.asked) == 2


def test_a_text_sample_of_ones_own_is_kept(run, server, tmp_path):
    own = tmp_path / "text" / "owt_sentences_lowtox.txt"
    own.parent.mkdir()
    own.write_text("My own sentence.\n")
    assert "not the pinned sample, kept" in run("--to", tmp_path)
    assert own.read_text() == "My own sentence.\n"


@pytest.mark.parametrize(
    "send, said",
    [
        (lambda content: (len(content), content[:10]), "cannot download"),  # it breaks off
        (lambda content: (None, content[:10]), "wrong sha256"),  # it ends early
        (lambda content: (6, b"<html>"), "wrong sha256"),  # a login page
    ],
)
def test_a_bad_download_leaves_nothing(prepare, server, tmp_path, one_line, send, said):
    server.send = send
    one_line(lambda: prepare.main(["--to", str(tmp_path), "--only", "truthfulqa"]), said, "--from")
    assert files_in(tmp_path) == {}


def test_no_server(prepare, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(prepare, "RAW", "http://127.0.0.1:1")
    one_line(lambda: prepare.main(["--to", str(tmp_path)]), "check the network")


def test_from_copies_what_is_not_there(run, folder, tmp_path):
    to = tmp_path / "to"
    run("--from", folder, "--to", to)
    assert files_in(to) == FILES
    (to / "emotions" / "anger.json").write_text("damaged")
    assert "1 files fetched, 2 already there" in run("--from", folder, "--to", to)
    assert files_in(to) == FILES


def test_only(run, folder, tmp_path):
    run("--from", folder, "--to", tmp_path / "to", "--only", "text")
    assert list(files_in(tmp_path / "to")) == ["text/owt_sentences_lowtox.txt"]


def test_from_a_bad_folder(prepare, folder, tmp_path, one_line):
    argv = ["--from", str(folder), "--to", str(tmp_path / "to")]
    one_line(lambda: prepare.main(["--from", str(tmp_path / "nowhere")]), "nowhere")
    (folder / "emotions" / "anger.json").write_text("[]")
    one_line(lambda: prepare.main(argv), "wrong sha256", "anger.json")
    assert files_in(tmp_path / "to") == {}
    (folder / "emotions" / "anger.json").unlink()
    one_line(lambda: prepare.main(argv), "no such file", "anger.json")


def test_a_folder_that_cannot_be_written(prepare, folder, tmp_path, one_line):
    (tmp_path / "file").touch()
    to = tmp_path / "file" / "to"
    argv = ["--from", str(folder), "--to", str(to)]
    one_line(lambda: prepare.main(argv), "--to")
