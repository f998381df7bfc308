//! The forms in which images arrive at `/classify`, turned into one.

use std::borrow::Cow;
use std::fmt;
use std::num::IntErrorKind;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::multipart::Field;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request};
use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use futures_util::Stream;
use model_core::image::{Fit, ImageError};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, IntoDeserializer, SeqAccess, Visitor};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use utoipa::openapi::{ArrayBuilder, ObjectBuilder, OneOfBuilder, RefOr, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

use super::error::{ApiError, ErrorCode, cut};
use super::json::{self, Count, JsonCrop, Object};
use crate::app::AppState;
use crate::classify::{self, Image, Look, ScoreFunction};
use crate::repeats::REPEATS;
use crate::sentence::{nearest, unknown_name};
use crate::verdict::{MinScore, MinScoreError};

/// Text fields and empty files that a form may have.
const MOST_FIELDS: usize = 64;
/// Most bytes of a text field.
const TEXT_BYTES: usize = 4 << 10;
/// Most bytes of a part's head.
const HEAD_BYTES: usize = 64 << 10;
/// What a form's reader gets at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Bodies up to this size are read where they are.
const INLINE_BYTES: usize = 64 << 10;

/// Padding is optional: some encoders leave it out.
const STANDARD: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::URL_SAFE, LENIENT);
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);

/// What a request asks for, whatever its form.
#[derive(Debug, Default)]
pub struct ClassifyInput {
    /// Images in request order; an error stands in the place of one that cannot be read.
    pub images: Vec<Result<Image, classify::Error>>,
    /// Whether the answer is a list.
    pub is_batch: bool,
    /// Expert set named in the body.
    pub set: Option<String>,
    /// Number of labels asked for in the body.
    pub top_k: Option<usize>,
    /// What turns logits into scores.
    pub function: ScoreFunction,
    /// Where the body says to look.
    pub look: Look,
    /// Score below which the best label does not count.
    pub min_score: Option<MinScore>,
    /// Whether a list of labels is to say so when the picture is unknown.
    pub unknown_label: bool,
}

/// Reads a body by its content type. Of large bodies that are more than an image, one is read at a time: what is made of
/// them comes beside them for a while.
///
/// # Errors
/// 400, 413 or 415 as in the status table.
pub async fn parse(app: &AppState, headers: &HeaderMap, body: Bytes) -> Result<ClassifyInput, ApiError> {
    let (form, max_images) = (Form::of(headers)?, app.limits.max_images);
    if body.len() <= INLINE_BYTES || form == Form::Raw {
        return read(form, headers, body, max_images).await;
    }
    let content_type = headers.get(header::CONTENT_TYPE).cloned();
    let headers: HeaderMap = content_type.map(|value| (header::CONTENT_TYPE, value)).into_iter().collect();
    let runtime = Handle::current();
    app.bulk.run(move || runtime.block_on(read(form, &headers, body, max_images))).await?
}

async fn read(form: Form, headers: &HeaderMap, body: Bytes, max_images: usize) -> Result<ClassifyInput, ApiError> {
    if body.is_empty() {
        return Err(ApiError::new(ErrorCode::EmptyBody, "the request has no body; send an image"));
    }
    let input = match form {
        // Images of every format hold bytes of zero, and `curl -d` drops them, as it does line breaks.
        Form::UrlEncoded if !body.contains(&0) => {
            return Err(ApiError::new(
                ErrorCode::UnsupportedMediaType,
                "a form in application/x-www-form-urlencoded holds no image; with curl, send the file itself by `-T FILE` \
                 or `--data-binary @FILE` (`-d` changes it), or a form by `-F image=@FILE`",
            ));
        }
        Form::Raw | Form::UrlEncoded => {
            ClassifyInput { images: vec![Ok(Image::Encoded(body))], ..ClassifyInput::default() }
        }
        Form::Json => parse_json(&body, max_images)?,
        Form::Multipart => parse_multipart(headers, body, max_images).await?,
    };
    if input.images.len() > max_images {
        return Err(too_many(max_images));
    }
    if input.images.is_empty() {
        return Err(ApiError::invalid("the request contains no image"));
    }
    Ok(input)
}

