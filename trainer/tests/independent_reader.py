"""An independent reader of ButterflyViT artifacts, written from FORMAT.md and from nothing else. Needs NumPy.

    independent_reader.py BACKBONE EXPERT_SET WIDTH HEIGHT [LENDER] < RGB8

reads one RGB8 image of WIDTH x HEIGHT from standard input and prints {"pixels": [..], "logits": [..], "labels": [..],
"distance": ..} as JSON, the last null for a set without statistics. LENDER is the set whose experts EXPERT_SET borrows.
"""
import hashlib
import json
import math
import sys

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "I16": "<i2", "I8": "i1", "U8": "u1"}


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
    assert document["format_version"] in (1, 2)
    if document["format_version"] == 1:
        document = from_version_1(document)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[info["dtype"]]).reshape(info["shape"])
    return document, tensors, digest


def from_version_1(document):
    """The document of version 2 that says the same (section 2.3)."""
    def backbone(config):
        layers = [{**{key: layer[key] for key in ("channels", "kernel", "stride")}, "padding": [layer["padding"]] * 4,
                   "groups": 1, "norm": layer["norm_gelu"], "activation": "gelu" if layer["norm_gelu"] else "none",
                   "residual": i if layer["residual"] else None} for i, layer in enumerate(config["stem"])]
        return {**config, "stem": layers}

    if document["kind"] == "backbone":
        return {**document, "config": backbone(document["config"])}
    config = document.pop("backbone_config")
    document["backbone"] = {key: config[key] for key in ("d_model", "d_ff", "num_layers")}
    return {**document, "temperature": 1.0}


