//! Bytes of a backbone's working memory: what its compute threads need at all, and what the resident set that needs most
//! makes them need beside that.

use std::sync::Mutex;

use super::{Reservation, sync};

#[derive(Debug)]
pub(super) struct Scratch {
    base: usize,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    reservation: Reservation,
    /// Bytes beside the base that resident sets need; of those that need any.
    needs: Vec<usize>,
}

impl Held {
    fn more(&self) -> usize {
        self.needs.iter().copied().max().unwrap_or(0)
    }
}

impl Scratch {
    pub(super) fn new(reservation: Reservation) -> Self {
        Self { base: reservation.bytes(), held: Mutex::new(Held { reservation, needs: Vec::new() }) }
    }

    /// Bytes that are needed whatever sets there are.
    pub(super) fn base(&self) -> usize {
        self.base
    }

    /// What comes back when it goes.
    pub(super) fn bytes(&self) -> usize {
        sync::lock(&self.held).reservation.bytes()
    }

    /// Notes that a set needs `need` bytes beside the base, with the help of bytes reserved for that.
    ///
    /// # Errors
    /// The bytes that are missing; what was reserved is kept until [`Scratch::trim`].
    pub(super) fn grow(&self, need: usize, reserved: Option<Reservation>) -> Result<(), usize> {
        let mut held = sync::lock(&self.held);
        if let Some(reserved) = reserved {
            held.reservation.absorb(reserved);
        }
        match (self.base + need).saturating_sub(held.reservation.bytes()) {
            0 if need == 0 => Ok(()),
            0 => {
                held.needs.push(need);
                Ok(())
            }
            missing => Err(missing),
        }
    }

    /// Whether the need of a set that leaves memory is all that the scratch is grown for.
    pub(super) fn forget(&self, need: usize) -> bool {
        let mut held = sync::lock(&self.held);
        let Some(at) = held.needs.iter().position(|&other| other == need) else { return false };
        held.needs.swap_remove(at);
        held.more() < need
    }

    /// Gives back what no set needs.
    pub(super) fn trim(&self) {
        let mut held = sync::lock(&self.held);
        let bytes = self.base + held.more();
        // A size at most the present one always fits.
        let _ = bytes < held.reservation.bytes() && held.reservation.resize(bytes);
    }
}
