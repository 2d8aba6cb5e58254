//! The codec: any bytes are decoded without a panic, encodings are the protocol's, the negotiation keeps its rules.

use std::sync::Arc;

use proptest::prelude::*;
use tidemark_export::errno::NbdError;
use tidemark_export::nbd::negotiate::{Decision, Negotiation};
use tidemark_export::nbd::option::{self, OptionRequest};
use tidemark_export::nbd::request::{Command, RequestHeader, Terms, check};
use tidemark_export::nbd::wire::{self, OptionHeader};
use tidemark_export::nbd::{limits, reply};
use tidemark_export::{AllocationExtent, ExportRegistry};

use crate::client::{go_data, meta_data};
use crate::devices::MemoryDevice;

fn registry() -> ExportRegistry {
    let registry = ExportRegistry::new();
    registry
        .add("data", "a test", Arc::new(MemoryDevice::new(1 << 20)))
        .unwrap();
    registry
}

proptest! {
    #[test]
    fn any_option_is_answered_and_a_refusal_keeps_the_stream_in_step(
        options in prop::collection::vec((0u32..14, prop::collection::vec(any::<u8>(), 0..64)), 0..16),
    ) {
        let registry = registry();
        let mut negotiation = Negotiation::begin(3).unwrap();
        for (number, data) in options {
            let mut out = Vec::new();
            match negotiation.answer(&registry, number, &data, &mut out) {
                Decision::Continue => {
                    prop_assert_eq!(&out[..8], &wire::OPTION_REPLY_MAGIC.to_be_bytes()[..]);
                    prop_assert_eq!(&out[8..12], &number.to_be_bytes()[..]);
                }
                Decision::Transmit(_) | Decision::Close => break,
            }
        }
    }

    #[test]
    fn a_request_survives_encoding(
        flags: u16, command: u16, cookie: u64, offset: u64, length: u32,
    ) {
        let header = RequestHeader { flags, command, cookie, offset, length };
        prop_assert_eq!(RequestHeader::decode(&header.encode()), Some(header));
    }

    #[test]
    fn a_request_with_another_magic_is_refused(bytes: [u8; wire::REQUEST_LEN]) {
        let good = bytes[..4] == wire::REQUEST_MAGIC.to_be_bytes();
        prop_assert_eq!(RequestHeader::decode(&bytes).is_some(), good);
    }

    #[test]
    fn an_option_header_with_another_magic_is_refused(bytes: [u8; wire::OPTION_HEADER_LEN]) {
        let good = bytes[..8] == wire::IHAVEOPT.to_be_bytes();
        prop_assert_eq!(OptionHeader::decode(&bytes).is_some(), good);
    }

    #[test]
    fn a_request_that_passes_the_check_lies_within_the_export(
        flags in 0u16..64, command in 0u16..10, offset in prop_oneof![0u64..300, any::<u64>()],
        length in prop_oneof![0u32..300, any::<u32>()], read_only: bool, structured_replies: bool,
        base_allocation: bool, size in 0u64..300,
    ) {
        let header = RequestHeader { flags, command, cookie: 0, offset, length };
        let terms = Terms { length: size, read_only, structured_replies, base_allocation };
        match check(&header, &terms) {
            Ok(Command::Disconnect | Command::Flush) | Err(_) => {}
            Ok(command) => {
                prop_assert!(u128::from(offset) + u128::from(length) <= u128::from(size));
                let writes = matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes(_));
                prop_assert!(!(writes && read_only));
            }
        }
    }

    #[test]
    fn a_block_status_keeps_the_protocol_whatever_the_device_tells(
        extents in prop::collection::vec((0u64..5000, any::<bool>(), any::<bool>()), 0..40),
        length in 1u32..10_000, max in 1usize..20,
    ) {
        let extents: Vec<_> =
            extents.into_iter().map(|(length, hole, zero)| AllocationExtent { length, hole, zero }).collect();
        let mut out = Vec::new();
        reply::block_status(&mut out, 7, length, &extents, max);
        let number = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
        prop_assert_eq!(number(16) as usize, out.len() - 20);
        let descriptors: Vec<_> = (24..out.len()).step_by(8).map(|at| (number(at), number(at + 4))).collect();
        prop_assert!((1..=max).contains(&descriptors.len()));
        prop_assert!(descriptors.iter().all(|(run, _)| *run > 0));
        prop_assert!(descriptors.iter().map(|(run, _)| u64::from(*run)).sum::<u64>() <= u64::from(length));
        prop_assert!(descriptors.windows(2).all(|pair| pair[0].1 != pair[1].1));
        // Byte for byte what the device told.
        let mut told = extents.iter().flat_map(|extent| {
            let state = u32::from(extent.hole) | u32::from(extent.zero) << 1;
            std::iter::repeat_n(state, extent.length as usize)
        });
        if extents.iter().any(|extent| extent.length > 0) {
            for (run, state) in descriptors {
                for _ in 0..run {
                    prop_assert_eq!(told.next(), Some(state));
                }
            }
        }
    }
}

