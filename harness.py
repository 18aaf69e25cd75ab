"""The workshop around common.py: what every experiment script needs beside the method.

1  Options     of all scripts; bad input ends with one line and exit code 2
2  Files       read with errors that name file and line; written whole or not at all
3  NDIF        checks before any work; how a job is sent and retried
4  Runs        a folder for each run: steps that are computed once, and the report
5  Vectors     concept vectors on disk, and in the formats of other programs
6  Side by side

    python harness.py runs [FOLDER]    the runs in a folder of results, and what they found
    python harness.py compare A B      two run folders side by side
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

from report import RECORD, cell, html, label, markdown, select

from tqdm import tqdm

# Read when torch is imported: how long its threads spin while they wait for each other. By default
# so long that beside another busy process small models run at a tenth of their speed.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

ROOT = Path(os.path.relpath(Path(__file__).resolve().parent))
TOY = ROOT / "data" / "toy"
MODELS = ROOT / "data" / "models.csv"
HOSTED_NDIF = "https://api.ndif.us"
BATCH_TOKENS = 4096  # of one forward pass; more are no faster on a CPU
CACHE = {"folder": os.environ.get("CONTRANS_CACHE") or ROOT / "cache"}
DRY_RUN = {"folder": None}  # temporary, the only one that a dry run writes to

# ================================================================ 1  Options


def fail(message: str):
    """End the program with one line that says what is wrong and what to do, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main) -> None:
    """Run a script's main; Ctrl-C and NaN end with one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None
    except FloatingPointError as error:
        fail(str(error))


def folder_path(text: str) -> Path:
    """An option type: a folder that exists or can be made."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return Path(text)


def at_least(lowest: int):
    """An option type: a whole number, not below `lowest`."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} must be at least {lowest}")
        return int(text)

    return integer


def _number(text: str) -> float:
    """An option type: a finite number."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return float(text)


def share(text: str) -> float:
    """An option type: a number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more and less than 1")
    return float(text)


def _not_negative(text: str) -> float:
    """An option type: a finite number, 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number, 0 or more")
    return float(text)


def _strength(text: str) -> float:
    if _number(text) == 0:
        raise argparse.ArgumentTypeError("0 is the baseline, which is always there")
    return float(text)


def _layer(text: str) -> str:
    depth = r"(\d{1,9}|\d{0,9}\.\d{1,99})"
    if not re.fullmatch(rf"auto|{depth}(,{depth})?", text):
        message = (
            f"{text}: an index (24), a fraction of depth (0.75), SOURCE,TARGET (24,30) or auto"
        )
        raise argparse.ArgumentTypeError(message)
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(f"{message} (see python {self.prog} --help)")


def read_families(kind: str, settings: dict, **own: dict) -> dict[str, dict]:
    """{family: settings} of the families in data/models.csv that a script can use.

    kind: which models a script takes. "base": the smallest base model is the source, the others are
    targets. "chat": likewise, but the source is the smallest chat model, and the targets have chat
    models, too. "sizes": all base models are --models. "checkpoints": the rows with training
    tokens. settings: of every family, and of the user's models ("custom"). own: of one family."""
    rows = read_table(MODELS, "family", "base", "chat", "tags", "tokens")
    families = {"toy": {}}
    for name in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == name]
        mine = [row for row in mine if bool(row["tokens"]) == (kind == "checkpoints")]
        bases = [_model_id(row["base"]) for row in mine]
        chats = [_model_id(row["chat"]) for row in mine]
        if name == "table 3" or len(mine) < 2 or (kind == "chat" and not chats[0]):
            continue
        of_chat = {"src": chats[0], "src_base": bases[0], "tgt": bases[1:]}
        of_chat["tgt_chat"] = [chat or "none" for chat in chats[1:]]
        of_chat["tags"] = mine[0]["tags"]
        families[name] = {
            "base": {"src": bases[0], "tgt": bases[1:]},
            "chat": of_chat,
            "sizes": {"models": bases},
            "checkpoints": {"tgt": bases},
        }[kind]
    for name, models in families.items():
        families[name] = settings | models | own.get(name, {})
    return families | {"custom": settings}


def _model_id(name: str) -> str:
    """A hub id, or the path of a folder in data/."""
    return str(ROOT / name) if name.startswith("data/") else name


def paper_names(toy: str) -> dict[str, str]:
    """{model: what the paper calls it}; the toy models stand for those of the family `toy`."""
    rows = read_table(MODELS, "family", "base", "chat", "paper", "paper_chat")
    places = [row for row in rows if row["family"] == "toy"]
    like = [row for row in rows if row["family"] == toy]
    names = [(each["base"], row["paper"]) for each, row in zip(places, like)]
    names += [(each["chat"], row["paper_chat"]) for each, row in zip(places, like)]
    names += [(row["base"], row["paper"]) for row in rows]
    names += [(row["chat"], row["paper_chat"]) for row in rows]
    return {_model_id(model): name for model, name in names if model and name}


