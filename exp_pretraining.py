"""When does a concept form? Checkpoints of one pre-training run, Sec. 6.1, Figure 3.

    python exp_pretraining.py                                     toy zoo, one minute on 2 CPU cores
    python exp_pretraining.py --family amber --data data/paper --allow-pickle    14 GB a checkpoint
    python exp_pretraining.py --model EleutherAI/pythia-1b --data data/paper \\
        --revisions step1000 step8000 step143000 --tokens 2e9 17e9 300e9
    python exp_pretraining.py --tgt run/step1 run/step2 --tokens 1e6 2e6

The emotion vectors of the last checkpoint are mapped into every checkpoint and added there. On
scenarios of the *other* emotions, how often is the target emotion named, without them (false
positives) and with them? A vector cannot move a concept that has not formed yet.
    Token Acc    the most likely next token is the emotion's word
    Logit Acc    the emotion's word has the highest logit of all emotions' words

alpha is chosen for each checkpoint on a validation part. Checkpoints are loaded one after another;
one that this run has downloaded is removed from the hub's cache after its use.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common import BASE, Transplant, concept_vector, hidden_states, score_labels
from harness import (
    MODELS,
    TOY,
    Run,
    at_least,
    fail,
    map_methods,
    map_options,
    model_options,
    option_parser,
    parse_options,
    read_families,
    read_table,
    read_texts,
    run_script,
)
from models import Models
from report import (
    LOOK,
    MAP_METRICS,
    METHODS,
    OWN_CHOICES,
    PAGE,
    beside_controls,
    draw_curve,
    is_permuted,
    label,
    new_figure,
    pivot,
    pool,
    record,
    select,
    verdict,
)
from vectors import (
    AffineMaps,
    Context,
    LocalMaps,
    Maps,
    NearStates,
    control_directions,
    cut_ends,
    local_pool,
    near_states,
    permuted_vectors,
    plain_texts,
    rescale,
)

import numpy as np
import torch

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
# The zoo's models have so few blocks that the last one names the emotion.
ZOO = {"layer": "0.9", "limit": 50}
ZOO["tgt"] = [str(path) for path in sorted(TOY.glob("models/amber/step_*"))]
FAMILIES = read_families("checkpoints", SETTINGS, toy=ZOO)


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=("src", "tgt"))
    emotion_options(parser)
    add = parser.add_argument
    add("--model", metavar="REPO", help="hub repository with one revision per checkpoint")
    add("--revisions", nargs="+", metavar="NAME", help="its checkpoints; the last is the source")
    add("--tokens", nargs="+", type=float, metavar="N", help="training tokens of each checkpoint")
    add("--permutations", type=at_least(0), default=199, help="vectors of permuted labels")
    add("--keep-downloads", action="store_true", help="leave checkpoints in the hub's cache")
    args = parse_options(parser, FAMILIES, argv, complete)
    check_emotion_options(args)
    if args.layer == "auto" or "," in args.layer:
        fail("--layer must be one index or fraction: all checkpoints are compared at one block")
    args.tokens = args.tokens or [known_tokens(name) for name in args.tgt]
    if len(args.tokens) != len(args.tgt):
        fail(f"{len(args.tokens)} --tokens for {len(args.tgt)} checkpoints: give one each")
    growing = all(earlier < later for earlier, later in zip(args.tokens, args.tokens[1:]))
    if not growing or not all(0 < n < np.inf for n in args.tokens):
        fail("--tokens must be positive numbers that grow from checkpoint to checkpoint")
    return args


def complete(args) -> None:
    """The checkpoints are the targets; the last one is the source."""
    if bool(args.model) != bool(args.revisions):
        fail("--model and --revisions go together")
    if args.model and (args.tgt or args.src):
        fail("name the checkpoints with --model and --revisions, or with --tgt")
    if args.model and Path(args.model).is_dir():
        fail(f"--model {args.model} is a folder, which has no revisions; name folders with --tgt")
    if args.model:
        args.tgt = [f"{args.model}@{revision}" for revision in args.revisions]
    if not args.tgt:
        fail("name the checkpoints with --tgt, or with --model and --revisions")
    if len(set(args.tgt)) < len(args.tgt):
        fail("a checkpoint is named twice")
    args.src = args.src or args.tgt[-1]


def known_tokens(name: str) -> float:
    """Training tokens of a checkpoint: from its folder, or known of its repository."""
    try:
        return float(json.loads((Path(name) / "training.json").read_text())["tokens"])
    except (OSError, ValueError, KeyError, TypeError):  # no such note, or another program's
        pass
    for row in read_table(MODELS, "base", "tokens"):
        if row["base"] == name and row["tokens"]:
            return float(row["tokens"])
    fail(f"how many training tokens has {name} seen? Give a number per checkpoint with --tokens")


# ---------------------------------------------------------------- the emotion task
# This section is the same, to the letter, in exp_emotion.py, exp_pretraining.py and exp_pythia.py.

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]
TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."
# The few-shot examples of the released emotion code: label, true class, scenario. All are wrong.
PAPER_SHOTS = [
    ("anger", "fear", "You're told you need to undergo an emergency medical procedure."),
    ("disgust", "surprise", "You encounter a new type of crosswalk signal in your city."),
    ("fear", "disgust", "You hear someone hocking up phlegm and spitting in a public trash can."),
    ("happiness", "fear", "You notice your personal information has been leaked online."),
    ("sadness", "disgust", "You find a dirty diaper abandoned on a beach."),
    ("surprise", "fear", "You're on public transit and someone starts acting erratically."),
]


def emotion_options(parser) -> None:
    add = parser.add_argument
    add("--protocol", choices=["clean", "paper"], default="clean", help="disjoint parts or not")
    add(
        "--shots", type=at_least(0), default=6, help="few-shot examples in a test prompt (paper: 6)"
    )
    add("--pairs", type=at_least(1), default=200, help="example pairs of a vector (paper: 200)")
    add("--template", default=TEMPLATE, help="prompt with {scenario} in it, read before the label")
    add("--labels", nargs="+", default=EMOTIONS, metavar="WORD", help="words for EMOTIONS")


def check_emotion_options(args) -> None:
    if "{scenario}" not in args.template:
        fail("--template needs {scenario} in it")
    words = {word for word in args.labels if word.strip()}
    if len(words) != len(EMOTIONS) or len(args.labels) != len(EMOTIONS):
        fail(f"--labels must be {len(EMOTIONS)} different words, for {', '.join(EMOTIONS)}")
    if args.pairs == 1 and args.permutations:
        fail("--pairs 1: labels can be permuted in two pairs or more; add --permutations 0")
    if args.protocol == "paper" and not {true for _, true, _ in PAPER_SHOTS} <= set(EMOTIONS):
        fail("--protocol paper has few-shot examples of the paper's emotions only")


class Scenarios(NamedTuple):
    """The scenarios of one emotion."""

    positive: list[str]  # of its own list, for the vector
    negative: list[str]  # of the other lists, for the vector
    validation: list[str]  # of the other lists
    test: list[str]  # of the other lists


class Data(NamedTuple):
    shots: list[tuple[str, str]]  # (label, scenario) of the few-shot examples
    emotions: dict[str, Scenarios]


def load_data(args) -> Data:
    """Scenarios, split into parts.

    clean: each list gives some scenarios to the few-shot prompt, 40 to the negatives of the other
    emotions' vectors, 10 to their validation and the rest to their test."""
    folder = args.data / "emotions"
    lists = {emotion: read_texts(folder / f"{emotion}.json") for emotion in EMOTIONS}
    shuffled = {}
    for emotion, texts in lists.items():
        shuffled[emotion] = random.Random(f"{args.seed} {emotion}").sample(texts, len(texts))
    limit = args.limit if args.limit > 0 else None
    if args.protocol == "paper":
        return paper_split(args, lists, shuffled, limit)

    shots_each = -(-args.shots // len(EMOTIONS))  # rounded up
    shortest = min(map(len, lists.values()))
    if shortest < shots_each + 60:
        fail(f"{folder}: the shortest list has {shortest} scenarios; {shots_each + 60} are needed")
    shots = [(emotion, shuffled[emotion][i]) for i in range(shots_each) for emotion in EMOTIONS]
    shots = random.Random(args.seed).sample(shots, len(shots))[: args.shots]
    emotions = {}
    for emotion in EMOTIONS:
        others = [shuffled[other][shots_each:] for other in EMOTIONS if other != emotion]
        negative = take_turns([texts[:40] for texts in others])
        negative = random.Random(f"{args.seed} {emotion}").sample(negative, len(negative))
        emotions[emotion] = Scenarios(
            positive=shuffled[emotion][shots_each:][: args.pairs],
            negative=negative[: args.pairs],
            validation=take_turns([texts[40:50] for texts in others]),
            test=take_turns([texts[50:] for texts in others])[:limit],
        )
    return Data(shots, emotions)


def paper_split(args, lists: dict, shuffled: dict, limit: int | None) -> Data:
    """As in the released emotion code: a vector's negatives are also its validation and test."""
    shots = []
    others = {emotion: iter(texts) for emotion, texts in lists.items()}
    for word, true_class, text in PAPER_SHOTS[: args.shots]:
        known = text in lists[true_class]
        shots.append((word, text if known else next(others[true_class])))
    emotions = {}
    for emotion in EMOTIONS:
        others = [text for other in EMOTIONS if other != emotion for text in shuffled[other]]
        count = min(args.pairs, len(others))
        negative = random.Random(f"{args.seed} {emotion} negative").sample(others, count)
        test = negative[:limit]
        emotions[emotion] = Scenarios(shuffled[emotion][: args.pairs], negative, test, test)
    return Data(shots, emotions)


def take_turns(lists: list[list[str]]) -> list[str]:
    """One text of each list in turn, equally many of each."""
    return [text for texts in zip(*lists) for text in texts]


def prompts(args, data: Data, texts: list[str], shots: bool) -> list[str]:
    """The prompts of scenarios: alone for the vector, after the few-shot examples for the test."""
    words = dict(zip(EMOTIONS, args.labels))
    shot = SHOT if args.template == TEMPLATE else args.template + " {label}."
    shot = shot.replace("{choices}", ", ".join(f'"{word}"' for word in args.labels))
    examples = []
    for emotion, text in data.shots if shots else []:
        example = shot.replace("{label}", words[emotion])
        examples.append(example.replace("{scenario}", text))
    asked = []
    for text in texts:
        question = args.template.replace("{scenario}", text)
        asked.append("\n".join([*examples, question]))
    return asked


def pairs(args, data: Data, concept: str) -> tuple[list[str], list[str]]:
    """Positive and negative prompts of an emotion's vector; "fear 50" is of 50 pairs."""
    emotion, _, count = concept.partition(" ")
    positive, negative, *_ = data.emotions[emotion]
    n = min(len(positive), len(negative), int(count or args.pairs))
    asked = prompts(args, data, positive[:n] + negative[:n], shots=False)
    return asked[:n], asked[n:]


def read_context(args, data: Data) -> Context:
    """Where the emotions are read: the template, and the scenarios that make the vectors."""
    template = args.template.replace("{scenario}", "{text}")
    texts: dict[str, None] = {}  # each once, in order
    for each in data.emotions.values():
        texts |= dict.fromkeys([*each.positive, *each.negative])
    return Context((template,), tuple(texts))


def check_prompts(args, data: Data, models: Models, name: str) -> None:
    """Refuse, before any weights are loaded, prompts that are too long and labels that look
    alike."""
    texts = [text for parts in data.emotions.values() for part in parts for text in part]
    asked = prompts(args, data, list(dict.fromkeys(texts)), shots=True)
    models.require_fit(name, asked, new_tokens=8, advice="; try fewer --shots")
    models.require_labels(name, asked[0], args.labels)


def named(model, args, data: Data, part: str, emotion: str, transplants) -> list[dict]:
    """Whether a model names the emotion after each scenario of a part: under each transplant, the
    hits of both metrics."""
    asked = prompts(args, data, getattr(data.emotions[emotion], part), shots=True)
    answers = score_labels(model, asked, args.labels, transplants)
    said, preferred = [(each == EMOTIONS.index(emotion)).tolist() for each in answers]
    hits = []
    for token_acc, logit_acc in zip(said, preferred):
        hits.append({"token_acc": token_acc, "logit_acc": logit_acc})
    return hits


# ---------------------------------------------------------------- refine, map


class Lab:
    """What every step needs. Its methods are the steps."""

    def __init__(self, args, data: Data, sentences: list[str], models: Models):
        self.args, self.data, self.sentences, self.models = args, data, sentences, models
        self.context = read_context(args, data)
        names = list(dict.fromkeys([args.src, *args.tgt]))
        self.pool = None  # of a local map
        if "contrans-local" in map_methods(args):
            self.pool = local_pool(models, names, self.context, sentences)
        self.source: dict[str, torch.Tensor] = {}  # see collect_source

    def block(self, name: str) -> int:
        """The block that is read and edited."""
        return self.models.block(name, self.args.layer, side=name != self.args.src)

    def load(self, name: str):
        return self.models.load(name)

    def collect(self, name: str) -> dict[str, torch.Tensor]:
        """v of each emotion [6, d] (Eq. 1) and states of the plain sentences [n, d] of a
        checkpoint."""
        model, block, v = self.load(name), self.block(name), []
        for emotion in EMOTIONS:
            both = pairs(self.args, self.data, emotion)
            v.append(concept_vector(model, *both, [block], self.args.refine)[0])
        plain = hidden_states(model, cut_ends(self.sentences), [block])[:, 0]
        return {"v": torch.stack(v), "plain": plain}

    def collect_source(self, name: str) -> dict[str, torch.Tensor]:
        """The same of the source, its vectors of permuted labels [n, 6, d], and for a local map its
        states x [m, d] at those places (rows) of the pool that are nearest to the states that v is
        computed from."""
        model, block = self.load(name), self.block(name)
        read = prompts(self.args, self.data, list(self.context.texts), shots=False)
        states = hidden_states(model, read, [block])
        state_of, null = dict(zip(read, states)), []
        for e, emotion in enumerate(EMOTIONS):
            both = pairs(self.args, self.data, emotion)
            positive, negative = [torch.stack([state_of[each] for each in side]) for side in both]
            permuted = permuted_vectors(positive, negative, self.args.permutations, self.seed(e))
            null.append(permuted[:, 0])
        found = self.collect(name) | {"permuted": torch.stack(null, 1)}
        if self.pool:
            near = near_states(model, self.pool, {block: states[:, 0]}, len(self.sentences))
            found |= {"x": near.x[block], "rows": torch.tensor(near.rows[block])}
        return found

    def seed(self, e: int) -> int:
        """Of the random directions and permuted labels of emotion e."""
        return self.args.seed * len(EMOTIONS) + e

    def maps(self, name: str, own: dict, method: str) -> Maps:
        """The maps of a method from the source to a checkpoint."""
        source_block, block = self.block(self.args.src), self.block(name)
        if method == "contrans":
            x, y = {source_block: self.source["plain"]}, {block: own["plain"]}
            return AffineMaps(x, y, **map_options(self.args))
        rows = {source_block: self.source["rows"].tolist()}
        near = NearStates(self.pool, rows, {source_block: self.source["x"]})
        return LocalMaps([near], self.load(name), [block])

    # ------------------------------------------------------------ transplant, score: the steps

    def measure(self, name: str) -> list[dict]:
        """What a checkpoint names without a vector, with its own, with v_hat of each map, and with
        controls: records."""
        args, own = self.args, self.collect(name)
        blocks = self.block(args.src), self.block(name)
        maps = {method: self.maps(name, own, method) for method in map_methods(args)}
        vectors = {"self-align": own["v"]}
        for method, each in maps.items():
            vectors[method] = each.vector(self.source["v"], *blocks)  # Eq. 2
        directions = self.directions(vectors, maps, blocks)
        alphas = self.choose_alphas(name, directions)
        about = {"target": name, "source_block": blocks[0], "block": blocks[1]}
        about["group"] = f"{args.tokens[args.tgt.index(name)]:.4g} tokens"
        records = []
        for method, each in maps.items():
            fitted = each.fit(*blocks)
            cosine = torch.cosine_similarity(vectors[method], own["v"]).mean().item()
            quality = {"r2": fitted.r2, "cosine_to_own": cosine}
            if "contrans-local" in maps:
                quality["r2_where_read"] = maps["contrans-local"].r2_where_read(fitted, *blocks)
            what = about | {"source": args.src, "method": method, "alpha": alphas[method, None]}
            what |= {"concept": "map", "part": "held-out", "n": fitted.n}
            for metric, value in quality.items():
                records.append(record(metric=metric, value=value, **what))
        for e, emotion in enumerate(EMOTIONS):
            arms = [("base", None, 0, BASE)]
            for (method, variant), direction in directions.items():
                is_curve = method in maps and not variant
                chosen = alphas.get((method, variant), alphas[method, None])
                for alpha in args.alpha if is_curve else [chosen]:
                    move = Transplant.of(direction[e], blocks[1], alpha)
                    arms.append((method, variant, alpha, move))
            moves = [move for *_, move in arms]
            model = self.load(name)
            found = named(model, args, self.data, "test", emotion, moves)
            for (method, variant, alpha, _), hits in zip(arms, found):
                what = about | {"method": method, "variant": variant, "alpha": alpha}
                what |= {"concept": emotion, "part": "test", "item": "Figure 3"}
                what["source"] = None if method == "base" else args.src
                for metric in ["token_acc"] if is_permuted(what) else hits:
                    records.append(record(hits[metric], metric=metric, **what))
        return records

    def directions(self, vectors: dict, maps: dict, blocks) -> dict[tuple, torch.Tensor]:
        """{(method, variant): a direction of each emotion [6, d]}: vectors, and the controls of
        each map."""
        args, found = self.args, {}
        for method, vector in vectors.items():
            found[method, None] = vector
        for method, each in maps.items():
            controls: dict[str, list] = {}
            for e, v in enumerate(self.source["v"]):
                counts = {"n_maps": 1, "n_random": args.random, "seed": self.seed(e)}
                for variant, one in control_directions(each, v, {}, *blocks, **counts).items():
                    controls.setdefault(variant, []).append(one)
            for variant, own in controls.items():
                found[method, variant] = torch.stack(own)
        last = map_methods(args)[-1]  # vectors of permuted labels stand beside the last map only
        null = maps[last].vector(self.source["permuted"], *blocks)
        null = rescale(null, vectors[last])
        for k, permuted in enumerate(null):
            found[last, f"permuted {k}"] = permuted
        for k, permuted in enumerate(null[:OWN_CHOICES]):
            found[last, f"own-α permuted {k}"] = permuted
        return found

    def choose_alphas(self, name: str, directions: dict) -> dict[tuple, float]:
        """Of each vector, and of permuted labels that choose: the strength with the most hits on
        the validation scenarios; the smaller of equals."""
        hits: dict[tuple, dict] = {}
        for key in directions:
            if key[-1] is None or key[-1].startswith("own-α"):
                hits[key] = dict.fromkeys(self.args.alpha, 0)
        tried = list(product(hits, self.args.alpha))
        block, model = self.block(name), self.load(name)
        for e, emotion in enumerate(EMOTIONS):
            moves = [Transplant.of(directions[key][e], block, alpha) for key, alpha in tried]
            found = named(model, self.args, self.data, "validation", emotion, moves)
            for (key, alpha), each in zip(tried, found):
                hits[key][alpha] += sum(each["token_acc"])
        chosen = {}
        for key, hits_at in hits.items():
            most = max(hits_at.values())
            equals = [alpha for alpha, count in hits_at.items() if count == most]
            chosen[key] = min(equals, key=abs)
        return chosen


def is_downloaded(name: str) -> bool:
    """Whether the weights of a hub model are in the hub's cache already."""
    files = [file for revision in cached_revisions(name) for file in revision.files]
    return any(file.file_name.endswith((".safetensors", ".bin")) for file in files)


def delete_revision(name: str) -> None:
    """Remove one revision from the hub's cache."""
    from huggingface_hub import scan_cache_dir

    commits = [revision.commit_hash for revision in cached_revisions(name)]
    scan_cache_dir().delete_revisions(*commits).execute()


def cached_revisions(name: str) -> list:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repo, _, revision = name.partition("@")
    try:
        repos = [each for each in scan_cache_dir().repos if each.repo_id == repo]
    except CacheNotFound:
        return []
    found = [each for repo in repos for each in repo.revisions]
    return [each for each in found if (revision or "main") in {*each.refs, each.commit_hash}]


# ---------------------------------------------------------------- one target


def one_target(run: Run, lab: Lab, name: str) -> list[dict]:
    """Records of one checkpoint: each emotion, and the mean of all at the chosen alpha."""
    records = run.step(f"checkpoint {name}", lab.measure, name)
    means = pool(select(records, part="test"), "concept", "mean")
    return [each for each in records if not is_permuted(each)] + means


# ---------------------------------------------------------------- tables


def short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name.partition("@")[2] or Path(name).name


def chosen(records: list[dict], name: str, metric: str) -> list[dict]:
    """The mean of all emotions in one checkpoint at the alpha chosen there, beside its controls."""
    means = select(records, target=name, concept="mean", metric=metric)
    return beside_controls(means, chosen_alphas(records, name))


def chosen_alphas(records: list[dict], name: str) -> dict[str, float]:
    """The alpha chosen for each method in one checkpoint; of a curve, that of its controls."""
    tested = select(records, target=name, concept="mean")
    fixed = select(tested, variant="random 0") + select(tested, method="self-align")
    return {each["method"]: each["alpha"] for each in fixed}


def row(each: dict) -> str:
    return f"{short(each['target'])}, {each['group']}"


def accuracy_table(args, records: list[dict]) -> str:
    shown, notes = [], {}
    for name in args.tgt:
        mine = select(records, target=name, concept="mean", metric="token_acc")
        alphas = chosen_alphas(records, name)
        shown += beside_controls(mine, alphas)
        strengths = [f"{METHODS[method]} {alpha:g}" for method, alpha in alphas.items()]
        notes[row(mine[0])] = "α: " + ", ".join(strengths)
    return (
        f"v_emotion of {short(args.src)} in earlier checkpoints. Token Acc in % [95 % interval], "
        "mean of all emotions, on scenarios of the others "
        f"(n = {shown[0]['n']}); block {args.layer}; α chosen on validation\n\n"
        + pivot(shown, row, label, notes=notes)
    )


def map_table(records: list[dict]) -> str:
    """What the maps are worth, and how near v_hat is to the checkpoint's own v."""

    def column(each):
        return f"{METHODS[each['method']]}: {MAP_METRICS[each['metric']]}"

    return f"Affine maps\n\n{pivot(select(records, concept='map'), row, column)}"


# ---------------------------------------------------------------- figures


def draw_accuracy(args, records: list[dict]):
    """Accuracy on negatives against training tokens, without and with v_hat."""
    figure, axes = new_figure(ncols=2, figsize=(PAGE, 2.8), sharey=True)
    curves = {("base", None): "without: false positives"}
    for method in map_methods(args):
        curves[method, None] = f"{METHODS[method]}: v̂ of the last checkpoint"
    curves[map_methods(args)[-1], "random"] = f"{args.random} random directions, range"
    for axis, metric in zip(axes, ("token_acc", "logit_acc")):
        found = [each for name in args.tgt for each in chosen(records, name, metric)]
        for (method, variant), text in curves.items():
            mean = select(found, method=method, variant=variant)
            look = LOOK[method] | ({"color": "#777777", "marker": "."} if variant else {})
            draw_curve(axis, args.tokens, mean, text, **look)
        title = "Token Acc" if metric == "token_acc" else "Logit Acc"
        axis.set(xscale="log", xlabel="training tokens", ylim=(0, 1.05), title=title)
    axes[0].set_ylabel("accuracy on negative scenarios")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    names = f"v_emotion of {short(args.src)} in the checkpoints of its own pre-training"
    figure.suptitle(f"{names} (mean of all emotions, 95 % interval)")
    return figure


# ---------------------------------------------------------------- main


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    data = load_data(args)
    names = list(dict.fromkeys([args.src, *args.tgt]))  # the source first: loaded once
    for name in names:
        check_prompts(args, data, models, name)
    sentences = plain_texts(args.texts, models, names, args.sentences)
    lab = Lab(args, data, sentences, models)
    for name in names:
        lab.block(name)  # an impossible --layer ends here, before any weights are loaded
    first_prompts = [texts[0] for texts in pairs(args, data, EMOTIONS[0])]
    first_test = prompts(args, data, data.emotions[EMOTIONS[0]].test[:1], shots=True)
    ignore = ("keep_downloads", "model", "revisions")
    run = Run(
        __file__,
        args,
        models,
        [data, sentences],
        first_prompts + first_test,
        ignore,
        len(names) + 1,
    )

    found = {}
    for name in names:
        # A step, so that an interrupted run still knows which downloads are its own.
        on_hub = not Path(name).is_dir()
        is_ours = on_hub and not run.step(f"in the hub's cache: {name}", is_downloaded, name)
        if name == args.src:
            lab.source = run.tensors(f"source {name}", lab.collect_source, name)
        if name in args.tgt:
            found[name] = one_target(run, lab, name)
        if is_ours and not args.keep_downloads and not args.dry_run:
            models.release()
            run.step(f"remove {name}", delete_revision, name)
    records = [each for name in args.tgt for each in found[name]]
    judged = {}
    for name in args.tgt:
        means = select(records, target=name, concept="mean", metric="token_acc")
        judged[short(name)] = means, chosen_alphas(records, name)
    figure = run.figure(draw_accuracy(args, records), "figure_3")
    headline = [verdict(judged), figure, accuracy_table(args, records)]
    run.save(records, examples(data, records), headline, [map_table(records)])


def examples(data: Data, records: list[dict]) -> list[dict]:
    """Whether the emotion was named (Token Acc), for every test scenario and transplant."""
    rows = []
    for each in select(records, part="test", metric="token_acc"):
        if each["concept"] in EMOTIONS:
            names = ("target", "concept", "method", "variant", "alpha")
            about = {name: each[name] for name in names}
            for text, hit in zip(data.emotions[each["concept"]].test, each["hits"]):
                rows.append(about | {"scenario": text, "named": hit})
    return rows


if __name__ == "__main__":
    run_script(main)
