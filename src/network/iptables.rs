//! The iptables chains that a node agent keeps for others (contract S-23): the hint by which network plugins see whether this host uses
//! iptables-legacy or iptables-nft, and the rule that drops packets from elsewhere to `127.0.0.0/8`.
//!
//! In: nothing but the host's tables. Out: chains and rules, made at the start and again when somebody has flushed the tables. A flush makes no
//! event that both kinds of iptables have, so a canary chain is looked for once a minute, as upstream does. A host without iptables needs
//! none of this. Touches the tables through `iptables` and `ip6tables` only.

use std::{process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

const HINT: &str = "KUBE-IPTABLES-HINT";
const FIREWALL: &str = "KUBE-FIREWALL";
const CANARY: &str = "KUBE-KUBELET-CANARY";
const NO_MARTIANS: [&str; 15] = [
    "-m",
    "comment",
    "--comment",
    "block incoming localnet connections",
    "--dst",
    "127.0.0.0/8",
    "!",
    "--src",
    "127.0.0.0/8",
    "-m",
    "conntrack",
    "!",
    "--ctstate",
    "RELATED,ESTABLISHED,DNAT",
    "-j",
];
/// Where the canaries are; the first is looked at.
const CANARY_TABLES: [&str; 3] = ["mangle", "nat", "filter"];
const LOOK: Duration = Duration::from_secs(60);
/// Once one canary is gone, so long the others are waited for, and so often looked at.
const FLUSH: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(100));
/// A program that hangs is given up after this.
const HUNG: Duration = Duration::from_secs(300);
/// The operation failed: the chain exists already, the rule does not.
const REFUSED: i32 = 1;
/// Nothing was tried: somebody else holds the lock.
const RESOURCE_PROBLEM: i32 = 4;

/// Which of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    fn program(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }
}

/// Why a call did nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IptablesError {
    #[error("exit status {code}: {output}")]
    Exit { code: i32, output: String },
    #[error("{message}")]
    NotRun { message: String },
}

impl IptablesError {
    fn is(&self, wanted: i32) -> bool {
        matches!(self, Self::Exit { code, .. } if *code == wanted)
    }
}

/// The host's tables.
#[async_trait]
pub trait Iptables: Send + Sync + 'static {
    /// Runs the family's program with these arguments.
    async fn run(&self, family: Family, arguments: &[&str]) -> Result<(), IptablesError>;
}

/// The programs of this host.
pub struct HostIptables;

