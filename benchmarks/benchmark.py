"""What common.py costs beside two other ways of doing the same work, measured in one run.

    python benchmarks/benchmark.py                          random Llama of 160 M parameters, 10 min
    python benchmarks/benchmark.py --data data/paper        with the real prompts
    python benchmarks/benchmark.py --data data/paper --shape 7b             on a GPU, bfloat16
    python benchmarks/benchmark.py --shape toy --limit 4 --repeats 1 --only mc1 states

    released    as the authors' released code for emotions does it: one prompt per forward pass,
                all hidden states and all logits, nothing shared; MC1, never released, likewise
    plain       as a careful user of transformers does it: batches of like length, logits only
                where they are read
    stopped     plain, and the forward pass stops after the block (hidden states only)
    ours        common.py

Five tasks: the emotion sweep (8 strengths, six shots), hidden states at 75 % depth, MC1 of
TruthfulQA, the affine map, steered generation. All ways get the same weights and texts and must
agree in their results: exit code 1 if they do not. Tokens and logits are counted while they are
computed. benchmarks/README.md explains the columns.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import harness
import report
from common import Transplant
from harness import at_least, read_json, read_text, read_texts
from models import load_model

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EMOTIONS = [
    "happiness",
    "sadness",
    "anger",
    "fear",
    "disgust",
    "surprise",
]
STRENGTHS = [0.5, 1, 1.5, 2, 2.5, 3, 4, 5]
NEW_TOKENS = 32
PLAIN_BATCH_TOKENS = 2048
VOCABULARY = 32000
PIECES = 2000  # of the tokenizer; six real shots are then 454 tokens, as with LLaMA's own
MAP_SHAPE = (4096, 5120, 2000)  # d of source and target (7B, 13B), sentences
COUNTS = {"emotion": 48, "states": 120, "mc1": 32}  # prompts, lines, questions
SHAPES = {  # width, blocks
    "toy": (128, 8),
    "150m": (768, 16),
    "7b": (4096, 32),
    "13b": (5120, 40),
}

# ---------------------------------------------------------------- options


def options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--data", type=Path, default=harness.TOY, metavar="FOLDER", help="where the prompts are")
    add("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks (default: all)")
    add("--limit", type=at_least(2), help="items of each task, instead of its default")
    add("--repeats", type=at_least(1), default=3, help="the ways take turns so many times")
    add("--shape", choices=SHAPES, default="150m", help="of the random Llama")
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    args = parser.parse_args(argv)
    args.width, args.n_layers = SHAPES[args.shape]
    return args


# ---------------------------------------------------------------- data


def load_items(args) -> tuple[dict[str, list], list[str]]:
    """The items of each task, and the corpus of the tokenizer."""
    choices = ", ".join(f'"{emotion}"' for emotion in EMOTIONS)
    shots, asked = [], []
    for emotion in EMOTIONS:
        shot, *others = read_texts(args.data / "emotions" / f"{emotion}.json")
        shots.append(
            f"Scenario: {shot}\nThe emotion ({choices}) of the above scenario is {emotion}."
        )
        asked += others
    lines = []
    table = read_text(args.data / "wikisplit" / "validation.tsv")
    for number, line in enumerate(table.splitlines()):
        words = line.split("\t")[0].split()
        lines.append(" ".join(words[: -2 - number % 3]))
    lines = [line for line in lines if line]
    questions = read_json(args.data / "truthfulqa" / "mc_task.json")

    corpus = lines + asked
    for each in questions:
        corpus += [each["question"], *each["mc1_targets"]]
    corpus += [f"The emotion is {emotion}." for emotion in EMOTIONS] * 200  # one token each

    shuffle = random.Random(0)

    def some(task: str, texts: list) -> list:
        count = args.limit or COUNTS[task]
        return shuffle.sample(texts, len(texts))[:count]

    prompts = []
    for text in some("emotion", asked):
        last = f"Scenario: {text}\nThe emotion of the above scenario is"
        prompts.append("\n".join([*shots, last]))
    lines = some("states", lines)
    contexts, pairs = [], []
    for each in some("mc1", questions):
        contexts.append(f"[INST] {each['question']}[/INST]")
        pairs += [(contexts[-1], f" {choice}") for choice in each["mc1_targets"]]
    vectors = torch.randn(6, MAP_SHAPE[0], generator=torch.Generator().manual_seed(0))
    items = {
        "emotion": prompts,
        "states": lines,
        "mc1": pairs,
        "map": list(vectors),
        "generate": contexts[:16],  # one batch
    }
    return items, corpus


# ---------------------------------------------------------------- model


def make_tokenizer(corpus: list[str]):
    """A byte-level BPE of the texts that the model will read."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        special_tokens=[("<s>", 0)],
    )
    # A random model also generates the other ids: each needs a text, so that texts can be compared.
    content = json.loads(bpe.to_str())
    vocabulary = content["model"]["vocab"]
    for i in range(len(vocabulary), VOCABULARY):
        vocabulary[f" unused{i}"] = i
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(folder: str, args, corpus: list[str]) -> None:
    """A random Llama with its tokenizer in `folder`."""
    make_tokenizer(corpus).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.width // (128 if args.width >= 2048 else 64),
        intermediate_size=-(-args.width * 8 // (3 * 256)) * 256,  # LLaMA's rule
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=None,  # every continuation has all its tokens
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(args.device):  # billions of random numbers take minutes on a CPU
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, args.dtype),
        )
    model.save_pretrained(folder)


