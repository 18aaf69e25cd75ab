"""Models on NDIF: every function and every script gives the numbers of a local run.

    pytest tests/test_ndif.py           functions, faults, checks before any work
    pytest tests/test_ndif.py -m slow   the scripts, with --remote

Both start tests/ndif_server.py. NDIF_TEST_HOST=http://... takes a server that is up instead; it
must know toy/NAME as data/toy/models/NAME, and NDIF_API_KEY must hold a key. Tests that inject
faults or read the server's log are skipped then.
"""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import harness
from common import (
    BASE,
    Transplant,
    choice_logprobs,
    concept_vector,
    generate,
    hidden_states,
    logit_lens,
    next_token_logits,
    perplexity,
    score_labels,
)
from harness import NDIF_STATS, TOY
from models import load_model

import huggingface_hub
import nnsight
import pytest
import torch
import transformers
from conftest import CONFIGS, MAIN, ROOT, close, same_records, save_model, slow, vectors
from hub import Hub
from ndif_server import serve
from test_harness import parse

HOST = os.environ.get("NDIF_TEST_HOST")
KEY = "a-key-that-must-never-be-seen"
SHIPPED = {"builtins", "cloudpickle", "collections", "nnsight", "torch", "transformers", "warnings"}
FOLDERS = [*(TOY / "models").resolve().iterdir(), *(TOY / "models" / "amber").resolve().iterdir()]
ZOO = {f"toy/{path.name}": path for path in FOLDERS if (path / "config.json").exists()}

# ================================================================ the server, and models on it


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Random models of the four main families."""
    home = tmp_path_factory.mktemp("families")
    found = {}
    for name in MAIN:
        config_class, settings, *_ = CONFIGS[name]
        found[f"random/{name}"] = save_model(home / name, config_class, **settings)
    return found


@pytest.fixture(scope="module")
def server(families):
    config, before = nnsight.CONFIG, nnsight.CONFIG.model_copy(deep=True)
    config.APP.REMOTE_LOGGING = False
    with pytest.MonkeyPatch.context() as patch:
        # nnsight asks the hub how a name is spelt; there is no hub in this process
        patch.setattr(huggingface_hub.HfApi, "model_info", lambda _, name: SimpleNamespace(id=name))
        if HOST:
            yield SimpleNamespace(url=HOST)
        else:
            config.API.APIKEY = KEY
            patch.setenv("NDIF_API_KEY", KEY)
            with serve(ZOO | families, needs_key=KEY) as own:
                yield own
    config.API, config.APP = before.API, before.APP


@pytest.fixture
def own(server):
    """The server of these tests, which keeps a log and fails on demand."""
    if HOST:
        pytest.skip("no faults and no log on the server of NDIF_TEST_HOST")
    server.set(running=None, listed=None, deploys=[], needs_key=KEY, faults=[])
    yield server
    server.set(running=None, listed=None, deploys=[], needs_key=KEY, faults=[])


def remote(server, name, folder, batch_tokens=60):
    """A model on the server. Six texts make several batches."""
    model = load_model(str(folder), remote=server.url, batch_tokens=batch_tokens)
    model.nn.repo_id = name
    return model


def local(name):
    return load_model(str(ZOO[name]), device="cpu", batch_tokens=60)


@pytest.fixture(scope="module")
def here():
    return local("toy/llama-m")


@pytest.fixture
def there(server):
    return remote(server, "toy/llama-m", ZOO["toy/llama-m"])


@pytest.fixture(scope="module")
def small():
    """(aligned, base) small models of EFT, here."""
    return local("toy/llama-s-chat"), local("toy/llama-s")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test has an empty cache, counts from zero and hardly waits."""
    monkeypatch.setitem(harness.CACHE, "folder", tmp_path / "cache")
    monkeypatch.setattr(harness, "RETRY_SECONDS", [0.01] * 4)
    NDIF_STATS.update(dict.fromkeys(NDIF_STATS, 0))


def same(one, other):
    """Equal; numbers to 5e-5, since other batches add them in another order."""
    if isinstance(one, torch.Tensor):
        close(one, other, 5e-5) if one.is_floating_point() else close(one, other, 0)
    elif isinstance(one, tuple):
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    else:
        assert one == other