fn too_many(max_images: usize) -> ApiError {
    ApiError::new(ErrorCode::BatchTooLarge, format!("at most {max_images} images are accepted in one request"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Raw,
    /// What `curl --data-binary` says when not told otherwise, and what forms of a page say.
    UrlEncoded,
    Json,
    Multipart,
}

impl Form {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(Self::Raw) };
        let unsupported = |given: &str| {
            let message = format!(
                "content type `{given}` is not accepted; send an image, multipart/form-data or application/json"
            );
            ApiError::new(ErrorCode::UnsupportedMediaType, message)
        };
        let text = value.to_str().map_err(|_| unsupported("(unreadable)"))?;
        if text.trim().is_empty() {
            return Ok(Self::Raw);
        }
        let mime: mime::Mime = text.parse().map_err(|_| unsupported(text))?;
        match (mime.type_(), mime.subtype()) {
            // What the bytes are is seen when they are decoded; all of these say no more than that they are bytes.
            (mime::IMAGE | mime::STAR, _) | (_, mime::OCTET_STREAM) => Ok(Self::Raw),
            (mime::APPLICATION, mime::WWW_FORM_URLENCODED) => Ok(Self::UrlEncoded),
            (mime::APPLICATION, mime::JSON) => Ok(Self::Json),
            (mime::MULTIPART, mime::FORM_DATA) => Ok(Self::Multipart),
            _ => Err(unsupported(text)),
        }
    }
}

/// Images in JSON: Hugging Face's schema.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonRequest {
    inputs: Inputs,
    #[serde(default)]
    #[schema(value_type = Option<JsonParameters>)]
    parameters: Option<Object<JsonParameters>>,
    /// The expert set to ask, unless path or query name one; `set` is understood too.
    #[serde(default, alias = "set")]
    model: Option<String>,
    /// What Hugging Face's hosted service is told; changes nothing here.
    #[serde(default, rename = "options")]
    #[schema(value_type = Option<JsonOptions>)]
    _options: Option<Object<JsonOptions>>,
}

/// What else is asked for.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields)]
struct JsonParameters {
    /// How many labels to answer, best first.
    #[serde(default)]
    #[schema(value_type = Option<usize>, minimum = 1)]
    top_k: Option<Count>,
    /// What turns the model's numbers into scores; `softmax` when left out.
    #[serde(default)]
    function_to_apply: Option<ScoreFunction>,
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
    /// Whether `/hf` answers the label `unknown`, before all others, for a picture that is.
    #[serde(default)]
    unknown: Option<bool>,
}

/// Hints for Hugging Face's hosted service. A set is always waited for, and answers are never cached.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields)]
struct JsonOptions {
    #[serde(default, rename = "wait_for_model")]
    _wait_for_model: Option<bool>,
    #[serde(default, rename = "use_cache")]
    _use_cache: Option<bool>,
}

/// How the part of a picture becomes a square: its centre, all of it between black bars, or all of it out of shape.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "names the values of a string in the documentation")]
pub(super) enum FitName {
    Crop,
    Pad,
    Stretch,
}

/// Images in a form.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a form that axum reads")]
pub(super) struct ImageForm {
    /// A file; further files, and this one, may have any name. Text fields and files without a byte are no images.
    #[schema(value_type = String, format = Binary)]
    image: Bytes,
    /// How many labels to answer, best first.
    #[schema(minimum = 1, required = false)]
    top_k: usize,
    /// What turns the model's numbers into scores; `softmax` when left out.
    #[schema(required = false)]
    function_to_apply: ScoreFunction,
    /// The part of each picture to look at, `x,y,w,h`.
    #[schema(required = false, example = "0.25,0,0.5,1")]
    crop: String,
    /// How that part becomes a square.
    #[schema(required = false)]
    fit: FitName,
    /// The picture is unknown when the best label's softmax score is lower.
    #[schema(required = false, minimum = 0, maximum = 1)]
    min_score: f32,
}