def load_plain(folder: str, args):
    """The model as transformers loads it, with its tokenizer as an attribute."""
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(args.device).eval()
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model


# ---------------------------------------------------------------- the released and the plain way


@contextmanager
def hooked(model, block: int, hook):
    """model with a forward hook on a block."""
    handle = model.model.layers[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def steered(model, given, strength=1.0):
    """model with strength * vector added after the block, at every position."""
    shift = (strength * given.vector).to(model.device, model.dtype)
    return hooked(model, given.block, lambda module, inputs, output: output + shift)


def batches(model, texts: list[str], way: str):
    """Yield (indices, inputs of one forward pass).

    released: one text, all hidden states, all logits. plain: texts of like length, padded on the
    left, logits of the last position."""
    ids = model.tokenizer(texts).input_ids
    order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
    while order:
        rows = 1 if way == "released" else max(1, PLAIN_BATCH_TOKENS // len(ids[order[0]]))
        batch, order = order[:rows], order[rows:]
        inputs = model.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
        inputs = inputs.to(model.device)
        if way == "released":
            inputs["output_hidden_states"] = True
        else:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs["use_cache"] = False
            inputs["logits_to_keep"] = 1
        yield batch, inputs


# ---------------------------------------------------------------- tasks
#
# Two functions for each: of theirs, which takes the way, and ours. Items are what it works through;
# `given` is the same for all of them: block and vector, or the states of the map. Each returns
# {name: one value per item}.


def emotion(model, prompts, given, way):
    words = model.tokenizer([f" {emotion}" for emotion in EMOTIONS], add_special_tokens=False)
    first = [ids[0] for ids in words.input_ids]
    preferred = torch.empty(len(prompts), len(STRENGTHS), dtype=torch.long)
    for number, strength in enumerate(STRENGTHS):
        with steered(model, given, strength):
            for batch, inputs in batches(model, prompts, way):
                logits = model(**inputs).logits[:, -1]
                preferred[batch, number] = logits[:, first].float().argmax(-1).cpu()
    return {"preferred": preferred}


def sweep(given) -> list[Transplant]:
    return [Transplant.of(given.vector, given.block, strength) for strength in STRENGTHS]


def emotion_ours(model, prompts, given):
    _, preferred = common.score_labels(model, prompts, EMOTIONS, sweep(given))
    return {"preferred": preferred.T}


class Reached(Exception):
    """The block is computed: nothing after it is needed."""


def states(model, lines, given, way):
    found = torch.empty(len(lines), model.config.hidden_size)

    def read(module, inputs, output):
        found[batch] = output[:, -1].float().cpu()
        if way == "stopped":
            raise Reached

    with hooked(model, given.block, read):
        for batch, inputs in batches(model, lines, way):  # noqa: B007  read() uses batch
            with suppress(Reached):
                model(**inputs)
    return {"states": found}


def states_ours(model, lines, given):
    return {"states": common.hidden_states(model, lines, [given.block])[:, 0]}


def mc1(model, pairs, given, way):
    sums = torch.empty(len(pairs))
    contexts = model.tokenizer([context for context, _ in pairs]).input_ids
    texts = [context + answer for context, answer in pairs]
    with steered(model, given):
        for batch, inputs in batches(model, texts, way):
            lengths = inputs["attention_mask"].sum(1).tolist()
            tails = [length - len(contexts[i]) for i, length in zip(batch, lengths)]
            longest = max(tails)
            if way == "plain":
                inputs["logits_to_keep"] = longest + 1
            logprobs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
            tokens = inputs["input_ids"][:, -longest:, None]
            logprobs = logprobs[:, -longest:].gather(2, tokens)[..., 0].cpu()
            for i, tail, row in zip(batch, tails, logprobs):
                sums[i] = row[-tail:].sum()
    return {"logprobs": sums}


def mc1_ours(model, pairs, given):
    transplant = Transplant.of(given.vector, given.block, 1)
    logprobs, _ = common.choice_logprobs(model, pairs, [transplant])
    return {"logprobs": logprobs[0]}


def affine_map(model, vectors, given, way):
    """F = V S^-1 U^T Y as in Eq. 2, [d1, d2] in float32 on the CPU, then v F."""
    n = int(len(given.x) * 0.8)
    u, s, vt = torch.linalg.svd(given.x[:n], full_matrices=False)
    f = vt.T @ torch.diag(1 / s) @ u.T @ given.y[:n]
    return {"vectors": torch.stack([v @ f for v in vectors])}


def affine_map_ours(model, vectors, given):
    fitted = common.fit_affine(given.x, given.y)  # holds out a fifth of the rows for R² and cosine
    return {"vectors": torch.stack([fitted.vector(v) for v in vectors])}


def generation(model, prompts, given, way):
    texts = {}
    groups = [[prompt] for prompt in prompts] if way == "released" else [prompts]
    for strength in STRENGTHS[::2]:
        texts[strength] = []
        for group in groups:
            inputs = model.tokenizer(group, padding=True, return_tensors="pt").to(model.device)
            with steered(model, given, strength):
                ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            texts[strength] += model.tokenizer.batch_decode(ids[:, -NEW_TOKENS:])
    return texts


def generation_ours(model, prompts, given):
    written = common.generate(model, prompts, sweep(given)[::2], NEW_TOKENS)
    return dict(zip(STRENGTHS[::2], written))


@dataclass
class Task:
    title: str
    theirs: object  # function
    ours: object  # function
    ways: dict  # {way: items that it does, None for all}; the rest would take too long


TASKS = {
    "emotion": Task(
        "emotion sweep, 8 strengths, six shots",
        emotion,
        emotion_ours,
        {"released": 4, "plain": 4},
    ),
    "states": Task(
        "hidden states to 75 % depth",
        states,
        states_ours,
        {"released": None, "plain": None, "stopped": None},
    ),
    "mc1": Task(
        "MC1 of TruthfulQA, one strength (choices)",
        mc1,
        mc1_ours,
        {"released": None, "plain": None},
    ),
    "map": Task("six vectors through the map", affine_map, affine_map_ours, {"released": None}),
    "generate": Task(
        "32 new tokens, 4 strengths",
        generation,
        generation_ours,
        {"released": 4, "plain": None},
    ),
}


def share_of(items: list, count: int | None) -> list[int]:
    """Indices of `count` items whose lengths represent all (None: every item)."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    count = min(count or len(order), len(order))
    return sorted(order[(2 * j + 1) * len(order) // (2 * count)] for j in range(count))


def given_to(name: str, repeat: int, args) -> SimpleNamespace:
    """What is the same for all items of this repeat; new in each, so that no cache helps."""
    generator = torch.Generator().manual_seed(repeat)
    if name == "map":
        d1, d2, n = MAP_SHAPE
        x = torch.randn(n, d1, generator=generator)
        return SimpleNamespace(x=x, y=torch.randn(n, d2, generator=generator))
    vector = 0.1 * torch.randn(args.width, generator=generator)
    return SimpleNamespace(block=int(0.75 * args.n_layers), vector=vector)


# ---------------------------------------------------------------- measuring


@dataclass
class Cost:
    seconds: float = 0.0
    products: int = 0  # rows times weights, in the linear layers of the blocks
    logits: int = 0  # rows that go through the unembedding
    memory: int = 0  # peak on a GPU [bytes]


def clock(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(device: str, function, *args) -> tuple:
    """(function(*args), its Cost). Every linear layer goes through torch.nn.functional.linear."""
    cost = Cost()
    linear = torch.nn.functional.linear

    def counted(input, weight, bias=None):
        rows = input.numel() // input.shape[-1]
        if len(weight) == VOCABULARY:
            cost.logits += rows
        else:
            cost.products += rows * weight.numel()
        return linear(input, weight, bias)

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    torch.nn.functional.linear = counted
    start = clock(device)
    try:
        with torch.no_grad():
            result = function(*args)
        cost.seconds = clock(device) - start
    finally:
        torch.nn.functional.linear = linear
    if device != "cpu":
        cost.memory = torch.cuda.max_memory_allocated()
    return result, cost


def matrix_rate(args) -> float:
    """Rate [FLOP/s] of a large matrix product in the model's dtype: the best of three."""
    size = 2048 if args.device == "cpu" else 8192
    a = torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype))
    seconds = [measure(args.device, torch.matmul, a, a)[1].seconds for _ in range(3)]
    return 2 * size**3 / min(seconds)


