"""Every performance number in the README, each as a ratio against a baseline timed in the same run.

    python bench.py                 list the benchmarks
    python bench.py train           one table; also written to out/bench/train.json
    python bench.py train DATA=my.jsonl.gz REPEAT=5

The baseline ("twin") is the way such repos usually train: rows padded to full length, eager, float32, full
logits, AdamW unfused; its model is the same size and is written out below. Work alternates between baseline
and ours and the fastest of REPEAT is kept: these are shared machines.
"""

import contextlib
import copy
import datetime
import functools
import importlib
import itertools
import json
import math
import os
import platform
import queue
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import export
import serve
import train_distill
import train_dpo
import train_muon_dsa
import train_nsa_enwik8
import train_pretrain
import train_rag_bert
from data import (
    fit_muons,
    prepare_chats,
    prepare_python_docs,
    prepare_text,
    simulate_genotypes,
    simulate_muons,
)

DATA = ""            # text whose document lengths are used; "" = Python's documentation
REPEAT = 5           # timings of each; the fastest counts
MINUTES = 1.0        # of training per model and seed in `learn`; of streams in `endure`
REQUESTS = 10_000    # in `endure`
SEEDS = 3            # seeds in `learn`
COMPILE = True       # compile our layers where a C++ compiler is there
LENGTH = 512         # tokens a row
ROWS = 4             # rows a forward; both models are fastest with few
LONGEST = 16_384     # tokens in `nsa`; up to 65_536
KILLS = 4            # by SIGKILL of each script and number of processes in `faults`
CHECKPOINT = "out/muon"  # trained: by train_muon_dsa.py in `dsa`, a language model in `rounding`

BIG = dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, seq_len=512)  # 26M parameters at 6,400 tokens


class TwinLayer(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, hidden_dim):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.q, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim // n_heads * n_kv_heads, bias=False)
        self.v = nn.Linear(dim, dim // n_heads * n_kv_heads, bias=False)
        self.mlp, self.norm_attn, self.norm_mlp = (
            common.SwiGLU(dim, hidden_dim),
            nn.RMSNorm(dim),
            nn.RMSNorm(dim),
        )

    def heads(self, x, cos, sin):
        return common.rotate(x.unflatten(-1, (-1, cos.shape[-1] * 2)), cos, sin).transpose(1, 2)

    def forward(self, x, cos, sin, past=None):
        y = self.norm_attn(x)
        q, k = self.heads(self.q(y), cos, sin), self.heads(self.k(y), cos, sin)
        v = self.v(y).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Twin(nn.Module):
    """A plain Llama-like model of the same sizes: eager, full logits, a cache that grows by concatenation."""

    def __init__(self, vocab_size, dim, n_layers, n_heads, n_kv_heads, seq_len):
        super().__init__()
        hidden = -(-dim * 8 // 3 // 64) * 64
        self.embedding, self.norm = nn.Embedding(vocab_size, dim), nn.RMSNorm(dim)
        self.layers = nn.ModuleList(TwinLayer(dim, n_heads, n_kv_heads, hidden) for _ in range(n_layers))
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.register_buffer("rope", common.rope_table(dim // n_heads, seq_len))

    def logits(self, ids, caches=None, begin=0):
        cos, sin = self.rope[:, None, begin:begin + ids.shape[1]]
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[i] if caches else None)
        return self.head(self.norm(x))

    def forward(self, ids, docs, targets):
        loss = F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten(), ignore_index=common.IGNORE)
        return loss, (targets != common.IGNORE).sum(), loss.new_zeros(())


def as_shipped(work):
    """The work with float32 products where torch, as it ships, leaves them: for baselines."""
    def inner():
        setting = torch.backends.mkldnn.matmul
        ours, setting.fp32_precision = setting.fp32_precision, "none"
        try:
            return work()
        finally:
            setting.fp32_precision = ours
    return inner


def fastest(repeat, *works):
    """Seconds of the fastest of `repeat` runs of each work, taken in turns after one warm-up each."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for work in works:
        work()
    best = [math.inf] * len(works)
    for _ in range(repeat):
        for i, work in enumerate(works):
            wait()
            begin = time.perf_counter()
            work()
            wait()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


def row(work, baseline, ours, unit, ratio=None, **more):
    """A line of a table; `ratio` is how many times better ours is."""
    return {"work": work, "baseline": baseline, "ours": ours, "unit": unit,
            "ratio": ratio if ratio is not None else (ours / baseline if baseline else None), **more}


def our_model(vocab_size=6400, compile=True, seed=0, **changes):
    torch.manual_seed(seed)
    model = common.LM(vocab_size, **{**BIG, "seq_len": LENGTH, **changes})
    if compile and COMPILE:
        for layer in model.layers:
            layer.compile()
    return model


def trainer(run, model, optimizers, batch):
    """A function that does one update of `model` on `batch`, the way it trains for real."""
    def loss_of(b):
        loss, count, _ = model(*b)
        return loss, count
    return lambda: common.update(run, model, optimizers, micro_batches(batch), loss_of, 1.0, 0)


def micro_batches(batch):
    """The batch in parts of ROWS rows: both models are fastest with few."""
    return list(zip(*(part.split(ROWS) for part in batch), strict=True))


def twin_trainer(model, batch):
    """One update the usual way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        parts = micro_batches(batch)
        for part in parts:
            (model(*part)[0] / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return as_shipped(step)


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)]


def muon(model):
    return common.make_optimizers(model, train_pretrain.OPTIMIZER, train_pretrain.LR,
                                  train_pretrain.MUON_LR, train_pretrain.WEIGHT_DECAY)


def full_rows(rows, vocab_size=6400):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (rows, LENGTH + 1), generator=g)
    return ids[:, :-1].contiguous(), torch.zeros(rows, LENGTH, dtype=torch.long), ids[:, 1:].contiguous()


def text_folder():
    path = DATA
    if not path:
        prepare_python_docs.main()
        path = Path(__file__).parent / "data" / "python_docs" / "pretrain.jsonl"
    return prepare_text.prepare(path)


def packed_and_padded(rows):
    """Two batches of real documents: packed rows, and one document a row cut or padded to LENGTH."""
    data = train_pretrain.Rows(text_folder(), "train", LENGTH)
    packed = next(iter(data.batches(list(range(rows)), rows, "cpu")))
    bounds = np.load(text_folder() / "train.idx.npy")
    by_length = np.argsort(np.diff(bounds))
    even = ((np.arange(rows) + 0.5) / rows * len(by_length)).astype(int)  # each part of the distribution
    padded = [[(data.tokens[bounds[d]:min(bounds[d + 1], bounds[d] + LENGTH + 1)],)]
              for d in by_length[even]]
    return packed, common.collate(padded, LENGTH)


