"""Turn text into token files that `train_pretrain.py` maps into memory.

Reads JSONL rows {"text": ...} (.jsonl, .jsonl.gz, or .txt with such rows) or plain .txt / .txt.gz, where
documents are blank-line-separated paragraphs joined up to TXT_CHARS. Writes a folder with train.bin and
valid.bin (uint16, each document `<s> ... </s>`), train.idx.npy and valid.idx.npy (where each begins), the
tokenizer, bad_rows.txt and meta.json with a fingerprint of source and tokenizer. Streams: memory does not
grow with the file.

    python data/prepare_text.py DATA=my.jsonl.gz                          trains a tokenizer on it too
    python data/prepare_text.py DATA=my.jsonl.gz TOKENIZER=data/tokenizer.json
"""

import contextlib
import gzip
import hashlib
import json
import os
import queue
import shutil
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common

DATA = ""            # the file to read
OUT = ""             # folder to write; "" = data/tokens/NAME-KEY, found again by every later run
TOKENIZER = ""       # tokenizer.json; "" = train one on DATA's training part
VOCAB_SIZE = 6_400   # tokens of a tokenizer trained here
VALID_SHARE = 0.01   # share of documents held out, chosen by a hash of their text (equal texts stay together)
TXT_CHARS = 4_000    # characters up to which paragraphs of a plain text are joined into one document

CACHE = "data/tokens"     # where folders go when OUT is empty, from the root of the repo
BATCH_BYTES = 1_000_000   # text handed to the tokenizer at once; it spreads a batch over all cores
FORMAT = 1                # raise when the files' layout changes, so that old ones are not read


class BadRows:
    """Rows that could not be used: counted, the first ones named by file and line."""

    def __init__(self):
        self.count, self.named = 0, []

    def add(self, where, why):
        self.count += 1
        if len(self.named) < 1000:
            self.named.append(f"{where}: {why}")

    def report(self, folder=None):
        if self.count:
            more = f" (all in {folder}/bad_rows.txt)" if folder and self.count > 5 else ""
            print(f"warning: {self.count} rows left out{more}: " + "; ".join(self.named[:5]), flush=True)


def documents(path, bad, progress=None, digest=None, txt_chars=TXT_CHARS):
    """Yield (text, "file:line") of every usable document; the others go to `bad`.

    `digest` is fed the raw bytes read, `progress` the position in the file. Raises BadInput on a file that is
    missing, of an unknown kind, or cut short.
    """
    path = Path(path)
    kinds = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
    if not path.is_file():
        raise common.BadInput(f"there is no file {path}")
    if not path.name.endswith(kinds):
        raise common.BadInput(f"{path} is not one of {', '.join(kinds)}")
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.name.endswith(".gz") else raw
        try:
            rows = numbered_lines(file, raw, progress, digest)
            first = next(rows, None)
            while first and not first[1].strip():
                first = next(rows, None)
            if first is None:
                return
            is_json = ".jsonl" in path.name or first[1].lstrip().startswith((b'{"text"', b'{ "text"'))
            rows = chain_one(first, rows)
            yield from (
                json_documents(path, rows, bad) if is_json else plain_documents(path, rows, bad, txt_chars)
            )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise common.BadInput(f"{path} is damaged or cut short ({error}); fetch it again") from None
        except OSError as error:
            raise common.BadInput(f"cannot read {path} ({error.strerror or error})") from None


def numbered_lines(file, raw, progress, digest):
    for number, line in enumerate(file, 1):
        if digest:
            digest.update(line)
        if progress and number % 1000 == 0:
            progress(raw.tell())
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line


def chain_one(first, rest):
    yield first
    yield from rest


def json_documents(path, rows, bad):
    for number, line in rows:
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
            text = row["text"]
            text.encode("utf-8")
        except UnicodeDecodeError:
            bad.add(where, "not UTF-8")
        except UnicodeEncodeError:
            bad.add(where, "half a surrogate pair in the text")
        except RecursionError:
            bad.add(where, "nested too deeply")
        except ValueError:
            bad.add(where, "not JSON")
        except (KeyError, TypeError, AttributeError):
            bad.add(where, 'no "text" string')
        else:
            if text.strip():
                yield text, where
            else:
                bad.add(where, "empty text")


