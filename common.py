"""What every experiment in this repo must do alike to be right; what makes one different is in its script.

Sections: 0 conventions · 1 constants · 2 processes · 3 one update · 4 checkpoints and records · 5 small
layers · 6 attention and its cache · 8 mixture of experts · 10 language model and generation · 11 text.
Nothing refers to a later section.
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
import dataclasses
import datetime
import difflib
import fcntl
import json
import math
import os
import re
import signal
import sys
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
        elif re.match(r"[A-Z][A-Z0-9_]* = ", line):
            text += f"  {line}\n"
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


def cli(names: dict, main: Callable) -> None:
    """Run a script: overrides, then `main`; BadInput becomes one line on stderr and exit status 1."""
    script = Path(names["__file__"]).name
    try:
        override(names, sys.argv[1:])
        main()
    except BadInput as error:
        code = f"{script}: {error}"
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        first = _first_line(error)
        if isinstance(error, RuntimeError) and not re.search(
            "(out of|allocate) memory|bad_alloc", first, re.I
        ):
            raise
        traceback.print_exc()
        code = f"{script}: out of memory ({first}); lower MICRO_BATCH, then SEQ_LEN or DIM"
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has left: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    else:
        return
    if not isinstance(code, int):
        print(f"error: {code}", file=sys.stderr, flush=True)
    if dist.is_initialized() and code:  # the other ranks wait in a collective: leave without waiting for them
        sys.stderr.flush()
        os._exit(1)
    raise SystemExit(code if isinstance(code, int) else 1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def divisible(**pairs: tuple[int, int]) -> None:
    """Raise BadInput unless each `NAME=(value, divisor)` is positive and divides evenly."""
    for name, (value, divisor) in pairs.items():
        if divisor < 1 or value < 1 or value % divisor:
            raise BadInput(f"{name} {value} must be a positive multiple of {divisor}")


def within(low: float, high: float, **values: float) -> None:
    """Raise BadInput unless low ≤ value ≤ high for every NAME=value."""
    for name, value in values.items():
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise BadInput(f"{name} {value} must be {limit}")


# 2. Processes: the same file under `python`, `torchrun` on one machine and `torchrun` on several.

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
    threads: int = 1                   # CPU threads that it may use by day
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

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in the loss: DDP when there are several processes, else itself."""
        if self.world == 1:
            return model
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

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()

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


def start(seed: int, dtype: str = "auto") -> Run:
    """Join the other processes (as torchrun's environment says), choose device and precision, catch stop
    signals."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
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
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    run = Run(rank, local, world, device, torch.float32, seed, threads=torch.get_num_threads())
    set_dtype(run, run.share(pick_dtype(dtype, device)))
    torch.manual_seed(seed)
    try:
        for sign in (signal.SIGINT, signal.SIGTERM):
            run.handlers[sign] = signal.signal(sign, lambda number, frame: _on_signal(run, number))
    except ValueError:  # not the main thread: whoever owns it handles the signals
        pass
    return run


def set_dtype(run: Run, dtype: torch.dtype) -> None:
    """Compute in `dtype` from now on; float16 comes with a gradient scaler (started low: sums exceed
    means)."""
    run.dtype = dtype
    run.scaler = torch.amp.GradScaler(run.device.type, init_scale=2.0**8) if dtype == torch.float16 else None


def _on_signal(run: Run, number: int) -> None:
    if run.signal:  # asked twice: do not finish the step
        raise KeyboardInterrupt
    run.signal = number
    if run.first:
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop now)", flush=True
        )


def stop(run: Run) -> None:
    """Undo `start`: signals, lock, process group."""
    for sign, handler in run.handlers.items():
        signal.signal(sign, handler)
    run.handlers = {}
    if run.lock:
        run.lock.close()
    if run.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


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
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule == "wsd":
        return floor + (1 - floor) * min(1.0, max(0.0, steps - step) / max(1.0, decay * steps))
    raise BadInput(f"SCHEDULE {schedule!r} is neither cosine nor wsd")


def owned_once(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise unless every trainable parameter is in exactly one optimizer."""
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    wanted = {p for p in model.parameters() if p.requires_grad}
    if len(owned) != len(set(owned)) or set(owned) != wanted:
        lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in set(owned)]
        raise ValueError(f"parameters in no optimizer: {lost}; in two: {len(owned) - len(set(owned))}")


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
    totals = torch.zeros(3, dtype=wide, device=run.device)  # loss, count, signal
    for i, batch in enumerate(batches):
        sync = i == len(batches) - 1 or run.world == 1
        with contextlib.nullcontext() if sync else net.no_sync():
            with run.autocast():
                loss, count = loss_of(batch)
            (run.scaler.scale(loss) if run.scaler else loss).backward()
        totals[0] += loss.detach()
        totals[1] += count
    totals[2] += run.signal
    if run.world > 1:
        dist.all_reduce(totals)
    for optimizer in optimizers if run.scaler else ():
        run.scaler.unscale_(optimizer)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    scale = run.world / totals[1].clamp(min=1)  # DDP averaged over ranks; we want the sum
    torch._foreach_mul_(grads, float(scale))
    norm = torch.nn.utils.get_total_norm(grads)
    loss, count, sign = totals.tolist()  # the one wait for the device
    norm = float(norm)
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
FREE = frozenset("OUT RESUME LOG_EVERY SAVE_EVERY SAMPLE_EVERY WANDB MICRO_BATCH NIGHT EVAL PATIENCE".split())


