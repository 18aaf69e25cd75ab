"""The stand-in for NDIF: what nnsight's own client gets from it, and what it raises under each fault."""

import os
import signal
import threading
import time

import httpx
import nnsight
import pytest
import torch
import websocket
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling.transformers import TransformersModel

from conftest import CONFIGS, save_model
from ndif_server import serve

NAME = "toy/llama"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(server, model that runs on it, the same model here)."""
    from nnsight.modeling import huggingface
    folder = save_model(tmp_path_factory.mktemp("ndif") / "llama", CONFIGS["llama"][0], **CONFIGS["llama"][1])
    here = TransformersModel(str(folder), task="text-generation", dispatch=True)
    there = TransformersModel(str(folder), task="text-generation")
    there.repo_id, huggingface._ID_CACHE[NAME] = NAME, NAME     # no hub in this test: the id is known to be spelt right
    config, before = nnsight.CONFIG, nnsight.CONFIG.model_copy(deep=True)
    with serve({NAME: folder}) as server:
        config.API.HOST, config.API.APIKEY, config.APP.REMOTE_LOGGING = server.url, None, False
        yield server, there, here
    config.API, config.APP = before.API, before.APP


def state(model, remote=True, repeats=1):
    with torch.no_grad():
        with model.trace("Tom found", remote=remote) as tracer:
            h = model.model.layers[1].output.save()
            noise = torch.rand(repeats, 2**18).save()   # 1 MiB each, and does not compress
            tracer.stop()
    assert noise.shape == (repeats, 2**18)
    return h


def work(model, rows):
    """Runs on the server as a whole: a loop with traces in it."""
    found = []
    for row in rows:
        with torch.no_grad():
            with model.trace({"input_ids": torch.tensor([row])}, use_cache=False):
                last = model.output.logits[:, -1].save()
        found.append(last)
    return torch.cat(found)


def test_numbers_are_those_of_a_local_run(world):
    server, there, here = world
    for repeats in (1, 20):                             # over the websocket, and as a URL
        assert torch.equal(state(there, repeats=repeats), state(here, False))
    job = server.log()[-1]
    assert job["status"] == "COMPLETED" and job["blocking"] and not job["bytecode"] and not job["key"]
    assert 15 * 2**20 < job["down"] == server.log("blob")[-1]["down"] and 0 < job["up"] < 10_000


def test_a_function_with_traces_runs_on_the_server(world):
    server, there, here = world
    rows, outside = [[0, 5, 6], [0, 7, 8, 9]], [1]
    with there.session(remote=True):
        outside.append(2)
        print("said on the server")
        result = nnsight.save(work(there, rows))
    assert torch.equal(result, work(here, rows))
    assert outside == [1]                               # what was made outside the block comes back unchanged
    assert server.log()[-1]["lines"] == ["said on the server"]
    assert set(server.log()[-1]["modules"]) <= {"builtins", "cloudpickle", "nnsight", "torch", "collections"}


def test_without_a_websocket(world):
    server, there, here = world
    with there.trace("Tom found", remote=True, blocking=False) as tracer:
        h = there.model.layers[1].output.save()  # noqa: F841
    while (saved := tracer.backend()) is None:
        time.sleep(0.01)
    assert torch.equal(saved["h"], state(here, False)) and not server.log()[-1]["blocking"]
    assert tracer.backend.meta["runtime"] > 0


@pytest.mark.parametrize("fault, error, message", [
    ("500", RemoteError, "Internal server error"), ("502", RemoteError, "Bad Gateway"), ("503", RemoteError, "reconnecting"),
    ("error", RemoteError, "Error: injected"), ("cuda", RemoteError, "out of memory"), ("timeout", RemoteError, "60.0s"),
    ("cancelled", RemoteError, "preempted"), ("cut", websocket.WebSocketConnectionClosedException, "lost"),
    ("subscribe", websocket.WebSocketBadStatusException, "503"), ("gone", RemoteError, "disconnected"),
    ("lost", httpx.HTTPStatusError, "404")])
def test_faults(world, fault, error, message):
    server, there, _ = world
    server.fault(fault, after=1)
    state(there)
    with pytest.raises(error, match=message):
        state(there)
    state(there)


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_slow_jobs(world, fault):
    server, there, _ = world
    server.fault(fault, seconds=0.4)
    start = time.time()
    state(there)
    assert 0.4 < time.time() - start and server.log()[-1]["fault"] == fault


def test_the_server_goes_and_comes_back(world):
    server, there, here = world
    server.fault("slow", seconds=0.5)
    threading.Timer(0.2, server.stop).start()
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        state(there)
    with pytest.raises(ConnectionRefusedError):
        state(there)
    assert nnsight.status(raw=True) == {}
    server.start()
    assert torch.equal(state(there), state(here, False))


def test_the_job_of_a_client_that_left_runs_on(world):
    server, there, _ = world
    server.fault("slow", seconds=0.5)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        state(there)
    state(there)                                        # behind it in the queue
    assert [job["status"] for job in server.log()[-2:]] == ["COMPLETED", "COMPLETED"]


def test_keys(world, monkeypatch):
    server, there, _ = world
    server.set(needs_key="right")
    try:
        for key in (None, "wrong"):
            monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
            with pytest.raises(RemoteError, match="Missing or invalid API key. Please visit https://login.ndif.us/"):
                state(there)
            assert nnsight.whoami()["email"] is None
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "right")
        state(there)
        assert server.log()[-1]["key"] and nnsight.whoami()["email"]
    finally:
        server.set(needs_key=None)


def test_status_and_versions(world):
    server, there, _ = world
    assert nnsight.status()[NAME]["state"] == "RUNNING" and nnsight.status().status == "UP"
    assert not nnsight.compare().critical_mismatches and nnsight.compare().python_matches
    server.set(running=[])
    assert NAME not in nnsight.status() and nnsight.status(raw=True)["deployments"]
    with pytest.raises(RemoteError, match="Could not deploy this model"):
        state(there)
    server.set(running=None)
    state(there)
