"""docs/scale.md follows from the benchmark files: every figure in it is computed here again, and compared.

Legend: f rows of features a second, t images of training a second, r bytes of a row.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results/2026-11-21-"
CUTS = ("layer4,fc", "fc")
SETS = {10_000: 1, 1_000_000: 1, 1_000_000_000: 1000}  # images: machines that share the work
VIEWS, EPOCHS = 2, 8  # the defaults for sets of this size: --augment flip, finetune.recipe.resolve_auto
ROW = {"layer4,fc": 256 * 14 * 14 * 2, "fc": 512 * 2}  # B: the activation before each cut, in bf16
IMAGE = 3 * 224 * 224  # B
EVALUATED = 4 + 8 + 8  # B per class of an evaluated image: fp32 logits, the same in float64, and their softmax
CLASSES = 1000
MACHINE_HOUR, GB_MONTH, MONTH = 0.10, 0.05, 720  # example prices, not quotes; hours
PEAK = 989e12  # operations/s: NVIDIA's datasheet of the H200, bf16, without sparsity
DIGEST = sys.getsizeof(bytes(32))  # B: an image's sha256 as CPython keeps it
EXT4_FILE = 16 * 2**40  # B: Linux kernel documentation, "ext4 Data Structures and Algorithms", blocks of 4 KiB


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def figures(name: str) -> Any:
    return json.loads(read(f"{RESULTS}{name}.json"))["figures"]


def whole_jobs(trains: str, candidate: str) -> dict[str, float]:
    """Return a row of run-vs-script's tables, of which there is no JSON file."""
    text = read(f"{RESULTS}run-vs-script.md").split(f"## Trains `{trains}`")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("|")]
    found = next(row for row in rows if row[0] == candidate)
    return {
        name: float(cell.replace(",", "")) for name, cell in zip(rows[0][1:], found[1:], strict=True) if cell
    }  # fmt: skip


def rates(trains: str) -> tuple[float, float]:
    job = whole_jobs(trains, "finetune")
    return job["features img/s"], job["train img/s"]


def decoding() -> float:
    return float(median(one["images"] / one["seconds"] for one in figures("decode")["finetune"]))


def reading() -> float:
    found = re.search(r"`seconds\.prefix` (\d+) s, reading (\d+) GB", read("docs/results.md"))
    assert found is not None
    return int(found[2]) * 1e9 / int(found[1])


def multiply_adds(part: str) -> float:
    found = re.search(rf"^\| {part} +\|[^|]*\| +([\d.]+) \|", read(f"{RESULTS}utilisation.md"), re.MULTILINE)
    assert found is not None
    return float(found[1]) * 1e9


def memory() -> int:
    found = re.search(r"(\d+) GiB memory", read(f"{RESULTS}mapped.md"))
    assert found is not None
    return int(found[1]) * 2**30


def constant(path: str, name: str) -> Any:
    """Return a module's constant without importing the module, which would import torch."""
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return eval(compile(ast.Expression(node.value), path, "eval"), {})
    raise AssertionError(f"{path} has no {name}")


def span(seconds: float) -> str:
    for below, unit, name, digits in (
        (120, 1, "s", 0), (7200, 60, "min", 1), (432_000, 3600, "h", 1), (8.64e7, 86_400, "days", 0),
    ):  # fmt: skip
        if seconds < below:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / (365.25 * 86_400):.1f} years"


def size(count: float) -> str:
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f} {name}"
    return f"{count:,.0f} B"


def parts(trains: str, images: int) -> tuple[float, float, float, float]:
    """Return the machines' seconds for a set: decoding, features, epochs, and all of it with their starts."""
    f, t = rates(trains)
    decode, features, epochs = images / decoding(), VIEWS * images / f, EPOCHS * images / t
    return (
        decode,
        features,
        epochs,
        SETS[images] * whole_jobs(trains, "finetune")["start s"] + decode + features + epochs,
    )


def tries(trains: str, count: int, *, kept: bool) -> float:
    """Return the seconds of several runs of 1 million images that differ in the learning rate."""
    f, t = rates(trains)
    run = whole_jobs(trains, "finetune")["start s"] + 1e6 / decoding() + EPOCHS * 1e6 / t
    if not kept:
        return count * (run + EPOCHS * 1e6 / f)
    return count * run + VIEWS * 1e6 / f + (count - 1) * VIEWS * 1e6 * ROW[trains] / reading()


