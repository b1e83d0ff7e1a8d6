"""What tiled factors were meant to reach, what was measured, and the arithmetic between the two."""

import itertools

from report import number, table

BANDWIDTH = 4.8e12  # bytes a second that an H200 reads or writes, by its data sheet
CHAINED = 16  # rows up to which a layer in a chain was timed
KINDS = {
    "svd": "SVD", "xla": "TSVD, XLA", "products": "TSVD, two products", "fused": "TSVD, fused",
    "resident": "TSVD, fused, x u kept", "split": "TSVD, few rows", "common": "TSVD-common, XLA",
    "common-products": "TSVD-common, two products", "common-resident": "TSVD-common, x u kept",
    "common-shared": "TSVD-common, factor kept",
}  # fmt: skip
COMMON_WAYS = tuple(kind for kind in KINDS if kind.startswith("common"))
TSVD = ("xla", "products", "fused", "resident", "split")
AIMS = {("llama-7b out", 8192): (1.6, 3, 5), ("gpt2-m up", 4096): (1.3, 2, 3)}
RATIOS = 2, 4, 8
DETAILED = "gpt2-m up", "llama-7b out"  # layers whose every way is told
AIMED = (
    'Ways of TSVD at their best tile. "yes" is reached, "no" is missed. Few rows were meant to '
    "gain 0.7 of the compression."
)
MANY = (
    "With 4,096 rows and more TSVD reaches all aims. With tiles of 1,024 the two products and the "
    "kernel that keeps `x u` in shared memory are the fastest ways. With four rows of tiles "
    "(4,096 x 4,096) the latter has to keep four times as much, is left with slots for few tiles "
    "on their way, and takes longer than the two products."
)
MEDIUM = (
    "GPT-2 medium's dense row takes 12.0 us, more than Llama's with four times the bytes, where "
    "its bytes are 1.7 us: the gains of 2.2 to 2.8 say as much of that dense product as of TSVD."
)
FUSED = (
    "The fused kernel gives a thread block 128 rows of a column of tiles: 512 rows of 3 columns "
    "of tiles keep 12 of 132 multiprocessors busy, few rows of 16 columns 16. It is not chosen "
    "there: 512 rows run on it where it has 32 tiles of y or more and rows of tiles are fewer than "
    "columns, and on the two products elsewhere. From 4,096 rows on it takes less time than XLA "
    "with the same factors everywhere."
)
COMMON = (
    "TSVD-common has TSVD's arithmetic and no more bytes. Its second product is no deeper than "
    "the rank: through XLA it takes as long as its input and y take to be read and written. On "
    "the kernel that keeps `x u` a thread block has y of 128 rows to write once its first "
    "product is done, and nothing beside it: by 4,096 x 4,096 it is 2 to 6 % behind TSVD's best "
    "tiles of 1,024 at 2x and 4x and 16 % at 8x. On the kernel whose common factor stays in "
    "shared memory a tile of the first product waits in registers, and its part of y leaves "
    "between the steps of the next one's sum. With 8,192 rows that is within 3 % of TSVD's best "
    "way, or ahead; with 4,096 by 1,024 x 4,096 8 to 12 % behind the tiles of 1,024 whose `x u` "
    "stays. Where only tiles of 256 divide a matrix, as Llama's 11,008 features, the best way "
    "of TSVD-common is 1.1 to 2 times as fast as TSVD with 8,192 rows."
)


def fastest(row: dict, *kinds: str, times: str = "ms") -> str | None:
    """The way of these kinds that takes the least time, if there is one."""
    found = {name: ms for name, ms in row[times].items() if name.split()[0] in kinds}
    return min(found, key=found.get) if found else None


def best(row: dict, *kinds: str, times: str = "ms") -> float | None:
    """Dense time over that of the fastest way of these kinds."""
    name = fastest(row, *kinds, times=times)
    return None if name is None else row[times]["dense"] / row[times][name]


def find(rows: list[dict], layer: str, count: int, ratio: float) -> dict | None:
    wanted = layer, count, ratio
    return next((r for r in rows if (r["layer"], r["rows"], r["ratio"]) == wanted), None)


def least(rows: list[dict], counts: range) -> float | None:
    """The least of XLA's time over the fused kernel's with the same factors, for some rows."""
    return min((
        row["ms"][f"xla {name.split()[1]}"] / ms for row in rows for name, ms in row["ms"].items()
        if name.startswith("fused") and row["rows"] in counts
    ), default=None)  # fmt: skip


def common(rows: list[dict], layer: str, ratio: int) -> float | None:
    """TSVD's time over TSVD-common's, of 8,192 rows."""
    row = find(rows, layer, 8192, ratio)
    found = row and best(row, *COMMON_WAYS)
    return found and found / best(row, *TSVD)


