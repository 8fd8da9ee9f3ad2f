"""Adapt a chat model with low-rank adapters (LoRA, arXiv 2106.09685): a few percent of the parameters.

Adapters around linear layers of attention and MLP are trained, the rest is frozen. The adapter is saved in
PEFT layout, which PEFT and vLLM load next to an exported model, and merged into a checkpoint. What was
forgotten is measured on a general set before and after.

    python train_lora.py                                           who it is; after train_sft.py
    python train_lora.py DATA=mine.jsonl INIT=out/chat GENERAL=chats.jsonl.gz OUT=out/mine
    python train_lora.py EVAL=unseen.jsonl OUT=out/mine            nats per answer token, exact matches
    python serve.py CHECKPOINT=out/chat ADAPTER=out/mine PROMPTS=prompts.jsonl
"""

import math
from pathlib import Path

import torch

import common
from data import prepare_chats, prepare_python_docs, prepare_text

# Data
DATA = ""             # .jsonl(.gz) of {"conversations": [{"role", "content"}]}; "" = who the model is
VALID = ""            # a file of held-out conversations; "" = a share of DATA
VALID_SHARE = 0.2     # share of DATA held out when VALID is empty, by a hash of the first question
GENERAL = ""          # conversations that must not be forgotten; "" = Python's documentation where DATA is ""
SEQ_LEN = 0           # tokens a row; 0 = the checkpoint's context
EXACT_ROWS = 200      # held-out conversations whose last answer is generated and compared; 0 = none
EXACT_TOKENS = 48     # compared are answers up to this length

# Model
INIT = "out/sft"      # folder of the checkpoint to adapt
RANK = 8              # of the adapters
ALPHA = 16.0          # their scale is ALPHA / RANK
RSLORA = False        # True: ALPHA / √RANK, for large ranks (arXiv 2312.03732)
DROPOUT = 0.0         # probability, on what enters an adapter
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")  # linear layers of attention and MLP that get one
BASE_DTYPE = "float32"  # of the frozen matrices; "bfloat16" halves their memory
MERGE = True          # write OUT/best.pt, too, the adapter merged

# Optimization
STEPS = 100           # updates
BATCH = 4             # rows per update, over all processes
REHEARSE = 0          # rows of GENERAL's training part per update besides, so that less of it is forgotten
MICRO_BATCH = 4       # rows per forward and process
LR = 5e-4             # peak of AdamW; more learns sooner and forgets more
WEIGHT_DECAY = 0.0    # of matrices, times the learning rate
WARMUP = 5            # updates
SCHEDULE = "cosine"   # or "wsd": warm-up, stable, linear decay over the last 30%
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
AUX_LOSS_ALPHA = 0.1  # weight of the experts' balance loss
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "auto"        # bfloat16 where the device has it and it is faster, else float32
OUT = "out/lora"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 20       # updates; 0 = at the end only
EVAL_ROWS = 64        # rows of held-out conversations a validation reads; 0 = all (the last one always does)
SAVE_EVERY = 20       # updates; 0 = at the end only
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # a file to score with the best checkpoint in OUT instead of training


