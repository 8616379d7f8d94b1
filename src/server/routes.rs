//! What 10250 serves: one static table, from which routing, authorisation, the test matrix and the docs come. Pure.

use hyper::Method;

/// An endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Healthz,
    Metrics,
    ProbeMetrics,
    Configz,
    Pods,
    ContainerLogs,
    Exec,
}

/// One line of the table. A segment in braces matches any one segment that is not empty.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    pub methods: &'static [Method],
    pub path: &'static str,
    pub kind: Kind,
}

const GET: &[Method] = &[Method::GET];
const GET_POST: &[Method] = &[Method::GET, Method::POST];

pub const ROUTES: &[Route] = &[
    Route { methods: GET, path: "/healthz", kind: Kind::Healthz },
    Route { methods: GET, path: "/healthz/{check}", kind: Kind::Healthz },
    Route { methods: GET, path: "/metrics", kind: Kind::Metrics },
    Route { methods: GET, path: "/metrics/probes", kind: Kind::ProbeMetrics },
    Route { methods: GET, path: "/configz", kind: Kind::Configz },
    Route { methods: GET, path: "/pods", kind: Kind::Pods },
    Route { methods: GET, path: "/containerLogs/{namespace}/{pod}/{container}", kind: Kind::ContainerLogs },
    Route { methods: GET_POST, path: "/exec/{namespace}/{pod}/{container}", kind: Kind::Exec },
    Route { methods: GET_POST, path: "/exec/{namespace}/{pod}/{uid}/{container}", kind: Kind::Exec },
];

/// The outcome of routing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The arguments are the segments that stood for braces.
    Route(Kind, Vec<String>),
    WrongMethod(Vec<Method>),
    Nothing,
}

/// Whether the path's first segment is one of ours. Others are 404 before anybody is asked for credentials, as upstream.
pub(super) fn known_prefix(path: &str) -> bool {
    let first = |p: &str| p.split('/').nth(1).map(str::to_owned);
    ROUTES.iter().any(|route| first(route.path) == first(path))
}

pub(super) fn find(method: &Method, path: &str) -> Found {
    let mut allowed = Vec::new();
    for route in ROUTES {
        let Some(arguments) = matches(route.path, path) else { continue };
        if route.methods.contains(method) {
            return Found::Route(route.kind, arguments);
        }
        allowed.extend_from_slice(route.methods);
    }
    if allowed.is_empty() { Found::Nothing } else { Found::WrongMethod(allowed) }
}

fn matches(pattern: &str, path: &str) -> Option<Vec<String>> {
    let path = path.strip_suffix('/').unwrap_or(path);
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut arguments = Vec::new();
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(arguments),
            (Some(w), Some(g)) if w.starts_with('{') && !g.is_empty() => arguments.push(decode(g)),
            (Some(w), Some(g)) if w == g => {}
            _ => return None,
        }
    }
}

/// The subresources of `nodes` that allow a request, any of them being enough (contract 7.1).
pub fn subresources(path: &str) -> Vec<&'static str> {
    let under = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let mut found = Vec::new();
    for (prefix, fine) in
        [("/pods", "pods"), ("/healthz", "healthz"), ("/configz", "configz"), ("/runningpods", "pods")]
    {
        if under(prefix) {
            found.push(fine);
            break;
        }
    }
    let coarse = [
        ("/stats", "stats"),
        ("/metrics", "metrics"),
        ("/logs", "log"),
        ("/checkpoint", "checkpoint"),
        ("/statusz", "statusz"),
        ("/flagz", "configz"),
    ];
    found.push(coarse.iter().find(|(prefix, _)| under(prefix)).map_or("proxy", |(_, name)| name));
    found
}

/// The API verb of a method, empty for those that have none (contract 7.1).
pub(super) fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "POST" => "create",
        "GET" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "",
    }
}

/// All values of each query parameter, decoded, in order.
pub(super) fn query(uri: &hyper::Uri) -> Vec<(String, String)> {
    let pairs = uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
        })
        .collect()
}

/// Percent-decodes; a broken escape stays as it is.
fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'%')
            .then(|| after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()))
            .flatten()
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e01_subresources_by_path() {
        let cases: [(&str, &[&str]); 13] = [
            ("/stats/summary", &["stats"]),
            ("/metrics", &["metrics"]),
            ("/metrics/probes", &["metrics"]),
            ("/metricsx", &["proxy"]),
            ("/logs/", &["log"]),
            ("/checkpoint/a/b/c", &["checkpoint"]),
            ("/statusz", &["statusz"]),
            ("/flagz", &["configz"]),
            ("/configz", &["configz", "proxy"]),
            ("/healthz/ping", &["healthz", "proxy"]),
            ("/pods", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/exec/a/b/c", &["proxy"]),
        ];
        for (path, want) in cases {
            assert_eq!(subresources(path), want, "{path}");
        }
    }

    #[test]
    fn routes_are_found() {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            find(&Method::GET, "/containerLogs/ns/p%20x/c"),
            Found::Route(Kind::ContainerLogs, names(&["ns", "p x", "c"]))
        );
        assert_eq!(find(&Method::POST, "/exec/ns/p/uid/c"), Found::Route(Kind::Exec, names(&["ns", "p", "uid", "c"])));
        assert_eq!(find(&Method::GET, "/pods/"), Found::Route(Kind::Pods, vec![]));
        assert_eq!(find(&Method::POST, "/pods"), Found::WrongMethod(vec![Method::GET]));
        assert_eq!(find(&Method::GET, "/containerLogs/ns//c"), Found::Nothing);
        assert!(known_prefix("/exec") && known_prefix("/containerLogs/x") && !known_prefix("/") && !known_prefix("/x"));
    }

    #[test]
    fn query_is_decoded_in_order() {
        let uri = "/exec?command=sh&command=-c&command=a+%2B%26b&tty=1&flag".parse().unwrap();
        let values: Vec<String> = query(&uri).into_iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(values, ["command=sh", "command=-c", "command=a +&b", "tty=1", "flag="]);
        assert_eq!(decode("%zz%4"), "%zz%4");
    }
}