def option_parser(
    doc: str,
    families: dict,
    models=("src", "src-base", "tgt", "tgt-chat"),
) -> _Parser:
    """The options of every script; models: which of the four it has.

    `families` maps a name to settings: values of src, tgt, layer, alpha …"""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=families, help="models and settings, see data/models.csv")
    texts = {
        "src": "source model that the concept is refined in: hub id or folder, REPO@REVISION",
        "src-base": "base model of the source, for the affine map (default: --src)",
        "tgt": "target base models",
        "tgt-chat": "aligned models of the targets, in the same order; none where there is none",
    }
    for name in models:
        several = {"nargs": "+"} if name.startswith("tgt") else {}
        add(f"--{name}", metavar="MODEL", help=texts[name], **several)
    add("--layer", type=_layer, metavar="K", help="block: index, fraction, SOURCE,TARGET, or auto")
    add("--alpha", type=_strength, nargs="+", metavar="A", help="steering strengths to choose from")
    _add_map_options(add)
    add("--maps", type=at_least(1), default=5, help="maps on disjoint samples of the text")
    add("--random", type=at_least(1), default=20, help="random directions, as controls")
    add("--permutations", type=at_least(0), default=199, help="vectors of permuted labels")
    add("--data", type=Path, metavar="FOLDER", default=TOY, help="e.g. data/paper")
    add("--limit", type=int, help="at most so many test items (TruthfulQA: in both parts); -1: all")
    add("--seed", type=at_least(0), default=0, help="of shuffles, random directions, sampling")
    _add_machine_options(add)
    return parser


def _add_map_options(add) -> None:
    """How the affine map is fitted."""
    add(
        "--map",
        choices=["both", "paper", "local"],
        default="both",
        help="paper: fitted on ends of sentences; local: near where v is read (docs/map.md)",
    )
    add(
        "--texts",
        type=Path,
        metavar="FILE",
        help="plain text for maps and perplexity: one text a line, or .jsonl with text",
    )
    add("--refine", choices=["mean", "pca", "probe"], default="mean", help="paper: mean (Eq. 1)")
    add(
        "--sentences",
        type=at_least(10),
        metavar="N",
        help="plain sentences of one affine map; 80 %% fit it, 20 %% test it (paper: 2000)",
    )
    add("--intercept", action="store_true", help="paper's map with an intercept (paper: without)")
    add(
        "--ridge",
        type=_not_negative,
        default=0.0,
        help="paper's map: ridge in units of the mean squared singular value (paper: 0)",
    )


def _add_machine_options(add) -> None:
    """Where and how the models run, and where results go."""
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "nf4", "int8"],
        help="auto: float32 on a CPU, bfloat16 on a GPU; nf4 and int8 need bitsandbytes",
    )
    add("--device", default="auto", help="auto (all GPUs), cpu, cuda, cuda:1 …")
    add(
        "--remote",
        nargs="?",
        const="target",
        choices=["target", "both"],
        help="run the targets, or source and targets, on NDIF (key: NDIF_API_KEY)",
    )
    add("--ndif-host", metavar="URL", default=os.environ.get("NDIF_HOST", HOSTED_NDIF))
    add(
        "--batch-tokens",
        type=at_least(1),
        default=BATCH_TOKENS,
        metavar="N",
        help="tokens computed in one forward pass; lower it when memory runs out",
    )
    add("--out", type=Path, default=Path("results"), metavar="FOLDER", help="where run folders go")
    add("--fresh", action="store_true", help="start over instead of continuing an earlier run")
    add("--dry-run", action="store_true", help="only say what it would cost; needs no weights")
    add("--quiet", action="store_true", help="no progress, only the result")
    add("--no-cache", action="store_true", help="neither read nor write cached hidden states")
    add("--allow-pickle", action="store_true", help="load weights that can run any code")
    add("--trust-remote-code", action="store_true", help="run Python that comes with a model")


