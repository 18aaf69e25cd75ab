"""Tiny random models of eight families on disk, and plain transformers with hooks to compare with.

Everything is made here: no test needs a file from outside or a network.
"""

import json
import math
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may ask the hub
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is: two workers share the cores

import harness
from models import load_model

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[1]
AUTO = transformers.AutoModelForCausalLM


def slow(value):
    """A parameter whose test takes long."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy data, less of them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("emotions", "text", "toxigen", "truthfulqa", "wikisplit", "world_facts"):
        shutil.copytree(ROOT / "data" / "toy" / name, folder / name)
    for kind, count in {"toxigen": 12, "text": 60, "wikisplit": 400}.items():
        for path in (folder / kind).iterdir():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:count]))
    path = folder / "truthfulqa" / "mc_task.json"
    path.write_text(json.dumps(harness.read_json(path)[:24]))
    return folder


MAIN = ["llama", "gpt_neox", "gpt2", "gpt_neo"]
OTHERS = ["mistral", "gemma", "qwen2", "opt"]
SENTENCES = [
    "Tom found a red ball in the park. Tom felt very happy.",
    "Lily lost her old cat. Lily felt very sad.",
    "The happy dog ran to the big house and the sad dog sat down.",
    "Scenario: you see a spider in the house.",
    "The emotion of the above scenario is fear.",
    "The capital of the old town is a big red house.",
]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that the output really depends on the input
}
MLP = {"intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2, **MLP}
UNTIED = {"tie_word_embeddings": False}
LOCAL = {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4}
LLAMA_PATHS = ("model.layers", "model.norm")
GPT_PATHS = ("transformer.h", "transformer.ln_f")
NEOX_PATHS = ("gpt_neox.layers", "gpt_neox.final_layer_norm")
OPT_PATHS = ("model.decoder.layers", "model.decoder.final_layer_norm")
WINDOW = {"sliding_window": 16}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
CONFIGS = {  # class, what differs from SHAPE, path of the blocks, path of the final norm
    "llama": (transformers.LlamaConfig, GROUPED, *LLAMA_PATHS),
    "gpt_neox": (transformers.GPTNeoXConfig, MLP, *NEOX_PATHS),
    "gpt2": (transformers.GPT2Config, UNTIED | {"n_inner": 64}, *GPT_PATHS),
    "gpt_neo": (transformers.GPTNeoConfig, MLP | UNTIED | LOCAL, *GPT_PATHS),
    "mistral": (transformers.MistralConfig, GROUPED | WINDOW, *LLAMA_PATHS),
    "gemma": (transformers.GemmaConfig, GROUPED | {"head_dim": 8}, *LLAMA_PATHS),
    "qwen2": (transformers.Qwen2Config, GROUPED, *LLAMA_PATHS),
    "opt": (transformers.OPTConfig, OPT, *OPT_PATHS),
}


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_results" not in item.nodeid)  # the longest tests start first


def make_tokenizer():
    """Byte-level BPE of some 200 tokens that puts <s> first, as many a tokenizer of the hub does.

    Its alphabet is printable ASCII, so that no two tokens decode to the same text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=250,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
        initial_alphabet=["Ġ", "Ċ", *map(chr, range(33, 127))],
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    first = {"single": "<s> $A", "special_tokens": [("<s>", 0)]}
    bpe.post_processor = processors.TemplateProcessing(**first)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def save_model(folder, config_class, seed=0, tokenizer=None, **settings):
    """A random model with its tokenizer in `folder`."""
    tokenizer = tokenizer or make_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = config_class(**{**SHAPE, **special, "vocab_size": len(tokenizer), **settings})
    return save_random(folder, config, tokenizer, seed)


