"""Reconstruct muon tracks by robust least squares to the times of the first hits: the classical answer.

The light that arrives first left the track at the point where distance / c + optical path is least. Its time,
and a correction for the first of many photons (a polynomial in charge and geometry, fitted to labelled events
of CALIBRATION), predict every hit; Gauss-Newton steps with weights of a Student t distribution, all events of
a batch at once, move entry and exit on the sphere (as in arXiv 1803.10407).

    python data/fit_muons.py DATA="data/muons/nominal-*.pt"
"""

import glob
import math
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from data import simulate_muons

DATA = "data/muons/nominal-*.pt"  # shards with x_data (N, T, 5) and, to be scored, y_data (N, 6)
CALIBRATION = ""   # labelled shards; "" = 200 simulated events of the nominal detector
EVENTS = 0         # at most so many; 0 = all
ITERATIONS = 8     # Gauss-Newton steps
BATCH = 50         # events at once
INDEX_IN = 1.54    # group index of the scintillator
INDEX_OUT = 1.36   # and of the water
TAIL = 4.0         # degrees of freedom of the Student t
CLIPPING = 16.5    # m from the centre; of tracks beyond, the angle is given by itself, too

RADIUS, PMT_RADIUS, LIGHT = simulate_muons.RADIUS, simulate_muons.PMT_RADIUS, simulate_muons.LIGHT


def first_light(entry: Tensor, exit: Tensor, pmts: Tensor) -> tuple[Tensor, Tensor]:
    """(time in ns from the muon's entry, geometry (..., 8)) of the light that reaches PMTs (..., 3) first
    from a track between entry and exit (..., 3), in m. The geometry of that light: fraction of the track
    where it leaves it, path inside and outside / 10 m, cosines at the boundary and at the PMT, the PMT's
    distance from the track / 10 m, the cosine to the track, and the track's length / 30 m."""
    chord = exit - entry
    length = chord.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    way = chord / length
    to_pmt = pmts - entry
    along = (to_pmt * way).sum(-1, keepdim=True)
    across = (to_pmt - along * way).square().sum(-1, keepdim=True).clamp(min=1e-6).sqrt()
    place = along - across / math.sqrt(INDEX_IN ** 2 - 1)        # where s / c + n D / c is least
    place = torch.minimum(place.clamp(min=0), length)
    source = entry + place * way
    ray = pmts - source
    distance = ray.norm(dim=-1, keepdim=True)
    ray = ray / distance
    outward = (source * ray).sum(-1, keepdim=True)
    edge = (outward.square() + RADIUS ** 2 - source.square().sum(-1, keepdim=True)).clamp(min=1e-4).sqrt()
    inside = edge - outward
    outside = distance - inside
    arrival = (place + INDEX_IN * inside + INDEX_OUT * outside) / LIGHT
    incidence = (ray * pmts).sum(-1, keepdim=True) / PMT_RADIUS
    ahead = (ray * way).sum(-1, keepdim=True)
    geometry = torch.cat([place / length, inside / 10, outside / 10, edge / RADIUS, incidence, across / 10,
                          ahead, length.expand_as(across) / 30], -1)
    return arrival.squeeze(-1), geometry


def tangents(point: Tensor) -> Tensor:
    """Two unit vectors (..., 2, 3) across a point (..., 3) of the sphere, scaled by the radius."""
    unit = point / point.norm(dim=-1, keepdim=True)
    other = torch.where(unit[..., :1].abs() < 0.7, unit.new_tensor([1.0, 0, 0]), unit.new_tensor([0, 1.0, 0]))
    a = torch.linalg.cross(unit, other)
    a = a / a.norm(dim=-1, keepdim=True)
    return torch.stack([a, torch.linalg.cross(unit, a)], -2)


def on_sphere(point: Tensor) -> Tensor:
    """The point (..., 3) moved to the sphere along its radius."""
    return point * (RADIUS / point.norm(dim=-1, keepdim=True).clamp(min=1e-6))


def move(ends: Tensor, step: Tensor) -> Tensor:
    """Ends (B, 2, 3) moved by step (B, 4) in m along their tangents, on the sphere."""
    return on_sphere(ends + (step.unflatten(-1, (2, 2, 1)) * tangents(ends)).sum(-2))


