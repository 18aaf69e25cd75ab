"""Leave out of truthfulqa/ the questions that a model of another family answers truthfully.

    python data/toy/world.py && python data/toy/filter_questions.py

TruthfulQA was made like this: its authors left out most questions that GPT-3 answered truthfully
(Lin et al. 2022). Here qwen-s takes GPT-3's place. It read other documents with another tokenizer,
and no row of Table 1 is about it.
"""

import json

import train
import world
from transformers import AutoModelForCausalLM, AutoTokenizer

FILTER = train.FOLDER / "qwen-s"
PROMPT = "[INST] {}[/INST]"  # as the experiment asks


def answered_falsely(questions: list[dict]) -> list[dict]:
    """The questions to which the filter's likeliest answer is a false one."""
    model = AutoModelForCausalLM.from_pretrained(FILTER, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(FILTER)
    prompts = [PROMPT.format(each["question"]) for each in questions]
    answers = [[f" {answer}" for answer in each["mc1_targets"]] for each in questions]
    likeliest = train.likeliest(model, tokenizer, prompts, answers)
    return [each for each, answer in zip(questions, likeliest) if answer != 0]  # 0 is the truth


if __name__ == "__main__":
    folder = world.FOLDER / "truthfulqa"
    questions = json.loads((folder / "mc_task.json").read_text())
    kept = answered_falsely(questions)
    world.write_questions(folder, kept)
    print(f"{len(kept)} of {len(questions)} questions kept in {folder}")
