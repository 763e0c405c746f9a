//! Memory for the byte rings of flows: page-aligned, pooled, and given back to the system when a flow falls idle.
//!
//! smoltcp fixes a ring's size, and with it the window scale, at the SYN. So rings are generous in address space and
//! cost only the pages that data has touched.

use std::cell::RefCell;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::rc::Rc;

use libc::c_void;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::budget::{Budget, Share};

/// Bytes of one ring by class: the fewer flows live, the more each may have in flight. The last two are for when memory
/// is scarce.
const SIZES: [usize; 5] = [1 << 20, 256 << 10, 64 << 10, 16 << 10, 4 << 10];
/// From so many live flows on the next class is used.
const STEPS: [usize; 2] = [32, 512];
/// One mapping serves so many pairs of rings.
const PAIRS_PER_MAPPING: usize = 8;
/// So many free pairs of a class keep their first pages, so that short connections find them warm; fewer where they
/// would be more than a sixteenth of the budget.
const WARM_PAIRS: usize = 256;
/// What a warm ring may keep, in bytes.
const WARM_BYTES: usize = 8 << 10;

/// Free rings by class.
pub(super) struct Pool {
    budget: Rc<Budget>,
    free: [Vec<NonNull<u8>>; SIZES.len()],
    mappings: Vec<(NonNull<c_void>, NonZeroUsize)>,
    mapped: usize,
    /// The last class whose rings are whole pages: memory is given back by the page.
    smallest: usize,
    /// The system had no room for the last pair that was wanted.
    exhausted: bool,
}

/// A pair of rings, one for each direction; goes back to its pool when dropped.
pub(super) struct Rings {
    base: NonNull<u8>,
    class: usize,
    /// The most bytes that one of the two may hold in touched pages.
    touched: usize,
    /// Where in the second ring the next byte goes.
    head: usize,
    /// Who pays.
    client: IpAddr,
    /// What is paid for both while data may lie in them.
    share: Option<Share>,
    pool: Rc<RefCell<Pool>>,
}

impl Pool {
    /// No rings yet; those that are in use are paid for from `budget`.
    pub(super) fn new(budget: Rc<Budget>) -> Rc<RefCell<Self>> {
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|page| usize::try_from(page).ok());
        let smallest = page.and_then(|page| SIZES.iter().rposition(|size| size % page == 0)).unwrap_or(0);
        Rc::new(RefCell::new(Self {
            budget,
            free: Default::default(),
            mappings: Vec::new(),
            mapped: 0,
            smallest,
            exhausted: false,
        }))
    }

    /// A pair of rings for one more flow of `client`, beside `live` others of which `own` are of the same client. None when
    /// the system has no address space left.
    pub(super) fn take(pool: &Rc<RefCell<Self>>, client: IpAddr, (live, own): (usize, usize)) -> Option<Rings> {
        let mut inner = pool.borrow_mut();
        let (usual, fair) = (STEPS.iter().take_while(|step| live >= **step).count(), inner.budget.fair(live, own));
        let fits = SIZES.iter().position(|size| 2 * size <= fair).unwrap_or(SIZES.len() - 1);
        let class = usual.max(fits).min(inner.smallest);
        // Where the system has no room for more of these, smaller ones may fit.
        let class = (class..=inner.smallest).find(|class| inner.has(*class))?;
        let base = inner.free[class].pop()?;
        Some(Rings { base, class, touched: 0, head: 0, client, share: None, pool: Rc::clone(pool) })
    }

    /// Bytes of address space taken so far. They are given back with the pool.
    pub(super) fn mapped(&self) -> usize {
        self.mapped
    }

    /// Whether the last pair of rings that was wanted could not be had.
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Whether there is a free pair of this class, or could be made.
    fn has(&mut self, class: usize) -> bool {
        self.exhausted = self.free[class].is_empty() && self.grow(class).is_none();
        !self.exhausted
    }

    fn grow(&mut self, class: usize) -> Option<()> {
        let pair = SIZES[class] * 2;
        let length = NonZeroUsize::new(pair * PAIRS_PER_MAPPING)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let start =
            unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }.ok()?;
        // A huge page would make two megabytes resident for the first byte. A refusal costs memory only.
        // SAFETY: the range is the mapping just made; the advice changes no content.
        let _ = unsafe { madvise(start, length.get(), MmapAdvise::MADV_NOHUGEPAGE) };
        self.mapped += length.get();
        self.mappings.push((start, length));
        for index in 0..PAIRS_PER_MAPPING {
            // SAFETY: the offset stays inside the mapping.
            self.free[class].push(unsafe { start.cast::<u8>().add(index * pair) });
        }
        Some(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (start, length) in self.mappings.drain(..) {
            // SAFETY: a mapping of ours; whoever has rings in it has the pool, too. Failure costs address space only.
            let _ = unsafe { munmap(start, length.get()) };
        }
    }
}

