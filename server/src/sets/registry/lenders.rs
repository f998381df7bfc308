//! Which sets lend their experts, and which borrow them. A borrower names its lender by digest; the lender stays
//! registered, and in memory, as long as a borrower needs it.

use std::collections::{BTreeSet, HashMap};

use model_core::artifact::Digest;

use super::{Key, SetError, Slot, Source, State};
use crate::sets::descriptor::SetDescriptor;

/// Borrowers that a refusal names.
const MOST_NAMED: usize = 5;

/// Registered sets by what ties them to others.
#[derive(Debug, Default)]
pub(super) struct Lenders {
    /// Sets with experts of their own.
    owners: HashMap<Digest, BTreeSet<Key>>,
    /// Sets that borrow the experts of the one with that digest.
    borrowers: HashMap<Digest, BTreeSet<Key>>,
}

impl Lenders {
    /// Where a set stands: among those with experts of their own, or among the borrowers of another.
    fn place(&mut self, set: &SetDescriptor) -> (&mut HashMap<Digest, BTreeSet<Key>>, Digest) {
        match set.lender {
            None => (&mut self.owners, set.digest),
            Some(lender) => (&mut self.borrowers, lender),
        }
    }

    /// Puts a set in the place of an old one of the same name and version.
    pub(super) fn replace(&mut self, old: Option<&SetDescriptor>, new: &SetDescriptor) {
        old.into_iter().for_each(|old| self.forget(old));
        let (place, digest) = self.place(new);
        place.entry(digest).or_default().insert(Key::of(new));
    }

    pub(super) fn forget(&mut self, set: &SetDescriptor) {
        let (place, digest) = self.place(set);
        if let Some(keys) = place.get_mut(&digest) {
            keys.remove(&Key::of(set));
            if keys.is_empty() {
                place.remove(&digest);
            }
        }
    }

    /// Whether sets may leave together.
    ///
    /// # Errors
    /// [`SetError::Conflict`] naming those that stay and borrow experts which would be gone.
    pub(super) fn check_leave(&self, leaving: &[&SetDescriptor]) -> Result<(), SetError> {
        let leaves = |key: &Key| leaving.iter().any(|set| set.version == key.version && set.name == key.name);
        for set in leaving.iter().filter(|set| set.lender.is_none()) {
            let Some(borrowers) = self.borrowers.get(&set.digest) else { continue };
            // The same experts may be there under another name as well.
            let stays = self.owners.get(&set.digest).is_some_and(|owners| owners.iter().any(|key| !leaves(key)));
            let left: Vec<&Key> = borrowers.iter().filter(|key| !leaves(key)).collect();
            if !stays && !left.is_empty() {
                let named: Vec<_> = left.iter().take(MOST_NAMED).map(|key| format!("`{}`", key.place())).collect();
                let more = match left.len().saturating_sub(MOST_NAMED) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                let (set, named) = (Key::of(set).place(), named.join(", "));
                return Err(SetError::Conflict(format!("the experts of `{set}` are borrowed by {named}{more}")));
            }
        }
        Ok(())
    }
}

impl Key {
    /// Name and version in one word.
    fn place(&self) -> String {
        format!("{}/{}", self.name, self.version)
    }
}

impl<S: Source> State<S> {
    /// A set with experts of its own and that digest; one that is in memory if there are several.
    pub(super) fn lender(&self, digest: &Digest) -> Option<(&Key, &Slot<S>)> {
        let keys = self.lenders.owners.get(digest)?.iter();
        let mut slots = keys.filter_map(|key| Some((key, self.names.get(&key.name)?.versions.get(&key.version)?)));
        let first = slots.next()?;
        let in_memory = |slot: &Slot<S>| slot.resident.is_some() || slot.alive.strong_count() > 0;
        Some(if in_memory(first.1) { first } else { slots.find(|(_, slot)| in_memory(slot)).unwrap_or(first) })
    }

    /// Whether a set may take its place: its backbone and its lender are here, and nobody borrows what it replaces.
    pub(super) fn check_place(&self, set: &SetDescriptor) -> Result<(), SetError> {
        if !self.backbones.contains_key(&set.backbone) {
            return Err(SetError::NoBackbone { name: set.name.clone(), backbone: set.backbone });
        }
        if let Some(lender) = set.lender {
            let missing = || SetError::NoLender { name: set.name.clone(), lender };
            let (key, slot) = self.lender(&lender).ok_or_else(missing)?;
            let reason = match &*slot.descriptor {
                _ if *key == Key::of(set) => "it is what this set replaces",
                other if other.backbone != set.backbone => "it is bound to another backbone",
                other if other.experts != set.experts => "its experts have another shape",
                _ => "",
            };
            if !reason.is_empty() {
                let (name, lender, reason) = (set.name.clone(), key.place(), reason.to_owned());
                return Err(SetError::BadLender { name, lender, reason });
            }
        }
        let old = self.names.get(&set.name).and_then(|name| name.versions.get(&set.version));
        match old.map(|slot| &*slot.descriptor).filter(|old| old.digest != set.digest) {
            Some(old) => self.lenders.check_leave(&[old]),
            None => Ok(()),
        }
    }
}
