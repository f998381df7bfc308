//! JSON bodies of requests and answers.

use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};

/// A `T` that came as a JSON object. Derived readers take a list of a struct's values in its place, which no client
/// means and no document mentions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(ObjectVisitor(PhantomData))
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

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
    fn objects_are_objects_and_not_lists() {
        let read = |text: &str| serde_json::from_str::<Object<Pair>>(text);
        let pair = read(r#"{"a":1,"b":{"a":2,"b":null},"c":[]}"#).unwrap().0;
        assert_eq!((pair.a, pair.b.map(|inner| inner.0.a)), (1, Some(2)));
        for text in ["[]", "[1,null]", r#"{"b":[]}"#, "null", "1"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
