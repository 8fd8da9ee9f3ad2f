"""Get enwik8, the first 100,000,000 bytes of an English Wikipedia dump of 2006, and check it.

    python data/prepare_enwik8.py                        download (36 MB; goes on where it was interrupted)
    python data/prepare_enwik8.py DATA=enwik8.zip        or take a local enwik8, enwik8.gz or enwik8.zip

Writes data/enwik8/enwik8 and meta.json. Splits are by position: 90 MB training, 5 validation, 5 test. Source:
Matt Mahoney's Large Text Compression Benchmark; the text is Wikipedia's, GFDL.
"""

import gzip
import hashlib
import http.client
import json
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

DATA = ""                                               # a local file instead of the download
URL = "http://mattmahoney.net/dc/enwik8.zip"
OUT = "data/enwik8"                                     # from the root of the repo
SIZE = 100_000_000                                      # bytes
SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"       # of the unpacked file


def read(path):
    """The bytes of a file; .gz and .zip (its only member) are unpacked. Raises BadInput if that fails."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".gz":
            found = gzip.decompress(path.read_bytes())
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
                if len(names) != 1:
                    raise common.BadInput(f"{path} holds {len(names)} files; one is needed")
                found = archive.read(names[0])
        else:
            found = path.read_bytes()
    except FileNotFoundError:
        raise common.BadInput(f"there is no file {path}; for enwik8: python data/prepare_enwik8.py") from None
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise common.BadInput(f"{path} is cut short or damaged ({error}); fetch it again") from None
    except RuntimeError as error:                       # a password, an unknown method
        raise common.BadInput(f"cannot unpack {path} ({error}); give the file that is in it") from None
    except OSError as error:
        raise common.BadInput(f"cannot read {path} ({error.strerror})") from None
    if not found:
        raise common.BadInput(f"{path} is empty")
    return found


def download(url, path):
    """Fetch url into path, going on behind what an interrupted download left in path.part."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            more = answer.status == 206                 # else the server begins anew
            length = int(answer.headers.get("Content-Length") or 0)
            total, done = length + have * more, have * more
            with open(part, "ab" if more else "wb") as file:
                while piece := answer.read(2**20):
                    file.write(piece)
                    done += len(piece)
                    print(f"\r{url}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end="", file=sys.stderr)
            print(file=sys.stderr)
            if length and done < total:
                raise common.BadInput(f"{url} broke off after {done} of {total} bytes; run the same command "
                                      "again to go on")
    except urllib.error.HTTPError as error:
        if error.code != 416:                           # 416: all of it was there already
            raise common.BadInput(f"cannot download {url} ({error}); give a local file: "
                                  "DATA=enwik8.zip") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise common.BadInput(f"cannot download {url} ({error}); run again to go on, or give a local file: "
                              "DATA=enwik8.zip") from None
    part.replace(path)


def main():
    out = Path(OUT) if Path(OUT).is_absolute() else Path(__file__).resolve().parent.parent / OUT
    out.mkdir(parents=True, exist_ok=True)
    path = Path(DATA) if DATA else out / "enwik8.zip"
    if not DATA and not path.exists():
        download(URL, path)
    try:
        found = read(path)
        if len(found) != SIZE:
            raise common.BadInput(f"{path} holds {len(found)} bytes; enwik8 has {SIZE}: fetch it again")
        if hashlib.sha1(found).hexdigest() != SHA1:
            raise common.BadInput(f"{path} has the size of enwik8 but not its checksum (SHA-1 {SHA1}): fetch "
                                  "it again")
    except common.BadInput:
        if not DATA:
            path.unlink(missing_ok=True)                # a bad download must not be taken up again
        raise
    common.write_whole(out / "enwik8", lambda file: file.write(found))
    about = {"bytes": SIZE, "sha1": SHA1, "source": URL, "licence": "GFDL",
             "split": "90 / 5 / 5 MB by position"}
    common.write_whole(out / "meta.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    print(f"{out}/enwik8: {SIZE} bytes, checksum right; next: python train_nsa_enwik8.py")


if __name__ == "__main__":
    common.cli(globals(), main)
