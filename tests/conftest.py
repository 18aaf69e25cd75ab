"""Tiny random models of eight families on disk, and plain transformers with hooks to compare with.

Everything is made here: no test needs a file from outside or a network.
"""

import json
import os
import sys
import weakref
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # before huggingface_hub is imported: a test that asks the hub is a wrong test
os.environ["OMP_NUM_THREADS"] = "1"     # before torch is: the models are tiny, and two workers share the cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import common

MAIN = ["llama", "gpt_neox", "gpt2", "gpt_neo"]
OTHERS = ["mistral", "gemma", "qwen2", "opt"]
SENTENCES = ["Tom found a red ball in the park. Tom felt very happy.", "Lily lost her old cat. Lily felt very sad.",
             "The happy dog ran to the big house and the sad dog sat down.", "Scenario: you see a spider in the house.",
             "The emotion of the above scenario is fear.", "The capital of the old town is a big red house."]
SHAPE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128,
             initializer_range=0.2)     # weights so large that the output really depends on the input
MLP = dict(intermediate_size=64)
GROUPED = dict(num_key_value_heads=2, **MLP)
CONFIGS = {  # class, what differs from SHAPE, path of the blocks, path of the final norm
    "llama": (transformers.LlamaConfig, dict(GROUPED), "model.layers", "model.norm"),
    "gpt_neox": (transformers.GPTNeoXConfig, dict(MLP), "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "gpt2": (transformers.GPT2Config, dict(n_inner=64, tie_word_embeddings=False), "transformer.h", "transformer.ln_f"),
    "gpt_neo": (transformers.GPTNeoConfig, dict(MLP, num_layers=4, attention_types=[[["global", "local"], 2]],
                                                window_size=8, tie_word_embeddings=False), "transformer.h",
                "transformer.ln_f"),
    "mistral": (transformers.MistralConfig, dict(GROUPED, sliding_window=16), "model.layers", "model.norm"),
    "gemma": (transformers.GemmaConfig, dict(GROUPED, head_dim=8), "model.layers", "model.norm"),
    "qwen2": (transformers.Qwen2Config, dict(GROUPED), "model.layers", "model.norm"),
    "opt": (transformers.OPTConfig, dict(ffn_dim=64, word_embed_proj_dim=32), "model.decoder.layers",
            "model.decoder.final_layer_norm"),
}


def pytest_configure():
    torch.set_num_threads(1)


def make_tokenizer():
    """Byte-level BPE of some 200 tokens that puts <s> first, as many a tokenizer of the hub does.

    Its alphabet is printable ASCII alone, so that no two tokens decode to the same text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=["Ġ", "Ċ", *map(chr, range(33, 127))]))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
                                                pad_token="<pad>")


def save_model(folder: Path, config_class, seed: int = 0, **settings) -> Path:
    """A random model with its tokenizer in `folder`. Biases and norms are random too: zeros would hide mistakes."""
    tokenizer = make_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}   # not all are in this vocabulary by default
    config = config_class(**{**SHAPE, **special, "vocab_size": len(tokenizer), **settings})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weights in model.parameters():
        if weights.dim() == 1:
            torch.nn.init.normal_(weights, weights.mean().item(), 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Reference:
    """The plain way: transformers with forward hooks, one prompt at a time, nothing padded, nothing cached."""

    def __init__(self, folder: Path, blocks: str, norm: str, dtype=torch.float32):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        self.blocks, self.norm = self.model.get_submodule(blocks), self.model.get_submodule(norm)
        self.head = self.model.get_output_embeddings()

    def _hooked(self, steer: dict, call):
        """call() with steer[k] added to the output of block k; also what each block gave out, forward pass by pass."""
        seen = [[] for _ in self.blocks]

        def hook(k):
            def act(module, inputs, output):
                stream = output[0] if isinstance(output, tuple) else output
                if k in steer:
                    stream = stream + steer[k].to(stream.dtype)
                seen[k].append(stream)
                return (stream, *output[1:]) if isinstance(output, tuple) else stream
            return act
        handles = [block.register_forward_hook(hook(k)) for k, block in enumerate(self.blocks)]
        try:
            with torch.no_grad():
                return call(), seen
        finally:
            for handle in handles:
                handle.remove()

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids

    def states(self, text: str, steer: dict = {}) -> torch.Tensor:
        """[blocks, d] at the last token."""
        _, seen = self._hooked(steer, lambda: self.model(self.ids(text)))
        return torch.stack([passes[0][0, -1] for passes in seen])

    def logits(self, text: str | list[int], steer: dict = {}) -> torch.Tensor:
        """[positions, vocabulary] of a text or of token ids."""
        ids = self.ids(text) if isinstance(text, str) else torch.tensor([text])
        return self._hooked(steer, lambda: self.model(ids))[0].logits[0]

    def next_logits(self, texts: list[str], steer: dict = {}) -> torch.Tensor:
        """[texts, vocabulary] after the last token of each."""
        return torch.stack([self.logits(text, steer)[-1] for text in texts])

    def logprobs(self, ids: list[int], start: int, steer: dict = {}) -> torch.Tensor:
        """Log-probability of each token of ids[start:], given all before it."""
        scores = self.logits(ids, steer)[start - 1:-1].log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]

    def generate(self, text: str, steer: dict = {}, new: int = 8, eos: int = 1) -> tuple[str, list[int]]:
        """The greedy continuation: its text and its tokens."""
        ids = self.ids(text)
        out, _ = self._hooked(steer, lambda: self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos,
            pad_token_id=2))
        new_ids = out[0, ids.shape[1]:].tolist()
        return self.tokenizer.decode(new_ids, skip_special_tokens=True), new_ids


def surroundings(cache: Path) -> dict:
    """The environment of a process: one thread, and a cache of its own."""
    return {**os.environ, "CONTRANS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


class Loads:
    """Stands in for common.load_model: which models were loaded, and how many were alive at once."""

    def __init__(self):
        self.names, self.alive, self.most = [], [], 0
        self.load = getattr(common.load_model, "load", common.load_model)

    def __call__(self, name, *options):
        self.alive = [reference for reference in self.alive if reference() is not None]
        model = self.load(name, *options)
        self.names.append(name)
        self.alive.append(weakref.ref(model._module))
        self.most = max(self.most, len(self.alive))
        return model


def json_rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Hidden states of the tests go to a folder of their own."""
    common.CACHE = tmp_path_factory.mktemp("cache")
    return common.CACHE


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """zoo(family) -> (model by common.load_model, Reference); each family is made once."""
    made = {}

    def get(family: str):
        if family not in made:
            config_class, settings, *paths = CONFIGS[family]
            folder = save_model(tmp_path_factory.mktemp("zoo") / family, config_class, **settings)
            made[family] = common.load_model(str(folder), device="cpu"), Reference(folder, *paths)
        return made[family]
    return get


@pytest.fixture(params=MAIN)
def pair(request, zoo):
    """(model, Reference) of each of the four main families."""
    return zoo(request.param)


@pytest.fixture(params=MAIN + OTHERS)
def any_pair(request, zoo):
    """(model, Reference) of all eight families."""
    return zoo(request.param)


@pytest.fixture
def llama(zoo):
    """(model, Reference) of one family, where the family does not matter."""
    return zoo("llama")
