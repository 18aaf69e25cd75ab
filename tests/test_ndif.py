"""Targets on NDIF: every function and every script gives the numbers of a local run, whatever happens on the way.

    pytest tests/test_ndif.py                   functions, faults, what is asked before any work, memory of a 70B target
    pytest tests/test_ndif.py -m slow           the five scripts, one of them killed and continued; MC1 of 817 questions

Both start tests/ndif_server.py. NDIF_TEST_HOST=http://… takes a server that is up instead, which must know toy/NAME as
data/toy/models/NAME, and a key in NDIF_API_KEY (any UUID will do where it is not checked); tests that inject faults or read
the server's log are skipped then. The real one (ndif 0.1.2 on CPU), with the scripts of ../shared/ndif, as root:

    ../shared/ndif/setup.sh /tmp/ndifvenv       # once: 1.7 GB, 2 minutes
    export NDIF_VENV=/tmp/ndifvenv NDIF_API_KEY=00000000-0000-4000-8000-000000000000
    export REPOS="toy/llama-m=$PWD/data/toy/models/llama-m toy/llama-s=…/llama-s toy/llama-s-chat=…/llama-s-chat"
    ../shared/ndif/with_ndif.sh sh -c 'NDIF_TEST_HOST=$NDIF_HOST python -m pytest tests/test_ndif.py -k "function or eft"'

ACTOR=cpu_ndif.CPUSandboxActor runs every job untrusted, as the hosted service does; cpu_ndif.py must then add "HF_ENDPOINT" to
ndif.services.ray.sandbox.host.RUNNER_ENV, and a job takes 3 to 14 s. All passed there but "text, sampled": a seed that is set
in the sandbox is not the one that the model samples with. A script finds its models up only when a job has called for them.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nnsight
import pytest
import torch
import transformers
from nnsight.modeling import huggingface

import common
import exp_emotion
import exp_truthfulqa
from common import (BASE, Transplant, choice_logprobs, concept_vector, generate, hidden_states, load_model, logit_lens,
                    next_token_logits, perplexity, score_labels)
from conftest import CONFIGS, MAIN, save_model
from hub import Hub
from ndif_server import serve

ROOT = Path(__file__).resolve().parents[1]
TOY, REAL = ROOT / "data" / "toy", ROOT.parent / "shared" / "data"
HOST = os.environ.get("NDIF_TEST_HOST")
KEY = "a-key-that-must-never-be-seen"
SHIPPED = {"builtins", "cloudpickle", "collections", "nnsight", "torch", "transformers", "warnings", "math"}
ZOO = {f"toy/{path.name}": path for folder in ("models", "models/amber") for path in (TOY / folder).iterdir()
       if (path / "config.json").exists()}


# ================================================================ the server, and models on it


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Random models of the four main families, which no outside server has."""
    home = tmp_path_factory.mktemp("families")
    return {f"random/{name}": save_model(home / name, CONFIGS[name][0], **CONFIGS[name][1]) for name in MAIN}


@pytest.fixture(scope="module")
def server(families):
    config, before = nnsight.CONFIG, nnsight.CONFIG.model_copy(deep=True)
    config.APP.REMOTE_LOGGING = False
    if HOST:
        yield SimpleNamespace(url=HOST)
    else:
        config.API.APIKEY = KEY
        with serve(ZOO | families, needs_key=KEY) as own:
            yield own
    config.API, config.APP = before.API, before.APP


@pytest.fixture
def own(server):
    """The server of these tests, which keeps a log and does wrong when it is asked to."""
    if HOST:
        pytest.skip("no faults and no log on the server of NDIF_TEST_HOST")
    yield server
    server.set(running=None, needs_key=KEY, faults=[])


def away(server, name: str, folder: Path, **options):
    """A model on the server. No hub is asked: its id is known to be spelt right."""
    model = load_model(str(folder), remote=server.url, **options)
    model.repo_id, huggingface._ID_CACHE[name] = name, name
    return model


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", KEY)


@pytest.fixture(scope="module")
def target(server):
    """(here, there): one model of the zoo."""
    folder = ZOO["toy/llama-m"]
    return load_model(str(folder), device="cpu"), away(server, "toy/llama-m", folder)


@pytest.fixture(scope="module")
def small():
    """Aligned and base model of EFT, here."""
    return tuple(load_model(str(ZOO[f"toy/{name}"]), device="cpu") for name in ("llama-s-chat", "llama-s"))


