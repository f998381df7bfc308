//! The JSON of a safetensors header. Parsed here rather than by the library because the library takes the last of several
//! entries of one name and passes over keys that it does not know: two files with the same digest could then mean
//! different things to different readers.

use std::collections::{HashMap, HashSet};
use std::fmt;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::error::ArtifactError;

/// Parses a header, and checks that its tensors cover the data section without gap or overlap.
pub(super) fn parse(header: &[u8]) -> Result<Metadata, ArtifactError> {
    let Entries { metadata, mut tensors } = serde_json::from_slice(header).map_err(ArtifactError::Header)?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Metadata::new(metadata, tensors).map_err(|error| ArtifactError::Header(serde_json::Error::custom(error)))
}

struct Entries {
    metadata: Option<HashMap<String, String>>,
    tensors: Vec<(String, TensorInfo)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// `__metadata__`: every key once.
struct Texts(HashMap<String, String>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Entries { metadata: None, tensors: Vec::new() };
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("the key `{name}` occurs twice")));
                    }
                    if name == "__metadata__" {
                        entries.metadata = Some(map.next_value::<Texts>()?.0);
                    } else {
                        let Entry { dtype, shape, data_offsets } = map.next_value()?;
                        entries.tensors.push((name, TensorInfo { dtype, shape, data_offsets }));
                    }
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextsVisitor;

        impl<'de> Visitor<'de> for TextsVisitor {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
                let mut texts = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if texts.insert(key.clone(), value).is_some() {
                        return Err(A::Error::custom(format_args!("the key `{key}` occurs twice in `__metadata__`")));
                    }
                }
                Ok(Texts(texts))
            }
        }

        deserializer.deserialize_map(TextsVisitor)
    }
}
