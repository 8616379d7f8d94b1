//! Each invariant fails when its guard is taken away: a checker that never complains would show nothing.

use std::time::Duration;

use super::{Guard, HOUR, Profile, Report, invariants::Invariant, on_paused_time, runtime::Lie, soak};

fn without(removed: Guard) -> Report {
    on_paused_time(soak(Profile::SMALL, 1, removed))
}

#[test]
fn with_every_guard_nothing_is_violated() {
    let report = without(Guard::Nothing);
    assert!(report.violations.is_empty(), "{:#?}", report.violations);
}

macro_rules! fails {
    ($($test:ident: $guard:expr => $invariant:ident;)*) => {
        $(#[test]
        fn $test() {
            let report = without($guard);
            assert!(report.violates(Invariant::$invariant), "{:#?}", report.violations);
        })*
    };
}

fails! {
    nobody_follows_the_runtime: Guard::Follower => WhereSpecSays;
    ended_containers_are_forgotten: Guard::TrueLists(Lie::HidesEnded("once")) => RestartPolicy;
    statuses_overtake_each_other: Guard::StatusOrder => TerminalKept;
    the_api_is_never_asked_to_let_go: Guard::LetGo => DeletedGone;
    sandboxes_are_hidden: Guard::TrueLists(Lie::HidesSandboxes("server")) => OneSandbox;
    containers_are_hidden: Guard::TrueLists(Lie::HidesContainers("server")) => OneInstance;
    the_feed_goes_back: Guard::FeedOrder => NothingAfterStop;
    probes_outlive_their_containers: Guard::ProbesEnd => Tasks;
    nobody_collects_garbage: Guard::Collector => NoLeftovers;
    rooms_do_not_forget: Guard::Forgetting => BoundedTables;
}

#[test]
fn memory_is_kept() {
    let churning = Profile { lasting: 2 * HOUR, round: HOUR, churn: Duration::from_secs(20), ..Profile::SMALL };
    let report = on_paused_time(soak(churning, 1, Guard::Memory(16 << 20)));
    assert!(report.violates(Invariant::BoundedMemory), "{:?} {:#?}", report.resident, report.violations);
}