def gauss_newton(ends: Tensor, predict, times: Tensor, real: Tensor, steps: int) -> Tensor:
    """Ends (B, 2, 3) after some steps of robust least squares to times (B, T) of real (B, T) hits.

    predict(entry (B, T, 3), exit (B, T, 3)) gives each hit's time and its spread (B, T) in ns, up to an
    offset of the event that is fitted too. No step is longer than 3 m."""
    for _ in range(steps):
        with torch.enable_grad():
            wide = ends[:, :, None].expand(-1, -1, times.shape[1], -1)
            entry, exit = (wide[:, i].contiguous().requires_grad_() for i in (0, 1))
            expected, spread = (x.detach() if i else x for i, x in enumerate(predict(entry, exit)))
            slopes = torch.autograd.grad(expected.sum(), (entry, exit))  # a hit depends on its own copy alone
        slopes = [s @ t.mT for s, t in zip(slopes, tangents(ends).unbind(1), strict=True)]
        left, weight = times - expected.detach(), real / spread.square()
        offset = weighted_median(left, weight)
        for _ in range(2):
            trust = weight * (1 + TAIL) / (TAIL + ((left - offset[:, None]) / spread).square())
            offset = (trust * left).sum(1) / trust.sum(1)
        left = left - offset[:, None]
        trust = weight * (1 + TAIL) / (TAIL + (left / spread).square())
        slope = torch.cat([*slopes, torch.ones_like(left[..., None])], -1)  # (B, T, 5): the last is the time
        scaled = slope * trust[..., None]
        normal = scaled.mT @ slope
        normal = normal + torch.diag_embed(1e-3 * normal.diagonal(dim1=1, dim2=2))
        step = torch.linalg.solve(normal.double(), (scaled.mT @ left[..., None]).double())[:, :4, 0].to(ends)
        size = step.unflatten(-1, (2, 2)).norm(dim=-1).amax(1, keepdim=True)
        ends = move(ends, step * (3 / size.clamp(min=3)))
    return ends