@pytest.fixture(autouse=True)
def afresh(tmp_path, monkeypatch, target):
    """Each test has a cache of its own, counts from zero and waits for nothing; six texts make several batches."""
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(common, "TRAFFIC", dict.fromkeys(common.TRAFFIC, 0))
    monkeypatch.setattr(common, "PATIENCE", [0.01] * 4)
    for model in target:
        monkeypatch.setattr(model, "batch_tokens", 60)
        monkeypatch.setattr(model, "pass_tokens", 60)


def same(here, there) -> bool:
    """Equal, numbers to 1e-5."""
    if isinstance(here, torch.Tensor) and here.is_floating_point():
        return here.shape == there.shape and here.dtype == there.dtype and torch.allclose(here, there, rtol=1e-5, atol=1e-5)
    if isinstance(here, torch.Tensor):
        return torch.equal(here, there)
    if isinstance(here, (tuple, list)):
        return len(here) == len(there) and all(map(same, here, there))
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(same(here[name], there[name]) for name in here)
    return math.isclose(here, there, rel_tol=1e-5, abs_tol=1e-5) if isinstance(here, float) else here == there


# ================================================================ every function of common.py


TEXTS = ["the town of Ralvo is quite far", "my friend said that", "Scenario: you see a spider in the house. You feel",
         "Where is the river?", "one two three four five six seven", "a red ball"]
SHOTS = "Scenario: this is a longer start that all of the prompts share, so that it is computed once and kept. It has many " \
        "tokens, more than thirty two of them, since anything shorter would not pay for a cache of its own.\n"
LABELS = ["happiness", "sadness", "anger"]


