"""What common.py costs beside two other ways of doing the same work, measured in one run.

    python benchmarks/benchmark.py                              random Llama of 160 M parameters, 10 minutes on 2 CPU cores
    python benchmarks/benchmark.py --data data/paper            with the real prompts
    python benchmarks/benchmark.py --data data/paper --shape 7b --full          on a GPU, bfloat16
    python benchmarks/benchmark.py --shape toy --limit 4 --repeats 1 --only mc1 states

    released    as the authors' released code does it: one prompt a forward, a hook that adds alpha v, nothing shared
    plain       as a careful user of transformers does it: hooks, batches of like length, logits only where they are read
    stopped     plain, and a hook that raises once the block is reached (hidden states only)
    ours        common.py

Five works: the emotion sweep (8 strengths, six shots), hidden states at 75 % depth, MC1 of TruthfulQA, the affine map,
steered generation. Every way gets the same weights and texts, and all must come to the same result: exit code 1 if not.
Tokens and logits are counted while they are computed, never derived from the inputs. benchmarks/README.md says how.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # before transformers is imported: nothing here is on the hub
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import common
from common import Transplant

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]
STRENGTHS = [0.5, 1, 1.5, 2, 2.5, 3, 4, 5]
NEW_TOKENS = 32
VOCABULARY = 32000
PIECES = 2000           # of the tokenizer: cuts the real six shots into 454 tokens and a scenario into 32, as LLaMA's own does
SHAPES = {"toy": (128, 8), "150m": (768, 16), "7b": (4096, 32), "13b": (5120, 40)}          # width, blocks
MAP = {"toy": (48, 64, 32)}             # d of the source, d of the target, sentences; all other shapes: the paper's
PAPER_MAP = (4096, 5120, 1600)

# How much slower than ours the other ways are to be, at least
GOALS = {("emotion", "released"): 20, ("emotion", "plain"): 12, ("states", "released"): 2.5, ("states", "plain"): 1.2,
         ("states", "stopped"): 0.97, ("mc1", "released"): 2, ("mc1", "plain"): 1.7, ("map", "released"): 5,
         ("generate", "released"): 3, ("generate", "plain"): 0.9}

# ---------------------------------------------------------------- options


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data" / "toy", metavar="FOLDER", help="where the prompts come from")
    add("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=f"of {', '.join(WORKS)}")
    add("--limit", type=int, help="so many items of each work instead of its default; -1: all")
    add("--full", action="store_true", help="the slow ways do every item too, instead of a share that is scaled up")
    add("--repeats", type=int, default=3, help="the ways take turns so many times")
    add("--shape", choices=SHAPES, default="150m", help="of the random Llama")
    add("--layers", type=int, help="blocks, instead of the shape's")
    add("--width", type=int, help="hidden size, a multiple of 128, instead of the shape's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: float32 on CPU, bfloat16 on GPU")
    add("--batch-tokens", type=int, default=2048, help="tokens of one batch of the plain way; ours keeps its own default")
    add("--seed", type=int, default=0, help="of the weights, the vector and the choice of items")
    add("--out", type=Path, metavar="FILE", help="also write the report there (Markdown)")
    args = parser.parse_args(argv)
    width, layers = SHAPES[args.shape]
    args.width, args.layers = args.width or width, args.layers or layers
    if args.dtype == "auto":
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if args.width % 128 or args.width < 1 or args.layers < 5:
        parser.error("--width must be a multiple of 128, --layers at least 5 (so that 75 % depth is not the last block)")
    if args.repeats < 1 or args.batch_tokens < 1 or (args.limit is not None and args.limit < 2 and args.limit != -1):
        parser.error("--repeats and --batch-tokens must be at least 1, --limit at least 2 (or -1: all)")
    return args


# ---------------------------------------------------------------- data: the prompts of exp_emotion.py and exp_truthfulqa.py


def load_texts(folder: Path, seed: int) -> SimpleNamespace:
    """prompts of the sweep (they begin with six shots), plain lines, (question, choices), and all of it as a corpus."""
    try:
        scenarios = {e: json.loads((folder / "emotions" / f"{e}.json").read_text(encoding="utf-8")) for e in EMOTIONS}
        lines = (folder / "wikisplit" / "validation.tsv").read_text(encoding="utf-8").splitlines()
        questions = json.loads((folder / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    except OSError as error:
        common.fail(f"no file {error.filename}; python data/prepare.py makes data/paper, data/toy comes with the repo")
    lines = [" ".join(line.split("\t")[0].split()[:-2 - i % 3]) for i, line in enumerate(lines)]     # without the last words
    lines = [line for line in lines if line]
    choices = ", ".join(f'"{e}"' for e in EMOTIONS)
    shots = [f"Scenario: {scenarios[e][0]}\nThe emotion ({choices}) of the above scenario is {e}." for e in EMOTIONS]
    asked = [text for e in EMOTIONS for text in scenarios[e][1:]]
    corpus = lines + asked + [text for q in questions for text in (q["question"], *q["mc1_targets"])]
    shuffle = random.Random(seed)
    return SimpleNamespace(
        prompts=["\n".join([*shots, f"Scenario: {text}\nThe emotion of the above scenario is"])
                 for text in shuffle.sample(asked, len(asked))],
        lines=shuffle.sample(lines, len(lines))[:2000],
        questions=[(f"[INST] {q['question']}[/INST]", list(q["mc1_targets"]))
                   for q in shuffle.sample(questions, len(questions))],
        corpus=corpus + [f"The emotion is {e}." for e in EMOTIONS] * 200)       # each label becomes one token, as in LLaMA


# ---------------------------------------------------------------- model: one folder, loaded twice


def make_model(folder: Path, args, corpus: list[str]) -> None:
    """A random Llama with a byte-level BPE of the texts that it will read."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # The rest of the vocabulary is never read, but a random model writes it: a text of its own for every id shows
    # in the generated texts which ids were chosen.
    tokenizer = json.loads(bpe.to_str())
    pieces = tokenizer["model"]["vocab"]
    pieces.update({f" unused{i}": i for i in range(len(pieces), VOCABULARY)})
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", clean_up_tokenization_spaces=False).save_pretrained(folder)

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // (128 if args.width >= 2048 else 64),
        intermediate_size=-(-args.width * 8 // (3 * 256)) * 256,                # LLaMA's rule: 8/3 of the width, in 256s
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=None, pad_token_id=2)    # every text is 32 tokens long
    torch.manual_seed(args.seed)
    with torch.device(args.device):             # billions of random numbers take a GPU seconds, a CPU minutes
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(folder)


