"""--dry-run: what it counts is what the same command then computes; it needs and writes nothing."""

import json
import shutil
from pathlib import Path

import exp_template
import harness

import pytest
import torch
from conftest import slow
from test_scripts import SCRIPTS, ZOO, command

LLAMA_2_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, and an empty folder to work in."""
    monkeypatch.setenv("CONTRANS_CACHE", str(tmp_path / "cache"))
    yield
    harness.DRY_RUN["folder"] = None


@pytest.fixture
def dry(capsys):
    """dry(main, argv) -> {model: {column: number}} of the table that a dry run prints."""

    def run(main, argv):
        capsys.readouterr()
        main([*argv, "--dry-run"])
        said = capsys.readouterr().out
        lines = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("|")]
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        table = {}
        for name, *cells in rows:
            numbers = [float(cell.replace(",", "")) for cell in cells]
            table[Path(name).name] = dict(zip(header[1:], numbers))
        return table

    return run


@pytest.fixture
def computed(monkeypatch):
    """What the models compute: {"tokens": number, through all blocks; "TFLOP": number}."""
    found = {"tokens": 0.0, "TFLOP": 0.0}
    functional = torch.nn.functional
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def counted_linear(input, weight, bias=None):
        if not weight.requires_grad:  # as those of the map by gradient descent do
            found["TFLOP"] += 2e-12 * input.numel() * len(weight)
        return linear(input, weight, bias)

    def counted_attention(query, key, *args, **kwargs):
        found["TFLOP"] += 4e-12 * query.numel() * key.shape[2]
        return attention(query, key, *args, **kwargs)

    share = {}  # of all blocks, for each weight: there are eight blocks

    def count_tokens(module, inputs):
        if type(module).__name__ == "LlamaDecoderLayer":
            weights = [weight for weight in module.parameters() if weight.dim() > 1]
            total = sum(weight.numel() for weight in weights)
            share.update({id(weight): weight.numel() / total / 8 for weight in weights})
        elif id(getattr(module, "weight", None)) in share:
            found["tokens"] += inputs[0].shape[:-1].numel() * share[id(module.weight)]

    monkeypatch.setattr(functional, "linear", counted_linear)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted_attention)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count_tokens)
    yield found
    hook.remove()


@pytest.fixture
def large(tmp_path):
    """A folder with config and tokenizer of a 70B model, and no weights."""
    folder = tmp_path / "models" / "llama-70b"
    folder.mkdir(parents=True)
    for path in (ZOO / "llama-m").glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_2_70B))
    return folder


OPTIONS = "--layer 0.75 --maps 2 --permutations 9 --sentences 150 --random 2 --limit 30 --alpha 2"
TARGET = f"{OPTIONS} --family toy --tgt {ZOO}/llama-m"
COMMANDS = {
    "exp_template": TARGET,
    # How many texts a local map reads in the target depends on the states.
    "exp_truthfulqa": f"{TARGET} --tgt-chat {ZOO}/llama-m-chat --map paper",
}


@pytest.mark.parametrize("name", ["exp_template", slow("exp_truthfulqa")])
def test_what_is_counted_is_what_is_computed(name, dry, computed, tmp_path):
    argv = [*COMMANDS[name].split(), "--out", str(tmp_path / "out")]
    table = dry(SCRIPTS[name].main, argv)
    assert computed == {"tokens": 0, "TFLOP": 0}
    assert list(tmp_path.iterdir()) == []
    SCRIPTS[name].main(argv)
    for what, number in computed.items():
        assert table["total"][what] == pytest.approx(number, rel=0.02), what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp_emotion", "exp_pretraining", "exp_pythia", "exp_toxigen"])
def test_other_scripts_are_counted_too(name, dry, data, tmp_path):
    out = tmp_path / "out"
    table = dry(SCRIPTS[name].main, command(name, "--data", data, "--out", out))
    assert table["total"]["tokens"] > 1000 and table["total"]["NDIF requests"] == 0
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_a_large_model_needs_config_and_tokenizer_alone(dry, large, tmp_path):
    argv = f"{OPTIONS} --family toy --tgt {large} --out {tmp_path}/out".split()
    before = sorted(tmp_path.rglob("*"))
    table = dry(exp_template.main, argv)
    assert sorted(tmp_path.rglob("*")) == before
    weights = 68_976_648_192  # parameters
    cost = table["llama-70b"]
    assert cost["weights [GiB]"] == pytest.approx(2 * weights / 2**30, rel=1e-3)
    assert cost["TFLOP"] == pytest.approx(2e-12 * weights * cost["tokens"], rel=0.02)
    on_two_gpus = 2 * cost["TFLOP"] / 396 / 3600
    assert cost["GPU hours"] == pytest.approx(on_two_gpus, abs=1e-3)


@pytest.mark.slow
def test_requests_to_ndif_are_counted_without_asking_it(dry, large):
    argv = f"{OPTIONS} --family toy --tgt {large} --ndif-host http://localhost:1".split()
    one, both = [dry(exp_template.main, [*argv, "--remote", who]) for who in ("target", "both")]
    assert one["llama-s"]["NDIF requests"] == 0 < both["llama-s"]["NDIF requests"]
    assert min(table["llama-70b"]["NDIF requests"] for table in (one, both)) > 3