def vector(width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def moves(model, first: int = 3, second: int = 5) -> list[Transplant]:
    """None, one, a sum in two blocks, and a sum in one."""
    v, w = vector(model.config.hidden_size), vector(model.config.hidden_size, 2)
    return [BASE, Transplant.of(v, second, 1), Transplant.of(v, second, 2) + Transplant.of(w, first, 0.5),
            Transplant.of(v, second, -1) + Transplant.of(w, second, 1)]


def pairs(start: str = "") -> list[tuple[str, str]]:
    return [(start + text, choice) for text in TEXTS for choice in (" happy", " very sad and tired", " a red ball")]


CALLS = {
    "states": lambda m, _: hidden_states(m, TEXTS, [5, 2, 5]),
    "states of all blocks": lambda m, _: hidden_states(m, TEXTS),
    "states under a transplant": lambda m, _: hidden_states(m, TEXTS, [2, 6], moves(m)[2]),
    "next token": lambda m, _: next_token_logits(m, TEXTS, moves(m)),
    "next token after a shared start": lambda m, _: next_token_logits(m, [SHOTS + text for text in TEXTS], moves(m)),
    "labels": lambda m, _: score_labels(m, [SHOTS + text for text in TEXTS], LABELS, moves(m)),
    "choices": lambda m, _: choice_logprobs(m, pairs(), moves(m)),
    "choices after a shared start": lambda m, _: choice_logprobs(m, pairs(SHOTS), moves(m)),
    "choices, EFT": lambda m, small: choice_logprobs(m, pairs(), moves(m)[:2], small),
    "text": lambda m, _: generate(m, TEXTS, moves(m)[1], 8),
    "text, sampled": lambda m, _: generate(m, TEXTS, moves(m)[2], 8, sample=True, top_p=0.9, temperature=0.8, seed=3),
    "text, EFT": lambda m, small: generate(m, TEXTS, moves(m)[1], 6, eft=small),
    "text, EFT, sampled": lambda m, small: generate(m, TEXTS, moves(m)[1], 6, sample=True, top_p=0.9, seed=3, eft=small),
    "perplexity": lambda m, _: perplexity(m, [SHOTS, *TEXTS], moves(m), window=16),
    "logit lens": lambda m, _: logit_lens(m, TEXTS, 5, moves(m)[:3]),
    "concept": lambda m, _: concept_vector(m, TEXTS[:3], TEXTS[3:], [6, 2]),
    "concept, pca": lambda m, _: concept_vector(m, TEXTS[:3], TEXTS[3:], [6], "pca"),
    "concept, probe": lambda m, _: concept_vector(m, TEXTS[:3], TEXTS[3:], [6], "probe"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_gives_what_it_gives_here(name, target, small, server):
    here, there = target
    assert same(CALLS[name](here, small), CALLS[name](there, small))
    assert common.TRAFFIC["requests"] and common.TRAFFIC["failed"] == 0
    assert all(parameter.is_meta for parameter in there._module.parameters())       # no weights came
    if not HOST:
        for job in server.log()[-common.TRAFFIC["requests"]:]:
            assert job["status"] == "COMPLETED" and job["key"] and job["lines"] == []
            assert not job["bytecode"] and set(job["modules"]) <= SHIPPED           # any Python, and no package of ours


@pytest.mark.parametrize("family", MAIN)
def test_every_family_of_models(family, own, families):
    name = f"random/{family}"
    here, there = load_model(str(families[name]), device="cpu"), away(own, name, families[name])
    shifted, texts = moves(here, 1, 2), ["Tom felt very happy.", "Lily lost her old cat.", "the dog"]
    for call in (lambda m: hidden_states(m, texts, [1, 3], shifted[2]), lambda m: next_token_logits(m, texts, shifted),
                 lambda m: choice_logprobs(m, [(text, end) for text in texts for end in (" sad", " and sat down")], shifted),
                 lambda m: generate(m, texts, shifted[1], 5), lambda m: logit_lens(m, texts, 2, shifted[:2])):
        assert same(call(here), call(there))
    assert here.abilities == there.abilities


def test_eft_text_ends_at_any_of_several_end_tokens(own, families, tmp_path):
    """As aligned Llama 3 models have them. Here the second is what the model says third."""
    here, there = load_model(str(families["random/llama"]), device="cpu"), away(own, "random/llama", families["random/llama"])
    plain = here.tokenizer(generate(here, TEXTS[:1], max_new_tokens=6, eft=(here, here))).input_ids[0]
    for model in (here, there):
        model._module.generation_config.eos_token_id = [1, plain[3]]
    texts = [generate(model, TEXTS[:2], max_new_tokens=6, eft=(here, here)) for model in (here, there)]
    assert same(*texts) and len(here.tokenizer(texts[0][0]).input_ids) < len(plain)


def test_where_an_infinity_comes_from_is_said(target, server):
    found = []
    for model in target:
        with pytest.raises(FloatingPointError) as error:
            next_token_logits(model, TEXTS, [BASE, Transplant.of(vector(96), 3, 1e39)])
        found.append(str(error.value))
    found = [re.sub(r"\(torch.\w+\)", "", message) for message in found]                # the config's, on NDIF
    assert same(*found) and "after block 3" in found[0]


def test_small_models_of_eft_may_be_on_ndif_too(target, small, server):
    both = [away(server, f"toy/{name}", ZOO[f"toy/{name}"]) for name in ("llama-s-chat", "llama-s")]
    for model in target:
        model.batch_tokens = model.pass_tokens = 16384
    for call in (lambda m, small: choice_logprobs(m, pairs()[:6], [BASE], small),
                 lambda m, small: generate(m, TEXTS[:2], moves(m)[1], 4, eft=small),
                 lambda m, small: generate(m, TEXTS[:2], BASE, 4, sample=True, seed=3, eft=small)):
        assert same(call(target[0], small), call(target[1], tuple(both)))


def test_only_means_of_a_concept_travel(target, own):
    """From 60 prompts of six blocks come six means, where states would be 138 KB."""
    for model in target:
        model.batch_tokens = model.pass_tokens = 16384
    texts = [f"{text} {number}" for number in range(5) for text in TEXTS]
    assert same(*(concept_vector(model, texts, texts[::-1][:29] + ["the end"], list(range(6))) for model in target))
    assert common.TRAFFIC["requests"] == 2 and common.TRAFFIC["bytes down"] < 2 * (6 * 96 * 8 + 2000)


def test_many_batches_are_one_job_of_bounded_size(target, own, monkeypatch):
    monkeypatch.setattr(common, "JOB", 3)
    target[1].batch_tokens = target[1].pass_tokens = 1      # one text a batch
    before = len(own.log())
    assert same(hidden_states(target[0], TEXTS, [2]), hidden_states(target[1], TEXTS, [2]))
    assert len(own.log()) - before == 2 == common.TRAFFIC["requests"]
    target[1].abilities = (True, True)          # nothing to try
    next_token_logits(target[1], TEXTS)         # full logits, one batch a job
    assert len(own.log()) - before == 2 + 6


def test_what_was_answered_is_not_asked_for_again(target, own, monkeypatch):
    there = target[1]
    there.abilities = None                      # as in a new process, like the second one
    first = hidden_states(there, TEXTS, [2]), next_token_logits(there, TEXTS, moves(there))
    asked = len(own.log())
    again = away(own, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=60)
    assert same(first, (hidden_states(again, TEXTS, [2]), next_token_logits(again, TEXTS, moves(there))))
    assert len(own.log()) == asked and common.TRAFFIC["kept"] > 1
    monkeypatch.setattr(common.Settings, "cache", False)
    hidden_states(there, TEXTS, [2])
    assert len(own.log()) == asked + 1


def test_a_run_records_what_it_cost(target, own, tmp_path, capsys):
    args = SimpleNamespace(command=[], out=tmp_path, src="a", tgt=["b"], fresh=False)
    run, before = common.Run("exp_emotion", args, {}), len(own.log())
    own.fault("hang", seconds=0.4)
    own.fault("slow", seconds=0.6)
    own.fault("500")
    target[1].batch_tokens = target[1].pass_tokens = 10
    next_token_logits(target[1], TEXTS, moves(target[1]))
    run.save([], [], "")
    cost, jobs = json.loads((run.folder / "ndif.json").read_text()), own.log()[before:]
    assert cost["requests"] == len(jobs) and cost["failed"] == 1 and cost["kept"] == 0
    sent = [job for job in jobs if job["status"] == "COMPLETED"]
    assert cost["bytes down"] == sum(job["down"] for job in sent)
    assert sum(job["up"] for job in sent) < cost["bytes up"] < 1.1 * sum(job["up"] for job in jobs)
    assert 0.4 <= cost["queue s"] < 20 and 0.6 <= cost["run s"] < 20
    assert f"{len(jobs)} requests, 1 failed" in capsys.readouterr().out


# ================================================================ faults


def states(model) -> torch.Tensor:
    """Two jobs, of three batches each."""
    return hidden_states(model, TEXTS, [2, 5], moves(model)[1])


@pytest.fixture
def two_jobs(target, monkeypatch):
    monkeypatch.setattr(common, "JOB", 3)
    target[1].batch_tokens = target[1].pass_tokens = 1
    return target


@pytest.mark.parametrize("fault", ["500", "502", "503", "gone", "subscribe", "cut", "cancelled", "lost", "error"])
def test_what_fails_in_the_middle_is_tried_again(fault, two_jobs, own, capsys):
    here, there = two_jobs
    own.fault(fault, after=1)
    assert same(states(here), states(there))
    assert (common.TRAFFIC["requests"], common.TRAFFIC["failed"]) == (3, 1)
    printed, lines = capsys.readouterr()
    assert printed == "" and len(lines.splitlines()) == 1 and re.match(r"NDIF: .+; trying again in 0.01 s", lines)


def test_a_server_that_is_gone_may_come_back(two_jobs, own, monkeypatch, capsys):
    monkeypatch.setattr(common, "PATIENCE", [0.2] * 20)
    own.fault("slow", after=1, seconds=1)
    threading.Timer(0.5, own.stop).start()
    threading.Timer(1.5, own.start).start()
    assert same(states(two_jobs[0]), states(two_jobs[1]))
    assert common.TRAFFIC["failed"] >= 2 and "refused" in capsys.readouterr().err


def test_patience_ends_and_what_was_finished_is_kept(two_jobs, own, capsys):
    here, there = two_jobs
    before = len(own.log())
    own.fault("500", after=1, count=len(common.PATIENCE) + 1)
    with pytest.raises(SystemExit) as stopped:
        states(there)
    *tries, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(tries) == len(common.PATIENCE)
    assert last == (f"error: NDIF ({own.url}): Failed to send request: Internal server error.; what was finished is kept, and "
                    "the same command goes on from there")
    assert len(own.log()) - before == 1 + len(tries) + 1
    again = away(own, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=1)                # as the same command would
    assert same(states(here), states(again))
    assert len(own.log()) - before == 1 + len(tries) + 1 + 1            # the second job alone


def test_what_the_server_refuses_is_not_tried_again(target, own, capsys):
    own.set(needs_key="another")
    before = len(own.log())
    with pytest.raises(SystemExit) as stopped:
        states(target[1])
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(own.log()) - before == 1
    assert "Missing or invalid API key. Please visit https://login.ndif.us/" in line and KEY not in line


def test_a_key_that_the_server_repeats_is_not_printed(target, own, key, capsys):
    own.fault("400")
    with pytest.raises(SystemExit):
        states(target[1])
    line, = capsys.readouterr().err.splitlines()
    assert "Invalid API key format: '(the key)'" in line and KEY not in line


def broken(model):
    return lambda: 1 / 0


def test_an_error_of_our_own_ends_after_two_tries_in_one_line(target, own, capsys):
    with pytest.raises(SystemExit) as stopped:
        list(common._each_batch(target[1], broken, (), lambda batch: {}, [[0]]))
    _, line = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and common.TRAFFIC["requests"] == 2
    assert line.startswith(f"error: NDIF ({own.url}): ZeroDivisionError: division by zero;")


SEEN = []


def remembering(model):
    seen = []

    def remember(number):
        seen.append(number), SEEN.append(number)
        return list(seen), list(SEEN)
    return remember


def test_a_container_made_outside_the_block_stays_as_it_is_here_so_answers_are_returned(target, server):
    answers = list(common._each_batch(target[1], remembering, (), lambda batch: {"number": batch[0]}, [[4], [7]]))
    assert answers == [([4], ([4], [4])), ([7], ([4, 7], [4, 7]))] and SEEN == []


@pytest.mark.parametrize("fault", ["cuda", "timeout"])
def test_a_job_too_large_for_the_server_is_halved(fault, target, own, capsys):
    here, there = target
    there.batch_tokens = there.pass_tokens = 10000
    own.fault(fault)
    before = len(own.log())
    assert same(states(here), states(there)) and there.batch_tokens == 5000
    assert [job["fault"] for job in own.log()[before:]] == [fault, None]


def test_a_job_too_long_for_the_server_is_sent_in_parts(two_jobs, own, monkeypatch):
    monkeypatch.setattr(common, "JOB", 4)
    own.fault("timeout", count=2)               # four batches of one text, then the first two of them
    before = len(own.log())
    assert same(states(two_jobs[0]), states(two_jobs[1]))
    assert [job["fault"] for job in own.log()[before:]] == ["timeout", "timeout", *[None] * 5]     # 1, 1, 2, and 1, 1


@pytest.mark.parametrize("fault", ["cuda", "timeout"])
def test_one_text_that_is_too_large_ends_in_one_line(fault, target, own, capsys):
    own.fault(fault, count=9)
    with pytest.raises(SystemExit) as stopped:
        common.run_script(lambda: hidden_states(target[1], TEXTS[:1], [2]))
    assert stopped.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: NDIF ({own.url}) cannot do one text") and ("memory" in line or "timeout" in line)


def test_ctrl_c_ends_with_130_while_a_job_waits(two_jobs, own, capsys):
    own.fault("hang", after=1, seconds=1)
    threading.Timer(0.6, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(SystemExit) as stopped:
        common.run_script(lambda: states(two_jobs[1]))
    assert stopped.value.code == 130 and len(capsys.readouterr().err.strip().splitlines()) == 1
    asked = len(own.log())
    assert same(*map(states, two_jobs)) and len(own.log()) == asked + 1                 # the first job was kept


def test_a_queue_that_does_not_move_shows(target, own, monkeypatch, capsys):
    quick = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), sleep=time.sleep)
    monkeypatch.setattr(common, "time", quick)  # a second is a minute and more
    own.fault("hang", seconds=1.2)
    hidden_states(target[1], TEXTS[:1], [2])
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"NDIF: \S+llama-m queued for \d+ s \((Added to|Moved to) .*\)", line) for line in lines)


