//! Whether a pod may use an image that is already on the node (contract I-10, KEP-2535). Pure.
//!
//! In: the policy, what the records know of the image, the credentials of the pod. Out: use it, or prove access by pulling.

use super::{
    credentials::Coordinates,
    record_files::{PullCredentials, PulledRecord, SecretCredential},
    reference::without_tag,
};

/// Past this many recorded secrets of an image a match is not worth another write.
const NOTED_SECRETS: usize = 100;

/// `imagePullCredentialsVerificationPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerificationPolicy {
    NeverVerify,
    /// Images that no kubelet pulled are free to use.
    NeverVerifyPreloadedImages,
    /// Only these need no proof: names without tag or digest, or a prefix that ends with `/*`.
    NeverVerifyAllowlistedImages(Vec<String>),
    AlwaysVerify,
}

impl VerificationPolicy {
    /// From the configuration's words, which validation has checked. `None`: the feature is off.
    pub fn from_config(policy: &str, allowlist: &[String]) -> Option<Self> {
        match policy {
            "" => None,
            "NeverVerify" => Some(Self::NeverVerify),
            "NeverVerifyAllowlistedImages" => Some(Self::NeverVerifyAllowlistedImages(allowlist.to_vec())),
            "AlwaysVerify" => Some(Self::AlwaysVerify),
            _ => Some(Self::NeverVerifyPreloadedImages),
        }
    }

    fn wants_proof(&self, image: &str, pulled_by_kubelet: bool) -> bool {
        match self {
            Self::NeverVerify => false,
            Self::NeverVerifyPreloadedImages => pulled_by_kubelet,
            Self::NeverVerifyAllowlistedImages(allowed) => {
                let name = without_tag(image).unwrap_or(image);
                !allowed.iter().any(|pattern| match pattern.strip_suffix('*') {
                    Some(prefix) if prefix.ends_with('/') => name.starts_with(prefix),
                    _ => name == pattern,
                })
            }
            Self::AlwaysVerify => true,
        }
    }
}

/// What the records know of an image that is on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Knowledge {
    /// No kubelet pulled it.
    Preloaded,
    /// A pull was begun, and nobody knows who it was for.
    Pulling,
    Pulled(PulledRecord),
    /// There is a record, and it cannot be read.
    Unreadable,
}

/// The answer, or what has to be compared for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Check {
    /// The policy asks for nothing here.
    AllowedByPolicy,
    /// Every pod of the node may use it.
    Recorded,
    MustPull,
    /// The records are of no help: prove it.
    Unknown,
    /// These have shown access: the pod needs one of them.
    Compare(PullCredentials),
}

/// The first half: all that can be said without the pod's credentials. `image` is the name as the pod has it.
pub(super) fn check(policy: &VerificationPolicy, image: &str, knowledge: &Knowledge) -> Check {
    if matches!(knowledge, Knowledge::Unreadable) {
        return Check::Unknown;
    }
    if !policy.wants_proof(image, !matches!(knowledge, Knowledge::Preloaded)) {
        return Check::AllowedByPolicy;
    }
    let Knowledge::Pulled(record) = knowledge else { return Check::MustPull };
    let Ok(name) = without_tag(image) else { return Check::Unknown };
    match record.credentials.get(name) {
        None => Check::MustPull,
        Some(grants) if grants.node_pods_accessible => Check::Recorded,
        Some(grants) if grants.kubernetes_secrets.is_empty() && grants.kubernetes_service_accounts.is_empty() => {
            Check::MustPull
        }
        Some(grants) => Check::Compare(grants.clone()),
    }
}

/// The second half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Comparison {
    MustPull,
    Matches,
    /// As `Matches`; the secret is new to the record, or has a new content.
    MatchesAndNote(SecretCredential),
}