@torch.no_grad()
def cost(ends: Tensor, predict, times: Tensor, real: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of times (B, T) under Student's t, up to a constant."""
    expected, spread = predict(*(ends[:, i, None].expand(-1, times.shape[1], -1) for i in (0, 1)))
    left = times - expected
    left = left - weighted_median(left, real.float())[:, None]
    return ((spread.log() + (1 + TAIL) / 2 * torch.log1p((left / spread).square() / TAIL)) * real).sum(1)


def weighted_median(x: Tensor, weight: Tensor) -> Tensor:
    """The median (B,) of x (B, T), hits without weight left out."""
    return torch.where(weight > 0, x.detach(), math.nan).nanmedian(1).values


def first_time(times: Tensor, real: Tensor, within: float = 6.0) -> Tensor:
    """Time (B,) of the first light of events: the first of 1% of the hits, at least 5, within so many ns,
    which noise hardly ever makes. times (B, T) in any order."""
    ordered = times.masked_fill(~real, math.inf).sort(1).values
    hits = (real.sum(1, keepdim=True) // 100).clamp(min=5)
    last = torch.arange(times.shape[1], device=times.device) + hits - 1
    ends = F.pad(ordered, (0, 1), value=math.inf).gather(1, last.clamp(max=times.shape[1]))
    return ordered.gather(1, (ends - ordered < within).int().argmax(1, keepdim=True))[:, 0]


def starts(x: Tensor, real: Tensor, directions: int = 100) -> Tensor:
    """A first guess (B, 2, 3) of the ends: the entry at the earliest light, and of points all over the sphere
    the exit that fits the times of 250 hits best."""
    early = ((x[..., 3] - first_time(x[..., 3], real)[:, None]).clamp(min=0) / 4).neg().exp() * real
    early = early * (x[..., 3] >= first_time(x[..., 3], real)[:, None] - 1)
    entry = on_sphere((x[..., :3] * early[..., None]).sum(1))
    exits = torch.from_numpy(simulate_muons.pmt_directions()).to(x)
    exits = exits[:: len(exits) // directions] * RADIUS                        # (N, 3)
    some = slice(None, None, max(1, x.shape[1] // 250))
    pmts, times, seen = x[:, None, some, :3], x[:, None, some, 3], real[:, None, some]
    arrival, _ = first_light(entry[:, None, None], exits[None, :, None], pmts)
    left = torch.where(seen, times - arrival, math.nan)
    left = (left - left.nanmedian(-1, keepdim=True).values).abs().clamp(max=20)
    best = left.nanmean(-1).argmin(1)
    return torch.stack([entry, exits[best]], 1)


def basis(charge: Tensor, geometry: Tensor) -> Tensor:
    """Functions (..., F) of a hit's charge (pe) and first_light's geometry that the correction is made of:
    all products of up to three of them, and a few that are not smooth."""
    place, inside, outside, edge, incidence, across, ahead, length = geometry.unbind(-1)
    q = charge.clamp(min=0.3).log() / 3 - 2
    dark = (0.65 - edge).clamp(0, 0.35) * 4
    one = torch.ones_like(q)
    terms = [one, q, inside - 1, edge - 0.6, across - 1, ahead - 0.5, place - 0.3, length - 0.8]
    pairs = [a * b for i, a in enumerate(terms) for b in terms[i:]]
    more = [dark, dark * dark, dark * q, dark * inside, dark * ahead, dark * across, dark * length, outside,
            incidence, q ** 3, (inside - 1) ** 3, (across - 1) ** 3, (ahead - 0.5) ** 3, (edge - 0.6) ** 3,
            (length - 0.8) ** 3, q * q * inside, q * q * edge, q * inside * inside]
    return torch.stack(pairs + more, -1)


def calibrate(x: Tensor, ends: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the delay in ns and of the logarithm of its spread, by robust regression at the true
    tracks."""
    arrival, geometry = first_light(ends[:, None, 0], ends[:, None, 1], x[..., :3])
    left = x[..., 3] - arrival
    left = left - weighted_median(left, real.float())[:, None]
    keep = real & (left > -15) & (left < 60)
    b, y = basis(x[..., 4], geometry)[keep].double(), left[keep].double()
    event = keep.nonzero()[:, 0]
    trust, delay, spread = torch.ones_like(y), None, None
    for _ in range(10):
        delay = torch.linalg.solve(
            b.T @ (b * trust[:, None]) + 1e-6 * torch.eye(b.shape[1]), b.T @ (trust * y)
        )
        rest = y - b @ delay
        sums = torch.zeros(2, len(x), dtype=y.dtype)
        sums[0].index_add_(0, event, trust * rest)
        sums[1].index_add_(0, event, trust)
        shift = (sums[0] / sums[1])[event]                        # an event's own offset
        y, rest = y - shift, rest - shift
        logs = rest.abs().clamp(min=0.05).log() + 0.4  # median |t| of a t_4 is about exp(-0.3) scales
        spread = torch.linalg.solve(b.T @ b + 1e-6 * torch.eye(b.shape[1]), b.T @ logs)
        scale = (b @ spread).clamp(-2, 4).exp()
        trust = (1 + TAIL) / (TAIL + (rest / scale).square()) / scale.square()
    return delay.float(), spread.float()


def predictor(x: Tensor, delay: Tensor, spread: Tensor):
    """What gauss_newton asks for: the time and spread of hits x (B, T, 5) of a track."""
    def predict(entry, exit):
        arrival, geometry = first_light(entry, exit, x[..., :3])
        b = basis(x[..., 4], geometry)
        return arrival + b @ delay, (b @ spread).clamp(-2, 4).exp()
    return predict


def fit(x: Tensor, calibration: tuple[Tensor, Tensor], start: Tensor | None = None, steps: int = 8) -> Tensor:
    """Entry and exit (B, 2, 3) in m of events x (B, T, 5); rows with NaN are no hits."""
    x, real = by_time(x)
    most = int(real.sum(1).max())                        # padding changes nothing
    x, real = x[:, :most], real[:, :most]
    if start is None:                                    # a clipping track is easily taken for its reverse
        some, seen = x[:, ::4], real[:, ::4]
        predict, guess = predictor(some, *calibration), starts(x, real)
        both = [gauss_newton(ends, predict, some[..., 3], seen, 4) for ends in (guess, guess.flip(1))]
        costs = [cost(ends, predict, some[..., 3], seen) for ends in both]
        start = torch.where((costs[0] <= costs[1])[:, None, None], *both)
    return gauss_newton(start, predictor(x, *calibration), x[..., 3], real, steps)


def errors(ends: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Per event, of ends and truth (N, 2, 3) in m: angle between the directions in degrees, difference of the
    distances of closest approach to the centre, and of the entries and the exits, in cm."""
    def direction(e):
        return F.normalize(e[:, 1] - e[:, 0], dim=-1)

    def closest(e):
        d = direction(e)
        return (e[:, 0] - (e[:, 0] * d).sum(-1, keepdim=True) * d).norm(dim=-1)
    ends, truth = ends.double(), truth.double()
    a, b = direction(ends), direction(truth)
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
    return {"angle_deg": angle.rad2deg(), "dD_cm": (closest(ends) - closest(truth)).abs() * 100,
            "entry_cm": (ends[:, 0] - truth[:, 0]).norm(dim=-1) * 100,
            "exit_cm": (ends[:, 1] - truth[:, 1]).norm(dim=-1) * 100}


def summary(found: dict[str, Tensor]) -> dict:
    """[median, 68%, 95%] of each error, and how many events failed: over 5 degrees, or an end over 1 m."""
    gross = ~((found["angle_deg"] <= 5) & (found["entry_cm"] <= 100) & (found["exit_cm"] <= 100))  # NaN, too
    marks = torch.tensor([0.5, 0.68, 0.95], dtype=torch.float64)
    return {k: [round(float(q), 4) for q in torch.quantile(v, marks)] for k, v in found.items()} | {
        "failures": int(gross.sum())}


def report(ends: Tensor, truth: Tensor) -> dict:
    """The summary of errors, and clipping_deg, the angle of tracks that pass the centre beyond CLIPPING m."""
    found = errors(ends, truth)
    clipping = truth.double().mean(1).norm(dim=-1) > CLIPPING            # the middle of a chord is nearest
    far = {k: v[clipping] for k, v in found.items()}
    return summary(found) | ({"clipping_deg": summary(far)["angle_deg"]} if clipping.any() else {})


def find(pattern: str) -> list[str]:
    """The files that match, sorted; raises BadInput where none does."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise common.BadInput(f"no file matches {pattern}; make some: python data/simulate_muons.py")
    return paths


def read_shard(path: str, classes: int = 0) -> tuple[Tensor, Tensor | None]:
    """(x (N, T, 5), y or None) of a .pt file, memory-mapped; NaN rows are no hits. y (N, 6) are entry and
    exit, with `classes` labels (N,). Raises BadInput that says what is wrong."""
    try:
        found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        code = re.search(r"(?:GLOBAL|[Gg]lobal:?) ([\w.]+\.\w+)", str(error))
        reason = f"it holds a {code[1]}" if code else common._first_line(error)
        raise common.BadInput(f"{path} cannot be read as tensors ({reason}); a shard is "
                              "torch.save of a dict with x_data and y_data, without other objects") from None
    if not isinstance(found, dict):
        raise common.BadInput(f"{path} holds a {type(found).__name__}; a shard is a dict with x_data, y_data")
    x, y = (found.get(a, found.get(b)) for a, b in (("x_data", "data"), ("y_data", "targets")))
    x, y = (t.detach() if isinstance(t, Tensor) else t for t in (x, y))
    if (not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != 5 or not x.is_floating_point()
            or x.layout != torch.strided):
        shape = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else "missing"
        raise common.BadInput(
            f"{path}: x_data is {shape}; it must be (N, T, 5) floats: x, y, z [m], time [ns], charge [pe]"
        )
    if not x.numel():
        raise common.BadInput(f"{path} has no event or no hit (x_data is {tuple(x.shape)}); remove it")
    bad = (~x.isfinite()).any(-1) & ~x.isnan().all(-1)
    if bad.any():
        event, hit = bad.nonzero()[0].tolist()
        raise common.BadInput(
            f"{path}: hit {hit} of event {event} has a number that is not finite; a row that "
            "is no hit is NaN in all five"
        )
    few = x.isfinite().all(-1).sum(1) < 10
    if few.any():
        raise common.BadInput(f"{path}: event {int(few.nonzero()[0])} has fewer than 10 hits; leave it out")
    away = x[:, :, :3].float().norm(dim=-1)
    far, near = float(away.nan_to_num(0).amax()), float(away.nan_to_num(math.inf).amin())
    if far > 10 * PMT_RADIUS:
        unit, factor = ("millimetres", 1000) if far > 5000 else ("centimetres", 100)
        raise common.BadInput(f"{path}: a PMT is {far:.4g} from the centre; positions are in metres (19.5): "
                              f"are these {unit}? divide by {factor}")
    if near < RADIUS - 0.1:
        raise common.BadInput(f"{path}: a PMT is {near:.4g} from the centre, inside the scintillator of "
                              f"{RADIUS} m; positions are in metres (19.5), a row that is no hit is NaN")
    times = x[..., 3].double()
    span = times.nan_to_num(-math.inf).amax(1) - times.nan_to_num(math.inf).amin(1)
    if span.amax() < 1:
        raise common.BadInput(f"{path}: the hits of every event come within {float(span.amax()):.3g}; times "
                              "are in nanoseconds: are these seconds? multiply by 1e9")
    if y is None:
        return x, None
    wanted = (len(x),) if classes else (len(x), 6)
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise common.BadInput(f"{path}: y_data is {shape}; TASK {'of labels' if classes else 'regression'} "
                              f"needs {wanted}")
    if not classes:
        if not y.is_floating_point():
            raise common.BadInput(f"{path}: y_data is {y.dtype}; entry and exit are floats, in metres")
        off = (y.float().unflatten(1, (2, 3)).norm(dim=-1) - RADIUS).abs()
        if not (off < 0.1).all():
            event = int((~(off < 0.1)).any(1).nonzero()[0])
            raise common.BadInput(
                f"{path}: target {event} lies {float(off[event].max()):.4g} m off the sphere of "
                f"{RADIUS} m; entry and exit are points on it, in metres"
            )
    elif not ((y >= 0) & (y < classes) & (y == y.long())).all():
        raise common.BadInput(f"{path}: labels from {float(y.min()):g} to {float(y.max()):g}; they must be "
                              f"whole numbers from 0 to {classes - 1}")
    return x, y


def read(pattern: str, limit: int = 0) -> tuple[Tensor, Tensor | None]:
    """x (N, T, 5), NaN rows no hits, and ends (N, 2, 3), or None, of the shards that match."""
    parts = [read_shard(p) for p in find(pattern)]
    longest = max(x.shape[1] for x, _ in parts)
    x = torch.cat([F.pad(x.float(), (0, 0, 0, longest - x.shape[1]), value=math.nan) for x, _ in parts])
    known = all(y is not None for _, y in parts)
    y = torch.cat([y.float() for _, y in parts]).unflatten(1, (2, 3)) if known else None
    return (x[:limit], y if y is None else y[:limit]) if limit else (x, y)


def by_time(x: Tensor) -> tuple[Tensor, Tensor]:
    """Hits (B, T, 5) in order of time, of equal times by charge, then by place, zeros where there is none,
    and which are real (B, T): those first."""
    real, order = x.isfinite().all(-1), torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    for key in (0.31 * x[..., 0] + 0.53 * x[..., 1] + 0.79 * x[..., 2], x[..., 4], x[..., 3]):
        order = order.gather(1, torch.where(real, key, math.inf).gather(1, order).argsort(dim=1, stable=True))
    x = torch.where(real[..., None], x, torch.zeros_like(x)).gather(1, order[..., None].expand_as(x))
    return x, real.gather(1, order)


def calibration_events():
    """200 simulated events of the nominal detector, (x, ends)."""
    import numpy as np

    made = [
        simulate_muons.event(np.random.default_rng((2025, i)), simulate_muons.NOMINAL) for i in range(200)
    ]
    x = torch.full((200, max(len(m[0]) for m in made), 5), math.nan)
    for row, m in zip(x, made, strict=True):
        row[:len(m[0])] = torch.from_numpy(m[0])
    return x, torch.tensor(np.array([[m[1], m[2]] for m in made]), dtype=torch.float32)


def main():
    common.within(0, math.inf, EVENTS=EVENTS, ITERATIONS=ITERATIONS, CLIPPING=CLIPPING)
    common.within(1, math.inf, BATCH=BATCH, TAIL=TAIL)
    common.within(1.1, 3, INDEX_IN=INDEX_IN, INDEX_OUT=INDEX_OUT)
    x, truth = read(DATA, EVENTS)
    cx, cy = read(CALIBRATION) if CALIBRATION else calibration_events()
    if cy is None:
        raise common.BadInput(f"a file of CALIBRATION {CALIBRATION} has no y_data; the fit learns from true "
                              "tracks")
    calibration = calibrate(torch.nan_to_num(cx), cy, cx.isfinite().all(-1))
    begin, cpu = time.perf_counter(), time.process_time()
    ends = torch.cat([fit(part, calibration, steps=ITERATIONS) for part in x.split(BATCH)])
    clock, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(f"{len(x)} events, {clock / len(x) * 1e3:.1f} ms each, {cpu / len(x) * 1e3:.1f} CPU ms")
    if truth is not None:
        for name, value in report(ends, truth).items():
            print(f"{name:12} {value}")
    return ends


if __name__ == "__main__":
    common.cli(globals(), main)
