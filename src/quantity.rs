//! Kubernetes quantities: `100m`, `1.5Gi`, `12E`, parsed exactly and written in Go's canonical form.
//!
//! Text from pod specs, node reservations and the configuration goes in; whole units, thousandths or the canonical text
//! come out. Pure: touches nothing. The grammar and the rounding are those of apimachinery's `resource.Quantity`: the
//! smallest step is one nano, anything finer is rounded away from zero, and `value`/`milli_value` round away from zero
//! too ("if you ask for some, you get some").

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// One unit in nanos.
const UNIT: i128 = 1_000_000_000;
/// One thousandth in nanos.
const MILLI: i128 = 1_000_000;
/// The largest magnitude kept, in nanos (10^29 units): far above `i64`, and sums of many still fit in an `i128`.
const LIMIT: i128 = 100_000_000_000_000_000_000_000_000_000_000_000_000;

/// Millicores: 1000 is one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MilliCpu(pub i64);

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub i64);

/// Why a text is not a quantity. The messages are apimachinery's, followed by the text at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error(
        "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$' (value: {0:?})"
    )]
    Format(String),
    #[error("unable to parse quantity's suffix (value: {0:?})")]
    Suffix(String),
}

/// In which family of suffixes a quantity is written back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Format {
    /// `12e6`
    DecimalExponent,
    /// `12M`
    DecimalSi,
    /// `12Mi`
    BinarySi,
}

/// An exact amount with the suffix family it was written in. Equality and order look at the amount alone.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    pub const ZERO: Self = Self { nanos: 0, format: Format::DecimalSi };

    /// Parses every form Kubernetes accepts: sign, decimals, `n u m k M G T P E`, `Ki..Ei`, `e3`, `E-2`.
    /// Binary amounts are capped at `i64::MAX` as Go caps them; decimal ones at 10^29.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let parts = Parts::split(text)?;
        let (magnitude, format) = match interpret(parts.suffix) {
            Some(Scale::Decimal(exponent, format)) => (parts.times_power_of_ten(exponent), format),
            Some(Scale::Binary(shift)) => {
                let nanos = parts.times(UNIT << shift).min(i128::from(i64::MAX) * UNIT);
                // Below one unit Go turns to decimal suffixes for good.
                let format = if nanos > 0 && nanos < UNIT { Format::DecimalSi } else { Format::BinarySi };
                (nanos, format)
            }
            None => return Err(QuantityError::Suffix(text.to_owned())),
        };
        Ok(Self { nanos: if parts.negative { -magnitude } else { magnitude }, format })
    }

    /// `value` whole units, written with decimal suffixes (Go's `NewQuantity(v, DecimalSI)`).
    pub fn from_units(value: i64) -> Self {
        Self { nanos: i128::from(value) * UNIT, format: Format::DecimalSi }
    }

    /// `value` thousandths, written with decimal suffixes (Go's `NewMilliQuantity`).
    pub fn from_millis(value: i64) -> Self {
        Self { nanos: i128::from(value) * MILLI, format: Format::DecimalSi }
    }

    /// `value` bytes, written with binary suffixes (Go's `NewQuantity(v, BinarySI)`).
    pub fn from_bytes(value: i64) -> Self {
        Self { nanos: i128::from(value) * UNIT, format: Format::BinarySi }
    }

    /// Whole units, fractions rounded away from zero, capped to `i64`.
    pub fn value(&self) -> i64 {
        divide_away(self.nanos, UNIT)
    }

    /// Thousandths, fractions rounded away from zero, capped to `i64`.
    pub fn milli_value(&self) -> i64 {
        divide_away(self.nanos, MILLI)
    }

    /// Millionths, fractions rounded away from zero, capped to `i64`.
    pub fn micro_value(&self) -> i64 {
        divide_away(self.nanos, MILLI / 1000)
    }

    /// How many `divisor`s, rounded up: what `resourceFieldRef` writes. A zero divisor means 1, as an unset one does.
    pub fn ceil_div(&self, divisor: &Self) -> i64 {
        let by = if divisor.nanos == 0 { UNIT } else { divisor.nanos };
        let quotient = self.nanos / by;
        let up = i128::from(self.nanos % by != 0 && (self.nanos < 0) == (by < 0));
        clamp(quotient.saturating_add(up))
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// The sum, in this one's suffix family; a zero takes over the other's.
    #[must_use]
    pub fn add(&self, other: &Self) -> Self {
        let format = if self.is_zero() { other.format } else { self.format };
        Self { nanos: self.nanos.saturating_add(other.nanos).clamp(-LIMIT, LIMIT), format }
    }

    /// The difference, in this one's suffix family; a zero takes over the other's.
    #[must_use]
    pub fn sub(&self, other: &Self) -> Self {
        let format = if self.is_zero() { other.format } else { self.format };
        Self { nanos: self.nanos.saturating_sub(other.nanos).clamp(-LIMIT, LIMIT), format }
    }

    /// `percent` hundredths of this amount, as eviction thresholds and `qosReserved` ask for.
    #[must_use]
    pub fn percent(&self, percent: f64) -> Self {
        let nanos = (self.value() as f64 * percent / 100.0) as i64;
        Self { nanos: i128::from(nanos) * UNIT, format: Format::BinarySi }
    }

    /// Go's canonical text: no fraction, the largest suffix that keeps the amount exact (`1024Ki` → `1Mi`,
    /// `0.1` → `100m`, `1e3` stays `1e3`).
    pub fn to_canonical(&self) -> String {
        if self.nanos == 0 {
            return "0".to_owned();
        }
        let whole = self.nanos % UNIT == 0;
        match self.format {
            Format::BinarySi if whole && self.nanos.abs() >= 1024 * UNIT => canonical_binary(self.nanos / UNIT),
            Format::BinarySi | Format::DecimalSi => canonical_decimal(self.nanos, si_suffix),
            Format::DecimalExponent => canonical_decimal(self.nanos, exponent_suffix),
        }
    }
}

