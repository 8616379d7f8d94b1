//! Durations as Go prints them, in whole milliseconds: `853ms`, `1.2s`, `1m3.05s` (contract I-02).

use std::time::Duration;

pub(super) fn go_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis == 0 {
        return "0s".to_owned();
    }
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (hours, minutes) = (millis / 3_600_000, millis / 60_000 % 60);
    let seconds = format!("{}.{:03}", millis / 1000 % 60, millis % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i02_durations() {
        for (micros, want) in [
            (0, "0s"),
            (999, "0s"),
            (1_999, "1ms"),
            (853_000, "853ms"),
            (1_000_000, "1s"),
            (1_200_000, "1.2s"),
            (10_050_000, "10.05s"),
            (60_000_000, "1m0s"),
            (63_050_000, "1m3.05s"),
            (3_600_000_000, "1h0m0s"),
        ] {
            assert_eq!(go_duration(Duration::from_micros(micros)), want);
        }
    }
}