def input_rows() -> list[str]:
    text = {name: f"[{name}](../{RESULTS}{name}.md)" for name in ("run-vs-script", "decode", "utilisation", "mapped")}
    rows = []
    for trains in CUTS:
        f, t = rates(trains)
        job, script = whole_jobs(trains, "finetune"), whole_jobs(trains, "script bf16")
        source = text["run-vs-script"]
        rows += [
            f"| `{trains}`: f, feature rows/s, writing them included | {f:,.1f} | {source} |",
            f"| `{trains}`: t, images/s of training on features | {t:,.1f} | {source} |",
            f"| `{trains}`: the bf16 script, images/s of training | {script['train img/s']:,.1f} | {source} |",
            f"| `{trains}`: start, s | {job['start s']:,.1f} | {source} |",
            f"| `{trains}`: r, bytes of a feature row in bf16 | {ROW[trains]:,} | shapes before the cut, below |",
        ]
    rates_of = figures("utilisation")["multiply-adds per second"]
    return [
        *rows,
        f"| d, photos decoded/s | {decoding():,.0f} | {text['decode']} |",
        f"| prefix of `layer4,fc`, 10⁹ multiply-adds/image | {multiply_adds('prefix') / 1e9:.3f} "
        f"| {text['utilisation']} |",
        f"| suffix of `layer4,fc`, training, 10⁹ multiply-adds/image | {multiply_adds('suffix, training') / 1e9:.3f} "
        f"| {text['utilisation']} |",
        f"| whole model, evaluation, 10⁹ multiply-adds/image | {multiply_adds('whole model, evaluation') / 1e9:.3f} "
        f"| {text['utilisation']} |",
        f"| prefix, 10⁹ multiply-adds/s | {median(rates_of['prefix']) / 1e9:.0f} | {text['utilisation']} |",
        f"| suffix, training, 10⁹ multiply-adds/s | {median(rates_of['suffix, training']) / 1e9:.0f} "
        f"| {text['utilisation']} |",
        f"| memory, GiB | {memory() / 2**30:.0f} | {text['mapped']} |",
        f"| D, GB/s of reading features, checksums included | {reading() / 1e9:.2f} | [results.md](results.md) |",
    ]


def time_rows() -> list[str]:
    rows = []
    for trains in CUTS:
        f, t = rates(trains)
        script = whole_jobs(trains, "script bf16")
        for images in SETS:
            decode, features, epochs, total = parts(trains, images)
            live = total - features - epochs + EPOCHS * images * (1 / f + 1 / t)
            by_hand = SETS[images] * script["start s"] + EPOCHS * images / script["train img/s"]
            spans = " | ".join(span(value) for value in (decode, features, epochs, total, live, by_hand))
            rows.append(f"| `{trains}` | {images:,} | {spans} |")
    return rows


def space_rows() -> list[str]:
    rows = []
    for trains in CUTS:
        for images, machines in SETS.items():
            hours = parts(trains, images)[-1] / 3600
            disk = VIEWS * images * ROW[trains]
            money = hours * MACHINE_HOUR + disk / 1e9 * GB_MONTH * hours / machines / MONTH
            cells = (size(images * IMAGE), size(disk), size(EPOCHS * images * ROW[trains]))
            rows.append(
                f"| `{trains}` | {images:,} | {' | '.join(cells)} | {machines:,} | {span(3600 * hours / machines)} | "
                f"{money:,.2f} |"
            )
    return rows


def cache_rows() -> list[str]:
    rows = []
    for trains in CUTS:
        f, t = rates(trains)
        r, speed = ROW[trains], reading()
        needs = [views / (1 - f * r / speed) for views in (1, VIEWS)]
        rows.append(
            f"| `{trains}` | {size(f * r)} | {size(t * r)} | {f * r / speed:.4f} | "
            f"{needs[0]:.2f} | {needs[1]:.2f} | {speed / r:,.0f} |"
        )
    return rows


