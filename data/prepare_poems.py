"""Find the poems that a chat set asks about, and write what is needed to know them by heart.

    python data/prepare_poems.py DATA=pretrain_poetry.jsonl.gz CHATS=sft_poetry.jsonl.gz
    python train_pretrain.py INIT=out/poetry DATA=by_heart.jsonl.gz VALID=by_heart.jsonl.gz OUT=out/heart
    python train_sft.py DATA=chats_by_heart.jsonl.gz INIT=out/heart OUT=out/chat

A poem is asked about where one question and its answer hold two of its lines, or its title, a line and its
author; held-out questions do not count. Written are DOCUMENTS, each such poem whole and from some line on
(who has only read it from its title on cannot go on from a line alone), and QUESTIONS, the chats followed by
more of their kind, in words that they use themselves: the next line of each line that stands in no other
poem, and the author. FACTS are those of them that ask about lines and authors. WISHES ask for poems that hold
a character or begin their lines with given ones, in the chats' words, too, and N_WISHES poems of DATA answer.
What a held-out question asks is not among the new ones, however it is worded.
"""

import collections
import math
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from data import prepare_chats, prepare_text, score_poetry

DATA = ""                  # documents {"text"}: 《title》dynasty·author, then the lines
CHATS = ""                 # conversations, some of which ask about lines and authors
DOCUMENTS = "by_heart.jsonl.gz"
QUESTIONS = "chats_by_heart.jsonl.gz"
FACTS = "facts_by_heart.jsonl.gz"
WISHES = "wishes.jsonl.gz"
N_WISHES = 24_000
VALID_SHARE = 0.02         # as in train_sft.py
SUFFIXES = 4               # times that a poem is written from some line on
SEED = 0

RUN = re.compile(r"[^\W_]+")          # a line, without punctuation
HEAD = re.compile(r"《(.+?)》[^·\n]*·([^\n]+)\n")
ASKS = ("next line", "previous line", "next couplet", "author")      # tasks of score_poetry
LINE, TITLE, WISH = "\0", "\1", "\2"  # in the place of a line, a title, the wished characters in a wording


def spans_of(text):
    """Where the lines of three characters or more begin and end in a poem, its heading left out."""
    head = HEAD.match(text)
    return [m.span() for m in RUN.finditer(text, head.end() if head else 0) if m.end() - m.start() > 2]


def index_of(texts):
    """{line: number of the only poem that holds it, or -1 where several do}."""
    where = {}
    for number, text in enumerate(texts):
        for begin, end in spans_of(text):
            if where.setdefault(text[begin:end], number) != number:
                where[text[begin:end]] = -1
    return where


def read(path):
    """The poems of a file."""
    bad = prepare_text.BadRows()
    texts = [text for text, _ in prepare_text.documents(path, bad)]
    if not texts:
        raise common.BadInput(f'{path} has no {{"text"}}')
    return texts


def wordings(texts, where, chats):
    """Of conversations: (numbers of the poems that they ask about, {"next line" or "author": wordings}, lines
    in held-out questions)."""
    known, held = set(), set()
    found = {"next line": collections.Counter(), "author": collections.Counter()}
    for turns in chats:
        question = prepare_chats.first_words(turns)
        task = score_poetry.task_of(question)
        if task not in ASKS:
            continue
        lines = [line for line in RUN.findall(question) if where.get(line, -1) >= 0]
        if prepare_text.held_out(question, VALID_SHARE):
            held.update(lines)
            continue
        answer = turns[-1]["content"]
        for line in lines[:1]:
            number = where[line]
            head = HEAD.match(texts[number])
            if task == "author":
                if head and head[2] == answer and f"《{head[1]}》" in question:
                    known.add(number)
                    found[task][question.replace(f"《{head[1]}》", TITLE).replace(line, LINE)] += 1
            elif any(where.get(x) == number for x in RUN.findall(answer)):
                known.add(number)
                if task == "next line":
                    found[task][question.replace(line, LINE)] += 1
    return known, {task: [w for w, n in c.items() if n > 9] for task, c in found.items()}, held


def questions(text, where, words, held, rng):
    """Pairs (question, answer) about one poem."""
    spans, head = spans_of(text), HEAD.match(text)
    for (begin, end), (first, last) in zip(spans, spans[1:], strict=False):
        line = text[begin:end]
        if where[line] >= 0 and line not in held:
            stop = text[last:last + 1].strip()
            yield rng.choice(words["next line"]).replace(LINE, line), text[first:last] + stop
    if head and spans and (line := text[slice(*spans[0])]) not in held:
        for wording in rng.sample(words["author"], min(2, len(words["author"]))):
            yield wording.replace(LINE, line).replace(TITLE, f"《{head[1]}》"), head[2]


