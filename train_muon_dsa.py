"""Reconstruct where a muon entered and left a sphere of liquid scintillator, from its most telling PMT hits.

A transformer with dynamic sparsity attention (DSA: common.py, section 7) reads the hits as a set and gives a
first answer and a description of the detector; a few Gauss-Newton steps, part of the network, then maximise a
learned likelihood of the times of the first hits and of the charges, and find the light of each piece of
the track as well. Errors are in degrees and cm, on events never trained on.

    python train_muon_dsa.py                                       simulates events, if there are none
    python train_muon_dsa.py DATA="shards/*.pt" OUT=out/mine       x_data (N, T, 5): x, y, z [m], time [ns],
                                                                   charge [pe]; y_data (N, 6): entry, exit [m]
    torchrun --nproc_per_node 4 train_muon_dsa.py ATTENTION=dense
    python train_muon_dsa.py EVAL="new/*.pt" OUT=out/mine          scores, and writes predictions.npz
"""

import functools
import hashlib
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
from data import fit_muons, simulate_muons

# Data
DATA = ""             # shards, a glob; "" = data/muons/muons-*.pt, simulated if they are not there
EVENTS = 4_000        # simulated where DATA is empty and nothing is there
VALID_SHARE = 0.05    # of the events, by a hash of their hits: which file holds them does not matter
TEST_SHARE = 0.05
SEQ_LEN = 2_000       # hits an event at most; of more, half by charge, half of the rest evenly by time
AUGMENT = True        # training events turned and mirrored at random
TASK = "regression"   # entry and exit; "classification", "binary_classification": y_data (N,) are labels
N_CLASSES = 2         # of "classification"

# Model. "seed" is the documented older one: post-norm, dim 48, 6 heads, 4 layers, hidden 192
PRESET = ""           # "seed"
ATTENTION = "dsa"     # "dense": all connections
DIM = 48              # width
N_LAYERS = 2
N_HEADS = 6
HIDDEN_DIM = 192      # width inside the MLP
NORM = "pre"          # "post"
READOUT = "learned"   # attention of learned queries; "last": the last hit, as the old system had it
OUTPUT = "points"     # two points made unit vectors; "raw": six numbers; "direction": entry and direction
FRAME = "canonical"   # each event turned so that its first light is at +z; "detector"
DENSITY = (0.10, 0.05)  # share of the connections that may stay, first and last update: half a cosine
READ = 1_000          # of SEQ_LEN hits the transformer reads so many, evenly by time; the refinement all
MIN_CONNECTIONS = 16  # keys that every query has at least
ORDER = "features"    # hits of a block are alike in place, times and charge; "place": in place alone
LEAF = 8              # hits of a block, about
QUERIES = 64          # hits, about, that choose blocks together
JUDGE = "keys"        # of blocks: the attention to all their keys; "moments": their means and variances
REFINE = 3            # Gauss-Newton steps on the learned likelihood; 0 = the first answer is the answer
SEGMENTS = 16         # equal pieces of the track whose light the steps fit, too
CHARGES = 0.5         # weight of charges against times in the steps: their errors are common to many hits
MIXTURE = 3           # Gaussians of a hit's time
HIT_DIM = 64          # width of the network that gives them
INDEX_SPREAD = 0.03   # of the group indices that the steps fit, too, as they do
MODES = 6             # learned ways in which detectors' times differ; both from a fifth of the updates on
CONTEXT = 16          # numbers by which the transformer describes the detector to it

# Optimization
STEPS = 4_000         # updates
BATCH = 16            # events per update, over all processes
MICRO_BATCH = 8       # events per forward and process
OPTIMIZER = "adamw"   # "muon" for the hidden matrices, "adam"
LR = 2e-3             # peak of Adam and AdamW
MUON_LR = 0.01        # peak of Muon
WEIGHT_DECAY = 0.01
WARMUP = 100          # updates
SCHEDULE = "cosine"
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
LIKELIHOOD = 1.0      # weight of the hits' likelihood in the loss
REFINED = 0.0         # weight of the refined ends' errors: trains through the Gauss-Newton steps
SPARSITY = 0.01       # weights of DSALoss
RETENTION = 0.03
ENTROPY = 0.001
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "float32"     # of the transformer; the refinement is always float32
OUT = "out/muon"
RESUME = True         # go on with an unfinished run of the same command in OUT
INIT = ""             # checkpoint or folder whose weights to begin with
LOG_EVERY = 20        # updates
EVAL_EVERY = 300      # updates; 0 = at the end only
SAVE_EVERY = 100      # updates; 0 = at the end only
VALID_EVENTS = 400    # at most so many in a validation; 0 = all (as the last one)
FIT_STEPS = 0         # steps of data/fit_muons.py from the network's answer, where it is scored
WANDB = "disabled"    # "offline", "online"
EVAL = ""             # shards to reconstruct with the best checkpoint in OUT instead of training


# Data: shards stay on disk, events are found by (file, row).

class Events:
    """The events of some shards: hits (N, T, 5) and targets, read as they are asked for."""

    def __init__(self, pattern, need_targets=True):
        paths = fit_muons.find(pattern)
        self.x, self.y, self.key = [], [], []
        for path in paths:
            x, y = fit_muons.read_shard(path, n_classes())
            if y is None and need_targets:
                raise common.BadInput(f"{path} has no y_data (or targets); training needs them")
            self.x.append(x)
            self.y.append(y)
        self.blind = [path for path, y in zip(paths, self.y, strict=True) if y is None]
        if self.blind:
            self.y = None
        self.place = [(f, i) for f, x in enumerate(self.x) for i in range(len(x))]
        self.name = f"{len(paths)} files {pattern}"
        for x in self.x:                                 # an event is known by its first hits
            for event, row in zip(x, x[:, :8].float().numpy(), strict=True):
                row = row if np.isfinite(row).any() else event.float().numpy()
                self.key.append(hashlib.blake2b(row.tobytes(), digest_size=8).digest())

    def __len__(self):
        return len(self.place)

    def fingerprint(self):
        known = self.key
        if self.y is not None:
            known = [k + row.numpy().tobytes() for k, row in zip(self.key, torch.cat(self.y), strict=True)]
        return hashlib.sha256(b"".join(sorted(known))).hexdigest()[:16]

    def split(self):
        """Indices of training, validation and test events."""
        share = np.array([int.from_bytes(k[:4], "big") / 2 ** 32 for k in self.key])
        parts = share >= VALID_SHARE + TEST_SHARE, share < VALID_SHARE, (share >= VALID_SHARE)
        parts = parts[0], parts[1], parts[2] & ~parts[0]
        order = np.argsort(np.array(self.key))           # the same order however they are spread over files
        return [order[p[order]] for p in parts]

    def batch(self, indices, device):
        """(hits (n, T, 5) float32, NaN where none; targets or None), on the device."""
        rows = [self.x[f][i] for f, i in (self.place[j] for j in indices)]
        longest = max(len(row) for row in rows)
        x = torch.stack([F.pad(row, (0, 0, 0, longest - len(row)), value=math.nan) for row in rows])
        if x.dtype == torch.float64:                     # times since an epoch need its digits
            x[..., 3] -= x[..., 3].nan_to_num(math.inf).amin(1, keepdim=True)
        x = fewer(x.float()) if longest > SEQ_LEN else x.float()
        y = None
        if self.y is not None:
            y = torch.stack([self.y[f][i] for f, i in (self.place[j] for j in indices)]).to(device)
            y = y.float().unflatten(1, (2, 3)) if TASK == "regression" else y.long()
        return x.to(device, non_blocking=True), y


def fewer(x):
    """SEQ_LEN of the hits of x (n, T, 5): half the largest charges, and evenly of the rest by time."""
    half = SEQ_LEN // 2
    order = x[..., 4].nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)
    real = x.isfinite().all(-1).sum(1)
    rows = []
    for row, index, n in zip(x, order, real.tolist(), strict=True):
        rest = index[half:max(half, n)]
        rest = rest[row[rest, 3].argsort()]
        rest = rest[torch.linspace(0, max(0, len(rest) - 1), min(SEQ_LEN - half, len(rest))).long()]
        kept = row[torch.cat([index[:min(half, n)], rest])]
        rows.append(F.pad(kept, (0, 0, 0, SEQ_LEN - len(kept)), value=math.nan))
    return torch.stack(rows)


def turned(x, y, rng):
    """Hits and targets turned by a random rotation, mirrored in half the cases; an event each its own."""
    n = len(x)
    matrix, r = np.linalg.qr(rng.standard_normal((n, 3, 3)))
    matrix = torch.from_numpy(matrix * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]).to(x)
    return torch.cat([x[..., :3] @ matrix, x[..., 3:]], -1), y @ matrix if TASK == "regression" else y


# The model.

def frames(x, real):
    """(rotations (B, 3, 3) whose rows are the axes of each event's canonical frame, time (B,) of the first
    light): z to the first light, x to the bulk of the charge far from it."""
    first = fit_muons.first_time(x[..., 3], real)
    late = x[..., 3] - first[:, None]
    early = torch.where(real & (late > -1), (-late.clamp(min=0) / 4).exp(), 0.0)
    z = F.normalize((x[..., :3] * early[..., None]).sum(1), dim=-1)
    unit = F.normalize(x[..., :3], dim=-1)
    charge = x[..., 4].clamp(min=0) * real * (1 - (unit * z[:, None]).sum(-1))
    bulk = (unit * charge[..., None]).sum(1)
    across = bulk - (bulk * z).sum(-1, keepdim=True) * z
    spare = torch.where(z[:, :1].abs() < 0.7, z.new_tensor([1.0, 0, 0]), z.new_tensor([0, 1.0, 0]))
    spare = spare - (spare * z).sum(-1, keepdim=True) * z
    across = torch.where(
        across.norm(dim=-1, keepdim=True) > 1e-3 * charge.sum(1, keepdim=True), across, spare
    )
    across = F.normalize(across, dim=-1)
    return torch.stack([across, torch.linalg.cross(z, across), z], 1), first


