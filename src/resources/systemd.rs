//! Slices by systemd: made, given properties, and stopped through its private D-Bus socket (contract ).
//!
//! Three calls of one interface are all that is needed, so this is the little of D-Bus that they take: EXTERNAL authentication, method calls with
//! strings, numbers and property lists, and their replies. One connection per call, blocking, bounded by a timeout. What systemd is told it
//! keeps over its own reloads; limits that it does not know (huge pages) are written to the slice's files by the caller.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use super::{cgroup_fs::Limits, qos::cpu_weight};

/// systemd's own socket: no bus, root only.
pub(super) const SOCKET: &str = "/run/systemd/private";
const TIMEOUT: Duration = Duration::from_secs(10);
const NO_LIMIT: u64 = u64::MAX;
/// No reply that we wait for is longer.
const LONGEST_MESSAGE: usize = 1 << 20;

/// The manager's interface on one socket.
#[derive(Debug, Clone)]
pub(super) struct Systemd {
    pub socket: PathBuf,
}

/// A property's value, as the types we need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Flag(bool),
    Number(u64),
    Text(String),
    Texts(Vec<String>),
}

pub(super) type Property = (&'static str, Value);

impl Systemd {
    /// Makes and starts a slice with these properties. One that runs already gets the properties.
    pub(super) fn start_slice(&self, name: &str, parent: &str, limits: Vec<Property>) -> io::Result<()> {
        let mut properties: Vec<Property> = vec![
            ("Description", Value::Text(format!("kubelet slice {name}"))),
            ("DefaultDependencies", Value::Flag(false)),
            ("MemoryAccounting", Value::Flag(true)),
            ("CPUAccounting", Value::Flag(true)),
            ("TasksAccounting", Value::Flag(true)),
        ];
        if !parent.is_empty() {
            properties.push(("Wants", Value::Texts(vec![parent.to_owned()])));
        }
        properties.extend(limits.iter().cloned());
        let mut body = Body::default();
        body.text(name);
        body.text("replace");
        body.properties(&properties);
        // No auxiliary units.
        body.align(4);
        body.number32(0);
        body.align(8);
        match self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", &body) {
            Err(error) if error.to_string().contains("UnitExists") => self.set(name, limits),
            done => done,
        }
    }

    /// Changes properties of a unit until it stops.
    pub(super) fn set(&self, name: &str, properties: Vec<Property>) -> io::Result<()> {
        if properties.is_empty() {
            return Ok(());
        }
        let mut body = Body::default();
        body.text(name);
        // Until reboot, not for ever.
        body.number32(1);
        body.properties(&properties);
        self.call("SetUnitProperties", "sba(sv)", &body)
    }

    /// Stops a slice; fine when there is none.
    pub(super) fn stop(&self, name: &str) -> io::Result<()> {
        let mut body = Body::default();
        body.text(name);
        body.text("replace");
        match self.call("StopUnit", "ss", &body) {
            Err(error) if error.to_string().contains("NoSuchUnit") => Ok(()),
            done => done,
        }
    }

    fn call(&self, method: &str, signature: &str, body: &Body) -> io::Result<()> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        authenticate(&mut stream)?;
        // A call that comes to systemd in one read with BEGIN is seen only when more comes: hence the ping.
        let mut bytes = b"BEGIN\r\n".to_vec();
        bytes.extend(message(MANAGER, method, signature, body));
        bytes.extend(message(PEER, "Ping", "", &Body::default()));
        stream.write_all(&bytes)?;
        loop {
            let reply = Reply::read(&mut stream)?;
            match reply.kind {
                METHOD_RETURN => return Ok(()),
                ERROR => return Err(io::Error::other(reply.text)),
                _ => {}
            }
        }
    }
}

