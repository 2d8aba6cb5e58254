//! The NBD codec: a negotiation of any options, and requests of any fields.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use tidemark_export::{
    AllocationExtent, BlockDevice, Durability, ExportRegistry, ZeroFlags,
    errno::NbdError,
    nbd::{
        limits::{OPTION_LENGTH_MAX, REQUEST_PAYLOAD_MAX},
        negotiate::{Decision, Negotiation},
        reply,
        request::{Command, RequestHeader, Terms, check},
        wire::{
            IHAVEOPT, NBD_OPT_EXPORT_NAME, NBD_OPT_LIST, OPTION_HEADER_LEN, OPTION_REPLY_MAGIC,
            OptionHeader, REQUEST_LEN, STRUCTURED_REPLY_MAGIC,
        },
    },
};

use crate::{bounded::bounded, input::Input};

/// Bytes of the memory device.
pub(crate) const LENGTH: u64 = 64 << 10;

/// A device whose every read is the same and whose writes go nowhere.
#[derive(Debug)]
pub(crate) struct Pattern {
    pub(crate) read_only: bool,
}

impl Pattern {
    fn within(offset: u64, len: u64) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= LENGTH),
            "a front end checks ranges first"
        );
    }
}

impl BlockDevice for Pattern {
    fn length(&self) -> u64 {
        LENGTH
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn block_size_preferred(&self) -> u32 {
        4096
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        Self::within(offset, buf.len() as u64);
        buf.fill(0x5a);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _durability: Durability) -> io::Result<()> {
        Self::within(offset, data.len() as u64);
        assert!(!self.read_only, "nothing is written to a read-only device");
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64, _fua: bool) -> io::Result<()> {
        Self::within(offset, len);
        assert!(!self.read_only);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        Self::within(offset, len);
        assert!(!self.read_only);
        if flags.fast_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        Self::within(offset, len);
        assert!(max > 0 && len > 0);
        let first = AllocationExtent {
            length: len.min(4096),
            hole: offset.is_multiple_of(2),
            zero: offset.is_multiple_of(2),
        };
        let rest = AllocationExtent {
            length: len - first.length,
            hole: false,
            zero: false,
        };
        let both = [first, rest].into_iter();
        Ok(both.filter(|extent| extent.length > 0).take(max).collect())
    }
}

/// `rw` and `ro`.
pub(crate) fn exports() -> Arc<ExportRegistry> {
    static EXPORTS: OnceLock<Arc<ExportRegistry>> = OnceLock::new();
    Arc::clone(EXPORTS.get_or_init(|| {
        let registry = ExportRegistry::new();
        for (name, read_only) in [("rw", false), ("ro", true)] {
            registry
                .add(name, "a device", Arc::new(Pattern { read_only }))
                .expect("two names");
        }
        Arc::new(registry)
    }))
}

/// Reads one option's replies: each is whole, and the last one ends them.
fn replies(mut out: &[u8], option: u32) {
    let mut last = None;
    while !out.is_empty() {
        let mut fields = Input::new(out);
        let mut big = || u32::from_be_bytes(fields.u32().to_le_bytes());
        let magic = u64::from(big()) << 32 | u64::from(big());
        let (answered, kind, length) = (big(), big(), big() as usize);
        assert_eq!((magic, answered), (OPTION_REPLY_MAGIC, option));
        assert!(
            last.is_none(),
            "nothing follows the last reply to an option"
        );
        // Acknowledgement, or an error.
        if kind == 1 || kind >> 31 == 1 {
            last = Some(kind);
        }
        assert!(out.len() >= 20 + length, "a reply is whole");
        out = &out[20 + length..];
    }
    assert!(last.is_some(), "an option is answered");
}

/// A negotiation.
pub fn handshake(data: &[u8]) {
    let mut input = Input::new(data);
    let registry = exports();
    let Some(mut negotiation) = Negotiation::begin(u32::from(input.u8())) else {
        return;
    };
    let mut out = Vec::new();
    for _ in 0..32 {
        if input.is_empty() {
            return;
        }
        let mut head = [0; OPTION_HEADER_LEN];
        head[..8].copy_from_slice(&IHAVEOPT.to_be_bytes());
        let option = match input.u8() {
            255 => input.u32(),
            option => u32::from(option % 12),
        };
        let length = u32::from(input.u8());
        head[8..12].copy_from_slice(&option.to_be_bytes());
        head[12..].copy_from_slice(&length.to_be_bytes());
        let header = OptionHeader::decode(&head).expect("the magic is right");
        assert_eq!(header, OptionHeader { option, length });
        assert!(length <= OPTION_LENGTH_MAX);
        let body = input.bytes(length as usize);
        out.clear();
        let decision = bounded(16 * body.len() + 16_384, || {
            negotiation.answer(&*registry, option, body, &mut out)
        });
        match decision {
            Decision::Continue => replies(&out, option),
            Decision::Close => return,
            Decision::Transmit(agreement) => {
                assert!(!agreement.base_allocation || agreement.structured_replies);
                if option == NBD_OPT_EXPORT_NAME {
                    assert!(out.len() == 10 || out.len() == 134);
                } else {
                    replies(&out, option);
                }
                assert_ne!(option, NBD_OPT_LIST);
                return;
            }
        }
    }
}

/// One request's header and its checks, and the replies that tell of it.
pub fn transmission(data: &[u8]) {
    let mut input = Input::new(data);
    let kinds = input.u8();
    let terms = Terms {
        length: if kinds & 8 == 0 { LENGTH } else { input.u64() },
        read_only: kinds & 1 == 1,
        structured_replies: kinds & 2 == 2,
        base_allocation: kinds & 4 == 4,
    };
    let magic = if kinds & 16 == 0 {
        [0x25, 0x60, 0x95, 0x13]
    } else {
        input.u32().to_le_bytes()
    };
    let mut bytes = [0; REQUEST_LEN];
    bytes[..4].copy_from_slice(&magic);
    let rest = input.bytes(REQUEST_LEN - 4);
    bytes[4..4 + rest.len()].copy_from_slice(rest);
    let Some(header) = RequestHeader::decode(&bytes) else {
        assert_ne!(magic, [0x25, 0x60, 0x95, 0x13]);
        return;
    };
    assert_eq!(header.encode(), bytes, "a request has one encoding");
    let end = header.offset.checked_add(u64::from(header.length));
    let inside = end.is_some_and(|end| end <= terms.length);
    match check(&header, &terms) {
        Ok(Command::Disconnect | Command::Flush) => {}
        Ok(Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes(_)) => {
            assert!(inside && !terms.read_only);
        }
        Ok(Command::Read { .. }) => assert!(inside && header.length <= REQUEST_PAYLOAD_MAX),
        Ok(Command::Cache) => assert!(inside),
        Ok(Command::BlockStatus { .. }) => {
            assert!(inside && terms.base_allocation && header.length > 0);
            status(&header, input);
        }
        Err(error) => {
            let simple = reply::simple(header.cookie, Some(error));
            let chunk = reply::error_chunk(header.cookie, error);
            assert_eq!(simple[8..], header.cookie.to_be_bytes());
            assert_eq!(chunk[8..16], header.cookie.to_be_bytes());
            assert_ne!(error.code(), 0);
            assert_ne!(error, NbdError::Shutdown);
        }
    }
}

/// What a device says of a range, as a reply: within the range, without gaps, no longer than asked for.
fn status(header: &RequestHeader, mut input: Input<'_>) {
    let max = 1 + usize::from(input.u8() % 8);
    let mut extents = Vec::new();
    while !input.is_empty() {
        let flags = input.u8();
        extents.push(AllocationExtent {
            length: if flags & 4 == 4 {
                input.u64()
            } else {
                u64::from(input.u16())
            },
            hole: flags & 1 == 1,
            zero: flags & 2 == 2,
        });
    }
    let mut out = Vec::new();
    reply::block_status(&mut out, header.cookie, header.length, &extents, max);
    let (head, payload) = out.split_at(20);
    assert_eq!(head[..4], STRUCTURED_REPLY_MAGIC.to_be_bytes());
    let length = u32::try_from(payload.len()).expect("small");
    assert_eq!(head[16..20], length.to_be_bytes());
    let descriptors = payload[4..].chunks_exact(8);
    assert!(descriptors.len() >= 1 && descriptors.len() <= max && payload.len() % 8 == 4);
    let mut sum = 0_u64;
    for descriptor in descriptors {
        let mut fields = Input::new(descriptor);
        let bytes = u32::from_be_bytes(fields.u32().to_le_bytes());
        assert!(bytes > 0);
        sum += u64::from(bytes);
    }
    assert!(sum <= u64::from(header.length));
}
