//! One picture from a camera: a connection of its own, at most one challenge and a few redirects on the same host.

use anyhow::{Context, anyhow, bail, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::task::AbortOnDropHandle;

use super::authentication::Challenge;
use super::file::{Address, CameraConfig};
use super::secrets::{Credentials, no_tls, trust};
use crate::admission::BodyPermit;

/// Redirects and challenges that one picture may take.
const MOST_STEPS: usize = 4;
/// Most bytes of the head of a camera's answer.
const MOST_HEAD_BYTES: usize = 32 << 10;

/// Fetches the pictures of one camera.
pub struct Fetcher {
    address: Address,
    credentials: Option<Credentials>,
    tls: Option<TlsConnector>,
    max_bytes: usize,
    /// The camera's last challenge; it need not be asked again for the next picture.
    challenge: Option<Challenge>,
}

impl Fetcher {
    /// # Errors
    /// When there are no certificates to trust.
    pub fn new(config: &CameraConfig) -> anyhow::Result<Self> {
        let tls = config.address.is_tls.then(|| trust(config.ca.as_deref()).map(TlsConnector::from)).transpose()?;
        Ok(Self {
            address: config.address.clone(),
            credentials: config.credentials.clone(),
            tls,
            max_bytes: config.max_bytes,
            challenge: None,
        })
    }

    /// The next picture, whose bytes count in `permit` as they come.
    ///
    /// # Errors
    /// A sentence for whoever looks after the camera.
    pub async fn fetch(&mut self, permit: &mut BodyPermit) -> anyhow::Result<Bytes> {
        let mut address = self.address.clone();
        let mut was_challenged = false;
        for _ in 0..MOST_STEPS {
            let (response, _connection) = self.ask(&address).await?;
            match response.status() {
                StatusCode::OK => return self.read(response, permit).await,
                StatusCode::UNAUTHORIZED => {
                    ensure!(self.credentials.is_some(), "the camera wants a user and a password");
                    ensure!(!was_challenged, "the camera does not accept this user and password");
                    was_challenged = true;
                    let values = response.headers().get_all(header::WWW_AUTHENTICATE).iter();
                    self.challenge = Challenge::of(values.filter_map(|value| value.to_str().ok()));
                    ensure!(self.challenge.is_some(), "the camera wants neither Basic nor Digest authentication");
                }
                status if status.is_redirection() => {
                    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
                    let location = location.context("the camera redirects to nowhere")?;
                    let next = address.redirected(location);
                    address = next.context("the camera redirects to another host, which is not followed")?;
                }
                status => bail!("the camera answers {status}"),
            }
        }
        bail!("the camera redirects too often")
    }

    async fn ask(&mut self, address: &Address) -> anyhow::Result<(Response<Incoming>, AbortOnDropHandle<()>)> {
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let mut request = Request::get(&address.path)
            .header(header::HOST, address.authority())
            .header(header::USER_AGENT, concat!("butterflyvit/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, "image/*")
            .header(header::CONNECTION, "close");
        if let (Some(challenge), Some(credentials)) = (&mut self.challenge, &self.credentials) {
            let mut value = HeaderValue::from_str(&challenge.answer(credentials, &address.path))
                .map_err(|_| anyhow!("the camera's challenge cannot be answered"))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request.body(Empty::new()).map_err(|_| anyhow!("the camera redirects to what is no address"))?;
        match &self.tls {
            Some(tls) => {
                let name = ServerName::try_from(address.host.clone()).map_err(|_| anyhow!("`url` names no host"))?;
                let stream = tls.connect(name, stream).await.map_err(|error| anyhow!(no_tls(&error)))?;
                send(stream, request).await
            }
            None => send(stream, request).await,
        }
    }

    async fn read(&self, response: Response<Incoming>, permit: &mut BodyPermit) -> anyhow::Result<Bytes> {
        check_type(response.headers())?;
        let most = self.max_bytes;
        let too_large = || anyhow!("the picture has more than the {most} bytes of `max_bytes`");
        let length = header_text(response.headers(), header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        ensure!(length.is_none_or(|length| length <= most as u64), too_large());
        let mut body = response.into_body();
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.context("the picture breaks off")?.into_data() else { continue };
            ensure!(bytes.len() + data.len() <= most, too_large());
            permit.hold(bytes.len() + data.len())?;
            bytes.extend_from_slice(&data);
        }
        ensure!(!bytes.is_empty(), "the camera answers with no bytes");
        Ok(bytes.freeze())
    }
}

fn header_text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Says what comes instead of a picture. Some cameras name no type, or a wrong one.
fn check_type(headers: &HeaderMap) -> anyhow::Result<()> {
    let media_type = header_text(headers, header::CONTENT_TYPE).unwrap_or_default().to_ascii_lowercase();
    ensure!(!media_type.starts_with("multipart/"), "this is a stream of pictures; `url` is to name a single one");
    ensure!(!media_type.starts_with("video/"), "this is a video; `url` is to name a single picture");
    ensure!(!media_type.starts_with("text/"), "the camera sends a page or a text in place of a picture");
    Ok(())
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Empty<Bytes>>,
) -> anyhow::Result<(Response<Incoming>, AbortOnDropHandle<()>)> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MOST_HEAD_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .context("the camera speaks no HTTP")?;
    let connection = tokio::spawn(async move {
        // Whoever waits for the answer gets the error.
        let _ = connection.await;
    });
    let connection = AbortOnDropHandle::new(connection);
    let response = sender.send_request(request).await.context("the camera gives no answer in HTTP")?;
    Ok((response, connection))
}
