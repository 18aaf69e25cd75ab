"""Can concepts be transplanted across models? Emotions, Sec. 4, App. B.2 and B.3.

    python exp_emotion.py                                            toy zoo: under 3 minutes on 2 CPU cores
    python exp_emotion.py --family llama --data data/paper           LLaMA-7B -> 13B and 65B, as in the paper
    python exp_emotion.py --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B --data data/paper        models of your own
    python exp_emotion.py --pairs my.jsonl --labels polite rude --template "{scenario} This was"       a concept of your own

Emotion vectors of a small model are mapped into larger ones and added there. On scenarios of the *other* five
emotions, how often does the larger model then name the target emotion?
    Token Acc    its most likely next token is the emotion's word
    Logit Acc    the emotion's word has the highest logit of the six words
Figures 2a and 6 (both accuracies against alpha), 2b (PCA before and after v_fear), 5 (number of pairs), 7 (t-SNE);
Tables 5 (generations) and 8 (tokens that gain and lose). Beside every effect its controls, at the same norm.

--protocol clean (default): the scenarios that make a vector, the few-shot examples and the scenarios that test it
are disjoint; alpha and block are chosen on a validation part. --protocol paper: as the authors released it, tested
on the scenarios that made the vector, with six wrong labels in the few-shot prompt. --pairs FILE: two classes of texts take
the place of the six emotions, and the vector to each class is tested on texts of the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import (BASE, Bridge, Run, Transplant, block_index, context_length, fail, fingerprint, generate, held_out_fit,
                    hidden_states, label_tokens, loader, logit_lens, markdown, model_config, option_parser, parse_options,
                    percentile, perplexity, plain_sentences, random_directions, read_texts, record, refine, run_script,
                    save_concept, score_labels, torch, wilson)

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]

# Token Acc of Figures 2a and 6, read off the published figures (+-0.01), in the order of EMOTIONS
PAPER = {"13B": {0: [.11, 0, .20, .035, 0, 0], 1: [.41, .455, .575, .475, .025, 0],
                 2: [.92, .91, .895, .84, .13, .045], 5: [.985, 1, 1, 1, 1, .575]},
         "65B": {0: [0, .82, 0, .005, .15, 0], 1: [.895, 1, .765, .81, .895, 0],
                 2: [1, 1, 1, .99, .99, 0], 5: [1, 1, 1, 1, 1, 0]}}
ITEM = {"13B": "Figure 2a", "65B": "Figure 6"}

ZOO = os.path.relpath(Path(__file__).parent / "data" / "toy" / "models")
FAMILIES = {
    "toy": {"src": f"{ZOO}/llama-s", "tgt": [f"{ZOO}/llama-m", f"{ZOO}/llama-l"],
            "layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 50},
    "llama": {"src": "huggyllama/llama-7b", "tgt": ["huggyllama/llama-13b", "huggyllama/llama-65b"],
              "layer": "0.75", "alpha": [1, 2, 5], "sentences": 2000, "limit": 200},
    "custom": {"layer": "0.75", "alpha": [1, 2, 5], "sentences": 2000, "limit": 200},
}
ROLE = {f"{ZOO}/llama-m": "13B", f"{ZOO}/llama-l": "65B", "huggyllama/llama-13b": "13B", "huggyllama/llama-65b": "65B"}

TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."
# The six examples of the released prompt: label, the class that the scenario really has, scenario. All are wrong.
PAPER_SHOTS = [("anger", "fear", "You're told you need to undergo an emergency medical procedure."),
               ("disgust", "surprise", "You encounter a new type of crosswalk signal in your city."),
               ("fear", "disgust", "You hear someone hocking up phlegm and spitting in a public trash can."),
               ("happiness", "fear", "You notice your personal information has been leaked online."),
               ("sadness", "disgust", "You find a dirty diaper abandoned on a beach."),
               ("surprise", "fear", "You're on public transit and someone starts acting erratically.")]
PAIRS_OF_FIGURE_5 = [20, 50, 100, 150, 200]
DEPTHS = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]         # tried by --layer auto


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES)
    add = parser.add_argument
    add("--protocol", choices=["clean", "paper"], default="clean", help="disjoint parts and right labels, or as released")
    add("--shots", type=int, default=6, help="few-shot examples before each test prompt (paper: 6)")
    add("--template", default=TEMPLATE, help="prompt with {scenario} in it, before the word of its class")
    add("--labels", nargs="+", default=EMOTIONS, metavar="WORD",
        help=f"the models' words for {', '.join(EMOTIONS)}; with --pairs FILE for positives and for negatives")
    add("--pairs", default="200", metavar="N|FILE", help="example pairs of one vector (paper: 200); or a .jsonl of your own, "
        'each line {"positive": text, "negative": text}')
    add("--random", type=int, default=20, help="random control directions")
    add("--maps", type=int, default=5, help="affine maps fitted on different samples, to see how much luck is in one")
    args = parse_options(parser, FAMILIES, argv)
    if "{scenario}" not in args.template:
        fail("--template needs {scenario} in it")
    args.pair_file = Path(args.pairs) if args.pairs.endswith(".jsonl") else None
    if not args.pair_file and not args.pairs.isdecimal():
        fail(f"--pairs {args.pairs}: give a number, or a file that ends in .jsonl")
    args.pairs = math.inf if args.pair_file else int(args.pairs)            # of a file: all, counted once it is read
    args.concepts = args.labels if args.pair_file else EMOTIONS             # the classes of this run
    if len(args.labels) != len(set(args.labels)) or len(args.labels) != (2 if args.pair_file else 6):
        fail("--labels must be two different words with --pairs FILE: what positives are called, and what negatives"
             if args.pair_file else "--labels must be six different words")
    if args.pair_file and args.protocol == "paper":
        fail("--protocol paper is about the six emotions; leave it out with --pairs FILE")
    if args.pair_file and any(Path(word).name != word or word == "shots" for word in args.labels):
        fail("--labels name files with --pairs FILE, so they must not hold a /; nor may one be shots")
    if args.shots < 0 or args.pairs < 1 or args.random < 1 or args.maps < 1:
        fail("--shots must be 0 or more; --pairs, --random and --maps at least 1")
    if not all(word.strip() for word in args.labels):
        fail("--labels must not be empty")
    args.alpha = [alpha for alpha in dict.fromkeys(args.alpha) if alpha]    # α = 0 is the baseline, which is always there
    if not args.alpha:
        fail("--alpha needs a strength other than 0, which is the baseline and always there")
    if args.tgt_chat:
        fail("emotions are transplanted into base models: --tgt-chat has no use here")
    if len({Path(target).name for target in args.tgt}) < len(args.tgt):
        fail("two --tgt models have one name, and their figures would overwrite each other; run them one by one")
    return args


def named(args) -> SimpleNamespace:
    """What the report calls the classes of this run."""
    if args.pair_file:
        both = " and ".join(args.concepts)
        return SimpleNamespace(title=both, count="two", all=f"classes {both}", others="other class", one="class")
    return SimpleNamespace(title="Emotions", count="six", all="six emotions", others="other five emotions", one="emotion")


def pair_counts(args) -> list[int]:
    """Numbers of example pairs that Figure 5 compares; those of a file are not a round number, and count too."""
    counts = [n for n in PAIRS_OF_FIGURE_5 if n <= args.pairs]
    return counts if counts and not args.pair_file else sorted({*counts, args.pairs})


# ---------------------------------------------------------------- data


def load_scenarios(folder: Path) -> dict[str, list[str]]:
    return {emotion: read_texts(folder / "emotions" / f"{emotion}.json") for emotion in EMOTIONS}


def split(scenarios: dict[str, list[str]], args) -> dict:
    """{"shots": [(label, scenario)], emotion: {"positive", "negative", "validation", "test"}}, lists of scenarios.

    clean: each list gives some scenarios to the few-shot prompt, 40 to the negatives of the other emotions' vectors,
    10 to validation and the rest to the test. A vector's positives are its own emotion's list, which its test never sees."""
    shuffled = {e: random.Random(f"{args.seed} {e}").sample(texts, len(texts)) for e, texts in scenarios.items()}
    if args.protocol == "paper":
        shots = [(label, text if text in scenarios[true] else scenarios[true][0]) for label, true, text in PAPER_SHOTS]
        data = {"shots": shots[:args.shots]}
        for emotion in EMOTIONS:
            others = [text for other in EMOTIONS if other != emotion for text in shuffled[other]]
            negative = random.Random(f"{args.seed} {emotion} negative").sample(others, min(args.pairs, len(others)))
            test = negative[:args.limit if args.limit > 0 else None]
            data[emotion] = {"positive": shuffled[emotion][:args.pairs], "negative": negative,
                             "validation": test, "test": test}
        return data

    shots_each = math.ceil(args.shots / 6)
    ends = np.cumsum([shots_each, 40, 10])
    if (shortest := min(map(len, shuffled.values()))) < ends[-1] + 10:
        fail(f"the shortest list has {shortest} scenarios; shots, refinement, validation and test need {ends[-1] + 10}")
    shots = [(emotion, shuffled[emotion][i]) for i in range(shots_each) for emotion in EMOTIONS]
    data = {"shots": random.Random(args.seed).sample(shots, len(shots))[:args.shots]}
    for emotion in EMOTIONS:
        others = [shuffled[other] for other in EMOTIONS if other != emotion]
        mix = random.Random(f"{args.seed} {emotion}")
        parts = [[text for texts in zip(*(other[a:b] for other in others)) for text in texts] for a, b in
                 [(ends[0], ends[1]), (ends[1], ends[2]), (ends[2], None)]]    # the others in turn, equally many of each
        negative = mix.sample(parts[0], len(parts[0]))
        data[emotion] = {"positive": shuffled[emotion][shots_each:][:args.pairs], "negative": negative[:args.pairs],
                         "validation": parts[1], "test": parts[2][:args.limit if args.limit > 0 else None]}
    return data


def load_pairs(path: Path) -> list[tuple[str, str]]:
    """(positive, negative) texts of a file of one's own. No text may come twice: a test would not be unseen."""
    wanted = 'each line must be {"positive": text, "negative": text}'
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--pairs: cannot read {path}: {error}")
    pairs, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, pair = f"{path}, line {number}", []
        try:
            content = json.loads(line)
        except ValueError as error:
            fail(f"{where} is not JSON ({error}): {wanted}")
        for side in ("positive", "negative"):
            if not isinstance(content, dict) or side not in content:
                fail(f'{where} has no "{side}": {wanted}')
            if not isinstance(content[side], str) or not content[side].strip():
                fail(f'{where}: "{side}" must be a text, and not empty')
            pair.append(text := content[side].strip())
            if text in seen:
                fail(f'{where}: "{side}" is a text that stands in line {seen[text]} already; take one of them out')
            seen[text] = number
        pairs.append(tuple(pair))
    return pairs