/// What a cgroup's limits are as unit properties. `v2`: the names of the unified hierarchy.
pub(super) fn properties(limits: &Limits, v2: bool) -> Vec<Property> {
    let mut list: Vec<Property> = Vec::new();
    let mut put = |name, value: Option<i64>| {
        if let Some(value) = value {
            list.push((name, Value::Number(u64::try_from(value).unwrap_or(NO_LIMIT))));
        }
    };
    let shares = limits.cpu_shares.and_then(|s| i64::try_from(if v2 { cpu_weight(s) } else { s }).ok());
    put(if v2 { "CPUWeight" } else { "CPUShares" }, shares);
    if let Some((quota, period)) = limits.cpu_quota {
        let period = i64::try_from(period.max(1)).unwrap_or(i64::MAX);
        // Per second, in whole hundredths of a per cent upwards, as systemd rounds it down.
        let per_second = (quota > 0).then(|| quota.saturating_mul(1_000_000) / period);
        let rounded = per_second.map(|us| (us + 9_999) / 10_000 * 10_000);
        put("CPUQuotaPerSecUSec", Some(rounded.unwrap_or(-1)));
        put("CPUQuotaPeriodUSec", Some(period));
    }
    put(if v2 { "MemoryMax" } else { "MemoryLimit" }, limits.memory_bytes.filter(|bytes| *bytes > 0));
    put("TasksMax", limits.pids.filter(|pids| *pids > 0));
    if v2 {
        put("MemoryMin", limits.memory_min);
        put("MemoryLow", limits.memory_low);
        put("MemoryHigh", limits.memory_high);
    }
    list
}

fn authenticate(stream: &mut UnixStream) -> io::Result<()> {
    let uid: String = nix::unistd::geteuid().to_string().bytes().map(|b| format!("{b:02x}")).collect();
    stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        if line.len() > 1000 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "systemd's answer to AUTH is too long"));
        }
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if !line.starts_with(b"OK ") {
        let said = String::from_utf8_lossy(&line).trim().to_owned();
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("systemd refuses us: {said}")));
    }
    Ok(())
}

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PEER: &str = "org.freedesktop.DBus.Peer";
const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// Little-endian D-Bus values in a row.
#[derive(Debug, Default)]
struct Body(Vec<u8>);

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }
    fn number32(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }
    fn text(&mut self, text: &str) {
        self.number32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }
    fn signature(&mut self, signature: &str) {
        self.0.push(signature.len() as u8);
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// An array whose items start at multiples of `align`: its length in bytes does not count the padding before the first.
    fn array(&mut self, align: usize, fill: impl FnOnce(&mut Self)) {
        self.number32(0);
        let length_at = self.0.len() - 4;
        self.align(align);
        let start = self.0.len();
        fill(self);
        let length = (self.0.len() - start) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn properties(&mut self, properties: &[Property]) {
        self.array(8, |body| {
            for (name, value) in properties {
                body.align(8);
                body.text(name);
                body.value(value);
            }
        });
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Flag(flag) => {
                self.signature("b");
                self.number32(u32::from(*flag));
            }
            Value::Number(number) => {
                self.signature("t");
                self.align(8);
                self.0.extend(number.to_le_bytes());
            }
            Value::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Value::Texts(texts) => {
                self.signature("as");
                self.array(4, |body| texts.iter().for_each(|text| body.text(text)));
            }
        }
    }
}

/// A method call on the manager's object. Replies come in the order of the calls; only the first is read.
fn message(interface: &str, method: &str, signature: &str, body: &Body) -> Vec<u8> {
    let mut head = Body(vec![b'l', METHOD_CALL, 0, 1]);
    head.number32(body.0.len() as u32);
    head.number32(1);
    head.array(8, |head| {
        let fields = [
            (PATH, "o", "/org/freedesktop/systemd1"),
            (INTERFACE, "s", interface),
            (MEMBER, "s", method),
            (DESTINATION, "s", "org.freedesktop.systemd1"),
        ];
        for (code, kind, text) in fields {
            head.align(8);
            head.0.push(code);
            head.signature(kind);
            head.text(text);
        }
        if !signature.is_empty() {
            head.align(8);
            head.0.push(SIGNATURE);
            head.signature("g");
            head.signature(signature);
        }
    });
    head.align(8);
    head.0.extend(&body.0);
    head.0
}