class Layer(nn.Module):
    """Attention and MLP with residuals, norms before ("pre") or behind ("post") them."""

    def __init__(self, dim, n_heads, hidden_dim, norm, min_connections, query_blocks, judge):
        super().__init__()
        self.attention = common.DynamicSparseAttention(dim, n_heads, min_connections=min_connections,
                                                       query_blocks=query_blocks, judge=judge)
        self.inner, self.outer = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.norm_attn, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pre = norm == "pre"
        if self.pre:
            nn.init.zeros_(self.attention.out.weight)
            nn.init.zeros_(self.outer.weight)

    def mlp(self, x):
        if torch.is_grad_enabled() or x.is_cuda:
            return self.outer(F.gelu(self.inner(x)))
        return torch.cat([self.outer(F.gelu(self.inner(event))) for event in x.split(1)])   # in a CPU's cache

    def forward(self, x, real, N, dense):
        if self.pre:
            y, found = self.attention(self.norm_attn(x), real, N, dense)
            x = x + y
            return x + self.mlp(self.norm_mlp(x)), found
        y, found = self.attention(x, real, N, dense)
        x = self.norm_attn(x + y)
        return self.norm_mlp(x + self.mlp(x)), found


# What charges tell. The slopes are written out, since autograd would go three times through all pairs of hits
# and pieces of track.
#
# What the steps fit of the optics: (spread to begin with, farthest from the nominal detector) of logarithms;
# the edge in tenths
OPTICS = {"attenuation": (0.15, 0.6), "edge": (0.4, 1.5), "slope": (0.3, 1.5), "leak": (0.4, 1.5),
          "diffuse": (0.2, 0.9), "yield": (0.2, 0.8)}


