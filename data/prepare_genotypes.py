"""Genotype files in and out: VCF, BCF and scikit-allel's .vcf.h5; frequencies, genetic positions, windows.

    python data/prepare_genotypes.py PANEL=panel.vcf.gz SAMPLES=samples.panel OUT=data/genotypes
    python data/prepare_genotypes.py PANEL=panel.vcf.gz TYPED=typed.vcf.gz

The first line writes OUT/panel.vcf.h5 (scikit-allel's layout), OUT/Freq.npy (ref, het, hom, af × populations,
the last one all of them × sites) and OUT/windows.csv (first and one past the last site of each window); the
second says how the typed file's records fit the panel's. A variant is (chromosome, position, REF, ALT),
nothing less.
"""

import collections
import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

PANEL = ""                # .vcf(.gz), .bcf or .vcf.h5 with phased genotypes
SAMPLES = ""              # text: sample, population, ... on each line; "" = one population
MAP = ""                  # genetic map, text(.gz): position, chromosome, cM; "" = 1 cM a megabase
TYPED = ""                # a file to check against the panel
OUT = "data/genotypes"
WINDOW_SITES = 1020       # sites in a window at most
WINDOW_CM = 0.0           # its length at most, in cM; 0 = any
OVERLAP = 0.1             # share of a window that the next one repeats

COMPLEMENT = str.maketrans("ACGT", "TGCA")
BGZF_END = bytes.fromhex(
    "1f8b08040000000000ff0600424302001b0003000000000000000000"
)  # SAM specification 4.1.2


@dataclasses.dataclass
class Genotypes:
    """Variants × people: `gt` int8 (V, N, 2), 0 = REF, 1 = ALT, -1 = missing; texts and positions (V,)."""

    name: str
    chrom: np.ndarray
    pos: np.ndarray
    id: np.ndarray
    ref: np.ndarray
    alt: np.ndarray
    samples: list
    gt: np.ndarray
    phased: np.ndarray      # (V, N) bool; an h5 file does not say, and is taken as phased
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def haplotypes(self):
        """(V, 2N) int8, the two haplotypes of a person side by side."""
        return self.gt.reshape(len(self.pos), -1)

    def take(self, rows):
        """The same people at some of the variants."""
        parts = {k: getattr(self, k)[rows] for k in ("chrom", "pos", "id", "ref", "alt", "gt", "phased")}
        return dataclasses.replace(self, **parts)

    def keys(self):
        """(chromosome without `chr`, position, REF, ALT) of each variant, in capitals."""
        return [(plain(c), int(p), r.upper(), a.upper())
                for c, p, r, a in zip(self.chrom, self.pos, self.ref, self.alt, strict=True)]


def plain(chrom):
    """A chromosome's name without `chr`."""
    return chrom[3:] if chrom.startswith("chr") else chrom


def read(path):
    """Genotypes of a .vcf(.gz), .bcf or .h5 file. Records with several ALT alleles, and repeated ones, are
    left out and counted in `dropped`; unsorted, truncated or haploid files are refused."""
    path = Path(path)
    if not path.is_file():
        raise common.BadInput(f"no genotypes at {path}")
    found = _read_h5(path) if path.suffix in (".h5", ".hdf5") else _read_vcf(path)
    if not len(found.pos):
        raise common.BadInput(f"{path} holds no variant with one ALT allele and genotypes"
                              + (f" ({report(found.dropped)})" if found.dropped else ""))
    if not found.samples:
        raise common.BadInput(f"{path} holds no samples")
    doubles = [s for s, n in collections.Counter(found.samples).items() if n > 1]
    if doubles:
        raise common.BadInput(f"{path} names sample {doubles[0]!r} twice; each person may be there once")
    chroms = list(dict.fromkeys(found.chrom))
    if len(chroms) > 1:
        raise common.BadInput(f"{path} holds chromosomes {', '.join(chroms[:4])}; give one at a time "
                              "(bcftools view -r)")
    back = np.flatnonzero(np.diff(found.pos) < 0)
    if len(back):
        raise common.BadInput(f"{path} is not sorted: position {found.pos[back[0] + 1]} follows "
                              f"{found.pos[back[0]]}; sort it (bcftools sort)")
    first, keep = set(), []
    for i, key in enumerate(found.keys()):
        if key in first:
            found.dropped["repeated record"] += 1
        else:
            first.add(key)
            keep.append(i)
    return found if len(keep) == len(found.pos) else found.take(np.array(keep))


