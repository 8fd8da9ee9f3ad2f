"""Train a byte-level BPE tokenizer on the text that it is for.

Writes OUT (tokenizer.json, for `tokenizers`) and tokenizer_config.json beside it (for `transformers`, with
the chat template `<s>role\\ncontent</s>\\n` in Jinja). Ids 0, 1, 2 are <pad>, <s>, </s>. Any bytes can be
encoded.

    python data/prepare_tokenizer.py DATA=my.jsonl.gz OUT=data/tokenizer.json
    python data/prepare_tokenizer.py DATA=a.jsonl,b.txt VOCAB_SIZE=12000
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from data import prepare_text

DATA = ""                     # .jsonl, .jsonl.gz, .txt or .txt.gz; several with commas between
OUT = "data/tokenizer.json"   # its folder also gets tokenizer_config.json
VOCAB_SIZE = 6_400            # tokens, at most 65,535 (token files are uint16); 6,400 is MiniMind's
SAMPLE_MB = 200               # megabytes of text looked at, from the start; bounds the memory


def first_of(texts):
    """Texts until SAMPLE_MB are through."""
    left = SAMPLE_MB * 1_000_000
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode())
        yield text


def train(texts, out, vocab_size):
    """Train on `texts`, write `out` and tokenizer_config.json beside it, return the Tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    if not 259 <= vocab_size <= 65_535:
        raise common.BadInput(
            f"VOCAB_SIZE {vocab_size} must be between 259 (every byte and three special tokens) "
            "and 65,535 (token files are uint16)"
        )
    tokenizer = Tokenizer(models.BPE())
    # A newline is always a token of its own, so that text splits the same before and after a chat header.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=common.SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "pad_token": "<pad>", "unk_token": None, "clean_up_tokenization_spaces": False,
              "model_max_length": 32_768, "chat_template": common.CHAT_TEMPLATE}
    common.write_whole(out.parent / "tokenizer_config.json",
                       lambda file: file.write(json.dumps(config, ensure_ascii=False, indent=1).encode()))
    common.write_whole(out, lambda file: file.write(tokenizer.to_str(pretty=True).encode()))
    return tokenizer


def main():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not DATA:
        raise common.BadInput(
            "DATA is empty; name the text: python data/prepare_tokenizer.py DATA=my.jsonl.gz"
        )
    bad = prepare_text.BadRows()
    texts = (text for path in DATA.split(",") for text, _ in prepare_text.documents(path, bad))
    tokenizer = train(first_of(texts), OUT, VOCAB_SIZE)
    bad.report()
    print(f"{OUT}: {tokenizer.get_vocab_size()} tokens", flush=True)
    if tokenizer.get_vocab_size() < VOCAB_SIZE:
        print(f"the text has no more pairs to merge: fewer tokens than VOCAB_SIZE={VOCAB_SIZE}", flush=True)
    return {"vocab_size": tokenizer.get_vocab_size()}


if __name__ == "__main__":
    common.cli(globals(), main)