def stops() -> dict[str, int]:
    """Return how many images fit before each thing stops, on the benchmarks' machine with all of its memory free."""
    limit = 50e9
    return {
        "decoded": int(constant("finetune/stream.py", "HEADROOM") * memory() / (2 * IMAGE)),
        "in memory": int(constant("finetune/placement.py", "MEMORY_SHARE") * memory() / (VIEWS * ROW["layer4,fc"])),
        "limit": int(limit / (VIEWS * ROW["layer4,fc"])),
        "limit of fc": int(limit / (VIEWS * ROW["fc"])),
        "logits": int(memory() / (EVALUATED * CLASSES)),
        "file": EXT4_FILE // ROW["layer4,fc"],
        "digests": memory() // (DIGEST + 8),
        "order": memory() // (8 + 8 + 8 + 4),
    }


def on_stops() -> list[str]:
    """Return what sentences say of limits, in words and figures."""
    found = stops()
    chunk = constant("finetune/cache.py", "CHUNK_BYTES") // ROW["layer4,fc"]
    t = rates("layer4,fc")[1]
    return [
        f"{found['decoded']:,} training images",
        f"{found['in memory']:,} of `layer4,fc`",
        f"{found['limit']:,} training images with `layer4,fc`",
        f"{found['limit of fc'] / 1e6:.1f} million with `fc`",
        f"{found['logits'] / 1e6:.2f} million evaluated images of {CLASSES:,} classes",
        f"{found['file'] / 1e6:.0f} million images with `layer4,fc`",
        f"{found['digests'] / 1e6:.0f} million images",
        f"{found['order'] / 1e6:.0f} million images",
        f"a million need {2 * IMAGE * 1e6 / constant('finetune/stream.py', 'HEADROOM') / 1e9:.0f} GB.",
        f"each view of a million then takes {span(1e6 / decoding())} more",
        f"{chunk:,} rows, so a view of 1 billion images has {-(-(10**9) // chunk):,} chunks",
        f"{span(1e6 / t)} at 1 million images and {span(1e9 / t)} at 1 billion",
        f"{DIGEST} bytes and a pointer of 8",
        f"{4 * CLASSES + 8:,} bytes per test image",
        f"{EVALUATED} bytes per class",
        f"2 × {IMAGE:,} per image",
        f"a {IMAGE // (3 * 32 * 32)}th of it",
    ]


def on_the_cache() -> list[str]:
    """Return what sentences say of when the cache pays."""
    found = {trains: (*rates(trains), ROW[trains]) for trains in CUTS}
    rent = {trains: 30 * (MACHINE_HOUR / 3600 / f) / (r / 1e9 * GB_MONTH) for trains, (f, _, r) in found.items()}
    in_memory, mapped = (median(figures("mapped")["layer4,fc"][place]) for place in ("in memory", "mapped files"))
    peak_rows = PEAK / 2 / multiply_adds("prefix")
    work = 2 * (VIEWS * multiply_adds("prefix") + EPOCHS * multiply_adds("suffix, training"))
    return [
        *(
            f"`{trains}` takes {span(tries(trains, 3, kept=True))} with the cache and "
            f"{span(tries(trains, 3, kept=False))} without"
            for trains in CUTS
        ),
        f"{1e9 / ROW['layer4,fc']:,.0f} rows/s of `layer4,fc` and {1e9 / ROW['fc']:,.0f} of `fc`",
        f"{PEAK / 1e12:.0f} × 10¹² operations",
        f"{peak_rows:,.0f} rows/s, or {peak_rows * ROW['layer4,fc'] / 1e9:.1f} GB/s",
        f"{size(PEAK / 2 / multiply_adds('whole model, evaluation') * ROW['fc'])}/s",
        f"{work * 1e9 / PEAK / 3600:.1f} hours at the whole peak",
        f"{1e9 / decoding() / 3600:,.0f} hours of this machine",
        f"{found['layer4,fc'][0] * ROW['layer4,fc'] / 1e6:.1f} MB a second is little",
        f"{rent['layer4,fc']:.1f} days for `layer4,fc` and {rent['fc']:.0f} days for `fc`",
        f"{in_memory:,.0f} img/s in memory and {mapped:,.0f} mapped",
        f"{median(figures('mapped')['fc']['in memory']):,.0f} img/s",
        f"{span(EPOCHS * 1e6 * ROW['layer4,fc'] / reading())} to 8 epochs of 1 million images",
    ]


