"""Simulate muons that cross a sphere of liquid scintillator, as the 2,000 most telling hits of its PMTs.

Writes OUT/NAME-0000.pt ... with x_data (N, HITS, 5) float32: x, y, z of the PMT in m, time of the first hit
in ns, charge in photo-electrons (pe), sorted by time, and y_data (N, 6): entry and exit of the track on the
sphere in m; and event.png. Event i depends on (SEED, i) alone, however many processes and files there are.

    python data/simulate_muons.py                                         20,000 events, random detectors
    python data/simulate_muons.py DETECTOR=nominal NAME=test SEED=1 EVENTS=1000
    python data/simulate_muons.py DETECTOR=stressed NAME=stressed SEED=2 EVENTS=1000

The generative model, in a detector like JUNO's (arXiv 1507.05613):
- Track: straight, at the speed of light; zenith angle with density cos² theta, going down; the point of
  closest approach uniform on the disc across the track, up to 17.5 m from the centre of the 17.7 m sphere.
- Energy: ENERGY, 10% fluctuation in each of 128 slices; showers, 0.08 per metre, spectrum E^-1.5 between
  50 MeV and 20 GeV, spread over 1.5 m.
- Light: 10,000 photons/MeV, 30% of them detectable, isotropic, on straight lines to 17,612 PMTs of 0.254 m
  radius on a Fibonacci sphere of 19.5 m: solid angle with the cosine of incidence, attenuation inside, a
  transmission of the boundary that rises from LEAK to 1 with the cosine there, group velocities inside and in
  the water outside. Diffuse light: a share of the direct, the same for all PMTs, later by an exponential.
- Time: three exponentials of scintillation, transit-time spread (two kinds of PMT), both for every photon.
  The first of n photons is drawn exactly: the quantile 1 - (1 - u)^(1/n) of all light that the PMT sees.
  Then electronics jitter, dark counts from PRE_TRIGGER before the first light on, and an unknown trigger
  phase.
- Charge: Poisson, 30% a photo-electron, 5% a PMT, saturating at 1,500 pe.
- Kept are the HITS / 2 largest charges and as many of the others at random.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

OUT = "data/muons"     # folder, from the root of the repo unless absolute
NAME = "muons"         # the files begin so
DETECTOR = "random"  # "nominal"; "stressed": other optics, timing and yield, more noise; "random" each event
EVENTS = 20_000
SHARD = 500            # events a file
HITS = 2_000           # hits an event
SEED = 0               # fixes every event
WORKERS = 0            # processes; 0 = one a core
FREE = ("OUT", "NAME", "EVENTS", "WORKERS", "FREE")  # constants that change no event

RADIUS = 17.7          # of the scintillator, m
ENERGY = 200.0         # that a muon leaves, MeV/m
PMT_RADIUS = 19.5      # of the sphere of PMTs, m
N_PMTS = 17_612
PMT_SIZE = 0.254       # radius of a PMT, m
LIGHT = 0.299792458    # m/ns
SLICES = 128           # of a track
BINS, BIN = 256, 0.5   # of the light curve of a PMT, and their width in ns
EARLY = 40             # bins before the first light, for the spread of transit times
TABLE = 1024           # bins of the distance between a slice's and a PMT's direction


@dataclasses.dataclass(frozen=True)
class Detector:
    """What the light and the electronics are like: lengths in m, times in ns."""
    seed: int = 1                          # of the PMTs' kinds and efficiencies
    light_yield: float = 10_000 * 0.3      # photo-electrons a MeV on a PMT-covered sphere
    attenuation: float = 22.0
    index_in: float = 1.54                 # group indices
    index_out: float = 1.36
    dark: tuple = (0.35, 0.65, 0.03)       # cosines between which the boundary lets light out, and the leak
    diffuse: tuple = (0.4, 25.0)           # share of the direct light, delay
    decay: tuple = ((0.80, 4.93), (0.17, 20.6), (0.03, 190.0))
    spread: tuple = (1.3, 3.0)             # transit-time spread of dynode and MCP PMTs
    dynodes: float = 0.28                  # share of the first kind
    efficiency: float = 0.08               # relative spread
    jitter: float = 0.8
    noise: float = 40e3                    # dark counts a second
    pre_trigger: float = 300.0
    charge: tuple = (0.30, 0.05, 1500.0)   # spread a photo-electron, spread a PMT, largest
    phase: float = 5.0                     # half the range of the trigger phase


NOMINAL = Detector()
STRESSED = Detector(seed=7, light_yield=2_300, attenuation=17.0, index_in=1.50, index_out=1.38,
                    dark=(0.40, 0.62, 0.05), diffuse=(0.55, 32.0),
                    decay=((0.74, 5.6), (0.22, 24.0), (0.04, 170.0)), spread=(1.7, 3.7), noise=200e3)


def random_detector(rng):
    """A detector around the nominal one, wide enough to hold the real one."""
    def about(x, factor):
        return float(x * np.exp(rng.uniform(-np.log(factor), np.log(factor))))
    shares = np.array([0.8, about(0.17, 1.5), about(0.03, 1.8)])
    low, leak = rng.uniform(0.28, 0.45), rng.uniform(0.01, 0.08)
    return Detector(
        seed=int(rng.integers(1 << 31)), light_yield=about(3_000, 1.5), attenuation=about(22, 1.4),
        index_in=rng.uniform(1.47, 1.61), index_out=rng.uniform(1.32, 1.41),
        dark=(low, low + rng.uniform(0.1, 0.4), leak), diffuse=(about(0.4, 1.7), about(25, 1.5)),
        decay=tuple(zip(shares / shares.sum(), (about(4.93, 1.3), about(20.6, 1.3), about(190, 1.3)),
                        strict=True)),
        spread=(about(1.3, 1.5), about(3.0, 1.4)), dynodes=rng.uniform(0.1, 0.5),
        efficiency=rng.uniform(0.03, 0.12), jitter=rng.uniform(0.3, 1.4), noise=about(60e3, 4.5),
        pre_trigger=rng.uniform(100, 500),
        charge=(rng.uniform(0.2, 0.4), rng.uniform(0.02, 0.08), about(1500, 1.6)))


@functools.cache
def pmt_directions():
    """Unit vectors (N_PMTS, 3) float32 of a Fibonacci sphere."""
    i = np.arange(N_PMTS) + 0.5
    z, angle = 1 - 2 * i / N_PMTS, math.pi * (1 + 5 ** 0.5) * i
    flat = np.sqrt(1 - z * z)
    return np.stack([flat * np.cos(angle), flat * np.sin(angle), z], 1).astype("f4")


def track(rng):
    """Entry and exit (3,) on the sphere of a muon from above."""
    while True:
        cosine = rng.random()
        if rng.random() < cosine ** 2:
            break
    azimuth, turn = rng.uniform(0, 2 * np.pi, 2)
    sine = math.sqrt(1 - cosine ** 2)
    d = -np.array([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine])
    a = np.cross(d, [1.0, 0, 0] if abs(d[0]) < 0.7 else [0, 1.0, 0])
    a /= np.linalg.norm(a)
    b = (RADIUS - 0.2) * math.sqrt(rng.random())
    middle = b * (math.cos(turn) * a + math.sin(turn) * np.cross(d, a))
    half = math.sqrt(RADIUS ** 2 - b ** 2)
    return middle - half * d, middle + half * d


def energies(rng, length):
    """MeV (SLICES,) that a track of this length leaves in each slice."""
    step = length / SLICES
    left = ENERGY * step * np.maximum(0, 1 + 0.1 * rng.standard_normal(SLICES))
    for _ in range(rng.poisson(0.08 * length)):
        low, high = 50 ** -0.5, 20_000 ** -0.5
        energy = (low - rng.random() * (low - high)) ** -2
        begin = rng.uniform(0, length)
        edges = np.clip((np.arange(SLICES + 1) * step - begin) / 1.5, 0, 1)
        left += energy * np.diff(edges)
    return left


def light(detector, r, cosine):
    """(direct light, share of all; metres inside; metres outside) between a point at radius r and a PMT whose
    direction has this cosine to the point's; arrays broadcast."""
    along = PMT_RADIUS * cosine
    distance = np.sqrt(r * r + PMT_RADIUS ** 2 - 2 * r * along)
    outward = (r * along - r * r) / distance                 # of the point along the ray
    edge = np.sqrt(outward * outward + RADIUS ** 2 - r * r)  # RADIUS × cosine at the boundary
    inside = edge - outward
    low, high, leak = detector.dark
    passed = leak + (1 - leak) * np.clip((edge / RADIUS - low) / (high - low), 0, 1)
    incidence = (PMT_RADIUS - r * cosine) / distance
    share = PMT_SIZE ** 2 / 4 * incidence / distance ** 2 * np.exp(inside / -detector.attenuation) * passed
    return share, inside, distance - inside


