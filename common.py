"""What every experiment in this repo must do alike to be right; what makes one different is in its script.

Sections: 0 conventions · 1 constants · 2 processes · 3 one update · 4 checkpoints and records · 5 small
layers · 6 attention and its cache · 7 sparse attention · 8 mixture of experts · 9 fusion · 10 language
model and generation · 11 text. Nothing refers to a later section.
"""

# 0. Conventions.
# Shapes: B rows, T queries, S keys, D model width, H query heads, G key/value heads, E head width, L document
# length, N documents or blocks, K chosen, V vocabulary, X experts. Attention tensors are always (B, H, T, E).
# Masks are named `keep`: True = may attend. Losses are (sum, count): who divides, divides once, at the end.
# A target of IGNORE is not predicted; a document id of -1 is padding.

import ast
import bisect
import codecs
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


class BadInput(ValueError):
    """The user's constant, file or machine is at fault: one sentence that names it, its value and the way
    out."""


# 1. Constants: upper-case literals at the top of a script, overridden by NAME=value words.

def literals(names: dict) -> dict:
    """The constants of a script: its upper-case globals that are bool, int, float, str or tuple."""
    return {k: v for k, v in names.items() if k.isupper() and isinstance(v, bool | int | float | str | tuple)}


def describe(names: dict) -> str:
    """Docstring and constants of a script with their comments, as `--help` prints them."""
    text = (names.get("__doc__") or "").strip() + "\n\nConstants (override as NAME=value):\n"
    for line in Path(names["__file__"]).read_text(encoding="utf-8").splitlines():
        if re.match(r"# \S", line) and not text.endswith("\n\n"):
            text += f"\n{line[2:]}\n"
        elif re.match(r"[A-Z][A-Z0-9_]* = |#  ", line):
            text += f"  {line.removeprefix('# ')}\n"
        elif re.match(r"(def|class) ", line):
            break
    return text


def override(names: dict, words: Sequence[str]) -> dict:
    """Set the constants in `names` from NAME=value words and return those that were set.

    Values are Python literals, strings may go unquoted; an int is accepted for a float, nothing else
    converts. Raises BadInput on an unknown name, a wrong type or a missing `=`; `--help` prints and exits.
    """
    known, changed = literals(names), {}
    for word in words:
        if word in ("--help", "-h"):
            print(describe(names))
            raise SystemExit(0)
        name, equals, text = word.partition("=")
        if not equals:
            raise BadInput(f"expected NAME=value, got {word!r}")
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise BadInput(f"no constant {name!r}; {hint}")
        old = known[name]
        if isinstance(old, str):
            value = text
        else:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = text
            if type(old) is float and type(value) is int:
                value = float(value)
        if type(value) is not type(old):
            raise BadInput(f"{name} is {type(old).__name__} ({old!r}), got {type(value).__name__} ({text})")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{name} must be a finite number, got {text}")
        names[name] = changed[name] = value
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print("constants: " + " ".join(f"{k}={v}" for k, v in changed.items()), file=sys.stderr, flush=True)
    return changed


# Errors that are the disk's: full, over quota, read-only, file too large, broken, not ours, gone.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.ESTALE)
LOST_PEER = "gloo|nccl|timed out|connection (closed|reset|refused)"  # what a collective says when one is gone
PEER_TIMEOUT = 600  # seconds a process waits for the others, then it ends with an error: when a link is down


def cli(names: dict, main: Callable) -> None:
    """Run a script: overrides, then `main`; BadInput becomes one line on stderr and exit status 1."""
    script = Path(names["__file__"]).name
    try:
        names["_given"] = frozenset(override(names, sys.argv[1:]))
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BadInput as error:
        code = f"{script}: {error}"
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        first = _first_line(error)
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if isinstance(error, dist.DistError) or several and re.search(LOST_PEER, first, re.I):
            code = (f"{script}: another process has ended, or did not answer for {PEER_TIMEOUT} s ({first}); "
                    "rerun the same command everywhere to go on from the last checkpoint")
        elif isinstance(error, RuntimeError) and not re.search(
            "(out of|allocate) memory|bad_alloc", first, re.I
        ):
            raise
        else:
            traceback.print_exc()
            code = f"{script}: out of memory ({first}); lower MICRO_BATCH, then SEQ_LEN or DIM"
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has left: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = (f"{script}: {error.filename or 'a file'}: {error.strerror}; what was saved before is whole; "
                "make room or choose another folder, then rerun the same command")
    if not isinstance(code, int):
        print(f"error: {code}", file=sys.stderr, flush=True)
        code = 1
    if dist.is_initialized():
        # Others may wait in a collective; and taking a group down can wait for ever for the lock of Python,
        # which its own thread needs to let go of a tensor (torch 2.13, gloo): leave without either.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def needs(module: str, why: str) -> None:
    """Raise BadInput with the command that installs a module which is not there."""
    if importlib.util.find_spec(module) is None:
        package = {"faiss": "faiss-cpu"}.get(module, module)
        raise BadInput(f"{package} is not installed, needed {why}: pip install {package}")


def divisible(**pairs: tuple[int, int]) -> None:
    """Raise BadInput unless each `NAME=(value, divisor)` is positive and divides evenly."""
    for name, (value, divisor) in pairs.items():
        if divisor < 1 or value < 1 or value % divisor:
            raise BadInput(f"{name} {value} must be " + ("at least 1" if divisor == 1 else
                                                         f"a positive multiple of {divisor}"))


def within(low: float, high: float, **values: float) -> None:
    """Raise BadInput unless low ≤ value ≤ high for every NAME=value."""
    for name, value in values.items():
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise BadInput(f"{name} {value} must be {limit}")


# 2. Processes: the same file under `python`, `torchrun` on one machine and `torchrun` on several.

CONNECT_TIMEOUT = 120      # seconds that processes have to find each other at the start
PREPARE_TIMEOUT = 86_400   # seconds that processes wait while one of them prepares data
SECOND_SIGNAL = 2.0  # seconds; a stop signal that follows sooner is the same one, forwarded by a launcher