# ================================================================ before any work


REMOTE = ["--src", str(ZOO["toy/llama-s"]), "--tgt", "toy/llama-m", "--remote"]


def refused(argv: list[str], tmp_path, monkeypatch, capsys) -> str:
    """The one line that a script ends with before it loads a model or makes a folder."""
    monkeypatch.setattr(common, "model_config", lambda *_: pytest.fail("a model was asked for"))
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        exp_emotion.main([*argv, "--out", str(tmp_path / "out")])
    printed, errors = capsys.readouterr()
    assert stopped.value.code == 2 and printed == "" and not (tmp_path / "out").exists()
    line, = errors.splitlines()
    assert KEY not in line
    return line.removeprefix("error: ")


def test_no_key(tmp_path, monkeypatch, capsys, server):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    line = refused([*REMOTE, "--ndif-host", server.url], tmp_path, monkeypatch, capsys)
    assert "NDIF_API_KEY" in line and "https://login.ndif.us" in line


@pytest.mark.parametrize("host", ["localhost:8001", "ftp://ndif.us", "http://127.0.0.1:1", "http://", "http://127.0.0.1:x"])
def test_no_server(host, tmp_path, monkeypatch, capsys, key):
    line = refused([*REMOTE, "--ndif-host", host], tmp_path, monkeypatch, capsys)
    assert host in line and "--ndif-host" in line


