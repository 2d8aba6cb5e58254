//! What people write: sizes, lengths of time, identities and addresses.

use std::str::from_utf8;

use tidemark_block::VolumeId;
use tidemark_config::{ByteSize, Span};
use tidemark_export::NbdAddress;

/// What reads as a value reads as the same one again as it is shown.
pub fn run(data: &[u8]) {
    let Ok(text) = from_utf8(data) else { return };
    if let Ok(size) = text.parse::<ByteSize>() {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    if let Ok(span) = text.parse::<Span>() {
        assert_eq!(span.to_string().parse(), Ok(span));
    }
    if let Ok(id) = text.parse::<VolumeId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    // Names of hosts are looked up: only addresses that need no network are tried.
    if (text.starts_with("unix:") || text.parse::<std::net::SocketAddr>().is_ok())
        && let Ok(address) = text.parse::<NbdAddress>()
    {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
}
