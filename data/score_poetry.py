"""Score answers to checkable questions on classical Chinese poetry: form, wishes, next lines, authors.

    python data/score_poetry.py DATA=sft_poetry.jsonl.gz OUT=prompts.jsonl      its held-out questions
    python serve.py CHECKPOINT=out/chat PROMPTS=prompts.jsonl ANSWERS=answers.jsonl
    python data/score_poetry.py ANSWERS=answers.jsonl

and preferences from a model's own answers, right ones chosen, wrong ones rejected, for train_dpo.py:

    python data/score_poetry.py DATA=sft_poetry.jsonl.gz TRAIN=3000 SAMPLES=4 OUT=asked.jsonl
    python serve.py CHECKPOINT=out/chat PROMPTS=asked.jsonl ANSWERS=tried.jsonl TEMPERATURE=0.8
    python data/score_poetry.py ANSWERS=tried.jsonl PAIRS=pairs.jsonl

Held out are the conversations that train_sft.py holds out, by the same hash. A question's task is told by its
words: a poem of four or eight lines of five or seven characters ("form"; "keyword" and "acrostic" where it
must hold a character or begin its lines with given ones), the next or previous line or couplet, the author.
Baselines, from the references alone: for keyword and acrostic the poems of the same form that answer "form"
questions (those of another keyword question would often hold the same character), for authors the commonest.
"""

import collections
import json
import math
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from data import prepare_chats, prepare_text

DATA = ""                 # conversations (.jsonl, .jsonl.gz) whose held-out questions are written to OUT
OUT = "prompts.jsonl"     # questions with `question`, `task` and `reference`, for serve.py
VALID_SHARE = 0.02        # as in train_sft.py
TRAIN = 0                 # so many questions that are not held out instead; 0 = all held-out ones
ONLY = ""                 # "form,keyword": of these tasks alone
SAMPLES = 1               # times that a question stands in OUT
SEED = 0                  # of the choice of TRAIN
ANSWERS = ""              # what serve.py answered
PAIRS = ""                # where pairs of a right and a wrong answer to the same question go

SHAPES = (
    ("五言绝句|five-character quatrain", 4, 5), ("七言绝句|seven-character quatrain", 4, 7),
    ("五言律诗|five-character eight-line", 8, 5), ("七言律诗|seven-character eight-line", 8, 7),
)
TASKS = (
    ("next line", "请接下一句|的下一句是什么|对出下句|古诗接龙|Continue this line"),
    ("next couplet", "请续写下一联|之后的两句是什么|接着背|Give the next couplet"),
    ("previous line", "请写出“.*”的前一句|的上一句是什么|上句填空|补全诗句：_"),
    ("author", "的作者是谁|谁写了|Who wrote|这首诗是谁写的|这首词是谁写的"),
)
WISHED = re.compile("[“\"'‘]([^”\"'’]+)[”\"'’]")
KINDS = ("form", "keyword", "acrostic", *(name for name, _ in TASKS))


def shape_of(question):
    """(lines, characters a line) that the question asks for, or None."""
    return next(((n, m) for words, n, m in SHAPES if re.search(words, question)), None)


def task_of(question):
    """The name of the task, "" for other questions."""
    if shape_of(question) and "属于" not in question and "form" not in question:
        for name, words in (("acrostic", "首字依次|藏头"), ("keyword", "诗中要有|含有“|字入诗")):
            if re.search(words, question):
                return name if WISHED.search(question) else ""   # without quotes the wish cannot be told
        return "form"
    return next((name for name, words in TASKS if re.search(words, question)), "")


def lines_of(poem):
    """The lines of a poem, without punctuation."""
    return [line for line in re.split("[，。？！；、\n]+", poem.strip()) if line]


def has_form(question, answer):
    n, m = shape_of(question)
    lines = lines_of(answer)
    return len(lines) == n and all(len(line) == m for line in lines)


def has_wish(question, answer):
    """Whether a poem holds the character, or its lines begin with those, that were asked for."""
    wished = WISHED.search(question)[1]
    if task_of(question) == "keyword":
        return wished in answer
    lines = lines_of(answer)
    return len(lines) >= len(wished) and all(line[0] == c for line, c in zip(lines, wished, strict=False))


def bare(text):
    """Text without punctuation and space, to compare by."""
    return re.sub(r"[\W_]+", "", text)


def is_right(row):
    """Whether an answer is what was asked for: a poem's form and wish, with no line twice; else the
    reference to the letter."""
    question, answer = row["question"], row["answer"]
    if row["task"] not in ("form", "keyword", "acrostic"):
        return bare(answer) == bare(row["reference"])
    lines = lines_of(answer)
    return (has_form(question, answer) and len(set(lines)) == len(lines)
            and (row["task"] == "form" or has_wish(question, answer)))