def test_a_server_that_is_none(tmp_path, monkeypatch, capsys, key):
    with Hub({}) as hub:                        # answers 404 to whatever it does not know
        host = f"http://127.0.0.1:{hub.server.server_port}"
        line = refused([*REMOTE, "--ndif-host", host], tmp_path, monkeypatch, capsys)
    assert line.startswith(f"no NDIF at {host}: ") and "404" in line


def test_a_model_that_does_not_run(tmp_path, monkeypatch, capsys, key, own):
    own.set(running=["toy/llama-s", "toy/pythia-1"])
    line = refused([*REMOTE, "--ndif-host", own.url], tmp_path, monkeypatch, capsys)
    assert line == "toy/llama-m is not running on NDIF; these are: toy/llama-s, toy/pythia-1"
    own.set(running=[])
    assert refused([*REMOTE, "--ndif-host", own.url], tmp_path, monkeypatch, capsys).endswith("these are: none")


def test_every_model_that_runs_there_is_asked_for(tmp_path, monkeypatch, capsys, key, own):
    own.set(running=["toy/llama-m"])
    argv = [*REMOTE[2:], "--ndif-host", own.url, "--src", "toy/llama-s", "--src-base"]
    line = refused([*argv, "toy/llama-s", "--remote", "both"], tmp_path, monkeypatch, capsys)
    assert line.startswith("toy/llama-s is not running")
    line = refused([*argv, "toy/llama-s", "--tgt-chat", "toy/llama-m-chat"], tmp_path, monkeypatch, capsys)
    assert line.startswith("toy/llama-m-chat is not running")
    line = refused([*argv, "toy/llama-s", "--tgt", "toy/llama-m@step9"], tmp_path, monkeypatch, capsys)
    assert line.startswith("toy/llama-m@step9 is not running")


