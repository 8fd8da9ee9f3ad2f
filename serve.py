"""Generate with a trained checkpoint: on the command line, or as a server for programs and people.

    python serve.py                                                OpenAI's API and a chat page on port 8000
    python serve.py CHECKPOINT=out/chat ADAPTER=out/mine PORT=8080
    python serve.py PROMPT="The module"                            continue it with the newest checkpoint
    echo "春眠不觉晓" | python serve.py CHECKPOINT=out/poetry TEMPERATURE=0.7
    python serve.py PROMPTS=prompts.jsonl ANSWERS=answers.jsonl    a file of prompts, greedy, batched

A row of PROMPTS has `prompt`, or `messages` or `conversations` (turns with role and content; a closing
assistant turn is the reference and is left out). ANSWERS repeats the row's other fields and adds `answer`.
The server is used as OpenAI's is: /v1/chat/completions, /v1/completions, /v1/models; also /health, /metrics.
"""

import array
import asyncio
import base64
import bisect
import collections
import dataclasses
import hashlib
import hmac
import itertools
import json
import math
import os
import random
import re
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

import common

# Model
CHECKPOINT = ""           # a folder or file, ours or of Hugging Face; "" = the newest in out/
ADAPTER = ""              # folder of a LoRA adapter in PEFT layout, trained on CHECKPOINT
DTYPE = "auto"            # bfloat16 where the device has it and it is faster, else float32; int8: README
YARN = 1.0                # stretches the context by this factor (YaRN)

# Input
PROMPT = ""               # text to continue; text on standard input is a prompt too; neither = the server
PROMPTS = ""              # .jsonl of prompts to answer instead
ANSWERS = "answers.jsonl"  # where their answers go
BATCH = 16                # prompts answered at once

# Sampling
MAX_TOKENS = 0            # new tokens at most; 0 = 256, or fewer where the context ends (server: up to there)
TEMPERATURE = -1.0        # 0 = the likeliest token; -1 = 0.8 for PROMPT, 0 for PROMPTS, 1 for the server
TOP_K = 0                 # draw among the k likeliest; 0 = all
TOP_P = 1.0               # draw among the likeliest that together have this probability
REPETITION_PENALTY = 1.0  # above 1 makes tokens that are there already less likely; not for the server
STOP = ()                 # strings that end a completion, not shown, like ("\n\n", "。"); not for the server
SEED = -1                 # -1 = another one each time; not for the server, where each request has its own

# Server
HOST = "127.0.0.1"        # an address that others can reach needs API_KEY
PORT = 8000               # 0 = any free one
API_KEY = ""              # what clients must send as a bearer token; also read from the environment's API_KEY
CORS = ""                 # the one other site, like "https://example.org", whose pages may call the server
SLOTS = 16                # answers written at the same time
CONTEXT = 0               # tokens of prompt and answer that a slot holds; 0 = the model's, at most 8,192
CHUNK = 32                # prompt tokens read between two steps of the running answers
PREFIX_TOKENS = 32_768    # tokens of prompts already read that are kept for prompts that begin alike
EXACT = True              # use only batch widths that give every row the bits it has alone

# Limits
QUEUE = 64                # answers that may wait for a slot; more are refused with 429
MAX_N = 8                 # answers (n) to one prompt
MAX_BODY = 1_000_000      # bytes of a request
BODY_SECONDS = 10.0       # for a request's head to arrive, and for its body
REQUEST_SECONDS = 300.0   # for an answer; one that takes longer ends there with finish_reason "length"
SHUTDOWN_SECONDS = 10.0   # for running answers to end after Ctrl-C
LOG_PROMPTS = False       # write prompts and answers into the log


class Codec:
    """Text to tokens and back: of a tokenizer, or bytes where a model of 256 tokens has none."""

    def __init__(self, tokenizer):
        self.tokenizer, self.begin, self.end = tokenizer, [], -1
        self.table = [bytes([i]) for i in range(256)]
        if tokenizer:
            self.table, self.begin, self.end = common.token_bytes(tokenizer), [common.BOS], common.EOS

    def encode(self, text):
        """Token ids of a text as a prompt to continue."""
        return self.begin + (common.encode(self.tokenizer, text) if self.tokenizer else list(text.encode()))

    def chat(self, messages):
        """Token ids that ask for the assistant's turn; a byte model continues the turns' text."""
        if self.tokenizer:
            return common.render_chat(self.tokenizer, messages, reply=True)[0]
        return self.encode("\n".join(message["content"] for message in messages))

    def decode(self, ids):
        """The text of tokens; special tokens have none."""
        return b"".join(self.table[i] for i in ids).decode("utf-8", "replace")


def load():
    """(model, tokenizer or None for bytes, path) of CHECKPOINT."""
    if (Path(CHECKPOINT) / "config.json").is_file() and not any(Path(CHECKPOINT).glob("*.pt")):
        import export
        path, found = Path(CHECKPOINT) / "config.json", export.load_folder(CHECKPOINT)
    else:
        path = common.newest_checkpoint(CHECKPOINT)
        found = common.load(path)
    changes = {"yarn": YARN} if YARN != 1 else {}
    if changes and found["kind"] != "LM":
        raise common.BadInput(f"YARN={YARN} needs rotary positions; {path} holds a {found['kind']}")
    device = torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    model = common.build(found, **changes)
    if ADAPTER and Path(ADAPTER).resolve() == path.parent.resolve():
        raise common.BadInput(f"{path} holds ADAPTER={ADAPTER} merged already; leave ADAPTER out, or name "
                              "the base as CHECKPOINT")
    if ADAPTER:
        model = common.merge_lora(common.load_adapter(model, ADAPTER))
    int8 = DTYPE == "int8"
    dtype = common.pick_dtype("auto" if int8 else DTYPE, device)
    model = common.for_inference(model.to(device), dtype, int8)
    of_bytes = model.head_weight.shape[0] == 256 and not (path.parent / "tokenizer.json").exists()
    return model, None if of_bytes else common.load_tokenizer(path.parent / "tokenizer.json"), path


def room(model, prompt):
    """New tokens that may follow a prompt; MAX_TOKENS itself unless that is 0."""
    return MAX_TOKENS or max(1, min(256, model.context - len(prompt)))


