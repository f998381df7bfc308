"""Drives a running server with Triton's own HTTP client.

Usage: triton.py HOST:PORT PNG LABEL. The server holds the expert sets `photos` (versions 1 and 2) and `spare`, and
`/classify` answers LABEL for the image. Exits with a traceback at the first thing that is not as it should be.
"""

import io
import sys

import numpy as np
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

address, path, label = sys.argv[1:]
client = triton.InferenceServerClient(address)
encoded = open(path, "rb").read()
pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def tensor(name, array, datatype, binary=True):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def refused(part, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        assert part in str(error), f"{part!r} is not in {error}"
    else:
        raise AssertionError(f"{call} should have been refused: {part}")


# Health and metadata.
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("photos") and client.is_model_ready("photos", "2")
assert not client.is_model_ready("nobody")
server = client.get_server_metadata()
assert server["name"] == "butterflyvit"
assert {"binary_tensor_data", "classification", "model_repository", "statistics"} <= set(server["extensions"])
metadata = client.get_model_metadata("photos")
assert metadata["versions"] == ["1", "2"], metadata
[described] = metadata["inputs"]
assert (described["name"], described["datatype"], described["shape"]) == ("pixels", "UINT8", [-1, 32, 32, 3])
config = client.get_model_config("photos")
assert config["max_batch_size"] >= 1 and config["input"][0]["format"] == "FORMAT_NHWC"

# The same image as pixels, as a file, and as the normalised input; in binary and in JSON.
batch = pixels[None]
files = np.array([encoded], dtype=np.object_)
wanted = [triton.InferRequestedOutput(name, binary_data=binary)
          for name, binary in [("scores", True), ("logits", False), ("label", True)]]
first = client.infer("photos", [tensor("pixels", batch, "UINT8")], outputs=wanted, request_id="a-1")
assert first.get_response()["id"] == "a-1"
assert first.get_response()["model_name"] == "photos" and first.get_response()["model_version"] == "2"
scores, logits = first.as_numpy("scores"), first.as_numpy("logits")
classes = metadata["outputs"][0]["shape"][1]
assert scores.shape == logits.shape == (1, classes) and scores.dtype == logits.dtype == np.float32
assert first.as_numpy("label").tolist() == [[label.encode()]]
exponentials = np.exp(logits.astype(np.float64) - logits.max())
assert np.allclose(scores, exponentials / exponentials.sum(), atol=1e-6)


def same(result):
    """The forward pass is exact in integers, so every way in ends in the same bits."""
    assert np.array_equal(result.as_numpy("scores"), scores), result.get_response()


same(client.infer("photos", [tensor("pixels", batch, "UINT8", binary=False)]))
same(client.infer("photos", [tensor("image", files, "BYTES")]))
same(client.infer("photos", [tensor("pixels", batch, "UINT8")], model_version="1"))
for algorithm in ["gzip", "deflate"]:
    same(client.infer("photos", [tensor("pixels", batch, "UINT8")], request_compression_algorithm=algorithm))
text = triton.InferRequestedOutput("label", binary_data=False)
assert client.infer("photos", [tensor("image", files, "BYTES")], outputs=[text]).as_numpy("label")[0, 0] == label

# FP32 is the model's own input: any finite numbers up to a million do, and a batch answers what its images answer alone.
prepared = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
together = client.infer("photos", [tensor("input", prepared, "FP32")]).as_numpy("scores")
in_json = client.infer("photos", [tensor("input", prepared, "FP32", binary=False)]).as_numpy("scores")
alone = [client.infer("photos", [tensor("input", prepared[i:i + 1], "FP32")]).as_numpy("scores") for i in range(3)]
assert np.array_equal(together, np.concatenate(alone)) and np.array_equal(together, in_json)

# Classification with labels.
top = triton.InferRequestedOutput("scores", class_count=3)
lines = client.infer("photos", [tensor("pixels", np.stack([pixels, pixels]), "UINT8")], outputs=[top]).as_numpy("scores")
assert lines.shape == (2, 3)
score, index, name = lines[0, 0].decode().split(":")
assert name == label and int(index) == scores.argmax() and float(score) == scores.max()
assert client.infer("photos", [tensor("image", files, "BYTES")], outputs=[
    triton.InferRequestedOutput("logits", class_count=1, binary_data=False)]).as_numpy("logits").shape == (1, 1)

# Statistics.
client.infer("spare", [tensor("pixels", np.stack([pixels] * 5), "UINT8")])
refused("empty", client.infer, "spare", [tensor("image", np.array([b""], dtype=np.object_), "BYTES")])
[spare] = client.get_inference_statistics("spare")["model_stats"]
assert (spare["name"], spare["version"], spare["inference_count"], spare["execution_count"]) == ("spare", "1", 5, 1)
assert spare["inference_stats"]["success"]["count"] == 5 and spare["inference_stats"]["fail"]["count"] == 1
assert spare["inference_stats"]["compute_infer"]["ns"] > 0 and spare["last_inference"] > 1_700_000_000_000
everything = client.get_inference_statistics()["model_stats"]
assert {(model["name"], model["version"]) for model in everything} == {("photos", "1"), ("photos", "2"), ("spare", "1")}
[photos] = client.get_inference_statistics("photos", "1")["model_stats"]
assert photos["inference_count"] == 1

# The repository: the index, in and out of memory.
index = {(model["name"], model["version"]): model for model in client.get_model_repository_index()}
assert set(index) == {("photos", "1"), ("photos", "2"), ("spare", "1")}, index
assert all(model["state"] == "READY" and model["reason"] == "" for model in index.values())
client.unload_model("spare")
client.load_model("spare")
same(client.infer("spare", [tensor("pixels", batch, "UINT8")]))
refused("nobody", client.load_model, "nobody")
refused("config", client.load_model, "spare", config="{}")

# Refusals carry our sentence.
refused("nobody", client.infer, "nobody", [tensor("pixels", batch, "UINT8")])
refused("version", client.infer, "photos", [tensor("pixels", batch, "UINT8")], model_version="one")
refused("99", client.infer, "photos", [tensor("pixels", batch, "UINT8")], model_version="99")
refused("`input` FP32", client.infer, "photos", [tensor("pixels", batch.astype(np.float32), "FP32")])
refused("no output `depth`", client.infer, "photos", [tensor("pixels", batch, "UINT8")],
        outputs=[triton.InferRequestedOutput("depth")])
refused("32x32", client.infer, "photos", [tensor("input", np.zeros((1, 3, 16, 16), np.float32), "FP32")])
for value in [np.nan, np.inf, 1.1e6, -3e38]:
    refused("finite", client.infer, "photos", [tensor("input", np.full((1, 3, 32, 32), value, np.float32), "FP32")])
# The largest numbers that are taken leave the scores finite.
largest = np.where(prepared[:1] > 0, 1e6, -1e6).astype(np.float32)
assert np.isfinite(client.infer("photos", [tensor("input", largest, "FP32")]).as_numpy("scores")).all()
refused("at most", client.infer, "photos", [tensor("pixels", np.repeat(batch, 500, axis=0), "UINT8")])
refused("exactly one input", client.infer, "photos", [tensor("pixels", batch, "UINT8")] * 2)
broken = np.array([encoded[:40]], dtype=np.object_)
refused("decode", client.infer, "photos", [tensor("image", broken, "BYTES")])
print("triton client: ok")