/// A secret matches by its content or by being the same object; a service account by being the same object.
pub(super) fn compare(
    grants: &PullCredentials,
    secrets: &[SecretCredential],
    account: Option<&Coordinates>,
) -> Comparison {
    for secret in secrets {
        for known in &grants.kubernetes_secrets {
            let same_content = !known.credential_hash.is_empty() && secret.credential_hash == known.credential_hash;
            let same_object =
                (&secret.uid, &secret.namespace, &secret.name) == (&known.uid, &known.namespace, &known.name);
            let room = grants.kubernetes_secrets.len() < NOTED_SECRETS;
            match (same_content, same_object) {
                (true, true) => return Comparison::Matches,
                (true, false) if room => return Comparison::MatchesAndNote(secret.clone()),
                (true, false) => return Comparison::Matches,
                (false, true) if room => return Comparison::MatchesAndNote(secret.clone()),
                _ => {}
            }
        }
    }
    match account {
        Some(account) if grants.kubernetes_service_accounts.contains(account) => Comparison::Matches,
        _ => Comparison::MustPull,
    }
}

/// Adds to what is recorded of a name. `None` when that changes nothing.
pub(super) fn merge(known: Option<&PullCredentials>, new: &PullCredentials) -> Option<PullCredentials> {
    if *new == PullCredentials::default() {
        return None;
    }
    let Some(known) = known else { return Some(new.clone()) };
    if known.node_pods_accessible {
        return None;
    }
    if new.node_pods_accessible {
        return Some(PullCredentials { node_pods_accessible: true, ..Default::default() });
    }
    let mut merged = known.clone();
    for secret in &new.kubernetes_secrets {
        let same =
            |s: &SecretCredential| (&s.uid, &s.namespace, &s.name) == (&secret.uid, &secret.namespace, &secret.name);
        merged.kubernetes_secrets.retain(|s| !same(s));
        merged.kubernetes_secrets.push(secret.clone());
    }
    for account in &new.kubernetes_service_accounts {
        if !merged.kubernetes_service_accounts.contains(account) {
            merged.kubernetes_service_accounts.push(account.clone());
        }
    }
    merged.kubernetes_secrets.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
    merged
        .kubernetes_service_accounts
        .sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
    (merged != *known).then_some(merged)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn secret(uid: &str, hash: &str) -> SecretCredential {
        SecretCredential {
            uid: uid.into(),
            namespace: "ns".into(),
            name: format!("name-{uid}"),
            credential_hash: hash.into(),
        }
    }
    fn secrets(list: &[SecretCredential]) -> PullCredentials {
        PullCredentials { kubernetes_secrets: list.to_vec(), ..Default::default() }
    }
    fn everybody() -> PullCredentials {
        PullCredentials { node_pods_accessible: true, ..Default::default() }
    }
    fn account(uid: &str) -> Coordinates {
        Coordinates { uid: uid.into(), namespace: "ns".into(), name: "sa".into() }
    }
    fn accounts(list: &[&str]) -> PullCredentials {
        PullCredentials { kubernetes_service_accounts: list.iter().map(|u| account(u)).collect(), ..Default::default() }
    }
    fn pulled(name: &str, grants: PullCredentials) -> Knowledge {
        Knowledge::Pulled(PulledRecord {
            last_updated: Timestamp::UNIX_EPOCH,
            image_ref: "ref".into(),
            credentials: [(name.to_owned(), grants)].into(),
        })
    }

    #[test]
    fn i10_policies_by_what_is_known_of_the_image() {
        let allow = |list: &[&str]| {
            VerificationPolicy::NeverVerifyAllowlistedImages(list.iter().map(|p| (*p).to_owned()).collect())
        };
        use VerificationPolicy::{AlwaysVerify, NeverVerify, NeverVerifyPreloadedImages};
        let image = "reg.io/team/app:v1";
        for (policy, knowledge, want) in [
            (NeverVerify, pulled("x", everybody()), Check::AllowedByPolicy),
            (NeverVerify, Knowledge::Pulling, Check::AllowedByPolicy),
            (NeverVerify, Knowledge::Unreadable, Check::Unknown),
            (NeverVerifyPreloadedImages, Knowledge::Preloaded, Check::AllowedByPolicy),
            (NeverVerifyPreloadedImages, Knowledge::Pulling, Check::MustPull),
            (NeverVerifyPreloadedImages, pulled("reg.io/other", everybody()), Check::MustPull),
            (NeverVerifyPreloadedImages, pulled("reg.io/team/app", everybody()), Check::Recorded),
            (NeverVerifyPreloadedImages, pulled("reg.io/team/app", PullCredentials::default()), Check::MustPull),
            (
                NeverVerifyPreloadedImages,
                pulled("reg.io/team/app", secrets(&[secret("a", "h")])),
                Check::Compare(secrets(&[secret("a", "h")])),
            ),
            (AlwaysVerify, Knowledge::Preloaded, Check::MustPull),
            (AlwaysVerify, pulled("reg.io/team/app", everybody()), Check::Recorded),
            (allow(&["reg.io/team/app"]), Knowledge::Pulling, Check::AllowedByPolicy),
            (allow(&["reg.io/*"]), Knowledge::Preloaded, Check::AllowedByPolicy),
            (allow(&["reg.io/tea/*", "reg.io/team"]), Knowledge::Preloaded, Check::MustPull),
        ] {
            assert_eq!(check(&policy, image, &knowledge), want, "{policy:?} {knowledge:?}");
        }
    }

    #[test]
    fn i10_what_of_the_pod_matches_the_record() {
        let many: Vec<_> = (0..NOTED_SECRETS).map(|n| secret(&n.to_string(), &format!("h{n}"))).collect();
        let (note, matches) = (|s: SecretCredential| Comparison::MatchesAndNote(s), Comparison::Matches);
        for (grants, pod, of_account, want) in [
            (secrets(&[secret("a", "h")]), vec![secret("a", "h")], None, matches.clone()),
            (secrets(&[secret("a", "h")]), vec![secret("b", "h")], None, note(secret("b", "h"))),
            (secrets(&[secret("a", "old")]), vec![secret("a", "new")], None, note(secret("a", "new"))),
            (secrets(&[secret("a", "")]), vec![secret("b", "")], None, Comparison::MustPull),
            (secrets(&[secret("a", "h")]), vec![secret("b", "x")], None, Comparison::MustPull),
            (secrets(&[secret("a", "h")]), vec![], Some("u"), Comparison::MustPull),
            (secrets(&many), vec![secret("new", "h7")], None, matches.clone()),
            (secrets(&many), vec![secret("7", "new")], None, Comparison::MustPull),
            (accounts(&["u"]), vec![secret("a", "h")], Some("u"), matches.clone()),
            (accounts(&["u"]), vec![], Some("v"), Comparison::MustPull),
        ] {
            let of_account = of_account.map(account);
            assert_eq!(compare(&grants, &pod, of_account.as_ref()), want, "{pod:?} {of_account:?}");
        }
    }

    #[test]
    fn i10_records_grow_and_never_shrink() {
        let (a, b) = (|| secret("a", "h"), || secret("b", "h"));
        for (known, new, want) in [
            (None, PullCredentials::default(), None),
            (None, everybody(), Some(everybody())),
            (Some(everybody()), secrets(&[a()]), None),
            (Some(secrets(&[a()])), everybody(), Some(everybody())),
            (Some(secrets(&[b()])), secrets(&[a()]), Some(secrets(&[a(), b()]))),
            (Some(secrets(&[a()])), secrets(&[a()]), None),
            (
                Some(secrets(&[a(), b()])),
                secrets(&[secret("a", "n")]),
                Some(secrets(&[secret("a", "n"), secret("b", "h")])),
            ),
            (Some(accounts(&["b"])), accounts(&["a"]), Some(accounts(&["a", "b"]))),
            (Some(accounts(&["b"])), accounts(&["b"]), None),
        ] {
            assert_eq!(merge(known.as_ref(), &new), want, "{known:?} + {new:?}");
        }
    }
}
