"""Impute genotypes: untyped variants of typed people, from a reference panel of phased haplotypes.

Two models, alone or mixed. The copying head reads, at each site, which panel haplotypes a person's own copy
there: the Li-Stephens chain (doi:10.1093/genetics/165.4.2213) along the genetic map, at several rates of
switching at once, all panel haplotypes its states; a small network that has learned what such evidence is
worth, by rarity, by sharpness, by agreement of both sides, gives the allele's probability. It knows no site
and no panel by name: new ones need no training. The BERT encodes a window of a haplotype and, with FAISS, the
K panel segments nearest on its typed sites, fuses them by allele frequency, and classifies each masked site.
Both learn on the panel, each person without his own haplotypes, with masks such as arrays make.

    python train_rag_bert.py                                simulated people (data/simulate_genotypes.py)
    python train_rag_bert.py PANEL=panel.vcf.gz MAP=map.gz OUT=out/mine
    python train_rag_bert.py IMPUTE=typed.vcf.gz PANEL=panel.vcf.gz MAP=map.gz OUT=out/mine
    python train_rag_bert.py IMPUTE=typed.vcf.gz CHECK=truth.vcf.gz ...                 scored, too
    python train_rag_bert.py IMPUTE=typed.vcf.gz CHECK=truth.vcf.gz VERSUS=beagle.vcf.gz ...   and compared
    python train_rag_bert.py PRESET=seed MODEL=bert         the documented older system
"""

import dataclasses
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import common
from data import prepare_genotypes, simulate_genotypes

# Data
PANEL = ""            # phased .vcf(.gz), .bcf, .vcf.h5; "" = data/genotypes, simulated if it is not there
DATA = ""             # people to train on, phased, the panel's variants; "" = the panel's own
SAMPLES = ""          # text: sample, population, ...; "" = one population
MAP = ""              # genetic map: position, chromosome, cM; "" = 1 cM a megabase
FREQ = ""             # Freq.npy (ref, het, hom, af × populations, all × sites); "" = counted in the panel
WINDOWS = ""          # CSV, first and one past the last site; "" = made of at most WINDOW_SITES
WINDOW_SITES = 1020   # sites the BERT reads at once
OVERLAP = 0.1         # share of a window that the next repeats
FOREIGN = 0.5         # share of people who, while training, copy from other populations than theirs only
VALID_SHARE = 0.1     # of the people, by a hash of their names; in training nobody copies from them

# Model. PRESET "seed": dim 128, 8 layers, 4 heads, K 3, "enhanced" fusion, clamped weights, focal loss of 5,
# Adam at 1e-5 warmed up over 20,000 updates
PRESET = ""           # "seed"
MODEL = "copy"        # "copy", "bert", "both"
RATES = (150.0, 600.0, 2500.0)   # switches a Morgan of the copying chains
ERROR = 0.01          # probability that a copied allele differs; the best of 3e-4 to 0.08 on panel people
COPY_DIM = 64         # width of the network that weighs the copies
DIM = 64              # width of the BERT
N_LAYERS = 4
N_HEADS = 4
K = 3                 # panel segments retrieved; 0 = none
FUSION = "enhanced"   # "enhanced", "aware", "concat"
WEIGHTING = "power"   # of rare variants in "enhanced"; "clamped": 1/MAF, at most 10
INDEX = "flat"        # exact FAISS index; "ivf": approximate, for large panels; "torch": without FAISS
CHUNK = 8             # segments encoded at once
RECOMPUTE = True      # gradient checkpointing of retrieved segments

# Optimization
STEPS = 800           # updates
BATCH = 24            # people per update, over all processes
MICRO_BATCH = 24      # people per forward and process
EXAMPLES = 1_000      # sites × haplotypes of each person that the copying head learns from in an update
ARRAY = (0.008, 0.10)  # share of sites that are typed, in array-like masks, drawn between these
LEVELS = (0.15, 0.30, 0.50, 0.60, 0.70, 0.80)  # share of the BERT's sites that is masked, growing
ADD_LEVEL = 2         # epochs at each level
GAMMA = 0.0           # of the focal loss (arXiv 1708.02002); above 0 probabilities are no longer calibrated
BRIER = 3.0           # weight of the squared error, which is what r² measures
GENOTYPE = 1.0        # weights of the BERT's genotype and reconstruction losses
RECONSTRUCTION = 0.1
OPTIMIZER = "adamw"   # "muon" for the hidden matrices, "adam"
LR = 3e-3             # peak of Adam and AdamW
MUON_LR = 0.01        # peak of Muon
WEIGHT_DECAY = 1e-3
WARMUP = 30           # updates
SCHEDULE = "cosine"
FLOOR = 0.0           # last learning rate as a fraction of the peak
CLIP = 1.0            # largest gradient norm; 0 = never clip
PATIENCE = 0          # validations without a better one before it stops; 0 = never
MAX_BAD_STEPS = 10    # updates in a row whose loss or gradient is not finite before it stops

# Run
SEED = 0
DTYPE = "float32"     # of the BERT; the copying chains are always float32
OUT = "out/genotypes"
RESUME = True         # go on with an unfinished run of the same command in OUT
LOG_EVERY = 10        # updates
EVAL_EVERY = 100      # updates; 0 = at the end only, -1 = each epoch
VALID_TYPED = 0.08    # share of sites typed in the validation's array
VALID_WINDOWS = 0     # windows of a validation, spread evenly; 0 = all
SAVE_EVERY = 100      # updates; 0 = at the end only
WANDB = "disabled"    # "offline", "online"
IMPUTE = ""           # typed people to impute with the best checkpoint in OUT, instead of training
CHECK = ""            # their truth, to score the result
VERSUS = ""           # another tool's result for them (DS, or GT), to compare with
RESAMPLED = 1_000     # times that people are drawn anew for the interval of a difference
CHAIN_SITES = 8_000   # typed sites of a copying chain; longer chromosomes are cut, overlapping by a tenth
MEMORY = 512          # MiB for the chains' states
PHASE_SWEEPS = 6      # sweeps over unphased genotypes

SPAN = 30             # sites that are hidden together, on average, in masks of stretches
MASKED = 2            # the token of a site whose allele is not known
BINS = (
    ("<0.5%", 0, 0.005),
    ("0.5-1%", 0.005, 0.01),
    ("1-5%", 0.01, 0.05),
    ("5-50%", 0.05, 0.51),
    ("all", 0, 0.51),
)


# Panel.

class Panel:
    """Variants × haplotypes, 0 = REF, with what is known of each site."""

    def __init__(self, run):
        path, samples, mapped = panel_files(run)
        self.file = found = prepare_genotypes.read_panel(path)
        self.alleles = torch.from_numpy(np.ascontiguousarray(found.haplotypes()))    # (V, S) int8
        if found.dropped:
            run.say(f"{path}: left out {prepare_genotypes.report(found.dropped)}")
        self.cm = prepare_genotypes.genetic(mapped, found.pos, found.chrom[0])
        self.names, number = prepare_genotypes.populations(samples, found.samples)
        self.population = torch.from_numpy(number)
        self.freq = read_freq(FREQ, len(self.names), len(found.pos)) if FREQ else None
        self.af = self.alleles.sum(1, dtype=torch.int64).numpy() / self.alleles.shape[1]
        self.maf = np.minimum(self.af, 1 - self.af)
        self.flip = torch.from_numpy(self.af > 0.5)
        self.windows = (prepare_genotypes.read_windows(WINDOWS, len(found.pos)) if WINDOWS else
                        prepare_genotypes.windows(self.cm, WINDOW_SITES, 0.0, OVERLAP))
        self.valid = np.array([hash_share(s) < VALID_SHARE for s in found.samples])
        known = (self.alleles.numpy(), found.pos, self.cm, number)
        self.print = hashlib.sha256(b"".join(x.tobytes() for x in known)).hexdigest()[:16]

    def __len__(self):
        return len(self.maf)

    def minor(self, rows, columns=slice(None)):
        """(rows, columns) bool: where the allele is the one that is rarer in the panel."""
        return self.alleles[rows][:, columns] != self.flip[rows, None]


def hash_share(text):
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def panel_files(run):
    """(panel, samples, map): the constants, or the default set, simulated where it is not there."""
    if PANEL:
        return PANEL, SAMPLES, MAP
    folder = Path(__file__).parent / "data" / "genotypes"
    if not (folder / "panel.vcf.gz").exists():
        run.say(
            f"PANEL is empty and {folder} holds none: simulating people; for your own: PANEL=panel.vcf.gz"
        )
        if run.first:
            simulate_genotypes.make(folder)
        run.wait(patiently=True)
    return folder / "panel.vcf.gz", SAMPLES or folder / "samples.panel", MAP or folder / "map.gz"


def read_freq(path, n_populations, n_sites):
    """Float32 (4, populations + 1, sites) from an .npy file without pickles."""
    if not Path(path).is_file():
        raise common.BadInput(f"no FREQ at {path}; python data/prepare_genotypes.py makes it")
    try:
        freq = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise common.BadInput(f"FREQ {path} cannot be read: {error}") from None
    if freq.shape != (4, n_populations + 1, n_sites):
        raise common.BadInput(
            f"FREQ {path} is {freq.shape}, not ref, het, hom, af × {n_populations} populations "
            f"and all × {n_sites} sites = {(4, n_populations + 1, n_sites)}"
        )
    if not np.isfinite(freq).all() or freq.min() < 0 or freq.max() > 1:
        raise common.BadInput(f"FREQ {path} holds values outside 0 to 1")
    return freq.astype(np.float32)


