//! Who was given how much of a pool of late, so that one client does not use it up for all.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::net::IpAddr;

use foldhash::fast::RandomState;

use crate::net::client_of;

/// A client gets no new address if it has so many times what is left. One alone has seven eighths of the pool at most, two
/// have seven fifteenths each, and who comes then finds a fifteenth.
const TIMES: usize = 7;

/// A client: a hash that none can foresee, or 0 for nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Owner(u32);

impl Owner {
    /// Of what an earlier run gave out.
    pub(super) const NOBODY: Self = Self(0);
}

/// Addresses that may still be in use, by the client that was given them.
#[derive(Debug, Default)]
pub(super) struct Shares {
    taken: HashMap<Owner, usize, RandomState>,
    hasher: RandomState,
}

impl Shares {
    pub(super) fn owner(&self, client: IpAddr) -> Owner {
        Owner((self.hasher.hash_one(client_of(client)) as u32).max(1))
    }

    /// Whether `owner` may take one more of the `left` addresses that nobody uses.
    pub(super) fn may_take(&self, owner: Owner, left: usize) -> bool {
        self.taken.get(&owner).copied().unwrap_or_default() < TIMES * left
    }

    pub(super) fn charge(&mut self, owner: Owner) {
        if owner != Owner::NOBODY {
            *self.taken.entry(owner).or_default() += 1;
        }
    }

    pub(super) fn discharge(&mut self, owner: Owner) {
        match self.taken.get_mut(&owner) {
            Some(taken) if *taken > 1 => *taken -= 1,
            _ => drop(self.taken.remove(&owner)),
        }
    }

    /// How many clients have something.
    #[cfg(test)]
    pub(super) fn clients(&self) -> usize {
        self.taken.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_alone_leaves_an_eighth_and_each_that_comes_leaves_something_to_the_next() {
        let mut shares = Shares::default();
        let mut left: usize = 65_531;
        let parts: Vec<usize> = (1..=4)
            .map(|client| {
                let owner = shares.owner(IpAddr::from([10, 0, 0, client]));
                let mut part = 0;
                while shares.may_take(owner, left) {
                    shares.charge(owner);
                    (left, part) = (left - 1, part + 1);
                }
                part
            })
            .collect();
        assert_eq!(parts, [57_340, 7_168, 896, 112]);
        assert!(left > 0);
    }

    #[test]
    fn nobody_is_remembered_who_has_nothing() {
        let mut shares = Shares::default();
        let owner = shares.owner(IpAddr::from([10, 0, 0, 1]));
        shares.charge(owner);
        shares.charge(Owner::NOBODY);
        assert_eq!(shares.clients(), 1);
        shares.discharge(owner);
        shares.discharge(Owner::NOBODY);
        assert_eq!(shares.clients(), 0);
    }
}