/// CPU of a pod spec or node reservation in millicores, rounded up.
pub fn cpu_millis(quantity: &ApiQuantity) -> Result<MilliCpu, QuantityError> {
    Quantity::parse(&quantity.0).map(|q| MilliCpu(q.milli_value()))
}

/// Memory or storage in bytes, rounded up.
pub fn bytes(quantity: &ApiQuantity) -> Result<Bytes, QuantityError> {
    Quantity::parse(&quantity.0).map(|q| Bytes(q.value()))
}

/// The text in three pieces, leading zeros gone.
struct Parts<'a> {
    negative: bool,
    whole: &'a str,
    fraction: &'a str,
    suffix: &'a str,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, QuantityError> {
        let wrong = || QuantityError::Format(text.to_owned());
        if text.is_empty() {
            return Err(wrong());
        }
        let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
        let (whole, rest) = take_digits(unsigned);
        let (fraction, suffix) = match rest.strip_prefix('.') {
            Some(after) => take_digits(after),
            None => ("", rest),
        };
        let after_letters = suffix.trim_start_matches(|c| "eEinumkKMGTP".contains(c));
        let after_sign = after_letters.strip_prefix(['-', '+']).unwrap_or(after_letters);
        if !take_digits(after_sign).1.is_empty() {
            return Err(wrong());
        }
        Ok(Self { negative: text.starts_with('-'), whole: whole.trim_start_matches('0'), fraction, suffix })
    }

    /// `whole.fraction × 10^exponent` in nanos, finer parts rounded up, capped at [`LIMIT`].
    fn times_power_of_ten(&self, exponent: i64) -> i128 {
        let shift = exponent.saturating_add(9).saturating_sub(self.fraction.len() as i64);
        let digits = [self.whole, self.fraction].concat();
        if shift >= 0 {
            return digits_value(&digits).saturating_mul(power_of_ten(shift)).min(LIMIT);
        }
        let dropped = usize::try_from(shift.unsigned_abs()).unwrap_or(usize::MAX).min(digits.len());
        let (kept, lost) = digits.split_at(digits.len() - dropped);
        let lost_something = lost.bytes().any(|d| d != b'0');
        digits_value(kept).saturating_add(i128::from(lost_something)).min(LIMIT)
    }

    /// `whole.fraction × factor`, rounded up. Nested floor division keeps the fraction exact for any number of digits.
    fn times(&self, factor: i128) -> i128 {
        let (mut part, mut inexact) = (0, false);
        for digit in self.fraction.bytes().rev() {
            part += factor * i128::from(digit - b'0');
            inexact |= part % 10 != 0;
            part /= 10;
        }
        digits_value(self.whole).saturating_mul(factor).saturating_add(part + i128::from(inexact))
    }
}