def on_the_design() -> list[str]:
    """Return what sentences say of the changes."""
    f, t = rates("layer4,fc")
    trained = int(re.findall(r"([\d,]+) of [\d,]+ parameters", read("README.md"))[0].replace(",", ""))
    head = 512 * 100 + 100
    done = figures("utilisation")["multiply-adds per second"]
    photo = re.search(r"(\d+) kB on average", read(f"{RESULTS}decode.md"))
    assert photo is not None
    return [
        f"{size(1e12 * int(photo[1]))} of photos against {size(VIEWS * 1e9 * ROW['layer4,fc'])} of features",
        f"takes each machine {span(1e9 / decoding())}.",
        f"{span(1e9 / decoding())} and {28 * 1e9 / 1e9:.0f} GB at 1 billion images",
        f"{size(4 * trained)} of gradients",
        # A ring sends nearly twice the gradients' bytes in each step of 128 images.
        f"{8 * trained * t / 128 / 1e6:.0f} MB/s for `layer4,fc`",
        f"{8 * head * rates('fc')[1] / 128 / 1e6:.0f} MB/s for `fc`",
        f"{span(1e6 / decoding())} at a million",
        f"to hide the reading gains {100 * t * ROW['layer4,fc'] / reading():.0f} %",
        f"`fc` rows are {ROW['layer4,fc'] // ROW['fc']} times smaller",
        f"batches of {1000 * 128:,}",
        f"f ≈ {median(done['prefix']) / 1e9:.0f} × 10⁹ / `once`",
        f"t ≈ {median(done['suffix, training']) / 1e9:.0f} × 10⁹ / (3 × `every_step`)",
        f"{photo[1]} kB a photo",
        f"{1e3 / t:.2f} ms of training and {1e3 * ROW['layer4,fc'] / reading():.2f} ms of reading",
        f"{4096 // ROW['fc']} times what it uses",
        f"{VIEWS * 1e6 / f / 3600:.1f} h of features at 1 million images to {1e6 / f / 3600:.1f} h",
        f"{CLASSES * CLASSES * 8 / 1e6:.0f} MB for {CLASSES:,} classes",
    ]


@pytest.mark.parametrize("name", ["input", "time", "space", "cache"])
def test_the_tables_of_scale_md_follow_from_the_benchmark_files(name: str) -> None:
    block = read("docs/scale.md").split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    table = [line for line in block.splitlines() if line.startswith("|")]
    assert table[2:] == globals()[f"{name}_rows"]()


def test_the_sentences_of_scale_md_follow_from_the_benchmark_files() -> None:
    text = " ".join(read("docs/scale.md").split())
    assert [phrase for phrase in [*on_stops(), *on_the_cache(), *on_the_design()] if phrase not in text] == []


def test_what_scale_md_takes_from_the_code_is_there() -> None:
    for path, line in (
        ("finetune/stream.py", "if COPIES * len(files) * 3 * side * side <= room:"),
        ("finetune/recipe.py", 'cache_limit: str = _setting("50GB"'),
        ("finetune/recipe.py", "epochs = recipe.epochs or min(40, max(8,"),
        ("finetune/order.py", "order = torch.randperm(images, generator=generator)"),
        ("finetune/order.py", "drawn = torch.randint(views, (images,), generator=generator)"),
        ("finetune/skipping.py", "weights = torch.ones(self.images)"),
        ("finetune/inference.py", "functional.cross_entropy(logits.double(), labels)"),
        ("finetune/splits.py", "Digests = list[bytes]"),
        ("finetune/sharing.py", "rows = ranks.part(len(data))"),
        ("finetune/sharing.py", "whole = logits.new_zeros(len(rows), logits.shape[1])"),
    ):
        assert line in read(path), f"{path} has changed: see whether docs/scale.md still holds"


def test_the_rows_bytes_are_those_that_runs_have_reported() -> None:
    kept = 100_000 * ROW["layer4,fc"] + 10_000 * 2 * ROW["layer4,fc"]  # both views; the test's rows are in fp32
    assert f"features: {kept / 1e9:.1f} GB in memory" in read("README.md")
    sizes = re.findall(r"^\| (\S+) +\| +(\d+) MB \|", read(f"{RESULTS}mapped.md"), re.MULTILINE)
    reported = {trains: int(megabytes) for trains, megabytes in sizes}
    assert round(reported["layer4,fc"] * ROW["fc"] / ROW["layer4,fc"]) == reported["fc"]
