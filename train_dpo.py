"""Align a chat model with preferences: direct preference optimization (arXiv 2305.18290).

Of two answers to a question the chosen one becomes likelier and the rejected one less likely, both against
the model that it starts from; that model's log-probabilities are computed once, so it is not kept in memory.

    python train_dpo.py                                            after train_sft.py: Python's documentation
    python train_dpo.py DATA=pairs.jsonl.gz INIT=out/chat OUT=out/aligned
    python train_dpo.py DATA=pairs.jsonl.gz MORE=own.jsonl ...     besides, pairs of the model's own answers
    python train_dpo.py EVAL=unseen.jsonl.gz OUT=out/aligned       accuracy, margin, nats of chosen answers
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import common
from data import prepare_chats, prepare_python_docs, prepare_text

# Data
DATA = ""             # .jsonl(.gz) of {"chosen": [turns], "rejected": [turns]}; "" = Python's documentation
MORE = ""             # a second file of pairs to train on, without those whose question DATA would hold out
VALID_SHARE = 0.05    # share of DATA's pairs held out, by a hash of the first question
SFT = ""              # conversations whose loss is watched: what did alignment cost? "" = none
SEQ_LEN = 0           # tokens a row; 0 = the checkpoint's context

# Model
INIT = "out/sft"      # folder of the chat model, which is the reference too

# Optimization
BETA = 0.1            # how dear it is to leave the reference
AVERAGE = False       # mean log-probability of an answer's tokens instead of their sum
SFT_WEIGHT = 0.0      # adds so much of the chosen answers' nats a token to the loss
REHEARSE = 0          # rows of SFT's training part per update; their nats a token are added to the loss
STEPS = 100           # updates
BATCH = 16            # pairs per update, over all processes
MICRO_BATCH = 16      # pairs per forward and process
OPTIMIZER = "adamw"   # "muon" for the hidden matrices
LR = 5e-5             # peak of AdamW
MUON_LR = 1e-3        # peak of Muon
WEIGHT_DECAY = 0.0    # of matrices, times the learning rate
WARMUP = 10           # updates
SCHEDULE = "cosine"   # or "wsd": warm-up, stable, linear decay over the last 30%
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "float32"     # small differences of long sums: bfloat16 loses them
OUT = "out/dpo"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 5         # updates
EVAL_EVERY = 25       # updates; 0 = at the end only
EVAL_PAIRS = 200      # held-out pairs a validation reads; 0 = all (the last one always does)
SAVE_EVERY = 25       # updates; 0 = at the end only
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # pairs to score with the best checkpoint in OUT instead of training


class Rehearsal(NamedTuple):
    """Conversations (ids, docs, targets), and the supervised tokens of all that the update rehearses."""
    batch: tuple
    tokens: int


class Pairs:
    """Tokens and masks of the pairs of a file, then of `more`: `pairs[i]` is ((ids, mask) chosen, (ids, mask)
    rejected)."""

    def __init__(self, path, tokenizer, room, more=""):
        self.pairs, self.held, self.bad_rows = [], [], 0
        self.digest = hashlib.blake2b(digest_size=8)
        self.read(path, tokenizer, room)
        self.own = len(self.pairs)
        if more:
            self.read(more, tokenizer, room)
        self.fingerprint = self.digest.hexdigest()

    def read(self, path, tokenizer, room):
        before, bad = len(self.pairs), prepare_text.BadRows()
        for row, where in prepare_chats.rows(path, bad, ("chosen", "rejected")):
            try:
                chosen, rejected = row["chosen"], row["rejected"]
                if any(not t or t[-1].get("role") != "assistant" for t in (chosen, rejected)):
                    bad.add(where, "the last turn is not the assistant's")
                    continue
                if chosen[:-1] != rejected[:-1]:
                    raise common.BadInput(
                        f"{where}: the prompts of chosen and rejected differ; a pair answers one "
                        "question twice"
                    )
                both = [last_answer(*common.render_chat(tokenizer, t)) for t in (chosen, rejected)]
                if chosen[-1]["content"] == rejected[-1]["content"]:
                    bad.add(where, "chosen and rejected are the same")
                    continue
            except (AttributeError, TypeError, KeyError) as error:
                bad.add(where, f"a turn that is no role and content ({type(error).__name__})")
                continue
            except common.BadInput as error:
                if str(error).startswith(where):
                    raise
                bad.add(where, str(error))
                continue
            if max(len(ids) for ids, _ in both) > room:
                bad.add(where, f"longer than SEQ_LEN {room - 1}")
                continue
            for ids, mask in both:
                self.digest.update(ids.tobytes() + mask.tobytes())
            self.pairs.append(both)
            self.held.append(prepare_chats.first_words(chosen))
        if len(self.pairs) == before:
            raise common.BadInput(f"{path} has no usable pair; first problem: {(bad.named or ['none'])[0]}")
        bad.report()
        self.bad_rows += bad.count

    def split(self, share):
        """Indices of training pairs, and of the file's held-out ones."""
        held = np.array([prepare_text.held_out(words, share) for words in self.held])
        return np.flatnonzero(~held), np.flatnonzero(held[:self.own])

    def batch(self, indices, seq_len, device, share=True):
        """((ids, docs, targets, shared) rows of the answers packed whole; places (n, 2) of the pairs' answers
        among the documents, counted row by row) of some pairs. With `share` a question that fits a row with
        both its answers stands there once."""
        units = []                                          # documents that share a row: (ids, mask, shared)
        for chosen, rejected in (self.pairs[i] for i in indices):
            n = in_common(chosen, rejected) if share else 0
            if n and len(chosen[0]) + len(rejected[0]) - n - 2 <= seq_len:
                units.append([(*chosen, 0), (*(x[n:] for x in rejected), n)])
            else:
                units += [[(*chosen, 0)], [(*rejected, 0)]]
        order, bounds = common.pack(np.array([sum(len(d[0]) - 1 for d in unit) for unit in units]), seq_len)
        rows = [[d for u in order[a:b] for d in units[u]] for a, b in zip(bounds, bounds[1:], strict=False)]
        ids, docs, targets = common.collate([[d[:2] for d in row] for row in rows], seq_len)
        shared = torch.stack([torch.tensor([d[2] for d in row] + [0])[part] for row, part in
                              zip(rows, docs, strict=True)])                                  # padding: 0
        first = np.cumsum([0, *map(len, units)])
        packed = np.concatenate([np.arange(first[u], first[u + 1]) for u in order])
        batch = tuple(x.to(device) for x in (ids, docs, targets, shared))
        return batch, torch.from_numpy(np.argsort(packed)).view(-1, 2)


