"""lm-evaluation-harness as referee: the same prompts, log-probabilities and verdicts, also under vectors written for it.

    pip install -r requirements-dev.txt && pytest tests/test_lm_eval.py

Skipped where lm_eval is not installed.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import common
import exp_truthfulqa
from conftest import GROUPED, save_model

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is a referee alone; requirements-dev.txt installs it")
TASKS = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
TOY = Path(__file__).resolve().parents[1] / "data" / "toy"


def options(prompt: str):
    return exp_truthfulqa.options(["--prompt", prompt])


@pytest.fixture(scope="module")
def questions() -> list[exp_truthfulqa.Question]:
    return exp_truthfulqa.load_questions(TOY)[:40:3]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(model by common.load_model, lm_eval's) of one random model whose context has room for the primer."""
    from lm_eval.models.huggingface import HFLM
    folder = save_model(tmp_path_factory.mktemp("lm_eval") / "m", transformers.LlamaConfig,
                        **{**GROUPED, "max_position_embeddings": 1024})
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", add_bos_token=True, batch_size=4)
    return common.load_model(str(folder), device="cpu"), theirs


def referee(model, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """lm_eval's (log-probability, whether greedy) of each (context, continuation)."""
    from lm_eval.api.instance import Instance
    return model.loglikelihood([Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs],
                               disable_tqdm=True)


@pytest.mark.parametrize("prompt", ["paper", "qa"])
def test_every_choice_has_lm_eval_s_log_probability_and_every_question_its_mc1_and_mc2(models, questions, prompt):
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2
    (ours, theirs), args = models, options(prompt)
    verdicts, result = [], exp_truthfulqa.answer(ours, args, questions)[0]
    for question, mc1, mc2 in zip(questions, result["mc1"], result["mc2"], strict=True):
        pairs = exp_truthfulqa.asked(args, ours.name, question)
        assert [text for _, text in pairs] == [f" {answer}" for answer in question.answers]
        values, greedy = (row[0].tolist() for row in common.choice_logprobs(ours, pairs))
        wanted = referee(theirs, pairs)
        assert values == pytest.approx([value for value, _ in wanted], abs=1e-4)
        assert greedy == [flag for _, flag in wanted]
        assert mc1 == (int(np.argmax([value for value, _ in wanted[:question.choices]])) == question.right)
        truth = [int(i in question.true) for i in question.true + question.false]
        document = {"mc2_targets": {"labels": truth}}
        shares = process_results_mc2(document, [wanted[i] for i in question.true + question.false])
        assert mc2 == pytest.approx(shares["acc"], abs=1e-4)
        verdicts.append(mc1)
    assert len(verdicts) >= 12 and 0 < sum(verdicts) < len(verdicts)        # else agreement would say little


def test_a_continuation_is_greedy_for_us_when_it_is_for_lm_eval(models, questions):
    (ours, theirs), args, pairs = models, options("paper"), []
    for question in questions:
        context, _ = exp_truthfulqa.asked(args, ours.name, question)[0]
        ids, = common.encode(ours, [context])
        best = common.next_token_logits(ours, [context])[0, 0].argsort(descending=True)[:2].tolist()
        texts = [ours.tokenizer.decode([token]) for token in best]
        if common.encode(ours, [context + text for text in texts]) == [[*ids, token] for token in best]:
            pairs += [(context, text) for text in texts]
    _, greedy = common.choice_logprobs(ours, pairs)
    assert pairs and greedy[0].tolist() == [flag for _, flag in referee(theirs, pairs)] == [True, False] * (len(pairs) // 2)


def test_the_qa_prompt_is_that_of_lm_eval_s_own_task(questions):
    from lm_eval.api.task import TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template
    task = load_yaml(TASKS / "truthfulqa_mc1.yaml")
    assert task["num_fewshot"] == 0 and (task["doc_to_target"], task["doc_to_choice"]) == (0, "{{mc1_targets.choices}}")
    delimiter = task.get("target_delimiter", TaskConfig.target_delimiter)
    for question in questions:
        context = apply_template(task["doc_to_text"], {"question": question.text})
        wanted = [(context, delimiter + answer) for answer in question.answers]
        assert exp_truthfulqa.asked(options("qa"), "any", question) == wanted
    assert apply_template(task["doc_to_text"], {"question": "Why?"}) == f"{exp_truthfulqa.PRIMER}\n\nQ: Why?\nA:"


# ================================================================ vectors that travel: lm_eval's steered model

V = torch.randn(32, generator=torch.Generator().manual_seed(3))
TEXTS = ["Tom found a red ball in the park.", "Lily felt very", "Scenario: you see a spider in the house."]


def logprobs(model, pairs: list[tuple[str, str]]) -> list[float]:
    return [value for value, _ in referee(model, pairs)]


def steered(pretrained: str, path: Path, change=lambda config: config):
    """lm_eval's own model under the vector in the file, or under what `change` makes of it."""
    from lm_eval.models.hf_steered import SteeredModel
    config = torch.load(path, weights_only=True)        # tensors, numbers and texts alone: no code
    torch.save(change(config), path.with_name("changed.pt"))
    return SteeredModel(pretrained=pretrained, steer_path=str(path.with_name("changed.pt")), device="cpu",
                        dtype="float32", add_bos_token=True, batch_size=8)


def at_block(block: int):
    """The same vector at another block of a Llama."""
    return lambda config: {f"layers.{block}": entry for entry in config.values()}


def times(factor: float):
    return lambda config: {name: {**entry, "steering_coefficient": factor * entry["steering_coefficient"]}
                           for name, entry in config.items()}


def test_lm_eval_gets_our_steered_log_probabilities_and_mc1(tmp_path):
    model, args = common.load_model(str(TOY / "models" / "llama-m"), device="cpu"), options("paper")
    questions, path, block = exp_truthfulqa.load_questions(TOY), tmp_path / "v.pt", 6
    positive, negative = ([f"A {kind} person says: {question.text}" for question in questions[-40:]]
                          for kind in ("truthful", "lying"))
    v, = common.concept_vector(model, positive, negative, [block])
    common.export_steered(path, model, v, block, 2.0)
    questions, move = questions[:48:3], common.Transplant.of(v, block, 2.0)
    base, ours = exp_truthfulqa.answer(model, args, questions, [common.BASE, move])
    asked = [exp_truthfulqa.asked(args, model.name, question) for question in questions]
    pairs = [pair for choices in asked for pair in choices]
    wanted = common.choice_logprobs(model, pairs, [common.BASE, move])[0].numpy()

    theirs = logprobs(steered(model.name, path), pairs)
    assert theirs == pytest.approx(wanted[1].tolist(), abs=1e-4)
    each = np.split(theirs, np.cumsum([len(choices) for choices in asked])[:-1])
    mc1 = [int(values[:question.choices].argmax() == question.right) for values, question in zip(each, questions, strict=True)]
    assert mc1 == ours["mc1"] and base["mc1"] != mc1 and 0 < sum(mc1) < len(mc1)    # else agreement would say little

    # Were block, sign or strength another, it would show.
    for change in (at_block(block - 1), at_block(block + 1), times(-1), times(2), times(0)):
        assert np.abs(np.array(logprobs(steered(model.name, path, change), pairs)) - wanted[1]).max() > 0.1
    assert logprobs(steered(model.name, path, times(0)), pairs) == pytest.approx(wanted[0].tolist(), abs=1e-4)


def test_the_block_has_the_name_that_lm_eval_looks_for_on_every_architecture(any_pair, tmp_path):
    model, _ = any_pair
    common.export_steered(tmp_path / "v.pt", model, V, 2, 3.0)
    pairs = [(text, " happy dog") for text in TEXTS]
    wanted = common.choice_logprobs(model, pairs, [common.BASE, common.Transplant.of(V, 2, 3.0)])[0]
    theirs = logprobs(steered(model.name, tmp_path / "v.pt"), pairs)
    assert theirs == pytest.approx(wanted[1].tolist(), abs=1e-4)
    assert theirs != pytest.approx(wanted[0].tolist(), abs=0.1)
