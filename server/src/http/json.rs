//! JSON bodies of requests and answers.

use std::fmt::{self, Write as _};
use std::marker::PhantomData;

use super::error::ApiError;
use crate::sentence::unknown_name;

use model_core::image::Crop;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

/// Names of Hugging Face's zero-shot requests.
const ZERO_SHOT: [&str; 4] = ["candidate_labels", "candidateLabels", "hypothesis_template", "hypothesisTemplate"];

/// Reads a request's JSON, an object.
///
/// # Errors
/// 400 with a sentence that names what is wrong; a field that nobody knows, by its name.
pub fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, ApiError> {
    let parsed: Result<Object<T>, _> = serde_json::from_slice(json);
    parsed.map(|Object(value)| value).map_err(|error| {
        let mut text = Ends::default();
        // Writing to memory does not fail.
        let _ = write!(text, "{error}");
        ApiError::invalid(explain(&text.into_string()))
    })
}

/// Both ends of a text whose middle a client may have made as long as a body.
#[derive(Debug, Default)]
struct Ends {
    head: String,
    tail: String,
    is_cut: bool,
}

impl Ends {
    /// Most bytes of either end; a text that fits into the first is whole.
    const MOST: usize = 2 << 10;

    fn into_string(self) -> String {
        let Self { head, tail, is_cut } = self;
        head + if is_cut { "…" } else { "" } + &tail
    }
}

impl fmt::Write for Ends {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = if self.tail.is_empty() { Self::MOST - self.head.len() } else { 0 };
        let (head, tail) = text.split_at(boundary(text, rest));
        self.head.push_str(head);
        self.tail.push_str(&tail[boundary(tail, tail.len().saturating_sub(Self::MOST))..]);
        let excess = boundary(&self.tail, self.tail.len().saturating_sub(Self::MOST));
        self.is_cut |= excess > 0 || tail.len() > Self::MOST;
        self.tail.drain(..excess);
        Ok(())
    }
}

/// The last place up to `at` where a text may be cut.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// What a reader derived with `deny_unknown_fields` says, as a sentence of ours.
fn explain(error: &str) -> String {
    let Some((name, known)) = unknown_field(error) else {
        return format!("the request's JSON is not understood: {error}");
    };
    if ZERO_SHOT.contains(&name) {
        return format!(
            "`{name}` asks for zero-shot classification, which is not done here: an expert set has the labels it was \
             trained for, and answers with those"
        );
    }
    unknown_name("the request's field", name, &known)
}

/// The unknown field and the known ones of "unknown field `a`, expected one of `b`, `c` at line 1 column 2".
fn unknown_field(error: &str) -> Option<(&str, Vec<&str>)> {
    let named = error.strip_prefix("unknown field `")?;
    // From behind, since the client chose the name.
    let (name, known) = named.rsplit_once("`, expected ").or_else(|| named.rsplit_once("`, there are no fields"))?;
    Some((name, known.split('`').skip(1).step_by(2).collect()))
}

/// A `T` that came as a JSON object. Derived readers take a list of a struct's values in its place, which no client
/// means and no document mentions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// A list of at most `N` entries. The next one ends the reading: a longer list is never stored.
#[derive(Debug, Clone)]
pub struct AtMost<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for AtMost<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for AtMost<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const N: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for ListVisitor<T, N> {
            type Value = AtMost<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<AtMost<T, N>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = list.next_element()? {
                    if entries.len() == N {
                        return Err(serde::de::Error::invalid_length(N + 1, &self));
                    }
                    entries.push(entry);
                }
                Ok(AtMost(entries))
            }
        }

        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

/// A whole number from zero on, also one that JSON spells `5.0` or `1e30`; what does not fit stands for the largest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count(pub usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor;

        impl Visitor<'_> for CountVisitor {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number from zero on")
            }

            fn visit_u64<E>(self, value: u64) -> Result<Count, E> {
                Ok(Count(usize::try_from(value).unwrap_or(usize::MAX)))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Count, E> {
                // The cast saturates.
                if value >= 0.0 && value.fract() == 0.0 {
                    Ok(Count(value as usize))
                } else {
                    Err(E::custom("not a whole number from zero on"))
                }
            }
        }

        deserializer.deserialize_any(CountVisitor)
    }
}

/// A part of a picture: the text `x,y,w,h`, or a list of four numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JsonCrop(pub Crop);