def complete(prompt):
    """Stream the continuation of a text to standard output."""
    model, tokenizer, path = load()
    codec = Codec(tokenizer)
    ids = codec.encode(prompt)
    seed = SEED if SEED >= 0 else random.SystemRandom().randrange(2**31)
    print(f"{path}, seed {seed}", file=sys.stderr, flush=True)
    begin, text = time.perf_counter(), ""
    for _, piece in common.stream(
        model,
        codec.table,
        [ids],
        room(model, ids),
        STOP,
        seeds=seed,
        eos=codec.end,
        temperature=0.8 if TEMPERATURE == -1 else TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        repetition_penalty=REPETITION_PENALTY,
    ):
        print(piece if text else prompt + piece, end="", flush=True)  # a refused prompt is not echoed
        text += piece
    seconds, count = time.perf_counter() - begin, len(codec.encode(text)) - len(codec.begin)
    print("" if text else prompt, flush=True)
    print(f"{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    return text


def read_prompts(codec):
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
                ids = codec.chat(turns)
            else:
                ids = codec.encode(row["prompt"])
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
    codec = Codec(tokenizer)
    rows = read_prompts(codec)
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
                codec.table,
                prompts,
                room(model, prompts[-1]),
                STOP,
                top_k=TOP_K,
                top_p=TOP_P,
                temperature=max(0.0, TEMPERATURE),
                repetition_penalty=REPETITION_PENALTY,
                seeds=[max(SEED, 0) + i for i in chosen],
                eos=codec.end,
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


# The engine: answers join and leave a running batch.

@dataclasses.dataclass
class Piece:
    """What a step adds to an answer: text that is certain, its tokens' log-probabilities, and how it ended,
    if it did."""
    text: str = ""
    scores: list = dataclasses.field(default_factory=list)  # (token, logprob or None, [(token, logprob)])
    finish: str = ""                                        # stop, length or error
    error: str = ""


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to one prompt; `index` and `inbox` are for whoever asked."""
    ids: list
    max_tokens: int
    stream: common.TextStream
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top: int = -1                    # likeliest tokens to report at each place; -1 = report no scores
    score_prompt: bool = False       # score the prompt's tokens, too
    bias: dict = dataclasses.field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    index: int = 0
    inbox: object = None
    cancelled: bool = False
    slot: int = -1
    read: int = 0                    # prompt tokens in the slot
    reused: int = 0                  # of these, copied from earlier prompts
    new: list = dataclasses.field(default_factory=list)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    scores: list = dataclasses.field(default_factory=list)  # not sent yet
    begin: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)


class Single:
    """For models whose rows cannot share a cache: the classic one has none, and native sparse attention reads
    a prompt at once. One answer at a time."""

    def __init__(self, model):
        self.model, self.rows, self.chunk = model, 1, 0
        self.head = getattr(model, "fixed_head", None) or (lambda x: x @ model.head_weight.T)
        self.cached = isinstance(model, common.LM)

    def reuse(self, job):
        pass

    def free(self, slot):
        self.cache = None

    def read(self, job):
        ids = torch.tensor([job.ids], device=self.model.head_weight.device)
        job.read = len(job.ids)
        if self.cached:
            self.cache = common.Cache(self.model, 1, len(job.ids) + job.max_tokens + 1)
            last = self.model.read(ids, [len(job.ids)], self.cache)
        if job.score_prompt or not self.cached:
            hidden = self.model.hidden(ids)[0][0]
            last = hidden if job.score_prompt else hidden[-1:]
        return self.head(last).float().cpu()

    def step(self, jobs, before):
        (job,) = jobs
        device = self.model.head_weight.device
        before()
        if self.cached:
            last = self.model.read(torch.tensor([job.new[-1:]], device=device), [1], self.cache)
        else:
            last = self.model.hidden(torch.tensor([job.ids + job.new], device=device))[0][:, -1]
        return self.head(last).float().cpu()


class Slots:
    """A model and its static cache, a row for each running answer.

    What a row computes is a function of its own tokens alone. A prompt is read by itself in chunks that begin
    at multiples of CHUNK: a chunk has the same shapes whoever else is there, and whole chunks can be copied
    from an earlier prompt that begins alike. A step of all rows together keeps to numbers of rows and columns
    for which `calibrate` has seen that every row gets the same bits; where there are none, rows go singly.
    The cache has as many columns as the longest row needs, in steps: products read it without a copy.
    """

    def __init__(self, model, rows, context, chunk=64, kept=32_768, exact=True):
        self.model, self.rows, self.chunk, self.room = model, rows, chunk, kept // chunk
        self.head = getattr(model, "fixed_head", None) or (lambda x: x @ model.head_weight.T)
        self.most, self.least, self.cache = -(-context // 256) * 256, 256, None
        self.held = [0] * rows                                 # columns in use; idle rows write behind them
        self.resize(256)
        self.blocks = collections.OrderedDict()                # chunks that were read, the latest used last
        self.widths = [2**i for i in range(rows.bit_length()) if 2**i < rows] + [rows]
        if exact and model.sizes["n_experts"]:                 # who goes to an expert depends on everyone
            self.widths = []
        elif exact:
            with torch.inference_mode():
                self.calibrate()

    def resize(self, columns):
        """Give the cache room for so many columns."""
        self.length = min(self.most, -(-max(self.least, columns) // 256) * 256)
        before, self.cache = self.cache, common.Cache(self.model, self.rows, self.length)
        for old, new in zip(before.layers if before else (), self.cache.layers, strict=False):
            for name, x in old.items():
                n = min(x.shape[2], self.length)
                new[name][:, :, :n] = x[:, :, :n]

    def free(self, slot):
        """The slot's job has ended; much less room is given back."""
        self.held[slot] = 0
        if max(self.held) + 1 <= self.length // 4:
            self.resize(max(self.held) + 1)

    def tensor(self, ids):
        return torch.tensor(ids, device=self.model.head_weight.device)

    def key(self, ids):
        """A digest of all tokens up to the end of a chunk: what its keys and values depend on."""
        return hashlib.sha256(array.array("q", ids).tobytes()).digest()

    def reuse(self, job):
        """Copy the next chunks of the job's prompt if they have been read before; its last token is always
        read."""
        while not job.score_prompt and (end := job.read + self.chunk) < len(job.ids):
            block = self.blocks.get(key := self.key(job.ids[:end]))
            if block is None:
                return
            self.blocks.move_to_end(key)
            self.grow(end + 1)
            for memory, (k, v) in zip(self.cache.layers, block, strict=True):
                memory["k"][job.slot, :, job.read:end], memory["v"][job.slot, :, job.read:end] = k, v
            job.read = self.held[job.slot] = end

    def grow(self, columns):
        if columns > self.length:
            self.resize(max(columns, self.length * 5 // 4))

    def read(self, job):
        """Read the next chunk of the job's prompt: logits (1, V) after it, or (T, V) of all if they are
        scored."""
        begin, end = job.read, min(len(job.ids), job.read + self.chunk)
        self.grow(end + 1)
        row = self.cache.rows(job.slot, job.slot + 1)
        row.lengths = [begin]
        hidden = self.model.read(self.tensor([job.ids[begin:end]]), [end - begin], row, each=job.score_prompt)
        if end - begin == self.chunk and self.room:
            self.blocks[self.key(job.ids[:end])] = torch.stack([
                torch.stack([memory["k"][job.slot, :, begin:end], memory["v"][job.slot, :, begin:end]])
                for memory in self.cache.layers])              # (layers, 2, G, CHUNK, E)
            while len(self.blocks) > self.room:
                self.blocks.popitem(last=False)
        job.read = self.held[job.slot] = end
        return self.head(hidden.flatten(0, -2)).float().cpu()

    def step(self, jobs, before):
        """Read the last new token of every job: logits (jobs, V). `before` is called when the model is about
        to work, with Python's lock free for other threads."""
        for job in jobs:
            self.held[job.slot] = len(job.ids) + len(job.new) - 1
        self.grow(max(self.held[job.slot] for job in jobs) + 1)
        return self.decode([job.slot for job in jobs], [job.new[-1] for job in jobs], before)

    def decode(self, slots, tokens, before=lambda: None):
        if not self.widths:
            return torch.cat([self.part(slot, slot + 1, [slot], [token], before)
                              for slot, token in zip(slots, tokens, strict=True)])
        width = self.widths[bisect.bisect_left(self.widths, max(slots) + 1)]
        return self.part(0, width, slots, tokens, before)

    def part(self, begin, end, slots, tokens, before):
        """`decode` with rows begin to end of the cache; those that are not in `slots` write where nobody
        reads."""
        ids, rows = [[0] for _ in range(end - begin)], self.cache.rows(begin, end)
        rows.lengths = self.held[begin:end]
        for slot, token in zip(slots, tokens, strict=True):
            ids[slot - begin] = [token]
        columns = max(self.least, *(self.held[slot] + 1 for slot in slots))
        columns = min(self.length, -(-columns // 256) * 256)
        ids = self.tensor(ids)
        before()
        hidden = self.model.read(ids, [1] * (end - begin), rows, width=columns)
        logits, wanted = self.head(hidden), [slot - begin for slot in slots]
        return (logits if wanted == list(range(end - begin)) else logits[wanted]).float().cpu()

    def calibrate(self):
        """Keep the widths at which every row has the bits that it has at the greatest, at each place and with
        any neighbours: some products sum in another order for one to three rows than for more."""
        generator, every = torch.Generator().manual_seed(0), list(range(self.rows))
        held = [200 - i % 9 for i in every]
        tokens = torch.randint(len(self.model.head_weight), (self.rows,), generator=generator).tolist()
        for memory in self.cache.layers:
            for x in memory.values():
                x.copy_(torch.randn(x.shape, generator=generator))

        def logits(slots, turned):                             # row i stands in slot (i + turned) % rows
            self.held = [held[slot - turned] if slot in slots else 250 for slot in every]
            return self.decode(slots, [tokens[slot - turned] for slot in slots])

        def same(slots, turned=0):
            return torch.equal(logits(slots, turned), whole[[slot - turned for slot in slots]])
        candidates, self.widths = self.widths, self.widths[-1:]
        whole = logits(every, 0)
        self.least = self.most
        self.resize(self.most)
        if same(every):
            self.least = 256
            self.resize(256)
        whole, usable = logits(every, 0), set(candidates)
        for turned in (0, 1):
            for memory in self.cache.layers if turned else ():
                for x in memory.values():
                    x.copy_(x.roll(1, 0))
            for width in list(usable):
                self.widths = [width]
                if not all(same(slots, turned) for slots in (every[:width], every[:width:2], [width - 1])):
                    usable.remove(width)
        self.widths, self.held = sorted(usable) if self.rows in usable else [], [0] * self.rows

    def move(self, job, slot):
        """Take the job to another slot."""
        self.held[slot], n = self.held[job.slot], self.held[job.slot] + 1
        for memory in self.cache.layers:
            for x in memory.values():
                x[slot, :, :n] = x[job.slot, :, :n]
        job.slot, before = slot, job.slot
        self.free(before)


class Full(Exception):
    """The queue has no room."""


class Engine:
    """Answers jobs in a thread of its own. `post` is called there after each turn with [(job, Piece)]."""

    def __init__(self, model, codec, rows, context, chunk, kept, exact, queue, seconds, post):
        single = not isinstance(model, common.LM) or model.sizes["attention"] == "nsa"
        self.slots = Single(model) if single else Slots(model, rows, context, chunk, kept, exact)
        self.codec, self.context, self.queue, self.seconds, self.post = codec, context, queue, seconds, post
        self.waiting, self.active, self.outbox = collections.deque(), [], []
        self.ready, self.deadline, self.turns = threading.Condition(), math.inf, 0
        self.closing = False
        self.count = collections.Counter()
        self.waits = {"first_token": Histogram(), "answer": Histogram()}
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, jobs):
        """Queue the jobs together; raises Full when there is no room for all of them."""
        with self.ready:
            free = self.slots.rows - len(self.active)
            if self.closing or len(self.waiting) + len(jobs) > self.queue + free:
                raise Full
            self.waiting.extend(jobs)
            self.ready.notify()

    def cancel(self, jobs):
        """Nobody listens any more: the slots are free at the next token."""
        for job in jobs:
            job.cancelled = True

    def close(self, seconds=0.0):
        """Take no more jobs; those that run may go on for so many seconds."""
        with self.ready:
            self.closing, self.deadline = True, time.perf_counter() + seconds
            self.ready.notify()

    @torch.inference_mode()
    def run(self):
        while True:
            with self.ready:
                self.ready.wait_for(lambda: self.waiting or self.active or self.closing)
                if self.closing and not self.waiting and not self.active:
                    return
            try:
                with self.ready:
                    self.admit()
                self.turn()
            except Exception:  # out of memory, a broken device: these answers end, the server goes on
                traceback.print_exc()
                for job in list(self.active):
                    self.end(job, "error", error="the model failed on this request")
            if not self.active:                                # else while the model works next
                self.flush()

    def flush(self):
        """Pass on what the answers have gained."""
        outbox, self.outbox = self.outbox, []
        if outbox:
            self.post(outbox)

    def admit(self):
        """Jobs whose time is over leave, waiting ones take the lowest free slots."""
        now, late = time.perf_counter(), time.perf_counter() > self.deadline
        for job in [*self.active, *self.waiting]:
            if job.cancelled:
                self.end(job, "cancelled")
            elif late or self.closing and job.slot < 0:
                self.end(job, "error", error="the server is shutting down")
            elif now - job.begin > self.seconds:
                self.end(job, "length")
        taken = {job.slot for job in self.active}
        free = [slot for slot in range(self.slots.rows) if slot not in taken]
        while self.waiting and free:
            job = self.waiting.popleft()
            job.slot = free.pop(0)
            self.active.append(job)
        if self.slots.rows > 1 and free and free[0] < len(self.active):  # few rows are quicker than many
            last = max(self.active, key=lambda job: job.slot)
            if last.slot > free[0]:
                self.slots.move(last, free[0])

    def turn(self):
        """Read a chunk of one prompt, and of two that have come meanwhile if one chunk is all that they need;
        then a step of every answer that runs."""
        self.turns += 1
        self.read(oldest=self.turns % 8 == 0)
        for _ in range(2):
            with self.ready:
                self.admit()
            if not self.read(longest=self.slots.chunk):
                break
        running = [job for job in self.active if job.new and not job.cancelled]
        if running:
            self.extend(running, self.slots.step(running, self.flush))

    def read(self, oldest=False, longest=math.inf):
        """Read a chunk of the prompt with the shortest rest, now and then of the oldest, so that none waits
        for ever; False if there is none."""
        reading = [job for job in self.active if 0 < len(job.ids) - job.read <= longest]
        if not reading:
            return False
        job = reading[0] if oldest else min(reading, key=lambda j: len(j.ids) - j.read)
        before = job.read
        self.slots.reuse(job)
        begin = job.read
        job.reused += begin - before
        self.count["prompt_tokens_reused"] += begin - before
        self.flush()
        logits = self.slots.read(job)
        self.count["prompt_tokens"] += job.read - before
        if job.score_prompt:
            self.score_prompt(job, begin, logits)
        if job.read == len(job.ids):
            self.waits["first_token"].add(time.perf_counter() - job.begin)
            if job.max_tokens:
                self.extend([job], logits[-1:])
            else:
                self.end(job, "length")
        return True

    def extend(self, jobs, logits):
        """Choose a token for each job by its row of logits, and pass on what is certain."""
        raw = logits if any(job.top >= 0 for job in jobs) else None
        if any(job.bias or job.presence or job.frequency for job in jobs):
            logits = logits.clone()
            for row, job in zip(logits, jobs, strict=True):
                change = dict(job.bias)
                for token, n in job.counts.items():
                    change[token] = change.get(token, 0.0) - job.presence - job.frequency * n
                if change:
                    row[torch.tensor(list(change), device=row.device)] += torch.tensor(
                        list(change.values()), device=row.device)
        kinds = collections.defaultdict(list)
        for row, job in enumerate(jobs):
            kinds[job.temperature, job.top_k, job.top_p].append(row)
        for (temperature, top_k, top_p), rows in kinds.items():
            part = logits if len(rows) == len(jobs) else logits[rows]
            generators = [jobs[row].generator for row in rows]
            chosen = common.choose(part, temperature, top_k, top_p, generators).tolist()
            for row, token in zip(rows, chosen, strict=True):
                if jobs[row].top >= 0 and token != self.codec.end:
                    jobs[row].scores.append(self.score(raw[row], token, jobs[row].top))
                self.add(jobs[row], token)

    def add(self, job, token):
        job.new.append(token)
        job.counts[token] += 1
        self.count["generated_tokens"] += 1
        over = len(job.new) >= job.max_tokens or len(job.ids) + len(job.new) >= self.context
        if token == self.codec.end:
            return self.end(job, "stop")
        text = job.stream.feed(token)
        if job.stream.ended:
            return self.end(job, "stop", text)
        if over:
            return self.end(job, "length", text)
        if text:
            self.outbox.append((job, Piece(text, job.scores)))
            job.scores = []

    def score(self, logits, token, top):
        """(token, its log-probability, [(token, log-probability)] of the likeliest)."""
        values = logits.log_softmax(-1)
        best, index = values.topk(min(top, len(values)))
        return token, values[token].item(), list(zip(index.tolist(), best.tolist(), strict=True))

    def score_prompt(self, job, begin, logits):
        if begin == 0:
            job.scores.append((job.ids[0], None, []))
        for token, row in zip(job.ids[begin + 1:job.read + 1], logits, strict=False):
            job.scores.append(self.score(row, token, job.top))

    def end(self, job, finish, text="", error=""):
        """Free the job's slot; the asker gets the rest of the text and the reason."""
        if job in self.active:
            self.active.remove(job)
            self.slots.free(job.slot)
        else:
            self.waiting.remove(job)
        if finish in ("length", "stop") and not job.stream.ended:
            text += job.stream.finish()
            finish = "stop" if job.stream.ended else finish
        self.count["answers_" + finish] += 1
        self.waits["answer"].add(time.perf_counter() - job.begin)
        self.outbox.append((job, Piece(text, job.scores, finish, error)))


class Histogram:
    """Seconds, counted as Prometheus wants them."""
    BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)

    def __init__(self):
        self.counts, self.total = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, seconds):
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name):
        """Cumulative buckets, sum and count in the text format of Prometheus."""
        counts = list(itertools.accumulate(self.counts))
        for bound, n in zip((*self.BOUNDS, "+Inf"), counts, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {counts[-1]}"


# The API: what a request may hold, as JSON schemas. They are checked, and they are the OpenAPI description.

def number(low, high, kind="number"):
    return {"type": [kind, "null"], "minimum": low, "maximum": high}


TEXT, FLAG, ANY = {"type": "string"}, {"type": ["boolean", "null"]}, {}
LIST_OF_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
SAMPLING = {
    "model": TEXT,
    "max_tokens": number(1, 2**31, "integer"),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": number(0, 2**31, "integer"),                      # not OpenAI's; 0 = all
    "n": number(1, 128, "integer"),
    "stop": {"anyOf": [{"type": ["string", "null"], "minLength": 1, "maxLength": 256}, {
        "type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 256}, "maxItems": 4}]},
    "seed": number(-2**63, 2**63 - 1, "integer"),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {
        "type": "number", "minimum": -100, "maximum": 100}},
    "stream": FLAG,
    "stream_options": {"type": ["object", "null"], "additionalProperties": False, "properties": {
        "include_usage": FLAG, "include_obfuscation": FLAG}},
    "user": ANY, "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,  # these change no answer
    "service_tier": ANY, "store": {"enum": [None, False]},
}
TURN = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["type", "text"], "additionalProperties": False,
            "properties": {"type": {"enum": ["text"]}, "text": TEXT}}}]},
    },
}
CHAT = {"type": "object", "required": ["model", "messages"], "properties": {
    **SAMPLING,
    "messages": {"type": "array", "minItems": 1, "items": TURN},
    "max_completion_tokens": number(1, 2**31, "integer"),
    "logprobs": FLAG,
    "top_logprobs": number(0, 20, "integer"),
}}
COMPLETION = {"type": "object", "required": ["model", "prompt"], "properties": {
    **SAMPLING,
    "prompt": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}, LIST_OF_TOKENS,
                         {"type": "array", "items": LIST_OF_TOKENS, "minItems": 1}]},
    "max_tokens": number(0, 2**31, "integer"),
    "echo": FLAG,
    "logprobs": number(0, 20, "integer"),
}}
NOT_SUPPORTED = {  # fields of OpenAI's, each with the values that ask for nothing
    "tools": ([],), "tool_choice": ("none",), "parallel_tool_calls": (), "functions": ([],),
    "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",), "verbosity": (),
    "suffix": ("",), "best_of": (1,), "images": (), "moderation": (), "prompt_cache_retention": (),
    "tool_calls": ([],), "tool_call_id": (), "name": (), "refusal": (), "annotations": ([],),
}
TYPES = {"string": str, "boolean": bool, "integer": int, "number": int | float, "array": list, "object": dict,
         "null": type(None)}