@pytest.mark.parametrize("package", ["nnsight", "transformers"])
def test_other_versions(package, tmp_path, monkeypatch, capsys, key, server):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == package else version(name))
    line = refused([*REMOTE, "--ndif-host", server.url], tmp_path, monkeypatch, capsys)
    assert "here is 0.0.1" in line and f"pip install {package}=={version(package)}" in line


@pytest.mark.parametrize("name", ["data/toy/models/llama-m", "/no/such/folder", "llama-m"])
def test_a_model_that_is_no_hub_id(name, tmp_path, monkeypatch, capsys, key, server):
    monkeypatch.chdir(ROOT)
    line = refused([*REMOTE, "--tgt", name, "--ndif-host", server.url], tmp_path, monkeypatch, capsys)
    assert line.startswith(f"--remote: {name} is not on NDIF")


def test_the_key_is_no_option(capsys):
    with pytest.raises(SystemExit):
        exp_emotion.main(["--help"])
    assert "NDIF_API_KEY" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        exp_emotion.options(["--ndif-api-key", "x"])


# ================================================================ a 70B target


META = """
import time
import common
start = time.process_time()                     # what the load takes of a core: other work may be on this machine
model = common.load_model("some/70b", remote="http://127.0.0.1:1")
seconds = time.process_time() - start
assert len(model.layers) == 80 and all(weights.is_meta for weights in model._module.parameters())
assert sum(weights.numel() for weights in model._module.parameters()) > 70e9 and len(model.tokenizer) == 128256
peak, = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]     # of this program alone
print(seconds, int(peak) / 2**20)
"""


