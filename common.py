"""ConTrans (Dong et al.), step by step: what every experiment script needs, in the order of the paper.

    1  Options         of all scripts, and files; bad input ends in one line and exit code 2
    2  Model           any causal LM of the hub or of a folder, as an nnsight model with .layers
    3  Work            in batches, here or on NDIF
    4  Hidden states   last token, output of block k (0-based), float32 on the CPU            Sec. 3
    5  Refine          v = mean(h_pos - h_neg)                                                Eq. 1
    6  Reformulate     v^ = v F,  F = V S^-1 U^T Y                                            Eq. 2, App. A
    7  Transplant      h^k + alpha v^ at every position                                       Eq. 3
    8  Scoring         next token, labels, choices, text, perplexity, logit lens: all under a transplant
    9  Records         run folder, intervals, tables, concept vectors on disk

No plot lives here, and no data set but the plain sentences of the map. Each room uses only rooms above it.
"""

from __future__ import annotations

import argparse
import csv
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm


def _on_first_use(name: str):
    """A module that is loaded when it is first used, so that --help and a mistyped option answer at once."""
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


torch = sys.modules.get("torch") or _on_first_use("torch")

# ================================================================ 1  Options and files

QUANTISED = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}


def fail(message: str):
    """End the program: one line that says what is wrong and what to do, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main) -> None:
    """Run a script's main; Ctrl-C is no error, and numbers that are none end in one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except FloatingPointError as error:
        fail(str(error))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(f"{message} (see python {self.prog} --help)")


def strength(text: str) -> float | str:
    return text if text == "auto" else float(text)


def option_parser(doc: str, families: dict[str, dict]) -> Parser:
    """The options of every script. `families` maps a name to values of src, src_base, tgt, tgt_chat, layer, alpha …"""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=families, help="models and their settings, from the table in the script (default: toy)")
    add("--src", metavar="MODEL", help="source model that the concept is refined from: hub id or folder, REPO@REVISION")
    add("--src-base", metavar="MODEL", help="base model of the source, for the affine map (default: --src)")
    add("--tgt", metavar="MODEL", nargs="+", help="target base models, one table each")
    add("--tgt-chat", metavar="MODEL", nargs="+",
        help="aligned models of the targets' sizes, in the same order; none where there is none")
    add("--layer", metavar="K", help="block to read and to edit: index, fraction of depth, SOURCE,TARGET, or auto")
    add("--alpha", type=strength, nargs="+", metavar="A", help="steering strengths to choose from; auto: the family's")
    add("--norm", choices=["as-is", "match"], default="as-is",
        help="match: rescale v^ to the source's ratio of |v| to the stream's norm")
    add("--refine", choices=["mean", "pca", "probe"], default="mean", help="how v is taken from the pairs (Eq. 1: mean)")
    add("--sentences", type=int, metavar="N", help="plain sentences of one affine map; 80 %% of them fit it (paper: 2000)")
    add("--intercept", action="store_true", help="affine map with an intercept (paper: none)")
    add("--rcond", type=float, default=0.0, help="drop singular values below this share of the largest (paper: 0)")
    add("--ridge", type=float, default=0.0, help="ridge penalty in units of the mean squared singular value (paper: 0)")
    add("--data", type=Path, metavar="FOLDER", help="data folder, e.g. data/paper (default: data/toy)")
    add("--limit", type=int, help="at most so many evaluation items, after a fixed shuffle; -1: all")
    add("--seed", type=int, default=0, help="of shuffles, random directions and sampling")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16", *QUANTISED], default="auto",
        help="auto: float32 on CPU, bfloat16 on GPU; nf4 and int8 need bitsandbytes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …; auto spreads a model over all GPUs")
    add("--remote", nargs="?", const="target", choices=["target", "both"],
        help="run the targets, or both source and targets, on NDIF (key in NDIF_API_KEY)")
    add("--ndif-host", metavar="URL", default=os.environ.get("NDIF_HOST", "https://api.ndif.us"), help="of the NDIF server")
    add("--batch-tokens", type=int, default=16384, help="tokens of one forward pass; lower it when memory runs out")
    add("--out", type=Path, default=Path("results"), metavar="FOLDER", help="where the run folder is made")
    add("--fresh", action="store_true", help="start over instead of continuing the run folder of the same arguments")
    add("--replay", type=Path, metavar="FOLDER", help="take all options from a run folder's args.json; others given here win")
    add("--no-cache", action="store_true", help="neither read nor write the cache (python common.py shows and clears it)")
    add("--allow-pickle", action="store_true", help="load weights that are not safetensors, which can run any code")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    return parser


class Settings:
    """What the command line says of all models."""
    cache, pickle, code, remote = True, False, False, []


def replayed(parser: Parser, argv: list[str]) -> list[str]:
    """The command line of the run that --replay names, followed by this one, whose options win. Paths in it are those of the
    folder where it was given; --fresh is not repeated, which would throw away what is replayed."""
    pre = Parser(prog=parser.prog, add_help=False)          # abbreviations too, as the script's own parser
    pre.add_argument("--replay", type=Path)
    folder = pre.parse_known_args(argv)[0].replay
    if folder is None:
        return argv
    try:
        about = json.loads((folder / "args.json").read_text())
        script, *old = about["command"]
        began = Path(about.get("folder", ""))
        if not all(isinstance(word, str) for word in old):
            raise ValueError("its command is not a list of words")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--replay: cannot read {folder / 'args.json'}: {type(error).__name__} {error}")
    if script != Path(parser.prog).stem:
        fail(f"--replay: {folder} was made by {script}.py, not by {parser.prog}")

    def moved(word: str) -> str:
        there = (began / word).exists() or option == "--out"
        return word if Path(word).is_absolute() or not there else os.path.relpath(began / word)
    # Only where files, folders or models are asked for does a word mean a path.
    paths = [name for action in parser._actions for name in action.option_strings
             if action.type is Path or action.metavar in ("MODEL", "CHAT=BASE", "N|FILE")]
    words, option = [], None
    for word in [word for word in old if word != "--fresh"]:
        if word.startswith("--"):
            word, is_, value = word.partition("=")
            option = next((name for name in paths if name.startswith(word)), None)
            words.append(f"{word}={moved(value) if option else value}" if is_ else word)
        else:
            words.append("=".join(map(moved, word.split("="))) if option else word)
    return [*words, *argv]


def parse_options(parser: Parser, families: dict[str, dict], argv: list[str] | None = None,
                  complete=lambda args: None) -> argparse.Namespace:
    """Parse, fill in the family, and refuse what cannot work; touches no model weights.

    complete(args): what a script derives from its own options (say, --src from --revisions) before the rest is checked."""
    command = replayed(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(command)
    args.command = command
    Settings.cache, Settings.pickle, Settings.code = not args.no_cache, args.allow_pickle, args.trust_remote_code
    complete(args)
    if args.family is None and bool(args.src) != bool(args.tgt):
        fail("--src and --tgt go together (or name a --family that fills in the rest)")
    # Models of one's own take no setting from the toy family: the paper's stand at the top of each table.
    args.family = args.family or ("custom" if args.src else "toy")
    if args.alpha and "auto" in args.alpha:
        if len(args.alpha) > 1:
            fail("--alpha auto stands alone")
        args.alpha = None                       # the family's strengths, as if none had been named
    named = {"src_base"} if args.src else set()             # a model of one's own has no partner in the family's table
    named |= {"tgt_chat"} if args.tgt else set()
    for name, value in families.get(args.family, families["custom"]).items():
        if getattr(args, name, None) is None and name not in named:
            setattr(args, name, value)
    if not (args.src and args.tgt):
        fail(f"--family {args.family} needs --src and --tgt")
    args.src_base = args.src_base or args.src
    args.tgt_chat = [None if name == "none" else name for name in args.tgt_chat or []]
    args.data = args.data or Path(os.path.relpath(Path(__file__).parent / "data" / "toy"))

    if not args.data.is_dir():
        fail(f"no data folder {args.data}; python data/prepare.py makes data/paper, --data data/toy comes with the repo")
    if args.tgt_chat and len(args.tgt_chat) != len(args.tgt):
        fail(f"{len(args.tgt_chat)} --tgt-chat models for {len(args.tgt)} --tgt models: give one each")
    if not all(math.isfinite(alpha) for alpha in args.alpha):
        fail("--alpha must be finite numbers")
    for name in ("limit", "sentences", "batch_tokens"):
        if getattr(args, name) < 1 and not (name == "limit" and args.limit == -1):
            fail(f"--{name.replace('_', '-')} must be positive{' or -1 (all)' if name == 'limit' else ''}")
    if not 0 <= args.rcond < 1:                 # at 1 no singular value would be left
        fail("--rcond must be a share of the largest singular value: 0 or more, and less than 1")
    if not 0 <= args.ridge < math.inf:
        fail("--ridge must be a finite number and not negative")
    if not 0 <= args.seed < 2**32:              # what all generators take
        fail("--seed must be 0 or more, and less than 2**32")
    if not re.fullmatch(r"auto|(\d{1,9}|\d{0,9}\.\d{1,99})(,(\d{1,9}|\d{0,9}\.\d{1,99}))?", args.layer):
        fail(f"--layer {args.layer}: give an index (24), a fraction of depth (0.75), SOURCE,TARGET (24,30) or auto")
    if args.dtype in QUANTISED and not importlib.util.find_spec("bitsandbytes"):
        fail(f"--dtype {args.dtype} needs bitsandbytes: pip install bitsandbytes")
    Settings.remote = remote_models(args)
    if args.remote:
        args.ndif_host = args.ndif_host.rstrip("/")
        check_ndif(args.ndif_host, Settings.remote)
    return args


def remote_models(args: argparse.Namespace) -> list[str]:
    """The models that --remote runs on NDIF: the targets and their aligned models, or all."""
    names = [*args.tgt, *args.tgt_chat] + ([args.src, args.src_base] if args.remote == "both" else [])
    return list(dict.fromkeys(filter(None, names))) if args.remote else []


def check_ndif(host: str, names: list[str]) -> None:
    """Key, server, versions, models: whatever is missing ends here, in one line."""
    import httpx
    from importlib.metadata import version
    if not os.environ.get("NDIF_API_KEY"):
        fail("--remote needs an NDIF key in the environment variable NDIF_API_KEY; https://login.ndif.us gives one")
    if not re.match("https?://", host):
        fail(f"--ndif-host {host}: it must begin with http:// or https://")
    for name in names:
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", name):
            fail(f"--remote: {name} is not on NDIF, which knows models by their hub ids (like meta-llama/Llama-3.1-70B)")
    try:
        answers = [httpx.get(f"{host}/{page}", timeout=60) for page in ("status", "env")]
        status, server = (answer.raise_for_status().json() for answer in answers)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        fail(f"no NDIF at {host}: {error}; see https://nnsight.net/status, or give another --ndif-host")
    for package in ("nnsight", "transformers"):
        theirs = server.get("packages", {}).get(package)
        if theirs != version(package):
            fail(f"NDIF runs {package} {theirs or '(version unknown)'}, here is {version(package)}, and results may differ: "
                 f"pip install {package}=={theirs}")
    running = {(model["repo_id"], model.get("revision") or "main") for model in status.get("deployments", {}).values()
               if model.get("application_state") == "RUNNING" and "repo_id" in model}      # one that is being set up has none
    for name in names:
        repo, revision = _split_revision(name)
        if (repo, revision or "main") not in running:
            up = ", ".join(sorted(repo if revision == "main" else f"{repo}@{revision}" for repo, revision in running))
            fail(f"{name} is not running on NDIF; these are: {up or 'none'}")


def block_index(layer: str, blocks: int, side: int = 0) -> int:
    """The 0-based block that `layer` means in a model of so many blocks; side 0 is the source, 1 the target.

    A number with a point is a fraction of depth, rounded down: 0.75 of 32 blocks is block 24, of 40 block 30."""
    value = layer.split(",")[min(side, layer.count(","))]
    index = int(float(value) * blocks + 1e-9) if "." in value else int(value)
    if not 0 <= index < blocks:
        fail(f"--layer {layer}: block {index} does not exist in a model of {blocks} blocks (0 to {blocks - 1})")
    return index


# ---------------------------------------------------------------- files


def read_text(path: Path) -> str:
    """A UTF-8 text file, without a byte-order mark; what cannot be read ends in one line that names file and line."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        fail(f"no file {path}; python data/prepare.py fetches it")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8 ({error.reason})")


def read_json(path: Path):
    """The value of a JSON file, as read_text."""
    text = read_text(path)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()      # half a surrogate pair is JSON, but no text
        return value
    except json.JSONDecodeError as error:
        fail(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON that can be used ({error})")


def read_texts(path: Path) -> list[str]:
    """The texts of a JSON list, stripped, doubles dropped."""
    texts = read_json(path)
    if not isinstance(texts, list) or not texts:
        fail(f"{path} must be a JSON list of texts, and not empty")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            fail(f"{path}, text {number}: {text!r} is not a text")
    return list(dict.fromkeys(text.strip() for text in texts))


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file, each with exactly the cells that the first line names; these columns must be there."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        header = next(lines, [])
        if not set(columns) <= set(header):
            fail(f"{path}, line 1: must have the columns {' and '.join(columns)}")
        for row in filter(None, lines):         # an empty line is no row
            if len(row) != len(header):
                fail(f"{path}, line {lines.line_num}: {len(row)} cells where the first line has {len(header)}")
            rows.append(dict(zip(header, row)))
    except csv.Error as error:
        fail(f"{path}, line {lines.line_num}: not CSV ({error})")
    return rows


def write_whole(path: Path, write) -> None:
    """Call write(file) on a temporary file that takes its place only when it is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"no space left to write {path}; free some, and the same command goes on from here")
        fail(f"cannot write {path}: {error.strerror or error}")
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:                         # where nothing can be written, nothing can be removed
            pass