def responses(detector):
    """For either kind of PMT (2 BINS, BINS): what light in a bin, direct and then diffuse, adds to the
    cumulative light at the end of every bin."""
    edges = np.arange(BINS + 1) * BIN
    direct = np.diff(1 - sum(share * np.exp(-edges / tau) for share, tau in detector.decay))
    diffuse = np.convolve(direct, np.diff(1 - np.exp(-edges / detector.diffuse[1])))[:BINS]
    found = []
    for spread in detector.spread:
        near = (np.arange(-EARLY, EARLY + 1)[:, None] + np.linspace(-0.45, 0.45, 10)) * BIN / spread
        gauss = np.exp(-0.5 * near ** 2).sum(1)
        curves = [np.convolve(x, gauss / gauss.sum()).cumsum() for x in (direct, diffuse)]
        lines = [np.concatenate([np.zeros(BINS), c[:BINS]])[::-1] for c in curves]
        found.append(np.concatenate([np.lib.stride_tricks.sliding_window_view(line, BINS)[:BINS, ::-1]
                                     for line in lines]).astype("f4"))
    return found


nominal_responses = functools.cache(responses)


def mean_light(detector, places, photons):
    """(direct light (N_PMTS,), diffuse light of each slice (SLICES,) on any PMT), in expected
    photo-electrons, of slices at places (SLICES, 3)."""
    r = np.linalg.norm(places, axis=1)
    chords = (np.arange(TABLE, dtype="f4") + 0.5) * (2 / TABLE)  # |direction to PMT - direction to slice|
    table = light(detector, r[:, None].astype("f4"), 1 - chords * chords / 2)[0]
    table *= photons[:, None].astype("f4")
    diffuse = detector.diffuse[0] * (table @ chords) / chords.sum()  # its mean over the sphere
    scaled = (places / r[:, None] * (TABLE * TABLE / -2)).astype("f4")
    flat, offset, direct = table.ravel(), np.arange(SLICES, dtype=np.int32) * TABLE, np.empty(N_PMTS, "f4")
    for i in range(0, N_PMTS, 512):                      # in parts that stay in the cache
        index = pmt_directions()[i:i + 512] @ scaled.T
        index += TABLE * TABLE / 2
        np.sqrt(np.maximum(index, 0, out=index), out=index)
        index = np.minimum(index.astype(np.int32), TABLE - 1)
        index += offset
        direct[i:i + 512] = flat.take(index).sum(1)
    return direct, diffuse


