//! Eviction thresholds and node reservations, parsed from the text the configuration holds them in.
//!
//! Maps of text go in, signals with amounts and resources with quantities come out; an error names the entry. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::go_duration::GoDuration;
use crate::quantity::Quantity;

/// Resource name (`cpu`, `memory`, `ephemeral-storage`, `pid`) to the amount kept from pods.
pub type Reservation = BTreeMap<String, Quantity>;

/// What a threshold watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    MemoryAvailable,
    NodeFsAvailable,
    NodeFsInodesFree,
    ImageFsAvailable,
    ImageFsInodesFree,
    ContainerFsAvailable,
    ContainerFsInodesFree,
    AllocatableMemoryAvailable,
    PidAvailable,
}

impl Signal {
    pub const ALL: [Self; 9] = [
        Self::MemoryAvailable,
        Self::NodeFsAvailable,
        Self::NodeFsInodesFree,
        Self::ImageFsAvailable,
        Self::ImageFsInodesFree,
        Self::ContainerFsAvailable,
        Self::ContainerFsInodesFree,
        Self::AllocatableMemoryAvailable,
        Self::PidAvailable,
    ];

    /// The name in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory.available",
            Self::NodeFsAvailable => "nodefs.available",
            Self::NodeFsInodesFree => "nodefs.inodesFree",
            Self::ImageFsAvailable => "imagefs.available",
            Self::ImageFsInodesFree => "imagefs.inodesFree",
            Self::ContainerFsAvailable => "containerfs.available",
            Self::ContainerFsInodesFree => "containerfs.inodesFree",
            Self::AllocatableMemoryAvailable => "allocatableMemory.available",
            Self::PidAvailable => "pid.available",
        }
    }

    fn parse(name: &str) -> Result<Self, ThresholdError> {
        let found = Self::ALL.into_iter().find(|signal| signal.as_str() == name);
        found.ok_or_else(|| ThresholdError(format!("unsupported eviction signal {name}")))
    }
}

/// An amount, or a share of the capacity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    Quantity(Quantity),
    /// 0.0 to 1.0.
    Share(f32),
}

impl Amount {
    /// In the unit of `capacity` (bytes, inodes, processes); a share is cut to whole units as Go cuts it.
    pub fn of(self, capacity: i64) -> i64 {
        match self {
            Self::Quantity(quantity) => quantity.value(),
            Self::Share(share) => (f64::from(share) * capacity as f64) as i64,
        }
    }
}

/// Below `value` the node is under pressure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    pub signal: Signal,
    pub value: Amount,
    /// None for a hard threshold.
    pub grace_period: Option<Duration>,
    /// What an eviction frees at least beyond the threshold.
    pub min_reclaim: Option<Amount>,
}

/// Why thresholds or reservations do not parse; upstream's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ThresholdError(String);

/// Text maps of the configuration: signal to threshold, grace period or amount.
pub type Texts = BTreeMap<String, String>;

/// Hard and soft thresholds; `0%` and `100%` turn one off.
pub fn parse_thresholds(
    hard: &Texts,
    soft: &Texts,
    grace: &Texts,
    reclaim: &Texts,
) -> Result<Vec<Threshold>, ThresholdError> {
    let mut min_reclaim = BTreeMap::new();
    for (name, text) in reclaim {
        min_reclaim.insert(Signal::parse(name)?, parse_amount(name, text, "eviction percentage minimum reclaim")?);
    }
    let mut grace_periods = BTreeMap::new();
    for (name, text) in grace {
        let period = GoDuration::parse(text).map_err(|error| ThresholdError(error.to_string()))?;
        if period.is_negative() {
            return Err(ThresholdError(format!(
                "invalid eviction grace period specified: {name}={text}, must be a positive value"
            )));
        }
        grace_periods.insert(Signal::parse(name)?, period.std());
    }
    let mut thresholds = Vec::new();
    for (name, text) in hard {
        thresholds.extend(parse_threshold(name, text)?);
    }
    for (name, text) in soft {
        let Some(mut threshold) = parse_threshold(name, text)? else { continue };
        let period = grace_periods.get(&threshold.signal).copied();
        threshold.grace_period = Some(period.ok_or_else(|| {
            ThresholdError(format!("grace period must be specified for the soft eviction threshold {name}"))
        })?);
        thresholds.push(threshold);
    }
    for threshold in &mut thresholds {
        threshold.min_reclaim = min_reclaim.get(&threshold.signal).copied();
    }
    Ok(thresholds)
}