def _read_vcf(path):
    """A VCF or BCF through htslib."""
    common.needs("cyvcf2", "to read VCF files")
    import cyvcf2

    _is_whole(path)
    try:
        file = cyvcf2.VCF(str(path), threads=1)
    except Exception as error:      # htslib says more of it on stderr, and raises a bare Exception
        raise common.BadInput(f"{path} is no VCF or BCF file, or its header is wrong (a sample twice, spaces "
                              f"for tabs): {error}") from None
    dropped, rows, genotypes, phases = collections.Counter(), [], [], []
    samples = list(file.samples)
    try:
        for record in file:
            if len(record.ALT) != 1:
                dropped[
                    "several ALT alleles (bcftools norm -m- splits them)" if record.ALT else "no ALT allele"
                ] += 1
                continue
            if "GT" not in record.FORMAT:
                dropped["no GT"] += 1
                continue
            calls = record.genotype.array()
            if calls.shape[1] == 2 and (calls[:, 0] == -1).all():
                calls = np.insert(calls, 1, -1, axis=1)
            if calls.shape[1] == 3:
                calls[(calls[:, 0] == -1) & (calls[:, 1] == -2), 1] = -1        # "." is "./."
            if calls.shape[1] == 3 and (calls[:, :2] > 1).any():
                odd = samples[int(np.argmax((calls[:, :2] > 1).any(1)))]
                raise common.BadInput(f"{path}: {record.CHROM}:{record.POS}, sample {odd!r} has an allele "
                                      "above 1, but there is one ALT; mend the record, or drop it")
            if calls.shape[1] != 3 or (calls[:, :2] == -2).any():
                odd = int(np.argmax((calls[:, :-1] == -2).any(1))) if calls.shape[1] == 3 else 0
                raise common.BadInput(
                    f"{path}: {record.CHROM}:{record.POS}, sample {samples[odd]!r} is not diploid; "
                    "haploid calls (men's X, mitochondria) must be left out or written as homozygous"
                )
            rows.append((record.CHROM, record.POS, record.ID or ".", record.REF, record.ALT[0]))
            genotypes.append(calls[:, :2].astype(np.int8))
            phases.append(calls[:, 2].astype(bool))
    except common.BadInput:
        raise
    except Exception as error:
        where = f"after {rows[-1][0]}:{rows[-1][1]}" if rows else "at its first record"
        raise common.BadInput(f"{path} cannot be read {where}: {error}") from None
    texts = list(zip(*rows, strict=True)) if rows else [[]] * 5
    chrom, pos, name, ref, alt = (np.array(t, dtype=d) for t, d in
                                  zip(texts, (object, np.int64, object, object, object), strict=True))
    shape = (0, len(samples))
    return Genotypes(path.name, chrom, pos, name, ref, alt, samples,
                     np.stack(genotypes) if rows else np.zeros((*shape, 2), np.int8),
                     np.stack(phases) if rows else np.zeros(shape, bool), dropped)


def dosages(path, panel, samples):
    """Float32 (panel's variants, samples): ALT dosages of a VCF or BCF, by DS, else GT; NaN without."""
    if not Path(path).is_file():
        raise common.BadInput(f"no dosages at {path}")
    common.needs("cyvcf2", "to read VCF files")
    import cyvcf2

    _is_whole(path)
    try:
        file = cyvcf2.VCF(str(path), threads=1)
        lost = [s for s in samples if s not in file.samples]
        if lost:
            raise common.BadInput(f"{path} lacks sample {lost[0]!r} ({len(lost)} of {len(samples)})")
        columns = [file.samples.index(s) for s in samples]
        index = {key[1:]: i for i, key in enumerate(panel.keys())}
        out = np.full((len(panel.pos), len(samples)), np.nan, np.float32)
        for record in file:
            row = index.get((record.POS, record.REF, record.ALT[0])) if len(record.ALT) == 1 else None
            if row is None:
                continue
            if "DS" in record.FORMAT:
                out[row] = record.format("DS")[columns, 0]
            elif "GT" in record.FORMAT:
                calls = record.genotype.array()[columns, :2].astype(np.float32)
                out[row] = np.where((calls >= 0).all(1), calls.sum(1), np.nan)
    except common.BadInput:
        raise
    except Exception as error:
        raise common.BadInput(f"{path} cannot be read as a VCF or BCF file: {error}") from None
    return out