class Light(nn.Module):
    """The charges of hits, given a track and the light of its pieces: on straight lines, as far as absorption
    and the boundary let it pass, and diffuse, the same everywhere, as in data/simulate_muons.py. Most pieces
    give what a muon gives, a few, in showers, much more. What is known of the optics comes from an event's
    context, at first those of the nominal detector. Charges scatter by a constant share and as counts do; the
    largest say only "at least so much"; hits below the median were kept at random.
    `forward` makes the rays; `expect`, `seen`, `bend` add to them what `chain` and `rises` ask for."""

    n_features = 5
    kinds = (*OPTICS, "scatter", "counts", "kept")
    widths = 1.0, 0.6, 0.3, 0.15                             # of the prior of log light, in the last steps

    def __init__(self, context, n_segments):
        super().__init__()
        self.n_segments = n_segments
        self.optics = nn.Linear(context, len(self.kinds) + len(OPTICS))
        nn.init.zeros_(self.optics.weight)
        nn.init.zeros_(self.optics.bias)
        spreads, farthest = torch.tensor(list(OPTICS.values())).T
        farthest = F.pad(farthest, (0, len(self.kinds) - len(OPTICS)), value=1.5)
        brighter = F.pad(torch.eye(n_segments), (0, len(OPTICS)))            # than without a shower
        brighter[:, -1] = -1                                                 # the yield is the last
        for name, value in (("spreads", spreads), ("farthest", farthest), ("brighter", brighter)):
            self.register_buffer(name, value, persistent=False)

    def detector(self, context):
        """(the likeliest optics (B, kinds) of events of some context (B, C), their spreads (B, OPTICS))."""
        optics, spreads = self.optics(context).split((len(self.kinds), len(OPTICS)), -1)
        optics = self.farthest * (optics / self.farthest).tanh()
        return optics, self.spreads * (1.5 * (spreads / 1.5).tanh()).exp()

    def held(self, optics, pull):
        """(B, OPTICS): infinite, nearly, where a pull (B, OPTICS) is out of what optics may be, to add to the
        diagonal of a step's matrix, so that nothing else reckons with a move that is not made."""
        at, pulled = optics[:, :len(OPTICS)], optics[:, :len(OPTICS)] * pull > 0
        return 1e9 * (pulled & (at.abs() >= self.farthest[:len(OPTICS)] - 1e-6))

    def moved(self, optics, move):
        """Optics (B, kinds) after a move (B, OPTICS), no farther than they may be."""
        move = F.pad(move, (0, len(self.kinds) - len(OPTICS)))
        return torch.minimum(torch.maximum(optics + move, -self.farthest), self.farthest)

    def level(self, ends, optics):
        """Log light (B, 1) of a piece of a track with ends (B, 2, 3) that has no shower."""
        length = (ends[:, 1] - ends[:, 0]).norm(dim=-1, keepdim=True).clamp(min=0.1)
        photons = simulate_muons.NOMINAL.light_yield * simulate_muons.ENERGY * length / self.n_segments
        return photons.log() + optics[:, len(OPTICS) - 1:len(OPTICS)]

    def prior(self, light, level, optics, known, width):
        """(matrix (B, K + OPTICS, K + OPTICS), pull (B, K + OPTICS)) of the priors of log light (B, K),
        Cauchy of some width around the level, and of the optics, of what `detector` gave."""
        likeliest, spreads = known
        over, sure = light - level, spreads ** -2
        trust = 2 / (width ** 2 + over.square())
        matrix = (self.brighter.mT * trust[:, None]) @ self.brighter
        matrix = matrix + torch.diag_embed(F.pad(sure, (light.shape[1], 0)))
        pull = sure * (likeliest - optics)[:, :len(OPTICS)]
        return matrix, F.pad(pull, (light.shape[1], 0)) - (trust * over) @ self.brighter

    def share(self, along, far, near, optics):
        """Light from pieces at squared radii near (..., K) to PMTs at squared radii far (..., 1), of scalar
        products along (..., K): `direct`, the share that reaches a PMT, and what it is made of."""
        attenuation, edge, slope, leak = (optics[..., i:i + 1] for i in range(4))
        nominal = simulate_muons.NOMINAL
        low, high, part = nominal.dark
        per_m, width = (-attenuation).exp() / nominal.attenuation, (high - low) * slope.exp()
        leak = part * leak.exp()
        inverse = (far + near - 2 * along).clamp(min=0.01).rsqrt()           # of the distance
        outward = (along - near) * inverse
        cosine = (outward.square() + simulate_muons.RADIUS ** 2 - near).clamp(min=1e-4).sqrt()
        inside = cosine - outward
        ramp = (cosine * (1 / simulate_muons.RADIUS) - (low + 0.1 * edge)) / width
        part_open = ramp.clamp(0, 1)
        passed = leak + (1 - leak) * part_open
        by_ramp = ((ramp > 0) & (ramp < 1)) * ((1 - leak) / width) / passed
        incident = (far - along) * (simulate_muons.PMT_SIZE ** 2 / 4 * far.rsqrt())
        direct = incident * inverse * inverse.square() * passed * (inside * -per_m).exp()
        return SimpleNamespace(along=along, far=far, inverse=inverse, outward=outward, cosine=cosine,
                               inside=inside, ramp=ramp, direct=direct, per_m=per_m, width=width,
                               by_ramp=by_ramp, by_leak=leak * (1 - part_open) / passed)

    def forward(self, ends, pmts, optics):
        """`share` of tracks with ends (B, 2, 3) and PMTs (B, T, 3), with `arrival` (B, T, K), its time in ns,
        and `diffuse` (B, 1, K), the share that any PMT has; optics (B, kinds)."""
        optics = optics[:, None]
        place = (torch.arange(self.n_segments, device=pmts.device).to(ends) + 0.5) / self.n_segments
        chord = ends[:, 1] - ends[:, 0]
        length = chord.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        pieces = ends[:, :1] + place[:, None] * chord[:, None]
        near = pieces.square().sum(-1)[:, None].clamp(min=1e-6)
        rays = self.share(pmts @ pieces.mT, pmts.square().sum(-1, keepdim=True).clamp(min=1), near, optics)
        path = (fit_muons.INDEX_IN - fit_muons.INDEX_OUT) * rays.inside + fit_muons.INDEX_OUT / rays.inverse
        rays.arrival = ((place * length)[:, None] + path) * (1 / simulate_muons.LIGHT)
        rays.place, rays.pieces, rays.pmts, rays.way = place, pieces, pmts, chord / length
        chords = ((torch.arange(48, device=pmts.device).to(ends) + 0.5) / 24)[:, None]       # over the sphere
        cosines = 1 - chords.square() / 2
        far = near.new_full((1, 1, 1), simulate_muons.PMT_RADIUS ** 2)
        around = self.share(near.sqrt() * cosines * simulate_muons.PMT_RADIUS, far, near, optics)
        around.by_near = cosines * (simulate_muons.PMT_RADIUS / 2) * near.rsqrt()
        around.factor = simulate_muons.NOMINAL.diffuse[0] * optics[..., 4:5].exp() * (chords / chords.sum())
        rays.around, rays.diffuse = around, (around.direct * around.factor).sum(1, keepdim=True)
        return rays

    def expect(self, rays, light):
        """Log expected charge (B, T), of log light (B, K)."""
        rays.light = light.exp()[:, None]
        rays.part, rays.around_part = rays.direct * rays.light, rays.diffuse * rays.light
        rays.scattered = rays.around_part.sum(-1)
        rays.expected = (rays.part.sum(-1) + rays.scattered).clamp(min=0.1)
        rays.log_expected = rays.expected.log()
        return rays.log_expected

    def seen(self, rays, first, charge):
        """Features (B, T, n_features) for HitTimes: log expected charge, the charge against it, how much
        comes within about 1.5, 5 and 15 ns of the first light at first (B, T)."""
        late = (first[..., None] - rays.arrival) * (1 / 15)
        rays.later, early = (late < 0) & (late > -4), late.clamp(-4, 0).exp()
        third = early * early * early
        rays.early = third * third * third * early, third, early
        rays.soon = [(rays.part * e).sum(-1) / rays.expected + 1e-3 for e in rays.early]
        over = (charge.clamp(min=0.3).log() - rays.log_expected).clamp(-2, 2)
        rays.fits = over.abs() < 2
        soon = [s.log() / 2 + 1 for s in rays.soon]
        return torch.stack([rays.log_expected / 3 - 2, over, *soon], -1)

    def bend(self, rays):
        """Adds to rays, and to rays.around, slopes of the logarithm of the share in the scalar product
        `along` and the squared radius `near`, to rays those of the arrival and of the diffuse light."""
        ratio, light = fit_muons.INDEX_OUT / simulate_muons.LIGHT, 1 / simulate_muons.LIGHT
        inner = (fit_muons.INDEX_IN - fit_muons.INDEX_OUT) * light
        for r in (rays.around, rays):
            square = r.inverse.square()
            turn = r.outward * square
            out_along, out_near = r.inverse + turn, -r.inverse - 0.5 * turn
            steep = 1 / r.cosine
            cos_along, cos_near = r.outward * out_along * steep, (r.outward * out_near - 0.5) * steep
            in_along, in_near = cos_along - out_along, cos_near - out_near
            passed = r.by_ramp * (1 / simulate_muons.RADIUS)
            r.by_along = 3 * square - 1 / (r.far - r.along) + passed * cos_along - r.per_m * in_along
            r.log_near = passed * cos_near - r.per_m * in_near - 1.5 * square
        rays.late_along = inner * in_along - ratio * rays.inverse
        rays.late_near = inner * in_near + 0.5 * ratio * rays.inverse
        rays.weights = torch.stack([1 - rays.place, rays.place], -1)
        rays.outer = (2 * rays.weights[..., None] * rays.pieces[:, :, None]).flatten(2)      # (B, K, 6)
        r, spread = rays.around, rays.around.direct * rays.around.factor * rays.light
        by_near = (spread * (r.log_near + r.by_along * r.by_near)).sum(1, keepdim=True)
        rays.diffuse_ends = by_near @ rays.outer

    def by_optics(self, rays, share):
        """Slopes (B, T, 4) in the first optics of what has slopes share (B, T, K) in the logs of shares."""
        opened = share * rays.by_ramp
        return torch.stack([(share * rays.inside * rays.per_m).sum(-1), opened.sum(-1) * -0.1,
                            (opened * rays.ramp).sum(-1) * -rays.width[..., 0],
                            (share * rays.by_leak).sum(-1)], -1)

    def by_ends(self, rays, share, time=None):
        """Slopes (B, T, 6) in entry and exit of what has slopes share (B, T, K) in the logs of shares, and
        time in the arrivals."""
        along, near = share * rays.by_along, share * rays.log_near
        if time is not None:
            along, near = along + time * rays.late_along, near + time * rays.late_near
        found = ((along @ rays.weights)[..., None] * rays.pmts[:, :, None]).flatten(2) + near @ rays.outer
        if time is not None:
            longer = (time @ rays.place)[..., None] * rays.way[:, None] * (1 / simulate_muons.LIGHT)
            found = found + torch.cat([-longer, longer], -1)
        return found

    def rises(self, rays, ends=True):
        """Slopes (B, T, 6 + K + OPTICS) of the log expected charge in entry, exit (not without ends), log
        light and optics (the yield is in the light)."""
        per, r = 1 / rays.expected[..., None], rays.around
        share = rays.part * per
        diffuse = self.by_optics(r, r.direct * r.factor * rays.light).sum(1, keepdim=True)
        optics = [self.by_optics(rays, share) + diffuse * per, rays.scattered[..., None] * per,
                  torch.zeros_like(per)]
        own = [self.by_ends(rays, share) + rays.diffuse_ends * per] if ends else []
        return torch.cat([*own, share + rays.around_part * per, *optics], -1)

    def chain(self, rays, weights, first_slopes, rise=0.0):
        """Slopes (B, T, 6) in entry and exit and (B, T, K) in log light of what has slopes `weights` (B, T,
        n_features) in the features of `seen` and rise (B, T) in the log expected charge; first_slopes
        (B, T, 6) of the first light's arrival."""
        soon = [0.5 * w / s for w, s in zip(weights[..., 2:].unbind(-1), rays.soon, strict=True)]
        whole = rise + weights[..., 0] / 3 - weights[..., 1] * rays.fits
        whole = whole - sum(w * (s - 1e-3) for w, s in zip(soon, rays.soon, strict=True))
        whole, *soon = ((w / rays.expected)[..., None] for w in (whole, *soon))
        early = [e * w for e, w in zip(rays.early, soon, strict=True)]
        share = rays.part * (whole + early[0] + early[1] + early[2])
        time = rays.part * (early[0] / -1.5 + early[1] / -5 + early[2] / -15) * rays.later
        ends = self.by_ends(rays, share, time) - time.sum(-1, keepdim=True) * first_slopes
        return ends + rays.diffuse_ends * whole, share + rays.around_part * whole

    def log_likelihood(self, log_expected, event, optics):
        """(log-likelihood, its slope and information in log_expected) (B, T) of the logarithms of charges, as
        event_charges gives them: Student's t with 4 degrees of freedom."""
        charge, most, typical, crowded = event
        scatter, counts, kept = optics[:, None, len(OPTICS):].unbind(-1)
        kept = torch.sigmoid(kept - 2.7)                     # at first 1,000 of 17,000
        kept = (kept + crowded) / (1 + crowded)
        # At first as in the simulation: 8% and 5% a PMT; counting, and 30% a photo-electron
        counts = (1.04 * counts.exp()).square() / log_expected.exp()
        variance = (0.095 * scatter.exp()).square() + counts
        root, narrower = variance.rsqrt(), counts / variance / 2             # as light grows
        z = (charge.clamp(min=0.3).log() - log_expected) * root
        full, below, heavy = charge >= 0.999 * most, torch.sigmoid(1.7 * z), 5 / (4 + z.square())
        logs = torch.where(full, F.logsigmoid(-1.7 * z), -2.5 * torch.log1p(z.square() / 4) + root.log())
        slope = torch.where(full, 1.7 * below, heavy * z)
        # Where there is far too little light, the curve hardly bends: Jaakkola and Jordan's bound (2000)
        far = 1.7 * z.clamp(min=1e-3)
        bent = torch.where(z > 0, (far / 2).tanh() / (2 * far), below * (1 - below))
        information = torch.where(full, 2.89 * bent, heavy)
        distance = root * (log_expected - typical.log())
        above = torch.sigmoid(1.7 * distance)                                # chance to be above the median,
        norm = kept + (1 - kept) * above                                     # and to be kept
        rise = 1.7 * (1 - kept) * above * (1 - above) / norm
        logs = logs - norm.log() + torch.where(charge < typical, kept, 1.0).log()
        spare = rise * (1.7 * (1 - 2 * above) - rise)
        information = torch.maximum(information + spare, 0.1 * information)
        slope = (slope - rise) * root - narrower * (slope * z + rise * distance - (~full).to(z))
        return logs, slope, information / variance

    @torch.no_grad()
    def profile(self, rays, event, real, level, optics, width, steps):
        """Log light (B, K) of the pieces, likeliest by charges and its prior: in photo-electrons, were the
        track surrounded by PMTs."""
        share, light = rays.direct + rays.diffuse, level.expand(-1, self.n_segments)
        for _ in range(steps):
            part = share * light.exp()[:, None]
            expected = part.sum(-1).clamp(min=0.1)
            _, slope, information = self.log_likelihood(expected.log(), event, optics)
            slopes, over = part / expected[..., None], light - level
            trust = 2 / (width ** 2 + over.square())
            normal = (slopes * (information * real)[..., None]).mT @ slopes
            normal = normal + torch.diag_embed(trust + 0.1 * normal.diagonal(dim1=1, dim2=2))
            pull = (slopes * (slope * real)[..., None]).sum(1) - trust * over
            light = light + torch.linalg.solve(normal, pull).nan_to_num(0, 0, 0).clamp(-1.5, 1.5)
        return light

    @torch.no_grad()
    def settle(self, ends, x, real, event, known, steps, width, light=None, optics=None):
        """(log light (B, K), optics (B, kinds), their information (B, K + OPTICS, K + OPTICS)), the likeliest
        of a track by the charges and the priors: Levenberg and Marquardt's steps, a step that made it worse
        taken back."""
        n, kept, damping = self.n_segments, None, None
        if light is None:
            rays, optics = self(ends, x[..., :3], known[0]), known[0]
            light = self.profile(rays, event, real, self.level(ends, optics), optics, width, 8)
        for step in range(steps):
            rays, level = self(ends, x[..., :3], optics), self.level(ends, optics)
            log_expected, rises = self.expect(rays, light), self.rises(rays, ends=False)
            logs, slope, information = self.log_likelihood(log_expected, event, optics)
            matrix, pull = self.prior(light, level, optics, known, width)
            matrix = matrix + (rises * (information * real)[..., None]).mT @ rises
            pull = pull + (rises * (slope * real)[..., None]).sum(1)
            away = ((optics - known[0])[:, :len(OPTICS)] / known[1]).square().sum(1)
            value = (logs * real).sum(1) - ((light - level) / width).square().log1p().sum(1) - 0.5 * away
            found = value, light, optics, matrix, pull
            if kept is None:
                damping = torch.zeros_like(value)
            else:
                better = value > kept[0]
                damping = torch.where(better, damping / 10, (10 * damping).clamp(min=0.1))
                found = [torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)
                         for a, b in zip(found, kept, strict=True)]
            kept = _, light, optics, matrix, pull = found
            if step == steps - 1:
                return light, optics, matrix
            damped = matrix.diagonal(dim1=1, dim2=2) * damping[:, None]
            damped = matrix + torch.diag_embed(damped + F.pad(self.held(optics, pull[:, n:]), (n, 0)))
            move = torch.linalg.solve(damped.double(), pull.double())
            move = move.to(light).nan_to_num(0, 0, 0).clamp(-1, 1)
            light, optics = light + move[:, :n], self.moved(optics, move[:, n:])


