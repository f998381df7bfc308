//! What one client may take of each limit, so that no client takes everything. Clients are told apart by address: all
//! clients behind a proxy are one.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::IntCounterVec;

use super::Refused;

/// A client: an IPv4 address, or an IPv6 network of 64 bits, in which one machine takes as many addresses as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Client(IpAddr);

impl Client {
    /// Stands for a request that came over no connection.
    pub const UNKNOWN: Self = Self(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
}

impl From<IpAddr> for Client {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
            }
            v4 => Self(v4),
        }
    }
}

/// What a client has a share of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Connections,
    /// Requests being worked on.
    Requests,
    /// Images from admission to answer.
    Images,
    BodyBytes,
}

impl Resource {
    pub const ALL: [Self; 4] = [Self::Connections, Self::Requests, Self::Images, Self::BodyBytes];

    /// The name of the resource in labels of metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Requests => "requests",
            Self::Images => "images",
            Self::BodyBytes => "body_bytes",
        }
    }
}

/// Most that one client may hold of each [`Resource`], in the order of [`Resource::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceilings(pub [usize; Resource::ALL.len()]);

impl Ceilings {
    /// One client may take everything.
    pub const NONE: Self = Self([usize::MAX; Resource::ALL.len()]);
}

/// What clients hold; clones share it. Only clients that hold something are remembered.
#[derive(Debug, Clone)]
pub struct Shares(Arc<Books>);

#[derive(Debug)]
struct Books {
    ceilings: Ceilings,
    held: Mutex<HashMap<Client, [usize; Resource::ALL.len()]>>,
    refusals: Option<IntCounterVec>,
}

/// What a client holds of a resource, until dropped.
#[derive(Debug)]
pub struct Share {
    books: Arc<Books>,
    client: Client,
    resource: Resource,
    count: usize,
}

impl Shares {
    /// Nobody holds anything. `refusals` counts by resource.
    pub fn new(ceilings: Ceilings, refusals: Option<IntCounterVec>) -> Self {
        Self(Arc::new(Books { ceilings, held: Mutex::default(), refusals }))
    }

    /// Most that one client may hold.
    pub fn ceiling(&self, resource: Resource) -> usize {
        self.0.ceilings.0[resource as usize]
    }

    /// Counts that a client was refused a resource, and says so.
    pub fn refused(&self, resource: Resource) -> Refused {
        self.0.refused(resource)
    }

    /// So much more of a resource for a client, or `None` when that would be above its ceiling.
    pub fn take(&self, client: Client, resource: Resource, count: usize) -> Option<Share> {
        let mut share = Share { books: Arc::clone(&self.0), client, resource, count: 0 };
        share.resize(count).then_some(share)
    }
}

impl Share {
    /// Holds `count` from now on, more or fewer than before. `false` when that would be above the ceiling; the share then
    /// stays as it was.
    pub fn resize(&mut self, count: usize) -> bool {
        let most = self.books.ceilings.0[self.resource as usize];
        let mut clients = self.books.clients();
        let held = clients.entry(self.client).or_default();
        let others = held[self.resource as usize] - self.count;
        let fits = count <= self.count || others.checked_add(count).is_some_and(|all| all <= most);
        if fits {
            held[self.resource as usize] = others + count;
            self.count = count;
        }
        if held.iter().all(|&count| count == 0) {
            clients.remove(&self.client);
        }
        fits
    }

    /// Counts that a client was refused more, and says so.
    pub fn refused(&self) -> Refused {
        self.books.refused(self.resource)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.resize(0);
    }
}

impl Books {
    fn refused(&self, resource: Resource) -> Refused {
        if let Some(refusals) = &self.refusals {
            refusals.with_label_values(&[resource.as_str()]).inc();
        }
        Refused::Share(resource)
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<Client, [usize; Resource::ALL.len()]>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(address: &str) -> Client {
        Client::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn a_client_holds_no_more_than_its_ceiling_and_leaves_no_trace() {
        let shares = Shares::new(Ceilings([3, 1, usize::MAX, 10]), None);
        let (one, other) = (client("127.0.0.1"), client("127.0.0.2"));
        let first = shares.take(one, Resource::Connections, 2).unwrap();
        assert!(shares.take(one, Resource::Connections, 2).is_none());
        let third = shares.take(one, Resource::Connections, 1).unwrap();
        assert!(shares.take(one, Resource::Connections, 1).is_none());
        let request = shares.take(one, Resource::Requests, 1).expect("each resource has a ceiling of its own");
        let neighbour = shares.take(other, Resource::Connections, 3).expect("so has each client");
        drop(first);
        let mut body = shares.take(one, Resource::BodyBytes, 0).unwrap();
        let mut second_body = shares.take(one, Resource::BodyBytes, 4).unwrap();
        assert!(body.resize(6) && !body.resize(7) && body.resize(1));
        assert!(second_body.resize(9) && !body.resize(2) && body.resize(0) && second_body.resize(10));
        assert!(shares.take(one, Resource::Images, usize::MAX - 1).is_some(), "none for images");
        drop((third, request, neighbour, body, second_body));
        assert!(shares.0.clients().is_empty());
    }

    #[test]
    fn whoever_has_an_ipv6_network_is_one_client() {
        assert_eq!(client("2001:db8:1:2:3::4"), client("2001:db8:1:2:ffff::"));
        assert_ne!(client("2001:db8:1:2::1"), client("2001:db8:1:3::1"));
        assert_eq!(client("::ffff:192.0.2.7"), client("192.0.2.7"));
        assert_ne!(client("192.0.2.7"), client("192.0.2.8"));
        assert_ne!(client("::1"), client("127.0.0.1"));
    }
}