def _is_whole(path):
    """Refuse a bgzipped file without its end marker, and a gzip that stops early."""
    with open(path, "rb") as file:
        head = file.read(18)
        if head[:2] != b"\x1f\x8b":
            return
        if head[12:14] == b"BC":
            file.seek(0, 2)
            if file.tell() >= len(BGZF_END):
                file.seek(-len(BGZF_END), 2)
            whole = file.read() == BGZF_END
        else:
            try:
                with gzip.open(path) as plain_gzip:
                    while plain_gzip.read(1 << 20):
                        pass
                whole = True
            except (EOFError, OSError):
                whole = False
    if not whole:
        raise common.BadInput(f"{path} is cut short: its end is missing; copy it again")


def _read_h5(path):
    """A file in scikit-allel's layout: texts as str or bytes, ALT with one or two dimensions."""
    common.needs("h5py", "to read .h5 files")
    import h5py

    def texts(data):
        return np.array([t.decode() if isinstance(t, bytes) else str(t) for t in data[:]], dtype=object)

    try:
        with h5py.File(path) as file:
            missing = [k for k in ("calldata/GT", "samples", "variants/CHROM", "variants/POS", "variants/REF",
                                   "variants/ALT") if k not in file]
            if missing:
                raise common.BadInput(
                    f"{path} lacks {', '.join(missing)}; scikit-allel's vcf_to_hdf5 writes it"
                )
            gt, pos, samples = (
                file["calldata/GT"][:],
                file["variants/POS"][:].astype(np.int64),
                texts(file["samples"]),
            )
            alt = file["variants/ALT"][:]
            several = np.zeros(len(pos), bool)
            if alt.ndim == 2:
                several = np.array([any(x not in (b"", "") for x in row[1:]) for row in alt], bool)
                alt = alt[:, 0]
            alt, chrom, ref = texts(alt), texts(file["variants/CHROM"]), texts(file["variants/REF"])
            name = texts(file["variants/ID"]) if "variants/ID" in file else np.full(len(pos), ".", object)
    except (OSError, RuntimeError) as error:
        raise common.BadInput(f"{path} cannot be read, it may be cut short: {error}") from None
    if gt.shape != (len(pos), len(samples), 2):
        raise common.BadInput(f"{path}: calldata/GT is {gt.shape}, not variants × samples × 2 "
                              f"= {(len(pos), len(samples), 2)}")
    several |= (gt > 1).any((1, 2))
    none = (alt == "") | (alt == ".")
    found = Genotypes(path.name, chrom, pos, name, ref, alt, list(samples), gt.astype(np.int8),
                      np.ones(gt.shape[:2], bool))
    found.dropped.update({"several ALT alleles (bcftools norm -m- splits them)": int(several.sum())}
                         if several.any() else {})
    found.dropped.update({"no ALT allele": int(none.sum())} if none.any() else {})
    half = (gt[..., 0] >= 0) & (gt[..., 1] == -1)
    if half.any():
        v, n = np.argwhere(half)[0]
        raise common.BadInput(
            f"{path}: {chrom[v]}:{pos[v]}, sample {samples[n]!r} is not diploid; haploid calls must "
            "be left out or written as homozygous"
        )
    return found.take(np.flatnonzero(~several & ~none)) if (several | none).any() else found


def report(counter):
    """`3 palindromic, 2 repeated record` of a counter."""
    return ", ".join(f"{n:,} {what}" for what, n in counter.most_common())


