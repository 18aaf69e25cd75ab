"""lm-evaluation-harness as referee: the same log-likelihoods, MC1 and MC2, also under our vectors.

    pip install -r requirements-dev.txt && pytest tests/test_lm_eval.py

Skipped where lm_eval is not installed.
"""

import json
from pathlib import Path

from common import BASE, Transplant, choice_logprobs
from harness import TOY, export_concept, read_json
from report import select

import numpy as np
import pytest
import torch
from conftest import json_rows, vectors

lm_eval = pytest.importorskip("lm_eval", reason="requirements-dev.txt installs lm_eval")

TASKS = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
QUESTIONS = read_json(TOY / "truthfulqa" / "unfiltered.json")[:40:2]
TEXTS = ["Tom found a red ball in the park.", "Lily felt very", "Scenario: you see a spider."]


def referee(pairs, pretrained, steer_path=None):
    """lm_eval's log-likelihoods of continuations, and whether each is greedy."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.hf_steered import SteeredModel
    from lm_eval.models.huggingface import HFLM

    options = {"device": "cpu", "dtype": "float32", "add_bos_token": True, "batch_size": 8}
    if steer_path is None:
        model = HFLM(pretrained=pretrained, **options)
    else:
        model = SteeredModel(pretrained=pretrained, steer_path=str(steer_path), **options)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    values, greedy = zip(*model.loglikelihood(requests, disable_tqdm=True))
    return np.array(values), list(greedy)


def test_continuations_have_lm_evals_log_likelihood_and_greedy_flag(any_pair):
    model, reference = any_pair
    pairs = [(text, word) for text in TEXTS for word in (" happy", " sad dog in the house", " x")]
    for text, logits in zip(TEXTS, reference.next_logits(TEXTS)):
        word = reference.tokenizer.decode(logits.argmax())
        if len(reference.ids(text + word)[0]) == len(reference.ids(text)[0]) + 1:
            pairs.append((text, word))
    values, greedy = choice_logprobs(model, pairs)
    wanted, flags = referee(pairs, model.name)
    assert values[0].numpy() == pytest.approx(wanted, abs=1e-4)
    assert greedy[0].tolist() == flags


def change(path, name=None, factor=1.0):
    """The exported vector at another module, or at another strength."""
    [(module, entry)] = torch.load(path).items()
    entry["steering_coefficient"] *= factor
    changed = path.with_name("changed.pt")
    torch.save({name or module: entry}, changed)
    return changed


def test_lm_eval_steers_every_family_with_our_vector(any_pair, tmp_path):
    model, _ = any_pair
    path = tmp_path / "v.pt"
    [v] = vectors(1)
    export_concept(path, model, v, 2, 3.0)
    pairs = [(text, " happy dog") for text in TEXTS]
    moves = [BASE, Transplant.of(v, 2, 3.0)]
    base, steered = choice_logprobs(model, pairs, moves)[0].numpy()
    assert referee(pairs, model.name, path)[0] == pytest.approx(steered, abs=1e-4)
    [module] = torch.load(path)
    for wrong in (change(path, module.replace("2", "1")), change(path, factor=-1)):
        assert abs(referee(pairs, model.name, wrong)[0] - steered).max() > 0.1
    assert referee(pairs, model.name, change(path, factor=0))[0] == pytest.approx(base, abs=1e-4)


def requests_of(kind):
    """(context, answer) of each question, as lm_eval's own task has them."""
    from lm_eval.api.task import TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    task = load_yaml(TASKS / "truthfulqa_mc1.yaml")
    delimiter = task.get("target_delimiter", TaskConfig.target_delimiter)
    requests = []
    for question in QUESTIONS:
        context = apply_template(task["doc_to_text"], question)
        requests.append([(context, delimiter + answer) for answer in question[kind]])
    return requests


def scores(*model):
    """MC1 and MC2 as lm_eval computes them."""
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    found = {}
    for metric in ("mc1", "mc2"):
        kind, marks = f"{metric}_targets", []
        requests = requests_of(kind)
        values, _ = referee(sum(requests, []), *model)
        ends = np.cumsum([len(each) for each in requests])
        for question, own in zip(QUESTIONS, np.split(values, ends[:-1]), strict=True):
            labels = list(question[kind].values())
            if metric == "mc1":
                marks.append(labels[own.argmax()])
            else:
                document = {kind: {"labels": labels}}
                results = [(value, False) for value in own]
                marks.append(process_results_mc2(document, results)["acc"])
        found[metric] = np.mean(marks)
    return found


@pytest.mark.slow
def test_the_script_has_lm_evals_mc1_and_mc2_before_and_after_the_transplant(tmp_path):
    import exp_truthfulqa

    data = tmp_path / "data"
    (data / "truthfulqa").mkdir(parents=True)
    for path in TOY.resolve().iterdir():
        if path.name != "truthfulqa":
            (data / path.name).symlink_to(path)
    (data / "truthfulqa" / "TruthfulQA.csv").symlink_to(TOY.resolve() / "truthfulqa/TruthfulQA.csv")
    (data / "truthfulqa" / "mc_task.json").write_text(json.dumps(QUESTIONS))
    target = str(TOY / "models" / "llama-m")
    words = "--prompt qa --protocol paper --limit -1 --maps 1 --random 1 --sentences 100 --alpha 3"
    words += f" --src {TOY}/models/llama-s-chat --tgt {target} --layer 0.75"
    words += f" --data {data} --out {tmp_path} --save-vector {tmp_path}/v"
    exp_truthfulqa.main(words.split())
    [run] = (tmp_path / "exp_truthfulqa").iterdir()
    records = json_rows(run, "records.jsonl")
    mine = select(records, item="Table 1", target=target, part="test", variant=None, group=None)
    base = scores(target)
    steered = scores(target, tmp_path / "v" / "v_honesty_llama-m.pt")
    for method, wanted in (("base", base), ("contrans", steered)):
        for metric, value in wanted.items():
            [found] = select(mine, method=method, metric=metric)
            assert found["value"] == pytest.approx(value, abs=1e-4)
            assert found["n"] == len(QUESTIONS)
    assert base["mc1"] != steered["mc1"]
    assert 0 < steered["mc1"] < 1
