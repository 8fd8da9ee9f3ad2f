"""Train a small language model on text, from nothing to samples.

A decoder-only transformer (grouped-query attention, RoPE, QK-norm, SwiGLU or mixture of experts), or the
classic one of 2017, learns to predict the next token of documents packed whole into rows, none seeing its
neighbour.

    python train_pretrain.py                                      Python's own documentation, 6 minutes
    python train_pretrain.py DATA=my.jsonl.gz OUT=out/mine        rows {"text": ...}, or a .txt
    torchrun --nproc_per_node 4 train_pretrain.py DATA=my.jsonl.gz DIM=512 N_LAYERS=8 N_HEADS=8 STEPS=20000
    python train_pretrain.py EVAL=unseen.jsonl.gz OUT=out/mine    bits per byte of the best checkpoint
    python serve.py PROMPT="The module"                           talk to it
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

import common
from data import prepare_python_docs, prepare_text

# Data
DATA = ""             # .jsonl(.gz), .txt(.gz), or prepare_text.py's folder; "" = Python's documentation
VALID = ""            # a file of held-out text; "" = a share of DATA
VALID_SHARE = 0.01    # share of DATA's documents held out when VALID is empty, chosen by a hash of their text
TOKENIZER = ""        # tokenizer.json; "" = one trained on DATA at first use (or INIT's)
VOCAB_SIZE = 6_400  # tokens of a tokenizer trained here; small, so that a small model is not mostly embedding
SEQ_LEN = 512         # tokens a row, and the model's context
STRIDE = 0  # tokens; 0 = documents packed whole; else windows of SEQ_LEN that begin every STRIDE tokens

# Model: presets of MiniMind's sizes are
#   26M   DIM=512 N_LAYERS=8 N_HEADS=8 N_KV_HEADS=2
#   104M  DIM=768 N_LAYERS=16 N_HEADS=8 N_KV_HEADS=2
#   MoE   DIM=640 N_LAYERS=8 N_HEADS=8 N_KV_HEADS=2 N_EXPERTS=4
MODEL = "lm"          # "lm", or "classic": post-norm encoder layers with a causal mask, sinusoidal positions
DIM = 0               # width; 0 = 256 (lm), 768 (classic)
N_LAYERS = 0          # 0 = 6 (lm), 12 (classic)
N_HEADS = 0           # query heads; 0 = 4 (lm), 12 (classic)
N_KV_HEADS = 2        # key/value heads that the query heads share (lm)
HEAD_DIM = 0          # width of a head (lm); 0 = DIM / N_HEADS
HIDDEN_DIM = 0        # width inside the MLP; 0 = 8/3 DIM up to a multiple of 64 (lm), 3072 (classic)
ATTENTION = "full"    # "nsa": native sparse attention, "window": the last WINDOW tokens only (lm)
WINDOW = 64           # tokens of the sliding window
COMPRESS_BLOCK = 16   # nsa: tokens a compressed block
COMPRESS_STRIDE = 16  # nsa: tokens between their beginnings
COMPRESSION = "mlp"   # nsa: "mlp", "pool", "conv"
SELECT_BLOCK = 16     # nsa: tokens a selected block
N_SELECTED = 4        # nsa: blocks a query selects, besides its own
TIED = True           # head = embedding (lm)
QK_NORM = True        # RMSNorm on queries and keys (lm); Qwen3 has it
THETA = 1e6           # base of the rotary angles (lm)
DROPOUT = 0.0         # probability; more than 0 only when epochs repeat many times
N_EXPERTS = 0         # routed experts (lm); 0 = a plain SwiGLU
N_ACTIVE = 2          # experts a token visits
N_SHARED = 1          # experts that every token visits
AUX_LOSS_ALPHA = 0.1  # weight of the experts' balance loss

# Optimization
STEPS = 350           # updates
BATCH = 16            # rows per update, over all processes
MICRO_BATCH = 8       # rows per forward and process
OPTIMIZER = "muon"    # "muon" for the hidden matrices with AdamW for the rest, or "adamw" for all
LR = 3e-3             # peak of AdamW
MUON_LR = 0.02        # peak of Muon
WEIGHT_DECAY = 0.1    # of matrices, times the learning rate
WARMUP = 30           # updates
SCHEDULE = "cosine"   # or "wsd": warm-up, stable, linear decay over the last 30%
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "auto"  # bfloat16 where the device has it and it is faster, else float32; float16 comes with a scaler
SHARD = False         # True: weights, gradients and AdamW's state cut over the processes (FSDP2); needs adamw
COMPILE = "auto"      # "yes", "no"; "auto" = from 200 updates on, where there is a C++ compiler
OUT = "out/pretrain"
INIT = ""             # folder of a checkpoint whose weights, sizes and tokenizer to start from
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 50       # updates; 0 = at the end only
EVAL_ROWS = 128       # rows of held-out text a validation reads; 0 = all (the last one always does)
SAVE_EVERY = 50       # updates; 0 = at the end only
SAMPLE_EVERY = 100    # updates; 0 = never
SAMPLE_PROMPT = ""    # how the samples begin
WANDB = "disabled"    # "offline", "online"
NIGHT = ""  # "22:00-07:00": half the threads, GPU memory and micro-batch in those hours; same updates
EVAL = ""             # a file to score with the best checkpoint in OUT instead of training


class Rows:
    """Rows of token files: packed documents, or windows of the whole stream when `stride` > 0."""

    def __init__(self, folder, split, seq_len, stride=0):
        self.tokens = prepare_text.mapped(folder, f"{split}.bin")
        bounds = prepare_text.bounds_of(folder, split, self.tokens)
        self.seq_len, self.stride, self.epoch = seq_len, stride, None
        if stride:
            last = len(self.tokens) - seq_len - 1
            if last < 0:
                raise common.BadInput(
                    f"SEQ_LEN {seq_len} is longer than all of the {len(self.tokens)} tokens of {split}"
                )
            self.starts = np.unique(np.append(np.arange(0, last, stride), last))
        else:  # n tokens make n - 1 predictions; a document longer than a row is cut, nothing lost or twice
            predictions = np.diff(bounds) - 1
            pieces = -(-predictions // seq_len)
            inside = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            self.starts = np.repeat(bounds[:-1], pieces) + inside * seq_len
            self.lengths = np.minimum(np.repeat(predictions, pieces) - inside * seq_len, seq_len)
        self._plan(0)
        self.count = len(self.order) if stride else len(self.bounds) - 1
        if not self.count:
            raise common.BadInput(f"{folder} has no document in its {split} part; change VALID_SHARE")

    def _plan(self, epoch):
        if epoch != self.epoch:
            seed = SEED * 1_000_003 + epoch
            if self.stride:
                self.order = np.random.default_rng(seed).permutation(len(self.starts))
            else:
                self.order, self.bounds = common.pack(self.lengths, self.seq_len, seed)
            self.epoch = epoch

    def documents(self, row):
        """The (tokens,) of each document, or piece of one, in a row; rows go on through the epochs."""
        self._plan(row // self.count)
        row %= self.count
        if self.stride:
            start = self.starts[self.order[row]]
            return [(self.tokens[start:start + self.seq_len + 1],)]
        return [(self.tokens[self.starts[d]:self.starts[d] + self.lengths[d] + 1],)
                for d in self.order[self.bounds[row]:self.bounds[row + 1]]]

    def batches(self, rows, micro, device):
        """(ids, docs, targets) (micro, T) of the rows, `micro` at a time; missing rows are padding."""
        for at in range(0, len(rows), micro):
            chosen = [[] if r is None else self.documents(r) for r in rows[at:at + micro]]
            batch = common.collate(chosen + [[]] * (micro - len(chosen)), self.seq_len)
            yield tuple(x.to(device, non_blocking=True) for x in batch)


def text_files(run, path, **options):
    """The folder of token files of `path`; made by one process a machine, while the others wait."""
    folder = prepare_text.prepare(path, **options) if run.local_rank == 0 else None
    run.wait(patiently=True)
    return folder or prepare_text.prepare(path, **options)


def make_model(vocab_size):
    if MODEL == "classic":
        return common.Classic(vocab_size, DIM or 768, N_LAYERS or 12, N_HEADS or 12, HIDDEN_DIM or 3072,
                              SEQ_LEN, DROPOUT)
    if MODEL != "lm":
        raise common.BadInput(f"MODEL {MODEL!r} is neither lm nor classic")
    sparse = {"nsa": dict(window=WINDOW, compress_block=COMPRESS_BLOCK, compress_stride=COMPRESS_STRIDE,
                          compression=COMPRESSION, select_block=SELECT_BLOCK, n_selected=N_SELECTED),
              "window": {"window": WINDOW}}.get(ATTENTION)
    return common.LM(vocab_size, DIM or 256, N_LAYERS or 6, N_HEADS or 4, N_KV_HEADS, HEAD_DIM, HIDDEN_DIM,
                     SEQ_LEN, THETA, tied=TIED, qk_norm=QK_NORM, dropout=DROPOUT, n_experts=N_EXPERTS,
                     n_active=N_ACTIVE, n_shared=N_SHARED, attention=ATTENTION, sparse=sparse)


@torch.no_grad()
def evaluate(run, model, data, table, limit=0):
    """Nats per token and bits per byte of held-out rows (the first `limit`, 0 = all), over all processes."""
    model.eval()
    sizes = torch.tensor([len(b) for b in table], device=run.device)
    totals = [0.0, 0, 0]  # nats, tokens, bytes
    count = min(limit or data.count, data.count)
    rows = list(range(run.rank, count, run.world))
    rows += [None] * (-(-count // run.world) - len(rows))  # sharded processes must do as many forwards each
    for ids, docs, targets in data.batches(rows, MICRO_BATCH, run.device):
        with run.autocast():
            loss, count, _ = model(ids, docs, targets)
        bytes_ = sizes[targets[targets != common.IGNORE]].sum()
        totals = [a + float(b) for a, b in zip(totals, (loss, count, bytes_), strict=True)]
    model.train()
    nats, tokens, size = run.sum(*totals)
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / max(1, size),
            "tokens": int(tokens), "bytes": int(size)}


def sample(model, tokenizer, table, step):
    """Three continuations of SAMPLE_PROMPT, at temperature 0.8."""
    model.eval()
    prompt = [common.BOS, *common.encode(tokenizer, SAMPLE_PROMPT)]
    texts = ["", "", ""]
    length = min(96, model.context - len(prompt))
    seeds = [step, step + 1, step + 2]
    for row, piece in common.stream(model, table, [prompt] * 3, length, temperature=0.8, seeds=seeds):
        texts[row] += piece
    model.train()
    return [SAMPLE_PROMPT + text for text in texts]


def score():
    """EVAL: bits per byte of a file that the best checkpoint in OUT has never seen."""
    run = common.start(SEED, DTYPE)
    model = common.build(common.load(common.newest_checkpoint(OUT))).to(run.device)
    tokenizer = Path(OUT) / "tokenizer.json"
    folder = text_files(run, EVAL, tokenizer=tokenizer, share=1.0)
    table = common.token_bytes(common.load_tokenizer(tokenizer))
    found = evaluate(run, model, Rows(folder, "valid", model.sizes["seq_len"]), table)
    found["bad_rows"] = json.loads((folder / "meta.json").read_text())["bad_rows"]
    common.write_result(run, OUT, found)
    run.say(f"{EVAL}: " + common.line_of(None, found))
    common.stop(run)
    return found


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    common.divisible(
        MICRO_BATCH=(MICRO_BATCH, 1), STEPS=(STEPS, 1), BATCH=(BATCH, run.world), SEQ_LEN=(SEQ_LEN, 1)
    )
    common.within(0, math.inf, DIM=DIM, N_LAYERS=N_LAYERS, N_HEADS=N_HEADS, HEAD_DIM=HEAD_DIM, STRIDE=STRIDE,
                  HIDDEN_DIM=HIDDEN_DIM, N_EXPERTS=N_EXPERTS, N_SHARED=N_SHARED, LR=LR, MUON_LR=MUON_LR,
                  AUX_LOSS_ALPHA=AUX_LOSS_ALPHA, WEIGHT_DECAY=WEIGHT_DECAY, WARMUP=WARMUP, CLIP=CLIP,
                  PATIENCE=PATIENCE, LOG_EVERY=LOG_EVERY, EVAL_EVERY=EVAL_EVERY, EVAL_ROWS=EVAL_ROWS,
                  SAVE_EVERY=SAVE_EVERY, SAMPLE_EVERY=SAMPLE_EVERY)
    common.within(0, 1, FLOOR=FLOOR, VALID_SHARE=VALID_SHARE)
    common.within(0, 0.99, DROPOUT=DROPOUT)
    common.within(1, math.inf, THETA=THETA, N_KV_HEADS=N_KV_HEADS, MAX_BAD_STEPS=MAX_BAD_STEPS)
    common.in_window(NIGHT)
    if SHARD and (OPTIMIZER != "adamw" or MODEL != "lm" or run.dtype == torch.float16):
        raise common.BadInput("SHARD=True needs OPTIMIZER=adamw (Muon turns whole matrices), MODEL=lm and no "
                              f"float16; got {OPTIMIZER}, {MODEL}, {str(run.dtype)[6:]}")
    init = common.load(common.newest_checkpoint(INIT)) if INIT else None

    path, options = (
        DATA,
        dict(tokenizer=TOKENIZER, vocab_size=VOCAB_SIZE, share=0.0 if VALID else VALID_SHARE),
    )
    if INIT:
        options["tokenizer"] = Path(common.newest_checkpoint(INIT)).parent / "tokenizer.json"
    if not path:
        path = prepare_python_docs.default(
            run, "pretrain.jsonl", "using Python's own documentation; for your text: DATA=my.jsonl.gz"
        )
    folder = text_files(run, path, **options)
    meta = json.loads((folder / "meta.json").read_text())
    held = text_files(run, VALID, tokenizer=folder / "tokenizer.json", share=1.0) if VALID else folder
    train, valid = Rows(folder, "train", SEQ_LEN, STRIDE), Rows(held, "valid", SEQ_LEN)
    tokenizer = common.load_tokenizer(folder / "tokenizer.json")
    table = common.token_bytes(tokenizer)

    model = common.build(init, seq_len=SEQ_LEN) if init else make_model(len(table))
    if model.sizes["vocab_size"] != len(table):
        raise common.BadInput(
            f"INIT {INIT} has {model.sizes['vocab_size']} tokens, its tokenizer {len(table)}"
        )
    model = model if SHARD and run.world > 1 else model.to(run.device)  # shards go there by themselves
    common.compile_layers(model, COMPILE, STEPS)
    net = run.wrap(model, SHARD)  # model: saved, evaluated, sampled; net: called by the loss only
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants = common.literals(globals())
    fingerprint = f"{meta['fingerprint']} {json.loads((held / 'meta.json').read_text())['fingerprint']}"
    found = common.resume(run, OUT, constants, RESUME, fingerprint, SHARD)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    if run.first and not found:
        common.copy_tokenizer(folder, OUT)
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    parameters = sum(p.numel() for p in model.parameters())
    record.show(f"{parameters / 1e6:.1f}M parameters, {meta['train']['tokens'] / 1e6:.2f}M tokens in "
                f"{train.count} rows, {run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}")

    def loss_of(batch):
        loss, count, balance = net(*batch)
        return loss + AUX_LOSS_ALPHA * balance, count

    def validate(step):
        metrics = evaluate(run, model, valid, table, EVAL_ROWS)
        record.log(step, **{f"valid_{k}": v for k, v in metrics.items()})
        state["since"] += 1
        if metrics["nats_per_token"] < state["best"]:
            state.update(best=metrics["nats_per_token"], since=0)
            common.save_best(run, OUT, step, model, metrics)

    if first == 0:
        validate(0)
    share = BATCH // run.world
    positions = 0
    for step in range(first, STEPS):
        gentle = common.in_window(NIGHT)
        common.be_gentle(run, gentle)
        micro = min(share, max(1, MICRO_BATCH // 2) if gentle else MICRO_BATCH)
        rows = [step * BATCH + run.rank * share + i for i in range(share)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        batches = list(train.batches(rows, micro, run.device))
        done = common.update(run, net, optimizers, batches, loss_of, CLIP, step)

        step, positions = step + 1, positions + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            begins = tokenizer.decode(train.documents(rows[0])[0][0][:40].tolist())
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR} or MUON_LR "
                                  f"{MUON_LR}, or look at rows {rows[0]}-{rows[-1]}, which begin {begins!r}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            record.progress(step, positions, "tokens", loss=done.loss, grad_norm=done.grad_norm,
                            lr=optimizers[0].param_groups[0]["lr"])
            positions = 0
        record.tick(step)
        last = step == STEPS
        if EVAL_EVERY and step % EVAL_EVERY == 0 or last:
            validate(step)
            last = last or bool(PATIENCE) and state["since"] >= PATIENCE
        if SAMPLE_EVERY and step % SAMPLE_EVERY == 0:
            whole = common.weights_of(model, run.first) if SHARD else None
            if run.first:
                texts = sample(common.build(whole) if SHARD else model, tokenizer, table, step)
                common.append_line(Path(OUT) / "samples.jsonl", {"step": step, "texts": texts})
                record.show("\n".join(f"  sample | {t}" for t in texts))
        if last:
            break
        if SAVE_EVERY and step % SAVE_EVERY == 0 or done.signal:
            common.save(run, OUT, step, model, optimizers, state, constants)
        if done.signal:
            record.close()
            common.leave(run, OUT, step, done.signal)

    run.say(f"peak memory of each process: {run.peak_mib()} MiB")
    best = run.share(common.load(Path(OUT) / "best.pt") if run.first else None)
    judged = common.build(best)
    judged = run.wrap(judged, True) if SHARD and run.world > 1 else judged.to(run.device)
    metrics = evaluate(run, judged, valid, table)  # of all held-out rows
    record.log(step, **metrics, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    if run.first:
        common.plot_curves(OUT, ["loss", "valid_nats_per_token"], ["valid_bits_per_byte"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/best.pt, model.safetensors, curves.png; try: "
            f'python serve.py CHECKPOINT={OUT} PROMPT="..."')
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
