"""Weights of 4 and 8 bits (bitsandbytes, a development extra): near the model, and steered like it."""

import sys

import pytest
import torch
import transformers
from conftest import save_model

import common
from common import BASE, Transplant

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (requirements-dev.txt)")
TEXTS = ["Tom felt very", "Lily lost her old cat in the park. Lily felt very"]


@pytest.mark.parametrize("dtype, near", [("nf4", 0.95), ("int8", 0.999)])
def test_a_quantised_model_is_near_its_own_and_its_states_are_kept_apart(dtype, near, tmp_path):
    folder = save_model(tmp_path / "model", transformers.LlamaConfig, hidden_size=64, intermediate_size=128,
                        num_key_value_heads=4, initializer_range=0.05)
    plain, small = (common.load_model(str(folder), dtype, device="cpu") for dtype in ("float32", dtype))
    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    moves = [BASE, Transplant.of(v, 2, 1.0)]
    for score in (lambda model: common.next_token_logits(model, TEXTS, moves), lambda model: common.hidden_states(model, TEXTS)):
        wanted, got = score(plain), score(small)
        assert torch.cosine_similarity(wanted, got, dim=-1).min() > near and not torch.equal(wanted, got)
    linear = small.layers[0].mlp.up_proj._module
    assert type(linear).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[dtype]
    both, alone = (common.next_token_logits(small, TEXTS, own)[-1] for own in (moves, moves[1:]))
    torch.testing.assert_close(both, alone,
                               atol=0.1, rtol=0.1)


def test_without_bitsandbytes_it_is_said_before_any_model_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    families = {"toy": {"src": "a", "tgt": ["b"], "layer": "0.75", "alpha": [1.0], "sentences": 10, "limit": 1},
                "custom": {}}
    with pytest.raises(SystemExit) as stopped:
        common.parse_options(common.option_parser("", families), families, ["--data", str(tmp_path), "--dtype", "nf4"])
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "pip install bitsandbytes" in line