# Masks: which sites are typed.

def array_mask(rng, maf, share):
    """Array-like: sites drawn in proportion to a power of their frequency, those above a threshold only."""
    open_ = maf >= rng.choice([0.0, 0.01, 0.02, 0.05])
    weight = (np.minimum(maf, 0.2) + 1e-9) ** rng.uniform(0, 1) * open_
    if (weight > 0).sum() < 2:
        weight = np.ones(len(maf))
    n = min(max(2, int(share * len(maf))), int((weight > 0).sum()))
    typed = np.zeros(len(maf), bool)
    typed[rng.choice(len(maf), n, replace=False, p=weight / weight.sum())] = True
    return typed


def draw_mask(rng, maf, rate, kinds=("random", "span", "array")):
    """Typed sites (V,) bool, about 1 - rate of them; "random" hides rare ones sooner, "span" stretches of
    SPAN sites on average."""
    kind = kinds[rng.integers(len(kinds))]
    if kind == "array":
        return array_mask(rng, maf, 1 - rate)
    if kind == "random":
        weight = 1.25 - maf
        typed = rng.random(len(maf)) >= rate * weight / weight.mean()
        typed[rng.integers(len(maf))] |= not typed.any()
        return typed
    typed, hidden = np.ones(len(maf), bool), 0
    while hidden < rate * len(maf):
        first = rng.integers(len(maf))
        stretch = typed[first:first + rng.geometric(1 / SPAN)]
        hidden += stretch.sum()
        stretch[:] = False
    typed[0] |= not typed.any()
    return typed


# The copying chains.

def copy_twin(query, reference, distance, rate, error, keep=None):
    """The slow twin: posterior (M, Q, S) that haplotype s is copied at typed site m, by matrices (S, S).

    query (M, Q) and reference (M, S) alleles, -1 unknown; distance (M,) Morgan to the site before; keep (Q,
    S)."""
    M, Q = query.shape
    S = reference.shape[1]
    keep = torch.ones(Q, S, dtype=torch.bool) if keep is None else keep
    out = torch.zeros(M, Q, S, dtype=torch.float64)
    for q in range(Q):
        start = keep[q].double() / keep[q].sum()
        right = [(torch.where(query[m, q] == reference[m], 1 - error, error) if query[m, q] >= 0 else
                  torch.ones(S)).double() for m in range(M)]
        move = [math.exp(-rate * distance[m]) * torch.eye(S, dtype=torch.float64)
                + (1 - math.exp(-rate * distance[m])) * start.expand(S, S) for m in range(M)]
        ahead, back = [start * right[0]], [torch.ones(S, dtype=torch.float64)]
        for m in range(1, M):
            ahead.append(ahead[-1] @ move[m] * right[m])
            back.append(move[M - m] @ (right[M - m] * back[-1]))
        for m in range(M):
            both = ahead[m] * back[M - 1 - m]
            out[m, q] = both / both.sum()
    return out


def copy_posteriors(query, reference, distance, rates, error, keep=None):
    """Yield (m, posterior (R, Q, S)) from the last typed site to the first; O(M R Q S) time and memory.

    As `copy_twin`, for R rates at once: a switch leads to any haplotype alike, so that a step costs S, not S²
    (Li and Stephens 2003, appendix). What is yielded is overwritten by the next."""
    M, Q = query.shape
    S = reference.shape[1]
    stay = torch.exp(-torch.tensor(rates)[:, None] * distance).float()[..., None, None]      # (R, M, 1, 1)
    start = torch.full((Q, S), 1 / S) if keep is None else keep / keep.sum(1, keepdim=True)
    state, ahead = start.expand(len(rates), Q, S).clone(), torch.empty(M, len(rates), Q, S)
    same, differs = torch.tensor(1 - error), torch.tensor(error)
    for m in range(M):
        state.mul_(stay[:, m]).add_((1 - stay[:, m]) * start)
        state.mul_(torch.where(query[m][:, None] == reference[m], same, differs))
        state.div_(state.sum(2, keepdim=True))
        ahead[m] = state
    back = torch.ones(len(rates), Q, S)
    for m in range(M - 1, -1, -1):
        now = ahead[m].mul_(back)
        yield m, now.div_(now.sum(2, keepdim=True))
        back.mul_(torch.where(query[m][:, None] == reference[m], same, differs))
        back.div_((back * start).sum(2, keepdim=True))
        back.mul_(stay[:, m]).add_(1 - stay[:, m])
        if keep is not None:
            back.mul_(keep)                      # a haplotype that may not be copied would outgrow the rest