def write_whole(path: Path, write: Callable) -> None:
    """Call `write(file)` so that `path` holds either all of it or what it held before; raises BadInput on
    OSError."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
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
    """Write OUT/checkpoint.pt (process 0), keeping the one before as checkpoint.prev.pt."""
    if run.first:
        path = Path(out) / "checkpoint.pt"
        whole = {
            **weights_of(model),
            "step": step,
            "optimizers": [o.state_dict() for o in optimizers],
            "scaler": run.scaler.state_dict() if run.scaler else None,
            "dtype": str(run.dtype)[6:],
            "state": state,
            "constants": constants,
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version},
        }
        if path.exists():  # a second name for the old file first: there is a whole checkpoint at every moment
            spare = path.with_name("checkpoint.prev.tmp")
            spare.unlink(missing_ok=True)
            os.link(path, spare)
            os.replace(spare, path.with_name("checkpoint.prev.pt"))
        write_whole(path, lambda file: torch.save(whole, file))
    run.wait()


def weights_of(model: nn.Module) -> dict:
    """What rebuilds a model: class name, constructor sizes, weights in float32."""
    return {"kind": type(model).__name__, "sizes": model.sizes,
            "model": {k: v.detach().float().cpu() if v.is_floating_point() else v.cpu()
                      for k, v in model.state_dict().items()}}


def save_best(run: Run, out: str | Path, step: int, model: nn.Module, metrics: dict) -> None:
    """Write OUT/best.pt: the weights alone, with the metrics that made them the best."""
    if run.first:
        whole = {**weights_of(model), "step": step, "metrics": metrics}
        write_whole(Path(out) / "best.pt", lambda file: torch.save(whole, file))
    run.wait()


def load(path: str | Path) -> dict:
    """A checkpoint file of ours as a dict on the CPU; raises BadInput if missing, damaged or foreign."""
    if not Path(path).is_file():
        raise BadInput(f"there is no checkpoint {path}; train first, for example: python train_pretrain.py")
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
    """Write the weights alone: OUT/model.safetensors, and OUT/config.json with what rebuilds the model."""
    if run.first:
        from safetensors.torch import save as to_bytes
        about = {k: checkpoint[k] for k in ("kind", "sizes", "step")}
        write_whole(Path(out) / "model.safetensors", lambda file: file.write(to_bytes(checkpoint["model"])))
        write_whole(Path(out) / "config.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    run.wait()


def leave(run: Run, out: str | Path, step: int, number: int) -> None:
    """Exit after a stop signal and a save, saying how to come back."""
    name = signal.Signals(number).name
    run.say(f"{name}: stopped after step {step}, saved in {out}; rerun the same command to go on")
    stop(run)
    raise SystemExit(128 + number)


def append_line(path: Path, row: dict) -> None:
    """Add a row to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


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


