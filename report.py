"""From numbers to a report. It knows records only, no models and no run folders.

1  Records         one number each, with what it is about and its interval
2  Statistics      intervals, paired tests, ranks
3  Controls        what is shown beside an effect, and the verdict
4  Tables          records as Markdown
5  Figures         of all scripts, and the report as one HTML file
"""

from __future__ import annotations

import base64
import functools
import itertools
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from tabulate import tabulate

# ================================================================ 1  Records

RECORD = [
    "item", "source", "target", "concept", "method", "variant", "group", "part", "source_block",
    "block", "alpha", "metric", "value", "low", "high", "n", "units", "item_low", "item_high",
    "paper",
]  # fmt: skip
NUMBERS = ("value", "low", "high", "n", "units", "item_low", "item_high", "paper")
METHODS = {
    "base": "Base Model",
    "align-training": "Align-Training",
    "self-align": "Self-Align",
    "inst-align": "Inst-Align",
    "eft": "EFT/proxy-tuning",
    "contrans": "ConTrans",
    "contrans-local": "ConTrans, local map",
    "gradient-descent": "Map by gradient descent (App. A), may not converge",
}


def record(hits=None, values=None, units=None, **fields) -> dict:
    """One number and what it is about (RECORD). Rates are fractions; alpha = 0 is method base.

    hits: one boolean per item of a rate. Sets value, its 95 % interval (Wilson) and n, and is kept
    in the record for pool and mcnemar.
    values: one number per item of a mean. Likewise, with a bootstrap interval.
    units: the unit of the claim (the concept, the group) that each item belongs to. low and high
    are then from resampling units, and never inside the interval over items (item_low,
    item_high). They are kept in the record, too, for paired tests."""
    items = {}
    if hits is not None:
        found = items["hits"] = [bool(hit) for hit in hits]
        low, high = _wilson(sum(found), len(found))
    if values is not None:
        found = items["values"] = list(values)
        low, high = _bootstrap(found)
    if items:
        fields["value"] = float(np.mean(found))
        fields |= {"low": low, "high": high, "n": len(found)}
    if units is not None:
        fields |= {"units": len(set(units)), "item_low": low, "item_high": high}
        unit_low, unit_high = _interval(_resampled_means(found, units))  # equal if all are alike
        fields["low"] = min(low, unit_low)
        fields["high"] = max(high, unit_high)
        items["unit_of"] = np.unique(units, return_inverse=True)[1].tolist()
    unknown = set(fields) - set(RECORD)
    if unknown:
        raise ValueError(f"unknown record fields {sorted(unknown)}")
    return {name: fields.get(name) for name in RECORD} | items


def select(records: list[dict], **match) -> list[dict]:
    """The records whose fields have these values."""
    found = records
    for field, value in match.items():
        found = [each for each in found if each[field] == value]
    return list(found)


def of_kind(records: list[dict], *kinds: str) -> list[dict]:
    """The records of controls whose variant begins with one of `kinds`."""
    return [each for each in records if (each["variant"] or "").startswith(kinds)]


def pool(records: list[dict], field: str, name: str) -> list[dict]:
    """Merge records that differ only in `field` into one over all their items. Each value of that
    field is a unit."""
    groups: dict[tuple, tuple] = {}
    for each in records:
        same = [(key, each[key]) for key in RECORD if key not in (*NUMBERS, field)]
        hits, units = groups.setdefault(tuple(same), ([], []))
        hits += each["hits"]
        units += [each[field]] * len(each["hits"])
    pooled = []
    for same, (hits, units) in groups.items():
        pooled.append(record(hits, units=units, **{field: name}, **dict(same)))
    return pooled


