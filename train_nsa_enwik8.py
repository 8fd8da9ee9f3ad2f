"""Train a byte-level language model with native sparse attention; with full or window attention to compare.

Every byte of a file is predicted from those before it; the score is bits per byte of held-out bytes. Native
sparse attention (arXiv 2502.11089) reads compressed blocks, a few selected blocks and a sliding window, so
that time and memory grow with the length, not with its square.

    python train_nsa_enwik8.py                                     Python's own source text, no download
    python data/prepare_enwik8.py && python train_nsa_enwik8.py    enwik8: 90 / 5 / 5 MB by position
    python train_nsa_enwik8.py DATA=any.file OUT=out/mine          any bytes; .gz and .zip are unpacked
    torchrun --nproc_per_node 4 train_nsa_enwik8.py ATTENTION=full
    python train_nsa_enwik8.py EVAL=unseen.file OUT=out/mine       bits per byte of the best checkpoint
"""

import hashlib
import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch

import common
from data import prepare_enwik8

# Data
DATA = ""             # a file; "" = data/enwik8/enwik8 if it is there, else Python's standard library as text
SPLIT = (0.05, 0.05)  # shares of DATA for validation and test, from its end; whole numbers are bytes
SEQ_LEN = 512         # bytes a row, and the model's context
PROBE_SHARE = 0.0     # share of rows that are probes: random bytes with copies and needles far apart

# Model. Other presets:
#   two CPU cores, an hour       DIM=256 N_LAYERS=6 N_HEADS=4 N_KV_HEADS=2 OPTIMIZER=muon LR=3e-3
#   8,192 bytes on two cores     SEQ_LEN=8192 BATCH=2 MICRO_BATCH=1 DIM=256 N_LAYERS=4 N_HEADS=4 N_KV_HEADS=2
#   65,536 bytes on one GPU      SEQ_LEN=65536 BATCH=8 MICRO_BATCH=1
ATTENTION = "nsa"     # "nsa", "full", "window": the last WINDOW bytes only
DIM = 512             # width
N_LAYERS = 6
N_HEADS = 8           # query heads
N_KV_HEADS = 4        # key/value heads that the query heads share
HEAD_DIM = 64         # width of a head
N_BEFORE = 0          # bytes before each whose embeddings are added to its own: copying takes one layer less
HIDDEN_DIM = 0        # width inside the MLP; 0 = 8/3 DIM up to a multiple of 64
THETA = 1e4           # base of the rotary angles
WINDOW = 64           # bytes of the sliding window
COMPRESS_BLOCK = 16   # bytes a compressed block
COMPRESS_STRIDE = 16  # bytes between their beginnings; fewer than COMPRESS_BLOCK: they overlap
COMPRESSION = "mlp"   # "mlp", "pool", "conv"
SELECT_BLOCK = 16     # bytes a selected block
N_SELECTED = 4        # blocks a query selects, besides its own
FIRST_BLOCK = False   # the first block is always one of them
LOCAL_BLOCKS = 0      # so many blocks before the query's own are always among them
N_MEMORY = 0          # learned keys and values beside the compressed ones
DROPOUT = 0.0         # probability

# Optimization
STEPS = 2_000         # updates; a GPU does 100,000 in some hours
BATCH = 16            # rows per update, over all processes
MICRO_BATCH = 4       # rows per forward and process
OPTIMIZER = "adam"    # "adam", "adamw", or "muon" for the hidden matrices with AdamW for the rest
LR = 1e-4             # peak of Adam and AdamW
MUON_LR = 0.02        # peak of Muon
WEIGHT_DECAY = 0.1    # of matrices, times the learning rate; not with adam
WARMUP = 50           # updates
SCHEDULE = "cosine"   # or "wsd": warm-up, stable, linear decay over the last 30%
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 0.5            # largest gradient norm; 0 = never clip
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "auto"        # bfloat16 where the device has it and it is faster, else float32
COMPILE = "auto"      # "yes", "no"; "auto" = from 200 updates on, where there is a C++ compiler
OUT = "out/nsa"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 200      # updates; 0 = at the end only
EVAL_BYTES = 500_000  # bytes of the validation split that a validation reads; 0 = all (as the last one)
SAVE_EVERY = 100      # updates; 0 = at the end only
PROBE = False         # measure at the end how far back it finds copies and needles: probe.json, probe.png
SAMPLE_EVERY = 500    # updates; 0 = never
SAMPLE_LEN = 256      # bytes generated after PRIME_LEN bytes of the validation split
PRIME_LEN = 64
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # a file to score with the best checkpoint in OUT instead of training


