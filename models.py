"""The models of a run: loading, what is known of them before that, and what they cost.

1  Loading         any causal LM from the hub or a folder, with one path to its blocks
2  Models          of a run, by name: config, tokenizer and chat template first, weights later
3  Tokens          contexts, the space before a word, labels, padding
4  Cost            what a dry run counts, without weights
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import BATCH_TOKENS, fail
from report import markdown

import numpy as np
import torch

# ================================================================ 1  Loading

# One path to blocks, final norm and unembedding on every architecture; nnsight skips the others.
PATHS = {
    "model.layers": "layers",
    "model.language_model.layers": "layers",  # of models that also see or hear
    "model.text_model.layers": "layers",
    "language_model.model.layers": "layers",
    "model.decoder.layers": "layers",
    "gpt_neox.layers": "layers",
    "gpt_neox_japanese.layers": "layers",
    "transformer.h": "layers",
    "transformer.blocks": "layers",
    "biogpt.layers": "layers",
    "backbone.layers": "layers",
    "rwkv.blocks": "layers",
    "model.norm": "final_norm",
    "model.language_model.norm": "final_norm",
    "model.text_model.norm": "final_norm",
    "language_model.model.norm": "final_norm",
    "model.final_norm": "final_norm",
    "model.final_layernorm": "final_norm",
    "model.embedding_norm": "final_norm",
    "model.language_model.embedding_norm": "final_norm",
    "model.layer_norm": "final_norm",
    "model.norm_f": "final_norm",
    "model.decoder.layer_norm": "final_norm",
    "model.decoder.final_layer_norm": "final_norm",
    "gpt_neox.final_layer_norm": "final_norm",
    "gpt_neox_japanese.final_layer_norm": "final_norm",
    "transformer.ln_f": "final_norm",
    "transformer.norm_f": "final_norm",
    "transformer.layernorm": "final_norm",
    "biogpt.layer_norm": "final_norm",
    "backbone.norm_f": "final_norm",
    "rwkv.ln_out": "final_norm",
    "lm_head": "unembed",
    "language_model.lm_head": "unembed",
    "embed_out": "unembed",
    "output_projection": "unembed",
    "head": "unembed",
}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
DTYPES = ["float32", "bfloat16", "float16", *QUANTIZED]
DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%A": "Friday"}
CLOCK = "".join(f"|replace('{code}', '{text}')" for code, text in DATE.items())
CLOCK = "{% macro strftime_now(format) %}{{ format" + CLOCK + " }}{% endmacro %}"  # of templates


@dataclass
class Model:
    """A causal LM: the nnsight model, and what common.py needs to know about it."""

    name: str
    nn: Any  # nnsight's TransformersModel, with .layers, .final_norm and .unembed
    fingerprint: str
    precision: str  # "torch.float32", "nf4" …
    remote: str | None  # address of the NDIF server that runs it
    batch_tokens: int  # tokens computed in one forward pass
    sharing: tuple[bool, ...] | None = None  # see _sharing
    cost: Cost | None = None  # of a model without weights

    @property
    def tokenizer(self):
        return self.nn.tokenizer

    @property
    def config(self):
        return self.nn.config.get_text_config(decoder=True)  # of a model that also sees, its text's

    @property
    def n_layers(self) -> int:
        return len(self.nn.layers)

    @property
    def device(self) -> torch.device:
        return self.nn._module.device


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    remote: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> Model:
    """Load a causal LM, or the text part of a multimodal model.

    name: hub id or folder; `REPO@REVISION` picks a revision. dtype: "auto" is float32 on a CPU and
    bfloat16 on a GPU; "nf4" and "int8" quantize the weights. device: "auto" spreads the model over
    all GPUs. remote: address of an NDIF server that runs the model, so that no weights are loaded
    here. batch_tokens: tokens of one forward pass; lower it when memory runs out. dry_run: load no
    weights, only count the work in `cost`. Raises ValueError for an unknown dtype or device,
    incomplete weights, and blocks that are not found (it names the module lists)."""
    from nnsight.modeling.transformers import TransformersModel
    from transformers.utils import logging

    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown: auto, {', '.join(DTYPES)}")
    _require_device(device)
    repo, revision = split_revision(name)
    is_elsewhere = remote or dry_run
    on_gpu = device != "cpu" and torch.cuda.is_available()
    torch_dtype = torch.bfloat16 if on_gpu else torch.float32
    if dtype in ("float32", "bfloat16", "float16"):
        torch_dtype = getattr(torch, dtype)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = {"task": "text-generation", "rename": PATHS, "tokenizer": _read_tokenizer(repo, hub)}
    if is_elsewhere:
        settings |= {"trust_remote_code": True} if trust_remote_code else {}
        nn = TransformersModel(repo, revision=revision, **settings)
    else:
        module = _load_weights(repo, hub, dtype, torch_dtype, device, allow_pickle)
        if not getattr(module, "hf_device_map", None):  # else accelerate has placed it
            settings["device"] = module.device
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # a model that also sees is not on a list there
        nn = TransformersModel(module, **settings)
        logging.set_verbosity(before)
    _require_known_paths(name, nn)
    nn._module.requires_grad_(False).eval()
    ignores_padding = is_elsewhere or _check_forward(name, nn)
    if not ignores_padding:
        print(f"{name} does not ignore padding: computed one text at a time")
        batch_tokens = 1
    return Model(
        name=str(name),
        nn=nn,
        fingerprint=_fingerprint(name),
        precision=dtype if dtype in QUANTIZED else str(torch_dtype),
        remote=remote,
        batch_tokens=batch_tokens,
        cost=_cost(nn, dtype) if dry_run else None,
    )


def _require_device(device: str) -> None:
    if device == "auto":
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: auto, cpu, cuda, cuda:1 …") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch finds no GPU here; use device='cpu'")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch finds {torch.cuda.device_count()} GPUs here")


def _read_tokenizer(repo: str, hub: dict):
    """The tokenizer, without EOS after a text: the last token is read, or continued."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repo, **hub)
    ids = tokenizer("a").input_ids
    if tokenizer.is_fast and ids and ids[-1] == tokenizer.eos_token_id:
        starts = ids[0] == tokenizer.bos_token_id
        bos = [(tokenizer.bos_token, tokenizer.bos_token_id)] if starts else []
        text = f"{tokenizer.bos_token} $A" if starts else "$A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=text, special_tokens=bos
        )
    if tokenizer.pad_token is None:  # padded positions are masked, so any token will do
        first = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or first
    return tokenizer