def difference(theirs: dict, ours: dict, rows: list[int], exact: bool) -> tuple[float, float]:
    """(largest difference of numbers relative to the largest, share of choices that differ).

    Where numbers are not exact, only the first word of a text counts: near ties change the rest."""
    numbers = choices = 0.0
    for name, their in theirs.items():
        our = ours[name]
        if isinstance(our, list):
            words = None if exact else 1
            pairs = [(text.split()[:words], our[i].split()[:words]) for text, i in zip(their, rows)]
            choices = max(choices, statistics.mean(one != other for one, other in pairs))
        elif their.is_floating_point():
            numbers = ((their - our[rows]).abs().max() / our[rows].abs().max()).item()
        else:
            choices = (their != our[rows]).float().mean().item()
    return numbers, choices


# ---------------------------------------------------------------- one task


def run_task(name: str, args, items: list, plain, ours) -> list[dict]:
    """The rows of one task, one for each way."""
    task = TASKS[name]
    ways = task.ways | {"ours": None}
    done = {way: share_of(items, count) for way, count in ways.items()}
    costs = {way: [] for way in ways}
    apart = {way: [] for way in ways}

    def call(way: str, given, indices: list[int]):
        mine = [items[i] for i in indices]
        if way != "ours":
            return measure(args.device, task.theirs, plain, mine, given, way)
        with tempfile.TemporaryDirectory() as folder:  # an empty cache each time
            harness.CACHE["folder"] = folder
            return measure(args.device, task.ours, ours, mine, given)

    for way in ways:  # not measured: first calls load and compile
        call(way, given_to(name, args.repeats, args), done[way][:2])
    for repeat in range(args.repeats):  # in turns: a machine is faster at one time than at another
        given = given_to(name, repeat, args)
        results = {}
        for way in ways:
            results[way], cost = call(way, given, done[way])
            costs[way].append(cost)
            print(f"{name:9} {way:9} {cost.seconds:7.2f} s", file=sys.stderr)
        for way in ways:
            found = difference(results[way], results["ours"], done[way], args.dtype == "float32")
            apart[way].append(found)

    weights = sum(each.numel() for each in plain.model.layers.parameters() if each.dim() == 2)
    rows = []
    for way, spent in costs.items():
        scale = len(items) / len(done[way])
        ratios = [cost.seconds / our.seconds for cost, our in zip(spent, costs["ours"])]
        products = spent[0].products + spent[0].logits * VOCABULARY * args.width
        seconds = statistics.median(cost.seconds for cost in spent)
        row = {
            "task": name,
            "way": way,
            "items": len(items),
            "done": len(done[way]),
            "seconds": scale * seconds,
            "tokens": scale * spent[0].products / weights,
            "logits": scale * spent[0].logits,
            "ratio": scale * statistics.median(ratios),
            "rate": 2 * products / seconds,
            "memory": max(cost.memory for cost in spent),
            "numbers": max(numbers for numbers, _ in apart[way]),
            "choices": max(choices for _, choices in apart[way]),
        }
        rows.append(row)
    return rows