/// A request that can be sent as it stands.
pub(super) fn example() -> Value {
    json!({ "inputs": EXAMPLE_IMAGE, "parameters": { "top_k": 3 } })
}

/// A red pixel as a PNG file.
pub(super) const EXAMPLE_IMAGE: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC";

/// One base64 string or a list of them. Written by hand so that a body of a million tiny values costs a count, not a
/// million allocations, so that no string is kept beside what it stands for, and so that errors say what was expected.
struct Inputs {
    items: Vec<Result<Bytes, classify::Error>>,
    count: usize,
    is_list: bool,
}

impl Inputs {
    /// Strings kept of a list; above any sensible `max_images`, whose check comes later.
    const KEEP: usize = 4096;
}

impl PartialSchema for Inputs {
    fn schema() -> RefOr<Schema> {
        let image =
            || ObjectBuilder::new().schema_type(Type::String).format(Some(SchemaFormat::Custom("image".into())));
        let one = image().description(Some("An image in base64, or a `data:` URL."));
        let list = ArrayBuilder::new().items(image()).min_items(Some(1)).description(Some("Several images."));
        OneOfBuilder::new().item(one).item(list).into()
    }
}

impl ToSchema for Inputs {}

impl<'de> Deserialize<'de> for Inputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputsVisitor;

        impl<'de> Visitor<'de> for InputsVisitor {
            type Value = Inputs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a base64 string, a data: URL, or a list of them")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Inputs, E> {
                Ok(Inputs { items: vec![decode_base64(text)], count: 1, is_list: false })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Inputs, A::Error> {
                let mut inputs = Inputs { items: Vec::new(), count: 0, is_list: true };
                while inputs.items.len() < Inputs::KEEP {
                    let Some(Decoded(item)) = list.next_element()? else { return Ok(inputs) };
                    inputs.items.push(item);
                    inputs.count += 1;
                }
                while list.next_element::<IgnoredAny>()?.is_some() {
                    inputs.count += 1;
                }
                Ok(inputs)
            }
        }

        deserializer.deserialize_any(InputsVisitor)
    }
}

/// What a base64 string of a list stands for.
struct Decoded(Result<Bytes, classify::Error>);

impl<'de> Deserialize<'de> for Decoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl Visitor<'_> for TextVisitor {
            type Value = Decoded;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a base64 string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Decoded, E> {
                Ok(Decoded(decode_base64(text)))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

fn parse_json(body: &[u8], max_images: usize) -> Result<ClassifyInput, ApiError> {
    let request: JsonRequest = json::read(body)?;
    if request.inputs.count > max_images.min(Inputs::KEEP) {
        return Err(too_many(max_images));
    }
    let Object(parameters) = request.parameters.unwrap_or_default();
    let top_k = parameters.top_k.map(|count| count.0);
    if top_k == Some(0) {
        return Err(bad_top_k());
    }
    Ok(ClassifyInput {
        images: request.inputs.items.into_iter().map(|image| image.map(Image::Encoded)).collect(),
        is_batch: request.inputs.is_list,
        set: request.model,
        top_k,
        function: parameters.function_to_apply.unwrap_or_default(),
        look: Look { crop: parameters.crop.map(|crop| crop.0), fit: parameters.fit },
        min_score: parameters.min_score,
        unknown_label: parameters.unknown.unwrap_or(false),
    })
}

/// Base64, plain or as a `data:` URL, standard or URL-safe alphabet, line breaks allowed.
fn decode_base64(text: &str) -> Result<Bytes, classify::Error> {
    let text = text.trim();
    let encoded = match text.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")) {
        None => text,
        Some(_) => match text.split_once(',') {
            Some((media, data)) if media.to_ascii_lowercase().ends_with(";base64") => data,
            _ => return Err(classify::Error::Form("a data: URL must be `data:<type>;base64,<data>`".into())),
        },
    };
    let without_breaks = match encoded.bytes().any(|byte| byte.is_ascii_whitespace()) {
        true => Cow::Owned(encoded.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect()),
        false => Cow::Borrowed(encoded.as_bytes()),
    };
    let engine = if without_breaks.iter().any(|byte| b"-_".contains(byte)) { &URL_SAFE } else { &STANDARD };
    let bytes = engine
        .decode(without_breaks)
        .map_err(|error| classify::Error::Form(format!("the base64 is broken: {error}")))?;
    if bytes.is_empty() { Err(ImageError::Empty.into()) } else { Ok(bytes.into()) }
}

