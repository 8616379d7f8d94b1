//! Flag values from text to JSON, with the error texts of Go's flag library. Pure.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::flags::Kind;
use crate::config::{GoDuration, parse_taint};
use crate::quantity::Quantity;

/// The value of `text`, merged with what the same flag gave before.
pub(super) fn parse(kind: Kind, text: &str, before: Option<Value>) -> Result<Value, String> {
    match kind {
        Kind::Bool => parse_bool(text).map(Value::from),
        Kind::Int32 => parse_int(text, i64::from(i32::MIN), i64::from(i32::MAX)).map(Value::from),
        Kind::Int64 => parse_int(text, i64::MIN, i64::MAX).map(Value::from),
        Kind::Duration => GoDuration::parse(text).map(|d| json!(d)).map_err(|error| error.to_string()),
        Kind::Text => Ok(json!(text)),
        Kind::Ip if text.is_empty() || text.parse::<IpAddr>().is_ok() => Ok(json!(text)),
        Kind::Ip => Err(format!("{text:?} is not a valid IP address")),
        Kind::List => Ok(appended(before, text.split(',').filter(|_| !text.is_empty()).map(|item| json!(item)))),
        Kind::Map => pairs(text, '=', before),
        Kind::MapNoSplit => pair(text, '=').map(|(key, value)| merged(before, [(key, json!(value))])),
        Kind::Labels => Ok(merged(before, parts(text).map(label))),
        Kind::Thresholds => pairs(text, '<', before),
        Kind::Headers => headers(text, before),
        Kind::Gates => gates(text, before),
        Kind::Taints => parts(text).map(|part| parse_taint(part).map(|taint| json!(taint))).collect(),
        Kind::ReservedMemory => reserved_memory(text, before),
        Kind::Level => parse_uint31(text).map(Value::from),
        Kind::VModule => vmodule(text, before),
    }
}

/// Go's `strconv.ParseBool`.
pub(super) fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("strconv.ParseBool: parsing {text:?}: invalid syntax")),
    }
}

/// Go's `strconv.ParseInt` with base 0.
fn parse_int(text: &str, least: i64, most: i64) -> Result<i64, String> {
    let failed = |why: &str| format!("strconv.ParseInt: parsing {text:?}: {why}");
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let lower = unsigned.to_ascii_lowercase();
    let (digits, radix) = match lower.as_bytes() {
        [b'0', b'x', ..] => (&lower[2..], 16),
        [b'0', b'b', ..] => (&lower[2..], 2),
        [b'0', b'o', ..] => (&lower[2..], 8),
        [b'0', _, ..] => (&lower[1..], 8),
        _ => (lower.as_str(), 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(failed("invalid syntax"));
    }
    let magnitude = i128::from_str_radix(digits, radix).map_err(|_| failed("value out of range"))?;
    let value = if text.starts_with('-') { -magnitude } else { magnitude };
    match i64::try_from(value) {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(failed("value out of range")),
    }
}

fn parse_uint31(text: &str) -> Result<u32, String> {
    let failed = |why: &str| format!("strconv.ParseUint: parsing {text:?}: {why}");
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(failed("invalid syntax"));
    }
    let value = text.parse::<u32>().ok().filter(|value| *value <= i32::MAX.unsigned_abs());
    value.ok_or_else(|| failed("value out of range"))
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|part| !part.is_empty())
}

fn pair(text: &str, separator: char) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once(separator).ok_or_else(|| format!("malformed pair, expect string{separator}string"))?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

fn pairs(text: &str, separator: char, before: Option<Value>) -> Result<Value, String> {
    let found: Result<Vec<_>, String> =
        parts(text).map(|part| pair(part, separator).map(|(key, value)| (key, json!(value)))).collect();
    Ok(merged(before, found?))
}

fn label(part: &str) -> (String, Value) {
    let (key, value) = part.split_once('=').unwrap_or((part, ""));
    (key.trim().to_owned(), json!(value.trim()))
}

fn gates(text: &str, before: Option<Value>) -> Result<Value, String> {
    let found: Result<Vec<_>, String> = parts(text)
        .map(|part| {
            let (gate, value) = part.split_once('=').ok_or("malformed pair, expect string=bool")?;
            let (gate, value) = (gate.trim(), value.trim());
            let on = parse_bool(value).map_err(|error| format!("invalid value of {gate}: {value}, err: {error}"))?;
            Ok((gate.to_owned(), json!(on)))
        })
        .collect();
    Ok(merged(before, found?))
}

fn headers(text: &str, before: Option<Value>) -> Result<Value, String> {
    let mut map = object(before);
    for part in parts(text) {
        let (name, value) = pair(part, ':')?;
        let values = map.entry(name).or_insert_with(|| json!([]));
        *values = appended(Some(values.take()), [json!(value)]);
    }
    Ok(Value::Object(map))
}

fn vmodule(text: &str, before: Option<Value>) -> Result<Value, String> {
    let found: Result<Vec<_>, String> = parts(text)
        .map(|part| match part.split('=').collect::<Vec<_>>()[..] {
            [pattern, level] if !pattern.is_empty() && !level.is_empty() => {
                let level = parse_uint31(level).map_err(|error| format!("parsing verbosity in {part:?}: {error}"))?;
                Ok(json!({ "filePattern": pattern, "verbosity": level }))
            }
            _ => Err(format!("{part:?} does not have the pattern=N format")),
        })
        .collect();
    Ok(appended(before, found?))
}