def score():
    """EVAL: nats per answer token and exact matches of the adapter in OUT on unseen conversations."""
    run = common.start(SEED, DTYPE)
    if not (Path(OUT) / "adapter_config.json").is_file():
        raise common.BadInput(
            f"{OUT} has no adapter_config.json; train one first: python train_lora.py OUT={OUT}"
        )
    base = common.adapter_config(OUT).get("base_model_name_or_path")
    if not base:
        raise common.BadInput(f"{OUT}/adapter_config.json does not name its base (base_model_name_or_path)")
    model = common.load_adapter(common.build(common.load(common.newest_checkpoint(base))), OUT).to(run.device)
    return prepare_chats.score(run, model, EVAL, OUT, EXACT_ROWS, EXACT_TOKENS, MICRO_BATCH)


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1), STEPS=(STEPS, 1), BATCH=(BATCH, run.world))
    if REHEARSE:
        common.divisible(REHEARSE=(REHEARSE, run.world))
    common.within(1, 10_000, RANK=RANK)
    common.within(
        0,
        math.inf,
        ALPHA=ALPHA,
        SEQ_LEN=SEQ_LEN,
        EXACT_ROWS=EXACT_ROWS,
        EXACT_TOKENS=EXACT_TOKENS,
        LR=LR,
        WEIGHT_DECAY=WEIGHT_DECAY,
        WARMUP=WARMUP,
        CLIP=CLIP,
        PATIENCE=PATIENCE,
        AUX_LOSS_ALPHA=AUX_LOSS_ALPHA,
        LOG_EVERY=LOG_EVERY,
        EVAL_EVERY=EVAL_EVERY,
        EVAL_ROWS=EVAL_ROWS,
        SAVE_EVERY=SAVE_EVERY,
    )
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
            run, "lora.jsonl", "teaching the model who it is; "
            "for your conversations: DATA=chats.jsonl.gz"
        )
    train, valid = prepare_chats.training_sets(
        run, path, VALID, VALID_SHARE, home / "tokenizer.json", seq_len, SEED
    )
    general = GENERAL or ("" if DATA else str(Path(__file__).parent / "data" / "python_docs" / "sft.jsonl"))
    if REHEARSE and not general:
        raise common.BadInput(f"REHEARSE={REHEARSE} rows of GENERAL, but GENERAL is empty; name its file")
    if general:
        folder = prepare_chats.folder_of(run, general, home / "tokenizer.json", seq_len, 0.02)
        general = prepare_chats.Chats(folder, "valid", seq_len)
    if REHEARSE:
        rehearsed = prepare_chats.Chats(folder, "train", seq_len, SEED)

    if BASE_DTYPE not in ("float32", "bfloat16"):
        raise common.BadInput(f"BASE_DTYPE {BASE_DTYPE!r} is neither float32 nor bfloat16")
    model = common.build(init, seq_len=seq_len)
    names = common.add_lora(model, TARGETS, RANK, ALPHA, DROPOUT, RSLORA)
    for name in names:
        model.get_submodule(name).base.to(getattr(torch, BASE_DTYPE))
    model = model.to(run.device)
    optimizers = common.make_optimizers(model, "adamw", LR, LR, WEIGHT_DECAY)
    constants = common.literals(globals())
    fingerprint = f"{train.meta['fingerprint']} {valid.meta['fingerprint']}"
    fingerprint += " " + prepare_text.hash_file(common.newest_checkpoint(INIT))
    if REHEARSE:
        fingerprint += " " + rehearsed.meta["fingerprint"]
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    if run.first and not found:
        common.copy_tokenizer(home, OUT)
    net = run.wrap(model)
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters()) - trained
    held = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    memory = {"memory_mib": held / 2**20, "full_memory_mib": whole * 16 / 2**20}
    about = train.meta["train"]
    record.show(
        f"{trained:,} of {whole:,} parameters ({trained / whole:.1%}) in {len(names)} layers of {home}, "
        f"{memory['memory_mib']:.0f} MiB with gradients and Adam's state, {memory['full_memory_mib']:.0f} "
        f"if all were trained; {about['conversations']:,} conversations, "
        f"{about['supervised']:,} supervised tokens in {train.count} rows; {run.world} × {run.device} "
        f"{str(run.dtype)[6:]}; {OUT}"
    )

    def loss_of(batch):
        loss, count, balance = net(*batch)
        return loss + AUX_LOSS_ALPHA * balance, count

    def validate(step):
        metrics = common.answer_nats(run, model, valid, MICRO_BATCH, EVAL_ROWS)
        if general:
            found = common.answer_nats(run, model, general, MICRO_BATCH, EVAL_ROWS)
            metrics["general_nats_per_answer_token"] = found["nats_per_answer_token"]
        record.log(step, **{f"valid_{k}": v for k, v in metrics.items()})
        state["since"] += 1
        if metrics["nats_per_answer_token"] < state["best"]:
            state.update(best=metrics["nats_per_answer_token"], since=0)
            if run.first:
                common.save_adapter(OUT, model, str(home), RANK, ALPHA, DROPOUT, RSLORA)
            run.wait()

    if first == 0:
        validate(0)
    share, seen = BATCH // run.world, 0
    for step in range(first, STEPS):
        rows = [step * BATCH + run.rank * share + i for i in range(share)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        batches = list(train.batches(rows, min(share, MICRO_BATCH), run.device))
        if mine := REHEARSE // run.world:
            rows = [step * REHEARSE + run.rank * mine + i for i in range(mine)]
            batches += rehearsed.batches(rows, min(mine, MICRO_BATCH), run.device)
        done = common.update(run, net, optimizers, batches, loss_of, CLIP, step)

        step, seen = step + 1, seen + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR}")
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

    judged = common.build(init, seq_len=seq_len)
    if run.first:
        common.load_adapter(judged, OUT)
    else:  # another machine may not see OUT
        common.add_lora(judged, TARGETS, RANK, ALPHA, DROPOUT, RSLORA)
    judged.load_state_dict(run.share(judged.state_dict() if run.first else None))
    judged = judged.to(run.device)
    before = common.build(init, seq_len=seq_len).to(run.device)
    metrics = common.answer_nats(run, judged, valid, MICRO_BATCH)
    for name, chats in (("", valid), ("general_", general)):
        for when, which in (("before_", before), ("", judged)) if chats else ():
            found = common.answer_nats(run, which, chats, MICRO_BATCH)
            metrics[f"{name}{when}nats_per_answer_token"] = found["nats_per_answer_token"]
    if EXACT_ROWS:
        asked = prepare_chats.conversations_of(valid.folder / "valid.jsonl", EXACT_ROWS)
        metrics |= common.exact_match(run, judged, tokenizer, asked, EXACT_TOKENS)
    metrics |= {"trained_parameters": trained, "parameters": whole} | memory
    record.log(step, **metrics, final=True)
    if MERGE:
        common.save_best(run, OUT, step, common.merge_lora(judged), metrics)
    record.close()
    if run.first:
        common.plot_curves(OUT, ["loss"], ["valid_nats_per_answer_token"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/adapter_model.safetensors, curves.png; ask it: python serve.py CHECKPOINT={home} "
            f"ADAPTER={OUT} PROMPTS=questions.jsonl")
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