def first_times(rng, detector, arrival, weights, kind, count):
    """Time (hits,) of the first of count (hits,) photons on PMTs of a kind (hits,), where the light of a
    slice arrives at arrival (hits, SLICES) at the earliest, direct and diffuse with weights (2, hits,
    SLICES)."""
    hits = len(arrival)
    first, total = arrival.min(1), weights.sum((0, 2))
    place = (arrival - first[:, None]) * (1 / BIN)
    low = place.astype(np.int32)
    reached = low < BINS - 1
    weights = weights * reached
    later = weights * (place - low)                      # a bin and the next share what falls between them
    cell = np.where(reached, low, 0) + np.arange(hits, dtype=np.int32)[:, None] * (2 * BINS)
    cell = np.stack([cell, cell + BINS]).ravel()
    curve = np.bincount(cell, (weights - later).ravel(), hits * 2 * BINS)
    curve[1:] += np.bincount(cell, later.ravel(), hits * 2 * BINS)[:-1]
    curve = curve.reshape(hits, -1).astype("f4")
    effect = nominal_responses(detector) if detector in (NOMINAL, STRESSED) else responses(detector)
    seen = np.empty((hits, BINS), "f4")
    for k in (0, 1):
        seen[kind == k] = curve[kind == k] @ effect[k]
    wanted = total * -np.expm1(np.log1p(-rng.random(hits)) / count)
    bin = (seen < wanted[:, None]).sum(1)
    inner, row = np.clip(bin, 1, BINS - 1), np.arange(hits)
    before, after = seen[row, inner - 1], seen[row, inner]
    part = np.clip((wanted - before) / np.maximum(after - before, 1e-12), 0, 1)
    time = first + (inner - EARLY + part) * BIN
    return np.where(bin == BINS, time + rng.exponential(detector.diffuse[1], hits), time)  # beyond the window


