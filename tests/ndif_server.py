"""NDIF on loopback in one process, with faults on demand: nnsight 0.8.1's wire format, and its own code to run jobs.

    with serve({"toy/llama-m": folder}) as server:
        server.fault("cut")                             # the next job loses its websocket while it runs
        subprocess.run(…, env=hub.surroundings(tmp_path) | {"NDIF_HOST": server.url})
        assert [job["status"] for job in server.log()] == ["ERROR", "COMPLETED"]

By hand: python tests/ndif_server.py --port 18001 --model toy/llama-m=/folder. It prints its port and its control port.
A subprocess, since client and server must not share what nnsight caches of sources; standard library alone, since no
package of requirements.txt brings a websocket server. Texts and shapes of the answers are those of ndif 0.1.2.
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
REFUSED = {"500": "Internal server error.", "502": None, "503": "Service temporarily unavailable: compute backend is "
           "reconnecting. Please try again in a few minutes."}      # answers to POST /request; 502 is a proxy's, not JSON
FAILED = {"error": "Traceback (most recent call last):\n  File \"/client/script.py\", line 7, in work\nRuntimeError: injected",
          "cuda": "Traceback (most recent call last):\n  File \"/client/script.py\", line 7, in work\ntorch.OutOfMemoryError: "
                  "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 3.12 GiB "
                  "is free.", "timeout": "Your job exceeded the execution timeout of 60.0s.",
          "cancelled": "Your job was cancelled or preempted by the server."}     # jobs that end with Status.ERROR
FAULTS = {*REFUSED, *FAILED, "400", "subscribe", "gone", "cut", "lost", "hang", "slow"}     # in the order of a job's life:
# 400: the key is malformed, and repeated; subscribe: no websocket (503); gone: POST is not answered; cut: websocket lost while
# it runs; lost: the result's URL answers 404; hang: waits in the queue; slow: runs long
INLINE = 8 * 2**20                                      # a larger result comes as a URL, as does every non-blocking one


# ================================================================ What runs in the test's process


class Server:
    """Starts the subprocess; every call below asks it over its control port, which stays up when the server is stopped."""

    def __init__(self, models: dict[str, Path | str], running: list[str] | None = None, needs_key: str | None = None):
        own = [item for name, folder in models.items() for item in ("--model", f"{name}={folder}")]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "PYTHON", "HF_"))}
        self.process = subprocess.Popen([sys.executable, __file__, "--parent", str(os.getpid()), *own], cwd="/", text=True,
                                        env=clean | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
        self.port, self.control = map(int, self.process.stdout.readline().split())
        self.url = f"http://127.0.0.1:{self.port}"
        self.set(running=running, needs_key=needs_key)

    def _ask(self, **what):
        request = urllib.request.Request(f"http://127.0.0.1:{self.control}/control", json.dumps(what).encode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))       # loopback is never behind a proxy
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def fault(self, kind: str, count: int = 1, after: int = 0, seconds: float = 1.0) -> None:
        """Let `after` jobs pass, then do this to `count` of them. Faults that were set earlier come first."""
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}: {', '.join(sorted(FAULTS))}")
        self._ask(do="fault", kind=kind, count=count, after=after, seconds=seconds)

    def log(self, kind: str | None = "request") -> list[dict]:
        """What was asked, in order: jobs, or another first part of the path (status, response, blob …), or None for all.
        A job says model, up and down [bytes], seconds, run [seconds], status, fault, key (one came), blocking, tracer,
        lines (its prints), modules (packages that its code names) and bytecode (true: it needs this very Python)."""
        return [entry for entry in self._ask(do="log") if kind in (None, entry["kind"])]

    def set(self, **what) -> None:
        """running: the models that run (None: all); needs_key: the one key that is accepted (None: any, or none)."""
        self._ask(do="set", **what)

    def stop(self) -> None:
        """Gone: every connection is cut and the port is closed. Log and faults are kept."""
        self._ask(do="stop")

    def start(self) -> None:
        self._ask(do="start")

    def close(self) -> None:
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


# ================================================================ What runs in the subprocess


class Job:
    """One request and the way back to whoever sent it."""

    def __init__(self, ndif, envelope, blob: bytes, entry: dict, fault: dict):
        self.ndif, self.envelope, self.blob, self.entry, self.fault = ndif, envelope, blob, entry, fault
        self.id, self.came, self.lines = uuid.uuid4().hex, time.time(), ""

    def say(self, status: str, text: str = "", data=None, meta: dict | None = None) -> None:
        """On the client's websocket, the result in a binary frame; kept for GET /response/{id} where there is none."""
        from nnsight.schema.response import ResponseModel
        answer = ResponseModel(id=self.id, status=status, description=text, data=data, meta=meta)
        if self.envelope.session_id:
            if client := self.ndif.clients.get(self.envelope.session_id):
                with contextlib.suppress(OSError):      # the client has left; its job runs on, as on NDIF
                    client.frame(*(2, answer.pickle()) if isinstance(data, bytes) else (1, answer.model_dump_json().encode()))
        elif status != "LOG":
            self.ndif.answers[self.id] = answer.model_dump_json().encode()
        if status in ("COMPLETED", "ERROR"):
            self.entry.update(status=status, seconds=time.time() - self.came, text=text)

    def write(self, text: str) -> None:                 # the job's stdout and stderr: each line goes to the client
        *lines, self.lines = (self.lines + text).split("\n")
        for line in lines:
            self.entry["lines"].append(line)
            self.say("LOG", line)

    def flush(self) -> None:
        pass

    def work(self) -> None:
        kind = self.fault.get("kind")
        self.say("QUEUED", "Added to Queue at position 3.")
        for position in (2, 1) if kind == "hang" else ():
            time.sleep(self.fault["seconds"] / 2)
            self.say("QUEUED", f"Moved to position {position} in Queue.")
        name = json.loads(self.envelope.model_key.split(":", 1)[1])["repo_id"]
        if name not in self.ndif.models or name not in self.ndif.running:
            known = name in self.ndif.models
            return self.say("ERROR", "Could not deploy this model. " + (
                "CANT_ACCOMMODATE: placed 0 of 1 new replicas" if known else f"Repository Not Found: {name}"))
        self.say("DISPATCHED", "Your job has been sent to the model deployment.")
        self.say("RUNNING", "Your job has started running.")
        if kind == "cut" and (client := self.ndif.clients.get(self.envelope.session_id)):
            self.entry.update(status="CUT")
            return client.hang_up()
        time.sleep(self.fault["seconds"] if kind == "slow" else 0)
        start = time.time()
        try:
            if kind in FAILED:
                return self.say("ERROR", FAILED[kind], meta={"runtime": 0.0})
            with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
                result = self.ndif.execute(self)
        except BaseException as error:                  # the block's own: as NDIF does, its traceback goes to the client
            from nnsight.tracing.util import clean_traceback
            error = error.with_traceback(clean_traceback(error.__traceback__))
            return self.say("ERROR", "".join(traceback.format_exception(error)), meta={"runtime": time.time() - start})
        self.entry.update(down=len(result), run=time.time() - start)
        if not self.envelope.session_id or len(result) > INLINE or kind == "lost":
            self.ndif.results[self.id] = result if kind != "lost" else None
            result = f"http://127.0.0.1:{self.ndif.port}/blob/{self.id}"
        self.say("COMPLETED", "Your job has been completed.", result, {"runtime": self.entry["run"], "max_memory_usage": 0})


