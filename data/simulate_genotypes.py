"""Simulate people whose genotypes are to be imputed: a panel, typed people, their truth, a genetic map.

    python data/simulate_genotypes.py        data/genotypes/{panel,typed,truth}.vcf.gz, map.gz, samples.panel

Coalescent with recombination and mutation by msprime (doi:10.1093/genetics/iyab229), a demography like that
of Europeans in Gutenkunst et al. 2009 (doi:10.1371/journal.pgen.1000695): 7,300 ancestors grow to 12,300
5,920 generations ago, a branch of 2,100 leaves 5,600 generations ago, is 1,000 and grows by 0.4% a generation
from 848 ago, and splits 220 generations ago into north, west and south with a little migration since. South
is split once more 120 generations ago; that part, `island`, is not in the panel: typed people come from it
and from `west`. Mutations 1.25e-8 a base and generation (Jukes-Cantor, so alleles are bases), recombination
on average 1.1e-8 with hotspots: the rate of each 20 kb is drawn log-normally (σ = 1.5). Kept are sites with
two alleles that vary among the panel's or the typed people. Typed are TYPED of the sites, drawn in proportion
to their panel minor allele frequency, at most 0.2: what arrays look like. Deterministic by SEED.
"""

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from data import prepare_genotypes

OUT = "data/genotypes"     # folder
SEED = 0
MEGABASES = 3.0            # length of the region
PANEL = (100, 100, 100)    # people of north, west and south in the panel
TARGETS = (20, 40)         # people of west and island to type and impute
TYPED = 0.08               # share of the sites on the array


def demography():
    """The populations of the docstring."""
    import msprime

    found = msprime.Demography()
    for name, size, growth in (("north", 20_000, 0.004), ("west", 30_000, 0.004), ("south", 30_000, 0.004),
                               ("island", 8_000, 0.0)):
        found.add_population(name=name, initial_size=size, growth_rate=growth, initially_active=True)
    found.add_population(name="europe", initial_size=1_000 * np.exp(0.004 * (848 - 220)), growth_rate=0.004)
    found.add_population(name="source", initial_size=12_300)
    for a, b in (("north", "west"), ("west", "south"), ("north", "south")):
        found.set_symmetric_migration_rate([a, b], 2e-4)
    found.add_population_split(time=120, derived=["island"], ancestral="south")
    found.add_population_split(time=220, derived=["north", "west", "south"], ancestral="europe")
    found.add_population_parameters_change(time=848, population="europe", initial_size=2_100, growth_rate=0)
    found.add_population_split(time=5_600, derived=["europe"], ancestral="source")
    found.add_population_parameters_change(time=5_920, population="source", initial_size=7_300)
    return found


def simulate(megabases, panel, targets, typed, seed):
    """(panel, typed, truth) as Genotypes, population of each sample, (map positions, cM)."""
    common.needs("msprime", "to simulate genotypes")
    import msprime

    rng = np.random.default_rng(seed)
    length = int(megabases * 1e6)
    edges = np.append(np.arange(0, length, 20_000), length)
    rates = rng.lognormal(0, 1.5, len(edges) - 1)
    rates *= 1.1e-8 * length / (rates * np.diff(edges)).sum()
    wanted = {"north": panel[0], "west": panel[1] + targets[0], "south": panel[2], "island": targets[1]}
    trees = msprime.sim_ancestry(
        samples={k: n for k, n in wanted.items() if n}, demography=demography(),
        recombination_rate=msprime.RateMap(position=edges, rate=rates), random_seed=seed + 1)
    trees = msprime.sim_mutations(trees, rate=1.25e-8, random_seed=seed + 1)
    names, groups = [], []
    for name, n in wanted.items():
        names += [f"{name}{i + 1:03}" for i in range(n)]
        groups += [name] * n
    in_panel = np.array([g != "island" for g in groups])
    in_panel[wanted["north"] + panel[1]:wanted["north"] + wanted["west"]] = False

    rows, kept = [], []
    for v in trees.variants():
        if len(v.alleles) == 2 and None not in v.alleles:
            rows.append((int(v.site.position) + 1, *v.alleles))
            kept.append(v.genotypes.astype(np.int8))
    gt = np.stack(kept).reshape(len(rows), -1, 2)
    vary = (gt.max((1, 2)) != gt.min((1, 2))) & np.append(True, np.diff([r[0] for r in rows]) > 0)
    gt, rows = gt[vary], [r for r, v in zip(rows, vary, strict=True) if v]
    pos, ref, alt = (np.array(c, dtype=d) for c, d in zip(zip(*rows, strict=True), (np.int64, object, object),
                                                           strict=True))
    samples = np.array(names, dtype=object)

    def people(name, chosen, sites=slice(None)):
        part = gt[sites][:, chosen]
        n = len(part)
        return prepare_genotypes.Genotypes(
            name,
            np.full(n, "1", object),
            pos[sites],
            np.array([f"site{p}" for p in pos[sites]], dtype=object),
            ref[sites],
            alt[sites],
            list(samples[chosen]),
            part,
            np.ones(part.shape[:2], bool),
        )

    whole = people("panel", in_panel)
    frequency = whole.gt.mean((1, 2))
    weight = np.minimum(np.minimum(frequency, 1 - frequency), 0.2)
    array = np.sort(rng.choice(len(pos), min(int(typed * len(pos)), int((weight > 0).sum())), replace=False,
                               p=weight / weight.sum()))
    cm = np.append(0.0, np.cumsum(rates * np.diff(edges))) * 100
    return (whole, people("typed", ~in_panel, array), people("truth", ~in_panel),
            dict(zip(names, groups, strict=True)), (edges, cm))


def make(out, megabases=3.0, panel=(100, 100, 100), targets=(20, 40), typed=0.08, seed=0):
    """Write panel, typed and truth with their map and samples into a folder, the panel last."""
    whole, array, truth, groups, (edges, cm) = simulate(megabases, panel, targets, typed, seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.panel").write_text("".join(f"{s}\t{g}\n" for s, g in groups.items()))
    with gzip.open(out / "map.gz", "wt") as file:
        file.write("pos\tchr\tcM\n" + "".join(f"{p}\t1\t{c:.8f}\n" for p, c in zip(edges, cm, strict=True)))
    for name, found in (("typed", array), ("truth", truth), ("panel", whole)):
        prepare_genotypes.write_vcf(dataclasses.replace(found, name=name), out / f"{name}.vcf.gz")
    return whole, array, truth


def main():
    if (
        MEGABASES <= 0
        or not 0 < TYPED < 1
        or len(PANEL) != 3
        or len(TARGETS) != 2
        or min(sum(PANEL), sum(TARGETS)) < 1
    ):
        raise common.BadInput(
            f"MEGABASES {MEGABASES} and TYPED {TYPED} must be above 0, TYPED below 1; PANEL {PANEL} "
            f"counts three populations, TARGETS {TARGETS} two, somebody in each"
        )
    whole, array, truth = make(OUT, MEGABASES, PANEL, TARGETS, TYPED, SEED)
    print(f"{OUT}: panel.vcf.gz ({len(whole.samples)} people, {len(whole.pos):,} variants), typed.vcf.gz "
          f"({len(array.samples)} people, {len(array.pos):,} variants), truth.vcf.gz, samples.panel, map.gz")


if __name__ == "__main__":
    common.cli(globals(), main)
