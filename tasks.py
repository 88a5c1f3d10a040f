"""The tasks: where their rows come from, and the requests that a row becomes.

A request is a context and a continuation, two strings; a row becomes one for each choice. How they are
scored, with an example, stands at the top of eval_icl.py. Rows, strings and metrics are those of
EleutherAI's lm-evaluation-harness 0.4.13. Two tasks need no download: `cloze` and `lastword` are made of the
validation text of the data that a model was trained on.
"""

import json
import random
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from config import nearest
from data import documents, get_tokenizer, read_meta
from model import UserError, check

# --------------------------------------------------------------------------------- a row -> its requests


class Example(NamedTuple):
    requests: list[tuple[str, str]]  # (context, continuation)
    gold: int  # number of the right one


def choose(context: str, choices: list[str], gold: int) -> Example:
    return Example([(context, " " + choice) for choice in choices], gold)


def last_word(text: str) -> Example:
    context, _, word = text.rpartition(" ")
    return Example([(context, " " + word)], 0)


def hellaswag(row: dict) -> Example:
    def clean(text):  # the order matters: an ending may keep a space in front
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def labelled(context: str, row: dict) -> Example:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return choose(context, row["choices"]["text"], gold)


def arc(row: dict) -> Example:
    return labelled(f"Question: {row['question']}\nAnswer:", row)


def commonsense_qa(row: dict) -> Example:
    letters, texts = list("ABCDE"), row["choices"]["text"]
    listed = "\n".join(f"{letter}. {texts[i]}" for i, letter in enumerate(letters))
    context = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
    return choose(context, letters, letters.index(row["answerKey"]))


def piqa(row: dict) -> Example:
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def sciq(row: dict) -> Example:
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def openbookqa(row: dict) -> Example:
    return labelled(row["question_stem"], row)


def lambada(row: dict) -> Example:
    return last_word(row["text"])


def winogrande(row: dict) -> Example:
    """Two contexts and one continuation: which option makes the rest of the sentence likelier?"""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Example([(context, " " + after.strip()) for context in contexts], int(row["answer"]) - 1)


def draw(spots: list, n: int) -> list:
    """n of the spots by chance (all, if there are fewer); the first of them are the same for every n."""
    rng, chosen = random.Random(1234), {}
    while len(chosen) < min(n, len(spots)):
        chosen[rng.randrange(len(spots))] = True
    return [spots[i] for i in chosen]