#[async_trait]
impl Iptables for HostIptables {
    async fn run(&self, family: Family, arguments: &[&str]) -> Result<(), IptablesError> {
        let mut command = Command::new(family.program());
        command.args(["-w", "5"]).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let not_run = |message: String| IptablesError::NotRun { message };
        let done = timeout(HUNG, command.output()).await.map_err(|_| not_run("timed out".to_owned()))?;
        let output = done.map_err(|error| not_run(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let output_text = String::from_utf8_lossy(&said).trim().to_owned();
        match output.status.code() {
            Some(code) => Err(IptablesError::Exit { code, output: output_text }),
            None => Err(not_run(format!("{}: {output_text}", output.status))),
        }
    }
}

/// Makes the chains of each family that the host has, and keeps them until cancelled.
pub async fn keep_chains(tables: Arc<dyn Iptables>, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = keep(&*tables) => {}
    }
}

async fn keep(tables: &dyn Iptables) {
    let mut families = Vec::new();
    for family in [Family::V4, Family::V6] {
        if tables.run(family, &["-S", "POSTROUTING", "-t", "nat"]).await.is_ok() {
            families.push(family);
        }
    }
    if families.is_empty() {
        tracing::info!("No iptables support on this system; not creating the KUBE-IPTABLES-HINT chain");
        return;
    }
    join_all(families.into_iter().map(|family| keep_family(tables, family))).await;
}

async fn keep_family(tables: &dyn Iptables, family: Family) {
    if let Err(error) = ensure(tables, family).await {
        tracing::info!(?family, error, "Failed to initialize iptables rules; some functionality may be missing.");
        return;
    }
    tracing::info!(?family, "Initialized iptables rules.");
    loop {
        while let Err(error) = set_canaries(tables, family).await {
            tracing::error!(?family, error, "Could not set up iptables canary");
            sleep(LOOK).await;
        }
        flushed(tables, family).await;
        tracing::info!(?family, "Reloading after iptables flush");
        if let Err(error) = ensure(tables, family).await {
            tracing::error!(?family, error, "Restoring the iptables rules failed");
        }
    }
}

/// Everything but the canaries.
async fn ensure(tables: &dyn Iptables, family: Family) -> Result<(), String> {
    ensure_chain(tables, family, "mangle", HINT).await?;
    // IPv6 routes no packets from elsewhere to ::1.
    if family == Family::V4 {
        ensure_chain(tables, family, "filter", FIREWALL).await?;
        for chain in ["OUTPUT", "INPUT"] {
            ensure_rule(tables, family, "-I", chain, &["-j", FIREWALL]).await?;
        }
        ensure_rule(tables, family, "-A", FIREWALL, &[&NO_MARTIANS[..], &["DROP"]].concat()).await?;
    }
    Ok(())
}

async fn ensure_chain(tables: &dyn Iptables, family: Family, table: &str, chain: &str) -> Result<(), String> {
    match tables.run(family, &["-N", chain, "-t", table]).await {
        Err(error) if !error.is(REFUSED) => Err(format!("error creating chain {chain:?}: {error}")),
        _ => Ok(()),
    }
}

/// In table `filter`; `position` is `-I` (first) or `-A` (last).
async fn ensure_rule(
    tables: &dyn Iptables,
    family: Family,
    position: &str,
    chain: &str,
    rule: &[&str],
) -> Result<(), String> {
    let about = |operation| [&[operation, chain, "-t", "filter"][..], rule].concat();
    match tables.run(family, &about("-C")).await {
        Ok(()) => Ok(()),
        Err(error) if !error.is(REFUSED) => Err(format!("error checking rule: {error}")),
        Err(_) => {
            let added = tables.run(family, &about(position)).await;
            added.map_err(|error| format!("error appending rule: {error}"))
        }
    }
}

async fn set_canaries(tables: &dyn Iptables, family: Family) -> Result<(), String> {
    for table in CANARY_TABLES {
        ensure_chain(tables, family, table, CANARY).await?;
    }
    Ok(())
}

/// Returns once somebody has flushed the tables, and has had the time to finish.
async fn flushed(tables: &dyn Iptables, family: Family) {
    loop {
        sleep(LOOK).await;
        if !canary_there(tables, family, CANARY_TABLES[0]).await {
            break;
        }
    }
    let until = Instant::now() + FLUSH.0;
    for table in &CANARY_TABLES[1..] {
        while canary_there(tables, family, table).await {
            if Instant::now() >= until {
                return tracing::info!(?family, "Inconsistent iptables state detected");
            }
            sleep(FLUSH.1).await;
        }
    }
}

/// Also while nobody can tell.
async fn canary_there(tables: &dyn Iptables, family: Family, table: &str) -> bool {
    match tables.run(family, &["-S", CANARY, "-t", table]).await {
        Ok(()) => true,
        Err(error) => error.is(RESOURCE_PROBLEM),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Tables as lists of lines: `<table> <chain>` and `<table> <chain> <rule>`.
    #[derive(Default)]
    struct FakeTables {
        missing: Vec<Family>,
        state: Mutex<Vec<String>>,
        locked: Mutex<bool>,
    }

    #[async_trait]
    impl Iptables for FakeTables {
        async fn run(&self, family: Family, arguments: &[&str]) -> Result<(), IptablesError> {
            if self.missing.contains(&family) {
                return Err(IptablesError::NotRun { message: "no such file".into() });
            }
            let refused = |code| Err(IptablesError::Exit { code, output: String::new() });
            if *self.locked.lock().unwrap() {
                return refused(RESOURCE_PROBLEM);
            }
            let [operation, chain, "-t", table, rule @ ..] = arguments else { panic!("{arguments:?}") };
            let line = [&[family.program(), *table, *chain][..], rule].concat().join(" ");
            let mut state = self.state.lock().unwrap();
            let there = state.contains(&line) || matches!(*chain, "POSTROUTING");
            match (*operation, there) {
                ("-S" | "-C", true) => Ok(()),
                ("-S" | "-C", false) | ("-N", true) => refused(REFUSED),
                ("-N" | "-A", _) => {
                    state.push(line);
                    Ok(())
                }
                ("-I", _) => {
                    state.insert(0, line);
                    Ok(())
                }
                other => panic!("{other:?}"),
            }
        }
    }

    impl FakeTables {
        fn lines(&self) -> Vec<String> {
            let mut lines = self.state.lock().unwrap().clone();
            lines.sort();
            lines
        }
    }

    const V4: [&str; 8] = [
        "iptables filter INPUT -j KUBE-FIREWALL",
        "iptables filter KUBE-FIREWALL",
        "iptables filter KUBE-FIREWALL -m comment --comment block incoming localnet connections --dst 127.0.0.0/8 ! --src 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        "iptables filter KUBE-KUBELET-CANARY",
        "iptables filter OUTPUT -j KUBE-FIREWALL",
        "iptables mangle KUBE-IPTABLES-HINT",
        "iptables mangle KUBE-KUBELET-CANARY",
        "iptables nat KUBE-KUBELET-CANARY",
    ];
    const V6: [&str; 4] = [
        "ip6tables filter KUBE-KUBELET-CANARY",
        "ip6tables mangle KUBE-IPTABLES-HINT",
        "ip6tables mangle KUBE-KUBELET-CANARY",
        "ip6tables nat KUBE-KUBELET-CANARY",
    ];

    #[tokio::test(start_paused = true)]
    async fn s23_chains_are_made_once_and_again_after_a_flush() {
        let tables = Arc::new(FakeTables::default());
        let cancel = CancellationToken::new();
        let keeping = tokio::spawn(keep_chains(Arc::clone(&tables) as _, cancel.clone()));
        sleep(Duration::from_secs(1)).await;
        let all = [&V6[..], &V4[..]].concat();
        assert_eq!(tables.lines(), all);
        sleep(Duration::from_secs(600)).await;
        assert_eq!(tables.lines(), all, "nothing is made twice");
        *tables.locked.lock().unwrap() = true;
        sleep(Duration::from_secs(120)).await;
        *tables.locked.lock().unwrap() = false;
        assert_eq!(tables.lines(), all, "a lock that others hold is no flush");
        tables.state.lock().unwrap().clear();
        sleep(Duration::from_secs(61)).await;
        assert_eq!(tables.lines(), all);
        cancel.cancel();
        keeping.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn s23_a_host_with_one_family_or_none_is_no_error() {
        let tables = Arc::new(FakeTables { missing: vec![Family::V4], ..FakeTables::default() });
        let keeping = tokio::spawn(keep_chains(Arc::clone(&tables) as _, CancellationToken::new()));
        sleep(Duration::from_secs(1)).await;
        assert_eq!(tables.lines(), V6);
        keeping.abort();
        let tables = Arc::new(FakeTables { missing: vec![Family::V4, Family::V6], ..FakeTables::default() });
        keep_chains(Arc::clone(&tables) as _, CancellationToken::new()).await;
        assert!(tables.lines().is_empty());
    }
}
