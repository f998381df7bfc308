//! Keys: who may classify, who may manage.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use sha2::{Digest as _, Sha256};

use crate::error::{ApiError, ErrorCode};

/// Named keys, kept as hashes: nothing that is logged or dumped by mistake contains one.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

/// A key with its name.
#[derive(Clone)]
pub struct Key {
    /// For the log.
    pub name: String,
    hash: [u8; 32],
    /// Who sends it.
    pub caller: Caller,
}

/// Who asks for images to be classified, as far as rates go.
#[derive(Clone, Default)]
pub struct Caller(Option<Arc<DefaultDirectRateLimiter>>);

impl Caller {
    /// Counts images against what the key may send; without a rate nothing is counted.
    ///
    /// # Errors
    /// 429, saying when to come back.
    pub fn charge(&self, images: usize) -> Result<(), ApiError> {
        let count = u32::try_from(images).map_or(Some(NonZeroU32::MAX), NonZeroU32::new);
        let (Some(limiter), Some(count)) = (&self.0, count) else { return Ok(()) };
        let limited = |text: &str| ApiError::new(ErrorCode::RateLimited, text);
        match limiter.check_n(count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => {
                let wait = until.wait_time_from(DefaultClock::default().now());
                Err(limited("this key has sent as many images as it may; try again later").retry_after(wait))
            }
            // Flags are checked so that a full request passes, so this is no request that could be answered.
            Err(_) => Err(limited("these are more images than this key may ever send at once")),
        }
    }
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Caller(limited)" } else { "Caller" })
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.name)).finish()
    }
}

impl Keys {
    /// One key a line, `NAME:KEY` or `KEY`; empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// A sentence that names the line, never the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let unnamed = format!("key-{number}");
            let (name, key) = line.split_once(':').unwrap_or((&unnamed, line));
            if key.len() < 8 {
                return Err(format!("line {number}: a key needs at least 8 characters"));
            }
            keys.push(Key { name: name.to_owned(), hash: hash(key), caller: Caller::default() });
        }
        Ok(Self(keys))
    }

    /// Keys of a file and of an environment variable together.
    ///
    /// # Errors
    /// A sentence that names file or variable.
    pub fn load(file: Option<&Path>, variable: &str) -> Result<Self, String> {
        let mut keys = match std::env::var(variable) {
            // Commas for those who find line breaks in an environment awkward.
            Ok(text) => Self::parse(&text.replace(',', "\n")).map_err(|error| format!("{variable}: {error}"))?,
            Err(_) => Self::default(),
        };
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            keys.0.extend(Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?.0);
        }
        Ok(keys)
    }

    /// Limits each key to so many images per second, and so many at once after a rest.
    #[must_use]
    pub fn with_rate(mut self, per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        for key in &mut self.0 {
            key.caller = Caller(Some(Arc::new(RateLimiter::direct(quota))));
        }
        self
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Finds `key`. Every key is compared, and every byte of its hash, so that time tells nothing.
    pub fn find(&self, key: &str) -> Option<&Key> {
        let hash = hash(key);
        let equal = |other: &[u8; 32]| std::iter::zip(&hash, other).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0;
        self.0.iter().fold(None, |found, key| if equal(&key.hash) { Some(key) } else { found })
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names_and_are_never_shown() {
        let keys = Keys::parse("# comment\n\nalice:secret-one\nsecret-two\n").unwrap();
        let name = |key: &str| keys.find(key).map(|key| key.name.as_str());
        assert_eq!(name("secret-one"), Some("alice"));
        assert_eq!(name("secret-two"), Some("key-4"));
        assert_eq!(name("secret-three"), None);
        assert!(!format!("{keys:?}").contains("secret"));
        assert_eq!(Keys::parse("ok-ok-ok\nshort").unwrap_err(), "line 2: a key needs at least 8 characters");
    }

    #[test]
    fn each_key_has_a_rate_of_its_own() {
        // Twenty images come back in twenty seconds, which no step of this test takes.
        let (slow, burst) = (NonZeroU32::MIN, NonZeroU32::new(40).unwrap());
        let keys = Keys::parse("a:secret-one\nb:secret-two").unwrap().with_rate(slow, burst);
        let (a, b) = (&keys.find("secret-one").unwrap().caller, &keys.find("secret-two").unwrap().caller);
        assert_eq!(a.charge(30), Ok(()));
        assert_eq!(a.charge(0), Ok(()));
        let refused = a.charge(30).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::RateLimited);
        assert_eq!(b.charge(30), Ok(()), "another key's images are its own");
        assert_eq!(b.charge(usize::MAX).unwrap_err().code(), ErrorCode::RateLimited);
        assert_eq!(Caller::default().charge(usize::MAX), Ok(()));
    }
}
