#!/usr/bin/env python3
"""Times `butterflyvit bench` beside ONNX Runtime on the same shapes, one thread each, and checks the ratios.

Rounds alternate between the two, so that whatever else the machine does hits both; a time is the best of all rounds,
and the median is printed beside it. ONNX Runtime gets every way it has to run a model in int8 (dynamic, static,
static per channel, block-quantised), and the fastest one counts. Weights are random: times do not depend on them.

    pip install -r model-core/benches/requirements.txt
    cargo build --release
    python3 model-core/benches/beside_onnxruntime.py --json figures.json
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# The preset `paper`.
D_MODEL, D_FF, TOKENS, HEADS, LAYERS, TOP_K, CLASSES = 256, 1024, 64, 8, 7, 2, 100
IMAGE, PATCH = 32, 4


class Graph:
    """Builds an ONNX graph node by node; methods return the name of what they add."""

    def __init__(self, seed=0):
        self.nodes, self.weights, self.random, self.count = [], [], np.random.default_rng(seed), 0

    def node(self, op, *inputs, domain="", outputs=1, **attributes):
        self.count += 1
        names = [f"{op}_{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value):
        self.count += 1
        self.weights.append(numpy_helper.from_array(value, f"weight_{self.count}"))
        return self.weights[-1].name

    def normal(self, *shape):
        scale = np.float32(shape[-2] ** -0.5)
        return self.constant(self.random.standard_normal(shape, np.float32) * scale)

    def linear(self, x, inputs, outputs):
        return self.node("MatMul", x, self.normal(inputs, outputs))

    def feed_forward(self, x):
        hidden = self.node("Gelu", self.linear(x, D_MODEL, D_FF))
        return self.linear(hidden, D_FF, D_MODEL)

    def experts(self, x, experts):
        logits = self.linear(x, D_MODEL, experts)
        up, down = self.normal(experts, D_FF, D_MODEL), self.normal(experts, D_MODEL, D_FF)
        attributes = dict(k=TOP_K, activation_type="gelu", normalize_routing_weights=1)
        return self.node("MoE", x, logits, up, "", down, domain="com.microsoft", **attributes)

    def norm(self, x):
        ones, zeros = np.ones(D_MODEL, np.float32), np.zeros(D_MODEL, np.float32)
        return self.node("LayerNormalization", x, self.constant(ones), self.constant(zeros), axis=-1, epsilon=1e-5)

    def attention(self, x):
        qkv = self.linear(x, D_MODEL, 3 * D_MODEL)
        q, k, v = self.node("Split", qkv, outputs=3, axis=-1, num_outputs=3)
        mixed = self.node("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=HEADS)
        return self.linear(mixed, D_MODEL, D_MODEL)

    def model(self, y, input_shape):
        self.nodes[-1].output[0] = "y"
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "graph", inputs, outputs, self.weights)
        # The quantisers need the type of everything, and shape inference does not know ONNX Runtime's own operators.
        names = [name for node in self.nodes for name in node.output if name != "y"]
        graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feed_forward(rows):
    graph = Graph()
    return graph.model(graph.feed_forward("x"), [rows, D_MODEL])


def moe_layer(experts):
    graph = Graph()
    return graph.model(graph.experts("x", experts), [TOKENS, D_MODEL])


def vit(experts):
    """The preset `paper` with `experts` dense experts per layer, or one plain feed-forward network with none."""
    graph = Graph()
    patches = graph.node("Conv", "x", graph.normal(D_MODEL, 3, PATCH, PATCH), strides=[PATCH, PATCH])
    flat = graph.node("Reshape", patches, graph.constant(np.array([1, D_MODEL, TOKENS], np.int64)))
    x = graph.node("Transpose", flat, perm=[0, 2, 1])
    x = graph.node("Add", x, graph.normal(1, TOKENS, D_MODEL))
    for _ in range(LAYERS):
        x = graph.node("Add", x, graph.attention(graph.norm(x)))
        normed = graph.norm(x)
        if experts:
            rows = graph.node("Reshape", normed, graph.constant(np.array([TOKENS, D_MODEL], np.int64)))
            mixed = graph.experts(rows, experts)
            mixed = graph.node("Reshape", mixed, graph.constant(np.array([1, TOKENS, D_MODEL], np.int64)))
        else:
            mixed = graph.feed_forward(normed)
        x = graph.node("Add", x, mixed)
    pooled = graph.node("ReduceMean", graph.norm(x), graph.constant(np.array([1], np.int64)), keepdims=0)
    return graph.model(graph.linear(pooled, D_MODEL, CLASSES), [1, 3, IMAGE, IMAGE])


class Calibration(CalibrationDataReader):
    def __init__(self, shape):
        self.left = [np.random.default_rng(i).standard_normal(shape, np.float32) for i in range(8)]

    def get_next(self):
        return {"x": self.left.pop()} if self.left else None


def input_shape(model):
    return [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]


def int8_variants(model, folder, name):
    """Every way of ONNX Runtime to run `model` with int8 weights, by name, as paths."""
    source = folder / f"{name}.onnx"
    onnx.save(model, source)
    prepared = folder / f"{name}-prepared.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    paths = {}

    def path(variant):
        paths[variant] = folder / f"{name}-{variant}.onnx"
        return str(paths[variant])

    quantize_dynamic(str(prepared), path("dynamic"), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    for variant, per_channel in [("static", False), ("static-per-channel", True)]:
        quantize_static(
            str(prepared),
            path(variant),
            Calibration(input_shape(model)),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
        )
    for bits in (8, 4):
        blocks = MatMulNBitsQuantizer(onnx.load(prepared), bits=bits, block_size=128, is_symmetric=True, accuracy_level=4)
        blocks.process()
        blocks.model.save_model_to_file(path(f"blocks-int{bits}"), use_external_data_format=False)
    return paths


class Timed:
    """A model in a session of one thread, and its times in milliseconds."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.feed = {"x": np.random.default_rng(7).standard_normal(self.session.get_inputs()[0].shape, np.float32)}
        self.best, self.medians = [], []

    def round(self, seconds):
        self.session.run(None, self.feed)
        times, end = [], time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            self.session.run(None, self.feed)
            times.append((time.perf_counter() - start) * 1e3)
        self.best.append(min(times))
        self.medians.append(statistics.median(times))

    def figures(self):
        return {"best_ms": min(self.best), "median_ms": statistics.median(self.medians)}


