"""An independent reader of ButterflyViT artifacts, written from FORMAT.md and from nothing else. Needs NumPy.

    independent_reader.py BACKBONE EXPERT_SET WIDTH HEIGHT < RGB8

reads one RGB8 image of WIDTH x HEIGHT from standard input and prints {"pixels": [..], "logits": [..]} as JSON.
"""
import hashlib
import json
import math
import sys

import numpy as np

DTYPES = {"F32": "<f4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def read(path):
    """Document, tensors and digest of an artifact (sections 1 and 2)."""
    with open(path, "rb") as file:
        content = file.read()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    metadata = header.pop("__metadata__")
    text, digest = metadata["butterflyvit"], metadata["sha256"]
    assert hashlib.sha256(text.encode() + data).hexdigest() == digest, "damaged"
    document = json.loads(text)
    assert document["format_version"] == 1
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[info["dtype"]]).reshape(info["shape"])
    return document, tensors, digest


def unpack(packed, count, bits):
    """Codes of a packed tensor: a little-endian bit stream per row (section 3, packing)."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little").astype(np.int64)
    assert not stream[..., count * bits:].any(), "padding"
    codes = stream[..., :count * bits].reshape(*packed.shape[:-1], count, bits)
    return codes @ (1 << np.arange(bits))


def preprocess(image, side, config):
    """RGB8 [height, width, 3] to the input [side, side, 3] (section 4)."""
    height, width, _ = image.shape
    m = min(width, height)
    left, top = (width - m) // 2, (height - m) // 2
    square = image[top:top + m, left:left + m].astype(np.int64)
    assert config["resize"] == "center_crop_bilinear"
    if m != side:
        weights = resize_weights(m, side)
        clamp = lambda sums: np.clip((sums + (1 << 21)) >> 22, 0, 255)
        rows = clamp(np.einsum("ix,yxc->yic", weights, square))
        square = clamp(np.einsum("iy,yxc->ixc", weights, rows))
    mean, std = (np.array(config[key], np.float32) for key in ("mean", "std"))
    return (square.astype(np.float32) / np.float32(255) - mean) / std


def resize_weights(m, side):
    """Integer weights [side, m] of every input sample in every output sample."""
    scale = m / side
    support = max(scale, 1.0)
    weights = np.zeros((side, m), np.int64)
    for i in range(side):
        center = (i + 0.5) * scale
        start = math.floor(max(center - support + 0.5, 0.0))
        end = min(math.floor(center + support + 0.5), m)
        w = [max(1.0 - abs((x - center + 0.5) * (1.0 / support)), 0.0) for x in range(start, end)]
        total = 0.0
        for weight in w:
            total += weight
        weights[i, start:end] = [math.floor(0.5 + weight / total * 2**22) for weight in w]
    return weights


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(v, angles):
    """B(angles) v for one token; angles [stages, features / 2]."""
    v = v.copy()
    for stage, row in enumerate(angles):
        d = 1 << stage
        for b in range(len(v) // (2 * d)):
            for j in range(d):
                p, t = 2 * d * b + j, row[d * b + j]
                v[p], v[p + d] = (math.cos(t) * v[p] - math.sin(t) * v[p + d],
                                  math.sin(t) * v[p] + math.cos(t) * v[p + d])
    return v


class Model:
    """The forward pass of section 5, in float64."""

    def __init__(self, backbone_path, expert_set_path):
        backbone, self.shared, digest = read(backbone_path)
        experts, self.own, _ = read(expert_set_path)
        assert backbone["kind"] == "backbone" and experts["kind"] == "expert_set"
        assert experts["backbone_digest"] == digest and experts["backbone_config"] == backbone["config"]
        self.config, self.experts, self.preprocessing = backbone["config"], experts["config"], backbone["preprocess"]
        self.labels = experts["labels"]

    def linear(self, x, name, tensors=None):
        tensors = tensors or self.shared
        return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors[f"{name}.bias"]

    def norm(self, x, name):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * self.shared[f"{name}.gamma"] + self.shared[f"{name}.beta"]

    def substrate(self, name, cols):
        codes = unpack(self.shared[f"{name}.codes"], cols, 2)
        assert codes.max() <= 2
        return (codes - 1) * self.shared[f"{name}.scale"].astype(np.float64)[:, None]

    def angles(self, block, site, features, stages):
        if stages == 0:
            return np.zeros((self.experts["num_experts"], 0, features // 2))
        bits = self.experts["angle_bits"]
        return 2 * math.pi * unpack(self.own[f"blocks.{block}.moe.{site}"], features // 2, bits) / 2**bits

    def stem(self, x):
        for i, layer in enumerate(self.config["stem"]):
            kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
            weight, bias = (self.shared[f"stem.{i}.conv.{part}"].astype(np.float64) for part in ("weight", "bias"))
            padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
            side = (x.shape[0] + 2 * padding - kernel) // stride + 1
            y = np.empty((side, side, layer["channels"]))
            for r in range(side):
                for c in range(side):
                    window = padded[r * stride:r * stride + kernel, c * stride:c * stride + kernel]
                    y[r, c] = bias + np.tensordot(weight, window, 3)
            if layer["norm_gelu"]:
                y = gelu(self.norm(y, f"stem.{i}.norm"))
            x = x + y if layer["residual"] else y
        return x.reshape(-1, self.config["d_model"]) + self.shared["pos_embed"]

    def attention(self, z, block):
        d_model, heads = self.config["d_model"], self.config["num_heads"]
        h = d_model // heads
        qkv = self.linear(z, f"blocks.{block}.attention.qkv")
        mixed = []
        for n in range(heads):
            q, k, v = (qkv[:, part * d_model + n * h:part * d_model + (n + 1) * h] for part in range(3))
            mixed.append(softmax(q @ k.T / math.sqrt(h)) @ v)
        return self.linear(np.concatenate(mixed, -1), f"blocks.{block}.attention.proj")

    def moe(self, z, block):
        d_model, d_ff, config = self.config["d_model"], self.config["d_ff"], self.experts
        up = self.substrate(f"blocks.{block}.moe.up", d_model)
        down = self.substrate(f"blocks.{block}.moe.down", d_ff)
        rotation_in = self.angles(block, "rotation_in", d_model, config["stages_in"])
        rotation_hidden = self.angles(block, "rotation_hidden", d_ff, config["stages_hidden"])
        rotation_out = self.angles(block, "rotation_out", d_model, config["stages_out"])
        router = self.own[f"blocks.{block}.moe.router"] * self.own[f"blocks.{block}.moe.router_scale"][:, None]
        y = np.zeros_like(z)
        for t, token in enumerate(z):
            logits = router.astype(np.float64) @ token
            chosen = np.argsort(-logits, kind="stable")[:config["top_k"]]
            for e, weight in zip(chosen, softmax(logits[chosen])):
                a = gelu(rotate(up @ rotate(token, rotation_in[e]), rotation_hidden[e]))
                y[t] += weight * rotate(down @ a, rotation_out[e])
        return y

    def logits(self, pixels):
        x = self.stem(pixels.astype(np.float64))
        for block in range(self.config["num_layers"]):
            x = x + self.attention(self.norm(x, f"blocks.{block}.norm1"), block)
            x = x + self.moe(self.norm(x, f"blocks.{block}.norm2"), block)
        return self.linear(self.norm(x, "norm").mean(0), "head", self.own)


def main():
    backbone, expert_set, width, height = sys.argv[1:]
    model = Model(backbone, expert_set)
    image = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(int(height), int(width), 3)
    pixels = preprocess(image, model.config["image_size"], model.preprocessing)
    logits = model.logits(pixels)
    json.dump({"pixels": pixels.ravel().tolist(), "logits": logits.tolist(), "labels": model.labels}, sys.stdout)


if __name__ == "__main__":
    main()
