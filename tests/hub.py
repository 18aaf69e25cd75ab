"""A Hugging Face hub on loopback, enough for from_pretrained and snapshot_download.

    with Hub({"some/model": {"early": folder, "late": folder}}) as hub:
        subprocess.run(..., env=hub.surroundings(tmp_path))
        assert hub.loaded == [("some/model", "early", "model.safetensors")]

Each revision is a folder.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Serves {repo: {revision: folder}} in a with block; `loaded` lists the weights asked for."""

    def __init__(self, repos):
        self.folders = {
            (repo, revision): Path(folder)
            for repo, own in repos.items()
            for revision, folder in own.items()
        }
        self.loaded = []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):  # not on the tests' stderr
                pass

            def do_GET(self):
                status, body, headers = hub.answer(self.path.split("?")[0], self.command)
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo, revision):
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def answer(self, path, command):
        """(status, body, headers) of one request."""
        for (repo, revision), folder in self.folders.items():
            commit = self.commit(repo, revision)
            for name in (revision, commit):
                start = f"/{repo}/resolve/{name}/"
                if path.startswith(start) and (file := folder / path.removeprefix(start)).is_file():
                    body = file.read_bytes()
                    if command == "GET" and file.suffix in (".safetensors", ".bin"):
                        self.loaded.append((repo, revision, file.name))
                    return (
                        200,
                        body,
                        {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit},
                    )
                if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/{name}"):
                    files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    return (
                        200,
                        json.dumps(
                            {"_id": "0", "id": repo, "sha": commit, "siblings": files}
                        ).encode(),
                        {},
                    )
                if path == f"/api/models/{repo}/tree/{name}":
                    files = [
                        {
                            "type": "file",
                            "path": file.name,
                            "size": file.stat().st_size,
                            "oid": "0" * 40,
                        }
                        for file in sorted(folder.iterdir())
                    ]
                    return 200, json.dumps(files).encode(), {}
        known = any(
            path.startswith((f"/{repo}/", f"/api/models/{repo}")) for repo, _ in self.folders
        )
        return 404, b"{}", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}

    def surroundings(self, home):
        """The environment of a process that asks this hub and keeps its files in its own folder."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        return {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE_"))
        } | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(home / "hf"),
            "CONTRANS_CACHE": str(home / "cache"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
        }