def parse_options(
    parser: _Parser,
    families: dict,
    argv: list[str] | None = None,
    complete=lambda args: None,
    paper: dict = {},
):
    """Parse the command line, fill in the family's settings, and refuse what cannot work.

    Loads no model. The user's models (--src, --tgt, --models …) take the settings of "custom".
    complete(args): sets src and tgt in a script that has other options for its models.
    paper: settings of --protocol paper, which override the family's."""
    args = parser.parse_args(argv)
    is_mapped = hasattr(args, "src_base")  # a script with one source and its targets
    words = sys.argv[1:] if argv is None else argv
    args.command = [Path(parser.prog).name, *words]
    given = [name for name in ("src", "tgt", "models", "model") if getattr(args, name, None)]
    args.family = args.family or ("custom" if given else "toy")
    settings = dict(families[args.family])
    if getattr(args, "protocol", None) == "paper":
        settings |= paper
        if args.map == "local":
            fail("--protocol paper has the paper's map alone; leave out --map local")
        args.map = "paper"
    if "src" in given:
        settings.pop("src_base", None)  # the family's partner does not go with another model
    if "tgt" in given:
        settings.pop("tgt_chat", None)
    for name, value in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    complete(args)
    _require_models(args)
    if args.map == "local" and (args.intercept or args.ridge):
        fail("--intercept and --ridge change the paper's map, not --map local")
    if is_mapped and args.src_base in args.tgt:
        fail(f"{args.src_base} is source and target; its own vector is the row Self-Align")
    if args.refine != "mean" and args.permutations:
        print(f"note: no vectors of permuted labels with --refine {args.refine}: they are means")
        args.permutations = 0
    args.alpha = list(dict.fromkeys(args.alpha))
    if args.limit == 0 or args.limit < -1:
        fail("--limit must be at least 1, or -1 for all")
    if args.seed >= 2**32:  # what all generators take
        fail("--seed must be less than 2**32")
    if not args.data.is_dir():
        fail(f"no data folder {args.data}; python data/prepare.py makes data/paper")
    args.texts = args.texts or args.data / "wikisplit" / "validation.tsv"
    if (args.sentences or 100) < 100:
        n = args.sentences - int(args.sentences * 0.2)
        print(f"note: {n} sentences fit each affine map, which says little (paper: 1600)")
    if args.dtype in ("nf4", "int8") and not importlib.util.find_spec("bitsandbytes"):
        fail(f"--dtype {args.dtype} needs bitsandbytes: pip install bitsandbytes")
    folder = os.environ.get("CONTRANS_CACHE") or ROOT / "cache"
    DRY_RUN["folder"] = tempfile.TemporaryDirectory() if args.dry_run else None
    if args.dry_run:
        args.out = folder = Path(DRY_RUN["folder"].name)
    CACHE["folder"] = None if args.no_cache else folder
    PROGRESS["quiet"] = args.quiet or args.dry_run
    return args


def _require_models(args) -> None:
    """Complete src_base and tgt_chat, and refuse models that do not go together."""
    if not (args.src and args.tgt):
        fail("--src and --tgt go together; or name a --family that has both")
    args.src_base = getattr(args, "src_base", None) or args.src
    if len({Path(name).name for name in args.tgt}) < len(args.tgt):
        fail("two target models have one name; run them one by one")
    chats = getattr(args, "tgt_chat", None) or ["none"] * len(args.tgt)
    if len(chats) != len(args.tgt):
        fail(f"{len(chats)} --tgt-chat models for {len(args.tgt)} --tgt models: give one each")
    args.tgt_chat = [None if name == "none" else name for name in chats]


def model_options(args) -> dict:
    """The options about loading models, as arguments of models.Models; checks NDIF."""
    remote = []
    if args.remote:
        remote = [*args.tgt, *args.tgt_chat]
        if args.remote == "both":
            remote += [args.src, args.src_base]
        remote = [name for name in dict.fromkeys(remote) if name]
        args.ndif_host = args.ndif_host.rstrip("/")
        if not args.dry_run:
            _check_ndif(args.ndif_host, remote)
    return {
        "remote": remote,
        "host": args.ndif_host,
        "allow_pickle": args.allow_pickle or args.dry_run,
        "trust_remote_code": args.trust_remote_code,
        "dtype": args.dtype,
        "device": "cpu" if args.dry_run else args.device,
        "batch_tokens": args.batch_tokens,
        "dry_run": args.dry_run,
    }


def map_methods(args) -> list[str]:
    """The methods of --map: "contrans" is the paper's map, "contrans-local" ours."""
    if args.map == "paper":
        return ["contrans"]
    return ["contrans-local"] if args.map == "local" else ["contrans", "contrans-local"]


def map_options(args) -> dict:
    """The options about maps, as arguments of vectors.Vectors."""
    return {
        "n_sentences": args.sentences,
        "where_read": args.map != "paper",
        "intercept": args.intercept,
        "ridge": args.ridge,
    }


# ================================================================ 2  Files


def read_text(path: Path) -> str:
    """A UTF-8 text file without its byte-order mark."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        fail(f"no file {path}; python data/prepare.py fetches it")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        fail(f"{path}, line {line}: not UTF-8 ({error.reason})")


def read_json(path: Path):
    """The content of a JSON file."""
    text = read_text(path)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates cannot be encoded
        return value
    except json.JSONDecodeError as error:
        fail(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: unusable JSON ({error})")


def read_scenarios(folder: Path) -> list[tuple[str, str]]:
    """Up to 100 pairs of a happy and a sad scenario: another concept, as a control."""
    happy = read_texts(folder / "emotions" / "happiness.json")
    sad = read_texts(folder / "emotions" / "sadness.json")
    return list(zip(happy[:100], sad))


def read_texts(path: Path) -> list[str]:
    """The texts of a JSON list, stripped, duplicates dropped."""
    texts = read_json(path)
    if not isinstance(texts, list) or not texts:
        fail(f"{path} must be a JSON list of texts, and not empty")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            fail(f"{path}, text {index}: {text!r} is not a text")
    return list(dict.fromkeys(text.strip() for text in texts))


def read_pairs(path: Path, seed: int, limit: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(pairs, test) of a .jsonl file with {"positive": text, "negative": text} on each line: a
    random half of the pairs, and negatives of the other half that are in none of them, at most
    `limit` (-1: all)."""
    pairs = []
    for number, line in enumerate(read_text(path).rstrip().split("\n"), 1):
        try:
            item = json.loads(line)
            pairs.append((item["positive"].strip(), item["negative"].strip()))
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f'{path}, line {number}: must be {{"positive": text, "negative": text}}')
    if len(pairs) < 20 or not all(text for pair in pairs for text in pair):
        fail(f"{path}: at least 20 pairs are needed, and no text may be empty")
    pairs = random.Random(seed).sample(pairs, len(pairs))
    half = len(pairs) // 2
    used = {text for pair in pairs[:half] for text in pair}
    test = dict.fromkeys(negative for _, negative in pairs[half:] if negative not in used)
    if not test:
        fail(f"{path} repeats its negatives: none is left for the test")
    return pairs[:half], list(test)[: limit if limit > 0 else None]


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file that has at least these columns."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        fail(f"{path}, line {reader.reader.line_num}: not CSV ({error})")
    if not set(columns) <= set(reader.fieldnames or []):
        fail(f"{path}, line 1: must have the columns {', '.join(columns)}")
    for index, row in enumerate(rows, 1):
        if None in row or None in row.values():
            fail(f"{path}, row {index}: not as many cells as the first line has")
    return rows