def _load_weights(repo: str, hub: dict, dtype: str, torch_dtype, device: str, allow_pickle: bool):
    """The transformers model; raises ValueError if tensors are missing from its files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one for every file hides the table
    everywhere = "auto" if device != "cpu" and torch.cuda.is_available() else "cpu"
    options = {"dtype": torch_dtype, "device_map": everywhere if device == "auto" else device}
    if not allow_pickle:
        options["use_safetensors"] = True
    if dtype in QUANTIZED:
        settings = QUANTIZED[dtype] | {"bnb_4bit_compute_dtype": torch_dtype}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**settings)
    config = transformers.AutoConfig.from_pretrained(repo, **hub)
    auto_class = transformers.AutoModelForCausalLM
    is_text = config.get_text_config(decoder=True) is config
    is_text = is_text and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_text and type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING:
        auto_class = transformers.AutoModelForMultimodalLM
    module, report = auto_class.from_pretrained(repo, output_loading_info=True, **hub, **options)
    absent = sorted(report["missing_keys"])  # without those that are tied to others
    if absent:
        raise ValueError(f"its files lack {len(absent)} of its tensors, such as {absent[0]}")
    return module


def _check_forward(name: str, nn) -> bool:
    """Refuse what is no causal LM with one residual stream (ValueError), tested on a few tokens.

    Returns whether left padding is ignored: some recurrent models read it."""
    row, found = [5, 6, 7], []
    longer, longest = [*row, 8], [3, 4, *row, 8]
    for rows in ([row], [longer], [longest, row]):
        inputs = pad_left(rows, nn.tokenizer.pad_token_id)
        try:
            with torch.no_grad():
                with nn.trace(inputs, use_cache=False):
                    streams = [residual_stream(block.output).cpu() for block in nn.layers]
                    streams = torch.stack(streams).save()
                    logits = nn.output.logits[-1].float().save()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model lacks
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{name} does not run on text alone: {reason}") from error
        width = nn.config.get_text_config(decoder=True).hidden_size
        shape = [*inputs["input_ids"].shape, width]
        got = list(streams.shape[1:])
        if got != shape:
            raise ValueError(f"{name}: its blocks give {got} and not one residual stream {shape}")
        found.append(logits)
    alone, followed, padded = found[0][2], found[1][2], found[2][-1]
    tolerance = alone.std() * (1e-3 if nn.dtype == torch.float32 else 0.1)
    if (followed - alone).abs().max() > tolerance:
        raise ValueError(f"{name} is no causal LM: a token sees those that follow it")
    return bool((padded - alone).abs().max() <= tolerance)


def _bytes_on_disk(name: str) -> float:
    """An upper bound of what the weights in a folder take in memory; infinite for a hub id."""
    size = 0
    for path in Path(name).glob("*"):
        if path.suffix in (".safetensors", ".bin"):
            size += path.stat().st_size
    return 2 * size or math.inf  # twice: float32 of float16


def _bytes_in_memory(model: Model) -> float:
    is_here = not (model.remote or model.cost)
    return model.nn._module.get_memory_footprint() if is_here else 0


def _require_known_paths(name: str, nn) -> None:
    kind = type(nn._module).__name__
    if not all(hasattr(nn, part) for part in ("layers", "final_norm", "unembed")):
        modules = nn._module.named_modules()
        lists = [path for path, module in modules if isinstance(module, torch.nn.ModuleList)]
        raise ValueError(
            f"{name}: blocks, final norm or unembedding of {kind} are not found; "
            f"its module lists are {', '.join(lists) or '(none)'}: add the right paths to PATHS"
        )
    n_layers = nn.config.get_text_config(decoder=True).num_hidden_layers
    if len(nn.layers) != n_layers:
        raise ValueError(f"{name}: {kind} has {len(nn.layers)} blocks, its config says {n_layers}")


def residual_stream(output):
    """The residual stream in a block's output: a tensor, or (GPT-Neo) the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


