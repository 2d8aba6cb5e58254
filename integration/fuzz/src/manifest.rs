//! Manifests and their pages, the advisory object and the store's marker, and what is planned from them.

use tidemark_block::{
    GenerationId, Sequence, VolumeId, WriterTerm,
    wire::{ENVELOPE_LEN, Reader},
    xxh3_128,
};
use vault_core::{
    manifest::{
        CURRENT_MAGIC, Current, MANIFEST_MAGIC, MANIFEST_VERSION, MARKER_MAGIC, Manifest,
        PAGE_MAGIC, StoreMarker, TermRequest, check_invariants, decode_page, encode_page,
        grant_term,
    },
    retention::{RetentionPolicy, plan, retire},
};

use crate::{
    bounded::bounded,
    input::Input,
    wire::{raw_or_sealed, room},
};

const VOLUME: VolumeId = VolumeId::from_bytes([0x11; 16]);

fn manifest(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, MANIFEST_MAGIC);
    let version = input.rest().get(16..24);
    let version = version.map_or(1, |bytes| Reader::new(bytes).u64().unwrap_or(1));
    let Ok(manifest) = bounded(room(&bytes), || Manifest::decode(&bytes, VOLUME, version)) else {
        return;
    };
    if sealed {
        // Version 1, which ends without a list of reasons.
        let (payload, again) = (&bytes[ENVELOPE_LEN..], manifest.encode());
        let (same, reasons) = again[ENVELOPE_LEN..].split_at(payload.len());
        assert_eq!(same, payload, "a manifest has one encoding");
        assert_eq!(reasons, [0; 4]);
    } else if Reader::new(&bytes[8..]).u16() == Ok(MANIFEST_VERSION) {
        assert_eq!(manifest.encode(), bytes, "a manifest has one encoding");
    }
    // What only a damaged object could hold is refused before anything is planned from it.
    let sound = check_invariants(&manifest, None).is_ok();
    let _figures = (
        manifest.stored_bytes(),
        manifest.named_bytes(),
        manifest.segment_count(),
        manifest.retained(),
        manifest.chain(Sequence::new(7)),
    );
    // At the end of the counters' range the next version would be refused: no history gets there.
    let counters = [manifest.version, manifest.term.get()];
    if !sound || counters.iter().any(|counter| *counter >= 1 << 62) {
        return;
    }
    let retired = plan(&manifest, RetentionPolicy { newest: 2 });
    assert!(!retired.contains(&manifest.head_id()));
    let next = retire(&manifest, &retired, 5);
    assert_eq!(next.head_id(), manifest.head_id());
    assert_eq!(check_invariants(&next, Some(&manifest)), Ok(()));
    let again = Manifest::decode(&next.encode(), VOLUME, next.version);
    assert_eq!(again.as_ref(), Ok(&next));
    term(&manifest);
}

/// A term is given to whoever holds the current one, and to nobody else.
fn term(manifest: &Manifest) {
    let mut request = TermRequest {
        volume: VOLUME,
        name: manifest.name.clone(),
        source: manifest.source.clone(),
        geometry: manifest.geometry,
        last_term: manifest.term,
        nonce: manifest.nonce,
    };
    assert_eq!(grant_term(Some(manifest), &request, 9), Ok(None));
    request.nonce[0] ^= 1;
    if let Ok(Some(next)) = grant_term(Some(manifest), &request, 9) {
        assert!(next.term > manifest.term);
        assert_eq!(check_invariants(&next, Some(manifest)), Ok(()));
    }
    request.last_term = WriterTerm::new(manifest.term.get() ^ 1);
    assert!(grant_term(Some(manifest), &request, 9).is_err());
}

fn page(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, PAGE_MAGIC);
    let name = xxh3_128(&bytes);
    if let Ok(records) = bounded(room(&bytes), || decode_page(&bytes, name))
        && sealed
    {
        assert_eq!(encode_page(&records), bytes, "a page has one encoding");
    }
}

fn current(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, CURRENT_MAGIC);
    if let Ok(current) = Current::decode(&bytes, VOLUME) {
        let _generation: GenerationId = current.generation;
        assert!(!sealed || current.encode(VOLUME) == bytes);
    }
}

fn marker(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, MARKER_MAGIC);
    if let Ok(marker) = StoreMarker::decode(&bytes) {
        assert!(!sealed || marker.encode() == bytes);
    }
}

/// Manifests.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => current(input),
        1 => marker(input),
        2 => page(input),
        _ => manifest(input),
    }
}