def aims(rows: list[dict], common_rows: list[dict]) -> str:
    """Every aim and what was reached; `common_rows` are those of TSVD-common's own run."""
    cases = []
    for (layer, count), wanted in AIMS.items():
        for ratio, aim in zip(RATIOS, wanted, strict=True):
            of = lambda rows, key=(layer, count, ratio): (r := find(rows, *key)) and best(r, *TSVD)
            cases.append((f"TSVD beside dense, {layer}, {count:,} rows, {ratio}x", aim, of))
    for layer, count in (("llama-7b out", 1), ("llama-7b out", 16), ("gpt2-m up", 1),
                         ("gpt2-m up", 16)):  # fmt: skip
        for ratio in RATIOS:
            of = lambda rows, key=(layer, count, ratio): (r := find(rows, *key)) and best(r, *TSVD)
            told = f"TSVD beside dense, {layer}, a chain, {count} row{'s' * (count > 1)}, {ratio}x"
            cases.append((told, 0.7 * ratio, of))
    for counts, told in ((range(4096, 8193), "4,096 rows and more"), (range(512, 513), "512 rows"),
                         (range(65), "64 rows or fewer")):  # fmt: skip
        of = lambda rows, counts=counts: least(rows, counts)
        cases.append((f"fused beside XLA, same factors, T up to 512, the least, {told}", 1, of))
    for layer, ratio in itertools.product(("llama-7b out", "gpt2-m up"), RATIOS):
        of = lambda _, key=(layer, ratio): common(common_rows, *key)
        cases.append((f"TSVD-common beside TSVD, {layer}, 8,192 rows, {ratio}x", 1, of))
    tell = lambda x, aim: "-" if x is None else f"{x:.2f}, {'yes' if x >= aim else 'no'}"
    body = [[told, f"{aim:.3g}", tell(of(rows), aim)] for told, aim, of in cases]
    return table(["times as fast", "aim", "reached"], body)


def by_tile(rows: list[dict]) -> str:
    """Microseconds of the ways with tiled factors, few rows, by size of the tiles."""
    body, kinds = [], [kind for kind in TSVD if kind != "resident"]
    for row in (row for row in rows if row["rows"] <= 64 and row["layer"] in DETAILED):
        for size in (256, 512):
            found = {kind: row["ms"].get(f"{kind} {size}") for kind in kinds}
            own = {kind: ms for kind, ms in found.items() if ms is not None}
            body.append([
                row["layer"], str(row["rows"]), f"{row['ratio']:.0f}x", str(size),
                str(round(size / (2 * row["ratio"]))),
                *("-" if ms is None else number(1e3 * ms) for ms in found.values()),
                KINDS[min(own, key=own.get)],
            ])  # fmt: skip
    head = ["layer", "rows", "compression", "T", "rank", *(f"{KINDS[k]}, us" for k in kinds)]
    return table([*head, "fastest"], body)


def few_rows(rows: list[dict]) -> str:
    """The same of one row in a chain: bytes, and what the kernels take whatever they read."""
    mine = [find(rows, "llama-7b out", 1, ratio) for ratio in RATIOS]
    whole = 2 * 4096**2
    us = lambda ratio: 1e6 * whole / ratio / BANDWIDTH
    dense = 1e3 * mine[-1]["ms"]["dense"]
    kernel = lambda row: 1e3 * max(row["kernels_ms"]["split 256"].values())
    listed = lambda values: ", ".join(f"{x:.1f}" for x in values)
    least = find(rows, "gpt2-m up", 1, 8)
    return (
        f"One row by 4,096 x 4,096: the dense matrix is {whole / 1e6:.0f} MB, {us(1):.1f} us at "
        f"4.8 TB/s, and takes {dense:.1f}. At 2x, 4x, 8x the factors are {listed(map(us, RATIOS))} "
        f"us, and a layer takes {listed(1e3 * r['ms']['split 256'] for r in mine)}. It is two "
        "launches, the kernel for few rows and what adds up its parts, rounds them and pads them "
        "for the next: by the profiler the kernel takes "
        f"{listed(map(kernel, mine))} us, the other 1.1, which is what XLA's smallest take, and "
        f"little is between them. Of 1,024 x 4,096 at 8x, 1 MB in all, the kernel takes "
        f"{kernel(least):.1f}: that much it takes to start, to wait for its first tiles, to "
        "multiply and to write. 0.7 of the compression would be "
        f"{listed(dense / (0.7 * r) for r in RATIOS)} us for all of it: at 4x and 8x less than two "
        "launches that read nothing. XLA's two products are two launches for one row and three "
        "for 16, where it transposes in between; a dense product is two as well, cut in its depth "
        "and added up.\n\n"
        "What was tried in single runs, of which no result is kept, and taken out again: one "
        "launch, the thread blocks of a column of tiles as a cluster, which add up their parts "
        "through each other's shared memory, also such that it starts beside the layer before "
        "(commit 75b3828); fewer and larger copies, up to a whole tile by one, copies by one warp "
        "instead of four, slots for everything a thread block reads, products that are not waited "
        "for one by one (commits 91b6f57 and b22d953)."
    )


def beside_tsvd(rows: list[dict]) -> str:
    """Every way of TSVD-common and the best of TSVD, times as fast as dense."""
    body = []
    for row in rows:
        gains = [best(row, *TSVD), *(best(row, kind) for kind in COMMON_WAYS)]
        name = fastest(row, *COMMON_WAYS)
        body.append([
            row["layer"], f"{row['rows']:,}", f"{row['ratio']:.0f}x",
            number(1e3 * row["ms"]["dense"]), *map(number, gains), name.removeprefix("common-"),
        ])  # fmt: skip
    head = ["layer", "rows", "compression", "dense us", "TSVD"]
    return table([*head, *(KINDS[kind] for kind in COMMON_WAYS), "fastest"], body)


def section(rows: list[dict], common_rows: list[dict]) -> list[str]:
    """The aims, and why those that are missed are missed."""
    return [
        "## What was aimed at", AIMED, aims(rows, common_rows), MANY, "Why the misses miss:",
        few_rows(rows), MEDIUM, FUSED, COMMON,
    ]  # fmt: skip