def add_paper_numbers(records: list[dict], names: dict[str, str]) -> None:
    """Set `paper` from data/paper.csv. names: what the paper calls our models.

    An empty cell of the file matches anything; the first row that matches is taken."""
    known: dict[str, list[tuple]] = {}  # of each item
    for row in read_table(Path(__file__).with_name("data") / "paper.csv", "item", "value"):
        value = float(row.pop("value"))
        wanted = {key: cell for key, cell in row.items() if cell}
        known.setdefault(row["item"], []).append((wanted, value))
    for each in records:
        if each["group"] or each["part"] == "validation":
            continue  # the paper has no such numbers
        ours = dict(each)
        for role in ("source", "target"):
            ours[role] = names.get(each[role], each[role])
        for wanted, value in known.get(each["item"], []):
            if all(_same(ours[key], cell) for key, cell in wanted.items()):
                each["paper"] = value
                break


def _same(ours, cell: str) -> bool:
    if isinstance(ours, (int, float)):
        return cell != "-" and float(cell) == ours
    return cell == (ours or "-")


def _write_file(path: Path, content) -> None:
    """Write text, bytes, or what content(file) writes; the file appears when it is complete."""
    if DRY_RUN["folder"] and Path(DRY_RUN["folder"].name) not in path.parents:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"no space left for {path}; free some and run the same command again")
        fail(f"cannot write {path}: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):  # a read-only folder
            temporary.unlink(missing_ok=True)


def _digest(value) -> str:
    """A hash of nested lists, dictionaries, numbers, texts and tensors."""
    import torch

    result = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            result.update(f"{value.dtype}{tuple(value.shape)}".encode())
            result.update(value.contiguous().cpu().numpy().tobytes())
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, (list, tuple)):
            result.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            result.update(f"{type(value).__name__} {value!r};".encode())

    add(value)
    return result.hexdigest()[:32]


def cached(kind: str, about, compute):
    """compute()'s tensors, from the cache folder if they were computed before.

    about: everything that they depend on. A file that cannot be read is computed again."""
    import torch

    path = _cache_path(kind, about)
    if path is None:
        return compute()
    if path.exists():
        try:
            return torch.load(path, mmap=True)
        except Exception as error:  # whatever damaged the file
            print(f"{path} is damaged ({type(error).__name__}): computed again", file=sys.stderr)
    value = compute()
    _write_file(path, lambda file: torch.save(value, file))
    return value


def is_cached(kind: str, about) -> bool:
    path = _cache_path(kind, about)
    return path is not None and path.exists()


def _cache_path(kind: str, about) -> Path | None:
    """Where cached tensors are; None with --no-cache."""
    if CACHE["folder"] is None:
        return None
    packages = [version(name) for name in ("torch", "transformers", "nnsight")]
    return Path(CACHE["folder"]) / f"{kind}-{_digest([packages, about])}.pt"


# ================================================================ 3  NDIF

RETRY_SECONDS = [1, 2, 4, 8, 16, 32, 64]  # before a job that failed is sent again
NDIF_STATS = {"requests": 0, "failed": 0, "from cache": 0}