impl Rings {
    /// The two rings. Call once, and drop what borrows them before `self` is dropped.
    ///
    /// # Safety
    /// The slices must not be used after `self` is dropped, and the method not be called again before that.
    pub(super) unsafe fn split(&mut self) -> (&'static mut [u8], &'static mut [u8]) {
        let size = SIZES[self.class];
        // SAFETY: the pair spans `2 * size` mapped bytes, which nobody else uses while it is out of the pool; mappings
        // last as long as the pool, which each pair holds on to, so the lifetime holds as long as the caller keeps the contract.
        unsafe {
            let second = self.base.add(size);
            (
                std::slice::from_raw_parts_mut(self.base.as_ptr(), size),
                std::slice::from_raw_parts_mut(second.as_ptr(), size),
            )
        }
    }

    /// Pays for the rings, before data is put there. False: there is no room.
    pub(super) fn charge(&mut self) -> bool {
        if self.share.is_none() {
            self.share = self.pool.borrow().budget.take(self.client, 2 * SIZES[self.class]);
        }
        self.share.is_some()
    }

    /// What is paid for them now, in bytes.
    pub(super) fn charged(&self) -> usize {
        self.share.as_ref().map_or(0, Share::bytes)
    }

    /// Notes that `bytes` were written to the second ring from `space` on, the exposed address of what the socket lent for
    /// that: see [`Self::read_back`].
    pub(super) fn wrote(&mut self, space: usize, bytes: usize) {
        let size = SIZES[self.class];
        self.head = space.wrapping_sub(self.base.as_ptr().addr() + size).wrapping_add(bytes) % size;
        self.touch(bytes);
    }

    /// Reads what was written to the second ring, beginning `back` bytes before the end of it.
    pub(super) fn read_back(&self, back: usize, into: &mut [u8]) {
        let size = SIZES[self.class];
        if back > size || into.len() > back {
            return into.fill(0); // Nobody asks for that.
        }
        let start = (self.head + size - back) % size;
        let (first, second) = into.split_at_mut(into.len().min(size - start));
        let ring = self.base.addr().get() + size;
        for (address, part) in [(ring + start, first), (ring, second)] {
            for (address, byte) in (address..).zip(part) {
                // SAFETY: the address lies inside the second ring, which lasts as long as `self`. A pointer from `base`
                // would take the ring from the slice that the socket has of it. This one goes by way of the slice through
                // which the socket's user wrote that very byte, and which was exposed then. The byte stays as it is until
                // the client has acknowledged it.
                *byte = unsafe { std::ptr::with_exposed_provenance::<u8>(address).read() };
            }
        }
    }

    /// Bytes of one ring.
    pub(super) fn size(&self) -> usize {
        SIZES[self.class]
    }

    /// Notes that `bytes` more went through one of the rings.
    pub(super) fn touch(&mut self, bytes: usize) {
        self.touched = self.touched.saturating_add(bytes);
    }

    /// The most bytes of either ring that may be in memory.
    pub(super) fn touched(&self) -> usize {
        self.touched.min(2 * SIZES[self.class])
    }

    /// Gives the pages of both rings back; they read as zeroes afterwards. Only for rings that hold nothing.
    pub(super) fn release(&mut self) {
        if self.touched > 0 {
            self.discard(0);
            self.touched = 0;
        }
        self.share = None;
    }