fn reserved_memory(text: &str, before: Option<Value>) -> Result<Value, String> {
    let found: Result<Vec<_>, String> = text.split(';').filter(|_| !text.is_empty()).map(memory_of_node).collect();
    Ok(appended(before, found?))
}

fn memory_of_node(text: &str) -> Result<Value, String> {
    let wrong = || {
        format!(
            "the reserved memory has incorrect format, expected numaNodeID:type=quantity[,type=quantity...], got {text}"
        )
    };
    let (node, types) = text.split_once(':').filter(|(_, types)| !types.contains(':')).ok_or_else(wrong)?;
    let node: i32 =
        node.parse().map_err(|_| format!("failed to convert the NUMA node ID, expected integer, got {node}"))?;
    let mut limits = Map::new();
    for limit in types.split(',') {
        let (name, amount) = limit
            .split_once('=')
            .filter(|(_, amount)| !amount.contains('='))
            .ok_or_else(|| format!("the reserved limit has incorrect value, expected type=quantity, got {limit}"))?;
        if name != "memory" && !name.starts_with("hugepages-") {
            return Err(format!("memory type conversion error, unknown type: {name:?}"));
        }
        let quantity = Quantity::parse(amount).map_err(|_| format!("failed to parse the quantity: {amount}"))?;
        limits.insert(name.to_owned(), json!(quantity));
    }
    Ok(json!({ "numaNode": node, "limits": limits }))
}

fn object(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn merged(before: Option<Value>, entries: impl IntoIterator<Item = (String, Value)>) -> Value {
    let mut map = object(before);
    map.extend(entries);
    Value::Object(map)
}

fn appended(before: Option<Value>, items: impl IntoIterator<Item = Value>) -> Value {
    let mut list = match before {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    list.extend(items);
    Value::Array(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_each_kind() {
        for (kind, text, expected) in [
            (Kind::Bool, "T", json!(true)),
            (Kind::Int32, "-1", json!(-1)),
            (Kind::Int32, "0x1F", json!(31)),
            (Kind::Int64, "010", json!(8)),
            (Kind::Duration, "90s", json!("1m30s")),
            (Kind::Ip, "fd00::1", json!("fd00::1")),
            (Kind::List, "a,b", json!(["a", "b"])),
            (Kind::List, "", json!([])),
            (Kind::Map, "cpu=1, memory=1Gi,", json!({"cpu": "1", "memory": "1Gi"})),
            (Kind::MapNoSplit, "a=b,c=d", json!({"a": "b,c=d"})),
            (Kind::Labels, "a=b,c", json!({"a": "b", "c": ""})),
            (Kind::Thresholds, "memory.available<5%", json!({"memory.available": "5%"})),
            (Kind::Headers, "a:1,b:2,a:3", json!({"a": ["1", "3"], "b": ["2"]})),
            (Kind::Gates, "A=true,B=0", json!({"A": true, "B": false})),
            (Kind::Taints, "a=b:NoSchedule", json!([{"key": "a", "value": "b", "effect": "NoSchedule"}])),
            (
                Kind::ReservedMemory,
                "0:memory=1Gi,hugepages-1Gi=2Gi;1:memory=1024Mi",
                json!([{"numaNode": 0, "limits": {"memory": "1Gi", "hugepages-1Gi": "2Gi"}}, {"numaNode": 1, "limits": {"memory": "1Gi"}}]),
            ),
            (
                Kind::VModule,
                "a=1,b*=2",
                json!([{"filePattern": "a", "verbosity": 1}, {"filePattern": "b*", "verbosity": 2}]),
            ),
        ] {
            assert_eq!(parse(kind, text, None), Ok(expected), "{kind:?} {text}");
        }
    }

    #[test]
    fn errors_are_worded_as_go() {
        for (kind, text, message) in [
            (Kind::Bool, "yes", "strconv.ParseBool: parsing \"yes\": invalid syntax"),
            (Kind::Int32, "x", "strconv.ParseInt: parsing \"x\": invalid syntax"),
            (Kind::Int32, "2147483648", "strconv.ParseInt: parsing \"2147483648\": value out of range"),
            (Kind::Duration, "5", "time: missing unit in duration \"5\""),
            (Kind::Ip, "here", "\"here\" is not a valid IP address"),
            (Kind::Map, "cpu", "malformed pair, expect string=string"),
            (Kind::Thresholds, "memory.available=1", "malformed pair, expect string<string"),
            (
                Kind::Gates,
                "A=maybe",
                "invalid value of A: maybe, err: strconv.ParseBool: parsing \"maybe\": invalid syntax",
            ),
            (Kind::Level, "-1", "strconv.ParseUint: parsing \"-1\": invalid syntax"),
            (Kind::VModule, "a", "\"a\" does not have the pattern=N format"),
            (Kind::ReservedMemory, "0:cpu=1", "memory type conversion error, unknown type: \"cpu\""),
        ] {
            assert_eq!(parse(kind, text, None), Err(message.to_owned()), "{kind:?} {text}");
        }
    }

    #[test]
    fn repeated_flags_add() {
        assert_eq!(parse(Kind::List, "b", Some(json!(["a"]))), Ok(json!(["a", "b"])));
        assert_eq!(parse(Kind::Gates, "B=true", Some(json!({"A": true}))), Ok(json!({"A": true, "B": true})));
        assert_eq!(parse(Kind::Taints, "b:NoExecute", Some(json!([1]))).unwrap().as_array().unwrap().len(), 1);
    }
}
