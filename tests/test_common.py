"""common.py and vectors.py against plain transformers with hooks or the formula written out.

The models are tiny and random; the families are those of conftest.py. Maps of
any rank and scale are in test_hypothesis.py.
"""

import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import harness
from common import (
    BASE,
    BRANCH_TOKENS,
    UNEMBED_ROWS,
    Transplant,
    choice_logprobs,
    concept_vector,
    fit_affine,
    generate,
    hidden_states,
    logit_lens,
    next_token_logits,
    perplexity,
    refine,
    score_labels,
    token_changes,
)
from harness import TOY, read_json
from models import Models, load_model
from vectors import (
    AffineMaps,
    Context,
    Point,
    Vector,
    Vectors,
    control_directions,
    count_samples,
    cut_ends,
    cut_windows,
    map_texts,
    nearest_positions,
    permuted_vectors,
    plain_texts,
    random_directions,
    response,
    separation,
    shared_token_ends,
)

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import (
    CONFIGS,
    GROUPED,
    LLAMA_PATHS,
    MAIN,
    ROOT,
    SENTENCES,
    Reference,
    close,
    edit_json,
    eft_logits,
    make_tokenizer,
    plain_module,
    save_model,
    slow,
    vectors,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers

TEXTS = [
    "Tom felt very",
    "Lily lost her old cat in the park. Lily felt very",
    "A",
    "The big dog sat on the red ball and it ran",
]
LLAMAS = [str(TOY / "models" / name) for name in ("llama-s", "llama-m")]
PREFIX = (
    "Tom found a red ball in the park. Lily lost her old cat. The happy dog ran to the big house. "
    "A spider sat in the old town. "
)
LONG_TEXTS = [PREFIX + text for text in TEXTS]
CHOICES = [" happy", " sad dog in the house.", " x", " very sad dog", " very sad"]


def pairs_of(texts, choices=CHOICES):
    return [(text, choice) for text in texts for choice in choices]


def steering(*parts):
    """(block, alpha, vector) parts as a Transplant, and as {block: shift} for the reference."""
    transplant, shifts = Transplant(), {}
    for layer, alpha, vector in parts:
        transplant += Transplant.of(vector, layer, alpha)
        shifts[layer] = shifts.get(layer, 0) + alpha * vector
    return transplant, shifts


A, B = vectors(2)
STEERED = [
    steering(),
    steering((1, 2.0, A)),
    steering((0, -1.0, A), (2, 1.5, B)),  # two blocks at once
    steering((1, 0.5, A), (1, 3.0, B)),  # two concepts after one block
    steering((3, 2.0, B)),
]
TRANSPLANTS, SHIFTS = zip(*STEERED)


def check_logits(model, reference, texts):
    """The next token's logits equal the reference's under all transplants."""
    wanted = [reference.next_logits(texts, shifts) for shifts in SHIFTS]
    close(next_token_logits(model, texts, TRANSPLANTS), torch.stack(wanted), 2e-5)


def pushing(reference, token, alpha):
    """A shift after the last block that raises the logit of a token at every position."""
    row = reference.tokenizer.convert_tokens_to_ids(token)
    v = reference.head.weight[row] * reference.norm.weight
    return steering((len(reference.blocks) - 1, alpha, v / v.norm()))


def check_choices(model, reference, pairs, steered, tolerance=3e-5):
    """Choices equal the reference's under each transplant; returns the greedy flags."""
    transplants = [transplant for transplant, _ in steered]
    got, greedy = choice_logprobs(model, pairs, transplants)
    for values, flags, (_, shifts) in zip(got, greedy, steered, strict=True):
        wanted, wanted_flags = reference.score_pairs(pairs, shifts)
        close(values, wanted, tolerance)
        assert flags.tolist() == wanted_flags
    return greedy


def ask_states(model, move, texts):
    return hidden_states(model, texts, [3, 1], move)


def ask_logits(model, move, texts):
    return next_token_logits(model, texts, [move, TRANSPLANTS[2]])


def ask_choices(model, move, texts):
    return choice_logprobs(model, pairs_of(texts), [move])


def ask_labels(model, move, texts):
    return score_labels(model, texts, ["happy", "sad"], [move])


def ask_perplexity(model, move, texts):
    return perplexity(model, texts, [move])[0]


def ask_lens(model, move, texts):
    return logit_lens(model, texts, 3, [move])


def ask_text(model, move, texts):
    return generate(model, texts, [move], 3)


ASK = [  # all that is asked of a model
    ask_states,
    ask_logits,
    ask_choices,
    ask_labels,
    ask_perplexity,
    ask_lens,
    ask_text,
]


def same(got, wanted, tolerance=0.0):
    """Whether two answers, tensors or texts, agree."""
    if isinstance(got, torch.Tensor):
        return torch.allclose(got, wanted, tolerance, tolerance)
    if isinstance(got, str):
        return got == wanted
    return all(same(*each, tolerance) for each in zip(got, wanted, strict=True))


@contextmanager
def watched(model, act=lambda rows, tokens: None):
    """{block: [(rows, tokens) of each forward pass meanwhile]}; act is called in the last block.

    That the last block is called again, for the last token of each row, is left out."""
    seen, handles = {}, []

    def watch(block):
        seen[block] = []

        def count(module, args, kwargs):
            stream = args[0] if args else kwargs["hidden_states"]
            rows, tokens = stream.shape[:2]
            is_last = block == model.n_layers - 1
            if is_last and len(seen[block]) == len(seen[block - 1]):
                return
            seen[block].append((rows, tokens))
            if is_last:
                act(rows, tokens)

        module = plain_module(model.nn.layers[block])
        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))

    for block in range(model.n_layers):
        watch(block)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rows_through(seen):
    """How many rows went through each block."""
    return [sum(rows for rows, _ in passes) for passes in seen.values()]


def save_llama(folder, **settings):
    return save_model(folder, transformers.LlamaConfig, **{**GROUPED, **settings})


def load(folder, **options):
    return load_model(str(folder), device="cpu", **options)


# ================================================================ 1  Model


def test_an_unknown_architecture_names_its_module_lists(tmp_path, one_line):
    folder = save_model(tmp_path / "gpt", transformers.OpenAIGPTConfig, n_positions=128)
    words = ("OpenAIGPTLMHeadModel", "transformer.h", "PATHS")
    one_line(lambda: Models(device="cpu").load(str(folder)), *words)


def test_an_unknown_dtype_or_device_is_refused(model):
    with pytest.raises(ValueError, match="float8.*bfloat16"):
        load_model(model.name, dtype="float8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda:1.*no GPU"):
            load_model(model.name, device="cuda:1")


@pytest.mark.parametrize("device", ["cuda:1", "gpu"])
def test_an_unknown_device_ends_in_one_line_before_anything_is_read(device, one_line):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    one_line(lambda: Models(device=device), "--device", device)


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path, one_line):
    folder = save_llama(tmp_path / "torn")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line(
        lambda: Models(device="cpu").load(str(folder)),
        "lack 1 of its tensors",
        "layers.1.mlp.up_proj",
    )
    tied = save_llama(tmp_path / "tied", tie_word_embeddings=True)  # lm_head is not in the file
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(tied)


CHAT = """{%- if not date_string is defined %}
{%- set date_string = strftime_now('%d %b %Y') %}{% endif %}
{% if messages[0].role != 'system' %}<|sys|>Today: {{ date_string }}
{{ strftime_now('%Y-%m-%d') }}{% endif %}<|user|>{{ messages[-1].content }}<|bot|>"""
THINKING = {
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "<think>\n",
}


@pytest.mark.parametrize("end", sorted(THINKING))
def test_a_chat_prompt_has_one_bos_a_fixed_date_and_no_thinking(end, tmp_path, one_line):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT + end
    folder = str(save_llama(tmp_path / "chat", tokenizer=tokenizer))
    prompt = Models().chat_prompt(folder, "Who?")
    start = "<|sys|>Today: 26 Jul 2024\n2024-07-26<|user|>Who?<|bot|>"
    assert prompt == start + "<think>\n\n</think>\n\n"
    assert Models().tokenizer(folder)(prompt).input_ids.count(0) == 1
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    other = str(save_llama(tmp_path / "other", tokenizer=tokenizer))
    one_line(lambda: Models().chat_prompt(other, "Who?"), "no users here")


def test_a_tokenizer_without_a_padding_token_pads_with_another(tmp_path):
    folder = save_llama(tmp_path / "unpadded")
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    reference = Reference(folder, *LLAMA_PATHS)
    close(next_token_logits(load(folder), TEXTS)[0], reference.next_logits(TEXTS))