def agrees(row: dict, args) -> bool:
    """Whether a way gives our results (NaN agrees with nothing)."""
    if args.dtype == "float32":
        return row["numbers"] <= 1e-4 and row["choices"] == 0
    # bfloat16 has 8 bits: sums in another order differ in the third digit, and near ties fall anew.
    return row["numbers"] <= 5e-2 and row["choices"] <= 0.5


def table(rows: list[dict], rate: float) -> str:
    header = ["task", "way", "items", "seconds", "tokens", "logits", "× ours", "of matrix rate"]
    lines = []
    for row in rows:
        is_share = row["done"] < row["items"]
        line = [
            TASKS[row["task"]].title if row["way"] == "released" else "",
            row["way"],
            f"{row['items']} ({row['done']} done, scaled)" if is_share else row["items"],
            f"{row['seconds']:.2f}",
            f"{row['tokens']:,.0f}",
            f"{row['logits']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['rate'] / rate:.0%}",
            f"{row['memory'] / 2**20:,.0f}",
            f"{row['numbers']:.0e}, {row['choices']:.0%}",
        ]
        lines.append(line)
    return report.markdown([*header, "MiB on a GPU", "differs by (numbers, choices)"], lines)


def main(argv=None) -> None:
    args = options(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    items, corpus = load_items(args)
    rows, rates = [], [matrix_rate(args)]
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args, corpus)
        plain = load_plain(folder, args)
        ours = load_model(folder, dtype=args.dtype, device=args.device)
    for name in args.only:
        rows += run_task(name, args, items[name], plain, ours)
        rates.append(matrix_rate(args))

    rate = statistics.median(rates)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        hardware = torch.cuda.get_device_name(args.device)
    print(
        f"{hardware}; {args.dtype}, {rate / 1e9:,.0f} GFLOP/s in a matrix product",
        f"random Llama of {plain.num_parameters() / 1e6:,.1f} M parameters",
        f"texts of {args.data}; {args.repeats} repeats; Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight", "numpy")),
        sep="; ",
    )
    print(f"\n{table(rows, rate)}")
    wrong = [f"{row['task']} {row['way']}" for row in rows if not agrees(row, args)]
    if wrong:
        print(f"\nWRONG: {', '.join(wrong)} do not give our results")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
