//! URLs as probes and hooks need them: built from an httpGet action, resolved along redirects. Pure.
//!
//! Lenient as upstream is: whatever stands in `path` is passed on, percent-encoded where HTTP demands it.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn parse(text: &str) -> Option<Self> {
        if text.eq_ignore_ascii_case("http") {
            Some(Self::Http)
        } else if text.eq_ignore_ascii_case("https") {
            Some(Self::Https)
        } else {
            None
        }
    }
    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// An http or https URL. `Display` writes it as it stands in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub scheme: Scheme,
    /// Name or address, IPv6 without brackets.
    pub host: String,
    port: Option<u16>,
    /// Path and query, encoded, beginning with `/`.
    pub target: String,
}

impl Url {
    /// `scheme` may be empty (http). `Err` for a scheme that is neither.
    pub fn new(scheme: &str, host: &str, port: u16, path: &str) -> Result<Self, String> {
        let known = if scheme.is_empty() { Some(Scheme::Http) } else { Scheme::parse(scheme) };
        let scheme = known.ok_or_else(|| format!("unsupported protocol scheme {:?}", scheme.to_lowercase()))?;
        Ok(Self { scheme, host: host.to_owned(), port: Some(port), target: target_of(path) })
    }

    pub fn port(&self) -> u16 {
        self.port.unwrap_or(self.scheme.default_port())
    }

    /// What the Host header says: `10.0.0.1:8080`, `[::1]:80`, `name`.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        self.port.map_or(host.clone(), |port| format!("{host}:{port}"))
    }

    /// Where a redirect from here leads: `location` is absolute, or relative to this URL (RFC 3986 section 5).
    pub fn join(&self, location: &str) -> Result<Self, String> {
        let location = location.split('#').next().unwrap_or_default();
        if let Some((scheme, rest)) = split_scheme(location) {
            let scheme = Scheme::parse(scheme).ok_or_else(|| format!("unsupported protocol scheme {scheme:?}"))?;
            let rest = rest.strip_prefix("//").ok_or("no Host in request URL")?;
            return Self::with_authority(scheme, rest);
        }
        if let Some(rest) = location.strip_prefix("//") {
            return Self::with_authority(self.scheme, rest);
        }
        let base_path = self.target.split('?').next().unwrap_or("/");
        let (path, query) = split_query(location);
        let path = if path.is_empty() {
            base_path.to_owned()
        } else if path.starts_with('/') {
            without_dots(path)
        } else {
            let directory = base_path.rsplit_once('/').map_or("", |(dir, _)| dir);
            without_dots(&format!("{directory}/{path}"))
        };
        let joined = query.map_or(path.clone(), |q| format!("{path}?{q}"));
        Ok(Self { target: target_of(&joined), ..self.clone() })
    }

    fn with_authority(scheme: Scheme, rest: &str) -> Result<Self, String> {
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let authority = authority.rsplit('@').next().unwrap_or_default();
        let bad_port = || format!("invalid port in {authority:?}");
        let (host, port) = match authority.strip_prefix('[').and_then(|a| a.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(bad_port)?)),
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let port = port.filter(|p| !p.is_empty()).map(|p| p.parse().map_err(|_| bad_port())).transpose()?;
        if host.is_empty() {
            return Err("http: no Host in request URL".to_owned());
        }
        Ok(Self { scheme, host: host.to_owned(), port, target: target_of(path) })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme.as_str(), self.authority(), self.target)
    }
}

/// `scheme:rest`, if a scheme comes before the first of `/?#`.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    valid.then_some((scheme, rest))
}

fn split_query(text: &str) -> (&str, Option<&str>) {
    text.split_once('?').map_or((text, None), |(path, query)| (path, Some(query)))
}

fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    for (i, segment) in segments.iter().enumerate() {
        let last = i + 1 == segments.len();
        match *segment {
            "." | ".." => {
                if *segment == ".." {
                    kept.pop();
                }
                if last {
                    kept.push("");
                }
            }
            other => kept.push(other),
        }
    }
    format!("/{}", kept.join("/"))
}