def load_plain(folder: Path, args):
    """The model as transformers gives it, with its tokenizer at hand."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    model.requires_grad_(False)
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.batch_tokens = args.batch_tokens
    return model


# ---------------------------------------------------------------- what the released and the plain ways are built from


@contextmanager
def added(model, block: int, shift: torch.Tensor):
    """A forward hook that adds a vector to the output of a block, at every position."""
    shift = shift.to(model.device, model.dtype)
    handle = model.model.layers[block].register_forward_hook(lambda module, inputs, output: output + shift)
    try:
        yield
    finally:
        handle.remove()


def one(model, text: str) -> dict:
    """A text as the input of one forward."""
    return model.tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)


def batches(model, texts: list[str]):
    """Yield (indices, inputs): texts of like length together, so many tokens a batch, padded on the left."""
    ids = model.tokenizer(texts, return_token_type_ids=False).input_ids
    order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
    while order:
        rows = max(1, model.batch_tokens // len(ids[order[0]]))
        batch, order = order[:rows], order[rows:]
        yield batch, model.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)


def positions(inputs) -> torch.Tensor:
    """Positions that begin at 0 with the first token that is no padding."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def first_tokens(model) -> list[int]:
    """The first token of each emotion's word, with the space before it."""
    return [model.tokenizer(f" {e}", add_special_tokens=False).input_ids[0] for e in EMOTIONS]


