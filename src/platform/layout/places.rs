//! Where rules stand that are there twice: in our block, and ahead of rules of others that come before it.

use super::{ahead, offset};

/// Priorities.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) own: u32,
    pub(super) foreign: u32,
    pub(super) from_tun: u32,
    pub(super) fake: u32,
    pub(super) fake_gone: u32,
    pub(super) interface: u32,
    pub(super) other_interfaces: u32,
    pub(super) users: u32,
    pub(super) dns_unbound: u32,
    pub(super) dns_local_end: u32,
    pub(super) dns: u32,
    pub(super) dns_end: u32,
    /// Where what passes goes on.
    pub(super) end: u32,
}

impl Places {
    /// Those in our block, whose first priority is `first`.
    pub(super) fn in_block(first: u32) -> Self {
        Self {
            own: first + offset::OWN,
            foreign: first + offset::FOREIGN,
            from_tun: first + offset::FROM_TUN,
            fake: first + offset::FAKE,
            fake_gone: first + offset::FAKE_GONE,
            interface: first + offset::INTERFACE,
            other_interfaces: first + offset::OTHER_INTERFACES,
            users: first + offset::USERS,
            dns_unbound: first + offset::DNS_UNBOUND,
            dns_local_end: first + offset::DNS_LOCAL_END,
            dns: first + offset::DNS,
            dns_end: first + offset::DNS_END,
            end: first + offset::END,
        }
    }

    /// Those ahead of others, from `first` on.
    pub(super) fn ahead(first: u32) -> Self {
        Self {
            own: first + ahead::OWN,
            foreign: first + ahead::FOREIGN,
            from_tun: first + ahead::FROM_TUN,
            fake: first + ahead::FAKE,
            fake_gone: first + ahead::FAKE_GONE,
            interface: first + ahead::INTERFACE,
            other_interfaces: first + ahead::OTHER_INTERFACES,
            users: first + ahead::USERS,
            dns_unbound: first + ahead::DNS_UNBOUND,
            dns_local_end: first + ahead::DNS_LOCAL_END,
            dns: first + ahead::DNS,
            dns_end: first + ahead::END,
            end: first + ahead::END,
        }
    }
}
