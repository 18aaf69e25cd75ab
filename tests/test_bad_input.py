"""What no script may take: one line that says where the fault is, exit code 2, and no model was loaded for it.

Faults of one script's own options and files stand in that script's tests; here are those that all of them share.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, SENTENCES, Reference, save_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import common
import exp_emotion
import exp_pretraining
import exp_pythia
import exp_toxigen
import exp_truthfulqa

TOY = Path(__file__).resolve().parents[1] / "data" / "toy"
ZOO = TOY / "models"
SCRIPTS = {
    script.__name__: script
    for script in (exp_emotion, exp_truthfulqa, exp_toxigen, exp_pretraining, exp_pythia)
}
EMOTIONS = ["exp_emotion", "exp_pretraining", "exp_pythia"]
STEPS = [str(ZOO / "amber" / name) for name in ("step_0400", "step_3000")]
MODELS = {
    "exp_pretraining": ["--tgt", *STEPS],
    "exp_pythia": ["--models", str(ZOO / "pythia-1"), str(ZOO / "pythia-2")],
}
SMALL = ["--sentences", "20", "--limit", "4", "--random", "1"]
QUICK = dict.fromkeys(EMOTIONS, ["--pairs", "10", "--shots", "0"]) | {
    "exp_toxigen": ["--pairs", "5", "--validation", "2"]
}


class Loaded(Exception):
    """The weights were asked for: everything before them was found good."""


def start(script: str, monkeypatch, tmp_path, *argv, replace: tuple = ()):
    """main() up to the first weights."""

    def load_model(*_, **__):
        raise Loaded

    monkeypatch.setattr(common, "load_model", load_model)
    given = [str(option) for option in argv]
    models = replace or MODELS.get(script, ["--family", "toy", "--tgt", str(ZOO / "llama-s")])
    texts = [] if "--data" in given else ["--data", str(TOY)]
    SCRIPTS[script].main(
        [
            *map(str, models),
            *texts,
            *SMALL,
            *QUICK.get(script, []),
            *given,
            "--out",
            str(tmp_path / "out"),
        ]
    )


def refused(script: str, monkeypatch, capsys, tmp_path, *argv, says: tuple, **models):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start(script, monkeypatch, tmp_path, *argv, **models)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(part in said for part in says), said
    assert not (tmp_path / "out").exists()


# ================================================================ options of all scripts

OPTIONS = {
    "seed below 0": (["--seed", "-1"], "--seed"),
    "a seed that no generator takes": (["--seed", str(2**32)], "--seed"),
    "no singular value left": (["--rcond", "1"], "--rcond"),
    "a strength beyond floats": (["--alpha", "1e400"], "--alpha"),
    "an endless block": (["--layer", "9" * 5000], "--layer"),
    "an endless fraction": (["--layer", "9" * 400 + ".5"], "--layer"),
    "sentences below 0": (["--sentences", "-5"], "--sentences"),
    "batches of nothing": (["--batch-tokens", "-1"], "--batch-tokens"),
    "unknown family": (["--family", "lama"], "lama"),
    "a run folder that is not there": (["--replay", "no/such/folder"], "no/such/folder"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_work(case, script, monkeypatch, capsys, tmp_path):
    argv, says = OPTIONS[case]
    refused(script, monkeypatch, capsys, tmp_path, *argv, says=(says,))


# ================================================================ data files

READS = {  # what each script reads; {} is a line or an item of the kind
    "emotions/fear.json": EMOTIONS,
    "emotions/happiness.json": list(SCRIPTS),
    "wikisplit/validation.tsv": list(SCRIPTS),
    "truthfulqa/mc_task.json": ["exp_truthfulqa"],
    "truthfulqa/TruthfulQA.csv": ["exp_truthfulqa"],
    "world_facts/facts_true_false.csv": ["exp_truthfulqa"],
    "toxigen/hate_drells_1k.txt": ["exp_toxigen"],
    "text/owt_sentences_lowtox.txt": ["exp_toxigen"],
}
DAMAGES = {
    "a folder in its place": (lambda path, content: path.mkdir(), None, ("cannot read",)),
    "not UTF-8 in line 1": (
        lambda path, content: path.write_bytes(b"\xe9" + content),
        None,
        (", line 1: not UTF-8",),
    ),
    "not UTF-8 at its end": (
        lambda path, content: path.write_bytes(content.rstrip() + b"\n\xff\xfe"),
        None,
        ("not UTF-8",),
    ),
    "cut in the middle": (
        lambda path, content: path.write_bytes(content[: len(content) // 2]),
        ".json",
        (", line ", "not JSON"),
    ),
    "empty": (lambda path, content: path.write_bytes(b""), (".json", ".csv", ".tsv"), ()),
    "JSON of a text": (
        lambda path, content: path.write_text('"happy, sad, and everything between"'),
        ".json",
        ("list",),
    ),
    "JSON of an object": (
        lambda path, content: path.write_text('{"a": ["b"]}'),
        ".json",
        ("list",),
    ),
    "half a character": (
        lambda path, content: path.write_text('["\\ud83d"]'),
        ".json",
        ("not JSON",),
    ),
    "a row too short": (
        lambda path, content: path.write_bytes(content.rstrip() + b"\nonly one cell\n"),
        ".csv",
        (", line ", "1 cells"),
    ),
    "a row too long": (
        lambda path, content: path.write_bytes(content.rstrip() + b"\na,b,c,d,e,f,g,h,i,j,k\n"),
        ".csv",
        (", line ", "11 cells"),
    ),
    "an open quotation": (
        lambda path, content: path.write_bytes(content.rstrip() + b'\n"a,b\n'),
        ".csv",
        (", line ", "not CSV"),
    ),
}
CASES = [
    (file, damage, script)
    for file, scripts in READS.items()
    for damage, (_, kinds, _) in DAMAGES.items()
    if kinds is None or file.endswith(kinds)
    for script in scripts
]


def data(folder: Path, file: str, damage=None) -> Path:
    """A data folder in which one file is damaged and all others are the toy's."""
    for name in ("emotions", "truthfulqa", "wikisplit", "world_facts", "toxigen", "text"):
        (folder / name).mkdir(parents=True)
        for path in (TOY / name).iterdir():  # of the many prompts of toxigen a few will do
            lines = path.read_bytes().splitlines(True)[: 30 if name == "toxigen" else None]
            (folder / name / path.name).write_bytes(b"".join(lines))
    (folder / file).unlink()
    if damage:
        damage(folder / file, (TOY / file).read_bytes())
    return folder


