"""What a result may rest on: caches that are checked, disks that fill up, numbers that are none, runs that are replayed.

    pytest tests/test_trust.py                          on tiny models and on folders
    pytest tests/test_trust.py -m slow                  bfloat16 against float32 on the zoo
"""

import errno
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import exp_emotion
from common import Transplant
from conftest import CONFIGS, save_model

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data" / "toy"
TEXTS = ["Tom felt", "Lily lost her old cat", "The capital of the old town"]


FAMILIES = {"toy": dict(src="a", tgt=["b"], layer="0.75", alpha=[1.0], limit=5, sentences=10),
            "custom": dict(layer="0.5", alpha=[1.0], limit=5, sentences=10)}


def parse(*argv):
    return common.parse_options(common.option_parser("", FAMILIES), FAMILIES, list(map(str, argv)))


def one_line(capsys, call) -> str:
    """The one line in which call() ends the program, with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


# ================================================================ the cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(common.Settings, "cache", True)
    return tmp_path / "cache"


@pytest.fixture
def states(llama, cache, monkeypatch):
    """states(texts, layers) -> (hidden states, whether a model was asked for them)."""
    model, traced = llama[0], []
    plain = model.trace
    monkeypatch.setattr(model, "trace", lambda *args, **options: traced.append(1) or plain(*args, **options))

    def get(texts=TEXTS, layers=(1, 2)):
        traced.clear()
        return common.hidden_states(model, list(texts), list(layers)), bool(traced)
    return get


def flipped(content: bytes, seed: int) -> bytes:
    """One bit of it, anywhere, is another."""
    place = random.Random(seed).randrange(8 * len(content))
    return content[:place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[place // 8 + 1:]


DAMAGES = {"cut": lambda content, other: content[:len(content) // 2], "empty": lambda content, other: b"",
           "one byte short": lambda content, other: content[:-1], "one byte more": lambda content, other: content + b"\0",
           "another's content": lambda content, other: other,
           **{f"a bit, {seed}": lambda content, other, seed=seed: flipped(content, seed) for seed in range(12)}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_computed_again_with_a_warning(damage, states, cache, capsys):
    wanted, asked = states()
    kept, = cache.iterdir()
    states(TEXTS[::-1])
    other, = set(cache.iterdir()) - {kept}
    content = kept.read_bytes()
    assert asked and not states()[1]
    kept.write_bytes(DAMAGES[damage](content, other.read_bytes()))
    capsys.readouterr()
    again, asked = states()
    assert asked and torch.equal(again, wanted)
    assert str(kept) in (said := capsys.readouterr().err) and "damaged" in said and said.count("\n") == 1
    assert kept.read_bytes() == content and not states()[1]                     # whole again, and read again


def test_the_cache_is_keyed_by_all_that_the_states_depend_on(states, llama, zoo, monkeypatch, tmp_path):
    assert states()[1] and not states()[1]
    assert states(TEXTS[:2])[1] and states(TEXTS[::-1])[1] and states([text + " " for text in TEXTS])[1]
    assert states(layers=[2, 1])[1] and states(layers=[1])[1]
    assert states(["Tom", "felt"])[1] and states(["Tom felt", ""])[1]           # texts do not run into each other
    assert not states()[1]
    monkeypatch.setattr(llama[0], "fingerprint", "sha256:another")
    assert states()[1]
    monkeypatch.undo()


@pytest.mark.parametrize("package", ["torch", "transformers", "nnsight"])
def test_another_version_makes_its_own_files(package, states, monkeypatch):
    import importlib.metadata
    version = importlib.metadata.version
    assert states()[1]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else version(name))
    assert states()[1] and not states()[1]
    monkeypatch.setattr(common, "CACHE_VERSION", common.CACHE_VERSION + 1)
    assert states()[1]


def test_another_dtype_makes_its_own_files(cache, llama):
    for number, dtype in enumerate(["float32", "bfloat16"], 1):
        common.hidden_states(common.load_model(llama[0].name, dtype=dtype, device="cpu"), TEXTS, [1])
        assert len(list(cache.iterdir())) == number


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_byte_in_a_model_folder_is_another_model(file, tmp_path):
    folder = save_model(tmp_path / "model", *CONFIGS["llama"][:1], **CONFIGS["llama"][1])
    before = common.fingerprint(str(folder))
    (folder / file).write_bytes(flipped((folder / file).read_bytes(), 1))
    assert common.fingerprint(str(folder)) != before


def test_no_cache_neither_reads_nor_writes(states, cache, monkeypatch):
    states()
    kept, = cache.iterdir()
    monkeypatch.setattr(common.Settings, "cache", False)
    assert states()[1] and states(TEXTS[:1])[1] and list(cache.iterdir()) == [kept]


def test_the_cache_is_shown_and_cleared(states, cache, capsys):
    states(), states(TEXTS[:1])
    size = sum(path.stat().st_size for path in cache.iterdir())
    (cache / "of another program").write_text("kept")
    (cache / "states-x.pt.1.tmp").write_text("half")                            # of a run that was killed
    common.show_cache([])
    said = capsys.readouterr().out
    assert str(cache) in said and "3 files of states" in said and f"{(size + 4) / 1e6:.1f} MB" in said
    assert len(list(cache.iterdir())) == 4
    common.show_cache(["--clear"])
    assert "deleted" in capsys.readouterr().out and [path.name for path in cache.iterdir()] == ["of another program"]
    assert states()[1]


def test_python_common_py_shows_the_cache_of_the_environment(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), "--clear"], capture_output=True, text=True,
                          env=os.environ | {"CONTRANS_CACHE": str(tmp_path / "mine")}, cwd=tmp_path)
    assert done.returncode == 0 and str(tmp_path / "mine") in done.stdout and "0 files of states" in done.stdout


# ================================================================ disks and half-written files


def a_run(tmp_path, inputs={"models": "m"}) -> common.Run:
    return common.Run("exp_test", parse("--data", tmp_path, "--out", tmp_path / "out"), inputs)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("when", ["the bytes", "the rename", "the folder"])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_no_half_file(number, when, states, cache, tmp_path, monkeypatch,
                                                                             capsys):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    class Full(io.RawIOBase):
        write = full
    with monkeypatch.context() as patch:
        if when == "the bytes":
            real = open

            def opened(path, mode="r", *rest, **options):
                file = real(path, mode, *rest, **options)
                return file.close() or Full() if str(path).endswith(".tmp") else file
            patch.setattr("builtins.open", opened)
        patch.setattr(os, "replace", full if when == "the rename" else os.replace)
        if when == "the folder":
            patch.setattr(os, "mkdir", full)
        said = one_line(capsys, states)
        assert ("no space left" in said) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        assert "cache" in said
    assert not list(cache.glob("*"))
    assert states()[1] and not states()[1]                                      # it goes on as soon as there is room
    run = a_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        one_line(capsys, lambda: run.step("one", lambda: 1))
        one_line(capsys, lambda: run.save([], [], "table"))
    assert not list(run.steps.iterdir()) and not (run.folder / "records.csv").exists()
    assert run.step("one", lambda: 1) == 1


def test_a_real_limit_on_file_sizes_is_one_line(tmp_path):
    """The kernel says EFBIG in the middle of a file, as ENOSPC on a full disk."""
    code = ("import resource, common; from pathlib import Path; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"common.write_whole(Path({str(tmp_path / 'large')!r}), lambda file: file.write(bytes(5000)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: no space left") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_half_written_is_no_result(tmp_path):
    run = a_run(tmp_path)
    half = run._step_file("one", "json")
    half.with_name(half.name + ".1.tmp").write_text('{"a": ')
    assert a_run(tmp_path, inputs={"models": "other"}).step("one", lambda: 2) == 2     # nothing was begun


@pytest.mark.parametrize("content", ["", '{"a": ', "[1, 2"])
def test_a_damaged_step_is_named_and_not_taken_for_a_result(content, tmp_path, capsys):
    run = a_run(tmp_path)
    run.step("one", lambda: [1, 2, 3])
    run.tensors("two", lambda: {"v": torch.ones(3)})
    for path in run.steps.iterdir():
        path.write_text(content)
        again = a_run(tmp_path)
        ask, name = (again.step, "one") if path.suffix == ".json" else (again.tensors, "two")
        assert str(path) in one_line(capsys, lambda: ask(name, lambda: pytest.fail("computed")))
    (run.folder / "args.json").write_text(content)
    assert "args.json" in one_line(capsys, lambda: a_run(tmp_path))


# ================================================================ numbers that are none


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model whose block 2 is too large for float16."""
    folder = save_model(tmp_path_factory.mktemp("overflow") / "model", *CONFIGS["llama"][:1], **CONFIGS["llama"][1])
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("layers.2.mlp.down_proj.weight"):
            weights[name] *= 1e6 / weights[name].abs().max() * 0.06             # float16 ends at 65504
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return common.load_model(str(folder), dtype="float16", device="cpu"), common.load_model(str(folder), device="cpu")


