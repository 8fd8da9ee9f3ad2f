"""Distil a large chat model into a smaller one, on conversations.

The student learns from the answers and from what the teacher would have said at each of their tokens:
alpha × cross-entropy + (1 - alpha) × T² × KL(teacher || student) at temperature T (arXiv 1503.02531). Teacher
and student share the tokenizer; the teacher is only read. No logits of a whole batch are held.

    python train_distill.py                                        after train_sft.py: half as wide and deep
    python train_distill.py DATA=chats.jsonl.gz TEACHER=out/chat DIM=192 N_LAYERS=4 OUT=out/small
    python train_distill.py DATA=chats.jsonl.gz TEACHER=out/chat INIT=out/small-pretrained OUT=out/small
    python train_distill.py ALPHA=1.0                              the same student without a teacher
    python train_distill.py EVAL=unseen.jsonl.gz OUT=out/small     nats per answer token, exact matches
"""

import math
from pathlib import Path

import torch
from torch import nn

import common
from data import prepare_chats, prepare_python_docs, prepare_text

# Data
DATA = ""             # .jsonl(.gz) of {"conversations": [{"role", "content"}]}; "" = Python's documentation
VALID = ""            # a file of held-out conversations; "" = a share of DATA
VALID_SHARE = 0.02    # share of DATA held out when VALID is empty, by a hash of the first question
SEQ_LEN = 0           # tokens a row; 0 = the checkpoint's context
EXACT_ROWS = 200      # held-out conversations whose last answer is generated and compared; 0 = none
EXACT_TOKENS = 48     # compared are answers up to this length

# Model
TEACHER = "out/sft"   # folder of the model to learn from
TEACHER_DTYPE = "bfloat16"  # it is only read; "float32"
INIT = ""             # folder of a student to start from; "" = a new one of these sizes
DIM = 0               # width; 0 = half the teacher's
N_LAYERS = 0          # 0 = half the teacher's
N_HEADS = 0           # query heads; 0 = half the teacher's
N_KV_HEADS = 0        # key/value heads; 0 = half the teacher's, at least 1
DROPOUT = 0.0         # probability
ALPHA = 0.3           # weight of the answers; 1 - ALPHA of the teacher
TEMPERATURE = 1.0     # above 1 softens both distributions; 2 learned slower where answers are exact

# Optimization
STEPS = 300           # updates
BATCH = 16            # rows per update, over all processes
MICRO_BATCH = 8       # rows per forward and process
OPTIMIZER = "muon"    # "muon" for the hidden matrices with AdamW for the rest, "adamw" for all
LR = 3e-3             # peak of AdamW
MUON_LR = 0.02        # peak of Muon
WEIGHT_DECAY = 0.0    # of matrices, times the learning rate
WARMUP = 20           # updates
SCHEDULE = "cosine"   # or "wsd": warm-up, stable, linear decay over the last 30%
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
AUX_LOSS_ALPHA = 0.1  # weight of the experts' balance loss
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "auto"        # bfloat16 where the device has it and it is faster, else float32
OUT = "out/distill"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 50       # updates; 0 = at the end only
EVAL_ROWS = 64        # rows of held-out conversations a validation reads; 0 = all (the last one always does)
SAVE_EVERY = 50       # updates; 0 = at the end only
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # a file to score with the best checkpoint in OUT instead of training


