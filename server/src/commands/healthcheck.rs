//! `butterflyvit healthcheck`: for containers without a shell.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;

use crate::config::HealthcheckArgs;

/// Exit code 0 when the server answers that it is ready, 1 otherwise.
pub fn run(args: &HealthcheckArgs) -> ExitCode {
    match check(args) {
        Ok(status) if status.contains(" 200 ") => ExitCode::SUCCESS,
        Ok(status) => {
            eprintln!("butterflyvit: not ready: {status}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("butterflyvit: {}: {error}", args.listen);
            ExitCode::FAILURE
        }
    }
}

/// The status line of the readiness probe.
fn check(args: &HealthcheckArgs) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&reachable(args.listen), args.timeout)?;
    stream.set_read_timeout(Some(args.timeout))?;
    stream.set_write_timeout(Some(args.timeout))?;
    write!(stream, "GET /v2/health/ready HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", args.listen)?;
    let mut answer = Vec::new();
    // A status line is short; whatever else answers on this port may not be.
    stream.take(4096).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(format!("{} ", answer.lines().next().unwrap_or_default()))
}

/// A server that listens on every address is reached on the loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
