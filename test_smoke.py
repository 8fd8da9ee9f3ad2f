"""All tests: layers against slow twins, the plumbing against its promises, the scripts on tiny data.

    pytest            everything that runs on this machine
    pytest -k rope    one thing
"""

import ast
import contextlib
import dataclasses
import datetime
import errno
import gzip
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import common
import export
import serve
import train_distill
import train_dpo
import train_lora
import train_muon_dsa
import train_nsa_enwik8
import train_pretrain
import train_rag_bert
import train_sft
from data import (
    fit_muons,
    prepare_chats,
    prepare_enwik8,
    prepare_genotypes,
    prepare_poems,
    prepare_python_docs,
    prepare_text,
    prepare_tokenizer,
    score_poetry,
    simulate_genotypes,
    simulate_muons,
)

torch.set_num_threads(1)                     # the models are tiny: a second thread would only wait
os.environ["OMP_NUM_THREADS"] = "1"          # in the processes started here too
ROOT = Path(__file__).parent
SCRIPTS = ["train_pretrain.py", "train_nsa_enwik8.py", "serve.py", "bench.py", "data/prepare_text.py",
           "data/prepare_tokenizer.py", "data/prepare_python_docs.py", "data/prepare_enwik8.py",
           "data/simulate_muons.py", "data/fit_muons.py", "train_muon_dsa.py",
           "data/prepare_chats.py", "train_sft.py", "train_dpo.py",
           "export.py", "train_lora.py", "train_distill.py", "train_rag_bert.py",
           "data/prepare_genotypes.py", "data/simulate_genotypes.py",
           "data/score_poetry.py", "data/prepare_poems.py"]
TINY = dict(
    DIM=32,
    N_LAYERS=2,
    N_HEADS=4,
    N_KV_HEADS=2,
    SEQ_LEN=64,
    STEPS=12,
    BATCH=8,
    MICRO_BATCH=4,
    WARMUP=2,
    DTYPE="float32",
    LOG_EVERY=1,
    EVAL_EVERY=4,
    EVAL_ROWS=4,
    SAVE_EVERY=5,
    SAMPLE_EVERY=0,
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tiny_lm(**changes):
    """A model whose zero-initialised matrices are not zero, in float64."""
    torch.manual_seed(1)
    model = common.LM(
        **{**dict(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, seq_len=128), **changes}
    )
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.double()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A JSONL of 600 documents from a small grammar, of very different lengths."""
    rng = np.random.default_rng(0)
    nouns, verbs = "cat dog sun sea 月 山 河 boat tree king".split(), "sees finds likes 望 keeps".split()

    def sentence():
        return f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}."
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    rows = [" ".join(sentence() for _ in range(1 + int(rng.exponential(4)))) for _ in range(600)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    return path


@pytest.fixture(scope="session")
def tokens(text, tmp_path_factory):
    """Its token files, with a tokenizer of 320 tokens."""
    return prepare_text.prepare(
        text, vocab_size=320, share=0.1, out=tmp_path_factory.mktemp("tokens") / "tiny"
    )


@pytest.fixture(scope="session")
def tokenizer(tokens):
    return common.load_tokenizer(tokens / "tokenizer.json")


@pytest.fixture
def train(tokens, tmp_path, monkeypatch):
    """Run train_pretrain.main() in this process with constants changed; returns its metrics."""
    def run(module=train_pretrain, **constants):
        with monkeypatch.context() as patch:
            tiny = {k: v for k, v in TINY.items() if hasattr(module, k)} | {"DATA": str(tokens)}
            for name, value in {**tiny, "OUT": str(tmp_path / "run"), **constants}.items():
                patch.setattr(module, name, value)
            return module.main()
    return run


def words(tokens, **constants):
    return [f"{k}={v}" for k, v in {**TINY, "DATA": tokens, **constants}.items()]


def launch(*arguments, ranks=0, **options):
    """A script in a process of its own, or under torchrun."""
    runner = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else [sys.executable]
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([*runner, *map(str, arguments)], **options)


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def weights(out, name="checkpoint.pt"):
    return common.load(Path(out) / name)["model"]


def same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# Constants.

@pytest.mark.parametrize("word, message", [
    ("DMI=64", "no constant 'DMI'; did you mean DIM?"), ("STEPS=2.5", "STEPS is int (350), got float (2.5)"),
    ("STEPS", "expected NAME=value, got 'STEPS'"), ("STEPS=many", "STEPS is int (350), got str (many)"),
    ("LR=nan", "LR is float (0.003), got str (nan)"), ("LR=1e999", "LR must be a finite number, got 1e999"),
    ("RESUME=1", "RESUME is bool (True), got int (1)"), ("STEPS=True", "STEPS is int (350), got bool (True)"),
])
def test_bad_override_is_one_sentence(word, message):
    with pytest.raises(common.BadInput) as error:
        common.override(dict(vars(train_pretrain)), [word])
    assert str(error.value) == message


def test_override_sets_and_converts(monkeypatch):
    names = {**vars(train_pretrain)}
    assert common.override(names, ["LR=1", "DATA=3.txt", "TIED=False", "STEPS=7"]) == {
        "LR": 1.0, "DATA": "3.txt", "TIED": False, "STEPS": 7}
    assert names["LR"] == 1.0 and isinstance(names["LR"], float)


@pytest.mark.parametrize("script", SCRIPTS)
def test_constants_are_literals_that_something_reads(script):
    tree = ast.parse((ROOT / script).read_text())
    constants = {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets
                 if isinstance(t, ast.Name) and t.id.isupper()}
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    read |= {n.attr for other in SCRIPTS for n in ast.walk(ast.parse((ROOT / other).read_text()))
             if isinstance(n, ast.Attribute)}
    assert constants and constants <= read, constants - read
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)):
        defaults = (
            [d for d in ast.walk(function.args) if isinstance(d, ast.Name)]
            if hasattr(function, "args")
            else []
        )
        assert not {d.id for d in defaults} & constants - {"TXT_CHARS"}, (
            f"a constant is a default of {function.name}"
        )


@pytest.mark.parametrize("script", [*SCRIPTS, "test_smoke.py"])
def test_every_name_that_a_script_takes_from_common_exists(script):
    tree = ast.parse((ROOT / script).read_text())
    taken = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
             and isinstance(n.value, ast.Name) and n.value.id == "common"}
    assert not [name for name in taken if not hasattr(common, name)]


def test_help_and_errors_of_the_command_line():
    output = finish(launch("train_pretrain.py", "--help"))
    assert "python train_pretrain.py" in output and "SEQ_LEN = 512" in output and "def " not in output
    assert "  26M   DIM=512 N_LAYERS=8" in output                        # a preset
    for words_, message in [
        (["DATA=nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["DMI=3"], "did you mean DIM?"),
    ]:
        output = finish(launch("train_pretrain.py", *words_), 1)
        assert message in output and "Traceback" not in output


# One update.

def test_schedule():
    scale = [common.lr_scale(s, 100, 10, 0.1) for s in range(101)]
    assert (
        scale[0] == pytest.approx(1 / 11)
        and max(scale) == scale[10] == 1
        and scale[100] == pytest.approx(0.1)
    )
    wsd = [common.lr_scale(s, 100, 10, 0.0, "wsd") for s in range(101)]
    assert wsd[10:71] == [1.0] * 61 and wsd[85] == pytest.approx(0.5) and wsd[100] == 0
    with pytest.raises(common.BadInput, match="neither cosine nor wsd"):
        common.lr_scale(5, 10, 1, 0, "linear")


class Counting(torch.nn.Linear):
    """Counts the backward passes that would not be synchronised."""
    unsynced = 0

    def no_sync(self):
        self.unsynced += 1
        return contextlib.nullcontext()


def test_update_is_the_same_however_it_is_cut():
    x, y = torch.randn(8, 6, 4).double(), torch.randn(8, 6, 4).double()
    keep = torch.rand(8, 6) < torch.linspace(0, 1, 8)[:, None]  # ragged: the first row has nothing at all
    results = []
    for cut in (1, 2, 4, 8):
        torch.manual_seed(0)
        net = Counting(4, 4).double()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        run = common.Run(0, 0, 1, torch.device("cpu"), torch.float64, 0)

        def loss_of(batch, net=net):
            x, y, keep = batch
            return ((net(x) - y).square().sum(-1) * keep).sum(), keep.sum()
        batches = list(zip(x.chunk(cut), y.chunk(cut), keep.chunk(cut), strict=True))
        done = [common.update(run, net, [optimizer], batches, loss_of, 0.5, s) for s in range(3)]
        results.append((net.weight.detach(), [d.loss for d in done], [d.grad_norm for d in done]))
    for weight, losses, norms in results[1:]:
        close(weight, results[0][0])
        assert losses == pytest.approx(results[0][1], rel=1e-12) and norms == pytest.approx(
            results[0][2], rel=1e-12
        )


def test_gradients_are_synchronised_on_the_last_micro_batch_only(monkeypatch):
    net = Counting(2, 1)
    run = common.Run(0, 0, 2, torch.device("cpu"), torch.float32, 0)
    monkeypatch.setattr(common.dist, "all_reduce", lambda t: None)
    common.update(run, net, [torch.optim.SGD(net.parameters(), lr=0.1)], [torch.ones(3, 2)] * 4,
                  lambda x: (net(x).sum(), len(x)), 0, 0)
    assert net.unsynced == 3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_update_leaves_the_weights(poison):
    net = torch.nn.Linear(2, 1)
    before = net.weight.clone()
    run = common.Run(0, 0, 1, torch.device("cpu"), torch.float32, 0)
    done = common.update(
        run,
        net,
        [torch.optim.AdamW(net.parameters(), lr=0.1)],
        [torch.full((3, 2), poison)],
        lambda x: (net(x).sum(), 3),
        1.0,
        0,
    )
    assert not done.applied and torch.equal(net.weight, before) and net.weight.grad is None


def test_run_that_only_diverges_stops_and_names_the_rows(train, tmp_path):
    with pytest.raises(common.BadInput, match=r"3 updates in a row was not finite.*lower LR.*rows \d+-\d+"):
        train(OPTIMIZER="adamw", LR=1e38, WARMUP=0, MAX_BAD_STEPS=3, CLIP=0.0)


@pytest.mark.parametrize(
    "window, hour, inside",
    [
        ("22:00-07:00", 23, True),
        ("22:00-07:00", 3, True),
        ("22:00-07:00", 7, False),
        ("22:00-07:00", 12, False),
        ("01:00-05:00", 2, True),
        ("01:00-05:00", 5, False),
        ("", 3, False),
    ],
)
def test_night(window, hour, inside):
    assert common.in_window(window, datetime.time(hour)) is inside


def test_night_changes_threads_and_micro_batch_but_not_the_update(train, tmp_path, monkeypatch):
    train(OUT=str(tmp_path / "day"), OPTIMIZER="adamw")
    threads, used, real = torch.get_num_threads(), [], common.update
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(common, "update", lambda *a: used.append(len(a[3])) or real(*a))
    now = datetime.datetime.now()
    window = f"{now.hour:02}:{now.minute:02}-{(now.hour + 2) % 24:02}:{now.minute:02}"
    with pytest.raises(common.BadInput, match="not of the form 22:00-07:00"):
        train(NIGHT="ten")
    train(OUT=str(tmp_path / "night"), OPTIMIZER="adamw", NIGHT=window)
    assert used[:3] == [2, 4, 2] and threads == 1  # half the threads; micro-batches of 2 rows, not 4
    same_weights(weights(tmp_path / "day"), weights(tmp_path / "night"), 1e-5)


# Layers against the obvious.

def test_rope_scores_depend_on_distance_alone():
    table = common.rope_table(16, 64).double()
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()

    def score(t, s):
        turned = [common.rotate(x, *table[:, p].view(2, 1, 1, 8)) for x, p in ((q, t), (k, s))]
        return (turned[0] * turned[1]).sum()
    close(score(5, 2), score(40, 37), 1e-6)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rope_and_yarn_equal_transformers(factor):
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    rope = {"rope_type": "default", "rope_theta": 1e6} if factor == 1 else {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": factor, "original_max_position_embeddings": 512}
    config = Qwen3Config(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )
    assert factor == 1 or "yarn" in ROPE_INIT_FUNCTIONS
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(2048)[None])
    ours = common.rope_table(64, 2048, 1e6, factor, 512)
    close(ours[0], cos[0, :, :32], 2e-4)
    close(ours[1], sin[0, :, :32], 2e-4)


@pytest.mark.parametrize("tied, qk_norm", [(True, True), (False, True)])
def test_weights_map_one_to_one_onto_qwen3(tied, qk_norm):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    ours = tiny_lm(tied=tied, qk_norm=qk_norm).float()
    s = ours.sizes
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=s["head_dim"],
            intermediate_size=s["hidden_dim"],
            rms_norm_eps=s["eps"],
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": s["theta"]},
            max_position_embeddings=128,
        )
    ).eval()
    names = [
        ("embedding", "model.embed_tokens"),
        ("layers", "model.layers"),
        ("attention.q.", "self_attn.q_proj."),
        ("attention.k.", "self_attn.k_proj."),
        ("attention.v.", "self_attn.v_proj."),
        ("attention.out", "self_attn.o_proj"),
        ("attention.norm_q", "self_attn.q_norm"),
        ("attention.norm_k", "self_attn.k_norm"),
        ("mlp.gate", "mlp.gate_proj"),
        ("mlp.up", "mlp.up_proj"),
        ("mlp.down", "mlp.down_proj"),
        ("norm_attn", "input_layernorm"),
        ("norm_mlp", "post_attention_layernorm"),
        ("head.", "lm_head."),
    ]
    state = {}
    for name, value in ours.state_dict().items():
        name = "model.norm.weight" if name == "norm.weight" else name
        for a, b in names:
            name = name.replace(a, b) if not name.startswith("model.norm") else name
        state[name] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ids = torch.randint(0, 300, (2, 50))
    with torch.no_grad():
        close(ours.hidden(ids)[0] @ ours.head_weight.T, theirs(ids).logits, 1e-4)


def random_documents(B, T, pad):
    docs = (torch.rand(B, T) < 0.06).long().cumsum(1)
    docs[0] = 0                                                          # one long document
    docs[1, T - pad:] = -1
    return docs


@pytest.mark.parametrize("B, T", [(3, 5), (2, 64), (3, 301), (2, 530)])
def test_document_attention_equals_its_twin_with_gradients(B, T):
    torch.manual_seed(T)
    docs = random_documents(B, T, T // 5)
    q, k, v = (torch.randn(B, h, T, 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
    real = (docs >= 0)[:, None, :, None]
    weight = torch.randn(B, 6, T, 8).double() * real
    documents = common.Documents(docs)
    fast, slow = common.attend_documents(q, k, v, documents), common.attend(q, k, v, documents.keep())
    close(fast * real, slow * real)
    assert not fast.masked_select(~real).any()                          # padding gets zeros
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), (q, k, v)),
                    torch.autograd.grad((slow * weight).sum(), (q, k, v)), strict=True):
        close(a, b, 1e-11)


def branches(T):
    """(docs, shared, keep) (3, T): documents of which some go on after the first tokens of one before; keep
    as its definition says, pair by pair."""
    rng = np.random.default_rng(T)
    docs, shared = torch.full((3, T), -1), torch.zeros(3, T, dtype=torch.long)
    keep = torch.zeros(3, 1, T, T, dtype=torch.bool)
    for b in range(3):
        at, n = 0, 0
        while at < T - 2 * b:
            trunk = (at, min(T, at + int(rng.integers(1, T // 2))))
            for i in range(1 + int(rng.integers(3))):
                begin, end = trunk if i == 0 else (at, min(T, at + int(rng.integers(1, 9))))
                if begin < end:
                    seen = int(rng.integers(trunk[1] - trunk[0] + 1)) if i else 0
                    docs[b, begin:end], shared[b, begin:end] = n, seen
                    for t in range(begin, end):
                        keep[b, 0, t, begin:t + 1] = keep[b, 0, t, trunk[0]:trunk[0] + seen] = True
                    at, n = end, n + 1
    return docs, shared, keep


@pytest.mark.parametrize("T", [6, 40, 301])
def test_documents_that_share_their_beginning_equal_their_twin_with_gradients(T):
    docs, shared, keep = branches(T)
    documents, real = common.Documents(docs, shared), (docs >= 0)[:, None, :, None]
    assert torch.equal(documents.keep() & real, keep) and bool((shared > 0).any())
    q, k, v = (torch.randn(3, h, T, 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
    weight = torch.randn(3, 6, T, 8).double() * real
    fast, slow = common.attend_documents(q, k, v, documents), common.attend(q, k, v, keep | ~real)
    close(fast, slow * real)
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), (q, k, v)),
                    torch.autograd.grad((slow * weight).sum(), (q, k, v)), strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("model", ["lm", "moe", "window", "nsa", "classic"])
def test_a_shared_beginning_is_computed_once_and_means_the_same(model):
    """Two answers to a question, the question twice or once: the same states and gradients."""
    cut = dict(window=8, compress_block=4, compress_stride=4, select_block=4)
    changes = {"lm": {}, "moe": dict(n_experts=4), "window": dict(attention="window", sparse=dict(window=8)),
               "nsa": dict(attention="nsa", sparse=cut)}
    if model == "classic":
        net = common.Classic(300, 32, 2, 4, 64, 128).double().eval()
    else:
        net = tiny_lm(**changes[model]).eval()
    ids = torch.randint(3, 300, (1, 70))
    question, one, two = ids[:, :37], ids[:, 37:50], ids[:, 50:]
    docs, wide = ((torch.arange(n) >= 50).long()[None] for n in (70, 107))
    twice = net.hidden(torch.cat([question, one, question, two], 1), wide)[0]
    once = net.hidden(ids, docs, docs * 37)[0]
    wanted = torch.cat([twice[:, :50], twice[:, 87:]], 1)
    close(once, wanted, 1e-9)
    weight = torch.randn(70, once.shape[-1]).double()
    grads = [torch.autograd.grad((x * weight).sum(), list(net.parameters()), allow_unused=True,
                                 materialize_grads=True) for x in (once, wanted)]
    assert sum(float(x.abs().sum()) > 0 for x in grads[0]) >= len(grads[0]) - 1        # not a head of its own
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-8)
    with pytest.raises(ValueError, match="shared beginning"):
        tiny_lm(n_before=1).hidden(ids, docs, docs * 37)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = (torch.randn(2, h, 40, 8).double() for h in (6, 2, 2))
    documents = common.Documents(torch.zeros(2, 40, dtype=torch.long))
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    close(common.attend_documents(q, k, v, documents), common.attend_documents(q, *wide, documents))


@pytest.mark.parametrize("model", ["lm", "moe", "before", "classic"])
def test_nothing_leaks_from_the_future_or_a_neighbour(model):
    if model == "classic":
        net = common.Classic(300, 32, 2, 4, 64, 128).double().eval()
    else:
        net = tiny_lm(**{"moe": dict(n_experts=4), "before": dict(n_before=3)}.get(model, {})).eval()
    ids, docs = torch.randint(3, 300, (1, 90)), (torch.arange(90) // 37)[None]
    before = net.hidden(ids, docs)[0]
    changed = ids.clone()
    changed[0, 60] = 5
    after = net.hidden(changed, docs)[0]
    same = (before == after).all(-1)[0] if model == "lm" else ((before - after).abs() < 1e-12).all(-1)[0]
    assert same[:60].all() and same[74:].all() and not same[60:74].any()


@pytest.mark.parametrize("n_before", [0, 3])
def test_packed_equals_unpacked_loss_and_gradients(n_before):
    net = tiny_lm(n_before=n_before)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 300, n) for n in (20, 3, 41, 30, 17, 2)]
    packed = common.collate([[(d,) for d in documents]], 128)
    padded = common.collate([[(d,)] for d in documents], 64)
    grads = []
    for ids, docs, targets in (packed, padded):
        loss, count, _ = net(ids, docs, targets)
        net.zero_grad()
        loss.backward()
        grads.append((loss.detach(), count, [p.grad.clone() for p in net.parameters()]))
    assert grads[0][1] == grads[1][1] == sum(len(d) - 1 for d in documents)
    close(grads[0][0], grads[1][0])
    for a, b in zip(grads[0][2], grads[1][2], strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("n, v", [(1, 7), (200, 50), (777, 6400)])
def test_chunked_cross_entropy_equals_the_full_one(n, v):
    h, w = (
        torch.randn(n, 16, dtype=torch.float64, requires_grad=True),
        torch.randn(v, 16, dtype=torch.float64, requires_grad=True),
    )
    y = torch.randint(0, v, (n,))
    y[::3] = common.IGNORE
    loss, count = common.linear_cross_entropy(h[None], w, y[None])
    full = F.cross_entropy(h @ w.T, y, ignore_index=common.IGNORE, reduction="sum")
    assert count == (y >= 0).sum()
    close(loss, full)
    for a, b in zip(
        torch.autograd.grad(3 * loss, (h, w)), torch.autograd.grad(3 * full, (h, w)), strict=True
    ):
        close(a, b)
    h32, w32 = h.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    if n == 777:
        peak = bench.peak_of(lambda: common.linear_cross_entropy(h32[None], w32, y[None])[0].backward())
        assert peak < 2 * bench.peak_of(lambda: torch.empty(700, 6400)) + 2 * w32.numel() * 4 + 2**20
    h, y = torch.randn(9000, 16), torch.randint(0, 6400, (9000,))
    if n == 777:  # eleven times the rows, not the memory
        many = bench.peak_of(
            lambda: common.linear_cross_entropy(h.requires_grad_()[None], w32, y[None])[0].backward()
        )
        assert many < 2 * peak and many < 9000 * 6400 * 4 / 4


def test_moe_equals_a_loop_over_tokens_and_drops_none():
    torch.manual_seed(0)
    moe = common.MoE(16, 24, 5, 2, 1).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.5)
    moe.router.weight.data[0] += 3                                       # uneven on purpose
    x, real = torch.randn(2, 21, 16, dtype=torch.float64, requires_grad=True), torch.rand(2, 21) < 0.8
    y, balance = moe(x, real)
    rows, even = [], torch.zeros((), dtype=torch.float64)
    for b in range(2):
        share, mean = torch.zeros(5).double(), torch.zeros(5).double()
        for t in range(21):
            p = (moe.router.weight @ x[b, t]).softmax(0)
            top, chosen = p.topk(2)
            rows.append(
                moe.shared(x[b, t])
                + sum(
                    w / top.sum() * moe.experts[e](x[b, t]) for w, e in zip(top, chosen.tolist(), strict=True)
                )
            )
            if real[b, t]:
                share[chosen] += 1 / (2 * real[b].sum().item())
                mean = mean + p / real[b].sum().item()
        even = even + 5 * (share * mean).sum() * real[b].sum()
    close(y.view(-1, 16), torch.stack(rows))
    close(balance, even)
    parameters = [x, *moe.parameters()]
    for a, b in zip(torch.autograd.grad(y.square().sum() + balance, parameters),
                    torch.autograd.grad(torch.stack(rows).square().sum() + even, parameters), strict=True):
        close(a, b, 1e-10)
    halves = [moe(part, keep)[1] for part, keep in zip(x.split(1), real.split(1), strict=True)]
    close(sum(halves), balance)                                          # adds up over micro-batches


# Sparse attention.

CUTS = {
    "default": common.Cut(), "narrow window": common.Cut(window=7), "wide window": common.Cut(window=200),
    "overlap": common.Cut(compress_stride=8),
    "long blocks": common.Cut(compress_block=32, compress_stride=16),
    "short blocks": common.Cut(compress_block=8, compress_stride=4, n_selected=3),
    "first and local": common.Cut(compress_stride=8, select_block=8, n_selected=3, first_block=True,
                                  local_blocks=1),
    "more than there are": common.Cut(n_selected=40, compress_block=32),
    "one": common.Cut(select_block=32, n_selected=1),
}


def sparse_inputs(B, G, R, T, E, cut, memory, dtype=torch.float64):
    torch.manual_seed(T)
    shapes = [(B, G * R, T, E)] * 2 + [(B, G, T, E)] * 2 + [(B, G, memory + cut.finished(T - 1), E)] * 2
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    return [*inputs, torch.rand(B, T, G * R, 3, dtype=dtype, requires_grad=True)]


@pytest.mark.parametrize("B, G, R, T, memory", [
    (2, 2, 2, 130, 0), (1, 1, 4, 333, 1), (3, 2, 1, 15, 0), (1, 2, 2, 16, 2), (2, 1, 2, 17, 0),
    (1, 1, 1, 1, 0), (1, 2, 1, 31, 1), (1, 1, 2, 33, 0)])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_sparse_attention_equals_its_twin_with_gradients(B, G, R, T, memory, cut):
    inputs = sparse_inputs(B, G, R, T, 6, cut, memory)
    fast, slow = common.attend_sparse(*inputs, cut), common.attend_sparse_dense(*inputs, cut)
    close(fast, slow)
    grad = torch.randn_like(fast)
    grads = [torch.autograd.grad(y, inputs, grad, allow_unused=True) for y in (fast, slow)]
    for a, b in zip(*grads, strict=True):                                # q, turned, k, v, ck, cv, gates
        assert torch.isfinite(a).all()
        close(a, torch.zeros_like(a) if b is None else b, 1e-10)


def test_long_sparse_attention_in_parts_equals_its_twin(monkeypatch):
    """Small workspaces: many spans, parts of rows, groups and queries, tiles of both sizes."""
    monkeypatch.setattr(common, "WORKSPACE", 2**12)
    cut = common.Cut(window=100, compress_stride=8)
    inputs = sparse_inputs(2, 2, 2, 2600, 4, cut, 0)
    fast, slow = common.attend_sparse(*inputs, cut), common.attend_sparse_dense(*inputs, cut)
    close(fast, slow)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (fast, slow)), strict=True):
        close(a, b, 1e-9)


def test_flex_attention_equals_the_sparse_twin_forward():
    if not __import__("shutil").which("g++"):
        pytest.skip("no C++ compiler")
    cut = common.Cut(window=40)
    inputs = [x.detach() for x in sparse_inputs(2, 2, 2, 200, 16, cut, 1, torch.float32)]
    slow = common.attend_sparse_dense(*inputs, cut)
    torch.testing.assert_close(common.attend_sparse_flex(*inputs, cut), slow, rtol=1e-4, atol=1e-5)


@gpu
def test_sparse_attention_on_a_gpu_equals_the_twin_with_gradients():
    """Both executions: flex where 128 divides the length, tiles elsewhere; straight-through included."""
    for T in (256, 300):
        cut = common.Cut()
        inputs = sparse_inputs(1, 2, 8, T, 64, cut, 0, torch.float32)
        inputs = [x.detach().cuda().requires_grad_() for x in inputs]
        fast, slow = common.attend_sparse(*inputs, cut), common.attend_sparse_dense(*inputs, cut)
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)
        for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (fast, slow)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_float32_products_by_onednn_are_float32():
    a, b = (torch.randn(50, 64, 64) for _ in range(2))
    product = common.exact_products(lambda ctx, x, y: torch.bmm(x, y))(None, a, b)
    close(product.double(), a.double() @ b.double(), 2e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "bf16")


@pytest.mark.parametrize("window", [1, 7, 64, 65, 500])
def test_window_attention_equals_its_twin_with_gradients(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 201, 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
    t = torch.arange(201)
    keep = (t <= t[:, None]) & (t > t[:, None] - window)
    fast, slow = common.attend_window(q, k, v, window), common.attend(q, k, v, keep)
    close(fast, slow)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (fast, slow)), strict=True):
        close(a, b, 1e-10)


def choose_by_hand(p, t, cut):
    """The selection of one query by loops over blocks, from probabilities (N) of its compressed blocks."""
    own, scores = t // cut.select_block, {}
    for j in range(own):
        begin, end, total, touched = j * cut.select_block, (j + 1) * cut.select_block, 0.0, False
        for i, weight in enumerate(p.tolist()):
            a, b = i * cut.compress_stride, i * cut.compress_stride + cut.compress_block
            shared = min(b, end) - max(a, begin)
            if b <= t + 1 and shared > 0:
                total, touched = total + weight * shared / cut.compress_stride, True
        forced = (3, 0) if cut.first_block and j == 0 else (2, j) if own - j <= cut.local_blocks else None
        scores[j] = forced or ((1, total, j) if touched else (0, j))
    best = sorted(scores, key=scores.get, reverse=True)[:cut.n_selected]
    return best + [-1] * (cut.n_selected - len(best))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_selection_equals_loops_over_blocks(cut):
    torch.manual_seed(0)
    t = torch.arange(150)[:, None]
    n = cut.finished(149)
    p = torch.rand(150, n).double().masked_fill(torch.arange(n) >= cut.finished(t), 0)
    chosen = common.choose_blocks(common.importance(p, cut, 150 // cut.select_block + 1), t, cut)
    assert chosen.tolist() == [choose_by_hand(p[i], i, cut) for i in range(150)]


def test_all_blocks_selected_is_full_attention():
    cut = common.Cut(n_selected=99)
    inputs = sparse_inputs(2, 2, 2, 100, 8, cut, 0)
    inputs[6] = torch.tensor([0.0, 1.0, 0.0]).double().expand(2, 100, 4, 3)
    full = common.attend(*inputs[1:4], torch.ones(100, 100, dtype=torch.bool).tril())
    close(common.attend_sparse(*inputs, cut), full)
    inputs[6] = torch.tensor([0.0, 0.0, 1.0]).double().expand(2, 100, 4, 3)
    close(common.attend_sparse(*inputs, common.Cut(window=100)), full)


@pytest.mark.parametrize("T", [16, 33, 200])
def test_sparse_attention_never_looks_ahead(T):
    cut = common.Cut(compress_stride=8, window=20)
    net = sparse_lm(n_layers=1, seq_len=200, sparse=dict(compress_stride=8, window=20))
    ids = torch.randint(3, 300, (1, T))
    with torch.no_grad():
        before = net.hidden(ids)[0]
        for at in {T - 1, T // 2, 15, 14}:
            changed = ids.clone()
            changed[0, at] = 299 - changed[0, at]
            after = net.hidden(changed)[0]
            assert torch.equal(before[:, :at], after[:, :at]) and not torch.equal(before[:, at], after[:, at])
    assert cut.finished(14) == 0 and cut.finished(15) == 1 and cut.finished(22) == 1 and cut.finished(23) == 2


def test_straight_through_gates_train_the_selection():
    """With the compressed branch shut, its keys still learn which blocks to choose."""
    cut = common.Cut(n_selected=1)
    inputs = sparse_inputs(1, 1, 2, 80, 8, cut, 0)
    inputs[6] = torch.tensor([0.0, 1.0, 0.0]).double().expand(1, 80, 2, 3)
    q, ck, cv = torch.autograd.grad(common.attend_sparse(*inputs, cut).square().sum(),
                                    [inputs[0], inputs[4], inputs[5]])
    assert q[:, :, 32:].abs().min() > 0 and ck[:, :, 0].abs().min() > 0 and not cv.any()


SPARSE = [dict(), dict(compress_stride=8, n_memory=2),
          dict(compress_block=8, compress_stride=4, select_block=8, n_selected=3, window=9, first_block=True,
               local_blocks=1, compression="pool"),
          dict(compress_block=32, compress_stride=16, n_selected=1, window=20, compression="conv",
               n_memory=1)]


def sparse_lm(attention="nsa", **changes):
    net = tiny_lm(attention=attention, **changes)
    for p in net.parameters():
        if p.ndim > 2:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


@pytest.mark.parametrize("joined, n_before", [(False, 0), (True, 2)])
@pytest.mark.parametrize("attention, sparse", [("window", dict(window=5)), *(("nsa", s) for s in SPARSE)])
def test_sparse_reading_equals_the_parallel_pass_at_every_position(attention, sparse, joined, n_before):
    net = sparse_lm(attention, sparse=sparse, n_before=n_before)
    ids = torch.randint(3, 300, (3, 120))
    with torch.no_grad():
        parallel = net.hidden(ids)[0]
        if joined:
            net = common.for_inference(net, torch.float64)
        for lengths in (*([n] * 3 for n in (1, 2, 15, 16, 17, 32, 33, 40)), [5, 17, 32]):
            cache, begin = common.Cache(net, 3, 120), torch.zeros(3, max(lengths), dtype=torch.long)
            for row, n in enumerate(lengths):
                begin[row, :n] = ids[row, :n]
            last = net.read(begin, lengths, cache)
            for more in range(120 - max(lengths)):
                at = [n + more for n in lengths]
                close(last, torch.stack([parallel[row, n - 1] for row, n in enumerate(at)]), 1e-11)
                following = torch.stack([ids[row, n] for row, n in enumerate(at)])[:, None]
                last = net.read(following, [1] * 3, cache)


@pytest.mark.parametrize("period", [1, 32])
@pytest.mark.parametrize("sparse", SPARSE)
def test_blocks_of_the_same_tokens_are_chosen_alike_at_once_and_one_by_one(sparse, period):
    """As in a run of spaces: their scores are equal but for rounding."""
    net = sparse_lm(sparse={**sparse, "window": 5})
    ids = torch.randint(3, 300, (2, period)).repeat(1, 120 // period + 1)[:, :120]
    with torch.no_grad():
        parallel, cache = net.hidden(ids)[0], common.Cache(net, 2, 120)
        for t in range(120):
            close(net.read(ids[:, t:t + 1], [1] * 2, cache), parallel[:, t], 1e-11)


@pytest.mark.parametrize("attention, sparse", [("window", dict(window=5)), *(("nsa", s) for s in SPARSE)])
def test_sparse_attention_respects_documents(attention, sparse):
    net = sparse_lm(attention, sparse=sparse).train()
    docs = torch.zeros(2, 100, dtype=torch.long)
    docs[0, 37:], docs[0, 90:], docs[1, 3:], docs[1, 80:] = 1, -1, 1, 2
    ids, targets = torch.randint(3, 300, (2, 2, 100)).unbind()
    targets = targets.masked_fill(docs < 0, common.IGNORE)
    packed = net(ids, docs, targets)[0]
    grads = torch.autograd.grad(packed, net.parameters())
    alone = sum(net(ids[r:r + 1, a:b], docs[r:r + 1, a:b] * 0, targets[r:r + 1, a:b])[0]
                for r, a, b in [(0, 0, 37), (0, 37, 90), (1, 0, 3), (1, 3, 80), (1, 80, 100)])
    close(packed, alone, 1e-11)
    for a, b in zip(grads, torch.autograd.grad(alone, net.parameters()), strict=True):
        close(a, b, 1e-9)


def test_sparse_grouped_heads_equal_repeated_heads():
    """A group that shares keys and selection equals a model of one group as wide, head by head."""
    cut = common.Cut()
    inputs = sparse_inputs(2, 1, 3, 90, 8, cut, 0)
    two = [torch.cat([x, x.flip(0)], 2 if i == 6 else 1) for i, x in enumerate(inputs)]
    one, other = common.attend_sparse(*inputs, cut), common.attend_sparse(*(x.flip(0) for x in inputs), cut)
    close(common.attend_sparse(*two, cut), torch.cat([one, other], 1))


def test_bfloat16_sparse_attention_is_near_float64():
    cut = common.Cut()
    inputs = sparse_inputs(1, 2, 2, 600, 32, cut, 0)
    exact = common.attend_sparse(*inputs, cut)
    rough = common.attend_sparse(*(x.detach().bfloat16() for x in inputs), cut).double()
    assert ((rough - exact).norm() / exact.norm()) < 0.08                # some queries choose another block


def test_benchmarks_wait_for_a_gpu_and_say_where_sparse_attention_is_ahead(tmp_path, monkeypatch, capsys):
    waited = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
        bench.fastest(3, lambda: None)
    assert len(waited) == 6                              # before and after each that counts
    monkeypatch.chdir(tmp_path)
    ratios = {"core forward+backward": (1.2, 0.9, 1.1, 2), "decode a token behind": (0.5, 0.6, 0.7, 0.8)}
    bench.plot_lengths([bench.row(f"{kind} {512 << i} float32", 1.0, 1 / ratio, "ms", ratio)
                        for kind, by in ratios.items() for i, ratio in enumerate(by)])
    said = capsys.readouterr().out
    assert "core forward+backward, float32: nsa is ahead from 2048 tokens on" in said
    assert "decode a token behind, float32: nsa is not ahead up to 4096 tokens" in said
    assert Path("out/bench/nsa.png").stat().st_size > 0


@pytest.mark.parametrize("changes, message", [
    (dict(compress_stride=5), "COMPRESS_BLOCK 16 must be a positive multiple of 5"),
    (dict(select_block=24), "SELECT_BLOCK 24 must be a positive multiple of 16"),
    (dict(window=0), "WINDOW 0 must be at least 1"),
    (dict(n_selected=0), "N_SELECTED 0 must be"),
    (dict(local_blocks=5), "LOCAL_BLOCKS 5 must be between 0 and 4"),
    (dict(compression="mean"), "COMPRESSION 'mean' is not one of mlp, pool, conv"),
    (dict(n_memory=-1), "N_MEMORY -1 must be at least 0"),
])
def test_cuts_that_do_not_fit_are_one_sentence(changes, message):
    with pytest.raises(common.BadInput) as error:
        tiny_lm(attention="nsa", sparse=changes)
    assert message in str(error.value)


# Generation.

@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("changes", [{}, dict(n_experts=4), dict(n_before=3)])
def test_cached_reading_equals_the_parallel_pass_at_every_position(joined, changes):
    net = tiny_lm(**changes).eval()
    ids = torch.randint(3, 300, (1, 40))
    with torch.no_grad():
        parallel = net.hidden(ids)[0][0]
        if joined:
            net = common.for_inference(net, torch.float64)
        for cut in ([1] * 40, [7, 1, 1, 13, 1, 17], [39, 1]):  # token by token, in chunks, in one pass
            cache, at = common.Cache(net, 1, 40), 0
            for n in cut:
                last = net.read(ids[:, at:at + n], [n], cache)
                at += n
                close(last[0], parallel[at - 1], 1e-10)


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize(
    "settings_", [dict(temperature=0), dict(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.3)]
)
def test_ragged_batch_equals_one_at_a_time_cached_or_not(settings_, n_before):
    net = common.for_inference(tiny_lm(n_before=n_before), torch.float64)
    prompts = [[1, 5, 9], [1], list(range(3, 40)), [1, 7]]

    def tokens_of(prompts, seeds, **more):
        steps = list(common.generate(net, prompts, 30, seeds=seeds, eos=-1, **settings_, **more))
        return [list(row) for row in zip(*steps, strict=True)]
    together = tokens_of(prompts, [1, 2, 3, 4])
    assert together == tokens_of(prompts, [1, 2, 3, 4], cached=False)
    assert together == [tokens_of([p], [s])[0] for p, s in zip(prompts, [1, 2, 3, 4], strict=True)]


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("changes", [{}, dict(qk_norm=False, n_kv_heads=4, tied=False), dict(head_dim=6),
                                     dict(attention="window", sparse={"window": 20}, n_kv_heads=1)])
def test_fused_steps_equal_the_slow_ones(changes, dtype, rtol):
    net = common.for_inference(tiny_lm(**changes).float(), dtype)
    assert net.fused
    prompts = torch.randint(3, 300, (5, 40))

    def read(fused):
        net.fused, cache = fused, common.Cache(net, 5, 60)
        states = [net.read(prompts, [40, 3, 17, 26, 1], cache)]
        states += [net.read(torch.full((5, 1), 3 + i), [1] * 5, cache) for i in range(9)]
        row = cache.rows(2, 3)                                 # one row alone, in chunks, from the beginning
        row.lengths = [0]
        for begin, end in ((0, 30), (30, 31), (31, 40)):
            states += net.read(prompts[:1, begin:end], [end - begin], row, each=True)
        states.append(net.read(prompts[1:2, :3], [3], row))
        return torch.cat(states), cache
    fused, (states, slow) = net.fused, read([])
    found, cache = read(fused)
    assert (found - states).float().norm() < rtol * states.float().norm()
    assert cache.lengths == slow.lengths == [49, 12, 26, 35, 10]
    for row, n in enumerate(cache.lengths):
        ours, theirs = (c.layers[-1]["k"][row, :, :n].float() for c in (cache, slow))
        assert (ours - theirs).norm() < rtol * theirs.norm()


def test_without_a_compiler_steps_are_torchs(monkeypatch):
    for compiler in (None, "/bin/false"):
        common.step_kernels.cache_clear()
        monkeypatch.setattr(common.shutil, "which", lambda name, compiler=compiler: compiler)
        net = common.for_inference(tiny_lm().float(), torch.float32)
        assert net.fused == [] and list(common.generate(net, [[1, 4]], 3, temperature=0, eos=-1))
    common.step_kernels.cache_clear()


@pytest.mark.skipif(common.step_kernels(torch.float32) is None, reason="needs a C compiler")
def test_steps_are_compiled_once_and_again_where_the_library_is_damaged(tmp_path, monkeypatch):
    calls, run, source = [], subprocess.run, common.STEP_C
    monkeypatch.setattr(common.subprocess, "run", lambda *a, **k: calls.append(1) or run(*a, **k))

    def compiled(folder):
        (folder / "__pycache__").mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / "step.c")
        monkeypatch.setattr(common, "STEP_C", folder / "step.c")
        common.step_kernels.cache_clear()
        calls.clear()
        assert common.step_kernels(torch.float32) is not None
        return len(calls)
    assert compiled(tmp_path / "one") == 1 and compiled(tmp_path / "one") == 0
    library, = (tmp_path / "one/__pycache__").glob("step-*.so")
    (tmp_path / "two/__pycache__").mkdir(parents=True)
    (tmp_path / "two/__pycache__" / library.name).write_bytes(b"damaged")
    assert compiled(tmp_path / "two") == 1
    assert (tmp_path / "two/__pycache__" / library.name).stat().st_size == library.stat().st_size
    (tmp_path / "two/step.c").write_text("int wrong")
    common.step_kernels.cache_clear()
    assert common.step_kernels(torch.float32) is None
    common.step_kernels.cache_clear()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_like_unpacked_ones_and_each_row_by_itself(dtype, int8):
    for shape in ((96, 64), (100, 70), (7, 2), (16, 33)):
        weight = torch.randn(shape).to(dtype)
        product, threads = common.fixed_linear(weight, int8), torch.get_num_threads()
        for rows in (1, 2, 6, 40):
            x = torch.randn(rows, 3, shape[1]).to(dtype)
            found, exact = product(x), F.linear(x, weight)
            if int8:
                assert (found - exact).float().norm() < 0.02 * exact.float().norm()
            else:
                close(found, exact, 2e-2 if dtype == torch.bfloat16 else 1e-5)
            if shape[1] % 2:
                continue                                       # torch multiplies these
            torch.set_num_threads(2)
            assert torch.equal(product(x), found)
            torch.set_num_threads(threads)
            assert all(torch.equal(product(x[i:i + 1, 1]), found[i:i + 1, 1]) for i in range(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_8_bits_are_rounded_and_multiply_alike_for_few_and_many_rows(dtype):
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(2, 3, 64).to(dtype)
    weight[5] = 0
    product = common.fixed_linear(weight, int8=True)
    few, many = torch.cat([product(x[:1]), product(x[1:])]), product(x)
    exact = F.linear(x, weight).float()
    assert (few - many).float().norm() < 0.01 * exact.norm()
    assert 1e-4 * exact.norm() < (few - exact).norm() < 0.02 * exact.norm()
    near = common.for_inference(tiny_lm().float(), dtype, int8=True)
    steps = list(common.generate(near, [[1, 4]], 20, temperature=0, eos=-1))
    assert steps == list(common.generate(near, [[1, 4]], 20, temperature=0, eos=-1)) and len(steps) == 20


def test_sampling_follows_its_settings():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    generators = [torch.Generator().manual_seed(0)]

    def shares(**settings_):
        wide = dict(temperature=1.0, top_k=0, top_p=1.0, generators=generators * 4000)
        drawn = common.choose(logits.expand(4000, 4), **{**wide, **settings_})
        return torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares(), logits[0].softmax(0), rtol=0, atol=0.03)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(0), rtol=0, atol=0.03)
    assert (shares(top_k=2) > 0).tolist() == [False, False, True, True]
    assert (shares(top_p=0.7) > 0).tolist() == [False, False, True, True]      # 0.644 alone is not enough
    assert (shares(top_p=0.6) > 0).tolist() == [False, False, False, True]
    assert shares(temperature=0).tolist() == [0, 0, 0, 1]


def test_repetition_penalty_and_end_of_text():
    net = common.for_inference(tiny_lm(), torch.float64)
    plain = [s[0] for s in common.generate(net, [[1, 4]], 40, temperature=0, eos=-1)]
    hard = [s[0] for s in common.generate(net, [[1, 4]], 40, temperature=0, eos=-1, repetition_penalty=1e6)]
    assert len(set(hard)) == 40 > len(set(plain))
    steps = list(common.generate(net, [[1, 4], [1, 5]], 40, temperature=0, eos=plain[3]))
    row = [s[0] for s in steps]
    assert row[:4] == plain[:4] and set(row[4:]) <= {None}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(max_tokens=200), r"prompt of 3 tokens and MAX_TOKENS 200 pass the context of 128"),
        (dict(temperature=-1.0), "TEMPERATURE -1"),
        (dict(top_p=0.0), "TOP_P 0"),
        (dict(max_tokens=0), "MAX_TOKENS 0"),
    ],
)
def test_generation_refuses_with_the_numbers(changes, message):
    with pytest.raises(common.BadInput, match=message):
        list(common.generate(tiny_lm(), [[1, 2, 3]], **{"max_tokens": 5, **changes}))


def test_yarn_stretches_the_context():
    net = tiny_lm()
    saved = {"kind": "LM", "sizes": net.sizes, "model": net.state_dict(), "step": 0}
    longer = common.build(saved, yarn=4.0)
    assert longer.context == 512
    assert len(list(common.generate(longer, [list(range(1, 200))], 60, eos=-1))) == 60


# Text.

def test_special_strings_in_a_text_stay_text(tokenizer):
    ids = common.encode(tokenizer, "a</s>b<s><pad>")
    assert not set(ids) & {0, 1, 2}
    table = common.token_bytes(tokenizer)
    assert b"".join(table[i] for i in ids).decode() == "a</s>b<s><pad>"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    table = common.token_bytes(tokenizer)
    assert b"".join(table[i] for i in common.encode(tokenizer, text)).decode() == text


@pytest.fixture(scope="session")
def hf_tokenizer(tokens):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tokens)


@settings(max_examples=1000, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]),
            st.text().filter(lambda t: not any(s in t for s in common.SPECIAL)),
        ),
        min_size=1,
        max_size=5,
    ),
    reply=st.booleans(),
)
def test_chat_ids_and_mask_equal_apply_chat_template(tokenizer, hf_tokenizer, turns, reply):
    messages = [{"role": r, "content": c} for r, c in turns]
    theirs = hf_tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=reply,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = common.render_chat(tokenizer, messages, reply)
    assert ids == theirs["input_ids"] and [int(m) for m in mask] == theirs["assistant_masks"]


@pytest.mark.parametrize(
    "message", [{"role": "robot", "content": "x"}, {"role": "user"}, {"role": "user", "content": None}]
)
def test_chat_refuses_a_broken_turn(tokenizer, message):
    with pytest.raises(common.BadInput, match="a message needs a role"):
        common.render_chat(tokenizer, [message])


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab🙂山\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab🙂山", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 3), min_size=1),
)
def test_stream_splits_no_character_and_stops_at_the_first_stop_string(text, stop, cuts):
    raw, pieces, at, i = text.encode(), [], 0, 0
    while at < len(raw):
        pieces.append(raw[at:at + cuts[i % len(cuts)]])
        at, i = at + len(pieces[-1]), i + 1
    stream, out = common.TextStream(pieces, stop), ""
    for n in range(len(pieces)):
        piece = stream.feed(n)
        assert "\ufffd" not in piece
        out += piece
        if stream.ended:
            break
    out += stream.finish()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert out == (text[:min(ends)[1]] if ends else text)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=200), seed=st.integers(0, 3))
def test_packing_places_every_document_once_and_whole(lengths, seed):
    order, bounds = common.pack(np.array(lengths, np.int64), 50, seed)
    assert sorted(order) == list(range(len(lengths))) and bounds[-1] == len(lengths)
    assert all(sum(lengths[d] for d in order[a:b]) <= 50 for a, b in zip(bounds, bounds[1:], strict=False))
    assert len(bounds) == len(common.pack(np.array(lengths, np.int64), 50, seed + 1)[1])


def test_packing_leaves_little_empty():
    lengths = np.random.default_rng(0).geometric(1 / 80, 20_000).clip(1, 512)
    order, bounds = common.pack(lengths, 512)
    assert lengths.sum() / (len(bounds) - 1) / 512 > 0.97


# Data.

def test_token_files_lose_nothing(text, tokens, tokenizer):
    meta = json.loads((tokens / "meta.json").read_text())
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    table, found = common.token_bytes(tokenizer), []
    for split in ("train", "valid"):
        ids, bounds = np.fromfile(tokens / f"{split}.bin", np.uint16), np.load(tokens / f"{split}.idx.npy")
        part = [
            b"".join(table[i] for i in ids[a:b]).decode() for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        assert all(
            ids[a] == common.BOS and ids[b - 1] == common.EOS
            for a, b in zip(bounds, bounds[1:], strict=False)
        )
        assert meta[split]["documents"] == len(part) and meta[split]["bytes"] == sum(
            len(t.encode()) for t in part
        )
        found += part
    assert sorted(found) == sorted(rows) and meta["valid"]["documents"] > 30


def test_documents_longer_than_a_row_are_cut_and_each_token_predicted_once(tokens):
    for seq_len in (8, 64):
        rows = train_pretrain.Rows(tokens, "train", seq_len)
        for epoch in (0, 1):
            targets = torch.cat(
                [
                    t[t >= 0]
                    for _, _, t in rows.batches(range(epoch * rows.count, (epoch + 1) * rows.count), 8, "cpu")
                ]
            )
            expected = np.concatenate(
                [d[1:] for d in np.split(np.array(rows.tokens), np.load(tokens / "train.idx.npy")[1:-1])]
            )
            assert np.array_equal(np.bincount(targets), np.bincount(expected))


def test_windows_with_stride_cover_the_stream(tokens):
    rows = train_pretrain.Rows(tokens, "train", 64, 48)
    starts = sorted(rows.starts)
    assert (
        max(np.diff(starts)) <= 48
        and starts[-1] + 64 + 1 == len(rows.tokens)
        and len(rows.documents(0)[0][0]) == 65
    )


def write(path, data):
    (gzip.open if path.name.endswith(".gz") else open)(path, "wb").write(data)
    return path


def test_broken_rows_are_counted_named_and_left_out(tmp_path, capsys):
    good = [json.dumps({"text": f"document number {i} of the set"}).encode() for i in range(50)]
    bad = [
        b"{broken",
        b'{"text": 5}',
        b'{"other": "x"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "  "}',
        b"[1]",
        b"[" * 100_000,
        b'{"text": "\\ud800"}',
    ]
    path = write(tmp_path / "x.jsonl.gz", b"\n".join(good + bad + [b"", b'{"text": "nul \\u0000 inside"}']))
    folder = prepare_text.prepare(path, vocab_size=300, out=tmp_path / "out")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["bad_rows"] == len(bad) and meta["train"]["documents"] + meta["valid"]["documents"] == 51
    named = (folder / "bad_rows.txt").read_text()
    assert (
        "x.jsonl.gz:51: not JSON" in named
        and "x.jsonl.gz:54: not UTF-8" in named
        and "nested too deeply" in named
    )
    assert "8 rows left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.txt", b"\n\n \n", "no usable document"),
        (
            "gbk.jsonl",
            '{"text": "春眠不觉晓"}\n'.encode("gb18030") * 30,
            "no usable document; first problem: gbk.jsonl:1: not UTF-8",
        ),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "some words here"}\n' * 5000)[:150],
            "damaged or cut short",
        ),
        ("plain.jsonl.gz", b'{"text": "not gzip"}\n', "damaged or cut short"),
        ("table.csv", b"a,b", "is not one of .jsonl"),
        ("one.jsonl", b'{"text": "only one"}\n', "too few to hold one out"),
    ],
)
def test_unusable_data_is_one_sentence(tmp_path, name, data, message):
    with pytest.raises(common.BadInput, match=message.replace(".", r"\.")):
        (tmp_path / name).write_bytes(data)
        prepare_text.prepare(tmp_path / name, vocab_size=300, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_plain_text_becomes_documents_without_loss(tmp_path):
    text = "\n\n".join(f"Paragraph {i} " + "word " * (i % 60) for i in range(300))
    path = write(tmp_path / "book.txt", text.encode())
    parts = [t for t, _ in prepare_text.documents(path, prepare_text.BadRows(), txt_chars=500)]
    assert len(parts) > 20 and "".join("".join(parts).split()) == "".join(text.split())


def test_held_out_documents_do_not_depend_on_order_or_neighbours(text):
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert [prepare_text.held_out(t, 0.1) for t in rows] == [
        prepare_text.held_out(t, 0.1) for t in reversed(rows)
    ][::-1]
    assert all(prepare_text.held_out(t, 1.0) for t in rows) and not any(
        prepare_text.held_out(t, 0.0) for t in rows
    )


@pytest.mark.parametrize("size", [100, 70_000])
def test_vocabularies_out_of_range_are_refused(text, tmp_path, size):
    with pytest.raises(common.BadInput, match=f"VOCAB_SIZE {size} must be between 259"):
        prepare_text.prepare(text, vocab_size=size, out=tmp_path / "out")
    with pytest.raises(common.BadInput, match=f"VOCAB_SIZE {size} must be between 259"):
        prepare_tokenizer.train(["text"], tmp_path / "t.json", size)


def test_foreign_tokenizers_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.BPE()).save(str(tmp_path / "t.json"))
    with pytest.raises(common.BadInput, match="must hold <pad>, <s>, </s> .or .* as ids 0, 1, 2"):
        common.load_tokenizer(tmp_path / "t.json")
    big = {s: i for i, s in enumerate([*common.SPECIAL, *(f"t{i}" for i in range(65_600))])}
    Tokenizer(models.WordLevel(big, unk_token="<pad>")).save(str(tmp_path / "big.json"))
    with pytest.raises(common.BadInput, match="at most 65,535"):
        common.load_tokenizer(tmp_path / "big.json")


def test_tokenizer_training_repeats_itself(text, tmp_path, monkeypatch):
    for name in "ab":
        monkeypatch.setattr(prepare_tokenizer, "DATA", str(text))
        monkeypatch.setattr(prepare_tokenizer, "OUT", str(tmp_path / name / "tokenizer.json"))
        monkeypatch.setattr(prepare_tokenizer, "VOCAB_SIZE", 300)
        assert prepare_tokenizer.main()["vocab_size"] == 300
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_python_docs_hold_what_they_promise(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_python_docs, "OUT", str(tmp_path))
    monkeypatch.setattr(prepare_python_docs, "PER_TASK", 50)
    prepare_python_docs.main()
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("pretrain", "sft", "dpo", "lora")}
    assert len(rows["pretrain"]) > 3000 and sum(len(r["text"]) for r in rows["pretrain"]) > 1_000_000
    answers = {}
    for row in rows["sft"]:
        turns = row["conversations"]
        assert turns[-1]["role"] == "assistant" and turns[-1]["content"]
        question = json.dumps(turns[:-1])
        assert answers.setdefault(question, turns[-1]["content"]) == turns[-1]["content"]
    for row in rows["dpo"]:
        assert row["chosen"][:-1] == row["rejected"][:-1] and row["chosen"][-1] != row["rejected"][-1]


# Checkpoints and whole runs.

def unigram_nats(tokens):
    """The trivial baseline: nats per token of held-out text under training frequencies (add one)."""
    def predicted(split):
        ids, bounds = np.fromfile(tokens / f"{split}.bin", np.uint16), np.load(tokens / f"{split}.idx.npy")
        return np.delete(ids, bounds[:-1])
    counts = np.bincount(predicted("train"), minlength=320) + 1
    return -np.log(counts / counts.sum())[predicted("valid")].mean()


@pytest.mark.parametrize(
    "constants",
    [
        dict(),
        dict(OPTIMIZER="adamw"),
        dict(N_EXPERTS=4),
        dict(MODEL="classic", HIDDEN_DIM=64, OPTIMIZER="adamw", SCHEDULE="wsd"),
        dict(STRIDE=32),
        dict(DTYPE="bfloat16"),
        dict(DTYPE="float16", OPTIMIZER="adamw"),
        dict(TIED=False, QK_NORM=False, DROPOUT=0.05),
        dict(ATTENTION="nsa", WINDOW=16),
        dict(ATTENTION="window", WINDOW=16),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default",
)
def test_training_learns_well_below_unigrams(train, tokens, tmp_path, constants):
    found = train(STEPS=80, WARMUP=8, EVAL_EVERY=40, LR=1e-2, **constants)
    assert found["nats_per_token"] < 0.62 * unigram_nats(tokens), (found, unigram_nats(tokens))
    lines = common.read_metrics(tmp_path / "run")
    assert lines[-1]["final"] and lines[-1]["bits_per_byte"] == found["bits_per_byte"]
    meta = json.loads((tokens / "meta.json").read_text())["valid"]
    assert found["bytes"] == meta["bytes"] and found["tokens"] == meta["tokens"] - meta["documents"]
    for name in (
        "best.pt",
        "checkpoint.pt",
        "model.safetensors",
        "config.json",
        "curves.png",
        "tokenizer.json",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.fixture
def train_bytes(train, tmp_path):
    """Run train_nsa_enwik8.main() on 40,000 bytes of a repetitive text."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 4).tolist()) for _ in range(30)]
    path = tmp_path / "bytes"
    path.write_bytes(b" ".join(words[i] for i in rng.integers(0, 30, 8_000)))
    tiny = dict(DATA=str(path), N_HEADS=2, N_KV_HEADS=1, HEAD_DIM=16, SEQ_LEN=100, OPTIMIZER="adamw", LR=1e-2,
                EVAL_BYTES=1000, SAMPLE_LEN=40)
    return lambda **constants: train(train_nsa_enwik8, **{**tiny, **constants})


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_byte_model_learns_below_byte_frequencies(train_bytes, tmp_path, attention, capsys):
    before = 0 if attention == "full" else 2
    found = train_bytes(ATTENTION=attention, N_BEFORE=before, STEPS=120, SAMPLE_EVERY=30)
    data = np.frombuffer((tmp_path / "bytes").read_bytes(), np.uint8)
    p = np.bincount(data) / len(data)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()                      # bits a byte by frequencies alone
    assert found["bits_per_byte"] < 0.75 * entropy and found["test_bits_per_byte"] < 0.75 * entropy
    assert found["bytes"] == len(data) // 20 - 1 == found["test_bytes"]  # whole splits, but the first byte
    assert "sample | " in capsys.readouterr().out
    unseen = tmp_path / "unseen.gz"
    unseen.write_bytes(gzip.compress(data[-found["test_bytes"] - 1:].tobytes()))
    scored = train_bytes(EVAL=str(unseen))
    assert scored == {k: pytest.approx(found[f"test_{k}"]) for k in ("bytes", "bits_per_byte")}
    assert json.loads((tmp_path / "run/eval.json").read_text()) == scored


def test_probes_are_known_from_far_back_and_nowhere_else(train_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(train_nsa_enwik8, "SEQ_LEN", 512)
    rows, back = train_nsa_enwik8.probes(np.random.default_rng(0), 20)
    r, t = np.nonzero(back)
    assert (rows[r, t] == rows[r, t - abs(back[r, t])]).all() and {1, -1} <= set(np.sign(back[r, t]))
    assert abs(back).max() > 300 and 0.05 < (back != 0).mean() < 0.4
    for row, far in zip(rows, back, strict=True):              # small letters: of stretches alone, all twice
        small = (row >= ord("a")) | (row == ord("#"))
        assert small.sum() == 2 * ((far > 0).sum() * 32 / 28 + (far < 0).sum() * 13 / 8)
    found = train_bytes(PROBE=True, PROBE_SHARE=0.5, SEQ_LEN=128)
    kinds = json.loads((tmp_path / "run/probe.json").read_text())
    assert {"probe_copy", "probe_needle"} <= set(found) and (tmp_path / "run/probe.png").stat().st_size > 0
    assert all(0 <= share < 0.5 for by in kinds.values() for share in by.values())      # nothing learned yet
    with pytest.raises(common.BadInput, match="SEQ_LEN 100 must be a positive multiple of 64"):
        train_bytes(PROBE=True, SEQ_LEN=100)


class Copier:
    """A model that goes on as after the last time it saw the same four bytes."""
    head_weight = torch.eye(256)

    def hidden(self, ids, docs):
        found = torch.zeros(*ids.shape, 256)
        for out, row in zip(found, ids.tolist(), strict=True):
            seen = {}
            for t in range(3, len(row)):
                out[t, seen.get(tuple(row[t - 3:t + 1]), 0)] = 1
                if t + 1 < len(row):
                    seen[tuple(row[t - 3:t + 1])] = row[t + 1]
        return found, 0

    def eval(self):
        pass
    train = eval


def test_probes_give_one_who_copies_all_and_train_at_their_share(monkeypatch):
    run = common.Run(0, 0, 1, torch.device("cpu"), torch.float32, 0)
    monkeypatch.setattr(train_nsa_enwik8, "SEQ_LEN", 256)
    found = train_nsa_enwik8.probe(run, Copier())
    assert set(found) == {"copy", "needle"}                    # four letters may stand in two stretches
    assert all(share > 0.99 for by in found.values() for share in by.values())
    for share in (0.0, 1.0):
        monkeypatch.setattr(train_nsa_enwik8, "PROBE_SHARE", share)
        batches = train_nsa_enwik8.training_batches(np.zeros(999, np.uint8), 3, run)
        ids, _, targets = (torch.cat(x) for x in zip(*batches, strict=True))
        assert (ids >= 35).all() if share else not ids.any()
        counted = (targets != common.IGNORE).float().mean()    # of probes only what can be known
        assert 0.05 < counted < 0.4 if share else counted == 1


def test_interrupted_byte_model_goes_on_bit_for_bit(train_bytes, tmp_path):
    train_bytes(OUT=str(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        interrupted(train_bytes, 6)
    train_bytes()
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_one_process_and_two_train_the_same_sparse_model(train_bytes, tmp_path):
    train_bytes(OUT=str(tmp_path / "one"))
    constants = common.load(tmp_path / "one/checkpoint.pt")["constants"]
    del constants["OUT"]
    words = [*(f"{k}={v}" for k, v in constants.items()), f"OUT={tmp_path / 'two'}"]
    finish(launch("train_nsa_enwik8.py", *words, ranks=2))
    same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-5)


@pytest.mark.parametrize("constants, message", [
    (dict(SPLIT=("a", 0.1)), "SPLIT ('a', 0.1) must be two numbers"),
    *((dict(SPLIT=s), "must be two numbers") for s in ((math.inf, 0), (2.5, 0), (0, 0.1), (1, 0.1))),
    (dict(N_KV_HEADS=0), "N_KV_HEADS 0 must be at least 1"),
    (dict(EVAL="any", MICRO_BATCH=0), "MICRO_BATCH 0 must be at least 1"),
    (dict(SPLIT=(1, 2, 3)), "must be two numbers"), (dict(SPLIT=(0.6, 0.6)), "too few for SPLIT"),
    (dict(SAMPLE_EVERY=1, PRIME_LEN=100), "PRIME_LEN 100 must be between 1 and 99"),
    (dict(DIM=0), "DIM 0 must be at least 1"), (dict(PROBE_SHARE=2.0), "PROBE_SHARE 2.0 must be between"),
])
def test_byte_model_constants_that_do_not_fit_are_one_sentence(train_bytes, constants, message):
    with pytest.raises(common.BadInput) as error:
        train_bytes(**constants)
    assert message in str(error.value)


@pytest.mark.parametrize("name, data, message", [
    ("few", b"abc", "has 3 bytes: too few for SPLIT"), ("none", b"", "is empty"),
    ("cut.gz", gzip.compress(b"some text " * 500)[:-20], "cut.gz is cut short or damaged"),
    ("no.zip", b"not a zip", "no.zip is cut short or damaged"), ("absent", None, "there is no file"),
])
def test_unusable_bytes_are_one_sentence(train_bytes, tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(common.BadInput) as error:
        train_bytes(DATA=str(tmp_path / name))
    assert message in str(error.value)


def test_packed_bytes_that_cannot_be_unpacked_are_one_sentence(tmp_path):
    path = tmp_path / "UPPER.ZIP"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/text", "some text")
    whole = path.read_bytes()
    assert prepare_enwik8.read(path) == b"some text"
    at = [whole.rindex(b"PK\3\4"), whole.rindex(b"PK\1\2")]
    for offset, value, message in ((6, 1, "is encrypted"), (8, 99, "not supported")):
        broken = bytearray(whole)
        broken[at[0] + offset] = broken[at[1] + offset + 2] = value
        path.write_bytes(broken)
        with pytest.raises(common.BadInput, match=f"cannot unpack .*UPPER.ZIP .*{message}"):
            prepare_enwik8.read(path)
    (tmp_path / "upper.GZ").write_bytes(gzip.compress(b"some text"))
    assert prepare_enwik8.read(tmp_path / "upper.GZ") == b"some text"


def test_a_model_of_tokens_scores_no_bytes(train, train_bytes, tmp_path):
    train(STEPS=1)
    (tmp_path / "unseen").write_bytes(b"some text")
    with pytest.raises(common.BadInput, match=r"holds a model of \d+ tokens, not of bytes"):
        train_bytes(EVAL=str(tmp_path / "unseen"))


def test_windows_and_blocks_beyond_the_sequence_work(train_bytes):
    found = train_bytes(WINDOW=1000, COMPRESS_BLOCK=256, COMPRESS_STRIDE=256, SELECT_BLOCK=256, N_SELECTED=5,
                        STEPS=3)
    assert math.isfinite(found["bits_per_byte"])


def test_enwik8_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_enwik8, "OUT", str(tmp_path / "enwik8"))
    for data, message in ((b"x" * 10, "holds 10 bytes; enwik8 has"), (bytes(50), "not its checksum")):
        (tmp_path / "enwik8.gz").write_bytes(gzip.compress(data))
        monkeypatch.setattr(prepare_enwik8, "DATA", str(tmp_path / "enwik8.gz"))
        monkeypatch.setattr(prepare_enwik8, "SIZE", 50 if len(data) == 50 else 100_000_000)
        with pytest.raises(common.BadInput, match=message):
            prepare_enwik8.main()
        assert not (tmp_path / "enwik8/enwik8").exists()
    monkeypatch.setattr(prepare_enwik8, "SHA1", __import__("hashlib").sha1(bytes(50)).hexdigest())
    prepare_enwik8.main()
    assert (tmp_path / "enwik8/enwik8").read_bytes() == bytes(50)
    monkeypatch.setattr(prepare_enwik8, "DATA", "")
    monkeypatch.setattr(prepare_enwik8, "download", lambda url, path: path.write_bytes(b"a page of errors"))
    with pytest.raises(common.BadInput, match="cut short or damaged"):
        prepare_enwik8.main()
    assert not (tmp_path / "enwik8/enwik8.zip").exists()                 # not taken up again
    assert (tmp_path / "enwik8/enwik8").read_bytes() == bytes(50)


def test_an_interrupted_download_goes_on_where_it_was(tmp_path):
    """Against a server of our own that breaks off once and honours ranges."""
    import http.server
    import threading
    content, asked = bytes(range(256)) * 1000, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            asked.append(begin)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:] if begin else content[:100_000])

        def log_message(self, *_):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f"http://127.0.0.1:{server.server_port}/enwik8.zip", tmp_path / "enwik8.zip"
    with pytest.raises(common.BadInput, match="run the same command again|run again"):
        prepare_enwik8.download(url, path)
    assert not path.exists()
    prepare_enwik8.download(url, path)
    server.shutdown()
    assert path.read_bytes() == content and asked == [0, 100_000]


def test_samples_are_shown_kept_and_do_not_change_the_run(train, tmp_path, capsys):
    train(OUT=str(tmp_path / "plain"))
    train(SAMPLE_EVERY=4, SAMPLE_PROMPT="the cat")
    rows = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [4, 8, 12] and "sample | the cat" in capsys.readouterr().out
    assert all(len(r["texts"]) == 3 and r["texts"][0].startswith("the cat") for r in rows)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_compiled_training_equals_eager(train, tmp_path):
    pytest.importorskip("torch._inductor")
    if not __import__("shutil").which("g++"):
        pytest.skip("no C++ compiler")
    for compile in ("yes", "no"):
        train(OUT=str(tmp_path / compile), COMPILE=compile, STEPS=5, OPTIMIZER="adamw")
    a, b = ([x["loss"] for x in common.read_metrics(tmp_path / c) if "loss" in x] for c in ("yes", "no"))
    assert a == pytest.approx(b, rel=1e-4) and a[0] != a[-1]


def test_scoring_unseen_text_uses_the_best_checkpoint(train, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "CACHE", str(tmp_path / "cache"))
    trained = train(STEPS=40, LR=1e-2)
    found = train(EVAL=str(text))
    assert json.loads((tmp_path / "run/eval.json").read_text()) == found
    assert found["bytes"] == sum(len(json.loads(x)["text"].encode()) for x in text.read_text().splitlines())
    assert abs(found["bits_per_byte"] - trained["bits_per_byte"]) < 0.25 * trained["bits_per_byte"]


def test_separate_validation_file_and_start_from_a_checkpoint(train, text, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "CACHE", str(tmp_path / "cache"))
    first = train(STEPS=40, LR=1e-2, OUT=str(tmp_path / "first"))
    second = train(
        DATA=str(text), VALID=str(text), INIT=str(tmp_path / "first"), STEPS=4, LR=1e-4, MUON_LR=1e-4, DIM=999
    )
    assert common.read_metrics(tmp_path / "run")[0]["valid_nats_per_token"] < 1.2 * first["nats_per_token"]
    assert second["tokens"] > 5 * first["tokens"]


def test_a_finished_or_changed_run_is_set_aside_never_overwritten(train, tmp_path, capsys):
    train()
    before = weights(tmp_path / "run")
    train()
    assert "is finished; it is now" in capsys.readouterr().out
    same_weights(weights(tmp_path / "run~1"), before)
    train(RESUME=False, MICRO_BATCH=8)
    assert (tmp_path / "run~2").exists()
    with pytest.raises(SystemExit):
        interrupted(train, 3)
    train(LR=5e-3)
    assert "was run with LR=0.003" in capsys.readouterr().out and (tmp_path / "run~3/checkpoint.pt").exists()


def interrupted(train, after, **constants):
    """A run that gets SIGTERM during update `after`."""
    real = common.update

    def update(run, *rest):
        if rest[-1] == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "update", update)
        return train(**constants)