def print_growth(path):
    """Prints by how many resident bytes a process grows that loads and runs the model; for a process of its own."""
    onnxruntime.get_available_providers()
    before = resident_bytes()
    timed = Timed(path)
    timed.round(0)
    print(resident_bytes() - before)


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Ours:
    """`butterflyvit bench`, once a round, with the instruction set `isa` or with none forced."""

    def __init__(self, binary, isa, seconds):
        self.command = [binary, "bench", "--json", "--no-dense", "--threads", "1", "--experts", "8,64"]
        self.command += ["--duration", f"{round(seconds * 1000)}ms"]
        self.environment = {"BVIT_ISA": isa}
        self.rounds = []

    def round(self):
        done = subprocess.run(self.command, env=self.environment, check=True, stdout=subprocess.PIPE)
        document = json.loads(done.stdout)
        self.isa = document["isa"]
        self.rounds.append({result["num_experts"]: result for result in document["results"]})

    def figures(self):
        """By name: layer and model with 8 and 64 experts."""
        rows = {}
        for part, experts in [("layer", 8), ("layer", 64), ("model", 8), ("model", 64)]:
            reports = [results[experts][part] for results in self.rounds]
            memory = sum(reports[0].get(key, 0) for key in MEMORY)
            rows[f"{part} {experts}"] = {
                "best_ms": min(report["time"]["best_ms"] for report in reports),
                "median_ms": statistics.median(report["time"]["median_ms"] for report in reports),
                "memory_bytes": memory,
            }
        return rows


MEMORY = ["resident_bytes", "backbone_bytes", "expert_set_bytes", "session_bytes"]


