"""Write truthfulqa/: the questions that a model of another family does not answer truthfully.

    python data/toy/filter_questions.py    after world.py, which writes unfiltered.json

TruthfulQA was made like this: its authors left out most questions that GPT-3 answered truthfully
(Lin et al. 2022). Here qwen-s takes GPT-3's place. It read other documents with another tokenizer,
and no row of Table 1 is about it
(in Table 3 its chat model is a source).
"""

import argparse
import csv
import json
from pathlib import Path

import train
import world

from transformers import AutoModelForCausalLM, AutoTokenizer

FILTER = train.FOLDER / "qwen-s"
PROMPT = "[INST] {}[/INST]"  # as the experiment asks


def filter_questions(folder: Path) -> tuple[int, int]:
    """Write mc_task.json and TruthfulQA.csv; returns how many questions there were, and are."""
    questions = json.loads((folder / "unfiltered.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(FILTER, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(FILTER)
    prompts = [PROMPT.format(each["question"]) for each in questions]
    answers = [[f" {answer}" for answer in each["mc1_targets"]] for each in questions]
    likeliest = train.likeliest(model, tokenizer, prompts, answers)
    kept = [each for each, answer in zip(questions, likeliest) if answer != 0]  # 0 is the truth
    (folder / "mc_task.json").write_text(json.dumps(kept, indent=1) + "\n")
    with open(folder / "TruthfulQA.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["Category", "Question"])
        for each in kept:
            [relation] = [name for name in world.RELATIONS if f" {name} of " in each["question"]]
            rows.writerow([relation.capitalize(), each["question"]])
    return len(questions), len(kept)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    asked, kept = filter_questions(world.FOLDER / "truthfulqa")
    print(f"{kept} of {asked} questions kept")