@pytest.mark.parametrize(
    "constants",
    [dict(), dict(DTYPE="float16", OPTIMIZER="adamw", DROPOUT=0.1), dict(MODEL="classic", HIDDEN_DIM=64)],
    ids=["muon", "float16", "classic"],
)
def test_sigterm_saves_the_last_step_and_the_rerun_repeats_the_uninterrupted_run(train, tmp_path, constants):
    train(OUT=str(tmp_path / "whole"), **constants)
    for after in (2, 7):
        with pytest.raises(SystemExit) as stopped:
            interrupted(train, after, **constants)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert common.load(tmp_path / "run/checkpoint.pt")["step"] == after + 1
    train(**constants)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("experts", [0, 4])
def test_one_process_and_two_do_the_same_updates(train, tokens, tmp_path, experts):
    constants = dict(OPTIMIZER="adamw", STEPS=4, LR=1e-3, N_EXPERTS=experts)
    train(OUT=str(tmp_path / "1x8"), MICRO_BATCH=8, **constants)
    train(OUT=str(tmp_path / "4x2"), MICRO_BATCH=2, **constants)
    finish(
        launch(
            "train_pretrain.py", *words(tokens, MICRO_BATCH=4, OUT=tmp_path / "2 ranks", **constants), ranks=2
        )
    )
    for other in ("4x2", "2 ranks"):
        same_weights(weights(tmp_path / "1x8"), weights(tmp_path / other), 1e-6)
        for a, b in zip(*(common.read_metrics(tmp_path / o) for o in ("1x8", other)), strict=True):
            assert a == pytest.approx(b, rel=2e-6)