@dataclasses.dataclass
class Run:
    """This process among its peers. Holds no model, data, optimizer or step."""
    rank: int
    local_rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    scaler: torch.amp.GradScaler | None = None
    signal: int = 0                    # the signal that asked this process to stop, 0 = none
    asked: float = 0.0                 # when it did, by time.monotonic
    threads: int = 1                   # CPU threads that it may use by day
    patient: object = None             # group of all processes in which they wait for as long as it takes
    lock: object = None                # open file that keeps a second run out of the same folder
    handlers: dict = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def autocast(self):
        """Context in which matmuls run in `dtype` (float32: a context that does nothing)."""
        if self.dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def wrap(self, model: nn.Module, shard: bool = False) -> nn.Module:
        """The model to call in the loss: DDP when there are several processes, else itself.

        `shard`: weights, gradients and optimizer state are cut over the processes, layer by layer (FSDP2);
        the model itself is changed, so call this before its optimizers are made.
        """
        if self.world == 1:
            return model
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            mesh = init_device_mesh(self.device.type, (self.world,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Each number summed over all processes, in float64."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(n, dtype=wide, device=self.device).detach() for n in numbers])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, thing: object) -> object:
        """Process 0's `thing`, on every process."""
        if self.world == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def wait(self, patiently: bool = False) -> None:
        """Return when every process has come here, within PEER_TIMEOUT, or `patiently` PREPARE_TIMEOUT."""
        if self.world > 1:
            dist.barrier(self.patient if patiently else None)

    def peak_mib(self) -> list[int]:
        """The most memory that each process has held so far, in MiB: of its GPU, else its resident set."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = (torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        each = [0] * self.world
        each[self.rank] = peak // 2**20
        return [int(n) for n in self.sum(*each)]

    def say(self, text: str) -> None:
        """Print a line on process 0."""
        if self.first:
            print(text, flush=True)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `DTYPE = name` means on this device; "auto" takes bfloat16 where it is faster.

    On a CPU with AVX512-BF16 or AMX "faster" is measured, on a 512-wide matmul of a few milliseconds.
    """
    if name in ("float32", "bfloat16", "float16", "float64"):
        return getattr(torch, name)
    if name != "auto":
        raise BadInput(f"DTYPE {name!r} is not one of auto, float32, bfloat16, float16, float64")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo")
    if device.type != "cpu" or not flags.exists() or not re.search("avx512_bf16|amx_bf16", flags.read_text()):
        return torch.float32

    def seconds(dtype):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)
    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32


def _onednn_setting():
    return getattr(torch.backends.mkldnn, "matmul", None)  # where fp32_precision lives


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN multiplies float32 at full precision here when it may round to bfloat16, as it does with
    AMX.

    torch leaves float32 products to MKL unless that is allowed; on AMD cores oneDNN is twice as fast, with
    small batched ones up to four times.
    """
    a, b = (torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    true = a.double() @ b.double()
    setting = _onednn_setting()
    if setting is None or not torch.backends.mkldnn.is_available():
        return False
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return all(float((x - true).abs().max()) < 1e-5 * float(true.abs().max())
                   for x in (torch.bmm(a, b), torch.bmm(a.mT.contiguous().mT, b)))
    finally:
        setting.fp32_precision = before


def start(seed: int, dtype: str = "auto") -> Run:
    """Join the other processes (as torchrun's environment says), choose device and precision, catch stop
    signals."""
    within(0, 2**31 - 1, SEED=seed)
    world, rank, patient = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)), None
    local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} on this machine has no GPU of its own: "
                           f"{torch.cuda.device_count()} found; lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's cautious default
            torch.set_num_threads(max(1, cores // local_world))
        if _onednn_is_exact():
            _onednn_setting().fp32_precision = "bf16"  # allowed, not done: see there
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        connect = datetime.timedelta(seconds=CONNECT_TIMEOUT)
        dist.init_process_group(backend, store=_meet(rank, world), rank=rank, world_size=world,
                                timeout=connect)
        patient = dist.new_group(backend="gloo", timeout=connect)
        for group, seconds in ((None, PEER_TIMEOUT), (patient, PREPARE_TIMEOUT)):
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
    run = Run(rank, local, world, device, torch.float32, seed, threads=torch.get_num_threads(),
              patient=patient)
    set_dtype(run, run.share(pick_dtype(dtype, device)))
    torch.manual_seed(seed)
    try:
        for sign in (signal.SIGINT, signal.SIGTERM):
            run.handlers[sign] = signal.signal(sign, lambda number, frame: _on_signal(run, number))
    except ValueError:  # not the main thread: whoever owns it handles the signals
        pass
    return run


def _meet(rank: int, world: int) -> dist.Store:
    """A store, empty and the same for all processes of this start.

    torchrun gives a restarted job the store of the start before, with the addresses of processes that are
    gone, and gloo would wait for them (torch 2.13; a restart's number is not the same on all machines). So
    process 0 names a fresh part of it, in answer to a number that each of the others has just drawn.
    """
    store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=CONNECT_TIMEOUT)))[0]
    part, missing, end = os.urandom(8).hex(), set(range(1, world)), time.monotonic() + CONNECT_TIMEOUT
    if rank:
        store.set(f"asked {rank}", part)
        part = store.get(f"answer {part}").decode()
        store.set(f"heard {rank} {part}", "")
    while missing and rank == 0:
        for peer in list(missing):
            if store.check([f"heard {peer} {part}"]):
                missing.remove(peer)
            elif store.check([f"asked {peer}"]):  # perhaps before its restart: asked again until it has heard
                store.set(f"answer {store.get(f'asked {peer}').decode()}", part)
        if time.monotonic() > end:
            raise BadInput(f"processes {sorted(missing)} did not come in {CONNECT_TIMEOUT} s; start them too")
        time.sleep(0.01)
    return dist.PrefixStore(part, store)


def set_dtype(run: Run, dtype: torch.dtype) -> None:
    """Compute in `dtype` from now on; float16 comes with a gradient scaler (started low: sums exceed
    means)."""
    run.dtype = dtype
    run.scaler = torch.amp.GradScaler(run.device.type, init_scale=2.0**8) if dtype == torch.float16 else None


def _on_signal(run: Run, number: int) -> None:
    if run.signal and time.monotonic() - run.asked > SECOND_SIGNAL:  # asked twice: do not finish the step
        raise KeyboardInterrupt
    if run.signal:
        return
    run.signal, run.asked = number, time.monotonic()
    if run.first:
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop now)", flush=True
        )


def stop(run: Run) -> None:
    """Undo `start`: signals, lock. The process group stays until the process ends, see `cli`."""
    for sign, handler in run.handlers.items():
        signal.signal(sign, handler)
    run.handlers = {}
    if run.lock:
        run.lock.close()


def in_window(window: str, now: datetime.time | None = None) -> bool:
    """True when the clock is inside "HH:MM-HH:MM" (it may cross midnight); an empty window never holds."""
    if not window:
        return False
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", window)
    if not found:
        raise BadInput(f"NIGHT {window!r} is not of the form 22:00-07:00")
    a, b, c, d = map(int, found.groups())
    now = now or datetime.datetime.now().time()
    minute, begin, end = now.hour * 60 + now.minute, a * 60 + b, c * 60 + d
    return begin <= minute < end if begin <= end else minute >= begin or minute < end


def be_gentle(run: Run, gentle: bool) -> None:
    """Use half the threads and half the GPU memory while `gentle`; back to all of them after."""
    threads = max(1, run.threads // 2) if gentle else run.threads
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(0.5 if gentle else 1.0, run.device)
        run.say(f"{'night' if gentle else 'day'}: {threads} threads")


# 3. One update: the same update however it is cut into micro-batches and processes.

def lr_scale(step: int, steps: int, warmup: int, floor: float = 0.0, schedule: str = "cosine",
             decay: float = 0.3) -> float:
    """Learning rate of update `step` (from 0) as a fraction of its peak.

    Linear warm-up over `warmup` updates, then "cosine" down to `floor`, or "wsd": stable, then linear to
    `floor` over the last `decay` share of `steps` (arXiv 2404.06395).
    """
    if schedule not in ("cosine", "wsd"):
        raise BadInput(f"SCHEDULE {schedule!r} is neither cosine nor wsd")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return floor + (1 - floor) * min(1.0, max(0.0, steps - step) / max(1.0, decay * steps))


def owned_once(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise unless every trainable parameter is in exactly one optimizer."""
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    wanted = {p for p in model.parameters() if p.requires_grad}
    if len(owned) != len(set(owned)) or set(owned) != wanted:
        lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in set(owned)]
        raise ValueError(f"parameters in no optimizer: {lost}; in two: {len(owned) - len(set(owned))}")


def make_optimizers(model: nn.Module, kind: str, lr: float, muon_lr: float, weight_decay: float) -> list:
    """Optimizers that own every parameter once, each group with its `peak` learning rate.

    "muon": Muon for the matrices inside `model.layers` (routers and gates excepted), AdamW for the rest;
    "adamw" for all; "adam" without weight decay. Weight decay is of matrices alone.
    """
    inner = {p for name, p in model.layers.named_parameters()
             if p.ndim == 2 and p.requires_grad and not re.search("router|gates", name)}
    owned = [p for p in model.parameters() if p.requires_grad]
    hidden, rest = [p for p in owned if p in inner], [p for p in owned if p not in inner]
    vectors = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    tables = {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay}
    adamw = dict(lr=lr, betas=(0.9, 0.95), fused=True)
    if kind == "adam":
        made = [torch.optim.Adam(owned, lr=lr, fused=True)]
    elif kind == "adamw":
        made = [torch.optim.AdamW([{**tables, "params": hidden}, tables, vectors], **adamw)]
    elif kind == "muon":
        made = [torch.optim.Muon(hidden, lr=muon_lr, weight_decay=weight_decay),
                torch.optim.AdamW([tables, vectors], **adamw)]
    else:
        raise BadInput(f"OPTIMIZER {kind!r} is not one of muon, adamw, adam")
    owned_once(model, made)
    for group in (g for optimizer in made for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return made


@dataclasses.dataclass
class Updated:
    """What one update did: mean loss over all processes, gradient norm before clipping, whether it was
    applied."""
    loss: float
    grad_norm: float
    count: float
    applied: bool
    signal: int


def update(run: Run, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batches: Sequence,
           loss_of: Callable, clip: float, step: int) -> Updated:
    """Do one optimizer step on this process's micro-batches.

    `loss_of(batch)` returns (sum, count). Sums and counts are added over micro-batches and processes and
    divided once, so one process with one batch and many with several give the same step. Gradients are
    synchronised on the last micro-batch only. A non-finite loss or gradient leaves the weights as they were.
    Randomness (dropout) depends on (seed, step, rank) alone. `clip` 0 = never.
    """
    random_state(run, step)
    wide = torch.float32 if run.device.type == "mps" else torch.float64
    totals = torch.zeros(4, dtype=wide, device=run.device)  # loss, count, processes asked to stop: INT, TERM
    for i, batch in enumerate(batches):
        # Sharded gradients are reduced at once: whole ones would take the memory that sharding saves.
        sync = i == len(batches) - 1 or not hasattr(net, "no_sync")
        with contextlib.nullcontext() if sync else net.no_sync():
            with run.autocast():
                loss, count = loss_of(batch)
            (run.scaler.scale(loss) if run.scaler else loss).backward()
        totals[0] += loss.detach()
        totals[1] += count
    if run.signal:
        totals[2 if run.signal == signal.SIGINT else 3] += 1
    if run.world > 1:
        dist.all_reduce(totals)
    for optimizer in optimizers if run.scaler else ():
        run.scaler.unscale_(optimizer)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    scale = run.world / totals[1].clamp(min=1)  # DDP averaged over ranks; we want the sum
    torch._foreach_mul_(grads, float(scale))
    norm = torch.nn.utils.get_total_norm(grads)
    loss, count, interrupted, terminated = totals.tolist()  # the one wait for the device
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    sign = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
    applied = math.isfinite(loss) and math.isfinite(norm)
    if applied and clip and norm > clip:
        torch._foreach_mul_(grads, clip / (norm + 1e-6))
    for optimizer in optimizers:
        if run.scaler:
            run.scaler.step(optimizer)  # skips by itself what is not finite
        elif applied:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if run.scaler:
        run.scaler.update()
    return Updated(loss / max(1.0, count), norm, count, applied, int(sign))


def random_state(run: Run, step: int) -> None:
    """Seed dropout and sampling masks as a pure function of (seed, step, rank)."""
    torch.manual_seed((run.seed * 1_000_003 + step) * 4099 + run.rank)


# 4. Checkpoints and records: what a run leaves on disk, and how it is taken up again.

# Constants that may change between two starts of one run: they do not shape the weights.
FREE = frozenset(
    "OUT RESUME LOG_EVERY SAVE_EVERY SAMPLE_EVERY WANDB MICRO_BATCH NIGHT EVAL PATIENCE SHARD".split()
)
CHOICES = {"SCHEDULE": ("cosine", "wsd"), "COMPILE": ("auto", "yes", "no"),
           "WANDB": ("disabled", "offline", "online")}
RECORDS = ("metrics.jsonl", "samples.jsonl")  # lines with a step, taken back to the checkpoint's


def write_whole(path: Path, write: Callable, spare: Path | None = None) -> None:
    """Call `write(file)` so that `path` holds either all of it or what it held before; raises BadInput on
    OSError. `spare`: what it held before is kept there."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if spare and path.exists():  # only now, that the new one is whole: two are, at every moment
            os.replace(path, spare)
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise BadInput(f"could not write {path} ({reason}); what was there before is whole; make room or "
                       "choose another OUT, then rerun the same command") from error


def save(run: Run, out: str | Path, step: int, model: nn.Module, optimizers: Sequence, state: dict,
         constants: dict) -> None:
    """Write OUT/checkpoint.pt (process 0), keeping the one before as checkpoint.prev.pt.

    Sharded or not, it is the same file: whole tensors, in the order of the parameters.
    """
    whole = {
        **weights_of(model, run.first),
        "step": step,
        "optimizers": [gathered(o.state_dict(), run.first) for o in optimizers],
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "dtype": str(run.dtype)[6:],
        "state": state,
        "constants": constants,
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version},
    }
    if run.first:
        path = Path(out) / "checkpoint.pt"
        for name in RECORDS:  # on the disk before the checkpoint that says that they are
            if (path.parent / name).exists():
                with open(path.parent / name, "rb") as file:
                    os.fsync(file.fileno())
        write_whole(path, lambda file: torch.save(whole, file), path.with_name("checkpoint.prev.pt"))
    run.wait()


def each_tensor(change: Callable, x: object) -> object:
    """x with change(tensor) in the place of every tensor in its dicts, lists and tuples."""
    if isinstance(x, dict):
        return {k: each_tensor(change, v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(each_tensor(change, v) for v in x)
    return change(x) if isinstance(x, Tensor) else x


def gathered(x: object, keep: bool = True) -> object:
    """x with every sharded tensor made whole, on the CPU; all processes call it, those without `keep` get
    nothing."""
    def whole(tensor):
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
            return tensor.cpu() if keep else None
        return tensor
    return each_tensor(whole, x)


def spread(run: Run, x: Tensor, like: Tensor) -> Tensor:
    """Process 0's x on every process, sharded as the parameter `like` is; called by all of them."""
    from torch.distributed.tensor import distribute_tensor
    x = x.to(run.device) if run.first else torch.empty(like.shape, dtype=x.dtype, device=run.device)
    return distribute_tensor(x, like.device_mesh, like.placements)


def weights_of(model: nn.Module, keep: bool = True) -> dict:
    """What rebuilds a model: class name, constructor sizes, weights in float32 on the CPU. Where it is
    sharded, all processes call this; those without `keep` get no weights."""
    def plain(tensor):
        return tensor.detach().float().cpu() if tensor.is_floating_point() else tensor.cpu()
    return {"kind": type(model).__name__.removeprefix("FSDP"), "sizes": model.sizes,
            "model": each_tensor(plain, gathered(dict(model.state_dict()), keep))}


def save_best(run: Run, out: str | Path, step: int, model: nn.Module, metrics: dict) -> None:
    """Write OUT/best.pt: the weights alone, with the metrics that made them the best."""
    whole = {**weights_of(model, run.first), "step": step, "metrics": metrics}
    if run.first:
        write_whole(Path(out) / "best.pt", lambda file: torch.save(whole, file))
    run.wait()


def load(path: str | Path) -> dict:
    """A checkpoint file of ours as a dict on the CPU; raises BadInput if missing, damaged or foreign."""
    if not Path(path).is_file():
        raise BadInput(f"there is no checkpoint {path}; train first, or name the folder of a trained model")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or hostile file
        raise BadInput(f"{path} cannot be read as a checkpoint ({_first_line(error)})") from None
    if not isinstance(found, dict) or not {"kind", "sizes", "model", "step"} <= set(found):
        raise BadInput(f"{path} is not a checkpoint of this repo")
    return found


def load_newest(out: str | Path) -> dict | None:
    """OUT/checkpoint.pt, or with a warning the one before it if that cannot be read; None when there is
    neither."""
    paths = [p for p in (Path(out) / "checkpoint.pt", Path(out) / "checkpoint.prev.pt") if p.exists()]
    problems = []
    for path in paths:
        try:
            found = load(path)
            if problems:
                print(f"warning: {'; '.join(problems)}; using {path} of step {found['step']}", flush=True)
            return found
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput("; ".join(problems) + f"; move {out} aside, or start over with RESUME=False")
    return None


def newest_checkpoint(place: str | Path = "") -> Path:
    """The checkpoint that `place` means: a file itself, a folder's best.pt (else checkpoint.pt), "" the
    newest in out/."""
    place = Path(place) if place else None
    if place is None:
        found = [p for name in ("best.pt", "checkpoint.pt") for p in Path("out").glob(f"*/{name}")]
        if not found:
            raise BadInput("there is no checkpoint in out/; train first: python train_pretrain.py")
        place = max(found, key=lambda p: p.stat().st_mtime).parent
    if place.is_dir():
        best = place / "best.pt"
        return best if best.exists() or not (place / "checkpoint.pt").exists() else place / "checkpoint.pt"
    return place


def export_weights(run: Run, out: str | Path, checkpoint: dict) -> None:
    """Write the weights alone: OUT/model.safetensors, and OUT/config.json with what rebuilds the model. Says
    so where these are still those before the first update."""
    if checkpoint["step"] == 0:
        run.say(f"warning: no validation beat the one before the first update: {out}/best.pt is "
                "the model that this run began with; train longer, or with a lower learning rate")
    if run.first:
        from safetensors.torch import save as to_bytes
        about = {k: checkpoint[k] for k in ("kind", "sizes", "step")}
        write_whole(Path(out) / "model.safetensors", lambda file: file.write(to_bytes(checkpoint["model"])))
        write_whole(Path(out) / "config.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    run.wait()


def leave(run: Run, out: str | Path, step: int, number: int) -> None:
    """Exit after a stop signal and a save (in which processes waited for each other), saying how to come
    back."""
    name = signal.Signals(number).name
    run.say(f"{name}: stopped after step {step}, saved in {out}; rerun the same command to go on")
    stop(run)
    raise SystemExit(128 + number)


def write_result(run: Run, out: str | Path, found: dict) -> None:
    """Write OUT/eval.json: what the best checkpoint scored on new data."""
    if run.first:
        write_whole(Path(out) / "eval.json", lambda file: file.write(json.dumps(found, indent=1).encode()))


def append_line(path: Path, row: dict) -> None:
    """Add a row to a JSON-lines file; raises BadInput where the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BadInput(f"could not write {path} ({error.strerror}); the last checkpoint is whole; make room, "
                       "then rerun the same command") from error


def set_aside(out: str | Path, reason: str) -> None:
    """Rename the folder OUT to OUT~1 (or the next free number) and say why."""
    out = Path(out)
    if not out.exists() or not any(p.name != ".lock" for p in out.iterdir()):
        return
    number = 1
    while (spare := out.with_name(f"{out.name}~{number}")).exists():
        number += 1
    out.rename(spare)
    print(f"{out}: {reason}; it is now {spare}", flush=True)


def resume(run: Run, out: str | Path, constants: dict, again: bool, fingerprint: str = "",
           shard: bool = False) -> dict | None:
    """The checkpoint from which this command goes on, the same on every process, or None for a fresh start.

    A finished run, or one shaped by other constants, is renamed aside, never overwritten (`again` False:
    always). Data that changed under an unfinished run are refused. Metrics later than the checkpoint are
    taken back. `shard`: only process 0 gets the numbers, the others empty tensors (`restore` spreads them).
    Constants that name a choice are checked first, so that a slip of the pen sets nothing aside.
    """
    for name, choices in CHOICES.items():
        if constants.get(name, choices[0]) not in choices:
            raise BadInput(f"{name} {constants[name]!r} is not one of {', '.join(choices)}")
    found, restarted = None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    for name in ("INIT", "TEACHER"):
        place = constants.get(name)
        if place and newest_checkpoint(place).parent.resolve() == Path(out).resolve():
            raise BadInput(f"{name}={place} lies in OUT={out}, which this run is to fill; choose another OUT")
    if run.first:
        out = Path(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock(run, out)
            for half in out.glob("*.tmp"):  # of a process that was killed while saving
                half.unlink()
            found = load_newest(out) if again else None
            shape = {k: v for k, v in constants.items() if k not in FREE}
            if found and "constants" not in found:
                raise BadInput(f"{out}/checkpoint.pt holds no training state; choose another OUT")
            changed = [k for k in shape if found and found["constants"].get(k, shape[k]) != shape[k]]
            if found is None:
                reason = "" if again else "starting over (RESUME=False)"
            elif changed:
                reason = "was run with " + ", ".join(f"{k}={found['constants'][k]!r}" for k in changed)
            else:  # torchrun that restarts what ended at its very end wants no second run
                reason = "is finished" if found["state"].get("finished") and not restarted else ""
            if reason:
                set_aside(out, reason)
                found = None
                out.mkdir(parents=True, exist_ok=True)
                lock(run, out)
            if found and found["state"].get("fingerprint", "") != fingerprint:
                data = "the data " + ", ".join(
                    str(constants[k]) for k in ("DATA", "MORE", "PANEL", "VALID", "SFT", "INIT", "TEACHER")
                    if constants.get(k))
                raise BadInput(f"{data} changed since this run began (fingerprint "
                               f"{found['state'].get('fingerprint')}, now {fingerprint}); restore them, or "
                               "start over with RESUME=False")
            for name in RECORDS:
                if (out / name).exists():
                    kept = [line + b"\n" for line in (out / name).read_bytes().split(b"\n")
                            if _step_of(line) <= (found["step"] if found else -1)]
                    write_whole(out / name, lambda file, kept=kept: file.writelines(kept))
        except (OSError, BadInput) as error:
            if run.lock:
                run.lock.close()
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"cannot write to OUT={out} ({error.strerror}); choose another OUT") from error
        if found:
            done, step = found["state"].get("finished"), found["step"]
            print(f"{out}: " + ("finished already" if done else f"going on from step {step}"), flush=True)
    if shard and run.world > 1:
        light = run.share(each_tensor(lambda t: t.to("meta") if t.ndim else t, found) if run.first else None)
        found = found if run.first else light
    else:
        found = run.share(found)
    if found and found["state"].get("finished"):
        stop(run)
        raise SystemExit(0)
    return found


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # half a line, from a process that was killed while writing it


def lock(run: Run, out: Path) -> None:
    """Keep a second run out of OUT while this one lives."""
    if run.lock:
        run.lock.close()
    run.lock = open(out / ".lock", "w")
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another process is training in {out}; wait for it, or choose another OUT") from None
    except OSError:  # a file system without locks
        pass


def restore(run: Run, found: dict, model: nn.Module, optimizers: Sequence) -> int:
    """Put a checkpoint's state into model, optimizers and scaler; returns the updates already done."""
    if found["sizes"] != model.sizes:
        other = {k: (found["sizes"].get(k), v) for k, v in model.sizes.items() if found["sizes"].get(k) != v}
        raise BadInput(f"the checkpoint has other sizes (saved, wanted): {other}")
    own, weights, saved = model.state_dict(), found["model"], found["optimizers"]
    if len(saved) != len(optimizers):
        raise BadInput(f"the checkpoint has {len(saved)} optimizers, {len(optimizers)} are wanted")
    if any(hasattr(p, "full_tensor") for p in own.values()):
        weights = {k: spread(run, v, own[k]) for k, v in weights.items()}
        for i, optimizer in enumerate(optimizers):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            spread_state = {n: {k: spread(run, v, params[n]) if torch.is_tensor(v) and v.ndim else v
                                for k, v in state.items()} for n, state in saved[i]["state"].items()}
            saved[i] = {**saved[i], "state": spread_state}
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    set_dtype(run, getattr(torch, found["dtype"]))
    if run.scaler and found["scaler"]:
        run.scaler.load_state_dict(found["scaler"])
    return found["step"]


class Record:
    """A run's record on process 0: bar or plain lines, OUT/metrics.jsonl, OUT/speed.jsonl, the wandb mirror.

    metrics.jsonl holds nothing that a clock decides: a resumed run repeats it to the byte. Clocks go to
    speed.jsonl.
    """

    def __init__(self, run: Run, out: str | Path, steps: int, first: int, wandb: str, constants: dict,
                 state: dict):
        self.run, self.out, self.steps, self.bar, self.mirror = run, Path(out), steps, None, None
        self.begin = self.then = time.monotonic()
        self.first_step = first
        if not run.first:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)
        if wandb != "disabled":
            try:
                import wandb as client
            except ImportError:
                raise BadInput(f"WANDB={wandb} needs: pip install wandb") from None
            state.setdefault("wandb", os.urandom(4).hex())
            for attempt in range(5):                # the service of a killed run may hold its id for ever
                try:
                    self.mirror = client.init(mode=wandb, project="nanosparse", dir=str(out),
                                              id=state["wandb"], name=Path(out).name, resume="allow",
                                              config=constants)
                    break
                except Exception as error:
                    if "in use" not in str(error) or attempt == 4:
                        raise BadInput(f"WANDB={wandb} could not begin ({_first_line(error)}); mend it, or "
                                       "go on with WANDB=disabled") from None
                    time.sleep(1)
                    if attempt == 2:
                        print(f"wandb still holds run {state['wandb']}: mirrored as another one from here on")
                        state["wandb"] = os.urandom(4).hex()

    def log(self, step: int, **values: float) -> None:
        """Write a line of metrics and show it: `step` counts finished updates; what is not finite becomes
        null."""
        self._write(step, values)
        self.show(line_of(step, values))

    def progress(self, step: int, work: float, unit: str, **values: float) -> None:
        """The same for training: `work` units were done since the last call; shows throughput and time
        left."""
        if not self.run.first:
            return
        now = time.monotonic()
        rate = work / max(1e-9, now - self.then)
        self.then = now
        self._write(step, values)
        clock = {"step": step, f"{unit}_per_s": round(rate, 1), "seconds": round(now - self.begin, 1)}
        append_line(self.out / "speed.jsonl", clock)
        if self.bar:
            self.bar.set_postfix_str(line_of(None, values) + f"  {unit}/s {rate:,.0f}")
        else:
            left = int((now - self.begin) / max(1, step - self.first_step) * (self.steps - step))
            self.show(
                f"{line_of(step, values)}  {unit}/s {rate:,.0f}  left {datetime.timedelta(seconds=left)}"
            )

    def _write(self, step: int, values: dict) -> None:
        if not self.run.first:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        append_line(self.out / "metrics.jsonl", {"step": step, **clean})
        if self.mirror:
            self.mirror.log(clean, step=step)

    def tick(self, step: int) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(step - self.bar.n)

    def show(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar:
            self.bar.write(text)
        elif self.run.first:
            print(text, flush=True)

    def close(self) -> None:
        """End bar and mirror."""
        if self.bar:
            self.bar.close()
        if self.mirror:
            self.mirror.finish()


def line_of(step: int | None, values: dict) -> str:
    """Metrics as the words of one line."""
    words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    return "  ".join(([] if step is None else [f"step {step:>6}"]) + words)


def read_metrics(out: str | Path) -> list[dict]:
    """The lines of OUT/metrics.jsonl."""
    text = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def plot_curves(out: str | Path, *panels: Sequence[str]) -> None:
    """Draw OUT/curves.png from metrics.jsonl, a panel for each list of metric names; needs matplotlib, else a
    line."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {out}/curves.png: pip install matplotlib", flush=True)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = read_metrics(out)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.8), squeeze=False)
    for axis, names in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o-" if len(points) < 40 else "-", label=name, markersize=3
                )
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(Path(out) / "curves.png", dpi=110)
    pyplot.close(figure)


# 5. Small layers.

class RMSNorm(nn.Module):
    """x / rms(x) × weight over the last dimension, computed in float32, returned in x's dtype (arXiv
    1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_table(head_dim: int, length: int, theta: float = 1e6, yarn: float = 1.0, trained: int = 0) -> Tensor:
    """cos and sin of the rotary angles, (2, length, head_dim / 2) float32 (arXiv 2104.09864).

    `yarn` > 1 stretches a context of `trained` positions by that factor: fast dimensions keep their angle,
    slow ones are interpolated, and the temperature 0.1 ln(yarn) + 1 multiplies both (YaRN, arXiv 2309.00071,
    section 3).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    speed = theta ** -exponent                               # radians per position
    scale = 1.0
    if yarn > 1:
        def dimension_of(turns):  # the dimension that makes so many turns in `trained`
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low, high = max(0, math.floor(dimension_of(32))), min(head_dim - 1, math.ceil(dimension_of(1)))
        ramp = ((torch.arange(head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        speed = speed / yarn * ramp + speed * (1 - ramp)
        scale = 0.1 * math.log(yarn) + 1
    angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
    return (torch.stack([angle.cos(), angle.sin()]) * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, E) turned by angles (B, T, E/2); pairs are (i, i + E/2), as in Llama and Qwen weights."""
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# 5.1 Inference on a CPU in C: matrix products with weights that no longer change, and a whole step of one
# token a row. A row's bits are its own, whatever the others hold. Meanwhile Python's lock is free.

STEP_PAIRS = 32_768  # of query and key: a longer chunk of one row is attended faster by torch's products
STEP_C = Path(__file__).with_name("step.c")


def _library(path: str | Path) -> ctypes.CDLL | None:
    """The shared library; None where it is not there, or damaged."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiled(command: list[str], pool: list[str], kept: Path) -> ctypes.CDLL | None:
    """The library that the command makes, with torch's threads or without any, copied to `kept` if it can be;
    None where the compiler fails."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "step.so"
        for threads in (["-fopenmp", *pool, "-Wl,--as-needed"], []):
            try:
                subprocess.run([*command, *threads, "-o", str(made), "-lm"], check=True, timeout=60,
                               capture_output=True)
            except (subprocess.SubprocessError, OSError):
                continue
            kernels = _library(made)
            if kernels is None:
                continue
            with contextlib.suppress(BadInput, OSError):  # a folder that cannot be written to
                kept.parent.mkdir(exist_ok=True)
                write_whole(kept, lambda file: file.write(made.read_bytes()))
            return kernels
    return None


@functools.cache
def step_kernels(dtype: torch.dtype, queries: int = 0, head_dim: int = 0) -> ctypes.CDLL | None:
    """STEP_C compiled for this machine, once, with the step for `queries` heads to a key head; None where
    there is no C compiler or it fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or shutil.which("g++")
    if compiler is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    flags += [f"-DR={queries}", f"-DE={head_dim}"] if queries else []
    flags += ["-mprefer-vector-width=512"] * (torch.backends.cpu.get_cpu_capability() == "AVX512")
    flags += ["-DBFLOAT16"] * (dtype == torch.bfloat16)
    pool = [str(p) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]  # torch's own threads
    about = Path("/proc/cpuinfo")
    machine = about.read_text().partition("\n\n")[0] if about.exists() else ""
    machine = [line for line in machine.splitlines() if line.startswith(("model name", "flags", "Features"))]
    known = repr((compiler, flags, machine, torch.__version__)).encode() + STEP_C.read_bytes()
    kept = STEP_C.parent / "__pycache__" / f"step-{hashlib.sha256(known).hexdigest()[:16]}.so"
    kernels = _library(kept) or _compiled([compiler, *flags, "-shared", "-fPIC", str(STEP_C)], pool, kept)
    if kernels is None:
        return None
    P, N, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kernels.product.argtypes, kernels.product.restype = [P, P, P, P, N, N, N, ctypes.c_int], None
    if queries:
        kernels.step.argtypes = [P, N, P, P, P, P, N, N, N, P, N, N, N, P, N, N, F32, F32, ctypes.c_int]
        kernels.step.restype = None
    return kernels


class FixedLinear:
    """x → x @ weightᵀ by STEP_C; `scale` (N): the weight is of 8 bits with a scale for each output."""

    def __init__(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype):
        (self.outputs, self.inputs), pair = weight.shape, 1 if weight.dtype == torch.float32 else 2
        panels = F.pad(weight, (0, 0, 0, -self.outputs % 16)).view(-1, 16, self.inputs // pair, pair)
        self.panels, self.scale = panels.transpose(1, 2).contiguous(), scale
        self.kernels = step_kernels(dtype)

    @property
    def pointers(self) -> tuple[int, int]:
        return self.panels.data_ptr(), 0 if self.scale is None else self.scale.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        self.kernels.product(*self.pointers, x.data_ptr(), y.data_ptr(), x.numel() // self.inputs,
                             self.inputs, self.outputs, torch.get_num_threads())
        return y


def fixed_linear(weight: Tensor, int8: bool = False) -> Callable[[Tensor], Tensor]:
    """x → x @ weightᵀ for a weight that no longer changes; `int8`: rounded to 8 bits with a scale for each
    output. On a CPU it is kept once more in the order in which it is read."""
    scale, dtype = None, weight.dtype
    if int8:
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-30).to(dtype)
        weight = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    if weight.device.type == "cpu" and weight.shape[1] % 2 == 0 and step_kernels(dtype) is not None:
        return FixedLinear(weight, scale, dtype)
    if int8:
        weight = (weight.float() * scale.float()[:, None]).to(dtype)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and hasattr(torch.ops, "mkldnn"):
        with contextlib.suppress(RuntimeError, AttributeError):  # private operators: they may go
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
            product = torch.ops.mkldnn._linear_pointwise
            product(weight[:1], packed, None, "none", [], "")
            return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


class SwiGLU(nn.Module):
    """down(silu(gate x) × up x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.joined = None

    def join(self, int8: bool = False) -> None:
        """For inference: read x once for gate and up."""
        self.joined = (fixed_linear(torch.cat([self.gate.weight, self.up.weight]), int8),
                       fixed_linear(self.down.weight, int8))

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None:
            gate, up = self.joined[0](x).chunk(2, -1)
            return self.joined[1](F.silu(gate) * up)
        return self.down(F.silu(self.gate(x)) * self.up(x))


# 6. Attention and its cache. Query head h reads key/value head h // (H / G) throughout.

def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The slow twin: softmax(q kᵀ / √E) v. q (B, H, T, E), k and v (B, G, S, E), keep broadcastable to (B, H,
    T, S)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


LENGTHS = [
    32,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
]  # documents are attended in groups, padded to one of these ...


def _padded(length: int) -> int:                    # ... or above them to a multiple of 256
    return LENGTHS[bisect.bisect_left(LENGTHS, length)] if length <= LENGTHS[-1] else -(-length // 256) * 256


class Documents:
    """Which token may see which, built once a batch and shared by all layers: causal, within one document.

    docs (B, T): equal neighbours are one document, -1 is padding (sees nothing, gets zeros). `positions` (B,
    T) count from each document's start. `shared` (B, T): a document goes on after so many first tokens of the
    last one before it that has 0 here, as two answers do that share their question: it sees them, and its
    positions follow theirs. On a CPU documents of like length are attended together (`groups`), so that cost
    and memory follow the documents' lengths, not T²; on CUDA `block_mask` is flex_attention's.
    """

    def __init__(self, docs: Tensor, shared: Tensor | None = None, flex: bool = True):
        B, T = docs.shape
        self.shape, self.docs, self.shared = (B, T), docs, shared
        change = torch.ones_like(docs, dtype=torch.bool)
        change[:, 1:] = docs[:, 1:] != docs[:, :-1]
        column = torch.arange(T, device=docs.device).expand(B, T)
        self.positions = column - torch.where(change, column, 0).cummax(1).values
        if shared is not None:
            self.positions += shared
            self.trunk = torch.where(change & (shared == 0), column, 0).cummax(1).values
        self.flex = flex
        self.whole = bool((column == self.positions).all())  # a document a row
        self.change = change

    def sees(self, b: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Whether the token at column t of row b sees the one at column s."""
        own = (self.docs[b, t] == self.docs[b, s]) & (t >= s)
        if self.shared is None:
            return own
        return own | (s >= self.trunk[b, t]) & (s < self.trunk[b, t] + self.shared[b, t])

    def keep(self) -> Tensor:
        """The same for all: (B, 1, T, T)."""
        rows, columns = (torch.arange(n, device=self.docs.device) for n in self.shape)
        return self.sees(rows[:, None, None], columns[:, None], columns)[:, None]

    @functools.cached_property
    def block_mask(self):
        """flex_attention's mask, compiled for a shape (so not for prompts); None without `flex`."""
        if not self.flex or self.docs.device.type != "cuda":
            return None
        B, T = self.shape
        return _flex()[1](lambda b, h, t, s: self.sees(b, t, s), B, None, T, T, device=self.docs.device)

    @functools.cached_property
    def groups(self) -> list[tuple[int, Tensor, Tensor | None]]:
        """(length L, flat index (N L) of tokens, mask (N, 1, 1, L, 1) of its own ones or None) of each group:
        neither what fills up a row nor a document's copy of what it shares is its own."""
        docs, change = (x.cpu().numpy().ravel() for x in (self.docs, self.change))
        starts = np.flatnonzero(change)
        lengths = np.diff(np.append(starts, len(docs)))
        copied, trunks = np.zeros_like(starts), starts
        if self.shared is not None:
            copied, trunks = (x.cpu().numpy().ravel()[starts] for x in (self.shared, self.trunk))
            trunks = starts // self.shape[1] * self.shape[1] + trunks
        real = docs[starts] >= 0
        starts, lengths, copied, trunks = (x[real, None] for x in (starts, lengths, copied, trunks))
        groups, back, slots, device = [], np.full(len(docs), -1), 0, self.docs.device
        padded, copies = np.array([_padded(n) for n in (lengths + copied)[:, 0]]), []
        for L in np.unique(padded):
            start, length, before, trunk = (x[padded == L] for x in (starts, lengths, copied, trunks))
            place = np.arange(L) - before                                      # (N, L) in the document itself
            own = (place >= 0) & (place < length)
            index = np.where(own, start + place, np.where(place < 0, trunk + np.arange(L), start))
            back[index[own]] = slots + np.flatnonzero(own.ravel())
            copy = np.flatnonzero((place < 0).ravel())
            copies.append((index.ravel()[copy], slots + copy))
            mask = None if own.all() else torch.from_numpy(own[:, None, None, :, None]).to(device)
            groups.append((int(L), torch.from_numpy(index.ravel()).to(device), mask))
            slots += own.size
        back[back < 0] = slots  # padding reads the zero row at the end
        self.back, self.slots = torch.from_numpy(back).to(device), slots
        self.copies = None
        if self.shared is not None and copies:
            self.copies = [torch.from_numpy(np.concatenate(x)).to(device) for x in zip(*copies, strict=True)]
        return groups

    def ungrouped(self, slots: Tensor, add: bool = False) -> Tensor:
        """Rows (B T, F) of the groups' slots (slots + 1, F), the last one zero; `add`: what copies of shared
        tokens hold is added to theirs, as gradients are."""
        rows = slots.index_select(0, self.back)
        if add and self.copies:
            rows.index_add_(0, self.copies[0], slots.index_select(0, self.copies[1]))
        return rows


@torch.compiler.disable
def attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents. q (B, H, T, E), k and v (B, G, T, E) → (B, H, T, E). Twin: `attend`.

    CPU: grouped documents, query blocks of 128 against the keys before them, recomputed in backward (memory
    O(T)). CUDA: flex_attention (arXiv 2412.05496). Elsewhere: scaled_dot_product_attention with a mask.
    """
    if q.device.type == "cpu":
        return _GroupedAttention.apply(q, k, v, documents)
    if documents.block_mask is not None:
        return _flex()[0](q, k, v, block_mask=documents.block_mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, documents.keep(), enable_gqa=True)


def _flex() -> tuple[Callable, Callable]:
    if not hasattr(_flex, "made"):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        _flex.made = torch.compile(flex_attention), torch.compile(create_block_mask)
    return _flex.made


def exact_products(method: Callable) -> Callable:
    """The method of an autograd.Function, its float32 products on a CPU by oneDNN where these are exact.

    `start` asks for the same everywhere; this holds in programs without it.
    """
    @functools.wraps(method)
    def inner(ctx, x, *rest):
        if x.device.type != "cpu" or x.dtype != torch.float32 or not _onednn_is_exact():
            return method(ctx, x, *rest)
        setting = _onednn_setting()
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            return method(ctx, x, *rest)
        finally:
            setting.fp32_precision = before
    return inner


CHUNK = 128  # queries per block; 64 and keeping the weights were no faster, 256 slower (two AVX512 cores)


class _GroupedAttention(torch.autograd.Function):
    """attend_documents on a CPU. Scores stay in q's dtype (bfloat16: 8 bits); softmax itself sums in
    float32."""

    @staticmethod
    @exact_products
    def forward(ctx, q, k, v, documents):
        ctx.save_for_backward(q, k, v)
        ctx.documents = documents
        outs = [_attend_blocks(*(_gather(x, index, L, k.shape[1]) for x in (q, k, v)))
                for L, index, _ in documents.groups]
        return _scatter(outs, documents, q)

    @staticmethod
    @exact_products
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grads = []
        for L, index, own in ctx.documents.groups:
            parts = [_gather(x, index, L, k.shape[1]) for x in (q, k, v, grad)]
            if own is not None:
                parts[3].mul_(own)
            grads.append(_attend_blocks_backward(*parts))
        dq, dk, dv = (_scatter([g[i] for g in grads], ctx.documents, x, add=True)
                      for i, x in enumerate((q, k, v)))
        return dq, dk, dv, None


def _gather(x: Tensor, index: Tensor, L: int, G: int) -> Tensor:
    """Rows of x (B, H, T, E) chosen by flat token index (N L) → (N, G, H/G, L, E)."""
    H, E = x.shape[1], x.shape[3]
    rows = x.transpose(1, 2).reshape(-1, H * E).index_select(0, index)
    return rows.view(-1, L, G, H // G, E).permute(0, 2, 3, 1, 4).contiguous()


def _scatter(parts: Sequence[Tensor], documents: Documents, like: Tensor, add: bool = False) -> Tensor:
    """The inverse: parts (N, G, R, L, E) of every group → (B, H, T, E); padding gets zeros."""
    H, E = like.shape[1], like.shape[3]
    slots, at = like.new_empty(documents.slots + 1, H * E), 0
    slots[-1] = 0
    for part in parts:
        N, G, R, L, _ = part.shape
        slots[at:at + N * L].view(N, L, G, R, E).copy_(part.permute(0, 3, 1, 2, 4))
        at += N * L
    B, T = documents.shape
    return documents.ungrouped(slots, add).view(B, T, H, E).transpose(1, 2)


class _Regroup(torch.autograd.Function):
    """x (B, T, F) → (N, L, F) of every group of documents; what fills up a row gives no gradient, what stands
    in several documents that of all."""

    @staticmethod
    def forward(ctx, x, documents):
        ctx.documents, rows = documents, x.reshape(-1, x.shape[-1])
        return tuple(rows.index_select(0, index).view(-1, L, x.shape[-1]) for L, index, _ in documents.groups)

    @staticmethod
    def backward(ctx, *grads):
        return _ungroup(grads, ctx.documents, add=True), None


class _Ungroup(torch.autograd.Function):
    """The inverse: (N, L, F) of every group → (B, T, F), zeros at padding."""

    @staticmethod
    def forward(ctx, documents, *parts):
        ctx.documents = documents
        return _ungroup(parts, documents)

    @staticmethod
    def backward(ctx, grad):
        rows, grads = grad.reshape(-1, grad.shape[-1]), []
        for L, index, own in ctx.documents.groups:
            part = rows.index_select(0, index).view(-1, L, grad.shape[-1])
            grads.append(part if own is None else part * own.view(-1, L, 1))
        return None, *grads


def _ungroup(parts: Sequence[Tensor], documents: Documents, add: bool = False) -> Tensor:
    slots = torch.cat([*(p.flatten(0, 1) for p in parts), parts[0].new_zeros(1, parts[0].shape[-1])])
    return documents.ungrouped(slots, add).view(*documents.shape, -1)


@torch.compiler.disable
def by_document(attend_rows: Callable, documents: Documents, *tensors: Tensor) -> Tensor:
    """`attend_rows(*tensors)` (B, T, F) → (B, T, F'), causal along T, of documents as if each had a row of
    its own."""
    if documents.whole:
        return attend_rows(*tensors)
    grouped = [_Regroup.apply(x, documents) for x in tensors]
    return _Ungroup.apply(documents, *(attend_rows(*part) for part in zip(*grouped, strict=True)))


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _block_weights(queries: Tensor, k: Tensor, begin: int, end: int, shape: torch.Size) -> Tensor:
    """Weights (N G, R C, end) of queries begin..end (N G, R C, E) on the keys before them."""
    N, G, R, L, E = shape
    C = end - begin
    scores = _scaled_bmm(queries, k.view(N * G, L, E)[:, :end].transpose(1, 2), E ** -0.5)
    future = torch.full((C, C), -math.inf, dtype=k.dtype).triu_(1)
    scores.view(N * G, R, C, end)[..., begin:].add_(future)
    return scores.softmax(-1)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, G, R, L, E), k and v (N, G, 1, L, E) → output like q."""
    N, G, R, L, E = q.shape
    out = torch.empty_like(q)
    for begin in range(0, L, CHUNK):
        end = min(begin + CHUNK, L)
        weights = _block_weights(q[:, :, :, begin:end].reshape(N * G, -1, E), k, begin, end, q.shape)
        part = torch.bmm(weights, v.view(N * G, L, E)[:, :end])
        out[:, :, :, begin:end] = part.view(N, G, R, end - begin, E)
    return out


def _attend_blocks_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, block by block; the weights are made again."""
    N, G, R, L, E = q.shape
    flat_k, flat_v = k.view(N * G, L, E), v.view(N * G, L, E)
    dq, dk, dv = torch.empty_like(q), None, None
    for begin in reversed(range(0, L, CHUNK)):  # the last block sees all keys: its dk, dv begin the sums
        end = min(begin + CHUNK, L)
        queries, g = (x[:, :, :, begin:end].reshape(N * G, -1, E) for x in (q, grad))
        weights = _block_weights(queries, k, begin, end, q.shape)
        dweights = torch.bmm(g, flat_v[:, :end].transpose(1, 2))
        dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
        dq_part = _scaled_bmm(dscores, flat_k[:, :end], E ** -0.5)
        dq[:, :, :, begin:end] = dq_part.view(N, G, R, end - begin, E)
        dk_part = _scaled_bmm(dscores.transpose(1, 2), queries, E ** -0.5)
        dv_part = torch.bmm(weights.transpose(1, 2), g)
        if dk is None:  # several blocks add up in float32
            wide = torch.promote_types(q.dtype, torch.float32) if begin else q.dtype
            dk, dv = dk_part.to(wide), dv_part.to(wide)
        else:
            dk[:, :end] += dk_part
            dv[:, :end] += dv_part
    return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


# Sliding window: tiles of SPAN queries against the spans of keys that hold their windows. Here and in section
# 7 tensors are (B, T, G, R, E) inside, R = H / G, a group's heads side by side; branches add to what they are
# given, and backward makes the weights again. Temporaries have about WORKSPACE elements: much larger ones are
# mapped anew from the system each time, which costs ten times the work that is done on them.

WORKSPACE, SPAN = 2**19, 64


@torch.compiler.disable
def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention to the last `window` tokens. q (B, H, T, E), k and v (B, G, T, E) → (B, H, T, E)."""
    return _WindowAttention.apply(q, k, v, window)


def _by_group(x: Tensor, G: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (G, -1)).contiguous()                         # (B, T, G, R, E)


class _WindowAttention(torch.autograd.Function):

    @staticmethod
    @exact_products
    def forward(ctx, q, k, v, window):
        q = _by_group(q, k.shape[1])
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        out = torch.zeros_like(q)
        _window(q, k, v, None, window, out)
        return out.flatten(2, 3).transpose(1, 2)

    @staticmethod
    @exact_products
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), *(x.new_zeros(x.shape, dtype=wide) for x in (k, v))
        _window_backward(q, k, v, None, ctx.window, _by_group(dout, k.shape[1]), dq, dk, dv, None)
        return dq.flatten(2, 3).transpose(1, 2), dk.to(k.dtype), dv.to(v.dtype), None


def _window_spans(B: int, G: int, T: int, R: int, E: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, m): spans of queries and how many spans of keys each sees."""
    m = -(-min(window, T) // SPAN) + 1
    step = max(1, WORKSPACE // (B * G * SPAN * R * max(m * SPAN, E)))
    for begin in range(0, -(-T // SPAN), step):
        yield begin, min(begin + step, -(-T // SPAN)), m


def _keys_of_spans(x: Tensor, begin: int, end: int, m: int) -> Tensor:
    """Keys (B G n, m SPAN, E) of spans begin..end of x (B, G, T, E), each behind the m - 1 spans before
    it."""
    low = (begin - m + 1) * SPAN
    part = x[:, :, max(0, low):end * SPAN].flatten(0, 1)
    part = F.pad(part, (0, 0, max(0, -low), (end - begin + m - 1) * SPAN - part.shape[1] - max(0, -low)))
    return part.unfold(1, m * SPAN, SPAN).transpose(2, 3).reshape(-1, m * SPAN, x.shape[-1])


def _spans(x: Tensor, begin: int, end: int) -> Tensor:
    """Spans begin..end of queries x (B, T, G, R, E) as (B G n, SPAN R, E)."""
    part = x[:, begin * SPAN:end * SPAN].transpose(1, 2)
    if part.shape[2] % SPAN:
        part = F.pad(part, (0, 0, 0, 0, 0, -part.shape[2] % SPAN))
    return part.reshape(-1, SPAN * x.shape[3], x.shape[4])


def _put_spans(total: Tensor, begin: int, part: Tensor, add: bool) -> None:
    """Add, or set, queries of total (B, T, G, R, E) from spans (B G n, SPAN R, E)."""
    B, _, G, R, E = total.shape
    target = total[:, begin * SPAN:].transpose(1, 2)
    part = part.view(B, G, -1, R, E)[:, :, :target.shape[2]]
    target = target[:, :, :part.shape[2]]
    target.add_(part) if add else target.copy_(part)


def _add_keys(total: Tensor, begin: int, end: int, m: int, part: Tensor) -> None:
    """Add gradients (B G n, m SPAN, E) of `_keys_of_spans` to total (B, G, T, E)."""
    B, G, T, E = total.shape
    part = part.view(B, G, end - begin, m, SPAN, E)
    for j in range(m):
        low = (begin - m + 1 + j) * SPAN
        skip = max(0, -low)
        flat = part[:, :, :, j].flatten(2, 3)[:, :, skip:]
        room = total[:, :, low + skip:low + skip + flat.shape[2]]
        room += flat[:, :, :room.shape[2]]


def _window_weights(queries: Tensor, keys: Tensor, begin: int, end: int, R: int, window: int) -> Tensor:
    """Weights (B G n, SPAN R, m SPAN)."""
    n, width, device = end - begin, keys.shape[1], keys.device
    logits = _scaled_bmm(queries, keys.transpose(1, 2), keys.shape[-1] ** -0.5)
    back = torch.arange(SPAN, device=device)[:, None] + width - SPAN - torch.arange(width, device=device)
    outside = torch.zeros(back.shape, dtype=keys.dtype, device=device)
    outside.masked_fill_((back < 0) | (back >= window), -math.inf)
    logits.view(-1, SPAN, R, width).add_(outside[:, None])
    for i in range(min(n, max(0, width // SPAN - 1 - begin))):             # keys before the beginning
        logits.view(-1, n, SPAN * R, width)[:, i, :, :width - (begin + i + 1) * SPAN] = -math.inf
    return logits.softmax(-1)


def _window(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, window: int, out: Tensor) -> None:
    """Add gate × attention to the last `window` tokens to out."""
    B, T, G, R, E = q.shape
    for begin, end, m in _window_spans(B, G, T, R, E, window):
        p = _window_weights(_spans(q, begin, end), _keys_of_spans(k, begin, end, m), begin, end, R, window)
        o = torch.bmm(p, _keys_of_spans(v, begin, end, m))
        _put_spans(out, begin, o if gate is None else o.mul_(_spans(gate, begin, end)), add=True)


def _window_backward(q, k, v, gate, window, dout, dq, dk, dv, dgate) -> None:
    """Set dq and dgate, add to dk and dv."""
    B, T, G, R, E = q.shape
    for begin, end, m in _window_spans(B, G, T, R, E, window):
        queries, keys, values = _spans(q, begin, end), *(_keys_of_spans(x, begin, end, m) for x in (k, v))
        p, grads = _window_weights(queries, keys, begin, end, R, window), _spans(dout, begin, end)
        if gate is not None:
            dot = (torch.bmm(p, values) * grads).sum(-1, keepdim=True)     # out · dout
            _put_spans(dgate[..., None], begin, dot, add=False)
            grads = grads * _spans(gate, begin, end)
        _add_keys(dv, begin, end, m, torch.bmm(p.transpose(1, 2), grads))
        dp = torch.bmm(grads, values.transpose(1, 2))
        torch._softmax_backward_data(dp, p, -1, q.dtype, grad_input=dp)    # now of the logits
        _add_keys(dk, begin, end, m, _scaled_bmm(dp.transpose(1, 2), queries, E ** -0.5))
        _put_spans(dq, begin, _scaled_bmm(dp, keys, E ** -0.5), add=False)


class Cache:
    """What each row has read: per layer the tensors that its attention's `memory` makes; lengths on the
    host; `ids` where the model looks at the tokens before each."""

    def __init__(self, model: nn.Module, rows: int, length: int):
        self.layers = [layer.attention.memory(rows, length, model.head_weight) for layer in model.layers]
        self.lengths, self.parts, self.table = [0] * rows, {}, []
        self.ids = torch.zeros(rows, length * bool(model.before), dtype=torch.long,
                               device=model.head_weight.device)

    def rows(self, begin: int, end: int) -> "Cache":
        """Rows begin to end of this cache: the same memory, lengths of their own."""
        if (begin, end) not in self.parts:
            part = self.parts[begin, end] = copy.copy(self)
            part.layers = [{name: x[begin:end] for name, x in memory.items()} for memory in self.layers]
            part.parts, part.table, part.ids = {}, [], self.ids[begin:end]
        part = copy.copy(self.parts[begin, end])
        part.lengths = self.lengths[begin:end]
        return part


@dataclasses.dataclass
class Reading:
    """T more tokens of each row, for all layers alike: lengths before, how many each row reads (the rest is
    padding), their columns (B, T), and what they see: Documents when the cache was empty, else
    attend_cached's bias; `width` > 0: it is over so many columns, not only up to the longest row."""
    before: list[int]
    lengths: list[int]
    columns: Tensor
    sees: Documents | Tensor | None
    width: int = 0


def write_cache(cache: Tensor, x: Tensor, reading: Reading) -> Tensor:
    """Put x (B, G, T, E) behind what each row holds in cache (B, G, S, E); returns all up to the longest
    row, or `width` columns."""
    T, longest = x.shape[2], max(reading.before)
    if min(reading.before) == longest:
        cache[:, :, longest:longest + T] = x
    else:
        rows = torch.arange(len(x), device=x.device)[:, None]
        cache[rows, :, reading.columns] = x.transpose(1, 2)
    return cache[:, :, :reading.width or longest + T]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, T, E) over cached k, v (B, G, S, E) with bias (B, T, S), 0 or -inf, None = all; softmax in
    float32.

    Two batched products: for one query, 3.5 times faster here than scaled_dot_product_attention. Twin:
    `attend`.
    """
    B, H, T, E = q.shape
    G, S = k.shape[1:3]
    scores = _scaled_bmm(q.reshape(B * G, -1, E), k.flatten(0, 1).transpose(1, 2), E ** -0.5).view(B, H, T, S)
    if bias is not None:
        scores = scores + bias[:, None]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.bmm(weights.view(B * G, -1, S), v.flatten(0, 1)).view(B, H, T, E)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and QK-norm (arXiv 2305.13245, 2010.04245).

    `window` > 0: to the last so many tokens only, the query's own included."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm: bool = True,
                 window: int = 0):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.window = n_heads, n_kv_heads, head_dim, window
        self.q = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.norm_q = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.joined = self.joined_norm = None

    def join(self, int8: bool = False) -> None:
        """For inference: read x once for q, k and v."""
        self.joined = (fixed_linear(torch.cat([self.q.weight, self.k.weight, self.v.weight]), int8),
                       fixed_linear(self.out.weight, int8))
        if isinstance(self.norm_q, RMSNorm):
            self.joined_norm = torch.cat([n.weight.expand(h, -1) for n, h in
                                          ((self.norm_q, self.n_heads), (self.norm_k, self.n_kv_heads))])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q, k, v = self.project(x, cos, sin)
        if self.window:
            flat = (h.transpose(1, 2).flatten(2) for h in (q, k, v))
            return self.out(by_document(self.attend_rows, documents, *flat))
        y = attend_documents(q, k, v, documents)                                   # (B, H, T, E)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The window's attention, heads side by side: (B, T, H E), (B, T, G E) → (B, T, H E)."""
        heads = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return attend_window(*heads, self.window).transpose(1, 2).flatten(2)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, E), rotated keys and values (B, G, T, E)."""
        if self.joined is not None:
            heads = self.joined[0](x).unflatten(-1, (-1, self.head_dim))
            qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)
            if self.joined_norm is not None:
                qk = F.rms_norm(qk, (self.head_dim,), None, self.norm_q.eps) * self.joined_norm
            q, k = rotate(qk, cos, sin).split([self.n_heads, self.n_kv_heads], 2)
        else:
            q = rotate(self.norm_q(self.q(x).unflatten(-1, (-1, self.head_dim))), cos, sin)
            k = rotate(self.norm_k(self.k(x).unflatten(-1, (-1, self.head_dim))), cos, sin)
            v = self.v(x).unflatten(-1, (-1, self.head_dim))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def memory(self, rows: int, length: int, like: Tensor) -> dict[str, Tensor]:
        """Room for the keys and values of `length` tokens of each row."""
        shape = rows, self.n_kv_heads, length, self.head_dim
        return {"k": like.new_zeros(shape), "v": like.new_zeros(shape)}

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, memory: dict, reading: Reading) -> Tensor:
        """forward for T more tokens of each row, which are added to `memory`."""
        q, k, v = self.project(x, cos, sin)
        keys, values = write_cache(memory["k"], k, reading), write_cache(memory["v"], v, reading)
        sees = reading.sees
        if isinstance(sees, Documents):
            y = attend_window(q, k, v, self.window) if self.window else attend_documents(q, k, v, sees)
        elif self.window and sees is None:
            y = attend_cached(q, keys[:, :, -self.window:], values[:, :, -self.window:], None)
        else:
            if self.window:
                column = torch.arange(keys.shape[2], device=x.device)
                sees = sees.masked_fill(column <= reading.columns[:, :, None] - self.window, -math.inf)
            y = attend_cached(q, keys, values, sees)
        return (self.joined[1] if self.joined else self.out)(y.transpose(1, 2).flatten(2))


# 7. Sparse attention.

@dataclasses.dataclass(frozen=True)
class Cut:
    """How native sparse attention cuts time: tokens of the sliding window (the query's own included), tokens
    and stride of compressed blocks, tokens of selection blocks and how many of them a query chooses.

    `n_selected` counts the first block and the `local_blocks` before the query's own, where these are always
    chosen; the own block is attended besides, causally. Raises BadInput on blocks that do not divide.
    """
    window: int = 64
    compress_block: int = 16
    compress_stride: int = 16
    select_block: int = 16
    n_selected: int = 4
    first_block: bool = False
    local_blocks: int = 0

    def __post_init__(self):
        divisible(WINDOW=(self.window, 1), N_SELECTED=(self.n_selected, 1),
                  COMPRESS_STRIDE=(self.compress_stride, 1),
                  COMPRESS_BLOCK=(self.compress_block, self.compress_stride),
                  SELECT_BLOCK=(self.select_block, self.compress_stride))
        within(0, self.n_selected - self.first_block, LOCAL_BLOCKS=self.local_blocks)

    @property
    def plain(self) -> bool:
        """Whether every block before a query's own has a score of its own and none is always chosen."""
        even = self.compress_block == self.compress_stride == self.select_block
        return even and not self.first_block and not self.local_blocks

    def fits_flex(self) -> bool:
        """Whether flex_attention has tiles of the size of the selection blocks."""
        return self.select_block >= 16 and self.select_block & (self.select_block - 1) == 0

    def finished(self, t: Tensor | int) -> Tensor | int:
        """Compressed blocks that query t sees: those whose last token is t or before it."""
        number = (t + 1 - self.compress_block) // self.compress_stride + 1
        return number.clamp(min=0) if isinstance(number, Tensor) else max(0, number)

    def overlaps(self) -> list[tuple[int, int]]:
        """(offset, weight): compressed block j·select/stride + offset shares `weight` strides with selection
        block j (NSA, eq. 9)."""
        a, b = self.compress_block // self.compress_stride, self.select_block // self.compress_stride
        shared = [(o, min(o + a, b) - max(o, 0)) for o in range(1 - a, b)]
        return [(o, w) for o, w in shared if w > 0]


def importance(p: Tensor, cut: Cut, n_blocks: int) -> Tensor:
    """p (..., N) on compressed blocks → (..., n_blocks) on selection blocks (arXiv 2502.11089, eq. 9)."""
    if cut.compress_block == cut.select_block == cut.compress_stride:
        return F.pad(p, (0, n_blocks - p.shape[-1])) if n_blocks != p.shape[-1] else p
    ratio, before = cut.select_block // cut.compress_stride, cut.compress_block // cut.compress_stride
    p = F.pad(p, (before, max(0, n_blocks * ratio + ratio - p.shape[-1])))
    return sum(w * p[..., before + o:, ][..., :n_blocks * ratio:ratio] for o, w in cut.overlaps())


def _later_first(scores: Tensor) -> Tensor:
    """Scores (..., S) rounded to 12 bits (float64: 33), with the block's number in the bits below: blocks of
    the same tokens have the same score but for rounding, and every execution must choose the same of them."""
    wide, whole, low = (torch.float64, torch.int64, 20) if scores.dtype == torch.float64 else (
        torch.float32, torch.int32, 12)
    number = torch.arange(scores.shape[-1], dtype=whole, device=scores.device) % 2**low
    bits = scores.detach().to(wide).view(whole) + 2**(low - 1)
    return bits.bitwise_and_(-2**low).bitwise_or_(number).view(wide)


def choose_blocks(scores: Tensor, t: Tensor, cut: Cut, settled: int = 0) -> Tensor:
    """The K selection blocks of each query, best first, -1 where there are fewer: (..., K) int64.

    scores (..., S) from `importance`; t broadcasts with (..., 1), the queries' positions. Candidates lie
    before the query's own block; of equal ones the later comes first. Those that no finished compressed block
    touches have no score: the nearest of them come after all others. Columns below `settled` are known to be
    candidates with scores.
    """
    S, K = scores.shape[-1], min(cut.n_selected, scores.shape[-1])
    scores = _later_first(scores)
    if settled == S and cut.plain:
        return F.pad(scores.topk(K, -1).indices, (0, cut.n_selected - K), value=-1)
    block = torch.arange(settled, S, device=scores.device)
    own = t // cut.select_block
    touched = ((cut.finished(t) - 1) * cut.compress_stride + cut.compress_block)
    touched = torch.where(cut.finished(t) > 0, -(-touched // cut.select_block), 0)
    late = torch.where(block < touched, scores[..., settled:], (block - own).to(scores.dtype))
    if cut.local_blocks:
        late = torch.where(block >= own - cut.local_blocks, 1e20 + 1e15 * block, late)
    late = late.masked_fill(block >= own, -math.inf)
    scores = torch.cat([scores[..., :settled], late], -1) if settled else late
    if cut.first_block and S:
        scores = torch.cat([torch.where(own > 0, 1e30, -math.inf).expand_as(scores[..., :1]).to(scores.dtype),
                            scores[..., 1:]], -1)
    best, chosen = scores.topk(K, -1)
    chosen = chosen.masked_fill(best == -math.inf, -1)
    return F.pad(chosen, (0, cut.n_selected - K), value=-1)


def attend_sparse_dense(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor,
                        gates: Tensor, cut: Cut) -> Tensor:
    """The slow twin of `attend_sparse`: the same by dense masks, O(T²) memory."""
    (_, H, T, E), G = q.shape, k.shape[1]
    s, R = torch.arange(T, device=q.device), H // G
    t = s[:, None]
    # 1. compressed
    N = cut.finished(T - 1)
    memory = ck.shape[2] - N
    keep = torch.arange(-memory, N, device=q.device) < cut.finished(t)
    some = keep.any(-1, keepdim=True)                                      # else the branch gives zero
    logits = q @ ck.repeat_interleave(R, 1).transpose(-1, -2) / math.sqrt(E)
    p = logits.masked_fill(~keep & some, -math.inf).softmax(-1) * keep
    out = gates[..., 0].transpose(1, 2)[..., None] * (p @ cv.repeat_interleave(R, 1))
    # 2. selected; the factor 1 + score - score.detach() on a chosen block's weights is 1, its gradient is not
    n_blocks = -(-T // cut.select_block)
    scores = importance(p[..., memory:].unflatten(1, (G, R)).sum(2), cut, n_blocks)     # (B, G, T, S)
    chosen = choose_blocks(scores, t, cut)
    member = torch.zeros_like(scores, dtype=torch.bool)
    member = torch.cat([member, member[..., :1]], -1).scatter(-1, chosen % (n_blocks + 1), True)[..., :-1]
    own = s // cut.select_block == t // cut.select_block
    keep = (member[..., s // cut.select_block] | own) & (s <= t)                        # (B, G, T, S)
    bias = (scores - scores.detach())[..., s // cut.select_block].masked_fill(own, 0)
    keep, bias = keep.repeat_interleave(R, 1), bias.repeat_interleave(R, 1)
    logits = turned @ k.repeat_interleave(R, 1).transpose(-1, -2) / math.sqrt(E)
    p = (logits + bias).masked_fill(~keep, -math.inf).softmax(-1)
    out = out + gates[..., 1].transpose(1, 2)[..., None] * (p @ v.repeat_interleave(R, 1))
    # 3. sliding window
    p = logits.masked_fill((s > t) | (s <= t - cut.window), -math.inf).softmax(-1)
    return out + gates[..., 2].transpose(1, 2)[..., None] * (p @ v.repeat_interleave(R, 1))


@torch.compiler.disable
def attend_sparse(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, gates: Tensor,
                  cut: Cut) -> Tensor:
    """Native sparse attention (arXiv 2502.11089, eq. 5-12) → (B, H, T, E). Twin: `attend_sparse_dense`.

    q (B, H, T, E) queries for the compressed keys ck, values cv (B, G, M + N, E), the first M always seen;
    `turned` the same queries with rotary positions, for k, v (B, G, T, E) of the selected and window
    branches; gates (B, T, H, 3) of compressed, selected, window. A group's heads share their selection, by
    the sum of their probabilities; a straight-through factor on each chosen block's weights trains it. Plain
    torch, memory O(T).
    """
    if q.device.type == "cuda" and cut.fits_flex() and q.shape[2] % 128 == 0:  # not prompts
        return attend_sparse_flex(q, turned, k, v, ck, cv, gates, cut)
    return _SparseAttention.apply(q, turned, k, v, ck, cv, gates, cut)


def attend_sparse_flex(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, gates: Tensor,
                       cut: Cut) -> Tensor:
    """`attend_sparse` with selected and window branches by compiled flex_attention (arXiv 2412.05496).

    Its block masks come straight from the chosen blocks. On a CPU forward only, and there a third as fast. A
    score that is zero carries the straight-through gradient to the compressed branch.
    """
    compressed, chosen, scores = _CompressedAttention.apply(q, ck, cv, cut)
    (B, H, T, E), G = q.shape, k.shape[1]
    turned, k, v = turned.reshape(B * G, H // G, T, E), k.reshape(B * G, 1, T, E), v.reshape(B * G, 1, T, E)
    chosen, scores, S = chosen.flatten(0, 1), scores.flatten(0, 1), cut.select_block

    def keep(b, h, t, s):
        hit = (s // S == t // S) & (s <= t)
        for i in range(cut.n_selected):
            hit = hit | (chosen[b, t, i] == s // S)
        return hit

    def factor(score, b, h, t, s):
        for i in range(cut.n_selected):
            score = score + torch.where(chosen[b, t, i] == s // S, scores[b, t, i], 0.0)
        return score
    attend_blocks, train = _flex()[0], torch.is_grad_enabled() and turned.requires_grad
    mask = _chosen_mask(chosen, cut, keep, train)
    selected = attend_blocks(turned, k, v, factor if train else None, mask, enable_gqa=True)
    window = attend_blocks(turned, k, v, block_mask=_window_mask(T, cut.window, q.device), enable_gqa=True)
    parts = torch.stack([compressed, selected.view_as(compressed), window.view_as(compressed)], -1)
    return (parts * gates.transpose(1, 2)[..., None, :]).sum(-1)


def _chosen_mask(chosen: Tensor, cut: Cut, keep: Callable, train: bool):
    """BlockMask of the blocks that each span of select_block queries chose (B, T, K), and its own."""
    from torch.nn.attention.flex_attention import BlockMask
    (B, T, K), S = chosen.shape, cut.select_block
    N = -(-T // S)
    own = torch.arange(N, device=chosen.device, dtype=torch.int32)[None, :, None].expand(B, -1, 1)
    wanted = F.pad(chosen, (0, 0, 0, N * S - T), value=-1).view(B, N, S * K)
    wanted = torch.cat([torch.where(wanted < 0, own, wanted), own], -1).sort(-1).values
    again = torch.zeros_like(wanted, dtype=torch.bool)
    again[..., 1:] = wanted[..., 1:] == wanted[..., :-1]
    wanted = wanted.masked_fill(again, N).sort(-1).values                  # each block once, in order
    count = (~again).sum(-1, dtype=torch.int32)
    wanted = F.pad(wanted, (0, max(0, N - wanted.shape[-1])))[..., :N].clamp(max=N - 1)
    return BlockMask.from_kv_blocks(count[:, None], wanted[:, None].int(), BLOCK_SIZE=S, mask_mod=keep,
                                    seq_lengths=(T, T), compute_q_blocks=train)


@functools.lru_cache(maxsize=16)
def _window_mask(T: int, window: int, device: torch.device):
    """BlockMask of a sliding window, built from block indices: no (T, T) tensor."""
    from torch.nn.attention.flex_attention import BlockMask
    N, wide = -(-T // 128), -(-(window - 1) // 128) + 1
    row = torch.arange(N, device=device, dtype=torch.int32)
    count = (row + 1).clamp(max=wide)
    first = row - count + 1
    index = (first[:, None] + torch.arange(N, device=device, dtype=torch.int32)).clamp(max=N - 1)

    def keep(b, h, t, s):
        return (s <= t) & (s > t - window)
    return BlockMask.from_kv_blocks(count[None, None], index[None, None], mask_mod=keep, seq_lengths=(T, T))


class _SparseAttention(torch.autograd.Function):

    @staticmethod
    @exact_products
    def forward(ctx, q, turned, k, v, ck, cv, gates, cut):
        G = k.shape[1]
        q, turned, gates = _by_group(q, G), _by_group(turned, G), gates.unflatten(2, (G, -1))
        out = torch.zeros_like(q)
        chosen = _compressed(q, ck, cv, gates[..., 0, None], cut, out)
        _selected(turned, k, v, chosen, gates[..., 1, None], cut, out)
        _window(turned, k, v, gates[..., 2, None], cut.window, out)
        ctx.save_for_backward(q, turned, k, v, ck, cv, gates, chosen)
        ctx.cut = cut
        return out.flatten(2, 3).transpose(1, 2)

    @staticmethod
    @exact_products
    def backward(ctx, dout):
        q, turned, k, v, ck, cv, gates, chosen = ctx.saved_tensors
        G, cut = k.shape[1], ctx.cut
        dout, dgates = _by_group(dout, G), torch.empty_like(gates)
        wide = torch.promote_types(q.dtype, torch.float32)
        dturned = torch.empty_like(q)
        dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
        _window_backward(turned, k, v, gates[..., 2, None], cut.window, dout, dturned, dk, dv, dgates[..., 2])
        dscores = _selected_backward(turned, k, v, chosen, gates[..., 1, None], cut, dout, dturned, dk, dv,
                                     dgates[..., 1])
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        dq, dck, dcv = torch.zeros_like(q), *(x.new_zeros(x.shape, dtype=wide) for x in (ck, cv))
        _compressed_backward(q, ck, cv, gates[..., 0, None], cut, dout, chosen, dscores, dq, dck, dcv,
                             dgates[..., 0])
        dq, dturned = (x.flatten(2, 3).transpose(1, 2) for x in (dq, dturned))
        return (dq, dturned, dk, dv, dck.to(ck.dtype), dcv.to(cv.dtype),
                dgates.flatten(2, 3), None)


# 7.1 Compressed blocks: spans of queries against the blocks that the last of them sees.

def _compressed_spans(q: Tensor, memory: int, cut: Cut) -> Iterator[tuple[int, int, int]]:
    """(begin, end, columns): queries begin..end see at most so many compressed blocks and memories."""
    B, T, G, R, _ = q.shape
    begin = 0 if memory else min(T, cut.compress_block - 1)      # before it there is nothing to see
    if begin:
        yield 0, begin, 0
    while begin < T:
        size = WORKSPACE // (B * G * R * (memory + cut.finished(begin + 256)))
        end = min(T, begin + min(max(size // 16 * 16, 128), 256))
        yield begin, end, memory + cut.finished(end - 1)
        begin = end


def _span(x: Tensor, begin: int, end: int) -> Tensor:
    """Queries begin..end of x (B, T, G, R, E) as (B G, C R, E)."""
    return x[:, begin:end].transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1, x.shape[-1])


def _add_span(total: Tensor, begin: int, end: int, part: Tensor) -> None:
    B, _, G, R, E = total.shape
    total[:, begin:end] += part.view(B, G, end - begin, R, E).transpose(1, 2)


def _compressed_weights(q: Tensor, ck: Tensor, begin: int, end: int, n: int, cut: Cut, memory: int) -> Tensor:
    """Weights (B G, C R, n) of queries begin..end on memories and compressed blocks."""
    R, E = q.shape[3:]
    logits = _scaled_bmm(_span(q, begin, end), ck.flatten(0, 1)[:, :n].transpose(1, 2), E ** -0.5)
    seen = memory + cut.finished(begin)                  # by all of the span
    if seen < n:
        t = torch.arange(begin, end, device=q.device)[:, None]
        late = torch.arange(seen - memory, n - memory, device=q.device) >= cut.finished(t)
        late = torch.zeros(late.shape, dtype=q.dtype, device=q.device).masked_fill_(late, -math.inf)
        logits.unflatten(1, (-1, R))[..., seen:] += late[:, None]
    return logits.softmax(-1)


def _compressed(q: Tensor, ck: Tensor, cv: Tensor, gate: Tensor, cut: Cut, out: Tensor) -> Tensor:
    """Add gate × the compressed branch to out; returns the blocks (B, G, T, K) that its weights choose."""
    (B, T, G, R, _), chosen = q.shape, []
    memory = ck.shape[2] - cut.finished(T - 1)
    for begin, end, n in _compressed_spans(q, memory, cut):
        t = torch.arange(begin, end, device=q.device)[:, None]
        scores = q.new_zeros(B * G, end - begin, 0)
        if n:
            p = _compressed_weights(q, ck, begin, end, n, cut, memory)
            _add_span(out, begin, end, torch.bmm(p, cv.flatten(0, 1)[:, :n]) * _span(gate, begin, end))
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = p.unflatten(1, (-1, R))[..., memory:].sum(2, dtype=wide)
        scores = importance(scores, cut, (end - 1) // cut.select_block)
        settled = cut.finished(begin) * cut.compress_stride // cut.select_block
        settled = max(0, min(settled, begin // cut.select_block - cut.local_blocks, scores.shape[-1]))
        chosen.append(choose_blocks(scores, t, cut, settled).int())
    return torch.cat(chosen, 1).unflatten(0, (B, G))


def _compressed_backward(q, ck, cv, gate, cut, dout, chosen, dscores, dq, dck, dcv, dgate) -> None:
    """Add to the gradients dq, dck, dcv; set dgate. dscores (B, G, T, K) reaches the weights on chosen
    blocks."""
    (B, T, G, R, E) = q.shape
    memory, dgate_of = ck.shape[2] - cut.finished(T - 1), dgate[..., None]
    dck, dcv = dck.flatten(0, 1), dcv.flatten(0, 1)
    for begin, end, n in _compressed_spans(q, memory, cut):
        if not n:
            dgate[:, begin:end] = 0
            continue
        p = _compressed_weights(q, ck, begin, end, n, cut, memory)
        values, grad, gates = cv.flatten(0, 1)[:, :n], _span(dout, begin, end), _span(gate, begin, end)
        dgate_of[:, begin:end] = (torch.bmm(p, values) * grad).sum(-1, keepdim=True).view(
            B, G, end - begin, R, 1).transpose(1, 2)
        grad = grad * gates
        dp = torch.bmm(grad, values.transpose(1, 2))
        picks, extra = (x[:, :, begin:end].flatten(0, 1) for x in (chosen, dscores))
        for offset, weight in cut.overlaps():
            column = picks.long() * (cut.select_block // cut.compress_stride) + offset
            ok = (picks >= 0) & (column >= 0) & (column < n - memory)
            column = torch.where(ok, column, 0)[:, :, None].expand(-1, -1, R, -1) + memory
            add = (extra * ok * weight)[:, :, None].expand(-1, -1, R, -1).to(dp.dtype)
            dp.unflatten(1, (-1, R)).scatter_add_(-1, column.clamp(max=n - 1), add)
        dcv[:, :n] += torch.bmm(p.transpose(1, 2), grad)
        torch._softmax_backward_data(dp, p, -1, q.dtype, grad_input=dp)    # now of the logits
        dck[:, :n] += _scaled_bmm(dp.transpose(1, 2), _span(q, begin, end), E ** -0.5)
        _add_span(dq, begin, end, _scaled_bmm(dp, ck.flatten(0, 1)[:, :n], E ** -0.5))


class _CompressedAttention(torch.autograd.Function):
    """The ungated compressed branch (B, H, T, E), the blocks (B, G, T, K) that it chooses, and for each of
    these a zero whose gradient goes to its score."""

    @staticmethod
    def forward(ctx, q, ck, cv, cut):
        q = _by_group(q, ck.shape[1])
        out = torch.zeros_like(q)
        chosen = _compressed(q, ck, cv, q.new_ones(1).expand(*q.shape[:4], 1), cut, out)
        ctx.save_for_backward(q, ck, cv, chosen)
        ctx.cut = cut
        ctx.mark_non_differentiable(chosen)
        return out.flatten(2, 3).transpose(1, 2), chosen, q.new_zeros(chosen.shape)

    @staticmethod
    def backward(ctx, dout, _, dscores):
        q, ck, cv, chosen = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dck, dcv = torch.zeros_like(q), *(x.new_zeros(x.shape, dtype=wide) for x in (ck, cv))
        one = q.new_ones(1).expand(*q.shape[:4], 1)
        dout, unused = _by_group(dout, ck.shape[1]), q.new_empty(q.shape[:4])
        _compressed_backward(q, ck, cv, one, ctx.cut, dout, chosen, dscores, dq, dck, dcv, unused)
        return dq.flatten(2, 3).transpose(1, 2), dck.to(ck.dtype), dcv.to(cv.dtype), None


# 7.2 Selected blocks: (query, block) pairs sorted by block, in tiles of some queries against one block.

class _Pairs:
    """Pairs (query, block): each of some queries with its own block first, then with its chosen ones.

    `rows`, `groups`, `queries` are slices of B, G, T. The pairs sorted by block, each block's filled up to
    whole tiles of `size` queries, make slots. `slot` (queries, P) is the place of a pair; of each slot `pair`
    and `query` are its indices, `row` that of the query in (B T G, R E); `holes` fill up; of each tile its
    `block`.
    """

    def __init__(self, chosen: Tensor, cut: Cut, rows: slice, groups: slice, queries: slice):
        (_, G, T, K), device = chosen.shape, chosen.device
        P = K + 1
        self.rows, self.groups, self.queries = rows, groups, queries
        picks = chosen[rows, groups, queries].cpu().numpy()                # int32, as all below
        b, g, n = picks.shape[:3]
        N, integers = -(-T // cut.select_block), dict(dtype=np.int32)
        own = np.broadcast_to(np.arange(queries.start, queries.stop, **integers)[:, None] // cut.select_block,
                              (b, g, n, 1))
        blocks = np.concatenate([own, np.where(picks < 0, own, picks)], -1)
        blocks = (blocks.reshape(b * g, -1) + np.arange(b * g, **integers)[:, None] * N).ravel()
        small = b * g * N <= 2**16                                         # 16 bits are sorted by radix
        order = np.argsort(blocks.astype(np.uint16) if small else blocks, kind="stable").astype(np.int32)
        counts = np.bincount(blocks, minlength=b * g * N)
        self.size = 32 if len(blocks) > 32 * np.count_nonzero(counts) else 16
        tiles = -(-counts // self.size)
        tiles[-1] += -tiles.sum() % 32  # few shapes: oneDNN compiles for each of them
        first = np.cumsum(tiles) - tiles
        shift = first * self.size - (np.cumsum(counts) - counts)
        target = np.arange(len(blocks), **integers) + np.repeat(shift.astype(np.int32), counts)
        slot, pair = np.empty(len(blocks), **integers), np.full(tiles.sum() * self.size, -1, **integers)
        slot[order], pair[target] = target, order
        holes, pair = np.flatnonzero(pair < 0), np.maximum(pair, 0)
        query = pair // np.int32(P)
        rows_of = ((np.arange(b)[:, None, None] + rows.start) * T + np.arange(n) + queries.start) * G
        rows_of = (rows_of + np.arange(g)[:, None] + groups.start).astype(np.int32).ravel()
        arrays = dict(slot=slot.reshape(-1, P), pair=pair, query=query, row=rows_of[query], holes=holes,
                      first_tile=first.astype(np.int32), block=np.repeat(np.arange(len(counts)), tiles))
        for name, array in arrays.items():
            setattr(self, name, torch.from_numpy(array).to(device))
        missing = np.flatnonzero((picks < 0).any((0, 1, 3)))
        self.partial = missing[-1] + 1 if len(missing) else 0              # queries from here on miss no pick
        self.absent = torch.from_numpy(picks[:, :, :self.partial] < 0).to(device)

    def part(self, x: Tensor) -> Tensor:
        """The queries of x (B, T, G, R, E) as (b, g, n, R, E), a view."""
        return x[self.rows, self.queries, self.groups].transpose(1, 2)

    def tiles(self, x: Tensor) -> Tensor:
        """Queries of x (B, T, G, R, E) → (tiles, size R, E); holes get any."""
        R, E = x.shape[3:]
        return x.view(-1, R * E).index_select(0, self.row).view(-1, self.size * R, E)

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """Blocks of keys x (B, G, T, E) → (tiles, size, E)."""
        x = x[self.rows, self.groups].flatten(0, 1)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % size)) if x.shape[1] % size else x
        return x.reshape(-1, size, x.shape[-1]).index_select(0, self.block)

    def to_queries(self, x: Tensor, R: int) -> Tensor:
        """Weights of tiles (tiles, size R, S) → (queries, R, P, S)."""
        index = self.slot[:, None] * R + torch.arange(R, dtype=torch.int32, device=x.device)[:, None]
        return x.view(-1, x.shape[-1]).index_select(0, index.flatten()).view(*index.shape, -1)

    def to_tiles(self, x: Tensor) -> Tensor:
        """The inverse; holes get zeros."""
        _, R, P, S = x.shape
        head = torch.arange(R, dtype=torch.int32, device=x.device) * P
        index = (self.pair + self.query * (P * (R - 1)))[:, None] + head   # of (query, head, pick)
        x = x.view(-1, S).index_select(0, index.flatten()).view(-1, R, S).index_fill_(0, self.holes, 0)
        return x.view(-1, self.size * R, S)

    def sum_queries(self, x: Tensor, R: int) -> Tensor:
        """x of tiles (tiles, size R, E), summed over each query's pairs → (b, g, n, R, E)."""
        E = x.shape[-1]
        b, g = (len(range(s.start, s.stop)) for s in (self.rows, self.groups))
        return F.embedding_bag(self.slot, x.view(-1, R * E), mode="sum").view(b, g, -1, R, E)

    def sum_blocks(self, x: Tensor) -> Tensor:
        """x of tiles (tiles, S, E), summed over each block's tiles → (b g, N S, E)."""
        b, g = (len(range(s.start, s.stop)) for s in (self.rows, self.groups))
        every = torch.arange(len(x), dtype=torch.int32, device=x.device)
        return F.embedding_bag(every, x.flatten(1), self.first_tile, mode="sum").view(b * g, -1, x.shape[-1])


def _pairs(chosen: Tensor, cut: Cut) -> Iterator[_Pairs]:
    """All pairs, part by part: whole rows, else one group of a row, else some of its queries."""
    B, G, T, K = chosen.shape
    room = max(2048 if B * G * T > 4096 else 4096, B * G * T // 12)  # queries: tiles full, yet small
    b, g, n = max(1, room // (G * T)), G if G * T <= room else 1, -(-T // -(-T // room))
    for row in range(0, B, b):
        for group in range(0, G, g):
            for begin in range(0, T, n):
                yield _Pairs(chosen, cut, slice(row, min(B, row + b)), slice(group, group + g),
                             slice(begin, min(T, begin + n)))


def _selected_weights(queries: Tensor, keys: Tensor, pairs: _Pairs, R: int) -> Tensor:
    """Weights (queries, R, P, S) of tiles of queries (tiles, size R, E) on their blocks of keys (tiles, S,
    E)."""
    S, device = keys.shape[1], keys.device
    logits = pairs.to_queries(_scaled_bmm(queries, keys.transpose(1, 2), keys.shape[-1] ** -0.5), R)
    t = torch.arange(pairs.queries.start, pairs.queries.stop, device=device)[:, None, None]
    future = torch.zeros(len(t), 1, S, dtype=logits.dtype, device=device)
    future.masked_fill_(torch.arange(S, device=device) > t % S, -math.inf)
    by_query = logits.view(-1, len(t), *logits.shape[1:])                  # (b g, n, R, P, S)
    by_query[..., 0, :] += future
    if pairs.partial:
        absent = pairs.absent.flatten(0, 1)[:, :, None, :, None]
        by_query[:, :pairs.partial, :, 1:].masked_fill_(absent, -math.inf)
    return logits.flatten(2).softmax(-1).view(logits.shape)


def _selected(turned, k, v, chosen, gate, cut, out) -> None:
    """Add gate × the selected branch to out."""
    R, E = turned.shape[3:]
    for pairs in _pairs(chosen, cut):
        p = _selected_weights(pairs.tiles(turned), pairs.blocks(k, cut.select_block), pairs, R)
        o = torch.bmm(pairs.to_tiles(p), pairs.blocks(v, cut.select_block))
        pairs.part(out).add_(pairs.sum_queries(o, R).mul_(pairs.part(gate)))


def _selected_backward(turned, k, v, chosen, gate, cut, dout, dturned, dk, dv, dgate) -> Tensor:
    """Add to the gradients dturned, dk, dv; set dgate. Returns the gradient (B, G, T, K) of the chosen
    scores."""
    (R, E), S, T = turned.shape[3:], cut.select_block, k.shape[2]
    dscores = torch.empty(chosen.shape, dtype=dk.dtype, device=k.device)
    for pairs in _pairs(chosen, cut):
        keys = pairs.blocks(k, S)
        p = _selected_weights(pairs.tiles(turned), keys, pairs, R)
        grads = pairs.tiles(dout)
        dp = pairs.to_queries(torch.bmm(grads, pairs.blocks(v, S).transpose(1, 2)), R)
        gates = pairs.part(gate).reshape(-1, R, 1, 1)
        dot = (p * dp).sum((2, 3), keepdim=True)                           # out · dout
        pairs.part(dgate).copy_(dot.view_as(pairs.part(dgate)))
        dp.sub_(dot).mul_(p).mul_(gates)                                   # now of the logits
        where = (pairs.rows, pairs.groups)
        part = dscores[*where, pairs.queries]
        part.copy_(dp[:, :, 1:].sum((1, 3)).view(part.shape))
        dv[where] += pairs.sum_blocks(torch.bmm(pairs.to_tiles(p.mul_(gates)).transpose(1, 2), grads))[
            :, :T].view_as(dv[where])
        dlogits = pairs.to_tiles(dp)
        torch.baddbmm(grads, dlogits, keys, beta=0, alpha=E ** -0.5, out=grads)
        pairs.part(dturned).add_(pairs.sum_queries(grads, R))
        del grads, p, dp
        dk[where] += pairs.sum_blocks(_scaled_bmm(dlogits.transpose(1, 2), pairs.tiles(turned), E ** -0.5))[
            :, :T].view_as(dk[where])
    return dscores


# 7.3 The module, its compression networks, and decoding.

def _flat_blocks(x: Tensor) -> Tensor:
    """Blocks (B, G, N, L, E) as (G, B N, L E)."""
    return x.transpose(0, 1).flatten(3).flatten(1, 2)


class ConvLinear(nn.Module):
    """Blocks x (B, G, N, L, E) with places (G, L, E) added → (B, G, N, E), by one linear map of each KV
    head's own, the mean at first: a convolution."""

    def __init__(self, n_kv_heads: int, block: int, head_dim: int):
        super().__init__()
        mean = torch.eye(head_dim).repeat(block, 1) / block
        self.weight = nn.Parameter(mean.expand(n_kv_heads, -1, -1).clone())

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        B, G, N, _, E = x.shape
        y = torch.bmm(_flat_blocks(x), self.weight) + torch.bmm(places.flatten(1)[:, None], self.weight)
        return y.view(G, B, N, E).transpose(0, 1)


class GroupedMLP(ConvLinear):
    """ConvLinear plus what an MLP of each KV head's own adds, zero at first."""

    def __init__(self, n_kv_heads: int, block: int, head_dim: int):
        super().__init__(n_kv_heads, block, head_dim)
        wide, inner = block * head_dim, 2 * head_dim
        self.inner = nn.Parameter(torch.randn(n_kv_heads, wide, inner) * wide ** -0.5)
        self.outer = nn.Parameter(torch.zeros(n_kv_heads, inner, head_dim))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        (B, G, N, _, E), both = x.shape, torch.cat([self.weight, self.inner], -1)
        y = torch.bmm(_flat_blocks(x), both) + torch.bmm(places.flatten(1)[:, None], both)
        y = y[..., :E] + torch.bmm(F.silu(y[..., E:]), self.outer)
        return y.view(G, B, N, E).transpose(0, 1)


class AttentionPool(nn.Module):
    """The same by a weighted mean, the weights of each channel a softmax over the block, even at first."""

    def __init__(self, n_kv_heads: int, block: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_kv_heads, head_dim, head_dim))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = x + places[:, None].to(x.dtype)
        logits = x @ self.weight[:, None].to(x.dtype)                                   # (B, G, N, L, E)
        return (logits.softmax(3, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype) * x).sum(3)


COMPRESSIONS = {"mlp": GroupedMLP, "pool": AttentionPool, "conv": ConvLinear}


class NativeSparseAttention(Attention):
    """NSA (arXiv 2502.11089): 1. compressed blocks, 2. selected blocks, 3. a sliding window, each with a
    sigmoid gate per head, on shared keys and values.

    Rotary positions turn selected and window keys, not compressed ones, whose blocks get learned positions
    inside. `n_memory` learned keys and values join the compressed ones; without them a token that has no
    finished block before it gets zero from that branch.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm: bool = True,
                 cut: Cut | None = None, compression: str = "mlp", n_memory: int = 0):
        super().__init__(dim, n_heads, n_kv_heads, head_dim, qk_norm)
        if compression not in COMPRESSIONS:
            raise BadInput(f"COMPRESSION {compression!r} is not one of {', '.join(COMPRESSIONS)}")
        within(0, math.inf, N_MEMORY=n_memory)
        self.cut, self.n_memory = cut or Cut(), n_memory
        self.gates = nn.Linear(dim, 3 * n_heads)
        block = self.cut.compress_block
        self.places = nn.Parameter(torch.randn(2, n_kv_heads, block, head_dim) * 0.02)
        network = COMPRESSIONS[compression]
        self.compress_k, self.compress_v = (network(n_kv_heads, block, head_dim) for _ in range(2))
        memories = torch.randn(2, n_kv_heads, n_memory, head_dim) * 0.02
        self.memories = nn.Parameter(memories) if n_memory else None

    def join(self, int8: bool = False) -> None:
        """For inference: read x once for q, k, v and gates."""
        super().join(int8)
        weights = [m.weight for m in (self.q, self.k, self.v, self.gates)]
        self.joined = fixed_linear(torch.cat(weights), int8), self.joined[1]

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """q and q turned (B, T, H, E), k, k turned and v (B, T, G, E), gates (B, T, H, 3)."""
        H, G, E = self.n_heads, self.n_kv_heads, self.head_dim
        if self.joined is not None:
            qk, v, gates = self.joined[0](x).split([(H + G) * E, G * E, 3 * H], -1)
            qk, gates = qk.unflatten(-1, (-1, E)), gates + self.gates.bias
            if self.joined_norm is not None:
                qk = F.rms_norm(qk, (E,), None, self.norm_q.eps) * self.joined_norm
            (q, k), (turned, turned_k) = (y.split([H, G], 2) for y in (qk, rotate(qk, cos, sin)))
        else:
            q, k = (y.unflatten(-1, (-1, E)) for y in (self.q(x), self.k(x)))
            q, k, v, gates = self.norm_q(q), self.norm_k(k), self.v(x), self.gates(x)
            turned, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, turned, k, turned_k, v.unflatten(-1, (-1, E)), gates.sigmoid().unflatten(-1, (H, 3))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        flat = (y.flatten(2) for y in self.project(x, cos, sin))
        return self.out(by_document(self.attend_rows, documents, *flat))

    def attend_rows(self, *flat: Tensor) -> Tensor:
        """`project`'s tensors, heads side by side (B, T, F) → (B, T, H E)."""
        q, turned, k, turned_k, v = (y.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for y in flat[:5])
        ck, cv = self.compress(k, v, self.cut.finished(k.shape[2] - 1))
        y = attend_sparse(q, turned, turned_k, v, ck, cv, flat[5].unflatten(2, (-1, 3)), self.cut)
        return y.transpose(1, 2).flatten(2)

    def compress(self, k: Tensor, v: Tensor, n: int, remember: bool = True) -> tuple[Tensor, Tensor]:
        """The first n compressed keys and values (B, G, M + n, E) of k, v (B, G, T, E), behind M memories."""
        length, stride, found = self.cut.compress_block, self.cut.compress_stride, []
        for i, (x, network) in enumerate(((k, self.compress_k), (v, self.compress_v))):
            if stride == length or not n:  # with no block, the network's gradient is zero, not missing
                blocks = x[:, :, :n * length].unflatten(2, (n, length))
            else:
                blocks = x[:, :, :(n - 1) * stride + length].unfold(2, length, stride).transpose(-1, -2)
            y = network(blocks, self.places[i]).to(x.dtype)
            if self.n_memory and remember:
                y = torch.cat([self.memories[i].to(y.dtype).expand(len(x), -1, -1, -1), y], 2)
            found.append(y)
        return tuple(found)

    def memory(self, rows: int, length: int, like: Tensor) -> dict[str, Tensor]:
        """Room for turned keys and values side by side, compressed ones, and the last block of plain keys."""
        G, E, cut = self.n_kv_heads, self.head_dim, self.cut
        ck, cv = (like.new_zeros(rows, G, self.n_memory + cut.finished(length - 1), E) for _ in range(2))
        if self.n_memory:
            ck[:, :, :self.n_memory], cv[:, :, :self.n_memory] = self.memories
        return {"kv": like.new_zeros(rows, G, -(-length // cut.select_block) * cut.select_block, 2 * E),
                "ck": ck, "cv": cv, "last": like.new_zeros(rows, G, cut.compress_block, E)}

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, memory: dict, reading: Reading) -> Tensor:
        """forward for T more tokens of each row, which are added to `memory`; T > 1 only when that is
        empty."""
        q, turned, k, turned_k, v, gates = self.project(x, cos, sin)
        q, turned, k, turned_k, v = (y.transpose(1, 2) for y in (q, turned, k, turned_k, v))
        write_cache(memory["kv"], torch.cat([turned_k, v], -1), reading)
        T, cut, M = x.shape[1], self.cut, self.n_memory
        if max(reading.before) == 0 and T > 1:  # a row's padding lies behind it: harmless, as all is causal
            ck, cv = self.compress(k, v, cut.finished(T - 1))
            memory["ck"][:, :, :ck.shape[2]], memory["cv"][:, :, :ck.shape[2]] = ck, cv
            end = torch.tensor(reading.lengths, device=x.device)[:, None]
            column = end - cut.compress_block + torch.arange(cut.compress_block, device=x.device)     # (B, L)
            rows = torch.arange(len(x), device=x.device)[:, None]
            memory["last"].copy_(k.transpose(1, 2)[rows, column.clamp(min=0)].transpose(1, 2))
            y = attend_sparse(q, turned, turned_k, v, ck, cv, gates, cut)
        elif T == 1:
            last = memory["last"] = torch.cat([memory["last"][:, :, 1:], k], 2)
            done = [row for row, t in enumerate(reading.before) if cut.finished(t) > cut.finished(t - 1)]
            if done:  # blocks that end with this token
                begin = torch.tensor([reading.before[row] - cut.compress_block + 1 for row in done])[:, None]
                column = (begin + torch.arange(cut.compress_block)).to(x.device)
                rows = torch.tensor(done, device=x.device)
                values = memory["kv"][rows[:, None], :, column, self.head_dim:].transpose(1, 2)
                ck, cv = self.compress(last[rows], values, 1, remember=False)
                number = torch.tensor([M + cut.finished(reading.before[row]) - 1 for row in done])
                number = number.to(x.device)
                memory["ck"][rows, :, number], memory["cv"][rows, :, number] = ck[:, :, 0], cv[:, :, 0]
            y = self.attend_one(q, turned, gates, memory, reading)
        else:
            raise ValueError("after the first, tokens are read one at a time with sparse attention")
        return (self.joined[1] if self.joined else self.out)(y.transpose(1, 2).flatten(2))

    def attend_one(self, q: Tensor, turned: Tensor, gates: Tensor, memory: dict, reading: Reading) -> Tensor:
        """`attend_sparse` for one query (B, H, 1, E) a row, behind what `memory` holds: its cost grows with
        the number of compressed blocks only."""
        (B, H, _, E), G, cut, S, device = q.shape, self.n_kv_heads, self.cut, self.cut.select_block, q.device
        R, t, kv = H // G, max(reading.before), memory["kv"]
        even, own = min(reading.before) == t, t // cut.select_block
        wide = torch.promote_types(q.dtype, torch.float32)
        gates = gates.reshape(B * G, R, 3, 1).to(wide)
        # 1. compressed
        n = self.n_memory + cut.finished(t)
        ck, cv = (memory[name][:, :, :n].flatten(0, 1) for name in ("ck", "cv"))        # (B G, n, E)
        logits = _scaled_bmm(q.reshape(B * G, R, E), ck.mT, E ** -0.5).to(wide)
        if not even:
            unseen = torch.arange(-self.n_memory, n - self.n_memory, device=device)
            unseen = unseen >= cut.finished(reading.columns[:, None])                   # (B, 1, n)
            logits = logits.view(B, H, n).masked_fill(unseen, -math.inf).view(B * G, R, n)
        p = logits.softmax(-1) if even else logits.softmax(-1).nan_to_num()  # no block yet: nothing
        y = torch.bmm((p * gates[:, :, 0]).to(q.dtype), cv)
        scores = importance(p[..., self.n_memory:].sum(1), cut, own)                    # (B G, own)
        # 2. selected
        turned, flat = turned.reshape(B * G, R, E), kv.view(-1, S * 2 * E)
        place = torch.arange(B * G, device=device)[:, None] * (kv.shape[2] // S)
        if even and own >= cut.n_selected:  # no block is missing; the own one and the window are slices
            chosen = choose_blocks(scores, torch.full((1, 1), t, device=device), cut, own if cut.plain else 0)
            width = min(max(cut.window, t + 1 - own * S), t + 1)
            near = kv[:, :, t + 1 - width:t + 1].flatten(0, 1)                          # (B G, width, 2 E)
            far = flat.index_select(0, (chosen + place).flatten()).view(B * G, -1, 2 * E)
            logits = [_scaled_bmm(turned, x[..., :E].mT, E ** -0.5).to(wide) for x in (far, near)]
            inside = t + 1 - own * S
            weights = torch.cat([logits[0], logits[1][..., width - inside:]], -1).softmax(-1) * gates[:, :, 1]
            y = torch.baddbmm(y, weights[..., :-inside].to(q.dtype), far[..., E:])
            # 3. window; the own block's weights join it
            window = F.pad(logits[1][..., -cut.window:].softmax(-1) * gates[:, :, 2],
                           (width - min(cut.window, width), 0))
            window[..., width - inside:] += weights[..., -inside:]
            return torch.baddbmm(y, window.to(q.dtype), near[..., E:]).view(B, H, 1, E)
        t = reading.columns[:, None].expand(-1, G, -1).reshape(B * G, 1)
        chosen = torch.cat([choose_blocks(scores, t, cut), t // S], -1)
        column = (chosen[..., None] * S + torch.arange(S, device=device)).flatten(1)    # (B G, (K + 1) S)
        width = min(cut.window, max(reading.before) + 1)
        column = torch.cat([column, t - width + 1 + torch.arange(width, device=device)], -1)
        hidden = (column < 0) | (column > t)
        index = column.clamp(0, kv.shape[2] - 1) + place * S
        near = kv.view(-1, 2 * E).index_select(0, index.flatten()).view(B * G, -1, 2 * E)
        logits = _scaled_bmm(turned, near[..., :E].mT, E ** -0.5).to(wide)
        logits = logits.masked_fill(hidden[:, None], -math.inf)
        selected, window = logits.split([column.shape[-1] - width, width], -1)
        weights = torch.cat([selected.softmax(-1) * gates[:, :, 1], window.softmax(-1) * gates[:, :, 2]], -1)
        return torch.baddbmm(y, weights.to(q.dtype), near[..., E:]).view(B, H, 1, E)


# 7.4 Dynamic sparsity attention: sets of points, ordered so that neighbours share a block.

def place_order(points: Tensor, real: Tensor, N: int) -> Tensor:
    """Index (B, N L) of points (B, T, D), real (B, T), T where there is none: the N leaves (a power of two)
    of a balanced k-d tree, one after the other, L = ⌈T / N⌉ slots each. Neighbours share a leaf, and leaves
    that are neighbours in the order lie near. Order and padding of the points change nothing but among equal
    ones.
    """
    (B, T, D), L = points.shape, -(-points.shape[1] // N)
    every, points = torch.arange(N * L, device=points.device), points.mT.contiguous()
    count = real.sum(1, keepdim=True)                                  # of each node's points
    index = F.pad(torch.where(real, every[:T], T), (0, N * L - T), value=T).sort(1).values[:, None]
    for _ in range(N.bit_length() - 1):                                # index (B, nodes, slots), some empty
        (_, nodes, size), left = index.shape, (count + 1) // 2
        empty = every[:size] >= count[..., None]
        index = torch.where(empty, index[..., :1], index).clamp(max=T - 1)  # a node's first: extents stay
        here = points.gather(2, index.flatten(1)[:, None].expand(-1, D, -1)).view(B, D, nodes, size)
        axis = (here.amax(3) - here.amin(3)).argmax(1)[:, None, :, None].expand(-1, -1, -1, size)
        key = here.gather(1, axis)[:, 0].masked_fill(empty, math.inf)
        half = torch.stack([every[:size // 2].expand(B, nodes, -1), left[..., None] + every[:size // 2]], 2)
        order = key.sort(dim=2, stable=True).indices.gather(2, half.flatten(2).clamp(max=size - 1))
        index = index.gather(2, order).view(B, 2 * nodes, size // 2)
        count = torch.stack([left, count - left], -1).flatten(1)
    return torch.where(every[:L] < count[..., None], index, T).flatten(1)


def attend_chosen_dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, chosen: Tensor, gate: Tensor,
                        N: int) -> Tensor:
    """The slow twin of attend_chosen: softmax(q kᵀ / √E + bias + gate) v, the gate -inf where a query's block
    did not choose a key's block, in (B, H, P, P) tensors."""
    (B, H, P, E), NI = q.shape, chosen.shape[2]
    gates = q.new_full((B, H, NI, N), -math.inf).scatter(3, chosen, gate)
    gates = gates.repeat_interleave(P // NI, 2).repeat_interleave(P // N, 3)
    return (q @ k.transpose(-1, -2) / math.sqrt(E) + bias[:, :, None] + gates).softmax(-1) @ v


@torch.compiler.disable
def attend_chosen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, chosen: Tensor, gate: Tensor,
                  N: int) -> Tensor:
    """Attention of blocks of queries to the blocks of keys that they chose: (B, H, P, E).

    q, k, v (B, H, P, E); bias (B, H, P) of each key, -inf: hidden; chosen (B, H, NI, K) different blocks of
    N, a row for each of NI blocks of queries; gate (B, H, NI, K), added to the scores of such a pair: -inf
    drops it. Every row must see a key. On CUDA compiled flex_attention, else `_ChosenBlocks`; no (P, P)
    tensor."""
    if q.device.type == "cuda" and _fits_flex(q, chosen, N):
        return attend_chosen_flex(q, k, v, bias, chosen, gate, N)
    return _ChosenBlocks.apply(q, k, v, bias, chosen, gate, N)


def _fits_flex(q: Tensor, chosen: Tensor, N: int) -> bool:
    """Whether the blocks are such as flex_attention takes: powers of two, at least 16 queries and, in one or
    several blocks, 16 keys."""
    queries, keys = q.shape[2] // chosen.shape[2], q.shape[2] // N
    return queries >= 16 and all(size & (size - 1) == 0 for size in (queries, keys))


def attend_chosen_flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, chosen: Tensor, gate: Tensor,
                       N: int) -> Tensor:
    """`attend_chosen` by compiled flex_attention, its block mask straight from the chosen blocks, those of
    fewer than 16 keys together; on a CPU forward only. Heads are at least 16 wide there."""
    from torch.nn.attention.flex_attention import BlockMask
    (B, H, P, E), NI = q.shape, chosen.shape[2]
    L, Q = P // N, P // NI
    table = gate.new_full((B, H, NI, N), -math.inf).scatter(3, chosen, gate)
    size = max(L, 16)                                                        # of one or several blocks
    kept = (table > -math.inf).unflatten(3, (P // size, -1)).any(-1)
    blocks = kept.int().sort(dim=-1, descending=True, stable=True).indices.int()
    mask = BlockMask.from_kv_blocks(kept.sum(-1, dtype=torch.int32), blocks, BLOCK_SIZE=(Q, size),
                                    seq_lengths=(P, P), compute_q_blocks=torch.is_grad_enabled())

    def score(s, b, h, t, j):
        return s + bias[b, h, j] + table[b, h, t // Q, j // L]
    wide = (F.pad(x, (0, max(0, 16 - E))) for x in (q, k, v))
    return _flex()[0](*wide, score, mask, scale=E ** -0.5)[..., :E]


CHOSEN_WORKSPACE = 2 ** 19  # scores at once


class _ChosenBlocks(torch.autograd.Function):
    """attend_chosen in plain torch: parts of the query blocks, the keys of their blocks gathered; backward
    makes the weights again. What is added to scores goes through the products, as a last feature of keys."""

    @staticmethod
    @exact_products
    def forward(ctx, q, k, v, bias, chosen, gate, N):
        k = torch.cat([k * q.shape[-1] ** -0.5, bias[..., None]], -1)
        q, v, out = q.contiguous(), v.contiguous(), q.new_empty(q.shape)
        outs = _query_blocks(out, chosen)
        for part, _, _, keys, values, weights in _chosen_parts(q, k, v, chosen, gate, N):
            torch.bmm(weights, values, out=outs[part])
            del keys, values, weights                          # before those of the next part are made
        ctx.save_for_backward(q, k, v, chosen, gate)
        ctx.N = N
        return out

    @staticmethod
    @exact_products
    def backward(ctx, dout):
        q, k, v, chosen, gate = ctx.saved_tensors
        (B, H, P, E), K, L = q.shape, gate.shape[-1], q.shape[2] // ctx.N
        dq, dgate = torch.empty_like(q), torch.empty_like(gate)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk_blocks, dv_blocks = (q.new_zeros(B * H * ctx.N, e * L, dtype=wide) for e in (E + 1, E))
        uppers, dqs = (_query_blocks(x, chosen) for x in (dout.contiguous(), dq))
        for part, queries, index, keys, values, weights in _chosen_parts(q, k, v, chosen, gate, ctx.N):
            upper = uppers[part]
            dscores = torch.bmm(upper, values.mT).sub_(
                torch.bmm(weights, values).mul_(upper).sum(-1, keepdim=True)).mul_(weights)
            # Products that are longest in their last dimension take half the time
            dvalues = torch.bmm(upper.mT, weights).unflatten(2, (K, L)).transpose(1, 2)
            dv_blocks.index_add_(0, index, dvalues.reshape(len(index), -1).to(wide))
            del weights, values, dvalues
            torch.bmm(dscores, keys[..., :-1], out=dqs[part])
            dkeys = torch.bmm(queries.mT, dscores).unflatten(2, (K, L)).transpose(1, 2)
            dgate.view(-1, K)[part] = dkeys[:, :, -1].sum(-1)
            dk_blocks.index_add_(0, index, dkeys.reshape(len(index), -1).to(wide))
            del dscores, dkeys, keys, queries
        dk, dv = (x.view(B, H, ctx.N, -1, L).mT for x in (dk_blocks, dv_blocks))
        dk, dbias, dv = (x.reshape(B, H, P, -1).to(q.dtype) for x in (dk[..., :-1], dk[..., -1:], dv))
        return dq, dk.mul_(E ** -0.5), dv, dbias[..., 0], None, dgate, None


def _query_blocks(x: Tensor, chosen: Tensor) -> Tensor:
    """x (B, H, P, E) as (B H NI, Q, E)."""
    return x.view(chosen.shape[0] * chosen.shape[1] * chosen.shape[2], -1, x.shape[-1])


def _chosen_parts(q, k, v, chosen, gate, N) -> Iterator[tuple]:
    """(slice of the B H NI query blocks, queries (n, Q, E + 1), the last 1; index (n K) of key blocks; keys
    (n, S, E + 1), with the gate; values (n, S, E); weights (n, Q, S)), part by part, S the keys of K blocks;
    k (B, H, P, E + 1) is scaled, what is added to scores the last."""
    B, H, K, L = *q.shape[:2], chosen.shape[3], q.shape[2] // N
    first = torch.arange(0, B * H * N, N, device=q.device).view(B, H, 1, 1)
    flat, q, gate = (chosen + first).view(-1, K), _query_blocks(q, chosen), gate.reshape(-1, K, 1)
    blocks = [x.view(B * H * N, -1) for x in (k, v)]
    size = max(1, CHOSEN_WORKSPACE // (q.shape[1] * K * L))
    for begin in range(0, len(flat), size):
        part = slice(begin, begin + size)
        index, queries = flat[part].flatten(), F.pad(q[part], (0, 1), value=1.0)
        keys, values = (x.index_select(0, index).view(-1, K * L, x.shape[1] // L) for x in blocks)
        keys[..., -1].view(-1, K, L).add_(gate[part])
        yield part, queries, index, keys, values, torch.bmm(queries, keys.mT).softmax(-1)
        del keys, values, queries


class DynamicSparseAttention(nn.Module):
    """Attention that drops the connections that do not matter: of each block of queries to the blocks of keys
    of largest importance, no more than a density, no fewer than min_connections keys.

    Importance of a block of keys: attention × learned importance, without the (P, P) scores. A key's learned
    importance e^a, a linear in the hit, is part of its weight, too; a block's attention is that of its mean
    and variances (second cumulant of the scores). Of the ⌈density × N⌉ blocks of largest importance those
    stay that are within a factor e^temperature of the largest. Judge "keys" takes the attention of means of
    queries to every key instead, which finds single hot keys in blocks; gradients are still those of
    moments. temperature (H,) is learned, through gates that are hard forward and sigmoids backward
    (straight-through, arXiv 1308.3432), renormalised over what stays. The same in training and inference; x
    is in place_order. density 1 and a large temperature: dense attention.
    """

    def __init__(self, dim: int, n_heads: int, head_dim: int = 0, min_connections: int = 16,
                 density: float = 0.1, query_blocks: int = 4, judge: str = "moments"):
        super().__init__()
        if judge not in ("moments", "keys"):
            raise BadInput(f"judge {judge!r} is not one of moments, keys")
        self.judge = judge
        self.n_heads, self.head_dim = n_heads, head_dim or dim // n_heads
        self.min_connections, self.query_blocks = min_connections, query_blocks  # key blocks a query block
        inner = n_heads * self.head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.importance = nn.Linear(dim, n_heads)
        self.log_temperature = nn.Parameter(torch.full((n_heads,), 1.5))
        self.register_buffer("density", torch.tensor(float(density)))
        nn.init.zeros_(self.importance.weight)
        nn.init.zeros_(self.importance.bias)

    def forward(self, x: Tensor, real: Tensor, N: int, dense: bool = False) -> tuple[Tensor, dict]:
        """x (B, P, D) in N equal blocks of neighbours, real (B, P) → (y (B, P, D), statistics (B,) that
        gradients pass through: sparsity_ratio, active_connections, total_connections, retained_information,
        entropy). `dense`: all connections, by scaled_dot_product_attention. No real hit: 0."""
        B, P, _ = x.shape
        q, k, v = self.qkv(x).view(B, P, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.importance(x).transpose(1, 2)                                       # (B, H, P)
        bias = bias.masked_fill(~real[:, None], -math.inf)
        bias = torch.where(real.any(1)[:, None, None], bias, torch.zeros_like(bias))
        if dense:
            y = attend_biased(q, k, v, bias)
            found = {}
        else:
            chosen, gate, found = self.choose(q, k, bias, real, N)
            y = attend_chosen(q, k, v, bias, chosen, gate, N)
        y = y.transpose(1, 2).flatten(2) * real[..., None]
        return self.out(y), found

    def choose(self, q: Tensor, k: Tensor, bias: Tensor, real: Tensor, N: int) -> tuple[Tensor, Tensor, dict]:
        """(chosen (B, H, NI, K), gate (B, H, NI, K): 0 or -inf with the gradient of a sigmoid,
        statistics)."""
        B, H, P, E = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        NI = max(1, N // self.query_blocks)
        n_q, n_k = (real.view(B, n, -1).sum(-1).to(wide) for n in (NI, N))
        if self.judge == "keys":  # the values are theirs, the gradients those of moments
            ranks = block_shares(q, k, bias, real, NI, N).to(wide).clamp(min=1e-30).log()
            none = (n_k == 0) & real.any(1, keepdim=True)
            ranks = ranks.masked_fill(none[:, None, None], -math.inf)                   # (B, H, NI, N)
            smooth = self.shares_by_moments(q, k, bias, real, NI, N) if torch.is_grad_enabled() else ranks
        else:
            smooth = self.shares_by_moments(q, k, bias, real, NI, N)
            ranks = smooth.detach()

        K = most = min(N, math.ceil(float(self.density) * N - 1e-4))       # 0.1 in float32 is more than 0.1
        enough = real.sum(1).clamp(max=self.min_connections)[:, None, None, None]
        while True:
            best, chosen = ranks.topk(K, -1)
            sizes = n_k[:, None, None].expand(B, H, NI, N).gather(3, chosen)
            before = sizes.cumsum(-1) - sizes  # keys of better blocks
            if K == N or bool((before[..., -1:] + sizes[..., -1:] >= enough).all()):
                break
            K = min(N, 2 * K)  # blocks of few real hits
        top, beyond = smooth.gather(3, chosen), best - best[..., :1]
        above, allowed = top - top[..., :1].detach(), self.log_temperature.exp()[:, None, None]
        above = torch.where(best > -math.inf, above + (beyond - above).detach(), beyond) + allowed
        within = (beyond + allowed >= 0) & (torch.arange(K, device=q.device) < most)
        hard = (within | (before < enough)) & (best > -math.inf)
        soft = torch.sigmoid(above)
        gate = torch.where(hard, soft - soft.detach(), -math.inf).to(q.dtype)

        stays = hard + soft - soft.detach()
        pairs = stays * sizes * n_q[:, None, :, None]
        total = real.sum(1).to(wide).square() * H
        active = pairs.sum((1, 2, 3))
        share = n_q / n_q.sum(1, keepdim=True).clamp(min=1) / H  # of the queries, (B, NI)

        def mean(value, slope):  # over heads and queries, of value with the gradient of slope (B, H, NI, ...)
            value, slope = ((y.sum(-1) * share[:, None]).sum((1, 2)) for y in (value, slope))
            return slope + (value - slope).detach()
        retained = mean(best.exp() * stays, top.exp() * stays)
        entropy = -mean(*(y.exp() * y.clamp(min=-1e4) for y in (ranks, smooth))) / math.log(max(2, N))
        return chosen, gate, {"sparsity_ratio": 1 - active / total.clamp(min=1), "active_connections": active,
                              "total_connections": total, "retained_information": retained,
                              "entropy": entropy}

    def shares_by_moments(self, q: Tensor, k: Tensor, bias: Tensor, real: Tensor, NI: int, N: int) -> Tensor:
        """Logarithm of the share (B, H, NI, N) of the attention of each of NI blocks of queries that N blocks
        of keys get, by means and variances of both."""
        E, wide = q.shape[-1], torch.promote_types(q.dtype, torch.float32)
        mean_q, var_q = block_moments(q.to(wide), real, NI)
        mean_k, var_k = block_moments(k.to(wide), real, N)
        left = torch.cat([mean_q * E ** -0.5, mean_q.square() / (2 * E), var_q / (2 * E)], -1)
        right = torch.cat([mean_k, var_k, mean_k.square()], -1)
        weight = bias.to(wide).view(*bias.shape[:2], N, -1).logsumexp(-1)               # of all its keys
        scores = left @ right.mT + weight[:, :, None]
        return torch.where(real.any(1)[:, None, None, None], scores, torch.zeros_like(scores)).log_softmax(-1)


def block_moments(x: Tensor, real: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """(means, variances (B, H, N, E)) of the real rows of x (B, H, P, E) in N equal blocks."""
    B, H, P, E = x.shape
    x = x * real[:, None, :, None]
    divisor = real.view(B, 1, N, -1).sum(-1, keepdim=True).clamp(min=1).to(x.dtype)
    parts = x.reshape(B, H, N, P // N, E)
    mean = parts.sum(3) / divisor
    square = parts.square().sum(3) / divisor
    return mean, (square - mean.square()).clamp(min=0)


@torch.no_grad()
def block_shares(q: Tensor, k: Tensor, bias: Tensor, real: Tensor, NI: int, N: int) -> Tensor:
    """The share (B, H, NI, N) of the attention of each of NI blocks of queries that N blocks of keys get, if
    a query's is that of the mean of the 32 or so, or the half of the block, that it belongs to. q, k (B, H,
    P, E), bias (B, H, P), real (B, P); memory is of parts of WORKSPACE scores."""
    B, H, P, E = q.shape
    parts = math.gcd(max(2, P // NI // 32), P // NI)
    count = real.view(B, NI * parts, -1).sum(-1).to(q.dtype)
    mean = (q * real[:, None, :, None]).view(B, H, NI * parts, -1, E).sum(3)
    mean = mean / count.clamp(min=1)[:, None, :, None]
    shares = count.view(B, 1, NI, 1, parts)
    shares = (shares / shares.sum(-1, keepdim=True).clamp(min=1)).expand(-1, H, -1, -1, -1).flatten(0, 1)
    mean, keys, bias = mean.flatten(0, 1), k.reshape(B * H, P, E), bias.reshape(B * H, 1, P)
    found = q.new_empty(B * H, NI, N)
    room = WORKSPACE // (parts * P)                        # blocks of queries at once
    heads, blocks = max(1, room // NI), max(1, min(NI, room))
    for h in range(0, B * H, heads):
        for begin in range(0, NI, blocks):
            part = slice(h, h + heads), slice(begin, begin + blocks)
            queries = mean[h:h + heads, begin * parts:(begin + blocks) * parts]
            p = torch.baddbmm(bias[part[0]], queries, keys[part[0]].mT, alpha=E ** -0.5).softmax(-1)
            p = torch.bmm(shares[part].to(p.dtype).flatten(0, 1), p.view(-1, parts, P))
            found[part] = p.view(*found[part].shape, P // N).sum(-1)
    return found.view(B, H, NI, N)


def attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √E + bias) v by scaled_dot_product_attention, the bias (B, H, P) of the keys as one more
    feature, so that it has a gradient and no (P, P) tensor is made."""
    E, pad = q.shape[-1], -(q.shape[-1] + 1) % 8
    bias = bias.clamp(min=-1e4)
    q = torch.cat([q * E ** -0.5, torch.ones_like(q[..., :1])], -1)
    k = torch.cat([k, bias[..., None].to(k.dtype)], -1)
    q, k, v = F.pad(q, (0, pad)), F.pad(k, (0, pad)), F.pad(v, (0, pad + 1))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :E]


class DSALoss:
    """task + sparsity × (1 - sparsity_ratio - density)² / density² + retention × (1 - retained_information) +
    entropy × entropy: for each row of the batch, meaned over layers, summed over rows."""

    def __init__(self, density: float = 0.05, sparsity: float = 0.01, retention: float = 0.01,
                 entropy: float = 0.001):
        self.density, self.weights = density, (sparsity, retention, entropy)

    def __call__(self, task: Tensor, statistics: Sequence[dict]) -> Tensor:
        """task (B,) → (B,); statistics as DynamicSparseAttention gives them, a dict a layer."""
        for found in statistics:
            terms = ((1 - found["sparsity_ratio"] - self.density).square() / self.density ** 2,
                     1 - found["retained_information"], found["entropy"])
            task = task + sum(w * t for w, t in zip(self.weights, terms, strict=True)) / len(statistics)
        return task


# 8. Mixture of experts.

class MoE(nn.Module):
    """top-k of n routed SwiGLU experts, renormalised, plus shared experts that every token visits (arXiv
    2401.06066).

    No token is dropped. Returns (y, balance): balance is the sequence-wise loss X Σ fᵢ Pᵢ (arXiv 2401.06066,
    eq. 12-14 at each row), 1 when even, summed over rows × their real tokens, so that it adds up over any
    micro-batches.
    """

    def __init__(self, dim: int, hidden_dim: int, n_experts: int = 4, n_active: int = 2, n_shared: int = 1):
        super().__init__()
        if not 0 < n_active <= n_experts:
            raise BadInput(f"n_active {n_active} must be between 1 and n_experts {n_experts}")
        self.n_active = n_active
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden_dim) for _ in range(n_experts))
        self.shared = SwiGLU(dim, hidden_dim * n_shared) if n_shared else None

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), real (B, T) True where a token counts → (B, T, D), balance."""
        B, T, D = x.shape
        flat, X, K = x.reshape(-1, D), len(self.experts), self.n_active
        scores = self.router(flat)
        weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
        top, chosen = weights.topk(K, -1)                                     # (B T, K)
        top = (top / top.sum(-1, keepdim=True)).to(x.dtype)

        order = chosen.view(-1).argsort(stable=True)                          # visits sorted by expert
        counts = torch.bincount(chosen.view(-1), minlength=X).tolist()
        visits = flat.index_select(0, order // K).split(counts)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, visits, strict=True)])
        y = torch.zeros_like(flat).index_add(0, order // K, done * top.view(-1)[order, None].to(done.dtype))
        if self.shared is not None:
            y = y + self.shared(flat)

        real = real.to(weights.dtype)[..., None]                              # (B, T, 1)
        tokens = real.sum(1)                                                  # (B, 1)
        share = (F.one_hot(chosen, X).sum(1).view(B, T, X) * real).sum(1) / (tokens.clamp(min=1) * K)
        mean = (weights.view(B, T, X) * real).sum(1) / tokens.clamp(min=1)
        balance = (X * (share * mean).sum(-1, keepdim=True) * tokens).sum()
        return y.view(B, T, D), balance


# 9. Fusion: of what a model knows of its own sequence, x (B, T, D), with what it knows of K retrieved ones,
# references (B, K, T, D), by the frequencies of ALT at each site, (B, T, 2): of everybody, of the population.
# All return (B, T, D).

def inverse_maf(frequency: Tensor, form: str = "power") -> Tensor:
    """Weight of sites by ALT frequency (...): "clamped" is 1/MAF, at most 10, the same for all below a tenth;
    "power" is (0.5/MAF)^¼, from 1 to 5.6, which tells rare variants apart (MAF of 0.0005 at least)."""
    maf = torch.minimum(frequency, 1 - frequency).clamp(5e-4, 0.5)
    return (1 / maf).clamp(max=10) if form == "clamped" else (0.5 / maf) ** 0.25


class ConcatFusion(nn.Module):
    """x + MLP([x, mean over K of the references]); the identity when new."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        _start_at_zero(self.mlp[-1])

    def forward(self, x: Tensor, references: Tensor, frequency: Tensor) -> Tensor:
        return x + self.mlp(torch.cat([x, references.mean(1)], -1))


class RareVariantAwareFusion(nn.Module):
    """References transformed, scaled by the site's frequencies, pooled over K as 0.7 mean + 0.3 maximum; x +
    0.1 MLP([x, pooled]); the identity when new."""

    def __init__(self, dim: int):
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.sensitive = nn.Sequential(nn.Linear(2, dim), nn.SiLU(), nn.Linear(dim, dim), nn.Sigmoid())
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        _start_at_zero(self.mlp[-1])

    def forward(self, x: Tensor, references: Tensor, frequency: Tensor) -> Tensor:
        made = self.transform(references) * self.sensitive(frequency)[:, None]
        pooled = 0.7 * made.mean(1) + 0.3 * made.amax(1)
        return x + 0.1 * self.mlp(torch.cat([x, pooled], -1))


class EnhancedRareVariantFusion(nn.Module):
    """Frequencies of everybody × of the population, adapted to a gate on the references; attention of x over
    the K of its site; an MLP of x and what it read; that weighted by inverse_maf; x + 0.1 of it. The identity
    when new."""

    def __init__(self, dim: int, weighting: str = "power"):
        super().__init__()
        self.weighting = weighting
        self.interaction = nn.Linear(3, dim)
        self.adapter = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.Sigmoid())
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        _start_at_zero(self.mlp[-1])

    def forward(self, x: Tensor, references: Tensor, frequency: Tensor) -> Tensor:
        both = torch.cat([frequency, frequency.prod(-1, keepdim=True)], -1)
        weighted = references * self.adapter(self.interaction(both))[:, None]
        scores = (self.query(x)[:, None] * self.key(weighted)).sum(-1) / math.sqrt(x.shape[-1])
        read = (scores.softmax(1)[..., None] * weighted).sum(1)
        weight = inverse_maf(frequency[..., 0], self.weighting)[..., None]
        return x + 0.1 * weight * self.mlp(torch.cat([x, read], -1))


def _start_at_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# 10. Language model and generation.

class LinearCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy of hidden (N, D) @ weight (V, D)ᵀ against targets (N), without ever holding (N, V).

    Gradients are made chunk by chunk in forward, while a chunk's logits are there; log-softmax in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        step = max(64, 2**22 // weight.shape[0])                              # about 16 MiB of float32 logits
        step = -(-len(hidden) // -(-len(hidden) // step)) or 1                # even chunks
        cast = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = wide if hidden.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=sums, device=hidden.device)
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dhidden = torch.empty_like(hidden) if need else None
        dweight = torch.zeros_like(weight) if need else None
        for begin in range(0, len(hidden), step):
            h, y = hidden[begin:begin + step], targets[begin:begin + step, None]
            empty, y = y == IGNORE, y.clamp(min=0)
            logp = torch.log_softmax(h @ cast.T, -1, dtype=wide)
            total -= logp.gather(1, y).masked_fill(empty, 0).sum(dtype=total.dtype)
            if need:
                d = logp.exp_().scatter_add_(1, y, logp.new_full(y.shape, -1)).to(hidden.dtype)
                torch.matmul(d, cast, out=dhidden[begin:begin + step])
                dhidden[begin:begin + step].masked_fill_(empty, 0)
                dweight += d.T @ h.masked_fill(empty, 0)
        ctx.save_for_backward(dhidden, dweight)
        return total.to(wide)

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * grad.to(dhidden.dtype), dweight * grad.to(dweight.dtype), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the cross-entropy in nats of hidden (B, T, D) against targets (B, T); IGNORE is left
    out."""
    total = LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())
    return total, (targets != IGNORE).sum()


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats (B, T) of each of targets (B, T), 0 where IGNORE; logits in chunks, made again in
    backward."""
    from torch.utils.checkpoint import checkpoint

    def part(h, y, weight):
        logits = h @ weight.T.to(h.dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), y, ignore_index=IGNORE, reduction="none")
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    known = (wanted != IGNORE).nonzero()[:, 0]                                # prompts cost no logits
    step = max(64, 2**22 // weight.shape[0])
    parts = [checkpoint(part, flat[known[i:i + step]], wanted[known[i:i + step]], weight, use_reentrant=False)
             for i in range(0, len(known), step)]
    nats = torch.cat(parts) if parts else flat.new_zeros(0)
    return nats.new_zeros(len(wanted)).index_put((known,), nats).view(targets.shape)


class Block(nn.Module):
    """Pre-norm: x + attention(norm x), then x + mlp(norm x). Output projections start at zero: an
    identity."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, dim: int, eps: float, dropout: float):
        super().__init__()
        self.norm_attn, self.attention = RMSNorm(dim, eps), attention
        self.norm_mlp, self.mlp = RMSNorm(dim, eps), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """x (B, T, D) → (x, balance)."""
        x = x + self.dropout(self.attention(self.norm_attn(x), cos, sin, documents))
        return self.add_mlp(x, documents.docs >= 0)

    def add_mlp(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm_mlp(x)
        y, balance = self.mlp(y, real) if isinstance(self.mlp, MoE) else (self.mlp(y), x.new_zeros(()))
        return x + self.dropout(y), balance


class LM(nn.Module):
    """Decoder-only language model: embedding → blocks → RMSNorm → head (shared with the embedding when
    `tied`).

    Weights map one to one onto Hugging Face's Qwen3 (with `qk_norm`, no experts). `seq_len` is the longest
    context it was trained for; `yarn` multiplies it at inference. `attention` "nsa" or "window" takes
    `sparse`: the fields of Cut, for nsa also `compression` (a key of COMPRESSIONS) and `n_memory`. To a
    token's embedding those of the `n_before` tokens before it are added, from a table for each distance, so
    that one layer of attention can find where the same tokens stood before (compare the n-grams of arXiv
    2412.09871). `sizes` rebuilds it: LM(**sizes). Raises BadInput on sizes that do not fit each other.
    """

    def __init__(self, vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int,
                 head_dim: int = 0, hidden_dim: int = 0, seq_len: int = 32_768, theta: float = 1e6,
                 yarn: float = 1.0, tied: bool = True, qk_norm: bool = True, dropout: float = 0.0,
                 eps: float = 1e-6, n_experts: int = 0, n_active: int = 2, n_shared: int = 1,
                 attention: str = "full", sparse: dict | None = None, n_before: int = 0):
        super().__init__()
        hidden_dim = hidden_dim or -(-dim * 8 // 3 // 64) * 64               # 8/3 dim, up to a multiple of 64
        self.sizes = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        divisible(DIM=(dim, 1), N_KV_HEADS=(n_kv_heads, 1), N_HEADS=(n_heads, n_kv_heads),
                  N_LAYERS=(n_layers, 1), SEQ_LEN=(seq_len, 1))
        if dim % n_heads and not self.sizes["head_dim"]:
            raise BadInput(f"DIM {dim} is not a multiple of N_HEADS {n_heads}; set HEAD_DIM")
        head_dim = head_dim or dim // n_heads
        divisible(HEAD_DIM=(head_dim, 2))
        self.sizes.update(head_dim=head_dim, hidden_dim=hidden_dim)
        if yarn < 1:
            raise BadInput(f"YARN {yarn} must be at least 1")
        self.context, self.fused = int(seq_len * yarn), []
        self.rope = rope_table(head_dim, self.context, theta, yarn, seq_len)  # no buffer: stays float32
        self.embedding = nn.Embedding(vocab_size, dim)
        self.before = nn.ModuleList(nn.Embedding(vocab_size, dim) for _ in range(n_before))
        self.dropout = nn.Dropout(dropout)

        if attention not in ("full", "window", "nsa"):
            raise BadInput(f"ATTENTION {attention!r} is not one of full, window, nsa")
        kind, options = Attention, {}
        if attention == "window":
            options = {"window": Cut(**sparse or {}).window}
        elif attention == "nsa":
            options = dict(sparse or {})
            more = {k: options.pop(k) for k in ("compression", "n_memory") if k in options}
            kind, options = NativeSparseAttention, {"cut": Cut(**options), **more}

        def block():
            attention = kind(dim, n_heads, n_kv_heads, head_dim, qk_norm, **options)
            experts = n_experts and MoE(dim, hidden_dim, n_experts, n_active, n_shared)
            return Block(attention, experts or SwiGLU(dim, hidden_dim), dim, eps, dropout)
        self.layers = nn.ModuleList(block() for _ in range(n_layers))
        self.norm = RMSNorm(dim, eps)
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        """Matrices are normal with standard deviation 1/√fan-in, embeddings 0.02; output projections and head
        zero."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
            if isinstance(module, NativeSparseAttention):
                nn.init.zeros_(module.gates.weight)
                module.gates.bias.data.view(-1, 3).copy_(torch.tensor([-2.0, -2.0, 2.0]))  # first the window
        elif isinstance(module, SwiGLU):
            nn.init.zeros_(module.down.weight)
        elif isinstance(module, LM) and module.head is not None:
            nn.init.zeros_(module.head.weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits are hidden @ head_weight.T."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor, docs: Tensor, targets: Tensor, each: bool = False,
                shared: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Training: ids, docs, targets (B, T) → cross-entropy sum in nats (`each`: of each token, (B, T)),
        count, balance sum. `shared` as Documents has it."""
        hidden, balance = self.hidden(ids, docs, shared)
        if each:
            return token_nats(hidden, self.head_weight, targets), (targets != IGNORE).sum(), balance
        return *linear_cross_entropy(hidden, self.head_weight, targets), balance

    def _start(self, ids: Tensor, positions: Tensor, earlier: Tensor | None = None
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings and rotary angles of ids (B, T); `earlier` (B, n_before): the ids before them."""
        if ids.shape[1] > self.context:
            raise BadInput(f"{ids.shape[1]} tokens do not fit the model's context of {self.context}")
        if self.rope.device != ids.device:
            self.rope = self.rope.to(ids.device)
        x, kind, (B, T) = self.embedding(ids), ids.device.type, ids.shape
        if self.before:
            earlier = ids.new_zeros(B, len(self.before)) if earlier is None else earlier
            all_ids = torch.cat([earlier, ids], 1)
            for n, table in enumerate(self.before, 1):
                shifted = table(all_ids[:, len(self.before) - n:][:, :T])
                x = x + shifted * (positions >= n)[..., None]       # not across the beginning of a document
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return self.dropout(x), *self.rope[:, positions].to(torch.promote_types(x.dtype, torch.float32))

    def hidden(self, ids: Tensor, docs: Tensor | None = None,
               shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T), docs (B, T) or None for one document a row → normalised hidden states (B, T, D),
        balance. `shared` as Documents has it, where there are no n_before."""
        if shared is not None and self.before:
            raise ValueError("embeddings of the tokens before do not reach back into a shared beginning")
        documents = Documents(torch.zeros_like(ids) if docs is None else docs, shared)
        x, cos, sin = self._start(ids, documents.positions)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, cos, sin, documents)
            balances.append(balance)
        return self.norm(x), torch.stack(balances).sum()

    def read(self, ids: Tensor, lengths: Sequence[int], cache: Cache, width: int = 0,
             each: bool = False) -> Tensor:
        """Read `lengths[b]` more tokens of each row from ids (B, T), padded behind; hidden state of the last
        (B, D), or of each (B, T, D). With `width` one more token a row attends over so many columns of the
        cache, those behind it masked: products of the same shape however long the longest row is."""
        (B, T), device, before = ids.shape, ids.device, cache.lengths
        short = T == 1 or B == 1 and T * (before[0] + T) <= STEP_PAIRS
        if self.fused and short and min(lengths) == T and not torch.is_autocast_enabled("cpu"):
            y = self._step(ids.flatten(), cache)
            return y.view(B, T, -1) if each else y.view(B, T, -1)[:, -1]
        columns = torch.tensor(before, device=device)[:, None] + torch.arange(T, device=device)
        earlier = None
        if self.before:
            rows = torch.arange(B, device=device)[:, None]
            cache.ids[rows, columns.clamp(max=cache.ids.shape[1] - 1)] = ids
            earlier = cache.ids[rows, (columns[:, :1] + torch.arange(-len(self.before), 0, device=device)
                                       ).clamp(min=0)]
        x, cos, sin = self._start(ids, columns.clamp(max=self.context - 1), earlier)
        real = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
        if max(before) == 0 and T > 1:
            sees = Documents(torch.where(real, 0, -1), flex=False)
        elif T == 1 and min(before) == max(before) and not width:
            sees = None
        else:
            future = torch.arange(width or max(before) + T, device=device) > columns[:, :, None]
            sees = torch.zeros_like(future, dtype=x.dtype).masked_fill_(future, -math.inf)
        reading = Reading(before, list(lengths), columns, sees, width)
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            x = x + layer.attention.cached(layer.norm_attn(x), cos, sin, memory, reading)
            x, _ = layer.add_mlp(x, real)
        cache.lengths = [a + b for a, b in zip(before, lengths, strict=True)]
        if each:
            return self.norm(x)
        last = torch.tensor(lengths, device=device) - 1
        return self.norm(x[:, -1] if T == 1 else x[torch.arange(B, device=device), last])

    def fuse(self) -> None:
        """For inference, after the matrices are joined: steps of one token by step_kernels, where they
        can."""
        self.fused, a = [], self.layers[0].attention
        plain = all(type(b.attention) is Attention and type(b.mlp) is SwiGLU and all(
            isinstance(x, FixedLinear) for x in (*b.attention.joined, *b.mlp.joined)) for b in self.layers)
        if not plain or self.before:
            return
        if step_kernels(self.head_weight.dtype, a.n_heads // a.n_kv_heads, a.head_dim) is not None:
            self.eps_qk = getattr(a.norm_q, "eps", 0.0)
            place = lambda x: 0 if x is None else x.data_ptr()
            self.fused = [[place(b.norm_attn.weight), *b.attention.joined[0].pointers,
                           place(b.attention.joined_norm), *b.attention.joined[1].pointers,
                           place(b.norm_mlp.weight), *b.mlp.joined[0].pointers, *b.mlp.joined[1].pointers]
                          for b in self.layers]

    def _step(self, ids: Tensor, cache: Cache) -> Tensor:
        """`read` of one token a row, ids (B,), or of B tokens of one row; a row's bits are its own, whatever
        the others hold."""
        B, a, rows, weight = len(ids), self.layers[0].attention, len(cache.lengths), self.head_weight
        kernels, at = step_kernels(weight.dtype, a.n_heads // a.n_kv_heads, a.head_dim), cache.lengths
        y, memory = weight.new_empty(B, weight.shape[1]), cache.layers[0]["k"]
        if not cache.table:                                     # where everything is, for STEP_C's Layer
            cache.table.append(torch.tensor([[*own, m["k"].data_ptr(), m["v"].data_ptr()]
                                             for own, m in zip(self.fused, cache.layers, strict=True)]))
        layers, = cache.table
        at = torch.tensor(at if rows == B else range(at[0], at[0] + B))
        kernels.step(layers.data_ptr(), len(layers), self.embedding.weight.data_ptr(),
                     self.norm.weight.data_ptr(), ids.data_ptr(), y.data_ptr(), B, y.shape[1],
                     self.sizes["hidden_dim"], self.rope.data_ptr(), self.rope.shape[1],
                     memory.stride(0) if rows == B else 0, memory.stride(1), at.data_ptr(), a.n_kv_heads,
                     a.window, self.norm.eps, self.eps_qk, torch.get_num_threads())
        cache.lengths = [n + B // rows for n in cache.lengths]
        return y


def compile_layers(model: nn.Module, wanted: str, steps: int) -> None:
    """Compile a language model's layers (one is compiled, all use it): "yes", "no", or "auto": for at least
    200 updates, where there is a C++ compiler, and not with experts, whose shares always change."""
    fits = isinstance(model, LM) and not model.sizes["n_experts"]
    if fits and (wanted == "yes" or wanted == "auto" and steps >= 200 and shutil.which("g++")):
        torch._dynamo.config.suppress_errors = wanted == "auto"  # a broken compiler costs speed, not the run
        for layer in model.layers:
            layer.compile()


class Classic(nn.Module):
    """The transformer of 2017 as a causal language model (arXiv 1706.03762): embedding × √dim, sinusoidal
    positions, post-norm nn.TransformerEncoder layers *with* a causal mask. Same interface as LM, no cache."""

    def __init__(self, vocab_size: int, dim: int = 768, n_layers: int = 12, n_heads: int = 12,
                 hidden_dim: int = 3072, seq_len: int = 512, dropout: float = 0.1):
        super().__init__()
        self.sizes = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        divisible(DIM=(dim, n_heads), N_LAYERS=(n_layers, 1), SEQ_LEN=(seq_len, 1))
        self.context, self.n_heads = seq_len, n_heads
        self.embedding = nn.Embedding(vocab_size, dim)
        angle = torch.arange(seq_len)[:, None] * 10_000 ** (-torch.arange(0, dim, 2) / dim)
        sinusoid = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
        self.register_buffer("sinusoid", sinusoid, persistent=False)
        layer = nn.TransformerEncoderLayer(dim, n_heads, hidden_dim, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=dim ** -0.5)
        for p in self.layers.parameters():  # the layers are copies of one: draw each
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits are hidden @ head_weight.T."""
        return self.head.weight

    forward = LM.forward

    def hidden(self, ids: Tensor, docs: Tensor | None = None,
               shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As LM.hidden; the balance is zero."""
        if ids.shape[1] > self.context:
            raise BadInput(f"{ids.shape[1]} tokens do not fit the model's context of {self.context}")
        documents = Documents(torch.zeros_like(ids) if docs is None else docs, shared)
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.sinusoid[documents.positions]
        keep = documents.keep().expand(-1, self.n_heads, -1, -1).flatten(0, 1)
        return self.layers(self.dropout(x), mask=~keep), x.new_zeros(())


MODELS = {"LM": LM, "Classic": Classic}


def build(checkpoint: dict, **changes) -> nn.Module:
    """The model of a checkpoint, sizes and weights from the file; `changes` override sizes that hold no
    weights."""
    if checkpoint["kind"] not in MODELS:
        raise BadInput(f"the checkpoint holds a {checkpoint['kind']}; this works on {' or '.join(MODELS)}")
    model = MODELS[checkpoint["kind"]](**{**checkpoint["sizes"], **changes})
    if any(name.endswith(".base.weight") for name in checkpoint["model"]):
        raise BadInput("the checkpoint is for train_lora.py to go on from, an adapter beside its base; name "
                       "the base (for serve.py ADAPTER= besides), or train with MERGE=True")
    model.load_state_dict(checkpoint["model"])
    return model


HF_NAMES = (  # of LM's parameters in Hugging Face's Qwen3, Qwen3-MoE and Llama
    ("embedding.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("attention.q.", "self_attn.q_proj."),
    ("attention.k.", "self_attn.k_proj."),
    ("attention.v.", "self_attn.v_proj."),
    ("attention.out.", "self_attn.o_proj."),
    ("attention.norm_q.", "self_attn.q_norm."),
    ("attention.norm_k.", "self_attn.k_norm."),
    ("mlp.router.", "mlp.gate."),
    (".gate.", ".gate_proj."),
    (".up.", ".up_proj."),
    (".down.", ".down_proj."),
    ("norm_attn.", "input_layernorm."),
    ("norm_mlp.", "post_attention_layernorm."),
    ("head.", "lm_head."),
)


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter of LM."""
    if name == "norm.weight":
        return "model.norm.weight"
    router = "mlp.router." in name
    for ours, theirs in HF_NAMES:
        if not (router and ours == ".gate.") and (ours in name if ours[0] != "h" else name.startswith(ours)):
            name = name.replace(ours, theirs)
    return name


class LoRA(nn.Module):
    """A frozen linear map and a low-rank addition, zero at first: base(x) + scale × B A dropout(x), scale
    alpha / rank, or alpha / √rank with `rslora` (arXiv 2106.09685, 2312.03732)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / (math.sqrt(rank) if rslora else rank)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=wide))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=wide))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The sum, as one matrix."""
        return self.base.weight + (self.scale * (self.B.double() @ self.A.double())).to(
            self.base.weight.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return self.base(x.to(self.base.weight.dtype)) + self.scale * (
            (self.dropout(x) @ self.A.T) @ self.B.T
        )


LORA_TARGETS = (
    "q",
    "k",
    "v",
    "out",
    "gate",
    "up",
    "down",
)  # linear layers of attention and MLP, by our names


def add_lora(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0,
             rslora: bool = False) -> list[str]:
    """Freeze a model and put a LoRA around each linear layer of its blocks with one of these last names; the
    names, in order. Raises BadInput where there is none."""
    wrong = [t for t in targets if t not in LORA_TARGETS]
    if wrong or not targets:
        raise BadInput(f"TARGETS {tuple(targets)} must be some of {', '.join(LORA_TARGETS)}")
    if any(isinstance(m, LoRA) for m in model.modules()):
        raise BadInput("the model has an adapter already; merge it first")
    model.requires_grad_(False)
    found = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("layers.") and name.rsplit(".", 1)[-1] in targets
    ]
    for name in found:
        parent, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(parent, last, LoRA(getattr(parent, last), rank, alpha, dropout, rslora))
    if not found:
        raise BadInput(f"no layer of the model is called one of {', '.join(targets)}")
    return found


def merge_lora(model: nn.Module) -> nn.Module:
    """The model with every LoRA folded into its linear layer. Raises BadInput when there is none left."""
    adapters = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRA)]
    if not adapters:
        raise BadInput("there is no adapter to merge; was it merged already?")
    for name, lora in adapters:
        lora.base.weight.data.copy_(lora.weight.detach())
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], lora.base)
    return model


def save_adapter(out: str | Path, model: nn.Module, base: str, rank: int, alpha: float, dropout: float,
                 rslora: bool) -> None:
    """Write OUT/adapter_model.safetensors and adapter_config.json as PEFT has them."""
    from safetensors.torch import save as to_bytes
    state, targets = {}, set()
    for name, lora in model.named_modules():
        if isinstance(lora, LoRA):
            theirs = hf_name(name + ".").rstrip(".")
            targets.add(theirs.rpartition(".")[2])
            for side in ("A", "B"):
                state[f"base_model.model.{theirs}.lora_{side}.weight"] = (
                    getattr(lora, side).detach().float().cpu()
                )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
              "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora, "bias": "none",
              "target_modules": sorted(targets), "fan_in_fan_out": False, "inference_mode": True}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "adapter_model.safetensors", lambda file: file.write(to_bytes(state, {"format": "pt"})))
    write_whole(out / "adapter_config.json", lambda file: file.write(json.dumps(config, indent=1).encode()))


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises BadInput."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no JSON object")
    return found


def read_safetensors(path: Path) -> dict:
    """The tensors of a .safetensors file by name. Raises BadInput."""
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except Exception as error:  # the library has a class of its own for a damaged file
        raise BadInput(f"{path} cannot be read as safetensors ({_first_line(error)})") from None


def adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of a folder in PEFT layout. Raises BadInput unless it is a LoRA that `LoRA` can
    be."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    plain = dict(peft_type="LORA", bias="none", use_dora=False, rank_pattern={}, alpha_pattern={})
    other = {k: config[k] for k, v in plain.items() if config.get(k, v) not in (v, None)}
    started = config.get("init_lora_weights", True)
    if isinstance(started, str) and started not in ("gaussian", "orthogonal", "eva"):
        other["init_lora_weights"] = started  # these change the base
    if other:
        raise BadInput(f"{path} is not of a plain LoRA adapter: {other}")
    missing = [k for k in ("peft_type", "r", "lora_alpha") if k not in config]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The model with the adapter of a folder in PEFT layout around its layers. Raises BadInput when the two
    do not fit."""
    folder = Path(folder)
    config, state = adapter_config(folder), read_safetensors(folder / "adapter_model.safetensors")
    stems = {hf_name(name + ".").rstrip("."): name for name, m in model.named_modules()
             if isinstance(m, nn.Linear)}
    wanted = {f"base_model.model.{theirs}.lora_{side}.weight": (name, side)
              for theirs, name in stems.items() for side in ("A", "B")}
    known = [k for k in state if k in wanted]
    if len(known) != len(state) or not known:
        lost = [k for k in state if k not in wanted]
        raise BadInput(f"{folder}: {len(known)} of {len(state)} tensors fit the model; unknown: {lost[:2]}")
    rank = config["r"]
    for name in {wanted[k][0] for k in known}:
        linear, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        lora = LoRA(linear, rank, config["lora_alpha"], config.get("lora_dropout", 0.0),
                    bool(config.get("use_rslora")))
        for side in ("A", "B"):
            key = f"base_model.model.{hf_name(name + '.').rstrip('.')}.lora_{side}.weight"
            value, own = state.get(key), getattr(lora, side)
            if value is None or value.shape != own.shape:
                raise BadInput(
                    f"{folder}: {key} is {None if value is None else tuple(value.shape)}, the model "
                    f"needs {tuple(own.shape)}: an adapter for other sizes"
                )
            own.data.copy_(value)
        setattr(parent, name.rpartition(".")[2], lora.to(linear.weight.device))
    return model


def for_inference(model: nn.Module, dtype: torch.dtype, int8: bool = False) -> nn.Module:
    """The model itself, from now on only to be read: in `dtype`, without gradients, matrices of one input
    joined, and with `int8` rounded as fixed_linear does."""
    model.eval().requires_grad_(False).to(dtype)
    for module in model.modules():
        if isinstance(module, Attention | SwiGLU):
            module.join(int8)
    model.fixed_head = fixed_linear(model.head_weight, int8)
    if isinstance(model, LM):
        model.fuse()
    return model


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence) -> Tensor:
    """Next tokens (B) from float32 logits (B, V): the best at temperature 0, else a draw per row by its
    generator."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # the best always stays
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)
    p = logits.softmax(-1)
    noise = torch.stack([torch.empty_like(row).exponential_(generator=g)
                         for row, g in zip(p, generators, strict=True)])
    return (p / noise).argmax(-1)  # an exact draw: exponential races


@torch.inference_mode()
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
             seeds: Sequence[int] | int = 0, eos: int = 2, cached: bool = True) -> Iterator[list[int | None]]:
    """Yield, for each step, every row's next token; None for a row that has ended (its `eos` is yielded).

    Prompts may differ in length; a row's tokens do not depend on its neighbours. `seeds`: one, or one a row.
    `repetition_penalty` p divides positive and multiplies negative logits of tokens already seen (arXiv
    1909.05858). Raises BadInput when a prompt and `max_tokens` together pass the context.
    """
    B, device = len(prompts), model.head_weight.device
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or repetition_penalty <= 0 or max_tokens < 1:
        raise BadInput(f"out of range: TEMPERATURE {temperature} (≥ 0), TOP_P {top_p} (0-1], TOP_K {top_k} "
                       f"(≥ 0), REPETITION_PENALTY {repetition_penalty} (> 0), MAX_TOKENS {max_tokens} (≥ 1)")
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise BadInput("a prompt has no tokens; begin with <s>")
    if longest + max_tokens > model.context:
        raise BadInput(f"a prompt of {longest} tokens and MAX_TOKENS {max_tokens} pass the context of "
                       f"{model.context}; shorten them" + ", or stretch it with YARN" * isinstance(model, LM))
    seeds = [seeds] * B if isinstance(seeds, int) else seeds
    generators = [torch.Generator(device).manual_seed(s) for s in seeds]
    ids = torch.zeros(B, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
    ids, lengths = ids.to(device), torch.tensor([len(p) for p in prompts], device=device)
    cached = cached and isinstance(model, LM)
    cache = Cache(model, B, longest + max_tokens) if cached else None
    head = getattr(model, "fixed_head", None) or (lambda x: F.linear(x, model.head_weight))
    seen = torch.zeros(B, model.head_weight.shape[0], dtype=torch.bool, device=device)
    rows, live, new = torch.arange(B, device=device), [True] * B, ids
    for row, prompt in enumerate(prompts):
        seen[row, ids[row, :len(prompt)]] = True
    for step in range(max_tokens):
        if cached:
            last = model.read(new, [1] * B if step else list(map(len, prompts)), cache)
        else:
            docs = torch.where(torch.arange(ids.shape[1], device=device) < lengths[:, None], 0, -1)
            last = model.hidden(ids, docs)[0][rows, lengths - 1]
        logits = head(last).float()
        if repetition_penalty != 1:
            lower = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, lower, logits)
        token = choose(logits, temperature, top_k, top_p, generators)
        seen[rows, token] = True
        new = token[:, None]
        if not cached:
            ids = torch.cat([ids, torch.zeros_like(new)], 1)
            ids[rows, lengths] = token
            lengths = lengths + 1
        values = token.tolist()
        yield [t if alive else None for t, alive in zip(values, live, strict=True)]
        live = [alive and t != eos for t, alive in zip(values, live, strict=True)]
        if not any(live):
            return


# 11. Text: tokenizer, chat rendering, streams of text, packing.

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # the same three in SmolLM2, MiniMind and others


def copy_tokenizer(source: str | Path, out: str | Path) -> None:
    """Copy a tokenizer's files from one folder into another, as far as they are there."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(source) / name
        if path.exists() and path.resolve() != (Path(out) / name).resolve():
            shutil.copy(path, out)


def load_tokenizer(path: str | Path):
    """A `tokenizers.Tokenizer` whose ids 0, 1, 2 are <pad>, <s>, </s> or CHATML; these strings in a text stay
    text."""
    from tokenizers import Tokenizer
    if not Path(path).is_file():
        raise BadInput(f"there is no tokenizer {path} (models of bytes have none); make one: "
                       f"python data/prepare_tokenizer.py DATA=... OUT={path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path} is not a tokenizer.json ({str(error)[:80]})") from None
    if special_names(tokenizer) not in (SPECIAL, CHATML):
        raise BadInput(f"{path} must hold <pad>, <s>, </s> (or {', '.join(CHATML)}) as ids 0, 1, 2; "
                       "make it with prepare_tokenizer.py")
    if tokenizer.get_vocab_size() > 65_535:
        raise BadInput(f"{path} has {tokenizer.get_vocab_size()} tokens; token files are uint16: at most "
                       "65,535")
    tokenizer.encode_special_tokens = True
    return tokenizer


def same_vocabulary(name: str, found: dict, tokenizer):
    """Refuse the checkpoint `found`, called `name`, with a tokenizer of another size."""
    there, n = found["sizes"].get("vocab_size"), tokenizer.get_vocab_size()
    if there != n:
        raise BadInput(f"{name} has {there} tokens, its tokenizer {n}")


def special_names(tokenizer) -> list[str]:
    """What the tokenizer calls PAD, BOS and EOS."""
    return [tokenizer.id_to_token(i) for i in (PAD, BOS, EOS)]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without <s> or </s>."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def render_chat(tokenizer, messages: Sequence[dict], reply: bool = False) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of a conversation: `<s>role\\ncontent</s>\\n` a turn, True on what the
    assistant says and on its </s>. `reply` opens the assistant's next turn. Raises BadInput on an unknown
    role or no content."""
    ids, mask = [], []

    def add(tokens, supervised):
        ids.extend(tokens)
        mask.extend([supervised] * len(tokens))
    newline = encode(tokenizer, "\n")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise BadInput("a message needs a role (system, user, assistant) and a content string, got "
                           f"{str(message)[:80]}")
        add([BOS, *encode(tokenizer, role + "\n")], False)
        add([*encode(tokenizer, content), EOS], role == "assistant")
        add(newline, False)
    if reply:
        add([BOS, *encode(tokenizer, "assistant\n")], False)
    return ids, mask


# render_chat in Jinja. A newline is always a token of its own in our tokenizers, so the two split text alike;
# others may join one with spaces that a content begins with.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}")


def chat_template(tokenizer) -> str:
    """CHAT_TEMPLATE with the tokenizer's own names."""
    _, begin, end = special_names(tokenizer)
    return CHAT_TEMPLATE.replace("</s>", end).replace("<s>", begin)


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes of every token of a byte-level tokenizer; PAD, BOS and EOS have none."""
    # The byte-level alphabet of GPT-2: printable bytes are themselves, the others go to 256 and on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    table, added = [b""] * tokenizer.get_vocab_size(), tokenizer.get_added_tokens_decoder()
    for token, i in tokenizer.get_vocab().items():
        if i in (PAD, BOS, EOS):
            continue
        if i not in added and not all(c in byte_of for c in token):
            raise BadInput(f"the tokenizer is not byte-level: its token {i} is {token!r}")
        table[i] = token.encode() if i in added else bytes(byte_of[c] for c in token)
    return table


class TextStream:
    """Tokens of one row in, text out as soon as it is certain: no character is split, no stop string
    shown."""

    def __init__(self, table: Sequence[bytes], stop: Sequence[str] = ()):
        self.table, self.stop, self.ended = table, [s for s in stop if s], False
        self.decoder, self.held = codecs.getincrementaldecoder("utf-8")("replace"), ""

    def feed(self, token: int) -> str:
        """The text that this token makes certain; sets `ended` at a stop string."""
        return self._release(self.decoder.decode(self.table[token]))

    def finish(self) -> str:
        """What was held back, when no token follows."""
        text = self._release(self.decoder.decode(b"", True))
        text, self.held = text + self.held, ""
        return text

    def _release(self, text: str) -> str:
        if self.ended:
            return ""
        self.held += text
        found = [(at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:  # the one complete first, however the tokens cut it
            text, self.held, self.ended = self.held[:min(found)[1]], "", True
            return text
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text


def stream(model: nn.Module, table: Sequence[bytes], prompts: Sequence[Sequence[int]], max_tokens: int,
           stop: Sequence[str] = (), **sampling) -> Iterator[tuple[int, str]]:
    """Yield (row, text) pieces as they come; `table` is token_bytes(tokenizer), `sampling` goes to
    `generate`."""
    streams = [TextStream(table, stop) for _ in prompts]
    for tokens in generate(model, prompts, max_tokens, **sampling):
        for row, token in enumerate(tokens):
            if token is not None and not streams[row].ended and (piece := streams[row].feed(token)):
                yield row, piece
        if all(s.ended or t is None for s, t in zip(streams, tokens, strict=True)):
            break
    for row, s in enumerate(streams):
        if piece := s.finish():
            yield row, piece


def pack(lengths: np.ndarray, room: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Put documents whole into rows of `room` tokens: (order, bounds), row r holds order[bounds[r]:bounds[r +
    1]].

    Longest first, each into the emptiest row, so that rows are mixed and evenly full; by counts of equal
    lengths, so that a million documents take about a second. Who goes where is drawn from `seed`; the number
    of rows is not.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and (lengths.max() > room or lengths.min() < 1):
        raise ValueError(f"document lengths must be 1 to {room}, got {lengths.min()} to {lengths.max()}")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    shuffled = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sizes, counts = np.unique(-lengths, return_counts=True)
    n_rows = -(-int(lengths.sum()) // room)
    open_rows, row_of, at = {room: [np.arange(n_rows)]}, np.empty(len(lengths), np.int64), 0
    for size, count in zip(-sizes, counts, strict=True):
        while count:
            most = max(open_rows)
            if most < size:
                open_rows.setdefault(room, []).append(np.array([n_rows]))
                n_rows, most = n_rows + 1, room
            rows = open_rows[most].pop()
            if not open_rows[most]:
                del open_rows[most]
            if len(rows) > count:
                open_rows.setdefault(most, []).append(rows[count:])
                rows = rows[:count]
            row_of[shuffled[at:at + len(rows)]] = rows
            open_rows.setdefault(most - int(size), []).append(rows)
            at, count = at + len(rows), count - len(rows)
    row_of = rng.permutation(n_rows)[row_of]
    return np.argsort(row_of, kind="stable"), np.append(0, np.cumsum(np.bincount(row_of, minlength=n_rows)))


def collate(rows: Sequence[Sequence[tuple]], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, docs, targets (B, seq_len) int64 of rows of documents.

    A document is (tokens,) or (tokens, mask): n tokens make n - 1 positions, each predicting the next token
    where `mask` of that next token is True. Padding is PAD, -1, IGNORE.
    """
    ids = np.full((len(rows), seq_len), PAD, np.int64)
    targets, docs = np.full_like(ids, IGNORE), np.full_like(ids, -1)
    for r, documents in enumerate(rows):
        at = 0
        for i, (tokens, *mask) in enumerate(documents):
            n = len(tokens) - 1
            ids[r, at:at + n], targets[r, at:at + n], docs[r, at:at + n] = tokens[:-1], tokens[1:], i
            if mask:
                targets[r, at:at + n][~np.asarray(mask[0][1:], bool)] = IGNORE
            at += n
    return torch.from_numpy(ids), torch.from_numpy(docs), torch.from_numpy(targets)


@torch.no_grad()
def answer_nats(run: Run, model: nn.Module, chats, micro: int, limit: int = 0) -> dict:
    """Nats per answer token of rows of chats (data/prepare_chats.py; the first `limit`, 0 = all), `micro` at
    a time, over all processes."""
    model.eval()
    totals = [0.0, 0]
    rows = range(run.rank, min(limit or chats.count, chats.count), run.world)
    for batch in chats.batches(rows, micro, run.device):
        with run.autocast():
            loss, count, _ = model(*batch)
        totals = [totals[0] + float(loss), totals[1] + int(count)]
    model.train()
    nats, tokens = run.sum(*totals)
    return {"nats_per_answer_token": nats / max(1, tokens), "answer_tokens": int(tokens)}


def exact_match(run: Run, model: nn.Module, tokenizer, conversations: Sequence[list], longest: int) -> dict:
    """Share of conversations (lists of turns) whose last answer, of up to `longest` tokens, the model gives
    to the letter, greedily; over all processes. {} where there is no such answer."""
    table, asked = token_bytes(tokenizer), []
    for turns in conversations:
        prompt = render_chat(tokenizer, turns[:-1], reply=True)[0]
        if turns[-1]["role"] == "assistant" and len(encode(tokenizer, turns[-1]["content"])) <= longest and \
                len(prompt) + longest < model.context:
            asked.append((prompt, turns[-1]["content"].strip()))
    asked = sorted(asked, key=lambda row: len(row[0]))[run.rank::run.world]
    model.eval()
    right = 0
    for at in range(0, len(asked), 16):
        part = asked[at:at + 16]
        answers = [""] * len(part)
        for row, piece in stream(model, table, [p for p, _ in part], longest + 1, temperature=0.0):
            answers[row] += piece                        # in the weights' own precision, as the cache is
        right += sum(a.strip() == wanted for a, (_, wanted) in zip(answers, part, strict=True))
    model.train()
    right, count = run.sum(right, len(asked))
    return {"exact_match": right / count, "exact_of": int(count)} if count else {}