def make_cloze(texts: list[str], n: int, before: int) -> list[Example]:
    """HellaSwag's form: the next 32 characters or so, and three others from elsewhere."""
    space = re.compile(r"(?s)(?<=\S) (?=\S.{47})")
    spots = [(text, match.start()) for text in texts for match in space.finditer(text)]
    spots = draw(spots, min(4 * n, len(spots) // 4 * 4))
    stretches = [re.match(r"(?s).{32}\S{,16}", text[at + 1 : at + 49]).group() for text, at in spots]
    examples = []
    for i in range(0, len(spots), 4):
        (text, at), choices = spots[i], stretches[i + 1 : i + 4]
        gold = i // 4 % 4  # the right one takes every place in turn
        choices.insert(gold, stretches[i])
        examples.append(choose(text[max(0, at - before) : at], choices, gold))
    return examples


def make_last_word(texts: list[str], n: int, before: int) -> list[Example]:
    """LAMBADA's form: the last word of a line of four words or more."""
    word, spots = re.compile(r"(?m)(?<=\S) [^\W\d_]{1,20}[.,:;]?$"), []  # letters, and a point at most
    for text in texts:
        for match in word.finditer(text):
            end = match.end()
            line = text[text.rfind("\n", 0, end) + 1 : end]
            if len(line.split()) >= 4:
                spots.append((text, end))
    return [last_word(text[max(0, end - before) : end]) for text, end in draw(spots, n)]


# ------------------------------------------------------------------------------------------------- the table

CONVERTED = "refs/convert/parquet"  # the branch in which the Hub keeps datasets as CONFIG/SPLIT/0000.parquet
HELLASWAG = "218ec52e09a7e7462a5400043bb9a69a41d06b76"  # a revision that has all rows
LAMBADA = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"  # SHA-256 of OpenAI's file


class Task(NamedTuple):
    """What is measured, and how a row becomes an Example. Rows are a file of a dataset on the Hugging Face
    Hub; where there is none, render makes Examples of texts: (texts, how many, characters before)."""

    metrics: tuple[str, ...]
    render: Callable
    repo: str = ""
    file: str = ""
    split: str = ""
    n_rows: int = 0
    revision: str = CONVERTED
    sha256: str = ""  # "": what the Hub says it is


# The names of the converted files follow the Hub's rule. We have not seen piqa's: should its
# download fail, look the name up on the Hub.
ACC, NORM, WORD = ("acc",), ("acc", "acc_norm"), ("perplexity", "acc")
TASKS = {
    "cloze": Task(NORM, make_cloze),
    "lastword": Task(WORD, make_last_word),
    "hellaswag": Task(
        NORM, hellaswag,
        "Rowan/hellaswag", "data/validation-00000-of-00001.parquet", "validation", 10042, HELLASWAG,
    ),
    "lambada_openai": Task(
        WORD, lambada,
        "EleutherAI/lambada_openai", "data/lambada_test.jsonl", "test", 5153, "main", LAMBADA,
    ),
    "arc_easy": Task(NORM, arc, "allenai/ai2_arc", "ARC-Easy/test/0000.parquet", "test", 2376),
    "arc_challenge": Task(NORM, arc, "allenai/ai2_arc", "ARC-Challenge/test/0000.parquet", "test", 1172),
    "commonsense_qa": Task(
        ACC, commonsense_qa, "tau/commonsense_qa", "default/validation/0000.parquet", "validation", 1221
    ),
    "piqa": Task(NORM, piqa, "baber/piqa", "default/validation/0000.parquet", "validation", 1838),
    "openbookqa": Task(NORM, openbookqa, "allenai/openbookqa", "main/test/0000.parquet", "test", 500),
    "sciq": Task(NORM, sciq, "allenai/sciq", "default/test/0000.parquet", "test", 1000),
    "winogrande": Task(
        ACC, winogrande, "allenai/winogrande", "winogrande_xl/validation/0000.parquet", "validation", 1267
    ),
}  # fmt: skip
BUILT_IN = [name for name, task in TASKS.items() if not task.repo]
DOWNLOADED = [name for name, task in TASKS.items() if task.repo]
N_BUILT_IN = 300  # examples of each, where no limit is given


# ----------------------------------------------------------------------------------------- reading the rows


def load_tasks(
    names: list[str], data: str | Path | None, data_dir: str | Path, block_size: int, limit: int | None
) -> dict[str, list[Example]]:
    """The examples of all tasks, or a UserError before anything is scored."""
    loaded = {}
    for name in names:
        other = f"there are {', '.join(TASKS)}\nany other task of the harness: --lm_eval {name}"
        check(name in TASKS, f"unknown task {name!r}{nearest(name, TASKS)}; {other}")
        if name in BUILT_IN:
            loaded[name] = make_task(name, data, block_size, limit)
        else:
            loaded[name] = read_task(name, data_dir, limit)
    return loaded


def read_task(name: str, data_dir: str | Path, limit: int | None) -> list[Example]:
    """The first `limit` rows of DATA_DIR/TASK/SPLIT.jsonl. Raises UserError for a missing file and for the
    first row that is not one of the task's."""
    path = Path(data_dir, name, f"{TASKS[name].split}.jsonl")
    command, examples = f"python prepare_data.py icl --out {data_dir}", []
    again = f"remove it and get it again: {command}"
    check(path.is_file(), f"{path} is missing\n{command}")
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                examples.append(read_row(name, line))
            except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
                why = f"is no row of {name} ({type(error).__name__}: {error})"
                raise UserError(f"{path}, line {number}, {why}\n{again}") from None
    check(bool(examples), f"{path} has no rows\n{again}")
    return examples


def read_row(name: str, line: bytes) -> Example:
    example = TASKS[name].render(json.loads(line))
    if not 0 <= example.gold < len(example.requests):
        raise ValueError(f"no choice {example.gold}")
    if not all(continuation.strip() for _, continuation in example.requests):
        raise ValueError("an empty choice")
    return example


def make_task(name: str, data: str | Path | None, block_size: int, limit: int | None) -> list[Example]:
    """Examples of a built-in task from the first two million characters of the validation split of `data`:
    `limit` of them (None: 300), if there are so many; a longer list begins with the shorter one. Contexts
    have at most block_size / 2 characters, and at most 512."""
    tokenizer, texts, size = get_tokenizer(read_meta(data)["tokenizer"]), [], 0
    for tokens in documents(data, "val"):
        texts.append(tokenizer.decode(tokens[: 1 << 20].tolist()))
        size += len(texts[-1])
        if size > 1 << 21:
            break
    examples = TASKS[name].render(texts, limit or N_BUILT_IN, min(512, block_size // 2))
    why = f"the validation split of {data} is too small to make {name} of it"
    check(bool(examples), f"{why}\nprepare more text")
    return examples
