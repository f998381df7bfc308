//! Sizes and durations as people write them on a command line: `64MiB`, `1.5 GB`, `250ms`, `10s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes; parses `4096`, `64MiB`, `64 MB`, `1.5GiB` and the like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

impl ByteSize {
    /// `mib * 2^20` bytes.
    pub const fn mib(mib: usize) -> Self {
        Self(mib << 20)
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split_unit(text);
        let factor: f64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "ki" | "kib" => 1024.0,
            "mi" | "mib" => 1048576.0,
            "gi" | "gib" => 1073741824.0,
            _ => return Err(format!("`{unit}` is not a unit of size; use B, kB, MB, GB, KiB, MiB or GiB")),
        };
        let value = parse_number(number)? * factor;
        // 2^53 is where f64 stops counting single bytes, far above any memory this runs on.
        if value < 9007199254740992.0 { Ok(Self(value as usize)) } else { Err(format!("{text} is too large")) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => write!(f, "{}MiB", n >> 20),
            n if n >= 1 << 20 => write!(f, "{:.1}MiB", n as f64 / 1048576.0),
            n if n >= 1 << 10 => write!(f, "{:.1}KiB", n as f64 / 1024.0),
            n => write!(f, "{n}B"),
        }
    }
}

/// Parses `250ms`, `10s`, `1.5 m`; a bare number is seconds.
///
/// # Errors
/// A sentence naming what is wrong.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("`{unit}` is not a unit of time; use us, ms, s, m or h")),
    };
    let seconds = parse_number(number)? * factor;
    if seconds <= 365.0 * 86400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("{text} is longer than a year"))
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

fn parse_number(text: &str) -> Result<f64, String> {
    text.parse::<f64>().map_err(|_| format!("`{text}` is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_decimal_and_binary_units() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("64 MB", 64_000_000), ("1.5KiB", 1536), ("2gib", 2 << 30)]
        {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        for text in ["", "MiB", "-1", "1.2.3", "5 parsecs", "1e3", "99999999999999GiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_size_prints_as_it_parses() {
        for size in [ByteSize(0), ByteSize(512), ByteSize::mib(64), ByteSize(1536)] {
            assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size));
        }
    }

    #[test]
    fn durations_parse() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("1.5 m"), Ok(Duration::from_secs(90)));
        for text in ["", "s", "-1s", "3 weeks", "9999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