def first_light_slopes(ends, pmts, geometry, arrival_weights, weights):
    """Slopes (n, B, T, 6) in ends (B, 2, 3) of what has slopes arrival_weights (n, B, T) and weights
    (n, B, T, 8) in what fit_muons.first_light says of PMTs (B, T, 3), the geometry (B, T, 8): by hand,
    through the scalar products of the PMT, the entry and the track's direction. Tracks of 1 mm at least."""
    entry, chord = ends[:, None, 0], (ends[:, 1] - ends[:, 0])[:, None]
    length = chord.norm(dim=-1).clamp(min=1e-3)                              # (B, 1)
    way, light = chord / length[..., None], simulate_muons.LIGHT
    place, inside, outside, edge, incidence, across, ahead, _ = geometry.unbind(-1)
    place, edge, across = place * length, edge * simulate_muons.RADIUS, across * 10
    distance = 10 * (inside + outside)
    per, outward = 1 / distance, edge - 10 * inside
    entry_way, pmt_way = (entry * way).sum(-1), (pmts @ way.mT)[..., 0]
    along = pmt_way - entry_way
    (to_place, to_inside, to_outside, to_edge, to_incidence, to_across, to_ahead,
     to_length) = weights.unbind(-1)
    # Backwards through first_light: first what is known of the source of the light, by its products with the
    # PMT and itself
    outer = fit_muons.INDEX_OUT / light * arrival_weights + to_outside / 10
    inner = fit_muons.INDEX_IN / light * arrival_weights + to_inside / 10 - outer
    by_edge = (to_edge / simulate_muons.RADIUS + inner) * (edge > 0.01) / edge
    by_outward = (by_edge * outward - inner) * per
    to_incidence = to_incidence * per / simulate_muons.PMT_RADIUS
    to_ahead = to_ahead * per
    far = (outer - by_outward * outward) * per - to_incidence * incidence * simulate_muons.PMT_RADIUS * per
    far = far - to_ahead * ahead * per
    by_pmt, by_self = by_outward - to_incidence - far, far / 2 - by_outward - by_edge / 2
    # Then of its place
    by_place = by_pmt * pmt_way + 2 * by_self * (entry_way + place) - to_ahead
    by_place = by_place + to_place / length + arrival_weights / light
    free, last = (place > 0) & (place < length), place >= length
    by_length = to_length / 30 - to_place * place / length ** 2 + by_place * last
    by_along = by_place * free
    by_across = (to_across / 10 - by_along / math.sqrt(fit_muons.INDEX_IN ** 2 - 1)) / across
    by_along = by_along - by_across * along
    # Then of entry and direction
    by_pmt_way = by_pmt * place + by_along + to_ahead
    by_entry_way = 2 * by_self * place - by_along - to_ahead
    by_pmt, by_entry = by_pmt - by_across, 2 * by_self + by_across
    turned = by_length - (by_pmt_way * pmt_way + by_entry_way * entry_way) / length
    pmt = torch.stack([by_pmt - by_pmt_way / length, by_pmt_way / length], -1)
    rest = torch.stack([by_entry - by_entry_way / length, by_entry_way - turned, by_entry_way / length,
                        turned], -1).unflatten(-1, (2, 2))
    rest = rest.flatten(2, 3) @ torch.cat([entry, way], 1)                   # (n, B, 2 T, 3)
    return (pmt[..., None] * pmts[:, :, None] + rest.unflatten(2, (-1, 2))).flatten(-2)


def event_charges(x, real):
    """Charges (B, T) of hits x (B, T, 5); of each event (B, 1) that at which they saturate, or infinity;
    their median; and how many more than half saturate, from 0 to 1: then these were chosen at random, too."""
    charge = x[..., 4]
    most = charge.amax(1, keepdim=True)
    same = ((charge >= 0.999 * most) & real).sum(1, keepdim=True)
    typical = torch.where(real, charge, math.nan).nanmedian(1, keepdim=True).values
    crowded = (2 * same / real.sum(1, keepdim=True) - 1).clamp(min=0).to(charge)
    return charge, torch.where(same > 4, most, math.inf), typical.clamp(min=0.3), crowded


def some_hits(x, real, event, every, begin=0):
    """Of hits x (B, T, 5), which are real (B, T) and event_charges: every so-manyeth hit."""
    return x[:, begin::every], real[:, begin::every], (event[0][:, begin::every], *event[1:])


class HitTimes(nn.Module):
    """The likelihood of the time of a hit, given a track and its light: a mixture of Gaussians and 1% noise,
    from the geometry of the light that could come first, the charge, Light, and the event's context."""

    def __init__(self, context, width, n_mixture, n_modes):
        super().__init__()
        self.first = nn.Linear(13 + Light.n_features, width)
        self.context = nn.Linear(context, width, bias=False)
        self.second, self.last = nn.Linear(width, width), nn.Linear(width, 3 * n_mixture)
        self.modes = nn.Linear(width, n_modes, bias=False)
        nn.init.zeros_(self.last.weight)
        spread = torch.linspace(-3, 3, n_mixture)
        self.last.bias.data = torch.cat([torch.zeros(n_mixture), spread, torch.zeros(n_mixture)])

    def forward(self, arrival, geometry, seen, x, largest, context):
        """(arrival + delays (B, T, M) in ns, log spreads, log shares, what the arrival gains
        (B, T, 2 + modes) by group indices 1 larger inside and outside, and by each mode) of hits x (B, T, 5),
        of what fit_muons.first_light and Light say; largest (B,) charge of the event, context (B, C)."""
        return self.outputs(arrival, geometry, self.hidden(geometry, seen, x, largest, context)[-1])

    def hidden(self, geometry, seen, x, largest, context):
        """What goes into and comes out of SiLU in the two layers, (B, T, width)."""
        charge = x[..., 4].clamp(min=0.3).log()
        gap = (charge - largest[:, None].clamp(min=0.3).log()).clamp(min=-6)
        light = torch.stack([charge / 3 - 2, gap / 3, (gap * 20).exp(), (geometry[..., 0] <= 0).to(gap),
                             (geometry[..., 0] >= 1).to(gap)], -1)
        known = (self.first.bias + self.context(context))[:, None]
        first = torch.baddbmm(known, torch.cat([geometry, light, seen], -1),
                              self.first.weight.mT.expand(len(x), -1, -1))
        inner = F.silu(first)
        second = self.second(inner)
        return first, inner, second, F.silu(second)

    def outputs(self, arrival, geometry, h):
        """What forward gives, of the last that hidden does."""
        shares, delays, spreads = self.last(h).chunk(3, -1)
        gains = torch.cat([geometry[..., 1:3] * (10 / simulate_muons.LIGHT), 2 * self.modes(h).tanh()], -1)
        delays, spreads = 40 * (delays / 40).tanh(), 1 + 2.5 * (spreads / 2.5).tanh()   # e^-1.5 to e^3.5 ns
        return arrival[..., None] + delays, spreads, shares.log_softmax(-1), gains

    def slopes(self, arrival, first, inner, second, h, given, weights):
        """Slopes (n, B, T), (n, B, T, 8), (n, B, T, n_features) in arrival, geometry and seen of what has
        slopes weights, n times four, in what forward gave: by hand, since SiLU's slopes are made once."""
        one, out = h.new_ones(()), []
        steep = torch.lerp(inner, one, first.sigmoid()), torch.lerp(h, one, second.sigmoid())
        outer = torch.cat([self.last.weight, self.modes.weight])
        asked = torch.cat([self.first.weight[:, :8], self.first.weight[:, 13:]], 1)
        bent = [1 - ((given[0] - arrival[..., None]) / 40).square(), 1 - ((given[1] - 1) / 2.5).square(),
                2 - given[3][..., 2:].square() / 2]
        for centers, spreads, shares, gains in weights:
            shares = shares - given[2].exp() * shares.sum(-1, keepdim=True)
            back = torch.cat([shares, centers * bent[0], spreads * bent[1], gains[..., 2:] * bent[2]], -1)
            back = (back @ outer).mul_(steep[1]) @ self.second.weight
            back = back.mul_(steep[0]) @ asked
            indices = F.pad(gains[..., :2] * (10 / simulate_muons.LIGHT), (1, 5))
            out.append((centers.sum(-1), back[..., :8] + indices, back[..., 8:]))
        return [torch.stack(o) for o in zip(*out, strict=True)]


def responsible(times, centers, spreads, shares):
    """(log-likelihood (B, T) of times (B, T) under a mixture and 1% noise, each Gaussian's part in it
    (B, T, M), how many of its spreads the time is late)."""
    left = (times[..., None] - centers) * (-spreads).exp()
    logs = shares + math.log(0.99) - 0.5 * left.square() - spreads - 0.5 * math.log(2 * math.pi)
    noise = logs.new_full((*logs.shape[:-1], 1), math.log(0.01 / 500))
    total = torch.cat([logs, noise], -1).logsumexp(-1)
    return total, (logs - total[..., None]).exp(), left


def curvature(part, left, spreads):
    """(information, slope in the time) (B, T), of what `responsible` gives and the log spreads."""
    narrow = (-spreads).exp()
    slope, whole = (part * left * narrow).sum(-1), (part * narrow.square()).sum(-1)
    spare = (part * (left * narrow).square()).sum(-1) - slope.square()
    return torch.maximum(whole - spare, 0.25 * whole), slope


