"""Teach a pretrained language model to chat: supervised fine-tuning on conversations.

The loss counts what the assistant says and its </s>, nothing else; the mask is made while the conversation is
rendered. Conversations are packed whole into rows, none seeing its neighbour. Sizes and tokenizer come from
the checkpoint that it starts from.

    python train_sft.py                                            questions on Python's documentation
    python train_sft.py DATA=chats.jsonl.gz INIT=out/mine OUT=out/chat
    torchrun --nproc_per_node 4 train_sft.py DATA=chats.jsonl.gz INIT=out/mine
    python train_sft.py EVAL=unseen.jsonl.gz OUT=out/chat          nats per answer token, exact matches
    python serve.py CHECKPOINT=out/chat PROMPTS=prompts.jsonl
"""

import math
from pathlib import Path

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
INIT = "out/pretrain"  # folder of the pretrained checkpoint
DROPOUT = 0.0         # probability

# Optimization
STEPS = 300           # updates
BATCH = 16            # rows per update, over all processes
MICRO_BATCH = 8       # rows per forward and process
OPTIMIZER = "muon"    # "muon" for the hidden matrices with AdamW for the rest, "adamw" for all
LR = 1e-3             # peak of AdamW
MUON_LR = 5e-3        # peak of Muon
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
COMPILE = "auto"      # "yes", "no"; "auto" = from 200 updates on, where there is a C++ compiler
OUT = "out/sft"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 50       # updates; 0 = at the end only
EVAL_ROWS = 64        # rows of held-out conversations a validation reads; 0 = all (the last one always does)
SAVE_EVERY = 50       # updates; 0 = at the end only
SHOW_BATCH = False    # print the first row as a table of token, supervised, conversation, and stop
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # a file to score with the best checkpoint in OUT instead of training


def show(tokenizer, chats):
    """Print the first row: token, whether it is supervised, conversation."""
    for number, (tokens, mask) in enumerate(chats.documents(0)):
        for token, supervised in zip(tokens.tolist(), mask.tolist(), strict=True):
            text = common.SPECIAL[token] if token < len(common.SPECIAL) else tokenizer.decode([token])
            print(f"{number:4}  {'loss' if supervised else '':4}  {token:6}  {text!r}")


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
    init = common.load(common.newest_checkpoint(INIT))
    home = common.newest_checkpoint(INIT).parent
    tokenizer = common.load_tokenizer(home / "tokenizer.json")
    common.same_vocabulary(f"INIT {INIT}", init, tokenizer)
    seq_len = SEQ_LEN or init["sizes"]["seq_len"]

    path = DATA
    if not path:
        path = prepare_python_docs.default(
            run, "sft.jsonl", "asking about Python's own documentation; "
            "for your conversations: DATA=chats.jsonl.gz"
        )
    train, valid = prepare_chats.training_sets(
        run, path, VALID, VALID_SHARE, home / "tokenizer.json", seq_len, SEED
    )
    if SHOW_BATCH:
        if run.first:
            show(tokenizer, train)
        return common.stop(run)

    model = common.build(init, seq_len=seq_len, dropout=DROPOUT).to(run.device)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants = common.literals(globals())
    fingerprint = f"{train.meta['fingerprint']} {valid.meta['fingerprint']}"
    fingerprint += " " + prepare_text.hash_file(common.newest_checkpoint(INIT))
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    if run.first and not found:
        common.copy_tokenizer(home, OUT)
    common.compile_layers(model, COMPILE, STEPS)
    net = run.wrap(model)
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    about = train.meta["train"]
    record.show(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters of {home}; "
        f"{about['conversations']:,} conversations, {about['supervised']:,} supervised "
        f"tokens in {train.count} rows; {run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}"
    )

    def loss_of(batch):
        loss, count, balance = net(*batch)
        return loss + AUX_LOSS_ALPHA * balance, count

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