# ================================================================ 2  Model

PATHS = {  # one path to blocks, final norm and unembedding on every architecture; unmatched keys are skipped by nnsight
    "model.layers": "layers", "gpt_neox.layers": "layers", "transformer.h": "layers", "model.decoder.layers": "layers",
    "model.norm": "final_norm", "model.final_layernorm": "final_norm", "gpt_neox.final_layer_norm": "final_norm",
    "transformer.ln_f": "final_norm", "model.decoder.final_layer_norm": "final_norm",
    "lm_head": "unembed", "embed_out": "unembed",
}


def _split_revision(name: str) -> tuple[str, str | None]:
    if Path(name).is_dir():                     # a folder may have an @ in its path
        return str(name), None
    name, _, revision = str(name).partition("@")
    return name, revision or None


@functools.cache                                # asked for by several checks, and a large tokenizer takes a second to read
def model_config(name: str):
    """(config, tokenizer) of a model: all that can be known before its weights are loaded. Fails in one line."""
    from transformers import AutoConfig, AutoTokenizer
    repo, revision = _split_revision(name)
    if os.path.sep in repo and not Path(repo).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        fail(f"no model folder {repo}")
    if Path(repo).is_dir():
        if not (Path(repo) / "config.json").exists():
            fail(f"{repo} is not a model folder: it has no config.json")
        pickles = list(Path(repo).glob("*.bin"))
        if not list(Path(repo).glob("*.safetensors")) and not (Settings.pickle and pickles):
            fail(f"{repo} is not a model folder: it has no *.safetensors" +
                 (" (its *.bin are pickles, which can run any code; --allow-pickle if you trust them)" if pickles else ""))
    elif name not in Settings.remote and not Settings.pickle:
        _require_safetensors(repo, revision)
    try:
        return [auto.from_pretrained(repo, revision=revision, trust_remote_code=Settings.code)
                for auto in (AutoConfig, AutoTokenizer)]
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        if "gated" in str(error) or "401" in str(error):
            why = f"accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
        if "trust_remote_code" in str(error):
            why = "it brings Python code of its own; read it, and add --trust-remote-code if you trust it"
        fail(f"cannot read model {name}: {why}")


def _require_safetensors(repo: str, revision: str | None) -> None:
    from huggingface_hub import file_exists
    try:
        safe = [file_exists(repo, f"model.safetensors{part}", revision=revision) for part in ("", ".index.json")]
    except (OSError, ValueError):               # no network: what lies in the hub's cache is all there is
        return
    if not any(safe):
        fail(f"{repo} has no safetensors; its weights are pickles, which can run any code: --allow-pickle if you trust them")


def load_model(name: str, dtype: str = "auto", device: str = "auto", remote: str | None = None, batch_tokens: int = 16384):
    """An nnsight model of any causal LM.

    name: hub id or folder, `REPO@REVISION` for a revision. dtype "auto": float32 on the CPU, bfloat16 on a GPU.
    The result has .layers, .final_norm and .unembed on every architecture, a tokenizer that pads on the left, and
    carries .name, .fingerprint, .precision, .remote, .batch_tokens and .abilities, which the functions below read. dtype "nf4"
    and "int8" quantise the weights. remote: address of an NDIF server that runs the model; no weights are loaded here then.
    Raises ValueError where the blocks are not found, naming the module lists that are there."""
    from nnsight.modeling.transformers import TransformersModel
    from transformers.utils import logging
    logging.disable_progress_bar()              # a bar for every file of weights says little and hides the table
    repo, revision = _split_revision(name)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    quantised = dtype if dtype in QUANTISED else None
    dtype = getattr(torch, dtype if dtype != "auto" and not quantised else "bfloat16" if on_gpu else "float32")
    options = {} if remote else {"dispatch": True, "dtype": dtype,
                                 "device_map": device if device != "auto" else "auto" if on_gpu else "cpu"}
    if quantised and not remote:
        from transformers import BitsAndBytesConfig
        options["quantization_config"] = BitsAndBytesConfig(**QUANTISED[quantised], bnb_4bit_compute_dtype=dtype)
    if Settings.code or not remote:
        options["trust_remote_code"] = Settings.code        # who does not say no is asked on the terminal
    if not (Settings.pickle or remote):
        options["use_safetensors"] = True       # a folder may hold another safetensors file beside weights that are a pickle
    model = TransformersModel(repo, task="text-generation", rename=PATHS, revision=revision, **options)
    if not all(hasattr(model, part) for part in ("layers", "final_norm", "unembed")):
        lists = [path for path, module in model._module.named_modules() if isinstance(module, torch.nn.ModuleList)]
        raise ValueError(f"{name}: no known path to blocks, final norm or unembedding of {type(model._module).__name__}; "
                         f"it has the module lists {', '.join(lists) or '(none)'}: add the right paths to PATHS in common.py")
    model._module.requires_grad_(False)
    model._module.eval()
    if model.tokenizer.pad_token is None:       # padded positions are masked, so any token will do
        known = model.tokenizer.eos_token, model.tokenizer.bos_token, model.tokenizer.convert_ids_to_tokens(0)
        model.tokenizer.pad_token = next(token for token in known if token is not None)
    model.name, model.remote, model.batch_tokens, model.abilities = str(name), remote, batch_tokens, None
    model.pass_tokens = batch_tokens if remote or on_gpu else min(PASS, batch_tokens)
    model.fingerprint, model.precision = fingerprint(name), quantised or str(dtype)
    return model


def loader(args: argparse.Namespace):
    """load(name) -> model, load(a, b) -> [model, model]: keeps the models of the last call and lets all others go,
    load() all."""
    from safetensors import SafetensorError
    held = {}

    def load(*names: str):
        if others := [name for name in held if name not in names]:
            for name in others:
                del held[name]
            gc.collect()                        # a model holds itself in a circle, and would still be there beside the next
        for name in names:
            if name not in held:
                host = args.ndif_host if name in remote_models(args) else None
                try:
                    held[name] = load_model(name, args.dtype, args.device, host, args.batch_tokens)
                except (OSError, ValueError, SafetensorError) as error:     # no weights, torn ones, unknown architecture
                    why = str(error).strip().splitlines()[-1]               # the lines above it are tracebacks
                    fail(f"cannot load model {name}: {why}")
        return held[names[0]] if len(names) == 1 else [held[name] for name in names]
    return load


WHAT_COUNTS = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}      # of the files in a folder


def fingerprint(name: str) -> str:
    """What tells this model from every other: the hub id with its commit, or a hash of the folder's files (but for notes
    on its training, which change no number)."""
    repo, revision = _split_revision(name)
    if not Path(repo).is_dir():
        from huggingface_hub import try_to_load_from_cache
        config = try_to_load_from_cache(repo, "config.json", revision=revision or "main")
        return f"{repo}@{Path(config).parent.name if isinstance(config, str) else revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(Path(repo).glob("*")):
        if path.suffix in WHAT_COUNTS and not path.stem.startswith("train"):
            stat = path.stat()                  # reading tens of gigabytes would take longer than the experiment
            content = path.read_bytes() if stat.st_size < 2**28 else f"{stat.st_size} {stat.st_mtime_ns}".encode()
            digest.update(path.name.encode() + b"\0" + content)
    return f"sha256:{digest.hexdigest()[:16]}"