def _check_ndif(host: str, names: list[str]) -> None:
    """Check key, server, versions and models, before any work."""
    import httpx

    if not os.environ.get("NDIF_API_KEY"):
        fail("--remote needs a key in NDIF_API_KEY; https://login.ndif.us gives one")
    if not re.match("https?://", host):
        fail(f"--ndif-host {host}: it must begin with http:// or https://")
    for name in names:
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", name):
            fail(f"--remote: NDIF knows hub ids like meta-llama/Llama-3.1-70B, not {name}")
    try:
        status, server = [
            httpx.get(f"{host}/{page}", timeout=60).raise_for_status().json()
            for page in ("status", "env")
        ]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        fail(f"no NDIF at {host}: {error}; see https://nnsight.net/status")
    for package in ("nnsight", "transformers"):
        theirs = server.get("packages", {}).get(package)
        if theirs != version(package):
            advice = f"pip install {package}=={theirs}"
            fail(f"NDIF runs {package} {theirs}, you have {version(package)}: {advice}")
    running, listed = set(), set()
    for model in status.get("deployments", {}).values():
        if "repo_id" in model:
            full = f"{model['repo_id']}@{model.get('revision') or 'main'}"
            listed.add(full)
            if model.get("application_state") == "RUNNING":
                running.add(full)
    for name in names:
        full = name if "@" in name else f"{name}@main"
        if full not in listed and host == HOSTED_NDIF:  # another server deploys any model
            up = ", ".join(sorted(each.removesuffix("@main") for each in running))
            fail(
                f"{name} is not on NDIF; these run: {up or 'none'}; see https://nnsight.net/status"
            )
        if full not in running:
            print(f"{name} does not run on {host} yet: the first job waits until it is deployed")


def ask_ndif(nn, host: str, make, fixed: tuple, packs: list[dict], about: list):
    """Send [make(nn, *fixed)(**pack) for pack in packs] to the server as one job.

    Returns a function that waits for the answers, so that the next job can be sent while this one
    runs. make is sent as source text with everything it calls. A failed job is sent again; answers
    are cached and never asked for twice. The function raises TimeoutError or torch.OutOfMemoryError
    if the job is too large."""
    key = [*about, make.__name__, fixed, packs]
    send = functools.partial(_send, nn, host, make, fixed, packs)
    wait = None if is_cached("ndif", key) else send()
    NDIF_STATS["from cache"] += wait is None
    return lambda: cached("ndif", key, lambda: _await_answers(host, wait or send(), send))


def _await_answers(host: str, wait, send) -> list:
    """The answers that wait() gives; if its job fails, those of a new one from send()."""
    import httpx
    import torch
    from nnsight.intervention.backends.remote import RemoteError
    from websocket import WebSocketException

    last = None
    for seconds in [*RETRY_SECONDS, None]:
        try:
            return wait()
        except (RemoteError, WebSocketException, httpx.HTTPError, OSError) as error:
            NDIF_STATS["failed"] += 1
            text = str(error).strip().replace(os.environ.get("NDIF_API_KEY") or "\0", "(the key)")
            code = getattr(getattr(error.__cause__, "response", None), "status_code", 0)
        reason = text.splitlines()[-1] if text else "no answer"
        if "execution timeout" in text:
            raise TimeoutError(reason)
        if re.search("out of memory|OutOfMemory", text):
            raise torch.OutOfMemoryError(reason)
        # A refusal, or a traceback that comes twice, will not go away.
        refused = 400 <= code < 500 and code not in (408, 429)  # too slow, too many: try again
        refused = refused or "Could not deploy" in text
        if seconds is None or refused or ("Traceback" in text and text == last):
            fail(f"NDIF ({host}): {reason}; run the same command again to continue")
        print(f"NDIF: {reason}; retry in {seconds} s", file=sys.stderr)
        last = text
        time.sleep(seconds)
        wait = send()


def _send(nn, host: str, make, fixed: tuple, packs: list[dict]):
    """Send one job; returns a function that waits for its answers, or raises what went wrong.

    A thread listens from the start, since a server drops clients that do not answer its pings."""
    import nnsight
    from nnsight.intervention.backends.remote import AsyncRemoteBackend

    if DRY_RUN["folder"]:
        nn.cost.requests += 1
        return lambda: _run_packs(nn, make, fixed, packs)
    NDIF_STATS["requests"] += 1
    backend, future = AsyncRemoteBackend(nn.to_model_key(), host=host), Future()
    is_shown = backend.display.enabled
    backend.display.enabled = False  # show only the job that is waited for

    def listen():
        try:
            while (saved := backend.handle(backend.parse(backend.connection.recv()))) is None:
                pass
            future.set_result(saved["answers"])  # named as below
        except Exception as error:  # raised where the answers are waited for
            future.set_exception(error)
        finally:
            backend.close()

    def wait():
        backend.display.enabled = is_shown
        return future.result()

    try:
        with nn.session(backend=backend):
            answers = nnsight.save(_run_packs(nn, make, fixed, packs))  # noqa: F841
        threading.Thread(target=listen, daemon=True).start()
    except Exception as error:
        backend.close()
        future.set_exception(error)
    return wait


def _run_packs(nn, make, fixed: tuple, packs: list[dict]) -> list:
    work = make(nn, *fixed)
    return [work(**pack) for pack in packs]


# ================================================================ 4  Runs


PROGRESS = {"quiet": False}


def progress_bar(total: int, text: str, **options) -> tqdm:
    """A progress bar, on a terminal only, and not under --quiet."""
    return tqdm(total=total, desc=text, disable=PROGRESS["quiet"] or None, **options)