class Refused(Exception):
    """A request that is answered with an error of OpenAI's shape."""

    def __init__(self, message, param=None, code=None, status=400, kind="invalid_request_error",
                 headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def check(value, schema, at=""):
    """Raise Refused, with the place, unless the value is what the schema says."""
    if not schema:                                             # anything
        return
    def refuse(message, code="invalid_value"):
        raise Refused(f"Invalid '{at or 'body'}': {message}", at or None, code)
    if "anyOf" in schema:
        errors = []
        for option in schema["anyOf"]:
            try:
                return check(value, option, at)
            except Refused as error:
                errors.append(error)
        raise max(errors, key=lambda e: len(e.body["error"]["param"] or ""))  # of what fits furthest
    if "enum" in schema and not any(type(value) is type(x) and value == x for x in schema["enum"]):
        theirs = at.endswith(".role") and value in ("tool", "function") or at.endswith("].type")
        known = ", ".join(json.dumps(known) for known in schema["enum"])
        refuse(f"{json.dumps(value)[:80]} is not " + ("supported" if theirs else f"one of {known}"))
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
                         for kind in kinds):
        refuse(f"expected {' or '.join(kinds)}, got {json.dumps(value)[:80]}", "invalid_type")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:                                   # NaN, too
            refuse(f"{json.dumps(value)[:40]} is not between {low} and {high}")
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            refuse(f"a string of {len(value)} characters; {schema.get('minLength', 0)} to "
                   f"{schema.get('maxLength')} are allowed")
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            refuse(f"an array of {len(value)}; at least {schema.get('minItems', 0)}, at most "
                   f"{schema.get('maxItems', 'any number')} are allowed")
        for i, item in enumerate(value):
            check(item, schema["items"], f"{at}[{i}]")
    elif isinstance(value, dict):
        known, dot = schema.get("properties", {}), at and at + "."
        for name in schema.get("required", ()):
            if name == "text" and isinstance(value.get("type"), str):  # an image has none: say what it is
                check(value["type"], known["type"], dot + "type")
            if value.get(name) is None:
                raise Refused(f"Missing required parameter: '{dot}{name}'", dot + name,
                              "missing_required_parameter")
        for name, item in value.items():
            if name in known:
                check(item, known[name], dot + name)
            elif name in NOT_SUPPORTED:
                if item is not None and item not in NOT_SUPPORTED[name]:
                    raise Refused(f"'{dot}{name}' is not supported by this server", dot + name,
                                  "unsupported_parameter")
            elif isinstance(schema.get("additionalProperties"), dict):
                check(item, schema["additionalProperties"], dot + name[:80])
            else:
                raise Refused(f"Unknown parameter: '{dot}{name[:80]}'", dot + name[:80], "unknown_parameter")