def save_random(folder, config, tokenizer, seed, auto=AUTO):
    """Biases and norms are random too."""
    torch.manual_seed(seed)
    model = auto.from_config(config)
    for weights in model.parameters():
        if weights.dim() == 1:
            torch.nn.init.normal_(weights, weights.mean().item(), 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Reference:
    """Plain transformers with forward hooks: one prompt at a time, no padding, no cache.

    Its weights never change, so logits and greedy tokens are remembered from test to test."""

    def __init__(self, folder, blocks, norm="", dtype=torch.float32, auto=AUTO):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = auto.from_pretrained(folder, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.blocks = model.get_submodule(blocks)
        self.norm = model.get_submodule(norm)
        self.head = model.get_output_embeddings()
        self.known: dict[str, torch.Tensor | list[int]] = {}

    def remembered(self, ids, steer, eos, compute):
        shifts = [(block, *shift.tolist()) for block, shift in steer.items()]
        key = str([ids.tolist(), shifts, eos])
        if key not in self.known:
            self.known[key], _ = self.hooked(steer, compute)
        return self.known[key]

    def hooked(self, steer, call):
        """call() with steer[k] added to the output of block k, and what each block gave out."""
        seen = [[] for _ in self.blocks]

        def hook(k):
            def act(module, inputs, output):
                stream = output[0] if isinstance(output, tuple) else output
                if k in steer:
                    stream = stream + steer[k].to(stream.dtype)
                seen[k].append(stream)
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            return act

        handles = []
        for k, block in enumerate(self.blocks):
            handles.append(block.register_forward_hook(hook(k)))
        try:
            with torch.no_grad():
                return call(), seen
        finally:
            for handle in handles:
                handle.remove()

    def ids(self, text):
        return self.tokenizer(text, return_tensors="pt").input_ids

    def states(self, texts, steer={}):
        """[texts, blocks, d] at the last token of each."""
        rows = []
        for text in texts:
            _, seen = self.hooked(steer, lambda: self.model(input_ids=self.ids(text)))
            rows.append(torch.stack([passes[0][0, -1] for passes in seen]))
        return torch.stack(rows)

    def logits(self, text, steer={}):
        """[positions, vocabulary] of a text or of token ids."""
        ids = self.ids(text) if isinstance(text, str) else torch.tensor([text])
        return self.remembered(ids, steer, None, lambda: self.model(input_ids=ids).logits[0])

    def next_logits(self, texts, steer={}):
        """[texts, vocabulary] after the last token of each."""
        return torch.stack([self.logits(text, steer)[-1] for text in texts])

    def logprobs(self, ids, start, steer={}):
        """Log-probability of each token of ids[start:], given all before it."""
        scores = self.logits(ids, steer)[start - 1 : -1].log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]

    def score_pairs(self, pairs, steer={}, logits_of=None):
        """Log-probability of each continuation, and whether it is greedy.

        logits_of(ids): others than the model's own."""
        sums, greedy = [], []
        for context, text in pairs:
            start = len(self.tokenizer(context).input_ids)
            ids = self.tokenizer(context + text).input_ids
            tokens = torch.tensor(ids[start:])
            logits = logits_of(ids) if logits_of else self.logits(ids, steer)
            logits = logits[start - 1 : -1]
            logprobs = logits.log_softmax(-1)
            sums.append(logprobs.gather(1, tokens[:, None]).sum())
            greedy.append(torch.equal(logits.argmax(-1), tokens))
        return torch.stack(sums), greedy

    def new_tokens(self, text, steer={}, eos=1):
        """The greedy continuation of at most 8 tokens."""
        ids = self.ids(text)
        options = {
            "max_new_tokens": 8,
            "eos_token_id": eos,
            "pad_token_id": 2,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
        }

        def continued():
            return self.model.generate(ids, **options)[0, ids.shape[1] :].tolist()

        return self.remembered(ids, steer, eos, continued)

    def generate(self, texts, steer={}, eos=1):
        rows = [self.new_tokens(text, steer, eos) for text in texts]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def edit_json(path, **changes):
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = value
        if value is None:
            del content[name]
    path.write_text(json.dumps(content))


def eft_logits(references, ids, shifts):
    """target + chat - base [positions, vocabulary]; the target alone is steered."""
    target, chat, base = references
    size = len(target.tokenizer)  # without rows of padding
    logits = target.logits(ids, shifts)[:, :size]
    return logits + chat.logits(ids)[:, :size] - base.logits(ids)[:, :size]


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def vectors(count, width=32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain_module(part):
    """The torch module of a model, or of what nnsight calls one of its parts."""
    return getattr(part, "nn", part)._module


def surroundings(cache):
    """The environment of a process: one thread, and a cache of its own."""
    return {**os.environ, "CONTRANS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def real_models():
    """(folder of stories3M and neo3M-chat, the paper's data), or the test is skipped."""
    models = Path(os.environ.get("CONTRANS_MODELS", ROOT / "models"))
    data = Path(os.environ.get("CONTRANS_PAPER_DATA", ROOT / "data" / "paper"))
    folders = [models / "stories3M", models / "neo3M-chat", data / "wikisplit"]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("no real models: set CONTRANS_MODELS and CONTRANS_PAPER_DATA")
    return models, data


def json_rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same_records(one, other):
    """Two runs wrote the same: numbers to 1e-5, the run's id aside."""

    def same_cell(first, second):
        try:
            return math.isclose(float(first), float(second), rel_tol=1e-5, abs_tol=1e-5)
        except ValueError:
            return first == second

    assert len(one) == len(other) > 10
    for mine, theirs in zip(one, other):
        differ = {name for name in mine if not same_cell(mine[name], theirs[name])}
        assert differ <= {"run"}, (mine, theirs)


@pytest.fixture
def one_line(capsys):
    """one_line(call, word, …) -> the line in which call() ends the program, exit code 2."""

    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert all(word in said for word in words), said
        return said

    return check


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Hidden states of the tests go to a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CONTRANS_CACHE"] = harness.CACHE["folder"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """zoo(family) -> (model by load_model, Reference); each family is made once."""
    made = {}

    def get(family):
        if family not in made:
            config_class, settings, *paths = CONFIGS[family]
            folder = save_model(tmp_path_factory.mktemp("zoo") / family, config_class, **settings)
            model = load_model(str(folder), device="cpu")
            made[family] = model, Reference(folder, *paths)
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


@pytest.fixture
def model(llama):
    return llama[0]