def in_common(chosen, rejected):
    """How many first tokens both answers' documents (ids, mask) need only once: all of the question but the
    last, which in both predicts what differs."""
    (a, mask), (b, _) = chosen, rejected
    n = int(mask.argmax())                                   # where the answer begins
    return max(0, n - 1) if np.array_equal(a[:n], b[:n]) else 0


def last_answer(ids, mask):
    """The same with the last assistant turn alone supervised: earlier answers are part of the question."""
    mask = np.array(mask, bool)
    ends = np.flatnonzero(mask[:-1] & ~mask[1:])
    if len(ends) > 1 or (len(ends) == 1 and mask[-1]):
        mask[:ends[-2 if not mask[-1] else -1] + 1] = False
    return np.array(ids, np.uint16), mask


def answers(nats, docs, targets):
    """(sum of log-probabilities, tokens) (documents,) of each document's supervised tokens, row by row."""
    row = torch.arange(len(docs), device=docs.device)[:, None]
    counts = docs.amax(1) + 1
    index = docs + F.pad(counts.cumsum(0), (1, 0))[:-1][row]
    known = targets != common.IGNORE
    total, tokens = (torch.zeros(int(counts.sum()), dtype=nats.dtype, device=nats.device) for _ in (0, 1))
    return (total.index_add(0, index[known], -nats[known]),
            tokens.index_add(0, index[known], torch.ones_like(nats[known])))


