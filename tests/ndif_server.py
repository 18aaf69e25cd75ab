"""A stand-in for NDIF on loopback: nnsight 0.8.1's protocol in one process, with faults on demand.

    with serve({"toy/llama-m": folder}) as server:
        server.fault("cut")  # the next job loses its websocket while it runs
        subprocess.run(..., env=hub.surroundings(tmp_path) | {"NDIF_HOST": server.url})
        assert [job["status"] for job in server.log()] == ["CUT", "COMPLETED"]

By hand: `python tests/ndif_server.py --port 18001 --model toy/llama-m=FOLDER` prints its port and
its control port. It is a process of its own because client and server must not share nnsight's
caches of source code. It needs no more than the standard library, since no package of
requirements.txt brings a websocket server. The answers are those of ndif 0.1.2.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import linecache
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NO_KEY = "Missing or invalid API key. Please visit https://login.ndif.us/ to create a new one."
BAD_KEY = "Invalid API key format: '{}'. API keys must be in the format: xxxxxxxx-xxxx-xxxx-xxxx."
TRACEBACK = 'Traceback (most recent call last):\n  File "/client/script.py", line 7, in work\n'
REFUSED = {  # answers to POST /request; 502 comes from a proxy and is not JSON
    "500": "Internal server error.",
    "502": None,
    "503": "Service temporarily unavailable: compute backend is reconnecting. Please try again.",
}
FAILED = {  # jobs that end with Status.ERROR
    "error": f"{TRACEBACK}RuntimeError: injected",
    "cuda": f"{TRACEBACK}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.",
    "timeout": "Your job exceeded the execution timeout of 60.0s.",
    "cancelled": "Your job was cancelled or preempted by the server.",
}
# In the order of a job's life. 400: the key is malformed, and the answer repeats it; subscribe: no
# websocket (503); gone: POST is not answered; cut: the websocket is lost while the job runs; lost:
# the result's URL answers 404; slow: the job runs long.
FAULTS = {*REFUSED, *FAILED, "400", "subscribe", "gone", "cut", "lost", "slow"}
INLINE = 8 * 2**20  # a larger result comes as a URL [bytes]


# ================================================================ in the test's process


class Server:
    """Starts the server. Its control port stays open when the server itself is stopped."""

    def __init__(self, models, needs_key=None):
        command = [sys.executable, __file__, "--parent", str(os.getpid())]
        for name, folder in models.items():
            command += ["--model", f"{name}={folder}"]
        ours = ("NDIF_", "PYTHON", "HF_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            command, cwd="/", env=env, text=True, stdout=subprocess.PIPE
        )
        self.port, self.control = map(int, self.process.stdout.readline().split())
        self.url = f"http://127.0.0.1:{self.port}"
        self.set(needs_key=needs_key)

    def _ask(self, **what):
        url = f"http://127.0.0.1:{self.control}/control"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy
        with opener.open(url, json.dumps(what).encode(), timeout=60) as answer:
            return json.load(answer)

    def fault(self, kind, count=1, after=0, seconds=1.0):
        """Let `after` jobs pass, then do this to `count` of them. Earlier faults come first."""
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}: {', '.join(sorted(FAULTS))}")
        self._ask(do="fault", kind=kind, count=count, after=after, seconds=seconds)

    def log(self):
        """The jobs that were asked for, in order.

        status, fault, unfinished (jobs that were here before), up and down [bytes], key (one came),
        lines (its prints), modules (packages that its code names), bytecode (it needs this version
        of Python)."""
        return self._ask(do="log")

    def set(self, **what):
        """running: models that run (None: all). deploys: those that run when a job asks for them.
        listed: models in its status (None: all).

        needs_key: the only key that is accepted."""
        self._ask(do="set", **what)

    def stop(self):
        """Cut every connection and close the port. Log and faults are kept."""
        self._ask(do="stop")

    def start(self):
        self._ask(do="start")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def serve(models, **options):
    server = Server(models, **options)
    try:
        yield server
    finally:
        server.close()


# ================================================================ in the process of the server


class Job:
    """One request, and the way back to the client."""

    def __init__(self, ndif, envelope, blob, entry, fault):
        self.ndif, self.envelope, self.blob = ndif, envelope, blob
        self.entry, self.fault = entry, fault
        self.id, self.lines = uuid.uuid4().hex, ""

    @property
    def client(self):
        return self.ndif.clients.get(self.envelope.session_id)

    def say(self, status, text="", data=None):
        """Send a status on the client's websocket; a result travels in a binary frame."""
        from nnsight.schema.response import ResponseModel

        answer = ResponseModel(id=self.id, status=status, description=text, data=data)
        if status in ("COMPLETED", "ERROR"):
            self.entry["status"] = status
        if self.client is None:  # the client has left; its job runs on, as on NDIF
            return
        with contextlib.suppress(OSError):
            if isinstance(data, bytes):
                self.client.frame(2, answer.pickle())
            else:
                self.client.frame(1, answer.model_dump_json().encode())

    def write(self, text):
        """stdout and stderr of the job: each line goes to the client."""
        *lines, self.lines = (self.lines + text).split("\n")
        for line in lines:
            self.entry["lines"].append(line)
            self.say("LOG", line)

    def flush(self):
        pass

    def work(self):
        kind = self.fault.get("kind")
        self.say("QUEUED", "Added to Queue at position 1.")
        name = name_of(self.envelope.model_key)
        if name in self.ndif.deploys:  # as NDIF does when a job asks for a model
            self.say("QUEUED", "The model is being deployed.")
            self.ndif.running.append(name)
        if name not in self.ndif.running:
            return self.say("ERROR", f"Could not deploy this model. Repository Not Found: {name}")
        self.say("DISPATCHED", "Your job has been sent to the model deployment.")
        self.say("RUNNING", "Your job has started running.")
        if kind == "cut" and self.client:
            self.entry["status"] = "CUT"
            return self.client.hang_up()
        if kind in FAILED:
            return self.say("ERROR", FAILED[kind])
        time.sleep(self.fault["seconds"] if kind == "slow" else 0)
        try:
            with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
                result = self.ndif.execute(self)
        except BaseException as error:  # as NDIF does, its traceback goes to the client
            from nnsight.tracing.util import clean_traceback

            error = error.with_traceback(clean_traceback(error.__traceback__))
            return self.say("ERROR", "".join(traceback.format_exception(error)))
        self.entry["down"] = len(result)
        if len(result) > INLINE or kind == "lost":
            self.ndif.results[self.id] = result if kind != "lost" else None
            result = f"http://127.0.0.1:{self.ndif.port}/blob/{self.id}"
        self.say("COMPLETED", "Your job has been completed.", result)


