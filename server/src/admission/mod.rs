//! Bounds on requests, images and body bytes. A holder gives its share back when it is done. Fullness is
//! a normal answer (429), decided before any work is spent.

mod images;
mod shares;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::keys::{Caller, OverRate};
use crate::lifecycle::{Lifecycle, NotServing};
pub use images::{ImageLimits, ImagePermit, Images, NoPlace};
pub use shares::{Ceilings, Client, Resource, Share, Shares};

/// Semaphores count this many bytes as one, so that large budgets fit their counters on 32-bit machines.
const GRAIN: usize = 1024;

/// Why a request, its body or its images were not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The server is starting or stopping.
    #[error(transparent)]
    NotServing(#[from] NotServing),
    /// Its key has sent too many images.
    #[error(transparent)]
    OverRate(#[from] OverRate),
    /// As many requests as allowed are being worked on.
    #[error("too many requests are being worked on; try again later")]
    Requests,
    /// Bodies take as much memory as they may.
    #[error("too many bytes of requests are being received; try again later")]
    Bodies,
    /// Its body takes more memory than all bodies may.
    #[error("the request's body takes more than the {0} bytes for all bodies")]
    LargeBody(usize),
    /// There are no places for its images.
    #[error(transparent)]
    Images(#[from] NoPlace),
    /// Its client has as much as one client may have.
    #[error("this address has as many {} at once as one address may have; try again later", .0.as_str().replace('_', " "))]
    Share(Resource),
}

#[derive(Debug)]
pub struct Admission {
    /// Requests are let in only while the server is ready.
    pub lifecycle: Lifecycle,
    /// What each client has.
    pub shares: Shares,
    requests: Arc<Semaphore>,
    body_bytes: Arc<Semaphore>,
    /// In grains.
    body_capacity: usize,
    images: Images,
}

/// A request that was let in, until dropped.
#[derive(Debug)]
pub struct Entry {
    caller: Caller,
    client: Client,
    /// Images that count against the caller's rate so far.
    charged: usize,
    images: Images,
    shares: Shares,
    _request: OwnedSemaphorePermit,
    _share: Share,
}

impl Entry {
    /// Counts the request's images against its caller's rate, less those that are counted already.
    ///
    /// # Errors
    /// [`Refused::OverRate`] when the rate is used up.
    pub fn charge(&mut self, images: usize) -> Result<(), Refused> {
        self.caller.charge(images.saturating_sub(self.charged))?;
        self.charged = self.charged.max(images);
        Ok(())
    }

    /// Places for `count` images of `set`, each of `bytes_each` preprocessed bytes: all of them or none. When they do
    /// not fit at first, `make_room` is called, which may drop places that are not needed any more.
    ///
    /// # Errors
    /// [`Refused::Images`] when there is no room, [`Refused::Share`] when the client has too many already.
    pub fn images(
        &self,
        set: &str,
        count: usize,
        bytes_each: usize,
        make_room: impl Fn(),
    ) -> Result<Vec<ImagePermit>, Refused> {
        let take = || self.shares.take(self.client, Resource::Images, count);
        let again = || {
            make_room();
            take()
        };
        let share = take().or_else(again).ok_or_else(|| self.shares.refused(Resource::Images))?;
        let share = Arc::new(share);
        let permits = self.images.admit(set, count, bytes_each, &make_room)?;
        Ok(permits.into_iter().map(|permit| permit.with(Arc::clone(&share))).collect())
    }
}

/// Body bytes in memory.
#[derive(Debug)]
pub struct BodyPermit {
    source: Arc<Semaphore>,
    /// In grains.
    capacity: usize,
    held: OwnedSemaphorePermit,
    share: Share,
}

impl Admission {
    /// Bounds on requests, on bytes of bodies and on images, and each client's share of them.
    pub fn new(requests: usize, body_bytes: usize, images: ImageLimits, shares: Shares) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        let body_capacity = body_bytes / GRAIN;
        Self {
            lifecycle: Lifecycle::default(),
            shares,
            requests: semaphore(requests),
            body_bytes: semaphore(body_capacity),
            body_capacity,
            images: Images::new(images),
        }
    }

    /// Lets a request in, before any work is spent on it. It counts as one image of its caller until
    /// [`Entry::charge`] is told how many it has.
    ///
    /// # Errors
    /// [`Refused`], but for [`Refused::Images`] and [`Refused::Bodies`].
    pub fn enter(&self, caller: &Caller, client: Client) -> Result<Entry, Refused> {
        caller.charge(1)?;
        self.lifecycle.check()?;
        let share = self.shares.take(client, Resource::Requests, 1);
        let share = share.ok_or_else(|| self.shares.refused(Resource::Requests))?;
        let request = take(&self.requests, 1).ok_or(Refused::Requests)?;
        Ok(Entry {
            caller: caller.clone(),
            client,
            charged: 1,
            images: self.images.clone(),
            shares: self.shares.clone(),
            _request: request,
            _share: share,
        })
    }

    /// Images and preprocessed bytes on their way.
    pub fn images_held(&self) -> (usize, usize) {
        self.images.held()
    }

    /// A permit for a client's body, which holds nothing yet: bytes are counted when the client has sent them, so that
    /// announcing a large body holds nothing.
    ///
    /// # Errors
    /// Never in practice: zero bytes always fit.
    pub fn body(&self, client: Client) -> Result<BodyPermit, Refused> {
        let held = take(&self.body_bytes, 0).ok_or(Refused::Bodies)?;
        let share = self.shares.take(client, Resource::BodyBytes, 0).ok_or(Refused::Bodies)?;
        let capacity = self.body_capacity.min(self.shares.ceiling(Resource::BodyBytes).div_ceil(GRAIN));
        Ok(BodyPermit { source: Arc::clone(&self.body_bytes), capacity, held, share })
    }
}

impl BodyPermit {
    /// Counts `bytes` from now on, more or fewer than before.
    ///
    /// # Errors
    /// [`Refused::Bodies`] or [`Refused::Share`] when they do not fit now, [`Refused::LargeBody`] when they never will.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Refused> {
        let (wanted, held) = (bytes.div_ceil(GRAIN), self.held.num_permits());
        if wanted > self.capacity {
            return Err(Refused::LargeBody(self.capacity * GRAIN));
        }
        let more = take(&self.source, wanted.saturating_sub(held)).ok_or(Refused::Bodies)?;
        if !self.share.resize(bytes) {
            return Err(self.share.refused());
        }
        self.held.merge(more);
        drop(self.held.split(held.saturating_sub(wanted)));
        Ok(())
    }
}

fn take(semaphore: &Arc<Semaphore>, count: usize) -> Option<OwnedSemaphorePermit> {
    Arc::clone(semaphore).try_acquire_many_owned(u32::try_from(count).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_count_what_has_arrived() {
        let images = ImageLimits { images: 1, bytes: 1, images_per_set: 1, images_when_busy: 1 };
        let admission = Admission::new(1, 2 * GRAIN, images, Shares::new(Ceilings::NONE, None));
        let mut first = admission.body(Client::UNKNOWN).unwrap();
        assert_eq!(first.hold(1), Ok(()));
        assert_eq!(first.hold(GRAIN), Ok(()));
        let mut second = admission.body(Client::UNKNOWN).unwrap();
        assert_eq!(second.hold(GRAIN), Ok(()));
        assert_eq!(first.hold(GRAIN + 1), Err(Refused::Bodies));
        assert_eq!(first.hold(2 * GRAIN + 1), Err(Refused::LargeBody(2 * GRAIN)), "alone, too");
        assert_eq!(second.hold(0), Ok(()));
        assert_eq!(first.hold(GRAIN + 1), Ok(()));
        drop(second);
    }
}