@dataclasses.dataclass
class Copied:
    """What chains of R rates say of Q haplotypes at some sites: the probability of the minor allele `x` (R,
    V, Q), from the typed sites before and after alone `before`, `after` (V, Q), from the haplotypes most
    copied anywhere `alike` (V, Q); how sharp the posteriors are at typed sites, `sharp` (R, M, Q); the typed
    sites on both sides and the distances to them (V,); minor alleles among the others, `count` (V, Q) of
    `total` (Q,)."""

    x: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    alike: torch.Tensor
    sharp: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    gaps: torch.Tensor
    count: torch.Tensor
    total: torch.Tensor

    def features(self, v, q):
        """(E, 3R + 9) for sites v and haplotypes q (E,); the first R are log odds."""
        x, count, total = self.x[:, v, q], self.count[v, q], self.total[q]
        frequency = (count + 0.5) / (total + 1)
        middle = x[len(x) // 2]
        columns = [
            *log_odds(x),
            log_odds(self.before[v, q]),
            log_odds(self.after[v, q]),
            log_odds(self.alike[v, q]),
            torch.log(count + 0.5),
            torch.log(frequency / (1 - frequency)),
            *torch.log(self.sharp[:, self.left[v], q]),
            *torch.log(self.sharp[:, self.right[v], q]),
            torch.log(self.gaps[0, v] + 1e-4),
            torch.log(self.gaps[1, v] + 1e-4),
            torch.log(middle / frequency + 1e-3),
            torch.log(x.amax(0) + 1e-4) - torch.log(x.amin(0) + 1e-4),
        ]
        return torch.stack(columns, -1)


def log_odds(p, least=2e-4):
    """log p/(1-p), p held between `least` and 1 - least."""
    p = p.clamp(least, 1 - least)
    return torch.log(p) - torch.log1p(-p)


def copied(query, typed, reference, minor, cm, sites, rates, error, keep=None):
    """Copied for haplotypes query (M, Q), -1 unknown, known at rows `typed` (M,) of a panel whose alleles
    there are reference (M, S), at rows `sites` (V,), where its minor alleles are minor (V, S) bool. `keep`
    (Q, S) says whom each may copy. cm: genetic positions of all rows."""
    M, Q = query.shape
    V, R = len(sites), len(rates)
    at = torch.from_numpy(np.ascontiguousarray(cm[typed]))
    distance = torch.diff(at, prepend=at[:1]).clamp(min=1e-7) / 100
    place = np.searchsorted(typed, sites, side="right") - 1
    left, right = np.maximum(place, 0), np.minimum(place + 1, M - 1)
    here = torch.from_numpy(np.ascontiguousarray(cm[sites]))
    gaps = torch.stack([(here - at[left]).abs(), (at[right] - here).abs()])
    share = torch.where(gaps.sum(0) > 0, gaps[0] / gaps.sum(0).clamp(min=1e-12), 0.5).float()
    edges = np.searchsorted(place, np.arange(-1, M + 1))  # sites of interval m: edges[m + 1] .. edges[m + 2]
    x, before, after = torch.empty(R, V, Q), torch.empty(V, Q), torch.empty(V, Q)
    sharp, whole = torch.empty(R, M, Q), torch.zeros(Q, minor.shape[1])
    later = None
    for m, now in copy_posteriors(query, reference, distance, rates, error, keep):
        sharp[:, m] = now.square().sum(2)
        whole += now[R // 2]
        for first, end, ahead in (
            (edges[m + 1], edges[m + 2], later),
            *([(0, edges[1], now)] if m == 0 else []),
        ):
            if first == end:
                continue
            pair = torch.cat([now, now if ahead is None else ahead]).flatten(0, 1)
            found = (minor[first:end].float() @ pair.T).view(end - first, 2, R, Q)
            w = share[first:end, None, None]
            x[:, first:end] = torch.lerp(found[:, 0], found[:, 1], w).transpose(0, 1)
            before[first:end], after[first:end] = found[:, 0, R // 2], found[:, 1, R // 2]
        later = now.clone()
    count = minor.sum(1, keepdim=True).float().expand(V, Q) if keep is None else weighted_count(minor, keep)
    total = torch.full((Q,), float(minor.shape[1])) if keep is None else keep.sum(1)
    return Copied(
        x,
        before,
        after,
        weighted_count(minor, whole / M),
        sharp,
        torch.from_numpy(left),
        torch.from_numpy(right),
        gaps.float(),
        count,
        total,
    )


def weighted_count(minor, weight, block=4096):
    """Minor alleles (V, S) bool counted with weights (Q, S): (V, Q); no float copy of all of them is made."""
    return torch.cat([minor[i:i + block].float() @ weight.T for i in range(0, len(minor), block)])


class CopyHead(nn.Module):
    """Log odds of the minor allele from Copied.features: the chains' mean, and what a network adds."""

    def __init__(self, n_rates, dim):
        super().__init__()
        n = 3 * n_rates + 9
        self.n_rates = n_rates
        self.mean, self.scale = nn.Buffer(torch.zeros(n)), nn.Buffer(torch.ones(n))
        self.net = nn.Sequential(
            nn.Linear(n, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, features):
        more = self.net((features - self.mean) / self.scale)[..., 0]
        return features[..., :self.n_rates].mean(-1) + more


# Retrieval.

class Retriever:
    """Panel segments of each window nearest to a haplotype on its typed sites: L2 between alleles written ±1,
    0 where unknown, which is four times the number of differing sites, plus a constant. Equal ones in panel
    order.

    kind: "flat" and "ivf" by FAISS, "torch" without; an index is built when its window is first asked for,
    and kept in `folder` under a fingerprint of the panel, the window and the kind."""

    def __init__(self, panel, columns, kind, folder=None, n_probe=8):
        self.panel, self.columns, self.kind, self.n_probe, self.built = panel, columns, kind, n_probe, {}
        self.folder = Path(folder) if folder else None
        key = f"{panel.print} {kind} {hashlib.sha256(np.asarray(columns).tobytes()).hexdigest()}"
        self.print = hashlib.sha256(key.encode()).hexdigest()[:16]
        if kind != "torch":
            common.needs("faiss", "for INDEX flat or ivf; INDEX=torch does without")

    def vectors(self, first, end):
        """(S, sites + 1): the last column orders equals, by at most 3.9, less than one site's difference of
        4."""
        part = self.panel.alleles[first:end][:, self.columns].T.float() * 2 - 1
        order = torch.arange(len(part)).float() * (3.9 / len(part))
        return torch.cat([part, order.sqrt()[:, None]], 1)

    def index(self, first, end):
        """The window's index: built, or read."""
        if (first, end) in self.built:
            return self.built[first, end]
        vectors = self.vectors(first, end)
        if self.kind == "torch":
            found = vectors
        else:
            import faiss
            path = self.folder / f"{self.print}-{first}-{end}.faiss" if self.folder else None
            found = None
            if path and path.exists():
                try:
                    found = faiss.read_index(str(path))
                except RuntimeError:                                         # cut short: made again
                    path.unlink()
            if found is None:
                flat = faiss.IndexFlatL2(vectors.shape[1])
                found = flat if self.kind == "flat" else faiss.IndexIVFFlat(
                    flat, vectors.shape[1], max(1, int(math.sqrt(len(vectors)))))
                found.train(vectors.numpy())
                found.add(vectors.numpy())
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    unfinished = f"{path}.{time.time_ns()}.tmp"
                    faiss.write_index(found, unfinished)
                    Path(unfinished).replace(path)
            if self.kind == "ivf":
                found.nprobe = self.n_probe
        self.built[first, end] = found
        return found

    def nearest(self, tokens, window, k, banned=None):
        """(Q, k) columns of the panel nearest to tokens (Q, sites), MASKED = unknown; banned (Q, 2) columns
        are left out."""
        first, end = window
        query = torch.where(tokens == MASKED, 0.0, tokens.float() * 2 - 1)
        query = torch.cat([query, torch.zeros(len(query), 1)], 1)
        n = len(self.columns)
        spare = 0 if banned is None else banned.shape[1]
        if n < k + spare:
            raise common.BadInput(f"K {k} is more than the {n - spare} haplotypes there are to retrieve")
        wanted = k + spare
        index = self.index(int(first), int(end))
        def search():
            if self.kind == "torch":
                distance = torch.cdist(query.double(), index.double()).square()
                return distance.topk(wanted, largest=False, sorted=True).indices
            return torch.from_numpy(index.search(query.numpy(), wanted)[1])

        found = search()
        if self.kind == "ivf" and (found < 0).any():                 # its cells held fewer: look into all
            index.nprobe = index.nlist
            found = search()
            index.nprobe = self.n_probe
        names = torch.as_tensor(self.columns)[found]
        if banned is not None:
            own = (names[:, :, None] == banned[:, None]).any(2)
            order = own.int().argsort(dim=1, stable=True)
            names = names.gather(1, order)[:, :k]
            assert not (names[:, :, None] == banned[:, None]).any(), "retrieved for its own person"
        return names[:, :k]


# The BERT.

class Block(nn.Module):
    """Pre-norm transformer layer, every site seeing every site."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList([common.RMSNorm(dim), common.RMSNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = common.SwiGLU(dim, 8 * dim // 3 // 16 * 16 or 16)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(B, T, 3, self.n_heads, -1).unbind(2)
        q, k = common.rotate(q, cos, sin), common.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norms[1](x))


class Imputer(nn.Module):
    """The copying head, the BERT with retrieval and fusion, or their mixture: log odds of alleles.

    The BERT's heads begin with zero; what they say is added to the copying head's log odds, or, alone, to
    those of the panel's frequency."""

    def __init__(
        self,
        model,
        rates,
        error,
        copy_dim,
        dim,
        n_layers,
        n_heads,
        k,
        fusion,
        weighting,
        window_sites,
        chunk=64,
        recompute=True,
    ):
        super().__init__()
        self.sizes = dict(
            model=model,
            rates=rates,
            error=error,
            copy_dim=copy_dim,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            k=k,
            fusion=fusion,
            weighting=weighting,
            window_sites=window_sites,
            chunk=chunk,
            recompute=recompute,
        )
        self.kind, self.rates, self.error, self.k = model, rates, error, k
        self.chunk, self.recompute, self.layers = chunk, recompute, nn.ModuleList()
        if model != "bert":
            self.copy = CopyHead(len(rates), copy_dim)
        if model != "copy":
            self.alleles, self.numbers = nn.Embedding(3, dim), nn.Linear(7, dim)
            self.layers = nn.ModuleList(Block(dim, n_heads) for _ in range(n_layers))
            self.norm = common.RMSNorm(dim)
            self.fusion = (
                {
                    "concat": common.ConcatFusion,
                    "aware": common.RareVariantAwareFusion,
                    "enhanced": lambda d: common.EnhancedRareVariantFusion(d, weighting),
                }[fusion](dim)
                if k
                else None
            )
            self.haplotype = nn.ModuleList(nn.Linear(dim, 1) for _ in range(2))
            self.genotype, self.rebuild = nn.Linear(dim, 3), nn.Linear(dim, 1)
            for head in (*self.haplotype, self.genotype):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
            cos, sin = common.rope_table(dim // n_heads, window_sites, theta=1e4)
            self.cos, self.sin = (nn.Buffer(x[None], persistent=False) for x in (cos, sin))

    def encode(self, tokens, numbers):
        """(N, T, D) of tokens (N, T) and what is known of the sites, numbers (N, T, 7)."""
        x = self.alleles(tokens) + self.numbers(numbers)
        for block in self.layers:
            x = block(x, self.cos[:, : tokens.shape[1]], self.sin[:, : tokens.shape[1]])
        return self.norm(x)

    def encode_many(self, tokens, numbers):
        """`encode` a chunk at a time, recomputed in the backward pass."""
        parts = []
        for i in range(0, len(tokens), self.chunk):
            part = tokens[i:i + self.chunk], numbers[i:i + self.chunk]
            parts.append(checkpoint(self.encode, *part, use_reentrant=False)
                         if self.recompute and torch.is_grad_enabled() else self.encode(*part))
        return torch.cat(parts)

    def forward(self, features=None, tokens=None, numbers=None, frequency=None, references=None, flip=None,
                prior=None):
        """features (..., F) alone → log odds of the minor allele (...,). flip (T,): where that is REF. tokens
        (B, 2, T), numbers (B, T, 7), frequency (B, T, 2), references (B, 2, K, T) → a dict: `haplotype` (B,
        2, T) log odds of ALT, `genotype` (B, T, 3) logits, `rebuilt` (B, 2, T). The copying head's word is
        made from features, or is given: prior (B, 2, T), log odds of ALT."""
        if tokens is None:
            return self.copy(features)
        B, _, T = tokens.shape
        twice = numbers.repeat_interleave(2, 0)
        x = self.encode(tokens.flatten(0, 1), twice)
        if self.fusion is not None:
            read = self.encode_many(references.reshape(-1, T), twice.repeat_interleave(self.k, 0))
            x = self.fusion(x, read.view(2 * B, self.k, T, -1), frequency.repeat_interleave(2, 0).to(x.dtype))
        x = x.view(B, 2, T, -1)
        logits = torch.stack([head(x[:, i])[..., 0] for i, head in enumerate(self.haplotype)], 1).float()
        if features is not None:
            copy = self.copy(features)
            prior = torch.where(flip, -copy, copy)
        elif prior is None:
            prior = log_odds(frequency[..., 0], 1e-3)[:, None]
        logits = logits + prior
        p = frequency[..., :1].clamp(1e-3, 1 - 1e-3)
        expected = torch.cat([(1 - p) ** 2, 2 * p * (1 - p), p**2], -1).log()
        return {"haplotype": logits, "genotype": self.genotype(x.sum(1)).float() + expected,
                "rebuilt": torch.sigmoid(self.rebuild(x)[..., 0].float())}


def focal(logits, target, gamma):
    """-(1 - p)^gamma log p of the target, elementwise; gamma 0 is the cross-entropy (arXiv 1708.02002)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss * (-torch.expm1(-loss)).clamp(min=1e-12) ** gamma if gamma else loss


def focal_classes(logits, target, gamma):
    """The same over classes: logits (..., C), target (...,)."""
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return loss * (-torch.expm1(-loss)).clamp(min=1e-12) ** gamma if gamma else loss


# Examples.

class Examples:
    """Haplotypes of people to learn from or to impute, and all that a model is told of them at some typed
    sites.

    alleles (V, 2N) int8; donors: columns of the panel that may be copied; own (N, 2): each person's columns
    there, -1 where he has none; population (N,)."""

    def __init__(self, panel, alleles, donors, own, population, retriever=None):
        self.panel, self.alleles, self.donors, self.own = panel, alleles, torch.as_tensor(donors), own
        self.population, self.retriever, self.counts = population, retriever, None

    def keep(self, people, foreign=None):
        """(2·people, donors) float: whom each haplotype may copy, None if anybody: not himself; for those of
        `foreign` (people,), nobody of their population."""
        own = self.own[people].repeat_interleave(2, 0)
        if (own < 0).all() and (foreign is None or not foreign.any()):
            return None
        keep = (self.donors[None, :, None] != own[:, None]).all(2)
        if not keep.any(1).all():
            raise common.BadInput("the panel holds nobody but the person himself to copy from; give a larger "
                                  "one")
        if foreign is not None:
            theirs = self.panel.population[self.donors // 2] != self.population[people][:, None]
            foreign = foreign & (theirs.sum(1) > 1)
            keep &= (theirs | ~foreign[:, None]).repeat_interleave(2, 0)
        return keep.float()

    def haplotypes(self, people):
        """Their columns of `alleles`."""
        return (2 * torch.as_tensor(people)[:, None] + torch.arange(2)).flatten()

    def copy(self, people, typed, sites, rates, error, foreign=None):
        """Copied of the people's haplotypes at rows `sites`, by what they have at rows `typed`."""
        panel, columns = self.panel, self.haplotypes(people)
        return copied(
            self.alleles[typed][:, columns],
            typed,
            panel.alleles[typed][:, self.donors],
            panel.minor(sites, self.donors),
            panel.cm,
            sites,
            rates,
            error,
            self.keep(people, foreign),
        )

    def frequencies(self, people, rows):
        """(4, 2, B, T): ref, het, hom and ALT frequency of everybody and of each one's population, among the
        donors without himself; a population without others takes those of everybody. As FREQ has them, if
        that is given."""
        panel, everybody = self.panel, len(self.panel.names)
        own, of = self.own[people], self.population[people]
        if panel.freq is not None:
            freq = torch.from_numpy(panel.freq[:, :, rows])
            return torch.stack([freq[:, -1:].expand(-1, len(people), -1), freq[:, of]], 1)
        if self.counts is None:                                              # (3, populations + 1, V)
            donors = torch.unique(self.donors // 2)
            group = panel.population[donors] == torch.arange(everybody + 1)[:, None]
            group[-1] = True
            dose = panel.alleles.view(len(panel), -1, 2)[:, donors].sum(2)
            self.counts = torch.stack([group.float() @ (dose == g).float().T for g in range(3)])
            self.sizes = group.sum(1).float()
        which = torch.stack([torch.full_like(of, everybody), of])            # (2, B)
        himself = torch.isin(own, self.donors).all(1).float()
        dose = panel.alleles[rows][:, own.clamp(min=0)].sum(2).T             # (B, T)
        mine = torch.stack([(dose == g).float() * himself[:, None] for g in range(3)])
        size = (self.sizes[which] - himself)[..., None]
        share = (self.counts[:, :, rows][:, which] - mine[:, None]) / size.clamp(min=1)
        share = torch.where(size > 0, share, share[:, :1])
        return torch.cat([share, share[1:2] / 2 + share[2:]])

    def window(self, people, typed, window, k):
        """The BERT's input for people in a window; typed (V,) bool."""
        first, end = window
        rows, panel = slice(first, end), self.panel
        columns = self.haplotypes(people)
        alleles = self.alleles[rows][:, columns].T.long()
        tokens = torch.where((alleles >= 0) & torch.from_numpy(typed[rows]), alleles, MASKED)
        freq = self.frequencies(people, rows)
        everybody, mine = freq[3]                                            # (B, T)
        cm = torch.from_numpy(panel.cm[rows]).float()
        place = ((cm - cm[0]) / max(float(cm[-1] - cm[0]), 1e-9)).expand(len(people), -1)
        known = torch.from_numpy(typed[rows]).float().expand(len(people), -1)
        numbers = torch.stack(
            [place, known, everybody, mine, *freq[:3, 0]], 2
        )
        made = dict(tokens=tokens.view(len(people), 2, -1), numbers=numbers,
                    frequency=torch.stack([everybody, mine], 2))
        if k:
            own = self.own[people].repeat_interleave(2, 0)
            names = self.retriever.nearest(tokens, window, k, None if (own < 0).all() else own)
            part = panel.alleles[rows].T[names].long()                       # (2B, K, T): all sites known
            made["references"] = part.view(len(people), 2, k, -1)
        return made


def copy_window(copies):
    """The copying head's features (B, 2, T, F) at all of the T sites of the copies of B people."""
    T, Q = copies.alike.shape
    v, q = torch.meshgrid(torch.arange(T), torch.arange(Q), indexing="ij")
    return copies.features(v.flatten(), q.flatten()).view(T, Q, -1).transpose(0, 1).unflatten(0, (-1, 2))


def towards_alt(logits, flip):
    """Log odds of the minor allele (V, ...) made those of ALT, and back."""
    return torch.where(flip.view(-1, *[1] * (logits.ndim - 1)), -logits, logits)


@torch.no_grad()
def copied_parts(model, examples, typed, rows, progress=None, foreign=False):
    """Yield (sites, probability of ALT (len(sites), 2N), weight (len(sites), 1)) of each piece of the copying
    chains, which overlap; of the sites in `rows`."""
    panel, n = examples.panel, examples.alleles.shape[1] // 2
    for part, sites, weight in chains(panel, typed, rows):
        out = torch.empty(len(sites), 2 * n)
        states = len(part) * len(model.rates) * len(examples.donors) * 4 * 2
        size = max(1, int(MEMORY * 2**20 / max(states, 1)))
        for i in range(0, n, size):
            people = torch.arange(i, min(i + size, n))
            strangers = torch.ones(len(people), dtype=torch.bool) if foreign else None
            copies = examples.copy(people, part, sites, model.rates, model.error, strangers)
            logits = towards_alt(apply_copy(model, copies), panel.flip[sites])
            out[:, examples.haplotypes(people)] = torch.sigmoid(logits)
            if progress:
                progress(len(people) * len(sites))
        yield sites, out, torch.from_numpy(weight).float()[:, None]


@torch.no_grad()
def window_parts(run, model, examples, typed, windows, progress=None):
    """The same of the BERT's windows; with a copying head, added to what that says."""
    n, copies = examples.alleles.shape[1] // 2, None
    if model.kind == "both":
        copies = Rolling(blend(copied_parts(model, examples, typed, rows_of(windows))))
    for first, end in windows:
        rows, out = np.arange(first, end), torch.empty(end - first, 2 * n)
        said = log_odds(copies.rows(rows), 1e-6) if copies else None
        ramp = torch.minimum(torch.arange(1, end - first + 1), torch.arange(end - first, 0, -1)).float()
        for i in range(0, n, MICRO_BATCH):
            people = torch.arange(i, min(i + MICRO_BATCH, n))
            columns = examples.haplotypes(people)
            made = examples.window(people, typed, (first, end), model.k)
            if copies:
                made["prior"] = said[:, columns].T.unflatten(0, (-1, 2))
            with run.autocast():
                found = model(**{k: v.to(run.device) for k, v in made.items()})
            out[:, columns] = torch.sigmoid(found["haplotype"]).flatten(0, 1).T.cpu()
            if progress:
                progress(len(people) * len(rows))
        yield rows, out, ramp[:, None]


def rows_of(windows):
    """Every row in the windows, once, ascending."""
    return np.unique(np.concatenate([np.arange(a, b) for a, b in windows]))


def blend(parts):
    """Join overlapping (sites, values (len(sites), C), weight (len(sites), 1)), ascending by their first
    sites, into their weighted means: yields (sites, values), each site once, as soon as no part can change
    it."""
    held, total, weight = np.empty(0, int), None, None
    for sites, values, w in parts:
        old = int(np.searchsorted(held, sites[0]))
        if old:
            yield held[:old], total[:old] / weight[:old]
        both = np.union1d(held[old:], sites)
        new_total, new_weight = torch.zeros(len(both), values.shape[1]), torch.zeros(len(both), 1)
        if old < len(held):
            at = np.searchsorted(both, held[old:])
            new_total[at], new_weight[at] = total[old:], weight[old:]
        at = np.searchsorted(both, sites)
        new_total[at] += values * w
        new_weight[at] += w
        held, total, weight = both, new_total, new_weight
    if len(held):
        yield held, total / weight


class Rolling:
    """The rows of consecutive blocks (sites, values) that a window needs, as it moves on."""

    def __init__(self, blocks):
        self.blocks, self.held, self.values = blocks, np.empty(0, int), None

    def rows(self, wanted):
        """(len(wanted), C); what is before wanted[0] is forgotten."""
        old = int(np.searchsorted(self.held, wanted[0]))
        held, values = [self.held[old:]], [] if self.values is None else [self.values[old:]]
        while not len(held[-1]) or held[-1][-1] < wanted[-1]:
            sites, more = next(self.blocks)
            held.append(sites)
            values.append(more)
        self.held, self.values = np.concatenate(held), torch.cat(values)
        return self.values[np.searchsorted(self.held, wanted)]


def dosage_parts(run, model, examples, typed, windows=None, progress=None, foreign=False):
    """Yield (sites, float32 (len(sites), 2N): probability of ALT of each haplotype), ascending, each site
    once; typed (V,) bool. In the `windows` only, if they are given."""
    if model.kind == "copy":
        rows = np.arange(len(examples.panel)) if windows is None else rows_of(windows)
        return blend(copied_parts(model, examples, typed, rows, progress, foreign))
    windows = examples.panel.windows if windows is None else windows
    return blend(window_parts(run, model, examples, typed, windows, progress))


def dosages(run, model, examples, typed, windows=None, foreign=False):
    """The same in one piece (V, 2N); NaN outside `windows`."""
    out = torch.full((len(examples.panel), examples.alleles.shape[1]), math.nan)
    for sites, values in dosage_parts(run, model, examples, typed, windows, foreign=foreign):
        out[sites] = values
    return out


def apply_copy(model, copies, block=1 << 18):
    """Log odds (V, Q) of the copying head; where all chains are sure that it is absent, their own word."""
    V, Q = copies.alike.shape
    out = log_odds(copies.x).mean(0)
    sure = (copies.x.amax(0) < 5e-4) | (copies.count == 0)
    v, q = (~sure).nonzero(as_tuple=True)
    device = model.copy.mean.device
    for i in range(0, len(v), block):
        part = v[i:i + block], q[i:i + block]
        out[part] = model(features=copies.features(*part).to(device)).cpu()
    return out.masked_fill_(copies.count == 0, -20.0)


def chains(panel, typed, rows):
    """Pieces of at most CHAIN_SITES typed sites, overlapping by a tenth: (typed rows, those of `rows` that
    they tell of, the pieces' weights there), which sum to one."""
    where = np.flatnonzero(typed)
    if len(where) < 1:
        raise common.BadInput("no typed site to impute from")
    pieces = prepare_genotypes.windows(panel.cm[where], CHAIN_SITES, 0.0, 0.1)

    def rise(sites, i):
        """How much of the sites where pieces i - 1 and i meet is the latter's."""
        last = where[pieces[i - 1][1] - 1]
        a, b = panel.cm[where[pieces[i][0]]], panel.cm[last]
        return np.where(sites > last, 1.0, np.clip((panel.cm[sites] - a) / max(b - a, 1e-9), 0, 1))

    for i, (a, b) in enumerate(pieces):
        first = 0 if a == 0 else where[a]
        end = len(panel) if b == len(where) else where[b - 1] + 1
        sites = rows[(rows >= first) & (rows < end)]
        weight = rise(sites, i) if i else np.ones(len(sites))
        if i + 1 < len(pieces):
            weight = np.minimum(weight, 1 - rise(sites, i + 1))
        if len(sites):
            yield where[a:b], sites, weight


# Phasing of unphased typed people.

def phase(gt, loose, reference, distance, rate, error, sweeps):
    """Haplotypes (M, N, 2) of genotypes whose heterozygotes `loose` (M, N) are in unknown order: against the
    panel, a first pass orders each by what came before, then sweeps swap what follows a site where that is
    likelier. Other calls keep their sides."""
    M, N, _ = gt.shape
    S = reference.shape[1]
    gt = gt.clone()
    loose = loose & (gt[..., 0] != gt[..., 1]) & (gt >= 0).all(2)
    fixed = ~loose & (gt[..., 0] != gt[..., 1])
    stay = torch.exp(-rate * distance).float()

    def weight(m, alleles):
        right = torch.where(alleles[..., None] == reference[m], 1 - error, error)
        return torch.where(alleles[..., None] < 0, 1.0, right)

    for sweep in range(sweeps):
        state, ahead = torch.full((N, 2, S), 1 / S), torch.empty(M, N, 2, S)
        for m in range(M):
            state = state * stay[m] + (1 - stay[m]) / S
            if sweep == 0 and loose[m].any():
                one = (state * (reference[m] == 1)).sum(2)
                first = (one[:, 0] >= one[:, 1]).to(gt.dtype)
                ordered = torch.stack([first, 1 - first], 1)
                gt[m] = torch.where(loose[m][:, None], ordered, gt[m])
            state = state * weight(m, gt[m])
            state = state / state.sum(2, keepdim=True)
            ahead[m] = state
        back, swapped = torch.ones(N, 2, S), torch.zeros(N, dtype=torch.bool)
        for m in range(M - 1, -1, -1):
            before = torch.where(swapped[:, None, None], ahead[m].flip(1), ahead[m])
            straight = torch.log((before * back).sum(2)).sum(1)
            crossed = torch.log((before * back.flip(1)).sum(2)).sum(1)
            swapped ^= crossed > straight + 1e-4             # all up to m changes sides
            swapped &= ~fixed[m]                             # up to what is phased already
            gt[m] = torch.where(swapped[:, None], gt[m].flip(1), gt[m])
            back = back * weight(m, gt[m])
            back = back / back.mean(2, keepdim=True)
            back = back * stay[m] + (1 - stay[m])
    return gt


# Training.

def preset():
    """The constants of PRESET, but for those that the command line gives."""
    if PRESET == "seed":
        old = dict(
            MODEL="bert",
            DIM=128,
            N_LAYERS=8,
            N_HEADS=4,
            K=3,
            FUSION="enhanced",
            WEIGHTING="clamped",
            GAMMA=5.0,
            BRIER=0.0,
            OPTIMIZER="adam",
            LR=1e-5,
            WARMUP=20_000,
            WEIGHT_DECAY=0.01,
            CLIP=0.0,
            EVAL_EVERY=-1,
        )
        return {k: v for k, v in old.items() if k not in globals().get("_given", ())}
    return {}


def make_model():
    return Imputer(MODEL, tuple(float(r) for r in RATES), ERROR, COPY_DIM, DIM, N_LAYERS, N_HEADS,
                   0 if MODEL == "copy" else K, FUSION, WEIGHTING, WINDOW_SITES, CHUNK, RECOMPUTE)


def build(found):
    """The model of a checkpoint."""
    if found["kind"] != "Imputer":
        raise common.BadInput(f"the checkpoint holds a {found['kind']}; this works on Imputer")
    model = Imputer(**found["sizes"])
    model.load_state_dict(found["model"])
    return model


def people_of(run, panel):
    """(alleles (V, 2N), own columns (N, 2), population (N,), validation (N,)) of the people to learn from."""
    if not DATA:
        own = torch.arange(panel.alleles.shape[1]).view(-1, 2)
        return panel.alleles, own, panel.population, panel.valid
    data = prepare_genotypes.read(DATA)
    rows, data, what = prepare_genotypes.match(data, panel.file)
    if what:
        run.say(f"DATA {DATA}: {prepare_genotypes.report(what)}")
    if (~data.phased & (data.gt[..., 0] != data.gt[..., 1])).any():
        raise common.BadInput(f"DATA {DATA} is not phased; phase it first (Beagle, SHAPEIT)")
    alleles = torch.full((len(panel), 2 * len(data.samples)), -1, dtype=torch.int8)
    alleles[rows] = torch.from_numpy(data.haplotypes())
    where = {s: i for i, s in enumerate(panel.file.samples)}
    own = torch.tensor([[2 * where[s], 2 * where[s] + 1] if s in where else [-1, -1] for s in data.samples])
    population = torch.full((len(data.samples),), len(panel.names))          # of none in the panel
    if SAMPLES:
        names, number = prepare_genotypes.populations(SAMPLES, data.samples)
        place = [panel.names.index(name) if name in panel.names else len(panel.names) for name in names]
        population = torch.tensor(place)[number]
    return alleles, own, population, np.array([hash_share(s) < VALID_SHARE for s in data.samples])


def accuracy(probability, truth, panel, typed):
    """Metrics of haplotype probabilities of ALT (V, 2N) against genotypes truth (V, N), -1 unknown, at
    untyped sites that vary in the panel: by bin of panel MAF dosage r² (pooled), precision, recall and F1 of
    carriers of the minor allele, the number of sites; and `calibration`: mean distance, over tenths of
    probability weighted by their size, between what was said and what was true."""
    dose, count = minor_doses(probability.view(len(probability), -1, 2).sum(2), truth, panel)
    usable = torch.from_numpy(~typed & (panel.maf > 0)) & ~dose.isnan().any(1)
    found = {}
    for name, low, high in BINS:
        rows = usable & torch.from_numpy((panel.maf >= low) & (panel.maf < high))
        d, c = dose[rows].double(), count[rows]
        known = c >= 0
        d, c = d[known], c[known].double()
        guess, carrier = d >= 0.5, c >= 1
        hit = float((guess & carrier).sum())
        precision, recall = hit / max(float(guess.sum()), 1), hit / max(float(carrier.sum()), 1)
        found[name] = {
            "sites": int(rows.sum()),
            "r2": float(torch.corrcoef(torch.stack([d, c]))[0, 1] ** 2)
            if len(d) > 1 and d.std() and c.std()
            else 0.0,
            "precision": precision,
            "recall": recall,
            "f1": 2 * hit / max(float(guess.sum() + carrier.sum()), 1),
        }
        if name == "all" and len(d):
            tenth = (d / 2 * 10).long().clamp(0, 9)
            size = torch.bincount(tenth, minlength=10)
            off = torch.bincount(tenth, d / 2, 10) - torch.bincount(tenth, c / 2, 10)
            found["calibration"] = float(off.abs().sum() / size.sum())
    return found


def minor_doses(dose, truth, panel):
    """Dosages of ALT (V, N) and genotypes (V, N), -1 unknown, turned to count the panel's minor allele."""
    flip = panel.flip[:, None]
    return torch.where(flip, 2 - dose, dose), torch.where(flip & (truth >= 0), 2 - truth, truth)


def r2_of(sums):
    """Squared correlation from sums (..., 6) of 1, d, c, d², c², dc."""
    n, d, c, dd, cc, dc = sums.unbind(-1)
    return (dc * n - d * c) ** 2 / ((dd * n - d * d) * (cc * n - c * c)).clamp(min=1e-12)


def versus(ours, theirs, truth, panel, typed):
    """By bin, (r² of theirs, ours less theirs, lower and upper end of the difference's 95% interval, people
    drawn anew RESAMPLED times): dosages of ALT (V, N), genotypes truth (V, N), -1 unknown, untyped sites that
    vary in the panel."""
    N, found = truth.shape[1], {}
    drawn = np.random.default_rng(0).multinomial(N, [1 / N] * N, RESAMPLED)              # how often each
    drawn = torch.from_numpy(drawn).double()
    usable = torch.from_numpy(~typed & (panel.maf > 0))
    pairs = [minor_doses(dose, truth, panel) for dose in (ours, theirs)]
    for name, low, high in BINS:
        rows = usable & torch.from_numpy((panel.maf >= low) & (panel.maf < high))
        sums = []
        for dose, count in pairs:
            d, c, known = dose[rows].double(), count[rows].double(), count[rows] >= 0
            parts = torch.stack([known.double(), d, c, d * d, c * c, d * c], -1)
            sums.append(torch.where(known[..., None], parts, 0.0).sum(0))                   # (N, 6)
        mine, other = (r2_of(x.sum(0)) for x in sums)
        between = torch.quantile(r2_of(drawn @ sums[0]) - r2_of(drawn @ sums[1]),
                                 torch.tensor([0.025, 0.975], dtype=torch.float64))
        found[name] = [float(other), float(mine - other), *between.tolist()]
    return found


def flat(found):
    """{"r2_<0.5%": ...} of accuracy's metrics, for the record."""
    out = {f"{m}_{name}": found[name][m] for name, *_ in BINS for m in ("r2", "precision", "recall", "f1")}
    return out | {"calibration": found.get("calibration", 0.0)}


def table(found):
    """The metrics as lines of text."""
    lines = [f"{'panel MAF':>10} {'sites':>7} {'r2':>7} {'precision':>10} {'recall':>7} {'f1':>7}"]
    for name, *_ in BINS:
        x = found[name]
        lines.append(
            f"{name:>10} {x['sites']:>7} {x['r2']:>7.4f} {x['precision']:>10.4f} {x['recall']:>7.4f} "
            f"{x['f1']:>7.4f}"
        )
    return "\n".join([*lines, f"calibration error {found.get('calibration', 0):.5f}"])


def plot_accuracy(found, out):
    """accuracy.png: r² and F1 by allele frequency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, *_ in BINS]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for i, metric in enumerate(("r2", "f1")):
        bars = axis.bar(np.arange(len(names)) + 0.4 * i - 0.2, [found[n][metric] for n in names], 0.38,
                        label={"r2": "dosage r²", "f1": "F1 of carriers"}[metric])
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set(
        xticks=range(len(names)),
        xticklabels=names,
        ylim=(0, 1.08),
        xlabel="minor allele frequency in the panel",
        title="untyped sites of people not trained on",
    )
    axis.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(Path(out) / "accuracy.png", dpi=110)
    pyplot.close(figure)


def check_constants(run):
    for name, value in preset().items():
        globals()[name] = value
    common.within(1, math.inf, BATCH=BATCH, MICRO_BATCH=MICRO_BATCH)
    if BATCH % (run.world) or (BATCH // run.world) % min(MICRO_BATCH, BATCH // run.world):
        raise common.BadInput(
            f"BATCH {BATCH} must be a multiple of {run.world} processes × MICRO_BATCH {MICRO_BATCH}"
        )
    common.within(
        1,
        math.inf,
        STEPS=STEPS,
        EXAMPLES=EXAMPLES,
        DIM=DIM,
        N_LAYERS=N_LAYERS,
        COPY_DIM=COPY_DIM,
        WINDOW_SITES=WINDOW_SITES,
        ADD_LEVEL=ADD_LEVEL,
        CHUNK=CHUNK,
        MAX_BAD_STEPS=MAX_BAD_STEPS,
        MEMORY=MEMORY,
        PHASE_SWEEPS=PHASE_SWEEPS,
    )
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
        SAVE_EVERY=SAVE_EVERY,
        GAMMA=GAMMA,
        BRIER=BRIER,
        K=K,
        GENOTYPE=GENOTYPE,
        RECONSTRUCTION=RECONSTRUCTION,
        VALID_WINDOWS=VALID_WINDOWS,
    )
    common.within(10, math.inf, CHAIN_SITES=CHAIN_SITES)  # pieces share a tenth, one site at least
    common.within(-1, math.inf, EVAL_EVERY=EVAL_EVERY)
    common.within(0, 1, FLOOR=FLOOR, VALID_SHARE=VALID_SHARE, VALID_TYPED=VALID_TYPED, FOREIGN=FOREIGN)
    common.within(1e-9, 0.5, ERROR=ERROR)
    common.within(0, 0.9, OVERLAP=OVERLAP)
    common.divisible(DIM=(DIM, 2 * N_HEADS))
    for name, value in (("ARRAY", ARRAY), ("LEVELS", LEVELS), ("RATES", RATES)):
        if not all(isinstance(x, int | float) for x in value):
            raise common.BadInput(f"{name} {value} must be numbers")
    if len(ARRAY) != 2 or not 0 < ARRAY[0] <= ARRAY[1] < 1:
        raise common.BadInput(f"ARRAY {ARRAY} must be two shares, the smaller first, above 0, below 1")
    if not LEVELS or not all(0 < x < 1 for x in LEVELS) or not RATES or min(RATES) <= 0:
        raise common.BadInput(f"LEVELS {LEVELS} must be shares between 0 and 1, RATES {RATES} above 0")
    for name, value, allowed in (
        ("PRESET", PRESET, ("", "seed")),
        ("MODEL", MODEL, ("copy", "bert", "both")),
        ("FUSION", FUSION, ("enhanced", "aware", "concat")),
        ("WEIGHTING", WEIGHTING, ("power", "clamped")),
        ("INDEX", INDEX, ("flat", "ivf", "torch")),
    ):
        if value not in allowed:
            raise common.BadInput(f"{name} {value!r} is not one of {', '.join(map(repr, allowed))}")


def one_thread(run, kind):
    """One thread for the copying chains on a CPU: their operations are too small to share, and threads that
    wait for each other on a busy machine take ten times as long."""
    if run.device.type == "cpu" and kind == "copy":
        torch.set_num_threads(1)


def check_windows(panel, model):
    longest, most = int(np.diff(panel.windows).max()), model.sizes["window_sites"]
    if model.kind != "copy" and longest > most:
        raise common.BadInput(f"a window of WINDOWS {WINDOWS} holds {longest} sites, the model reads "
                              f"WINDOW_SITES {most} at most; make it shorter, or train with more")


def main():
    if CHECK and not IMPUTE:
        raise common.BadInput(f"CHECK={CHECK} scores what IMPUTE= makes; give that too")
    if VERSUS and not CHECK:
        raise common.BadInput(f"VERSUS={VERSUS} is compared by the truth CHECK=; give that too")
    if IMPUTE:
        return impute()
    run = common.start(SEED, DTYPE)
    check_constants(run)
    one_thread(run, MODEL)
    panel = Panel(run)
    alleles, own, population, held = people_of(run, panel)
    train, valid = np.flatnonzero(~held), np.flatnonzero(held)
    if len(train) < 2 or len(valid) < 1:
        raise common.BadInput(
            f"{len(held)} people give {len(train)} to train on and {len(valid)} to validate; more are "
            f"needed, or another VALID_SHARE {VALID_SHARE}"
        )
    aside = set(own[valid].flatten().tolist())
    donors = np.array([c for c in range(panel.alleles.shape[1]) if c not in aside])
    retriever = Retriever(panel, donors, INDEX, Path(OUT) / "index") if MODEL != "copy" and K else None
    examples = Examples(panel, alleles, donors, own, population, retriever)
    judged = Examples(panel, alleles[:, examples.haplotypes(valid)], donors,
                      torch.full((len(valid), 2), -1), population[valid], retriever)
    truth = judged.alleles.view(len(panel), -1, 2)
    truth = torch.where((truth >= 0).all(2), truth.sum(2), -1)
    array = array_mask(np.random.default_rng(7), panel.maf, VALID_TYPED)
    spread = np.unique(np.linspace(0, len(panel.windows) - 1, VALID_WINDOWS or 1).astype(int))
    windows = panel.windows[spread] if VALID_WINDOWS else None

    model = make_model()
    check_windows(panel, model)
    constants = common.literals(globals())
    epoch_steps = max(1, len(train) // BATCH)
    eval_every = epoch_steps if EVAL_EVERY == -1 else EVAL_EVERY

    def people_at(step):
        epoch, place = divmod(step * BATCH, len(train) // BATCH * BATCH or BATCH)
        order = np.random.default_rng((SEED, 0, epoch)).permutation(train)
        return np.resize(order[place:place + BATCH], BATCH), epoch

    def copy_batch(step, people):
        """Features, alleles and weights of EXAMPLES sites × haplotypes of each of the people."""
        rng = np.random.default_rng((SEED, 1, step))
        typed = array_mask(rng, panel.maf, math.exp(rng.uniform(*np.log(ARRAY))))
        sites = np.sort(rng.choice(len(panel), min(len(panel), 6 * EXAMPLES), replace=False))
        sites = sites[~typed[sites]]
        foreign = torch.tensor(
            [np.random.default_rng((SEED, 3, step, int(p))).random() < FOREIGN for p in people]
        )
        copies = examples.copy(people, np.flatnonzero(typed), sites, tuple(map(float, RATES)), ERROR, foreign)
        target = alleles[sites][:, examples.haplotypes(people)]
        usable = (copies.count > 0) & (copies.count < copies.total) & (target >= 0)
        telling = usable & (copies.x.amax(0) > 0.003) & (copies.x.amin(0) < 0.997)
        rows, columns, weights = [], [], []
        for i, person in enumerate(people):
            pick = np.random.default_rng((SEED, 2, step, int(person)))
            for kind, share in ((telling, 0.9), (usable & ~telling, 0.1)):
                v, h = kind[:, 2 * i:2 * i + 2].nonzero(as_tuple=True)
                n = max(1, int(share * EXAMPLES))
                if len(v):
                    chosen = torch.from_numpy(pick.integers(len(v), size=n))
                    rows.append(v[chosen])
                    columns.append(h[chosen] + 2 * i)
                    weights.append(torch.full((n,), len(v) / n))
        if not rows:
            raise common.BadInput(
                "no site varies among the people who may be copied; the panel is too small to learn from"
            )
        v, q = torch.cat(rows), torch.cat(columns)
        minor = (target[v, q] != panel.flip[sites][v]).float()
        return copies.features(v, q), minor, torch.cat(weights) / len(panel)

    def window_batch(step, people, epoch):
        """The BERT's input and target for each of the people in one window of the step."""
        rng = np.random.default_rng((SEED, 1, step))
        typed = draw_mask(rng, panel.maf, LEVELS[min(epoch // ADD_LEVEL, len(LEVELS) - 1)])
        telling = [i for i, (a, b) in enumerate(panel.windows) if 0 < typed[a:b].sum() < b - a]
        first, end = (int(x) for x in panel.windows[rng.choice(telling or len(panel.windows))])
        made = examples.window(people, typed, (first, end), K)
        if MODEL == "both":
            rows, near = np.arange(first, end), np.flatnonzero(typed)
            near = near[(near >= 2 * first - end) & (near < 2 * end - first)]    # a window on both sides, too
            copies = examples.copy(people, near, rows, tuple(map(float, RATES)), ERROR)
            made |= {"features": copy_window(copies), "flip": panel.flip[rows]}
        target = alleles[first:end][:, examples.haplotypes(people)].T.reshape(len(people), 2, -1)
        return made, target, torch.from_numpy(typed[first:end])

    def batches(step):
        people, epoch = people_at(step)
        mine = people.reshape(run.world, -1)[run.rank]
        parts = [mine[i:i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]
        return [copy_batch(step, p) if MODEL == "copy" else window_batch(step, p, epoch) for p in parts]

    if model.kind != "bert":
        first_features = (copy_batch(0, np.sort(train)[:BATCH])[0] if MODEL == "copy" else
                          window_batch(0, np.sort(train)[:BATCH], 0)[0]["features"].flatten(0, 2))
        model.copy.mean.copy_(first_features.mean(0))
        model.copy.scale.copy_(first_features.std(0) + 1e-3)
    model = model.to(run.device)
    optimizers = common.make_optimizers(model, OPTIMIZER, LR, MUON_LR, WEIGHT_DECAY)
    if OPTIMIZER == "adam":  # which make_optimizers leaves without decay
        optimizers[0].param_groups[0]["weight_decay"] = WEIGHT_DECAY
    found = common.resume(run, OUT, constants, RESUME, panel.print)
    state = found["state"] if found else {"fingerprint": panel.print, "best": math.inf, "since": 0, "bad": 0}
    begin = common.restore(run, found, model, optimizers) if found else 0
    net = run.wrap(model)
    record = common.Record(run, OUT, STEPS, begin, WANDB, constants, state)
    parameters = sum(p.numel() for p in model.parameters())
    record.show(
        f"{MODEL}, {parameters / 1e3:.0f}k parameters; {panel.file.name}: {len(panel):,} sites, "
        f"{len(train)} + {len(valid)} people, {len(panel.windows)} windows; {run.world} × {run.device} "
        f"{str(run.dtype)[6:]}; {OUT}"
    )

    def loss_of(batch):
        if MODEL == "copy":
            features, minor, weight = (x.to(run.device) for x in batch)
            logits = net(features=features)
            loss = focal(logits, minor, GAMMA) + BRIER * (torch.sigmoid(logits) - minor).square()
            return (loss * weight).sum(), weight.sum()
        made, target, typed = batch
        found = net(**{k: v.to(run.device) for k, v in made.items()})
        target, typed = target.to(run.device), typed.to(run.device)
        known = target >= 0
        ask = (known & ~typed).float()
        allele = target.clamp(min=0).float()
        logits = found["haplotype"]
        loss = (
            (focal(logits, allele, GAMMA) + BRIER * (torch.sigmoid(logits) - allele).square()) * ask
        ).sum()
        both = known.all(1)
        genotype = focal_classes(found["genotype"], target.clamp(min=0).sum(1).long(), GAMMA) * (
            both & ~typed
        )
        rebuilt = ((found["rebuilt"] - allele).square() * (known & typed)).sum()
        count = ask.sum()
        share = count / (known & typed).sum().clamp(min=1)
        return loss + GENOTYPE * 2 * genotype.sum() + RECONSTRUCTION * share * rebuilt, count

    def judge(model):
        """accuracy's metrics with all donors and, for the copying head, with none of the own population."""
        found = accuracy(dosages(run, model, judged, array, windows), truth, panel, array)
        if MODEL != "copy" or len(panel.names) < 2:
            return found, None
        return found, accuracy(dosages(run, model, judged, array, windows, foreign=True), truth, panel, array)

    def validate(step):
        model.eval()
        metrics, strangers = judge(model)
        model.train()
        more = (
            {f"foreign_{k}": v for k, v in flat(strangers).items() if k.startswith("r2")} if strangers else {}
        )
        record.log(step, **{f"valid_{k}": v for k, v in (flat(metrics) | more).items()})
        state["since"] += 1
        mean = -sum(m[name]["r2"] for m in (metrics, strangers) if m for name, *_ in BINS[:-1])
        if mean < state["best"]:
            state.update(best=mean, since=0)
            common.save_best(run, OUT, step, model, flat(metrics))

    if begin == 0:
        validate(0)
    seen = 0
    for step in range(begin, STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.lr_scale(step, STEPS, WARMUP, FLOOR, SCHEDULE)
        done = common.update(run, net, optimizers, batches(step), loss_of, CLIP, step)

        step, seen = step + 1, seen + BATCH
        state["bad"] = 0 if done.applied else state["bad"] + 1
        if state["bad"] >= MAX_BAD_STEPS:
            raise common.BadInput(f"loss or gradient of {state['bad']} updates in a row was not finite (loss "
                                  f"{done.loss}, gradient norm {done.grad_norm}); lower LR {LR}")
        if LOG_EVERY and step % LOG_EVERY == 0 or not done.applied:
            record.progress(step, seen, "people", loss=done.loss, grad_norm=done.grad_norm,
                            lr=optimizers[-1].param_groups[0]["lr"])
            seen = 0
        record.tick(step)
        last = step == STEPS
        if eval_every and step % eval_every == 0 or last:
            validate(step)
            last = last or bool(PATIENCE) and state["since"] >= PATIENCE
        if last:
            break
        if SAVE_EVERY and step % SAVE_EVERY == 0 or done.signal:
            common.save(run, OUT, step, model, optimizers, state, constants)
        if done.signal:
            record.close()
            common.leave(run, OUT, step, done.signal)

    best = run.share(common.load(Path(OUT) / "best.pt") if run.first else None)
    last_model = build(best).to(run.device).eval()
    metrics, strangers = judge(last_model)
    more = {f"foreign_{k}": v for k, v in flat(strangers).items() if k.startswith("r2")} if strangers else {}
    record.log(step, **flat(metrics), **more, final=True)
    common.export_weights(run, OUT, best)
    record.close()
    run.say(f"{len(valid)} people not trained on, {int(array.sum())} typed sites:\n{table(metrics)}")
    if strangers:
        run.say(f"the same without their own populations in the panel:\n{table(strangers)}")
    if run.first:
        plot_accuracy(metrics, OUT)
        common.plot_curves(
            OUT,
            ["loss"],
            ["valid_r2_<0.5%", "valid_r2_0.5-1%", "valid_r2_1-5%", "valid_r2_5-50%"],
            ["valid_f1_all"],
        )
    state["finished"] = True  # the last thing: until now, a rerun goes on
    common.save(run, OUT, step, model, optimizers, state, constants)
    run.say(
        f"done: {OUT}/best.pt, accuracy.png, curves.png; now: train_rag_bert.py IMPUTE=typed.vcf.gz"
    )
    common.stop(run)
    return flat(metrics)


# Imputation.

def typed_people(panel):
    """(Examples, typed (V,) bool, Genotypes as given at the typed rows, rows) of the file IMPUTE."""
    given = prepare_genotypes.read(IMPUTE)
    rows, given, what = prepare_genotypes.match(given, panel.file)
    gt = torch.from_numpy(given.gt.astype(np.int8))
    notes = [f"{len(rows):,} of {len(panel):,} panel variants typed in {len(given.samples)} people"]
    if Path(IMPUTE).suffix in (".h5", ".hdf5"):
        notes.append(f"{IMPUTE} does not say whether it is phased, as no .h5 file does: taken as phased")
    if what:
        notes.append(prepare_genotypes.report(what))
    empty = (given.gt < 0).all((0, 2))
    if empty.any():
        raise common.BadInput(
            f"{IMPUTE}: sample {given.samples[int(np.argmax(empty))]!r} has no call at any variant "
            "of the panel; leave it out"
        )
    half = torch.from_numpy(~given.phased) & ((gt < 0).sum(2) == 1)
    if half.any():
        notes.append(f"{int(half.sum()):,} unphased calls with one allele missing taken as missing")
        gt[half] = -1
    loose = torch.from_numpy(~given.phased) & (gt[..., 0] != gt[..., 1]) & (gt >= 0).all(2)
    if loose.any():
        notes.append(f"{int(loose.sum()):,} unphased heterozygotes phased against the panel")
        at = torch.from_numpy(panel.cm[rows])
        distance = torch.diff(at, prepend=at[:1]).clamp(min=1e-7) / 100
        reference = panel.alleles[rows]
        size = max(1, int(MEMORY * 2**20 / (len(rows) * 2 * reference.shape[1] * 4)))
        for i in range(0, gt.shape[1], size):
            gt[:, i : i + size] = phase(
                gt[:, i : i + size],
                loose[:, i : i + size],
                reference,
                distance,
                RATES[0],
                ERROR,
                PHASE_SWEEPS,
            )
    alleles = torch.full((len(panel), 2 * gt.shape[1]), -1, dtype=torch.int8)
    alleles[rows] = gt.flatten(1)
    where = {s: i for i, s in enumerate(panel.file.samples)}
    own = torch.tensor([[2 * where[s], 2 * where[s] + 1] if s in where else [-1, -1] for s in given.samples])
    if (own >= 0).any():
        notes.append(
            f"{int((own[:, 0] >= 0).sum())} of them are in the panel and are imputed without themselves"
        )
    typed = np.zeros(len(panel), bool)
    typed[rows] = True
    n = panel.alleles.shape[1]
    population = torch.full((len(own),), len(panel.names))
    return alleles, own, population, typed, given, rows, np.arange(n), notes


def impute():
    """IMPUTE: write OUT/imputed.vcf.gz with its index; with CHECK, the accuracy against the truth, too."""
    run = common.start(SEED, DTYPE)
    path = common.newest_checkpoint(OUT)
    if not path.is_file():
        raise common.BadInput(f"there is no checkpoint in {OUT}; train first: train_rag_bert.py OUT={OUT}")
    best = common.load(path)
    if run.world > 1:
        raise common.BadInput("IMPUTE runs in one process; start it without torchrun")
    check_constants(run)
    model = build(best).to(run.device).eval()
    one_thread(run, model.kind)
    globals()["WINDOW_SITES"] = min(WINDOW_SITES, model.sizes["window_sites"])
    panel = Panel(run)
    check_windows(panel, model)
    begin, work = time.perf_counter(), time.process_time()
    alleles, own, population, typed, given, rows, donors, notes = typed_people(panel)
    for note in notes:
        run.say(note)
    retriever = (
        Retriever(panel, donors, INDEX, Path(OUT) / "index") if model.kind != "copy" and model.k else None
    )
    examples = Examples(panel, alleles, donors, own, population, retriever)
    import tqdm

    bar = tqdm.tqdm(total=len(panel) * len(given.samples), unit="genotype", unit_scale=True, disable=None)
    parts = dosage_parts(run, model, examples, typed, progress=bar.update)
    whole = torch.empty(alleles.shape) if CHECK else None    # without, no more than a piece is held

    def kept():
        for sites, probability in parts:
            if CHECK:
                whole[sites] = probability
            yield sites, probability

    path = Path(OUT) / "imputed.vcf.gz"
    write_imputed(path, panel, kept(), given, rows, alleles)
    bar.close()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - work
    found = {
        "people": len(given.samples),
        "typed": len(rows),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
    }
    run.say(
        f"{path}: {len(panel):,} variants × {len(given.samples)} people in {seconds:.1f} s ({cpu:.1f} CPU s)"
    )
    if CHECK:
        found |= check(run, panel, whole, given, typed)
    common.write_result(run, OUT, found)
    common.stop(run)
    return found


def check(run, panel, probability, given, typed):
    """Accuracy against the genotypes of CHECK; -> {"r2": {bin: ...}, "f1": ..., "calibration"}."""
    truth = prepare_genotypes.read(CHECK)
    lost = [s for s in given.samples if s not in truth.samples]
    if lost:
        raise common.BadInput(f"CHECK {CHECK} lacks sample {lost[0]!r} ({len(lost)} of {len(given.samples)})")
    rows, truth, what = prepare_genotypes.match(truth, panel.file)
    if what:
        run.say(f"CHECK {CHECK}: {prepare_genotypes.report(what)}")
    gt = truth.gt[:, [truth.samples.index(s) for s in given.samples]].astype(np.int64)
    counts = torch.full((len(panel), len(given.samples)), -1)
    counts[rows] = torch.from_numpy(np.where((gt >= 0).all(2), gt.sum(2), -1))
    metrics = accuracy(probability, counts, panel, typed)
    run.say(table(metrics))
    plot_accuracy(metrics, OUT)
    result = {m: {name: metrics[name][m] for name, *_ in BINS} for m in ("r2", "f1", "precision", "recall")}
    result["calibration"] = metrics.get("calibration", 0.0)
    if VERSUS:
        theirs = prepare_genotypes.dosages(VERSUS, panel.file, given.samples)
        missing = int(np.isnan(theirs).any(1).sum())
        if missing:
            run.say(f"VERSUS {VERSUS} lacks {missing:,} of {len(panel):,} variants: taken at panel frequency")
        theirs = torch.from_numpy(np.where(np.isnan(theirs), 2 * panel.af[:, None], theirs)).float()
        ours = probability.view(len(panel), -1, 2).sum(2)
        result["versus"] = versus(ours, theirs, counts, panel, typed)
        lines = [f"{'panel MAF':>10} {'r2 there':>9} {'ours less theirs, 95% interval':>34}"]
        lines += [f"{name:>10} {other:>9.4f} {more:>+12.4f}  [{low:+.4f}, {high:+.4f}]"
                  for name, (other, more, low, high) in result["versus"].items()]
        run.say(f"against {VERSUS}:\n" + "\n".join(lines))
    return result


def write_imputed(path, panel, parts, given, rows, alleles):
    """GT:DS:HDS:GP of every panel variant, from dosage_parts; what was typed stays as it was given. AF and
    DR2 are of the people here: DR2 is the variance of the haplotypes' dosages over that of alleles of this
    frequency (as Minimac's Rsq)."""
    meta = [
        '##INFO=<ID=AF,Number=A,Type=Float,Description="Estimated ALT allele frequency">',
        '##INFO=<ID=DR2,Number=A,Type=Float,Description="Estimated squared correlation with the truth">',
        '##INFO=<ID=IMP,Number=0,Type=Flag,Description="Imputed">',
        '##INFO=<ID=TYPED,Number=0,Type=Flag,Description="Typed in the input">',
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        '##FORMAT=<ID=DS,Number=A,Type=Float,Description="ALT dosage">',
        '##FORMAT=<ID=HDS,Number=.,Type=Float,Description="ALT dosage of each haplotype">',
        '##FORMAT=<ID=GP,Number=G,Type=Float,Description="Probability of 0/0, 0/1, 1/1">',
    ]
    found = panel.file
    out = prepare_genotypes.VcfWriter(path, given.chrom[0], given.samples, meta)
    place = {int(r): i for i, r in enumerate(rows)}
    cells, texts = {}, [f"{x / 1000:g}" for x in range(2001)]
    for v, p in ((int(v), p) for sites, values in parts for v, p in zip(sites, values, strict=True)):
        i = place.get(v)
        if i is not None:
            known = alleles[v] >= 0
            p = torch.where(known, alleles[v].float(), p)
        af = float(p.mean())
        r2 = min(1.0, float(p.var(correction=0)) / max(af * (1 - af), 1e-9)) if 1e-6 < af < 1 - 1e-6 else 0.0
        whole = (p.double() * 1000).round().long().view(-1, 2).tolist()
        row = []
        for a, b in whole:
            text = cells.get((a, b))
            if text is None:
                x, y = a / 1000, b / 1000
                text = cells[a, b] = (f"{int(a >= 500)}|{int(b >= 500)}:{texts[a + b]}:{texts[a]},{texts[b]}:"
                                      f"{(1 - x) * (1 - y):.3g},{x + y - 2 * x * y:.3g},{x * y:.3g}")
            row.append(text)
        if i is not None:
            for n, (one, two) in enumerate(given.gt[i].tolist()):
                if one >= 0 and two >= 0:
                    row[n] = f"{one}{'|' if given.phased[i, n] else '/'}{two}{row[n][3:]}"
        info = f"AF={af:.4g};DR2={r2:.3f};{'IMP' if i is None else 'TYPED'}"
        out.write(
            [
                given.chrom[0],
                str(found.pos[v]),
                found.id[v],
                found.ref[v],
                found.alt[v],
                ".",
                "PASS",
                info,
                "GT:DS:HDS:GP",
                *row,
            ]
        )
    out.close()


if __name__ == "__main__":
    common.cli(globals(), main)