def standard_library():
    """The .py files of Python's standard library, one after the other by name; not its tests or packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not {"test", "tests", "site-packages", "dist-packages",
             "idle_test", "__pycache__"} & set(p.relative_to(root).parts)]
    return b"".join(p.read_bytes() for p in files)


def load_bytes(run):
    """The bytes of DATA as uint8, and its name."""
    enwik8 = Path(__file__).parent / "data" / "enwik8" / "enwik8"
    if not DATA and not enwik8.exists():
        run.say("DATA is empty and there is no data/enwik8: using the source text of Python's standard "
                "library; for enwik8: python data/prepare_enwik8.py")
        return np.frombuffer(standard_library(), np.uint8), "Python's standard library"
    path = Path(DATA) if DATA else enwik8
    return np.frombuffer(prepare_enwik8.read(path), np.uint8), str(path)


def split(data, name):
    """Training, validation and test bytes by position, in this order."""
    fits = [type(s) is int and s >= 0 or type(s) is float and 0 <= s < 1 for s in SPLIT]
    if fits != [True, True] or SPLIT[0] in (0, 1):
        raise common.BadInput(f"SPLIT {SPLIT} must be two numbers, of validation (at least 2 bytes) and "
                              "test: shares below 1 or whole numbers of bytes")
    sizes = [s if type(s) is int else int(s * len(data)) for s in SPLIT]
    cut = len(data) - sum(sizes)
    if sizes[0] < 2 or cut < SEQ_LEN + 1:
        raise common.BadInput(f"{name} has {len(data)} bytes: too few for SPLIT {SPLIT} and training rows of "
                              f"SEQ_LEN {SEQ_LEN}; lower them")
    return data[:cut], data[cut:cut + sizes[0]], data[cut + sizes[0]:]


def windows(data, starts):
    """Rows (n, SEQ_LEN + 1) of the bytes from each start on, -1 behind the last."""
    index = starts[:, None] + np.arange(SEQ_LEN + 1)
    return np.where(index < len(data), data[np.minimum(index, len(data) - 1)].astype(np.int64), -1)


def batch_of(rows, device, counts=None):
    """(ids, docs, targets) (n, SEQ_LEN) of rows (n, SEQ_LEN + 1); `counts`: which bytes the loss counts."""
    targets = np.where((rows >= 0) if counts is None else (rows >= 0) & counts, rows, common.IGNORE)[:, 1:]
    rows, targets = torch.from_numpy(rows), torch.from_numpy(targets)
    ids, docs = rows[:, :-1].clamp(min=0), torch.where(rows[:, 1:] < 0, -1, 0)
    return tuple(x.contiguous().to(device, non_blocking=True) for x in (ids, docs, targets))


def probes(rng, count):
    """Rows (count, SEQ_LEN + 1) of random capitals in which stretches of random small letters stand at two
    places each: 32 letters to copy, or a needle, `#` with 4 letters of key and 8 of value. And how far back
    each byte that can be known lies, negative for needles, 0 where it cannot: beyond a copy's first 4 letters
    and a needle's key."""
    rows = rng.integers(ord("A"), ord("Z") + 1, (count, SEQ_LEN + 1))
    back = np.zeros(rows.shape, np.int64)
    for row, far in zip(rows, back, strict=True):
        free = np.ones(len(row), bool)
        for _ in range(SEQ_LEN // 32):
            needle = rng.random() < 0.5
            length, key = (13, 5) if needle else (32, 4)
            distance = int(np.exp(rng.uniform(np.log(length + 1), np.log(SEQ_LEN - length))))
            at = int(rng.integers(0, SEQ_LEN + 2 - distance - length))
            places = slice(at, at + length), slice(at + distance, at + distance + length)
            if not all(free[p].all() for p in places):
                continue
            stretch = rng.integers(ord("a"), ord("z") + 1, length)
            if needle:
                stretch[0] = ord("#")
            for p in places:
                row[p], free[p] = stretch, False
            far[at + distance + key:at + distance + length] = -distance if needle else distance
    return rows, back


def training_batches(data, step, run):
    """This process's micro-batches of an update: windows that begin anywhere and probes, drawn from (SEED,
    step). Of a probe only what can be known counts: the rest would be noise."""
    rng = np.random.default_rng((SEED, step))
    rows = windows(data, rng.integers(0, len(data) - SEQ_LEN, BATCH))
    counts = np.ones(rows.shape, bool)
    chosen = rng.random(BATCH) < PROBE_SHARE
    if chosen.any():
        rows[chosen], back = probes(rng, int(chosen.sum()))
        counts[chosen] = back != 0
    share = BATCH // run.world
    rows, counts = (x[run.rank * share:(run.rank + 1) * share] for x in (rows, counts))
    return [batch_of(rows[i:i + MICRO_BATCH], run.device, counts[i:i + MICRO_BATCH])
            for i in range(0, share, MICRO_BATCH)]


@torch.no_grad()
def probe(run, model):
    """Share of known bytes that the model ranks first, by distance: {"copy" or "needle": {distance:
    share}}."""
    model.eval()
    rows, back = probes(np.random.default_rng((SEED, 0, 2)), 4 * max(16, 65_536 // SEQ_LEN))
    edges = 2 ** np.arange(4, SEQ_LEN.bit_length() + 1)
    hits, total = np.zeros((2, 2, len(edges)))
    for i in range(run.rank * MICRO_BATCH, len(rows), run.world * MICRO_BATCH):
        ids, docs, targets = batch_of(rows[i:i + MICRO_BATCH], run.device)
        with run.autocast():
            hidden = model.hidden(ids, docs)[0]
        far = back[i:i + MICRO_BATCH, 1:]
        known = torch.from_numpy(far != 0).to(run.device)
        likeliest = (hidden[known] @ model.head_weight.T.to(hidden.dtype)).argmax(-1)
        right = (likeliest == targets[known]).cpu().numpy()
        where = (far[far != 0] < 0).astype(int), np.searchsorted(edges, abs(far[far != 0]))
        np.add.at(hits, where, right)
        np.add.at(total, where, 1)
    hits, total = (np.array(run.sum(*x.ravel())).reshape(2, -1) for x in (hits, total))
    model.train()
    return {name: {f"{edge // 2}-{edge}": round(hits[i, j] / total[i, j], 4) for j, edge in enumerate(edges)
                   if total[i, j]} for i, name in enumerate(("copy", "needle"))}


def plot_probe(found):
    """OUT/probe.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 3.8))
    for name, by_distance in found.items():
        axis.semilogx([int(d.split("-")[1]) for d in by_distance], by_distance.values(), "o-", label=name)
    axis.axhline(1 / 26, color="gray", linestyle=":", label="guessing")
    axis.set(title=f"{ATTENTION} attention, window {WINDOW} × {N_LAYERS} layers", ylim=(0, 1),
             xlabel="bytes back, up to", ylabel="share of bytes right")
    axis.legend()
    figure.tight_layout()
    figure.savefig(Path(OUT) / "probe.png", dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def evaluate(run, model, data, limit=0):
    """Bits per byte of the first `limit` bytes (0 = all), in windows of SEQ_LEN; the very first byte is
    given."""
    model.eval()
    data = data[:limit + 1] if limit else data
    starts = np.arange(0, len(data) - 1, SEQ_LEN)[run.rank::run.world]
    totals = [0.0, 0]
    for i in range(0, len(starts), MICRO_BATCH):
        with run.autocast():
            loss, count, _ = model(*batch_of(windows(data, starts[i:i + MICRO_BATCH]), run.device))
        totals = [totals[0] + float(loss), totals[1] + int(count)]
    model.train()
    nats, count = run.sum(*totals)
    return {"bits_per_byte": nats / count / math.log(2), "bytes": int(count)}


def sample(model, valid, step):
    """PRIME_LEN bytes of the validation split and what the model makes of them, as text."""
    model.eval()
    start = int(np.random.default_rng((SEED, step, 1)).integers(0, max(1, len(valid) - PRIME_LEN)))
    prime = valid[start:start + PRIME_LEN].tolist()
    length = min(SAMPLE_LEN, model.context - len(prime))
    made = [row[0] for row in common.generate(model, [prime], length, temperature=0.8, seeds=step, eos=-1)]
    model.train()
    return [bytes(part).decode("utf-8", "replace") for part in (prime, made)]


def make_model():
    sparse = dict(window=WINDOW, compress_block=COMPRESS_BLOCK, compress_stride=COMPRESS_STRIDE,
                  select_block=SELECT_BLOCK, n_selected=N_SELECTED, first_block=FIRST_BLOCK,
                  local_blocks=LOCAL_BLOCKS, compression=COMPRESSION, n_memory=N_MEMORY)
    if ATTENTION != "nsa":
        sparse = {"window": WINDOW} if ATTENTION == "window" else None
    return common.LM(256, DIM, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, HIDDEN_DIM, SEQ_LEN, THETA,
                     dropout=DROPOUT, attention=ATTENTION, sparse=sparse, n_before=N_BEFORE)


def score():
    """EVAL: bits per byte of a file that the best checkpoint in OUT has never seen."""
    global SEQ_LEN
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1))
    model = common.build(common.load(common.newest_checkpoint(OUT))).to(run.device)
    if model.sizes["vocab_size"] != 256:
        raise common.BadInput(f"{OUT} holds a model of {model.sizes['vocab_size']} tokens, not of bytes; for "
                              f"it: python train_pretrain.py EVAL={EVAL} OUT={OUT}")
    SEQ_LEN = model.context
    data = np.frombuffer(prepare_enwik8.read(Path(EVAL)), np.uint8)
    if len(data) < 2:
        raise common.BadInput(f"{EVAL} has {len(data)} bytes; at least 2 are needed")
    found = evaluate(run, model, data)
    common.write_result(run, OUT, found)
    run.say(f"{EVAL}: " + common.line_of(None, found))
    common.stop(run)
    return found


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1), STEPS=(STEPS, 1), BATCH=(BATCH, run.world),
                     SEQ_LEN=(SEQ_LEN, 1), SAMPLE_LEN=(SAMPLE_LEN, 1))
    common.within(0, math.inf, HIDDEN_DIM=HIDDEN_DIM, LR=LR, MUON_LR=MUON_LR, WEIGHT_DECAY=WEIGHT_DECAY,
                  CLIP=CLIP, WARMUP=WARMUP, PATIENCE=PATIENCE, LOG_EVERY=LOG_EVERY, EVAL_EVERY=EVAL_EVERY,
                  EVAL_BYTES=EVAL_BYTES, SAVE_EVERY=SAVE_EVERY, SAMPLE_EVERY=SAMPLE_EVERY)
    common.within(0, 1, FLOOR=FLOOR, PROBE_SHARE=PROBE_SHARE)
    if SAMPLE_EVERY:
        common.within(1, SEQ_LEN - 1, PRIME_LEN=PRIME_LEN)
    common.divisible(SEQ_LEN=(SEQ_LEN, 64) if PROBE or PROBE_SHARE else (SEQ_LEN, 1))
    common.within(0, 0.99, DROPOUT=DROPOUT)
    common.within(0, 8, N_BEFORE=N_BEFORE)
    common.within(1, math.inf, THETA=THETA, MAX_BAD_STEPS=MAX_BAD_STEPS)
    data, name = load_bytes(run)
    train, valid, test = split(data, name)

    model = make_model().to(run.device)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants, fingerprint = common.literals(globals()), hashlib.sha256(data).hexdigest()[:16]
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    common.compile_layers(model, COMPILE, STEPS)
    net = run.wrap(model)  # model: saved, evaluated, sampled; net: called by the loss only
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = " + ".join(f"{len(x) / 1e6:.2f}" for x in (train, valid, test))
    record.show(f"{ATTENTION} attention, {parameters / 1e6:.1f}M parameters; {name}: {sizes} MB; "
                f"{run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}")

    def loss_of(batch):
        loss, count, _ = net(*batch)
        return loss, count

    def validate(step):
        metrics = evaluate(run, model, valid, EVAL_BYTES)
        record.log(step, **{f"valid_{k}": v for k, v in metrics.items()})
        state["since"] += 1
        if metrics["bits_per_byte"] < state["best"]:
            state.update(best=metrics["bits_per_byte"], since=0)
            common.save_best(run, OUT, step, model, metrics)

    if first == 0:
        validate(0)
    seen = 0
    for step in range(first, STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        done = common.update(run, net, optimizers, training_batches(train, step, run), loss_of, CLIP, step)

        step, seen = step + 1, seen + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR} or MUON_LR "
                                  f"{MUON_LR}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            record.progress(step, seen, "bytes", loss=done.loss, bits_per_byte=done.loss / math.log(2),
                            grad_norm=done.grad_norm, lr=optimizers[0].param_groups[0]["lr"])
            seen = 0
        record.tick(step)
        last = step == STEPS
        if EVAL_EVERY and step % EVAL_EVERY == 0 or last:
            validate(step)
            last = last or bool(PATIENCE) and state["since"] >= PATIENCE
        if SAMPLE_EVERY and step % SAMPLE_EVERY == 0 and run.first:
            prime, made = sample(model, valid, step)
            common.append_line(Path(OUT) / "samples.jsonl", {"step": step, "prime": prime, "sample": made})
            record.show(f"  sample | {prime}\n  -> | {made}")
        if last:
            break
        if SAVE_EVERY and step % SAVE_EVERY == 0 or done.signal:
            common.save(run, OUT, step, model, optimizers, state, constants)
        if done.signal:
            record.close()
            common.leave(run, OUT, step, done.signal)

    best = run.share(common.load(Path(OUT) / "best.pt") if run.first else None)
    judged = common.build(best).to(run.device)
    metrics = evaluate(run, judged, valid)                       # of the whole split
    if len(test) > 1:                                            # looked at once, here
        metrics |= {f"test_{k}": v for k, v in evaluate(run, judged, test).items()}
    if PROBE:
        found = probe(run, model)
        if run.first:
            text = json.dumps(found, indent=1).encode()
            common.write_whole(Path(OUT) / "probe.json", lambda file: file.write(text))
            plot_probe(found)
        metrics |= {f"probe_{k}": min(v.values()) for k, v in found.items()}
    record.log(step, **metrics, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    if run.first:
        common.plot_curves(OUT, ["loss"], ["valid_bits_per_byte"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/best.pt, model.safetensors, curves.png")
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
