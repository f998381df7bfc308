//! Features of an example that are kept for the next fit: a key of everything that they depend on, then the features, then
//! the digest of both, so that what is damaged is not taken for features.

use model_core::image::View;
use sha2::{Digest as _, Sha256};

use super::features::Extractor;

/// Begins every file, with a number that changes when the layout does, or what the engine computes.
const MAGIC: &[u8; 8] = b"bvitft01";
const DIGEST: usize = 32;

/// All that the features of a picture depend on: the picture, this program, backbone and experts, what is looked at and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key([u8; DIGEST]);

impl Key {
    /// The key of a picture's file, by an extractor that looks at it in so many ways.
    pub(super) fn of(picture: &[u8], extractor: &Extractor, view: View, views: usize) -> Self {
        let mut hash = Sha256::new();
        let backbone = extractor.backbone();
        let experts = extractor.experts();
        let crop = view.crop.map(f64::to_bits);
        let about = format!(
            "{} {} {} {experts} {crop:?} {:?} {views} ",
            env!("CARGO_PKG_VERSION"),
            backbone.isa(),
            backbone.digest(),
            view.fit,
        );
        hash.update(about);
        hash.update(picture);
        Self(hash.finalize().into())
    }
}

/// The bytes of a file with these features.
pub(super) fn encode(key: &Key, features: &[f32]) -> Vec<u8> {
    let values = features.iter().flat_map(|value| value.to_le_bytes());
    let mut bytes: Vec<u8> = MAGIC.iter().copied().chain(key.0).chain(values).collect();
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    bytes
}

/// What became of the features in a file.
#[derive(Debug, PartialEq)]
pub(super) enum Kept {
    Features(Vec<f32>),
    /// They are of something else: another backbone, or another part of the picture.
    Other,
    /// The file is no such file, or not any more.
    Damaged,
}

/// Reads so many features of what has that key.
pub(super) fn decode(bytes: &[u8], key: &Key, count: usize) -> Kept {
    let Some((body, digest)) = bytes.split_last_chunk::<DIGEST>() else { return Kept::Damaged };
    let Some((head, values)) = body.split_first_chunk::<{ MAGIC.len() + DIGEST }>() else { return Kept::Damaged };
    if head[..MAGIC.len()] != *MAGIC || Sha256::digest(body)[..] != digest[..] || values.len() % size_of::<f32>() != 0 {
        return Kept::Damaged;
    }
    if head[MAGIC.len()..] != key.0 || values.len() / size_of::<f32>() != count {
        return Kept::Other;
    }
    let (values, _) = values.as_chunks::<4>();
    let features: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
    if features.iter().all(|value| value.is_finite()) { Kept::Features(features) } else { Kept::Damaged }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_come_back_to_the_last_bit_and_nothing_else_does() {
        let (key, other) = (Key([7; DIGEST]), Key([8; DIGEST]));
        let features = [0.1, -0.0, 1e-40, 3.5e38_f64 as f32 / 2.0];
        let bytes = encode(&key, &features[..3]);
        let Kept::Features(back) = decode(&bytes, &key, 3) else { panic!("they are there") };
        assert!(back.iter().zip(&features).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!((decode(&bytes, &other, 3), decode(&bytes, &key, 2)), (Kept::Other, Kept::Other));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length], &key, 3), Kept::Damaged, "{length}");
            let mut flipped = bytes.clone();
            flipped[length] ^= 1;
            assert_eq!(decode(&flipped, &key, 3), Kept::Damaged, "{length}");
        }
        assert_eq!(decode(&encode(&key, &[f32::NAN]), &key, 1), Kept::Damaged);
    }
}