# ================================================================ 2  Models


class Models:
    """The models of a run by name: config and tokenizer first, weights when they are needed.

    What cannot be read or loaded ends the program with one line."""

    def __init__(
        self, remote=(), host=None, allow_pickle=False, trust_remote_code=False, **loading
    ):
        try:
            _require_device(loading.get("device", "auto"))
        except ValueError as error:
            fail(f"--device: {error}")
        self.remote, self.host = set(remote), host  # names of the models that NDIF runs
        self.allow_pickle, self.trust_remote_code = allow_pickle, trust_remote_code
        self.loading = loading  # dtype, device, batch_tokens, dry_run
        self.loaded: dict[str, Model] = {}  # the one used last comes last
        self.sizes: dict[str, float] = {}  # of weights that were ever in memory [bytes]
        self.known: dict[str, tuple] = {}
        self.vocabularies: dict[str, str] = {}  # see vocabulary

    def load(self, name: str, keep: tuple[str, ...] = ()) -> Model:
        """The model, from memory if it is still there.

        Others stay in memory while all weights take less than half of it; those in `keep` always
        do. What is new from the hub has no known size, and shares the memory with `keep` alone."""
        if name not in self.loaded:
            size = 0 if name in self.remote else self.sizes.get(name) or _bytes_on_disk(name)
            total = size + sum(map(self.sizes.get, self.loaded))
            kept = list(self.loaded)
            for other in self.loaded:  # the one used longest ago goes first
                if total > self.room and other not in keep:
                    total -= self.sizes[other]
                    kept.remove(other)
            self.release(kept)
            _freeze_imports()
            self.loaded[name] = self._load(name)
            self.sizes[name] = _bytes_in_memory(self.loaded[name])
        self.loaded[name] = self.loaded.pop(name)
        return self.loaded[name]

    @functools.cached_property
    def room(self) -> float:
        """Half of the memory of the GPUs, or of this machine or container [bytes]."""
        import psutil

        if self.loading.get("device") != "cpu" and torch.cuda.is_available():
            gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            return sum(gpu.total_memory for gpu in gpus) / 2
        container = Path("/sys/fs/cgroup/memory.max")
        limit = container.read_text().strip() if container.exists() else "max"
        total = psutil.virtual_memory().total
        return (total if limit == "max" else min(total, int(limit))) / 2

    def release(self, keep=()) -> None:
        """Let go of the loaded models."""
        if self.loading.get("dry_run"):  # they take no memory, and know what they cost
            return
        done = [name for name in self.loaded if name not in keep]
        for name in done:
            del self.loaded[name]
        if done:
            gc.collect()  # models contain reference cycles: free them before loading the next

    def _load(self, name: str) -> Model:
        from safetensors import SafetensorError

        try:
            return load_model(
                name,
                remote=self.host if name in self.remote else None,
                allow_pickle=self.allow_pickle,
                trust_remote_code=self.trust_remote_code,
                **self.loading,
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            text = str(error).strip() or type(error).__name__
            reason = text.splitlines()[-1]  # the lines above it are a traceback
            fail(f"cannot load model {name}: {reason}")

    def costs(self) -> str:
        """What a dry run has counted, as a Markdown table."""
        rows = []
        for name, model in self.loaded.items():
            cost = model.cost
            hours = math.ceil(cost.size / H100_MEMORY) * cost.flops / H100_FLOPS / 3600
            work = cost.tokens, cost.flops / 1e12, hours, cost.requests
            rows.append([name, cost.size / 2**30, *work])
        _, *columns = zip(*rows)
        rows.append(["total", *map(sum, columns)])
        form = "{}|{:,.1f}|{:,.0f}|{:,.4f}|{:,.3f}|{}"
        cells = [form.format(*row).split("|") for row in rows]
        header = ["", "weights [GiB]", "tokens", "TFLOP", "GPU hours", "NDIF requests"]
        return f"{markdown(header, cells)}\n\n{ASSUMED}"

    def config(self, name: str):
        return self._read(name)[0]

    def tokenizer(self, name: str):
        return self._read(name)[1]

    def fingerprint(self, name: str) -> str:
        return _fingerprint(name)

    def n_layers(self, name: str) -> int:
        return self.config(name).num_hidden_layers

    def block(self, name: str, layer: str, side: int = 0) -> int:
        """The 0-based block that --layer means in this model; side 0 is the source, 1 the target.

        A number with a point is a fraction of the depth, rounded down: 0.75 of 40 blocks is block
        30."""
        n_layers = self.n_layers(name)
        value = layer.split(",")[min(side, layer.count(","))]
        try:
            block = int(float(value) * n_layers + 1e-9) if "." in value else int(value)
        except (ValueError, OverflowError):
            fail(f"--layer {layer}: block {value} does not exist; give an index or a fraction")
        if not 0 <= block < n_layers:
            fail(f"--layer {layer}: block {block} does not exist in {name} (0 to {n_layers - 1})")
        return block

    def lengths(self, name: str, texts: list[str]) -> list[int]:
        """Tokens of each text, special tokens included."""
        if not texts:
            return []
        return [len(ids) for ids in self.tokenizer(name)(texts, verbose=False).input_ids]

    def fits(self, name: str, texts: list[str], new_tokens: int = 0) -> np.ndarray:
        """Which texts, followed by `new_tokens`, fit the context of the model [n]."""
        room = context_length(self.config(name)) - new_tokens
        # ASCII has no more tokens than characters, but for the special ones: most texts are short.
        short = [text.isascii() and text.strip() != "" and len(text) + 16 <= room for text in texts]
        fit = np.array(short, bool)
        others = list(itertools.compress(texts, ~fit))
        lengths = np.array(self.lengths(name, others))
        fit[~fit] = (lengths > 0) & (lengths <= room)
        return fit

    def require_fit(
        self, name: str, texts: list[str], new_tokens: int = 0, advice: str = ""
    ) -> None:
        """End the program if a prompt does not fit the context of the model."""
        limit = context_length(self.config(name))
        longest = max(self.lengths(name, texts))
        if longest + new_tokens > limit:
            fail(
                f"a prompt of {longest} tokens does not fit the context of {name} ({limit}){advice}"
            )

    def require_labels(self, name: str, prompt: str, labels: list[str]) -> None:
        """End the program if the labels cannot be told apart by their tokens after the prompt."""
        try:
            label_tokens(self.tokenizer(name), prompt, labels)
        except ValueError as error:
            fail(f"{name}: {error}; give others with --labels")

    def chat_prompt(self, name: str, text: str) -> str:
        """A user's message in the chat template of a model, up to where the answer begins.

        Thinking is switched off, and a thought that the template itself opens is closed. Templates
        that print the date get a fixed one, so that a run can be repeated. BOS is left out if the
        tokenizer adds it anyway."""
        import jinja2

        tokenizer = self.tokenizer(name)
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
                chat_template=CLOCK + tokenizer.get_chat_template(),
            )
        except (jinja2.TemplateError, ValueError) as error:
            fail(f"the chat template of {name} cannot be used: {error}")
        if prompt.rstrip().endswith("<think>"):
            prompt = prompt.rstrip() + "\n\n</think>\n\n"
        if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
            prompt = prompt.removeprefix(tokenizer.bos_token)
        return prompt

    def same_vocabulary(self, *names: str) -> bool:
        return len({self.vocabulary(name) for name in names}) == 1

    def vocabulary(self, name: str) -> str:
        """The first model asked for that has the vocabulary of this one."""
        if name not in self.vocabularies:
            own = self.tokenizer(name).get_vocab()
            alike = set(self.vocabularies.values())
            same = [other for other in alike if self.tokenizer(other).get_vocab() == own]
            self.vocabularies[name] = same[0] if same else name
        return self.vocabularies[name]

    def same_shape(self, one: str, other: str) -> bool:
        """Whether a vector of one model can be added to the other as it is."""
        first, second = self.config(one), self.config(other)
        same_width = first.hidden_size == second.hidden_size
        return same_width and first.num_hidden_layers == second.num_hidden_layers

    def require_same_shape(self, one: str, other: str) -> None:
        """End the program unless same_shape."""
        if not self.same_shape(one, other):
            fail(f"{one} and {other} differ in width or depth")

    def _read(self, name: str) -> tuple:
        if name not in self.known:
            if not Path(split_revision(name)[0]).is_dir():
                _require_hub_or_cache()
            local = name not in self.remote
            if local and not self.allow_pickle:
                _require_safetensors(name)
            self.known[name] = _model_config(name, self.trust_remote_code)
        return self.known[name]