def name_of(key):
    """REPO or REPO@REVISION, of nnsight's key of a model."""
    wanted = json.loads(key.split(":", 1)[1])
    revision = wanted.get("revision")
    return wanted["repo_id"] if revision in (None, "main") else f"{wanted['repo_id']}@{revision}"


def noting_unpickler(entry):
    """nnsight's unpickler, which also notes in a job's log entry what the job is made of."""
    from cloudpickle import cloudpickle
    from nnsight.intervention.serialization import CustomCloudUnpickler

    def note(module):
        entry["modules"] = sorted({*entry["modules"], module.split(".")[0]})

    def builtin_type(kind):  # cloudpickle's way for what has no source
        entry["bytecode"] = entry["bytecode"] or kind == "CodeType"
        return cloudpickle._builtin_type(kind)

    def subimport(module):  # a module that the code has as a global
        note(module)
        return cloudpickle.subimport(module)

    class Noting(CustomCloudUnpickler):
        def find_class(self, module, name):
            note(module)
            known = {"_builtin_type": builtin_type, "subimport": subimport}
            return known[name] if name in known else super().find_class(module, name)

    return Noting


class Ndif:
    """Models, jobs and log of the server. One job runs at a time, in one thread."""

    def __init__(self, models, port):
        self.models, self.running, self.needs_key, self.port = models, list(models), None, port
        self.deploys, self.listed = [], None
        self.loaded, self.clients, self.results = {}, {}, {}
        self.faults, self.entries, self.jobs, self.open = [], [], queue.Queue(), set()
        threading.Thread(target=self.run_jobs, daemon=True).start()
        self.start()

    def start(self):
        handler = type("Bound", (Handler,), {"ndif": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads, self.port = True, self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        for handler in list(self.open):
            handler.hang_up()

    def run_jobs(self):
        while True:
            self.jobs.get().work()

    def next_fault(self, subscribe):
        """The fault of this request, {} for none; one of a websocket waits for a websocket."""
        for fault in self.faults:
            if (fault["kind"] == "subscribe") != subscribe:
                continue
            if fault["after"]:
                fault["after"] -= 1
            elif fault["count"]:
                fault["count"] -= 1
                return fault
        return {}

    def model(self, key):
        import torch
        from nnsight.modeling.transformers import TransformersModel

        if key not in self.loaded:
            self.loaded[key] = TransformersModel(
                self.models[name_of(key)],
                task="text-generation",
                dispatch=True,
                dtype=torch.float32,
            )
            self.loaded[key]._module.requires_grad_(False)
        return self.loaded[key]

    def execute(self, job):
        """Run a job as nnsight does on a server; returns the saved values as they are sent back."""
        import torch
        import zstandard
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.globals import BLOCKS, SOURCES
        from nnsight.tracing.tracer import _saves, dec, inc

        model = self.model(job.envelope.model_key)
        caches = [(cache, dict(cache)) for cache in (linecache.cache, SOURCES, BLOCKS)]
        try:
            model._remoteable_set_env(job.envelope.env)
            tracer = RequestModel.deserialize(
                job.blob,
                model._remoteable_persistent_objects(),
                job.envelope.compress,
                noting_unpickler(job.entry),
            )
            inc()
            try:
                tracer.execute(tracer.info.code)
                values = tracer.info.frame.f_locals
                saved = {name: value for name, value in values.items() if id(value) in _saves()}
            finally:
                dec()
        finally:  # another job may have other code at the same line of the same file
            model.interleaver.cancel()  # what a failed job left hanging
            for cache, before in caches:
                cache.clear()
                cache.update(before)
        file = io.BytesIO()
        torch.save(saved, file)
        if job.envelope.compress:
            return zstandard.ZstdCompressor(level=3).compress(file.getvalue())
        return file.getvalue()

    def status(self):
        deployments = {}
        for name in self.models if self.listed is None else self.listed:
            repo, _, revision = name.partition("@")
            about = {"repo_id": repo, "revision": revision or "main", "task": "text-generation"}
            if name in self.running:
                about |= {"application_state": "RUNNING", "deployment_level": "HOT"}
            deployments[f"ModelActor:{name}"] = about
        return {"deployments": deployments}

    def control(self, do, **what):
        if do == "log":
            return self.entries
        if do == "fault":
            self.faults.append(what)
        elif do == "set":
            if "running" in what and what["running"] is None:
                what["running"] = list(self.models)
            vars(self).update(what)
        else:
            getattr(self, do)()  # stop, start


class Handler(BaseHTTPRequestHandler):
    """The public port."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.sending = threading.Lock()
        self.ndif.open.add(self)

    def finish(self):
        self.ndif.open.discard(self)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self):
        with contextlib.suppress(OSError):  # cut by the client, or by stop()
            super().handle()

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status, body, content="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "subscribe":
            if self.ndif.next_fault(subscribe=True):
                return self.reply(503, {"detail": REFUSED["503"]})
            return self.subscribe()
        if kind == "status":
            return self.reply(200, self.ndif.status())
        if kind == "env":
            from nnsight.ndif import get_local_env

            return self.reply(200, get_local_env())
        result = self.ndif.results.get(rest)
        if result is None:
            return self.reply(404, {"detail": "Not Found"})
        self.reply(200, result, "application/octet-stream")

    def do_POST(self):
        from nnsight.schema.request import RequestModel
        from nnsight.schema.response import ResponseModel

        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.ndif.next_fault(subscribe=False)
        kind, key = fault.get("kind"), self.headers["ndif-api-key"]
        unfinished = [each for each in self.ndif.entries if each["status"] is None]
        entry = {
            "status": "REFUSED",
            "unfinished": len(unfinished),
            "fault": kind,
            "key": bool(key),
            "up": len(body),
            "lines": [],
            "modules": [],
            "bytecode": False,
        }
        self.ndif.entries.append(entry)
        if self.ndif.needs_key not in (None, key):
            return self.reply(401, {"detail": NO_KEY})
        if kind == "400":
            return self.reply(400, {"detail": BAD_KEY.format(key)})
        if kind == "gone":
            return self.hang_up()
        if kind in REFUSED:
            text = REFUSED[kind]
            return self.reply(int(kind), {"detail": text} if text else b"<html>Bad Gateway</html>")
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        form = {}
        for part in body.split(boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            form["blob" if b'name="blob"' in head else "data"] = content.removesuffix(b"\r\n")
        envelope = RequestModel.model_validate_json(form["data"])
        job = Job(self.ndif, envelope, form["blob"], entry, fault)
        text = "Your job has been received and is waiting to be queued."
        answer = ResponseModel(id=job.id, status="RECEIVED", description=text)
        self.reply(200, answer.model_dump_json().encode())
        entry["status"] = None
        self.ndif.jobs.put(job)

    def subscribe(self):
        """The websocket: only the server sends on it, until the client closes it or is gone."""
        name = uuid.uuid4().hex
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        self.ndif.clients[name] = self
        try:
            self.frame(1, json.dumps({"session_id": name}).encode())
            if self.rfile.read(1):  # the client sends nothing but its goodbye, and waits for ours
                self.frame(8, b"\x03\xe8")
        finally:
            del self.ndif.clients[name]

    def frame(self, kind, data):
        """One whole websocket frame: 1 text, 2 binary, 8 close."""
        size = len(data)
        if size < 126:
            length = bytes([size])
        elif size < 2**16:
            length = b"\x7e" + size.to_bytes(2, "big")
        else:
            length = b"\x7f" + size.to_bytes(8, "big")
        with self.sending:
            self.wfile.write(bytes([0x80 | kind]) + length + data)


class Control(Handler):
    """The control port, which stop() leaves alone."""

    setup = BaseHTTPRequestHandler.setup

    def do_POST(self):
        what = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(200, self.ndif.control(**what))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], metavar="ID=FOLDER")
    parser.add_argument("--parent", type=int, help="end when this process has ended")
    args = parser.parse_args()
    sys.path.remove(str(Path(__file__).resolve().parent))  # the client's modules are not there
    os.environ["HF_HUB_OFFLINE"] = "1"
    import nnsight.modeling.transformers  # noqa: F401  before the port is printed: it takes long
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    ndif = Ndif(dict(item.split("=", 1) for item in args.model), args.port)
    handler = type("Bound", (Control,), {"ndif": ndif})
    control = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(ndif.port, control.server_port, flush=True)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    while args.parent in (None, os.getppid()):
        time.sleep(1)


if __name__ == "__main__":
    main()