async fn parse_multipart(headers: &HeaderMap, body: Bytes, max_images: usize) -> Result<ClassifyInput, ApiError> {
    let broken = |error: &dyn fmt::Display| ApiError::invalid(format!("the multipart body is not understood: {error}"));
    let head = Arc::new(AtomicUsize::new(0));
    let mut request = Request::new(Body::from_stream(Pieces { rest: body, rests: true, head: Arc::clone(&head) }));
    request.headers_mut().extend(headers.get(header::CONTENT_TYPE).map(|v| (header::CONTENT_TYPE, v.clone())));
    // The body's size was limited when it was received.
    DefaultBodyLimit::disable().apply(&mut request);
    let mut parts = Multipart::from_request(request, &()).await.map_err(|error| broken(&error))?;
    let mut input = ClassifyInput::default();
    let mut others = 0;
    loop {
        // The reader looks for the end of a part's head before it looks at the head.
        head.store(HEAD_BYTES, Ordering::Relaxed);
        let part = parts.next_field().await.map_err(|error| match head.load(Ordering::Relaxed) {
            0 => broken(&format!("the head of a part has more than {HEAD_BYTES} bytes")),
            _ => broken(&error.body_text()),
        });
        let Some(part) = part? else { break };
        head.store(usize::MAX, Ordering::Relaxed);
        let name = part.name().unwrap_or_default().to_owned();
        let is_file = is_file(&part);
        let bytes = part.bytes().await.map_err(|error| broken(&error.body_text()))?;
        if !is_file || bytes.is_empty() {
            others += 1;
            if others > MOST_FIELDS {
                return Err(broken(&format!("it has more than {MOST_FIELDS} parts that are no images")));
            }
        }
        if !is_file {
            if bytes.len() > TEXT_BYTES {
                return Err(broken(&format!("the field `{}` has more than {TEXT_BYTES} bytes", cut(&name))));
            }
            let text = std::str::from_utf8(&bytes).map_err(|error| broken(&error))?;
            parameter(&mut input, &name, text.trim())?;
        } else if bytes.is_empty() {
            // What a page sends for a file that nobody chose.
        } else if input.images.len() == max_images {
            return Err(too_many(max_images));
        } else {
            input.images.push(Ok(Image::Encoded(bytes)));
        }
    }
    input.is_batch = input.images.len() > 1;
    Ok(input)
}

/// A form's bytes, piece by piece, so that its reader does not copy all of them before it looks at the first.
struct Pieces {
    rest: Bytes,
    /// Whether the reader has looked at the last piece; it wants the first one at once.
    rests: bool,
    /// Bytes that a head may still take; 0 once it wanted more.
    head: Arc<AtomicUsize>,
}

