"""Tiny random models of the architectures of transformers, against plain hooks.

docs/models.md lists them; this file makes each one and compares: states, logits, alpha = 0, alpha =
3, a choice's log-probability. Some of them by default, all with -m slow.
"""

import os
import re
from pathlib import Path

from common import BASE, Transplant, choice_logprobs, generate, hidden_states, next_token_logits
from models import Models, load_model

import pytest
import torch
import transformers
from conftest import Reference, close, make_tokenizer, save_random, vectors

DOC = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SAMPLE = ["gemma3", "mistral3", "qwen3_vl", "lfm2", "mamba", "rwkv", "gpt_oss", "olmo2"]
SAMPLE += ["gemma3n_text", "paligemma"]  # refused
TEXTS = ["Tom felt very happy.", "Lily lost her old cat in the park.", "the dog"]

# What makes a config small, by the names that configs use
WIDTHS = """hidden_size d_model n_embd word_embed_proj_dim embedding_size embed_dim dim
out_hidden_size projection_dim text_hidden_size lru_width attention_hidden_size"""
DEPTHS = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth"
HEADS = """num_attention_heads n_head n_heads num_heads decoder_attention_heads
encoder_attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads"""
INNER = """intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff
mlp_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
moe_shared_expert_intermediate_size"""
EIGHTS = """head_dim global_head_dim kv_channels attention_head_dim v_head_dim qk_nope_head_dim
qk_rope_head_dim mamba_d_state state_size linear_key_head_dim linear_value_head_dim
hidden_size_per_layer_input laurel_rank"""
SMALL = {
    **dict.fromkeys(WIDTHS.split(), 32),
    **dict.fromkeys(DEPTHS.split(), 4),
    **dict.fromkeys(HEADS.split(), 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(INNER.split(), 64),
    **dict.fromkeys(EIGHTS.split(), 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 128),
    **dict.fromkeys(["initializer_range", "init_std"], 0.2),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], len(make_tokenizer())),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "sliding_window"], 16),
    **dict.fromkeys(["num_kv_shared_layers", "mtp_num_hidden_layers"], 0),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **{"image_size": 28, "patch_size": 14, "mamba_expand": 2, "time_step_rank": 4},
    **{"mamba_dt_rank": 4, "conv_kernel": 4, "is_decoder": True},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LATENT = {"qk_head_dim": 16, "num_key_value_heads": 4}
