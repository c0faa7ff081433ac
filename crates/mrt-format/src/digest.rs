//! SHA-256 digests.

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A SHA-256 digest; displayed and parsed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Digest(pub [u8; 32]);

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest(sha2::Sha256::digest(bytes).into())
}

/// SHA-256 of bytes that come piece by piece.
#[derive(Default)]
pub struct Sha256(sha2::Sha256);

impl Sha256 {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// Names the weights of a file, whatever else it holds: SHA-256 of the digests of the arena's chunks.
pub fn arena_digest(chunks: &[Digest]) -> Digest {
    sha256(chunks.as_bytes())
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a SHA-256 digest has 64 hexadecimal digits, not {0:?}")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let bad = || ParseDigestError(text.to_owned());
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != 32 || !rest.is_empty() {
            return Err(bad());
        }
        let mut digest = Digest([0; 32]);
        for (byte, pair) in digest.0.iter_mut().zip(pairs) {
            let digit = |c: u8| char::from(c).to_digit(16).ok_or_else(bad);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        // The one-block example of FIPS 180-4.
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc").to_string(), text);
        let mut hasher = Sha256::default();
        for part in [&b"a"[..], b"", b"bc"] {
            hasher.update(part);
        }
        assert_eq!(hasher.finish(), sha256(b"abc"));
        assert_eq!(text.parse(), Ok(sha256(b"abc")));
        assert_eq!(text.to_uppercase().parse(), Ok(sha256(b"abc")));
    }

    #[test]
    fn other_texts_are_refused() {
        let digits = sha256(b"").to_string();
        for text in [
            "",
            "00",
            &digits[1..],
            &format!("{digits}0"),
            &digits.replace('e', "g"),
            &digits.replace('e', "+"),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