class Ndif:
    """Models, jobs and log of the subprocess. One job runs at a time, in one thread."""

    def __init__(self, models: dict[str, str], port: int):
        self.models, self.running, self.needs_key, self.port = models, list(models), None, port
        self.loaded, self.clients, self.answers, self.results = {}, {}, {}, {}
        self.faults, self.entries, self.jobs, self.open = [], [], queue.Queue(), set()
        threading.Thread(target=self.run_jobs, daemon=True).start()
        self.start()

    def start(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"ndif": self}))
        self.http.daemon_threads, self.port = True, self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        for handler in list(self.open):
            handler.hang_up()

    def run_jobs(self) -> None:
        while True:
            self.jobs.get().work()

    def next_fault(self, subscribe: bool) -> dict:
        for fault in self.faults:
            if (fault["kind"] == "subscribe") != subscribe:
                continue
            if fault["after"]:
                fault["after"] -= 1
            elif fault["count"]:
                fault["count"] -= 1
                return fault
        return {}

    def model(self, key: str):
        import torch
        from nnsight.modeling.transformers import TransformersModel
        if key not in self.loaded:
            wanted = json.loads(key.split(":", 1)[1])
            self.loaded[key] = TransformersModel(self.models[wanted["repo_id"]], task=wanted["task"], dispatch=True,
                                                 dtype=torch.float32)
            self.loaded[key]._module.requires_grad_(False)
        return self.loaded[key]

    def execute(self, job: Job) -> bytes:
        """nnsight's own way to run what came; then the saved values, as they are sent back."""
        import torch
        import zstandard
        from cloudpickle import cloudpickle
        from nnsight.intervention.serialization import CustomCloudUnpickler
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.globals import BLOCKS, SOURCES
        from nnsight.tracing.tracer import _saves, dec, inc

        class Noting(CustomCloudUnpickler):
            def find_class(self, module, name):
                job.entry["modules"] = sorted({*job.entry["modules"], module.split(".")[0]})
                if name == "_builtin_type":             # cloudpickle's road for what has no source
                    return lambda kind: (job.entry.update(bytecode=job.entry["bytecode"] or kind == "CodeType"),
                                         cloudpickle._builtin_type(kind))[1]
                if name == "subimport":                # a module that the code has as a global
                    return lambda module: self.find_class(module, "__name__") and cloudpickle.subimport(module)
                return super().find_class(module, name)
        model = self.model(job.envelope.model_key)
        caches = [(cache, dict(cache)) for cache in (linecache.cache, SOURCES, BLOCKS)]
        try:
            model._remoteable_set_env(job.envelope.env)
            tracer = RequestModel.deserialize(job.blob, model._remoteable_persistent_objects(), job.envelope.compress, Noting)
            job.entry["tracer"] = type(tracer).__name__
            inc()
            try:
                tracer.execute(tracer.info.code)
                saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
            finally:
                dec()
        finally:                                        # another job may have other code at the same line of the same file
            model.interleaver.cancel()                  # what a failed job has left hanging
            for cache, before in caches:
                cache.clear()
                cache.update(before)
        file = io.BytesIO()
        torch.save(saved, file)
        return zstandard.ZstdCompressor(level=3).compress(file.getvalue()) if job.envelope.compress else file.getvalue()

    def status(self) -> dict:
        def deployment(name):
            key = {"repo_id": name, "revision": None, "task": "text-generation"}
            state = {"application_state": "RUNNING", "deployment_level": "HOT"} if name in self.running else \
                    {"deployment_level": "COLD"}
            return state | {"repo_id": name, "revision": "main", "task": "text-generation", "dtype": "float32",
                            "execution_timeout_seconds": 3600.0, "n_params": None,
                            "model_key": f"nnsight.modeling.transformers.TransformersModel:{json.dumps(key)}"}
        return {"deployments": {f"ModelActor:{name}": deployment(name) for name in self.models}}

    def control(self, do: str, **what):
        if do == "fault":
            self.faults.append(what)
        elif do == "set":
            for name, value in what.items():
                setattr(self, name, list(self.models) if name == "running" and value is None else value)
        elif do in ("stop", "start"):
            getattr(self, do)()
        return self.entries if do == "log" else None


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
        with contextlib.suppress(OSError):              # cut by the client, or by stop()
            super().handle()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, body, content: str = "application/json") -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.entry.update(down=len(body), seconds=time.time() - self.came, http=status)

    def note(self, kind: str) -> None:
        self.came = time.time()
        self.entry = {"kind": kind, "up": 0, "down": 0, "seconds": None, "key": bool(self.headers["ndif-api-key"])}
        self.ndif.entries.append(self.entry)

    def do_GET(self):
        kind, _, rest = self.path.strip("/").partition("/")
        self.note(kind)
        if kind == "subscribe":
            return self.reply(503, {"detail": REFUSED["503"]}) if self.ndif.next_fault(subscribe=True) else self.subscribe()
        answers = {"status": self.ndif.status, "env": environment, "ping": lambda: "pong",
                   "whoami": lambda: {"email": "someone@example.org" if self.accepted() else None, "tags": []}}
        kept = {"response": self.ndif.answers, "blob": self.ndif.results}.get(kind, {}).get(rest)
        if kept is not None:
            self.reply(200, kept, "application/json" if kind == "response" else "application/octet-stream")
        elif kind in answers:
            self.reply(200, answers[kind]())
        else:
            self.reply(404, {"detail": f"No response for request {rest}." if kind == "response" else "Not Found"})

    def accepted(self) -> bool:
        return self.ndif.needs_key is None or self.headers["ndif-api-key"] == self.ndif.needs_key

    def do_POST(self):
        from nnsight.schema.request import RequestModel
        from nnsight.schema.response import ResponseModel
        self.note(self.path.strip("/"))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.ndif.next_fault(subscribe=False)
        self.entry.update(fault=fault.get("kind"), up=len(body), status="REFUSED", lines=[], modules=[], bytecode=False)
        if not self.accepted():
            return self.reply(401, {"detail": NO_KEY})
        if (kind := fault.get("kind")) == "400":
            return self.reply(400, {"detail": f"Invalid API key format: '{self.headers['ndif-api-key']}'. API keys must be "
                                              "in the format: xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx."})
        if kind == "gone":
            return self.hang_up()
        if kind in REFUSED:
            return self.reply(int(kind), {"detail": REFUSED[kind]} if REFUSED[kind] else b"<html>Bad Gateway</html>")
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        form = {}
        for part in body.split(boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            form["blob" if b'name="blob"' in head else "data"] = content.removesuffix(b"\r\n")
        envelope = RequestModel.model_validate_json(form["data"])
        job = Job(self.ndif, envelope, form["blob"], self.entry, fault)
        self.reply(200, ResponseModel(id=job.id, status="RECEIVED", description="Your job has been received and is waiting "
                                      "to be queued.").model_dump_json().encode())
        self.entry.update(model=envelope.model_key, up=len(form["blob"]), down=0, seconds=None, status=None,
                          blocking=bool(envelope.session_id))
        self.ndif.jobs.put(job)

    def subscribe(self) -> None:
        """The websocket: the server alone speaks on it, until the client closes it or is gone."""
        name = uuid.uuid4().hex
        accept = hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self.send_response(101)
        for header in (("Upgrade", "websocket"), ("Connection", "Upgrade"),
                       ("Sec-WebSocket-Accept", base64.b64encode(accept).decode())):
            self.send_header(*header)
        self.end_headers()
        self.close_connection, self.ndif.clients[name] = True, self
        try:
            self.frame(1, json.dumps({"session_id": name}).encode())
            if self.rfile.read(1):                      # the client has nothing to send but its goodbye, which it wants back
                self.frame(8, b"\x03\xe8")
        finally:
            del self.ndif.clients[name]
            self.entry["seconds"] = time.time() - self.came

    def frame(self, kind: int, data: bytes) -> None:
        """One whole websocket frame: 1 text, 2 binary, 8 close."""
        size = len(data)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 2**16 else \
            b"\x7f" + size.to_bytes(8, "big")
        with self.sending:
            self.wfile.write(bytes([0x80 | kind]) + length + data)


def environment() -> dict:
    from nnsight.ndif import get_local_env
    return get_local_env()


class Control(Handler):
    """The private port, which stop() leaves alone."""
    setup = BaseHTTPRequestHandler.setup

    def do_POST(self):
        what = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.came, self.entry = time.time(), {}
        self.reply(200, self.ndif.control(**what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], metavar="ID=FOLDER")
    parser.add_argument("--parent", type=int, help="end when this process has ended, however it did")
    args = parser.parse_args()
    sys.path.remove(str(Path(__file__).resolve().parent))       # a server has none of the client's modules
    os.environ["HF_HUB_OFFLINE"] = "1"
    import nnsight.modeling.transformers                # noqa: F401  before the port is printed: the first job is not slow
    import torch
    from transformers.utils import logging
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    ndif = Ndif(dict(item.split("=", 1) for item in args.model), args.port)
    control = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Control,), {"ndif": ndif}))
    print(ndif.port, control.server_port, flush=True)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    while args.parent in (None, os.getppid()):
        time.sleep(1)


if __name__ == "__main__":
    main()
