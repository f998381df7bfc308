//! From sockets to requests.

pub mod connection;
pub mod tls;
