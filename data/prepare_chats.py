"""Turn conversations into token files that the chat scripts (`train_sft.py` and others) map into memory.

Reads JSONL rows {"conversations": [{"role", "content"}, ...]} (.jsonl, .jsonl.gz; roles system, user,
assistant). Writes a folder with train and valid .bin (uint16 tokens), .mask.bin (1 where the loss counts:
what the assistant says and its </s>), .idx.npy (where each conversation begins), the held-out conversations
as valid.jsonl, bad_rows.txt and meta.json. A conversation that is too long loses its oldest turns; one
without a supervised token is left out and named. Streams: memory does not grow with the file.

    python data/prepare_chats.py DATA=chats.jsonl.gz TOKENIZER=out/pretrain/tokenizer.json
"""

import contextlib
import gzip
import hashlib
import json
import math
import shutil
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common
from data import prepare_text

DATA = ""            # the file to read
TOKENIZER = ""       # tokenizer.json of the model that is to be trained
SEQ_LEN = 512        # tokens a conversation may have, and one
VALID_SHARE = 0.02   # share of conversations held out, chosen by a hash of what the user says first

FORMAT = 1           # raise when the files' layout changes, so that old ones are not read


def rows(path, bad, fields=("conversations",)):
    """Yield (row, "file:line") of every JSON object of a .jsonl or .jsonl.gz that has these fields as lists;
    the others go to `bad`. Raises BadInput on a file that is missing, cut short or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise common.BadInput(f"there is no file {path}")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise common.BadInput(f"{path} is neither .jsonl nor .jsonl.gz")
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path.name}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
                except RecursionError:
                    bad.add(where, "nested too deeply")
                except UnicodeEncodeError:
                    bad.add(where, "half a surrogate pair in the text")
                except UnicodeDecodeError:
                    bad.add(where, "not UTF-8")
                except ValueError:
                    bad.add(where, "not JSON")
                else:
                    wrong = [
                        f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), list)
                    ]
                    if wrong:
                        bad.add(where, f'no "{wrong[0]}" list')
                    else:
                        yield row, where
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise common.BadInput(f"{path} is damaged or cut short ({error}); fetch it again") from None
    except OSError as error:
        raise common.BadInput(f"cannot read {path} ({error.strerror or error})") from None


def write_rows(path, rows):
    """Write rows as .jsonl or .jsonl.gz, whole or not at all."""
    if not Path(path).name:
        raise common.BadInput(f"{str(path)!r} is no name of a file to write to")

    def write(file):
        with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) if str(path).endswith(".gz") else \
                contextlib.nullcontext(file) as out:
            for row in rows:
                out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    common.write_whole(Path(path), write)


def first_words(turns):
    """What decides on which side of the split a conversation falls: its first user turn."""
    return next((t["content"] for t in turns if t.get("role") == "user"), "")


def fit(tokenizer, turns, room):
    """(ids, mask, turns left out) of the last turns of a conversation that fit into room tokens, a system
    turn kept; no ids where not even the last question and answer do. Raises BadInput on a broken turn."""
    if not turns:
        raise common.BadInput("an empty conversation")
    ids, mask = common.render_chat(tokenizer, turns)
    system, rest = (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
    while len(ids) > room:
        later = [i for i, t in enumerate(rest) if i and t["role"] == "user"]
        if not later:
            return [], [], len(turns)
        rest = rest[later[0]:]
        ids, mask = common.render_chat(tokenizer, system + rest)
    return ids, mask, len(turns) - len(system) - len(rest)


def prepare(path, tokenizer, seq_len=512, share=0.02):
    """The folder of token files of `path`, made now unless it is there. Raises BadInput."""
    path = Path(path)
    if not path.is_file():
        raise common.BadInput(f"there is no file {path}")
    common.within(0, 1, VALID_SHARE=share)
    reader, stat = common.load_tokenizer(tokenizer), path.stat()
    key = [FORMAT, str(path.resolve()), stat.st_size, stat.st_mtime_ns, seq_len, share,
           prepare_text.hash_file(tokenizer)]
    key = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
    root = Path(__file__).resolve().parent.parent
    folder = root / prepare_text.CACHE / f"chats-{path.name.split('.')[0]}-{key}"
    if (folder / "meta.json").exists():
        return folder
    with prepare_text.made_whole(folder) as tmp:
        write(path, tmp, reader, seq_len, share)
        shutil.copy(tokenizer, tmp / "tokenizer.json")
    return folder


def write(path, folder, tokenizer, seq_len, share):
    """Write the token files of `path` into `folder`."""
    bad, digest = prepare_text.BadRows(), hashlib.blake2b(digest_size=8)
    names = ("train", "valid")
    files = {(n, k): open(folder / f"{n}{k}.bin", "wb") for n in names for k in ("", ".mask")}
    kept = open(folder / "valid.jsonl", "w", encoding="utf-8")
    lengths, supervised, cut = {n: [] for n in names}, dict.fromkeys(names, 0), 0
    for row, where in rows(path, bad):
        try:
            ids, mask, lost = fit(tokenizer, row["conversations"], seq_len + 1)
        except (common.BadInput, AttributeError, TypeError, KeyError) as error:
            reason = (
                str(error) if isinstance(error, common.BadInput) else "a turn that is no role and content"
            )
            bad.add(where, reason)
            continue
        if not ids:
            bad.add(where, f"its last question and answer do not fit into SEQ_LEN {seq_len}")
        elif not any(mask[1:]):
            bad.add(where, "the assistant says nothing")
        else:
            name = "valid" if prepare_text.held_out(first_words(row["conversations"]), share) else "train"
            files[name, ""].write(np.array(ids, np.uint16).tobytes())
            files[name, ".mask"].write(np.array(mask, np.uint8).tobytes())
            digest.update(np.array(ids, np.uint16).tobytes())
            lengths[name].append(len(ids))
            supervised[name] += sum(mask)
            cut += lost > 0
            if name == "valid":
                kept.write(json.dumps(row, ensure_ascii=False) + "\n")
    for file in (*files.values(), kept):
        file.close()
    (folder / "bad_rows.txt").write_text("\n".join(bad.named) + "\n" if bad.named else "")
    bad.report()
    if cut:
        print(f"{cut} conversations lost their oldest turns to fit into SEQ_LEN {seq_len}", flush=True)
    count = sum(map(len, lengths.values()))
    if not count:
        raise common.BadInput(f"{path} has no usable conversation; first problem: "
                              f"{(bad.named or ['no row in it'])[0]}")
    if 0 < share < 1 and not all(lengths.values()):
        raise common.BadInput(f"{path} has {count} usable conversations: too few to hold out a share of "
                              f"{share} by a hash; choose another VALID_SHARE, or name a VALID file")
    for name in names:
        np.save(folder / f"{name}.idx.npy", np.append(0, np.cumsum(lengths[name], dtype=np.int64)))
    meta = {"fingerprint": digest.hexdigest(), "bad_rows": bad.count, "shortened": cut,
            "vocab_size": tokenizer.get_vocab_size(),
            **{n: {"conversations": len(lengths[n]), "tokens": sum(lengths[n]), "supervised": supervised[n]}
               for n in names}}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def folder_of(run, path, tokenizer, seq_len, share):
    """`prepare` by one process a machine, while the others wait."""
    folder = prepare(path, tokenizer, seq_len, share) if run.local_rank == 0 else None
    run.wait(patiently=True)
    return folder or prepare(path, tokenizer, seq_len, share)


def training_sets(run, path, valid, share, tokenizer, seq_len, seed):
    """(Chats to train on, Chats held out): of two files, or of one where `valid` is empty."""
    if not valid and share in (0, 1):
        raise common.BadInput(f"VALID_SHARE {share} leaves nothing to {'train' if share else 'validate'} on; "
                              "choose one between 0 and 1, or name a VALID file")
    folder = folder_of(run, path, tokenizer, seq_len, 0.0 if valid else share)
    held = folder_of(run, valid, tokenizer, seq_len, 1.0) if valid else folder
    return Chats(folder, "train", seq_len, seed), Chats(held, "valid", seq_len)


def score(run, model, path, out, exact_rows, exact_tokens, micro_batch):
    """Nats per answer token and exact matches on the conversations of a file, into OUT/eval.json."""
    common.divisible(MICRO_BATCH=(micro_batch, 1))
    common.within(0, math.inf, EXACT_ROWS=exact_rows, EXACT_TOKENS=exact_tokens)
    tokenizer, seq_len = Path(out) / "tokenizer.json", model.sizes["seq_len"]
    chats = Chats(folder_of(run, path, tokenizer, seq_len, 1.0), "valid", seq_len)
    found = common.answer_nats(run, model, chats, micro_batch)
    asked = conversations_of(path, exact_rows)
    found |= common.exact_match(run, model, common.load_tokenizer(tokenizer), asked, exact_tokens)
    found["bad_rows"] = chats.meta["bad_rows"]
    common.write_result(run, out, found)
    run.say(f"{path}: " + common.line_of(None, found))
    common.stop(run)
    return found


def conversations_of(path, limit=0):
    """The first conversations (lists of turns; 0 = all) of a file, as far as they are whole."""
    found = []
    for row, _ in rows(path, prepare_text.BadRows()):
        if limit and len(found) == limit:
            break
        if row["conversations"] and all(isinstance(t, dict) and isinstance(t.get("content"), str) and
                                        t.get("role") in ("system", "user", "assistant")
                                        for t in row["conversations"]):
            found.append(row["conversations"])
    return found


class Chats:
    """The conversations of a folder's split, packed whole into rows of seq_len tokens."""

    def __init__(self, folder, split, seq_len, seed=0):
        self.folder, self.meta = folder, json.loads((folder / "meta.json").read_text())
        self.tokens = prepare_text.mapped(folder, f"{split}.bin")
        self.mask = prepare_text.mapped(folder, f"{split}.mask.bin", np.uint8)
        self.bounds = prepare_text.bounds_of(folder, split, self.tokens, self.mask)
        self.seq_len, self.seed, self.epoch = seq_len, seed, None
        self._plan(0)
        self.count = len(self.rows) - 1

    def _plan(self, epoch):
        if epoch != self.epoch:
            self.order, self.rows = common.pack(np.diff(self.bounds) - 1, self.seq_len,
                                                self.seed * 1_000_003 + epoch)
            self.epoch = epoch

    def documents(self, row):
        """(tokens, mask) of each conversation in a row; rows go on through the epochs."""
        self._plan(row // self.count)
        row %= self.count
        spans = (
            slice(self.bounds[d], self.bounds[d + 1]) for d in self.order[self.rows[row] : self.rows[row + 1]]
        )
        return [(self.tokens[s], self.mask[s]) for s in spans]

    def batches(self, rows, micro, device):
        """(ids, docs, targets) (micro, T) of the rows, `micro` at a time; missing rows are padding."""
        for at in range(0, len(rows), micro):
            chosen = [self.documents(r) for r in rows[at:at + micro]]
            batch = common.collate(chosen + [[]] * (micro - len(chosen)), self.seq_len)
            yield tuple(x.to(device, non_blocking=True) for x in batch)


def main():
    if not DATA or not TOKENIZER:
        raise common.BadInput(
            "name both: python data/prepare_chats.py DATA=chats.jsonl TOKENIZER=tokenizer.json"
        )
    common.divisible(SEQ_LEN=(SEQ_LEN, 1))
    folder = prepare(DATA, TOKENIZER, SEQ_LEN, VALID_SHARE)
    print(f"{folder}: {(folder / 'meta.json').read_text()}")


if __name__ == "__main__":
    common.cli(globals(), main)
