"""The time of a step and of the paper's search on an H200, modelled: `python -m harness.measure model`.

traffic.py lists the launches of a step. Each takes what its bytes take at BANDWIDTH or what its instructions take at
ISSUE, whichever is more, and LAUNCH in a captured graph; launches follow each other, on side streams too. A
multiprocessor has as many blocks as the fullest one. Latency, conflicts of banks and cache misses of what counts as
read once are left out, so that a measurement will be slower.

PATHS are the instructions of a thread, counted in the SASS of the kernels for sm_90, float32, where memory is aligned:
`cuobjdump -sass LIBRARY > FILE; python -m harness.measure model --sass FILE` prints the blocks of code between jumps
with their multiply-adds, loads and stores, of which the table has the sums along the path that is taken.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
import subprocess

from harness.measure import traffic

PROCESSORS, CLOCK = 132, 1.98e9  # of an H200
BANDWIDTH = traffic.RATES[1]
ISSUE = 4 * 32  # instructions of a thread that a multiprocessor issues in a cycle
CACHE = 64  # bytes that a multiprocessor reads in a cycle
LAUNCH = 1.5e-6  # seconds, assumed
THREADS = 256  # of a block
EPOCHS, WARM_UP, STEPS = 25, 10, 261  # of a stage of the paper's search

# Of a thread: for each channel that it computes of z, with the taps of kernels 1, 3 and 5, by results of a thread and
# stride (convolution); for each result that it reads (between), by channels of a thread; for each 128 pixels of a block
# (pointwise), by weights of a block; for each map that it adds up (input) and each tile (weight), with taps, by stride.
PATHS = {
    "convolution": {
        (16, 1): (225, {1: 24, 3: 83, 5: 191}),
        (32, 1): (195, {1: 18, 3: 57, 5: 129}),
        (64, 1): (194, {1: 8, 3: 27, 5: 66}),
        (16, 2): (457, {1: 24, 3: 96, 5: 196}),
        (32, 2): (295, {1: 18, 3: 55, 5: 115}),
        (64, 2): (247, {1: 8, 3: 31, 5: 73}),
    },
    "between": {16: 94, 32: 92, 64: 97},
    "pointwise": {16: 290, 32: 793},
    "input": {1: (172, {1: 16, 3: 77, 5: 187}), 2: (172, {1: 14, 3: 45, 5: 105})},
    "weight": {1: (185, {3: 72, 5: 160}), 2: (460, {3: 63, 5: 155})},
}
# Of the kernels that have a pixel for each thread or some, for each element that they read or write.
OF_ELEMENTS = {"mixed_forward": 17, "mixed_backward_sums": 15, "terms": 38, "pool": 93, "pool_input": 80}


def up(a: float, b: float) -> int:
    return math.ceil(a / b)


def channels_of_thread(n: int) -> int:
    """Return how many of n channels a thread takes, as with_channels of kernels/csrc/cuda/cell.cu."""
    return min((16, 32, 64), key=lambda each: up(n, each) * (each + 24))


def work(kernel: str, parts) -> list[tuple[int, float]]:
    """Return the blocks of each convolution of a launch, and the instructions of all threads of a block."""
    found = []
    for part in parts:
        pixels = part.n * part.height * part.width
        if kernel == "pointwise":
            side = 16 if max(part.channels, part.out) <= 16 else 32
            of_weights = up(part.channels, side) * up(part.out, side)
            blocks = of_weights * min(up(pixels, 128), up(528, of_weights * len(parts)))
            found.append((blocks, THREADS * PATHS[kernel][side] * of_weights * up(pixels, 128) / blocks))
            continue
        if kernel == "convolution":
            each = channels_of_thread(max(p.out for p in parts))
            base, taps = PATHS[kernel][each, part.stride]
            threads, count = up(part.out, each) * pixels / (64 // each), part.channels * (base + taps[part.kernel])
        elif kernel == "between":
            each = channels_of_thread(max(p.channels for p in parts))
            threads, count = up(part.channels, each) * pixels / (64 // each), part.out * PATHS[kernel][each]
        else:
            base, taps = PATHS[kernel][part.stride]
            rows = 4 // part.stride if kernel == "input" else 4
            threads, count = part.channels * pixels / rows, base + taps[part.kernel]
        found.append((up(threads, THREADS), THREADS * count))
    return found


def seconds(launch: traffic.Launch) -> tuple[float, float, float]:
    """Return what a launch takes by its bytes, by its instructions, and as a whole."""
    if launch.parts:
        blocks = work(launch.kernel, launch.parts)
    else:
        elements = launch.bytes / 4
        blocks = [(up(elements, 1024), 1024 * OF_ELEMENTS.get(launch.kernel, 0))]
    count = sum(n for n, _ in blocks)
    of_block = sum(n * instructions for n, instructions in blocks) / max(1, count)
    by_bytes = launch.bytes / min(BANDWIDTH, max(1, count) * CACHE * CLOCK)
    by_instructions = up(count, PROCESSORS) * of_block / ISSUE / CLOCK
    return by_bytes, by_instructions, max(by_bytes, by_instructions) + LAUNCH


def search_minutes(steps: dict[tuple[int, str], float]) -> float:
    """Return the minutes of the paper's search, from the seconds of a step by stage and kind."""
    epochs = {"weights": EPOCHS, "alphas": EPOCHS - WARM_UP}
    return sum(epochs[which] * STEPS * time for (_, which), time in steps.items()) / 60