# ================================================================ every function of common.py

TEXTS = [
    "the town of Ralvo is quite far",
    "my friend said that",
    "Scenario: you see a spider in the house. You feel",
    "Where is the river?",
    "one two three four five six seven",
    "a red ball",
]
SHOTS = "Scenario: this start is shared by all prompts, so it is read once and kept. " * 3
LABELS = ["happiness", "sadness", "anger"]


def transplants(width, first=3, second=5):
    """None, one, a sum in two blocks, and a sum in one."""
    v, w = vectors(2, width)
    one = Transplant.of(v, second, 1)
    two = Transplant.of(w, first, 0.5)
    return [BASE, one, one + two, one + Transplant.of(w, second, -2)]


def pairs(texts):
    """Three choices for each context, which are branches of one tree."""
    choices = (" happy", " very sad and tired", " a red ball")
    return [(text, choice) for text in texts for choice in choices]


STEERED = transplants(96)  # the width of llama-m
LONG = [SHOTS + text for text in TEXTS]
SAMPLED = {"sample": True, "seed": 3}
CALLS = {
    "states": (hidden_states, TEXTS, [5, 2, 5]),
    "states of all blocks": (hidden_states, TEXTS),
    "states, transplant": (hidden_states, TEXTS, [2, 6], STEERED[2]),
    "states, prefix": (hidden_states, LONG, [2, 6], STEERED[2]),
    "next token": (next_token_logits, TEXTS, STEERED),
    "next token, prefix": (next_token_logits, LONG, STEERED),
    "labels, prefix": (score_labels, LONG, LABELS, STEERED),
    "choices": (choice_logprobs, pairs(TEXTS), STEERED),
    "choices, prefix": (choice_logprobs, pairs(LONG), STEERED),
    "choices, EFT": (choice_logprobs, pairs(TEXTS), STEERED[:2]),
    "text": (generate, TEXTS, STEERED, 8),
    "text, sampled": (generate, TEXTS, STEERED[1:3], 8),
    "text, EFT": (generate, TEXTS, STEERED[:2], 6),
    "perplexity": (perplexity, LONG, STEERED, 16),
    "logit lens": (logit_lens, TEXTS, 5, STEERED[:3]),
    "concept": (concept_vector, TEXTS[:3], TEXTS[3:], [6, 2]),
    "concept, pca": (concept_vector, TEXTS[:3], TEXTS[3:], [6], "pca"),
}


QUICK = ["states, transplant", "states, prefix", "next token", "labels, prefix", "choices", "text"]
QUICK += ["concept"]


def call(name, model, small):
    function, *args = CALLS[name]
    options = SAMPLED if name == "text, sampled" else {}
    if name.endswith("EFT"):
        options = {"eft": small}
    return function(model, *args, **options)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CALLS])
def test_a_function_returns_what_it_returns_locally(name, here, there, small, server):
    same(call(name, here, small), call(name, there, small))
    assert NDIF_STATS["requests"]
    assert NDIF_STATS["failed"] == 0
    assert all(weights.is_meta for weights in there.nn._module.parameters())  # none were loaded
    if HOST:
        return
    for job in server.log()[-NDIF_STATS["requests"] :]:
        assert job["status"] == "COMPLETED"
        assert job["key"]
        assert job["lines"] == []
        assert not job["bytecode"]  # it runs on any version of Python
        assert set(job["modules"]) <= SHIPPED  # and needs none of our files


@pytest.mark.slow
def test_the_next_job_is_sent_while_one_runs(there, own):
    start = len(own.log())
    own.fault("slow", seconds=3)  # the first job: the second is ready long before it ends
    texts = [f"The dog of {number} old men is brown" for number in range(160)]
    hidden_states(there, texts, [1])
    waited = [job["unfinished"] for job in own.log()[start:]]
    assert len(waited) > 2
    assert waited[:2] == [0, 1]
    assert max(waited) == 1  # never three at a time


def test_a_long_prefix_makes_fewer_and_longer_jobs(there, own):
    """Each job reads the prefix anew."""
    moves = transplants(there.config.hidden_size)
    tails = [f"{number} is the number" for number in range(200, 240)]
    jobs = []
    for texts in (tails, [SHOTS + tail for tail in tails]):
        start = len(own.log())
        score_labels(there, texts, LABELS, moves)
        jobs.append(len(own.log()) - start)
    assert jobs[1] < jobs[0]


