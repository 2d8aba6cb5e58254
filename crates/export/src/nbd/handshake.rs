//! The handshake's I/O around [`super::negotiate`], under one deadline for the whole of it.

use std::io;
use std::time::Instant;

use super::limits::{OPTION_LENGTH_MAX, OPTION_SKIP_MAX, OPTIONS_MAX};
use super::negotiate::{Agreement, Decision, Negotiation};
use super::option::encode_reply;
use super::socket::{Stream, is_timeout};
use super::wire::{
    NBD_OPT_EXPORT_NAME, NBD_REP_ERR_TOO_BIG, OPTION_HEADER_LEN, OptionHeader, greeting,
};
use crate::exports::Exports;

/// Bytes of an answer sent at a time.
const SEND_PIECE_BYTES: usize = 4096;

/// Why a handshake led to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The client ended it, as it may.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client broke the protocol.
    #[error("the client does not speak the protocol: {0}")]
    Protocol(&'static str),
    /// It took too long.
    #[error("the handshake took too long")]
    TimedOut,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Failed(#[from] io::Error),
}

struct Wire<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl Wire<'_> {
    fn fill(&self, mut buf: &mut [u8]) -> Result<(), HandshakeError> {
        while !buf.is_empty() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HandshakeError::TimedOut);
            }
            self.stream.set_receive_timeout(left)?;
            match self.stream.receive(buf) {
                Ok(0) => return Err(HandshakeError::Aborted),
                Ok(n) => buf = &mut buf[n..],
                Err(error) if is_timeout(&error) => return Err(HandshakeError::TimedOut),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send(&self, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        while !bytes.is_empty() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HandshakeError::TimedOut);
            }
            self.stream.set_send_timeout(left)?;
            // The timeout begins anew with each buffer that the kernel fills: one call, one buffer.
            let piece = &bytes[..bytes.len().min(SEND_PIECE_BYTES)];
            match self.stream.send(piece) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) if is_timeout(&error) => return Err(HandshakeError::TimedOut),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn skip(&self, length: u32) -> Result<(), HandshakeError> {
        let mut scratch = [0; 4096];
        let mut left = length as usize;
        while left > 0 {
            let n = left.min(scratch.len());
            self.fill(&mut scratch[..n])?;
            left -= n;
        }
        Ok(())
    }
}

/// Greets the client and answers its options until it goes on to transmission; `entered` is called just before the
/// client is told so.
pub(super) fn handshake(
    stream: &Stream,
    exports: &dyn Exports,
    deadline: Instant,
    entered: impl Fn(&Agreement),
) -> Result<Agreement, HandshakeError> {
    let wire = Wire { stream, deadline };
    wire.send(&greeting())?;
    let mut flags = [0; 4];
    wire.fill(&mut flags)?;
    let mut negotiation = Negotiation::begin(u32::from_be_bytes(flags))
        .ok_or(HandshakeError::Protocol("unknown or missing client flags"))?;

    let mut out = Vec::new();
    let mut data = Vec::new();
    for _ in 0..OPTIONS_MAX {
        let mut head = [0; OPTION_HEADER_LEN];
        wire.fill(&mut head)?;
        let header =
            OptionHeader::decode(&head).ok_or(HandshakeError::Protocol("not an option"))?;
        out.clear();
        if header.length > OPTION_LENGTH_MAX {
            if header.length > OPTION_SKIP_MAX || header.option == NBD_OPT_EXPORT_NAME {
                return Err(HandshakeError::Protocol("an option is too long"));
            }
            wire.skip(header.length)?;
            encode_reply(
                &mut out,
                header.option,
                NBD_REP_ERR_TOO_BIG,
                &[b"option too long"],
            );
            wire.send(&out)?;
            continue;
        }
        data.resize(header.length as usize, 0);
        wire.fill(&mut data)?;
        let decision = negotiation.answer(exports, header.option, &data, &mut out);
        if let Decision::Transmit(agreement) = &decision {
            // Before the client learns of it: whoever disconnects an export's clients must find this one.
            entered(agreement);
        }
        if !out.is_empty() {
            wire.send(&out)?;
        }
        match decision {
            Decision::Continue => {}
            Decision::Transmit(agreement) => return Ok(agreement),
            Decision::Close => return Err(HandshakeError::Aborted),
        }
    }
    Err(HandshakeError::Protocol("too many options"))
}