@pytest.mark.parametrize("file, damage, script", CASES, ids=["-".join(case) for case in CASES])
def test_a_damaged_file_is_named_with_its_line(file, damage, script, monkeypatch, capsys, tmp_path):
    spoil, _, says = DAMAGES[damage]
    folder = data(tmp_path / "data", file, spoil)
    refused(script, monkeypatch, capsys, tmp_path, "--data", folder, says=(Path(file).name, *says))


ITEMS = {
    "a number": [1],
    "nothing": [None],
    "an empty text": [""],
    "a blank": [" \n"],
    "a list": [["a"]],
}


@pytest.mark.parametrize("script", EMOTIONS)
@pytest.mark.parametrize("case", ITEMS)
def test_a_scenario_that_is_no_text_is_named_by_its_number(
    case, script, monkeypatch, capsys, tmp_path
):
    texts = json.loads((TOY / "emotions" / "fear.json").read_text())
    folder = data(
        tmp_path / "data",
        "emotions/fear.json",
        lambda path, _: path.write_text(json.dumps([*texts[:7], *ITEMS[case], *texts[7:]])),
    )
    refused(script, monkeypatch, capsys, tmp_path, "--data", folder, says=("fear.json, text 7: ",))


@pytest.mark.parametrize(
    "change",
    [{"question": " "}, {"mc1_targets": {"A.": 1, " ": 0}}, {"mc2_targets": {"A.": 1, "\t": 0}}],
    ids=["question", "choice of MC1", "choice of MC2"],
)
def test_blank_questions_and_choices_are_named_by_their_number(
    change, monkeypatch, capsys, tmp_path
):
    items = json.loads((TOY / "truthfulqa" / "mc_task.json").read_text())
    items[3] |= change
    folder = data(
        tmp_path / "data",
        "truthfulqa/mc_task.json",
        lambda path, _: path.write_text(json.dumps(items)),
    )
    refused(
        "exp_truthfulqa",
        monkeypatch,
        capsys,
        tmp_path,
        "--data",
        folder,
        says=("mc_task.json, question 3",),
    )