def test_patience_stops_early_and_the_best_is_kept(train, tmp_path):
    found = train(STEPS=60, EVAL_EVERY=2, PATIENCE=2, LR=0.5, MUON_LR=2.0, WARMUP=0, CLIP=0.0)
    lines = common.read_metrics(tmp_path / "run")
    steps = [x["step"] for x in lines if "valid_nats_per_token" in x]
    best = min((x["valid_nats_per_token"], x["step"]) for x in lines if "valid_nats_per_token" in x)
    assert (
        steps[-1] < 60
        and common.load(tmp_path / "run/best.pt")["step"] == best[1]
        and found["nats_per_token"] < 9
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, tmp_path, damage, capsys):
    with pytest.raises(SystemExit):
        interrupted(train, 8)
    newest = tmp_path / "run/checkpoint.pt"
    data = newest.read_bytes()
    if damage == "foreign":
        torch.save({"hello": 1}, newest)
    else:
        newest.write_bytes(data[:len(data) // 2] if damage == "cut" else b"")
    train()
    assert "warning" in (said := capsys.readouterr().out) and "going on from step 5" in said
    (tmp_path / "run/checkpoint.pt").write_bytes(b"x")
    (tmp_path / "run/checkpoint.prev.pt").write_bytes(b"y")
    with pytest.raises(common.BadInput, match="start over with RESUME=False"):
        train()


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save({"kind": "LM", "sizes": {}, "step": 1, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(common.BadInput, match="cannot be read as a checkpoint"):
        common.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "owned").exists()


def test_a_disk_that_fills_while_saving_leaves_the_earlier_checkpoint_whole(tokens, tmp_path):
    args = words(tokens, OUT=tmp_path / "run", SAVE_EVERY=3, COMPILE="no")
    limit = 250_000  # bytes a file: best.pt fits, checkpoint.pt does not

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sizes = None
    process = launch("train_pretrain.py", *args, "STEPS=1000")
    while not (tmp_path / "run/checkpoint.prev.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "rerun the same command" in finish(process, 130)
    sizes = common.load(tmp_path / "run/checkpoint.pt")["step"]
    assert (tmp_path / "run/checkpoint.pt").stat().st_size > limit > (tmp_path / "run/best.pt").stat().st_size
    output = finish(launch("train_pretrain.py", *args, "STEPS=1000", preexec_fn=small), 1)
    assert "could not write" in output and "is whole" in output and "Traceback" not in output
    assert common.load_newest(tmp_path / "run")["step"] == sizes and not list(
        (tmp_path / "run").glob("*.tmp")
    )


def test_data_that_changed_under_an_unfinished_run_are_refused_by_name(train, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text(text.read_text())
    with pytest.raises(SystemExit):
        interrupted(train, 3, DATA=str(mine), VOCAB_SIZE=320)
    mine.write_text("\n".join(text.read_text().splitlines()[:400]))
    with pytest.raises(common.BadInput, match="the data .*mine.jsonl changed since this run began"):
        train(DATA=str(mine), VOCAB_SIZE=320)
    mine.write_text(text.read_text())
    train(DATA=str(mine), VOCAB_SIZE=320)


def test_two_runs_do_not_share_a_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    run = common.Run(0, 0, 1, torch.device("cpu"), torch.float32, 0)
    common.lock(run, tmp_path / "run")
    with pytest.raises(common.BadInput, match="another process is training in"):
        train()
    run.lock.close()


@pytest.mark.parametrize(
    "constants, message",
    [
        (dict(BATCH=0), "BATCH 0 must be at least 1"),
        (dict(N_HEADS=3), "N_HEADS 3 must be a positive multiple of 2"),
        (dict(DIM=30), "DIM 30 is not a multiple of N_HEADS 4"),
        (dict(MODEL="rnn"), "MODEL 'rnn' is neither lm nor classic"),
        (dict(OPTIMIZER="sgd"), "OPTIMIZER 'sgd' is not one of muon, adamw, adam"),
        (dict(ATTENTION="nas"), "ATTENTION 'nas' is not one of full, window, nsa"),
        (dict(ATTENTION="nsa", COMPRESS_STRIDE=3), "COMPRESS_BLOCK 16 must be a positive multiple of 3"),
        (dict(DTYPE="int8"), "DTYPE 'int8' is not one of auto"),
        (dict(WANDB="on"), "WANDB 'on' is not one of disabled"),
        (dict(SCHEDULE="flat"), "SCHEDULE 'flat' is not one of cosine, wsd"),
        (dict(SEED=-1), "SEED -1 must be between 0 and"),
        (dict(ATTENTION="nsa", COMPRESS_STRIDE=0), "COMPRESS_STRIDE 0 must be at least 1"),
        (dict(N_EXPERTS=2, N_ACTIVE=3), "n_active 3 must be between 1 and n_experts 2"),
        (dict(INIT="nowhere"), "there is no checkpoint nowhere"),
        (dict(SEQ_LEN=10**7, STRIDE=1), "longer than all of the"),
        (dict(COMPILE="maybe"), "COMPILE 'maybe'"),
        (dict(STRIDE=-1), "STRIDE -1 must be at least 0"),
        (dict(DROPOUT=2.0), "DROPOUT 2.0 must be between 0 and 0.99"),
        (dict(EVAL_ROWS=-3), "EVAL_ROWS -3 must be at least 0"),
    ],
)
def test_constants_that_do_not_fit_are_one_sentence(train, constants, message):
    with pytest.raises(common.BadInput) as error:
        train(**constants)
    assert message in str(error.value)


@pytest.mark.parametrize("slip", [dict(SCHEDULE="cosin"), dict(COMPILE="on"), dict(WANDB="maybe")], ids=str)
def test_a_misspelt_choice_sets_no_run_aside(train, train_bytes, tmp_path, slip):
    for run in (train, train_bytes):
        run(OUT=str(tmp_path / "kept"), STEPS=1)
        before = (tmp_path / "kept/checkpoint.pt").read_bytes()
        with pytest.raises(common.BadInput, match=next(iter(slip.values()))):
            run(OUT=str(tmp_path / "kept"), STEPS=1, **slip)
        assert (tmp_path / "kept/checkpoint.pt").read_bytes() == before
        shutil.rmtree(tmp_path / "kept")


def test_wandb_offline_mirrors_the_run(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(STEPS=3, WANDB="offline")
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


# Serving.

@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **TINY,
            "STEPS": 60,
            "LR": 1e-2,
            "DATA": str(tokens),
            "OUT": str(out),
            "SEQ_LEN": 128,
        }.items():
            patch.setattr(train_pretrain, name, value)
        train_pretrain.main()
    return out


def test_serve_completes_a_prompt_or_standard_input(trained):
    arguments = ["serve.py", f"CHECKPOINT={trained}", "SEED=3", "MAX_TOKENS=20"]
    outputs = [finish(launch(*arguments, "PROMPT=the cat", stderr=subprocess.DEVNULL)) for _ in range(2)]
    assert outputs[0] == outputs[1] and outputs[0].startswith("the cat") and len(outputs[0]) > 20
    piped = subprocess.run(
        [sys.executable, *arguments], input="the cat\n", capture_output=True, text=True, cwd=ROOT
    )
    assert piped.stdout == outputs[0] and "seed 3" in piped.stderr
    rounded = [finish(launch(*arguments, "PROMPT=the cat", "DTYPE=int8", stderr=subprocess.DEVNULL))
               for _ in range(2)]
    assert rounded[0] == rounded[1] and rounded[0].startswith("the cat") and len(rounded[0]) > 20


def test_serve_answers_a_file_in_order(trained, tmp_path, monkeypatch):
    rows = [{"prompt": "the " + "cat " * n, "id": n} for n in (5, 1, 9, 2)] + [
        {"messages": [{"role": "user", "content": "the sun"}], "id": 77}, {"conversations": [
            {"role": "user", "content": "the sun"}, {"role": "assistant", "content": "reference"}], "id": 78}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, value in dict(
        CHECKPOINT=str(trained),
        PROMPTS=str(tmp_path / "p.jsonl"),
        ANSWERS=str(tmp_path / "a.jsonl"),
        MAX_TOKENS=12,
        BATCH=3,
        DTYPE="float32",
    ).items():
        monkeypatch.setattr(serve, name, value)
    answers = serve.main()
    written = [json.loads(x) for x in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [r["id"] for r in written] == [5, 1, 9, 2, 77, 78] and all(
        set(r) == {"id", "answer"} for r in written
    )
    assert answers[4] == answers[5]
    monkeypatch.setattr(serve, "BATCH", 1)
    assert serve.main() == answers
    monkeypatch.setattr(serve, "MAX_TOKENS", 127)
    with pytest.raises(
        common.BadInput, match=r"p.jsonl:\d: \d+ tokens and MAX_TOKENS 127 pass the context of 128"
    ):
        serve.main()
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(common.BadInput, match="p.jsonl:1: a row needs prompt, messages or conversations"):
        serve.main()


def test_serve_streams_the_classic_model_too(train, tmp_path, monkeypatch, capsys):
    train(MODEL="classic", HIDDEN_DIM=64, STEPS=3)
    for name, value in dict(
        CHECKPOINT=str(tmp_path / "run"), PROMPT="the", MAX_TOKENS=9, SEED=0, STOP=("zzz",)
    ).items():
        monkeypatch.setattr(serve, name, value)
    capsys.readouterr()
    assert serve.main() and capsys.readouterr().out.startswith("the")


# The benchmark's own promises.

# Dynamic sparsity attention and muon tracks.

def chosen_inputs(B, H, E, N, L, NI, K, dtype=torch.float64):
    """q, k, v, bias (a key of each row hidden), chosen, gate (some dropped) for attend_chosen."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N * L, E, dtype=dtype, requires_grad=True) for _ in range(3))
    bias, gate = torch.randn(B, H, N * L, dtype=dtype), torch.randn(B, H, NI, K, dtype=dtype)
    bias[:, :, 1], gate[..., 1:][torch.rand(B, H, NI, K - 1) < 0.3] = -math.inf, -math.inf
    chosen = torch.rand(B, H, NI, N).argsort(-1)[..., :K]
    return q, k, v, bias.requires_grad_(), chosen, gate.requires_grad_()


@pytest.mark.parametrize(
    "B, H, E, N, L, NI, K",
    [(1, 1, 4, 1, 5, 1, 1), (2, 3, 4, 8, 6, 2, 3), (3, 2, 8, 16, 5, 4, 16), (1, 2, 5, 8, 16, 8, 2)],
)
def test_chosen_attention_equals_its_twin_with_gradients(B, H, E, N, L, NI, K, monkeypatch):
    monkeypatch.setattr(common, "CHOSEN_WORKSPACE", 700)                    # several parts
    inputs = chosen_inputs(B, H, E, N, L, NI, K)
    fast, slow = common.attend_chosen(*inputs, N), common.attend_chosen_dense(*inputs, N)
    close(fast, slow)
    wanted, weight = [x for x in inputs if x.is_floating_point()], torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (fast, slow)), strict=True):
        close(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("keys", [16, 4])
def test_flex_attention_equals_the_chosen_twin_forward(keys):
    """Blocks of fewer than 16 keys: its mask has several in one, and what none chose among them stays out."""
    if not __import__("shutil").which("g++"):
        pytest.skip("no C++ compiler")
    torch.compiler.reset()                           # other sizes in one process do not compile on a CPU
    N = 128 // keys
    inputs = [x.detach() for x in chosen_inputs(2, 2, 8, N, keys, 4, 3, torch.float32)]
    assert common._fits_flex(inputs[0], inputs[4], N)
    with torch.no_grad():
        torch.testing.assert_close(
            common.attend_chosen_flex(*inputs, N),
            common.attend_chosen_dense(*inputs, N),
            rtol=1e-4,
            atol=1e-5,
        )


@gpu
@pytest.mark.parametrize("keys", [16, 8])
def test_chosen_attention_on_a_gpu_equals_the_twin_with_gradients(keys):
    inputs = [x.detach().cuda() for x in chosen_inputs(2, 2, 16, 32, keys, 8, 5, torch.float32)]
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    fast, slow = common.attend_chosen(*inputs, 32), common.attend_chosen_dense(*inputs, 32)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)
    wanted = [x for x in inputs if x.is_floating_point()]
    for a, b in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=1e-2, atol=1e-2)


def dsa(density=0.2, **changes):
    torch.manual_seed(0)
    module = common.DynamicSparseAttention(12, 3, density=density, **changes).double()
    torch.nn.init.normal_(module.importance.weight)
    x, real = torch.randn(2, 32 * 8, 12, dtype=torch.double, requires_grad=True), torch.ones(2, 32 * 8).bool()
    real[1, 100:] = False
    real[1, 3] = False
    return module, x, real


def test_all_connections_kept_is_dense_attention():
    module, x, real = dsa(1.0)
    module.log_temperature.data.fill_(5.0)
    sparse, found = module(x, real, 32)
    dense, _ = module(x, real, 32, dense=True)
    close(sparse, dense, 1e-9)
    close(found["sparsity_ratio"], torch.zeros(2, dtype=torch.double))
    close(found["retained_information"], torch.ones(2, dtype=torch.double))
    assert (found["active_connections"] == found["total_connections"]).all() and not sparse[~real].any()
    q, k, v = module.qkv(x).view(2, 256, 3, 3, 4).permute(2, 0, 3, 1, 4)
    bias = module.importance(x).transpose(1, 2)
    keep = real[:, None, None].expand(2, 3, 256, 256)
    plain = (q @ k.mT / 2 + bias[:, :, None]).masked_fill(~keep, -math.inf).softmax(-1) @ v
    close(dense[real], module.out(plain.transpose(1, 2).flatten(2))[real], 1e-9)


def test_sparse_weights_sum_to_one_and_no_query_is_left_alone():
    module, x, real = dsa(0.05, min_connections=20)
    module.log_temperature.data.fill_(-9.0)                                 # drops whatever may be dropped
    q, k, v = module.qkv(x).view(2, 256, 3, 3, 4).permute(2, 0, 3, 1, 4)
    bias = module.importance(x).transpose(1, 2).masked_fill(~real[:, None], -math.inf)
    chosen, gate, found = module.choose(q, k, bias, real, 32)
    y = common.attend_chosen(q, k, torch.ones_like(v), bias, chosen, gate, 32)
    close(y, torch.ones_like(y))
    sizes = real.view(2, 32, -1).sum(-1)
    kept = (sizes[:, None, None].expand(2, 3, 8, 32).gather(3, chosen) * (gate > -math.inf)).sum(-1)
    assert (kept >= 20).all() and (kept < 20 + 8).all()
    module.min_connections = 1000                                           # more than there are: all
    assert float(module(x, real, 32)[1]["sparsity_ratio"].abs().max()) < 1e-9


def test_temperature_and_importance_move_the_connections_and_learn():
    module, x, real = dsa(0.5)
    counts = []
    for temperature in (-3.0, -1.0, 0.0, 3.0):
        module.log_temperature.data.fill_(temperature)
        found = module(x, real, 32)[1]
        counts.append(float(found["active_connections"][0]))
        assert float(found["active_connections"][0]) <= 0.5 * float(found["total_connections"][0])
    assert counts == sorted(counts) and counts[0] < counts[-1]
    module.log_temperature.data.fill_(0.0)
    y, found = module(x, real, 32)
    for value in (y.square().sum(), *(found[k].sum() for k in ("sparsity_ratio", "retained_information"))):
        for parameter in (module.log_temperature, module.importance.weight, module.qkv.weight):
            assert torch.autograd.grad(value, parameter, retain_graph=True)[0].abs().max() > 0
    assert torch.autograd.grad(found["entropy"].sum(), module.importance.weight)[0].abs().max() > 0
    for judge in ("keys", "moments"):                                       # the same in inference
        module.judge = judge
        before, found = module.train()(x, real, 32)
        with torch.no_grad():
            after, unlearned = module.eval()(x, real, 32)
        close(before, after)
        for name in found:
            close(found[name], unlearned[name], 1e-12)
    module.importance.weight.data.mul_(-1)
    assert (before - module(x, real, 32)[0]).abs().max() > 1e-3


def test_dsa_loss_has_the_gradient_of_finite_differences():
    task = torch.rand(3, dtype=torch.double, requires_grad=True)
    values = [torch.rand(3, dtype=torch.double, requires_grad=True) for _ in range(6)]
    names = ("sparsity_ratio", "retained_information", "entropy")

    def loss(task, *values):
        layers = [dict(zip(names, values[i:i + 3], strict=True)) for i in (0, 3)]
        return common.DSALoss(0.3, 0.7, 0.5, 0.2)(task, layers)
    assert torch.autograd.gradcheck(loss, (task, *values))
    found = {k: torch.tensor([v]) for k, v in zip(names, (0.5, 0.8, 0.4), strict=True)}
    by_hand = 2 + 0.7 * 0.2 ** 2 / 0.3 ** 2 + 0.5 * 0.2 + 0.2 * 0.4
    close(common.DSALoss(0.3, 0.7, 0.5, 0.2)(torch.tensor([2.0]), [found] * 2), torch.tensor([by_hand]), 1e-6)
    perfect = {"sparsity_ratio": torch.tensor([0.7]), "retained_information": torch.tensor([1.0]),
               "entropy": torch.tensor([0.0])}
    close(common.DSALoss(0.3)(torch.tensor([2.0]), [perfect]), torch.tensor([2.0]), 1e-6)


@pytest.mark.parametrize("judge, Q, part", [("moments", 32, 0), ("keys", 32, 16), ("keys", 128, 32)])
def test_blocks_are_chosen_and_counted_as_by_hand(judge, Q, part, monkeypatch):
    monkeypatch.setattr(common, "WORKSPACE", 2 * 256 * 16)                  # two heads at once; below, parts
    module, x, real = dsa(0.2, min_connections=20, judge=judge, query_blocks=Q // 8)
    module.log_temperature.data.copy_(torch.tensor([-1.0, 0.5, 3.0]))
    module.importance.weight.data.mul_(0.1)                                 # so that queries differ
    module.qkv.weight.data.mul_(4)
    q, k, v = module.qkv(x).view(2, 256, 3, 3, 4).permute(2, 0, 3, 1, 4)
    bias = module.importance(x).transpose(1, 2).masked_fill(~real[:, None], -math.inf)
    chosen, gate, found = module.choose(q, k, bias, real, 32)
    for b in range(2):
        alive = [j for j in range(32) if real[b, 8 * j:8 * j + 8].any()]
        active = retained = entropy = 0.0
        for h, i in ((h, i) for h in range(3) for i in range(256 // Q)):
            def moments(z, begin, end, b=b, h=h):
                some = z[b, h, begin:end][real[b, begin:end]]
                return some.mean(0), some.var(0, correction=0)
            queries = int(real[b, Q * i:Q * i + Q].sum())
            if not queries:
                continue
            mq, vq = moments(q, Q * i, Q * i + Q)
            scores = torch.full((32,), -math.inf, dtype=torch.double)
            for j in alive:
                mk, vk = moments(k, 8 * j, 8 * j + 8)
                weight = bias[b, h, 8 * j:8 * j + 8].logsumexp(0)
                scores[j] = mq @ mk / 2 + (mq.square() @ vk + vq @ mk.square()) / 8 + weight
            p, kept, keys = scores.softmax(0), [], 0
            ranks = p
            if judge == "keys":
                ranks = torch.zeros(32, dtype=torch.double)
                for begin in range(Q * i, Q * i + Q, part):
                    if real[b, begin:begin + part].any():
                        weights = (moments(q, begin, begin + part)[0] @ k[b, h].T / 2 + bias[b, h]).softmax(0)
                        ranks += weights.view(32, 8).sum(1) * int(real[b, begin:begin + part].sum()) / queries
            order = ranks.argsort(descending=True).tolist()
            for n, j in enumerate(order):  # 7 of 32, more only for too few keys
                near = ranks[order[0]].log() - ranks[j].log() <= module.log_temperature[h].exp()
                if scores[j] > -math.inf and (keys < 20 or near and n < 7):
                    kept.append(j)
                    keys += int(real[b, 8 * j:8 * j + 8].sum())
            assert sorted(chosen[b, h, i][gate[b, h, i] > -math.inf].tolist()) == sorted(kept)
            share = queries / int(real[b].sum()) / 3
            active += queries * keys
            retained += float(ranks[kept].sum()) * share
            entropy -= float((ranks[alive] * ranks[alive].log()).sum()) / math.log(32) * share
        close(found["active_connections"][b].item(), active, 1e-9)
        close(found["retained_information"][b].item(), retained, 1e-9)
        close(found["entropy"][b].item(), entropy, 1e-9)
        close(found["sparsity_ratio"][b].item(), 1 - active / (3 * int(real[b].sum()) ** 2), 1e-9)


def test_blocks_of_single_hot_keys_are_found_by_keys_and_gradients_still_flow():
    """A key far from its block's mean: moments of the block do not show it, its own score does."""
    held = {}
    for judge in ("moments", "keys"):
        module, x, real = dsa(0.05, min_connections=8, judge=judge)
        module.qkv.weight.data.mul_(6)
        module.importance.weight.data.zero_()
        real[:] = True
        q, k, _ = module.qkv(x).view(2, 256, 3, 3, 4).permute(2, 0, 3, 1, 4)
        chosen, gate, found = module.choose(q, k, torch.zeros(2, 3, 256, dtype=torch.double), real, 32)
        weights = (q @ k.mT / 2).softmax(-1).view(2, 3, 8, 32, 32, 8).sum((3, 5))
        held[judge] = float((weights.gather(3, chosen) * (gate > -math.inf)).sum() / weights.sum())
        gradients = torch.autograd.grad(found["retained_information"].sum(), [x, module.qkv.weight])
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert held["keys"] > held["moments"] + 0.03, held


def test_a_neighbour_of_few_hits_lets_no_more_connections_stay():
    module, x, real = dsa(0.2, min_connections=30)
    module.log_temperature.data.fill_(9.0)
    real[:] = True
    alone, found = module(x[:1], real[:1], 32)
    real[1] = torch.arange(256) % 8 == 0                                    # blocks of one hit: it needs 30
    both, together = module(x, real, 32)
    close(both[:1], alone, 1e-9)
    close(together["active_connections"][:1], found["active_connections"], 1e-9)


def test_an_event_without_hits_is_zero_and_leaves_gradients_finite():
    module, x, real = dsa(0.2)
    real[1] = False
    for dense in (False, True):
        y, found = module(x, real, 32, dense)
        assert not y[1].any() and all(v.isfinite().all() for v in found.values())
        total = y.sum() + sum(v.sum() for v in found.values())
        gradients = torch.autograd.grad(total, [x, *module.parameters()], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("T, N", [(77, 8), (64, 16), (5, 4), (100, 1)])
def test_order_of_points_is_that_of_a_tree_halved_along_its_widest_axis(T, N):
    torch.manual_seed(T)
    points, real = torch.randn(3, T, 4), torch.rand(3, T) < torch.tensor([[0.7], [1.0], [0.0]])
    points[~real] = math.nan

    def leaves(points, rows, parts):
        if parts == 1:
            return [rows]
        axis = int((points[rows].amax(0) - points[rows].amin(0)).argmax()) if rows else 0
        rows, half = sorted(rows, key=lambda row: float(points[row, axis])), (len(rows) + 1) // 2
        return [leaf for part in (rows[:half], rows[half:]) for leaf in leaves(points, part, parts // 2)]
    for b, found in enumerate(common.place_order(points, real, N).view(3, N, -1).tolist()):
        assert [[row for row in leaf if row < T] for leaf in found] == leaves(
            points[b], real[b].nonzero()[:, 0].tolist(), N)


def test_neighbours_share_a_block_of_the_order():
    torch.manual_seed(0)
    points = F.normalize(torch.randn(2, 1_000, 3), dim=-1)
    real = torch.ones(2, 1_000).bool()
    real[1, 700:] = False
    index = common.place_order(points, real, 64)
    for b, n in ((0, 1_000), (1, 700)):
        assert sorted(i for i in index[b].tolist() if i < 1_000) == list(range(n))
        leaves = [points[b, leaf[leaf < 1_000]] for leaf in index[b].view(64, -1)]
        assert max(map(len, leaves)) - min(map(len, leaves)) <= 1
        widths = [float((leaf - leaf.mean(0)).norm(dim=-1).max()) for leaf in leaves]
        assert sorted(widths)[32] < 0.3                                     # a 64th of the sphere: 0.25


def test_hits_of_a_block_are_alike_in_place_time_and_charge():
    torch.manual_seed(0)
    model = train_muon_dsa.MuonNet(leaf=8, order="features")
    x, real = fit_muons.by_time(random_hits(2, 1_000))
    rotation, first = train_muon_dsa.frames(x, real)
    features = model.features(x, real, rotation, first).flatten(0, 1)
    model.mean.copy_(features.mean(0))
    model.scale.copy_(features.std(0).clamp(min=1e-3))
    _, present, features = model.tokens(x, real, rotation, first)
    mean, within = common.block_moments(features[:, None], present, model.blocks)
    within, between = within.mean((1, 2)), mean.var(2, correction=0)[:, 0]
    share = within / (within + between).clamp(min=1e-6)
    assert share[:, :7].max() < 0.4, share                                  # by place alone: 0.66


def test_a_density_that_divides_the_blocks_is_met_exactly():
    module, x, real = dsa(0.3)
    module.log_temperature.data.fill_(9.0)
    real[:] = True
    found = module(x[:, :240], real[:, :240], 10)[1]
    close(1 - found["sparsity_ratio"], torch.full((2,), 0.3, dtype=torch.double), 1e-9)


def test_density_falls_from_first_to_last(monkeypatch):
    monkeypatch.setattr(train_muon_dsa, "STEPS", 11)
    shares = [train_muon_dsa.density_at(step) for step in range(11)]
    assert shares == sorted(shares, reverse=True)
    assert [shares[i] for i in (0, 5, 10)] == pytest.approx([0.10, 0.075, 0.05])


def random_hits(B, T, dtype=torch.float32):
    """Hits (B, T, 5) that look like an event's."""
    rng = np.random.default_rng(0)
    x = np.stack([simulate_muons.event(rng, simulate_muons.NOMINAL, T)[0] for _ in range(B)])
    return torch.from_numpy(x).to(dtype)


def test_order_padding_and_neighbours_of_hits_change_nothing():
    torch.manual_seed(0)
    model = train_muon_dsa.MuonNet(seq_len=400).double()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x = random_hits(3, 400, torch.double)
    x[1, 300:] = math.nan
    whole = model(x, refine=3)
    shuffled = model(x[[2, 0, 1]][:, torch.randperm(400)], refine=3)
    padded = F.pad(x[1:2, :300], (0, 0, 7, 150), value=math.nan)
    alone = model(padded, refine=3)
    for name in ("ends", "refined", "context"):
        close(shuffled[name], whole[name][[2, 0, 1]], 1e-7)
        close(alone[name], whole[name][1:2], 1e-7)


def test_order_of_hits_changes_nothing_where_times_are_equal():
    torch.manual_seed(0)
    model = train_muon_dsa.MuonNet(seq_len=400, read=100).double()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x = random_hits(2, 400, torch.double)
    x[..., 3] = x[..., 3].round()                                           # as a clock of 1 ns has them
    whole, shuffled = model(x, refine=3), model(x[:, torch.randperm(400)], refine=3)
    for name in ("ends", "refined", "context"):
        close(shuffled[name], whole[name], 1e-7)


@pytest.mark.parametrize("charge", [0.0, -3.0])
def test_events_without_charge_have_finite_answers(charge):
    model = train_muon_dsa.MuonNet(seq_len=400)
    x = random_hits(2, 400)
    x[0, :, 4] = charge
    assert model(x, refine=2)["refined"].isfinite().all()


def test_the_likelihood_of_true_tracks_knows_no_absolute_time_and_no_padding():
    torch.manual_seed(0)
    model, x = train_muon_dsa.MuonNet(seq_len=400).double(), random_hits(2, 400, torch.double)
    for p in model.hits.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.index_spread.fill_(0.03)
    y = fit_muons.on_sphere(torch.randn(2, 2, 3, dtype=torch.double))
    out = {"context": torch.randn(2, 16, dtype=torch.double)}
    later = F.pad(x + torch.tensor([0, 0, 0, 5_000.0, 0]), (0, 0, 5, 20), value=math.nan)
    loss = train_muon_dsa.hits_loss(model, out, x, y)
    close(train_muon_dsa.hits_loss(model, out, later, y), loss, 1e-6)


def test_turned_events_keep_their_distances_and_half_are_mirrored(monkeypatch):
    x = random_hits(40, 20, torch.double)
    y = fit_muons.on_sphere(torch.randn(40, 2, 3, dtype=torch.double))
    monkeypatch.setattr(train_muon_dsa, "TASK", "regression")
    turned, ends = train_muon_dsa.turned(x, y, np.random.default_rng(0))
    for before, after in (((x, y), (turned, ends)), ((x, x), (turned, turned))):
        close(*(torch.cdist(a[..., :3], b[..., :3]) for a, b in (before, after)), 1e-6)
    assert torch.equal(turned[..., 3:], x[..., 3:])
    hands = [float(torch.linalg.det(after[:3, :3]) / torch.linalg.det(before[:3, :3]))
             for before, after in zip(x, turned, strict=True)]
    assert 10 < sum(h > 0 for h in hands) < 30 and np.allclose(np.abs(hands), 1)


def test_turning_an_event_turns_its_track():
    model = train_muon_dsa.MuonNet(seq_len=400).double()
    x = random_hits(2, 400, torch.double)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double))[0]
    turn *= torch.linalg.det(turn)
    rotated = torch.cat([x[..., :3] @ turn, x[..., 3:]], -1)
    close(model(rotated)["ends"], model(x)["ends"] @ turn, 1e-6)


def muon_case(n_hits=120, n_events=2, seed=0):
    """(model in float64 with weights off the first ones, hits, ends, log light, optics, context)."""
    torch.manual_seed(seed)
    model = train_muon_dsa.MuonNet(seq_len=n_hits).double()
    for part in (model.hits, model.light):
        for p in part.parameters():
            p.data += 0.1 * torch.randn_like(p)
    model.index_spread.fill_(0.03)
    rng, events = np.random.default_rng(seed), []
    for _ in range(n_events):
        events.append(simulate_muons.event(rng, simulate_muons.NOMINAL, n_hits))
    x = torch.from_numpy(np.stack([e[0] for e in events])).double()
    ends = torch.tensor(np.array([e[1:] for e in events]))
    light = 13.5 + 0.3 * torch.randn(n_events, 16, dtype=torch.double)
    context = torch.randn(n_events, 16, dtype=torch.double)
    move = 0.1 * torch.randn(n_events, len(train_muon_dsa.OPTICS), dtype=torch.double)
    return model, x, ends, light, model.light.moved(model.light.detector(context)[0], move).detach(), context


def first_light_of(x, ends):
    return fit_muons.first_light(*(ends[:, i, None].expand(-1, x.shape[1], -1) for i in (0, 1)), x[..., :3])


@pytest.mark.parametrize(("limit", "seed"), [(1.0, 4), (0.2, 7)])
def test_refinement_ends_where_the_posterior_of_times_and_charges_is_largest(limit, seed):
    """Autograd finds no slope left there, in ends, light, optics and what event_time finds, and aside it is
    smaller; also where optics are as far as they may be. What times say of the optics is not in it."""
    model, x, ends, _, _, context = muon_case(400, seed=seed)
    L, real = model.light, torch.ones(x.shape[:2]).bool()
    L.farthest[:6] *= limit
    first = fit_muons.first_time(x[..., 3], real)
    late, largest = (x[..., 3] - first[:, None]).clamp(-100, 600), x[..., 4].amax(1)
    event, known = train_muon_dsa.event_charges(x, real), [k.detach() for k in L.detector(context)]

    def posterior(ends, light, optics, found):
        arrival, geometry = first_light_of(x, ends)
        by_time, by_charge = (L(ends, x[..., :3], o) for o in (optics.detach(), optics))
        L.expect(by_time, light)
        seen = L.seen(by_time, arrival, x[..., 4])
        *parts, gains = model.hits(arrival, geometry, seen, x, largest, context)
        rest = train_muon_dsa.remaining(late, found, gains)
        over = light - (simulate_muons.ENERGY * simulate_muons.NOMINAL.light_yield / light.shape[1]
                        * (ends[:, 1] - ends[:, 0]).detach().norm(dim=-1)).log()[:, None] - optics[:, 5:6]
        prior = ((optics - known[0])[:, :6] / known[1]).square().sum(1)
        prior = prior + 2 * (over / 0.15).square().log1p().sum(1)
        indices = (found[:, 1:3] / 0.03).square().sum(1) + found[:, 3:].square().sum(1)
        charges = L.log_likelihood(L.expect(by_charge, light), event, optics)[0].sum(1)
        return (train_muon_dsa.responsible(rest, *parts)[0].sum(1) - 0.5 * (prior + indices)
                + model.charge_weight * charges)
    state = fit_muons.on_sphere(ends + 0.1 * torch.randn_like(ends))
    state, states = (state, *L.settle(ends, x, real, event, known, 6, 0.15)[:2], None), []
    with torch.no_grad():
        for _ in range(80):
            state, _ = model.step(state, x, real, event, first, context, known, largest, 0.15)
            states.append(state)
    still = (states[-1][0] - states[-2][0]).abs().amax((1, 2)) < 1e-9      # others go round, by a few mm
    assert still.any()

    def at(state):
        inputs = [t.detach().requires_grad_() for t in state]
        value = posterior(*inputs)
        across, along, detector, found = torch.autograd.grad(value.sum(), inputs)
        free = state[2][:, :6].abs() < L.farthest[:6] - 1e-6                # the others are at their limits
        across = (across[:, :, None] * fit_muons.tangents(state[0])).sum(-1).flatten(1)
        return [value[still], *(t[still] for t in (across, along, detector[:, :6] * free, found))]
    (_, *steep), (value, *left) = at(states[0]), at(states[-1])
    for slope, before in zip(left, steep, strict=True):
        assert slope.abs().max() < 1e-6 * before.abs().max(), (slope, before)
    for _ in range(6):
        aside = fit_muons.on_sphere(state[0] + 0.01 * torch.randn_like(ends))
        assert (posterior(aside, *state[1:])[still] < value).all()
    assert limit == 1.0 or (state[2][still].abs() >= L.farthest - 1e-6).any()
    close(state[0].norm(dim=-1), torch.full((2, 2), simulate_muons.RADIUS, dtype=torch.double), 1e-9)


def test_events_that_still_move_get_more_steps_and_those_far_off_begin_again():
    model, x, ends, _, _, context = muon_case(400, 4)
    real, steps, told, step = torch.ones(4, 400).bool(), [], [], model.step

    def counted(*arguments):
        found, said = step(*arguments)
        steps.append((arguments[0][0], found[0]))
        told.append((arguments[1], said, arguments[-1]))
        return found, said
    model.step = counted
    start = fit_muons.on_sphere(ends + torch.tensor([0, 0.1, 1, 2])[:, None, None] * torch.randn_like(ends))
    first = fit_muons.first_time(x[..., 3], real)
    found = model.refine(start, x, real, first, context, 4, again=False)
    assert torch.equal(torch.stack([told[3][0], told[2][0]], 2).flatten(1, 2), x)       # half each, and the
    assert told[3][2] is told[2][1] and told[2][2] is None                              # last counts both
    answer, rows = steps[3][1].clone(), torch.arange(4)
    for (before, after), (again, last) in itertools.pairwise(steps[3:]):
        rows = rows[(after - before).norm(dim=-1).amax(1) > 0.15]
        assert torch.equal(again, answer[rows])
        answer[rows] = last
    assert torch.equal(found, answer)
    assert len({len(last) for _, last in steps}) > 1 and 4 < len(steps) < 12, [len(last) for _, last in steps]
    assert ((steps[-1][1] - steps[-1][0]).norm(dim=-1) < 0.15).all()
    far = (found - start).norm(dim=-1).amax(1) > 1
    assert far.any() and not far.all()
    found[far] = model.refine(found[far], x[far], real[far], first[far], context[far], 6, again=False)
    assert torch.equal(model.refine(start, x, real, first, context, 4), found)


def test_short_tracks_make_four_steps_before_and_find_their_light_anew():
    model, x, ends, _, _, context = muon_case(400, 4)
    real, told, step = torch.ones(4, 400).bool(), [], model.step
    first = fit_muons.first_time(x[..., 3], real)

    def counted(*arguments):
        told.append(arguments)
        return step(*arguments)
    model.step = counted
    start = fit_muons.on_sphere(ends + 0.3 * torch.randn_like(ends))
    lengths = (start[:, 1] - start[:, 0]).norm(dim=-1)
    model.short = float(lengths.median()) + 1e-6
    short = lengths < model.short
    found = model.refine(start, x, real, first, context, 3, again=False)
    assert short.any() and not short.all() and [len(a[1]) for a in told[:5]] == [int(short.sum())] * 4 + [4]
    seen = torch.cat([a[1] for a in told[:4]], 1)[..., 3]                   # half of the hits, each once
    assert seen.shape[1] == 200 and all(len(row.unique()) == 200 for row in seen)
    begun = start.clone()
    begun[short] = told[4][0][0][short]
    assert (begun - start)[short].abs().max() > 0.01
    close(told[4][0][0], begun, 1e-9)
    told.clear()
    model.refine(start, x, real, first, context, 3, graph=True)                     # not in training, not of
    few = x[:, :100], real[:, :100]                                                 # few hits
    assert model.refine(start, *few, first, context, 3, again=False).isfinite().all()
    assert [len(a[1]) for a in told[:4]] == [4] * 4
    model.short = 0.0
    close(model.refine(begun, x, real, first, context, 3, again=False), found, 1e-6)


def test_the_mlp_of_one_event_after_the_other_is_that_of_all():
    layer, x = train_muon_dsa.Layer(12, 3, 24, "post", 16, 8, "keys"), torch.randn(3, 64, 12)
    with torch.no_grad():
        one_by_one = layer.mlp(x)
    close(layer.mlp(x), one_by_one)


def test_slopes_of_light_are_those_of_autograd():
    """What is written out, hit by hit, against autograd through the same forward pass, in float64."""
    model, x, ends, light, optics, _ = muon_case()
    L, weights = model.light, torch.randn(2, 120, model.light.n_features, dtype=torch.double)
    rise = torch.randn(2, 120, dtype=torch.double)
    ends, light, optics = (t.clone().requires_grad_() for t in (ends, light, optics))

    def seen():
        rays = L(ends, x[..., :3], optics)
        return rays, L.expect(rays, light), L.seen(rays, first_light_of(x, ends)[0], x[..., 4])
    wide = [ends[:, i, None].expand(-1, 120, -1).detach().clone().requires_grad_() for i in (0, 1)]
    slopes = torch.autograd.grad(fit_muons.first_light(*wide, x[..., :3])[0].sum(), wide)
    with torch.no_grad():
        rays, *_ = seen()
        L.bend(rays)
        chain, rises = L.chain(rays, weights, torch.cat(slopes, -1), rise), L.rises(rays)
        close(L.rises(rays, ends=False), rises[..., 6:], 1e-12)
    _, log_expected, features = seen()
    told = (features * weights).sum(-1) + log_expected * rise
    for hit in range(0, 120, 7):
        wanted = torch.autograd.grad(told[:, hit].sum(), (ends, light), retain_graph=True)
        for mine, its in zip(chain, wanted, strict=True):
            close(mine[:, hit], its.flatten(1), 1e-9)
        wanted = torch.autograd.grad(log_expected[:, hit].sum(), (ends, light, optics), retain_graph=True)
        close(rises[:, hit], torch.cat([wanted[0].flatten(1), wanted[1], wanted[2][:, :6]], 1), 1e-9)
        assert not wanted[2][:, 6:].any()


def test_slopes_of_the_first_light_and_of_its_network_are_those_of_autograd():
    model, x, ends, _, _, context = muon_case()
    ends[0] = fit_muons.on_sphere(ends[0] + torch.tensor([[0, 0, 30.0], [0, 0, 30.0]]))      # a short track
    entry, exit = (ends[:, i, None].expand(-1, 120, -1).clone().requires_grad_() for i in (0, 1))
    light = fit_muons.first_light(entry, exit, x[..., :3])
    assert (light[1][..., 0] <= 0).any() and (light[1][..., 0] >= 1).any()     # beside light from in between
    seen = torch.randn(2, 120, model.light.n_features, dtype=torch.double).requires_grad_()
    arrival, geometry = (t.detach().requires_grad_() for t in light)
    hidden = model.hits.hidden(geometry, seen, x, x[..., 4].amax(1), context)
    given = model.hits.outputs(arrival, geometry, hidden[-1])
    weights = [[torch.randn_like(t) for t in given] for _ in range(2)]
    found = model.hits.slopes(arrival, *hidden, given, weights)
    for i, weight in enumerate(weights):
        wanted = torch.autograd.grad(given, (arrival, geometry, seen), weight, retain_graph=True)
        for mine, its in zip(found, wanted, strict=True):
            close(mine[i], its, 1e-9)
    slopes = train_muon_dsa.first_light_slopes(ends, x[..., :3], light[1].detach(), *found[:2])
    for i in range(2):
        wanted = torch.autograd.grad(light, (entry, exit), [f[i] for f in found[:2]], retain_graph=True)
        close(slopes[i], torch.cat(wanted, -1), 1e-9)


def test_normal_equations_of_some_hits_count_in_a_step_of_the_others(monkeypatch):
    """Where it was said, exactly as a step of all hits; elsewhere as a straight line from there says."""
    model, x, ends, light, optics, context = muon_case()
    real, found = torch.ones(2, 120).bool(), torch.zeros(2, 7, dtype=torch.double)
    first, event = fit_muons.first_time(x[..., 3], real), train_muon_dsa.event_charges(x, real)
    rest = first, context, model.light.detector(context), x[..., 4].amax(1), 0.3
    monkeypatch.setattr(train_muon_dsa, "event_time", lambda *a: a[-1])
    state = ends, light, optics, found
    some, others = (train_muon_dsa.some_hits(x, real, event, 2, i) for i in (0, 1))
    _, said = model.step(state, *some, *rest)
    moved, _ = model.step(state, *others, *rest, said)
    for mine, whole in zip(moved, model.step(state, x, real, event, *rest)[0], strict=True):
        close(mine, whole, 1e-8)
    place, pull, matrix = said
    away = place + 0.01 * torch.randn_like(place)
    there = away, pull - (matrix @ (away - place)[..., None])[..., 0], matrix
    for mine, its in zip(moved, model.step(state, *others, *rest, there)[0], strict=True):
        close(mine, its, 1e-8)


def test_training_through_a_step_has_the_gradient_of_finite_differences(monkeypatch):
    """In the network's weights, where event_time's answer and the light to begin with are given."""
    model, x, ends, light, optics, context = muon_case()
    real, found = torch.ones(2, 120).bool(), 0.1 * torch.randn(2, 7, dtype=torch.double)
    first, event = fit_muons.first_time(x[..., 3], real), train_muon_dsa.event_charges(x, real)
    monkeypatch.setattr(train_muon_dsa, "event_time", lambda *a: a[-1])
    weight = torch.randn_like(ends)

    def value():
        known = model.light.detector(context)
        state, _ = model.step((ends, light, optics, found), x, real, event, first, context, known,
                              x[..., 4].amax(1), 0.3)
        return (state[0] * weight).sum()
    for p in (model.hits.last.weight, model.hits.second.weight, model.hits.first.weight,
              model.hits.modes.weight, model.hits.context.weight, model.light.optics.weight):
        slope, = torch.autograd.grad(value(), p)
        way = torch.randn_like(p) / p.numel() ** 0.5
        sides = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                p += size * way
                sides.append(value())
                p -= size * way
        close((slope * way).sum(), (sides[0] - sides[1]) / 2e-5, 1e-5)


def test_slope_and_information_of_charges_are_those_of_autograd():
    """Of seen, saturated, frequent and rare charges; the information where it is not held up from below."""
    L = train_muon_dsa.Light(1, 4).double()
    optics = torch.zeros(1, len(L.kinds), dtype=torch.double)
    log_expected = torch.linspace(4, 9, 40, dtype=torch.double)[None].requires_grad_()
    for charge in (60.0, 450.0, 700.0, 1500.0):
        event = (torch.full((1, 40), charge).double(), *(torch.tensor([[v]]) for v in (1500.0, 500.0, 0.0)))
        logs, slope, information = L.log_likelihood(log_expected, event, optics)
        wanted, = torch.autograd.grad(logs.sum(), log_expected, create_graph=True)
        close(slope, wanted, 1e-9)
        assert (information > 0).all()
        if charge == 1500.0:                            # where nothing but the logistic curve bends
            curve, high = torch.autograd.grad(wanted.sum(), log_expected)[0], log_expected > 7.4
            assert ((information + curve)[high].abs() < 0.1 * information.max()).all()
            low = (log_expected > 6.6) & ~high          # too little light: steps that are never too long
            assert (information + curve > 0)[low].all() and (information > 5)[low].all()


def test_expected_charges_are_those_of_the_simulation():
    """Of a nominal detector, the light of each piece given, against the simulation's own sum over slices."""
    detector, rng = simulate_muons.NOMINAL, np.random.default_rng(3)
    start, stop = simulate_muons.track(rng)
    along = (np.arange(simulate_muons.SLICES) + 0.5) / simulate_muons.SLICES
    photons = simulate_muons.energies(rng, np.linalg.norm(stop - start)) * detector.light_yield
    direct, diffuse = simulate_muons.mean_light(detector, start + along[:, None] * (stop - start), photons)
    pmts = torch.from_numpy(simulate_muons.pmt_directions() * simulate_muons.PMT_RADIUS)[None, ::40].double()
    for pieces, most in ((simulate_muons.SLICES, 0.01), (16, 0.2)):
        L = train_muon_dsa.Light(2, pieces).double()
        rays = L(torch.tensor(np.stack([start, stop]))[None], pmts, torch.zeros(1, len(L.kinds)).double())
        light = torch.from_numpy(photons).unflatten(0, (pieces, -1)).sum(1)[None].log()
        expected = L.expect(rays, light).exp()
        error = (expected[0] / torch.from_numpy(direct + diffuse.sum())[::40] - 1).abs()
        assert error.median() < most / 3 and error.quantile(0.9) < most, (error.median(), error.quantile(0.9))


def simulated_light(seed, track=((0, 6, 16.65), (3, 5, -16.71))):
    """(Light, ends, hits, which are real, event_charges, true log light of 16 pieces) of a nominal event."""
    ends = np.array(track) * simulate_muons.RADIUS / np.linalg.norm(track, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    hits, *_ = simulate_muons.event(rng, simulate_muons.NOMINAL, 2_000, tuple(ends))
    true = simulate_muons.energies(np.random.default_rng(seed), np.linalg.norm(ends[1] - ends[0]))
    true = torch.from_numpy(true * 3_000).unflatten(0, (16, -1)).sum(1).log().float()
    x, real = torch.from_numpy(hits)[None], torch.ones(1, 2_000).bool()
    return (train_muon_dsa.Light(2, 16), torch.from_numpy(ends)[None].float(), x, real,
            train_muon_dsa.event_charges(x, real), true)


def test_the_light_of_each_piece_is_found_from_charges():
    """Of a clipping track within a third, most within 15%; of bright showers, where more than half of the
    hits saturate, the middle and as likely charges as with the true light."""
    crowded = []
    for case in ((3, ((10.56, -9.85, 10.24), (-1.99, -17.09, 4.17))), (0,), (1,), (4,)):
        L, ends, x, real, event, true = simulated_light(*case)
        known, found = (torch.zeros(1, len(L.kinds)), torch.full((1, 6), 0.05)), ()
        for width in L.widths:
            found = L.settle(ends, x, real, event, known, 6, width, *found[:2])
        light = found[0][0]
        crowded.append(float(event[3]))
        assert event[1] == 1500
        if case[0] == 3:
            error = (light - true).abs()
            assert error.median() < 0.15 and error.max() < 0.35, error
            continue
        middle = [(v.softmax(0) * torch.arange(16)).sum() for v in (light, true)]
        assert (middle[0] - middle[1]).abs() < 1 and light.max() - light.median() > 1, (light, true)
        likely = [L.log_likelihood(L.expect(L(ends, x[..., :3], optics), v[None]), event, optics)[0].sum()
                  for v, optics in ((light, found[1]), (true, known[0]))]
        assert likely[0] > likely[1] - 2, likely
    assert max(crowded) > 0.1 and crowded[0] == 0


@pytest.mark.parametrize("seed", [1, 4, 8])
def test_light_and_optics_settle_where_charges_are_as_likely_as_with_the_true_ones(seed):
    """From a wrong belief of the optics, also where more than half of the hits saturate; a step that makes it
    worse is taken back."""
    L, ends, x, real, event, true = simulated_light(seed)
    spread, nominal = torch.tensor([[0.15, 0.4, 0.3, 0.4, 0.2, 0.2]]), torch.zeros(1, len(L.kinds))
    known = F.pad(1.5 * spread * torch.tensor([1, -1, 1, -1, 1, 1]), (0, 3)), spread

    def value(light, optics):
        log_expected = L.expect(L(ends, x[..., :3], optics), light)
        return (L.log_likelihood(log_expected, event, optics)[0].sum()
                - (light - L.level(ends, optics)).square().log1p().sum()
                - 0.5 * ((optics - known[0])[:, :6] / spread).square().sum())
    values = [value(*L.settle(ends, x, real, event, known, n, 1.0)[:2]) for n in (1, 4, 8, 16)]
    assert all(later > earlier - 1e-2 for earlier, later in itertools.pairwise(values)), values
    assert values[-2] > value(true[None], nominal) - 3, (values, value(true[None], nominal))


def test_training_learns_the_optics_of_a_detector():
    """From what settles at the true tracks: without anything else to go by, the context learns attenuation,
    leak, diffuse light and yield of a stressed detector. A spread's slope is zero where its square is that of
    the settled optics' distance and uncertainty."""
    torch.manual_seed(0)
    detector, rng, model = simulate_muons.STRESSED, np.random.default_rng(5), train_muon_dsa.MuonNet()
    nominal, events = simulate_muons.NOMINAL, [simulate_muons.event(rng, detector) for _ in range(12)]
    x, y = (torch.from_numpy(np.stack(v)).float() for v in
            ([e[0] for e in events], [np.stack(e[1:]) for e in events]))
    context, L = torch.zeros(12, 16), model.light
    hits = x, torch.ones(x.shape[:2]).bool(), train_muon_dsa.event_charges(x, torch.ones(x.shape[:2]).bool())
    hits, known = train_muon_dsa.some_hits(*hits, 4), [v.detach() for v in L.detector(context)]
    first = L.settle(y, *train_muon_dsa.some_hits(*hits, 4), known, 6, L.widths[0])
    _, optics, matrix = L.settle(y, *hits, known, 4, L.widths[-1], *first[:2])
    unsure = torch.linalg.inv(matrix.double()).diagonal(dim1=1, dim2=2)[:, -6:]
    wanted = 1 - ((optics - known[0])[:, :6].square() + unsure) / known[1].square()
    (500 * train_muon_dsa.hits_loss(model, {"context": context}, x, y, every=4)).sum().backward()
    close(L.optics.bias.grad[-6:].double(), wanted.sum(0), 1e-3)
    optimizer = torch.optim.Adam([L.optics.bias], 0.07)
    for _ in range(60):
        optimizer.zero_grad()
        train_muon_dsa.hits_loss(model, {"context": context}, x, y, every=4).mean().backward()
        optimizer.step()
    found = L.detector(context)[0][0].detach()
    wanted = {0: math.log(detector.attenuation / nominal.attenuation), 3: math.log(0.05 / 0.03),
              4: math.log(0.55 / 0.4), 5: math.log(detector.light_yield / nominal.light_yield)}
    for kind, value in wanted.items():
        assert abs(found[kind] - value) < 0.2 * abs(value), (found, wanted)


def test_the_time_indices_and_modes_of_an_event_are_found_from_its_hits():
    torch.manual_seed(0)
    centers = 100 * torch.rand(2, 500, 1, dtype=torch.double)
    spreads, shares = torch.zeros_like(centers), torch.zeros_like(centers)             # one Gaussian of 1 ns
    gains = torch.randn(2, 500, 4, dtype=torch.double) * torch.tensor([50.0, 50.0, 2.0, 2.0])
    real = torch.ones(2, 500).bool()
    real[1, 400:] = False
    true = torch.tensor([[7.0, 0.02, -0.01, 1.0, -0.5], [-4.0, -0.03, 0.02, 0.3, 0.8]], dtype=torch.double)
    noise = torch.randn(2, 500, dtype=torch.double)
    late = centers[..., 0] + true[:, :1] + (gains @ true[:, 1:, None])[..., 0] + noise
    late[1, 400:] = 1e3
    found = train_muon_dsa.event_time(late, real, centers, spreads, shares, gains, 0.03)
    error = (found - true).abs() / torch.tensor([0.06, 0.0015, 0.0015, 0.04, 0.04])    # about one sigma
    assert error.max() < 4, error
    rest = train_muon_dsa.remaining(late, true, gains)
    close(rest[real], (centers[..., 0] + noise)[real], 1e-9)
    known = train_muon_dsa.event_time(late, real, centers, spreads, shares, gains, 0.0)   # a nominal detector
    assert (known[:, 1:].abs() < 1e-3).all()


def test_first_photon_is_drawn_as_if_all_were(n_events=3):
    """first_times against n photons drawn one by one, and the table of light against the sum."""
    detector, rng = simulate_muons.NOMINAL, np.random.default_rng(0)
    start, stop = simulate_muons.track(rng)
    length, along = (
        np.linalg.norm(stop - start),
        (np.arange(simulate_muons.SLICES) + 0.5) / simulate_muons.SLICES,
    )
    places = start + along[:, None] * (stop - start)
    photons = simulate_muons.energies(rng, length) * detector.light_yield
    direct, diffuse = simulate_muons.mean_light(detector, places, photons)
    r = np.linalg.norm(places, axis=1)
    share, inside, outside = simulate_muons.light(detector, r[None], simulate_muons.pmt_directions() @ (
        places / r[:, None]).T)
    exact = (share * photons).sum(1)
    assert np.abs(direct / exact - 1).max() < 0.02
    assert diffuse.sum() == pytest.approx(detector.diffuse[0] * exact.mean(), rel=0.01)
    light = simulate_muons.LIGHT
    for pmt, kind, n in ((100, 0, 5), (9_000, 1, 50), (15_000, 0, 200)):
        arrival = inside[pmt] * detector.index_in / light + outside[pmt] * detector.index_out / light
        arrival = (arrival + along * length / light).astype("f4")
        weights = np.stack([share[pmt] * photons, diffuse])
        rows = 1000
        fast = simulate_muons.first_times(
            rng, detector, np.tile(arrival, (rows, 1)), np.tile(weights[:, None], (1, rows, 1)).astype("f4"),
            np.full(rows, kind), np.full(rows, n))
        cell = rng.choice(2 * len(along), (rows, n), p=weights.ravel() / weights.sum())
        time = arrival[cell % len(along)] + (cell >= len(along)) * rng.exponential(
            detector.diffuse[1], (rows, n)
        )
        tau = rng.choice([t for _, t in detector.decay], (rows, n), p=[s for s, _ in detector.decay])
        slow = (time + rng.exponential(tau) + detector.spread[kind] * rng.standard_normal((rows, n))).min(1)
        for q in (0.1, 0.5, 0.9):
            assert abs(np.quantile(fast, q) - np.quantile(slow, q)) < 0.25 + 4 * slow.std() / rows ** 0.5


@pytest.fixture(scope="session")
def muons(tmp_path_factory):
    """Files of 240 small events of the nominal detector, and 40 more."""
    folder = tmp_path_factory.mktemp("muons")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(DETECTOR="nominal", HITS=400, SHARD=120, EVENTS=240, SEED=5, NAME="muons",
                                WORKERS=1).items():
            patch.setattr(simulate_muons, name, value)
        simulate_muons.simulate(folder)
        simulate_muons.simulate(folder, NAME="more", SEED=6, EVENTS=40)
    return folder


@pytest.fixture
def train_muons(train, muons):
    """Run train_muon_dsa.main() on the small events."""
    tiny = dict(
        DATA=str(muons / "muons-*.pt"),
        DIM=24,
        HIDDEN_DIM=48,
        SEQ_LEN=400,
        VALID_SHARE=0.1,
        TEST_SHARE=0.1,
        LR=5e-3,
        N_HEADS=4,
        HIT_DIM=24,
        TASK="regression",  # these three are the checkpoint's in EVAL
        N_CLASSES=2,
        REFINE=4,
    )
    return lambda **constants: train(train_muon_dsa, **{**tiny, **constants})


def test_simulated_events_repeat_themselves_and_lie_on_the_sphere(muons, tmp_path, monkeypatch):
    x, y = fit_muons.read(str(muons / "more-*.pt"))
    close(y.norm(dim=-1), torch.full((40, 2), simulate_muons.RADIUS), 1e-5)
    assert (y[:, 1, 2] < y[:, 0, 2]).all() and x.isfinite().all() and (x[..., 4] > 0).all()
    close(x[..., :3].norm(dim=-1), torch.full(x.shape[:2], simulate_muons.PMT_RADIUS), 1e-5)
    assert (x[:, 1:, 3] >= x[:, :-1, 3]).all()
    for name, value in dict(DETECTOR="nominal", HITS=400, SHARD=7, NAME="again", SEED=6, EVENTS=14,
                            WORKERS=2).items():
        monkeypatch.setattr(simulate_muons, name, value)
    simulate_muons.simulate(tmp_path)                                       # other files, other processes
    again = fit_muons.read(str(tmp_path / "again-*.pt"))
    assert torch.equal(again[0], x[:14]) and torch.equal(again[1], y[:14])


def test_simulated_files_of_other_settings_are_never_taken_for_these(muons, tmp_path, monkeypatch):
    base = dict(DETECTOR="nominal", HITS=50, SHARD=4, EVENTS=6, SEED=6, NAME="some", WORKERS=1,
                OUT=str(tmp_path), PMT_RADIUS=19.0)

    def make(**changes):
        with monkeypatch.context() as patch:
            for name, value in (base | changes).items():
                patch.setattr(simulate_muons, name, value)
            simulate_muons.main()
        return fit_muons.read(str(tmp_path / "some-*.pt"))[0]
    first = make()
    for changes, message in ((dict(DETECTOR="stressed"), "DETECTOR=nominal"), (dict(SEED=7), "SEED=6"),
                             (dict(HITS=60), "HITS=50"), (dict(SHARD=2), "SHARD=4"),
                             (dict(SEED=-1), "SEED -1"), (dict(WORKERS=-1), "WORKERS -1"),
                             (dict(NAME="a/b"), "NAME 'a/b'")):
        with pytest.raises(common.BadInput, match=message):
            make(**changes)
    more = make(EVENTS=8)                                                   # the last file had been half full
    assert len(more) == 8 and torch.equal(more[:6], first)
    assert not list(tmp_path.glob("*.unfinished"))
    close(more[..., :3].norm(dim=-1), torch.full(more.shape[:2], 19.0), 1e-4)  # workers know every constant


def test_an_unfinished_simulation_is_finished_by_the_next_run(tmp_path, monkeypatch):
    folder, run, made = tmp_path / "data/muons", common.start(0, "float32"), []
    folder.mkdir(parents=True)
    monkeypatch.setattr(train_muon_dsa, "__file__", str(tmp_path / "train_muon_dsa.py"))
    monkeypatch.setattr(simulate_muons, "simulate", lambda *a, **k: made.append(k))
    (folder / "muons-0000.pt").touch()
    train_muon_dsa.simulated(run)
    assert not made
    (folder / "muons.unfinished").touch()
    train_muon_dsa.simulated(run)
    assert made[0]["EVENTS"] == train_muon_dsa.EVENTS
    common.stop(run)


def test_the_fit_finds_tracks_from_its_own_start_and_from_the_truth(muons):
    x, truth = fit_muons.read(str(muons / "more-*.pt"))
    calibration = train_muon_dsa.calibration(torch.device("cpu"))
    found = fit_muons.summary(fit_muons.errors(fit_muons.fit(x, calibration), truth))
    assert found["failures"] <= 1 and found["angle_deg"][0] < 0.6 and found["entry_cm"][0] < 10
    near = fit_muons.fit(x, calibration, start=truth)
    far = fit_muons.fit(x, calibration, steps=16)
    assert (near - far).norm(dim=-1).median() < 0.005
    x[:, 390:] = math.nan                                                   # rows that are no hits
    assert fit_muons.summary(fit_muons.errors(fit_muons.fit(x, calibration), truth))["failures"] <= 1


def test_errors_of_tracks_are_what_they_are_called():
    a = torch.tensor([[[0, 0, 17.7], [0, 0, -17.7]]])
    b = fit_muons.on_sphere(torch.tensor([[[1.0, 0, 17.7], [1.0, 0, -17.7]]]))
    found = fit_muons.errors(a, b)
    side = float(b[0, 0, 0])
    assert float(found["angle_deg"][0]) == pytest.approx(0, abs=1e-6)
    assert float(found["dD_cm"][0]) == pytest.approx(100 * side, rel=1e-5)
    assert float(found["entry_cm"][0]) == pytest.approx(100 * float((a - b)[0, 0].norm()), rel=1e-5)
    c = torch.tensor([[[0, 0, 17.7], [17.7, 0, 0]]])
    assert float(fit_muons.errors(a, c)["angle_deg"][0]) == pytest.approx(45)
    beyond = torch.tensor([[[0, 0.95, 0.3], [0, 0.95, -0.3]]])  # 16.9 m from the centre; c: 12.5 m
    ends, truth = (fit_muons.on_sphere(torch.cat(t)) for t in ((beyond.flip(1), c), (beyond, c)))
    assert fit_muons.report(ends, truth)["clipping_deg"] == [180] * 3
    assert fit_muons.report(ends, truth)["angle_deg"][0] == pytest.approx(90, abs=1e-4)
    assert "clipping_deg" not in fit_muons.report(ends[1:], truth[1:])


@pytest.mark.parametrize(
    "constants",
    [
        dict(),
        dict(ATTENTION="dense"),
        dict(OUTPUT="direction"),
        dict(OUTPUT="raw", OPTIMIZER="muon", REFINED=0.1, STEPS=80),
    ],
    ids=["dsa", "dense", "direction", "raw"],
)
def test_muon_network_learns_far_below_the_mean_track(train_muons, muons, tmp_path, constants):
    found = train_muons(**{"STEPS": 60, "EVAL_EVERY": 30, **constants})
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    mean = fit_muons.summary(fit_muons.errors(fit_muons.on_sphere(y.mean(0, keepdim=True)).expand_as(y), y))
    assert found["test_angle_deg"][0] < 0.25 * mean["angle_deg"][0]
    assert found["test_entry_cm"][0] < 0.25 * mean["entry_cm"][0]
    first = found["test_first_entry_cm"][0]
    assert first < 0.6 * mean["entry_cm"][0] and found["test_events"] > 10
    for name in ("residuals.png", "resolution.png", "event.png", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5_000


def test_the_seed_preset_and_other_tasks_train(train_muons, muons, tmp_path):
    assert "test_angle_deg" in train_muons(PRESET="seed", READOUT="last", STEPS=3)
    assert train_muons(DTYPE="bfloat16", STEPS=2)["test_angle_deg"][0] < 45
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    label = (y[:, 0, 2] > y[:, 0, 2].median()).long()                       # does it enter high up
    torch.save({"data": x, "targets": label, "note": "ignored"}, tmp_path / "labels.pt")
    for task in ("classification", "binary_classification"):
        found = train_muons(
            TASK=task, DATA=str(tmp_path / "labels.pt"), STEPS=40, FRAME="detector", AUGMENT=False
        )
        assert found["test_accuracy"] > found["test_majority"] + 0.1


@pytest.mark.parametrize("constants", [
    dict(READOUT="last"), dict(ATTENTION="dense"), dict(LIKELIHOOD=0.0, REFINE=0),
    dict(LIKELIHOOD=0.0, REFINED=1.0), dict(REFINE=0, MODES=0), dict(TASK="classification", READOUT="last"),
    dict(SPARSITY=0.0, RETENTION=0.0, ENTROPY=0.0, CONTEXT=0),
], ids=str)
def test_every_trained_muon_weight_gets_a_gradient(train_muons, muons, tmp_path, monkeypatch, constants):
    """Several processes wait for every one of them."""
    def once(run, net, optimizers, batches, loss_of, *rest):
        loss_of(batches[0])[0].backward()
        assert not [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
        raise InterruptedError("seen")
    x, _ = fit_muons.read(str(muons / "muons-*.pt"))
    torch.save({"x_data": x, "y_data": torch.arange(len(x)) % 2}, tmp_path / "labels.pt")
    data = {"DATA": str(tmp_path / "labels.pt")} if "TASK" in constants else {}
    monkeypatch.setattr(common, "update", once)
    with pytest.raises(InterruptedError, match="seen"):
        train_muons(VALID_EVENTS=1, **constants, **data)


def test_interrupted_muon_run_goes_on_bit_for_bit(train_muons, tmp_path):
    train_muons(OUT=str(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        interrupted(train_muons, 6)
    train_muons()
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_one_process_and_two_train_the_same_muon_network(train_muons, tmp_path):
    train_muons(OUT=str(tmp_path / "one"))
    constants = common.load(tmp_path / "one/checkpoint.pt")["constants"]
    del constants["OUT"]
    words = [*(f"{k}={v}" for k, v in constants.items()), f"OUT={tmp_path / 'two'}"]
    finish(launch("train_muon_dsa.py", *words, ranks=2))
    same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-4)


def test_muon_events_are_split_alike_however_files_hold_them(muons, tmp_path, monkeypatch):
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    order = torch.randperm(len(x))
    torch.save(
        {"x_data": x[order].half(), "y_data": y[order].flatten(1)}, tmp_path / "half.pt"
    )  # float16 is read, too
    for k, part in enumerate(order.split(50)):
        torch.save({"x_data": x[part].clone(), "y_data": y[part].flatten(1)}, tmp_path / f"part-{k}.pt")
    one, many = (train_muon_dsa.Events(str(p)) for p in (muons / "muons-*.pt", tmp_path / "part-*.pt"))
    assert one.fingerprint() == many.fingerprint()
    for a, b in zip(one.split(), many.split(), strict=True):
        assert torch.equal(one.batch(a, "cpu")[0], many.batch(b, "cpu")[0])
    train, valid, test = map(set, one.split())
    assert train | valid | test == set(range(len(x))) and not (train & valid or train & test or valid & test)
    assert len(train_muon_dsa.Events(str(tmp_path / "half.pt"))) == len(x)
    monkeypatch.setattr(train_muon_dsa, "SEQ_LEN", 100)
    few = one.batch([0], "cpu")[0]
    assert few.shape == (1, 100, 5) and set(map(tuple, few[0].tolist())) <= set(map(tuple, x[0].tolist()))


def test_files_of_other_lengths_and_clocks_are_read_together(muons, tmp_path, monkeypatch):
    x, y = fit_muons.read(str(muons / "more-*.pt"))
    y = y.flatten(1)
    late = x[:2].double()
    late[..., 3] += 1e15                                                    # ns since an epoch
    front = F.pad(x[3:8, :100], (0, 0, 50, 0), value=math.nan)
    for name, part, ends in (("a", late, y[:2]), ("b", x[2:3, :300], y[2:3]), ("c", front, y[3:8])):
        torch.save({"x_data": part, "y_data": ends}, tmp_path / f"{name}.pt")
    events = train_muon_dsa.Events(str(tmp_path / "?.pt"))
    batch, _ = events.batch([0, 2, 3], "cpu")
    assert batch.shape == (3, 400, 5) and batch[1, 300:].isnan().all() and len(set(events.key)) == 8
    times = x[0, :, 3].double() - x[0, :, 3].min()
    assert (batch[0, :, 3] - times).abs().max() < 0.2  # 1e15 in float64 has an eighth of a ns
    x[..., 4] -= 5                                                          # a pedestal taken off: below zero
    torch.save({"x_data": F.pad(x[:1], (0, 0, 0, 9), value=math.nan)}, tmp_path / "d.pt")
    monkeypatch.setattr(train_muon_dsa, "SEQ_LEN", 399)
    assert train_muon_dsa.Events(str(tmp_path / "d.pt"), False).batch([0], "cpu")[0].isfinite().all()


def test_a_model_is_scored_with_its_own_classes_hits_and_steps(train_muons, muons, tmp_path, capsys):
    x, y = fit_muons.read(str(muons / "more-*.pt"))
    torch.save({"x_data": x, "y_data": torch.arange(40) % 3}, tmp_path / "labels.pt")
    words = dict(DATA=str(tmp_path / "labels.pt"), VALID_SHARE=0.2, TEST_SHARE=0.2, STEPS=2)
    train_muons(TASK="classification", N_CLASSES=3, CONTEXT=0, **words)
    assert "accuracy" in train_muons(EVAL=str(tmp_path / "labels.pt"))
    train_muons(REFINE=0, SEQ_LEN=100, STEPS=2)
    one = train_muons(EVAL=str(muons / "more-*.pt"), SEQ_LEN=2_000)         # not given on the command line
    assert "first_entry_cm" not in one
    torch.save({"x_data": x[:3], "y_data": y[:3].flatten(1)}, tmp_path / "known.pt")
    train_muons(EVAL=str(tmp_path / "known.pt"))
    with_ends = np.load(tmp_path / "run/predictions.npz")["entry"]
    torch.save({"x_data": x[:3]}, tmp_path / "knot.pt")
    assert train_muons(EVAL=str(tmp_path / "kno?*.pt")) == {"events": 6}
    assert "knot.pt has no y_data: nothing is scored" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "run/predictions.npz")["entry"][:3], with_ends, atol=1e-4)
    assert "first_entry_cm" in train_muons(EVAL=str(tmp_path / "known.pt"), FIT_STEPS=2)
    fitted = np.load(tmp_path / "run/predictions.npz")["entry"]
    assert np.abs(fitted - with_ends).max() > 0.01


def test_weights_of_another_size_to_begin_with_are_one_sentence(train_muons, tmp_path):
    train_muons(STEPS=1)
    with pytest.raises(common.BadInput, match=r"INIT .* has other sizes .*'dim': \(24, 48\)"):
        train_muons(INIT=str(tmp_path / "run"), OUT=str(tmp_path / "two"), DIM=48)
    old = common.load(tmp_path / "run/best.pt")
    del old["model"]["light.optics.bias"]
    torch.save(old, tmp_path / "run/best.pt")
    with pytest.raises(common.BadInput, match="not of this script.s network but of an earlier"):
        train_muons(EVAL="nothing.pt")


def test_one_event_is_scored_by_two_processes(train_muons, muons, tmp_path):
    train_muons(STEPS=1)
    x, y = fit_muons.read(str(muons / "more-*.pt"))
    torch.save({"x_data": x[:1], "y_data": y[:1].flatten(1)}, tmp_path / "one.pt")
    alone = train_muons(EVAL=str(tmp_path / "one.pt"))
    words = f"EVAL={tmp_path}/one.pt", f"OUT={tmp_path}/run"
    finish(launch("train_muon_dsa.py", *words, ranks=2))
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert found["events"] == 1 and found["entry_cm"] == pytest.approx(alone["entry_cm"], rel=1e-2)


def test_hits_of_a_block_and_those_that_choose_together_may_be_any_number(monkeypatch):
    x = random_hits(2, 400, torch.float32)
    for leaf, queries in ((8, 16), (8, 24), (10, 48), (12, 7), (16, 1000), (1000, 1)):
        for name, value in dict(SEQ_LEN=400, READ=400, LEAF=leaf, QUERIES=queries, JUDGE="keys").items():
            monkeypatch.setattr(train_muon_dsa, name, value)
        model = train_muon_dsa.make_model().eval()
        attention, own = model.layers[0].attention, 400 / model.blocks
        assert attention.judge == "keys" and model.blocks % attention.query_blocks == 0
        assert leaf == 1000 or 0.7 < own / leaf < 1.5
        assert queries in (7, 1000, 1) or 0.5 < own * attention.query_blocks / queries < 2
        with torch.no_grad():
            assert bool(torch.isfinite(model(x, 0)["ends"]).all())
    with pytest.raises(common.BadInput, match="judge 'kyes' is not one of moments, keys"):
        common.DynamicSparseAttention(12, 3, judge="kyes")


def test_the_preset_gives_way_to_what_the_command_line_says(monkeypatch):
    monkeypatch.setattr(train_muon_dsa, "PRESET", "seed")
    assert train_muon_dsa.make_model().sizes["n_layers"] == 4
    monkeypatch.setattr(train_muon_dsa, "N_LAYERS", 1)
    monkeypatch.setattr(train_muon_dsa, "_given", {"N_LAYERS"}, raising=False)
    sizes = train_muon_dsa.make_model().sizes
    assert sizes["n_layers"] == 1 and sizes["norm"] == "post"


def test_unseen_events_are_scored_and_predicted(train_muons, muons, tmp_path, monkeypatch):
    train_muons(STEPS=10)
    pattern = str(muons / "more-*.pt")
    found = train_muons(EVAL=pattern)
    x, y = fit_muons.read(pattern)
    saved = np.load(tmp_path / "run/predictions.npz")
    ends = torch.stack([torch.from_numpy(saved[k]) for k in ("entry", "exit")], 1)
    assert fit_muons.summary(fit_muons.errors(ends, y))["entry_cm"] == pytest.approx(
        found["entry_cm"], rel=1e-3
    )
    assert json.loads((tmp_path / "run/eval.json").read_text())["events_per_s"] > 0
    torch.save({"x_data": x}, tmp_path / "blind.pt")
    assert train_muons(EVAL=str(tmp_path / "blind.pt")) == {"events": 40}
    blind = np.load(tmp_path / "run/predictions.npz")
    np.testing.assert_allclose(blind["entry"], saved["entry"], atol=1e-4)
    assert "fitted" not in found and "network_entry_cm" in train_muons(EVAL=pattern, FIT_STEPS=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x, y: {"x_data": x[..., :4], "y_data": y},
            "x_data is (240, 400, 4) torch.float32; it must be (N, T, 5)",
        ),
        (lambda x, y: {"y_data": y}, "x_data is missing"),
        (lambda x, y: {"x_data": x}, "has no y_data"),
        (lambda x, y: {"x_data": x.int(), "y_data": y}, "torch.int32; it must be (N, T, 5) floats"),
        (lambda x, y: {"x_data": x, "y_data": y[:9]}, "y_data is (9, 6); TASK regression needs (240, 6)"),
        (lambda x, y: {"x_data": x, "y_data": y * 1.1}, "m off the sphere of 17.7 m"),
        (lambda x, y: {"x_data": x * 1000, "y_data": y}, "are these millimetres?"),
        (
            lambda x, y: {"x_data": x.index_fill(1, torch.arange(395), math.nan), "y_data": y},
            "event 0 has fewer than 10",
        ),
        (
            lambda x, y: {
                "x_data": torch.cat([x[:, :, :4], x[:, :, 4:].masked_fill(x[:, :, 4:] > 500, math.nan)], -1),
                "y_data": y,
            },
            "has a number that is not finite",
        ),
        (lambda x, y: {"x_data": x[:, :9], "y_data": y}, "event 0 has fewer than 10"),
        (lambda x, y: {"x_data": 100 * x, "y_data": y}, "are these centimetres?"),
        (lambda x, y: {"x_data": x / 19.5, "y_data": y}, "a PMT is 1 from the centre, inside the"),
        (lambda x, y: {"x_data": x * torch.tensor([1, 1, 1, 1e-9, 1]), "y_data": y}, "are these seconds?"),
        (lambda x, y: {"x_data": x.to_sparse(), "y_data": y}, "it must be (N, T, 5) floats"),
        (lambda x, y: [x, y], "holds a list; a shard is a dict"),
        (lambda x, y: {"x_data": x, "y_data": y, "code": Path("x")}, "(it holds a pathlib.PosixPath)"),
        (None, "no file matches"),
    ],
)
def test_unusable_shards_are_one_sentence(train_muons, muons, tmp_path, change, message):
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    if change:
        torch.save(change(x, y.flatten(1)), tmp_path / "bad.pt")
    with pytest.raises(common.BadInput) as error:
        train_muons(DATA=str(tmp_path / "bad.pt"))
    assert message in str(error.value)


def test_labels_that_are_no_classes_are_one_sentence(train_muons, muons, tmp_path):
    x, _ = fit_muons.read(str(muons / "muons-*.pt"))
    for label in (0.5, math.nan, -1, 2):
        torch.save({"x_data": x, "y_data": torch.full((len(x),), label)}, tmp_path / "bad.pt")
        with pytest.raises(common.BadInput, match="they must be whole numbers from 0 to 1"):
            train_muons(TASK="binary_classification", DATA=str(tmp_path / "bad.pt"))


def test_the_fit_reads_what_the_network_reads_and_says_what_is_wrong(muons, tmp_path, monkeypatch):
    x, y = fit_muons.read(str(muons / "more-*.pt"))
    torch.save({"data": x[:2].double(), "targets": y[:2].flatten(1).double()}, tmp_path / "a.pt")
    torch.save({"x_data": x[2:3, :300], "y_data": y[2:3].flatten(1)}, tmp_path / "b.pt")
    again, ends = fit_muons.read(str(tmp_path / "[ab].pt"))
    assert again.shape == (3, 400, 5) and again[2, 300:].isnan().all() and torch.equal(ends, y[:3])
    assert torch.equal(again[:2], x[:2]) and torch.equal(again[2, :300], x[2, :300])
    torch.save({"x_data": x}, tmp_path / "blind.pt")
    torch.save([x], tmp_path / "list.pt")
    for name, value, message in (
        ("DATA", "list.pt", "holds a list"), ("CALIBRATION", "blind.pt", "has no y_data"),
        ("BATCH", 0, "BATCH 0 must be"), ("ITERATIONS", -1, "ITERATIONS -1 must be"),
        ("EVENTS", -1, "EVENTS -1 must be"), ("INDEX_IN", 1.0, "INDEX_IN 1.0 must be"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(fit_muons, "DATA", str(tmp_path / "a.pt"))
            patch.setattr(fit_muons, name, str(tmp_path / value) if isinstance(value, str) else value)
            with pytest.raises(common.BadInput, match=message):
                fit_muons.main()


def test_padding_of_any_kind_does_not_change_the_fit(muons):
    x, _ = fit_muons.read(str(muons / "more-*.pt"))
    x = x[:4].clone()
    x[1, 100:] = math.nan
    calibration = train_muon_dsa.calibration(torch.device("cpu"))
    found = fit_muons.fit(x, calibration)
    apart = torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)
    close(fit_muons.fit(F.pad(apart, (0, 0, 1_000, 0), value=math.nan), calibration), found, 1e-3)
    few = torch.where((torch.arange(400) % 40 == 3)[None, :, None], x[:1], math.nan)     # ten hits, far apart
    assert fit_muons.fit(few, calibration).isfinite().all()


def test_an_answer_that_is_no_number_is_a_failure():
    found = {k: torch.tensor([1.0, math.nan]).double() for k in ("angle_deg", "dD_cm", "entry_cm", "exit_cm")}
    assert fit_muons.summary(found)["failures"] == 1
    assert fit_muons.summary(found | {"angle_deg": torch.tensor([6.0, 1.0]).double()})["failures"] == 2


@pytest.mark.parametrize(
    "constants, message",
    [
        (dict(DENSITY=(0.1, 0.0)), "DENSITY (0.1, 0.0) must be two shares"),
        (dict(DENSITY=("a", 1)), "DENSITY ('a', 1) must be two shares"),
        (dict(READ=0), "READ 0 must be at least 10"),
        (dict(SEQ_LEN=1), "SEQ_LEN 1 must be at least 10"),
        (dict(HIT_DIM=0), "HIT_DIM 0 must be at least 1"),
        (dict(MODES=-1), "MODES -1 must be at least 0"),
        (dict(INDEX_SPREAD=-0.1), "INDEX_SPREAD -0.1 must be at least 0"),
        (dict(SEED=-1), "SEED -1 must be between 0 and"),
        (dict(N_CLASSES=1), "N_CLASSES 1 must be at least 2"),
        (dict(REFINE=0, REFINED=1.0), "REFINED 1.0 trains through the steps of REFINE"),
        (dict(LIKELIHOOD=0.0), "REFINE 4 steps need a likelihood"),
        (dict(VALID_SHARE=0.0), "VALID_SHARE 0.0"),
        (dict(EVAL="x", MICRO_BATCH=0), "there is no checkpoint"),
        (dict(TASK="x"), "TASK 'x' is not one of"),
        (dict(DIM=25), "DIM 25 must be a positive multiple of 4"),
        (dict(BATCH=4_000), "smaller BATCH 4000"),
    ],
)
def test_muon_constants_that_do_not_fit_are_one_sentence(train_muons, constants, message):
    with pytest.raises(common.BadInput) as error:
        train_muons(**constants)
    assert message in str(error.value)


# Genotypes.

@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """A simulated panel of 60 people on 0.5 megabases, 12 typed people and their truth."""
    folder = tmp_path_factory.mktemp("people")
    simulate_genotypes.make(folder, 0.5, (20, 20, 20), (6, 6), 0.2, seed=3)
    return folder


@pytest.fixture
def train_people(train, people):
    """Run train_rag_bert.main() on them."""
    tiny = dict(
        PANEL=str(people / "panel.vcf.gz"), SAMPLES=str(people / "samples.panel"), MAP=str(people / "map.gz"),
        DATA="", DIM=16, N_LAYERS=2, N_HEADS=2, N_KV_HEADS=2, WINDOW_SITES=64, EXAMPLES=200, COPY_DIM=16,
        VALID_SHARE=0.15, ARRAY=(0.1, 0.3), CHUNK=7, VALID_TYPED=0.2, VALID_WINDOWS=3,
    )
    return lambda **constants: train(train_rag_bert, **{
        k: v for k, v in {**tiny, **constants}.items() if hasattr(train_rag_bert, k)})


def typed_vcf(people, path, change):
    """The typed file's text lines, changed, bgzipped again."""
    import pysam
    lines = gzip.open(people / "typed.vcf.gz", "rt").read().splitlines()
    with pysam.BGZFile(str(path), "w") as file:
        file.write(("\n".join(change(lines)) + "\n").encode())
    return path


def edit(lines, number, **fields):
    """Lines with fields of record `number` replaced: CHROM, POS, REF, ALT, or the GT of every sample."""
    heads = [i for i, line in enumerate(lines) if not line.startswith("#")]
    row = lines[heads[number]].split("\t")
    for name, value in fields.items():
        if name == "GT":
            row[9:] = [value] * len(row[9:])
        else:
            row[["CHROM", "POS", "ID", "REF", "ALT"].index(name)] = value
    return [*lines[:heads[number]], "\t".join(row), *lines[heads[number] + 1:]]


def test_copying_chains_equal_the_matrices():
    torch.manual_seed(0)
    reference = torch.randint(0, 2, (9, 7), dtype=torch.int8)
    query = torch.randint(-1, 2, (9, 4), dtype=torch.int8)
    distance = torch.rand(9) / 100
    distance[0] = 0
    keep = torch.ones(4, 7)
    keep[0, :2], keep[3, 5] = 0, 0
    for allowed in (None, keep):
        for m, found in train_rag_bert.copy_posteriors(
            query, reference, distance, (100.0, 900.0), 0.01, allowed
        ):
            for r, rate in enumerate((100.0, 900.0)):
                twin = train_rag_bert.copy_twin(query, reference, distance, rate, 0.01,
                                                None if allowed is None else allowed > 0)
                close(found[r].double(), twin[m], 2e-5)
    assert (found[:, 0, :2] == 0).all() and (found[:, 3, 5] == 0).all()
    long = torch.randint(0, 2, (600, 7), dtype=torch.int8)  # nobody but the one that may not be copied fits
    for _, found in train_rag_bert.copy_posteriors(
        long[:, :1], long, torch.full((600,), 1e-4), (100.0,), 1e-3, (torch.arange(7) > 0).float()[None]
    ):
        assert found.isfinite().all() and found[0, 0, 0] == 0


def test_copied_dosages_are_read_between_the_typed_sites(people):
    torch.manual_seed(0)
    cm = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    typed, sites = np.array([1, 4]), np.array([0, 2, 3, 5, 6])
    reference, minor = torch.randint(0, 2, (2, 6), dtype=torch.int8), torch.randint(0, 2, (5, 6)).bool()
    query = torch.randint(0, 2, (2, 3), dtype=torch.int8)
    found = train_rag_bert.copied(query, typed, reference, minor, cm, sites, (300.0,), 0.01)
    twin = train_rag_bert.copy_twin(query, reference, torch.tensor([0, 0.3 / 100]), 300.0, 0.01)
    flank = minor.double() @ twin.transpose(1, 2)                      # (M, V, Q)
    for i, w in enumerate((0, 1 / 3, 2 / 3, 1, 1)):
        close(found.x[0, i].double(), (1 - w) * flank[0, i] + w * flank[1, i], 1e-5)
    close(found.alike.double(), minor.double() @ twin.mean(0).T, 1e-5)


def test_permuting_the_panel_changes_no_dosage(people, train_people):
    panel = train_people_panel(train_people)
    rng = np.random.default_rng(0)
    typed = train_rag_bert.array_mask(rng, panel.maf, 0.2)
    model = train_rag_bert.make_model().eval()
    torch.nn.init.normal_(model.copy.net[-1].weight, std=0.3)

    def of(order):
        examples = train_rag_bert.Examples(panel, panel.alleles[:, :6], np.arange(6, 120)[order],
                                           torch.full((3, 2), -1), torch.zeros(3, dtype=torch.long))
        return train_rag_bert.dosages(common.start(0, "float32"), model, examples, typed)
    close(of(np.arange(114)), of(rng.permutation(114)), 1e-4)


def train_people_panel(train_people, **constants):
    """The Panel that the fixture's constants give."""
    held = {}

    class Stop(Exception):
        pass

    def keep(run):
        held["panel"] = original(run)
        raise Stop
    original = train_rag_bert.Panel
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_rag_bert, "Panel", keep)
        train_people(**constants)
    return held["panel"]


def test_pieces_of_a_chain_agree_at_their_seams(people, train_people, monkeypatch):
    panel = train_people_panel(train_people)
    typed = train_rag_bert.array_mask(np.random.default_rng(0), panel.maf, 0.3)
    model = train_rag_bert.make_model().eval()
    examples = train_rag_bert.Examples(panel, panel.alleles[:, :6], np.arange(6, 120), torch.full((3, 2), -1),
                                       torch.zeros(3, dtype=torch.long))
    run = common.start(0, "float32")
    whole = train_rag_bert.dosages(run, model, examples, typed)
    monkeypatch.setattr(train_rag_bert, "CHAIN_SITES", int(typed.sum()) // 2)
    cut = train_rag_bert.dosages(run, model, examples, typed)
    assert not cut.isnan().any() and (cut - whole).abs().mean() < 0.01
    where, weights = np.flatnonzero(typed), []
    for part, sites, weight in train_rag_bert.chains(panel, typed, np.arange(len(panel))):
        assert set(part) <= set(where) and len(sites) == len(weight)
        weights.append(np.zeros(len(panel)))
        weights[-1][sites] = weight
    assert len(weights) == 3 and np.allclose(sum(weights), 1)
    assert all(weights[i][0] == (i == 0) and weights[i][-1] == (i == 2) for i in range(3))
    rise = np.diff(weights[1])                                             # from the old piece to the new
    assert rise.max() > 0 > rise.min() and (np.diff(np.sign(rise[rise != 0])) != 0).sum() == 1
    windows = panel.windows
    assert (windows[1:, 0] < windows[:-1, 1]).all()
    assert torch.equal(train_rag_bert.dosages(run, model, examples, typed, windows), cut)


def test_overlapping_parts_are_joined_as_soon_as_they_are_settled():
    rng = np.random.default_rng(0)
    parts, total, weight = [], np.zeros((50, 3)), np.zeros((50, 1))
    for first, end in ((0, 12), (8, 20), (15, 30), (16, 31), (31, 50)):
        sites = np.arange(first, end)[rng.random(end - first) < 0.8]
        values, w = rng.random((len(sites), 3)), rng.random((len(sites), 1)) + 0.1
        total[sites] += values * w
        weight[sites] += w
        parts.append((sites, torch.from_numpy(values).float(), torch.from_numpy(w).float()))
    blocks = list(train_rag_bert.blend(parts))
    sites = np.concatenate([b[0] for b in blocks])
    assert np.array_equal(sites, np.flatnonzero(weight)) and len(blocks) == 5      # in order, each once
    mean = torch.from_numpy(total / np.maximum(weight, 1e-9))
    close(torch.cat([b[1] for b in blocks]).double(), mean[sites], 1e-6)
    window = train_rag_bert.Rolling(iter(blocks))
    for first, end in ((0, 5), (2, 9), (9, 30), (20, len(sites))):
        wanted = sites[first:end]
        assert torch.equal(window.rows(wanted), torch.cat([b[1] for b in blocks])[first:end])
        assert window.held[0] == wanted[0]                                         # the rest is forgotten


def test_nearest_segments_are_the_same_by_faiss_and_by_torch_and_never_ones_own(
    people, train_people, tmp_path
):
    panel = train_people_panel(train_people)
    columns, window = np.arange(10, 120), (5, 60)
    rng = np.random.default_rng(0)
    tokens = panel.alleles[5:60, :40].T.long()
    tokens[torch.from_numpy(rng.random(tokens.shape) < 0.5)] = train_rag_bert.MASKED
    banned = torch.arange(40).view(-1, 2).repeat_interleave(2, 0)
    found = {
        kind: train_rag_bert.Retriever(panel, columns, kind, tmp_path) for kind in ("flat", "torch", "ivf")
    }
    flat, torch_ = (found[k].nearest(tokens, window, 5, banned) for k in ("flat", "torch"))
    assert torch.equal(flat, torch_)
    assert not (flat[:, :, None] == banned[:, None]).any()
    for q in range(40):                                                    # by counting, equals in order
        known = tokens[q] != train_rag_bert.MASKED
        differ = (panel.alleles[5:60][known][:, columns] != tokens[q][known][:, None]).sum(0)
        order = [int(columns[i]) for i in torch.argsort(differ, stable=True) if columns[i] not in banned[q]]
        assert flat[q].tolist() == order[:5]
    again = train_rag_bert.Retriever(panel, columns, "flat", tmp_path)
    assert len(list(tmp_path.glob("*.faiss"))) == 1 and torch.equal(
        again.nearest(tokens, window, 5, banned), flat
    )
    assert train_rag_bert.Retriever(panel, columns[1:], "flat", tmp_path).print != again.print
    for path in tmp_path.glob("*.faiss"):
        os.truncate(path, 50)
    whole = train_rag_bert.Retriever(panel, columns, "flat", tmp_path)
    assert torch.equal(whole.nearest(tokens, window, 5, banned), flat)
    found["ivf"].index(*window).nprobe = 100
    assert torch.equal(found["ivf"].nearest(tokens, window, 5, banned), flat)
    with pytest.raises(common.BadInput) as error:
        again.nearest(tokens, window, 110, banned)
    assert "K 110 is more than the 108 haplotypes" in str(error.value)


def bert(**changes):
    torch.manual_seed(0)
    model = train_rag_bert.Imputer(
        **{
            **dict(
                model="bert",
                rates=(100.0,),
                error=1e-3,
                copy_dim=8,
                dim=16,
                n_layers=2,
                n_heads=2,
                k=3,
                fusion="enhanced",
                weighting="power",
                window_sites=32,
                chunk=4,
            ),
            **changes,
        }
    )
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.double()


def window_input(B=2, T=20, K=3):
    g = torch.Generator().manual_seed(0)
    return dict(tokens=torch.randint(0, 3, (B, 2, T), generator=g),
                numbers=torch.rand(B, T, 7, generator=g, dtype=torch.float64),
                frequency=torch.rand(B, T, 2, generator=g, dtype=torch.float64),
                references=torch.randint(0, 2, (B, 2, K, T), generator=g))


@pytest.mark.parametrize("fusion", ["enhanced", "aware", "concat"])
def test_segments_encoded_in_recomputed_chunks_equal_direct_ones_with_gradients(fusion):
    results = []
    for changes in (dict(chunk=5, recompute=True), dict(chunk=1000, recompute=False)):
        model = bert(fusion=fusion, **changes)
        out = model(**window_input())
        sum(v.square().sum() for v in out.values()).backward()
        results.append((out, {k: p.grad for k, p in model.named_parameters()}))
    for part in range(2):
        assert results[0][part].keys() == results[1][part].keys()
        for name, value in results[0][part].items():
            close(value, results[1][part][name], 1e-9)


@pytest.mark.parametrize(
    "make", [common.ConcatFusion, common.RareVariantAwareFusion, common.EnhancedRareVariantFusion]
)
def test_fusion_begins_as_the_identity_and_reads_every_reference(make):
    torch.manual_seed(0)
    fusion = make(8).double()
    x, frequency = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 2).double()
    references = torch.randn(2, 3, 5, 8).double().requires_grad_()
    assert torch.equal(fusion(x, references, frequency), x)
    torch.nn.init.normal_(fusion.mlp[-1].weight)
    fused = fusion(x, references, frequency)
    fused.sum().backward()
    assert references.grad.abs().sum((0, 2, 3)).min() > 0
    close(fusion(x, references[:, [2, 0, 1]], frequency), fused)             # their order says nothing
    other = torch.cat([references[:1], torch.randn_like(references[1:])])
    assert torch.equal(fusion(x, other, frequency)[0], fused[0])             # nor do the next row's


def test_rare_variants_weigh_more_only_where_the_form_tells_them_apart():
    maf = torch.tensor([0.001, 0.01, 0.05, 0.3, 0.99])
    assert common.inverse_maf(maf, "clamped")[:3].tolist() == [10, 10, 10]
    power = common.inverse_maf(maf)
    assert (power[:3].diff() < 0).all() and power[4].isclose(power[1])


def test_a_masked_allele_is_not_seen_by_the_model(people, train_people):
    panel = train_people_panel(train_people)
    typed = np.zeros(len(panel), bool)
    typed[::3] = True
    for kind in ("copy", "bert", "both"):
        retriever = train_rag_bert.Retriever(panel, np.arange(12, 120), "torch")
        model = bert(model=kind, window_sites=64, k=3).float().eval()
        made = []
        for change in (False, True):
            alleles = panel.alleles[:, :12].clone()
            if change:
                alleles[~typed] = 1 - alleles[~typed]
            examples = train_rag_bert.Examples(panel, alleles, np.arange(12, 120), torch.full((6, 2), -1),
                                               torch.zeros(6, dtype=torch.long), retriever)
            made.append(train_rag_bert.dosages(common.start(0, "float32"), model, examples, typed))
        assert torch.equal(*made), kind


def test_the_mixture_begins_as_the_copying_head(people, train_people):
    panel = train_people_panel(train_people)
    typed = train_rag_bert.array_mask(np.random.default_rng(0), panel.maf, 0.2)
    examples = train_rag_bert.Examples(panel, panel.alleles[:, :6], np.arange(6, 120), torch.full((3, 2), -1),
                                       torch.zeros(3, dtype=torch.long),
                                       train_rag_bert.Retriever(panel, np.arange(6, 120), "torch"))
    found = {}
    for kind in ("copy", "both"):
        torch.manual_seed(0)
        model = train_rag_bert.Imputer(
            kind, (100.0, 500.0), 1e-3, 8, 16, 1, 2, 3, "concat", "power", 64
        ).eval()
        found[kind] = train_rag_bert.dosages(common.start(0, "float32"), model, examples, typed)
    sure = (found["copy"] < 1e-3) | (found["copy"] > 1 - 1e-3)  # there the copying head alone asks nobody
    assert panel.flip.any() and (found["both"] - found["copy"]).abs()[~sure].max() < 1e-4


def test_people_may_be_made_to_copy_from_other_populations_only(people, train_people):
    panel = train_people_panel(train_people)
    examples = train_rag_bert.Examples(panel, panel.alleles, np.arange(4, 120), torch.arange(120).view(-1, 2),
                                       panel.population)
    keep = examples.keep(torch.tensor([5, 30, 31]), torch.tensor([True, False, True]))
    populations = panel.population[torch.arange(4, 120) // 2]
    assert torch.equal(keep[0] > 0, populations != panel.population[5])
    assert torch.equal(keep[2] > 0, torch.arange(4, 120) // 2 != 30) and torch.equal(keep[4], keep[5])
    assert torch.equal(keep[4] > 0, populations != panel.population[31])


@pytest.mark.parametrize("model", ["copy", "bert", "both"])
def test_interrupted_imputation_training_equals_the_uninterrupted(train_people, tmp_path, model):
    constants = dict(MODEL=model, STEPS=8, EVAL_EVERY=4, SAVE_EVERY=3)
    train_people(OUT=str(tmp_path / "whole"), **constants)
    with pytest.raises(SystemExit):
        interrupted(train_people, 5, OUT=str(tmp_path / "cut"), **constants)
    train_people(OUT=str(tmp_path / "cut"), **constants)
    same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("model", ["copy", "bert"])
def test_one_update_of_imputation_is_the_same_however_it_is_cut(train_people, tmp_path, model):
    for name, micro in (("a", 8), ("b", 2)):
        train_people(MODEL=model, OUT=str(tmp_path / name), STEPS=3, MICRO_BATCH=micro, EVAL_EVERY=0)
    same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"), 2e-5)


@pytest.mark.parametrize("model", ["copy", "both"])
def test_one_process_and_two_train_the_same_imputation(train_people, tmp_path, model):
    train_people(MODEL=model, OUT=str(tmp_path / "one"), STEPS=4)
    constants = common.load(tmp_path / "one/checkpoint.pt")["constants"]
    del constants["OUT"]
    words = [*(f"{k}={v}" for k, v in constants.items()), f"OUT={tmp_path / 'two'}"]
    finish(launch("train_rag_bert.py", *words, ranks=2))
    same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-5)


def test_copying_beats_frequency_and_one_neighbour_and_writes_what_was_typed(people, train_people, tmp_path):
    import cyvcf2
    train_people(STEPS=40, EVAL_EVERY=20, OUT=str(tmp_path / "run"))
    found = train_people(
        IMPUTE=str(people / "typed.vcf.gz"), CHECK=str(people / "truth.vcf.gz"), OUT=str(tmp_path / "run")
    )
    panel = prepare_genotypes.read(people / "panel.vcf.gz")
    typed, truth = (prepare_genotypes.read(people / f"{n}.vcf.gz") for n in ("typed", "truth"))
    rows = prepare_genotypes.match(typed, panel)[0]
    reference, q = panel.haplotypes(), typed.haplotypes()
    near = np.abs(reference[rows][:, :, None] - q[:, None]).sum(0).argmin(0)
    copied = reference[:, near].reshape(len(reference), -1, 2).sum(2).astype(float)
    af = reference.mean(1)
    use = (af > 0) & (af < 1)
    use[rows] = False
    minor = af > 0.5

    def r2(dose):
        d, t = (np.where(minor[:, None], 2 - x, x)[use].ravel() for x in (dose, truth.gt.sum(2)))
        return np.corrcoef(d, t)[0, 1] ** 2
    assert found["r2"]["all"] > r2(copied) + 0.02 > r2(np.repeat(2 * af[:, None], 12, 1)) + 0.1
    records = list(cyvcf2.VCF(str(tmp_path / "run/imputed.vcf.gz")))
    assert [r.POS for r in records] == panel.pos.tolist() and len(records[0].gt_types) == 12
    dose = np.array([r.format("DS")[:, 0] for r in records])
    assert abs(r2(dose) - found["r2"]["all"]) < 1e-3
    for i, row in enumerate(rows):
        record = records[row]
        assert (record.genotype.array()[:, :2] == typed.gt[i]).all() and record.INFO.get("TYPED")
        assert np.array_equal(dose[row], typed.gt[i].sum(1))
    probability = np.array([r.format("GP") for r in records])
    close(torch.from_numpy(probability.sum(2)), torch.ones(len(records), 12), 3e-3)
    assert (tmp_path / "run/imputed.vcf.gz.tbi").exists()
    assert json.loads((tmp_path / "run/eval.json").read_text())["r2"]["all"] == found["r2"]["all"]

    shutil.copy(tmp_path / "run/imputed.vcf.gz", tmp_path / "ours.vcf.gz")
    for name in ("ours.vcf.gz", people / "truth.vcf.gz", people / "typed.vcf.gz"):
        compared = train_people(IMPUTE=str(people / "typed.vcf.gz"), CHECK=str(people / "truth.vcf.gz"),
                                VERSUS=str(tmp_path / name), OUT=str(tmp_path / "run"))["versus"]
        other, more, low, high = compared["all"]
        assert low <= more <= high and other + more == pytest.approx(found["r2"]["all"], abs=1e-6)
        if name == "ours.vcf.gz":
            assert abs(more) < 1e-3 and -1e-3 < low <= high < 1e-3
        elif "truth" in str(name):
            assert other == pytest.approx(1) and high < 0
        else:                                            # holds no untyped variant: the panel's frequency
            assert other == pytest.approx(r2(np.repeat(2 * af[:, None], 12, 1)), abs=1e-5) and low > 0


def test_the_interval_of_a_difference_is_that_of_people_drawn_anew():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (200, 40))
    truth[5, 3] = -1
    dose = [np.clip(truth + rng.normal(0, s, truth.shape), 0, 2) for s in (0.4, 0.5)]
    maf = rng.uniform(0.01, 0.5, 200)
    panel = types.SimpleNamespace(maf=maf, flip=torch.from_numpy(rng.random(200) < 0.3))
    typed = np.arange(200) < 20
    found = train_rag_bert.versus(*map(torch.from_numpy, dose), torch.from_numpy(truth), panel, typed)["all"]

    def r2(d, people):
        d, t = d[20:, people], truth[20:, people]
        flip = panel.flip.numpy()[20:, None]
        d, known = np.where(flip, 2 - d, d), t >= 0
        t = np.where(flip, 2 - t, t)
        return np.corrcoef(d[known], t[known])[0, 1] ** 2
    drawn = [rng.integers(0, 40, 40) for _ in range(1_000)]
    differences = np.array([r2(dose[0], p) - r2(dose[1], p) for p in drawn])
    whole = np.arange(40)
    assert found[0] == pytest.approx(r2(dose[1], whole))
    assert found[1] == pytest.approx(r2(dose[0], whole) - r2(dose[1], whole))
    ends = np.quantile(differences, [0.025, 0.975])
    assert found[2:] == pytest.approx(ends, abs=0.05 * np.ptp(differences))


def test_unphased_and_missing_typed_calls_are_imputed_nearly_as_well(people, train_people, tmp_path):
    train_people(STEPS=2, OUT=str(tmp_path / "run"))
    check = dict(CHECK=str(people / "truth.vcf.gz"), OUT=str(tmp_path / "run"))
    phased = train_people(IMPUTE=str(people / "typed.vcf.gz"), **check)
    turn = np.random.default_rng(0)

    def loose(lines):
        out = []
        for line in lines:
            cells = line.split("\t")
            if not line.startswith("#"):
                cells[9:] = [
                    "./." if turn.random() < 0.02 else "/".join(sorted(c.split("|"))) for c in cells[9:]
                ]
            out.append("\t".join(cells))
        return out
    path = typed_vcf(people, tmp_path / "loose.vcf.gz", loose)
    unphased = train_people(IMPUTE=str(path), **check)
    assert unphased["r2"]["all"] > phased["r2"]["all"] - 0.08
    text = gzip.open(tmp_path / "run/imputed.vcf.gz", "rt").read()
    assert "0/1:1:" in text and "./." not in text


def test_genotypes_survive_vcf_to_h5_to_vcf(people, tmp_path):
    first = prepare_genotypes.read(people / "typed.vcf.gz")
    first.gt[3, 2] = -1
    prepare_genotypes.write_h5(first, tmp_path / "a.vcf.h5")
    second = prepare_genotypes.read(tmp_path / "a.vcf.h5")
    prepare_genotypes.write_vcf(second, tmp_path / "b.vcf.gz")
    third = prepare_genotypes.read(tmp_path / "b.vcf.gz")
    for found in (second, third):
        assert found.keys() == first.keys() and found.samples == first.samples
        assert (found.gt == first.gt).all() and (found.id == first.id).all()


def test_h5_files_of_bytes_and_several_alt_columns_are_read(people, tmp_path):
    import h5py
    first = prepare_genotypes.read(people / "typed.vcf.gz")
    n = len(first.pos)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["calldata/GT"], file["samples"] = first.gt, np.array(first.samples, dtype="S")
        file["variants/POS"], file["variants/CHROM"] = (
            first.pos.astype(np.int32),
            np.array(first.chrom, dtype="S"),
        )
        file["variants/REF"] = np.array(first.ref, dtype="S")
        file["variants/ALT"] = np.array(
            [[a, "G" if i == 4 else "", ""] for i, a in enumerate(first.alt)], dtype="S"
        )
    found = prepare_genotypes.read(tmp_path / "old.h5")
    rest = [i for i in range(n) if i != 4]
    assert found.keys() == [first.keys()[i] for i in rest] and (found.gt == first.gt[rest]).all()
    assert found.dropped["several ALT alleles (bcftools norm -m- splits them)"] == 1


def test_frequencies_and_windows_are_what_they_say(people):
    panel = prepare_genotypes.read_panel(people / "panel.vcf.gz")
    names, number = prepare_genotypes.populations(people / "samples.panel", panel.samples)
    freq = prepare_genotypes.frequencies(panel, names, number)
    assert names == ["north", "south", "west"] and freq.shape == (4, 4, len(panel.pos))
    np.testing.assert_allclose(freq[:3].sum(0), 1, atol=1e-6)
    north = panel.gt[:, [s.startswith("north") for s in panel.samples]]
    np.testing.assert_allclose(freq[3, 0], north.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(freq[1, 3], (panel.gt.sum(2) == 1).mean(1), atol=1e-6)
    cm = prepare_genotypes.genetic(people / "map.gz", panel.pos, "1")
    assert (np.diff(cm) >= 0).all()
    for sites, length in ((10, 0.0), (1, 0.0), (50, 0.01), (10_000, 0.0)):
        found = prepare_genotypes.windows(cm, sites, length, 0.2)
        seen = np.zeros(len(cm), int)
        for a, b in found:
            assert 0 < b - a <= sites and (not length or b - a == 1 or cm[b - 1] - cm[a] <= length + 1e-9)
            seen[a:b] += 1
        assert seen.min() >= 1


def test_swapped_and_flipped_alleles_are_turned_and_ambiguous_ones_dropped(people, tmp_path):
    panel = prepare_genotypes.read(people / "panel.vcf.gz")
    typed = prepare_genotypes.read(people / "typed.vcf.gz")
    plain = [i for i, (_, _, r, a) in enumerate(typed.keys()) if {r, a} not in ({"A", "T"}, {"C", "G"})]
    pairs = [i for i in range(len(typed.pos)) if i not in plain]
    flip = str.maketrans("ACGT", "TGCA")

    def change(lines):
        lines = edit(lines, plain[0], REF=typed.alt[plain[0]], ALT=typed.ref[plain[0]])
        lines = edit(
            lines, plain[1], REF=typed.ref[plain[1]].translate(flip), ALT=typed.alt[plain[1]].translate(flip)
        )
        lines = edit(lines, pairs[0], REF=typed.alt[pairs[0]], ALT=typed.ref[pairs[0]])
        lines = edit(lines, plain[2], ALT=typed.alt[plain[2]] + "," + "N")
        return lines[:-1] + [lines[-1].replace("chr", ""), lines[-1]]
    found = prepare_genotypes.read(typed_vcf(people, tmp_path / "odd.vcf.gz", change))
    assert found.dropped == {"repeated record": 1, "several ALT alleles (bcftools norm -m- splits them)": 1}
    rows, turned, what = prepare_genotypes.match(found, panel)
    assert what["REF and ALT swapped, turned"] == 1 and what["other strand, turned"] == 1
    assert what["A/T or C/G swapped or on the other strand: cannot be told, dropped"] == 1
    place = {k: i for i, k in enumerate(turned.keys())}
    assert (turned.gt[place[typed.keys()[plain[0]]]] == 1 - typed.gt[plain[0]]).all()
    assert (turned.gt[place[typed.keys()[plain[1]]]] == typed.gt[plain[1]]).all()


def test_what_is_read_of_a_call_is_what_it_says(people, tmp_path):
    typed, panel = (prepare_genotypes.read(people / f"{n}.vcf.gz") for n in ("typed", "panel"))

    def change(lines):
        lines = edit(edit(lines, 1, GT="."), 2, REF=typed.ref[2].lower(), ALT=typed.alt[2].lower())
        lines = edit(lines, 3, GT="0|0").copy()
        at = [i for i, line in enumerate(lines) if not line.startswith("#")][3]
        lines[at] = lines[at][:-3] + "."
        return lines
    found = prepare_genotypes.read(typed_vcf(people, tmp_path / "odd.vcf.gz", change))
    assert (found.gt[1] == -1).all() and (found.gt[3, -1] == -1).all() and (found.gt[3, :-1] == 0).all()
    assert len(prepare_genotypes.match(found, panel)[0]) == len(typed.pos)
    first = typed.take(np.arange(1))
    longer = [
        dataclasses.replace(first, ref=np.array([ref], object), alt=np.array([alt], object))
        for ref, alt in (("A", "AT"), ("AT", "A"))             # an insertion is not the deletion turned round
    ]
    with pytest.raises(common.BadInput) as error:
        prepare_genotypes.match(*longer)
    assert "1 other alleles in the panel, dropped" in str(error.value)
    away = dataclasses.replace(typed, pos=typed.pos + 10**8)      # the panel is of a part of the chromosome
    parts = {k: np.concatenate([getattr(typed, k), *[getattr(away, k)] * 20])
             for k in ("chrom", "id", "ref", "alt", "gt", "phased")}
    pos = np.concatenate([typed.pos, *(away.pos + i * 10**6 for i in range(20))])
    rows, _, what = prepare_genotypes.match(dataclasses.replace(typed, pos=pos, **parts), panel)
    assert len(rows) == len(typed.pos) and what["not in the panel, dropped"] == 20 * len(typed.pos)


def test_what_is_phased_keeps_its_sides_among_unphased_calls(train_people, people, tmp_path):
    import cyvcf2
    train_people(STEPS=1, OUT=str(tmp_path / "run"))
    turn = np.random.default_rng(0)
    swap = {"0|1": "1|0", "1|0": "0|1"}

    def mixed(lines):
        out = []
        for line in lines:
            cells = line.split("\t")
            if not line.startswith("#"):
                wrong = turn.random() < 0.5                # phased, but not as the panel would have it
                cells[9:] = ["/".join(sorted(c.split("|"))) if n < 4 and turn.random() < 0.3 else
                             "1/." if n == 11 and turn.random() < 0.3 else
                             swap.get(c, c) if wrong else c for n, c in enumerate(cells[9:])]
            out.append("\t".join(cells))
        return out
    path = typed_vcf(people, tmp_path / "mixed.vcf.gz", mixed)
    train_people(IMPUTE=str(path), OUT=str(tmp_path / "run"))
    rows, given, _ = prepare_genotypes.match(prepare_genotypes.read(path),
                                             prepare_genotypes.read(people / "panel.vcf.gz"))
    records = list(cyvcf2.VCF(str(tmp_path / "run/imputed.vcf.gz")))
    half = 0
    for i, row in enumerate(rows):
        sides = records[row].format("HDS")
        phased, whole = given.phased[i], (given.gt[i] >= 0).all(1)
        assert np.array_equal(sides[phased & whole], given.gt[i][phased & whole])
        assert (records[row].genotype.array()[whole, :2] == given.gt[i][whole]).all()
        half += (sides[~whole] % 1 > 0).any(1).sum()
    assert half                               # which side the allele of 1/. is on is not known: both imputed


def test_all_sites_typed_and_a_panel_of_oneself(train_people, people, tmp_path, capsys):
    train_people(STEPS=1, OUT=str(tmp_path / "run"))
    truth = str(people / "truth.vcf.gz")
    found = train_people(IMPUTE=truth, CHECK=truth, OUT=str(tmp_path / "run"))
    assert found["calibration"] == 0 and found["typed"] > 100
    panel = prepare_genotypes.read(people / "panel.vcf.gz")
    panel = dataclasses.replace(panel, gt=panel.gt[:, :1], samples=panel.samples[:1])
    prepare_genotypes.write_vcf(panel, tmp_path / "alone.vcf.gz")
    with pytest.raises(common.BadInput) as error:
        train_people(IMPUTE=str(tmp_path / "alone.vcf.gz"), PANEL=str(tmp_path / "alone.vcf.gz"),
                     OUT=str(tmp_path / "run"))
    assert "nobody but the person himself" in str(error.value)
    text = gzip.open(people / "panel.vcf.gz", "rt").read().splitlines()
    import pysam
    with pysam.BGZFile(str(tmp_path / "several.vcf.gz"), "w") as file:
        file.write(("\n".join(edit(text, 7, ALT="C,<X>")) + "\n").encode())
    capsys.readouterr()
    train_people(IMPUTE=truth, PANEL=str(tmp_path / "several.vcf.gz"), OUT=str(tmp_path / "run"))
    assert "left out 1 several ALT alleles" in capsys.readouterr().out
    prepare_genotypes.write_h5(prepare_genotypes.read(truth), tmp_path / "truth.h5")
    train_people(IMPUTE=str(tmp_path / "truth.h5"), OUT=str(tmp_path / "run"))
    assert "taken as phased" in capsys.readouterr().out


def test_a_mask_leaves_a_typed_site_and_a_map_is_part_of_the_fingerprint(train_people, people, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert train_rag_bert.draw_mask(rng, np.array([0.1, 0.2, 0.3]), 0.8).any()
    (tmp_path / "other.map").write_text("1 1 0.1\n500000 1 3.5\n")
    prints = {train_people_panel(train_people, **c).print
              for c in ({}, {"MAP": str(tmp_path / "other.map")}, {"SAMPLES": ""}, {})}
    assert len(prints) == 3


@pytest.mark.parametrize("kind", ["random", "span"])
@pytest.mark.parametrize("rate", train_rag_bert.LEVELS)
def test_masks_hide_their_share_and_leave_windows_something_to_read_and_to_guess(kind, rate):
    rng = np.random.default_rng(0)
    maf = rng.beta(0.3, 2, 20_000) / 2
    for _ in range(5):
        typed = train_rag_bert.draw_mask(rng, maf, rate, (kind,))
        assert abs(typed.mean() - (1 - rate)) < 0.02
        each = typed.reshape(-1, 250).mean(1)            # a window of the BERT
        assert ((0 < each) & (each < 1)).mean() > 0.6


def test_frequencies_that_a_person_is_told_are_of_others(train_people, people):
    panel = train_people_panel(train_people)
    donors = np.arange(4, 120)
    examples = train_rag_bert.Examples(panel, panel.alleles, donors, torch.arange(120).view(-1, 2),
                                       panel.population)
    names, number = panel.names, panel.population.numpy()
    who, rows = torch.tensor([0, 5, 30]), slice(10, 50)
    found = examples.frequencies(who, rows)
    for i, person in enumerate(who.tolist()):
        others = np.array([p for p in range(2, 60) if p != person])
        part = dataclasses.replace(panel.file, gt=panel.file.gt[:, others])
        want = prepare_genotypes.frequencies(part, names, number[others])[:, :, rows]
        close(found[:, 0, i], torch.from_numpy(want[:, -1]), 1e-6)
        close(found[:, 1, i], torch.from_numpy(want[:, number[person]]), 1e-6)
    alone = train_rag_bert.Examples(panel, panel.alleles, donors[:2], torch.arange(120).view(-1, 2),
                                    panel.population).frequencies(torch.tensor([2, 40]), rows)
    assert alone.isfinite().all() and (alone[:, :, 0] == 0).all()


def test_a_documented_preset_yields_to_the_command_line(train_people, people, tmp_path):
    words = dict(PANEL=people / "panel.vcf.gz", STEPS=1, VALID_SHARE=0.15, WINDOW_SITES=32, VALID_WINDOWS=1,
                 MICRO_BATCH=4, BATCH=4, PRESET="seed", LR=3e-3, N_LAYERS=4, DIM=16, OUT=tmp_path / "run")
    finish(launch("train_rag_bert.py", *(f"{k}={v}" for k, v in words.items())))
    found = common.load(tmp_path / "run/checkpoint.pt")
    assert [found["sizes"][k] for k in ("model", "dim", "n_layers", "k")] == ["bert", 16, 4, 3]
    constants, group = found["constants"], found["optimizers"][0]["param_groups"][0]
    assert constants["LR"] == 3e-3 and constants["GAMMA"] == 5 and constants["WARMUP"] == 20_000
    assert group["peak"] == 3e-3 and group["weight_decay"] == 0.01 and tuple(group["betas"]) == (0.9, 0.999)
    found = train_people(IMPUTE=str(people / "typed.vcf.gz"), OUT=str(tmp_path / "run"), WINDOW_SITES=1020)
    assert found["people"] == 12                       # windows no longer than the model was made for


def test_focal_gradients_of_sure_sites_are_finite():
    for gamma in (0.5, 2.0, 5.0):
        logits = torch.tensor([-30.0, 0.0, 30.0], requires_grad=True)
        train_rag_bert.focal(logits, torch.tensor([0.0, 1.0, 1.0]), gamma).sum().backward()
        classes = torch.stack([logits, -logits], 1)
        train_rag_bert.focal_classes(classes, torch.tensor([1, 0, 0]), gamma).sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: edit(t, 5, GT="0"), "is not diploid; haploid calls"),
        (lambda t: edit(t, 5, GT="0|2"), "has an allele above 1, but there is one ALT"),
        (lambda t: [line.replace("west021", "west022") for line in t], "a sample twice"),
        (lambda t: edit(t, 5, POS="1"), "is not sorted: position 1 follows"),
        (
            lambda t: [line.replace("1\t", "22\t", 1) if not line.startswith("#") else line for line in t],
            "is of chromosome 22",
        ),
        (
            lambda t: [re.sub(r"^1\t(\d+)", lambda m: f"1\t{int(m[1]) + 7_000_000}", line) for line in t],
            "another genome build",
        ),
        (lambda t: [line for line in t if line.startswith("#")], "holds no variant with one ALT allele"),
        (lambda t: [re.sub(r"\t[01]\|[01]$", "\t./.", line) for line in t], "has no call at any variant"),
    ],
)
def test_unusable_typed_files_are_one_sentence(train_people, people, tmp_path, change, message):
    train_people(STEPS=1, OUT=str(tmp_path / "run"))
    with pytest.raises(common.BadInput) as error:
        train_people(
            IMPUTE=str(typed_vcf(people, tmp_path / "bad.vcf.gz", change)), OUT=str(tmp_path / "run")
        )
    assert message in str(error.value)


def test_cut_files_and_other_panels_are_one_sentence(train_people, people, tmp_path):
    whole = (people / "panel.vcf.gz").read_bytes()
    (tmp_path / "cut.vcf.gz").write_bytes(whole[:len(whole) // 2])
    prepare_genotypes.write_h5(prepare_genotypes.read(people / "panel.vcf.gz"), tmp_path / "a.h5")
    h5 = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(h5[:len(h5) // 2])
    (tmp_path / "few.panel").write_text("north001 north\n")
    np.save(tmp_path / "Freq.npy", np.zeros((4, 2, 9)))
    (tmp_path / "w.csv").write_text("first,end\n0,10\n")
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04.")
    (tmp_path / "long.csv").write_text(f"0,{len(prepare_genotypes.read(people / 'panel.vcf.gz').pos)}\n")
    (tmp_path / "plink.map").write_text("1 . 0.1 1000\n1 . 0.2 400000\n")
    (tmp_path / "nan.map").write_text("1000 1 nan\n400000 1 0.2\n\n")
    (tmp_path / "plain.gz").write_text("1000 1 0.1\n400000 1 0.2\n")
    missing = prepare_genotypes.read(people / "panel.vcf.gz")
    missing.gt[4, 3] = -1
    prepare_genotypes.write_vcf(missing, tmp_path / "missing.vcf.gz")
    for constants, message in (
        (dict(PANEL=str(tmp_path / "cut.vcf.gz")), "is cut short: its end is missing"),
        (dict(PANEL=str(tmp_path / "cut.h5")), "cannot be read, it may be cut short"),
        (dict(PANEL=str(tmp_path / "none.vcf.gz")), "no genotypes at"),
        (dict(PANEL=str(tmp_path / "missing.vcf.gz")), "a panel must be complete"),
        (dict(SAMPLES=str(tmp_path / "few.panel")), "gives no population for sample"),
        (dict(FREQ=str(tmp_path / "Freq.npy")), "is (4, 2, 9), not ref, het, hom, af"),
        (dict(FREQ=str(tmp_path / "pickle.npy")), "cannot be read"),
        (dict(WINDOWS=str(tmp_path / "w.csv")), "no window holds site 10 of"),
        (dict(WINDOWS=str(tmp_path / "long.csv"), MODEL="bert"), "the model reads WINDOW_SITES 64 at most"),
        (dict(MAP=str(tmp_path / "plink.map")), "no line of chromosome 1, its second column names ."),
        (dict(MAP=str(tmp_path / "nan.map")), "positions and cM must rise"),
        (dict(MAP=str(tmp_path / "plain.gz")), "is no genetic map"),
        (dict(RATES=("a",)), "RATES ('a',) must be numbers"),
        (dict(CHAIN_SITES=9), "CHAIN_SITES 9 must be at least 10"),
        (dict(BATCH=0), "BATCH 0 must be at least 1"),
        (dict(IMPUTE="x", OUT=str(tmp_path / "none")), "train first: train_rag_bert.py OUT="),
        (dict(MODEL="x"), "MODEL 'x' is not one of"),
        (dict(K=500, MODEL="bert", STEPS=1), "K 500 is more than the"),
        (dict(CHECK="x"), "CHECK=x scores what IMPUTE= makes"),
        (dict(VERSUS="x"), "VERSUS=x is compared by the truth CHECK="),
        (dict(VALID_SHARE=0.0), "and 0 to validate"),
    ):
        with pytest.raises(common.BadInput) as error:
            train_people(**constants)
        assert message in str(error.value), (constants, str(error.value))


# Chat: supervised fine-tuning.

@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A JSONL of 300 conversations of one to three questions with exact answers, from a small grammar."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    colours, things = ("red", "green", "blue", "grey"), ("box", "ball", "cup", "hat", "pen")
    with open(path, "w") as file:
        for i in range(300):
            turns = [{"role": "system", "content": "Be brief."}] if i % 7 == 0 else []
            for _ in range(rng.integers(1, 4)):
                a, b = colours[rng.integers(4)], things[rng.integers(5)]
                turns += [{"role": "user", "content": f"{i}: say {b} {a}"},
                          {"role": "assistant", "content": f"{a} {b}"}]
            file.write(json.dumps({"conversations": turns, "task": "colour"}) + "\n")
    return path


@pytest.fixture(scope="session")
def base(tokens, tmp_path_factory):
    """A pretrained folder, hardly trained."""
    out = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**TINY, "DATA": str(tokens), "OUT": str(out), "STEPS": 4}.items():
            patch.setattr(train_pretrain, name, value)
        train_pretrain.main()
    return out


@pytest.fixture
def train_chat(train, chats, base):
    """Run train_sft.main() on the small conversations."""
    tiny = dict(DATA=str(chats), INIT=str(base), VALID_SHARE=0.1, SEQ_LEN=0)
    return lambda **constants: train(train_sft, **{**tiny, **constants})


def test_who_trains_in_vain_is_told_that_the_best_is_what_there_was(train_chat, capsys):
    train_chat(STEPS=2, LR=0.0, MUON_LR=0.0)
    assert "/run/best.pt is the model that this run began with" in capsys.readouterr().out
    train_chat(STEPS=20, LR=1e-2, MUON_LR=0.03, RESUME=False)
    assert "began with" not in capsys.readouterr().out


def test_fine_tuning_learns_the_answers(train_chat, chats, tmp_path, monkeypatch):
    found = train_chat(STEPS=150, LR=1e-2, MUON_LR=0.03, SEQ_LEN=128)
    first = common.read_metrics(tmp_path / "run")[0]
    assert found["nats_per_answer_token"] < 0.3 * first["valid_nats_per_answer_token"]
    assert found["exact_match"] > 0.5 and found["exact_of"] > 10          # guessing: 1 of 20
    assert json.loads((tmp_path / "run/config.json").read_text())["sizes"]["seq_len"] == 128
    scored = train_chat(EVAL=str(chats), DTYPE="bfloat16")       # answers in the weights' own precision
    assert scored["exact_match"] > 0.5
    scored = train_chat(EVAL=str(chats))
    assert scored["exact_match"] > 0.5 and json.loads((tmp_path / "run/eval.json").read_text()) == scored
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "5: say hat blue"}]}\n')
    for name, value in dict(CHECKPOINT=str(tmp_path / "run"), PROMPTS=str(questions), ANSWERS=str(answers),
                            DTYPE="float32", MAX_TOKENS=8).items():
        monkeypatch.setattr(serve, name, value)
    serve.main()
    answer = json.loads(answers.read_text())["answer"].split()
    assert len(answer) == 2 and answer[0] in ("red", "green", "blue", "grey")


def test_prompt_tokens_get_no_gradient_and_packed_equals_unpacked(chats, tokenizer, tokens, tmp_path):
    folder = prepare_chats.prepare(chats, tokens / "tokenizer.json", 128, 0.1)
    packed = prepare_chats.Chats(folder, "train", 128)
    model = tiny_lm(vocab_size=tokenizer.get_vocab_size())
    documents = packed.documents(0) + packed.documents(1)
    batch = common.collate([packed.documents(0), packed.documents(1)], 128)
    ids, docs, targets = batch
    assert (docs >= 0).sum() == sum(len(t) - 1 for t, _ in documents)
    assert (targets != common.IGNORE).sum() == sum(int(m[1:].sum()) for _, m in documents)
    loss, count, _ = model(*batch)
    hidden = model.hidden(ids, docs)[0].detach().requires_grad_()
    nats, _ = common.linear_cross_entropy(hidden, model.head_weight, targets)
    nats.backward()
    assert (
        not hidden.grad[targets == common.IGNORE].any()
        and hidden.grad[targets != common.IGNORE].any(-1).all()
    )
    whole = torch.autograd.grad(loss, list(model.parameters()))
    alone = [model(*common.collate([[d]], 128)) for d in documents]
    close(sum(x[0] for x in alone), loss, 1e-9)
    assert sum(int(x[1]) for x in alone) == int(count)
    for a, b in zip(
        torch.autograd.grad(sum(x[0] for x in alone), list(model.parameters())), whole, strict=True
    ):
        close(a, b, 1e-8)


def test_long_conversations_lose_their_oldest_turns_never_their_mask(tokenizer):
    turns = [{"role": "system", "content": "Be kind."}]
    for i in range(9):
        turns += [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    whole, _ = common.render_chat(tokenizer, turns)
    for room in range(20, len(whole) + 1, 7):
        ids, mask, lost = prepare_chats.fit(tokenizer, turns, room)
        if ids:
            left = turns[:1] + turns[1 + lost:]
            assert (ids, mask) == common.render_chat(tokenizer, left) and len(ids) <= room and any(mask)
            assert left[1]["role"] == "user" and left[-1] == turns[-1]
    assert prepare_chats.fit(tokenizer, turns, len(whole))[2] == 0
    assert prepare_chats.fit(tokenizer, turns, 5)[0] == []


def test_unusable_conversations_are_counted_named_and_left_out(chats, tokens, tmp_path, capsys):
    rows = [
        '{"conversations": []}',
        '{"conversations": [{"role": "user", "content": "hi"}]}',
        "{",
        '{"text": 1}',
        '{"conversations": [{"role": "robot", "content": "x"}]}',
        '{"conversations": ["hi"]}',
        '{"conversations": [{"role": "user", "content": "' + "long " * 4000 + '"}, '
        '{"role": "assistant", "content": "x"}]}',
        '{"conversations": [{"role": "assistant", "content": ""}]}',
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(rows) + "\n" + chats.read_text())
    folder = prepare_chats.prepare(path, tokens / "tokenizer.json", 128, 0.1)
    named = (folder / "bad_rows.txt").read_text()
    for line, why in (
        (1, "an empty conversation"),
        (2, "the assistant says nothing"),
        (3, "not JSON"),
        (4, 'no "conversations" list'),
        (5, "a message needs a role"),
        (6, "a turn that is no role"),
        (7, "its last question and answer do not fit into SEQ_LEN 128"),
    ):
        assert f"some.jsonl:{line}: {why}" in named, named
    assert json.loads((folder / "meta.json").read_text())["bad_rows"] == 7
    assert "7 rows left out" in capsys.readouterr().out  # the last: "" and its </s> are fine
    path.write_text(rows[0])
    with pytest.raises(common.BadInput, match="has no usable conversation; first problem: some.jsonl:1"):
        prepare_chats.prepare(path, tokens / "tokenizer.json", 128, 0.1)
    path.write_text(chats.read_text().splitlines()[1])
    with pytest.raises(common.BadInput, match="1 usable conversations: too few to hold out a share of 0.1"):
        prepare_chats.prepare(path, tokens / "tokenizer.json", 128, 0.1)
    path.write_text(chats.read_text())
    prepare_chats.prepare(path, tokens / "tokenizer.json", 50, 0.1)
    assert "conversations lost their oldest turns to fit into SEQ_LEN 50" in capsys.readouterr().out


def test_constants_of_fine_tuning_that_do_not_fit_are_one_sentence(train_chat, chats, tmp_path):
    for constants, message in (
        (dict(VALID_SHARE=0.0), "VALID_SHARE 0.0 leaves nothing to validate on"),
        (dict(VALID_SHARE=1.0), "VALID_SHARE 1.0 leaves nothing to train on"),
        (dict(SCHEDULE="linear"), "SCHEDULE 'linear' is not one of cosine, wsd"),
    ):
        with pytest.raises(common.BadInput) as error:
            train_chat(**constants)
        assert message in str(error.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()               # before the first update
    train_chat(STEPS=1, OUT=str(tmp_path / "one"))
    with pytest.raises(common.BadInput, match="MICRO_BATCH 0 must be at least 1"):
        train_chat(EVAL=str(chats), MICRO_BATCH=0, OUT=str(tmp_path / "one"))


def test_runs_that_prepare_the_same_conversations_at_once_do_not_disturb_each_other(
        chats, tokens, tmp_path, monkeypatch):
    real, arguments = prepare_chats.write, (chats, tokens / "tokenizer.json", 128, 0.1)

    def while_another_does_it_all(*words):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_chats, "write", real)
            patch.setattr(os, "getpid", os.getppid)
            prepare_chats.prepare(*arguments)
        real(*words)
    monkeypatch.setattr(prepare_text, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_chats, "write", while_another_does_it_all)
    folder = prepare_chats.prepare(*arguments)
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert prepare_chats.Chats(folder, "train", 128).count > 0


def test_interrupted_and_two_rank_fine_tuning_equal_the_uninterrupted(train_chat, tmp_path):
    adamw = dict(OPTIMIZER="adamw", DTYPE="float32", EXACT_ROWS=20)
    train_chat(OUT=str(tmp_path / "whole"), **adamw)
    with pytest.raises(SystemExit):
        interrupted(train_chat, 6, **adamw)
    train_chat(**adamw)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    constants = common.load(tmp_path / "whole/checkpoint.pt")["constants"] | {"OUT": str(tmp_path / "two")}
    finish(launch("train_sft.py", *(f"{k}={v}" for k, v in constants.items()), ranks=2))
    same_weights(weights(tmp_path / "two"), weights(tmp_path / "whole"), 2e-5)


def test_a_batch_can_be_looked_at(train_chat, tmp_path, capsys):
    train_chat(SHOW_BATCH=True)
    shown = capsys.readouterr().out.splitlines()
    supervised = [line for line in shown if " loss " in line]
    assert any("'</s>'" in line for line in supervised) and any("'<s>'" in line for line in shown)
    assert 0 < len(supervised) < len(shown) and not (tmp_path / "run").exists()
    assert not any("'<s>'" in line for line in supervised)


def test_poems_are_scored_by_their_form_and_wish(tmp_path, monkeypatch):
    poem, other = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。", "白日依山尽，黄河入海流。"
    moon = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    rows = [("写一首含有“花”字的五言绝句。", poem, poem), ("作五言绝句一首，诗中要有“月”字。", poem, moon),
            ("写一首五言绝句，四句的首字依次是“春处夜花”。", poem, poem),
            ("以《春》为题写一首五言绝句。", other, poem),
            ("请接下一句：白日依山尽", "黄河入海流", "黄河入海流。"),
            ("谁写了《春晓》？开头是“春眠”。", "李白", "孟浩然"),
            ("这首诗属于五言绝句、七言绝句还是五言律诗？", "五言绝句", "五言绝句")]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(
        json.dumps({"question": q, "task": score_poetry.task_of(q), "answer": a, "reference": r}) + "\n"
        for q, a, r in rows))
    monkeypatch.setattr(score_poetry, "ANSWERS", str(path))
    found = score_poetry.main()
    assert found["form"] == {"n": 1, "form": 0.0} and found["acrostic"]["wish"] == 1
    assert found["keyword"] == {"n": 2, "form": 1.0, "wish": 0.5, "another poem": 0.5}
    assert found["acrostic"]["another poem"] == 1
    assert found["next line"]["exact"] == 1 and found["author"]["exact"] == 0
    monkeypatch.setattr(score_poetry, "ANSWERS", "")
    monkeypatch.setattr(score_poetry, "OUT", str(tmp_path / "prompts.jsonl"))
    monkeypatch.setattr(score_poetry, "VALID_SHARE", 0.5)
    monkeypatch.setattr(score_poetry, "DATA", str(tmp_path / "chats.jsonl"))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": f"{q}{i}"}, {"role": "assistant", "content": r}]}) + "\n"
        for i in range(20) for q, _, r in rows[4:]))
    lines = score_poetry.main()
    assert 5 < len(lines) < 35 and all(x["task"] in ("next line", "author") for x in lines)


def test_a_models_own_answers_become_preferences(tmp_path, monkeypatch):
    right, twice = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。", "白日依山尽，黄河入海流。\n" * 2
    short, wish = "白日依山尽。", "写一首含有“花”字的五言绝句。"
    line = "请接下一句：白日依山尽"
    asked = {"以《春》为题写一首五言绝句。": (right, [twice, right, right]),       # a line twice: wrong
             "以《夏》为题写一首五言绝句。": (right, [right, right, right]),       # nothing to learn
             "以《秋》为题写一首五言绝句。": (right, [short, short, short]),       # the reference is chosen
             wish: (right, [right.replace("花", "月"), right, right]),
             line: ("黄河入海流", ["山", "黄河入海流。"])}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": q}, {"role": "assistant", "content": r}]}) + "\n"
        for q, (r, _) in asked.items()))
    for name, value in dict(DATA=str(tmp_path / "chats.jsonl"), OUT=str(tmp_path / "asked.jsonl"), TRAIN=9,
                            SAMPLES=3, VALID_SHARE=0.0).items():
        monkeypatch.setattr(score_poetry, name, value)
    score_poetry.main()
    rows = [json.loads(x) for x in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and [r["question"] for r in rows[:5]] == [r["question"] for r in rows[5:10]]
    tries = {q: iter(answers) for q, (_, answers) in asked.items()}
    rows = [row | {"answer": text} for row in rows if (text := next(tries[row["question"]], None))]
    prepare_chats.write_rows(tmp_path / "tried.jsonl", rows)
    monkeypatch.setattr(score_poetry, "ANSWERS", str(tmp_path / "tried.jsonl"))
    monkeypatch.setattr(score_poetry, "PAIRS", str(tmp_path / "pairs.jsonl.gz"))
    score_poetry.main()
    found, bad = {}, prepare_text.BadRows()
    for row, _ in prepare_chats.rows(tmp_path / "pairs.jsonl.gz", bad, ("chosen", "rejected")):
        assert row["chosen"][0] == row["rejected"][0]
        found[row["chosen"][0]["content"]] = row["chosen"][1]["content"], row["rejected"][1]["content"]
    questions = list(asked)
    assert found == {questions[0]: (right, twice), questions[2]: (right, short),
                     wish: (right, right.replace("花", "月")), line: ("黄河入海流。", "山")}
    monkeypatch.setattr(score_poetry, "ANSWERS", "")
    monkeypatch.setattr(score_poetry, "PAIRS", "")
    monkeypatch.setattr(score_poetry, "ONLY", "keyword,rhyme")
    with pytest.raises(common.BadInput, match="ONLY names 'rhyme'; there are form, keyword"):
        score_poetry.main()
    monkeypatch.setattr(score_poetry, "ONLY", "keyword")
    assert [row["question"] for row in score_poetry.main()] == [wish]
    chosen = []
    for seed in (0, 1, 0):
        for name, value in dict(TRAIN=2, SAMPLES=1, SEED=seed, ONLY="").items():
            monkeypatch.setattr(score_poetry, name, value)
        chosen.append([row["question"] for row in score_poetry.main()])
    assert chosen[0] == chosen[2] != chosen[1]


def test_pairs_teach_only_what_differs_and_is_right(tmp_path, monkeypatch):
    right = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。"
    other = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    wish, line, form = "写一首含有“花”字的五言绝句。", "请接下一句：白日依山尽", "写一首五言绝句。"
    rows = [(line, "next line", "黄河入海流", "黄河入海流。"),
            (line, "next line", "更上一层楼", "黄河入海流"),
            (form, "form", "太短。", "也短。"),                          # the reference is no better
            (wish, "keyword", right, other + "\u2028")]
    rows = [dict(zip(("question", "task", "reference", "answer"), row, strict=True)) for row in rows]
    pairs, counts = score_poetry.pairs_of(rows)
    assert len(pairs) == 1 and pairs[0]["chosen"][1]["content"] == right
    assert pairs[0]["rejected"][1]["content"] == rows[3]["answer"]
    assert counts == {"next line": [1, 2], "form": [0, 1], "keyword": [0, 1]}
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    monkeypatch.setattr(score_poetry, "ANSWERS", str(answers))
    assert score_poetry.main()["next line"]["n"] == 2
    monkeypatch.setattr(score_poetry, "ONLY", "keyword")
    assert set(score_poetry.main()) == {"keyword"}
    for file, only, message in ((answers, "", "name these, and another"), ("pairs.txt", "", "another .jsonl"),
                                ("pairs.jsonl", "form", "gives no pair")):
        monkeypatch.setattr(score_poetry, "PAIRS", str(tmp_path / file))
        monkeypatch.setattr(score_poetry, "ONLY", only)
        with pytest.raises(common.BadInput, match=message):
            score_poetry.main()
    monkeypatch.setattr(score_poetry, "ANSWERS", "")
    with pytest.raises(common.BadInput, match="PAIRS=.* are made of ANSWERS=: name these"):
        score_poetry.main()
    assert score_poetry.task_of("请用花字入诗，写五言绝句。") == ""            # its wish cannot be told
    with pytest.raises(common.BadInput, match="'' is no name of a file"):
        prepare_chats.write_rows("", rows)


def test_poems_that_chats_ask_about_are_written_to_be_known_by_heart(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    characters = [chr(0x4e00 + i) for i in range(3000)]
    poems = [["".join(rng.choice(characters, 5)) for _ in range(8)] for _ in range(60)]
    poems[7][2] = poems[8][2]                                          # a line of two poems
    marked = ["".join(x + mark for x, mark in zip(p, "，。" * 4, strict=True)) for p in poems]
    texts = [f"《{t[:3]}》唐·李{t[0]}\n{t}" for t in marked]
    chats = []
    for p in poems[:50]:
        chats.append((f"“{p[2]}”的下一句是什么？", p[3] + "。"))
        chats.append((f"谁写了《{''.join(p)[:3]}》？开头是“{p[0]}”。", f"李{p[0][0]}"))
    chats.append(("写一首五言绝句。", "".join(poems[55][:4])))           # asks about no poem
    (tmp_path / "poems.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n" for q, a in chats))
    for name, file in dict(DATA="poems.jsonl", CHATS="chats.jsonl", DOCUMENTS="heart.jsonl.gz",
                           QUESTIONS="all.jsonl.gz", FACTS="facts.jsonl.gz", WISHES="wish.jsonl.gz").items():
        monkeypatch.setattr(prepare_poems, name, str(tmp_path / file))
    monkeypatch.setattr(prepare_poems, "VALID_SHARE", 0.1)
    prepare_poems.main()
    heart, rows, facts = ([json.loads(x) for x in gzip.open(tmp_path / name, "rt", encoding="utf-8")]
                          for name in ("heart.jsonl.gz", "all.jsonl.gz", "facts.jsonl.gz"))
    assert facts == [r for r in rows if "绝句" not in r["conversations"][0]["content"]] != rows
    heart, rows = [x["text"] for x in heart], [x["conversations"] for x in rows]
    held = {q for q, _ in chats if prepare_text.held_out(q, 0.1)}
    asked = {n for n in range(50) for q, _ in chats[2 * n:2 * n + 2]
             if q not in held and not (n in (7, 8) and "下一句" in q)}
    assert [t for t in heart if t.startswith("《")] == [texts[n] for n in sorted(asked)]
    assert 40 < len(asked) <= 50
    assert len(heart) == 5 * len(asked) and all(any(t in whole for whole in texts) for t in heart)
    pairs = [(r[0]["content"], r[1]["content"]) for r in rows]
    assert pairs[:len(chats)] == chats
    lines = {line: p[i + 1] for p in poems for i, line in enumerate(p[:-1])}
    for question, answer in (more := pairs[len(chats):]):
        assert not any(f"“{line}”" in question for q in held for line in re.findall("“(.+?)”", q))
        line = re.search("“(.+?)”", question)[1]
        if question.startswith("谁"):
            assert answer == "李" + line[0]
        else:
            assert line != poems[8][2] and answer[:-1] == lines[line] and answer[-1] in "，。"
    assert len(more) > 7 * len(asked)
    monkeypatch.setattr(prepare_poems, "CHATS", str(tmp_path / "none.jsonl"))
    (tmp_path / "none.jsonl").write_text(json.dumps({"conversations": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}))
    with pytest.raises(common.BadInput, match="has not ten questions alike"):
        prepare_poems.main()


def test_more_wishes_are_asked_in_the_chats_words_and_answered_by_poems_not_held_out(monkeypatch):
    rng = np.random.default_rng(1)
    lines = [["".join(rng.choice([chr(0x4e00 + i) for i in range(3000)], 5)) for _ in range(4 + 4 * (i % 2))]
             for i in range(80)]
    lines[26][0], lines[3], lines[5][0] = "一" + lines[26][0][1:], ["二二二二二"] * 8, "二" + lines[5][0][1:]
    poems = ["".join(x + mark for x, mark in zip(p, "，。" * 4, strict=False)) for p in lines]
    texts = [f"《题》唐·李\n{p}" for p in poems] + ["《词》宋·柳\n长短句。\n不齐也不问。"]
    starts = ["".join(x[0] for x in p) for p in lines]
    chats = [(f"写一首五言绝句，首字依次是“{starts[i]}”。", poems[i]) for i in range(0, 20, 2)]
    chats += [(f"写一首含有“{poems[i][2]}”字的五言律诗。", poems[i]) for i in range(1, 20, 2)]
    chats += [("藏头诗五言绝句：请以“甲乙丙丁”起句。", poems[22]), ("写一首五言绝句。", poems[24])]
    chats += [("写一首含有“一”字的五言绝句。", poems[26]), ("请写一首含有“二”字的五言律诗。", poems[5])]
    monkeypatch.setattr(prepare_poems, "VALID_SHARE", 0.3)
    monkeypatch.setattr(prepare_poems.prepare_text, "held_out", lambda q, share, real=prepare_text.held_out:
                        q.startswith("请写") or not re.search("“[一二]”", q) and real(q, share))
    held = [a for q, a in chats if prepare_text.held_out(q, 0.3)]
    assert 3 < len(held) < 12
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    found = prepare_poems.wish_wordings(turns)
    for many, counts in ((20, (10, 10)), (1000, None)):
        monkeypatch.setattr(prepare_poems, "N_WISHES", many)
        rows = [[t["content"] for t in row["conversations"]]
                for row in prepare_poems.wishes(texts, *found, prepare_poems.random.Random(0))]
        kinds = [score_poetry.task_of(q) for q, _ in rows]
        assert not counts or (kinds.count("acrostic"), kinds.count("keyword")) == counts
        assert len({a for _, a in rows}) == len(rows) and {a for _, a in rows} <= set(poems) - set(held)
        for question, poem in rows:
            assert score_poetry.has_form(question, poem) and score_poetry.has_wish(question, poem)
            assert not prepare_text.held_out(question, 0.3) and "甲" not in question
            assert re.fullmatch("写一首(五言绝句，首字依次是“....”|含有“.”字的五言[律绝][诗句])。", question)
            assert "“二”字的五言律" not in question                    # held out in other words
    assert len(rows) > 40 and {"含有" in q for q, _ in rows if "绝句" in q} == {True, False}
    monkeypatch.setattr(prepare_poems, "DATA", "poems")
    monkeypatch.setattr(prepare_poems, "CHATS", "chats")
    monkeypatch.setattr(prepare_poems, "N_WISHES", -5)
    with pytest.raises(common.BadInput, match="N_WISHES -5"):
        prepare_poems.main()


# Preferences.

@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """200 pairs whose chosen answer repeats the question's colour."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    colours = ("red", "green", "blue", "grey")
    with open(path, "w") as file:
        for i in range(200):
            a, b = rng.permutation(4)[:2]
            prompt = [{"role": "user", "content": f"{i}: repeat {colours[a]}"}]
            row = {k: [*prompt, {"role": "assistant", "content": colours[c]}]
                   for k, c in (("chosen", a), ("rejected", b))}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def train_pairs(train, preferences, base):
    """Run train_dpo.main() on the small pairs."""
    tiny = dict(DATA=str(preferences), INIT=str(base), VALID_SHARE=0.2, SEQ_LEN=0, LR=3e-3)
    return lambda **constants: train(train_dpo, **{**tiny, **constants})


def test_preferences_are_learned_from_ln_2_on(train_pairs, chats, tmp_path, preferences):
    found = train_pairs(STEPS=80, SFT=str(chats))
    first = common.read_metrics(tmp_path / "run")[0]
    assert first["valid_loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["valid_margin"]) < 1e-4
    assert found["accuracy"] > 0.8 and found["loss"] < 0.6 and found["margin"] > 0.2
    assert found["sft_nats_per_answer_token"] > 0
    scored = train_pairs(EVAL=str(preferences))
    assert scored["accuracy"] > 0.8 and json.loads((tmp_path / "run/eval.json").read_text()) == scored
    assert (
        train_pairs(AVERAGE=True, SFT_WEIGHT=0.1, OPTIMIZER="muon", OUT=str(tmp_path / "other"))["pairs"] > 20
    )


def test_every_update_reads_a_batch_and_the_weight_of_chosen_answers_adds_their_nats(train_pairs, tmp_path,
                                                                                      monkeypatch):
    real, counts = common.update, []

    def counted(*arguments):
        done = real(*arguments)
        counts.append(done.count)
        return done
    monkeypatch.setattr(common, "update", counted)
    train_pairs(STEPS=7, BATCH=50, MICRO_BATCH=25, SFT_WEIGHT=0.5)                   # of about 157 pairs
    assert counts == [50] * 7
    lines = [line for line in common.read_metrics(tmp_path / "run") if "margin" in line and "lr" in line]
    for line in lines:
        assert line["margin"] == pytest.approx(line["reward_chosen"] - line["reward_rejected"], abs=1e-9)
    nats = common.read_metrics(tmp_path / "run")[0]["valid_nats_per_answer_token"]
    assert lines[0]["loss"] == pytest.approx(math.log(2) + 0.5 * nats, rel=0.1)


def test_what_is_rehearsed_adds_its_nats_and_is_remembered(train_pairs, train_adapter, chats, preferences,
                                                           tmp_path):
    """Beside pairs and beside an adapter; the loss is per answer token, whatever the number of rows."""
    found = {}
    for n in (0, 2, 4):
        train_pairs(STEPS=40, SFT=str(chats), REHEARSE=n, EVAL_EVERY=0, OUT=str(tmp_path / f"{n}"))
        lines = common.read_metrics(tmp_path / f"{n}")
        found[n] = next(x["loss"] for x in lines if "lr" in x), lines[-1]["sft_nats_per_answer_token"]
    start = lines[0]["valid_sft_nats_per_answer_token"]
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-3)
    assert all(found[n][0] == pytest.approx(math.log(2) + start, rel=0.1) for n in (2, 4))
    assert max(found[2][1], found[4][1]) < 0.7 * start and found[4][1] < 0.8 * found[0][1]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"conversations": json.loads(line)["rejected"]}) + "\n"
                             for line in preferences.read_text().splitlines()))
    options = dict(DATA=str(other), STEPS=60, LR=2e-2, RANK=16, ALPHA=32.0, EXACT_ROWS=0, EVAL_EVERY=0)
    forgot, kept = (train_adapter(**options, REHEARSE=n, OUT=str(tmp_path / f"adapter{n}"))
                    ["general_nats_per_answer_token"] for n in (0, 4))
    assert kept < forgot - 0.05                                # adapters of so small a model learn little
    for script in (train_pairs, lambda **c: train_adapter(**c, GENERAL="")):
        with pytest.raises(common.BadInput, match="REHEARSE=4 rows of (SFT|GENERAL), but"):
            script(REHEARSE=4)


def test_more_pairs_are_trained_on_but_never_validated_on(preferences, tokenizer, tmp_path, train_pairs):
    lines = preferences.read_text().splitlines(True)
    (tmp_path / "more.jsonl").write_text("".join(lines[::2]).replace("repeat", "say") + "".join(lines[1::2]))
    alone, both = (train_dpo.Pairs(preferences, tokenizer, 129, more)
                   for more in ("", str(tmp_path / "more.jsonl")))
    (train, valid), (train_both, valid_both) = alone.split(0.2), both.split(0.2)
    assert valid.tolist() == valid_both.tolist() and train_both[:len(train)].tolist() == train.tolist()
    added = train_both[len(train):] - 200
    assert 130 < len(added) < 190 and not set(valid) & {2 * i - 199 for i in added if i >= 100}
    assert alone.fingerprint != both.fingerprint
    start = [train_pairs(MORE=more, STEPS=1, OUT=str(tmp_path / f"run{len(more)}"))["pairs"] for more in
             ("", str(tmp_path / "more.jsonl"))]
    assert start[0] == start[1] == len(valid)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(common.BadInput, match="none.jsonl has no usable pair"):
        train_dpo.Pairs(preferences, tokenizer, 129, str(tmp_path / "none.jsonl"))
    (tmp_path / "some.jsonl").write_text("{}\n" * 1001 + "".join(lines))
    (tmp_path / "none.jsonl").write_text("[]\n")
    with pytest.raises(common.BadInput, match="no usable pair; first problem: .*none.jsonl:1: "):
        train_dpo.Pairs(str(tmp_path / "some.jsonl"), tokenizer, 129, str(tmp_path / "none.jsonl"))
    more = tmp_path / "more.jsonl"
    with pytest.raises(SystemExit):
        interrupted(train_pairs, 3, MORE=str(more), OUT=str(tmp_path / "changed"))
    more.write_text("".join(lines[:90]))
    with pytest.raises(common.BadInput, match="the data .*more.jsonl, .* changed since this run began"):
        train_pairs(MORE=str(more), OUT=str(tmp_path / "changed"))


def test_a_question_stands_once_where_both_answers_fit_its_row(preferences, tokenizer):
    pairs, some = train_dpo.Pairs(preferences, tokenizer, 129), np.arange(12)
    lengths = np.array([[len(ids) - 1 for ids, _ in pairs.pairs[i]] for i in some])
    shared = np.array([train_dpo.in_common(*pairs.pairs[i]) for i in some])
    asked = [mask.argmax() for mask in (pairs.pairs[i][0][1] for i in some)]
    assert shared.tolist() == [n - 1 for n in asked]
    for room, share in ((128, True), ((lengths.sum(1) - shared).max(), True), (lengths.max(), True),
                        (128, False)):
        (ids, docs, targets, branch), place = pairs.batch(some, int(room), "cpu", share)
        fits = shared * (lengths.sum(1) - shared <= room) * share
        assert int((docs >= 0).sum()) == int((lengths.sum(1) - fits).sum()) and docs.shape[1] == room
        found = [(row[targets[r] != common.IGNORE]) for r, row in enumerate(ids)]
        assert sum(map(len, found)) == sum(mask[1:].sum() for i in some for _, mask in pairs.pairs[i])
        first = [(ids[r, docs[r] == d], branch[r, docs[r] == d]) for r in range(len(ids))
                 for d in range(int(docs[r].max()) + 1)]
        for n, i in enumerate(some):
            for side in (0, 1):
                own, after = first[place[n, side]]
                assert after.unique().tolist() == [fits[n] * side]
                assert own.tolist() == pairs.pairs[i][side][0][fits[n] * side:-1].tolist()
    spoilt = [x.copy() for x in pairs.pairs[0][1]]
    spoilt[0][3] += 1                                         # should the questions' tokens ever differ
    assert train_dpo.in_common(pairs.pairs[0][0], spoilt) == 0


def test_preference_loss_and_gradients_equal_the_plain_formula(preferences, tokenizer, monkeypatch):
    """One answer at a time, log-softmax over the whole vocabulary, the formula as in TRL: -logsigmoid(beta ×
    ((chosen - reference chosen) - (rejected - reference rejected)))."""
    pairs = train_dpo.Pairs(preferences, tokenizer, 129)
    model = tiny_lm(vocab_size=tokenizer.get_vocab_size())
    run = common.Run(0, 0, 1, torch.device("cpu"), torch.float64, 0)
    some = np.array([3, 1, 8, 5, 13])
    policy, tokens = train_dpo.log_probabilities(run, model, pairs, some, 128)
    slow = torch.zeros(5, 2, dtype=torch.double)
    for n, i in enumerate(some):
        for side in (0, 1):
            ids, mask = pairs.pairs[i][side]
            ids, mask = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask)
            logs = (model.hidden(ids[None, :-1])[0] @ model.head_weight.T).log_softmax(-1)[0]
            slow[n, side] = logs.gather(1, ids[1:, None])[:, 0][mask[1:]].sum()
            assert tokens[n, side] == mask[1:].sum()
    close(policy, slow, 1e-9)
    reference = torch.randn(5, 2, dtype=torch.double)
    fast, rewards = train_dpo.preference(policy, reference, tokens)
    gap = (slow[:, 0] - reference[:, 0]) - (slow[:, 1] - reference[:, 1])
    plain = -F.logsigmoid(train_dpo.BETA * gap)
    close(fast, plain, 1e-9)
    for a, b in zip(
        *(torch.autograd.grad(x.sum(), list(model.parameters())) for x in (fast, plain)), strict=True
    ):
        close(a, b, 1e-8)
    monkeypatch.setattr(train_dpo, "AVERAGE", True)
    close(
        train_dpo.preference(policy, reference, tokens)[1], train_dpo.BETA * (slow - reference) / tokens, 1e-9
    )


def test_only_the_last_answer_of_a_pair_counts(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "first answer"},
             {"role": "user", "content": "b"}, {"role": "assistant", "content": "second"}]
    ids, mask = common.render_chat(tokenizer, turns)
    kept = train_dpo.last_answer(ids, mask)[1]
    wanted = [*common.encode(tokenizer, "second"), common.EOS]
    assert [i for i, m in zip(ids, kept, strict=True) if m] == wanted
    single = common.render_chat(tokenizer, turns[2:])
    assert train_dpo.last_answer(*single)[1].tolist() == single[1]


def test_interrupted_and_two_rank_alignment_equal_the_uninterrupted(train_pairs, chats, tmp_path):
    options = dict(SFT=str(chats), REHEARSE=4)
    train_pairs(OUT=str(tmp_path / "whole"), **options)
    with pytest.raises(SystemExit):
        interrupted(train_pairs, 6, **options)
    train_pairs(**options)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    constants = common.load(tmp_path / "whole/checkpoint.pt")["constants"] | {"OUT": str(tmp_path / "two")}
    finish(launch("train_dpo.py", *(f"{k}={v}" for k, v in constants.items()), ranks=2))
    same_weights(weights(tmp_path / "two"), weights(tmp_path / "whole"), 1e-4)


def test_unusable_pairs_are_named_or_refused(train_pairs, preferences, tmp_path, capsys):
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    bad = [{"chosen": (turns := rows[0]["chosen"]), "rejected": [turns[0], turns[1] | {"score": 1}]},
           {"chosen": rows[0]["chosen"]},
           {k: v[:1] for k, v in rows[1].items()}, {"chosen": ["x"], "rejected": ["y"]},
           {"chosen": rows[0]["chosen"], "rejected": []}]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, bad + rows)))
    train_pairs(DATA=str(path), STEPS=2)
    shown = capsys.readouterr().out
    for line, why in ((1, "chosen and rejected are the same"), (2, 'no "rejected" list'),
                      (3, "the last turn is not the assistant's"), (4, "a turn that is no role and content"),
                      (5, "the last turn is not the assistant's")):
        assert f"bad.jsonl:{line}: {why}" in shown, shown
    path.write_text("\n".join(map(json.dumps, [*rows, {"chosen": rows[0]["chosen"],
                                                       "rejected": rows[1]["rejected"]}])))
    with pytest.raises(common.BadInput, match="bad.jsonl:201: the prompts of chosen and rejected differ"):
        train_pairs(DATA=str(path))


def test_pairs_that_differ_anywhere_have_other_fingerprints(tokenizer, tmp_path):
    found = []
    for word in ("a", "b"):
        turns = [{"role": "user", "content": "x " * 1000 + word + " x" * 1000}]
        row = {k: [*turns, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        found.append(train_dpo.Pairs(tmp_path / "pairs.jsonl", tokenizer, 10_000).fingerprint)
    assert found[0] != found[1]


def test_a_damaged_reference_is_named(train_pairs, monkeypatch, tmp_path):
    monkeypatch.setattr(train_dpo.prepare_text, "CACHE", str(tmp_path / "cache"))
    train_pairs(STEPS=1)
    path, = (tmp_path / "cache").glob("dpo-*.npy")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(common.BadInput, match="dpo-.*npy is damaged .*; remove it"):
        train_pairs(STEPS=1)


def test_a_machine_without_the_reference_file_gets_it_from_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dpo.prepare_text, "CACHE", str(tmp_path))
    known = np.random.default_rng(0).random((5, 2))
    monkeypatch.setattr(common.Run, "share", lambda run, thing: known)
    run = common.Run(1, 0, 1, torch.device("cpu"), torch.float32, 0)
    found = train_dpo.references(run, None, None, 128, "key")
    assert torch.equal(found, torch.from_numpy(known).float()) and not list(tmp_path.iterdir())


def test_a_reference_of_another_model_is_noticed(train_pairs, monkeypatch):
    real = train_dpo.references
    monkeypatch.setattr(train_dpo, "references", lambda *a: real(*a) + torch.tensor([0.5, 0.0]))
    with pytest.raises(common.BadInput, match="the loss before the first update is .*, not ln 2"):
        train_pairs()


# Export to Hugging Face and back.

def saved_lm(out, tokens, **changes):
    """A folder as training leaves it, of a random model."""
    model = tiny_lm(vocab_size=300, **changes).float()
    out.mkdir(parents=True)
    torch.save({**common.weights_of(model), "step": 3, "metrics": {}}, out / "best.pt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((tokens / name).read_bytes())
    return model


@pytest.mark.parametrize(
    "changes, yarn",
    [
        ({}, 1.0),
        (dict(tied=False), 1.0),
        (dict(qk_norm=False), 1.0),
        ({}, 4.0),
        (dict(n_experts=4, n_shared=0), 1.0),
        (dict(n_experts=4, n_shared=0, tied=False), 4.0),
    ],
    ids=["dense", "untied", "llama", "yarn", "moe", "moe-yarn"],
)
def test_exported_models_give_our_logits_and_come_back(tokens, tmp_path, monkeypatch, changes, yarn):
    transformers = pytest.importorskip("transformers")
    ours = saved_lm(tmp_path / "run", tokens, **changes)
    for name, value in dict(CHECKPOINT=str(tmp_path / "run"), OUT=str(tmp_path / "hf"), YARN=yarn).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    ours = common.build(common.load(tmp_path / "run/best.pt"), **({"yarn": yarn} if yarn != 1 else {})).eval()
    ids = torch.randint(0, 300, (2, int(100 * yarn)))
    with torch.no_grad():
        close(ours.hidden(ids)[0] @ ours.head_weight.T, theirs(ids).logits, 1e-4)
    for name, value in dict(IMPORT=str(tmp_path / "hf"), OUT=str(tmp_path / "back")).items():
        monkeypatch.setattr(export, name, value)
    with contextlib.suppress(common.BadInput):                              # 300 tokens, another tokenizer
        export.main()
    back = export.load_folder(tmp_path / "hf")
    same_weights(back["model"], common.load(tmp_path / "run/best.pt")["model"])
    with torch.no_grad():
        assert torch.equal(common.build(back).eval().hidden(ids)[0], ours.hidden(ids)[0])    # YaRN, too


def test_an_exported_folder_is_read_back_and_trained_on(base, train_chat, tmp_path, monkeypatch):
    for name, value in dict(CHECKPOINT=str(base), OUT=str(tmp_path / "hf")).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    for name, value in dict(IMPORT=str(tmp_path / "hf"), OUT=str(tmp_path / "back")).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    same_weights(weights(tmp_path / "back", "best.pt"), weights(base, "best.pt"))
    assert train_chat(INIT=str(tmp_path / "back"), STEPS=2)["answer_tokens"] > 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "hi </s>\n你好"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert text.endswith("<s>assistant\n")
    assert (generation["eos_token_id"], generation["temperature"]) == (2, 0.8)


def test_a_folder_with_chatml_names_and_a_padded_vocabulary_is_trained_on(
    base, train_chat, tmp_path, monkeypatch
):
    """As SmolLM2 and MiniMind are: other names for the three special tokens, more added tokens, rows that
    are no tokens."""
    transformers = pytest.importorskip("transformers")
    for name, value in dict(CHECKPOINT=str(base), OUT=str(tmp_path / "hf")).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    told = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    n = len(told["model"]["vocab"])
    for old, new in zip(common.SPECIAL, common.CHATML, strict=True):
        told["model"]["vocab"][new] = told["model"]["vocab"].pop(old)
    for token, new in zip(told["added_tokens"], common.CHATML, strict=True):
        token["content"] = new
    told["added_tokens"].append({**told["added_tokens"][0], "id": n, "content": "<tool 工具>"})
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(told))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.resize_token_embeddings(n + 9, mean_resizing=False)
    model.save_pretrained(tmp_path / "hf")
    for name, value in dict(IMPORT=str(tmp_path / "hf"), OUT=str(tmp_path / "back")).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    ours = common.build(common.load(tmp_path / "back/best.pt")).eval()
    ids = torch.randint(3, n, (2, 9))
    with torch.no_grad():
        close(ours.hidden(ids)[0] @ ours.head_weight.T, model(ids).logits[..., :n + 1], 1e-4)
    table = common.token_bytes(common.load_tokenizer(tmp_path / "back/tokenizer.json"))
    assert table[:3] == [b""] * 3 and table[n] == "<tool 工具>".encode() and len(table) == n + 1
    assert train_chat(INIT=str(tmp_path / "back"), OUT=str(tmp_path / "chat"), STEPS=2)["answer_tokens"] > 0
    changes = dict(IMPORT="", CHECKPOINT=str(tmp_path / "chat"), OUT=str(tmp_path / "again"))
    for name, value in changes.items():
        monkeypatch.setattr(export, name, value)
    export.main()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "what is it"}]
    rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = common.render_chat(common.load_tokenizer(tmp_path / "again/tokenizer.json"), messages)
    assert (rendered["input_ids"], rendered["assistant_masks"]) == (ids, [int(m) for m in mask])
    assert theirs.eos_token == "<|im_end|>" and "<|im_start|>user" in theirs.decode(ids)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attention="nsa"), "ATTENTION=nsa has no standard class"),
        (dict(n_experts=4), "N_SHARED=1 shared experts"),
        (dict(attention="window", sparse={"window": 8}), "ATTENTION=window has no standard class"),
        (dict(n_before=2), "N_BEFORE=2, embeddings of earlier tokens, has no standard class"),
        (dict(n_experts=4, n_shared=0, qk_norm=False), "experts without QK_NORM"),
    ],
)
def test_what_no_standard_class_holds_is_refused(tokens, tmp_path, monkeypatch, changes, message):
    saved_lm(tmp_path / "run", tokens, **changes)
    for name, value in dict(CHECKPOINT=str(tmp_path / "run"), OUT=str(tmp_path / "hf")).items():
        monkeypatch.setattr(export, name, value)
    with pytest.raises(common.BadInput) as error:
        export.main()
    assert message in str(error.value) and not (tmp_path / "hf").exists()


def test_folders_that_are_no_such_model_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHECKPOINT", str(base))
    monkeypatch.setattr(export, "OUT", str(tmp_path / "hf"))
    export.main()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "holds a gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"num_hidden_layers": 3}, "does not fit its config.json: missing"),
        ({"intermediate_size": 7}, "config.json asks for"),
        ({"use_sliding_window": True}, "has use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8}}, "has a YaRN of its own"),
    ):
        (tmp_path / "hf/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(common.BadInput) as error:
            export.load_folder(tmp_path / "hf")
        assert message in str(error.value)
    for text, message in (("{}", "holds a None"), ("{", "cannot be read as JSON"), ("[]", "no JSON object"),
                          ('{"model_type": "qwen3"}', "config.json lacks 'num_attention_heads'")):
        (tmp_path / "hf/config.json").write_text(text)
        with pytest.raises(common.BadInput, match=message):
            export.load_folder(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(export, "IMPORT", str(tmp_path / "hf"))
    with pytest.raises(common.BadInput, match="is the folder to read; choose another OUT"):
        export.main()
    (tmp_path / "hf/model.safetensors").write_bytes(b"\x99" * 100)
    with pytest.raises(common.BadInput, match="cannot be read as safetensors"):
        export.load_folder(tmp_path / "hf")
    with pytest.raises(common.BadInput, match="has no config.json"):
        export.load_folder(tmp_path)


def test_an_export_writes_over_no_run_and_names_a_missing_tokenizer(tokens, tmp_path, monkeypatch, capsys):
    saved_lm(tmp_path / "run", tokens)
    monkeypatch.setattr(export, "CHECKPOINT", str(tmp_path / "run"))
    monkeypatch.setattr(export, "OUT", str(tmp_path / "run"))
    with pytest.raises(common.BadInput, match="holds a run, whose config.json and weights"):
        export.main()
    assert not (tmp_path / "run/config.json").exists()
    (tmp_path / "run/tokenizer.json").unlink()
    monkeypatch.setattr(export, "OUT", str(tmp_path / "hf"))
    export.main()
    assert f"no tokenizer: {tmp_path}/run has none" in capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "OUT", str(tmp_path / "file"))
    with pytest.raises(common.BadInput, match="cannot write to OUT="):
        export.main()


# Low-rank adapters.

def adapted(model, **changes):
    """The model with adapters that are not zero."""
    options = dict(targets=common.LORA_TARGETS, rank=3, alpha=6.0, dropout=0.0, rslora=False) | changes
    names = common.add_lora(model, *options.values())
    for name in names:
        torch.nn.init.normal_(model.get_submodule(name).B, std=0.1)
    return model, names, options


def test_an_adapter_starts_as_the_identity_and_leaves_the_base_alone():
    ids, plain = torch.randint(0, 300, (2, 20)), tiny_lm()
    model = tiny_lm()
    names = common.add_lora(model, ("q", "down"), 4, 8.0, dropout=0.5)
    assert names == [f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.q", "mlp.down")]
    assert torch.equal(model.hidden(ids)[0], plain.hidden(ids)[0])
    loss, _, _ = model(ids, torch.zeros_like(ids), ids)
    loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.endswith((".A", ".B")) for n in trained) and len(trained) == 2 * len(names)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert all(model.get_submodule(n).B.grad.abs().max() > 0 for n in names)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_adapter_and_merging_twice_is_refused(tmp_path, rslora):
    ids = torch.randint(0, 300, (2, 30))
    model, _, options = adapted(tiny_lm(), rslora=rslora)
    wanted = model.hidden(ids)[0]
    common.save_adapter(tmp_path, model, "base", *list(options.values())[1:])
    again = common.load_adapter(tiny_lm(), tmp_path)                        # weights are saved in float32
    close(again.hidden(ids)[0], wanted, 1e-5)
    merged = common.merge_lora(model)
    close(merged.hidden(ids)[0], wanted, 1e-9)
    assert merged.state_dict().keys() == tiny_lm().state_dict().keys()
    with pytest.raises(common.BadInput, match="there is no adapter to merge; was it merged already"):
        common.merge_lora(merged)
    with pytest.raises(common.BadInput, match="the model has an adapter already"):
        common.add_lora(adapted(tiny_lm())[0], ("q",), 2, 2.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_adapter_and_we_load_pefts(tokens, tmp_path, monkeypatch, rslora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    saved_lm(tmp_path / "run", tokens)
    for name, value in dict(CHECKPOINT=str(tmp_path / "run"), OUT=str(tmp_path / "hf"), YARN=1.0).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    found = common.load(tmp_path / "run/best.pt")
    ours, _, options = adapted(common.build(found), rslora=rslora)
    common.save_adapter(tmp_path / "adapter", ours, str(tmp_path / "hf"), *list(options.values())[1:])
    ids = torch.randint(0, 300, (2, 40))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        close(ours.eval().hidden(ids)[0] @ ours.head_weight.T, theirs(ids).logits, 1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "up_proj"], use_rslora=rslora,
                             task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = common.load_adapter(common.build(found), tmp_path / "theirs").eval()
    with torch.no_grad():
        close(ours.hidden(ids)[0] @ ours.head_weight.T, theirs(ids).logits, 1e-4)
    (tmp_path / "theirs/adapter_config.json").unlink()
    with pytest.raises(common.BadInput, match="has no adapter_config.json"):
        common.load_adapter(common.build(found), tmp_path / "theirs")


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model, _, options = adapted(tiny_lm())
    common.save_adapter(tmp_path, model, "base", *list(options.values())[1:])
    with pytest.raises(common.BadInput, match="an adapter for other sizes"):
        common.load_adapter(tiny_lm(dim=48, n_heads=4), tmp_path)
    with pytest.raises(common.BadInput, match="0 of .* tensors fit|of .* tensors fit the model; unknown"):
        common.load_adapter(tiny_lm(n_layers=1), tmp_path)
    with pytest.raises(common.BadInput, match="must be some of q, k, v"):
        common.add_lora(tiny_lm(), ("x",), 2, 2.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"alpha_pattern": {"q_proj": 64}}, {"rank_pattern": {"q_proj": 2}}, {"use_dora": True},
                   {"init_lora_weights": "pissa"}, {"bias": "all"}, {"peft_type": "IA3"}):  # other numbers
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(common.BadInput, match="is not of a plain LoRA adapter") as error:
            common.load_adapter(tiny_lm(), tmp_path)
        assert str(change) in str(error.value)
    for text, message in (("{", "cannot be read as JSON"), ('{"peft_type": "LORA"}', "lacks r, lora_alpha")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(common.BadInput, match=message):
            common.load_adapter(tiny_lm(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x99" * 100)
    with pytest.raises(common.BadInput, match="cannot be read as safetensors"):
        common.load_adapter(tiny_lm(), tmp_path)


@pytest.fixture
def train_adapter(train, chats, base):
    """Run train_lora.main() on the small conversations."""
    tiny = dict(
        DATA=str(chats), GENERAL=str(chats), INIT=str(base), VALID_SHARE=0.1, SEQ_LEN=0, EXACT_ROWS=20
    )
    return lambda **constants: train(train_lora, **{**tiny, **constants})


def test_an_adapter_learns_and_is_served(train_adapter, base, tmp_path, monkeypatch):
    found = train_adapter(STEPS=100, LR=2e-2, RANK=16, ALPHA=32.0)
    assert found["nats_per_answer_token"] < 0.95 * found["before_nats_per_answer_token"]
    assert found["general_nats_per_answer_token"] < found["general_before_nats_per_answer_token"]
    whole = sum(w.numel() for w in weights(base, "best.pt").values())
    assert found["trained_parameters"] < found["parameters"] == whole
    assert found["full_memory_mib"] == pytest.approx(16 * whole / 2**20)
    assert found["memory_mib"] == pytest.approx((4 * whole + 16 * found["trained_parameters"]) / 2**20)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "5: say hat blue"}]}\n')
    answers = []
    for model, adapter in ((tmp_path / "run", ""), (base, str(tmp_path / "run"))):  # merged, beside the base
        for name, value in dict(
            CHECKPOINT=str(model),
            ADAPTER=adapter,
            PROMPTS=str(questions),
            DTYPE="float32",
            ANSWERS=str(tmp_path / "a.jsonl"),
            MAX_TOKENS=6,
        ).items():
            monkeypatch.setattr(serve, name, value)
        serve.main()
        answers.append((tmp_path / "a.jsonl").read_text())
    assert answers[0] == answers[1]


def test_interrupted_and_two_rank_adapters_equal_the_uninterrupted(train_adapter, tmp_path):
    options = dict(DROPOUT=0.1, BASE_DTYPE="bfloat16")
    train_adapter(OUT=str(tmp_path / "whole"), **options)
    with pytest.raises(SystemExit):
        interrupted(train_adapter, 6, **options)
    train_adapter(**options)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    frozen = [w for name, w in weights(tmp_path / "run").items() if name.endswith(".base.weight")]
    assert frozen and all(torch.equal(w, w.bfloat16().float()) for w in frozen)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    train_adapter(OUT=str(tmp_path / "plain"), REHEARSE=2)
    constants = common.load(tmp_path / "plain/checkpoint.pt")["constants"] | {"OUT": str(tmp_path / "two")}
    finish(launch("train_lora.py", *(f"{k}={v}" for k, v in constants.items()), ranks=2))
    same_weights(weights(tmp_path / "two"), weights(tmp_path / "plain"), 1e-4)


def test_an_adapter_is_trained_by_machines_that_do_not_see_each_others_folders(chats, base, tmp_path):
    constants = {k: v for k, v in TINY.items() if hasattr(train_lora, k)} | dict(
        DATA=chats, GENERAL=chats, INIT=base, VALID_SHARE=0.1, SEQ_LEN=0, EXACT_ROWS=4, STEPS=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    words = [f"{k}={v}" for k, v in constants.items()]
    processes = [launch("train_lora.py", *words, f"OUT={tmp_path / str(n)}",
                        env=os.environ | there | {"RANK": str(n)}) for n in (0, 1)]
    assert ["done: " in finish(process) for process in processes] == [True, False]
    assert (tmp_path / "0/best.pt").exists() and not (tmp_path / "1").exists()


def test_adapters_are_scored_on_unseen_conversations(train_adapter, chats, tmp_path):
    train_adapter(STEPS=4)
    scored = train_adapter(EVAL=str(chats))
    assert scored["answer_tokens"] > 100 and json.loads((tmp_path / "run/eval.json").read_text()) == scored
    with pytest.raises(common.BadInput, match="has no adapter_config.json; train one first"):
        train_adapter(EVAL=str(chats), OUT=str(tmp_path / "none"))
    config = tmp_path / "run/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(common.BadInput, match="does not name its base"):
        train_adapter(EVAL=str(chats))


def test_a_checkpoint_with_an_adapter_beside_its_base_is_no_model(train_adapter, tmp_path, monkeypatch):
    train_adapter(STEPS=1, MERGE=False)
    monkeypatch.setattr(export, "CHECKPOINT", str(tmp_path / "run"))
    monkeypatch.setattr(export, "OUT", str(tmp_path / "hf"))
    for use in (export.main, lambda: train_adapter(INIT=str(tmp_path / "run"), OUT=str(tmp_path / "next"))):
        with pytest.raises(common.BadInput, match="an adapter beside its base; name the base"):
            use()
    assert not (tmp_path / "hf").exists()


def test_an_adapter_is_not_put_on_what_holds_it_merged(train_adapter, tmp_path, monkeypatch):
    train_adapter(STEPS=1)
    monkeypatch.setattr(serve, "CHECKPOINT", str(tmp_path / "run"))
    monkeypatch.setattr(serve, "ADAPTER", str(tmp_path / "run"))
    with pytest.raises(common.BadInput, match="merged already; leave ADAPTER out"):
        serve.load()


# Distillation.

@pytest.mark.parametrize("alpha, temperature", [(0.3, 2.0), (1.0, 2.0), (0.0, 1.0), (0.5, 0.7)])
def test_distilled_loss_and_gradients_equal_the_plain_formula(alpha, temperature):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (700, 6400))
    known, head = torch.randn(700, 12, dtype=torch.double), torch.randn(6400, 12, dtype=torch.double)
    targets = torch.randint(0, 6400, (700,))                                # several chunks
    fast = train_distill.Distilled.apply(hidden, weight, known, head, targets, alpha, temperature)
    student, teacher = hidden @ weight.T, known @ head.T
    kl = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="sum"
    )
    slow = alpha * F.cross_entropy(student, targets, reduction="sum") + (1 - alpha) * temperature ** 2 * kl
    close(fast, slow, 1e-9)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (fast, slow)), strict=True):
        close(a, b, 1e-8)


def test_experts_of_a_student_are_balanced(monkeypatch):
    model = train_distill.Student(tiny_lm(n_experts=4).float())
    ids = torch.randint(0, 300, (2, 20))
    batch = ids, torch.zeros_like(ids), ids, (torch.randn(2, 20, 8), torch.randn(300, 8))
    balance = model.model.hidden(*batch[:2])[1]
    losses = []
    for weight in (0.0, 0.5):
        monkeypatch.setattr(train_distill, "AUX_LOSS_ALPHA", weight)
        losses.append(model(*batch)[0])
    close(losses[1] - losses[0], 0.5 * balance, 1e-3)


@pytest.fixture(scope="session")
def doubtful(tmp_path_factory):
    """Conversations whose answers are drawn: 400 for the teacher, 40 for the student, 100 to judge."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("doubtful")
    for name, count in (("many", 400), ("few", 40), ("unseen", 100)):
        rows = [
            {
                "conversations": [
                    {"role": "user", "content": f"{name} {i}: draw"},
                    {"role": "assistant", "content": " ".join(rng.choice(["red", "blue", "grey"], 4))},
                ]
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def teacher(base, doubtful, tmp_path_factory):
    """A folder fine-tuned on many of these conversations."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**TINY, "DATA": str(doubtful / "many.jsonl"), "INIT": str(base), "OUT": str(out),
                            "VALID": str(doubtful / "unseen.jsonl"), "STEPS": 80, "LR": 1e-2, "MUON_LR": 0.03,
                            "SEQ_LEN": 128, "EXACT_ROWS": 0}.items():
            if hasattr(train_sft, name):
                patch.setattr(train_sft, name, value)
        train_sft.main()
    return out


@pytest.fixture
def distil(train, doubtful, teacher):
    """Run train_distill.main() on few of these conversations."""
    tiny = dict(
        DATA=str(doubtful / "few.jsonl"),
        VALID=str(doubtful / "unseen.jsonl"),
        TEACHER=str(teacher),
        SEQ_LEN=128,
        EXACT_ROWS=0,
        DIM=24,
        N_LAYERS=1,
        N_HEADS=2,
        N_KV_HEADS=1,
        LR=5e-3,
        BATCH=2,
        MICRO_BATCH=1,
    )
    return lambda **constants: train(train_distill, **{**tiny, **constants})


def test_a_student_learns_more_with_its_teacher(distil, doubtful, tmp_path):
    taught = distil(STEPS=150)
    alone = distil(STEPS=150, ALPHA=1.0, OUT=str(tmp_path / "alone"))
    assert taught["nats_per_answer_token"] < alone["nats_per_answer_token"] - 0.01
    assert common.load(tmp_path / "run/best.pt")["sizes"]["dim"] == 24
    scored = distil(EVAL=str(doubtful / "unseen.jsonl"))
    assert json.loads((tmp_path / "run/eval.json").read_text()) == scored
    again = distil(INIT=str(tmp_path / "alone"), STEPS=2, OUT=str(tmp_path / "more"), TEACHER_DTYPE="float32")
    assert again["nats_per_answer_token"] < alone["nats_per_answer_token"] + 0.5


def test_the_teacher_is_held_in_the_dtype_that_was_asked_for(distil, monkeypatch):
    real, held = train_distill.Student.forward, set()

    def watched(student, ids, docs, targets, teacher):
        held.update(part.dtype for part in teacher)
        return real(student, ids, docs, targets, teacher)
    monkeypatch.setattr(train_distill.Student, "forward", watched)
    distil(STEPS=1, TEACHER_DTYPE="bfloat16")
    assert held == {torch.bfloat16}


def test_a_mixture_of_experts_teaches_a_dense_student(distil, train, tmp_path):
    train(N_EXPERTS=4, STEPS=3, OUT=str(tmp_path / "experts"))
    found = distil(TEACHER=str(tmp_path / "experts"), STEPS=3)
    student = common.load(tmp_path / "run/best.pt")["sizes"]
    assert math.isfinite(found["nats_per_answer_token"]) and (student["n_experts"], student["dim"]) == (0, 24)


def test_interrupted_and_two_rank_distillation_equal_the_uninterrupted(distil, tmp_path):
    adamw = dict(OPTIMIZER="adamw", TEACHER_DTYPE="float32")
    distil(OUT=str(tmp_path / "whole"), **adamw)
    with pytest.raises(SystemExit):
        interrupted(distil, 6, **adamw)
    distil(**adamw)
    same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    constants = common.load(tmp_path / "whole/checkpoint.pt")["constants"] | {"OUT": str(tmp_path / "two")}
    finish(launch("train_distill.py", *(f"{k}={v}" for k, v in constants.items()), ranks=2))
    same_weights(weights(tmp_path / "two"), weights(tmp_path / "whole"), 1e-4)


def test_bench_twin_is_the_same_model(tokens):
    """The baseline computes what ours does, or the ratio would mean nothing."""
    ours, twin = tiny_lm(qk_norm=False).float(), bench.Twin(300, 32, 2, 4, 2, 128)
    twin.load_state_dict(
        {
            **{k.replace(".attention.", "."): v for k, v in ours.state_dict().items()},
            "rope": twin.rope,
            "head.weight": ours.head_weight,
        }
    )
    for norm in (twin.norm, *(n for layer in twin.layers for n in (layer.norm_attn, layer.norm_mlp))):
        norm.eps = 1e-6
    ids, targets = torch.randint(0, 300, (2, 60)), torch.randint(0, 300, (2, 60))
    loss, count, _ = ours(ids, torch.zeros_like(ids), targets)
    close(loss / count, twin(ids, None, targets)[0], 1e-5)


def test_bench_lists_itself():
    assert "useful tokens" in finish(launch("bench.py"))


# On a GPU only.

@gpu
@pytest.mark.parametrize("share", [False, True])
def test_flex_attention_equals_the_twin_with_gradients(share):
    docs, shared, keep = (x.cuda() for x in branches(256))
    if not share:
        docs, shared = random_documents(3, 256, 30).cuda(), None
        keep = (docs[:, None, :, None] == docs[:, None, None]).tril()
    q, k, v = (torch.randn(3, h, 256, 64, device="cuda", requires_grad=True) for h in (8, 2, 2))
    real = (docs >= 0)[:, None, :, None]
    fast = common.attend_documents(q, k, v, common.Documents(docs, shared)) * real
    slow = common.attend(q, k, v, keep | ~real) * real
    close(fast, slow, 2e-3)
    for a, b in zip(
        torch.autograd.grad(fast.square().sum(), (q, k, v)),
        torch.autograd.grad(slow.square().sum(), (q, k, v)),
        strict=True,
    ):
        close(a, b, 2e-2)


@gpu
def test_bfloat16_on_a_gpu_learns_like_float32(train, tmp_path):
    losses = [
        train(OUT=str(tmp_path / d), DTYPE=d, STEPS=40)["nats_per_token"] for d in ("bfloat16", "float32")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


# --- faults: what is killed, cut, filled, unplugged or damaged, and goes on to the same bits

@pytest.fixture(scope="module")
def fault_folder(tmp_path_factory):
    """Tiny data for bench.FAULT_WORDS, without muons."""
    folder = tmp_path_factory.mktemp("faults")
    bench.fault_data(folder, muons=False)
    return folder


def test_every_training_script_is_in_the_fault_benchmark():
    assert set(bench.FAULT_WORDS) == {p.name for p in ROOT.glob("train_*.py")}


@pytest.mark.parametrize("script, ranks, kills, more", [
    ("train_pretrain.py", 1, 3, "WANDB=offline"), ("train_nsa_enwik8.py", 2, 2, "")])
def test_killed_runs_end_with_the_same_bits(fault_folder, script, ranks, kills, more):
    words = bench.fault_words(script, fault_folder, more)
    folder = fault_folder / f"{script}-{ranks}"
    folder.mkdir()
    seconds = bench.run_to_end(script, words, folder / "whole", ranks)
    for seed in range(4):                                # a busy machine may miss the moment of a write
        found = bench.survive(script, words, folder, ranks, kills, np.random.default_rng(seed), seconds)
        if found["kills"]:
            break
    assert found["kills"] and not found["differs"] and found["steps_lost"] <= 3, found


def test_the_fault_benchmark_notices_what_differs(train, tmp_path):
    for name in ("whole", "other"):
        train(OUT=str(tmp_path / name))
    assert not bench.difference(tmp_path / "whole", tmp_path / "other")
    lines = (tmp_path / "other/metrics.jsonl").read_text().splitlines(True)
    (tmp_path / "other/metrics.jsonl").write_text("".join([*lines, lines[0]]))
    found = common.load(tmp_path / "other/best.pt")
    found["model"]["norm.weight"][0] += 1e-6
    torch.save(found, tmp_path / "other/best.pt")
    wrong = bench.difference(tmp_path / "whole", tmp_path / "other")
    assert "metrics.jsonl" in wrong and "best.pt" in wrong and "order of steps" in wrong


def test_a_forwarded_stop_signal_is_not_asking_twice(train, tmp_path, monkeypatch):
    real = common.update

    def update(run, *rest):
        if rest[-1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *rest)
    monkeypatch.setattr(common, "update", update)
    with pytest.raises(SystemExit):
        train()
    assert common.load(tmp_path / "run/checkpoint.pt")["step"] == 4
    monkeypatch.setattr(common, "SECOND_SIGNAL", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(RESUME=False)


@pytest.fixture(scope="module")
def two_ranks(fault_folder):
    """Words of a language model and its folder after an uninterrupted run on two processes."""
    more = "DROPOUT=0.0 SAMPLE_EVERY=0 OPTIMIZER=adamw LR=1e-3 BATCH=8 STEPS=24 EVAL_EVERY=12"
    words = bench.fault_words("train_pretrain.py", fault_folder, more)
    bench.run_to_end("train_pretrain.py", words, fault_folder / "two", 2)
    return words, fault_folder / "two"


def struck_after(process, out, step, strike):
    """Call `strike` when the metrics have come to this step; returns what the process said in the end."""
    while bench.last_step(out) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    strike()
    return process.communicate(timeout=120)[0]


def test_a_run_of_two_processes_is_stopped_and_goes_on_with_one_and_with_four(two_ranks, tmp_path):
    words, whole = two_ranks
    process = launch("train_pretrain.py", *words, f"OUT={tmp_path}/one", ranks=2)
    said = struck_after(process, tmp_path / "one", 7, lambda: process.send_signal(signal.SIGTERM))
    assert "SIGTERM: stopped after step" in said and "rerun the same command" in said, said
    assert common.load(tmp_path / "one/checkpoint.pt")["step"] == bench.last_step(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    for name, ranks in (("one", 0), ("four", 4)):
        assert "going on from step" in finish(
            launch("train_pretrain.py", *words, f"OUT={tmp_path}/{name}", ranks=ranks))
        same_weights(weights(tmp_path / name), weights(whole), 1e-5)


def test_torchrun_restarts_a_job_that_lost_a_process_by_itself(two_ranks, tmp_path):
    words, whole = two_ranks
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    process = launch(*runner, "train_pretrain.py", *words, f"OUT={tmp_path}/run")

    def kill_rank_1():
        for pid in bench.processes_of(tmp_path / "run"):
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
    said = struck_after(process, tmp_path / "run", 7, kill_rank_1)
    assert process.returncode == 0 and "going on from step" in said, said
    assert "error: train_pretrain.py: another process has ended" in said
    assert not bench.difference(whole, tmp_path / "run")


def test_a_mirror_still_held_by_a_killed_run_is_waited_for(train, tmp_path, monkeypatch):
    wandb, asked = pytest.importorskip("wandb"), []
    real = wandb.init

    def init(**words):
        asked.append(words["id"])
        if len(asked) < 4:
            raise RuntimeError(f"run ID {words['id']} is in use")
        return real(**words)
    monkeypatch.setattr(wandb, "init", init)
    train(WANDB="offline", STEPS=2, OUT=str(tmp_path / "run"))
    assert len(asked) == 4 and len(set(asked[:3])) == 1 and asked[3] != asked[0]  # waited, then another
    monkeypatch.setattr(wandb, "init", lambda **words: 1 / 0)
    with pytest.raises(common.BadInput, match="WANDB=offline could not begin .*division by zero"):
        train(WANDB="offline", STEPS=2, OUT=str(tmp_path / "other"))


def test_a_restart_after_the_end_does_not_train_again(train, tmp_path, monkeypatch, capsys):
    train()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as end:
        train()
    assert end.value.code == 0 and "finished already" in capsys.readouterr().out
    assert not (tmp_path / "run~1").exists()


def test_a_peer_that_falls_silent_ends_the_run_in_time_and_one_that_prepares_data_does_not(tmp_path):
    """Process 1 comes late to a patient wait, then stops answering."""
    (tmp_path / "peer.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import common
common.PEER_TIMEOUT = 3
def main():
    run = common.start(0, "float32")
    if run.rank:
        time.sleep(4)
    run.wait(patiently=True)
    print("prepared", flush=True)
    if run.rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    run.wait()
common.cli(globals(), main)
""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [subprocess.Popen([sys.executable, tmp_path / "peer.py"], env=world | {"RANK": str(r)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in (0, 1)]
    try:
        said = ranks[0].communicate(timeout=60)[0]
    finally:
        ranks[1].kill()
    assert ranks[0].returncode == 1 and "prepared" in said, said
    assert "another process has ended, or did not answer for 3 s" in said and "Traceback" not in said, said


def test_sharded_training_equals_ddp_and_goes_on_with_any_number_of_processes(two_ranks, tmp_path):
    words, whole = two_ranks
    process = launch("train_pretrain.py", *words, "SHARD=True", f"OUT={tmp_path}/one", ranks=2)
    said = struck_after(process, tmp_path / "one", 7, lambda: process.send_signal(signal.SIGTERM))
    assert "SIGTERM: stopped after step" in said, said
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    finish(launch("train_pretrain.py", *words, f"OUT={tmp_path}/one"))                # not sharded any more
    words = [*words, "SHARD=True", "SAMPLE_EVERY=23"]
    finish(launch("train_pretrain.py", *words, f"OUT={tmp_path}/four", ranks=4))
    for name in ("one", "four"):
        same_weights(weights(tmp_path / name), weights(whole), 1e-5)
        for a, b in zip(*(common.load(p / "checkpoint.pt")["optimizers"][0]["state"].values()
                          for p in (tmp_path / name, whole)), strict=True):
            same_weights(a, b, 1e-5)
    best = common.build(common.load(tmp_path / "four/best.pt")).state_dict()
    same_weights(best, weights(whole, "best.pt"), 1e-5)
    sizes = {(folder / "model.safetensors").stat().st_size for folder in (whole, tmp_path / "four")}
    assert len(sizes) == 1 and len((tmp_path / "four/samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("constants", [dict(OPTIMIZER="muon"), dict(OPTIMIZER="adamw", MODEL="classic"),
                                       dict(OPTIMIZER="adamw", DTYPE="float16")])
def test_what_cannot_be_sharded_is_refused(train, constants):
    with pytest.raises(common.BadInput, match="SHARD=True needs OPTIMIZER=adamw"):
        train(SHARD=True, **constants)


def test_records_torn_by_a_crash_are_taken_back_to_whole_lines(train, tmp_path):
    constants = dict(SAMPLE_EVERY=2, SAMPLE_PROMPT="the \u2028 月 \x85")
    train(OUT=str(tmp_path / "whole"), **constants)
    with pytest.raises(SystemExit):
        interrupted(train, 6, **constants)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b'{"step": 8, "loss": 1.0}\n\0\0\0\0\n' + b"[" * 100_000 + b'\n{"step": "x"}\n'
                       + '{"step": 1, "texts": ["月'.encode()[:-1])
    train(**constants)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_cut_at_any_kilobyte_falls_back_by_one_interval_at_most(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        interrupted(train, 8)                                         # saved after updates 5 and 9
    newest = tmp_path / "run/checkpoint.pt"
    data = newest.read_bytes()
    for size in range(0, len(data), 1024):
        newest.write_bytes(data[:size])
        assert common.load_newest(tmp_path / "run")["step"] == 5
    newest.write_bytes(data)
    assert common.load_newest(tmp_path / "run")["step"] == 9 and len(data) > 50 * 1024


@pytest.mark.parametrize("dies_at", range(6))
def test_a_save_that_dies_at_any_of_its_moments_leaves_a_whole_checkpoint(tmp_path, monkeypatch, dies_at):
    """Every call of the system inside a save is the last one once."""
    run = common.Run(0, 0, 1, torch.device("cpu"), torch.float32, 0)
    model = tiny_lm()
    for step in (1, 2):
        common.save(run, tmp_path, step, model, [], {}, {})
    calls = []

    class Dead(BaseException):
        pass

    def dying(real):
        def call(*arguments):
            calls.append(real)
            if len(calls) > dies_at:
                raise Dead
            return real(*arguments)
        return call
    for name in ("replace", "fsync"):
        monkeypatch.setattr(common.os, name, dying(getattr(os, name)))
    with contextlib.suppress(Dead):
        common.save(run, tmp_path, 3, model, [], {}, {})
    monkeypatch.undo()
    assert common.load_newest(tmp_path)["step"] in ((2,) if dies_at < 3 else (3,))
    assert len(calls) in (dies_at + 1, 4)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory; a function to give it another size or make it read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        return subprocess.run(command, capture_output=True).returncode
    if sys.platform != "linux" or mount("size=800k"):
        pytest.skip("no file system may be mounted here")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", place], check=True)


def test_a_full_or_read_only_disk_stops_a_run_with_a_sentence_and_it_goes_on(fault_folder, tmp_path,
                                                                             small_disk):
    place, mount = small_disk
    words = bench.fault_words("train_pretrain.py", fault_folder, "STEPS=10")  # checkpoint 380 kB, best 170
    finish(launch("train_pretrain.py", *words, f"OUT={tmp_path}/whole"))
    said = finish(launch("train_pretrain.py", *words, f"OUT={place}/run"), 1)
    assert "could not write" in said and "is whole; make room" in said and "Traceback" not in said, said
    assert common.load_newest(place / "run")["step"] == 3 and not list((place / "run").glob("*.tmp"))
    mount("ro")
    said = finish(launch("train_pretrain.py", *words, f"OUT={place}/run"), 1)
    assert f"cannot write to OUT={place}/run (Read-only file system)" in said, said
    assert "Traceback" not in said
    mount("rw,size=8m")
    finish(launch("train_pretrain.py", *words, f"OUT={place}/run"))
    assert not bench.difference(tmp_path / "whole", place / "run")


def test_a_file_in_the_place_of_the_folder_and_no_room_for_records_are_one_sentence(train, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(common.BadInput, match=r"cannot write to OUT=.*run \(File exists\)"):
        train()
    if Path("/dev/full").exists():
        with pytest.raises(common.BadInput, match="/dev/full .No space left on device.; the last checkpoint"):
            common.append_line(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize("number, says", [(errno.ENOSPC, "No space left on device; what was saved before"),
                                          (errno.EROFS, "Read-only file system")])
def test_any_other_file_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch, number, says):
    def main():
        raise OSError(number, os.strerror(number), "curves.png")
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as end:
        common.cli({"__file__": "train_x.py"}, main)
    assert end.value.code == 1 and f"error: train_x.py: curves.png: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["text", "chats"])
def test_hostile_rows_are_counted_and_named_whatever_their_size(tmp_path, reader):
    good = {"text": {"text": "good"}, "chats": {"conversations": []}}[reader]
    key = json.dumps(good)[2:].partition('"')[0].encode()
    bad = [b'{"' + key + b'": "a\0b"}', b"\0" * 100_000, b'{"' + key + b'": ["\xff"]}',
           b'{"' + key + b'": "' + b"x" * 100_000_000, b'{"' + key + b'": ' + b"[" * 200_000]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good).encode(), *bad, json.dumps(good).encode()]))
    found = prepare_text.BadRows()
    read = prepare_text.documents if reader == "text" else prepare_chats.rows
    assert len(list(read(path, found))) == 2 and found.count == len(bad)
    assert [n.partition(": ")[::2] for n in found.named] == list(zip(
        [f"x.jsonl:{i}" for i in range(2, 7)],
        ["not JSON", "not JSON", "not UTF-8", "not JSON", "nested too deeply"], strict=True))


@pytest.mark.parametrize("name, cut", [("train.bin", 1), ("train.bin", 2), ("valid.bin", 10**9),
                                       ("train.idx.npy", 9), ("train.idx.npy", 10**9)])
def test_token_files_cut_short_are_named(train, tokens, tmp_path, name, cut):
    shutil.copytree(tokens, tmp_path / "tokens")
    data = (tmp_path / "tokens" / name).read_bytes()
    (tmp_path / "tokens" / name).write_bytes(data[:max(0, len(data) - cut)])
    with pytest.raises(common.BadInput, match="tokens is damaged .*remove it, it is made again"):
        train(DATA=str(tmp_path / "tokens"))


def test_shards_cut_at_any_kilobyte_or_empty_are_named(train_muons, muons, tmp_path):
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    torch.save({"x_data": x[:4], "y_data": y[:4].flatten(1)}, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    for size in range(0, len(data), 1024):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(common.BadInput, match=r"cut\.pt cannot be read as tensors"):
            fit_muons.read_shard(tmp_path / "cut.pt")
    for wrong, message in (({"x_data": x[:0], "y_data": y[:0].flatten(1)}, "no event"),
                           ({"x_data": x, "y_data": y.flatten(1) * math.nan}, "off the sphere|not finite"),
                           ({"x_data": x, "y_data": y.flatten(1).int()}, "y_data is torch.int32")):
        torch.save(wrong, tmp_path / "cut.pt")
        with pytest.raises(common.BadInput, match=message):
            fit_muons.read_shard(tmp_path / "cut.pt")


def test_bytes_and_muons_that_changed_under_an_unfinished_run_are_refused(train_bytes, train_muons, muons,
                                                                          tmp_path):
    with pytest.raises(SystemExit):
        interrupted(train_bytes, 3)
    data = (tmp_path / "bytes").read_bytes()
    for changed in (data[:-1], b"X" + data[1:]):
        (tmp_path / "bytes").write_bytes(changed)
        with pytest.raises(common.BadInput, match="the data .*bytes changed since this run began"):
            train_bytes()
    x, y = fit_muons.read(str(muons / "muons-*.pt"))
    torch.save({"x_data": x, "y_data": y.flatten(1)}, tmp_path / "m.pt")
    constants = dict(DATA=str(tmp_path / "m.pt"), OUT=str(tmp_path / "muon"))
    with pytest.raises(SystemExit):
        interrupted(train_muons, 3, **constants)
    y[7] = y[8]
    torch.save({"x_data": x, "y_data": y.flatten(1)}, tmp_path / "m.pt")     # the same hits, another answer
    with pytest.raises(common.BadInput, match=r"the data .*m\.pt changed since this run began"):
        train_muons(**constants)


def test_a_base_is_not_set_aside_for_what_is_made_of_it(train_chat, train_pairs, train_adapter, distil, base,
                                                        tmp_path):
    shutil.copytree(base, tmp_path / "base")
    before = sorted(p.name for p in (tmp_path / "base").iterdir())
    runs = (train_chat, "INIT"), (train_pairs, "INIT"), (train_adapter, "INIT"), (distil, "TEACHER")
    for run, name in runs:
        for place in (tmp_path / "base", tmp_path / "base/best.pt"):
            with pytest.raises(common.BadInput, match=f"{name}=.*base.* lies in OUT=.*base.* choose another"):
                run(**{name: str(place), "OUT": str(tmp_path / "base")})
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == before
    assert not (tmp_path / "base~1").exists()


def test_a_base_that_changed_under_an_unfinished_run_is_refused(train_chat, distil, base, tmp_path):
    for run in (train_chat, distil):
        shutil.copytree(base, tmp_path / "base")
        options = dict(INIT=str(tmp_path / "base"), OUT=str(tmp_path / run.__qualname__.split(".")[0]))
        with pytest.raises(SystemExit):
            interrupted(run, 5, **options)
        found = common.load(tmp_path / "base/best.pt")
        torch.save({**found, "step": found["step"] + 1}, tmp_path / "base/best.pt")
        with pytest.raises(common.BadInput, match="base.* changed since this run began"):
            run(**options)
        shutil.rmtree(tmp_path / "base")


def test_students_that_do_not_fit_are_one_sentence(distil, teacher, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(teacher / "best.pt", tmp_path / "bare")
    for constants, message in ((dict(INIT=str(tmp_path / "bare")), "there is no tokenizer"),
                               (dict(DIM=50, N_HEADS=2), "DIM 50 must be a positive multiple of 4")):
        with pytest.raises(common.BadInput, match=message):
            distil(**constants)


def test_a_base_that_changed_under_an_unfinished_adapter_is_refused(train_adapter, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    with pytest.raises(SystemExit):
        interrupted(train_adapter, 3, INIT=str(tmp_path / "base"))
    found = common.load(tmp_path / "base/best.pt")
    found["model"]["norm.weight"] += 1
    torch.save(found, tmp_path / "base/best.pt")
    with pytest.raises(common.BadInput, match="/base changed since this run began"):
        train_adapter(INIT=str(tmp_path / "base"))


# --- serving

def serving_folder(out, tokens, seed=1, **changes):
    """A folder of a random model with the tokenizer of `tokens`, as training leaves it."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, seq_len=512)
    kind = common.Classic if changes.pop("classic", False) else common.LM
    model = kind(**{**{k: v for k, v in sizes.items() if kind is common.LM or k != "n_kv_heads"}, **changes})
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    out.mkdir(parents=True)
    torch.save({**common.weights_of(model), "step": 3, "metrics": {}}, out / "best.pt")
    if model.sizes["vocab_size"] != 256:
        (out / "tokenizer.json").write_bytes((tokens / "tokenizer.json").read_bytes())
    return out


@contextlib.contextmanager
def server_process(folder, **constants):
    """(address, process) of `python serve.py` on a free port of this machine."""
    constants = {"CHECKPOINT": folder, "PORT": 0, "DTYPE": "float32", "SLOTS": 8, "CHUNK": 16, **constants}
    log = open(f"{folder}.log", "w")
    process = launch("serve.py", *(f"{k}={v}" for k, v in constants.items()), stderr=log,
                     stdin=subprocess.DEVNULL)
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line + Path(log.name).read_text()
        yield line.split(": ")[-1].strip(), process
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            log.close()


@pytest.fixture(scope="session")
def served(tokens, tmp_path_factory):
    """The address of a server of a tiny random model."""
    folder = serving_folder(tmp_path_factory.mktemp("served") / "tiny", tokens)
    with server_process(folder, BODY_SECONDS=2.0, MAX_BODY=100_000) as (address, process):
        yield address
        assert process.poll() is None                                     # nothing above has brought it down


@pytest.fixture(scope="session")
def client(served):
    import openai
    return openai.OpenAI(base_url=served + "/v1", api_key="none", max_retries=0, timeout=60)


def gauge(address, name):
    import httpx
    text = httpx.get(address + "/metrics").text
    return float(next(x for x in text.splitlines() if x.startswith(f"nanosparse_{name} ")).split()[1])


def idle(address):
    """True as soon as no slot is taken."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if gauge(address, "slots_busy") == gauge(address, "queue_length") == 0:
            return True
        time.sleep(0.02)
    return False


HELLO = [{"role": "user", "content": "the cat sees 月"}]


def test_the_official_client_chats(client):
    ask = dict(model="tiny", messages=HELLO, max_tokens=12, seed=5)
    whole = client.chat.completions.create(**ask)
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert whole.id.startswith("chatcmpl-") and whole.system_fingerprint.startswith("fp_")
    assert client.chat.completions.create(**ask).choices[0].message.content == choice.message.content
    other = client.chat.completions.create(**{**ask, "seed": 6}).choices[0].message.content
    assert other != choice.message.content
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == choice.message.content
    assert pieces[-2].choices[0].finish_reason == "length"
    assert not pieces[-1].choices and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(p.usage is None for p in pieces[:-1])
    raw = client.chat.completions.with_raw_response.create(**ask)
    assert raw.http_response.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == choice.message.content
    parts = [{"role": "developer", "content": "Be brief."},
             {"role": "user", "content": [{"type": "text", "text": t} for t in ("the cat", " sees")]}]
    joined = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat sees"}]
    first, second = (client.chat.completions.create(**{**ask, "messages": m}).choices[0].message.content
                     for m in (parts, joined))
    assert first == second
    own = choice.message.model_dump()                          # with its null fields
    again = client.chat.completions.create(**{**ask, "messages": [*HELLO, own, *HELLO]})
    assert again.choices[0].finish_reason == "length"


def test_the_official_client_completes(client, tokenizer):
    ask = dict(model="tiny", max_tokens=8, temperature=0)
    text = client.completions.create(prompt="the cat", **ask)
    ids = [common.BOS, *common.encode(tokenizer, "the cat")]
    same = client.completions.create(prompt=ids, **ask)
    assert text.choices[0].text == same.choices[0].text and text.usage.prompt_tokens == len(ids)
    several = client.completions.create(prompt=["the cat", "a dog"], n=3, **ask)
    assert [c.index for c in several.choices] == list(range(6))
    assert several.choices[2].text == text.choices[0].text
    both = client.completions.create(prompt=[ids, ids], **ask)
    assert [c.text for c in both.choices] == [text.choices[0].text] * 2
    echo = client.completions.create(prompt="the 月", echo=True, logprobs=2, **ask).choices[0]
    assert echo.text.startswith("the 月") and echo.logprobs.token_logprobs[0] is None
    assert len(echo.logprobs.tokens) == len(echo.logprobs.token_logprobs) == len(echo.logprobs.text_offset)
    assert all(len(t) in (2, 3) for t in echo.logprobs.top_logprobs[1:])
    scored = client.completions.create(prompt="the 月", echo=True, logprobs=0, model="tiny", max_tokens=0)
    assert scored.choices[0].text == "the 月" and scored.usage.completion_tokens == 0
    n = scored.usage.prompt_tokens
    assert scored.choices[0].logprobs.token_logprobs == echo.logprobs.token_logprobs[:n]
    streamed = client.completions.create(prompt="the cat", stream=True, echo=True, **ask)
    assert "".join(c.choices[0].text for c in streamed) == "the cat" + text.choices[0].text


def test_log_probabilities_are_the_models(client, served, tmp_path_factory, tokens, tokenizer):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0,
                                            logprobs=True, top_logprobs=3, n=3)
    assert len(answer.choices) == 3
    content = answer.choices[1].logprobs.content
    folder = next(tmp_path_factory.getbasetemp().glob("served*/tiny"))
    model = common.build(common.load(folder / "best.pt")).eval()
    ids = common.render_chat(tokenizer, HELLO, reply=True)[0]
    for entry in content:
        logits = F.linear(model.hidden(torch.tensor([ids]))[0][0, -1], model.head_weight).log_softmax(-1)
        best = logits.topk(3)
        assert entry.logprob == pytest.approx(best.values[0].item(), abs=1e-3)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        ids.append(best.indices[0].item())
        assert bytes(entry.bytes) == common.token_bytes(tokenizer)[ids[-1]]
    pieces = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0,
                                            logprobs=True, stream=True)
    values = [e.logprob for p in pieces if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert values == [e.logprob for e in content]


def test_the_official_async_client_streams_many_and_none_are_mixed_up(client, served):
    import asyncio

    import openai
    asks = [dict(model="tiny", messages=[{"role": "user", "content": f"{'the cat sees ' * (i % 9)}{i}"}],
                 max_tokens=10 + i % 17, seed=i, temperature=i % 3 / 2) for i in range(64)]

    async def one(asker, ask):
        stream = await asker.chat.completions.create(**ask, stream=True)
        return "".join([p.choices[0].delta.content or "" async for p in stream])

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=served + "/v1", api_key="none", max_retries=0) as asker:
            return await asyncio.gather(*(one(asker, ask) for ask in asks))
    together = asyncio.run(all_at_once())
    alone = [client.chat.completions.create(**ask).choices[0].message.content for ask in asks]
    assert together == alone and len(set(alone)) > 32


@pytest.fixture(params=["none", "bf16"])
def float32_by(request):
    """float32 products by MKL, or by oneDNN."""
    before, torch.backends.mkldnn.matmul.fp32_precision = (
        torch.backends.mkldnn.matmul.fp32_precision, request.param)
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("changes", [{}, {"n_experts": 4}, {"attention": "window", "sparse": {"window": 20}}])
def test_a_neighbour_changes_no_bit_of_an_answer(changes, float32_by):
    """Tokens and log-probabilities, in float32, alone without reuse, and among 31 others that come and go and
    whose prompts share beginnings, or whole chunks after other beginnings."""
    net = common.for_inference(tiny_lm(vocab_size=320, dim=64, seq_len=400, **changes).float(), torch.float32)
    rng, codec = np.random.default_rng(0), serve.Codec(None)
    codec.table, codec.end = [bytes([i % 256]) for i in range(320)], 2
    shared = rng.integers(3, 320, 150).tolist()
    asks = [dict(ids=[1 if i % 4 else 3, *shared[:(0, 40, 64, 130, 150)[i % 5]],
                      *rng.integers(3, 320, (1, 5, 70)[i % 3]).tolist()],
                 max_tokens=(5, 20, 40)[i % 3], seed=i, temperature=(0, 0, 0.9)[i % 3], top=2,
                 frequency=i % 2 * 0.5) for i in range(32)]

    def answers(alone):
        import queue
        ended, scores = queue.Queue(), {}

        def post(pieces):
            for job, piece in pieces:
                scores.setdefault(job, []).extend(piece.scores)
                if piece.finish:
                    ended.put(piece.finish)
        engine = serve.Engine(net, codec, 32, 400, 32, 0 if alone else 4096, True, 64, 100.0, post)
        jobs = [serve.Job(stream=common.TextStream(codec.table), **ask) for ask in asks]
        for job in jobs:
            engine.submit([job])
            assert not alone or ended.get(timeout=60) in ("stop", "length")
            time.sleep(0 if alone else 0.003)
        for _ in () if alone else jobs:
            assert ended.get(timeout=60) in ("stop", "length")
        engine.close()
        engine.thread.join(10)
        assert alone or engine.count["prompt_tokens_reused"] > 1000
        assert bool(engine.slots.widths) == ("n_experts" not in changes)      # else: row by row
        return [(job.new, scores[job]) for job in jobs]
    assert answers(alone=True) == answers(alone=False)


def test_a_reused_prefix_is_counted_and_changes_nothing(client):
    ask = dict(model="tiny", temperature=0, max_tokens=9, logprobs=True)
    turns = [{"role": "system", "content": "the king of cats " * 5}, *HELLO]
    first = client.chat.completions.create(messages=turns, **ask)
    second = client.chat.completions.create(messages=turns, **ask)
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 <= reused < first.usage.prompt_tokens and reused % 16 == 0
    assert first.choices == second.choices


def test_stop_strings_end_an_answer_wherever_they_fall(client):
    ask = dict(model="tiny", prompt="the cat", temperature=0, max_tokens=40)
    text = client.completions.create(**ask).choices[0].text
    for begin, length in ((0, 1), (0, 3), (1, 2), (5, 1), (7, 6), (len(text) - 2, 2)):
        stop = text[begin:begin + length]
        choice = client.completions.create(stop=["\x00never", stop], **ask).choices[0]
        assert choice.text == text[:text.find(stop)] and choice.finish_reason == "stop"
        pieces = client.completions.create(stop=stop, stream=True, **ask)
        assert "".join(p.choices[0].text for p in pieces) == choice.text
    begun = client.completions.create(stop=[text[-3:] + "x", text[3:6] + "\x00"], **ask).choices[0]
    assert begun.text == text and begun.finish_reason == "length"         # they begin, then the text goes on


@pytest.mark.parametrize("text, stop, shown", [
    ("春眠🙂不觉晓", [], "春眠🙂不觉晓"), ("春眠🙂不觉晓", ["🙂"], "春眠"), ("🙂春", ["🙂"], ""),
    ("aab", ["ab"], "a"), ("aaab", ["aab"], "a"), ("ababac", ["abac"], "ab"), ("xabcd", ["abcd", "bc"], "xa"),
    ("ab 山水", ["山河", "b 山"], "a"), ("停止", ["停止了"], "停止"), ("👩‍👩‍👧e\u0301", ["👧"], "👩‍👩‍"),
    ("\n\n", ["\n\n"], ""), ("a\n b", ["\n\n"], "a\n b"),
])
def test_one_byte_at_a_time_no_character_and_no_stop_string_is_torn(text, stop, shown):
    stream, out = common.TextStream([bytes([i]) for i in range(256)], stop), ""
    for byte in text.encode():
        piece = stream.feed(byte)
        assert "\ufffd" not in piece
        out += piece
        if stream.ended:
            break
    assert out + stream.finish() == shown


def test_biases_and_penalties_do_what_they_say(client):
    ask = dict(model="tiny", prompt="the cat", temperature=0, max_tokens=12)
    forced = client.completions.create(logit_bias={"40": 100}, logprobs=0, **ask).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    varied = client.completions.create(logit_bias={"40": 5}, frequency_penalty=2, presence_penalty=2,
                                       logprobs=0, **ask).choices[0]
    assert len(set(varied.logprobs.tokens)) > 3
    assert client.completions.create(logit_bias={"2": 100}, **ask).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("field, value", [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "auto"),
    ("functions", [{"name": "f"}]), ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}), ("audio", {"voice": "x"}),
    ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"), ("prediction", {"type": "content", "content": "x"}), ("nonsense", 3)])
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    import openai
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={field: value})
    assert error.value.param == field and field in error.value.message
    assert error.value.code in ("unsupported_parameter", "unknown_parameter")


def test_every_error_has_its_class_in_the_official_client(client, served):
    import httpx
    import openai
    ask = dict(model="tiny", messages=HELLO)
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(**{**ask, "model": "gpt-4"})
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    for prompt, more in (("the " * 900, {}), ("the", {"max_tokens": 600}), ("x" * 60_000, {})):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as error:
            client.completions.create(model="tiny", prompt=prompt, **more)
        assert error.value.code == "context_length_exceeded"
    for param, value in (("temperature", 3), ("top_p", -1), ("n", 99), ("stop", ["a"] * 5), ("max_tokens", 0),
                         ("logit_bias", {"999": 1}), ("top_logprobs", 2), ("seed", 1.5)):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**ask, extra_body={param: value})
        assert error.value.param == param and error.value.type == "invalid_request_error"
    named = r"messages\[0\].content\[0\].type.* \"image_url\" is not supported"
    with pytest.raises(openai.BadRequestError, match=named):
        client.chat.completions.create(model="tiny", messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("tiny").owned_by == "nanosparse"
    assert httpx.get(served + "/health").json() == {"status": "ok"}
    assert httpx.get(served + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.delete(served + "/v1/models").status_code == 405
    assert httpx.get(served + "/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_readmes_curl_lines_work(served):
    lines = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("curl")]
    assert len(lines) == 6
    for line in lines:
        line = line.replace("http://127.0.0.1:8000", served).replace('"model": "chat"', '"model": "tiny"')
        line = line.replace("curl", "curl --fail -sS", 1)
        found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0 and found.stdout, (line, found.stderr)
        assert ("[DONE]" in found.stdout) == (" -N " in line)


TURN = '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], '
INVALID = [
    b"", b"null", b"true", b"7", b'"text"', b"[]", b"{", b'{"model": "tiny"', b"\xff\xfe", b"NaN", b"{}",
    *(f'{{"model": "tiny", "messages": {messages}}}' for messages in (
        "null", '"hi"', "42", "[]", "[null]", '["hi"]', '[{"role": "user"}]', '[{"content": "hi"}]',
        '[{"role": "king", "content": "hi"}]', '[{"role": "tool", "content": "hi"}]',
        '[{"role": 1, "content": "hi"}]', '[{"role": "user", "content": 5}]',
        '[{"role": "user", "content": null}]', '[{"role": "user", "content": {}}]',
        '[{"role": "user", "content": []}]', '[{"role": "user", "content": ["hi"]}]',
        '[{"role": "user", "content": [{"type": "text"}]}]', '[{"role": "user", "content": "\\ud800"}]')),
    '{"model": ["tiny"], "messages": [{"role": "user", "content": "hi"}]}',
    TURN + '"temperature": NaN}', TURN + '"temperature": 1e999}', TURN + '"max_tokens": 1e3}',
    TURN + '"seed": ' + "9" * 400 + "}", TURN + '"seed": ' + "9" * 9000 + "}", TURN + '"n": true}',
    *(f'{{"model": "tiny", "prompt": {prompt}}}' for prompt in (
        "[" * 40_000 + "]" * 40_000, '[1, "a"]', "[[1], 2]", "[-1]", "[320]", "[]", "[[]]", "[true]", "null",
        '["\\udfff"]', '"a", "stop": [""]', '"a", "stop": 3', '"a", "stream": "yes"',
        '"a", "logit_bias": {"x": 1}', '"a", "logit_bias": {"5": 101}',
        '"a", "stream_options": {"include_usage": true}'))]


def test_invalid_bodies_are_answered_with_json_and_4xx(served):
    import httpx
    json_type = {"Content-Type": "application/json"}
    with httpx.Client(base_url=served, timeout=30) as http:
        for path in ("/v1/chat/completions", "/v1/completions"):
            for body in INVALID:
                answer = http.post(path, content=body, headers=json_type)
                assert answer.status_code == 400 and answer.json()["error"]["message"], (body, answer.text)
            good = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1}).encode()
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
                answer = http.post(path, content=good, headers={"Content-Type": kind})
                assert answer.status_code == 415 and answer.json()["error"]["message"]
            answer = http.post(path, content=b" " * 100_001, headers=json_type)
            assert answer.status_code == 413 and answer.json()["error"]["message"]
        nul = http.post("/v1/completions", json={"model": "tiny", "prompt": "\x00</s>\x00", "max_tokens": 2})
        assert nul.status_code == 200
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 2, "metadata": {"a": {"b": [1]}}, "user": [0]}
        answer = http.post("/v1/completions", json=ask)
        assert answer.status_code == 200, answer.text
    for garbage in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"):
        connection, found = raw_request(served, garbage), b""
        while part := connection.recv(4096):
            found += part
        assert found.startswith(b"HTTP/1.1 400 ") and json.loads(found.split(b"\r\n\r\n")[1])["error"]
    assert idle(served)


FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 300))  # 5,000 for a thorough look


def test_no_request_brings_the_server_down(served):
    import httpx
    odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
                    st.lists(st.integers(-3, 400), max_size=4), st.lists(st.text(max_size=5), max_size=4),
                    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
    turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]),
                                   "content": st.text(max_size=30) | odd})
    values = {
        "messages": st.lists(turns, max_size=3), "n": st.integers(0, 3), "echo": st.booleans(),
        "prompt": st.text(max_size=30) | st.lists(st.integers(0, 319), max_size=9),
        "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "top_k": st.integers(0, 400),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "seed": st.integers(-2**63, 2**64), "logprobs": st.booleans() | st.integers(0, 6),
        "top_logprobs": st.integers(-1, 22), "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 330).map(str), st.floats(-101, 101), max_size=3),
        "stream": st.booleans(), "tools": st.just([]), "user": st.text(max_size=4),
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()})}
    few = {"max_tokens": st.integers(0, 5), "model": st.just("tiny")}
    body = st.fixed_dictionaries(few, optional={k: v | odd for k, v in values.items()})
    sound = st.fixed_dictionaries({k: values[k] for k in ("prompt", "messages")})
    seen = set()
    with httpx.Client(base_url=served, timeout=60) as http:
        @settings(max_examples=FUZZ_CASES, deadline=None, database=None)
        @given(path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]), body=body,
               base=sound | st.just({}))
        def knock(path, body, base):
            base = {k: v for k, v in base.items() if k != ("prompt" if "chat" in path else "messages")}
            answer = http.post(path, content=json.dumps({**base, **body}).encode(),
                               headers={"Content-Type": "application/json"})
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 429), answer.text
            if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
            else:
                assert "error" in answer.json() or answer.json()["choices"]
        knock()
    assert {200, 400} <= seen and idle(served)


def raw_request(address, sent):
    import socket
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


def posted(body, length=None, path="/v1/chat/completions"):
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            f"{len(body) if length is None else length}\r\n\r\n").encode() + body


def test_a_client_that_leaves_frees_its_slot(served, client):
    ask = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "logit_bias": {"2": -100}}).encode()
    before = gauge(served, 'generated_tokens_total')
    connections = [raw_request(served, posted(ask)) for _ in range(6)]
    connections += [raw_request(served, posted(ask.replace(b"true", b"false"))) for _ in range(2)]
    for connection in connections[:6]:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert gauge(served, "slots_busy") > 0
    for connection in connections:
        connection.close()
    assert idle(served)
    assert gauge(served, "generated_tokens_total") - before < 8 * 440       # eight whole answers: 8 × 490
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    assert idle(served)


def test_slow_half_sent_and_dropped_connections_hold_nothing_up(served):
    slow = [raw_request(served, posted(b'{"model"', 500)) for _ in range(10)]
    silent = [raw_request(served, b"POST /v1/chat") for _ in range(10)]
    for _ in range(1000):
        raw_request(served, b"GET / HTTP/1.1\r\nHost: localhost\r\n").close()
    lazy = raw_request(served, posted(json.dumps(
        {"model": "tiny", "messages": HELLO, "stream": True, "n": 4}).encode()))  # asks and does not read
    import httpx
    begin = time.monotonic()
    assert httpx.get(served + "/health").status_code == 200 and time.monotonic() - begin < 2
    answer = b""
    while part := slow[0].recv(4096):
        answer += part
    assert all(connection.recv(4096) == b"" for connection in silent)      # closed after BODY_SECONDS
    assert b" 408 " in answer.split(b"\r\n")[0] and b'"error"' in answer
    for connection in [*slow, *silent, lazy]:
        connection.close()
    assert idle(served)


def test_a_guarded_server_wants_its_key_limits_its_queue_and_shuts_down_cleanly(tokens, tmp_path):
    import httpx
    import openai
    output = finish(launch("serve.py", "HOST=0.0.0.0", f"CHECKPOINT={tmp_path}", stdin=subprocess.DEVNULL), 1)
    assert "set API_KEY" in output and "Traceback" not in output
    folder = serving_folder(tmp_path / "tiny", tokens, dim=128, seq_len=2048)
    constants = dict(API_KEY="secret", SLOTS=1, QUEUE=1, CORS="https://a.example")
    with server_process(folder, **constants) as (address, process):
        with pytest.raises(openai.AuthenticationError) as error:
            openai.OpenAI(base_url=address + "/v1", api_key="wrong", max_retries=0).models.list()
        assert error.value.code == "invalid_api_key"
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            found = httpx.options(address + "/v1/models", headers={"Origin": origin})
            assert found.headers.get("access-control-allow-origin") == allowed
        assert httpx.get(address + "/metrics").status_code == 401 and httpx.get(address).status_code == 200
        key = {"Authorization": "Bearer secret"}
        http = httpx.Client(base_url=address, headers=key, timeout=60)
        body = {"model": "tiny", "messages": HELLO, "stream": True, "logit_bias": {"2": -100}}
        with http.stream("POST", "/v1/chat/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            with http.stream("POST", "/v1/chat/completions", json=body) as waiting:
                full = http.post("/v1/chat/completions", json=body)
                assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
                assert full.json()["error"]["code"] == "rate_limit_exceeded"
                process.send_signal(signal.SIGTERM)
                begin, rest = time.monotonic(), "".join(waiting.iter_lines())
                assert "shutting down" in rest and "[DONE]" not in rest
            rest = "".join(lines)
            assert "[DONE]" in rest or "shutting down" in rest
        process.wait(30)
        assert time.monotonic() - begin < 15
    log = Path(f"{folder}.log").read_text()
    assert "Traceback" not in log and "the cat" not in log and "POST /v1/chat/completions 429" in log


@pytest.mark.parametrize("changes, name", [
    (dict(classic=True, n_heads=4, hidden_dim=64, dim=32, n_layers=2, seq_len=128), "classic"),
    (dict(vocab_size=256, attention="nsa", sparse=dict(window=16, compress_block=8, compress_stride=8,
                                                       select_block=8, n_selected=2)), "bytes")])
def test_models_without_slots_are_served_one_at_a_time(tokens, tmp_path, changes, name):
    import concurrent.futures

    import openai
    with server_process(serving_folder(tmp_path / name, tokens, **changes)) as (address, _):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60)
        ask = dict(model=name, prompt="the cat", max_tokens=12)
        first = client.completions.create(seed=1, logprobs=1, echo=True, **ask).choices[0]
        assert first.text.startswith("the cat") and len(first.logprobs.tokens) > 12
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: client.completions.create(seed=i, **ask), range(4)))
        assert "the cat" + answers[1].choices[0].text == first.text
        pieces = client.chat.completions.create(model=name, messages=HELLO, stream=True, max_tokens=5)
        assert [p.choices[0].finish_reason for p in pieces][-1] == "length"
        assert idle(address)


def test_weights_of_8_bits_are_served(tokens, tmp_path):
    import openai
    folder = serving_folder(tmp_path / "small", tokens)
    with server_process(folder, DTYPE="int8") as (address, _):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60)
        ask = dict(model="small", prompt="the cat", max_tokens=12)
        answer = client.completions.create(n=6, seed=3, **ask)
        alone = [client.completions.create(seed=3 + i, **ask).choices[0].text for i in range(6)]
        assert [choice.text for choice in answer.choices] == alone and idle(address)


def test_an_exported_folder_is_served(tokens, tmp_path, monkeypatch):
    folder = serving_folder(tmp_path / "mine", tokens)
    for name, value in dict(CHECKPOINT=str(folder), OUT=str(tmp_path / "hf")).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    texts = []
    for place in (folder, tmp_path / "hf"):
        for name, value in dict(CHECKPOINT=str(place), PROMPT="the cat", MAX_TOKENS=8, SEED=1).items():
            monkeypatch.setattr(serve, name, value)
        texts.append(serve.main())
    assert texts[0] == texts[1] != ""


class Browser:
    """Headless Chromium, driven through the DevTools protocol over a pipe."""

    def __init__(self, folder, url):
        import fcntl
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for pair in (os.pipe(), os.pipe()) for fd in pair]

        def child():
            os.dup2(ends[0], 3)
            os.dup2(ends[3], 4)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}", "--no-first-run", "about:blank"],
            pass_fds=(3, 4), preexec_fn=child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ends[0])
        os.close(ends[3])
        self.out, self.into, self.number, self.session = ends[1], os.fdopen(ends[2], "rb"), 0, None
        self.logged = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            read = bytearray()
            while (byte := self.into.read(1)) != b"\0":
                assert byte, "the browser has ended"
                read += byte
            found = json.loads(read)
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                if found["params"].get("entry", {}).get("level") != "verbose":
                    self.logged.append(found["params"])
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def run(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script):
        end = time.monotonic() + 20
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))

    def say(self, text):
        self.run("document.getElementById('box').focus()")
        self.call("Input.insertText", text=text)
        self.press("Enter", 13)

    def screenshot(self, path, width=1100, height=760, theme="light"):
        import base64
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        time.sleep(0.2)
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        self.into.close()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser(served, tmp_path):
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    found = Browser(tmp_path / "profile", served + "/")
    yield found
    found.close()


ANSWER = """# A title

**Bold**, *slanted*, `x < 1`, [a link](https://example.org/) and [a trap](javascript:alert(1)).

<img src=x onerror="window.harmed = 1"><script>window.harmed = 2</script>

1. 春眠不觉晓
2. two

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return x < 1  # <b>
```
"""


def test_the_page_talks_in_a_real_browser(browser, served, tmp_path):
    """Send, stream, stop, regenerate, edit, reload; what the model says is never HTML. With SCREENSHOTS in
    the environment, pictures of the page go to that folder."""
    last = "document.querySelector('.assistant:last-child')"
    browser.until("document.getElementById('model')?.textContent === 'tiny'")
    browser.run("settings = {max_tokens: 12, seed: 3}; language = 'en'; show()")
    browser.say("the cat sees")
    browser.until(f"!running && {last}?.innerText.includes('tokens/s')")
    first = browser.run("current.turns[1].content")
    assert browser.run("current.turns.length") == 2 and browser.run(f"{last}.innerText").strip()
    browser.until("document.getElementById('status').textContent === 'Answer finished'")
    browser.run(f"[...{last}.querySelectorAll('button')].find(b => b.textContent === 'Regenerate').click()")
    browser.until("!running && current.turns.length === 2 && current.turns[1].note")
    assert browser.run("current.turns[1].content") == first                # the seed is the same
    browser.run("""window.quick = fetch; window.fetch = async (...words) => {    // 30 ms an event
        const found = await quick(...words), text = new TextDecoder(), bytes = new TextEncoder();
        return new Response(found.body.pipeThrough(new TransformStream({async transform(part, out) {
            for (const event of text.decode(part, {stream: true}).split(/(?<=\\n\\n)/)) {
                await new Promise(done => setTimeout(done, 30));
                out.enqueue(bytes.encode(event));
            }}})), {status: found.status, headers: found.headers}); };
        settings = {max_tokens: 420, seed: 1}""")
    browser.say("another")
    browser.until("running && current.turns[3]?.content.length > 10")
    assert browser.run("document.getElementById('send').textContent") == "Stop"
    browser.press("Escape", 27)
    browser.until("!running && current.turns[3].note.includes('stopped')")
    stopped = browser.run("current.turns[3].content")
    browser.run("location.reload()")
    time.sleep(0.3)
    browser.until("document.readyState === 'complete' && document.querySelectorAll('article').length === 4")
    assert browser.run("current.turns[3].content") == stopped
    browser.run("[...document.querySelectorAll('.user button')].find(b => b.textContent === 'Edit').click()")
    assert browser.run("document.getElementById('box').value") == "the cat sees"
    browser.press("Escape", 27)                                            # not sent, it changes nothing
    assert browser.run("document.getElementById('box').value + current.turns.length") == "4"
    edits = "[...document.querySelectorAll('.user button')].filter(b => b.textContent === 'Edit')"
    browser.run(edits + "[1].click()")
    browser.run("document.getElementById('box').value = ''; settings = {max_tokens: 5}")
    browser.say("other")
    browser.until("!running && current.turns.length === 4 && current.turns[3].note")
    assert browser.run("current.turns.map(turn => turn.content)[2]") == "other"

    first = browser.session                                                # a second tab
    target = browser.call("Target.createTarget", url=served + "/")["targetId"]
    browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    browser.until("document.getElementById('model')?.textContent === 'tiny'")
    browser.run("document.getElementById('new').click(); settings = {max_tokens: 5}")
    browser.say("from the other tab")
    browser.until("!running && current.turns[1]?.note")
    browser.session = first
    browser.until("document.querySelectorAll('#list li').length === 2")
    browser.run("settings = {max_tokens: 5}")
    browser.say("and here")
    browser.until("!running && current.turns.length === 6 && current.turns[5].note")
    kept = json.loads(browser.run("localStorage.getItem('nanosparse.chats')"))
    assert [chat["turns"][0]["content"] for chat in kept] == ["the cat sees", "from the other tab"]

    answer = json.dumps(ANSWER)                                            # as if the model had said it
    browser.run(f"""document.getElementById('new').click(); answer = async () => {{
        current.turns.push({{role: 'assistant', content: {answer}, note: '42 tokens, 300.0 tokens/s'}});
        keepChat(current); show(); }}""")
    browser.say("Show me **everything** <b>")
    browser.until(f"!!{last}?.querySelector('pre')")
    assert browser.run(f"{last}.querySelectorAll('img, script, b').length") == 0
    assert browser.run("window.harmed === undefined")
    assert '<img src=x onerror="window.harmed = 1">' in browser.run(f"{last}.innerText")
    assert browser.run(f"[...{last}.querySelectorAll('a')].map(a => a.href).join()") == "https://example.org/"
    tags = "h3 strong em code ol li table th pre".split()
    assert all(browser.run(f"{last}.querySelectorAll('{tag}').length") for tag in tags)
    assert browser.run(f"{last}.querySelector('pre').innerText") == "def f(x):\n    return x < 1  # <b>"
    assert browser.run("document.querySelector('.user .text').innerText") == "Show me **everything** <b>"
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    browser.screenshot(pictures / "light.png")
    browser.screenshot(pictures / "dark.png", theme="dark")
    browser.screenshot(pictures / "phone.png", 390, 760)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("getComputedStyle(document.getElementById('nav')).display") == "none"
    browser.run("document.getElementById('menu').click(); document.getElementById('language').click()")
    assert browser.run("document.documentElement.lang") == "zh"
    browser.screenshot(pictures / "phone_menu.png", 390, 760, "dark")
    assert browser.run("""[...document.querySelectorAll('button, input, textarea')].filter(e =>
        !e.textContent.trim() && !e.getAttribute('aria-label') && !e.closest('label')).length""") == 0
    assert not browser.logged, browser.logged                              # no error, no policy violation