#[test]
fn replies_are_encoded_as_the_protocol_says() {
    assert_eq!(
        reply::simple(0x0102, None),
        *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\x01\x02"
    );
    assert_eq!(
        reply::simple(1, Some(NbdError::NoSpc)),
        *b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x01"
    );
    assert_eq!(
        reply::none_chunk(1),
        *b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0\0\0"
    );
    assert_eq!(
        reply::data_chunk(1, false, 512, 3),
        *b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x0b\0\0\0\0\0\0\x02\0"
    );
    assert_eq!(
        reply::hole_chunk(1, true, 512, 4096),
        *b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x01\0\0\0\x0c\0\0\0\0\0\0\x02\0\0\0\x10\0"
    );
    assert_eq!(
        reply::error_chunk(1, NbdError::Io),
        *b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x01\0\0\0\x06\0\0\0\x05\0\0"
    );
    assert_eq!(wire::greeting(), *b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn each_mistake_in_a_request_has_its_error() {
    let terms = Terms {
        length: 100,
        read_only: false,
        structured_replies: true,
        base_allocation: true,
    };
    let read_only = Terms {
        read_only: true,
        ..terms
    };
    let plain = Terms {
        structured_replies: false,
        base_allocation: false,
        ..terms
    };
    let of = |command, flags, offset, length| RequestHeader {
        flags,
        command,
        cookie: 0,
        offset,
        length,
    };
    let cases = [
        (
            of(0, 0, 90, 11),
            terms,
            NbdError::Inval,
            "read past the end",
        ),
        (
            of(0, 0, u64::MAX, 2),
            terms,
            NbdError::Inval,
            "read past the end of numbers",
        ),
        (of(0, 2, 0, 1), terms, NbdError::Inval, "NO_HOLE on a read"),
        (
            of(0, 4, 0, 1),
            plain,
            NbdError::Inval,
            "DF without structured replies",
        ),
        (
            of(0, 0, 0, limits::REQUEST_PAYLOAD_MAX + 1),
            terms,
            NbdError::Inval,
            "read too long",
        ),
        (
            of(1, 0, 90, 11),
            terms,
            NbdError::NoSpc,
            "write past the end",
        ),
        (
            of(1, 0, 0, 1),
            read_only,
            NbdError::Perm,
            "write to a read-only export",
        ),
        (
            of(1, 16, 0, 1),
            terms,
            NbdError::Inval,
            "FAST_ZERO on a write",
        ),
        (
            of(4, 0, 0, 1),
            read_only,
            NbdError::Perm,
            "trim of a read-only export",
        ),
        (
            of(4, 0, 100, 1),
            terms,
            NbdError::Inval,
            "trim past the end",
        ),
        (
            of(6, 0, 100, 1),
            terms,
            NbdError::NoSpc,
            "zeroes past the end",
        ),
        (
            of(6, 0, 0, 1),
            read_only,
            NbdError::Perm,
            "zeroes on a read-only export",
        ),
        (
            of(7, 0, 0, 1),
            plain,
            NbdError::Inval,
            "status without a context",
        ),
        (of(7, 0, 0, 0), terms, NbdError::Inval, "status of nothing"),
        (
            of(5, 0, 50, 51),
            terms,
            NbdError::Inval,
            "cache past the end",
        ),
        (of(3, 8, 0, 0), terms, NbdError::Inval, "REQ_ONE on a flush"),
        (of(8, 0, 0, 0), terms, NbdError::Inval, "unknown command"),
        (of(0, 1 << 15, 0, 1), terms, NbdError::Inval, "unknown flag"),
    ];
    for (header, terms, error, what) in cases {
        assert_eq!(check(&header, &terms), Err(error), "{what}");
    }
    assert_eq!(
        check(&of(0, 1, 0, 1), &terms),
        Ok(Command::Read {
            unfragmented: false
        }),
        "FUA is valid everywhere"
    );
}

#[test]
fn options_with_wrong_lengths_are_malformed() {
    let mut trailing = go_data("data", &[3]);
    trailing.push(0);
    let huge_name = u32::MAX.to_be_bytes().to_vec();
    let mut huge_count = meta_data("data", &[]);
    let at = huge_count.len() - 4;
    huge_count[at..].copy_from_slice(&u32::MAX.to_be_bytes());
    for (number, data) in [
        (wire::NBD_OPT_GO, trailing),
        (wire::NBD_OPT_GO, huge_name),
        (wire::NBD_OPT_INFO, vec![]),
        (wire::NBD_OPT_LIST, vec![0]),
        (wire::NBD_OPT_STRUCTURED_REPLY, vec![0]),
        (wire::NBD_OPT_SET_META_CONTEXT, huge_count),
        (wire::NBD_OPT_GO, go_data("a\0b", &[])),
        (wire::NBD_OPT_EXPORT_NAME, vec![0xff]),
    ] {
        assert!(
            option::decode(number, &data).is_err(),
            "option {number} {data:?}"
        );
    }
    assert_eq!(option::decode(99, &[1, 2, 3]), Ok(OptionRequest::Unknown));
}

#[test]
fn a_context_selected_for_one_export_is_void_for_another() {
    let registry = registry();
    registry
        .add("other", "", Arc::new(MemoryDevice::new(1 << 20)))
        .unwrap();
    for (selected, entered, expected) in [("data", "data", true), ("data", "other", false)] {
        let mut negotiation = Negotiation::begin(3).unwrap();
        let mut out = Vec::new();
        negotiation.answer(&registry, wire::NBD_OPT_STRUCTURED_REPLY, &[], &mut out);
        let data = meta_data(selected, &["base:allocation"]);
        negotiation.answer(&registry, wire::NBD_OPT_SET_META_CONTEXT, &data, &mut out);
        let decision = negotiation.answer(
            &registry,
            wire::NBD_OPT_GO,
            &go_data(entered, &[]),
            &mut out,
        );
        let Decision::Transmit(agreement) = decision else {
            panic!("no transmission")
        };
        assert_eq!(agreement.base_allocation, expected);
    }
}

#[test]
fn unknown_client_flags_end_the_handshake() {
    assert!(Negotiation::begin(1).is_some());
    assert!(Negotiation::begin(0).is_none(), "not fixed newstyle");
    assert!(Negotiation::begin(1 | 4).is_none());
}