def cpu():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def their_models(folder):
    """Paths of every model to be timed, by name."""
    paths = {}

    def add(name, model):
        paths[name] = folder / f"{name}.onnx"
        onnx.save(model, paths[name])

    for experts in (8, 64):
        add(f"MoE layer {experts}, fp32", moe_layer(experts))
        add(f"ViT {experts}, fp32", vit(experts))
    for name, model in [("FF 128 rows", feed_forward(128)), ("FF 64 rows", feed_forward(64)), ("ViT plain", vit(0))]:
        add(f"{name}, fp32", model)
        for variant, path in int8_variants(model, folder, name).items():
            paths[f"{name}, {variant}"] = path
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default=ROOT / "target/release/butterflyvit", type=pathlib.Path)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--seconds", default=0.5, type=float, help="length of one measurement in one round")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all figures")
    parser.add_argument("--print-growth-of", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.print_growth_of:
        return print_growth(args.print_growth_of)

    with tempfile.TemporaryDirectory() as folder:
        paths = their_models(pathlib.Path(folder))
        grown = [sys.executable, __file__, "--print-growth-of"]
        memory = {name: int(subprocess.check_output([*grown, path])) for name, path in paths.items()}
        theirs = {name: Timed(path) for name, path in paths.items()}
    ours, narrow = Ours(args.binary, "", args.seconds), Ours(args.binary, "avx2", args.seconds)
    for _ in range(args.rounds):
        ours.round()
        narrow.round()
        for timed in theirs.values():
            timed.round(args.seconds)

    figures = {name: timed.figures() | {"memory_bytes": memory[name]} for name, timed in theirs.items()}
    for prefix, runs in [("ours", ours), ("ours, avx2", narrow)]:
        figures |= {f"{prefix}: {name}": row for name, row in runs.figures().items()}
    title = f"{cpu()}, {ours.isa}; ONNX Runtime {onnxruntime.__version__}; one thread; {args.rounds} rounds"
    print(f"{title}\n\n{'':32} {'best ms':>9} {'median ms':>10} {'MB':>9}")
    for name, row in figures.items():
        print(f"{name:32} {row['best_ms']:9.3f} {row['median_ms']:10.3f} {row['memory_bytes'] / 1e6:9.2f}")
    if args.json:
        args.json.write_text(json.dumps({"title": title, "figures": figures}, indent=1))
    return print_bars(figures)


def print_bars(figures):
    """Prints each bar with its ratio, of the best times and of the medians; the best decide. Returns 1 if one fails."""

    def ratio(numerator, denominator):
        """Of two names; a tuple of names stands for the fastest of them."""

        def value(names, key):
            return min(figures[name][key] for name in ([names] if isinstance(names, str) else names))

        return [value(numerator, key) / value(denominator, key) for key in ("best_ms", "median_ms")]

    int8 = ("dynamic", "static", "static-per-channel", "blocks-int8")
    int8_ff, int8_vit = ([f"{name}, {variant}" for variant in int8] for name in ("FF 128 rows", "ViT plain"))
    dense_bytes = 64 * (2 * D_MODEL * D_FF + D_MODEL) * 4
    smaller = dense_bytes / figures["ours: layer 64"]["memory_bytes"]
    bars = [
        ("layer of 64, times faster than MoE operator", ">=", 20, ratio("MoE layer 64, fp32", "ours: layer 64")),
        ("layer of 8, times faster than MoE operator", ">=", 10, ratio("MoE layer 8, fp32", "ours: layer 8")),
        ("layer of 64, time over int8 FF of 128 rows", "<=", 1.5, ratio("ours: layer 64", int8_ff)),
        ("model of 64, time over int8 ViT, no experts", "<=", 2, ratio("ours: model 64", int8_vit)),
        ("layer of 64, AVX2 over best", "<=", 2, ratio("ours, avx2: layer 64", "ours: layer 64")),
        ("model of 64, AVX2 over best", "<=", 2, ratio("ours, avx2: model 64", "ours: model 64")),
        ("layer of 64, times smaller than dense f32", ">=", 400, [smaller, smaller]),
    ]
    print(f"\n{'bar':46} {'wanted':>8} {'best':>8} {'median':>8}")
    failed = False
    for bar, sign, wanted, (best, median) in bars:
        met = best >= wanted if sign == ">=" else best <= wanted
        failed |= not met
        print(f"{bar:46} {sign}{wanted:6} {best:8.2f} {median:8.2f}  {'met' if met else 'MISSED'}")
    faster = ratio("ViT 64, fp32", "ours: model 64")[0]
    print(f"{'model of 64, times faster than dense experts':46} {'':8} {faster:8.2f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