def write_h5(found, path):
    """Write Genotypes in scikit-allel's layout."""
    common.needs("h5py", "to write .h5 files")
    import h5py

    text = h5py.string_dtype("utf-8")
    with h5py.File(path, "w") as file:
        file.create_dataset("calldata/GT", data=found.gt, chunks=True, compression="gzip", compression_opts=1)
        file.create_dataset("samples", data=np.array(found.samples, dtype=object), dtype=text)
        for name, values in (
            ("CHROM", found.chrom),
            ("ID", found.id),
            ("REF", found.ref),
            ("ALT", found.alt),
        ):
            file.create_dataset(f"variants/{name}", data=values, dtype=text)
        file.create_dataset("variants/POS", data=found.pos.astype(np.int32))


class VcfWriter:
    """A bgzipped VCF, indexed when it is closed: the header first, then rows of ready fields in order."""

    def __init__(self, path, chrom, samples, meta=()):
        common.needs("pysam", "to write bgzipped, indexed VCF files")
        import pysam

        self.path, self.unfinished = Path(path), Path(f"{path}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = pysam.BGZFile(str(self.unfinished), "w")
        lines = [
            "##fileformat=VCFv4.2",
            '##FILTER=<ID=PASS,Description="All filters passed">',
            *meta,
            f"##contig=<ID={chrom}>",
            "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]),
        ]
        self.file.write(("\n".join(lines) + "\n").encode())

    def write(self, fields):
        """One record's fields, as text."""
        self.file.write(("\t".join(fields) + "\n").encode())

    def close(self):
        """Finish the file and write its index beside it."""
        import pysam

        self.file.close()
        self.unfinished.replace(self.path)
        pysam.tabix_index(str(self.path), preset="vcf", force=True)


def write_vcf(found, path):
    """Write Genotypes as a bgzipped VCF with its index."""
    cells = np.array([[f"{a}{s}{b}" for b in ".01"] for a in ".01" for s in "/|"], object).reshape(3, 2, 3)
    out = VcfWriter(
        path, found.chrom[0], found.samples, ['##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">']
    )
    for v in range(len(found.pos)):
        texts = cells[found.gt[v, :, 0] + 1, found.phased[v].astype(int), found.gt[v, :, 1] + 1]
        out.write(
            [
                found.chrom[v],
                str(found.pos[v]),
                found.id[v],
                found.ref[v],
                found.alt[v],
                ".",
                "PASS",
                ".",
                "GT",
                *texts,
            ]
        )
    out.close()


def match(typed, panel, least=0.1):
    """(panel's row of each typed record kept, those records with the panel's alleles, what was dropped and
    why).

    REF and ALT that are swapped, or given for the other strand, are turned; A/T and C/G pairs that would need
    it are ambiguous and dropped, and so are indels. Refused are other chromosomes and a file of whose records
    between the panel's ends less than `least` fits."""
    if plain(typed.chrom[0]) != plain(panel.chrom[0]):
        raise common.BadInput(
            f"{typed.name} is of chromosome {typed.chrom[0]}, the panel {panel.name} of {panel.chrom[0]}"
        )
    index = {key[1:]: i for i, key in enumerate(panel.keys())}
    places = set(panel.pos.tolist())
    what, rows, keep, flip = collections.Counter(typed.dropped), [], [], []
    taken = set()
    for i, (_, pos, ref, alt) in enumerate(typed.keys()):
        other = ref.translate(COMPLEMENT), alt.translate(COMPLEMENT)
        palindrome = other == (alt, ref)
        options = [((ref, alt), False, "")]
        if not palindrome and len(ref) == len(alt) == 1:   # an indel turned round is another indel
            options += [
                ((alt, ref), True, "REF and ALT swapped, turned"),
                (other, False, "other strand, turned"),
                (other[::-1], True, "other strand and swapped, turned"),
            ]
        for pair, turned, note in options:      # noqa: B007 (read after the loop)
            row = index.get((pos, *pair))
            if row is not None:
                break
        else:
            swapped = palindrome and (pos, alt, ref) in index
            what["A/T or C/G swapped or on the other strand: cannot be told, dropped" if swapped else
                 "other alleles in the panel, dropped" if pos in places else "not in the panel, dropped"] += 1
            continue
        if row in taken:
            what["second record of one panel variant, dropped"] += 1
            continue
        taken.add(row)
        if note:
            what[note] += 1
        rows.append(row)
        keep.append(i)
        flip.append(turned)
    inside = np.mean((typed.pos >= panel.pos[0]) & (typed.pos <= panel.pos[-1]))
    if not rows or len(rows) < least * inside * len(typed.pos):
        raise common.BadInput(
            f"{len(rows)} of {len(typed.pos)} records of {typed.name} are in the panel {panel.name} "
            f"({report(what)}; {inside:.0%} lie between its ends): another genome build, or another region?"
        )
    order = np.argsort(rows, kind="stable")
    rows, keep, flip = np.array(rows)[order], np.array(keep)[order], np.array(flip)[order]
    found = typed.take(keep)
    gt = np.where((flip[:, None, None]) & (found.gt >= 0), 1 - found.gt, found.gt).astype(np.int8)
    found = dataclasses.replace(found, gt=gt, ref=panel.ref[rows], alt=panel.alt[rows], id=panel.id[rows])
    return rows, found, what


def populations(path, samples):
    """(names of the populations, number of each sample's); a line is: sample, population, ..."""
    if not path:
        return ["all"], np.zeros(len(samples), int)
    if not Path(path).is_file():
        raise common.BadInput(f"no SAMPLES at {path}")
    rows = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    short = next((i for i, r in enumerate(rows) if len(r) < 2), None)
    if short is not None:
        raise common.BadInput(f"{path}:{short + 1} has no population; each line is: sample, population, ...")
    where = {r[0]: r[1] for r in rows}
    lost = [s for s in samples if s not in where]
    if lost:
        raise common.BadInput(
            f"{path} gives no population for sample {lost[0]!r} ({len(lost)} of {len(samples)} lack one)"
        )
    names = sorted({where[s] for s in samples})
    return names, np.array([names.index(where[s]) for s in samples])


def frequencies(found, names, number):
    """Float32 (4, populations + 1, V): share of ref, het and hom genotypes and ALT frequency; the last row is
    all. A site without one call in a population takes the frequencies of all."""
    dose = found.gt.astype(np.int16).sum(2)
    known = (found.gt >= 0).all(2)
    out = np.zeros((4, len(names) + 1, len(dose)), np.float32)
    for p in range(len(names), -1, -1):
        mine = np.ones(len(number), bool) if p == len(names) else number == p
        called = known[:, mine].sum(1)
        for g in range(3):
            out[g, p] = (known & (dose == g))[:, mine].sum(1) / np.maximum(called, 1)
        out[3, p] = out[1, p] / 2 + out[2, p]
        out[:, p] = np.where(called, out[:, p], out[:, -1])
    return out


def genetic(path, pos, chrom):
    """Genetic position (cM) of physical ones of a chromosome, straight between the map's points; no map: 1 cM
    a megabase."""
    pos = np.asarray(pos, float)
    if not path:
        return pos / 1e6
    if not Path(path).is_file():
        raise common.BadInput(f"no MAP at {path}")
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt") as file:
            rows = [line.split() for line in file if line.strip()]
        rows = rows[not rows[0][0].isdigit():]
        numbers = np.array([(float(r[0]), float(r[2])) for r in rows if plain(r[1]) == plain(chrom)])
        others = sorted({r[1] for r in rows})
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile):
        raise common.BadInput(f"{path} is no genetic map; each line is: position, chromosome, cM") from None
    if not len(numbers):
        raise common.BadInput(f"{path} has no line of chromosome {chrom}, its second column names "
                              f"{', '.join(others[:4])}; each line is: position, chromosome, cM")
    if len(numbers) < 2 or not np.isfinite(numbers).all() or (np.diff(numbers, axis=0) < 0).any():
        raise common.BadInput(f"{path}: positions and cM must rise, on two lines at least")
    (low, cm_low), (high, cm_high) = numbers[0], numbers[-1]
    slope = max((cm_high - cm_low) / max(high - low, 1), 1e-9)
    inside = np.interp(pos, numbers[:, 0], numbers[:, 1])
    return inside - np.maximum(low - pos, 0) * slope + np.maximum(pos - high, 0) * slope