/// What came back.
struct Reply {
    kind: u8,
    /// Of an error: its name and message.
    text: String,
}

impl Reply {
    fn read(stream: &mut UnixStream) -> io::Result<Self> {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let [order, kind, ..] = head;
        let number = |at: usize| {
            let bytes: [u8; 4] = head.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or_default();
            if order == b'l' { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
        };
        let (body, fields) = (number(4) as usize, number(12) as usize);
        let rest = fields.next_multiple_of(8).saturating_add(body);
        if rest > LONGEST_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message from systemd is too long"));
        }
        let mut bytes = vec![0; rest];
        stream.read_exact(&mut bytes)?;
        let text = if kind == ERROR { describe(&bytes, fields, order == b'l') } else { String::new() };
        Ok(Self { kind, text })
    }
}

/// The error's name from the header fields and its message, the first string of the body.
fn describe(bytes: &[u8], fields: usize, little: bool) -> String {
    let text_at = |at: usize| -> Option<&str> {
        let length: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        let length = if little { u32::from_le_bytes(length) } else { u32::from_be_bytes(length) } as usize;
        std::str::from_utf8(bytes.get(at + 4..at + 4 + length)?).ok()
    };
    // A field begins at a multiple of eight: its code, then the signature of its value.
    let name = (0..fields).step_by(8).find(|at| bytes.get(*at..*at + 4) == Some(&[ERROR_NAME, 1, b's', 0]));
    let name = name.and_then(|at| text_at(at + 4)).unwrap_or("unknown error");
    let message = text_at(fields.next_multiple_of(8)).unwrap_or_default();
    format!("{name}: {message}")
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    /// Answers one connection as systemd would: with a return, or with this error.
    fn serve(
        dir: &std::path::Path,
        answers: Vec<Option<(&'static str, &'static str)>>,
    ) -> thread::JoinHandle<Vec<Vec<u8>>> {
        let listener = UnixListener::bind(dir.join("private")).unwrap();
        thread::spawn(move || {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut start = vec![0; "\0AUTH EXTERNAL ".len()];
                stream.read_exact(&mut start).unwrap();
                let mut byte = [0];
                while byte[0] != b'\n' {
                    stream.read_exact(&mut byte).unwrap();
                }
                stream.write_all(b"OK 0123456789abcdef\r\n").unwrap();
                stream.read_exact(&mut [0; 7]).unwrap();
                let mut head = [0; 16];
                stream.read_exact(&mut head).unwrap();
                let at = |i: usize| u32::from_le_bytes(head[i..i + 4].try_into().unwrap()) as usize;
                let mut rest = vec![0; at(12).next_multiple_of(8) + at(4)];
                stream.read_exact(&mut rest).unwrap();
                asked.push([head.to_vec(), rest].concat());
                let mut reply = Body(vec![b'l', if answer.is_some() { ERROR } else { METHOD_RETURN }, 0, 1]);
                let mut body = Body::default();
                body.text(answer.map_or("/job/1", |(_, message)| message));
                reply.number32(body.0.len() as u32);
                reply.number32(7);
                reply.array(8, |fields| {
                    fields.align(8);
                    fields.0.extend([5, 1, b'u', 0, 1, 0, 0, 0]);
                    if let Some((name, _)) = answer {
                        fields.align(8);
                        fields.0.push(ERROR_NAME);
                        fields.signature("s");
                        fields.text(name);
                    }
                });
                reply.align(8);
                reply.0.extend(body.0);
                stream.write_all(&reply.0).unwrap();
            }
            asked
        })
    }

    /// `RKUBELET_TEST_SYSTEMD=/run/systemd/private cargo test -- --ignored r01_a_real`
    #[test]
    #[ignore = "needs a systemd"]
    fn r01_a_real_systemd_makes_changes_and_stops_a_slice() {
        let systemd = Systemd { socket: std::env::var_os("RKUBELET_TEST_SYSTEMD").unwrap().into() };
        let limits = |bytes| properties(&Limits { memory_bytes: Some(bytes), ..Limits::default() }, true);
        systemd.start_slice("rkubelettest.slice", "-.slice", limits(1 << 26)).unwrap();
        systemd.start_slice("rkubelettest-a.slice", "rkubelettest.slice", limits(1 << 26)).unwrap();
        systemd.start_slice("rkubelettest-a.slice", "rkubelettest.slice", limits(1 << 27)).unwrap();
        let unknown = systemd.set("rkubelettest-a.slice", vec![("Nope", Value::Number(1))]).unwrap_err().to_string();
        assert!(unknown.contains("Cannot set property Nope"), "{unknown}");
        for slice in ["rkubelettest-a.slice", "rkubelettest.slice", "rkubelettest-never.slice"] {
            systemd.stop(slice).unwrap();
        }
    }

    fn says(message: &[u8], text: &str) -> bool {
        message.windows(text.len()).any(|window| window == text.as_bytes())
    }

    #[test]
    fn r01_a_slice_that_is_there_gets_its_properties_and_one_that_is_gone_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let exists = Some(("org.freedesktop.systemd1.UnitExists", "Unit a.slice already exists."));
        let gone = Some(("org.freedesktop.systemd1.NoSuchUnit", "Unit a.slice not loaded."));
        let denied = Some(("org.freedesktop.DBus.Error.AccessDenied", "no"));
        let server = serve(dir.path(), vec![exists, None, gone, denied]);
        let systemd = Systemd { socket: dir.path().join("private") };
        systemd.start_slice("a.slice", "-.slice", vec![("TasksMax", Value::Number(7))]).unwrap();
        systemd.stop("a.slice").unwrap();
        let error = systemd.set("a.slice", vec![("TasksMax", Value::Number(8))]).unwrap_err().to_string();
        assert_eq!(error, "org.freedesktop.DBus.Error.AccessDenied: no");
        let asked = server.join().unwrap();
        for (message, method) in asked.iter().zip(["StartTransientUnit", "SetUnitProperties", "StopUnit"]) {
            assert!(says(message, method) && says(message, "a.slice"), "{method}");
        }
        assert!(says(&asked[1], "TasksMax") && !says(&asked[1], "Wants"));
    }

    #[test]
    fn r01_values_are_laid_out_as_d_bus_wants_them() {
        let mut body = Body::default();
        body.text("ab");
        body.properties(&[("N", Value::Number(1)), ("F", Value::Flag(true))]);
        let expected: Vec<u8> = [
            &[2, 0, 0, 0, b'a', b'b', 0, 0][..],
            &[36, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'N', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'F', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        assert_eq!(body.0.len(), expected.len());
        assert_eq!(body.0[..8], expected[..8]);
        assert_eq!(body.0[16..], expected[16..]);
        assert_eq!(u32::from_le_bytes(body.0[8..12].try_into().unwrap()) as usize, body.0.len() - 16);
    }

    #[test]
    fn r02_limits_as_unit_properties() {
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota: Some((12_345, 100_000)),
            memory_bytes: Some(1 << 20),
            pids: Some(9),
            memory_low: Some(0),
            ..Limits::default()
        };
        let numbers = |v2| -> Vec<(&str, u64)> {
            let of = |(name, value): Property| match value {
                Value::Number(number) => (name, number),
                other => panic!("{other:?}"),
            };
            properties(&limits, v2).into_iter().map(of).collect()
        };
        assert_eq!(
            numbers(true),
            [
                ("CPUWeight", 39),
                ("CPUQuotaPerSecUSec", 130_000),
                ("CPUQuotaPeriodUSec", 100_000),
                ("MemoryMax", 1 << 20),
                ("TasksMax", 9),
                ("MemoryLow", 0)
            ]
        );
        assert_eq!(numbers(false)[0], ("CPUShares", 1024));
        let unlimited = Limits { cpu_quota: Some((-1, 100_000)), ..Limits::default() };
        assert_eq!(properties(&unlimited, true)[0], ("CPUQuotaPerSecUSec", Value::Number(u64::MAX)));
    }
}