def blocks_of(sass: str):
    """Yield the kernel, address, instructions, multiply-adds, loads and stores of each block of code between jumps."""
    for body in sass.split("Function : ")[1:]:
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)]
        ends = [(at, text) for at, text in code if re.search(r"BRA|EXIT|RET", text)]
        jumps = {at: re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text) for at, text in ends}
        starts = {at + 16 for at in jumps} | {int(to[1], 16) for to in jumps.values() if to}
        block = []
        for at, text in [*code, (None, "")]:
            if block and (at is None or at in starts):
                counts = (sum(name in line for _, line in block) for name in ("FFMA", "LDS", "LDG", "STS", "STG"))
                yield body.split()[0], f"{block[0][0]:x}", len(block), *counts
                block = []
            block.append((at, text))


def print_blocks(path: str):
    names = ("kernel", "address", "instructions", "FFMA", "LDS", "LDG", "STS", "STG")
    lines = ["\t".join(map(str, row)) for row in (names, *blocks_of(pathlib.Path(path).read_text()))]
    print(subprocess.run(["c++filt"], input="\n".join(lines), capture_output=True, text=True, check=True).stdout)


def print_table(args):
    """Print the milliseconds of each kind of launch by stage and kind of step, and return the rows."""
    if args.sass:
        return print_blocks(args.sass)
    table, steps = collections.defaultdict(dict), {}
    for row, counted in traffic.counted_rows(args, ("cells",)):
        column = row["stage"], row["step of"]
        for launch in counted.each:
            of_kernel = table[launch.kernel].setdefault(column, [0, 0.0, 0.0, 0.0])
            for i, more in enumerate((1, *seconds(launch))):
                of_kernel[i] += more
        steps[column] = sum(of[column][3] for of in table.values() if column in of)
    heads = [f"{which}, stage {stage}" for stage, which in steps]
    print("\n| kernel | " + " | ".join(heads) + " |\n|" + " --- |" * (len(heads) + 1))
    rows = []
    for kernel, of in sorted(table.items(), key=lambda item: -sum(times[3] for times in item[1].values())):
        cells = [of.get(column, (0, 0, 0, 0)) for column in steps]
        print(f"| `{kernel}` | " + " | ".join(f"{1e3 * total:.2f} ({n})" for n, _, _, total in cells) + " |")
        for column, (n, by_bytes, by_instructions, total) in zip(heads, cells):
            numbers = {"launches": n, "ms": 1e3 * total, "of bytes": 1e3 * by_bytes, "of work": 1e3 * by_instructions}
            rows.append({"kernel": kernel, "step of": column, **numbers})
    print("| all | " + " | ".join(f"{1e3 * time:.2f}" for time in steps.values()) + " |")
    if len(steps) == 6:
        print(f"\nthe paper's search: {search_minutes(steps):.1f} minutes, modelled, not measured")
    return rows