def unpack_ternary(packed, count, packing):
    """Weights -1, 0, 1 (section 3, packing)."""
    if packing == "two_bits":
        codes = unpack(packed, count, 2)
    else:
        assert packed.max() <= 242, "five trits"
        codes = (packed[..., None] // 3 ** np.arange(5) % 3).reshape(*packed.shape[:-1], -1).astype(np.int64)
        assert not codes[..., count:].any(), "padding"
        codes = codes[..., :count]
    assert codes.max() <= 2
    return codes - 1


def splitmix64(seed, n):
    mask = 2**64 - 1
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def seeded_codes(source, block, site, experts, stages, pairs, angle_bits):
    """Angle codes [experts, stages, pairs] (section 3, angles from a seed)."""
    assert source["generator"] == "splitmix64"
    seed, m = splitmix64(source["seed"], 3 * block + site), source["spread_bits"]
    numbers = -(-pairs * m // 64)
    codes = np.zeros((experts * stages, pairs), np.int64)
    for row in range(experts * stages):
        stream = sum(splitmix64(seed, row * numbers + k) << (64 * k) for k in range(numbers))
        for j in range(pairs):
            code = (stream >> (j * m)) % 2**m
            codes[row, j] = (code - 2**m if code >= 2 ** (m - 1) else code) % 2**angle_bits
    return codes.reshape(experts, stages, pairs)


def symmetric(triangle):
    """The matrix whose lower triangle is given row by row."""
    side = int((math.isqrt(8 * len(triangle) + 1) - 1) // 2)
    matrix = np.zeros((side, side))
    matrix[np.tril_indices(side)] = triangle
    return matrix + np.tril(matrix, -1).T


def distance(x, mean, covariance):
    return (x - mean) @ np.linalg.solve(covariance, x - mean)


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


def fold(features, projection):
    """The features that a set sees in place of all of them."""
    assert projection["form"] == "folded"
    folded = np.zeros(projection["features"])
    for i, value in enumerate(features):
        negative = splitmix64(0, i // 64) >> i % 64 & 1
        folded[i % len(folded)] += -value if negative else value
    return folded


class Model:
    """The forward pass of section 5, in float64."""

    def __init__(self, backbone_path, expert_set_path, lender_path=None):
        backbone, self.shared, digest = read(backbone_path)
        experts, self.own, set_digest = read(expert_set_path)
        assert backbone["kind"] == "backbone" and experts["kind"] == "expert_set"
        self.config, self.experts, self.preprocessing = backbone["config"], experts["config"], backbone["preprocess"]
        self.labels, self.temperature = experts["labels"], experts["temperature"]
        self.familiarity, self.projection = experts.get("familiarity"), experts.get("projection")
        self.check(experts, digest)
        self.lent = self.own
        if experts.get("borrowed_experts"):
            lender, self.lent, lender_digest = read(lender_path)
            assert experts["borrowed_experts"] == lender_digest != set_digest
            assert not lender.get("borrowed_experts") and lender["config"] == experts["config"]
            self.check(lender, digest)

    def check(self, experts, digest):
        assert experts["backbone_digest"] == digest
        assert all(self.config.get(key) == value for key, value in experts["backbone"].items())

    def weights(self, name, tensors=None):
        """Weight and bias of a linear layer."""
        tensors = tensors or self.shared
        weight, bias = (tensors[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        if f"{name}.weight_scale" in tensors:
            assert weight.min() >= -127
            scale = tensors[f"{name}.weight_scale"].astype(np.float64)
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight, bias

    def linear(self, x, name, tensors=None):
        weight, bias = self.weights(name, tensors)
        return x @ weight.T + bias

    def norm(self, x, name):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * self.shared[f"{name}.gamma"] + self.shared[f"{name}.beta"]

    def substrate(self, block, site, cols):
        substrates = self.config.get("substrates", {"shared": False, "packing": "two_bits"})
        name = f"moe.{site}.codes" if substrates["shared"] else f"blocks.{block}.moe.{site}.codes"
        weights = unpack_ternary(self.shared[name], cols, substrates["packing"])
        return weights * self.shared[f"blocks.{block}.moe.{site}.scale"].astype(np.float64)[:, None]

    def angles(self, block, site, name, features, stages):
        experts, bits = self.experts["num_experts"], self.experts["angle_bits"]
        if stages == 0:
            return np.zeros((experts, 0, features // 2))
        if self.experts.get("angle_seed"):
            codes = seeded_codes(self.experts["angle_seed"], block, site, experts, stages, features // 2, bits)
        else:
            codes = unpack(self.lent[f"blocks.{block}.moe.{name}"], features // 2, bits)
        return 2 * math.pi * codes / 2**bits

    def router(self, block, d_model):
        codes = self.lent[f"blocks.{block}.moe.router"]
        if self.experts["router_bits"] == 4:
            codes = unpack(codes, d_model, 4)
            codes = np.where(codes >= 8, codes - 16, codes)
            assert codes.min() >= -7
        return codes * self.lent[f"blocks.{block}.moe.router_scale"].astype(np.float64)[:, None]

    def int4(self, name, d_model):
        codes = unpack(self.own[f"familiarity.{name}.codes"], d_model, 4)
        codes = np.where(codes >= 8, codes - 16, codes)
        assert codes.min() >= -7
        return codes * self.own[f"familiarity.{name}.scale"].astype(np.float64)[:, None]

    def stem(self, x):
        inputs = []
        for i, layer in enumerate(self.config["stem"]):
            inputs.append(x)
            kernel, stride, groups = layer["kernel"], layer["stride"], layer["groups"]
            top, left, bottom, right = layer["padding"]
            weight, bias = self.weights(f"stem.{i}.conv")
            padded = np.pad(x, ((top, bottom), (left, right), (0, 0)))
            side = (x.shape[0] + top + bottom - kernel) // stride + 1
            outputs, own = layer["channels"] // groups, x.shape[2] // groups
            y = np.empty((side, side, layer["channels"]))
            for r in range(side):
                for c in range(side):
                    window = padded[r * stride:r * stride + kernel, c * stride:c * stride + kernel]
                    for g in range(groups):
                        o = slice(g * outputs, (g + 1) * outputs)
                        y[r, c, o] = bias[o] + np.tensordot(weight[o], window[:, :, g * own:(g + 1) * own], 3)
            if layer["norm"]:
                y = self.norm(y, f"stem.{i}.norm")
            y = {"none": lambda y: y, "relu6": lambda y: np.clip(y, 0, 6), "gelu": gelu}[layer["activation"]](y)
            x = y if layer["residual"] is None else y + inputs[layer["residual"]]
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
        up, down = self.substrate(block, "up", d_model), self.substrate(block, "down", d_ff)
        rotation_in = self.angles(block, 0, "rotation_in", d_model, config["stages_in"])
        rotation_hidden = self.angles(block, 1, "rotation_hidden", d_ff, config["stages_hidden"])
        rotation_out = self.angles(block, 2, "rotation_out", d_model, config["stages_out"])
        router = self.router(block, d_model)
        y = np.zeros_like(z)
        for t, token in enumerate(z):
            logits = router @ token
            chosen = np.argsort(-logits, kind="stable")[:config["top_k"]]
            for e, weight in zip(chosen, softmax(logits[chosen])):
                a = gelu(rotate(up @ rotate(token, rotation_in[e]), rotation_hidden[e]))
                y[t] += weight * rotate(down @ a, rotation_out[e])
        return y

    def features(self, pixels):
        x = self.stem(pixels.astype(np.float64))
        for block in range(self.config["num_layers"]):
            x = x + self.attention(self.norm(x, f"blocks.{block}.norm1"), block)
            x = x + self.moe(self.norm(x, f"blocks.{block}.norm2"), block)
        features = self.norm(x, "norm").mean(0)
        return features if self.projection is None else fold(features, self.projection)

    def logits(self, features):
        return self.linear(features, "head", self.own) / self.temperature

    def distance(self, features):
        """What an unknown image exceeds the threshold by (section 5, unknown)."""
        if self.familiarity is None:
            return None
        form, tensor = self.familiarity["covariance"], lambda name: self.own[f"familiarity.{name}"].astype(np.float64)
        background = None
        if "background.covariance" in self.shared:
            background = symmetric(self.shared["background.covariance"].astype(np.float64))
        if form["form"] == "even":
            length = features @ features
            scaled = features * np.sqrt(len(features) / length) if length else features
            factor = self.int4("factor", len(features)) if form["rank"] else np.zeros((1, len(features)))
            covariance = form["scale"] * np.eye(len(features)) + factor.T @ factor
            return min(distance(scaled, mean, covariance) for mean in self.int4("means", len(features)))
        if form["form"] == "packed":
            covariance = symmetric(tensor("covariance"))
        else:
            covariance = form["scale"] * background if form["form"] == "background" else np.diag(tensor("diagonal"))
            if form["rank"]:
                covariance = covariance + tensor("factor").T @ tensor("factor")
        nearest = min(distance(features, mean, covariance) for mean in tensor("means"))
        if self.familiarity["relative"]:
            nearest -= distance(features, self.shared["background.mean"].astype(np.float64), background)
        return nearest


def main():
    backbone, expert_set, width, height, *lender = sys.argv[1:]
    model = Model(backbone, expert_set, *lender)
    image = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(int(height), int(width), 3)
    pixels = preprocess(image, model.config["image_size"], model.preprocessing)
    features = model.features(pixels)
    json.dump({"pixels": pixels.ravel().tolist(), "logits": model.logits(features).tolist(), "labels": model.labels,
               "distance": model.distance(features)}, sys.stdout)


if __name__ == "__main__":
    main()