def large_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """128,256 tokens and nearly as many merges, as Llama 3 has."""
    from tokenizers import Tokenizer, models
    letters = [chr(0x100 + i) for i in range(256)]
    two = [(a, b) for a in letters for b in letters]
    three = [(a + b, c) for (a, b), c in zip(two, letters * 256)][:128256 - 258 - len(two)]
    vocabulary = ["<s>", "</s>", *letters, *map("".join, two + three)]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, two + three)),
        bos_token="<s>", eos_token="</s>")


def test_a_70b_target_takes_little_memory_here(tmp_path):
    folder = tmp_path / "70b"
    transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                             num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
                             architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    large_tokenizer().save_pretrained(folder)
    with Hub({"some/70b": {"main": folder}}) as hub:
        result = subprocess.run([sys.executable, "-c", META], cwd=ROOT, env=hub.surroundings(tmp_path), capture_output=True,
                                text=True)
    assert result.returncode == 0, result.stderr
    seconds, gigabytes = map(float, result.stdout.split())
    print(f"70B: {seconds:.1f} s, {gigabytes:.2f} GiB at most")
    assert seconds < 10 and gigabytes < 0.93    # 1 GB


# ================================================================ the five scripts


COMMON = ["--random", "2", "--sentences", "120", "--alpha", "2"]
EMOTIONS = [*COMMON, "--limit", "4", "--pairs", "10", "--shots", "0"]
ALIGNED = [*COMMON, "--src", "toy/llama-s-chat", "--src-base", "toy/llama-s", "--tgt", "toy/llama-m", "--tgt-chat",
           "toy/llama-m-chat", "--maps", "1"]
SCRIPTS = {
    "exp_emotion": ["--src", "toy/llama-s", "--tgt", "toy/llama-m", *EMOTIONS, "--maps", "1"],
    "exp_truthfulqa": [*ALIGNED, "--limit", "12", "--layer", "0.75", "--generate", "2"],
    "exp_toxigen": [*ALIGNED, "--limit", "3", "--validation", "2", "--pairs", "5", "--layer", "0.75", "--max-new-tokens", "6",
                    "--classifier", str(TOY / "models" / "classifier")],
    "exp_pretraining": ["--tgt", "toy/step_0400", "toy/step_3000", "--tokens", "1", "2", *EMOTIONS],
    "exp_pythia": ["--models", "toy/pythia-1", "toy/pythia-3", *EMOTIONS],
}
ALL = """
import importlib, json, sys, traceback
import common
common.Run.figure = lambda *_: None             # takes half a second, and is tested elsewhere
for name, argv in json.load(sys.stdin):
    common.model_config.cache_clear(), common.TRAFFIC.update(dict.fromkeys(common.TRAFFIC, 0))      # as in a new process
    try:
        importlib.import_module(name).main(argv)
    except BaseException:
        traceback.print_exc()
"""


