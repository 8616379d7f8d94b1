//! How wide the start gate is: found by measuring, not by guessing. Pure.
//!
//! A runtime that only computes is as fast at the width of its cores as at any other; one that waits (for CNI, for a disk) is faster when
//! more is asked of it at once. While pods queue, the rate of finished calls is measured over a window; a wider gate is tried, and kept
//! only when it is clearly faster; a narrower one when it is no slower. Narrow is good in itself: pods become Ready one after the other,
//! not all at the end.

use tokio::time::Instant;

/// A wider gate must be at least so much faster to be kept.
const WORTH_IT: f64 = 1.06;
/// A narrower one may be so much slower.
const AS_GOOD: f64 = 0.98;
/// Windows without a trial after one that brought nothing.
const CONTENT: u32 = 6;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Width {
    least: usize,
    most: usize,
    now: usize,
    /// The width and rate (calls per second) that a trial is compared with.
    best: Option<(usize, f64)>,
    /// When the window began; `None` before its first call.
    since: Option<Instant>,
    done: usize,
    /// Calls that began under another width and say nothing.
    skip: usize,
    content: u32,
    widen: bool,
}

impl Width {
    /// Between `least` and `most`, both at least 1. Equal: never changes.
    pub fn new(least: usize, most: usize) -> Self {
        let least = least.max(1);
        let most = most.max(least);
        Self { least, most, now: least, best: None, since: None, done: 0, skip: 0, content: 0, widen: true }
    }

    pub fn get(&self) -> usize {
        self.now
    }

    /// A call ended at `at`; `queued`: somebody waits for its place. Without a queue nothing can be said.
    pub fn call_ended(&mut self, at: Instant, queued: bool) {
        if self.least == self.most {
            return;
        }
        if !queued {
            self.since = None;
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let Some(since) = self.since else {
            (self.since, self.done) = (Some(at), 0);
            return;
        };
        self.done += 1;
        let took = (at - since).as_secs_f64();
        if self.done >= 4 * self.now && took > 0.0 {
            let rate = self.done as f64 / took;
            self.since = None;
            self.judge(rate);
        }
    }

    fn judge(&mut self, rate: f64) {
        match self.best {
            Some((width, best)) if self.now > width && rate < best * WORTH_IT => self.back_to(width),
            Some((width, best)) if self.now < width && rate < best * AS_GOOD => self.back_to(width),
            _ => {
                self.best = Some((self.now, rate));
                match self.content.checked_sub(1) {
                    Some(left) => self.content = left,
                    None => self.try_another(),
                }
            }
        }
    }

    fn back_to(&mut self, width: usize) {
        self.set(width);
        (self.content, self.widen) = (CONTENT, !self.widen);
    }

    fn try_another(&mut self) {
        let next = if self.widen { (2 * self.now).min(self.most) } else { (self.now / 2).max(self.least) };
        if next == self.now {
            (self.content, self.widen) = (CONTENT, !self.widen);
        } else {
            self.set(next);
        }
    }

    fn set(&mut self, width: usize) {
        self.skip = self.now.max(width);
        self.now = width;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Feeds calls that end at the rate that `rate` gives for the width of the moment; the widths that were in use.
    fn run(width: &mut Width, calls: usize, rate: impl Fn(usize) -> f64) -> Vec<usize> {
        let mut at = Instant::now();
        let mut seen = Vec::new();
        for _ in 0..calls {
            at += Duration::from_secs_f64(1.0 / rate(width.get()));
            width.call_ended(at, true);
            seen.push(width.get());
        }
        seen
    }

    #[test]
    fn a_runtime_that_waits_is_asked_more_at_once() {
        let mut width = Width::new(2, 8);
        run(&mut width, 200, |w| 10.0 * w as f64);
        assert!(width.get() >= 6, "{width:?}");
    }

    #[test]
    fn a_runtime_that_computes_is_left_narrow() {
        let mut width = Width::new(2, 8);
        let seen = run(&mut width, 2000, |_| 20.0);
        let narrow = seen.iter().filter(|w| **w == 2).count();
        assert!(narrow > 1400 && seen.iter().all(|w| *w <= 4), "{narrow}");
    }

    #[test]
    fn the_knee_is_found_from_both_sides() {
        let mut width = Width::new(2, 16);
        let seen = run(&mut width, 3000, |w| 10.0 * w.min(6) as f64);
        let (tail, bounds) = (&seen[1500..], 5..=9);
        let near = tail.iter().filter(|w| bounds.contains(*w)).count();
        assert!(near * 10 >= tail.len() * 8, "{near} of {}", tail.len());
    }

    #[test]
    fn nothing_is_learnt_without_a_queue_and_a_fixed_width_stays() {
        let (mut idle, mut fixed) = (Width::new(2, 8), Width::new(2, 2));
        let mut at = Instant::now();
        for _ in 0..500 {
            at += Duration::from_millis(1);
            idle.call_ended(at, false);
            fixed.call_ended(at, true);
        }
        assert_eq!((idle.get(), fixed.get()), (2, 2));
    }
}
