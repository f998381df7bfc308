#!/usr/bin/env python3
"""Writes what EfficientNet-Lite0 makes of photographs: soft labels for `butterflyvit-trainer train --soft-labels`.

    pip install -r trainer/scripts/requirements.txt
    trainer/scripts/soft_labels.py --size 192 --out lite0.safetensors data/caltech data/grocery data/trash

Every DATA is a folder as the trainer takes it: one subfolder of images per class, directly or below `train`. ONNX Runtime
sees the centre of each image. The result has `probabilities` (f16, [images, 1000]), `digests` (SHA-256 of each file's
bytes, by which the trainer recognises an image) and, in its metadata, `labels`. `--temperature` above 1 makes the
distributions softer.
"""
import argparse
import hashlib
import json
import pathlib

import numpy as np
from PIL import UnidentifiedImageError

from lite0_onnx import pixels, session, square

LABELS = pathlib.Path(__file__).parent.parent / "src/import/imagenet_labels.txt"


def images(data):
    part = data / "train" if (data / "train").is_dir() else data
    classes = sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folder in classes:
        yield from sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=192, help="side of the network's input in pixels")
    parser.add_argument("--temperature", type=float, default=1.0, help="what logits are divided by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("data", type=pathlib.Path, nargs="+")
    args = parser.parse_args()
    lite0, found = session(args.size, args.threads), {}
    for path in (path for data in args.data for path in images(data)):
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest in found:
            continue
        try:
            picture = square(path, args.size)
        except (UnidentifiedImageError, OSError) as error:
            print(f"{path} is no usable image and is left out: {error}")
            continue
        logits = lite0.run(["logits"], {"pixels": pixels(picture)})[0][0] / args.temperature
        odds = np.exp(logits - logits.max())
        found[digest] = (odds / odds.sum()).astype("<f2")
    if not found:
        parser.error("there is no image")
    write(args.out, list(found), np.stack(list(found.values())), LABELS.read_text().splitlines())
    print(f"{len(found)} images in {args.out}")


def write(out, digests, probabilities, labels):
    """As https://github.com/huggingface/safetensors lays it out."""
    tensors = {"digests": ("U8", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)),
               "probabilities": ("F16", probabilities)}
    header, data = {"__metadata__": {"labels": json.dumps(labels)}}, b""
    for name, (dtype, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write_bytes(len(text).to_bytes(8, "little") + text + data)


if __name__ == "__main__":
    main()
