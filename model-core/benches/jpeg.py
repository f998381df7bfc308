#!/usr/bin/env python3
"""Times our JPEG decoder beside libjpeg-turbo (in Pillow), in turns, at the scales that the two shipped models ask for.

    cargo build --release --example decode && model-core/benches/jpeg.py

Needs Pillow and numpy (Debian: python3-pil, python3-numpy). The pictures are an enlarged test image with noise.
"""

import io
import pathlib
import re
import subprocess
import tempfile
import time

import numpy
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
DECODE = ROOT / "target/release/examples/decode"
LINE = re.compile(r"for (\d+) x .* at 1/(\d), ([\d.]+) ms")


def beside(data, scale):
    """Milliseconds of libjpeg-turbo, the best of half a second."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        begun = time.perf_counter()
        image = Image.open(io.BytesIO(data))
        if scale > 1:
            image.draft("RGB", tuple(-(-side // scale) for side in image.size))
        image.load()
        best = min(best, time.perf_counter() - begun)
    return 1e3 * best


def main():
    photo = Image.open(ROOT / "tests/images/photo-coffee.jpg").convert("RGB")
    noise = numpy.random.default_rng(1)
    print("| picture | for a side of | scale | ours, ms | libjpeg-turbo, ms | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in (640, 480), (1920, 1080), (4000, 3000):
            pixels = numpy.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
            picture = Image.fromarray((pixels + noise.normal(0, 3, pixels.shape)).clip(0, 255).astype("uint8"))
            for progressive in False, True:
                path = pathlib.Path(folder, "picture.jpg")
                picture.save(path, quality=85, subsampling=2, progressive=progressive)
                lines = subprocess.run([DECODE, path], capture_output=True, text=True, check=True).stdout
                for side, scale, ours in LINE.findall(lines):
                    theirs = beside(path.read_bytes(), int(scale))
                    kind = "progressive" if progressive else "baseline"
                    print(f"| {width} x {height} {kind} | {side} | 1/{scale} | {float(ours):.2f} | {theirs:.2f} "
                          f"| {float(ours) / theirs:.1f} |", flush=True)


if __name__ == "__main__":
    main()
