//! `infer`: tensors in JSON or binary to images, logits to tensors in JSON or binary.

use std::borrow::Cow;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::engine::general_purpose::STANDARD;
use base64::{DecodeError, Engine};
use bytes::Bytes;
use model_core::image::{Fit, RgbImage};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;
use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{ArrayBuilder, ObjectBuilder, RefOr, Schema};
use utoipa::{IntoParams, PartialSchema, ToSchema};

use super::super::answer;
use super::super::auth::User;
use super::super::body::{Received, receive};
use super::super::classify::{CLASSIFY, EXPERT_SET_GENERATION};
use super::super::error::{ApiError, ErrorCode};
use super::super::extract::{ApiPath, RequestContext};
use super::super::input::{EXAMPLE_IMAGE, FitName};
use super::super::json::{self, AtMost, Count, JsonCrop, Object};
use super::super::openapi::{commands, errors};
use super::path::ModelPath;
use crate::app::AppState;
use crate::classify::{Answers, Image, Look, Prediction, Request, predictions};
use crate::sets::loaded::{Answer, SetLease};
use crate::verdict::{MinScore, Reason};

/// Encoded images, BYTES `[n]`; base64 when they come in JSON.
const IMAGE: &str = "image";
/// Images of any size, UINT8 `[n, height, width, 3]`.
pub(super) const PIXELS: &str = "pixels";
/// The model's own normalised input, FP32 `[n, 3, side, side]`.
const INPUT: &str = "input";
/// Softmax over the labels, FP32 `[n, classes]`.
pub(super) const SCORES: &str = "scores";
/// The numbers before the softmax, FP32 `[n, classes]`.
const LOGITS: &str = "logits";
/// The best label, BYTES `[n, 1]`.
const LABEL: &str = "label";
/// Whether the picture is unknown, BOOL `[n, 1]`.
const UNKNOWN: &str = "unknown";
/// Why it is, BYTES `[n, 1]`.
const UNKNOWN_REASON: &str = "unknown_reason";

/// Length of the JSON that comes before binary tensors.
pub const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");
/// Inputs, and outputs, that a request may name; there are fewer.
const MOST_TENSORS: usize = 8;
/// Dimensions of a tensor; no input has more than four.
const MOST_DIMENSIONS: usize = 8;
/// JSON longer than this is parsed off the async threads.
const INLINE_JSON_BYTES: usize = 64 << 10;

/// Tensors in, and which ones are wanted out.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct InferRequest {
    /// Comes back with the answer.
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    #[schema(value_type = Option<RequestParameters>)]
    parameters: Option<Object<RequestParameters>>,
    #[schema(value_type = Vec<InputTensor>, min_items = 1, max_items = 1)]
    inputs: AtMost<Object<InputTensor>, MOST_TENSORS>,
    /// `scores` when left out or empty.
    #[serde(default)]
    #[schema(value_type = Option<Vec<OutputRequest>>, max_items = 8)]
    outputs: Option<AtMost<Object<OutputRequest>, MOST_TENSORS>>,
    /// KServe's client repeats here what the path says; the path decides.
    #[serde(default, rename = "model_name")]
    _model_name: Option<String>,
    /// As `model_name`.
    #[serde(default, rename = "model_version")]
    _model_version: Option<String>,
}

#[derive(Default, Deserialize, ToSchema)]
struct RequestParameters {
    /// Whether outputs come in binary unless they say otherwise.
    #[serde(default)]
    binary_data_output: bool,
    /// The part of each picture to look at, `x,y,w,h` or a list of these numbers.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "0.25,0,0.5,1")]
    crop: Option<JsonCrop>,
    /// How that part becomes a square.
    #[serde(default)]
    #[schema(value_type = Option<FitName>)]
    fit: Option<Fit>,
    /// The picture is unknown when the best label's softmax score is lower.
    #[serde(default)]
    #[schema(value_type = Option<f32>, minimum = 0, maximum = 1)]
    min_score: Option<MinScore>,
}

