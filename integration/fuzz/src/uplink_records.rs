//! What lies beside a volume's state: the uplink's record, the registry's record, the checksums of the interval in
//! flight, and the stamp of a checksum table. These modules are private to their crates, and compiled in here.

use crate::{bounded::bounded, input::Input, wire::room};

#[allow(dead_code, unreachable_pub, reason = "only the codec is used here")]
#[path = "../../../capture-svc/src/uplink/pending.rs"]
mod pending;
#[allow(dead_code, unreachable_pub, reason = "only the codec is used here")]
#[path = "../../../crates/disk/src/checksum_table/stamp.rs"]
mod stamp;
#[allow(dead_code, unreachable_pub, reason = "only the codec is used here")]
#[path = "../../../capture-svc/src/uplink/record.rs"]
mod uplink;
#[allow(dead_code, unreachable_pub, reason = "only the codec is used here")]
#[path = "../../../capture-svc/src/volume/record.rs"]
mod volume;

fn uplink_record(bytes: &[u8]) {
    for version in 1..=uplink::VERSION {
        let read = bounded(room(bytes), || uplink::UplinkRecord::decode(version, bytes));
        if let Ok(record) = read {
            let again = record.encode();
            assert!(again.len() == bytes.len() || version < uplink::VERSION);
            assert_eq!(
                uplink::UplinkRecord::decode(uplink::VERSION, &again),
                Ok(record)
            );
        }
    }
}

fn volume_record(bytes: &[u8]) {
    for version in 1..=volume::VERSION {
        let read = bounded(room(bytes), || volume::VolumeRecord::decode(version, bytes));
        if let Ok(record) = read {
            let again = record.encode();
            assert!(version < volume::VERSION || again == bytes);
            let read = volume::VolumeRecord::decode(volume::VERSION, &again);
            assert_eq!(read, Ok(record));
        }
    }
}

fn stamp_record(bytes: &[u8]) {
    if let Ok(stamp) = stamp::Stamp::decode(bytes) {
        assert_eq!(bytes.len(), 36);
        assert_eq!(stamp.encode(), bytes, "a stamp has one encoding");
    }
}

fn pending_entry(bytes: &[u8]) {
    if let Ok(entry) = bounded(room(bytes), || pending::Entry::decode(bytes)) {
        let _blocks = entry.blocks();
        let mut again = Vec::new();
        entry.encode(&mut again);
        assert_eq!(&again[20..], bytes, "an entry has one encoding");
        assert_eq!(pending::Entry::decode(&again[20..]), Ok(entry));
    }
}

/// Records.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => uplink_record(input.rest()),
        1 => volume_record(input.rest()),
        2 => stamp_record(input.rest()),
        _ => pending_entry(input.rest()),
    }
}
