"""What no JSON Schema can say of a valid request: that bytes are an image or an expert set, and that a tensor has as
many values as its shape asks for. Only valid requests are completed here; the invalid ones stay as they were made."""

import base64
import os
import pathlib

import schemathesis
from hypothesis import strategies as st

IMAGES = [path.read_bytes() for path in sorted(pathlib.Path(os.environ["BVIT_TEST_IMAGES"]).glob("test-0[0-3].*"))]
ARTIFACT = pathlib.Path(os.environ["BVIT_TEST_SET"]).read_bytes()
BACKBONE = pathlib.Path(os.environ["BVIT_TEST_SET"]).with_name("default-backbone.safetensors").read_bytes()
# The sets there are; the first one is the default, which cannot be deleted.
SETS = ["cifar100", "spare"]

images = st.sampled_from(IMAGES)
for media_type in ["image/jpeg", "image/png", "application/octet-stream"]:
    schemathesis.openapi.media_type(media_type, images)
schemathesis.openapi.format("image", st.sampled_from([base64.b64encode(image).decode() for image in IMAGES]))
schemathesis.openapi.format("binary", images)


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    """Most generated names name nothing; half of those of valid requests should."""
    for name in ["set", "name"]:
        value = (path_parameters or {}).get(name)
        if isinstance(value, str) and value.isascii() and len(value) % 2 == 0 and not value.startswith("."):
            path_parameters[name] = SETS[len(value) // 2 % len(SETS)]
    return path_parameters


@schemathesis.hook
def map_body(context, body):
    """In a form any other name is a further file; garbage, and names that no header can carry, are no files."""
    is_form = context.operation.path.startswith(("/classify", "/hf", "/v1")) and isinstance(body, dict) and "inputs" not in body
    return {name: value for name, value in body.items() if name in ("image", "top_k", "min_confidence")} if is_form else body


@schemathesis.hook
def before_call(context, case, **kwargs):
    if case.meta is None or not case.meta.generation.mode.is_positive or case.method.upper() not in ("POST", "PUT"):
        return
    if case.operation.path == "/sets/{name}/{version}":
        case.body = ARTIFACT
    if case.operation.path == "/backbones/{name}":
        case.body = BACKBONE
    if case.operation.path.endswith("/infer"):
        complete_inference(case)


def complete_inference(case):
    header = "Inference-Header-Content-Length"
    case.headers.pop(header, None)
    if case.media_type == "application/octet-stream":
        case.headers[header] = "0"
        # A link between operations may have put its parameters where the image was.
        if not isinstance(case.body, bytes):
            case.body = IMAGES[0]
        return
    if not isinstance(case.body, dict):
        return
    for tensor in case.body.get("inputs", []):
        tensor.pop("parameters", None)
        if tensor["name"] == "image":
            image = base64.b64encode(IMAGES[0]).decode()
            tensor.update(datatype="BYTES", shape=[1], data=[image])
        elif tensor["name"] == "pixels":
            tensor.update(datatype="UINT8", shape=[1, 2, 2, 3], data=list(range(12)))
        else:
            tensor.update(datatype="FP32", shape=[1, 3, 32, 32], data=[0.5] * (3 * 32 * 32))
    for output in case.body.get("outputs") or []:
        # The best label is one: there is nothing to choose among.
        if output["name"] == "label" and output.get("parameters"):
            output["parameters"].pop("classification", None)