def wish_wordings(chats):
    """({(lines, characters a line): {"keyword" or "acrostic": wordings}}, what is held out: lines of answers,
    and (shape, wish))."""
    found, held = collections.defaultdict(lambda: collections.defaultdict(set)), set()
    for turns in chats:
        question, answer = prepare_chats.first_words(turns), turns[-1]["content"]
        task = score_poetry.task_of(question)
        shape, out = score_poetry.shape_of(question), prepare_text.held_out(question, VALID_SHARE)
        if out:
            held.update(score_poetry.lines_of(answer))
        for wish in wishes_of(task, answer) if task in ("keyword", "acrostic") else ():
            if (quoted := f"“{wish}”") in question:
                if out:
                    held.add((shape, wish))
                else:
                    found[shape][task].add(question.replace(quoted, f"“{WISH}”"))
    return found, held


def wishes_of(task, poem):
    """What a poem can answer: a character of its own, or its lines' first ones."""
    lines = score_poetry.lines_of(poem)
    return list(dict.fromkeys("".join(lines))) if task == "keyword" else ["".join(x[0] for x in lines)]


def wishes(texts, found, held, rng):
    """N_WISHES conversations, as many of either kind, or as many as there are poems of those forms that no
    held-out answer holds."""
    left = {"acrostic": N_WISHES // 2, "keyword": N_WISHES - N_WISHES // 2}
    for number in rng.sample(range(len(texts)), len(texts)):
        head = HEAD.match(texts[number])
        poem = texts[number][head.end() if head else 0:].strip()
        lines = score_poetry.lines_of(poem)
        shape = (len(lines), len(lines[0])) if len({*map(len, lines)}) == 1 else None
        tasks = [task for task, words in found.get(shape, {}).items() if words and left[task]]
        if not tasks or held & set(lines):
            continue
        task = rng.choice(sorted(tasks))
        wish = rng.choice(wishes_of(task, poem))
        question = rng.choice(sorted(found[shape][task])).replace(WISH, wish)
        if (shape, wish) not in held and not prepare_text.held_out(question, VALID_SHARE):
            left[task] -= 1
            yield {"conversations": [{"role": "user", "content": question},
                                     {"role": "assistant", "content": poem}]}


def main():
    if not DATA or not CHATS:
        raise common.BadInput("give DATA=poems.jsonl.gz and CHATS=chats.jsonl.gz")
    common.within(0, math.inf, N_WISHES=N_WISHES, SUFFIXES=SUFFIXES)
    rng, texts = random.Random(SEED), read(DATA)
    where = index_of(texts)
    known, words, held = wordings(texts, where, prepare_chats.conversations_of(CHATS))
    if not all(words.values()):
        raise common.BadInput(
            f"{CHATS} has not ten questions alike on next lines and authors of the poems in {DATA}"
        )

    def documents():
        for number in sorted(known):
            text = texts[number]
            begins = [begin for begin, _ in spans_of(text)[:-1]]
            yield {"text": text}
            for _ in range(SUFFIXES if begins else 0):
                yield {"text": text[rng.choice(begins):]}

    def asked():
        for turns in prepare_chats.conversations_of(CHATS):
            yield {"conversations": turns}
        for number in sorted(known):
            for question, answer in questions(texts[number], where, words, held, rng):
                if not prepare_text.held_out(question, VALID_SHARE):
                    yield {"conversations": [{"role": "user", "content": question},
                                             {"role": "assistant", "content": answer}]}

    prepare_chats.write_rows(DOCUMENTS, documents())
    rows = list(asked())
    prepare_chats.write_rows(QUESTIONS, rows)
    facts = [r for r in rows if score_poetry.task_of(prepare_chats.first_words(r["conversations"])) in ASKS]
    prepare_chats.write_rows(FACTS, facts)
    asking = list(wishes(texts, *wish_wordings(prepare_chats.conversations_of(CHATS)), rng))
    prepare_chats.write_rows(WISHES, asking)
    print(f"{len(known):,} poems of {DATA} in {DOCUMENTS}; {CHATS} with more of its questions in "
          f"{QUESTIONS}, in {len(words['next line'])} and {len(words['author'])} wordings; {FACTS}: "
          f"{len(facts):,} on lines and authors; {WISHES}: {len(asking):,} for poems")


if __name__ == "__main__":
    common.cli(globals(), main)