def resume(run: Run, out: str | Path, constants: dict, again: bool, fingerprint: str = "") -> dict | None:
    """The checkpoint from which this command goes on, the same on every process, or None for a fresh start.

    A finished run, or one shaped by other constants, is renamed aside, never overwritten (`again` False:
    always). Data that changed under an unfinished run are refused. Metrics later than the checkpoint are
    taken back.
    """
    found = None
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
            else:
                reason = "is finished" if found["state"].get("finished") else ""
            if reason:
                set_aside(out, reason)
                found = None
                out.mkdir(parents=True, exist_ok=True)
                lock(run, out)
            if found and found["state"].get("fingerprint", "") != fingerprint:
                raise BadInput(f"the data {constants.get('DATA')} changed since this run began (fingerprint "
                               f"{found['state'].get('fingerprint')}, now {fingerprint}); restore them, or "
                               "start over with RESUME=False")
            kept = []
            for name in ("metrics.jsonl", "samples.jsonl"):
                if (out / name).exists():
                    kept = [line for line in (out / name).read_text(encoding="utf-8").splitlines()
                            if _step_of(line) <= (found["step"] if found else -1)]
                    text = "".join(line + "\n" for line in kept)
                    write_whole(out / name, lambda file, text=text: file.write(text.encode()))
        except (OSError, BadInput) as error:
            if run.lock:
                run.lock.close()
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"cannot write to OUT={out} ({error.strerror}); choose another OUT") from error
        if found:
            print(f"{out}: going on from step {found['step']}", flush=True)
    return run.share(found)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
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
    model.load_state_dict(found["model"])
    for optimizer, state in zip(optimizers, found["optimizers"], strict=True):
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
        if wandb not in ("disabled", "offline", "online"):
            raise BadInput(f"WANDB {wandb!r} is not one of disabled, offline, online")
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
            self.mirror = client.init(mode=wandb, project="nanosparse", dir=str(out), id=state["wandb"],
                                      name=Path(out).name, resume="allow", config=constants)

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