/// `image` BYTES `[n]`, encoded files (base64 in JSON); `pixels` UINT8 `[n, height, width, 3]`, images of any size; or
/// `input` FP32 `[n, 3, side, side]`, the model's own normalised input.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct InputTensor {
    #[schema(value_type = InputName)]
    name: String,
    #[schema(value_type = Vec<usize>, min_items = 1, max_items = 4)]
    shape: AtMost<Count, MOST_DIMENSIONS>,
    #[schema(value_type = InputType)]
    datatype: String,
    #[serde(default)]
    #[schema(value_type = Option<InputParameters>)]
    parameters: Option<Object<InputParameters>>,
    /// The values, flat or nested in row-major order; left out when they come in binary.
    #[serde(default)]
    data: FlatData,
}

/// Which input it is.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "names the values of a string in the documentation")]
enum InputName {
    Image,
    Pixels,
    Input,
}

/// The type that goes with the input.
#[derive(ToSchema)]
#[schema(rename_all = "UPPERCASE")]
#[expect(dead_code, reason = "names the values of a string in the documentation")]
enum InputType {
    Bytes,
    Uint8,
    Fp32,
}

#[derive(Default, Deserialize, ToSchema)]
struct InputParameters {
    /// Bytes of the tensor behind the JSON.
    #[serde(default)]
    #[schema(value_type = Option<usize>)]
    binary_data_size: Option<Count>,
    /// Always refused: no memory is shared with clients.
    #[serde(default)]
    #[schema(ignore)]
    shared_memory_region: Option<IgnoredAny>,
}

/// `scores` FP32 `[n, classes]`, `logits` FP32 `[n, classes]`, `label` BYTES `[n, 1]`, `unknown` BOOL `[n, 1]` or
/// `unknown_reason` BYTES `[n, 1]`, which is empty for pictures that are not unknown.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct OutputRequest {
    #[schema(value_type = OutputName)]
    name: String,
    #[serde(default)]
    #[schema(value_type = Option<OutputParameters>)]
    parameters: Option<Object<OutputParameters>>,
}

/// Which output it is.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "names the values of a string in the documentation")]
enum OutputName {
    Scores,
    Logits,
    Label,
    Unknown,
    #[schema(rename = "unknown_reason")]
    UnknownReason,
}

#[derive(Default, Deserialize, ToSchema)]
struct OutputParameters {
    /// Of `scores` and `logits`: answer the best so many as BYTES `[n, classification]`, each `value:index:label`.
    #[serde(default)]
    #[schema(value_type = Option<usize>)]
    classification: Option<Count>,
    /// Whether this output comes in binary.
    #[serde(default)]
    binary_data: Option<bool>,
    /// Always refused: no memory is shared with clients.
    #[serde(default)]
    #[schema(ignore)]
    shared_memory_region: Option<IgnoredAny>,
}

const CURL: &str = "curl http://127.0.0.1:8000/v2/models/cifar100/infer --json \"{\\\"inputs\\\": [{\\\"name\\\": \\\"image\\\", \\\"datatype\\\": \\\"BYTES\\\", \\\"shape\\\": [1], \\\"data\\\": [\\\"$(base64 -w0 cat.jpg)\\\"]}]}\"";

/// Headers of a request with binary tensors.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes a header that is read by hand")]
struct InferHeaders {
    /// Length of the JSON when binary tensors follow it.
    #[param(rename = "Inference-Header-Content-Length", required = false)]
    length: usize,
}

fn example_request() -> Value {
    let input = json!({ "name": IMAGE, "datatype": "BYTES", "shape": [1], "data": [EXAMPLE_IMAGE] });
    let outputs = json!([{ "name": SCORES, "parameters": { "classification": 2 } }]);
    json!({ "inputs": [input], "outputs": outputs })
}

fn example_answer() -> Value {
    json!({
        "model_name": "cifar100",
        "model_version": "1",
        "outputs": [{ "name": SCORES, "datatype": "BYTES", "shape": [1, 2], "data": ["0.91:36:hamster", "0.03:50:mouse"] }],
    })
}

/// Tensor data in JSON, nested or flat. Read value by value: a tree of a million numbers would take many times the
/// memory of the numbers.
#[derive(Default)]
struct FlatData {
    numbers: Vec<f32>,
    /// What the strings stand for in base64.
    strings: Vec<Result<Bytes, DecodeError>>,
}