class Run:
    """The folder of one run: <out>/<script>/<source>--<targets>--<hash>/.

        run = Run(__file__, args, models, data, first_prompts, steps=20)
        result = run.step("llama-m eft", function, argument, …)     computed once; any JSON value
        image = run.figure(figure, "figure_2a")                     a line of the report
        run.save(records, examples, [verdict(…), image, table], [more, …])

    The hash covers arguments, models, data, GPUs, versions of libraries, and the source of the
    script and of the five files that it imports: the same command continues where it stopped, and
    an edited script starts a run of its own. ignore: options that change no step's result. steps:
    their approximate number."""

    def __init__(self, script, args, models, data=None, first_prompts=(), ignore=(), steps=0):
        names = [args.src, args.src_base, *args.tgt, *args.tgt_chat]
        names = [name for name in dict.fromkeys(names) if name]
        inputs = {
            "models": {name: models.fingerprint(name) for name in names},
            "data": _digest(json.loads(json.dumps(data))),
            "first prompts": first_prompts,
        }
        skipped = {"command", "out", "fresh", "quiet", "dry_run", "no_cache", "batch_tokens"}
        skipped |= set(ignore)
        settings = {k: v for k, v in vars(args).items() if k not in skipped}
        settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
        parts = ("harness.py", "common.py", "models.py", "report.py", "vectors.py")
        sources = [Path(script), *(Path(__file__).with_name(name) for name in parts)]
        code = {path.name: _digest(path.read_text()) for path in sources}
        environment = _environment()
        machine = [environment[name] for name in ("gpus", "torch", "transformers", "nnsight")]
        self.id = _digest([settings, inputs, list(code.values()), machine])[:8]
        self.args, self.models = args, models
        short = [re.sub(r"[^\w.-]", "-", Path(name).name) for name in [args.src, *args.tgt]]
        self.title = f"{Path(script).stem}: {short[0]} → {', '.join(short[1:])}"
        name = f"{short[0]}--{'+'.join(short[1:])[:120]}--{self.id}"
        self.folder = args.out / Path(script).stem / name
        self.steps = self.folder / "steps"
        self.reused, self.computed = set(), set()  # names of steps
        if args.fresh and self.steps.exists():
            for path in [*self.steps.iterdir(), self.folder / "report.md"]:
                path.unlink(missing_ok=True)
        about = {"command": args.command, "args": settings, "inputs": inputs, "code": code}
        _write_file(self.folder / "args.json", json.dumps(about, indent=1) + "\n")
        if not self.steps.exists() or args.fresh:
            text = json.dumps(environment, indent=1) + "\n"
            _write_file(self.folder / "environment.json", text)
        self.steps.mkdir(exist_ok=True)
        form = "{n_fmt}/{total_fmt} steps |{bar}| {elapsed}, {remaining} left{postfix}"
        self.bar = progress_bar(steps, "", bar_format=form, leave=False)

    def step(self, name: str, function, *args, **kwargs):
        """function(*args, **kwargs), a JSON value; read from the folder if computed before."""
        short = re.sub(r"[^\w.-]+", "-", name)[:60]  # two names may shorten to one
        path = self.steps / f"{short}-{_digest(name)[:6]}.json"
        if path.exists():
            self.reused |= {name} - self.computed
        else:
            self.computed.add(name)
            number = len(self.reused | self.computed)
            self.bar.total = max(self.bar.total or 0, number)
            self.bar.set_postfix_str(name[:60])
            if self.bar.disable and not PROGRESS["quiet"]:
                total = max(self.bar.total, number)
                print(f"[{time.strftime('%H:%M:%S')}] {number}/{total} {name}", file=sys.stderr)
            _write_file(path, json.dumps(function(*args, **kwargs)))
        self.bar.initial = len(self.reused)  # not part of the estimated time left
        self.bar.n = len(self.reused | self.computed)
        self.bar.refresh()
        try:
            return json.loads(path.read_text())
        except ValueError:
            fail(f"{path} is damaged; remove it to compute it again")

    def save(self, records: list[dict], examples: list[dict], headline: list[str], more=()) -> None:
        """Write records.csv, records.jsonl, examples.jsonl, report.md and report.html.

        headline: Markdown of the verdict, the headline figure and the headline table, which are
        also printed; more: further tables and figures."""
        self.bar.close()
        if DRY_RUN["folder"]:
            print(f"\n{self.title}\n\n{self.models.costs()}")
            DRY_RUN["folder"].cleanup()
            return
        names = ["seed", "refine", "map", "protocol", "intercept", "ridge", "sentences"]
        about = {name: getattr(self.args, name, None) for name in names}
        columns = [*RECORD, "run", *names]
        records = [each | {"run": self.id} | about for each in records]
        records = [{name: each[name] for name in columns} for each in records]
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        _write_file(self.folder / "records.csv", table.getvalue())
        for name, rows in (("records", records), ("examples", examples)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            _write_file(self.folder / f"{name}.jsonl", lines)
        if NDIF_STATS["requests"]:
            _write_file(self.folder / "ndif.json", json.dumps(NDIF_STATS, indent=1) + "\n")
        title = f"# {self.title}"
        parts = [title, *headline, *more, _details(self.folder)]
        report = "\n\n".join(part for part in parts if part) + "\n"
        _write_file(self.folder / "report.html", html(self.title, report, self.folder))
        _write_file(self.folder / "report.md", report)  # last: a run that has it is complete
        shown = [part for part in [title, *headline] if not part.startswith("![")]
        print("\n" + "\n\n".join(shown), f"\nreport.html, records and figures:\n{self.folder}")
        if self.reused:
            total = len(self.reused) + len(self.computed)
            print(f"{len(self.reused)} of {total} steps come from an earlier run")
        if NDIF_STATS["requests"]:
            print("NDIF: " + ", ".join(f"{count} {name}" for name, count in NDIF_STATS.items()))

    def figure(self, figure, name: str) -> str:
        """Save a matplotlib figure as PNG and PDF, close it, and return its line in the report."""
        import matplotlib.pyplot as plt

        name = re.sub(r"\s", "-", name)  # Markdown ends a link at a blank
        for suffix in () if DRY_RUN["folder"] else ("png", "pdf"):
            path = self.folder / f"{name}.{suffix}"
            # Some legends are wider than their figure.
            options = {"format": suffix, "dpi": 200, "bbox_inches": "tight"}
            _write_file(path, lambda file: figure.savefig(file, **options))
        plt.close(figure)
        return f"![{name}]({name}.png)"


def _details(folder: Path) -> str:
    """The last section of a report: settings, models, environment and prompts of a run."""
    about = read_json(folder / "args.json")
    settings = about["args"] | about["inputs"]["models"] | read_json(folder / "environment.json")
    rows = [[name, json.dumps(value)] for name, value in settings.items()]
    # No prompt can end an indented block.
    prompts = [textwrap.indent(prompt, "    ") for prompt in about["inputs"]["first prompts"]]
    return "\n\n".join(["## Details", markdown(["", ""], rows), *prompts])


def _environment() -> dict:
    """Versions, commit and hardware."""
    import torch

    try:
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    packages = ("torch", "transformers", "nnsight", "numpy", "scikit-learn")
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        **{name: version(name) for name in packages},
    }