OF_ONE_TYPE = {
    **dict.fromkeys(["gemma3_text", "gemma2", "olmo3", "cohere2", "gpt_oss"], WINDOWS),
    **dict.fromkeys(["gemma3n_text", "gemma4_text"], WINDOWS),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "olmo_hybrid", "minimax"], LINEAR),
    **dict.fromkeys(["lfm2", "lfm2_moe"], {"layer_types": ["conv", "full_attention"] * 2}),
    **dict.fromkeys(["qwen2_vl_text", "qwen2_5_vl_text"], {"rope_parameters": ROPE}),
    **dict.fromkeys(["deepseek_v3", "youtu", "minicpm3", "glm4_moe_lite", "axk1"], LATENT),
    **dict.fromkeys(["longcat_flash", "deepseek_v32", "glm_moe_dsa"], LATENT),
    **dict.fromkeys(["gptj", "codegen"], {"rotary_dim": 4}),
    **dict.fromkeys(["ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"], {"head_dim": 8}),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention", "mlp", "attention"]},
    "llama4_text": {"attention_chunk_size": 16, "no_rope_layers": [1, 0, 1, 0]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(config_class):
    """A config of this class, and of all its parts, with little of everything."""
    settings = {}
    for name, value in vars(config_class()).items():
        if isinstance(value, transformers.PreTrainedConfig):
            part = small_config(type(value))
            settings[name] = part.to_dict() | {"model_type": value.model_type}
        elif name in SMALL and value is not None:
            settings[name] = SMALL[name]
    settings |= OF_ONE_TYPE.get(config_class.model_type, {})
    return config_class(**settings)


def auto_class(config):
    """Of a model that also sees or hears, the class that does; of another, the causal LM."""
    has_parts = config.get_text_config(decoder=True) is not config
    sees = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    is_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if sees and (has_parts or not is_text):
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def make_model(model_type, folder, tokenizer=None, seed=0, **settings):
    """A tiny random model of this type, with its tokenizer. Norms and biases are random, too.

    settings: of the text part's config."""
    config = small_config(transformers.CONFIG_MAPPING[model_type])
    for name, value in settings.items():
        setattr(config.get_text_config(decoder=True), name, value)
    return save_random(folder, config, tokenizer or make_tokenizer(), seed, auto_class(config))


def rows(heading):
    """The cells of the table below a heading of docs/models.md."""
    part = DOC.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| `.*", part, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in lines]


EXACT, REFUSED = rows("What works"), rows("What is refused")


def cases(listed):
    """Parameters of a test; those outside SAMPLE are slow."""
    found = []
    for row in listed:
        marks = [] if row[0] in SAMPLE else [pytest.mark.slow]
        found.append(pytest.param(*row, marks=marks, id=row[0]))
    return found


@pytest.mark.parametrize("name, how", cases(EXACT))
def test_a_listed_architecture_gives_what_plain_hooks_give(name, how, tmp_path):
    folder = make_model(name, tmp_path / name)
    model = load_model(str(folder), device="cpu")
    modules = model.nn._module.named_modules()
    [path] = [path for path, each in modules if each is model.nn.layers[0]._module]
    config = transformers.AutoConfig.from_pretrained(folder)
    plain = Reference(folder, path.removesuffix(".0"), auto=auto_class(config))
    assert Models().n_layers(str(folder)) == model.n_layers == len(plain.blocks)
    v = vectors(1)[0]
    moves = [BASE, Transplant.of(v, 2, 0), Transplant.of(v, 2, 3)]
    logits = next_token_logits(model, TEXTS, moves)
    alone = [next_token_logits(model, TEXTS, [move]) for move in moves[:2]]
    assert torch.equal(*alone)  # alpha = 0, bit for bit; an expert's rows depend on the batch
    close(logits[0], logits[1], 1e-5)
    pairs = [(TEXTS[0], " sad"), (TEXTS[0], " and happy")]
    scores, _ = choice_logprobs(model, pairs, [BASE, moves[2]])
    for move, steer, ours, row in ((BASE, {}, logits[0], 0), (moves[2], {2: 3 * v}, logits[2], 1)):
        states, last = plain.states(TEXTS, steer), plain.next_logits(TEXTS, steer)
        own = hidden_states(model, TEXTS, transplant=None if move is BASE else move)
        close(own / states.std(), states / states.std(), 1e-4)
        close(ours / last.std(), last / last.std(), 1e-4)
        close(scores[row], plain.score_pairs(pairs, steer)[0], 1e-3)
    [texts] = generate(model, TEXTS, [moves[2]], 3)
    assert len(texts) == 3
    shared = model.sharing or (False,) * 5
    names = ("blocks", "cache", "branches")
    said = ", ".join(each for each, works in zip(names, shared) if works) or "nothing"
    if model.batch_tokens == 1:
        said += "; one text at a time"
    assert said == how


@pytest.mark.parametrize("name, reason", cases(REFUSED))
def test_what_is_refused_says_why(name, reason, tmp_path, one_line):
    folder = make_model(name, tmp_path / name)
    one_line(lambda: Models(device="cpu").load(str(folder)), re.sub(r"\s*\(.*", "", reason))


def test_the_list_is_long_and_has_no_gaps():
    assert len(EXACT) >= 120
    both = [each[0] for each in EXACT + REFUSED]
    assert len(both) == len(set(both))
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # nothing here asks the hub