impl<'de> Deserialize<'de> for JsonCrop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CropVisitor;

        impl<'de> Visitor<'de> for CropVisitor {
            type Value = JsonCrop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a crop `x,y,w,h` or a list of its four numbers")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<JsonCrop, E> {
                text.parse().map(JsonCrop).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<JsonCrop, A::Error> {
                use serde::de::Error;
                let (mut numbers, mut has_point) = ([0.0; 4], false);
                for (i, number) in numbers.iter_mut().enumerate() {
                    let next: Option<serde_json::Number> = list.next_element()?;
                    let next = next.ok_or_else(|| A::Error::invalid_length(i, &self))?;
                    has_point |= next.is_f64();
                    *number = next.as_f64().ok_or_else(|| A::Error::custom("a number of the crop is too large"))?;
                }
                if list.next_element::<serde::de::IgnoredAny>()?.is_some() {
                    return Err(A::Error::invalid_length(5, &self));
                }
                Crop::new(numbers, has_point).map(JsonCrop).map_err(A::Error::custom)
            }
        }

        deserializer.deserialize_any(CropVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Deserialize)]
    struct Pair {
        #[serde(default)]
        a: u8,
        #[serde(default)]
        b: Option<Object<Box<Pair>>>,
    }

    #[test]
    fn counts_are_whole_numbers_however_they_are_spelt() {
        let read = |text: &str| serde_json::from_str::<Count>(text).ok().map(|count| count.0);
        for (text, expected) in [("0", 0), ("7", 7), ("7.0", 7), ("2e3", 2000), ("1e30", usize::MAX), ("-0.0", 0)] {
            assert_eq!(read(text), Some(expected), "{text}");
        }
        for text in ["-1", "0.5", "\"7\"", "null", "true", "[]"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn of_a_long_text_both_ends_are_kept() {
        let ends = |parts: [&str; 3]| {
            let mut ends = Ends::default();
            parts.iter().for_each(|part| ends.write_str(part).unwrap());
            ends.into_string()
        };
        assert_eq!(ends(["unknown field `", "a", "`, expected `b`"]), "unknown field `a`, expected `b`");
        for middle in [3000, 5000, 1_000_000] {
            let text = ends(["unknown field `", &"é".repeat(middle), "`, expected `b`"]);
            assert!(text.len() <= 2 * Ends::MOST + 10 && text.starts_with("unknown field `é"), "{middle}");
            assert_eq!(unknown_field(&text).map(|(_, known)| known), Some(vec!["b"]), "{middle}");
        }
    }

    #[test]
    fn an_unknown_field_is_named_with_the_known_ones() {
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[expect(dead_code, reason = "only the names matter")]
        struct Known {
            #[serde(default)]
            top_k: u8,
            #[serde(default, alias = "set")]
            model: u8,
        }
        let refused = |json: &str| read::<Known>(json.as_bytes()).unwrap_err().to_string();
        let topk = refused(r#"{"topk":3}"#);
        assert_eq!(
            topk,
            "the request's field `topk` is unknown; did you mean `top_k`? (there are `top_k`, `model`, `set`)"
        );
        let odd = refused(r#"{"a`, expected `b":3}"#);
        assert!(odd.starts_with("the request's field `a`, expected `b` is unknown"), "{odd}");
        assert!(refused(r#"{"candidate_labels":["cat"]}"#).contains("zero-shot"));
        assert!(refused(r#"{"top_k":"#).contains("not understood"));
    }

    #[test]
    fn a_crop_is_a_text_or_four_numbers() {
        let read = |text: &str| serde_json::from_str::<JsonCrop>(text).ok().map(|crop| crop.0);
        for (text, expected) in [
            ("\"10,20,30,40\"", Crop::Pixels([10, 20, 30, 40])),
            ("[10, 20, 30, 40]", Crop::Pixels([10, 20, 30, 40])),
            ("[0, 0, 1, 1]", Crop::default()),
            ("[0.5, 0, 0.5, 1]", Crop::Shares([0.5, 0.0, 0.5, 1.0])),
        ] {
            assert_eq!(read(text), Some(expected), "{text}");
        }
        for text in ["[]", "[1,2,3]", "[1,2,3,4,5]", "[1,2,3,\"4\"]", "1", "null", "{}", "[0,0,0,0]", "\"0,0,2.0,1\""] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn a_list_ends_with_its_last_allowed_entry() {
        let read = |text: &str| serde_json::from_str::<AtMost<u8, 2>>(text).map(|list| list.0);
        assert!(read("[]").unwrap().is_empty());
        assert_eq!(read("[1,2]").unwrap(), [1, 2]);
        // The third ends it, whatever follows.
        let error = read(r#"[1,2,3,"never looked at""#).unwrap_err().to_string();
        assert!(error.contains("expected a list of at most 2"), "{error}");
        assert!(read("{}").is_err());
    }

    #[test]
    fn objects_are_objects_and_not_lists() {
        let read = |text: &str| serde_json::from_str::<Object<Pair>>(text);
        let pair = read(r#"{"a":1,"b":{"a":2,"b":null},"c":[]}"#).unwrap().0;
        assert_eq!((pair.a, pair.b.map(|inner| inner.0.a)), (1, Some(2)));
        for text in ["[]", "[1,null]", r#"{"b":[]}"#, "null", "1"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