def context_length(config) -> int:
    """Positions that the model was made for [tokens]."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or sys.maxsize


# ================================================================ 3  Work: in batches, here or on NDIF


def residual(output):
    """The residual stream in a block's output: a tensor on most architectures, the first of a tuple on GPT-Neo."""
    return output[0] if isinstance(output, tuple) else output


def encode(model, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer adds (BOS where the model has one)."""
    ids = model.tokenizer(list(texts)).input_ids
    longest, limit = max(map(len, ids)), context_length(model.config)
    if longest > limit:
        raise ValueError(f"a prompt of {longest} tokens does not fit the context of {model.name} ({limit} tokens)")
    if not all(ids):
        raise ValueError("an empty prompt has no last token")
    return ids


PASS = 2048                                     # tokens of one forward pass on a CPU: more fall out of its caches


def _batches(model, lengths: list[int], rows_each: int = 1, label: str | None = None, costs: list[float] | None = None,
             like: list[int] | None = None):
    """Yield lists of indices, rows of like length together, the longest first. rows x longest stays within model.batch_tokens,
    which may shrink on the way; a batch also ends where it costs model.pass_tokens, or before a row that is much shorter,
    once it is worth a pass of its own. costs: tokens to be computed for each row, like: lengths that are padded to each
    other (both: default lengths)."""
    costs, like = costs or lengths, like or lengths
    order = sorted(range(len(lengths)), key=lambda i: -like[i])
    start = 0
    with tqdm(total=len(order), desc=label, leave=False, disable=len(order) < 64 or label is None, mininterval=1) as bar:
        while start < len(order):
            end, longest, cost = start, 0, 0.0
            while end < len(order):
                i = order[end]
                longest, cost = max(longest, lengths[i]), cost + costs[i] * rows_each
                full = (end - start + 1) * longest * rows_each > model.batch_tokens or cost > model.pass_tokens
                if end > start and (full or like[i] < 0.85 * like[order[start]] and 4 * cost > model.pass_tokens):
                    break
                end += 1
            yield order[start:end]
            bar.update(end - start)
            start = end


def _padded(model, rows: list[list[int]], before: torch.Tensor | None = None) -> dict:
    """Left-padded ids, mask and positions. before: which columns of a cache hold tokens of each row [rows, columns]."""
    width, pad = max(map(len, rows)), model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if before is not None:
        positions += before.sum(1, keepdim=True)
        mask = torch.cat([before, mask], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _each_batch(model, make, fixed: tuple, pack, batches, together: int | None = None):
    """Yield (batch, answer): make(model, *fixed) is a function of pack(batch), here or on NDIF.

    On NDIF several batches go `together` as one job (default: JOB), and `make` with all that it calls travels as source text:
    it must reach no class of ours, no cached function and no tqdm, and return tensors, numbers, lists and tuples. A batch too
    large for memory is halved, and so is a job too long for the server; those that follow are as small."""
    answer, size = None, (together or JOB) if model.remote else 1

    def answers(chunk: list[list[int]]) -> list:
        nonlocal answer
        if model.remote:
            return _on_ndif(model, make, fixed, [pack(batch) for batch in chunk])
        answer = answer or make(model, *fixed)
        return [answer(**pack(batch)) for batch in chunk]

    def halving(chunk):
        nonlocal size
        try:
            return list(zip(chunk, answers(chunk)))
        except (torch.OutOfMemoryError, TimeoutError) as error:
            too_long = isinstance(error, TimeoutError) and len(chunk) > 1
            if max(map(len, chunk)) == 1 and not too_long:
                if model.remote:
                    fail(f"NDIF ({model.remote}) cannot do one text of {model.name} at a time: {error}")
                raise
        if too_long:
            middle = size = len(chunk) // 2
            return halving(chunk[:middle]) + halving(chunk[middle:])
        model.batch_tokens = max(1, min(model.batch_tokens, model.pass_tokens) // 2)
        model.pass_tokens = min(model.pass_tokens, model.batch_tokens)
        gc.collect(), torch.cuda.empty_cache()
        return halving([half for batch in chunk for half in (batch[:len(batch) // 2], batch[len(batch) // 2:]) if half])
    batches = iter(batches)
    while chunk := list(itertools.islice(batches, size)):
        yield from halving(chunk)


# ---------------------------------------------------------------- NDIF

JOB = 8                                         # batches of one NDIF job: few round trips, well within the server's time
PATIENCE = [1, 2, 4, 8, 16, 32, 64]             # seconds to wait before a job that failed is sent again
TRAFFIC = {"requests": 0, "failed": 0, "kept": 0, "bytes up": 0, "bytes down": 0, "queue s": 0.0, "run s": 0.0}


def _job(model, make, fixed: tuple, packs: list[dict]) -> list:
    answer = make(model, *fixed)
    return [answer(**pack) for pack in packs]


def _on_ndif(model, make, fixed: tuple, packs: list[dict]) -> list:
    """_job on the server, sent again while there is hope; an answer is kept on disk and never asked for twice."""
    import httpx
    import nnsight
    from nnsight.intervention.backends.remote import RemoteError
    from websocket import WebSocketException
    about, last = [model.fingerprint, model.remote, make.__name__, fixed, packs], None
    if (kept := from_cache("ndif", about)) is not None:
        TRAFFIC["kept"] += 1
        return kept
    for wait in [*PATIENCE, None]:
        try:
            with model.session(backend=_ndif_client(model)):
                answers = nnsight.save(_job(model, make, fixed, packs))
            break
        except (RemoteError, WebSocketException, httpx.HTTPError, OSError) as error:
            TRAFFIC["failed"] += 1
            text, refused = str(error).strip(), getattr(getattr(error.__cause__, "response", None), "status_code", 0)
            text = text.replace(os.environ.get("NDIF_API_KEY") or "\0", "(the key)")    # NDIF repeats one that is malformed
            why = text.splitlines()[-1] if text else type(error).__name__
            if "execution timeout" in text:
                raise TimeoutError(why) from None
            if re.search("out of memory|OutOfMemory", text):
                raise torch.OutOfMemoryError(why) from None
            # What the server refuses, or what fails twice in the same way in our own code, fails for ever.
            if wait is None or 400 <= refused < 500 or "Traceback" in text and text == last:
                fail(f"NDIF ({model.remote}): {why}; what was finished is kept, and the same command goes on from there")
            tqdm.write(f"NDIF: {why}; trying again in {wait} s", file=sys.stderr)
            last = text
            time.sleep(wait)
    to_cache("ndif", about, answers)
    return answers


def _ndif_client(model):
    """nnsight's client for one job, which counts what the job costs and shows a queue that does not move."""
    from nnsight.intervention.backends.remote import RemoteBackend

    class Display:
        enabled, since, shown = True, time.monotonic(), 0.0         # enabled: nnsight wakes us ten times a second

        def update(self, response):
            self.status, self.since, self.shown = response, time.monotonic(), 0.0

        def refresh(self):
            waited = time.monotonic() - self.since
            if waited - self.shown >= 30:
                self.shown = waited
                tqdm.write(f"NDIF: {model.name} {self.status.status.value.lower()} for {waited:.0f} s "
                           f"({self.status.description.strip() or 'the server says no more'})", file=sys.stderr)

    class Client(RemoteBackend):
        def _serialize(self, tracer):
            blob = super()._serialize(tracer)
            TRAFFIC["requests"] += 1
            TRAFFIC["bytes up"] += len(blob)
            return blob

        def finalize(self, content):
            TRAFFIC["bytes down"] += len(content)
            return super().finalize(content)

        def note(self, response):
            now, name = time.monotonic(), response.status.value
            TRAFFIC["run s" if self.before == "RUNNING" else "queue s"] += now - self.since
            self.before, self.since = name if name != "LOG" else self.before, now
            return super().note(response)
    client = Client(model.to_model_key(), host=model.remote, env=model._remoteable_get_env())
    client.display, client.before, client.since = Display(), "", time.monotonic()
    return client


# ---------------------------------------------------------------- what was computed before

CACHE = Path(os.environ.get("CONTRANS_CACHE", Path(__file__).parent / "cache"))
CACHE_VERSION = 2                               # of what the files hold: a change of it leaves all older ones unread


def _cache_key(about) -> str:
    from importlib.metadata import version      # of what numbers depend on
    return _digest([CACHE_VERSION, *(version(name) for name in ("torch", "transformers", "nnsight")), about])


def from_cache(kind: str, about):
    """Tensors that were kept under this description, by memory map; None where there are none, or no whole ones. A file's
    name ends in the checksum of its content."""
    for path in CACHE.glob(f"{kind}-{_cache_key(about)}-*.pt") if Settings.cache else ():
        with open(path, "rb") as file:
            sound = path.stem.endswith("-" + hashlib.file_digest(file, "sha256").hexdigest()[:16])
        if sound:
            return torch.load(path, mmap=True)
        print(f"{path} is damaged; computed again", file=sys.stderr)
        path.unlink(missing_ok=True)            # by another process, meanwhile


def to_cache(kind: str, about, value) -> None:
    if Settings.cache:
        content = io.BytesIO()
        torch.save(value, content)
        checksum = hashlib.sha256(content.getbuffer()).hexdigest()[:16]
        write_whole(CACHE / f"{kind}-{_cache_key(about)}-{checksum}.pt", lambda file: file.write(content.getbuffer()))


def _digest(value) -> str:
    """A hash of nested lists, dictionaries, numbers, texts and tensors, the same in every process."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().cpu().numpy().tobytes())
        elif isinstance(value, dict):
            digest.update(f"{{{len(value)}".encode())
            for name in value:
                add(name), add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())
    add(value)
    return digest.hexdigest()[:32]


# ================================================================ 4  Hidden states

def hidden_states(model, texts: list[str], layers: list[int] | None = None, transplant: Transplant | None = None,
                  label: str = "hidden states") -> torch.Tensor:
    """Residual stream after each block of `layers` (default: all) at the last token of each text.

    Returns [n, len(layers), d], float32 on the CPU. The forward pass stops after the last block that is needed.
    States without a transplant are kept on disk (folder `cache`, or CONTRANS_CACHE), keyed by model and content."""
    layers = list(range(len(model.layers))) if layers is None else list(layers)
    for layer in layers:
        _require_block(model, layer)
    about = [model.fingerprint, model.remote or model.precision, layers, "last token", texts]
    if transplant is None and (kept := from_cache("states", about)) is not None:
        return kept

    ids = encode(model, texts)
    result = torch.empty(len(texts), len(layers), model.config.hidden_size)
    wanted = sorted(set(layers))
    for batch, states in _each_batch(model, _reader, (wanted, _shifts(model, [transplant or Transplant()])),
                                     lambda batch: {"rows": [ids[i] for i in batch]},
                                     _batches(model, [len(row) for row in ids], label=label)):
        result[batch] = states[:, [wanted.index(layer) for layer in layers]].float().cpu()
    if not torch.isfinite(result).all():
        _blame(model, [ids[i] for i in range(len(ids)) if not torch.isfinite(result[i]).all()][:1], transplant or BASE)
    if transplant is None:
        to_cache("states", about, result)
    return result


def _reader(model, layers: list[int], shifts: dict, finite: bool = False):
    """A function that reads the last token's states [B, layers, d] of one batch, in the model's own dtype; or whether all
    tokens' are finite."""
    def states(rows):
        with torch.no_grad():
            inputs = _padded(model, rows)
            with model.trace(inputs, use_cache=False, logits_to_keep=1) as tracer:
                found = []
                for layer in range(max(layers) + 1):
                    if layer in layers or layer in shifts:
                        h = residual(model.layers[layer].output)
                    if layer in shifts:
                        h += shifts[layer][:, None].to(h)
                    if layer in layers:
                        tokens = (h.isfinite().all(-1).cpu() | (inputs["attention_mask"] == 0)).all(1) if finite else h[:, -1]
                        found.append(tokens.cpu())              # blocks may lie on several GPUs
                found = torch.stack(found, 1).save()
                if not model.remote:            # where NDIF runs a job in a sandbox, the trace after a stop fails
                    tracer.stop()
        return found
    return states


def _require_block(model, layer: int) -> None:
    if not 0 <= layer < len(model.layers):
        raise ValueError(f"block {layer} does not exist in {model.name} (0 to {len(model.layers) - 1})")


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"NaN or infinity in {what}")


