//! Real addresses for our own dials.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use super::flights::Whose;
use super::key::Key;
use super::resolver::{Failure, Outcome, TOTAL};
use super::special::{self, Special};
use super::wire::{kind, rcode};
use super::{Dns, now};
use crate::net::{BoxFuture, Lookup, LookupError, Name};

/// How long the other family is waited for once one has answered (`ipv6-timeout` of mihomo).
const OTHER_FAMILY: Duration = Duration::from_millis(100);

impl Dns {
    /// The real addresses of `name`, if they are known now; asks nobody.
    #[must_use]
    pub fn cached(&self, name: &Name) -> Option<Arc<[IpAddr]>> {
        if let Some(local) = self.without_asking(name) {
            return local.ok();
        }
        let now = now();
        let family = |kind| self.resolver.cached(Key::own(name, kind)?.as_bytes(), now);
        let v4 = family(kind::A)?;
        let v6 = if self.ipv6 { Some(family(kind::AAAA)?) } else { None };
        join(&v4, v6.as_ref()).ok()
    }

    /// Answers for names that no nameserver may be asked about.
    fn without_asking(&self, name: &Name) -> Option<Result<Arc<[IpAddr]>, LookupError>> {
        match special::of(name.as_str()) {
            Some(Special::Loopback) => {
                let v4 = [IpAddr::from(Ipv4Addr::LOCALHOST)];
                let v6 = self.ipv6.then_some(IpAddr::from(Ipv6Addr::LOCALHOST));
                Some(Ok(v4.into_iter().chain(v6).collect()))
            }
            Some(Special::NoSuchName) => Some(Err(LookupError::NoSuchName)),
            Some(Special::NoData) => Some(Err(LookupError::NoAddress)),
            Some(Special::Reverse(_)) | None => {
                special::is_onion(name.as_str()).then_some(Err(LookupError::NoSuchName))
            }
        }
    }

    async fn both(&self, name: &Name) -> Result<Arc<[IpAddr]>, LookupError> {
        let (Some(key4), Some(key6)) = (Key::own(name, kind::A), Key::own(name, kind::AAAA)) else {
            return Err(LookupError::NoSuchName);
        };
        let v4 = self.resolver.resolve(key4.as_bytes(), Whose::Ours);
        if !self.ipv6 {
            return join(&v4.await, None);
        }
        let v6 = self.resolver.resolve(key6.as_bytes(), Whose::Ours);
        tokio::pin!(v4, v6);
        let useful = |outcome: &Outcome| matches!(outcome, Ok(answered) if !answered.message.addresses.is_empty());
        tokio::select! {
            first = &mut v4 => match useful(&first) {
                true => join(&first, tokio::time::timeout(OTHER_FAMILY, v6).await.ok().as_ref()),
                false => join(&first, Some(&v6.await)),
            },
            second = &mut v6 => match useful(&second) {
                // IPv4 is worth a wait where IPv6 is only announced, but not worth failing for.
                true => match tokio::time::timeout(OTHER_FAMILY, v4).await {
                    Ok(first) => join(&first, Some(&second)),
                    Err(_) => join(&second, None),
                },
                false => join(&v4.await, Some(&second)),
            },
        }
    }
}

impl Lookup for Dns {
    /// IPv4 before IPv6; within five seconds.
    fn lookup<'a>(&'a self, name: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        Box::pin(async move {
            match self.without_asking(name) {
                Some(local) => local,
                None => tokio::time::timeout(TOTAL, self.both(name)).await.unwrap_or(Err(LookupError::TimedOut)),
            }
        })
    }

    /// Within five seconds.
    fn lookup_family<'a>(&'a self, name: &'a Name, ipv4: bool) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        Box::pin(async move {
            if let Some(local) = self.without_asking(name) {
                return of_family(&local?, ipv4);
            }
            if !ipv4 && !self.ipv6 {
                return Err(LookupError::NoAddress);
            }
            let kind = if ipv4 { kind::A } else { kind::AAAA };
            let key = Key::own(name, kind).ok_or(LookupError::NoSuchName)?;
            let answer = tokio::time::timeout(TOTAL, self.resolver.resolve(key.as_bytes(), Whose::Ours)).await;
            join(&answer.map_err(|_| LookupError::TimedOut)?, None)
        })
    }
}

fn of_family(found: &[IpAddr], ipv4: bool) -> Result<Arc<[IpAddr]>, LookupError> {
    let found: Arc<[IpAddr]> = found.iter().copied().filter(|ip| ip.is_ipv4() == ipv4).collect();
    if found.is_empty() { Err(LookupError::NoAddress) } else { Ok(found) }
}

/// One list of both families' addresses, or the reason why there is none.
fn join(first: &Outcome, second: Option<&Outcome>) -> Result<Arc<[IpAddr]>, LookupError> {
    let addresses = |outcome: &Outcome| match outcome {
        Ok(answered) => Arc::clone(&answered.message.addresses),
        Err(_) => Arc::default(),
    };
    let (a, b) = (addresses(first), second.map(addresses).unwrap_or_default());
    match (a.is_empty(), b.is_empty()) {
        (false, true) => return Ok(a),
        (true, false) => return Ok(b),
        (false, false) => return Ok(a.iter().chain(b.iter()).copied().collect()),
        (true, true) => {}
    }
    let failures = std::iter::once(first).chain(second).map(why_none);
    // A failure says less than an answer: the name may have the addresses that we could not ask for.
    failures
        .reduce(|a, b| if matches!(b, LookupError::TimedOut | LookupError::Failed(_)) { b } else { a })
        .map_or(Err(LookupError::NoAddress), Err)
}

fn why_none(outcome: &Outcome) -> LookupError {
    match outcome {
        Ok(answered) => match answered.message.code {
            rcode::NO_ERROR => LookupError::NoAddress,
            rcode::NX_DOMAIN => LookupError::NoSuchName,
            rcode::SERV_FAIL => LookupError::Failed("the nameservers answered SERVFAIL".into()),
            rcode::REFUSED => LookupError::Failed("the nameservers refused the question".into()),
            code => LookupError::Failed(format!("the nameservers answered with code {code}").into()),
        },
        Err(Failure::TimedOut) => LookupError::TimedOut,
        Err(Failure::Failed(why)) => LookupError::Failed(Arc::clone(why)),
    }
}