@pytest.mark.parametrize("family", [MAIN[0], *map(slow, MAIN[1:])])
def test_every_family_of_models(family, own, families):
    name = f"random/{family}"
    models = load_model(str(families[name]), device="cpu"), remote(own, name, families[name])
    steered = transplants(32, 1, 2)
    texts = ["Tom felt very happy.", "Lily lost her old cat.", "the dog"]
    choices = [(text, end) for text in texts for end in (" sad", " and sat down")]
    results = []
    for model in models:
        states = hidden_states(model, texts, [1, 3], steered[2])
        scores = choice_logprobs(model, choices, steered)
        written = generate(model, texts, steered, 5)
        lens = logit_lens(model, texts, 2, steered[:2])
        results.append((states, scores, written, lens))
    same(*results)
    assert (*models[0].sharing[:4], False) == models[1].sharing  # a block is not interrupted there


@pytest.mark.slow
def test_small_models_of_eft_may_be_on_ndif_too(here, there, small, server):
    names = ("toy/llama-s-chat", "toy/llama-s")
    both = tuple(remote(server, name, ZOO[name]) for name in names)
    same(call("choices, EFT", here, small), call("choices, EFT", there, both))
    same(call("text, EFT", here, small), call("text, EFT", there, both))


def test_only_the_mean_difference_of_a_concept_travels(here, own):
    there = remote(own, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=16384)
    positive = [f"{text} {number}" for number in range(5) for text in TEXTS]
    negative = positive[::-1][:-1] + ["the end"]
    layers = list(range(6))
    v = concept_vector(there, positive, negative, layers)
    [job] = own.log()[-NDIF_STATS["requests"] :]
    assert job["down"] < v.numel() * 4 + 2000  # 60 states would be 138 KB
    same(concept_vector(here, positive, negative, layers), v)


def test_many_batches_are_one_job(here, own):
    there = remote(own, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=1)
    same(hidden_states(here, TEXTS * 2, [2]), hidden_states(there, TEXTS * 2, [2]))
    assert NDIF_STATS["requests"] == 2  # twelve batches


def test_an_answer_is_cached(there, small, own, monkeypatch):
    def both(model):
        return call("choices", model, small), call("text", model, small)

    first = both(there)
    asked = len(own.log())
    again = remote(own, "toy/llama-m", ZOO["toy/llama-m"])  # as in a new process
    same(first, both(again))
    assert len(own.log()) == asked
    assert NDIF_STATS["from cache"]
    monkeypatch.setitem(harness.CACHE, "folder", None)
    both(again)
    assert len(own.log()) > asked


# ================================================================ faults


def states(model):
    """Two jobs: twelve batches of one text, if model.batch_tokens is 1."""
    return hidden_states(model, TEXTS * 2, [2, 5], STEERED[1])


@pytest.fixture
def slow_there(server):
    return remote(server, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=1)


RETRIED = ["500", "502", "503", "gone", "subscribe", "cut", "cancelled", "lost", "error"]


@pytest.mark.parametrize("fault", RETRIED)
def test_a_failed_job_is_sent_again(fault, here, slow_there, own, capsys):
    own.fault(fault, after=1)
    same(states(here), states(slow_there))
    assert (NDIF_STATS["requests"], NDIF_STATS["failed"]) == (3, 1)
    printed, line = capsys.readouterr()
    assert printed == "" and re.fullmatch(r"NDIF: .+; retry in 0.01 s\n", line)


def test_a_server_that_is_gone_may_come_back(here, slow_there, own, monkeypatch):
    monkeypatch.setattr(harness, "RETRY_SECONDS", [0.2] * 20)
    own.fault("slow", after=1, seconds=1)
    threading.Timer(0.5, own.stop).start()
    threading.Timer(1.5, own.start).start()
    same(states(here), states(slow_there))
    assert NDIF_STATS["failed"] >= 2