def split_pairs(pairs: list[tuple[str, str]], args) -> dict:
    """What split gives, of pairs: half of them make the vectors, 15 % are for validation, the rest for the test. A pair is in
    one part as a whole, for its two texts may have all but the concept in common. The vector to either class is the other's
    with its sign turned, so `other-concept` shows what the opposite direction does."""
    shots_each = math.ceil(args.shots / 2)
    if len(pairs) < shots_each + 20:
        fail(f"{args.pair_file} has {len(pairs)} pairs; shots, refinement, validation and test need {shots_each + 20} or more")
    shuffled = random.Random(args.seed).sample(pairs, len(pairs))
    ends = [shots_each + int((len(pairs) - shots_each) * share) for share in (0, 0.5, 0.65)]
    shown, learn, validation, test = (shuffled[a:b] for a, b in zip([0, *ends], [*ends, None]))
    shots = [(concept, pair[side]) for pair in shown for side, concept in enumerate(args.concepts)]
    data = {"shots": random.Random(args.seed).sample(shots, len(shots))[:args.shots]}
    for side, concept in enumerate(args.concepts):
        data[concept] = {"positive": [pair[side] for pair in learn], "negative": [pair[1 - side] for pair in learn],
                         "validation": [pair[1 - side] for pair in validation],
                         "test": [pair[1 - side] for pair in test][:args.limit if args.limit > 0 else None]}
    return data


