//! systemd's watchdog (contract D-03): a sign of life twice per period, as long as the agent's health checks pass.
//!
//! In: `WATCHDOG_USEC` and `WATCHDOG_PID`, the check `syncloop` of `/healthz` (its checks `ping` and `log` cannot fail). Out: `WATCHDOG=1` to
//! systemd, which replaces an agent that stays silent. It runs on the main runtime, so a runtime that hangs gives no sign of life either.

use std::{
    io,
    num::ParseIntError,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::server::SyncLoopHealth;

/// Shorter periods cannot be kept.
const LEAST_PERIOD: Duration = Duration::from_secs(1);
/// Before the one other try when systemd could not be told.
const RETRY: Duration = Duration::from_secs(1);

/// Why the agent does not start under this watchdog.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    #[error("configure watchdog: error converting {variable}: {source}")]
    NotANumber { variable: &'static str, source: ParseIntError },
    #[error("configure watchdog: error WATCHDOG_USEC must be a positive number")]
    NotPositive,
    #[error("configure watchdog timeout too small: {0:?}")]
    TooSmall(Duration),
}

/// The period that systemd asks for, from its two variables (empty when unset) and this process's ID; `None` without a watchdog.
pub fn period(usec: &str, pid: &str, own_pid: u32) -> Result<Option<Duration>, WatchdogError> {
    if usec.is_empty() {
        return Ok(None);
    }
    let number =
        |variable, text: &str| text.parse::<i64>().map_err(|source| WatchdogError::NotANumber { variable, source });
    let micros = number("WATCHDOG_USEC", usec)?;
    let period = match u64::try_from(micros) {
        Ok(micros) if micros > 0 => Duration::from_micros(micros),
        _ => return Err(WatchdogError::NotPositive),
    };
    if !pid.is_empty() && number("WATCHDOG_PID", pid)? != i64::from(own_pid) {
        return Ok(None);
    }
    if period <= LEAST_PERIOD { Err(WatchdogError::TooSmall(period)) } else { Ok(Some(period)) }
}

/// [`period`] of this process's environment.
pub fn period_of_environment() -> Result<Option<Duration>, WatchdogError> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    period(&variable("WATCHDOG_USEC"), &variable("WATCHDOG_PID"), std::process::id())
}

/// What is asked before each sign of life; nothing until the agent has started.
pub type Checks = Arc<OnceLock<SyncLoopHealth>>;

/// Tells systemd twice per period, until cancelled.
pub async fn feed(period: Duration, checks: Checks, tell: impl Fn() -> io::Result<()>, cancel: CancellationToken) {
    loop {
        match checks.get().map_or(Ok(()), |check| check()) {
            Ok(()) => tell_with_retry(&tell).await,
            Err(error) => tracing::error!(
                error = format!("checker syncloop failed: {error}"),
                "Do not notify watchdog this iteration as the kubelet is reportedly not healthy"
            ),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = sleep(period / 2) => {}
        }
    }
}

async fn tell_with_retry(tell: &impl Fn() -> io::Result<()>) {
    if tell().is_ok() {
        return;
    }
    sleep(RETRY).await;
    if let Err(error) = tell() {
        tracing::error!(%error, "Failed to notify watchdog");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn d03_what_systemd_asks_for() {
        let seconds = |s| Ok(Some(Duration::from_secs(s)));
        let said = |usec, pid| period(usec, pid, 42).map_err(|e| e.to_string());
        assert_eq!(said("", ""), Ok(None));
        assert_eq!(said("30000000", ""), seconds(30));
        assert_eq!(said("30000000", "42"), seconds(30));
        assert_eq!(said("30000000", "43"), Ok(None));
        for (usec, pid, error) in [
            ("1000000", "", "configure watchdog timeout too small: 1s"),
            ("0", "", "configure watchdog: error WATCHDOG_USEC must be a positive number"),
            ("-5", "", "configure watchdog: error WATCHDOG_USEC must be a positive number"),
            ("soon", "", "configure watchdog: error converting WATCHDOG_USEC: invalid digit found in string"),
            ("30000000", "me", "configure watchdog: error converting WATCHDOG_PID: invalid digit found in string"),
        ] {
            assert_eq!(said(usec, pid), Err(error.to_owned()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn d03_an_unhealthy_agent_gives_no_sign_of_life() {
        let (told, healthy) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let (count, checks, cancel) = (Arc::clone(&told), Checks::default(), CancellationToken::new());
        let tell = move || {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let feeding = tokio::spawn(feed(Duration::from_secs(30), Arc::clone(&checks), tell, cancel.clone()));
        sleep(Duration::from_secs(31)).await;
        assert_eq!(told.load(Ordering::SeqCst), 3, "at once and twice per period, also before the checks are known");
        let state = Arc::clone(&healthy);
        let check: SyncLoopHealth =
            Arc::new(move || if state.load(Ordering::SeqCst) { Ok(()) } else { Err("late".to_owned()) });
        assert!(checks.set(check).is_ok());
        healthy.store(false, Ordering::SeqCst);
        sleep(Duration::from_secs(60)).await;
        assert_eq!(told.load(Ordering::SeqCst), 3);
        healthy.store(true, Ordering::SeqCst);
        sleep(Duration::from_secs(15)).await;
        assert_eq!(told.load(Ordering::SeqCst), 4);
        cancel.cancel();
        feeding.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn d03_what_systemd_did_not_hear_is_told_once_more() {
        let tries = AtomicUsize::new(0);
        let deaf = || match tries.fetch_add(1, Ordering::SeqCst) {
            0 => Err(io::Error::other("no buffer space")),
            _ => Ok(()),
        };
        tell_with_retry(&deaf).await;
        assert_eq!(tries.load(Ordering::SeqCst), 2);
    }
}