def pairs_of(rows):
    """Preferences: a question's first right and first wrong answer. Where all are wrong the reference is
    chosen, if it is right itself; where all are right nothing is to be learned. Returns (pairs, {task:
    [right, answers]})."""
    asked, counts, pairs = collections.defaultdict(list), {}, []
    for row in rows:
        asked[row["question"]].append(row)
    for question, tries in asked.items():
        right = [is_right(row) for row in tries]
        count = counts.setdefault(tries[0]["task"], [0, 0])
        count[0], count[1] = count[0] + sum(right), count[1] + len(right)
        if all(right):
            continue
        rejected = tries[right.index(False)]["answer"]
        best = tries[right.index(True)] if any(right) else tries[0] | {"answer": tries[0]["reference"]}
        if is_right(best) and bare(best["answer"]) != bare(rejected):
            turns = [{"role": "user", "content": question}]
            pairs.append({name: [*turns, {"role": "assistant", "content": text}] for name, text in (
                ("chosen", best["answer"]), ("rejected", rejected))})
    return pairs, counts


def score(rows):
    """{task: {"n", measure: share, ...}} of rows with question, task, reference, answer."""
    found = {}
    for task in KINDS:
        mine = [r for r in rows if r["task"] == task]
        if not mine:
            continue
        share = lambda hits: sum(hits) / len(mine)                          # noqa: B023 (used at once)
        if task in ("form", "keyword", "acrostic"):
            found[task] = {"n": len(mine), "form": share(has_form(r["question"], r["answer"]) for r in mine)}
            if task != "form":
                both = [(q, p) for q in mine for p in rows
                        if p["task"] == "form" and shape_of(q["question"]) == shape_of(p["question"])]
                found[task] |= {
                    "wish": share(has_wish(r["question"], r["answer"]) for r in mine),
                    "another poem": sum(has_wish(q["question"], p["reference"]) for q, p in both)
                    / max(len(both), 1),
                }
        else:
            found[task] = {
                "n": len(mine),
                "exact": share(bare(r["answer"]) == bare(r["reference"]) for r in mine),
            }
            if task == "author":
                found[task]["commonest"] = collections.Counter(
                    bare(r["reference"]) for r in mine).most_common(1)[0][1] / len(mine)
    return found


def write_pairs(pairs, counts):
    for task, (right, answers) in counts.items():
        print(f"{task:14}  {answers:5} answers  right {right / answers:.3f}")
    if not pairs:
        raise common.BadInput(f"{ANSWERS} gives no pair: no question has a wrong answer beside a right one; "
                              f"ask more often (SAMPLES, now {SAMPLES}), or serve.py with a TEMPERATURE")
    prepare_chats.write_rows(PAIRS, pairs)
    print(f"{PAIRS}: {len(pairs)} pairs")
    return pairs


def main():
    if unknown := [task for task in ONLY.split(",") if ONLY and task not in KINDS]:
        raise common.BadInput(f"ONLY names {unknown[0]!r}; there are {', '.join(KINDS)}")
    wanted = ONLY.split(",") if ONLY else KINDS
    if PAIRS and (not ANSWERS or Path(PAIRS).resolve() == Path(ANSWERS).resolve()
                  or not PAIRS.endswith((".jsonl", ".jsonl.gz"))):
        raise common.BadInput(f"PAIRS={PAIRS} are made of ANSWERS={ANSWERS}: name these, and another .jsonl "
                              "or .jsonl.gz for the pairs")
    if ANSWERS:
        if not Path(ANSWERS).is_file():
            raise common.BadInput(
                f"there is no file {ANSWERS}; python serve.py PROMPTS={OUT} ANSWERS={ANSWERS} makes it"
            )
        try:
            rows = [json.loads(line) for line in Path(ANSWERS).read_bytes().splitlines() if line.strip()]
            found = pairs_of(row for row in rows if row["task"] in wanted) if PAIRS else score(rows)
        except (ValueError, KeyError, TypeError) as error:
            raise common.BadInput(f"{ANSWERS} is not what serve.py answers to {OUT}: rows of question, task, "
                                  f"reference, answer ({type(error).__name__}: {error})") from None
        if PAIRS:
            return write_pairs(*found)
        found = {task: values for task, values in found.items() if task in wanted}
        for task, values in found.items():
            print(f"{task:14}" + "".join(f"  {k} {v:.3f}" if isinstance(v, float) else f"  {v:5} questions"
                                         for k, v in values.items()))
        return found
    if not DATA:
        raise common.BadInput("give DATA=chats.jsonl.gz, or ANSWERS=answers.jsonl to score")
    common.within(0, math.inf, TRAIN=TRAIN)
    common.within(1, math.inf, SAMPLES=SAMPLES)
    asked = []
    for turns in prepare_chats.conversations_of(DATA):
        held = prepare_text.held_out(prepare_chats.first_words(turns), VALID_SHARE)
        if held != bool(TRAIN) and len(turns) == 2 and task_of(question := turns[0]["content"]) in wanted:
            asked.append({"prompt": question, "messages": turns[:1], "question": question,
                          "task": task_of(question), "reference": turns[1]["content"]})
    if not asked:
        raise common.BadInput(
            f"{DATA} {'trains on' if TRAIN else 'holds out'} no such question with VALID_SHARE {VALID_SHARE}"
        )
    if TRAIN:
        asked = random.Random(SEED).sample(asked, min(TRAIN, len(asked)))
    prepare_chats.write_rows(OUT, asked * SAMPLES)
    print(f"{OUT}: {len(asked)} questions" + f", {SAMPLES} times" * (SAMPLES > 1))
    return asked


if __name__ == "__main__":
    common.cli(globals(), main)
