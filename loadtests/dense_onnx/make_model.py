"""Writes an ONNX model of the shape of the default model, with dense fp32 experts in place of rotated ones.

Weights are random: times and memory do not depend on them. The experts run in ONNX Runtime's own operator for mixtures
of experts, which is the fastest it has for them.

    python3 make_model.py OUT.onnx
"""
import json
import pathlib
import struct
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MODELS = pathlib.Path(__file__).resolve().parent.parent.parent / "models"


def config(name):
    """The document that describes an artifact."""
    with open(MODELS / f"{name}.safetensors", "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(json.loads(file.read(length))["__metadata__"]["butterflyvit"])


def from_version_1(layer, i):
    """A stem layer of version 1 in the words of version 2."""
    if "norm_gelu" not in layer:
        return layer
    return {**layer, "padding": [layer["padding"]] * 4, "groups": 1, "norm": layer["norm_gelu"],
            "activation": "gelu" if layer["norm_gelu"] else "none", "residual": i if layer["residual"] else None}


class Graph:
    """Builds a graph node by node; methods return the name of what they add."""

    def __init__(self):
        self.nodes, self.weights, self.random, self.count = [], [], np.random.default_rng(0), 0

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
        return self.constant(self.random.standard_normal(shape, np.float32) * np.float32(0.05))

    def shape(self, *sizes):
        return self.constant(np.array(sizes, np.int64))

    def norm(self, x, features):
        ones, zeros = np.ones(features, np.float32), np.zeros(features, np.float32)
        return self.node("LayerNormalization", x, self.constant(ones), self.constant(zeros), axis=-1, epsilon=1e-5)

    def stem_layer(self, x, layer, channels):
        """Channels come first here, last in a norm."""
        out, groups = layer["channels"], layer["groups"]
        weight = self.normal(out, channels // groups, layer["kernel"], layer["kernel"])
        y = self.node("Conv", x, weight, self.normal(out), strides=[layer["stride"]] * 2, pads=layer["padding"],
                      group=groups)
        if layer["norm"]:
            last = self.norm(self.node("Transpose", y, perm=[0, 2, 3, 1]), out)
            y = self.node("Transpose", last, perm=[0, 3, 1, 2])
        if layer["activation"] == "gelu":
            return self.node("Gelu", y)
        if layer["activation"] == "relu6":
            return self.node("Clip", y, self.constant(np.float32(0)), self.constant(np.float32(6)))
        return y

    def attention(self, x, d_model, heads):
        qkv = self.node("Add", self.node("MatMul", x, self.normal(d_model, 3 * d_model)), self.normal(3 * d_model))
        q, k, v = self.node("Split", qkv, outputs=3, axis=-1, num_outputs=3)
        mixed = self.node("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=heads)
        return self.node("Add", self.node("MatMul", mixed, self.normal(d_model, d_model)), self.normal(d_model))

    def experts(self, x, backbone, experts):
        d_model, d_ff, n = backbone["d_model"], backbone["d_ff"], experts["num_experts"]
        rows = self.node("Reshape", x, self.shape(-1, d_model))
        mixed = self.node("MoE", rows, self.node("MatMul", rows, self.normal(d_model, n)),
                          self.normal(n, d_ff, d_model), "", self.normal(n, d_model, d_ff), domain="com.microsoft",
                          k=experts["top_k"], activation_type="gelu", normalize_routing_weights=1)
        return self.node("Reshape", mixed, self.node("Shape", x))


def build():
    backbone, expert_set = config("default-backbone")["config"], config("cifar100")
    experts, labels = expert_set["config"], expert_set["labels"]
    d_model, side = backbone["d_model"], backbone["image_size"]
    graph, x, channels, tokens = Graph(), "pixels", 3, side
    inputs = []
    for i, layer in enumerate(backbone["stem"]):
        layer = from_version_1(layer, i)
        inputs.append(x)
        x = graph.stem_layer(x, layer, channels)
        if layer["residual"] is not None:
            x = graph.node("Add", inputs[layer["residual"]], x)
        channels, tokens = layer["channels"], tokens // layer["stride"]
    tokens *= tokens
    flat = graph.node("Reshape", x, graph.shape(0, d_model, tokens))
    x = graph.node("Add", graph.node("Transpose", flat, perm=[0, 2, 1]), graph.normal(1, tokens, d_model))
    for _ in range(backbone["num_layers"]):
        x = graph.node("Add", x, graph.attention(graph.norm(x, d_model), d_model, backbone["num_heads"]))
        x = graph.node("Add", x, graph.experts(graph.norm(x, d_model), backbone, experts))
    pooled = graph.node("ReduceMean", graph.norm(x, d_model), graph.shape(1), keepdims=0)
    head = graph.node("Add", graph.node("MatMul", pooled, graph.normal(d_model, len(labels))), graph.normal(len(labels)))
    graph.nodes.append(helper.make_node("Softmax", [head], ["scores"]))
    made = helper.make_graph(
        graph.nodes, "dense experts",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", len(labels)])], graph.weights)
    model = helper.make_model(made, ir_version=10, opset_imports=[
        helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)])
    # What the server needs beside the graph.
    helper.set_model_props(model, {"labels": json.dumps(labels), "side": str(side)})
    return model


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1])