class Student(nn.Module):
    """What the loss calls: student and loss in one forward, so that several processes synchronise it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, docs, targets, teacher):
        """(sum over supervised tokens of the mixed loss, count); teacher: (hidden states (B, T, D'), head
        (V, D'))."""
        hidden, balance = self.model.hidden(ids, docs)
        known = (targets.flatten() != common.IGNORE).nonzero()[:, 0]
        loss = Distilled.apply(hidden.flatten(0, 1)[known], self.model.head_weight,
                               teacher[0].flatten(0, 1)[known], teacher[1], targets.flatten()[known], ALPHA,
                               TEMPERATURE)
        return loss + AUX_LOSS_ALPHA * balance, len(known)


class Distilled(torch.autograd.Function):
    """Σ alpha × cross-entropy + (1 - alpha) × T² × KL(teacher || student) over tokens: hidden (N, D) and
    weight (V, D) of the student, the same of the teacher (N, D'), (V, D'), targets (N,). Chunks of logits;
    gradients are made while a chunk's are there; softmaxes in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, known, head, targets, alpha, temperature):
        step = max(64, 2**21 // weight.shape[0])
        cast, wide = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.promote_types(wide, torch.float32), device=hidden.device)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for begin in range(0, len(hidden), step):
            h, y = hidden[begin:begin + step], targets[begin:begin + step, None]
            logits = (h @ cast.T).to(wide)
            logp = logits.log_softmax(-1)
            total -= alpha * logp.gather(1, y).sum()
            d = logp.exp_().scatter_add_(1, y, logp.new_full(y.shape, -1)).mul_(alpha)
            if alpha < 1:
                soft = (logits / temperature).log_softmax(-1)
                wanted = ((known[begin:begin + step] @ head.T).to(wide) / temperature).log_softmax(-1)
                p = wanted.exp()
                total += (1 - alpha) * temperature ** 2 * (p * (wanted - soft)).sum()
                d += (1 - alpha) * temperature * (soft.exp_() - p)
            d = d.to(hidden.dtype)
            torch.matmul(d, cast, out=dhidden[begin:begin + step])
            dweight += (d.T @ h).to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight = ctx.saved_tensors
        return (
            dhidden * grad.to(dhidden.dtype),
            dweight * grad.to(dweight.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def make_student(teacher, seq_len):
    """A new model of the constants' sizes, the rest like the teacher's, dense."""
    half = {k: max(1, teacher[k] // 2) for k in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    sizes = dict(
        dim=DIM or half["dim"],
        n_layers=N_LAYERS or half["n_layers"],
        n_heads=N_HEADS or half["n_heads"],
        n_kv_heads=N_KV_HEADS or half["n_kv_heads"],
    )
    common.divisible(N_HEADS=(sizes["n_heads"], 1), DIM=(sizes["dim"], 2 * sizes["n_heads"]))
    return common.LM(teacher["vocab_size"], **sizes, seq_len=seq_len, theta=teacher["theta"], dropout=DROPOUT,
                     tied=teacher["tied"], qk_norm=teacher["qk_norm"])


def score():
    """EVAL: nats per answer token and exact matches of the best checkpoint in OUT on unseen conversations."""
    run = common.start(SEED, DTYPE)
    model = common.build(common.load(common.newest_checkpoint(OUT))).to(run.device)
    return prepare_chats.score(run, model, EVAL, OUT, EXACT_ROWS, EXACT_TOKENS, MICRO_BATCH)


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1), STEPS=(STEPS, 1), BATCH=(BATCH, run.world))
    common.within(0, math.inf, SEQ_LEN=SEQ_LEN, EXACT_ROWS=EXACT_ROWS, EXACT_TOKENS=EXACT_TOKENS, LR=LR,
                  MUON_LR=MUON_LR, WEIGHT_DECAY=WEIGHT_DECAY, WARMUP=WARMUP, CLIP=CLIP, PATIENCE=PATIENCE,
                  AUX_LOSS_ALPHA=AUX_LOSS_ALPHA, LOG_EVERY=LOG_EVERY, EVAL_EVERY=EVAL_EVERY,
                  EVAL_ROWS=EVAL_ROWS, SAVE_EVERY=SAVE_EVERY)
    common.within(0, 1, FLOOR=FLOOR, VALID_SHARE=VALID_SHARE)
    common.within(0, 0.99, DROPOUT=DROPOUT)
    common.within(1, math.inf, MAX_BAD_STEPS=MAX_BAD_STEPS)
    common.within(0, 1, ALPHA=ALPHA)
    common.within(0.01, 1000, TEMPERATURE=TEMPERATURE)
    found, home = common.load(common.newest_checkpoint(TEACHER)), common.newest_checkpoint(TEACHER).parent
    tokenizer = common.load_tokenizer(home / "tokenizer.json")
    if found["kind"] != "LM" or TEACHER_DTYPE not in ("float32", "bfloat16"):
        raise common.BadInput(f"TEACHER {TEACHER} holds a {found['kind']} (LM is needed), TEACHER_DTYPE is "
                              f"{TEACHER_DTYPE!r} (float32 or bfloat16)")
    common.same_vocabulary(f"TEACHER {TEACHER}", found, tokenizer)
    seq_len = SEQ_LEN or found["sizes"]["seq_len"]
    teacher = common.build(found, seq_len=seq_len).to(getattr(torch, TEACHER_DTYPE))
    teacher = teacher.to(run.device).eval().requires_grad_(False)
    init = common.load(common.newest_checkpoint(INIT)) if INIT else None
    own = init and common.load_tokenizer(common.newest_checkpoint(INIT).parent / "tokenizer.json")
    if own and own.to_str() != tokenizer.to_str():
        raise common.BadInput(
            f"INIT {INIT} and TEACHER {TEACHER} have different tokenizers; a student learns "
            "from a teacher of the same"
        )

    path = DATA
    if not path:
        path = prepare_python_docs.default(
            run, "sft.jsonl", "asking about Python's own documentation; "
            "for your conversations: DATA=chats.jsonl.gz"
        )
    train, valid = prepare_chats.training_sets(
        run, path, VALID, VALID_SHARE, home / "tokenizer.json", seq_len, SEED
    )
    model = (
        common.build(init, seq_len=seq_len, dropout=DROPOUT)
        if init
        else make_student(found["sizes"], seq_len)
    )
    model = model.to(run.device)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants = common.literals(globals())
    fingerprint = f"{train.meta['fingerprint']} {valid.meta['fingerprint']}"
    for place in filter(None, (TEACHER, INIT)):
        fingerprint += " " + prepare_text.hash_file(common.newest_checkpoint(place))
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    if run.first and not found:
        common.copy_tokenizer(home, OUT)
    net = run.wrap(Student(model))
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    about = train.meta["train"]
    record.show(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters from {home}; "
        f"{about['conversations']:,} conversations, {about['supervised']:,} supervised "
        f"tokens in {train.count} rows; {run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}"
    )

    def loss_of(batch):
        with torch.no_grad(), torch.autocast(run.device.type, enabled=False):
            known = teacher.hidden(*batch[:2])[0], teacher.head_weight
        return net(*batch, known)

    def validate(step):
        metrics = common.answer_nats(run, model, valid, MICRO_BATCH, EVAL_ROWS)
        record.log(step, **{f"valid_{k}": v for k, v in metrics.items()})
        state["since"] += 1
        if metrics["nats_per_answer_token"] < state["best"]:
            state.update(best=metrics["nats_per_answer_token"], since=0)
            common.save_best(run, OUT, step, model, metrics)

    if first == 0:
        validate(0)
    share, seen = BATCH // run.world, 0
    for step in range(first, STEPS):
        rows = [step * BATCH + run.rank * share + i for i in range(share)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        batches = list(train.batches(rows, min(share, MICRO_BATCH), run.device))
        done = common.update(run, net, optimizers, batches, loss_of, CLIP, step)

        step, seen = step + 1, seen + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR} or MUON_LR "
                                  f"{MUON_LR}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            record.progress(step, seen, "answer_tokens", loss=done.loss, grad_norm=done.grad_norm,
                            lr=optimizers[0].param_groups[0]["lr"])
            seen = 0
        record.tick(step)
        last = step == STEPS
        if EVAL_EVERY and step % EVAL_EVERY == 0 or last:
            validate(step)
            last = last or bool(PATIENCE) and state["since"] >= PATIENCE
        if last:
            break
        if SAVE_EVERY and step % SAVE_EVERY == 0 or done.signal:
            common.save(run, OUT, step, model, optimizers, state, constants)
        if done.signal:
            record.close()
            common.leave(run, OUT, step, done.signal)

    best = run.share(common.load(Path(OUT) / "best.pt") if run.first else None)
    judged = common.build(best).to(run.device)
    metrics = common.answer_nats(run, judged, valid, MICRO_BATCH)
    if EXACT_ROWS:
        asked = prepare_chats.conversations_of(valid.folder / "valid.jsonl", EXACT_ROWS)
        metrics |= common.exact_match(run, judged, tokenizer, asked, EXACT_TOKENS)
    record.log(step, **metrics, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    if run.first:
        common.plot_curves(OUT, ["loss"], ["valid_nats_per_answer_token"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/best.pt, model.safetensors, curves.png; ask it: python serve.py CHECKPOINT={OUT} "
            "PROMPTS=questions.jsonl")
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
