"""Weights of 4 and 8 bits (bitsandbytes): near the model, and steered like it."""

from common import BASE, Transplant, hidden_states, next_token_logits
from models import load_model

import pytest
import torch
import transformers
from conftest import GROUPED, close, plain_module, save_model, vectors

TEXTS = ["Tom felt very", "Lily lost her old cat in the park. Lily felt very"]


@pytest.mark.parametrize(
    "dtype, layer, near", [("nf4", "Linear4bit", 0.95), ("int8", "Linear8bitLt", 0.999)]
)
def test_a_quantised_model_is_near_its_own_and_its_states_are_kept_apart(
    dtype, layer, near, tmp_path
):
    pytest.importorskip("bitsandbytes", reason="requirements-dev.txt installs bitsandbytes")
    shape = GROUPED | {"hidden_size": 64, "initializer_range": 0.05}
    folder = save_model(tmp_path / "model", transformers.LlamaConfig, **shape)
    plain = load_model(str(folder), device="cpu")
    small = load_model(str(folder), device="cpu", dtype=dtype)
    assert type(plain_module(small.nn.layers[0].mlp.up_proj)).__name__ == layer
    [v] = vectors(1, 64)
    moves = [BASE, Transplant.of(v, 2, 1.0)]
    wanted = next_token_logits(plain, TEXTS, moves)
    got = next_token_logits(small, TEXTS, moves)
    close(next_token_logits(small, TEXTS, moves[1:])[0], got[1], 0.1)
    pairs = [(wanted, got), (hidden_states(plain, TEXTS), hidden_states(small, TEXTS))]
    for wanted, got in pairs:
        assert torch.cosine_similarity(wanted, got, dim=-1).min() > near
        assert not torch.equal(wanted, got)
