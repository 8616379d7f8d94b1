//! Names of images as users write them: `nginx`, `registry:5000/team/app:v1@sha256:…` (contract I-01).
//!
//! Accepts and refuses what the Go kubelet does; the messages are its.

/// Docker Hub's name, and the namespace of its own images.
const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const MAX_REPOSITORY: usize = 255;

/// A parsed image name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReference {
    /// With its registry: `docker.io/library/nginx`.
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:…`
    pub digest: Option<String>,
}

/// `couldn't parse image name "X": invalid reference format`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("couldn't parse image name {image:?}: {fault}")]
pub struct InvalidReference {
    pub image: String,
    pub fault: String,
}

impl ImageReference {
    pub fn parse(image: &str) -> Result<Self, InvalidReference> {
        parse(image).map_err(|fault| InvalidReference { image: image.to_owned(), fault })
    }
}

/// The name as the user wrote it, with `:latest` when it has neither tag nor digest. The registry is never filled in: which one
/// is the default is the runtime's business.
pub(super) fn with_default_tag(image: &str) -> Result<String, InvalidReference> {
    let reference = ImageReference::parse(image)?;
    let complete = reference.tag.is_some() || reference.digest.is_some();
    Ok(if complete { image.to_owned() } else { format!("{image}:latest") })
}

/// What the API sets when `imagePullPolicy` is not given: for specs that did not pass the API.
pub(super) fn defaults_to_always(image: &str) -> bool {
    ImageReference::parse(image).is_ok_and(|r| r.digest.is_none() && r.tag.is_none_or(|tag| tag == "latest"))
}

/// The name as the user wrote it, without tag and digest: how pull records file credentials (contract I-10).
pub(super) fn without_tag(image: &str) -> Result<&str, InvalidReference> {
    let ImageReference { tag, digest, .. } = ImageReference::parse(image)?;
    let misplaced = |fault: String| InvalidReference { image: image.to_owned(), fault };
    let mut name = image;
    if let Some(digest) = digest {
        let bare = name.strip_suffix(digest.as_str()).and_then(|name| name.strip_suffix('@'));
        name = bare.ok_or_else(|| misplaced("digest was not specified last".to_owned()))?;
    }
    if let Some(tag) = tag {
        let bare = name.strip_suffix(tag.as_str()).and_then(|name| name.strip_suffix(':'));
        name = bare.ok_or_else(|| misplaced(format!("tag {tag:?} was not specified last (or before the digest)")))?;
    }
    Ok(name)
}

fn parse(image: &str) -> Result<ImageReference, String> {
    let invalid = || "invalid reference format".to_owned();
    if image.len() == 64 && image.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Err(format!("invalid repository name ({image}), cannot specify 64-byte hexadecimal strings"));
    }
    let (domain, remainder) = split_domain(image);
    let remote = remainder.split(':').next().unwrap_or_default();
    if remote.to_lowercase() != remote {
        return Err(format!("invalid reference format: repository name ({remote}) must be lowercase"));
    }
    let full = format!("{domain}/{remainder}");
    let Some((name, tag, digest)) = split(&full) else {
        let lower = full.to_lowercase();
        return Err(if split(&lower).is_some() { "repository name must be lowercase".to_owned() } else { invalid() });
    };
    let path = if is_domain(&domain) { name.split_once('/').map_or(name, |(_, path)| path) } else { name };
    if path.len() > MAX_REPOSITORY {
        return Err(format!("repository name must not be more than {MAX_REPOSITORY} characters"));
    }
    if let Some(digest) = digest {
        check_digest(digest)?;
    }
    let own = |text: Option<&str>| text.map(str::to_owned);
    Ok(ImageReference { repository: name.to_owned(), tag: own(tag), digest: own(digest) })
}

/// (registry, the rest): the first part is a registry when it looks like a host.
fn split_domain(image: &str) -> (String, String) {
    let (domain, remote) = match image.split_once('/') {
        Some((LEGACY_DEFAULT_DOMAIN, rest)) => (DEFAULT_DOMAIN, rest),
        Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) || first.to_lowercase() != first => {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, image),
    };
    let official = domain == DEFAULT_DOMAIN && !remote.contains('/');
    (domain.to_owned(), if official { format!("{OFFICIAL}{remote}") } else { remote.to_owned() })
}

/// `name[:tag][@digest]` with each part well formed.
fn split(full: &str) -> Option<(&str, Option<&str>, Option<&str>)> {
    let (left, digest) = match full.split_once('@') {
        Some((left, digest)) => (left, Some(digest)),
        None => (full, None),
    };
    let last = left.rfind('/').map_or(0, |at| at + 1);
    let (name, tag) = match left[last..].split_once(':') {
        Some((base, tag)) => (&left[..last + base.len()], Some(tag)),
        None => (left, None),
    };
    let well_formed = is_name(name) && tag.is_none_or(is_tag) && digest.is_none_or(is_digest);
    well_formed.then_some((name, tag, digest))
}

fn is_name(name: &str) -> bool {
    match name.split_once('/') {
        Some((first, rest)) => (is_domain(first) || is_component(first)) && rest.split('/').all(is_component),
        None => is_component(name),
    }
}