class MuonNet(nn.Module):
    """Hits (B, T, 5) → ends (B, 2, 3) in m, or logits: transformer with dynamic sparsity attention over hits
    (ordered so that neighbours are alike), learned readout, Gauss-Newton steps on the hits' likelihood."""

    n_features = 9
    short = 13.0                                         # m: shorter tracks make steps before the others

    def __init__(self, task="regression", n_outputs=6, dim=48, n_layers=2, n_heads=6, hidden_dim=192,
                 norm="pre", readout="learned", output="points", frame="canonical", min_connections=16,
                 dense=False, context=16, hit_dim=48, n_mixture=3, seq_len=2_000, read=1_000, n_modes=4,
                 refine=3, leaf=16, judge="moments", queries=64, segments=16, charge_weight=0.5,
                 order="place"):
        super().__init__()
        self.sizes = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.task, self.readout, self.output, self.frame, self.dense = task, readout, output, frame, dense
        self.every, self.order = max(1, seq_len // read), order
        self.blocks = 1 << max(0, round(math.log2(seq_len / self.every / leaf)))
        self.register_buffer("mean", torch.zeros(self.n_features))
        self.register_buffer("scale", torch.ones(self.n_features))
        self.register_buffer("index_spread", torch.tensor(0.0))  # prior of the group index; 0: nominal
        self.input = nn.Linear(self.n_features, dim)
        together = min(self.blocks, 1 << max(0, round(math.log2(queries / leaf))))
        self.layers = nn.ModuleList(Layer(dim, n_heads, hidden_dim, norm, min_connections, together, judge)
                                    for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.n_pools = 4
        self.pools, self.pooled = nn.Linear(dim, self.n_pools * n_heads), nn.Linear(dim, dim)
        wide = dim * (self.n_pools if readout == "learned" else 1)
        self.head = nn.Sequential(
            nn.Linear(wide, 4 * dim), nn.GELU(), nn.Linear(4 * dim, n_outputs + context)
        )
        self.hits = HitTimes(context, hit_dim, n_mixture, n_modes)
        self.light, self.charge_weight = Light(context, segments), charge_weight
        self.n_context = context
        if task == "regression":                         # at first a track from the entry through the centre
            self.head[2].bias.data[:6] = torch.tensor([0, 0, 1.0, 0, 0, -1.0])

    def features(self, x, real, rotation, first):
        """(B, T, n_features): place, times on three scales, charge, charge against the event's."""
        place = x[..., :3] @ rotation.mT / simulate_muons.PMT_RADIUS
        late = x[..., 3] - first[:, None]
        charge = x[..., 4].clamp(min=0.3).log()
        mean = (charge * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        parts = torch.stack([late.clamp(-50, 400) / 100, (late / 20).tanh(), (-late.clamp(min=-5) / 10).exp(),
                             charge, charge - mean, mean.expand_as(charge)], -1)
        return torch.cat([place, parts], -1)

    def forward(self, x, refine=0, graph=False):
        """x (B, T, 5), NaN rows no hits → {"ends": first answer (B, 2, 3), "refined" after `refine` steps,
        "context", "statistics": a dict a layer}, or {"logits", ...}."""
        x, real = fit_muons.by_time(x)
        rotation, first = frames(x, real)
        if self.frame == "detector":
            rotation = torch.eye(3, device=x.device).expand_as(rotation)
        h, present, features = self.tokens(x[:, ::self.every], real[:, ::self.every], rotation, first)
        statistics = []
        for layer in self.layers:
            h, found = layer(h, present, self.blocks, self.dense)
            statistics.append(found)
        y = self.head(self.read(self.norm(h), present, features)).to(x.dtype)
        if self.task != "regression":
            return {"logits": y[:, :y.shape[1] - self.n_context], "statistics": statistics}
        answer, context = y[:, :6].unflatten(1, (2, 3)), y[:, 6:]
        with torch.autocast(x.device.type, enabled=False):
            out = {"context": context, "statistics": statistics, "ends": self.ends(answer) @ rotation}
            if refine:
                out["refined"] = self.refine(out["ends"], x, real, first, context, refine, graph)
        return out

    def tokens(self, x, real, rotation, first):
        """(embedded hits (B, P, D), those alike neighbours; which are real (B, P); their features)."""
        features = (self.features(x, real, rotation, first) - self.mean) / self.scale
        points = features if self.order == "features" else x[..., :3] @ rotation.mT
        index = common.place_order(points, real, self.blocks)
        row = torch.arange(len(x), device=x.device)[:, None]
        features, present = F.pad(features, (0, 0, 0, 1))[row, index], F.pad(real, (0, 1))[row, index]
        return self.input(features) * present[..., None], present, features

    def read(self, h, real, features):
        """What is read out of the hits h (B, P, D): (B, pools × D)."""
        if self.readout == "last":
            late = torch.where(real, features[..., 3], -math.inf).argmax(1)
            return h[torch.arange(len(h), device=h.device), late]
        weights = self.pools(h).masked_fill(~real[..., None], -math.inf).softmax(1)          # (B, P, R H)
        values = self.pooled(h).unflatten(-1, (weights.shape[-1] // self.n_pools, -1))       # (B, P, H, E)
        weights = weights.unflatten(-1, (self.n_pools, -1))
        return torch.einsum("bprh,bphe->brhe", weights, values).flatten(1)

    def ends(self, answer):
        """Entry and exit (B, 2, 3) in m, in the event's frame, of the answer (B, 2, 3)."""
        if self.output == "raw":
            return answer * simulate_muons.RADIUS
        if self.output == "points":
            return fit_muons.on_sphere(answer)
        entry, way = F.normalize(answer[:, 0], dim=-1), F.normalize(answer[:, 1], dim=-1)
        ends = torch.stack([entry, entry - 2 * (entry * way).sum(-1, keepdim=True) * way], 1)
        return ends * simulate_muons.RADIUS

    def refine(self, ends, x, real, first, context, steps, graph=False, again=True):
        """Ends after Gauss-Newton steps on the likelihood of times and charges of hits x, sorted by time; far
        from the answer, fewer hits do. Of several steps the last two see half of the hits each, and the last
        adds the other half's equations. Without a graph, short tracks of 250 hits or more make four steps
        before, events that moved by more than 15 cm in the last go on, with all hits, and those that end more
        than 1 m from where these steps began, begin again. Light is found anew where steps begin."""
        if not graph and torch.is_grad_enabled():
            with torch.no_grad():
                return self.refine(ends, x, real, first, context, steps, graph, again)
        known, begun = self.light.detector(context), fit_muons.on_sphere(ends)
        event, largest, ends = event_charges(x, real), x[..., 4].amax(1), begun

        def some(rows):
            return (x[rows], real[rows], [t[rows] for t in event], first[rows], context[rows],
                    [t[rows] for t in known], largest[rows])
        short = (ends[:, 1] - ends[:, 0]).norm(dim=-1) < self.short
        short = (short & (real.sum(1) >= 250)).nonzero()[:, 0]
        if not graph and len(short):
            state, _ = self.steps(ends[short], *some(short), [(8, 1), (8, 5), (8, 0), (8, 3)])
            begun = ends = ends.index_copy(0, short, state[0])
        plan = [(8, left % 8) if left > 1 else (2, left) if steps > 1 else (1, 0)
                for left in reversed(range(steps))]
        state, before = self.steps(ends, x, real, event, first, context, known, largest, plan)
        rows = torch.arange(len(x), device=x.device)
        for _ in range(0 if graph else 8):
            rows = rows[(state[0] - before)[rows].norm(dim=-1).amax(1) > 0.15]
            if not len(rows):
                break
            found, _ = self.step([t[rows] for t in state], *some(rows), self.light.widths[-1])
            before, state = state[0], [old.index_copy(0, rows, new)
                                       for old, new in zip(state, found, strict=True)]
        far = ((state[0] - begun).norm(dim=-1).amax(1) > 1).nonzero()[:, 0]
        if graph or not again or not len(far):
            return state[0]
        given = (t[far] for t in (state[0], x, real, first, context))
        return state[0].index_copy(0, far, self.refine(*given, steps + 2, again=False))

    def steps(self, ends, x, real, event, first, context, known, largest, plan):
        """(state, ends before the last step) after steps from ends with light as it settles there; plan: of
        each step, which so-manyeth hits it sees, and the first of them."""
        widths, some = self.light.widths, some_hits(x, real, event, every=16)
        state, equations = (ends, *self.light.settle(ends, *some, known, 4, widths[0])[:2], None), None
        for i, (every, begin) in enumerate(plan, -len(plan)):
            before, hits = state[0], some_hits(x, real, event, every, begin)
            width = widths[max(i, -len(widths))]
            state, equations = self.step(state, *hits, first, context, known, largest, width,
                                         equations if i == -1 and every == 2 else None)
        return state, before

    def step(self, state, x, real, event, first, context, known, largest, width, others=None):
        """One Gauss-Newton step, no longer than 3 m, of a state: ends, log light (B, K) of pieces, optics
        (B, kinds) known as `Light.detector` says, what event_time finds (None: anew). Returns the state after
        it, and these hits' normal_equations. others: those of other hits, that count as well."""
        ends, light, optics, found = state
        equations = self.normal_equations(state, x, real, event, first, context, largest)
        place, pull, normal = equations
        n, C = len(OPTICS), 3 + self.hits.modes.out_features
        found = place[:, :C]
        if others is not None:
            pull = pull + others[1] - (others[2].double() @ (place - others[0]).double()[..., None])[..., 0]
            normal = normal + others[2]
        normal, pull = normal.double(), pull.double()
        across = torch.eye(normal.shape[1]).to(normal)                      # the ends stay on the sphere
        across = torch.cat([across[:C], across[:4], across[C + 6:]]).repeat(len(x), 1, 1)
        across[:, C:C + 4] = 0
        across[:, C:C + 2, C:C + 3], across[:, C + 2:C + 4, C + 3:C + 6] = fit_muons.tangents(ends).unbind(1)
        normal, pull = across @ normal @ across.mT, (across @ pull[..., None])[..., 0]
        prior, toward = self.light.prior(light, self.light.level(ends, optics), optics, known, width)
        sure, rest = precision(self.index_spread, found), (0, pull.shape[1] - C)
        normal = normal + torch.diag_embed(1e-3 * normal.diagonal(dim1=1, dim2=2) + F.pad(sure, rest) + 1e-6)
        normal = normal + F.pad(prior, (C + 4, 0, C + 4, 0))
        pull = pull + F.pad(toward, (C + 4, 0)) - F.pad(sure * found, rest)
        normal = normal + torch.diag_embed(F.pad(self.light.held(optics, pull[:, -n:]), (rest[1] + C - n, 0)))
        move = torch.linalg.solve(normal, pull).to(ends).nan_to_num(0, 0, 0)
        found, move = found + move[:, :C].clamp(-10, 10), move[:, C:]
        size = move[:, :4].unflatten(-1, (2, 2)).norm(dim=-1).amax(1, keepdim=True)
        ends = fit_muons.move(ends, move[:, :4] * (3 / size.clamp(min=3)))
        move = move[:, 4:].clamp(-0.7, 0.7)
        return (ends, light + move[:, :-n], self.light.moved(optics, move[:, -n:]), found), equations

    def normal_equations(self, state, x, real, event, first, context, largest):
        """Of hits at a state, priors aside: (place (B, N): what event_time finds, both ends in m, log
        light, optics; their likelihood's slope there (B, N); the matrix (B, N, N) by which it falls)."""
        ends, light, optics, found = state
        late, places = (x[..., 3] - first[:, None]).clamp(-100, 600), x[..., :3]
        rays = self.light(ends, places, optics)
        arrival, geometry = fit_muons.first_light(*ends[:, :, None].unbind(1), places)
        log_expected = self.light.expect(rays, light)
        seen = self.light.seen(rays, arrival, event[0])
        hidden = self.hits.hidden(geometry, seen, x, largest, context)
        given = centers, spreads, shares, gains = self.hits.outputs(arrival, geometry, hidden[-1])
        found = event_time(late, real, *given, self.index_spread, found)
        _, part, left = responsible(remaining(late, found, gains), *given[:3])
        information, slope = curvature(part, left, spreads)
        # Slopes of the likelihood and, for the matrix, of the mean in what the network gave
        push, share = part * left * (-spreads).exp(), shares.exp()
        weights = [(push, part * (left.square() - 1), part, slope[..., None] * found[:, None, 1:]),
                   (share, torch.zeros_like(spreads), share * centers, torch.zeros_like(gains))]
        times, paths, features = self.hits.slopes(arrival, *hidden, given, weights)
        paths = F.pad(times, (0, 0, 0, 0, 0, 1), value=1.0), F.pad(paths, (0, 0, 0, 0, 0, 0, 0, 1))
        *own, first_slopes = first_light_slopes(ends, places, geometry, *paths)
        self.light.bend(rays)
        _, rise, weight = self.light.log_likelihood(log_expected, event, optics)
        rise, weight = self.charge_weight * rise, self.charge_weight * weight * real
        columns = torch.cat([torch.ones_like(gains[..., :1]), gains], -1)
        rises = self.light.rises(rays)                                      # (B, T, 6 + K + OPTICS)
        pull = self.light.chain(rays, features[0], first_slopes, rise)
        slopes = self.light.chain(rays, features[1], first_slopes)
        slopes = torch.cat([columns, own[1] + slopes[0], slopes[1]], -1)    # (B, T, C + 6 + K)
        n, C = len(OPTICS), columns.shape[-1]
        pull = [slope[..., None] * columns, own[0] + pull[0], pull[1], rise[..., None] * rises[..., -n:]]
        pull = torch.cat([real.to(p)[:, None] @ p for p in pull], -1)[:, 0]
        normal = F.pad((slopes * (information * real)[..., None]).mT @ slopes, (0, n, 0, n))
        normal = normal + F.pad((rises * weight[..., None]).mT @ rises, (C, 0, C, 0))
        place = torch.cat([found, ends.flatten(1), light, optics[:, :n]], -1)
        return place, pull, normal

    def schedule(self, density, index_spread):
        """Set what changes during training and stays with the weights."""
        self.index_spread.fill_(index_spread)
        for layer in self.layers:
            layer.attention.density.fill_(density)


@torch.no_grad()
def event_time(late, real, centers, spreads, shares, gains, index_spread, found=None):
    """(B, 3 + modes): the time at which the muon entered, how far the group indices inside and outside are
    from the nominal ones, and how much of each mode: the likeliest with Gaussian priors, of index_spread (0:
    none of these) and 1. late (B, T): the hits' times; found: a good guess, from where one step is made."""
    columns = torch.cat([torch.ones_like(gains[..., :1]), gains], -1)
    prior = precision(index_spread, columns)
    steps = 1
    if found is None:
        steps, left = 5, torch.where(real, late - (shares.exp() * centers).sum(-1), math.nan)
        found = F.pad(left.nanmedian(1).values[:, None], (0, gains.shape[-1]))
    for _ in range(steps):
        _, part, left = responsible(remaining(late, found, gains), centers, spreads, shares)
        information, slope = curvature(part, left, spreads)
        normal = (columns * (information * real)[..., None]).mT @ columns + torch.diag(prior)
        pull = (columns * (slope * real)[..., None]).sum(1) - prior * found
        found = found + torch.linalg.solve(normal.double(), pull.double()).to(late).clamp(-10, 10)
    return found


def precision(index_spread, columns):
    """Of the priors of what event_time finds."""
    known = float(index_spread) == 0
    index, mode = (1e12, 1e12) if known else (1 / float(index_spread) ** 2, 1.0)
    return columns.new_tensor([1e-6, index, index, *[mode] * (columns.shape[-1] - 3)])


def remaining(late, found, gains):
    """Times (B, T) of hits less what event_time found."""
    return late - found[:, :1] - (gains @ found[:, 1:, None])[..., 0]


def n_classes():
    """Of TASK; 0 for tracks."""
    return {"regression": 0, "classification": N_CLASSES}.get(TASK, 2)


def make_model():
    sizes = dict(task=TASK, n_outputs={"regression": 6, "classification": N_CLASSES}.get(TASK, 1), dim=DIM,
                 n_layers=N_LAYERS, n_heads=N_HEADS, hidden_dim=HIDDEN_DIM, norm=NORM, readout=READOUT,
                 output=OUTPUT, frame=FRAME, min_connections=MIN_CONNECTIONS, dense=ATTENTION == "dense",
                 context=CONTEXT, hit_dim=HIT_DIM, n_mixture=MIXTURE, seq_len=SEQ_LEN, read=READ,
                 n_modes=MODES, refine=REFINE, leaf=LEAF, judge=JUDGE, queries=QUERIES,
                 segments=SEGMENTS, charge_weight=CHARGES, order=ORDER)
    if PRESET == "seed":                                 # but for what the command line gives
        old = dict(dim=48, n_layers=4, n_heads=6, hidden_dim=192, norm="post")
        sizes |= {k: v for k, v in old.items() if k.upper() not in globals().get("_given", ())}
    model = MuonNet(**sizes)
    if TASK != "regression" or not LIKELIHOOD and not (REFINE and REFINED):
        model.hits.requires_grad_(False)                 # nothing in the loss asks for them
        model.light.requires_grad_(False)
    if READOUT == "last":
        for part in (model.pools, model.pooled):
            part.requires_grad_(False)
    if ATTENTION == "dense":
        for layer in model.layers:
            layer.attention.log_temperature.requires_grad_(False)
    return model


def normalise(model, events, indices):
    """Mean and spread of the input features, of at most 500 training events."""
    x, real = fit_muons.by_time(events.batch(indices[:500], "cpu")[0])
    rotation, first = frames(x, real)
    if FRAME == "detector":
        rotation = torch.eye(3).expand_as(rotation)
    features = model.features(x, real, rotation, first)[real]
    model.mean.copy_(features.mean(0))
    model.scale.copy_(features.std(0).clamp(min=1e-3))


def density_at(step):
    """Share of the connections at an update: half a cosine from the first DENSITY to the second."""
    done = 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / max(1, STEPS - 1)))
    return DENSITY[0] + (DENSITY[1] - DENSITY[0]) * done


def task_loss(out, y):
    """(B,) of a forward: metres for tracks, nats for classes."""
    if TASK == "classification":
        return F.cross_entropy(out["logits"], y, reduction="none")
    if TASK == "binary_classification":
        return F.binary_cross_entropy_with_logits(out["logits"][:, 0], y.float(), reduction="none")
    return distance(out["ends"], y)


def distance(ends, y):
    """Mean distance (B,) in m of ends and truth, smooth below 2 mm."""
    return ((ends - y).square().sum(-1) + 4e-6).sqrt().mean(-1)


def hits_loss(model, out, x, y, every=2):
    """Negative log-likelihood (B,) a hit, of times and charges of every so-manyeth hit, of true tracks; what
    event_time finds and the optics integrated out (Laplace), the light of the pieces the likeliest."""
    x, real = fit_muons.by_time(x)
    _, first = frames(x, real)
    hits, largest, L = (x, real, event_charges(x, real)), x[..., 4].amax(1), model.light
    x, real, event = hits = some_hits(*hits, every)
    known = L.detector(out["context"])
    settled = L.settle(y, *some_hits(*hits, every=4), known, 6, L.widths[0])
    light, optics, matrix = L.settle(y, *hits, known, 4, L.widths[-1], *settled[:2])
    arrival, geometry = fit_muons.first_light(*(y[:, i, None].expand(-1, x.shape[1], -1) for i in (0, 1)),
                                              x[..., :3])
    rays = L(y, x[..., :3], optics)
    log_expected, seen = L.expect(rays, light), L.seen(rays, arrival, event[0])
    (likeliest, spreads), n = known, len(OPTICS)
    optics = torch.cat([optics[:, :n], likeliest[:, n:]], 1)
    logs, *_ = L.log_likelihood(log_expected, event, optics)
    off, sure = (optics - likeliest)[:, :n] / spreads, F.pad(spreads ** -2, (light.shape[1], 0)).double()
    volume = torch.logdet(matrix.double() + torch.diag_embed(sure - sure.detach())).to(x)
    spare = spreads.log().sum(1) + 0.5 * off.square().sum(1) + 0.5 * volume

    late = (x[..., 3] - first[:, None]).clamp(-100, 600)
    *parts, gains = model.hits(arrival, geometry, seen, x, largest, out["context"])
    found = event_time(late, real, *(p.detach() for p in parts), gains.detach(), model.index_spread)
    total, *rest = responsible(remaining(late, found, gains), *parts)
    information, _ = curvature(*(t.detach() for t in (*rest, parts[1])))
    if model.index_spread > 0:                           # modes no larger than detectors differ
        modes, weight = gains[..., 2:].double(), information * real   # float32 loses its sign
        volume = (modes * weight[..., None]).mT @ modes + torch.eye(modes.shape[-1]).to(modes)
        spare = spare + 0.5 * torch.logdet(volume).to(x) + 0.5 * found[:, 3:].square().sum(1)
    else:
        spare = spare + 0 * gains.sum((1, 2))
    return (spare - ((total + logs) * real).sum(1)) / real.sum(1)


@torch.no_grad()
def predict(run, model, events, indices):
    """The outputs for the events, a dict of tensors on the CPU, and the targets or None, on every process."""
    model.eval()
    found, mine = {}, indices[run.rank::run.world]
    for i in range(0, len(mine), MICRO_BATCH):
        x, y = events.batch(mine[i:i + MICRO_BATCH], run.device)
        with run.autocast():
            out = model(x, REFINE if TASK == "regression" else 0)
        if FIT_STEPS and TASK == "regression":
            start = fit_muons.on_sphere(out.get("refined", out["ends"]))
            out["fitted"] = fit_muons.fit(x, calibration(run.device), start, FIT_STEPS)
        for name in ("ends", "refined", "fitted", "logits"):
            if name in out:
                found.setdefault(name, []).append(out[name].float().cpu())
        found.setdefault("truth", []).extend([] if y is None else [y.cpu()])
    model.train()
    found = {k: torch.cat(v) for k, v in found.items() if v}
    if run.world > 1:                                    # a process may have had no event at all
        parts = [None] * run.world
        torch.distributed.all_gather_object(parts, found)
        order = np.argsort(np.concatenate([np.arange(len(indices))[r::run.world] for r in range(run.world)]))
        found = {k: torch.cat([part[k] for part in parts if k in part])[order] for k in parts[0]}
    return found, found.pop("truth", None)


@functools.cache
def calibration(device):
    x, ends = fit_muons.calibration_events()
    return tuple(c.to(device) for c in fit_muons.calibrate(torch.nan_to_num(x), ends, x.isfinite().all(-1)))


def measure(found, truth):
    """What a physicist asks for, of the last answer there is ("first_" before refinement), of what predict
    found."""
    if TASK != "regression":
        logits = found["logits"]
        guess = logits.argmax(-1) if TASK == "classification" else (logits[:, 0] > 0).long()
        return {"accuracy": float((guess == truth).float().mean()), "events": len(truth),
                "majority": float(torch.bincount(truth).max() / len(truth))}
    last = [k for k in ("ends", "refined", "fitted") if k in found][-1]
    metrics = fit_muons.report(found[last], truth) | {"events": len(truth)}
    first = fit_muons.summary(fit_muons.errors(found["ends"], truth))
    metrics |= {f"first_{k}": v for k, v in first.items()} if last != "ends" else {}
    if last == "fitted" and "refined" in found:
        between = fit_muons.summary(fit_muons.errors(found["refined"], truth))
        metrics |= {f"network_{k}": v for k, v in between.items()}
    return metrics


def flat(metrics):
    """Medians only, for a line of the record."""
    return {k: v[0] if isinstance(v, list) else v for k, v in metrics.items()}


def goodness(metrics):
    """Lower is better: the 68% quantiles in cm, and failures."""
    if TASK != "regression":
        return -metrics["accuracy"]
    return metrics["entry_cm"][1] + metrics["exit_cm"][1] + 100 * metrics["failures"] / metrics["events"]


# Plots.

def plot_results(ends, truth, out):
    """OUT/residuals.png and OUT/resolution.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    found = fit_muons.errors(ends, truth)
    names = {"angle_deg": "angle [degrees]", "dD_cm": "distance from the centre, error [cm]",
             "entry_cm": "entry, error [cm]", "exit_cm": "exit, error [cm]"}
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4))
    for axis, (key, label) in zip(axes.ravel(), names.items(), strict=True):
        value = found[key].numpy()
        axis.hist(value, 60, range=(0, float(np.quantile(value, 0.98)) * 1.1 + 1e-6), color="steelblue")
        axis.axvline(np.median(value), color="black", label=f"median {np.median(value):.3g}")
        axis.axvline(np.quantile(value, 0.68), color="black", linestyle=":",
                     label=f"68% {np.quantile(value, 0.68):.3g}")
        axis.set(xlabel=label, ylabel="events")
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(out) / "residuals.png", dpi=110)
    pyplot.close(figure)
    way = F.normalize(truth[:, 1] - truth[:, 0], dim=-1)
    closest = (truth[:, 0] - (truth[:, 0] * way).sum(-1, keepdim=True) * way).norm(dim=-1).numpy()
    edges = np.linspace(0, simulate_muons.RADIUS, 10)
    where = np.digitize(closest, edges) - 1
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for axis, keys in ((axes[0], ["angle_deg"]), (axes[1], ["dD_cm", "entry_cm", "exit_cm"])):
        for key in keys:
            for share, style in ((0.5, "o-"), (0.68, "x:")):
                points = [(edges[b:b + 2].mean(), np.quantile(found[key].numpy()[where == b], share))
                          for b in range(len(edges) - 1) if (where == b).sum() >= 3]
                if points:
                    axis.plot(*zip(*points, strict=True), style, label=f"{names[key]}, {share:.0%}")
        axis.set(xlabel="closest approach to the centre [m]", yscale="log")
        if axis.lines:                                   # a handful of events fill no bin
            axis.legend(fontsize=7, framealpha=0.5)
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(Path(out) / "resolution.png", dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def plot_event(run, model, events, index, ends, out):
    """OUT/event.png: one event on a map, its tracks, and the hits that those around its entry look at."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    x, y = events.batch([index], run.device)
    seen, queries = chosen_hits(model, x, y[0, 0])
    x, y, ends = x[0].cpu(), y[0].cpu(), ends.cpu()
    figure, axis = pyplot.subplots(figsize=(9, 4.6))

    def onto(p):
        return torch.atan2(p[..., 1], p[..., 0]), p[..., 2] / p.norm(dim=-1)

    points = axis.scatter(
        *onto(x[:, :3]), 2 + x[:, 4] / 150, x[:, 3].clamp(*np.quantile(x[:, 3], [0.02, 0.98]))
    )
    axis.scatter(*onto(seen), 24, facecolors="none", edgecolors="orange", linewidths=0.7,
                 label="chosen by the attention of the hits in red")
    axis.scatter(*onto(queries), 8, color="red")
    for track, color, name in ((y, "black", "true"), (ends, "magenta", "reconstructed")):
        axis.plot(*onto(track[:1]), "v", color=color, label=f"{name} entry")
        axis.plot(*onto(track[1:]), "^", color=color, label=f"{name} exit")
    axis.set(xlabel="azimuth [rad]", ylabel="cos(polar angle)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, fontsize=7)
    figure.colorbar(points, label="time of the first hit [ns]")
    figure.tight_layout()
    figure.savefig(Path(out) / "event.png", dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def chosen_hits(model, x, place):
    """Places (n, 3) of the hits that the block of queries nearest to a place (3,) chose in the last layer, by
    any head, and of those queries; x (1, T, 5)."""
    attention, caught = model.layers[-1].attention, []
    handle = attention.register_forward_hook(lambda module, inputs, output: caught.append(inputs))
    model(x)
    handle.remove()
    (h, present, N, *_), = caught
    x, real = fit_muons.by_time(x)
    rotation, first = frames(x, real)
    if model.frame == "detector":
        rotation = torch.eye(3, device=x.device)[None]
    _, _, features = model.tokens(x[:, ::model.every], real[:, ::model.every], rotation, first)
    places = (features * model.scale + model.mean)[0, :, :3] @ rotation[0] * simulate_muons.PMT_RADIUS
    B, P, _ = h.shape
    q, k, _ = attention.qkv(h).view(B, P, 3, attention.n_heads, -1).permute(2, 0, 3, 1, 4)
    bias = attention.importance(h).transpose(1, 2).masked_fill(~present[:, None], -math.inf)
    chosen, gate, _ = attention.choose(q, k, bias, present, N)
    size = P // chosen.shape[2]
    near = torch.where(present[0], (places - place).norm(dim=-1), math.inf).argmin()
    queries = slice(int(near) // size * size, (int(near) // size + 1) * size)
    blocks = chosen[0, :, int(near) // size][gate[0, :, int(near) // size] > -math.inf].unique()
    hits, seen = (t.view(N, P // N, -1)[blocks].flatten(0, 1) for t in (places, present[0]))
    return hits[seen[:, 0]].cpu(), places[queries][present[0, queries]].cpu()


def score():
    """EVAL: reconstruct shards with the best checkpoint in OUT; score them where they have targets."""
    run = common.start(SEED, DTYPE)
    model = build(common.load(common.newest_checkpoint(OUT))).to(run.device)
    sizes = model.sizes
    trained = dict(SEQ_LEN=sizes["seq_len"], REFINE=sizes["refine"])
    globals().update({k: v for k, v in trained.items() if k not in globals().get("_given", ())})
    globals().update(TASK=model.task, N_CLASSES=max(2, sizes["n_outputs"]))
    check_constants(run)
    events = Events(EVAL, need_targets=False)
    if events.y is None and len(events.blind) < len(events.x):
        run.say(f"{events.blind[0]} has no y_data: nothing is scored")
    if FIT_STEPS and TASK == "regression":
        calibration(run.device)
    begin = time.perf_counter()
    answers, truth = predict(run, model, events, np.arange(len(events)))
    rate = len(events) / (time.perf_counter() - begin)
    found = {"events": len(events)} if truth is None else measure(answers, truth)
    if run.first:
        answers = {k: v.numpy() for k, v in answers.items()}
        last = [k for k in ("ends", "refined", "fitted", "logits") if k in answers][-1]
        arrays = {"logits": answers[last]} if last == "logits" else {"entry": answers[last][:, 0],
                                                                     "exit": answers[last][:, 1]}
        common.write_whole(Path(OUT) / "predictions.npz", lambda file: np.savez(file, **arrays))
    common.write_result(run, OUT, found | {"events_per_s": round(rate, 2)})
    for name, value in (found | {"events_per_s": round(rate, 1)}).items():
        run.say(f"{name:16} {value}")
    common.stop(run)
    return found


def build(checkpoint):
    """The model of a checkpoint."""
    if checkpoint["kind"] != "MuonNet":
        raise common.BadInput(f"the checkpoint holds a {checkpoint['kind']}; this works on MuonNet")
    model = MuonNet(**checkpoint["sizes"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise common.BadInput("the checkpoint's weights are not of this script's network but of an earlier "
                              "one; train anew, or use the version it was trained with") from None
    return model


def simulated(run):
    """The pattern of the default data, made by data/simulate_muons.py where they are not there."""
    folder = Path(__file__).parent / "data" / "muons"
    files, unfinished = list(folder.glob("muons-*.pt")), (folder / "muons.unfinished").exists()
    if not files or unfinished:
        what = "an unfinished simulation" if unfinished else "no muons-*.pt"
        run.say(f"DATA is empty and {folder} holds {what}: simulating {EVENTS} events of randomised "
                "detectors; for more: python data/simulate_muons.py EVENTS=20000")
        if run.first:
            simulate_muons.simulate(folder, EVENTS=EVENTS, NAME="muons", DETECTOR="random")
    run.wait(patiently=True)
    return str(folder / "muons-*.pt")


def check_constants(run):
    common.divisible(
        MICRO_BATCH=(MICRO_BATCH, 1),
        STEPS=(STEPS, 1),
        BATCH=(BATCH, 1 if EVAL else run.world),
        N_HEADS=(N_HEADS, 1),
        DIM=(DIM, N_HEADS),
        HIDDEN_DIM=(HIDDEN_DIM, 1),
        HIT_DIM=(HIT_DIM, 1),
        N_LAYERS=(N_LAYERS, 1),
        MIXTURE=(MIXTURE, 1),
        EVENTS=(EVENTS, 1),
        LEAF=(LEAF, 1),
        QUERIES=(QUERIES, 1),
        SEGMENTS=(SEGMENTS, 1),
    )
    common.within(10, math.inf, SEQ_LEN=SEQ_LEN, READ=READ)
    common.within(
        0,
        math.inf,
        LR=LR,
        MUON_LR=MUON_LR,
        WEIGHT_DECAY=WEIGHT_DECAY,
        CLIP=CLIP,
        WARMUP=WARMUP,
        PATIENCE=PATIENCE,
        LOG_EVERY=LOG_EVERY,
        EVAL_EVERY=EVAL_EVERY,
        SAVE_EVERY=SAVE_EVERY,
        REFINE=REFINE,
        FIT_STEPS=FIT_STEPS,
        LIKELIHOOD=LIKELIHOOD,
        REFINED=REFINED,
        SPARSITY=SPARSITY,
        RETENTION=RETENTION,
        ENTROPY=ENTROPY,
        VALID_EVENTS=VALID_EVENTS,
        CONTEXT=CONTEXT,
        MODES=MODES,
        INDEX_SPREAD=INDEX_SPREAD,
        CHARGES=CHARGES,
        SEED=SEED,
    )
    common.within(1, math.inf, MAX_BAD_STEPS=MAX_BAD_STEPS, MIN_CONNECTIONS=MIN_CONNECTIONS)
    common.within(2, math.inf, N_CLASSES=N_CLASSES)
    common.within(0, 1, FLOOR=FLOOR, VALID_SHARE=VALID_SHARE, TEST_SHARE=TEST_SHARE)
    if len(DENSITY) != 2 or not all(isinstance(d, float | int) and 0 < d <= 1 for d in DENSITY):
        raise common.BadInput(f"DENSITY {DENSITY} must be two shares above 0, at most 1")
    for name, value, allowed in (("TASK", TASK, ("regression", "classification", "binary_classification")),
                                 ("ORDER", ORDER, ("features", "place")),
                                 ("ATTENTION", ATTENTION, ("dsa", "dense")), ("NORM", NORM, ("pre", "post")),
                                 ("JUDGE", JUDGE, ("moments", "keys")),
                                 ("PRESET", PRESET, ("", "seed")), ("READOUT", READOUT, ("learned", "last")),
                                 ("OUTPUT", OUTPUT, ("points", "raw", "direction")),
                                 ("FRAME", FRAME, ("canonical", "detector"))):
        if value not in allowed:
            raise common.BadInput(f"{name} {value!r} is not one of {', '.join(map(repr, allowed))}")
    if TASK == "regression" and not EVAL and REFINE and not (LIKELIHOOD or REFINED):
        raise common.BadInput(f"REFINE {REFINE} steps need a likelihood, which LIKELIHOOD 0 and REFINED 0 do "
                              "not train; give REFINE=0, too")
    if TASK == "regression" and REFINED and not REFINE:
        raise common.BadInput(f"REFINED {REFINED} trains through the steps of REFINE, which is 0; give "
                              "REFINED=0")


def main():
    if EVAL:
        return score()
    run = common.start(SEED, DTYPE)
    check_constants(run)
    events = Events(DATA or simulated(run))
    train, valid, test = events.split()
    if len(train) < BATCH or not len(valid) or not len(test):
        raise common.BadInput(
            f"{len(events)} events of {events.name} give {len(train)} to train on, {len(valid)} "
            f"and {len(test)} to validate and test; more are needed, or a smaller BATCH {BATCH}, or other "
            f"shares VALID_SHARE {VALID_SHARE}, TEST_SHARE {TEST_SHARE}"
        )

    model = make_model()
    normalise(model, events, train)
    if INIT:
        found = build(common.load(common.newest_checkpoint(INIT)))
        other = {k: (v, model.sizes[k]) for k, v in found.sizes.items() if v != model.sizes[k]}
        try:
            model.load_state_dict(found.state_dict())
        except RuntimeError:
            raise common.BadInput(f"INIT {INIT} has other sizes (there, here): {other}; give the "
                                  "same") from None
    model = model.to(run.device)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    constants, fingerprint = common.literals(globals()), events.fingerprint()
    found = common.resume(run, OUT, constants, RESUME, fingerprint)
    state = found["state"] if found else {"fingerprint": fingerprint, "best": math.inf, "since": 0, "bad": 0}
    first = common.restore(run, found, model, optimizers) if found else 0
    net = run.wrap(model)
    record = common.Record(run, OUT, STEPS, first, WANDB, constants, state)
    parameters = sum(p.numel() for p in model.parameters())
    record.show(f"{ATTENTION} attention, {parameters / 1e3:.0f}k parameters; {events.name}: {len(train)} + "
                f"{len(valid)} + {len(test)} events; {run.world} × {run.device} {str(run.dtype)[6:]}; {OUT}")
    dsa_loss = common.DSALoss(0.0, SPARSITY, RETENTION, ENTROPY)

    def loss_of(batch):
        x, y = batch
        out = net(x, REFINE if REFINED else 0, True)
        loss = task_loss(out, y)
        if TASK == "regression":
            with torch.autocast(x.device.type, enabled=False):
                if LIKELIHOOD:
                    loss = loss + LIKELIHOOD * hits_loss(model, out, x, y)
                if REFINED:
                    loss = loss + REFINED * distance(out["refined"], y)
        if ATTENTION == "dsa":
            loss = dsa_loss(loss, out["statistics"])
            watched.append({k: v.detach().mean() for k, v in out["statistics"][-1].items()})
        return loss.sum(), len(x)

    def batches(step):
        rng = np.random.default_rng((SEED, step))
        epoch, place = divmod(step * BATCH, len(train))
        order = np.random.default_rng((SEED, 0, epoch)).permutation(train)
        if place + BATCH > len(order):
            order = np.concatenate([order, np.random.default_rng((SEED, 0, epoch + 1)).permutation(train)])
        mine = order[place:place + BATCH].reshape(run.world, -1)
        seeds = rng.integers(1 << 62, size=BATCH).reshape(run.world, -1)[run.rank]
        made = []
        for i in range(0, mine.shape[1], MICRO_BATCH):
            x, y = events.batch(mine[run.rank, i:i + MICRO_BATCH], run.device)
            if AUGMENT:
                turns = [turned(x[j:j + 1], y[j:j + 1], np.random.default_rng(int(seeds[i + j])))
                         for j in range(len(x))]
                x, y = (torch.cat(part) for part in zip(*turns, strict=True))
            made.append((x, y))
        return made

    def validate(step, indices):
        metrics = measure(*predict(run, model, events, indices))
        record.log(step, **{f"valid_{k}": v for k, v in flat(metrics).items()})
        state["since"] += 1
        if goodness(metrics) < state["best"]:
            state.update(best=goodness(metrics), since=0)
            common.save_best(run, OUT, step, model, metrics)

    some = valid[:VALID_EVENTS] if VALID_EVENTS else valid
    if first == 0:
        validate(0, some)
    seen, watched = 0, []
    for step in range(first, STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        model.schedule(density_at(step), INDEX_SPREAD if INIT or step >= STEPS // 5 else 0.0)
        dsa_loss.density = density_at(step)
        watched.clear()
        done = common.update(run, net, optimizers, batches(step), loss_of, CLIP, step)

        step, seen = step + 1, seen + done.count
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            sparse = {k: float(watched[0][k]) for k in ("sparsity_ratio", "retained_information", "entropy")
                      } if watched else {}
            record.progress(step, seen, "events", loss=done.loss, grad_norm=done.grad_norm,
                            lr=optimizers[-1].param_groups[0]["lr"], **sparse)
            seen = 0
        record.tick(step)
        last = step == STEPS
        if EVAL_EVERY and step % EVAL_EVERY == 0 or last:
            validate(step, some)
            last = last or bool(PATIENCE) and state["since"] >= PATIENCE
        if last:
            break
        if SAVE_EVERY and step % SAVE_EVERY == 0 or done.signal:
            common.save(run, OUT, step, model, optimizers, state, constants)
        if done.signal:
            record.close()
            common.leave(run, OUT, step, done.signal)

    best = run.share(common.load(Path(OUT) / "best.pt") if run.first else None)
    judged = build(best).to(run.device)
    metrics = measure(*predict(run, judged, events, valid))
    answers, truth = predict(run, judged, events, test)  # looked at once, here
    metrics |= {f"test_{k}": v for k, v in measure(answers, truth).items()}
    record.log(step, **metrics, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    if run.first:
        if TASK == "regression":
            ends = answers[[k for k in ("ends", "refined", "fitted") if k in answers][-1]]
            plot_results(ends, truth, OUT)
            plot_event(run, judged, events, test[0], ends[0], OUT)
        common.plot_curves(OUT, ["loss"], ["valid_angle_deg", "valid_entry_cm", "valid_exit_cm"]
                           if TASK == "regression" else ["valid_accuracy"])
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(f"done: {OUT}/best.pt, residuals.png, resolution.png, event.png, curves.png")
    common.stop(run)
    return metrics


if __name__ == "__main__":
    common.cli(globals(), main)