def test_a_bfloat16_stream_takes_the_vector_in_its_own_dtype(llama):
    folder = Path(llama[0].name)
    model = load(folder, dtype="bfloat16")
    reference = Reference(folder, *LLAMA_PATHS, dtype=torch.bfloat16)
    texts = TEXTS[:1]
    for transplant, shifts in STEERED:
        states = hidden_states(model, texts, transplant=transplant)
        assert states.dtype == torch.float32
        close(states, reference.states(texts, shifts).float(), 0.05)
        logits = next_token_logits(model, texts, [transplant])
        close(logits[0], reference.next_logits(texts, shifts).float(), 0.05)
        assert not torch.equal(logits, logits.bfloat16().float())  # near 16 they would tie
        assert generate(model, texts, [transplant], 4)
        assert model.precision == "torch.bfloat16"


def test_the_fingerprint_follows_the_files_of_a_folder(tmp_path):
    folder, models = save_llama(tmp_path / "model"), Models()
    found = [models.fingerprint(str(folder))]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        found.append(models.fingerprint(str(folder)))
    assert len(set(found)) == 4
    assert found[3] == models.fingerprint(str(folder))
    assert models.fingerprint("some/repo@abc") == "some/repo@abc"


def pickle_weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = {
    "no model folder": shutil.rmtree,
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "JSON": lambda folder: (folder / "config.json").write_text("{"),
    "nonsense": lambda folder: edit_json(folder / "config.json", model_type="nonsense"),
    "trust-remote-code": lambda folder: edit_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}
    ),
    "no *.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "--allow-pickle": pickle_weights,
}


@pytest.mark.parametrize("word", DAMAGES)
def test_what_is_no_model_ends_in_one_line_before_weights_are_loaded(word, tmp_path, one_line):
    folder = save_llama(tmp_path / "a-model")
    DAMAGES[word](folder)
    one_line(lambda: Models().config(str(folder)), "a-model", word)