def read_labels(logits: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Of next-token logits [..., V]: the words' log-probabilities, and the likeliest token in a seventh column [..., 7]."""
    scores = logits.float().log_softmax(-1)
    return torch.cat([scores[..., words], scores.argmax(-1, keepdim=True)], -1).cpu()


def labels_of(read: torch.Tensor, words: list[int]) -> dict:
    """From what read_labels read [n, strengths, 7]: log-probabilities, which label is said (-1: none), which preferred."""
    hit = read[..., 6:] == torch.tensor(words)
    return {"logprobs": read[..., :6], "said": torch.where(hit.any(-1), hit.int().argmax(-1), -1),
            "preferred": read[..., :6].argmax(-1)}


# Every way of every work is a function of (model, items, given) that returns {name: tensor or list}. Items are what it
# works through; given is what stays the same for all of them: the block to read or steer, the vector, the states.

# ---------------------------------------------------------------- work 1: emotion sweep, 8 strengths, six shots


def emotion_released(model, prompts, given):
    read, words = torch.empty(len(prompts), len(STRENGTHS), 7), first_tokens(model)
    for s, strength in enumerate(STRENGTHS):
        with added(model, given.block, strength * given.vector):
            for i, prompt in enumerate(prompts):
                output = model(**one(model, prompt), output_hidden_states=True)
                read[i, s] = read_labels(output.logits[0, -1], words)
    return labels_of(read, words)


def emotion_plain(model, prompts, given):
    read, words = torch.empty(len(prompts), len(STRENGTHS), 7), first_tokens(model)
    for s, strength in enumerate(STRENGTHS):
        with added(model, given.block, strength * given.vector):
            for batch, inputs in batches(model, prompts):
                output = model(**inputs, position_ids=positions(inputs), use_cache=False, logits_to_keep=1)
                read[batch, s] = read_labels(output.logits[:, -1], words)
    return labels_of(read, words)


def emotion_ours(model, prompts, given):
    said, preferred = common.score_labels(model, prompts, EMOTIONS, sweep(given))
    return {"said": said.T, "preferred": preferred.T}


def sweep(given) -> list[Transplant]:
    return [Transplant.of(given.vector, given.block, strength) for strength in STRENGTHS]


def emotion_logprobs(model, prompts, given):
    """score_labels keeps its log-probabilities to itself: next_token_logits shows them, outside the measured time."""
    logits = common.next_token_logits(model, prompts, sweep(given))
    return {"logprobs": read_labels(logits, first_tokens(model)).transpose(0, 1)[..., :6]}


# ---------------------------------------------------------------- work 2: hidden states at 75 % depth, last token


def states_released(model, lines, given):
    rows = [model(**one(model, line), output_hidden_states=True).hidden_states[given.block + 1][0, -1] for line in lines]
    return {"states": torch.stack(rows).float().cpu()}


def states_plain(model, lines, given):
    return {"states": block_output(model, lines, given.block, lambda: None)}


class Reached(Exception):
    """The block is computed: what comes after it is not wanted."""


def states_stopped(model, lines, given):
    def stop():
        raise Reached
    return {"states": block_output(model, lines, given.block, stop)}


def block_output(model, lines, block, then) -> torch.Tensor:
    """[n, d] after the block at each line's last token, read by a hook that calls then() at its end."""
    states = torch.empty(len(lines), model.config.hidden_size)

    def read(module, inputs, output):
        states[batch] = output[:, -1].float().cpu()
        then()
    handle = model.model.layers[block].register_forward_hook(read)
    try:
        for batch, inputs in batches(model, lines):
            try:
                model(**inputs, position_ids=positions(inputs), use_cache=False, logits_to_keep=1)
            except Reached:
                pass
    finally:
        handle.remove()
    return states


def states_ours(model, lines, given):
    return {"states": common.hidden_states(model, lines, [given.block])[:, 0]}


# ---------------------------------------------------------------- work 3: MC1 of TruthfulQA, one strength


def mc1_released(model, pairs, given):
    total = torch.empty(len(pairs))
    with added(model, given.block, given.vector):
        for i, (context, answer) in enumerate(pairs):
            inputs, start = one(model, context + answer), len(model.tokenizer(context).input_ids)
            scores = model(**inputs, output_hidden_states=True).logits[0, :-1].float().log_softmax(-1)
            total[i] = scores.gather(1, inputs["input_ids"][0, 1:, None])[start - 1:].sum()
    return {"logprobs": total}


def mc1_plain(model, pairs, given):
    total = torch.empty(len(pairs))
    contexts = model.tokenizer([context for context, _ in pairs]).input_ids
    with added(model, given.block, given.vector):
        for batch, inputs in batches(model, [context + answer for context, answer in pairs]):
            tails = [int(inputs["attention_mask"][row].sum()) - len(contexts[i]) for row, i in enumerate(batch)]
            output = model(**inputs, position_ids=positions(inputs), use_cache=False, logits_to_keep=max(tails) + 1)
            scores = output.logits[:, :-1].float().log_softmax(-1)
            tokens = inputs["input_ids"][:, -max(tails):, None]
            for i, tail, picked in zip(batch, tails, scores.gather(2, tokens)[..., 0].cpu()):
                total[i] = picked[-tail:].sum()
    return {"logprobs": total}


def mc1_ours(model, pairs, given):
    logprobs, _ = common.choice_logprobs(model, pairs, [Transplant.of(given.vector, given.block, 1)])
    return {"logprobs": logprobs[0]}


# ---------------------------------------------------------------- work 4: six vectors through the affine map, on the CPU


def map_released(model, vectors, given):
    """F = V S^-1 U^T Y as Eq. 2 writes it, [d1, d2] in float32, then v F."""
    n = int(len(given.x) * 0.8)
    u, s, vt = torch.linalg.svd(given.x[:n], full_matrices=False)
    f = vt.T @ torch.diag(1 / s) @ u.T @ given.y[:n]
    return {"vectors": torch.stack([v @ f for v in vectors])}


def map_ours(model, vectors, given):
    affine = common.fit_affine(given.x, given.y)        # keeps a fifth of the rows out, and computes R² and cosine on them
    return {"vectors": torch.stack([affine.vector(v) for v in vectors])}


# ---------------------------------------------------------------- work 5: steered generation, greedy, batch 16


def generate_released(model, prompts, given):
    texts = []
    with added(model, given.block, given.vector):
        for prompt in prompts:
            inputs = one(model, prompt)
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            texts.append(model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    return {"texts": texts}


def generate_plain(model, prompts, given):
    inputs = model.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with added(model, given.block, given.vector):
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"texts": model.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)}