@functools.cache
def _freeze_imports() -> None:
    """What was imported need not be searched for cycles whenever a model is released."""
    gc.freeze()


@functools.cache  # a large tokenizer takes a second to read
def _model_config(name: str, trust_remote_code: bool = False) -> tuple:
    """(config, tokenizer) of a model; ends the program with one line if they cannot be read."""
    from transformers import AutoConfig

    repo, revision = split_revision(name)
    is_folder = Path(repo).is_dir()
    if not is_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        fail(f"no model folder {repo}")
    if is_folder and not (Path(repo) / "config.json").exists():
        fail(f"{repo} is not a model folder: it has no config.json")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(repo, **options).get_text_config(decoder=True)
        return config, _read_tokenizer(repo, options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "gated" in str(error) or "401" in str(error):
            reason = f"accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with Python code; read it, and add --trust-remote-code if you trust it"
            )
        fail(f"cannot read model {name}: {reason}")


def split_revision(name: str) -> tuple[str, str | None]:
    """(repository or folder, revision) of a model's name."""
    if Path(name).is_dir():  # the path of a folder may contain an @
        return str(name), None
    repo, _, revision = str(name).partition("@")
    return repo, revision or None


def _require_safetensors(name: str) -> None:
    """End the program if the weights are pickles, which can run any code."""
    repo, revision = split_revision(name)
    advice = "they are pickles, which can run any code; add --allow-pickle if you trust them"
    folder = Path(repo)
    if folder.is_dir():
        has_config = (folder / "config.json").exists()
        if any(folder.glob("*.safetensors")) or not has_config:
            return
        if any(folder.glob("*.bin")):
            fail(f"the weights of {repo} are not safetensors: {advice}")
        fail(f"{repo} is not a model folder: it has no *.safetensors")
    from huggingface_hub import file_exists

    try:
        names = ("model.safetensors", "model.safetensors.index.json")
        found = [file_exists(repo, file, revision=revision) for file in names]
    except Exception:  # no network, or a refusal that reading the config explains
        return
    if not any(found):
        fail(f"the weights of {repo} are not safetensors: {advice}")