def limits():
    """The machine's own limits: matmul rate and memory bandwidth."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1408).to(dtype), torch.randn(1408, 2048).to(dtype)
        seconds, = fastest(REPEAT * 4, lambda a=a, b=b: a @ b)
        rows.append(
            row(
                f"matmul 2048×1408×2048 {str(dtype)[6:]}",
                None,
                2 * 2048 * 1408 * 2048 / seconds / 1e9,
                "GFLOP/s",
            )
        )
    big = torch.ones(2**26)
    seconds, = fastest(REPEAT * 2, lambda: big.sum())
    rows.append(row("read 256 MiB", None, big.numel() * 4 / seconds / 1e9, "GB/s"))
    return rows


def flop_per_token(model, length):
    """Forward and backward, matmuls and causal attention."""
    s = model.sizes
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2) + model.head_weight.numel()
    return 6 * matrices + 6 * s["n_layers"] * length * s["n_heads"] * model.layers[0].attention.head_dim


def train():
    """Training step of 26M parameters: full rows, and useful tokens per second on real document lengths."""
    run, rows = common.start(0, "auto"), []
    peak = next(r["ours"] for r in limits() if str(run.dtype)[6:] in r["work"])
    batch = full_rows(ROWS)
    tokens = batch[2].numel()
    torch.manual_seed(0)
    twin = Twin(6400, **BIG)
    works = {"eager AdamW": (our_model(compile=False), adamw), "compiled AdamW": (our_model(), adamw),
             "compiled Muon": (our_model(), muon)}
    steps = {name: trainer(run, model, opt(model), batch) for name, (model, opt) in works.items()}
    base, *times = fastest(REPEAT, twin_trainer(twin, batch), *steps.values())
    flop = flop_per_token(our_model(), LENGTH) * tokens
    for name, seconds in zip(steps, times, strict=True):
        rows.append(
            row(
                f"forward+backward+step {ROWS}×{LENGTH} full rows, {name}, {str(run.dtype)[6:]}",
                tokens / base,
                tokens / seconds,
                "tokens/s",
                share_of_matmul_limit=flop / seconds / 1e9 / peak,
            )
        )
    big = full_rows(4 * ROWS)
    base, ours = fastest(max(2, REPEAT // 2), twin_trainer(twin, big), trainer(run, works["compiled Muon"][0],
                         muon(works["compiled Muon"][0]), big))
    rows.append(
        row(
            f"forward+backward+step {4 * ROWS}×{LENGTH} full rows, compiled Muon",
            4 * tokens / base,
            4 * tokens / ours,
            "tokens/s",
            share_of_matmul_limit=4 * flop / ours / 1e9 / peak,
        )
    )
    packed, padded = packed_and_padded(4 * ROWS)
    useful = [int((b[2] != common.IGNORE).sum()) for b in (padded, packed)]
    model = works["compiled Muon"][0]
    works = twin_trainer(twin, padded), trainer(run, model, muon(model), packed)
    base, ours = fastest(max(2, REPEAT // 2), *works)
    name, slots = Path(DATA or "Python documentation").name, packed[2].numel()
    rows.append(row(f"useful tokens of {name}, {4 * ROWS} rows, packed ({useful[1] / slots:.0%} full) vs "
                    f"padded ({useful[0] / slots:.0%})", useful[0] / base, useful[1] / ours, "tokens/s"))
    common.stop(run)
    return rows


def peak_of(work):
    """Bytes allocated at the worst moment of `work`, above what was there before it."""
    work()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    now = most = 0
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def memory():
    """Peak bytes of one step above weights and optimizer state (gradients included), full rows."""
    run, rows = common.start(0, "auto"), []
    torch.manual_seed(0)
    twin, ours, eager = Twin(6400, **BIG), our_model(), our_model(compile=False)
    batch = full_rows(ROWS)
    base = peak_of(twin_trainer(twin, batch)) / 2**20
    for name, model in (("eager", eager), ("compiled", ours)):
        mine = peak_of(trainer(run, model, adamw(model), batch)) / 2**20
        rows.append(row(f"peak of a step {ROWS}×{LENGTH}, {name}", base, mine, "MiB", base / mine))
    common.stop(run)
    return rows


def tokenize():
    """Text to token files, tokenizer given, against one document after the other in Python."""
    folder = text_folder()
    source = json.loads((folder / "meta.json").read_text())["source"]
    tokenizer = common.load_tokenizer(folder / "tokenizer.json")
    texts = [t for t, _ in prepare_text.documents(source, prepare_text.BadRows())]
    size = sum(len(t.encode()) for t in texts)
    part = texts[:len(texts) // 10]

    def one_by_one():
        for text in part:
            common.encode(tokenizer, text)
    base, = fastest(2, one_by_one)
    base *= size / max(1, sum(len(t.encode()) for t in part))
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(None):
        begin = time.perf_counter()
        prepare_text.prepare(source, folder / "tokenizer.json", out=Path(temporary) / "tokens")
        ours = time.perf_counter() - begin
    return [
        row(
            f"tokenize {Path(source).name}, {size / 1e6:.1f} MB", size / 1e6 / base, size / 1e6 / ours, "MB/s"
        )
    ]


def startup():
    """From the command to the end of the first update, on text that is tokenised already, the default
    model."""
    text_folder()
    rows = []
    for name, words in (("eager", ["COMPILE=no"]), ("compiled, kernels cached", ["COMPILE=yes"])):
        seconds = []
        for _ in range(2):  # the first run fills the caches
            with tempfile.TemporaryDirectory() as out:
                command = [
                    sys.executable,
                    "train_pretrain.py",
                    f"OUT={out}/run",
                    "LOG_EVERY=1",
                    "STEPS=1",
                    "WARMUP=0",
                    "EVAL_ROWS=8",
                    *words,
                    *([f"DATA={DATA}"] if DATA else []),
                ]
                begin, lines = time.perf_counter(), []
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
                ) as process:
                    for line in process.stdout:
                        lines.append(line)
                        if line.startswith("step      1"):
                            seconds.append(time.perf_counter() - begin)
                            break
                    process.stdout.read()
                if process.wait():
                    raise common.BadInput("".join(lines[-3:]))
        rows.append(row(f"start to first update, {name}", None, seconds[-1], "s"))
    return rows


def generate():
    """Generation of 26M parameters, prompt 64, 128 new tokens: ours, without a cache, and with a growing
    cache."""
    run, rows = common.start(0, "auto"), []
    bandwidth = next(r["ours"] for r in limits() if r["unit"] == "GB/s")
    torch.manual_seed(0)
    twin = Twin(6400, **BIG).eval()
    ours = our_model(compile=False)
    for p in ours.parameters():  # the zeros of a fresh model would be cheap
        nn.init.normal_(p, std=0.02)
    small = common.for_inference(copy.deepcopy(ours), run.dtype, int8=True)
    kernels, common.step_kernels = common.step_kernels, lambda *words: None
    slow = common.for_inference(copy.deepcopy(ours), run.dtype)  # as without a C compiler
    common.step_kernels = kernels
    fast = common.for_inference(ours, run.dtype)

    def growing(batch, new):
        with torch.inference_mode():
            caches, ids = [[] for _ in twin.layers], torch.randint(3, 6400, (batch, 64))
            for i in range(new):
                logits = twin.logits(ids, caches, 0 if i == 0 else 63 + i)[:, -1]
                ids = logits.argmax(-1, keepdim=True)

    def our_way(model, batch, new, cached=True):
        for _ in common.generate(
            model, torch.randint(3, 6400, (batch, 64)).tolist(), new, temperature=0, eos=-1, cached=cached
        ):
            pass
    plain = our_model(compile=False)
    weights = sum(p.numel() * p.element_size() for p in fast.parameters())
    alone, new, few = None, 128, 24  # the uncached loop is slow: its cheapest tokens stand for all
    for batch in (1, 8):
        uncached, = fastest(1, lambda b=batch: our_way(plain, b, 24, False))
        base, mine = fastest(REPEAT, as_shipped(lambda b=batch: growing(b, 128)),
                             lambda b=batch: our_way(fast, b, 128))
        rate = batch * new / mine
        alone = alone or rate
        rows.append(
            row(f"batch {batch}, against no cache, float32", batch * few / uncached, rate, "tokens/s")
        )
        rows.append(
            row(
                f"batch {batch}, against an eager growing cache, float32",
                batch * new / base,
                rate,
                "tokens/s",
                share_of_bandwidth=weights * new / mine / 1e9 / bandwidth,
            )
        )
    rows.append(row("batch 8 against batch 1, both ours", alone, rate, "tokens/s"))
    for batch in (1, 8):
        base, mine, rounded = fastest(REPEAT, lambda b=batch: our_way(slow, b, new),
                                      lambda b=batch: our_way(fast, b, new),
                                      lambda b=batch: our_way(small, b, new))
        rows.append(row(f"batch {batch}, steps in C against torch's", batch * new / base, batch * new / mine,
                        "tokens/s"))
        rows.append(row(f"batch {batch}, weights of 8 bits", batch * new / mine, batch * new / rounded,
                        "tokens/s"))
    common.stop(run)
    return rows


def rounding():
    """Nats per token of a trained model (CHECKPOINT) on 400 texts of DATA, read as when it generates:
    bfloat16 and weights of 8 bits against float32."""
    path = common.newest_checkpoint(CHECKPOINT)
    tokenizer, found = common.load_tokenizer(path.parent / "tokenizer.json"), {}
    documents = itertools.islice(prepare_text.documents(DATA, prepare_text.BadRows()), 20_000)
    texts = np.random.default_rng(0).permutation([text for text, _ in documents])[:400].tolist()
    for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = common.for_inference(common.build(common.load(path)), dtype, int8)
        total = count = 0
        with torch.inference_mode():
            for text in texts:
                ids = torch.tensor([common.BOS, *common.encode(tokenizer, text)])[:128]  # what STEP_C reads
                cache = common.Cache(model, 1, len(ids))
                logits = model.fixed_head(model.read(ids[None], [len(ids)], cache, each=True)[0]).float()
                total += F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
                count += len(ids) - 1
        found[str(dtype)[6:] + " int8" * int8] = total / count
    return [row(f"{count:,} tokens, {name} against float32", found["float32"], nats, "nats/token")
            for name, nats in found.items() if name != "float32"]


def serve_():
    """The server, 26M parameters, prompt 64, 128 new tokens: against Hugging Face's generate on the exported
    model, 16 streams against one, the wait for a first token under load, and what HTTP costs."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    run, rows = common.start(0, "auto"), []
    bandwidth = next(r["ours"] for r in limits() if r["unit"] == "GB/s")
    ours = our_model(compile=False, seq_len=2560)
    for p in ours.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02)
    config = {k: v for k, v in export.config_of(ours.sizes).items() if k != "rope_scaling"}
    theirs = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    theirs.load_state_dict({common.hf_name(k): v for k, v in ours.state_dict().items()}, strict=False)
    more = contextlib.ExitStack()
    place = Path(more.enter_context(tempfile.TemporaryDirectory())) / "big"
    place.mkdir()
    torch.save({**common.weights_of(ours), "step": 0}, place / "best.pt")
    (place / "tokenizer.json").write_bytes((text_folder() / "tokenizer.json").read_bytes())
    address, _ = more.enter_context(http_server(place, f"DTYPE={str(run.dtype)[6:]}", "PREFIX_TOKENS=0"))
    small = common.for_inference(copy.deepcopy(ours), run.dtype, int8=True)
    fast = common.for_inference(ours, run.dtype)
    weights = sum(p.numel() * p.element_size() for p in fast.parameters())
    codec = serve.Codec(None)
    codec.table = [b"x"] * 6400
    ended = queue.Queue()
    engine, rounded = (serve.Engine(model, codec, 16, 2560, serve.CHUNK, 0, True, 64, 1e9, lambda pieces: [
        ended.put((job, time.perf_counter())) for job, piece in pieces if piece.finish])
        for model in (fast, small))

    def job(length, new):
        ids = torch.randint(3, 6400, (length,)).tolist()
        return serve.Job(ids, new, common.TextStream(codec.table), temperature=0.0, bias={2: -100.0})

    def streams(count, engine=engine):
        engine.submit([job(64, 128) for _ in range(count)])
        for _ in range(count):
            ended.get()

    def generated():
        ids = torch.randint(3, 6400, (1, 64))
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, min_new_tokens=128,
                        do_sample=False)
    base, one, http_one, eight, http_eight, sixteen, http_sixteen, bits = fastest(
        REPEAT, as_shipped(generated), lambda: streams(1), lambda: over_http(address, 1), lambda: streams(8),
        lambda: over_http(address, 8), lambda: streams(16), lambda: over_http(address, 16),
        lambda: streams(1, rounded))
    more.close()
    rows.append(row("one stream, against generate of transformers, float32", 128 / base, 128 / one,
                    "tokens/s", share_of_bandwidth=weights * 128 / one / 1e9 / bandwidth))
    rows.append(row("one stream, weights of 8 bits, against generate of transformers, float32", 128 / base,
                    128 / bits, "tokens/s"))
    rows.append(row("8 streams against one", 128 / one, 8 * 128 / eight, "tokens/s"))
    rows.append(row("16 streams against one", 128 / one, 16 * 128 / sixteen, "tokens/s"))

    step, waits = eight / 128, []
    for _ in range(REPEAT):  # 8 streams run, a long prompt is being read, and someone says hello
        running, long, short = [job(64, 400) for _ in range(8)], job(2000, 1), job(12, 1)
        engine.submit(running)
        while not all(j.new for j in running):
            time.sleep(1e-3)
        engine.submit([long])
        while not long.read:
            time.sleep(1e-3)
        short.begin = time.perf_counter()
        engine.submit([short])
        waits.append(next(at for j, at in iter(ended.get, None) if j is short) - short.begin)
        assert long.read < len(long.ids)
        engine.cancel([*running, long])
        while engine.active:
            time.sleep(1e-3)
        while not ended.empty():
            ended.get()
    wait = sorted(waits)[len(waits) // 2]
    rows.append(row("first token of a short prompt behind 8 streams and a long prompt", 3 * step * 1e3,
                    wait * 1e3, "ms", 3 * step / wait, steps=wait / step))
    for count, alone, http in ((1, one, http_one), (8, eight, http_eight), (16, sixteen, http_sixteen)):
        rows.append(row(f"{count} streams over HTTP, against the engine alone", count * 128 / alone,
                        count * 128 / http, "tokens/s", overhead=http / alone - 1))
    rows.append(row("16 streams against one, both over HTTP", 128 / http_one, 16 * 128 / http_sixteen,
                    "tokens/s"))
    for each in (engine, rounded):
        each.close()
        each.thread.join()
    common.stop(run)
    return rows


@contextlib.contextmanager
def http_server(place, *words):
    """((host, port), process id) of `serve.py` as a process of its own."""
    process = subprocess.Popen([sys.executable, "serve.py", f"CHECKPOINT={place}", "PORT=0", *words],
                               text=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, cwd=Path(__file__).parent)
    try:
        host, port = process.stdout.readline().split("//")[-1].strip().split(":")
        yield (host, int(port)), process.pid
    finally:
        process.terminate()
        process.wait()


def answers(address, asks, at_once):
    """Yield (request, its raw answer) as they end, `at_once` of them at a time, each on its own connection. A
    client that costs next to nothing: it only looks for the end."""
    asks, waiting = iter(asks), selectors.DefaultSelector()
    while True:
        for ask in itertools.islice(asks, at_once - len(waiting.get_map())):
            body, connection = json.dumps(ask), socket.create_connection(address)
            connection.sendall((
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
                f"application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode())
            waiting.register(connection, selectors.EVENT_READ, (ask, bytearray()))
        if not waiting.get_map():
            return
        for key, _ in waiting.select():
            (ask, found), part = key.data, key.fileobj.recv(65_536)
            found.extend(part)
            if not part:
                waiting.unregister(key.fileobj)
                key.fileobj.close()
                yield ask, bytes(found)


def over_http(address, count):
    """Stream `count` answers of 128 tokens at once."""
    asks = [{"model": "big", "prompt": torch.randint(3, 6000, (64,)).tolist(), "max_tokens": 128,
             "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
             "logit_bias": {"2": -100}} for _ in range(count)]
    for _, answer in answers(address, asks, count):
        assert b'"completion_tokens":128' in answer, answer[-500:]


def text_of(answer):
    """The text of a raw streamed answer; None if it broke off."""
    events = re.findall(rb"^data: ({.*})$", answer, re.M)
    text = "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])
    return text if b"\ndata: [DONE]\n" in answer else None


def endure():
    """The server of a tiny model: 1,000 connections dropped, 64 streams at once for MINUTES, REQUESTS
    answers: none lost, none mixed up, memory steady."""
    rows, codec = [], common.load_tokenizer(text_folder() / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tiny"
        place.mkdir()
        model = our_model(compile=False, dim=64, n_layers=2, n_heads=4)
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.2)
        torch.save({**common.weights_of(model), "step": 0}, place / "best.pt")
        codec.save(str(place / "tokenizer.json"))
        with http_server(place, "DTYPE=float32") as (address, pid):
            def gauge(name):
                with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics") as found:
                    return float(re.search(rf"^nanosparse_{name} (.*)$", found.read().decode(), re.M)[1])

            def free():
                end = time.monotonic() + 30
                while (taken := gauge("slots_busy") + gauge("queue_length")) and time.monotonic() < end:
                    time.sleep(0.05)
                return taken == 0
            begin = time.perf_counter()
            ask = json.dumps({"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 400}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            whole = head + f"Content-Length: {len(ask)}\r\n\r\n".encode() + ask
            for i in range(1000):
                with socket.create_connection(address) as connection:
                    connection.sendall((b"", head, whole[:-5], whole)[i % 4])
            seconds = time.perf_counter() - begin
            rows.append(row("dropped, a quarter of them with a whole request; all slots free after", 1000,
                            1000 if free() else 0, "connections", seconds=seconds))

            asks = [{"model": "tiny", "prompt": f"{'The module ' * (i % 9)}{i}", "max_tokens": 20 + i % 40,
                     "seed": i, "temperature": i % 3 / 2, "stream": True} for i in range(64)]
            alone = {ask["seed"]: text_of(answer) for ask, answer in answers(address, asks, 1)}
            end, same, count = time.monotonic() + 60 * MINUTES, 0, 0
            endless = itertools.takewhile(lambda ask: time.monotonic() < end, itertools.cycle(asks))
            for ask, answer in answers(address, endless, 64):
                same, count = same + (text_of(answer) == alone[ask["seed"]]), count + 1
            assert None not in alone.values() and len(set(alone.values())) > 32
            rows.append(row(f"64 streams at once, {MINUTES:g} minutes: all, and those as when alone", count,
                            same, "answers", same / count))

            short = ({**ask, "max_tokens": 8, "stream": bool(i % 2)} for i, ask in
                     enumerate(itertools.islice(itertools.cycle(asks), REQUESTS)))
            sizes, begin = [], time.perf_counter()
            for i, (_, answer) in enumerate(answers(address, short, 32), 1):
                assert answer.startswith(b"HTTP/1.1 200"), answer
                if i % (REQUESTS // 10) == 0:
                    status = Path(f"/proc/{pid}/status").read_text()
                    sizes.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
            rows.append(row(f"resident set after {REQUESTS // 10:,} and {REQUESTS:,} requests", sizes[0],
                            sizes[-1], "MiB", sizes[-1] / sizes[0], seconds=time.perf_counter() - begin))
            assert free()
    return rows


def learn():
    """Equal wall-clock time on the same text, from scratch: held-out bits per byte, SEEDS seeds."""
    folder = text_folder()
    results = {kind: [] for kind in ("twin", "adamw", "muon")}
    for seed in range(SEEDS):
        for kind, found in results.items():
            found.append(learn_one(folder, kind, seed))
    mean = {kind: float(np.mean(bits)) for kind, bits in results.items()}
    name = Path(DATA or "Python documentation").name
    work = f"bits per byte, {MINUTES:g} minutes of {name}, muon against"
    spread = {kind: float(np.ptp(bits)) for kind, bits in results.items()}
    return [row(f"{work} {kind}", mean[kind], mean["muon"], "bits/byte", mean[kind] / mean["muon"],
                spread_baseline=spread[kind], spread=spread["muon"]) for kind in ("twin", "adamw")]


def learn_one(folder, kind, seed):
    """Bits per byte of 6M parameters after MINUTES; "twin" is the plain way with AdamW at 3e-3."""
    train_pretrain.SEED, train_pretrain.OPTIMIZER = seed, "adamw" if kind == "adamw" else "muon"
    run = common.start(seed, "float32" if kind == "twin" else "auto")
    table = common.token_bytes(common.load_tokenizer(folder / "tokenizer.json"))
    sizes = dict(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, seq_len=LENGTH)
    data = train_pretrain.Rows(folder, "train", LENGTH)
    if kind == "twin":
        model, bounds = Twin(len(table), **sizes), np.load(folder / "train.idx.npy")
        order = np.random.default_rng(seed).permutation(len(bounds) - 1)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))]
        optimizers[0].param_groups[0]["peak"] = 3e-3
    else:
        model = our_model(len(table), seed=seed, **sizes)
        optimizers = muon(model)
        still = [torch.optim.SGD(model.parameters(), lr=0.0)]  # compile before the clock starts
        trainer(run, model, still, next(data.batches(range(8), 8, "cpu")))()
    spent, step, seen = 0.0, 0, 0
    while spent < 60 * MINUTES:
        begin = time.perf_counter()
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * common.lr_scale(int(1000 * spent / 60 / MINUTES), 1000, 50)
        if kind == "twin":
            chosen = order[np.arange(16 * step, 16 * step + 16) % len(order)]
            seen += padded_update(model, optimizers[0], data.tokens, bounds, chosen)
        else:
            batches = list(data.batches(range(16 * step, 16 * step + 16), 8, "cpu"))
            seen += common.update(run, model, optimizers, batches, lambda b: model(*b)[:2], 1.0, step).count
        step, spent = step + 1, spent + time.perf_counter() - begin
    bits = evaluate_plain(model, train_pretrain.Rows(folder, "valid", LENGTH), table, run)
    print(f"seed {seed} {kind}: {step} updates, {seen:.0f} tokens, {bits:.4f} bits per byte", flush=True)
    common.stop(run)
    return bits


def padded_update(model, optimizer, tokens, bounds, chosen):
    """One update on the chosen documents, each padded or cut to LENGTH; returns the useful tokens."""
    rows = [[(tokens[bounds[d]:min(bounds[d + 1], bounds[d] + LENGTH + 1)],)] for d in chosen]
    loss, count, _ = model(*common.collate(rows, LENGTH))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return int(count)


@torch.no_grad()
def evaluate_plain(model, valid, table, run):
    model.eval()
    nats = size = 0
    lengths = torch.tensor([len(b) for b in table])
    for ids, docs, targets in valid.batches(range(min(64, valid.count)), 8, "cpu"):
        with run.autocast():
            if isinstance(model, Twin):  # one document a row, as it was trained: cut the packed rows up again
                ids, docs, targets = unpacked(ids, docs, targets)
            loss, count, _ = model(ids, docs, targets)
        nats += float(loss) * (int(count) if isinstance(model, Twin) else 1)
        size += int(lengths[targets[targets != common.IGNORE]].sum())
    return nats / math.log(2) / size


def unpacked(ids, docs, targets):
    """The documents of packed rows, one a row."""
    rows = [(i[d == n], t[d == n]) for i, d, t in zip(ids, docs, targets, strict=True)
            for n in range(int(d.max()) + 1)]
    longest = max(len(i) for i, _ in rows)
    out, answers = ids.new_zeros(len(rows), longest), ids.new_full((len(rows), longest), common.IGNORE)
    for r, (i, t) in enumerate(rows):
        out[r, :len(i)], answers[r, :len(t)] = i, t
    return out, torch.zeros_like(out), answers


class PlainAttention(common.Attention):
    """The same projections around scaled_dot_product_attention."""

    def forward(self, x, cos, sin, documents):
        q, k, v = self.project(x, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def backward_of(work, inputs):
    """A function that does `work` and its gradients."""
    grad = torch.randn_like(work())
    return lambda: torch.autograd.grad(work(), inputs, grad)


def seconds_of(length, *works):
    return fastest(REPEAT if length < 8192 else max(1, REPEAT // 2) if length <= 16384 else 1, *works)


def nsa():
    """Native sparse against full attention: core, whole module, decoding; time and peak memory by length."""
    run, rows, cut, (H, G, E) = common.start(0, "auto"), [], common.Cut(), (8, 4, 64)
    lengths = [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) if n <= LONGEST]
    for dtype in (torch.float32, torch.bfloat16):
        for T in lengths:
            B = 4 if T == 512 else 1
            torch.manual_seed(0)

            def tensor(heads, n, B=B, dtype=dtype):  # as a projection leaves them
                return torch.randn(B, n, heads, E).to(dtype).to(run.device).transpose(1, 2).requires_grad_()
            sizes = [(H, T), (H, T), (G, T), (G, T), (G, cut.finished(T - 1)), (G, cut.finished(T - 1))]
            gates = torch.rand(B, T, H, 3).to(dtype).to(run.device).requires_grad_()
            inputs = [*(tensor(*s) for s in sizes), gates]

            def full(inputs=inputs):
                return F.scaled_dot_product_attention(*inputs[1:4], is_causal=True, enable_gqa=True)

            def ours(inputs=inputs):
                return common.attend_sparse(*inputs, cut)
            name = f"{B}×{T} {str(dtype)[6:]}"
            with torch.no_grad():
                base, mine = seconds_of(T, as_shipped(full), ours)
            rows.append(row(f"core forward {name}", base * 1e3, mine * 1e3, "ms", base / mine))
            works = backward_of(full, inputs[1:4]), backward_of(ours, inputs)
            base, mine = seconds_of(T, as_shipped(works[0]), works[1])
            rows.append(row(f"core forward+backward {name}", base * 1e3, mine * 1e3, "ms", base / mine))
            base, peak = (peak_of(work) / 2**20 for work in works)
            rows.append(row(f"core forward+backward {name} peak", base, peak, "MiB", base / peak))
            if dtype == torch.float32:
                base, = seconds_of(T, works[0])
                rows.append(row(f"core forward+backward {name}, both by oneDNN", base * 1e3, mine * 1e3, "ms",
                                base / mine))
            if T == 4096 and dtype == torch.float32 and COMPILE:
                with torch.no_grad():
                    base, mine = seconds_of(T, lambda x=inputs: common.attend_sparse_flex(*x, cut), ours)
                name += ", against flex"
                rows.append(row(f"core forward {name}", base * 1e3, mine * 1e3, "ms", base / mine))
    for dtype in (torch.float32, torch.bfloat16):
        for T in lengths:
            rows += module_rows(run, T, dtype)
        if 16_384 <= LONGEST < 65_536:
            peak = peak_of(module_work(run, common.NativeSparseAttention, 65_536, dtype)) / 2**20
            rows.append(row(f"module forward+backward 1×65536 {str(dtype)[6:]} peak", None, peak, "MiB"))
    rows += [decode_row(run, T, dtype) for dtype in (torch.float32, torch.bfloat16) for T in lengths]
    rows += step_rows(run)
    plot_lengths(rows)
    common.stop(run)
    return rows


def module_work(run, kind, T, dtype):
    """Forward and backward of a whole module (dim 512) with its projections; of 4 rows of 512, else 1."""
    torch.manual_seed(0)
    B, rope, module = 4 if T == 512 else 1, common.rope_table(64, T).to(run.device), kind(512, 8, 4, 64)
    documents = common.Documents(torch.zeros(B, T, dtype=torch.long, device=run.device))
    x, module = torch.randn(B, T, 512, device=run.device).requires_grad_(), module.to(run.device)

    def work():
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x, rope[0][documents.positions], rope[1][documents.positions], documents)
        y.float().square().sum().backward()
        module.zero_grad()
        x.grad = None
    return work


def module_rows(run, T, dtype):
    """The module with compression against full attention."""
    B = 4 if T == 512 else 1
    works = [module_work(run, kind, T, dtype) for kind in (PlainAttention, common.NativeSparseAttention)]
    base, mine = seconds_of(T, as_shipped(works[0]), works[1])
    name = f"module forward+backward {B}×{T} {str(dtype)[6:]}"
    memory = [peak_of(work) / 2**20 for work in works]
    return [row(name, base * 1e3, mine * 1e3, "ms", base / mine),
            row(name + " peak", *memory, "MiB", memory[0] / memory[1])]


def step_rows(run):
    """A training step of train_nsa_enwik8.py's default model, 4 × 512 bytes: nsa and window against full,
    which is this repo's or scaled_dot_product_attention."""
    batch, works = full_rows(ROWS, 256), []
    for kind in ("full", "sdpa", "nsa", "window"):
        torch.manual_seed(0)
        train_nsa_enwik8.ATTENTION, train_nsa_enwik8.SEQ_LEN = kind.replace("sdpa", "full"), LENGTH
        model = train_nsa_enwik8.make_model().to(run.device)
        for layer in model.layers if kind == "sdpa" else ():
            layer.attention.__class__ = PlainAttention
        common.compile_layers(model, "auto" if COMPILE else "no", 1000)
        optimizers = common.make_optimizers(model, "adam", 1e-4, 0.0, 0.0)
        works.append(trainer(run, model, optimizers, [x.to(run.device) for x in batch]))
    full, sdpa, sparse, window = fastest(REPEAT, *works)
    name = f"training step {ROWS}×{LENGTH} {str(run.dtype)[6:]}"
    return [row(f"{name}, {kind}", base * 1e3, seconds * 1e3, "ms", base / seconds)
            for kind, base, seconds in (("nsa", full, sparse), ("window", full, window),
                                        ("nsa against torch's attention", sdpa, sparse))]


def decode_row(run, T, dtype):
    """Milliseconds for one token of one layer behind T others, everything but the MLP."""
    seconds = []
    for kind in (common.Attention, common.NativeSparseAttention):
        torch.manual_seed(0)
        module = kind(512, 8, 4, 64).to(run.device, dtype).eval().requires_grad_(False)
        module.join()
        memory = module.memory(1, T + 1, module.out.weight)
        for x in memory.values():
            x.normal_()
        x, rope = torch.randn(1, 1, 512).to(run.device, dtype), common.rope_table(64, T + 1)[:, None, T:]
        rope, column = rope.to(run.device), torch.tensor([[T]], device=run.device)
        reading = common.Reading([T], [1], column, None)

        def work(module=module, memory=memory, x=x, rope=rope, reading=reading):
            with torch.inference_mode():
                for _ in range(20):
                    module.cached(x, rope[0], rope[1], memory, reading)
        seconds.append(work)
    base, mine = (s / 20 for s in fastest(REPEAT, *map(as_shipped, seconds)))  # as in serve.py
    return row(f"decode a token behind {T} {str(dtype)[6:]}", base * 1e3, mine * 1e3, "ms", base / mine)


def plot_lengths(rows):
    """out/bench/nsa.png: milliseconds by length, full and sparse; says from where on sparse is ahead."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    kinds = ("core forward+backward", "module forward+backward", "decode a token behind")
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4))
    for axis, kind in zip(axes, kinds, strict=True):
        for dtype in ("float32", "bfloat16"):
            found = [r for r in rows if r["work"].startswith(kind) and r["unit"] == "ms"
                     and r["work"].endswith(dtype)]
            if found:
                x = [int(r["work"].removeprefix(kind).split()[0].split("×")[-1]) for r in found]
                ahead = [n for i, n in enumerate(x) if all(r["ratio"] >= 1 for r in found[i:])]
                ahead = f"ahead from {ahead[0]} tokens on" if ahead else f"not ahead up to {x[-1]} tokens"
                print(f"{kind}, {dtype}: nsa is {ahead}")
                for key, style in (("baseline", "--"), ("ours", "-")):
                    label = f"full {dtype}" if key == "baseline" else f"nsa {dtype}, {ahead}"
                    axis.loglog(x, [r[key] for r in found], "o" + style, label=label, markersize=3)
        axis.set(title=kind, xlabel="tokens", ylabel="ms")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    Path("out/bench").mkdir(parents=True, exist_ok=True)
    figure.savefig("out/bench/nsa.png", dpi=110)
    pyplot.close(figure)


def chat():
    """The chat scripts: packed fine-tuning against padded rows, preferences with one model against two,
    adapters against full fine-tuning, distillation in chunks against whole logits; 26M, Python's docs."""
    run, rows = common.start(0, "auto"), []
    folder = text_folder()
    docs = Path(__file__).parent / "data" / "python_docs"
    if not (docs / "sft.jsonl").exists():
        prepare_python_docs.main()
    tokens = common.load_tokenizer(folder / "tokenizer.json")
    chats = prepare_chats.Chats(prepare_chats.prepare(docs / "sft.jsonl", folder / "tokenizer.json", LENGTH),
                                "train", LENGTH)
    size = tokens.get_vocab_size()
    spans = [chats.documents(r) for r in range(ROWS)]
    packed = common.collate(spans, LENGTH)
    padded = common.collate([[d] for d in sum(spans, [])[:ROWS]], LENGTH)
    ours, twin = our_model(size), Twin(size, **BIG)
    base, mine = fastest(REPEAT, twin_trainer(twin, padded), trainer(run, ours, adamw(ours), packed))
    count = [int((b[1] >= 0).sum()) for b in (padded, packed)]
    rows.append(row("fine-tuning, packed against padded rows", count[0] / base, count[1] / mine,
                    "useful tokens/s"))

    ours = our_model(size, compile=False)
    full = peak_of(trainer(run, ours, adamw(ours), packed)) / 2**20
    full += sum(p.numel() for p in ours.parameters()) * 8 / 2**20                   # Adam's two moments
    lora = our_model(size, compile=False)
    common.add_lora(lora, common.LORA_TARGETS, 8, 16.0)
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(trained, lr=1e-3, fused=True)]
    few = (
        peak_of(trainer(run, lora, optimizers, packed)) / 2**20 + sum(p.numel() for p in trained) * 8 / 2**20
    )
    rows.append(row("peak of a step and Adam's state, full against adapters", full, few, "MiB", full / few))

    pairs = train_dpo.Pairs(docs / "dpo.jsonl", tokens, LENGTH + 1)
    policy, frozen = our_model(size, compile=False), our_model(size, compile=False).requires_grad_(False)
    some = np.arange(16)
    known = torch.zeros(16, 2)

    repeated = copy.copy(pairs)
    repeated.batch = functools.partial(pairs.batch, share=False)

    def one(pairs=pairs):
        logs, count = train_dpo.log_probabilities(run, policy, pairs, some, LENGTH)
        train_dpo.preference(logs, known, count)[0].sum().backward()
        policy.zero_grad(set_to_none=True)

    def two():                                            # both models in memory, rows padded, logits whole
        longest = max(len(ids) for i in some for ids, _ in pairs.pairs[i])
        batch = common.collate([[pairs.pairs[i][side]] for i in some for side in (0, 1)], longest)
        found = []
        for model in (policy, frozen):
            with contextlib.nullcontext() if model is policy else torch.no_grad():
                logits = (model.hidden(*batch[:2])[0] @ model.head_weight.T).float()
                logp = -F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), reduction="none",
                                        ignore_index=common.IGNORE)
                found.append(logp.view(batch[2].shape).sum(1).view(-1, 2))
        train_dpo.preference(found[0], found[1], torch.ones(16, 2))[0].sum().backward()
        policy.zero_grad(set_to_none=True)
    base, twice, mine = fastest(REPEAT, two, lambda: one(repeated), one)
    rows += [row("preferences, 16 pairs: two models against one", base * 1e3, mine * 1e3, "ms", base / mine),
             row("… the question for each answer against once", twice * 1e3, mine * 1e3, "ms", twice / mine)]
    weights = sum(p.numel() for p in policy.parameters()) * 4 / 2**20
    base, mine = peak_of(two) / 2**20 + weights, peak_of(one) / 2**20
    rows.append(row("… peak, the second model counted", base, mine, "MiB", base / mine))

    hidden, head = torch.randn(ROWS * LENGTH, BIG["dim"]), torch.randn(size, BIG["dim"]).requires_grad_()
    known, student = torch.randn_like(hidden), torch.randn_like(hidden).requires_grad_()
    targets = torch.randint(0, size, (len(hidden),))

    def chunks():
        train_distill.Distilled.apply(student, head, known, head.detach(), targets, 0.3, 1.0).backward()

    def whole():
        logits, wanted = student @ head.T, known @ head.detach().T
        kl = F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="sum")
        (0.3 * F.cross_entropy(logits, targets, reduction="sum") + 0.7 * kl).backward()
    base, mine = fastest(REPEAT, whole, chunks)
    rows.append(row(f"distillation loss of {len(hidden)} tokens, in chunks", base * 1e3, mine * 1e3, "ms",
                    base / mine))
    base, mine = (peak_of(work) / 2**20 for work in (whole, chunks))
    rows.append(row("… peak", base, mine, "MiB", base / mine))
    common.stop(run)
    return rows