def event(rng, detector, hits=2_000, ends=None):
    """(hits (hits, 5) sorted by time, entry, exit): a muon between random ends or these."""
    start, stop = ends or track(rng)
    fixed = np.random.default_rng((detector.seed, N_PMTS))  # what the detector's seed fixes
    kind = (fixed.random(N_PMTS, dtype="f4") >= detector.dynodes).astype(np.int8)
    efficiency = np.maximum(0.1, 1 + detector.efficiency * fixed.standard_normal(N_PMTS, dtype="f4"))
    length = np.linalg.norm(stop - start)
    along = (np.arange(SLICES) + 0.5) / SLICES
    places = start + along[:, None] * (stop - start)
    photons = energies(rng, length) * detector.light_yield
    direct, diffuse = mean_light(detector, places, photons)

    count = rng.poisson((direct + diffuse.sum()) * efficiency)
    per_pe, per_pmt, largest = detector.charge
    charge = count * (1 + per_pmt * rng.standard_normal(N_PMTS, dtype="f4"))
    charge += per_pe * np.sqrt(count) * rng.standard_normal(N_PMTS, dtype="f4")
    charge = np.clip(charge, 0.2, largest)

    fired = rng.permutation(np.flatnonzero(count))       # so that of equal charges a random one is first
    if hits < len(fired):
        fired = fired[np.argpartition(-charge[fired], hits // 2)]
        rest = hits // 2 + rng.permutation(len(fired) - hits // 2)[:hits - hits // 2]
        fired = np.concatenate([fired[:hits // 2], fired[rest]])
    count, charge, kind, pmts = count[fired], charge[fired], kind[fired], pmt_directions()[fired]

    r = np.linalg.norm(places, axis=1)
    share, inside, outside = light(detector, r[None].astype("f4"),
                                   np.clip(pmts @ (places / r[:, None]).T.astype("f4"), -1, 1))
    arrival = inside * (detector.index_in / LIGHT) + outside * (detector.index_out / LIGHT)
    arrival += (along * length / LIGHT).astype("f4")
    weights = np.stack([share * photons.astype("f4"), np.broadcast_to(diffuse.astype("f4"), share.shape)])
    time = first_times(rng, detector, arrival, weights, kind, count)
    time += detector.jitter * rng.standard_normal(len(time))

    begin = time.min() - detector.pre_trigger
    time = np.minimum(time, begin + rng.exponential(1e9 / detector.noise, len(time)))
    trigger = np.sort(time)[len(time) // 10] + rng.uniform(-detector.phase, detector.phase)
    found = np.column_stack([pmts * PMT_RADIUS, time - trigger, charge]).astype("f4")
    return found[np.argsort(found[:, 3], kind="stable")], start, stop


def numbered(i):
    """Event i of this SEED and DETECTOR: (hits, target (6,))."""
    rng = np.random.default_rng((SEED, i))
    detector = {"nominal": NOMINAL, "stressed": STRESSED}.get(DETECTOR) or random_detector(rng)
    hits, start, stop = event(rng, detector, HITS)
    return hits, np.concatenate([start, stop]).astype("f4")


def shard(job):
    """Write a file of the events from `first` to `last`; with fewer than HITS hits the rest is NaN."""
    import torch
    path, first, last, constants = job
    globals().update(constants)                          # of the process that began this one
    torch.set_num_threads(1)
    x = np.full((last - first, HITS, 5), np.nan, "f4")
    y = np.empty((last - first, 6), "f4")
    for i in range(first, last):
        hits, y[i - first] = numbered(i)
        x[i - first, :len(hits)] = hits
    settings = {k: v for k, v in constants.items() if k not in FREE}
    data = {"x_data": torch.from_numpy(x), "y_data": torch.from_numpy(y), "settings": settings}
    common.write_whole(Path(path), lambda file: torch.save(data, file))
    return last - first


def is_made(path, first, last):
    """Whether a file holds these events already; raises BadInput where it holds others."""
    import torch
    if not path.exists():
        return False
    try:
        found = torch.load(path, weights_only=True, mmap=True)
        other = [f"{k}={v}" for k, v in found.get("settings", {}).items() if v != globals().get(k)]
        size = len(found["x_data"])
    except Exception as error:
        raise common.BadInput(f"{path} is there and is none of ours ({common._first_line(error)}); remove "
                              "it, or give another NAME or OUT") from None
    if other:
        raise common.BadInput(f"{path} is there, made with {' '.join(other)}; remove it, or give another "
                              "NAME or OUT")
    return size >= last - first


def simulate(out, **constants):
    """Write the events as files in the folder `out`; returns their paths. Files that are there stay, if they
    were made with the same settings; OUT/NAME.unfinished is there until all are."""
    from tqdm import tqdm
    globals().update(constants)
    jobs = [(out / f"{NAME}-{k:04d}.pt", first, min(first + SHARD, EVENTS))
            for k, first in enumerate(range(0, EVENTS, SHARD))]
    settings = common.literals(globals())
    todo = [(*job, settings) for job in jobs if not is_made(*job)]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.unfinished").touch()
    with tqdm(total=sum(last - first for _, first, last, _ in todo), unit=" events", disable=None) as bar:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"         # products round alike however many cores there are
        with multiprocessing.get_context("spawn").Pool(WORKERS or None) as pool:
            for done in pool.imap_unordered(shard, todo):
                bar.update(done)
    (out / f"{NAME}.unfinished").unlink(missing_ok=True)
    return [job[0] for job in jobs]


def plot(hits, target, path):
    """The event on a map of the PMT sphere, and its times along the track."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    azimuth, cosine = np.arctan2(hits[:, 1], hits[:, 0]), hits[:, 2] / np.linalg.norm(hits[:, :3], axis=1)
    usual = np.quantile(hits[:, 3], [0.02, 0.99])
    points = axes[0].scatter(azimuth, cosine, 1 + hits[:, 4] / 100, np.clip(hits[:, 3], *usual))
    for end, name, marker in ((target[:3], "entry", "v"), (target[3:], "exit", "^")):
        axes[0].plot(np.arctan2(end[1], end[0]), end[2] / RADIUS, marker, color="red", label=name)
    axes[0].set(xlabel="azimuth [rad]", ylabel="cos(polar angle)", title="PMTs; size: charge")
    axes[0].legend(loc="upper right")
    figure.colorbar(points, label="time of the first hit [ns]")
    way = (target[3:] - target[:3]) / np.linalg.norm(target[3:] - target[:3])
    axes[1].scatter((hits[:, :3] - target[:3]) @ way, hits[:, 3], 2, hits[:, 4])
    axes[1].set(xlabel="PMT along the track [m]", ylabel="time [ns]", title="colour: charge",
                ylim=(usual[0] - 30, usual[1] + 30))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    if DETECTOR not in ("nominal", "stressed", "random"):
        raise common.BadInput(f'DETECTOR "{DETECTOR}" is unknown; "nominal", "stressed" or "random"')
    common.divisible(EVENTS=(EVENTS, 1), SHARD=(SHARD, 1))
    common.within(10, N_PMTS, HITS=HITS)
    common.within(0, math.inf, SEED=SEED, WORKERS=WORKERS)
    if not NAME or "/" in NAME:
        raise common.BadInput(f"NAME {NAME!r} is no beginning of a file's name; OUT is the folder")
    out = Path(OUT) if Path(OUT).is_absolute() else Path(__file__).resolve().parent.parent / OUT
    files = simulate(out)
    plot(*numbered(0), out / "event.png")
    print(f"{out}: {EVENTS} events in {len(files)} files {NAME}-*.pt; next: python train_muon_dsa.py "
          f'DATA="{OUT}/{NAME}-*.pt"')


if __name__ == "__main__":
    common.cli(globals(), main)