ASK = {
    "hidden_states": lambda model, *moves: common.hidden_states(model, TEXTS, transplant=moves[0] if moves else None),
    "next_token_logits": lambda model, *moves: common.next_token_logits(model, TEXTS, moves or [common.BASE]),
    "choice_logprobs": lambda model, *moves: common.choice_logprobs(model, [(text, " red") for text in TEXTS],
                                                                    moves or [common.BASE]),
    "score_labels": lambda model, *moves: common.score_labels(model, TEXTS, ["happy", "sad"], moves or [common.BASE]),
    "perplexity": lambda model, *moves: common.perplexity(model, TEXTS, moves or [common.BASE]),
    "logit_lens": lambda model, *moves: common.logit_lens(model, TEXTS, 3, moves or [common.BASE]),
    "generate": lambda model, *moves: common.generate(model, TEXTS, *moves, max_new_tokens=3),
    "generate, sampled": lambda model, *moves: common.generate(model, TEXTS, *moves, max_new_tokens=3, sample=True),
}


@pytest.mark.parametrize("function", ASK)
def test_a_block_that_overflows_float16_is_named_with_its_dtype(function, overflowing, cache):
    half, whole = overflowing
    ASK[function](whole)                        # float32 has room for it
    with pytest.raises(FloatingPointError, match=r"after block 2 of .*\(torch.float16\).*--dtype bfloat16 or float32"):
        ASK[function](half)
    assert not [path for path in cache.glob("*") if "nan" in repr(torch.load(path))]