impl FlatData {
    /// Strings that are kept of a list; above any sensible `max_images`, whose check comes later.
    const MOST_STRINGS: usize = 4096;
    /// Numbers of one tensor; each takes two bytes of JSON at least, and four here.
    const MOST_NUMBERS: usize = 4 << 20;

    fn push<E: serde::de::Error>(&mut self, number: f32) -> Result<(), E> {
        if self.numbers.len() == Self::MOST_NUMBERS {
            return Err(E::custom(format!(
                "data holds more than {} numbers; send the tensor in binary",
                Self::MOST_NUMBERS
            )));
        }
        self.numbers.push(number);
        Ok(())
    }
}

impl<'de> Deserialize<'de> for FlatData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut data = Self::default();
        deserializer.deserialize_seq(List(&mut data))?;
        if !data.numbers.is_empty() && !data.strings.is_empty() {
            return Err(D::Error::custom("data holds both numbers and strings"));
        }
        Ok(data)
    }
}

impl PartialSchema for FlatData {
    fn schema() -> RefOr<Schema> {
        let anything = ObjectBuilder::new().schema_type(SchemaType::AnyValue);
        ArrayBuilder::new().items(anything).description(Some("Numbers or strings, flat or nested.")).into()
    }
}

impl ToSchema for FlatData {}

/// Takes a list and nothing else.
struct List<'a>(&'a mut FlatData);

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of numbers or strings")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Flatten(self.0))?.is_some() {}
        Ok(())
    }
}

struct Flatten<'a>(&'a mut FlatData);

impl<'de> DeserializeSeed<'de> for Flatten<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flatten<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers, strings or lists of them")
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.0.push(value as f32)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.0.push(value as f32)
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.0.push(value as f32)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        if self.0.strings.len() == FlatData::MOST_STRINGS {
            return Err(E::custom(format!("data holds more than {} strings", FlatData::MOST_STRINGS)));
        }
        self.0.strings.push(STANDARD.decode(value.trim()).map(Bytes::from));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        List(self.0).visit_seq(seq)
    }
}

/// Tensors in, tensors out.
///
/// Tensors may follow the JSON in binary: `Inference-Header-Content-Length` is then the length of the JSON, and
/// `binary_data_size` that of the tensor; an answer with binary tensors has the same header. Numbers are little-endian;
/// each element of BYTES comes after its length in four bytes. With a length of 0 the whole body is one image file. One bad
/// image refuses the whole request, because the protocol has no place for its error.
#[utoipa::path(
    post,
    path = "/v2/models/{set}/infer",
    operation_id = "oip_infer",
    tag = "oip",
    params(InferHeaders),
    request_body(content(
        (InferRequest = "application/json", example = json!(example_request())),
        ("application/octet-stream"),
    )),
    responses((
        status = 200,
        description = "Done.",
        headers(("x-expert-set-generation" = String, description = "Name, version and content digest of what answered.")),
        content((InferAnswer = "application/json", example = json!(example_answer())), ("application/octet-stream"))
    )),
    extensions(
        ("x-errors" = json!(errors(CLASSIFY))),
        ("x-codeSamples" = json!(commands(&[CURL]))),
    ),
)]
pub(super) async fn infer(
    State(app): State<AppState>,
    context: RequestContext,
    path: ApiPath<ModelPath>,
    user: User,
) -> Result<Response, ApiError> {
    let User { client, mut entry, headers, body } = user;
    let version = path.0.version()?;
    let Received { bytes, deadline, permit } = receive(&app, client, &headers, body).await?;
    let (mut request, binary) = split(&app, &headers, bytes).await?;
    refuse_shared_memory(&request)?;
    let images = images(&mut request.inputs.0, binary, app.limits.max_images)?;
    let parameters = request.parameters.as_ref().map(|parameters| &parameters.0);
    let look = parameters.map_or_else(Look::default, |wish| Look { crop: wish.crop.map(|crop| crop.0), fit: wish.fit });
    let min_score = parameters.and_then(|wish| wish.min_score);
    let images = Request {
        set: path.0.set,
        version,
        images: images.into_iter().map(Ok).collect(),
        routing: false,
        look,
        min_score,
        started: context.started,
        deadline,
    };
    let answers = app.classifier.answer(&mut entry, images).await?;
    // The encoded bytes are not needed any more, and the answer may be slow to leave.
    drop(permit);
    respond(&app, deadline, request, answers).await
}

