//! Durations as Go writes them (`1m0s`, `100ms`, `1h2m3.5s`): the form of `metav1.Duration` and of duration flags.
//!
//! Text in, whole nanoseconds out, and back to Go's own spelling. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A signed duration in nanoseconds, as Go's `time.Duration` (about ±292 years).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GoDuration {
    nanos: i64,
}

/// Why a text is not a duration; worded as Go's `time.ParseDuration`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GoDurationError {
    #[error("time: invalid duration {0:?}")]
    Invalid(String),
    #[error("time: missing unit in duration {0:?}")]
    MissingUnit(String),
    #[error("time: unknown unit {1:?} in duration {0:?}")]
    UnknownUnit(String, String),
}

/// Units by size in nanoseconds, as Go accepts them (both signs for micro).
const UNITS: [(&str, i64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl GoDuration {
    pub const ZERO: Self = Self { nanos: 0 };

    pub const fn from_nanos(nanos: i64) -> Self {
        Self { nanos }
    }

    pub const fn from_millis(millis: i64) -> Self {
        Self { nanos: millis * 1_000_000 }
    }

    pub const fn from_secs(secs: i64) -> Self {
        Self { nanos: secs * 1_000_000_000 }
    }

    pub const fn nanos(self) -> i64 {
        self.nanos
    }

    /// As seconds, for messages.
    pub fn as_secs_f64(self) -> f64 {
        self.nanos as f64 / 1e9
    }

    pub const fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// As a std duration; a negative one is zero.
    pub const fn std(self) -> Duration {
        if self.nanos < 0 { Duration::ZERO } else { Duration::from_nanos(self.nanos.unsigned_abs()) }
    }

    pub fn parse(text: &str) -> Result<Self, GoDurationError> {
        let invalid = || GoDurationError::Invalid(text.to_owned());
        let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
        if unsigned == "0" {
            return Ok(Self::ZERO);
        }
        if unsigned.is_empty() {
            return Err(invalid());
        }
        let (mut rest, mut total) = (unsigned, 0_i64);
        while !rest.is_empty() {
            let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, after) = rest.split_at(number_end);
            let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_end);
            if !number.bytes().any(|b| b.is_ascii_digit()) {
                return Err(invalid());
            }
            if unit.is_empty() {
                return Err(GoDurationError::MissingUnit(text.to_owned()));
            }
            let size = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, size)| *size);
            let size = size.ok_or_else(|| GoDurationError::UnknownUnit(text.to_owned(), unit.to_owned()))?;
            let part = multiply(number, size).ok_or_else(invalid)?;
            total = total.checked_add(part).ok_or_else(invalid)?;
            rest = next;
        }
        Ok(Self { nanos: if text.starts_with('-') { -total } else { total } })
    }
}

/// `1.5` times the unit, cut to whole nanoseconds; None for a second dot or an overflow.
fn multiply(number: &str, unit: i64) -> Option<i64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()? };
    let mut nanos = whole.checked_mul(unit)?;
    let mut scale = unit;
    for digit in fraction.bytes() {
        if !digit.is_ascii_digit() {
            return None;
        }
        scale /= 10;
        nanos = nanos.checked_add(i64::from(digit - b'0') * scale)?;
    }
    Some(nanos)
}

impl fmt::Display for GoDuration {
    /// Go's spelling: the largest unit below a second, else hours, minutes and seconds without leading zero parts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0s");
        }
        if self.nanos < 0 {
            f.write_str("-")?;
        }
        let nanos = self.nanos.unsigned_abs();
        for (unit, size) in [("ns", 1), ("µs", 1_000), ("ms", 1_000_000)] {
            if nanos < size * 1000 {
                return write!(f, "{}{unit}", decimal(nanos, size));
            }
        }
        let (minutes, rest) = (nanos / 60_000_000_000, nanos % 60_000_000_000);
        if minutes >= 60 {
            write!(f, "{}h", minutes / 60)?;
        }
        if minutes > 0 {
            write!(f, "{}m", minutes % 60)?;
        }
        write!(f, "{}s", decimal(rest, 1_000_000_000))
    }
}

/// `nanos / size` as a decimal without trailing zeros.
fn decimal(nanos: u64, size: u64) -> String {
    let (whole, rest) = (nanos / size, nanos % size);
    if rest == 0 {
        return whole.to_string();
    }
    let width = size.ilog10() as usize;
    format!("{whole}.{}", format!("{rest:0width$}").trim_end_matches('0'))
}

impl FromStr for GoDuration {
    type Err = GoDurationError;

    fn from_str(text: &str) -> Result<Self, GoDurationError> {
        Self::parse(text)
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spelled_as_go() {
        for (text, nanos, canonical) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("60s", 60_000_000_000, "1m0s"),
            ("1m0s", 60_000_000_000, "1m0s"),
            ("4h", 14_400_000_000_000, "4h0m0s"),
            ("100ms", 100_000_000, "100ms"),
            ("1.5s", 1_500_000_000, "1.5s"),
            ("1h2m3.5s", 3_723_500_000_000, "1h2m3.5s"),
            (".5m", 30_000_000_000, "30s"),
            ("-1m", -60_000_000_000, "-1m0s"),
            ("1us", 1_000, "1µs"),
            ("1µs5ns", 1_005, "1.005µs"),
        ] {
            let parsed = GoDuration::parse(text).unwrap();
            assert_eq!((parsed.nanos(), parsed.to_string().as_str()), (nanos, canonical), "{text}");
        }
    }

    #[test]
    fn errors_worded_as_go() {
        for (text, message) in [
            ("", "time: invalid duration \"\""),
            ("5", "time: missing unit in duration \"5\""),
            ("1d", "time: unknown unit \"d\" in duration \"1d\""),
            ("s", "time: invalid duration \"s\""),
            ("1.2.3s", "time: invalid duration \"1.2.3s\""),
            ("9999999h", "time: invalid duration \"9999999h\""),
        ] {
            assert_eq!(GoDuration::parse(text).unwrap_err().to_string(), message);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(nanos in -i64::MAX..i64::MAX) {
            let duration = GoDuration::from_nanos(nanos);
            prop_assert_eq!(GoDuration::parse(&duration.to_string()), Ok(duration));
        }
    }
}