def spread(records: list[dict], variant: str) -> dict:
    """Merge several records (random directions, maps) into one: mean, lowest, highest, number."""
    values = [each["value"] for each in records]
    merged = records[0] | dict.fromkeys(("units", "item_low", "item_high", "paper"))
    for items in ("hits", "values", "unit_of"):  # those of the first alone
        merged.pop(items, None)
    merged |= {"low": min(values), "high": max(values), "n": len(values)}
    merged["value"] = float(np.mean(values))
    return merged | {"variant": variant}


# ================================================================ 2  Statistics

RESAMPLES = 2000  # of a bootstrap


@functools.cache  # scipy computes a p-value as well
def _wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson score)."""
    from scipy.stats import binomtest

    if not n:
        return 0.0, 1.0
    interval = binomtest(int(successes), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(values) -> tuple[float, float]:
    """95 % interval of a mean, by resampling the items."""
    values = np.asarray(values, float)
    return _interval(values[_draws(len(values))].mean(1))


def _resampled_means(values, units) -> np.ndarray:
    """Means of all items of units drawn with replacement [RESAMPLES]."""
    names, unit_of = np.unique(units, return_inverse=True)
    sums = np.bincount(unit_of, np.asarray(values, float))
    sizes = np.bincount(unit_of)
    draws = _draws(len(names))
    return sums[draws].sum(1) / sizes[draws].sum(1)


@functools.lru_cache(maxsize=8)
def _draws(n: int) -> np.ndarray:
    """Indices of the units drawn in each resample [RESAMPLES, n]."""
    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))


def _interval(means: np.ndarray) -> tuple[float, float]:
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def mcnemar(before, after) -> float:
    """Exact two-sided p of a paired difference between booleans of the same items."""
    from scipy.stats import binomtest

    before, after = np.asarray(before, bool), np.asarray(after, bool)
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost).pvalue)


def paired_p(before: dict, after: dict) -> float:
    """Two-sided p of the difference of two rates, from their records.

    McNemar's exact test over the items, or Fisher's if they are not the same items. Where items
    belong to units, resampling these must say so too: the larger p of both."""
    from scipy.stats import fisher_exact

    one, other = before["hits"], after["hits"]
    if len(one) != len(other):
        counts = [[sum(hits), len(hits) - sum(hits)] for hits in (one, other)]
        return float(fisher_exact(counts).pvalue)
    p = mcnemar(one, other)
    if "unit_of" in after:
        differences = np.subtract(other, one, dtype=float)
        means = _resampled_means(differences, after["unit_of"])
        opposite = min((means <= 0).sum(), (means >= 0).sum())
        p = max(p, min(1.0, 2 * (1 + opposite) / (1 + RESAMPLES)))
    return p


def holm(p_values: list[float]) -> list[float]:
    """p values corrected for multiple testing (Holm's step-down procedure)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        p = p_values[i] * (len(p_values) - rank)
        highest = max(highest, min(1.0, p))
        corrected[i] = highest
    return corrected


def rank_p(value: float, null: list[float]) -> float:
    """One-sided p of a value among draws of its null; never 0."""
    as_high = sum(other >= value for other in null)
    return (1 + as_high) / (1 + len(null))


def paired_gain(ours: dict, other: dict) -> dict[str, float]:
    """Mean difference of two records over the same items, with a 95 % interval."""
    items = "values" if "values" in ours else "hits"
    difference = np.subtract(ours[items], other[items], dtype=float)
    low, high = _bootstrap(difference)
    mean = float(difference.mean())
    return {"value": mean, "low": low, "high": high, "n": len(difference)}


# ================================================================ 3  Controls

FLUENT = "perplexity at most ×1.1"
VARIANTS = {
    "permuted": "permuted labels [range]",
    "own-α permuted": "permuted labels, own α [range]",
    "map": "other samples of text [range]",
    "few sentences": "n / d = 0.39, as in the paper",
    "random": "random directions [range]",
    "other": "other concepts' vectors [range]",
    "shuffled map": "maps of shuffled texts [range]",
    "reversed": "−v̂",
}
OWN_CHOICES = 20  # vectors of permuted labels with their own alpha (and block), chosen as v_hat's
CONTROLS = ("random", "own-α permuted", "other", "shuffled map")  # what a vector must be above


LIMITING = "limiting sentences"  # part of the perplexities that limit alpha
PLAIN = "plain sentences"  # part of the perplexities that are shown, of other sentences


def fluent(curve: list[dict], costs: list[dict]) -> list[dict]:
    """For each method its records at the strongest alpha that raises perplexity by at most 10 %, as
    variant FLUENT; the base model's if every alpha raises it further.

    curve: records of one target and metric over alpha; costs: its perplexities, of which those of
    part LIMITING count."""
    allowed = relative_costs(costs, LIMITING)
    found = []
    for method in dict.fromkeys(each["method"] for each in costs):
        mine = select(curve, method=method, variant=None)
        mine = [each for each in mine if each["alpha"] is not None]  # of EFT it is
        within = [each for each in mine if allowed.get((method, each["alpha"]), math.inf) <= 1.1]
        alphas = [each["alpha"] for each in within]
        strongest = max(alphas, key=lambda alpha: (abs(alpha), alpha), default=0)
        shown = select(within, alpha=strongest)
        if method != "base" and mine:
            for each in shown or select(curve, method="base", variant=None):
                found.append(each | {"method": method, "variant": FLUENT, "paper": None})
    return found


def relative_costs(costs: list[dict], part: str) -> dict[tuple, float]:
    """{(method, alpha): perplexity relative to the base model's}, on one part of the sentences,
    mean of all vectors of a method."""
    found: dict[tuple, list] = {}
    for each in select(costs, part=part, variant=None):
        found.setdefault((each["method"], each["alpha"]), []).append(each["value"])
    [base] = found["base", 0]
    return {key: float(np.mean(values)) / base for key, values in found.items()}


def is_permuted(each: dict) -> bool:
    """Whether a record is of a vector of permuted labels."""
    return "permuted" in (each["variant"] or "")


def label(each: dict) -> str:
    """The name of a record in a table: its method, and which control of it."""
    name = METHODS[each["method"]]
    variant = each["variant"]
    return f"{name}: {VARIANTS.get(variant, variant)}" if variant else name


def arrow(source: str, target: str) -> str:
    """A pair of models in a title."""
    return f"{Path(source).name} → {Path(target).name}"


def place(each: dict) -> str:
    """Where the vector of a record was read and added, and how strongly."""
    return f"block {each['source_block']} → {each['block']}, α = {each['alpha']:g}"


def strength(each: dict) -> str:
    """The column of a record in a table over alpha."""
    return f"α = {each['alpha']:g}" if each["alpha"] else "no vector"


def best_alphas(hits: dict[tuple, dict[float, int]]) -> dict[tuple, float]:
    """For each vector the alpha with the most hits; of equals the smallest.

    hits: {vector: {alpha: hits on the validation part}}."""
    best = {}
    for vector, counts in hits.items():
        ranks = [(count, -abs(alpha), alpha) for alpha, count in counts.items()]
        *_, best[vector] = max(ranks)
    return best


def at_strength(records: list[dict], alphas: dict[str, float]) -> list[dict]:
    """The records at the alpha of their method, and the controls that chose their own alpha."""
    found = []
    for each in records:
        chosen = alphas.get(each["method"], each["alpha"])
        if each["alpha"] == chosen or of_kind([each], "own-α"):
            found.append(each)
    return found


def beside_controls(records: list[dict], alphas: dict[str, float]) -> list[dict]:
    """The rows of a table, from records of one metric and target: every method at its alpha, each
    ConTrans followed by its controls, merged by kind."""
    shown = []
    for method in METHODS:
        same = at_strength(select(records, method=method), alphas)
        shown += [each for each in same if not each["variant"]]
        if same:
            shown += select(records, method=method, variant=FLUENT)
        for kind in VARIANTS:
            found = of_kind(same, kind)
            if kind == "map" and found:
                found += select(same, variant=None)
            is_drawn = kind in ("random", "own-α permuted", "permuted", "shuffled map")
            if len(found) == 1 and not is_drawn:
                shown += found
            elif found:
                shown.append(spread(found, kind))
    return shown


def verdict(targets: dict[str, tuple[list[dict], dict[str, float]]], lower=False) -> str:
    """One line for each target: which vectors move it further than every control.

    targets: {name: (records of one metric, alpha of each method)}. lower: lower values are better.
    A vector holds if it beats both no vector and its strongest control with p < 0.05. That control
    is the best of its random directions, other concepts' vectors, shuffled maps and vectors of
    permuted labels that chose their own alpha."""
    sign = -1 if lower else 1
    lines, nulls = [], []
    for target, (records, alphas) in targets.items():
        here = at_strength(records, alphas)
        lines.append(_verdict_line(target, here, sign))
        nulls += of_kind(here, "permuted ")
    units = any("unit_of" in each for records, _ in targets.values() for each in records)
    test = "the larger of McNemar's and of resampling concepts or groups" if units else "McNemar"
    rule = f"better than no vector and than its strongest control, both at p < 0.05 ({test})"
    if nulls:
        rule += (
            ", and than vectors of permuted labels at rank p < 0.05 (if they are fewer than 20, "
            "than every one)"
        )
    rule = f"\nA vector holds if it is {rule}. The p of these tests follow its rate."
    return "\n".join([*lines, rule])


def _verdict_line(target: str, records: list[dict], sign: int) -> str:
    """The verdicts on all vectors of one target, records at the alpha chosen for each method."""
    [base] = select(records, method="base", variant=None)
    own = select(records, method="self-align", variant=None)
    parts = [f"{label(each)} {_percent(each)}" for each in own]
    failed = []  # of several sources, those whose vectors do not hold: they share one sentence
    controls_of_failed = []
    last = None  # the control that was mentioned last
    for ours in select(records, variant=None):
        of_method = select(records, method=ours["method"])
        same = [each for each in of_method if each["source"] in (None, ours["source"])]
        controls = of_kind(same, *CONTROLS)
        if ours in own or not controls:
            continue
        strongest = max(controls, key=lambda each: sign * each["value"])
        null = [each["value"] for each in of_kind(same, "permuted ")]
        judged = _judge(ours, base, strongest, null, sign)
        name = label(ours)
        if len(select(of_method, variant=None)) > 1:
            name += f" of {Path(ours['source']).name}"
            if "**holds**" not in judged:
                failed.append(f"{name} {_percent(ours)}")
                controls_of_failed.append(strongest)
                continue
        part = f"{name} {judged}"
        if strongest is not last:
            part += f" (its strongest control, {strongest['variant']}: {_percent(strongest)})"
        parts.append(part)
        last = strongest
    if failed:
        strongest = max(controls_of_failed, key=lambda each: sign * each["value"])
        control = f"strongest control, {strongest['variant']}: {_percent(strongest)}"
        parts.append(f"{', '.join(failed)} **do not hold** ({control})")
    return f"- **{target}**, {_percent(base)} without a vector: {'; '.join(parts)}."


def _judge(ours: dict, base: dict, strongest: dict, null: list[float], sign: int) -> str:
    """The verdict on one vector and its strongest control; sign -1: lower is better."""
    p_base = paired_p(base, ours)
    p_control = paired_p(strongest, ours)
    p_null = rank_p(sign * ours["value"], [sign * value for value in null]) if null else 0.0
    moved = sign * (ours["value"] - base["value"]) > 0 and p_base < 0.05
    lowest = 1 / (1 + len(null))  # of 19 or fewer, the vector must be above all
    above = sign * (ours["value"] - strongest["value"]) > 0 and p_control < 0.05
    above = above and (p_null < 0.05 or p_null == lowest)
    if not moved:
        outcome = "**does not move it**"
    elif not above:
        outcome = f"**is not {'above' if sign > 0 else 'below'} the controls**"
    else:
        outcome = "**holds**"
    text = f"{outcome}: {_percent(ours)}, p = {p_base:.1g} and {p_control:.1g}"
    return f"{text}, permuted {p_null:.2g}" if null else text


def _percent(each: dict) -> str:
    return f"{100 * each['value']:.1f} %"


def summary(title: str, targets: dict[str, tuple[list[dict], dict[str, float]]]) -> str:
    """The records of the verdict as a table: methods and controls, one column per target."""
    shown = []
    for target, (records, alphas) in targets.items():
        for each in beside_controls(records, alphas):
            shown.append(each | {"target": target})
    return f"{title}\n\n{pivot(shown, label, 'target')}"


def effect_notes(
    records: list[dict], alphas: dict[str, float], lower: bool = False
) -> dict[str, str]:
    """Notes for pivot, from records of one metric and target: p of every method against Base
    (paired_p, Holm-corrected), and the rank p of each ConTrans among its random directions and
    permuted labels. lower: lower values are better."""
    [base] = select(records, method="base", variant=None)
    notes, p_values, sign = {}, {}, -1 if lower else 1
    for each in beside_controls(records, alphas):
        if not each["variant"] and each is not base:
            p_values[label(each)] = paired_p(base, each)
        if each["variant"] in ("random", "own-α permuted", "permuted"):
            same = at_strength(select(records, method=each["method"]), alphas)
            null = of_kind(same, each["variant"] + " ")
            values = [sign * other["value"] for other in null]
            [ours] = select(same, variant=None)
            p = rank_p(sign * ours["value"], values)
            name = METHODS[each["method"]]
            notes[label(each)] = f"p of {name} among these {len(values)}: {p:.2g}"
    for name, p in zip(p_values, holm(list(p_values.values()))):
        notes[name] = f"p = {p:.1g}"
    return notes


def fluency_notes(shown: list[dict], costs: list[dict]) -> dict[str, str]:
    """Notes for pivot on the rows of fluent: alpha, and its perplexity on other sentences."""
    notes, relative = {}, relative_costs(costs, PLAIN)
    for each in select(shown, variant=FLUENT):
        note = "every α costs more"
        if each["alpha"]:
            cost = relative[each["method"], each["alpha"]]
            note = f"α = {each['alpha']:g}, perplexity of other sentences ×{cost:.2f}"
        notes[label(each)] = note
    return notes


# ================================================================ 4  Tables

RATES = {"token_acc", "logit_acc", "mc1", "mc2", "toxic_rate", "empty", "copied", "repeated"}


def pivot(
    records: list[dict], rows, columns, missing: dict[str, str] = {}, notes=None, order=()
) -> str:
    """A Markdown table of records, rows and columns in the order of the records.

    rows, columns: a field, or a function of a record. missing: {row: why it has no numbers}.
    notes: {row: what stands in a last column}. order: columns that come first, where they are."""
    row_of = rows if callable(rows) else lambda each: each[rows]
    column_of = columns if callable(columns) else lambda each: each[columns]
    found_heads = dict.fromkeys(column_of(each) for each in records)
    heads = [name for name in order if name in found_heads]
    heads += [name for name in found_heads if name not in order]
    heads = heads or [""]
    cells: dict = {}
    for each in records:
        cells.setdefault(row_of(each), {})[column_of(each)] = cell(each)
    lines = [[name, *(found.get(head, "") for head in heads)] for name, found in cells.items()]
    blank = [""] * (len(heads) - 1)
    lines += [[name, reason, *blank] for name, reason in missing.items()]
    if notes:
        heads.append("")
        for line in lines:
            line.append(notes.get(line[0], ""))
    return markdown(["", *heads], lines)


def cell(each: dict) -> str:
    """A record as text: rates in %, the interval, and the paper's number in brackets."""
    is_rate = each["metric"] in RATES
    scale, digits = (100, 1) if is_rate else (1, 2)
    text = f"{scale * each['value']:.{digits}f}"
    if each["low"] is not None:
        low, high = scale * each["low"], scale * each["high"]
        text += f" [{low:.0f}, {high:.0f}]" if is_rate else f" [{low:.2f}, {high:.2f}]"
    if each["paper"] is not None:
        text += f" ({scale * each['paper']:.{digits}f})"
    return text


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table. Cells are plain text: Markdown in them is escaped."""

    def plain(text) -> str:
        marks = r"[|*`<\\]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])"  # not the _ inside of a name
        escaped = re.sub(f"({marks})", r"\\\1", str(text))
        return re.sub(r"\s*\n\s*", " ", escaped)

    header, *rows = [[plain(text) for text in row] for row in (header, *rows)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


# What is measured of maps, see vectors.Vectors.quality.
MAP_METRICS = {
    "r2": "R² held-out",
    "cosine": "cosine held-out",
    "r2_where_read": "R² where v is read",
    "r2_along_v": "R² along v̂",
    "cosine_to_response": "cosine to Cov(Y, X·v)",
    "separation": "AUC of v",
    "n_over_d": "n / d",
    "effective_rank": "effective rank",
    "norm_v": "|v|",
    "stream_source": "|source stream|",
    "norm_v_hat": "|v̂|",
    "stream_target": "|target stream|",
    "norm_own": "|own v|",
    "cosine_to_own": "cosine to own v",
}


def map_table(records: list[dict]) -> str:
    """Quality of the maps to one target, known without any steering."""
    shown = []
    for method, metric in itertools.product(METHODS, MAP_METRICS):
        same = select(records, method=method, metric=metric)
        samples = [each for each in same if (each["variant"] or "map").startswith("map")]
        shown += select(same, variant=None)
        if len(samples) > 1:
            shown.append(spread(samples, "map"))

    def column(each):
        return MAP_METRICS[each["metric"]]

    return f"Affine maps\n\n{pivot(shown, label, column)}"


def map_warnings(records: list[dict]) -> list[str]:
    """One line for each map that rarely works, by what is known of it and of v without any
    steering."""
    reasons: dict[str, list[str]] = {}
    for each in select(records, variant=None):
        if reason := _map_doubt(each):
            pair = arrow(each["source"], each["target"])
            reasons.setdefault(f"{METHODS[each['method']]}, {pair}", []).append(reason)
    end = "then v_hat rarely works (docs/map.md)"
    return [f"Warning: {name}: {', '.join(found)}: {end}" for name, found in reasons.items()]


def _map_doubt(each: dict) -> str:
    """What one measure of a map, or of v, says against it."""
    metric, value = each["metric"], each["value"]
    if metric == "r2_where_read" and value < 0:
        return f"R² {value:.2f} where v is read"
    if metric == "r2_along_v" and value < 0:
        return f"R² {value:.2f} along v̂"
    if metric == "cosine_to_response" and value < 0.3:
        return f"cosine {value:.2f} to Cov(Y, X·v)"
    if metric == "separation" and value < 0.7:
        return f"v hardly tells pairs apart (AUC {value:.2f})"
    if metric == "n_over_d" and 0.5 < value < 2 and each["method"] == "contrans":
        return f"{value:.2f} sentences for each dimension, the worst case without --ridge"
    return ""


# ================================================================ 5  Figures

COLUMN, PAGE = 3.4, 6.9  # inches: the widths of a paper's column and of its page
_LOOKS = {  # colour, marker and line, different in grey too
    "base": "#000000 x :",
    "align-training": "#b2182b v --",
    "self-align": "#b2182b ^ -.",
    "eft": "#b2182b d :",
    "contrans": "#2166ac s --",
    "contrans-local": "#1b7837 o -",
}
LOOK = {}  # options of matplotlib
for _name, _look in _LOOKS.items():
    LOOK[_name] = dict(zip(("color", "marker", "ls"), _look.split()))


def new_figure(**size):
    """(figure, axes) in the style of all scripts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
    style |= {"legend.frameon": False, "legend.fontsize": 7, "axes.titlesize": 8}
    style |= {"figure.titlesize": 8, "lines.markersize": 4, "lines.linewidth": 1.2}
    plt.rcParams.update(style)
    return plt.subplots(layout="constrained", **size)


def tsne(states: np.ndarray, seed: int) -> list:
    """States [n, d] in two dimensions, [n, 2]."""
    from sklearn.manifold import TSNE

    neighbours = min(30, len(states) // 4)
    points = TSNE(2, perplexity=neighbours, init="pca", random_state=seed).fit_transform(states)
    return points.tolist()


def shades(count: int) -> list:
    """Colours from dark to light for so many lines or bars, different in grey too."""
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))