def prompts(data: dict, texts: list[str], args, shots: bool) -> list[str]:
    """The prompts of scenarios: bare for refinement, after the few-shot examples for evaluation."""
    words = dict(zip(args.concepts, args.labels))
    shot = SHOT if args.template == TEMPLATE else args.template + " {label}."
    choices = ", ".join(f'"{word}"' for word in args.labels)
    examples = [shot.replace("{choices}", choices).replace("{label}", words[label]).replace("{scenario}", text)
                for label, text in data["shots"]] if shots else []
    return ["\n".join([*examples, args.template.replace("{scenario}", text)]) for text in texts]


def check_prompts(data: dict, name: str, args, shots: bool) -> None:
    """Refuse, before any weights are loaded, prompts that do not fit the context and labels that look alike."""
    config, tokenizer = model_config(name)
    texts = list(dict.fromkeys(text for emotion in args.concepts for part in data[emotion].values() for text in part))
    longest = max(map(len, tokenizer(prompts(data, texts, args, shots), verbose=False).input_ids))
    if longest + 8 > context_length(config):
        fail(f"a prompt of {longest} tokens and the answer do not fit the context of {name} ({context_length(config)} "
             f"tokens); try {'fewer --shots or ' if shots else ''}a shorter --template")
    if not shots:
        return                                  # the source is not asked for a label
    try:
        label_tokens(SimpleNamespace(name=name, config=config, tokenizer=tokenizer), prompts(data, texts[:1], args, shots)[0],
                     args.labels)
    except ValueError as error:
        fail(f"{name}: {error}; give others with --labels")


# ---------------------------------------------------------------- refine, reformulate


def example_states(model, data: dict, blocks: list[int], args) -> dict:
    """{emotion: (positive, negative)} last-token states [pairs, len(blocks), d] of the refinement prompts."""
    states = {}
    for emotion in args.concepts:
        n = min(len(data[emotion]["positive"]), len(data[emotion]["negative"]))
        asked = {side: prompts(data, data[emotion][side][:n], args, shots=False) for side in ("positive", "negative")}
        states[emotion] = tuple(hidden_states(model, asked[side], blocks, label=f"{emotion}, {side}") for side in asked)
    return states


def refine_emotions(states: dict, pairs: int, args) -> torch.Tensor:
    """v of each emotion at each block [emotions, len(blocks), d], from so many pairs (Eq. 1)."""
    return torch.stack([refine(positive[:pairs], negative[:pairs], args.refine) for positive, negative in states.values()])


