#!/usr/bin/env python3
"""Draws time and memory of one mixture-of-experts layer against its number of experts, ours beside dense f32 ones.

Runs `butterflyvit bench` on one thread with the preset `paper`, a few rounds, and takes the best time of each.

    pip install -r model-core/benches/requirements.txt
    cargo build --release
    python3 model-core/benches/plot_experts.py docs/experts.svg
"""

import argparse
import json
import pathlib
import subprocess

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXPERTS = [8, 16, 32, 64, 128, 256]


def bench(binary):
    command = [binary, "bench", "--json", "--threads", "1", "--duration", "300ms"]
    command += ["--experts", ",".join(map(str, EXPERTS))]
    return json.loads(subprocess.check_output(command))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--binary", default=ROOT / "target/release/butterflyvit", type=pathlib.Path)
    parser.add_argument("--rounds", default=3, type=int)
    args = parser.parse_args()
    rounds = [bench(args.binary) for _ in range(args.rounds)]

    def series(layer, value, choose):
        return [choose(value(run["results"][i][layer]) for run in rounds) for i in range(len(EXPERTS))]

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "experts", "font.size": 10})
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, title, value in [
        (time, "time of a layer, ms", lambda layer: layer["time"]["best_ms"]),
        (memory, "memory of a layer, MB", lambda layer: layer["resident_bytes"] / 1e6),
    ]:
        for name, layer in [("dense f32 experts", "dense_layer"), ("butterfly experts", "layer")]:
            ys = series(layer, value, min)
            axis.plot(EXPERTS, ys, marker="o", label=name)
            print(f"{title}, {name}: " + ", ".join(f"{n}: {y:.3f}" for n, y in zip(EXPERTS, ys)))
        axis.set(title=title, xscale="log", yscale="log", xlabel="experts", xticks=EXPERTS, xticklabels=EXPERTS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"d_model 256, d_ff 1024, 64 tokens, top-2; {rounds[0]['isa']}, one thread")
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