def generate_ours(model, prompts, given):
    return {"texts": common.generate(model, prompts, Transplant.of(given.vector, given.block, 1), max_new_tokens=NEW_TOKENS)}


# ---------------------------------------------------------------- the works: title, ways, how many items by default
#
# The number beside a way is a share: the slow ways would take most of the time, so they do only so many of the items,
# spread evenly over the items' lengths. They share nothing between items: twice as many take them twice as long.

WORKS = {
    "emotion": ("emotion sweep, 8 strengths, six shots", 48,
                {"released": (emotion_released, 4), "plain": (emotion_plain, 4), "ours": (emotion_ours, None)}),
    "states": ("hidden states to 75 % depth", 120,
               {"released": (states_released, None), "plain": (states_plain, None), "stopped": (states_stopped, None),
                "ours": (states_ours, None)}),
    "mc1": ("MC1 of TruthfulQA, one strength (choices)", 32,
            {"released": (mc1_released, None), "plain": (mc1_plain, None), "ours": (mc1_ours, None)}),
    "map": ("six vectors through the map", 6, {"released": (map_released, None), "ours": (map_ours, None)}),
    "generate": ("steered generation, 32 new tokens", 16,
                 {"released": (generate_released, 4), "plain": (generate_plain, None), "ours": (generate_ours, None)}),
}


def items_of(work: str, texts, args) -> list:
    count = WORKS[work][1] if args.limit is None else args.limit if args.limit > 0 else None
    if work == "map":                           # always six vectors
        d1 = MAP.get(args.shape, PAPER_MAP)[0]
        return list(torch.randn(6, d1, generator=torch.Generator().manual_seed(args.seed)))
    if work == "mc1":                           # the limit counts questions, the items are their choices
        return [(context, f" {choice}") for context, choices in texts.questions[:count] for choice in choices]
    if work == "generate":                      # one batch of 16, whatever the limit beyond
        return [context for context, _ in texts.questions[:16][:count]]
    return {"emotion": texts.prompts, "states": texts.lines}[work][:count]