@functools.cache
def _require_hub_or_cache() -> None:
    """Without a network, use the hub's cache alone: else each request is retried for 30 seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever client huggingface_hub has; any answer is an answer
        print(f"no answer from {constants.ENDPOINT} ({error}): models from the hub's cache alone")
        constants.HF_HUB_OFFLINE = True


def _fingerprint(name: str) -> str:
    """The identity of a model: hub id and commit, or a hash of the folder's files."""
    repo, revision = split_revision(name)
    if not Path(repo).is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(repo, "config.json", revision=revision or "main")
        commit = Path(config).parent.name if isinstance(config, str) else revision or "main"
        return f"{repo}@{commit}"
    digest = hashlib.sha256()
    suffixes = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}
    for path in sorted(Path(repo).glob("*")):
        if path.suffix not in suffixes or path.stem.startswith("train"):  # notes on its training
            continue
        stat = path.stat()
        if stat.st_size < 2**28:
            content = path.read_bytes()
        else:  # hashing tens of gigabytes would take longer than the experiment
            content = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(path.name.encode() + b"\0" + content)
    return f"sha256:{digest.hexdigest()[:16]}"


# ================================================================ 3  Tokens


def context_length(config) -> int:
    """Positions that the model was made for [tokens]."""
    length = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    return length or sys.maxsize