# ================================================================ 5  Vectors

REQUIRED = {
    "concept",
    "source",
    "target",
    "fingerprint",
    "layer",
    "method",
    "pairs",
    "first_prompt",
}


def save_concept(path: Path, vector, **about) -> None:
    """Write a concept vector [d] as safetensors with a description (at least REQUIRED)."""
    from safetensors.torch import save

    if vector.dim() != 1:
        raise ValueError(f"vector must be [d], not {tuple(vector.shape)}")
    if missing := REQUIRED - set(about):
        raise ValueError(
            f"a concept vector must say what it is; missing: {', '.join(sorted(missing))}"
        )
    site = {"site": "residual stream after the block", "token": "last"}
    about = {**site, "sign": "positive minus negative", **about}
    metadata = {"concept_vector": json.dumps(about)}
    _write_file(Path(path), save({"vector": vector.float().contiguous()}, metadata))


def load_concept(path: Path, model=None) -> tuple:
    """(vector [d], its description). With a model, refuses a vector made for another one."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "concept_vector" not in metadata:
            raise ValueError(f"{path} is not a concept vector: it does not say what it is")
        vector, about = file.get_tensor("vector"), json.loads(metadata["concept_vector"])
    if model is not None and about["fingerprint"] != model.fingerprint:
        made_for = f"{about['target']} ({about['fingerprint']})"
        raise ValueError(f"{path} was made for {made_for}, not {model.name} ({model.fingerprint})")
    if DRY_RUN["folder"] and model is not None:  # its states are narrow
        vector = vector[: model.config.hidden_size]
    return vector, about


def export_concept(path: Path, model, vector, layer: int, alpha: float) -> None:
    """Write a vector [d] with its block and strength in the format of another program.

    PATH.pt: lm-evaluation-harness, `--model steered --model_args …,steer_path=PATH.pt`.
    PATH.gguf: llama.cpp, `--control-vector PATH.gguf`; it has no control vector after block 0."""
    path, vector, width = Path(path), vector.float().cpu(), model.config.hidden_size
    if not isinstance(layer, int) or not 0 <= layer < model.n_layers:
        raise ValueError(f"layer: block {layer} does not exist in {model.name}")
    if vector.shape != (width,):
        raise ValueError(f"vector must be [{width}] for {model.name}, not {tuple(vector.shape)}")
    if path.suffix == ".pt":
        _export_steered(path, model.nn._module, model.nn.layers[layer]._module, vector, alpha)
    elif path.suffix == ".gguf":
        if layer == 0:
            raise ValueError("llama.cpp has no control vector after block 0; take a later block")
        _export_gguf(path, model.config.model_type, layer, alpha * vector)
    else:
        raise ValueError(f"{path}: the name must end in .pt or .gguf")


def _export_steered(path: Path, module, block, vector, alpha: float) -> None:
    """Its hook adds steering_coefficient (alpha) times steering_vector to the output of a module at
    every position (Eq. 3). Modules are named from the base model on: layers.6 of a Llama."""
    import torch

    modules = module.base_model.named_modules()
    name = next(name for name, each in modules if each is block)
    content = {
        "steering_vector": vector.clone(),
        "steering_coefficient": float(alpha),
        "action": "add",
        "bias": None,
        "head_index": None,
    }
    _write_file(path, lambda file: torch.save({name: content}, file))


def _export_gguf(path: Path, model_type: str, layer: int, shift) -> None:
    """The format has no strength, so alpha is folded in; --control-vector-scaled multiplies it.
    llama.cpp adds direction.N to the output of block N, counted from 0 as here, at every
    position."""
    from gguf import GGUFWriter

    def write(file):
        writer = GGUFWriter(file.name, "controlvector")  # opens the file again, by its name
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_int32("controlvector.layer_count", 1)  # directions in the file
        writer.add_tensor(f"direction.{layer}", shift.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    _write_file(path, write)


# ================================================================ 6  Runs side by side


def list_runs(folder: Path) -> str:
    """The runs below a folder, newest last: date, complete or not, and verdict."""
    lines = []
    for path in sorted(folder.rglob("args.json"), key=lambda path: path.stat().st_mtime):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        report, steps = path.with_name("report.md"), path.with_name("steps")
        if report.exists():
            found = [each for each in read_text(report).splitlines() if each.startswith("- **")]
            lines += [f"{path.parent}  {when}  complete", *found]
        else:
            count = len(list(steps.glob("*")))
            lines.append(f"{path.parent}  {when}  interrupted after {count} steps")
    return "\n".join(lines).replace("**", "") or f"no run in {folder}"


def compare_runs(one: Path, other: Path) -> str:
    """The settings in which two runs differ, and the rates of both with their difference.

    Targets are matched by their order, rates by all fields of a record except the blocks, and the
    alpha where each run has one only. The 95 % interval of a difference is Newcombe's for
    independent samples."""
    for folder in (one, other):
        if not (folder / "report.md").exists():
            fail(f"{folder} is not the folder of a finished run")
    abouts = [read_json(folder / "args.json") for folder in (one, other)]
    differing = []
    for part in ("args", "inputs", "code"):
        first, second = [about[part] for about in abouts]
        for name in dict.fromkeys([*first, *second]):
            if first.get(name) != second.get(name):
                both = [json.dumps(about[part].get(name))[:80] for about in abouts]
                differing.append([name, *both])
    first, second = [_comparable(*each) for each in zip((one, other), abouts)]
    rows = []
    for a, b in _same_rates(first, second):
        gain = b["value"] - a["value"]
        below = math.hypot(b["value"] - b["low"], a["high"] - a["value"])
        above = math.hypot(b["high"] - b["value"], a["value"] - a["low"])
        change = a | {"value": gain, "low": gain - below, "high": gain + above, "paper": None}
        cells = [cell(each | {"paper": None}) for each in (a, b)]
        source, target = [Path(a[name] or "").name for name in ("source", "target")]
        alphas = ", ".join(dict.fromkeys(f"{each['alpha'] or 0:g}" for each in (a, b)))
        names = [a["item"] or "", source, target, label(a), alphas, a["metric"]]
        rows.append([*names, *cells, cell(change)])
    header = ["", "source", "target", "", "α", "metric", "A", "B", "B − A"]
    parts = [f"A: {one}\nB: {other}", markdown(["", "A", "B"], differing)]
    return "\n\n".join([*parts, markdown(header, rows)])


def _same_rates(first: dict, second: dict):
    """Yield the pairs of records of two runs that are about the same."""
    for key in [key for key in first if key in second]:
        ours, theirs = first[key], second[key]
        if len(ours) == len(theirs) == 1:
            [a], [b] = ours.values(), theirs.values()
            yield a, b
        else:
            yield from [(ours[alpha], theirs[alpha]) for alpha in ours if alpha in theirs]


def _comparable(folder: Path, about: dict) -> dict[tuple, dict[float, dict]]:
    """Test rates of a run, without single controls, maps, groups and emotions, by their fields and
    alpha."""
    names = [about["args"]["src"], *about["args"]["tgt"]]
    roles = {name: number for number, name in enumerate(names)}
    records = [json.loads(line) for line in read_text(folder / "records.jsonl").splitlines()]
    records = select(records, part="test")
    records = select(records, group=None) or records  # each checkpoint has one
    records = [each for each in records if each["low"] is not None]
    records = select(records, concept="mean") or records
    fields = ("item", "concept", "method", "variant", "metric")
    found: dict[tuple, dict[float, dict]] = {}
    for each in records:
        if not re.search(r" \d+$", each["variant"] or ""):
            models = [roles.get(each[name], each[name]) for name in ("source", "target")]
            key = [each[name] for name in fields]
            found.setdefault((*models, *key), {})[each["alpha"]] = each
    return found


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(prog="harness.py", description="What is in the run folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs", help="list runs: when, complete or interrupted, verdict")
    runs.add_argument("folder", type=Path, nargs="?", default=Path("results"))
    compare = commands.add_parser("compare", help="two runs side by side, with differences")
    compare.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    args = parser.parse_args(argv)
    print(list_runs(args.folder) if args.command == "runs" else compare_runs(*args.folders))


if __name__ == "__main__":
    run_script(main)