fn take_digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(text.len()))
}

fn digits_value(digits: &str) -> i128 {
    digits.bytes().fold(0, |sum: i128, d| sum.saturating_mul(10).saturating_add(i128::from(d - b'0')))
}

fn power_of_ten(exponent: i64) -> i128 {
    u32::try_from(exponent).ok().and_then(|e| 10_i128.checked_pow(e)).unwrap_or(i128::MAX)
}

enum Scale {
    Decimal(i64, Format),
    /// Power of two.
    Binary(u32),
}

const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

fn interpret(suffix: &str) -> Option<Scale> {
    if let Some((_, exponent)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some(Scale::Decimal(i64::from(*exponent), Format::DecimalSi));
    }
    if let Some(index) = (0_u32..).zip(BINARY).find_map(|(i, name)| (name == suffix).then_some(i)) {
        return Some(Scale::Binary(10 * (index + 1)));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    exponent.parse().ok().map(|e| Scale::Decimal(e, Format::DecimalExponent))
}

/// Takes thousands out of the mantissa, up to what `suffix` can name, and appends its name.
fn canonical_decimal(nanos: i128, suffix: fn(i32) -> Option<String>) -> String {
    let (mut mantissa, mut exponent) = (nanos, -9);
    while mantissa % 1000 == 0 && suffix(exponent + 3).is_some() {
        mantissa /= 1000;
        exponent += 3;
    }
    format!("{mantissa}{}", suffix(exponent).unwrap_or_default())
}

fn si_suffix(exponent: i32) -> Option<String> {
    DECIMAL.iter().find(|(_, e)| *e == exponent).map(|(name, _)| (*name).to_owned())
}

fn exponent_suffix(exponent: i32) -> Option<String> {
    Some(if exponent == 0 { String::new() } else { format!("e{exponent}") })
}

fn canonical_binary(units: i128) -> String {
    let (mut mantissa, mut suffix) = (units, "");
    for name in BINARY {
        if mantissa % 1024 != 0 {
            break;
        }
        mantissa /= 1024;
        suffix = name;
    }
    format!("{mantissa}{suffix}")
}

fn divide_away(nanos: i128, step: i128) -> i64 {
    let away = if nanos % step == 0 { 0 } else { nanos.signum() };
    clamp(nanos / step + away)
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_canonical())
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        Self::parse(text)
    }
}

impl TryFrom<&ApiQuantity> for Quantity {
    type Error = QuantityError;

    fn try_from(api: &ApiQuantity) -> Result<Self, QuantityError> {
        Self::parse(&api.0)
    }
}