/// The JSON part, and the binary tensors behind it.
async fn split(app: &AppState, headers: &HeaderMap, body: Bytes) -> Result<(InferRequest, Bytes), ApiError> {
    let length = match headers.get(&HEADER_LENGTH) {
        None => body.len(),
        Some(value) => {
            let length = value.to_str().ok().and_then(|text| text.parse::<usize>().ok());
            let wrong = || ApiError::invalid(format!("{HEADER_LENGTH} must be a length within the body"));
            length.filter(|&length| length <= body.len()).ok_or_else(wrong)?
        }
    };
    if length == 0 && !body.is_empty() {
        // The whole body is the one input: an encoded image, without the length that BYTES carry otherwise.
        let input = InputTensor { name: IMAGE.into(), shape: AtMost(vec![Count(1)]), ..InputTensor::default() };
        return Ok((InferRequest { inputs: AtMost(vec![Object(input)]), ..InferRequest::default() }, body));
    }
    let (text, binary) = (body.slice(..length), body.slice(length..));
    let parse = move || json::read(&text);
    let parsed = match length {
        0..=INLINE_JSON_BYTES => parse(),
        _ => app.bulk.run(parse).await?,
    };
    Ok((parsed?, binary))
}

/// Without this a tensor in shared memory would be missing, or answered in the body, without a word.
fn refuse_shared_memory(request: &InferRequest) -> Result<(), ApiError> {
    let inputs = request.inputs.0.iter().filter_map(|Object(input)| input.parameters.as_ref());
    let outputs = request.outputs.iter().flat_map(|outputs| &outputs.0);
    let outputs = outputs.filter_map(|Object(output)| output.parameters.as_ref());
    let mut regions = inputs
        .map(|Object(parameters)| &parameters.shared_memory_region)
        .chain(outputs.map(|Object(parameters)| &parameters.shared_memory_region));
    if regions.any(Option::is_some) {
        return Err(ApiError::invalid("`shared_memory_region` is not taken; send and receive tensors in the body"));
    }
    Ok(())
}

fn images(inputs: &mut [Object<InputTensor>], binary: Bytes, max_images: usize) -> Result<Vec<Image>, ApiError> {
    let [Object(input)] = inputs else {
        return Err(ApiError::invalid(format!("exactly one input is taken: `{PIXELS}`, `{INPUT}` or `{IMAGE}`")));
    };
    let shape: Vec<usize> = input.shape.0.iter().map(|dimension| dimension.0).collect();
    let count = shape.first().copied().unwrap_or(0);
    if count > max_images {
        let message = format!("at most {max_images} images are accepted in one request");
        return Err(ApiError::new(ErrorCode::BatchTooLarge, message));
    }
    if shape.contains(&0) || shape.is_empty() {
        return Err(ApiError::invalid(format!("input `{}` has an empty shape", input.name)));
    }
    if input.datatype.is_empty() {
        return Ok(vec![Image::Encoded(binary)]);
    }
    let size = input.parameters.as_ref().and_then(|parameters| parameters.0.binary_data_size).map(|size| size.0);
    if size.unwrap_or(0) != binary.len() {
        let message =
            format!("input `{}` announces {} binary bytes, but {} came", input.name, size.unwrap_or(0), binary.len());
        return Err(ApiError::invalid(message));
    }
    let data = std::mem::take(&mut input.data);
    let binary = size.map(|_| binary);
    match (input.name.as_str(), input.datatype.as_str(), shape.as_slice()) {
        (IMAGE, "BYTES", [_] | [_, 1]) => encoded(data, binary, count),
        (PIXELS, "UINT8", &[_, height, width, 3]) => rgb(data, binary, (count, height, width)),
        (INPUT, "FP32", &[_, 3, height, width]) if height == width => prepared(data, binary, (count, height)),
        (name, datatype, shape) => Err(ApiError::invalid(format!(
            "input `{name}` {datatype} {shape:?} is not taken; send `{PIXELS}` UINT8 [n, height, width, 3], `{INPUT}` \
             FP32 [n, 3, side, side] or `{IMAGE}` BYTES [n]"
        ))),
    }
}