@contextlib.contextmanager
def hub_of_the_zoo(home: Path):
    """(environment of a process that finds the zoo on a hub, names of the weights that were asked for)."""
    if HOST:                                    # which came with a hub of its own
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME")}
        yield kept | {"HF_HOME": str(home / "hf"), "CONTRANS_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)}, None
    else:
        with Hub({name: {"main": folder} for name, folder in ZOO.items()}) as hub:
            yield hub.surroundings(home) | {"NDIF_API_KEY": KEY, "PYTHONPATH": str(ROOT)}, hub.loaded


@pytest.fixture(scope="module")
def scripts(tmp_path_factory, server):
    """Each script here, with its target on NDIF, and with both models there: its folder, what it printed and loaded."""
    home, runs = tmp_path_factory.mktemp("scripts"), []
    modes = {"here": [], "target": ["--remote"], "both": ["--remote", "both"]}
    with contextlib.ExitStack() as stack:
        for mode, more in modes.items():
            (home / mode).mkdir()
            env, loaded = stack.enter_context(hub_of_the_zoo(home / mode))
            names = SCRIPTS if mode != "both" else ["exp_truthfulqa"]
            jobs = [(name, [*SCRIPTS[name], *more, *(["--ndif-host", server.url] if more else []), "--out", "out"])
                    for name in names]
            process = subprocess.Popen([sys.executable, "-c", ALL], cwd=home / mode, env=env, text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            process.stdin.write(json.dumps(jobs)), process.stdin.close()
            runs.append((mode, process, loaded))
        return {mode: SimpleNamespace(folder=home / mode, printed=process.stdout.read(), code=process.wait(),
                                      loaded={name for name, *_ in loaded or []}) for mode, process, loaded in runs}


def records(run: SimpleNamespace, script: str) -> list[dict]:
    folders = list((run.folder / "out" / script).glob("*"))
    assert len(folders) == 1 and (folders[0] / "records.jsonl").exists(), run.printed
    return [json.loads(line) for line in (folders[0] / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("script, mode", [*((script, "target") for script in SCRIPTS), ("exp_truthfulqa", "both")])
def test_a_script_gives_the_records_of_a_local_run(script, mode, scripts):
    here, there = records(scripts["here"], script), records(scripts[mode], script)
    assert len(here) > 20 and same(here, there)


@pytest.mark.slow
def test_scripts_load_no_weights_of_what_runs_on_ndif(scripts):
    if HOST:
        pytest.skip("the hub of NDIF_TEST_HOST keeps no log")
    assert scripts["target"].loaded == {"toy/llama-s", "toy/llama-s-chat"} and scripts["both"].loaded == set()
    assert "toy/llama-m" in scripts["here"].loaded


@pytest.mark.slow
def test_the_key_is_nowhere(scripts):
    for run in scripts.values():
        assert KEY not in run.printed
        for path in run.folder.rglob("*"):
            assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.mark.slow
def test_scripts_record_what_they_cost(scripts):
    for script in SCRIPTS:
        (path,) = (scripts["target"].folder / "out" / script).glob("*/ndif.json")
        cost = json.loads(path.read_text())
        assert cost["requests"] > 5 and cost["failed"] == 0 and cost["bytes up"] > 1000 and cost["bytes down"] > 1000
    assert not list((scripts["here"].folder / "out").glob("*/*/ndif.json"))


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_and_asks_for_nothing_twice(tmp_path, own, scripts):
    script = "exp_pythia"
    with hub_of_the_zoo(tmp_path) as (env, _):
        argv = [sys.executable, str(ROOT / f"{script}.py"), *SCRIPTS[script], "--remote", "--ndif-host", own.url,
                "--out", "out"]
        before = len(own.log())
        for jobs, end, code in ((15, signal.SIGKILL, -9), (30, signal.SIGINT, 130)):
            own.fault("slow", after=before + jobs - len(own.log()), seconds=2)
            process = subprocess.Popen(argv, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            while len(own.log()) <= before + jobs:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(end)
            errors = process.communicate()[1]
            assert process.returncode == code and "Traceback" not in errors
        assert errors.splitlines()[-1] == "stopped; the same command goes on from here"
        result = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    run = SimpleNamespace(folder=tmp_path, printed=result.stdout)
    assert same(records(run, script), records(scripts["here"], script))
    (path,) = (scripts["target"].folder / "out" / script).glob("*/ndif.json")
    assert len(own.log()) - before == json.loads(path.read_text())["requests"] + 2      # the jobs that were under way


# ================================================================ how little travels


@pytest.fixture(scope="module")
def questions():
    if not REAL.is_dir():
        pytest.skip("no copy of the real questions in ../shared/data")
    return exp_truthfulqa.load_questions(REAL)


@pytest.mark.slow
def test_mc1_of_817_questions_needs_at_most_one_kilobyte_each(questions, tmp_path):
    """A tiny random model with a vocabulary of these questions: what travels down does not depend on the size of a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([text for question in questions for text in (question.text, *question.answers)],
                            trainers.BpeTrainer(vocab_size=4000, special_tokens=["</s>"], show_progress=False,
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(vocab_size=len(bpe.get_vocab()), hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    args = exp_truthfulqa.options([])
    with serve({"some/model": folder}) as server:
        there, here = away(server, "some/model", folder), load_model(str(folder), device="cpu")
        move = [Transplant.of(vector(16), 1, 2)]
        found = exp_truthfulqa.answer(there, args, questions, move)
        jobs = server.log()
        assert same(exp_truthfulqa.answer(here, args, questions, move), found)
    each = sum(job["down"] for job in jobs) / len(questions)
    print(f"817 questions: {len(jobs)} jobs, {each:.0f} bytes down and {sum(job['up'] for job in jobs) / len(questions):.0f} "
          f"bytes up a question")
    assert len(questions) == 817 and each <= 1000