impl From<Quantity> for ApiQuantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.to_canonical())
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ApiQuantity(text) = ApiQuantity::deserialize(deserializer)?;
        Self::parse(&text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantity(text: &str) -> Quantity {
        Quantity::parse(text).unwrap()
    }

    #[test]
    fn value_milli_and_canonical() {
        let table: &[(&str, i64, i64, &str)] = &[
            ("0", 0, 0, "0"),
            ("0Mi", 0, 0, "0"),
            ("100m", 1, 100, "100m"),
            ("0.1", 1, 100, "100m"),
            ("1", 1, 1000, "1"),
            ("1.5", 2, 1500, "1500m"),
            ("-1.5", -2, -1500, "-1500m"),
            ("+2", 2, 2000, "2"),
            ("1e3", 1000, 1_000_000, "1e3"),
            ("1E3", 1000, 1_000_000, "1e3"),
            ("12e-1", 2, 1200, "1200e-3"),
            ("1000k", 1_000_000, 1_000_000_000, "1M"),
            ("1024Ki", 1 << 20, 1_048_576_000, "1Mi"),
            ("1536Mi", 1536 << 20, 1_610_612_736_000, "1536Mi"),
            ("1.5Gi", 1536 << 20, 1_610_612_736_000, "1536Mi"),
            ("0.5Gi", 512 << 20, 536_870_912_000, "512Mi"),
            ("0.1Gi", 107_374_183, 107_374_182_400, "107374182400m"),
            ("0.5Ki", 512, 512_000, "512"),
            ("1Ei", 1 << 60, i64::MAX, "1Ei"),
            ("8Ei", i64::MAX, i64::MAX, "9223372036854775807"),
            ("12E", i64::MAX, i64::MAX, "12E"),
            ("1e30", i64::MAX, i64::MAX, "100e27"),
            ("1n", 1, 1, "1n"),
            ("0.1n", 1, 1, "1n"),
            ("100u", 1, 1, "100u"),
            ("1e-2000000", 1, 1, "1e-9"),
            ("0.000000000001Ki", 1, 1, "2n"),
            ("1000E", i64::MAX, i64::MAX, "1000E"),
            ("007", 7, 7000, "7"),
            (".5", 1, 500, "500m"),
            ("5.", 5, 5000, "5"),
        ];
        for (text, value, milli, canonical) in table {
            let q = quantity(text);
            assert_eq!(q.value(), *value, "value of {text}");
            assert_eq!(q.milli_value(), *milli, "milli value of {text}");
            assert_eq!(q.to_canonical(), *canonical, "canonical form of {text}");
        }
    }

    #[test]
    fn not_a_quantity() {
        for text in ["", " 1", "1 ", "1.2.3", "1Mi2k", "abc", "1,5", "٣"] {
            assert!(matches!(Quantity::parse(text), Err(QuantityError::Format(_))), "{text:?}");
        }
        for text in ["1K", "1mi", "1e", "1ee3", "1Eii", "--1", "1KiKi"] {
            assert!(matches!(Quantity::parse(text), Err(QuantityError::Suffix(_))), "{text:?}");
        }
    }

    #[test]
    fn ceil_div_counts_divisors_rounded_up() {
        for (amount, divisor, expected) in [
            ("250m", "1", 1),
            ("250m", "1m", 250),
            ("1500m", "1", 2),
            ("64Mi", "1Mi", 64),
            ("65Mi", "1Gi", 1),
            ("64Mi", "0", 64 << 20),
            ("0", "1Mi", 0),
        ] {
            assert_eq!(quantity(amount).ceil_div(&quantity(divisor)), expected, "{amount}/{divisor}");
        }
    }

    #[test]
    fn sum_keeps_the_family_of_the_first_that_is_not_zero() {
        assert_eq!(quantity("1Gi").add(&quantity("24Mi")).to_canonical(), "1048Mi");
        assert_eq!(quantity("0").add(&quantity("1Gi")).to_canonical(), "1Gi");
        assert_eq!(quantity("2").sub(&quantity("500m")).to_canonical(), "1500m");
        assert!(quantity("1Gi") > quantity("1G") && quantity("1000m") == quantity("1"));
    }

    #[test]
    fn api_quantities_round_up() {
        assert_eq!(cpu_millis(&ApiQuantity("0.0001".into())).unwrap(), MilliCpu(1));
        assert_eq!(bytes(&ApiQuantity("1.5Ki".into())).unwrap(), Bytes(1536));
        assert!(bytes(&ApiQuantity("lots".into())).is_err());
        let from_number: Quantity = serde_json::from_str("3").unwrap();
        assert_eq!(from_number.value(), 3);
        assert_eq!(Quantity::from_bytes(1 << 30).percent(10.0).value(), 107_374_182);
    }

    proptest! {
        #[test]
        fn canonical_form_keeps_the_amount(
            sign in "[+-]?", whole in "[0-9]{1,12}", fraction in "(\\.[0-9]{0,14})?",
            suffix in "(|n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|e[0-9]|E-[0-9])",
        ) {
            let q = quantity(&[sign, whole, fraction, suffix].concat());
            let again = quantity(&q.to_canonical());
            prop_assert_eq!(q, again);
            prop_assert_eq!(q.to_canonical(), again.to_canonical());
        }

        #[test]
        fn add_then_sub_is_identity(a in any::<i64>(), b in any::<i64>()) {
            let (a, b) = (Quantity::from_millis(a), Quantity::from_bytes(b));
            prop_assert_eq!(a.add(&b).sub(&b), a);
        }

        #[test]
        fn any_text_parses_or_errs(text in "[0-9eEinumkKMGTP.+-]{0,12}") {
            let _ = Quantity::parse(&text);
        }

        #[test]
        fn value_is_the_least_whole_above(millis in 0_i64..1_000_000_000_000) {
            let q = Quantity::from_millis(millis);
            prop_assert_eq!(q.milli_value(), millis);
            prop_assert_eq!(q.value(), (millis + 999) / 1000);
        }
    }
}