fn encoded(data: FlatData, binary: Option<Bytes>, count: usize) -> Result<Vec<Image>, ApiError> {
    let elements = match binary {
        Some(binary) => split_elements(binary, count)?,
        None => {
            check_count(IMAGE, count, data.strings.len())?;
            let decoded: Result<Vec<_>, _> = data.strings.into_iter().collect();
            decoded.map_err(|error| ApiError::invalid(format!("`{IMAGE}` in JSON must be base64: {error}")))?
        }
    };
    check_count(IMAGE, count, elements.len())?;
    Ok(elements.into_iter().map(Image::Encoded).collect())
}

/// BYTES on the wire: for each element a little-endian length and the bytes. No more than `count` are read.
fn split_elements(mut rest: Bytes, count: usize) -> Result<Vec<Bytes>, ApiError> {
    let mut elements = Vec::new();
    while let Some((length, _)) = rest.split_first_chunk::<4>() {
        let end = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX).saturating_add(4);
        if end > rest.len() {
            break;
        }
        if elements.len() == count {
            return Err(ApiError::invalid(format!("the BYTES tensor has more elements than its shape, {count}")));
        }
        elements.push(rest.split_to(end).slice(4..));
    }
    if rest.is_empty() { Ok(elements) } else { Err(ApiError::invalid("the BYTES tensor ends in mid-element")) }
}

fn rgb(data: FlatData, binary: Option<Bytes>, shape: (usize, usize, usize)) -> Result<Vec<Image>, ApiError> {
    let (count, height, width) = shape;
    let samples: Cow<'_, [u8]> = match &binary {
        Some(binary) => Cow::Borrowed(binary),
        None => {
            let sample = |&value: &f32| (value.fract() == 0.0 && (0.0..=255.0).contains(&value)).then_some(value as u8);
            let samples: Option<Vec<u8>> = data.numbers.iter().map(sample).collect();
            samples
                .map(Cow::Owned)
                .ok_or_else(|| ApiError::invalid(format!("`{PIXELS}` takes whole numbers from 0 to 255")))?
        }
    };
    let each = product(PIXELS, &[height, width, 3])?;
    check_count(PIXELS, product(PIXELS, &[count, each])?, samples.len())?;
    let image = |samples: &[u8]| {
        let (width, height) = (u32::try_from(width).ok()?, u32::try_from(height).ok()?);
        RgbImage::from_raw(width, height, samples.to_vec()).map(Image::Rgb)
    };
    let images: Option<Vec<Image>> = samples.chunks_exact(each).map(image).collect();
    images.ok_or_else(|| ApiError::invalid(format!("`{PIXELS}` is too large")))
}

/// Largest value of a prepared image. No preprocessing gives one near to it, and numbers that are much larger overflow in
/// the model, which would be an error of the server.
const LARGEST_INPUT: f32 = 1e6;

fn prepared(data: FlatData, binary: Option<Bytes>, shape: (usize, usize)) -> Result<Vec<Image>, ApiError> {
    let (count, side) = shape;
    let each = product(INPUT, &[3, side, side])?;
    let chunks = match &binary {
        Some(binary) => {
            check_count(INPUT, product(INPUT, &[count, each, 4])?, binary.len())?;
            binary.as_chunks::<4>().0
        }
        None => {
            check_count(INPUT, product(INPUT, &[count, each])?, data.numbers.len())?;
            &[]
        }
    };
    let value = |i: usize| chunks.get(i).map_or_else(|| data.numbers[i], |&chunk| f32::from_le_bytes(chunk));
    // Not a number fails the comparison, too.
    if !(0..count * each).all(|i| value(i).abs() <= LARGEST_INPUT) {
        return Err(ApiError::invalid(format!(
            "`{INPUT}` must be finite numbers from -{LARGEST_INPUT} to {LARGEST_INPUT}"
        )));
    }
    // Channel-first on the wire, channel-last in the model.
    let area = side * side;
    let image = |image: usize| (0..each).map(|i| value(image * each + i % 3 * area + i / 3)).collect();
    Ok((0..count).map(|i| Image::Prepared(image(i))).collect())
}

