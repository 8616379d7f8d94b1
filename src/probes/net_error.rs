//! Network errors in the words that Go's net package would use, because they stand in events and tests read them. Pure.

use std::{error::Error, io, net::SocketAddr};

/// `connection refused`: the errno's text without Rust's decoration.
pub(super) fn errno_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => {
            let text = nix::errno::Errno::from_raw(code).desc();
            let mut chars = text.chars();
            chars.next().map(|c| c.to_lowercase().chain(chars).collect()).unwrap_or_default()
        }
        None => error.to_string(),
    }
}

/// `dial tcp 10.0.0.1:80: connect: connection refused`.
pub(super) fn dial(address: SocketAddr, error: &io::Error) -> String {
    format!("dial tcp {address}: connect: {}", errno_text(error))
}

/// `dial tcp: lookup name: no such host`.
pub(super) fn lookup(host: &str) -> String {
    format!("dial tcp: lookup {host}: no such host")
}

/// A failure while a request or its response was under way.
pub(super) fn exchange(error: &(dyn Error + 'static), local: Option<SocketAddr>, remote: SocketAddr) -> String {
    let Some(io_error) = source_io(error) else { return error.to_string() };
    if io_error.kind() == io::ErrorKind::UnexpectedEof {
        return "EOF".to_owned();
    }
    let op = if io_error.kind() == io::ErrorKind::BrokenPipe { "write" } else { "read" };
    match (io_error.raw_os_error(), local) {
        (Some(_), Some(local)) => format!("{op} tcp {local}->{remote}: {op}: {}", errno_text(io_error)),
        _ => errno_text(io_error),
    }
}

fn source_io<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut next: Option<&'a (dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io_error) = error.downcast_ref::<io::Error>() {
            return Some(io_error);
        }
        next = error.source();
    }
    None
}

/// Whole seconds as Go prints a duration: `1s`, `1m30s`, `1h0m0s`.
pub(super) fn go_seconds(seconds: u64) -> String {
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (h, m) {
        (0, 0) => format!("{s}s"),
        (0, _) => format!("{m}m{s}s"),
        _ => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_go() {
        let address: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let refused = io::Error::from_raw_os_error(nix::errno::Errno::ECONNREFUSED as i32);
        assert_eq!(dial(address, &refused), "dial tcp 10.0.0.1:80: connect: connection refused");
        let unreachable = io::Error::from_raw_os_error(nix::errno::Errno::EHOSTUNREACH as i32);
        assert_eq!(errno_text(&unreachable), "no route to host");
        let reset = io::Error::from_raw_os_error(nix::errno::Errno::ECONNRESET as i32);
        let local = "10.0.0.2:5".parse().ok();
        assert_eq!(
            exchange(&reset, local, address),
            "read tcp 10.0.0.2:5->10.0.0.1:80: read: connection reset by peer"
        );
        assert_eq!(exchange(&io::Error::from(io::ErrorKind::UnexpectedEof), local, address), "EOF");
        assert_eq!([1, 60, 90, 3600].map(go_seconds), ["1s", "1m0s", "1m30s", "1h0m0s"]);
    }
}
