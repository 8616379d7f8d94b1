//! The kernel's out-of-memory kills of the node's own processes (contract R-24): node event `SystemOOM`.
//!
//! In: the kernel's log from now on, record by record. Out: one event for each victim that was in no cgroup of its own; what happens inside
//! containers is told by the runtime. Touches /dev/kmsg.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use crate::events::{EventSink, EventType, Regarding};

/// A record of the kernel's log is never longer.
const RECORD_BYTES: usize = 8192;
/// The log wrapped around before it was read.
const OVERWRITTEN: ErrorKind = ErrorKind::BrokenPipe;

/// Follows the kernel's log on a thread of its own, which sleeps in the kernel until there is a record and ends with the process. Where the
/// log cannot be read it says so once.
pub fn watch_oom_kills(kmsg: PathBuf, events: Arc<dyn EventSink>) {
    let follow = move || {
        if let Err(error) = follow(&kmsg, &*events) {
            let path = kmsg.display();
            tracing::warn!(%path, %error, "Out-of-memory kills of the node's own processes will not be told");
        }
    };
    if let Err(error) = thread::Builder::new().name("kmsg".to_owned()).spawn(follow) {
        tracing::warn!(%error, "Out-of-memory kills of the node's own processes will not be told");
    }
}

fn follow(kmsg: &Path, events: &dyn EventSink) -> io::Result<()> {
    let mut file = File::open(kmsg)?;
    file.seek(SeekFrom::End(0))?;
    let mut record = vec![0; RECORD_BYTES];
    loop {
        match file.read(&mut record) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => tell(&String::from_utf8_lossy(&record[..length]), events),
            Err(error) if matches!(error.kind(), OVERWRITTEN | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

fn tell(record: &str, events: &dyn EventSink) {
    if let Some(Victim { process, pid }) = victim(record) {
        let message = format!("System OOM encountered, victim process: {process}, pid: {pid}");
        events.event(Regarding::Node, EventType::Warning, "SystemOOM", message);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Victim<'a> {
    process: &'a str,
    pid: &'a str,
}

/// Who was killed, if this record says so and it was in the root cgroup.
fn victim(record: &str) -> Option<Victim<'_>> {
    let (_, message) = record.split_once(';')?;
    let fields = message.lines().next()?.strip_prefix("oom-kill:")?;
    // The process's name may hold commas: it is what stands between its own key and the next.
    let (_, rest) = fields.split_once(",task_memcg=")?;
    let (cgroup, rest) = rest.split_once(",task=")?;
    let (process, rest) = rest.rsplit_once(",pid=")?;
    let pid = rest.split(',').next()?;
    (cgroup == "/").then_some(Victim { process, pid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::MemoryEvents;

    const SYSTEM: &str = "6,905,52271530,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=odd, name,pid=4711,uid=0\n SUBSYSTEM=memory\n";

    #[test]
    fn r24_only_victims_outside_of_cgroups_count() {
        assert_eq!(victim(SYSTEM), Some(Victim { process: "odd, name", pid: "4711" }));
        for record in [
            "6,905,5,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=x,mems_allowed=0,oom_memcg=/kubepods/pod1/c,task_memcg=/kubepods/pod1/c,task=dd,pid=12,uid=0\n",
            "6,905,5,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/system.slice/sshd.service,task=sshd,pid=12,uid=0\n",
            "3,906,5,-;Out of memory: Killed process 4711 (odd) total-vm:1kB\n",
            "oom-kill:task_memcg=/,task=a,pid=1",
            "6,1,1,-;",
            "",
        ] {
            assert_eq!(victim(record), None, "{record}");
        }
    }

    #[test]
    fn r24_a_victim_is_an_event_on_the_node() {
        let events = MemoryEvents::default();
        tell(SYSTEM, &events);
        tell("6,1,1,-;something else\n", &events);
        let told = events.all();
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].reason.as_str(), told[0].kind), ("SystemOOM", EventType::Warning));
        assert_eq!(told[0].message, "System OOM encountered, victim process: odd, name, pid: 4711");
    }

    #[test]
    fn r24_a_log_that_cannot_be_read_ends_the_watch() {
        let dir = tempfile::tempdir().unwrap();
        let events = MemoryEvents::default();
        assert_eq!(follow(&dir.path().join("kmsg"), &events).unwrap_err().kind(), ErrorKind::NotFound);
        std::fs::write(dir.path().join("kmsg"), SYSTEM).unwrap();
        assert_eq!(follow(&dir.path().join("kmsg"), &events).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(events.all().is_empty(), "what was there before the agent is not told");
    }
}