/// The request target for what a user wrote as path: fragment gone, query kept, a leading slash, all of it encoded. A path with
/// a broken percent escape is taken literally, `?` included, as upstream does.
fn target_of(path: &str) -> String {
    let literal = has_broken_escape(path) || path.chars().any(|c| c.is_ascii_control());
    let (path, query) = if literal { (path, None) } else { split_query(path.split('#').next().unwrap_or_default()) };
    let mut out = String::with_capacity(path.len() + 1);
    if !path.starts_with('/') {
        out.push('/');
    }
    encode(path, if literal { "" } else { "%" }, &mut out);
    if let Some(query) = query {
        out.push('?');
        encode(query, "%?`{}|\\^[]", &mut out);
    }
    out
}

fn has_broken_escape(text: &str) -> bool {
    text.split('%').skip(1).any(|after| {
        let mut digits = after.bytes().take(2);
        !(digits.next().is_some_and(|b| b.is_ascii_hexdigit()) && digits.next().is_some_and(|b| b.is_ascii_hexdigit()))
    })
}

/// Percent-encodes all bytes but unreserved ones, sub-delimiters, `:@/` and `also`.
fn encode(text: &str, also: &str, out: &mut String) {
    for byte in text.bytes() {
        let c = char::from(byte);
        if byte.is_ascii() && (c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@/".contains(c) || also.contains(c)) {
            out.push(c);
        } else {
            out.push('%');
            for nibble in [byte >> 4, byte & 15] {
                out.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b03_paths_are_passed_on_as_upstream_does() {
        let cases = [
            ("/healthz", "/healthz"),
            ("healthz", "/healthz"),
            ("", "/"),
            ("/a?x=1&y=%20", "/a?x=1&y=%20"),
            ("/a#frag", "/a"),
            ("/a b", "/a%20b"),
            ("/a%2Fb", "/a%2Fb"),
            ("/100%", "/100%25"),
            ("/bad%zz?q", "/bad%25zz%3Fq"),
            ("/ü", "/%C3%BC"),
            ("//double", "//double"),
        ];
        for (path, want) in cases {
            assert_eq!(Url::new("", "10.0.0.1", 80, path).unwrap().target, want, "{path}");
        }
    }

    #[test]
    fn b03_shown_with_port_and_brackets() {
        assert_eq!(Url::new("HTTP", "10.0.0.1", 8080, "/x").unwrap().to_string(), "http://10.0.0.1:8080/x");
        assert_eq!(Url::new("https", "fd00::1", 443, "x").unwrap().to_string(), "https://[fd00::1]:443/x");
        assert_eq!(Url::new("ftp", "h", 1, "/").unwrap_err(), "unsupported protocol scheme \"ftp\"");
    }

    #[test]
    fn b03_redirects_resolve_against_the_current_url() {
        let base = Url::new("http", "10.0.0.1", 8080, "/a/b?q=1").unwrap();
        let cases = [
            ("/c", "http://10.0.0.1:8080/c"),
            ("c", "http://10.0.0.1:8080/a/c"),
            ("../c/./d", "http://10.0.0.1:8080/c/d"),
            ("?z=2", "http://10.0.0.1:8080/a/b?z=2"),
            ("http://10.0.0.1/c", "http://10.0.0.1/c"),
            ("https://example.com:444", "https://example.com:444/"),
            ("//other/x", "http://other/x"),
            ("http://[::1]:81/x", "http://[::1]:81/x"),
            ("http://0.0.0.0/", "http://0.0.0.0/"),
        ];
        for (location, want) in cases {
            assert_eq!(base.join(location).unwrap().to_string(), want, "{location}");
        }
        assert!(base.join("ftp://x/").is_err());
        assert!(base.join("http://x:99999/").is_err());
    }
}
