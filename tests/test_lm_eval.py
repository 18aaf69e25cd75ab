"""MC1 and MC2 against lm-evaluation-harness: the same prompts, the same log-probabilities, the same verdicts.

    pip install -r requirements-dev.txt && pytest tests/test_lm_eval.py

Skipped where lm_eval is not installed.
"""

from pathlib import Path

import numpy as np
import pytest
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