def fixed_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x → x @ weightᵀ for a weight that no longer changes.

    On a CPU in bfloat16 the weight is packed once, as oneDNN wants it, instead of at every call: the same
    bits, and for one row 2 to 3 times as fast (a 26M model's matrices in 1.0 instead of 2.0-2.8 ms).
    """
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

    def join(self) -> None:
        """For inference: read x once for gate and up."""
        self.joined = (fixed_linear(torch.cat([self.gate.weight, self.up.weight])),
                       fixed_linear(self.down.weight))

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


def causal_keep(docs: Tensor) -> Tensor:
    """keep (B, 1, T, T) for documents ids (B, T): a token sees itself and what came before it in its own
    document."""
    same = docs[:, :, None] == docs[:, None, :]
    return same.tril()[:, None]


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
    T) count from each document's start. On a CPU documents of like length are attended together (`groups`),
    so that cost and memory follow the documents' lengths, not T²; on CUDA `block_mask` is flex_attention's.
    """

    def __init__(self, docs: Tensor, flex: bool = True):
        B, T = docs.shape
        self.shape, self.docs = (B, T), docs
        change = torch.ones_like(docs, dtype=torch.bool)
        change[:, 1:] = docs[:, 1:] != docs[:, :-1]
        column = torch.arange(T, device=docs.device).expand(B, T)
        self.positions = column - torch.where(change, column, 0).cummax(1).values
        self.groups, self.back, self.block_mask = None, None, None
        if docs.device.type == "cpu":
            self._group(docs.numpy().ravel(), change.numpy().ravel())
        elif docs.device.type == "cuda" and flex:  # compiled for a shape, so not for prompts
            def keep(b, h, t, s):
                return (docs[b, t] == docs[b, s]) & (t >= s)
            self.block_mask = _flex()[1](keep, B, None, T, T, device=docs.device)

    def _group(self, docs: np.ndarray, change: np.ndarray) -> None:
        starts = np.flatnonzero(change)
        lengths = np.diff(np.append(starts, len(docs)))
        starts, lengths = starts[docs[starts] >= 0], lengths[docs[starts] >= 0]
        self.groups, back, slots = [], np.full(len(docs), -1), 0
        padded = np.array([_padded(n) for n in lengths])
        for L in np.unique(padded):
            first, length = starts[padded == L, None], lengths[padded == L, None]
            inside = np.arange(L) < length                                      # (N, L)
            index = np.where(inside, first + np.arange(L), first)
            back[index[inside]] = slots + np.flatnonzero(inside.ravel())
            gaps = None if inside.all() else torch.from_numpy(inside[:, None, None, :, None])
            self.groups.append((int(L), torch.from_numpy(index.ravel()), gaps))
            slots += inside.size
        back[back < 0] = slots  # padding reads the zero row at the end
        self.back, self.slots = torch.from_numpy(back), slots


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
    return F.scaled_dot_product_attention(q, k, v, causal_keep(documents.docs), enable_gqa=True)


def _flex() -> tuple[Callable, Callable]:
    if not hasattr(_flex, "made"):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        _flex.made = torch.compile(flex_attention), torch.compile(create_block_mask)
    return _flex.made


CHUNK = 128  # queries per block; 64 and keeping the weights were no faster, 256 slower (two AVX512 cores)


class _GroupedAttention(torch.autograd.Function):
    """attend_documents on a CPU. Scores stay in q's dtype (bfloat16: 8 bits); softmax itself sums in
    float32."""

    @staticmethod
    def forward(ctx, q, k, v, documents):
        ctx.save_for_backward(q, k, v)
        ctx.documents = documents
        outs = [_attend_blocks(*(_gather(x, index, L, k.shape[1]) for x in (q, k, v)))
                for L, index, _ in documents.groups]
        return _scatter(outs, documents, q)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grads = []
        for L, index, inside in ctx.documents.groups:
            parts = [_gather(x, index, L, k.shape[1]) for x in (q, k, v, grad)]
            if inside is not None:
                parts[3].mul_(inside)
            grads.append(_attend_blocks_backward(*parts))
        dq, dk, dv = (_scatter([g[i] for g in grads], ctx.documents, x) for i, x in enumerate((q, k, v)))
        return dq, dk, dv, None


def _gather(x: Tensor, index: Tensor, L: int, G: int) -> Tensor:
    """Rows of x (B, H, T, E) chosen by flat token index (N L) → (N, G, H/G, L, E)."""
    H, E = x.shape[1], x.shape[3]
    rows = x.transpose(1, 2).reshape(-1, H * E).index_select(0, index)
    return rows.view(-1, L, G, H // G, E).permute(0, 2, 3, 1, 4).contiguous()


def _scatter(parts: Sequence[Tensor], documents: Documents, like: Tensor) -> Tensor:
    """The inverse: parts (N, G, R, L, E) of every group → (B, H, T, E); padding gets zeros."""
    H, E = like.shape[1], like.shape[3]
    slots, at = like.new_empty(documents.slots + 1, H * E), 0
    slots[-1] = 0
    for part in parts:
        N, G, R, L, _ = part.shape
        slots[at:at + N * L].view(N, L, G, R, E).copy_(part.permute(0, 3, 1, 2, 4))
        at += N * L
    B, T = documents.shape
    return slots.index_select(0, documents.back).view(B, T, H, E).transpose(1, 2)


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


class Cache:
    """Keys and values of what each row has read, in tensors of fixed size: per layer (B, G, S, E); lengths on
    the host."""

    def __init__(self, model: nn.Module, rows: int, length: int):
        weight = model.head_weight
        shape = (rows, model.sizes["n_kv_heads"], length, model.layers[0].attention.head_dim)
        self.k = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in model.layers]
        self.v = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in model.layers]
        self.lengths = [0] * rows

    def write(self, layer: int, k: Tensor, v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, G, T, E) behind what each row holds, at `columns` (B, T); returns all up to the
        longest row."""
        T, longest = k.shape[2], max(self.lengths)
        keys, values = self.k[layer], self.v[layer]
        if min(self.lengths) == longest:
            keys[:, :, longest:longest + T], values[:, :, longest:longest + T] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            keys[rows, :, columns], values[rows, :, columns] = k.transpose(1, 2), v.transpose(1, 2)
        return keys[:, :, :longest + T], values[:, :, :longest + T]


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
    """Grouped-query attention with rotary positions and QK-norm (arXiv 2305.13245, 2010.04245)."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm: bool = True):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.q = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.norm_q = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.joined = self.joined_norm = None

    def join(self) -> None:
        """For inference: read x once for q, k and v."""
        self.joined = (fixed_linear(torch.cat([self.q.weight, self.k.weight, self.v.weight])),
                       fixed_linear(self.out.weight))
        if isinstance(self.norm_q, RMSNorm):
            self.joined_norm = torch.cat([n.weight.expand(h, -1) for n, h in
                                          ((self.norm_q, self.n_heads), (self.norm_k, self.n_kv_heads))])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q, k, v = self.project(x, cos, sin)
        y = attend_documents(q, k, v, documents)                                   # (B, H, T, E)
        return self.out(y.transpose(1, 2).flatten(2))

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

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, write: Callable,
               sees: Documents | Tensor | None) -> Tensor:
        """The same for T more tokens of each row; `write(k, v)` adds theirs to the cache and returns all.

        `sees` says what they see: Documents when the cache was empty (as in training), else the bias of
        attend_cached.
        """
        q, k, v = self.project(x, cos, sin)
        keys, values = write(k, v)
        fresh = isinstance(sees, Documents)
        y = attend_documents(q, k, v, sees) if fresh else attend_cached(q, keys, values, sees)
        return (self.joined[1] if self.joined else self.out)(y.transpose(1, 2).flatten(2))


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
    context it was trained for; `yarn` multiplies it at inference. `sizes` rebuilds it: LM(**sizes). Raises
    BadInput on sizes that do not fit each other.
    """

    def __init__(self, vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int,
                 head_dim: int = 0, hidden_dim: int = 0, seq_len: int = 32_768, theta: float = 1e6,
                 yarn: float = 1.0, tied: bool = True, qk_norm: bool = True, dropout: float = 0.0,
                 eps: float = 1e-6, n_experts: int = 0, n_active: int = 2, n_shared: int = 1):
        super().__init__()
        hidden_dim = hidden_dim or -(-dim * 8 // 3 // 64) * 64               # 8/3 dim, up to a multiple of 64
        self.sizes = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        divisible(N_HEADS=(n_heads, n_kv_heads), N_LAYERS=(n_layers, 1), SEQ_LEN=(seq_len, 1))
        if dim % n_heads and not self.sizes["head_dim"]:
            raise BadInput(f"DIM {dim} is not a multiple of N_HEADS {n_heads}; set HEAD_DIM")
        head_dim = head_dim or dim // n_heads
        divisible(HEAD_DIM=(head_dim, 2))
        self.sizes.update(head_dim=head_dim, hidden_dim=hidden_dim)
        if yarn < 1:
            raise BadInput(f"YARN {yarn} must be at least 1")
        self.context = int(seq_len * yarn)
        self.rope = rope_table(head_dim, self.context, theta, yarn, seq_len)  # no buffer: stays float32
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)

        def block():
            attention = Attention(dim, n_heads, n_kv_heads, head_dim, qk_norm)
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
        elif isinstance(module, SwiGLU):
            nn.init.zeros_(module.down.weight)
        elif isinstance(module, LM) and module.head is not None:
            nn.init.zeros_(module.head.weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits are hidden @ head_weight.T."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor, docs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training: ids, docs, targets (B, T) → cross-entropy sum in nats, count, balance sum."""
        hidden, balance = self.hidden(ids, docs)
        return *linear_cross_entropy(hidden, self.head_weight, targets), balance

    def _start(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ids.shape[1] > self.context:
            raise BadInput(f"{ids.shape[1]} tokens do not fit the model's context of {self.context}")
        if self.rope.device != ids.device:
            self.rope = self.rope.to(ids.device)
        x, kind = self.embedding(ids), ids.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return self.dropout(x), *self.rope[:, positions].to(torch.promote_types(x.dtype, torch.float32))

    def hidden(self, ids: Tensor, docs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T), docs (B, T) or None for one document a row → normalised hidden states (B, T, D),
        balance."""
        documents = Documents(torch.zeros_like(ids) if docs is None else docs)
        x, cos, sin = self._start(ids, documents.positions)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, cos, sin, documents)
            balances.append(balance)
        return self.norm(x), torch.stack(balances).sum()

    def read(self, ids: Tensor, lengths: Sequence[int], cache: Cache) -> Tensor:
        """Read `lengths[b]` more tokens of each row from ids (B, T), padded behind; hidden state of the last
        (B, D)."""
        (B, T), device, before = ids.shape, ids.device, cache.lengths
        columns = torch.tensor(before, device=device)[:, None] + torch.arange(T, device=device)
        x, cos, sin = self._start(ids, columns.clamp(max=self.context - 1))
        real = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
        if max(before) == 0 and T > 1:
            sees = Documents(torch.where(real, 0, -1), flex=False)
        elif T == 1 and min(before) == max(before):
            sees = None
        else:
            future = torch.arange(max(before) + T, device=device) > columns[:, :, None]
            sees = torch.zeros_like(future, dtype=x.dtype).masked_fill_(future, -math.inf)
        for i, layer in enumerate(self.layers):
            def write(k, v, i=i):
                return cache.write(i, k, v, columns)
            x = x + layer.attention.cached(layer.norm_attn(x), cos, sin, write, sees)
            x, _ = layer.add_mlp(x, real)
        cache.lengths = [a + b for a, b in zip(before, lengths, strict=True)]
        last = torch.tensor(lengths, device=device) - 1
        return self.norm(x[:, -1] if T == 1 else x[torch.arange(B, device=device), last])


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

    def hidden(self, ids: Tensor, docs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As LM.hidden; the balance is zero."""
        if ids.shape[1] > self.context:
            raise BadInput(f"{ids.shape[1]} tokens do not fit the model's context of {self.context}")
        docs = torch.zeros_like(ids) if docs is None else docs
        start = torch.ones_like(docs, dtype=torch.bool)
        start[:, 1:] = docs[:, 1:] != docs[:, :-1]
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        positions = column - torch.where(start, column, 0).cummax(1).values
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.sinusoid[positions]
        keep = causal_keep(docs).expand(-1, self.n_heads, -1, -1).flatten(0, 1)
        return self.layers(self.dropout(x), mask=~keep), x.new_zeros(())


MODELS = {"LM": LM, "Classic": Classic}


def build(checkpoint: dict, **changes) -> nn.Module:
    """The model of a checkpoint, sizes and weights from the file; `changes` override sizes that hold no
    weights."""
    if checkpoint["kind"] not in MODELS:
        raise BadInput(f"the checkpoint holds a {checkpoint['kind']}; this works on {' or '.join(MODELS)}")
    model = MODELS[checkpoint["kind"]](**{**checkpoint["sizes"], **changes})
    model.load_state_dict(checkpoint["model"])
    return model


def for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, from now on only to be read: in `dtype`, without gradients, matrices of one input
    joined."""
    model.eval().requires_grad_(False).to(dtype)
    for module in model.modules():
        if isinstance(module, Attention | SwiGLU):
            module.join()
    model.fixed_head = fixed_linear(model.head_weight)
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


def load_tokenizer(path: str | Path):
    """A `tokenizers.Tokenizer` whose ids 0, 1, 2 are <pad>, <s>, </s>; these strings in a text stay text."""
    from tokenizers import Tokenizer
    if not Path(path).is_file():
        raise BadInput(f"there is no tokenizer {path}; make one: "
                       f"python data/prepare_tokenizer.py DATA=... OUT={path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path} is not a tokenizer.json ({str(error)[:80]})") from None
    if [tokenizer.token_to_id(t) for t in SPECIAL] != [PAD, BOS, EOS]:
        raise BadInput(f"{path} must hold <pad>, <s>, </s> as ids 0, 1, 2; make it with prepare_tokenizer.py")
    if tokenizer.get_vocab_size() > 65_535:
        raise BadInput(f"{path} has {tokenizer.get_vocab_size()} tokens; token files are uint16: at most "
                       "65,535")
    tokenizer.encode_special_tokens = True
    return tokenizer


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


CHAT_TEMPLATE = (  # render_chat in Jinja; a newline is always a token of its own, so the two split text alike
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}")


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes of every token of a byte-level tokenizer; special tokens have none."""
    # The byte-level alphabet of GPT-2: printable bytes are themselves, the others go to 256 and on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    table = [b""] * tokenizer.get_vocab_size()
    for token, i in tokenizer.get_vocab().items():
        if token not in SPECIAL:
            table[i] = bytes(byte_of[c] for c in token)
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
