#!/usr/bin/env python3
"""Estimates times on a Raspberry Pi 4 and 5 from a pipeline model of the compiled inner loops. No Pi is involved.

The loop of the integer product is taken from the cross-compiled binary and given to llvm-mca, which knows the pipelines
of Cortex-A72 and Cortex-A76; the float work is counted in vector operations (see FLOAT_OPERATIONS) and divided by what
the CPU can start in a cycle. Memory is taken to be free and nothing to overlap, so this says what to expect within a
factor, not more.

    apt-get install llvm-19
    tests/cross cargo build --release --target aarch64-unknown-linux-gnu -p butterflyvit
    python3 model-core/benches/estimate_arm.py
"""

import argparse
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = ROOT / "target/cross/aarch64-unknown-linux-gnu/release/butterflyvit"

# The preset `paper`: 64 tokens, top-2 of 64 experts, d_model 256, d_ff 1024, 4 and 4 stages, 7 layers, 8 heads.
TOKENS, ROWS, D_MODEL, D_FF, LAYERS, EXPERTS, STAGES = 64, 128, 256, 1024, 7, 64, 4
TERNARY_MACS = (ROWS + TOKENS) * D_MODEL * D_FF
INT8_MACS = 4 * TOKENS * D_MODEL * D_MODEL

# Vector operations (four floats) of what is not an integer product, for one layer.
FLOAT_OPERATIONS = {
    # Per pair of angles two loads and two moves, nothing in fours.
    "decode": 4 * EXPERTS * STAGES * (D_MODEL + D_FF) // 2,
    # A pair takes four multiplications and additions.
    "rotate": ROWS * STAGES * (D_MODEL + D_FF) * 2 // 4,
    "gelu": ROWS * D_FF * 18 // 4,
    "router": TOKENS * D_MODEL * EXPERTS // 4,
    "scale": (ROWS * D_FF + TOKENS * D_MODEL) * 4 // 4,
    "quantise": (ROWS * D_MODEL + TOKENS * D_FF + 2 * TOKENS * D_MODEL) * 6 // 4,
    "weighted sum": ROWS * D_FF * 2 // 4,
    "attention": 2 * TOKENS * TOKENS * D_MODEL // 4 + 8 * TOKENS * TOKENS * 20 // 4,
}

CPUS = [
    # Name, gigahertz, inner loop, its multiplication, how many of them, multiply-accumulates of each, float operations
    # that start in a cycle, int8 product's time over the ternary one's (three instructions in place of two on the A72).
    ("Raspberry Pi 4", "cortex-a72", 1.8, "4dots", "smlal", 64, 8, 1, 1.5),
    ("Raspberry Pi 5", "cortex-a76", 2.4, "8dots_dot", "sdot", 64, 16, 2, 1.0),
]


def functions(binary):
    """Addresses and instructions by function."""
    listing = subprocess.check_output(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", binary], text=True)
    found, current = {}, []
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:", line):
            current = found.setdefault(start[1], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            current.append((int(instruction[1], 16), instruction[2]))
    return found


def inner_loop(found, name, multiplication, count):
    """The shortest loop with so many multiplications that also unpacks weights (shifts them right)."""
    loops = []
    for instructions in (body for function, body in found.items() if name in function):
        index = {address: i for i, (address, _) in enumerate(instructions)}
        for end, (_, text) in enumerate(instructions):
            target = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\s.*?([0-9a-f]+) <", text)
            begin = index.get(int(target[1], 16), end + 1) if target else end + 1
            loop = [text for _, text in instructions[begin : end + 1]]
            if sum(t.startswith(multiplication) for t in loop) == count and any(t.startswith("ushr") for t in loop):
                loops.append(loop)
    return min(loops, key=len)


def cycles(loop, cpu):
    lines = [re.sub(r"[0-9a-f]+ <[^>]*>", "top", re.sub(r"\s*//.*", "", text)) for text in loop]
    command = ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=100"]
    report = subprocess.run(command, input="top:\n" + "\n".join(lines), text=True, capture_output=True, check=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", report.stdout)[1]) / 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default=BINARY, type=pathlib.Path)
    found = functions(parser.parse_args().binary)
    for board, cpu, ghz, name, multiplication, count, macs, per_cycle, int8 in CPUS:
        loop = inner_loop(found, name, multiplication, count)
        took = cycles(loop, cpu)
        per_mac = took / (count * macs)
        layer = TERNARY_MACS * per_mac
        attention = INT8_MACS * per_mac * int8 + FLOAT_OPERATIONS["attention"] / per_cycle
        floats = (sum(FLOAT_OPERATIONS.values()) - FLOAT_OPERATIONS["attention"]) / per_cycle
        milliseconds = 1e3 / (ghz * 1e9)
        print(
            f"{board} ({cpu}, {ghz} GHz): inner loop of {len(loop)} instructions in {took:.0f} cycles, "
            f"{1 / per_mac:.1f} MAC/cycle; layer {(layer + floats) * milliseconds:.1f} ms "
            f"(products {layer * milliseconds:.1f}), model {LAYERS * (layer + floats + attention) * milliseconds:.0f} ms"
        )


if __name__ == "__main__":
    main()