def share(items: list, count: int | None, full: bool) -> list[int]:
    """Indices of `count` items whose lengths stand for all (None: every item)."""
    if full or count is None or count >= len(items):
        return list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    return sorted(order[(2 * j + 1) * len(order) // (2 * count)] for j in range(count))


def reworded(item):
    """An item that begins otherwise, so that the call before the first repeat leaves nothing of use to it."""
    return f"Once. {item}" if isinstance(item, str) else (f"Once. {item[0]}", item[1]) if isinstance(item, tuple) else item


def given_to(work: str, repeat: int, block: int, args) -> SimpleNamespace:
    """The vector of this repeat, or the states of the map; new ones every time, so that nothing kept is of use."""
    draw = torch.Generator().manual_seed(1000 * args.seed + repeat)
    if work == "map":
        d1, d2, n = MAP.get(args.shape, PAPER_MAP)
        return SimpleNamespace(x=torch.randn(n * 5 // 4, d1, generator=draw), y=torch.randn(n * 5 // 4, d2, generator=draw))
    return SimpleNamespace(block=block, vector=0.1 * torch.randn(args.width, generator=draw))


# ---------------------------------------------------------------- measuring


def resident() -> int:
    """Memory of this process [bytes]; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_memory() -> None:
    """Freed memory goes back to the system, so that one way's leavings do not hide what the next one takes."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def measured(device: str):
    """Seconds, linear layers and peak memory of the block of code under `with`.

    Linear layers are counted where every one of them passes, in torch.nn.functional.linear: rows times weights, by
    whether the weights are the unembedding's (they have the vocabulary's size) or a block's."""
    cost = SimpleNamespace(seconds=0.0, blocks=0, logits=0, unembedding=0, memory=0)
    linear = torch.nn.functional.linear

    def counted(input, weight, bias=None):
        rows = input.numel() // input.shape[-1]
        if weight.shape[0] == VOCABULARY:
            cost.logits += rows
            cost.unembedding += rows * weight.numel()
        else:
            cost.blocks += rows * weight.numel()
        return linear(input, weight, bias)

    on_gpu, done = device != "cpu", threading.Event()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        give_back_memory()
        before, peak = resident(), [0]

        def watch():
            while not done.wait(0.01):
                peak[0] = max(peak[0], resident())
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
    torch.nn.functional.linear = counted
    start = time.perf_counter()
    try:
        with torch.no_grad():
            yield cost
        if on_gpu:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
    finally:
        torch.nn.functional.linear = linear
        done.set()
    cost.memory = max(0, (torch.cuda.max_memory_allocated() if on_gpu else max(peak[0], resident())) - before)


def matrix_rate(args) -> float:
    """Multiplications and additions a second [FLOP/s] of a large matrix product in the model's dtype: the best of three."""
    size = 8192 if args.device != "cpu" else 2048
    a, b = (torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    seconds = []
    for _ in range(3):
        with measured(args.device) as cost:
            a @ b
        seconds.append(cost.seconds)
    return 2 * size**3 / min(seconds)


# ---------------------------------------------------------------- comparing


def difference(theirs: dict, ours: dict, rows: list[int], exact: bool) -> tuple[float, float]:
    """(largest difference of numbers, relative to the largest number; share of choices that differ) on these items.

    Of generated texts only the first word counts where numbers are not exact: one near tie changes all that follows."""
    numbers, choices = 0.0, []
    for name in theirs.keys() & ours.keys():
        a, b = theirs[name], ours[name]
        if isinstance(b, list):                 # texts
            pairs = [(x, b[i]) for x, i in zip(a, rows, strict=True)]
            choices += [x != y if exact else x.split()[:1] != y.split()[:1] for x, y in pairs]
            continue
        b = b[rows]
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if a.is_floating_point():
            apart = ((a - b).abs().max() / b.abs().max()).item()
            numbers = max(numbers, apart) if apart == apart else float("inf")           # NaN agrees with nothing
        else:
            choices += (a != b).flatten().tolist()
    return numbers, statistics.mean(map(float, choices)) if choices else 0.0


def tolerated(args) -> tuple[float, float]:
    """What may differ. bfloat16 has 8 bits: sums in another order differ in the third digit, and near ties fall anew."""
    return (1e-4, 0.0) if args.dtype == "float32" else (5e-2, 0.5)


# ---------------------------------------------------------------- from the options to the table


def run_work(work: str, args, texts, plain, ours, scratch: Path) -> tuple[list[dict], list[str]]:
    """The rows of one work, and what is wrong with them."""
    title, _, ways = WORKS[work]
    items, block = items_of(work, texts, args), common.block_index("0.75", args.layers)
    weights = sum(p.numel() for p in plain.model.layers.parameters() if p.dim() == 2)
    rows_of = {way: share(items, count, args.full) for way, (_, count) in ways.items()}
    costs, apart, wrong, exact = {way: [] for way in ways}, dict.fromkeys(ways, (0.0, 0.0)), [], args.dtype == "float32"

    def call(way: str, items: list, given):
        common.CACHE = Path(tempfile.mkdtemp(dir=scratch))          # states that were computed before are not read again
        with measured(args.device) as cost:
            result = ways[way][0](ours if way == "ours" else plain, items, given)
        return result, cost

    for way in ways:                            # once, unmeasured: first calls load libraries and compile
        call(way, [reworded(item) for item in items[:2 if way == "ours" else 1]], given_to(work, -1, block, args))
    for repeat in range(args.repeats):          # in turns, since a machine is faster at one time than at another
        given, results = given_to(work, repeat, block, args), {}
        for way in ways:
            results[way], cost = call(way, [items[i] for i in rows_of[way]], given)
            costs[way].append(cost)
            print(f"{work:9} {way:9} {cost.seconds:7.2f} s", file=sys.stderr)
        if work == "emotion" and repeat == 0:
            results["ours"] |= emotion_logprobs(ours, items, given)
        for way in ways.keys() - {"ours"}:
            apart[way] = tuple(map(max, apart[way], difference(results[way], results["ours"], rows_of[way], exact)))

    rows = []
    for way, spent in costs.items():
        if len({(cost.blocks, cost.logits) for cost in spent}) > 1:
            wrong.append(f"{work}, {way}: computed {[cost.blocks // weights for cost in spent]} tokens in the repeats, which "
                         "should be equal: something was kept from one to the next")
        numbers, choices = apart[way]
        if any(found > limit for found, limit in zip(apart[way], tolerated(args))):
            wrong.append(f"{work}, {way}: differs from ours by {numbers:.1e} in numbers, {choices:.1%} in choices")
        scale = len(items) / len(rows_of[way])
        own = [cost.seconds / our.seconds * scale for cost, our in zip(spent, costs["ours"])]
        seconds = statistics.median(cost.seconds for cost in spent)
        rows.append({"work": work, "title": title, "way": way, "items": len(items), "done": len(rows_of[way]),
                     "seconds": seconds * scale, "tokens": spent[0].blocks / weights * scale,
                     "logits": spent[0].logits * scale, "ratio": statistics.median(own),
                     "rate": 2 * (spent[0].blocks + spent[0].unembedding) / seconds,
                     "memory": max(cost.memory for cost in spent), "numbers": numbers, "choices": choices})
    return rows, wrong


def table(rows: list[dict], rate: float) -> str:
    lines = []
    for row in rows:
        computed, goal = row["tokens"] > 0, GOALS.get((row["work"], row["way"]))
        apart = f"{row['numbers']:.0e}" + (f", {row['choices']:.0%} of choices" if row["choices"] else "")
        lines.append([
            row["title"] if row["way"] == next(iter(WORKS[row["work"]][2])) else "", row["way"],
            f"{row['items']}" if row["done"] == row["items"] else f"{row['items']} ({row['done']} done, scaled)",
            f"{row['seconds']:.2f}",
            f"{row['tokens']:,.0f}" if computed else "–", f"{row['logits']:,.0f}" if computed else "–",
            f"{row['ratio']:.2f}", f"≥ {goal:g}" if goal else "", f"{row['rate'] / rate:.0%}" if computed else "–",
            f"{row['memory'] / 2**20:,.0f}", "" if row["way"] == "ours" else apart])
    return common.markdown(["work", "way", "items", "seconds", "tokens", "logits", "× ours", "goal", "of matrix rate", "MiB",
                            "differs by"], lines)


def main(argv=None) -> None:
    args = options(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    texts = load_texts(args.data, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "model", args, texts.corpus)
        plain, ours = load_plain(Path(scratch) / "model", args), common.load_model(
            str(Path(scratch) / "model"), args.dtype, args.device)
        rates, rows, wrong = [matrix_rate(args)], [], []
        for work in args.only:
            more, faults = run_work(work, args, texts, plain, ours, Path(scratch))
            rows, wrong, rates = rows + more, wrong + faults, rates + [matrix_rate(args)]
        rate, parameters = statistics.median(rates), sum(p.numel() for p in plain.parameters())

    commit, *dirty = common.environment()["commit"].split("-")
    hardware = (torch.cuda.get_device_name(args.device) if args.device != "cpu" else
                f"{platform.machine()}, {torch.get_num_threads()} threads")
    report = "\n\n".join([
        f"{hardware}; {args.dtype}, {rate / 1e9:,.0f} GFLOP/s in a matrix product (measured {min(rates) / 1e9:,.0f} to "
        f"{max(rates) / 1e9:,.0f}); random Llama of {parameters / 1e6:,.1f} M parameters, {args.width} × {args.layers}; "
        f"texts of {args.data.name}; {args.repeats} repeats; commit {'-'.join([commit[:12], *dirty])}; "
        f"Python {platform.python_version()}, " + ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight", "numpy")),
        table(rows, rate),
        *(f"WRONG: {fault}" for fault in wrong)])
    print(report)
    if args.out:
        args.out.write_text(report + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