def parse(body):
    """A request's JSON object. Raises Refused."""
    def constant(name):
        raise ValueError(f"{name} is not JSON")
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=constant)
        json.dumps(found, ensure_ascii=False).encode("utf-8")            # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise Refused(f"The body is not valid JSON: {why}") from None
    if not isinstance(found, dict):
        raise Refused(f"The body must be a JSON object, got {json.dumps(found)[:80]}")
    return found


class Asked:
    """A checked request to /v1/chat/completions or /v1/completions: its jobs, and what their answer looks
    like."""

    def __init__(self, body, chat, server):
        check(body, CHAT if chat else COMPLETION)
        self.body, self.chat, self.server = body, chat, server
        get = lambda name, default: default if body.get(name) is None else body[name]
        if body["model"] != server.name:
            raise Refused(f"The model '{body['model'][:80]}' does not exist; this server has '{server.name}'",
                          "model", "model_not_found", 404)
        self.n, self.stream, self.echo = get("n", 1), get("stream", False), get("echo", False)
        if self.n > MAX_N:
            raise Refused(f"Invalid 'n': {self.n} is more than this server's {MAX_N}", "n", "invalid_value")
        if body.get("stream_options") is not None and not self.stream:
            raise Refused("'stream_options' is only allowed with 'stream'", "stream_options", "invalid_value")
        self.usage = bool(get("stream_options", {}).get("include_usage"))
        if chat and body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise Refused("'top_logprobs' is only allowed with 'logprobs'", "top_logprobs", "invalid_value")
        self.top = get("logprobs", -1)
        if chat:
            self.top = get("top_logprobs", 0) if self.top is True else -1
        self.bias = {}
        for token, value in get("logit_bias", {}).items():
            if not re.fullmatch("[0-9]{1,9}", token) or int(token) >= server.vocab_size:
                raise Refused(f"Invalid 'logit_bias': {token[:40]!r} is not a token id below "
                              f"{server.vocab_size}", "logit_bias", "invalid_value")
            self.bias[int(token)] = float(value)
        stop = get("stop", [])
        self.stop = [stop] if isinstance(stop, str) else stop
        self.prompts = [self.encode_chat()] if chat else [self.encode(p) for p in self.texts()]
        if len(self.prompts) * self.n > SLOTS + QUEUE:
            raise Refused(f"{len(self.prompts)} prompts with n={self.n} are more than the {SLOTS + QUEUE} "
                          "answers that this server takes at once", "prompt", "invalid_value")
        limit = get("max_completion_tokens", get("max_tokens", (MAX_TOKENS or None) if chat else 16))
        for ids in self.prompts:
            self.fit(len(ids), 1 if limit is None else limit)
        self.limit, self.prompt_tokens = limit, sum(map(len, self.prompts))
        self.temperature = get("temperature", 1.0 if TEMPERATURE < 0 else TEMPERATURE)
        self.sampling = dict(
            temperature=0 if self.temperature < 1e-5 else float(self.temperature),
            top_k=get("top_k", TOP_K), top_p=max(float(get("top_p", TOP_P)), 1e-9),
            presence=float(get("presence_penalty", 0)), frequency=float(get("frequency_penalty", 0)))
        self.seed = get("seed", random.SystemRandom().randrange(2**62))
        self.id = ("chatcmpl-" if chat else "cmpl-") + random.SystemRandom().randbytes(12).hex()
        self.created, self.offsets, self.around = int(time.time()), collections.Counter(), {}

    def texts(self):
        """The prompts of a completion: strings or lists of token ids."""
        prompt = self.body["prompt"]
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    def fit(self, size, new):
        """Raise Refused unless a prompt of so many tokens and `new` more fit the context."""
        context, where = self.server.engine.context, "messages" if self.chat else "prompt"
        if size + new > context:
            raise Refused(f"This model's maximum context length is {context} tokens. However, you requested "
                          f"{size + new} tokens ({size} in the {where}, {new} in the completion).",
                          where, "context_length_exceeded")

    def encode(self, prompt):
        codec = self.server.codec
        if isinstance(prompt, list):
            if max(prompt) >= self.server.vocab_size:
                raise Refused(f"Invalid 'prompt': {str(max(prompt))[:40]} is not a token id below "
                              f"{self.server.vocab_size}", "prompt", "invalid_value")
            return prompt
        self.fit(-(-len(prompt.encode()) // self.server.longest), 0)           # before the work of tokenizing
        return self.some(codec.encode(prompt), "prompt")

    def some(self, ids, param):
        if not ids:
            raise Refused(f"Invalid '{param}': a byte model has no token to begin with; give some text",
                          param, "invalid_value")
        return ids

    def encode_chat(self):
        turns = []
        for message in self.body["messages"]:
            role = "system" if message["role"] == "developer" else message["role"]
            content = message["content"]
            content = content if isinstance(content, str) else "".join(part["text"] for part in content)
            turns.append({"role": role, "content": content})
        size = sum(len(turn["content"].encode()) for turn in turns)
        self.fit(-(-size // self.server.longest), 0)
        return self.some(self.server.codec.chat(turns), "messages")

    def jobs(self, inbox):
        made = []
        for ids in self.prompts:
            for _ in range(self.n):
                i = len(made)
                limit = self.server.engine.context - len(ids) if self.limit is None else self.limit
                made.append(Job(
                    ids, limit, common.TextStream(self.server.codec.table, self.stop),
                    seed=(self.seed + i) % 2**63, top=self.top, bias=self.bias, index=i, inbox=inbox,
                    score_prompt=self.echo and self.top >= 0, **self.sampling))
        return made

    # Answers

    def token(self, token):
        raw = self.server.codec.table[token]
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}

    def plain(self, token):
        """A token as /v1/completions names it; one that is part of a character by its bytes."""
        raw = self.server.codec.table[token]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def scores(self, index, scores):
        """Log-probabilities in OpenAI's two shapes."""
        if self.top < 0:
            return None
        if self.chat:
            return {"refusal": None, "content": [
                {**self.token(token), "logprob": value, "top_logprobs": [
                    {**self.token(t), "logprob": v} for t, v in best]} for token, value, best in scores]}
        offsets = []
        for token, _, _ in scores:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(self.plain(token))
        named = [dict([(self.plain(t), v) for t, v in reversed(best)] + [(self.plain(token), value)])
                 if value is not None else None for token, value, best in scores]
        return {"tokens": [self.plain(token) for token, _, _ in scores],
                "token_logprobs": [value for _, value, _ in scores],
                "top_logprobs": named if self.top else None, "text_offset": offsets}

    def about(self, kind):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.name,
                "system_fingerprint": self.server.fingerprint}

    def counted(self, jobs):
        new = sum(len(job.new) for job in jobs)
        reused = sum(job.reused for job in jobs)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new,
                "total_tokens": self.prompt_tokens + new, "prompt_tokens_details": {"cached_tokens": reused}}

    def prompt_text(self, index):
        """What `echo` puts before an answer."""
        prompt = self.texts()[index // self.n]
        return prompt if isinstance(prompt, str) else self.server.codec.decode(prompt)

    def whole(self, jobs, texts, scores, ends):
        """The body of an answer that is not streamed."""
        choices = []
        for i in range(len(jobs)):
            choice = {"index": i, "finish_reason": ends[i], "logprobs": self.scores(i, scores[i])}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": texts[i], "refusal": None}
            else:
                choice["text"] = (self.prompt_text(i) if self.echo else "") + texts[i]
            choices.append(choice)
        return {**self.about("chat.completion" if self.chat else "text_completion"), "choices": choices,
                "usage": self.counted(jobs)}

    def event(self, index, content, finish=None, scores=None):
        """One event of an answer, as bytes."""
        choice = {"index": index, "finish_reason": finish, "logprobs": scores}
        choice["delta" if self.chat else "text"] = content
        return event_of({**self.about("chat.completion.chunk" if self.chat else "text_completion"),
                         "choices": [choice], **({"usage": None} if self.usage else {})})

    def begin(self, index):
        """The events before the first piece of an answer."""
        if self.chat:
            return self.event(index, {"role": "assistant", "content": ""})
        return self.event(index, self.prompt_text(index)) if self.echo else b""

    def events(self, index, piece):
        """The events of a piece of an answer. All but the text is the same in most, and made once."""
        found = b""
        if piece.scores:
            found = self.event(index, {"content": piece.text} if self.chat else piece.text, None,
                               self.scores(index, piece.scores))
        elif piece.text:
            if index not in self.around:
                mark = "\0"                                    # is in no name
                self.around[index] = self.event(index, {"content": mark} if self.chat else mark).split(
                    json.dumps(mark).encode())
            before, after = self.around[index]
            found = before + json.dumps(piece.text, ensure_ascii=False).encode() + after
        return found + self.event(index, {} if self.chat else "", piece.finish) if piece.finish else found


def event_of(value):
    """A JSON value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


# The server.

class Server:
    """What the routes share: the engine and its model's names, the page, and counters."""

    def __init__(self):
        model, tokenizer, path = load()
        common.within(1, 1024, SLOTS=SLOTS, MAX_N=MAX_N)
        common.within(16, 65_536, CHUNK=CHUNK)
        common.within(0, 1e9, QUEUE=QUEUE, PREFIX_TOKENS=PREFIX_TOKENS, CONTEXT=CONTEXT)
        self.codec, self.vocab_size = Codec(tokenizer), model.head_weight.shape[0]
        if len(self.codec.table) > self.vocab_size:
            raise common.BadInput(f"the tokenizer beside {path} has {len(self.codec.table)} tokens, the "
                                  f"model {self.vocab_size}")
        self.codec.table += [b""] * (self.vocab_size - len(self.codec.table))
        self.longest = max(map(len, self.codec.table))
        self.name = path.parent.name + (f"+{Path(ADAPTER).name}" if ADAPTER else "")
        dtype = str(model.head_weight.dtype)[6:] + " int8" * (DTYPE == "int8")
        about = f"{path.stat().st_size} {path.stat().st_mtime} {ADAPTER} {YARN} {dtype} {torch.__version__}"
        self.fingerprint = "fp_" + hashlib.sha256(about.encode()).hexdigest()[:12]
        self.created, self.path = int(path.stat().st_mtime), path
        context = min(model.context, CONTEXT or 8192)
        self.engine = Engine(model, self.codec, SLOTS, context, CHUNK, PREFIX_TOKENS, EXACT, QUEUE,
                             REQUEST_SECONDS, self.post)
        self.loop, self.requests = None, collections.Counter()
        self.page = (Path(__file__).parent / "chat.html").read_bytes()
        hashes = {name: " ".join(
            "'sha256-" + base64.b64encode(hashlib.sha256(text).digest()).decode() + "'"
            for text in re.findall(f"<{name}>(.*?)</{name}>".encode(), self.page, re.S))
            for name in ("script", "style")}
        self.policy = (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
                       "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                       "frame-ancestors 'none'")

    def post(self, outbox):
        """From the engine's thread into the event loop, all pieces of a turn at once."""
        def deliver():
            for job, piece in outbox:
                job.inbox.put((job, piece))
        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody waits
            pass

    def metrics(self):
        """The state of the server in Prometheus's text format."""
        engine, lines = self.engine, []

        def add(name, kind, help_, *values):
            lines.extend([f"# HELP nanosparse_{name} {help_}", f"# TYPE nanosparse_{name} {kind}"])
            lines.extend(f"nanosparse_{name}{labels} {value}" for labels, value in values)
        add("requests_total", "counter", "HTTP requests by path and status.",
            *((f'{{path="{path}",status="{status}"}}', n) for (path, status), n in self.requests.items()))
        add("answers_total", "counter", "Answers by how they ended.",
            *((f'{{finish="{k}"}}', engine.count["answers_" + k])
              for k in ("stop", "length", "error", "cancelled")))
        for name, help_ in (("prompt_tokens", "Tokens of prompts."), ("generated_tokens", "New tokens."),
                            ("prompt_tokens_reused", "Tokens of prompts that were in the cache.")):
            add(name + "_total", "counter", help_, ("", engine.count[name]))
        add("slots", "gauge", "Answers that can be written at once.", ("", engine.slots.rows))
        add("slots_busy", "gauge", "Answers being written.", ("", len(engine.active)))
        add("queue_length", "gauge", "Answers that wait for a slot.", ("", len(engine.waiting)))
        for name, help_ in (("first_token", "Seconds until the prompt was read."),
                            ("answer", "Seconds until the answer ended.")):
            add(name + "_seconds", "histogram", help_)
            lines.extend(engine.waits[name].lines(f"nanosparse_{name}_seconds"))
        return "\n".join(lines) + "\n"

    def log(self, text):
        print(time.strftime("%H:%M:%S ") + text, file=sys.stderr, flush=True)


class Gone(Exception):
    """The client has left."""


class Inbox:
    """What the engine has made for one request and nobody has taken."""

    def __init__(self):
        self.items, self.waiter = [], None

    def put(self, item):
        self.items.append(item)
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self):
        """All that is there, at least one."""
        if not self.items:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        items, self.items = self.items, []
        return items


async def pieces(request, engine, jobs, inbox):
    """Lists of (job, Piece), all that have come, until all jobs have ended. When the client leaves, the jobs
    are cancelled."""
    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(jobs)
        inbox.put((None, None))
    watcher, left = asyncio.create_task(watch()), len(jobs)
    try:
        while left:
            found = await inbox.get()
            if any(job is None for job, _ in found):
                raise Gone
            left -= sum(bool(piece.finish) for _, piece in found)
            yield found
    finally:
        watcher.cancel()
        engine.cancel(jobs)


def guard(app, server, key):
    """The application behind what every request must pass: a known host name, the API key, a line of log."""
    open_paths = ("/", "/health", "/favicon.ico")
    counted = (*open_paths, "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions",
               "/v1/completions")

    async def inner(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begin, status, headers = time.perf_counter(), 0, dict(scope["headers"])
        cross = CORS and headers.get(b"origin", b"").decode("latin-1") == CORS

        async def sending(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                if CORS:
                    more.append((b"vary", b"origin"))
                if cross:
                    more += [(b"access-control-allow-origin", CORS.encode()),
                             (b"access-control-allow-headers", b"authorization, content-type"),
                             (b"access-control-allow-methods", b"GET, POST")]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        async def refuse(error):
            await answer_error(error)(scope, receive, sending)
        scope["send"], path = sending, scope["path"]
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
        try:
            if cross and scope["method"] == "OPTIONS":
                await sending({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            elif not key and host not in ("localhost", "127.0.0.1", "::1", HOST.lower()):
                # a page elsewhere whose name was pointed at this machine (DNS rebinding)
                await refuse(Refused(f"The host {host[:80]!r} is not this server", status=403))
            elif key and path not in open_paths and not hmac.compare_digest(
                    headers.get(b"authorization", b""), b"Bearer " + key.encode()):
                await refuse(Refused("Incorrect API key provided: send it as 'Authorization: Bearer ...'",
                                     code="invalid_api_key", status=401))
            else:
                await app(scope, receive, sending)
        finally:
            name = path if path in counted else "/v1/models/{id}" if path[:11] == "/v1/models/" else "other"
            server.requests[name, status] += 1
            if path != "/health":
                server.log(f"{scope['method']} {name} {status or 'client left'} "
                           f"{(time.perf_counter() - begin) * 1000:.0f} ms")
    return inner


def answer_error(error):
    from fastapi.responses import JSONResponse
    return JSONResponse(error.body, error.status, error.headers)


async def body_of(request):
    """The bytes of a request's body. Raises Refused when it is too large, slow, or not JSON by its type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(f"Content-Type must be application/json, got {kind[:80]!r}", status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise Refused(f"The body is larger than {MAX_BODY} bytes", status=413)
                parts.append(part)
    except TimeoutError:
        raise Refused(f"The body did not arrive within {BODY_SECONDS} seconds", status=408) from None
    return b"".join(parts)


def application(server, key):
    """The FastAPI application."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    app, engine = FastAPI(title="nanosparse", docs_url=None, redoc_url=None), server.engine

    class Events(Response):
        """Server-sent events from an asynchronous iterator of bytes. If that fails, the last event is the
        error; otherwise it is [DONE]."""

        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        async def __call__(self, scope, receive, send):
            send = scope["send"]                               # past the layers between, each token
            async def body(part):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no")]})
            try:
                async with asyncio.timeout(REQUEST_SECONDS + 30):  # a client that does not read is let go
                    try:
                        async for part in self.parts:
                            await body(part)
                        await body(b"data: [DONE]\n\n")
                    except Refused as error:
                        await body(event_of(error.body))
            except (Gone, TimeoutError):
                return
            finally:
                await self.parts.aclose()
            await send({"type": "http.response.body", "body": b""})

    async def answer(request, chat):
        body = parse(await body_of(request))
        asked = await asyncio.to_thread(Asked, body, chat, server)     # tokenizing may take a while
        inbox = Inbox()
        jobs = asked.jobs(inbox)
        try:
            engine.submit(jobs)
        except Full:
            if engine.closing:
                raise Refused("The server is shutting down", status=503, kind="server_error") from None
            wait = str(1 + len(engine.waiting) // engine.slots.rows)
            raise Refused("Too many answers are waiting; try again later", code="rate_limit_exceeded",
                          status=429, kind="requests", headers={"Retry-After": wait}) from None
        if LOG_PROMPTS:
            server.log("prompt " + json.dumps([server.codec.decode(ids) for ids in asked.prompts],
                                              ensure_ascii=False))
        found = pieces(request, engine, jobs, inbox)
        if asked.stream:
            return Events(events(asked, jobs, found))
        texts, scores, ends = [""] * len(jobs), [[] for _ in jobs], [""] * len(jobs)
        try:
            async for job, piece in (item async for items in found for item in items):
                if piece.error:
                    raise Refused(piece.error, status=500, kind="server_error")
                texts[job.index] += piece.text
                scores[job.index] += piece.scores
                ends[job.index] = piece.finish
        except Gone:
            return Response(status_code=499)
        finally:
            await found.aclose()
        if LOG_PROMPTS:
            server.log("answer " + json.dumps(texts, ensure_ascii=False))
        return JSONResponse(asked.whole(jobs, texts, scores, ends))

    async def events(asked, jobs, found):
        if begin := b"".join(asked.begin(job.index) for job in jobs):
            yield begin
        try:
            async for items in found:
                parts = []
                for job, piece in items:
                    if piece.error:
                        yield b"".join(parts)
                        raise Refused(piece.error, kind="server_error")
                    parts.append(asked.events(job.index, piece))
                    if LOG_PROMPTS:
                        server.log(f"answer {job.index} {json.dumps(piece.text, ensure_ascii=False)}")
                yield b"".join(parts)
        finally:
            await found.aclose()
        if asked.usage:
            yield event_of({**asked.about("chat.completion.chunk" if asked.chat else "text_completion"),
                            "choices": [], "usage": asked.counted(jobs)})

    def described(schema):
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post("/v1/chat/completions", openapi_extra=described(CHAT))
    async def chat_completions(request: Request):
        return await answer(request, True)

    @app.post("/v1/completions", openapi_extra=described(COMPLETION))
    async def completions(request: Request):
        return await answer(request, False)

    def about():
        return {"id": server.name, "object": "model", "created": server.created, "owned_by": "nanosparse",
                "max_model_len": engine.context}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [about()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name != server.name:
            raise Refused(f"The model '{name[:80]}' does not exist; this server has '{server.name}'", "model",
                          "model_not_found", 404)
        return about()

    @app.get("/health")
    async def health():
        alive = engine.thread.is_alive() and not engine.closing
        return JSONResponse({"status": "ok" if alive else "shutting down"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(server.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page():
        return Response(server.page, media_type="text/html; charset=utf-8",
                        headers={"Content-Security-Policy": server.policy, "Cache-Control": "no-cache"})

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon():
        return Response(status_code=204)

    @app.exception_handler(Refused)
    async def refused(request, error):
        return answer_error(error)

    @app.exception_handler(HTTPException)
    async def not_found(request, error):
        return answer_error(Refused(f"{error.detail}: {request.method} {request.url.path[:80]}",
                                    status=error.status_code, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def left(request, error):
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(request, error):
        return answer_error(Refused("The server failed on this request", status=500, kind="server_error"))
    return guard(app, server, key)


def serve():
    """Serve the API and the page until a signal."""
    try:
        import h11
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        raise common.BadInput("the server needs fastapi and uvicorn; run: pip install -r "
                              "requirements.txt") from None
    import ipaddress
    import socket
    key = API_KEY or os.environ.get("API_KEY", "")
    try:
        loopback = HOST == "localhost" or ipaddress.ip_address(HOST).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not key:
        raise common.BadInput(f"HOST={HOST} can be reached from other machines; set API_KEY, or "
                              "HOST=127.0.0.1")
    if key and not key.isascii():
        raise common.BadInput("API_KEY must be ASCII: it is sent in a header")
    common.within(0, 65_535, PORT=PORT)
    try:
        family = socket.AF_INET6 if ":" in HOST else socket.AF_INET
        listener = socket.create_server((HOST, PORT), family=family, backlog=1024)
    except OSError as error:
        raise common.BadInput(f"HOST={HOST} PORT={PORT} cannot be served ({error.strerror}); choose another "
                              "PORT") from None
    run = common.start(0, "auto" if DTYPE == "int8" else DTYPE)  # its choice of float32 products and threads
    common.stop(run)
    server = Server()

    class Uvicorn(uvicorn.Server):
        def handle_exit(self, number, frame):
            server.engine.close(SHUTDOWN_SECONDS)
            super().handle_exit(number, frame)

        async def startup(self, sockets=None):
            server.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            host = f"[{HOST}]" if ":" in HOST else HOST
            print(f"{server.path}: http://{host}:{listener.getsockname()[1]}", flush=True)
    class Http(H11Protocol):
        """Closes connections on which no whole head of a request comes in time; garbage is answered in JSON.
        """
        timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self.timer = self.loop.call_later(BODY_SECONDS, self.transport.close)

        def data_received(self, data):
            super().data_received(data)
            begun = self.conn.their_state is not h11.IDLE
            if begun and self.timer:
                self.timer.cancel()
                self.timer = None
            elif not begun and not self.timer and self.conn.trailing_data[0]:
                self.timer = self.loop.call_later(BODY_SECONDS, self.transport.close)

        def send_400_response(self, message):
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = json.dumps(Refused(message).body).encode()
                self.transport.write(
                    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            self.transport.close()
    config = uvicorn.Config(application(server, key), http=Http, log_level="warning", access_log=False,
                            lifespan="off", server_header=False,
                            timeout_graceful_shutdown=int(SHUTDOWN_SECONDS) + 5)
    sys.setswitchinterval(5e-4)  # the engine's thread should not wait long for the event loop's
    Uvicorn(config).run([listener])
    server.engine.close()
    server.engine.thread.join(10)


def main():
    if PROMPTS:
        return answer_all()
    prompt = PROMPT
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    return complete(prompt) if prompt else serve()


if __name__ == "__main__":
    common.cli(globals(), main)
