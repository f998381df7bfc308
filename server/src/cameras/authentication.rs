//! What a camera that wants to know who asks is told: RFC 7617 (Basic) and RFC 7616 (Digest, with MD5 and SHA-256).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_auth::{ChallengeRef, parse_challenges};
use md5::Md5;
use md5::digest::Digest;
use sha2::Sha256;

use super::secrets::Credentials;

/// Most characters of what a camera sends and gets back.
const MOST_CHARACTERS: usize = 512;

/// How a camera wants to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Digest(DigestChallenge),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestChallenge {
    realm: String,
    nonce: String,
    opaque: Option<String>,
    /// As the camera writes it; absent is MD5.
    algorithm: Option<String>,
    is_sha256: bool,
    is_session: bool,
    has_qop: bool,
    /// Requests made with this nonce so far.
    count: u32,
}

impl Challenge {
    /// The best one of the values of `WWW-Authenticate` that can be met.
    pub fn of<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut best = None;
        for header in headers.filter(|header| header.len() <= 8 * MOST_CHARACTERS) {
            for challenge in parse_challenges(header).unwrap_or_default() {
                if challenge.scheme.eq_ignore_ascii_case("digest") {
                    match (DigestChallenge::of(&challenge), &best) {
                        (Some(digest), Some(Self::Digest(known))) if known.is_sha256 || !digest.is_sha256 => {}
                        (Some(digest), _) => best = Some(Self::Digest(digest)),
                        (None, _) => {}
                    }
                } else if challenge.scheme.eq_ignore_ascii_case("basic") && best.is_none() {
                    best = Some(Self::Basic);
                }
            }
        }
        best
    }

    /// The value of `Authorization` for the next GET of `path`.
    pub fn answer(&mut self, credentials: &Credentials, path: &str) -> String {
        match self {
            Self::Basic => {
                format!("Basic {}", STANDARD.encode(format!("{}:{}", credentials.user, credentials.password)))
            }
            Self::Digest(digest) => {
                let mut bytes = [0; 12];
                // Without it a camera could replay, which gains it nothing that it does not know.
                let _ = getrandom::fill(&mut bytes);
                digest.answer(credentials, path, &hex(&bytes))
            }
        }
    }
}

impl DigestChallenge {
    fn of(challenge: &ChallengeRef<'_>) -> Option<Self> {
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let algorithm = parameter("algorithm");
        let (is_sha256, is_session) = match algorithm.as_deref().unwrap_or("MD5").to_ascii_lowercase().as_str() {
            "md5" => (false, false),
            "md5-sess" => (false, true),
            "sha-256" => (true, false),
            "sha-256-sess" => (true, true),
            _ => return None,
        };
        let qop = parameter("qop");
        let has_auth = qop.as_ref().map(|qop| qop.split(',').any(|word| word.trim().eq_ignore_ascii_case("auth")));
        let (realm, nonce, opaque) = (parameter("realm")?, parameter("nonce")?, parameter("opaque"));
        let is_long = |text: &String| text.len() > MOST_CHARACTERS;
        if has_auth == Some(false) || is_long(&realm) || is_long(&nonce) || opaque.as_ref().is_some_and(is_long) {
            return None;
        }
        Some(Self { realm, nonce, opaque, algorithm, is_sha256, is_session, has_qop: has_auth.is_some(), count: 0 })
    }

    fn hash(&self, text: &str) -> String {
        if self.is_sha256 { hex(&Sha256::digest(text)) } else { hex(&Md5::digest(text)) }
    }

    fn answer(&mut self, Credentials { user, password }: &Credentials, path: &str, cnonce: &str) -> String {
        self.count = self.count.saturating_add(1);
        let Self { realm, nonce, count, .. } = &*self;
        let mut secret = self.hash(&format!("{user}:{realm}:{password}"));
        if self.is_session {
            secret = self.hash(&format!("{secret}:{nonce}:{cnonce}"));
        }
        let what = self.hash(&format!("GET:{path}"));
        let response = if self.has_qop {
            self.hash(&format!("{secret}:{nonce}:{count:08x}:{cnonce}:auth:{what}"))
        } else {
            self.hash(&format!("{secret}:{nonce}:{what}"))
        };
        let mut text = format!(
            "Digest username={}, realm={}, nonce={}, uri={}, response=\"{response}\"",
            quoted(user),
            quoted(realm),
            quoted(nonce),
            quoted(path)
        );
        if let Some(algorithm) = &self.algorithm {
            text += &format!(", algorithm={algorithm}");
        }
        if let Some(opaque) = &self.opaque {
            text += &format!(", opaque={}", quoted(opaque));
        }
        if self.has_qop {
            text += &format!(", qop=auth, nc={count:08x}, cnonce=\"{cnonce}\"");
        } else if self.is_session {
            text += &format!(", cnonce=\"{cnonce}\"");
        }
        text
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of RFC 7616, section 3.9.1.
    #[test]
    fn digests_are_those_of_the_standard() {
        let parameters = r#"realm="http-auth@example.org", qop="auth, auth-int", nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS""#;
        let credentials = Credentials { user: "Mufasa".into(), password: "Circle of Life".into() };
        let cnonce = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ";
        for (algorithm, response) in [
            ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
            ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
        ] {
            let header = format!("Digest {parameters}, algorithm={algorithm}");
            let Some(Challenge::Digest(mut challenge)) = Challenge::of([header.as_str()].into_iter()) else { panic!() };
            let answer = challenge.answer(&credentials, "/dir/index.html", cnonce);
            assert!(answer.contains(&format!("response=\"{response}\"")), "{answer}");
            assert!(answer.contains("nc=00000001") && answer.contains("qop=auth"), "{answer}");
            assert!(challenge.answer(&credentials, "/", cnonce).contains("nc=00000002"));
        }
    }

    #[test]
    fn the_best_challenge_that_can_be_met_is_taken() {
        let of = |headers: &[&str]| Challenge::of(headers.iter().copied());
        assert_eq!(of(&["Basic realm=\"cam\""]), Some(Challenge::Basic));
        let md5 = "Digest realm=\"a\", nonce=\"b\"";
        assert!(matches!(of(&["Basic realm=\"cam\"", md5]), Some(Challenge::Digest(_))));
        let sha = format!("{md5}, algorithm=SHA-256");
        for headers in [[md5, &sha], [&sha, md5]] {
            assert!(matches!(of(&headers), Some(Challenge::Digest(digest)) if digest.is_sha256));
        }
        assert_eq!(of(&["Digest realm=\"a\", nonce=\"b\", qop=\"auth-int\""]), None);
        assert_eq!(of(&["Digest realm=\"a\", nonce=\"b\", algorithm=SHA-512-256", "Negotiate"]), None);
        assert_eq!(of(&["", ",,,", "Digest", "\"", &"x".repeat(100_000)]), None);
    }
}