def test_retries_end_and_finished_jobs_are_kept(here, slow_there, own):
    tries = len(harness.RETRY_SECONDS) + 1
    own.fault("500", after=1, count=tries)
    with pytest.raises(SystemExit) as stopped:
        states(slow_there)
    assert stopped.value.code == 2
    assert NDIF_STATS["requests"] == 1 + tries
    same(states(here), states(slow_there))
    assert NDIF_STATS["requests"] == 1 + tries + 1  # the second job


def test_what_the_server_refuses_is_not_sent_again(there, own, one_line):
    own.set(needs_key="another")
    line = one_line(lambda: states(there), "Missing or invalid API key")
    assert NDIF_STATS["requests"] == 1
    assert KEY not in line


def test_a_key_that_the_server_repeats_is_not_printed(there, own, one_line):
    own.fault("400")
    line = one_line(lambda: states(there), "Invalid API key format: '(the key)'")
    assert KEY not in line


def test_the_same_traceback_twice_ends_the_program(there, own, capsys):
    own.fault("error", count=9)
    with pytest.raises(SystemExit):
        states(there)
    assert NDIF_STATS["requests"] == 2
    assert "RuntimeError: injected" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["cuda", "timeout"])
def test_a_job_too_large_for_the_server_is_halved(fault, here, own):
    there = remote(own, "toy/llama-m", ZOO["toy/llama-m"], batch_tokens=10000)
    own.fault(fault)
    same(states(here), states(there))
    assert there.batch_tokens == 5000


@pytest.mark.parametrize(
    "fault, error", [("cuda", torch.OutOfMemoryError), ("timeout", TimeoutError)]
)
def test_one_text_too_large_for_the_server_is_an_error(fault, error, there, own):
    own.fault(fault, count=9)
    with pytest.raises(error):
        hidden_states(there, TEXTS[:1], [2])


# ================================================================ before any work


def check(*argv):
    """What a script calls before it reads a model."""
    return harness.model_options(parse(TOY, "--src toy/llama-s --tgt toy/llama-m --remote", *argv))


def test_a_model_that_runs_is_accepted(own):
    options = check("--ndif-host", f"{own.url}/")
    assert options["remote"] == ["toy/llama-m"] and options["host"] == own.url


def test_no_key(server, monkeypatch, one_line):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    one_line(lambda: check("--ndif-host", server.url), "NDIF_API_KEY", "https://login.ndif.us")


@pytest.mark.parametrize(
    "host", ["localhost:8001", "ftp://ndif.us", "http://127.0.0.1:1", "http://"]
)
def test_no_server(host, server, one_line):
    one_line(lambda: check("--ndif-host", host), host)


def test_another_server(server, one_line):
    with Hub({}) as hub:  # answers 404
        host = f"http://127.0.0.1:{hub.server.server_port}"
        one_line(lambda: check("--ndif-host", host), f"no NDIF at {host}", "404")


@pytest.mark.parametrize(
    "argv, missing",
    [
        ([], "toy/llama-m"),
        (["--remote", "both"], "toy/llama-s"),
        (["--tgt-chat", "toy/llama-m-chat"], "toy/llama-m-chat"),
        (["--tgt", "toy/llama-m@step9"], "toy/llama-m@step9"),
    ],
)
def test_a_model_that_the_hosted_service_does_not_have(argv, missing, own, one_line, monkeypatch):
    running = {"toy/llama-m", "toy/pythia-1"} - {missing}
    own.set(running=sorted(running), listed=sorted(running))
    monkeypatch.setattr(harness, "HOSTED_NDIF", own.url)
    expected = f"{missing} is not on NDIF; these run: {', '.join(sorted(running))}"
    one_line(lambda: check("--ndif-host", own.url, *argv), expected)


def test_a_model_may_be_deployed_when_a_job_asks_for_it(
    here, there, own, capsys, one_line, monkeypatch
):
    own.set(running=[], deploys=["toy/llama-m"])
    check("--ndif-host", own.url)
    assert "toy/llama-m does not run" in capsys.readouterr().out
    same(states(here), states(there))
    own.set(running=[], deploys=[])
    monkeypatch.setitem(harness.CACHE, "folder", None)
    one_line(lambda: states(there), "Could not deploy")
    assert NDIF_STATS["failed"] == 1