def log_probabilities(run, net, pairs, indices, seq_len):
    """(log-probabilities (n, 2) of the answers chosen and rejected, their tokens (n, 2))."""
    (ids, docs, targets, shared), place = pairs.batch(indices, seq_len, run.device)
    nats, _, _ = net(ids, docs, targets, True, shared)
    total, tokens = answers(nats, docs, targets)
    return total[place], tokens[place]


def preference(policy, reference, tokens):
    """The loss (n,) of arXiv 2305.18290, equation 7, and the rewards (n, 2), of log-probabilities (n, 2)."""
    if AVERAGE:
        policy, reference = policy / tokens, reference / tokens
    rewards = BETA * (policy - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


@torch.no_grad()
def references(run, model, pairs, seq_len, key):
    """Log-probabilities (pairs, 2) of the starting model, computed once; kept in data/tokens under `key`."""
    path = Path(__file__).parent / prepare_text.CACHE / f"dpo-{key}.npy"
    if run.first and not path.exists():
        model.eval()
        found = np.zeros((len(pairs.pairs), 2))
        order = np.argsort([sum(len(ids) for ids, _ in p) for p in pairs.pairs])
        for at in range(0, len(order), MICRO_BATCH):
            with run.autocast():
                found[order[at:at + MICRO_BATCH]] = log_probabilities(
                    run, model, pairs, order[at:at + MICRO_BATCH], seq_len)[0].double().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        common.write_whole(path, lambda file: np.save(file, found))
        model.train()
    run.wait(patiently=True)
    try:
        found = np.load(path) if run.first else None
    except (OSError, ValueError, EOFError) as error:
        raise common.BadInput(f"{path} is damaged ({str(error)[:80]}); remove it, it is made again") from None
    return torch.from_numpy(run.share(found)).to(torch.float32).to(run.device)


@torch.no_grad()
def evaluate(run, model, pairs, indices, reference, seq_len):
    """Loss, accuracy, rewards, margin and nats of the chosen answers of held-out pairs, over all processes.
    With no reference: accuracy and margin of the log-probabilities themselves."""
    model.eval()
    totals = np.zeros(7)
    mine = indices[run.rank::run.world]
    for at in range(0, len(mine), MICRO_BATCH):
        some = mine[at:at + MICRO_BATCH]
        with run.autocast():
            policy, tokens = log_probabilities(run, model, pairs, some, seq_len)
        base = torch.zeros_like(policy) if reference is None else reference[torch.from_numpy(some)]
        loss, rewards = preference(policy, base, tokens)
        margin = rewards[:, 0] - rewards[:, 1] if reference is not None else policy[:, 0] - policy[:, 1]
        parts = (loss.sum(), (margin > 0).sum(), rewards[:, 0].sum(), rewards[:, 1].sum(), margin.sum(),
                 -policy[:, 0].sum(), tokens[:, 0].sum())
        totals += np.array([float(p) for p in parts])
    model.train()
    *sums, nats, tokens = run.sum(*totals)
    names = ("loss", "accuracy", "reward_chosen", "reward_rejected", "margin")
    count = max(1, len(indices))
    found = {name: value / count for name, value in zip(names, sums, strict=True)}
    if reference is None:
        found = {k: found[k] for k in ("accuracy", "margin")}
    return found | {"nats_per_answer_token": nats / max(1, tokens), "pairs": len(indices)}


def sft_nats(run, model, chats):
    """Nats per answer token of held-out conversations."""
    return {
        "sft_nats_per_answer_token": common.answer_nats(run, model, chats, 8, 64)["nats_per_answer_token"]
    }


def score():
    """EVAL: how often the best checkpoint in OUT finds the chosen answer likelier than the rejected one."""
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1))
    model = common.build(common.load(common.newest_checkpoint(OUT))).to(run.device)
    pairs = Pairs(EVAL, common.load_tokenizer(Path(OUT) / "tokenizer.json"), model.sizes["seq_len"] + 1)
    found = evaluate(run, model, pairs, np.arange(len(pairs.pairs)), None, model.sizes["seq_len"])
    found["bad_rows"] = pairs.bad_rows
    common.write_result(run, OUT, found)
    run.say(f"{EVAL}: " + common.line_of(None, found))
    common.stop(run)
    return found


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    common.divisible(MICRO_BATCH=(MICRO_BATCH, 1), STEPS=(STEPS, 1), BATCH=(BATCH, run.world))
    if REHEARSE:
        common.divisible(REHEARSE=(REHEARSE, run.world))
    common.within(0, math.inf, SEQ_LEN=SEQ_LEN, LR=LR, MUON_LR=MUON_LR, WEIGHT_DECAY=WEIGHT_DECAY, CLIP=CLIP,
                  WARMUP=WARMUP, PATIENCE=PATIENCE, LOG_EVERY=LOG_EVERY, EVAL_EVERY=EVAL_EVERY, BETA=BETA,
                  EVAL_PAIRS=EVAL_PAIRS, SAVE_EVERY=SAVE_EVERY, SFT_WEIGHT=SFT_WEIGHT)
    common.within(0, 1, FLOOR=FLOOR, VALID_SHARE=VALID_SHARE)
    common.within(1, math.inf, MAX_BAD_STEPS=MAX_BAD_STEPS)
    init, home = common.load(common.newest_checkpoint(INIT)), common.newest_checkpoint(INIT).parent
    tokenizer = common.load_tokenizer(home / "tokenizer.json")
    common.same_vocabulary(f"INIT {INIT}", init, tokenizer)
    seq_len, path = SEQ_LEN or init["sizes"]["seq_len"], DATA
    if not path:
        path = prepare_python_docs.default(
            run, "dpo.jsonl", "answers about Python's own documentation, right and spoilt; "
            "for your pairs: DATA=pairs.jsonl.gz"
        )
    pairs = Pairs(path, tokenizer, seq_len + 1, MORE)
    train, valid = pairs.split(VALID_SHARE)
    if len(train) < BATCH or not len(valid):
        raise common.BadInput(
            f"{path} gives {len(train)} pairs to train on and {len(valid)} to validate: too few for BATCH "
            f"{BATCH} and VALID_SHARE {VALID_SHARE}; lower the first, or change the second"
        )
    chats = None
    if REHEARSE and not SFT:
        raise common.BadInput(f"REHEARSE={REHEARSE} rows of SFT, but SFT is empty; name its file")
    if SFT:
        prepared = prepare_chats.folder_of(run, SFT, home / "tokenizer.json", seq_len, 0.02)
        chats = prepare_chats.Chats(prepared, "valid", seq_len)
    if REHEARSE:
        rehearsed = prepare_chats.Chats(prepared, "train", seq_len, SEED)

    model = common.build(init, seq_len=seq_len, dropout=0.0).to(run.device)
    hashed = hashlib.blake2b(digest_size=8)
    for value in init["model"].values():
        hashed.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    key = hashlib.blake2b(repr([pairs.fingerprint, hashed.hexdigest(), seq_len, str(run.dtype)]).encode(),
                          digest_size=6).hexdigest()
    reference = references(run, model, pairs, seq_len, key)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants, fingerprint = common.literals(globals()), f"{pairs.fingerprint} {hashed.hexdigest()}"
    if REHEARSE:
        fingerprint += " " + rehearsed.meta["fingerprint"]
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    if run.first and not found:
        common.copy_tokenizer(home, OUT)
    net = run.wrap(model)
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    record.show(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters of {home}; {len(train)} + "
        f"{len(valid)} pairs; {run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}"
    )
    watched = []

    def loss_of(some):
        if isinstance(some, Rehearsal):
            return net(*some.batch)[0] * BATCH / some.tokens, 0       # the update divides by all pairs
        policy, tokens = log_probabilities(run, net, pairs, some, seq_len)
        loss, rewards = preference(policy, reference[torch.from_numpy(some)], tokens)
        gap = (policy - reference[torch.from_numpy(some)]) / tokens
        watched.append(torch.stack([(rewards[:, 0] > rewards[:, 1]).float().sum(), rewards[:, 0].sum(),
                                    rewards[:, 1].sum(), policy[:, 0].sum(), policy[:, 1].sum(),
                                    (torch.exp(-gap) - 1 + gap).mean(1).sum()]).detach())
        if SFT_WEIGHT:
            loss = loss - SFT_WEIGHT * policy[:, 0] / tokens[:, 0]
        return loss.sum(), len(some)

    def batches(step):
        epoch, place = divmod(step * BATCH, len(train))
        order = np.random.default_rng((SEED, epoch)).permutation(train)
        if place + BATCH > len(order):
            order = np.concatenate([order, np.random.default_rng((SEED, epoch + 1)).permutation(train)])
        mine = order[place:place + BATCH].reshape(run.world, -1)[run.rank]
        parts = [mine[i:i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]
        if mine := REHEARSE // run.world:
            rows = range(step * REHEARSE, (step + 1) * REHEARSE)
            tokens = sum(int(mask[1:].sum()) for row in rows for _, mask in rehearsed.documents(row))
            rows = rows[run.rank * mine:(run.rank + 1) * mine]
            parts += [Rehearsal(batch, tokens) for batch in rehearsed.batches(rows, min(mine, 8), run.device)]
        return parts

    def validate(step, indices):
        metrics = evaluate(run, model, pairs, indices, reference, seq_len)
        metrics |= sft_nats(run, model, chats) if chats else {}
        record.log(step, **{f"valid_{k}": v for k, v in metrics.items()})
        state["since"] += 1
        if metrics["loss"] < state["best"]:
            state.update(best=metrics["loss"], since=0)
            common.save_best(run, OUT, step, model, metrics)
        return metrics

    if first == 0:
        some = batches(0)[0]
        with torch.no_grad(), run.autocast():
            policy, tokens = log_probabilities(run, model, pairs, some, seq_len)
        loss = float(preference(policy, reference[torch.from_numpy(some)], tokens)[0].mean())
        if abs(loss - math.log(2)) > 1e-6 * (1 if run.dtype == torch.float32 else 1e4):
            raise common.BadInput(
                f"the loss before the first update is {loss:.7f}, not ln 2: the reference's "
                f"log-probabilities are not this model's; remove data/tokens/dpo-{key}.npy"
            )
        validate(0, valid[:EVAL_PAIRS] if EVAL_PAIRS else valid)
    seen = 0
    for step in range(first, STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        watched.clear()
        done = common.update(run, net, optimizers, batches(step), loss_of, CLIP, step)

        step, seen = step + 1, seen + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            means = [x / done.count for x in run.sum(*torch.stack(watched).sum(0))]
            names = ("accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "kl")
            record.progress(step, seen, "pairs", loss=done.loss, margin=means[1] - means[2],
                            **dict(zip(names, means, strict=True)), grad_norm=done.grad_norm,
                            lr=optimizers[-1].param_groups[0]["lr"])
            seen = 0
        record.tick(step)
        last = step == STEPS
        if EVAL_EVERY and step % EVAL_EVERY == 0 or last:
            validate(step, valid[:EVAL_PAIRS] if EVAL_PAIRS else valid)
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
    metrics = evaluate(run, judged, pairs, valid, reference, seq_len)
    metrics |= sft_nats(run, judged, chats) if chats else {}
    record.log(step, **metrics, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    if run.first:
        common.plot_curves(OUT, ["loss", "valid_loss"], ["margin", "valid_margin"], ["valid_accuracy"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/best.pt, model.safetensors, curves.png")
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