/// Lower-case alphanumerics, joined by `.`, `_`, `__` or dashes.
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut rest = component.as_bytes();
    loop {
        let word = rest.iter().take_while(|b| alphanumeric(**b)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        let separator = match rest {
            [] => return true,
            [b'_', b'_', ..] => 2,
            [b'.' | b'_', ..] => 1,
            [b'-', ..] => rest.iter().take_while(|b| **b == b'-').count(),
            _ => return false,
        };
        rest = &rest[separator..];
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (domain, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let is_host = match v6 {
        Some(address) => !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':'),
        None => host.split('.').all(label),
    };
    is_host && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= 128 && bytes.next().is_some_and(word) && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_digest(digest: &str) -> bool {
    let part =
        |p: &str| p.starts_with(|c: char| c.is_ascii_alphabetic()) && p.bytes().all(|b| b.is_ascii_alphanumeric());
    digest.split_once(':').is_some_and(|(algorithm, hex)| {
        algorithm.split(['-', '_', '+', '.']).all(part) && hex.len() >= 32 && hex.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

fn check_digest(digest: &str) -> Result<(), String> {
    let (algorithm, hex) = digest.split_once(':').unwrap_or_default();
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return Err("unsupported digest algorithm".to_owned()),
    };
    if hex.len() != length {
        return Err("invalid checksum digest length".to_owned());
    }
    let lower = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if lower { Ok(()) } else { Err("invalid checksum digest format".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn i01_names_and_their_parts() {
        let digest = format!("sha256:{HEX}");
        for (image, repository, tag, with_digest) in [
            ("nginx", "docker.io/library/nginx", None, false),
            ("nginx:1.2", "docker.io/library/nginx", Some("1.2"), false),
            ("team/app", "docker.io/team/app", None, false),
            ("docker.io/nginx", "docker.io/library/nginx", None, false),
            ("index.docker.io/nginx", "docker.io/library/nginx", None, false),
            ("localhost/x", "localhost/x", None, false),
            ("reg:5000/a/b:v", "reg:5000/a/b", Some("v"), false),
            ("reg.io/a__b/c--d.e:V_1-x", "reg.io/a__b/c--d.e", Some("V_1-x"), false),
            ("[::1]:5000/a", "[::1]:5000/a", None, false),
            ("UPPER/a", "UPPER/a", None, false),
            ("k8s.gcr.io/pause@D", "k8s.gcr.io/pause", None, true),
            ("pause:3@D", "docker.io/library/pause", Some("3"), true),
        ] {
            let image = image.replace("@D", &format!("@{digest}"));
            let got = ImageReference::parse(&image).unwrap();
            let digest = with_digest.then(|| digest.clone());
            let want = ImageReference { repository: repository.into(), tag: tag.map(str::to_owned), digest };
            assert_eq!(got, want, "{image}");
        }
    }

    #[test]
    fn i01_what_cannot_be_parsed() {
        for (image, fault) in [
            ("", "invalid reference format"),
            ("a b", "invalid reference format"),
            ("nginx:", "invalid reference format"),
            ("nginx:a:b", "invalid reference format"),
            ("reg.io//a", "invalid reference format"),
            ("-a", "invalid reference format"),
            ("a/b_-c", "invalid reference format"),
            ("nginx@sha256:12", "invalid reference format"),
            ("Nginx", "invalid reference format: repository name (library/Nginx) must be lowercase"),
            ("reg.io/A", "invalid reference format: repository name (A) must be lowercase"),
            (HEX, &format!("invalid repository name ({HEX}), cannot specify 64-byte hexadecimal strings")),
            (&format!("a@sha256:{}", &HEX[..40]), "invalid checksum digest length"),
            (&format!("a@sha256:{}", HEX.to_uppercase()), "invalid checksum digest format"),
            (&format!("a@md5:{}", &HEX[..32]), "unsupported digest algorithm"),
            (&format!("reg.io/{}", "a".repeat(256)), "repository name must not be more than 255 characters"),
        ] {
            let error = ImageReference::parse(image).unwrap_err();
            assert_eq!(error.fault, fault, "{image}");
            assert_eq!(error.to_string(), format!("couldn't parse image name {image:?}: {fault}"));
        }
    }

    #[test]
    fn i01_default_tag_and_policy() {
        let digest = format!("a@sha256:{HEX}");
        for (image, tagged, always) in [
            ("nginx", "nginx:latest", true),
            ("nginx:latest", "nginx:latest", true),
            ("nginx:1", "nginx:1", false),
            ("reg:5000/a", "reg:5000/a:latest", true),
            (digest.as_str(), digest.as_str(), false),
        ] {
            assert_eq!(with_default_tag(image).unwrap(), tagged);
            assert_eq!(defaults_to_always(image), always, "{image}");
        }
    }

    #[test]
    fn i10_names_without_tag_and_digest() {
        let digest = format!("reg:5000/a/b:v1@sha256:{HEX}");
        for (image, bare) in [
            ("nginx", "nginx"),
            ("nginx:1.2", "nginx"),
            ("docker.io/testing/test:latest", "docker.io/testing/test"),
            ("reg:5000/a", "reg:5000/a"),
            (digest.as_str(), "reg:5000/a/b"),
        ] {
            assert_eq!(without_tag(image).unwrap(), bare);
        }
        assert!(without_tag("A b").is_err());
    }

    proptest::proptest! {
        /// Whatever a user writes gets an answer, and what parses parses the same with its tag filled in.
        #[test]
        fn i01_any_text_is_answered(image in "[a-zA-Z0-9./:@_\\-\\[\\] é]{0,40}") {
            if let (Ok(parsed), Ok(tagged)) = (ImageReference::parse(&image), with_default_tag(&image)) {
                let again = ImageReference::parse(&tagged).unwrap();
                proptest::prop_assert_eq!(&again.repository, &parsed.repository);
                proptest::prop_assert_eq!(with_default_tag(&tagged).unwrap(), tagged);
            }
        }
    }
}
