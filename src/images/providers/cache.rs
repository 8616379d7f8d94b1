//! Answers of one credential provider, as long and for as much as it said (contract I-07). Time is an argument.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{CacheKeyType, Logins, registry_of};
use crate::images::credentials::Coordinates;

/// Entries that nobody asks for any more go this often.
const PURGE_EVERY: Duration = Duration::from_secs(15 * 60);

/// Whose answer it is, in service account mode.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct AccountIdentity {
    pub(super) account: Coordinates,
    pub(super) annotations: BTreeMap<String, String>,
    /// Only when answers hold for one token.
    pub(super) token_hash: Option<String>,
}

pub(super) type AccountKey = Option<AccountIdentity>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Scope {
    Image(String),
    Registry(String),
    Global,
}

pub(super) struct LoginCache {
    entries: HashMap<(Scope, AccountKey), (Arc<Logins>, Instant)>,
    purged_at: Instant,
}

impl LoginCache {
    pub(super) fn new(now: Instant) -> Self {
        Self { entries: HashMap::new(), purged_at: now }
    }

    /// The narrowest answer that still holds.
    pub(super) fn get(&mut self, image: &str, account: &AccountKey, now: Instant) -> Option<Arc<Logins>> {
        if now > self.purged_at + PURGE_EVERY {
            self.entries.retain(|_, (_, until)| now <= *until);
            self.purged_at = now;
        }
        let scopes = [Scope::Image(image.to_owned()), Scope::Registry(registry_of(image).to_owned()), Scope::Global];
        scopes.into_iter().find_map(|scope| {
            let (logins, until) = self.entries.get(&(scope, account.clone()))?;
            (now <= *until).then(|| Arc::clone(logins))
        })
    }

    pub(super) fn put(
        &mut self,
        image: &str,
        scope: CacheKeyType,
        account: AccountKey,
        logins: Arc<Logins>,
        until: Instant,
    ) {
        let scope = match scope {
            CacheKeyType::Image => Scope::Image(image.to_owned()),
            CacheKeyType::Registry => Scope::Registry(registry_of(image).to_owned()),
            CacheKeyType::Global => Scope::Global,
        };
        self.entries.insert((scope, account), (logins, until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{Clock, SystemClock};

    #[test]
    fn i07_answers_hold_for_image_registry_or_everything_and_for_their_time() {
        let now = SystemClock.now().mono;
        let until = now + Duration::from_secs(10);
        for (scope, same_registry, other_registry) in [
            (CacheKeyType::Image, false, false),
            (CacheKeyType::Registry, true, false),
            (CacheKeyType::Global, true, true),
        ] {
            let mut cache = LoginCache::new(now);
            cache.put("reg.io/a", scope, None, Arc::default(), until);
            assert!(cache.get("reg.io/a", &None, until).is_some());
            assert!(cache.get("reg.io/a", &None, until + Duration::from_nanos(1)).is_none());
            assert_eq!(cache.get("reg.io/b", &None, now).is_some(), same_registry, "{scope:?}");
            assert_eq!(cache.get("other.io/a", &None, now).is_some(), other_registry, "{scope:?}");
            assert!(cache.get("reg.io:5000/a", &None, now).is_some() == other_registry);
            let account =
                AccountIdentity { account: Coordinates::default(), annotations: BTreeMap::new(), token_hash: None };
            assert!(cache.get("reg.io/a", &Some(account), now).is_none(), "answers of accounts are kept apart");
            let later = now + PURGE_EVERY + Duration::from_secs(1);
            cache.get("x", &None, later);
            assert!(cache.entries.is_empty());
        }
    }
}