def _blame(model, rows: list[list[int]], transplant: Transplant):
    """Stop, and name the block where the first NaN or infinity of these rows comes from."""
    blocks = list(range(len(model.layers)))
    shifts = _shifts(model, [transplant])
    [(_, finite)] = _each_batch(model, _reader, (blocks, shifts, True), lambda batch: {"rows": rows}, [[0]])
    bad = [block for block in blocks if not finite[:, block].all()]
    where = f"after block {bad[0]}" if bad else "in the logits, not in any block"
    raise FloatingPointError(f"NaN or infinity {where} of {model.name} ({model.dtype}): try --dtype bfloat16 or float32 where "
                             "float16 overflows, or a smaller alpha")


# ================================================================ 5  Refine


def refine(positive: torch.Tensor, negative: torch.Tensor, method: str = "mean") -> torch.Tensor:
    """Concept vector of each layer from paired states [n, layers, d]; returns [layers, d] (Eq. 1).

    mean: the mean of h_pos - h_neg, as in the paper. pca: first principal direction of the paired differences
    (uncentred), pointing to the positives. probe: direction of a logistic regression. The last two are scaled to
    the norm of the mean difference, so that one alpha means the same for all three."""
    if positive.shape != negative.shape or positive.dim() != 3 or not len(positive):
        raise ValueError(f"positives and negatives must be pairs [n, layers, d]; "
                         f"got {tuple(positive.shape)} and {tuple(negative.shape)}")
    difference = (positive - negative).double()
    mean = difference.mean(0)
    if method == "mean":
        return mean.float()
    directions = []
    for layer in range(difference.shape[1]):
        if method == "pca":
            direction = torch.linalg.svd(difference[:, layer], full_matrices=False).Vh[0]
        elif method == "probe":
            from sklearn.linear_model import LogisticRegression
            x = torch.cat([positive[:, layer], negative[:, layer]]).double()
            scale = x.std(0).mean()
            fitted = LogisticRegression(max_iter=1000).fit((x / scale).numpy(), [1] * len(positive) + [0] * len(negative))
            direction = torch.from_numpy(fitted.coef_[0])
        else:
            raise ValueError(f"unknown refine method {method!r}: mean, pca or probe")
        if direction @ mean[layer] < 0:         # a principal direction has no sign of its own
            direction = -direction
        directions.append(direction / direction.norm() * mean[layer].norm())
    return torch.stack(directions).float()


def concept_vector(model, positive: list[str], negative: list[str], layers: list[int], method: str = "mean",
                   label: str = "concept") -> torch.Tensor:
    """refine() from the texts of pairs, [len(layers), d]. From NDIF only means of a batch travel, where the method is mean."""
    if not model.remote or method != "mean":
        return refine(*(hidden_states(model, texts, layers, label=label) for texts in (positive, negative)), method)
    if len(positive) != len(negative) or not positive:
        raise ValueError(f"positives and negatives must be pairs; got {len(positive)} and {len(negative)}")
    total = torch.zeros(len(layers), model.config.hidden_size, dtype=torch.float64)
    for sign, texts in ((1, positive), (-1, negative)):
        ids = encode(model, texts)
        for _, sums in _each_batch(model, _summer, (list(layers),), lambda batch: {"rows": [ids[i] for i in batch]},
                                   _batches(model, [len(row) for row in ids], label=label)):
            total += sign * sums
    _require_finite(total, f"hidden states of {model.name} ({model.dtype})")
    return (total / len(positive)).float()


def _summer(model, layers: list[int]):
    """A function that adds up the last token's states [layers, d] of one batch."""
    wanted = sorted(set(layers))
    states = _reader(model, wanted, {})
    return lambda rows: states(rows)[:, [wanted.index(layer) for layer in layers]].double().sum(0)


# ================================================================ 6  Reformulate


@dataclass(frozen=True)
class AffineMap:
    """x -> (x - x_mean) F + y_mean with F = V S^-1 U^T Y (Eq. 2), kept in factors: a mapped vector is a weighted sum
    of the target's own hidden states, so F [d1, d2] is never built. Both means are zero unless fitted with an intercept."""
    inverse: tuple[torch.Tensor, torch.Tensor]  # [d1, r] and [r, n], float64: their product is the pseudo-inverse of x
    y: torch.Tensor                             # [n, d2]
    x_mean: torch.Tensor
    y_mean: torch.Tensor
    r2: float = math.nan                        # on held-out sentences, all dimensions pooled
    cosine: float = math.nan                    # mean over held-out sentences, after subtracting the mean of y
    n: int = 0                                  # sentences that it was fitted on

    def vector(self, v: torch.Tensor) -> torch.Tensor:
        """Map concept vectors [..., d1] to [..., d2], float32. A difference of states: the intercept cancels."""
        left, right = self.inverse
        return (v.double() @ left @ right @ self.y).float()

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Predict the target's hidden states [n, d2] from the source's [n, d1], float32."""
        return (self.vector(x.double() - self.x_mean).double() + self.y_mean).float()


def fit_affine(x: torch.Tensor, y: torch.Tensor, intercept: bool = False, rcond: float = 0.0, ridge: float = 0.0,
               held_out: float = 0.2, inverse: tuple | None = None) -> AffineMap:
    """Least squares from source states x [n, d1] to target states y [n, d2] of the same sentences (Eq. 2, App. A).

    As in the paper by default: no intercept, no ridge, no cut-off but for singular values that float64 cannot tell
    from zero. The last `held_out` share of the rows is kept for R² and cosine; with fewer rows than d1 the training
    rows are interpolated, so only held-out numbers say anything. All in float64. inverse: AffineMap.inverse of a map that was
    fitted on the same x with the same options, so that maps into several spaces share one factorisation."""
    x, y = x.double(), y.double()
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [n, d] with equal n; got {tuple(x.shape)} and {tuple(y.shape)}")
    n = len(x) - int(len(x) * held_out)
    if n < 2:
        raise ValueError(f"{len(x)} sentences are too few to fit a map")
    _require_finite(torch.stack([*x.aminmax(), *y.aminmax()]), "x or y")
    x_mean, y_mean = (states[:n].mean(0) if intercept else torch.zeros_like(states[0]) for states in (x, y))
    inverse = inverse or _pseudo_inverse(x[:n] - x_mean if intercept else x[:n], rcond, ridge)
    fitted = AffineMap(inverse, y[:n] - y_mean if intercept else y[:n], x_mean, y_mean, n=n)
    if n == len(x):
        return fitted
    return AffineMap(**{**vars(fitted), **held_out_fit(fitted.states(x[n:]), y[n:], y[:n].mean(0))})


def _pseudo_inverse(x: torch.Tensor, rcond: float, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors [d, r] and [r, n] of the pseudo-inverse of x [n, d]: (V S^-1) U^T; with ridge, S / (S^2 + ridge).

    X^T (X X^T)^-1 is the same and ten times faster, but has the square of X's condition number, so it is for the well
    conditioned: what float64 then loses is below what float32 can show."""
    n, d = x.shape
    gram = x @ x.T if n < d else x.T @ x
    penalty = ridge * gram.trace() / min(n, d)              # in units of the mean squared singular value
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not rcond and not failed:
        inverse = torch.cholesky_inverse(factor)
        if gram.trace() * torch.linalg.matrix_norm(inverse) < 1e8:          # bounds the condition number of the Gram matrix
            return (x.T, inverse) if n < d else (inverse, x.T)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    keep = s > s[0] * max(rcond, torch.finfo(s.dtype).eps * max(n, d))
    return vt.T * torch.where(keep, s / (s**2 + penalty), 0.0).nan_to_num(0.0), u.T


def held_out_fit(predicted: torch.Tensor, y: torch.Tensor, mean: torch.Tensor) -> dict[str, float]:
    """R² (all dimensions pooled) and mean cosine of predicted states [n, d] against y, both about the training mean."""
    predicted, y = predicted.double() - mean, y.double() - mean
    r2 = 1 - ((y - predicted)**2).sum() / (y**2).sum()
    return {"r2": r2.item(), "cosine": torch.cosine_similarity(predicted, y, dim=1).mean().item()}


