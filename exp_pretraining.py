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

from common import BASE, Transplant, score_labels
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
    PLAIN,
    beside_controls,
    best_alphas,
    draw_curve,
    fluent,
    is_permuted,
    label,
    map_warnings,
    markdown,
    new_figure,
    pivot,
    pool,
    record,
    select,
    spread,
    strength,
    verdict,
)
from vectors import Context, Point, Vector, Vectors, map_texts, perplexity_records

import numpy as np
import torch

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
# The zoo's models have so few blocks that the last one names the emotion.
ZOO = {"layer": "0.9", "limit": 50, "sentences": 500}
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
    if len(set(map(short, args.tgt))) < len(args.tgt):
        fail("a checkpoint is named twice, or two have one name")
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
    add(
        "--protocol",
        choices=["clean", "paper"],
        default="clean",
        help="clean: disjoint parts; paper: as in the released code",
    )
    add(
        "--shots", type=at_least(0), default=6, help="few-shot examples in a test prompt (paper: 6)"
    )
    add("--pairs", type=at_least(1), default=200, help="example pairs of a vector (paper: 200)")
    add("--template", default=TEMPLATE, help="prompt with {scenario} in it, read before the label")
    add("--labels", nargs="+", default=EMOTIONS, metavar="WORD", help="one for each of EMOTIONS")