def spaced(text: str, after: str) -> str:
    """A continuation with a blank before it, unless the prompt ends in white space."""
    return text if after[-1:].isspace() else f" {text}"


def encode_pairs(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its continuation, tokenized together; no ids for a
    continuation that changes the tokens of its prompt.

    Most tokenizers put the space between them before a word. Where it ends the previous word
    ("Tom▁"), it ends the prompt, too."""
    texts: dict[str, None] = {}  # each once
    for prompt, text in pairs:
        texts |= dict.fromkeys([prompt, prompt + text])
    ids = dict(zip(texts, tokenizer(list(texts), verbose=False).input_ids))
    encoded = []
    for prompt, text in pairs:
        head, whole = ids[prompt], ids[prompt + text]
        if text.startswith(" ") and whole[: len(head)] != head:
            with_space = tokenizer(f"{prompt} ", verbose=False).input_ids
            if whole[: len(with_space)] == with_space:
                head = with_space
        tail = whole[len(head) :] if whole[: len(head)] == head else []
        encoded.append((head, tail))
    return encoded


def label_tokens(tokenizer, prompt: str, labels: list[str]) -> list[list[int]]:
    """The first tokens of each label after the prompt: as many as tell them apart, usually one."""
    encoded = encode_pairs(tokenizer, [(prompt, spaced(label, prompt)) for label in labels])
    start, _ = encoded[0]
    if any(head != start or not word for head, word in encoded):
        raise ValueError("a label changes the tokens of the prompt before it")
    words = [word for _, word in encoded]
    for size in range(1, max(map(len, words)) + 1):
        firsts = [tuple(word[:size]) for word in words]
        starts_another = any(
            len(first) < size and other[: len(first)] == first and other != first
            for first in firsts
            for other in firsts
        )
        if len(set(firsts)) == len(words) and not starts_another:
            return [list(first) for first in firsts]
    raise ValueError(f"the labels {', '.join(labels)} cannot be told apart by their tokens")


def pad_left(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Left-padded ids, mask and positions [rows, width]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


# ================================================================ 4  Cost

NARROW = 16  # width of states, and number of logits, in a dry run
H100_FLOPS = 0.4 * 990e12  # a second
H100_MEMORY = 72e9  # bytes for weights
WEIGHT_BYTES = {"float32": 4, "int8": 1, "nf4": 0.5}  # else 2
KEYS = r"(^|\.)(q|k|v|kv|qkv|Wqkv|query|key|value|c_attn)[._]"  # names of their weights
ASSUMED = """Counted, not computed: no weights were loaded, nothing was written. A token that goes
through half of the blocks counts as half. GPU hours: of as many H100 (or NDIF's) as hold the
weights, at 40 % of 990 TFLOP/s, one after the other. Assumed: generated texts have their maximal
length, no strength is ruled out by its perplexity, and all sharing works (docs/models.md lists
exceptions). Left out: loading, fits on the CPU, classifiers."""


@dataclass
class Cost:
    """What a model would compute."""

    blocks: list[int]  # weights of each block that a token is multiplied with
    keys: int  # of these, what makes queries, keys and values in the last block
    unembed: int  # weights of the unembedding
    width: int  # of the residual stream
    size: float  # of all weights [bytes]
    tokens: float = 0.0  # through all blocks
    flops: float = 0.0
    requests: int = 0  # to NDIF
    generator: torch.Generator = field(default_factory=torch.Generator)

    def add(self, tokens: int, context: float, weights: list[int], logits: int = 0) -> None:
        """Count tokens that go through blocks of these weights, each beside `context` tokens, and
        states that go through the unembedding."""
        attention = 2 * context * self.width * len(weights)
        self.tokens += tokens * sum(weights) / sum(self.blocks)
        self.flops += 2 * (tokens * (sum(weights) + attention) + logits * self.unembed)

    def add_pass(self, rows: list, past: int, shifts: dict, copies: int, logits: int) -> None:
        """Count what _forward does; rows: tokens of each row after `past` tokens of a prefix."""
        tokens, context = len(rows) * max(rows), past + max(rows)
        parting = min(shifts, default=-1) + 1
        *blocks, last_block = self.blocks
        self.add(tokens, context, blocks[:parting])
        self.add(copies * tokens, context, blocks[parting:], copies * logits)
        times = copies if parting < len(self.blocks) else 1
        if logits == len(rows):  # keys of all tokens, and then one token of each row
            self.add(times * tokens, 0, [self.keys])
            tokens = logits
        self.add(times * tokens, context, [last_block])


def _cost(nn, dtype: str) -> Cost:
    """The empty cost of a model without weights, whose states are made narrow."""
    config = nn.config.get_text_config(decoder=True)
    experts = getattr(config, "num_experts_per_tok", None)
    blocks = []
    for block in nn.layers:
        used = keys = 0
        for name, weight in block._module.named_parameters():
            if weight.dim() == 3:  # all experts are one tensor, of which a token sees a few
                weight = weight[:experts]
            if weight.dim() > 1:
                used += weight.numel()
                keys += weight.numel() if re.search(KEYS, name) else 0
        blocks.append(used)
    size = nn._module.num_parameters() * WEIGHT_BYTES.get(dtype, 2)
    cost = Cost(blocks, keys, nn.unembed._module.weight.numel(), config.hidden_size, size)
    config.hidden_size = NARROW
    return cost