def windows(cm, sites=1020, length=0.0, overlap=0.1):
    """(W, 2) first and one past the last site of windows of at most so many sites and so many cM, each
    repeating a share of the one before; together they hold every site."""
    out, first, n = [], 0, len(cm)
    while True:
        end = min(first + sites, n)
        if length:
            end = min(end, max(first + 1, int(np.searchsorted(cm, cm[first] + length, "right"))))
        out.append((first, end))
        if end == n:
            return np.array(out)
        first = max(first + 1, end - int((end - first) * overlap))


def read_windows(path, n):
    """Windows from a CSV whose first two columns are first and one past the last site."""
    if not Path(path).is_file():
        raise common.BadInput(f"no WINDOWS at {path}")
    rows = [line.split(",") for line in Path(path).read_text().splitlines() if line.strip()]
    try:
        found = np.array([(int(r[0]), int(r[1])) for r in rows[not rows[0][0].strip().isdigit():]])
    except (ValueError, IndexError):
        raise common.BadInput(f"{path}: its first two columns must be first and last site") from None
    bad = next((w for w in found if not 0 <= w[0] < w[1] <= n), None)
    if bad is not None:
        raise common.BadInput(f"{path}: window {bad[0]},{bad[1]} is not within the panel's {n} sites")
    seen = np.zeros(n, bool)
    for first, end in found:
        seen[first:end] = True
    if not seen.all():
        raise common.BadInput(f"{path}: no window holds site {int(np.argmin(seen))} of {n}")
    return found