    /// Gives back what lies behind the first `keep` bytes of each ring.
    fn discard(&self, keep: usize) {
        let size = SIZES[self.class];
        for start in [0, size] {
            // SAFETY: the range lies inside this pair, whose content nobody needs any more. Failure costs memory only.
            unsafe {
                let at = self.base.add(start + keep);
                let _ = madvise(at.cast(), size - keep, MmapAdvise::MADV_DONTNEED);
            }
        }
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let most = WARM_PAIRS.min(self.pool.borrow().budget.limit() / 16 / (2 * WARM_BYTES));
        let warm = self.pool.borrow().free[self.class].len() < most;
        if !warm {
            self.release();
        } else if self.touched > WARM_BYTES && SIZES[self.class] > WARM_BYTES {
            self.discard(WARM_BYTES);
        }
        self.pool.borrow_mut().free[self.class].push(self.base);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// Rings of one client beside `live` others of its own.
    fn take(pool: &Rc<RefCell<Pool>>, live: usize) -> Option<Rings> {
        Pool::take(pool, Ipv4Addr::LOCALHOST.into(), (live, live))
    }

    #[test]
    fn rings_shrink_as_flows_grow_in_number_and_come_back_to_their_pool() {
        let pool = Pool::new(Budget::new(1 << 40));
        for (live, size) in [(0, 1 << 20), (31, 1 << 20), (32, 256 << 10), (511, 256 << 10), (512, 64 << 10)] {
            let mut rings = take(&pool, live).unwrap();
            let base = rings.base;
            // SAFETY: used only here, before the drop below.
            let (up, down) = unsafe { rings.split() };
            assert_eq!((up.len(), down.len()), (size, size));
            up[size - 1] = 1;
            down[0] = 2;
            drop(rings);
            assert_eq!(take(&pool, live).unwrap().base, base);
        }
    }

    #[test]
    fn a_pair_of_rings_keeps_its_memory_when_the_rest_of_its_pool_is_gone() {
        let pool = Pool::new(Budget::new(1 << 30));
        let mut rings = take(&pool, 0).unwrap();
        drop(pool);
        // SAFETY: used only here, before the drop of `rings`.
        let (up, down) = unsafe { rings.split() };
        up.fill(1);
        down.fill(2);
        assert!(up.iter().all(|byte| *byte == 1));
        drop(rings);
    }

    #[test]
    fn where_memory_is_scarce_rings_are_small_and_paid_for_only_while_in_use() {
        let pool = Pool::new(Budget::new(1 << 20));
        let mut rings: Vec<_> = (0..200).map(|live| take(&pool, live).unwrap()).collect();
        assert_eq!((rings[0].class, rings[199].class), (3, 4));
        assert_eq!(pool.borrow().budget.used(), 0);
        let charged = rings.iter_mut().map(Rings::charge).filter(|charged| *charged).count();
        assert!((64..128).contains(&charged), "{charged}");
        assert!(pool.borrow().budget.is_short());
        rings[0].release();
        assert!(rings.iter_mut().skip(charged).take(1).all(Rings::charge), "what one gave back another has");
        drop(rings);
        assert_eq!(pool.borrow().budget.used(), 0);
    }

    #[test]
    fn what_was_written_is_read_back_across_the_end_of_the_ring() {
        let pool = Pool::new(Budget::new(1 << 40));
        let mut rings = take(&pool, 0).unwrap();
        let size = rings.size();
        // SAFETY: used only here, before the drop of `rings`.
        let (_, down) = unsafe { rings.split() };
        let start = down.as_mut_ptr().expose_provenance();
        down[size - 2..].copy_from_slice(&[1, 2]);
        down[..2].copy_from_slice(&[3, 4]);
        rings.wrote(start + size - 2, 2);
        rings.wrote(start, 2);
        for (back, expected) in [(4, &[1, 2, 3, 4][..]), (3, &[2, 3]), (2, &[3, 4]), (1, &[4]), (0, &[])] {
            let mut read = vec![0; expected.len()];
            rings.read_back(back, &mut read);
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn a_released_ring_reads_as_zeroes() {
        let pool = Pool::new(Budget::new(1 << 40));
        let mut rings = take(&pool, 0).unwrap();
        // SAFETY: used only here, before the drop of `rings`.
        let (up, _) = unsafe { rings.split() };
        up[5] = 7;
        rings.touch(6);
        rings.release();
        assert_eq!(up[5], 0);
    }
}