def test_weights_that_cannot_be_read_end_in_one_line(tmp_path, one_line):
    folder = save_llama(tmp_path / "a-model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    one_line(lambda: Models(device="cpu").load(str(folder)), "cannot load", "a-model")
    one_line(lambda: Models().config("no-one/nothing"), "cannot read model no-one/nothing")


def test_a_gated_model_names_the_licence_page_and_the_token(monkeypatch, one_line):
    def refuse(*_, **__):
        raise OSError("401 Client Error.\nCannot access gated repo")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    one_line(lambda: Models().config("org/gated"), "huggingface.co/org/gated", "HF_TOKEN")


def test_the_space_may_be_at_the_end_of_a_word(tmp_path):
    bpe = Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    special = {"special_tokens": ["<s>", "</s>", "<pad>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **special)
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    folder = save_llama(tmp_path / "model", tokenizer=tokenizer)
    prompt = "The emotion of the above scenario is"
    bare, whole = [tokenizer(text).input_ids for text in (prompt, f"{prompt} fear")]
    assert whole[: len(bare)] != bare  # "is" and "is▁" are two tokens
    model, reference = load(folder), Reference(folder, *LLAMA_PATHS)
    Models().require_labels(str(folder), prompt, ["fear", "sad"])
    scores, _ = choice_logprobs(model, [(prompt, " fear"), (prompt, " sad")])
    wanted, _ = reference.score_pairs([(f"{prompt} ", "fear"), (f"{prompt} ", "sad")])
    close(scores[0], wanted)
    start = len(tokenizer(f"{prompt} ").input_ids)
    _, preferred = score_labels(model, [prompt], ["fear", "sad"])
    first = [tokenizer(f"{prompt} {label}").input_ids[start] for label in ("fear", "sad")]
    assert preferred.item() == reference.next_logits([f"{prompt} "])[0, first].argmax()


def test_an_eos_after_every_text_is_left_out(tmp_path):
    tokenizer = make_tokenizer()
    ends = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**ends)
    folder = save_llama(tmp_path / "model", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(folder)("Tom").input_ids[-1] == 1
    ids = Models().tokenizer(str(folder))("Tom").input_ids
    assert ids == load(folder).tokenizer("Tom").input_ids == make_tokenizer()("Tom").input_ids


def test_a_repository_with_only_tokenizer_model_is_read(tmp_path):
    import sentencepiece

    folder = save_llama(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (tmp_path / "text").write_text("\n".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    assert Models().lengths(str(folder), SENTENCES)[0] > 5


def test_pickled_weights_load_when_they_are_allowed(tmp_path):
    folder = save_llama(tmp_path / "model")
    wanted = next_token_logits(load(folder), TEXTS)
    pickle_weights(folder)
    model = Models(allow_pickle=True, device="cpu").load(str(folder))
    assert same(next_token_logits(model, TEXTS), wanted)


def test_models_are_kept_while_needed_and_freed_before_the_next(zoo):
    a, b, c = [zoo(family)[0].name for family in ("llama", "gpt2", "opt")]
    models = Models(device="cpu", batch_tokens=7)
    models.room = 0  # as if they were large
    model = models.load(a)
    assert models.load(a) is model
    assert model.batch_tokens == 7
    alive = weakref.ref(model.nn._module)
    hidden_states(model, ["Tom"], [1], TRANSPLANTS[1])  # what has run is in reference cycles
    del model
    models.load(b, keep=(a,))
    assert list(models.loaded) == [a, b]
    models.load(c, keep=(b,))
    assert list(models.loaded) == [b, c]
    assert alive() is None
    models.release()
    assert not models.loaded


def test_a_second_load_is_free_while_the_weights_take_less_than_half_of_the_memory(zoo):
    names = [zoo(family)[0].name for family in ("llama", "gpt2", "opt")]
    models = Models(device="cpu")
    first, second, third = [models.load(name) for name in names]
    assert list(models.loaded.values()) == [first, second, third]
    assert models.load(names[0]) is first
    models.load(names[1])
    models.load(names[2])
    models.release(keep=names[1:])
    models.room = sum(models.sizes[name] for name in names) - 1
    models.load(names[0])
    assert list(models.loaded) == [names[2], names[0]]  # the one used longest ago has gone


def test_a_layer_is_an_index_or_a_fraction_of_the_depth(monkeypatch):
    monkeypatch.setattr(Models, "n_layers", lambda *_: 100)
    wanted = {"2": [2, 2], "1,3": [1, 3], "0.0": [0, 0], "0.999": [99, 99]}
    wanted |= {"0.29,.7": [29, 70]}  # 0.29 * 100 is 28.999999999999996
    for layer, blocks in wanted.items():
        assert [Models().block("any", layer, side) for side in (0, 1)] == blocks


def test_prompts_are_measured_before_weights_are_loaded(model, one_line):
    name, models = model.name, Models()
    texts = ["Tom", "Tom" + " Tom" * 126, "Tom" + " Tom" * 127]
    assert models.lengths(name, texts) == [2, 128, 129]
    assert models.lengths(name, []) == []
    assert models.fits(name, texts).tolist() == [True, True, False]
    assert models.fits(name, texts, 126).tolist() == [True, False, False]
    assert not models.fits(name, texts, 127).any()
    models.require_fit(name, texts[:1], 126)
    one_line(lambda: models.require_fit(name, texts[:1], 127, "; be brief"), "128", "brief")
    models.require_labels(name, "Tom", ["happy", "sad"])
    one_line(lambda: models.require_labels(name, "Tom", ["sad", "sad"]), name, "--labels")


def test_vocabularies_and_shapes_are_compared(model, tmp_path):
    name, models = model.name, Models()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    zebra = str(save_llama(tmp_path / "zebra", tokenizer=tokenizer))
    deep = str(save_llama(tmp_path / "deep", num_hidden_layers=5))
    wide = str(save_llama(tmp_path / "wide", hidden_size=64))
    assert models.same_vocabulary(name, deep, wide)
    assert not models.same_vocabulary(name, deep, zebra)
    same_shape = [models.same_shape(name, other) for other in (zebra, deep, wide)]
    assert same_shape == [True, False, False]


REFUSED = {
    "do not fit the context .*128": lambda model: next_token_logits(model, ["Tom " * 200]),
    "fit the context": lambda model: generate(model, ["Tom"], max_new_tokens=127),
    "block 4 does not exist": lambda model: hidden_states(model, TEXTS, [4]),
    "block -1 does not exist": lambda model: generate(model, TEXTS, [Transplant.of(A, -1, 1.0)]),
    "block 7 does not exist": lambda model: logit_lens(model, TEXTS, 7),
    "number of a block, not 2.0": lambda model: Transplant.of(A, 2.0, 6),  # alpha and layer swapped
    r"vector must be \[d\]": lambda model: Transplant.of(A[None], 2, 1.0),
    "width 7": lambda model: next_token_logits(model, TEXTS, [Transplant.of(A[:7], 1, 1.0)]),
    "do not split": lambda model: choice_logprobs(model, [("Tom", " felt"), ("Tom hap", "py, x")]),
    "not split": lambda model: choice_logprobs(model, [("Tom", "")]),
    "told apart": lambda model: score_labels(model, TEXTS, ["sad", "x", "xq"]),
    "others do not": lambda model: score_labels(model, ["Tom", "Tom\n"], ["sad", "happy"]),
    "nothing to predict": lambda model: perplexity(model, ["", ""]),
    "window": lambda model: perplexity(model, TEXTS, window=1),
    "3 positives": lambda model: concept_vector(model, TEXTS[:3], TEXTS, [1]),
    "0 positives": lambda model: concept_vector(model, [], [], [1]),
    "list of strings": lambda model: hidden_states(model, "Tom felt"),
    "texts must be a list": lambda model: perplexity(model, "Tom felt"),
    "texts is empty": lambda model: choice_logprobs(model, []),
    "prompts must be": lambda model: score_labels(model, "Tom felt", ["happy", "sad"]),
    "labels must be": lambda model: score_labels(model, TEXTS, "happy"),
    "pairs must be": lambda model: choice_logprobs(model, TEXTS),
    r"no positions \[4\]": lambda model: hidden_states(model, ["Tom"], positions=[[4]]),
    r"no positions \[-9\]": lambda model: hidden_states(model, ["Tom"], positions=[[-9]]),
    "layers is empty": lambda model: hidden_states(model, TEXTS, []),
    "layers must be": lambda model: hidden_states(model, TEXTS, 1),
    "transplants must be a list": lambda model: next_token_logits(model, TEXTS, TRANSPLANTS[1]),
    "transplant must be": lambda model: hidden_states(model, TEXTS, [1], [TRANSPLANTS[1]]),
    "v must be": lambda _: fit_affine(vectors(9, 4), vectors(9, 5)).vector(A),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_be_asked_of_a_model_is_refused(word, model):
    with pytest.raises((ValueError, TypeError), match=word):
        REFUSED[word](model)


def test_a_prompt_without_tokens_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # adds no <s>, as GPT-2's
    model = load(save_llama(tmp_path / "bare", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="empty prompt"):
        next_token_logits(model, ["Tom", ""])


# ================================================================ 2  Hidden states


def test_states_equal_plain_hooks(any_pair):
    model, reference = any_pair
    for transplant, shifts in STEERED:
        wanted = reference.states(TEXTS, shifts)
        close(hidden_states(model, TEXTS, transplant=transplant), wanted)
        alone = hidden_states(model, TEXTS[:1], transplant=transplant)
        assert torch.equal(alone[0], wanted[0])  # without padding, bit for bit


def test_blocks_may_be_asked_for_in_any_order(model):
    wanted = hidden_states(model, TEXTS)[:, [3, 0, 3]]
    assert torch.equal(hidden_states(model, TEXTS, [3, 0, 3]), wanted)


@pytest.fixture
def asked(model, tmp_path, cache_folder):
    """asked(texts, layers) -> rows through each block when these states are asked for.

    The cache is empty at first."""

    def ask(texts=TEXTS, layers=(1, 2), model=model, **options):
        with watched(model) as seen:
            hidden_states(model, texts, layers, **options)
        return rows_through(seen)

    harness.CACHE["folder"] = tmp_path / "cache"
    yield ask
    harness.CACHE["folder"] = cache_folder


def test_states_are_computed_as_far_as_needed_and_once(asked, model):
    assert asked() == [4, 4, 4, 0]
    assert asked() == [0, 0, 0, 0]
    assert any(asked(TEXTS[::-1]))
    assert any(asked(["Tom", "felt"]))
    assert any(asked(["Tom felt"]))
    assert any(asked(layers=[2, 1]))
    for _ in range(2):
        assert any(asked(transplant=TRANSPLANTS[1]))
    assert any(asked(model=replace(model, fingerprint="another model")))
    assert any(asked(model=replace(model, precision="torch.bfloat16")))
    assert not any(asked())


def test_a_damaged_cache_file_is_computed_again(asked, model, tmp_path, capsys):
    asked()
    [path] = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:1000])
    assert any(asked())
    assert path.name in capsys.readouterr().err
    assert not any(asked())
    wanted = hidden_states(model, TEXTS)[:, 1:3]
    assert torch.equal(hidden_states(model, TEXTS, (1, 2)), wanted)


def test_no_cache_neither_reads_nor_writes(asked, tmp_path):
    asked()
    harness.CACHE["folder"] = None
    assert any(asked())
    assert any(asked(TEXTS[:1]))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A folder of a model whose third block is too large for float16."""
    folder = save_llama(tmp_path_factory.mktemp("overflow") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("ask", ASK)
def test_nan_is_an_error_and_no_result(ask, overflowing, model):
    ask(load(overflowing), BASE, TEXTS)  # float32 has room for it
    half = load(overflowing, dtype="float16")
    with pytest.raises(FloatingPointError, match="NaN.*float16"):
        ask(half, BASE, TEXTS)
    for alpha in (math.nan, 1e20, -1e30):  # RMSNorm makes zeros of 1e20, without any NaN
        with pytest.raises(FloatingPointError, match="alpha"):
            ask(model, Transplant.of(A, 1, alpha), TEXTS)
    with pytest.raises(FloatingPointError, match="alpha.*float16"):
        ask(half, Transplant.of(A, 1, 1e6), TEXTS)


# ================================================================ 3  Refine


def planted(n=200, layers=3, width=16):
    """Pairs that share most of their variation and differ by a direction of each layer."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n, layers, width, generator=generator)
    noise = 0.3 * torch.randn(2, n, layers, width, generator=generator)
    direction = torch.randn(layers, width, generator=generator)
    direction /= direction.norm(dim=1, keepdim=True)
    positive = shared + 2 * direction + noise[0]
    negative = shared - 2 * direction + noise[1]
    return positive, negative, direction


def test_mean_is_equation_1():
    positive, negative, _ = planted()
    total = torch.zeros(3, 16, dtype=torch.float64)
    for one, other in zip(positive, negative):
        total += one - other
    close(refine(positive, negative), (total / 200).float(), 1e-6)


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_refine_finds_the_direction_whatever_the_order(method):
    positive, negative, direction = planted()
    v = refine(positive, negative, method)
    assert v.dtype == torch.float32
    assert torch.cosine_similarity(v, direction, dim=1).min() > 0.9
    close(v.norm(dim=1), refine(positive, negative).norm(dim=1))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    close(refine(positive[order], negative[order], method), v, 1e-3)
    close(refine(negative, positive, method), -v, 1e-3)


def test_refine_refuses_what_are_no_pairs():
    x = torch.zeros(4, 3, 8)
    for positive, negative in [(x, x[:3]), (x[:, 0], x[:, 0]), (x[:0], x[:0])]:
        with pytest.raises(ValueError, match="must be pairs"):
            refine(positive, negative)
    with pytest.raises(ValueError, match="median"):
        refine(x, x, "median")


def test_a_concept_vector_is_refined_from_the_states_of_the_texts(llama):
    model, reference = llama
    others = ["Lily sat", "Tom ran", "The house", "A cat"]
    wanted = refine(reference.states(TEXTS), reference.states(others), "pca")
    close(concept_vector(model, TEXTS, others, [2, 0], "pca"), wanted[[2, 0]], 1e-4)


def test_permuted_labels_leave_nothing_of_the_concept():
    positive, negative = vectors(20, 8, seed=3)[:, None], vectors(20, 8, seed=4)[:, None]
    null = permuted_vectors(positive + 100.0, negative, 50, seed=0)
    assert null.shape == (50, 1, 8)
    assert null.abs().max() < 5  # the 100 that all pairs share has gone
    difference = torch.eye(6)[:, None]
    signs = 6 * permuted_vectors(difference, 0 * difference, 200, seed=1)[:, 0]
    assert set(signs.round().flatten().tolist()) == {-1.0, 1.0}
    assert signs.sum(1).abs().max() < 1e-5
    assert len({tuple(row) for row in signs.round().tolist()}) == 20  # all of 6 over 3
    odd = 7 * permuted_vectors(torch.eye(7)[:, None], torch.zeros(7, 1, 7), 5, seed=1)[:, 0]
    assert (odd.round() == 0).sum(1).tolist() == [1] * 5


# ================================================================ 4  Affine map


@pytest.mark.parametrize("intercept", [False, True])
def test_the_last_fifth_is_held_out_and_scored(intercept):
    x = vectors(100, 12) + 1
    y = x @ vectors(12, 7, seed=1) + 3 + 0.5 * vectors(100, 7, seed=2)
    fitted = fit_affine(x, y, intercept)
    train = fit_affine(x[:80], y[:80], intercept, held_out=0)
    assert fitted.n == 80
    assert math.isnan(train.r2)
    assert torch.equal(fitted.vector(x), train.vector(x))
    mean = y[:80].mean(0)
    true = y[80:] - mean
    predicted = train.predict(x[80:]) - mean
    r2 = 1 - (true - predicted).square().sum() / true.square().sum()
    cosine = torch.cosine_similarity(predicted, true).mean()
    close(torch.tensor([fitted.r2, fitted.cosine]), torch.stack([r2, cosine]))


def make_maps(n_sentences=50, **options):
    """Maps over 60 sentences at two pairs of blocks; y follows from x but for offset and noise."""
    x, y = {}, {}
    for block in (3, 5):
        x[block] = vectors(60, 12, seed=block) + 1
        y[block + 1] = x[block] @ vectors(12, 7, seed=10 + block) + 2
        y[block + 1] += 0.1 * vectors(60, 7, seed=20 + block)
    return AffineMaps(x, y, n_sentences, **options)


V = vectors(6, 12, seed=30)
LOCAL = "contrans-local"


def test_samples_of_the_sentences_are_disjoint_while_they_last():
    samples = [make_maps(20).rows(number) for number in range(3)]
    assert sorted(row for rows in samples for row in rows) == list(range(60))
    assert samples[0] != list(range(20))  # in random order
    assert samples[1] == make_maps(20).rows(1)
    assert make_maps(20).rows(3) == samples[0]
    assert len(set(make_maps().rows(1))) == 50
    assert sorted(make_maps(100).rows(1)) == list(range(60))


def test_a_vector_goes_through_the_map_of_its_blocks_and_sample():
    options = {"intercept": True, "ridge": 0.2}
    maps, found = make_maps(**options), []
    for source_block, block, sample in [(3, 4, 0), (3, 4, 3), (5, 6, 0)]:
        rows = maps.rows(sample)
        fitted = fit_affine(maps.x[source_block][rows], maps.y[block][rows], **options)
        v_hat = maps.vector(V, source_block, block, sample=sample)
        assert torch.equal(v_hat, fitted.vector(V))
        found.append(v_hat)
    assert torch.equal(maps.vector(V, 5, 6), found[2])  # sample 0 unless said
    assert not same(found[0], found[1], 1e-3)
    assert maps.between(3, 4) is maps.between(3, 4)


def test_a_shuffled_map_pairs_the_sentences_of_the_sample_wrongly():
    maps = make_maps(intercept=True)
    true = maps.between(3, 4, 2)
    shuffled, other = [maps.between(3, 4, 2, shuffled=seed) for seed in (0, 1)]
    assert not torch.equal(shuffled.y, other.y)
    assert torch.equal(true.x_mean, shuffled.x_mean)
    assert true.r2 > 0.95
    assert shuffled.r2 < 0.3
    sample = maps.y[4][maps.rows(2)].double()
    nearest = torch.cdist(shuffled.y + shuffled.y_mean, sample).min(1)
    assert nearest.values.max() < 1e-4
    assert len(nearest.indices.unique()) == 40


def test_stream_norms_are_mean_norms_of_both_models_states():
    maps = make_maps()
    source, target = maps.stream_norms(3, 4)
    assert source == pytest.approx(maps.x[3].norm(dim=1).mean().item())
    assert target == pytest.approx(maps.y[4].norm(dim=1).mean().item())


def test_plain_texts_are_lines_first_columns_or_json_lines(tmp_path, capsys, one_line):
    texts = [f"the old cat number {n} sat in the park" for n in range(30)]
    files = {
        "a.txt": "\n".join(texts),
        "a.tsv": "\n".join(f"{text}\tthe rest" for text in texts),
        "a.jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert plain_texts(tmp_path / name, Models(), LLAMAS, 20) == texts[:20]
    assert capsys.readouterr().out == ""
    for line in ("{}", '{"text": null}', "[1]"):
        (tmp_path / "b.jsonl").write_text(f"{files['a.jsonl']}\n{line}")
        one_line(
            lambda: plain_texts(tmp_path / "b.jsonl", Models(), LLAMAS, 50), "b.jsonl, line 31"
        )
    odd = json.dumps({"text": "a line\u2028separator\tis white space"}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_text(f"{odd}\n{files['a.jsonl']}")
    first = plain_texts(tmp_path / "c.jsonl", Models(), LLAMAS, 20)[0]
    assert first == "a line separator is white space"


def test_cut_ends_drops_two_to_four_words_as_in_the_released_code():
    drop = np.random.RandomState(42)
    texts = [f"one two three four five six {n}" for n in range(50)]
    wanted = [" ".join(text.split()[: -drop.randint(2, 5)]) for text in texts]
    assert cut_ends(texts) == wanted
    assert {len(text.split()) for text in wanted} == {3, 4, 5}


def test_sentences_that_do_not_fit_a_model_are_left_out_and_counted(
    llama, tmp_path, capsys, one_line
):
    lines = ["The old cat sat in the park and ran to the house"] * 12
    lines[2:2] = ["Tom " * 60, "too short", "Tom " * 200]
    path = tmp_path / "sentences.tsv"
    path.write_text("".join(f"{line}\tOne . <::::> Two .\n" for line in lines))
    short = str(save_llama(tmp_path / "short", max_position_embeddings=20))
    names = [llama[0].name, short]
    texts = plain_texts(path, Models(), names, 400)
    assert len(texts) == 12
    assert all(text.startswith("The old cat sat") for text in texts)
    assert "2 of 14" in capsys.readouterr().out
    assert len(plain_texts(path, Models(), names[:1], 400)) == 13
    assert len(plain_texts(path, Models(), names, 10)) == 10  # others take their place
    one_line(lambda: plain_texts(path, Models(), names, 8), "only 8 texts")


def test_text_for_maps_is_what_the_models_can_be_mapped_on(llama, tmp_path, capsys, one_line):
    mine, toy = tmp_path / "mine.txt", TOY / "wikisplit" / "validation.tsv"
    mine.write_text("The old cat sat in the park and ran to the house\n" * 12)
    args = SimpleNamespace(maps=3, sentences=20, map="both")
    for names, args.texts, remarked in [
        (LLAMAS, toy, False),
        ([LLAMAS[0], llama[0].name], toy, True),
        ([llama[0].name], mine, False),
    ]:
        args.maps = 3
        texts = map_texts(args, Models(), names)
        assert ("text of the toy world" in capsys.readouterr().out) == remarked
        assert len(texts) == (12 if args.texts == mine else 60)
        assert args.maps == (1 if args.texts == mine else 3)
    slow = SimpleNamespace(tokenizer=lambda name: SimpleNamespace(is_fast=False))
    one_line(lambda: map_texts(args, slow, ["odd/model"]), "odd/model", "--map paper")


def test_no_sample_of_text_is_counted_twice(capsys):
    texts = [f"sentence {number}" for number in range(10)]
    assert count_samples(3, texts, 3) == 3 and not capsys.readouterr().out
    assert count_samples(5, texts, 3) == 3
    assert "3 instead of 5 maps" in capsys.readouterr().out
    assert count_samples(2, texts, 20) == 1


def test_labels_of_one_pair_cannot_be_permuted():
    one = torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="two pairs or more"):
        permuted_vectors(one, -one, 3, seed=0)
    assert permuted_vectors(one, -one, 0, seed=0).shape == (0, 2, 4)


# ---------------------------------------------------------------- fitted where v is read


def test_states_at_any_positions_are_those_of_plain_transformers(any_pair):
    model, reference = any_pair
    texts = ["Tom felt very", "Lily lost her old cat in the park. Lily felt very"]
    counts = [len(reference.ids(text)[0]) for text in texts]
    positions = [[0, counts[0] - 1], [1, -1, 3]]
    states = hidden_states(model, texts, [1, 2], positions=positions)
    assert states.shape == (5, 2, 32)
    close(states[1], reference.states(texts[:1])[0, [1, 2]])
    close(states[3], reference.states(texts[1:])[0, [1, 2]])
    whole = hidden_states(model, [reference.tokenizer.decode(reference.ids(texts[1])[0][1:4])])
    close(states[4], whole[0, [1, 2]])


def test_shared_token_ends_are_the_same_places_of_the_text():
    names = ("llama-s", "qwen-s")
    tokenizers = [Models().tokenizer(str(TOY / "models" / name)) for name in names]
    texts = ["The dish of Kipori is Kiza.", "Tom saw a cliff in Vogudu."]
    for text, places in zip(texts, shared_token_ends(tokenizers, texts)):
        encoded = [each(text, return_offsets_mapping=True).offset_mapping for each in tokenizers]
        ends = [{end for start, end in offsets if end > start} for offsets in encoded]
        assert len(places) >= 5
        assert places == sorted(ends[0] & ends[1])


def test_nearest_positions_take_turns_among_the_states():
    x = vectors(200, 12, seed=1) * torch.arange(1.0, 13)
    states = x[[7, 50]] * 1.01
    standard = torch.nn.functional.normalize((x - x.mean(0)) / x.std(0), dim=1)
    wanted = torch.nn.functional.normalize((states - x.mean(0)) / x.std(0), dim=1)
    ranked = (standard @ wanted.T).argsort(0, descending=True)
    chosen = nearest_positions(x, states, 30)
    assert chosen[:2] == [7, 50]
    assert chosen == list(dict.fromkeys(ranked.flatten().tolist()))[:30]
    assert sorted(nearest_positions(x, states, 500)) == list(range(200))


def test_windows_are_pieces_of_the_text_as_long_as_the_concepts_texts():
    plain = ["the quick brown fox jumps over the lazy dog today", "one two three four five six"]
    pieces = cut_windows(plain, ["a b c!", "d e"], 200)
    assert {len(piece.split()) for piece in pieces} == {2, 3}
    assert {piece[-1] for piece in pieces if not piece[-1].isalnum()} == {"!"}
    for piece in pieces:
        words = piece.rstrip("!").split()
        words[0] = words[0].lower()
        assert any(" ".join(words) in text for text in plain)
    assert pieces == cut_windows(plain, ["a b c!", "d e"], 200)


def test_each_half_of_the_pairs_is_judged_by_the_vector_of_the_other():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 9, 5, generator=generator)
    positive[:, 0] += 1
    above = []
    for learn, judged in ((0, 1), (1, 0)):
        v = refine(positive[learn::2, None], negative[learn::2, None])[0]
        rates = []
        for one, other in itertools.product(positive[judged::2], negative[judged::2]):
            rates.append(float(one @ v > other @ v))
        above.append(np.mean(rates))
    assert separation(positive, negative) == pytest.approx(np.mean(above))
    assert 0.5 < np.mean(above) < 1
    positive[:, 0] += 100
    assert separation(positive, negative) == 1
    assert separation(negative, positive) == 1  # v has a sign of its own


def test_the_response_to_a_vector_is_a_covariance():
    x, noise, factor = vectors(50)[:, :6], vectors(50)[:, 6:9], vectors(6)[:, :3]
    y = x @ factor + noise
    v = vectors(1)[0][:6]
    projected = x @ v
    wanted = np.cov(torch.column_stack([projected, y]).T.numpy(), bias=True)[0, 1:]
    close(response(v, x, y), torch.tensor(wanted), 1e-5)


@pytest.mark.slow
def test_a_local_map_carries_a_vector_where_the_paper_map_does_not():
    models, (source, target) = Models(device="cpu"), LLAMAS
    plain = plain_texts(TOY / "wikisplit" / "validation.tsv", models, LLAMAS, 600)
    template = "Scenario: {text}\nThe emotion of the above scenario is"
    lists, texts = [], []
    for emotion in ("fear", "happiness"):
        scenarios = read_json(TOY / "emotions" / f"{emotion}.json")[:60]
        lists.append([template.replace("{text}", text) for text in scenarios])
        texts += scenarios
    vector, own = Vector("fear", source, source), Vector("fear", target, target)
    found = Vectors(
        models,
        wanted=[vector, own],
        targets=LLAMAS[1:],
        pairs=lambda *_: lists,
        blocks=lambda name: [6],
        context=lambda *_: Context((template,), tuple(texts)),
        sentences=plain,
        refine="mean",
        n_sentences=600,
    )
    point = Point(6, 6, 1.0)
    v_hat = {method: found.v_hat(vector, target, point, method) for method in ("contrans", LOCAL)}
    cosine = {k: torch.cosine_similarity(v, found.v(own, 6), dim=0) for k, v in v_hat.items()}
    assert cosine[LOCAL] > 0.4 > 0.2 > cosine["contrans"]
    with pytest.raises(ValueError, match="unknown map 'lokal'"):
        found.maps(vector, target, "lokal")
    local = found.maps(vector, target, LOCAL)
    with pytest.raises(ValueError, match="text for 1 samples"):
        local.between(6, 6, sample=1)
    x, y = local.states(6, 6)
    assert len(x) == len(y) == 960
    spread = [(each - each.mean(0)).norm() for each in (x, y)]
    length = found.v(vector, 6).norm() * spread[1] / spread[0]
    close(v_hat[LOCAL].norm(), length, 1e-3)
    paper = found.maps(vector, target).between(6, 6)
    assert paper.r2 > 0.8
    fitted = local.between(6, 6)
    assert local.r2_where_read(paper, 6, 6) < 0 < fitted.r2
    close(torch.tensor(local.r2_where_read(fitted, 6, 6)), torch.tensor(fitted.r2), 1e-4)
    v = found.v(vector, 6)
    near, far = [local.cosine_to_response(v, v_hat[k], 6, 6) for k in (LOCAL, "contrans")]
    assert near > 0.5 > far  # on the rows held out
    held_out = response(v, x[fitted.n :], y[fitted.n :]).float()
    close(torch.tensor(near), torch.cosine_similarity(v_hat[LOCAL], held_out, dim=0), 1e-4)
    null = found.permuted(vector, target, point, LOCAL, 5, seed=1)
    close(null.norm(dim=1), v_hat[LOCAL].norm().expand(5))
    assert torch.equal(null[:2], found.permuted(vector, target, point, LOCAL, 2, seed=1))
    states = [hidden_states(models.load(source), each, [6]) for each in lists]
    moved = local.vector(permuted_vectors(*states, 5, seed=1)[:, 0], 6, 6)
    close(torch.cosine_similarity(null, moved), torch.ones(5))
    counts = {"n_maps": 1, "n_random": 1, "seed": 1}
    controls = found.controls(vector, target, point, [], LOCAL, n_permuted=5, **counts)
    assert torch.equal(torch.stack([controls[f"permuted {k}"] for k in range(5)]), null)


# ================================================================ 5  Transplant


def test_alpha_0_equals_base_bit_for_bit_and_the_model_is_untouched(any_pair):
    model, reference = any_pair
    zero = Transplant.of(A, 1, 0.0) + Transplant.of(B, 2, 0.0)
    for ask in ASK:
        base = ask(model, BASE, TEXTS)
        assert same(ask(model, zero, TEXTS), base)
        assert not same(ask(model, TRANSPLANTS[2], TEXTS), base) or ask is ask_labels
        assert same(ask(model, BASE, TEXTS), base)
    for weights, wanted in zip(plain_module(model).parameters(), reference.model.parameters()):
        assert torch.equal(weights, wanted)
        assert not weights.requires_grad


def test_random_directions_have_the_norm_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    directions = random_directions(3 * A, 20, seed=5)
    close(directions.norm(dim=1), (3 * A).norm().expand(20))
    assert torch.equal(directions, random_directions(3 * A, 20, seed=5))
    assert not torch.equal(directions, random_directions(3 * A, 20, seed=6))
    assert torch.equal(state, torch.get_rng_state())


def test_controls_have_the_norm_of_v_hat_but_for_other_maps():
    maps = make_maps()
    move = partial(maps.vector, source_block=3, block=4)
    v, fear, joy = V[:3]
    v_hat = move(v)
    found = control_directions(
        maps,
        v,
        others={"fear": fear, "joy": joy},
        source_block=3,
        block=4,
        n_maps=3,
        n_random=2,
        seed=8,
        n_shuffled=2,
    )
    random = random_directions(v_hat, 2, 8)
    few = maps.rows()[: round(0.39 * len(v) / 0.8)]  # 0.39 dimensions are fitted on 80 %
    wanted = {
        "map 1": move(v, sample=1),
        "map 2": move(v, sample=2),
        "few sentences": fit_affine(maps.x[3][few], maps.y[4][few]).vector(v),
        "shuffled map 0": move(v, shuffled=0),
        "shuffled map 1": move(v, shuffled=1),
        "other fear": move(fear),
        "other joy": move(joy),
        "random 0": random[0],
        "random 1": random[1],
    }
    assert list(found) == list(wanted)
    for name, direction in wanted.items():
        norm = direction.norm() if name.startswith("map") else v_hat.norm()
        close(found[name], direction / direction.norm() * norm)


# ================================================================ 6  Scoring


def test_steered_logits_equal_plain_hooks(any_pair):
    model, reference = any_pair
    check_logits(model, reference, TEXTS)
    check_logits(model, reference, TEXTS[:1])
    for transplant, shifts in STEERED:
        wanted = reference.next_logits(TEXTS, shifts)
        close(next_token_logits(model, TEXTS, [transplant])[0], wanted)


def test_choices_are_sums_of_log_probabilities(any_pair):
    model, reference = any_pair
    check_choices(model, reference, pairs_of(TEXTS), STEERED)
    pairs = pairs_of(TEXTS, [" happy", " happy happy", " happy sad", " sad happy"])
    check_choices(model, reference, pairs, [pushing(reference, "Ġhappy", 200.0)])
    pairs = pairs_of(["A", "Tom"], [" very sad dog", " red old ball", " big old dog", " x y"])
    check_choices(model, reference, pairs, STEERED)  # each pair fits a window of 8 tokens


@pytest.mark.parametrize(
    "labels, words",
    [
        ("happy sad dog", "happy sad dog"),  # a token each
        ("q z K", "q z K"),  # two tokens, the first the same
        ("xq xz zx", "xq xz zx"),
        ("xqueen xzoo happy", "xq xz happy"),  # as many tokens as tell them apart
        ("sad happy xq xz", "sad happy xq xz"),
    ],
)
def test_labels_are_judged_by_the_tokens_that_tell_them_apart(pair, labels, words):
    model, reference = pair
    tokens = ["Ġhappy", "Ġsad", "Ġ", "q", "z"]
    steered = [pushing(reference, token, 200.0) for token in tokens]
    steered += STEERED
    transplants = [transplant for transplant, _ in steered]
    said, preferred = score_labels(model, TEXTS, labels.split(), transplants)
    pairs = pairs_of(TEXTS, [f" {word}" for word in words.split()])
    for i, (_, shifts) in enumerate(steered):
        sums, greedy = reference.score_pairs(pairs, shifts)
        sums = sums.view(len(TEXTS), -1)
        assert torch.equal(preferred[i], sums.argmax(1))
        for j, row in enumerate(torch.tensor(greedy).view(len(TEXTS), -1).tolist()):
            assert said[i, j] == (row.index(True) if True in row else -1)
    assert -1 in said
    assert said.max() >= 0 or "happy" not in labels


def test_token_changes_count_the_ten_that_change_most_in_each_text(model):
    move = TRANSPLANTS[2]
    plain, moved = logit_lens(model, TEXTS, 3, [BASE, move])
    for found, change in zip(token_changes(model, TEXTS, 3, move), (moved - plain, plain - moved)):
        wanted = Counter()
        for row in change:
            wanted.update(model.tokenizer.decode([i]).strip() for i in row.argsort()[-10:].tolist())
        counts = Counter()
        for token, n in found:
            counts[token] += n
        assert counts == wanted
        assert [n for _, n in found] == sorted((n for _, n in found), reverse=True)


def test_a_label_after_a_line_break_has_no_blank_as_a_choice_has_none(pair):
    model, reference = pair
    prompts = [f"{text}\nfelt\n" for text in TEXTS]
    ids = [reference.tokenizer(prompts[0] + label).input_ids for label in ("happy", "dog")]
    start = len(reference.tokenizer(prompts[0]).input_ids)
    firsts = [row[start] for row in ids]
    assert len(set(firsts)) == 2
    [preferred] = score_labels(model, prompts, ["happy", "dog"])[1]
    wanted = reference.next_logits(prompts)[:, firsts].argmax(1)
    assert torch.equal(preferred, wanted)
    pairs = pairs_of(prompts, ["happy", "dog"])
    check_choices(model, reference, pairs, STEERED[:1])


def test_perplexity_is_exp_of_the_mean_loss(any_pair):
    model, reference = any_pair
    got, tokens = perplexity(model, TEXTS, TRANSPLANTS)
    rows = [reference.tokenizer(text).input_ids for text in TEXTS]
    assert tokens == sum(map(len, rows)) - len(rows)
    for value, shifts in zip(got, SHIFTS):
        losses = [-reference.logprobs(ids, 1, shifts) for ids in rows]
        close(value, torch.cat(losses).double().mean().exp())


def test_no_more_logits_than_a_piece_are_in_memory_at_once(model, monkeypatch):
    texts = [text * 4 for text in LONG_TEXTS] * 4
    wanted = perplexity(model, texts, TRANSPLANTS)[0]
    held, linear = [], torch.nn.functional.linear

    def watching(states, weight, bias=None):
        if weight.shape == model.nn.unembed.weight.shape:
            held.append(states.numel() // states.shape[-1])
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watching)
    close(perplexity(model, texts, TRANSPLANTS)[0], wanted)
    assert sum(held) > 4 * UNEMBED_ROWS
    assert max(held) <= UNEMBED_ROWS


PEAK = """
import sys
from common import Transplant, perplexity, score_labels
from models import load_model
import torch
model = load_model(sys.argv[1], device="cpu")
texts = ["the old town " * 60 + f"{n} felt" for n in range(4)]
moves = [Transplant.of(torch.randn(768), 12, alpha) for alpha in (1.0, 2.0, 3.0, 4.0)]
perplexity(model, texts, moves)
score_labels(model, texts, ["happy", "sad"], moves)
print([line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's VmHWM")
def test_a_sweep_with_a_large_vocabulary_stays_in_memory(tmp_path):
    """162 M parameters in 16 blocks of 768, and 128,256 tokens: 1 GB of weights. All logits of a
    batch would be another 1 GB, and their log-softmax too."""
    folder = save_llama(
        tmp_path / "large",
        hidden_size=768,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        vocab_size=128256,
        max_position_embeddings=2048,
    )
    command = [sys.executable, "-c", PEAK, str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) / 1024 < 1900  # MiB; 2,700 with all logits at once


@pytest.mark.parametrize("window", [2, 5, 8, 200])
def test_a_long_text_is_read_in_windows_that_count_each_token_once(llama, window):
    model, reference = llama
    texts = [PREFIX, TEXTS[1], "Tom", ""]  # the empty one is <s> alone: nothing to predict
    losses = []
    for text in texts:
        ids = reference.tokenizer(text).input_ids
        end = min(len(ids), window)
        losses.append(-reference.logprobs(ids[:end], 1))
        while end < len(ids):
            done = end
            end = min(len(ids), done + window // 2)
            begin = end - window
            losses.append(-reference.logprobs(ids[begin:end], done - begin))
    got, tokens = perplexity(model, texts, window=window)
    losses = torch.cat(losses).double()
    assert tokens == len(losses)
    close(got[0], losses.mean().exp())


def test_the_logit_lens_is_norm_and_unembedding_at_its_block(any_pair):
    model, reference = any_pair
    for layer in (1, 3):
        got = logit_lens(model, TEXTS, layer, TRANSPLANTS)
        for probabilities, shifts in zip(got, SHIFTS):
            states = reference.states(TEXTS, shifts)[:, layer]
            wanted = reference.head(reference.norm(states)).softmax(-1)
            close(probabilities, wanted)


# ---------------------------------------------------------------- text


def test_greedy_text_equals_that_of_transformers(any_pair):
    model, reference = any_pair
    wanted = [reference.generate(TEXTS, shifts) for shifts in SHIFTS]
    assert generate(model, TEXTS, TRANSPLANTS, 8) == wanted
    assert generate(model, TEXTS[:1], TRANSPLANTS[1:2], 8) == [wanted[1][:1]]


def changed_copy(model, folder, **settings):
    """The model loaded from a copy of its folder with other settings for generation."""
    shutil.copytree(model.name, folder)
    edit_json(folder / "generation_config.json", **settings)
    return load(folder)


@pytest.mark.parametrize("batch_tokens", [slow(1), slow(40), 300, 2048])
def test_many_transplants_write_what_each_writes_alone(pair, tmp_path, batch_tokens):
    """Whatever is computed together; texts end at different steps, by one token or another."""
    model, reference = pair
    eos = [reference.new_tokens(text, SHIFTS[1])[2] for text in TEXTS[1:3]]
    copy = changed_copy(model, tmp_path / "copy", eos_token_id=eos)
    copy = replace(copy, batch_tokens=batch_tokens)
    texts = TEXTS + LONG_TEXTS[:2]
    wanted = [reference.generate(texts, shifts, eos) for shifts in SHIFTS]
    lengths = [len(reference.new_tokens(text, shifts, eos)) for text in texts for shifts in SHIFTS]
    assert len(set(lengths)) > 2
    assert generate(copy, texts, TRANSPLANTS, 8) == wanted


def test_text_is_written_without_computing_twice(llama, tmp_path):
    """Blocks up to the steered one read a prompt once; texts that have ended are not continued."""
    model, reference = llama
    sweep = [Transplant.of(A, 2, alpha) for alpha in (0.5, 1.0, 2.0, 4.0)]
    next_token_logits(model, TEXTS)  # tries what the model can share
    with watched(model) as seen:
        generate(model, TEXTS, sweep, 2)
    assert rows_through(seen) == [4 + 16, 4 + 16, 4 + 16, 16 + 16]
    eos = reference.new_tokens(TEXTS[1])[2]
    copy = changed_copy(model, tmp_path / "copy", eos_token_id=eos)
    lengths = [len(reference.new_tokens(text, {}, eos)) for text in TEXTS]
    with watched(copy) as seen:
        generate(copy, TEXTS, [BASE], 8)
    continued = [rows for rows, tokens in seen[0] if tokens == 1]
    going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert continued[-len(going) :] == going


def test_the_settings_of_a_model_folder_do_not_change_how_text_is_made(model, tmp_path):
    changed = changed_copy(
        model,
        tmp_path / "copy",
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        top_k=3,
        temperature=0.1,
        top_p=0.1,
        do_sample=True,
    )
    for sample in (False, True):
        wanted = generate(model, TEXTS, [BASE], 8, sample)
        assert generate(changed, TEXTS, [BASE], 8, sample) == wanted


def test_samples_repeat_and_leave_the_global_generator_alone(model):
    sample = partial(generate, model, TEXTS, TRANSPLANTS[1:2], 8, True)
    state = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(state, torch.get_rng_state())
    assert sample(3) == first
    assert sample(4) != first
    [alone] = generate(model, TEXTS[:1], TRANSPLANTS[1:2], 8, True, seed=3)
    assert alone == first[0][:1]  # the first text draws the same numbers in every batch
    small = replace(model, batch_tokens=1)
    assert generate(small, TEXTS, TRANSPLANTS[:2], 8, True, seed=3)[1:] == first


# ---------------------------------------------------------------- emulated fine-tuning (EFT)

C, D = vectors(2, 64, seed=1)
WIDE = [steering(), steering((1, 2.0, C)), steering((0, -1.0, C), (2, 1.5, D))]


def make_trio(folder, family, padding=(0, 0, 0)):
    """Models and References of a target, and of a chat and a base model that are smaller.

    padding: unused rows at the end of each unembedding."""
    config_class, settings, *paths = CONFIGS[family]
    models, references = [], []
    for seed, more in enumerate(padding):
        shape = {
            "hidden_size": 32 if seed else 64,
            "num_hidden_layers": 4 - seed,
            "vocab_size": len(make_tokenizer()) + more,
        }
        path = save_model(folder / str(seed), config_class, seed, **settings | shape)
        models.append(load(path))
        references.append(Reference(path, *paths))
    return models, references


@pytest.fixture(scope="module", params=["llama", slow("gpt_neox"), slow("gpt2")])
def trio(request, tmp_path_factory):
    """GPT-2 has learned positions, which padding must not move."""
    return make_trio(tmp_path_factory.mktemp("trio"), request.param)


def eft_tokens(references, text, shifts, eos=1, uniform=None):
    """The continuation of at most 8 tokens: greedy, or sampled with these random numbers [8]."""
    ids, new = references[0].ids(text)[0].tolist(), []
    while len(new) < 8 and eos not in new:
        logits = eft_logits(references, ids + new, shifts)[-1]
        token = logits.argmax()
        if uniform is not None:
            mass = logits.softmax(-1).cumsum(-1)
            token = (mass <= uniform[len(new)] * mass[-1]).sum()
        new.append(token.item())
    return new


def eft_texts(references, shifts, eos=1, uniform=(None,) * len(TEXTS)):
    rows = [eft_tokens(references, text, shifts, eos, own) for text, own in zip(TEXTS, uniform)]
    return references[0].tokenizer.batch_decode(rows, skip_special_tokens=True)


def check_eft(models, references, pairs, steered):
    """Choices and texts under EFT are the reference's."""
    target, *small = models
    options = {"eft": tuple(small)}
    transplants = [transplant for transplant, _ in steered]
    got, greedy = choice_logprobs(target, pairs, transplants, **options)
    for values, flags, (transplant, shifts) in zip(got, greedy, steered, strict=True):
        logits_of = partial(eft_logits, references, shifts=shifts)
        wanted, wanted_flags = references[0].score_pairs(pairs, logits_of=logits_of)
        close(values, wanted, 1e-4)
        assert flags.tolist() == wanted_flags
        wanted = eft_texts(references, shifts)
        assert generate(target, TEXTS, [transplant], 8, **options) == [wanted]
    return greedy


def test_eft_adds_the_logits_of_chat_minus_base(trio):
    models, references = trio
    steered = [*WIDE, pushing(references[0], "Ġhappy", 200.0)]
    greedy = check_eft(models, references, pairs_of(TEXTS), steered)
    assert greedy.any()
    assert not greedy.all()


def test_samples_under_eft_are_of_the_sum_of_the_logits(trio):
    (target, *small), references = trio
    (transplant, shifts), *_ = WIDE
    uniform = torch.rand(len(TEXTS), 8, generator=torch.Generator().manual_seed(3))
    got = generate(target, TEXTS, [transplant], 8, True, seed=3, eft=tuple(small))
    assert got == [eft_texts(references, shifts, uniform=uniform)]


def test_perplexity_under_eft_is_of_the_sum_of_the_logits(trio):
    (target, *small), references = trio
    (transplant, shifts), *_ = WIDE
    [got], tokens = perplexity(target, TEXTS, [transplant], eft=tuple(small))
    losses = []
    for text in TEXTS:
        ids = references[0].ids(text)[0].tolist()
        scores = eft_logits(references, ids, shifts).double().log_softmax(-1)
        losses += [-scores[i, token].item() for i, token in enumerate(ids[1:])]
    assert tokens == len(losses)
    assert got.item() == pytest.approx(math.exp(sum(losses) / tokens), rel=1e-4)


def test_eft_behind_a_shared_prefix_and_in_small_batches(trio):
    models, references = trio
    small = [replace(model, batch_tokens=100) for model in models]
    check_eft(small, references, pairs_of(LONG_TEXTS), WIDE[:2])


def test_eft_rows_that_end_early_keep_their_text_and_leave_the_others(trio, tmp_path):
    models, references = trio
    eos = eft_tokens(references, TEXTS[1], {})[2]
    target = changed_copy(models[0], tmp_path / "copy", eos_token_id=eos)
    lengths = [len(eft_tokens(references, text, {}, eos)) for text in TEXTS]
    assert lengths[1] <= 3
    assert max(lengths) == 8
    got = generate(target, TEXTS, max_new_tokens=8, eft=tuple(models[1:]))
    assert got == [eft_texts(references, {}, eos)]


def test_eft_leaves_out_rows_of_padding_in_an_unembedding(tmp_path):
    models, references = make_trio(tmp_path, "llama", (5, 13, 0))
    check_eft(models, references, pairs_of(TEXTS[:2]), WIDE[1:2])


def test_eft_refuses_another_vocabulary_a_full_context_and_nan(model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    other = load(save_llama(tmp_path / "other", tokenizer=tokenizer))
    for eft in ((other, model), (model, other)):
        with pytest.raises(ValueError, match="vocabular.*other"):
            choice_logprobs(model, pairs_of(TEXTS), eft=eft)
        with pytest.raises(ValueError, match="vocabular.*other"):
            generate(model, TEXTS, eft=eft)
    short = load(save_llama(tmp_path / "short", max_position_embeddings=30))
    with pytest.raises(ValueError, match="context of .*short"):
        generate(model, TEXTS, max_new_tokens=29, eft=(model, short))
    broken = load(Path(model.name))
    plain_module(broken.nn.final_norm).weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(model, TEXTS, [BASE], 2, eft=(broken, model))


# ================================================================ 7  Engine


def check_sharing(model, reference):
    """Logits, choices and states behind a long prefix are the reference's."""
    check_logits(model, reference, LONG_TEXTS)
    check_choices(model, reference, pairs_of(LONG_TEXTS), STEERED[:3])
    ends = [len(reference.ids(text)[0]) - 1 for text in LONG_TEXTS]
    for transplant, shifts in STEERED[:3]:
        wanted = reference.states(LONG_TEXTS, shifts)
        for place in ([[-1]] * len(ends), [[end] for end in ends]):
            close(hidden_states(model, LONG_TEXTS, None, transplant, place), wanted)
    first = [[0, -1]] * len(ends)  # the first token is in the prefix
    close(hidden_states(model, LONG_TEXTS, None, None, first)[1::2], reference.states(LONG_TEXTS))


def test_a_shared_prefix_changes_nothing(any_pair):
    """Also where a window (GPT-Neo: 8, Mistral: 16) is shorter than the prefix."""
    model, reference = any_pair
    check_sharing(model, reference)
    shortest = PREFIX.strip()  # all of it is the prefix
    check_logits(model, reference, [shortest, shortest + " Tom felt very", shortest])


@pytest.mark.parametrize("pair", ["llama", *map(slow, MAIN[1:])], indirect=True)
def test_the_texts_of_each_template_share_a_prefix(pair):
    """Two templates that begin alike, in turn, and texts without one."""
    model, reference = pair
    templates = [PREFIX, PREFIX[:20] + PREFIX.lower()[20:], ""]
    texts = [template + text for text in 2 * TEXTS for template in templates]
    ids = [reference.ids(text)[0].tolist() for text in texts]
    tokens = sum(map(len, ids))
    for first in (0, 1):  # a text of each template
        tokens -= 7 * len(os.path.commonprefix(ids[first::3]))
    check_logits(model, reference, texts)
    one_by_one = replace(model, batch_tokens=1)
    with watched(one_by_one) as seen:
        states = hidden_states(one_by_one, texts, [2], BASE)
    close(states[:, 0], reference.states(texts)[:, 2])
    if model.config.model_type != "gpt_neo":  # its window is too short
        assert sum(rows * width for rows, width in seen[0]) == tokens
    check_choices(model, reference, pairs_of(texts[:6]), STEERED[:3])


@pytest.mark.parametrize("window", [40, 48, 60])
def test_a_window_a_little_longer_than_the_prefix(tmp_path, window):
    """The prompts differ in length; padding must not push the prefix out of the window."""
    config_class, settings, *paths = CONFIGS["mistral"]
    folder = tmp_path / "model"
    save_model(folder, config_class, **settings | {"sliding_window": window})
    check_sharing(load(folder), Reference(folder, *paths))


def test_each_thing_is_computed_once(any_pair):
    """A prompt up to the steered block, a prefix, the context of choices."""
    model, reference = any_pair
    sweep = [Transplant.of(A, 2, alpha) for alpha in (0.0, 0.5, 1.0, 2.0, 4.0)]
    next_token_logits(model, TEXTS)  # tries what the model can share
    assert model.sharing == (True,) * 5
    with watched(model) as seen:
        next_token_logits(model, TEXTS, sweep)
    assert rows_through(seen) == [4, 4, 4, 20]
    with watched(model) as seen:
        next_token_logits(replace(model, sharing=(False,) * 5), TEXTS, sweep)
    assert rows_through(seen) == [20, 20, 20, 20]
    if model.config.model_type in ("gpt_neo", "mistral"):
        return  # their windows are too short for the rest
    with watched(model) as seen:
        choice_logprobs(model, pairs_of(TEXTS), sweep)
    assert rows_through(seen) == [4, 4, 4, 20]
    texts = [text + choice for text, choice in pairs_of(TEXTS)]
    small = replace(model, batch_tokens=sum(len(reference.ids(text)[0]) for text in texts))
    last = [Transplant.of(A, 3, alpha) for alpha in range(8)]
    with watched(small) as seen:
        swept, _ = choice_logprobs(small, pairs_of(TEXTS), last)
    assert rows_through(seen) == [4, 4, 4, 4]  # after the last block states are only copied
    for transplant, scores in zip(last, swept):
        close(scores, choice_logprobs(model, pairs_of(TEXTS), [transplant])[0][0], 1e-4)
    with watched(model) as seen:
        next_token_logits(model, LONG_TEXTS, sweep)
    [rows, prefix], [_, rest] = seen[0]
    assert (rows, seen[3][0]) == (1, (5, prefix))
    assert prefix >= 32
    assert prefix + rest == max(len(reference.ids(text)[0]) for text in LONG_TEXTS)
    for transplant in (None, sweep[1]):
        with watched(model) as seen:
            hidden_states(model, LONG_TEXTS, [2], transplant)
        assert seen[0] == [(1, prefix), (len(LONG_TEXTS), rest)]


def test_where_one_logit_is_read_the_last_block_has_one_token_a_row(model):
    sweep = [BASE, *(Transplant.of(A, 2, alpha) for alpha in (1.0, 2.0))]
    next_token_logits(model, TEXTS)  # tries what the model can share
    seen = []
    mlp = plain_module(model.nn.layers[3]).mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    next_token_logits(model, TEXTS, sweep)
    assert seen == [(len(sweep) * len(TEXTS), 1)]
    seen.clear()
    choice_logprobs(model, [(text, " sad and happy") for text in TEXTS], sweep)
    assert sum(rows for rows, _ in seen) == len(sweep) * len(TEXTS)
    assert min(tokens for _, tokens in seen) > 3
    handle.remove()


def tensors_in_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that load on access
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def test_no_tensor_outlives_its_batch(model):
    """Without help by the garbage collector: on a GPU it would come too late."""

    def work():
        generate(model, LONG_TEXTS, TRANSPLANTS, 3)
        next_token_logits(model, LONG_TEXTS, TRANSPLANTS)
        choice_logprobs(model, pairs_of(LONG_TEXTS), TRANSPLANTS)

    work()
    gc.collect()
    gc.disable()
    try:
        before = tensors_in_memory()
        work()
        assert tensors_in_memory() == before
    finally:
        gc.enable()


def test_more_choices_than_fit_one_row_are_several(llama):
    model, reference = llama
    endings = [" in the park", " in the old town", " at the big house"]
    choices = [f" {n}, {n * n}, {n + 1}, {2 * n}{end}" for n in range(15) for end in endings]
    pairs = pairs_of(TEXTS[:2], choices)
    with watched(model) as seen:
        check_choices(model, reference, pairs, STEERED[:1])
    assert 2 < sum(rows for rows, _ in seen[0]) < 20
    assert max(tokens for _, tokens in seen[0]) <= BRANCH_TOKENS + 30


def test_a_forward_pass_holds_no_more_tokens_than_it_may(model):
    model = replace(model, batch_tokens=64)
    with watched(model) as seen:
        for ask in (ask_states, ask_logits, ask_choices, ask_perplexity, ask_text):
            ask(model, TRANSPLANTS[1], TEXTS * 4)
        next_token_logits(model, TEXTS, TRANSPLANTS)
    assert len(seen[0]) > 8
    assert all(rows * tokens <= 64 for rows, tokens in seen[3])
    for ask in (next_token_logits, hidden_states):
        with watched(model) as seen:
            ask(model, [PREFIX] * 40)
        assert max(rows for rows, _ in seen[0]) < 20  # cached tokens need memory, too


@pytest.mark.parametrize("ask", ASK)
def test_a_batch_too_large_for_memory_is_halved_and_so_are_those_that_follow(model, ask):
    model = replace(model)
    with watched(model) as seen:
        wanted = ask(model, TRANSPLANTS[1], TEXTS)
    limit = max(rows * tokens for rows, tokens in seen[3]) - 1
    failed = []

    def act(rows, tokens):
        if rows * tokens > limit:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")

    before = model.batch_tokens
    with watched(model, act):
        got = ask(model, TRANSPLANTS[1], TEXTS)
    assert failed
    assert model.batch_tokens < before
    assert same(got, wanted, 2e-5)


def test_memory_may_run_out_where_a_prefix_is_copied(llama, monkeypatch):
    model, reference = llama
    new_empty, failed = torch.Tensor.new_empty, []

    def limited(tensor, rows, *shape):
        if rows > len(TRANSPLANTS):  # one text under each of them
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_empty(tensor, rows, *shape)

    texts = LONG_TEXTS * 2
    next_token_logits(model, texts)  # tries what the model can share
    monkeypatch.setattr(torch.Tensor, "new_empty", limited)
    check_logits(replace(model), reference, texts)
    assert failed


def test_a_single_row_too_large_for_memory_is_an_error(model):
    def act(rows, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = replace(model)
    with watched(model, act), pytest.raises(torch.OutOfMemoryError):
        next_token_logits(model, TEXTS)


GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
MAMBA = {
    "layer_types": ["mamba", "attention"] * 2,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "shared_intermediate_size": 64,
}
MORE = {  # what they can share, and as in CONFIGS
    "gemma2": ([1, 1, 1, 0, 1], transformers.Gemma2Config, GROUPED | GEMMA, *LLAMA_PATHS),
    "bloom": ([1, 1, 0, 1, 1], transformers.BloomConfig, {}, "transformer.h", "transformer.ln_f"),
    "mamba": ([1, 0, 0, 1, 0], transformers.GraniteMoeHybridConfig, GROUPED | MAMBA, *LLAMA_PATHS),
}


@pytest.mark.parametrize("family", ["gemma2", "bloom", slow("mamba")])
def test_what_a_model_cannot_share_is_computed_in_full(family, tmp_path, capsys):
    """ALiBi (BLOOM) knows no tree of choices; Mamba blocks have no cache of keys and values."""
    shares, config_class, settings, *paths = MORE[family]
    folder = save_model(tmp_path / family, config_class, **settings)
    model, reference = load(folder), Reference(folder, *paths)
    check_sharing(model, reference)
    assert list(model.sharing) == shares
    assert ("does without" in capsys.readouterr().out) == (0 in shares)
    transplant, shifts = STEERED[2]
    wanted = reference.generate(TEXTS, shifts)
    assert generate(model, TEXTS, [transplant], 8) == [wanted]


def test_a_model_that_wants_one_number_of_rows_does_not_share_blocks(llama):
    def act(rows, tokens):
        if seen[0][-1][0] != rows:
            raise RuntimeError("the number of rows has changed on the way")

    model = replace(llama[0], sharing=None)
    with watched(model, act) as seen:
        check_sharing(model, llama[1])
    assert model.sharing == (False, True, True, True, True)