def plain_sentences(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The sentences that affine maps are fitted on: unsplit WikiSplit sentences without their last 2 to 4 words, as in
    the released code. Those that are too long for one of the models `names` are left out, and it is said how many."""
    path = args.data / "wikisplit" / "validation.tsv"
    lines = read_text(path).splitlines()
    drop = np.random.RandomState(42)
    texts = [" ".join(line.split("\t")[0].split()[:-drop.randint(2, 5)]) for line in lines]
    texts = [text for text in texts if text][:args.sentences * 5 // 2]      # a pool: each map is fitted on a sample of it
    keep = np.ones(len(texts), bool)
    for name in set(names):
        config, tokenizer = model_config(name)
        encoded = tokenizer(texts, verbose=False).input_ids if texts else []
        keep &= np.array([0 < len(ids) <= context_length(config) for ids in encoded], bool)
    if not keep.all():
        print(f"{(~keep).sum()} of {len(texts)} plain sentences are empty or longer than a model's context, and left out")
    if keep.sum() < 10:
        fail(f"{path} has only {keep.sum()} sentences that fit the models' contexts; an affine map needs more")
    return [text for text, kept in zip(texts, keep) if kept]


class Bridge:
    """From the hidden space of one base model into that of another, through affine maps of the same plain sentences.

    x [n, pairs of blocks, d1] and y [n, pairs of blocks, d2]: both models' states. Map number k is fitted on sample k of
    the sentences, so that the luck of one map can be seen; with shuffled=True on sentences that do not belong together.
    inverses: a dictionary that bridges from the same x share, so that x is factorised once for all of them."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace, inverses: dict | None = None):
        self.x, self.y, self.args, self.maps, self.inverses = x, y, args, {}, {} if inverses is None else inverses

    def sample(self, number: int) -> list[int]:
        """Rows of the plain sentences that map `number` is fitted on."""
        return random.Random(number).sample(range(len(self.x)), min(self.args.sentences, len(self.x)))

    def affine(self, i: int, number: int = 0, shuffled: bool = False) -> AffineMap:
        """The affine map at pair i of blocks."""
        if (i, number, shuffled) not in self.maps:
            rows, args = self.sample(number), self.args
            y = self.y[random.Random(number).sample(rows, len(rows)) if shuffled else rows, i]
            fitted = fit_affine(self.x[rows, i], y, args.intercept, args.rcond, args.ridge,
                                inverse=self.inverses.get((i, number)))
            self.maps[i, number, shuffled], self.inverses[i, number] = fitted, fitted.inverse
        return self.maps[i, number, shuffled]

    def carry(self, v: torch.Tensor, i: int, **which) -> torch.Tensor:
        """v^ [..., d2] of concept vectors v [..., d1] at pair i of blocks (Eq. 2), rescaled under --norm match."""
        mapped = self.affine(i, **which).vector(v)
        if self.args.norm == "match":
            ratio = v.norm(dim=-1) / self.x[:, i].norm(dim=1).mean() * self.y[:, i].norm(dim=1).mean()
            mapped = mapped / mapped.norm(dim=-1, keepdim=True) * ratio[..., None]
        return mapped


def random_directions(v: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, d] random directions of v's norm: the control of every transplant."""
    directions = torch.randn(count, len(v), generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=1, keepdim=True) * v.norm()


# ================================================================ 7  Transplant


@dataclass(frozen=True)
class Transplant:
    """Which vectors go to which blocks at which strength; a sum of several is one. Transplant() changes nothing.

        Transplant.of(v, layer=6, alpha=2.0)
        Transplant.of(honesty, 6, 2.0) + Transplant.of(fairness, 6, 1.0)"""
    parts: tuple[tuple[int, float, torch.Tensor], ...] = ()

    @staticmethod
    def of(vector: torch.Tensor, layer: int, alpha: float) -> Transplant:
        """alpha * vector [d] after block `layer` (0-based), at every position of prompt and continuation (Eq. 3)."""
        return Transplant(((layer, float(alpha), vector),))

    def __add__(self, other: Transplant) -> Transplant:
        return Transplant(self.parts + other.parts)


BASE = Transplant()


def _shifts(model, transplants: list[Transplant]) -> dict[int, torch.Tensor]:
    """{block: [len(transplants), d] float32}: what each transplant adds there, blocks in forward order.

    α = 0 adds exact zeros, which leave every bit of the stream as it was."""
    shifts = {}
    for row, transplant in enumerate(transplants):
        for layer, alpha, vector in transplant.parts:
            _require_block(model, layer)
            if layer not in shifts:
                shifts[layer] = torch.zeros(len(transplants), len(vector))
            shifts[layer][row] += alpha * vector.float().cpu()
    for layer, shift in shifts.items():
        # Norms square the stream in float32. Where that overflows, RMSNorm makes zeros of it: wrong answers without any NaN.
        if not (shift**2).sum(1).isfinite().all() or not model.remote and not shift.to(model.dtype).isfinite().all():
            raise FloatingPointError(f"NaN or infinity in what is added after block {layer} of {model.name} ({model.dtype}): "
                                     "try a smaller alpha")
    return dict(sorted(shifts.items()))


# ================================================================ 8  Scoring


# ---------------------------------------------------------------- one forward pass, and what it need not repeat

# What many rows begin with is read once and kept as a start: (blocks, mask). blocks: keys and values of each block, a row a
# start up to the first steered block, a row a transplant and start above it. mask: which columns are tokens [starts, columns].


def _cache(start: tuple, which: list[int]):
    """A cache for one forward pass of rows that begin with starts number `which`. Each block's new keys and values are written
    behind a copy of the start's; transformers' own way copies the start three times."""
    from transformers.cache_utils import DynamicCache, DynamicLayer
    blocks, mask = start

    def joined(old, new):
        held, copies = old.shape[-2], len(old) // len(mask)
        whole = new.new_empty(*new.shape[:2], held + new.shape[2], new.shape[3])
        whole[:, :, held:] = new
        parts = whole.unflatten(0, (copies, len(which)))[..., :held, :]
        old = old.unflatten(0, (copies, len(mask)))
        parts.copy_(old if len(mask) == 1 else old[:, list(which)])
        return whole

    def layer(keys, values):
        made = DynamicLayer()
        made.keys, made.values, made.is_initialized = keys, values, True

        def update(new_keys, new_values, *_, **__):
            made.keys, made.values = joined(keys, new_keys), joined(values, new_values)
            return made.keys, made.values
        made.update = update
        return made
    cache = DynamicCache()
    cache.layers = [layer(*block) for block in blocks]
    return cache


def _read(model, rows: list[list[int]], shifts: dict, copies: int, shared: bool, keep: list[int] | None = None,
          start: tuple | None = None, which: list[int] = (), keep_start: bool = False):
    """One forward pass: rows of tokens, the i-th after start number which[i], under each of `copies` transplants.

    Returns the logits [copies, N, V] of the last keep[i] positions (default: 1) of each row, row after row, and, where asked
    for, what was read as a start. shared: up to the first steered block nothing depends on the transplant, so each row is
    there once, and from there on once a transplant."""
    parting = min(shifts) if shared and shifts and copies > 1 else None     # the block after which rows part
    each = copies if parting is None else 1
    before = None if start is None else start[1][list(which)]
    inputs = _padded(model, rows * each, None if before is None else before.repeat(each, 1))
    options = {"use_cache": keep_start} if start is None else {"past_key_values": _cache(start, which)}
    keep = keep or [1] * len(rows)
    most = max(keep)
    wanted = torch.arange(most, 0, -1) <= torch.tensor(keep * copies)[:, None]     # [copies x rows, most]
    with torch.no_grad():
        with model.trace(inputs, logits_to_keep=most, **options):
            for block in shifts if parting is None else range(parting, len(model.layers)):
                if parting is not None and block > parting:
                    args, kwargs = model.layers[block].inputs
                    model.layers[block].inputs = (args[0], *_repeated(args[1:], copies)), _repeated(kwargs, copies)
                if block == parting:
                    output = model.layers[block].output
                    h = residual(output).repeat(copies, 1, 1)
                    h += shifts[block].repeat_interleave(len(rows), 0)[:, None].to(h)
                    model.layers[block].output = (h, *output[1:]) if isinstance(output, tuple) else h
                elif block in shifts:
                    h = residual(model.layers[block].output)
                    h += shifts[block].repeat_interleave(len(rows), 0)[:, None].to(h)
            h = model.unembed.input             # the unembedding is a large matrix: only what is asked for goes through it
            model.unembed.input = h[:, -most:][wanted.to(h.device)][None]
            if keep_start:
                cache = model.output.past_key_values.save()
            logits = model.output.logits[0].float().save()
    kept = None
    if keep_start:
        kept = [(block.keys, block.values) for block in cache.layers], inputs["attention_mask"][:len(rows)]
    return logits.unflatten(0, (copies, -1)), kept


def _repeated(arguments, copies: int):
    """What a block is given beside the stream (mask, positions, rotary angles), its rows repeated; caches stay as they are."""
    if isinstance(arguments, torch.Tensor):
        return arguments.repeat(copies, *[1] * (arguments.dim() - 1)) if arguments.dim() > 1 else arguments
    if isinstance(arguments, dict):
        return {name: _repeated(value, copies) for name, value in arguments.items()}
    return tuple(_repeated(value, copies) for value in arguments) if isinstance(arguments, tuple) else arguments


def _abilities(model) -> tuple[bool, bool]:
    """Whether the model's blocks may go on with more rows than they began with, and whether it may go on from a start that it
    has read before. Tried once a model on a few tokens, against the plain way; what fails is not done, and it is said."""
    if model.abilities is None:
        [(_, model.abilities)] = _each_batch(model, _trial, (model.config.hidden_size,), lambda batch: {}, [[0]])
        lacks = [what for what, can in zip(("strengths cannot share the lower blocks", "prompts cannot share their beginning"),
                                           model.abilities) if not can]
        if lacks:
            print(f"{model.name}: {' and '.join(lacks)} ({type(model._module).__name__}); they are computed in full")
    return model.abilities


def _trial(model, width: int):
    rows = [[3, 4, 5, 6], [3, 4, 7]]
    shifts = {len(model.layers) // 2: torch.randn(2, width, generator=torch.Generator().manual_seed(0))}

    def agrees(plain, shared: bool, started: bool) -> bool:
        try:
            if started:
                start = _read(model, [rows[0][:2]], shifts, 2, shared, keep_start=True)[1]
                logits, _ = _read(model, [row[2:] for row in rows], shifts, 2, shared, None, start, [0, 0])
            else:
                logits, _ = _read(model, rows, shifts, 2, shared)
        except Exception:                       # any: a model's own forward decides what it cannot do
            return False
        close = 1e-3 if model.precision == "torch.float32" else 0.1
        return bool((logits - plain).abs().max() <= close * plain.std())

    def trial():
        plain, _ = _read(model, rows, shifts, 2, False)
        shared = agrees(plain, True, False)
        return shared, agrees(plain, shared, True)
    return trial


def _scorer(model, prefix: list[int], shifts: dict, copies: int, shared: bool, worth: float):
    """A function that scores one batch after another; the prefix that all rows begin with is read once, here."""
    whole = _read(model, [prefix], shifts, copies, shared, keep_start=True)[1] if prefix else None

    def score(rows, keep, starts, which, asked):
        start, of = whole, which if starts else [0] * len(rows)
        if starts:
            _, start = _read(model, starts, shifts, copies, shared, None, whole, [0] * len(starts), keep_start=True)
        if asked is None:
            return _read(model, rows, shifts, copies, shared, keep, start, of)[0]
        found = {}
        for part in _alike([len(row) for row in rows], worth / copies):
            logits, _ = _read(model, [rows[i] for i in part], shifts, copies, shared, [keep[i] for i in part], start,
                              [of[i] for i in part])
            sums, likeliest = _log_probabilities(logits, [asked[i] for i in part], [keep[i] for i in part])
            found.update({i: (sums[:, row], likeliest[:, row]) for row, i in enumerate(part)})
        return tuple(torch.stack(parts, 1) for parts in zip(*(found[i] for i in range(len(rows)))))
    return score


def _alike(lengths: list[int], worth: float) -> list[list[int]]:
    """Indices in parts of like length, each at least so many tokens if there are that many."""
    parts, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or lengths[i] < 0.85 * longest and len(parts[-1]) * longest > worth:
            parts.append([])
            longest = lengths[i]
        parts[-1].append(i)
    return parts


def _log_probabilities(logits: torch.Tensor, asked: list[list[list[int]]], keep: list[int]):
    """Of logits [T, N, V] of the last keep[i] positions of each row: the log-probability of the tokens that each candidate
    asked[i][c] has there at the end, and whether all of them are the likeliest: two tensors [T, rows, candidates]."""
    tokens = [[[-1] * (n - len(ids)) + list(ids) for ids in candidates] for candidates, n in zip(asked, keep)]
    asked = torch.cat([torch.tensor(row).T for row in tokens]).to(logits.device).expand(len(logits), -1, -1)
    picked = (logits.gather(-1, asked.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)).masked_fill(asked < 0, 0)
    other = (logits.argmax(-1, keepdim=True) != asked) & (asked >= 0)
    rows = torch.arange(len(keep), device=logits.device).repeat_interleave(torch.tensor(keep, device=logits.device))
    sums, others = (torch.zeros(len(logits), len(keep), asked.shape[-1], dtype=torch.float64, device=logits.device)
                    .index_add_(1, rows, values.double()) for values in (picked, other))
    return sums.float().cpu(), (others == 0).cpu()


def _scores(model, rows: list[list[int]], keep: list[int], transplants: list[Transplant], label: str | None,
            asked: list | None = None, starts: list[int] | None = None):
    """Yield (slice of `transplants`, indices of `rows`, scores of the last keep[i] positions of each), batch by batch: logits
    [T, N, V], row after row, or what _log_probabilities makes of them. asked[i][c]: tokens of candidate c at the end of row i.

    What can be shared is computed once: tokens that all rows begin with (a few-shot prefix), the first starts[i] tokens
    where several rows of a batch have the same (a question and its choices), and for all transplants the blocks below the
    first steered one."""
    shared, started = _abilities(model)
    if max(map(len, rows)) > _window(model.config):
        started = False                         # padding between a start and its rows would use the window up
    prefix = _common_prefix(rows, max(keep)) if started else 0
    starts = starts if started and starts else [prefix] * len(rows)
    own = [tuple(row[prefix:start]) for row, start in zip(rows, starts)]
    times = Counter(own)
    # Rows with one start go together: its length is what they are sorted by, and it costs each of them a share.
    like = [len(start) if start and times[start] > 1 else len(row) - prefix for row, start in zip(rows, own)]
    order = sorted(range(len(rows)), key=lambda i: (-like[i], own[i]))
    rows, keep, starts, own, like = ([each[i] for i in order] for each in (rows, keep, starts, own, like))
    asked = asked and [asked[i] for i in order]
    costs = [len(row) - prefix - len(start) * (1 - 1 / times[start]) for row, start in zip(rows, own)]

    def pack(batch):
        each = {start: number for number, start in enumerate(dict.fromkeys(own[i] for i in batch))}
        spared = sum(len(own[i]) for i in batch) - sum(map(len, each))
        pays = all(each) and 4 * spared > sum(len(rows[i]) - prefix for i in batch)
        return {"rows": [rows[i][starts[i] if pays else prefix:] for i in batch], "keep": [keep[i] for i in batch],
                "starts": [list(start) for start in each] if pays else [],
                "which": [each[own[i]] for i in batch] if pays else [],
                "asked": asked and [asked[i] for i in batch]}
    lengths = [len(row) for row in rows]
    group = max(1, min(len(transplants), model.batch_tokens // max(lengths)))
    for first in range(0, len(transplants), group):
        members = slice(first, first + group)
        copies = len(transplants[members])
        fixed = rows[0][:prefix], _shifts(model, transplants[members]), copies, shared, model.pass_tokens / 8
        # Full logits are some 100 MB a batch of a real vocabulary: from NDIF they come one by one.
        for batch, scores in _each_batch(model, _scorer, fixed, pack, _batches(model, lengths, copies, label, costs, like),
                                         1 if asked is None else None):
            finite = (scores if asked is None else scores[0]).isfinite().flatten(1).all(1)
            if not finite.all():
                _blame(model, [rows[i] for i in batch], transplants[members][finite.tolist().index(False)])
            yield members, [order[i] for i in batch], scores


def _common_prefix(ids: list[list[int]], keep: int) -> int:
    """Tokens that all rows share at their start, worth a cache of their own; 0 where it would not pay."""
    shortest = min(map(len, ids)) - keep
    shared = 0
    while shared < shortest and all(row[shared] == ids[0][shared] for row in ids):
        shared += 1
    return shared if shared >= 32 and len(ids) > 1 else 0


def _window(config) -> int:
    """The fewest tokens that any block looks back on. Padding between a kept prefix and the rows would use them up."""
    sizes = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    return min([size for size in sizes if size], default=sys.maxsize)


def same_vocabulary(tokenizers) -> bool:
    first, *others = [tokenizer.get_vocab() for tokenizer in tokenizers]
    return all(other == first for other in others)


def _require_same_vocabulary(models) -> None:
    if not same_vocabulary([model.tokenizer for model in models]):
        names = ", ".join(model.name for model in models)
        raise ValueError(f"EFT adds up logits token by token, but the vocabularies of {names} differ")


def _require_room(models, ids: list[list[int]], new_tokens: int = 0) -> None:
    for model in models:
        longest, limit = max(map(len, ids)) + new_tokens, context_length(model.config)
        if longest > limit:
            raise ValueError(f"{longest} tokens do not fit the context of {model.name} ({limit} tokens)")


class _EftProcessor:
    """Adds logits(chat) - logits(base) of two small models to each step of a target's generation; both keep a cache."""

    def __init__(self, chat, base, mask: torch.Tensor):
        self.small, self.mask, self.read = [(1, chat, {}), (-1, base, {})], mask, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.mask = torch.nn.functional.pad(self.mask, (0, ids.shape[1] - self.mask.shape[1]), value=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, self.read:]
        for sign, model, cache in self.small:
            device = model._module.device
            output = model._module(ids[:, self.read:].to(device), attention_mask=self.mask.to(device), use_cache=True,
                                   position_ids=positions.to(device), logits_to_keep=1, **cache)
            cache["past_key_values"] = output.past_key_values
            _require_finite(output.logits, f"the logits of {model.name} ({model.dtype})")
            width = min(scores.shape[-1], output.logits.shape[-1])      # rows of padding at the end of an unembedding
            scores = scores[:, :width] + sign * output.logits[:, -1, :width].to(scores)
        self.read = ids.shape[1]
        return scores


# ---------------------------------------------------------------- what is asked of a model


def next_token_logits(model, texts: list[str], transplants: list[Transplant] = (BASE,),
                      label: str = "next token") -> torch.Tensor:
    """Logits of the token after each text, under each transplant: [transplants, texts, vocabulary] float32 on the CPU."""
    return _next_logits(model, encode(model, texts), list(transplants), label)


def _next_logits(model, ids: list[list[int]], transplants: list[Transplant], label: str | None) -> torch.Tensor:
    result = None
    for members, batch, logits in _scores(model, ids, [1] * len(ids), transplants, label):
        if result is None:
            result = torch.empty(len(transplants), len(ids), logits.shape[-1])
        result[members, batch] = logits.cpu()
    return result


def choice_logprobs(model, pairs: list[tuple[str, str]], transplants: list[Transplant] = (BASE,), eft: tuple = (),
                    label: str = "choices") -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [nats] of each continuation given its context, and whether it is the greedy one.

    pairs: (context, continuation). Both are encoded together and split where the context's own tokens end; it is an
    error if they do not begin with those. eft: two models (small chat, small base) whose difference in logits is added
    to the model's at every token (emulated fine-tuning, proxy-tuning); all three need one vocabulary.
    Returns two tensors [transplants, pairs]: float32 sums, booleans."""
    contexts = encode(model, [context for context, _ in pairs])
    ids = encode(model, [context + text for context, text in pairs])
    for context, whole, pair in zip(contexts, ids, pairs):
        if whole[:len(context)] != context or len(whole) == len(context):
            raise ValueError(f"the tokens of context and continuation do not split at the context: {pair!r}")
    if eft:
        _require_same_vocabulary([model, *eft])
        _require_room(eft, ids)
    return _tail_logprobs(model, ids, [len(context) for context in contexts], list(transplants), label, eft)


def _tail_logprobs(model, ids: list[list[int]], heads: list[int], transplants: list[Transplant], label: str, eft: tuple = ()):
    """Sum of log-probabilities of each row's tokens after its first heads[i], and whether all of them are the likeliest."""
    total = torch.empty(len(transplants), len(ids))
    greedy = torch.empty(len(transplants), len(ids), dtype=torch.bool)
    rows, asked = [row[:-1] for row in ids], [[row[head:]] for row, head in zip(ids, heads)]
    keep, starts = [len(tokens) for tokens, in asked], [head - 1 for head in heads]
    if not eft:
        for members, batch, (sums, likeliest) in _scores(model, rows, keep, transplants, label, asked, starts):
            total[members, batch], greedy[members, batch] = sums[..., 0], likeliest[..., 0]
        return total, greedy
    for members, batch, logits in _scores(model, rows, keep, transplants, label, starts=starts):
        logits = list(logits.split([keep[i] for i in batch], 1))            # of each row [T, keep, V]
        for sign, small in zip((1, -1), eft):
            for _, some, difference in _scores(small, [rows[i] for i in batch], [keep[i] for i in batch], [BASE], None,
                                               starts=[starts[i] for i in batch]):
                for row, part in zip(some, difference.split([keep[batch[row]] for row in some], 1)):
                    width = min(logits[row].shape[-1], part.shape[-1])      # rows of padding at the end of an unembedding
                    logits[row] = logits[row][..., :width] + sign * part[..., :width].to(logits[row])
        sums, likeliest = _log_probabilities(torch.cat(logits, 1), [asked[i] for i in batch], [keep[i] for i in batch])
        total[members, batch], greedy[members, batch] = sums[..., 0], likeliest[..., 0]
    return total, greedy


def label_tokens(model, prompt: str, labels: list[str]) -> list[list[int]]:
    """The tokens of each label after the prompt, as many as tell all labels apart; one token as a rule."""
    start, *whole = encode(model, [prompt, *(f"{prompt} {label}" for label in labels)])
    words = [ids[len(start):] for ids in whole]
    if any(ids[:len(start)] != start for ids in whole):
        raise ValueError("a label changes the tokens of the prompt before it")
    size = next((n for n in range(1, max(map(len, words)) + 1)
                 if len({tuple(word[:n]) for word in words}) == len(words)), None)
    if size is None or any(len(word) < size and sum(other[:len(word)] == word for other in words) > 1 for word in words):
        raise ValueError(f"the labels {', '.join(labels)} cannot be told apart by their tokens")
    return [word[:size] for word in words]


def score_labels(model, prompts: list[str], labels: list[str], transplants: list[Transplant] = (BASE,),
                 label: str = "labels") -> tuple[torch.Tensor, torch.Tensor]:
    """Which label each prompt is continued with, under each transplant: two integer tensors [transplants, prompts].

    said: index of the label that the model's most likely next token begins, -1 for none (Token Acc). preferred: index
    of the label whose first token has the highest logit among the labels (Logit Acc). Where labels share their first
    token (a character-level tokenizer), as many tokens as tell them apart take its place, scored by log-probability."""
    words = label_tokens(model, prompts[0], labels)
    starts = sorted({tuple(word[:-1]) for word in words})       # [()] where one token tells the labels apart
    rows = [ids + list(start) for ids in encode(model, prompts) for start in starts]
    asked = [[word if tuple(word[:-1]) == start else [] for word in words] for _ in prompts for start in starts]
    total = torch.full((len(transplants), len(rows), len(labels)), -math.inf)
    greedy = torch.zeros(len(transplants), len(rows), len(labels), dtype=torch.bool)
    here = torch.tensor([[bool(tokens) for tokens in row] for row in asked])
    for members, batch, (sums, likeliest) in _scores(model, rows, [len(start) + 1 for _ in prompts for start in starts],
                                                     list(transplants), label, asked):
        total[members, batch] = sums.masked_fill(~here[batch], -math.inf)
        greedy[members, batch] = likeliest & here[batch]
    total = total.unflatten(1, (len(prompts), -1)).amax(2)      # each label is asked for after one of the starts
    greedy = greedy.unflatten(1, (len(prompts), -1)).any(2)
    return torch.where(greedy.any(-1), greedy.int().argmax(-1), -1), total.argmax(-1)


def generate(model, texts: list[str], transplant: Transplant = BASE, max_new_tokens: int = 32, sample: bool = False,
             temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, eft: tuple = (),
             label: str = "generate") -> list[str]:
    """The continuation of each text (without the text), every token of prompt and continuation steered.

    Greedy, or sampled with `seed`, which leaves torch's own random state alone (samples depend on how texts fall into
    batches). A row ends at the end-of-sequence token. eft: (small chat, small base) as in choice_logprobs; models on NDIF
    are then asked once a token, since the others answer between two of them."""
    if eft:
        _require_same_vocabulary([model, *eft])
    ids = encode(model, texts)
    _require_room([model, *eft], ids, max_new_tokens)
    shifts = _shifts(model, [transplant])
    # What the model folder sets for itself (top_k 50 where it says nothing, repetition penalties) is switched off.
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": model.tokenizer.pad_token_id, "do_sample": sample,
               "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
               "remove_invalid_values": True,           # NaN does not end a draw in a riddle: it is found, and blamed, below
               **({"temperature": temperature, "top_p": top_p, "top_k": 0} if sample else {})}
    result = [""] * len(texts)
    batches = _batches(model, [len(row) + max_new_tokens for row in ids], label=label, costs=[0.0] * len(ids))

    def pack(batch):
        return {"rows": [ids[i] for i in batch]}
    if eft and any(each.remote for each in (model, *eft)):
        written = ((batch, _eft_from_afar(model, transplant, eft, seed, options, **pack(batch))) for batch in batches)
    else:
        written = _each_batch(model, _writer, (shifts, options, seed, eft), pack, batches)
    for batch, new in written:
        if not isinstance(new, torch.Tensor):
            new, finite = new
            if not finite:                      # the likeliest of tokens without a probability would be some token, too
                _blame(model, [ids[i] for i in batch], transplant)
        for row, i in zip(new, batch):
            result[i] = model.tokenizer.decode(row, skip_special_tokens=True)
    return result


def _writer(model, shifts: dict, options: dict, seed: int, eft: tuple):
    """A function that continues one batch: new tokens [B, new], every token steered, and whether all logits were finite."""
    def write(rows):
        inputs = _padded(model, rows)
        inputs.pop("position_ids")              # generate makes its own from the mask
        small = {}
        if eft:
            small["logits_processor"] = [_EftProcessor(*eft, inputs["attention_mask"].to(model._module.device))]
        with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
            warnings.filterwarnings("ignore", message=".*was never reached.*")   # rows may end before max_new_tokens
            torch.manual_seed(seed)
            with model.generate(**options, **small) as tracer:
                with tracer.invoke(inputs):
                    finite = list().save()
                    for step in tracer.iter[:options["max_new_tokens"]]:
                        for layer, shift in shifts.items():
                            h = residual(model.layers[layer].output)
                            h += shift[:, None].to(h)
                        finite.append(model.unembed.output[:, -1].isfinite().all())
                with tracer.invoke():           # runs even when the loop above is cut short
                    new = tracer.result.save()
        return new[:, inputs["input_ids"].shape[1]:].cpu(), all(map(bool, finite))
    return write


def _eft_from_afar(model, transplant: Transplant, eft: tuple, seed: int, options: dict, rows: list[list[int]]) -> torch.Tensor:
    """What _writer does where the target or the small models are on NDIF: they are asked for their logits once a new token."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
    warp = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"]), TopPLogitsWarper(options["top_p"])]
                               if options["do_sample"] else [])
    inputs = _padded(model, rows)
    ids, width, ended = inputs["input_ids"], inputs["input_ids"].shape[1], torch.zeros(len(rows), dtype=torch.bool)
    ends = torch.tensor(model._module.generation_config.eos_token_id or [], dtype=torch.long)   # a model may have several
    small = None if any(each.remote for each in eft) else _EftProcessor(*eft, inputs["attention_mask"])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        while ids.shape[1] < width + options["max_new_tokens"] and not ended.all():
            whole = [[*row, *new] for row, new in zip(rows, ids[:, width:].tolist())]
            scores = _next_logits(model, whole, [transplant], None)[0]
            if small:
                scores = small(ids, scores)
            for sign, far in () if small else zip((1, -1), eft):
                more = _next_logits(far, whole, [BASE], None)[0]
                tokens = min(scores.shape[-1], more.shape[-1])      # rows of padding at the end of an unembedding
                scores = scores[:, :tokens] + sign * more[:, :tokens]
            scores = warp(ids, scores)
            new = torch.multinomial(scores.softmax(-1), 1)[:, 0] if options["do_sample"] else scores.argmax(-1)
            new = torch.where(ended, options["pad_token_id"], new)
            ended |= torch.isin(new, ends)
            ids = torch.cat([ids, new[:, None]], 1)
    return ids[:, width:]


def perplexity(model, texts: list[str], transplants: list[Transplant] = (BASE,), window: int | None = None,
               label: str = "perplexity") -> tuple[torch.Tensor, int]:
    """Perplexity of the texts under each transplant [transplants], and the number of tokens it is taken over.

    A text longer than `window` tokens (default: the context, at most 1,024) is read in windows that overlap by half;
    each token but a text's first is counted once, with all the context that its window has."""
    window = window or min(context_length(model.config), 1024)
    if window < 2:
        raise ValueError("a window of fewer than 2 tokens predicts nothing")
    rows, heads = [], []
    for ids in model.tokenizer(list(texts)).input_ids:
        end = min(window, len(ids))
        if end > 1:
            rows.append(ids[:end]), heads.append(1)
        while end < len(ids):
            heads.append(window - min(window // 2, len(ids) - end))
            end += window - heads[-1]
            rows.append(ids[end - window:end])
    if not rows:
        raise ValueError("no text has two tokens or more, so there is nothing to predict")
    total, _ = _tail_logprobs(model, rows, heads, list(transplants), label)
    tokens = sum(map(len, rows)) - sum(heads)
    return (-total.double().sum(1) / tokens).exp(), tokens


def logit_lens(model, texts: list[str], layer: int, transplants: list[Transplant] = (BASE,),
               label: str = "logit lens") -> torch.Tensor:
    """Token probabilities [transplants, texts, vocabulary] read off the residual stream after block `layer`, last token:
    final norm and unembedding applied there, the rest of the model skipped (App. B.3)."""
    states = torch.stack([hidden_states(model, texts, [layer], transplant, label)[:, 0] for transplant in transplants])
    result = None
    batches = _batches(model, [1] * len(texts), len(states))
    for batch, probabilities in _each_batch(model, _lens, (layer, encode(model, texts[:1])),
                                            lambda batch: {"moved": states[:, batch]}, batches):
        result = torch.empty(*states.shape[:2], probabilities.shape[-1]) if result is None else result
        result[:, batch] = probabilities
    _require_finite(result, f"the logit lens after block {layer} of {model.name} ({model.dtype})")
    return result


def _lens(model, layer: int, rows: list[list[int]]):
    """A function that reads token probabilities off hidden states [transplants, B, d]."""
    def probabilities(moved):
        with torch.no_grad():
            with model.trace(_padded(model, rows), use_cache=False, logits_to_keep=1) as tracer:
                h = residual(model.layers[layer].output)        # the norm comes after this block, on its device
                found = model.unembed(model.final_norm(moved.to(h))).float().softmax(-1).cpu().save()
                if not model.remote:
                    tracer.stop()
        return found
    return probabilities


# ================================================================ 9  Records

RECORD = ["experiment", "item", "source", "target", "concept", "method", "layer", "alpha", "split", "metric", "value",
          "low", "high", "n", "paper"]


def record(**fields) -> dict:
    """One number with what it is about. Rates are fractions; α = 0 is method `base`; `paper` is the paper's number."""
    if unknown := set(fields) - set(RECORD):
        raise ValueError(f"unknown record fields {sorted(unknown)}")
    return {name: fields.get(name) for name in RECORD}


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a rate (Wilson score)."""
    if not n:
        return 0.0, 1.0
    rate, z2n = successes / n, z * z / n
    middle, half = (rate + z2n / 2) / (1 + z2n), z * math.sqrt(rate * (1 - rate) / n + z2n / (4 * n)) / (1 + z2n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(before, after) -> float:
    """Exact two-sided p of a paired difference between two lists of booleans about the same items."""
    before, after = (np.asarray(list(answers), bool) for answers in (before, after))
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n) if n else 1.0


def bootstrap(values, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean, by drawing the items again."""
    values = np.asarray(values, float)
    means = values[np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))].mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def percentile(value: float, among) -> float:
    """Share [%] of `among` that lies below `value`, ties counted half."""
    value, among = float(value), np.asarray(list(among), float)
    return float(100 * ((among < value).mean() + (among == value).mean() / 2))


def markdown(header: list[str], rows: list[list]) -> str:
    """A table that reads well both as text and as Markdown."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class Run:
    """The folder of one run, named by its arguments, so that the same command continues it where it stopped.

        run = Run("exp_emotion", args, inputs)      inputs: what the numbers depend on beside the arguments
        result = run.step("steer llama-m", lambda: …)      computed once, then read back; any JSON value
        run.save(records, examples, tables), run.figure(figure, "figure_2a")"""

    def __init__(self, script: str, args: argparse.Namespace, inputs: dict, aside: tuple[str, ...] = ()):
        # aside: options that change no step's result, so that the folder can go on without or with them
        settings = {name: [str(v) for v in value] if isinstance(value, list) and name != "alpha" else
                    str(value) if isinstance(value, Path) else value
                    for name, value in sorted(vars(args).items())
                    if name not in ("command", "out", "fresh", "replay", "no_cache", *aside)}
        inputs = json.loads(json.dumps(inputs))             # as they will be read back
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        short = [re.sub(r"[^\w.-]", "-", Path(name).name) for name in [args.src, *args.tgt]]
        self.folder = args.out / script / f"{short[0]}--{'+'.join(short[1:])[:120]}--{digest}"
        self.steps = self.folder / "steps"
        if args.fresh and self.steps.exists():
            for path in self.steps.iterdir():
                path.unlink()
        stamp = self.folder / "args.json"
        begun = stamp.exists() and any(path.suffix != ".tmp" for path in self.steps.glob("*"))
        if begun and self._read(stamp, lambda path: json.loads(path.read_text())["inputs"]) != inputs:
            fail(f"models or data have changed since {self.folder} was begun; --fresh starts it over")
        try:
            self.steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make the run folder {self.folder}: {error.strerror}")
        about = {"command": [script, *args.command], "folder": os.getcwd(), "args": settings, "inputs": inputs}
        self._write("args.json", json.dumps(about, indent=1) + "\n")
        self._write("environment.json", json.dumps(environment(), indent=1) + "\n")

    def step(self, name: str, compute):
        """compute()'s value, which must be JSON, from the run folder if an earlier run got that far."""
        path = self._step_file(name, "json")
        if not path.exists():
            content = json.dumps(compute())
            write_whole(path, lambda file: file.write(content.encode()))
        return self._read(path, lambda path: json.loads(path.read_text()))

    def tensors(self, name: str, compute) -> dict[str, torch.Tensor]:
        """As step, for a dictionary of tensors: what a model that is finished with has left."""
        from safetensors.torch import load, save
        path = self._step_file(name, "safetensors")
        if not path.exists():
            content = save({key: value.contiguous() for key, value in compute().items()})
            write_whole(path, lambda file: file.write(content))
        return self._read(path, lambda path: load(path.read_bytes()))

    @staticmethod
    def _read(path: Path, read):
        """What a file of the run folder says. Nothing here writes half a file, so a damaged one is somebody's question."""
        try:
            return read(path)
        except Exception as error:              # each format has its own
            fail(f"{path} is damaged ({type(error).__name__}: {error}); remove it to have it computed again")

    def _step_file(self, name: str, suffix: str) -> Path:
        short = re.sub(r"[^\w.-]+", "-", name)[:60]        # two names may shorten to one
        return self.steps / f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.{suffix}"

    def _write(self, name: str, text: str) -> None:
        write_whole(self.folder / name, lambda file: file.write(text.encode()))

    def save(self, records: list[dict], examples: list[dict], tables: str) -> None:
        """Write records.csv, records.jsonl, examples.jsonl and tables.md; print the tables and the folder."""
        for name, rows in (("records.jsonl", records), ("examples.jsonl", examples)):
            self._write(name, "".join(json.dumps(row) + "\n" for row in rows))
        self._write("tables.md", tables + "\n")

        def write_csv(file):
            text = io.StringIO()
            rows = csv.DictWriter(text, RECORD, lineterminator="\n")
            rows.writeheader(), rows.writerows(records)
            file.write(text.getvalue().encode())
        write_whole(self.folder / "records.csv", write_csv)
        print(f"\n{tables}\n\n{self.folder}")
        if TRAFFIC["requests"]:
            self._write("ndif.json", json.dumps(TRAFFIC, indent=1) + "\n")
            print("NDIF, in this go: " + ", ".join(f"{value:.0f} {name}" for name, value in TRAFFIC.items()))

    def figure(self, figure, name: str) -> None:
        """Save a matplotlib figure as PNG and PDF, and close it."""
        import matplotlib.pyplot as plt
        for suffix in ("png", "pdf"):
            write_whole(self.folder / f"{name}.{suffix}",
                        lambda file: figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight"))
        plt.close(figure)


def environment() -> dict:
    """Versions, commit and hardware: what somebody needs to get the same numbers."""
    from importlib.metadata import version
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:                             # no git here
        commit = ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"commit": commit or "unknown", "python": platform.python_version(), "machine": platform.machine(),
            "cores": os.cpu_count(), "gpus": gpus,
            **{name: version(name) for name in ("torch", "transformers", "nnsight", "numpy", "scikit-learn")}}


def save_concept(path: Path, vector: torch.Tensor, **about) -> None:
    """Write a concept vector [d] as safetensors that says what it is.

    about: concept, source, target, fingerprint of the target, layer, method, pairs, first_prompt, r2, cosine …"""
    from safetensors.torch import save
    missing = {"concept", "source", "target", "fingerprint", "layer", "method", "pairs", "first_prompt"} - set(about)
    if missing:
        raise ValueError(f"a concept vector must say what it is; missing: {', '.join(sorted(missing))}")
    about = {"site": "residual stream after the block", "token": "last", "sign": "positive minus negative", **about}
    content = save({"vector": vector.float().contiguous()}, {"concept_vector": json.dumps(about)})
    write_whole(path, lambda file: file.write(content))


def load_concept(path: Path, model=None) -> tuple[torch.Tensor, dict]:
    """(vector [d], what it says of itself). With a model, refuses a vector that was made for another one."""
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        if "concept_vector" not in (file.metadata() or {}):
            raise ValueError(f"{path} is not a concept vector: it does not say what it is")
        vector, about = file.get_tensor("vector"), json.loads(file.metadata()["concept_vector"])
    if model is not None and about["fingerprint"] != model.fingerprint:
        raise ValueError(f"{path} was made for {about['target']} ({about['fingerprint']}), "
                         f"not for {model.name} ({model.fingerprint})")
    return vector, about


def export_steered(path: Path, model, vector: torch.Tensor, layer: int, alpha: float) -> None:
    """Write vector [d] for lm-evaluation-harness: `lm_eval --model steered --model_args pretrained=…,steer_path=PATH`.

    PATH must end in .pt. Its hook adds steering_coefficient (our α, not folded in) times steering_vector to a module's output
    at every position, which is Eq. 3. It names modules from the base model on: model.layers.6 of a Llama is layers.6."""
    _require_block(model, layer)
    block = model.layers[layer]._module
    name = next(name for name, module in model._module.base_model.named_modules() if module is block)
    content = {name: {"steering_vector": vector.float().cpu().clone(), "steering_coefficient": float(alpha), "action": "add",
                      "bias": None, "head_index": None}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(content, file))


def export_gguf(path: Path, model, vector: torch.Tensor, layer: int, alpha: float) -> None:
    """Write alpha * vector [d] as a control vector of llama.cpp: --control-vector PATH, --control-vector-scaled PATH:S.

    The format has no strength of its own, so α is folded in; S multiplies what is there. llama.cpp counts blocks from 0, as
    we do, and adds direction.N to the output of block N, at every position: its loader (common_control_vector_load_one) puts
    direction.N into row N - 1 of a buffer, and llama_adapter_cvec::apply gives block il row il - 1. So block 0 has none, and
    blocks that the file does not name stay as they are."""
    from gguf import GGUFWriter
    _require_block(model, layer)
    if layer == 0:
        raise ValueError("llama.cpp has no control vector after block 0; take a later block")
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file):
        writer = GGUFWriter(file.name, "controlvector")     # opens the file again, by its name
        writer.add_string("controlvector.model_hint", model.config.model_type)
        writer.add_int32("controlvector.layer_count", 1)    # directions in the file; llama.cpp's generator counts so
        writer.add_tensor(f"direction.{layer}", (alpha * vector.float().cpu()).numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
    write_whole(path, write)


# ================================================================ the cache, from the command line


def show_cache(argv: list[str] | None = None) -> None:
    parser = Parser(description="The cache of hidden states and of NDIF's answers. CONTRANS_CACHE names its folder.")
    parser.add_argument("--clear", action="store_true", help="delete it; whatever is needed is computed again")
    clear = parser.parse_args(argv).clear
    for kind in ("states", "ndif"):
        files = list(CACHE.glob(f"{kind}-*"))
        print(f"{CACHE}: {len(files)} files of {kind}, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
              + (", deleted" if clear else ""))
        for path in files if clear else ():
            path.unlink()


if __name__ == "__main__":
    show_cache()