class LoopsAttention(common.DynamicSparseAttention):
    """The way that throws connections away: the whole softmax matrix, the largest entries of a head's whole
    map, then loops over the rows that kept too few."""

    def forward(self, x, real, N, dense=False):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        keep = torch.zeros_like(weights, dtype=torch.bool)
        for b in range(B):
            for h in range(self.n_heads):
                important = (weights[b, h] * self.importance(x[b])[:, h].exp()).detach()
                count = int(float(self.density) * T * T)
                keep[b, h] = important >= important.flatten().topk(count).values[-1]
                for row in range(T):
                    if int(keep[b, h, row].sum()) < self.min_connections:
                        keep[b, h, row, important[row].topk(self.min_connections).indices] = True
        return self.out(((weights * keep) @ v).transpose(1, 2).flatten(2)), {}


class DenseAttention(common.DynamicSparseAttention):
    """The same projections around scaled_dot_product_attention, as one would write it."""

    def forward(self, x, real, N, dense=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)), {}


def with_statistics(module, *inputs):
    """The layer's output, its statistics added, so that backward goes through them, too."""
    y, found = module(*inputs)
    return y + found["retained_information"].sum() + found["entropy"].sum() if found else y


def dsa():
    """Dynamic sparsity attention of one layer, 6 heads of 8, against dense and against loops over the whole
    matrix; the mass that its blocks hold; the whole network against the fit."""
    run, rows = common.start(0, "float32"), []
    for T, density in itertools.product((500, 1000, 2000, 4000, 8000, 16000), (0.10, 0.05)):
        B = 4 if T <= 2000 else 1
        name = f"{B}×{T}, {density:.0%}"

        def layer(kind, leaf=1, queries=1, judge="moments", T=T, B=B, density=density):
            torch.manual_seed(0)
            x, real = torch.randn(B, T, 48, device=run.device), torch.ones(B, T, device=run.device) > 0
            points, N = F.normalize(torch.randn_like(x[..., :3]), dim=-1), 1 << round(math.log2(T / leaf))
            if kind is common.DynamicSparseAttention:
                index = common.place_order(points, real, N)
                x, real = F.pad(x, (0, 0, 0, 1)).gather(1, index[..., None].expand(-1, -1, 48)), index < T
            module = kind(48, 6, density=density, query_blocks=max(1, queries // leaf), judge=judge)
            module = module.to(run.device)
            parts = [x.requires_grad_(), *(p for n, p in module.named_parameters() if n != "log_temperature"
                     and (kind is common.DynamicSparseAttention or not n.startswith("importance")))]
            return functools.partial(with_statistics, module, x, real, N), parts
        dense = layer(DenseAttention)
        ours = layer(common.DynamicSparseAttention, train_muon_dsa.LEAF, train_muon_dsa.QUERIES,
                     train_muon_dsa.JUDGE)
        coarse = layer(common.DynamicSparseAttention, 16, 64)
        if T == 16000:
            with torch.no_grad():
                base, mine, rough = fastest(2, as_shipped(dense[0]), ours[0], coarse[0])
        else:
            works = [backward_of(*w) for w in (dense, ours, coarse)]
            base, mine, rough = seconds_of(T, as_shipped(works[0]), *works[1:])
        what = "forward" if T == 16000 else "forward+backward"
        rows.append(row(f"{what} {name}, dense", base * 1e3, mine * 1e3, "ms", base / mine))
        rows.append(row(f"{what} {name}, dense, blocks of 16 by moments", base * 1e3, rough * 1e3, "ms",
                        base / rough))
        if T == 16000:
            continue
        base, = seconds_of(T, works[0])
        rows.append(row(f"{what} {name}, dense by oneDNN", base * 1e3, mine * 1e3, "ms", base / mine))
        base, peak, rough = (peak_of(work) / 2**20 for work in works)
        rows.append(row(f"{what} {name}, dense, peak", base, peak, "MiB", base / peak))
        rows.append(row(f"{what} {name}, dense, blocks of 16 by moments, peak", base, rough, "MiB",
                        base / rough))
        if T <= 2000 and density == 0.10:
            work = backward_of(*layer(LoopsAttention))
            base, = fastest(1, as_shipped(work))
            rows.append(row(f"{what} {name}, loops", base * 1e3, mine * 1e3, "ms", base / mine))
            base = peak_of(work) / 2**20
            rows.append(row(f"{what} {name}, loops, peak", base, peak, "MiB", base / peak))
    return rows + network_rows(run)


def network_rows(run):
    """CPU time an event of the network and of the fit; of a trained one (OUT of train_muon_dsa.py, out/muon)
    the share of the attention that its blocks hold, against the best choice of as many keys for every
    query."""
    rng, rows = np.random.default_rng(0), []
    made = [simulate_muons.event(rng, simulate_muons.NOMINAL) for _ in range(24)]
    x = torch.from_numpy(np.stack([m[0] for m in made])).to(run.device)
    best = Path(CHECKPOINT) / "best.pt"
    model = train_muon_dsa.build(common.load(best)) if best.exists() else train_muon_dsa.make_model()
    model = model.to(run.device).eval()
    nominal = fit_muons.calibration_events()
    calibration = [c.to(run.device) for c in
                   fit_muons.calibrate(*nominal, torch.ones(nominal[0].shape[:2], dtype=torch.bool))]
    works = (lambda: fit_muons.fit(x, calibration)), (lambda: model(x, train_muon_dsa.REFINE))
    with torch.no_grad():
        base, mine = (cpu_seconds(work) / len(x) * 1e3 for work in works)
    rows.append(row("an event: fit, network", base, mine, "CPU ms", base / mine))
    if best.exists():
        for number, (held, shared, ideal) in enumerate(mass_held(model, x)):
            rows.append(row(f"layer {number}: attention of the best keys, of ours", ideal, held, "share",
                            held / ideal))
            rows.append(row(f"layer {number}: …, of the best blocks", ideal, shared, "share",
                            shared / ideal))
    return rows


def cpu_seconds(work):
    """Of the fastest of REPEAT, all threads together."""
    work()
    spent = []
    for _ in range(REPEAT):
        begin = time.process_time()
        work()
        spent.append(time.process_time() - begin)
    return min(spent)


@torch.no_grad()
def mass_held(model, x):
    """For each layer (share of the attention that the chosen blocks hold, that as many blocks, the best for
    their queries, would hold, that as many keys, the best for each query, would hold)."""
    inputs, found = [], []
    hooks = [layer.attention.register_forward_hook(lambda m, i, o: inputs.append((m, i)))
             for layer in model.layers]
    model(x)
    for hook in hooks:
        hook.remove()
    for module, (h, real, N, *_) in inputs:
        B, P, _ = h.shape
        q, k, _ = module.qkv(h).view(B, P, 3, module.n_heads, -1).permute(2, 0, 3, 1, 4)
        bias = module.importance(h).transpose(1, 2).masked_fill(~real[:, None], -math.inf)
        chosen, gate, _ = module.choose(q, k, bias, real, N)
        NI = chosen.shape[2]
        held = blocks = ideal = 0.0
        for b in range(B):
            weights = (q[b] @ k[b].mT / math.sqrt(q.shape[-1]) + bias[b, :, None]).softmax(-1)    # (H, P, P)
            kept = torch.zeros(*chosen[b].shape[:2], N, dtype=torch.bool, device=x.device)
            kept = kept.scatter(2, chosen[b], gate[b] > -math.inf)
            keys = kept.repeat_interleave(P // NI, 1).repeat_interleave(P // N, 2) & real[b]
            seen = real[b].float()
            held += float(((weights * keys).sum(-1) * seen).sum() / seen.sum() / len(weights))
            shared = (weights * seen[:, None]).view(len(weights), NI, P // NI, N, P // N).sum((2, 4))
            order = shared.sort(-1, descending=True).values.cumsum(-1)
            best = order.gather(-1, kept.sum(-1, keepdim=True) - 1)
            blocks += float(best.sum() / seen.sum() / len(weights))
            order = weights.sort(-1, descending=True).values.cumsum(-1)
            best = order.gather(-1, keys.sum(-1, keepdim=True).clamp(min=1) - 1)[..., 0]
            ideal += float((best * seen).sum() / seen.sum() / len(weights))
        found.append((held / B, blocks / B, ideal / B))
    return found


def impute():
    """Genotypes: retrieval, FAISS and torch against NumPy; a BERT update, retrieved segments in recomputed
    chunks against one by one; imputed people/s, chains together against one at a time."""
    run, rows = common.start(0, "float32"), []
    panel = train_rag_bert.Panel(run)
    n = panel.alleles.shape[1]
    window = (0, min(len(panel), 1020))
    tokens = torch.where(torch.rand(256, window[1]) < 0.5, panel.alleles[:window[1], :256].T.long(), 2)
    vectors, query = (
        panel.alleles[: window[1]].T.float().numpy() * 2 - 1,
        torch.where(tokens == 2, 0, tokens * 2 - 1),
    )

    def plain():
        for q in query.float().numpy():
            np.argsort(((vectors - q) ** 2).sum(1), kind="stable")[:3]
    for kind in ("flat", "torch"):
        found = train_rag_bert.Retriever(panel, np.arange(n), kind)
        found.index(*window)
        base, mine = fastest(REPEAT, plain, lambda found=found: found.nearest(tokens, window, 3))
        name = {"flat": "FAISS", "torch": "torch"}[kind]
        rows.append(row(f"3 nearest of {n} segments of {window[1]} sites, {name} against NumPy", 256 / base,
                        256 / mine, "queries/s"))
    big = np.random.default_rng(0).integers(0, 2, (20_000, 512), dtype=np.int8)
    # the second half are relatives of the first
    big[10_000:] = np.where(
        np.random.default_rng(2).random((10_000, 512)) < 0.05, 1 - big[:10_000], big[:10_000]
    )
    many = types.SimpleNamespace(alleles=torch.from_numpy(np.ascontiguousarray(big.T)), print="many")
    some, found = torch.from_numpy(big[:256]).long(), {}
    for kind in ("flat", "ivf"):
        found[kind] = train_rag_bert.Retriever(many, np.arange(len(big)), kind)
        found[kind].index(0, 512)
    flat, ivf = (found[k].nearest(some, (0, 512), 3) for k in ("flat", "ivf"))
    base, mine = fastest(REPEAT, *(lambda k=k: found[k].nearest(some, (0, 512), 3) for k in ("flat", "ivf")))
    recall = (flat[:, :, None] == ivf[:, None]).any(2).float().mean().item()
    rows.append(
        row(
            f"3 nearest of 20,000, IVF against exact FAISS, recall {recall:.2f}",
            256 / base,
            256 / mine,
            "queries/s",
        )
    )

    def made(chunk, recompute):
        torch.manual_seed(0)
        return train_rag_bert.Imputer(
            "bert", (600.0,), 1e-3, 64, 128, 8, 4, 3, "enhanced", "clamped", 512, chunk, recompute
        )
    T = min(512, len(panel))
    inputs = dict(
        tokens=torch.randint(0, 3, (2, 2, T)),
        numbers=torch.rand(2, T, 7),
        frequency=torch.rand(2, T, 2),
        references=torch.randint(0, 2, (2, 2, 3, T)),
    )

    def update_of(model):
        def work():
            model(**inputs)["haplotype"].square().sum().backward()
            model.zero_grad(set_to_none=True)
        return work
    works = [update_of(made(1, False)), update_of(made(2, True))]
    base, mine = fastest(min(REPEAT, 3), *works)
    rows.append(
        row(
            f"update of the documented BERT, 2 people × {T} sites, against one segment at a time",
            2 / base,
            2 / mine,
            "people/s",
        )
    )
    base, mine = (peak_of(work) / 2**20 for work in works)
    rows.append(row("… peak", base, mine, "MiB", base / mine))

    typed = train_rag_bert.array_mask(np.random.default_rng(0), panel.maf, 0.08)
    where, every = np.flatnonzero(typed), np.arange(len(panel))
    examples = train_rag_bert.Examples(panel, panel.alleles, np.arange(n), torch.arange(n).view(-1, 2),
                                       panel.population)
    model = train_rag_bert.Imputer("copy", (150.0, 600.0, 2500.0), 1e-3, 64, 0, 0, 1, 0, "", "", 0)

    def alone():
        for q in (0, 1):                                                           # one person
            for rate in model.rates:
                copy_plainly(panel, where, q, rate)

    def ours():
        copies = examples.copy(torch.arange(20), where, every, model.rates, 1e-3)
        with torch.no_grad():
            train_rag_bert.apply_copy(model, copies)
    base, mine = fastest(min(REPEAT, 3), alone, ours)
    rows.append(
        row(
            f"imputation, {len(where)} of {len(panel)} sites typed, {n} haplotypes, 3 chains each: against "
            "NumPy, one at a time",
            1 / base,
            20 / mine,
            "people/s",
        )
    )
    common.stop(run)
    return rows


def copy_plainly(panel, where, q, rate):
    """Dosages of one haplotype by one chain in NumPy, the panel's other people as states."""
    alleles = panel.alleles.numpy()
    others = np.delete(np.arange(alleles.shape[1]), [q // 2 * 2, q // 2 * 2 + 1])
    reference, query = alleles[where][:, others], alleles[where, q]
    stay = np.exp(-rate * np.diff(panel.cm[where], prepend=panel.cm[where[0]]) / 100)
    right = np.where(reference == query[:, None], 1 - 1e-3, 1e-3)
    ahead, back = np.empty(right.shape), np.ones(right.shape)
    state = np.full(len(others), 1 / len(others))
    for m in range(len(where)):
        state = (stay[m] * state + (1 - stay[m]) / len(others)) * right[m]
        state /= state.sum()
        ahead[m] = state
    for m in range(len(where) - 1, 0, -1):
        now = right[m] * back[m]
        back[m - 1] = stay[m] * now + (1 - stay[m]) * now.mean()
        back[m - 1] /= back[m - 1].mean()
    posterior = ahead * back
    posterior /= posterior.sum(1, keepdims=True)
    sites = np.clip(np.searchsorted(where, np.arange(len(panel)), "right") - 1, 0, len(where) - 2)
    gap = np.maximum(panel.cm[where[sites + 1]] - panel.cm[where[sites]], 1e-12)
    w = np.clip((panel.cm - panel.cm[where[sites]]) / gap, 0, 1)[:, None]
    return ((posterior[sites] * (1 - w) + posterior[sites + 1] * w) * alleles[:, others]).sum(1)


# What `faults` runs: every training script with constants that train in seconds, after those it starts from.
# {} is the folder that fault_data fills; a new script is a new line here.
FAULT_WORDS = {
    "train_pretrain.py": "DATA={}/tokens SEQ_LEN=64 DIM=32 N_LAYERS=2 N_HEADS=4 EVAL_ROWS=4 SAMPLE_EVERY=10 "
    "DROPOUT=0.1 COMPILE=no",
    "train_nsa_enwik8.py": "DATA={}/text.jsonl SEQ_LEN=100 DIM=32 N_LAYERS=2 N_HEADS=2 N_KV_HEADS=1 "
    "HEAD_DIM=16 EVAL_BYTES=1000 SAMPLE_EVERY=10 SAMPLE_LEN=20 COMPILE=no",
    "train_muon_dsa.py": "DATA={}/muons/muons-*.pt SEQ_LEN=200 DIM=24 HIDDEN_DIM=48 N_HEADS=4 "
    "HIT_DIM=24 VALID_SHARE=0.1 TEST_SHARE=0.1",
    "train_sft.py": "DATA={}/chats.jsonl INIT={}/train_pretrain-1/whole VALID_SHARE=0.1 EVAL_ROWS=4 "
    "EXACT_ROWS=10",
    "train_dpo.py": "DATA={}/pairs.jsonl INIT={}/train_sft-1/whole VALID_SHARE=0.2 EVAL_PAIRS=8",
    "train_lora.py": "DATA={}/chats.jsonl INIT={}/train_sft-1/whole GENERAL={}/chats.jsonl EVAL_ROWS=4 "
    "EXACT_ROWS=10",
    "train_distill.py": "DATA={}/chats.jsonl TEACHER={}/train_sft-1/whole DIM=24 N_LAYERS=1 N_HEADS=2 "
    "N_KV_HEADS=1 EVAL_ROWS=4 EXACT_ROWS=10",
    "train_rag_bert.py": "PANEL={}/people/panel.vcf.gz SAMPLES={}/people/samples.panel "
                         "MAP={}/people/map.gz MODEL=both "
    "DIM=16 N_LAYERS=1 N_HEADS=2 WINDOW_SITES=64 COPY_DIM=16 VALID_SHARE=0.15 VALID_WINDOWS=2",
}
HANGS = 300  # seconds after which a run of `faults` is taken to hang
FAULT_ALWAYS = "STEPS=48 SAVE_EVERY=3 EVAL_EVERY=12 LOG_EVERY=1 BATCH=4 MICRO_BATCH=2 WARMUP=2 DTYPE=float32"


def fault_data(folder, muons=True):
    """Fill a folder with tiny data for FAULT_WORDS: text and its tokens, conversations, pairs, muons."""
    rng, words = np.random.default_rng(0), "cat dog sun sea tree king 月 山 sees finds the".split()
    sentence = lambda: " ".join(rng.choice(words, rng.integers(4, 30)))
    say = lambda *turns: [dict(role=r, content=c) for r, c in zip(("user", "assistant"), turns, strict=True)]
    rows = {"text": [{"text": sentence()} for _ in range(400)],
            "chats": [{"conversations": say(str(i), rng.choice(words))} for i in range(200)],
            "pairs": [{"chosen": say(str(i), "sun"), "rejected": say(str(i), "sea")} for i in range(60)]}
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    prepare_text.prepare(folder / "text.jsonl", vocab_size=300, share=0.1, out=folder / "tokens")
    if not muons:
        return
    words = "NAME=muons DETECTOR=nominal EVENTS=96 SHARD=48 HITS=200 SEED=5 WORKERS=1"
    subprocess.run([sys.executable, "data/simulate_muons.py", f"OUT={folder}/muons", *words.split()],
                   cwd=Path(__file__).parent, check=True, stderr=subprocess.DEVNULL)
    simulate_genotypes.make(folder / "people", 0.2, (20, 20, 20), (2, 2), 0.2, seed=3)


def started(script, words, out, ranks=1):
    """A process that runs the script, or torchrun with it, into OUT=out; what it says goes to out.log."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), script, *words, f"OUT={out}"]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"})


def run_to_end(script, words, out, ranks=1):
    """The same, waited for; returns its seconds. Raises BadInput with its last lines if it fails."""
    begin = time.perf_counter()
    if started(script, words, out, ranks).wait(HANGS):
        raise common.BadInput(f"{script} failed: " + Path(f"{out}.log").read_text()[-1500:])
    return time.perf_counter() - begin


def processes_of(out):
    """Ids of the processes whose command has the word OUT=out: torchrun, too, and its workers."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"OUT={out}".encode() in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def kill_all(out):
    """SIGKILL to all of them."""
    while pids := processes_of(out):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def last_step(out):
    """The step of the last whole line in OUT/metrics.jsonl, -1 where there is none."""
    with contextlib.suppress(OSError):
        steps = [common._step_of(line) for line in (Path(out) / "metrics.jsonl").read_bytes().split(b"\n")]
        return int(max((s for s in steps if s < math.inf), default=-1))
    return -1


def writing(out):
    """Whether a file is just being written in OUT."""
    with contextlib.suppress(OSError):
        return any(name.endswith(".tmp") for name in os.listdir(out))
    return False


def struck(process, out, moment, seconds, sign=signal.SIGKILL):
    """Wait for the moment and send the signal; returns whether it came before the end. `moment`: "start",
    `seconds` from now; "run", so long after the next line of metrics; "save", then at the next file that is
    just being written."""
    before, begin, born, pids = last_step(out), None, time.perf_counter(), []
    while process.poll() is None:
        now = time.perf_counter()
        if now - born > HANGS:
            raise common.BadInput(f"{out} hangs")
        if begin is None and (moment == "start" or last_step(out) not in (before, -1)):
            begin, pids = now, processes_of(out)
        if begin is not None and now - begin >= seconds and (moment != "save" or writing(out)):
            if sign == signal.SIGKILL:
                for pid in pids:  # known before: a file is written in milliseconds
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                kill_all(out)
            else:
                process.send_signal(sign)
            process.wait(HANGS)
            return True
        time.sleep(0.0005 if begin else 0.005)
    return False


def difference(whole, out):
    """What is not the same, to the bit, in two folders of a run: "" where nothing is."""
    names = ["metrics.jsonl", "samples.jsonl", "model.safetensors", "adapter_model.safetensors"]
    wrong = [n for n in names if (whole / n).exists() and (whole / n).read_bytes() != (out / n).read_bytes()]
    for name in ("checkpoint.pt", "best.pt"):
        a, b = (common.load(f / name) for f in (whole, out))
        same = a["step"] == b["step"] and a["model"].keys() == b["model"].keys() and all(
            torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        states = [[torch.as_tensor(v) for o in c.get("optimizers", []) for s in o["state"].values()
                   for v in s.values()] for c in (a, b)]
        if not same or not all(torch.equal(x, y) for x, y in zip(*states, strict=True)):
            wrong.append(name)
    steps = [row["step"] for row in common.read_metrics(out)]
    return ", ".join(wrong + ["order of steps"] * (steps != sorted(steps)))


def survive(script, words, folder, ranks, kills, rng, seconds):
    """Kill a run `kills` times (fewer if it ends before) at random moments, half of them while it writes,
    and rerun it to its end; returns a row with how often, what was lost, and what differs from `whole`."""
    out, begun = folder / f"killed-{rng.integers(1 << 30)}", time.perf_counter()
    every = int(next(w for w in words if w.startswith("SAVE_EVERY=")).partition("=")[2])
    done = inside = lost = 0
    for k in range(kills):
        moment = ("save", "run", "save", "start")[k % 4]
        wait = rng.uniform(0, {"start": seconds, "run": 1.0, "save": 0.5}[moment])
        if not struck(started(script, words, out, ranks), out, moment, wait):
            break
        done, inside = done + 1, inside + writing(out)
        reached, kept = last_step(out), common.load_newest(out) if out.exists() else None
        loss = max(0, reached - (kept["step"] if kept else 0))
        lost = max(lost, loss)
        if loss > every and not (kept and kept["state"].get("finished")):
            raise common.BadInput(f"{script}: {loss} steps lost, SAVE_EVERY is {every}")
    newest = common.load_newest(out) if out.exists() else None
    if not (newest and newest["state"].get("finished")):
        run_to_end(script, words, out, ranks)
    return {"kills": done, "while_writing": inside, "steps_lost": lost,
            "lines": len(common.read_metrics(out)), "differs": difference(folder / "whole", out),
            "seconds": time.perf_counter() - begun}


def stopped(script, words, folder, ranks, sign, rng):
    """Stop a run by SIGINT or SIGTERM after some steps, check that its last step was saved, and finish it."""
    out, begun = folder / f"stopped-{sign}", time.perf_counter()
    came = struck(started(script, words, out, ranks), out, "run", rng.uniform(0, 0.3), sign)
    lost = last_step(out) - common.load(out / "checkpoint.pt")["step"]
    if not common.load(out / "checkpoint.pt")["state"].get("finished"):
        run_to_end(script, words, out, ranks)
    return {"kills": int(came), "while_writing": 0, "steps_lost": lost,
            "lines": len(common.read_metrics(out)), "differs": difference(folder / "whole", out),
            "seconds": time.perf_counter() - begun}


def fault_words(script, folder, more=""):
    """The words of FAULT_WORDS and FAULT_ALWAYS that the script knows; later ones win."""
    module = importlib.import_module(script.removesuffix(".py"))
    words = f"{FAULT_ALWAYS} {FAULT_WORDS[script]} {more}".replace("{}", str(folder)).split()
    latest = dict(w.partition("=")[::2] for w in words)
    return [f"{name}={value}" for name, value in latest.items() if hasattr(module, name)]


def faults():
    """Every training script killed at random moments, also while it saves, and rerun: the same bits."""
    rows, rng = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        fault_data(root)
        for ranks in (1, 2):
            for script in FAULT_WORDS:
                for more in ("", "WANDB=offline") if script == "train_pretrain.py" and ranks == 1 else ("",):
                    words = fault_words(script, root, more)
                    folder = root / f"{script.removesuffix('.py')}-{ranks}{more}"
                    folder.mkdir()
                    seconds = run_to_end(script, words, folder / "whole", ranks)
                    found = []
                    while sum(f["kills"] for f in found) < KILLS:
                        found.append(survive(script, words, folder, ranks, KILLS, rng, seconds))
                    name = f"{script} {more} {ranks} process{'es' * (ranks > 1)}".replace("  ", " ")
                    rows.append(fault_row(f"{name}, SIGKILL", found))
                    for sign in (signal.SIGTERM, signal.SIGINT) if not more else ():
                        found = [stopped(script, words, folder, ranks, sign, rng)]
                        rows.append(fault_row(f"{name}, {sign.name}", found))
                    print("\n".join(str(r) for r in rows[-3:]), flush=True)
    total = [sum(r[k] for r in rows) for k in ("baseline", "ours")]
    rows.append(row("all", *total, "signals survived bit for bit", total[1] / total[0],
                    while_writing=sum(r["while_writing"] for r in rows)))
    return rows


def fault_row(name, found):
    """A line of the table: signals sent, signals after which nothing differed in the end."""
    sent = sum(f["kills"] for f in found)
    fine = sum(f["kills"] for f in found if not f["differs"])
    return row(name, sent, fine, "signals survived bit for bit", fine / max(1, sent),
               while_writing=sum(f["while_writing"] for f in found),
               steps_lost=max(f["steps_lost"] for f in found), lines=found[-1]["lines"],
               seconds=round(sum(f["seconds"] for f in found)),
               differs="; ".join(f["differs"] for f in found if f["differs"]) or "nothing")


def saving():
    """What a checkpoint costs: size, seconds, share of the training time between two; what determinism costs.
    """
    rows, out = [], Path("out/bench/saving")
    out.mkdir(parents=True, exist_ok=True)
    run = common.start(0, "auto")
    always, every = common.literals(vars(train_pretrain)), train_pretrain.SAVE_EVERY
    for name, sizes in (("6M", dict(dim=256, n_layers=6, n_heads=4)), ("26M", {})):
        model = our_model(compile=False, **sizes)
        optimizers, batch = muon(model), full_rows(train_pretrain.BATCH)
        step = trainer(run, model, optimizers, batch)
        save = functools.partial(common.save, run, out, 1, model, optimizers, {}, always)
        best = functools.partial(common.save_best, run, out, 1, model, {})
        update, = fastest(1, step)
        checkpoint, weights = fastest(REPEAT, save, best)
        between = update * every
        size = [(out / n).stat().st_size / 1e6 for n in ("checkpoint.pt", "best.pt")]
        rows += [row(f"{name}, checkpoint.pt and best.pt", size[1], size[0], "MB"),
                 row(f"{name}, the same, written and on the disk", weights, checkpoint, "s"),
                 row(f"{name}, both, of the training between two (SAVE_EVERY {every})", between,
                     weights + checkpoint, "s", (weights + checkpoint) / between)]
        torch.use_deterministic_algorithms(True)
        strict, = fastest(1, step)
        torch.use_deterministic_algorithms(False)
        seed = fastest(REPEAT, lambda: [common.random_state(run, i) for i in range(1000)])[0] / 1000
        rows += [row(f"{name}, an update, torch's deterministic algorithms against ours", strict, update, "s",
                     strict / update),
                 row(f"{name}, seeding of an update, of its time", update, seed, "s", seed / update)]
    line = lambda: [common.append_line(out / "lines.jsonl", {"step": i, "loss": 1.0}) for i in range(1000)]
    rows.append(row("a line of metrics", None, fastest(REPEAT, line)[0] / 1000, "s"))
    for path in out.iterdir():
        path.unlink()
    return rows


def sharding():
    """Peak memory of each of two processes while they train 73M parameters with AdamW: whole copies against
    SHARD=True."""
    peaks = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        fault_data(root, muons=False)
        words = "DIM=768 N_LAYERS=12 N_HEADS=12 SAMPLE_EVERY=0 OPTIMIZER=adamw BATCH=2 MICRO_BATCH=1 STEPS=4 "
        words += f"SAVE_EVERY=0 EVAL_EVERY=0 HIDDEN_DIM=2048 SEQ_LEN=64 COMPILE=no DATA={root}/tokens"
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc would keep what is freed, on both sides
        for shard in (False, True):
            run_to_end("train_pretrain.py", [*words.split(), f"SHARD={shard}"], root / f"{shard}", 2)
            said = Path(root / f"{shard}.log").read_text()
            peaks[shard] = [int(n) for n in re.findall(r"\d+", re.search("peak memory.*", said)[0])]
    return [row(f"resident set of process {i}, torch's own included", whole, cut, "MiB", whole / cut)
            for i, (whole, cut) in enumerate(zip(peaks[False], peaks[True], strict=True))]


BENCHMARKS = (limits, train, memory, tokenize, startup, generate, rounding, serve_, endure, learn, nsa, dsa,
              chat, impute, faults, saving, sharding)


def main():
    names = {f.__name__.rstrip("_"): f for f in BENCHMARKS}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("\n".join(f"{name:10} {f.__doc__}" for name, f in names.items()))
        raise SystemExit(0 if len(sys.argv) < 2 else 1)
    common.override(globals(), sys.argv[2:])
    name = sys.argv[1]
    rows = names[name]()
    keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in ("work", "seeds")]
    show = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    width = max(len(r["work"]) for r in rows)
    print("  ".join(["work".ljust(width), *(k.rjust(12) for k in keys)]))
    for r in rows:
        print("  ".join([r["work"].ljust(width), *(show(r.get(k)).rjust(12) for k in keys)]))
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    device = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    about = {"rows": rows, "device": device, "versions": versions, "date": datetime.date.today().isoformat()}
    common.write_whole(out / f"{name}.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    print(f"written to {out}/{name}.json ({about['device']}, {about['date']})")
    return rows


if __name__ == "__main__":
    try:
        main()
    except common.BadInput as error:
        raise SystemExit(f"error: bench.py: {error}") from None