impl Stream for Pieces {
    type Item = Result<Bytes, &'static str>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        self.rests = !self.rests;
        if self.rests {
            // The reader takes all that is ready; it looks at what it has only when nothing is.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let length = self.rest.len().min(PIECE_BYTES);
        let Some(left) = self.head.load(Ordering::Relaxed).checked_sub(length) else {
            self.head.store(0, Ordering::Relaxed);
            return Poll::Ready(Some(Err("the head of a part is too long")));
        };
        self.head.store(left, Ordering::Relaxed);
        Poll::Ready(Some(Ok(self.rest.split_to(length))))
    }
}

/// A file has a name, or a content type that is not text's; everything else in a form is a text field.
/// The content type of a picture file that is sent back as it came.
pub fn picture_type(bytes: &[u8]) -> &'static str {
    match bytes.get(..4) {
        Some([0xff, 0xd8, 0xff, _]) => "image/jpeg",
        Some(b"\x89PNG") => "image/png",
        _ => "application/octet-stream",
    }
}

fn is_file(part: &Field<'_>) -> bool {
    let is_text = |kind: &str| kind.trim().is_empty() || kind.trim_start().to_ascii_lowercase().starts_with("text/");
    part.file_name().is_some() || part.content_type().is_some_and(|kind| !is_text(kind))
}

/// Takes in a text field of a form. A page's form may have fields that mean nothing here, such as its button; one that
/// looks like a parameter must not be passed over without a word.
fn parameter(input: &mut ClassifyInput, name: &str, text: &str) -> Result<(), ApiError> {
    const PARAMETERS: [&str; 7] = ["set", "model", "top_k", "function_to_apply", "crop", "fit", "min_score"];
    /// Parameters of the query.
    const ELSEWHERE: [&str; 2] = ["version", "routing"];
    match name {
        "set" | "model" => input.set = Some(text.to_owned()),
        "top_k" => input.top_k = Some(parse_top_k(text)?),
        "crop" => input.look = parse_look(Some(text), None)?.or(input.look),
        "fit" => input.look = parse_look(None, Some(text))?.or(input.look),
        "min_score" => input.min_score = parse_min_score(Some(text))?,
        // DeepStack's word for it, and its key, which is of no use here.
        "min_confidence" => {
            let wrong = |_| ApiError::invalid("min_confidence is a number from 0 to 1");
            input.min_score = parse_min_score(Some(text)).map_err(wrong)?;
        }
        "api_key" => {}
        "function_to_apply" => {
            let wrong = |_: serde::de::value::Error| ApiError::invalid("function_to_apply is softmax, sigmoid or none");
            input.function = ScoreFunction::deserialize(text.into_deserializer()).map_err(wrong)?;
        }
        _ if ELSEWHERE.contains(&name) => {
            return Err(ApiError::invalid(format!("`{name}` goes into the query: /classify?{name}={text}")));
        }
        _ if nearest(name, &PARAMETERS).is_some() => {
            return Err(ApiError::invalid(unknown_name("the form's field", name, &PARAMETERS)));
        }
        _ => {
            if let Some(repeated) = REPEATS.admit("unknown field of a form") {
                tracing::warn!(field = cut(name).as_ref(), repeated, "a form has a field that nobody knows");
            }
        }
    }
    Ok(())
}

/// `top_k` as text.
///
/// # Errors
/// 400 unless it is a positive number.
pub fn parse_top_k(text: &str) -> Result<usize, ApiError> {
    let count = match text.parse::<usize>() {
        // More than there can be labels.
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => usize::MAX,
        parsed => parsed.unwrap_or(0),
    };
    if count > 0 { Ok(count) } else { Err(bad_top_k()) }
}

/// `crop` and `fit` as text.
///
/// # Errors
/// 400 unless they are a part of a picture and a way to fit it.
pub fn parse_look(crop: Option<&str>, fit: Option<&str>) -> Result<Look, ApiError> {
    let invalid = |error: model_core::image::ViewError| ApiError::invalid(error.to_string());
    let crop = crop.map(str::parse).transpose().map_err(invalid)?;
    Ok(Look { crop, fit: fit.map(str::parse).transpose().map_err(invalid)? })
}