def draw_curve(axis, x, records: list[dict], name: str, **style) -> None:
    """Values of records over x, and their intervals or ranges as a band."""
    low = [each["low"] for each in records]
    high = [each["high"] for each in records]
    axis.plot(x, [each["value"] for each in records], label=name, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def draw_strength(records: list[dict], points: dict, **axes):
    """A figure: the effect of each method over alpha, beside the highest of its random directions.

    records: of one metric and target. points: {method: (source block, block, the alpha chosen)}.
    Other methods are horizontal lines. axes: of matplotlib's Axes.set."""
    figure, axis = new_figure(figsize=(COLUMN, 3.2))
    [base] = select(records, method="base", variant=None)
    for method, point in points.items():
        mine = select(records, method=method, source_block=point[0], block=point[1])
        mine = sorted([base, *mine], key=lambda each: each["alpha"])
        curve = select(mine, variant=None)
        alphas = [each["alpha"] for each in curve]
        draw_curve(axis, alphas, curve, METHODS[method], **LOOK[method])
        highest: dict = {}  # of the random directions, for each alpha
        for each in of_kind(mine, "random "):
            alpha = each["alpha"]
            highest[alpha] = max(each["value"], highest.get(alpha, -math.inf))
        if len(highest) > 1:
            look = LOOK[method] | {"ls": ":", "marker": "."}
            name = "its highest random direction"
            axis.plot(list(highest), list(highest.values()), label=name, **look)
        if point[2]:
            axis.axvline(point[2], color=LOOK[method]["color"], lw=0.5)
    for method in METHODS:
        if method in LOOK and method not in points:
            for each in select(records, method=method, variant=None):
                look = LOOK[method] | {"marker": "", "lw": 1}
                axis.axhline(each["value"], label=METHODS[method], **look)
    axis.set(xlabel="steering strength α", **axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_fluency(curve: list[dict], costs: list[dict], **axes):
    """A figure: the effect of each method against what it costs, as alpha grows.

    curve: records of one target and metric over alpha; costs: its perplexities, of which those of
    part PLAIN are shown. Random directions: the mean of those with both. axes: of Axes.set."""
    figure, axis = new_figure(figsize=(COLUMN, 3.2))
    costs = select(costs, part=PLAIN)
    [base] = select(costs, method="base")
    [start] = select(curve, method="base", variant=None)
    for method, kind in itertools.product(METHODS, (None, "random ")):
        effects: dict = {0: [start["value"]]}
        ratios: dict = {0: [1.0]}
        for records, values, scale in ((curve, effects, 1), (costs, ratios, base["value"])):
            mine = select(records, method=method)
            mine = of_kind(mine, kind) if kind else select(mine, variant=None)
            for each in mine:
                values.setdefault(each["alpha"], []).append(each["value"] / scale)
        alphas = sorted(set(effects) & set(ratios), key=lambda alpha: (alpha is None, alpha))
        look = LOOK.get(method, {}) | ({"ls": ":", "marker": "."} if kind else {})
        if method in LOOK and method != "base" and len(alphas) > (2 if kind else 1):
            name = f"{METHODS[method]}: random directions" if kind else METHODS[method]
            x = [np.mean(ratios[alpha]) for alpha in alphas]
            axis.plot(x, [np.mean(effects[alpha]) for alpha in alphas], label=name, **look)
    axis.axvline(1.1, color="#888", lw=0.7)
    is_wide = axis.get_xlim()[1] > 100
    axis.set_xscale("log", subs=[] if is_wide else (2, 5))  # ticks between the powers of ten
    axis.xaxis.set_major_formatter("×{x:g}")
    axis.xaxis.set_minor_formatter("×{x:g}")
    axis.set(xlabel="perplexity relative to the base model (line: ×1.1)", **axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_grid(title: str, grid: list[dict], others: list[dict], best):
    """A figure: a validation grid, blocks by strengths, the chosen point framed.

    others: what stands in brackets at the same points. best: (source block, block, alpha)."""
    from matplotlib.patches import Rectangle

    tried = [*grid, *others]
    pairs = sorted({(each["source_block"], each["block"]) for each in tried})
    alphas = sorted({each["alpha"] for each in tried})
    shown = np.full((len(pairs), len(alphas)), np.nan)
    texts: dict = {}
    for each in tried:
        row = pairs.index((each["source_block"], each["block"]))
        column = alphas.index(each["alpha"])
        value = each["value"]
        text = f"×{value:.2f}" if value < 10 else f"×{value:.0f}"
        if each["metric"] in RATES:
            text = f"{100 * value:.0f}"
        in_cell = texts.setdefault((row, column), [])
        if in_cell or each["metric"] != grid[0]["metric"]:
            text = f"({text})"
        else:
            shown[row, column] = value
        in_cell.append(text)
    size = (max(COLUMN, 0.8 + 0.66 * len(alphas)), 0.9 + 0.28 * len(pairs))
    figure, axis = new_figure(figsize=size)
    black = 2 * np.nanmax(shown, initial=0.01)  # the largest value is grey: text stays legible
    axis.imshow(shown, cmap="Greys", vmin=0, vmax=black, aspect="auto")
    for (y, x), text in texts.items():
        axis.text(x, y, " ".join(text), ha="center", va="center", fontsize=7)
    x = alphas.index(best[2])
    y = pairs.index(tuple(best[:2]))
    frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, lw=1.5, clip_on=False, zorder=3)
    axis.add_patch(frame)
    ticks = {"xticks": range(len(alphas)), "yticks": range(len(pairs))}
    names = {"xticklabels": [f"{alpha:g}" for alpha in alphas]}
    names["yticklabels"] = ["{} → {}".format(*pair) for pair in pairs]
    axis.set(**ticks, **names, xlabel="steering strength α", ylabel="blocks", title=title)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #8886; padding: 0.2rem 0.7rem; text-align: left; }
td:first-child, td:last-child { min-width: 8rem; }
img { background: white; display: block; max-width: 100%; margin: 1rem 0; max-height: 28rem; }
pre { background: #8882; overflow-x: auto; padding: 0.5rem; white-space: pre-wrap; }
@media print { body { font-size: 10pt; max-width: none; } table { display: table; } }
"""


def html(title: str, report: str, folder: Path) -> str:
    """A report as one file with its figures; model output is never rendered as HTML."""
    from markdown_it import MarkdownIt

    def inside(match) -> str:
        path = folder / unquote(match[1])
        data = base64.b64encode(path.read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = MarkdownIt("js-default").render(report)
    # A number stays with its interval, but a prompt is as it was.
    body = re.sub(r"(?<=[\d,\]]) (?=[\d\[(%])(?![^<]*</code>)", "&nbsp;", body)
    body = re.sub(r'src="([^":/]+\.png)"', inside, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = f"<title>{title}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{body}</body></html>\n'