def plain_documents(path, rows, bad, txt_chars):
    lines, size, begin = [], 0, 1

    def whole():
        return "\n".join(lines).strip("\n"), f"{path.name}:{begin}"
    for number, line in rows:
        try:
            line = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            bad.add(f"{path.name}:{number}", "not UTF-8")
            continue
        if not lines:
            begin = number
        lines.append(line)
        size += len(line) + 1
        if size >= txt_chars and (not line.strip() or size >= 4 * txt_chars):
            if whole()[0].strip():
                yield whole()
            lines, size = [], 0
    if whole()[0].strip():
        yield whole()


def held_out(text, share):
    """True for the documents of the validation part: a pure function of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2**64


def mapped(folder, name, kind=np.uint16):
    """A file of numbers in a folder of token files, in memory as it is read. Raises BadInput."""
    try:
        return np.memmap(folder / name, kind, "r")
    except (OSError, ValueError) as error:
        raise common.BadInput(f"{folder} is damaged ({name}: {error}); remove it, it is made again") from None


def bounds_of(folder, split, *files):
    """Where each document begins and the last one ends; raises BadInput unless that is the end of `files`."""
    try:
        bounds = np.load(folder / f"{split}.idx.npy")
    except (OSError, ValueError, EOFError) as error:
        raise common.BadInput(f"{folder} is damaged ({split}.idx.npy: {str(error)[:80]}); remove it, it is "
                              "made again") from None
    wrong = [len(f) for f in files if len(f) != bounds[-1]]
    if wrong:
        raise common.BadInput(f"{folder} is damaged ({wrong[0]} tokens in {split}, {bounds[-1]} expected); "
                              "remove it, it is made again")
    return bounds


def hash_file(path):
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def prepare(path, tokenizer="", vocab_size=6_400, share=0.01, out="", txt_chars=TXT_CHARS):
    """The folder of token files of `path`, made now unless it is there (or is `path`). Raises BadInput."""
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    if not path.is_file():
        raise common.BadInput(
            f"there is no file {path}; DATA names a .jsonl, .jsonl.gz, .txt or .txt.gz file"
        )
    if not 0 <= share <= 1:
        raise common.BadInput(f"VALID_SHARE {share} must be between 0 and 1")
    if not tokenizer and not 259 <= vocab_size <= 65_535:
        raise common.BadInput(
            f"VOCAB_SIZE {vocab_size} must be between 259 and 65,535 (token files are uint16)"
        )
    stat = path.stat()
    if stat.st_size == 0:
        raise common.BadInput(f"{path} is empty")
    if tokenizer:
        common.load_tokenizer(tokenizer)  # complain before hours of work
    key = [FORMAT, str(path.resolve()), stat.st_size, stat.st_mtime_ns, share, txt_chars,
           hash_file(tokenizer) if tokenizer else vocab_size]
    key = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
    root = Path(__file__).resolve().parent.parent
    folder = Path(out) if out else root / CACHE / f"{path.name.split('.')[0]}-{key}"
    if (folder / "meta.json").exists():
        if json.loads((folder / "meta.json").read_text())["key"] == key:
            return folder
        raise common.BadInput(
            f"{folder} holds token files of something else; choose another OUT or remove it"
        )
    try:
        return tokenize(path, folder, key, tokenizer, vocab_size, share, txt_chars)
    except OSError as error:
        raise common.BadInput(
            f"cannot write token files to {folder} ({error.strerror}); make room, or choose OUT"
        ) from error


@contextlib.contextmanager
def made_whole(folder):
    """A folder of another name to fill, renamed to `folder` when it is full; one that another process has put
    there meanwhile stays."""
    host = socket.gethostname()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f"*.tmp-{host}-*"):  # what a killed process left
        if not Path(f"/proc/{old.name.rsplit('-', 1)[1]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    tmp = folder.with_name(f"{folder.name}.tmp-{host}-{os.getpid()}")
    tmp.mkdir()
    try:
        yield tmp
        try:
            tmp.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def tokenize(path, folder, key, tokenizer, vocab_size, share, txt_chars):
    """Write a whole folder of token files."""
    begin = time.monotonic()
    with made_whole(folder) as tmp:
        if tokenizer:
            shutil.copy(tokenizer, tmp / "tokenizer.json")
            beside = Path(tokenizer).with_name("tokenizer_config.json")
            if beside.exists():
                shutil.copy(beside, tmp)
        else:
            from data import prepare_tokenizer
            print(f"{path}: training a tokenizer of {vocab_size} tokens", flush=True)
            texts = (
                text
                for text, _ in documents(path, BadRows(), txt_chars=txt_chars)
                if not held_out(text, share)
            )
            prepare_tokenizer.train(prepare_tokenizer.first_of(texts), tmp / "tokenizer.json", vocab_size)
        meta = write_tokens(path, tmp, common.load_tokenizer(tmp / "tokenizer.json"), share, txt_chars)
        meta = {"key": key, **meta, "source": str(path), "format": FORMAT}
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1))
    parts = "; ".join(f"{name} {meta[name]['documents']:,} documents, {meta[name]['tokens']:,} tokens, "
                      f"{meta[name]['bytes']:,} bytes" for name in ("train", "valid"))
    print(f"{folder}: {parts}; {time.monotonic() - begin:.0f} s", flush=True)
    return folder


def write_tokens(path, folder, tokenizer, share, txt_chars):
    """Tokenize `path` into `folder`; returns the counts for meta.json."""
    from tqdm import tqdm
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    bad, digest, batches = BadRows(), hashlib.blake2b(digest_size=8), queue.Queue(4)
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=not sys.stderr.isatty(),
    )

    def read():  # files and JSON in this thread; the tokenizer works in the other, without Python's lock
        try:
            batch, size = [], 0
            for text, _ in documents(path, bad, lambda at: bar.update(at - bar.n), digest, txt_chars):
                batch.append(text)
                size += len(text)
                if size > BATCH_BYTES:
                    batches.put(batch)
                    batch, size = [], 0
            batches.put(batch)
            batches.put(None)
        except BaseException as error:
            batches.put(error)
    threading.Thread(target=read, daemon=True).start()

    files = {name: open(folder / f"{name}.bin", "wb") for name in ("train", "valid")}
    lengths = {"train": [], "valid": []}
    bytes_of = {"train": [], "valid": []}
    while (batch := batches.get()) is not None:
        if isinstance(batch, BaseException):
            raise batch
        for text, encoded in zip(
            batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True
        ):
            name = "valid" if held_out(text, share) else "train"
            ids = np.array([common.BOS, *encoded.ids, common.EOS], np.uint16)
            files[name].write(ids.tobytes())
            lengths[name].append(len(ids))
            bytes_of[name].append(len(text.encode()))
    for file in files.values():
        file.close()
    bar.close()

    count = sum(map(len, lengths.values()))
    (folder / "bad_rows.txt").write_text("\n".join(bad.named) + "\n" if bad.named else "")
    bad.report(folder if count else None)
    if not count:
        raise common.BadInput(
            f"{path} has no usable document; first problem: {(bad.named or ['no text in it'])[0]}"
        )
    if 0 < share < 1:
        top_up_valid(folder, lengths, bytes_of)
        if not lengths["train"] or not lengths["valid"]:
            raise common.BadInput(
                f"{path} has {count} usable document: too few to hold one out; name a VALID file"
            )
    for name in lengths:
        np.save(
            folder / f"{name}.idx.npy",
            np.append(0, np.cumsum(lengths[name], dtype=np.int64)).astype(np.int64),
        )
    for name in (*(f"{n}.bin" for n in lengths), *(f"{n}.idx.npy" for n in lengths)):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    fingerprint = f"{digest.hexdigest()}-{hash_file(folder / 'tokenizer.json')}-{share}"
    return {
        "fingerprint": fingerprint,
        "bad_rows": bad.count,
        "vocab_size": tokenizer.get_vocab_size(),
        **{
            name: {
                "documents": len(lengths[name]),
                "tokens": sum(lengths[name]),
                "bytes": sum(bytes_of[name]),
            }
            for name in lengths
        },
    }


def top_up_valid(folder, lengths, bytes_of):
    """Move the last training documents over until 20, or a tenth of a small set, are held out."""
    total = len(lengths["train"]) + len(lengths["valid"])
    move = min(20, total // 10 or 1) - len(lengths["valid"])
    if move <= 0 or len(lengths["train"]) <= move:
        return
    size = 2 * sum(lengths["train"][-move:])
    with open(folder / "train.bin", "r+b") as train, open(folder / "valid.bin", "ab") as valid:
        train.seek(-size, os.SEEK_END)
        valid.write(train.read())
        train.seek(-size, os.SEEK_END)
        train.truncate()
    for table in (lengths, bytes_of):
        table["valid"] += table["train"][-move:]
        del table["train"][-move:]


def main():
    if not DATA:
        raise common.BadInput("DATA is empty; name the text: python data/prepare_text.py DATA=my.jsonl.gz")
    folder = prepare(DATA, TOKENIZER, VOCAB_SIZE, VALID_SHARE, OUT, TXT_CHARS)
    print(folder, flush=True)
    return json.loads((folder / "meta.json").read_text())


if __name__ == "__main__":
    common.cli(globals(), main)