def read_panel(path):
    """A panel: phased, nobody missing."""
    panel = read(path)
    if (panel.gt < 0).any():
        v, n = np.argwhere((panel.gt < 0).any(2))[0]
        raise common.BadInput(
            f"the panel {path} misses a call at {panel.chrom[v]}:{panel.pos[v]}, sample "
            f"{panel.samples[n]!r}; a panel must be complete (drop the record, or phase it again)"
        )
    loose = ~panel.phased & (panel.gt[..., 0] != panel.gt[..., 1])
    if loose.any():
        v, n = np.argwhere(loose)[0]
        raise common.BadInput(f"the panel {path} is not phased at {panel.chrom[v]}:{panel.pos[v]}, sample "
                              f"{panel.samples[n]!r}; phase it first (Beagle, SHAPEIT)")
    return panel


def main():
    if not PANEL:
        raise common.BadInput("PANEL is empty; give the panel's file: PANEL=panel.vcf.gz")
    panel = read_panel(PANEL)
    print(f"{PANEL}: {len(panel.pos):,} variants, {len(panel.samples):,} people"
          + (f"; left out: {report(panel.dropped)}" if panel.dropped else ""))
    if TYPED:
        rows, _, what = match(read(TYPED), panel)
        print(f"{TYPED}: {len(rows):,} variants fit the panel" + (f"; {report(what)}" if what else ""))
        return
    out = Path(OUT)
    out.mkdir(parents=True, exist_ok=True)
    names, number = populations(SAMPLES, panel.samples)
    write_h5(panel, out / "panel.vcf.h5")
    np.save(out / "Freq.npy", frequencies(panel, names, number))
    parts = windows(genetic(MAP, panel.pos, panel.chrom[0]), WINDOW_SITES, WINDOW_CM, OVERLAP)
    lines = ["first,end,from,to", *(f"{a},{b},{panel.pos[a]},{panel.pos[b - 1]}" for a, b in parts)]
    (out / "windows.csv").write_text("\n".join(lines) + "\n")
    print(f"{out}: panel.vcf.h5, Freq.npy ({', '.join(names)}, all), windows.csv ({len(parts)})")


if __name__ == "__main__":
    common.cli(globals(), main)