/// `min_score` as text.
///
/// # Errors
/// 400 unless it is a number from 0 to 1.
pub fn parse_min_score(text: Option<&str>) -> Result<Option<MinScore>, ApiError> {
    text.map(str::parse).transpose().map_err(|error: MinScoreError| ApiError::invalid(error.to_string()))
}

fn bad_top_k() -> ApiError {
    ApiError::invalid("top_k must be a positive whole number")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(content_type: Option<&'static str>) -> HeaderMap {
        content_type.map(|value| (header::CONTENT_TYPE, HeaderValue::from_static(value))).into_iter().collect()
    }

    /// The images' files, or what a client is told in their place.
    fn files(images: Vec<Result<Image, classify::Error>>) -> Vec<Result<Bytes, ErrorCode>> {
        let file = |image| match image {
            Image::Encoded(file) => file,
            other => panic!("{other:?}"),
        };
        images.into_iter().map(|image| image.map(file).map_err(|error| ApiError::from(error).code())).collect()
    }

    async fn parse_as(content_type: Option<&'static str>, body: &[u8]) -> Result<ClassifyInput, ApiError> {
        let headers = headers(content_type);
        read(Form::of(&headers)?, &headers, Bytes::copy_from_slice(body), 3).await
    }

    #[tokio::test]
    async fn raw_bodies_come_with_many_content_types() {
        for content_type in [
            None,
            Some(""),
            Some("image/jpeg"),
            Some("image/whatever; q=1"),
            Some("application/octet-stream"),
            Some("binary/octet-stream"),
            Some("*/*"),
            Some("application/x-www-form-urlencoded"),
        ] {
            let input = parse_as(content_type, b"bytes\0").await.unwrap();
            assert_eq!(files(input.images), [Ok(Bytes::from_static(b"bytes\0"))], "{content_type:?}");
            assert!(!input.is_batch);
        }
        let form = parse_as(Some("application/x-www-form-urlencoded"), b"image=@cat.jpg").await.unwrap_err();
        assert!(form.to_string().contains("--data-binary"), "{form}");
        for content_type in ["text/plain", "nonsense", "application/xml"] {
            let error = parse_as(Some(content_type), b"bytes").await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::UnsupportedMediaType, "{content_type}");
        }
        assert_eq!(parse_as(None, b"").await.unwrap_err().code(), ErrorCode::EmptyBody);
    }

    #[tokio::test]
    async fn json_comes_single_and_as_a_list() {
        let json = Some("application/json; charset=utf-8");
        let single = parse_as(json, br#"{"inputs":"aGk=","parameters":{"top_k":2},"model":"s"}"#).await.unwrap();
        assert_eq!(files(single.images), [Ok(Bytes::from_static(b"hi"))]);
        assert_eq!((single.top_k, single.set.as_deref(), single.is_batch), (Some(2), Some("s"), false));

        let list = br#"{"inputs":["data:image/png;base64,aGk","aG\nk=","%"],"parameters":null,"options":{"wait_for_model":true}}"#;
        let list = parse_as(json, list).await.unwrap();
        assert!(list.is_batch);
        let hi = || Ok(Bytes::from_static(b"hi"));
        assert_eq!(files(list.images), [hi(), hi(), Err(ErrorCode::InvalidRequest)]);
    }

    #[tokio::test]
    async fn wrong_json_is_refused_with_a_reason() {
        let many = format!(r#"{{"inputs":[{}"a"]}}"#, r#""","#.repeat(9000));
        let cases: [(&[u8], ErrorCode); 14] = [
            (br#"{"inputs":"aGk=","parameters":{"topk":1}}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":"aGk=","threshold":0.5}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":"aGk=","options":{"wait":true}}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":"aGk=","parameters":{"function_to_apply":"relu"}}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":"aGk=","parameters":{"top_k":0}}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":"aGk=","parameters":[1]}"#, ErrorCode::InvalidRequest),
            (b"{", ErrorCode::InvalidRequest),
            (b"[]", ErrorCode::InvalidRequest),
            (b"{}", ErrorCode::InvalidRequest),
            (br#"{"inputs":3}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":[1]}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":[]}"#, ErrorCode::InvalidRequest),
            (br#"{"inputs":["a","a","a","a"]}"#, ErrorCode::BatchTooLarge),
            (many.as_bytes(), ErrorCode::BatchTooLarge),
        ];
        for (body, code) in cases {
            let error = parse_as(Some("application/json"), body).await.unwrap_err();
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[tokio::test]
    async fn multipart_takes_files_of_any_name() {
        let part = |disposition: &str, data: &str| {
            format!("--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{data}\r\n")
        };
        let body = part("name=\"file\"; filename=\"a.png\"", "one")
            + &part("name=\"top_k\"", "3")
            + &part("name=\"set\"", "flowers")
            + &part("name=\"whatever\"", "a text field")
            + &part("name=\"nothing chosen\"; filename=\"\"", "")
            + &part("name=\"none\"\r\nContent-Type: image/png", "two")
            + "--b--\r\n";
        let input = parse_as(Some("multipart/form-data; boundary=b"), body.as_bytes()).await.unwrap();
        assert_eq!(files(input.images), [Ok(Bytes::from_static(b"one")), Ok(Bytes::from_static(b"two"))]);
        assert_eq!((input.top_k, input.set.as_deref(), input.is_batch), (Some(3), Some("flowers"), true));

        for (field, said) in
            [("topk", "did you mean `top_k`?"), ("Model ", "did you mean `model`?"), ("routing", "query")]
        {
            let body = part("name=\"f\"; filename=\"x\"", "x") + &part(&format!("name=\"{field}\""), "1") + "--b--\r\n";
            let error = parse_as(Some("multipart/form-data; boundary=b"), body.as_bytes()).await.unwrap_err();
            assert!(error.code() == ErrorCode::InvalidRequest && error.to_string().contains(said), "{field}: {error}");
        }
        let none = part("name=\"image\"", "a text") + &part("name=\"f\"; filename=\"\"", "") + "--b--\r\n";
        let error = parse_as(Some("multipart/form-data; boundary=b"), none.as_bytes()).await.unwrap_err();
        assert!(error.to_string().contains("no image"), "{error}");
        let too_many = part("name=\"f\"; filename=\"x\"", "x").repeat(4) + "--b--\r\n";
        let error = parse_as(Some("multipart/form-data; boundary=b"), too_many.as_bytes()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::BatchTooLarge);
        for body in ["--b\r\nContent-Dis", "", "junk"] {
            let parsed = parse_as(Some("multipart/form-data; boundary=b"), body.as_bytes()).await;
            assert!(parsed.is_err(), "{body}");
        }
        assert!(parse_as(Some("multipart/form-data"), b"x").await.is_err(), "no boundary");

        // Heads and text fields are bounded, files are not, whatever pieces the body is read in.
        let large = "x".repeat(300_000);
        let file = part("name=\"f\"; filename=\"x\"", &large) + &part("name=\"f\"; filename=\"x\"", "y") + "--b--\r\n";
        let input = parse_as(Some("multipart/form-data; boundary=b"), file.as_bytes()).await.unwrap();
        let sizes: Vec<usize> = files(input.images).iter().map(|file| file.as_ref().unwrap().len()).collect();
        assert_eq!(sizes, [300_000, 1]);
        for (head, body, said) in [
            (format!("name=\"{large}\""), "x", "the head of a part"),
            ("name=\"set\"".into(), &large[..], "more than 4096 bytes"),
        ] {
            let body = part(&head, body) + "--b--\r\n";
            let error = parse_as(Some("multipart/form-data; boundary=b"), body.as_bytes()).await.unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