@pytest.mark.parametrize("package", ["nnsight", "transformers"])
def test_other_versions(package, server, monkeypatch, one_line):
    version = importlib.metadata.version
    theirs = version(package)
    changed = {package: "0.0.1"}
    monkeypatch.setattr(harness, "version", lambda name: changed.get(name) or version(name))
    advice = f"pip install {package}=={theirs}"
    one_line(lambda: check("--ndif-host", server.url), "you have 0.0.1", advice)


@pytest.mark.parametrize("name", [str(ZOO["toy/llama-m"]), "/no/such/folder", "llama-m"])
def test_a_model_without_a_hub_id(name, server, one_line):
    one_line(lambda: check("--ndif-host", server.url, "--tgt", name), "hub ids", name)


# ================================================================ the scripts

SHARED = "--random 2 --permutations 5 --sentences 120 --alpha 2 --maps 1"
EMOTIONS = f"{SHARED} --limit 4 --pairs 10 --shots 0"
SOURCES = "--src toy/llama-s-chat --src-base toy/llama-s"
ALIGNED = f"{SHARED} {SOURCES} --tgt toy/llama-m --tgt-chat toy/llama-m-chat --layer 0.75"
SCRIPTS = {
    "exp_emotion": f"{EMOTIONS} --src toy/llama-s --tgt toy/llama-m",
    "exp_truthfulqa": f"{ALIGNED} --limit 12",
    "exp_toxigen": f"{ALIGNED} --limit 3 --validation 2 --pairs 5 --max-new-tokens 6"
    f" --classifier {ZOO['toy/classifier']}",
    "exp_pretraining": f"{EMOTIONS} --tgt toy/step_0400 toy/step_3000 --tokens 1 2",
    "exp_pythia": f"{EMOTIONS} --models toy/pythia-1 toy/pythia-3",
}


@pytest.fixture(scope="module")
def run_script(tmp_path_factory, server):
    """run_script(name, option, …) -> (records, names of the weights loaded here, all its files)."""
    made = {}

    def run(name, *remote):
        if (name, remote) in made:
            return made[name, remote]
        home = tmp_path_factory.mktemp(name)
        with Hub({model: {"main": folder} for model, folder in ZOO.items()}) as hub:
            key = os.environ["NDIF_API_KEY"] if HOST else KEY
            env = hub.surroundings(home) | {"NDIF_API_KEY": key}
            if HOST:  # it comes with a hub of its own
                env["HF_ENDPOINT"] = os.environ["HF_ENDPOINT"]
            command = [sys.executable, ROOT / f"{name}.py", *SCRIPTS[name].split()]
            command += [*remote, "--out", home]
            if remote:
                command += ["--ndif-host", server.url]
            result = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
            loaded = {model for model, *_ in hub.loaded}
        assert result.returncode == 0, result.stderr
        [path] = home.glob(f"{name}/*/records.csv")
        records = harness.read_table(path, "run")
        files = [result.stdout.encode(), result.stderr.encode()]
        files += [path.read_bytes() for path in home.rglob("*") if path.is_file()]
        made[name, remote] = records, loaded, files
        return made[name, remote]

    return run


MODES = [*((script, "target") for script in SCRIPTS), ("exp_truthfulqa", "both")]


@pytest.mark.slow
@pytest.mark.parametrize("script, mode", MODES)
def test_a_script_writes_the_records_of_a_local_run(script, mode, run_script):
    records, _, _ = run_script(script)
    remote_records, loaded, files = run_script(script, "--remote", mode)
    same_records(records, remote_records)
    running = {name for name in SCRIPTS[script].split() if name.startswith("toy/")}
    if mode == "target":
        running -= {*SOURCES.split(), "toy/pythia-1", "toy/step_3000"}
    assert HOST or not loaded & running
    assert HOST or not any(KEY.encode() in content for content in files)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_checks_ndif_before_it_reads_a_model(
    script, server, tmp_path, one_line, monkeypatch
):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_: pytest.fail("read"))
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    argv = f"{SCRIPTS[script]} --remote --ndif-host {server.url} --out {tmp_path}/out".split()
    one_line(lambda: importlib.import_module(script).main(argv), "NDIF_API_KEY")
    assert not (tmp_path / "out").exists()
