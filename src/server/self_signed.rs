//! The serving certificate of a node that was given none: `pki/kubelet.crt` and `pki/kubelet.key` (contract C-04, C-10).
//!
//! A leaf `<hostname>@<unix time>` signed by a throw-away authority `<hostname>-ca@<unix time>`; the file holds both. An existing
//! pair is used as it is, unless it has expired or its halves do not belong together.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use jiff::{Timestamp, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::tls::{TlsError, server_config};

/// Returns the paths of certificate and key, making both when what is there cannot be used.
pub(super) fn ensure(
    directory: &Path,
    hostname: &str,
    node_ips: &[IpAddr],
    wall: Timestamp,
) -> Result<(PathBuf, PathBuf), TlsError> {
    let (cert, key) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
    if usable(&cert, &key, wall) {
        return Ok((cert, key));
    }
    let failed = |path: &Path, message: String| TlsError::SelfSigned { path: path.to_owned(), message };
    let made = make(hostname, node_ips, wall).map_err(|e| failed(&cert, e.to_string()))?;
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).map_err(|e| failed(directory, e.to_string()))?;
    write(&key, &made.key, 0o600).map_err(|e| failed(&key, e.to_string()))?;
    write(&cert, &made.certificates, 0o644).map_err(|e| failed(&cert, e.to_string()))?;
    tracing::info!(cert = %cert.display(), "made a self-signed serving certificate");
    Ok((cert, key))
}

fn usable(cert: &Path, key: &Path, wall: Timestamp) -> bool {
    let leaf = CertificateDer::from_pem_file(cert).ok();
    let valid = leaf.is_some_and(|leaf| {
        x509_parser::parse_x509_certificate(&leaf).is_ok_and(|(_, parsed)| {
            let validity = parsed.validity();
            (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&wall.as_second())
        })
    });
    valid && server_config(cert, key).is_ok()
}

struct Made {
    /// Leaf, then authority, in PEM.
    certificates: String,
    key: String,
}

fn make(hostname: &str, node_ips: &[IpAddr], wall: Timestamp) -> Result<Made, rcgen::Error> {
    let seconds = wall.as_second();
    let params = |name: String| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        // Whole days: from yesterday, for clocks that differ, to a year from then.
        let day = |plus: i64| {
            let at = Timestamp::from_second(seconds + plus * 86_400).unwrap_or(wall).to_zoned(TimeZone::UTC);
            rcgen::date_time_ymd(i32::from(at.year()), at.month().unsigned_abs(), at.day().unsigned_abs())
        };
        (params.not_before, params.not_after) = (day(-1), day(364));
        params
    };
    let mut ca = params(format!("{hostname}-ca@{seconds}"));
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages =
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyCertSign];
    let ca_key = KeyPair::generate()?;
    let ca_cert = ca.self_signed(&ca_key)?;

    let mut leaf = params(format!("{hostname}@{seconds}"));
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.subject_alt_names = match hostname.parse() {
        Ok(ip) => vec![SanType::IpAddress(ip)],
        Err(_) => vec![SanType::DnsName(hostname.try_into()?)],
    };
    leaf.subject_alt_names.extend(node_ips.iter().map(|ip| SanType::IpAddress(*ip)));
    let key = KeyPair::generate()?;
    let cert = leaf.signed_by(&key, &Issuer::new(ca, ca_key))?;
    Ok(Made { certificates: cert.pem() + &ca_cert.pem(), key: key.serialize_pem() })
}

/// Writes beside and renames, so that nobody ever reads half a file.
fn write(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let beside = path.with_extension("tmp");
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}