fn product(input: &str, factors: &[usize]) -> Result<usize, ApiError> {
    let product = factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor));
    product.ok_or_else(|| ApiError::invalid(format!("the shape of `{input}` is too large")))
}

fn check_count(input: &str, expected: usize, got: usize) -> Result<(), ApiError> {
    if expected == got {
        Ok(())
    } else {
        Err(ApiError::invalid(format!("the shape of `{input}` asks for {expected} values or bytes, but {got} came")))
    }
}

/// The requested outputs.
#[derive(Serialize, ToSchema)]
struct InferAnswer {
    model_name: String,
    model_version: String,
    /// The id of the request, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    outputs: Vec<OutputTensor>,
}

#[derive(Serialize, ToSchema)]
struct OutputTensor {
    name: String,
    /// `FP32` or `BYTES`.
    datatype: &'static str,
    shape: [usize; 2],
    /// There when the tensor comes in binary, behind the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<OutputSize>,
    /// The values, flat, unless they come in binary.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Tensor>,
}

#[derive(Serialize, ToSchema)]
struct OutputSize {
    binary_data_size: usize,
}

/// Values: numbers or strings.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Tensor {
    Floats(Vec<f32>),
    Flags(Vec<bool>),
    Strings(Vec<String>),
}

impl Tensor {
    fn datatype(&self) -> &'static str {
        match self {
            Self::Floats(_) => "FP32",
            Self::Flags(_) => "BOOL",
            Self::Strings(_) => "BYTES",
        }
    }

    fn to_binary(&self) -> Vec<u8> {
        match self {
            Self::Floats(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Flags(values) => values.iter().map(|&value| u8::from(value)).collect(),
            Self::Strings(values) => values.iter().fold(Vec::new(), |mut bytes, value| {
                // Labels are bounded far below 4 GiB by the artifact's header.
                bytes.extend((value.len() as u32).to_le_bytes());
                bytes.extend(value.as_bytes());
                bytes
            }),
        }
    }
}