@pytest.mark.parametrize("alpha", [1e20, 1e30, 1e38, -1e30])
@pytest.mark.parametrize("function", ASK)
def test_a_strength_beyond_the_norms_is_refused_and_not_answered_by_zeros(function, alpha, pair):
    """RMSNorm turns a stream of 1e20 into zeros, in float32 and without a NaN: every answer would be as likely."""
    model, _ = pair
    move = Transplant.of(torch.ones(model.config.hidden_size), 1, alpha)
    with pytest.raises(FloatingPointError, match=r"NaN or infinity .* block 1 of .*\(torch.float32\).*smaller alpha"):
        ASK[function](model, move)


def test_a_strength_beyond_float16_is_refused(overflowing):
    move = Transplant.of(torch.ones(32), 0, 1e5)
    with pytest.raises(FloatingPointError, match=r"block 0 of .*\(torch.float16\)"):
        common.next_token_logits(overflowing[0], TEXTS, [move])
    common.next_token_logits(overflowing[1], TEXTS, [move])


@pytest.mark.parametrize("sample", [False, True])
def test_a_small_model_without_numbers_stops_a_text_under_eft(sample, llama, tmp_path):
    broken = common.load_model(llama[0].name, device="cpu")
    broken.layers[1].mlp.down_proj._module.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinity in the logits"):
        common.generate(llama[0], TEXTS, max_new_tokens=2, sample=sample, eft=(broken, llama[0]))