@pytest.mark.parametrize("file", READS)
def test_windows_line_ends_and_a_byte_order_mark_change_nothing(file, tmp_path):
    folder = data(
        tmp_path / "data",
        file,
        lambda path, content: path.write_bytes(
            (b"" if "toxigen" in file or "text" in file else b"\xef\xbb\xbf")
            + content.replace(b"\n", b"\r\n")
        ),
    )

    def read(folder):
        return (
            exp_emotion.load_scenarios(folder),
            exp_truthfulqa.load_questions(folder),
            exp_truthfulqa.load_facts(folder),
            exp_truthfulqa.load_scenarios(folder),
            exp_toxigen.load_prompts(folder),
            exp_toxigen.load_texts(folder),
            common.plain_sentences(type("", (), {"data": folder, "sentences": 100}), []),
        )

    assert read(folder) == read(
        data(tmp_path / "plain", file, lambda path, content: path.write_bytes(content))
    )


# ================================================================ models


def changed(folder: Path, **settings) -> Path:
    """A copy of a small model of the zoo whose config says something else."""
    shutil.copytree(ZOO / "llama-s", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def pickled(folder: Path) -> Path:
    weights = load_file(changed(folder) / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


CODE = """from pathlib import Path
from transformers import LlamaConfig
Path({!r}).touch()
class Own(LlamaConfig):
    model_type = "own"
"""


def with_code(folder: Path) -> Path:
    """A model that brings Python code, which leaves a trace where it runs."""
    changed(folder, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text(CODE.format(str(folder / "ran")))
    return folder


FOLDERS = {
    "a pickle": (pickled, "--allow-pickle"),
    "its own code": (with_code, "--trust-remote-code"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", FOLDERS)
def test_a_model_that_could_run_code_is_refused_by_default(
    case, script, monkeypatch, capsys, tmp_path
):
    make, option = FOLDERS[case]
    folder = make(tmp_path / "model")
    models = {
        "exp_pretraining": ["--tgt", STEPS[0], folder, "--tokens", "1", "2"],
        "exp_pythia": ["--models", folder, ZOO / "pythia-2"],
    }.get(script, ["--family", "toy", "--tgt", folder])
    refused(script, monkeypatch, capsys, tmp_path, says=(str(folder), option), replace=models)
    assert not (folder / "ran").exists()


@pytest.fixture
def settings(monkeypatch):
    """What the options say of all models; as before when the test is over."""
    for name in ("cache", "pickle", "code"):
        monkeypatch.setattr(common.Settings, name, getattr(common.Settings, name))
    common.model_config.cache_clear()
    yield common.Settings
    common.model_config.cache_clear()


def test_a_pickle_is_loaded_where_it_is_allowed(settings, tmp_path):
    folder = pickled(tmp_path / "model")
    settings.pickle = True
    assert common.model_config(str(folder))
    model, same = (common.load_model(str(path), device="cpu") for path in (folder, ZOO / "llama-s"))
    assert torch.equal(
        common.next_token_logits(model, ["Tom felt"]), common.next_token_logits(same, ["Tom felt"])
    )
    assert model.fingerprint != same.fingerprint


def test_a_stray_safetensors_file_does_not_let_a_pickle_in(settings, tmp_path):
    folder = pickled(tmp_path / "model")
    shutil.copy(ZOO / "llama-s" / "model.safetensors", folder / "adapter.safetensors")
    with pytest.raises((OSError, ValueError), match="no file named model.safetensors"):
        common.load_model(str(folder), device="cpu")


def test_code_runs_where_it_is_trusted_and_belongs_to_the_fingerprint(
    settings, monkeypatch, tmp_path
):
    folder = with_code(tmp_path / "model")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    settings.code = True
    assert common.model_config(str(folder))[0].model_type == "own" and (folder / "ran").exists()
    before = common.fingerprint(str(folder))
    (folder / "own.py").write_text((folder / "own.py").read_text() + "# changed\n")
    assert common.fingerprint(str(folder)) != before


def test_torn_weights_end_in_one_line(settings, capsys, tmp_path):
    folder = changed(tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    args = type(
        "",
        (),
        dict(
            dtype="float32",
            device="cpu",
            remote=None,
            batch_tokens=64,
            ndif_host="",
            tgt=[],
            tgt_chat=[],
        ),
    )
    with pytest.raises(SystemExit) as stopped:
        common.loader(args)(str(folder))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("error: ") and str(folder) in said


def test_an_unknown_architecture_ends_in_one_line(settings, capsys, tmp_path):
    folder = save_model(tmp_path / "biogpt", transformers.BioGptConfig, intermediate_size=64)
    args = type(
        "",
        (),
        dict(
            dtype="float32",
            device="cpu",
            remote=None,
            batch_tokens=64,
            ndif_host="",
            tgt=[],
            tgt_chat=[],
        ),
    )
    with pytest.raises(SystemExit):
        common.loader(args)(str(folder))
    assert "biogpt.layers" in capsys.readouterr().err.splitlines()[-1]


# ================================================================ tokenizers


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(model, Reference) whose tokenizer adds nothing and has no token for the beginning, the end or padding."""
    folder = save_model(
        tmp_path_factory.mktemp("bare") / "model", *CONFIGS["llama"][:1], **CONFIGS["llama"][1]
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=150, show_progress=False, initial_alphabet=["Ġ", *map(chr, range(33, 127))]
        ),
    )
    for path in folder.glob("tokenizer*"):
        path.unlink()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    return common.load_model(str(folder), device="cpu"), Reference(folder, *CONFIGS["llama"][2:])


def test_a_tokenizer_without_any_special_token_scores_as_one_at_a_time(bare):
    model, reference = bare
    texts = ["Tom", "Tom felt very happy", "Lily lost her old cat"]
    assert reference.tokenizer.pad_token is None and reference.tokenizer.eos_token is None
    assert torch.allclose(
        common.next_token_logits(model, texts)[0], reference.next_logits(texts), atol=1e-4
    )
    states = torch.stack([reference.states(text) for text in texts])
    assert torch.allclose(common.hidden_states(model, texts), states, atol=1e-4)
    assert all(len(text) for text in common.generate(model, texts, max_new_tokens=3))


def test_an_empty_prompt_without_bos_is_refused(bare):
    for ask in (common.next_token_logits, common.hidden_states, common.generate):
        with pytest.raises(ValueError, match="empty prompt"):
            ask(bare[0], ["Tom", ""])
    with pytest.raises(ValueError, match="empty prompt"):
        common.choice_logprobs(bare[0], [("", " Tom")])
    with pytest.raises(ValueError, match="nothing to predict"):
        common.perplexity(bare[0], ["", "T"])


def test_labels_that_share_their_first_token_are_no_bad_input(monkeypatch, tmp_path):
    labels = ["qa", "qb", "qc", "qd", "qe", "qf"]
    words = common.label_tokens(
        type(
            "",
            (),
            dict(
                zip(("config", "tokenizer"), common.model_config(str(ZOO / "llama-s"))),
                name="llama-s",
            ),
        ),
        "The emotion is",
        labels,
    )
    assert len({word[0] for word in words}) == 1 and len(set(map(tuple, words))) == 6
    with pytest.raises(Loaded):
        start("exp_emotion", monkeypatch, tmp_path, "--labels", *labels, "--shots", "0")


@pytest.mark.parametrize("script", SCRIPTS)
def test_good_input_comes_to_the_weights(script, monkeypatch, tmp_path):
    """Without this, all the refusals above could be refusals of everything."""
    with pytest.raises(Loaded):
        start(script, monkeypatch, tmp_path)
