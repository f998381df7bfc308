//! Keys: who may classify, who may manage.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use sha2::{Digest as _, Sha256};

/// A key sends more images than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OverRate {
    /// It has sent too many lately.
    #[error("this key has sent as many images as it may; try again later")]
    Now {
        /// When as many would pass.
        retry_after: Duration,
    },
    /// A request never passes with so many.
    #[error("these are more images than this key may ever send at once")]
    Always,
}

/// Named keys, kept as hashes: nothing that is logged or dumped by mistake contains one.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

/// A key with its name.
#[derive(Clone)]
pub struct Key {
    /// Names the key in logs.
    pub name: String,
    hash: [u8; 32],
    pub caller: Caller,
}

/// The client that a rate belongs to.
#[derive(Clone, Default)]
pub struct Caller(Option<Arc<DefaultDirectRateLimiter>>);

impl Caller {
    /// Counts images against what the key may send; without a rate nothing is counted.
    pub fn charge(&self, images: usize) -> Result<(), OverRate> {
        let count = u32::try_from(images).map_or(Some(NonZeroU32::MAX), NonZeroU32::new);
        let (Some(limiter), Some(count)) = (&self.0, count) else { return Ok(()) };
        match limiter.check_n(count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(OverRate::Now { retry_after: until.wait_time_from(DefaultClock::default().now()) }),
            // Flags are checked so that a full request passes, so this is no request that could be answered.
            Err(_) => Err(OverRate::Always),
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
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let unnamed = format!("key-{number}");
            let (name, key) = line.split_once(':').unwrap_or((&unnamed, line));
            if key.len() < 8 {
                bail!("line {number}: a key needs at least 8 characters");
            }
            keys.push(Key { name: name.to_owned(), hash: hash(key), caller: Caller::default() });
        }
        Ok(Self(keys))
    }

    /// Keys of a file and of an environment variable together. Neither need be given, but what is given holds a key:
    /// an empty secret must not open the door.
    ///
    /// # Errors
    /// A sentence that names file or variable.
    pub fn load(file: Option<&Path>, variable: &str) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        let mut add = |text: &str| -> anyhow::Result<()> {
            let Self(found) = Self::parse(text)?;
            ensure!(!found.is_empty(), "there is no key in it");
            keys.extend(found);
            Ok(())
        };
        if let Some(text) = std::env::var_os(variable) {
            // Commas for those who find line breaks in an environment awkward.
            let text = text.to_str().context("it is not UTF-8").map(|text| text.replace(',', "\n"));
            text.and_then(|text| add(&text)).with_context(|| variable.to_owned())?;
        }
        if let Some(path) = file {
            let read = std::fs::read_to_string(path).map_err(anyhow::Error::from);
            read.and_then(|text| add(&text)).with_context(|| path.display().to_string())?;
        }
        Ok(Self(keys))
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
        assert_eq!(
            Keys::parse("ok-ok-ok\nshort").unwrap_err().to_string(),
            "line 2: a key needs at least 8 characters"
        );
    }

    #[test]
    fn each_key_has_a_rate_of_its_own() {
        // Twenty images come back in twenty seconds, which no step of this test takes.
        let (slow, burst) = (NonZeroU32::MIN, NonZeroU32::new(40).unwrap());
        let keys = Keys::parse("a:secret-one\nb:secret-two").unwrap().with_rate(slow, burst);
        let (a, b) = (&keys.find("secret-one").unwrap().caller, &keys.find("secret-two").unwrap().caller);
        assert_eq!(a.charge(30), Ok(()));
        assert_eq!(a.charge(0), Ok(()));
        assert!(matches!(a.charge(30), Err(OverRate::Now { .. })));
        assert_eq!(b.charge(30), Ok(()), "another key's images are its own");
        assert_eq!(b.charge(usize::MAX), Err(OverRate::Always));
        assert_eq!(Caller::default().charge(usize::MAX), Ok(()));
    }
}