def check_emotion_options(args) -> None:
    if "{scenario}" not in args.template or "{text}" in args.template:
        fail("--template needs {scenario} in it, and no {text}")
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
        positive = shuffled[emotion][shots_each:]
        n = min(len(positive), len(negative), args.pairs)
        emotions[emotion] = Scenarios(
            positive=positive[:n],
            negative=negative[:n],
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
        n = min(args.pairs, len(lists[emotion]), len(others))
        negative = random.Random(f"{args.seed} {emotion} negative").sample(others, n)
        test = negative[:limit]
        emotions[emotion] = Scenarios(shuffled[emotion][:n], negative, test, test)
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
    n = int(count or len(positive))
    asked = prompts(args, data, positive[:n] + negative[:n], shots=False)
    return asked[:n], asked[n:]


def read_context(args, data: Data) -> Context:
    """Where the emotions are read: the template, and the negatives of all emotions' vectors. The
    positives of one emotion's vector are test scenarios of the others."""
    template = args.template.replace("{scenario}", "{text}")
    texts: dict[str, None] = {}  # each once, in order
    for each in data.emotions.values():
        texts |= dict.fromkeys(each.negative)
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


def make_vectors(args, data: Data, sentences, models: Models, names: list[str], source=None):
    """The vectors of these checkpoints, which are targets of the vectors of `source`."""
    context = read_context(args, data)
    return Vectors(
        models,
        [Vector(emotion, name, name) for name in [args.src, *names] for emotion in EMOTIONS],
        names,
        pairs=lambda concept, name: pairs(args, data, concept),
        blocks=lambda name: [models.block(name, args.layer)],
        context=lambda concept, name: context,
        sentences=sentences,
        refine=args.refine,
        known=source,
        **map_options(args),
    )


class Lab:
    """What every step needs to know about one checkpoint. Its methods are the steps."""

    def __init__(self, args, data: Data, models: Models, target: str, vectors: Vectors):
        self.args, self.data, self.models, self.target = args, data, models, target
        source_block, block = [models.block(name, args.layer) for name in (args.src, target)]
        self.point = Point(source_block, block, 1)  # each vector has an alpha of its own
        self.vectors = vectors

    @property
    def model(self):
        return self.models.load(self.target)

    def source(self, emotion: str) -> Vector:
        return Vector(emotion, self.args.src, self.args.src)

    def directions(self, emotion: str) -> dict[tuple, torch.Tensor]:
        """{(method, variant): direction [d]} of an emotion: the checkpoint's own vector, v_hat of
        each map, and their controls."""
        args, methods = self.args, map_methods(self.args)
        own = Vector(emotion, self.target, self.target)
        found = {("self-align", None): self.vectors.v(own, self.point.block)}
        found |= self.vectors.directions(
            self.source(emotion),
            self.target,
            self.point,
            methods,
            n_permuted=args.permutations,
            n_maps=args.maps,
            n_random=args.random,
            seed=args.seed * len(EMOTIONS) + EMOTIONS.index(emotion),
        )
        for k in range(min(OWN_CHOICES, args.permutations)):
            found[methods[-1], f"own-α permuted {k}"] = found[methods[-1], f"permuted {k}"]
        return found

    # ------------------------------------------------------------ transplant, score: the steps

    def measure(self) -> list[dict]:
        """What a checkpoint names without a vector, with its own, with v_hat of each map, and with
        controls: records."""
        args, (source_block, block, _) = self.args, self.point
        directions = {emotion: self.directions(emotion) for emotion in EMOTIONS}
        alphas = self.choose_alphas(directions)
        about = {"target": self.target, "source_block": source_block, "block": block}
        about["group"] = f"{args.tokens[args.tgt.index(self.target)]:.4g} tokens"
        records = self.measure_maps(alphas, about)
        for emotion in EMOTIONS:
            arms = [("base", None, 0, BASE)]
            for (method, variant), direction in directions[emotion].items():
                is_curve = method in map_methods(args) and not variant
                best = alphas.get((method, variant), alphas[method, None])
                for alpha in args.alpha if is_curve else [best]:
                    arms.append((method, variant, alpha, Transplant.of(direction, block, alpha)))
            moves = [move for *_, move in arms]
            found = named(self.model, args, self.data, "test", emotion, moves)
            for (method, variant, alpha, _), hits in zip(arms, found):
                what = about | {"method": method, "variant": variant, "alpha": alpha}
                what |= {"concept": emotion, "part": "test", "item": "Figure 3"}
                what["source"] = {"base": None, "self-align": self.target}.get(method, args.src)
                for metric in ["token_acc"] if is_permuted(what) else hits:
                    records.append(record(hits[metric], metric=metric, **what))
        return records + self.measure_perplexity(directions, about)

    def measure_perplexity(self, directions: dict, about: dict) -> list[dict]:
        """Perplexity of plain sentences under each emotion's v_hat, at every alpha: records."""
        arms = [(about | {"method": "base", "alpha": 0}, BASE)]
        for (emotion, found), method in product(directions.items(), map_methods(self.args)):
            for alpha in self.args.alpha:
                what = {"source": self.args.src, "method": method, "concept": emotion}
                move = Transplant.of(found[method, None], self.point.block, alpha)
                arms.append((about | what | {"alpha": alpha}, move))
        return perplexity_records(self.model, self.vectors.sentences, arms)

    def measure_maps(self, alphas: dict, about: dict) -> list[dict]:
        """What each map is worth, and how near v_hat is to the checkpoint's own v: records."""
        records = []
        own = [Vector(emotion, self.target, self.target) for emotion in EMOTIONS]
        vectors = [self.source(emotion) for emotion in EMOTIONS]
        for method in map_methods(self.args):
            inputs = self.target, self.point, method, self.args.maps
            found = self.vectors.quality(vectors, *inputs, own)
            what = about | {"source": self.args.src, "method": method, "part": "held-out"}
            what["alpha"] = alphas[method, None]
            records += [record(**what | fields) for fields in found]
        return records

    def choose_alphas(self, directions: dict[str, dict]) -> dict[tuple, float]:
        """Of each vector, and of permuted labels that choose: the strength with the most hits on
        the validation scenarios; the smaller of equals."""
        hits: dict[tuple, dict] = {}
        for key in directions[EMOTIONS[0]]:
            if key[-1] is None or key[-1].startswith("own-α"):
                hits[key] = dict.fromkeys(self.args.alpha, 0)
        tried = list(product(hits, self.args.alpha))
        for emotion, found in directions.items():
            moves = [Transplant.of(found[key], self.point.block, alpha) for key, alpha in tried]
            answers = named(self.model, self.args, self.data, "validation", emotion, moves)
            for (key, alpha), each in zip(tried, answers):
                hits[key][alpha] += sum(each["token_acc"])
        return best_alphas(hits)


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


def one_target(run: Run, lab: Lab) -> list[dict]:
    """Records of one checkpoint: each emotion, and the mean of all at the chosen alpha."""
    records = run.step(f"checkpoint {lab.target}", lab.measure)
    means = pool(select(records, part="test"), "concept", "mean")
    means += fluent(means, select(records, metric="perplexity"))
    return [each for each in records if not is_permuted(each)] + means


# ---------------------------------------------------------------- tables


def short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name.partition("@")[2] or Path(name).name


def chosen(records: list[dict], name: str, metric: str) -> list[dict]:
    """The mean of all emotions in one checkpoint at the alpha chosen there, beside its controls."""
    means = select(records, target=name, concept="mean", metric=metric)
    return beside_controls(means, chosen_alphas(records, name))


def chosen_alphas(records: list[dict], name: str) -> dict[str, float]:
    """The alpha chosen for each method in one checkpoint, read off records at that alpha alone."""
    tested = select(records, target=name, concept="mean")
    fixed = select(tested, variant="random 0") + select(tested, method="self-align")
    return {each["method"]: each["alpha"] for each in fixed}


def column(each: dict) -> str:
    return f"{short(each['target'])}, {each['group']}"


def accuracy_table(args, records: list[dict]) -> str:
    """Figure 3 in numbers, with all controls, and the strengths chosen."""
    shown, alphas = [], {}
    for name in args.tgt:
        mine = select(records, target=name, concept="mean", metric="token_acc")
        alphas[name] = chosen_alphas(records, name)
        shown += beside_controls(mine, alphas[name])
    strengths = []
    for method in ("self-align", *map_methods(args)):
        of_method = [f"{found[method]:g}" for found in alphas.values()]
        strengths.append([f"{METHODS[method]}: α", *of_method])
    chosen_on = "the test scenarios" if args.protocol == "paper" else "validation"
    return (
        f"v_emotion of {short(args.src)} in each checkpoint. Token Acc in % [95 % interval], "
        "mean of all emotions, on scenarios of the others "
        f"(n = {shown[0]['n']}); block {args.layer}; α chosen on {chosen_on}\n\n"
        + pivot(shown, label, column)
        + "\n\n"
        + markdown(["", *map(short, args.tgt)], strengths)
    )


def perplexity_table(args, records: list[dict]) -> str:
    """What each strength costs: perplexity of plain sentences, mean [range] of all emotions."""
    shown, costs = [], select(records, metric="perplexity", part=PLAIN)
    for name, method, alpha in product(args.tgt, METHODS, (0, *args.alpha)):
        same = select(costs, target=name, method=method, alpha=alpha)
        if same:
            shown.append(spread(same, None))

    def row(each):
        return f"{label(each)}, {strength(each)}" if each["alpha"] else label(each)

    return "Perplexity of plain sentences\n\n" + pivot(shown, row, column)


def map_table(records: list[dict]) -> str:
    """What the maps are worth, and how near v_hat is to the checkpoint's own v."""

    def row(each):
        return f"{METHODS[each['method']]}: {MAP_METRICS[each['metric']]}"

    shown = []
    for metric in ("r2", "r2_where_read", "cosine_to_response", "cosine_to_own"):
        shown += select(records, metric=metric, variant=None)
    return "Affine maps, known without any steering\n\n" + pivot(shown, row, column)


# ---------------------------------------------------------------- figures


def draw_accuracy(args, records: list[dict]):
    """Accuracy on negatives against training tokens, without and with v_hat."""
    figure, axes = new_figure(ncols=2, figsize=(PAGE, 2.8), sharey=True)
    curves = {("base", None): "without: false positives"}
    for method in map_methods(args):
        curves[method, None] = f"{METHODS[method]}: v̂ of {short(args.src)}"
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
    title = f"v_emotion of {short(args.src)} in each checkpoint"
    figure.suptitle(f"{title} (mean of all emotions, 95 % interval)")
    return figure


# ---------------------------------------------------------------- main


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    data = load_data(args)
    names = list(dict.fromkeys([args.src, *args.tgt]))
    for name in names:
        check_prompts(args, data, models, name)
    for name in names:
        models.block(name, args.layer)  # an impossible --layer ends here, before any weights
    sentences = map_texts(args, models, names)
    first_prompts = [texts[0] for texts in pairs(args, data, EMOTIONS[0])]
    first_prompts += prompts(args, data, data.emotions[EMOTIONS[0]].test[:1], shots=True)
    ignore = ("keep_downloads", "model", "revisions")
    run = Run(__file__, args, models, [data, sentences], first_prompts, ignore, len(args.tgt))

    is_ours = {}  # downloaded by this run; steps, so that an interrupted one still knows
    for name in names:
        on_hub = not Path(name).is_dir()
        is_ours[name] = on_hub and not run.step(f"in the hub's cache: {name}", is_downloaded, name)
    source = make_vectors(args, data, sentences, models, [])  # read once
    found = {}
    for name in [*names[1:], args.src]:  # all need the source
        if name in args.tgt:
            vectors = make_vectors(args, data, sentences, models, [name], source)
            found[name] = one_target(run, Lab(args, data, models, name, vectors))
        if is_ours[name] and not args.keep_downloads and not args.dry_run:
            models.release(keep=[args.src])
            run.step(f"remove {name}", delete_revision, name)
    records = [each for name in args.tgt for each in found[name]]
    judged = {}
    for name in args.tgt:
        means = select(records, target=name, concept="mean", metric="token_acc")
        judged[short(name)] = means, chosen_alphas(records, name)
    figure = run.figure(draw_accuracy(args, records), "figure_3")
    headline = [verdict(judged), figure, accuracy_table(args, records), *map_warnings(records)]
    more = [map_table(records), perplexity_table(args, records)]
    run.save(records, examples(data, records), headline, more)


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