fn parse_threshold(name: &str, text: &str) -> Result<Option<Threshold>, ThresholdError> {
    let signal = Signal::parse(name)?;
    if matches!(text, "0%" | "100%") {
        return Ok(None);
    }
    let value = parse_amount(name, text, "eviction percentage threshold")?;
    if let Amount::Quantity(quantity) = value
        && (quantity.is_zero() || quantity.is_negative())
    {
        return Err(ThresholdError(format!("eviction threshold {name} must be positive: {quantity}")));
    }
    Ok(Some(Threshold { signal, value, grace_period: None, min_reclaim: None }))
}

fn parse_amount(name: &str, text: &str, what: &str) -> Result<Amount, ThresholdError> {
    let Some(percent) = text.strip_suffix('%') else {
        return Quantity::parse(text).map(Amount::Quantity).map_err(|error| ThresholdError(format!("{name}: {error}")));
    };
    let share = percent
        .parse::<f32>()
        .map_err(|_| ThresholdError(format!("{name}: strconv.ParseFloat: parsing {percent:?}: invalid syntax")))?
        / 100.0;
    match share {
        share if share < 0.0 => Err(ThresholdError(format!("{what} {name} must be >= 0%: {text}"))),
        share if share > 1.0 => Err(ThresholdError(format!("{what} {name} must be <= 100%: {text}"))),
        share => Ok(Amount::Share(share)),
    }
}

/// `systemReserved` or `kubeReserved`; CPU is rounded to the nearest millicore.
pub fn parse_reservation(texts: &Texts) -> Result<Reservation, ThresholdError> {
    let mut reservation = Reservation::new();
    for (name, text) in texts {
        if !matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage" | "pid") {
            return Err(ThresholdError(format!("cannot reserve {name:?} resource")));
        }
        let quantity = Quantity::parse(text).map_err(|error| {
            ThresholdError(format!("failed to parse quantity {text:?} for {name:?} resource: {error}"))
        })?;
        if quantity.is_negative() {
            return Err(ThresholdError(format!("resource quantity for {name:?} cannot be negative: {text}")));
        }
        let quantity = if name == "cpu" {
            Quantity::from_millis(quantity.micro_value().saturating_add(500) / 1000)
        } else {
            quantity
        };
        reservation.insert(name.clone(), quantity);
    }
    Ok(reservation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(pairs: &[(&str, &str)]) -> Texts {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    fn hard(pairs: &[(&str, &str)]) -> Result<Vec<Threshold>, String> {
        let none = Texts::new();
        parse_thresholds(&texts(pairs), &none, &none, &none).map_err(|error| error.to_string())
    }

    #[test]
    fn hard_thresholds() {
        let parsed = hard(&[("memory.available", "100Mi"), ("nodefs.available", "10%"), ("imagefs.available", "0%")]);
        let parsed = parsed.unwrap();
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[0].value.of(1 << 40), 100 << 20);
        assert_eq!((parsed[1].signal, parsed[1].value.of(1000)), (Signal::NodeFsAvailable, 100));
        for (name, text, message) in [
            ("disk", "1", "unsupported eviction signal disk"),
            ("memory.available", "0", "eviction threshold memory.available must be positive: 0"),
            ("memory.available", "101%", "eviction percentage threshold memory.available must be <= 100%: 101%"),
        ] {
            assert_eq!(hard(&[(name, text)]), Err(message.to_owned()));
        }
    }

    #[test]
    fn a_soft_threshold_needs_a_grace_period() {
        let (none, soft) = (Texts::new(), texts(&[("memory.available", "1Gi")]));
        let error = parse_thresholds(&none, &soft, &none, &none).unwrap_err();
        assert_eq!(
            error.to_string(),
            "grace period must be specified for the soft eviction threshold memory.available"
        );
        let grace = texts(&[("memory.available", "1m30s")]);
        let parsed = parse_thresholds(&none, &soft, &grace, &texts(&[("memory.available", "5%")])).unwrap();
        assert_eq!(parsed[0].grace_period, Some(Duration::from_secs(90)));
        assert_eq!(parsed[0].min_reclaim, Some(Amount::Share(0.05)));
    }

    #[test]
    fn reservations() {
        let parsed = parse_reservation(&texts(&[("cpu", "0.2504"), ("memory", "500Mi"), ("pid", "1000")])).unwrap();
        assert_eq!((parsed["cpu"].milli_value(), parsed["memory"].value()), (250, 500 << 20));
        assert_eq!(
            parse_reservation(&texts(&[("gpu", "1")])).unwrap_err().to_string(),
            "cannot reserve \"gpu\" resource"
        );
    }
}