def fit_by_gradient_descent(x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, float]:
    """Held-out fit of a linear layer trained as in App. A (Adam, lr 1e-4, 20 epochs, batches of 32), for comparison."""
    n = len(x) - int(len(x) * 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = torch.nn.Linear(x.shape[1], y.shape[1])
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
        for _ in range(20):
            for rows in torch.randperm(n).split(32):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(layer(x[rows]), y[rows]).backward()
                optimizer.step()
    return held_out_fit(layer(x[n:]).detach(), y[n:], y[:n].double().mean(0))


def block_grid(args, target: str) -> list[tuple[int, int]]:
    """(source block, target block) that --layer means; the pairs to choose from for auto."""
    depths = DEPTHS if args.layer == "auto" else [args.layer]
    blocks = [model_config(name)[0].num_hidden_layers for name in (args.src, target)]
    return [tuple(block_index(str(depth), blocks[side], side) for side in (0, 1)) for depth in depths]


class Pair:
    """Source and one target, ready to transplant: states collected, vectors refined. Built when a step needs it."""

    def __init__(self, args, data: dict, sentences: list[str], target: str, load):
        self.args, self.grid, self.prose = args, block_grid(args, target), sentences[-50:]
        source_blocks, target_blocks = map(list, zip(*self.grid))
        states = example_states(load(args.src), data, source_blocks, args)
        self.v = {n: refine_emotions(states, n, args) for n in {*pair_counts(args), args.pairs}}
        x = hidden_states(load(args.src_base), sentences, source_blocks, label="plain sentences, source")
        self.model = load(target)
        self.bridge = Bridge(x, hidden_states(self.model, sentences, target_blocks, label="plain sentences, target"), args)
        self.own = refine_emotions(example_states(self.model, data, target_blocks, args), args.pairs, args)

    def mapped(self, i: int, pairs: int | None = None, **which) -> torch.Tensor:
        """v^ of each emotion [emotions, d_target] at pair i of the grid (Eq. 2)."""
        return self.bridge.carry(self.v[pairs or self.args.pairs][:, i], i, **which)


# ---------------------------------------------------------------- transplant and score: the steps of a run


def validate(pair: Pair, args, data: dict) -> dict:
    """Mean Token Acc on the validation scenarios for each block pair and alpha; the best of them is `chosen`."""
    rows = []
    for i, (source_block, target_block) in enumerate(pair.grid):
        vectors, hits = pair.mapped(i), torch.zeros(len(args.alpha))
        for e, emotion in enumerate(args.concepts):
            transplants = [Transplant.of(vectors[e], target_block, alpha) for alpha in args.alpha]
            said, _ = score_labels(pair.model, prompts(data, data[emotion]["validation"], args, shots=True), args.labels,
                                   transplants, label=f"validation {emotion}")
            hits += (said == e).sum(1)
        n = sum(len(data[emotion]["validation"]) for emotion in args.concepts)
        rows += [{"i": i, "source_block": source_block, "target_block": target_block, "alpha": alpha, "hits": int(hit),
                  "n": n} for alpha, hit in zip(args.alpha, hits)]
    return {"grid": rows, "chosen": max(rows, key=lambda row: (row["hits"], -abs(row["alpha"])))}


def score(pair: Pair, args, data: dict, emotion: str, chosen: dict) -> list[dict]:
    """What the target says about the test scenarios of one emotion, under the transplant and under each control."""
    e, i, block, best = args.concepts.index(emotion), chosen["i"], chosen["target_block"], chosen["alpha"]
    vectors = pair.mapped(i)
    v = vectors[e]
    arms = [("base", 0.0, "", BASE)]
    arms += [("contrans", alpha, "", Transplant.of(v, block, alpha)) for alpha in args.alpha]
    arms += [("self-align", alpha, "", Transplant.of(pair.own[e, i], block, alpha)) for alpha in args.alpha]
    arms += [("random", best, f"direction {r}", Transplant.of(direction, block, best))
             for r, direction in enumerate(random_directions(v, args.random, args.seed * 6 + e))]
    arms += [("other-concept", best, other, Transplant.of(vectors[o] / vectors[o].norm() * v.norm(), block, best))
             for o, other in enumerate(args.concepts) if o != e]
    wrong = pair.mapped(i, shuffled=True)[e]
    arms += [("shuffled-map", best, "", Transplant.of(wrong / wrong.norm() * v.norm(), block, best))]
    arms += [("contrans", best, f"map {number}", Transplant.of(pair.mapped(i, number=number)[e], block, best))
             for number in range(1, args.maps)]
    arms += [("contrans", best, f"pairs {n}", Transplant.of(pair.mapped(i, pairs=n)[e], block, best))
             for n in pair_counts(args)]
    said, preferred = score_labels(pair.model, prompts(data, data[emotion]["test"], args, shots=True), args.labels,
                                   [arm[-1] for arm in arms], label=f"{emotion} under {len(arms)} transplants")
    return [{"emotion": emotion, "wanted": e, "method": method, "alpha": alpha, "detail": detail, "said": said[t].tolist(),
             "preferred": preferred[t].tolist()} for t, (method, alpha, detail, _) in enumerate(arms)]


def fits(pair: Pair, args, data: dict, chosen: dict, folder: Path) -> dict:
    """How well the maps predict held-out states, and how large everything is; saves the transplanted vectors."""
    i, vectors, bridge = chosen["i"], pair.mapped(chosen["i"]), pair.bridge
    rows = bridge.sample(0)
    maps, shuffled = [bridge.affine(i, number=number) for number in range(args.maps)], bridge.affine(i, shuffled=True)
    for emotion, vector in zip(args.concepts, vectors):
        save_concept(folder / f"v_{emotion}_{Path(pair.model.name).name}.safetensors", vector, concept=emotion,
                     source=args.src, target=pair.model.name, fingerprint=pair.model.fingerprint,
                     layer=chosen["target_block"], source_layer=chosen["source_block"], method=args.refine,
                     pairs=min(args.pairs, len(data[emotion]["positive"]), len(data[emotion]["negative"])),
                     first_prompt=prompts(data, data[emotion]["positive"], args, shots=False)[0],
                     fitted_on=maps[0].n, r2=maps[0].r2, cosine=maps[0].cosine)
    return {"closed form": [{"r2": fitted.r2, "cosine": fitted.cosine} for fitted in maps],
            "shuffled": {"r2": shuffled.r2, "cosine": shuffled.cosine}, "fitted on": maps[0].n,
            "gradient descent": fit_by_gradient_descent(bridge.x[rows, i], bridge.y[rows, i], args.seed),
            "source stream": bridge.x[:, i].norm(dim=1).mean().item(),
            "|v|": pair.v[args.pairs][:, i].norm(dim=1).mean().item(),
            "target stream": bridge.y[:, i].norm(dim=1).mean().item(), "|v^|": vectors.norm(dim=1).mean().item(),
            "|own v|": pair.own[:, i].norm(dim=1).mean().item(),
            "cosine to own": torch.cosine_similarity(vectors, pair.own[:, i]).mean().item()}


def side_effects(pair: Pair, args, chosen: dict) -> list[dict]:
    """Perplexity of plain sentences under each emotion's transplant, and under three random directions of its norm."""
    i, block = chosen["i"], chosen["target_block"]
    arms = [("", "base", 0.0, BASE)]
    for e, (emotion, v) in enumerate(zip(args.concepts, pair.mapped(i))):
        arms += [(emotion, "contrans", alpha, Transplant.of(v, block, alpha)) for alpha in args.alpha]
        arms += [(emotion, "random", chosen["alpha"], Transplant.of(direction, block, chosen["alpha"]))
                 for direction in random_directions(v, 3, args.seed * 6 + e)]
    values, tokens = perplexity(pair.model, pair.prose, [arm[-1] for arm in arms])
    return [{"emotion": emotion, "method": method, "alpha": alpha, "perplexity": value, "tokens": tokens}
            for (emotion, method, alpha, _), value in zip(arms, values.tolist())]


def look(pair: Pair, args, data: dict, chosen: dict) -> dict:
    """What Figure 2b and Tables 5 and 8 show: the last block's states before and after a vector, texts, token changes."""
    from sklearn.decomposition import PCA
    i, block, alpha = chosen["i"], chosen["target_block"], chosen["alpha"]
    moves = [Transplant.of(vector, block, alpha) for vector in pair.mapped(i)]
    texts, last = own_scenarios(args, data, 20), [len(pair.model.layers) - 1]
    asked = prompts(data, [text for _, text in texts], args, shots=True)
    before = hidden_states(pair.model, asked, last)[:, 0]
    after = hidden_states(pair.model, asked, last, moves[args.concepts.index(pictured(args))])[:, 0]
    pca = PCA(2).fit(torch.cat([before, after]).numpy())

    examples, tokens = [], {}
    for e, emotion in enumerate(args.concepts):
        test = data[emotion]["test"]
        asked, shown = prompts(data, test, args, shots=True), e % len(test)
        room = context_length(pair.model.config) - max(map(len, pair.model.tokenizer(asked).input_ids))
        for method, transplant in (("base", BASE), ("contrans", moves[e])):
            text = generate(pair.model, asked[shown:shown + 1], transplant, max_new_tokens=min(24, room))[0]
            examples.append({"emotion": emotion, "method": method, "scenario": test[shown], "text": text})
        plain, moved = logit_lens(pair.model, asked, block, [BASE, moves[e]])
        tokens[emotion] = {sign: [(pair.model.tokenizer.decode([token]), count) for token, count in
                                  Counter(change.topk(10).indices.flatten().tolist()).most_common(10)]
                           for sign, change in (("up", moved - plain), ("down", plain - moved))}
    return {"labels": [emotion for emotion, _ in texts], "before": pca.transform(before.numpy()).tolist(),
            "after": pca.transform(after.numpy()).tolist(), "examples": examples, "tokens": tokens}


def pictured(args) -> str:
    """The emotion whose vector Figure 2b shows."""
    return "fear" if "fear" in args.concepts else args.concepts[0]


def own_scenarios(args, data: dict, each: int) -> list[tuple[str, str]]:
    """(emotion, scenario) of so many scenarios of every emotion's own list, to look at, not to test on."""
    return [(emotion, text) for emotion in args.concepts for text in data[emotion]["positive"][-each:]]


def source_map(model, args, data: dict, block: int) -> dict:
    """t-SNE of the source's states, Figure 7."""
    from sklearn.manifold import TSNE
    texts = own_scenarios(args, data, 60)
    states = hidden_states(model, prompts(data, [text for _, text in texts], args, shots=False), [block])[:, 0]
    points = TSNE(2, perplexity=min(30, len(texts) // 4), init="pca", random_state=args.seed).fit_transform(states.numpy())
    return {"labels": [emotion for emotion, _ in texts], "points": points.tolist()}


# ---------------------------------------------------------------- records and tables


def pooled(arms: list[dict], key: str = "said", **match) -> tuple[float, float, float, int]:
    """(rate, low, high, n): share of test scenarios on which the target emotion won, over all arms that match."""
    arms = [arm for arm in arms if all(arm[name] == value for name, value in match.items())]
    hits = sum(answer == arm["wanted"] for arm in arms for answer in arm[key])
    n = sum(len(arm[key]) for arm in arms)
    return hits / n, *wilson(hits, n), n


def make_records(args, target: str, role: str | None, validation: dict, arms: list[dict], fitted: dict,
                 side: list[dict] = ()) -> list[dict]:
    def blocks(row):
        return f"{row['source_block']}->{row['target_block']}"

    about = {"experiment": "emotion", "source": args.src, "target": target, "layer": blocks(validation["chosen"])}
    records = []

    def add(rate, **fields):
        records.append(record(**about | dict(zip(("value", "low", "high", "n"), rate)) | fields))

    for row in validation["grid"]:
        add((row["hits"] / row["n"], *wilson(row["hits"], row["n"]), row["n"]), concept=f"mean of {named(args).count}",
            method="contrans", split="validation", metric="token_acc", alpha=row["alpha"], layer=blocks(row))
    for arm in arms:
        drawn = arm["method"] in ("base", "contrans") and not arm["detail"]
        item = ITEM.get(role, "") if drawn else "Figure 5" if arm["detail"].startswith("pairs") else ""
        paper = PAPER.get(role, {}).get(arm["alpha"]) if drawn else None
        what = {"concept": arm["emotion"], "method": arm["method"], "alpha": arm["alpha"], "item": item,
                "split": f"test {arm['detail']}".strip()}
        add(pooled([arm]), metric="token_acc", paper=paper and paper[arm["wanted"]], **what)
        add(pooled([arm], "preferred"), metric="logit_acc", **what)
    for arm in side:
        add((arm["perplexity"], None, None, arm["tokens"]), concept=arm["emotion"], method=arm["method"],
            alpha=arm["alpha"], metric="perplexity", split="plain sentences")
    for method, qualities in (("contrans", fitted["closed form"]), ("gradient-descent", [fitted["gradient descent"]]),
                              ("shuffled-map", [fitted["shuffled"]])):
        for number, quality in enumerate(qualities):
            for metric in ("r2", "cosine"):
                add((quality[metric], None, None, fitted["fitted on"]), concept="map", method=method, metric=metric,
                    split=f"held-out map {number}")
    return records


def cell(arms: list[dict], **match) -> str:
    """Token Acc [95 % interval] / Logit Acc, in %."""
    (value, low, high, _), (logit, *_) = pooled(arms, **match), pooled(arms, "preferred", **match)
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * logit:.1f}"


def accuracy_table(args, target: str, role: str | None, chosen: dict, arms: list[dict]) -> str:
    """Figures 2a and 6 in numbers, the paper's beside ours."""
    paper = PAPER.get(role, {})
    rows = []
    for e, emotion in enumerate([*args.concepts, "mean"]):
        row = [emotion]
        for alpha in [0, *args.alpha]:
            match = {"method": "contrans" if alpha else "base", "alpha": alpha, "detail": ""}
            match |= {"emotion": emotion} if emotion != "mean" else {}
            published = f" ({100 * [*paper[alpha], np.mean(paper[alpha])][e]:.0f})" if alpha in paper else ""
            row.append(cell(arms, **match) + published)
        rows.append(row)
    n = pooled(arms, method="base", emotion=args.concepts[0])[3]
    place = f" (in the place of the paper's {role})" if role and args.family == "toy" else ""
    return (f"## {ITEM.get(role, named(args).title)}: {Path(args.src).name} -> {Path(target).name}{place}\n\n"
            f"Token Acc [95 % interval] / Logit Acc{' (the paper’s Token Acc)' if paper else ''}, in %, on scenarios of the "
            f"{named(args).others}, n = {n} each;\n"
            f"block {chosen['source_block']} -> {chosen['target_block']}, protocol {args.protocol}\n\n"
            + markdown([named(args).one, "base", *(f"α = {alpha:g}" for alpha in args.alpha)], rows))


def control_table(args, chosen: dict, arms: list[dict], side: list[dict]) -> str:
    """The effect beside its controls and its price in perplexity, at the strength that validation chose."""
    best = chosen["alpha"]

    def price(method, alpha):
        return f"{np.mean([arm['perplexity'] for arm in side if (arm['method'], arm['alpha']) == (method, alpha)]):.1f}"

    directions = [pooled(arms, method="random", detail=f"direction {r}")[0] for r in range(args.random)]
    maps = [pooled(arms, method="contrans", alpha=best, detail=f"map {k}" if k else "")[0] for k in range(args.maps)]
    rows = [["base", "0", cell(arms, method="base"), price("base", 0), "false positives"],
            ["ConTrans", f"{best:g}", cell(arms, method="contrans", alpha=best, detail=""), price("contrans", best),
             f"percentile {percentile(maps[0], directions):.0f} of the random directions"],
            ["", "", f"{100 * min(maps):.1f} to {100 * max(maps):.1f}", "", f"{args.maps} maps fitted on different sentences"],
            ["random", f"{best:g}", cell(arms, method="random"), price("random", best),
             f"{args.random} directions: {100 * min(directions):.1f} to {100 * max(directions):.1f}"],
            ["other-concept", f"{best:g}", cell(arms, method="other-concept"), "", f"the vectors of the {named(args).others}"],
            ["shuffled-map", f"{best:g}", cell(arms, method="shuffled-map"), "", "map fitted on shuffled sentences"]]
    rows += [["Self-Align", f"{alpha:g}", cell(arms, method="self-align", alpha=alpha), "", "the target's own vector"]
             for alpha in args.alpha]
    choice = "was chosen on validation" if chosen["hits"] else "is the smallest: none had any effect on validation"
    return (f"Mean of the {named(args).all}, n = {pooled(arms, method='base')[3]} a direction; α = {best:g} {choice}; "
            "controls have the norm of v^\n\n"
            + markdown(["method", "α", "Token Acc / Logit Acc", "perplexity of prose", "note"], rows))


def grid_table(args, grid: list[dict]) -> str:
    """Token Acc of the whole validation grid, where --layer auto tried more than one pair of blocks."""
    rows = [[f"{first['source_block']} -> {first['target_block']}",
             *(f"{100 * row['hits'] / row['n']:.1f}" for row in grid if row["i"] == first["i"])]
            for first in grid[::len(args.alpha)]]
    header = ["blocks", *(f"α = {alpha:g}" for alpha in args.alpha)]
    return f"Validation, mean Token Acc [%], n = {grid[0]['n']}\n\n" + markdown(header, rows) if len(rows) > 1 else ""


def map_text(fitted: dict) -> str:
    quality = {name: f"R² {fit['r2']:.3f}, cosine {fit['cosine']:.3f}" for name, fit in
               {**fitted, "closed form": fitted["closed form"][0]}.items() if isinstance(fit, dict)}
    return (f"Affine map on {fitted['fitted on']} sentences, held out: closed form {quality['closed form']}; "
            f"gradient descent (App. A) {quality['gradient descent']};\nshuffled sentences {quality['shuffled']}. "
            f"Mean |v| {fitted['|v|']:.2f} in a stream of norm {fitted['source stream']:.1f}; "
            f"|v^| {fitted['|v^|']:.2f} in {fitted['target stream']:.1f};\n"
            f"the target's own |v| {fitted['|own v|']:.2f}, cosine of v^ with it {fitted['cosine to own']:.2f}.")


def text_tables(args, seen: dict, chosen: dict) -> str:
    """Tables 5 and 8."""
    examples = [[example["emotion"], example["method"], example["scenario"], " ".join(example["text"].split())[:60]]
                for example in seen["examples"]]
    tokens = [[emotion, *(", ".join(f"({token.strip() or repr(token)}, {count})" for token, count in change[sign][:6])
                          for sign in ("up", "down"))] for emotion, change in seen["tokens"].items()]
    return (f"Table 5: continuations without and with v^ at α = {chosen['alpha']:g}\n\n"
            + markdown([f"target {named(args).one}", "method", "scenario", "continuation"], examples)
            + "\n\nTable 8: tokens among the ten that change most, and on how many test scenarios (logit lens after block "
            + f"{chosen['target_block']})\n\n" + markdown([named(args).one, "increased", "decreased"], tokens))


def summary(args, results: list[dict]) -> str:
    """One line a target, the last thing that is printed."""
    rows = []
    for result in results:
        arms, best = result["arms"], result["chosen"]["alpha"]
        rows.append([Path(result["target"]).name, f"{best:g}", cell(arms, method="base"),
                     cell(arms, method="contrans", alpha=best, detail=""), cell(arms, method="random"),
                     cell(arms, method="self-align", alpha=best)])
    return (f"## Summary: v of {Path(args.src).name}, Token Acc [95 % interval] / Logit Acc, "
            f"mean of {named(args).all}\n\n"
            + markdown(["target", "α", "base", "ConTrans", f"{args.random} random directions", "Self-Align"], rows))


# ---------------------------------------------------------------- figures


COLOURS = ["#f2b134", "#3b6fb6", "#c8352b", "#4f9d69", "#8a5a9e", "#e07b39"]
SHADES = ["#d9d9d9", "#b9d1ea", "#6fa3d6", "#2f6db2", "#163f75", "#0b2547"]


def new_figure(**size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt.subplots(**size)


def draw_accuracy(args, target: str, arms: list[dict], best: float):
    """Figures 2a and 6: Token Acc bars with intervals, Logit Acc line, the range of the random controls as a band."""
    figure, axis = new_figure(figsize=(5.5 + len(args.concepts) / 2, 3.4), layout="constrained")
    strengths = [0, *args.alpha]
    width = 0.8 / len(strengths)
    for e, emotion in enumerate(args.concepts):
        match = [{"emotion": emotion, "method": "contrans" if alpha else "base", "alpha": alpha, "detail": ""}
                 for alpha in strengths]
        value, low, high, _ = np.array([pooled(arms, **m) for m in match]).T
        x = e + (np.arange(len(strengths)) - (len(strengths) - 1) / 2) * width
        axis.bar(x, value, width * 0.92, color=SHADES[:len(strengths)], yerr=np.clip([value - low, high - value], 0, 1),
                 error_kw={"lw": 0.8, "ecolor": "#444"})
        axis.plot(x, [pooled(arms, "preferred", **m)[0] for m in match], "o--", color="#c8352b", ms=3, lw=1,
                  label="Logit Acc" if e == 0 else None)
        controls = [pooled([arm])[0] for arm in arms if (arm["emotion"], arm["method"]) == (emotion, "random")]
        axis.fill_between([e - 0.42, e + 0.42], min(controls), max(controls), color="#555", alpha=0.35, lw=0,
                          label=f"random directions at α = {best:g}, range" if e == 0 else None)
    for shade, alpha in zip(SHADES, strengths):
        axis.bar(0, 0, color=shade, label=f"Token Acc, α = {alpha:g}" if alpha else "Token Acc, base")
    axis.set(xticks=range(len(args.concepts)), xticklabels=args.concepts, ylim=(0, 1.05),
             ylabel="accuracy on negative scenarios",
             title=f"{Path(args.src).name} → {Path(target).name}: how often the target {named(args).one} is named "
                   "(95 % interval)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_pca(seen: dict, args, target: str, alpha: float):
    """Figure 2b: states of the last block before (pale) and after (dark) one vector; an arrow joins the centres."""
    figure, axis = new_figure(figsize=(5.4, 4.4), layout="constrained")
    before, after, labels = np.array(seen["before"]), np.array(seen["after"]), np.array(seen["labels"])
    for emotion, colour in zip(args.concepts, COLOURS):
        mine = labels == emotion
        axis.scatter(*before[mine].T, s=14, color=colour, alpha=0.35, lw=0)
        axis.scatter(*after[mine].T, s=14, color=colour, marker="^", lw=0, label=emotion)
        axis.annotate("", after[mine].mean(0), before[mine].mean(0),
                      arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.8})
    axis.set(xlabel="first principal component", ylabel="second principal component",
             title=f"{Path(target).name} before (dots) and after (triangles)\n"
                   f"{alpha:g} · v̂ of {pictured(args)} from {Path(args.src).name}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_pairs(args, results: list[dict]):
    """Figure 5: mean Token Acc against the number of example pairs."""
    figure, axis = new_figure(figsize=(4.8, 3.2), layout="constrained")
    counts = pair_counts(args)
    for colour, result in zip(["#2f6db2", "#e07b39", "#4f9d69", "#8a5a9e"], results):
        points = np.array([pooled(result["arms"], detail=f"pairs {n}") for n in counts])
        axis.fill_between(counts, points[:, 1], points[:, 2], color=colour, alpha=0.15, lw=0)
        axis.plot(counts, points[:, 0], "o-", color=colour, ms=4,
                  label=f"{Path(result['target']).name}, α = {result['chosen']['alpha']:g}")
    axis.set(xlabel="example pairs of one vector", ylabel="mean Token Acc", ylim=(0, 1.05),
             title="Effect of the number of pairs (95 % interval)" + (f"\n{named(args).title}" if args.pair_file else ""))
    axis.legend(frameon=False, loc="lower right")
    return figure


def draw_tsne(args, points: dict, block: int):
    """Figure 7: t-SNE of the source's states."""
    figure, axis = new_figure(figsize=(5, 4.2), layout="constrained")
    xy, labels = np.array(points["points"]), np.array(points["labels"])
    for emotion, colour in zip(args.concepts, COLOURS):
        axis.scatter(*xy[labels == emotion].T, s=14, color=colour, lw=0, label=emotion)
    axis.set(xticks=[], yticks=[], title=f"t-SNE of {Path(args.src).name}, block {block}, last token")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---------------------------------------------------------------- from the arguments to the figures


def main(argv=None):
    args = options(argv)
    if args.pair_file:
        pairs = load_pairs(args.pair_file)
        data, digest = split_pairs(pairs, args), hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
        args.pairs = len(data[args.concepts[0]]["positive"])
    else:
        data, digest = split(load_scenarios(args.data), args), fingerprint(str(args.data / "emotions"))
    check_prompts(data, args.src, args, shots=False)
    for name in args.tgt:
        check_prompts(data, name, args, shots=True)
    for target in args.tgt:
        block_grid(args, target)                # an impossible --layer ends here, before any weights are loaded
    sentences = plain_sentences(args, [args.src_base, *args.tgt])
    names = [args.src, args.src_base, *args.tgt]
    run = Run("exp_emotion", args, {name: fingerprint(name) for name in names} | {
        "emotions": digest,
        "sentences": hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16],
        "first refinement prompt": prompts(data, data[args.concepts[0]]["positive"], args, shots=False)[0],
        "first test prompt": prompts(data, data[args.concepts[0]]["test"], args, shots=True)[0]})
    load = loader(args)

    results, records, examples, texts = [], [], [], []
    for number, target in enumerate(args.tgt):
        role = None if args.pair_file else ROLE.get(target)         # whose numbers in the paper stand beside ours
        pair = functools.cache(lambda target=target: Pair(args, data, sentences, target, load))
        validation = run.step(f"{number} validation", lambda: validate(pair(), args, data))
        chosen = validation["chosen"]
        arms = []
        for emotion in args.concepts:
            arms += run.step(f"{number} {emotion}", lambda: score(pair(), args, data, emotion, chosen))
        fitted = run.step(f"{number} fits", lambda: fits(pair(), args, data, chosen, run.folder))
        side = run.step(f"{number} perplexity", lambda: side_effects(pair(), args, chosen))
        seen = run.step(f"{number} look", lambda: look(pair(), args, data, chosen))
        results.append({"target": target, "chosen": chosen, "arms": arms})
        records += make_records(args, target, role, validation, arms, fitted, side)
        examples += [{"target": target, **{name: arm[name] for name in ("emotion", "method", "alpha", "detail")},
                      "scenario": text, "said": said, "preferred": preferred} for arm in arms
                     for text, said, preferred in zip(data[arm["emotion"]]["test"], arm["said"], arm["preferred"])]
        texts += [accuracy_table(args, target, role, chosen, arms), control_table(args, chosen, arms, side),
                  grid_table(args, validation["grid"]), map_text(fitted), text_tables(args, seen, chosen)]
        run.figure(draw_accuracy(args, target, arms, chosen["alpha"]), f"accuracy_{Path(target).name}")
        run.figure(draw_pca(seen, args, target, chosen["alpha"]), f"pca_{Path(target).name}")
    block = results[0]["chosen"]["source_block"]
    points = run.step("source", lambda: source_map(load(args.src), args, data, block))
    run.figure(draw_tsne(args, points, block), "tsne_source")
    run.figure(draw_pairs(args, results), "pairs")
    texts.append(summary(args, results))
    run.save(records, examples, "\n\n".join(filter(None, texts)))


if __name__ == "__main__":
    run_script(main)