def test_an_overflow_in_a_script_is_one_line(tmp_path):
    small = TOY / "models" / "llama-s"
    argv = ["--src", small, "--tgt", small, "--alpha", "1e30", "--limit", "2", "--pairs", "10", "--shots", "0", "--sentences",
            "40", "--random", "1", "--maps", "1", "--out", tmp_path]
    done = subprocess.run([sys.executable, str(ROOT / "exp_emotion.py"), *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | {"CONTRANS_CACHE": str(tmp_path / "cache"), "TQDM_DISABLE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: NaN or infinity") and "block 6" in last and "torch.float32" in last
    assert not list(tmp_path.glob("exp_emotion/*/records.csv"))


# ================================================================ --replay

@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(*options) -> the folder of a run of exp_test that was begun in tmp_path/here with these."""
    monkeypatch.setattr(sys, "argv", ["exp_test.py"])
    (tmp_path / "here" / "texts").mkdir(parents=True)
    (tmp_path / "there").mkdir()

    def begin(*argv) -> Path:
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "here" / common.Run("exp_test", parse(*argv), {}).folder
    return begin


def same(one, two, *but) -> bool:
    return all(vars(one)[name] == vars(two)[name] for name in vars(one) if name not in {"command", "replay", "fresh", *but})


@pytest.mark.parametrize("words", [[], ["--seed", "3", "--alpha", "1", "-2", "1e-3", "--ridge=0.5"],
                                   ["--intercept", "--fresh"],
                                   ["--src", "org/model", "--tgt", "org/a", "org/b@main", "--layer", "2,3"]], ids=" ".join)
def test_a_replay_takes_all_options_and_goes_to_the_same_folder(words, begun):
    folder = begun("--data", "texts", *words)
    for option in ("--replay", "--repl"):                   # argparse takes abbreviations, and so does this
        again = parse(option, folder)
        assert same(again, parse("--data", "texts", *words)) and not again.fresh
        assert common.Run("exp_test", again, {}).folder.resolve() == folder.resolve()
    assert same(parse("--replay", common.Run("exp_test", again, {}).folder), again)         # a replay of a replay


def test_options_beside_replay_win(begun):
    folder = begun("--data", "texts", "--seed", "3", "--limit", "7", "--alpha", "1", "2")
    args = parse("--replay", folder, "--seed", "4", "--alpha", "5", "--fresh")
    assert (args.seed, args.alpha, args.limit, str(args.data), args.fresh) == (4, [5.0], 7, "texts", True)


@pytest.mark.parametrize("words", [["--data", "texts", "--src", "models/a", "--tgt", "models/b", "models/a"],
                                   ["--data=texts", "--src=models/a", "--tgt", "models/b"],
                                   ["--dat", "texts", "--src", "models/a", "--tgt", "models/b", "--out", "mine"]],
                         ids=" ".join)
def test_relative_paths_mean_what_they_meant_where_the_run_was_begun(words, begun, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "here" / "models" / name).mkdir(parents=True)
    folder = begun(*words)
    monkeypatch.chdir(tmp_path / "here")
    wanted = parse(*words)
    monkeypatch.chdir(tmp_path / "there")
    got = parse("--replay", os.path.relpath(folder))
    assert got.data.resolve() == tmp_path / "here" / "texts"
    models = [tmp_path / "here" / name for name in (wanted.src, *wanted.tgt)]
    assert [Path(name).resolve() for name in (got.src, *got.tgt)] == models
    assert "mine" not in words or got.out.resolve() == tmp_path / "here" / "mine"
    assert same(got, wanted, "data", "src", "src_base", "tgt", "out")


def test_words_that_only_look_like_paths_are_left_alone(begun, tmp_path, monkeypatch):
    for name in ("toy", "1", "org/model"):                  # folders with names of options' values
        (tmp_path / "here" / name).mkdir(parents=True)
    folder = begun("--data", "texts", "--family", "toy", "--limit", "1", "--src", "other/model", "--tgt", "org/b")
    monkeypatch.chdir(tmp_path / "there")
    args = parse("--replay", folder)
    assert (args.family, args.limit, args.src, args.tgt) == ("toy", 1, "other/model", ["org/b"])


BROKEN = {"no file": None, "not JSON": "{", "a list": "[1]", "no command": "{}", "an empty command": '{"command": []}',
          "numbers": '{"command": ["exp_test", 3]}', "null": "null", "a text": '{"command": "exp_test"}',
          "a number": '{"command": 3}'}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_holds_no_run_is_one_line(case, begun, tmp_path, capsys):
    if BROKEN[case]:
        (tmp_path / "args.json").write_text(BROKEN[case])
    said = one_line(capsys, lambda: parse("--replay", tmp_path))
    assert "--replay" in said and str(tmp_path) in said


def test_a_folder_of_another_script_is_named(begun, tmp_path, monkeypatch, capsys):
    folder = begun("--data", "texts")
    monkeypatch.setattr(sys, "argv", ["exp_other.py"])
    assert "was made by exp_test.py, not by exp_other.py" in one_line(capsys, lambda: parse("--replay", folder))


def test_replay_without_a_folder_is_one_line(begun, capsys):
    assert "--replay" in one_line(capsys, lambda: parse("--replay"))


# ================================================================ dtypes


@pytest.mark.slow
def test_bfloat16_and_float32_agree_within_their_intervals(tmp_path):
    """Every rate of one lies within the other's 95 % interval, for base, ConTrans and Self-Align at the same strength."""
    rates, prices = {}, []
    for dtype in ("float32", "bfloat16"):
        exp_emotion.main(["--family", "toy", "--tgt", str(TOY / "models" / "llama-m"), "--data", str(TOY), "--limit", "20",
                          "--random", "2", "--maps", "2", "--alpha", "2", "--sentences", "1000", "--dtype", dtype, "--out",
                          str(tmp_path / dtype)])
        path, = (tmp_path / dtype).glob("exp_emotion/*/records.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prices.append([row["value"] for row in rows if row["metric"] == "perplexity"])
        pooled = {}
        for row in rows:
            if row["metric"] in ("token_acc", "logit_acc") and row["split"] == "test":
                hits, n = pooled.get((row["metric"], row["method"]), (0, 0))
                pooled[row["metric"], row["method"]] = hits + round(row["value"] * row["n"]), n + row["n"]
        rates[dtype] = {key: (hits / n, *common.wilson(hits, n)) for key, (hits, n) in pooled.items()}
    one, two = rates.values()
    assert prices[0] != prices[1]               # they are two dtypes
    print("", *(f"{dtype}: {found}" for dtype, found in rates.items()), sep="\n")
    assert one.keys() == two.keys() and {method for _, method in one} >= {"base", "contrans", "self-align"}
    for key in one:
        for (value, *_), (_, low, high) in ((one[key], two[key]), (two[key], one[key])):
            assert low <= value <= high, key
    assert one["token_acc", "contrans"][0] > 0.5 > one["token_acc", "base"][0]      # there is something to agree on