async fn respond(
    app: &AppState,
    deadline: Instant,
    request: InferRequest,
    answers: Answers,
) -> Result<Response, ApiError> {
    let Answers { lease, images } = answers;
    let generation = HeaderValue::try_from(lease.descriptor.generation()).map_err(ApiError::internal)?;
    // The protocol has no place for one image's error among other images' answers.
    let answers: Vec<Answer> = images.into_iter().collect::<Result<_, _>>()?;
    let all_binary = request.parameters.as_ref().is_some_and(|parameters| parameters.0.binary_data_output);
    let mut outputs = request.outputs.unwrap_or_default().0;
    if outputs.is_empty() {
        outputs.push(Object(OutputRequest { name: SCORES.into(), parameters: None }));
    }
    let labels = lease.value.labels();
    let bound = outputs.iter().map(|Object(output)| output.bound(labels)).fold(0, usize::saturating_add);
    let bound = bound.saturating_mul(answers.len()).saturating_add(request.id.as_ref().map_or(0, |id| 6 * id.len()));
    let id = request.id;
    let encode = move || encode(id, all_binary, &outputs, &lease, &answers);
    let (bytes, json_length) = answer::build(app, deadline, bound, encode).await?;
    let content_type = if json_length.is_some() { "application/octet-stream" } else { "application/json" };
    let mut response = bytes.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = json_length {
        response.headers_mut().insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    response.headers_mut().insert(EXPERT_SET_GENERATION, generation);
    Ok(response)
}

/// The answer's bytes, and the length of its JSON when binary tensors follow.
fn encode(
    id: Option<String>,
    all_binary: bool,
    outputs: &[Object<OutputRequest>],
    lease: &SetLease,
    answers: &[Answer],
) -> Result<(Vec<u8>, Option<usize>), ApiError> {
    let (mut described, mut binary, mut any_binary) = (Vec::new(), Vec::new(), false);
    for Object(output) in outputs {
        let wishes = output.parameters.as_ref();
        let (tensor, width) = tensor(output, answers, lease.value.labels())?;
        let (datatype, shape) = (tensor.datatype(), [answers.len(), width]);
        let (parameters, data) = if wishes.and_then(|wishes| wishes.0.binary_data).unwrap_or(all_binary) {
            let bytes = tensor.to_binary();
            let binary_data_size = bytes.len();
            binary.extend(bytes);
            any_binary = true;
            (Some(OutputSize { binary_data_size }), None)
        } else {
            (None, Some(tensor))
        };
        described.push(OutputTensor { name: output.name.clone(), datatype, shape, parameters, data });
    }
    let answer = InferAnswer {
        model_name: lease.descriptor.name.clone(),
        model_version: lease.descriptor.version.to_string(),
        id,
        outputs: described,
    };
    let mut bytes = serde_json::to_vec(&answer).map_err(ApiError::internal)?;
    let json_length = any_binary.then_some(bytes.len());
    bytes.extend(binary);
    Ok((bytes, json_length))
}

impl OutputRequest {
    /// Bytes that one image takes in this output at most.
    fn bound(&self, labels: &[String]) -> usize {
        let classification = self.parameters.as_ref().and_then(|parameters| parameters.0.classification);
        let predictions = match classification.map_or(0, |count| count.0) {
            0 if self.name == LABEL => 1,
            // Numbers take up to sixteen bytes of JSON, fewer than predictions.
            0 => return labels.len() * 16 + 256,
            count => count,
        };
        answer::predictions_bound(labels, predictions).saturating_add(256)
    }
}

/// An output, and its values per image.
fn tensor(output: &OutputRequest, answers: &[Answer], labels: &[String]) -> Result<(Tensor, usize), ApiError> {
    let classes = labels.len();
    let logits = || answers.iter().map(|answer| &answer.logits[..]);
    let scores = |logits: &[f32]| {
        let mut scores = vec![0.0; classes];
        predictions(logits, labels, classes).into_iter().for_each(|found| scores[found.index] = found.score);
        scores
    };
    let classification = output.parameters.as_ref().and_then(|parameters| parameters.0.classification).map(|k| k.0);
    match (output.name.as_str(), classification.filter(|&k| k > 0)) {
        (SCORES, None) => Ok((Tensor::Floats(logits().flat_map(scores).collect()), classes)),
        (LOGITS, None) => Ok((Tensor::Floats(logits().flatten().copied().collect()), classes)),
        (UNKNOWN, None) => {
            let is_unknown = |answer: &Answer| answer.verdict.unknown == Some(true);
            Ok((Tensor::Flags(answers.iter().map(is_unknown).collect()), 1))
        }
        (UNKNOWN_REASON, None) => {
            let reason = |answer: &Answer| answer.verdict.reason.map_or("", Reason::as_str).to_owned();
            Ok((Tensor::Strings(answers.iter().map(reason).collect()), 1))
        }
        (LABEL, None) => {
            let best = logits().flat_map(|logits| predictions(logits, labels, 1)).map(|best| best.label);
            Ok((Tensor::Strings(best.collect()), 1))
        }
        (SCORES | LOGITS, Some(k)) => {
            if let Some(label) = labels.iter().find(|label| label.contains(':')) {
                let message = format!("label `{label}` contains `:`, which separates fields of a classification");
                return Err(ApiError::invalid(message));
            }
            let line = |logits: &[f32], found: Prediction| {
                let value = if output.name == LOGITS { logits[found.index] } else { found.score };
                format!("{value}:{}:{}", found.index, found.label)
            };
            let lines =
                logits().flat_map(|row| predictions(row, labels, k).into_iter().map(move |found| line(row, found)));
            Ok((Tensor::Strings(lines.collect()), k.min(classes)))
        }
        (name, _) => Err(ApiError::invalid(format!(
            "there is no output `{name}`; there are `{SCORES}`, `{LOGITS}` (both also as classification), `{LABEL}`, \
             `{UNKNOWN}` and `{UNKNOWN_REASON}`"
        ))),
    }
}
