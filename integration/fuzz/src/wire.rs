//! The envelope of every structure, and the encoded block set.

use tidemark_block::{
    BlockSet, BlockSize, Geometry,
    wire::{self, ENVELOPE_LEN},
};

use crate::{bounded::bounded, input::Input};

/// Bytes as they came, or put into an envelope that is right: else no mutation would get past the checksum.
pub(crate) fn raw_or_sealed(input: &mut Input<'_>, magic: [u8; 8]) -> (bool, Vec<u8>) {
    if input.flag() {
        (true, wire::seal(magic, 1, input.rest()))
    } else {
        (false, input.rest().to_vec())
    }
}

/// What a decoder of `bytes` may hold: the decoded form is never much larger than the encoded one.
pub(crate) const fn room(bytes: &[u8]) -> usize {
    64 * bytes.len() + 65_536
}

const MAGIC: [u8; 8] = *b"TMBLKSET";

/// Envelopes and block sets.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let blocks = 1 + input.below(1 << 15);
    let geometry = Geometry::new(blocks * 4096, BlockSize::MIN).expect("blocks of 4 KiB");
    let (sealed, bytes) = raw_or_sealed(&mut input, MAGIC);
    match wire::unseal(MAGIC, 1, &bytes) {
        Ok((version, payload)) => {
            assert_eq!(payload, &bytes[ENVELOPE_LEN..]);
            if sealed {
                assert_eq!(wire::seal(MAGIC, version, payload), bytes);
            }
        }
        Err(_) => assert!(!sealed, "what was sealed can be unsealed"),
    }
    let Ok(set) = bounded(room(&bytes), || BlockSet::decode(&bytes, geometry.all())) else {
        return;
    };
    let listed: u64 = set.extents().map(|extent| extent.count().get()).sum();
    assert_eq!(set.len().get(), listed);
    assert_eq!(set.intersect_extent(geometry.all()), set);
    let encoded = set.encode();
    assert_eq!(
        BlockSet::decode(&encoded, geometry.all()).as_ref(),
        Ok(&set)
    );
    let rebuilt: BlockSet = set.extents().collect();
    assert_eq!(rebuilt, set);
    assert_eq!(rebuilt.encode(), encoded, "one set has one encoding");
}
