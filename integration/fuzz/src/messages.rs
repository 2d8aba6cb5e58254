//! Messages of the protocol: bytes to protobuf, protobuf to domain types, and both ways back.

use std::fmt::Debug;

use bytes::Bytes;
use prost::Message;
use tidemark_block::{Geometry, IntervalHeader, IntervalSeal, Receipt};
use tidemark_proto::{
    RpcError,
    capture::v1 as capture,
    common::v1 as common,
    convert::{
        self, CurrentMark, DIGEST_RANGES_MAX, DigestRun, DigestsRequest, NAME_BYTES_MAX,
        ShipAnswer, ShipMessage, TermGrant, TermRequest,
    },
    vault::v1 as vault,
};

use crate::{bounded::bounded, input::Input};

/// A decoded message takes more than its bytes: an empty element of a list is two bytes on the wire.
const fn room(bytes: &[u8]) -> usize {
    512 * bytes.len() + 65_536
}

fn decoded<M: Message + Default + PartialEq + Debug>(bytes: &Bytes) -> Option<M> {
    let message = bounded(room(bytes), || M::decode(bytes.clone())).ok()?;
    let again = message.encode_to_vec();
    assert_eq!(M::decode(&again[..]).as_ref(), Ok(&message));
    Some(message)
}

/// What becomes a domain type becomes the same one again from its own message.
fn converted<M, D>(bytes: &Bytes) -> Option<D>
where
    M: Message + Default + PartialEq + Debug + From<D>,
    D: TryFrom<M, Error = convert::WireError> + Clone + PartialEq + Debug,
{
    let domain = match D::try_from(decoded::<M>(bytes)?) {
        Ok(domain) => domain,
        Err(error) => {
            assert!(!RpcError::from(error).message.is_empty());
            return None;
        }
    };
    assert_eq!(D::try_from(M::from(domain.clone())).as_ref(), Ok(&domain));
    Some(domain)
}

fn ship(bytes: &Bytes) {
    if let Some(ShipMessage::Frames(batch)) = converted::<vault::ShipRequest, ShipMessage>(bytes) {
        assert!(batch.frames.len() <= bytes.len());
    }
}

fn digests(bytes: &Bytes) {
    if let Some(request) = converted::<vault::GetBlockDigestsRequest, DigestsRequest>(bytes) {
        assert!(request.ranges.len() <= DIGEST_RANGES_MAX);
        for range in request.ranges {
            assert!(range.count > 0 && range.start.checked_add(range.count).is_some());
        }
    }
}

fn term(bytes: &Bytes) {
    if let Some(request) = converted::<vault::StartTermRequest, TermRequest>(bytes) {
        assert!(request.volume_name.len().max(request.source_name.len()) <= NAME_BYTES_MAX);
    }
}

/// Messages that are used as they are.
fn plain(kind: u8, bytes: &Bytes) {
    match kind {
        0 => drop(decoded::<vault::ListVolumesResponse>(bytes)),
        1 => drop(decoded::<vault::ListGenerationsResponse>(bytes)),
        2 => drop(decoded::<vault::RestoreResponse>(bytes)),
        3 => drop(decoded::<vault::MaintainResponse>(bytes)),
        4 => drop(decoded::<vault::VaultStatus>(bytes)),
        5 => drop(decoded::<capture::AddVolumeRequest>(bytes)),
        6 => drop(decoded::<capture::ListVolumesResponse>(bytes)),
        7 => drop(decoded::<capture::ReadSnapshotResponse>(bytes)),
        8 => drop(decoded::<capture::TriggerIntervalResponse>(bytes)),
        9 => drop(decoded::<capture::CaptureStatus>(bytes)),
        10 => drop(decoded::<capture::CreateSnapshotRequest>(bytes)),
        _ => drop(decoded::<common::ErrorDetail>(bytes)),
    }
}

/// Messages.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let bytes = Bytes::copy_from_slice(input.rest());
    match kind % 24 {
        0 | 1 => ship(&bytes),
        2 => drop(converted::<vault::ShipResponse, ShipAnswer>(&bytes)),
        3 => term(&bytes),
        4 => drop(converted::<vault::StartTermResponse, TermGrant>(&bytes)),
        5 => drop(converted::<vault::MarkCurrentRequest, CurrentMark>(&bytes)),
        6 => digests(&bytes),
        7 => drop(converted::<vault::GetBlockDigestsResponse, DigestRun>(
            &bytes,
        )),
        8 => drop(converted::<vault::IntervalHeader, IntervalHeader>(&bytes)),
        9 => drop(converted::<vault::IntervalSeal, IntervalSeal>(&bytes)),
        10 => drop(converted::<common::Receipt, Receipt>(&bytes)),
        11 => drop(converted::<common::Geometry, Geometry>(&bytes)),
        kind => plain(kind - 12, &bytes),
    }
}
