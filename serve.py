"""Generate with a trained checkpoint.

    python serve.py PROMPT="The module"                            continue it with the newest checkpoint
    echo "春眠不觉晓" | python serve.py CHECKPOINT=out/poetry TEMPERATURE=0.7
    python serve.py PROMPTS=prompts.jsonl ANSWERS=answers.jsonl    a file of prompts, greedy, batched

A row of PROMPTS has `prompt`, or `messages` or `conversations` (turns with role and content; a closing
assistant turn is the reference and is left out). ANSWERS repeats the row's other fields and adds `answer`.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch

import common

# Model
CHECKPOINT = ""           # a folder or file; "" = the newest in out/
ADAPTER = ""              # folder of a LoRA adapter in PEFT layout, trained on CHECKPOINT
DTYPE = "auto"            # bfloat16 where the device has it and it is faster, else float32
YARN = 1.0                # stretches the context by this factor (YaRN)

# Input
PROMPT = ""               # text to continue; text on standard input is a prompt too
PROMPTS = ""              # .jsonl of prompts to answer instead
ANSWERS = "answers.jsonl"  # where their answers go
BATCH = 16                # prompts answered at once

# Sampling
MAX_TOKENS = 0            # new tokens at most; 0 = 256, or fewer where the context ends
TEMPERATURE = -1.0        # 0 = the likeliest token; -1 = 0.8 for PROMPT, 0 for PROMPTS
TOP_K = 0                 # draw among the k likeliest; 0 = all
TOP_P = 1.0               # draw among the likeliest that together have this probability
REPETITION_PENALTY = 1.0  # above 1 makes tokens that are there already less likely
STOP = ()                 # strings that end a completion, not shown, like ("\n\n", "。")
SEED = -1                 # -1 = another one each time


def load():
    """(model, tokenizer, device) of CHECKPOINT."""
    path = common.newest_checkpoint(CHECKPOINT)
    found = common.load(path)
    changes = {"yarn": YARN} if YARN != 1 else {}
    if changes and found["kind"] != "LM":
        raise common.BadInput(f"YARN={YARN} needs rotary positions; {path} holds a {found['kind']}")
    device = torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    model = common.build(found, **changes)
    if ADAPTER:
        model = common.merge_lora(common.load_adapter(model, ADAPTER))
    model = common.for_inference(model.to(device), common.pick_dtype(DTYPE, device))
    return model, common.load_tokenizer(path.parent / "tokenizer.json"), path


def room(model, prompt):
    """New tokens that may follow a prompt; MAX_TOKENS itself unless that is 0."""
    return MAX_TOKENS or max(1, min(256, model.context - len(prompt)))


def complete(prompt):
    """Stream the continuation of a text to standard output."""
    model, tokenizer, path = load()
    ids = [common.BOS, *common.encode(tokenizer, prompt)]
    seed = SEED if SEED >= 0 else random.SystemRandom().randrange(2**31)
    print(f"{path}, seed {seed}", file=sys.stderr, flush=True)
    begin, text = time.perf_counter(), ""
    for _, piece in common.stream(
        model,
        common.token_bytes(tokenizer),
        [ids],
        room(model, ids),
        STOP,
        seeds=seed,
        temperature=0.8 if TEMPERATURE == -1 else TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        repetition_penalty=REPETITION_PENALTY,
    ):
        print(piece if text else prompt + piece, end="", flush=True)  # a refused prompt is not echoed
        text += piece
    seconds, count = time.perf_counter() - begin, len(common.encode(tokenizer, text))
    print("" if text else prompt, flush=True)
    print(f"{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    return text


def read_prompts(tokenizer):
    """(token ids, fields to keep) of every row of PROMPTS."""
    if not Path(PROMPTS).is_file():
        raise common.BadInput(f"there is no file {PROMPTS}")
    rows = []
    for number, line in enumerate(Path(PROMPTS).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            turns = row.get("messages") or row.get("conversations")
            if turns:
                turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
                ids = common.render_chat(tokenizer, turns, reply=True)[0]
            else:
                ids = [common.BOS, *common.encode(tokenizer, row["prompt"])]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            why = (
                error
                if isinstance(error, common.BadInput)
                else "a row needs prompt, messages or conversations"
            )
            raise common.BadInput(f"{PROMPTS}:{number}: {why}") from None
        rows.append(
            (ids, {k: v for k, v in row.items() if k not in ("prompt", "messages", "conversations")}, number)
        )
    if not rows:
        raise common.BadInput(f"{PROMPTS} has no rows")
    return rows


def answer_all():
    """Answer every row of PROMPTS into ANSWERS, prompts of like length together."""
    from tqdm import tqdm
    model, tokenizer, path = load()
    rows, table = read_prompts(tokenizer), common.token_bytes(tokenizer)
    for ids, _, number in rows:
        if len(ids) + (MAX_TOKENS or 1) > model.context:
            raise common.BadInput(
                f"{PROMPTS}:{number}: {len(ids)} tokens and MAX_TOKENS {MAX_TOKENS or 1} pass the context "
                f"of {model.context}; shorten it, or stretch the context with YARN"
            )
    common.within(1, 10_000, BATCH=BATCH)
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    print(f"{path}: {len(rows)} prompts", file=sys.stderr, flush=True)
    with tqdm(total=len(rows), unit="prompt", disable=not sys.stderr.isatty()) as bar:
        for at in range(0, len(order), BATCH):
            chosen = order[at:at + BATCH]
            prompts = [rows[i][0] for i in chosen]
            pieces = common.stream(
                model,
                table,
                prompts,
                room(model, prompts[-1]),
                STOP,
                top_k=TOP_K,
                top_p=TOP_P,
                temperature=max(0.0, TEMPERATURE),
                repetition_penalty=REPETITION_PENALTY,
                seeds=[max(SEED, 0) + i for i in chosen],
            )
            for row, piece in pieces:
                answers[chosen[row]] += piece
            bar.update(len(chosen))
    lines = [
        json.dumps({**row[1], "answer": answer}, ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    common.write_whole(
        Path(ANSWERS), lambda file: file.write("".join(line + "\n" for line in lines).encode())
    )
    print(f"{ANSWERS}: {len(lines)} answers", flush=True)
    return answers


def main():
    if PROMPTS:
        return answer_all()
    prompt = PROMPT
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise common.BadInput('nothing to continue; give PROMPT="..." or text on standard input')
    return complete(prompt)


if __name__ == "__main__":
    common.cli(globals(), main)
